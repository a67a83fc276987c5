//! Clients outside the node: their packets reach node ports, external and load balancers' addresses.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    App, Attempt, Lab, Node, Pod, Transport,
    agent::{Agent, AgentOptions},
    eventually,
    manifest::{self, Endpoint, Service},
};
use serde_json::{Value, json};

use crate::{START, at};

const NODE_PORT: u16 = 30_080;
const EXTERNAL: [&str; 2] = ["192.0.2.10", "2001:db8::10"];
const BALANCER: [&str; 2] = ["198.51.100.10", "2001:db8:1::10"];

/// An agent on `edge1`; the backends `here` on `edge1` and `there` on `edge2`; a host `outside` in their LAN, without an
/// agent, that reaches the addresses of Services by way of `edge1`.
struct World {
    outside: Node,
    here: Pod,
    there: Pod,
    agent: Agent,
    edge1: Node,
    edge2: Node,
    lab: Lab,
}

impl World {
    fn raise(options: &AgentOptions) -> Result<Option<Self>> {
        let Some(lab) = Lab::for_test()? else { return Ok(None) };
        let lan = lab.site("lan", &["192.168.10.0/24", "fd00:192:168:10::/64"])?;
        let edge1 = lan.node("edge1", &["10.244.1.0/24", "fd00:10:244:1::/64"])?;
        let edge2 = lan.node("edge2", &["10.244.2.0/24", "fd00:10:244:2::/64"])?;
        let outside = lan.node("outside", &["10.200.0.0/24", "fd00:10:200::/64"])?;
        for ip in EXTERNAL.into_iter().chain(BALANCER) {
            let via = edge1.ips().iter().find(|via| via.is_ipv6() == ip.contains(':')).context("no address")?;
            outside.ip(&["route", "add", ip, "via", &via.to_string()])?;
        }
        let (here, there) = (edge1.pod("here")?, edge2.pod("there")?);
        for pod in [&here, &there] {
            pod.serve(App::Tcp, 7001)?;
            pod.serve(App::Udp, 7002)?;
            pod.serve(App::Http, 7003)?;
        }
        lab.manifests().write("nodes", &(manifest::node(&edge1, &[])? + &manifest::node(&edge2, &[])?))?;
        let agent = edge1.start_agent(options)?;
        agent.wait_ready(START)?;
        Ok(Some(Self { outside, here, there, agent, edge1, edge2, lab }))
    }

    /// Writes a Service with these backends, and waits until the agent serves it for the outside.
    fn write(&self, service: &Service, names: &[&str]) -> Result<()> {
        let all = [(&self.here, self.edge1.name()), (&self.there, self.edge2.name())];
        let chosen = all.into_iter().filter(|(pod, _)| names.contains(&pod.name()));
        let endpoints: Vec<Endpoint> = chosen.flat_map(|(pod, node)| Endpoint::of(pod, node)).collect();
        self.lab.manifests().write("web", &service.yaml_with(&endpoints)?)?;
        let wanted = endpoints.len() / 2;
        eventually(START, "the agent to serve the Service for the outside", || {
            let status = self.status()?;
            let attached = status["dataplane"]["interfaces"].as_array().is_some_and(|all| !all.is_empty());
            ensure!(attached, "nothing is attached: {}", status["conditions"]);
            let report = report(&self.edge1, &["backends", "default/web", "-o", "json"])?;
            let endpoints = report["ports"][0]["endpoints"].as_array().context("no endpoints")?;
            let generation = |name: &str| status["dataplane"][name].as_u64();
            Ok(endpoints.len() == 2 * wanted && generation("generation") == generation("newest_generation"))
        })
    }

    fn status(&self) -> Result<Value> {
        report(&self.edge1, &["status", "-o", "json"])
    }

    fn node_ports(&self) -> Vec<SocketAddr> {
        self.edge1.ips().iter().map(|ip| SocketAddr::new(*ip, NODE_PORT)).collect()
    }
}

fn report(node: &Node, arguments: &[&str]) -> Result<Value> {
    let output = node.cli(arguments)?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("no report: {}", String::from_utf8_lossy(&output.stderr)))
}

