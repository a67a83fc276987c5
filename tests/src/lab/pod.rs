//! Pods: serving and connecting inside them.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::DEADLINE;
use super::shell::Shell;
use crate::probe::message::{
    App, BulkReport, Dial, Ending, Failure, FanReply, HammerReport, HttpReport, Measure, Quantiles, Rate, Reply,
    Request, Response, SpreadReport, Tls, Transport, parse_greeting,
};

/// How long an answer to a question about the socket's address may take before it is asked again.
const RETRANSMISSION: Duration = Duration::from_millis(500);

/// A pod, or a node's own network ([`super::Node::host`]). It lives as long as the lab, with or without a handle.
///
/// Every operation runs inside it, blocks until it is done, and is bounded: each connect, send and receive by
/// [`DEADLINE`], or by what [`Pod::within`] says. Errors name the pod; [`super::errno`] tells which system call error
/// is behind one. An IPv6 target makes an IPv6 socket, so [`super::v4_mapped`] addresses test v4-mapped sockets.
#[derive(Debug, Clone)]
pub struct Pod {
    name: String,
    ips: Vec<IpAddr>,
    cgroup: PathBuf,
    shell: Arc<Shell>,
    deadline: Duration,
    /// 0 for any.
    port: u16,
}

/// What came of a bare `connect()`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attempt {
    /// It succeeded, in this time.
    Connected(Duration),
    /// It failed with this errno, such as `ECONNREFUSED`.
    Failed(String),
}

/// A connected socket inside a pod; dropping it closes the socket.
#[derive(Debug)]
pub struct Connection {
    pod: Pod,
    id: u64,
}

/// An unconnected UDP socket inside a pod; dropping it closes the socket.
#[derive(Debug)]
pub struct Datagrams {
    pod: Pod,
    id: u64,
}

/// A load inside a pod that runs until it is stopped.
#[derive(Debug)]
#[must_use = "a hammer tells what it saw only when it is stopped"]
pub struct Hammer {
    pod: Pod,
    id: u64,
}

/// Asks the shell, and takes the one kind of response that answers the question.
macro_rules! ask {
    ($pod:expr, $request:expr, $bound:expr, $pattern:pat => $value:expr) => {
        match $pod.shell.call($request, $bound)? {
            $pattern => anyhow::Ok($value),
            other => bail!("the probe shell of {} answered {other:?} to another question", $pod.name),
        }
    };
}

impl Pod {
    pub(super) fn new(name: &str, ips: Vec<IpAddr>, shell: Arc<Shell>, cgroup: PathBuf) -> Self {
        Self { name: name.to_owned(), ips, cgroup, shell, deadline: DEADLINE, port: 0 }
    }

    /// The pod's name, by which its servers name themselves.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The pod's addresses, in the order they were asked for.
    pub fn ips(&self) -> &[IpAddr] {
        &self.ips
    }

    /// The pod's cgroup.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// A process inside the pod, which lives as long as the lab.
    pub fn process(&self) -> u32 {
        self.shell.pid()
    }

    /// The shell command that puts a person into the pod: in its cgroup, so that Services work as in it.
    pub fn enter_command(&self) -> String {
        format!(
            "sh -c 'echo $$ > {}/cgroup.procs && exec nsenter --target {} --net --mount bash'",
            self.cgroup.display(),
            self.process()
        )
    }

