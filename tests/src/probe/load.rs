//! Many connections: spreading, timing, and hammering while something else changes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{JoinHandle, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;

use super::client::{Connection, Unconnected, connect_blocking, http, reset_on_close, websocket};
use super::message::{App, Dial, Failure, HammerReport, Measure, Quantiles, Seen, SpreadReport, Transport, monotonic};

/// More threads than this only fight for the processor.
const MOST_AT_ONCE: u32 = 64;

/// Connects `count` times, at most `concurrency` at once, and counts who answers.
pub(super) fn spread(transport: Transport, dial: Dial, count: u32, concurrency: u32) -> Result<SpreadReport, Failure> {
    let left = AtomicU32::new(count);
    let work = || {
        let mut report = SpreadReport::default();
        while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            match ask(transport, dial) {
                Ok(name) => *report.names.entry(name).or_insert(0) += 1,
                Err(failure) => *report.failures.entry(failure.errno.unwrap_or(failure.what)).or_insert(0) += 1,
            }
        }
        report
    };
    let mut total = SpreadReport::default();
    for part in in_threads(concurrency, &work)? {
        for (name, count) in part.names {
            *total.names.entry(name).or_insert(0) += count;
        }
        for (errno, count) in part.failures {
            *total.failures.entry(errno).or_insert(0) += count;
        }
    }
    Ok(total)
}

/// Times `measure` `rounds` times per group.
///
/// The groups take turns, so that what disturbs one disturbs all; in an order that differs from round to round, so that
/// none always follows the same other one and pays for what that leaves the processors to do.
pub(super) fn latency(
    runtime: &Runtime,
    measure: Measure,
    groups: &[Vec<SocketAddr>],
    rounds: u32,
    deadline: Duration,
) -> Result<Vec<Quantiles>, Failure> {
    let first = groups.first().and_then(|group| group.first());
    let mut sockets = Sockets {
        sender: Unconnected::bind(*first.ok_or_else(|| Failure::other("nothing to time"))?)?,
        kept: HashMap::new(),
    };
    if groups.iter().any(Vec::is_empty) {
        return Err(Failure::other("a group without targets cannot be timed"));
    }
    let mut samples = vec![Vec::new(); groups.len()];
    let mut order: Vec<usize> = (0..groups.len()).collect();
    let mut random = 0x9E37_79B9_7F4A_7C15;
    for round in 0..usize::try_from(rounds).unwrap_or(usize::MAX) {
        shuffle(&mut order, &mut random);
        for &index in &order {
            let group = &groups[index];
            let target = group[round % group.len()];
            samples[index].push(time(runtime, measure, &mut sockets, Dial { target, deadline, port: 0 })?);
        }
    }
    sockets.kept.into_values().for_each(Connection::abort);
    Ok(samples.into_iter().map(quantiles).collect())
}

/// Fisher and Yates' shuffle, by Marsaglia's xorshift generator; `state` is never 0.
fn shuffle(order: &mut [usize], state: &mut u64) {
    for left in (2..=order.len()).rev() {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        order.swap(left - 1, (*state % left as u64) as usize);
    }
}

/// What serves for all rounds.
struct Sockets {
    sender: Unconnected,
    /// Connections by their target.
    kept: HashMap<SocketAddr, Connection>,
}

/// Times `measure` once. Nothing stays behind that the next round would meet: no answer unread, and, but for HTTP and
/// WebSocket, no port in TIME_WAIT.
fn time(runtime: &Runtime, measure: Measure, sockets: &mut Sockets, dial: Dial) -> Result<Duration, Failure> {
    match measure {
        Measure::Connect(transport) => {
            let (socket, took) = connect_blocking(transport, dial)?;
            reset_on_close(&socket);
            Ok(took)
        }
        Measure::Send => sockets.sender.send(dial),
        Measure::Exchange => exchange(Transport::Tcp, dial),
        Measure::RoundTrip => {
            let connection = match sockets.kept.entry(dial.target) {
                Entry::Occupied(kept) => kept.into_mut(),
                Entry::Vacant(place) => place.insert(Connection::open(Transport::Tcp, dial)?),
            };
            let begin = Instant::now();
            connection.exchange(false, dial.deadline)?;
            Ok(begin.elapsed())
        }
        Measure::Visit(App::Http) => timed(|| runtime.block_on(http(dial, "/", 1))),
        Measure::Visit(App::WebSocket) => timed(|| runtime.block_on(websocket(dial))),
        Measure::Visit(app @ (App::Tcp | App::Udp | App::Count | App::Reset | App::Echo | App::Source)) => {
            exchange(app.transport(), dial)
        }
    }
}

fn exchange(transport: Transport, dial: Dial) -> Result<Duration, Failure> {
    let begin = Instant::now();
    let mut connection = Connection::open(transport, dial)?;
    connection.exchange(false, dial.deadline)?;
    let took = begin.elapsed();
    connection.abort();
    Ok(took)
}

