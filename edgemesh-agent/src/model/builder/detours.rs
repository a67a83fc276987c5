//! The ways to endpoints, and the aliases of those that only the tunnel reaches, as Services come and go.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use super::super::{NamespacedName, Nodes, Path, Place, Reason, ServiceEntry, Way, shared::Shared};
use crate::alias::{Book, Reach};

/// Decides ways, and counts who uses an alias: each endpoint of each port of each entry of the table once.
#[derive(Debug)]
pub(super) struct Detours {
    reach: Reach,
    pub(super) book: Book,
    paths: Shared<Path>,
    /// How many endpoints of a Service have found no alias left; Services without such are not in it.
    wanting: BTreeMap<NamespacedName, usize>,
    settled: bool,
}

impl Detours {
    pub(super) fn new(reach: Reach, book: Book) -> Self {
        Self { reach, book, paths: Shared::default(), wanting: BTreeMap::new(), settled: false }
    }

    pub(super) fn change(&mut self, change: impl FnOnce(Reach) -> Reach) {
        self.reach = change(self.reach.clone());
    }

    /// The way to an endpoint of an entry that is being made; the entry's use of the alias lasts until
    /// [`Detours::release`].
    pub(super) fn path_of(&mut self, place: &Place, addr: IpAddr, nodes: &Nodes) -> Arc<Path> {
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
            if let Some(node) = place.node.as_deref().filter(|_| used) {
                self.book.release(node, addr);
            }
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

    /// How many endpoints lack one.
    pub(super) fn without_alias(&self) -> usize {
        self.wanting.values().sum()
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
