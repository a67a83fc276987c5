//! The thread that ends sockets: requests in, sockets ended in every namespace.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use tracing::debug;

use super::{Diag, Error, Namespace, Peers, Socket, namespaces};
use crate::conditions::Conditions;

/// How long requests are collected: backends go away in groups, and every round visits every namespace (Cilium waits as
/// long).
const WINDOW: Duration = Duration::from_millis(50);
/// How many requests may wait; more than a fast churn makes during the slowest round.
const REQUESTS: usize = 1024;
/// How often a namespace is looked through while there are sockets to end in it: a dump can pass over some when the table
/// changes under it.
const PASSES: usize = 4;

const STALE: &str = "StaleUdpSockets";

/// Whether the socket with this cookie (as of `bpf_get_socket_cookie`) was connected to this backend by translation. A
/// v4-mapped backend is given as IPv4.
///
/// A `false` only means that the application finds out by itself, so where it is not known, `false` is the answer. Before
/// kernel 5.7 cookies are unique in their namespace only.
pub type Ours = Box<dyn Fn(u64, SocketAddr) -> bool + Send>;

/// Too many requests wait already; these were not taken.
#[derive(Debug, thiserror::Error)]
#[error("cannot have the UDP sockets to {} more backends ended: {REQUESTS} requests wait already; ask again later", .0.len())]
pub struct Busy(pub Vec<SocketAddr>);

/// Takes requests to end sockets; when it is dropped the thread finishes what it was asked for and ends.
#[derive(Debug)]
pub struct Handle {
    requests: SyncSender<Vec<SocketAddr>>,
    ended: Ended,
}

impl Handle {
    /// Has the connected UDP sockets to `peers` ended that the check claims, on the whole node, some 50 ms from now. Does
    /// not block.
    ///
    /// # Errors
    ///
    /// Too many requests wait; the peers are given back.
    pub fn end(&self, peers: Vec<SocketAddr>) -> Result<(), Busy> {
        self.requests.try_send(peers).map_err(|error| match error {
            TrySendError::Full(peers) | TrySendError::Disconnected(peers) => Busy(peers),
        })
    }

    /// The counter of ended sockets.
    pub fn ended(&self) -> Ended {
        self.ended.clone()
    }
}

/// How many sockets were ended since the start. Cheap to clone; all clones count together.
#[derive(Clone, Debug, Default)]
pub struct Ended(Arc<AtomicU64>);

impl Ended {
    /// The count as of now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }
}

/// Starts the thread. What it cannot do it says as a condition, `StaleUdpSockets`.
///
/// # Errors
///
/// The system refuses a thread.
pub fn spawn(ours: Ours, conditions: Conditions) -> io::Result<(Handle, thread::JoinHandle<()>)> {
    let (requests, requested) = sync_channel(REQUESTS);
    let ended = Ended::default();
    let mut worker = Worker { ours, conditions, ended: ended.clone(), unsupported: false };
    let thread = thread::Builder::new().name("udp-end".to_owned()).spawn(move || {
        while let Ok(first) = requested.recv() {
            worker.serve(&gather(first, &requested));
        }
    })?;
    Ok((Handle { requests, ended }, thread))
}

