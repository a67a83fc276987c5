//! DNS as a whole, over real sockets on the loopback device.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream, UdpSocket},
    num::{NonZeroU16, NonZeroU32},
    sync::atomic::{AtomicUsize, Ordering},
};

use hickory_proto::{
    op::{Message, MessageType, ResponseCode},
    rr::{RData, Record, RecordType, rdata},
    serialize::binary::{BinDecodable, BinEncodable},
};

mod fuzz;

use super::{
    forward::{CacheSettings, TtlLimits, Upstreams},
    *,
};
use crate::{
    config::ServiceFilter,
    model::{
        Builder, Endpoint, EndpointPort, EndpointSet, Event, Object, Place, Protocol, Service, ServiceKind,
        ServicePort, Subset,
    },
};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// An upstream that knows `outside.example.com` and counts its questions; silent while told so.
struct Upstream {
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
    /// Those of the questions that had the DO bit.
    proven: Arc<AtomicUsize>,
    silent: Arc<std::sync::atomic::AtomicBool>,
}

impl Upstream {
    fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let upstream = Self {
            address: socket.local_addr().unwrap(),
            asked: Arc::default(),
            proven: Arc::default(),
            silent: Arc::default(),
        };
        let (asked, proven) = (Arc::clone(&upstream.asked), Arc::clone(&upstream.proven));
        let silent = Arc::clone(&upstream.silent);
        // Ends with the process.
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let Ok(mut message) = Message::from_bytes(&buffer[..length]) else { continue };
                let question = message.queries[0].clone();
                if question.name().is_root() || silent.load(Ordering::SeqCst) {
                    continue;
                }
                asked.fetch_add(1, Ordering::SeqCst);
                if message.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok) {
                    proven.fetch_add(1, Ordering::SeqCst);
                }
                message.metadata.message_type = MessageType::Response;
                message.metadata.recursion_available = true;
                message.edns = None;
                let name = |text: &str| text.parse::<hickory_proto::rr::Name>().unwrap();
                let address = |last| RData::A(rdata::A(Ipv4Addr::new(192, 0, 2, last)));
                let asked_for = question.name().to_string().to_ascii_lowercase();
                match (asked_for.as_str(), question.query_type()) {
                    ("outside.example.com.", RecordType::A) => {
                        let real = RData::CNAME(rdata::CNAME(name("real.example.com.")));
                        // One that nothing leads to.
                        message.add_answer(Record::from_rdata(name("stray.example.com."), 300, address(66)));
                        message.add_answer(Record::from_rdata(question.name().clone(), 300, real));
                        message.add_answer(Record::from_rdata(name("real.example.com."), 300, address(7)));
                    }
                    ("many.example.com.", RecordType::A) => {
                        for last in 0..80 {
                            message.add_answer(Record::from_rdata(question.name().clone(), 300, address(last)));
                        }
                    }
                    (known, _) => {
                        if known != "outside.example.com." {
                            message.metadata.response_code = ResponseCode::NXDomain;
                        }
                        let (mname, rname) = (name("ns.example.com."), name("mail.example.com."));
                        let soa = RData::SOA(rdata::SOA::new(mname, rname, 7, 1, 2, 3, 60));
                        message.authorities.push(Record::from_rdata(name("example.com."), 60, soa));
                    }
                }
                let _ = socket.send_to(&message.to_bytes().unwrap(), from);
            }
        });
        upstream
    }
}

struct World {
    dns: Dns,
    builder: Builder,
    publish: watch::Sender<Arc<ServiceTable>>,
    tasks: Tasks,
    upstream: Upstream,
}

impl World {
    async fn start() -> Self {
        Self::with(Limits { queries: None, forwarded: None, waiting: 100 }).await
    }

    async fn with(limits: Limits) -> Self {
        Self::with_cache(limits, CacheSettings::default()).await
    }

