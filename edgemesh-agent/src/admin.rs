//! The two doors for operators: HTTP for probes and metrics, and the same over a unix socket with more for the command
//! line.
//!
//! | path | where | answer |
//! |---|---|---|
//! | `/healthz` | both | 200 while the agent runs |
//! | `/readyz` | both | 200, or 503 with what is waited for |
//! | `/metrics` | both | OpenMetrics text |
//! | `/v1/status`, `/v1/services`, `/v1/backends/NS/NAME` | unix socket | JSON, see [`crate::status`] |
//! | `/v1/peers` | unix socket | JSON, rows of [`crate::status::PeerRow`] |
//! | `/v1/trace?to=TARGET&from=CLIENT` | unix socket | JSON, see [`crate::status::TraceReport`] |
//! | `/v1/dns?name=NAME&type=TYPE&dnssec=true` | unix socket | JSON, see [`crate::dns::DnsReport`] |
//! | `/v1/events?for=SECONDS&service=NS/NAME&from=CLIENT` | unix socket | lines of JSON, see [`crate::status::EventLine`] |

mod client;
mod dns;
mod events;
mod trace;

use std::{
    convert::Infallible,
    future::poll_fn,
    io,
    net::SocketAddr,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header::CONTENT_TYPE, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::stat::{Mode, umask};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{Semaphore, watch},
};
use tracing::{debug, warn};

pub use client::{ClientError, get, stream};
pub use events::LONGEST;

use crate::{
    allocator,
    conditions::Conditions,
    dataplane::{
        self, Count, Room,
        ebpf::{TrafficSight, probe::Standing},
    },
    dns::Dns,
    health,
    kube::SourceState,
    lifecycle::{Readiness, Tasks},
    mesh, metrics,
    model::{NamespacedName, ServiceTable},
    net::{Device, sock_diag},
    proxy,
    snapshot::SnapshotState,
    socks5,
    status::{self, DataplaneStatus, Status},
};

/// How long a client may take for its request head.
const HEAD_DEADLINE: Duration = Duration::from_secs(5);
/// How long a connection is kept; a client that wants more makes a new one.
const CONNECTION_AGE: Duration = Duration::from_secs(30);
/// How long the client of a connection that is to end may take to read its last answer.
const LAST_ANSWER: Duration = Duration::from_secs(2);
/// How many connections each door serves at once; more wait in the backlog.
const CONNECTIONS: usize = 64;

/// Everything an answer is made from.
#[derive(Clone, Debug)]
pub struct Sight {
    pub node: Arc<str>,
    pub started: Instant,
    pub readiness: Readiness,
    pub conditions: Conditions,
    pub tables: watch::Receiver<Arc<ServiceTable>>,
    pub source: SourceState,
    /// None where none is kept.
    pub snapshot: Option<SnapshotState>,
    pub dataplane: Option<DataplaneSight>,
    /// None where DNS is not answered on this node.
    pub dns: Option<Dns>,
    pub device: Option<Device>,
    /// None without a tunnel.
    pub aliases: Option<proxy::Sight>,
    /// None without a tunnel.
    pub tunnel: Option<mesh::Sight>,
    /// None where SOCKS5 is not served.
    pub socks5: Option<socks5::Sight>,
    /// How many backends may have series of their own in the metrics.
    pub max_backend_series: u32,
    /// Held while an answer is rendered whose size grows with the cluster: one at a time, for the memory it takes.
    pub rendering: Arc<Semaphore>,
}

/// The data plane as far as answers need it.
#[derive(Clone, Debug)]
pub struct DataplaneSight {
    pub handle: dataplane::Handle,
    pub cgroup: PathBuf,
    pub adopted_frontends: usize,
    pub standing: Standing,
    /// None where the canary is switched off.
    pub canary: Option<health::CanaryState>,
    /// Counts the UDP sockets ended because their backend was gone.
    pub ended_sockets: Option<sock_diag::Ended>,
    /// None for a data plane that writes none.
    pub events: Option<dataplane::events::Events>,
    /// What is attached to interfaces.
    pub traffic: Option<TrafficSight>,
}

