//! Sockets that receive nothing from some interfaces: a filter of classic BPF in the kernel (`SO_ATTACH_FILTER`,
//! Documentation/networking/filter.rst), which costs the socket's reader nothing and needs no capability.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
};

/// `BPF_MAXINSNS` of the kernel.
const MAX_INSTRUCTIONS: usize = 4096;

/// Has the kernel drop what comes to the socket from an interface with one of these indexes, in place of those given
/// before; without any, nothing is dropped.
///
/// A TCP listener then answers no SYN from there; its connections keep the filter that it had when they were made.
/// Packets of this host to itself are from the loopback device, whatever the address.
///
/// # Errors
///
/// Those of setsockopt(2), and more interfaces than a filter has room for (2000).
pub fn refuse_from(socket: BorrowedFd<'_>, interfaces: &[u32]) -> io::Result<()> {
    if interfaces.is_empty() {
        let nothing: libc::c_int = 0;
        return match set(socket, libc::SO_DETACH_FILTER, &nothing) {
            // There is none.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        };
    }
    let mut program = program(interfaces);
    let length = u16::try_from(program.len()).ok().filter(|length| usize::from(*length) <= MAX_INSTRUCTIONS);
    let Some(len) = length else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} interfaces are too many", interfaces.len()),
        ));
    };
    set(socket, libc::SO_ATTACH_FILTER, &libc::sock_fprog { len, filter: program.as_mut_ptr() })
}

fn program(interfaces: &[u32]) -> Vec<libc::sock_filter> {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const SKIP_UNLESS: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let step = |code: u32, k: u32, jf: u8| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    // Loads from this offset on are not of the packet but of what is known about it: where it came in.
    let interface = (libc::SKF_AD_OFF + libc::SKF_AD_IFINDEX) as u32;
    let mut program = vec![step(LOAD, interface, 0)];
    for index in interfaces {
        program.extend([step(SKIP_UNLESS, *index, 1), step(RETURN, 0, 0)]);
    }
    program.push(step(RETURN, u32::MAX, 0));
    program
}

fn set<T>(socket: BorrowedFd<'_>, option: libc::c_int, value: &T) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is of the length given and lives during the call, as does the program that it may point to, of
    // which the kernel makes a copy.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, ptr::from_ref(value).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream, UdpSocket},
        os::fd::AsFd,
        time::Duration,
    };

    use super::*;

    #[test]
    fn a_socket_hears_nothing_from_an_interface_that_it_refuses() {
        let loopback = nix::net::if_::if_nametoindex("lo").unwrap();
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(server) = UdpSocket::bind(address) else { continue };
            server.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let listener = TcpListener::bind(address).unwrap();
            let client = UdpSocket::bind(address).unwrap();
            let say = |word: &[u8]| client.send_to(word, server.local_addr().unwrap()).unwrap();
            let connect =
                |wait: u64| TcpStream::connect_timeout(&listener.local_addr().unwrap(), Duration::from_millis(wait));
            let refuse = |interfaces: &[u32]| {
                refuse_from(server.as_fd(), interfaces).unwrap();
                refuse_from(listener.as_fd(), interfaces).unwrap();
            };
            refuse(&[7001, loopback, 7002]);
            say(b"refused");
            assert_eq!(connect(200).unwrap_err().kind(), io::ErrorKind::TimedOut);
            refuse(&[7001, 7002]);
            say(b"heard");
            connect(20_000).unwrap();
            refuse(&[]);
            refuse(&[]);
            say(b"heard, too");
            connect(20_000).unwrap();
            for expected in [&b"heard"[..], b"heard, too"] {
                let mut buffer = [0; 16];
                let length = server.recv(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], expected);
            }
        }
    }

    #[test]
    fn more_interfaces_than_there_is_room_for_are_an_error() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let many: Vec<u32> = (1..3000).collect();
        assert_eq!(refuse_from(server.as_fd(), &many).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        refuse_from(server.as_fd(), &many[..2000]).unwrap();
    }
}