    async fn with_cache(limits: Limits, cache: CacheSettings) -> Self {
        let upstream = Upstream::start();
        let settings = Settings {
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            zone: Some(ZoneSettings::default()),
            forward: forward::Settings {
                upstreams: Upstreams::ClusterDns { auto_detect: false, servers: vec![upstream.address] },
                stub_domains: Vec::new(),
                own: Vec::new(),
                cache,
            },
            limits,
            closed_to: None,
        };
        let mut builder = Builder::new(ServiceFilter::UnlabelledOnly, "edge1");
        let web =
            Service { cluster_ips: vec!["10.96.0.1".parse().unwrap()], ..service("shop/web", ServiceKind::ClusterIp) };
        let alias = |name: &str, target: &str| Service {
            external_name: Some(target.into()),
            ..service(name, ServiceKind::ExternalName)
        };
        let services = [
            web,
            service("shop/db", ServiceKind::Headless),
            alias("shop/outside", "outside.example.com"),
            alias("shop/missing", "missing.example.com"),
            alias("shop/many", "many.example.com"),
            alias("shop/inside", "web.shop.svc.cluster.local"),
            alias("shop/loop", "loop.shop.svc.cluster.local"),
        ];
        for service in services {
            builder.apply(Event::Apply(Object::Service(service.into())));
        }
        let endpoints = (0..100).map(|last| Endpoint {
            address: Ipv4Addr::new(10, 244, 1, last).into(),
            ready: true,
            serving: true,
            terminating: false,
            place: Arc::new(Place::default()),
        });
        let port = EndpointPort { name: "sql".into(), protocol: Protocol::Tcp, port: NonZeroU16::new(5432).unwrap() };
        let subset = Subset { ports: vec![port], endpoints: endpoints.collect() };
        let set = EndpointSet {
            name: "shop/db-1".parse().unwrap(),
            service: "shop/db".parse().unwrap(),
            subsets: vec![subset],
        };
        builder.apply(Event::Apply(Object::EndpointSlice(set.into())));
        let (publish, tables) = watch::channel(builder.build().unwrap_or_default());
        let tasks = Tasks::default();
        let dns = Dns::start(settings, tables, &Conditions::default(), &tasks).unwrap();
        let world = Self { dns, builder, publish, tasks, upstream };
        eventually("listening", || world.dns.status().listeners.iter().filter(|one| one.listening).count() == 2).await;
        eventually("an upstream", || !world.dns.status().forwarder.upstreams.is_empty()).await;
        world
    }

    /// The source has delivered everything.
    async fn sync(&mut self) {
        self.builder.apply(Event::Synced);
        let _ = self.publish.send(self.builder.build().unwrap());
        let dns = self.dns.clone();
        let known = || {
            let zone = dns.core.zone().unwrap();
            let name: wire::Name = "nothing.shop.svc.cluster.local".parse().unwrap();
            matches!(zone.find(name.as_wire(), 1), zone::Found::NoSuchName)
        };
        eventually("the complete table", known).await;
    }

    fn at(&self, transport: &str) -> SocketAddr {
        self.dns.status().listeners.iter().find(|one| one.transport == transport).unwrap().address
    }

    async fn udp(&self, message: Vec<u8>) -> Option<Vec<u8>> {
        let to = self.at("UDP");
        let asked = tokio::task::spawn_blocking(move || {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.send_to(&message, to).unwrap();
            let mut buffer = vec![0; 65_535];
            let (length, from) = socket.recv_from(&mut buffer).ok()?;
            assert_eq!(from, to, "answers come from where the question went");
            Some(buffer[..length].to_vec())
        });
        asked.await.unwrap()
    }

    /// Asks by UDP.
    async fn ask(&self, name: &str, kind: RecordType) -> Message {
        Message::from_bytes(&self.udp(question(7, name, kind)).await.unwrap()).unwrap()
    }

    async fn stop(self) {
        assert!(self.tasks.drain(PATIENCE).await, "threads and tasks end");
    }
}

fn service(name: &str, kind: ServiceKind) -> Service {
    let port = ServicePort {
        name: "sql".into(),
        protocol: Protocol::Tcp,
        port: NonZeroU16::new(5432).unwrap(),
        node_port: None,
    };
    Service { ports: vec![port], ..Service::new(name.parse().unwrap(), kind) }
}

fn question(id: u16, name: &str, kind: RecordType) -> Vec<u8> {
    let name: wire::Name = name.parse().unwrap();
    let mut message = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    message[..2].copy_from_slice(&id.to_be_bytes());
    message.extend_from_slice(name.as_wire());
    message.extend_from_slice(&u16::from(kind).to_be_bytes());
    message.extend_from_slice(&[0, 1]);
    message
}

