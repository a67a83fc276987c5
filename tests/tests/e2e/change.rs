//! Endpoints come and go while clients connect.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{Transport, eventually, monotonic};

use crate::{ECHO, START, TCP_PORT, UDP_PORT, World, at};

/// The promise of the issue.
const FOLLOWS_WITHIN: Duration = Duration::from_millis(100);

#[test]
fn new_connections_follow_the_manifests_within_100_ms_and_none_fails() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let target = at(ECHO[0], TCP_PORT)?;
    let mut delays = Vec::new();
    for round in 0..5 {
        // `c` leaves and comes back; `a` and `b` carry on.
        let hammer = world.client.hammer(Transport::Tcp, target, 1)?;
        let removed = monotonic();
        world.write(&["a", "b"])?;
        // Something must be seen after the promised time for its absence to mean anything.
        eventually(START, "the promised time has passed", || Ok(monotonic() > removed + 2 * FOLLOWS_WITHIN))?;
        let report = hammer.stop()?;
        assert_eq!(report.failures, BTreeMap::new(), "round {round}");
        let others = report.names.iter().filter(|(name, _)| *name != "c").map(|(_, seen)| seen.last).max();
        assert!(others.context("nothing answered")? > removed + FOLLOWS_WITHIN, "round {round}: {report:?}");
        if let Some(seen) = report.names.get("c") {
            delays.push(seen.last.saturating_sub(removed));
        }

        let hammer = world.client.hammer(Transport::Tcp, target, 1)?;
        let added = monotonic();
        world.write(&["a", "b", "c"])?;
        eventually(START, "the promised time has passed", || Ok(monotonic() > added + 2 * FOLLOWS_WITHIN))?;
        let report = hammer.stop()?;
        assert_eq!(report.failures, BTreeMap::new(), "round {round}");
        // What was not seen in twice the time counts as late, and must come all the same.
        delays.push(report.names.get("c").map_or(2 * FOLLOWS_WITHIN, |seen| seen.first.saturating_sub(added)));
        eventually(START, "`c` answers", || Ok(world.client.tcp(target)?.name == "c"))?;
    }
    delays.sort();
    let median = delays[delays.len() / 2];
    assert!(median <= FOLLOWS_WITHIN, "a change took {median:?} (median of {delays:?})");
    Ok(())
}

#[test]
fn connected_udp_sockets_of_a_removed_backend_are_ended_and_no_others() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let target = at(ECHO[0], UDP_PORT)?;
    let mut sockets = Vec::new();
    for client in world.clients() {
        for _ in 0..12 {
            let socket = client.open(Transport::Udp, target)?;
            let name = socket.exchange()?.name;
            sockets.push((socket, name));
        }
    }
    // One that goes to the pod itself is not ours to end, whoever removes the pod from a Service.
    let direct = world.client.open(Transport::Udp, at(&world.backends[2].0.ips()[0].to_string(), 7002)?)?;
    assert_eq!(direct.exchange()?.name, "c");
    ensure!(sockets.iter().any(|(_, name)| name == "c"), "24 sockets all avoided one of three backends");

    world.write(&["a", "b"])?;
    for (socket, name) in &sockets {
        if name == "c" {
            eventually(START, "the socket of the removed backend is ended", || Ok(socket.exchange().is_err()))?;
        }
    }
    for (socket, name) in sockets.iter().filter(|(_, name)| name != "c") {
        assert_eq!(socket.exchange()?.name, *name, "a socket of another backend goes on");
    }
    assert_eq!(direct.exchange()?.name, "c");
    let metrics = world.edge1.host().http_get("127.0.0.1:20008".parse()?, "/metrics", 1)?;
    let ended = sockets.iter().filter(|(_, name)| name == "c").count();
    let line = format!("edgemesh_stale_udp_sockets_ended_total {ended}\n");
    ensure!(metrics.replies[0].body.contains(&line), "no {line} in {}", metrics.replies[0].body);
    Ok(())
}

#[test]
fn a_service_that_is_removed_is_left_alone_again_and_one_that_is_added_is_served() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let target = at(ECHO[1], TCP_PORT)?;
    assert_eq!(world.client.tcp(target)?.peer, target);
    world.lab.manifests().remove("echo")?;
    let quick = world.client.within(Duration::from_millis(200));
    eventually(START, "the removed Service is left alone", || Ok(quick.tcp(target).is_err()))?;
    world.write(&["b"])?;
    eventually(START, "the Service is served again", || Ok(quick.tcp(target).is_ok()))?;
    assert_eq!(world.client.tcp(target)?.name, "b");
    Ok(())
}
