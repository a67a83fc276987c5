//! What one Service publishes.

use std::{
    cmp::Ordering,
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use smallvec::SmallVec;

use super::{
    name::{Label, MAX_LABEL, MAX_NAME, Name, dashed_ip, wire},
    qtype,
};
use crate::model::{Place, PortEndpoint, Protocol, ServedPort, ServiceEntry, ServiceKind};

/// A Service as DNS has it.
#[derive(Debug)]
pub(super) struct Published {
    pub(super) entry: Arc<ServiceEntry>,
    /// `<service>.<namespace>.svc.<domain>`, inline for most names: memory that is far away is most of what an answer takes.
    name: SmallVec<[u8; 64]>,
    pub(super) records: Records,
}

/// What there is besides what the entry says itself.
#[derive(Debug)]
pub(super) enum Records {
    /// The entry's ClusterIPs, inline as the name is. Endpoints have names, too, and none of them an own hostname, as a rule: then
    /// they are found in the entry by their address.
    ClusterIps {
        ips: SmallVec<[IpAddr; 2]>,
        hostnames: Box<[Endpoint]>,
    },
    Headless(Box<Headless>),
    /// The target of an ExternalName Service.
    Alias(Box<[u8]>),
    /// An ExternalName Service without a target.
    Nothing,
}

/// The endpoints of a headless Service, and what is in its answers in lists, so that a question costs what is put into
/// the answer, and not a walk over thousands of endpoints.
#[derive(Debug, Default)]
pub(super) struct Headless {
    /// Ordered by label: those with a hostname, then the others by address.
    pub(super) endpoints: Box<[Endpoint]>,
    /// The endpoints of each family, IPv4 and IPv6, of which no earlier one has the same address under another hostname.
    addresses: [Box<[u32]>; 2],
    /// For each of the Service's ports where its SRV records lead to, ordered.
    targets: Box<[Box<[Target]>]>,
    /// The same for all ports together; empty where that is one port's.
    all_targets: Box<[Target]>,
}

/// A published endpoint.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    pub(super) ip: IpAddr,
    place: Arc<Place>,
}

/// What an SRV record of a headless Service leads to.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Target {
    /// Index of the first endpoint with the name.
    pub(super) endpoint: u32,
    pub(super) number: u16,
    /// Index of the Service's port.
    port: u16,
}

impl Published {
    /// None for a Service whose name or namespace is no label, which the API server allows for neither, and for one
    /// whose name leaves no room for names of endpoints below it: only under a domain of more than 57 characters.
    pub(super) fn new(entry: &Arc<ServiceEntry>, svc: &[u8]) -> Option<Self> {
        let mut name = SmallVec::from_slice(&Self::key_of(entry)?);
        name.extend_from_slice(svc);
        if name.len() + 1 + MAX_LABEL > MAX_NAME {
            return None;
        }
        let records = match entry.service.kind {
            ServiceKind::ClusterIp | ServiceKind::NodePort | ServiceKind::LoadBalancer => {
                let named = published(entry).filter(|(_, place)| hostname(place).is_some());
                Records::ClusterIps { ips: SmallVec::from_slice(&entry.service.cluster_ips), hostnames: ordered(named) }
            }
            ServiceKind::Headless => Records::Headless(Headless::new(entry).into()),
            ServiceKind::ExternalName => {
                let target = entry.service.external_name.as_deref().and_then(wire);
                target.map_or(Records::Nothing, Records::Alias)
            }
        };
        Some(Self { entry: Arc::clone(entry), name, records })
    }

    /// What [`Published::key`] is of an entry, if it can be published.
    pub(super) fn key_of(entry: &ServiceEntry) -> Option<Vec<u8>> {
        key(&entry.service.name.name, &entry.service.name.namespace)
    }

    /// Service and namespace in wire form, without a terminal zero.
    pub(super) fn key(&self) -> &[u8] {
        let label_at = |at: usize| self.name.get(at).map_or(0, |&length| 1 + usize::from(length));
        let service = label_at(0);
        self.name.get(..service + label_at(service)).unwrap_or_default()
    }

    /// The namespace in wire form, without a terminal zero.
    pub(super) fn namespace(&self) -> &[u8] {
        let key = self.key();
        key.first().and_then(|&length| key.get(1 + usize::from(length)..)).unwrap_or_default()
    }

