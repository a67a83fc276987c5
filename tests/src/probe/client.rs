//! One connection at a time: dialling, and exchanging messages with the servers of [`super::serve`].

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use futures::{SinkExt as _, StreamExt as _};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use hyper::header::HOST;
use hyper_util::rt::TokioIo;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket,
    sockopt::{Linger, ReceiveTimeout, ReuseAddr, SendTimeout},
};
use nix::sys::time::TimeVal;
use tokio_tungstenite::tungstenite::Message;

use super::message::{
    Dial, Ending, Failure, FanReply, HttpReply, HttpReport, Reply, Transport, parse_greeting, unspecified,
};

/// No greeting and no answer of a lab server is longer.
const LONGEST: usize = 512;
/// What clients send; servers send it back.
pub(super) const PAYLOAD: &str = "the quick brown fox";

/// A connected socket to an echo server.
pub(super) struct Connection {
    socket: Socket,
    target: SocketAddr,
    connect: Duration,
}

enum Socket {
    /// With the greeting of the server: its name, and this client's address as it sees it.
    Tcp(TcpStream, String, SocketAddr),
    Udp(UdpSocket),
}

impl Connection {
    /// Connects, and reads the greeting of a TCP server.
    pub(super) fn open(transport: Transport, dial: Dial) -> Result<Self, Failure> {
        let (fd, connect) = connect_blocking(transport, dial)?;
        let target = dial.target;
        let socket = match transport {
            Transport::Tcp => {
                let mut stream = TcpStream::from(fd);
                let (name, client) = read_greeting(&mut stream, target)?;
                Socket::Tcp(stream, name, client)
            }
            Transport::Udp => Socket::Udp(UdpSocket::from(fd)),
        };
        Ok(Self { socket, target, connect })
    }

    /// Sends a message and checks that the same comes back, each within `deadline`. A datagram that is `addressed` names
    /// the target, which the socket is connected to anyway.
    pub(super) fn exchange(&mut self, addressed: bool, deadline: Duration) -> Result<Reply, Failure> {
        let (target, connect) = (self.target, self.connect);
        match &mut self.socket {
            Socket::Tcp(stream, name, client) => {
                set_deadline(stream, deadline)?;
                stream
                    .write_all(PAYLOAD.as_bytes())
                    .map_err(|error| Failure::from_io(&format!("send to {target}"), &error))?;
                let mut echo = [0_u8; PAYLOAD.len()];
                stream
                    .read_exact(&mut echo)
                    .map_err(|error| Failure::from_io(&format!("receive from {target}"), &error))?;
                if echo != PAYLOAD.as_bytes() {
                    return Err(Failure::other(format!("{target} does not echo")));
                }
                let (peer, local) = names(stream.peer_addr(), stream.local_addr(), target)?;
                Ok(Reply { name: name.clone(), client: *client, peer, local, connect })
            }
            Socket::Udp(socket) => {
                set_deadline(socket, deadline)?;
                let payload = PAYLOAD.as_bytes();
                if addressed { socket.send_to(payload, target) } else { socket.send(payload) }
                    .map_err(|error| Failure::from_io(&format!("send to {target}"), &error))?;
                let mut answer = [0_u8; LONGEST];
                let length = socket
                    .recv(&mut answer)
                    .map_err(|error| Failure::from_io(&format!("receive from {target}"), &error))?;
                let (name, client) = parse_echo(&answer[..length], PAYLOAD, target)?;
                let (peer, local) = names(socket.peer_addr(), socket.local_addr(), target)?;
                Ok(Reply { name, client, peer, local, connect })
            }
        }
    }

    /// Sends one byte over TCP, and reads no answer.
    pub(super) fn say(&mut self, deadline: Duration) -> Result<(), Failure> {
        let Socket::Tcp(stream, ..) = &mut self.socket else { return Err(Failure::other("only TCP has an end")) };
        set_deadline(stream, deadline)?;
        stream.write_all(b"x").map_err(|error| Failure::from_io(&format!("send to {}", self.target), &error))
    }

