//! Whatever is wrong is said in one line with what to do, and the rest goes on.

use std::time::Duration;

use anyhow::{Result, ensure};
use edgemesh_tests::lab::{
    App, Capability, Lab, Node, Transport,
    agent::{AgentCommand, AgentOptions},
    eventually,
    manifest::{Endpoint, Service},
};
use serde_json::Value;

use crate::{ECHO, START, TCP_PORT, World, at};

fn a_node() -> Result<Option<(Lab, Node)>> {
    let Some(lab) = Lab::for_test()? else { return Ok(None) };
    let lan = lab.site("lan", &["192.168.10.0/24"])?;
    let node = lan.node("edge1", &["10.244.1.0/24"])?;
    Ok(Some((lab, node)))
}

/// Runs the agent with a changed configuration until it ends by itself: its exit code and what it said.
fn refuses(
    node: &Node,
    change: impl FnOnce(&mut Value),
    prepare: impl for<'a> FnOnce(AgentCommand<'a>) -> AgentCommand<'a>,
) -> Result<(i32, String)> {
    let mut config = node.agent_config();
    change(&mut config);
    let path = node.write_file("bad.yaml", &serde_yaml::to_string(&config)?)?;
    let command = prepare(node.agent(&["--config-file", &path.to_string_lossy()]));
    let output = command.output(Duration::from_secs(20))?;
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!words.contains("panicked"), "a panic: {words}");
    let last = words.lines().last().unwrap_or_default().to_owned();
    ensure!(last.starts_with("error: "), "the last line is no error: {words}");
    Ok((output.status.code().unwrap_or(-1), last))
}

fn as_it_is(command: AgentCommand<'_>) -> AgentCommand<'_> {
    command
}

#[test]
fn each_wrong_start_has_its_line_and_its_exit_code() -> Result<()> {
    let Some((_lab, node)) = a_node()? else { return Ok(()) };
    let (code, line) = refuses(&node, |config| config["modules"]["edgeProxi"] = Value::Null, as_it_is)?;
    assert_eq!(code, 78, "{line}");
    assert!(line.contains("modules.edgeProxi") && line.contains("edgeProxy"), "{line}");

    let (code, line) = refuses(&node, |config| config["modules"]["edgeProxy"]["enable"] = "perhaps".into(), as_it_is)?;
    assert_eq!(code, 78, "{line}");
    assert!(line.contains("modules.edgeProxy.enable") && line.contains("bad.yaml:"), "{line}");

    let (code, line) = refuses(&node, |_| {}, |command| command.env_remove("NODE_NAME"))?;
    assert_eq!(code, 78, "{line}");
    assert!(line.contains("NODE_NAME") && line.contains("spec.nodeName"), "{line}");

    let kubeconfig = node.write_file("kubeconfig", "this: [is no kubeconfig")?;
    let (code, line) =
        refuses(&node, |config| config["kubeAPIConfig"] = serde_json::json!({ "kubeConfig": kubeconfig }), as_it_is)?;
    assert_eq!(code, 78, "{line}");
    assert!(line.contains("kubeconfig"), "{line}");

    let (code, line) =
        refuses(&node, |config| config["kubeAPIConfig"]["staticDirectory"] = "/nonexistent".into(), as_it_is)?;
    assert_eq!(code, 78, "{line}");
    assert!(line.contains("/nonexistent"), "{line}");

    let (code, line) = refuses(&node, |_| {}, |command| command.without(&[Capability::BPF, Capability::SYS_ADMIN]))?;
    assert_eq!(code, 77, "{line}");
    assert!(line.contains("CAP_BPF"), "{line}");

    // Without /proc, too: the agent also looks at the mounts of process 1, which are the machine's.
    let no_root = |config: &mut Value| config["modules"]["edgeProxy"]["ebpf"]["cgroupRoot"] = Value::Null;
    let (code, line) = refuses(&node, no_root, |command| command.without_proc())?;
    assert_eq!(code, 71, "{line}");
    assert!(line.contains("cgroup2") && line.contains("cgroupRoot"), "{line}");

    let wrong_root = |config: &mut Value| config["modules"]["edgeProxy"]["ebpf"]["cgroupRoot"] = "/proc".into();
    let (code, line) = refuses(&node, wrong_root, as_it_is)?;
    assert_eq!(code, 71, "{line}");
    assert!(line.contains("/proc"), "{line}");
    Ok(())
}

#[test]
fn a_second_agent_on_a_node_is_refused_and_the_first_goes_on() -> Result<()> {
    let Some((_lab, node)) = a_node()? else { return Ok(()) };
    let first = node.start_agent(&AgentOptions::default())?;
    first.wait_ready(START)?;
    let (code, line) = refuses(&node, |_| {}, as_it_is)?;
    assert_eq!(code, 71, "{line}");
    assert!(line.contains("another agent"), "{line}");
    assert!(node.cli(&["status"])?.status.success());
    Ok(())
}

#[test]
fn a_broken_manifest_is_a_condition_and_everything_else_is_served() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    world.lab.manifests().write("broken", "apiVersion: v1\nkind: Service\nmetadata: {name: [}\n")?;
    let conditions = || -> Result<String> {
        let status: Value = serde_json::from_slice(&world.edge1.cli(&["status", "-o", "json"])?.stdout)?;
        Ok(status["conditions"].to_string())
    };
    eventually(START, "status tells of the broken file", || {
        Ok(conditions()?.contains("ManifestInvalid") && conditions()?.contains("broken.yaml"))
    })?;
    assert_eq!(world.client.tcp(at(ECHO[0], TCP_PORT)?)?.peer, at(ECHO[0], TCP_PORT)?);
    world.write(&["b"])?;
    eventually(START, "changes of good files are followed", || {
        Ok(world.client.spread(Transport::Tcp, at(ECHO[0], TCP_PORT)?, 20, 1)?.names.len() == 1)
    })?;
    world.lab.manifests().remove("broken")?;
    eventually(START, "the condition is cleared", || Ok(conditions()? == "[]"))
}