/// The Service `web` with the node port 30080 for TCP and UDP, 30081 for HTTP.
fn web() -> Service {
    Service::new("web", &["10.96.6.1", "fd00:10:96::6:1"])
        .port("tcp", Transport::Tcp, 80, 7001)
        .node_port(NODE_PORT)
        .port("udp", Transport::Udp, 80, 7002)
        .node_port(NODE_PORT)
        .port("http", Transport::Tcp, 81, 7003)
        .node_port(NODE_PORT + 1)
}

/// The address of `ips` of the same family as `like`.
fn same_family(ips: &[IpAddr], like: IpAddr) -> Result<IpAddr> {
    ips.iter().copied().find(|ip| ip.is_ipv4() == like.is_ipv4()).context("no address of that family")
}

#[test]
fn a_node_port_answers_the_outside_with_a_backend_on_this_node_and_its_address_is_kept() -> Result<()> {
    let Some(world) = World::raise(&AgentOptions::default())? else { return Ok(()) };
    world.write(&web(), &["here"])?;
    let client = world.outside.host();
    for target in world.node_ports() {
        for reply in [client.tcp(target)?, client.udp(target)?] {
            assert_eq!((reply.name.as_str(), reply.peer), ("here", target));
            assert_eq!(reply.client, reply.local, "nobody stands between client and backend");
        }
    }
    Ok(())
}

#[test]
fn a_node_port_answers_the_outside_with_a_backend_on_another_node() -> Result<()> {
    let Some(world) = World::raise(&AgentOptions::default())? else { return Ok(()) };
    world.write(&web(), &["there"])?;
    let client = world.outside.host();
    for target in world.node_ports() {
        for reply in [client.tcp(target)?, client.udp(target)?] {
            assert_eq!((reply.name.as_str(), reply.peer), ("there", target));
            assert_eq!(reply.client.ip(), target.ip(), "the other node answers the one that asked");
        }
    }
    Ok(())
}

#[test]
fn external_traffic_policy_local_keeps_to_this_node_and_drops_what_was_sent_to_the_wrong_one() -> Result<()> {
    let Some(world) = World::raise(&AgentOptions::default())? else { return Ok(()) };
    let service = web().spec("externalTrafficPolicy", "Local");
    world.write(&service, &["here", "there"])?;
    let client = world.outside.host();
    for target in world.node_ports() {
        let spread = client.spread(Transport::Tcp, target, 40, 4)?;
        assert_eq!((spread.failures, spread.names), (BTreeMap::new(), BTreeMap::from([("here".to_owned(), 40)])));
        assert_eq!(client.tcp(target)?.client.ip(), same_family(world.outside.ips(), target.ip())?);
    }
    world.write(&service, &["there"])?;
    let client = client.within(Duration::from_millis(300));
    for target in world.node_ports() {
        // Health-checking load balancers take silence as their sign to move on.
        let attempt = client.connect(target)?;
        assert!(matches!(&attempt, Attempt::Failed(errno) if errno != "ECONNREFUSED"), "{attempt:?}");
    }
    assert!(world.status()?["dataplane"]["dropped_packets"]["wrong_node"].as_u64() >= Some(2));
    Ok(())
}

#[test]
fn external_ips_and_load_balancers_addresses_that_no_interface_has_are_answered() -> Result<()> {
    let Some(world) = World::raise(&AgentOptions::default())? else { return Ok(()) };
    let service = web().spec("externalIPs", EXTERNAL.to_vec()).ingress(BALANCER[0], "").ingress(BALANCER[1], "VIP");
    world.write(&service, &["here", "there"])?;
    let client = world.outside.host();
    for ip in EXTERNAL.into_iter().chain(BALANCER) {
        let target = at(ip, 80)?;
        let spread = client.spread(Transport::Tcp, target, 60, 4)?;
        assert_eq!(spread.failures, BTreeMap::new(), "{target}");
        assert_eq!(spread.names.keys().collect::<Vec<_>>(), ["here", "there"], "{target}");
        assert_eq!(client.udp(target)?.peer, target);
    }
    Ok(())
}