/// The same by a client that speaks EDNS.
fn with_edns(mut question: Vec<u8>) -> Vec<u8> {
    question[11] = 1;
    question.extend_from_slice(&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
    question
}

fn framed(messages: &[Vec<u8>]) -> Vec<u8> {
    let frame = |message: &Vec<u8>| [&u16::try_from(message.len()).unwrap().to_be_bytes()[..], message].concat();
    messages.iter().flat_map(frame).collect()
}

fn read_framed(stream: &mut TcpStream) -> Option<Message> {
    let mut head = [0; 2];
    stream.read_exact(&mut head).ok()?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(head))];
    stream.read_exact(&mut message).ok()?;
    Some(Message::from_bytes(&message).unwrap())
}

fn shown(message: &Message) -> Vec<String> {
    message.answers.iter().map(|record| format!("{} {} {}", record.name, record.record_type(), record.data)).collect()
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "{what} did not come about");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn names_of_the_cluster_are_answered_with_authority_and_the_case_of_the_question() {
    let mut world = World::start().await;
    world.sync().await;
    let found = world.ask("wEb.shop.SVC.cluster.local", RecordType::A).await;
    assert!(found.metadata.authoritative && found.metadata.recursion_available && found.metadata.recursion_desired);
    assert_eq!(shown(&found), ["wEb.shop.SVC.cluster.local. A 10.96.0.1"]);
    assert_eq!(found.answers[0].ttl, 30);

    for (name, kind, code) in [
        ("web.shop.svc.cluster.local.shop.svc.cluster.local", RecordType::A, ResponseCode::NXDomain),
        ("web.shop.svc.cluster.local", RecordType::AAAA, ResponseCode::NoError),
    ] {
        let denied = world.ask(name, kind).await;
        assert_eq!((denied.metadata.response_code, denied.answers.len()), (code, 0), "{name}");
        let [soa] = denied.authorities.as_slice() else { panic!("{denied:?}") };
        let RData::SOA(data) = &soa.data else { panic!("{soa:?}") };
        assert_eq!((soa.name.to_string().as_str(), soa.ttl, data.minimum), ("cluster.local.", 5, 5));
    }

    let any = world.ask("web.shop.svc.cluster.local", RecordType::ANY).await;
    assert_eq!(shown(&any), ["web.shop.svc.cluster.local. HINFO RFC8482 "]);
    assert_eq!(world.upstream.asked.load(Ordering::SeqCst), 0);
    let counted = world.dns.stats().queries;
    assert!(counted.contains(&(["A", "cluster", "answer"], 1)), "{counted:?}");
    assert!(counted.contains(&(["AAAA", "cluster", "nodata"], 1)), "{counted:?}");
    world.stop().await;
}

#[tokio::test]
async fn before_the_source_has_delivered_everything_what_is_known_is_answered_and_the_rest_fails() {
    let world = World::start().await;
    assert_eq!(shown(&world.ask("web.shop.svc.cluster.local", RecordType::A).await).len(), 1);
    let unknown = world.ask("other.shop.svc.cluster.local", RecordType::A).await;
    assert_eq!(unknown.metadata.response_code, ResponseCode::ServFail);
    world.stop().await;
}

#[tokio::test]
async fn a_long_answer_is_truncated_by_udp_whole_by_tcp_and_begins_with_another_each_time() {
    let world = World::start().await;
    let name = "db.shop.svc.cluster.local";
    let mut first = std::collections::BTreeSet::new();
    // Each thread has turns of its own.
    for id in 0..3 * u16::try_from(serve::threads()).unwrap() {
        let cut = Message::from_bytes(&world.udp(question(id, name, RecordType::A)).await.unwrap()).unwrap();
        assert!(cut.metadata.truncation && cut.answers.len() == 29, "{} answers", cut.answers.len());
        first.insert(cut.answers[0].data.to_string());
    }
    assert!(first.len() >= 3, "{first:?}");
    let at = world.at("TCP");
    let whole = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(at).unwrap();
        stream.write_all(&framed(&[question(1, name, RecordType::A)])).unwrap();
        read_framed(&mut stream).unwrap()
    });
    let whole = whole.await.unwrap();
    assert!(!whole.metadata.truncation && whole.answers.len() == 100);
    world.stop().await;
}

