//! What is said of the snapshot, in `status` and the metrics.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use serde::Serialize;

use super::format::{Contents, Section};
use crate::model::Kind;

/// A snapshot's own account of itself. Cheap to clone; all clones share one.
#[derive(Clone, Debug)]
pub struct SnapshotState(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    path: String,
    restored: Option<Restored>,
    /// What was restored and not delivered since.
    kept: BTreeMap<Kind, Kept>,
    /// When the file was written, if it is there, and its size in bytes, if this agent has written it.
    written: Option<(u64, Option<u64>)>,
    /// When what is being written was taken.
    writing: u64,
    last_error: Option<String>,
}

#[derive(Debug)]
struct Restored {
    taken: u64,
    objects: BTreeMap<Kind, usize>,
}

#[derive(Clone, Copy, Debug)]
struct Kept {
    /// None, too, is something that was known.
    objects: usize,
    as_of: u64,
}

/// How the snapshot fares, as `status` prints it. Times are seconds since the Unix epoch; an age is None while the clock
/// is behind the time it counts from.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct SnapshotStatus {
    /// The file.
    pub path: String,
    /// What the agent started with; None if it started without.
    pub restored: Option<RestoredStatus>,
    /// By kind, what is in force as it was restored, as the source has not delivered it since.
    pub still_served: BTreeMap<String, ServedStatus>,
    /// When the file was written last.
    pub written: Option<u64>,
    /// In bytes; None while this agent has not written it.
    pub size_bytes: Option<u64>,
    /// Why the last write failed; None once one has succeeded.
    pub last_error: Option<String>,
}

/// What was restored.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct RestoredStatus {
    /// When it was written.
    pub taken: u64,
    pub age_seconds: Option<u64>,
    /// By kind.
    pub objects: BTreeMap<String, usize>,
}

/// What is still served as it was restored.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct ServedStatus {
    pub objects: usize,
    /// When a source last stood behind it.
    pub as_of: u64,
    pub age_seconds: Option<u64>,
}

impl SnapshotState {
    pub(super) fn new(path: &Path) -> Self {
        let inner = Inner {
            path: path.display().to_string(),
            restored: None,
            kept: BTreeMap::new(),
            written: None,
            writing: 0,
            last_error: None,
        };
        Self(Arc::new(Mutex::new(inner)))
    }

    /// The present state.
    pub fn status(&self, now: SystemTime) -> SnapshotStatus {
        let inner = self.lock();
        let named = |(kind, count): (&Kind, &usize)| (kind.to_string(), *count);
        let restored = inner.restored.as_ref().map(|restored| RestoredStatus {
            taken: restored.taken,
            age_seconds: age(restored.taken, now),
            objects: restored.objects.iter().map(named).collect(),
        });
        let served = inner.kept.iter().filter(|(_, kept)| kept.objects > 0);
        let still_served = served.map(|(kind, &Kept { objects, as_of })| {
            (kind.to_string(), ServedStatus { objects, as_of, age_seconds: age(as_of, now) })
        });
        SnapshotStatus {
            path: inner.path.clone(),
            restored,
            still_served: still_served.collect(),
            written: inner.written.map(|(at, _)| at),
            size_bytes: inner.written.and_then(|(_, size)| size),
            last_error: inner.last_error.clone(),
        }
    }

    pub(super) fn restored(&self, contents: &Contents) {
        let mut inner = self.lock();
        inner.written = Some((contents.taken, None));
        let counted = contents.sections.iter().map(|section| (section.kind, section.objects.len()));
        inner.restored = Some(Restored { taken: contents.taken, objects: counted.collect() });
        let kept = contents
            .sections
            .iter()
            .map(|Section { kind, as_of, objects, .. }| (*kind, Kept { objects: objects.len(), as_of: *as_of }));
        inner.kept = kept.collect();
    }

    /// The source has delivered a kind; says whether objects of it were served as restored until now.
    pub(super) fn took_over(&self, kind: Kind) -> bool {
        self.lock().kept.remove(&kind).is_some_and(|kept| kept.objects > 0)
    }

    /// Whether objects of a kind are served as they were restored.
    pub(super) fn serves(&self, kind: Kind) -> bool {
        self.lock().kept.get(&kind).is_some_and(|kept| kept.objects > 0)
    }

    pub(super) fn serves_any(&self) -> bool {
        self.lock().kept.values().any(|kept| kept.objects > 0)
    }

    /// When the source last stood behind a kind that was restored and not delivered since.
    pub(super) fn as_of(&self, kind: Kind) -> Option<u64> {
        self.lock().kept.get(&kind).map(|kept| kept.as_of)
    }

    pub(super) fn writing(&self, taken: u64) {
        self.lock().writing = taken;
    }

    pub(super) fn written(&self, size: u64) {
        let mut inner = self.lock();
        inner.written = Some((inner.writing, Some(size)));
        inner.last_error = None;
    }

    pub(super) fn failed(&self, message: String) {
        self.lock().last_error = Some(message);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Seconds from a time to now; None where it has not come yet, as after a start without a battery for the clock.
pub(super) fn age(then: u64, now: SystemTime) -> Option<u64> {
    seconds(now).checked_sub(then)
}

/// Seconds since the Unix epoch.
pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