#[test]
fn load_balancer_source_ranges_admit_at_the_load_balancers_address_alone() -> Result<()> {
    let Some(world) = World::raise(&AgentOptions::default())? else { return Ok(()) };
    let service = || web().ingress(BALANCER[0], "").ingress(BALANCER[1], "");
    let ranges = |ranges: &[&str]| service().spec("loadBalancerSourceRanges", ranges.to_vec());
    let client = world.outside.host().within(Duration::from_millis(500));
    let ips = world.outside.ips();
    let own: Vec<String> = ips.iter().map(|ip| format!("{ip}/{}", if ip.is_ipv4() { 24 } else { 64 })).collect();
    let own: Vec<&str> = own.iter().map(String::as_str).collect();
    for (ranges, admitted) in [(ranges(&["203.0.113.0/24", "2001:db8:f::/48"]), false), (ranges(&own), true)] {
        world.write(&ranges, &["here"])?;
        for ip in BALANCER {
            let target = at(ip, 80)?;
            assert_eq!(client.tcp(target).is_ok(), admitted, "TCP {target}");
            assert_eq!(client.udp(target).is_ok(), admitted, "UDP {target}");
        }
        for target in world.node_ports() {
            assert_eq!(client.tcp(target)?.name, "here", "node ports are not limited");
        }
    }
    world.write(&service(), &["here"])?;
    assert_eq!(client.tcp(at(BALANCER[0], 80)?)?.name, "here", "without ranges everybody is admitted again");
    Ok(())
}

#[test]
fn without_endpoints_the_outside_is_refused_at_once() -> Result<()> {
    let Some(world) = World::raise(&AgentOptions::default())? else { return Ok(()) };
    world.write(&web().spec("externalIPs", EXTERNAL.to_vec()), &[])?;
    let client = world.outside.host();
    let external = [at(EXTERNAL[0], 80)?, at(EXTERNAL[1], 80)?];
    for target in world.node_ports().into_iter().chain(external) {
        assert_eq!(client.connect(target)?, Attempt::Failed("ECONNREFUSED".to_owned()), "TCP {target}");
        let error = client.udp(target).expect_err("nobody is there");
        assert_eq!(edgemesh_tests::lab::errno(&error), Some("ECONNREFUSED"), "UDP {target}: {error:#}");
    }
    // A port of the node that is no Service's is the node's own affair.
    world.edge1.host().serve(App::Tcp, 9000)?;
    assert_eq!(client.tcp(SocketAddr::new(world.edge1.ips()[0], 9000))?.name, "edge1");
    Ok(())
}

#[test]
fn many_connections_at_once_carry_their_own_payloads() -> Result<()> {
    let Some(world) = World::raise(&AgentOptions::default())? else { return Ok(()) };
    world.write(&web(), &["here", "there"])?;
    let client = world.outside.host();
    for target in world.node_ports() {
        for transport in [Transport::Tcp, Transport::Udp] {
            let spread = client.within(Duration::from_secs(20)).spread(transport, target, 1000, 500)?;
            assert_eq!(spread.failures, BTreeMap::new(), "{transport:?} {target}");
            assert_eq!(spread.names.values().sum::<u64>(), 1000);
            assert_eq!(spread.names.len(), 2, "{:?}", spread.names);
        }
    }
    Ok(())
}

#[test]
fn an_agent_that_is_killed_and_comes_back_fails_no_connection_from_outside() -> Result<()> {
    for tcx in [true, false] {
        let options = AgentOptions::default().set("modules.edgeProxy.ebpf.tcx", tcx);
        let Some(world) = World::raise(&options)? else { return Ok(()) };
        world.write(&web(), &["here", "there"])?;
        let by = if tcx { "tcx" } else { "clsact" };
        assert_eq!(world.status()?["dataplane"]["interfaces"][0]["attached_by"], by);
        let target = world.node_ports()[0];
        let client = world.outside.host();
        let running = client.open(Transport::Tcp, target)?;
        let name = running.exchange()?.name;
        let hammer = client.hammer(Transport::Tcp, target, 2)?;
        world.agent.kill()?;
        for _ in 0..3 {
            let agent = world.edge1.start_agent(&options)?;
            agent.wait_ready(START)?;
            eventually(START, "the programs are attached again", || {
                let status = world.status()?;
                ensure!(status["conditions"] == json!([]), "{}", status["conditions"]);
                Ok(status["dataplane"]["interfaces"][0]["attached_by"] == by)
            })?;
            agent.kill()?;
        }
        assert_eq!(running.exchange()?.name, name);
        let report = hammer.stop()?;
        assert_eq!(report.failures, BTreeMap::new(), "{by}");
        assert_eq!(report.names.len(), 2, "{by}: {report:?}");
    }
    Ok(())
}

