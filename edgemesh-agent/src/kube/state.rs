//! What a source has and how it fares, for `status`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use serde::Serialize;

use crate::model::Kind;

/// A source's own account of itself. Cheap to clone; all clones share one.
#[derive(Clone, Debug)]
pub struct SourceState(Arc<Mutex<SourceStatus>>);

/// How a source fares, as `status` prints it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct SourceStatus {
    /// The server's URL or the directory.
    pub source: String,
    /// Whether it answered the last attempt to read from it, be it with a refusal.
    pub connected: bool,
    /// When `connected` became what it is; seconds since the Unix epoch.
    pub since: u64,
    /// What the last failed attempt came to, also after a later success.
    pub last_error: Option<String>,
    /// How many objects it delivered, by kind.
    pub objects: BTreeMap<String, usize>,
}

impl SourceState {
    pub(super) fn new(source: String, now: SystemTime) -> Self {
        let since = seconds(now);
        let status = SourceStatus { source, connected: false, since, last_error: None, objects: BTreeMap::new() };
        Self(Arc::new(Mutex::new(status)))
    }

    /// The present state.
    pub fn status(&self) -> SourceStatus {
        self.lock().clone()
    }

    pub(super) fn connected(&self, now: SystemTime) {
        self.lock().turn(true, now);
    }

    pub(super) fn failed(&self, message: String, now: SystemTime) {
        let mut status = self.lock();
        status.turn(false, now);
        status.last_error = Some(message);
    }

    /// It answered, but did not give what it was asked for.
    pub(super) fn refused(&self, message: String, now: SystemTime) {
        let mut status = self.lock();
        status.turn(true, now);
        status.last_error = Some(message);
    }

    pub(super) fn count(&self, kind: Kind, objects: usize) {
        self.lock().objects.insert(kind.to_string(), objects);
    }

    fn lock(&self) -> MutexGuard<'_, SourceStatus> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SourceStatus {
    fn turn(&mut self, connected: bool, now: SystemTime) {
        if self.connected != connected {
            self.connected = connected;
            self.since = seconds(now);
        }
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
