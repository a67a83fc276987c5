//! The server as a whole, over real sockets on the loopback device, with a mesh that is made up.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    time::Instant as Clock,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    time::{Instant, timeout},
};

use super::*;
use crate::{
    alias::{Book, Overrides, Reach},
    config::ServiceFilter,
    dns::zone::ZoneSettings,
    model::{Builder, Event, NamespacedName, Node, Object},
    proxy::{Direct, DirectFlow, Refusal},
};

const LONG: Duration = Duration::from_secs(20);
/// As in `session`.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Nodes that do what their names say; `edge2` and `edge3` have a server each, of TCP and of UDP.
struct Mesh {
    servers: [SocketAddr; 2],
}

impl Mesh {
    fn at(&self, node: &str) -> Result<SocketAddr, Refusal> {
        match node {
            "edge2" => Ok(self.servers[0]),
            "edge3" => Ok(self.servers[1]),
            "down" => Err(Refusal::NoPath),
            "refusing" => Err(Refusal::Refused),
            "strict" => Err(Refusal::NotAllowed { rule: "the node's port is not allowed".to_owned() }),
            other => Err(Refusal::Failed(other.to_owned())),
        }
    }
}

impl Dial for Mesh {
    type Stream = Direct;
    type Sender = DirectFlow;
    type Receiver = DirectFlow;

    async fn dial_tcp(&self, node: &str, addr: SocketAddr, deadline: Instant) -> Result<Direct, Refusal> {
        assert!(addr.ip().is_unspecified(), "a node is dialled, and no pod");
        if node == "asleep" {
            return std::future::pending().await;
        }
        Direct::connect(self.at(node)?, deadline).await
    }

    async fn open_udp(&self, node: &str, _: SocketAddr, _: Instant) -> Result<(DirectFlow, DirectFlow), Refusal> {
        let flow = DirectFlow::open(self.at(node)?).await?;
        Ok((flow.clone(), flow))
    }
}

