//! What else a Service answers on, and which of its endpoints clients are sent to.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    App, Attempt, Pod, Transport, eventually,
    manifest::{self, Endpoint, Service},
};
use serde_json::Value;

use crate::{START, World, at};

const ZONE: &str = "topology.kubernetes.io/zone";
const GROUP: &str = "apps.kubeedge.io/belonging-to";
const IP: &str = "10.96.5.1";
const IPS: [&str; 2] = [IP, "fd00:10:96::5:1"];

/// Writes the Node objects of both nodes.
fn write_nodes(world: &World, edge1: &[(&str, &str)], edge2: &[(&str, &str)]) -> Result<()> {
    let text = manifest::node(&world.edge1, edge1)? + &manifest::node(&world.edge2, edge2)?;
    world.lab.manifests().write("nodes", &text)
}

/// A Service `policy` for TCP and UDP, with node port 30080.
fn policy() -> Service {
    Service::new("policy", &IPS)
        .port("tcp", Transport::Tcp, 80, 7001)
        .node_port(30_080)
        .port("udp", Transport::Udp, 80, 7002)
        .node_port(30_080)
}

/// The endpoints of these backends, each changed as `change` says.
fn endpoints(world: &World, names: &[&str], change: impl Fn(&str, Endpoint) -> Endpoint) -> Vec<Endpoint> {
    let chosen = world.backends.iter().filter(|(pod, _)| names.contains(&pod.name()));
    chosen
        .flat_map(|(pod, node)| Endpoint::of(pod, node).into_iter().map(|endpoint| change(pod.name(), endpoint)))
        .collect()
}

fn write(world: &World, service: &Service, endpoints: &[Endpoint]) -> Result<()> {
    world.lab.manifests().write("policy", &service.yaml_with(endpoints)?)
}

/// Waits until the agent on `edge1` says that exactly these backends of the port `tcp` are eligible for IPv4.
fn wait_for_eligible(world: &World, names: &[&str]) -> Result<()> {
    let pods = || world.backends.iter().filter(|(pod, _)| names.contains(&pod.name()));
    let wanted: BTreeSet<String> = pods().map(|(pod, _)| format!("{}:7001", pod.ips()[0])).collect();
    eventually(START, &format!("{names:?} to be the eligible backends"), || {
        let report = report(world)?;
        let frontends = report["service"]["frontends"].as_array().context("no frontends")?;
        let in_force = |frontend: &Value| frontend["in_force"] == true;
        let eligible = eligible(&report)?.into_iter().filter(|address| !address.starts_with('['));
        let all_in_force = !frontends.is_empty() && frontends.iter().all(in_force);
        Ok(all_in_force && eligible.collect::<BTreeSet<_>>() == wanted)
    })
}

fn report(world: &World) -> Result<Value> {
    let output = world.edge1.cli(&["backends", "default/policy", "-o", "json"])?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("no report: {}", String::from_utf8_lossy(&output.stderr)))
}

fn eligible(report: &Value) -> Result<BTreeSet<String>> {
    let endpoints = report["ports"][0]["endpoints"].as_array().context("no endpoints")?;
    let eligible = endpoints.iter().filter(|endpoint| endpoint["eligible"] == true);
    Ok(eligible.filter_map(|endpoint| endpoint["address"].as_str().map(str::to_owned)).collect())
}

/// Why each endpoint of the port `tcp` is eligible or not, without repetitions.
fn reasons(world: &World) -> Result<BTreeSet<String>> {
    let report = report(world)?;
    let endpoints = report["ports"][0]["endpoints"].as_array().context("no endpoints")?;
    Ok(endpoints.iter().filter_map(|endpoint| endpoint["reason"].as_str().map(str::to_owned)).collect())
}

/// Who answers 60 connections: of three equal backends each is missed with a probability of 10^-10.
fn answers(client: &Pod, target: SocketAddr) -> Result<Vec<String>> {
    let spread = client.within(Duration::from_secs(30)).spread(Transport::Tcp, target, 60, 4)?;
    ensure!(spread.failures.is_empty(), "{target}: {:?}", spread.failures);
    Ok(spread.names.into_keys().collect())
}

