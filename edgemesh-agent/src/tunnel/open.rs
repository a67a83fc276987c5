//! The near side: opens streams.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::oneshot, time::timeout_at};

use super::{
    NodeName, Protocol, Target, Tunnel,
    driver::Command,
    paths::{Path, Permit},
    stream::{DatagramStream, Frames, Stream},
    substream::Substream,
    wire::{self, Request, Response, Status},
};

/// Why there is no stream.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum OpenError {
    /// The target refused the connection.
    #[error("refused by {0}")]
    Refused(String),
    /// The far node cannot reach the target.
    #[error("not reachable from its node: {0}")]
    Unreachable(String),
    /// The far node does not dial this target for others.
    #[error("not allowed by the target's node: {rule}")]
    NotAllowed {
        /// The rule, in its words.
        rule: String,
    },
    /// The target did not answer in time, or the node, or nobody.
    #[error("no answer in time: {0}")]
    TimedOut(String),
    /// There are as many streams as one of the two nodes takes.
    #[error("too many streams: {0}")]
    Busy(String),
    /// There is no way to the node.
    #[error("no way to node {node}: {why}")]
    NoPath {
        /// The node.
        node: NodeName,
        /// What was tried.
        why: String,
    },
    /// The far node answered with what this one does not understand, or did not understand the request.
    #[error("node {node} did not understand the request: {why}")]
    Protocol {
        /// The node.
        node: NodeName,
        /// What it said.
        why: String,
    },
    /// The tunnel has been stopped.
    #[error("the tunnel has been stopped")]
    Stopped,
}

/// What is asked of a far node.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub(super) protocol: Protocol,
    pub(super) target: Target,
    /// Whether no stream is wanted, but to be told what would become of one.
    pub(super) question: bool,
}

/// A far node's answer, and the stream on which it came.
pub(super) struct Answered {
    pub(super) response: Response,
    pub(super) path: Arc<Path>,
    stream: Substream,
    permit: Permit,
}

impl Tunnel {
    /// Opens a TCP connection to `target` by way of `node`. Costs one round trip when the node is connected already.
    ///
    /// # Errors
    ///
    /// [`OpenError`], within `deadline`.
    pub async fn open_tcp(
        &self,
        node: &NodeName,
        target: impl Into<Target>,
        deadline: Duration,
    ) -> Result<Stream, OpenError> {
        self.open(node, Protocol::Tcp, target.into(), deadline).await.map(Stream::new)
    }

    /// Opens a UDP flow to `target` by way of `node`. That it opens says that the far node sends to the target, not that
    /// anybody listens there.
    ///
    /// # Errors
    ///
    /// [`OpenError`], within `deadline`.
    pub async fn open_udp(
        &self,
        node: &NodeName,
        target: impl Into<Target>,
        deadline: Duration,
    ) -> Result<DatagramStream, OpenError> {
        self.open(node, Protocol::Udp, target.into(), deadline).await.map(DatagramStream::new)
    }

    async fn open(
        &self,
        node: &NodeName,
        protocol: Protocol,
        target: Target,
        deadline: Duration,
    ) -> Result<Frames, OpenError> {
        let until = Instant::now() + deadline;
        let wanted = Wanted { protocol, target, question: false };
        let answered = timeout_at(until.into(), self.try_paths(node, wanted, until)).await;
        let answered = answered
            .unwrap_or_else(|_| Err(OpenError::TimedOut(format!("{node} has not answered within {deadline:?}"))));
        let opened =
            answered.and_then(|Answered { response, path, stream, permit }| match refusal(node, target, response) {
                None => Ok(Frames::new(stream, path, Some(permit))),
                Some(error) => Err(error),
            });
        match &opened {
            Ok(_) => self.counters.opened.add(1),
            Err(_) => self.counters.open_failures.add(1),
        }
        opened
    }

