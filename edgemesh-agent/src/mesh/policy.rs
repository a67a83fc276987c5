//! What this node dials for others: its own endpoints, as its model knows them, and what the configuration adds.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, OnceLock, PoisonError, RwLock},
};

use tokio::sync::watch;

use crate::{
    alias::AliasRanges,
    config::AllowedTarget,
    model::{self, Change, Place, ServiceEntry, ServiceTable, changes},
    tunnel::{Decision, DialPolicy, NodeName, Protocol, Target},
};

/// The rules. What leads to the inside of a node is refused by the tunnel itself, whatever they say.
#[derive(Debug)]
pub(super) struct Policy {
    node: Box<str>,
    ranges: AliasRanges,
    targets: Vec<AllowedTarget>,
    /// Where this node listens for others, which is where it is.
    own: OnceLock<watch::Receiver<Vec<SocketAddr>>>,
    /// Written for each table, for as long as its changes take.
    endpoints: RwLock<Endpoints>,
}

/// The endpoints on this node, each with how many Services have it.
#[derive(Debug, Default)]
struct Endpoints {
    /// The table they are from.
    table: Arc<ServiceTable>,
    ports: HashMap<(Protocol, SocketAddr), u32>,
    /// Those of headless Services without ports, which any port of leads to.
    hosts: HashMap<IpAddr, u32>,
}

impl Policy {
    pub(super) fn new(node: &str, ranges: AliasRanges, targets: Vec<AllowedTarget>) -> Self {
        Self { node: node.into(), ranges, targets, own: OnceLock::new(), endpoints: RwLock::default() }
    }

    /// Where to learn the addresses of this node.
    pub(super) fn set_own(&self, addresses: watch::Receiver<Vec<SocketAddr>>) {
        let _already = self.own.set(addresses);
    }

    /// Takes the endpoints of a newer table.
    pub(super) fn follow(&self, table: Arc<ServiceTable>) {
        let mut endpoints = self.endpoints.write().unwrap_or_else(PoisonError::into_inner);
        let old = Arc::clone(&endpoints.table);
        for change in changes(&old, &table) {
            match change {
                Change::Added(new) => endpoints.add(new, &self.node),
                Change::Removed(old) => endpoints.remove(old, &self.node),
                Change::Changed { old, new } => {
                    endpoints.add(new, &self.node);
                    endpoints.remove(old, &self.node);
                }
            }
        }
        endpoints.table = table;
    }

    fn own_address(&self) -> Option<IpAddr> {
        let addresses = self.own.get()?.borrow();
        let usable = |ip: &IpAddr| crate::tunnel::always_refused(*ip).is_none();
        let usable = || addresses.iter().map(SocketAddr::ip).filter(usable);
        usable().find(IpAddr::is_ipv4).or_else(|| usable().next())
    }

    fn decide_address(&self, protocol: Protocol, address: SocketAddr) -> Decision {
        let ip = address.ip().to_canonical();
        let address = SocketAddr::new(ip, address.port());
        if self.ranges.contains(ip) {
            return refuse("addresses that stand for pods of other nodes are never dialled for others");
        }
        let endpoints = self.endpoints.read().unwrap_or_else(PoisonError::into_inner);
        let known = endpoints.ports.contains_key(&(protocol, address)) || endpoints.hosts.contains_key(&ip);
        if known || self.targets.iter().any(|target| target.covers(ip, address.port())) {
            Decision::Allowed(address)
        } else if endpoints.table.complete {
            refuse("neither an endpoint of a Service on this node nor in its edgeTunnel.allowedTargets")
        } else {
            refuse("not an endpoint that this node knows of, and its metadata source has not told all yet")
        }
    }
}

fn refuse(rule: &str) -> Decision {
    Decision::NotAllowed { rule: rule.to_owned() }
}

impl DialPolicy for Policy {
    fn decide(&self, _: &NodeName, protocol: Protocol, target: Target) -> Decision {
        match target {
            Target::Address(address) => self.decide_address(protocol, address),
            Target::Node { port } if self.targets.iter().any(|target| target.covers_node(port)) => {
                match self.own_address() {
                    Some(ip) => Decision::Allowed(SocketAddr::new(ip, port)),
                    None => refuse("this node has no address but loopback and link-local ones"),
                }
            }
            Target::Node { .. } => refuse("the node's port is not in its edgeTunnel.allowedTargets"),
        }
    }
}

impl Endpoints {
    fn add(&mut self, entry: &ServiceEntry, node: &str) {
        for key in ports_of(entry, node) {
            *self.ports.entry(key).or_insert(0) += 1;
        }
        for ip in hosts_of(entry, node) {
            *self.hosts.entry(ip).or_insert(0) += 1;
        }
    }

    fn remove(&mut self, entry: &ServiceEntry, node: &str) {
        for key in ports_of(entry, node) {
            one_less(&mut self.ports, &key);
        }
        for ip in hosts_of(entry, node) {
            one_less(&mut self.hosts, &ip);
        }
    }
}

fn one_less<K: Eq + std::hash::Hash>(counts: &mut HashMap<K, u32>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

fn is_on(place: &Place, node: &str) -> bool {
    place.node.as_deref() == Some(node)
}

fn ports_of(entry: &ServiceEntry, node: &str) -> impl Iterator<Item = (Protocol, SocketAddr)> {
    entry.ports.iter().flat_map(move |served| {
        let protocol = match served.port.protocol {
            model::Protocol::Tcp => Some(Protocol::Tcp),
            model::Protocol::Udp => Some(Protocol::Udp),
            model::Protocol::Sctp => None,
        };
        let here = served.endpoints.iter().filter(move |endpoint| is_on(&endpoint.place, node));
        here.filter_map(move |endpoint| Some((protocol?, endpoint.addr)))
    })
}

fn hosts_of(entry: &ServiceEntry, node: &str) -> impl Iterator<Item = IpAddr> {
    entry.portless.iter().filter(move |endpoint| is_on(&endpoint.place, node)).map(|endpoint| endpoint.ip)
}