#[test]
fn errors_about_translated_packets_reach_the_outside() -> Result<()> {
    let Some(world) = World::raise(&AgentOptions::default())? else { return Ok(()) };
    let service = Service::new("web", &["10.96.6.1", "fd00:10:96::6:1"])
        .port("udp", Transport::Udp, 80, 7999)
        .node_port(NODE_PORT)
        .port("http", Transport::Tcp, 81, 7003)
        .node_port(NODE_PORT + 1);
    for node in [&world.edge1, &world.edge2] {
        node.ip(&["link", "set", "cni0", "mtu", "1300"])?;
    }
    let client = world.outside.host();
    for name in ["here", "there"] {
        world.write(&service, &[name])?;
        for target in world.node_ports() {
            // The pod itself says that nobody listens there.
            let error = client.udp(target).expect_err("nobody listens");
            assert_eq!(edgemesh_tests::lab::errno(&error), Some("ECONNREFUSED"), "{name} {target}: {error:#}");
            // A router says that 1300 bytes are the most: without that, the request never arrives.
            let target = SocketAddr::new(target.ip(), NODE_PORT + 1);
            let path = format!("/{}", "x".repeat(6000));
            let report = client.http_get(target, &path, 2).with_context(|| format!("{name} {target}"))?;
            assert_eq!(report.replies.len(), 2, "{name} {target}");
        }
    }
    Ok(())
}

#[test]
fn a_guest_reaches_services_and_itself_packet_by_packet() -> Result<()> {
    let options = AgentOptions::default().set("modules.edgeProxy.ebpf.guestInterfaces", vec!["tap*"]);
    let Some(world) = World::raise(&options)? else { return Ok(()) };
    // After the agent, which follows what comes and goes.
    let guest = world.edge1.guest("guest")?;
    guest.serve(App::Tcp, 7001)?;
    guest.serve(App::Udp, 7002)?;
    let ips = ["10.96.6.1", "fd00:10:96::6:1"];
    for name in ["here", "there"] {
        world.write(&web(), &[name])?;
        for ip in ips {
            let target = at(ip, 80)?;
            for reply in [guest.tcp(target)?, guest.udp(target)?] {
                assert_eq!((reply.name.as_str(), reply.peer), (name, target));
                assert_eq!(reply.client, reply.local, "the backend sees the guest itself");
            }
            let refused = Attempt::Failed("ECONNREFUSED".to_owned());
            assert_eq!(guest.connect(at(ip, 9999)?)?, refused, "a port that the Service does not have");
        }
    }
    let itself = Service::new("itself", &["10.96.7.1", "fd00:10:96::7:1"]).port("tcp", Transport::Tcp, 80, 7001).port(
        "udp",
        Transport::Udp,
        80,
        7002,
    );
    world.lab.manifests().write("itself", &itself.yaml_with(&Endpoint::of(&guest, "edge1"))?)?;
    for ip in ["10.96.7.1", "fd00:10:96::7:1"] {
        let target = at(ip, 80)?;
        eventually(START, "the guest to reach itself", || Ok(guest.tcp(target)?.name == "guest"))?;
        assert_eq!(guest.udp(target)?.name, "guest");
        assert_eq!(world.here.tcp(target)?.name, "guest", "and others reach it");
    }
    world.write(&web(), &[])?;
    for ip in ips {
        assert_eq!(guest.connect(at(ip, 80)?)?, Attempt::Failed("ECONNREFUSED".to_owned()), "no endpoints");
        let error = guest.udp(at(ip, 80)?).expect_err("no endpoints");
        assert_eq!(edgemesh_tests::lab::errno(&error), Some("ECONNREFUSED"), "{ip}: {error:#}");
    }
    Ok(())
}

