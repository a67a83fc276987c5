//! Two sites that reach nothing but a relay, and nodes in them whose pods all have the same addresses.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    DEADLINE, Lab, Node, Pod, Site,
    agent::{Agent, AgentOptions},
    eventually,
    manifest::{Endpoint, Service},
};
use serde_json::{Value, json};

use crate::scene::ask;

pub(super) const PSK: &str = "a benchmark's pre-shared key";
pub(super) const RELAY: &str = "cloud";

/// How one node reaches another.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Reach {
    /// Both are in one site.
    Lan,
    /// They are in different sites.
    Relayed,
}

/// The sites `plant` and `shop`; the relay, with its agent, is at home in a third and has an address in each.
pub(super) struct Sites {
    pub(super) relay: Node,
    /// The relay's addresses in `plant` and `shop`.
    relay_ips: [IpAddr; 2],
    pub(super) agent: Agent,
    plant: Site,
    shop: Site,
    /// The relay, as `relayNodes` has it.
    listed: Value,
    pub(super) lab: Lab,
}

impl Sites {
    /// Raises them without a node but the relay.
    pub(super) fn raise() -> Result<Self> {
        let lab = Lab::new()?;
        let wan = lab.site("wan", &["203.0.113.0/24"])?;
        let (plant, shop) = (lab.site("plant", &["192.168.10.0/24"])?, lab.site("shop", &["192.168.20.0/24"])?);
        let relay = node(&wan, RELAY)?;
        let (in_plant, in_shop) = (relay.also_in(&plant)?, relay.also_in(&shop)?);
        let addresses = [relay.ips(), &in_plant, &in_shop].concat();
        let listed = json!([{ "nodeName": RELAY, "advertiseAddress": addresses }]);
        let relay_ips = [first(&in_plant)?, first(&in_shop)?];
        let agent = start(&relay, &listed)?;
        Ok(Self { relay, relay_ips, agent, plant, shop, listed, lab })
    }

    /// Adds a node that has this to go to reach those in `plant`; it has no agent yet.
    pub(super) fn node(&self, name: &str, from_plant: Reach) -> Result<Node> {
        match from_plant {
            Reach::Lan => node(&self.plant, name),
            Reach::Relayed => node(&self.shop, name),
        }
    }

    /// The relay's address for nodes that [`Sites::node`] makes for the same reach.
    pub(super) fn relay_ip(&self, from_plant: Reach) -> IpAddr {
        let [in_plant, in_shop] = self.relay_ips;
        match from_plant {
            Reach::Lan => in_plant,
            Reach::Relayed => in_shop,
        }
    }

    /// Starts the agent of a node; does not wait until it is ready.
    pub(super) fn start(&self, node: &Node) -> Result<Agent> {
        start(node, &self.listed)
    }

    /// Makes a pod of a node the endpoint of a Service that has the node's name.
    pub(super) fn serve(&self, service: Service, node: &Node, server: &Pod) -> Result<()> {
        self.lab.manifests().write(node.name(), &service.yaml_with(&Endpoint::of(server, node.name()))?)
    }
}

/// Waits until the agent of a node has `to` for a peer, by this way.
pub(super) fn connected(node: &Node, to: &str, reach: Reach) -> Result<()> {
    eventually(2 * DEADLINE, &format!("{} to reach {to} {reach}", node.name()), || {
        let path = path(node, to)?;
        ensure!(path.as_deref() == Some(reach.path()), "it is reached {path:?}");
        Ok(true)
    })
}

/// The way by which new streams from a node go to another, as its agent has it: `lan` or `relayed`.
fn path(node: &Node, to: &str) -> Result<Option<String>> {
    let peers = ask(node, &["peers"])?;
    let best = peers.as_array().into_iter().flatten().find(|peer| peer["node"] == to);
    Ok(best.and_then(|peer| peer["path"].as_str()).map(str::to_owned))
}

impl Reach {
    /// What `peers` calls it.
    pub(super) fn path(self) -> &'static str {
        match self {
            Self::Lan => "lan",
            Self::Relayed => "relayed",
        }
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lan => "on the LAN",
            Self::Relayed => "over a relay",
        })
    }
}

/// Any port of a node.
pub(super) fn any_port(node: &Node) -> Result<SocketAddr> {
    Ok(SocketAddr::new(first(node.ips())?, 0))
}

pub(super) fn first(ips: &[IpAddr]) -> Result<IpAddr> {
    ips.first().copied().context("there is no address")
}

fn node(site: &Site, name: &str) -> Result<Node> {
    site.node(name, &["10.244.0.0/24"])
}

fn start(node: &Node, relays: &Value) -> Result<Agent> {
    let psk = node.write_file("psk", PSK)?;
    node.start_agent(
        &AgentOptions::default()
            .set("modules.edgeTunnel.enable", true)
            .set("modules.edgeTunnel.psk.path", psk.to_string_lossy().into_owned())
            .set("modules.edgeTunnel.relayNodes", relays.clone()),
    )
}
