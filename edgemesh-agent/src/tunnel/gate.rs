//! The gate that members pass and nobody else: wraps everything that is served on a connection.
//!
//! # How a peer proves that it is a member
//!
//! The transport (TLS 1.3 or QUIC, directly or inside a relay's circuit) proves that the peer holds the private key of its
//! `PeerId`; its ephemeral keys make a replayed handshake worthless. Then each side says the name of its node in a hello,
//! and is a member if that name, by an accepted PSK, gives that very `PeerId` ([`Membership`]). So nobody is a member
//! without the PSK, and nobody claims another's name.
//!
//! The name comes in a protocol of its own and not in identify's agent version, since identify would answer a stranger's
//! questions (addresses, protocols) before he is known for one, may come at any time and more than once, and neither
//! side learns from it when the other has read it. The hello is the first and only stream of a connection, and is
//! ordered: dialler's name, listener's name, dialler's end of stream. Each side accepts streams before the other opens
//! any, so a member's streams are never refused, and costs one round trip.
//!
//! Until then no other protocol is offered, none of the inner handlers is polled, and the connection is counted as a
//! stranger's ([`Admission`]).

mod handler;

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher as _, RandomState},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId,
    core::{Endpoint, transport::PortUse},
    multiaddr::Protocol,
    swarm::{
        CloseConnection, ConnectionDenied, ConnectionId, FromSwarm, ListenError, NetworkBehaviour, THandler,
        THandlerInEvent, THandlerOutEvent, ToSwarm,
    },
};
use tracing::{debug, warn};

pub(super) use self::handler::{FromHandler, Handler, Refusal};
use super::{
    NodeName, Transport,
    admission::{Admission, Quiet},
    counters::Counters,
    identity::Membership,
    secure::Admitted,
    wire::Hello,
};

/// How long a handshake from where this node has just dialled to may come to nothing without a word: when a hole is punched,
/// both sides begin, and one of the two connections is given up.
const CROSSING: Duration = Duration::from_secs(10);

/// Addresses dialled that are remembered for that.
const MAX_DIALLED: usize = 256;

/// What the gate tells the swarm's owner.
#[derive(Debug)]
pub(super) enum Event<E> {
    /// A connection is a member's.
    Member { peer: PeerId, connection: ConnectionId, node: NodeName, addresses: Vec<Multiaddr>, run: u64 },
    /// A connection is cut off, or has ended before its peer was known; `stranger` if the peer has shown that it is none.
    Refused { peer: PeerId, connection: ConnectionId, stranger: bool },
    /// Of the behaviour behind the gate.
    Inner(E),
}

/// By what a gate judges.
#[derive(Clone)]
pub(super) struct Rules {
    pub(super) membership: Arc<Membership>,
    /// Where those who pass are entered.
    pub(super) admitted: Arc<Admitted>,
    /// Bound of the exchange of names.
    pub(super) deadline: Duration,
}

/// Behaviour that lets members through to `B`.
pub(super) struct Gate<B: NetworkBehaviour> {
    pub(super) inner: B,
    shared: Arc<handler::Shared>,
    admission: Admission<ConnectionId>,
    quiet: Quiet,
    /// Connections that are established and not yet known to be a member's, with their remote address.
    unknown: HashMap<ConnectionId, Multiaddr>,
    /// Connections that are a member's.
    members: HashMap<ConnectionId, PeerId>,
    /// Where this node has dialled to lately.
    dialled: VecDeque<(Instant, IpAddr)>,
    counters: Arc<Counters>,
    actions: VecDeque<ToSwarm<Event<B::ToSwarm>, THandlerInEvent<B>>>,
}

impl<B: NetworkBehaviour> Gate<B> {
    /// A gate before `inner`.
    pub(super) fn new(inner: B, node: &NodeName, rules: Rules, counters: Arc<Counters>) -> Self {
        let run = RandomState::new().hash_one(node);
        let hello = Hello { node: node.to_string(), addresses: Vec::new(), run };
        Self {
            inner,
            shared: Arc::new(handler::Shared { rules, hello }),
            admission: Admission::new(),
            quiet: Quiet::default(),
            unknown: HashMap::new(),
            members: HashMap::new(),
            dialled: VecDeque::new(),
            counters,
            actions: VecDeque::new(),
        }
    }

    /// From now on new connections are judged by `membership`.
    pub(super) fn set_membership(&mut self, membership: Arc<Membership>) {
        let handler::Shared { rules, hello } = &*self.shared;
        let rules = Rules { membership, ..rules.clone() };
        self.shared = Arc::new(handler::Shared { rules, hello: hello.clone() });
    }

    /// Another node sees this one at `address`: others may reach it there if a hole is punched.
    pub(super) fn seen_at(&mut self, address: Multiaddr) {
        self.actions.push_back(ToSwarm::NewExternalAddrCandidate(address));
    }

