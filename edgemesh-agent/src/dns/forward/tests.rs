use std::{fs, path::Path};

use tokio::time::{sleep, timeout};

use super::{
    fake::{A, FakeUpstream, Manner, query, question},
    *,
};
use crate::model::{Builder, Event, NamespacedName, Object, Service, ServiceKind};

/// A forwarder, and what keeps it running.
struct Lab {
    forwarder: Forwarder,
    conditions: Conditions,
    tasks: Tasks,
    tables: watch::Sender<Arc<ServiceTable>>,
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.tasks.stopping().cancel();
    }
}

impl Lab {
    fn new(tasks: Tasks, settings: Settings) -> Self {
        Self::with_table(tasks, settings, ServiceTable::default())
    }

    fn with_table(tasks: Tasks, settings: Settings, table: ServiceTable) -> Self {
        let conditions = Conditions::default();
        let (tables, followed) = watch::channel(Arc::new(table));
        let forwarder = Forwarder::start(settings, followed, conditions.clone(), &tasks);
        Self { forwarder, conditions, tasks, tables }
    }

    /// With so many upstreams.
    async fn with_upstreams<const N: usize>() -> (Self, [FakeUpstream; N]) {
        let tasks = Tasks::default();
        let mut upstreams = Vec::new();
        for _ in 0..N {
            upstreams.push(FakeUpstream::start(&tasks).await);
        }
        let servers = upstreams.iter().map(|upstream| upstream.address).collect();
        (Self::new(tasks, settings(servers)), upstreams.try_into().unwrap())
    }

    /// As a server would.
    async fn ask(&self, name: &str) -> Reply {
        let (question, now) = (question(name, A), Instant::now());
        match self.forwarder.cached(&question, now) {
            Some(reply) => reply,
            None => self.forwarder.resolve(&question, now).await,
        }
    }

    /// The address in the only record of the answer.
    async fn address(&self, name: &str) -> [u8; 4] {
        address(&self.ask(name).await, name)
    }

    fn reasons(&self) -> Vec<&'static str> {
        self.conditions.list().iter().map(|condition| condition.reason).collect()
    }

    fn upstream(&self, address: SocketAddr) -> UpstreamStatus {
        self.forwarder.status().upstreams.into_iter().find(|upstream| upstream.address == address).unwrap()
    }
}

fn settings(servers: Vec<SocketAddr>) -> Settings {
    let ttl = TtlLimits { floor: Duration::from_secs(1), ..TtlLimits::default() };
    Settings {
        upstreams: Upstreams::ClusterDns { auto_detect: false, servers },
        stub_domains: Vec::new(),
        own: vec!["127.0.0.1:53".parse().unwrap()],
        cache: CacheSettings { ttl, ..CacheSettings::default() },
    }
}

fn bytes(reply: &Reply, name: &str, limit: usize, now: Instant) -> Vec<u8> {
    let (_, question) = query(0, name, A);
    let to = ClientView {
        id: 0x1234,
        question: &question,
        recursion_desired: true,
        checking_disabled: false,
        edns: false,
        dnssec_ok: false,
        limit,
    };
    let mut out = vec![0; 65535];
    let length = reply.write(&to, now, &mut out);
    out.truncate(length);
    out
}

fn address(reply: &Reply, name: &str) -> [u8; 4] {
    let bytes = bytes(reply, name, 65535, Instant::now());
    assert_eq!(bytes[3] & 0x0f, 0, "{reply:?}");
    *bytes.last_chunk().unwrap()
}

async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let wait = async {
        while !condition().await {
            sleep(Duration::from_millis(10)).await
        }
    };
    timeout(Duration::from_secs(10), wait).await.unwrap_or_else(|_| panic!("not within 10 s: {what}"));
}

