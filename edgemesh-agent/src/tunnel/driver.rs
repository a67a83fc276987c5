//! The swarm's task: turns its events, commands and the passing of time into dials and paths. It never waits for anything
//! but these.

mod events;
mod relaying;
mod upgrade;
mod wanted;

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    hash::{BuildHasher as _, RandomState},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use libp2p::{
    Multiaddr, PeerId, Swarm,
    core::transport::ListenerId,
    swarm::{
        ConnectionId,
        dial_opts::{DialOpts, PeerCondition},
    },
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use self::wanted::Want;
use super::{
    AllowList, NodeName, Peers, Psks, RelayNode, Settings, Transport,
    admission::Quiet,
    book::{Book, Refused},
    counters::Counters,
    gate::{Gate, ip, is_relayed, socket_address},
    identity::Membership,
    interfaces::{Telling, listening_on},
    mesh::{self, Mesh, Parts},
    relays::{Action, Relays},
    serve::Server,
};

/// Neighbours that are connected without being needed.
const MAX_NEIGHBOURS: usize = 256;

/// How long a peer that was found not to be a member is not dialled again because of mDNS.
const STRANGER: Duration = Duration::from_secs(600);

/// Strangers remembered.
const MAX_STRANGERS: usize = 1024;

/// How long the addresses of interfaces must have stayed the same before others are told.
const SETTLED: Duration = Duration::from_secs(1);

/// Addresses that others have confirmed and that are kept: the newest.
const MAX_CONFIRMED: usize = 4;

/// How long after a connection has ended its memory is given back, with that of others that end meanwhile.
const ENDED: Duration = Duration::from_secs(2);

/// How often at most, as whoever needs memory meanwhile may wait for some milliseconds.
const GIVE_BACK: Duration = Duration::from_secs(10);

/// How long listeners may take to tell their addresses before anything is dialled.
const LISTENING: Duration = Duration::from_secs(1);

/// How long changes of connections are gathered before all is told of them: a relay that has lost its uplink and got it back
/// meets thousands of nodes at once, and each telling copies the list of all.
const GATHER: Duration = Duration::from_millis(20);

/// How long the ends of connections may take when a swarm ends.
const PARTING: Duration = Duration::from_millis(500);

/// What the handle asks of the swarm.
pub(super) enum Command {
    /// Answered when there is a path to the node, or with why there is none.
    Connect {
        node: NodeName,
        reply: oneshot::Sender<Result<(), String>>,
    },
    SetRelays(Vec<RelayNode>),
    SetMembership {
        psks: Psks,
        allow: AllowList,
    },
}

/// Why a swarm came to its end.
#[derive(Debug)]
pub(super) enum Ended {
    Stopped,
    /// This node has another identity now, for which a new swarm is needed.
    NewIdentity,
}

/// What outlives a swarm.
pub(super) struct Core {
    pub(super) settings: Settings,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) peers: watch::Sender<Arc<Peers>>,
    pub(super) addresses: watch::Sender<Vec<SocketAddr>>,
    pub(super) counters: Arc<Counters>,
    pub(super) server: Arc<Server>,
    pub(super) refused: Refused,
    pub(super) stop: CancellationToken,
}

/// A swarm that listens.
pub(super) struct Listening {
    swarm: Swarm<Gate<Mesh>>,
    listeners: HashMap<ListenerId, Multiaddr>,
}

impl Core {
    fn membership(&self) -> Arc<Membership> {
        Arc::new(Membership { psks: self.settings.psks.clone(), allow: self.settings.allow.clone() })
    }