/// The agent on `edge2`, for which nobody waits, sees to it that these backends answer its host.
fn answers_on_edge2(world: &World, names: &[&str]) -> Result<()> {
    eventually(START, &format!("{names:?} to answer on edge2"), || {
        Ok(answers(world.edge2.host(), at(IP, 80)?)? == names)
    })
}

#[test]
fn a_node_port_answers_pods_and_the_host_on_the_addresses_of_their_node() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    write_nodes(&world, &[], &[])?;
    write(&world, &policy(), &endpoints(&world, &["a", "b", "c"], |_, endpoint| endpoint))?;
    wait_for_eligible(&world, &["a", "b", "c"])?;
    // Something else on the node, which is none of the Service's business.
    world.edge1.host().serve(App::Tcp, 9000)?;
    for client in world.clients() {
        for ip in world.edge1.ips() {
            let target = at(&ip.to_string(), 30_080)?;
            let (tcp, udp) = (client.tcp(target)?, client.udp(target)?);
            assert_eq!((tcp.peer, udp.peer), (target, target), "getpeername() of {}", client.name());
            assert_eq!(answers(client, target)?, ["a", "b", "c"], "{target} from {}", client.name());
            assert_eq!(client.tcp(at(&ip.to_string(), 9000)?)?.name, "edge1");
        }
        assert_eq!(client.tcp(at(IP, 80)?)?.peer, at(IP, 80)?, "the ClusterIP answers too");
    }
    // What a pod says to itself is not for the node.
    let loopback = world.client.serve_at(App::Tcp, at("127.0.0.1", 30_080)?)?;
    assert_eq!(world.client.tcp(loopback)?.name, "client");
    // The node port is gone with its Service; the node is not.
    world.lab.manifests().remove("policy")?;
    let target = at(&world.edge1.ips()[0].to_string(), 30_080)?;
    eventually(START, "the node port is gone", || {
        Ok(world.client.connect(target)? == Attempt::Failed("ECONNREFUSED".to_owned()))
    })?;
    assert_eq!(world.client.tcp(at(&world.edge1.ips()[0].to_string(), 9000)?)?.name, "edge1");
    Ok(())
}

#[test]
fn external_ips_and_load_balancers_addresses_answer_on_the_ports_of_the_service_alone() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let service = policy()
        .spec("externalIPs", vec!["192.0.2.10", "2001:db8::10"])
        .ingress("198.51.100.10", "")
        .ingress("198.51.100.11", "VIP")
        .ingress("198.51.100.12", "Proxy");
    write(&world, &service, &endpoints(&world, &["a", "b", "c"], |_, endpoint| endpoint))?;
    wait_for_eligible(&world, &["a", "b", "c"])?;
    for client in world.clients() {
        for ip in ["192.0.2.10", "2001:db8::10", "198.51.100.10", "198.51.100.11"] {
            let target = at(ip, 80)?;
            assert_eq!(client.tcp(target)?.peer, target);
            assert_eq!(client.udp(target)?.peer, target);
            assert_eq!(answers(client, target)?, ["a", "b", "c"], "{target} from {}", client.name());
        }
        let client = client.within(Duration::from_millis(300));
        // Whatever is there is reached, or not, as if there were no Service: only a ClusterIP refuses.
        for target in [at("192.0.2.10", 81)?, at("198.51.100.10", 81)?, at("198.51.100.12", 80)?] {
            let attempt = client.connect(target)?;
            assert!(matches!(&attempt, Attempt::Failed(errno) if errno != "ECONNREFUSED"), "{target}: {attempt:?}");
        }
        assert_eq!(client.connect(at(IP, 81)?)?, Attempt::Failed("ECONNREFUSED".to_owned()));
    }
    Ok(())
}

