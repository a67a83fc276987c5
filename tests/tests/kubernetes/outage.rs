//! The API server is away, and what was learned before stays; when it is back, what is true then is in force.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use edgemesh_tests::lab::{Transport, eventually};

use crate::{Cluster, START, WEB, at, service, web};

/// How long the exact state may take once the server is back.
const RETURN: Duration = Duration::from_secs(5);

#[test]
fn after_an_outage_of_the_api_server_exactly_what_is_true_then_is_in_force() -> Result<()> {
    let Some((cluster, agent)) = Cluster::with_agent()? else { return Ok(()) };
    let (kept, gone, new) = (at(WEB, 80)?, at("10.96.0.81", 80)?, at("10.96.0.82", 80)?);
    cluster.apply(&web(WEB), &["a", "b"])?;
    let (gone_service, new_service) = (service("gone", "10.96.0.81"), service("new", "10.96.0.82"));
    cluster.apply(&gone_service, &["c"])?;
    cluster.expect_answers(kept, &["a", "b"])?;
    cluster.expect_answers(gone, &["c"])?;
    let objects = cluster.plane.endpoints_yaml(&new_service, &cluster.endpoints(&["b"]))?;
    let changed = cluster.plane.endpoints_yaml(&web(WEB), &cluster.endpoints(&["c"]))?;

    let hammer = cluster.client.hammer(Transport::Tcp, kept, 1)?;
    let begun = Instant::now();
    cluster.plane.kill_server()?;
    let message = cluster.expect_condition("ApiServerUnreachable", "")?;
    assert!(message.contains(&cluster.plane.url()), "{message}");
    cluster.plane.behind_the_back(|hidden| {
        hidden.delete("gone")?;
        hidden.apply(&objects)?;
        hidden.apply(&changed)?;
        Ok(())
    })?;
    // The pauses between attempts have grown to the longest by then.
    sleep(outage()?.saturating_sub(begun.elapsed()));
    cluster.expect_answers(gone, &["c"])?;
    assert_eq!(cluster.answers(kept)?.into_iter().collect::<Vec<_>>(), ["a", "b"], "the last known state is served");
    let status = cluster.status()?;
    assert_eq!(status["ready"], true, "{status}");

    cluster.plane.start_server()?;
    let exact = || -> Result<bool> {
        let client = cluster.client.within(Duration::from_millis(200));
        Ok(cluster.answers(kept)?.into_iter().eq(["c"])
            && cluster.answers(new)?.into_iter().eq(["b"])
            && client.tcp(gone).is_err())
    };
    eventually(RETURN, "the exact state within 5 s of the server's return", exact)
        .with_context(|| format!("the agent's log:\n{}", agent.log().unwrap_or_default()))?;
    cluster.expect_no_condition()?;
    let report = hammer.stop()?;
    assert!(report.failures.is_empty(), "{report:?}");
    assert!(agent.log()?.contains("the resource version has expired"), "a server that was restarted has no history");

    // And changes are followed again, one by one.
    cluster.apply(&web(WEB), &["a", "c"])?;
    cluster.expect_answers(kept, &["a", "c"])
}

#[test]
fn an_agent_that_starts_before_its_api_server_serves_as_soon_as_that_is_there() -> Result<()> {
    let Some(cluster) = Cluster::raise()? else { return Ok(()) };
    cluster.apply(&web(WEB), &["a"])?;
    cluster.plane.mount_credentials(&cluster.edge, &crate::account())?;
    cluster.plane.kill()?;
    let options = cluster.plane.in_cluster(edgemesh_tests::lab::agent::AgentOptions::default());
    let agent = cluster.edge.start_agent(&options)?;
    cluster.expect_condition("ApiServerUnreachable", "")?;
    assert_eq!(cluster.status()?["ready"], false);
    cluster.plane.start_again()?;
    agent.wait_ready(START)?;
    cluster.expect_answers(at(WEB, 80)?, &["a"])?;
    cluster.expect_no_condition()
}

/// A minute, or EDGEMESH_OUTAGE_SECONDS.
fn outage() -> Result<Duration> {
    let Ok(text) = std::env::var("EDGEMESH_OUTAGE_SECONDS") else { return Ok(Duration::from_secs(60)) };
    Ok(Duration::from_secs(text.parse().context("EDGEMESH_OUTAGE_SECONDS is no number")?))
}
