//! A lab with the pods of examples and real agents in it.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::example::Examples;
use crate::lab::agent::{AgentOptions, CONTROL_SOCKET, agent_binary};
use crate::lab::{Lab, Node, Pod};

/// How long an agent may take until it serves, on a slow machine.
const START: Duration = Duration::from_secs(30);

/// What a table is about, while it is up.
#[derive(Debug)]
pub(super) struct Scene {
    lab: Lab,
    places: Vec<Place>,
}

/// A node with a pod for clients, and those of the examples.
#[derive(Debug)]
struct Place {
    node: Node,
    client: Pod,
    pods: Vec<Pod>,
}

impl Scene {
    /// Puts pods onto the nodes and agents beside them, each with `options`, and waits until the agents serve.
    pub(super) fn raise(
        lab: Lab,
        nodes: Vec<Node>,
        examples: &Examples,
        options: impl Fn(&Node, AgentOptions) -> Result<AgentOptions>,
    ) -> Result<Self> {
        let mut places = Vec::new();
        for node in nodes {
            places.push(Place { client: node.pod("client")?, pods: Vec::new(), node });
        }
        for example in examples.pods() {
            let place = places.iter_mut().find(|place| place.node.name() == example.node);
            let place =
                place.with_context(|| format!("{} is on {:?}, which is no node here", example.name, example.node))?;
            let ips: Vec<String> = example.ips.iter().map(ToString::to_string).collect();
            let ips: Vec<&str> = ips.iter().map(String::as_str).collect();
            let pod = place.node.pod_at(&example.name, &ips)?;
            for (app, port) in &example.apps {
                pod.serve(*app, *port)?;
            }
            place.pods.push(pod);
        }
        for (name, text) in examples.files() {
            lab.manifests().write(name, text)?;
        }
        // There is no way out of the lab, and so nobody to ask for other names.
        let dns = serde_json::json!({ "enable": true, "resolvConf": "/dev/null" });
        let usual = AgentOptions::default().set("modules.edgeDNS", dns);
        let start = |place: &Place| place.node.start_agent(&options(&place.node, usual.clone())?);
        let agents = places.iter().map(start).collect::<Result<Vec<_>>>()?;
        for agent in &agents {
            agent.wait_ready(START)?;
        }
        Ok(Self { lab, places })
    }

    /// A node by its name.
    pub(super) fn node(&self, name: &str) -> Result<&Node> {
        self.place(name).map(|place| &place.node)
    }

    /// The pod for clients on a node.
    pub(super) fn client(&self, node: &str) -> Result<&Pod> {
        self.place(node).map(|place| &place.client)
    }

    fn place(&self, node: &str) -> Result<&Place> {
        self.places.iter().find(|place| place.node.name() == node).with_context(|| format!("there is no node {node}"))
    }

    /// How to look around in nodes, with these commands of the agent, and in pods.
    pub(super) fn look_around(&self, commands: &[&str]) -> Result<String> {
        let agent = agent_binary()?;
        let mut text = String::new();
        // Writing to a String cannot fail.
        for Place { node, client, pods } in &self.places {
            let _ = writeln!(text, "\n  node {}: {}", node.name(), node.host().enter_command());
            for command in commands {
                let _ = writeln!(text, "    in it: {} {command} --socket {CONTROL_SOCKET}", agent.display());
            }
            for pod in std::iter::once(client).chain(pods) {
                let _ = writeln!(text, "    pod {}: {}", pod.name(), pod.enter_command());
            }
        }
        let manifests = self.lab.manifests();
        let _ = writeln!(text, "\n  manifests (edit them, the agents follow): {}", manifests.directory().display());
        let _ = write!(text, "  logs: {}", self.lab.directory().join("logs").display());
        Ok(text)
    }

    /// Takes everything down, and tells whether nothing was left behind.
    pub(super) fn close(self) -> Result<()> {
        self.lab.close()
    }
}
