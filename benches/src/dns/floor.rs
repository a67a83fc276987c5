//! The least that an answer by UDP costs here: the query itself, sent back as a response by the agent's own system calls.

use std::{
    net::UdpSocket,
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result};
use edgemesh_agent::net::datagrams::{Inbox, Outbox};
use nix::sys::socket::{Shutdown, shutdown};

/// More than dnsperf asks with.
const MAX: usize = 512;
/// The bit of the third byte that makes a response of a query (RFC 1035 4.1.1).
const RESPONSE: u8 = 0x80;

/// A thread that sends queries back, until it is dropped.
pub(super) struct Floor {
    socket: Arc<UdpSocket>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Floor {
    pub(super) fn start(socket: UdpSocket) -> Result<Self> {
        let (socket, stop) = (Arc::new(socket), Arc::new(AtomicBool::new(false)));
        let (reader, stopped) = (Arc::clone(&socket), Arc::clone(&stop));
        let thread = thread::Builder::new()
            .name("floor".to_owned())
            .spawn(move || reflect(&reader, &stopped))
            .context("cannot start a thread")?;
        Ok(Self { socket, stop, thread: Some(thread) })
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // It says that the socket is not connected, and wakes its reader all the same.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Read);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn reflect(socket: &UdpSocket, stop: &AtomicBool) {
    let (mut inbox, mut outbox) = (Inbox::<MAX>::default(), Outbox::<MAX>::default());
    while !stop.load(Ordering::SeqCst) && inbox.receive(socket.as_fd()).is_ok() {
        for (query, peer) in inbox.datagrams() {
            let Some(space) = outbox.space().get_mut(..query.len()) else { continue };
            space.copy_from_slice(query);
            if let Some(flags) = space.get_mut(2) {
                *flags |= RESPONSE;
                outbox.push(query.len(), peer);
            }
        }
        outbox.send(socket.as_fd());
    }
}