impl Sight {
    /// The answer to `status`.
    pub fn status(&self, now: Instant) -> Status {
        let table = Arc::clone(&self.tables.borrow());
        let waiting_for = self.readiness.waiting_for();
        let frontends = || table.services.iter().flat_map(|entry| &entry.frontends);
        Status {
            version: status::VERSION,
            node: self.node.to_string(),
            uptime_seconds: now.saturating_duration_since(self.started).as_secs(),
            ready: waiting_for.is_empty(),
            waiting_for,
            source: self.source.status(),
            snapshot: self.snapshot.as_ref().map(|snapshot| snapshot.status(SystemTime::now())),
            dataplane: self.dataplane.as_ref().map(|dataplane| DataplaneStatus {
                kind: dataplane.handle.name(),
                cgroup: dataplane.cgroup.display().to_string(),
                adopted_frontends: dataplane.adopted_frontends,
                standing: dataplane.standing.clone(),
                canary: dataplane.canary.as_ref().map(health::CanaryState::status),
                ended_udp_sockets: dataplane.ended_sockets.as_ref().map_or(0, sock_diag::Ended::get),
                interfaces: dataplane.traffic.as_ref().map(TrafficSight::interfaces).unwrap_or_default(),
                dropped_packets: dataplane.traffic.as_ref().map(TrafficSight::drops).unwrap_or_default(),
                generation: dataplane.handle.generation(),
                newest_generation: table.generation,
            }),
            dns: self.dns.as_ref().map(Dns::status),
            device: self.device.clone(),
            aliases: self.aliases.as_ref().map(|aliases| aliases.status(&table.aliases)),
            tunnel: self.tunnel.as_ref().map(mesh::Sight::status),
            socks5: self.socks5.as_ref().map(socks5::Sight::status),
            services: table.services.len(),
            frontends: frontends().count(),
            backends: frontends().map(|frontend| frontend.backends.len()).sum(),
            conditions: self.conditions.list(),
        }
    }

    /// None where there is no data plane, or where it could not be read: said in the log, and never fatal.
    async fn counts(&self) -> Option<Vec<Count>> {
        match self.dataplane.as_ref()?.handle.counters().await {
            Ok(counts) => Some(counts),
            Err(error) => {
                warn!("counters are missing from an answer: {error}");
                None
            }
        }
    }

    async fn rooms(&self) -> Vec<Room> {
        match &self.dataplane {
            Some(dataplane) => dataplane.handle.rooms().await.unwrap_or_default(),
            None => Vec::new(),
        }
    }

    /// Has `render` make an answer away from the agent's one thread, which the API and the builder wait for.
    async fn rendered<F>(&self, render: F) -> Response<Full<Bytes>>
    where
        F: FnOnce() -> Response<Full<Bytes>> + Send + 'static,
    {
        let Ok(slot) = Arc::clone(&self.rendering).acquire_owned().await else {
            return text(StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping\n");
        };
        let rendered = tokio::task::spawn_blocking(move || {
            let _slot = slot;
            render()
        });
        rendered.await.unwrap_or_else(|error| {
            text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot render the answer: {error}\n"))
        })
    }
}

/// Listens for probes and scrapes.
///
/// # Errors
///
/// The address cannot be bound.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Listens for the command line, for root alone. A socket that an earlier agent left is replaced; one that answers is
/// not.
///
/// # Errors
///
/// Another agent is listening there, or the socket cannot be made.
pub fn bind_socket(path: &Path) -> io::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another agent is listening on it"));
    }
    remove_socket(path)?;
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    // The mask makes the socket private from its first moment; it is the process's, which at this point of the start
    // makes no other file.
    let mask = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(mask);
    listener
}

/// Removes a socket that nobody listens on any more; says whether there was one.
///
/// # Errors
///
/// It cannot be removed, or what is there is no socket, and not ours to remove.
pub fn remove_socket(path: &Path) -> io::Result<bool> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path).map(|()| true),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "what is there is no socket")),
    }
}

/// Serves the TCP door until the agent stops.
pub async fn serve(listener: TcpListener, sight: Sight, tasks: Tasks) {
    accept_all(Door::Http, |cx| listener.poll_accept(cx).map_ok(|(stream, _)| stream), sight, tasks).await;
}

/// Serves the unix socket until the agent stops.
pub async fn serve_socket(listener: UnixListener, sight: Sight, tasks: Tasks) {
    accept_all(Door::Socket, |cx| listener.poll_accept(cx).map_ok(|(stream, _)| stream), sight, tasks).await;
}