    /// The Service's name.
    pub(super) fn name(&self) -> Name<'_> {
        Name::whole(&self.name)
    }

    /// The name of one of its endpoints.
    pub(super) fn name_of(&self, endpoint: &Endpoint) -> Name<'_> {
        Name::below(endpoint.label(), &self.name)
    }

    /// Whether the Service's own name exists.
    ///
    /// A headless Service without a published endpoint does not: the specification says that the answer should be
    /// NXDOMAIN (2.4.1), and CoreDNS does so for all names below, too (in findServices errNoItems stands).
    pub(super) fn exists(&self) -> bool {
        match &self.records {
            Records::ClusterIps { .. } | Records::Alias(_) => true,
            Records::Headless(headless) => !headless.endpoints.is_empty(),
            Records::Nothing => false,
        }
    }

    /// The port that `_name._protocol` stands for; the two labels are without their lengths.
    pub(super) fn port(&self, name: &[u8], protocol: &[u8]) -> Option<usize> {
        let (name, protocol) = (name.strip_prefix(b"_")?, protocol_of(protocol)?);
        self.named_ports(protocol)
            .find(|(_, port)| port.port.name.as_bytes().eq_ignore_ascii_case(name))
            .map(|(i, _)| i)
    }

    /// Whether there are SRV records below the label, which is without its length.
    pub(super) fn has_protocol(&self, label: &[u8]) -> bool {
        protocol_of(label).is_some_and(|protocol| self.named_ports(protocol).next().is_some())
    }

    /// The ports that have SRV records of their own.
    fn named_ports(&self, protocol: Protocol) -> impl Iterator<Item = (usize, &ServedPort)> {
        let exists = move |index: usize| match &self.records {
            Records::ClusterIps { ips, .. } => !ips.is_empty(),
            Records::Headless(headless) => !headless.targets(Some(index)).is_empty(),
            Records::Alias(_) | Records::Nothing => false,
        };
        let named = move |port: &ServedPort| port.port.protocol == protocol && !port.port.name.is_empty();
        self.entry.ports.iter().enumerate().filter(move |(index, port)| named(port) && exists(*index))
    }

    /// The endpoints that a label stands for, which is without its length.
    pub(super) fn endpoints(&self, label: &[u8]) -> Named<'_> {
        match &self.records {
            Records::Headless(headless) => Named::List(named(&headless.endpoints, label)),
            Records::ClusterIps { hostnames, .. } => {
                let list = named(hostnames, label);
                match dashed(label).filter(|_| list.is_empty()) {
                    Some(ip) if published_at(&self.entry.ports, ip) => Named::Address(ip),
                    _ => Named::List(list),
                }
            }
            Records::Alias(_) | Records::Nothing => Named::List(&[]),
        }
    }

    /// Addresses with reverse records, each with the index of the endpoint it is of; None for a ClusterIP.
    pub(super) fn reverse(&self) -> impl Iterator<Item = (IpAddr, Option<u32>)> {
        let (cluster_ips, endpoints) = match &self.records {
            Records::ClusterIps { ips, .. } => (&**ips, &[][..]),
            Records::Headless(headless) => (&[][..], &*headless.endpoints),
            Records::Alias(_) | Records::Nothing => (&[][..], &[][..]),
        };
        let endpoints = endpoints.iter().zip(0..).map(|(endpoint, index)| (endpoint.ip, Some(index)));
        cluster_ips.iter().map(|&ip| (ip, None)).chain(endpoints)
    }
}

/// What a label below a Service stands for.
pub(super) enum Named<'z> {
    List(&'z [Endpoint]),
    /// An endpoint of a Service with ClusterIPs.
    Address(IpAddr),
}

