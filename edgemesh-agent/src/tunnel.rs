//! The tunnel to other nodes: carries TCP connections and UDP flows to pods that this node has no route to.
//!
//! A mesh of libp2p hosts, one for each node, over QUIC and TCP on one port, directly, through holes punched in NATs, or
//! through relays. Nothing outside this module knows libp2p.
//!
//! - Who is a member: [`identity`](Psks) and the gate every connection has to pass.
//! - Which way: TCP, then QUIC, then circuits through all relays, each a little after the one before; relayed connections are
//!   upgraded (hole punching, or dialling what the peer says of itself), and new streams take the best path there is.
//!   A node's `PeerId` follows from its name, so `relay/p2p-circuit` is an address of every node, and no DHT is needed.
//! - Streams: request and typed answer, then frames; see [`Stream`] and [`DatagramStream`].
//! - What this node dials for others: [`DialPolicy`]; what a stream would come to, without one: [`Tunnel::ask`].
//!
//! The swarm is one task; each connection is one; openers talk to connections directly. [`Tunnel::start`] runs them on the
//! runtime it is called on: give it one with several threads, since connections encrypt on it.

mod admission;
mod ask;
mod book;
mod counters;
mod driver;
mod gate;
mod identity;
mod interfaces;
mod mesh;
mod open;
mod paths;
mod policy;
mod relays;
mod secure;
mod serve;
mod splice;
mod stream;
mod streams;
mod substream;
mod wire;

#[cfg(test)]
mod tests;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    panic::AssertUnwindSafe,
    sync::Arc,
    time::Duration,
};

use futures::FutureExt as _;
use tokio::sync::{mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{error, warn};

pub use self::{
    ask::{Answer, Fate},
    counters::{Counter, Counters, PathCounters},
    identity::{AllowList, NodeName, ParseNodeNameError, PskError, Psks, peer_id},
    mesh::Security,
    open::OpenError,
    paths::{PathKind, PeerView, Peers, Transport},
    policy::{Decision, DialPolicy, Grounds, Target, always_refused},
    relays::{Host, ParseRelayAddressError, RelayAddress, RelayNode},
    splice::{Cut, Passed, UdpIdle, splice, splice_udp},
    stream::{DatagramStream, MAX_DATAGRAM, Stream},
    wire::Protocol,
};
use self::{
    book::Refused,
    driver::{Command, Core, Ended},
};

/// Commands that may wait for the swarm.
const COMMANDS: usize = 1024;

/// When this node relays for others.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum ServeRelay {
    /// When the list of relays names it.
    #[default]
    WhenListed,
    /// Also when others have found that it can be reached from outside.
    WhenPublic,
    /// In any case.
    Always,
}

/// How a tunnel is set up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This node.
    pub node: NodeName,
    /// The mesh's keys.
    pub psks: Psks,
    /// Which members this node talks to; default: all.
    pub allow: AllowList,
    /// Addresses to listen on; default: all, of both families.
    pub listen: Vec<IpAddr>,
    /// Port, TCP and UDP; default 20006. 0 takes any, for tests.
    pub port: u16,
    /// The relays, this node among them if it is one; default: none.
    pub relays: Vec<RelayNode>,
    /// When this node relays for others.
    pub serve_relay: ServeRelay,
    /// Addresses at which this node can be reached besides those of its interfaces, such as a forwarded port; default:
    /// none.
    pub announce: Vec<SocketAddr>,
    /// What connections run on; default: TCP and QUIC.
    pub transports: Vec<Transport>,
    /// Whether to punch holes in NATs; default: yes.
    pub hole_punching: bool,
    /// Whether to find other nodes on the LAN by multicast DNS; default: yes.
    pub mdns: bool,
    /// How TCP connections are encrypted; must be the same on all nodes.
    pub security: Security,
    /// Bound of each handshake, and of each dial for others; default 5 s.
    pub open_timeout: Duration,
    /// When UDP flows that this node dialled end.
    pub udp_idle: UdpIdle,
    /// Streams that this node carries for others at a time; default 16384.
    pub max_served: usize,
}

impl Settings {
    /// The defaults.
    pub fn new(node: NodeName, psks: Psks) -> Self {
        Self {
            node,
            psks,
            allow: AllowList::default(),
            listen: vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
            port: RelayAddress::DEFAULT_PORT,
            relays: Vec::new(),
            serve_relay: ServeRelay::default(),
            announce: Vec::new(),
            transports: vec![Transport::Tcp, Transport::Quic],
            hole_punching: true,
            mdns: true,
            security: Security::default(),
            open_timeout: Duration::from_secs(5),
            udp_idle: UdpIdle::default(),
            max_served: 16_384,
        }
    }
}

