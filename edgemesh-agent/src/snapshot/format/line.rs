//! One object, one line of JSON.
//!
//! These types are the format; those of the model are not, so that nothing there can be renamed or reordered into another
//! format. Each model type is taken apart field by field, so a new field does not compile until it has a place here.
//! What has its usual value is left out.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    net::IpAddr,
    num::{NonZeroU16, NonZeroU32},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::model::{
    Balance, DestinationRule, Endpoint, EndpointPort, EndpointSet, Ignored, IpPrefix, Kind, NamespacedName, Node,
    Object, ParsePrefixError, Place, Protocol, ProxyLabels, Service, ServiceKind, ServicePort, SessionAffinity, Subset,
    TrafficDistribution, TrafficPolicy,
};

/// An object as it is written.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Line<'a> {
    Service(ServiceLine<'a>),
    EndpointSlice(SetLine<'a>),
    Endpoints(SetLine<'a>),
    Node(NodeLine<'a>),
    DestinationRule(RuleLine<'a>),
}

impl<'a> Line<'a> {
    pub(super) fn write(&self, out: &mut Vec<u8>) -> serde_json::Result<()> {
        serde_json::to_writer(out, self)
    }

    pub(super) fn read(kind: Kind, bytes: &'a [u8]) -> serde_json::Result<Self> {
        Ok(match kind {
            Kind::Service => Self::Service(serde_json::from_slice(bytes)?),
            Kind::EndpointSlice => Self::EndpointSlice(serde_json::from_slice(bytes)?),
            Kind::Endpoints => Self::Endpoints(serde_json::from_slice(bytes)?),
            Kind::Node => Self::Node(serde_json::from_slice(bytes)?),
            Kind::DestinationRule => Self::DestinationRule(serde_json::from_slice(bytes)?),
        })
    }
}

impl<'a> From<&'a Object> for Line<'a> {
    fn from(object: &'a Object) -> Self {
        match object {
            Object::Service(service) => Self::Service((&**service).into()),
            Object::EndpointSlice(set) => Self::EndpointSlice((&**set).into()),
            Object::Endpoints(set) => Self::Endpoints((&**set).into()),
            Object::Node(node) => Self::Node((&**node).into()),
            Object::DestinationRule(rule) => Self::DestinationRule((&**rule).into()),
        }
    }
}

impl From<Line<'_>> for Object {
    fn from(line: Line<'_>) -> Self {
        match line {
            Line::Service(service) => Self::Service(Arc::new(service.into())),
            Line::EndpointSlice(set) => Self::EndpointSlice(Arc::new(set.into())),
            Line::Endpoints(set) => Self::Endpoints(Arc::new(set.into())),
            Line::Node(node) => Self::Node(Arc::new(node.into())),
            Line::DestinationRule(rule) => Self::DestinationRule(Arc::new(rule.into())),
        }
    }
}

/// Words of the format for the variants of an enum of the model.
macro_rules! words {
    ($(#[$doc:meta])* $words:ident for $model:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
        pub(super) enum $words {
            $(#[serde(rename = $word)] $variant),+
        }

        impl From<$model> for $words {
            fn from(value: $model) -> Self {
                match value {
                    $($model::$variant => Self::$variant),+
                }
            }
        }

        impl From<$words> for $model {
            fn from(word: $words) -> Self {
                match word {
                    $($words::$variant => Self::$variant),+
                }
            }
        }
    };
}

words!(
    /// Names the sections.
    KindWord for Kind {
        Service = "Service",
        EndpointSlice = "EndpointSlice",
        Endpoints = "Endpoints",
        Node = "Node",
        DestinationRule = "DestinationRule",
    }
);
words!(ServiceKindWord for ServiceKind {
    ClusterIp = "ClusterIP",
    Headless = "Headless",
    NodePort = "NodePort",
    LoadBalancer = "LoadBalancer",
    ExternalName = "ExternalName",
});
words!(ProtocolWord for Protocol { Tcp = "TCP", Udp = "UDP", Sctp = "SCTP" });
words!(PolicyWord for TrafficPolicy { Cluster = "Cluster", Local = "Local" });
words!(DistributionWord for TrafficDistribution { SameZone = "SameZone", SameNode = "SameNode" });
words!(BalanceWord for Balance { Random = "random", SourceIp = "source-ip" });

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServiceLine<'a> {
    #[serde(borrow)]
    namespace: Cow<'a, str>,
    #[serde(borrow)]
    name: Cow<'a, str>,
    kind: ServiceKindWord,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    cluster_ips: Vec<IpAddr>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    external_ips: Vec<IpAddr>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    load_balancer_ips: Vec<IpAddr>,
    /// None and an empty list are not the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    source_ranges: Option<Vec<Prefix>>,
    #[serde(borrow, default, skip_serializing_if = "Vec::is_empty")]
    ports: Vec<PortLine<'a>>,
    /// The time-out of `sessionAffinity: ClientIP`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    affinity_seconds: Option<NonZeroU32>,
    #[serde(default = "cluster", skip_serializing_if = "is_cluster")]
    internal_policy: PolicyWord,
    #[serde(default = "cluster", skip_serializing_if = "is_cluster")]
    external_policy: PolicyWord,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    distribution: Option<DistributionWord>,
    #[serde(default, skip_serializing_if = "is_false")]
    within_node_group: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    topology_keys: Vec<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "is_false")]
    publish_not_ready: bool,
    /// Since version 2.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    external_name: Option<Cow<'a, str>>,
    /// Since version 2.
    #[serde(default, skip_serializing_if = "is_false")]
    cluster_dns: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    edgemesh_proxy_label: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    standard_proxy_label: bool,
}

/// A port of a Service or of endpoints.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct PortLine<'a> {
    #[serde(borrow, default, skip_serializing_if = "str::is_empty")]
    name: Cow<'a, str>,
    protocol: ProtocolWord,
    port: NonZeroU16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node_port: Option<NonZeroU16>,
}

