//! DestinationRules: those that are followed, and those that ask for what this data plane cannot do.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    App, Pod, Transport,
    agent::AgentOptions,
    eventually,
    manifest::{Endpoint, Service},
};
use serde_json::{Value, json};

use crate::{ECHO, START, TCP_PORT, World, at};

const IP: &str = "10.96.8.1";

/// Writes a rule `default/NAME` into a file of its own.
fn write_rule(world: &World, name: &str, version: &str, spec: &Value) -> Result<()> {
    let rule = json!({
        "apiVersion": format!("networking.istio.io/{version}"), "kind": "DestinationRule",
        "metadata": { "name": name, "namespace": "default" }, "spec": spec,
    });
    // JSON is YAML, too.
    world.lab.manifests().write(&format!("rule-{name}"), &rule.to_string())
}

fn by_source_ip(host: &str) -> Value {
    json!({"host": host, "trafficPolicy": {"loadBalancer": {"consistentHash": {"useSourceIp": true}}}})
}

fn report(world: &World, service: &str) -> Result<Value> {
    let output = world.edge1.cli(&["backends", &format!("default/{service}"), "-o", "json"])?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("no report: {}", String::from_utf8_lossy(&output.stderr)))
}

/// Waits until the agent on `edge1` has this rule and balance in force for all of a Service's frontends.
fn wait_for_balance(world: &World, service: &str, rule: Option<&str>, balance: &str) -> Result<()> {
    let newest = |status: &Value| status["dataplane"]["generation"] == status["dataplane"]["newest_generation"];
    eventually(START, &format!("{rule:?} to balance {service} by {balance}"), || {
        let report = report(world, service)?;
        let frontends = report["service"]["frontends"].as_array().context("no frontends")?;
        let settled = frontends.iter().all(|f| f["balance"] == balance && f["in_force"] == true);
        Ok(settled && report["service"]["destination_rule"] == json!(rule) && newest(&status(world)?))
    })
}

fn status(world: &World) -> Result<Value> {
    let output = world.edge1.cli(&["status", "-o", "json"])?;
    serde_json::from_slice(&output.stdout).context("no status")
}

fn conditions(world: &World) -> Result<BTreeMap<String, String>> {
    let status = status(world)?;
    let list = status["conditions"].as_array().context("no conditions")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(list.iter().map(|c| (format!("{} {}", text(&c["reason"]), text(&c["subject"])), text(&c["message"]))).collect())
}

/// Who answers 60 connections to `echo`: of three equal backends each is missed with a probability of 10^-10.
fn answers(client: &Pod) -> Result<Vec<String>> {
    let spread = client.within(START).spread(Transport::Tcp, at(ECHO[0], TCP_PORT)?, 60, 4)?;
    ensure!(spread.failures.is_empty(), "{:?}", spread.failures);
    Ok(spread.names.into_keys().collect())
}

/// The endpoints of a Service that have got connections of clients on `edge1`, with how many.
fn connected(world: &World, service: &str) -> Result<BTreeMap<String, u64>> {
    let report = report(world, service)?;
    let endpoints = report["ports"][0]["endpoints"].as_array().context("no endpoints")?;
    let counts = endpoints.iter().filter_map(|endpoint| {
        let count = endpoint["counts"]["connects"].as_u64().filter(|&count| count > 0)?;
        Some((endpoint["address"].as_str()?.to_owned(), count))
    });
    Ok(counts.collect())
}

/// How much of `now` came after `before`.
fn since(before: &BTreeMap<String, u64>, now: BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let more = now.into_iter().map(|(address, count)| {
        let known = before.get(&address).copied().unwrap_or(0);
        (address, count.saturating_sub(known))
    });
    more.filter(|(_, count)| *count > 0).collect()
}

