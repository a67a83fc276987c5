//! Clients of SOCKS5.

use prometheus_client::{metrics::counter::ConstCounter, registry::Registry};

use super::{DropLabels, Rows, gauge};
use crate::socks5::Counts;

pub(super) fn add(registry: &mut Registry, counts: &Counts) {
    let open = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    gauge(registry, "socks5_sessions_open", "Clients of SOCKS5 that are connected now", open(counts.open_sessions));
    gauge(registry, "socks5_flows_open", "Destinations of their datagrams now", open(counts.open_flows));
    for (name, help, count) in [
        ("socks5_connections", "CONNECT requests that got to their destination", counts.connections),
        ("socks5_associations", "UDP ASSOCIATE requests that were granted", counts.associations),
        ("socks5_flows", "Destinations that datagrams were carried to", counts.flows),
        ("socks5_sent_bytes", "Bytes of connections from clients", counts.bytes_out),
        ("socks5_received_bytes", "Bytes of connections to clients", counts.bytes_in),
        ("socks5_sent_datagrams", "Datagrams from clients", counts.datagrams_out),
        ("socks5_received_datagrams", "Datagrams to clients", counts.datagrams_in),
        (
            "socks5_dropped_datagrams",
            "Datagrams that were none, or for which there was no room or no way",
            counts.datagrams_dropped,
        ),
    ] {
        registry.register(name, help, ConstCounter::new(count));
    }
    let failures = counts.failures.iter();
    registry.register_collector(Box::new(Rows {
        name: "socks5_failures",
        help: "Sessions and flows that came to nothing",
        rows: failures
            .map(|failure| (DropLabels { reason: failure.reason }, ConstCounter::new(failure.count)))
            .collect(),
    }));
}
