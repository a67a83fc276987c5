//! What is counted of queries: by type, zone and result, and how long they took.

use std::{
    sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use super::wire::{Rcode, rtype};

/// Upper bounds of the latency histogram, in microseconds; one more counts what is above.
pub const BOUNDS_MICROS: [u64; 12] =
    [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000, 250_000, 1_000_000, 5_000_000];

/// The types of questions that are counted by themselves; the last word stands for all others.
pub const TYPES: [&str; 12] = ["A", "AAAA", "SRV", "PTR", "TXT", "CNAME", "SOA", "NS", "MX", "HTTPS", "ANY", "other"];
/// The words for [`Origin`].
pub const ORIGINS: [&str; 3] = ["cluster", "forwarded", "none"];
/// The words for [`Outcome`].
pub const OUTCOMES: [&str; 10] =
    ["answer", "nodata", "nxdomain", "servfail", "refused", "formerr", "notimp", "badvers", "ignored", "limited"];

/// Whose name was asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Origin {
    Cluster,
    Forwarded,
    /// Refused before that mattered.
    None,
}

/// What became of a query.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// With at least one record as answer.
    Answer,
    /// The name has nothing of that type.
    NoData,
    NxDomain,
    ServFail,
    Refused,
    FormErr,
    NotImp,
    BadVers,
    /// No query: not answered.
    Ignored,
    /// Beyond the client's rate for all queries: not answered.
    Limited,
}

impl Outcome {
    /// That of a response that is an error.
    pub fn of(rcode: Rcode) -> Self {
        match rcode {
            Rcode::NoError => Self::NoData,
            Rcode::FormErr => Self::FormErr,
            Rcode::ServFail => Self::ServFail,
            Rcode::NxDomain => Self::NxDomain,
            Rcode::NotImp => Self::NotImp,
            Rcode::Refused => Self::Refused,
            Rcode::BadVers => Self::BadVers,
        }
    }
}

const CELLS: usize = TYPES.len() * ORIGINS.len() * OUTCOMES.len();
const BUCKETS: usize = BOUNDS_MICROS.len() + 1;

/// The counts of one thread: others read them, and nobody waits.
#[derive(Debug)]
pub struct Counters {
    queries: [AtomicU64; CELLS],
    latency: [[AtomicU64; BUCKETS]; ORIGINS.len()],
    nanoseconds: [AtomicU64; ORIGINS.len()],
    turns: AtomicUsize,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            queries: [const { AtomicU64::new(0) }; CELLS],
            latency: [const { [const { AtomicU64::new(0) }; BUCKETS] }; ORIGINS.len()],
            nanoseconds: [const { AtomicU64::new(0) }; ORIGINS.len()],
            turns: AtomicUsize::new(0),
        }
    }
}

impl Counters {
    /// A number that is another one each time, for what is to take turns.
    pub(super) fn turn(&self) -> usize {
        self.turns.fetch_add(1, Relaxed)
    }

    /// Counts a query; without a type where none could be read.
    pub(super) fn count(&self, qtype: Option<u16>, origin: Origin, outcome: Outcome) {
        let cell = (type_index(qtype) * ORIGINS.len() + origin as usize) * OUTCOMES.len() + outcome as usize;
        if let Some(counter) = self.queries.get(cell) {
            counter.fetch_add(1, Relaxed);
        }
    }

    /// Counts how long it took from the receipt of `queries` queries until their answers were on their way.
    pub(super) fn took(&self, origin: Origin, queries: u64, elapsed: Duration) {
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_MICROS.iter().position(|bound| micros <= *bound).unwrap_or(BOUNDS_MICROS.len());
        let cell = self.latency.get(origin as usize).and_then(|buckets| buckets.get(bucket));
        if let (Some(cell), Some(sum)) = (cell, self.nanoseconds.get(origin as usize)) {
            cell.fetch_add(queries, Relaxed);
            let nanoseconds = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
            sum.fetch_add(nanoseconds.saturating_mul(queries), Relaxed);
        }
    }
}

