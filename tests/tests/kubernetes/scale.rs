//! A large cluster through the API.

use std::{
    io::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use edgemesh_tests::lab::manifest::Endpoint;

use crate::{Cluster, at, service};

/// Endpoints of each Service.
const ENDPOINTS: u32 = 10;

/// `cargo xtask bench --only api` measures 10,000 Services in release mode.
#[test]
fn services_by_the_thousand_are_listed_in_pages_and_all_served() -> Result<()> {
    let Some(cluster) = Cluster::raise()? else { return Ok(()) };
    let services = services()?;
    let slices = cluster.plane.serves_slices()?;
    let mut documents = String::new();
    for number in 0..services {
        let [high, low] = [(number / 250) as u8, (number % 250 + 1) as u8];
        let service = service(&format!("service-{number:05}"), &format!("10.96.{}.{low}", high + 1));
        // All but one endpoint are on nodes that are not there, and not ready.
        let mut endpoints = cluster.endpoints(&["a"]);
        for endpoint in 1..ENDPOINTS {
            let address = format!("10.{}.{high}.{low}", 128 + endpoint).parse()?;
            endpoints.push(Endpoint::new(address, "far").conditions(false, false, false));
        }
        let text = if slices { service.yaml_with(&endpoints) } else { service.yaml_with_endpoints(&endpoints) };
        documents.push_str(&text?);
    }
    let begun = Instant::now();
    cluster.plane.create_all(&documents)?;
    say(&format!("{services} Services with {ENDPOINTS} endpoints each made in {:.1?}", begun.elapsed()))?;

    let begun = Instant::now();
    let agent = cluster.start_agent()?;
    agent.wait_ready(Duration::from_secs(120))?;
    say(&format!(
        "ready {:.1?} after the start, {:.1} MiB resident, {:.1} MiB at most",
        begun.elapsed(),
        agent.resident_bytes()? as f64 / f64::from(1 << 20),
        agent.peak_bytes()? as f64 / f64::from(1 << 20),
    ))?;
    let status = cluster.status()?;
    // Kubernetes' own comes with every cluster.
    assert_eq!(status["source"]["objects"]["Service"], services + 1, "{status}");
    assert_eq!(status["services"], services + 1, "{status}");
    cluster.expect_no_condition()?;
    for number in [0, services / 2, services - 1] {
        let ip = format!("10.96.{}.{}", number / 250 + 1, number % 250 + 1);
        cluster.expect_answers(at(&ip, 80)?, &["a"])?;
    }
    Ok(())
}

/// 1,200, which is three pages, or EDGEMESH_SCALE_SERVICES.
fn services() -> Result<u32> {
    let Ok(text) = std::env::var("EDGEMESH_SCALE_SERVICES") else { return Ok(1200) };
    text.parse().context("EDGEMESH_SCALE_SERVICES is no number")
}

/// Past the test harness, which shows what a passing test prints to nobody.
fn say(line: &str) -> Result<()> {
    writeln!(std::io::stderr(), "{line}").context("could not write to standard error")
}
