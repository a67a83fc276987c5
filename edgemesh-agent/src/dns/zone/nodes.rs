//! The names of nodes, which lead to their aliases.

use std::{collections::HashSet, net::IpAddr, sync::Arc};

use smallvec::SmallVec;

use super::name::{MAX_NAME, wire};
use crate::model::KnownNode;

/// The nodes that have a name in the zone.
#[derive(Clone, Debug, Default)]
pub(super) struct Nodes {
    /// Ordered by name.
    nodes: Arc<[Node]>,
    /// What stands behind a dot in the name of a node: names that others are below.
    parents: Arc<HashSet<Box<[u8]>>>,
}

/// A node as DNS has it.
#[derive(Debug)]
pub(super) struct Node {
    name: Arc<str>,
    /// `<node>.node.<domain>`.
    pub(super) wire: Box<[u8]>,
    pub(super) aliases: SmallVec<[IpAddr; 2]>,
}

/// What a name in the place of a node's stands for.
pub(super) enum Named<'z> {
    Node(&'z Node),
    Parent,
    Nothing,
}

impl Nodes {
    /// Those of a table that have an alias; `domain` is the cluster's, in wire form. A name that is none in DNS, or too long
    /// for one below the domain, is left out.
    pub(super) fn of(nodes: &[KnownNode], domain: &[u8]) -> Self {
        let publish = |node: &KnownNode| {
            let own = wire(&node.name)?;
            let name = [own.strip_suffix(b"\0")?, b"\x04node", domain].concat();
            let fits = name.len() <= MAX_NAME;
            fits.then(|| Node { name: Arc::clone(&node.name), wire: name.into(), aliases: node.aliases.clone() })
        };
        let nodes: Arc<[Node]> = nodes.iter().filter(|node| !node.aliases.is_empty()).filter_map(publish).collect();
        let behind = |node: &Node| {
            let dots = node.name.match_indices('.').map(|(at, _)| at + 1).collect::<Vec<_>>();
            let name = Arc::clone(&node.name);
            dots.into_iter().filter_map(move |at| Some(name.as_bytes().get(at..)?.into()))
        };
        let parents = nodes.iter().flat_map(behind).collect();
        Self { nodes, parents: Arc::new(parents) }
    }

    /// What labels, given in wire form without a terminal zero, stand for.
    pub(super) fn named(&self, labels: &[u8]) -> Named<'_> {
        let mut name = SmallVec::<[u8; 64]>::new();
        let mut rest = labels;
        while let [length, tail @ ..] = rest
            && let Some((label, tail)) = tail.split_at_checked(usize::from(*length))
        {
            if !name.is_empty() {
                name.push(b'.');
            }
            name.extend_from_slice(label);
            rest = tail;
        }
        match self.find(&name) {
            Some(node) => Named::Node(node),
            None if self.parents.contains(&name[..]) => Named::Parent,
            None => Named::Nothing,
        }
    }

    /// The node of that name.
    pub(super) fn find(&self, name: &[u8]) -> Option<&Node> {
        let place = self.nodes.binary_search_by(|node| node.name.as_bytes().cmp(name)).ok()?;
        self.nodes.get(place)
    }
}
