//! An agent on a node of KubeEdge, whose metaServer is all it has to learn from.

use std::{
    collections::BTreeMap,
    io::Write as _,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::{
    lab::{
        App, Attempt, Lab, Node, Pod, Transport,
        agent::{Agent, AgentOptions},
        eventually,
    },
    meta_server::{Door, FakeMetaServer, Fault, Link, pki, token},
};
use serde_json::{Value, json};

use crate::{START, at};

const ECHO: &str = "10.96.7.1";
const OTHER: &str = "10.96.7.2";
/// Where KubeEdge has it, and where EdgeMesh looks for it.
const META_SERVER: &str = "127.0.0.1:10550";
const RELIST: &str = "kubeAPIConfig.metaServer.relistPeriod";
const TIMEOUT: &str = "kubeAPIConfig.metaServer.requestTimeout";
const AUTHORIZATION: &str = "kubeAPIConfig.metaServer.security.requireAuthorization";

/// One node with metaServer on 127.0.0.1, two servers and a client, and the Services `echo`, which leads to `a`, and
/// `other`, which leads to `b`.
struct Edge {
    // Dropped last, as everything else lives in it.
    fake: FakeMetaServer,
    client: Pod,
    a: Pod,
    b: Pod,
    node: Node,
    _lab: Lab,
}

impl Edge {
    fn raise(door: Door) -> Result<Option<Self>> {
        let Some(lab) = Lab::for_test()? else { return Ok(None) };
        let node = lab.site("lan", &["192.168.10.0/24"])?.node("edge1", &["10.244.1.0/24"])?;
        let (client, a, b) = (node.pod("client")?, node.pod("a")?, node.pod("b")?);
        for pod in [&a, &b] {
            pod.serve(App::Tcp, 7001)?;
        }
        let fake = FakeMetaServer::start(node.listen(META_SERVER.parse()?)?, door)?;
        let edge = Self { fake, client, a, b, node, _lab: lab };
        edge.fake.put(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "edge1"}}));
        for (name, ip, pod) in [("echo", ECHO, &edge.a), ("other", OTHER, &edge.b)] {
            edge.put_endpoints(name, pod);
            edge.fake.put(json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
                "spec": {"type": "ClusterIP", "clusterIP": ip, "ports": [{"name": "tcp", "port": 80, "targetPort": 7001}]},
            }));
        }
        Ok(Some(edge))
    }

    fn put_endpoints(&self, name: &str, pod: &Pod) {
        self.fake.put(json!({
            "apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": name, "namespace": "default"},
            "subsets": [{
                "addresses": [{"ip": pod.ips()[0], "nodeName": "edge1"}], "ports": [{"name": "tcp", "port": 7001}],
            }],
        }));
    }

    /// How an agent on such a node is set up: as EdgeMesh is, with nothing said of where to ask, and lists every second
    /// instead of every five minutes.
    fn options() -> AgentOptions {
        AgentOptions::default()
            .set("kubeAPIConfig.staticDirectory", Value::Null)
            .set(RELIST, 1)
            // As edged gives them to pods where metaServer asks for no token.
            .env("KUBERNETES_SERVICE_HOST", "")
            .env("KUBERNETES_SERVICE_PORT", "")
    }

    fn start(&self, options: &AgentOptions) -> Result<Agent> {
        let agent = self.node.start_agent(options)?;
        agent.wait_ready(START)?;
        Ok(agent)
    }

    fn status(&self) -> Result<Value> {
        let output = self.node.cli(&["status", "-o", "json"])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn conditions(&self) -> Result<BTreeMap<String, String>> {
        let status = self.status()?;
        let list = status["conditions"].as_array().context("no conditions")?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let named = |c: &Value| (format!("{} {}", text(&c["reason"]), text(&c["subject"])), text(&c["message"]));
        Ok(list.iter().map(named).collect())
    }

    fn health_is(&self, wanted: &str) -> Result<Value> {
        eventually(START, &format!("the source to be {wanted}"), || Ok(self.status()?["source"]["health"] == wanted))?;
        Ok(self.status()?["source"].take())
    }

    fn all_is_well(&self) -> Result<()> {
        eventually(START, "all to be well", || {
            Ok(self.status()?["source"]["health"] == "connected" && self.conditions()?.is_empty())
        })
    }

    fn condition_comes(&self, name: &str, parts: &[&str]) -> Result<()> {
        eventually(START, &format!("the condition {name}"), || {
            let conditions = self.conditions()?;
            let message = conditions.get(name).with_context(|| format!("{conditions:?}"))?;
            ensure!(parts.iter().all(|part| message.contains(part)), "{parts:?} in {message}");
            Ok(true)
        })
    }

    fn leads_to(&self, ip: &str, pod: &Pod) -> Result<()> {
        let target = at(ip, 80)?;
        eventually(
            START,
            &format!("{ip} to lead to {}", pod.name()),
            || Ok(self.client.tcp(target)?.name == pod.name()),
        )
    }

    fn services(&self) -> Result<Vec<String>> {
        let output = self.node.cli(&["services", "-o", "json"])?;
        let rows: Vec<Value> = serde_json::from_slice(&output.stdout)?;
        Ok(rows.iter().map(|row| row["name"].as_str().unwrap_or_default().to_owned()).collect())
    }

    fn is_gone(&self, name: &str) -> Result<()> {
        eventually(START, &format!("{name} to be gone"), || Ok(!self.services()?.iter().any(|known| known == name)))
    }
}

