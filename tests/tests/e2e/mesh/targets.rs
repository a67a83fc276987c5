//! What is at the far end: pods that end connections in every way there is, and what nobody may reach.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    App, Transport,
    agent::AgentOptions,
    errno, eventually,
    manifest::{Endpoint, Service},
};
use serde_json::json;

use super::{
    report,
    sites::{COUNT, RESET, Sites, TCP},
};
use crate::{START, at};

const SECOND: Duration = Duration::from_secs(1);
/// How long a target is waited for that never answers.
const PATIENCE: Duration = Duration::from_secs(5);

#[test]
fn however_a_far_pod_ends_a_connection_its_client_sees_the_same() -> Result<()> {
    let edges = [("edge1", "plant"), ("edge2", "shop")];
    let Some(sites) = Sites::raise(&["cloud"], &edges, &AgentOptions::default())? else { return Ok(()) };
    // By a direct path, and by a relay.
    for to in ["cloud", "edge2"] {
        sites.connected("edge1", to)?;
        let (client, far) = (&sites.seat("edge1")?.client, sites.seat(to)?);

        let counted = client.open(Transport::Tcp, far.service(COUNT)[0])?;
        counted.say()?;
        let ending = counted.finish()?;
        assert_eq!((&*ending.rest, &ending.errno), ("1", &None), "half-closed to {to}");
        assert!(ending.took < SECOND, "half-closed to {to}: {ending:?}");

        let reset = client.open(Transport::Tcp, far.service(RESET)[0])?;
        reset.say()?;
        let ending = reset.read_to_end()?;
        assert_eq!(ending.errno.as_deref(), Some("ECONNRESET"), "reset by {to}");
        assert!(ending.took < SECOND, "reset by {to}: {ending:?}");

        let closed = client.open(Transport::Tcp, far.service(TCP)[0])?;
        closed.exchange()?;
        far.server.stop_serving(App::Tcp, 7001)?;
        let ending = closed.read_to_end()?;
        assert_eq!((&*ending.rest, &ending.errno), ("", &None), "closed by {to}");
        assert!(ending.took < SECOND, "closed by {to}: {ending:?}");

        // Nobody listens there any more.
        let begin = Instant::now();
        let error = client.tcp(far.service(TCP)[0]).err().context("nobody listens, and it was answered")?;
        assert_eq!(errno(&error), Some("ECONNRESET"), "refused by {to}: {error:#}");
        assert!(begin.elapsed() < SECOND, "refused by {to} after {:?}", begin.elapsed());

        // The pod hears and cannot answer.
        let node = &far.server.ips()[0].to_string().replace(".3", ".1");
        let output = far.server.run("ip", &["route", "add", "blackhole", &format!("{node}/32")])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let begin = Instant::now();
        let error = client.within(4 * PATIENCE).tcp(far.service(COUNT)[0]).err().context("it was answered")?;
        assert_eq!(errno(&error), Some("ECONNRESET"), "no answer by {to}: {error:#}");
        let took = begin.elapsed();
        assert!(took > PATIENCE - SECOND && took < PATIENCE + SECOND, "no answer by {to} after {took:?}");
    }
    Ok(())
}

#[test]
fn a_node_dials_its_own_endpoints_for_others_and_nothing_else() -> Result<()> {
    let edges = [("edge1", "plant"), ("edge2", "shop")];
    let debug = AgentOptions::default().log("info,edgemesh_agent::proxy=debug");
    let Some(mut sites) = Sites::raise(&["cloud"], &edges, &debug)? else { return Ok(()) };
    sites.connected("edge1", "edge2")?;
    // What leads to the inside of a node is refused whatever its configuration says. 127.0.0.1 is no endpoint to begin with.
    let service = Service::new("metadata", &["10.96.9.1"]).port("tcp", Transport::Tcp, 80, 7001);
    let metadata = Endpoint::new("169.254.169.254".parse()?, "edge2");
    sites.lab.manifests().write("metadata", &service.yaml_with(&[metadata])?)?;
    // Only what is of no use to anybody is in it.
    let elsewhere = sites.lab.directory().join("manifests-of-edge2");
    std::fs::create_dir(&elsewhere).context("could not make a directory for manifests")?;
    let directory = elsewhere.to_string_lossy().into_owned();
    sites.restart_with("edge2", |options| {
        options
            .set("kubeAPIConfig.staticDirectory", directory)
            .set("modules.edgeTunnel.allowedTargets", json!(["127.0.0.0/8:*", "169.254.0.0/16:*"]))
    })?;
    let refused = |what: &str, target: SocketAddr, rule: &str| {
        eventually(START, &format!("{what} to be refused by a rule with {rule:?}"), || {
            let begin = Instant::now();
            let error = sites.seat("edge1")?.client.tcp(target).err().context("it was reached")?;
            ensure!(begin.elapsed() < SECOND, "refused after {:?}", begin.elapsed());
            let log = sites.seat("edge1")?.agent.log()?;
            let told = log.lines().any(|line| line.contains("does not allow it") && line.contains(rule));
            ensure!(told, "{error:#}, and the log does not tell the rule");
            Ok(true)
        })
    };
    let known_to_one = sites.seat("edge2")?.service(TCP)[0];
    refused("an endpoint that its own node does not know", known_to_one, "endpoint of a Service on this node")?;
    refused("the metadata address", at("10.96.9.1", 80)?, "the metadata address is never dialled")?;
    let status = report(&sites.seat("edge2")?.node, "status")?;
    assert!(status["tunnel"]["counts"]["not_allowed"].as_u64() >= Some(2), "{status}");
    assert_eq!(status["tunnel"]["counts"]["served"], json!(0), "{status}");
    Ok(())
}
