//! Which interfaces get programs: decided from a picture of the node's links, addresses and routes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use edgemesh_common::{
    Addr,
    nat::{GUARD_ONLY, GUEST, Interface, NO_LINK_HEADER, UPLINK},
};

use crate::net::{
    picture::{Header, Link, Picture, Route, matches_any},
    uplinks,
};

/// What the configuration and the tables say.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wish<'a> {
    /// Patterns; empty for a choice by addresses and routes.
    pub(super) uplinks: &'a [String],
    /// Patterns.
    pub(super) guests: &'a [String],
    /// This node's, as its Node object has them.
    pub(super) node: &'a [IpAddr],
    /// Whether there is anything to serve for the outside.
    pub(super) outside: bool,
    /// Whether there are aliases to keep the outside from: all that other machines are behind, as [`uplinks::choose`] has it
    /// for DNS, besides where Services are served.
    pub(super) guard: bool,
}

/// An interface that is to have programs.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Chosen {
    pub(super) name: String,
    pub(super) interface: Interface,
}

/// The interfaces that are to have programs, by index.
pub(super) fn choose(picture: &Picture, wish: Wish<'_>) -> BTreeMap<u32, Chosen> {
    let mut chosen = BTreeMap::new();
    let outside: BTreeSet<u32> =
        uplinks::choose(picture, wish.uplinks).into_iter().map(|uplink| uplink.index).collect();
    for link in &picture.links {
        let header = match link.header {
            Header::Ethernet => 0,
            Header::None => NO_LINK_HEADER,
            Header::Other => continue,
        };
        let role = if matches_any(wish.guests, &link.name) {
            GUEST
        } else if wish.outside && is_uplink(picture, wish, link) {
            UPLINK
        } else if wish.guard && (outside.contains(&link.index) || is_uplink(picture, wish, link)) {
            // Services are served where their clients are to be expected; aliases are nobody's outside this node.
            UPLINK | GUARD_ONLY
        } else {
            continue;
        };
        let [v4, v6] = [true, false].map(|four| address(picture, wish, link, four));
        let interface = Interface { v4, v6, flags: header | role };
        chosen.insert(link.index, Chosen { name: link.name.clone(), interface });
    }
    chosen
}

fn is_uplink(picture: &Picture, wish: Wish<'_>, link: &Link) -> bool {
    if !wish.uplinks.is_empty() {
        return matches_any(wish.uplinks, &link.name);
    }
    let has_node_address = picture.addresses.iter().any(|(at, ip)| *at == link.index && wish.node.contains(ip));
    // A tunnel without Ethernet needs no gateway to lead to other hosts.
    let leads_away = |route: &Route| route.index == link.index && (route.leads_away || link.header == Header::None);
    has_node_address || picture.routes.iter().any(leads_away)
}