    /// Runs a program of the machine, such as dig, in the pod's network; waits until it ends, a minute at most.
    ///
    /// # Errors
    /// The program is not there, or did not end in time. That it failed is in its output.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<std::process::Output> {
        let process = self.process().to_string();
        let output = std::process::Command::new("nsenter")
            .args(["--target", &process, "--net", "timeout", "60", program])
            .args(arguments)
            .stdin(std::process::Stdio::null())
            .output()
            .with_context(|| format!("could not run {program} in {}", self.name))?;
        match output.status.code() {
            Some(124) => bail!("{program} in {} did not end within a minute", self.name),
            // Those of timeout(1) for a program that is not there, or cannot be run.
            Some(126 | 127) => bail!("could not run {program}: {}", String::from_utf8_lossy(&output.stderr).trim()),
            Some(_) | None => Ok(output),
        }
    }

    /// The same pod with another bound for each step of an operation.
    #[must_use]
    pub fn within(&self, deadline: Duration) -> Self {
        Self { deadline, ..self.clone() }
    }

    /// The same pod with connections from this local port, which several of them may have at once (SO_REUSEADDR).
    #[must_use]
    pub fn from_port(&self, port: u16) -> Self {
        Self { port, ..self.clone() }
    }

    /// The same pod with other addresses.
    pub(super) fn at(&self, ips: Vec<IpAddr>) -> Self {
        Self { ips, ..self.clone() }
    }

    /// Serves on `port` of each of the pod's addresses; returns them in the order of [`Pod::ips`].
    pub fn serve(&self, app: App, port: u16) -> Result<Vec<SocketAddr>> {
        self.ips.iter().map(|ip| self.serve_at(app, SocketAddr::new(*ip, port))).collect()
    }

    /// Serves on one address, which may be any the pod can bind; port 0 picks a free one.
    pub fn serve_at(&self, app: App, listen: SocketAddr) -> Result<SocketAddr> {
        let request = Request::Serve { name: self.name.clone(), app, listen };
        ask!(self, request, self.deadline, Response::Serving(address) => address)
    }

    /// Carries TCP connections on one address to `backend`, as a userspace proxy does; port 0 picks a free one.
    pub fn proxy(&self, listen: SocketAddr, backend: SocketAddr) -> Result<SocketAddr> {
        self.tls_proxy(listen, backend, Tls::Neither)
    }

    /// The same with TLS on one side; a pair of these carries connections encrypted.
    pub fn tls_proxy(&self, listen: SocketAddr, backend: SocketAddr, tls: Tls) -> Result<SocketAddr> {
        ask!(self, Request::Proxy { listen, backend, tls }, self.deadline, Response::Serving(address) => address)
    }

    /// Stops what [`Pod::serve`] started, and closes its connections.
    pub fn stop_serving(&self, app: App, port: u16) -> Result<()> {
        for ip in &self.ips {
            let listen = SocketAddr::new(*ip, port);
            ask!(self, Request::StopServing { app, listen }, self.deadline, Response::Done => ())?;
        }
        Ok(())
    }

    /// Exchanges one message over TCP.
    pub fn tcp(&self, target: SocketAddr) -> Result<Reply> {
        self.once(Transport::Tcp, target)
    }

    /// Exchanges one message over UDP, on a connected socket.
    pub fn udp(&self, target: SocketAddr) -> Result<Reply> {
        self.once(Transport::Udp, target)
    }

    fn once(&self, transport: Transport, target: SocketAddr) -> Result<Reply> {
        let request = Request::Once(transport, self.dial(target));
        ask!(self, request, self.deadline * 4, Response::Reply(reply) => reply)
    }

    /// Connects and keeps the socket, for several exchanges.
    pub fn open(&self, transport: Transport, target: SocketAddr) -> Result<Connection> {
        let request = Request::Open(transport, self.dial(target));
        let id = ask!(self, request, self.deadline * 2, Response::Opened(id) => id)?;
        Ok(Connection { pod: self.clone(), id })
    }

    /// Sends to each target from one unconnected UDP socket, and tells who answered from which source address.
    pub fn udp_fan(&self, targets: &[SocketAddr]) -> Result<Vec<Result<FanReply, Failure>>> {
        let request = Request::UdpFan { targets: targets.to_vec(), deadline: self.deadline };
        ask!(self, request, self.deadline, Response::Fan(replies) => replies)
    }

    /// Binds a UDP socket that is connected to nobody, such as to `0.0.0.0:3478`; port 0 picks a free one.
    pub fn bind_udp(&self, local: SocketAddr) -> Result<Datagrams> {
        let id = ask!(self, Request::BindUdp { local }, self.deadline, Response::Opened(id) => id)?;
        Ok(Datagrams { pod: self.clone(), id })
    }

    /// Calls `connect()` on a TCP socket, and no more.
    pub fn connect(&self, target: SocketAddr) -> Result<Attempt> {
        self.attempt(Transport::Tcp, target)
    }

    /// Calls `connect()` on a UDP socket, and no more.
    pub fn connect_udp(&self, target: SocketAddr) -> Result<Attempt> {
        self.attempt(Transport::Udp, target)
    }

    fn attempt(&self, transport: Transport, target: SocketAddr) -> Result<Attempt> {
        let request = Request::Connect(transport, self.dial(target));
        match self.shell.call(request, self.deadline) {
            Ok(Response::Connected(took)) => Ok(Attempt::Connected(took)),
            Ok(other) => bail!("the probe shell of {} answered {other:?} to a connect", self.name),
            Err(error) => match super::errno(&error) {
                Some(errno) => Ok(Attempt::Failed(errno.to_owned())),
                None => Err(error),
            },
        }
    }

    /// Sends `requests` HTTP requests on one keep-alive connection to an [`App::Http`] server.
    pub fn http(&self, target: SocketAddr, requests: u32) -> Result<HttpReport> {
        self.http_get(target, "/", requests)
    }

    /// Sends `requests` HTTP requests for `path` on one keep-alive connection to any server.
    pub fn http_get(&self, target: SocketAddr, path: &str, requests: u32) -> Result<HttpReport> {
        let request = Request::Http { dial: self.dial(target), path: path.to_owned(), requests };
        let bound = self.deadline.saturating_mul(requests.saturating_add(2));
        ask!(self, request, bound, Response::Http(report) => report)
    }

    /// Exchanges one message over WebSocket.
    pub fn websocket(&self, target: SocketAddr) -> Result<Reply> {
        let request = Request::WebSocket(self.dial(target));
        ask!(self, request, self.deadline * 3, Response::Reply(reply) => reply)
    }

    /// Makes `count` connections, at most `concurrency` at once, and counts who answers.
    pub fn spread(
        &self,
        transport: Transport,
        target: SocketAddr,
        count: u32,
        concurrency: u32,
    ) -> Result<SpreadReport> {
        let request = Request::Spread { transport, dial: self.dial(target), count, concurrency };
        let bound = self.deadline.saturating_mul(4).saturating_mul(count.div_ceil(concurrency.max(1)));
        ask!(self, request, bound, Response::Spread(report) => report)
    }

    /// Holds `count` connections at once and exchanges `rounds` messages of many sizes on each, none like another: what
    /// comes back must be the very same, whole and alone. Counts who answered each connection.
    pub fn crowd(&self, transport: Transport, target: SocketAddr, count: u32, rounds: u32) -> Result<SpreadReport> {
        let request = Request::Crowd { transport, dial: self.dial(target), count, rounds };
        let bound = self.deadline.saturating_mul(rounds.saturating_add(4));
        ask!(self, request, bound, Response::Spread(report) => report)
    }

    /// Sends so many bytes to an [`App::Tcp`] server on one connection, receives them again at the same time, and
    /// compares.
    pub fn bulk(&self, target: SocketAddr, bytes: u64) -> Result<BulkReport> {
        // At a MiB a second, at the worst.
        let bound = self.deadline.saturating_mul(4) + Duration::from_secs(bytes >> 20);
        ask!(self, Request::Bulk { dial: self.dial(target), bytes }, bound, Response::Bulk(report) => report)
    }

    /// Receives from an [`App::Source`] server on one connection for `warm_up`, then counts for `length` what comes, in
    /// bytes.
    pub fn drain(&self, target: SocketAddr, warm_up: Duration, length: Duration) -> Result<Rate> {
        let bound = warm_up.saturating_add(length).saturating_add(self.deadline * 2);
        ask!(self, Request::Drain { dial: self.dial(target), warm_up, length }, bound, Response::Rate(rate) => rate)
    }

    /// Has `clients` make connections to an [`App::Echo`] server for `length`, each with a request of a few bytes, its
    /// answer and a reset; counts the connections.
    ///
    /// # Errors
    /// Also when one of them fails.
    pub fn turnover(&self, target: SocketAddr, clients: u32, length: Duration) -> Result<Rate> {
        let request = Request::Turnover { dial: self.dial(target), clients, length };
        ask!(self, request, length.saturating_add(self.deadline * 2), Response::Rate(rate) => rate)
    }

    /// Times `rounds` blocking connects per group of addresses, as [`Pod::measure`] does.
    pub fn latency(&self, transport: Transport, groups: &[Vec<SocketAddr>], rounds: u32) -> Result<Vec<Quantiles>> {
        self.measure(Measure::Connect(transport), groups, rounds)
    }

    /// Times `measure` `rounds` times per group of addresses, the groups taking turns.
    ///
    /// The addresses of a group take turns too and are measured as one: so a Service of three replicas, which is a group
    /// of one address, compares with the group of its three pods.
    pub fn measure(&self, measure: Measure, groups: &[Vec<SocketAddr>], rounds: u32) -> Result<Vec<Quantiles>> {
        let request = Request::Latency { measure, groups: groups.to_vec(), rounds, deadline: self.deadline };
        let times = rounds.saturating_mul(u32::try_from(groups.len())?);
        // The longest measure has three steps: to connect, to be greeted, to be answered.
        let bound = self.deadline.saturating_mul(3).saturating_mul(times);
        ask!(self, request, bound, Response::Latency(quantiles) => quantiles)
    }

    /// Starts `concurrency` threads that connect as fast as they can until [`Hammer::stop`].
    pub fn hammer(&self, transport: Transport, target: SocketAddr, concurrency: u32) -> Result<Hammer> {
        let request = Request::StartHammer { transport, dial: self.dial(target), concurrency };
        let id = ask!(self, request, self.deadline, Response::Hammering(id) => id)?;
        Ok(Hammer { pod: self.clone(), id })
    }

    fn dial(&self, target: SocketAddr) -> Dial {
        Dial { target, deadline: self.deadline, port: self.port }
    }
}