    /// Reads a TCP connection to its end, after closing its own direction where it is to `finish`.
    pub(super) fn read_to_end(&mut self, finish: bool, deadline: Duration) -> Result<Ending, Failure> {
        let target = self.target;
        let Socket::Tcp(stream, ..) = &mut self.socket else { return Err(Failure::other("only TCP has an end")) };
        set_deadline(stream, deadline)?;
        if finish {
            stream
                .shutdown(std::net::Shutdown::Write)
                .map_err(|error| Failure::from_io(&format!("close one direction to {target}"), &error))?;
        }
        let (begin, mut rest) = (Instant::now(), Vec::new());
        let error = stream.read_to_end(&mut rest).err();
        let errno = error.and_then(|error| Failure::from_io("receive", &error).errno);
        Ok(Ending { rest: String::from_utf8_lossy(&rest).into_owned(), errno, took: begin.elapsed() })
    }

    /// Connects a UDP socket to another target.
    pub(super) fn reconnect(&mut self, target: SocketAddr) -> Result<(), Failure> {
        let Socket::Udp(socket) = &self.socket else { return Err(Failure::other("only UDP sockets reconnect")) };
        socket.connect(target).map_err(|error| Failure::from_io(&format!("connect to {target}"), &error))?;
        self.target = target;
        Ok(())
    }

    /// Closes at once, with a reset where TCP would otherwise leave a TIME_WAIT behind.
    pub(super) fn abort(self) {
        if let Socket::Tcp(stream, ..) = self.socket {
            reset_on_close(&stream);
        }
    }
}

/// Calls `connect()` on a new blocking socket and times only that call.
pub(super) fn connect_blocking(transport: Transport, dial: Dial) -> Result<(OwnedFd, Duration), Failure> {
    let target = dial.target;
    let what = || format!("connect to {target}");
    let kind = match transport {
        Transport::Tcp => SockType::Stream,
        Transport::Udp => SockType::Datagram,
    };
    let family = if target.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|errno| Failure::from_io("make a socket", &errno.into()))?;
    set_deadline(&fd, dial.deadline)?;
    if dial.port != 0 {
        let local = SockaddrStorage::from(unspecified(target, dial.port));
        setsockopt(&fd, ReuseAddr, &true)
            .and_then(|()| bind(fd.as_raw_fd(), &local))
            .map_err(|errno| Failure::from_io(&format!("bind a socket to port {}", dial.port), &errno.into()))?;
    }
    let address = SockaddrStorage::from(target);
    let begin = Instant::now();
    let outcome = connect(fd.as_raw_fd(), &address);
    let took = begin.elapsed();
    outcome.map_err(|errno| Failure::from_io(&what(), &errno.into()))?;
    Ok((fd, took))
}

/// One unconnected UDP socket, for sending to many servers.
pub(super) struct Unconnected(UdpSocket);

impl Unconnected {
    /// Makes a socket of the address family of `target`.
    pub(super) fn bind(target: SocketAddr) -> Result<Self, Failure> {
        let socket = UdpSocket::bind(unspecified(target, 0));
        socket.map(Self).map_err(|error| Failure::from_io("bind an unconnected socket", &error))
    }

    /// Sends a message and times only that call; then waits for the answer.
    pub(super) fn send(&self, dial: Dial) -> Result<Duration, Failure> {
        let target = dial.target;
        set_deadline(&self.0, dial.deadline)?;
        let begin = Instant::now();
        let sent = self.0.send_to(PAYLOAD.as_bytes(), target);
        let took = begin.elapsed();
        sent.map_err(|error| Failure::from_io(&format!("send to {target}"), &error))?;
        let mut answer = [0_u8; LONGEST];
        let (length, _) = self
            .0
            .recv_from(&mut answer)
            .map_err(|error| Failure::from_io(&format!("receive from {target}"), &error))?;
        parse_echo(&answer[..length], PAYLOAD, target)?;
        Ok(took)
    }
}

/// Makes closing send a reset instead of keeping the port in TIME_WAIT.
pub(super) fn reset_on_close(socket: &impl std::os::fd::AsFd) {
    // Refused only for sockets that are no sockets of the internet; then there is no TIME_WAIT either.
    let _ = setsockopt(socket, Linger, &libc::linger { l_onoff: 1, l_linger: 0 });
}

