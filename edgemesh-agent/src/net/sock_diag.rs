//! Ends connected UDP sockets to backends that are gone, in every network namespace of the node.
//!
//! A UDP socket is translated once, by connect(2); when its backend goes away nothing tells the application. Here such a
//! socket is found and ended, so that the application sees ECONNABORTED and connects anew, as Cilium's socket
//! termination does. What is ended is exact: a socket in state ESTABLISHED whose peer is the backend, which the
//! [`Ours`] check claims, by the id and cookie the kernel listed it under. [`spawn`] starts the thread that does all of it;
//! the rest are its parts.
//!
//! Capabilities: CAP_SYS_PTRACE (to open `/proc/PID/ns/net`), CAP_SYS_ADMIN (to enter it), CAP_NET_ADMIN (SOCK_DESTROY);
//! and the host's PID namespace, where the processes of all pods are seen.

mod namespace;
#[cfg(test)]
mod tests;
mod wire;
mod worker;

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, setsockopt,
            socket, sockopt,
        },
        time::{TimeVal, TimeValLike as _},
    },
};

pub use namespace::{Namespace, Namespaces, namespaces};
pub use wire::Socket;
use wire::{Body, Family};
pub use worker::{Busy, Ended, Handle, Ours, spawn};

/// How long the kernel may take over one answer; it gives them from memory, within the call that asks.
const ANSWER_DEADLINE: Duration = Duration::from_secs(1);
/// How long a whole dump may take, of however many sockets.
const DUMP_DEADLINE: Duration = Duration::from_secs(5);
/// Twice what the kernel puts into one datagram of a dump (`netlink_dump` in net/netlink/af_netlink.c).
const BUFFER: usize = 64 << 10;

const LIST: &str = "list UDP sockets";
const DESTROY: &str = "end a UDP socket";

/// Why sockets cannot be found or ended, in one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel was built without what this needs, so it is no use to try again.
    #[error("this kernel cannot {attempt}: it was built without {option}")]
    Unsupported { attempt: &'static str, option: &'static str },
    #[error("cannot {attempt}: {error}{}", hint(.error, .capability))]
    Refused {
        attempt: &'static str,
        /// What the attempt needs, for the message where it is lacking.
        capability: &'static str,
        error: io::Error,
    },
    #[error("cannot run a thread to end UDP sockets: {0}")]
    Thread(#[source] io::Error),
}

fn hint(error: &io::Error, capability: &str) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => format!("; {capability} is needed"),
        _ => String::new(),
    }
}

/// The addresses of backends; an IPv4 address and its v4-mapped IPv6 form are the same.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Peers(HashSet<(IpAddr, u16)>);

impl Peers {
    /// Whether `peer` is one of them.
    pub fn contains(&self, peer: SocketAddr) -> bool {
        self.0.contains(&key(peer))
    }

    fn any_v4(&self) -> bool {
        self.0.iter().any(|(address, _)| address.is_ipv4())
    }
}

impl Extend<SocketAddr> for Peers {
    fn extend<T: IntoIterator<Item = SocketAddr>>(&mut self, peers: T) {
        self.0.extend(peers.into_iter().map(key));
    }
}

impl FromIterator<SocketAddr> for Peers {
    fn from_iter<T: IntoIterator<Item = SocketAddr>>(peers: T) -> Self {
        Self(peers.into_iter().map(key).collect())
    }
}

fn key(peer: SocketAddr) -> (IpAddr, u16) {
    (peer.ip().to_canonical(), peer.port())
}

/// A line to the kernel's sock_diag(7) for one network namespace. After an error of [`Diag::connected`] open another: the
/// broken dump may still be under way.
#[derive(Debug)]
pub struct Diag {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Diag {
    /// Opens a line to the namespace the calling thread is in; it stays with that one.
    ///
    /// # Errors
    ///
    /// The kernel has no sock_diag, or refuses a socket.
    pub fn open() -> Result<Self, Error> {
        let refused = |error| {
            if error == Errno::EPROTONOSUPPORT {
                return Error::Unsupported { attempt: LIST, option: "CONFIG_INET_DIAG" };
            }
            refused("open a sock_diag socket", error)
        };
        let socket =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, Some(SockProtocol::NetlinkSockDiag))
                .map_err(refused)?;
        let deadline = TimeVal::milliseconds(i64::try_from(ANSWER_DEADLINE.as_millis()).unwrap_or(i64::MAX));
        setsockopt(&socket, sockopt::ReceiveTimeout, &deadline).map_err(refused)?;
        // A netlink socket connected to the kernel (port 0) takes nothing from anybody else in the namespace.
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(refused)?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// The UDP sockets, of IPv4 and IPv6, that are connected to one of `peers`.
    ///
    /// Sockets that come or go meanwhile may or may not be among them.
    ///
    /// # Errors
    ///
    /// The kernel has no `udp_diag`, refuses, or does not answer within 6 s.
    pub fn connected(&mut self, peers: &Peers) -> Result<Vec<Socket>, Error> {
        let mut found = Vec::new();
        if peers.any_v4() {
            self.dump(Family::V4, peers, &mut found)?;
        }
        // IPv6 sockets can have v4-mapped peers.
        self.dump(Family::V6, peers, &mut found)?;
        Ok(found)
    }