#[tokio::test]
async fn an_answer_is_asked_for_once_and_then_given_with_its_ttl_running_down() {
    let (lab, [upstream]) = Lab::with_upstreams().await;
    let reply = lab.ask("www.example").await;
    assert_eq!((reply.source(), reply.stale(), reply.rcode()), (Source::Upstream(upstream.address), false, 0));
    assert_eq!(address(&reply, "www.example"), [192, 0, 2, 1]);
    let later = Instant::now() + Duration::from_secs(20);
    let cached = lab.forwarder.cached(&question("www.example", A), later).unwrap();
    assert_eq!((cached.source(), cached.stale()), (Source::Cache, false));
    let bytes = bytes(&cached, "www.example", 512, later);
    let ttl = u32::from_be_bytes(*bytes[..bytes.len() - 6].last_chunk().unwrap());
    assert!((39..=40).contains(&ttl), "{ttl}");
    assert!(lab.forwarder.cached(&question("www.example", 28), later).is_none(), "another type");
    assert_eq!(lab.ask("nxdomain.example").await.rcode(), 3);
    assert_eq!(lab.ask("nxdomain.example").await.source(), Source::Cache);
    assert_eq!(upstream.seen(), (2, 0));
    let explained = lab.forwarder.explain(&question("www.example", A), later);
    let cached = explained.cached.unwrap();
    assert_eq!((&*explained.domain, cached.rcode, cached.answers, cached.expired), (".", 0, 1, false));
    assert_eq!(explained.upstreams[0].address, upstream.address);
    assert!(lab.tasks.drain(Duration::from_secs(5)).await, "all tasks end when told to");
}

#[tokio::test]
async fn questions_asked_at_the_same_time_are_asked_once() {
    let (lab, [upstream]) = Lab::with_upstreams().await;
    upstream.set(Manner::Slow(Duration::from_millis(200)));
    let name = question("www.example", A);
    let all = (0..100).map(|_| lab.forwarder.resolve(&name, Instant::now()));
    let replies = futures::future::join_all(all).await;
    assert!(replies.iter().all(|reply| address(reply, "www.example") == [192, 0, 2, 1]));
    assert_eq!(upstream.seen(), (1, 0));
}

#[tokio::test]
async fn what_is_too_long_for_udp_is_asked_by_tcp() {
    let (lab, [upstream]) = Lab::with_upstreams().await;
    upstream.set(Manner::Truncate);
    let reply = lab.ask("long.example").await;
    assert_eq!(upstream.seen(), (1, 1));
    let whole = bytes(&reply, "long.example", 65535, Instant::now());
    assert_eq!((whole[2] & 2, &whole[6..8]), (0, &[0, 200][..]));
    let cut = bytes(&reply, "long.example", 512, Instant::now());
    assert_eq!((cut[2] & 2, cut.len() <= 512), (2, true));
}

#[tokio::test]
async fn nobody_but_the_upstream_answers_and_only_what_was_asked() {
    let (lab, [upstream]) = Lab::with_upstreams().await;
    upstream.set(Manner::Stray);
    assert_eq!(lab.address("stray.example").await, [192, 0, 2, 1]);
    assert_eq!(lab.upstream(upstream.address).rejected, 2);
    upstream.set(Manner::Forged);
    assert_eq!(lab.address("forged.example").await, [192, 0, 2, 1]);
    assert_eq!(upstream.seen(), (2, 0));
    upstream.set(Manner::Guessing);
    assert_eq!(lab.address("guessed.example").await, [192, 0, 2, 1]);
    assert_eq!(upstream.seen(), (3, 1), "where somebody guesses, TCP leaves nothing to guess");
}

#[tokio::test]
async fn upstreams_that_are_set_in_their_ways_are_understood() {
    let (lab, [upstream]) = Lab::with_upstreams().await;
    // By chance, one in 2^18 has no capital letter.
    let [first, second, third] =
        ["abcdefghijklmnopqr.example", "bcdefghijklmnopqrs.example", "cdefghijklmnopqrst.example"];
    upstream.set(Manner::LowerCaseByUdp);
    assert_eq!(lab.address(first).await, [192, 0, 2, 1]);
    assert_eq!(lab.address(second).await, [192, 0, 2, 1]);
    assert_eq!(upstream.seen(), (2, 2), "a packet may be forged, and TCP shows that it was");
    upstream.set(Manner::LowerCase);
    assert_eq!(lab.address(third).await, [192, 0, 2, 1]);
    assert_eq!(upstream.seen(), (3, 4));
    assert_eq!(lab.address("other.example").await, [192, 0, 2, 1]);
    assert_eq!(upstream.seen(), (4, 4), "its ways are remembered");
    upstream.set(Manner::NoEdns);
    assert_eq!(lab.address("plain.example").await, [192, 0, 2, 1]);
    assert_eq!(lab.address("again.example").await, [192, 0, 2, 1]);
    assert_eq!(upstream.seen(), (7, 4));
}

