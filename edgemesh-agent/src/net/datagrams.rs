//! Many datagrams with one system call: recvmmsg(2) and sendmmsg(2), into and out of buffers that are allocated once.

use std::{
    io, mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
};

/// How many datagrams one call moves at most.
pub const BATCH: usize = 32;

/// Where a datagram came from, as the kernel wrote it: `sockaddr_in` or `sockaddr_in6`.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(4))]
pub struct Peer {
    bytes: [u8; PEER],
    length: libc::socklen_t,
}

const PEER: usize = size_of::<libc::sockaddr_in6>();

impl Peer {
    const NOBODY: Self = Self { bytes: [0; PEER], length: PEER as libc::socklen_t };

    /// None for another family.
    pub fn address(&self) -> Option<SocketAddr> {
        let [f0, f1, p0, p1, rest @ ..] = &self.bytes;
        let (family, port) = (u16::from_ne_bytes([*f0, *f1]), u16::from_be_bytes([*p0, *p1]));
        match libc::c_int::from(family) {
            libc::AF_INET => {
                let octets: [u8; 4] = rest.get(..4)?.try_into().ok()?;
                Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(octets)), port))
            }
            libc::AF_INET6 => {
                let octets: [u8; 16] = rest.get(4..20)?.try_into().ok()?;
                let scope = u32::from_ne_bytes(rest.get(20..24)?.try_into().ok()?);
                Some(SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(octets), port, 0, scope)))
            }
            _ => None,
        }
    }
}

/// Received datagrams of at most `SIZE` bytes.
#[derive(Debug)]
pub struct Inbox<const SIZE: usize> {
    buffers: Box<[[u8; SIZE]]>,
    peers: [Peer; BATCH],
    lengths: [usize; BATCH],
    received: usize,
}

impl<const SIZE: usize> Default for Inbox<SIZE> {
    fn default() -> Self {
        let buffers = vec![[0; SIZE]; BATCH].into_boxed_slice();
        Self { buffers, peers: [Peer::NOBODY; BATCH], lengths: [0; BATCH], received: 0 }
    }
}

impl<const SIZE: usize> Inbox<SIZE> {
    /// Waits for a datagram and takes it with what else is there already.
    ///
    /// After shutdown(2) of the socket it returns at once, with datagrams of no length.
    ///
    /// # Errors
    ///
    /// Those of recvmmsg(2).
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.received = 0;
        let mut parts: [libc::iovec; BATCH] = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; BATCH];
        // SAFETY: all zeros is a value of this structure of integers and pointers: one without anything.
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
        let places = self.buffers.iter_mut().zip(&mut self.peers);
        for ((header, part), (buffer, peer)) in headers.iter_mut().zip(&mut parts).zip(places) {
            *part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: SIZE };
            header.msg_hdr.msg_name = peer.bytes.as_mut_ptr().cast();
            header.msg_hdr.msg_namelen = PEER as libc::socklen_t;
            header.msg_hdr.msg_iov = part;
            header.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: BATCH headers, each with one part; these and the buffers and names they point to live in this frame and
        // in `self`, are of the lengths given, and nothing else refers to them during the call. Null: no time-out.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_WAITFORONE,
                ptr::null_mut(),
            )
        };
        // Negative for an error.
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for ((header, peer), length) in headers.iter().zip(&mut self.peers).zip(&mut self.lengths).take(count) {
            peer.length = header.msg_hdr.msg_namelen.min(PEER as libc::socklen_t);
            // What was too long is cut off, and not told from what just fits: neither is anything that a caller wants.
            *length = usize::try_from(header.msg_len).unwrap_or(SIZE);
        }
        self.received = count.min(BATCH);
        Ok(())
    }

    /// What the last call received.
    pub fn datagrams(&self) -> impl Iterator<Item = (&[u8], &Peer)> {
        let whole = self.buffers.iter().zip(&self.lengths).zip(&self.peers).take(self.received);
        whole.map(|((buffer, length), peer)| (buffer.get(..*length).unwrap_or(buffer), peer))
    }
}

/// Datagrams of at most `SIZE` bytes to be sent.
#[derive(Debug)]
pub struct Outbox<const SIZE: usize> {
    buffers: Box<[[u8; SIZE]]>,
    peers: [Peer; BATCH],
    lengths: [usize; BATCH],
    filled: usize,
}

impl<const SIZE: usize> Default for Outbox<SIZE> {
    fn default() -> Self {
        let buffers = vec![[0; SIZE]; BATCH].into_boxed_slice();
        Self { buffers, peers: [Peer::NOBODY; BATCH], lengths: [0; BATCH], filled: 0 }
    }
}

