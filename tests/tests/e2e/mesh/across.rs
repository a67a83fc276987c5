//! Everybody reaches everybody, though all pods have the same addresses.

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    Pod, Transport,
    agent::AgentOptions,
    eventually,
    manifest::{Endpoint, Service},
};
use serde_json::json;

use super::sites::{Sites, TCP, UDP, server};
use crate::{START, at};

const EDGES: [(&str, &str); 2] = [("edge1", "plant"), ("edge2", "shop")];

#[test]
fn every_node_reaches_every_other_ones_pods_though_all_have_the_same_addresses() -> Result<()> {
    let Some(sites) = Sites::raise(&["cloud"], &EDGES, &AgentOptions::default())? else { return Ok(()) };
    let names = ["cloud", "edge1", "edge2"];
    for (from, to) in names.iter().flat_map(|from| names.iter().map(move |to| (*from, *to))) {
        sites.connected(from, to)?;
        let (client, host) = (&sites.seat(from)?.client, sites.seat(from)?.node.host());
        assert_eq!(client.ips(), sites.seat(to)?.client.ips());
        for pod in [client, host] {
            for target in sites.seat(to)?.service(TCP) {
                let reply = pod.tcp(target).with_context(|| format!("TCP from {from} to {to} at {target}"))?;
                assert_eq!((reply.name, reply.peer), (server(to), target), "{from} to {to}");
            }
            for target in sites.seat(to)?.service(UDP) {
                let reply = pod.udp(target).with_context(|| format!("UDP from {from} to {to} at {target}"))?;
                assert_eq!((reply.name, reply.peer), (server(to), target), "{from} to {to}");
            }
        }
    }
    assert_eq!(sites.path("edge1", "cloud")?.as_deref(), Some("lan"));
    assert_eq!(sites.path("edge1", "edge2")?.as_deref(), Some("relayed via cloud"));
    assert_eq!(sites.path("edge2", "edge1")?.as_deref(), Some("relayed via cloud"));
    Ok(())
}

#[test]
fn pods_of_a_stateful_set_have_names_in_every_site() -> Result<()> {
    let dns = AgentOptions::default().set("modules.edgeDNS", json!({ "enable": true, "resolvConf": "/dev/null" }));
    let Some(sites) = Sites::raise(&["cloud"], &EDGES, &dns)? else { return Ok(()) };
    let members = [("db-0", "edge1"), ("db-1", "edge2")];
    let mut endpoints = Vec::new();
    for (hostname, node) in members {
        let pods = Endpoint::of(&sites.seat(node)?.server, node);
        endpoints.extend(pods.into_iter().map(|endpoint| endpoint.field("hostname", hostname)));
    }
    let service = Service::new("db", &[]).port("tcp", Transport::Tcp, 7001, 7001);
    sites.lab.manifests().write("db", &service.yaml_with(&endpoints)?)?;
    for from in ["edge1", "edge2", "cloud"] {
        let client = &sites.seat(from)?.client;
        for (hostname, node) in members {
            let name = format!("{hostname}.db.default.svc.cluster.local");
            for family in ["A", "AAAA"] {
                eventually(START, &format!("{name} {family} in {from}"), || {
                    Ok(lookup(client, &name, family)?.len() == 1)
                })?;
                let address = lookup(client, &name, family)?.remove(0);
                let target = at(&address, 7001)?;
                let own = from == node;
                assert_eq!(sites.seat(node)?.server.ips().contains(&target.ip()), own, "{name} is {address} in {from}");
                eventually(START, &format!("{from} to reach {name} at {address}"), || {
                    let reply = client.tcp(target)?;
                    ensure!((&reply.name, reply.peer) == (&server(node), target), "{reply:?}");
                    Ok(true)
                })?;
            }
        }
        assert_eq!(lookup(client, "db.default.svc.cluster.local", "A")?.len(), 2, "{from}");
    }
    Ok(())
}

/// The records that the agent of a pod's node has for a name.
fn lookup(client: &Pod, name: &str, family: &str) -> Result<Vec<String>> {
    let output = client.run("dig", &["-r", "@169.254.96.16", "+tries=1", "+time=1", "+short", name, family])?;
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

#[test]
fn neighbours_find_each_other_without_a_relay() -> Result<()> {
    let edges = [("edge1", "plant"), ("edge3", "plant")];
    let Some(sites) = Sites::raise(&[], &edges, &AgentOptions::default())? else { return Ok(()) };
    for (from, to) in [("edge1", "edge3"), ("edge3", "edge1")] {
        sites.connected(from, to)?;
        assert_eq!(sites.seat(from)?.client.udp(sites.seat(to)?.service(UDP)[1])?.name, server(to));
        assert_eq!(sites.path(from, to)?.as_deref(), Some("lan"));
    }
    Ok(())
}
