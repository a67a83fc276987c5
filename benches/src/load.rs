//! From start to ready with a full cluster.

use std::time::Instant;

use anyhow::Result;
use edgemesh_tests::lab::Lab;

use crate::{
    Effort,
    generated::Generated,
    memory::{Memory, mib},
    report::{Table, millis, say, whole},
    scene::{READY, check, start_agent},
    spread::Spread,
};

const CLUSTER: Generated = Generated { services: 10_000, endpoints: 10 };

/// Measures agents that start with empty maps.
pub(crate) fn measure(effort: Effort) -> Result<Vec<Table>> {
    let repetitions = effort.pick(1, 5);
    let lab = Lab::new()?;
    let lan = lab.site("lan", &["192.168.10.0/24"])?;
    CLUSTER.write(&lab.manifests(), &[])?;
    let (mut took, mut memory) = (Vec::new(), Vec::new());
    for repetition in 1..=repetitions {
        // A node of its own, so that no agent adopts anything of the one before.
        let node = lan.node(&format!("edge{repetition}"), &[&format!("10.244.{repetition}.0/24")])?;
        let begin = Instant::now();
        let agent = start_agent(&node)?;
        agent.wait_ready(READY)?;
        let elapsed = begin.elapsed();
        took.push(elapsed.as_secs_f64() * 1e3);
        check(&node, CLUSTER.services, CLUSTER.services * CLUSTER.endpoints)?;
        memory.push(Memory::of(&agent)?);
        agent.stop()?;
        say(&format!("agent {repetition} of {repetitions}: ready after {elapsed:.1?}"));
    }
    let row = |what: &str, samples: Vec<f64>, unit: fn(f64) -> String| -> Result<Vec<String>> {
        let spread = Spread::of(samples)?;
        Ok(vec![what.to_owned(), unit(spread.median), whole(&spread, unit)])
    };
    Ok(vec![Table {
        title: "A full cluster",
        method: format!(
            "{} Services with {} endpoints each from a manifest directory; agents started anew ({repetitions}) on nodes \
             where nothing was left to adopt. Until /readyz answers 200: everything is in force in the kernel.",
            CLUSTER.services, CLUSTER.endpoints
        ),
        head: vec!["figure", "median", "all agents"],
        rows: vec![
            row("start to ready", took, millis)?,
            row("resident when ready (VmRSS)", memory.iter().map(|memory| memory.resident).collect(), mib)?,
            row("peak (VmHWM)", memory.iter().map(|memory| memory.peak).collect(), mib)?,
        ],
        findings: Vec::new(),
    }])
}
