//! What an application sees when it talks to a ClusterIP.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Result, ensure};
use edgemesh_tests::lab::{
    App, Attempt, Transport, errno, eventually,
    manifest::{Endpoint, Service},
    v4_mapped,
};

use crate::{ECHO, HTTP_PORT, START, TCP_PORT, UDP_PORT, WEBSOCKET_PORT, World, at};

#[test]
fn every_protocol_works_from_pod_and_host_and_the_peer_is_the_cluster_ip() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    for client in world.clients() {
        for ip in ECHO {
            let (tcp, udp) = (at(ip, TCP_PORT)?, at(ip, UDP_PORT)?);
            let (http, websocket) = (at(ip, HTTP_PORT)?, at(ip, WEBSOCKET_PORT)?);
            for (reply, target) in
                [(client.tcp(tcp)?, tcp), (client.udp(udp)?, udp), (client.websocket(websocket)?, websocket)]
            {
                ensure!(["a", "b", "c"].contains(&reply.name.as_str()), "{target} was answered by {}", reply.name);
                assert_eq!(reply.peer, target, "getpeername() of {} to {target}", client.name());
                assert_eq!(reply.client, reply.local, "nothing on the way changes the client's address");
            }
            let report = client.http(http, 5)?;
            assert_eq!(report.peer, http);
            assert!(report.replies.iter().all(|reply| reply.status == 200));
            let bodies: Vec<&str> = report.replies.iter().map(|reply| reply.body.as_str()).collect();
            assert_eq!(bodies, [bodies[0]; 5], "one connection stays with one backend");
        }
    }
    let own = world.client.ips()[0];
    assert_eq!(world.client.tcp(at(ECHO[0], TCP_PORT)?)?.client.ip(), own, "the backend sees the pod's own address");
    Ok(())
}

#[test]
fn an_ipv6_socket_with_a_v4_mapped_cluster_ip_works() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    for client in world.clients() {
        let tcp = v4_mapped(at(ECHO[0], TCP_PORT)?);
        assert_eq!(client.tcp(tcp)?.peer, tcp);
        let udp = v4_mapped(at(ECHO[0], UDP_PORT)?);
        assert_eq!(client.udp(udp)?.peer, udp);
        let replies = client.udp_fan(&[udp])?.into_iter().collect::<Result<Vec<_>, _>>()?;
        assert_eq!(replies[0].source, udp);
    }
    Ok(())
}

#[test]
fn one_unconnected_udp_socket_talks_to_many_frontends_and_each_reply_names_its_own() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    // One Service per backend, so that it is known who must answer for whom.
    for (n, (pod, node)) in world.backends.iter().enumerate() {
        let ip = format!("10.96.1.{n}");
        let service = Service::new(&format!("only-{}", pod.name()), &[&ip]).port("udp", Transport::Udp, 53, 7002);
        let text = service.yaml_with(&[Endpoint::new(pod.ips()[0], node)])?;
        world.lab.manifests().write(&format!("only-{}", pod.name()), &text)?;
    }
    let targets = [at("10.96.1.0", 53)?, at("10.96.1.1", 53)?, at("10.96.1.2", 53)?];
    eventually(START, "the new Services are served", || Ok(world.client.udp(targets[2]).is_ok()))?;
    for client in world.clients() {
        for targets in [targets, targets.map(v4_mapped)] {
            let replies = client.udp_fan(&targets)?.into_iter().collect::<Result<Vec<_>, _>>()?;
            let seen: Vec<(&str, _)> = replies.iter().map(|reply| (reply.name.as_str(), reply.source)).collect();
            assert_eq!(seen, [("a", targets[0]), ("b", targets[1]), ("c", targets[2])]);
        }
    }
    Ok(())
}

#[test]
fn datagrams_of_one_socket_stay_with_one_backend() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let target = at(ECHO[0], UDP_PORT)?;
    let mut chosen = BTreeMap::<String, u32>::new();
    for _ in 0..10 {
        let replies = world.client.udp_fan(&[target; 8])?.into_iter().collect::<Result<Vec<_>, _>>()?;
        let first = &replies[0].name;
        assert!(replies.iter().all(|reply| reply.name == *first), "{replies:?}");
        *chosen.entry(first.clone()).or_default() += 1;
    }
    assert!(chosen.len() > 1, "ten sockets all chose {chosen:?}");
    Ok(())
}