/// All that is requested within a window of the first request.
fn gather(first: Vec<SocketAddr>, requested: &Receiver<Vec<SocketAddr>>) -> Peers {
    let mut peers: Peers = first.into_iter().collect();
    let end = Instant::now() + WINDOW;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        match requested.recv_timeout(left) {
            Ok(more) => peers.extend(more),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    peers
}

struct Worker {
    ours: Ours,
    conditions: Conditions,
    ended: Ended,
    /// The kernel will never do it, so there is no use in looking for sockets.
    unsupported: bool,
}

impl Worker {
    fn serve(&mut self, peers: &Peers) {
        if self.unsupported {
            return;
        }
        // A thread in a pod's namespace keeps that alive, so each round has a thread that ends with it, wherever it is.
        let outcome = thread::scope(|scope| {
            let round = thread::Builder::new().name("udp-end-round".to_owned());
            let round = round.spawn_scoped(scope, || self.round(peers)).map_err(Error::Thread)?;
            round.join().unwrap_or_else(|_| Err(Error::Thread(io::Error::other("it panicked"))))
        });
        self.conclude(outcome);
    }

    /// Ends the sockets in every namespace. Trouble in one does not keep it from the others; the first is told.
    fn round(&mut self, peers: &Peers) -> Result<(), Error> {
        let mut outcome = Ok(());
        for namespace in namespaces()? {
            match namespace.and_then(|namespace| self.end_in(&namespace, peers)) {
                Ok(()) => {}
                Err(error @ Error::Unsupported { .. }) => return Err(error),
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome
    }

    fn end_in(&mut self, namespace: &Namespace, peers: &Peers) -> Result<(), Error> {
        namespace.enter()?;
        let mut diag = Diag::open()?;
        for _ in 0..PASSES {
            let mut sockets = diag.connected(peers)?;
            sockets.retain(|socket| (self.ours)(socket.cookie, socket.peer));
            if sockets.is_empty() {
                break;
            }
            // Of sockets that share all addresses only one is found at a time; the others may be after it.
            while !sockets.is_empty() {
                let before = sockets.len();
                sockets = self.end_those(&mut diag, sockets)?;
                if sockets.len() == before {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Ends sockets one by one, and gives back those that were not found.
    fn end_those(&self, diag: &mut Diag, sockets: Vec<Socket>) -> Result<Vec<Socket>, Error> {
        let mut missed = Vec::new();
        for socket in sockets {
            if diag.destroy(&socket)? {
                self.ended.add(1);
                debug!(local = %socket.local, peer = %socket.peer, "ended a UDP socket");
            } else {
                missed.push(socket);
            }
        }
        Ok(missed)
    }

    fn conclude(&mut self, outcome: Result<(), Error>) {
        match outcome {
            Ok(()) => self.conditions.clear(STALE, ""),
            Err(error) => {
                self.unsupported = matches!(error, Error::Unsupported { .. });
                let message = format!(
                    "{error}; UDP sockets connected to a backend that is gone may stay so until their application \
                     connects again"
                );
                self.conditions.raise(STALE, "", message, SystemTime::now());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker() -> Worker {
        let (conditions, ended) = (Conditions::default(), Ended::default());
        Worker { ours: Box::new(|_, _| true), conditions, ended, unsupported: false }
    }

    fn peer(port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], port))
    }

    #[test]
    fn requests_of_one_window_are_served_together() {
        let (send, requested) = sync_channel(8);
        send.send(vec![peer(2), peer(3)]).unwrap();
        send.send(vec![peer(3)]).unwrap();
        assert_eq!(gather(vec![peer(1)], &requested), [peer(1), peer(2), peer(3)].into_iter().collect());
        drop(send);
        assert_eq!(gather(vec![peer(4)], &requested), [peer(4)].into_iter().collect());
    }

    #[test]
    fn a_request_too_many_is_given_back() {
        let (requests, _requested) = sync_channel(1);
        let handle = Handle { requests, ended: Ended::default() };
        handle.end(vec![peer(1)]).unwrap();
        let Busy(back) = handle.end(vec![peer(2)]).unwrap_err();
        assert_eq!(back, [peer(2)]);
    }

    #[test]
    fn a_kernel_that_cannot_is_said_once_and_not_asked_again() {
        let mut worker = worker();
        worker.conclude(Err(Error::Unsupported { attempt: "end a UDP socket", option: "CONFIG_INET_DIAG_DESTROY" }));
        let said = worker.conditions.list();
        assert!(said[0].message.contains("CONFIG_INET_DIAG_DESTROY"), "{said:?}");
        // A round, which would succeed, would clear the condition.
        worker.serve(&Peers::default());
        assert_eq!(worker.conditions.list(), said);
    }

    #[test]
    fn trouble_is_a_condition_until_a_round_without() {
        let mut worker = worker();
        let error = io::Error::from_raw_os_error(libc::EPERM);
        let refused = Error::Refused { attempt: "enter a network namespace", capability: "CAP_SYS_ADMIN", error };
        worker.conclude(Err(refused));
        let said = worker.conditions.list();
        assert_eq!(said[0].reason, STALE);
        assert!(said[0].message.contains("CAP_SYS_ADMIN is needed"), "{said:?}");
        worker.conclude(Ok(()));
        assert_eq!(worker.conditions.list(), []);
    }
}