    /// Builds a swarm and listens. IPv6, or QUIC, may be missing on a node; nothing at all is an error, and so is a port
    /// that is in use.
    pub(super) fn listen(&self) -> Result<Listening, String> {
        let Settings { node, psks, security, hole_punching, mdns, open_timeout, port, listen, transports, .. } =
            &self.settings;
        let keypair = psks.keypair(node).ok_or_else(|| format!("cannot derive the identity of node {node}"))?;
        for ip in listen {
            for transport in transports {
                in_use(SocketAddr::new(*ip, *port), *transport)?;
            }
        }
        let mut swarm = mesh::build(Parts {
            node: node.clone(),
            keypair,
            membership: self.membership(),
            server: Arc::clone(&self.server),
            counters: Arc::clone(&self.counters),
            security: *security,
            hole_punching: *hole_punching,
            mdns: *mdns,
            deadline: *open_timeout,
        })?;
        let mut listeners = HashMap::new();
        let mut errors = Vec::new();
        for address in mesh::listen_addresses(*port, listen, transports) {
            match swarm.listen_on(address.clone()) {
                Ok(id) => {
                    listeners.insert(id, address);
                }
                Err(error) => errors.push((address, super::gate::with_sources(&error))),
            }
        }
        for (address, error) in &errors {
            debug!(%address, "the tunnel does not listen: {error}");
        }
        if listeners.is_empty() {
            let errors: Vec<String> = errors.iter().map(|(address, error)| format!("{address}: {error}")).collect();
            return Err(errors.join("; "));
        }
        Ok(Listening { swarm, listeners })
    }

    /// Drives a swarm to its end.
    pub(super) async fn drive(&mut self, listening: Listening) -> Ended {
        let mut driver = Driver::new(self, listening);
        let ended = driver.run().await;
        driver.part().await;
        let _ = self.peers.send_replace(Arc::default());
        ended
    }
}

/// What is to be done at a time.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Task {
    /// Try the next way to a wanted node.
    Stage(NodeName),
    /// Try for a direct path to a node that is reached through a relay; the number of attempts so far.
    Upgrade(NodeName, u32),
    /// Try for QUIC to a relay.
    RelayByQuic(NodeName),
    /// Have both TCP and QUIC to a relay.
    Transports(NodeName),
    /// Close relayed paths that a direct one, or another relayed one, has made needless.
    Retire(NodeName),
    /// Close direct connections that a better one has made needless.
    Shed(NodeName),
    /// Try for TCP to a node that is reached over QUIC.
    TryTcp(NodeName),
    /// Try for QUIC to a node that is reached through a relay.
    TryQuic(NodeName),
    /// Give the memory of connections that have ended back to the system.
    GiveBack,
    /// Tell of changed addresses of this node, and try again for direct paths.
    Moved,
    /// Connect to a neighbour; the number of attempts so far.
    Neighbour(PeerId, u32),
    /// Listen again where a listener has failed.
    Listen(Multiaddr),
    /// Give up the circuit through a relay that is no longer one.
    Unlisten(u64),
}

/// What a dial is for.
#[derive(Clone, Debug)]
enum Purpose {
    Wanted {
        node: NodeName,
        direct: bool,
    },
    Relay(NodeName),
    /// To learn whether anybody still listens where these connections lead.
    Verify(Vec<ConnectionId>),
    Other,
}

impl Purpose {
    /// Whether it is for those who want a stream to that node.
    fn is_for(&self, node: &NodeName) -> bool {
        matches!(self, Self::Wanted { node: wanted, .. } if wanted == node)
    }
}

struct Driver<'a> {
    core: &'a mut Core,
    swarm: Swarm<Gate<Mesh>>,
    peers: Peers,
    book: Book,
    relays: Relays,
    /// Listeners on sockets of this node.
    listeners: HashMap<ListenerId, Multiaddr>,
    /// Listeners at relays, and whether the reservation is made.
    circuits: HashMap<ListenerId, (NodeName, bool)>,
    unlisten: HashMap<u64, ListenerId>,
    wanted: HashMap<NodeName, Want>,
    dials: HashMap<ConnectionId, Purpose>,
    /// Connections that this node has made, by the address dialled, until their peer has passed the gate.
    outbound: HashMap<ConnectionId, Multiaddr>,
    schedule: BTreeMap<(Instant, u64), Task>,
    scheduled: u64,
    resolving: JoinSet<(RelayNode, Vec<SocketAddr>)>,
    ping_failures: HashMap<ConnectionId, u32>,
    /// The payload that each connection had moved when a round trip was last tried on it.
    payload: HashMap<ConnectionId, (u64, u64)>,
    strangers: HashMap<PeerId, Instant>,
    quiet: Quiet,
    /// What this node says on its own authority that it is reached at.
    external: Vec<Multiaddr>,
    /// Whether this node relays for others.
    serves: bool,
    /// Whether others have confirmed that this node can be reached from outside.
    public: bool,
    /// Where, the newest last.
    confirmed: VecDeque<Multiaddr>,
    /// Whether memory is about to be given back, and when it last was.
    giving_back: bool,
    gave_back: Option<Instant>,
    /// When what has changed in `peers` is to be told.
    telling: Option<Instant>,
}

