//! What the Kubernetes DNS specification says about a [`ServiceTable`]: pure, no IO and no clock.
//!
//! Version 1.1.0 of the specification (docs/specification.md in kubernetes/dns). Where it is silent, CoreDNS's
//! plugin/kubernetes is the measure, as that is what clusters are used to: names of endpoints below Services with a
//! ClusterIP, pod records (`pods insecure`) and SRV records of a Service's own name are from there. Unlike CoreDNS's, a name
//! above one that exists is never NXDOMAIN (RFC 8020), `_port._protocol` has SRV records alone, and only endpoints of
//! headless Services have reverse names.
//!
//! ```text
//! <domain>                                            SOA, NS
//! dns-version.<domain>                                TXT
//! ns.dns.<domain>                                     A, AAAA of this server
//! <service>.<namespace>.svc.<domain>                  A, AAAA, SRV; CNAME of type ExternalName
//! _<port>._<protocol>.<service>.<namespace>.svc.<domain>  SRV
//! <hostname>.<service>.<namespace>.svc.<domain>       A, AAAA
//! <a>-<b>-<c>-<d>.<namespace>.pod.<domain>            A, AAAA
//! <node>.node.<domain>                                A, AAAA of the node's aliases
//! <d>.<c>.<b>.<a>.in-addr.arpa, ….ip6.arpa            PTR of ClusterIPs, of endpoints of headless Services, of nodes' aliases
//! ```
//!
//! Names of nodes are in no specification and in no other DNS server; `node` is no word that the specification has a use
//! for. What they lead to is an alias ([`crate::alias`]), so that a connection goes to the node wherever it is.

mod answers;
mod explain;
mod index;
mod name;
mod nodes;
mod published;
mod reverse;

use std::{net::IpAddr, sync::Arc};

use self::{
    answers::Set,
    index::{Index, Reverse},
    name::{Label, Labels, dashed_ip},
    nodes::Nodes,
    published::{Named, Published, Records},
};
pub use self::{
    answers::{Answers, Data, Owner, Record, Soa},
    explain::{EndpointReason, ExplainedEndpoint, Explanation, Outcome, Subject},
    name::{ClusterDomain, Name, ParseDomainError, wire as wire_name},
};
use crate::model::{Change, ServiceTable, changes};

/// The version of the specification.
const SCHEMA_VERSION: &[u8] = b"1.1.0";

/// What a zone is made from besides the table.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ZoneSettings {
    pub domain: ClusterDomain,
    /// The server's own addresses, which its name server's name (`ns.dns.<domain>`) leads to.
    pub addresses: Vec<IpAddr>,
}

/// All that can be answered about the cluster's names at one moment.
///
/// Immutable; a change of a Service makes a new one that shares what did not change.
#[derive(Clone, Debug)]
pub struct Zone {
    settings: Arc<ZoneSettings>,
    /// `dns.<domain>` in wire form.
    dns: Arc<[u8]>,
    table: Arc<ServiceTable>,
    index: Index,
    nodes: Nodes,
}

/// What a zone says to a question.
#[derive(Clone, Debug)]
pub enum Found<'z> {
    /// Not of this zone (another domain, or the reverse name of an address that no Service has): to be forwarded.
    Foreign,
    /// Nothing has this name: NXDOMAIN with [`Zone::soa`].
    NoSuchName,
    /// The name exists and has no record of the type: NOERROR with [`Zone::soa`].
    NoData,
    /// Nothing has this name so far, but the source has not delivered everything: SERVFAIL.
    NotYet,
    /// A CNAME is an answer to any type, and [`Zone::find`] does not follow it.
    Answers(Answers<'z>),
}

/// Query types, as far as the zone tells them apart.
mod qtype {
    pub(super) const A: u16 = 1;
    pub(super) const NS: u16 = 2;
    pub(super) const SOA: u16 = 6;
    pub(super) const PTR: u16 = 12;
    pub(super) const TXT: u16 = 16;
    pub(super) const AAAA: u16 = 28;
    pub(super) const SRV: u16 = 33;
    pub(super) const ANY: u16 = 255;
}

