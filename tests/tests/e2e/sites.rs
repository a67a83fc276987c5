//! Pods of other sites: aliases in their place, and the ways to all others.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    App, Lab, Node, Pod, Transport,
    agent::{Agent, AgentOptions},
    errno, eventually,
    manifest::{Endpoint, Service},
};
use serde_json::Value;

use crate::{START, at};

const CLUSTER_IPS: [&str; 2] = ["10.96.7.1", "fd00:10:96::7:1"];
/// A pod of `far` with the very addresses of the pod `here`.
const SAME: [&str; 2] = ["10.244.1.3", "fd00:10:244:1::3"];

/// An agent with a tunnel to nowhere on `edge1`, beside `edge2` in one LAN. There are pods on the node `far`, too, which is
/// in no LAN of this lab.
struct World {
    client: Pod,
    here: Pod,
    there: Pod,
    agent: Agent,
    edge1: Node,
    edge2: Node,
    lab: Lab,
}

fn options() -> AgentOptions {
    AgentOptions::default().set("modules.edgeTunnel.enable", true)
}

impl World {
    fn raise(options: &AgentOptions) -> Result<Option<Self>> {
        let Some(lab) = Lab::for_test()? else { return Ok(None) };
        let lan = lab.site("lan", &["192.168.10.0/24", "fd00:192:168:10::/64"])?;
        let edge1 = lan.node("edge1", &["10.244.1.0/24", "fd00:10:244:1::/64"])?;
        let edge2 = lan.node("edge2", &["10.244.2.0/24", "fd00:10:244:2::/64"])?;
        let (client, here, there) = (edge1.pod("client")?, edge1.pod("here")?, edge2.pod("there")?);
        for pod in [&here, &there] {
            pod.serve(App::Tcp, 7001)?;
        }
        assert_eq!(here.ips().iter().map(ToString::to_string).collect::<Vec<_>>(), SAME);
        let agent = edge1.start_agent(options)?;
        agent.wait_ready(START)?;
        Ok(Some(Self { client, here, there, agent, edge1, edge2, lab }))
    }

    /// Writes the Service `web` with these endpoints, and waits until it is in force.
    fn write(&self, endpoints: &[Endpoint]) -> Result<()> {
        let service = Service::new("web", &CLUSTER_IPS).port("tcp", Transport::Tcp, 80, 7001);
        self.lab.manifests().write("web", &service.yaml_with(endpoints)?)?;
        eventually(START, "the Service to be in force", || {
            let status = self.status()?;
            let generation = |name: &str| status["dataplane"][name].as_u64();
            ensure!(generation("generation") == generation("newest_generation"), "{status}");
            Ok(self.endpoints()?.len() == endpoints.len())
        })
    }

    fn far(&self) -> Result<Vec<Endpoint>> {
        SAME.iter().map(|ip| Ok(Endpoint::new(ip.parse()?, "far"))).collect()
    }

    fn everywhere(&self) -> Result<Vec<Endpoint>> {
        let near = Endpoint::of(&self.here, "edge1").into_iter().chain(Endpoint::of(&self.there, "edge2"));
        Ok(near.chain(self.far()?).collect())
    }

    fn report(&self, arguments: &[&str]) -> Result<Value> {
        let output = self.edge1.cli(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("no report: {}", String::from_utf8_lossy(&output.stderr)))
    }

    fn status(&self) -> Result<Value> {
        self.report(&["status"])
    }

    fn endpoints(&self) -> Result<Vec<Value>> {
        let report = self.report(&["backends", "default/web"])?;
        Ok(report["ports"][0]["endpoints"].as_array().cloned().unwrap_or_default())
    }

    /// The aliases of the pods of `far`, IPv4 first.
    fn aliases(&self) -> Result<Vec<IpAddr>> {
        let endpoints = self.endpoints()?;
        let far = endpoints.iter().filter(|endpoint| endpoint["node"] == "far");
        far.map(|endpoint| Ok(endpoint["path"]["alias"].as_str().context("no alias")?.parse()?)).collect()
    }
}

fn cluster_ips() -> Result<Vec<SocketAddr>> {
    CLUSTER_IPS.iter().map(|ip| at(ip, 80)).collect()
}