/// An EndpointSlice or an Endpoints.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SetLine<'a> {
    #[serde(borrow)]
    namespace: Cow<'a, str>,
    #[serde(borrow)]
    name: Cow<'a, str>,
    /// None where it has the name of the object.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    service: Option<NameLine<'a>>,
    #[serde(borrow, default, skip_serializing_if = "Vec::is_empty")]
    subsets: Vec<SubsetLine<'a>>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct SubsetLine<'a> {
    #[serde(borrow)]
    ports: Vec<PortLine<'a>>,
    #[serde(borrow)]
    endpoints: Vec<EndpointLine<'a>>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct EndpointLine<'a> {
    ip: IpAddr,
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    ready: bool,
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    serving: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    terminating: bool,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    node: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    zone: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    for_zones: Vec<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    for_nodes: Vec<Cow<'a, str>>,
    /// Since version 2.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    hostname: Option<Cow<'a, str>>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NodeLine<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    addresses: Vec<IpAddr>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<Cow<'a, str>, Cow<'a, str>>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RuleLine<'a> {
    #[serde(borrow)]
    namespace: Cow<'a, str>,
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    created: Option<i64>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    host: Option<NameLine<'a>>,
    #[serde(default, skip_serializing_if = "is_false")]
    for_some_clients: bool,
    balance: BalanceWord,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    ports: BTreeMap<NonZeroU16, BalanceWord>,
    #[serde(borrow, default, skip_serializing_if = "Vec::is_empty")]
    ignored: Vec<IgnoredLine<'a>>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct IgnoredLine<'a> {
    #[serde(borrow)]
    field: Cow<'a, str>,
    #[serde(borrow)]
    why: Cow<'a, str>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct NameLine<'a> {
    #[serde(borrow)]
    namespace: Cow<'a, str>,
    #[serde(borrow)]
    name: Cow<'a, str>,
}

/// `10.0.0.0/8`.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
struct Prefix(IpPrefix);

impl TryFrom<String> for Prefix {
    type Error = ParsePrefixError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> Self {
        prefix.0.to_string()
    }
}

fn yes() -> bool {
    true
}

fn is_true(value: &bool) -> bool {
    *value
}

fn is_false(value: &bool) -> bool {
    !*value
}

fn cluster() -> PolicyWord {
    PolicyWord::Cluster
}

fn is_cluster(policy: &PolicyWord) -> bool {
    *policy == PolicyWord::Cluster
}

fn borrowed<'a>(texts: impl IntoIterator<Item = &'a Box<str>>) -> Vec<Cow<'a, str>> {
    texts.into_iter().map(|text| Cow::Borrowed(&**text)).collect()
}

fn owned<T: FromIterator<Box<str>>>(texts: Vec<Cow<'_, str>>) -> T {
    texts.into_iter().map(Box::from).collect()
}

impl<'a> From<&'a NamespacedName> for NameLine<'a> {
    fn from(NamespacedName { namespace, name }: &'a NamespacedName) -> Self {
        Self { namespace: Cow::Borrowed(namespace), name: Cow::Borrowed(name) }
    }
}

