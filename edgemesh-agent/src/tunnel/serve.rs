//! The far side: dials for other members what the policy allows, and carries the flow.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::debug;

use super::{
    Decision, DialPolicy, Grounds, NodeName, Protocol, Target,
    book::Refused,
    counters::Counters,
    paths::{Path, Serving},
    splice::{Passed, UdpIdle, splice, splice_udp},
    stream::{DatagramStream, Frames, Stream},
    substream::Substream,
    wire::{self, Explanation, Request, Response, Status},
};
use crate::net::keep_alive;

/// What an open flow is answered with.
enum Dialled {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

/// Held as long as a stream is.
enum Place {
    Flow(#[expect(dead_code, reason = "held, not read")] OwnedSemaphorePermit),
    Refusal(#[expect(dead_code, reason = "held, not read")] OwnedSemaphorePermit),
}

/// Serves the requests of members.
pub(super) struct Server {
    node: NodeName,
    policy: Arc<dyn DialPolicy>,
    refused: Refused,
    deadline: Duration,
    idle: UdpIdle,
    /// Places for flows, so that memory is bounded.
    places: Arc<Semaphore>,
    /// Places for requests that come when there is none of those, so that they are told.
    refusals: Arc<Semaphore>,
    /// Places for questions that are being answered, each beside one for a flow.
    questions: Semaphore,
    counters: Arc<Counters>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// What [`Server::new`] takes.
pub(super) struct NewServer {
    pub(super) node: NodeName,
    pub(super) policy: Arc<dyn DialPolicy>,
    /// Rules that come before and after the policy.
    pub(super) refused: Refused,
    pub(super) deadline: Duration,
    pub(super) idle: UdpIdle,
    pub(super) most: usize,
    pub(super) counters: Arc<Counters>,
    pub(super) tasks: TaskTracker,
    pub(super) stop: CancellationToken,
}

/// Requests that are told at the same time that the node is busy; what comes beyond is reset unread.
const REFUSALS_AT_ONCE: usize = 256;

/// Questions that are answered at the same time: a few traces, which are made by people.
const QUESTIONS_AT_ONCE: usize = 64;

impl Server {
    pub(super) fn new(new: NewServer) -> Self {
        let NewServer { node, policy, refused, deadline, idle, most, counters, tasks, stop } = new;
        let places = Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS)));
        let refusals = Arc::new(Semaphore::new(REFUSALS_AT_ONCE));
        let questions = Semaphore::new(QUESTIONS_AT_ONCE);
        Self { node, policy, refused, deadline, idle, places, refusals, questions, counters, tasks, stop }
    }