#[test]
fn internal_traffic_policy_local_never_leaves_the_node() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    write_nodes(&world, &[], &[])?;
    let service = policy().spec("internalTrafficPolicy", "Local");
    write(&world, &service, &endpoints(&world, &["a", "b", "c"], |_, endpoint| endpoint))?;
    wait_for_eligible(&world, &["a"])?;
    let node_port = at(&world.edge1.ips()[0].to_string(), 30_080)?;
    for client in world.clients() {
        for ip in IPS {
            assert_eq!(answers(client, at(ip, 80)?)?, ["a"]);
        }
        assert_eq!(answers(client, node_port)?, ["a", "b", "c"], "the policy is that of ClusterIPs");
    }
    answers_on_edge2(&world, &["b", "c"])?;
    assert_eq!(
        reasons(&world)?,
        BTreeSet::from(["ready".to_owned(), "not on this node, and the traffic policy is Local".to_owned()])
    );
    write(&world, &service, &endpoints(&world, &["b", "c"], |_, endpoint| endpoint))?;
    wait_for_eligible(&world, &[])?;
    for client in world.clients() {
        assert_eq!(client.connect(at(IP, 80)?)?, Attempt::Failed("ECONNREFUSED".to_owned()));
        assert_eq!(client.connect_udp(at(IP, 80)?)?, Attempt::Failed("ECONNREFUSED".to_owned()));
    }
    Ok(())
}

#[test]
fn external_traffic_policy_local_does_not_concern_clients_in_the_cluster() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    write_nodes(&world, &[], &[])?;
    let service = policy().spec("externalTrafficPolicy", "Local").spec("externalIPs", vec!["192.0.2.10"]);
    write(&world, &service, &endpoints(&world, &["b", "c"], |_, endpoint| endpoint))?;
    wait_for_eligible(&world, &["b", "c"])?;
    for client in world.clients() {
        for target in [at(&world.edge1.ips()[0].to_string(), 30_080)?, at("192.0.2.10", 80)?] {
            assert_eq!(answers(client, target)?, ["b", "c"], "{target} from {}", client.name());
        }
    }
    let report = report(&world)?;
    let frontend = |kind: &str| {
        let frontends = report["service"]["frontends"].as_array().map_or(&[][..], Vec::as_slice);
        let found = frontends.iter().find(|frontend| frontend["kind"] == kind);
        found.map(|frontend| (frontend["backends"].clone(), frontend["external_backends"].clone()))
    };
    assert_eq!(frontend("ClusterIP"), Some((2.into(), 2.into())), "{report}");
    assert_eq!(frontend("NodePort"), Some((2.into(), 0.into())), "none for packets from outside: {report}");
    Ok(())
}

#[test]
fn hints_keep_clients_in_their_zone_while_it_has_endpoints() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    write_nodes(&world, &[(ZONE, "west")], &[(ZONE, "east")])?;
    let hint = |name: &str, endpoint: Endpoint| {
        let zone = if name == "c" { "east" } else { "west" };
        let hints = serde_json::json!({ "forZones": [{ "name": zone }] });
        endpoint.field("zone", zone).field("hints", hints)
    };
    write(&world, &policy(), &endpoints(&world, &["a", "b", "c"], hint))?;
    wait_for_eligible(&world, &["a", "b"])?;
    for client in world.clients() {
        assert_eq!(answers(client, at(IP, 80)?)?, ["a", "b"]);
    }
    answers_on_edge2(&world, &["c"])?;
    // The node moves.
    write_nodes(&world, &[(ZONE, "east")], &[(ZONE, "east")])?;
    wait_for_eligible(&world, &["c"])?;
    assert_eq!(answers(&world.client, at(IP, 80)?)?, ["c"]);
    // Nothing is left in its zone.
    write(&world, &policy(), &endpoints(&world, &["a", "b"], hint))?;
    wait_for_eligible(&world, &["a", "b"])?;
    assert_eq!(answers(&world.client, at(IP, 80)?)?, ["a", "b"]);
    // One endpoint without a hint, and they count for nothing.
    let all_but_a = |name: &str, endpoint: Endpoint| if name == "a" { endpoint } else { hint(name, endpoint) };
    write(&world, &policy(), &endpoints(&world, &["a", "b", "c"], all_but_a))?;
    wait_for_eligible(&world, &["a", "b", "c"])?;
    assert_eq!(answers(&world.client, at(IP, 80)?)?, ["a", "b", "c"]);
    Ok(())
}

