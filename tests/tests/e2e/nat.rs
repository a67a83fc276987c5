//! Sites behind NATs: real agents that know nothing but a PSK and one relay, and pods with the same addresses everywhere.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    App, Lab, Nat, Node, Pod, Site, Transport,
    agent::{Agent, AgentOptions},
    errno, eventually,
    manifest::{Endpoint, Service},
};
use serde_json::{Value, json};

use crate::{START, at};

const CLUSTER_IP: &str = "10.96.9.1";
const PODS: &str = "10.244.1.0/24";
/// The port of tunnels.
const PORT: u16 = 20006;
/// Within which time after it has become ready an agent reaches other sites.
const REACHED: Duration = Duration::from_secs(15);
/// Within which time a hole is punched where one can be.
const PUNCHED: Duration = Duration::from_secs(30);

/// Within which time a node that has come back is reached again.
const AGAIN: Duration = Duration::from_secs(15);
/// Within which time a connection whose other end has gone without a word is found dead.
const DEAD: Duration = Duration::from_secs(20);

/// For how long a site stays cut off once that has been noticed; `EDGEMESH_PARTITION_SECONDS=300` for five minutes, in which
/// all pauses between attempts grow to their longest.
fn partition() -> Result<Duration> {
    match std::env::var("EDGEMESH_PARTITION_SECONDS") {
        Ok(text) => Ok(Duration::from_secs(text.parse().with_context(|| format!("no number of seconds: {text:?}"))?)),
        Err(_) => Ok(Duration::ZERO),
    }
}

/// A relay that all can reach, and sites behind NATs.
struct World {
    internet: Site,
    relay: Node,
    /// The relay's, then those of the pair.
    agents: Vec<Agent>,
    lab: Lab,
}

/// Nodes of two sites: a client on `edge1`, and a server with the client's very address on `edge2`.
struct Pair {
    client: Pod,
    server: Pod,
    edge1: Node,
    edge2: Node,
    /// The site of `edge2`.
    home: Site,
    world: World,
}

impl World {
    fn raise() -> Result<Option<Self>> {
        let Some(lab) = Lab::for_test()? else { return Ok(None) };
        let internet = lab.site("internet", &["203.0.113.0/24"])?;
        let relay = internet.node("cloud", &["10.244.0.0/24"])?;
        let mut world = Self { internet, relay: relay.clone(), agents: Vec::new(), lab };
        world.start(&relay)?;
        Ok(Some(world))
    }

    /// Starts an agent that knows the relay.
    fn start(&mut self, node: &Node) -> Result<()> {
        let psk = node.write_file("psk", "0123456789abcdef-of-all")?;
        let address = self.relay.ips().first().context("the relay has no address")?.to_string();
        let relays = json!([{ "nodeName": self.relay.name(), "advertiseAddress": [address] }]);
        let options = AgentOptions::default()
            .set("modules.edgeTunnel.enable", true)
            .set("modules.edgeTunnel.psk.path", psk.to_string_lossy().into_owned())
            .set("modules.edgeTunnel.relayNodes", relays);
        let agent = node.start_agent(&options)?;
        agent.wait_ready(START)?;
        self.agents.push(agent);
        Ok(())
    }

    /// Starts the client on `edge1` and the server on `edge2`, the Service `web` and the agents.
    fn pair(mut self, edge1: Node, home: Site) -> Result<Pair> {
        let edge2 = home.node("edge2", &[PODS])?;
        let (client, server) = (edge1.pod("client")?, edge2.pod("server")?);
        ensure!(client.ips() == server.ips(), "the pods have different addresses");
        server.serve(App::Tcp, 7001)?;
        server.serve(App::Udp, 7001)?;
        let service = Service::new("web", &[CLUSTER_IP]).port("tcp", Transport::Tcp, 80, 7001).port(
            "udp",
            Transport::Udp,
            80,
            7001,
        );
        self.lab.manifests().write("web", &service.yaml_with(&Endpoint::of(&server, edge2.name()))?)?;
        self.start(&edge1)?;
        self.start(&edge2)?;
        Ok(Pair { client, server, edge1, edge2, home, world: self })
    }
}

impl Pair {
    /// Each in a site of its own.
    fn behind(nats: [Nat; 2]) -> Result<Option<Self>> {
        let Some(world) = World::raise()? else { return Ok(None) };
        let [office, home] = [("office", nats[0]), ("home", nats[1])]
            .map(|(name, nat)| world.internet.behind(name, &["192.168.1.0/24"], nat));
        let edge1 = office?.node("edge1", &[PODS])?;
        world.pair(edge1, home?).map(Some)
    }

    /// Waits until the server answers, by TCP, and by UDP at once from then on.
    fn answers(&self) -> Result<()> {
        let target = at(CLUSTER_IP, 80)?;
        let client = self.client.within(Duration::from_secs(1));
        eventually(REACHED, "the server to answer", || Ok(client.tcp(target)?.name == self.server.name()))?;
        ensure!(client.udp(target)?.name == self.server.name(), "another answers by UDP");
        Ok(())
    }

