//! The canary, the probes, and what stands in the way of translation.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use edgemesh_tests::lab::{
    App, Capability, Lab, Node, Transport,
    agent::{Agent, AgentOptions, PIN_DIRECTORY},
    eventually,
    hooks::{self, Foreign, Says},
    manifest::{Endpoint, Service},
};
use serde_json::Value;

use crate::{START, at};

const VIP: &str = "10.96.9.1";
/// The canary and the look around every second.
const PERIOD: &str = "modules.edgeProxy.ebpf.canaryPeriod";

/// A node with a ready agent that looks at its health every second.
fn watched() -> Result<Option<(Lab, Node, Agent)>> {
    let Some(lab) = Lab::for_test()? else { return Ok(None) };
    let node = lab.site("lan", &["192.168.10.0/24"])?.node("edge1", &["10.244.1.0/24"])?;
    let server = node.pod("server")?;
    server.serve(App::Tcp, 7001)?;
    let service = Service::new("web", &[VIP]).port("tcp", Transport::Tcp, 80, 7001);
    lab.manifests().write("web", &service.yaml_with(&[Endpoint::new(server.ips()[0], "edge1")])?)?;
    let agent = node.start_agent(&AgentOptions::default().set(PERIOD, 1))?;
    agent.wait_ready(START)?;
    Ok(Some((lab, node, agent)))
}

