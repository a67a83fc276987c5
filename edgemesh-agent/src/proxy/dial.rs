//! The seam to the tunnel: a pod on another node, or a node itself, is named, and a stream to it comes back, or why there
//! is none.

use std::{future::Future, io, net::SocketAddr};

use bytes::Bytes;
use tokio::{net::TcpStream, time::Instant};

use crate::tunnel::{Cut, Passed};

/// Gets to pods of other nodes, and to nodes.
///
/// An unspecified address (`0.0.0.0`, `::`) is the node itself, as in [`crate::alias::Target::addr`].
pub trait Dial: Send + Sync + 'static {
    type Stream: Carry;
    type Sender: SendDatagram;
    type Receiver: ReceiveDatagram;

    /// Connects to a port of a pod; done when the pod has accepted. What has not come about by the deadline is given up.
    fn dial_tcp(
        &self,
        node: &str,
        addr: SocketAddr,
        deadline: Instant,
    ) -> impl Future<Output = Result<Self::Stream, Refusal>> + Send;

    /// Opens a way for the datagrams of one client. A pod that does not listen may go unnoticed, as with UDP it does.
    fn open_udp(
        &self,
        node: &str,
        addr: SocketAddr,
        deadline: Instant,
    ) -> impl Future<Output = Result<(Self::Sender, Self::Receiver), Refusal>> + Send;
}

/// A connection to a pod.
pub trait Carry: Send + 'static {
    /// Passes bytes on between a client and the pod until both directions have ended. Each direction ends by itself, so
    /// a side that has sent all it has (FIN) may still listen. Dropped before, both sides are reset.
    ///
    /// # Errors
    ///
    /// One side was reset; both then are.
    fn carry(self, client: &mut TcpStream, passed: Passed<'_>) -> impl Future<Output = Result<(), Cut>> + Send;
}

/// Takes datagrams of one client to a pod.
pub trait SendDatagram: Send + 'static {
    /// Sends one, whole. Waits where there is no room on the way.
    fn send(&mut self, datagram: &[u8]) -> impl Future<Output = io::Result<()>> + Send;
}

/// Takes the pod's datagrams to one client.
pub trait ReceiveDatagram: Send + 'static {
    /// Receives one, whole. The end of the flow is `UnexpectedEof`.
    fn receive(&mut self) -> impl Future<Output = io::Result<Bytes>> + Send;
}

/// Why there is no way to a pod, or a node.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// Nothing listens there.
    #[error("the connection is refused there")]
    Refused,
    /// Its node does not get to it.
    #[error("its node does not get there")]
    Unreachable,
    /// The tunnel does not get to its node.
    #[error("no path leads to its node")]
    NoPath,
    /// Its node does not do that for others.
    #[error("its node does not allow it: {rule}")]
    NotAllowed { rule: String },
    #[error("not reached in time")]
    TimedOut,
    /// A limit on this side or that.
    #[error("there are too many connections")]
    Overloaded,
    /// The tunnel is not running.
    #[error("the tunnel is not running")]
    NoTunnel,
    /// The alias stands for nobody.
    #[error("the address stands for no pod, or for none any more")]
    NoSuchAlias,
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

impl Refusal {
    /// All kinds, in the order of [`Refusal::index`].
    pub(super) const KINDS: [&str; 9] = [
        "refused",
        "unreachable",
        "no_path",
        "not_allowed",
        "timed_out",
        "overloaded",
        "no_tunnel",
        "no_such_alias",
        "failed",
    ];

    pub(super) fn index(&self) -> usize {
        match self {
            Self::Refused => 0,
            Self::Unreachable => 1,
            Self::NoPath => 2,
            Self::NotAllowed { .. } => 3,
            Self::TimedOut => 4,
            Self::Overloaded => 5,
            Self::NoTunnel => 6,
            Self::NoSuchAlias => 7,
            Self::Failed(_) => 8,
        }
    }
}
