//! What the agent tells of connections: `trace`, counters, `events`.

use std::{process::Output, time::Duration};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    Attempt, Transport,
    agent::AgentOptions,
    eventually,
    manifest::{Endpoint, Service},
};
use serde_json::{Value, json};

use crate::{ECHO, START, TCP_PORT, UDP_PORT, World, at};

/// Exit codes of `trace`, by docs/operations.md.
const FORWARDED: i32 = 0;
const NOT_FORWARDED: i32 = 68;

/// Runs `trace` on `edge1`, and gives its exit code and its answer.
fn trace(world: &World, arguments: &[&str]) -> Result<(i32, Value)> {
    let mut all = vec!["trace", "-o", "json"];
    all.extend(arguments);
    let output = world.edge1.cli(&all)?;
    let report =
        serde_json::from_slice(&output.stdout).with_context(|| format!("no report: {}", complaint(&output)))?;
    Ok((output.status.code().context("killed")?, report))
}

fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until the kernel of `edge1` holds what it should of a target.
fn in_force(world: &World, target: &str) -> Result<Value> {
    let mut last = Value::Null;
    eventually(START, &format!("{target} to be in force"), || {
        (_, last) = trace(world, &[target])?;
        Ok(!last["frontend"].is_null() && last["kernel"]["state"] == "same")
    })?;
    Ok(last)
}

fn column(report: &Value, column: &str) -> Vec<Value> {
    report["endpoints"]
        .as_array()
        .map_or_else(Vec::new, |all| all.iter().map(|endpoint| endpoint[column].clone()).collect())
}

#[test]
fn trace_tells_a_frontend_with_its_endpoints_and_what_a_connect_gets() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    for ip in ECHO {
        let target = at(ip, TCP_PORT)?;
        let (code, report) = trace(&world, &[&target.to_string()])?;
        assert_eq!(code, FORWARDED, "{report}");
        assert_eq!(report["address"], format!("{target}/TCP"));
        assert_eq!((&report["outcome"], &report["kernel"]["state"]), (&json!("forwarded"), &json!("same")), "{report}");
        assert_eq!(report["frontend"]["service"], "echo");
        let own = report["endpoints"].as_array().context("no endpoints")?;
        let own: Vec<_> = own.iter().filter(|endpoint| endpoint["eligible"] == true).collect();
        assert_eq!(own.len(), 3, "{report}");
        for endpoint in own {
            assert_eq!(endpoint["in_kernel"], true, "{report}");
            assert!(endpoint["chance"].as_f64().is_some_and(|chance| (chance - 1.0 / 3.0).abs() < 1e-9), "{report}");
        }
    }
    // As people type it, and for UDP where that is all there is.
    let (code, report) = trace(&world, &[&format!("default/echo:{UDP_PORT}/udp")])?;
    assert_eq!((code, &report["address"]), (FORWARDED, &json!(format!("{}:{UDP_PORT}/UDP", ECHO[0]))));
    let (code, report) = trace(&world, &[&format!("[::ffff:{}]:{TCP_PORT}", ECHO[0])])?;
    assert_eq!((code, &report["address"]), (FORWARDED, &json!(format!("{}:{TCP_PORT}/TCP", ECHO[0]))));

    let shown = world.edge1.cli(&["trace", &format!("{}:{TCP_PORT}", ECHO[0])])?;
    let text = String::from_utf8_lossy(&shown.stdout);
    for part in ["is a ClusterIP frontend of default/echo, port 7 'tcp'", "has the same set in force", "chance of 1/3"]
    {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    let ambiguous = world.edge1.cli(&["trace", "default/echo"])?;
    assert_eq!(ambiguous.status.code(), Some(64));
    assert!(complaint(&ambiguous).contains("default/echo:80/TCP"), "{}", complaint(&ambiguous));
    let unknown = world.edge1.cli(&["trace", "default/nothing"])?;
    assert_eq!(unknown.status.code(), Some(69));
    Ok(())
}

