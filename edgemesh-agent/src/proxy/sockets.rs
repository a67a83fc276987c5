//! The sockets that the kernel gives what is sent to aliases, and those that answer in an alias's name.

use std::{
    io,
    io::IoSliceMut,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, Backlog, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn, SockaddrIn6,
        SockaddrStorage, bind, connect, listen, recvmsg, setsockopt, socket, sockopt,
    },
};
use tokio::{
    io::Interest,
    net::{TcpListener, UdpSocket},
};

/// How many connections may wait to be accepted; the kernel's `net.core.somaxconn` may set a lower bound.
const BACKLOG: i32 = 4096;

/// Room for the first datagrams of flows, in bytes, until the one task that takes them has come to them.
const FIRST_DATAGRAMS: usize = 4 << 20;

/// One socket for each protocol and family, bound to the loopback device: nothing reaches them but by the program that
/// looks sockets up for aliases, and processes of this node that guess their ports, whom nothing is answered.
#[derive(Debug)]
pub struct Sockets {
    pub(super) tcp: Vec<TcpListener>,
    pub(super) udp: Vec<UdpSocket>,
}

impl Sockets {
    /// Makes them, for the families that this node has, and lets this process have as many open files as it may: each
    /// connection is one.
    ///
    /// # Errors
    ///
    /// The system refuses; IPv6 alone may be missing.
    pub fn bind() -> io::Result<Self> {
        raise_limit_on_files();
        let mut sockets = Self { tcp: Vec::new(), udp: Vec::new() };
        for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
            let made = tcp(ip).and_then(|tcp| Ok((tcp, udp(ip)?)));
            match made {
                Ok((tcp, udp)) => {
                    sockets.tcp.push(tcp);
                    sockets.udp.push(udp);
                }
                Err(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL) if ip.is_ipv6() => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(sockets)
    }

    /// Those of TCP and UDP, each with whether it is of IPv6, for the program to know.
    pub fn each(&self) -> impl Iterator<Item = (BorrowedFd<'_>, bool, bool)> {
        let v6 = |addr: io::Result<SocketAddr>| addr.is_ok_and(|addr| addr.is_ipv6());
        let tcp = self.tcp.iter().map(move |socket| (socket.as_fd(), true, v6(socket.local_addr())));
        let udp = self.udp.iter().map(move |socket| (socket.as_fd(), false, v6(socket.local_addr())));
        tcp.chain(udp)
    }
}

fn tcp(ip: IpAddr) -> nix::Result<TcpListener> {
    let socket = unbound(ip, SockType::Stream)?;
    bind_to(&socket, SocketAddr::new(ip, 0))?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    registered(TcpListener::from_std(socket.into()))
}

fn udp(ip: IpAddr) -> nix::Result<UdpSocket> {
    let socket = unbound(ip, SockType::Datagram)?;
    // Whom a datagram was for is told with it: on such a socket it may be any address and port.
    match ip {
        IpAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4OrigDstAddr, &true)?,
        IpAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6OrigDstAddr, &true)?,
    }
    // Beyond what net.core.rmem_max allows, which the capability to administrate networks permits.
    setsockopt(&socket, sockopt::RcvBufForce, &FIRST_DATAGRAMS)
        .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &FIRST_DATAGRAMS))?;
    bind_to(&socket, SocketAddr::new(ip, 0))?;
    registered(UdpSocket::from_std(socket.into()))
}

/// A socket that is `alias` with its port to one client, and to nobody else: the kernel finds it before it asks the program
/// about that client's datagrams.
pub(super) fn answering(alias: SocketAddr, client: SocketAddr) -> io::Result<UdpSocket> {
    let socket = unbound(alias.ip(), SockType::Datagram)?;
    // Many clients of one alias.
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    if alias.is_ipv6() {
        freebind(&socket)?;
    }
    bind_to(&socket, alias)?;
    match client {
        SocketAddr::V4(client) => connect(socket.as_raw_fd(), &SockaddrIn::from(client))?,
        SocketAddr::V6(client) => connect(socket.as_raw_fd(), &SockaddrIn6::from(client))?,
    }
    UdpSocket::from_std(socket.into())
}

fn unbound(ip: IpAddr, kind: SockType) -> nix::Result<OwnedFd> {
    let family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    if ip.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    Ok(socket)
}

fn bind_to(socket: &OwnedFd, addr: SocketAddr) -> nix::Result<()> {
    match addr {
        SocketAddr::V4(addr) => bind(socket.as_raw_fd(), &SockaddrIn::from(addr)),
        SocketAddr::V6(addr) => bind(socket.as_raw_fd(), &SockaddrIn6::from(addr)),
    }
}

/// Where it fails, connections beyond the limit are not accepted, which is a condition.
fn raise_limit_on_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit writes one rlimit, setrlimit reads one; `limit` is one and outlives both calls.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && limit.rlim_cur < limit.rlim_max {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// Allows an address that no device has: a local route is enough for IPv4, for IPv6 it is not. Linux 4.15.
fn freebind(socket: &OwnedFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads one integer of the length that is said, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_FREEBIND,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn registered<T>(socket: io::Result<T>) -> nix::Result<T> {
    socket.map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}

/// Takes one datagram: its length, who sent it, and whom it was for. `WouldBlock` where there is none; the datagram is
/// gone where it cannot be told who or whom.
pub(super) fn receive(socket: &UdpSocket, into: &mut [u8]) -> io::Result<Option<(usize, SocketAddr, SocketAddr)>> {
    socket.try_io(Interest::READABLE, || {
        let mut control = nix::cmsg_space!(libc::sockaddr_in6);
        let mut parts = [IoSliceMut::new(into)];
        let message =
            recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
        let to = message.cmsgs()?.find_map(|control| {
            if let ControlMessageOwned::Ipv4OrigDstAddr(addr) = control {
                let ip = IpAddr::V4(u32::from_be(addr.sin_addr.s_addr).into());
                return Some(SocketAddr::new(ip, u16::from_be(addr.sin_port)));
            }
            let ControlMessageOwned::Ipv6OrigDstAddr(addr) = control else { return None };
            Some(SocketAddr::new(IpAddr::V6(addr.sin6_addr.s6_addr.into()), u16::from_be(addr.sin6_port)))
        });
        let from = message.address.as_ref().and_then(socket_addr);
        Ok(from.zip(to).map(|(from, to)| (message.bytes, from, to)))
    })
}

fn socket_addr(addr: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = addr.as_sockaddr_in().map(|addr| SocketAddr::new(IpAddr::V4(addr.ip()), addr.port()));
    // With its scope, which an answer to a link-local address needs.
    let v6 = addr.as_sockaddr_in6();
    let v6 = v6.map(|addr| SocketAddr::V6(SocketAddrV6::new(addr.ip(), addr.port(), 0, addr.scope_id())));
    v4.or(v6)
}