impl From<NameLine<'_>> for NamespacedName {
    fn from(NameLine { namespace, name }: NameLine<'_>) -> Self {
        Self::new(namespace, name)
    }
}

impl<'a> From<&'a Service> for ServiceLine<'a> {
    fn from(service: &'a Service) -> Self {
        let Service {
            name: NamespacedName { namespace, name },
            kind,
            cluster_ips,
            external_ips,
            load_balancer_ips,
            source_ranges,
            ports,
            affinity,
            internal_policy,
            external_policy,
            distribution,
            within_node_group,
            topology_keys,
            publish_not_ready,
            external_name,
            cluster_dns,
            proxy_labels: ProxyLabels { edgemesh, standard },
        } = service;
        Self {
            namespace: Cow::Borrowed(namespace),
            name: Cow::Borrowed(name),
            kind: (*kind).into(),
            cluster_ips: cluster_ips.clone(),
            external_ips: external_ips.clone(),
            load_balancer_ips: load_balancer_ips.clone(),
            source_ranges: source_ranges.as_ref().map(|ranges| ranges.iter().copied().map(Prefix).collect()),
            ports: ports.iter().map(PortLine::from).collect(),
            affinity_seconds: match *affinity {
                SessionAffinity::None => None,
                SessionAffinity::ClientIp { timeout } => Some(timeout),
            },
            internal_policy: (*internal_policy).into(),
            external_policy: (*external_policy).into(),
            distribution: distribution.map(Into::into),
            within_node_group: *within_node_group,
            topology_keys: borrowed(topology_keys),
            publish_not_ready: *publish_not_ready,
            external_name: external_name.as_deref().map(Cow::Borrowed),
            cluster_dns: *cluster_dns,
            edgemesh_proxy_label: *edgemesh,
            standard_proxy_label: *standard,
        }
    }
}

impl From<ServiceLine<'_>> for Service {
    fn from(line: ServiceLine<'_>) -> Self {
        Self {
            name: NamespacedName::new(line.namespace, line.name),
            kind: line.kind.into(),
            cluster_ips: line.cluster_ips,
            external_ips: line.external_ips,
            load_balancer_ips: line.load_balancer_ips,
            source_ranges: line.source_ranges.map(|ranges| ranges.into_iter().map(|Prefix(prefix)| prefix).collect()),
            ports: line.ports.into_iter().map(ServicePort::from).collect(),
            affinity: match line.affinity_seconds {
                None => SessionAffinity::None,
                Some(timeout) => SessionAffinity::ClientIp { timeout },
            },
            internal_policy: line.internal_policy.into(),
            external_policy: line.external_policy.into(),
            distribution: line.distribution.map(Into::into),
            within_node_group: line.within_node_group,
            topology_keys: owned(line.topology_keys),
            publish_not_ready: line.publish_not_ready,
            external_name: line.external_name.map(Box::from),
            cluster_dns: line.cluster_dns,
            proxy_labels: ProxyLabels { edgemesh: line.edgemesh_proxy_label, standard: line.standard_proxy_label },
        }
    }
}

impl<'a> From<&'a ServicePort> for PortLine<'a> {
    fn from(ServicePort { name, protocol, port, node_port }: &'a ServicePort) -> Self {
        Self { name: Cow::Borrowed(name), protocol: (*protocol).into(), port: *port, node_port: *node_port }
    }
}

impl From<PortLine<'_>> for ServicePort {
    fn from(PortLine { name, protocol, port, node_port }: PortLine<'_>) -> Self {
        Self { name: name.into(), protocol: protocol.into(), port, node_port }
    }
}

impl<'a> From<&'a EndpointPort> for PortLine<'a> {
    fn from(EndpointPort { name, protocol, port }: &'a EndpointPort) -> Self {
        Self { name: Cow::Borrowed(name), protocol: (*protocol).into(), port: *port, node_port: None }
    }
}

impl From<PortLine<'_>> for EndpointPort {
    fn from(PortLine { name, protocol, port, node_port: _ }: PortLine<'_>) -> Self {
        Self { name: name.into(), protocol: protocol.into(), port }
    }
}

impl<'a> From<&'a EndpointSet> for SetLine<'a> {
    fn from(EndpointSet { name, service, subsets }: &'a EndpointSet) -> Self {
        Self {
            namespace: Cow::Borrowed(&name.namespace),
            name: Cow::Borrowed(&name.name),
            service: (service != name).then(|| service.into()),
            subsets: subsets.iter().map(SubsetLine::from).collect(),
        }
    }
}

