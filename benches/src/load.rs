//! A full cluster: from start to ready, one change, and the memory for it.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use edgemesh_tests::lab::{DEADLINE, Lab, agent::Agent, eventually};

use crate::{
    Effort,
    generated::Generated,
    memory::{Memory, mib},
    report::{Table, millis, say, verdict, whole},
    scene::{READY, check, start_agent},
    spread::Spread,
};

const CLUSTER: Generated = Generated { services: 10_000, endpoints: 10 };
/// The aims: milliseconds until ready and for one change, MiB resident.
const LOAD_AIM: f64 = 2000.0;
const CHANGE_AIM: f64 = 5.0;
const MEMORY_AIM: f64 = 60.0;
/// Many times what a change takes.
const SETTLE: Duration = Duration::from_millis(150);

/// Measures agents that start with empty maps.
pub(crate) fn measure(effort: Effort) -> Result<Vec<Table>> {
    let (repetitions, changes) = effort.pick((1, 5), (5, 20));
    let lab = Lab::new()?;
    let lan = lab.site("lan", &["192.168.10.0/24"])?;
    let (mut took, mut changed, mut changed_in_ten) = (Vec::new(), Vec::new(), Vec::new());
    let (mut ready, mut after) = (Vec::new(), Vec::new());
    for repetition in 1..=repetitions {
        CLUSTER.write(&lab.manifests(), &[])?;
        // A node of its own, so that no agent adopts anything of the one before.
        let node = lan.node(&format!("edge{repetition}"), &[&format!("10.244.{repetition}.0/24")])?;
        let begin = Instant::now();
        let agent = start_agent(&node)?;
        agent.wait_ready(READY)?;
        let elapsed = begin.elapsed();
        took.push(elapsed.as_secs_f64() * 1e3);
        check(&node, CLUSTER.services, CLUSTER.services * CLUSTER.endpoints)?;
        ready.push(Memory::of(&agent)?);
        let manifests = lab.manifests();
        time_change(&agent, || CLUSTER.write_single(&manifests, false))?;
        for change in 0..changes {
            changed.push(time_change(&agent, || CLUSTER.write_single(&manifests, change % 2 == 0))?);
            let service = change * (CLUSTER.services / changes);
            changed_in_ten.push(time_change(&agent, || CLUSTER.move_endpoint(&manifests, service).map(drop))?);
        }
        after.push(Memory::of(&agent)?);
        agent.stop()?;
        manifests.remove("single")?;
        say(&format!("agent {repetition} of {repetitions}: ready after {elapsed:.1?}"));
    }
    let row = |what: &str, samples: Vec<f64>, unit: fn(f64) -> String| -> Result<Vec<String>> {
        let spread = Spread::of(samples)?;
        Ok(vec![what.to_owned(), unit(spread.median), whole(&spread, unit)])
    };
    let median = |samples: &[f64]| -> Result<f64> { Ok(Spread::of(samples.iter().copied())?.median) };
    let resident = |memory: &[Memory]| memory.iter().map(|memory| memory.resident).collect::<Vec<_>>();
    let findings = vec![
        verdict("start to ready", median(&took)?, LOAD_AIM, millis),
        verdict("one change", median(&changed)?, CHANGE_AIM, millis),
        verdict("resident after the changes", median(&resident(&after))?, MEMORY_AIM, mib),
    ];
    Ok(vec![Table {
        title: "A full cluster",
        method: format!(
            "{} Services with {} endpoints each from a manifest directory; agents started anew ({repetitions}) on nodes \
             where nothing was left to adopt. Until /readyz answers 200: everything is in force in the kernel. Then \
             endpoints move, one after the other, {changes} in a file of one Service and {changes} in files of ten: from the \
             notification of the changed file until the change is in force, by the agent's metric \
             `edgemesh_dataplane_change_seconds`.",
            CLUSTER.services, CLUSTER.endpoints
        ),
        head: vec!["figure", "median", "all"],
        rows: vec![
            row("start to ready", took, millis)?,
            row("one change", changed, millis)?,
            row("one change, in a file of ten Services", changed_in_ten, millis)?,
            row("resident when ready (VmRSS)", resident(&ready), mib)?,
            row("resident after the changes (VmRSS)", resident(&after), mib)?,
            row("peak (VmHWM)", after.iter().map(|memory| memory.peak).collect(), mib)?,
        ],
        findings,
    }])
}

/// Makes a change; tells how many milliseconds the agent took, by its own account.
fn time_change(agent: &Agent, change: impl FnOnce() -> Result<()>) -> Result<f64> {
    let before = Changes::of(agent)?;
    change()?;
    // Rendering the metrics of so many Services would keep the agent from what it is asked about.
    thread::sleep(SETTLE);
    let mut after = before;
    eventually(DEADLINE, "a change to be in force", || {
        after = Changes::of(agent)?;
        Ok(after.count > before.count)
    })?;
    Ok((after.seconds - before.seconds) * 1e3 / (after.count - before.count))
}

/// The changes an agent has made so far.
#[derive(Clone, Copy, Debug)]
struct Changes {
    count: f64,
    /// All together.
    seconds: f64,
}

impl Changes {
    fn of(agent: &Agent) -> Result<Self> {
        let text = agent.metrics()?;
        let value = |name: &str| -> Result<f64> {
            let name = format!("edgemesh_dataplane_change_seconds_{name} ");
            let value = text.lines().find_map(|line| line.strip_prefix(&*name)?.parse().ok());
            value.with_context(|| format!("the metrics have no {name}"))
        };
        Ok(Self { count: value("count")?, seconds: value("sum")? })
    }
}
