//! What the swarm tells.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId,
    core::ConnectedPoint,
    identify, mdns, ping, relay,
    swarm::{ConnectionId, DialError, SwarmEvent},
};
use tracing::{debug, info, warn};

use super::{
    Driver, ENDED, GIVE_BACK, MAX_CONFIRMED, MAX_STRANGERS, Purpose, SETTLED, STRANGER, Task, random,
    upgrade::{RETIRE, SHED, TRY_TCP},
};
use crate::tunnel::{
    NodeName, PathKind, Transport,
    gate::{self, ip, is_relayed, with_sources},
    interfaces::is_link_local,
    mesh::MeshEvent,
    paths::Path,
};

/// Round trips that may fail in a row before a connection counts as dead, beyond the first, of which ping says nothing.
const PING_FAILURES: u32 = 2;

/// Bytes sent between two round trips that make up for one that has failed.
const BUSY: u64 = 32 * 1024;

/// How long a connection on which round trips are measured every 2 s is silent when it is not merely slow.
const SILENT: Duration = Duration::from_secs(4);

impl Driver<'_> {
    #[expect(clippy::wildcard_enum_match_arm, reason = "libp2p has many events, and the rest is no matter here")]
    pub(super) fn on_swarm_event(&mut self, event: SwarmEvent<gate::Event<MeshEvent>>) {
        match event {
            SwarmEvent::Behaviour(gate::Event::Member { peer, connection, node, addresses, run }) => {
                self.on_member(peer, connection, node, addresses);
                self.end_other_runs(connection, run);
            }
            SwarmEvent::Behaviour(gate::Event::Refused { peer, connection, stranger }) => {
                self.outbound.remove(&connection);
                if stranger {
                    self.on_stranger(peer);
                }
                self.dial_failed(connection, "what answers there is no member");
            }
            SwarmEvent::Behaviour(gate::Event::Inner(event)) => self.on_mesh_event(event),
            SwarmEvent::ConnectionEstablished {
                connection_id,
                endpoint: ConnectedPoint::Dialer { address, .. },
                ..
            } => {
                self.outbound.insert(connection_id, address);
            }
            SwarmEvent::ConnectionClosed { connection_id, cause, .. } => {
                let cause = cause.map(|cause| with_sources(&cause));
                self.on_closed(connection_id, cause.as_deref().unwrap_or("closed"));
            }
            SwarmEvent::OutgoingConnectionError { connection_id, peer_id, error } => {
                self.on_dial_error(connection_id, peer_id, &error);
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                debug!(%address, "the tunnel listens");
                self.on_address(&address);
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                debug!(%address, "the tunnel listens no longer");
                self.on_address(&address);
            }
            SwarmEvent::ListenerClosed { listener_id, reason, .. } => {
                if let Some((node, _)) = self.circuits.remove(&listener_id) {
                    debug!(relay = %node, ?reason, "reservation ended");
                    self.relays.unreserved(&node, Instant::now(), random());
                } else if let Some(address) = self.listeners.remove(&listener_id) {
                    warn!(%address, ?reason, "the tunnel's listener failed; it is made anew");
                    self.after(Duration::from_secs(1), Task::Listen(address));
                }
            }
            SwarmEvent::ListenerError { error, .. } => debug!("listener of the tunnel: {error}"),
            SwarmEvent::ExternalAddrConfirmed { address } if !is_relayed(&address) => {
                if !self.public {
                    info!(%address, "other nodes can reach this one from outside");
                }
                self.public = true;
                self.confirmed.retain(|known| *known != address);
                self.confirmed.push_back(address);
                // Where this node was before it got another address somebody else may be now.
                if self.confirmed.len() > MAX_CONFIRMED
                    && let Some(oldest) = self.confirmed.pop_front().filter(|oldest| !self.external.contains(oldest))
                {
                    self.swarm.remove_external_address(&oldest);
                }
                self.update_relay_role();
            }
            _ => {}
        }
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "libp2p has many events, and the rest is no matter here")]
    fn on_mesh_event(&mut self, event: MeshEvent) {
        match event {
            MeshEvent::Ping(ping::Event { connection, result, .. }) => match result {
                Ok(rtt) => {
                    self.ping_failures.remove(&connection);
                    if let Some(path) = self.swarm.behaviour().inner.streams.path(connection) {
                        path.set_rtt(rtt);
                        self.payload.insert(connection, path.moved());
                    }
                    self.doubt(connection, false);
                }
                Err(ping::Failure::Unsupported) => {}
                Err(_) => self.on_silence(connection),
            },
            MeshEvent::Identify(identify::Event::Received { connection_id, peer_id, info }) => {
                self.book.identified(peer_id, info.listen_addrs);
                let path = self.swarm.behaviour().inner.streams.path(connection_id);
                let direct = path.filter(|path| path.is_direct());
                // Others see what is of use to their own LAN only.
                if direct.and_then(|path| path.node.get()).is_some_and(|node| self.relays.contains(node)) {
                    // Identify itself believes that a NAT keeps the port, and puts that of a listener in the place of
                    // another. But all that this node dials leaves from there: the port is what the NAT has made of it.
                    self.swarm.behaviour_mut().seen_at(info.observed_addr);
                }
            }
            MeshEvent::Dcutr(event) => match event.result {
                Ok(connection) => {
                    self.core.counters.holes_punched.add(1);
                    if let Some(path) = self.swarm.behaviour().inner.streams.path(connection) {
                        path.punched.store(true, Ordering::Relaxed);
                    }
                }
                Err(error) => {
                    self.core.counters.hole_failures.add(1);
                    debug!(peer = %event.remote_peer_id, "no hole punched: {}", with_sources(&error));
                }
            },
            MeshEvent::RelayClient(relay::client::Event::ReservationReqAccepted { relay_peer_id, .. }) => {
                self.on_reserved(relay_peer_id);
            }
            MeshEvent::Relay(relay::Event::CircuitReqAccepted { .. }) => self.core.counters.relayed_circuits.add(1),
            MeshEvent::Mdns(mdns::Event::Discovered(found)) => {
                for (peer, address) in found {
                    let new = !self.known(&peer);
                    self.book.nearby(peer, address);
                    if new && self.known(&peer) {
                        // One side goes first, so that the two do not meet halfway.
                        let wait = if *self.swarm.local_peer_id() < peer { 0.0 } else { 2.0 };
                        self.after(Duration::from_secs_f64(wait + random()), Task::Neighbour(peer, 0));
                    }
                }
            }
            MeshEvent::Mdns(mdns::Event::Expired(gone)) => {
                for (peer, address) in gone {
                    self.book.gone(&peer, address);
                }
            }
            _ => {}
        }
    }

    /// A round trip has failed on a connection.
    fn on_silence(&mut self, connection: ConnectionId) {
        let Some(path) = self.swarm.behaviour().inner.streams.path(connection).map(Arc::clone) else { return };
        let (sent, received) = path.moved();
        let (sent_before, received_before) = self.payload.insert(connection, (sent, received)).unwrap_or_default();
        if received > received_before || sent.saturating_sub(sent_before) >= BUSY {
            // The question waits behind what is under way on a slow link. Nobody could send so much for long if nothing were
            // taken at the other end.
            return;
        }
        self.doubt(connection, true);
        let failures = self.ping_failures.entry(connection).or_default();
        *failures += 1;
        if *failures >= PING_FAILURES {
            self.swarm.close_connection(connection);
        }
    }

    /// The addresses of an interface have changed. Those of pods' interfaces come and go all the time, and tell nobody anything.
    fn on_address(&mut self, address: &Multiaddr) {
        if is_relayed(address) {
            return;
        }
        self.tell_sockets();
        let matters = ip(address).is_some_and(|ip| !is_link_local(ip));
        if matters && !self.schedule.values().any(|task| *task == Task::Moved) {
            self.after(SETTLED, Task::Moved);
        }
    }

    /// Has new streams avoid a connection, or take it again.
    fn doubt(&mut self, connection: ConnectionId, doubtful: bool) {
        let Some(path) = self.swarm.behaviour().inner.streams.path(connection).map(Arc::clone) else { return };
        if path.set_doubtful(doubtful)
            && let Some(node) = path.node.get()
        {
            self.peers.put(node, Arc::clone(&path));
            self.publish();
        }
    }

    /// Closes what is left of connections with a node as it was before it started anew: nobody is there any more, which
    /// the connections themselves would only find out by silence.
    fn end_other_runs(&mut self, connection: ConnectionId, run: u64) {
        let Some(path) = self.swarm.behaviour().inner.streams.path(connection).map(Arc::clone) else { return };
        let _ = path.run.set(run);
        let Some(node) = path.node.get() else { return };
        let others = self.peers.paths(node).iter();
        let ended = others.filter(|path| path.run.get().is_some_and(|other| *other != run));
        let ended: Vec<ConnectionId> = ended.map(|path| path.connection).collect();
        for connection in ended {
            debug!(%node, "the node has started anew; a connection of before is closed");
            self.swarm.close_connection(connection);
        }
    }

    /// Closes direct connections with a node that were silent when it came from another address: it has moved, which they
    /// would only find out later, and a relay would lead others to them until then.
    fn end_silent(&mut self, newest: &Path) {
        let Some(node) = newest.node.get() else { return };
        // Ports differ by transport and by who has dialled.
        let at = |path: &Path| path.remote.map(|remote| remote.ip());
        let elsewhere =
            |path: &&Arc<Path>| path.is_direct() && path.connection != newest.connection && at(path) != at(newest);
        let others = self.peers.paths(node).iter().filter(elsewhere);
        let silent: Vec<ConnectionId> =
            others.filter(|path| path.silent() >= SILENT).map(|path| path.connection).collect();
        for connection in silent {
            debug!(%node, "the node has come from another address; a silent connection of before is closed");
            self.swarm.close_connection(connection);
        }
    }

    fn on_reserved(&mut self, relay: PeerId) {
        let Some(node) = self.node_of(relay) else { return };
        for (other, reserved) in self.circuits.values_mut() {
            if *other == node {
                *reserved = true;
            }
        }
        debug!(relay = %node, "reservation made");
        self.relays.reserved(&node);
    }

    fn node_of(&self, peer: PeerId) -> Option<NodeName> {
        self.peers.all().find(|(_, path)| path.peer == peer).map(|(node, _)| node.clone())
    }

    fn on_member(&mut self, peer: PeerId, connection: ConnectionId, node: NodeName, addresses: Vec<Multiaddr>) {
        let dialled = self.outbound.remove(&connection);
        self.dial_done(connection);
        if self.core.membership().check(&node, &peer).is_err() {
            // It was judged by keys that have been taken away meanwhile.
            self.swarm.close_connection(connection);
            return;
        }
        let Some(path) = self.swarm.behaviour().inner.streams.path(connection).map(Arc::clone) else { return };
        let _ = path.node.set(node.clone());
        if let Some(via) = path.relay.and_then(|relay| self.node_of(relay)) {
            let _ = path.via.set(via);
        }
        self.strangers.remove(&peer);
        if path.is_direct() {
            self.end_silent(&path);
        }
        let relayed_before = self.peers.paths(&node).iter().any(|path| !path.is_direct());
        if path.is_direct() && dialled.is_none() && relayed_before && !self.public {
            // Through this node's NAT nobody comes without a hole, and only the dialling side is told of it.
            path.punched.store(true, Ordering::Relaxed);
        }
        self.book.told(peer, addresses);
        let outbound = dialled.is_some();
        if let Some(address) = dialled {
            self.book.worked(peer, address);
        }
        let connected = &self.core.counters.connected;
        match path.kind() {
            PathKind::Lan => connected.lan.add(1),
            PathKind::Direct => connected.direct.add(1),
            PathKind::HolePunched => connected.hole_punched.add(1),
            PathKind::Relayed { .. } => connected.relayed.add(1),
        }
        debug!(%node, path = path.kind().as_str(), "member connected");
        let (direct, is_relay) = (path.is_direct(), self.relays.contains(&node));
        let (ours, transport) = (path.ours, path.transport);
        // One of each transport is kept: a second one, such as a relay makes to find out whether it can, ends when idle.
        let mut others = self.peers.paths(&node).iter();
        let second = others.any(|other| other.transport == path.transport && other.pinned.load(Ordering::Relaxed));
        path.pinned.store(direct && !second && (is_relay || path.on_link), Ordering::Relaxed);
        self.peers.put(&node, path);
        self.publish();
        self.found(&node);
        if direct && is_relay {
            self.forget_failures();
            self.relays.connected(&node, Instant::now());
        }
        if direct && self.peers.paths(&node).iter().filter(|path| path.is_direct()).count() > 1 {
            self.after(SHED, Task::Shed(node.clone()));
        } else if direct && ours && transport == Transport::Quic {
            self.after(TRY_TCP, Task::TryTcp(node.clone()));
        }
        if relayed_before {
            self.after(RETIRE, Task::Retire(node));
        } else if !direct && self.peers.paths(&node).iter().all(|path| !path.is_direct()) {
            // Both sides may try; the one that was called lets the other begin.
            self.upgrade_anew(&node, if outbound { Duration::ZERO } else { Duration::from_secs(1) }, false);
        }
    }

    fn on_closed(&mut self, connection: ConnectionId, why: &str) {
        self.outbound.remove(&connection);
        self.ping_failures.remove(&connection);
        self.payload.remove(&connection);
        self.dial_failed(connection, why);
        let Some((node, path)) = self.peers.take(connection) else { return };
        debug!(%node, path = path.kind().as_str(), "connection to member ended: {why}");
        if !std::mem::replace(&mut self.giving_back, true) {
            let since = self.gave_back.map_or(GIVE_BACK, |at| at.elapsed());
            self.after(ENDED.max(GIVE_BACK.saturating_sub(since)), Task::GiveBack);
        }
        self.publish();
        let direct_left = self.peers.paths(&node).iter().any(|path| path.is_direct());
        if path.pinned.load(Ordering::Relaxed) {
            let mut others = self.peers.paths(&node).iter();
            if let Some(heir) = others.find(|other| other.is_direct() && other.transport == path.transport) {
                heir.pinned.store(true, Ordering::Relaxed);
            }
        }
        if path.is_direct() && !direct_left {
            if self.relays.contains(&node) {
                self.relays.lost(&node, Instant::now(), random());
            } else if path.on_link && self.known(&path.peer) {
                self.after(Duration::from_secs_f64(1.0 + 2.0 * random()), Task::Neighbour(path.peer, 0));
            }
            if !self.peers.paths(&node).is_empty() {
                // A relay carries on; the hole may have been closed for good, and another be needed.
                self.upgrade_anew(&node, Duration::from_secs_f64(1.0 + random()), true);
            }
        }
        let tcp_left = |path: &Arc<Path>| path.is_direct() && path.transport == Transport::Tcp;
        if direct_left && tcp_left(&path) && !self.peers.paths(&node).iter().any(tcp_left) {
            self.verify(&node);
        }
    }

    /// Looks whether a node of which the last TCP connection has ended is still where other connections with it lead. Those of QUIC
    /// would not tell for seconds: the end of a process is told to TCP by its kernel, and to QUIC by nobody.
    fn verify(&mut self, node: &NodeName) {
        let mut left: BTreeMap<(PeerId, IpAddr), Vec<ConnectionId>> = BTreeMap::new();
        for path in self.peers.paths(node).iter().filter(|path| path.transport == Transport::Quic) {
            if let Some(remote) = path.remote {
                left.entry((path.peer, remote.ip())).or_default().push(path.connection);
            }
        }
        for ((peer, remote), connections) in left {
            let addresses = self.addresses(&peer, Transport::Tcp);
            let there = addresses.into_iter().filter(|address| ip(address) == Some(remote)).collect();
            self.dial(peer, there, Purpose::Verify(connections));
        }
    }

    fn on_dial_error(&mut self, connection: ConnectionId, peer: Option<PeerId>, error: &DialError) {
        if let DialError::WrongPeerId { address, .. } = error {
            // Also what another site with the same private addresses looks like, so it is no matter for a warning unless
            // the address was configured.
            debug!(%address, "who answers there is another than expected: is the PSK the same?");
            // With two keys a relay is dialled as either, and one of the two is always wrong.
            if let Some(Purpose::Relay(node)) = self.dials.get(&connection)
                && self.core.settings.psks.peer_ids(node).len() == 1
            {
                self.core.counters.wrong_identities.add(1);
            }
        }
        if let (Some(Purpose::Verify(dead)), true) = (self.dials.get(&connection).cloned(), is_refused(error)) {
            for connection in dead {
                debug!(%connection, "nobody listens where a connection leads; it is closed");
                self.swarm.close_connection(connection);
            }
        }
        let why = match error {
            DialError::Transport(errors) => {
                let each = errors.iter().take(3).map(|(address, error)| format!("{address}: {}", with_sources(error)));
                each.collect::<Vec<_>>().join(", ")
            }
            DialError::WrongPeerId { address, .. } => {
                format!("{address}: who answers has another identity; is the PSK the same on both nodes?")
            }
            DialError::LocalPeerId { .. }
            | DialError::NoAddresses
            | DialError::DialPeerConditionFalse(_)
            | DialError::Aborted
            | DialError::Denied { .. } => with_sources(error),
        };
        debug!(peer = peer.map(tracing::field::display), "dial failed: {why}");
        self.dial_failed(connection, &why);
    }

    fn on_stranger(&mut self, peer: PeerId) {
        if self.strangers.len() >= MAX_STRANGERS {
            self.strangers.retain(|_, since| since.elapsed() < STRANGER);
        }
        if self.strangers.len() < MAX_STRANGERS {
            self.strangers.insert(peer, Instant::now());
        }
    }
}

/// Whether every address that was dialled has answered that nobody listens there.
fn is_refused(error: &DialError) -> bool {
    // By its text, since libp2p wraps the system's error in types that do not give it back.
    let refused = io::Error::from_raw_os_error(libc::ECONNREFUSED).to_string();
    let DialError::Transport(errors) = error else { return false };
    !errors.is_empty() && errors.iter().all(|(_, error)| with_sources(error).ends_with(&refused))
}
