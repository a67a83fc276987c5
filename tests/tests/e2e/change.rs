//! Endpoints come and go while clients connect.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result};
use edgemesh_tests::lab::{Transport, eventually, monotonic};

use crate::{ECHO, START, TCP_PORT, World, at};

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
        let seen = report.names.get("c").with_context(|| format!("round {round}: `c` never answered: {report:?}"))?;
        delays.push(seen.first.saturating_sub(added));
    }
    delays.sort();
    let median = delays[delays.len() / 2];
    assert!(median <= FOLLOWS_WITHIN, "a change took {median:?} (median of {delays:?})");
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
