use std::time::Instant;

use super::*;

/// A policy that has the port 1 refused, and knows more Services than it may name.
struct Rules;

impl DialPolicy for Rules {
    fn decide(&self, from: &NodeName, _: Protocol, target: Target) -> Decision {
        match target {
            Target::Address(address) if address.port() == 1 => {
                Decision::NotAllowed { rule: format!("no business of {from}'s") }
            }
            Target::Address(address) => Decision::Allowed(address),
            Target::Node { port } => Decision::Allowed(SocketAddr::new([127, 0, 0, 1].into(), port)),
        }
    }

    fn grounds(&self, _: Protocol, _: Target) -> Grounds {
        let services = (0..9).map(|number| format!("default/web-{number}")).collect();
        Grounds { rule: "an endpoint".to_owned(), services }
    }
}

/// A node that knows one which follows [`Rules`], and that one.
fn ruled(change: impl FnOnce(Settings) -> Settings) -> (Tunnel, Tunnel) {
    let port = free_port();
    let far = change(Settings { port, ..settings("far") });
    let far = Tunnel::start_refusing(far, Arc::new(Rules), refuse_but_pods).unwrap();
    let near = start(Settings { relays: vec![relay_at("far", port)], ..settings("near") });
    (near, far)
}

async fn ask(near: &Tunnel, target: impl Into<Target>) -> Answer {
    near.ask(&name("far"), Protocol::Tcp, target, LONG).await.unwrap()
}

/// An address where nobody listens.
fn closed() -> SocketAddr {
    std::net::TcpListener::bind((PODS, 0)).unwrap().local_addr().unwrap()
}

