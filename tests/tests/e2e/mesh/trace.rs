//! `trace` across the tunnel: what it says is what happens.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    App, Node, Transport,
    agent::AgentOptions,
    errno, eventually,
    manifest::{Endpoint, Service},
};
use serde_json::{Value, json};

use super::{
    World,
    sites::{Sites, TCP, UDP},
};
use crate::{START, at};

/// Exit codes of `trace`, by docs/operations.md.
const ARRIVES: i32 = 0;
const LOST: i32 = 68;

const EDGES: [(&str, &str); 2] = [("edge1", "plant"), ("edge2", "shop")];

/// How long a trace may take, whoever is silent.
const BOUND: Duration = Duration::from_millis(4500);

/// Runs `trace` on a node, and gives its exit code, its answer and how long it took.
fn trace(node: &Node, target: &str) -> Result<(i32, Value, Duration)> {
    let begin = Instant::now();
    let output = node.cli(&["trace", target, "-o", "json"])?;
    let took = begin.elapsed();
    let report = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("no report: {}", String::from_utf8_lossy(&output.stderr)))?;
    Ok((output.status.code().context("killed")?, report, took))
}

fn shown(node: &Node, target: &str) -> Result<String> {
    Ok(String::from_utf8(node.cli(&["trace", target])?.stdout)?)
}

/// The only one.
fn crossing(report: &Value) -> Result<&Value> {
    let crossings = report["crossings"].as_array().context("no crossings")?;
    ensure!(crossings.len() == 1, "{report}");
    Ok(&crossings[0])
}

#[test]
fn a_connection_is_followed_to_the_far_pod_by_a_direct_path_and_by_a_relay() -> Result<()> {
    let Some(sites) = Sites::raise(&["cloud"], &EDGES, &AgentOptions::default())? else { return Ok(()) };
    let near = &sites.seat("edge1")?.node;
    for (to, path, via) in [("cloud", "lan", Value::Null), ("edge2", "relayed", json!("cloud"))] {
        sites.connected("edge1", to)?;
        let far = sites.seat(to)?;
        for target in far.service(TCP) {
            let (code, report, _) = trace(near, &target.to_string())?;
            let crossing = crossing(&report)?;
            assert_eq!((code, &report["outcome"]), (ARRIVES, &json!("forwarded")), "{report}");
            assert_eq!((&crossing["path"]["path"], &crossing["path"]["via"]), (&json!(path), &via), "{report}");
            assert_eq!(crossing["path"]["address"].is_null(), path == "relayed", "{report}");
            let own = far.server.ips().iter().find(|ip| ip.is_ipv4() == target.is_ipv4()).context("no address")?;
            let endpoint = SocketAddr::new(*own, 7001).to_string();
            assert_eq!((&crossing["node"], &crossing["endpoint"]), (&json!(to), &json!(endpoint)), "{report}");
            let said = &crossing["far"];
            assert_eq!(
                (&said["outcome"], &said["services"]),
                (&json!("connected"), &json!([format!("default/{to}")])),
                "{report}"
            );
            assert!(said["dial_micros"].as_u64().is_some_and(|micros| micros < 1_000_000), "{report}");

            // The alias itself leads to the same pod.
            let alias = crossing["alias"].as_str().context("no alias")?;
            let (code, report, _) = trace(near, alias)?;
            assert_eq!((code, &report["outcome"]), (ARRIVES, &json!("carried")), "{report}");
            assert_eq!(self::crossing(&report)?["far"]["outcome"], "connected", "{report}");
        }
        let (code, report, _) = trace(near, &format!("{}/udp", far.service(UDP)[0]))?;
        let said = &crossing(&report)?["far"];
        assert_eq!((code, &said["outcome"], &said["dial_micros"]), (ARRIVES, &json!("allowed"), &Value::Null));
    }
    let far = super::report(&sites.seat("edge2")?.node, "status")?;
    assert!(far["tunnel"]["counts"]["questions"].as_u64() >= Some(5), "{far}");
    Ok(())
}

#[test]
fn a_far_pod_that_refuses_is_told_from_one_that_answers_for_people_too() -> Result<()> {
    const PSK: &str = "0123456789abcdef-of-both";
    let Some(world) = World::raise([PSK, PSK])? else { return Ok(()) };
    let target = at(super::CLUSTER_IPS[0], 80)?;
    eventually(START, "the server to answer", || Ok(world.client.tcp(target).is_ok()))?;
    let text = shown(&world.edge1, &target.to_string())?;
    for part in ["on edge2\n  tunnel: lan, ", "\n  edge2: allowed, endpoint of default/web; its pod answered in "] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    // A pod's own address leads nowhere from here, and it is said where it would.
    let own = SocketAddr::new(world.server.ips()[0], 7001);
    let (code, report, _) = trace(&world.edge1, &own.to_string())?;
    assert_eq!((code, &report["outcome"]), (LOST, &json!("untouched")), "{report}");
    assert_eq!(crossing(&report)?["far"]["outcome"], "connected", "{report}");
    assert!(report["notes"].to_string().contains("on edge2, which only the tunnel reaches"), "{report}");

    world.server.stop_serving(App::Tcp, 7001)?;
    let (code, report, _) = trace(&world.edge1, &target.to_string())?;
    let said = &crossing(&report)?["far"];
    assert_eq!((code, &said["outcome"], &said["services"]), (LOST, &json!("refused"), &json!(["default/web"])));
    let error = world.client.tcp(target).err().context("nobody listens, and it was answered")?;
    assert_eq!(errno(&error), Some("ECONNRESET"), "what trace says is what happens: {error:#}");
    assert!(shown(&world.edge1, &target.to_string())?.contains("its pod REFUSES the connection"));
    Ok(())
}