#[tokio::test]
async fn an_external_name_is_followed_to_its_addresses_inside_and_outside() {
    let mut world = World::start().await;
    world.sync().await;
    let alias = "outside.shop.svc.cluster.local. CNAME outside.example.com.";
    for _ in 0..3 {
        let outside = world.ask("outside.shop.svc.cluster.local", RecordType::A).await;
        let real = "outside.example.com. CNAME real.example.com.";
        assert_eq!(shown(&outside), [alias, real, "real.example.com. A 192.0.2.7"]);
    }
    assert_eq!(world.upstream.asked.load(Ordering::SeqCst), 1, "the others are from the cache");
    let without = world.ask("outside.shop.svc.cluster.local", RecordType::AAAA).await;
    assert_eq!((without.metadata.response_code, shown(&without)), (ResponseCode::NoError, vec![alias.to_owned()]));
    let soa = "example.com. 60 IN SOA ns.example.com. mail.example.com. 7 1 2 3 60";
    assert_eq!(
        without.authorities.iter().map(ToString::to_string).collect::<Vec<_>>(),
        [soa],
        "so it may be remembered"
    );
    let missing = world.ask("missing.shop.svc.cluster.local", RecordType::A).await;
    assert_eq!((missing.metadata.response_code, missing.authorities.len()), (ResponseCode::NXDomain, 1));
    assert_eq!(shown(&missing), ["missing.shop.svc.cluster.local. CNAME missing.example.com."]);
    let many = world.ask("many.shop.svc.cluster.local", RecordType::A).await;
    assert!(many.metadata.truncation, "no one is to take a part for the whole");
    assert_eq!(shown(&world.ask("outside.shop.svc.cluster.local", RecordType::TXT).await), [alias]);
    let inside = world.ask("inside.shop.svc.cluster.local", RecordType::A).await;
    let expected =
        ["inside.shop.svc.cluster.local. CNAME web.shop.svc.cluster.local.", "web.shop.svc.cluster.local. A 10.96.0.1"];
    assert_eq!(shown(&inside), expected);
    let endless = world.ask("loop.shop.svc.cluster.local", RecordType::A).await;
    assert_eq!(endless.metadata.response_code, ResponseCode::ServFail);
    world.stop().await;
}

#[tokio::test]
async fn an_alias_of_a_name_that_is_answered_stale_or_not_at_all_says_so_too() {
    let limits = Limits { queries: None, forwarded: None, waiting: 100 };
    let moment = Duration::from_secs(1);
    let ttl = TtlLimits { floor: moment, ceiling: moment, negative_ceiling: moment };
    let mut world = World::with_cache(limits, CacheSettings { ttl, ..CacheSettings::default() }).await;
    world.sync().await;
    let ask = async |name: &str| world.udp(with_edns(question(7, name, RecordType::A))).await.unwrap();
    let extended = |response: &[u8], code: u8| response.ends_with(&[0, 6, 0, 15, 0, 2, 0, code]);
    let fresh = ask("outside.shop.svc.cluster.local").await;
    assert!(Message::from_bytes(&fresh).unwrap().answers.len() == 3 && !extended(&fresh, 3));
    world.upstream.silent.store(true, Ordering::SeqCst);
    let end = Instant::now() + PATIENCE;
    loop {
        let response = ask("outside.shop.svc.cluster.local").await;
        assert_eq!(Message::from_bytes(&response).unwrap().answers.len(), 3);
        if extended(&response, 3) {
            break;
        }
        assert!(Instant::now() < end, "no stale answer");
    }
    let failed = ask("missing.shop.svc.cluster.local").await;
    assert_eq!(Message::from_bytes(&failed).unwrap().metadata.response_code, ResponseCode::ServFail);
    assert!(extended(&failed, 22), "{failed:?}");
    let without_edns = world.ask("outside.shop.svc.cluster.local", RecordType::A).await;
    assert!(without_edns.answers.len() == 3 && without_edns.edns.is_none());
    world.stop().await;
}

