//! The ways to endpoints, and the aliases of those that only the tunnel reaches, as Services come and go; and the aliases of
//! nodes.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use smallvec::SmallVec;

use super::super::{NamespacedName, Nodes, Path, Place, Reason, ServiceEntry, Way, shared::Shared};
use crate::alias::{Book, NODE_ITSELF, Reach};

/// Decides ways, and counts who uses an alias: each endpoint of each port of each entry of the table once.
#[derive(Debug)]
pub(super) struct Detours {
    reach: Reach,
    pub(super) book: Book,
    paths: Shared<Path>,
    /// How many endpoints of a Service have found no alias left; Services without such are not in it.
    wanting: BTreeMap<NamespacedName, usize>,
    /// By name.
    nodes: BTreeMap<Arc<str>, Mentioned>,
    /// Whether `nodes` differ from when that was last asked.
    nodes_differ: bool,
    settled: bool,
}

/// A node that somebody speaks of.
#[derive(Debug, Default)]
struct Mentioned {
    /// How many do: this node of itself, Node objects, the tunnel's meetings, and endpoints by where they are.
    times: usize,
    aliases: SmallVec<[IpAddr; 2]>,
}

impl Mentioned {
    fn acquire(&mut self, name: &str, book: &mut Book) {
        self.aliases = NODE_ITSELF.iter().filter_map(|itself| book.acquire(name, *itself)).collect();
    }

    fn release(&mut self, name: &str, book: &mut Book) {
        for alias in self.aliases.drain(..) {
            let itself = NODE_ITSELF.iter().find(|itself| itself.is_ipv4() == alias.is_ipv4());
            itself.iter().for_each(|itself| book.release(name, **itself));
        }
    }
}

impl Detours {
    pub(super) fn new(reach: Reach, book: Book) -> Self {
        let node = reach.node().to_owned();
        let mut detours = Self {
            reach,
            book,
            paths: Shared::default(),
            wanting: BTreeMap::new(),
            nodes: BTreeMap::new(),
            nodes_differ: false,
            settled: false,
        };
        detours.mention(&node);
        detours
    }

    pub(super) fn change(&mut self, change: impl FnOnce(Reach) -> Reach) {
        let before = Arc::clone(self.reach.meetings());
        self.reach = change(self.reach.clone());
        let after = Arc::clone(self.reach.meetings());
        if !Arc::ptr_eq(&before, &after) {
            after.iter().for_each(|(node, _)| self.mention(node));
            before.iter().for_each(|(node, _)| self.forget(node));
        }
    }

    /// Somebody speaks of a node, until [`Detours::forget`].
    pub(super) fn mention(&mut self, node: &str) {
        if let Some(known) = self.nodes.get_mut(node) {
            known.times += 1;
            return;
        }
        let mut known = Mentioned { times: 1, ..Mentioned::default() };
        known.acquire(node, &mut self.book);
        self.nodes.insert(node.into(), known);
        self.nodes_differ = true;
    }

    /// One less does.
    pub(super) fn forget(&mut self, node: &str) {
        let Some(known) = self.nodes.get_mut(node) else { return };
        known.times = known.times.saturating_sub(1);
        if known.times == 0 {
            known.release(node, &mut self.book);
            self.nodes.remove(node);
            self.nodes_differ = true;
        }
    }

    /// The nodes that somebody speaks of, in order of their names, with their aliases; IPv4 comes first.
    pub(super) fn nodes(&self) -> impl Iterator<Item = (&Arc<str>, &SmallVec<[IpAddr; 2]>)> {
        self.nodes.iter().map(|(name, known)| (name, &known.aliases))
    }

    /// Whether they are others than when this was last asked.
    pub(super) fn nodes_differ(&mut self) -> bool {
        std::mem::take(&mut self.nodes_differ)
    }

