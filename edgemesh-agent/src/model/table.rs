//! The immutable tables that everything downstream of the builder reads.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    sync::Arc,
};

use smallvec::SmallVec;

use super::{DestinationRule, NamespacedName, Path, Place, Protocol, Service, ServicePort, Verdicts};
use crate::alias::Aliases;

/// Everything the agent knows of Services at one moment. Immutable; a change makes a new table that shares what did not
/// change.
#[derive(Clone, Debug, Default)]
pub struct ServiceTable {
    /// Counts up with each table.
    pub generation: u64,
    /// Whether the source has delivered everything that exists. While false, nothing may be taken away from what an
    /// earlier agent left in the kernel.
    pub complete: bool,
    /// Whether this node's own Node object is known.
    pub node_known: bool,
    /// Ordered by name.
    pub services: Vec<Arc<ServiceEntry>>,
    /// The nodes that are known, ordered by name; the same allocation as that of the table before, unless something changed.
    pub nodes: Arc<[KnownNode]>,
    /// Whether the source tells of all nodes. KubeEdge's metaServer, say, tells of this one alone; the others are known from
    /// endpoints on them, and from the tunnel.
    pub all_nodes: bool,
    /// By Service, the rules in force that ask for more than is done; the same allocation as that of the table before,
    /// unless something changed.
    pub unheeded: Arc<BTreeMap<NamespacedName, Arc<DestinationRule>>>,
    /// Whom the aliases in it stand for; empty without a tunnel.
    pub aliases: Aliases,
    /// How many endpoints, and addresses of nodes, are out of reach, as no alias is left for them.
    pub without_alias: usize,
}

impl ServiceTable {
    /// The Service of that name.
    pub fn get(&self, name: &NamespacedName) -> Option<&Arc<ServiceEntry>> {
        let place = self.services.binary_search_by(|entry| entry.service.name.cmp(name)).ok()?;
        self.services.get(place)
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Option<&KnownNode> {
        let place = self.nodes.binary_search_by(|node| (*node.name).cmp(name)).ok()?;
        self.nodes.get(place)
    }
}

/// A node that is known by name.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KnownNode {
    pub name: Arc<str>,
    /// As [`super::Node::addresses`]; empty where its Node object is not known.
    pub addresses: Box<[IpAddr]>,
    /// What stands for it on this node, IPv4 before IPv6; empty without a tunnel.
    pub aliases: SmallVec<[IpAddr; 2]>,
}

/// A Service with its endpoints resolved.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServiceEntry {
    pub service: Arc<Service>,
    /// One for each of `service.ports`, in that order.
    pub ports: Vec<ServedPort>,
    /// Of a headless Service, the endpoints that none of its ports leads to, ordered by address: all of them where it has
    /// no ports. Only DNS knows them.
    pub portless: Vec<PortlessEndpoint>,
    /// What the data plane is to translate; empty for Services that it leaves alone.
    pub frontends: Vec<Frontend>,
    /// The DestinationRule that says how its frontends are balanced; None without one, and without frontends.
    pub rule: Option<Arc<DestinationRule>>,
    /// Why something of this Service is not served, or not as asked, for `status` and `services`.
    pub notes: Vec<Note>,
}

/// A Service port with all of its endpoints.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServedPort {
    pub port: ServicePort,
    /// Ordered by address, each address once; with a tunnel, once for each node, as sites repeat addresses.
    pub endpoints: Vec<PortEndpoint>,
}

/// One endpoint of a port.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PortEndpoint {
    pub addr: SocketAddr,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    /// Whether new connections may go here, and why.
    pub verdicts: Verdicts,
    /// Its zone is that of its Node where the endpoint itself names none.
    pub place: Arc<Place>,
    /// How it is reached from this node; None without a tunnel: then there is one way only.
    pub path: Option<Arc<Path>>,
}

impl PortEndpoint {
    /// Where connections to it are sent: its own address, or its alias with the same port where it is in another site.
    /// None where it cannot be reached.
    pub fn target(&self) -> Option<SocketAddr> {
        match &self.path {
            Some(path) => path.target(self.addr),
            None => Some(self.addr),
        }
    }
}

/// An endpoint of a headless Service without a port.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PortlessEndpoint {
    pub ip: IpAddr,
    pub ready: bool,
    pub terminating: bool,
    pub place: Arc<Place>,
    /// As [`PortEndpoint::path`].
    pub path: Option<Arc<Path>>,
}