#[test]
fn a_rule_comes_and_goes_while_connections_run_and_none_fails() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let hammer = world.client.hammer(Transport::Tcp, at(ECHO[0], TCP_PORT)?, 2)?;
    // Each version, and each way of naming the Service.
    for (name, version, host) in [
        ("sticky", "v1alpha3", "echo"),
        ("sticky", "v1beta1", "echo.default.svc.cluster.local"),
        ("echo", "v1", "somewhere.example.com"),
    ] {
        write_rule(&world, name, version, &by_source_ip(host))?;
        wait_for_balance(&world, "echo", Some(&format!("default/{name}")), "source-ip")?;
        for client in world.clients() {
            assert_eq!(answers(client)?.len(), 1, "{} by {name} for {host}", client.name());
        }
        let text = String::from_utf8_lossy(&world.edge1.cli(&["backends", "default/echo"])?.stdout).into_owned();
        let (rule, balance) = (format!("balanced by DestinationRule default/{name}\n"), "balance: source-ip");
        assert!(text.contains(&rule) && text.contains(balance), "{text}");

        world.lab.manifests().remove(&format!("rule-{name}"))?;
        wait_for_balance(&world, "echo", None, "random")?;
        assert_eq!(answers(&world.client)?, ["a", "b", "c"]);
    }
    // One port keeps the default.
    let mut spec = by_source_ip("echo");
    spec["trafficPolicy"]["portLevelSettings"] = json!([{"port": {"number": 80}}]);
    write_rule(&world, "sticky", "v1", &spec)?;
    eventually(START, "the rule to count for all ports but one", || {
        let report = report(&world, "echo")?;
        let frontends = report["service"]["frontends"].as_array().context("no frontends")?.iter();
        let wanted = |f: &Value| match f["address"].as_str() {
            Some(address) if address.contains(":80/") => f["balance"] == "random",
            _ => f["balance"] == "source-ip",
        };
        Ok(frontends.clone().count() == 8 && frontends.clone().all(wanted))
    })?;
    let report = hammer.stop()?;
    assert_eq!(report.failures, BTreeMap::new());
    assert_eq!(conditions(&world)?, BTreeMap::new());
    Ok(())
}

#[test]
fn rules_that_ask_for_what_is_not_supported_are_told_of_and_hurt_nobody() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let hammer = world.client.hammer(Transport::Tcp, at(ECHO[0], TCP_PORT)?, 1)?;
    let balanced = |policy: Value| json!({"host": "echo", "trafficPolicy": {"loadBalancer": policy}});
    let unsupported = "DestinationRuleUnsupported default/echo";
    let invalid = "ManifestInvalid rule-echo.yaml";
    // What makes EdgeMesh (Go) crash, what needs a proxy, and what is nothing at all.
    for (spec, condition) in [
        (balanced(json!({"simple": "LEAST_CONN"})), None),
        (balanced(json!({"simple": "PASSTHROUGH"})), None),
        (json!({"host": "echo", "subsets": [{"name": "v1", "labels": {"version": "v1"}}]}), None),
        (Value::Null, None),
        (balanced(json!({"consistentHash": {"httpHeaderName": "x-user"}})), Some((unsupported, "HTTP proxy"))),
        (balanced(json!({"consistentHash": {"httpCookie": {"name": "user"}}})), Some((unsupported, "httpCookie"))),
        (balanced(json!({"simple": "FASTEST"})), Some((unsupported, "FASTEST"))),
        (
            json!({"host": "echo", "trafficPolicy": {"tls": {"mode": "SIMPLE"}}}),
            Some((unsupported, "trafficPolicy.tls")),
        ),
        (json!([1, 2]), Some((invalid, "spec: a list is wrong"))),
        (balanced(json!({"consistentHash": {"useSourceIp": "yes"}})), Some((invalid, "useSourceIp"))),
        (json!({"host": 7, "trafficPolicy": {"portLevelSettings": [7]}}), Some((invalid, "spec.host"))),
    ] {
        // From something that counts, so that there is a change to wait for.
        write_rule(&world, "echo", "v1", &by_source_ip("echo"))?;
        wait_for_balance(&world, "echo", Some("default/echo"), "source-ip")?;
        write_rule(&world, "echo", "v1", &spec)?;
        wait_for_balance(&world, "echo", Some("default/echo"), "random")?;
        assert_eq!(answers(&world.client)?, ["a", "b", "c"], "{spec}");
        eventually(START, &format!("{condition:?} for {spec}"), || {
            let conditions = conditions(&world)?;
            Ok(match condition {
                None => conditions.is_empty(),
                Some((key, part)) => {
                    conditions.len() == 1 && conditions.get(key).is_some_and(|message| message.contains(part))
                }
            })
        })?;
        if condition.is_some_and(|(key, _)| key == unsupported) {
            let notes = report(&world, "echo")?["service"]["notes"].to_string();
            assert!(notes.contains("of DestinationRule default/echo these have no effect: spec."), "{notes}");
        }
    }
    world.lab.manifests().remove("rule-echo")?;
    eventually(START, "everything is forgotten with the rule", || Ok(conditions(&world)?.is_empty()))?;
    assert_eq!(hammer.stop()?.failures, BTreeMap::new());
    for agent in &world.agents {
        assert!(agent.ended()?.is_none() && !agent.log()?.contains("panicked"));
    }
    Ok(())
}

