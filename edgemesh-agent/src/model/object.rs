//! The objects that sources deliver, parsed once and reduced to what the agent uses.

use std::{
    fmt,
    net::IpAddr,
    num::{NonZeroU16, NonZeroU32},
    sync::Arc,
};

use super::{DestinationRule, IpPrefix, NamespacedName};

/// The transport protocol of a port.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Protocol {
    Tcp,
    Udp,
    /// Recognised so that it can be refused by name; no data plane serves it.
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// `spec.type` of a Service, with headless told apart from ClusterIP.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ServiceKind {
    ClusterIp,
    /// `clusterIP: None`: known to DNS, not to the data plane.
    Headless,
    NodePort,
    LoadBalancer,
    /// A DNS alias; never has frontends.
    ExternalName,
}

/// Which labels that choose another proxy a Service carries; their values do not matter.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ProxyLabels {
    /// `service.edgemesh.kubeedge.io/service-proxy-name` (EdgeMesh's `serviceFilterMode` looks at it).
    pub edgemesh: bool,
    /// `service.kubernetes.io/service-proxy-name` (KEP-2447: the Service belongs to another proxy).
    pub standard: bool,
}

/// A core/v1 Service.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Service {
    pub name: NamespacedName,
    pub kind: ServiceKind,
    /// `spec.clusterIPs` (else `spec.clusterIP`); empty for headless and ExternalName Services.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` where `ipMode` is `VIP` or absent: packets arrive with this destination
    /// (KEP-1860). With `Proxy` they arrive at a node port or a pod, so there is nothing to translate.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`; None admits every client. Unusable entries are left out, so that a list of
    /// nothing else admits nobody.
    pub source_ranges: Option<Vec<IpPrefix>>,
    pub ports: Vec<ServicePort>,
    pub affinity: SessionAffinity,
    /// `spec.internalTrafficPolicy`: which endpoints the ClusterIPs lead to.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`: which endpoints traffic from outside the cluster is led to.
    pub external_policy: TrafficPolicy,
    /// `spec.trafficDistribution`.
    pub distribution: Option<TrafficDistribution>,
    /// KubeEdge's annotation `apps.kubeedge.io/service-topology: range-nodegroup`: only endpoints of the own node group.
    pub within_node_group: bool,
    /// SuperEdge's annotation `topologyKeys`: only endpoints on nodes that share the value of at least one of these
    /// labels; `*` stands for any node. Empty for no such limit.
    pub topology_keys: Vec<Box<str>>,
    /// `spec.publishNotReadyAddresses`: the readiness of endpoints does not matter.
    pub publish_not_ready: bool,
    /// `spec.externalName`, lower case and without a final dot: what DNS leads to. None for all other kinds of Services,
    /// and where it is unusable.
    pub external_name: Option<Box<str>>,
    /// The label `k8s-app` is `kube-dns`: it is the DNS of the cluster.
    pub cluster_dns: bool,
    pub proxy_labels: ProxyLabels,
}

impl Service {
    /// A Service with the API's defaults, and neither addresses nor ports.
    pub fn new(name: NamespacedName, kind: ServiceKind) -> Self {
        Self {
            name,
            kind,
            cluster_ips: Vec::new(),
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            source_ranges: None,
            ports: Vec::new(),
            affinity: SessionAffinity::None,
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            distribution: None,
            within_node_group: false,
            topology_keys: Vec::new(),
            publish_not_ready: false,
            external_name: None,
            cluster_dns: false,
            proxy_labels: ProxyLabels::default(),
        }
    }
}

/// `spec.sessionAffinity`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SessionAffinity {
    None,
    /// Connections of one client go to one endpoint, until it has made none for this many seconds (1 to 86,400).
    ClientIp {
        timeout: NonZeroU32,
    },
}

/// Whether traffic may leave the node it came to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TrafficPolicy {
    Cluster,
    /// Only endpoints on the same node; none there means no endpoints.
    Local,
}

/// `spec.trafficDistribution` (KEP-4444, KEP-3015): a preference, which never leaves a client without endpoints.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TrafficDistribution {
    /// Also called `PreferClose`.
    SameZone,
    /// The same node, else the same zone.
    SameNode,
}

/// One entry of `spec.ports`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServicePort {
    /// Empty where the Service has a single unnamed port.
    pub name: Box<str>,
    pub protocol: Protocol,
    pub port: NonZeroU16,
    /// The port that every node answers on; None for Services that have none.
    pub node_port: Option<NonZeroU16>,
}