/// How a client of what is not reached fares.
fn reset_at_once(client: &Pod, target: SocketAddr) -> Result<()> {
    let begun = Instant::now();
    let error = client.tcp(target).err().context("it was carried, and nobody carries it")?;
    assert_eq!(errno(&error), Some("ECONNRESET"), "{target}: {error:#}");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    Ok(())
}

#[test]
fn each_endpoint_has_its_way_and_says_why() -> Result<()> {
    let Some(world) = World::raise(&options())? else { return Ok(()) };
    world.write(&world.everywhere()?)?;
    let mut ways: Vec<String> = Vec::new();
    for endpoint in world.endpoints()? {
        let path = &endpoint["path"];
        ways.push(format!("{} {} {}", endpoint["node"].as_str().unwrap_or_default(), path["way"], path["reason"]));
    }
    let ways = ways.join("\n").replace('"', "");
    for wanted in [
        "edge1 local on this node",
        "edge2 direct the route 10.244.2.0/24 leads there by a gateway",
        "edge2 direct the route fd00:10:244:2::/64 leads there by a gateway",
        "far remote the route 10.244.1.0/24 is a subnet of this node's own, not another node's pods",
    ] {
        assert!(ways.contains(wanted), "{wanted} in\n{ways}");
    }
    let aliases = world.aliases()?;
    let shown = String::from_utf8(world.edge1.cli(&["backends", "default/web"])?.stdout)?;
    assert!(shown.contains(&format!("remote as {}: the route", aliases[0])), "{shown}");
    let trace = world.report(&["trace", "10.96.7.1:80"])?;
    assert_eq!(trace["kernel"]["state"], "same", "{trace}");
    let far = trace["endpoints"].as_array().into_iter().flatten().filter(|endpoint| endpoint["node"] == "far");
    let far: Vec<&Value> = far.filter(|endpoint| endpoint["eligible"] == true).collect();
    assert!(matches!(far[..], [only] if only["in_kernel"] == true && only["path"]["way"] == "remote"), "{trace}");
    let trace = String::from_utf8(world.edge1.cli(&["trace", &format!("{}:7001", aliases[0])])?.stdout)?;
    assert!(trace.contains("it is the alias of 10.244.1.3 on node far"), "{trace}");
    Ok(())
}

#[test]
fn without_a_tunnel_nothing_is_decided_and_nothing_is_made() -> Result<()> {
    let Some(world) = World::raise(&AgentOptions::default())? else { return Ok(()) };
    world.write(&[Endpoint::new("10.99.0.7".parse()?, "far")])?;
    let endpoints = world.endpoints()?;
    assert!(endpoints.iter().all(|endpoint| endpoint["path"].is_null()), "{endpoints:?}");
    assert!(world.status()?["aliases"].is_null());
    assert!(!world.edge1.ip(&["route", "show", "table", "local"])?.contains("198.18."));
    assert!(!world.edge1.file("/sys/fs/bpf/edgemesh/v2/lookup_aliases").exists());
    Ok(())
}

#[test]
fn a_pod_of_another_site_is_refused_at_once_while_no_tunnel_reaches_it_whoever_has_its_address_here() -> Result<()> {
    let Some(world) = World::raise(&options())? else { return Ok(()) };
    world.write(&world.far()?)?;
    for target in cluster_ips()? {
        for client in [&world.client, world.edge1.host()] {
            reset_at_once(client, target)?;
        }
    }
    let status = world.status()?;
    // Of both families: the pod's, its node's and this node's.
    assert_eq!(status["aliases"]["in_use"], 6, "{status}");
    assert_eq!(status["aliases"]["proxy"]["refusals"][0]["kind"], "no_tunnel", "{status}");
    assert!(world.agent.metrics()?.contains("edgemesh_alias_refusals_total{reason=\"no_tunnel\"} 4"));
    // UDP has nothing to reset; the agent has taken the datagram all the same.
    let alias = SocketAddr::new(world.aliases()?[0], 53);
    assert!(world.client.within(Duration::from_millis(300)).udp(alias).is_err());
    assert_eq!(world.status()?["aliases"]["proxy"]["datagrams_dropped"], 1);
    Ok(())
}