#[test]
fn interfaces_come_and_go() -> Result<()> {
    let options = AgentOptions::default().set("modules.edgeProxy.ebpf.guestInterfaces", vec!["tap*"]);
    let Some(world) = World::raise(&options)? else { return Ok(()) };
    let names = || -> Result<Vec<String>> {
        let status = world.status()?;
        assert_eq!(status["conditions"], json!([]));
        let all = status["dataplane"]["interfaces"].as_array().context("no interfaces")?;
        Ok(all.iter().map(|one| format!("{} {}", one["role"], one["name"]).replace('"', "")).collect())
    };
    assert_eq!(names()?, [""; 0], "no Service is for the outside, and no guest is there");
    world.write(&web(), &["here"])?;
    assert_eq!(names()?, ["uplink eth0"]);
    let guest = world.edge1.guest("guest")?;
    let target = at("10.96.6.1", 80)?;
    eventually(START, "the guest is served", || Ok(guest.tcp(target)?.name == "here"))?;
    let tap = names()?.into_iter().find_map(|name| Some(name.strip_prefix("guest ")?.to_owned()));
    let tap = tap.context("the guest's interface is not shown")?;
    world.edge1.ip(&["link", "delete", &tap])?;
    eventually(START, "the guest's interface is forgotten", || Ok(names()? == ["uplink eth0"]))?;
    assert_eq!(world.outside.host().tcp(world.node_ports()[0])?.name, "here");
    Ok(())
}

#[test]
fn without_forwarding_the_agent_says_so() -> Result<()> {
    let Some(world) = World::raise(&AgentOptions::default())? else { return Ok(()) };
    world.edge1.sysctl("ipv4/ip_forward", "0")?;
    world.write(&web(), &["here"])?;
    let conditions = world.status()?["conditions"].to_string();
    assert!(conditions.contains("ForwardingDisabled") && conditions.contains("net.ipv4.ip_forward"), "{conditions}");
    Ok(())
}

#[test]
fn cleanup_ends_translation_for_the_outside_and_leaves_nothing_on_the_interfaces() -> Result<()> {
    for tcx in [true, false] {
        let options = AgentOptions::default().set("modules.edgeProxy.ebpf.tcx", tcx);
        let Some(world) = World::raise(&options)? else { return Ok(()) };
        let qdiscs = || world.edge1.tool("tc", &["qdisc", "show", "dev", "eth0"]);
        world.write(&web(), &["here"])?;
        assert_eq!(qdiscs()?.contains("clsact"), !tcx);
        if !tcx {
            // Somebody else's, which has come since: it must stay, and with it the qdisc.
            let other = ["filter", "add", "dev", "eth0", "ingress", "prio", "7", "bpf", "bytecode", "1,6 0 0 0,"];
            world.edge1.tool("tc", &other)?;
        }
        world.agent.kill()?;
        let target = world.node_ports()[0];
        let client = world.outside.host().within(Duration::from_millis(500));
        assert_eq!(client.tcp(target)?.name, "here", "translation goes on without the agent");
        let config = world.edge1.write_file("agent.yaml", &serde_yaml::to_string(&world.edge1.agent_config())?)?;
        let cleanup = ["cleanup", "--config-file", &config.to_string_lossy()];
        let output = world.edge1.agent(&cleanup).output(Duration::from_secs(10))?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(client.connect(target)?, Attempt::Failed("ECONNREFUSED".to_owned()), "the node's own answer");
        let filters = world.edge1.tool("tc", &["filter", "show", "dev", "eth0", "ingress"])?;
        assert!(!filters.contains("edgemesh"), "{filters}");
        assert_eq!((qdiscs()?.contains("clsact"), filters.contains("bytecode")), (!tcx, !tcx));
    }
    Ok(())
}
