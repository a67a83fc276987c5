//! The node's routes: what they say of the way to a pod, followed as they change; and the route that makes the range of
//! the aliases local.

mod follow;
mod local;
mod read;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

pub use follow::follow;
pub use local::{LocalRangeError, ensure_local, remove_local};

use crate::model::IpPrefix;

/// What a route says of the way to a pod on another node.
///
/// All that a route tells of itself is where it leads and who made it. From that it has to be concluded whether it was
/// made for the pods of another node, as a cluster's network does for all it can reach, or whether the address merely
/// falls into it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Leads {
    /// The default route, or one of the two halves of the address space that VPN clients put before it: it leads to all
    /// addresses, so it says nothing of one.
    Anywhere,
    /// To another host that forwards: what flannel (host-gw and vxlan), Calico, Cilium, Antrea, kube-router and kindnet
    /// make for the pods of each other node. Direct.
    Gateway,
    /// Into a device whose other end is other hosts (WireGuard, IPIP, VXLAN and the like), and not because the device has
    /// an address in it: what flannel (wireguard) and Calico (WireGuard) make. Direct.
    TunnelDevice,
    /// A neighbour on a link, which is either the network that one of this node's own addresses is in, a LAN or the
    /// bridge of its pods, or one pod of this node (the host routes of Calico, Cilium). Sites repeat both, so another
    /// node's pod in it is somebody else.
    OnLink,
    /// As [`Leads::Gateway`], but a router advertised it (RFC 4191), DHCP did (RFC 3442), or it is an ICMP redirect: it
    /// tells of the LAN, and no cluster's network makes such.
    Advertised,
    /// Nothing is there: `blackhole`, `unreachable`, `prohibit`, or a broadcast address.
    Nowhere,
    /// This node itself.
    Here,
}

/// The tables that the kernel looks into where nobody has made rules of his own, in its order. What other rules lead to is
/// not looked at: who sets such can set `directCIDRs`, too.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Table {
    Local,
    Main,
    Default,
}

/// The routes of one moment, ready to be asked.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Routes {
    /// By table, then the longest prefixes first. The value is the metric and where the route with the lowest leads.
    tables: Tables,
}

type Tables = BTreeMap<(Table, Reverse<u8>), HashMap<IpAddr, (u32, Leads)>>;

impl Routes {
    /// From routes with their table and metric, in any order.
    pub fn new(routes: impl IntoIterator<Item = (Table, IpPrefix, u32, Leads)>) -> Self {
        let mut tables = Tables::new();
        for (table, prefix, metric, leads) in routes {
            let known = tables.entry((table, Reverse(prefix.length()))).or_default().entry(prefix.network());
            let best = known.or_insert((metric, leads));
            if metric < best.0 {
                *best = (metric, leads);
            }
        }
        Self { tables }
    }

    /// The route that the kernel takes to an address; None without any.
    pub fn to(&self, addr: IpAddr) -> Option<(IpPrefix, Leads)> {
        self.tables.iter().find_map(|((_, Reverse(length)), routes)| {
            let prefix = IpPrefix::new(addr, *length)?;
            routes.get(&prefix.network()).map(|(_, leads)| (prefix, *leads))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(rows: &[(Table, &str, u32, Leads)]) -> Routes {
        Routes::new(
            rows.iter().map(|(table, prefix, metric, leads)| (*table, prefix.parse().unwrap(), *metric, *leads)),
        )
    }

    #[test]
    fn the_first_table_with_a_route_decides_then_the_longest_prefix_then_the_lowest_metric() {
        let routes = routes(&[
            (Table::Main, "10.0.0.0/8", 0, Leads::Gateway),
            (Table::Local, "10.0.0.0/12", 0, Leads::Here),
            (Table::Default, "10.20.0.0/16", 0, Leads::OnLink),
            (Table::Default, "11.0.0.0/8", 0, Leads::OnLink),
            (Table::Main, "13.1.0.0/16", 100, Leads::OnLink),
            (Table::Main, "13.1.0.0/16", 50, Leads::TunnelDevice),
            (Table::Main, "13.1.0.0/16", 70, Leads::Nowhere),
            (Table::Main, "::/0", 0, Leads::Anywhere),
        ]);
        let to = |addr: &str| routes.to(addr.parse().unwrap()).map(|(prefix, leads)| (prefix.to_string(), leads));
        assert_eq!(to("10.1.2.3"), Some(("10.0.0.0/12".to_owned(), Leads::Here)));
        assert_eq!(to("10.20.0.1"), Some(("10.0.0.0/8".to_owned(), Leads::Gateway)));
        assert_eq!(to("11.0.0.1"), Some(("11.0.0.0/8".to_owned(), Leads::OnLink)));
        assert_eq!(to("12.0.0.1"), None);
        assert_eq!(to("fd00::1"), Some(("::/0".to_owned(), Leads::Anywhere)));
        assert_eq!(to("13.1.2.3"), Some(("13.1.0.0/16".to_owned(), Leads::TunnelDevice)));
    }
}
