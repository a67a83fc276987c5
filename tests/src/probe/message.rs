//! What the lab and a probe shell say to each other: one JSON object a line, answers in any order, matched by id.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A request and the id its answer carries.
#[derive(Debug, Serialize, Deserialize)]
pub struct Call {
    /// Chosen by the lab, unique per shell.
    pub id: u64,
    /// What to do.
    pub request: Request,
}

/// The answer to the [`Call`] with the same id.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    /// The call's id.
    pub id: u64,
    /// What came of it.
    pub outcome: Result<Response, Failure>,
}

/// Something a shell does in its namespaces.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Listens on an address until [`Request::StopServing`]; answered by [`Response::Serving`].
    Serve {
        /// How the server names itself to its clients; without white space.
        name: String,
        /// What it speaks.
        app: App,
        /// Where it listens; port 0 picks one.
        listen: SocketAddr,
    },
    /// Carries TCP connections to a backend as a userspace proxy, until the shell ends; [`Response::Serving`].
    Proxy {
        /// Where it listens; port 0 picks one.
        listen: SocketAddr,
        /// Where it connects to.
        backend: SocketAddr,
        /// Where it speaks TLS.
        tls: Tls,
    },
    /// Closes a listener and its connections; answered by [`Response::Done`].
    StopServing {
        /// What it speaks.
        app: App,
        /// Where it listens.
        listen: SocketAddr,
    },
    /// Connects, exchanges one message with an [`App::Tcp`] or [`App::Udp`] server, closes; [`Response::Reply`].
    Once(Transport, Dial),
    /// Connects and keeps the socket; [`Response::Opened`].
    Open(Transport, Dial),
    /// Exchanges one message on a kept socket; [`Response::Reply`].
    Exchange {
        /// From [`Response::Opened`].
        connection: u64,
        /// Whether each datagram names the target again (`sendto()` on a connected socket).
        addressed: bool,
        /// Bounds the exchange.
        deadline: Duration,
    },
    /// Connects a kept UDP socket to another target; [`Response::Done`].
    Reconnect {
        /// From [`Response::Opened`].
        connection: u64,
        /// Of the family that the socket was opened for.
        target: SocketAddr,
    },
    /// Sends one byte on a kept TCP socket and waits for no answer; [`Response::Done`].
    Say {
        /// From [`Response::Opened`].
        connection: u64,
        /// Bounds the sending.
        deadline: Duration,
    },
    /// Reads a kept TCP socket to its end, whichever it is; [`Response::Ended`].
    ReadToEnd {
        /// From [`Response::Opened`].
        connection: u64,
        /// Whether this side ends its own direction before.
        finish: bool,
        /// Bounds the reading.
        deadline: Duration,
    },
    /// Closes a kept socket; [`Response::Done`].
    Close {
        /// From [`Response::Opened`].
        connection: u64,
    },
    /// Only connects; [`Response::Connected`].
    Connect(Transport, Dial),
    /// Sends to every target from one unconnected UDP socket and waits for the answers; [`Response::Fan`].
    UdpFan {
        /// [`App::Udp`] servers, all of one address family.
        targets: Vec<SocketAddr>,
        /// Bounds the whole exchange.
        deadline: Duration,
    },
    /// Binds an unconnected UDP socket and keeps it; [`Response::Opened`].
    BindUdp {
        /// Port 0 picks one.
        local: SocketAddr,
    },
    /// Sends a datagram from a socket of [`Request::BindUdp`]; [`Response::Done`].
    SendTo {
        /// From [`Response::Opened`].
        socket: u64,
        /// Of the family that the socket was bound for.
        target: SocketAddr,
        /// What it says.
        text: String,
    },
    /// Waits for the next datagram to a socket of [`Request::BindUdp`]; [`Response::Datagram`].
    Receive {
        /// From [`Response::Opened`].
        socket: u64,
        /// Bounds the wait.
        deadline: Duration,
    },
    /// Closes a socket of [`Request::BindUdp`]; [`Response::Done`].
    CloseUdp {
        /// From [`Response::Opened`].
        socket: u64,
    },
    /// Sends HTTP/1.1 GETs one after the other on one connection; [`Response::Http`].
    Http {
        /// The server.
        dial: Dial,
        /// The path and query.
        path: String,
        /// How many requests.
        requests: u32,
    },
    /// Exchanges one message with an [`App::WebSocket`] server; [`Response::Reply`].
    WebSocket(Dial),
    /// Makes many connections and counts who answers; [`Response::Spread`].
    Spread {
        /// TCP or UDP.
        transport: Transport,
        /// The server; the deadline bounds each connection.
        dial: Dial,
        /// How many connections in all.
        count: u32,
        /// How many at once.
        concurrency: u32,
    },
    /// Holds many connections at once and exchanges messages on all of them, each unlike any other; [`Response::Spread`].
    Crowd {
        /// TCP or UDP.
        transport: Transport,
        /// The server; the deadline bounds each step.
        dial: Dial,
        /// How many connections.
        count: u32,
        /// How many messages on each.
        rounds: u32,
    },
    /// Sends much to an [`App::Tcp`] server and checks what comes back, while it sends; [`Response::Bulk`].
    Bulk {
        /// The server; the deadline bounds how long nothing may move.
        dial: Dial,
        /// How much, in bytes.
        bytes: u64,
    },
    /// Receives from an [`App::Source`] server on one connection; [`Response::Rate`], in bytes.
    Drain {
        /// The server; the deadline bounds the connect, and the whole beyond its length.
        dial: Dial,
        /// What is received before does not count: windows grow in the first moments.
        warm_up: Duration,
        /// For how long it counts.
        length: Duration,
    },
    /// Makes connections to an [`App::Echo`] server, one after the other for each client, with a request, its answer and
    /// a reset on each; [`Response::Rate`], in connections.
    Turnover {
        /// The server; the deadline bounds each connection.
        dial: Dial,
        /// How many clients do so at once.
        clients: u32,
        /// For how long.
        length: Duration,
    },
    /// Times one thing again and again, the groups taking turns in one thread; [`Response::Latency`].
    Latency {
        /// What is timed.
        measure: Measure,
        /// Servers that the measure fits, all of one address family; those of one group take turns and are measured as
        /// one.
        groups: Vec<Vec<SocketAddr>>,
        /// How many times per group.
        rounds: u32,
        /// Bounds each step.
        deadline: Duration,
    },
    /// Makes connections as fast as it can until [`Request::StopHammer`]; [`Response::Hammering`].
    StartHammer {
        /// TCP or UDP.
        transport: Transport,
        /// The server; the deadline bounds each connection.
        dial: Dial,
        /// How many connections at once.
        concurrency: u32,
    },
    /// Ends a hammer; [`Response::Hammered`].
    StopHammer {
        /// From [`Response::Hammering`].
        hammer: u64,
    },
}