fn status(node: &Node) -> Result<Value> {
    let output = node.cli(&["status", "-o", "json"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The message of a condition, if it holds.
fn condition(node: &Node, reason: &str) -> Result<Option<String>> {
    let status = status(node)?;
    let all = status["conditions"].as_array().context("no conditions")?;
    let found = all.iter().find(|condition| condition["reason"] == reason);
    Ok(found.map(|condition| condition["message"].as_str().unwrap_or_default().to_owned()))
}

fn condition_comes(node: &Node, reason: &str, parts: &[&str]) -> Result<()> {
    eventually(START, &format!("the condition {reason}"), || Ok(condition(node, reason)?.is_some()))?;
    let message = condition(node, reason)?.unwrap_or_default();
    ensure!(parts.iter().all(|part| message.contains(part)), "{reason} lacks one of {parts:?}: {message}");
    Ok(())
}

fn condition_goes(node: &Node, reason: &str) -> Result<()> {
    eventually(START, &format!("the end of the condition {reason}"), || Ok(condition(node, reason)?.is_none()))
}

fn canary_cgroup(node: &Node) -> PathBuf {
    node.cgroup().join("edgemesh-canary")
}

/// The agent's pinned tables and links, seen from outside the node.
fn pins(node: &Node) -> Result<PathBuf> {
    let all = PathBuf::from(format!("/proc/{}/root{PIN_DIRECTORY}", node.pause_process()));
    let mut versions = std::fs::read_dir(&all)?.filter_map(|entry| Some(entry.ok()?.path()));
    versions.find(|path| path.join("link_connect4").exists()).context("no links are pinned")
}

fn served(node: &Node) -> Result<bool> {
    Ok(node.host().within(Duration::from_millis(300)).tcp(at(VIP, 80)?).is_ok())
}

#[test]
fn the_canary_passes_and_status_shows_it_and_the_tier() -> Result<()> {
    let Some((_lab, node, agent)) = watched()? else { return Ok(()) };
    eventually(START, "the canary has passed three times", || {
        let canary = status(&node)?["dataplane"]["canary"].clone();
        ensure!(canary["failed_runs"] == 0, "it failed: {canary}");
        Ok(canary["runs"].as_u64() >= Some(3) && canary["passed_at"].as_u64().is_some())
    })?;
    let now = status(&node)?;
    assert_eq!(now["dataplane"]["standing"], serde_json::json!({"tier": "full", "losses": []}));
    assert_eq!(now["conditions"], serde_json::json!([]));
    assert_eq!((&now["services"], &now["frontends"]), (&1.into(), &1.into()), "the canary's is no Service");
    let text = String::from_utf8_lossy(&node.cli(&["status"])?.stdout).into_owned();
    assert!(text.contains("tier full") && text.contains("canary: passed"), "{text}");
    assert!(canary_cgroup(&node).exists());
    agent.stop()?;
    assert!(!canary_cgroup(&node).exists(), "the canary's cgroup is gone with its agent");
    Ok(())
}

#[test]
fn a_program_that_refuses_calls_makes_the_node_unready_with_the_reason_until_it_is_gone() -> Result<()> {
    let Some((_lab, node, agent)) = watched()? else { return Ok(()) };
    eventually(START, "the canary has run", || Ok(canary_cgroup(&node).exists()))?;
    let foreign = Foreign::attach(&canary_cgroup(&node), "firewall", Says::No)?;
    condition_comes(
        &node,
        "CanaryFailed",
        &["TCP over IPv4: connect: Operation not permitted", "firewall", "169.254.96.16:1"],
    )?;
    let ready = node.host().http_get("127.0.0.1:20008".parse()?, "/readyz", 1)?;
    let reply = ready.replies.first().context("no answer")?;
    assert_eq!(reply.status, 503);
    assert!(reply.body.contains("waiting for the canary") && reply.body.contains("firewall"), "{}", reply.body);
    condition_comes(&node, "ForeignProgram", &["firewall", "connect4", "before ours", "edgemesh-canary"])?;
    assert!(served(&node)?, "all others are served as before");

    drop(foreign);
    condition_goes(&node, "CanaryFailed")?;
    condition_goes(&node, "ForeignProgram")?;
    agent.wait_ready(START)
}

#[test]
fn a_foreign_program_is_named_with_its_owner_and_its_place() -> Result<()> {
    let Some((_lab, node, _agent)) = watched()? else { return Ok(()) };
    let foreign = Foreign::attach(node.cgroup(), "cil_sock4_conne", Says::Yes)?;
    condition_comes(&node, "ForeignProgram", &["cil_sock4_conne", "connect4", "after ours", "socketLB"])?;
    assert_eq!(status(&node)?["ready"], true, "it does no harm");
    drop(foreign);
    condition_goes(&node, "ForeignProgram")
}

#[test]
fn a_program_of_ours_that_is_detached_by_force_is_attached_again() -> Result<()> {
    let Some((_lab, node, agent)) = watched()? else { return Ok(()) };
    assert!(served(&node)?);
    let before = node.attached_programs()?.len();
    for name in ["connect4", "getpeername4"] {
        hooks::detach(&pins(&node)?.join(format!("link_{name}")))?;
    }
    eventually(START, "both are back", || Ok(node.attached_programs()?.len() == before))?;
    assert!(served(&node)?);
    assert!(agent.log()?.contains("it is attached again"), "{}", agent.log()?);
    agent.wait_ready(START)
}

#[test]
fn pins_that_somebody_removed_stay_removed_and_the_agent_says_so() -> Result<()> {
    let Some((_lab, node, _agent)) = watched()? else { return Ok(()) };
    let config = node.write_file("agent.yaml", &serde_yaml::to_string(&node.agent_config())?)?;
    std::fs::remove_file(pins(&node)?.join("link_connect4"))?;
    condition_comes(&node, "ProgramsDetached", &["connect4", "restart the agent"])?;
    let waiting = status(&node)?["waiting_for"].to_string();
    assert!(waiting.contains("the eBPF programs"), "{waiting}");
    assert!(!served(&node)?);
    let cleanup = ["cleanup", "--force", "--config-file", &config.to_string_lossy()];
    assert!(node.agent(&cleanup).output(START)?.status.success());
    assert_eq!(node.attached_programs()?, Vec::<u32>::new());
    Ok(())
}

#[test]
fn another_agent_on_the_same_cgroup_is_told_of() -> Result<()> {
    let Some((_lab, node, first)) = watched()? else { return Ok(()) };
    let options = AgentOptions::default()
        .set("commonConfig.controlSocket", "/run/edgemesh/second.sock")
        .set("commonConfig.adminAddress", "")
        .set("modules.edgeProxy.ebpf.pinDirectory", "/sys/fs/bpf/second");
    let second = node.start_agent(&options)?;
    condition_comes(&node, "AnotherAgent", &["pins elsewhere", "connect4"])?;
    assert!(condition(&node, "ForeignProgram")?.is_none());
    second.stop()?;
    first.wait_ready(START)
}

#[test]
fn other_proxies_are_told_by_their_chains() -> Result<()> {
    let Some((_lab, node, _agent)) = watched()? else { return Ok(()) };
    for iptables in ["iptables-nft", "iptables-legacy"] {
        for (chain, table, reason) in [
            ("KUBE-SERVICES", "nat", "KubeProxyPresent"),
            ("KUBE-PROXY-CANARY", "mangle", "KubeProxyPresent"),
            ("KUBE-PORTALS-CONTAINER", "nat", "EdgeMeshGoPresent"),
        ] {
            node.tool(iptables, &["-t", table, "-N", chain])?;
            condition_comes(&node, reason, &[chain, table])?;
            node.tool(iptables, &["-t", table, "-X", chain])?;
            condition_goes(&node, reason)?;
        }
    }
    assert_eq!(status(&node)?["ready"], true);
    Ok(())
}

#[test]
fn the_canary_can_be_switched_off_and_cleanup_takes_the_cgroup_of_an_earlier_one() -> Result<()> {
    let Some((_lab, node, agent)) = watched()? else { return Ok(()) };
    eventually(START, "the canary has run", || Ok(canary_cgroup(&node).exists()))?;
    agent.kill()?;
    let second = node.start_agent(&AgentOptions::default().set(PERIOD, 0))?;
    second.wait_ready(START)?;
    assert_eq!(status(&node)?["dataplane"]["canary"], Value::Null);
    assert!(served(&node)?);
    second.stop()?;
    let config = node.write_file("agent.yaml", &serde_yaml::to_string(&node.agent_config())?)?;
    let output = node.agent(&["cleanup", "--config-file", &config.to_string_lossy()]).output(START)?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("edgemesh-canary"));
    assert!(!canary_cgroup(&node).exists());
    Ok(())
}

#[test]
fn probe_tells_what_the_kernel_offers_and_what_is_in_the_way() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let node = lab.site("lan", &["192.168.10.0/24"])?.node("edge1", &["10.244.1.0/24"])?;
    let config = node.write_file("agent.yaml", &serde_yaml::to_string(&node.agent_config())?)?;
    let config = config.to_string_lossy();
    let probe = ["probe", "--config-file", &config];

    let output = node.agent(&probe).output(START)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    assert!(text.contains("Tier: eBPF, full") && !text.contains(" NO "), "{text}");
    let left: Vec<_> = std::fs::read_dir(node.cgroup())?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("edgemesh-"))
        .collect();
    assert_eq!(left, [""; 0]);

    for (capabilities, words) in [
        (&[Capability::BPF, Capability::SYS_ADMIN][..], "missing here: CAP_BPF"),
        (&[Capability::PERFMON, Capability::SYS_ADMIN][..], "CAP_PERFMON"),
    ] {
        let output = node.agent(&probe).without(capabilities).output(START)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(77), "{text}");
        assert!(text.contains(words) && text.contains("Tier: none"), "{text}");
    }

    // No configuration is there before an installation. Without /proc, no mount can be found.
    let output = node.agent(&["probe", "--config-file", "/nonexistent"]).without_proc().output(START)?;
    assert_eq!(output.status.code(), Some(71));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("missing: cgroup2"), "{text}");
    let output = node.agent(&["probe", "-o", "json", "--config-file", &config]).output(START)?;
    let answer: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(answer["tier"], "full");
    assert_eq!(answer["features"].as_array().map(Vec::len), Some(22));
    Ok(())
}
