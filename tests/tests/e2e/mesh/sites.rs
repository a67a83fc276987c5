//! A cloud and sites that reach nothing but the cloud, whose pods have the same addresses everywhere.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use edgemesh_tests::lab::{
    App, Lab, Node, Pod, Site, Transport,
    agent::{Agent, AgentOptions},
    eventually,
    manifest::{Endpoint, Service},
};
use serde_json::{Value, json};

use crate::{START, at};

pub(super) const PSK: &str = "0123456789abcdef-of-all";
pub(super) const TCP: u16 = 80;
pub(super) const UDP: u16 = 80;
pub(super) const COUNT: u16 = 81;
pub(super) const RESET: u16 = 82;

/// A node with a client and a server. Nodes differ in their names and in nothing that a pod could tell them by.
pub(super) struct Seat {
    pub(super) node: Node,
    pub(super) client: Pod,
    pub(super) server: Pod,
    pub(super) agent: Agent,
    /// The ClusterIPs of the Service of its server, which is named as the node is.
    pub(super) cluster_ips: [IpAddr; 2],
}

/// The relays are at home in the WAN and have an address in every site; edges are in one site, and nobody forwards.
pub(super) struct Sites {
    seats: Vec<Seat>,
    /// How the relays are listed, and what all agents are started with.
    relays: Vec<Value>,
    options: AgentOptions,
    pub(super) plant: Site,
    pub(super) lab: Lab,
}

impl Sites {
    /// Raises relays, and edges with their site, which is `plant` or `shop`; all with `options` and what a tunnel needs.
    /// None where there is no root.
    pub(super) fn raise(relays: &[&str], edges: &[(&str, &str)], options: &AgentOptions) -> Result<Option<Self>> {
        let Some(lab) = Lab::for_test()? else { return Ok(None) };
        let wan = lab.site("wan", &["203.0.113.0/24", "2001:db8:113::/64"])?;
        let plant = lab.site("plant", &["192.168.10.0/24", "fd00:192:168:10::/64"])?;
        let shop = lab.site("shop", &["192.168.20.0/24", "fd00:192:168:20::/64"])?;
        let mut nodes = Vec::new();
        let mut listed = Vec::new();
        for name in relays {
            let node = node(&wan, name)?;
            let mut addresses = node.ips().to_vec();
            addresses.extend(node.also_in(&plant)?);
            addresses.extend(node.also_in(&shop)?);
            listed.push(json!({ "nodeName": name, "advertiseAddress": addresses }));
            nodes.push(node);
        }
        for (name, site) in edges {
            nodes.push(node(if *site == "plant" { &plant } else { &shop }, name)?);
        }
        let mut made = Vec::new();
        for (number, node) in (1u8..).zip(nodes) {
            made.push((pods(&lab, &node, number)?, node));
        }
        let mut seats = Vec::new();
        for ((client, server, cluster_ips), node) in made {
            let agent = node.start_agent(&tunnel(options, &node, &listed)?)?;
            seats.push(Seat { node, client, server, agent, cluster_ips });
        }
        for seat in &seats {
            seat.agent.wait_ready(START)?;
        }
        Ok(Some(Self { seats, relays: listed, options: options.clone(), plant, lab }))
    }

    pub(super) fn seat(&self, name: &str) -> Result<&Seat> {
        self.seats.iter().find(|seat| seat.node.name() == name).with_context(|| format!("there is no node {name}"))
    }

    pub(super) fn seat_mut(&mut self, name: &str) -> Result<&mut Seat> {
        let seat = self.seats.iter_mut().find(|seat| seat.node.name() == name);
        seat.with_context(|| format!("there is no node {name}"))
    }

    /// Starts the agent of a node again, as it was.
    pub(super) fn start_again(&mut self, name: &str) -> Result<()> {
        let (relays, options) = (self.relays.clone(), self.options.clone());
        let seat = self.seat_mut(name)?;
        seat.agent = seat.node.start_agent(&tunnel(&options, &seat.node, &relays)?)?;
        Ok(())
    }