    /// The answer by the best path that gives one; whatever it is, it is final.
    pub(super) async fn try_paths(
        &self,
        node: &NodeName,
        wanted: Wanted,
        until: Instant,
    ) -> Result<Answered, OpenError> {
        let mut failed = Vec::new();
        let (mut looked, mut rounds, mut changes) = (false, 0, self.peers.clone());
        loop {
            if self.stop.is_cancelled() {
                return Err(OpenError::Stopped);
            }
            let peers = Arc::clone(&self.peers.borrow());
            let paths = peers.paths(node);
            let usable = |path: &&Arc<Path>| !failed.contains(&path.connection) && !path.open.is_closed();
            let mut any = false;
            let chosen = paths.iter().filter(usable).find_map(|path| {
                any = true;
                Some((Arc::clone(path), path.permit(wanted.protocol)?))
            });
            let Some((path, permit)) = chosen else {
                if any {
                    return Err(OpenError::Busy(format!("as many streams to {node} are open as one connection takes")));
                }
                let (listed, _) = (!paths.is_empty(), changes.borrow_and_update());
                self.connect(node).await?;
                if listed {
                    // Paths that have just failed are still listed. Either the swarm will hear that they have ended, or
                    // they are there and take no streams.
                    rounds += 1;
                    if rounds > MAX_ROUNDS {
                        let why = "its connections take no streams".to_owned();
                        return Err(OpenError::NoPath { node: node.clone(), why });
                    }
                    let _ = tokio::time::timeout(ROUND, changes.changed()).await;
                }
                continue;
            };
            if path.is_doubtful() && !looked {
                // Perhaps there is a better one by now, or can be; if not, this one is tried all the same.
                looked = true;
                let _ = tokio::time::timeout(LOOK, self.connect(node)).await;
                continue;
            }
            let connection = path.connection;
            match request(node, path, permit, wanted, until).await {
                Ok(answered) => return Ok(answered),
                // Nothing of the flow has been sent, so another may be tried.
                Err(why) => {
                    tracing::debug!(%node, "stream not opened, next path: {why}");
                    failed.push(connection);
                    if failed.len() > MAX_ATTEMPTS {
                        return Err(OpenError::NoPath { node: node.clone(), why });
                    }
                }
            }
        }
    }

    async fn connect(&self, node: &NodeName) -> Result<(), OpenError> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Connect { node: node.clone(), reply };
        self.commands.send(command).await.map_err(|_| OpenError::Stopped)?;
        match answer.await {
            Ok(answer) => answer.map_err(|why| OpenError::NoPath { node: node.clone(), why }),
            Err(_) if self.stop.is_cancelled() => Err(OpenError::Stopped),
            // The swarm is being started anew, as with a new identity: the next one is asked.
            Err(_) => {
                tokio::time::sleep(RESTART).await;
                Ok(())
            }
        }
    }
}

/// How long a swarm that is being started anew is given before it is asked again.
const RESTART: Duration = Duration::from_millis(100);

/// How long another path is looked for where the only one is in doubt.
const LOOK: Duration = Duration::from_millis(1500);

/// How long the list of paths is given to change when all that are in it have failed, and how often.
const ROUND: Duration = Duration::from_millis(50);
const MAX_ROUNDS: u32 = 10;

/// Paths that may fail under one request.
const MAX_ATTEMPTS: usize = 4;

/// Asks by one path; an error is why that path failed before there was an answer.
async fn request(
    node: &NodeName,
    path: Arc<Path>,
    permit: Permit,
    wanted: Wanted,
    until: Instant,
) -> Result<Answered, String> {
    let lost = |error: io::Error| error.to_string();
    let gone = || "the connection has ended".to_owned();
    let (reply, stream) = oneshot::channel();
    path.open.send(reply).await.map_err(|_| gone())?;
    let mut stream = Substream::new(stream.await.map_err(|_| gone())??, &path);
    let Wanted { protocol, target, question } = wanted;
    let (ip, port) = match target {
        Target::Address(address) => (wire::ip_bytes(address.ip()), address.port()),
        Target::Node { port } => (Vec::new(), port),
    };
    let patience = until.saturating_duration_since(Instant::now()).as_millis();
    let request = Request {
        protocol: if question { wire::NO_PROTOCOL } else { protocol.into() },
        node: node.to_string(),
        ip,
        port: port.into(),
        patience: u32::try_from(patience).unwrap_or(u32::MAX),
        question: question.then_some(protocol.into()),
    };
    wire::write(&mut stream, &request).await.map_err(lost)?;
    let response = wire::read::<Response>(&mut stream).await.map_err(lost)?;
    Ok(Answered { response, path, stream, permit })
}

/// What an answer other than success means.
fn refusal(node: &NodeName, target: Target, response: Response) -> Option<OpenError> {
    let status = response.status();
    let mut detail = response.detail;
    if detail.is_empty() {
        detail = match target {
            Target::Address(SocketAddr::V4(address)) => address.to_string(),
            Target::Address(SocketAddr::V6(address)) => address.to_string(),
            Target::Node { port } => format!("port {port} of {node}"),
        };
    }
    match status {
        Status::Connected => None,
        Status::Refused => Some(OpenError::Refused(detail)),
        Status::Unreachable => Some(OpenError::Unreachable(detail)),
        Status::NotAllowed => Some(OpenError::NotAllowed { rule: detail }),
        Status::TimedOut => Some(OpenError::TimedOut(detail)),
        Status::Busy => Some(OpenError::Busy(detail)),
        Status::Unknown | Status::Invalid | Status::Allowed => {
            Some(OpenError::Protocol { node: node.clone(), why: detail })
        }
    }
}
