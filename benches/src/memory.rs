//! The agent's memory with a cluster of usual size.

use anyhow::{Context as _, Result};
use edgemesh_tests::lab::{DEADLINE, Lab, Node, agent::Agent, eventually};

use crate::{
    Effort,
    generated::{self, Generated},
    report::{Table, say, verdict, whole},
    scene::{READY, ask, check, start_agent},
    spread::Spread,
};

const CLUSTER: Generated = Generated { services: 1000, endpoints: 5 };
/// The aim for the resident memory, in MiB.
const AIM: f64 = 25.0;
/// How many endpoints move, one after the other.
const CHANGES: u32 = 100;

/// What proc_pid_status(5) tells, in MiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// Now.
    pub(crate) resident: f64,
    /// At most so far.
    pub(crate) peak: f64,
}

impl Memory {
    /// # Errors
    ///
    /// When the agent is gone.
    pub(crate) fn of(agent: &Agent) -> Result<Self> {
        let path = format!("/proc/{}/status", agent.pid());
        let status = std::fs::read_to_string(&path).with_context(|| format!("could not read {path}"))?;
        let field = |name: &str| -> Result<f64> {
            let value = status.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
            let kib = value.and_then(|value| value.parse::<f64>().ok());
            Ok(kib.with_context(|| format!("{path} has no {name}"))? / 1024.0)
        };
        Ok(Self { resident: field("VmRSS:")?, peak: field("VmHWM:")? })
    }
}

/// Measures agents that start anew, after their start and after changes.
pub(crate) fn measure(effort: Effort) -> Result<Vec<Table>> {
    let repetitions = effort.pick(1, 3);
    let changes = effort.pick(10, CHANGES);
    let lab = Lab::new()?;
    let lan = lab.site("lan", &["192.168.10.0/24"])?;
    let (mut ready, mut changed) = (Vec::new(), Vec::new());
    for repetition in 1..=repetitions {
        CLUSTER.write(&lab.manifests(), &[])?;
        // A node of its own, so that no agent adopts anything of the one before.
        let node = lan.node(&format!("edge{repetition}"), &[&format!("10.244.{repetition}.0/24")])?;
        let agent = start_agent(&node)?;
        agent.wait_ready(READY)?;
        check(&node, CLUSTER.services, CLUSTER.services * CLUSTER.endpoints)?;
        ready.push(Memory::of(&agent)?);
        for change in 0..changes {
            move_endpoint(&lab, &node, change * (CLUSTER.services / CHANGES))?;
        }
        check(&node, CLUSTER.services, CLUSTER.services * CLUSTER.endpoints)?;
        changed.push(Memory::of(&agent)?);
        agent.stop()?;
        say(&format!("agent {repetition} of {repetitions}: {:.1} MiB", Memory::resident_of(&changed)?.max));
    }
    let row = |what: &str, of: &[Memory]| -> Result<Vec<String>> {
        let (resident, peak) = (Memory::resident_of(of)?, Spread::of(of.iter().map(|memory| memory.peak))?);
        Ok(vec![what.to_owned(), mib(resident.median), whole(&resident, mib), mib(peak.median)])
    };
    let after = Memory::resident_of(&changed)?;
    Ok(vec![Table {
        title: "The agent's memory",
        method: format!(
            "{} Services with {} endpoints each from a manifest directory, agents started anew ({}); then {changes} \
             endpoints move, one after the other. Memory of the agent's process; the eBPF maps are the kernel's.",
            CLUSTER.services, CLUSTER.endpoints, repetitions
        ),
        head: vec!["state", "resident (VmRSS), median", "all agents", "peak so far (VmHWM), median"],
        rows: vec![row("ready", &ready)?, row(&format!("after {changes} changes"), &changed)?],
        findings: vec![verdict("resident after the changes", after.median, AIM, mib)],
    }])
}

impl Memory {
    fn resident_of(all: &[Self]) -> Result<Spread> {
        Spread::of(all.iter().map(|memory| memory.resident))
    }
}

/// Changes one endpoint and waits until the agent serves the change, so that each makes a table of its own.
fn move_endpoint(lab: &Lab, node: &Node, service: u32) -> Result<()> {
    let address = CLUSTER.move_endpoint(&lab.manifests(), service)?.to_string();
    let name = format!("default/{}", generated::name(service));
    eventually(DEADLINE, &format!("{address} to be an endpoint of {name}"), || {
        let report = ask(node, &["backends", &name])?;
        let endpoints = report.pointer("/ports/0/endpoints").and_then(|endpoints| endpoints.as_array());
        Ok(endpoints.context("the agent tells no endpoints")?.iter().any(|endpoint| endpoint["address"] == address))
    })
}

/// `12.3 MiB`
pub(crate) fn mib(value: f64) -> String {
    format!("{value:.1} MiB")
}
