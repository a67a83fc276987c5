//! What one Service publishes.

use std::{
    cmp::Ordering,
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::name::{Label, MAX_LABEL, MAX_NAME, Name, dashed_ip, wire};
use crate::model::{Place, PortEndpoint, Protocol, ServedPort, ServiceEntry, ServiceKind};

/// A Service as DNS has it.
#[derive(Debug)]
pub(super) struct Published {
    pub(super) entry: Arc<ServiceEntry>,
    /// `<service>.<namespace>.svc.<domain>`.
    name: Box<[u8]>,
    pub(super) records: Records,
}

/// What there is besides what the entry says itself.
#[derive(Debug)]
pub(super) enum Records {
    /// ClusterIPs, which are in the entry. Endpoints have names, too, and none of them an own hostname, as a rule: then
    /// they are found in the entry by their address.
    ClusterIps {
        hostnames: Box<[Endpoint]>,
    },
    Headless(Box<Headless>),
    /// The target of an ExternalName Service.
    Alias(Box<[u8]>),
    /// An ExternalName Service without a target.
    Nothing,
}

/// The endpoints of a headless Service.
#[derive(Debug, Default)]
pub(super) struct Headless {
    /// Ordered by label: those with a hostname, then the others by address.
    pub(super) endpoints: Box<[Endpoint]>,
    /// Ordered.
    pub(super) targets: Box<[Target]>,
}

/// A published endpoint.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    pub(super) ip: IpAddr,
    /// Whether an earlier one has the same address, under another hostname.
    pub(super) repeated: bool,
    place: Arc<Place>,
}

/// What an SRV record of a headless Service leads to.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Target {
    /// Index of the first endpoint with the name.
    pub(super) endpoint: u32,
    pub(super) number: u16,
    /// Index of the Service's port.
    pub(super) port: u16,
}

impl Published {
    /// None for a Service whose name or namespace is no label, which the API server allows for neither, and for one
    /// whose name leaves no room for names of endpoints below it: only under a domain of more than 57 characters.
    pub(super) fn new(entry: &Arc<ServiceEntry>, svc: &[u8]) -> Option<Self> {
        let name = [&*Self::key_of(entry)?, svc].concat();
        if name.len() + 1 + MAX_LABEL > MAX_NAME {
            return None;
        }
        let records = match entry.service.kind {
            ServiceKind::ClusterIp | ServiceKind::NodePort | ServiceKind::LoadBalancer => {
                let named = published(entry).filter(|(_, place)| hostname(place).is_some());
                Records::ClusterIps { hostnames: ordered(named) }
            }
            ServiceKind::Headless => Records::Headless(Headless::new(entry).into()),
            ServiceKind::ExternalName => {
                let target = entry.service.external_name.as_deref().and_then(wire);
                target.map_or(Records::Nothing, Records::Alias)
            }
        };
        Some(Self { entry: Arc::clone(entry), name: name.into(), records })
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
            Records::ClusterIps { .. } => !self.entry.service.cluster_ips.is_empty(),
            Records::Headless(headless) => headless.targets.iter().any(|target| usize::from(target.port) == index),
            Records::Alias(_) | Records::Nothing => false,
        };
        let named = move |port: &ServedPort| port.port.protocol == protocol && !port.port.name.is_empty();
        self.entry.ports.iter().enumerate().filter(move |(index, port)| named(port) && exists(*index))
    }

    /// The endpoints that a label stands for, which is without its length.
    pub(super) fn endpoints(&self, label: &[u8]) -> Named<'_> {
        match &self.records {
            Records::Headless(headless) => Named::List(named(&headless.endpoints, label)),
            Records::ClusterIps { hostnames } => {
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
            Records::ClusterIps { .. } => (&*self.entry.service.cluster_ips, &[][..]),
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
        Self { endpoints, targets: targets.into() }
    }

    /// The endpoints that have the name of the one at `first`, which must be the first of them.
    pub(super) fn same_name(&self, first: u32) -> &[Endpoint] {
        let from = usize::try_from(first).ok().and_then(|first| self.endpoints.get(first..)).unwrap_or_default();
        let Some(name) = from.first().map(Endpoint::hostname) else { return &[] };
        let count = match name {
            None => 1,
            Some(_) => from.iter().take_while(|endpoint| endpoint.hostname() == name).count(),
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
    let mut seen = HashSet::with_capacity(list.len());
    let endpoint =
        |(ip, place): (IpAddr, &Arc<Place>)| Endpoint { ip, repeated: !seen.insert(ip), place: Arc::clone(place) };
    list.into_iter().map(endpoint).collect()
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