    /// Takes a stream that a peer has opened on `path`.
    pub(super) fn accept(self: &Arc<Self>, stream: libp2p::Stream, path: &Arc<Path>) {
        let place = match Arc::clone(&self.places).try_acquire_owned() {
            Ok(place) => Place::Flow(place),
            Err(_) => match Arc::clone(&self.refusals).try_acquire_owned() {
                Ok(place) => Place::Refusal(place),
                Err(_) => return self.failed(path.node.get(), "too busy even to say so"),
            },
        };
        let serving = path.serving();
        let stream = Substream::new(stream, path);
        let (server, path, stop) = (Arc::clone(self), Arc::clone(path), self.stop.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = server.serve(stream, path, place, serving) => {}
            }
        });
    }

    async fn serve(&self, mut stream: Substream, path: Arc<Path>, place: Place, serving: Serving) {
        let request = timeout(self.deadline, async {
            let from = path.node.wait().await.clone();
            Ok::<_, io::Error>((from, wire::read::<Request>(&mut stream).await?))
        });
        let (from, request) = match request.await {
            Ok(Ok(request)) => request,
            Ok(Err(error)) => return self.failed(path.node.get(), &error.to_string()),
            Err(_) => return self.failed(path.node.get(), "no request came in time"),
        };
        let (answer, dialled) = match &place {
            Place::Refusal(_) => (Response::new(Status::Busy, "as many streams are open as this node takes"), None),
            Place::Flow(_) if request.question.is_some() => (self.explain(&from, &request).await, None),
            Place::Flow(_) => match self.dial(&from, &request).await {
                Ok(dialled) => (Response::new(Status::Connected, ""), Some(dialled)),
                Err(refusal) => (refusal, None),
            },
        };
        match timeout(self.deadline, wire::write(&mut stream, &answer)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return self.failed(Some(&from), &error.to_string()),
            Err(_) => return self.failed(Some(&from), "the answer was not taken in time"),
        }
        let Some(dialled) = dialled else {
            let was_question = answer.explanation.is_some();
            if was_question {
                self.counters.questions.add(1);
            } else if answer.status() == Status::NotAllowed {
                self.counters.not_allowed.add(1);
            }
            // The end of the stream, so that the answer is not overtaken by a reset.
            let _ = timeout(self.deadline, futures::AsyncWriteExt::close(&mut stream)).await;
            if was_question {
                return debug!(%from, status = ?answer.status(), "question of another node answered");
            }
            return self.failed(Some(&from), &answer.detail);
        };
        self.counters.served.add(1);
        let frames = Frames::new(stream, path, None);
        drop(serving);
        let ended = match dialled {
            Dialled::Tcp(mut socket) => {
                let passed = Passed { up: &AtomicU64::new(0), down: &AtomicU64::new(0) };
                splice(&mut socket, Stream::new(frames), passed).await.map_err(io::Error::other)
            }
            Dialled::Udp(socket) => splice_udp(&socket, &mut DatagramStream::new(frames), self.idle).await,
        };
        debug!(%from, ?ended, "flow for another node ended");
        drop(place);
    }

    fn failed(&self, from: Option<&NodeName>, why: &str) {
        self.counters.serve_failures.add(1);
        debug!(from = from.map_or("unknown", NodeName::as_str), "request of another node came to nothing: {why}");
    }

    async fn dial(&self, from: &NodeName, request: &Request) -> Result<Dialled, Response> {
        let (protocol, target) = parse(request.protocol, request)?;
        let address = self.judge(from, request, protocol, target)?;
        self.attempt(protocol, address, request).await
    }

    /// What would become of a stream, and why: nothing but what opening it would tell, and the names of Services, which all
    /// members have from the API. A pod sees a connection that ends at once, as of a probe.
    async fn explain(&self, from: &NodeName, request: &Request) -> Response {
        let mut explanation = Explanation::default();
        let response = match self.explore(from, request, &mut explanation).await {
            Ok(status) => Response::new(status, ""),
            Err(refusal) => refusal,
        };
        Response { explanation: Some(explanation), ..response }
    }

    async fn explore(
        &self,
        from: &NodeName,
        request: &Request,
        explanation: &mut Explanation,
    ) -> Result<Status, Response> {
        let busy = |_| Response::new(Status::Busy, "as many questions are being answered as this node takes");
        let _place = self.questions.try_acquire().map_err(busy)?;
        let (protocol, target) = parse(request.question.unwrap_or(wire::NO_PROTOCOL), request)?;
        let address = self.judge(from, request, protocol, target)?;
        let Grounds { rule, mut services } = self.policy.grounds(protocol, target);
        services.truncate(wire::MAX_SERVICES);
        (explanation.rule, explanation.services) = (rule, services);
        if protocol == Protocol::Udp {
            return Ok(Status::Allowed);
        }
        let begin = Instant::now();
        let attempt = self.attempt(protocol, address, request).await;
        explanation.dial_micros = Some(u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX));
        attempt.map(|_| Status::Connected)
    }

    /// Where to dial for a target, if anywhere.
    fn judge(
        &self,
        from: &NodeName,
        request: &Request,
        protocol: Protocol,
        target: Target,
    ) -> Result<SocketAddr, Response> {
        if request.node != self.node.as_str() {
            return Err(Response::new(Status::Invalid, &format!("this is node {}", self.node)));
        }
        let refuse = |rule: &str| Err(Response::new(Status::NotAllowed, rule));
        if let Target::Address(address) = target
            && let Some(rule) = (self.refused)(address.ip())
        {
            return refuse(rule);
        }
        let address = match self.policy.decide(from, protocol, target) {
            Decision::Allowed(address) => address,
            Decision::NotAllowed { rule } => return refuse(&rule),
        };
        // Once more, for what a policy makes of a target.
        match (self.refused)(address.ip()) {
            Some(rule) => refuse(rule),
            None => Ok(address),
        }
    }

    async fn attempt(&self, protocol: Protocol, address: SocketAddr, request: &Request) -> Result<Dialled, Response> {
        // A little less than the near side waits, so that it hears of it.
        let patience = Duration::from_millis(request.patience.into()).mul_f32(0.9).min(self.deadline);
        let begin = Instant::now();
        match timeout(patience, connect(protocol, address)).await {
            Ok(Ok(dialled)) => Ok(dialled),
            Ok(Err(error)) => Err(Response::new(status_of(&error), &format!("{address}: {error}"))),
            Err(_) => {
                let why = format!("{address} did not answer within {:?}", begin.elapsed());
                Err(Response::new(Status::TimedOut, &why))
            }
        }
    }
}