/// What a shell reports of a request that went well.
#[derive(Debug, Serialize, Deserialize)]
pub enum Response {
    /// Done, nothing to tell.
    Done,
    /// The address a server listens on.
    Serving(SocketAddr),
    /// A finished exchange.
    Reply(Reply),
    /// The id of a kept socket.
    Opened(u64),
    /// How long `connect()` took.
    Connected(Duration),
    /// Per target, in the order of the request.
    Fan(Vec<Result<FanReply, Failure>>),
    /// Where a datagram came from, and what it says.
    Datagram(SocketAddr, String),
    /// A keep-alive connection.
    Http(HttpReport),
    /// How a connection ended.
    Ended(Ending),
    /// Who answered how often.
    Spread(SpreadReport),
    /// What much data came to.
    Bulk(BulkReport),
    /// How much of something there was in a time.
    Rate(Rate),
    /// Per group, in the order of the request.
    Latency(Vec<Quantiles>),
    /// The id of a running hammer.
    Hammering(u64),
    /// What the hammer saw.
    Hammered(HammerReport),
}

/// What a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum App {
    /// Greets with `name client-address\n`, then echoes.
    Tcp,
    /// Answers every datagram with `name client-address ` before the datagram itself.
    Udp,
    /// Answers every request with `name client-address\n`; keeps connections alive.
    Http,
    /// Greets with the text message `name client-address`, then echoes messages.
    WebSocket,
    /// TCP: greets as [`App::Tcp`] does, hears everything out, answers with the number of bytes heard, and closes.
    Count,
    /// TCP: greets as [`App::Tcp`] does and resets the connection at the first byte.
    Reset,
    /// TCP: echoes, without a greeting.
    Echo,
    /// TCP: sends without end, and hears nothing.
    Source,
}

/// Which of a proxy's two connections is TLS 1.3, by the certificates of [`crate::meta_server::pki`]. Every connection has
/// a full handshake, in which the server alone shows a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tls {
    /// None.
    Neither,
    /// That of its client.
    Accepted,
    /// That to its backend.
    Dialled,
}

