use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use super::AliasRanges;
use crate::{
    model::{IpPrefix, Reason},
    net::route::{Leads, Routes},
};

/// Networks whose way is decided by the configuration (`modules.edgeTunnel`).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Overrides {
    /// `directCIDRs`.
    pub direct: Vec<IpPrefix>,
    /// `neverDirectCIDRs`.
    pub never_direct: Vec<IpPrefix>,
}

/// The nodes that the tunnel has met, each with the addresses where it proved to be that node.
pub type Meetings = BTreeSet<(Box<str>, IpAddr)>;

/// What decides how endpoints are reached; the same answers as long as nothing in it changes.
#[derive(Clone, Debug)]
pub struct Reach {
    node: Box<str>,
    ranges: AliasRanges,
    overrides: Overrides,
    routes: Arc<Routes>,
    meetings: Arc<Meetings>,
}

impl Reach {
    /// That of the node of this name, without routes and without meetings.
    pub fn new(node: &str, ranges: AliasRanges, overrides: Overrides) -> Self {
        Self { node: node.into(), ranges, overrides, routes: Arc::default(), meetings: Arc::default() }
    }

    /// The same with other routes.
    #[must_use]
    pub fn with_routes(self, routes: Arc<Routes>) -> Self {
        Self { routes, ..self }
    }

    /// The same with other meetings.
    #[must_use]
    pub fn with_meetings(self, meetings: Arc<Meetings>) -> Self {
        Self { meetings, ..self }
    }

    /// This node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Whom the tunnel has met.
    pub fn meetings(&self) -> &Arc<Meetings> {
        &self.meetings
    }

    /// How an endpoint is reached, and why so. `host_network` is whether its address is one of its node's own.
    ///
    /// - No node, or this one: local.
    /// - The configuration comes first; of its networks the longest one counts, and of two the same, that which forbids.
    /// - A host network is reached directly where the tunnel has met that very node at that very address. A route says
    ///   nothing of it: 192.168.1.0/24 is the LAN of half the world, and 192.168.1.10 somebody in each.
    /// - A pod is reached directly by a route that somebody put there for the pods of other nodes, see [`Leads`].
    pub fn reason(&self, node: Option<&str>, addr: IpAddr, host_network: bool) -> Reason {
        let Some(node) = node else { return Reason::NoNode };
        if *node == *self.node {
            return Reason::OwnNode;
        }
        if self.ranges.contains(addr) {
            // It would go round in circles: from the range to the tunnel, and from there to the range.
            return Reason::InAliasRange;
        }
        match (longest(&self.overrides.direct, addr), longest(&self.overrides.never_direct, addr)) {
            (Some(direct), Some(never)) if direct.length() > never.length() => return Reason::DirectCidr(direct),
            (_, Some(never)) => return Reason::NeverDirectCidr(never),
            (Some(direct), None) => return Reason::DirectCidr(direct),
            (None, None) => {}
        }
        if host_network {
            let met = self.meetings.contains(&(node.into(), addr));
            return if met { Reason::Met } else { Reason::NotMet };
        }
        match self.routes.to(addr) {
            None => Reason::NoRoute,
            Some((route, leads)) => match leads {
                Leads::Anywhere => Reason::NoRoute,
                Leads::Gateway => Reason::Gateway(route),
                Leads::TunnelDevice => Reason::TunnelDevice(route),
                Leads::OnLink => Reason::OnLink(route),
                Leads::Advertised => Reason::Advertised(route),
                Leads::Nowhere => Reason::Unreachable(route),
                Leads::Here => Reason::OwnAddress,
            },
        }
    }
}

