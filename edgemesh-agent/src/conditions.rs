//! What is wrong right now, for `status`, the metrics and the log.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use serde::Serialize;
use tracing::{info, warn};

/// The conditions that hold on this node. Cheap to clone; all clones share one set.
#[derive(Clone, Debug, Default)]
pub struct Conditions(Arc<Mutex<BTreeMap<(&'static str, String), Entry>>>);

#[derive(Debug)]
struct Entry {
    message: String,
    since: SystemTime,
}

/// One condition: what kind of trouble, with what, and what to do about it.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Condition {
    /// CamelCase and stable, for alerts: `ManifestInvalid`, `ApiServerUnreachable`.
    pub reason: &'static str,
    /// The file, object or device concerned; empty where the reason says it all.
    pub subject: String,
    /// One line: what was attempted, what came of it, what to do.
    pub message: String,
    /// Seconds since the Unix epoch.
    pub since: u64,
}

impl Conditions {
    /// Says that a condition holds. Logs once per new message, so a retry loop may call it each time.
    pub fn raise(&self, reason: &'static str, subject: impl Into<String>, message: impl Into<String>, now: SystemTime) {
        let (subject, message) = (subject.into(), message.into());
        let mut set = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match set.get_mut(&(reason, subject.clone())) {
            Some(entry) if entry.message == message => {}
            Some(entry) => {
                warn!(reason, subject, "{message}");
                entry.message = message;
            }
            None => {
                warn!(reason, subject, "{message}");
                set.insert((reason, subject), Entry { message, since: now });
            }
        }
    }

    /// Says that a condition no longer holds; nothing happens where it did not.
    pub fn clear(&self, reason: &'static str, subject: &str) {
        let mut set = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if set.remove(&(reason, subject.to_owned())).is_some() {
            info!(reason, subject, "condition cleared");
        }
    }

    /// Clears every condition of a reason whose subject is not among `subjects`.
    pub fn retain(&self, reason: &'static str, keep: impl Fn(&str) -> bool) {
        let mut set = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        set.retain(|(r, subject), _| {
            let stays = *r != reason || keep(subject);
            if !stays {
                info!(reason, subject, "condition cleared");
            }
            stays
        });
    }

    /// All conditions, ordered by reason and subject.
    pub fn list(&self) -> Vec<Condition> {
        let set = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        set.iter()
            .map(|((reason, subject), entry)| Condition {
                reason,
                subject: subject.clone(),
                message: entry.message.clone(),
                since: entry.since.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            })
            .collect()
    }
}
