use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use super::Failure;

/// What the server counts.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) open_sessions: AtomicU64,
    pub(super) connections: AtomicU64,
    pub(super) associations: AtomicU64,
    pub(super) flows: AtomicU64,
    pub(super) open_flows: AtomicU64,
    /// From clients.
    pub(super) bytes_out: AtomicU64,
    pub(super) bytes_in: AtomicU64,
    pub(super) datagrams_out: AtomicU64,
    pub(super) datagrams_in: AtomicU64,
    pub(super) datagrams_dropped: AtomicU64,
    failures: [AtomicU64; Failure::REASONS.len()],
}

/// What has been counted since the start; `out` is from clients, `in` to them.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Counts {
    /// Clients that are connected now, whatever they ask for.
    pub open_sessions: u64,
    /// `CONNECT` requests that got to their destination.
    pub connections: u64,
    /// `UDP ASSOCIATE` requests that were granted.
    pub associations: u64,
    /// Destinations that datagrams were carried to.
    pub flows: u64,
    pub open_flows: u64,
    pub bytes_out: u64,
    pub bytes_in: u64,
    pub datagrams_out: u64,
    pub datagrams_in: u64,
    /// Fragments, what is no datagram of SOCKS, strangers', and those for which there was no room or no way.
    pub datagrams_dropped: u64,
    /// By reason; those that never came up are left out.
    pub failures: Vec<FailureCount>,
}

/// How often a session or flow came to nothing for one reason.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct FailureCount {
    pub reason: &'static str,
    pub count: u64,
}

impl Counters {
    pub(super) fn read(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let failures = Failure::REASONS.iter().zip(&self.failures);
        Counts {
            open_sessions: get(&self.open_sessions),
            connections: get(&self.connections),
            associations: get(&self.associations),
            flows: get(&self.flows),
            open_flows: get(&self.open_flows),
            bytes_out: get(&self.bytes_out),
            bytes_in: get(&self.bytes_in),
            datagrams_out: get(&self.datagrams_out),
            datagrams_in: get(&self.datagrams_in),
            datagrams_dropped: get(&self.datagrams_dropped),
            failures: failures
                .map(|(reason, count)| FailureCount { reason, count: get(count) })
                .filter(|failure| failure.count > 0)
                .collect(),
        }
    }

    pub(super) fn fail(&self, failure: &Failure) {
        let place = Failure::REASONS.binary_search(&failure.reason());
        if let Some(count) = place.ok().and_then(|place| self.failures.get(place)) {
            add(count);
        }
    }
}

/// Counts one.
pub(super) fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Counts one more while it lives.
pub(super) struct Open<'a>(&'a AtomicU64);

impl<'a> Open<'a> {
    pub(super) fn new(gauge: &'a AtomicU64) -> Self {
        add(gauge);
        Self(gauge)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