/// The sums over all threads.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Those above zero, by words of [`TYPES`], [`ORIGINS`] and [`OUTCOMES`].
    pub queries: Vec<([&'static str; 3], u64)>,
    /// By words of [`ORIGINS`].
    pub latency: Vec<(&'static str, Histogram)>,
}

/// How many queries took how long.
#[derive(Clone, Debug)]
pub struct Histogram {
    /// For each of [`BOUNDS_MICROS`], and above: not cumulative.
    pub buckets: [u64; BUCKETS],
    /// Of all their times, in seconds.
    pub sum: f64,
}

impl Stats {
    pub(super) fn sum<'a>(threads: impl Iterator<Item = &'a Counters> + Clone) -> Self {
        let mut queries = Vec::new();
        let labels = TYPES.iter().flat_map(|kind| {
            ORIGINS.iter().flat_map(move |origin| OUTCOMES.iter().map(move |outcome| [*kind, *origin, *outcome]))
        });
        for (cell, labels) in labels.enumerate() {
            let of = |counters: &Counters| counters.queries.get(cell).map_or(0, |counter| counter.load(Relaxed));
            let sum: u64 = threads.clone().map(of).sum();
            if sum > 0 {
                queries.push((labels, sum));
            }
        }
        let latency = ORIGINS.iter().enumerate().map(|(origin, word)| {
            let mut histogram = Histogram { buckets: [0; BUCKETS], sum: 0.0 };
            for counters in threads.clone() {
                let of = counters.latency.get(origin).into_iter().flatten();
                for (bucket, counter) in histogram.buckets.iter_mut().zip(of) {
                    *bucket += counter.load(Relaxed);
                }
                let nanoseconds = counters.nanoseconds.get(origin).map_or(0, |sum| sum.load(Relaxed));
                histogram.sum += nanoseconds as f64 / 1e9;
            }
            (*word, histogram)
        });
        Self { queries, latency: latency.filter(|(_, histogram)| histogram.buckets != [0; BUCKETS]).collect() }
    }
}

fn type_index(qtype: Option<u16>) -> usize {
    match qtype {
        Some(rtype::A) => 0,
        Some(rtype::AAAA) => 1,
        Some(rtype::SRV) => 2,
        Some(rtype::PTR) => 3,
        Some(rtype::TXT) => 4,
        Some(rtype::CNAME) => 5,
        Some(rtype::SOA) => 6,
        Some(rtype::NS) => 7,
        Some(rtype::MX) => 8,
        Some(rtype::HTTPS) => 9,
        Some(rtype::ANY) => 10,
        _ => 11,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_told_by_type_zone_and_result_over_all_threads() {
        let threads = [Counters::default(), Counters::default()];
        for counters in &threads {
            counters.count(Some(rtype::AAAA), Origin::Cluster, Outcome::NxDomain);
            counters.took(Origin::Cluster, 3, Duration::from_micros(60));
        }
        threads[1].count(Some(99), Origin::None, Outcome::Limited);
        threads[1].count(None, Origin::None, Outcome::Ignored);
        threads[0].took(Origin::Forwarded, 1, Duration::from_secs(7));
        let stats = Stats::sum(threads.iter());
        let expected = [
            (["AAAA", "cluster", "nxdomain"], 2),
            (["other", "none", "ignored"], 1),
            (["other", "none", "limited"], 1),
        ];
        assert_eq!(stats.queries, expected);
        let [(cluster, fast), (forwarded, slow)] = stats.latency.as_slice() else { panic!("{:?}", stats.latency) };
        assert_eq!((*cluster, fast.buckets[1], *forwarded), ("cluster", 6, "forwarded"));
        assert!((fast.sum - 360e-6).abs() < 1e-9, "{}", fast.sum);
        assert_eq!(slow.buckets[BUCKETS - 1], 1);
    }
}
