//! What the tunnel costs: beside a pair of proxies that do nothing but TLS over the same hops, and beside plain TCP.

mod memory;
mod sites;
mod swarm;
mod ways;

use std::time::Duration;

use anyhow::{Context as _, Result};
use edgemesh_tests::lab::Measure;

use self::{
    sites::Reach,
    ways::{Carrier, Way, Ways},
};
use crate::{
    Effort,
    report::{Table, at_least, micros, middle_half, say, verdict, whole},
    spread::Spread,
};

/// The aims: the rate of one stream as a part of the proxies', new connections a second, and microseconds added to half of
/// all requests.
const THROUGHPUT: f64 = 0.7;
const CONNECTIONS: f64 = 5000.0;
const ADDED: f64 = 150.0;
const REACHES: [Reach; 2] = [Reach::Lan, Reach::Relayed];
/// What all sections say of where they were measured.
const PLACE: &str = "From a pod of one node to a pod of another, both agents and all programs on the same CPUs. Proxies: \
    tokio-rustls, TLS 1.3, from a process on the one node to a process on the other, each of which copies between two \
    connections. Plain TCP: between processes on the two nodes themselves. Over a relay: the tunnel goes through the \
    agent of a third node, the others through a process there that copies plain bytes.";

/// Measures rates and times in one lab, then memory in others.
pub(crate) fn measure(effort: Effort) -> Result<Vec<Table>> {
    let ways = Ways::raise()?;
    let mut tables = vec![throughput(&ways, effort)?, connections(&ways, effort)?, latency(&ways, effort)?];
    // Whatever was measured was what it is called.
    ways.check()?;
    drop(ways);
    tables.push(memory::measure(effort)?);
    Ok(tables)
}

/// The samples of each way, a sample for each repetition.
struct Samples<'a, T>(Vec<(&'a Way, Vec<T>)>);

impl<'a, T: Copy> Samples<'a, T> {
    /// Has the ways take turns.
    fn take(ways: &'a Ways, repetitions: u32, sample: impl Fn(&Way) -> Result<T>) -> Result<Self> {
        let mut all: Vec<_> = ways.ways.iter().map(|way| (way, Vec::new())).collect();
        for repetition in 0..repetitions as usize {
            // None always follows the same other one's rest.
            let first = repetition % all.len().max(1);
            let (after, before) = all.split_at_mut(first);
            for (way, samples) in before.iter_mut().chain(after) {
                samples.push(sample(way)?);
            }
        }
        Ok(Self(all))
    }

    fn of(&self, reach: Reach, carrier: Carrier) -> Result<&[T]> {
        let found = self.0.iter().find(|(way, _)| way.reach == reach && way.carrier == carrier);
        found.map(|(_, samples)| samples.as_slice()).with_context(|| format!("{carrier} {reach} was not measured"))
    }

    /// Compares a way with another of the same reach, repetition by repetition.
    fn compare(&self, reach: Reach, [a, b]: [Carrier; 2], compare: impl Fn(T, T) -> f64) -> Result<Spread> {
        let (a, b) = (self.of(reach, a)?, self.of(reach, b)?);
        Spread::of(a.iter().zip(b).map(|(a, b)| compare(*a, *b)))
    }

    fn rows(&self, cells: impl Fn(&Way, &[T]) -> Result<Vec<String>>) -> Result<Vec<Vec<String>>> {
        let row = |(way, samples): &(&Way, Vec<T>)| {
            let mut row = vec![way.reach.to_string(), way.carrier.to_string()];
            row.extend(cells(way, samples)?);
            Ok(row)
        };
        self.0.iter().map(row).collect()
    }
}

/// Rows of a rate, with its ratio to that of the proxies.
fn rates(samples: &Samples<'_, f64>, unit: fn(f64) -> String) -> Result<Vec<Vec<String>>> {
    samples.rows(|way, rates| {
        let spread = Spread::of(rates.iter().copied())?;
        let ratio = samples.compare(way.reach, [way.carrier, Carrier::Proxies], |rate, proxies| rate / proxies)?;
        Ok(vec![unit(spread.median), whole(&spread, unit), parts(ratio.median), middle_half(&ratio, parts)])
    })
}

