//! What the agent says of its tunnel.

use std::{collections::BTreeMap, net::SocketAddr};

use serde::{Deserialize, Serialize};

/// The tunnel's part of [`super::Status`].
#[derive(Clone, Debug, Default, Serialize)]
pub struct TunnelStatus {
    /// False until it has a PSK and its port.
    pub running: bool,
    /// Where it listens.
    pub addresses: Vec<String>,
    /// How many nodes are connected, by their best path: `lan`, `direct`, `hole-punched`, `relayed`.
    pub nodes: BTreeMap<String, usize>,
    /// As the configuration names them, without this node.
    pub relays: Vec<RelayRow>,
    /// Streams that are open, in both directions.
    pub streams: u64,
    pub counts: TunnelCounts,
}

/// A relay of the configuration.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct RelayRow {
    pub node: String,
    pub connected: bool,
}

/// What has been counted since the start; see [`crate::tunnel::Counters`].
#[derive(Clone, Debug, Default, Serialize)]
pub struct TunnelCounts {
    pub opened: u64,
    pub open_failures: u64,
    pub served: u64,
    pub serve_failures: u64,
    pub not_allowed: u64,
    pub questions: u64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    /// By path.
    pub connected: BTreeMap<&'static str, u64>,
    pub refused_peers: u64,
    pub wrong_identities: u64,
    pub denied_connections: u64,
    pub holes_punched: u64,
    pub hole_failures: u64,
    pub relayed_circuits: u64,
    pub restarts: u64,
}

/// One connection of `edgemesh-agent peers`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PeerRow {
    pub node: String,
    pub peer_id: String,
    /// `lan`, `direct`, `hole-punched` or `relayed`.
    pub path: String,
    /// The relay's node, where it is relayed and the node is known.
    pub via: Option<String>,
    /// `tcp` or `quic`.
    pub transport: String,
    /// None through a relay.
    pub address: Option<SocketAddr>,
    /// None before the first measurement.
    pub rtt_micros: Option<u64>,
    pub streams: u32,
    pub sent_bytes: u64,
    pub received_bytes: u64,
    pub up_seconds: u64,
}
