//! Connections and flows that need no tunnel: to this node itself, and to what its own routes lead to.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{
        TcpStream, UdpSocket,
        tcp::{ReadHalf, WriteHalf},
    },
    time::{Instant, timeout_at},
};
use tracing::debug;

use super::{Carry, ReceiveDatagram, Refusal, SendDatagram};
use crate::{
    net::keep_alive,
    tunnel::{Cut, Passed},
};

/// So much is read at a time, in bytes; a connection that waits holds no memory for it.
const PIECE: usize = 32 << 10;
/// The largest datagram.
const LARGEST: usize = 65_535;

/// A connection of this node's own.
#[derive(Debug)]
pub struct Direct(TcpStream);

impl Direct {
    /// Connects to an address that a route leads to.
    ///
    /// # Errors
    ///
    /// [`Refusal`], by the deadline.
    pub async fn connect(addr: SocketAddr, deadline: Instant) -> Result<Self, Refusal> {
        let connected =
            timeout_at(deadline, TcpStream::connect(addr)).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()));
        let stream = connected.map_err(|error| refusal_of(&error))?;
        // Whoever is in front of this one has gathered what belongs together.
        let _ = stream.set_nodelay(true);
        if let Err(error) = keep_alive(&stream) {
            debug!(%addr, "an end that vanishes will not be missed: {error}");
        }
        Ok(Self(stream))
    }
}

impl Carry for Direct {
    async fn carry(self, client: &mut TcpStream, passed: Passed<'_>) -> Result<(), Cut> {
        let mut joined = Joined { near: client, far: self.0, finished: false };
        let result = joined.run(passed).await;
        joined.finished = result.is_ok();
        result
    }
}

/// Two connections that end together; reset when they are dropped before both directions have ended, as closing would tell
/// each side that it has everything.
struct Joined<'a> {
    near: &'a mut TcpStream,
    far: TcpStream,
    finished: bool,
}

impl Drop for Joined<'_> {
    fn drop(&mut self) {
        if !self.finished {
            for side in [&*self.near, &self.far] {
                let _ = side.set_zero_linger();
            }
        }
    }
}

impl Joined<'_> {
    async fn run(&mut self, passed: Passed<'_>) -> Result<(), Cut> {
        let ((near, mut to_near), (far, mut to_far)) = (self.near.split(), self.far.split());
        let mut up = pin!(pass((&near, Cut::Socket), (&mut to_far, Cut::Stream), passed.up));
        let mut down = pin!(pass((&far, Cut::Stream), (&mut to_near, Cut::Socket), passed.down));
        // A side that has sent its last byte is not read any more, and may yet be reset.
        tokio::select! {
            ended = &mut up => {
                ended?;
                tokio::select! {
                    ended = &mut down => ended,
                    error = failure(&near) => Err(Cut::Socket(error)),
                }
            }
            ended = &mut down => {
                ended?;
                tokio::select! {
                    ended = &mut up => ended,
                    error = failure(&far) => Err(Cut::Stream(error)),
                }
            }
        }
    }
}