impl<'a> Driver<'a> {
    fn new(core: &'a mut Core, listening: Listening) -> Self {
        let mut relays = Relays::new(core.settings.node.clone());
        relays.set(&core.settings.relays, Instant::now());
        let book = Book::new(core.refused);
        let mut driver = Self {
            core,
            swarm: listening.swarm,
            peers: Peers::default(),
            book,
            relays,
            listeners: listening.listeners,
            circuits: HashMap::new(),
            unlisten: HashMap::new(),
            wanted: HashMap::new(),
            dials: HashMap::new(),
            outbound: HashMap::new(),
            schedule: BTreeMap::new(),
            scheduled: 0,
            resolving: JoinSet::new(),
            ping_failures: HashMap::new(),
            payload: HashMap::new(),
            strangers: HashMap::new(),
            quiet: Quiet::default(),
            external: Vec::new(),
            serves: false,
            public: false,
            confirmed: VecDeque::new(),
            giving_back: false,
            gave_back: None,
            telling: None,
        };
        driver.update_relay_role();
        driver
    }

    async fn run(&mut self) -> Ended {
        let stop = self.core.stop.clone();
        tokio::select! {
            () = stop.cancelled() => return Ended::Stopped,
            () = self.await_listeners() => self.update_relay_role(),
        }
        loop {
            self.run_due(Instant::now());
            let next = [self.schedule.keys().next().map(|(at, _)| *at), self.relays.next(), self.telling];
            let next = next.into_iter().flatten().min().unwrap_or_else(|| Instant::now() + Duration::from_secs(60));
            tokio::select! {
                () = stop.cancelled() => return Ended::Stopped,
                event = self.swarm.select_next_some() => self.on_swarm_event(event),
                command = self.core.commands.recv() => match command {
                    None => return Ended::Stopped,
                    Some(command) => if let Some(ended) = self.on_command(command) {
                        return ended;
                    },
                },
                Some(resolved) = self.resolving.join_next(), if !self.resolving.is_empty() => {
                    if let Ok((relay, addresses)) = resolved {
                        self.on_resolved(&relay, &addresses);
                    }
                }
                () = tokio::time::sleep_until(next.into()) => {}
            }
        }
    }

    /// Waits until the listeners have told their addresses, [`LISTENING`] at most.
    ///
    /// What is dialled before that leaves from any port, and the hole that a NAT makes for that port leads nobody in.
    async fn await_listeners(&mut self) {
        let expected = listening_on(&self.core.settings.listen);
        let told = async {
            loop {
                let own = self.own_addresses();
                let told = |expected: &IpAddr, transport: &Transport| {
                    own.iter().any(|own| ip(own) == Some(*expected) && mesh::transport(own) == *transport)
                };
                let transports = &self.core.settings.transports;
                if expected.iter().all(|ip| transports.iter().all(|transport| told(ip, transport))) {
                    return;
                }
                let event = self.swarm.select_next_some().await;
                self.on_swarm_event(event);
            }
        };
        if tokio::time::timeout(LISTENING, told).await.is_err() {
            debug!(?expected, "the tunnel does not listen everywhere yet");
        }
    }