/// The tunnel could not be started.
#[derive(Debug, thiserror::Error)]
#[error("the tunnel cannot listen on port {port}: {why}")]
pub struct StartError {
    port: u16,
    why: String,
}

/// A handle to the tunnel; cheap to clone. The tunnel itself ends by [`Tunnel::stop`], or with the last handle.
#[derive(Clone)]
pub struct Tunnel {
    node: NodeName,
    commands: mpsc::Sender<Command>,
    peers: watch::Receiver<Arc<Peers>>,
    addresses: watch::Receiver<Vec<SocketAddr>>,
    counters: Arc<Counters>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Tunnel {
    /// Listens and starts, on the runtime it is called on; does not wait for any relay.
    ///
    /// # Errors
    ///
    /// It can listen nowhere, as when the port is in use.
    pub fn start(settings: Settings, policy: Arc<dyn DialPolicy>) -> Result<Self, StartError> {
        Self::start_refusing(settings, policy, always_refused)
    }

    /// [`Self::start`] with another idea of what is never dialled; tests have their pods on loopback.
    fn start_refusing(settings: Settings, policy: Arc<dyn DialPolicy>, refused: Refused) -> Result<Self, StartError> {
        let (node, port) = (settings.node.clone(), settings.port);
        let counters = Arc::new(Counters::default());
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let server = Arc::new(serve::Server::new(serve::NewServer {
            node: node.clone(),
            policy,
            refused,
            deadline: settings.open_timeout,
            idle: settings.udp_idle,
            most: settings.max_served,
            counters: Arc::clone(&counters),
            tasks: tasks.clone(),
            stop: stop.clone(),
        }));
        let (commands, receiver) = mpsc::channel(COMMANDS);
        let (peers_sender, peers) = watch::channel(Arc::default());
        let (addresses_sender, addresses) = watch::channel(Vec::new());
        let core = Core {
            settings,
            commands: receiver,
            peers: peers_sender,
            addresses: addresses_sender,
            counters: Arc::clone(&counters),
            server,
            refused,
            stop: stop.clone(),
        };
        let first = core.listen().map_err(|why| StartError { port, why })?;
        tasks.spawn(supervise(core, first));
        Ok(Self { node, commands, peers, addresses, counters, stop, tasks })
    }

    /// This node.
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// The members that are connected, and each change of them.
    pub fn peers(&self) -> watch::Receiver<Arc<Peers>> {
        self.peers.clone()
    }

    /// The addresses that this node listens on, and each change of them.
    pub fn addresses(&self) -> watch::Receiver<Vec<SocketAddr>> {
        self.addresses.clone()
    }

    /// What has been done so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Replaces the list of relays. Connections are left alone; reservations at relays that are gone are given up.
    pub async fn set_relays(&self, relays: Vec<RelayNode>) {
        let _ = self.commands.send(Command::SetRelays(relays)).await;
    }

    /// Replaces keys and allow-list; for the steps of a rotation see [`Psks`]. Connections of those who are no longer
    /// members are closed. If this node's own identity changes, all of its connections are made anew.
    pub async fn set_membership(&self, psks: Psks, allow: AllowList) {
        let _ = self.commands.send(Command::SetMembership { psks, allow }).await;
    }

    /// Ends the tunnel with all of its streams and waits for its tasks. libp2p may take a moment longer to close its sockets.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Keeps a swarm running: builds a new one for a new identity, or when there was a fault in it.
async fn supervise(mut core: Core, first: driver::Listening) {
    let mut next = Some(first);
    let mut pause = Duration::from_millis(100);
    let stop = core.stop.clone();
    loop {
        let listening = match next.take() {
            Some(listening) => Ok(listening),
            None => core.listen(),
        };
        match listening {
            Ok(listening) => {
                let begin = tokio::time::Instant::now();
                match AssertUnwindSafe(core.drive(listening)).catch_unwind().await {
                    Ok(Ended::Stopped) => return,
                    Ok(Ended::NewIdentity) => pause = Duration::from_millis(100),
                    Err(_) => {
                        core.counters.restarts.add(1);
                        core.peers.send_replace(Arc::default());
                        error!("a fault in the tunnel's swarm; it is started anew, its connections are lost");
                        if begin.elapsed() > Duration::from_secs(60) {
                            pause = Duration::from_millis(100);
                        }
                    }
                }
            }
            // The old sockets may take a moment to be closed.
            Err(why) if pause > Duration::from_secs(1) => warn!("the tunnel cannot listen: {why}"),
            Err(_) => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_secs(10)),
        }
    }
}
