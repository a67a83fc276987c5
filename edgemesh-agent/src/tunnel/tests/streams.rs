use std::{sync::atomic::Ordering, time::Instant};

use tokio::net::UdpSocket;

use super::*;

/// Deterministic bytes, and the same in any piece.
fn pattern(offset: u64, buffer: &mut [u8]) {
    for (at, byte) in (offset..).zip(buffer) {
        *byte = (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_closes_pass_in_both_directions() {
    for transport in [Transport::Tcp, Transport::Quic] {
        let (near, _far) = pair(transport).await;
        // Answers only when it has heard everything, so the end must have come through.
        let target = pod(|mut socket| async move {
            let mut heard = Vec::new();
            socket.read_to_end(&mut heard).await?;
            socket.write_all(&heard).await?;
            socket.shutdown().await
        })
        .await;
        let mut stream = open(&near, "far", target).await;
        let said = vec![7; 300_000];
        stream.write_all(&said).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut heard = Vec::new();
        timeout(LONG, stream.read_to_end(&mut heard)).await.unwrap().unwrap();
        assert!(heard == said, "{transport:?}");
        // The other way round: the pod ends first and hears on.
        let (tell, told) = tokio::sync::oneshot::channel();
        let tell = Arc::new(std::sync::Mutex::new(Some(tell)));
        let target = pod(move |mut socket| {
            let tell = Arc::clone(&tell);
            async move {
                socket.write_all(b"bye").await?;
                socket.shutdown().await?;
                let mut heard = String::new();
                socket.read_to_string(&mut heard).await?;
                let tell = tell.lock().unwrap().take().unwrap();
                tell.send(heard).unwrap();
                Ok(())
            }
        })
        .await;
        let mut stream = open(&near, "far", target).await;
        let mut heard = String::new();
        timeout(LONG, stream.read_to_string(&mut heard)).await.unwrap().unwrap();
        assert_eq!(heard, "bye");
        stream.write_all(b"still here").await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(timeout(LONG, told).await.unwrap().unwrap(), "still here");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_of_either_side_is_a_reset_at_the_other_within_a_second() {
    for transport in [Transport::Tcp, Transport::Quic] {
        let (near, _far) = pair(transport).await;
        // The pod resets after the first byte.
        let target = pod(|mut socket| async move {
            socket.read_exact(&mut [0]).await?;
            socket.set_zero_linger()
        })
        .await;
        let mut stream = open(&near, "far", target).await;
        stream.write_all(b"x").await.unwrap();
        let error = timeout(Duration::from_secs(1), stream.read(&mut [0])).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{transport:?}");
        // This side gives up.
        let (tell, mut told) = mpsc::unbounded_channel();
        let target = pod(move |mut socket| {
            let tell = tell.clone();
            async move {
                socket.read_exact(&mut [0]).await?;
                tell.send(Ok(1)).unwrap();
                tell.send(socket.read(&mut [0]).await.map_err(|error| error.kind())).unwrap();
                Ok(())
            }
        })
        .await;
        let mut stream = open(&near, "far", target).await;
        stream.write_all(b"x").await.unwrap();
        assert_eq!(timeout(LONG, told.recv()).await.unwrap(), Some(Ok(1)));
        drop(stream);
        let seen = timeout(Duration::from_secs(1), told.recv()).await.unwrap();
        assert_eq!(seen, Some(Err(io::ErrorKind::ConnectionReset)), "{transport:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_node_is_a_reset_and_not_an_end() {
    let (near, far) = pair(Transport::Tcp).await;
    let mut stream = open(&near, "far", echo().await).await;
    say(&mut stream, b"hello").await;
    far.stop().await;
    let error = timeout(LONG, stream.read(&mut [0])).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_say_what_they_are() {
    let port = free_port();
    let policy = |from: &NodeName, _: Protocol, target: Target| match target {
        Target::Address(address) if address.port() == 1 => {
            Decision::NotAllowed { rule: format!("no business of {from}'s") }
        }
        Target::Address(address) => Decision::Allowed(address),
        Target::Node { port } => Decision::Allowed(SocketAddr::new([127, 0, 0, 1].into(), port)),
    };
    let far = Settings { port, open_timeout: Duration::from_secs(1), ..settings("far") };
    let _far = Tunnel::start_refusing(far, Arc::new(policy), refuse_but_pods).unwrap();
    let near = start(Settings { relays: vec![relay_at("far", port)], ..settings("near") });
    let node = name("far");
    let open = |target: Target| near.open_tcp(&node, target, LONG);
    let at = |ip: &str, port| Target::Address(SocketAddr::new(ip.parse().unwrap(), port));
    let closed = std::net::TcpListener::bind((PODS, 0)).unwrap().local_addr().unwrap();

    let error = open(closed.into()).await.err().unwrap();
    assert!(matches!(&error, OpenError::Refused(why) if why.contains(&closed.to_string())), "{error}");
    let error = open(at("127.77.0.1", 1)).await.err().unwrap();
    assert_eq!(error, OpenError::NotAllowed { rule: "no business of near's".to_owned() });
    for ip in ["127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "0.0.0.0"] {
        let error = open(at(ip, 80)).await.err().unwrap();
        assert!(matches!(error, OpenError::NotAllowed { .. }), "{ip}: {error}");
    }
    // Also when it is the policy that leads there.
    let error = open(Target::Node { port: 22 }).await.err().unwrap();
    assert!(matches!(&error, OpenError::NotAllowed { rule } if rule.contains("loopback")), "{error}");
    let error = near.open_udp(&node, at("127.0.0.1", 53), LONG).await.err().unwrap();
    assert!(matches!(error, OpenError::NotAllowed { .. }), "{error}");
    let error = near.open_tcp(&name("nobody"), closed, LONG).await.err().unwrap();
    assert!(matches!(error, OpenError::NoPath { .. }), "{error}");
    let error = near.open_tcp(&name("near"), closed, LONG).await.err().unwrap();
    assert!(matches!(&error, OpenError::NoPath { why, .. } if why == "it is this node"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_never_answers_is_a_timeout() {
    let port = free_port();
    let _far = start(Settings { port, open_timeout: Duration::from_secs(1), ..settings("far") });
    let near = start(Settings { relays: vec![relay_at("far", port)], ..settings("near") });
    connected(&near, "far").await;
    let (address, _full) = silence(PODS).await;
    let begin = Instant::now();
    let error = near.open_tcp(&name("far"), address, LONG).await.err().unwrap();
    assert!(matches!(error, OpenError::TimedOut(_)), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    // And the near side's own deadline holds, by whichever side it is told.
    let begin = Instant::now();
    let error = near.open_tcp(&name("far"), address, Duration::from_millis(300)).await.err().unwrap();
    assert!(matches!(error, OpenError::TimedOut(_)), "{error}");
    assert!(begin.elapsed() < Duration::from_millis(600), "{:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_comes_through_unchanged_both_ways_at_once() {
    const BYTES: u64 = 256 << 20;
    let (near, _far) = pair(Transport::Tcp).await;
    let target = echo().await;
    let stream = open(&near, "far", target).await;
    let (mut read, mut write) = tokio::io::split(stream);
    let send = async move {
        let mut buffer = vec![0; 1 << 20];
        for offset in (0..BYTES).step_by(buffer.len()) {
            pattern(offset, &mut buffer);
            write.write_all(&buffer).await?;
        }
        write.shutdown().await
    };
    let receive = async move {
        let (mut buffer, mut expected, mut offset) = (vec![0; 1 << 20], vec![0; 1 << 20], 0);
        loop {
            let count = read.read(&mut buffer).await?;
            if count == 0 {
                return io::Result::Ok(offset);
            }
            pattern(offset, &mut expected[..count]);
            assert!(buffer[..count] == expected[..count], "differs after {offset} bytes");
            offset += count as u64;
        }
    };
    let (sent, received) = timeout(Duration::from_secs(120), async { tokio::join!(send, receive) }).await.unwrap();
    sent.unwrap();
    assert_eq!(received.unwrap(), BYTES);
    let views = near.peers().borrow().views();
    assert_eq!((views[0].sent_bytes, views[0].received_bytes), (BYTES, BYTES));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_are_open_at_once() {
    for transport in [Transport::Tcp, Transport::Quic] {
        let (near, far) = pair(transport).await;
        let target = echo().await;
        let mut opening = tokio::task::JoinSet::new();
        for number in 0..1000u32 {
            let near = near.clone();
            opening.spawn(async move {
                let mut stream = open(&near, "far", target).await;
                say(&mut stream, &number.to_be_bytes()).await;
                stream
            });
        }
        let mut streams = timeout(LONG, opening.join_all()).await.unwrap();
        assert_eq!(streams.len(), 1000);
        assert_eq!(near.peers().borrow().views().iter().map(|view| view.streams).sum::<u32>(), 1000);
        for stream in &mut streams {
            say(stream, b"again").await;
        }
        assert_eq!(near.counters().opened.get(), 1000, "{transport:?}");
        assert_eq!(far.counters().served.get(), 1000);
        drop(streams);
        let wait = async {
            while far.peers().borrow().views().iter().any(|view| view.streams > 0) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(LONG, wait).await.expect("streams that are dropped end at the far side");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stands_still_holds_up_its_own_stream_only() {
    let (near, _far) = pair(Transport::Tcp).await;
    let taken = Arc::new(AtomicU64::new(0));
    // It sends without end and counts what the tunnel takes.
    let counter = Arc::clone(&taken);
    let flood = pod(move |mut socket| {
        let counter = Arc::clone(&counter);
        async move {
            loop {
                socket.write_all(&[0; 65_536]).await?;
                counter.fetch_add(65_536, Ordering::Relaxed);
            }
        }
    })
    .await;
    let mut stream = open(&near, "far", flood).await;
    let mut before = 0;
    // Nobody reads: it must come to a stand.
    let stand = async {
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let now = taken.load(Ordering::Relaxed);
            if now == before && now > 0 {
                return now;
            }
            before = now;
        }
    };
    let held = timeout(LONG, stand).await.expect("what nobody reads is bounded");
    assert!(held < 32 << 20, "{held} bytes are on their way to a reader that stands still");
    // Others are not concerned.
    let mut other = open(&near, "far", echo().await).await;
    let begin = Instant::now();
    say(&mut other, &[1; 100_000]).await;
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    stream.read_exact(&mut vec![0; 1 << 20]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_requests_are_answered_beside_a_bulk_transfer() {
    let (near, _far) = pair(Transport::Tcp).await;
    let source = pod(|mut socket| async move {
        loop {
            socket.write_all(&[0; 65_536]).await?;
        }
    })
    .await;
    let mut bulk = open(&near, "far", source).await;
    let reading = tokio::task::JoinSet::from_iter([async move {
        let mut buffer = vec![0; 65_536];
        while bulk.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
    }]);
    let mut small = open(&near, "far", echo().await).await;
    let mut worst = Duration::ZERO;
    for _ in 0..50 {
        let begin = Instant::now();
        say(&mut small, b"ping").await;
        worst = worst.max(begin.elapsed());
    }
    drop(reading);
    assert!(worst < Duration::from_secs(1), "{worst:?}");
}

/// A UDP pod that sends each datagram back.
pub(super) async fn udp_echo() -> SocketAddr {
    let socket = UdpSocket::bind((PODS, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    TaskTracker::new().spawn(async move {
        let mut buffer = vec![0; 65_536];
        while let Ok((count, from)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..count], from).await;
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn datagrams_arrive_whole_and_alone() {
    for transport in [Transport::Tcp, Transport::Quic] {
        let (near, _far) = pair(transport).await;
        let mut flow = near.open_udp(&name("far"), udp_echo().await, LONG).await.unwrap();
        let sizes = [0, 1, 2, 511, 1400, 9000, 16_384, 65_507];
        let mut buffer = Vec::new();
        for round in 0..1000usize {
            let mut datagram = vec![0; sizes[round % sizes.len()].min(65_507)];
            pattern(round as u64, &mut datagram);
            flow.send(&datagram).await.unwrap();
            assert!(timeout(LONG, flow.recv(&mut buffer)).await.unwrap().unwrap());
            assert!(
                buffer == datagram,
                "{transport:?}, datagram {round}: {} of {} bytes",
                buffer.len(),
                datagram.len()
            );
        }
        // In one go: what arrives is some of what was sent, each whole.
        for number in 0..200u32 {
            flow.send(&number.to_be_bytes().repeat(25)).await.unwrap();
        }
        let mut heard = 0;
        while let Ok(more) = timeout(Duration::from_millis(500), flow.recv(&mut buffer)).await {
            assert!(more.unwrap());
            assert_eq!(buffer.len(), 100);
            assert!(buffer.chunks(4).all(|chunk| chunk == &buffer[..4]));
            heard += 1;
        }
        assert!(heard > 100, "{heard} of 200");
        assert!(flow.send(&vec![0; 65_508]).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_datagram_of_a_flow_arrives_however_soon_it_comes() {
    for transport in [Transport::Tcp, Transport::Quic] {
        let (near, _far) = pair(transport).await;
        let (echo, mut buffer) = (udp_echo().await, Vec::new());
        for number in 0..1000u32 {
            let mut flow = near.open_udp(&name("far"), echo, LONG).await.unwrap();
            flow.send(&number.to_be_bytes()).await.unwrap();
            let heard = timeout(LONG, flow.recv(&mut buffer)).await;
            assert!(heard.is_ok_and(|heard| heard.unwrap()), "{transport:?}: that of flow {number} was lost");
            assert_eq!(buffer, number.to_be_bytes());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_flow_ends_and_a_busy_one_goes_on() {
    let port = free_port();
    let udp_idle = UdpIdle { unreplied: Duration::from_millis(400), replied: Duration::from_secs(2) };
    let _far = start(Settings { port, udp_idle, ..settings("far") });
    let near = start(Settings { relays: vec![relay_at("far", port)], ..settings("near") });
    let (mut answered, mut silent) = (
        near.open_udp(&name("far"), udp_echo().await, LONG).await.unwrap(),
        near.open_udp(&name("far"), SocketAddr::new(PODS, 9), LONG).await.unwrap(),
    );
    let (begin, mut buffer) = (Instant::now(), Vec::new());
    silent.send(b"anybody?").await.unwrap();
    answered.send(b"hello").await.unwrap();
    assert!(answered.recv(&mut buffer).await.unwrap());
    assert!(!timeout(LONG, silent.recv(&mut buffer)).await.unwrap().unwrap());
    let silent_for = begin.elapsed();
    assert!((400..1500).contains(&silent_for.as_millis()), "{silent_for:?}");
    answered.send(b"still there?").await.unwrap();
    assert!(timeout(LONG, answered.recv(&mut buffer)).await.unwrap().unwrap());
    assert!(!timeout(LONG, answered.recv(&mut buffer)).await.unwrap().unwrap());
    assert!(begin.elapsed() - silent_for >= Duration::from_secs(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_are_spliced_at_both_ends() {
    let (near, _far) = pair(Transport::Tcp).await;
    let target = echo().await;
    let front = TcpListener::bind((PODS, 0)).await.unwrap();
    let address = front.local_addr().unwrap();
    let passed = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let counters = Arc::clone(&passed);
    let ended = TaskTracker::new().spawn(async move {
        let (mut socket, _) = front.accept().await.unwrap();
        let stream = open(&near, "far", target).await;
        splice(&mut socket, stream, Passed { up: &counters[0], down: &counters[1] }).await
    });
    let mut client = TcpStream::connect(address).await.unwrap();
    let mut said = vec![0; 1 << 20];
    pattern(3, &mut said);
    let (mut read, mut write) = client.split();
    let send = async {
        write.write_all(&said).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut heard = Vec::new();
    let receive = async { timeout(LONG, read.read_to_end(&mut heard)).await.unwrap().unwrap() };
    tokio::join!(send, receive);
    assert!(heard == said);
    timeout(LONG, ended).await.unwrap().unwrap().unwrap();
    assert!(passed.iter().all(|passed| passed.load(Ordering::Relaxed) == 1 << 20), "{passed:?}");
}

/// Writes until nothing more is taken.
async fn fill(socket: &mut TcpStream) {
    while timeout(Duration::from_millis(500), socket.write_all(&[0; 65_536])).await.is_ok_and(|wrote| wrote.is_ok()) {}
}

/// Waits until a socket that is not read is reset.
async fn reset(socket: &TcpStream) {
    timeout(LONG, socket.ready(tokio::io::Interest::ERROR)).await.expect("a reset").unwrap();
}

async fn without_streams(tunnels: [&Tunnel; 2]) {
    let wait = async {
        while tunnels.iter().any(|tunnel| tunnel.peers().borrow().views().iter().any(|view| view.streams > 0)) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LONG, wait).await.expect("streams end with their connections");
}

/// For what is looked at every 2 s, at each end in turn.
const SOON: Duration = Duration::from_secs(9);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_resets_is_missed_by_a_pod_that_does_not_read() {
    for transport in [Transport::Tcp, Transport::Quic] {
        let (near, far) = pair(transport).await;
        let (tell, mut told) = mpsc::unbounded_channel();
        let target = pod(move |socket| {
            let tell = tell.clone();
            async move {
                reset(&socket).await;
                tell.send(()).unwrap();
                Ok(())
            }
        })
        .await;
        let mut client = TcpStream::connect(through_tunnel(&near, target).await).await.unwrap();
        fill(&mut client).await;
        assert!(told.try_recv().is_err());
        client.set_zero_linger().unwrap();
        drop(client);
        timeout(SOON, told.recv()).await.unwrap_or_else(|_| panic!("{transport:?}")).unwrap();
        without_streams([&near, &far]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_resets_is_missed_by_a_client_that_does_not_read() {
    for transport in [Transport::Tcp, Transport::Quic] {
        let (near, far) = pair(transport).await;
        let (tell, mut told) = mpsc::unbounded_channel();
        let target = pod(move |mut socket| {
            let tell = tell.clone();
            async move {
                fill(&mut socket).await;
                socket.set_zero_linger()?;
                drop(socket);
                tell.send(()).unwrap();
                Ok(())
            }
        })
        .await;
        let client = TcpStream::connect(through_tunnel(&near, target).await).await.unwrap();
        timeout(LONG, told.recv()).await.unwrap().unwrap();
        timeout(SOON, reset(&client)).await.unwrap_or_else(|_| panic!("{transport:?}"));
        without_streams([&near, &far]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_resets_after_its_end_is_missed_by_a_pod_that_waits_for_room() {
    for transport in [Transport::Tcp, Transport::Quic] {
        let (near, far) = pair(transport).await;
        let (tell, mut told) = mpsc::unbounded_channel();
        let target = pod(move |mut socket| {
            let tell = tell.clone();
            async move {
                socket.read_to_end(&mut Vec::new()).await?;
                fill(&mut socket).await;
                tell.send("full").unwrap();
                reset(&socket).await;
                tell.send("reset").unwrap();
                Ok(())
            }
        })
        .await;
        let mut client = TcpStream::connect(through_tunnel(&near, target).await).await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(timeout(LONG, told.recv()).await.unwrap(), Some("full"));
        client.set_zero_linger().unwrap();
        drop(client);
        let seen = timeout(SOON, told.recv()).await.unwrap_or_else(|_| panic!("{transport:?}"));
        assert_eq!(seen, Some("reset"));
        without_streams([&near, &far]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_sent_to_its_end_arrives_however_late_it_is_read() {
    const BYTES: usize = 8 << 20;
    for transport in [Transport::Tcp, Transport::Quic] {
        let (near, far) = pair(transport).await;
        let target = pod(|mut socket| async move {
            socket.shutdown().await?;
            // Longer than what is not read is looked at, after which the client has gone.
            tokio::time::sleep(Duration::from_secs(5)).await;
            let mut heard = Vec::new();
            socket.read_to_end(&mut heard).await?;
            assert_eq!(heard.len(), BYTES);
            Ok(())
        })
        .await;
        let mut client = TcpStream::connect(through_tunnel(&near, target).await).await.unwrap();
        let mut end = Vec::new();
        timeout(LONG, client.read_to_end(&mut end)).await.unwrap().unwrap();
        client.write_all(&vec![7; BYTES]).await.unwrap();
        client.shutdown().await.unwrap();
        drop(client);
        without_streams([&near, &far]).await;
        assert_eq!(far.counters().received_bytes.get(), BYTES as u64, "{transport:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_serves_as_many_streams_as_it_takes_and_says_so() {
    let port = free_port();
    let _far = start(Settings { port, max_served: 3, ..settings("far") });
    let near = start(Settings { relays: vec![relay_at("far", port)], ..settings("near") });
    let target = echo().await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(open(&near, "far", target).await);
    }
    let error = near.open_tcp(&name("far"), target, LONG).await.err().unwrap();
    assert!(matches!(error, OpenError::Busy(_)), "{error}");
    say(&mut streams[0], b"hello").await;
    drop(streams);
    let again = async {
        while near.open_tcp(&name("far"), target, LONG).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LONG, again).await.unwrap();
}
