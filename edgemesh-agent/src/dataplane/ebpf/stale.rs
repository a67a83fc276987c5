//! Connected UDP sockets of backends that are gone: the kernel would go on sending to them, and no error would ever come
//! back. They are ended, so that their applications connect anew.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use aya::maps::MapData;
use edgemesh_common::{
    Addr,
    layout::{FrontendKey, UdpSocket},
};
use tracing::warn;

use crate::{
    conditions::Conditions,
    net::sock_diag::{self, Ended, Handle},
};

/// How long a backend counts as gone: more than the worker can take to get to it.
const MEMORY: Duration = Duration::from_secs(60);

/// Pairs of frontend and backend that were taken away, and when.
type Gone = Arc<Mutex<HashMap<(FrontendKey, SocketAddr), Instant>>>;

/// Ends the connected UDP sockets that this agent's programs sent to backends that are gone.
pub(super) struct StaleSockets {
    worker: Handle,
    gone: Gone,
    /// Collected until [`StaleSockets::flush`].
    peers: Vec<SocketAddr>,
}

impl StaleSockets {
    /// `sockets` says where each connected UDP socket was sent, by its cookie.
    ///
    /// # Errors
    ///
    /// The system refuses a thread.
    pub(super) fn new(
        sockets: aya::maps::HashMap<MapData, u64, UdpSocket>,
        conditions: Conditions,
    ) -> io::Result<Self> {
        let gone = Gone::default();
        let still_gone = Arc::clone(&gone);
        // A socket is ours to end only if our program sent it there, and for a Service that has not taken the backend
        // back meanwhile: another Service may have the same one.
        let ours = move |cookie, backend: SocketAddr| {
            sockets.get(&cookie, 0).is_ok_and(|socket| {
                socket.backend == Addr::from(backend.ip())
                    && socket.backend_port == backend.port().to_be_bytes()
                    && lock(&still_gone).contains_key(&(socket.frontend, backend))
            })
        };
        // The worker ends by itself when its handle is dropped, after what is queued.
        let (worker, _) = sock_diag::spawn(Box::new(ours), conditions)?;
        Ok(Self { worker, gone, peers: Vec::new() })
    }

    /// How many sockets were ended so far.
    pub(super) fn ended(&self) -> Ended {
        self.worker.ended()
    }

    /// A UDP frontend has lost `backend`.
    pub(super) fn lost(&mut self, frontend: FrontendKey, backend: SocketAddr, now: Instant) {
        lock(&self.gone).insert((frontend, backend), now);
        self.peers.push(backend);
    }

    /// A UDP frontend has `backend`, perhaps again.
    pub(super) fn has(&self, frontend: FrontendKey, backend: SocketAddr) {
        lock(&self.gone).remove(&(frontend, backend));
    }

    /// Has the sockets of all backends lost since the last time ended; does not wait for it.
    pub(super) fn flush(&mut self) {
        let peers = std::mem::take(&mut self.peers);
        if !peers.is_empty()
            && let Err(busy) = self.worker.end(peers)
        {
            warn!(
                backends = busy.0.len(),
                "too much to do to end the UDP sockets of backends that are gone; tried again"
            );
            self.peers = busy.0;
        }
    }

    /// Tries again what was too much, and forgets what is long done.
    pub(super) fn maintain(&mut self, now: Instant) {
        self.flush();
        lock(&self.gone).retain(|_, since| now.saturating_duration_since(*since) < MEMORY);
    }
}

fn lock(gone: &Gone) -> std::sync::MutexGuard<'_, HashMap<(FrontendKey, SocketAddr), Instant>> {
    gone.lock().unwrap_or_else(PoisonError::into_inner)
}