#[tokio::test]
async fn an_upstream_without_tcp_is_not_silent_for_that() {
    let (lab, [upstream]) = Lab::with_upstreams().await;
    upstream.set(Manner::TruncateOnly);
    assert_eq!(lab.ask("long.example").await.rcode(), 2);
    assert_eq!(upstream.seen(), (1, 1));
    assert!(lab.upstream(upstream.address).healthy, "it has answered");
}

#[tokio::test]
async fn one_hard_name_makes_no_upstream_silent_for_long() {
    let (lab, [upstream]) = Lab::with_upstreams().await;
    upstream.set(Manner::Hard);
    lab.address("easy.example").await;
    let mut unhealthy = 0;
    let watch = async {
        loop {
            assert!(lab.reasons().is_empty());
            unhealthy += usize::from(!lab.upstream(upstream.address).healthy);
            sleep(Duration::from_millis(20)).await;
        }
    };
    let asked = async { [lab.ask("hard.example").await, lab.ask("hard.example").await] };
    let replies = tokio::select! {
        replies = asked => replies,
        () = watch => unreachable!("it goes on"),
    };
    for reply in replies {
        assert_eq!((reply.rcode(), reply.source()), (2, Source::Upstream(upstream.address)));
    }
    assert!(unhealthy < 75, "{unhealthy} times 20 ms of 3 s");
    assert!(lab.upstream(upstream.address).healthy);
}

#[tokio::test]
async fn an_answer_that_comes_too_late_is_for_the_next_who_asks() {
    let (lab, [upstream]) = Lab::with_upstreams().await;
    upstream.set(Manner::Slow(DEADLINE + Duration::from_millis(300)));
    assert_eq!(lab.ask("slow.example").await.rcode(), 2);
    let slow = question("slow.example", A);
    let known = async || lab.forwarder.cached(&slow, Instant::now()).is_some_and(|reply| reply.rcode() == 0);
    eventually("it is kept", known).await;
}

#[tokio::test]
async fn another_upstream_answers_at_once_for_one_that_cannot() {
    for manner in [Manner::Code(2), Manner::Code(5), Manner::Code(4), Manner::Broken] {
        let (lab, [first, second]) = Lab::with_upstreams().await;
        first.set(manner);
        let begin = Instant::now();
        let reply = lab.ask("www.example").await;
        assert_eq!(reply.source(), Source::Upstream(second.address), "{manner:?}");
        assert!(begin.elapsed() < Duration::from_millis(190), "{manner:?}: {:?}", begin.elapsed());
        assert_eq!(lab.upstream(first.address).refused, 1, "{manner:?}");
        assert!(lab.upstream(first.address).healthy, "it answers");
    }
}

#[tokio::test]
async fn an_upstream_that_is_slow_or_silent_is_not_waited_for() {
    for manner in [Manner::Silent, Manner::Noise] {
        let (lab, [first, second]) = Lab::with_upstreams().await;
        first.set(manner);
        let begin = Instant::now();
        assert_eq!(lab.ask("www.example").await.source(), Source::Upstream(second.address));
        assert!(begin.elapsed() < Duration::from_millis(600), "{:?}", begin.elapsed());
        eventually("it is noted", async || !lab.upstream(first.address).healthy).await;
        let seen = second.seen().0;
        let begin = Instant::now();
        assert_eq!(lab.ask("other.example").await.source(), Source::Upstream(second.address));
        assert!(begin.elapsed() < Duration::from_millis(150), "{:?}", begin.elapsed());
        assert_eq!(second.seen().0, seen + 1, "it is asked first now");
        first.set(Manner::Answer);
        eventually("it is back", async || lab.upstream(first.address).healthy).await;
    }
}

/// Runs in a network namespace of its own, where nothing but the loopback device is.
fn without_a_network(test: impl AsyncFnOnce() + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "a network namespace needs root");
        return;
    }
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        assert!(up.success());
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
    });
    thread.join().unwrap();
}

