//! With real sockets in scratch network namespaces; root is needed.

use std::{
    collections::HashSet,
    io::{ErrorKind, Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, RawFd},
    process::{Child, Command, Stdio},
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};

use super::*;
use crate::conditions::Conditions;

const DEADLINE: Duration = Duration::from_secs(10);

#[test]
fn an_ended_socket_tells_its_reader_and_can_connect_again() {
    let Some(scratch) = Scratch::new() else { return };
    let (gone, next, client) = scratch.inside(|| {
        let (gone, next) = (server("127.0.0.1:0"), server("127.0.0.1:0"));
        let client = client(&gone);
        (gone, next, client)
    });
    let reader = client.try_clone().unwrap();
    let reader = thread::spawn(move || reader.recv(&mut [0; 16]));
    let worker = Running::new(&[&client]);
    worker.end(&[&gone]);
    worker.wait_for(1);
    assert_eq!(reader.join().unwrap().unwrap_err().kind(), ErrorKind::ConnectionAborted);
    assert_eq!(client.peer_addr().unwrap_err().kind(), ErrorKind::NotConnected);

    client.connect(next.local_addr().unwrap()).unwrap();
    assert_exchange(&client, &next);
    assert_eq!(worker.stop(), 1);
}

#[test]
fn only_the_socket_connected_to_the_peer_and_claimed_by_the_check_is_ended() {
    let Some(scratch) = Scratch::new() else { return };
    let (gone, other) = scratch.inside(|| (server("127.0.0.1:0"), server("127.0.0.1:0")));
    let (claimed, foreign, elsewhere, unconnected) = scratch.inside(|| {
        let unconnected = UdpSocket::bind("127.0.0.1:0").unwrap();
        unconnected.send_to(b"before", gone.local_addr().unwrap()).unwrap();
        (client(&gone), client(&gone), client(&other), unconnected)
    });
    let (listener, tcp) = scratch.inside(|| {
        let listener = TcpListener::bind(gone.local_addr().unwrap()).unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (listener, stream)
    });
    gone.recv(&mut [0; 16]).unwrap();

    let worker = Running::new(&[&claimed as &dyn AsRawFd, &elsewhere, &unconnected, &tcp, &gone]);
    worker.end(&[&gone]);
    worker.wait_for(1);
    assert_eq!(worker.stop(), 1);
    assert_eq!(claimed.recv(&mut [0; 16]).unwrap_err().kind(), ErrorKind::ConnectionAborted);

    assert_exchange(&foreign, &gone);
    assert_exchange(&elsewhere, &other);
    unconnected.send_to(b"after", gone.local_addr().unwrap()).unwrap();
    let (length, from) = gone.recv_from(&mut [0; 16]).unwrap();
    assert_eq!((length, from), (5, unconnected.local_addr().unwrap()));
    (&tcp).write_all(b"x").unwrap();
    listener.accept().unwrap().0.read_exact(&mut [0]).unwrap();
}

#[test]
fn ipv6_and_v4_mapped_peers_are_found_by_the_address_of_the_backend() {
    let Some(scratch) = Scratch::new() else { return };
    let (v4, v6) = scratch.inside(|| (server("127.0.0.1:0"), server("[::1]:0")));
    let (plain, mapped) = scratch.inside(|| {
        let mapped = UdpSocket::bind("[::]:0").unwrap();
        mapped.connect(SocketAddr::from(("::ffff:127.0.0.1".parse::<IpAddr>().unwrap(), port(&v4)))).unwrap();
        (client(&v6), mapped)
    });
    let peer = mapped.peer_addr().unwrap();
    assert!(peer.is_ipv6(), "{peer} is no v4-mapped peer");

    let worker = Running::new(&[&plain, &mapped]);
    worker.end(&[&v4, &v6]);
    worker.wait_for(2);
    for ended in [plain, mapped] {
        assert_eq!(ended.recv(&mut [0; 16]).unwrap_err().kind(), ErrorKind::ConnectionAborted);
    }
    assert_eq!(worker.stop(), 2);
}

