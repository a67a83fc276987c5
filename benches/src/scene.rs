//! A lab with one node and a cluster of some size, in which two Services have a real endpoint.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    App, Lab, Node, Pod, Transport,
    agent::{Agent, AgentOptions},
    manifest::Endpoint,
};
use serde_json::Value;

use crate::{
    generated::{self, Generated, PORT, TARGET_PORT},
    report::say,
};

/// How long an agent may take to become ready, whatever it has to load.
pub(crate) const READY: Duration = Duration::from_secs(120);
/// How many endpoints each Service of a scene has.
pub(crate) const ENDPOINTS: u32 = 3;

/// A ready agent, a client and the server behind two Services of many.
#[derive(Debug)]
pub(crate) struct Scene {
    pub(crate) lab: Lab,
    pub(crate) node: Node,
    pub(crate) client: Pod,
    /// One pod with the addresses of all endpoints of the measured Services.
    pub(crate) server: Pod,
    /// A client and a server on a node without an agent, where no program looks at their calls.
    pub(crate) bare: [Pod; 2],
    pub(crate) services: u32,
    /// The measured Services.
    pub(crate) tcp: Measured,
    pub(crate) udp: Measured,
}

/// A Service with a real endpoint; nothing else tells it from the others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measured {
    pub(crate) transport: Transport,
    number: u32,
}

impl Scene {
    /// Raises it, with `services` in all, and waits until the agent has everything in force.
    pub(crate) fn raise(services: u32) -> Result<Self> {
        let lab = Lab::new()?;
        let lan = lab.site("lan", &["192.168.10.0/24"])?;
        let (node, other) = (lan.node("edge1", &["10.244.1.0/24"])?, lan.node("edge2", &["10.244.2.0/24"])?);
        let client = node.pod("client")?;
        let server = node.pod_at("server", &["10.244.1.10", "10.244.1.11", "10.244.1.12"])?;
        let bare_server = other.pod_at("server", &["10.244.2.10", "10.244.2.11", "10.244.2.12"])?;
        for server in [&server, &bare_server] {
            server.serve(App::Tcp, TARGET_PORT)?;
            server.serve(App::Udp, TARGET_PORT)?;
        }
        let bare = [other.pod("client")?, bare_server];
        let tcp = Measured { transport: Transport::Tcp, number: services / 2 };
        let udp = Measured { transport: Transport::Udp, number: services / 2 + 1 };
        let generated = Generated { services, endpoints: ENDPOINTS };
        generated.write(&lab.manifests(), &[tcp.number, udp.number])?;
        let scene = Self { lab, node, client, server, bare, services, tcp, udp };
        for measured in [tcp, udp] {
            scene.write(measured, &scene.endpoints())?;
        }
        let agent = start_agent(&scene.node)?;
        agent.wait_ready(READY)?;
        check(&scene.node, services, services * ENDPOINTS)?;
        scene.check_path()?;
        say(&format!("{services} Services: the agent is ready"));
        Ok(scene)
    }

    /// The endpoints of the measured Services.
    pub(crate) fn endpoints(&self) -> Vec<Endpoint> {
        Endpoint::of(&self.server, self.node.name())
    }

    /// Writes the manifest of a measured Service, whose file holds nothing else.
    pub(crate) fn write(&self, measured: Measured, endpoints: &[Endpoint]) -> Result<()> {
        let service = generated::named(measured.number, measured.transport);
        let name = generated::name(measured.number);
        self.lab.manifests().write(&name, &service.yaml_with(endpoints)?)
    }

    /// Makes sure that what is measured is what it is taken for: the server, under the address of the Service.
    fn check_path(&self) -> Result<()> {
        for (measured, reply) in
            [(self.tcp, self.client.tcp(self.tcp.address())?), (self.udp, self.client.udp(self.udp.address())?)]
        {
            ensure!(
                reply.name == self.server.name() && reply.peer == measured.address(),
                "{} leads to {} at {}",
                measured.address(),
                reply.name,
                reply.peer
            );
        }
        Ok(())
    }
}

/// Where a server of a scene listens.
pub(crate) fn addresses(server: &Pod) -> Vec<SocketAddr> {
    server.ips().iter().map(|ip| SocketAddr::new(*ip, TARGET_PORT)).collect()
}

impl Measured {
    /// Where the Service answers.
    pub(crate) fn address(self) -> SocketAddr {
        SocketAddr::new(generated::cluster_ip(self.number), PORT)
    }
}

/// Starts the lab's usual agent.
pub(crate) fn start_agent(node: &Node) -> Result<Agent> {
    node.start_agent(&AgentOptions::default())
}

/// Makes sure that the agent serves exactly this much, and that it is all in force.
pub(crate) fn check(node: &Node, services: u32, backends: u32) -> Result<()> {
    let status = ask(node, &["status"])?;
    let number = |pointer: &str| status.pointer(pointer).and_then(Value::as_u64);
    ensure!(
        number("/services") == Some(services.into())
            && number("/frontends") == Some(services.into())
            && number("/backends") == Some(backends.into())
            && number("/dataplane/generation") == number("/dataplane/newest_generation"),
        "the agent should serve {services} Services with {backends} backends, but says: {status:#}"
    );
    Ok(())
}

/// Asks the agent by its command line; returns its JSON.
pub(crate) fn ask(node: &Node, arguments: &[&str]) -> Result<Value> {
    let question = || format!("could not ask the agent for {}", arguments.join(" "));
    let mut all = arguments.to_vec();
    all.extend(["-o", "json"]);
    let output = node.cli(&all).with_context(question)?;
    ensure!(output.status.success(), "{}: {}", question(), String::from_utf8_lossy(&output.stderr).trim());
    serde_json::from_slice(&output.stdout).with_context(question)
}
