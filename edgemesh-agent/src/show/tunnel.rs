//! How the tunnel looks on a terminal.

use std::fmt::Write;

use serde_json::Value;

use super::{columns, seconds, word};
use crate::status::PeerRow;

/// `peers` as a table, a row for each connection; new streams to a node take its first one.
pub fn peers(peers: &[PeerRow]) -> String {
    if peers.is_empty() {
        return "no node is connected; see `edgemesh-agent status`\n".to_owned();
    }
    let head = ["NODE", "PATH", "BY", "ADDRESS", "RTT", "STREAMS", "SENT", "RECEIVED", "UP", "PEER ID"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for peer in peers {
        let dash = || "-".to_owned();
        let path = match &peer.via {
            Some(via) => format!("{} via {via}", peer.path),
            None => peer.path.clone(),
        };
        rows.push(vec![
            peer.node.clone(),
            path,
            peer.transport.clone(),
            peer.address.map_or_else(dash, |address| address.to_string()),
            peer.rtt_micros.map_or_else(dash, rtt),
            peer.streams.to_string(),
            bytes(peer.sent_bytes),
            bytes(peer.received_bytes),
            seconds(peer.up_seconds),
            peer.peer_id.clone(),
        ]);
    }
    columns(&rows)
}

/// The tunnel in a line; None where there is none.
pub(super) fn status(tunnel: &Value) -> Option<String> {
    if tunnel.is_null() {
        return None;
    }
    if tunnel["running"] != true {
        return Some("NOT RUNNING: pods of other sites are refused, see the conditions".to_owned());
    }
    let nodes = tunnel["nodes"].as_object().into_iter().flatten();
    let nodes: Vec<String> = nodes.map(|(path, count)| format!("{} {path}", word(count))).collect();
    let mut line =
        if nodes.is_empty() { "no node connected".to_owned() } else { format!("nodes: {}", nodes.join(", ")) };
    let relays = tunnel["relays"].as_array().map_or(&[][..], Vec::as_slice);
    let relays: Vec<String> = relays
        .iter()
        .map(|relay| format!("{}{}", word(&relay["node"]), if relay["connected"] == true { "" } else { " (DOWN)" }))
        .collect();
    if !relays.is_empty() {
        let _ = write!(line, "; relays: {}", relays.join(", "));
    }
    let _ = write!(line, "; {} streams open", word(&tunnel["streams"]));
    Some(line)
}

/// `12.3 ms`.
pub(super) fn rtt(micros: u64) -> String {
    format!("{}.{} ms", micros / 1000, micros % 1000 / 100)
}

fn bytes(count: u64) -> String {
    match count {
        0..1024 => format!("{count} B"),
        1024..0x0010_0000 => format!("{} KiB", count >> 10),
        0x0010_0000..0x4000_0000 => format!("{} MiB", count >> 20),
        _ => format!("{} GiB", count >> 30),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_told_with_their_path() {
        let row = PeerRow {
            node: "edge2".to_owned(),
            peer_id: "12D3".to_owned(),
            path: "relayed".to_owned(),
            via: Some("cloud1".to_owned()),
            transport: "tcp".to_owned(),
            address: None,
            rtt_micros: Some(12_340),
            streams: 3,
            sent_bytes: 2048,
            received_bytes: 5 << 20,
            up_seconds: 65,
        };
        let shown = peers(&[row]);
        for part in ["edge2", "relayed via cloud1", "12.3 ms", "2 KiB", "5 MiB", "1m5s"] {
            assert!(shown.contains(part), "{part} in\n{shown}");
        }
    }

    #[test]
    fn status_names_relays_that_are_down() {
        let tunnel = serde_json::json!({
            "running": true, "nodes": {"lan": 2}, "streams": 1,
            "relays": [{"node": "cloud1", "connected": true}, {"node": "cloud2", "connected": false}],
        });
        assert_eq!(status(&tunnel).unwrap(), "nodes: 2 lan; relays: cloud1, cloud2 (DOWN); 1 streams open");
        assert!(status(&serde_json::json!({"running": false})).unwrap().starts_with("NOT RUNNING"));
        assert_eq!(status(&Value::Null), None);
    }
}
