//! The agent's side of the tunnel: starts it, tells it whom to trust and what to dial, and tells others whom it has met.
//!
//! [`crate::tunnel`] knows nothing of Services, files and conditions; this module does. The tunnel and what it carries run
//! on [`Threads`] of their own, so that a bulk transfer keeps neither the builder nor the admin doors waiting.

mod ask;
mod follow;
mod meetings;
mod policy;

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use tokio::{
    runtime::{self, Handle, Runtime},
    sync::watch,
};

use crate::{
    alias::Meetings,
    conditions::Conditions,
    config::AgentConfig,
    lifecycle::Tasks,
    model::ServiceTable,
    proxy::Through,
    status::{PeerRow, RelayRow, TunnelCounts, TunnelStatus},
    tunnel::{Counters, DialPolicy, NodeName, PathKind, PeerView, Peers, Transport},
};

pub use meetings::MeetingsFile;

use policy::Policy;

/// More would only cost memory: a node of this size has other work for its cores.
const MOST_THREADS: usize = 4;

/// The threads that encrypt and carry; they end when this is dropped, without being waited for.
#[derive(Debug)]
pub struct Threads {
    handle: Handle,
    runtime: Option<Runtime>,
}

impl Threads {
    /// Starts them: as many as there are cores, two to four.
    ///
    /// # Errors
    ///
    /// The system has no threads left.
    pub fn start() -> io::Result<Self> {
        let cores = thread::available_parallelism().map_or(2, usize::from);
        let mut builder = runtime::Builder::new_multi_thread();
        builder.worker_threads(cores.clamp(2, MOST_THREADS)).thread_name("tunnel").enable_all();
        let runtime = builder.build()?;
        Ok(Self { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }

    /// Where to spawn.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Tasks have been told to stop and waited for; what blocks still must not keep the process.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// How it is with the tunnel, for `status`, `peers` and the metrics. Cheap to clone; all clones see the same.
#[derive(Clone, Debug)]
pub struct Sight {
    through: Through,
    /// As the configuration names them now.
    relays: Arc<Mutex<Vec<NodeName>>>,
}

/// Starts the tunnel on its threads as soon as it can be, and follows what it depends on until the agent stops. Returns
/// at once: without a PSK, a port or a relay the agent works as if nodes of other sites were silent, and conditions say so.
pub fn start(
    config: &AgentConfig,
    node: &str,
    tables: watch::Receiver<Arc<ServiceTable>>,
    meet: watch::Sender<Arc<Meetings>>,
    conditions: &Conditions,
    tasks: &Tasks,
    threads: &Threads,
) -> (Through, Sight) {
    let (through, policy) = own(config, node, tables, tasks, threads);
    let sight = Sight { through: through.clone(), relays: Arc::default() };
    let follower =
        follow::Follower::new(config, node, policy, meet, through.clone(), sight.clone(), conditions.clone());
    tasks.spawn_on(threads.handle(), follower.run(tasks.stopping()));
    (through, sight)
}

/// The way to this node alone, without a tunnel.
pub fn without_tunnel(
    config: &AgentConfig,
    node: &str,
    tables: watch::Receiver<Arc<ServiceTable>>,
    tasks: &Tasks,
    threads: &Threads,
) -> Through {
    own(config, node, tables, tasks, threads).0
}

/// What dials this node itself, and the rules for it, which others are held to as well.
fn own(
    config: &AgentConfig,
    node: &str,
    tables: watch::Receiver<Arc<ServiceTable>>,
    tasks: &Tasks,
    threads: &Threads,
) -> (Through, Arc<Policy>) {
    let policy = Arc::new(Policy::new(node, config.common.aliases, config.tunnel.allowed_targets.clone()));
    tasks.spawn_on(threads.handle(), follow::tables(Arc::clone(&policy), tables, tasks.stopping()));
    let shared: Arc<dyn DialPolicy> = Arc::<Policy>::clone(&policy);
    // A name that is none is said to be so where the tunnel would be started.
    let through = node.parse().map_or_else(|_| Through::default(), |node| Through::new(node, shared));
    (through, policy)
}

impl Sight {
    /// For `status` and the metrics.
    pub fn status(&self) -> TunnelStatus {
        let Some(tunnel) = self.through.tunnel() else {
            return TunnelStatus { relays: self.relay_rows(&Peers::default()), ..TunnelStatus::default() };
        };
        let peers = Arc::clone(&tunnel.peers().borrow());
        let mut status = TunnelStatus {
            running: true,
            addresses: tunnel.addresses().borrow().iter().map(SocketAddr::to_string).collect(),
            relays: self.relay_rows(&peers),
            counts: counts(tunnel.counters()),
            ..TunnelStatus::default()
        };
        for path in peers.nodes().filter_map(|node| peers.path(node)) {
            *status.nodes.entry(path.as_str().to_owned()).or_insert(0) += 1;
        }
        status.streams = peers.views().iter().map(|view| u64::from(view.streams)).sum();
        status
    }

    /// For `peers`: all connections, the best of each node first.
    pub fn peers(&self) -> Vec<PeerRow> {
        let Some(tunnel) = self.through.tunnel() else { return Vec::new() };
        tunnel.peers().borrow().views().into_iter().map(peer_row).collect()
    }

    fn set_relays(&self, relays: Vec<NodeName>) {
        *self.relays.lock().unwrap_or_else(PoisonError::into_inner) = relays;
    }

    fn relay_rows(&self, peers: &Peers) -> Vec<RelayRow> {
        let relays = self.relays.lock().unwrap_or_else(PoisonError::into_inner);
        relays.iter().map(|node| RelayRow { node: node.to_string(), connected: peers.path(node).is_some() }).collect()
    }
}

fn peer_row(view: PeerView) -> PeerRow {
    PeerRow {
        node: view.node.to_string(),
        peer_id: view.peer_id,
        path: view.path.as_str().to_owned(),
        via: match view.path {
            PathKind::Relayed { via } => via.map(|via| via.to_string()),
            PathKind::Lan | PathKind::Direct | PathKind::HolePunched => None,
        },
        transport: match view.transport {
            Transport::Tcp => "tcp",
            Transport::Quic => "quic",
        }
        .to_owned(),
        address: view.remote,
        rtt_micros: view.rtt.map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
        streams: view.streams,
        sent_bytes: view.sent_bytes,
        received_bytes: view.received_bytes,
        up_seconds: view.up.as_secs(),
    }
}

fn counts(counters: &Counters) -> TunnelCounts {
    TunnelCounts {
        opened: counters.opened.get(),
        open_failures: counters.open_failures.get(),
        served: counters.served.get(),
        serve_failures: counters.serve_failures.get(),
        not_allowed: counters.not_allowed.get(),
        questions: counters.questions.get(),
        sent_bytes: counters.sent_bytes.get(),
        received_bytes: counters.received_bytes.get(),
        connected: [
            ("lan", counters.connected.lan.get()),
            ("direct", counters.connected.direct.get()),
            ("hole-punched", counters.connected.hole_punched.get()),
            ("relayed", counters.connected.relayed.get()),
        ]
        .into(),
        refused_peers: counters.refused_peers.get(),
        wrong_identities: counters.wrong_identities.get(),
        denied_connections: counters.denied_connections.get(),
        holes_punched: counters.holes_punched.get(),
        hole_failures: counters.hole_failures.get(),
        relayed_circuits: counters.relayed_circuits.get(),
        restarts: counters.restarts.get(),
    }
}
