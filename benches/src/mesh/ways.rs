//! The ways from one node to another that are compared.

use std::{fmt, net::SocketAddr};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{App, DEADLINE, Node, Pod, Tls, Transport, agent::Agent, eventually, manifest::Service};

use super::sites::{Reach, Sites, any_port, connected, first};
use crate::scene::READY;

/// What servers speak, the port of the Service and that of its pod.
const PORTS: [(App, u16, u16); 3] = [(App::Tcp, 80, 7000), (App::Echo, 81, 7001), (App::Source, 82, 7002)];

/// What carries a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Carrier {
    /// The agents, from pod to pod through the ClusterIP.
    Tunnel,
    /// A TLS connection for each, from pod to pod.
    Proxies,
    /// Nothing, from node to node.
    Plain,
}

/// Where one client connects to for each server.
pub(super) struct Way {
    pub(super) reach: Reach,
    pub(super) carrier: Carrier,
    pub(super) client: Pod,
    /// [`App::Tcp`]
    pub(super) tcp: SocketAddr,
    /// [`App::Echo`]
    pub(super) echo: SocketAddr,
    /// [`App::Source`]
    pub(super) source: SocketAddr,
}

/// All ways from the node `near`: to `far`, in the same site, and `distant`, in another.
pub(super) struct Ways {
    pub(super) ways: Vec<Way>,
    near: Node,
    /// With `sites`, they keep what is measured running.
    _agents: Vec<Agent>,
    _sites: Sites,
}

impl Ways {
    /// Raises them and waits until each leads to its server.
    pub(super) fn raise() -> Result<Self> {
        let sites = Sites::raise()?;
        let near = sites.node("near", Reach::Lan)?;
        let client = near.pod("client")?;
        let mut ways = Vec::new();
        let mut nodes = vec![near.clone()];
        for (reach, cluster_ip) in [(Reach::Lan, "10.96.8.1"), (Reach::Relayed, "10.96.8.2")] {
            let node = sites.node(name(reach), reach)?;
            let server = node.pod(&format!("server-{}", node.name()))?;
            let mut service = Service::new(node.name(), &[cluster_ip]);
            for (app, port, target) in PORTS {
                service = service.port(&format!("port-{port}"), Transport::Tcp, port, target);
                server.serve(app, target)?;
                node.host().serve(app, target)?;
            }
            sites.serve(service, &node, &server)?;
            let cluster_ip = cluster_ip.parse().context("a ClusterIP is no address")?;
            let tunnel = PORTS.map(|(_, port, _)| SocketAddr::new(cluster_ip, port));
            let (mut proxies, mut plain) = (tunnel, tunnel);
            for (at, (.., target)) in PORTS.into_iter().enumerate() {
                let hops = Hops { sites: &sites, near: &near, far: &node, reach };
                proxies[at] = hops.by_proxies(SocketAddr::new(first(server.ips())?, target))?;
                plain[at] = hops.plain(SocketAddr::new(first(node.ips())?, target))?;
            }
            for (carrier, client, [tcp, echo, source]) in [
                (Carrier::Tunnel, client.clone(), tunnel),
                (Carrier::Proxies, client.clone(), proxies),
                (Carrier::Plain, near.host().clone(), plain),
            ] {
                ways.push(Way { reach, carrier, client, tcp, echo, source });
            }
            nodes.push(node);
        }
        let mut agents = Vec::new();
        for node in &nodes {
            agents.push(sites.start(node)?);
        }
        for agent in agents.iter().chain([&sites.agent]) {
            agent.wait_ready(READY)?;
        }
        let raised = Self { ways, near, _agents: agents, _sites: sites };
        for way in &raised.ways {
            eventually(2 * DEADLINE, &format!("{} to carry, {}", way.carrier, way.reach), || way.check())?;
        }
        raised.check()?;
        Ok(raised)
    }

    /// Makes sure that everything is as it is called.
    pub(super) fn check(&self) -> Result<()> {
        for reach in super::REACHES {
            connected(&self.near, name(reach), reach)?;
        }
        self.ways.iter().try_for_each(|way| way.check().map(drop))
    }
}

impl Way {
    fn check(&self) -> Result<bool> {
        let reply = self.client.tcp(self.tcp)?;
        let expected = match self.carrier {
            Carrier::Tunnel | Carrier::Proxies => format!("server-{}", name(self.reach)),
            Carrier::Plain => name(self.reach).to_owned(),
        };
        ensure!(reply.name == expected, "{} leads to {}", self.tcp, reply.name);
        Ok(true)
    }
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tunnel => "tunnel",
            Self::Proxies => "tokio-rustls proxies",
            Self::Plain => "plain TCP",
        })
    }
}

/// The nodes between a client and a server.
struct Hops<'a> {
    sites: &'a Sites,
    near: &'a Node,
    far: &'a Node,
    reach: Reach,
}

impl Hops<'_> {
    /// Starts proxies to a server of the far node; returns where the first listens.
    fn by_proxies(&self, server: SocketAddr) -> Result<SocketAddr> {
        let far = self.far.host().tls_proxy(any_port(self.far)?, server, Tls::Accepted)?;
        self.near.host().tls_proxy(any_port(self.near)?, self.plain(far)?, Tls::Dialled)
    }

    /// Where the near node reaches an address of the far one.
    fn plain(&self, far: SocketAddr) -> Result<SocketAddr> {
        match self.reach {
            Reach::Lan => Ok(far),
            Reach::Relayed => self.sites.relay.host().proxy(SocketAddr::new(self.sites.relay_ip(Reach::Lan), 0), far),
        }
    }
}

/// The node that is reached so.
fn name(reach: Reach) -> &'static str {
    match reach {
        Reach::Lan => "far",
        Reach::Relayed => "distant",
    }
}