#[test]
fn an_agent_at_the_edge_follows_meta_server_without_being_told_to() -> Result<()> {
    let Some(edge) = Edge::raise(Door::Open)? else { return Ok(()) };
    // Lists are as rare as by default, so all of this comes by watches.
    let agent = edge.start(&Edge::options().set(RELIST, 300))?;
    let target = at(ECHO, 80)?;
    let reply = edge.client.tcp(target)?;
    assert_eq!((reply.name.as_str(), reply.peer), ("a", target));
    let running = edge.client.open(Transport::Tcp, target)?;
    eventually(START, "it watches", || {
        Ok(["services", "endpoints", "nodes"].iter().all(|kind| edge.fake.watching(kind) > 0))
    })?;

    edge.put_endpoints("echo", &edge.b);
    edge.leads_to(ECHO, &edge.b)?;
    assert_eq!(running.exchange()?.name, "a", "connections stay where they are");
    edge.fake.delete("services", "default", "other");
    edge.is_gone("other")?;
    assert!(!matches!(edge.client.connect(at(OTHER, 80)?)?, Attempt::Connected(_)));

    let status = edge.status()?;
    let source = &status["source"];
    assert_eq!((&source["kind"], &source["source"]), (&json!("metaServer"), &json!(format!("http://{META_SERVER}"))));
    assert_eq!((&source["health"], &source["objects"]["Service"]), (&json!("connected"), &json!(2)));
    let text = String::from_utf8_lossy(&edge.node.cli(&["status"])?.stdout).into_owned();
    assert!(text.contains("metaServer http://127.0.0.1:10550, connected for") && text.contains(", in sync"), "{text}");
    let metrics = agent.metrics()?;
    for line in ["edgemesh_source_health{state=\"connected\"} 1\n", "edgemesh_source_objects{kind=\"Endpoints\"} 3\n"] {
        assert!(metrics.contains(line), "{line} in\n{metrics}");
    }
    assert_eq!(edge.conditions()?, BTreeMap::new());
    Ok(())
}

#[test]
fn offline_connections_go_on_and_what_was_missed_is_made_good_afterwards() -> Result<()> {
    let Some(edge) = Edge::raise(Door::Open)? else { return Ok(()) };
    let _agent = edge.start(&Edge::options())?;
    let target = at(ECHO, 80)?;
    let running = edge.client.open(Transport::Tcp, target)?;
    eventually(START, "it watches", || Ok(edge.fake.watching("services") > 0))?;
    let hammer = edge.client.hammer(Transport::Tcp, target, 1)?;

    edge.fake.link(Link::Down);
    edge.put_endpoints("echo", &edge.b);
    edge.fake.delete("services", "default", "other");
    edge.fake.delete("endpoints", "default", "other");
    let source = edge.health_is("offline")?;
    ensure!(source["hint"].as_str().is_some_and(|hint| hint.contains("link to cloudcore")), "{source}");
    edge.condition_comes("MetaServerOffline ", &["as it had stored them"])?;
    assert_eq!(running.exchange()?.name, "a");
    assert_eq!(edge.client.tcp(target)?.name, "a", "the last known state is served");
    assert_eq!(edge.client.tcp(at(OTHER, 80)?)?.name, "b", "what is gone cannot be known");

    edge.fake.link(Link::Up);
    edge.leads_to(ECHO, &edge.b)?;
    edge.is_gone("other")?;
    edge.all_is_well()?;
    // It is still stored on the node, and replayed by each new watch.
    ensure!(edge.fake.stored().contains(&"/core/v1/services/default/other".to_owned()), "{:?}", edge.fake.stored());
    let lists = edge.fake.count("list", "services");
    edge.fake.end_watches();
    eventually(START, "it lists and watches again", || {
        Ok(edge.fake.count("list", "services") > lists + 1 && edge.fake.watching("services") > 0)
    })?;
    assert_eq!(edge.services()?, ["echo", "kubernetes"]);
    assert_eq!(hammer.stop()?.failures, BTreeMap::new());
    Ok(())
}