    /// Waits until the server answers again.
    fn answers_again(&self, within: Duration) -> Result<()> {
        let (client, target) = (self.client.within(Duration::from_secs(1)), at(CLUSTER_IP, 80)?);
        eventually(within, "the server to answer again", || Ok(client.tcp(target)?.name == self.server.name()))
    }

    /// Waits until new streams take one of these paths.
    fn goes_by(&self, by: &[&str]) -> Result<()> {
        eventually(PUNCHED, &format!("the path to be one of {by:?}"), || {
            let path = self.path()?;
            ensure!(by.contains(&path.as_str()), "{:#?}", self.paths()?);
            Ok(true)
        })
    }

    fn paths(&self) -> Result<Vec<Value>> {
        rows(&self.edge1, self.edge2.name())
    }

    /// The path that new streams take, such as `hole-punched`.
    fn path(&self) -> Result<String> {
        let paths = self.paths()?;
        let first = paths.first().with_context(|| format!("{} is not connected", self.edge2.name()))?;
        Ok(first["path"].as_str().context("no path")?.to_owned())
    }

    /// Bytes that have gone through the relay, either way.
    fn relayed_bytes(&self) -> Result<u64> {
        let paths = self.paths()?;
        let relayed = paths.iter().filter(|path| path["path"] == "relayed");
        let bytes = relayed.flat_map(|path| [&path["sent_bytes"], &path["received_bytes"]]);
        Ok(bytes.filter_map(Value::as_u64).sum())
    }

    /// Relayed first, then `by` one of these paths, and from then on the relay is no longer needed.
    fn leaves_the_relay(self, by: &[&str]) -> Result<()> {
        self.answers()?;
        let held = self.client.open(Transport::Tcp, at(CLUSTER_IP, 80)?)?;
        held.exchange()?;
        ensure!(counted(&self.world.relay, "relayed_circuits")? > 0, "the relay was not needed at the first");
        self.goes_by(by)?;
        // What runs on the relayed path may go on there; what begins now does not.
        let before = self.relayed_bytes()?;
        for _ in 0..10 {
            self.client.tcp(at(CLUSTER_IP, 80)?)?;
            self.client.udp(at(CLUSTER_IP, 80)?)?;
        }
        ensure!(self.relayed_bytes()? <= before, "new streams still go through the relay");
        let relay = self.world.agents.first().context("no relay")?;
        relay.kill()?;
        for _ in 0..10 {
            self.client.tcp(at(CLUSTER_IP, 80)?)?;
        }
        let table = String::from_utf8(self.edge1.cli(&["peers"])?.stdout)?;
        ensure!(by.iter().any(|path| table.contains(path)), "{table}");
        Ok(())
    }
}

fn report(node: &Node, command: &str) -> Result<Value> {
    let output = node.cli(&[command, "-o", "json"])?;
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("no report: {}", String::from_utf8_lossy(&output.stderr)))
}

/// The paths from one node to another.
fn rows(from: &Node, to: &str) -> Result<Vec<Value>> {
    let rows = report(from, "peers")?;
    Ok(rows.as_array().into_iter().flatten().filter(|row| row["node"] == to).cloned().collect())
}

fn counted(node: &Node, what: &str) -> Result<u64> {
    report(node, "status")?["tunnel"]["counts"][what].as_u64().with_context(|| format!("{what} is not counted"))
}

#[test]
fn between_port_restricted_nats_a_hole_is_punched_and_the_relay_left() -> Result<()> {
    let Some(pair) = Pair::behind([Nat::PortRestricted; 2])? else { return Ok(()) };
    pair.leaves_the_relay(&["hole-punched"])
}

#[test]
fn between_full_cones_a_hole_is_punched_and_the_relay_left() -> Result<()> {
    let Some(pair) = Pair::behind([Nat::FullCone { port: PORT }; 2])? else { return Ok(()) };
    // Who is found to be reachable through his NAT is dialled, without a hole.
    pair.leaves_the_relay(&["hole-punched", "direct"])
}

#[test]
fn nodes_that_share_a_nat_are_reached_though_only_one_of_them_has_its_port() -> Result<()> {
    for nat in [Nat::PortRestricted, Nat::FullCone { port: PORT }] {
        let Some(mut world) = World::raise()? else { return Ok(()) };
        let home = world.internet.behind("home", &["192.168.1.0/24"], nat)?;
        let first = home.node("first", &["10.244.7.0/24"])?;
        // It has the port at the NAT from now on.
        world.start(&first)?;
        let office = world.internet.behind("office", &["192.168.1.0/24"], Nat::PortRestricted)?;
        let edge1 = office.node("edge1", &[PODS])?;
        world.pair(edge1, home)?.leaves_the_relay(&["hole-punched", "direct"])?;
    }
    Ok(())
}

