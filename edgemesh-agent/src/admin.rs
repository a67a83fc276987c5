//! The two doors for operators: HTTP for probes and metrics, and the same over a unix socket with more for the command
//! line.
//!
//! | path | where | answer |
//! |---|---|---|
//! | `/healthz` | both | 200 while the agent runs |
//! | `/readyz` | both | 200, or 503 with what is waited for |
//! | `/metrics` | both | OpenMetrics text |
//! | `/v1/status`, `/v1/services`, `/v1/backends/NS/NAME` | unix socket | JSON, see [`crate::status`] |

mod client;

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header::CONTENT_TYPE, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::stat::{Mode, umask};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{Semaphore, watch},
};
use tracing::{debug, warn};

pub use client::{ClientError, get};

use crate::{
    conditions::Conditions,
    dataplane,
    kube::SourceState,
    lifecycle::{Readiness, Tasks},
    metrics,
    model::{NamespacedName, ServiceTable},
    net::{Device, sock_diag},
    status::{self, CountsByFrontend, DataplaneStatus, Status},
};

/// How long a client may take for its request head.
const HEAD_DEADLINE: Duration = Duration::from_secs(5);
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
    pub dataplane: Option<DataplaneSight>,
    pub device: Option<Device>,
}

/// The data plane as far as answers need it.
#[derive(Clone, Debug)]
pub struct DataplaneSight {
    pub handle: dataplane::Handle,
    pub cgroup: PathBuf,
    pub adopted_frontends: usize,
    /// Counts the UDP sockets ended because their backend was gone.
    pub ended_sockets: Option<sock_diag::Ended>,
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
            dataplane: self.dataplane.as_ref().map(|dataplane| DataplaneStatus {
                kind: dataplane.handle.name(),
                cgroup: dataplane.cgroup.display().to_string(),
                adopted_frontends: dataplane.adopted_frontends,
                ended_udp_sockets: dataplane.ended_sockets.as_ref().map_or(0, sock_diag::Ended::get),
                generation: dataplane.handle.generation(),
                newest_generation: table.generation,
            }),
            device: self.device.clone(),
            services: table.services.len(),
            frontends: frontends().count(),
            backends: frontends().map(|frontend| frontend.backends.len()).sum(),
            conditions: self.conditions.list(),
        }
    }

    /// None where there is no data plane, or where it could not be read: said in the log, and never fatal.
    async fn counts(&self) -> Option<CountsByFrontend> {
        match self.dataplane.as_ref()?.handle.counters().await {
            Ok(counts) => Some(status::by_frontend(&counts)),
            Err(error) => {
                warn!("counters are missing from an answer: {error}");
                None
            }
        }
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
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
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

/// Serves the TCP door until the agent stops.
pub async fn serve(listener: TcpListener, sight: Sight, tasks: Tasks) {
    let (stop, slots) = (tasks.stopping(), Arc::new(Semaphore::new(CONNECTIONS)));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => spawn(stream, Door::Http, sight.clone(), &tasks, slot),
                Err(error) => pause_after(&error).await,
            },
        }
    }
}

/// Serves the unix socket until the agent stops.
pub async fn serve_socket(listener: UnixListener, sight: Sight, tasks: Tasks) {
    let (stop, slots) = (tasks.stopping(), Arc::new(Semaphore::new(CONNECTIONS)));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => spawn(stream, Door::Socket, sight.clone(), &tasks, slot),
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
        let service = service_fn(move |request| {
            let sight = sight.clone();
            async move { Ok::<_, Infallible>(answer(&request, door, &sight).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_DEADLINE)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = result {
            debug!("an admin connection ended early: {error}");
        }
    });
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
            waiting => text(StatusCode::SERVICE_UNAVAILABLE, format!("waiting for {}\n", waiting.join(", "))),
        },
        (_, "/metrics") => {
            let counts = sight.counts().await;
            let table = Arc::clone(&sight.tables.borrow());
            match metrics::render(&sight.status(Instant::now()), &table, counts.as_ref()) {
                Ok(body) => {
                    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                    respond(StatusCode::OK, kind, body)
                }
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot render the metrics: {error}\n")),
            }
        }
        (Door::Socket, "/v1/status") => json(&sight.status(Instant::now())),
        (Door::Socket, "/v1/services") => {
            let counts = sight.counts().await.unwrap_or_default();
            let table = Arc::clone(&sight.tables.borrow());
            json(&status::services(&table, &counts))
        }
        (Door::Socket, _) if path.starts_with("/v1/backends/") => backends(path, sight).await,
        _ => text(StatusCode::NOT_FOUND, "nothing here; see /healthz, /readyz, /metrics\n"),
    }
}

async fn backends(path: &str, sight: &Sight) -> Response<Full<Bytes>> {
    let name: NamespacedName = match path.trim_start_matches("/v1/backends/").parse() {
        Ok(name) => name,
        Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    };
    let table = Arc::clone(&sight.tables.borrow());
    match table.get(&name) {
        Some(entry) => json(&status::backends(entry, &sight.counts().await.unwrap_or_default())),
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
