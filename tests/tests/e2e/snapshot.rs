//! The API server is gone, and so is what the kernel held: what an agent learnt is on the node's disk.

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    App, Attempt, Lab, Node, Pod, Transport,
    agent::{Agent, AgentOptions},
    api::{ApiServer, Store},
    eventually,
    manifest::{self, Endpoint, Service},
};
use serde_json::Value;

use crate::{START, TCP_PORT, at};

const API_PORT: u16 = 6443;
/// What the first connection may take after the agent's exec. Nearly all of it is the verifier's; an agent that is not
/// optimised has some more to do itself.
const FIRST_CONNECTION: Duration = Duration::from_secs(if cfg!(debug_assertions) { 5 } else { 1 });
/// Two Services, of one backend each.
const KEPT: &str = "10.96.0.10";
const DELETED: &str = "10.96.0.20";

/// A node with an agent, and a node beside it with the API server and the backends.
struct World {
    client: Pod,
    edge: Node,
    cloud: Node,
    store: Store,
    lab: Lab,
}

impl World {
    fn raise() -> Result<Option<Self>> {
        let Some(lab) = Lab::for_test()? else { return Ok(None) };
        let lan = lab.site("lan", &["192.168.10.0/24"])?;
        let edge = lan.node("edge1", &["10.244.1.0/24"])?;
        let cloud = lan.node("cloud", &["10.244.2.0/24"])?;
        let (client, store) = (edge.pod("client")?, Store::default());
        for (name, ip) in [("kept", KEPT), ("deleted", DELETED)] {
            let pod = cloud.pod(name)?;
            pod.serve(App::Tcp, 7001)?;
            store.apply(&service(name, ip).yaml_with(&Endpoint::of(&pod, "cloud"))?)?;
        }
        for node in [&edge, &cloud] {
            store.apply(&manifest::node(node, &[])?)?;
        }
        Ok(Some(Self { client, edge, cloud, store, lab }))
    }

    fn serve_api(&self) -> Result<ApiServer> {
        self.store.serve(&self.cloud, API_PORT)
    }

    /// For an agent that reads the API server.
    fn options(&self) -> Result<AgentOptions> {
        let ip = self.cloud.ips().first().context("a node without an address")?;
        Ok(AgentOptions::default()
            .set("kubeAPIConfig.staticDirectory", Value::Null)
            .set("kubeAPIConfig.master", format!("http://{ip}:{API_PORT}")))
    }

    fn start(&self) -> Result<Agent> {
        self.edge.start_agent(&self.options()?)
    }

    fn status(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&self.edge.cli(&["status", "-o", "json"])?.stdout)?)
    }

    /// Waits until the agent has put everything that it knows now onto the disk.
    fn wait_written(&self) -> Result<()> {
        eventually(START, "the snapshot is written", || Ok(self.status()?["snapshot"]["size_bytes"].is_u64()))
    }

    /// Takes everything out of the kernel, as a loss of power does.
    fn reboot(&self) -> Result<()> {
        self.cleanup(&[])?;
        ensure!(self.edge.snapshot_path().exists(), "the snapshot is not for a cleanup to take");
        let attempt = self.client.within(Duration::from_millis(100)).connect(at(KEPT, TCP_PORT)?)?;
        ensure!(matches!(&attempt, Attempt::Failed(errno) if errno != "ECONNREFUSED"), "{attempt:?}");
        ensure!(self.edge.attached_programs()?.is_empty(), "programs are still attached");
        Ok(())
    }

    fn cleanup(&self, arguments: &[&str]) -> Result<()> {
        // Written when the agent started.
        let config = self.lab.directory().join("edge1/agent.yaml");
        let config = config.to_string_lossy();
        let all = [&["cleanup", "--config-file", &config], arguments].concat();
        let output = self.edge.agent(&all).output(START)?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn draft(&self) -> PathBuf {
        self.edge.snapshot_path().with_extension("snapshot.draft")
    }
}

fn service(name: &str, ip: &str) -> Service {
    Service::new(name, &[ip]).port("tcp", Transport::Tcp, TCP_PORT, 7001)
}

fn reasons(status: &Value) -> Vec<&str> {
    let conditions = status["conditions"].as_array().map_or(&[][..], Vec::as_slice);
    conditions.iter().filter_map(|condition| condition["reason"].as_str()).collect()
}