#[test]
fn ten_seconds_and_an_empty_list_are_degraded_and_cost_nothing() -> Result<()> {
    let Some(edge) = Edge::raise(Door::Open)? else { return Ok(()) };
    let agent = edge.start(&Edge::options())?;
    let hammer = edge.client.hammer(Transport::Tcp, at(ECHO, 80)?, 1)?;
    // What is seen where dynamicController is off: nothing is stored, and every request takes ten seconds.
    edge.fake.wipe_store();
    edge.fake.link(Link::HalfOpen(Duration::from_secs(10)));
    edge.fake.break_watches();
    edge.condition_comes(
        "MetaServerSlow services",
        &["took 10 s", "dynamicController.enable", "curl 127.0.0.1:10550"],
    )?;
    let source = edge.health_is("degraded")?;
    ensure!(source["hint"].as_str().is_some_and(|hint| hint.contains("metaServer.enable")), "{source}");
    let text = String::from_utf8_lossy(&edge.node.cli(&["status"])?.stdout).into_owned();
    assert!(text.contains("DEGRADED for") && text.contains("because: it took 10 s") && text.contains("do: "), "{text}");
    assert!(agent.metrics()?.contains("edgemesh_source_health{state=\"degraded\"} 1\n"));
    assert_eq!(edge.services()?, ["echo", "kubernetes", "other"]);
    edge.fake.link(Link::Up);
    edge.all_is_well()?;
    assert_eq!(hammer.stop()?.failures, BTreeMap::new());
    Ok(())
}

#[test]
fn no_failure_of_meta_server_costs_a_connection_and_each_is_told() -> Result<()> {
    let Some(edge) = Edge::raise(Door::Open)? else { return Ok(()) };
    // 30 s of silence, made short.
    let _agent = edge.start(&Edge::options().set(TIMEOUT, 1))?;
    let hammer = edge.client.hammer(Transport::Tcp, at(ECHO, 80)?, 1)?;
    for (fault, name, part) in [
        (Fault::Empty, "MetaServerEmpty services", "an empty list"),
        (Fault::Status(404, "page not found".to_owned()), "MetaServerError services", "404 page not found"),
        (Fault::Status(500, "went wrong".to_owned()), "MetaServerError endpoints", "500 went wrong"),
        (Fault::Garbage, "MetaServerError services", "<html>"),
        (Fault::Truncated, "MetaServerError services", "broke off"),
        (Fault::Silence, "MetaServerUnreachable ", "no complete answer within 1s"),
    ] {
        edge.fake.fault("list *", fault);
        edge.condition_comes(name, &[part, "the last known state is served meanwhile"])?;
        assert_eq!(edge.services()?, ["echo", "kubernetes", "other"], "{name}");
        edge.fake.heal();
        edge.all_is_well()?;
    }
    assert_eq!(edge.services()?, ["echo", "kubernetes", "other"]);
    assert_eq!(hammer.stop()?.failures, BTreeMap::new());
    Ok(())
}

#[test]
fn a_watch_that_dies_silently_is_made_good_by_the_next_list() -> Result<()> {
    let Some(edge) = Edge::raise(Door::Open)? else { return Ok(()) };
    let _agent = edge.start(&Edge::options())?;
    eventually(START, "it watches", || Ok(edge.fake.watching("endpoints") > 0))?;
    for kill in [FakeMetaServer::silence_watches, FakeMetaServer::restart_cloudcore] {
        kill(&edge.fake);
        edge.put_endpoints("echo", &edge.b);
        edge.leads_to(ECHO, &edge.b)?;
        edge.put_endpoints("echo", &edge.a);
        edge.leads_to(ECHO, &edge.a)?;
    }
    assert_eq!(edge.conditions()?, BTreeMap::new());
    Ok(())
}

