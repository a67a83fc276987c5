//! The other end of the canary: a process of its own, in a cgroup of its own, that does what an application does.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::{
        prctl,
        signal::Signal,
        socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, sockopt},
        time::{TimeVal, TimeValLike},
    },
};
use serde::{Deserialize, Serialize};

use super::{NONCE, Nonce, reply_to};

/// How long each step may take; all of them run at the same time, within the deadline of the whole.
const STEP_MILLISECONDS: i64 = 1500;

/// What the child tells the agent, as one line of JSON.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Report {
    /// It could not get into its cgroup, so nothing was tried.
    Outside(String),
    /// What failed of that which was tried; nothing, if all went well.
    Tried(Vec<Fault>),
}

/// A step that failed.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Fault {
    /// `TCP over IPv4` and its like.
    pub socket: String,
    /// The system call, or the check, that failed.
    pub step: String,
    pub error: String,
}

/// Enters `cgroup`, then exchanges `nonce` with whatever answers on `frontend`, by TCP and by UDP, from an IPv4 and from
/// an IPv6 socket.
pub fn run(cgroup: &Path, frontend: SocketAddr, nonce: Nonce) -> Report {
    // An agent that is killed leaves no process behind. Without this, it ends by itself soon.
    let _ = prctl::set_pdeathsig(Signal::SIGKILL);
    if let Err(error) = enter(cgroup) {
        return Report::Outside(error.to_string());
    }
    let mut targets = vec![("IPv4", frontend)];
    match frontend.ip() {
        // The hooks for IPv6 sockets serve these, too.
        IpAddr::V4(v4) => targets.push((
            "IPv4 on an IPv6 socket",
            SocketAddr::V6(SocketAddrV6::new(v4.to_ipv6_mapped(), frontend.port(), 0, 0)),
        )),
        IpAddr::V6(_) => targets = vec![("IPv6", frontend)],
    }
    let faults = thread::scope(|scope| {
        let mut exchanges = Vec::new();
        for (socket, at) in targets {
            exchanges.push((format!("TCP over {socket}"), scope.spawn(move || tcp(at, nonce))));
            exchanges.push((format!("UDP over {socket}"), scope.spawn(move || udp(at, nonce))));
        }
        let faults = exchanges.into_iter().filter_map(|(socket, exchange)| {
            let result = exchange.join().unwrap_or_else(|_| Err(("run", io::Error::other("it panicked"))));
            let (step, error) = result.err()?;
            Some(Fault { socket, step: step.to_owned(), error: error.to_string() })
        });
        faults.collect()
    });
    Report::Tried(faults)
}

/// Before any socket is made: a socket belongs to the cgroup its maker was in.
fn enter(cgroup: &Path) -> io::Result<()> {
    let enter = || fs::write(cgroup.join("cgroup.procs"), "0");
    enter().or_else(|error| {
        // With `nsdelegate`, nobody leaves the cgroup namespace it is in.
        let host = File::open("/proc/1/ns/cgroup");
        match host.and_then(|host| Ok(setns(host, CloneFlags::CLONE_NEWCGROUP)?)) {
            Ok(()) => enter(),
            Err(_) => Err(error),
        }
    })
}

type Step<T> = Result<T, (&'static str, io::Error)>;

fn tcp(frontend: SocketAddr, nonce: Nonce) -> Step<()> {
    let Some(socket) = open(SockType::Stream, frontend)? else { return Ok(()) };
    socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(frontend))
        .map_err(|errno| ("connect", in_time(errno.into())))?;
    let mut stream = TcpStream::from(socket);
    let peer = stream.peer_addr().map_err(|error| ("getpeername", error))?;
    expect("getpeername", peer, frontend)?;
    stream.write_all(&nonce).map_err(|error| ("write", in_time(error)))?;
    let mut reply = [0; NONCE];
    stream.read_exact(&mut reply).map_err(|error| ("read", in_time(error)))?;
    check("read", &reply, nonce)
}

fn udp(frontend: SocketAddr, nonce: Nonce) -> Step<()> {
    let Some(socket) = open(SockType::Datagram, frontend)? else { return Ok(()) };
    let socket = UdpSocket::from(socket);
    socket.send_to(&nonce, frontend).map_err(|error| ("sendmsg", error))?;
    let mut reply = [0; NONCE + 1];
    let (length, from) = socket.recv_from(&mut reply).map_err(|error| ("recvmsg", in_time(error)))?;
    expect("recvmsg", from, frontend)?;
    check("recvmsg", &reply[..length], nonce)
}

/// A socket bound to the loopback address, from which nothing leaves the machine should it not be translated. None where
/// the kernel has no IPv6.
fn open(kind: SockType, frontend: SocketAddr) -> Step<Option<OwnedFd>> {
    let (family, local) = match frontend.ip() {
        IpAddr::V4(_) => (AddressFamily::Inet, IpAddr::V4(Ipv4Addr::LOCALHOST)),
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            (AddressFamily::Inet6, IpAddr::V6(Ipv4Addr::LOCALHOST.to_ipv6_mapped()))
        }
        IpAddr::V6(_) => (AddressFamily::Inet6, IpAddr::V6(Ipv6Addr::LOCALHOST)),
    };
    let socket = match socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, None) {
        Err(nix::Error::EAFNOSUPPORT) => return Ok(None),
        socket => socket.map_err(|errno| ("socket", errno.into()))?,
    };
    let set = || {
        if family == AddressFamily::Inet6 {
            setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
        }
        let limit = TimeVal::milliseconds(STEP_MILLISECONDS);
        setsockopt(&socket, sockopt::SendTimeout, &limit)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit)?;
        socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(local, 0)))
    };
    set().map_err(|errno: nix::Error| ("bind", errno.into()))?;
    Ok(Some(socket))
}

fn expect(step: &'static str, address: SocketAddr, frontend: SocketAddr) -> Step<()> {
    if address == frontend {
        return Ok(());
    }
    Err((step, io::Error::other(format!("it shows {address} instead of the frontend {frontend}"))))
}

fn check(step: &'static str, reply: &[u8], nonce: Nonce) -> Step<()> {
    if reply == reply_to(nonce) {
        return Ok(());
    }
    Err((step, io::Error::other("somebody else answered")))
}

/// The kernel's words for a time-out of these options are of no help.
fn in_time(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINPROGRESS) => io::Error::other(format!("nothing within {STEP_MILLISECONDS} ms")),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_cannot_enter_its_cgroup_tries_nothing() {
        let nowhere = Path::new("/nonexistent");
        let Report::Outside(error) = run(nowhere, "127.0.0.1:1".parse().unwrap(), [0; NONCE]) else {
            panic!("it got in")
        };
        assert!(error.contains("No such file"), "{error}");
    }

    #[test]
    fn a_call_that_is_not_translated_names_the_step() {
        // Nothing listens there.
        let (step, error) = tcp("127.0.0.1:1".parse().unwrap(), [0; NONCE]).unwrap_err();
        assert_eq!((step, error.kind()), ("connect", io::ErrorKind::ConnectionRefused));
        // A socket of the loopback address cannot even begin to talk to another machine.
        let (step, error) = tcp("192.0.2.1:1".parse().unwrap(), [0; NONCE]).unwrap_err();
        assert_eq!((step, error.raw_os_error()), ("connect", Some(libc::EINVAL)));
    }
}