/// Sends one datagram to each target from one unconnected socket, and collects who answers from where.
pub(super) fn udp_fan(targets: &[SocketAddr], deadline: Duration) -> Result<Vec<Result<FanReply, Failure>>, Failure> {
    let first = *targets.first().ok_or_else(|| Failure::other("no targets"))?;
    let socket = UdpSocket::bind(unspecified(first, 0))
        .map_err(|error| Failure::from_io("bind an unconnected socket", &error))?;
    let payload = |index: usize| format!("to-{index}");
    let mut replies: Vec<Result<FanReply, Failure>> = Vec::with_capacity(targets.len());
    for (index, target) in targets.iter().enumerate() {
        replies.push(match socket.send_to(payload(index).as_bytes(), target) {
            Ok(_) => Err(Failure::timed_out(&format!("receive from {target}"))),
            Err(error) => Err(Failure::from_io(&format!("send to {target}"), &error)),
        });
    }
    let end = Instant::now() + deadline;
    let mut missing = replies.iter().filter(|reply| waits(reply)).count();
    while missing > 0 {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        set_deadline(&socket, left)?;
        let mut answer = [0_u8; LONGEST];
        // A deadline ends the loop above; an ICMP error belongs to a target that will simply not have answered.
        let Ok((length, source)) = socket.recv_from(&mut answer) else { continue };
        let text = String::from_utf8_lossy(&answer[..length]);
        let (name, client, echo) = parse_greeting(&text)?;
        let place = (0..targets.len()).find(|index| payload(*index) == echo);
        if let Some(reply) = place.and_then(|index| replies.get_mut(index)).filter(|reply| waits(reply)) {
            *reply = Ok(FanReply { source, name, client });
            missing -= 1;
        }
    }
    Ok(replies)
}

/// Whether a target of [`udp_fan`] may still answer.
fn waits(reply: &Result<FanReply, Failure>) -> bool {
    matches!(reply, Err(Failure { errno: Some(errno), .. }) if errno == "ETIMEDOUT")
}

/// Waits for the next datagram to a socket, from anybody.
pub(super) fn receive(socket: &UdpSocket, deadline: Duration) -> Result<(SocketAddr, String), Failure> {
    set_deadline(socket, deadline)?;
    let mut datagram = [0_u8; LONGEST];
    let (length, source) =
        socket.recv_from(&mut datagram).map_err(|error| Failure::from_io("receive a datagram", &error))?;
    Ok((source, String::from_utf8_lossy(&datagram[..length]).into_owned()))
}

/// Sends GET requests one after the other on one connection.
pub(super) async fn http(dial: Dial, path: &str, requests: u32) -> Result<HttpReport, Failure> {
    let (stream, peer, local) = connect_async(dial).await?;
    let what = format!("HTTP with {}", dial.target);
    let talk = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let mut replies = Vec::new();
        let ask = async {
            for _ in 0..requests {
                let request = hyper::Request::get(path)
                    .header(HOST, dial.target.to_string())
                    .body(Empty::<Bytes>::new())
                    .map_err(|error| Failure::other(format!("{path:?} is no path: {error}")))?;
                let (head, body) = timed(&what, dial.deadline, sender.send_request(request)).await?.into_parts();
                let body = timed(&what, dial.deadline, body.collect()).await?.to_bytes();
                let body = String::from_utf8_lossy(&body).into_owned();
                replies.push(HttpReply { status: head.status.as_u16(), body });
            }
            // Lets the connection end.
            drop(sender);
            Ok::<_, Failure>(())
        };
        // How the connection ends is of no interest once every answer is there.
        let (asked, _) = futures::join!(ask, connection);
        Ok::<_, hyper::Error>(asked.map(|()| replies))
    };
    let replies = timed(&what, dial.deadline.saturating_mul(requests.saturating_add(1)), talk).await??;
    Ok(HttpReport { peer, local, replies })
}

