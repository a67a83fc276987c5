//! What the tunnel has done since it started, for metrics.

use std::sync::atomic::{AtomicU64, Ordering};

/// One number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// How far it has come.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the tunnel has done since it started.
#[derive(Debug, Default)]
pub struct Counters {
    /// Streams that this node opened and the far node connected.
    pub opened: Counter,
    /// Streams that this node asked for in vain.
    pub open_failures: Counter,
    /// Streams that this node connected for others.
    pub served: Counter,
    /// Requests of others that came to nothing.
    pub serve_failures: Counter,
    /// Requests of others that the dial policy refused; part of `serve_failures`.
    pub not_allowed: Counter,
    /// Bytes of payload sent to other nodes.
    pub sent_bytes: Counter,
    /// Bytes of payload received from other nodes.
    pub received_bytes: Counter,
    /// Questions of others, what would become of a stream, that were answered.
    pub questions: Counter,
    /// Connections to other nodes that came up, by path.
    pub connected: PathCounters,
    /// Peers cut off because they were no members.
    pub refused_peers: Counter,
    /// Nodes met whose identity is not what this node's PSK gives them: peers that were cut off for it, and relays.
    pub wrong_identities: Counter,
    /// Connections of which the handshake was not even begun, since too many came.
    pub denied_connections: Counter,
    /// Holes that were punched.
    pub holes_punched: Counter,
    /// Attempts to punch a hole that were given up.
    pub hole_failures: Counter,
    /// Circuits of others that this node relayed.
    pub relayed_circuits: Counter,
    /// Times the swarm had to be started anew because of a fault in it.
    pub restarts: Counter,
}

/// A counter for each kind of path.
#[derive(Debug, Default)]
pub struct PathCounters {
    /// On the same LAN.
    pub lan: Counter,
    /// Without a relay.
    pub direct: Counter,
    /// Without a relay, through a hole punched in a NAT.
    pub hole_punched: Counter,
    /// Through a relay.
    pub relayed: Counter,
}
