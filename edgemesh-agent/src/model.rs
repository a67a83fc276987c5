//! Services and endpoints as the agent sees them: pure data and pure functions, no IO and no clock.

mod name;
mod object;

pub use name::{NamespacedName, ParseNameError};
pub use object::{
    Endpoint, EndpointPort, EndpointSet, Event, Kind, Object, Protocol, ProxyLabels, Service, ServiceKind, ServicePort,
    Subset,
};
