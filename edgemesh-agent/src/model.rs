//! Services and endpoints as the agent sees them: pure data and pure functions, no IO and no clock.
//!
//! [`Event`]s go into the [`Builder`]; out come [`ServiceTable`]s, and [`changes`] tells two of them apart.

mod builder;
mod diff;
mod name;
mod object;
mod table;

pub use builder::Builder;
pub use diff::{Change, changes};
pub use name::{NamespacedName, ParseNameError};
pub use object::{
    Endpoint, EndpointPort, EndpointSet, Event, Kind, Object, Protocol, ProxyLabels, Service, ServiceKind, ServicePort,
    Subset,
};
pub use table::{Frontend, FrontendAddr, Note, PortEndpoint, ServedPort, ServiceEntry, ServiceTable};