#[test]
fn a_far_agent_that_is_frozen_or_gone_is_said_to_be_within_seconds() -> Result<()> {
    let Some(sites) = Sites::raise(&["cloud"], &EDGES, &AgentOptions::default())? else { return Ok(()) };
    for to in ["cloud", "edge2"] {
        sites.connected("edge1", to)?;
    }
    let (near, far) = (&sites.seat("edge1")?.node, sites.seat("edge2")?);
    let target = far.service(TCP)[0].to_string();
    // Beside it, one whose node answers: each is said what is so of it.
    let both = Service::new("both", &["10.96.9.2"]).port("tcp", Transport::Tcp, 80, 7001);
    let endpoints = ["cloud", "edge2"].map(|to| sites.seat(to).map(|seat| Endpoint::new(seat.server.ips()[0], to)));
    sites.lab.manifests().write("both", &both.yaml_with(&endpoints.into_iter().collect::<Result<Vec<_>>>()?)?)?;
    eventually(START, "both to be followed", || {
        let (_, report, _) = trace(near, "10.96.9.2:80")?;
        ensure!(report["crossings"].as_array().is_some_and(|all| all.len() == 2), "{report}");
        Ok(report["kernel"]["state"] == "same")
    })?;

    far.agent.freeze()?;
    let frozen = trace(near, "10.96.9.2:80");
    far.agent.thaw()?;
    let (code, report, took) = frozen?;
    assert!(took < BOUND, "{took:?}");
    assert_eq!(code, ARRIVES, "at the other one: {report}");
    let outcomes: Vec<(&Value, &Value)> = report["crossings"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|crossing| (&crossing["node"], &crossing["far"]["outcome"]))
        .collect();
    assert!(outcomes.contains(&(&json!("cloud"), &json!("connected"))), "{report}");
    assert!(outcomes.contains(&(&json!("edge2"), &json!("silent"))), "{report}");

    far.agent.kill()?;
    eventually(START, "the path to be gone", || Ok(sites.path("edge1", "edge2")?.is_none()))?;
    let (code, report, took) = trace(near, &target)?;
    let crossing = crossing(&report)?;
    assert_eq!((code, &crossing["far"]["outcome"]), (LOST, &json!("no-path")), "{report}");
    assert!(crossing["path"].is_null() && took < BOUND, "{took:?} {report}");
    let text = shown(near, &target)?;
    assert!(text.contains("  tunnel: NO PATH: ") && !text.contains("  edge2: "), "{text}");
    Ok(())
}

#[test]
fn an_endpoint_that_its_node_does_not_dial_is_told_with_the_rule() -> Result<()> {
    let Some(mut sites) = Sites::raise(&["cloud"], &EDGES, &AgentOptions::default())? else { return Ok(()) };
    sites.connected("edge1", "edge2")?;
    let service = Service::new("metadata", &["10.96.9.1"]).port("tcp", Transport::Tcp, 80, 7001);
    let metadata = Endpoint::new("169.254.169.254".parse()?, "edge2");
    sites.lab.manifests().write("metadata", &service.yaml_with(&[metadata])?)?;
    // That node knows no endpoint of its own.
    let elsewhere = sites.lab.directory().join("manifests-of-edge2");
    std::fs::create_dir(&elsewhere).context("could not make a directory for manifests")?;
    let directory = elsewhere.to_string_lossy().into_owned();
    sites.restart_with("edge2", |options| options.set("kubeAPIConfig.staticDirectory", directory))?;
    let near = &sites.seat("edge1")?.node;
    for (target, rule) in [
        (sites.seat("edge2")?.service(TCP)[0].to_string(), "neither an endpoint of a Service on this node"),
        ("10.96.9.1:80".to_owned(), "the metadata address is never dialled for others"),
    ] {
        eventually(START, &format!("{target} to be refused by a rule with {rule:?}"), || {
            let (code, report, _) = trace(near, &target)?;
            let said = &crossing(&report)?["far"];
            ensure!((code, &said["outcome"]) == (LOST, &json!("not-allowed")), "{report}");
            ensure!(said["services"] == json!([]) && said["dial_micros"].is_null(), "{report}");
            Ok(said["detail"].as_str().is_some_and(|detail| detail.contains(rule)))
        })?;
        assert!(shown(near, &target)?.contains("  edge2: NOT ALLOWED there: "));
    }
    Ok(())
}
