//! With the kernel's real lookup of sockets, in a network namespace of each test's own.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use bytes::Bytes;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, watch},
    task::JoinSet,
    time::{Instant, timeout},
};

use super::{counters::add, *};
use crate::{
    alias::{AliasRanges, Book},
    config::EbpfConfig,
    dataplane::ebpf::divert_aliases,
    net::route::ensure_local,
    tunnel::{Cut, Passed},
};

const DEADLINE: Duration = Duration::from_secs(10);

/// How many flows there may be at a time to the node `narrow`.
const NARROW: usize = 16;

/// Connects to the address itself, as a tunnel's far end does.
#[derive(Debug)]
struct Direct {
    dialled: Mutex<Vec<(String, SocketAddr)>>,
    narrow: Arc<Semaphore>,
}

impl Default for Direct {
    fn default() -> Self {
        Self { dialled: Mutex::default(), narrow: Arc::new(Semaphore::new(NARROW)) }
    }
}

struct Far(TcpStream);

/// A socket, with its place where there are few.
#[derive(Clone)]
struct FarFlow(Arc<UdpSocket>, #[expect(dead_code, reason = "held, not read")] Option<Arc<OwnedSemaphorePermit>>);

impl Dial for Direct {
    type Stream = Far;
    type Sender = FarFlow;
    type Receiver = FarFlow;

    async fn dial_tcp(&self, node: &str, addr: SocketAddr, _: Instant) -> Result<Far, Refusal> {
        self.dialled.lock().unwrap().push((node.to_owned(), addr));
        if node == "asleep" {
            return std::future::pending().await;
        }
        let stream = TcpStream::connect(addr).await.map_err(|error| {
            let refused = error.kind() == io::ErrorKind::ConnectionRefused;
            if refused { Refusal::Refused } else { Refusal::Failed(error.to_string()) }
        })?;
        Ok(Far(stream))
    }

    async fn open_udp(&self, node: &str, addr: SocketAddr, _: Instant) -> Result<(FarFlow, FarFlow), Refusal> {
        self.dialled.lock().unwrap().push((node.to_owned(), addr));
        if node == "gone" {
            return Err(Refusal::NoPath);
        }
        let place = || Arc::clone(&self.narrow).try_acquire_owned().map_err(|_| Refusal::Overloaded);
        let place = (node == "narrow").then(place).transpose()?.map(Arc::new);
        let any = if addr.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = Arc::new(UdpSocket::bind(any).await.unwrap());
        socket.connect(addr).await.unwrap();
        let flow = FarFlow(socket, place);
        Ok((flow.clone(), flow))
    }
}

impl Carry for Far {
    async fn carry(mut self, client: &mut TcpStream, passed: Passed<'_>) -> Result<(), Cut> {
        match tokio::io::copy_bidirectional(client, &mut self.0).await {
            Ok((up, down)) => {
                add(passed.up, up);
                add(passed.down, down);
                Ok(())
            }
            Err(error) => {
                for socket in [&*client, &self.0] {
                    socket.set_zero_linger().unwrap();
                }
                Err(Cut::Socket(error))
            }
        }
    }
}

impl SendDatagram for FarFlow {
    async fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        self.0.send(datagram).await.map(drop)
    }
}

impl ReceiveDatagram for FarFlow {
    async fn receive(&mut self) -> io::Result<Bytes> {
        let mut buffer = vec![0; 65_535];
        let length = self.0.recv(&mut buffer).await?;
        Ok(buffer[..length].to_vec().into())
    }
}

/// A node that carries what is sent to aliases.
struct Bench {
    book: Book,
    ranges: AliasRanges,
    tables: watch::Sender<Arc<ServiceTable>>,
    dial: Arc<Direct>,
    counters: Arc<Counters>,
    tasks: Tasks,
    config: EbpfConfig,
    _pins: tempfile::TempDir,
}

impl Bench {
    async fn new() -> Self {
        let ranges = AliasRanges { v4: "198.18.0.0/16".parse().unwrap(), v6: "fd00:a11a::/64".parse().unwrap() };
        let pins = tempfile::tempdir().unwrap();
        let config = EbpfConfig { pin_directory: pins.path().to_owned(), ..EbpfConfig::default() };
        let bench = Self {
            book: Book::new(ranges, std::time::Instant::now()),
            ranges,
            tables: watch::channel(Arc::default()).0,
            dial: Arc::default(),
            counters: Arc::default(),
            tasks: Tasks::default(),
            config,
            _pins: pins,
        };
        bench.start();
        ensure_local(ranges.v4, Some("169.254.96.16".parse().unwrap())).await.unwrap();
        ensure_local(ranges.v6, None).await.unwrap();
        bench
    }

