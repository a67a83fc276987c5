//! Asking the kernel for links, addresses and routes.

#![expect(clippy::wildcard_enum_match_arm, reason = "the kernel has many kinds of each, of which few matter here")]

use futures::TryStreamExt;
use rtnetlink::{
    Error, Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressScope},
        link::{LinkAttribute, LinkLayerType, LinkMessage},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
    },
};

use super::choose::{Header, Link, Picture, Route};

/// Takes a picture of the network namespace that `netlink` is in.
///
/// # Errors
///
/// The kernel refuses a dump.
pub(super) async fn take(netlink: &Handle) -> Result<Picture, Error> {
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
            add_routes(&message, &mut picture.routes);
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
    let mut link = Link { index: message.header.index, header, ..Link::default() };
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

fn add_routes(message: &RouteMessage, routes: &mut Vec<Route>) {
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
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => {
                routes.push(Route { index: *index, leads_away: default || gateway(&message.attributes) });
            }
            RouteAttribute::MultiPath(hops) => routes.extend(
                hops.iter()
                    .map(|hop| Route { index: hop.interface_index, leads_away: default || gateway(&hop.attributes) }),
            ),
            _ => {}
        }
    }
}
