//! Which interfaces get programs: decided from a picture of the node's links, addresses and routes.

use std::{collections::BTreeMap, net::IpAddr};

use edgemesh_common::{
    Addr,
    nat::{GUARD_ONLY, GUEST, Interface, NO_LINK_HEADER, UPLINK},
};

/// A network interface.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) header: Header,
    /// The bridge or bond that it is a port of.
    pub(super) master: Option<u32>,
}

/// What the packets of an interface begin with.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) enum Header {
    #[default]
    Ethernet,
    /// Their IP header.
    None,
    /// Something that the programs do not read; also the loopback device, where nothing comes from outside.
    Other,
}

/// A route to other hosts, of any table.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Route {
    /// The interface it leaves by.
    pub(super) index: u32,
    /// It has a gateway, or is a default route.
    pub(super) leads_away: bool,
}

/// The links, addresses and routes of the node at one moment.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Picture {
    pub(super) links: Vec<Link>,
    /// Those of global scope, with the index of their interface, in the kernel's order.
    pub(super) addresses: Vec<(u32, IpAddr)>,
    pub(super) routes: Vec<Route>,
}

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
    /// Whether there are aliases to keep the outside from.
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
    for link in &picture.links {
        let header = match link.header {
            Header::Ethernet => 0,
            Header::None => NO_LINK_HEADER,
            Header::Other => continue,
        };
        let role = if matches_any(wish.guests, &link.name) {
            GUEST
        } else if (wish.outside || wish.guard) && is_uplink(picture, wish, link) {
            if wish.outside { UPLINK } else { UPLINK | GUARD_ONLY }
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

fn matches_any(patterns: &[String], name: &str) -> bool {
    patterns.iter().any(|pattern| matches(pattern, name))
}

/// Whether a name fits a pattern in which `*` stands for any characters.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else { return pattern == name };
    let Some(rest) = name.strip_prefix(head) else { return false };
    (0..=rest.len()).any(|at| rest.get(at..).is_some_and(|rest| matches(tail, rest)))
}

#[cfg(test)]
mod tests {
    use super::*;

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
                Link { header: Header::Other, ..link(1, "lo") },
                link(2, "eth0"),
                link(3, "eth1"),
                link(4, "flannel.1"),
                link(5, "cni0"),
                Link { master: Some(5), ..link(6, "veth1234") },
                Link { master: Some(5), ..link(7, "tap0") },
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
    fn aliases_are_guarded_on_all_uplinks_whatever_else_is_served_there() {
        let node = [ip("192.168.1.10")];
        let wish = Wish { node: &node, guard: true, ..Wish::default() };
        let guarded = choose(&picture(), wish);
        assert_eq!(names(&guarded, GUARD_ONLY), ["eth0", "flannel.1", "wg0"]);
        let serving = choose(&picture(), Wish { outside: true, ..wish });
        assert_eq!((names(&serving, UPLINK), names(&serving, GUARD_ONLY)), (vec!["eth0", "flannel.1", "wg0"], vec![]));
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