#[test]
fn an_agent_that_is_restarted_offline_serves_what_meta_server_has_stored() -> Result<()> {
    let Some(edge) = Edge::raise(Door::Open)? else { return Ok(()) };
    let agent = edge.start(&Edge::options())?;
    eventually(START, "everything is stored", || {
        Ok(["services", "endpoints"].iter().all(|kind| edge.fake.watching(kind) > 0))
    })?;
    let hammer = edge.client.hammer(Transport::Tcp, at(ECHO, 80)?, 1)?;
    edge.fake.link(Link::Down);
    agent.kill()?;
    let _again = edge.start(&Edge::options())?;
    edge.health_is("offline")?;
    for (ip, pod) in [(ECHO, &edge.a), (OTHER, &edge.b)] {
        assert_eq!(edge.client.tcp(at(ip, 80)?)?.name, pod.name());
    }
    edge.fake.link(Link::Up);
    edge.put_endpoints("echo", &edge.b);
    edge.leads_to(ECHO, &edge.b)?;
    edge.all_is_well()?;
    assert_eq!(hammer.stop()?.failures, BTreeMap::new());
    Ok(())
}

#[test]
fn an_agent_restarted_with_neither_cloud_nor_store_nor_kernel_serves_its_snapshot_and_says_why() -> Result<()> {
    let Some(edge) = Edge::raise(Door::Open)? else { return Ok(()) };
    let agent = edge.start(&Edge::options())?;
    edge.all_is_well()?;
    eventually(START, "the snapshot is written", || Ok(edge.status()?["snapshot"]["size_bytes"].is_u64()))?;
    agent.kill()?;
    // The power was lost, edgecore was installed anew, and dynamicController is off: every request takes ten seconds and
    // gives an empty list.
    edge.fake.wipe_store();
    edge.fake.link(Link::HalfOpen(Duration::from_secs(10)));
    edge.node.cleanup()?;
    let hasty = edge.client.within(Duration::from_millis(100));
    ensure!(hasty.tcp(at(ECHO, 80)?).is_err(), "something is left in the kernel");

    let (begun, started) = (seconds()?, Instant::now());
    let agent = edge.node.start_agent(&Edge::options())?;
    eventually(START, "the first connection", || Ok(hasty.tcp(at(ECHO, 80)?)?.name == "a"))?;
    ensure!(started.elapsed() < Duration::from_secs(10), "metaServer was waited for: {:?}", started.elapsed());
    agent.wait_ready(START)?;
    edge.condition_comes("MetaServerSlow services", &["took 10 s", "dynamicController.enable"])?;
    edge.condition_comes("SnapshotInForce ", &["Service, Endpoints, Node", "its own conditions say why"])?;
    let source = edge.health_is("degraded")?;
    let since = source["since"].as_u64().context("no time")?;
    ensure!((begun..=seconds()?).contains(&since) && source["last_sync"].is_null(), "{source}");
    ensure!(source["reason"].as_str().is_some_and(|reason| reason.contains("10 s to list")), "{source}");
    ensure!(source["hint"].as_str().is_some_and(|hint| hint.contains("metaServer.enable")), "{source}");
    let text = String::from_utf8_lossy(&edge.node.cli(&["status"])?.stdout).into_owned();
    for part in ["DEGRADED for", "because: it took 10 s", "STILL IN FORCE: 3 Endpoints as of "] {
        assert!(text.contains(part), "{part} in {text}");
    }
    // Every list of all kinds has come to nothing by now, more than once.
    let lists = edge.fake.count("list", "endpoints");
    eventually(START, "it was listed again", || Ok(edge.fake.count("list", "endpoints") > lists + 1))?;
    assert_eq!(edge.services()?, ["echo", "kubernetes", "other"]);
    for (ip, pod) in [(ECHO, &edge.a), (OTHER, &edge.b)] {
        assert_eq!(edge.client.tcp(at(ip, 80)?)?.name, pod.name());
    }

    let hammer = edge.client.hammer(Transport::Tcp, at(ECHO, 80)?, 1)?;
    edge.fake.delete("services", "default", "other");
    edge.fake.delete("endpoints", "default", "other");
    edge.fake.link(Link::Up);
    edge.is_gone("other")?;
    edge.all_is_well()?;
    assert_eq!(edge.services()?, ["echo", "kubernetes"]);
    assert!(!matches!(edge.client.connect(at(OTHER, 80)?)?, Attempt::Connected(_)));
    let status = edge.status()?;
    assert_eq!(status["snapshot"]["still_served"], json!({}), "{status}");
    assert!(status["source"]["last_sync"].as_u64() >= Some(since), "{status}");
    assert_eq!(hammer.stop()?.failures, BTreeMap::new());
    Ok(())
}