    /// Closes all connections, so that peers learn of it at once rather than by silence.
    async fn part(&mut self) {
        let peers: Vec<PeerId> = self.swarm.connected_peers().copied().collect();
        for peer in peers {
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let parted = async {
            while self.swarm.network_info().num_peers() > 0 {
                self.swarm.select_next_some().await;
            }
        };
        let _ = tokio::time::timeout(PARTING, parted).await;
    }

    fn after(&mut self, pause: Duration, task: Task) {
        self.scheduled += 1;
        self.schedule.insert((Instant::now() + pause, self.scheduled), task);
    }

    fn run_due(&mut self, now: Instant) {
        while let Some(entry) = self.schedule.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let task = entry.remove();
            self.run_task(task);
        }
        if self.telling.is_some_and(|at| at <= now) {
            self.publish_now();
        }
        for action in self.relays.due(now, random) {
            match action {
                Action::Dial(relay) => {
                    self.resolving.spawn(relaying::resolve(relay));
                }
                Action::Reserve(node) => self.reserve(&node),
            }
        }
    }

    fn run_task(&mut self, task: Task) {
        match task {
            Task::Stage(node) => self.next_stage(&node),
            Task::Upgrade(node, attempt) => self.upgrade(&node, attempt),
            Task::RelayByQuic(node) => self.relay_by_quic(&node),
            Task::Transports(node) => self.complete_transports(&node),
            Task::Retire(node) => self.retire(&node),
            Task::Shed(node) => self.shed(&node),
            Task::TryTcp(node) => self.try_tcp(&node),
            Task::TryQuic(node) => self.try_quic(&node),
            Task::GiveBack => {
                self.giving_back = false;
                self.gave_back = Some(Instant::now());
                drop(tokio::task::spawn_blocking(crate::allocator::give_back));
            }
            Task::Moved => self.on_moved(),
            Task::Neighbour(peer, attempt) => self.dial_neighbour(peer, attempt),
            Task::Listen(address) => match self.swarm.listen_on(address.clone()) {
                Ok(id) => {
                    self.listeners.insert(id, address);
                }
                Err(error) => {
                    debug!(%address, "cannot listen again: {error}");
                    self.after(Duration::from_secs(5), Task::Listen(address));
                }
            },
            Task::Unlisten(key) => {
                if let Some(id) = self.unlisten.remove(&key) {
                    self.circuits.remove(&id);
                    self.swarm.remove_listener(id);
                }
            }
        }
    }

    fn on_command(&mut self, command: Command) -> Option<Ended> {
        match command {
            Command::Connect { node, reply } => self.connect(node, reply),
            Command::SetRelays(list) => {
                self.core.settings.relays = list;
                self.set_relays();
            }
            Command::SetMembership { psks, allow } => {
                let same = self.core.settings.psks.same_identity(&psks);
                self.core.settings.psks = psks;
                self.core.settings.allow = allow;
                if !same {
                    info!("the tunnel takes on the identity of the new PSK; connections are made anew");
                    return Some(Ended::NewIdentity);
                }
                self.set_membership();
            }
        }
        None
    }

    fn set_membership(&mut self) {
        let membership = self.core.membership();
        self.strangers.clear();
        self.swarm.behaviour_mut().set_membership(Arc::clone(&membership));
        let gone = self.peers.all().filter(|(node, path)| membership.check(node, &path.peer).is_err());
        let gone: Vec<ConnectionId> = gone.map(|(_, path)| path.connection).collect();
        for connection in gone {
            self.swarm.close_connection(connection);
        }
    }

    fn own_addresses(&self) -> Vec<Multiaddr> {
        let (direct, telling) = (self.swarm.listeners().filter(|address| !is_relayed(address)), Telling::read());
        direct.filter(|address| ip(address).is_some_and(|ip| telling.is_worth(ip))).cloned().collect()
    }

    fn tell_addresses(&mut self) {
        // Those that lead in from outside come first, for there is room for some only.
        let external = self.swarm.external_addresses().filter(|address| !is_relayed(address));
        let mut told: Vec<Multiaddr> = external.cloned().collect();
        told.extend(self.own_addresses());
        let mut seen = HashSet::new();
        told.retain(|address| seen.insert(address.clone()));
        self.swarm.behaviour_mut().set_addresses(told.iter());
        self.tell_sockets();
    }