#[test]
fn trace_tells_what_is_refused_from_what_is_left_alone() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let (code, report) = trace(&world, &[&format!("{}:9999", ECHO[0])])?;
    assert_eq!(
        (code, &report["outcome"], &report["kernel"]["state"]),
        (NOT_FORWARDED, &json!("refused"), &json!("same"))
    );
    assert!(report["answer"].as_str().is_some_and(|answer| answer.contains("default/echo")), "{report}");
    let refused = Attempt::Failed("ECONNREFUSED".to_owned());
    assert_eq!(world.client.connect(at(ECHO[0], 9999)?)?, refused, "what trace says is what happens");

    let (code, report) = trace(&world, &["10.96.200.200:80"])?;
    assert_eq!(
        (code, &report["outcome"], &report["kernel"]["state"]),
        (NOT_FORWARDED, &json!("untouched"), &json!("same"))
    );

    let (pod, node) = &world.backends[1];
    let direct = format!("{}:7001", pod.ips()[0]);
    let (code, report) = trace(&world, &[&direct])?;
    assert_eq!((code, &report["outcome"]), (NOT_FORWARDED, &json!("untouched")));
    assert!(report["notes"].to_string().contains("it is an endpoint of default/echo"), "{report}");

    let service = Service::new("lame", &["10.96.9.1"]).port("tcp", Transport::Tcp, 80, 7001);
    world.lab.manifests().write("lame", &service.yaml_with(&[])?)?;
    let report = in_force(&world, "10.96.9.1:80")?;
    assert_eq!(report["outcome"], "refused", "{report}");
    assert!(report["notes"].to_string().contains("no endpoint for this port"), "{report}");
    assert_eq!(world.client.connect(at("10.96.9.1", 80)?)?, refused);

    world
        .lab
        .manifests()
        .write("lame", &service.yaml_with(&[Endpoint::new(pod.ips()[0], node).conditions(false, false, false)])?)?;
    eventually(START, "the endpoint is known", || {
        Ok(column(&trace(&world, &["10.96.9.1:80"])?.1, "reason") == ["not ready"])
    })?;
    let (code, report) = trace(&world, &["10.96.9.1:80"])?;
    assert_eq!((code, &report["outcome"]), (NOT_FORWARDED, &json!("refused")));
    assert_eq!((column(&report, "eligible"), column(&report, "in_kernel")), (vec![json!(false)], vec![json!(false)]));
    Ok(())
}

#[test]
fn trace_tells_where_a_pod_goes_by_its_session_affinity() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let endpoints: Vec<Endpoint> = world.backends.iter().map(|(pod, node)| Endpoint::new(pod.ips()[0], node)).collect();
    let service = Service::new("sticky", &["10.96.9.2"])
        .port("tcp", Transport::Tcp, 80, 7001)
        .spec("sessionAffinity", "ClientIP")
        .spec("sessionAffinityConfig", json!({"clientIP": {"timeoutSeconds": 300}}));
    world.lab.manifests().write("sticky", &service.yaml_with(&endpoints)?)?;
    let target = "10.96.9.2:80";
    in_force(&world, target)?;

    let (_, report) = trace(&world, &[target, "--from-pod", "client"])?;
    assert_eq!(
        (&report["choice"], &report["client"]["served"]),
        (&Value::Null, &json!(true)),
        "nothing is remembered: {report}"
    );
    assert_eq!(report["frontend"]["policy"]["affinity_seconds"], 300);

    let name = world.client.tcp(at("10.96.9.2", 80)?)?.name;
    let (pod, _) = world.backends.iter().find(|(pod, _)| pod.name() == name).context("answered by nobody known")?;
    let backend = json!(format!("{}:7001", pod.ips()[0]));
    // By process, by address of either family, by name: the same pod.
    let process = world.client.process().to_string();
    let ips = world.client.ips().iter().map(ToString::to_string);
    for who in ips.chain([process, "client".to_owned()]) {
        let (code, report) = trace(&world, &[target, "--from-pod", &who])?;
        assert_eq!(
            (code, &report["choice"]["backend"], &report["choice"]["by"]),
            (FORWARDED, &backend, &json!("affinity")),
            "{who}: {report}"
        );
        let kept = report["choice"]["kept_seconds"].as_u64();
        assert!(kept.is_some_and(|kept| (200..=300).contains(&kept)), "{who}: {report}");
        assert_eq!(report["client"]["process"], world.client.process(), "{who}");
    }
    for _ in 0..5 {
        assert_eq!(world.client.tcp(at("10.96.9.2", 80)?)?.name, name);
    }
    // Another client is none of its business.
    let (_, other) = trace(&world, &[target, "--from-pod", &world.edge1.ips()[0].to_string()])?;
    assert_eq!((&other["choice"], &other["client"]["host_network"]), (&Value::Null, &json!(true)), "{other}");
    Ok(())
}

