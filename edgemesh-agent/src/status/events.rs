//! `edgemesh-agent events`: each line of the stream.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::UNIX_EPOCH,
};

use serde::{Deserialize, Serialize};

use super::trace::{find, owner};
use crate::{
    dataplane::events::Event,
    model::{FrontendAddr, NamespacedName, ServiceTable},
    net::client,
};

/// How many frontends are known by heart; a client that goes through all ports of an address could fill any memory.
const REMEMBERED: usize = 4096;

/// One line of the stream.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(untagged)]
pub enum EventLine {
    Event(EventRow),
    /// So many events had to give way here, as they were not read fast enough.
    Lost {
        lost: u64,
    },
}

/// What became of one call to a Service address.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct EventRow {
    /// Seconds since the Unix epoch.
    pub time: f64,
    /// `connect` or `datagram`.
    pub call: String,
    /// `default/web`; None where it was removed since.
    pub service: Option<String>,
    /// `10.96.0.1:80/TCP`.
    pub frontend: String,
    /// None where the call was refused.
    pub backend: Option<SocketAddr>,
    /// The cookie of the network namespace the call came from.
    pub netns: u64,
    /// The addresses of that one; empty where it is gone since.
    pub from: Vec<IpAddr>,
    /// The cookie of the socket.
    pub socket: u64,
}

impl EventRow {
    /// What is told of an event.
    pub fn new(event: &Event, service: Option<&NamespacedName>, names: &client::Names) -> Self {
        Self {
            time: event.time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64()),
            call: event.call.to_string(),
            service: service.map(ToString::to_string),
            frontend: event.frontend.to_string(),
            backend: event.backend,
            netns: event.netns,
            from: names.get(&event.netns).cloned().unwrap_or_default(),
            socket: event.socket,
        }
    }
}

/// Tells which Service a frontend is of, as of the newest table it was shown.
#[derive(Debug, Default)]
pub struct Services {
    generation: u64,
    known: HashMap<FrontendAddr, Option<NamespacedName>>,
}

impl Services {
    /// The Service that answers at an address, or else the one whose address it is.
    pub fn of(&mut self, table: &ServiceTable, at: FrontendAddr) -> Option<&NamespacedName> {
        if self.generation != table.generation || self.known.len() >= REMEMBERED {
            self.generation = table.generation;
            self.known.clear();
        }
        let look = || find(table, &at).map(|found| found.entry.service.name.clone()).or_else(|| owner(table, &at));
        self.known.entry(at).or_insert_with(look).as_ref()
    }
}