#[test]
fn a_connected_socket_that_names_its_peer_in_each_datagram_is_answered() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let target = at(ECHO[0], UDP_PORT)?;
    for target in [target, at(ECHO[1], UDP_PORT)?, v4_mapped(target)] {
        // With three backends, a new choice for each datagram would fail two of three.
        for _ in 0..10 {
            let connection = world.client.open(Transport::Udp, target)?;
            let name = connection.exchange()?.name;
            assert_eq!(connection.exchange_addressed()?.name, name);
        }
    }
    Ok(())
}

#[test]
fn a_socket_connected_anew_to_a_backend_itself_is_at_the_backend() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    world.write(&["b"])?;
    let (service, pod) = (at(ECHO[0], UDP_PORT)?, &world.backends[1].0);
    eventually(START, "only b is left", || Ok(world.client.spread(Transport::Udp, service, 20, 1)?.names.len() == 1))?;
    let direct = at(&pod.ips()[0].to_string(), 7002)?;
    let connection = world.client.open(Transport::Udp, service)?;
    assert_eq!(connection.exchange()?.peer, service);
    connection.reconnect(direct)?;
    assert_eq!(connection.exchange()?.peer, direct);
    connection.reconnect(service)?;
    assert_eq!(connection.exchange()?.peer, service);
    Ok(())
}

#[test]
fn what_cannot_be_served_is_refused_at_once_and_what_is_no_service_is_left_alone() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let empty = Service::new("empty", &["10.96.2.1", "fd00:10:96::2:1"]).port("tcp", Transport::Tcp, 80, 7001).port(
        "udp",
        Transport::Udp,
        80,
        7002,
    );
    world.lab.manifests().write("empty", &empty.yaml_with(&[])?)?;
    let refused = Attempt::Failed("ECONNREFUSED".to_owned());
    for ip in ["10.96.2.1", "fd00:10:96::2:1"] {
        let target = at(ip, 80)?;
        eventually(START, "the Service without endpoints refuses", || Ok(world.client.connect(target)? == refused))?;
        for client in world.clients() {
            assert_eq!(client.connect(target)?, refused, "TCP, no endpoints");
            assert_eq!(client.connect_udp(target)?, refused, "UDP, no endpoints");
            let sent = client.udp_fan(&[target])?;
            assert_eq!(sent[0].as_ref().unwrap_err().errno.as_deref(), Some("ECONNREFUSED"), "sendto, no endpoints");
        }
    }
    for ip in ECHO {
        let target = at(ip, 9999)?;
        for client in world.clients() {
            assert_eq!(client.connect(target)?, refused, "TCP, a port that the Service does not have");
            assert_eq!(client.connect_udp(target)?, refused, "UDP, a port that the Service does not have");
        }
    }
    // Not a Service: the kernel's own answer, whatever it is, and never a translation.
    let unknown = at("10.96.200.200", 80)?;
    let attempt = world.client.within(std::time::Duration::from_millis(300)).connect(unknown)?;
    assert!(matches!(&attempt, Attempt::Failed(errno) if errno != "ECONNREFUSED"), "{attempt:?}");
    Ok(())
}

#[test]
fn pod_addresses_and_headless_services_are_left_alone() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let (pod, node) = &world.backends[1];
    let headless = Service::new("headless", &[]).port("tcp", Transport::Tcp, 7001, 7001);
    world.lab.manifests().write("headless", &headless.yaml_with(&Endpoint::of(pod, node))?)?;
    for ip in pod.ips() {
        let direct = at(&ip.to_string(), 7001)?;
        let reply = world.client.tcp(direct)?;
        assert_eq!((reply.name.as_str(), reply.peer), ("b", direct));
    }
    Ok(())
}

#[test]
fn a_pod_reaches_itself_through_its_service() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let (pod, node) = &world.backends[0];
    let service = Service::new("itself", &["10.96.3.1"]).port("tcp", Transport::Tcp, 80, 7001);
    world.lab.manifests().write("itself", &service.yaml_with(&[Endpoint::new(pod.ips()[0], node)])?)?;
    let target = at("10.96.3.1", 80)?;
    eventually(START, "the Service is served", || Ok(pod.tcp(target).is_ok()))?;
    let reply = pod.tcp(target)?;
    assert_eq!((reply.name.as_str(), reply.peer), ("a", target));
    Ok(())
}

