//! Takes clients, as soon as the address is free.

use std::{
    io,
    net::SocketAddr,
    os::fd::AsFd,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use serde::Serialize;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tracing::{debug, info};

use super::{Server, counters::Open, session};
use crate::{
    net::{
        crowd::Crowd,
        holder::{self, Port},
    },
    proxy::{Dial, Refusal},
};

/// How many clients there may be.
const SESSIONS: usize = 2048;
/// How many of them may be of one address.
const SESSIONS_OF_ONE: usize = 512;
/// How often an address that was taken is tried again.
const REBIND: Duration = Duration::from_secs(5);
/// Out of descriptors, accept fails at once and for ever.
const PAUSE: Duration = Duration::from_millis(100);
const UNAVAILABLE: &str = "Socks5AddressUnavailable";

/// An address on which clients are to be served.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Listener {
    pub address: SocketAddr,
    /// False while something else has it.
    pub listening: bool,
}

/// Which addresses are listened on. Clones are one.
#[derive(Clone, Debug, Default)]
pub(super) struct Listening(Arc<Mutex<Vec<Listener>>>);

impl Listening {
    pub(super) fn new(addresses: &[SocketAddr]) -> Self {
        let closed = |address: &SocketAddr| Listener { address: *address, listening: false };
        Self(Arc::new(Mutex::new(addresses.iter().map(closed).collect())))
    }

    pub(super) fn list(&self) -> Vec<Listener> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn bound(&self, index: usize, address: SocketAddr) {
        if let Some(listener) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get_mut(index) {
            *listener = Listener { address, listening: true };
        }
    }
}

/// Who may be a client, at all addresses together.
#[derive(Clone, Debug)]
pub(super) struct Room {
    sessions: Arc<Semaphore>,
    crowd: Crowd,
}

impl Default for Room {
    fn default() -> Self {
        Self::new(SESSIONS, SESSIONS_OF_ONE)
    }
}

impl Room {
    /// For so many clients, and so many of one address.
    pub(super) fn new(sessions: usize, of_one: usize) -> Self {
        Self { sessions: Arc::new(Semaphore::new(sessions)), crowd: Crowd::new(of_one) }
    }
}

/// Serves the address of that index until the agent stops.
pub(super) async fn serve<D: Dial>(
    server: Arc<Server<D>>,
    address: SocketAddr,
    index: usize,
    listening: Listening,
    room: Room,
) {
    let Some(listener) = bind_when_free(&server, address).await else { return };
    server.guard.keep(listener.as_fd(), &address.to_string(), &server.tasks).await;
    let bound = listener.local_addr().unwrap_or(address);
    listening.bound(index, bound);
    info!(address = %bound, login = server.credentials.is_some(), "serving SOCKS5");
    let stop = server.tasks.stopping();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, client)) => take(&server, stream, client, &room),
            // Of one connection, and gone with it.
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {
            }
            Err(error) => {
                debug!("cannot accept a client of SOCKS5: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn take<D: Dial>(server: &Arc<Server<D>>, stream: TcpStream, client: SocketAddr, room: &Room) {
    let seat = room.crowd.seat(client.ip());
    let (Ok(place), Some(seat)) = (Arc::clone(&room.sessions).try_acquire_owned(), seat) else {
        // It has not been read what the client wants, so there is no way to answer.
        let _ = stream.set_zero_linger();
        return server.fail(client, None, &Refusal::Overloaded.into());
    };
    let (server, stop) = (Arc::clone(server), server.tasks.stopping());
    let tasks = server.tasks.clone();
    tasks.spawn(async move {
        let _held = (place, seat);
        let _open = Open::new(&server.counters.open_sessions);
        tokio::select! {
            () = stop.cancelled() => {}
            () = session::serve(&server, stream, client) => {}
        }
    });
}

/// None when the agent stops before.
async fn bind_when_free<D>(server: &Server<D>, address: SocketAddr) -> Option<TcpListener> {
    let (stop, subject) = (server.tasks.stopping(), address.to_string());
    // Whoever could ask before the guard is there would be served.
    if !server.guard.is_ready(&stop).await {
        return None;
    }
    loop {
        let error = match TcpListener::bind(address).await {
            Ok(listener) => {
                server.conditions.clear(UNAVAILABLE, &subject);
                return Some(listener);
            }
            Err(error) => error,
        };
        let kind = error.kind();
        let advice = if kind == io::ErrorKind::AddrInUse {
            let found = tokio::task::spawn_blocking(move || holder::find(Port::Tcp(address))).await.ok().flatten();
            let holder = found.map_or_else(String::new, |holder| format!(", as {holder} has it"));
            format!("{holder}; stop it, or set modules.edgeProxy.socks5Proxy.listenPort")
        } else if kind == io::ErrorKind::AddrNotAvailable {
            "; bring the device of commonConfig.bridgeDeviceName back".to_owned()
        } else {
            String::new()
        };
        let message =
            format!("cannot serve SOCKS5 on {address}: {error}{advice}; tried again every {} s", REBIND.as_secs());
        server.conditions.raise(UNAVAILABLE, subject.clone(), message, SystemTime::now());
        tokio::select! {
            () = stop.cancelled() => return None,
            () = tokio::time::sleep(REBIND) => {}
        }
    }
}
