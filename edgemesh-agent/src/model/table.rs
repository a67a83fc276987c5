//! The immutable tables that everything downstream of the builder reads.

use std::{fmt, net::SocketAddr, sync::Arc};

use super::{NamespacedName, Protocol, Service, ServicePort};

/// Everything the agent knows of Services at one moment. Immutable; a change makes a new table that shares what did not
/// change.
#[derive(Clone, Debug, Default)]
pub struct ServiceTable {
    /// Counts up with each table.
    pub generation: u64,
    /// Whether the source has delivered everything that exists. While false, nothing may be taken away from what an
    /// earlier agent left in the kernel.
    pub complete: bool,
    /// Ordered by name.
    pub services: Vec<Arc<ServiceEntry>>,
}

impl ServiceTable {
    /// The Service of that name.
    pub fn get(&self, name: &NamespacedName) -> Option<&Arc<ServiceEntry>> {
        let place = self.services.binary_search_by(|entry| entry.service.name.cmp(name)).ok()?;
        self.services.get(place)
    }
}

/// A Service with its endpoints resolved.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServiceEntry {
    pub service: Service,
    /// One for each of `service.ports`, in that order.
    pub ports: Vec<ServedPort>,
    /// What the data plane is to translate; empty for Services that it leaves alone.
    pub frontends: Vec<Frontend>,
    /// Why something of this Service is not served, for `status` and `services`.
    pub notes: Vec<Note>,
}

/// A Service port with all of its endpoints.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServedPort {
    pub port: ServicePort,
    /// Ordered by address, each address once.
    pub endpoints: Vec<PortEndpoint>,
}

/// One endpoint of a port.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PortEndpoint {
    pub addr: SocketAddr,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    pub node: Option<Box<str>>,
    pub zone: Option<Box<str>>,
    /// Whether new connections may go here.
    pub eligible: bool,
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

/// A frontend and where its connections go.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Frontend {
    pub at: FrontendAddr,
    /// Index into [`ServiceEntry::ports`].
    pub port: usize,
    /// The eligible endpoints of the frontend's own family, ordered; empty means that connections are refused.
    pub backends: Vec<SocketAddr>,
}

/// Why part of a Service is not served.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Note {
    /// `serviceFilterMode` and the Service's labels leave it to another proxy.
    Filtered,
    /// The port's protocol has no data plane here.
    Sctp { port: u16 },
    /// Another Service, first by name, already answers on this frontend.
    Taken { at: FrontendAddr, by: NamespacedName },
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Filtered => f.write_str("left to another proxy by its labels and serviceFilterMode"),
            Self::Sctp { port } => write!(f, "port {port} is not served: SCTP is not supported"),
            Self::Taken { at, by } => write!(f, "{at} is not served: Service {by} has the same address and port"),
        }
    }
}
