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
    /// What kind of source it is: `static`, `inCluster`, `kubeconfig` or `metaServer`.
    pub kind: &'static str,
    /// The server's URL or the directory.
    pub source: String,
    pub health: SourceHealth,
    /// When `health` became what it is; seconds since the Unix epoch.
    pub since: u64,
    /// Why it is not `Connected`, where that is known.
    pub reason: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
    /// When it last delivered all of its Services and endpoints, confirmed as current; seconds since the Unix epoch.
    pub last_sync: Option<u64>,
    /// What the last failed attempt came to, also after a later success.
    pub last_error: Option<String>,
    /// How many objects it delivered, by kind.
    pub objects: BTreeMap<String, usize>,
}

/// What can be expected of a source at present. Whatever it is, the last known objects are served.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum SourceHealth {
    /// Nothing has come of the first attempt yet.
    Connecting,
    /// It answered the last attempt to read from it, be it with a refusal.
    Connected,
    /// It answers, but not in a way to rely on: too slowly, not everything, or nothing that proves anything. Only
    /// metaServer is ever said to be so.
    Degraded,
    /// It does not answer; or, where it is metaServer, only from what it has stored.
    Offline,
}

impl SourceHealth {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Connecting, Self::Connected, Self::Degraded, Self::Offline];

    /// As `status` and the metrics write it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Connected => "connected",
            Self::Degraded => "degraded",
            Self::Offline => "offline",
        }
    }
}

impl SourceStatus {
    /// Whether it answered when it was last asked.
    pub fn answers(&self) -> bool {
        matches!(self.health, SourceHealth::Connected | SourceHealth::Degraded)
    }
}

impl SourceState {
    pub(super) fn new(kind: &'static str, source: String, now: SystemTime) -> Self {
        Self(Arc::new(Mutex::new(SourceStatus {
            kind,
            source,
            health: SourceHealth::Connecting,
            since: seconds(now),
            reason: None,
            hint: None,
            last_sync: None,
            last_error: None,
            objects: BTreeMap::new(),
        })))
    }

    /// The present state.
    pub fn status(&self) -> SourceStatus {
        self.lock().clone()
    }

    pub(super) fn connected(&self, now: SystemTime) {
        self.turn(SourceHealth::Connected, None, None, now);
    }

    pub(super) fn failed(&self, message: String, now: SystemTime) {
        self.turn(SourceHealth::Offline, Some(message), None, now);
    }

    /// It answered, but did not give what it was asked for.
    pub(super) fn refused(&self, message: String, now: SystemTime) {
        self.connected(now);
        self.lock().last_error = Some(message);
    }

    /// Says how it fares, why, and what to do about it.
    pub(super) fn turn(&self, health: SourceHealth, reason: Option<String>, hint: Option<String>, now: SystemTime) {
        let mut status = self.lock();
        if status.health != health {
            status.health = health;
            status.since = seconds(now);
        }
        if reason.is_some() {
            status.last_error.clone_from(&reason);
        }
        (status.reason, status.hint) = (reason, hint);
    }

    /// Notes that everything it has is known.
    pub(super) fn synced(&self, now: SystemTime) {
        self.lock().last_sync = Some(seconds(now));
    }

    pub(super) fn count(&self, kind: Kind, objects: usize) {
        self.lock().objects.insert(kind.to_string(), objects);
    }

    fn lock(&self) -> MutexGuard<'_, SourceStatus> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn since_is_when_the_health_changed_and_not_when_it_was_last_told() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let state = SourceState::new("metaServer", "http://127.0.0.1:10550".to_owned(), at(1));
        assert_eq!((state.status().health, state.status().since), (SourceHealth::Connecting, 1));
        state.turn(SourceHealth::Offline, Some("a".to_owned()), Some("do".to_owned()), at(2));
        state.turn(SourceHealth::Offline, Some("b".to_owned()), None, at(3));
        let status = state.status();
        assert_eq!((status.since, status.reason.as_deref(), status.hint), (2, Some("b"), None));
        state.connected(at(4));
        let status = state.status();
        assert_eq!((status.since, status.reason, status.last_error.as_deref()), (4, None, Some("b")));
    }
}