    /// Tells this node where it listens.
    fn tell_sockets(&mut self) {
        let mut sockets: Vec<SocketAddr> = self.swarm.listeners().filter_map(socket_address).collect();
        sockets.sort_unstable();
        sockets.dedup();
        self.core.addresses.send_if_modified(|old| {
            let changed = *old != sockets;
            *old = sockets;
            changed
        });
    }

    /// Has the others told of changed peers in a moment.
    fn publish(&mut self) {
        self.telling.get_or_insert_with(|| Instant::now() + GATHER);
    }

    /// Tells of changed peers, if there is anything that has not been told.
    fn publish_now(&mut self) {
        if self.telling.take().is_some() {
            self.core.peers.send_replace(Arc::new(self.peers.clone()));
        }
    }

    /// A socket address with each transport that is in use.
    fn multiaddrs(&self, address: SocketAddr) -> impl Iterator<Item = Multiaddr> + use<> {
        let transports = self.core.settings.transports.clone();
        transports.into_iter().map(move |transport| mesh::multiaddr(address, transport))
    }

    /// The known direct addresses of a peer for a transport; none if it is not in use.
    fn addresses(&self, peer: &PeerId, transport: Transport) -> Vec<Multiaddr> {
        if !self.core.settings.transports.contains(&transport) {
            return Vec::new();
        }
        let addresses = self.book.addresses(peer).into_iter();
        addresses.filter(|address| mesh::transport(address) == transport).collect()
    }

    /// Dials, unless there is nowhere to; says whether.
    fn dial(&mut self, peer: PeerId, addresses: Vec<Multiaddr>, purpose: Purpose) -> bool {
        if addresses.is_empty() {
            return false;
        }
        let options = DialOpts::peer_id(peer).addresses(addresses).condition(PeerCondition::Always).build();
        let connection = options.connection_id();
        match self.swarm.dial(options) {
            Ok(()) => {
                self.dials.insert(connection, purpose);
                true
            }
            Err(error) => {
                debug!(%peer, "cannot dial: {error}");
                false
            }
        }
    }

    fn dial_neighbour(&mut self, peer: PeerId, attempt: u32) {
        let connected = self.peers.all().any(|(_, path)| path.peer == peer && path.is_direct());
        let stranger = self.strangers.get(&peer).is_some_and(|since| since.elapsed() < STRANGER);
        let neighbours = self.peers.all().filter(|(_, path)| path.on_link && path.is_direct()).count();
        if connected || stranger || neighbours >= MAX_NEIGHBOURS || peer == *self.swarm.local_peer_id() {
            return;
        }
        // One transport will do; which it is no longer matters when there is a connection.
        let transport = self.core.settings.transports.first().copied().unwrap_or(Transport::Tcp);
        self.dial(peer, self.addresses(&peer, transport), Purpose::Other);
        if attempt < 5 {
            let pause = Duration::from_secs(2 << attempt).mul_f64(1.0 + random());
            self.after(pause, Task::Neighbour(peer, attempt + 1));
        }
    }
}

/// Fails if somebody else has the address.
///
/// libp2p listens for TCP with SO_REUSEPORT, for the sake of hole punching: two agents would share the port without a word,
/// and each would get half of the connections.
fn in_use(address: SocketAddr, transport: Transport) -> Result<(), String> {
    let probe = match transport {
        Transport::Tcp => std::net::TcpListener::bind(address).map(drop),
        Transport::Quic => std::net::UdpSocket::bind(address).map(drop),
    };
    match probe {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            Err(format!("{address} is in use; does another agent run on this node?"))
        }
        // Whatever else is wrong shows when it is done in earnest.
        Ok(()) | Err(_) => Ok(()),
    }
}

/// A number in 0..1 for pauses.
fn random() -> f64 {
    // Each state is keyed anew; nobody needs to be kept from guessing these.
    RandomState::new().hash_one(0u8) as f64 / u64::MAX as f64
}
