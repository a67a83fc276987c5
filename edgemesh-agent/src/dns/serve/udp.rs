//! UDP: threads of their own, which take and send many datagrams with one system call.

use std::{
    io,
    net::UdpSocket,
    os::fd::{AsFd, AsRawFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::{Core, From, Handled, Transport, Waiting, pool};
use crate::{
    dns::{
        stats::{Counters, Origin},
        wire::MAX_UDP,
    },
    lifecycle::Tasks,
    net::datagrams::{Inbox, Outbox, Peer},
};

/// More threads than this on one socket only wait for each other.
const MAX_THREADS: usize = 4;
/// The longest query that is read; no client sends one of half that length.
const MAX_QUERY: usize = 2048;
/// So many bytes of queries may wait in the kernel: some ten milliseconds' worth at the highest rate.
const RECEIVE_BUFFER: usize = 4 << 20;
/// After an error of the socket.
const PAUSE: Duration = Duration::from_millis(100);

/// How many threads are to read one socket: one for each two CPUs, and one on a node of two, where a second one answers no
/// sooner and takes from pods the CPU that they ask on.
pub(in crate::dns) fn threads() -> usize {
    (thread::available_parallelism().map_or(1, usize::from) / 2).clamp(1, MAX_THREADS)
}

/// Makes the socket ready and serves it until the agent stops, with a thread for each of the counters but the last, which
/// are those of TCP; `tell` is that of [`pool::start`].
pub(super) async fn serve(
    socket: UdpSocket,
    core: Arc<Core>,
    counters: Arc<[Counters]>,
    tell: impl Fn(usize, Option<&io::Error>),
    tasks: Tasks,
) {
    // The first is beyond net.core.rmem_max, and for CAP_NET_ADMIN alone.
    if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err()
        && let Err(error) = setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER)
    {
        debug!("the receive buffer of a DNS socket stays as it is: {error}");
    }
    let socket = Arc::new(socket);
    let stop = tasks.stopping();
    let spawn = |index: usize| {
        let worker = Worker {
            socket: Arc::clone(&socket),
            core: Arc::clone(&core),
            counters: Arc::clone(&counters),
            index,
            runtime: Handle::current(),
            tasks: tasks.clone(),
            stop: stop.clone(),
        };
        thread::Builder::new().name(format!("dns-udp-{index}")).spawn(move || worker.keep_running())
    };
    let threads = pool::start(counters.len().saturating_sub(1), spawn, tell, &stop).await;
    stop.cancelled().await;
    // It says that the socket is not connected, and wakes its readers all the same.
    let _ = shutdown(socket.as_raw_fd(), Shutdown::Read);
    let joined = tokio::task::spawn_blocking(move || threads.into_iter().all(|thread| thread.join().is_ok()));
    if !joined.await.unwrap_or(false) {
        warn!("a thread of DNS panicked");
    }
}

struct Worker {
    socket: Arc<UdpSocket>,
    core: Arc<Core>,
    counters: Arc<[Counters]>,
    index: usize,
    runtime: Handle,
    tasks: Tasks,
    stop: CancellationToken,
}

impl Worker {
    /// No query makes it panic; should one all the same, it costs the batch it came in and not the node's DNS.
    fn keep_running(&self) {
        while catch_unwind(AssertUnwindSafe(|| self.run())).is_err() && !self.stop.is_cancelled() {
            error!("a DNS thread panicked and goes on; please report the message above");
        }
    }

    fn run(&self) {
        let (mut inbox, mut outbox) = (Inbox::<MAX_QUERY>::default(), Outbox::<MAX_UDP>::default());
        loop {
            let received = inbox.receive(self.socket.as_fd());
            if self.stop.is_cancelled() {
                return;
            }
            match received {
                Ok(()) => self.answer(&inbox, &mut outbox),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    debug!("cannot receive DNS queries: {error}");
                    thread::sleep(PAUSE);
                }
            }
        }
    }

    fn answer(&self, inbox: &Inbox<MAX_QUERY>, outbox: &mut Outbox<MAX_UDP>) {
        let Some(counters) = self.counters.get(self.index) else { return };
        let (received, zone) = (Instant::now(), self.core.zone());
        let mut answered = [0; 3];
        for (message, peer) in inbox.datagrams() {
            let Some(address) = peer.address().filter(|address| address.port() != 0) else { continue };
            let from = From { client: address.ip(), transport: Transport::Udp, received, counters };
            match self.core.handle(message, &from, zone.as_deref(), outbox.space()) {
                Handled::Ignored | Handled::Answered(0, _) => {}
                Handled::Answered(length, origin) => {
                    outbox.push(length, peer);
                    if let Some(count) = answered.get_mut(origin as usize) {
                        *count += 1;
                    }
                }
                Handled::Waits(waiting) => self.wait(waiting, *peer),
            }
        }
        outbox.send(self.socket.as_fd());
        let elapsed = received.elapsed();
        for (origin, queries) in [Origin::Cluster, Origin::Forwarded, Origin::None].into_iter().zip(answered) {
            if queries > 0 {
                counters.took(origin, queries, elapsed);
            }
        }
    }

    fn wait(&self, waiting: Box<Waiting>, peer: Peer) {
        let Some(address) = peer.address() else { return };
        let (socket, core, counters) = (Arc::clone(&self.socket), Arc::clone(&self.core), Arc::clone(&self.counters));
        let (index, stop) = (self.index, self.stop.clone());
        self.tasks.spawn_on(&self.runtime, async move {
            let Some(counters) = counters.get(index) else { return };
            let response = tokio::select! {
                () = stop.cancelled() => return,
                response = waiting.answer(&core, counters) => response,
            };
            if !response.is_empty()
                && let Err(error) = socket.send_to(&response, address)
            {
                debug!("cannot send a DNS response: {error}");
            }
        });
    }
}
