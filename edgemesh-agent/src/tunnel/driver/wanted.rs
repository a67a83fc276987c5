//! Nodes that somebody wants a stream to: tried over TCP, then QUIC, then through every relay.

use std::time::{Duration, Instant};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol, swarm::ConnectionId};
use tokio::sync::oneshot;

use super::{Driver, Purpose, Task};
use crate::tunnel::{NodeName, Transport};

/// Those who wait for one node.
const MAX_WAITERS: usize = 8192;

/// Reasons that are kept of one attempt.
const MAX_REASONS: usize = 6;

/// How long each way is given before the next is tried beside it.
const HEAD_START: Duration = Duration::from_millis(150);

/// How long relays that are being dialled for the first time are waited for.
const FIRST_RELAY: Duration = Duration::from_secs(1);

/// How long direct ways may keep those waiting for whom there is no other: much longer than one takes that is there, and
/// much shorter than the silence of an address of another network, which only a time-out ends.
const LAST_CHANCE: Duration = Duration::from_millis(800);

/// How long a failure is the answer to whoever asks next, at least.
const FAILED: Duration = Duration::from_millis(250);

/// Ways to a node, in the order in which they are tried.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    Tcp,
    Quic,
    Circuits,
    /// All ways are being tried.
    Last,
}

/// A node that is wanted, or was a moment ago.
pub(super) struct Want {
    waiters: Vec<oneshot::Sender<Result<(), String>>>,
    begun: Instant,
    stage: Stage,
    reasons: Vec<String>,
    /// When it failed, and why.
    failed: Option<(Instant, String)>,
}

