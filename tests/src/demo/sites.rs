//! Sites: a cloud, and two edges behind NAT routers of their own, whose pods have the same addresses. All that the agents
//! are given is a PSK and the cloud's address.

mod path;
mod way;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use serde_json::{Value, json};

use super::example::Examples;
use super::scene::Scene;
use super::table::{Row, Table};
use crate::lab::agent::AgentOptions;
use crate::lab::{App, Lab, Nat, Node};
use way::Way;

/// The pods of every node.
const PODS: &str = "10.244.0.0/24";
/// The nodes of every site but the cloud's.
const LAN: &str = "192.168.1.0/24";
/// What every node serves itself, beside its pods and past the tunnel. Routers forward these ports.
const PLAIN: [(App, u16); 4] = [(App::Tcp, 7000), (App::Udp, 7001), (App::Http, 8080), (App::WebSocket, 8081)];
/// The port of a node that `edgeTunnel.allowedTargets` has by default.
const NODE_PORT: u16 = 22;
/// Within which time after their start the agents of two sites have found each other.
const REACHED: Duration = Duration::from_secs(20);
/// Within which time a hole is punched from then on.
const PUNCHED: Duration = Duration::from_secs(30);

/// What the figures are. Where the build is not optimised they tell little of one that is.
const NOTE: &str = if cfg!(debug_assertions) {
    "tunnel: median of a connection, a message and its answer, from the client's node to the pod; plain: the same past the\n\
     tunnel, to a server on the pod's node, by a port that its router forwards. This build is not optimised, neither the\n\
     tunnel nor the clients; docs/benchmarks.md has figures of one that is."
} else {
    "tunnel: median of a connection, a message and its answer, from the client's node to the pod; plain: the same past the\n\
     tunnel, to a server on the pod's node, by a port that its router forwards."
};

/// Raises the sites, and has each reach the others.
pub(super) fn show(examples: &Examples) -> Result<(Scene, Table)> {
    let lab = Lab::new()?;
    let internet = lab.site("internet", &["203.0.113.0/24"])?;
    let cloud = internet.node("cloud", &[PODS])?;
    let address = *cloud.ips().first().context("the cloud has no address")?;
    let mut plain = BTreeMap::from([(cloud.name().to_owned(), address)]);
    let mut nodes = vec![cloud];
    for (name, site) in [("edge1", "plant"), ("edge2", "shop")] {
        let site = internet.behind(site, &[LAN], Nat::PortRestricted)?;
        let node = site.node(name, &[PODS])?;
        for (app, port) in PLAIN {
            site.forward(app.transport(), port, &node)?;
        }
        plain.insert(name.to_owned(), site.public_ip()?);
        nodes.push(node);
    }
    for node in &nodes {
        for (app, port) in PLAIN {
            node.host().serve(app, port)?;
        }
        // In the place of an sshd, which is what its default allows others to reach.
        node.host().serve(App::Http, NODE_PORT)?;
    }
    let relays = json!([{ "nodeName": "cloud", "advertiseAddress": [address] }]);
    let scene = Scene::raise(lab, nodes, examples, |node, options| tunnel(node, options, &relays))?;
    let rows = Sites { scene: &scene, examples, plain }.rows()?;
    Ok((scene, Table { figures: ["tunnel", "plain"], note: NOTE, rows }))
}

fn tunnel(node: &Node, options: AgentOptions, relays: &Value) -> Result<AgentOptions> {
    let psk = node.write_file("psk", "a-secret-of-all-sites-of-the-demo")?;
    Ok(options
        .set("modules.edgeTunnel.enable", true)
        .set("modules.edgeTunnel.psk.path", psk.to_string_lossy().into_owned())
        .set("modules.edgeTunnel.relayNodes", relays.clone())
        .set("modules.edgeProxy.socks5Proxy.enable", true))
}

struct Sites<'a> {
    scene: &'a Scene,
    examples: &'a Examples,
    /// Where a node's own servers are reached from other sites.
    plain: BTreeMap<String, IpAddr>,
}

impl Sites<'_> {
    fn rows(&self) -> Result<Vec<Row>> {
        let (there, back) = (self.way("edge1", "edge2")?, self.way("edge2", "edge1")?);
        let (down, up) = (self.way("cloud", "edge1")?, self.way("edge1", "cloud")?);

        // Kept open: it stays where it began.
        let first = there.first(self.examples, REACHED);
        let (carried, patience) = match &first {
            Ok(_) => (there.in_use(), PUNCHED),
            // Nobody punches a hole to where nobody goes.
            Err(error) => (Err(anyhow!("{error:#}")), Duration::ZERO),
        };
        let mut rows = vec![
            there.row("the first connection goes", "relayed via cloud", carried),
            there.row("new ones go", "hole-punched", there.becomes("hole-punched", patience)),
            back.row("new ones go", "hole-punched", back.becomes("hole-punched", patience)),
        ];
        let before = there.relayed_bytes();
        for way in [&there, &back] {
            rows.extend(way.services(self.examples));
        }
        rows.push(there.bulk(self.examples));
        let since = before.and_then(|before| Ok(there.relayed_bytes()?.saturating_sub(before)));
        rows.push(there.row("of all that, through cloud", "0 bytes", since.map(|bytes| format!("{bytes} bytes"))));
        if let Ok(first) = first {
            let answer = first.exchange().map(|reply| reply.name);
            rows.push(there.row("the first connection goes on", "app-edge2", answer));
        }

        // The cloud has no way of its own into a site: it takes the connection that edge1 has made.
        rows.push(up.row("connections go", "direct", up.becomes("direct", REACHED)));
        for way in [&up, &down] {
            rows.extend(way.by_name(self.examples));
        }
        for way in [&there, &up] {
            rows.extend(way.node());
        }
        Ok(rows)
    }

    fn way(&self, from: &'static str, to: &'static str) -> Result<Way<'_>> {
        let plain = *self.plain.get(to).with_context(|| format!("there is no node {to}"))?;
        Ok(Way::new(self.scene.node(from)?, self.scene.client(from)?, to, plain))
    }
}