    /// The same with other options, once what runs has ended.
    pub(super) fn restart_with(&mut self, name: &str, change: impl FnOnce(AgentOptions) -> AgentOptions) -> Result<()> {
        let (relays, options) = (self.relays.clone(), change(self.options.clone()));
        let seat = self.seat_mut(name)?;
        seat.agent.stop()?;
        seat.agent = seat.node.start_agent(&tunnel(&options, &seat.node, &relays)?)?;
        seat.agent.wait_ready(START)
    }

    /// Waits until a client on one node reaches the server of another, which answers by its name.
    pub(super) fn connected(&self, from: &str, to: &str) -> Result<()> {
        let (client, target) = (&self.seat(from)?.client, self.seat(to)?.service(TCP)[0]);
        eventually(START, &format!("{from} to reach {to}"), || {
            Ok(client.tcp(target).with_context(|| self.trouble(from))?.name == server(to))
        })
    }

    /// What the tunnel of a node says of itself, for errors.
    fn trouble(&self, name: &str) -> String {
        let said = self.seat(name).and_then(|seat| super::report(&seat.node, "status"));
        said.map_or_else(|error| format!("{error:#}"), |status| format!("tunnel: {}", status["tunnel"]))
    }

    /// The best path from one node to another, as `peers` has it: `lan`, or `relayed via cloud`.
    pub(super) fn path(&self, from: &str, to: &str) -> Result<Option<String>> {
        let peers = super::report(&self.seat(from)?.node, "peers")?;
        let best = peers.as_array().into_iter().flatten().find(|peer| peer["node"] == to);
        let Some(best) = best else { return Ok(None) };
        let path = best["path"].as_str().context("no path")?;
        Ok(Some(best["via"].as_str().map_or_else(|| path.to_owned(), |via| format!("{path} via {via}"))))
    }
}

impl Seat {
    /// The addresses of its Service with this port, IPv4 first.
    pub(super) fn service(&self, port: u16) -> [SocketAddr; 2] {
        self.cluster_ips.map(|ip| SocketAddr::new(ip, port))
    }
}

/// The name that the server of a node answers by.
pub(super) fn server(node: &str) -> String {
    format!("server-{node}")
}

/// `options` with what makes an agent of `node` part of the mesh.
pub(super) fn tunnel(options: &AgentOptions, node: &Node, relays: &[Value]) -> Result<AgentOptions> {
    let psk = node.write_file("psk", PSK)?;
    Ok(options
        .clone()
        .set("modules.edgeTunnel.enable", true)
        .set("modules.edgeTunnel.psk.path", psk.to_string_lossy().into_owned())
        .set("modules.edgeTunnel.relayNodes", Value::from(relays.to_vec())))
}

fn node(site: &Site, name: &str) -> Result<Node> {
    site.node(name, &["10.244.0.0/24", "fd00:10:244::/64"])
}

/// The pods of a node, and its Service.
fn pods(lab: &Lab, node: &Node, number: u8) -> Result<(Pod, Pod, [IpAddr; 2])> {
    let name = node.name();
    let (client, pod) = (node.pod(&format!("client-{name}"))?, node.pod(&server(name))?);
    for (app, port) in [(App::Tcp, 7001), (App::Udp, 7001), (App::Count, 7002), (App::Reset, 7003)] {
        pod.serve(app, port)?;
    }
    let ips = [format!("10.96.8.{number}"), format!("fd00:10:96::8:{number}")];
    let service = Service::new(name, &[&ips[0], &ips[1]])
        .port("tcp", Transport::Tcp, TCP, 7001)
        .port("udp", Transport::Udp, UDP, 7001)
        .port("count", Transport::Tcp, COUNT, 7002)
        .port("reset", Transport::Tcp, RESET, 7003);
    lab.manifests().write(name, &service.yaml_with(&Endpoint::of(&pod, name))?)?;
    Ok((client, pod, [at(&ips[0], 0)?.ip(), at(&ips[1], 0)?.ip()]))
}