/// Passes one direction on to its end, which is passed on, too.
async fn pass(
    (from, reading): (&ReadHalf<'_>, fn(io::Error) -> Cut),
    (to, writing): (&mut WriteHalf<'_>, fn(io::Error) -> Cut),
    count: &AtomicU64,
) -> Result<(), Cut> {
    loop {
        from.readable().await.map_err(reading)?;
        let mut piece = Vec::with_capacity(PIECE);
        match from.try_read_buf(&mut piece) {
            // The other side may have gone meanwhile, which reading from it will say better.
            Ok(0) => {
                let _ = to.shutdown().await;
                return Ok(());
            }
            Ok(length) => {
                to.write_all(&piece).await.map_err(writing)?;
                count.fetch_add(length as u64, Ordering::Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(reading(error)),
        }
    }
}

/// Comes when a connection that nobody reads is reset.
async fn failure(side: &ReadHalf<'_>) -> io::Error {
    match side.ready(Interest::ERROR).await {
        Ok(_) => {
            let told = side.as_ref().take_error();
            told.ok().flatten().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into())
        }
        Err(error) => error,
    }
}

/// One end of a flow of this node's own; clones are the same.
#[derive(Clone, Debug)]
pub struct DirectFlow(Arc<UdpSocket>);

impl DirectFlow {
    /// A socket that is connected to an address that a route leads to.
    ///
    /// # Errors
    ///
    /// There is no socket to be had, or no route.
    pub async fn open(addr: SocketAddr) -> Result<Self, Refusal> {
        let any = if addr.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let open = async {
            let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
            socket.connect(addr).await?;
            Ok::<_, io::Error>(Self(Arc::new(socket)))
        };
        open.await.map_err(|error| refusal_of(&error))
    }
}

impl SendDatagram for DirectFlow {
    async fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        match self.0.send(datagram).await {
            Err(error) if !is_of_one_datagram(&error) => Err(error),
            Ok(_) | Err(_) => Ok(()),
        }
    }
}

impl ReceiveDatagram for DirectFlow {
    async fn receive(&mut self) -> io::Result<Bytes> {
        loop {
            self.0.readable().await?;
            // Held while there is something to be read, and no longer: most flows are silent.
            let mut datagram = Vec::with_capacity(LARGEST);
            match self.0.try_recv_buf(&mut datagram) {
                Ok(_) => {
                    datagram.shrink_to_fit();
                    return Ok(datagram.into());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock || is_of_one_datagram(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Whether it tells of a datagram, nobody took it or it is too large, and not of the socket.
fn is_of_one_datagram(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNREFUSED | libc::EMSGSIZE | libc::ENOBUFS | libc::EPERM | libc::EHOSTUNREACH | libc::ENETUNREACH
        )
    )
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "addresses without a route, firewalls, interfaces that are down: all is one to who asked"
)]
fn refusal_of(error: &io::Error) -> Refusal {
    use io::ErrorKind as K;
    match error.kind() {
        K::ConnectionRefused | K::ConnectionReset => Refusal::Refused,
        K::TimedOut => Refusal::TimedOut,
        _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)) => {
            Refusal::Overloaded
        }
        _ => Refusal::Unreachable,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{io::AsyncReadExt, net::TcpListener, task::JoinSet, time::timeout};

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn soon() -> Instant {
        Instant::now() + LONG
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        (near.unwrap(), far.unwrap().0)
    }

    /// A client, a server and what joins them.
    async fn joined() -> (TcpStream, TcpStream, JoinSet<(Result<(), Cut>, u64, u64)>) {
        let (client, mut near) = pair().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let direct = Direct::connect(listener.local_addr().unwrap(), soon()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let mut carrying = JoinSet::new();
        carrying.spawn(async move {
            let (up, down) = (AtomicU64::new(0), AtomicU64::new(0));
            let ended = direct.carry(&mut near, Passed { up: &up, down: &down }).await;
            (ended, up.into_inner(), down.into_inner())
        });
        (client, server, carrying)
    }

    #[tokio::test]
    async fn each_direction_ends_by_itself_and_all_bytes_are_counted() {
        let (mut client, mut server, mut carrying) = joined().await;
        client.write_all(&vec![7; 1 << 20]).await.unwrap();
        client.shutdown().await.unwrap();
        let mut received = Vec::new();
        let all = timeout(LONG, server.read_to_end(&mut received)).await.unwrap().unwrap();
        assert_eq!((all, received.iter().all(|byte| *byte == 7)), (1 << 20, true));
        server.write_all(b"done").await.unwrap();
        drop(server);
        let mut answer = String::new();
        timeout(LONG, client.read_to_string(&mut answer)).await.unwrap().unwrap();
        let (ended, up, down) = timeout(LONG, carrying.join_next()).await.unwrap().unwrap().unwrap();
        assert_eq!((&*answer, ended.is_ok(), up, down), ("done", true, 1 << 20, 4));
    }

    #[tokio::test]
    async fn a_reset_is_passed_on_also_by_a_side_that_has_sent_its_last_byte() {
        for half_closed in [false, true] {
            let (mut client, mut server, mut carrying) = joined().await;
            if half_closed {
                client.shutdown().await.unwrap();
                assert_eq!(timeout(LONG, server.read(&mut [0])).await.unwrap().unwrap(), 0);
            }
            client.set_zero_linger().unwrap();
            drop(client);
            let (ended, ..) = timeout(LONG, carrying.join_next()).await.unwrap().unwrap().unwrap();
            assert!(matches!(ended, Err(Cut::Socket(_))), "{half_closed}: {ended:?}");
            let told = timeout(LONG, server.write_all(&[0; 64])).await.unwrap();
            let told = match told {
                Ok(()) => timeout(LONG, server.read(&mut [0])).await.unwrap().map(drop),
                Err(error) => Err(error),
            };
            assert!(told.is_err(), "{half_closed}: the server must not take it for an end");
        }
    }

    #[tokio::test]
    async fn given_up_both_sides_are_reset() {
        let (mut client, mut server, mut carrying) = joined().await;
        client.write_all(b"begun").await.unwrap();
        timeout(LONG, server.read_exact(&mut [0; 5])).await.unwrap().unwrap();
        carrying.abort_all();
        for side in [&mut client, &mut server] {
            let error = timeout(LONG, side.read(&mut [0])).await.unwrap().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
    }

    #[tokio::test]
    async fn a_port_without_a_listener_refuses() {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        assert_eq!(Direct::connect(free, soon()).await.unwrap_err(), Refusal::Refused);
    }

    #[tokio::test]
    async fn a_flow_outlives_a_server_that_was_not_there() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        drop(server);
        let mut flow = DirectFlow::open(address).await.unwrap();
        flow.send(b"lost").await.unwrap();
        let server = UdpSocket::bind(address).await.unwrap();
        flow.send(b"lost, perhaps").await.unwrap();
        flow.send(b"heard").await.unwrap();
        let mut buffer = [0; 64];
        let client = loop {
            let (length, client) = timeout(LONG, server.recv_from(&mut buffer)).await.unwrap().unwrap();
            if &buffer[..length] == b"heard" {
                break client;
            }
        };
        server.send_to(b"answer", client).await.unwrap();
        assert_eq!(timeout(LONG, flow.receive()).await.unwrap().unwrap(), "answer");
    }
}
