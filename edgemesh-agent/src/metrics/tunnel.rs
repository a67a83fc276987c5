//! The tunnel's families. No series for each peer: a mesh has thousands, and `edgemesh-agent peers` has them all.

use prometheus_client::{
    metrics::{counter::ConstCounter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::{Rows, gauge, whole};
use crate::status::TunnelStatus;

#[derive(Clone, Debug, prometheus_client::encoding::EncodeLabelSet, Eq, Hash, PartialEq)]
struct PathLabels {
    path: String,
}

pub(super) fn add(registry: &mut Registry, status: &TunnelStatus) {
    gauge(registry, "tunnel_running", "Whether the tunnel has its PSK and its port", i64::from(status.running));
    let nodes = Family::<PathLabels, Gauge>::default();
    for (path, count) in &status.nodes {
        nodes.get_or_create(&PathLabels { path: path.clone() }).set(whole(*count));
    }
    registry.register("tunnel_nodes", "Nodes that are connected, by their best path", nodes);
    let connected = status.relays.iter().filter(|relay| relay.connected).count();
    gauge(registry, "tunnel_relays", "Relays that the configuration names", whole(status.relays.len()));
    gauge(registry, "tunnel_relays_connected", "Those of them that are connected", whole(connected));
    let streams = i64::try_from(status.streams).unwrap_or(i64::MAX);
    gauge(registry, "tunnel_streams_open", "Streams that are open, in both directions", streams);
    let counts = &status.counts;
    let paths = counts.connected.iter();
    registry.register_collector(Box::new(Rows {
        name: "tunnel_connections",
        help: "Connections to other nodes that came up",
        rows: paths.map(|(path, count)| (PathLabels { path: (*path).to_owned() }, ConstCounter::new(*count))).collect(),
    }));
    for (name, help, count) in [
        ("tunnel_streams_opened", "Streams that this node opened", counts.opened),
        ("tunnel_open_failures", "Streams that this node asked for in vain", counts.open_failures),
        ("tunnel_streams_served", "Streams that this node connected for others", counts.served),
        ("tunnel_serve_failures", "Requests of others that came to nothing", counts.serve_failures),
        ("tunnel_not_allowed", "Requests of others that this node does not allow", counts.not_allowed),
        ("tunnel_questions", "Questions of others, as of `trace`, that this node answered", counts.questions),
        ("tunnel_sent_bytes", "Bytes of payload sent to other nodes", counts.sent_bytes),
        ("tunnel_received_bytes", "Bytes of payload received from other nodes", counts.received_bytes),
        ("tunnel_refused_peers", "Peers cut off because they were no members", counts.refused_peers),
        ("tunnel_wrong_identities", "Peers and relays that had another PSK", counts.wrong_identities),
        ("tunnel_denied_connections", "Connections not taken, as too many came", counts.denied_connections),
        ("tunnel_holes_punched", "Holes punched in NATs", counts.holes_punched),
        ("tunnel_hole_failures", "Attempts at it that were given up", counts.hole_failures),
        ("tunnel_relayed_circuits", "Circuits of others that this node relayed", counts.relayed_circuits),
        ("tunnel_restarts", "Times the tunnel was started anew because of a fault in it", counts.restarts),
    ] {
        registry.register(name, help, ConstCounter::new(count));
    }
}
