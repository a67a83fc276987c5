//! Binds the addresses, or waits until they are free.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use serde::Serialize;
use tokio::net::TcpListener;
use tracing::info;

use super::{Core, Guard, Transport, tcp, udp};
use crate::{
    conditions::Conditions,
    dns::stats::Counters,
    lifecycle::Tasks,
    net::holder::{self, Port},
};

/// How often an address that was taken is tried again.
const REBIND: Duration = Duration::from_secs(5);
const UNAVAILABLE: &str = "DnsAddressUnavailable";

/// Which addresses are listened on. Clones are one.
#[derive(Clone, Debug, Default)]
pub(in crate::dns) struct Listening(Arc<Mutex<Vec<Listener>>>);

/// An address on which queries are to be answered.
#[derive(Clone, Debug, Serialize)]
pub struct Listener {
    pub address: SocketAddr,
    /// `UDP` or `TCP`.
    pub transport: &'static str,
    /// False while something else has it.
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

    fn bound(&self, index: usize, address: SocketAddr) {
        if let Some(listener) = self.0.lock().unwrap_or_else(PoisonError::into_inner).get_mut(index) {
            (listener.address, listener.listening) = (address, true);
        }
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
            listening.bound(index, bound);
            info!(address = %bound, transport = transport.name(), "answering DNS");
            match socket {
                Socket::Udp(socket) => udp::serve(socket, core, counters, tasks_of).await,
                Socket::Tcp(listener) => tcp::serve(listener, core, counters, tasks_of).await,
            }
        });
    }
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