    /// From now on new connections are told these addresses of this node.
    pub(super) fn set_addresses<'a>(&mut self, addresses: impl Iterator<Item = &'a Multiaddr>) {
        let handler::Shared { rules, hello } = &*self.shared;
        let addresses = addresses.take(super::wire::MAX_ADDRESSES).map(Multiaddr::to_vec).collect();
        let hello = Hello { addresses, ..hello.clone() };
        self.shared = Arc::new(handler::Shared { rules: rules.clone(), hello });
    }

    fn wrap(
        &mut self,
        inner: THandler<B>,
        connection: ConnectionId,
        peer: PeerId,
        remote: &Multiaddr,
        first: bool,
    ) -> Handler<THandler<B>> {
        self.unknown.insert(connection, remote.clone());
        Handler::new(inner, Arc::clone(&self.shared), peer, first, is_relayed(remote))
    }

    /// Whether a connection from `remote` may have crossed with one of this node's own.
    fn crosses(&self, remote: &Multiaddr, now: Instant) -> bool {
        let recent = self.dialled.iter().filter(|(at, _)| now.saturating_duration_since(*at) < CROSSING);
        ip(remote).is_some_and(|remote| recent.map(|(_, ip)| *ip).any(|ip| ip == remote))
    }

    fn dials(&mut self, addresses: &[Multiaddr], now: Instant) {
        while self.dialled.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) >= CROSSING) {
            self.dialled.pop_front();
        }
        for ip in addresses.iter().filter(|address| !is_relayed(address)).filter_map(ip) {
            if self.dialled.len() < MAX_DIALLED {
                self.dialled.push_back((now, ip));
            }
        }
    }

    /// Writes one line a minute for each kind of trouble, at most.
    fn log_refusal(&mut self, kind: &'static str, remote: &Multiaddr, claimed: Option<&NodeName>, why: &str) {
        self.counters.refused_peers.add(1);
        if kind == "identity" {
            self.counters.wrong_identities.add(1);
        }
        let claimed = claimed.map_or("nobody", NodeName::as_str);
        match self.quiet.pass(kind, Instant::now()) {
            Some(left_out) => warn!(%remote, claimed, left_out, "peer cut off before anything was served: {why}"),
            None => debug!(%remote, claimed, "peer cut off before anything was served: {why}"),
        }
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "libp2p has many events, and the rest is no matter here")]
    fn on_event(&mut self, event: FromSwarm<'_>) {
        let now = Instant::now();
        match event {
            FromSwarm::ListenFailure(failure) => {
                let remote = failure.send_back_addr;
                let crosses = self.crosses(remote, now);
                if crosses {
                    self.admission.withdrawn(&failure.connection_id, now);
                } else {
                    self.admission.failed(&failure.connection_id, now);
                }
                let why = with_sources(failure.error);
                if matches!(failure.error, ListenError::Denied { .. }) {
                    self.counters.denied_connections.add(1);
                    match self.quiet.pass("denied", now) {
                        Some(left_out) => warn!(%remote, left_out, "connection not taken: {why}"),
                        None => debug!(%remote, "connection not taken: {why}"),
                    }
                } else if crosses {
                    debug!(%remote, "a connection that crossed with one of this node's was given up: {why}");
                } else {
                    self.log_refusal("handshake", remote, None, &format!("no handshake: {why}"));
                }
            }
            FromSwarm::ConnectionClosed(closed) => {
                self.members.remove(&closed.connection_id);
                if let Some(remote) = self.unknown.remove(&closed.connection_id) {
                    if self.members.values().any(|member| *member == closed.peer_id) {
                        self.admission.withdrawn(&closed.connection_id, now);
                        // Of connections that begin at the same time, as when a hole is punched, each side keeps the one
                        // that it had first.
                        debug!(%remote, peer = %closed.peer_id, "a member gave up a connection before it was used");
                        return;
                    }
                    self.admission.failed(&closed.connection_id, now);
                    let why = Refusal::Broken(std::io::ErrorKind::ConnectionAborted.into());
                    self.log_refusal(why.kind(), &remote, None, &why.to_string());
                    self.actions.push_back(ToSwarm::GenerateEvent(Event::Refused {
                        peer: closed.peer_id,
                        connection: closed.connection_id,
                        stranger: false,
                    }));
                }
            }
            _ => {}
        }
    }
}

impl<B: NetworkBehaviour> NetworkBehaviour for Gate<B> {
    type ConnectionHandler = Handler<THandler<B>>;
    type ToSwarm = Event<B::ToSwarm>;

