//! Dialling through the tunnel, and this node itself.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use bytes::Bytes;
use tokio::{net::TcpStream, time::Instant};

use super::{Carry, Dial, Direct, DirectFlow, ReceiveDatagram, Refusal, SendDatagram};
use crate::{
    alias,
    tunnel::{
        Cut, DatagramStream, Decision, DialPolicy, MAX_DATAGRAM, NodeName, OpenError, Passed, Protocol, Stream, Target,
        Tunnel, always_refused, splice,
    },
};

/// Dials by the tunnel, from the moment that there is one, and this node itself without. Cheap to clone; all clones see
/// the same.
#[derive(Clone, Default)]
pub struct Through(Arc<Inner>);

#[derive(Default)]
struct Inner {
    tunnel: OnceLock<Tunnel>,
    own: Option<Own>,
}

/// This node, for those on it who name it.
struct Own {
    name: NodeName,
    policy: Arc<dyn DialPolicy>,
}

impl Through {
    /// One that dials `node` itself, by the rules that others of its mesh are held to.
    pub fn new(node: NodeName, policy: Arc<dyn DialPolicy>) -> Self {
        Self(Arc::new(Inner { tunnel: OnceLock::new(), own: Some(Own { name: node, policy }) }))
    }

    /// The tunnel has started; only the first one counts.
    pub fn set(&self, tunnel: Tunnel) {
        let _already = self.0.tunnel.set(tunnel);
    }

    /// None until it has started.
    pub fn tunnel(&self) -> Option<&Tunnel> {
        self.0.tunnel.get()
    }

    fn to(&self, node: &str) -> Result<(&Tunnel, NodeName), Refusal> {
        let tunnel = self.tunnel().ok_or(Refusal::NoTunnel)?;
        // What the API server takes for a node's name is one here, too; static manifests may hold anything.
        Ok((tunnel, node.parse().map_err(|_| Refusal::NoPath)?))
    }

    /// Where to connect for a target on this node; None for one on another.
    pub(crate) fn here(&self, node: &str, protocol: Protocol, target: Target) -> Option<Result<SocketAddr, Refusal>> {
        let own = self.0.own.as_ref().filter(|own| own.name.as_str() == node)?;
        Some(match own.policy.decide(&own.name, protocol, target) {
            Decision::Allowed(addr) => match always_refused(addr.ip()) {
                None => Ok(addr),
                Some(rule) => Err(Refusal::NotAllowed { rule: rule.to_owned() }),
            },
            Decision::NotAllowed { rule } => Err(Refusal::NotAllowed { rule }),
        })
    }
}

impl std::fmt::Debug for Through {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Through").field("started", &self.tunnel().is_some()).finish()
    }
}

impl Dial for Through {
    type Stream = Far;
    type Sender = Sender;
    type Receiver = Receiver;

    async fn dial_tcp(&self, node: &str, addr: SocketAddr, deadline: Instant) -> Result<Far, Refusal> {
        let target = alias::stream_target(addr);
        if let Some(here) = self.here(node, Protocol::Tcp, target) {
            return Direct::connect(here?, deadline).await.map(Far::Here);
        }
        let (tunnel, node) = self.to(node)?;
        let patience = deadline.saturating_duration_since(Instant::now());
        Ok(Far::There(tunnel.open_tcp(&node, target, patience).await?))
    }

    async fn open_udp(&self, node: &str, addr: SocketAddr, deadline: Instant) -> Result<(Sender, Receiver), Refusal> {
        let target = alias::stream_target(addr);
        if let Some(here) = self.here(node, Protocol::Udp, target) {
            let flow = DirectFlow::open(here?).await?;
            return Ok((Sender::Here(flow.clone()), Receiver::Here(flow)));
        }
        let (tunnel, node) = self.to(node)?;
        let patience = deadline.saturating_duration_since(Instant::now());
        let flow = Flow(Arc::new(Mutex::new(tunnel.open_udp(&node, target, patience).await?)));
        Ok((Sender::There(flow.clone()), Receiver::There(flow)))
    }
}

/// A connection to another node, or to this one.
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all are to other nodes, and a box would be an allocation for each"
)]
pub enum Far {
    There(Stream),
    Here(Direct),
}

impl Carry for Far {
    async fn carry(self, client: &mut TcpStream, passed: Passed<'_>) -> Result<(), Cut> {
        match self {
            Self::There(stream) => splice(client, stream, passed).await,
            Self::Here(direct) => direct.carry(client, passed).await,
        }
    }
}