/// The Service `sticky` with endpoints on these ports of these pods, a slice for each port; waits until the agent knows.
fn write_sticky(world: &World, ports: &[u16], pods: &[&str]) -> Result<()> {
    let service = |port| Service::new("sticky", &[IP]).port("tcp", Transport::Tcp, 80, port);
    let mut text = service(7500).yaml()?;
    for &port in ports {
        let chosen = world.backends.iter().filter(|(pod, _)| pods.contains(&pod.name()));
        let endpoints: Vec<Endpoint> = chosen.map(|(pod, node)| Endpoint::new(pod.ips()[0], node)).collect();
        text.push_str("---\n");
        text.push_str(&service(port).slice(&format!("sticky-{port}"), "IPv4", &endpoints)?);
    }
    world.lab.manifests().write("sticky", &text)?;
    let size = ports.len() * pods.len();
    eventually(START, &format!("{size} endpoints"), || {
        let report = report(world, "sticky")?;
        Ok(report["ports"][0]["endpoints"].as_array().is_some_and(|endpoints| endpoints.len() == size))
    })
}

/// The client reaches this pod, and no other.
fn stays(world: &World, pod: &str) -> Result<()> {
    let spread = world.client.within(START).spread(Transport::Tcp, at(IP, 80)?, 20, 4)?;
    assert_eq!(spread.failures, BTreeMap::new(), "of {:?}", spread.names);
    assert_eq!(spread.names.into_keys().collect::<Vec<_>>(), [pod]);
    Ok(())
}

#[test]
fn consistent_hash_by_source_ip_keeps_a_client_on_one_backend_over_a_thousand_connections() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    for (pod, _) in &world.backends {
        for port in 7500..7504 {
            pod.serve(App::Tcp, port)?;
        }
    }
    let target = at(IP, 80)?;
    write_rule(&world, "sticky", "v1", &by_source_ip("sticky.default"))?;
    // Three are in the frontend itself, twelve in a map of their own.
    for ports in [&[7500][..], &[7500, 7501, 7502, 7503]] {
        write_sticky(&world, ports, &["a", "b", "c"])?;
        wait_for_balance(&world, "sticky", Some("default/sticky"), "source-ip")?;
        let before = connected(&world, "sticky")?;
        let client = world.client.within(Duration::from_secs(60));
        let spread = client.spread(Transport::Tcp, target, 1000, 8)?;
        assert_eq!(spread.failures, BTreeMap::new());
        let more = since(&before, connected(&world, "sticky")?);
        assert_eq!(more.values().copied().collect::<Vec<_>>(), [1000], "of {} endpoints: {more:?}", 3 * ports.len());
    }
    let first = world.client.tcp(target)?.name;
    let before = connected(&world, "sticky")?;
    for n in 0..6 {
        let pod = world.edge1.pod(&format!("client{n}"))?;
        let spread = pod.spread(Transport::Tcp, target, 20, 4)?;
        assert_eq!((spread.failures, spread.names.len()), (BTreeMap::new(), 1), "each stays with its own");
    }
    // That six choose the same of twelve happens once in 250,000 runs.
    let more = since(&before, connected(&world, "sticky")?);
    ensure!(more.len() > 1, "six pods all met the same of twelve endpoints: {more:?}");

    // Neither a new agent nor endpoints of others that go move a client.
    world.agents[0].kill()?;
    stays(&world, &first)?;
    let again = world.edge1.start_agent(&AgentOptions::default())?;
    again.wait_ready(START)?;
    write_sticky(&world, &[7500, 7501, 7502, 7503], &[&first])?;
    wait_for_balance(&world, "sticky", Some("default/sticky"), "source-ip")?;
    stays(&world, &first)?;
    Ok(())
}
