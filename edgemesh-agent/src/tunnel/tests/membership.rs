use std::collections::HashMap;

use futures::StreamExt as _;
use libp2p::{Multiaddr, SwarmBuilder, identity::Keypair, noise, relay, swarm::SwarmEvent, tcp, tls, yamux};
use tokio::sync::mpsc::UnboundedSender;

use super::*;
use crate::tunnel::{
    identity::Membership,
    mesh::{self, Parts},
    serve::{NewServer, Server},
};

const OTHER_PSK: &str = "another mesh's pre-shared key";

/// A node that the test must not let in anywhere: it has the given keys, and claims to be `claims`. Ends when it is cut
/// off, or with what it was let into.
#[expect(clippy::wildcard_enum_match_arm, reason = "libp2p has many events, and the rest is no matter here")]
async fn knock(
    keypair: Keypair,
    claims: &str,
    accepts: &str,
    address: Multiaddr,
) -> Result<&'static str, &'static str> {
    let counters = Arc::<Counters>::default();
    let server = Server::new(NewServer {
        node: name(claims),
        policy: everything(),
        refused: always_refused,
        deadline: Duration::from_secs(5),
        idle: UdpIdle::default(),
        most: 1,
        counters: Arc::clone(&counters),
        tasks: TaskTracker::new(),
        stop: CancellationToken::new(),
    });
    let membership = Membership { psks: Psks::parse(accepts).unwrap(), allow: AllowList::default() };
    let mut swarm = mesh::build(Parts {
        node: name(claims),
        keypair,
        membership: Arc::new(membership),
        server: Arc::new(server),
        counters,
        security: Security::Tls,
        hole_punching: false,
        mdns: false,
        deadline: Duration::from_secs(5),
    })
    .unwrap();
    swarm.dial(address).unwrap();
    let outcome = async {
        loop {
            match swarm.select_next_some().await {
                SwarmEvent::ConnectionClosed { .. } => return Err("closed"),
                SwarmEvent::OutgoingConnectionError { .. } => return Err("no connection"),
                SwarmEvent::Behaviour(gate::Event::Inner(_)) => return Ok("served"),
                _ => {}
            }
        }
    };
    timeout(LONG, outcome).await.unwrap_or(Ok("left alone"))
}

fn at(port: u16, transport: Transport) -> Multiaddr {
    mesh::multiaddr(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port), transport)
}

fn keys(psk: &str, node: &str) -> Keypair {
    Psks::parse(psk).unwrap().keypair(&name(node)).unwrap()
}