impl Headless {
    fn new(entry: &ServiceEntry) -> Self {
        let endpoints = ordered(published(entry));
        let mut targets = Vec::new();
        for (served, port) in entry.ports.iter().zip(0..=u16::MAX) {
            for endpoint in served.endpoints.iter().filter(|endpoint| endpoint.ready) {
                let Some(ip) = endpoint.target().map(|target| target.ip()) else { continue };
                let name = hostname(&endpoint.place);
                // All addresses of one hostname are one target.
                let first = endpoints.partition_point(|other| {
                    let by_name = order(other.hostname(), name);
                    by_name.is_lt() || (name.is_none() && by_name.is_eq() && other.ip < ip)
                });
                if let Ok(endpoint_index) = u32::try_from(first) {
                    targets.push(Target { endpoint: endpoint_index, number: endpoint.addr.port(), port });
                }
            }
        }
        targets.sort_unstable();
        targets.dedup();
        let mut seen = HashSet::with_capacity(endpoints.len());
        let mut addresses = [Vec::new(), Vec::new()];
        for (endpoint, index) in endpoints.iter().zip(0..) {
            let [v4, v6] = &mut addresses;
            if seen.insert(endpoint.ip) {
                if endpoint.ip.is_ipv4() { v4 } else { v6 }.push(index);
            }
        }
        let mut of_ports = vec![Vec::new(); entry.ports.len()];
        for target in &targets {
            if let Some(of_port) = of_ports.get_mut(usize::from(target.port)) {
                of_port.push(*target);
            }
        }
        if of_ports.iter().filter(|of_port| !of_port.is_empty()).count() > 1 {
            targets.dedup_by_key(|target| (target.endpoint, target.number));
        } else {
            targets.clear();
        }
        Self {
            endpoints,
            addresses: addresses.map(Into::into),
            targets: of_ports.into_iter().map(Into::into).collect(),
            all_targets: targets.into(),
        }
    }

    /// How many addresses of a type there are; of any, for ANY.
    pub(super) fn count(&self, wanted: u16) -> usize {
        self.lists(wanted).into_iter().map(<[u32]>::len).sum()
    }

    /// One of them.
    pub(super) fn address(&self, wanted: u16, index: usize) -> Option<IpAddr> {
        let [v4, v6] = self.lists(wanted);
        let endpoint = v4.get(index).or_else(|| v6.get(index.checked_sub(v4.len())?))?;
        self.endpoint(*endpoint).map(|endpoint| endpoint.ip)
    }

    fn lists(&self, wanted: u16) -> [&[u32]; 2] {
        let [v4, v6] = &self.addresses;
        match wanted {
            qtype::A => [v4, &[]],
            qtype::AAAA => [&[], v6],
            qtype::ANY => [v4, v6],
            _ => [&[], &[]],
        }
    }

    /// Where the SRV records of a port lead to, or those of all ports; those with one name follow each other.
    pub(super) fn targets(&self, port: Option<usize>) -> &[Target] {
        match port {
            Some(port) => self.targets.get(port).map(|targets| &**targets).unwrap_or_default(),
            None if self.all_targets.is_empty() => {
                self.targets.iter().find(|targets| !targets.is_empty()).map(|targets| &**targets).unwrap_or_default()
            }
            None => &self.all_targets,
        }
    }

    pub(super) fn endpoint(&self, index: u32) -> Option<&Endpoint> {
        self.endpoints.get(usize::try_from(index).ok()?)
    }

    /// The endpoints that have the name of the one at `first`, which must be the first of them.
    pub(super) fn same_name(&self, first: u32) -> &[Endpoint] {
        let from = usize::try_from(first).ok().and_then(|first| self.endpoints.get(first..)).unwrap_or_default();
        let Some(name) = from.first().map(Endpoint::hostname) else { return &[] };
        let count = match name {
            None => 1,
            Some(_) => from.partition_point(|endpoint| endpoint.hostname() == name),
        };
        from.get(..count).unwrap_or_default()
    }
}

impl Endpoint {
    pub(super) fn label(&self) -> Label {
        label_of(self.ip, &self.place)
    }

    fn hostname(&self) -> Option<&str> {
        hostname(&self.place)
    }
}

/// Service and namespace in wire form, lower case; None if either is no label.
fn key(service: &str, namespace: &str) -> Option<Vec<u8>> {
    let mut key = Vec::with_capacity(2 + service.len() + namespace.len());
    for text in [service, namespace] {
        let label = wire(text).filter(|_| !text.contains('.'))?;
        key.extend_from_slice(label.strip_suffix(b"\0")?);
    }
    Some(key)
}

/// The label of an endpoint below its Service.
pub(super) fn label_of(ip: IpAddr, place: &Place) -> Label {
    hostname(place).map_or_else(|| Label::of_ip(ip), Label::of)
}

fn hostname(place: &Place) -> Option<&str> {
    place.hostname.as_deref().filter(|name| (1..=MAX_LABEL).contains(&name.len()))
}

