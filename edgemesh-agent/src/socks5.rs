//! SOCKS5 (RFC 1928) by name: a client on this node says which node, Service or pod it wants, and gets there by the mesh,
//! wherever that is.
//!
//! - `wire`: what is said; `session`: one client; `associate`: its datagrams;
//! - `resolve`: from a name or an address to the ways there, from the newest table and the names that DNS has;
//! - `auth`: who may log in, where somebody has to.
//!
//! Success is told when the far side has connected, and each failure by the code that is for it. It leads into the mesh and
//! nowhere else.

mod associate;
mod auth;
mod counters;
mod failure;
mod listen;
mod resolve;
mod session;
#[cfg(test)]
mod tests;
mod wire;

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher as _,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::Serialize;
use tokio::sync::{Semaphore, watch};
use tracing::debug;

use self::{
    auth::Credentials,
    counters::Counters,
    failure::Failure,
    listen::{Listening, Room},
    resolve::{Known, Question, Route},
    wire::Destination,
};
pub use self::{
    counters::{Counts, FailureCount},
    listen::Listener,
};
use crate::{
    alias::AliasRanges,
    conditions::Conditions,
    dns::{Zones, zone::ClusterDomain},
    lifecycle::Tasks,
    model::{Protocol, ServiceTable},
    net::guard::{Guard, Guarded},
    proxy::Dial,
};

/// Without a login it would be a door for everybody, so it waits until it is known who is outside.
const GUARDED: Guarded = Guarded { what: "SOCKS5", condition: "Socks5OpenToOutside", while_unknown: false };
const NO_CREDENTIALS: &str = "Socks5CredentialsUnusable";
/// How often the files of the login are looked at, for the condition alone: they are read at each login.
const LOOK: Duration = Duration::from_secs(10);
/// How many clients may have datagrams carried.
const ASSOCIATIONS: usize = 512;
/// How many destinations all of them together may have.
const FLOWS: usize = 4096;

/// What the server is told once, at its start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where clients are served.
    pub listen: Vec<SocketAddr>,
    /// The directory with `username` and `password`; None asks nobody for either.
    pub credentials: Option<PathBuf>,
    /// The patterns of [`crate::net::uplinks::choose`]; clients from the interfaces it chooses are not served.
    pub uplinks: Vec<String>,
    pub domain: ClusterDomain,
    pub ranges: AliasRanges,
    /// This node.
    pub node: String,
}

/// How it is with the server, for `status` and the metrics. Cheap to clone; all clones see the same.
#[derive(Clone, Debug)]
pub struct Sight {
    listening: Listening,
    login: bool,
    counters: Arc<Counters>,
}

/// SOCKS5's part of `status`.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    pub listeners: Vec<Listener>,
    /// Whether clients have to log in.
    pub login: bool,
    pub counts: Counts,
}

impl Sight {
    /// As of now.
    pub fn status(&self) -> Status {
        Status { listeners: self.listening.list(), login: self.login, counts: self.counters.read() }
    }
}

/// Serves clients on the runtime that it is called on, as soon as the addresses are free, until the agent stops.
pub fn start<D: Dial>(
    settings: Settings,
    dial: Arc<D>,
    tables: watch::Receiver<Arc<ServiceTable>>,
    zones: Zones,
    conditions: &Conditions,
    tasks: &Tasks,
) -> Sight {
    start_with(Room::default(), settings, dial, tables, zones, conditions, tasks)
}

/// [`start`] with room for other numbers of clients.
fn start_with<D: Dial>(
    room: Room,
    settings: Settings,
    dial: Arc<D>,
    tables: watch::Receiver<Arc<ServiceTable>>,
    zones: Zones,
    conditions: &Conditions,
    tasks: &Tasks,
) -> Sight {
    let Settings { listen, credentials, uplinks, domain, ranges, node } = settings;
    let guard = Guard::start(GUARDED, Some(uplinks), conditions, tasks);
    let server = Arc::new(Server {
        dial,
        tables,
        zones,
        domain,
        ranges,
        node,
        credentials: credentials.map(Credentials::new),
        counters: Arc::default(),
        guard,
        associations: Arc::new(Semaphore::new(ASSOCIATIONS)),
        flows: Arc::new(Semaphore::new(FLOWS)),
        conditions: conditions.clone(),
        tasks: tasks.clone(),
    });
    let listening = Listening::new(&listen);
    let sight = Sight {
        listening: listening.clone(),
        login: server.credentials.is_some(),
        counters: Arc::clone(&server.counters),
    };
    if let Some(credentials) = server.credentials.clone() {
        tasks.spawn(watch_credentials(credentials, conditions.clone(), tasks.clone()));
    }
    for (index, address) in listen.into_iter().enumerate() {
        tasks.spawn(listen::serve(Arc::clone(&server), address, index, listening.clone(), room.clone()));
    }
    sight
}

/// What all clients share.
struct Server<D> {
    dial: Arc<D>,
    tables: watch::Receiver<Arc<ServiceTable>>,
    zones: Zones,
    domain: ClusterDomain,
    ranges: AliasRanges,
    node: String,
    credentials: Option<Credentials>,
    counters: Arc<Counters>,
    guard: Guard,
    /// Places for clients with datagrams.
    associations: Arc<Semaphore>,
    /// Places for their destinations.
    flows: Arc<Semaphore>,
    conditions: Conditions,
    tasks: Tasks,
}

impl<D> Server<D> {
    /// The ways to a destination, as of now.
    fn routes(&self, destination: &Destination, protocol: Protocol, client: SocketAddr) -> Result<Vec<Route>, Failure> {
        let (table, zone) = (Arc::clone(&self.tables.borrow()), self.zones.newest());
        let known =
            Known { table: &table, zone: zone.as_deref(), domain: &self.domain, ranges: self.ranges, node: &self.node };
        let question = Question { destination, protocol, client: client.ip().to_canonical(), random: random() };
        known.routes(&question)
    }

    /// Counts what came to nothing, and says so to whoever looks closely.
    fn fail(&self, client: SocketAddr, destination: Option<&Destination>, failure: &Failure) {
        self.counters.fail(failure);
        let reason = failure.reason();
        match destination {
            Some(destination) => debug!(%client, %destination, reason, "SOCKS5 refused: {failure}"),
            None => debug!(%client, reason, "SOCKS5 refused: {failure}"),
        }
    }
}

/// Good enough to spread clients over backends.
fn random() -> u32 {
    let bits = RandomState::new().hash_one(0_u8);
    u32::try_from(bits >> 32).unwrap_or_default()
}

/// Says so while nobody could log in.
async fn watch_credentials(credentials: Credentials, conditions: Conditions, tasks: Tasks) {
    let stop = tasks.stopping();
    loop {
        let looked = credentials.clone();
        match tokio::task::spawn_blocking(move || looked.check()).await {
            Ok(Ok(())) => conditions.clear(NO_CREDENTIALS, ""),
            Ok(Err(why)) => {
                let message = format!(
                    "nobody can log in to SOCKS5: {why}; mount a Secret of type kubernetes.io/basic-auth at \
                     modules.edgeProxy.socks5Proxy.credentialsPath, or leave that empty"
                );
                conditions.raise(NO_CREDENTIALS, "", message, SystemTime::now());
            }
            Err(_) => return,
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}
