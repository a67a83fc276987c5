//! A full cluster from a real Kubernetes API server.

use std::time::Instant;

use anyhow::{Result, ensure};
use edgemesh_tests::lab::{
    Lab,
    agent::AgentOptions,
    control_plane::{ControlPlane, assets},
};

use crate::{
    Effort,
    generated::Generated,
    memory::{Memory, mib},
    report::{Table, millis, say, verdict, whole},
    scene::{READY, ask},
    spread::Spread,
};

/// The aims: milliseconds until ready, MiB at most.
const READY_AIM: f64 = 5000.0;
const PEAK_AIM: f64 = 120.0;

/// Measures agents that start with empty maps.
pub(crate) fn measure(effort: Effort) -> Result<Vec<Table>> {
    if assets()?.is_none() {
        return Ok(Vec::new());
    }
    let cluster = Generated { services: effort.pick(1000, 10_000), endpoints: 10 };
    let repetitions = effort.pick(1, 5);
    let lab = Lab::new()?;
    let lan = lab.site("lan", &["192.168.10.0/24"])?;
    let plane = ControlPlane::start(&lan.node("master", &["10.244.0.0/24"])?)?;
    let kubeconfig = plane.admin_kubeconfig()?;
    let begin = Instant::now();
    plane.create_all(&cluster.documents(plane.serves_slices()?)?)?;
    say(&format!("{} Services made in {:.0?}", cluster.services, begin.elapsed()));

    let (mut took, mut memory) = (Vec::new(), Vec::new());
    for repetition in 1..=repetitions {
        // A node of its own, so that no agent adopts anything of the one before.
        let node = lan.node(&format!("edge{repetition}"), &[&format!("10.244.{repetition}.0/24")])?;
        let options = AgentOptions::default()
            .set("kubeAPIConfig.staticDirectory", serde_json::Value::Null)
            .set("kubeAPIConfig.kubeConfig", kubeconfig.to_string_lossy().as_ref());
        let begin = Instant::now();
        let agent = node.start_agent(&options)?;
        agent.wait_ready(READY)?;
        let elapsed = begin.elapsed();
        took.push(elapsed.as_secs_f64() * 1e3);
        let status = ask(&node, &["status"])?;
        // And Kubernetes' own Service, with its one endpoint.
        let expected = (cluster.services + 1, cluster.services * cluster.endpoints + 1);
        ensure!(
            (&status["services"], &status["backends"]) == (&expected.0.into(), &expected.1.into()),
            "not everything is served: {status}"
        );
        memory.push(Memory::of(&agent)?);
        agent.stop()?;
        say(&format!("agent {repetition} of {repetitions}: ready after {elapsed:.1?}"));
    }
    let row = |what: &str, samples: Vec<f64>, unit: fn(f64) -> String| -> Result<Vec<String>> {
        let spread = Spread::of(samples)?;
        Ok(vec![what.to_owned(), unit(spread.median), whole(&spread, unit)])
    };
    let peaks: Vec<f64> = memory.iter().map(|memory| memory.peak).collect();
    let findings = vec![
        verdict("start to ready", Spread::of(took.iter().copied())?.median, READY_AIM, millis),
        verdict("peak", Spread::of(peaks.iter().copied())?.median, PEAK_AIM, mib),
    ];
    Ok(vec![Table {
        title: "A full cluster from the API",
        method: format!(
            "{} Services with {} endpoints each in a real kube-apiserver with etcd, on the same machine; agents started \
             anew ({repetitions}) on nodes where nothing was left to adopt, reading over TLS in pages of 500. Until \
             /readyz answers 200: everything is in force in the kernel.",
            cluster.services, cluster.endpoints
        ),
        head: vec!["figure", "median", "all agents"],
        rows: vec![
            row("start to ready", took, millis)?,
            row("resident when ready (VmRSS)", memory.iter().map(|memory| memory.resident).collect(), mib)?,
            row("peak (VmHWM)", peaks, mib)?,
        ],
        findings,
    }])
}