#[test]
fn between_symmetric_nats_the_relay_carries_on() -> Result<()> {
    let Some(pair) = Pair::behind([Nat::Symmetric; 2])? else { return Ok(()) };
    pair.answers()?;
    let held = pair.client.open(Transport::Tcp, at(CLUSTER_IP, 80)?)?;
    let failures = || anyhow::Ok(counted(&pair.edge1, "hole_failures")? + counted(&pair.edge2, "hole_failures")?);
    eventually(2 * PUNCHED, "punching to be given up", || {
        held.exchange()?;
        Ok(failures()? > 0)
    })?;
    assert_eq!(pair.path()?, "relayed");
    pair.answers()?;
    assert_eq!(pair.paths()?[0]["via"], "cloud");
    held.exchange()?;
    Ok(())
}

#[test]
fn a_full_cone_needs_no_relay_even_beside_a_symmetric_nat() -> Result<()> {
    let cone = Nat::FullCone { port: PORT };
    for nats in [[Nat::Symmetric, cone], [cone, Nat::Symmetric]] {
        let Some(pair) = Pair::behind(nats)? else { return Ok(()) };
        pair.leaves_the_relay(&["hole-punched", "direct"])?;
    }
    Ok(())
}

#[test]
fn cloud_and_edge_reach_each_other_both_ways_by_the_way_the_edge_has_made() -> Result<()> {
    let Some(pair) = Pair::behind([Nat::Symmetric; 2])? else { return Ok(()) };
    pair.answers()?;
    let in_cloud = pair.world.relay.pod("in-cloud")?;
    assert_eq!(in_cloud.tcp(at(CLUSTER_IP, 80)?)?.name, "server");
    in_cloud.serve(App::Tcp, 7002)?;
    let service = Service::new("cloud", &["10.96.9.2"]).port("tcp", Transport::Tcp, 80, 7002);
    pair.world.lab.manifests().write("cloud", &service.yaml_with(&Endpoint::of(&in_cloud, "cloud"))?)?;
    eventually(REACHED, "the cloud to answer", || Ok(pair.client.tcp(at("10.96.9.2", 80)?)?.name == "in-cloud"))?;
    let to_cloud: Vec<Value> = rows(&pair.edge1, "cloud")?;
    assert!(!to_cloud.is_empty() && to_cloud.iter().all(|row| row["path"] == "direct"), "{to_cloud:#?}");
    Ok(())
}

#[test]
fn a_site_whose_public_address_changes_is_reached_again_and_punched_to_again() -> Result<()> {
    let Some(pair) = Pair::behind([Nat::PortRestricted; 2])? else { return Ok(()) };
    pair.answers()?;
    pair.goes_by(&["hole-punched"])?;
    let public = pair.home.renumber_uplink()?;
    pair.answers_again(AGAIN)?;
    eventually(PUNCHED, "a hole to be punched at the new address", || {
        let paths = pair.paths()?;
        // Somebody has to have a use for it.
        pair.client.tcp(at(CLUSTER_IP, 80)?)?;
        let address = paths.first().and_then(|path| path["address"].as_str()).and_then(|text| text.parse().ok());
        ensure!(address.is_some_and(|at: SocketAddr| at.ip() == public), "{paths:#?}");
        Ok(true)
    })
}

#[test]
fn a_node_that_starts_anew_with_another_address_is_reached_again() -> Result<()> {
    let Some(mut pair) = Pair::behind([Nat::PortRestricted; 2])? else { return Ok(()) };
    pair.answers()?;
    pair.world.agents.pop().context("no agent")?.kill()?;
    pair.edge2 = pair.home.renumber(pair.edge2.clone())?;
    pair.world.start(&pair.edge2)?;
    pair.answers_again(AGAIN)
}

#[test]
fn a_site_that_was_cut_off_is_refused_and_reached_again_once_it_is_back() -> Result<()> {
    let Some(pair) = Pair::behind([Nat::PortRestricted; 2])? else { return Ok(()) };
    pair.answers()?;
    pair.goes_by(&["hole-punched"])?;
    pair.home.cut_uplink()?;
    eventually(DEAD, "the cut to be noticed", || Ok(pair.paths()?.is_empty()))?;
    let error = pair.client.tcp(at(CLUSTER_IP, 80)?).err().context("it was reached though it is cut off")?;
    assert_eq!(errno(&error), Some("ECONNRESET"), "{error:#}");
    std::thread::sleep(partition()?);
    pair.home.heal_uplink()?;
    pair.answers_again(AGAIN)?;
    // The NATs may have kept the old hole, which is then simply dialled through.
    pair.goes_by(&["hole-punched", "direct"])
}

#[test]
fn neighbours_with_the_same_pod_addresses_find_each_other_without_the_relay() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let home = world.internet.behind("home", &["192.168.1.0/24"], Nat::PortRestricted)?;
    home.cut_uplink()?;
    let edge1 = home.node("edge1", &[PODS])?;
    let pair = world.pair(edge1, home)?;
    pair.answers()?;
    assert_eq!(pair.path()?, "lan");
    pair.home.heal_uplink()?;
    eventually(REACHED, "the relay to be connected", || {
        Ok(report(&pair.edge1, "peers")?.to_string().contains("cloud"))
    })?;
    pair.answers()?;
    assert_eq!(pair.path()?, "lan");
    assert_eq!(counted(&pair.world.relay, "relayed_circuits")?, 0);
    Ok(())
}
