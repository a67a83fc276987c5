//! The demo: the Services of `manifests/examples` in a two-node lab, with real agents and real clients.

mod check;
mod example;
mod table;

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;

use crate::lab::agent::{AgentOptions, CONTROL_SOCKET, agent_binary};
use crate::lab::{Lab, Node, Pod};
use check::Row;
use example::Examples;

/// Raises a two-node lab with real agents, and shows that pods reach Services through them.
#[derive(Debug, Parser)]
#[command(name = "edgemesh-demo", version)]
struct Arguments {
    /// Leaves the lab up until Enter or Ctrl-C, and prints how to look around.
    #[arg(long)]
    keep: bool,
    /// Where the Services and EndpointSlices are.
    #[arg(long, value_name = "DIR", default_value = "manifests/examples")]
    manifests: PathBuf,
}

/// How long an agent may take until it serves, on a slow machine.
const START: Duration = Duration::from_secs(30);

/// Runs the demo with the arguments of this process; fails if any row of its table does.
pub fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say_to(&mut std::io::stderr(), &format!("edgemesh-demo: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Whether all rows passed.
fn run(arguments: &Arguments) -> Result<bool> {
    let examples = Examples::read(&arguments.manifests)?;
    say("Raising a lab: nodes edge1 and edge2 on one LAN, each with pods and an agent of its own ...");
    let demo = Demo::raise(&examples)?;
    let rows = demo.check(&examples);
    say(&table::render(&rows));
    let failed = rows.iter().filter(|row| !row.passed()).count();
    say(&match failed {
        0 => format!("All {} rows passed.", rows.len()),
        _ => format!("{failed} of {} rows failed.", rows.len()),
    });
    if arguments.keep {
        demo.stay()?;
    }
    demo.lab.close()?;
    Ok(failed == 0)
}

struct Demo {
    lab: Lab,
    nodes: [Node; 2],
    pods: Vec<Pod>,
    client: Pod,
}

impl Demo {
    fn raise(examples: &Examples) -> Result<Self> {
        let lab = Lab::new()?;
        let lan = lab.site("lan", &["192.168.10.0/24", "fd00:192:168:10::/64"])?;
        let nodes = [
            lan.node("edge1", &["10.244.1.0/24", "fd00:10:244:1::/64"])?,
            lan.node("edge2", &["10.244.2.0/24", "fd00:10:244:2::/64"])?,
        ];
        let client = nodes[0].pod("client")?;
        let mut pods = Vec::new();
        for example in examples.pods() {
            let node = nodes.iter().find(|node| node.name() == example.node).with_context(|| {
                format!("{} is on the node {:?}; the demo has edge1 and edge2", example.name, example.node)
            })?;
            let ips: Vec<String> = example.ips.iter().map(ToString::to_string).collect();
            let pod = node.pod_at(&example.name, &ips.iter().map(String::as_str).collect::<Vec<_>>())?;
            for (app, port) in &example.apps {
                pod.serve(*app, *port)?;
            }
            pods.push(pod);
        }
        for (name, text) in examples.files() {
            lab.manifests().write(name, text)?;
        }
        // There is no way out of the lab, and so nobody to ask for other names.
        let dns = serde_json::json!({ "enable": true, "resolvConf": "/dev/null" });
        let options = AgentOptions::default().set("modules.edgeDNS", dns);
        let start = |node: &Node| node.start_agent(&options);
        let agents = nodes.iter().map(start).collect::<Result<Vec<_>>>()?;
        for agent in &agents {
            agent.wait_ready(START)?;
        }
        Ok(Self { lab, nodes, pods, client })
    }

    fn check(&self, examples: &Examples) -> Vec<Row> {
        let host = self.nodes[0].host();
        let services = examples.services();
        services
            .iter()
            .flat_map(|service| check::rows(service, "pod", &self.client))
            .chain(services.iter().flat_map(|service| check::rows(service, "host", host)))
            .chain(services.iter().map(|service| check::by_name(service, "pod", &self.client)))
            .collect()
    }

    /// Tells how to look around, and waits for Enter; Ctrl-C ends the process, and the lab with it.
    fn stay(&self) -> Result<()> {
        let agent = agent_binary()?;
        say("\nThe lab stays up. Look around from another terminal, as root:");
        for node in &self.nodes {
            say(&format!("\n  node {}: {}", node.name(), node.host().enter_command()));
            say(&format!("    in it: {}", status_command(&agent)));
        }
        for pod in std::iter::once(&self.client).chain(&self.pods) {
            say(&format!("\n  pod {}: {}", pod.name(), pod.enter_command()));
        }
        let manifests = self.lab.manifests();
        say(&format!("\n  manifests (edit them, the agents follow): {}", manifests.directory().display()));
        say(&format!("  logs: {}", self.lab.directory().join("logs").display()));
        say("\nEnter or Ctrl-C ends the lab.");
        if matches!(std::io::stdin().read(&mut [0_u8]), Ok(0) | Err(_)) {
            // Nobody can press Enter where there is no terminal.
            loop {
                std::thread::park();
            }
        }
        Ok(())
    }
}

fn status_command(agent: &Path) -> String {
    format!("{} status --socket {CONTROL_SOCKET}", agent.display())
}

fn say(text: &str) {
    say_to(&mut std::io::stdout(), text);
}

/// A closed terminal is no reason to leave before the lab is taken down.
fn say_to(out: &mut impl std::io::Write, text: &str) {
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}