impl From<OpenError> for Refusal {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Refused(_) => Self::Refused,
            OpenError::Unreachable(_) => Self::Unreachable,
            OpenError::NotAllowed { rule } => Self::NotAllowed { rule },
            OpenError::TimedOut(_) => Self::TimedOut,
            OpenError::Busy(_) => Self::Overloaded,
            OpenError::NoPath { .. } => Self::NoPath,
            OpenError::Stopped => Self::NoTunnel,
            OpenError::Protocol { .. } => Self::Failed(error.to_string()),
        }
    }
}

/// Both halves of a flow, which one task uses by turns: the lock is held for as long as a poll, and never contended.
#[derive(Clone)]
pub struct Flow(Arc<Mutex<DatagramStream>>);

impl Flow {
    fn lock(&self) -> MutexGuard<'_, DatagramStream> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends datagrams to another node, or to this one.
pub enum Sender {
    There(Flow),
    Here(DirectFlow),
}

impl SendDatagram for Sender {
    async fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        let flow = match self {
            Self::There(flow) => flow,
            Self::Here(flow) => return flow.send(datagram).await,
        };
        // As long as only IPv6 has them; too long for the far side's socket, perhaps, and no reason to end the flow.
        if datagram.len() > MAX_DATAGRAM {
            return Ok(());
        }
        poll_fn(|cx| flow.lock().poll_send(cx, datagram)).await?;
        poll_fn(|cx| flow.lock().poll_flush(cx)).await
    }
}

/// Receives datagrams of another node, or of this one.
pub enum Receiver {
    There(Flow),
    Here(DirectFlow),
}

impl ReceiveDatagram for Receiver {
    async fn receive(&mut self) -> io::Result<Bytes> {
        let flow = match self {
            Self::There(flow) => flow,
            Self::Here(flow) => return flow.receive().await,
        };
        let mut datagram = Vec::new();
        if poll_fn(|cx| flow.lock().poll_recv(cx, &mut datagram)).await? {
            Ok(datagram.into())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn without_a_tunnel_everything_is_refused_at_once() {
        let (through, addr) = (Through::default(), "10.244.1.2:80".parse().unwrap());
        let deadline = Instant::now() + Duration::from_secs(5);
        assert!(matches!(through.dial_tcp("edge1", addr, deadline).await, Err(Refusal::NoTunnel)));
        assert!(matches!(through.open_udp("edge1", addr, deadline).await, Err(Refusal::NoTunnel)));
    }

    #[tokio::test]
    async fn this_node_is_dialled_without_a_tunnel_and_by_its_own_rules() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let policy = move |from: &NodeName, _: Protocol, target: Target| match target {
            Target::Node { port: 22 } if from.as_str() == "edge1" => Decision::Allowed(address),
            Target::Node { .. } | Target::Address(_) => Decision::NotAllowed { rule: "no such port".to_owned() },
        };
        let through = Through::new("edge1".parse().unwrap(), Arc::new(policy));
        let deadline = Instant::now() + Duration::from_secs(5);
        let dial = async |node: &str, port| {
            through.dial_tcp(node, SocketAddr::new([0, 0, 0, 0].into(), port), deadline).await.err()
        };
        let rule = |rule: &str| Some(Refusal::NotAllowed { rule: rule.to_owned() });
        assert_eq!(dial("edge1", 23).await, rule("no such port"));
        assert_eq!(dial("edge2", 22).await, Some(Refusal::NoTunnel));
        assert_eq!(dial("edge1", 22).await, rule("loopback addresses are never dialled for others"));
    }

    #[test]
    fn refusals_say_what_the_far_side_said() {
        let rule = "no endpoint".to_owned();
        for (error, refusal) in [
            (OpenError::Refused("10.244.1.2:80".to_owned()), Refusal::Refused),
            (OpenError::NotAllowed { rule: rule.clone() }, Refusal::NotAllowed { rule }),
            (OpenError::TimedOut(String::new()), Refusal::TimedOut),
            (OpenError::Busy(String::new()), Refusal::Overloaded),
            (OpenError::NoPath { node: "a".parse().unwrap(), why: String::new() }, Refusal::NoPath),
            (OpenError::Stopped, Refusal::NoTunnel),
        ] {
            assert_eq!(Refusal::from(error), refusal);
        }
    }
}