#[test]
fn two_thousand_services_come_through_meta_server() -> Result<()> {
    const SERVICES: u32 = 2000;
    let Some(edge) = Edge::raise(Door::Open)? else { return Ok(()) };
    for n in 0..SERVICES {
        let (name, [high, low]) = (format!("many-{n:04}"), [n / 250, n % 250 + 1]);
        let addresses: Vec<Value> =
            (0..10).map(|host| json!({"ip": format!("10.{}.{high}.{low}", 100 + host), "nodeName": "far"})).collect();
        let metadata = json!({"name": name, "namespace": "default"});
        edge.fake.put(json!({
            "apiVersion": "v1", "kind": "Endpoints", "metadata": metadata,
            "subsets": [{"addresses": addresses, "ports": [{"name": "tcp", "port": 7001}]}],
        }));
        edge.fake.put(json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata,
            "spec": {"type": "ClusterIP", "clusterIP": format!("10.97.{high}.{low}"), "ports": [{"name": "tcp", "port": 80}]},
        }));
    }
    let begun = Instant::now();
    let agent = edge.start(&Edge::options().set(RELIST, 300))?;
    let ready = begun.elapsed();
    edge.leads_to(ECHO, &edge.a)?;
    edge.all_is_well()?;
    let status = edge.status()?;
    // With `echo`, `other` and Kubernetes' own.
    let all = json!(SERVICES + 3);
    assert_eq!([&status["source"]["objects"]["Service"], &status["source"]["objects"]["Endpoints"]], [&all, &all]);
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let line = format!(
        "{SERVICES} Services with 10 endpoints each by metaServer: ready {ready:.1?} after the start, {:.1} MiB resident, \
         {:.1} MiB at most",
        mib(agent.resident_bytes()?),
        mib(agent.peak_bytes()?)
    );
    // Past the test harness, which shows what a passing test prints to nobody.
    writeln!(std::io::stderr(), "{line}").context("could not write to standard error")
}

#[test]
fn https_with_the_token_of_the_service_account_and_what_is_said_of_a_wrong_one() -> Result<()> {
    let account = |expires: u64| {
        token(&json!({
            "iss": "https://kubernetes.default.svc.cluster.local", "exp": expires,
            "sub": "system:serviceaccount:kubeedge:edgemesh-agent",
        }))
    };
    let (good, expired) = (account(4_000_000_000), account(1));
    let Some(edge) = Edge::raise(Door::Authorized { tokens: vec![good.clone()] })? else { return Ok(()) };
    // Where a kubelet mounts them: /var/run is /run.
    let mounted = |name: &str, content: &[u8]| {
        edge.node.write_run_file(&format!("secrets/kubernetes.io/serviceaccount/{name}"), content)
    };
    mounted("ca.crt", &std::fs::read(pki("ca.crt"))?)?;
    mounted("token", good.as_bytes())?;
    let options = Edge::options().set(AUTHORIZATION, true);
    let agent = edge.start(&options)?;
    assert_eq!(edge.client.tcp(at(ECHO, 80)?)?.name, "a");
    edge.all_is_well()?;
    assert_eq!(edge.status()?["source"]["source"], "https://127.0.0.1:10550");

    mounted("token", expired.as_bytes())?;
    edge.condition_comes(
        "MetaServerForbidden services",
        &["401 Unauthorized", "the token has expired", "system:serviceaccount:kubeedge:edgemesh-agent"],
    )?;
    edge.health_is("degraded")?;
    assert_eq!(edge.client.tcp(at(ECHO, 80)?)?.name, "a");
    mounted("token", good.as_bytes())?;
    edge.all_is_well()?;

    // KubeEdge has the gate on, and the agent does not know: what edged injects gives it away.
    assert!(agent.stop()?.success());
    let plain = Edge::options().env("KUBERNETES_SERVICE_HOST", "169.254.30.10").env("KUBERNETES_SERVICE_PORT", "10550");
    let agent = edge.node.start_agent(&plain)?;
    edge.condition_comes("MetaServerForbidden services", &["HTTP request to an HTTPS server", "requireAuthorization"])?;
    assert!(agent.log()?.contains("yet KUBERNETES_SERVICE_HOST is set"), "{}", agent.log()?);
    assert_eq!(edge.client.tcp(at(ECHO, 80)?)?.name, "a", "what the agent before left is still in force");
    let log = agent.log()?;
    assert!(!log.contains(good.rsplit('.').next().unwrap_or(&good)), "no part of a token is logged");
    Ok(())
}

/// Seconds since the Unix epoch.
fn seconds() -> Result<u64> {
    Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs())
}
