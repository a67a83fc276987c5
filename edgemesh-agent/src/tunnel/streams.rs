//! The streams' own behaviour: a path for each connection, on which openers ask for streams directly.
//!
//! An opener's request goes from its task to the connection's, not through the swarm's: so the swarm is no bottleneck for
//! new connections, and a busy one delays nobody. libp2p-stream does not serve: its inbound queue holds one stream and
//! drops the rest, and it opens on a random connection, so half of the streams stay on a relay that is no longer needed.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};

use libp2p::{
    Multiaddr, PeerId, StreamProtocol,
    core::{Endpoint, transport::PortUse, upgrade::ReadyUpgrade},
    multiaddr::Protocol,
    swarm::{
        ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId, FromSwarm, NetworkBehaviour,
        SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
        handler::{ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound},
    },
};
use tokio::sync::mpsc;

use super::{
    counters::Counters,
    gate::{is_relayed, socket_address},
    interfaces,
    mesh::transport,
    paths::{NewPath, OpenRequest, Path},
    serve::Server,
};

const STREAM: StreamProtocol = StreamProtocol::new("/edgemesh/stream/1");

/// Requests for streams that wait for one connection.
const WAITING: usize = 256;

/// Keeps the paths; serves what peers ask for.
pub(super) struct Streams {
    me: PeerId,
    paths: HashMap<ConnectionId, Arc<Path>>,
    server: Arc<Server>,
    counters: Arc<Counters>,
    deadline: Duration,
}

impl Streams {
    pub(super) fn new(me: PeerId, server: Arc<Server>, counters: Arc<Counters>, deadline: Duration) -> Self {
        Self { me, paths: HashMap::new(), server, counters, deadline }
    }

    /// The path of a connection, whether its peer has passed the gate or not.
    pub(super) fn path(&self, connection: ConnectionId) -> Option<&Arc<Path>> {
        self.paths.get(&connection)
    }

    fn connected(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        ours: bool,
        local: Option<&Multiaddr>,
        remote: &Multiaddr,
    ) -> Handler {
        // Of a relayed connection from outside, the relay stands in the local address.
        let place = local.filter(|local| is_relayed(local)).unwrap_or(remote);
        let relay = is_relayed(place).then(|| relay(place)).flatten();
        let remote = if relay.is_some() { None } else { socket_address(remote) };
        let (open, requests) = mpsc::channel(WAITING);
        let path = Arc::new(Path::new(NewPath {
            connection,
            peer,
            transport: transport(place),
            remote,
            relay,
            ours,
            leading: ours == (self.me < peer),
            on_link: remote.is_some_and(|remote| interfaces::on_link(remote.ip())),
            open,
            counters: Arc::clone(&self.counters),
        }));
        self.paths.insert(connection, Arc::clone(&path));
        Handler { path, requests, server: Arc::clone(&self.server), deadline: self.deadline }
    }
}

/// The relay in a relayed address.
fn relay(address: &Multiaddr) -> Option<PeerId> {
    let before = address.iter().take_while(|part| *part != Protocol::P2pCircuit);
    before.filter_map(|part| if let Protocol::P2p(peer) = part { Some(peer) } else { None }).last()
}

impl NetworkBehaviour for Streams {
    type ConnectionHandler = Handler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(self.connected(connection, peer, false, Some(local), remote))
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        // Where a hole is punched both dial, and one of them takes the other part.
        Ok(self.connected(connection, peer, role == Endpoint::Dialer, None, address))
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "libp2p has many events, and the rest is no matter here")]
    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionClosed(closed) => {
                self.paths.remove(&closed.connection_id);
            }
            FromSwarm::DialFailure(failed) => {
                self.paths.remove(&failed.connection_id);
            }
            FromSwarm::ListenFailure(failed) => {
                self.paths.remove(&failed.connection_id);
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, never: THandlerOutEvent<Self>) {
        match never {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

/// One connection's end of it.
pub(super) struct Handler {
    path: Arc<Path>,
    requests: mpsc::Receiver<OpenRequest>,
    server: Arc<Server>,
    deadline: Duration,
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.path.ended.cancel();
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Infallible;
    type ToBehaviour = Infallible;
    type InboundProtocol = ReadyUpgrade<StreamProtocol>;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = OpenRequest;

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol> {
        SubstreamProtocol::new(ReadyUpgrade::new(STREAM), ()).with_timeout(self.deadline)
    }

    fn connection_keep_alive(&self) -> bool {
        self.path.pinned.load(Ordering::Relaxed)
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, Self::OutboundOpenInfo, Self::ToBehaviour>> {
        while let Poll::Ready(Some(request)) = self.requests.poll_recv(cx) {
            if !request.is_closed() {
                let protocol = SubstreamProtocol::new(ReadyUpgrade::new(STREAM), request).with_timeout(self.deadline);
                return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest { protocol });
            }
        }
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, never: Self::FromBehaviour) {
        match never {}
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "libp2p has many events, and the rest is no matter here")]
    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<'_, Self::InboundProtocol, Self::OutboundProtocol, (), Self::OutboundOpenInfo>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol: stream, .. }) => {
                self.server.accept(stream, &self.path);
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol: stream, info: request }) => {
                // Who asked may have given up; the stream is reset then by being dropped.
                let _ = request.send(Ok(stream));
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info: request, error }) => {
                let _ = request.send(Err(error.to_string()));
            }
            _ => {}
        }
    }
}
