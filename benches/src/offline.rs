//! A node that comes up without its API server: from the agent's exec to the first connection.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    App, Attempt, DEADLINE, Lab, Node, Pod, Transport, agent::AgentOptions, api::Store, eventually, manifest::Endpoint,
};
use serde_json::{Value, json};

use crate::{
    Effort,
    generated::{self, Generated, PORT, TARGET_PORT},
    report::{Table, millis, say, verdict, whole},
    scene::{READY, ask},
    spread::Spread,
};

/// Milliseconds until the first connection.
const AIM: f64 = 1000.0;
const API_PORT: u16 = 6443;
const ENDPOINTS: u32 = 10;
/// The Service that has a real endpoint; beyond those that are generated.
const REAL: u32 = 10_001;

/// Measures starts with nothing but the snapshot: no API server, and an empty kernel, as after a loss of power.
pub(crate) fn measure(effort: Effort) -> Result<Vec<Table>> {
    let repetitions = effort.pick(1, 5);
    let sizes = effort.pick(&[10, 1000][..], &[10, 1000, 10_000]);
    let (mut rows, mut findings) = (Vec::new(), Vec::new());
    for &services in sizes {
        for tunnel in [Tunnel::Off, Tunnel::Alone] {
            let took = Spread::of(starts(services, tunnel, repetitions)?)?;
            let what = format!("first connection, {services} Services, tunnel {}", tunnel.as_str());
            findings.push(verdict(&what, took.median, AIM, millis));
            rows.push(vec![
                services.to_string(),
                tunnel.as_str().to_owned(),
                millis(took.median),
                whole(&took, millis),
            ]);
        }
    }
    Ok(vec![Table {
        title: "A start without the API server",
        method: format!(
            "Services with {ENDPOINTS} endpoints each, learnt from an API server that is then gone; the agent stopped and \
             all that it put into the kernel taken out. From the exec of the new agent until a client that tries every \
             20 ms has its first connection through a ClusterIP ({repetitions} starts each). With the tunnel on, its one \
             relay is at an address of the LAN that nobody has, and at one that no route leads to."
        ),
        head: vec!["Services", "tunnel", "exec to first connection, median", "all starts"],
        rows,
        findings,
    }])
}

/// Whether the agent has a tunnel to build.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Tunnel {
    Off,
    /// No relay can be reached.
    Alone,
}

impl Tunnel {
    fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Alone => "on, no relay in reach",
        }
    }

    fn set(self, options: AgentOptions, node: &Node) -> Result<AgentOptions> {
        let psk = match self {
            Self::Off => return Ok(options),
            Self::Alone => node.write_file("psk", "0123456789abcdef-of-all")?,
        };
        let relay = json!({ "nodeName": "relay", "advertiseAddress": ["192.168.10.250", "198.51.100.1"] });
        Ok(options
            .set("modules.edgeTunnel.enable", true)
            .set("modules.edgeTunnel.psk.path", psk.to_string_lossy().into_owned())
            .set("modules.edgeTunnel.relayNodes", json!([relay])))
    }
}

/// The milliseconds that each start took.
fn starts(services: u32, tunnel: Tunnel, repetitions: u32) -> Result<Vec<f64>> {
    let lab = Lab::new()?;
    let lan = lab.site("lan", &["192.168.10.0/24"])?;
    let (edge, cloud) = (lan.node("edge1", &["10.244.1.0/24"])?, lan.node("cloud", &["10.244.2.0/24"])?);
    let (client, server, store) = (edge.pod("client")?, cloud.pod("server")?, Store::default());
    server.serve(App::Tcp, TARGET_PORT)?;
    store.apply(&Generated { services, endpoints: ENDPOINTS }.documents(true)?)?;
    store.apply(&generated::named(REAL, Transport::Tcp).yaml_with(&Endpoint::of(&server, "cloud"))?)?;
    let target = SocketAddr::new(generated::cluster_ip(REAL), PORT);

    let api = store.serve(&cloud, API_PORT)?;
    let ip = cloud.ips().first().context("a node without an address")?;
    let options = AgentOptions::default()
        .set("kubeAPIConfig.staticDirectory", Value::Null)
        .set("kubeAPIConfig.master", format!("http://{ip}:{API_PORT}"));
    let options = tunnel.set(options, &edge)?;
    let agent = edge.start_agent(&options)?;
    agent.wait_ready(READY)?;
    ensure!(ask(&edge, &["status"])?["services"] == services + 1, "not everything is served");
    ensure!(agent.stop()?.success(), "the agent did not stop in order");
    api.stop()?;

    let mut took = Vec::new();
    for repetition in 1..=repetitions {
        clean(&lab, &edge, &client, target)?;
        let begin = Instant::now();
        let agent = edge.start_agent(&options)?;
        let hasty = client.within(Duration::from_millis(20));
        eventually(DEADLINE, "the first connection", || Ok(hasty.tcp(target)?.name == server.name()))?;
        let elapsed = begin.elapsed();
        agent.stop()?;
        took.push(elapsed.as_secs_f64() * 1e3);
        say(&format!(
            "{services} Services, tunnel {}, start {repetition} of {repetitions}: {elapsed:.1?}",
            tunnel.as_str()
        ));
    }
    Ok(took)
}

/// Takes everything out of the kernel, and makes sure of it.
fn clean(lab: &Lab, edge: &Node, client: &Pod, target: SocketAddr) -> Result<()> {
    let config = lab.directory().join("edge1/agent.yaml");
    let output = edge.agent(&["cleanup", "--config-file", &config.to_string_lossy()]).output(DEADLINE)?;
    ensure!(output.status.success(), "cleanup: {}", String::from_utf8_lossy(&output.stderr));
    ensure!(edge.attached_programs()?.is_empty(), "programs are still attached");
    let attempt = client.within(Duration::from_millis(100)).connect(target)?;
    ensure!(matches!(attempt, Attempt::Failed(_)), "{target} answers without an agent");
    Ok(())
}
