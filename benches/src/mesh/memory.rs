//! The agents' memory with a mesh of some size and many connections through it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use edgemesh_agent::tunnel::{Host, NodeName, RelayAddress, RelayNode};
use edgemesh_tests::lab::{
    App, Node, Transport,
    agent::Agent,
    eventually,
    manifest::{Endpoint, Service},
};
use serde_json::Value;

use super::{
    REACHES,
    sites::{RELAY, Reach, Sites, first},
    swarm::{self, Swarm},
};
use crate::{
    Effort,
    memory::{Memory, mib},
    report::{Table, say, verdict, whole},
    scene::{READY, ask},
    spread::Spread,
};

/// The aim for the resident memory, in MiB.
const AIM: f64 = 60.0;
const PORT: u16 = 80;
const GREETED: u16 = 7000;
const ECHO: u16 = 7001;
/// Until the near agent has a way to every node.
const REACHED: Duration = Duration::from_secs(120);
/// How far steady memory may move, in MiB, within [`CALM`].
const STEADY: f64 = 0.25;
const CALM: Duration = Duration::from_secs(2);
/// After which it counts as it is.
const LONGEST: Duration = Duration::from_secs(8);

/// How many there are of what takes memory.
#[derive(Clone, Copy)]
struct Size {
    peers: u32,
    streams: u32,
}

/// One agent's memory, and what it has to do.
struct Found {
    reach: Reach,
    agent: &'static str,
    /// Nodes that it is connected to.
    nodes: u64,
    streams: String,
    memory: Vec<Memory>,
}

/// Measures agents that start anew.
pub(super) fn measure(effort: Effort) -> Result<Table> {
    let size = effort.pick(Size { peers: 4, streams: 40 }, Size { peers: 100, streams: 1000 });
    let repetitions = effort.pick(1, 2);
    let mut all: Vec<Found> = Vec::new();
    for repetition in 1..=repetitions {
        for reach in REACHES {
            for found in once(reach, size).with_context(|| format!("memory, {reach}"))? {
                match all.iter_mut().find(|other| (other.reach, other.agent) == (reach, found.agent)) {
                    Some(other) => other.memory.extend(found.memory),
                    None => all.push(found),
                }
            }
            say(&format!("memory {reach}: {repetition} of {repetitions} measured"));
        }
    }
    let (mut rows, mut findings) = (Vec::new(), Vec::new());
    for found in &all {
        let resident = Spread::of(found.memory.iter().map(|memory| memory.resident))?;
        let peak = Spread::of(found.memory.iter().map(|memory| memory.peak))?;
        rows.push(vec![
            found.reach.to_string(),
            found.agent.to_owned(),
            found.nodes.to_string(),
            found.streams.clone(),
            mib(resident.median),
            whole(&resident, mib),
            mib(peak.median),
        ]);
        findings.push(verdict(&format!("{} agent, {}", found.agent, found.reach), resident.median, AIM, mib));
    }
    Ok(Table {
        title: "The tunnel: memory",
        method: format!(
            "{} nodes and an agent with {} connections through its tunnel, spread over all of them, each of which has carried \
             a few bytes and is open. The nodes are tunnels alone, in a process of their own, each with its name, identity \
             and port; the near agent is the one whose pod has connected to a Service with an endpoint on each, the far one \
             that whose pod is connected to from all of them, the relay's agent passes those of the near one on. \
             Connections are opened once nineteen of twenty nodes are reached by the way named. Once \
             memory has been steady for {CALM:?}, or after {LONGEST:?}. Agents started anew ({repetitions}).",
            size.peers, size.streams
        ),
        head: vec![
            "path",
            "agent",
            "nodes",
            "streams",
            "resident (VmRSS), median",
            "all agents",
            "peak so far, median",
        ],
        rows,
        findings,
    })
}

