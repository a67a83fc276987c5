//! `edgemesh-agent cleanup` leaves a node as it was before the first agent.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use edgemesh_tests::lab::{Lab, Node, agent::AgentOptions};

use crate::{ECHO, START, TCP_PORT, at, echo};

/// Everything on a node that an agent could leave behind.
fn inventory(node: &Node) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    // Names and addresses only: state, timers and lifetimes change by themselves.
    for (what, fields) in [("link", 1..2), ("address", 1..4)] {
        for line in node.ip(&["-o", what])?.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            all.insert(format!("{what} {}", words.get(fields.clone()).unwrap_or_default().join(" ")));
        }
    }
    for what in [&["route", "show", "table", "all"][..], &["rule"]] {
        for family in ["-4", "-6"] {
            all.extend(node.ip(&[&[family], what].concat())?.lines().map(|line| format!("{} {line}", what[0])));
        }
    }
    let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", node.pause_process()))?;
    all.extend(mounts.lines().filter_map(|line| Some(format!("mount {}", line.split(' ').nth(4)?))));
    all.extend(node.attached_programs()?.into_iter().map(|id| format!("program {id}")));
    for directory in ["/sys/fs/bpf", "/run"] {
        let root = PathBuf::from(format!("/proc/{}/root{directory}", node.pause_process()));
        walk(&root, &mut all)?;
    }
    // The kernel makes those of an interface when it has found that nobody else has them, in its own time.
    all.retain(|line| !line.contains("fe80:") || line.contains("edgemesh"));
    Ok(all)
}

fn walk(directory: &std::path::Path, all: &mut BTreeSet<String>) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        all.insert(format!("file {}", entry.path().display()));
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), all)?;
        }
    }
    Ok(())
}

#[test]
fn cleanup_leaves_nothing_behind() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let lan = lab.site("lan", &["192.168.10.0/24"])?;
    let node = lan.node("edge1", &["10.244.1.0/24", "fd00:10:244:1::/64"])?;
    let client = node.pod("client")?;
    lab.manifests().write("echo", &echo(&ECHO).yaml_with(&[])?)?;
    let before = inventory(&node)?;

    let agent = node.start_agent(&AgentOptions::default().set("modules.edgeTunnel.enable", true))?;
    agent.wait_ready(START)?;
    let during = inventory(&node)?;
    let aliases = ["local 198.18.0.0/16", "local fd6d:e54a:1a5e:a11a::/64", "/v2/lookup_aliases"];
    for wanted in ["edgemesh0", "169.254.96.16", "program", "/v2/FRONTENDS", "agent.sock"].into_iter().chain(aliases) {
        ensure!(during.iter().any(|line| line.contains(wanted)), "the agent made no {wanted}: {during:#?}");
    }
    let config = node.write_file("agent.yaml", &serde_yaml::to_string(&node.agent_config())?)?;
    let cleanup = ["cleanup", "--config-file", &config.to_string_lossy()];

    let refused = node.agent(&cleanup).output(Duration::from_secs(10))?;
    let words = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(69), "{words}");
    assert!(words.contains("an agent is running"), "{words}");

    agent.kill()?;
    let output = node.agent(&cleanup).output(Duration::from_secs(10))?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let after = inventory(&node)?;
    assert_eq!(after.symmetric_difference(&before).collect::<Vec<_>>(), Vec::<&String>::new());
    let attempt = client.within(Duration::from_millis(200)).connect(at(ECHO[0], TCP_PORT)?)?;
    assert_ne!(attempt, edgemesh_tests::lab::Attempt::Failed("ECONNREFUSED".to_owned()), "nothing answers for it now");

    let again = node.agent(&cleanup).output(Duration::from_secs(10))?;
    assert!(again.status.success() && again.stdout == b"nothing to remove\n", "{again:?}");
    Ok(())
}

#[test]
fn cleanup_takes_back_a_bpffs_that_the_agent_mounted_for_its_pins() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let lan = lab.site("lan", &["192.168.10.0/24"])?;
    let node = lan.node("edge1", &["10.244.1.0/24"])?;
    let before = inventory(&node)?;
    let options = AgentOptions::default().set("modules.edgeProxy.ebpf.pinDirectory", "/run/pins/edgemesh");
    let agent = node.start_agent(&options)?;
    agent.wait_ready(START)?;
    ensure!(inventory(&node)?.contains("mount /run/pins/edgemesh"), "no bpffs was mounted");
    agent.stop()?;
    let mut config = node.agent_config();
    config["modules"]["edgeProxy"]["ebpf"]["pinDirectory"] = "/run/pins/edgemesh".into();
    let config = node.write_file("agent.yaml", &serde_yaml::to_string(&config)?)?;
    let output =
        node.agent(&["cleanup", "--config-file", &config.to_string_lossy()]).output(Duration::from_secs(10))?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let after = inventory(&node)?;
    let left: Vec<&String> = after.difference(&before).collect();
    // The parent directory is not ours to judge: others may have come to use it.
    assert!(left.iter().all(|line| line.ends_with("/run/pins")), "{left:?}");
    Ok(())
}

#[test]
fn cleanup_leaves_the_pins_of_others_alone() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let lan = lab.site("lan", &["192.168.10.0/24"])?;
    let node = lan.node("edge1", &["10.244.1.0/24"])?;
    let bpffs = PathBuf::from(format!("/proc/{}/root/sys/fs/bpf", node.pause_process()));
    // The bpffs that everybody uses, named as the place for our pins.
    let others = bpffs.join("cilium");
    std::fs::create_dir(&others)?;
    let options = AgentOptions::default().set("modules.edgeProxy.ebpf.pinDirectory", "/sys/fs/bpf");
    let agent = node.start_agent(&options)?;
    agent.wait_ready(START)?;
    ensure!(bpffs.join("v2/FRONTENDS").exists(), "nothing was pinned");
    agent.stop()?;
    let mut config = node.agent_config();
    config["modules"]["edgeProxy"]["ebpf"]["pinDirectory"] = "/sys/fs/bpf".into();
    let config = node.write_file("agent.yaml", &serde_yaml::to_string(&config)?)?;
    let output =
        node.agent(&["cleanup", "--config-file", &config.to_string_lossy()]).output(Duration::from_secs(10))?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(others.exists());
    assert!(!bpffs.join("v2").exists() && !bpffs.join("sockets-v2").exists());
    Ok(())
}
