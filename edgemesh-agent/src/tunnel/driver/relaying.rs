//! Relays: the ones this node uses, and its own part as one.

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use futures::future::join_all;
use libp2p::{Multiaddr, autonat, core::transport::ListenerId, multiaddr::Protocol, relay};
use tracing::{debug, warn};

use super::{Driver, Purpose, Task, random, upgrade::HEAD_START};
use crate::tunnel::{NodeName, RelayAddress, RelayNode, ServeRelay, Settings, Transport, relays::Host};

/// How long a name of a relay may take to resolve.
const RESOLVE: Duration = Duration::from_secs(5);

/// The same where there are other addresses, which wait for it.
const RESOLVE_BESIDE: Duration = Duration::from_millis(500);

/// Addresses that one relay is dialled at.
const MAX_RELAY_ADDRESSES: usize = 16;

impl Driver<'_> {
    pub(super) fn set_relays(&mut self) {
        let gone = self.relays.set(&self.core.settings.relays, Instant::now());
        for node in &gone {
            for path in self.peers.paths(node) {
                path.pinned.store(false, Ordering::Relaxed);
            }
            let listeners = self.circuits.iter().filter(|(_, (relay, _))| relay == node);
            let listeners: Vec<(ListenerId, bool)> = listeners.map(|(id, (_, reserved))| (*id, *reserved)).collect();
            for (id, reserved) in listeners {
                if reserved {
                    self.circuits.remove(&id);
                    self.swarm.remove_listener(id);
                } else {
                    // The relay client takes it ill when the answer comes after its listener has gone.
                    self.scheduled += 1;
                    self.unlisten.insert(self.scheduled, id);
                    self.after(Duration::from_secs(20), Task::Unlisten(self.scheduled));
                }
            }
        }
        // Those that were connected before they became relays.
        let nodes: Vec<NodeName> = self.relays.nodes().cloned().collect();
        for node in nodes {
            let direct = self.peers.paths(&node).iter().filter(|path| path.is_direct());
            let mut connected = false;
            for path in direct {
                path.pinned.store(true, Ordering::Relaxed);
                connected = true;
            }
            if connected {
                self.relays.connected(&node, Instant::now());
            }
        }
        self.update_relay_role();
    }

    /// Relays for others, or not, and tells them where this node can be reached.
    pub(super) fn update_relay_role(&mut self) {
        let Settings { serve_relay, announce, .. } = &self.core.settings;
        let listed = self.relays.listed();
        let serves = match serve_relay {
            ServeRelay::Always => true,
            ServeRelay::WhenPublic => listed.is_some() || self.public,
            ServeRelay::WhenListed => listed.is_some(),
        };
        let mut external: Vec<Multiaddr> = announce.iter().flat_map(|address| self.multiaddrs(*address)).collect();
        for address in listed.into_iter().flat_map(|relay| &relay.addresses) {
            match &address.host {
                Host::Ip(ip) => external.extend(self.multiaddrs(SocketAddr::new(*ip, address.port))),
                Host::Name(name) => {
                    let base = Multiaddr::empty().with(Protocol::Dns(name.as_str().into()));
                    external.push(base.with(Protocol::Tcp(address.port)));
                }
            }
        }
        self.serves = serves;
        if serves && external.is_empty() {
            // A reservation without an address of the relay is void.
            external.extend(self.own_addresses());
        }
        for address in self.external.iter().filter(|address| !external.contains(address)) {
            self.swarm.remove_external_address(address);
        }
        for address in &external {
            self.swarm.add_external_address(address.clone());
        }
        self.external = external;
        let status = if serves { relay::Status::Enable } else { relay::Status::Disable };
        let mesh = &mut self.swarm.behaviour_mut().inner;
        mesh.relay.set_status(Some(status));
        if mesh.autonat_server.is_enabled() != serves {
            // New connections are asked; what runs on others goes on as it is.
            mesh.autonat_server = serves.then(autonat::v2::server::Behaviour::default).into();
        }
        self.tell_addresses();
    }

    pub(super) fn reserve(&mut self, node: &NodeName) {
        let direct = self.peers.paths(node).iter().find(|path| path.is_direct());
        let address = direct.and_then(|path| {
            let known = self.book.addresses(&path.peer).into_iter().next()?;
            Some(known.with(Protocol::P2p(path.peer)).with(Protocol::P2pCircuit))
        });
        let Some(address) = address else {
            return self.relays.lost(node, Instant::now(), random());
        };
        match self.swarm.listen_on(address) {
            Ok(id) => {
                self.circuits.insert(id, (node.clone(), false));
            }
            Err(error) => {
                debug!(relay = %node, "cannot ask for a reservation: {error}");
                self.relays.unreserved(node, Instant::now(), random());
            }
        }
    }

    pub(super) fn on_resolved(&mut self, relay: &RelayNode, addresses: &[SocketAddr]) {
        let node = &relay.node;
        if addresses.is_empty() {
            self.relay_trouble(node, "none of its addresses can be resolved");
            return self.relays.failed(node, Instant::now(), random());
        }
        let ids = self.core.settings.psks.peer_ids(node);
        let known: Vec<Multiaddr> = addresses.iter().flat_map(|address| self.multiaddrs(*address)).collect();
        for id in &ids {
            self.book.configured(*id, known.iter().cloned());
        }
        if self.peers.paths(node).iter().any(|path| path.is_direct()) {
            return self.relays.connected(node, Instant::now());
        }
        // Each transport by itself: only a relay that is reached over UDP sees what hole a NAT makes for UDP.
        // TCP first: circuits run on whichever was there first, and it moves more bytes for the same work.
        let mut by_tcp = false;
        for id in &ids {
            by_tcp |= self.dial(*id, self.addresses(id, Transport::Tcp), Purpose::Relay(node.clone()));
        }
        if by_tcp {
            self.after(HEAD_START, Task::RelayByQuic(node.clone()));
        } else {
            self.relay_by_quic(node);
        }
        if !self.schedule.values().any(|task| matches!(task, Task::Transports(other) if other == node)) {
            self.after(Duration::from_secs(60), Task::Transports(node.clone()));
        }
    }

    /// A relay is tried by QUIC once TCP has had its chance, whether that was taken or not.
    pub(super) fn relay_by_quic(&mut self, node: &NodeName) {
        self.schedule.retain(|_, task| !matches!(task, Task::RelayByQuic(other) if other == node));
        if !self.relays.contains(node) {
            return;
        }
        let direct: Vec<_> = self.peers.paths(node).iter().filter(|path| path.is_direct()).cloned().collect();
        if let Some(path) = direct.first() {
            if direct.iter().all(|path| path.transport == Transport::Tcp) {
                self.dial(path.peer, self.addresses(&path.peer, Transport::Quic), Purpose::Other);
            }
            return;
        }
        for id in self.core.settings.psks.peer_ids(node) {
            self.dial(id, self.addresses(&id, Transport::Quic), Purpose::Relay(node.clone()));
        }
        self.relay_failed_if_idle(node);
    }

    /// A way to a relay has failed: the next one, if there is one.
    pub(super) fn relay_dial_failed(&mut self, node: &NodeName) {
        if self.schedule.values().any(|task| matches!(task, Task::RelayByQuic(other) if other == node)) {
            self.relay_by_quic(node);
        } else {
            self.relay_failed_if_idle(node);
        }
    }

    fn relay_failed_if_idle(&mut self, node: &NodeName) {
        let dialling = self.dials.values().any(|purpose| matches!(purpose, Purpose::Relay(other) if other == node));
        if !dialling && !self.peers.paths(node).iter().any(|path| path.is_direct()) {
            self.relays.failed(node, Instant::now(), random());
        }
    }

    pub(super) fn relay_trouble(&mut self, node: &NodeName, why: &str) {
        match self.quiet.pass("relay", Instant::now()) {
            Some(left_out) => warn!(relay = %node, left_out, "relay cannot be reached: {why}"),
            None => debug!(relay = %node, "relay cannot be reached: {why}"),
        }
    }

    pub(super) fn complete_transports(&mut self, node: &NodeName) {
        if !self.relays.contains(node) {
            return;
        }
        let direct: Vec<_> = self.peers.paths(node).iter().filter(|path| path.is_direct()).cloned().collect();
        if let Some(peer) = direct.first().map(|path| path.peer) {
            for transport in [Transport::Tcp, Transport::Quic] {
                if !direct.iter().any(|path| path.transport == transport) {
                    self.dial(peer, self.addresses(&peer, transport), Purpose::Other);
                }
            }
        }
        self.after(Duration::from_secs(60).mul_f64(1.0 + random() / 2.0), Task::Transports(node.clone()));
    }
}