async fn accept_all<S>(door: Door, accept: impl Fn(&mut Context<'_>) -> Poll<io::Result<S>>, sight: Sight, tasks: Tasks)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (stop, slots) = (tasks.stopping(), Arc::new(Semaphore::new(CONNECTIONS)));
    loop {
        let next = async {
            let slot = Arc::clone(&slots).acquire_owned().await.map_err(io::Error::other)?;
            Ok((poll_fn(&accept).await?, slot))
        };
        tokio::select! {
            () = stop.cancelled() => return,
            accepted = next => match accepted {
                Ok((stream, slot)) => spawn(stream, door, sight.clone(), &tasks, slot),
                Err(error) => pause_after(&error).await,
            },
        }
    }
}

/// Out of descriptors, accept fails at once and for ever; without a pause it would take a core.
async fn pause_after(error: &io::Error) {
    warn!("cannot accept an admin connection: {error}");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Door {
    Http,
    Socket,
}

fn spawn<S>(stream: S, door: Door, sight: Sight, tasks: &Tasks, slot: tokio::sync::OwnedSemaphorePermit)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let stop = tasks.stopping();
    tasks.spawn(async move {
        let _slot = slot;
        let stay = Stay::default();
        let (told, stopping) = (stay.clone(), stop.clone());
        let service = service_fn(move |request: Request<Incoming>| {
            let (sight, stay, stop) = (sight.clone(), told.clone(), stopping.clone());
            async move {
                Ok::<_, Infallible>(match (door, request.uri().path(), request.method()) {
                    (Door::Socket, "/v1/events", &Method::GET) => {
                        events::answer(request.uri().query(), &sight, &stay, stop).await
                    }
                    _ => answer(&request, door, &sight).await.map(Either::Left),
                })
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_DEADLINE)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let result = tokio::select! {
            result = connection.as_mut() => Some(result),
            () = stop.cancelled() => None,
            () = stay.over() => None,
        };
        let result = match result {
            Some(result) => result,
            None => {
                connection.as_mut().graceful_shutdown();
                // A client that does not read its answer keeps its place no longer.
                match tokio::time::timeout(LAST_ANSWER, connection).await {
                    Ok(result) => result,
                    Err(_) => return debug!("an admin connection was cut off: its client does not read"),
                }
            }
        };
        if let Err(error) = result {
            debug!("an admin connection ended early: {error}");
        }
    });
}

/// An answer, complete or as it comes.
type Body = Either<Full<Bytes>, events::Stream>;

/// How long a connection may last. Clones are one.
#[derive(Clone, Debug, Default)]
struct Stay(Arc<AtomicU64>);

impl Stay {
    /// Has the connection last for an answer that takes this long.
    fn at_least(&self, last: Duration) {
        self.0.fetch_max(last.as_secs(), Ordering::Relaxed);
    }

    async fn over(&self) {
        tokio::time::sleep(CONNECTION_AGE).await;
        // Asked for within that time.
        tokio::time::sleep(Duration::from_secs(self.0.load(Ordering::Relaxed))).await;
    }
}

async fn answer(request: &Request<Incoming>, door: Door, sight: &Sight) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered here\n");
    }
    let path = request.uri().path();
    match (door, path) {
        (_, "/healthz") => text(StatusCode::OK, "ok\n"),
        (_, "/readyz") => match &sight.readiness.waiting_for()[..] {
            [] => text(StatusCode::OK, "ready\n"),
            waiting => text(StatusCode::SERVICE_UNAVAILABLE, unready(waiting, &sight.conditions)),
        },
        (_, "/metrics") => metrics(sight).await,
        (Door::Socket, "/v1/status") => json(&sight.status(Instant::now())),
        (Door::Socket, "/v1/services") => {
            let counts = sight.counts().await.unwrap_or_default();
            let table = Arc::clone(&sight.tables.borrow());
            sight.rendered(move || json(&status::services(&table, &status::by_frontend(&counts)))).await
        }
        (Door::Socket, "/v1/peers") => match &sight.tunnel {
            Some(tunnel) => json(&tunnel.peers()),
            None => text(StatusCode::NOT_FOUND, "there is no tunnel: modules.edgeTunnel.enable is false\n"),
        },
        (Door::Socket, "/v1/dns") => dns::answer(request.uri().query(), sight).await,
        (Door::Socket, "/v1/trace") => trace::answer(request.uri().query(), sight).await,
        (Door::Socket, _) if path.starts_with("/v1/backends/") => backends(path, sight).await,
        _ => text(StatusCode::NOT_FOUND, "nothing here; see /healthz, /readyz, /metrics\n"),
    }
}

/// After an answer of this size, in bytes, what making it needed goes back to the kernel.
const MUCH: usize = 1 << 20;

async fn metrics(sight: &Sight) -> Response<Full<Bytes>> {
    let (counts, rooms) = (sight.counts().await, sight.rooms().await);
    let (status, table) = (sight.status(Instant::now()), Arc::clone(&sight.tables.borrow()));
    let max_backends = sight.max_backend_series;
    let latency = sight.dataplane.as_ref().map(|dataplane| dataplane.handle.latency().clone());
    let queries = sight.dns.as_ref().map(Dns::stats);
    let render = move || {
        let rendered = {
            let counts = counts.map(|counts| status::by_frontend(&counts));
            let readings = counts.as_ref().map(|counts| metrics::Readings { counts, rooms: &rooms, max_backends });
            metrics::render(&status, &table, readings.as_ref(), latency.as_ref(), queries.as_ref())
        };
        if rendered.as_ref().is_ok_and(|body| body.len() >= MUCH) {
            allocator::give_back();
        }
        match rendered {
            Ok(body) => respond(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", body),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot render the metrics: {error}\n")),
        }
    };
    sight.rendered(render).await
}