impl Response {
    fn new(status: Status, detail: &str) -> Self {
        Self { status: status.into(), detail: detail.to_owned(), explanation: None }
    }
}

fn parse(protocol: i32, request: &Request) -> Result<(Protocol, Target), Response> {
    let invalid = |what| Response::new(Status::Invalid, what);
    let protocol = Protocol::try_from(protocol).map_err(|_| invalid("unknown protocol"))?;
    let port = u16::try_from(request.port).ok().filter(|port| *port != 0).ok_or_else(|| invalid("no such port"))?;
    let target = match wire::ip_of(&request.ip).map_err(|()| invalid("not an IP address"))? {
        Some(ip) => Target::Address(SocketAddr::new(ip, port)),
        None => Target::Node { port },
    };
    Ok((protocol, target))
}

async fn connect(protocol: Protocol, address: SocketAddr) -> io::Result<Dialled> {
    match protocol {
        Protocol::Tcp => {
            let socket = TcpStream::connect(address).await?;
            // Whoever is in front of the tunnel has gathered what belongs together.
            socket.set_nodelay(true)?;
            keep_alive(&socket)?;
            Ok(Dialled::Tcp(socket))
        }
        Protocol::Udp => {
            let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any).await?;
            socket.connect(address).await?;
            Ok(Dialled::Udp(socket))
        }
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "addresses without a route, firewalls, interfaces that are down: all is one to who asked"
)]
fn status_of(error: &io::Error) -> Status {
    use io::ErrorKind as K;
    match error.kind() {
        K::ConnectionRefused | K::ConnectionReset => Status::Refused,
        K::TimedOut => Status::TimedOut,
        _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)) => {
            Status::Busy
        }
        _ => Status::Unreachable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_dial_are_told_apart() {
        for (errno, status) in [
            (libc::ECONNREFUSED, Status::Refused),
            (libc::EHOSTUNREACH, Status::Unreachable),
            (libc::ENETUNREACH, Status::Unreachable),
            (libc::EACCES, Status::Unreachable),
            (libc::ETIMEDOUT, Status::TimedOut),
            (libc::EMFILE, Status::Busy),
        ] {
            assert_eq!(status_of(&io::Error::from_raw_os_error(errno)), status, "{errno}");
        }
    }

    #[tokio::test]
    async fn a_pod_that_vanishes_is_missed() {
        use nix::sys::socket::{getsockopt, sockopt};
        let pod = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialled = connect(Protocol::Tcp, pod.local_addr().unwrap()).await.unwrap();
        let Dialled::Tcp(socket) = dialled else { panic!("it was not UDP that was asked for") };
        assert!(getsockopt(&socket, sockopt::KeepAlive).unwrap());
        assert_eq!(getsockopt(&socket, sockopt::TcpKeepIdle).unwrap(), 60);
        assert_eq!(getsockopt(&socket, sockopt::TcpKeepInterval).unwrap(), 10);
        assert_eq!(getsockopt(&socket, sockopt::TcpKeepCount).unwrap(), 3);
    }

    #[test]
    fn requests_that_make_no_sense_are_told_so() {
        let good =
            Request { protocol: 1, node: "n".into(), ip: vec![10, 0, 0, 1], port: 80, patience: 1, question: None };
        assert_eq!(parse(1, &good), Ok((Protocol::Tcp, Target::Address("10.0.0.1:80".parse().unwrap()))));
        let node = Request { ip: Vec::new(), ..good.clone() };
        assert_eq!(parse(2, &node), Ok((Protocol::Udp, Target::Node { port: 80 })));
        for (protocol, bad) in [
            (wire::NO_PROTOCOL, good.clone()),
            (7, good.clone()),
            (1, Request { port: 0, ..good.clone() }),
            (1, Request { port: 65_536, ..good.clone() }),
            (1, Request { ip: vec![1], ..good }),
        ] {
            assert_eq!(parse(protocol, &bad).unwrap_err().status(), Status::Invalid, "{protocol} {bad:?}");
        }
    }
}
