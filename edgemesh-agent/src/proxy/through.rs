//! Dialling through the tunnel.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use bytes::Bytes;
use tokio::{net::TcpStream, time::Instant};

use super::{Carry, Dial, ReceiveDatagram, Refusal, SendDatagram};
use crate::tunnel::{Cut, DatagramStream, MAX_DATAGRAM, NodeName, OpenError, Passed, Stream, Tunnel, splice};

/// Dials by the tunnel, from the moment that there is one. Cheap to clone; all clones see the same.
#[derive(Clone, Default)]
pub struct Through(Arc<OnceLock<Tunnel>>);

impl Through {
    /// The tunnel has started; only the first one counts.
    pub fn set(&self, tunnel: Tunnel) {
        let _already = self.0.set(tunnel);
    }

    /// None until it has started.
    pub fn tunnel(&self) -> Option<&Tunnel> {
        self.0.get()
    }

    fn to(&self, node: &str) -> Result<(&Tunnel, NodeName), Refusal> {
        let tunnel = self.0.get().ok_or(Refusal::NoTunnel)?;
        // What the API server takes for a node's name is one here, too; static manifests may hold anything.
        Ok((tunnel, node.parse().map_err(|_| Refusal::NoPath)?))
    }
}

impl std::fmt::Debug for Through {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Through").field("started", &self.0.get().is_some()).finish()
    }
}

impl Dial for Through {
    type Stream = Stream;
    type Sender = Sender;
    type Receiver = Receiver;

    async fn dial_tcp(&self, node: &str, addr: SocketAddr, deadline: Instant) -> Result<Stream, Refusal> {
        let (tunnel, node) = self.to(node)?;
        let patience = deadline.saturating_duration_since(Instant::now());
        Ok(tunnel.open_tcp(&node, addr, patience).await?)
    }

    async fn open_udp(&self, node: &str, addr: SocketAddr, deadline: Instant) -> Result<(Sender, Receiver), Refusal> {
        let (tunnel, node) = self.to(node)?;
        let patience = deadline.saturating_duration_since(Instant::now());
        let flow = Flow(Arc::new(Mutex::new(tunnel.open_udp(&node, addr, patience).await?)));
        Ok((Sender(flow.clone()), Receiver(flow)))
    }
}

impl Carry for Stream {
    async fn carry(self, client: &mut TcpStream, passed: Passed<'_>) -> Result<(), Cut> {
        splice(client, self, passed).await
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
struct Flow(Arc<Mutex<DatagramStream>>);

impl Flow {
    fn lock(&self) -> MutexGuard<'_, DatagramStream> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends datagrams by the tunnel.
pub struct Sender(Flow);

impl SendDatagram for Sender {
    async fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        // As long as only IPv6 has them; too long for the far side's socket, perhaps, and no reason to end the flow.
        if datagram.len() > MAX_DATAGRAM {
            return Ok(());
        }
        poll_fn(|cx| self.0.lock().poll_send(cx, datagram)).await?;
        poll_fn(|cx| self.0.lock().poll_flush(cx)).await
    }
}

/// Receives datagrams by the tunnel.
pub struct Receiver(Flow);

impl ReceiveDatagram for Receiver {
    async fn receive(&mut self) -> io::Result<Bytes> {
        let mut datagram = Vec::new();
        if poll_fn(|cx| self.0.lock().poll_recv(cx, &mut datagram)).await? {
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