/// What is waited for, and in a line each the conditions that take readiness back.
fn unready(waiting: &[&str], conditions: &Conditions) -> String {
    let mut body = format!("waiting for {}\n", waiting.join(", "));
    let reasons = [health::CANARY_FAILED, health::DETACHED];
    for condition in conditions.list().iter().filter(|condition| reasons.contains(&condition.reason)) {
        body.push_str(&format!("{}: {}\n", condition.reason, condition.message));
    }
    body
}

async fn backends(path: &str, sight: &Sight) -> Response<Full<Bytes>> {
    let name: NamespacedName = match path.trim_start_matches("/v1/backends/").parse() {
        Ok(name) => name,
        Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    };
    let table = Arc::clone(&sight.tables.borrow());
    match table.get(&name) {
        Some(entry) => {
            let counts = sight.counts().await.unwrap_or_default();
            json(&status::backends(entry, &status::by_frontend(&counts)))
        }
        None => text(StatusCode::NOT_FOUND, format!("no Service {name} is known; see `edgemesh-agent services`\n")),
    }
}

fn json(value: &impl serde::Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_vec(value) {
        Ok(body) => respond(StatusCode::OK, "application/json", body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot write the answer: {error}\n")),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", body)
}

fn respond(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncWriteExt, sync::oneshot};

    use super::*;
    use crate::{
        config::{SourceConfig, SourceKind},
        kube,
    };

    fn sight(directory: &Path, tasks: &Tasks) -> Sight {
        let kind = SourceKind::Static { directory: directory.to_owned() };
        let (events, _) = kube::Events::channel(8);
        let config = SourceConfig { kind, qps: 1, burst: 1 };
        Sight {
            node: "node".into(),
            started: Instant::now(),
            readiness: Readiness::default(),
            conditions: Conditions::default(),
            tables: watch::channel(Arc::default()).1,
            source: kube::start(&config, "node", events, oneshot::channel().1, Conditions::default(), tasks).unwrap(),
            snapshot: None,
            dataplane: None,
            dns: None,
            device: None,
            aliases: None,
            tunnel: None,
            socks5: None,
            max_backend_series: 0,
            rendering: Arc::new(Semaphore::new(1)),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_read_gives_its_place_up() {
        let (directory, tasks) = (tempfile::tempdir().unwrap(), Tasks::default());
        let slots = Arc::new(Semaphore::new(1));
        let slot = Arc::clone(&slots).acquire_owned().await.unwrap();
        let (mut client, server) = tokio::io::duplex(64);
        spawn(server, Door::Http, sight(directory.path(), &tasks), &tasks, slot);
        client.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let free = tokio::time::timeout(2 * (CONNECTION_AGE + LAST_ANSWER), slots.acquire()).await;
        drop(free.unwrap().unwrap());
        drop(client);
    }

    #[tokio::test]
    async fn a_socket_left_behind_is_replaced_and_anything_else_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        drop(bind_socket(&path).unwrap());
        assert!(path.exists(), "an agent that was killed leaves it");
        let listening = bind_socket(&path).unwrap();
        assert_eq!(bind_socket(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listening);

        let file = directory.path().join("precious");
        std::fs::write(&file, "data").unwrap();
        assert!(bind_socket(&file).is_err());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "data");
    }
}