/// The endpoints that one EndpointSlice, or one core/v1 Endpoints object, gives to a Service.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EndpointSet {
    /// Of the object itself.
    pub name: NamespacedName,
    /// Of the Service: the label `kubernetes.io/service-name` of a slice, the object's own name for Endpoints.
    pub service: NamespacedName,
    /// One for a slice, one for each of `subsets` for Endpoints.
    pub subsets: Vec<Subset>,
}

/// Endpoints that share their ports.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Subset {
    pub ports: Vec<EndpointPort>,
    pub endpoints: Vec<Endpoint>,
}

/// A port of a [`Subset`]; matches the Service port of the same name and protocol.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EndpointPort {
    pub name: Box<str>,
    pub protocol: Protocol,
    pub port: NonZeroU16,
}

/// One endpoint; the conditions are resolved as the API documents them (absent `ready` and `serving` mean true, absent
/// `terminating` means false).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Endpoint {
    /// All addresses of a slice belong to one family and are interchangeable; only the first is used (API field docs).
    pub address: IpAddr,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    /// Shared: of many endpoints only few differ in it.
    pub place: Arc<Place>,
}

/// Where an endpoint is, which clients it is meant for, and what it is called: all that most endpoints of a node share.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Place {
    pub node: Option<Box<str>>,
    pub zone: Option<Box<str>>,
    /// `hints.forZones`; empty for none.
    pub for_zones: Box<[Box<str>]>,
    /// `hints.forNodes`; empty for none.
    pub for_nodes: Box<[Box<str>]>,
    /// The endpoint's own label below its Service in DNS (pods have one by `hostname` and `subdomain`, those of
    /// StatefulSets always); most have none.
    pub hostname: Option<Box<str>>,
}

/// A core/v1 Node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Node {
    /// Its namespace is empty, as Nodes have none.
    pub name: NamespacedName,
    /// `status.addresses` of the types InternalIP and ExternalIP, in that order.
    pub addresses: Vec<IpAddr>,
    /// All of them, as `topologyKeys` may name any; ordered by key.
    pub labels: Box<[(Arc<str>, Arc<str>)]>,
}

impl Node {
    /// The value of a label.
    pub fn label(&self, key: &str) -> Option<&str> {
        let place = self.labels.binary_search_by(|(label, _)| (**label).cmp(key)).ok()?;
        self.labels.get(place).map(|(_, value)| &**value)
    }

    /// The zone it is in (label `topology.kubernetes.io/zone`).
    pub fn zone(&self) -> Option<&str> {
        self.label("topology.kubernetes.io/zone").filter(|zone| !zone.is_empty())
    }

    /// KubeEdge's node group (label `apps.kubeedge.io/belonging-to`). Nodes without one are no group of their own.
    pub fn group(&self) -> Option<&str> {
        self.label("apps.kubeedge.io/belonging-to").filter(|group| !group.is_empty())
    }
}

/// The kinds of objects that sources deliver.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    Service,
    EndpointSlice,
    Endpoints,
    Node,
    DestinationRule,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Service, Self::EndpointSlice, Self::Endpoints, Self::Node, Self::DestinationRule];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Endpoints => "Endpoints",
            Self::Node => "Node",
            Self::DestinationRule => "DestinationRule",
        })
    }
}

/// One object of a kind; cheap to clone, as a source may keep what it has delivered.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Object {
    Service(Arc<Service>),
    EndpointSlice(Arc<EndpointSet>),
    Endpoints(Arc<EndpointSet>),
    Node(Arc<Node>),
    DestinationRule(Arc<DestinationRule>),
}

impl Object {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::Endpoints(_) => Kind::Endpoints,
            Self::Node(_) => Kind::Node,
            Self::DestinationRule(_) => Kind::DestinationRule,
        }
    }

    pub fn name(&self) -> &NamespacedName {
        match self {
            Self::Service(service) => &service.name,
            Self::EndpointSlice(set) | Self::Endpoints(set) => &set.name,
            Self::Node(node) => &node.name,
            Self::DestinationRule(rule) => &rule.name,
        }
    }
}

/// What a source tells the builder, in order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Event {
    /// The object exists as given; whatever was known under its kind and name is replaced.
    Apply(Object),
    /// No such object exists any more; unknown ones are ignored.
    Delete(Kind, NamespacedName),
    /// All objects of this kind; what is not among them does not exist.
    Replace(Kind, Vec<Object>),
    /// What was told of this kind before is all of it as of this `resourceVersion`, and whatever else claims to be older
    /// than that is not to be believed. For the snapshot: only metaServer says so, and wants to be told after a restart.
    Reached(Kind, u64),
    /// Everything that exists has been delivered at least once. Before this nothing is taken away from the data plane.
    Synced,
}