#[test]
fn a_v4_mapped_address_names_the_same_peer_as_the_ipv4_address() {
    let peers: Peers = ["[::ffff:10.0.0.1]:53".parse().unwrap()].into_iter().collect();
    assert!(peers.contains("10.0.0.1:53".parse().unwrap()));
    assert!(!peers.contains("10.0.0.1:54".parse().unwrap()));
    assert!(peers.any_v4());
}

#[test]
fn one_request_reaches_every_namespace() {
    let (Some(one), Some(two)) = (Scratch::new(), Scratch::new()) else { return };
    let at = "127.0.0.1:5353";
    let (first, second) = (one.inside(|| server(at)), two.inside(|| server(at)));
    let clients = [one.inside(|| client(&first)), two.inside(|| client(&second))];
    let worker = Running::new(&[&clients[0], &clients[1]]);
    worker.end(&[&first]);
    worker.wait_for(2);
    for client in clients {
        assert_eq!(client.recv(&mut [0; 16]).unwrap_err().kind(), ErrorKind::ConnectionAborted);
    }
}

#[test]
fn a_thousand_sockets_are_ended_at_once() {
    const COUNT: usize = 1000;
    let Some(scratch) = Scratch::new() else { return };
    allow_files(2 * COUNT as u64);
    let gone = scratch.inside(|| server("127.0.0.1:0"));
    let clients: Vec<_> = scratch.inside(|| (0..COUNT).map(|_| client(&gone)).collect());
    let worker = Running::new(&clients.iter().map(|client| client as &dyn AsRawFd).collect::<Vec<_>>());
    worker.end(&[&gone]);
    worker.wait_for(COUNT as u64);
    for client in clients {
        assert_eq!(client.recv(&mut [0; 16]).unwrap_err().kind(), ErrorKind::ConnectionAborted);
    }
    assert_eq!(worker.stop(), COUNT as u64);
}

/// The kernel finds but one of them by the addresses, and compares the cookie only then.
#[test]
fn sockets_that_share_all_their_addresses_are_all_ended() {
    let Some(scratch) = Scratch::new() else { return };
    for any in ["127.0.0.1:0", "[::1]:0"] {
        let (gone, clients) = scratch.inside(|| {
            let (gone, at) = (server(any), server(any).local_addr().unwrap());
            let clients: Vec<_> = (0..8).map(|_| sharing(at)).collect();
            for client in &clients {
                client.connect(gone.local_addr().unwrap()).unwrap();
            }
            (gone, clients)
        });
        let worker = Running::new(&clients.iter().map(|client| client as &dyn AsRawFd).collect::<Vec<_>>());
        worker.end(&[&gone]);
        worker.wait_for(8);
        for client in clients {
            assert_eq!(client.recv(&mut [0; 16]).unwrap_err().kind(), ErrorKind::ConnectionAborted);
        }
        assert_eq!(worker.stop(), 8);
    }
}

#[test]
fn a_socket_that_moved_on_since_it_was_listed_is_left_alone() {
    let Some(scratch) = Scratch::new() else { return };
    scratch.inside(|| {
        let (gone, next) = (server("127.0.0.1:0"), server("127.0.0.1:0"));
        let (closed, moved) = (client(&gone), client(&gone));
        let mut diag = Diag::open().unwrap();
        let listed = diag.connected(&peers(&[&gone])).unwrap();
        assert_eq!(listed.len(), 2, "{listed:?}");
        let locals: HashSet<_> = listed.iter().map(|socket| socket.local).collect();
        assert_eq!(locals, HashSet::from([closed.local_addr().unwrap(), moved.local_addr().unwrap()]));
        let cookies: HashSet<_> = listed.iter().map(|socket| socket.cookie).collect();
        assert_eq!(cookies, HashSet::from([cookie(closed.as_raw_fd()), cookie(moved.as_raw_fd())]));

        // Another takes the addresses of the closed one, so that only the cookie tells them apart.
        let at = closed.local_addr().unwrap();
        drop(closed);
        let successor = bind_when_free(at);
        successor.connect(gone.local_addr().unwrap()).unwrap();
        moved.connect(next.local_addr().unwrap()).unwrap();
        for socket in &listed {
            assert!(!diag.destroy(socket).unwrap(), "{socket:?}");
        }
        successor.set_read_timeout(Some(DEADLINE)).unwrap();
        assert_exchange(&successor, &gone);
        assert_exchange(&moved, &next);
    });
}

