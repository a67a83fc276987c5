//! Figures, for people: `cargo test --release -p edgemesh-agent --lib tunnel::tests::measure -- --ignored --nocapture`.
//!
//! Each line compares what runs over the same hops, interleaved in one run: client, near node, far node, pod.

use std::time::Instant;

use libp2p::identity::Keypair;
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector, rustls::pki_types::ServerName};

use super::*;

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(1);

/// A way from a client's socket to a pod.
struct Way {
    what: &'static str,
    /// Leads to a pod that sends without end.
    source: SocketAddr,
    /// Leads to a pod that echoes.
    echo: SocketAddr,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

async fn source() -> SocketAddr {
    pod(|mut socket| async move {
        loop {
            socket.write_all(&[7; 65_536]).await?;
        }
    })
    .await
}

/// As [`through_tunnel`], with a TLS connection for each, and tokio's copy.
async fn through_tls(target: SocketAddr) -> SocketAddr {
    let server = libp2p::tls::make_server_config(&Keypair::generate_ed25519()).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(server));
    let far = pod(move |socket| {
        let acceptor = acceptor.clone();
        async move {
            socket.set_nodelay(true)?;
            let mut tls = acceptor.accept(socket).await?;
            let mut socket = TcpStream::connect(target).await?;
            socket.set_nodelay(true)?;
            tokio::io::copy_bidirectional_with_sizes(&mut tls, &mut socket, 65_536, 65_536).await.map(|_| ())
        }
    })
    .await;
    let client = libp2p::tls::make_client_config(&Keypair::generate_ed25519(), None).unwrap();
    let connector = TlsConnector::from(Arc::new(client));
    pod(move |mut socket| {
        let connector = connector.clone();
        async move {
            socket.set_nodelay(true)?;
            let far = TcpStream::connect(far).await?;
            far.set_nodelay(true)?;
            let mut tls = connector.connect(ServerName::try_from("far").unwrap(), far).await?;
            tokio::io::copy_bidirectional_with_sizes(&mut socket, &mut tls, 65_536, 65_536).await.map(|_| ())
        }
    })
    .await
}

async fn throughput(address: SocketAddr) -> f64 {
    let mut socket = TcpStream::connect(address).await.unwrap();
    let mut buffer = vec![0; 1 << 20];
    // Windows grow in the first moments.
    let warm = Instant::now();
    while warm.elapsed() < ROUND / 4 {
        assert!(socket.read(&mut buffer).await.unwrap() > 0);
    }
    let (begin, mut bytes) = (Instant::now(), 0);
    while begin.elapsed() < ROUND {
        bytes += socket.read(&mut buffer).await.unwrap();
    }
    bytes as f64 / begin.elapsed().as_secs_f64() / 1e6
}