impl From<SetLine<'_>> for EndpointSet {
    fn from(SetLine { namespace, name, service, subsets }: SetLine<'_>) -> Self {
        let name = NamespacedName::new(namespace, name);
        let service = service.map_or_else(|| name.clone(), NamespacedName::from);
        Self { name, service, subsets: subsets.into_iter().map(Subset::from).collect() }
    }
}

impl<'a> From<&'a Subset> for SubsetLine<'a> {
    fn from(Subset { ports, endpoints }: &'a Subset) -> Self {
        Self {
            ports: ports.iter().map(PortLine::from).collect(),
            endpoints: endpoints.iter().map(EndpointLine::from).collect(),
        }
    }
}

impl From<SubsetLine<'_>> for Subset {
    fn from(SubsetLine { ports, endpoints }: SubsetLine<'_>) -> Self {
        Self {
            ports: ports.into_iter().map(EndpointPort::from).collect(),
            endpoints: endpoints.into_iter().map(Endpoint::from).collect(),
        }
    }
}

impl<'a> From<&'a Endpoint> for EndpointLine<'a> {
    fn from(Endpoint { address, ready, serving, terminating, place }: &'a Endpoint) -> Self {
        let Place { node, zone, for_zones, for_nodes, hostname } = &**place;
        Self {
            ip: *address,
            ready: *ready,
            serving: *serving,
            terminating: *terminating,
            node: node.as_deref().map(Cow::Borrowed),
            zone: zone.as_deref().map(Cow::Borrowed),
            for_zones: borrowed(for_zones),
            for_nodes: borrowed(for_nodes),
            hostname: hostname.as_deref().map(Cow::Borrowed),
        }
    }
}

impl From<EndpointLine<'_>> for Endpoint {
    fn from(line: EndpointLine<'_>) -> Self {
        let EndpointLine { ip, ready, serving, terminating, node, zone, for_zones, for_nodes, hostname } = line;
        let place = Place {
            node: node.map(Box::from),
            zone: zone.map(Box::from),
            for_zones: owned(for_zones),
            for_nodes: owned(for_nodes),
            hostname: hostname.map(Box::from),
        };
        Self { address: ip, ready, serving, terminating, place: Arc::new(place) }
    }
}

impl<'a> From<&'a Node> for NodeLine<'a> {
    fn from(Node { name: NamespacedName { namespace: _, name }, addresses, labels }: &'a Node) -> Self {
        let labels = labels.iter().map(|(key, value)| (Cow::Borrowed(&**key), Cow::Borrowed(&**value)));
        Self { name: Cow::Borrowed(name), addresses: addresses.clone(), labels: labels.collect() }
    }
}

impl From<NodeLine<'_>> for Node {
    fn from(NodeLine { name, addresses, labels }: NodeLine<'_>) -> Self {
        // Ordered by key, as a Node has them.
        let labels = labels.into_iter().map(|(key, value)| (Arc::from(key), Arc::from(value)));
        Self { name: NamespacedName::new("", name), addresses, labels: labels.collect() }
    }
}

impl<'a> From<&'a DestinationRule> for RuleLine<'a> {
    fn from(rule: &'a DestinationRule) -> Self {
        let DestinationRule { name, created, host, for_some_clients, balance, ports, ignored } = rule;
        let ignored = ignored
            .iter()
            .map(|Ignored { field, why }| IgnoredLine { field: Cow::Borrowed(field), why: Cow::Borrowed(why) });
        Self {
            namespace: Cow::Borrowed(&name.namespace),
            name: Cow::Borrowed(&name.name),
            created: *created,
            host: host.as_ref().map(NameLine::from),
            for_some_clients: *for_some_clients,
            balance: (*balance).into(),
            ports: ports.iter().map(|(port, balance)| (*port, (*balance).into())).collect(),
            ignored: ignored.collect(),
        }
    }
}

impl From<RuleLine<'_>> for DestinationRule {
    fn from(line: RuleLine<'_>) -> Self {
        let ignored = line.ignored.into_iter();
        Self {
            name: NamespacedName::new(line.namespace, line.name),
            created: line.created,
            host: line.host.map(NamespacedName::from),
            for_some_clients: line.for_some_clients,
            balance: line.balance.into(),
            ports: line.ports.into_iter().map(|(port, balance)| (port, balance.into())).collect(),
            ignored: ignored
                .map(|IgnoredLine { field, why }| Ignored { field: field.into(), why: Cow::Owned(why.into_owned()) })
                .collect(),
        }
    }
}