    /// Ends a socket: its pending and its next call fail with ECONNABORTED, and it is connected no more. Says whether it
    /// was there; a socket that was closed, or connected to another peer, since it was listed is left alone.
    ///
    /// The kernel looks the socket up by its addresses and then compares the cookie. So where several sockets share all
    /// addresses (`SO_REUSEPORT`), only the first of them is found; the next can be ended after it. And a socket bound to
    /// a port of its choice that was disconnected (`AF_UNSPEC`) since it was listed is still found: it stays bound, but its
    /// next call fails once. To keep that unlikely, end sockets right after listing them.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] without CONFIG_INET_DIAG_DESTROY; or the kernel refuses, or does not answer within 1 s.
    pub fn destroy(&mut self, socket: &Socket) -> Result<bool, Error> {
        let failed = |error| refused(DESTROY, error);
        let sequence = self.send(|sequence| wire::destroy(sequence, socket)).map_err(failed)?;
        let deadline = Instant::now() + ANSWER_DEADLINE;
        loop {
            for message in wire::messages(self.receive(deadline).map_err(failed)?) {
                match message.map_err(|_| failed(Errno::EBADMSG))?.answers(sequence) {
                    Some(Body::Status(status)) => return destroyed(status),
                    Some(Body::Socket(_) | Body::Done(_) | Body::Other) | None => {}
                }
            }
        }
    }

    fn dump(&mut self, family: Family, peers: &Peers, found: &mut Vec<Socket>) -> Result<(), Error> {
        let failed = |error| {
            // No handler for UDP, nor a module that has one.
            if error == Errno::ENOENT {
                return Error::Unsupported { attempt: LIST, option: "CONFIG_INET_UDP_DIAG" };
            }
            refused(LIST, error)
        };
        let sequence = self.send(|sequence| wire::dump(sequence, family)).map_err(failed)?;
        let deadline = Instant::now() + DUMP_DEADLINE;
        loop {
            for message in wire::messages(self.receive(deadline).map_err(failed)?) {
                match message.map_err(|_| failed(Errno::EBADMSG))?.answers(sequence) {
                    Some(Body::Socket(socket)) if peers.contains(socket.peer) => found.push(socket),
                    Some(Body::Done(status) | Body::Status(status)) => return status.map_err(failed),
                    Some(Body::Socket(_) | Body::Other) | None => {}
                }
            }
        }
    }

    fn send<const N: usize>(&mut self, request: impl FnOnce(u32) -> [u8; N]) -> Result<u32, Errno> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = request(self.sequence);
        loop {
            match send(self.socket.as_raw_fd(), &request, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                sent => return sent.map(|_| self.sequence),
            }
        }
    }

    /// The next datagram; ETIMEDOUT when there is none in time.
    fn receive(&mut self, deadline: Instant) -> Result<&[u8], Errno> {
        loop {
            if Instant::now() >= deadline {
                return Err(Errno::ETIMEDOUT);
            }
            // MSG_TRUNC: the length of the datagram, also where the buffer is shorter.
            match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_TRUNC) {
                Ok(length) => return self.buffer.get(..length).ok_or(Errno::EMSGSIZE),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(Errno::ETIMEDOUT),
                Err(error) => return Err(error),
            }
        }
    }
}

fn destroyed(status: Result<(), Errno>) -> Result<bool, Error> {
    match status {
        Ok(()) => Ok(true),
        // No such addresses any more, or the cookie of another socket.
        Err(Errno::ENOENT) => Ok(false),
        Err(Errno::EOPNOTSUPP) => Err(Error::Unsupported { attempt: DESTROY, option: "CONFIG_INET_DIAG_DESTROY" }),
        Err(error) => Err(refused(DESTROY, error)),
    }
}

fn refused(attempt: &'static str, error: Errno) -> Error {
    Error::Refused { attempt, capability: "CAP_NET_ADMIN", error: error.into() }
}