fn longest(prefixes: &[IpPrefix], addr: IpAddr) -> Option<IpPrefix> {
    prefixes.iter().filter(|prefix| prefix.contains(addr)).max_by_key(|prefix| prefix.length()).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Way, net::route::Table};

    fn prefix(text: &str) -> IpPrefix {
        text.parse().unwrap()
    }

    fn reach(direct: &[&str], never: &[&str]) -> Reach {
        let prefixes = |texts: &[&str]| texts.iter().map(|text| prefix(text)).collect();
        let overrides = Overrides { direct: prefixes(direct), never_direct: prefixes(never) };
        let ranges = AliasRanges { v4: prefix("198.18.0.0/16"), v6: prefix("fd00:a11a::/64") };
        let routes = Routes::new([
            (Table::Local, prefix("192.168.1.10/32"), 0, Leads::Here),
            (Table::Main, prefix("0.0.0.0/0"), 0, Leads::Anywhere),
            (Table::Main, prefix("192.168.1.0/24"), 0, Leads::OnLink),
            (Table::Main, prefix("10.244.1.0/24"), 0, Leads::OnLink),
            (Table::Main, prefix("10.244.2.0/24"), 0, Leads::Gateway),
            (Table::Main, prefix("10.245.0.0/16"), 0, Leads::TunnelDevice),
            (Table::Main, prefix("10.245.3.0/24"), 0, Leads::Nowhere),
            (Table::Main, prefix("10.0.0.0/8"), 0, Leads::Advertised),
            (Table::Main, prefix("fd00:10:244:2::/64"), 0, Leads::Gateway),
        ]);
        Reach::new("edge1", ranges, overrides).with_routes(Arc::new(routes))
    }

    fn reason(reach: &Reach, node: &str, addr: &str) -> Reason {
        reach.reason(Some(node), addr.parse().unwrap(), false)
    }

    #[test]
    fn what_is_on_this_node_or_on_none_is_local_whatever_else_holds() {
        let reach = reach(&[], &["0.0.0.0/0"]);
        assert_eq!(reason(&reach, "edge1", "10.244.1.2"), Reason::OwnNode);
        assert_eq!(reach.reason(None, "93.184.216.34".parse().unwrap(), false), Reason::NoNode);
    }

    #[test]
    fn a_pod_is_direct_where_a_route_was_made_for_it_and_remote_elsewhere() {
        let reach = reach(&[], &[]);
        for (addr, expected) in [
            ("10.244.2.7", Reason::Gateway(prefix("10.244.2.0/24"))),
            ("fd00:10:244:2::7", Reason::Gateway(prefix("fd00:10:244:2::/64"))),
            ("10.245.1.1", Reason::TunnelDevice(prefix("10.245.0.0/16"))),
            // Another node's pod with an address out of this node's own pod range: the bridge leads to a stranger.
            ("10.244.1.7", Reason::OnLink(prefix("10.244.1.0/24"))),
            ("10.245.3.1", Reason::Unreachable(prefix("10.245.3.0/24"))),
            ("10.9.9.9", Reason::Advertised(prefix("10.0.0.0/8"))),
            ("172.17.0.2", Reason::NoRoute),
            ("fd00:10:244:3::7", Reason::NoRoute),
            ("192.168.1.10", Reason::OwnAddress),
            ("198.18.3.4", Reason::InAliasRange),
        ] {
            assert_eq!(reason(&reach, "edge2", addr), expected, "{addr}");
        }
    }

    #[test]
    fn a_host_network_is_direct_only_where_its_node_was_met() {
        let at = |addr: &str| -> IpAddr { addr.parse().unwrap() };
        let met = |node: &str, addr: &str| (Box::from(node), at(addr));
        let meetings = Meetings::from([met("edge2", "192.168.1.12"), met("edge3", "192.168.1.13")]);
        let reach = reach(&[], &[]).with_meetings(Arc::new(meetings));
        let reason = |node, addr: &str| reach.reason(Some(node), at(addr), true);
        assert_eq!(reason("edge2", "192.168.1.12"), Reason::Met);
        assert_eq!(reason("edge2", "192.168.1.13"), Reason::NotMet, "that one is edge3's");
        assert_eq!(reason("edge4", "192.168.1.12"), Reason::NotMet, "the same address in another LAN");
        assert_eq!(reason("edge2", "10.244.2.5"), Reason::NotMet, "no route counts for it");
    }

    #[test]
    fn the_configuration_decides_first_and_its_longest_network_counts() {
        let reach = reach(&["172.17.0.0/16", "10.244.2.128/25", "10.9.0.0/16"], &["10.244.2.0/24", "10.9.0.0/16"]);
        for (addr, expected, way) in [
            ("172.17.0.2", Reason::DirectCidr(prefix("172.17.0.0/16")), Way::Direct),
            ("10.244.2.7", Reason::NeverDirectCidr(prefix("10.244.2.0/24")), Way::Remote),
            ("10.244.2.200", Reason::DirectCidr(prefix("10.244.2.128/25")), Way::Direct),
            ("10.9.1.1", Reason::NeverDirectCidr(prefix("10.9.0.0/16")), Way::Remote),
        ] {
            assert_eq!(reason(&reach, "edge2", addr), expected, "{addr}");
            assert_eq!(expected.way(), way);
        }
    }
}