#[test]
fn an_upstream_that_there_is_no_route_to_keeps_nobody_waiting() {
    without_a_network(async || {
        let nowhere: SocketAddr = "192.0.2.53:53".parse().unwrap();
        let tasks = Tasks::default();
        let near = FakeUpstream::start(&tasks).await;
        let lab = Lab::new(tasks, settings(vec![nowhere, near.address]));
        let begin = Instant::now();
        assert_eq!(lab.address("www.example").await, [192, 0, 2, 1]);
        assert!(begin.elapsed() < Duration::from_millis(150), "the next is asked at once: {:?}", begin.elapsed());
        assert!(!lab.upstream(nowhere).healthy && lab.upstream(near.address).healthy);

        let cut_off = Lab::new(Tasks::default(), settings(vec![nowhere]));
        let begin = Instant::now();
        let failed = cut_off.ask("www.example").await;
        assert_eq!((failed.rcode(), failed.source()), (2, Source::None));
        assert!(begin.elapsed() < Duration::from_millis(150), "{:?}", begin.elapsed());
        eventually("told", async || cut_off.reasons() == [probe::UNREACHABLE]).await;
        // The link is back.
        let back = std::process::Command::new("ip").args(["address", "add", "192.0.2.53/32", "dev", "lo"]).status();
        assert!(back.unwrap().success());
        let socket = tokio::net::UdpSocket::bind(nowhere).await.unwrap();
        let answer = async {
            let mut buffer = [0; 512];
            loop {
                let (length, client) = socket.recv_from(&mut buffer).await.unwrap();
                let records = [fake::record(A, 60, vec![192, 0, 2, 9])];
                let answer = fake::respond(&buffer[..length], 0, [&records, &[], &[]]);
                socket.send_to(&answer, client).await.unwrap();
            }
        };
        let asked = eventually("answered", async || cut_off.ask("www.example").await.rcode() == 0);
        tokio::select! {
            () = answer => {}
            () = asked => {}
        }
        assert_eq!(cut_off.address("www.example").await, [192, 0, 2, 9]);
    });
}

#[tokio::test]
async fn an_excuse_is_passed_on_and_remembered_for_a_moment() {
    let (lab, [upstream]) = Lab::with_upstreams().await;
    upstream.set(Manner::Code(5));
    for _ in 0..2 {
        let reply = lab.ask("www.example").await;
        assert_eq!((reply.rcode(), reply.source()), (5, Source::Upstream(upstream.address)));
    }
    assert_eq!(upstream.seen(), (1, 0));
    let later = Instant::now() + Duration::from_millis(2100);
    assert!(lab.forwarder.cached(&question("www.example", A), later).is_none());
}

#[tokio::test]
async fn names_that_are_known_outlive_their_upstream_and_are_fresh_again_soon() {
    let (lab, [upstream]) = Lab::with_upstreams().await;
    upstream.set_ttl(1);
    let names = ["a.example", "b.example", "c.example"];
    for name in names {
        assert_eq!(lab.address(name).await, [192, 0, 2, 1]);
    }
    upstream.set(Manner::Silent);
    upstream.set_answer(2);
    sleep(Duration::from_millis(1100)).await;

    let begin = Instant::now();
    let first = lab.ask("a.example").await;
    assert!(first.stale() && begin.elapsed() < Duration::from_millis(1200), "{:?}", begin.elapsed());
    // The first failure is known; from now on nobody waits.
    for _ in 0..20 {
        for name in names {
            let begin = Instant::now();
            let reply = lab.ask(name).await;
            assert!(begin.elapsed() < Duration::from_millis(50), "{:?}", begin.elapsed());
            assert!(reply.stale());
            assert_eq!(address(&reply, name), [192, 0, 2, 1]);
        }
        sleep(Duration::from_millis(100)).await;
    }
    let stale = lab.ask("a.example").await;
    let bytes = bytes(&stale, "a.example", 512, Instant::now());
    assert_eq!(bytes[bytes.len() - 10..bytes.len() - 6], 1_u32.to_be_bytes(), "not longer than it ever was");
    let begin = Instant::now();
    let reply = lab.ask("unknown.example").await;
    assert_eq!((reply.rcode(), reply.source()), (2, Source::None));
    assert!(begin.elapsed() < Duration::from_millis(1700), "{:?}", begin.elapsed());
    eventually("it is told", async || lab.reasons() == [probe::UNREACHABLE]).await;

    upstream.set(Manner::Answer);
    let back = Instant::now();
    for name in names {
        eventually("it is fresh", async || lab.address(name).await == [192, 0, 2, 2]).await;
    }
    assert!(back.elapsed() < Duration::from_secs(5), "{:?}", back.elapsed());
    assert!(!lab.ask("c.example").await.stale());
    eventually("all is well", async || lab.reasons().is_empty()).await;
}

