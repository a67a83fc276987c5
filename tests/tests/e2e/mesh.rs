//! Across nodes by the tunnel: real agents, real pods, and nothing configured but a PSK and one relay.

mod across;
mod crowds;
mod relays;
mod sites;
mod strangers;
mod targets;
mod trace;

use std::time::Duration;

use anyhow::{Context as _, Result};
use edgemesh_tests::lab::{
    App, Lab, Node, Pod, Transport,
    agent::{Agent, AgentOptions},
    eventually,
    manifest::{Endpoint, Service},
};
use serde_json::{Value, json};

use crate::{START, at};

const CLUSTER_IPS: [&str; 2] = ["10.96.8.1", "fd00:10:96::8:1"];

/// `edge1` with a client and `edge2` with a server, in one LAN, whose pods never go directly. `edge2` is the relay.
struct World {
    client: Pod,
    server: Pod,
    agents: [Agent; 2],
    edge1: Node,
    edge2: Node,
    _lab: Lab,
}

fn options(node: &Node, relay: &Node, psk: &str) -> Result<AgentOptions> {
    let psk = node.write_file("psk", psk)?;
    let address = relay.ips().first().context("the relay has no address")?.to_string();
    Ok(AgentOptions::default()
        .set("modules.edgeTunnel.enable", true)
        .set("modules.edgeTunnel.psk.path", psk.to_string_lossy().into_owned())
        .set("modules.edgeTunnel.neverDirectCIDRs", json!(["10.244.0.0/16", "fd00:10:244::/48"]))
        .set("modules.edgeTunnel.relayNodes", json!([{ "nodeName": relay.name(), "advertiseAddress": [address] }])))
}

impl World {
    fn raise(psks: [&str; 2]) -> Result<Option<Self>> {
        let Some(lab) = Lab::for_test()? else { return Ok(None) };
        let lan = lab.site("lan", &["192.168.10.0/24", "fd00:192:168:10::/64"])?;
        let edge1 = lan.node("edge1", &["10.244.1.0/24", "fd00:10:244:1::/64"])?;
        let edge2 = lan.node("edge2", &["10.244.2.0/24", "fd00:10:244:2::/64"])?;
        let (client, server) = (edge1.pod("client")?, edge2.pod("server")?);
        server.serve(App::Tcp, 7001)?;
        server.serve(App::Udp, 7001)?;
        let service = Service::new("web", &CLUSTER_IPS).port("tcp", Transport::Tcp, 80, 7001).port(
            "udp",
            Transport::Udp,
            80,
            7001,
        );
        lab.manifests().write("web", &service.yaml_with(&Endpoint::of(&server, "edge2"))?)?;
        let agents = [
            edge1.start_agent(&options(&edge1, &edge2, psks[0])?)?,
            edge2.start_agent(&options(&edge2, &edge2, psks[1])?)?,
        ];
        for agent in &agents {
            agent.wait_ready(START)?;
        }
        Ok(Some(Self { client, server, agents, edge1, edge2, _lab: lab }))
    }
}

fn report(node: &Node, command: &str) -> Result<Value> {
    let output = node.cli(&[command, "-o", "json"])?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("no report: {}", String::from_utf8_lossy(&output.stderr)))
}

fn has_condition(node: &Node, reason: &str) -> Result<bool> {
    let status = report(node, "status")?;
    Ok(status["conditions"].as_array().into_iter().flatten().any(|condition| condition["reason"] == reason))
}

#[test]
fn a_pod_that_only_the_tunnel_reaches_is_reached_by_tcp_and_udp() -> Result<()> {
    const PSK: &str = "0123456789abcdef-of-both";
    let Some(world) = World::raise([PSK, PSK])? else { return Ok(()) };
    for ip in CLUSTER_IPS {
        let target = at(ip, 80)?;
        eventually(START, "the server to answer", || Ok(world.client.tcp(target).is_ok()))?;
        assert_eq!(world.client.tcp(target)?.name, "server");
        assert_eq!(world.client.udp(target)?.name, "server");
    }
    let peers = report(&world.edge1, "peers")?;
    assert_eq!((&peers[0]["node"], &peers[0]["path"]), (&json!("edge2"), &json!("lan")), "{peers}");
    let status = report(&world.edge2, "status")?;
    assert!(status["tunnel"]["counts"]["served"].as_u64() >= Some(4), "{status}");
    let table = String::from_utf8(world.edge1.cli(&["peers"])?.stdout)?;
    assert!(table.contains("edge2") && table.contains("lan"), "{table}");
    assert!(world.agents[0].metrics()?.contains("edgemesh_tunnel_nodes{path=\"lan\"} 1"));
    for agent in &world.agents {
        assert!(agent.stop()?.success());
    }
    Ok(())
}

#[test]
fn a_node_with_another_psk_is_served_nothing_and_said_so() -> Result<()> {
    let Some(world) = World::raise(["0123456789abcdef-of-one", "0123456789abcdef-of-other"])? else { return Ok(()) };
    eventually(START, "the wrong PSK to be seen", || has_condition(&world.edge1, "WrongPskSeen"))?;
    assert!(world.client.within(Duration::from_secs(6)).tcp(at(CLUSTER_IPS[0], 80)?).is_err());
    assert_eq!(report(&world.edge1, "peers")?, json!([]));
    eventually(START, "the lack of a relay to be said", || has_condition(&world.edge1, "RelaysUnreachable"))
}