#[test]
fn trace_tells_where_each_client_goes_that_is_told_by_its_address() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let endpoints: Vec<Endpoint> = world.backends.iter().map(|(pod, node)| Endpoint::new(pod.ips()[0], node)).collect();
    let service = Service::new("hashed", &["10.96.9.4"]).port("tcp", Transport::Tcp, 80, 7001);
    let rule = "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: hashed, namespace: default}\n\
                spec: {host: hashed, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true}}}}\n";
    world.lab.manifests().write("hashed", &(service.yaml_with(&endpoints)? + rule))?;
    let target = "10.96.9.4:80";
    let report = in_force(&world, target)?;
    assert_eq!(report["frontend"]["policy"]["destination_rule"], "default/hashed");
    let chances = column(&report, "chance");
    let chances: Vec<f64> = chances.iter().filter_map(Value::as_f64).collect();
    assert!(chances.len() == 3 && chances.iter().all(|chance| (0.2..0.5).contains(chance)), "{report}");
    for (client, who) in
        [(&world.client, "client".to_owned()), (world.edge1.host(), world.edge1.host().process().to_string())]
    {
        let (_, report) = trace(&world, &[target, "--from-pod", &who])?;
        assert_eq!(report["choice"]["by"], "hash", "{report}");
        for _ in 0..10 {
            let name = client.tcp(at("10.96.9.4", 80)?)?.name;
            let (pod, _) =
                world.backends.iter().find(|(pod, _)| pod.name() == name).context("answered by nobody known")?;
            assert_eq!(
                report["choice"]["backend"],
                format!("{}:7001", pod.ips()[0]),
                "what trace says is what happens"
            );
        }
    }
    Ok(())
}

#[test]
fn trace_says_which_clients_are_not_served() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    // A pod of another node is in another cgroup than the one that this node's agent serves.
    let (elsewhere, _) = &world.backends[1];
    let (code, report) =
        trace(&world, &[&format!("{}:{TCP_PORT}", ECHO[0]), "--from-pod", &elsewhere.process().to_string()])?;
    assert_eq!(
        (code, &report["outcome"], &report["client"]["served"]),
        (NOT_FORWARDED, &json!("untouched"), &json!(false))
    );
    assert!(report["notes"].to_string().contains("is not below"), "{report}");
    let nobody = world.edge1.cli(&["trace", "default/echo:80", "--from-pod", "there-is-no-such-pod"])?;
    assert_eq!(nobody.status.code(), Some(69));
    assert!(complaint(&nobody).contains("there-is-no-such-pod"), "{}", complaint(&nobody));
    Ok(())
}

#[test]
fn metrics_count_each_backend_and_how_full_the_maps_are() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let target = at(ECHO[0], TCP_PORT)?;
    let mut answered = std::collections::BTreeMap::<String, u64>::new();
    for _ in 0..30 {
        *answered.entry(world.client.tcp(target)?.name).or_default() += 1;
    }
    let metrics = world.edge1.host().http_get("127.0.0.1:20008".parse()?, "/metrics", 1)?;
    let text = &metrics.replies[0].body;
    for (name, count) in &answered {
        let (pod, _) = world.backends.iter().find(|(pod, _)| pod.name() == name).context("answered by nobody known")?;
        let line = format!(
            r#"edgemesh_backend_connects_total{{namespace="default",service="echo",port="7",protocol="TCP",backend="{}:7001"}} {count}"#,
            pod.ips()[0]
        );
        assert!(text.lines().any(|other| other == line), "{line} in\n{text}");
    }
    assert!(!text.contains("edgemesh_backend_datagrams_total{"), "nothing has sent any: {text}");
    // Four ports, each on two addresses.
    for line in [
        r#"edgemesh_dataplane_entries{map="FRONTENDS"} 8"#,
        r#"edgemesh_dataplane_entries_limit{map="FRONTENDS"} 20000"#,
    ] {
        assert!(text.lines().any(|other| other == line), "{line} in\n{text}");
    }
    Ok(())
}

