//! One Service, and the endpoints given to it, to its entry in the table.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use super::super::{
    Balance, EndpointSet, Frontend, FrontendAddr, FrontendKind, Node, Note, Place, PortEndpoint, PortlessEndpoint,
    Protocol, ServedPort, Service, ServiceEntry, ServiceKind, ServicePort, SessionAffinity, TrafficPolicy, Vantage,
    Verdict, Verdicts, judge, rule::Ruling, shared::Shared,
};
use super::detours::Detours;
use crate::config::ServiceFilter;

/// What a Service is resolved in.
pub(super) struct Surroundings<'a> {
    pub(super) filter: ServiceFilter,
    pub(super) vantage: Vantage<'a>,
    /// The endpoints given to the Service, ordered by object name.
    pub(super) sets: &'a [Arc<EndpointSet>],
    /// The DestinationRule that counts for the Service.
    pub(super) ruling: Option<Ruling>,
    pub(super) places: &'a mut Shared<Place>,
    /// None without a tunnel.
    pub(super) detours: Option<&'a mut Detours>,
}

/// The entry of a Service, as if no other wanted one of its frontends.
pub(super) fn resolve(service: &Arc<Service>, mut around: Surroundings<'_>) -> ServiceEntry {
    let mut notes = Vec::new();
    let labelled = service.proxy_labels.edgemesh;
    let wanted = match around.filter {
        ServiceFilter::UnlabelledOnly => !labelled,
        ServiceFilter::LabelledOnly => labelled,
    };
    let filtered = !wanted || service.proxy_labels.standard;
    if filtered {
        notes.push(Note::Filtered);
    } else if around.vantage.node().is_none() && needs_node(service, around.sets) {
        notes.push(Note::NodeUnknown);
    }
    let ports: Vec<ServedPort> = service
        .ports
        .iter()
        .map(|port| ServedPort { port: port.clone(), endpoints: endpoints_of(service, port, &mut around) })
        .collect();
    let portless = match service.kind {
        ServiceKind::Headless => portless(service, &ports, &mut around),
        ServiceKind::ClusterIp | ServiceKind::NodePort | ServiceKind::LoadBalancer | ServiceKind::ExternalName => {
            Vec::new()
        }
    };

    let mut frontends: Vec<Frontend> = Vec::new();
    for (index, served) in ports.iter().enumerate() {
        if served.port.protocol == Protocol::Sctp {
            notes.push(Note::Sctp { port: served.port.port.get() });
            continue;
        }
        if filtered {
            continue;
        }
        let balance =
            around.ruling.as_ref().map_or_else(Balance::default, |ruling| ruling.rule.balance_on(served.port.port));
        let families = [true, false].map(|v4| Backends::of(service, &served.endpoints, v4));
        for (kind, addr) in answers(service, &served.port, around.vantage.node()) {
            let at = FrontendAddr { addr, protocol: served.port.protocol };
            if frontends.iter().any(|frontend| frontend.at == at) {
                continue;
            }
            let [v4, v6] = &families;
            let family = if addr.is_ipv4() { v4 } else { v6 };
            let (backends, external_backends) = match kind {
                FrontendKind::ClusterIp => (&family.internal, &family.internal),
                FrontendKind::NodePort | FrontendKind::LoadBalancer | FrontendKind::ExternalIp => {
                    (&family.cluster, &family.external)
                }
            };
            frontends.push(Frontend {
                at,
                kind,
                port: index,
                backends: Arc::clone(backends),
                external_backends: Arc::clone(external_backends),
                affinity: match service.affinity {
                    SessionAffinity::None => None,
                    SessionAffinity::ClientIp { timeout } => Some(timeout),
                },
                balance,
            });
        }
    }
    // There are as many of these as Services, and they live long.
    frontends.shrink_to_fit();
    // To a Service that is not translated a rule means nothing.
    let ruling = around.ruling.filter(|_| !frontends.is_empty());
    if let Some(Ruling { rule, overruled }) = &ruling {
        if !rule.ignored.is_empty() {
            let fields = rule.ignored.iter().map(|ignored| ignored.field.clone()).collect();
            notes.push(Note::Unheeded { rule: rule.name.clone(), fields });
        }
        let by = || rule.name.clone();
        notes.extend(overruled.iter().map(|rule| Note::Overruled { rule: rule.clone(), by: by() }));
    }
    let rule = ruling.map(|ruling| ruling.rule);
    ServiceEntry { service: Arc::clone(service), ports, portless, frontends, rule, notes }
}

