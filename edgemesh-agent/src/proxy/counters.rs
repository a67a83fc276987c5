use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use serde::Serialize;

use super::Refusal;
use crate::{
    alias::{AliasRanges, Aliases},
    status::AliasStatus,
};

/// What the proxy counts.
#[derive(Debug, Default)]
pub struct Counters {
    pub(super) connections: AtomicU64,
    pub(super) open_connections: AtomicU64,
    pub(super) flows: AtomicU64,
    pub(super) open_flows: AtomicU64,
    pub(super) evicted_flows: AtomicU64,
    pub(super) bytes_out: AtomicU64,
    pub(super) bytes_in: AtomicU64,
    pub(super) datagrams_out: AtomicU64,
    pub(super) datagrams_in: AtomicU64,
    pub(super) datagrams_dropped: AtomicU64,
    refusals: [AtomicU64; Refusal::KINDS.len()],
}

/// How it is with aliases, for `status` and the metrics. Cheap to clone; all clones see the same.
#[derive(Clone, Debug)]
pub struct Sight {
    pub ranges: AliasRanges,
    /// Whether the kernel gives this agent what is sent to them.
    pub available: bool,
    pub counters: Arc<Counters>,
}

impl Sight {
    /// As of now, with the aliases of the newest table.
    pub fn status(&self, aliases: &Aliases) -> AliasStatus {
        AliasStatus {
            ranges: self.ranges.each().map(|range| range.to_string()),
            available: self.available,
            in_use: aliases.len(),
            proxy: self.counters.read(),
        }
    }
}

/// What has been counted since the start; `out` is to pods, `in` to clients.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct ProxyStatus {
    /// TCP connections that reached their pod.
    pub connections: u64,
    pub open_connections: u64,
    /// Clients of UDP whose datagrams were carried.
    pub flows: u64,
    pub open_flows: u64,
    /// Clients of UDP that were forgotten early, for others to have room; not counted among the refusals.
    pub evicted_flows: u64,
    pub bytes_out: u64,
    pub bytes_in: u64,
    pub datagrams_out: u64,
    pub datagrams_in: u64,
    /// No room was left for them, or no way.
    pub datagrams_dropped: u64,
    /// Connections and flows that did not get to their pod, by kind; kinds that never came up are left out.
    pub refusals: Vec<RefusalCount>,
}

/// How often a [`Refusal`] of one kind came up.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub struct RefusalCount {
    pub kind: &'static str,
    pub count: u64,
}

impl Counters {
    /// A reading; its figures may be of slightly different moments.
    pub fn read(&self) -> ProxyStatus {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let refusals = Refusal::KINDS.iter().zip(&self.refusals);
        ProxyStatus {
            connections: get(&self.connections),
            open_connections: get(&self.open_connections),
            flows: get(&self.flows),
            open_flows: get(&self.open_flows),
            evicted_flows: get(&self.evicted_flows),
            bytes_out: get(&self.bytes_out),
            bytes_in: get(&self.bytes_in),
            datagrams_out: get(&self.datagrams_out),
            datagrams_in: get(&self.datagrams_in),
            datagrams_dropped: get(&self.datagrams_dropped),
            refusals: refusals
                .map(|(kind, count)| RefusalCount { kind, count: get(count) })
                .filter(|refusal| refusal.count > 0)
                .collect(),
        }
    }

    pub(super) fn refuse(&self, refusal: &Refusal) {
        if let Some(count) = self.refusals.get(refusal.index()) {
            add(count, 1);
        }
    }
}

pub(super) fn add(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// Counts one more while it lives.
pub(super) struct Open<'a>(&'a AtomicU64);

impl<'a> Open<'a> {
    pub(super) fn new(gauge: &'a AtomicU64) -> Self {
        add(gauge, 1);
        Self(gauge)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
