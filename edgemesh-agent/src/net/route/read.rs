//! Asking the kernel for its routes, and what each of them means.

#![expect(clippy::wildcard_enum_match_arm, reason = "the kernel has many kinds of each, of which few matter here")]

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt;
use rtnetlink::{
    Error, Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage},
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags, RouteProtocol,
            RouteType,
        },
    },
};

use super::{Leads, Routes, Table};
use crate::model::IpPrefix;

/// How many routes are looked at. A node has some hundreds; one that carries the whole Internet's has ten times as many.
pub(super) const MAX_ROUTES: usize = 100_000;

/// The routes of the network namespace that `netlink` is in, and whether there are more of them than are looked at.
pub(super) async fn read(netlink: &Handle) -> Result<(Routes, bool), Error> {
    let mut tunnels = HashSet::new();
    let mut links = netlink.link().get().execute();
    while let Some(link) = links.try_next().await? {
        if is_tunnel(&link) {
            tunnels.insert(link.header.index);
        }
    }
    let mut routes = Vec::new();
    let more = each(netlink, |message| {
        routes.extend(meaning(message, &tunnels));
        routes.len() < MAX_ROUTES
    });
    let more = !more.await?;
    Ok((Routes::new(routes), more))
}

/// Shows all routes of both families to `look`, until that says false; says whether it never did.
pub(super) async fn each(netlink: &Handle, mut look: impl FnMut(&RouteMessage) -> bool) -> Result<bool, Error> {
    let mut wanted = true;
    for mut message in [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
    {
        message.header.table = RouteHeader::RT_TABLE_UNSPEC;
        let mut routes = netlink.route().get(message).execute();
        while let Some(message) = routes.try_next().await? {
            // To its end, as the kernel sends it all the same.
            wanted = wanted && look(&message);
        }
    }
    Ok(wanted)
}

/// The network that a route is to.
pub(super) fn prefix_of(message: &RouteMessage) -> Option<IpPrefix> {
    let unspecified = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let network = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    });
    IpPrefix::new(network.unwrap_or(unspecified), message.header.destination_prefix_length)
}

fn table_of(message: &RouteMessage) -> Option<Table> {
    let number = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(number) => Some(*number),
        _ => None,
    });
    match number.unwrap_or_else(|| message.header.table.into()) {
        255 => Some(Table::Local),
        254 => Some(Table::Main),
        253 => Some(Table::Default),
        _ => None,
    }
}

/// Whether every next hop of a route has a gateway.
pub(super) fn has_gateway(message: &RouteMessage) -> bool {
    let hops = hops(message);
    !hops.is_empty() && hops.iter().all(|hop| hop.gateway)
}

#[derive(Clone, Copy, Debug)]
struct Hop {
    gateway: bool,
    index: Option<u32>,
}

/// The next hops that are up.
fn hops(message: &RouteMessage) -> Vec<Hop> {
    let gateway = |attributes: &[RouteAttribute]| {
        attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Gateway(_) | RouteAttribute::Via(_)))
    };
    let several = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::MultiPath(hops) => Some(hops),
        _ => None,
    });
    if let Some(hops) = several {
        let up = hops.iter().filter(|hop| !hop.flags.contains(RouteNextHopFlags::Dead));
        return up.map(|hop| Hop { gateway: gateway(&hop.attributes), index: Some(hop.interface_index) }).collect();
    }
    if message.header.flags.contains(RouteFlags::Dead) {
        return Vec::new();
    }
    let index = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    vec![Hop { gateway: gateway(&message.attributes), index }]
}

/// What a route says; None for one that the kernel passes over, or of a table that is not looked at.
fn meaning(message: &RouteMessage, tunnels: &HashSet<u32>) -> Option<(Table, IpPrefix, u32, Leads)> {
    let (table, prefix) = (table_of(message)?, prefix_of(message)?);
    let metric = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    });
    let leads = match message.header.kind {
        RouteType::Local => Leads::Here,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Broadcast => Leads::Nowhere,
        RouteType::Unicast => {
            let hops = hops(message);
            if hops.is_empty() {
                return None;
            }
            let into_tunnels = hops.iter().all(|hop| hop.index.is_some_and(|index| tunnels.contains(&index)));
            match message.header.protocol {
                _ if prefix.length() <= 1 => Leads::Anywhere,
                RouteProtocol::Ra | RouteProtocol::Dhcp | RouteProtocol::IcmpRedirect => Leads::Advertised,
                _ if hops.iter().all(|hop| hop.gateway) => Leads::Gateway,
                // Made by an address of the device: the network of the tunnel's ends.
                RouteProtocol::Kernel => Leads::OnLink,
                _ if into_tunnels => Leads::TunnelDevice,
                _ => Leads::OnLink,
            }
        }
        // `throw` sends the kernel on to the next table; multicast and anycast are nobody's pod.
        _ => return None,
    };
    Some((table, prefix, metric.unwrap_or(0), leads))
}