/// The node's address for what leaves by a link: one on it that is the Node's, else any on it or on its bridge, else the
/// Node's. Unspecified for none.
fn address(picture: &Picture, wish: Wish<'_>, link: &Link, four: bool) -> Addr {
    let on = |index: u32| picture.addresses.iter().filter(move |(at, ip)| *at == index && ip.is_ipv4() == four);
    let own = || on(link.index).chain(link.master.into_iter().flat_map(on)).map(|(_, ip)| *ip);
    let nodes = || wish.node.iter().copied().filter(|ip| ip.is_ipv4() == four);
    let found = own().find(|ip| wish.node.contains(ip)).or_else(|| own().next()).or_else(|| nodes().next());
    found.map_or_else(Addr::default, Addr::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::picture::Kind;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn link(index: u32, name: &str) -> Link {
        Link { index, name: name.to_owned(), ..Link::default() }
    }

    /// A node as flannel makes it, with a guest.
    fn picture() -> Picture {
        Picture {
            links: vec![
                Link { header: Header::Other, kind: Kind::Loopback, ..link(1, "lo") },
                Link { kind: Kind::Hardware, ..link(2, "eth0") },
                Link { kind: Kind::Hardware, ..link(3, "eth1") },
                link(4, "flannel.1"),
                Link { kind: Kind::Bridge, ..link(5, "cni0") },
                Link { master: Some(5), kind: Kind::Pair, ..link(6, "veth1234") },
                Link { master: Some(5), kind: Kind::Pair, ..link(7, "tap0") },
                Link { header: Header::None, ..link(8, "wg0") },
            ],
            addresses: vec![
                (2, ip("192.168.1.1")),
                (2, ip("192.168.1.10")),
                (2, ip("2001:db8::10")),
                (3, ip("172.16.0.1")),
                (5, ip("10.244.1.1")),
            ],
            routes: vec![
                Route { index: 2, leads_away: true },
                Route { index: 3, leads_away: false },
                Route { index: 4, leads_away: true },
                Route { index: 5, leads_away: false },
                Route { index: 8, leads_away: false },
            ],
            defaults: vec![2],
        }
    }

    fn names(chosen: &BTreeMap<u32, Chosen>, role: u32) -> Vec<&str> {
        chosen.values().filter(|c| c.interface.flags & role != 0).map(|c| c.name.as_str()).collect()
    }

    #[test]
    fn uplinks_are_what_leads_to_other_hosts_and_pods_do_not() {
        let node = [ip("192.168.1.10")];
        let chosen = choose(&picture(), Wish { node: &node, outside: true, ..Wish::default() });
        assert_eq!(names(&chosen, UPLINK), ["eth0", "flannel.1", "wg0"]);
        assert_eq!(names(&chosen, NO_LINK_HEADER), ["wg0"]);
        let node = [ip("172.16.0.1")];
        let chosen = choose(&picture(), Wish { node: &node, outside: true, ..Wish::default() });
        assert_eq!(names(&chosen, UPLINK), ["eth0", "eth1", "flannel.1", "wg0"]);
    }

    #[test]
    fn without_a_service_for_the_outside_no_uplink_is_touched() {
        let guests = ["tap*".to_owned()];
        let chosen = choose(&picture(), Wish { guests: &guests, ..Wish::default() });
        assert_eq!((names(&chosen, UPLINK), names(&chosen, GUEST)), (vec![], vec!["tap0"]));
    }

    #[test]
    fn aliases_are_guarded_from_all_other_machines_whatever_else_is_served_there() {
        let node = [ip("192.168.1.10")];
        let wish = Wish { node: &node, guard: true, ..Wish::default() };
        let guarded = choose(&picture(), wish);
        assert_eq!(names(&guarded, GUARD_ONLY), ["eth0", "eth1", "flannel.1", "wg0"], "a LAN without a gateway, too");
        let serving = choose(&picture(), Wish { outside: true, ..wish });
        assert_eq!(names(&serving, UPLINK), ["eth0", "eth1", "flannel.1", "wg0"]);
        assert_eq!(names(&serving, GUARD_ONLY), ["eth1"], "where no Service is served");
    }

    #[test]
    fn aliases_are_guarded_on_what_is_made_of_hardware_and_pods_are_not_kept_out() {
        let mut picture = picture();
        let port = |index, name, kind, master| Link { kind, master: Some(master), ..link(index, name) };
        picture.links.extend([
            Link { kind: Kind::Above(3), ..link(10, "eth1.100") },
            port(11, "eth2", Kind::Hardware, 12),
            link(12, "bond0"),
            port(13, "eth3", Kind::Hardware, 14),
            Link { kind: Kind::Bridge, ..link(14, "br0") },
            port(15, "veth5678", Kind::Pair, 14),
            Link { kind: Kind::Pair, ..link(16, "cali9") },
            link(17, "antrea-gw0"),
        ]);
        picture.routes.push(Route { index: 16, leads_away: false });
        let guarded = choose(&picture, Wish { guard: true, ..Wish::default() });
        let expected = ["eth0", "eth1", "flannel.1", "wg0", "eth1.100", "eth2", "bond0", "eth3"];
        assert_eq!(names(&guarded, GUARD_ONLY), expected);
    }

    #[test]
    fn names_in_the_configuration_replace_the_choice() {
        let uplinks = ["eth*".to_owned(), "l*".to_owned()];
        let chosen = choose(&picture(), Wish { uplinks: &uplinks, outside: true, ..Wish::default() });
        assert_eq!(names(&chosen, UPLINK), ["eth0", "eth1"], "and the loopback device is none in any case");
    }

    #[test]
    fn the_address_to_leave_by_is_the_nodes_if_it_can_be() {
        let (node, guests) = ([ip("192.168.1.10"), ip("2001:db8::10")], ["tap0".to_owned()]);
        let wish = Wish { node: &node, guests: &guests, outside: true, ..Wish::default() };
        let chosen = choose(&picture(), wish);
        let v4 = |index: u32| IpAddr::from(chosen[&index].interface.v4);
        assert_eq!((v4(2), v4(4)), (node[0], node[0]), "of several on it, and of none on it");
        assert_eq!(v4(7), ip("10.244.1.1"), "a guest's neighbour is the bridge that it is on");
        assert_eq!(IpAddr::from(chosen[&2].interface.v6), node[1]);
        let chosen = choose(&picture(), Wish { outside: true, ..wish_without_node(&guests) });
        assert_eq!(chosen[&4].interface.v4, Addr::default());
    }

    fn wish_without_node(guests: &[String]) -> Wish<'_> {
        Wish { guests, ..Wish::default() }
    }
}