/// The far side counts when it has answered, which the near side may hear first.
async fn until_counted(counter: &Counter, count: u64) {
    let counted = async {
        while counter.get() != count {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LONG, counted).await.unwrap_or_else(|_| panic!("{} instead of {count}", counter.get()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_is_answered_by_the_fate_of_a_connection_that_ends_at_once() {
    for transport in [Transport::Tcp, Transport::Quic] {
        let (near, far) = ruled(|far| Settings { transports: vec![transport], ..far });
        let (tell, mut told) = mpsc::unbounded_channel();
        let target = pod(move |mut socket| {
            let tell = tell.clone();
            async move {
                tell.send(socket.read(&mut [0]).await.unwrap()).unwrap();
                Ok(())
            }
        })
        .await;
        let answer = ask(&near, target).await;
        assert_eq!(answer.fate, Fate::Connected);
        assert!(answer.dial.unwrap() < Duration::from_secs(1), "{answer:?}");
        assert_eq!((&*answer.grounds.rule, answer.grounds.services.len()), ("an endpoint", 4));
        assert_eq!((answer.path.node, answer.path.transport), (name("far"), transport));
        assert_eq!(answer.path.remote.map(|remote| remote.ip()), Some(Ipv4Addr::LOCALHOST.into()));
        assert_eq!(timeout(LONG, told.recv()).await.unwrap(), Some(0), "the pod sees an end, and nothing else");
        until_counted(&far.counters().questions, 1).await;
        let (near, far) = (near.counters(), far.counters());
        assert_eq!((near.opened.get(), near.open_failures.get()), (0, 0), "no stream was wanted");
        assert_eq!((far.served.get(), far.serve_failures.get()), (0, 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_would_be_refused_is_said_by_its_rule_and_not_tried() {
    let (near, far) = ruled(|far| far);
    let at = |ip: &str, port| SocketAddr::new(ip.parse().unwrap(), port);
    let answer = ask(&near, at("127.77.0.1", 1)).await;
    assert_eq!(answer.fate, Fate::NotAllowed { rule: "no business of near's".to_owned() });
    assert_eq!((answer.grounds, answer.dial), (Grounds::default(), None), "nothing more is told");
    for (ip, word) in [
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("169.254.169.254", "metadata"),
        ("0.0.0.0", "unspecified"),
    ] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let answer = near.ask(&name("far"), protocol, at(ip, 80), LONG).await.unwrap();
            assert!(matches!(&answer.fate, Fate::NotAllowed { rule } if rule.contains(word)), "{ip}: {answer:?}");
            assert_eq!((answer.grounds, answer.dial), (Grounds::default(), None));
        }
    }
    // Also when it is the policy that leads there.
    let answer = ask(&near, Target::Node { port: 22 }).await;
    assert!(matches!(&answer.fate, Fate::NotAllowed { rule } if rule.contains("loopback")), "{answer:?}");
    until_counted(&far.counters().questions, 12).await;
    assert_eq!(far.counters().not_allowed.get(), 0, "nobody tried to get there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_that_refuse_and_pods_that_are_silent_are_told_apart() {
    let (near, _far) = ruled(|far| Settings { open_timeout: Duration::from_secs(1), ..far });
    let refusing = closed();
    let answer = ask(&near, refusing).await;
    assert!(matches!(&answer.fate, Fate::Refused(why) if why.contains(&refusing.to_string())), "{answer:?}");
    assert!(answer.dial.is_some());

    let (address, _full) = silence(PODS).await;
    let begin = Instant::now();
    let answer = ask(&near, address).await;
    assert!(matches!(&answer.fate, Fate::TimedOut(why) if why.contains(&address.to_string())), "{answer:?}");
    assert!(answer.dial.unwrap() >= Duration::from_millis(900), "{answer:?}");
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    // The far side gives up before the near side's patience is at its end, and can still say so.
    let brief = near.ask(&name("far"), Protocol::Tcp, address, Duration::from_millis(800)).await.unwrap();
    assert!(matches!(brief.fate, Fate::TimedOut(_)), "{brief:?}");

    // Of UDP there is nothing to try.
    let answer = near.ask(&name("far"), Protocol::Udp, refusing, LONG).await.unwrap();
    assert_eq!((answer.fate, answer.dial), (Fate::Allowed, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_cannot_be_asked_is_said_to_be_in_time() {
    let (near, far) = ruled(|far| far);
    let target = closed();
    let error = near.ask(&name("nobody"), Protocol::Tcp, target, LONG).await.unwrap_err();
    assert!(matches!(&error, OpenError::NoPath { .. }), "{error}");
    connected(&near, "far").await;
    far.stop().await;
    until(&near, "parted from far", |peers| peers.path(&name("far")).is_none()).await;
    let begin = Instant::now();
    let error = near.ask(&name("far"), Protocol::Tcp, target, LONG).await.unwrap_err();
    assert!(matches!(&error, OpenError::NoPath { .. }), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_node_is_waited_for_as_long_as_was_said() {
    // A policy that comes to no decision, as on a node that hangs.
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let held = std::sync::Mutex::new(held);
    let policy = move |_: &NodeName, _: Protocol, _: Target| {
        let _ = held.lock().map(|held| held.recv());
        Decision::NotAllowed { rule: String::new() }
    };
    let port = free_port();
    let far = Tunnel::start_refusing(Settings { port, ..settings("far") }, Arc::new(policy), refuse_but_pods).unwrap();
    let near = start(Settings { relays: vec![relay_at("far", port)], ..settings("near") });
    connected(&near, "far").await;
    let begin = Instant::now();
    let error = near.ask(&name("far"), Protocol::Tcp, closed(), Duration::from_millis(400)).await.unwrap_err();
    assert!(matches!(error, OpenError::TimedOut(_)), "{error}");
    assert!((400..800).contains(&begin.elapsed().as_millis()), "{:?}", begin.elapsed());
    drop(hold);
    drop(far);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn questions_take_places_of_streams_and_are_few_at_a_time() {
    let (near, _far) = ruled(|far| Settings { max_served: 1, ..far });
    let stream = open(&near, "far", echo().await).await;
    let answer = ask(&near, closed()).await;
    assert!(matches!(answer.fate, Fate::Busy(_)), "{answer:?}");
    drop(stream);

    let (near, _far) = ruled(|far| Settings { open_timeout: Duration::from_secs(2), ..far });
    connected(&near, "far").await;
    let (address, _full) = silence(PODS).await;
    let questions = futures::future::join_all((0..100).map(|_| ask(&near, address)));
    let fates: Vec<Fate> = timeout(LONG, questions).await.unwrap().into_iter().map(|answer| answer.fate).collect();
    let busy = fates.iter().filter(|fate| matches!(fate, Fate::Busy(_))).count();
    let tried = fates.iter().filter(|fate| matches!(fate, Fate::TimedOut(_))).count();
    assert_eq!((tried, busy), (64, 36), "{fates:?}");
}