impl App {
    /// What its protocol runs on.
    pub fn transport(self) -> Transport {
        match self {
            Self::Udp => Transport::Udp,
            Self::Tcp | Self::Http | Self::WebSocket | Self::Count | Self::Reset | Self::Echo | Self::Source => {
                Transport::Tcp
            }
        }
    }
}

/// What a latency is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Measure {
    /// `connect()` on a new blocking socket, and no more.
    Connect(Transport),
    /// `sendto()` of a few bytes to an [`App::Udp`] server, from one unconnected socket for all rounds and targets.
    Send,
    /// A TCP connection to an [`App::Tcp`] server, a request of a few bytes and its answer, from the socket's making on.
    Exchange,
    /// A request of a few bytes and its answer, on one TCP connection to each [`App::Tcp`] server for all rounds.
    RoundTrip,
    /// The same as [`Measure::Exchange`] with a server of this kind, in its own protocol: a message on a connected UDP socket,
    /// a GET request, an upgrade to WebSocket and a message each way.
    Visit(App),
}

/// The transport protocol of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP on a connected socket.
    Udp,
}

/// Where to connect to, and how long that and what follows may take.
///
/// An IPv6 target is dialled from an IPv6 socket, a v4-mapped one (`::ffff:10.96.0.1`) too.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Dial {
    /// The address `connect()` is called with.
    pub target: SocketAddr,
    /// Bounds every single step: connecting, sending, receiving.
    pub deadline: Duration,
    /// The local port, which other sockets may have too (SO_REUSEADDR); 0 for any. HTTP and WebSocket take any.
    pub port: u16,
}

/// One exchange with a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// How the server names itself.
    pub name: String,
    /// The client's address as the server sees it.
    pub client: SocketAddr,
    /// `getpeername()` of the client's socket.
    pub peer: SocketAddr,
    /// `getsockname()` of the client's socket.
    pub local: SocketAddr,
    /// How long `connect()` took.
    pub connect: Duration,
}

/// One datagram that came back to an unconnected socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FanReply {
    /// The source address `recvfrom()` reported.
    pub source: SocketAddr,
    /// How the server names itself.
    pub name: String,
    /// The client's address as the server sees it.
    pub client: SocketAddr,
}

/// How a TCP connection ended, as its client saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// What came before the end; bytes that are no UTF-8 are replaced.
    pub rest: String,
    /// The errno name, such as `ECONNRESET`; none where the server closed.
    pub errno: Option<String>,
    /// How long the end was waited for.
    pub took: Duration,
}

/// Much data there and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BulkReport {
    /// How much came back as it was sent, in bytes.
    pub received: u64,
    /// Whether every byte that came back was the one that was sent, and the end came after the last.
    pub intact: bool,
    /// From the first byte to the end.
    pub took: Duration,
}

/// HTTP requests on one connection.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HttpReport {
    /// `getpeername()` of the client's socket.
    pub peer: SocketAddr,
    /// `getsockname()` of the client's socket.
    pub local: SocketAddr,
    /// The answers, in order.
    pub replies: Vec<HttpReply>,
}

/// One HTTP answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HttpReply {
    /// The status code.
    pub status: u16,
    /// The body; bytes that are no UTF-8 are replaced.
    pub body: String,
}

/// Who answered how often.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SpreadReport {
    /// Connections by the name of the server that answered.
    pub names: BTreeMap<String, u64>,
    /// Connections that failed, by errno name.
    pub failures: BTreeMap<String, u64>,
}

/// How much of something there was in a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// How much.
    pub count: u64,
    /// In which time; never zero.
    pub took: Duration,
}

impl Rate {
    /// How much a second.
    pub fn per_second(self) -> f64 {
        self.count as f64 / self.took.as_secs_f64()
    }
}

/// The distribution of a measured duration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantiles {
    /// The shortest.
    pub min: Duration,
    /// The lower quartile.
    pub p25: Duration,
    /// The median.
    pub p50: Duration,
    /// The upper quartile.
    pub p75: Duration,
    /// 90 of 100 are at most this.
    pub p90: Duration,
    /// 99 of 100 are at most this.
    pub p99: Duration,
    /// The longest.
    pub max: Duration,
}

/// What a hammer saw. Times are those of [`monotonic`], taken before each `connect()`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct HammerReport {
    /// Connections that were answered, by the name of the server.
    pub names: BTreeMap<String, Seen>,
    /// Connections that failed, by errno name.
    pub failures: BTreeMap<String, Seen>,
}

