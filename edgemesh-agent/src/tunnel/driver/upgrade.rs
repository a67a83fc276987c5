//! Better paths to nodes, and the end of those that they have made needless.

use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use libp2p::PeerId;

use super::{Driver, Purpose, Task, random};
use crate::tunnel::{
    NodeName, Transport,
    gate::ip,
    paths::{Path, PathKind},
};

/// How long an idle relayed connection is kept beside another.
pub(super) const RETIRE: Duration = Duration::from_secs(30);

/// How long an idle QUIC connection is kept beside one of TCP.
pub(super) const SHED: Duration = Duration::from_secs(5);

/// How long TCP is tried alone.
pub(super) const HEAD_START: Duration = Duration::from_millis(500);

/// When TCP is tried beside QUIC.
pub(super) const TRY_TCP: Duration = Duration::from_secs(1);

/// Direct paths that were not to be had for hours will not be had for a while.
const LONGEST_UPGRADE_PAUSE: Duration = Duration::from_secs(3600);

impl Driver<'_> {
    /// Begins to try for a direct path to a node after `wait`, whatever has been tried before. A circuit punches a hole when
    /// it begins: `again` is for those that have begun.
    pub(super) fn upgrade_anew(&mut self, node: &NodeName, wait: Duration, again: bool) {
        self.schedule.retain(|_, task| !matches!(task, Task::Upgrade(other, _) if other == node));
        self.after(wait, Task::Upgrade(node.clone(), u32::from(again)));
    }

    /// The network has changed: what was out of reach may be near.
    pub(super) fn on_moved(&mut self) {
        self.update_relay_role();
        let members: HashSet<PeerId> = self.peers.all().map(|(_, path)| path.peer).collect();
        self.swarm.behaviour_mut().inner.identify.push(members);
        let is_relayed = |node: &&NodeName| matches!(self.peers.path(node), Some(PathKind::Relayed { .. }));
        let relayed: Vec<NodeName> = self.peers.nodes().filter(is_relayed).cloned().collect();
        for node in relayed {
            self.upgrade_anew(&node, Duration::from_secs_f64(random()), true);
        }
    }

    pub(super) fn upgrade(&mut self, node: &NodeName, attempt: u32) {
        let Some(path) = self.peers.paths(node).first().filter(|path| !path.is_direct()) else { return };
        let peer = path.peer;
        if self.dial(peer, self.addresses(&peer, Transport::Tcp), Purpose::Other) {
            self.after(HEAD_START, Task::TryQuic(node.clone()));
        } else {
            self.try_quic(node);
        }
        if attempt > 0 && self.core.settings.hole_punching {
            // Holes are punched when a circuit begins, with the addresses that are known then, and not later.
            self.dial(peer, self.circuit_addresses(node), Purpose::Other);
        }
        let pause =
            Duration::from_secs(15).saturating_mul(1 << attempt.saturating_sub(1).min(8)).min(LONGEST_UPGRADE_PAUSE);
        self.after(pause.mul_f64(1.0 + random() / 2.0), Task::Upgrade(node.clone(), attempt + 1));
    }

    pub(super) fn retire(&mut self, node: &NodeName) {
        let paths = self.peers.paths(node);
        // A hole may close as soon as it has been punched.
        let proven = |path: &&Arc<Path>| path.is_direct() && !path.is_doubtful() && path.rtt().is_some();
        let needed = usize::from(!paths.iter().any(|path| proven(&path)));
        let relayed: Vec<_> = paths.iter().filter(|path| !path.is_direct()).skip(needed).cloned().collect();
        let mut busy = needed > 0 && paths.iter().any(|path| path.is_direct());
        for path in relayed {
            if path.is_idle() {
                self.swarm.close_connection(path.connection);
            } else {
                busy = true;
            }
        }
        if busy {
            self.after(RETIRE, Task::Retire(node.clone()));
        }
    }

    /// Whoever dials both transports, as for a hole, gets both, and two that dial each other get two of each. Between a relay
    /// and those it serves each transport tells how their NATs treat it, so both stay; what the relay has dialled to find out
    /// whether they can be reached is not needed for long.
    pub(super) fn shed(&mut self, node: &NodeName) {
        let surplus = match (self.relays.contains(node), self.serves) {
            (true, _) => return,
            (false, true) => self.peers.own_doubles(node),
            (false, false) => self.peers.surplus(node),
        };
        let mut busy = false;
        for path in surplus {
            path.pinned.store(false, Ordering::Relaxed);
            if path.is_idle() {
                self.swarm.close_connection(path.connection);
            } else {
                busy = true;
            }
        }
        if busy {
            self.after(SHED, Task::Shed(node.clone()));
        }
    }

    /// A node that TCP has not reached directly is tried by QUIC.
    pub(super) fn try_quic(&mut self, node: &NodeName) {
        let Some(path) = self.peers.paths(node).first().filter(|path| !path.is_direct()) else { return };
        let peer = path.peer;
        self.dial(peer, self.addresses(&peer, Transport::Quic), Purpose::Other);
    }

    /// A node that was met by QUIC is tried by TCP as well, which moves more bytes for the same work.
    pub(super) fn try_tcp(&mut self, node: &NodeName) {
        let direct: Vec<_> = self.peers.paths(node).iter().filter(|path| path.is_direct()).cloned().collect();
        let Some(quic) = direct.first().filter(|_| direct.iter().all(|path| path.transport == Transport::Quic)) else {
            return;
        };
        // Through a hole of UDP nobody comes by TCP; where the peer is called at the same address, it may be.
        let at = quic.remote.map(|remote| remote.ip());
        let addresses = self.addresses(&quic.peer, Transport::Tcp).into_iter().filter(|address| ip(address) == at);
        let addresses = addresses.collect();
        self.dial(quic.peer, addresses, Purpose::Other);
    }
}
