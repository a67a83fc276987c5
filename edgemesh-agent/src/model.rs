//! Services and endpoints as the agent sees them: pure data and pure functions, no IO and no clock.
//!
//! [`Event`]s go into the [`Builder`]; out come [`ServiceTable`]s, and [`changes`] tells two of them apart.

mod builder;
mod diff;
mod name;
mod object;
mod path;
mod prefix;
mod rule;
mod shared;
mod table;
mod topology;

pub use builder::Builder;
pub use diff::{Change, changes};
pub use name::{NamespacedName, ParseNameError};
pub use object::{
    Endpoint, EndpointPort, EndpointSet, Event, Kind, Node, Object, Place, Protocol, ProxyLabels, Service, ServiceKind,
    ServicePort, SessionAffinity, Subset, TrafficDistribution, TrafficPolicy,
};
pub use path::{Path, Reason, Way};
pub use prefix::{IpPrefix, ParsePrefixError};
pub use rule::{DestinationRule, Ignored};
pub(crate) use shared::Shared;
pub use table::{
    Balance, Frontend, FrontendAddr, FrontendKind, KnownNode, Note, PortEndpoint, PortlessEndpoint, ServedPort,
    ServiceEntry, ServiceTable,
};
pub use topology::{Nodes, Vantage, Verdict, Verdicts, judge};