fn say(line: &str) {
    // Past the test harness, which shows what a passing test prints to nobody.
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[test]
fn a_node_that_comes_up_without_its_api_server_serves_what_it_knew() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let api = world.serve_api()?;
    let agent = world.start()?;
    agent.wait_ready(START)?;
    for ip in [KEPT, DELETED] {
        world.client.tcp(at(ip, TCP_PORT)?)?;
    }
    assert!(agent.stop()?.success());
    api.stop()?;
    world.reboot()?;

    let (target, begun) = (at(KEPT, TCP_PORT)?, Instant::now());
    let agent = world.start()?;
    let hasty = world.client.within(Duration::from_millis(20));
    eventually(START, "the first connection", || Ok(hasty.tcp(target)?.name == "kept"))?;
    let first = begun.elapsed();
    say(&format!("first connection {first:?} after exec, with neither an API server nor anything in the kernel"));
    assert!(first < FIRST_CONNECTION, "{first:?}");

    let refused = Attempt::Failed("ECONNREFUSED".to_owned());
    assert_eq!(world.client.connect(at(KEPT, TCP_PORT + 1)?)?, refused);
    agent.wait_ready(START)?;
    eventually(START, "it is told", || {
        let status = world.status()?;
        Ok(reasons(&status) == ["ApiServerUnreachable", "SnapshotInForce"])
    })?;
    let status = world.status()?;
    let served = &status["snapshot"]["still_served"];
    assert_eq!([&served["Service"]["objects"], &served["Node"]["objects"]], [2, 2], "{status}");
    assert!(served["Endpoints"].is_null() && served["Service"]["age_seconds"].is_u64(), "{status}");
    let shown = String::from_utf8(world.edge.cli(&["status"])?.stdout)?;
    assert!(shown.contains("STILL IN FORCE: 2 EndpointSlice as of "), "{shown}");
    let metrics = agent.metrics()?;
    assert!(metrics.contains("edgemesh_snapshot_objects_in_force{kind=\"Service\"} 2\n"), "{metrics}");

    let hammer = world.client.hammer(Transport::Tcp, target, 2)?;
    world.store.delete("Service", "default", "deleted")?;
    world.store.delete("EndpointSlice", "default", "deleted-v4")?;
    let (_api, back) = (world.serve_api()?, Instant::now());
    eventually(START, "what was deleted meanwhile goes", || {
        Ok(world.status()?["services"] == 1 && hasty.connect(at(DELETED, TCP_PORT)?)? != refused)
    })?;
    say(&format!("what was deleted meanwhile went {:?} after the API server was back", back.elapsed()));
    let attempt = hasty.connect(at(DELETED, TCP_PORT)?)?;
    assert!(matches!(attempt, Attempt::Failed(_)), "{attempt:?}");
    eventually(START, "nothing of the snapshot is in force", || Ok(reasons(&world.status()?).is_empty()))?;
    let status = world.status()?;
    assert_eq!(status["snapshot"]["still_served"], serde_json::json!({}), "{status}");
    let report = hammer.stop()?;
    assert_eq!(report.failures, BTreeMap::new());

    agent.stop()?;
    world.cleanup(&["--snapshot"])?;
    assert!(!world.edge.snapshot_path().exists(), "unless it is asked to");
    Ok(())
}

#[test]
fn an_agent_killed_and_started_without_its_api_server_lets_the_kernel_go_on() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let api = world.serve_api()?;
    let agent = world.start()?;
    agent.wait_ready(START)?;
    world.wait_written()?;
    let hammers = [KEPT, DELETED].map(|ip| world.client.hammer(Transport::Tcp, at(ip, TCP_PORT)?, 1));
    agent.kill()?;
    api.stop()?;
    let again = world.start()?;
    again.wait_ready(START)?;
    let status = world.status()?;
    assert_eq!(status["dataplane"]["adopted_frontends"], 2, "{status}");
    assert_eq!(status["snapshot"]["still_served"]["EndpointSlice"]["objects"], 2, "{status}");
    assert_eq!(status["frontends"], 2, "{status}");
    for hammer in hammers {
        assert_eq!(hammer?.stop()?.failures, BTreeMap::new());
    }
    Ok(())
}

#[test]
fn an_agent_killed_while_it_writes_always_finds_a_whole_file() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let _api = world.serve_api()?;
    // So many that writing takes a while.
    for n in 0..1500 {
        let ip = format!("10.97.{}.{}", n / 250, n % 250 + 1);
        let endpoint = Endpoint::new(format!("10.98.{}.{}", n / 250, n % 250 + 1).parse()?, "cloud");
        world.store.apply(&service(&format!("many-{n}"), &ip).yaml_with(&[endpoint])?)?;
    }
    let mut agent = world.start()?;
    agent.wait_ready(START)?;
    world.wait_written()?;
    let hammer = world.client.hammer(Transport::Tcp, at(KEPT, TCP_PORT)?, 1)?;
    let mut cut_off = 0;
    for round in 0..6 {
        // A change for the agent to write.
        let endpoint = Endpoint::new(format!("10.98.100.{}", round + 1).parse()?, "cloud");
        world.store.apply(&service("many-0", "10.97.0.1").yaml_with(&[endpoint])?)?;
        let draft = world.draft();
        let end = Instant::now() + START;
        while !draft.exists() {
            ensure!(Instant::now() < end, "the agent writes nothing");
            std::thread::yield_now();
        }
        agent.kill()?;
        cut_off += u32::from(draft.exists());
        agent = world.start()?;
        agent.wait_ready(START)?;
        let log = agent.log()?;
        assert!(log.contains("restored the metadata snapshot"), "round {round}: {log}");
        assert!(!log.contains("SnapshotUnusable"), "round {round}: {log}");
    }
    assert!(cut_off > 0, "no kill hit a write");
    say(&format!("{cut_off} of 6 kills cut a write off"));
    world.wait_written()?;
    assert!(!world.draft().exists(), "what a kill left is gone");
    let report = hammer.stop()?;
    assert_eq!(report.failures, BTreeMap::new());
    Ok(())
}