#[test]
fn an_api_server_that_refuses_is_a_condition_and_the_agent_stays_and_stops_in_order() -> Result<()> {
    let Some((_lab, node)) = a_node()? else { return Ok(()) };
    // Nothing listens there, in the node's own namespace.
    let options = AgentOptions::default()
        .set("kubeAPIConfig.staticDirectory", Value::Null)
        .set("kubeAPIConfig.master", "http://127.0.0.1:6443");
    let agent = node.start_agent(&options)?;
    eventually(START, "status tells of the API server", || {
        let output = node.cli(&["status"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.contains("ApiServerUnreachable") && text.contains("127.0.0.1:6443") && text.contains("NOT READY"))
    })?;
    assert!(agent.stop()?.success(), "{}", agent.log()?);
    Ok(())
}

#[test]
fn a_foreign_device_of_our_name_is_a_condition_and_is_left_alone() -> Result<()> {
    let Some((_lab, node)) = a_node()? else { return Ok(()) };
    node.ip(&["link", "add", "edgemesh0", "type", "vxlan", "id", "7", "dstport", "4789", "local", "192.168.10.2"])?;
    let agent = node.start_agent(&AgentOptions::default())?;
    agent.wait_ready(START)?;
    let status = node.cli(&["status"])?;
    let text = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(text.contains("DeviceMissing edgemesh0") && text.contains("neither a dummy nor a bridge"), "{text}");
    agent.stop()?;
    let config = node.write_file("agent.yaml", &serde_yaml::to_string(&node.agent_config())?)?;
    node.agent(&["cleanup", "--config-file", &config.to_string_lossy()]).output(Duration::from_secs(10))?;
    assert!(node.ip(&["link", "show", "edgemesh0"])?.contains("edgemesh0"));
    Ok(())
}

#[test]
fn a_full_map_is_a_condition_and_what_found_room_is_served() -> Result<()> {
    let Some((lab, node)) = a_node()? else { return Ok(()) };
    let (client, server) = (node.pod("client")?, node.pod("server")?);
    server.serve(App::Tcp, 7001)?;
    let backend = [Endpoint::new(server.ips()[0], "edge1")];
    for n in 1..=6 {
        let name = format!("s{n}");
        let service = Service::new(&name, &[&format!("10.96.7.{n}")]).port("tcp", Transport::Tcp, 80, 7001);
        lab.manifests().write(&name, &service.yaml_with(&backend)?)?;
    }
    let agent = node.start_agent(&AgentOptions::default().set("modules.edgeProxy.ebpf.maxFrontends", 4))?;
    agent.wait_ready(START)?;
    let status = node.cli(&["status"])?;
    let text = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(text.contains("DataplaneFull") && text.contains("2 entries") && text.contains("maxFrontends"), "{text}");
    let served = |n: u32| {
        Ok::<_, anyhow::Error>(client.within(Duration::from_millis(300)).tcp(at(&format!("10.96.7.{n}"), 80)?).is_ok())
    };
    let served: Vec<bool> = (1..=6).map(served).collect::<Result<_>>()?;
    assert_eq!(served, [true, true, true, true, false, false]);
    // Room again: the rest is served without a restart.
    lab.manifests().remove("s1")?;
    lab.manifests().remove("s2")?;
    eventually(START, "the condition is cleared", || {
        Ok(!String::from_utf8_lossy(&node.cli(&["status"])?.stdout).contains("DataplaneFull"))
    })?;
    assert_eq!(client.tcp(at("10.96.7.6", 80)?)?.name, "server");
    Ok(())
}
