//! The links, addresses and routes of this node, as the kernel tells them at one moment.

#![expect(clippy::wildcard_enum_match_arm, reason = "the kernel has many kinds of each, of which few matter here")]

use std::net::IpAddr;

use futures::TryStreamExt;
use rtnetlink::{
    Error, Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressScope},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
    },
};

/// A network interface.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub header: Header,
    pub kind: Kind,
    /// The bridge or bond that it is a port of.
    pub master: Option<u32>,
}

/// What the packets of an interface begin with.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Header {
    #[default]
    Ethernet,
    /// Their IP header.
    None,
    /// Something that the programs for packets do not read; also the loopback device, where nothing comes from outside.
    Other,
}

/// What an interface is, as far as it tells who is behind it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Kind {
    /// A tunnel, a bond, and whatever else does not tell.
    #[default]
    Other,
    Loopback,
    /// A device of its own, as all that no driver of virtual ones has made.
    Hardware,
    /// An end of a pair (veth, netkit) or of a program (tun, tap): pods and guests are behind such.
    Pair,
    Bridge,
    /// On top of the interface with the index: a VLAN, a macvlan.
    Above(u32),
}

/// A route to other hosts, of any table.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Route {
    /// The interface it leaves by.
    pub index: u32,
    /// It has a gateway, or is a default route.
    pub leads_away: bool,
}

/// The links, addresses and routes of the node at one moment.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Picture {
    pub links: Vec<Link>,
    /// Those of global scope, with the index of their interface, in the kernel's order.
    pub addresses: Vec<(u32, IpAddr)>,
    pub routes: Vec<Route>,
    /// The interfaces with default routes, of any table, each as often as it has some.
    pub defaults: Vec<u32>,
}

/// Whether a name fits one of the patterns, in which `*` stands for any characters.
pub fn matches_any(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| matches(pattern, name))
}

/// Takes a picture of the network namespace that `netlink` is in.
///
/// # Errors
///
/// The kernel refuses a dump.
pub async fn take(netlink: &Handle) -> Result<Picture, Error> {
    let mut picture = Picture::default();
    let mut links = netlink.link().get().execute();
    while let Some(message) = links.try_next().await? {
        picture.links.extend(link(&message));
    }
    let mut addresses = netlink.address().get().execute();
    while let Some(message) = addresses.try_next().await? {
        if message.header.scope != AddressScope::Universe {
            continue;
        }
        // Of a point-to-point link, `Address` is the other end's.
        let find = |local: bool| {
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) if local => Some(*ip),
                AddressAttribute::Address(ip) if !local => Some(*ip),
                _ => None,
            })
        };
        if let Some(ip) = find(true).or_else(|| find(false)) {
            picture.addresses.push((message.header.index, ip));
        }
    }
    for mut message in [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ] {
        message.header.table = 0;
        let mut routes = netlink.route().get(message).execute();
        while let Some(message) = routes.try_next().await? {
            add_routes(&message, &mut picture);
        }
    }
    Ok(picture)
}

fn link(message: &LinkMessage) -> Option<Link> {
    let header = match message.header.link_layer_type {
        LinkLayerType::Ether => Header::Ethernet,
        // `dev_is_mac_header_xmit` of the kernel.
        LinkLayerType::Tunnel
        | LinkLayerType::Tunnel6
        | LinkLayerType::Sit
        | LinkLayerType::Ipgre
        | LinkLayerType::Ip6gre
        | LinkLayerType::None
        | LinkLayerType::Rawip
        | LinkLayerType::Ppp => Header::None,
        _ => Header::Other,
    };
    let mut link = Link { index: message.header.index, header, kind: kind(message), ..Link::default() };
    for attribute in &message.attributes {
        if let LinkAttribute::IfName(name) = attribute {
            link.name.clone_from(name);
        }
        if let LinkAttribute::Controller(index) = attribute {
            link.master = Some(*index);
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn kind(message: &LinkMessage) -> Kind {
    if message.header.flags.contains(LinkFlags::Loopback) {
        return Kind::Loopback;
    }
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let made_as = infos.into_iter().flatten().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    match made_as {
        None => Kind::Hardware,
        Some(InfoKind::Veth | InfoKind::Netkit | InfoKind::Tun) => Kind::Pair,
        Some(InfoKind::Bridge) => Kind::Bridge,
        Some(InfoKind::Vlan | InfoKind::MacVlan | InfoKind::MacVtap | InfoKind::IpVlan | InfoKind::IpVtap) => {
            let below = message.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::Link(index) => Some(*index),
                _ => None,
            });
            below.map_or(Kind::Other, Kind::Above)
        }
        Some(_) => Kind::Other,
    }
}

fn add_routes(message: &RouteMessage, picture: &mut Picture) {
    if message.header.kind != RouteType::Unicast
        || !matches!(message.header.address_family, AddressFamily::Inet | AddressFamily::Inet6)
    {
        return;
    }
    let gateway = |attributes: &[RouteAttribute]| {
        attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Gateway(_) | RouteAttribute::Via(_)))
    };
    let default = message.header.destination_prefix_length == 0;
    let link_local = message.attributes.iter().any(|attribute| {
        let RouteAttribute::Destination(destination) = attribute else { return false };
        match destination {
            RouteAddress::Inet(ip) => ip.is_link_local(),
            RouteAddress::Inet6(ip) => ip.is_unicast_link_local(),
            _ => false,
        }
    });
    if link_local {
        return;
    }
    let mut add = |index: u32, attributes: &[RouteAttribute]| {
        picture.routes.push(Route { index, leads_away: default || gateway(attributes) });
        if default {
            picture.defaults.push(index);
        }
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => add(*index, &message.attributes),
            RouteAttribute::MultiPath(hops) => hops.iter().for_each(|hop| add(hop.interface_index, &hop.attributes)),
            _ => {}
        }
    }
}

fn matches(pattern: &str, name: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else { return pattern == name };
    let Some(rest) = name.strip_prefix(head) else { return false };
    (0..=rest.len()).any(|at| rest.get(at..).is_some_and(|rest| matches(tail, rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, name, expected) in [
            ("eth0", "eth0", true),
            ("eth0", "eth01", false),
            ("eth*", "eth", true),
            ("*", "anything", true),
            ("e*h*1", "eth01", true),
            ("e*h*1", "eth02", false),
            ("*.100", "eth0.100", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