#[test]
fn aliases_stay_the_same_over_restarts_and_lead_nowhere_else_in_between() -> Result<()> {
    let Some(world) = World::raise(&options())? else { return Ok(()) };
    world.write(&world.far()?)?;
    let before = world.aliases()?;
    world.edge1.host().serve(App::Tcp, 7001)?;
    let file = world.edge1.snapshot_path().with_file_name("aliases");
    eventually(START, "the aliases to be written", || {
        let text = std::fs::read_to_string(&file)?;
        Ok(before.iter().all(|alias| text.contains(&alias.to_string())))
    })?;
    world.agent.kill()?;
    for alias in &before {
        let error =
            world.client.tcp(SocketAddr::new(*alias, 7001)).expect_err("it is not this node that was asked for");
        assert_eq!(errno(&error), Some("ECONNREFUSED"), "{error:#}");
    }
    let again = world.edge1.start_agent(&options())?;
    again.wait_ready(START)?;
    assert_eq!(world.aliases()?, before);
    for target in cluster_ips()? {
        reset_at_once(&world.client, target)?;
    }
    Ok(())
}

#[test]
fn the_outside_does_not_get_to_aliases() -> Result<()> {
    for tcx in [true, false] {
        let options = options().set("modules.edgeProxy.ebpf.tcx", tcx);
        let Some(world) = World::raise(&options)? else { return Ok(()) };
        world.write(&world.far()?)?;
        let aliases = world.aliases()?;
        for alias in &aliases {
            let via = world.edge1.ips().iter().find(|ip| ip.is_ipv4() == alias.is_ipv4()).context("no address")?;
            world.edge2.ip(&["route", "add", &alias.to_string(), "via", &via.to_string()])?;
        }
        let dropped = || -> Result<u64> {
            Ok(world.status()?["dataplane"]["dropped_packets"]["alias"].as_u64().unwrap_or_default())
        };
        let outside = world.edge2.host().within(Duration::from_millis(500));
        eventually(START, "the uplink to be guarded", || {
            let _ = outside.connect(SocketAddr::new(aliases[0], 7001))?;
            Ok(dropped()? > 0)
        })?;
        for alias in &aliases {
            let target = SocketAddr::new(*alias, 7001);
            let before = dropped()?;
            let attempt = format!("{:?}", outside.connect(target)?);
            assert!(!attempt.contains("ECONNREFUSED") && !attempt.contains("ECONNRESET"), "{target}: {attempt}");
            assert!(outside.udp(target).is_err());
            assert!(dropped()? >= before + 2, "{target}");
            reset_at_once(&world.client, target)?;
        }
        // The node's own pods are served from outside as ever, and nothing else is dropped.
        assert_eq!(world.edge2.host().tcp(SocketAddr::new(world.here.ips()[0], 7001))?.name, "here");
    }
    Ok(())
}

#[test]
fn routes_are_followed_as_they_come_and_go() -> Result<()> {
    let Some(world) = World::raise(&options())? else { return Ok(()) };
    world.write(&[Endpoint::new("10.99.0.7".parse()?, "far")])?;
    let way = || -> Result<Value> { Ok(world.endpoints()?.first().context("no endpoint")?["path"]["way"].clone()) };
    assert_eq!(way()?, "remote");
    let alias = world.aliases()?;
    let via = world.edge2.ips().first().context("no address")?.to_string();
    world.edge1.ip(&["route", "add", "10.99.0.0/16", "via", &via])?;
    let second = Duration::from_secs(5);
    eventually(second, "the pod to be direct", || Ok(way()? == "direct"))?;
    world.edge1.ip(&["route", "del", "10.99.0.0/16"])?;
    eventually(second, "the pod to be remote", || Ok(way()? == "remote"))?;
    assert_eq!(world.aliases()?, alias);
    Ok(())
}

#[test]
fn a_range_that_is_in_use_is_said_and_pods_of_other_sites_are_refused() -> Result<()> {
    let options = options().set("commonConfig.aliasCIDR", "192.168.10.0/28");
    let Some(world) = World::raise(&options)? else { return Ok(()) };
    world.write(&world.everywhere()?)?;
    let conditions = world.status()?["conditions"].to_string();
    assert!(
        conditions.contains("AliasesNotAvailable") && conditions.contains("commonConfig.aliasCIDR"),
        "{conditions}"
    );
    let names = world.client.spread(Transport::Tcp, at(CLUSTER_IPS[0], 80)?, 40, 2)?.names;
    assert_eq!(names.keys().collect::<Vec<_>>(), ["here", "there"], "what is reached without is served");
    Ok(())
}
