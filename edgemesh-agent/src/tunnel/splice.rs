//! Joins a local socket with a flow of the tunnel, at either end of it.

use std::{
    io,
    pin::{Pin, pin},
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::AsyncWrite as _,
    net::{TcpStream, UdpSocket},
    time::{Instant, Sleep, sleep},
};

use super::stream::{DatagramStream, FULL_FRAME, HEADER, MAX_DATAGRAM, Stream, with_scratch};

/// Pieces that one direction may move before others get their turn.
const TURN: usize = 16;

/// For how long nothing moves until each side that is not being read is asked whether it has been reset.
const STILL: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Direction {
    Open,
    Ending,
    Ended,
}

/// Which side of a spliced connection was lost.
#[derive(Debug, thiserror::Error)]
pub enum Cut {
    /// The local socket.
    #[error("its socket: {0}")]
    Socket(#[source] io::Error),
    /// The other end of the stream, or the tunnel itself.
    #[error("its stream: {0}")]
    Stream(#[source] io::Error),
}

/// Where the bytes that were passed on are counted.
#[derive(Clone, Copy, Debug)]
pub struct Passed<'a> {
    /// From the socket to the stream.
    pub up: &'a AtomicU64,
    /// From the stream to the socket.
    pub down: &'a AtomicU64,
}

/// Copies between a socket and a stream until both directions have ended. Each end, and a reset of either side, is passed
/// on as what it is; what one side does not take is not read from the other.
///
/// A connection that waits holds no buffer. A side that is not read, as the other one takes nothing, is asked every 2 s
/// whether it has been reset: what is still to be read of it is given up then.
///
/// Dropped before its end, it resets both.
///
/// # Errors
///
/// Either side was reset; both then are.
pub async fn splice(socket: &mut TcpStream, stream: Stream, passed: Passed<'_>) -> Result<(), Cut> {
    let (up, down) = (Direction::Open, Direction::Open);
    let mut splice =
        Splice { socket, stream, passed, up, down, unsent: Vec::new(), sent: 0, mark: [0; 4], finished: false };
    let mut patience = pin!(sleep(STILL));
    let result = std::future::poll_fn(|cx| match splice.poll(cx) {
        Poll::Ready(ended) => Poll::Ready(ended),
        Poll::Pending => splice.poll_unread(cx, patience.as_mut()),
    })
    .await;
    splice.finished = result.is_ok();
    result
}

struct Splice<'a> {
    socket: &'a mut TcpStream,
    stream: Stream,
    passed: Passed<'a>,
    /// From the socket to the stream.
    up: Direction,
    down: Direction,
    /// What the stream gave and the socket has not taken.
    unsent: Vec<u8>,
    sent: usize,
    /// How far everything was when it was last looked at.
    mark: [u64; 4],
    finished: bool,
}

impl Drop for Splice<'_> {
    fn drop(&mut self) {
        if !self.finished {
            // Closing would tell the peer that it has everything. The stream is reset by being dropped.
            let _ = self.socket.set_zero_linger();
        }
    }
}