impl PortlessEndpoint {
    /// As [`PortEndpoint::target`].
    pub fn target(&self) -> Option<IpAddr> {
        match &self.path {
            Some(path) => path.target(SocketAddr::new(self.ip, 0)).map(|target| target.ip()),
            None => Some(self.ip),
        }
    }
}

/// An address, port and protocol that a Service answers on.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct FrontendAddr {
    pub addr: SocketAddr,
    /// Never [`Protocol::Sctp`].
    pub protocol: Protocol,
}

impl fmt::Display for FrontendAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.protocol)
    }
}

/// What makes an address one that a Service answers on; orders by precedence where two Services want the same.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum FrontendKind {
    ClusterIp,
    /// The addresses of this node, and 127.0.0.1.
    NodePort,
    LoadBalancer,
    /// Last, as anybody who may create Services may claim any address (CVE-2020-8554).
    ExternalIp,
}

impl fmt::Display for FrontendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
            Self::ExternalIp => "ExternalIP",
        })
    }
}

/// A frontend and where its connections go.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Frontend {
    pub at: FrontendAddr,
    pub kind: FrontendKind,
    /// Index into [`ServiceEntry::ports`].
    pub port: usize,
    /// Where sockets on this node are sent, pods' and the host's: the [targets](PortEndpoint::target) of the eligible
    /// endpoints of the frontend's own family, ordered by endpoint; empty means that connections are refused.
    ///
    /// `externalTrafficPolicy` does not matter to them: inside the cluster there is no client address to preserve, so
    /// kube-proxy takes the short way too, with policy Cluster.
    pub backends: Arc<[SocketAddr]>,
    /// Where packets are sent that arrive from outside. Under `externalTrafficPolicy: Local` it may be empty where
    /// `backends` is not: such packets were sent to the wrong node and are dropped, not refused.
    pub external_backends: Arc<[SocketAddr]>,
    /// The seconds for which a client's endpoint is remembered; None without session affinity.
    pub affinity: Option<NonZeroU32>,
    /// How one of them is chosen for a new connection.
    pub balance: Balance,
}

/// How a backend is chosen for a new connection.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Balance {
    /// Each with the same chance.
    #[default]
    Random,
    /// By the client's IP alone, so that all of a client's connections go to one backend; when backends change, only the
    /// clients of those that changed move.
    SourceIp,
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Random => "random",
            Self::SourceIp => "source-ip",
        })
    }
}

impl Frontend {
    /// Whether it is for sockets in the host's network namespace alone: to all others, 127.0.0.1 is their own.
    pub fn host_only(&self) -> bool {
        self.at.addr.ip().is_loopback()
    }
}

/// Why part of a Service is not served, or not as asked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Note {
    /// `serviceFilterMode` and the Service's labels leave it to another proxy.
    Filtered,
    /// The port's protocol has no data plane here.
    Sctp { port: u16 },
    /// Another Service, first by kind of frontend and then by name, already answers on this frontend.
    Taken { at: FrontendAddr, by: NamespacedName },
    /// The Service asks for what only this node's Node object tells: its addresses, zone or labels.
    NodeUnknown,
    /// Its DestinationRule asks for more than is done.
    Unheeded { rule: NamespacedName, fields: Vec<Box<str>> },
    /// Of several DestinationRules that match, one counts; `rule` is the next.
    Overruled { rule: NamespacedName, by: NamespacedName },
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Filtered => f.write_str("left to another proxy by its labels and serviceFilterMode"),
            Self::Sctp { port } => write!(f, "port {port} is not served: SCTP is not supported"),
            Self::NodeUnknown => f.write_str(
                "this node's Node object is not known: node ports are answered on 127.0.0.1 alone, and neither zones, node \
                 groups nor topologyKeys limit the endpoints",
            ),
            Self::Unheeded { rule, fields } => {
                write!(f, "of DestinationRule {rule} these have no effect: {}", fields.join(", "))
            }
            Self::Overruled { rule, by } => {
                write!(f, "DestinationRule {rule} matches too and does not count: {by} comes first")
            }
            Self::Taken { at, by } => write!(f, "{at} is not served: Service {by} has the same address and port"),
        }
    }
}