/// Whether this node's addresses, zone or other labels matter to the Service.
fn needs_node(service: &Service, sets: &[Arc<EndpointSet>]) -> bool {
    let limited = service.within_node_group || !service.topology_keys.is_empty() || service.distribution.is_some();
    let endpoints = || sets.iter().flat_map(|set| &set.subsets).flat_map(|subset| &subset.endpoints);
    limited
        || service.ports.iter().any(|port| port.node_port.is_some())
        || endpoints().any(|endpoint| !endpoint.place.for_zones.is_empty())
}

/// Everything that a port of a Service answers on, by precedence.
///
/// A family in which the Service has no ClusterIP is not served, as kube-proxy has it. Node ports are answered on all
/// addresses of the Node object, and for the host itself on 127.0.0.1 but not on ::1, as by kube-proxy in its iptables
/// mode.
fn answers<'a>(
    service: &'a Service,
    port: &'a ServicePort,
    node: Option<&'a Node>,
) -> impl Iterator<Item = (FrontendKind, SocketAddr)> + 'a {
    let served = match service.kind {
        ServiceKind::ClusterIp | ServiceKind::NodePort | ServiceKind::LoadBalancer => true,
        ServiceKind::Headless | ServiceKind::ExternalName => false,
    };
    let has_family = |ip: &IpAddr| service.cluster_ips.iter().any(|other| other.is_ipv4() == ip.is_ipv4());
    let at = move |kind, number: u16| move |ip| (kind, SocketAddr::new(ip, number));
    let of = move |kind, ips: &'a [IpAddr]| ips.iter().copied().map(at(kind, port.port.get()));
    let on_node = port.node_port.into_iter().flat_map(move |number| {
        let own = node.map_or(&[][..], |node| &node.addresses).iter().copied();
        own.chain([IpAddr::V4(Ipv4Addr::LOCALHOST)]).map(at(FrontendKind::NodePort, number.get()))
    });
    of(FrontendKind::ClusterIp, &service.cluster_ips)
        .chain(on_node)
        .chain(of(FrontendKind::LoadBalancer, &service.load_balancer_ips))
        .chain(of(FrontendKind::ExternalIp, &service.external_ips))
        .filter(move |(_, addr)| served && has_family(&addr.ip()))
}

/// The backends of one port and family for each sort of frontend and client; shared, as most are the same.
struct Backends {
    internal: Arc<[SocketAddr]>,
    cluster: Arc<[SocketAddr]>,
    external: Arc<[SocketAddr]>,
}

impl Backends {
    fn of(service: &Service, endpoints: &[PortEndpoint], v4: bool) -> Self {
        let under = |policy: TrafficPolicy| -> Arc<[SocketAddr]> {
            let family = endpoints.iter().filter(|endpoint| endpoint.addr.is_ipv4() == v4);
            let eligible = family.filter(|endpoint| endpoint.verdicts.under(policy).eligible());
            // The one place where an endpoint of another site becomes an address of this node.
            let mut targets: Vec<SocketAddr> = eligible.filter_map(PortEndpoint::target).collect();
            targets.sort_unstable();
            targets.dedup();
            targets.into()
        };
        let cluster = under(TrafficPolicy::Cluster);
        let local =
            (service.internal_policy, service.external_policy) != (TrafficPolicy::Cluster, TrafficPolicy::Cluster);
        let local = if local { under(TrafficPolicy::Local) } else { Arc::clone(&cluster) };
        let choose = |policy| match policy {
            TrafficPolicy::Cluster => Arc::clone(&cluster),
            TrafficPolicy::Local => Arc::clone(&local),
        };
        Self { internal: choose(service.internal_policy), external: choose(service.external_policy), cluster }
    }
}