/// How often, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// How often.
    pub count: u64,
    /// The first time.
    pub first: Duration,
    /// The last time.
    pub last: Duration,
}

/// A system call that failed inside a pod or node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The errno name, such as `ECONNREFUSED`; `ETIMEDOUT` when a deadline passed.
    pub errno: Option<String>,
    /// What was attempted, on what, and what came of it.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.errno {
            Some(errno) => write!(f, "{} ({errno})", self.what),
            None => f.write_str(&self.what),
        }
    }
}

impl std::error::Error for Failure {}

impl Failure {
    /// Wraps an error of the operating system with what was attempted.
    pub fn from_io(what: &str, error: &std::io::Error) -> Self {
        Self { errno: Some(errno_name(error)), what: format!("{what}: {error}") }
    }

    /// A failure with no system call behind it.
    pub fn other(what: impl Into<String>) -> Self {
        Self { errno: None, what: what.into() }
    }

    /// A deadline that passed.
    pub fn timed_out(what: &str) -> Self {
        Self { errno: Some("ETIMEDOUT".to_owned()), what: format!("{what}: no answer in time") }
    }
}

/// Names an error as C does. Deadlines, which the kernel reports in three ways, are all `ETIMEDOUT`.
fn errno_name(error: &std::io::Error) -> String {
    use std::io::ErrorKind;
    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) {
        return "ETIMEDOUT".to_owned();
    }
    match error.raw_os_error() {
        // A blocking connect() that SO_SNDTIMEO cut short.
        Some(libc::EINPROGRESS) => "ETIMEDOUT".to_owned(),
        Some(code) => format!("{:?}", nix::errno::Errno::from_raw(code)),
        None => format!("{:?}", error.kind()),
    }
}

impl Seen {
    /// Counts one more, at `at`.
    pub(crate) fn add<K: Ord>(map: &mut BTreeMap<K, Self>, key: K, at: Duration) {
        let seen = map.entry(key).or_insert(Self { count: 0, first: at, last: at });
        seen.count += 1;
        seen.first = seen.first.min(at);
        seen.last = seen.last.max(at);
    }
}

/// The time of CLOCK_MONOTONIC, which every process of the machine shares.
pub fn monotonic() -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec for the call to fill; CLOCK_MONOTONIC exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// The same address for an IPv6 socket: `10.96.0.1:80` becomes `[::ffff:10.96.0.1]:80`.
pub fn v4_mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(IpAddr::V6(ip.to_ipv6_mapped()), address.port()),
        IpAddr::V6(_) => address,
    }
}

/// The address a socket of the target's family is bound to when only the port matters, or not even that (0).
pub(crate) fn unspecified(target: SocketAddr, port: u16) -> SocketAddr {
    match target {
        SocketAddr::V4(_) => SocketAddr::from(([0, 0, 0, 0], port)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)),
    }
}

/// Splits `name client-address rest`, which every server of the lab begins its answers with.
pub(crate) fn parse_greeting(text: &str) -> Result<(String, SocketAddr, &str), Failure> {
    let mut words = text.trim_end_matches('\n').splitn(3, ' ');
    let name = words.next().unwrap_or_default();
    let client = words.next().and_then(|address| address.parse().ok());
    match client {
        Some(client) if !name.is_empty() => Ok((name.to_owned(), client, words.next().unwrap_or_default())),
        _ => Err(Failure::other(format!("{text:?} is no greeting of a lab server"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_greeting_with_and_without_a_payload() {
        let client: SocketAddr = "10.1.2.3:99".parse().unwrap();
        assert_eq!(parse_greeting("web-1 10.1.2.3:99\n"), Ok(("web-1".to_owned(), client, "")));
        assert_eq!(parse_greeting("web-1 10.1.2.3:99 a b"), Ok(("web-1".to_owned(), client, "a b")));
        for broken in ["", "web-1", "web-1 nonsense", " 10.1.2.3:99"] {
            parse_greeting(broken).unwrap_err();
        }
    }

    #[test]
    fn every_way_to_time_out_has_one_name() {
        for code in [libc::EAGAIN, libc::ETIMEDOUT, libc::EINPROGRESS] {
            assert_eq!(errno_name(&std::io::Error::from_raw_os_error(code)), "ETIMEDOUT");
        }
        assert_eq!(errno_name(&std::io::Error::from_raw_os_error(libc::EPERM)), "EPERM");
    }
}