impl Zone {
    /// Makes the zone of a table. Services that `previous` was made from, too, are shared with it.
    pub fn build(table: &Arc<ServiceTable>, settings: &ZoneSettings, previous: Option<&Self>) -> Self {
        let mut zone = match previous.filter(|previous| *previous.settings == *settings) {
            Some(previous) => previous.clone(),
            None => Self {
                settings: Arc::new(settings.clone()),
                dns: [b"\x03dns", settings.domain.as_wire()].concat().into(),
                table: Arc::default(),
                index: Index::default(),
                nodes: Nodes::default(),
            },
        };
        let svc = [b"\x03svc", settings.domain.as_wire()].concat();
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        for change in changes(&zone.table, table) {
            let (old, name) = match change {
                Change::Added(new) => (false, &new.service.name),
                Change::Removed(old) => (true, &old.service.name),
                Change::Changed { new, .. } => (true, &new.service.name),
            };
            if old {
                let known = zone.table.get(name).and_then(|entry| Published::key_of(entry));
                gone.extend(known.and_then(|key| zone.index.service(&key).cloned()));
            }
            new.extend(table.get(name).and_then(|entry| Published::new(entry, &svc)).map(Arc::new));
        }
        zone.index.change(&gone, &new);
        if !Arc::ptr_eq(&zone.table.nodes, &table.nodes) {
            zone.nodes = Nodes::of(&table.nodes, settings.domain.as_wire());
        }
        zone.table = Arc::clone(table);
        zone
    }

