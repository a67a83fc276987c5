use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use crate::tunnel;

/// Small enough that copying a part costs microseconds, large enough that the list of parts is short.
const PARTS: usize = 256;

/// Whom an alias stands for.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Target {
    /// As Kubernetes names it.
    pub node: Arc<str>,
    /// The pod's address on that node, or the node's own for a pod on its host network; one of [`NODE_ITSELF`] for the
    /// node.
    pub addr: IpAddr,
}

/// In the place of a pod's address, the node itself: which of its addresses that is, it knows best. No pod has either.
pub const NODE_ITSELF: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];

impl Target {
    /// Whether it is the node, and no pod on it.
    pub fn is_node(&self) -> bool {
        self.addr.is_unspecified()
    }
}

/// What the tunnel is to be asked for where [`Target::addr`] with a port is meant.
pub fn stream_target(addr: SocketAddr) -> tunnel::Target {
    if addr.ip().is_unspecified() { tunnel::Target::Node { port: addr.port() } } else { tunnel::Target::Address(addr) }
}

/// The aliases of one moment, for those who have one and want to know whose it is. Immutable and cheap to clone: what
/// did not change is shared with the moment before.
#[derive(Clone, Debug, Default)]
pub struct Aliases {
    /// By the last byte of the alias; empty before the first one.
    parts: Arc<Vec<Arc<HashMap<IpAddr, Target>>>>,
    count: usize,
}

impl Aliases {
    /// Whom the alias stands for; None for one that stands for nobody, or not any more.
    pub fn target(&self, alias: IpAddr) -> Option<&Target> {
        self.parts.get(part_of(alias))?.get(&alias)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(super) fn insert(&mut self, alias: IpAddr, target: Target) {
        let parts = Arc::make_mut(&mut self.parts);
        parts.resize_with(PARTS, Arc::default);
        if let Some(part) = parts.get_mut(part_of(alias)) {
            self.count += usize::from(Arc::make_mut(part).insert(alias, target).is_none());
        }
    }

    pub(super) fn remove(&mut self, alias: IpAddr) {
        if self.target(alias).is_some()
            && let Some(part) = Arc::make_mut(&mut self.parts).get_mut(part_of(alias))
        {
            self.count -= usize::from(Arc::make_mut(part).remove(&alias).is_some());
        }
    }
}

fn part_of(alias: IpAddr) -> usize {
    match alias {
        IpAddr::V4(alias) => usize::from(alias.octets()[3]),
        IpAddr::V6(alias) => usize::from(alias.octets()[15]),
    }
}