#[tokio::test]
async fn silent_upstreams_and_too_many_questions_for_them_leave_the_cluster_alone() {
    // A quarter for one client.
    let limits = Limits { queries: None, forwarded: None, waiting: 8 };
    let mut world = World::with(limits).await;
    world.sync().await;
    world.upstream.silent.store(true, Ordering::SeqCst);
    let (at, socket) = (world.at("UDP"), UdpSocket::bind("127.0.0.1:0").unwrap());
    for id in 0..5 {
        socket.send_to(&question(id, &format!("host{id}.example.com"), RecordType::A), at).unwrap();
    }
    // Two wait; the others know at once that it is of no use.
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let failed = tokio::task::spawn_blocking(move || {
        let mut buffer = [0; 512];
        (0..3)
            .map(|_| {
                let length = socket.recv(&mut buffer).unwrap();
                Message::from_bytes(&buffer[..length]).unwrap().metadata.response_code
            })
            .collect::<Vec<_>>()
    });
    let asked = Instant::now();
    assert_eq!(shown(&world.ask("web.shop.svc.cluster.local", RecordType::A).await).len(), 1);
    assert!(asked.elapsed() < Duration::from_secs(1));
    assert_eq!(failed.await.unwrap(), [ResponseCode::ServFail; 3]);
    world.stop().await;
}

#[tokio::test]
async fn a_client_beyond_its_rate_is_refused_forwarding_and_in_the_end_everything() {
    let limits = Limits { queries: NonZeroU32::new(20), forwarded: NonZeroU32::new(1), waiting: 100 };
    let mut world = World::with(limits).await;
    world.sync().await;
    let mut codes = Vec::new();
    for number in 0..6 {
        codes.push(world.ask(&format!("host{number}.example.com"), RecordType::A).await.metadata.response_code);
    }
    assert!(codes.contains(&ResponseCode::NXDomain) && codes.contains(&ResponseCode::Refused), "{codes:?}");
    let (at, socket) = (world.at("UDP"), UdpSocket::bind("127.0.0.1:0").unwrap());
    for id in 0..200 {
        socket.send_to(&question(id, "web.shop.svc.cluster.local", RecordType::A), at).unwrap();
    }
    let limited = || {
        let queries = world.dns.stats().queries;
        queries.iter().any(|(labels, count)| labels == &["other", "none", "limited"] && *count > 100)
    };
    eventually("refusals", limited).await;
    world.stop().await;
}

#[tokio::test]
async fn queries_on_one_connection_are_answered_as_soon_as_each_can_be() {
    let mut world = World::start().await;
    world.sync().await;
    world.upstream.silent.store(true, Ordering::SeqCst);
    let at = world.at("TCP");
    let answers = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(at).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let queries = framed(&[
            question(1, "slow.example.com", RecordType::A),
            question(2, "web.shop.svc.cluster.local", RecordType::A),
            question(3, "db.shop.svc.cluster.local", RecordType::A),
        ]);
        // In pieces, as networks may have them.
        for piece in queries.chunks(7) {
            stream.write_all(piece).unwrap();
        }
        // No more to ask, yet answers are wanted.
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answers = Vec::new();
        while let Some(answer) = read_framed(&mut stream) {
            answers.push((answer.metadata.id, answer.metadata.response_code));
        }
        answers
    });
    let expected = [(2, ResponseCode::NoError), (3, ResponseCode::NoError), (1, ResponseCode::ServFail)];
    assert_eq!(answers.await.unwrap(), expected);
    world.stop().await;
}

#[tokio::test]
async fn names_of_the_cluster_are_answered_behind_any_number_of_questions_that_wait() {
    // 40 for one client.
    let mut world = World::with(Limits { queries: None, forwarded: None, waiting: 160 }).await;
    world.sync().await;
    world.upstream.silent.store(true, Ordering::SeqCst);
    let at = world.at("TCP");
    let answers = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(at).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let slow = (0..64).map(|id| question(id, &format!("slow{id}.example.com"), RecordType::A));
        stream.write_all(&framed(&slow.collect::<Vec<_>>())).unwrap();
        // Those without a place are answered; then the others are waiting, and what comes is read all the same.
        let mut answers: Vec<_> = (0..24).map(|_| read_framed(&mut stream).unwrap().metadata).collect();
        stream.write_all(&framed(&[question(1000, "web.shop.svc.cluster.local", RecordType::A)])).unwrap();
        answers.extend((0..41).map(|_| read_framed(&mut stream).unwrap().metadata));
        let answers = answers.into_iter();
        answers.map(|answer| (answer.id, answer.response_code)).collect::<Vec<_>>()
    });
    let answers = answers.await.unwrap();
    let place = answers.iter().position(|(id, _)| *id == 1000).unwrap();
    assert_eq!(place, 24, "those beyond the limit are told at once, and the others are not waited for");
    assert_eq!(answers[place].1, ResponseCode::NoError);
    assert!(answers.iter().filter(|(id, _)| *id < 1000).all(|(_, code)| *code == ResponseCode::ServFail));
    world.stop().await;
}