impl Splice<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Cut>> {
        let up = self.poll_up(cx)?;
        let down = self.poll_down(cx)?;
        if up.is_ready() && down.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Cut>> {
        for _ in 0..TURN {
            match self.up {
                Direction::Open => {
                    ready!(self.stream.poll_drain(cx)).map_err(Cut::Stream)?;
                    ready!(self.socket.poll_read_ready(cx)).map_err(Cut::Socket)?;
                    let Self { socket, stream, passed, up, .. } = self;
                    with_scratch(|scratch| match socket.try_read(&mut scratch[HEADER..FULL_FRAME]) {
                        Ok(0) => {
                            *up = Direction::Ending;
                            Ok(())
                        }
                        Ok(count) => {
                            passed.up.fetch_add(count as u64, Ordering::Relaxed);
                            stream.put(cx, &mut scratch[..HEADER + count]).map_err(Cut::Stream)
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
                        Err(error) => Err(Cut::Socket(error)),
                    })?;
                }
                Direction::Ending => {
                    ready!(Pin::new(&mut self.stream).poll_shutdown(cx)).map_err(Cut::Stream)?;
                    self.up = Direction::Ended;
                }
                Direction::Ended => return Poll::Ready(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Cut>> {
        for _ in 0..TURN {
            match self.down {
                Direction::Open => {
                    ready!(self.poll_unsent(cx))?;
                    let Self { socket, stream, passed, down, unsent, sent, .. } = self;
                    ready!(with_scratch(|scratch| {
                        let count = ready!(stream.poll_get(cx, scratch)).map_err(Cut::Stream)?;
                        if count == 0 {
                            *down = Direction::Ending;
                            return Poll::Ready(Ok(()));
                        }
                        let taken = match socket.try_write(&scratch[..count]) {
                            Ok(taken) => taken,
                            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                            Err(error) => return Poll::Ready(Err(Cut::Socket(error))),
                        };
                        passed.down.fetch_add(taken as u64, Ordering::Relaxed);
                        if taken < count {
                            *unsent = scratch[taken..count].to_vec();
                            *sent = 0;
                        }
                        Poll::Ready(Ok(()))
                    }))?;
                }
                Direction::Ending => {
                    ready!(self.poll_unsent(cx))?;
                    // The peer may have gone meanwhile, which a reading side will say better.
                    let _ = ready!(Pin::new(&mut *self.socket).poll_shutdown(cx));
                    self.down = Direction::Ended;
                }
                Direction::Ended => return Poll::Ready(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_unsent(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Cut>> {
        while self.sent < self.unsent.len() {
            ready!(self.socket.poll_write_ready(cx)).map_err(Cut::Socket)?;
            match self.socket.try_write(&self.unsent[self.sent..]) {
                Ok(count) => {
                    self.sent += count;
                    self.passed.down.fetch_add(count as u64, Ordering::Relaxed);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(Cut::Socket(error))),
            }
        }
        self.unsent = Vec::new();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }

    /// Finds a side that was reset while nobody reads it, as the other side takes nothing or there is nothing more to
    /// come. Neither a socket nor a stream has somebody woken by its reset alone, so it is looked at from time to time,
    /// and never while anything moves: what was sent before a reset is passed on where it can be.
    fn poll_unread(&mut self, cx: &mut Context<'_>, mut patience: Pin<&mut Sleep>) -> Poll<Result<(), Cut>> {
        let socket_unread = self.up != Direction::Open || self.stream.is_full();
        let stream_unread = self.down != Direction::Open || !self.unsent.is_empty();
        if !socket_unread && !stream_unread {
            return Poll::Pending;
        }
        while patience.as_mut().poll(cx).is_ready() {
            patience.as_mut().reset(Instant::now() + STILL);
            let now = self.progress();
            if std::mem::replace(&mut self.mark, now) != now {
                continue;
            }
            if socket_unread && let Some(error) = self.socket.take_error().transpose() {
                return Poll::Ready(Err(Cut::Socket(error.unwrap_or_else(|error| error))));
            }
            if stream_unread {
                self.stream.check(cx).map_err(Cut::Stream)?;
            }
        }
        Poll::Pending
    }

    /// Differs once anything has moved.
    fn progress(&self) -> [u64; 4] {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [count(self.passed.up), count(self.passed.down), self.sent as u64, self.stream.drained() as u64]
    }
}

/// After which time without a datagram a UDP flow ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct UdpIdle {
    /// While nothing has come back; default 30 s (`nf_conntrack_udp_timeout`).
    pub unreplied: Duration,
    /// Afterwards; default 120 s (`nf_conntrack_udp_timeout_stream`). kube-proxy leaves both as the kernel has them.
    pub replied: Duration,
}

impl Default for UdpIdle {
    fn default() -> Self {
        Self { unreplied: Duration::from_secs(30), replied: Duration::from_secs(120) }
    }
}

/// Carries datagrams between a connected socket and a flow, until the flow ends or has been idle.
///
/// What the slower side has no room for waits in the socket's buffer, and is lost when that is full.
///
/// # Errors
///
/// The tunnel was lost, or the socket failed for good. That nobody listens at the peer is no error: it may come back.
pub async fn splice_udp(socket: &UdpSocket, stream: &mut DatagramStream, idle: UdpIdle) -> io::Result<()> {
    let (mut last, mut sent, mut received) = (Instant::now(), false, false);
    let mut datagram = Vec::new();
    loop {
        let limit = if sent && received { idle.replied } else { idle.unreplied };
        let moved = std::future::poll_fn(|cx| {
            let up = poll_udp_up(socket, stream, cx)?;
            let down = poll_udp_down(socket, stream, &mut datagram, cx)?;
            match (up, down) {
                (_, Poll::Ready(false)) => Poll::Ready(io::Result::Ok(None)),
                (Poll::Pending, Poll::Pending) => Poll::Pending,
                (up, down) => Poll::Ready(Ok(Some((up.is_ready(), down.is_ready())))),
            }
        });
        match tokio::time::timeout_at(last + limit, moved).await {
            Err(_) => return Ok(()),
            Ok(ended @ (Ok(None) | Err(_))) => return ended.map(|_| ()),
            Ok(Ok(Some((up, down)))) => {
                last = Instant::now();
                sent |= up;
                received |= down;
            }
        }
    }
}

/// Errors of a UDP socket that tell about a datagram sent earlier, and not about the socket.
fn passes(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(
        error.kind(),
        K::WouldBlock | K::ConnectionRefused | K::HostUnreachable | K::NetworkUnreachable | K::Interrupted
    ) || error.raw_os_error() == Some(libc::EMSGSIZE)
        || error.raw_os_error() == Some(libc::ENOBUFS)
}

/// Moves a turn of datagrams from the socket; ready if it moved any.
fn poll_udp_up(socket: &UdpSocket, stream: &mut DatagramStream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
    for turn in 0..TURN {
        let waits = stream.poll_drain(cx)?.is_pending() || socket.poll_recv_ready(cx)?.is_pending();
        if waits {
            return if turn == 0 { Poll::Pending } else { Poll::Ready(Ok(())) };
        }
        with_scratch(|scratch| match socket.try_recv(&mut scratch[HEADER..]) {
            Ok(count) => stream.put(cx, &mut scratch[..HEADER + count]),
            Err(error) if passes(&error) => Ok(()),
            Err(error) => Err(error),
        })?;
    }
    Poll::Ready(Ok(()))
}

/// Moves a turn of datagrams to the socket; ready if it moved any, and `false` when the flow has ended.
fn poll_udp_down(
    socket: &UdpSocket,
    stream: &mut DatagramStream,
    datagram: &mut Vec<u8>,
    cx: &mut Context<'_>,
) -> Poll<io::Result<bool>> {
    for turn in 0..TURN {
        // A socket that has just been made is not known to have room until the runtime has looked: `try_send` would refuse
        // the first datagram of a flow, which would be lost.
        let waits = socket.poll_send_ready(cx)?.is_pending();
        match if waits { Poll::Pending } else { stream.poll_recv(cx, datagram)? } {
            Poll::Pending => return if turn == 0 { Poll::Pending } else { Poll::Ready(Ok(true)) },
            Poll::Ready(false) => return Poll::Ready(Ok(false)),
            Poll::Ready(true) if datagram.len() > MAX_DATAGRAM => {}
            Poll::Ready(true) => match socket.try_send(datagram) {
                Ok(_) => {}
                Err(error) if passes(&error) => {}
                Err(error) => return Poll::Ready(Err(error)),
            },
        }
    }
    Poll::Ready(Ok(true))
}