    /// Carries with new sockets, as an agent that has just started does.
    fn start(&self) {
        let sockets = Sockets::bind().unwrap();
        divert_aliases(&self.config, self.ranges, sockets.each()).unwrap();
        let proxy = Proxy {
            tables: self.tables.subscribe(),
            dial: Arc::clone(&self.dial),
            counters: Arc::clone(&self.counters),
            conditions: Conditions::default(),
        };
        proxy.start(sockets, &self.tasks);
    }

    /// Ends as an agent that is killed does.
    async fn stop(&mut self) {
        assert!(std::mem::take(&mut self.tasks).drain(DEADLINE).await);
    }

    /// An alias of a pod, with the port that it listens on.
    fn alias(&mut self, node: &str, addr: SocketAddr) -> SocketAddr {
        let alias = self.book.acquire(node, addr.ip()).unwrap();
        let aliases = self.book.aliases().clone();
        self.tables.send_replace(Arc::new(ServiceTable { aliases, ..ServiceTable::default() }));
        SocketAddr::new(alias, addr.port())
    }

    fn refused(&self, kind: &str) -> u64 {
        self.counters.read().refusals.iter().find(|refusal| refusal.kind == kind).map_or(0, |refusal| refusal.count)
    }
}

fn ip(arguments: &str) {
    let output = std::process::Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs on a node of its own, or not at all, which is said loudly.
fn on_a_node(work: impl AsyncFnOnce(&mut Bench) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        edgemesh_tests::lab::skip("looking sockets up").unwrap();
        return;
    }
    let inside = move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        ip("link set lo up");
        ip("address add 169.254.96.16/32 dev lo");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut bench = Bench::new().await;
            let pins = bench.config.pin_directory.clone();
            timeout(6 * DEADLINE, work(&mut bench)).await.unwrap();
            bench.stop().await;
            nix::mount::umount(&pins).unwrap();
        });
    };
    thread::spawn(inside).join().unwrap();
}

async fn listen(ip: &str) -> TcpListener {
    TcpListener::bind((ip.parse::<IpAddr>().unwrap(), 0)).await.unwrap()
}

async fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    timeout(DEADLINE, TcpStream::connect(to)).await.unwrap()
}

/// What a client reads until the end, or the error that ends it.
async fn rest(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut read = Vec::new();
    timeout(DEADLINE, stream.read_to_end(&mut read)).await.unwrap().map(|_| read)
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(DEADLINE, wait).await.unwrap_or_else(|_| panic!("{what}"));
}

#[test]
fn a_connection_to_any_port_of_an_alias_reaches_its_pod_and_each_side_ends_by_itself() {
    on_a_node(async |bench| {
        for pod_ip in ["127.0.0.7", "::1"] {
            for _ in 0..3 {
                let pod = listen(pod_ip).await;
                let addr = pod.local_addr().unwrap();
                let alias = bench.alias("edge2", addr);
                let mut client = connect(alias).await.unwrap();
                assert_eq!(client.peer_addr().unwrap(), alias);
                let (mut served, _) = pod.accept().await.unwrap();
                client.write_all(b"question").await.unwrap();
                client.shutdown().await.unwrap();
                assert_eq!(rest(&mut served).await.unwrap(), b"question");
                let answer = vec![42; 3 << 20];
                let (wrote, read) = tokio::join!(
                    async {
                        served.write_all(&answer).await.unwrap();
                        served.shutdown().await
                    },
                    rest(&mut client)
                );
                wrote.unwrap();
                assert_eq!(read.unwrap(), answer);
                assert_eq!(bench.dial.dialled.lock().unwrap().last().unwrap(), &("edge2".to_owned(), addr));
            }
        }
        until("connections to be over", || bench.counters.read().open_connections == 0).await;
        let counted = bench.counters.read();
        assert_eq!((counted.connections, counted.bytes_out, counted.bytes_in), (6, 6 * 8, 6 * (3 << 20)));
        assert_eq!(counted.refusals, []);
    });
}