#[test]
fn events_show_each_call_while_somebody_listens() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let target = at(ECHO[0], TCP_PORT)?;
    let listening =
        world.edge1.agent(&["events", "-o", "json", "--for", "20s", "--service", "default/echo"]).start()?;
    let seen = || -> Result<Vec<Value>> {
        listening.log()?.lines().map(|line| serde_json::from_str(line).context("no JSON")).collect()
    };
    // Until the stream is up, nobody is told.
    let mut backend = None;
    eventually(START, "an event", || {
        let name = world.client.tcp(target)?.name;
        backend =
            world.backends.iter().find(|(pod, _)| pod.name() == name).map(|(pod, _)| format!("{}:7001", pod.ips()[0]));
        Ok(!seen()?.is_empty())
    })?;
    let events = seen()?;
    let last = events.last().context("no event")?;
    assert_eq!(last["call"], "connect", "{last}");
    assert_eq!(last["frontend"], format!("{target}/TCP"));
    assert_eq!(last["service"], "default/echo");
    let from = last["from"].as_array().context("no address")?;
    assert!(from.contains(&json!(world.client.ips()[0].to_string())), "{last}");
    eventually(START, "the newest connect", || {
        Ok(seen()?.last().is_some_and(|event| event["backend"].as_str() == backend.as_deref()))
    })?;

    // A refusal and a datagram.
    let refused = Attempt::Failed("ECONNREFUSED".to_owned());
    assert_eq!(world.client.connect(at(ECHO[0], 9999)?)?, refused);
    world.client.udp_fan(&[at(ECHO[1], UDP_PORT)?])?;
    let has = |frontend: String, call: &str, refused: bool| -> Result<bool> {
        let event = seen()?.into_iter().find(|event| event["frontend"] == frontend.as_str());
        Ok(event.is_some_and(|event| event["call"] == call && event["backend"].is_null() == refused))
    };
    eventually(START, "the refusal", || has(format!("{}:9999/TCP", ECHO[0]), "connect", true))?;
    eventually(START, "the datagram", || has(format!("[{}]:{UDP_PORT}/UDP", ECHO[1]), "datagram", false))?;

    // Another Service is not asked for.
    let other = Service::new("other", &["10.96.9.3"]).port("tcp", Transport::Tcp, 80, 7001);
    world.lab.manifests().write("other", &other.yaml_with(&[Endpoint::new(world.backends[0].0.ips()[0], "edge1")])?)?;
    in_force(&world, "10.96.9.3:80")?;
    world.client.tcp(at("10.96.9.3", 80)?)?;
    let count = seen()?.len();
    world.client.tcp(target)?;
    eventually(START, "an event after it", || Ok(seen()?.len() > count))?;
    assert!(!seen()?.iter().any(|event| event["service"] == "default/other"), "{:?}", seen()?);

    listening.stop()?;
    Ok(())
}

#[test]
fn events_end_by_themselves_and_with_their_agent() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let output = world.edge1.agent(&["events", "--for", "1s"]).output(START)?;
    ensure!(output.status.success(), "{}", complaint(&output));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("TIME (UTC)"));
    let listening = world.edge1.agent(&["events", "--for", "1h"]).start()?;
    eventually(START, "the stream is up", || Ok(listening.log()?.contains("TIME")))?;
    let begin = std::time::Instant::now();
    world.agents[0].stop()?;
    ensure!(begin.elapsed() < Duration::from_secs(4), "a listener held the agent up for {:?}", begin.elapsed());
    eventually(START, "the stream has ended", || Ok(listening.ended()?.is_some()))?;
    // An agent that was killed meanwhile leaves events switched on; the next one switches them off and serves.
    world.edge1.start_agent(&AgentOptions::default())?.wait_ready(START)?;
    world.client.tcp(at(ECHO[0], TCP_PORT)?)?;
    Ok(())
}