    fn handle_pending_inbound_connection(
        &mut self,
        connection: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        let from = if is_relayed(local) { None } else { ip(remote) };
        let transport = super::mesh::transport(if is_relayed(local) { local } else { remote });
        self.admission.admit(connection, transport, from, Instant::now()).map_err(ConnectionDenied::new)?;
        self.inner.handle_pending_inbound_connection(connection, local, remote)
    }

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        let inner = self.inner.handle_established_inbound_connection(connection, peer, local, remote)?;
        let place = if is_relayed(local) { local } else { remote };
        Ok(self.wrap(inner, connection, peer, place, false))
    }

    fn handle_pending_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        self.dials(addresses, Instant::now());
        self.inner.handle_pending_outbound_connection(connection, peer, addresses, role)
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        let inner = self.inner.handle_established_outbound_connection(connection, peer, address, role, port)?;
        // When a hole is punched, one side dials as a listener. TCP then has one connection, in which the two play these
        // parts; QUIC that dials from its listening port plays none, and the other side accepts as ever.
        let quic = port == PortUse::Reuse && super::mesh::transport(address) == Transport::Quic;
        let first = role == Endpoint::Dialer || (quic && !is_relayed(address));
        Ok(self.wrap(inner, connection, peer, address, first))
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        self.on_event(event);
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, connection: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {
            FromHandler::Member { node, addresses, run } => {
                self.admission.joined(&connection, Instant::now());
                self.unknown.remove(&connection);
                self.members.insert(connection, peer);
                let member = Event::Member { peer, connection, node, addresses, run };
                self.actions.push_back(ToSwarm::GenerateEvent(member));
            }
            FromHandler::Refused { claimed, why } => {
                self.admission.failed(&connection, Instant::now());
                if let Some(remote) = self.unknown.remove(&connection) {
                    self.log_refusal(why.kind(), &remote, claimed.as_ref(), &why.to_string());
                }
                let stranger = matches!(why, Refusal::NotMember(_));
                self.actions.push_back(ToSwarm::GenerateEvent(Event::Refused { peer, connection, stranger }));
                self.actions.push_back(ToSwarm::CloseConnection {
                    peer_id: peer,
                    connection: CloseConnection::One(connection),
                });
            }
            FromHandler::Inner(event) => self.inner.on_connection_handler_event(peer, connection, event),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        match self.actions.pop_front() {
            Some(action) => Poll::Ready(action),
            None => self.inner.poll(cx).map(|action| action.map_out(Event::Inner)),
        }
    }
}

/// The whole chain of an error: libp2p's say little by themselves.
pub(super) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let words = source.to_string();
        // Many say what their source says.
        if !text.ends_with(&words) {
            text = format!("{text}: {words}");
        }
        next = source.source();
    }
    text
}

/// Whether an address leads through a relay.
pub(super) fn is_relayed(address: &Multiaddr) -> bool {
    address.iter().any(|part| part == Protocol::P2pCircuit)
}

/// The address and port that a direct address begins with.
pub(super) fn socket_address(address: &Multiaddr) -> Option<SocketAddr> {
    if is_relayed(address) {
        return None;
    }
    if let Protocol::Tcp(port) | Protocol::Udp(port) = address.iter().nth(1)? {
        return Some(SocketAddr::new(ip(address)?, port));
    }
    None
}

/// The IP address that an address begins with.
pub(super) fn ip(address: &Multiaddr) -> Option<IpAddr> {
    match address.iter().next() {
        Some(Protocol::Ip4(ip)) => Some(ip.into()),
        Some(Protocol::Ip6(ip)) => Some(ip.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use libp2p::swarm::dummy;

    use super::*;
    use crate::tunnel::{AllowList, Psks};

    #[test]
    fn only_who_was_dialled_a_moment_ago_may_have_crossed_with_us() {
        let psks = Psks::parse("0123456789abcdef").unwrap();
        let membership = Arc::new(Membership { psks, allow: AllowList::default() });
        let (node, counters) = ("edge1".parse().unwrap(), Arc::default());
        let rules = Rules { membership, admitted: Arc::default(), deadline: Duration::from_secs(5) };
        let mut gate = Gate::new(dummy::Behaviour, &node, rules, counters);
        let at = |text: &str| text.parse::<Multiaddr>().unwrap();
        let begin = Instant::now();
        gate.dials(&[at("/ip4/203.0.113.1/udp/20006/quic-v1"), at("/ip4/203.0.113.9/tcp/20006/p2p-circuit")], begin);
        // A NAT may have made another port of it.
        let crossing = at("/ip4/203.0.113.1/udp/40001/quic-v1");
        assert!(gate.crosses(&crossing, begin + CROSSING / 2));
        assert!(!gate.crosses(&crossing, begin + CROSSING));
        for stranger in ["/ip4/203.0.113.2/udp/20006/quic-v1", "/ip4/203.0.113.9/tcp/20006"] {
            assert!(!gate.crosses(&at(stranger), begin), "{stranger}");
        }
        for _ in 0..2 * MAX_DIALLED {
            gate.dials(&[at("/ip4/203.0.113.3/tcp/20006")], begin + CROSSING);
        }
        assert_eq!(gate.dialled.len(), MAX_DIALLED);
    }
}
