//! The agent dies, is stopped, comes back: traffic does not notice.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::Result;
use edgemesh_tests::lab::{Transport, agent::AgentOptions, eventually};
use serde_json::Value;

use crate::{ECHO, START, TCP_PORT, UDP_PORT, World, at};

#[test]
fn killing_and_starting_the_agent_changes_nothing_for_connections_old_or_new() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let (tcp, udp) = (at(ECHO[0], TCP_PORT)?, at(ECHO[0], UDP_PORT)?);
    let running = [world.client.open(Transport::Tcp, tcp)?, world.client.open(Transport::Udp, udp)?];
    let names = [running[0].exchange()?.name, running[1].exchange()?.name];
    let hammer = world.client.hammer(Transport::Tcp, tcp, 1)?;

    world.agents[0].kill()?;
    for _ in 0..20 {
        assert_eq!(world.client.tcp(tcp)?.peer, tcp, "translation goes on without the agent");
    }
    let again = world.edge1.start_agent(&AgentOptions::default())?;
    again.wait_ready(START)?;

    for (connection, name) in running.iter().zip(&names) {
        let reply = connection.exchange()?;
        assert_eq!(reply.name, *name);
        assert!([tcp, udp].contains(&reply.peer), "getpeername() is still the ClusterIP: {}", reply.peer);
    }
    let report = hammer.stop()?;
    assert_eq!(report.failures, BTreeMap::new());
    let status: Value = serde_json::from_slice(&world.edge1.cli(&["status", "-o", "json"])?.stdout)?;
    assert_eq!(status["dataplane"]["adopted_frontends"], 8, "{status}");
    assert!(again.log()?.contains("adopted_links=8"), "links are updated in place, not made anew");
    Ok(())
}

#[test]
fn what_changed_while_the_agent_was_away_is_in_force_when_it_is_back() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let target = at(ECHO[0], TCP_PORT)?;
    assert!(world.agents[0].stop()?.success());
    assert_eq!(world.client.tcp(target)?.peer, target, "a stopped agent leaves translation in force, too");
    world.write(&["b"])?;
    let again = world.edge1.start_agent(&AgentOptions::default())?;
    again.wait_ready(START)?;
    let spread = world.client.spread(Transport::Tcp, target, 50, 2)?;
    assert_eq!(spread.names.keys().collect::<Vec<_>>(), ["b"]);
    Ok(())
}

#[test]
fn an_agent_killed_again_and_again_fails_no_connection() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let target = at(ECHO[0], TCP_PORT)?;
    let hammer = world.client.hammer(Transport::Tcp, target, 2)?;
    world.agents[0].kill()?;
    for round in 0..4 {
        let agent = world.edge1.start_agent(&AgentOptions::default())?;
        // Killed at different moments of its start, and once after it.
        match round {
            0 => {}
            1 => eventually(START, "the programs are attached", || Ok(agent.log()?.contains("are attached")))?,
            _ => agent.wait_ready(START)?,
        }
        agent.kill()?;
    }
    let report = hammer.stop()?;
    assert_eq!(report.failures, BTreeMap::new());
    assert_eq!(report.names.len(), 3, "{report:?}");
    Ok(())
}

#[test]
fn another_map_layout_takes_over_without_a_gap() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let (tcp, udp) = (at(ECHO[0], TCP_PORT)?, at(ECHO[0], UDP_PORT)?);
    let running = [world.client.open(Transport::Tcp, tcp)?, world.client.open(Transport::Udp, udp)?];
    let names = [running[0].exchange()?.name, running[1].exchange()?.name];
    let hammer = world.client.hammer(Transport::Tcp, tcp, 2)?;
    // What an agent with another version of the tables would leave: the same, under another number.
    world.agents[0].kill()?;
    let pins = PathBuf::from(format!("/proc/{}/root/sys/fs/bpf/edgemesh", world.edge1.pause_process()));
    std::fs::rename(pins.join("v2"), pins.join("v999"))?;
    let again = world.edge1.start_agent(&AgentOptions::default())?;
    again.wait_ready(START)?;

    assert!(again.log()?.contains("another map layout"), "{}", again.log()?);
    assert!(again.log()?.contains("adopted_links=8"), "its links were switched in place: {}", again.log()?);
    let left: Vec<_> = std::fs::read_dir(&pins)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    assert!(!left.iter().any(|name| name == "v999"), "{left:?}");
    for (connection, name) in running.iter().zip(&names) {
        let reply = connection.exchange()?;
        assert_eq!(reply.name, *name);
        assert!([tcp, udp].contains(&reply.peer), "what open sockets remember is kept: {}", reply.peer);
    }
    world.write(&["b"])?;
    eventually(START, "changes are followed by the new tables", || Ok(world.client.tcp(tcp)?.name == "b"))?;
    let report = hammer.stop()?;
    assert_eq!(report.failures, BTreeMap::new());
    Ok(())
}
