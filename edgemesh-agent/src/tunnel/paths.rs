//! The ways to other nodes: one [`Path`] for each connection, and [`Peers`], an immutable snapshot of all of them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use libp2p::{PeerId, swarm::ConnectionId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SetOnce, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{NodeName, Protocol, counters::Counters};

/// Streams that this node opens on one connection at most.
///
/// yamux ends the whole connection when it has more than its limit (`mesh::MAX_STREAMS`), so both sides together
/// must stay well below it, those included that one side has closed and the other has not noticed.
const STREAMS_PER_PATH: usize = 1536;

/// Those of them that may carry UDP: its clients come from ever new ports and are remembered for a while, and must leave
/// room for TCP.
const FLOWS_PER_PATH: usize = STREAMS_PER_PATH / 2;

/// A place among the streams of a connection.
#[derive(Debug)]
pub(super) struct Permit {
    _stream: OwnedSemaphorePermit,
    _flow: Option<OwnedSemaphorePermit>,
}

/// How a connection reaches its node; in order of preference.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum PathKind {
    /// Both nodes are on the same link.
    Lan,
    /// Without a relay.
    Direct,
    /// Without a relay, through a hole punched in a NAT.
    HolePunched,
    /// Through a relay.
    Relayed {
        /// The relay's node, where it is known by name.
        via: Option<NodeName>,
    },
}

impl PathKind {
    /// One word for metrics and tables: `lan`, `direct`, `hole-punched` or `relayed`.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Lan => "lan",
            Self::Direct => "direct",
            Self::HolePunched => "hole-punched",
            Self::Relayed { .. } => "relayed",
        }
    }
}

/// What a connection runs on, in order of preference between equal paths: TCP moves more bytes for the same work.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Transport {
    /// TLS and yamux over TCP.
    Tcp,
    /// QUIC.
    Quic,
}

/// How a stream that was asked for on a path is handed over.
pub(super) type OpenRequest = oneshot::Sender<Result<libp2p::Stream, String>>;

/// One connection to a member.
#[derive(Debug)]
pub(super) struct Path {
    pub(super) connection: ConnectionId,
    pub(super) peer: PeerId,
    pub(super) transport: Transport,
    pub(super) remote: Option<SocketAddr>,
    pub(super) relay: Option<PeerId>,
    /// Whether this node has dialled.
    pub(super) ours: bool,
    /// Whether the node with the smaller `PeerId` has dialled. Of two that are equal otherwise both ends prefer that one.
    leading: bool,
    pub(super) on_link: bool,
    pub(super) open: mpsc::Sender<OpenRequest>,
    permits: Arc<Semaphore>,
    flow_permits: Arc<Semaphore>,
    /// Whether the connection is kept though nothing runs on it.
    pub(super) pinned: AtomicBool,
    /// Known once the peer has passed the gate.
    pub(super) node: SetOnce<NodeName>,
    pub(super) via: OnceLock<NodeName>,
    /// Which run of its node it leads to.
    pub(super) run: OnceLock<u64>,
    pub(super) punched: AtomicBool,
    /// Whether a round trip has failed and none has succeeded since.
    doubtful: AtomicBool,
    /// Cancelled when the connection ends.
    pub(super) ended: CancellationToken,
    pub(super) since: Instant,
    rtt_nanos: AtomicU64,
    /// When the peer last answered, in nanoseconds after `since`.
    answered: AtomicU64,
    streams: AtomicU32,
    /// Requests of the peer that are not streams yet.
    serving: AtomicU32,
    sent: AtomicU64,
    received: AtomicU64,
    counters: Arc<Counters>,
}

