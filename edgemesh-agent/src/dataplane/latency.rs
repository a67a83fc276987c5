//! How long changes take from their source into the kernel.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::metrics::histogram::Histogram;

/// Upper bounds in seconds: from one map write to a kernel that refuses for a while.
const BUCKETS: [f64; 12] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0];
/// So many tables may wait; of more, the newest are left out, as nothing takes them.
const MAX_WAITING: usize = 1024;

/// Times each table from the oldest event in it until it is in force, as kube-proxy's
/// `network_programming_duration_seconds` does. All clones share one.
#[derive(Clone, Debug)]
pub struct Latency(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Generations of tables that are not in force yet, ascending, and when the oldest event in each came in.
    waiting: Mutex<VecDeque<(u64, Instant)>>,
    seconds: Histogram,
}

impl Default for Latency {
    fn default() -> Self {
        Self(Arc::new(Inner { waiting: Mutex::default(), seconds: Histogram::new(BUCKETS) }))
    }
}

impl Latency {
    /// A table is about to be published, the first to show an event that came in at `since`.
    pub fn built(&self, generation: u64, since: Instant) {
        let mut waiting = self.waiting();
        if waiting.len() < MAX_WAITING {
            waiting.push_back((generation, since));
        }
    }

    /// The tables up to a generation are in force; returns how long the oldest change in them took.
    pub(super) fn in_force(&self, generation: u64, now: Instant) -> Option<Duration> {
        let took = self.take(generation, now);
        took.iter().for_each(|took| self.0.seconds.observe(took.as_secs_f64()));
        took.into_iter().max()
    }

    /// Passes over the tables up to a generation: they belong to the start.
    pub(super) fn started(&self, generation: u64, now: Instant) {
        self.take(generation, now);
    }

    /// In seconds.
    pub fn histogram(&self) -> Histogram {
        self.0.seconds.clone()
    }

    fn take(&self, generation: u64, now: Instant) -> Vec<Duration> {
        let mut waiting = self.waiting();
        let count = waiting.partition_point(|(other, _)| *other <= generation);
        waiting.drain(..count).map(|(_, since)| now.saturating_duration_since(since)).collect()
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<(u64, Instant)>> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_counts_once_it_or_a_later_one_is_in_force() {
        let (latency, begin) = (Latency::default(), Instant::now());
        let at = |millis| begin + Duration::from_millis(millis);
        latency.built(1, at(0));
        latency.started(1, at(900));
        for (generation, millis) in [(2, 1000), (3, 1001), (4, 1002)] {
            latency.built(generation, at(millis));
        }
        assert_eq!(latency.in_force(3, at(1004)), Some(Duration::from_millis(4)));
        assert_eq!(latency.in_force(3, at(1005)), None, "it was in force before");
        assert_eq!(latency.in_force(4, at(1010)), Some(Duration::from_millis(8)));
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register("t", "t", latency.histogram());
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in ["t_count 3", "t_bucket{le=\"0.005\"} 2", "t_bucket{le=\"0.01\"} 3"] {
            assert!(text.lines().any(|other| other == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn tables_that_nobody_puts_in_force_cost_no_more_and_more() {
        let (latency, now) = (Latency::default(), Instant::now());
        (0..3 * MAX_WAITING as u64).for_each(|generation| latency.built(generation, now));
        assert_eq!(latency.waiting().len(), MAX_WAITING);
    }
}
