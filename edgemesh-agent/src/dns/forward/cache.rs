//! What upstreams have answered, bounded, and given away past its TTL where they are silent.
//!
//! Knows no clock: every call says what time it is. Entries that were asked for once go first when room is needed, so that
//! a flood of names that nobody asks for again displaces nothing of use (a segmented LRU; every step is O(1)).

mod order;

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use self::order::{List, Order, Place};
use super::{Question, message::Message};

/// How long it is remembered that nobody could answer (RFC 9520 wants one second to five minutes).
pub(super) const FAILURE: Duration = Duration::from_secs(2);
/// How long an answer past its TTL is given at once after it could not be had anew (RFC 8767 section 5 suggests 30 s).
/// Meanwhile it is asked for behind the clients' backs, and ends that as soon as it comes.
pub(super) const RECHECK: Duration = Duration::from_secs(30);
/// The least time from one refresh of an entry to the next.
const REFRESH_PAUSE: Duration = Duration::from_secs(2);
/// An entry asked for this often since it came is refreshed before its end …
const HOT: u32 = 3;
/// … in this last part of its time, but not only in the very last second.
const LAST_PART: u32 = 10;
const LAST_SECOND: Duration = Duration::from_secs(1);
/// What an entry costs besides its key and message: slot, index, allocations.
const OVERHEAD: usize = 224;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) entries: usize,
    pub(super) bytes: usize,
    /// How long after the end of its TTL an entry may be given.
    pub(super) stale: Duration,
}

/// An entry that may be given.
#[derive(Clone, Debug)]
pub(super) struct Hit {
    pub(super) message: Arc<Message>,
    pub(super) since: Instant,
    pub(super) stale: bool,
    /// Who could not answer, where this is the memory of that.
    pub(super) refused_by: Option<SocketAddr>,
    /// Whether it is time to ask again; said once in a while, and the one who is told does it.
    pub(super) refresh: bool,
}

/// What was done so far.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Counts {
    pub(super) hits: u64,
    pub(super) misses: u64,
    pub(super) stale: u64,
    pub(super) refreshed: u64,
    pub(super) evicted: u64,
}

#[derive(Debug)]
pub(super) struct Cache {
    bounds: Bounds,
    index: HashMap<Arc<[u8]>, Place>,
    entries: Order<Entry>,
    bytes: usize,
    counts: Counts,
}

#[derive(Debug)]
struct Entry {
    key: Arc<[u8]>,
    message: Arc<Message>,
    refused_by: Option<SocketAddr>,
    since: Instant,
    expires: Instant,
    /// Until when it may be given, as a stale one past `expires`.
    ends: Instant,
    failed: Option<Instant>,
    refreshed: Option<Instant>,
    hits: u32,
}