#[tokio::test]
async fn an_upstream_whose_own_upstreams_are_gone_keeps_nobody_waiting() {
    let (lab, [upstream]) = Lab::with_upstreams().await;
    upstream.set_ttl(1);
    assert_eq!(lab.address("a.example").await, [192, 0, 2, 1]);
    upstream.set(Manner::Code(2));
    sleep(Duration::from_millis(1100)).await;
    for _ in 0..3 {
        let begin = Instant::now();
        assert!(lab.ask("a.example").await.stale());
        assert!(begin.elapsed() < Duration::from_millis(50), "{:?}", begin.elapsed());
    }
    assert_eq!(lab.forwarder.status().cache.stale, 3);
    let explained = lab.forwarder.explain(&question("a.example", A), Instant::now());
    assert!(explained.cached.is_some_and(|cached| cached.expired && cached.remaining == 0));
}

#[tokio::test]
async fn where_one_upstream_cannot_and_the_other_is_silent_nobody_waits_once_that_is_known() {
    let (lab, [router, other]) = Lab::with_upstreams().await;
    let names = ["a.example", "b.example", "c.example"];
    for upstream in [&router, &other] {
        upstream.set_ttl(1);
    }
    for name in names {
        assert_eq!(lab.address(name).await, [192, 0, 2, 1]);
    }
    router.set(Manner::Code(2));
    other.set(Manner::Silent);
    sleep(Duration::from_millis(1100)).await;
    assert!(lab.ask("a.example").await.stale());
    eventually("it is noted", async || !lab.upstream(other.address).healthy).await;
    // Longer than a failure is remembered.
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(4500) {
        for name in names {
            let begin = Instant::now();
            assert!(lab.ask(name).await.stale());
            assert!(begin.elapsed() < Duration::from_millis(50), "{:?}", begin.elapsed());
        }
        sleep(Duration::from_millis(50)).await;
    }
    let begin = Instant::now();
    assert_eq!(lab.ask("unknown.example").await.rcode(), 2);
    assert!(begin.elapsed() < Duration::from_millis(50), "{:?}", begin.elapsed());

    router.set_answer(2);
    router.set(Manner::Answer);
    let back = Instant::now();
    for name in names {
        eventually("it is fresh", async || lab.address(name).await == [192, 0, 2, 2]).await;
    }
    assert!(back.elapsed() < Duration::from_secs(5), "{:?}", back.elapsed());
}

#[tokio::test]
async fn what_is_asked_for_often_is_asked_again_before_its_end() {
    let (lab, [upstream]) = Lab::with_upstreams().await;
    lab.address("hot.example").await;
    upstream.set_answer(2);
    for _ in 0..3 {
        lab.address("hot.example").await;
    }
    let soon_over = Instant::now() + Duration::from_secs(58);
    assert!(lab.forwarder.cached(&question("hot.example", A), soon_over).is_some());
    eventually("refreshed", async || lab.address("hot.example").await == [192, 0, 2, 2]).await;
    assert_eq!((upstream.seen(), lab.forwarder.status().cache.refreshed), ((2, 0), 1));
}

#[tokio::test]
async fn stub_domains_have_upstreams_of_their_own() {
    let tasks = Tasks::default();
    let (corp, rest) = (FakeUpstream::start(&tasks).await, FakeUpstream::start(&tasks).await);
    let stub = StubDomain { domain: "Corp.example".to_owned(), servers: vec![corp.address] };
    let lab = Lab::new(tasks, Settings { stub_domains: vec![stub], ..settings(vec![rest.address]) });
    assert_eq!(lab.ask("git.corp.example").await.source(), Source::Upstream(corp.address));
    assert_eq!(lab.ask("www.example").await.source(), Source::Upstream(rest.address));
    assert_eq!(lab.upstream(corp.address).domains, ["corp.example"]);
    assert_eq!(lab.forwarder.explain(&question("git.corp.example", A), Instant::now()).domain, "corp.example");
}