pub(super) async fn resolve(relay: RelayNode) -> (RelayNode, Vec<SocketAddr>) {
    let is_ip = |address: &RelayAddress| matches!(address.host, Host::Ip(_));
    let patience = if relay.addresses.iter().any(is_ip) { RESOLVE_BESIDE } else { RESOLVE };
    // All at once, so that a name that nobody answers for delays no other.
    let found = join_all(relay.addresses.iter().map(async |address| match &address.host {
        Host::Ip(ip) => vec![SocketAddr::new(*ip, address.port)],
        Host::Name(name) => {
            let lookup = tokio::net::lookup_host((name.as_str(), address.port));
            match tokio::time::timeout(patience, lookup).await {
                Ok(Ok(found)) => found.collect(),
                Ok(Err(error)) => {
                    debug!(relay = %relay.node, name, "cannot resolve: {error}");
                    Vec::new()
                }
                Err(_) => {
                    debug!(relay = %relay.node, name, "did not resolve within {patience:?}");
                    Vec::new()
                }
            }
        }
    }));
    let mut addresses: Vec<SocketAddr> = found.await.into_iter().flatten().collect();
    let mut seen = HashSet::new();
    addresses.retain(|address| seen.insert(*address));
    addresses.truncate(MAX_RELAY_ADDRESSES / 2);
    (relay, addresses)
}
