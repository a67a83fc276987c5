//! Clients that are to stay with one backend.

use std::{collections::BTreeMap, net::SocketAddr, thread, time::Duration};

use anyhow::{Result, ensure};
use edgemesh_tests::lab::{
    App, Pod, Transport, eventually,
    manifest::{self, Endpoint, Service},
};
use serde_json::json;

use crate::{START, World, at};

const IP: &str = "10.96.7.1";

/// A Service of `size` endpoints on the pods `a`, `b` and `c`, with session affinity for `seconds`, on node port 30090.
fn write(world: &World, size: u16, seconds: u32) -> Result<()> {
    let service = |port| Service::new("sticky", &[IP]).port("tcp", Transport::Tcp, 80, port).node_port(30_090);
    let with_affinity = service(7500)
        .spec("sessionAffinity", "ClientIP")
        .spec("sessionAffinityConfig", json!({"clientIP": {"timeoutSeconds": seconds}}));
    let mut text = with_affinity.yaml()? + "---\n" + &manifest::node(&world.edge1, &[])?;
    for port in 7500..7500 + size.div_ceil(3) {
        let endpoints: Vec<Endpoint> =
            world.backends.iter().map(|(pod, node)| Endpoint::new(pod.ips()[0], node)).collect();
        text.push_str("---\n");
        text.push_str(&service(port).slice(&format!("sticky-{port}"), "IPv4", &endpoints)?);
    }
    world.lab.manifests().write("sticky", &text)?;
    let shown = format!("clients stay for {seconds}s");
    eventually(START, &format!("{size} endpoints, {shown}"), || {
        let output = world.edge1.cli(&["backends", "default/sticky"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let is_whole = text.lines().filter(|line| line.contains(":750")).count() == usize::from(size);
        let in_force = text.contains(&shown) && !text.contains("NOT IN FORCE");
        Ok(is_whole && in_force && world.client.tcp(at(IP, 80)?).is_ok())
    })
}

fn serve(world: &World) -> Result<()> {
    for (pod, _) in &world.backends {
        for port in 7500..7504 {
            pod.serve(App::Tcp, port)?;
        }
    }
    Ok(())
}

/// Who answers a client, and that it is always the same one.
fn one(client: &Pod, target: SocketAddr, connections: u32) -> Result<String> {
    let spread = client.spread(Transport::Tcp, target, connections, 4)?;
    assert_eq!(spread.failures, BTreeMap::new());
    ensure!(spread.names.len() == 1, "{} at {target} met {:?}", client.name(), spread.names);
    Ok(spread.names.into_keys().next().unwrap_or_default())
}

#[test]
fn session_affinity_keeps_a_client_for_its_time_out_and_no_longer() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    serve(&world)?;
    let target = at(IP, 80)?;
    // Three are in the frontend itself, twelve in a map of their own.
    for size in [3, 12] {
        write(&world, size, 3)?;
        let first = one(&world.client, target, 100)?;
        for _ in 0..3 {
            thread::sleep(Duration::from_secs(2));
            assert_eq!(one(&world.client, target, 1)?, first, "2 s of 3 have passed");
        }
        // The host is another client, and all of a Service port's frontends share what is remembered.
        let host = one(world.edge1.host(), target, 20)?;
        for ip in ["127.0.0.1".to_owned(), world.edge1.ips()[0].to_string()] {
            assert_eq!(one(world.edge1.host(), at(&ip, 30_090)?, 20)?, host, "by way of {ip}");
        }

        // A shorter time-out counts from now on, and past it any backend may be next: that it is the same one of three
        // twenty times in a row happens once in 10^9 runs.
        write(&world, size, 1)?;
        let first = one(&world.client, target, 10)?;
        let mut moved = false;
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(1_300));
            moved |= one(&world.client, target, 1)? != first;
            if moved {
                break;
            }
        }
        ensure!(moved, "a client was remembered for longer than its time-out");
    }
    Ok(())
}

#[test]
fn first_connections_at_the_same_moment_all_get_the_same_backend() -> Result<()> {
    const SERVICES: u8 = 250;
    let Some(world) = World::raise()? else { return Ok(()) };
    serve(&world)?;
    // To each the client is new.
    let mut text = manifest::node(&world.edge1, &[])?;
    let endpoints: Vec<Endpoint> = world.backends.iter().map(|(pod, node)| Endpoint::new(pod.ips()[0], node)).collect();
    for number in 1..=SERVICES {
        let service = Service::new(&format!("new-{number}"), &[&format!("10.96.8.{number}")])
            .port("tcp", Transport::Tcp, 80, 7500)
            .spec("sessionAffinity", "ClientIP");
        text.push_str("---\n");
        text.push_str(&service.yaml_with(&endpoints)?);
    }
    world.lab.manifests().write("new", &text)?;
    eventually(START, "the Services are there", || {
        let status: serde_json::Value = serde_json::from_slice(&world.edge1.cli(&["status", "-o", "json"])?.stdout)?;
        let settled = status["dataplane"]["generation"] == status["dataplane"]["newest_generation"];
        Ok(settled && status["frontends"].as_u64() >= Some(SERVICES.into()))
    })?;
    for number in 1..=SERVICES {
        let spread = world.client.spread(Transport::Tcp, at(&format!("10.96.8.{number}"), 80)?, 8, 8)?;
        assert_eq!(spread.failures, BTreeMap::new());
        ensure!(spread.names.len() == 1, "new-{number}: the client met {:?}", spread.names);
    }
    Ok(())
}

#[test]
fn session_affinity_outlives_the_agent_and_ends_with_the_backend() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    serve(&world)?;
    let target = at(IP, 80)?;
    write(&world, 12, 600)?;
    let first = one(&world.client, target, 20)?;
    world.agents[0].kill()?;
    assert_eq!(one(&world.client, target, 20)?, first);
    let again = world.edge1.start_agent(&edgemesh_tests::lab::agent::AgentOptions::default())?;
    again.wait_ready(START)?;
    assert_eq!(one(&world.client, target, 20)?, first);
    // From twelve to three: its backend may be gone, but whichever is next is kept.
    write(&world, 3, 600)?;
    let next = one(&world.client, target, 20)?;
    assert_eq!(one(&world.client, target, 20)?, next);
    Ok(())
}

#[test]
fn node_ports_answer_on_127_0_0_1_for_the_host_and_not_for_pods() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    serve(&world)?;
    write(&world, 3, 600)?;
    let target = at("127.0.0.1", 30_090)?;
    let reply = world.edge1.host().tcp(target)?;
    assert_eq!(reply.peer, target, "getpeername() shows the node port");
    assert!(["a", "b", "c"].contains(&reply.name.as_str()));
    assert!(world.client.tcp(target).is_err(), "a pod's 127.0.0.1 is its own");
    let own = world.client.serve_at(App::Tcp, target)?;
    assert_eq!(world.client.tcp(own)?.name, "client");
    Ok(())
}