fn with_file(tasks: Tasks, path: &Path) -> Lab {
    Lab::new(tasks, Settings { upstreams: Upstreams::ResolvConf(path.to_owned()), ..settings(Vec::new()) })
}

#[tokio::test]
async fn resolv_conf_is_followed_and_what_was_good_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("resolv.conf");
    let lab = with_file(Tasks::default(), &path);
    let message =
        |lab: &Lab| lab.conditions.list().first().map(|condition| condition.message.clone()).unwrap_or_default();
    assert_eq!(lab.reasons(), [follow::MISSING]);
    assert!(message(&lab).contains("No such file"), "{}", message(&lab));
    let begin = Instant::now();
    assert_eq!(lab.ask("www.example").await.rcode(), 2);
    assert!(begin.elapsed() < Duration::from_millis(50), "nobody is waited for");

    let servers = |lab: &Lab| {
        let upstreams = lab.forwarder.status().upstreams;
        upstreams.iter().map(|upstream| upstream.address.to_string()).collect::<Vec<_>>()
    };
    fs::write(&path, "nameserver 127.0.0.1\n").unwrap();
    eventually("a loop is told", async || message(&lab).contains("nobody but this agent")).await;
    assert!(servers(&lab).is_empty());
    fs::write(&path, "nameserver 127.0.0.1\nnameserver 192.0.2.1\n").unwrap();
    eventually("followed", async || servers(&lab) == ["192.0.2.1:53"] && lab.reasons().is_empty()).await;
    fs::write(&path, "search example\n").unwrap();
    eventually("told", async || message(&lab).contains("names no name server")).await;
    assert!(message(&lab).contains("those known before stay in use"), "{}", message(&lab));
    assert_eq!(servers(&lab), ["192.0.2.1:53"]);
    let other = directory.path().join("other");
    fs::write(&other, "nameserver 192.0.2.2\n").unwrap();
    std::os::unix::fs::symlink("other", directory.path().join("link")).unwrap();
    fs::rename(directory.path().join("link"), &path).unwrap();
    eventually("a link is followed", async || servers(&lab) == ["192.0.2.2:53"] && lab.reasons().is_empty()).await;
}

fn table(services: &[(&str, &str, &str)]) -> ServiceTable {
    let mut builder = Builder::new(crate::config::ServiceFilter::default(), "edge1");
    for (namespace, name, address) in services {
        let kind = if address.is_empty() { ServiceKind::Headless } else { ServiceKind::ClusterIp };
        let mut service = Service::new(NamespacedName::new(*namespace, *name), kind);
        service.cluster_ips = address.parse().into_iter().collect();
        service.cluster_dns = *name == "labelled";
        builder.apply(Event::Apply(Object::Service(service.into())));
    }
    builder.apply(Event::Synced);
    (*builder.build().unwrap()).clone()
}

#[tokio::test]
async fn the_clusters_dns_is_found_and_followed() {
    let upstreams = Upstreams::ClusterDns { auto_detect: true, servers: vec!["192.0.2.9:5353".parse().unwrap()] };
    let first = table(&[
        ("kube-system", "kube-dns", "10.96.0.10"),
        ("kube-system", "coredns", ""),
        ("default", "kube-dns", "10.96.0.11"),
    ]);
    let lab = Lab::with_table(Tasks::default(), Settings { upstreams, ..settings(Vec::new()) }, first);
    let servers = || {
        let upstreams = lab.forwarder.status().upstreams;
        upstreams.iter().map(|upstream| upstream.address.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(servers(), ["10.96.0.10:53", "192.0.2.9:5353"]);
    lab.tables.send_replace(Arc::new(table(&[("dns", "labelled", "10.96.0.12")])));
    eventually("followed", async || servers() == ["10.96.0.12:53", "192.0.2.9:5353"]).await;
    assert!(lab.reasons().is_empty());
}

#[tokio::test]
async fn a_cluster_without_dns_is_told() {
    let upstreams = Upstreams::ClusterDns { auto_detect: true, servers: Vec::new() };
    let lab = Lab::with_table(Tasks::default(), Settings { upstreams, ..settings(Vec::new()) }, table(&[]));
    assert_eq!(lab.reasons(), [follow::MISSING]);
    lab.tables.send_replace(Arc::new(table(&[("kube-system", "coredns", "10.96.0.12")])));
    eventually("cleared", async || lab.reasons().is_empty()).await;
}