#[test]
fn a_large_set_of_endpoints_is_served_whole() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    // Twelve endpoints on one pod: more than a frontend holds itself, so they are in the second map.
    let (pod, node) = &world.backends[1];
    let IpAddr::V4(_) = pod.ips()[0] else { anyhow::bail!("the first address is IPv4") };
    let mut text = Service::new("large", &["10.96.4.1"]).port("tcp", Transport::Tcp, 80, 7100).yaml()?;
    for port in 7100..7112 {
        pod.serve(App::Tcp, port)?;
        let slice = Service::new("large", &["10.96.4.1"]).port("tcp", Transport::Tcp, 80, port);
        text.push_str(&slice.slice(&format!("large-{port}"), "IPv4", &[Endpoint::new(pod.ips()[0], node)])?);
    }
    world.lab.manifests().write("large", &text)?;
    let target = at("10.96.4.1", 80)?;
    eventually(START, "the large Service is served", || Ok(world.client.tcp(target).is_ok()))?;
    let spread = world.client.spread(Transport::Tcp, target, 400, 4)?;
    assert_eq!(spread.failures, BTreeMap::new());
    // Each of twelve is missed by 400 uniform choices with a probability of 10^-15.
    let output = world.edge1.cli(&["backends", "default/large", "-o", "json"])?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let endpoints = report["ports"][0]["endpoints"].as_array().map_or(&[][..], Vec::as_slice);
    assert_eq!(endpoints.len(), 12, "{report}");
    for endpoint in endpoints {
        assert!(endpoint["counts"]["connects"].as_u64() > Some(0), "{endpoint}");
    }
    Ok(())
}

#[test]
fn ten_thousand_connections_are_spread_evenly() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let target = at(ECHO[0], TCP_PORT)?;
    // A fair choice fails p > 0.001 once in a thousand runs; twice in a row, once in a million.
    let mut outcome = Vec::new();
    for _ in 0..2 {
        let spread =
            world.client.within(std::time::Duration::from_secs(120)).spread(Transport::Tcp, target, 10_000, 8)?;
        assert_eq!(spread.failures, BTreeMap::new());
        assert_eq!(spread.names.values().sum::<u64>(), 10_000);
        let expected = 10_000.0 / 3.0;
        let chi_square: f64 = ["a", "b", "c"]
            .iter()
            .map(|name| spread.names.get(*name).map_or(0.0, |count| *count as f64) - expected)
            .map(|difference| difference * difference / expected)
            .sum();
        // Two degrees of freedom: p = exp(-x / 2).
        if (-chi_square / 2.0).exp() > 0.001 {
            return Ok(());
        }
        outcome.push((chi_square, spread.names));
    }
    anyhow::bail!("not spread evenly, twice: {outcome:?}")
}

#[test]
fn the_counters_tell_what_happened() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let target = at(ECHO[0], TCP_PORT)?;
    for _ in 0..7 {
        world.client.tcp(target)?;
    }
    world.write(&[])?;
    eventually(START, "connections are refused", || {
        Ok(world.client.tcp(target).is_err_and(|error| errno(&error) == Some("ECONNREFUSED")))
    })?;
    let metrics = world.edge1.host().http_get("127.0.0.1:20008".parse()?, "/metrics", 1)?;
    let labels = r#"{namespace="default",service="echo",port="7",protocol="TCP"}"#;
    let value = |name: &str| {
        let line = metrics.replies[0].body.lines().find_map(|line| line.strip_prefix(&format!("{name}{labels} ")));
        line.and_then(|value| value.parse::<u64>().ok())
    };
    assert!(value("edgemesh_service_refused_total") >= Some(1), "{}", metrics.replies[0].body);
    // All of its backends are gone; what they counted is not.
    assert!(value("edgemesh_service_connects_total") >= Some(7), "{}", metrics.replies[0].body);
    let services = world.edge1.cli(&["services"])?;
    let text = String::from_utf8_lossy(&services.stdout);
    assert!(text.lines().any(|line| line.contains("10.96.0.10:7/TCP")), "{text}");
    Ok(())
}