impl Connection {
    /// Exchanges one message.
    pub fn exchange(&self) -> Result<Reply> {
        self.talk(false)
    }

    /// Exchanges one message by `sendto()` with the address that the socket is connected to; UDP alone.
    pub fn exchange_addressed(&self) -> Result<Reply> {
        self.talk(true)
    }

    fn talk(&self, addressed: bool) -> Result<Reply> {
        let request = Request::Exchange { connection: self.id, addressed, deadline: self.pod.deadline };
        ask!(self.pod, request, self.pod.deadline * 2, Response::Reply(reply) => reply)
    }

    /// Sends one byte over TCP, and waits for no answer.
    pub fn say(&self) -> Result<()> {
        let request = Request::Say { connection: self.id, deadline: self.pod.deadline };
        ask!(self.pod, request, self.pod.deadline, Response::Done => ())
    }

    /// Reads to the end of a TCP connection and tells how it ended; `ETIMEDOUT` where it did not.
    pub fn read_to_end(&self) -> Result<Ending> {
        self.end(false)
    }

    /// Ends this side's direction of a TCP connection, then as [`Connection::read_to_end`].
    pub fn finish(&self) -> Result<Ending> {
        self.end(true)
    }

    fn end(&self, finish: bool) -> Result<Ending> {
        let request = Request::ReadToEnd { connection: self.id, finish, deadline: self.pod.deadline };
        ask!(self.pod, request, self.pod.deadline * 2, Response::Ended(ending) => ending)
    }

