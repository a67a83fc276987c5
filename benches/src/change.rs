//! How soon new connections follow a changed endpoint.

use std::time::Duration;

use anyhow::{Context as _, Result};
use edgemesh_tests::lab::{Attempt, DEADLINE, Transport, eventually, monotonic};

use crate::{
    Effort,
    report::{Table, millis, say, verdict, whole},
    scene::Scene,
    spread::Spread,
};

/// The aim for the slowest change, in milliseconds.
const AIM: f64 = 100.0;

/// What a change does to the measured Service.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Change {
    Removed,
    Added,
}

/// Measures at few and at many Services.
pub(crate) fn measure(effort: Effort) -> Result<Vec<Table>> {
    let pairs = effort.pick(3, 25);
    let mut table = Table {
        title: "From a changed manifest to the connections that follow it",
        method: format!(
            "The endpoints of a Service are taken away and given back, by renaming a file into the manifest directory, \
             {pairs} times each, while a client connects without a pause. Counted from before the file is written to the \
             beginning of the first connection that is refused, or accepted again.",
        ),
        head: vec!["change", "Services", "median", "all changes"],
        rows: Vec::new(),
        findings: Vec::new(),
    };
    for services in effort.pick([10, 1000], [10, 10_000]) {
        let scene = Scene::raise(services)?;
        let (mut removed, mut added) = (Vec::new(), Vec::new());
        for _ in 0..pairs {
            removed.push(follow(&scene, Change::Removed)?.as_secs_f64() * 1e3);
            added.push(follow(&scene, Change::Added)?.as_secs_f64() * 1e3);
        }
        for (what, samples) in [("endpoints removed", &removed), ("endpoints added", &added)] {
            let spread = Spread::of(samples.iter().copied())?;
            table.rows.push(vec![what.to_owned(), services.to_string(), millis(spread.median), whole(&spread, millis)]);
        }
        let slowest = Spread::of(removed.into_iter().chain(added))?.max;
        table.findings.push(verdict(&format!("the slowest at {services} Services"), slowest, AIM, millis));
        say(&format!("{services} Services: {pairs} endpoints removed and added"));
    }
    Ok(vec![table])
}

/// Makes one change, and tells how long connections took to follow it.
fn follow(scene: &Scene, change: Change) -> Result<Duration> {
    let (service, client) = (scene.tcp.address(), &scene.client);
    let endpoints = match change {
        Change::Removed => Vec::new(),
        Change::Added => scene.endpoints(),
    };
    let hammer = client.hammer(Transport::Tcp, service, 1)?;
    let begin = monotonic();
    scene.write(scene.tcp, &endpoints)?;
    let mut polled = begin;
    let settled = eventually(DEADLINE, "connections to follow a change", || {
        polled = monotonic();
        let connected = matches!(client.connect(service)?, Attempt::Connected(_));
        Ok(connected == (change == Change::Added))
    });
    let report = hammer.stop()?;
    settled?;
    let first = match change {
        Change::Removed => report.failures.get("ECONNREFUSED"),
        Change::Added => report.names.get(scene.server.name()),
    };
    // The load may have been stopped before its next connection, and the one above is a connection, too.
    let first = first.map_or(polled, |seen| seen.first.min(polled));
    first.checked_sub(begin).with_context(|| format!("connections followed the change before it was made: {report:?}"))
}