/// Whether a node can still be reached by a member.
async fn assert_serves(port: u16) {
    let member = start(Settings { relays: vec![relay_at("far", port)], ..settings("member") });
    connected(&member, "far").await;
    say(&mut open(&member, "far", echo().await).await, b"hello").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_not_the_psk_or_claims_another_name_is_cut_off() {
    let port = free_port();
    let far = start(Settings { port, ..settings("far") });
    for transport in [Transport::Tcp, Transport::Quic] {
        let knocks = [
            ("another PSK", keys(OTHER_PSK, "edge1"), "edge1"),
            ("no PSK", Keypair::generate_ed25519(), "edge1"),
            ("another's name", keys(PSK, "edge2"), "edge1"),
            ("the node's own name", keys(PSK, "edge2"), "far"),
        ];
        for (what, keypair, claims) in knocks {
            // It accepts the node itself, whatever it thinks of it.
            let outcome = knock(keypair, claims, PSK, at(port, transport)).await;
            assert_eq!(outcome, Err("closed"), "{what} over {transport:?}");
        }
    }
    // The same with everything right, so that it is not for another reason.
    assert_eq!(knock(keys(PSK, "edge1"), "edge1", PSK, at(port, Transport::Tcp)).await, Ok("served"));
    assert_eq!(far.counters().served.get(), 0);
    assert_eq!(far.counters().refused_peers.get(), 8);
    assert_serves(port).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_meshes_with_different_keys_do_not_mix() {
    let port = free_port();
    let _far = start(Settings { port, ..settings("far") });
    let psks = Psks::parse(OTHER_PSK).unwrap();
    let near = start(Settings { psks, relays: vec![relay_at("far", port)], ..settings("near") });
    let error = near.open_tcp(&name("far"), echo().await, LONG).await.err().unwrap();
    assert!(matches!(&error, OpenError::NoPath { .. }), "{error}");
    assert_eq!(near.peers().borrow().nodes().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::wildcard_enum_match_arm, reason = "libp2p has many events, and the rest is no matter here")]
async fn a_stranger_gets_no_reservation() {
    let port = free_port();
    let relay = start(Settings { port, relays: vec![relay_at("relay", port)], ..settings("relay") });
    // A plain libp2p node that knows nothing of hellos.
    let mut stranger = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), tls::Config::new, yamux::Config::default)
        .unwrap()
        .with_relay_client(noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(|_, client| client)
        .unwrap()
        .build();
    let id = peer_id(&Psks::parse(PSK).unwrap(), &name("relay")).unwrap();
    let circuit: Multiaddr = format!("{}/p2p/{id}/p2p-circuit", at(port, Transport::Tcp)).parse().unwrap();
    stranger.listen_on(circuit).unwrap();
    let outcome = async {
        loop {
            match stranger.select_next_some().await {
                SwarmEvent::Behaviour(relay::client::Event::ReservationReqAccepted { .. })
                | SwarmEvent::NewListenAddr { .. } => return "reserved",
                SwarmEvent::ListenerClosed { .. } => return "refused",
                _ => {}
            }
        }
    };
    assert_eq!(timeout(LONG, outcome).await.unwrap(), "refused");
    assert_eq!(relay.peers().borrow().nodes().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_silence_on_the_port_hurt_nobody() {
    let port = free_port();
    let far = start(Settings { port, open_timeout: Duration::from_secs(1), ..settings("far") });
    let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    let mut sockets = Vec::new();
    for number in 0..400u32 {
        let mut socket = TcpStream::connect(address).await.unwrap();
        match number % 4 {
            0 => socket.write_all(b"GET / HTTP/1.1\r\nHost: far\r\n\r\n").await.unwrap_or_default(),
            1 => socket.write_all(&[0xff; 4096]).await.unwrap_or_default(),
            // A multistream greeting, and no more.
            2 => socket.write_all(b"\x13/multistream/1.0.0\n").await.unwrap_or_default(),
            _ => {}
        }
        sockets.push(socket);
    }
    let udp = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    for size in 1..1200usize {
        udp.send_to(&vec![0xc3; size], address).await.unwrap();
    }
    // Every one of them is closed, whether it said something or not.
    for mut socket in sockets {
        let closed = async { while socket.read(&mut [0; 256]).await.is_ok_and(|count| count > 0) {} };
        timeout(Duration::from_secs(10), closed).await.expect("a connection without a handshake is closed");
    }
    assert_eq!(far.peers().borrow().nodes().count(), 0);
    let counters = far.counters();
    assert!(counters.refused_peers.get() > 0);
    assert!(counters.denied_connections.get() > 200, "{} denied", counters.denied_connections.get());
    assert_serves(port).await;
}

/// Passes connections on to a port and reports what their clients send.
async fn eavesdrop(port: u16, heard: UnboundedSender<Vec<u8>>) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let own = listener.local_addr().unwrap().port();
    let tasks = TaskTracker::new();
    tasks.clone().spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
            let heard = heard.clone();
            tasks.spawn(async move {
                let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                    (client.into_split(), server.into_split());
                let up = async {
                    let mut buffer = vec![0; 65_536];
                    while let Ok(count @ 1..) = from_client.read(&mut buffer).await {
                        let _ = heard.send(buffer[..count].to_vec());
                        let _ = to_server.write_all(&buffer[..count]).await;
                    }
                };
                let down = async {
                    let _ = tokio::io::copy(&mut from_server, &mut to_client).await;
                };
                tokio::join!(up, down);
            });
        }
    });
    own
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replayed_handshake_opens_nothing() {
    let port = free_port();
    let far = start(Settings { port, ..settings("far") });
    let (heard, mut said) = mpsc::unbounded_channel();
    let spied = eavesdrop(port, heard).await;
    let relays = vec![relay_at("far", spied)];
    let near = start(Settings { relays, transports: vec![Transport::Tcp], ..settings("near") });
    connected(&near, "far").await;
    say(&mut open(&near, "far", echo().await).await, b"hello").await;
    near.stop().await;
    until(&far, "alone again", |peers| peers.nodes().count() == 0).await;
    let mut all = Vec::new();
    while let Ok(piece) = said.try_recv() {
        all.push(piece);
    }
    assert!(all.len() > 3, "{} pieces", all.len());
    let (served, refused) = (far.counters().served.get(), far.counters().refused_peers.get());
    let mut replay = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    for piece in all {
        let _ = replay.write_all(&piece).await;
        tokio::task::yield_now().await;
    }
    let closed = async { while replay.read(&mut [0; 4096]).await.is_ok_and(|count| count > 0) {} };
    timeout(LONG, closed).await.unwrap();
    let known = async {
        while far.counters().refused_peers.get() == refused {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LONG, known).await.unwrap();
    assert_eq!(far.counters().served.get(), served);
    assert_eq!(far.peers().borrow().nodes().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_rotated_while_everything_runs() {
    let port = free_port();
    let far = start(Settings { port, ..settings("far") });
    let near = start(Settings { relays: vec![relay_at("far", port)], ..settings("near") });
    let nodes: HashMap<&str, &Tunnel> = [("near", &near), ("far", &far)].into();
    let target = echo().await;
    let mut stream = open(&near, "far", target).await;
    let set = async |node: &str, psks: &str| {
        nodes[node].set_membership(Psks::parse(psks).unwrap(), AllowList::default()).await;
    };
    let works = async |what: &str| {
        let begin = std::time::Instant::now();
        loop {
            // A new identity ends the connections of the old one, and streams that were opened just before with them.
            let answered = match near.open_tcp(&name("far"), target, LONG).await {
                Ok(mut stream) => exchange(&mut stream, b"hello").await.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match answered {
                Ok(()) => return,
                Err(error) if begin.elapsed() > LONG => {
                    panic!("{what}: {error}; near {:?}", near.peers().borrow().views())
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    let (old_new, new_old) = (format!("{PSK}\n{OTHER_PSK}"), format!("{OTHER_PSK}\n{PSK}"));
    for (step, node, psks) in [
        ("both accept both", "far", &*old_new),
        ("both accept both", "near", &*old_new),
        ("one has its new identity", "near", &*new_old),
        ("both have", "far", &*new_old),
    ] {
        set(node, psks).await;
        works(&format!("{step}: {node}")).await;
        if psks == old_new {
            say(&mut stream, b"not disturbed").await;
        }
    }
    set("near", OTHER_PSK).await;
    set("far", OTHER_PSK).await;
    works("the old key is gone").await;
    // Who has only the old key is a stranger now.
    assert_eq!(knock(keys(PSK, "edge1"), "edge1", OTHER_PSK, at(port, Transport::Tcp)).await, Err("closed"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_taken_away_ends_connections() {
    let port = free_port();
    let both = Psks::parse(&format!("{PSK}\n{OTHER_PSK}")).unwrap();
    let far = start(Settings { port, psks: both, ..settings("far") });
    let other = Psks::parse(&format!("{OTHER_PSK}\n{PSK}")).unwrap();
    let near = start(Settings { psks: other, relays: vec![relay_at("far", port)], ..settings("near") });
    connected(&near, "far").await;
    connected(&far, "near").await;
    far.set_membership(Psks::parse(PSK).unwrap(), AllowList::default()).await;
    until(&far, "alone", |peers| peers.nodes().count() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_allow_list_keeps_members_out_too() {
    let port = free_port();
    let far = start(Settings { port, allow: AllowList::only(["friend"]), ..settings("far") });
    let _friend = start(Settings { relays: vec![relay_at("far", port)], ..settings("friend") });
    connected(&far, "friend").await;
    let other = start(Settings { relays: vec![relay_at("far", port)], ..settings("other") });
    let error = other.open_tcp(&name("far"), echo().await, LONG).await.err().unwrap();
    assert!(matches!(error, OpenError::NoPath { .. }), "{error}");
    assert_eq!(far.peers().borrow().nodes().collect::<Vec<_>>(), [&name("friend")]);
}