/// A server that sends its name, and then everything back; of UDP, its name before each datagram.
async fn echo(name: &'static str, tasks: &Tasks) -> SocketAddr {
    loop {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        // The same port of both, which somebody else may have.
        let Ok(socket) = UdpSocket::bind(address).await else { continue };
        let each = tasks.clone();
        tasks.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                each.spawn(async move {
                    stream.write_all(name.as_bytes()).await.unwrap();
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        tasks.spawn(async move {
            let mut buffer = vec![0; 65_535];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                let answer = [name.as_bytes(), &buffer[..length]].concat();
                let _ = socket.send_to(&answer, from).await;
            }
        });
        return address;
    }
}

struct World {
    sight: Sight,
    address: SocketAddr,
    conditions: Conditions,
    tasks: Tasks,
    _publish: watch::Sender<Arc<ServiceTable>>,
}

impl World {
    async fn with(room: Room, credentials: Option<PathBuf>) -> Self {
        let (tasks, conditions) = (Tasks::default(), Conditions::default());
        let servers = [echo("edge2", &tasks).await, echo("edge3", &tasks).await];
        let ranges = AliasRanges { v4: "198.18.0.0/16".parse().unwrap(), v6: "fd00:a11a::/64".parse().unwrap() };
        let reach = Reach::new("edge1", ranges, Overrides::default());
        let mut builder =
            Builder::new(ServiceFilter::UnlabelledOnly, "edge1").with_detours(reach, Book::new(ranges, Clock::now()));
        for name in ["edge2", "edge3", "down", "refusing", "strict", "asleep"] {
            let name = NamespacedName::new("", name);
            let node = Node { name, addresses: Vec::new(), labels: Box::default() };
            builder.apply(Event::Apply(Object::Node(node.into())));
        }
        builder.apply(Event::Synced);
        let (publish, tables) = watch::channel(builder.build().unwrap());
        let zones = Zones::follow(ZoneSettings::default(), tables.clone(), &tasks);
        let settings = Settings {
            listen: vec![SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0)],
            credentials,
            uplinks: vec!["nothing0".to_owned()],
            domain: ClusterDomain::default(),
            ranges,
            node: "edge1".to_owned(),
        };
        let sight = start_with(room, settings, Arc::new(Mesh { servers }), tables, zones, &conditions, &tasks);
        let address = timeout(LONG, async {
            loop {
                match sight.status().listeners[0] {
                    Listener { address, listening: true } => return address,
                    Listener { .. } => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        });
        let address = address.await.unwrap();
        Self { sight, address, conditions, tasks, _publish: publish }
    }

    async fn new() -> Self {
        Self::with(Room::default(), None).await
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// A client that has been told the method; no login.
    async fn greeted(&self) -> TcpStream {
        let mut stream = self.connect().await;
        stream.write_all(&[5, 1, 0]).await.unwrap();
        assert_eq!(read::<2>(&mut stream).await, [5, 0]);
        stream
    }

    async fn request(&self, command: u8, name: &str, port: u16) -> (TcpStream, u8) {
        let mut stream = self.greeted().await;
        stream.write_all(&request(command, name, port)).await.unwrap();
        let reply = read::<10>(&mut stream).await;
        assert_eq!((reply[0], reply[2], reply[3]), (5, 0, 1));
        (stream, reply[1])
    }

    fn failures(&self, reason: &str) -> u64 {
        let failures = self.sight.status().counts.failures;
        failures.iter().find(|failure| failure.reason == reason).map_or(0, |failure| failure.count)
    }

    async fn wait(&self, what: &str, mut holds: impl FnMut(&Counts) -> bool) {
        let waited = timeout(LONG, async {
            while !holds(&self.sight.status().counts) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        waited.await.unwrap_or_else(|_| panic!("{what}: {:?}", self.sight.status().counts));
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.tasks.stopping().cancel();
    }
}

fn request(command: u8, name: &str, port: u16) -> Vec<u8> {
    [&[5, command, 0][..], &address(name, port)].concat()
}

fn address(name: &str, port: u16) -> Vec<u8> {
    [&[3, u8::try_from(name.len()).unwrap()][..], name.as_bytes(), &port.to_be_bytes()].concat()
}

async fn read<const N: usize>(stream: &mut TcpStream) -> [u8; N] {
    let mut bytes = [0; N];
    timeout(LONG, stream.read_exact(&mut bytes)).await.unwrap().unwrap();
    bytes
}

/// What comes until the server closes, and how long that took.
async fn rest(stream: &mut TcpStream) -> (Vec<u8>, Duration) {
    let (begin, mut bytes) = (Clock::now(), Vec::new());
    match timeout(LONG, stream.read_to_end(&mut bytes)).await.unwrap() {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
    (bytes, begin.elapsed())
}

#[tokio::test]
async fn fifty_clients_at_once_get_to_their_own_nodes_and_what_they_said_early_with_them() {
    let world = World::new().await;
    let clients = (0..50).map(|n| {
        let world = &world;
        async move {
            let node = if n % 2 == 0 { "edge2" } else { "Edge3.node.cluster.local." };
            let mut stream = world.greeted().await;
            let said = format!("client {n}");
            let early = [&request(1, node, 22), said.as_bytes()].concat();
            stream.write_all(&early).await.unwrap();
            assert_eq!(read::<10>(&mut stream).await, [5, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
            assert_eq!(&read::<5>(&mut stream).await, if n % 2 == 0 { b"edge2" } else { b"edge3" });
            stream.shutdown().await.unwrap();
            assert_eq!(rest(&mut stream).await.0, said.as_bytes());
        }
    });
    futures::future::join_all(clients).await;
    world.wait("all to be gone", |counts| counts.open_sessions == 0).await;
    let counts = world.sight.status().counts;
    assert_eq!((counts.connections, counts.bytes_in), (50, counts.bytes_out + 50 * 5));
}

#[tokio::test]
async fn each_failure_has_its_code_and_is_counted_by_its_reason() {
    let world = World::new().await;
    for (command, name, code, reason) in [
        (1, "edge9", 4, "unknown_host"),
        (1, "down", 4, "no_path"),
        (1, "strict", 2, "not_allowed"),
        (1, "www.example.org", 2, "outside"),
        (1, "refusing", 5, "refused"),
        (2, "edge2", 7, "command"),
        (9, "edge2", 7, "command"),
    ] {
        let before = world.failures(reason);
        let (mut stream, told) = world.request(command, name, 22).await;
        assert_eq!(told, code, "{name}");
        assert_eq!((rest(&mut stream).await.0, world.failures(reason)), (Vec::new(), before + 1), "{name}");
    }
    let mut stream = world.greeted().await;
    // What else the client has said does not keep it from being told.
    stream.write_all(&[&[5, 1, 0, 7][..], &[0; 4096]].concat()).await.unwrap();
    assert_eq!((read::<10>(&mut stream).await[1], world.failures("address_type")), (8, 1));
}

#[tokio::test]
async fn a_node_that_does_not_answer_is_a_time_out() {
    let world = World::new().await;
    let begin = Clock::now();
    let (_, code) = world.request(1, "asleep", 22).await;
    assert_eq!((code, world.failures("timed_out")), (6, 1));
    assert!(begin.elapsed() < 2 * crate::proxy::DIAL_DEADLINE);
}

#[tokio::test]
async fn garbage_is_closed_at_once_and_silence_in_time() {
    let world = World::new().await;
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[4, 1, 0, 80, 1, 2, 3, 4, 0], &[0xff; 4096], b"SSH-2.0-x\r\n"] {
        let mut stream = world.connect().await;
        stream.write_all(garbage).await.unwrap();
        let (told, took) = rest(&mut stream).await;
        assert!(told.is_empty() && took < HANDSHAKE / 2, "{garbage:?}: {told:?} after {took:?}");
    }
    assert_eq!(world.failures("garbage"), 4);
    let mut methods = world.connect().await;
    methods.write_all(&[5, 2, 1, 0x80]).await.unwrap();
    assert_eq!((rest(&mut methods).await.0, world.failures("no_method")), (vec![5, 0xff], 1));
    let mut gone = world.greeted().await;
    gone.write_all(&request(1, "edge2", 22)[..7]).await.unwrap();
    gone.shutdown().await.unwrap();
    assert_eq!((rest(&mut gone).await.0, world.failures("cut_off")), (Vec::new(), 1));

    let silent = async {
        let mut stream = world.connect().await;
        rest(&mut stream).await
    };
    let partial = async {
        let mut stream = world.greeted().await;
        stream.write_all(&request(1, "edge2", 22)[..7]).await.unwrap();
        rest(&mut stream).await
    };
    let slow = async {
        let mut stream = world.connect().await;
        let bytes = [&[5, 200][..], &[1; 200]].concat();
        for byte in &bytes {
            if stream.write_all(std::slice::from_ref(byte)).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        rest(&mut stream).await
    };
    let begin = Clock::now();
    let ended = tokio::join!(silent, partial, slow);
    assert!(begin.elapsed() >= HANDSHAKE - Duration::from_secs(1));
    for (told, took) in [ended.0, ended.1, ended.2] {
        assert!(told.is_empty() && took < 2 * HANDSHAKE, "{told:?} after {took:?}");
    }
    assert_eq!(world.failures("slow"), 3);
    world.wait("nothing to be left", |counts| counts.open_sessions == 0).await;
}

#[tokio::test]
async fn there_is_room_for_so_many_clients_and_they_leave_it_to_others() {
    let world = World::with(Room::new(3, 2), None).await;
    let (first, _second) = (world.greeted().await, world.greeted().await);
    let mut third = world.connect().await;
    assert!(rest(&mut third).await.0.is_empty());
    assert_eq!(world.failures("overloaded"), 1);
    drop(first);
    world.wait("one to leave", |counts| counts.open_sessions == 1).await;
    let (_, code) = world.request(1, "edge2", 22).await;
    assert_eq!(code, 0);
}

#[tokio::test]
async fn with_a_login_only_who_knows_it_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let write = |user: &str, password: &str| {
        std::fs::write(directory.path().join("username"), user).unwrap();
        std::fs::write(directory.path().join("password"), password).unwrap();
    };
    write("operator", "open sesame");
    let world = World::with(Room::default(), Some(directory.path().to_owned())).await;
    let log_in = async |password: &str| {
        let mut stream = world.connect().await;
        stream.write_all(&[5, 2, 0, 2]).await.unwrap();
        assert_eq!(read::<2>(&mut stream).await, [5, 2]);
        let login = [&[1, 8][..], b"operator", &[password.len() as u8], password.as_bytes()].concat();
        stream.write_all(&login).await.unwrap();
        (read::<2>(&mut stream).await, stream)
    };
    let (answer, mut stream) = log_in("open sesame").await;
    assert_eq!(answer, [1, 0]);
    stream.write_all(&request(1, "edge2", 22)).await.unwrap();
    assert_eq!(read::<10>(&mut stream).await[1], 0);
    let (answer, mut stream) = log_in("open").await;
    assert_eq!((answer, rest(&mut stream).await.0, world.failures("auth")), ([1, 1], Vec::new(), 1));
    write("operator", "changed");
    assert_eq!(log_in("open sesame").await.0, [1, 1]);
    assert_eq!(log_in("changed").await.0, [1, 0]);
    let mut without = world.connect().await;
    without.write_all(&[5, 1, 0]).await.unwrap();
    assert_eq!(rest(&mut without).await.0, [5, 0xff]);
    assert!(world.conditions.list().is_empty());
}

#[tokio::test]
async fn where_nobody_can_log_in_that_is_a_condition_and_nobody_does() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::with(Room::default(), Some(directory.path().to_owned())).await;
    timeout(LONG, async {
        while !world.conditions.list().iter().any(|condition| condition.reason == NO_CREDENTIALS) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    let mut stream = world.connect().await;
    stream.write_all(&[5, 1, 2, 1, 0, 0]).await.unwrap();
    assert_eq!(rest(&mut stream).await.0, [5, 2, 1, 1]);
}

/// A client with datagrams.
struct Client {
    control: TcpStream,
    socket: UdpSocket,
    relay: SocketAddr,
}

impl Client {
    async fn new(world: &World) -> Self {
        let mut control = world.greeted().await;
        control.write_all(&[5, 3, 0, 1, 0, 0, 0, 0, 0, 0]).await.unwrap();
        let reply = read::<10>(&mut control).await;
        assert_eq!(reply[..4], [5, 0, 0, 1]);
        let ip = IpAddr::from([reply[4], reply[5], reply[6], reply[7]]);
        let relay = SocketAddr::new(ip, u16::from_be_bytes([reply[8], reply[9]]));
        Self { control, socket: UdpSocket::bind("127.0.0.1:0").await.unwrap(), relay }
    }

    async fn send(&self, name: &str, payload: &[u8]) {
        self.send_raw(&[&[0, 0, 0][..], &address(name, 53), payload].concat()).await;
    }

    async fn send_raw(&self, datagram: &[u8]) {
        self.socket.send_to(datagram, self.relay).await.unwrap();
    }

    /// The next answer: who it is of, and what it says.
    async fn receive(&self) -> (String, String) {
        let mut buffer = vec![0; 65_535];
        let (length, from) = timeout(LONG, self.socket.recv_from(&mut buffer)).await.unwrap().unwrap();
        assert_eq!(from, self.relay);
        let (destination, at) = wire::parse_datagram(&buffer[..length]).unwrap();
        (destination.to_string(), String::from_utf8_lossy(&buffer[at..length]).into_owned())
    }
}

#[tokio::test]
async fn datagrams_go_to_their_destinations_and_answers_say_whose_they_are() {
    let world = World::new().await;
    let client = Client::new(&world).await;
    let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.send("edge2", b" one").await;
    assert_eq!(client.receive().await, ("edge2:53".to_owned(), "edge2 one".to_owned()));
    client.send("edge3.node.cluster.local", b" two").await;
    assert_eq!(client.receive().await, ("edge3.node.cluster.local:53".to_owned(), "edge3 two".to_owned()));
    // A fragment, a short one, and a whole one of somebody else.
    client.send_raw(&[&[0, 0, 1][..], &address("edge2", 53), b" fragment"].concat()).await;
    client.send_raw(&[0, 0, 0, 3, 200, b'e']).await;
    let whole = [&[0, 0, 0][..], &address("edge2", 53), b" stranger"].concat();
    stranger.send_to(&whole, client.relay).await.unwrap();
    world.wait("three to be dropped", |counts| counts.datagrams_dropped == 3).await;
    client.send("edge2", b"").await;
    assert_eq!(client.receive().await.1, "edge2", "an empty one is one");
    let large = "x".repeat(60_000);
    client.send("edge2", large.as_bytes()).await;
    assert_eq!(client.receive().await.1.len(), 60_005);
    let counts = world.sight.status().counts;
    assert_eq!((counts.associations, counts.open_flows, counts.datagrams_in, counts.datagrams_out), (1, 2, 4, 4));

    drop(client.control);
    world.wait("all to end with the connection", |counts| (counts.open_sessions, counts.open_flows) == (0, 0)).await;
    let free = async {
        while UdpSocket::bind(client.relay).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LONG, free).await.unwrap();
}

#[tokio::test]
async fn datagrams_without_a_way_are_counted_and_hurt_no_others() {
    let world = World::new().await;
    let client = Client::new(&world).await;
    for name in ["edge9", "down", "strict", "www.example.org"] {
        client.send(name, b"lost").await;
    }
    for reason in ["unknown_host", "no_path", "not_allowed", "outside"] {
        world.wait(reason, |_| world.failures(reason) == 1).await;
    }
    client.send("edge2", b" here").await;
    assert_eq!(client.receive().await.1, "edge2 here");
    // More destinations than one client may have: the one that was silent longest has gone.
    for n in 0..80_u16 {
        client.send_raw(&[&[0, 0, 0][..], &address("edge3", 1000 + n), b""].concat()).await;
        assert_eq!(client.receive().await, (format!("edge3:{}", 1000 + n), "edge3".to_owned()));
    }
    world.wait("no more than may be", |counts| counts.open_flows <= 64).await;
    client.send("edge2", b" again").await;
    assert_eq!(client.receive().await.1, "edge2 again");
}