/// All endpoints of a port, merged over the sets and judged.
fn endpoints_of(service: &Service, port: &ServicePort, around: &mut Surroundings<'_>) -> Vec<PortEndpoint> {
    // Sites repeat addresses, so where several are reached, an address is a different endpoint on each node.
    let several_sites = around.detours.is_some();
    let mut merged: BTreeMap<(SocketAddr, Option<&str>), PortEndpoint> = BTreeMap::new();
    for subset in around.sets.iter().flat_map(|set| &set.subsets) {
        let matching = subset.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
        for target in matching {
            for endpoint in &subset.endpoints {
                let found = PortEndpoint {
                    addr: SocketAddr::new(endpoint.address, target.port.get()),
                    ready: endpoint.ready || service.publish_not_ready,
                    serving: endpoint.serving,
                    terminating: endpoint.terminating,
                    verdicts: Verdicts { cluster: Verdict::NotReady, local: Verdict::NotReady },
                    place: in_zone(&endpoint.place, &around.vantage, around.places),
                    path: None,
                };
                // While a pod moves between slices it may be in both; the better word about it counts.
                let key = (found.addr, endpoint.place.node.as_deref().filter(|_| several_sites));
                match merged.get(&key) {
                    Some(known) if rank(known) >= rank(&found) => {}
                    Some(_) | None => {
                        merged.insert(key, found);
                    }
                }
            }
        }
    }
    let mut endpoints: Vec<PortEndpoint> = merged.into_values().collect();
    judge(service, &mut endpoints, &around.vantage);
    if let Some(detours) = around.detours.as_deref_mut() {
        for endpoint in &mut endpoints {
            endpoint.path = Some(detours.path_of(&endpoint.place, endpoint.addr.ip(), around.vantage.nodes));
        }
    }
    endpoints
}

/// The endpoints, merged over the sets, that are in none of the ports.
fn portless(service: &Service, ports: &[ServedPort], around: &mut Surroundings<'_>) -> Vec<PortlessEndpoint> {
    let several_sites = around.detours.is_some();
    let mut merged: BTreeMap<(IpAddr, Option<&str>), PortlessEndpoint> = BTreeMap::new();
    for endpoint in around.sets.iter().flat_map(|set| &set.subsets).flat_map(|subset| &subset.endpoints) {
        let ip = endpoint.address;
        let same_node = |other: &PortEndpoint| !several_sites || other.place.node == endpoint.place.node;
        let has_port = |port: &ServedPort| {
            let first = port.endpoints.partition_point(|other| other.addr.ip() < ip);
            let mut there = port.endpoints.iter().skip(first).take_while(|other| other.addr.ip() == ip);
            there.any(same_node)
        };
        let ready = endpoint.ready || service.publish_not_ready;
        let key = (ip, endpoint.place.node.as_deref().filter(|_| several_sites));
        if ports.iter().any(has_port) || merged.get(&key).is_some_and(|known| known.ready >= ready) {
            continue;
        }
        let (terminating, place) = (endpoint.terminating, Arc::clone(&endpoint.place));
        merged.insert(key, PortlessEndpoint { ip, ready, terminating, place, path: None });
    }
    let mut endpoints: Vec<PortlessEndpoint> = merged.into_values().collect();
    if let Some(detours) = around.detours.as_deref_mut() {
        for endpoint in &mut endpoints {
            endpoint.path = Some(detours.path_of(&endpoint.place, endpoint.ip, around.vantage.nodes));
        }
    }
    endpoints
}

/// The place with the zone of its node, where it names none itself: core/v1 Endpoints never do.
fn in_zone(place: &Arc<Place>, vantage: &Vantage<'_>, places: &mut Shared<Place>) -> Arc<Place> {
    let node = place.node.as_deref().filter(|_| place.zone.is_none()).and_then(|name| vantage.nodes.get(name));
    match node.and_then(|node| node.zone()) {
        None => Arc::clone(place),
        Some(zone) => {
            let mut place = Arc::new(Place { zone: Some(zone.into()), ..Place::clone(place) });
            places.one(&mut place);
            place
        }
    }
}

fn rank(endpoint: &PortEndpoint) -> u8 {
    match (endpoint.ready, endpoint.serving) {
        (true, _) => 2,
        (false, true) => 1,
        (false, false) => 0,
    }
}
