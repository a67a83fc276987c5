//! This node's own addresses, as far as they tell how near a peer is and what to tell peers.

use std::{collections::HashSet, net::IpAddr};

use nix::{ifaddrs::getifaddrs, sys::socket::SockaddrStorage};

/// Devices whose addresses mean nothing to other nodes; EdgeMesh (Go) has these and `br`, which leaves out the LAN bridges
/// of many hosts too (`pkg/tunnel/util.go`).
const LOCAL_DEVICES: [&str; 11] =
    ["lo", "docker", "edgemesh", "tunl", "flannel", "cni", "kube-ipvs", "veth", "cali", "cilium", "nodelocaldns"];

fn address(storage: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = storage.as_sockaddr_in().map(|address| address.ip().into());
    v4.or_else(|| storage.as_sockaddr_in6().map(|address| address.ip().into()))
}

/// Whether `ip` is on a link of this node, by its interfaces' networks.
pub(super) fn on_link(ip: IpAddr) -> bool {
    let Ok(interfaces) = getifaddrs() else { return false };
    interfaces.into_iter().any(|interface| {
        let own = interface.address.as_ref().and_then(address);
        let mask = interface.netmask.as_ref().and_then(address);
        own.zip(mask).is_some_and(|(own, mask)| same_network(ip, own, mask))
    })
}

/// The addresses that other nodes may be told of, once this node listens on `listen`.
pub(super) fn listening_on(listen: &[IpAddr]) -> Vec<IpAddr> {
    let Ok(interfaces) = getifaddrs() else { return Vec::new() };
    let own = interfaces.filter_map(|interface| interface.address.as_ref().and_then(address));
    let listened =
        |own: &IpAddr| listen.iter().any(|ip| ip == own || (ip.is_unspecified() && ip.is_ipv4() == own.is_ipv4()));
    let told = Telling::read();
    own.filter(|ip| listened(ip) && told.is_worth(*ip)).collect()
}

fn same_network(a: IpAddr, b: IpAddr, mask: IpAddr) -> bool {
    match (a.to_canonical(), b, mask) {
        // A point-to-point link's or a single address says nothing about neighbours.
        (a, b, _) if a == b => true,
        (IpAddr::V4(a), IpAddr::V4(b), IpAddr::V4(mask)) => {
            let mask = u32::from(mask);
            mask != 0 && u32::from(a) & mask == u32::from(b) & mask
        }
        (IpAddr::V6(a), IpAddr::V6(b), IpAddr::V6(mask)) => {
            let mask = u128::from(mask);
            mask != 0 && u128::from(a) & mask == u128::from(b) & mask
        }
        _ => false,
    }
}

/// Which of this node's addresses other nodes may be told of: not those of loopback, bridges of containers and the like.
#[derive(Debug)]
pub(super) struct Telling {
    /// Addresses of devices that mean nothing to others.
    local: HashSet<IpAddr>,
}

impl Telling {
    /// Reads the interfaces, once for any number of addresses: a node with many pods has many.
    pub(super) fn read() -> Self {
        let is_local = |name: &str| LOCAL_DEVICES.iter().any(|prefix| name.starts_with(prefix));
        let interfaces = getifaddrs().into_iter().flatten();
        let local = interfaces.filter(|interface| is_local(&interface.interface_name));
        Self { local: local.filter_map(|interface| interface.address.as_ref().and_then(address)).collect() }
    }

    pub(super) fn is_worth(&self, ip: IpAddr) -> bool {
        !is_link_local(ip) && !self.local.contains(&ip)
    }
}

/// Whether an address says nothing outside its host or link.
pub(super) fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local() || ip.is_unspecified(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn same(a: &str, b: &str, mask: &str) -> bool {
        same_network(a.parse().unwrap(), b.parse().unwrap(), mask.parse().unwrap())
    }

    #[test]
    fn neighbours_share_a_network() {
        assert!(same("192.168.1.7", "192.168.1.1", "255.255.255.0"));
        assert!(!same("192.168.2.7", "192.168.1.1", "255.255.255.0"));
        assert!(same("::ffff:10.0.0.7", "10.0.0.1", "255.0.0.0"));
        assert!(same("2001:db8::7", "2001:db8::1", "ffff:ffff:ffff:ffff::"));
        assert!(!same("2001:db8:1::7", "2001:db8::1", "ffff:ffff:ffff:ffff::"));
        assert!(!same("8.8.8.8", "10.0.0.1", "0.0.0.0"));
    }

    #[test]
    fn loopback_is_near_and_nobody_elses_business() {
        assert!(on_link("127.0.0.1".parse().unwrap()));
        for local in ["127.0.0.1", "169.254.96.16", "fe80::1"] {
            assert!(!Telling::read().is_worth(local.parse().unwrap()), "{local}");
        }
    }
}