impl Driver<'_> {
    pub(super) fn connect(&mut self, node: NodeName, reply: oneshot::Sender<Result<(), String>>) {
        if self.peers.paths(&node).iter().any(|path| !path.is_doubtful()) {
            self.publish_now();
            let _ = reply.send(Ok(()));
            return;
        }
        if node == self.core.settings.node {
            let _ = reply.send(Err("it is this node".to_owned()));
            return;
        }
        let dialling = self.is_dialling(&node);
        let circuits = self.is_dialling_circuits(&node) || self.circuit_addresses(&node).is_empty();
        let (mut stage, mut begun) = (Stage::Tcp, Instant::now());
        if let Some(want) = self.wanted.get_mut(&node) {
            match &want.failed {
                Some((at, why)) if at.elapsed() < FAILED || (dialling && circuits) => {
                    let _ = reply.send(Err(why.clone()));
                    return;
                }
                // Direct ways may be silent for seconds, and there is no use in trying the same again meanwhile. But a
                // relay may have heard of the node since.
                Some(_) if dialling => (stage, begun) = (Stage::Circuits, want.begun),
                Some(_) => {}
                None => {
                    want.waiters.retain(|waiter| !waiter.is_closed());
                    if want.waiters.len() < MAX_WAITERS {
                        want.waiters.push(reply);
                    } else {
                        let _ = reply.send(Err("too many are waiting for it".to_owned()));
                    }
                    return;
                }
            }
        }
        let (dials, is_fresh) = (&self.dials, |at: &Instant| at.elapsed() < FAILED);
        self.wanted.retain(|node, want| {
            want.failed.as_ref().is_none_or(|(at, _)| is_fresh(at) || dials.values().any(|dial| dial.is_for(node)))
        });
        let want = Want { waiters: vec![reply], begun, stage, reasons: Vec::new(), failed: None };
        self.wanted.insert(node.clone(), want);
        self.next_stage(&node);
    }

    /// Begins with the next way to a wanted node that there is; when there is none and nothing is under way, it failed.
    pub(super) fn next_stage(&mut self, node: &NodeName) {
        let ids = self.core.settings.psks.peer_ids(node);
        while let Some(want) = self.wanted.get_mut(node).filter(|want| want.failed.is_none()) {
            let stage = want.stage;
            let waits = stage == Stage::Circuits && self.relays.fresh() && want.begun.elapsed() < FIRST_RELAY;
            if waits && !self.relay_connected() {
                return self.after(HEAD_START, Task::Stage(node.clone()));
            }
            let Some(want) = self.wanted.get_mut(node) else { return };
            want.stage = match stage {
                Stage::Tcp => Stage::Quic,
                Stage::Quic => Stage::Circuits,
                Stage::Circuits => Stage::Last,
                Stage::Last => return self.fail_if_idle(node),
            };
            let mut dialled = false;
            for id in &ids {
                let addresses = match stage {
                    Stage::Tcp => self.addresses(id, Transport::Tcp),
                    Stage::Quic => self.addresses(id, Transport::Quic),
                    Stage::Circuits | Stage::Last => self.circuit_addresses(node),
                };
                let purpose = Purpose::Wanted { node: node.clone(), direct: stage != Stage::Circuits };
                dialled |= self.dial(*id, addresses, purpose);
            }
            if dialled {
                self.after(HEAD_START, Task::Stage(node.clone()));
                return;
            }
        }
    }

    /// The way through every relay that is connected; the peer at the end is put there by the dial.
    pub(super) fn circuit_addresses(&self, node: &NodeName) -> Vec<Multiaddr> {
        let relay = |relay: &NodeName| {
            let path = self.peers.paths(relay).iter().find(|path| path.is_direct())?;
            let known = self.book.addresses(&path.peer).into_iter().next()?;
            Some(known.with(Protocol::P2p(path.peer)).with(Protocol::P2pCircuit))
        };
        self.relays.nodes().filter(|other| *other != node).filter_map(relay).collect()
    }

    fn relay_connected(&self) -> bool {
        self.relays.nodes().any(|relay| self.peers.paths(relay).iter().any(|path| path.is_direct()))
    }

    /// A dial, or a connection that was not a member's, came to nothing.
    pub(super) fn dial_failed(&mut self, connection: ConnectionId, why: &str) {
        match self.dials.remove(&connection) {
            Some(Purpose::Wanted { node, .. }) => {
                if let Some(want) = self.wanted.get_mut(&node)
                    && want.reasons.len() < MAX_REASONS
                {
                    want.reasons.push(why.to_owned());
                }
                let last = self.wanted.get(&node).is_some_and(|want| want.stage == Stage::Last);
                if last || !self.is_dialling(&node) {
                    self.next_stage(&node);
                }
            }
            Some(Purpose::Relay(node)) => {
                self.relay_trouble(&node, why);
                self.relay_dial_failed(&node);
            }
            Some(Purpose::Verify(..) | Purpose::Other) | None => {}
        }
    }

    fn is_dialling(&self, node: &NodeName) -> bool {
        self.dials.values().any(|purpose| purpose.is_for(node))
    }

    fn is_dialling_circuits(&self, node: &NodeName) -> bool {
        self.dials
            .values()
            .any(|purpose| matches!(purpose, Purpose::Wanted { node: other, direct: false } if other == node))
    }

    fn fail_if_idle(&mut self, node: &NodeName) {
        let Some(begun) = self.wanted.get(node).map(|want| want.begun) else { return };
        if self.is_dialling_circuits(node) {
            return;
        }
        if self.is_dialling(node) {
            let left = LAST_CHANCE.saturating_sub(begun.elapsed());
            if !left.is_zero() {
                return self.after(left, Task::Stage(node.clone()));
            }
        }
        let relays = self.relay_connected();
        let Some(want) = self.wanted.get_mut(node) else { return };
        let mut why = want.reasons.join("; ");
        if why.is_empty() {
            why = "no address of it is known".to_owned();
        }
        if !relays {
            why.push_str("; no relay is connected");
        }
        for waiter in want.waiters.drain(..) {
            let _ = waiter.send(Err(why.clone()));
        }
        want.failed = Some((Instant::now(), why));
    }

    /// There is a relay more: what could not be reached may be now.
    pub(super) fn forget_failures(&mut self) {
        self.wanted.retain(|_, want| want.failed.is_none());
    }

    /// There is a path to `node`.
    pub(super) fn found(&mut self, node: &NodeName) {
        let waiters = self.wanted.remove(node).map(|want| want.waiters).unwrap_or_default();
        if waiters.is_empty() {
            return;
        }
        // They look for it where it is told.
        self.publish_now();
        for waiter in waiters {
            let _ = waiter.send(Ok(()));
        }
    }

    /// Forgets what a dial was for, since it has come to its end; gives back whether it was for a relay.
    pub(super) fn dial_done(&mut self, connection: ConnectionId) {
        self.dials.remove(&connection);
    }

    /// The direct addresses of a peer, to be tried again.
    pub(super) fn known(&self, peer: &PeerId) -> bool {
        !self.book.addresses(peer).is_empty()
    }
}
