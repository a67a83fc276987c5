//! End to end: real agents on the nodes of a lab, real sockets in its pods.

mod affinity;
mod bad_input;
mod change;
mod churn;
mod cleanup;
mod dns;
mod health;
mod mesh;
mod meta_server;
mod nat;
mod nodes;
mod outside;
mod policy;
mod restart;
mod rules;
mod sight;
mod sites;
mod snapshot;
mod translation;

use std::{net::SocketAddr, time::Duration};

use anyhow::Result;
use edgemesh_tests::lab::{
    App, Lab, Node, Pod, Transport,
    agent::{Agent, AgentOptions},
    manifest::{Endpoint, Service},
};

/// How long an agent may take until it is ready, on a machine that builds something else meanwhile.
const START: Duration = Duration::from_secs(30);

/// The ClusterIPs of the Service `echo`, dual stack.
const ECHO: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];
const TCP_PORT: u16 = 7;
const UDP_PORT: u16 = 7;
const HTTP_PORT: u16 = 80;
const WEBSOCKET_PORT: u16 = 81;

/// Two nodes in one LAN, of both families, and a client pod on `edge1`.
struct TwoNodes {
    client: Pod,
    edge1: Node,
    edge2: Node,
    lab: Lab,
}

impl TwoNodes {
    /// None where there is no root, which is said loudly.
    fn raise() -> Result<Option<Self>> {
        let Some(lab) = Lab::for_test()? else { return Ok(None) };
        let lan = lab.site("lan", &["192.168.10.0/24", "fd00:192:168:10::/64"])?;
        let edge1 = lan.node("edge1", &["10.244.1.0/24", "fd00:10:244:1::/64"])?;
        let edge2 = lan.node("edge2", &["10.244.2.0/24", "fd00:10:244:2::/64"])?;
        let client = edge1.pod("client")?;
        Ok(Some(Self { client, edge1, edge2, lab }))
    }
}

/// Two nodes with an agent each; a client pod on `edge1`; the Service `echo` with the backends `a` on `edge1`, `b` and
/// `c` on `edge2`.
struct World {
    // Dropped last, as everything else lives in it.
    client: Pod,
    backends: Vec<(Pod, &'static str)>,
    agents: Vec<Agent>,
    edge1: Node,
    edge2: Node,
    lab: Lab,
}

impl World {
    /// None where there is no root, which is said loudly.
    fn raise() -> Result<Option<Self>> {
        let Some(TwoNodes { client, edge1, edge2, lab }) = TwoNodes::raise()? else { return Ok(None) };
        let backends = vec![(edge1.pod("a")?, "edge1"), (edge2.pod("b")?, "edge2"), (edge2.pod("c")?, "edge2")];
        for (pod, _) in &backends {
            pod.serve(App::Tcp, 7001)?;
            pod.serve(App::Udp, 7002)?;
            pod.serve(App::Http, 7003)?;
            pod.serve(App::WebSocket, 7004)?;
        }
        let mut world = Self { client, backends, agents: Vec::new(), edge1, edge2, lab };
        world.write(&["a", "b", "c"])?;
        for node in [&world.edge1, &world.edge2] {
            world.agents.push(node.start_agent(&AgentOptions::default())?);
        }
        for agent in &world.agents {
            agent.wait_ready(START)?;
        }
        Ok(Some(world))
    }

    /// The Service `echo` with these of its backends.
    fn write(&self, names: &[&str]) -> Result<()> {
        let endpoints: Vec<Endpoint> = self
            .backends
            .iter()
            .filter(|(pod, _)| names.contains(&pod.name()))
            .flat_map(|(pod, node)| Endpoint::of(pod, node))
            .collect();
        self.lab.manifests().write("echo", &echo(&ECHO).yaml_with(&endpoints)?)
    }

    /// Client and host of its node: the two places a connection is made from.
    fn clients(&self) -> [&Pod; 2] {
        [&self.client, self.edge1.host()]
    }
}

/// A Service with every protocol the backends speak.
fn echo(ips: &[&str]) -> Service {
    Service::new("echo", ips)
        .port("tcp", Transport::Tcp, TCP_PORT, 7001)
        .port("udp", Transport::Udp, UDP_PORT, 7002)
        .port("http", Transport::Tcp, HTTP_PORT, 7003)
        .port("websocket", Transport::Tcp, WEBSOCKET_PORT, 7004)
}

fn at(ip: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(ip.parse()?, port))
}
