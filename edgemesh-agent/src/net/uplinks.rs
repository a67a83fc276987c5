//! The interfaces that other machines are behind, for sockets that are for this node and its pods alone.
//!
//! To miss one leaves the socket open to those behind it; to take one for it that pods are behind would have them
//! refused. So it takes more than for serving Services there: hardware, or a default route. The devices of the cluster's
//! network have neither, and some of them (antrea-gw0, ovn-k8s-mp0) lead to pods of this node and of others alike.

use std::time::Duration;

use futures::{FutureExt, StreamExt};
use rtnetlink::{Error, Handle, MulticastGroup, new_connection, new_multicast_connection};

use super::picture::{self, Kind, Link, Picture, matches_any};

/// Changes of the network come in groups; this is how long the rest of one is waited for.
const SETTLE: Duration = Duration::from_millis(200);
/// How often everything is looked at, should the kernel have lost news.
const PATROL: Duration = Duration::from_secs(30);
/// How long the kernel may take to list everything, with any number of routes.
const DEADLINE: Duration = Duration::from_secs(10);
/// How many interfaces may be stacked on each other.
const MAX_DEPTH: u32 = 8;

/// An interface that other machines are behind.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Uplink {
    pub index: u32,
    pub name: String,
}

/// Tells the uplinks at once and at each change, until netlink fails; returns why. `names` are patterns as for
/// [`choose`].
pub async fn follow(names: &[String], mut tell: impl FnMut(Vec<Uplink>)) -> Error {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];
    // Questions have a connection of their own: a socket that was flooded with news loses answers, too.
    let (news, questions) = match (new_multicast_connection(&groups), new_connection()) {
        (Ok(news), Ok(questions)) => (news, questions),
        (Err(error), _) | (_, Err(error)) => return Error::NamespaceError(error.to_string()),
    };
    let (listening, _keep, mut changes) = news;
    let (asking, netlink, _) = questions;
    tokio::pin!(listening, asking);
    let work = async {
        let mut patrol = tokio::time::interval(PATROL);
        loop {
            tokio::select! {
                _ = patrol.tick() => {}
                change = changes.next() => {
                    if change.is_none() {
                        return Error::RequestFailed;
                    }
                    tokio::time::sleep(SETTLE).await;
                    while changes.next().now_or_never().flatten().is_some() {}
                }
            }
            match look(&netlink, names).await {
                Ok(uplinks) => tell(uplinks),
                Err(error) => return error,
            }
        }
    };
    tokio::select! {
        error = work => error,
        () = &mut listening => Error::RequestFailed,
        () = &mut asking => Error::RequestFailed,
    }
}

async fn look(netlink: &Handle, names: &[String]) -> Result<Vec<Uplink>, Error> {
    let picture = tokio::time::timeout(DEADLINE, picture::take(netlink)).await;
    Ok(choose(&picture.map_err(|_elapsed| Error::RequestFailed)??, names))
}

/// Those that match one of `names`, or, without any: hardware, what is made of it, and what has a default route; but no
/// bridge that pods or guests are on, too, as one cannot tell who of them a packet is from.
pub fn choose(picture: &Picture, names: &[String]) -> Vec<Uplink> {
    let is_uplink = |link: &&Link| match link.kind {
        Kind::Loopback => false,
        _ if !names.is_empty() => matches_any(names, &link.name),
        Kind::Bridge if ports(picture, link).any(|port| port.kind == Kind::Pair) => false,
        Kind::Other | Kind::Hardware | Kind::Pair | Kind::Bridge | Kind::Above(_) => {
            picture.defaults.contains(&link.index) || is_hardware(picture, link, MAX_DEPTH)
        }
    };
    let uplinks = picture.links.iter().filter(is_uplink);
    uplinks.map(|link| Uplink { index: link.index, name: link.name.clone() }).collect()
}

fn is_hardware(picture: &Picture, link: &Link, depth: u32) -> bool {
    let Some(depth) = depth.checked_sub(1) else { return false };
    let below = |index: u32| picture.links.iter().find(|other| other.index == index);
    match link.kind {
        Kind::Hardware => true,
        Kind::Above(index) => below(index).is_some_and(|other| is_hardware(picture, other, depth)),
        Kind::Other | Kind::Bridge => ports(picture, link).any(|port| is_hardware(picture, port, depth)),
        Kind::Loopback | Kind::Pair => false,
    }
}

fn ports<'p>(picture: &'p Picture, link: &Link) -> impl Iterator<Item = &'p Link> {
    let index = link.index;
    picture.links.iter().filter(move |port| port.master == Some(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, kind: Kind) -> Link {
        Link { index, name: name.to_owned(), kind, ..Link::default() }
    }

    fn port(index: u32, name: &str, kind: Kind, master: u32) -> Link {
        Link { master: Some(master), ..link(index, name, kind) }
    }

    fn names(links: Vec<Link>, defaults: Vec<u32>, patterns: &[&str]) -> Vec<String> {
        let patterns: Vec<String> = patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        let picture = Picture { links, defaults, ..Picture::default() };
        choose(&picture, &patterns).into_iter().map(|uplink| uplink.name).collect()
    }

    /// A node with flannel, a second network and a link by radio.
    fn node() -> Vec<Link> {
        vec![
            link(1, "lo", Kind::Loopback),
            link(2, "eth0", Kind::Hardware),
            link(3, "wwan0", Kind::Other),
            link(4, "flannel.1", Kind::Other),
            link(5, "cni0", Kind::Bridge),
            port(6, "veth1", Kind::Pair, 5),
            link(7, "cali2", Kind::Pair),
            link(8, "edgemesh0", Kind::Other),
        ]
    }

    #[test]
    fn hardware_and_default_routes_lead_outside_and_what_pods_are_behind_does_not() {
        assert_eq!(names(node(), vec![3], &[]), ["eth0", "wwan0"]);
        let in_a_container =
            vec![link(1, "lo", Kind::Loopback), link(2, "eth0", Kind::Pair), link(3, "veth1", Kind::Pair)];
        assert_eq!(names(in_a_container, vec![2], &[]), ["eth0"], "which is a pair to where its default route leads");
    }

    #[test]
    fn what_is_made_of_hardware_is_no_other_thing() {
        let links = vec![
            port(2, "eth0", Kind::Hardware, 4),
            port(3, "eth1", Kind::Hardware, 4),
            link(4, "bond0", Kind::Other),
            link(5, "bond0.100", Kind::Above(4)),
            port(6, "bond0.200", Kind::Above(4), 7),
            link(7, "br200", Kind::Bridge),
            link(8, "itself", Kind::Above(8)),
        ];
        let expected = ["eth0", "eth1", "bond0", "bond0.100", "bond0.200", "br200"];
        assert_eq!(names(links, vec![], &[]), expected);
    }

    #[test]
    fn a_bridge_of_hardware_and_pods_stays_open_for_the_pods() {
        let links =
            vec![port(2, "eth0", Kind::Hardware, 3), link(3, "br0", Kind::Bridge), port(4, "veth1", Kind::Pair, 3)];
        assert_eq!(names(links.clone(), vec![3], &[]), ["eth0"], "where no packet of the stack ever comes in");
        assert_eq!(names(links, vec![3], &["br0"]), ["br0"], "unless it is named");
    }

    #[test]
    fn names_replace_the_choice() {
        assert_eq!(
            names(node(), vec![3], &["fl*", "l*"]),
            ["flannel.1"],
            "and the loopback device is none in any case"
        );
    }
}