    /// Looks a name up: uncompressed wire form, ASCII letters lowered, with the terminal zero. Any bytes are allowed;
    /// what is no name is [`Found::Foreign`]. Nothing is allocated, and one or two tables are looked into.
    pub fn find(&self, name: &[u8], qtype: u16) -> Found<'_> {
        let set = match self.locate(name) {
            Located::Foreign => return Found::Foreign,
            Located::Nothing => return Found::NoSuchName,
            Located::Unknown => return self.unknown(),
            Located::Empty => return Found::NoData,
            Located::Apex => match qtype {
                qtype::SOA | qtype::ANY => Some(Set::One(Data::Soa(self.soa()))),
                qtype::NS => Some(Set::NameServer(self.soa().name_server, &self.settings.addresses)),
                _ => None,
            },
            Located::Version => matches!(qtype, qtype::TXT | qtype::ANY).then_some(Set::One(Data::Txt(SCHEMA_VERSION))),
            Located::NameServer => Some(Set::Addresses(&self.settings.addresses, qtype)),
            Located::Address(ip) => Data::of_type(ip, qtype).map(Set::One),
            Located::Node(node) => Some(Set::Addresses(&node.aliases, qtype)),
            Located::OfNode(node) => {
                matches!(qtype, qtype::PTR | qtype::ANY).then_some(Set::One(Data::Ptr(Name::whole(&node.wire))))
            }
            Located::Service(service) => match &service.records {
                Records::Alias(target) => Some(Set::One(Data::Cname(Name::whole(target)))),
                _ if qtype == qtype::SRV => Some(Set::Ports(service, None)),
                Records::ClusterIps { ips, .. } => Some(Set::Addresses(ips, qtype)),
                Records::Headless(headless) => Some(Set::Endpoints(headless, qtype)),
                Records::Nothing => None,
            },
            Located::Endpoints(list) => Some(Set::SameName(published::of_type(list, qtype))),
            Located::Port(service, port) => {
                matches!(qtype, qtype::SRV | qtype::ANY).then_some(Set::Ports(service, Some(port)))
            }
            Located::Reverse(list) => matches!(qtype, qtype::PTR | qtype::ANY).then_some(Set::Reverse(list)),
        };
        set.and_then(Answers::of).map_or(Found::NoData, Found::Answers)
    }

    /// The domain that the zone is for.
    pub fn domain(&self) -> &ClusterDomain {
        &self.settings.domain
    }

    /// The SOA record; its owner is [`Zone::authority`].
    pub fn soa(&self) -> Soa<'_> {
        // The names are CoreDNS's.
        Soa {
            name_server: Name::below(Label::of("ns"), &self.dns),
            mailbox: Name::below(Label::of("hostmaster"), self.domain().as_wire()),
            serial: self.serial(),
        }
    }

    /// Counts up with each table, and wraps (RFC 1982).
    pub fn serial(&self) -> u32 {
        u32::try_from(self.table.generation & u64::from(u32::MAX)).unwrap_or_default()
    }

    /// In wire form, the zone that a name found here belongs to: the cluster domain, or the one of reverse names.
    pub fn authority(&self, name: &[u8]) -> &[u8] {
        match name {
            _ if name.ends_with(reverse::V4) => reverse::V4,
            _ if name.ends_with(reverse::V6) => reverse::V6,
            _ => self.domain().as_wire(),
        }
    }

    /// What a name stands for.
    fn locate(&self, name: &[u8]) -> Located<'_> {
        let Some(labels) = Labels::of(name) else { return Located::Foreign };
        let Some(count) = labels.before(self.domain().as_wire()) else {
            return reverse::address(&labels).map_or(Located::Foreign, |ip| self.locate_address(ip));
        };
        let Some(last) = count.checked_sub(1) else { return Located::Apex };
        match (count, labels.get(last)) {
            (1, b"dns-version") => Located::Version,
            (1, b"dns" | b"node" | b"pod" | b"svc") => Located::Empty,
            (2, b"dns") if labels.get(0) == b"ns" => Located::NameServer,
            (_, b"node") => match self.nodes.named(labels.wire(0, last)) {
                nodes::Named::Node(node) => Located::Node(node),
                nodes::Named::Parent => Located::Empty,
                nodes::Named::Nothing => Located::Unknown,
            },
            (_, b"pod") => locate_pod(&labels, count),
            (_, b"svc") => self.locate_service(&labels, count),
            _ => Located::Nothing,
        }
    }

    /// What a reverse name stands for.
    fn locate_address(&self, ip: IpAddr) -> Located<'_> {
        match self.index.reverse(ip) {
            [] => {
                let target = self.table.aliases.target(ip).filter(|target| target.is_node());
                let node = target.and_then(|target| self.nodes.find(target.node.as_bytes()));
                node.map_or(Located::Foreign, Located::OfNode)
            }
            owners => Located::Reverse(owners),
        }
    }

    /// The parts of a name with `count` labels before the domain, the last of which is `svc`.
    fn locate_service(&self, labels: &Labels<'_>, count: usize) -> Located<'_> {
        match count {
            2 if self.index.has_namespace(labels.wire(0, 1)) => return Located::Empty,
            2 => return Located::Unknown,
            3..=5 => {}
            _ => return Located::Nothing,
        }
        let Some(service) = self.index.service(labels.wire(count - 3, count - 1)) else { return Located::Unknown };
        if !service.exists() {
            return Located::Unknown;
        }
        match count {
            3 => Located::Service(service),
            4 if service.has_protocol(labels.get(0)) => Located::Empty,
            4 => match service.endpoints(labels.get(0)) {
                Named::List([]) => Located::Unknown,
                Named::List(list) => Located::Endpoints(list),
                Named::Address(ip) => Located::Address(ip),
            },
            _ => {
                service.port(labels.get(0), labels.get(1)).map_or(Located::Unknown, |port| Located::Port(service, port))
            }
        }
    }

    fn unknown(&self) -> Found<'_> {
        if self.table.complete { Found::NoSuchName } else { Found::NotYet }
    }
}

/// What a name stands for.
enum Located<'z> {
    Foreign,
    /// Nothing ever has such a name.
    Nothing,
    /// Nothing has the name at the moment.
    Unknown,
    /// There are names below it.
    Empty,
    Apex,
    Version,
    NameServer,
    /// A pod, or an endpoint of a Service with a ClusterIP.
    Address(IpAddr),
    Service(&'z Published),
    Endpoints(&'z [published::Endpoint]),
    Port(&'z Published, usize),
    Reverse(&'z [Reverse]),
    Node(&'z nodes::Node),
    /// The reverse name of an alias of a node.
    OfNode(&'z nodes::Node),
}

/// Pods are not known: any address has a name in any namespace, as with CoreDNS's `pods insecure`. CoreDNS at least knows
/// the namespaces; here those without Services would be missing.
fn locate_pod<'z>(labels: &Labels<'_>, count: usize) -> Located<'z> {
    let legal = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
    if !labels.get(count - 2).iter().all(legal) {
        return Located::Nothing;
    }
    match count {
        2 => Located::Empty,
        3 => dashed_ip(labels.get(0)).map_or(Located::Nothing, Located::Address),
        _ => Located::Nothing,
    }
}

#[cfg(test)]
mod tests;