#[test]
fn what_does_not_get_to_its_pod_is_reset_at_once() {
    on_a_node(async |bench| {
        let closed = listen("127.0.0.7").await.local_addr().unwrap();
        let refused = bench.alias("edge2", closed);
        let unknown: SocketAddr = "198.18.77.77:80".parse().unwrap();
        let begun = Instant::now();
        for (alias, kind) in [(refused, "refused"), (unknown, "no_such_alias")] {
            let error = match connect(alias).await {
                Ok(mut client) => rest(&mut client).await.unwrap_err(),
                Err(error) => error,
            };
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{kind}");
            until(kind, || bench.refused(kind) == 1).await;
        }
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        let asleep = bench.alias("asleep", closed);
        let mut client = connect(asleep).await.unwrap();
        assert_eq!(rest(&mut client).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let waited = begun.elapsed();
        assert!(waited > DIAL_DEADLINE / 2 && waited < 2 * DIAL_DEADLINE, "{waited:?}");
        assert_eq!(bench.refused("timed_out"), 1);
    });
}

#[test]
fn a_reset_on_one_side_is_a_reset_on_the_other() {
    on_a_node(async |bench| {
        let pod = listen("127.0.0.7").await;
        let alias = bench.alias("edge2", pod.local_addr().unwrap());
        let mut client = connect(alias).await.unwrap();
        let (served, _) = pod.accept().await.unwrap();
        served.set_zero_linger().unwrap();
        drop(served);
        assert_eq!(rest(&mut client).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);

        let client = connect(alias).await.unwrap();
        let (mut served, _) = pod.accept().await.unwrap();
        client.set_zero_linger().unwrap();
        drop(client);
        assert_eq!(rest(&mut served).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn a_client_that_vanishes_is_missed() {
    on_a_node(async |bench| {
        let pod = listen("127.0.0.7").await;
        let alias = bench.alias("edge2", pod.local_addr().unwrap());
        let mut client = connect(alias).await.unwrap();
        let (mut served, _) = pod.accept().await.unwrap();
        client.write_all(b"x").await.unwrap();
        assert_eq!(served.read_u8().await.unwrap(), b'x');
        // As the kernel lists the accepted socket: address and port, then a timer, where 2 is for asking a silent peer.
        let IpAddr::V4(ip) = alias.ip() else { panic!("{alias}") };
        let own = format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), alias.port());
        until("the client to be asked", || {
            let table = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
            let mut sockets = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
            sockets.any(|fields| fields[1] == own && fields[3] == "01" && fields[5].starts_with("02:"))
        })
        .await;
    });
}

#[test]
fn no_other_socket_of_the_node_gets_what_is_for_an_alias_whether_an_agent_runs_or_not() {
    on_a_node(async |bench| {
        let host = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let host_udp = UdpSocket::bind("0.0.0.0:0").await.unwrap();
        let port = host.local_addr().unwrap().port();
        let pod = TcpListener::bind(("127.0.0.7", port)).await;
        // The port is taken on all addresses of this node, so the pod has it on none: what matters is who is asked.
        assert!(pod.is_err());
        let alias = bench.alias("edge2", SocketAddr::new("192.0.2.1".parse().unwrap(), port));
        let alias_udp = SocketAddr::new(alias.ip(), host_udp.local_addr().unwrap().port());
        let accepted = async || timeout(Duration::from_millis(200), host.accept()).await.is_ok();
        let received = async || timeout(Duration::from_millis(200), host_udp.recv(&mut [0; 9])).await.is_ok();

        let mut attempts = vec![connect(alias).await];
        let client = UdpSocket::bind("0.0.0.0:0").await.unwrap();
        client.send_to(b"datagram", alias_udp).await.unwrap();
        assert!(!accepted().await && !received().await, "while the agent carries");

        bench.stop().await;
        // A program that another test is starting has the listener too, until it is executed.
        let refused = async {
            loop {
                match connect(alias).await {
                    Ok(taken) => attempts.push(Ok(taken)),
                    Err(refused) => break refused,
                }
            }
        };
        assert_eq!(timeout(DEADLINE, refused).await.unwrap().kind(), io::ErrorKind::ConnectionRefused);
        client.connect(alias_udp).await.unwrap();
        client.send(b"datagram").await.unwrap();
        let told = timeout(DEADLINE, client.recv(&mut [0; 9])).await.unwrap().unwrap_err();
        assert_eq!(told.kind(), io::ErrorKind::ConnectionRefused);
        assert!(!accepted().await && !received().await, "while none does");

        // The next one takes over.
        bench.start();
        let pod = listen("127.0.0.7").await;
        let alias = bench.alias("edge2", pod.local_addr().unwrap());
        let mut client = connect(alias).await.unwrap();
        let (mut served, _) = pod.accept().await.unwrap();
        served.write_all(b"x").await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), b'x');
    });
}

/// Answers each datagram with its sender's address and what was in it.
async fn echo(pod: UdpSocket) {
    let mut buffer = vec![0; 65_535];
    loop {
        let (length, from) = pod.recv_from(&mut buffer).await.unwrap();
        pod.send_to(&buffer[..length], from).await.unwrap();
    }
}

#[test]
fn datagrams_arrive_whole_and_answers_come_from_the_address_that_was_asked() {
    on_a_node(async |bench| {
        for (pod_ip, any) in [("127.0.0.7", "0.0.0.0:0"), ("::1", "[::]:0")] {
            let pod = UdpSocket::bind((pod_ip, 0)).await.unwrap();
            let alias = bench.alias("edge2", pod.local_addr().unwrap());
            let mut pods = JoinSet::new();
            pods.spawn(echo(pod));
            let connected = UdpSocket::bind(any).await.unwrap();
            connected.connect(alias).await.unwrap();
            let unconnected = UdpSocket::bind(any).await.unwrap();
            let mut buffer = vec![0; 65_535];
            for size in [1, 0, 1400, 9000, 60_000, 1] {
                let datagram = vec![7; size];
                connected.send(&datagram).await.unwrap();
                let length = timeout(DEADLINE, connected.recv(&mut buffer)).await.unwrap().unwrap();
                assert_eq!(buffer[..length], datagram, "{size}");
                unconnected.send_to(&datagram, alias).await.unwrap();
                let (length, from) = timeout(DEADLINE, unconnected.recv_from(&mut buffer)).await.unwrap().unwrap();
                assert_eq!((&buffer[..length], from), (&datagram[..], alias), "{size}");
            }
        }
        let counted = bench.counters.read();
        assert_eq!((counted.open_flows, counted.datagrams_out, counted.datagrams_in), (4, 24, 24));
    });
}

#[test]
fn many_clients_of_one_alias_each_get_their_own_answers() {
    on_a_node(async |bench| {
        const CLIENTS: usize = 200;
        let pod = UdpSocket::bind("127.0.0.7:0").await.unwrap();
        let alias = bench.alias("edge2", pod.local_addr().unwrap());
        let mut pods = JoinSet::new();
        pods.spawn(echo(pod));
        let mut clients = JoinSet::new();
        for number in 0..CLIENTS {
            let client = UdpSocket::bind("0.0.0.0:0").await.unwrap();
            clients.spawn(async move {
                for round in 0..5 {
                    let asked = format!("{number} {round}");
                    client.send_to(asked.as_bytes(), alias).await.unwrap();
                    let mut buffer = [0; 64];
                    let (length, from) = timeout(DEADLINE, client.recv_from(&mut buffer)).await.unwrap().unwrap();
                    assert_eq!((&buffer[..length], from), (asked.as_bytes(), alias));
                }
            });
        }
        while let Some(ended) = clients.join_next().await {
            ended.unwrap();
        }
        let counted = bench.counters.read();
        assert_eq!((counted.flows, counted.datagrams_out, counted.datagrams_in), (200, 1000, 1000));
    });
}

#[test]
fn new_clients_find_room_where_others_are_done_and_who_goes_on_is_left_alone() {
    on_a_node(async |bench| {
        const CLIENTS: usize = 20 * NARROW;
        let pod = UdpSocket::bind("127.0.0.7:0").await.unwrap();
        let alias = bench.alias("narrow", pod.local_addr().unwrap());
        let mut pods = JoinSet::new();
        pods.spawn(echo(pod));
        let ask = async |client: &UdpSocket| {
            let mut buffer = [0; 8];
            client.send_to(b"question", alias).await.unwrap();
            let (length, from) = timeout(DEADLINE, client.recv_from(&mut buffer)).await.unwrap().unwrap();
            assert_eq!((length, from), (8, alias));
        };
        let goes_on = UdpSocket::bind("0.0.0.0:0").await.unwrap();
        // Kept, or one may get the port of another that is not forgotten yet, and be the same client.
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            let client = UdpSocket::bind("0.0.0.0:0").await.unwrap();
            ask(&client).await;
            ask(&goes_on).await;
            clients.push(client);
        }
        let counted = bench.counters.read();
        assert_eq!((counted.flows, counted.open_flows), (CLIENTS as u64 + 1, NARROW as u64), "{counted:?}");
        assert_eq!((counted.evicted_flows, counted.datagrams_dropped), (counted.flows - counted.open_flows, 0));
        assert_eq!(counted.refusals, []);
    });
}

#[test]
fn where_there_is_no_way_datagrams_are_dropped_without_asking_for_each() {
    on_a_node(async |bench| {
        let alias = bench.alias("gone", "192.0.2.1:53".parse().unwrap());
        let client = UdpSocket::bind("0.0.0.0:0").await.unwrap();
        for _ in 0..50 {
            client.send_to(b"?", alias).await.unwrap();
        }
        until("the refusal", || bench.refused("no_path") > 0).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(bench.dial.dialled.lock().unwrap().len(), 1);
        let unknown: SocketAddr = "198.18.77.77:53".parse().unwrap();
        client.send_to(b"?", unknown).await.unwrap();
        until("the refusal", || bench.refused("no_such_alias") == 1).await;
        // After a while it is tried again.
        let asked = async {
            while bench.dial.dialled.lock().unwrap().len() < 2 {
                client.send_to(b"?", alias).await.unwrap();
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(DEADLINE, asked).await.unwrap();
    });
}