/// Address and place of each published endpoint; once for each port it has. One of another site has its alias, by which
/// clients on this node reach it.
fn published(entry: &ServiceEntry) -> impl Iterator<Item = (IpAddr, &Arc<Place>)> {
    let with_ports = entry.ports.iter().flat_map(|port| &port.endpoints).filter(|endpoint| endpoint.ready);
    let portless = entry.portless.iter().filter(|endpoint| endpoint.ready);
    let with_ports = with_ports.filter_map(|endpoint| Some((endpoint.target()?.ip(), &endpoint.place)));
    with_ports.chain(portless.filter_map(|endpoint| Some((endpoint.target()?, &endpoint.place))))
}

/// Hostnames come first.
fn order(a: Option<&str>, b: Option<&str>) -> Ordering {
    (a.is_none(), a).cmp(&(b.is_none(), b))
}

fn ordered<'a>(endpoints: impl Iterator<Item = (IpAddr, &'a Arc<Place>)>) -> Box<[Endpoint]> {
    let mut list: Vec<(IpAddr, &Arc<Place>)> = endpoints.collect();
    list.sort_unstable_by(|(a, at_a), (b, at_b)| order(hostname(at_a), hostname(at_b)).then_with(|| a.cmp(b)));
    list.dedup_by(|(a, at_a), (b, at_b)| a == b && hostname(at_a) == hostname(at_b));
    list.into_iter().map(|(ip, place)| Endpoint { ip, place: Arc::clone(place) }).collect()
}

/// Those with an address of the type, of endpoints that share a name and are ordered by address; all, for ANY.
pub(super) fn of_type(list: &[Endpoint], wanted: u16) -> &[Endpoint] {
    let (v4, v6) = list.split_at(list.partition_point(|endpoint| endpoint.ip.is_ipv4()));
    match wanted {
        qtype::A => v4,
        qtype::AAAA => v6,
        qtype::ANY => list,
        _ => &[],
    }
}

/// The endpoints with the label, of a list that is ordered.
fn named<'a>(list: &'a [Endpoint], label: &[u8]) -> &'a [Endpoint] {
    let before = |endpoint: &Endpoint| endpoint.hostname().is_some_and(|name| name.as_bytes() < label);
    let equal = |endpoint: &Endpoint| endpoint.hostname().is_some_and(|name| name.as_bytes() == label);
    let from = list.get(list.partition_point(before)..).unwrap_or_default();
    let found = from.get(..from.partition_point(equal)).unwrap_or_default();
    if !found.is_empty() {
        return found;
    }
    let Some(ip) = dashed(label) else { return &[] };
    let first = list.partition_point(|endpoint| endpoint.hostname().is_some() || endpoint.ip < ip);
    list.get(first..=first).filter(|found| found.iter().all(|endpoint| endpoint.ip == ip)).unwrap_or_default()
}

/// The address whose label it is: of the many ways to write an IPv6 address, only one is a name.
fn dashed(label: &[u8]) -> Option<IpAddr> {
    let ip = dashed_ip(label)?;
    (Label::of_ip(ip).as_wire().get(1..) == Some(label)).then_some(ip)
}

/// Whether there is a published endpoint with the address, and no hostname.
fn published_at(ports: &[ServedPort], ip: IpAddr) -> bool {
    let unnamed = |endpoint: &PortEndpoint| endpoint.ready && hostname(&endpoint.place).is_none();
    let at = |port: &ServedPort| {
        if port.endpoints.first().is_some_and(|endpoint| endpoint.path.is_some()) {
            // Aliases are in no order.
            let reached = |endpoint: &PortEndpoint| endpoint.target().is_some_and(|target| target.ip() == ip);
            return port.endpoints.iter().any(|endpoint| reached(endpoint) && unnamed(endpoint));
        }
        let from = port.endpoints.partition_point(|endpoint| endpoint.addr < SocketAddr::new(ip, 0));
        port.endpoints.iter().skip(from).take_while(|endpoint| endpoint.addr.ip() == ip).any(unnamed)
    };
    ports.iter().any(at)
}

fn protocol_of(label: &[u8]) -> Option<Protocol> {
    match label {
        b"_tcp" => Some(Protocol::Tcp),
        b"_udp" => Some(Protocol::Udp),
        b"_sctp" => Some(Protocol::Sctp),
        _ => None,
    }
}
