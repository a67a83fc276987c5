//! Real swarms on loopback.

mod asks;
mod measure;
mod membership;
mod relays;
mod streams;
pub(crate) mod wire;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    time::timeout,
};

use super::*;

const PSK: &str = "a test's pre-shared key";

/// Bound of everything that a test waits for.
const LONG: Duration = Duration::from_secs(20);

/// Where pods of the tests live: loopback, but not what the agent refuses in earnest.
const PODS: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 77, 0, 1));

fn name(node: &str) -> NodeName {
    node.parse().unwrap()
}

/// Settings of a node on loopback.
fn settings(node: &str) -> Settings {
    Settings {
        listen: vec![Ipv4Addr::LOCALHOST.into()],
        port: 0,
        mdns: false,
        ..Settings::new(name(node), Psks::parse(PSK).unwrap())
    }
}

/// A policy that dials whatever it is asked for, and the node itself at the pods' address.
fn everything() -> Arc<dyn DialPolicy> {
    Arc::new(|_: &NodeName, _: Protocol, target: Target| match target {
        Target::Address(address) => Decision::Allowed(address),
        Target::Node { port } => Decision::Allowed(SocketAddr::new(PODS, port)),
    })
}

fn refuse_but_pods(ip: IpAddr) -> Option<&'static str> {
    if ip == PODS { None } else { always_refused(ip) }
}

fn start(settings: Settings) -> Tunnel {
    Tunnel::start_refusing(settings, everything(), refuse_but_pods).unwrap()
}

/// A port that is free for TCP and UDP on loopback.
fn free_port() -> u16 {
    loop {
        let tcp = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = tcp.local_addr().unwrap().port();
        if std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

fn relay_at(node: &str, port: u16) -> RelayNode {
    let address = RelayAddress { host: Host::Ip(Ipv4Addr::LOCALHOST.into()), port };
    RelayNode { node: name(node), addresses: vec![address] }
}

/// Waits until `condition` holds for the peers of a tunnel.
async fn until(tunnel: &Tunnel, what: &str, condition: impl Fn(&Peers) -> bool) {
    let mut peers = tunnel.peers();
    let wait = timeout(LONG, peers.wait_for(|peers| condition(peers))).await;
    match wait {
        Ok(result) => {
            result.unwrap();
        }
        Err(_) => panic!("{}: not {what}; has {:?}", tunnel.node(), tunnel.peers().borrow().views()),
    }
}

async fn connected(tunnel: &Tunnel, node: &str) {
    until(tunnel, &format!("connected to {node}"), |peers| peers.path(&name(node)).is_some()).await;
}

/// Two nodes with a direct connection over `transport`.
async fn pair(transport: Transport) -> (Tunnel, Tunnel) {
    let port = free_port();
    let far = start(Settings { port, transports: vec![transport], ..settings("far") });
    let relays = vec![relay_at("far", port)];
    let near = start(Settings { relays, transports: vec![transport], ..settings("near") });
    connected(&near, "far").await;
    (near, far)
}

/// A server in a pod; each connection is handed to `serve`.
async fn pod<F, S>(serve: S) -> SocketAddr
where
    S: Fn(TcpStream) -> F + Send + 'static,
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let listener = TcpListener::bind((PODS, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    TaskTracker::new().spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tasks.spawn(serve(socket));
        }
    });
    address
}

/// A pod that sends back what it gets, to the end.
async fn echo() -> SocketAddr {
    pod(|mut socket| async move {
        let (mut read, mut write) = socket.split();
        tokio::io::copy(&mut read, &mut write).await?;
        write.shutdown().await
    })
    .await
}

/// An address that answers no connection, as long as what comes with it is kept: the kernel drops what a full backlog has
/// no room for.
async fn silence(ip: IpAddr) -> (SocketAddr, (TcpListener, Vec<TcpStream>)) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((ip, 0).into()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut full = Vec::new();
    while let Ok(Ok(socket)) = timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
        full.push(socket);
    }
    (address, (listener, full))
}

/// A near node's listener whose connections go to `target` through the tunnel.
async fn through_tunnel(near: &Tunnel, target: SocketAddr) -> SocketAddr {
    let near = near.clone();
    pod(move |mut socket| {
        let near = near.clone();
        async move {
            socket.set_nodelay(true)?;
            let stream = near.open_tcp(&name("far"), target, LONG).await.map_err(io::Error::other)?;
            let passed = Passed { up: &AtomicU64::new(0), down: &AtomicU64::new(0) };
            splice(&mut socket, stream, passed).await.map_err(io::Error::other)
        }
    })
    .await
}

async fn open(tunnel: &Tunnel, node: &str, target: SocketAddr) -> Stream {
    timeout(LONG, tunnel.open_tcp(&name(node), target, LONG)).await.unwrap().unwrap()
}

/// Says something through a stream to an echo, and hears it again.
async fn say(stream: &mut Stream, text: &[u8]) {
    exchange(stream, text).await.unwrap();
}

/// [`say`], through a stream that may end.
async fn exchange(stream: &mut Stream, text: &[u8]) -> io::Result<()> {
    stream.write_all(text).await?;
    let mut heard = vec![0; text.len()];
    timeout(LONG, stream.read_exact(&mut heard)).await??;
    assert_eq!(heard, text);
    Ok(())
}