impl<const SIZE: usize> Outbox<SIZE> {
    /// Where the next datagram is to be written; empty when there are [`BATCH`].
    pub fn space(&mut self) -> &mut [u8] {
        self.buffers.get_mut(self.filled).map_or(&mut [], |buffer| buffer.as_mut_slice())
    }

    /// Addresses what was written into [`Outbox::space`].
    pub fn push(&mut self, length: usize, peer: &Peer) {
        let places = self.lengths.get_mut(self.filled).zip(self.peers.get_mut(self.filled));
        if let Some((length_of, peer_of)) = places {
            (*length_of, *peer_of) = (length.min(SIZE), *peer);
            self.filled += 1;
        }
    }

    /// Sends everything without waiting; what the kernel does not take is lost, as datagrams may be. Gives their number.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> usize {
        let filled = mem::take(&mut self.filled);
        let mut parts: [libc::iovec; BATCH] = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; BATCH];
        // SAFETY: as in `Inbox::receive`.
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
        let contents = self.buffers.iter_mut().zip(&self.lengths).zip(&mut self.peers);
        for ((header, part), ((buffer, length), peer)) in headers.iter_mut().zip(&mut parts).zip(contents).take(filled)
        {
            *part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: *length };
            header.msg_hdr.msg_name = peer.bytes.as_mut_ptr().cast();
            header.msg_hdr.msg_namelen = peer.length;
            header.msg_hdr.msg_iov = part;
            header.msg_hdr.msg_iovlen = 1;
        }
        let (mut at, mut lost) = (0, 0);
        while let Some(rest) = headers.get_mut(at..filled).filter(|rest| !rest.is_empty()) {
            // At most BATCH.
            let count = rest.len() as libc::c_uint;
            // SAFETY: `rest` is `count` headers, each with one part; these and the buffers and names they point to live in
            // this frame and in `self`, are of the lengths given, and are only read.
            let sent = unsafe {
                libc::sendmmsg(socket.as_raw_fd(), rest.as_mut_ptr(), count, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
            };
            match usize::try_from(sent) {
                Ok(sent) if sent > 0 => at += sent,
                // The first one cannot be sent; the others may.
                _ => {
                    at += 1;
                    lost += 1;
                }
            }
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, os::fd::AsFd};

    use super::*;

    #[test]
    fn many_datagrams_come_and_go_with_their_addresses() {
        for here in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(server) = UdpSocket::bind(here) else { continue };
            let clients: Vec<UdpSocket> = (0..3).map(|_| UdpSocket::bind(here).unwrap()).collect();
            for (number, client) in clients.iter().enumerate() {
                client.send_to(&[b'q', number as u8], server.local_addr().unwrap()).unwrap();
            }
            let (mut inbox, mut outbox) = (Inbox::<16>::default(), Outbox::<16>::default());
            let mut seen = 0;
            while seen < clients.len() {
                inbox.receive(server.as_fd()).unwrap();
                for (datagram, peer) in inbox.datagrams() {
                    let client = &clients[usize::from(datagram[1])];
                    assert_eq!(peer.address(), Some(client.local_addr().unwrap()));
                    outbox.space()[..2].copy_from_slice(&[b'a', datagram[1]]);
                    outbox.push(2, peer);
                    seen += 1;
                }
                assert_eq!(outbox.send(server.as_fd()), 0);
            }
            for (number, client) in clients.iter().enumerate() {
                let mut buffer = [0; 16];
                let (length, from) = client.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..length], from), (&[b'a', number as u8][..], server.local_addr().unwrap()));
            }
        }
    }

    #[test]
    fn a_datagram_that_cannot_be_sent_does_not_hold_up_the_others() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"q", server.local_addr().unwrap()).unwrap();
        let (mut inbox, mut outbox) = (Inbox::<16>::default(), Outbox::<16>::default());
        inbox.receive(server.as_fd()).unwrap();
        let (_, peer) = inbox.datagrams().next().unwrap();
        outbox.push(1, &Peer::NOBODY);
        outbox.push(1, peer);
        assert_eq!(outbox.send(server.as_fd()), 1);
        assert_eq!(client.recv(&mut [0; 16]).unwrap(), 1);
    }

    #[test]
    fn a_shut_down_socket_wakes_its_reader() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let reader = server.try_clone().unwrap();
        let waiting = std::thread::spawn(move || {
            let mut inbox = Inbox::<16>::default();
            inbox.receive(reader.as_fd()).map(|()| inbox.datagrams().all(|(datagram, _)| datagram.is_empty()))
        });
        while !waiting.is_finished() {
            // Not connected, it says, and wakes the reader all the same.
            let _ = nix::sys::socket::shutdown(server.as_raw_fd(), nix::sys::socket::Shutdown::Read);
            std::thread::yield_now();
        }
        assert!(waiting.join().unwrap().unwrap());
    }
}
