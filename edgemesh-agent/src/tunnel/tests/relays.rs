use std::time::Instant;

use super::*;

fn relay(port: u16) -> Tunnel {
    relay_named("relay", port)
}

fn relay_named(node: &str, port: u16) -> Tunnel {
    start(Settings { port, relays: vec![relay_at(node, port)], ..settings(node) })
}

/// A node that knows relays and nothing else, and stays with them.
fn behind(node: &str, relays: &[RelayNode]) -> Settings {
    Settings { relays: relays.to_vec(), hole_punching: false, ..settings(node) }
}

fn is_relayed(path: Option<PathKind>) -> bool {
    matches!(path, Some(PathKind::Relayed { .. }))
}

/// Opens as soon as the far node has found its relay.
async fn open_soon(tunnel: &Tunnel, node: &str, target: SocketAddr) -> Stream {
    let begin = Instant::now();
    loop {
        match tunnel.open_tcp(&name(node), target, LONG).await {
            Ok(stream) => return stream,
            Err(error) if begin.elapsed() > LONG => panic!("{} to {node}: {error}", tunnel.node()),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_know_only_a_relay_reach_each_other_through_it() {
    let port = free_port();
    let _relay = relay(port);
    let near = start(behind("near", &[relay_at("relay", port)]));
    let far = start(behind("far", &[relay_at("relay", port)]));
    let target = echo().await;
    let mut stream = open_soon(&near, "far", target).await;
    assert_eq!(stream.path(), PathKind::Relayed { via: Some(name("relay")) });
    say(&mut stream, &[9; 500_000]).await;
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    // Back the same way, without a dial.
    let back = open(&far, "near", target).await;
    assert!(is_relayed(Some(back.path())));
    assert_eq!(far.peers().borrow().seen_at(&name("near")), Vec::<IpAddr>::new());
    let mut flow = near.open_udp(&name("far"), streams::udp_echo().await, LONG).await.unwrap();
    let mut heard = Vec::new();
    flow.send(b"datagram").await.unwrap();
    assert!(timeout(LONG, flow.recv(&mut heard)).await.unwrap().unwrap());
    assert_eq!(heard, b"datagram");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_streams_leave_the_relay_when_a_direct_path_appears() {
    // By a punched hole, over QUIC alone too, where both sides dial; and by dialling what the peer announces.
    let (both, quic) = ([Transport::Tcp, Transport::Quic], [Transport::Quic]);
    for (hole_punching, transports) in [(true, &both[..]), (true, &quic), (false, &both)] {
        let (port, far_port) = (free_port(), free_port());
        let _relay = relay(port);
        let relays = vec![relay_at("relay", port)];
        // Nobody is dialled at 127.0.0.1 because he says so.
        let announce = if hole_punching { Vec::new() } else { vec![SocketAddr::new(PODS, far_port)] };
        let listen = vec![Ipv4Addr::LOCALHOST.into(), PODS];
        let settings = |node| Settings { hole_punching, transports: transports.to_vec(), ..behind(node, &relays) };
        let _far = start(Settings { announce, listen, port: far_port, ..settings("far") });
        let near = start(settings("near"));
        let target = echo().await;
        let mut old = open_soon(&near, "far", target).await;
        say(&mut old, b"through the relay").await;
        until(&near, "connected directly", |peers| {
            peers.path(&name("far")).is_some_and(|path| !is_relayed(Some(path)))
        })
        .await;
        let mut new = open(&near, "far", target).await;
        assert!(!is_relayed(Some(new.path())), "{:?}", new.path());
        say(&mut new, b"directly").await;
        say(&mut old, b"goes on where it is").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn between_two_nodes_one_transport_is_left_and_to_the_relay_both() {
    let (port, near_port, far_port) = (free_port(), free_port(), free_port());
    let relay = relay(port);
    let relays = vec![relay_at("relay", port)];
    // Each dials what the other announces, by both transports, as a hole is punched.
    let settings = |node, port| Settings {
        hole_punching: true,
        announce: vec![SocketAddr::new(PODS, port)],
        listen: vec![Ipv4Addr::LOCALHOST.into(), PODS],
        port,
        ..behind(node, &relays)
    };
    let (near, far) = (start(settings("near", near_port)), start(settings("far", far_port)));
    let mut stream = open_soon(&near, "far", echo().await).await;
    let transports = |peers: &Peers, node: &str| {
        let direct =
            peers.views().into_iter().filter(|view| view.node == name(node) && view.path.as_str() != "relayed");
        let mut of: Vec<Transport> = direct.map(|view| view.transport).collect();
        of.sort_unstable();
        of
    };
    let both = [Transport::Tcp, Transport::Quic];
    until(&near, "met directly more than once", |peers| transports(peers, "far").len() > 1).await;
    until(&near, "left with one of TCP", |peers| transports(peers, "far") == both[..1]).await;
    until(&far, "left with one of TCP", |peers| transports(peers, "near") == both[..1]).await;
    say(&mut stream, b"goes on where it is").await;
    until(&near, "of both transports to the relay", |peers| transports(peers, "relay") == both).await;
    until(&relay, "of both transports to a node", |peers| transports(peers, "near") == both).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_relay_a_node_is_refused_at_once_and_back_soon_after_it() {
    let port = free_port();
    let first = relay(port);
    let relays = [relay_at("relay", port)];
    let (near, _far) = (start(behind("near", &relays)), start(behind("far", &relays)));
    let target = echo().await;
    let mut stream = open_soon(&near, "far", target).await;
    first.stop().await;
    assert!(timeout(LONG, stream.read(&mut [0])).await.unwrap().is_err());
    until(&near, "without peers", |peers| peers.nodes().count() == 0).await;
    let begin = Instant::now();
    let error = near.open_tcp(&name("far"), target, LONG).await.err().unwrap();
    assert!(matches!(&error, OpenError::NoPath { why, .. } if why.contains("no relay")), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    let begin = Instant::now();
    // libp2p closes its sockets a moment after it has been dropped.
    let _second = loop {
        let settings = Settings { port, relays: relays.to_vec(), ..settings("relay") };
        match Tunnel::start_refusing(settings, everything(), refuse_but_pods) {
            Ok(relay) => break relay,
            Err(error) if begin.elapsed() > LONG => panic!("{error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    say(&mut open_soon(&near, "far", target).await, b"again").await;
    assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_two_relays_one_may_go() {
    let (one, two) = (free_port(), free_port());
    let (first, _second) = (relay_named("one", one), relay_named("two", two));
    let relays = [relay_at("one", one), relay_at("two", two)];
    let (near, far) = (start(behind("near", &relays)), start(behind("far", &relays)));
    for node in [&near, &far] {
        connected(node, "one").await;
        connected(node, "two").await;
    }
    let target = echo().await;
    say(&mut open_soon(&near, "far", target).await, b"by either").await;
    first.stop().await;
    let begin = Instant::now();
    let mut stream = open_soon(&near, "far", target).await;
    say(&mut stream, b"by the other").await;
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_list_of_relays_is_replaced_while_it_runs() {
    let (one, two) = (free_port(), free_port());
    let (_first, second) = (relay_named("one", one), relay_named("two", two));
    let near = start(behind("near", &[relay_at("one", one)]));
    let far = start(behind("far", &[relay_at("two", two)]));
    connected(&near, "one").await;
    connected(&far, "two").await;
    let target = echo().await;
    assert!(near.open_tcp(&name("far"), target, LONG).await.is_err());
    near.set_relays(vec![relay_at("two", two)]).await;
    let mut stream = open_soon(&near, "far", target).await;
    assert_eq!(stream.path(), PathKind::Relayed { via: Some(name("two")) });
    say(&mut stream, b"hello").await;
    // A relay that is taken off the list relays no longer for those who come.
    second.set_relays(Vec::new()).await;
    let late = start(behind("late", &[relay_at("two", two)]));
    connected(&late, "two").await;
    assert!(late.open_tcp(&name("far"), target, Duration::from_secs(3)).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_may_be_given_by_name() {
    let port = free_port();
    let _relay = relay(port);
    let by_name = RelayNode { node: name("relay"), addresses: vec![format!("localhost:{port}").parse().unwrap()] };
    let near = start(behind("near", &[by_name]));
    connected(&near, "relay").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn starting_does_not_wait_for_relays() {
    let (address, _full) = silence(Ipv4Addr::LOCALHOST.into()).await;
    let relays = [relay_at("relay", address.port())];
    let begin = Instant::now();
    let near = start(behind("near", &relays));
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    let begin = Instant::now();
    let error = near.open_tcp(&name("far"), echo().await, LONG).await.err().unwrap();
    assert!(matches!(error, OpenError::NoPath { .. }), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    timeout(LONG, near.stop()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_in_use_is_an_error_that_names_it() {
    let port = free_port();
    let _first = start(Settings { port, ..settings("first") });
    for transport in [Transport::Tcp, Transport::Quic] {
        let second = Settings { port, transports: vec![transport], ..settings("second") };
        let error = Tunnel::start(second, everything()).err().unwrap();
        assert!(error.to_string().contains(&format!("{port} is in use")), "{error}");
    }
}