async fn latency(address: SocketAddr) -> Vec<f64> {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.set_nodelay(true).unwrap();
    let (mut buffer, mut micros) = ([0; 256], Vec::new());
    for _ in 0..1000 {
        let begin = Instant::now();
        socket.write_all(&buffer).await.unwrap();
        socket.read_exact(&mut buffer).await.unwrap();
        micros.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    micros
}

async fn connections(near: &Tunnel, target: SocketAddr) -> f64 {
    let (begin, mut workers) = (Instant::now(), JoinSet::new());
    for _ in 0..64 {
        let near = near.clone();
        workers.spawn(async move {
            let mut count = 0;
            while begin.elapsed() < ROUND {
                let mut stream = open(&near, "far", target).await;
                stream.shutdown().await.unwrap();
                assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
                count += 1;
            }
            count
        });
    }
    let count: u32 = workers.join_all().await.into_iter().sum();
    f64::from(count) / begin.elapsed().as_secs_f64()
}

/// Two nodes with one kind of connection between them, and whatever keeps it up.
async fn nodes(what: &str) -> (Tunnel, Vec<Tunnel>) {
    let transports = if what.contains("QUIC") { vec![Transport::Quic] } else { vec![Transport::Tcp] };
    let security = if what.contains("noise") { Security::Noise } else { Security::Tls };
    let with =
        |node: &str| Settings { transports: transports.clone(), security, hole_punching: false, ..settings(node) };
    let port = free_port();
    if what.contains("relay") {
        let relays = vec![relay_at("relay", port)];
        let relay = start(Settings { port, relays: relays.clone(), ..with("relay") });
        let far = start(Settings { relays: relays.clone(), ..with("far") });
        let near = start(Settings { relays, ..with("near") });
        let target = echo().await;
        while near.open_tcp(&name("far"), target, LONG).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        return (near, vec![relay, far]);
    }
    let far = start(Settings { port, ..with("far") });
    let near = start(Settings { relays: vec![relay_at("far", port)], ..with("near") });
    connected(&near, "far").await;
    (near, vec![far])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures for a minute; only a release build says anything"]
async fn figures() {
    let (source, echo) = (source().await, echo().await);
    let mut ways = vec![Way { what: "direct to the pod", source, echo }];
    ways.push(Way { what: "tokio-rustls", source: through_tls(source).await, echo: through_tls(echo).await });
    let mut kept = Vec::new();
    for what in ["TCP, TLS", "TCP, noise", "QUIC", "TCP, TLS, over a relay"] {
        let (near, others) = nodes(what).await;
        let (source, echo) = (through_tunnel(&near, source).await, through_tunnel(&near, echo).await);
        ways.push(Way { what, source, echo });
        kept.push((what, near, others));
    }
    let mut rates = vec![Vec::new(); ways.len()];
    let mut waits = vec![Vec::new(); ways.len()];
    for _ in 0..ROUNDS {
        for (at, way) in ways.iter().enumerate() {
            rates[at].push(throughput(way.source).await);
            waits[at].extend(latency(way.echo).await);
        }
    }
    let plain = median(rates[1].clone());
    println!("{:<24} {:>9} {:>13} {:>9} {:>9}", "", "MB/s", "/tokio-rustls", "p50 µs", "p99 µs");
    for (at, way) in ways.iter().enumerate() {
        let (rate, mut wait) = (median(rates[at].clone()), waits[at].clone());
        wait.sort_by(f64::total_cmp);
        let (p50, p99) = (wait[wait.len() / 2], wait[wait.len() * 99 / 100]);
        println!("{:<24} {rate:>9.0} {:>13.2} {p50:>9.0} {p99:>9.0}", way.what, rate / plain);
    }
    for (what, near, _) in &kept {
        let mut rates = Vec::new();
        for _ in 0..3 {
            rates.push(connections(near, echo).await);
        }
        println!("{what:<24} {:>9.0} new connections/s", median(rates));
    }
}

/// What is resident, in KiB.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "for people: what streams, connections and nodes take, both ends together"]
async fn memory() {
    const STREAMS: usize = 1000;
    const NODES: usize = 50;
    crate::allocator::share_heaps();
    let echo = echo().await;
    for what in ["TCP, TLS", "QUIC", "TCP, TLS, over a relay"] {
        let (near, _others) = nodes(what).await;
        let before = resident();
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            let mut stream = open(&near, "far", echo).await;
            say(&mut stream, b"hello").await;
            streams.push(stream);
        }
        println!("{what:<24} {:>9.1} KiB a stream, with the echo", (resident() - before) / STREAMS as f64);
    }
    for transports in [vec![Transport::Tcp], vec![Transport::Quic]] {
        let port = free_port();
        let hub = start(Settings { port, transports: transports.clone(), ..settings("hub") });
        let before = resident();
        let mut members = Vec::new();
        for number in 0..NODES {
            let relays = vec![relay_at("hub", port)];
            let member = Settings { relays, transports: transports.clone(), ..settings(&format!("member-{number}")) };
            members.push(start(member));
        }
        until(&hub, "met", |peers| peers.nodes().count() == NODES).await;
        println!("{transports:?} {:>9.1} KiB a node and its connection", (resident() - before) / NODES as f64);
    }
}