fn timed<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<Duration, Failure> {
    let begin = Instant::now();
    work()?;
    Ok(begin.elapsed())
}

/// A load that runs until it is stopped.
pub(super) struct Hammer {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<HammerReport>>,
}

impl Hammer {
    /// Starts connecting as fast as `concurrency` threads can.
    pub(super) fn start(transport: Transport, dial: Dial, concurrency: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..concurrency.clamp(1, MOST_AT_ONCE))
            .map(|_| {
                let stop = Arc::clone(&stop);
                std::thread::spawn(move || {
                    let mut report = HammerReport::default();
                    while !stop.load(Ordering::Relaxed) {
                        let at = monotonic();
                        match ask(transport, dial) {
                            Ok(name) => Seen::add(&mut report.names, name, at),
                            Err(failure) => {
                                Seen::add(&mut report.failures, failure.errno.unwrap_or(failure.what), at);
                            }
                        }
                    }
                    report
                })
            })
            .collect();
        Self { stop, threads }
    }

    /// Ends the load and tells what it saw.
    pub(super) fn stop(self) -> Result<HammerReport, Failure> {
        self.stop.store(true, Ordering::Relaxed);
        let mut total = HammerReport::default();
        for thread in self.threads {
            let part = thread.join().map_err(|_| Failure::other("a thread of the hammer panicked"))?;
            merge(&mut total.names, part.names);
            merge(&mut total.failures, part.failures);
        }
        Ok(total)
    }
}

/// One connection of a load: who answers?
fn ask(transport: Transport, dial: Dial) -> Result<String, Failure> {
    let mut connection = Connection::open(transport, dial)?;
    let reply = connection.exchange(false, dial.deadline);
    connection.abort();
    reply.map(|reply| reply.name)
}

fn in_threads<T: Send>(concurrency: u32, work: &(impl Fn() -> T + Sync)) -> Result<Vec<T>, Failure> {
    std::thread::scope(|scope: &Scope<'_, '_>| {
        let threads: Vec<ScopedJoinHandle<'_, T>> =
            (0..concurrency.clamp(1, MOST_AT_ONCE)).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| Failure::other("a thread of the load panicked")))
            .collect()
    })
}

fn merge(into: &mut std::collections::BTreeMap<String, Seen>, from: std::collections::BTreeMap<String, Seen>) {
    for (key, seen) in from {
        into.entry(key)
            .and_modify(|total| {
                total.count += seen.count;
                total.first = total.first.min(seen.first);
                total.last = total.last.max(seen.last);
            })
            .or_insert(seen);
    }
}

/// The nearest-rank quantiles of `samples`; all zero where there are none.
fn quantiles(mut samples: Vec<Duration>) -> Quantiles {
    samples.sort_unstable();
    let at = |percent: usize| {
        let rank = (samples.len() * percent).div_ceil(100).max(1);
        samples.get(rank - 1).copied().unwrap_or_default()
    };
    Quantiles { min: at(0), p25: at(25), p50: at(50), p75: at(75), p90: at(90), p99: at(99), max: at(100) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples_at_their_nearest_rank() {
        let samples = (1..=100).rev().map(Duration::from_nanos).collect();
        let got = quantiles(samples);
        let nanos = [got.min, got.p25, got.p50, got.p75, got.p90, got.p99, got.max].map(|d| d.as_nanos());
        assert_eq!(nanos, [1, 25, 50, 75, 90, 99, 100]);
        assert_eq!(quantiles(Vec::new()), Quantiles::default());
        assert_eq!(quantiles(vec![Duration::from_nanos(7)]).p99, Duration::from_nanos(7));
    }

    #[test]
    fn every_group_follows_every_other_equally_often() {
        let (mut order, mut random) = (vec![0, 1, 2], 0x9E37_79B9_7F4A_7C15);
        let mut orders = std::collections::BTreeMap::new();
        for _ in 0..6000 {
            shuffle(&mut order, &mut random);
            *orders.entry(order.clone()).or_insert(0) += 1;
        }
        assert_eq!(orders.len(), 6);
        assert!(orders.values().all(|count| (850..1150).contains(count)), "{orders:?}");
    }

    #[test]
    fn merging_keeps_the_earliest_and_the_latest_sighting() {
        let seen =
            |count, first, last| Seen { count, first: Duration::from_secs(first), last: Duration::from_secs(last) };
        let mut total = [("a".to_owned(), seen(2, 5, 9))].into();
        merge(&mut total, [("a".to_owned(), seen(1, 3, 3)), ("b".to_owned(), seen(1, 1, 1))].into());
        assert_eq!(total, [("a".to_owned(), seen(3, 3, 9)), ("b".to_owned(), seen(1, 1, 1))].into());
    }
}
