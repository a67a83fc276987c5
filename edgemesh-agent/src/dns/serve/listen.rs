//! Binds the addresses, or waits until they are free.

use std::{
    io, mem,
    net::{SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use serde::Serialize;
use tokio::net::TcpListener;
use tracing::info;

use super::{Core, Transport, pool, tcp, udp};
use crate::{
    conditions::Conditions,
    dns::stats::Counters,
    lifecycle::Tasks,
    net::{
        guard::Guard,
        holder::{self, Port},
    },
};

/// How often an address that was taken is tried again.
const REBIND: Duration = Duration::from_secs(5);
const UNAVAILABLE: &str = "DnsAddressUnavailable";
const THREADS_MISSING: &str = "DnsThreadsMissing";

/// Which addresses are listened on. Clones are one.
#[derive(Clone, Debug, Default)]
pub(in crate::dns) struct Listening(Arc<Mutex<Vec<Listener>>>);

/// An address on which queries are to be answered.
#[derive(Clone, Debug, Serialize)]
pub struct Listener {
    pub address: SocketAddr,
    /// `UDP` or `TCP`.
    pub transport: &'static str,
    /// False while something else has it, or there is no thread to be had.
    pub listening: bool,
}

impl Listening {
    /// All of them, in the order they were configured.
    pub(in crate::dns) fn list(&self) -> Vec<Listener> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn add(&self, address: SocketAddr, transport: Transport) -> usize {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.push(Listener { address, transport: transport.name(), listening: false });
        list.len() - 1
    }

    /// Says whether that is news.
    fn bound(&self, index: usize, address: SocketAddr) -> bool {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.get_mut(index).is_some_and(|listener| {
            listener.address = address;
            !mem::replace(&mut listener.listening, true)
        })
    }
}

impl Transport {
    fn name(self) -> &'static str {
        match self {
            Self::Udp => "UDP",
            Self::Tcp => "TCP",
        }
    }
}

/// A bound socket.
enum Socket {
    Udp(UdpSocket),
    Tcp(TcpListener),
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Udp(socket) => socket.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

/// Serves `address` by UDP and TCP, each as soon as it can be bound, until the agent stops.
pub(in crate::dns) fn listen(
    address: SocketAddr,
    core: &Arc<Core>,
    counters: &Arc<[Counters]>,
    listening: &Listening,
    guard: &Guard,
    conditions: &Conditions,
    tasks: &Tasks,
) {
    for transport in [Transport::Udp, Transport::Tcp] {
        let index = listening.add(address, transport);
        let (core, counters, tasks_of) = (Arc::clone(core), Arc::clone(counters), tasks.clone());
        let (listening, guard, conditions) = (listening.clone(), guard.clone(), conditions.clone());
        tasks.spawn(async move {
            let subject = format!("{address}/{}", transport.name());
            let bound = bind_when_free(address, transport, &subject, &conditions, &tasks_of).await;
            let Some(socket) = bound else { return };
            guard.keep(socket.as_fd(), &subject, &tasks_of).await;
            let bound = match &socket {
                Socket::Udp(socket) => socket.local_addr(),
                Socket::Tcp(listener) => listener.local_addr(),
            };
            let bound = bound.unwrap_or(address);
            let answering = || {
                if listening.bound(index, bound) {
                    info!(address = %bound, transport = transport.name(), "answering DNS");
                }
            };
            match socket {
                Socket::Udp(socket) => {
                    let tell = |running: usize, error: Option<&io::Error>| {
                        if running > 0 {
                            answering();
                        }
                        tell_threads(running, error, &subject, &conditions);
                    };
                    udp::serve(socket, core, counters, tell, tasks_of).await;
                }
                Socket::Tcp(listener) => {
                    answering();
                    tcp::serve(listener, core, counters, tasks_of).await;
                }
            }
        });
    }
}

fn tell_threads(running: usize, error: Option<&io::Error>, subject: &str, conditions: &Conditions) {
    let Some(error) = error else { return conditions.clear(THREADS_MISSING, subject) };
    let effect = if running == 0 { "no query is answered there" } else { "queries are answered more slowly" };
    let message = format!(
        "cannot start a thread for {subject}: {error}; {effect}; raise the limits on threads (pids.max of the cgroup, \
         kernel.threads-max, ulimit -u); tried again every {} s",
        pool::RETRY.as_secs()
    );
    conditions.raise(THREADS_MISSING, subject, message, SystemTime::now());
}

/// None when the agent stops before.
async fn bind_when_free(
    address: SocketAddr,
    transport: Transport,
    subject: &str,
    conditions: &Conditions,
    tasks: &Tasks,
) -> Option<Socket> {
    let stop = tasks.stopping();
    loop {
        // To the address itself, so that answers come from where the question went.
        let bound = match transport {
            Transport::Udp => UdpSocket::bind(address).map(Socket::Udp),
            Transport::Tcp => TcpListener::bind(address).await.map(Socket::Tcp),
        };
        let error = match bound {
            Ok(socket) => {
                conditions.clear(UNAVAILABLE, subject);
                return Some(socket);
            }
            Err(error) => error,
        };
        let kind = error.kind();
        let advice = if kind == io::ErrorKind::AddrInUse {
            let holder = find_holder(address, transport).await;
            format!("{holder}; stop it, have it listen on its own addresses, or set modules.edgeDNS.listenPort")
        } else if kind == io::ErrorKind::AddrNotAvailable {
            "; bring the device of commonConfig.bridgeDeviceName back".to_owned()
        } else if kind == io::ErrorKind::PermissionDenied {
            "; CAP_NET_BIND_SERVICE is needed".to_owned()
        } else {
            String::new()
        };
        let message = format!(
            "cannot answer DNS on {address} ({}): {error}{advice}; tried again every {} s",
            transport.name(),
            REBIND.as_secs(),
        );
        conditions.raise(UNAVAILABLE, subject, message, SystemTime::now());
        tokio::select! {
            () = stop.cancelled() => return None,
            () = tokio::time::sleep(REBIND) => {}
        }
    }
}

/// `, as dnsmasq (process 812) has it`, or nothing where that cannot be seen.
async fn find_holder(address: SocketAddr, transport: Transport) -> String {
    let port = match transport {
        Transport::Udp => Port::Udp(address),
        Transport::Tcp => Port::Tcp(address),
    };
    let found = tokio::task::spawn_blocking(move || holder::find(port)).await;
    found.ok().flatten().map_or_else(String::new, |holder| format!(", as {holder} has it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_missing_is_a_condition_that_says_what_it_means() {
        let (conditions, error) = (Conditions::default(), io::Error::from_raw_os_error(libc::EAGAIN));
        let told = |running, error| {
            tell_threads(running, error, "169.254.96.16:53/UDP", &conditions);
            conditions.list().into_iter().map(|condition| condition.message).collect::<Vec<_>>().join(" ")
        };
        assert!(told(0, Some(&error)).contains("cannot start a thread for 169.254.96.16:53/UDP: Resource temporarily"));
        assert!(told(0, Some(&error)).contains("no query is answered there"));
        assert!(told(1, Some(&error)).contains("more slowly"));
        assert_eq!(told(2, None), "");
    }
}
