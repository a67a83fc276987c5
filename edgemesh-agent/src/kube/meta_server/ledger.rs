//! What is known of one kind: which of metaServer's answers count, and what follows from them. Pure: no clock, no IO.
//!
//! metaServer mixes what the API server says with what it stored long ago, and tells neither. What can be told, by
//! `resourceVersion` and `uid`:
//!
//! - A list that the API server has made ([`Origin::Online`]) is the truth as of its version. Everything else can only
//!   add, and only what is newer.
//! - An object that such a list lacks, and whose version is not above that list's, does not exist, whatever is replayed
//!   later: it is a ghost, stored on the node since before it was deleted.
//! - Nothing is taken away but by a DELETED event, or by two online lists in a row that lack it.

use std::collections::{HashMap, HashSet};

use crate::{
    kube::may_be_empty,
    model::{Event, Kind, NamespacedName, Object},
};

/// One object as metaServer gave it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Item {
    pub(super) name: NamespacedName,
    pub(super) uid: Box<str>,
    /// 0 where there is none that can be read.
    pub(super) version: u64,
    pub(super) content: Content,
}

/// What there is in an [`Item`].
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Content {
    Usable(Object),
    /// The object says something that cannot be served.
    Unusable,
    /// Not even an object of its kind, which says nothing of what the cluster has.
    Unreadable,
}

/// An answer to a list that was read to its end.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct List {
    pub(super) items: Vec<Item>,
    pub(super) origin: Origin,
    pub(super) extent: Extent,
}

/// How much of what there is a list has.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Extent {
    /// All.
    Whole,
    /// All that was selected; what was not may be there or not.
    Selection,
    /// Not even that: an item has no name, or there are further pages.
    Part,
}

/// Who made a list.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Origin {
    /// The API server, when it was at this version.
    Online(u64),
    /// metaServer, of what it had stored; or nobody knows, which proves as little.
    Stored,
}

/// When a list was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket(u64);

/// All objects of one kind.
#[derive(Debug)]
pub(super) struct Ledger {
    kind: Kind,
    entries: HashMap<NamespacedName, Entry>,
    /// How many entries have an object.
    usable: usize,
    /// Objects that DELETED events took away since the last proof was asked for.
    graves: HashMap<NamespacedName, Grave>,
    /// The version of the last online list that was whole.
    proof: Option<u64>,
    /// How many online lists had all that was asked for; more than 2 count as 2.
    proofs: u8,
    /// Whether [`Event::Replace`] has been told.
    settled: bool,
    /// How many of them in a row were older than the proof before.
    regressions: u8,
    /// Whether stored objects have been delivered.
    stored: bool,
    /// Whether an entry is missing from the last proof.
    doubtful: bool,
    epoch: u64,
}

#[derive(Debug)]
struct Entry {
    uid: Box<str>,
    version: u64,
    /// None for what cannot be used.
    object: Option<Object>,
    /// The last proof lacked it.
    missing: bool,
}

#[derive(Debug)]
struct Grave {
    uid: Box<str>,
    epoch: u64,
}

impl Ledger {
    /// `reached` is what [`Self::reached`] said in an earlier run whose objects are in force: to what is stored, this one
    /// knows as much.
    pub(super) fn new(kind: Kind, reached: Option<u64>) -> Self {
        Self {
            kind,
            entries: HashMap::new(),
            usable: 0,
            graves: HashMap::new(),
            proof: reached,
            proofs: 0,
            settled: false,
            regressions: 0,
            stored: false,
            doubtful: false,
            epoch: 0,
        }
    }

    /// How many objects have been delivered.
    pub(super) fn len(&self) -> usize {
        self.usable
    }

    /// Everything that can be had has been delivered: what two online lists have, or what was stored.
    pub(super) fn is_delivered(&self) -> bool {
        self.proofs >= 2 || self.stored
    }

    /// The version as of which everything has been told, and nothing else is in force.
    pub(super) fn reached(&self) -> Option<u64> {
        self.proof.filter(|_| self.settled && !self.doubtful)
    }

    /// Another online list is wanted soon, as the last one alone is not enough to take anything away.
    pub(super) fn wants_confirmation(&self) -> bool {
        self.proofs == 1 || self.doubtful || self.regressions > 0
    }

    /// To be called when a list is asked for; its answer goes to [`Self::list`] with what this returns.
    pub(super) fn ask(&mut self) -> Ticket {
        self.epoch += 1;
        Ticket(self.epoch)
    }

