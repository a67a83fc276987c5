//! `modules.edgeTunnel`.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

use crate::{
    alias::Overrides,
    model::IpPrefix,
    tunnel::{RelayAddress, RelayNode, ServeRelay},
};

/// How other sites are reached; EdgeMesh's keys, and a few of our own.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TunnelConfig {
    /// Default false, as in EdgeMesh, whose manifests set it.
    pub enable: bool,
    /// Port for other nodes, TCP and UDP; default 20006.
    pub listen_port: u16,
    /// Nodes that others can reach and that forward for them; default none. Followed while the agent runs.
    pub relays: Vec<RelayNode>,
    /// When this node forwards for others; default when `relays` names it.
    pub serve_relay: ServeRelay,
    /// `psk.enable`; default true. There is no tunnel without.
    pub psk_enable: bool,
    /// `psk.path`; default /etc/edgemesh/psk. Followed while the agent runs.
    pub psk: PathBuf,
    /// The nodes that this one talks to, by name or PeerId; default empty for all members.
    pub allowed_peers: Vec<String>,
    /// What is dialled for other nodes besides this node's endpoints; default `node:22`.
    pub allowed_targets: Vec<AllowedTarget>,
    /// Whether to punch holes in NATs; default true.
    pub hole_punching: bool,
    /// `announceAddresses`: where others reach this node besides the addresses of its interfaces; default none.
    pub announce: Vec<SocketAddr>,
    /// `tunnelLimitConfig.tunnelBaseStreamIn`: streams carried for others at a time; default 10240.
    pub max_served: u32,
    /// `directCIDRs` and `neverDirectCIDRs`; both empty.
    pub overrides: Overrides,
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self {
            enable: false,
            listen_port: RelayAddress::DEFAULT_PORT,
            relays: Vec::new(),
            serve_relay: ServeRelay::default(),
            psk_enable: true,
            psk: PathBuf::from("/etc/edgemesh/psk"),
            allowed_peers: Vec::new(),
            allowed_targets: vec![AllowedTarget { host: AllowedHost::Node, port: Some(22) }],
            hole_punching: true,
            announce: Vec::new(),
            max_served: 10_240,
            overrides: Overrides::default(),
        }
    }
}

/// What may be dialled for other nodes: `node:22`, `192.168.1.7:554`, `192.168.1.0/24:*`, `[fd00::/8]:443`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AllowedTarget {
    pub host: AllowedHost,
    /// None for any.
    pub port: Option<u16>,
}

/// The host of an [`AllowedTarget`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AllowedHost {
    /// This node itself.
    Node,
    /// Addresses that this node reaches.
    Network(IpPrefix),
}

impl AllowedTarget {
    /// Whether a port of this node itself is meant.
    pub fn covers_node(&self, port: u16) -> bool {
        self.host == AllowedHost::Node && self.port.is_none_or(|allowed| allowed == port)
    }

    /// Whether a port of that address is meant.
    pub fn covers(&self, ip: IpAddr, port: u16) -> bool {
        let host = matches!(self.host, AllowedHost::Network(network) if network.contains(ip));
        host && self.port.is_none_or(|allowed| allowed == port)
    }
}

/// A text that is no [`AllowedTarget`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("not of the form HOST:PORT")]
pub struct ParseAllowedTargetError;

impl FromStr for AllowedTarget {
    type Err = ParseAllowedTargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (host, port) = text.rsplit_once(':').ok_or(ParseAllowedTargetError)?;
        let port = match port {
            "*" => None,
            port => {
                let digits = port.bytes().all(|digit| digit.is_ascii_digit());
                let port = port.parse().ok().filter(|port| digits && *port != 0);
                Some(port.ok_or(ParseAllowedTargetError)?)
            }
        };
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        // Without brackets nobody can tell an address of IPv6 from its port.
        if bracketed.is_none() && host.contains(':') {
            return Err(ParseAllowedTargetError);
        }
        let host = match bracketed.unwrap_or(host) {
            "node" if bracketed.is_none() => AllowedHost::Node,
            host if host.contains('/') => AllowedHost::Network(host.parse().map_err(|_| ParseAllowedTargetError)?),
            host => {
                let ip: IpAddr = host.parse().map_err(|_| ParseAllowedTargetError)?;
                let bits = if ip.is_ipv4() { 32 } else { 128 };
                AllowedHost::Network(IpPrefix::new(ip, bits).ok_or(ParseAllowedTargetError)?)
            }
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for AllowedTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host {
            AllowedHost::Node => f.write_str("node")?,
            AllowedHost::Network(network) => {
                let single = network.length() == if network.network().is_ipv4() { 32 } else { 128 };
                let host = if single { network.network().to_string() } else { network.to_string() };
                if network.network().is_ipv4() { f.write_str(&host)? } else { write!(f, "[{host}]")? }
            }
        }
        match self.port {
            Some(port) => write!(f, ":{port}"),
            None => f.write_str(":*"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_written_as_they_are_read() {
        for text in ["node:22", "node:*", "192.168.1.7:554", "192.168.1.0/24:*", "[fd00::7]:443", "[fd00::/8]:443"] {
            assert_eq!(text.parse::<AllowedTarget>().unwrap().to_string(), text);
        }
        for wrong in
            ["", "22", "node", "node:", "node:0", "node:+1", "[node]:1", "fd00::7:443", "web:80", "1.2.3.4/33:1"]
        {
            assert!(wrong.parse::<AllowedTarget>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_target_covers_its_host_and_port_and_no_other() {
        let target = |text: &str| text.parse::<AllowedTarget>().unwrap();
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(target("node:22").covers_node(22));
        assert!(!target("node:22").covers_node(23));
        assert!(!target("node:*").covers(ip("192.168.1.7"), 22));
        assert!(target("192.168.1.0/24:*").covers(ip("192.168.1.7"), 9));
        assert!(!target("192.168.1.0/24:80").covers(ip("192.168.1.7"), 9));
        assert!(!target("192.168.1.0/24:*").covers(ip("192.168.2.7"), 9));
        assert!(!target("192.168.1.0/24:*").covers_node(9));
    }
}