#[test]
fn namespaces_are_listed_once_and_while_processes_live_in_them() {
    let Some(scratch) = Scratch::new() else { return };
    let mut sibling = Killed(scratch.inside(idle));
    let of_scratch = || -> Vec<Namespace> {
        let inode = scratch.inode();
        namespaces().unwrap().map(Result::unwrap).filter(|namespace| namespace.inode == inode).collect()
    };
    let mut held = of_scratch();
    assert_eq!(held.len(), 1);
    let held = held.remove(0);

    let inode = held.inode;
    sibling.end();
    drop(scratch);
    assert!(namespaces().unwrap().all(|namespace| namespace.unwrap().inode != inode));
    // What was listed before stays usable, and has nothing in it.
    let left = thread::scope(|scope| {
        let enter = || {
            held.enter().unwrap();
            Diag::open().unwrap().connected(&["127.0.0.1:53".parse().unwrap()].into_iter().collect()).unwrap()
        };
        scope.spawn(enter).join().unwrap()
    });
    assert_eq!(left, []);
}

#[test]
fn processes_that_end_while_they_are_looked_at_are_no_error() {
    let Some(_scratch) = Scratch::new() else { return };
    let stop = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // Between its end and the wait it is a zombie.
                let mut child = Command::new("true").stdout(Stdio::null()).spawn().unwrap();
                thread::yield_now();
                child.wait().unwrap();
            }
        });
        let outcome: Result<usize, Error> =
            (0..100).map(|_| namespaces()?.try_fold(0, |count, namespace| namespace.map(|_| count + 1))).sum();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(outcome.unwrap() >= 100);
    });
}

#[test]
fn only_a_kernel_without_the_call_is_called_unsupported() {
    assert!(destroyed(Ok(())).unwrap());
    assert!(!destroyed(Err(Errno::ENOENT)).unwrap());
    let unsupported = destroyed(Err(Errno::EOPNOTSUPP)).unwrap_err();
    assert!(matches!(unsupported, Error::Unsupported { .. }), "{unsupported}");
    let refused = destroyed(Err(Errno::EPERM)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "cannot end a UDP socket: Operation not permitted (os error 1); CAP_NET_ADMIN is needed"
    );
}

/// A worker that claims the given sockets; so those of tests beside this one are safe from it.
struct Running {
    handle: Handle,
    thread: thread::JoinHandle<()>,
    conditions: Conditions,
}

impl Running {
    fn new(ours: &[&dyn AsRawFd]) -> Self {
        let ours: HashSet<u64> = ours.iter().map(|socket| cookie(socket.as_raw_fd())).collect();
        let conditions = Conditions::default();
        let (handle, thread) = spawn(Box::new(move |cookie, _| ours.contains(&cookie)), conditions.clone()).unwrap();
        Self { handle, thread, conditions }
    }

    fn end(&self, servers: &[&UdpSocket]) {
        self.handle.end(servers.iter().map(|server| server.local_addr().unwrap()).collect()).unwrap();
    }