/// A request that is being served on a path, until it is dropped.
pub(super) struct Serving(Arc<Path>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.serving.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a path is made from.
pub(super) struct NewPath {
    pub(super) connection: ConnectionId,
    pub(super) peer: PeerId,
    pub(super) transport: Transport,
    pub(super) remote: Option<SocketAddr>,
    pub(super) relay: Option<PeerId>,
    pub(super) ours: bool,
    pub(super) leading: bool,
    pub(super) on_link: bool,
    pub(super) open: mpsc::Sender<OpenRequest>,
    pub(super) counters: Arc<Counters>,
}

impl Path {
    pub(super) fn new(new: NewPath) -> Self {
        let NewPath { connection, peer, transport, remote, relay, ours, leading, on_link, open, counters } = new;
        Self {
            connection,
            peer,
            transport,
            remote,
            relay,
            ours,
            leading,
            on_link,
            open,
            permits: Arc::new(Semaphore::new(STREAMS_PER_PATH)),
            flow_permits: Arc::new(Semaphore::new(FLOWS_PER_PATH)),
            pinned: AtomicBool::new(false),
            node: SetOnce::new(),
            via: OnceLock::new(),
            run: OnceLock::new(),
            punched: AtomicBool::new(false),
            doubtful: AtomicBool::new(false),
            ended: CancellationToken::new(),
            since: Instant::now(),
            rtt_nanos: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            streams: AtomicU32::new(0),
            serving: AtomicU32::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            counters,
        }
    }

    pub(super) fn kind(&self) -> PathKind {
        if self.relay.is_some() {
            PathKind::Relayed { via: self.via.get().cloned() }
        } else if self.on_link {
            PathKind::Lan
        } else if self.punched.load(Ordering::Relaxed) {
            PathKind::HolePunched
        } else {
            PathKind::Direct
        }
    }

    /// A place for one more stream, if there is room.
    pub(super) fn permit(&self, protocol: Protocol) -> Option<Permit> {
        let one = |permits: &Arc<Semaphore>| Arc::clone(permits).try_acquire_owned().ok();
        let flow = match protocol {
            Protocol::Tcp => None,
            Protocol::Udp => Some(one(&self.flow_permits)?),
        };
        Some(Permit { _stream: one(&self.permits)?, _flow: flow })
    }

    pub(super) fn is_direct(&self) -> bool {
        self.relay.is_none()
    }

    /// Whether it may be dead: other paths are better, and where there is none, a new one is looked for.
    pub(super) fn is_doubtful(&self) -> bool {
        self.doubtful.load(Ordering::Relaxed)
    }

    /// Says whether that is news.
    pub(super) fn set_doubtful(&self, doubtful: bool) -> bool {
        self.doubtful.swap(doubtful, Ordering::Relaxed) != doubtful
    }

    pub(super) fn streams(&self) -> u32 {
        self.streams.load(Ordering::Relaxed)
    }

    pub(super) fn rtt(&self) -> Option<Duration> {
        match self.rtt_nanos.load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }

    pub(super) fn set_rtt(&self, rtt: Duration) {
        self.rtt_nanos.store(u64::try_from(rtt.as_nanos()).unwrap_or(u64::MAX).max(1), Ordering::Relaxed);
        let after = u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.answered.store(after, Ordering::Relaxed);
    }

    /// How long the peer has not answered on this connection.
    pub(super) fn silent(&self) -> Duration {
        self.since.elapsed().saturating_sub(Duration::from_nanos(self.answered.load(Ordering::Relaxed)))
    }

    /// Payload so far: sent, received.
    pub(super) fn moved(&self) -> (u64, u64) {
        (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed))
    }

    /// Counts a request of the peer until it is a stream or came to nothing.
    pub(super) fn serving(self: &Arc<Self>) -> Serving {
        self.serving.fetch_add(1, Ordering::Relaxed);
        Serving(Arc::clone(self))
    }

    /// Whether nothing runs on it, and nothing is being opened.
    pub(super) fn is_idle(&self) -> bool {
        self.streams() == 0
            && self.serving.load(Ordering::Relaxed) == 0
            && self.permits.available_permits() == STREAMS_PER_PATH
    }

    pub(super) fn stream_began(&self) {
        self.streams.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn stream_ended(&self) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
        self.counters.sent_bytes.add(bytes as u64);
    }

    pub(super) fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
        self.counters.received_bytes.add(bytes as u64);
    }

    /// As `peers` shows it.
    pub(super) fn view(&self, node: &NodeName) -> PeerView {
        PeerView {
            node: node.clone(),
            peer_id: self.peer.to_string(),
            path: self.kind(),
            transport: self.transport,
            remote: self.remote,
            rtt: self.rtt(),
            streams: self.streams(),
            sent_bytes: self.sent.load(Ordering::Relaxed),
            received_bytes: self.received.load(Ordering::Relaxed),
            up: self.since.elapsed(),
        }
    }

    fn rank(&self) -> (bool, PathKind, Transport, bool, Instant) {
        let kind = match self.kind() {
            PathKind::Relayed { .. } => PathKind::Relayed { via: None },
            kind @ (PathKind::Lan | PathKind::Direct | PathKind::HolePunched) => kind,
        };
        (self.is_doubtful(), kind, self.transport, !self.leading, self.since)
    }
}