    /// Takes a complete answer to a list in.
    ///
    /// The second list of the API server is told as [`Event::Replace`] of all that is known, which also does away with what
    /// others knew: an earlier agent's snapshot.
    pub(super) fn list(&mut self, ticket: Ticket, list: List) -> Vec<Event> {
        let Origin::Online(version) = list.origin else {
            self.stored |= list.items.iter().any(|item| matches!(item.content, Content::Usable(_)));
            return list.items.into_iter().filter_map(|item| self.upsert(item)).collect();
        };
        let sound = !list.items.is_empty() || may_be_empty(self.kind);
        let proves = sound && list.extent == Extent::Whole;
        if proves {
            self.forget_versions_of_a_restored_cluster(version);
        }
        let mut events = Vec::new();
        let mut listed = HashSet::with_capacity(list.items.len());
        for item in list.items {
            let dead = self.graves.get(&item.name);
            // Deleted after the list was asked for, which may have been before it was made.
            if dead.is_some_and(|grave| grave.uid == item.uid && grave.epoch >= ticket.0) {
                continue;
            }
            listed.insert(item.name.clone());
            let known = self.entries.get_mut(&item.name);
            let newer = known.as_ref().is_some_and(|entry| {
                entry.version > item.version && (entry.uid == item.uid || entry.version > version)
            });
            if newer {
                continue;
            }
            events.extend(self.put(item));
        }
        if proves {
            self.graves.retain(|_, grave| grave.epoch >= ticket.0);
            self.proof = self.proof.max(Some(version));
            events.extend(self.bury_missing(version, &listed));
        }
        if sound && list.extent != Extent::Part {
            self.proofs = self.proofs.saturating_add(1).min(2);
        }
        let first_certainty = self.proofs == 2 && !std::mem::replace(&mut self.settled, true);
        if first_certainty { vec![Event::Replace(self.kind, self.objects())] } else { events }
    }

    /// Takes an ADDED or MODIFIED event in, or an object of a list that proves nothing.
    pub(super) fn upsert(&mut self, item: Item) -> Option<Event> {
        // An object that was deleted does not come back under the same uid.
        if self.graves.get(&item.name).is_some_and(|grave| grave.uid == item.uid) {
            return None;
        }
        let proven_absent = self.proof.is_some_and(|proof| item.version <= proof);
        match self.entries.get(&item.name) {
            None if proven_absent => return None,
            Some(entry) if entry.uid == item.uid => {
                if item.version < entry.version || (entry.missing && proven_absent) {
                    return None;
                }
            }
            // The name belonged to another object when that list was made, or to this one before.
            Some(_) if proven_absent => return None,
            Some(_) | None => {}
        }
        self.put(item)
    }

    /// Takes a DELETED event in.
    pub(super) fn delete(&mut self, item: &Item) -> Option<Event> {
        if let Some(entry) = self.entries.get(&item.name) {
            let older = item.version != 0 && item.version < entry.version;
            // Without a version it can only be held against the uid.
            let unrelated = entry.uid != item.uid && (item.version == 0 || item.version <= entry.version);
            if older || unrelated {
                return None;
            }
        }
        self.graves.insert(item.name.clone(), Grave { uid: item.uid.clone(), epoch: self.epoch });
        self.remove(&item.name)
    }

    /// All objects that can be used.
    fn objects(&self) -> Vec<Object> {
        self.entries.values().filter_map(|entry| entry.object.clone()).collect()
    }

    /// Marks what a proof lacks, and takes away what the one before lacked, too.
    fn bury_missing(&mut self, version: u64, listed: &HashSet<NamespacedName>) -> Vec<Event> {
        self.doubtful = false;
        let mut gone = Vec::new();
        for (name, entry) in &mut self.entries {
            if listed.contains(name) {
                entry.missing = false;
            } else if entry.version > version {
                // Made after the list was.
            } else if entry.missing {
                gone.push(name.clone());
            } else {
                entry.missing = true;
                self.doubtful = true;
            }
        }
        gone.iter().filter_map(|name| self.remove(name)).collect()
    }

    /// A cluster restored from a backup counts from a lower version again, and everything it says would look old. Two
    /// such lists in a row are believed.
    fn forget_versions_of_a_restored_cluster(&mut self, version: u64) {
        if self.proof.is_none_or(|proof| version >= proof) {
            self.regressions = 0;
            return;
        }
        self.regressions += 1;
        if self.regressions >= 2 {
            self.regressions = 0;
            self.proof = None;
            self.graves.clear();
            for entry in self.entries.values_mut() {
                entry.version = 0;
            }
        }
    }

    fn put(&mut self, item: Item) -> Option<Event> {
        let Item { name, uid, version, content } = item;
        let fresh = || Entry { uid: Box::default(), version: 0, object: None, missing: false };
        let entry = self.entries.entry(name.clone()).or_insert_with(fresh);
        entry.missing = false;
        let object = match content {
            Content::Usable(object) => Some(object),
            Content::Unusable => None,
            // The last known good stays, and whatever comes next is newer.
            Content::Unreadable => return None,
        };
        (entry.uid, entry.version) = (uid, version);
        if entry.object == object {
            return None;
        }
        let before = std::mem::replace(&mut entry.object, object.clone());
        self.usable = self.usable + usize::from(object.is_some()) - usize::from(before.is_some());
        match object {
            Some(object) => Some(Event::Apply(object)),
            None => Some(Event::Delete(self.kind, name)),
        }
    }

    fn remove(&mut self, name: &NamespacedName) -> Option<Event> {
        self.entries.remove(name)?.object?;
        self.usable -= 1;
        Some(Event::Delete(self.kind, name.clone()))
    }
}

#[cfg(test)]
mod tests;