    fn wait_for(&self, count: u64) {
        let end = Instant::now() + DEADLINE;
        while self.handle.ended().get() < count {
            assert!(
                Instant::now() < end,
                "{} of {count} ended; {:?}",
                self.handle.ended().get(),
                self.conditions.list()
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// How many it has ended when it has finished its round.
    fn stop(self) -> u64 {
        let ended = self.handle.ended();
        drop(self.handle);
        self.thread.join().unwrap();
        assert_eq!(self.conditions.list(), []);
        ended.get()
    }
}

/// A network namespace with `lo` up and a process in it.
struct Scratch(Killed);

impl Scratch {
    /// None, said loudly, without root; with CI=true that is a failure.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            let test = thread::current();
            let test = test.name().unwrap_or("a test");
            assert!(
                std::env::var("CI").as_deref() != Ok("true"),
                "{test} needs root, and with CI=true it may not be skipped"
            );
            // Past the test harness, which shows what a passing test prints to nobody.
            let _ = writeln!(io::stderr(), "SKIPPED: {test}: a network namespace needs root");
            return None;
        }
        let child = on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
            runtime.block_on(async {
                let (connection, netlink, _) = rtnetlink::new_connection().unwrap();
                let up = rtnetlink::LinkUnspec::new_with_index(1).up().build();
                tokio::select! {
                    done = netlink.link().set(up).execute() => done.unwrap(),
                    () = connection => panic!("the connection closed"),
                }
            });
            idle()
        });
        Some(Self(Killed(child)))
    }

    /// Runs `work` on a thread in the namespace; what it opens there stays there.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        on_a_thread(|| {
            let namespace = std::fs::File::open(self.path()).unwrap();
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    fn inode(&self) -> u64 {
        std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(self.path()).unwrap())
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.0.id())
    }
}

struct Killed(Child);

impl Killed {
    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        self.end();
    }
}

/// A process that ends with the test, however that ends: it reads from a pipe nobody writes to.
fn idle() -> Child {
    Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn server(at: &str) -> UdpSocket {
    let server = UdpSocket::bind(at).unwrap();
    server.set_read_timeout(Some(DEADLINE)).unwrap();
    server
}

fn client(server: &UdpSocket) -> UdpSocket {
    let to = server.local_addr().unwrap();
    let client = UdpSocket::bind((to.ip(), 0)).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client.connect(to).unwrap();
    client
}

/// A socket at the address of one just closed, of which a child of a test beside this one may hold a copy until its exec.
fn bind_when_free(at: SocketAddr) -> UdpSocket {
    let end = Instant::now() + DEADLINE;
    loop {
        match UdpSocket::bind(at) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < end => {
                thread::sleep(Duration::from_millis(2));
            }
            bound => return bound.unwrap(),
        }
    }
}

/// A socket at `at`, beside others.
fn sharing(at: SocketAddr) -> UdpSocket {
    use nix::sys::socket::{SockaddrStorage, bind};
    let family = if at.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).unwrap();
    setsockopt(&fd, sockopt::ReusePort, &true).unwrap();
    bind(fd.as_raw_fd(), &SockaddrStorage::from(at)).unwrap();
    let socket = UdpSocket::from(fd);
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket
}

fn assert_exchange(client: &UdpSocket, server: &UdpSocket) {
    client.send(b"ping").unwrap();
    let (_, from) = server.recv_from(&mut [0; 16]).unwrap();
    assert_eq!(from, client.local_addr().unwrap());
    server.send_to(b"pong", from).unwrap();
    let mut reply = [0; 16];
    let length = client.recv(&mut reply).unwrap();
    assert_eq!(&reply[..length], b"pong");
}

fn peers(servers: &[&UdpSocket]) -> Peers {
    servers.iter().map(|server| server.local_addr().unwrap()).collect()
}

fn port(socket: &UdpSocket) -> u16 {
    socket.local_addr().unwrap().port()
}

/// The kernel's own word on the cookie, to hold the one of the dump against.
fn cookie(socket: RawFd) -> u64 {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, which is as long, and both outlive the call.
    let outcome = unsafe {
        libc::getsockopt(socket, libc::SOL_SOCKET, libc::SO_COOKIE, (&raw mut cookie).cast(), &raw mut length)
    };
    assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
    cookie
}

/// Raises the limit of open files to at least `count`, where it is lower.
fn allow_files(count: u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit writes one rlimit, setrlimit reads one; `limit` is one and outlives both calls.
    let outcome = unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && limit.rlim_cur < count {
            limit.rlim_cur = count;
            limit.rlim_max = limit.rlim_max.max(count);
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit)
        } else {
            0
        }
    };
    assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
}