    /// Tries again for the nodes that lack aliases, as some are free again.
    pub(super) fn supply_nodes(&mut self) {
        for (name, known) in self.nodes.iter_mut().filter(|(_, known)| known.aliases.len() < NODE_ITSELF.len()) {
            let before = known.aliases.len();
            known.release(name, &mut self.book);
            known.acquire(name, &mut self.book);
            self.nodes_differ |= known.aliases.len() != before;
        }
    }

    /// The way to an endpoint of an entry that is being made; the entry's use of the alias lasts until
    /// [`Detours::release`].
    pub(super) fn path_of(&mut self, place: &Place, addr: IpAddr, nodes: &Nodes) -> Arc<Path> {
        place.node.iter().for_each(|node| self.mention(node));
        let reason = self.reason(place, addr, nodes);
        let alias = place.node.as_deref().and_then(|node| match reason.way() {
            Way::Remote => self.book.acquire(node, addr),
            // Clients may have it from when there was no direct way.
            Way::Direct if self.book.alias_of(node, addr).is_some() => self.book.acquire(node, addr),
            Way::Local | Way::Direct | Way::None => None,
        });
        let mut path = Arc::new(Path { reason, alias });
        self.paths.one(&mut path);
        path
    }

    /// Ends what an entry that is no longer in the table has used.
    pub(super) fn release(&mut self, entry: &ServiceEntry) {
        for (place, addr, path) in endpoints(entry) {
            let used = path.is_some_and(|path| path.alias.is_some());
            let Some(node) = place.node.as_deref() else { continue };
            if used {
                self.book.release(node, addr);
            }
            self.forget(node);
        }
    }

    /// Takes down whether a Service lacks aliases; None for one that is gone.
    pub(super) fn note_lack(&mut self, name: &NamespacedName, entry: Option<&ServiceEntry>) {
        let lacks = |(_, _, path): &(&Place, IpAddr, Option<&Path>)| {
            path.is_some_and(|path| path.reason.way() == Way::Remote && path.alias.is_none())
        };
        match entry.map_or(0, |entry| endpoints(entry).filter(lacks).count()) {
            0 => self.wanting.remove(name),
            lacking => self.wanting.insert(name.clone(), lacking),
        };
    }

    /// The Services that lack aliases.
    pub(super) fn wanting(&self) -> impl Iterator<Item = NamespacedName> {
        self.wanting.keys().cloned()
    }

    /// How many endpoints, and addresses of nodes, lack one.
    pub(super) fn without_alias(&self) -> usize {
        let nodes = self.nodes.values().map(|known| NODE_ITSELF.len() - known.aliases.len());
        self.wanting.values().sum::<usize>() + nodes.sum::<usize>()
    }

    /// Whether an endpoint of an entry is reached otherwise now.
    pub(super) fn differs(&self, entry: &ServiceEntry, nodes: &Nodes) -> bool {
        endpoints(entry)
            .any(|(place, addr, path)| path.is_none_or(|path| path.reason != self.reason(place, addr, nodes)))
    }

    /// Everything that exists is in the table: what an earlier agent's aliases stood for beside that is gone.
    pub(super) fn settle(&mut self) {
        if !self.settled {
            self.settled = true;
            self.book.settle();
        }
    }

    fn reason(&self, place: &Place, addr: IpAddr, nodes: &Nodes) -> Reason {
        let node = place.node.as_deref();
        let host_network = node.and_then(|node| nodes.get(node)).is_some_and(|node| node.addresses.contains(&addr));
        self.reach.reason(node, addr, host_network)
    }
}

fn endpoints(entry: &ServiceEntry) -> impl Iterator<Item = (&Place, IpAddr, Option<&Path>)> {
    let with_ports = entry.ports.iter().flat_map(|served| &served.endpoints);
    let with_ports = with_ports.map(|endpoint| (&*endpoint.place, endpoint.addr.ip(), endpoint.path.as_deref()));
    let portless = entry.portless.iter();
    with_ports.chain(portless.map(|endpoint| (&*endpoint.place, endpoint.ip, endpoint.path.as_deref())))
}