#[tokio::test]
async fn a_query_that_is_none_or_too_long_ends_nothing_but_its_own_connection() {
    let world = World::start().await;
    let at = world.at("TCP");
    let ended = tokio::task::spawn_blocking(move || {
        let mut long = TcpStream::connect(at).unwrap();
        long.set_read_timeout(Some(PATIENCE)).unwrap();
        long.write_all(&[0xff, 0xff, 1, 2, 3]).unwrap();
        let closed = read_framed(&mut long).is_none();
        let mut other = TcpStream::connect(at).unwrap();
        other.set_read_timeout(Some(PATIENCE)).unwrap();
        let queries = framed(&[vec![1, 2, 3], question(9, "web.shop.svc.cluster.local", RecordType::A)]);
        other.write_all(&queries).unwrap();
        (closed, read_framed(&mut other).unwrap().metadata.id)
    });
    assert_eq!(ended.await.unwrap(), (true, 9));
    let (socket, udp) = (UdpSocket::bind("127.0.0.1:0").unwrap(), world.at("UDP"));
    for scrap in [&[][..], &[0; 11], &[0xff; 2048], &[0x80; 100]] {
        socket.send_to(scrap, udp).unwrap();
    }
    assert_eq!(shown(&world.ask("web.shop.svc.cluster.local", RecordType::A).await).len(), 1);
    world.stop().await;
}

#[tokio::test]
async fn a_name_is_explained_with_its_answer() {
    let mut world = World::start().await;
    world.sync().await;
    let name = |text: &str| text.parse::<wire::Name>().unwrap();
    let web = world.dns.explain(&name("WEB.shop.svc.cluster.local"), wire::rtype::A, false).await;
    assert_eq!(web.answers, ["web.shop.svc.cluster.local. 30 A 10.96.0.1"]);
    let zone = web.zone.unwrap();
    assert_eq!((zone.subject.as_str(), zone.outcome.as_str()), ("service", "answers"));
    assert_eq!(zone.services, ["shop/web"]);

    let db = world.dns.explain(&name("db.shop.svc.cluster.local"), wire::rtype::A, false).await;
    let endpoints = db.zone.unwrap().endpoints;
    assert!(endpoints.len() == 100 && endpoints.iter().all(|one| one.included && one.reason == "ready"));

    let alias = world.dns.explain(&name("outside.shop.svc.cluster.local"), wire::rtype::A, false).await;
    assert_eq!((alias.alias.as_deref(), alias.answers.len()), (Some("outside.example.com."), 3));
    assert_eq!(alias.forwarded.unwrap().from, world.upstream.address.to_string());
    let again = world.dns.explain(&name("outside.example.com"), wire::rtype::A, false).await;
    let forwarded = again.forwarded.unwrap();
    assert_eq!((forwarded.from.as_str(), forwarded.cached.is_some(), forwarded.stale), ("cache", true, false));
    let refused = world.dns.explain(&name("cluster.local"), 252, false).await;
    assert_eq!((refused.rcode.as_str(), refused.answers.len()), ("REFUSED", 0));

    // One that wants DNSSEC's records has answers of its own.
    let proven = world.dns.explain(&name("outside.example.com"), wire::rtype::A, true).await;
    assert_eq!(proven.forwarded.unwrap().from, world.upstream.address.to_string());
    assert_eq!(world.upstream.proven.load(Ordering::SeqCst), 1);
    world.upstream.silent.store(true, Ordering::SeqCst);
    let failed = world.dns.explain(&name("other.example.com"), wire::rtype::A, false).await;
    assert_eq!((failed.rcode.as_str(), failed.extended.as_deref()), ("SERVFAIL", Some("No Reachable Authority")));
    world.stop().await;
}
