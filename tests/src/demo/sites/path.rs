//! The tunnel's connections, as `edgemesh-agent peers` has them.

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::lab::Node;

/// A connection of the tunnel with another node.
#[derive(Debug, Deserialize)]
pub(super) struct Path {
    node: String,
    path: String,
    via: Option<String>,
    /// Connections of pods that it carries.
    pub(super) streams: u32,
    sent_bytes: u64,
    received_bytes: u64,
}

/// The tunnel's connections from one node to another; new connections of pods take the first.
pub(super) fn paths(from: &Node, to: &str) -> Result<Vec<Path>> {
    let output = from.cli(&["peers", "-o", "json"])?;
    let peers: Vec<Path> = serde_json::from_slice(&output.stdout).with_context(|| {
        let said = String::from_utf8_lossy(&output.stderr);
        format!("could not read what `peers` says on {}: {}", from.name(), said.trim())
    })?;
    Ok(peers.into_iter().filter(|path| path.node == to).collect())
}

impl Path {
    /// Such as `hole-punched`, or `relayed via cloud`.
    pub(super) fn describe(&self) -> String {
        match &self.via {
            Some(via) => format!("{} via {via}", self.path),
            None => self.path.clone(),
        }
    }

    pub(super) fn is_relayed(&self) -> bool {
        self.path == "relayed"
    }

    /// What it has carried for pods, either way.
    pub(super) fn bytes(&self) -> u64 {
        self.sent_bytes.saturating_add(self.received_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_told_as_the_table_of_peers_tells_it() {
        let path = |path: &str, via: Option<&str>| Path {
            node: "edge2".to_owned(),
            path: path.to_owned(),
            via: via.map(str::to_owned),
            streams: 0,
            sent_bytes: 3,
            received_bytes: 4,
        };
        let relayed = path("relayed", Some("cloud"));
        assert_eq!(
            (relayed.describe().as_str(), relayed.is_relayed(), relayed.bytes()),
            ("relayed via cloud", true, 7)
        );
        let punched = path("hole-punched", None);
        assert_eq!((punched.describe().as_str(), punched.is_relayed()), ("hole-punched", false));
    }
}