fn throughput(ways: &Ways, effort: Effort) -> Result<Table> {
    let repetitions = effort.pick(2, 5);
    let (warm_up, length) = effort.pick((100, 200), (300, 1000));
    let (warm_up, length) = (Duration::from_millis(warm_up), Duration::from_millis(length));
    let samples =
        Samples::take(ways, repetitions, |way| Ok(way.client.drain(way.source, warm_up, length)?.per_second() / 1e6))?;
    let mut findings = Vec::new();
    for reach in REACHES {
        let ratio = samples.compare(reach, [Carrier::Tunnel, Carrier::Proxies], |tunnel, proxies| tunnel / proxies)?;
        findings.push(at_least(&format!("of the proxies' rate, {reach}"), ratio.median, THROUGHPUT, parts));
    }
    say("one stream: measured");
    Ok(Table {
        title: "The tunnel: one stream",
        method: format!(
            "{PLACE} A server sends on one TCP connection as fast as it is received: for {warm_up:?}, then counted for \
             {length:?}. {repetitions} repetitions."
        ),
        head: vec!["path", "way", "rate, median", "all runs", "to the proxies'", "middle half"],
        rows: rates(&samples, megabytes)?,
        findings,
    })
}

fn connections(ways: &Ways, effort: Effort) -> Result<Table> {
    let (repetitions, clients) = effort.pick((2, 16), (5, 64));
    let length = Duration::from_millis(effort.pick(500, 1500));
    let samples =
        Samples::take(ways, repetitions, |way| Ok(way.client.turnover(way.echo, clients, length)?.per_second()))?;
    let mut findings = Vec::new();
    for reach in REACHES {
        let rate = Spread::of(samples.of(reach, Carrier::Tunnel)?.iter().copied())?;
        findings.push(at_least(&format!("new connections, {reach}"), rate.median, CONNECTIONS, per_second));
    }
    say("new connections: measured");
    Ok(Table {
        title: "The tunnel: new connections",
        method: format!(
            "The same ways. {clients} clients in one process, each making one connection after the other: connect, a \
             request of a few bytes, its answer, a reset. The proxies make a TLS connection for each, with a full \
             handshake. {repetitions} repetitions of {length:?}."
        ),
        head: vec!["path", "way", "connections, median", "all runs", "to the proxies'", "middle half"],
        rows: rates(&samples, per_second)?,
        findings,
    })
}

fn latency(ways: &Ways, effort: Effort) -> Result<Table> {
    let (repetitions, rounds) = effort.pick((2, 100), (7, 1000));
    // Half within, 99 of 100 within, in microseconds.
    let samples = Samples::take(ways, repetitions, |way| {
        let quantiles = way.client.measure(Measure::RoundTrip, &[vec![way.tcp]], rounds)?;
        let quantiles = quantiles.first().context("nothing was measured")?;
        Ok([quantiles.p50, quantiles.p99].map(|took| took.as_secs_f64() * 1e6))
    })?;
    let added = |reach, carrier| {
        let by = |place: fn([f64; 2]) -> f64| {
            samples.compare(reach, [carrier, Carrier::Plain], |through, plain| place(through) - place(plain))
        };
        anyhow::Ok([by(|[half, _]| half)?, by(|[_, most]| most)?])
    };
    let rows = samples.rows(|way, quantiles| {
        let median = |place: fn(&[f64; 2]) -> f64| anyhow::Ok(micros(Spread::of(quantiles.iter().map(place))?.median));
        let mut cells = vec![median(|[half, _]| *half)?, median(|[_, most]| *most)?];
        if way.carrier == Carrier::Plain {
            cells.extend(["", "", ""].map(str::to_owned));
        } else {
            let [half, most] = added(way.reach, way.carrier)?;
            cells.extend([micros(half.median), middle_half(&half, micros), micros(most.median)]);
        }
        Ok(cells)
    })?;
    let mut findings = Vec::new();
    for reach in REACHES {
        let [half, _] = added(reach, Carrier::Tunnel)?;
        findings.push(verdict(&format!("half of the requests have added, {reach}"), half.median, ADDED, micros));
    }
    say("requests: measured");
    Ok(Table {
        title: "The tunnel: requests on a connection that is kept",
        method: format!(
            "The same ways with nothing else on them: a request of a few bytes and its answer, then the next. Added: less \
             plain TCP in the same repetition. {repetitions} repetitions of {rounds} requests."
        ),
        head: vec!["path", "way", "half within", "99% within", "added to half", "middle half", "added to 99%"],
        rows,
        findings,
    })
}

fn megabytes(rate: f64) -> String {
    format!("{rate:.0} MB/s")
}

fn per_second(rate: f64) -> String {
    format!("{rate:.0}/s")
}

fn parts(ratio: f64) -> String {
    format!("{ratio:.2}")
}
