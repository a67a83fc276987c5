//! What a node dials for others.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{NodeName, Protocol};

/// Where a stream is to lead, as the near side asks for it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Target {
    /// An address on the far node, such as that of a pod.
    Address(SocketAddr),
    /// A port of the far node itself, which knows its own address best.
    Node {
        /// The port.
        port: u16,
    },
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}

/// What a [`DialPolicy`] says to a request.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Decision {
    /// Dial this address: the target itself, or, for [`Target::Node`], the node's own.
    Allowed(SocketAddr),
    /// Do not dial; the near side is told the rule.
    NotAllowed {
        /// Few words that name the rule, such as `not an endpoint of this node`.
        rule: String,
    },
}

/// Why a [`DialPolicy`] allows a target.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Grounds {
    /// Few words that name the rule, such as `an endpoint of a Service on this node`; empty where there is none to name.
    pub rule: String,
    /// `NAMESPACE/NAME` of the Services that have the target as an endpoint on this node.
    pub services: Vec<String>,
}

/// Decides what this node dials for other members.
///
/// Asked for each stream, on a thread of the runtime: it must not block. Whatever it says, addresses that lead to the
/// node's inside are refused ([`always_refused`]).
pub trait DialPolicy: Send + Sync + 'static {
    /// Decides on `from`'s request for `target`.
    fn decide(&self, from: &NodeName, protocol: Protocol, target: Target) -> Decision;

    /// Why a target is allowed that [`Self::decide`] has just allowed, for somebody who looks for a fault. May take
    /// milliseconds, as it is asked seldom.
    fn grounds(&self, protocol: Protocol, target: Target) -> Grounds;
}

impl<F> DialPolicy for F
where
    F: Fn(&NodeName, Protocol, Target) -> Decision + Send + Sync + 'static,
{
    fn decide(&self, from: &NodeName, protocol: Protocol, target: Target) -> Decision {
        self(from, protocol, target)
    }

    fn grounds(&self, _: Protocol, _: Target) -> Grounds {
        Grounds::default()
    }
}

/// Metadata services beside 169.254.169.254, which is link-local anyway: Amazon's over IPv6, Alibaba's, Azure's, Oracle's.
const METADATA: [IpAddr; 4] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
];

/// The IPv4 address that an IPv6 address leads to: mapped, compatible (RFC 4291), or through a NAT64 (RFC 6052).
fn within(v6: Ipv6Addr) -> Option<Ipv4Addr> {
    let nat64 = v6.segments().starts_with(&[0x64, 0xff9b, 0, 0, 0, 0]);
    if nat64 {
        let [.., a, b, c, d] = v6.octets();
        return Some(Ipv4Addr::new(a, b, c, d));
    }
    v6.to_ipv4().filter(|_| !v6.is_loopback() && !v6.is_unspecified())
}

/// The rule by which an address is refused to everybody, if there is one: loopback, unspecified, link-local (metadata
/// services of clouds, the agent's own bridge address), multicast and broadcast.
///
/// What listens there trusts whoever reaches it to be on the node.
pub fn always_refused(ip: IpAddr) -> Option<&'static str> {
    let link_local_rule = |ip: IpAddr| {
        if ip == IpAddr::from([169, 254, 169, 254]) {
            "the metadata address is never dialled for others"
        } else {
            "link-local addresses are never dialled for others"
        }
    };
    // An IPv4 address in any of its IPv6 clothes reaches the same host.
    let ip = match ip {
        IpAddr::V6(v6) => within(v6).map_or(ip, IpAddr::V4),
        IpAddr::V4(_) => ip,
    };
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    let this_network = matches!(ip, IpAddr::V4(ip) if ip.octets()[0] == 0);
    if ip.is_loopback() {
        Some("loopback addresses are never dialled for others")
    } else if ip.is_unspecified() || this_network {
        Some("the unspecified address is never dialled for others")
    } else if link_local {
        Some(link_local_rule(ip))
    } else if METADATA.contains(&ip) {
        Some("the metadata address is never dialled for others")
    } else if ip.is_multicast() || broadcast {
        Some("multicast and broadcast addresses are never dialled for others")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_inside_of_a_node_is_refused_in_all_its_spellings() {
        for (ip, word) in [
            ("127.0.0.1", "loopback"),
            ("127.255.3.4", "loopback"),
            ("::1", "loopback"),
            ("::ffff:127.0.0.1", "loopback"),
            ("::127.0.0.1", "loopback"),
            ("0.0.0.0", "unspecified"),
            ("0.0.0.1", "unspecified"),
            ("::", "unspecified"),
            ("169.254.169.254", "metadata"),
            ("::ffff:169.254.169.254", "metadata"),
            ("fd00:ec2::254", "metadata"),
            ("100.100.100.200", "metadata"),
            ("64:ff9b::a9fe:a9fe", "metadata"),
            ("64:ff9b::7f00:1", "loopback"),
            ("169.254.96.16", "link-local"),
            ("fe80::1", "link-local"),
            ("224.0.0.1", "multicast"),
            ("255.255.255.255", "broadcast"),
            ("ff02::1", "multicast"),
        ] {
            let rule = always_refused(ip.parse().unwrap()).unwrap_or_else(|| panic!("{ip} is let through"));
            assert!(rule.contains(word), "{ip}: {rule}");
        }
    }

    #[test]
    fn addresses_of_pods_and_nodes_pass() {
        for ip in [
            "10.244.1.7",
            "192.168.1.1",
            "172.16.0.1",
            "8.8.8.8",
            "64:ff9b::808:808",
            "fd00::7",
            "2001:db8::1",
            "198.18.0.1",
        ] {
            assert_eq!(always_refused(ip.parse().unwrap()), None, "{ip}");
        }
    }
}