/// The near agent and the far one, and between them the relay.
fn once(reach: Reach, size: Size) -> Result<Vec<Found>> {
    let sites = Sites::raise()?;
    let (near, far) = (sites.node("near", Reach::Lan)?, sites.node("far", Reach::Lan)?);
    let crowd = sites.node("crowd", reach)?;
    let (client, server) = (near.pod("client")?, far.pod("server")?);
    server.serve(App::Echo, ECHO)?;
    sites.serve(Service::new("far", &["10.96.8.1"]).port("echo", Transport::Tcp, PORT, ECHO), &far, &server)?;
    let service = serve_crowd(&sites, &crowd, size.peers)?;
    let agents = [sites.start(&near)?, sites.start(&far)?];
    for agent in agents.iter().chain([&sites.agent]) {
        agent.wait_ready(READY)?;
    }
    let [near_agent, far_agent] = &agents;

    let address = RelayAddress { host: Host::Ip(sites.relay_ip(reach)), port: RelayAddress::DEFAULT_PORT };
    let relay = RelayNode { node: RELAY.parse()?, addresses: vec![address] };
    let mut swarm = Swarm::join(&crowd, &relay, size.peers)?;

    eventually(REACHED, &format!("all nodes to be reached {reach}"), || {
        client.spread(Transport::Tcp, service, 2 * size.peers, 16)?;
        all_reached(&near, reach, size)
    })?;
    let mut kept = Vec::new();
    for _ in 0..size.streams {
        let connection = client.open(Transport::Tcp, service)?;
        connection.exchange()?;
        kept.push(connection);
    }
    let opened = format!("{} opened", size.streams);
    let mut all = vec![found(reach, "near", &near, opened, steady(near_agent)?, Some(size.streams))?];
    if reach == Reach::Relayed {
        let passed_on = format!("{} passed on", size.streams);
        all.push(found(reach, "relay's", &sites.relay, passed_on, steady(&sites.agent)?, None)?);
    }
    drop(kept);

    let (name, target): (NodeName, _) = ("far".parse()?, SocketAddr::new(first(server.ips())?, ECHO));
    swarm.connect(&name, target)?;
    eventually(REACHED, &format!("all nodes to reach one {reach}"), || all_reached(&far, reach, size))?;
    swarm.open(&name, target, size.streams / size.peers)?;
    let served = format!("{} served", size.streams);
    all.push(found(reach, "far", &far, served, steady(far_agent)?, Some(size.streams))?);
    Ok(all)
}

/// Makes a Service with an endpoint on each member of the swarm, an address each of one pod; returns its address.
fn serve_crowd(sites: &Sites, crowd: &Node, peers: u32) -> Result<SocketAddr> {
    let ip = |number: u32| -> Result<IpAddr> { Ok(Ipv4Addr::new(10, 244, 0, u8::try_from(100 + number)?).into()) };
    let (mut ips, mut endpoints) = (Vec::new(), Vec::new());
    for number in 0..peers {
        ips.push(ip(number)?.to_string());
        endpoints.push(Endpoint::new(ip(number)?, swarm::name(number)?.as_str()));
    }
    let pod = crowd.pod_at("server", &ips.iter().map(String::as_str).collect::<Vec<_>>())?;
    pod.serve_at(App::Tcp, SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), GREETED))?;
    let cluster_ip = "10.96.8.2";
    let service = Service::new("crowd", &[cluster_ip]).port("tcp", Transport::Tcp, PORT, GREETED);
    sites.lab.manifests().write("crowd", &service.yaml_with(&endpoints)?)?;
    Ok(SocketAddr::new(cluster_ip.parse()?, PORT))
}

/// Whether an agent has a connection with each member of the swarm, and nineteen of twenty by this way: on a LAN, one may
/// stay with the relay for some time.
fn all_reached(node: &Node, reach: Reach, size: Size) -> Result<bool> {
    let peers = ask(node, &["peers"])?;
    let mut best = BTreeMap::new();
    for peer in peers.as_array().into_iter().flatten() {
        if let Some(name) = peer["node"].as_str().filter(|name| name.starts_with(swarm::NAMED)) {
            best.entry(name).or_insert_with(|| &peer["path"]);
        }
    }
    let so = best.values().filter(|path| **path == reach.path()).count();
    let peers = size.peers as usize;
    ensure!(
        best.len() == peers && so * 20 >= peers * 19,
        "of {peers}, {} are reached, {so} of them {reach}",
        best.len()
    );
    Ok(true)
}

/// Puts together what was found, and makes sure that it is what it is called.
fn found(
    reach: Reach,
    agent: &'static str,
    node: &Node,
    streams: String,
    memory: Memory,
    least: Option<u32>,
) -> Result<Found> {
    let status = tunnel(node)?;
    let open = status["streams"].as_u64();
    ensure!(
        least.is_none_or(|least| open >= Some(least.into())),
        "the {agent} agent should have {streams} streams, but says {open:?}"
    );
    let nodes =
        status["nodes"].as_object().into_iter().flat_map(|nodes| nodes.values().filter_map(Value::as_u64)).sum();
    Ok(Found { reach, agent, nodes, streams, memory: vec![memory] })
}

/// What the agent of a node says of its tunnel.
fn tunnel(node: &Node) -> Result<Value> {
    Ok(ask(node, &["status"])?["tunnel"].clone())
}

/// Its memory, once that has come to rest.
fn steady(agent: &Agent) -> Result<Memory> {
    let begin = Instant::now();
    let (mut since, mut at) = (begin, Memory::of(agent)?.resident);
    loop {
        thread::sleep(CALM / 10);
        let memory = Memory::of(agent)?;
        if (memory.resident - at).abs() > STEADY {
            (since, at) = (Instant::now(), memory.resident);
        }
        if since.elapsed() >= CALM || begin.elapsed() >= LONGEST {
            return Ok(memory);
        }
    }
}