impl Cache {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self { bounds, index: HashMap::new(), entries: Order::default(), bytes: 0, counts: Counts::default() }
    }

    /// What may be given without asking: an entry within its TTL, or a stale one where asking has just failed or, as
    /// `silent` says, would be in vain.
    pub(super) fn get(&mut self, question: &Question, now: Instant, silent: impl FnOnce() -> bool) -> Option<Hit> {
        let found = self.find(question, now, silent);
        match &found {
            Some(hit) if hit.stale => self.counts.stale += 1,
            Some(_) => self.counts.hits += 1,
            None => self.counts.misses += 1,
        }
        if found.as_ref().is_some_and(|hit| hit.refresh) {
            self.counts.refreshed += 1;
        }
        found
    }

    fn find(&mut self, question: &Question, now: Instant, silent: impl FnOnce() -> bool) -> Option<Hit> {
        let place = *self.index.get(question.key())?;
        let entry = self.entries.get_mut(place)?;
        if now >= entry.ends {
            self.remove(place);
            return None;
        }
        let stale = now >= entry.expires;
        if stale && !entry.failed_lately(now) && !silent() {
            return None;
        }
        let due = stale || {
            let lifetime = entry.expires.saturating_duration_since(entry.since);
            let last = (lifetime / LAST_PART).max(LAST_SECOND);
            entry.hits >= HOT && entry.is_answer() && now + last >= entry.expires
        };
        let rested = entry.refreshed.is_none_or(|at| now.saturating_duration_since(at) >= REFRESH_PAUSE);
        let refresh = due && rested;
        if refresh {
            entry.refreshed = Some(now);
        }
        entry.hits = entry.hits.saturating_add(1);
        let hit = entry.hit(stale, refresh);
        self.entries.touch(place, self.most_again());
        Some(hit)
    }

    /// What may be given when nobody answers in time, and counts it; None where nothing is known.
    pub(super) fn last_resort(&mut self, question: &Question, now: Instant) -> Option<Hit> {
        let entry = self.entry(question).filter(|entry| now < entry.ends && entry.is_answer())?;
        let stale = now >= entry.expires;
        let hit = entry.hit(stale, false);
        self.counts.stale += u64::from(stale);
        Some(hit)
    }

    /// Whether there is something to be given when nobody answers.
    pub(super) fn has_last_resort(&self, question: &Question, now: Instant) -> bool {
        self.entry(question).is_some_and(|entry| now < entry.ends && entry.is_answer())
    }

    /// Keeps an answer as long as it allows, in place of an older one.
    pub(super) fn put(&mut self, question: &Question, message: Arc<Message>, now: Instant) {
        match message.lifetime() {
            Some(lifetime) => self.insert(question, message, None, now, (lifetime, self.bounds.stale)),
            None => {
                if let Some(&place) = self.index.get(question.key()) {
                    self.remove(place);
                }
            }
        }
    }

    /// Remembers for [`FAILURE`] that the question could not be answered; `message` is what was said instead,
    /// and `by` who said it, None where nobody said anything.
    ///
    /// An older answer stays, and may be given stale at once for [`RECHECK`].
    pub(super) fn fail(&mut self, question: &Question, message: Arc<Message>, by: Option<SocketAddr>, now: Instant) {
        if self.has_last_resort(question, now) {
            self.note_failure(question, now);
        } else {
            self.insert(question, message, by, now, (FAILURE, Duration::ZERO));
        }
    }

    /// Lets an older answer be given stale at once for [`RECHECK`].
    pub(super) fn note_failure(&mut self, question: &Question, now: Instant) {
        if let Some(&place) = self.index.get(question.key())
            && let Some(entry) = self.entries.get_mut(place)
        {
            entry.failed = Some(now);
        }
    }

    /// What there is for a question, without any effect: the message, since when, and until when it is fresh.
    pub(super) fn look(&self, question: &Question, now: Instant) -> Option<(Arc<Message>, Instant, Instant)> {
        let entry = self.entry(question).filter(|entry| now < entry.ends)?;
        Some((Arc::clone(&entry.message), entry.since, entry.expires))
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    /// How many of those that were asked for again are kept before all others.
    fn most_again(&self) -> usize {
        self.bounds.entries * 4 / 5
    }

    fn entry(&self, question: &Question) -> Option<&Entry> {
        self.entries.get(*self.index.get(question.key())?)
    }

    fn insert(
        &mut self,
        question: &Question,
        message: Arc<Message>,
        refused_by: Option<SocketAddr>,
        now: Instant,
        (lifetime, stale): (Duration, Duration),
    ) {
        let known = self.index.get(question.key()).copied();
        let key = known
            .and_then(|place| Some(Arc::clone(&self.entries.get(place)?.key)))
            .unwrap_or_else(|| question.key().into());
        let expires = now + lifetime;
        let entry = Entry {
            key,
            message,
            refused_by,
            since: now,
            expires,
            ends: expires + stale,
            failed: None,
            refreshed: None,
            hits: 0,
        };
        let size = entry.size();
        if size > self.bounds.bytes / 8 {
            // One of few would fill the cache.
            return known.into_iter().for_each(|place| self.remove(place));
        }
        self.bytes += size;
        let newest = match known.and_then(|place| Some((place, self.entries.get_mut(place)?))) {
            Some((place, old)) => {
                self.bytes -= std::mem::replace(old, entry).size();
                // It was asked for again.
                self.entries.touch(place, self.most_again());
                place
            }
            None => {
                let key = Arc::clone(&entry.key);
                let place = self.entries.push(entry);
                self.index.insert(key, place);
                place
            }
        };
        while self.index.len() > self.bounds.entries || self.bytes > self.bounds.bytes {
            // What has just come does not go for its own sake: nothing would ever get in where all that was asked for again
            // fills the room.
            let oldest = |list| self.entries.last(list).filter(|place| *place != newest);
            let Some(oldest) = oldest(List::Once).or_else(|| oldest(List::Again)) else { break };
            self.remove(oldest);
            self.counts.evicted += 1;
        }
    }

    fn remove(&mut self, place: Place) {
        if let Some(entry) = self.entries.remove(place) {
            self.index.remove(&entry.key);
            self.bytes -= entry.size();
        }
    }
}

impl Entry {
    fn hit(&self, stale: bool, refresh: bool) -> Hit {
        let (message, refused_by) = (Arc::clone(&self.message), self.refused_by);
        Hit { message, since: self.since, stale, refused_by, refresh }
    }

    /// Rather than the memory of a failure.
    fn is_answer(&self) -> bool {
        self.message.lifetime().is_some()
    }

    fn failed_lately(&self, now: Instant) -> bool {
        self.failed.is_some_and(|at| now.saturating_duration_since(at) < RECHECK)
    }

    fn size(&self) -> usize {
        OVERHEAD + self.key.len() + self.message.size()
    }
}

#[cfg(test)]
mod tests;