/// Whether other hosts are at the other end of a device, by a tunnel.
fn is_tunnel(link: &LinkMessage) -> bool {
    let headless = matches!(
        link.header.link_layer_type,
        LinkLayerType::Tunnel
            | LinkLayerType::Tunnel6
            | LinkLayerType::Sit
            | LinkLayerType::Ipgre
            | LinkLayerType::Ip6gre
            | LinkLayerType::None
    );
    let kinds = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let ethernet = kinds.into_iter().flatten().any(|info| {
        matches!(info, LinkInfo::Kind(InfoKind::Vxlan | InfoKind::Geneve | InfoKind::GreTap | InfoKind::GreTap6))
    });
    headless || ethernet
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::route::RouteNextHop;

    use super::*;

    const WIREGUARD: u32 = 7;
    const ETH0: u32 = 2;

    fn unicast(prefix: &str, protocol: RouteProtocol, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let prefix: IpPrefix = prefix.parse().unwrap();
        let mut message = RouteMessage::default();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = protocol;
        message.header.kind = RouteType::Unicast;
        message.header.destination_prefix_length = prefix.length();
        let destination = match prefix.network() {
            IpAddr::V4(ip) => (AddressFamily::Inet, RouteAddress::Inet(ip)),
            IpAddr::V6(ip) => (AddressFamily::Inet6, RouteAddress::Inet6(ip)),
        };
        message.header.address_family = destination.0;
        message.attributes = attributes;
        if prefix.length() > 0 {
            message.attributes.push(RouteAttribute::Destination(destination.1));
        }
        message
    }

    fn gateway() -> RouteAttribute {
        RouteAttribute::Gateway(RouteAddress::Inet("192.168.1.12".parse().unwrap()))
    }

    fn leads(message: &RouteMessage) -> Option<Leads> {
        meaning(message, &HashSet::from([WIREGUARD])).map(|(.., leads)| leads)
    }

    #[test]
    fn a_route_means_what_those_who_make_such_mean_by_it() {
        use RouteProtocol::{Bird, Boot, Dhcp, Kernel, Ra, Static};
        let via = || vec![gateway(), RouteAttribute::Oif(ETH0)];
        let into = |index| vec![RouteAttribute::Oif(index)];
        for (what, message, expected) in [
            ("flannel host-gw", unicast("10.244.2.0/24", Boot, via()), Leads::Gateway),
            ("Calico by BGP", unicast("10.244.2.64/26", Bird, via()), Leads::Gateway),
            ("Cilium's tunnel", unicast("10.0.2.0/24", Kernel, via()), Leads::Gateway),
            ("flannel wireguard", unicast("10.244.0.0/16", Boot, into(WIREGUARD)), Leads::TunnelDevice),
            ("the tunnel's own subnet", unicast("10.8.0.0/24", Kernel, into(WIREGUARD)), Leads::OnLink),
            ("a LAN, or the bridge of the pods", unicast("10.244.1.0/24", Kernel, into(ETH0)), Leads::OnLink),
            ("a pod of Calico", unicast("10.244.1.5/32", Boot, into(ETH0)), Leads::OnLink),
            ("default", unicast("0.0.0.0/0", Dhcp, via()), Leads::Anywhere),
            ("half of a VPN's default", unicast("128.0.0.0/1", Static, via()), Leads::Anywhere),
            ("classless static routes", unicast("10.0.0.0/8", Dhcp, via()), Leads::Advertised),
            ("route information", unicast("fd00::/8", Ra, via()), Leads::Advertised),
        ] {
            assert_eq!(leads(&message), Some(expected), "{what}");
        }
    }

    #[test]
    fn of_several_next_hops_all_that_are_up_must_lead_away() {
        let hop = |index, gateway: Option<RouteAttribute>, flags| {
            let mut hop = RouteNextHop::default();
            (hop.interface_index, hop.flags) = (index, flags);
            hop.attributes.extend(gateway);
            hop
        };
        let up = RouteNextHopFlags::empty();
        let route = |hops| unicast("10.244.2.0/24", RouteProtocol::Boot, vec![RouteAttribute::MultiPath(hops)]);
        assert_eq!(leads(&route(vec![hop(2, Some(gateway()), up), hop(3, Some(gateway()), up)])), Some(Leads::Gateway));
        assert_eq!(leads(&route(vec![hop(2, Some(gateway()), up), hop(3, None, up)])), Some(Leads::OnLink));
        let dead = hop(3, None, RouteNextHopFlags::Dead);
        assert_eq!(leads(&route(vec![hop(2, Some(gateway()), up), dead.clone()])), Some(Leads::Gateway));
        assert_eq!(leads(&route(vec![dead])), None, "the kernel passes over it");
    }

    #[test]
    fn what_leads_nowhere_is_told_from_what_sends_the_kernel_on_to_the_next_table() {
        let of = |kind| {
            let mut message = unicast("10.244.3.0/26", RouteProtocol::Bird, Vec::new());
            message.header.kind = kind;
            leads(&message)
        };
        assert_eq!(of(RouteType::BlackHole), Some(Leads::Nowhere));
        assert_eq!(of(RouteType::Unreachable), Some(Leads::Nowhere));
        assert_eq!(of(RouteType::Local), Some(Leads::Here));
        assert_eq!(of(RouteType::Throw), None);
        let mut other = unicast("10.244.3.0/26", RouteProtocol::Boot, vec![gateway()]);
        other.attributes.push(RouteAttribute::Table(2004));
        assert_eq!(leads(&other), None, "a table for a rule of somebody's own");
    }
}
