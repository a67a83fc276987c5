//! Which objects the files hold, and which of several with one name counts.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::model::{Event, Kind, NamespacedName, Object};

/// More would only bury the first ones.
const MAX_DUPLICATES: usize = 100;

/// Kind and name of an object.
pub(super) type Key<'a> = (Kind, &'a NamespacedName);

pub(super) fn key(object: &Object) -> Key<'_> {
    (object.kind(), object.name())
}

/// The objects of all files. A change costs what changed, and a small constant for each object: thousands of them do
/// not make it slow.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// Ordered by key, then by file, then as in the file. The first of each key counts.
    held: Vec<Held>,
    /// How many of them do not count.
    repeated: usize,
    counts: BTreeMap<Kind, usize>,
}

#[derive(Clone, Debug)]
struct Held {
    object: Object,
    file: Arc<str>,
}

impl Held {
    fn place(&self) -> (Key<'_>, &str) {
        (key(&self.object), &self.file)
    }
}

impl Index {
    /// Takes in the files that changed, each with what it held before and holds now; returns what that means for the
    /// objects that count.
    pub(super) fn update<'a>(
        &mut self,
        changed: impl Iterator<Item = (&'a Arc<str>, &'a [Object], &'a [Object])>,
    ) -> Vec<Event> {
        let (mut keys, mut files, mut added) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
        for (file, before, now) in changed {
            keys.extend(before.iter().chain(now).map(key));
            files.insert(Arc::as_ptr(file));
            added.extend(now.iter().map(|object| Held { object: object.clone(), file: Arc::clone(file) }));
        }
        let before: Vec<Option<Object>> = keys.iter().map(|key| self.first(*key)).collect();
        // The files' names are shared, so that this need not look at each object.
        self.held.retain(|held| !files.contains(&Arc::as_ptr(&held.file)));
        if added.len() < self.held.len() / 64 {
            for held in added {
                let place = self.held.partition_point(|other| other.place() <= held.place());
                self.held.insert(place, held);
            }
        } else {
            self.held.extend(added);
            self.held.sort_by(|a, b| a.place().cmp(&b.place()));
        }

        let (mut applied, mut deleted) = (Vec::new(), Vec::new());
        for (key, before) in keys.into_iter().zip(before) {
            match (before, self.first(key)) {
                (Some(before), Some(now)) if before == now => {}
                (before, Some(now)) => {
                    if before.is_none() {
                        *self.counts.entry(key.0).or_insert(0) += 1;
                    }
                    applied.push(Event::Apply(now));
                }
                (Some(_), None) => {
                    if let Some(count) = self.counts.get_mut(&key.0) {
                        *count -= 1;
                    }
                    deleted.push(Event::Delete(key.0, key.1.clone()));
                }
                (None, None) => {}
            }
        }
        self.repeated = self.held.len() - self.counts.values().sum::<usize>();
        // Kinds order as Service, EndpointSlice, Endpoints, Node, DestinationRule: a Service comes after what it needs
        // and leaves first.
        applied.into_iter().rev().chain(deleted).collect()
    }

    /// How many objects of each kind count.
    pub(super) fn counts(&self) -> &BTreeMap<Kind, usize> {
        &self.counts
    }

    /// The objects that count.
    pub(super) fn counting(&self) -> impl Iterator<Item = &Object> {
        self.same_key().filter_map(|same| same.first()).map(|held| &held.object)
    }

    /// What there is more than one of, and which counts; the first [`MAX_DUPLICATES`].
    pub(super) fn duplicates(&self) -> BTreeMap<String, String> {
        if self.repeated == 0 {
            return BTreeMap::new();
        }
        let message = |same: &[Held]| {
            let [first, second, ..] = same else { return None };
            let (object, winner, file) = (&first.object, &first.file, &second.file);
            let subject = format!("{} {}", object.kind(), object.name());
            let message = if winner == file {
                format!("{file} holds {subject} twice; the first counts, remove the other")
            } else {
                format!("{winner} and {file} both hold {subject}; {winner} counts, remove it from one of them")
            };
            Some((subject, message))
        };
        self.same_key().filter_map(message).take(MAX_DUPLICATES).collect()
    }

    fn same_key(&self) -> impl Iterator<Item = &[Held]> {
        self.held.chunk_by(|a, b| key(&a.object) == key(&b.object))
    }

    /// The object of that key that counts.
    fn first(&self, wanted: Key<'_>) -> Option<Object> {
        let place = self.held.partition_point(|held| key(&held.object) < wanted);
        self.held.get(place).map(|held| &held.object).filter(|object| key(object) == wanted).cloned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{Service, ServiceKind};

    /// A Service of that number; `variant` makes it another one of the same name.
    fn service(number: u8, variant: u8) -> Object {
        let mut service = Service::new(NamespacedName::new("default", format!("s{number}")), ServiceKind::ClusterIp);
        service.publish_not_ready = variant > 0;
        Object::Service(service.into())
    }

    /// What counts, found by looking at all files in order.
    fn plain(files: &BTreeMap<Arc<str>, Vec<Object>>) -> BTreeMap<NamespacedName, Object> {
        let mut counting = BTreeMap::new();
        for object in files.values().flatten() {
            counting.entry(object.name().clone()).or_insert_with(|| object.clone());
        }
        counting
    }

    proptest! {
        #[test]
        fn events_lead_to_what_counts_in_the_order_of_files(
            steps in prop::collection::vec(
                prop::collection::btree_map(0..4_u8, prop::collection::vec((0..6_u8, 0..2_u8), 0..4), 1..4), 1..12),
            // Far more than change, so that both ways of taking changes in are gone.
            many in prop::bool::ANY,
        ) {
            let mut files: BTreeMap<Arc<str>, Vec<Object>> = BTreeMap::new();
            let (mut index, mut followed) = (Index::default(), BTreeMap::new());
            let others = (6..=u8::MAX).filter(|_| many).map(|number| service(number, 0)).collect();
            let first = BTreeMap::from([("others".into(), others)]);
            let steps = steps.into_iter().map(|step| {
                let file = |(file, objects): (u8, Vec<(u8, u8)>)| {
                    let objects = objects.into_iter().map(|(number, variant)| service(number, variant)).collect();
                    (Arc::from(format!("f{file}")), objects)
                };
                step.into_iter().map(file).collect::<BTreeMap<Arc<str>, Vec<Object>>>()
            });
            for step in [first].into_iter().chain(steps) {
                let mut changed = Vec::new();
                for (file, objects) in step {
                    let (file, before) = files.remove_entry(&file).unwrap_or((file, Vec::new()));
                    files.insert(Arc::clone(&file), objects.clone());
                    changed.push((file, before, objects));
                }
                for event in index.update(changed.iter().map(|(file, before, now)| (file, &before[..], &now[..]))) {
                    match event {
                        Event::Apply(object) => {
                            prop_assert_ne!(followed.insert(object.name().clone(), object.clone()), Some(object));
                        }
                        Event::Delete(_, name) => prop_assert!(followed.remove(&name).is_some()),
                        Event::Replace(..) | Event::Reached(..) | Event::Synced => prop_assert!(false),
                    }
                }
                prop_assert_eq!(&followed, &plain(&files));
                prop_assert_eq!(index.counting().map(Object::name).collect::<BTreeSet<_>>().len(), followed.len());
                prop_assert_eq!(index.counts().values().sum::<usize>(), followed.len());
                let all: usize = files.values().map(Vec::len).sum();
                prop_assert_eq!(index.repeated, all - followed.len());
                prop_assert_eq!(index.duplicates().is_empty(), all == followed.len());
            }
        }
    }
}