    /// Connects the same UDP socket to another target.
    pub fn reconnect(&self, target: SocketAddr) -> Result<()> {
        ask!(self.pod, Request::Reconnect { connection: self.id, target }, self.pod.deadline, Response::Done => ())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A shell that is gone has closed it already.
        let _ = self.pod.shell.call(Request::Close { connection: self.id }, self.pod.deadline);
    }
}

impl Datagrams {
    /// Sends a datagram.
    pub fn send(&self, target: SocketAddr, text: &str) -> Result<()> {
        let request = Request::SendTo { socket: self.id, target, text: text.to_owned() };
        ask!(self.pod, request, self.pod.deadline, Response::Done => ())
    }

    /// Waits for a datagram, from anybody; returns its source and what it says.
    pub fn receive(&self) -> Result<(SocketAddr, String)> {
        self.receive_within(self.pod.deadline)
    }

    fn receive_within(&self, deadline: Duration) -> Result<(SocketAddr, String)> {
        let request = Request::Receive { socket: self.id, deadline };
        ask!(self.pod, request, deadline, Response::Datagram(source, text) => (source, text))
    }

    /// Asks an [`App::Udp`] server, as a STUN server is asked, at which address it sees the socket (RFC 5389).
    ///
    /// # Errors
    /// Also when the next datagram is of somebody else, who then got through.
    pub fn mapped_by(&self, server: SocketAddr) -> Result<SocketAddr> {
        static TRANSACTION: AtomicU32 = AtomicU32::new(0);
        let question = format!("binding-{}", TRANSACTION.fetch_add(1, Ordering::Relaxed));
        let end = Instant::now() + self.pod.deadline;
        loop {
            self.send(server, &question)?;
            // Datagrams are lost, as while a link comes up; so STUN asks again (section 7.2.1).
            match self.receive_within(RETRANSMISSION) {
                Ok((source, text)) => {
                    ensure!(source == server, "{source} answered what {server} was asked");
                    let (_, mapped, echo) = parse_greeting(&text)?;
                    // Else the second answer to an earlier question.
                    if echo == question {
                        return Ok(mapped);
                    }
                }
                Err(error) => {
                    if Instant::now() >= end {
                        return Err(error);
                    }
                }
            }
        }
    }
}

impl Drop for Datagrams {
    fn drop(&mut self) {
        // A shell that is gone has closed it already.
        let _ = self.pod.shell.call(Request::CloseUdp { socket: self.id }, self.pod.deadline);
    }
}

impl Hammer {
    /// Ends the load and tells what it saw.
    pub fn stop(self) -> Result<HammerReport> {
        let request = Request::StopHammer { hammer: self.id };
        ask!(self.pod, request, self.pod.deadline * 4, Response::Hammered(report) => report)
    }
}
