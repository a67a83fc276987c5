//! The objects that sources deliver, parsed once and reduced to what the agent uses.

use std::{fmt, net::IpAddr, num::NonZeroU16};

use super::NamespacedName;

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
    pub ports: Vec<ServicePort>,
    pub proxy_labels: ProxyLabels,
}

/// One entry of `spec.ports`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServicePort {
    /// Empty where the Service has a single unnamed port.
    pub name: Box<str>,
    pub protocol: Protocol,
    pub port: NonZeroU16,
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
    pub node: Option<Box<str>>,
    pub zone: Option<Box<str>>,
}

/// The kinds of objects that sources deliver.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    Service,
    EndpointSlice,
    Endpoints,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Endpoints => "Endpoints",
        })
    }
}

/// One object of a kind.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Object {
    Service(Service),
    EndpointSlice(EndpointSet),
    Endpoints(EndpointSet),
}

impl Object {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::Endpoints(_) => Kind::Endpoints,
        }
    }

    pub fn name(&self) -> &NamespacedName {
        match self {
            Self::Service(service) => &service.name,
            Self::EndpointSlice(set) | Self::Endpoints(set) => &set.name,
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
    /// Everything that exists has been delivered at least once. Before this nothing is taken away from the data plane.
    Synced,
}
