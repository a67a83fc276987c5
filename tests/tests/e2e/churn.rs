//! The promise that sets this data plane apart: endpoints are rewritten all the time, the agent is killed all the time,
//! and no connection fails.
//!
//! `CI=true` runs the full minute of each; otherwise `EDGEMESH_CHURN_SECONDS` says how long (default 6).

#![expect(clippy::print_stdout, reason = "how much was tried is worth knowing, and `--nocapture` shows it")]

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{App, HammerReport, Transport, agent::AgentOptions, eventually, monotonic};

use crate::{START, World, at};

const IP: &str = "10.96.6.1";
/// How often the endpoints are rewritten.
const PERIOD: Duration = Duration::from_millis(10);
/// The promise of the issue.
const FOLLOWS_WITHIN: Duration = Duration::from_millis(100);
/// How often a backend is taken away for good.
const SEGMENTS: u32 = 3;

#[test]
fn no_connection_fails_and_none_goes_astray_while_3_endpoints_are_rewritten_every_10_ms() -> Result<()> {
    churn(3)
}

#[test]
fn no_connection_fails_and_none_goes_astray_while_12_endpoints_are_rewritten_every_10_ms() -> Result<()> {
    churn(12)
}

#[test]
fn no_connection_fails_and_none_goes_astray_while_300_endpoints_are_rewritten_every_10_ms() -> Result<()> {
    churn(300)
}

#[test]
fn no_connection_fails_while_3_endpoints_are_rewritten_and_the_agent_is_killed_every_second() -> Result<()> {
    churn_and_kill(3)
}

#[test]
fn no_connection_fails_while_300_endpoints_are_rewritten_and_the_agent_is_killed_every_second() -> Result<()> {
    churn_and_kill(300)
}

fn churn(size: u16) -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let scene = Scene::raise(&world, size)?;
    let mut late = Vec::new();
    for segment in 0..SEGMENTS {
        let (report, removed) = scene.segment(segment, duration() / SEGMENTS)?;
        let last = report.names.get(scene.gone(segment)).map_or(removed, |seen| seen.last);
        late.push(last.saturating_sub(removed));
    }
    late.sort();
    // The median, as a machine that runs other tests, too, may stand still for longer than that now and then.
    println!("{size} endpoints: the last connections to a removed one came after {late:?}");
    assert!(late[late.len() / 2] <= FOLLOWS_WITHIN && late.iter().all(|late| *late <= 5 * FOLLOWS_WITHIN), "{late:?}");
    Ok(())
}

fn churn_and_kill(size: u16) -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let scene = Scene::raise(&world, size)?;
    let stop = AtomicBool::new(false);
    let kills = thread::scope(|scope| {
        let killer = scope.spawn(|| -> Result<u32> {
            world.agents[0].kill()?;
            let mut kills = 1;
            loop {
                let agent = world.edge1.start_agent(&AgentOptions::default())?;
                if stop.load(Ordering::Relaxed) {
                    // The last one stays, to be waited for.
                    agent.wait_ready(START)?;
                    agent.kill()?;
                    return Ok(kills);
                }
                thread::sleep(Duration::from_secs(1));
                agent.kill()?;
                kills += 1;
            }
        });
        let segments = (0..SEGMENTS).try_for_each(|segment| scene.segment(segment, duration() / SEGMENTS).map(drop));
        stop.store(true, Ordering::Relaxed);
        let kills = killer.join().map_err(|_| anyhow::anyhow!("the killer panicked"))?;
        segments.and(kills)
    })?;
    ensure!(kills >= 3, "the agent was killed only {kills} times");
    Ok(())
}

fn duration() -> Duration {
    let full = std::env::var("CI").is_ok_and(|ci| ci == "true");
    let seconds = std::env::var("EDGEMESH_CHURN_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(if full { 60 } else { 6 }))
}

/// A Service with the pods `a`, `b` and `c` behind it, each with a third of the endpoints.
struct Scene<'a> {
    world: &'a World,
    ports: Vec<u16>,
}

impl<'a> Scene<'a> {
    fn raise(world: &'a World, size: u16) -> Result<Self> {
        let ports: Vec<u16> = (7300..7300 + size / 3).collect();
        for (pod, _) in &world.backends {
            for port in &ports {
                pod.serve(App::Tcp, *port)?;
            }
        }
        let scene = Self { world, ports };
        scene.write("", 0)?;
        let target = at(IP, 80)?;
        eventually(START, "the Service is served", || Ok(world.client.tcp(target).is_ok()))?;
        Ok(scene)
    }

    /// The pod that is out of the Service for a whole segment.
    fn gone(&self, segment: u32) -> &str {
        self.world.backends[segment as usize % 3].0.name()
    }

    /// Two clients connect as fast as they can while all but one pod's endpoints come and go. Returns what they saw, and
    /// when that one was removed.
    fn segment(&self, segment: u32, length: Duration) -> Result<(HammerReport, Duration)> {
        let hammer = self.world.client.hammer(Transport::Tcp, at(IP, 80)?, 2)?;
        let gone = self.gone(segment);
        self.write(gone, 0)?;
        let removed = monotonic();
        let mut rewrites = 0;
        while monotonic() < removed + length {
            thread::sleep(PERIOD);
            rewrites += 1;
            self.write(gone, rewrites)?;
        }
        let report = hammer.stop()?;
        assert_eq!(report.failures, BTreeMap::new(), "of {report:?}");
        let connections: u64 = report.names.values().map(|seen| seen.count).sum();
        let last = report.names.values().map(|seen| seen.last).max().context("nothing answered")?;
        ensure!(last + Duration::from_secs(1) > removed + length, "the clients stood still: {report:?}");
        println!("{} endpoints: {connections} connections, {rewrites} rewrites", self.ports.len() * 3);
        Ok((report, removed))
    }

    /// The endpoints of all pods but `gone`, of which each third one is away in turn.
    fn write(&self, gone: &str, turn: usize) -> Result<()> {
        let mut subsets = String::new();
        for (index, port) in self.ports.iter().enumerate() {
            let mut addresses = String::new();
            for (place, (pod, _)) in self.world.backends.iter().enumerate() {
                if pod.name() != gone && !(index + place + turn).is_multiple_of(3) {
                    write!(addresses, "{{\"ip\":\"{}\"}},", pod.ips()[0])?;
                }
            }
            if !addresses.is_empty() {
                let addresses = addresses.trim_end_matches(',');
                write!(subsets, "{{\"addresses\":[{addresses}],\"ports\":[{{\"port\":{port}}}]}},")?;
            }
        }
        let subsets = subsets.trim_end_matches(',');
        let text = format!(
            "{{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{{\"name\":\"churn\",\"namespace\":\"default\"}},\
             \"spec\":{{\"clusterIP\":\"{IP}\",\"ports\":[{{\"port\":80}}]}}}}\n---\n\
             {{\"apiVersion\":\"v1\",\"kind\":\"Endpoints\",\"metadata\":{{\"name\":\"churn\",\"namespace\":\"default\"}},\
             \"subsets\":[{subsets}]}}\n"
        );
        self.world.lab.manifests().write("churn", &text)
    }
}
