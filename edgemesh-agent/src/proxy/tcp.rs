//! Connections to aliases.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{Instant, timeout_at},
};
use tracing::debug;

use super::{
    Carry, DIAL_DEADLINE, Dial, Proxy, Refusal,
    counters::{Open, add},
};
use crate::{
    lifecycle::Tasks,
    net::keep_alive,
    tunnel::{Cut, Passed},
};

/// How long until the next attempt where no connection can be accepted, for lack of file descriptors most likely.
const PAUSE: Duration = Duration::from_millis(100);
const NOT_ACCEPTED: &str = "AliasConnectionsNotAccepted";

/// Accepts what comes to one listener.
pub(super) struct Accepting<D> {
    pub(super) proxy: Proxy<D>,
    /// For connections of all listeners.
    pub(super) room: Arc<Semaphore>,
    pub(super) tasks: Tasks,
}

impl<D: Dial> Accepting<D> {
    pub(super) async fn run(self, listener: TcpListener) {
        let stop = self.tasks.stopping();
        let mut failing = false;
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, client)) => {
                    if std::mem::take(&mut failing) {
                        self.proxy.conditions.clear(NOT_ACCEPTED, "");
                    }
                    self.take(stream, client);
                }
                // Of one connection, and gone with it.
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {}
                Err(error) => {
                    failing = true;
                    let message = format!(
                        "cannot accept connections to other sites: {error}; raise the limit on open files of the agent"
                    );
                    self.proxy.conditions.raise(NOT_ACCEPTED, "", message, SystemTime::now());
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(PAUSE) => {}
                    }
                }
            }
        }
    }

    fn take(&self, stream: TcpStream, client: SocketAddr) {
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            self.proxy.counters.refuse(&Refusal::Overloaded);
            return reset(&stream);
        };
        let (proxy, stop) = (self.proxy.clone(), self.tasks.stopping());
        self.tasks.spawn(async move {
            let _room = room;
            let mut stream = stream;
            let carried = tokio::select! {
                () = stop.cancelled() => {
                    reset(&stream);
                    return;
                }
                carried = carry(&proxy, &mut stream, client) => carried,
            };
            if let Err(refusal) = carried {
                debug!(%client, alias = ?stream.local_addr(), "a connection to another site is reset: {refusal}");
                proxy.counters.refuse(&refusal);
                reset(&stream);
            }
        });
    }
}

/// Carries one connection to its end.
async fn carry<D: Dial>(proxy: &Proxy<D>, near: &mut TcpStream, client: SocketAddr) -> Result<(), Refusal> {
    let alias = near.local_addr().map_err(|error| Refusal::Failed(error.to_string()))?;
    let target = proxy.target(alias.ip().to_canonical()).ok_or(Refusal::NoSuchAlias)?;
    let (addr, deadline) = (SocketAddr::new(target.addr, alias.port()), Instant::now() + DIAL_DEADLINE);
    let dialled = timeout_at(deadline, proxy.dial.dial_tcp(&target.node, addr, deadline)).await;
    let far = dialled.unwrap_or(Err(Refusal::TimedOut))?;
    let counters = &*proxy.counters;
    add(&counters.connections, 1);
    let _open = Open::new(&counters.open_connections);
    debug!(%client, %alias, node = &*target.node, %addr, "connected to another site");
    // What comes from the tunnel is in pieces already; waiting for more would only delay it.
    let _ = near.set_nodelay(true);
    if let Err(error) = keep_alive(near) {
        debug!(%client, %alias, "a client that vanishes will not be missed: {error}");
    }
    match far.carry(near, Passed { up: &counters.bytes_out, down: &counters.bytes_in }).await {
        Ok(()) => debug!(%client, %alias, "closed"),
        Err(Cut::Socket(error)) => debug!(%client, %alias, "the client has gone: {error}"),
        Err(Cut::Stream(error)) => debug!(%client, %alias, "the pod has gone: {error}"),
    }
    Ok(())
}

/// Has the connection end with RST when it is dropped, which says "refused" or "lost" where FIN would say "done".
fn reset(stream: &TcpStream) {
    if let Err(error) = stream.set_zero_linger() {
        debug!("a connection cannot be reset: {error}");
    }
}