/// One way to a node, as `peers` shows it.
#[derive(Clone, Debug)]
pub struct PeerView {
    /// The node.
    pub node: NodeName,
    /// Its `PeerId` (`12D3KooW…`).
    pub peer_id: String,
    /// How it is reached.
    pub path: PathKind,
    /// What the connection runs on.
    pub transport: Transport,
    /// Address and port of the other end; none through a relay.
    pub remote: Option<SocketAddr>,
    /// Last measured round trip; none before the first.
    pub rtt: Option<Duration>,
    /// Streams open in both directions.
    pub streams: u32,
    /// Bytes of payload sent.
    pub sent_bytes: u64,
    /// Bytes of payload received.
    pub received_bytes: u64,
    /// For how long the connection has been up.
    pub up: Duration,
}

/// All members that are connected, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Peers(BTreeMap<NodeName, Vec<Arc<Path>>>);

impl Peers {
    /// The nodes, in order of their names.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeName> {
        self.0.keys()
    }

    /// How new streams to `node` go; `None` when it is not connected.
    pub fn path(&self, node: &NodeName) -> Option<PathKind> {
        self.0.get(node)?.first().map(|path| path.kind())
    }

    /// The addresses at which this node has direct connections with `node`.
    pub fn seen_at(&self, node: &NodeName) -> Vec<IpAddr> {
        let paths = self.0.get(node).into_iter().flatten();
        let mut seen: Vec<IpAddr> = paths.filter_map(|path| Some(path.remote?.ip())).collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    /// All paths, the best of each node first.
    pub fn views(&self) -> Vec<PeerView> {
        self.all().map(|(node, path)| path.view(node)).collect()
    }

    /// The path that new streams to `node` take; `None` when it is not connected.
    pub fn best(&self, node: &NodeName) -> Option<PeerView> {
        Some(self.paths(node).first()?.view(node))
    }

    /// The paths to a node, best first.
    pub(super) fn paths(&self, node: &NodeName) -> &[Arc<Path>] {
        self.0.get(node).map_or(&[], Vec::as_slice)
    }

    /// Of the direct paths to a node, those that nothing new runs on, as another is known to work that both ends prefer: QUIC
    /// beside TCP, and of two on the same transport, as when both ends have dialled, one.
    pub(super) fn surplus(&self, node: &NodeName) -> Vec<Arc<Path>> {
        let direct = || self.paths(node).iter().filter(|path| path.is_direct());
        let better = |path: &Path, than: &Path| {
            let works = !path.is_doubtful() && path.rtt().is_some() && path.kind() <= than.kind();
            let transport = path.transport.cmp(&than.transport);
            // Of two that one side has dialled, that side keeps the older; the other may see them in another order.
            let one_of_two =
                if path.leading == than.leading { path.ours && path.since < than.since } else { path.leading };
            works && (transport.is_lt() || transport.is_eq() && one_of_two)
        };
        direct().filter(|path| direct().any(|other| better(other, path))).cloned().collect()
    }

    /// Of the direct paths to a node, those that this one has dialled beside one of the same transport by which it was called.
    pub(super) fn own_doubles(&self, node: &NodeName) -> Vec<Arc<Path>> {
        let direct = || self.paths(node).iter().filter(|path| path.is_direct());
        let called = |path: &Path| direct().any(|other| !other.ours && other.transport == path.transport);
        direct().filter(|path| path.ours && called(path)).cloned().collect()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (&NodeName, &Arc<Path>)> {
        self.0.iter().flat_map(|(node, paths)| paths.iter().map(move |path| (node, path)))
    }

    /// Adds a path, or puts it in its place again when its rank has changed.
    pub(super) fn put(&mut self, node: &NodeName, path: Arc<Path>) {
        let paths = self.0.entry(node.clone()).or_default();
        paths.retain(|other| other.connection != path.connection);
        paths.push(path);
        paths.sort_by_cached_key(|path| path.rank());
    }

    /// Removes a path; gives it back if it was there.
    pub(super) fn take(&mut self, connection: ConnectionId) -> Option<(NodeName, Arc<Path>)> {
        let (node, at) = self.0.iter().find_map(|(node, paths)| {
            paths.iter().position(|path| path.connection == connection).map(|at| (node.clone(), at))
        })?;
        let paths = self.0.get_mut(&node)?;
        let path = paths.remove(at);
        if paths.is_empty() {
            self.0.remove(&node);
        }
        Some((node, path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(connection: usize, relay: bool, on_link: bool, transport: Transport) -> Arc<Path> {
        let (open, _) = mpsc::channel(1);
        let relay = relay.then(PeerId::random);
        let (connection, peer) = (ConnectionId::new_unchecked(connection), PeerId::random());
        let counters = Arc::default();
        let (remote, ours, leading) = (None, true, true);
        Arc::new(Path::new(NewPath {
            connection,
            peer,
            transport,
            remote,
            relay,
            ours,
            leading,
            on_link,
            open,
            counters,
        }))
    }

    #[test]
    fn the_better_path_comes_first_however_they_come() {
        let node: NodeName = "n".parse().unwrap();
        let mut peers = Peers::default();
        peers.put(&node, path(1, true, false, Transport::Tcp));
        assert_eq!(peers.path(&node), Some(PathKind::Relayed { via: None }));
        let punched = path(2, false, false, Transport::Quic);
        peers.put(&node, Arc::clone(&punched));
        punched.punched.store(true, Ordering::Relaxed);
        peers.put(&node, punched);
        assert_eq!(peers.path(&node), Some(PathKind::HolePunched));
        peers.put(&node, path(3, false, false, Transport::Quic));
        assert_eq!(peers.path(&node), Some(PathKind::Direct));
        peers.put(&node, path(4, false, true, Transport::Quic));
        peers.put(&node, path(5, false, true, Transport::Tcp));
        let order: Vec<_> = peers.views().into_iter().map(|view| (view.path.as_str(), view.transport)).collect();
        assert_eq!(
            order,
            [
                ("lan", Transport::Tcp),
                ("lan", Transport::Quic),
                ("direct", Transport::Quic),
                ("hole-punched", Transport::Quic),
                ("relayed", Transport::Tcp),
            ]
        );
    }

    #[test]
    fn a_path_in_doubt_comes_last_until_it_answers() {
        let node: NodeName = "n".parse().unwrap();
        let mut peers = Peers::default();
        let (lan, relayed) = (path(1, false, true, Transport::Tcp), path(2, true, false, Transport::Tcp));
        peers.put(&node, Arc::clone(&lan));
        peers.put(&node, relayed);
        for (doubtful, best) in [(true, "relayed"), (false, "lan")] {
            assert!(lan.set_doubtful(doubtful) && !lan.set_doubtful(doubtful));
            peers.put(&node, Arc::clone(&lan));
            assert_eq!(peers.path(&node).unwrap().as_str(), best);
        }
    }

    #[test]
    fn udp_leaves_room_for_tcp() {
        let path = path(1, false, false, Transport::Tcp);
        let mut held: Vec<Permit> = std::iter::from_fn(|| path.permit(Protocol::Udp)).collect();
        assert_eq!(held.len(), FLOWS_PER_PATH);
        held.extend(std::iter::from_fn(|| path.permit(Protocol::Tcp)));
        assert_eq!(held.len(), STREAMS_PER_PATH);
        drop(held.swap_remove(0));
        assert!(path.permit(Protocol::Udp).is_some());
    }

    #[test]
    fn quic_is_surplus_only_beside_tcp_that_works_and_is_as_good() {
        let node: NodeName = "n".parse().unwrap();
        let surplus = |tcp: &Arc<Path>, quic: &Arc<Path>| {
            let mut peers = Peers::default();
            peers.put(&node, Arc::clone(tcp));
            peers.put(&node, Arc::clone(quic));
            peers.surplus(&node).iter().map(|path| path.connection).collect::<Vec<_>>()
        };
        let (tcp, quic) = (path(1, false, false, Transport::Tcp), path(2, false, false, Transport::Quic));
        assert_eq!(surplus(&tcp, &quic), []);
        tcp.rtt_nanos.store(1000, Ordering::Relaxed);
        assert_eq!(surplus(&tcp, &quic), [quic.connection]);
        assert_eq!(surplus(&tcp, &path(3, false, true, Transport::Quic)), []);
        tcp.set_doubtful(true);
        assert_eq!(surplus(&tcp, &quic), []);
        let relayed = path(4, true, false, Transport::Tcp);
        relayed.rtt_nanos.store(1000, Ordering::Relaxed);
        assert_eq!(surplus(&relayed, &quic), []);
    }

    #[test]
    fn a_node_without_paths_is_no_peer() {
        let node: NodeName = "n".parse().unwrap();
        let mut peers = Peers::default();
        peers.put(&node, path(1, false, false, Transport::Tcp));
        assert!(peers.take(ConnectionId::new_unchecked(2)).is_none());
        assert!(peers.take(ConnectionId::new_unchecked(1)).is_some());
        assert_eq!(peers.nodes().count(), 0);
    }
}