#[test]
fn a_traffic_distribution_is_followed_where_nobody_wrote_hints() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    write_nodes(&world, &[(ZONE, "west")], &[(ZONE, "west")])?;
    let near = policy().spec("trafficDistribution", "PreferSameNode");
    write(&world, &near, &endpoints(&world, &["a", "b", "c"], |_, endpoint| endpoint))?;
    wait_for_eligible(&world, &["a"])?;
    assert_eq!(answers(&world.client, at(IP, 80)?)?, ["a"]);
    answers_on_edge2(&world, &["b", "c"])?;
    write(&world, &near, &endpoints(&world, &["b", "c"], |_, endpoint| endpoint))?;
    wait_for_eligible(&world, &["b", "c"])?;
    assert_eq!(answers(&world.client, at(IP, 80)?)?, ["b", "c"], "a preference is no limit");
    Ok(())
}

#[test]
fn a_node_group_is_a_limit_and_nodes_without_one_are_no_group() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    write_nodes(&world, &[(GROUP, "west")], &[(GROUP, "east")])?;
    let service = policy().annotation("apps.kubeedge.io/service-topology", "range-nodegroup");
    write(&world, &service, &endpoints(&world, &["a", "b", "c"], |_, endpoint| endpoint))?;
    wait_for_eligible(&world, &["a"])?;
    for client in world.clients() {
        assert_eq!(answers(client, at(IP, 80)?)?, ["a"]);
        assert_eq!(answers(client, at(&world.edge1.ips()[0].to_string(), 30_080)?)?, ["a"], "it limits everything");
    }
    answers_on_edge2(&world, &["b", "c"])?;
    // The other node joins the group.
    write_nodes(&world, &[(GROUP, "west")], &[(GROUP, "west")])?;
    wait_for_eligible(&world, &["a", "b", "c"])?;
    assert_eq!(answers(&world.client, at(IP, 80)?)?, ["a", "b", "c"]);
    // Both leave it.
    write_nodes(&world, &[], &[])?;
    wait_for_eligible(&world, &["a"])?;
    assert_eq!(answers(&world.client, at(IP, 80)?)?, ["a"]);
    // A limit, not a preference.
    write(&world, &service, &endpoints(&world, &["b", "c"], |_, endpoint| endpoint))?;
    wait_for_eligible(&world, &[])?;
    assert_eq!(world.client.connect(at(IP, 80)?)?, Attempt::Failed("ECONNREFUSED".to_owned()));
    Ok(())
}

#[test]
fn topology_keys_limit_to_nodes_with_a_label_in_common() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    write_nodes(&world, &[("site", "x"), ("rack", "1")], &[("site", "y"), ("rack", "1")])?;
    let keyed = |keys: &str| policy().annotation("topologyKeys", keys);
    let all = endpoints(&world, &["a", "b", "c"], |_, endpoint| endpoint);
    for (keys, expected) in [
        (r#"["site"]"#, &["a"][..]),
        (r#"["site", "rack"]"#, &["a", "b", "c"]),
        (r#"["other"]"#, &[]),
        (r#"["other", "*"]"#, &["a", "b", "c"]),
    ] {
        write(&world, &keyed(keys), &all)?;
        wait_for_eligible(&world, expected)?;
        if expected.is_empty() {
            assert_eq!(world.client.connect(at(IP, 80)?)?, Attempt::Failed("ECONNREFUSED".to_owned()), "{keys}");
        } else {
            assert_eq!(answers(&world.client, at(IP, 80)?)?, expected, "{keys}");
        }
    }
    Ok(())
}

#[test]
fn without_node_objects_limits_do_not_hold_and_the_agent_says_so() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let service = policy().annotation("apps.kubeedge.io/service-topology", "range-nodegroup");
    write(&world, &service, &endpoints(&world, &["a", "b", "c"], |_, endpoint| endpoint))?;
    wait_for_eligible(&world, &["a", "b", "c"])?;
    assert_eq!(answers(&world.client, at(IP, 80)?)?, ["a", "b", "c"]);
    let conditions = || -> Result<Vec<String>> {
        let output = world.edge1.cli(&["status", "-o", "json"])?;
        let status: Value = serde_json::from_slice(&output.stdout)?;
        let list = status["conditions"].as_array().context("no conditions")?;
        Ok(list.iter().map(|c| format!("{} {}", c["reason"], c["subject"]).replace('"', "")).collect())
    };
    assert_eq!(conditions()?, ["NodeUnknown edge1"]);
    write_nodes(&world, &[(GROUP, "west")], &[])?;
    wait_for_eligible(&world, &["a"])?;
    assert_eq!(conditions()?, Vec::<String>::new());
    Ok(())
}