/// Exchanges one message over WebSocket.
pub(super) async fn websocket(dial: Dial) -> Result<Reply, Failure> {
    let begin = Instant::now();
    let (stream, peer, local) = connect_async(dial).await?;
    let connect = begin.elapsed();
    let target = dial.target;
    let what = format!("WebSocket with {target}");
    let upgrade = tokio_tungstenite::client_async(format!("ws://{target}/"), stream);
    let (mut socket, _) = timed(&what, dial.deadline, upgrade).await?;
    let mut greeting = String::new();
    let mut echoed = false;
    let talk = async {
        socket.send(Message::text(PAYLOAD)).await?;
        while let Some(message) = socket.next().await {
            let message = message?;
            let text = message.to_text()?;
            if message.is_text() && greeting.is_empty() {
                text.clone_into(&mut greeting);
            } else if message.is_text() {
                echoed = text == PAYLOAD;
                break;
            }
        }
        socket.close(None).await
    };
    timed(&what, dial.deadline, talk).await?;
    if !echoed {
        return Err(Failure::other(format!("{what}: no echo")));
    }
    let (name, client, _) = parse_greeting(&greeting)?;
    Ok(Reply { name, client, peer, local, connect })
}

/// Connects with a socket that async code can use.
pub(super) async fn connect_async(dial: Dial) -> Result<(tokio::net::TcpStream, SocketAddr, SocketAddr), Failure> {
    let connecting = tokio::net::TcpStream::connect(dial.target);
    let stream = match tokio::time::timeout(dial.deadline, connecting).await {
        Ok(stream) => stream.map_err(|error| Failure::from_io(&format!("connect to {}", dial.target), &error))?,
        Err(_) => return Err(Failure::timed_out(&format!("connect to {}", dial.target))),
    };
    let (peer, local) = names(stream.peer_addr(), stream.local_addr(), dial.target)?;
    Ok((stream, peer, local))
}

/// Bounds a step, and names it in its error.
async fn timed<T, E: std::error::Error>(
    what: &str,
    deadline: Duration,
    step: impl Future<Output = Result<T, E>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(deadline, step).await {
        Ok(outcome) => outcome.map_err(|error| Failure::other(format!("{what}: {error}"))),
        Err(_) => Err(Failure::timed_out(what)),
    }
}

fn names(
    peer: std::io::Result<SocketAddr>,
    local: std::io::Result<SocketAddr>,
    target: SocketAddr,
) -> Result<(SocketAddr, SocketAddr), Failure> {
    let peer = peer.map_err(|error| Failure::from_io(&format!("getpeername() of a socket to {target}"), &error))?;
    let local = local.map_err(|error| Failure::from_io(&format!("getsockname() of a socket to {target}"), &error))?;
    Ok((peer, local))
}

/// Bounds each blocking call on a socket; connect() is bounded by the send time-out.
fn set_deadline(socket: &impl std::os::fd::AsFd, deadline: Duration) -> Result<(), Failure> {
    // Zero would mean no bound at all.
    let micros = i64::from(deadline.subsec_micros().max(1));
    let bound = TimeVal::new(i64::try_from(deadline.as_secs()).unwrap_or(i64::MAX), micros);
    setsockopt(socket, SendTimeout, &bound)
        .and_then(|()| setsockopt(socket, ReceiveTimeout, &bound))
        .map_err(|errno| Failure::from_io("bound a socket's calls", &errno.into()))
}

fn read_greeting(stream: &mut TcpStream, target: SocketAddr) -> Result<(String, SocketAddr), Failure> {
    let mut line = Vec::new();
    let mut byte = [0_u8; 1];
    // Byte by byte, so that nothing of the echo that follows is taken.
    while line.last() != Some(&b'\n') {
        let read = stream
            .read(&mut byte)
            .map_err(|error| Failure::from_io(&format!("receive the greeting of {target}"), &error))?;
        if read == 0 || line.len() == LONGEST {
            return Err(Failure::other(format!("{target} closed before it greeted")));
        }
        line.extend_from_slice(&byte);
    }
    let (name, client, _) = parse_greeting(&String::from_utf8_lossy(&line))?;
    Ok((name, client))
}

fn parse_echo(answer: &[u8], sent: &str, target: SocketAddr) -> Result<(String, SocketAddr), Failure> {
    let text = String::from_utf8_lossy(answer);
    let (name, client, echo) = parse_greeting(&text)?;
    if echo == sent { Ok((name, client)) } else { Err(Failure::other(format!("{target} does not echo"))) }
}
