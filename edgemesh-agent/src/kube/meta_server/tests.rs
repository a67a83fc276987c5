//! The whole source against the fake metaServer, which reproduces KubeEdge's quirks.

mod doors;
mod offline;

use std::{collections::BTreeMap, net::TcpListener, time::Instant};

use edgemesh_tests::meta_server::{Door, FakeMetaServer, Fault, Link};
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{
    health::{ANSWER, EMPTY, FORBIDDEN, OFFLINE, SLOW, UNREACHABLE},
    *,
};
use crate::{
    conditions::Condition,
    config::{MetaServerSecurity, SourceKind},
    kube::{self, Received, SourceStatus},
    model::{Event, Object},
};

/// Far longer than anything takes; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longer than any test takes.
const NEVER: Duration = Duration::from_secs(300);
/// So short that a test need not wait for it.
const OFTEN: Duration = Duration::from_millis(200);
/// What is in every cluster.
const ALWAYS: [&str; 2] = ["Endpoints default/kubernetes", "Service default/kubernetes:443"];

struct Bench {
    events: mpsc::Receiver<Received>,
    conditions: Conditions,
    state: SourceState,
    tasks: Tasks,
    /// What the events say there is.
    known: BTreeMap<String, String>,
    /// What was said to be complete, and as of when.
    reached: BTreeMap<Kind, u64>,
    synced: bool,
}

fn service(name: &str, port: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": port}]},
    })
}

fn endpoints(name: &str, ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": name, "namespace": "shop"},
        "subsets": [{"addresses": [{"ip": ip}], "ports": [{"port": 80}]}],
    })
}

fn node(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
}

fn rule(name: &str) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": name, "namespace": "shop"}, "spec": {"host": name},
    })
}

fn describe(object: &Object) -> String {
    let name = object.name();
    match object {
        Object::Service(service) => format!("Service {name}:{}", service.ports[0].port),
        Object::EndpointSlice(_) | Object::Endpoints(_) | Object::Node(_) | Object::DestinationRule(_) => {
            format!("{} {name}", object.kind())
        }
    }
}

fn config(server: String, relist_period: Duration, request_timeout: Duration) -> MetaServerConfig {
    MetaServerConfig { server, security: None, relist_period, request_timeout }
}

impl Bench {
    fn start(fake: &FakeMetaServer, relist_period: Duration) -> Self {
        Self::start_with(config(format!("http://{}", fake.address()), relist_period, PATIENCE)).unwrap()
    }

    fn start_with(meta_server: MetaServerConfig) -> Result<Self, Error> {
        Self::start_after(meta_server, &BTreeMap::new())
    }

    /// With what an agent before has left: what its objects were complete as of.
    fn start_after(meta_server: MetaServerConfig, reached: &BTreeMap<Kind, u64>) -> Result<Self, Error> {
        let _installed_before = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let (sender, events) = Events::channel(16);
        let (conditions, tasks) = (Conditions::default(), Tasks::default());
        let config = SourceConfig { kind: SourceKind::MetaServer(meta_server), qps: 100, burst: 200 };
        let (restore, restored) = oneshot::channel();
        restore.send(reached.clone()).unwrap();
        let state = kube::start(&config, "edge1", sender, restored, conditions.clone(), &tasks)?;
        let (known, reached) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { events, conditions, state, tasks, known, reached, synced: false })
    }

    /// One that has said all that there is, and watches.
    async fn synced(fake: &FakeMetaServer, relist_period: Duration) -> Self {
        let mut bench = Self::start(fake, relist_period);
        bench.until("it is in sync", |bench| bench.synced).await;
        for resource in ["services", "endpoints"] {
            bench.until("it watches", |_| fake.watching(resource) > 0).await;
        }
        bench
    }

    /// Takes events in until something holds.
    async fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let waiting = async {
            while !holds(self) {
                if let Ok(received) = timeout(Duration::from_millis(2), self.events.recv()).await {
                    self.take(received.expect("a living source").event);
                }
            }
        };
        let waited = timeout(PATIENCE, waiting).await;
        assert!(waited.is_ok(), "waited in vain until {what}; {:?} {:?}", self.known, self.conditions.list());
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Apply(object) => {
                self.known.insert(format!("{} {}", object.kind(), object.name()), describe(&object));
            }
            Event::Delete(kind, name) => {
                self.known.remove(&format!("{kind} {name}"));
            }
            Event::Replace(kind, objects) => {
                self.known.retain(|name, _| !name.starts_with(&format!("{kind} ")));
                for object in objects {
                    self.take(Event::Apply(object));
                }
            }
            Event::Reached(kind, version) => drop(self.reached.insert(kind, version)),
            Event::Synced => self.synced = true,
        }
    }

    fn knows(&self, beside: &[&str]) -> bool {
        let mut expected: Vec<&str> = ALWAYS.iter().chain(beside).copied().collect();
        expected.sort_unstable();
        let mut known: Vec<&str> = self.known.values().map(String::as_str).collect();
        known.sort_unstable();
        known == expected
    }

    /// Waits until exactly these objects are known, beside those of every cluster.
    async fn learns(&mut self, beside: &[&str]) {
        self.until(&format!("it knows {beside:?}"), |bench| bench.knows(beside)).await;
    }

    async fn condition(&mut self, reason: &str, subject: &str) -> Condition {
        let find =
            |bench: &Self| bench.conditions.list().into_iter().find(|c| c.reason == reason && c.subject == subject);
        self.until(&format!("{reason} {subject}"), |bench| find(bench).is_some()).await;
        find(self).unwrap()
    }

    async fn health(&mut self, health: SourceHealth) -> SourceStatus {
        self.until(health.word(), |bench| bench.state.status().health == health).await;
        self.state.status()
    }

    async fn well(&mut self) {
        self.until("all is well", |bench| {
            bench.conditions.list().is_empty() && bench.state.status().health == SourceHealth::Connected
        })
        .await;
    }
}

fn fake() -> FakeMetaServer {
    FakeMetaServer::local().unwrap()
}

#[tokio::test]
async fn objects_come_change_and_go_by_the_watch() {
    let fake = fake();
    fake.put(service("a", 80));
    fake.put(node("edge1"));
    let mut bench = Bench::synced(&fake, NEVER).await;
    bench.learns(&["Node edge1", "Service shop/a:80"]).await;
    fake.put(service("a", 81));
    fake.put(endpoints("a", "10.0.0.1"));
    bench.learns(&["Endpoints shop/a", "Node edge1", "Service shop/a:81"]).await;
    fake.delete("services", "shop", "a");
    bench.learns(&["Endpoints shop/a", "Node edge1"]).await;
    bench.well().await;
    let status = bench.state.status();
    assert_eq!((status.kind, status.objects["Service"], status.objects["Endpoints"]), ("metaServer", 1, 2));
    assert!(status.last_sync.is_some() && status.hint.is_none(), "{status:?}");
    assert!(bench.tasks.drain(PATIENCE).await);
}

#[tokio::test]
async fn rule_1_asks_for_json_lists_and_plain_watches_of_random_length() {
    let fake = fake();
    let mut bench = Bench::synced(&fake, NEVER).await;
    for round in 0..3 {
        fake.end_watches();
        bench.until("it watches again", |_| fake.count("watch", "services") >= round + 2).await;
    }
    let requests = fake.requests();
    assert!(requests.iter().all(|made| made.accept.as_deref() == Some("application/json")), "{requests:?}");
    let mut lengths = Vec::new();
    for made in &requests {
        for parameter in ["resourceVersion", "allowWatchBookmarks", "sendInitialEvents", "limit", "continue"] {
            assert!(!made.query.contains_key(parameter), "{parameter} in {made:?}");
        }
        if made.verb == "watch" {
            lengths.push(made.query["timeoutSeconds"].parse::<u64>().unwrap());
        }
    }
    assert!(lengths.iter().all(|length| (300..=600).contains(length)), "{lengths:?}");
    lengths.dedup();
    assert!(lengths.len() > 1, "never two alike: {lengths:?}");
    assert!(requests.iter().all(|made| ["list", "watch"].contains(&made.verb.as_str())), "{requests:?}");
    assert_eq!(fake.count("list", "endpointslices"), 0, "they cannot be relied on");
}

#[test]
fn rule_1_lengths_of_watches_are_300_to_600_seconds_and_periods_a_tenth_around_their_mean() {
    let lengths: Vec<u32> = (0..1000).map(watch_seconds).collect();
    assert_eq!((lengths.iter().min(), lengths.iter().max()), (Some(&300), Some(&600)));
    let period = Duration::from_secs(300);
    let periods: Vec<Duration> = (0..1000).map(|random| spread(period, random)).collect();
    assert_eq!(periods.iter().min(), Some(&Duration::from_secs(270)));
    assert_eq!(periods.iter().max(), Some(&Duration::from_secs(330)));
    assert_ne!(random(), random());
}

#[tokio::test]
async fn rule_3_every_end_of_a_watch_is_followed_by_a_list() {
    let fake = fake();
    fake.put(service("a", 80));
    let mut bench = Bench::synced(&fake, NEVER).await;
    bench.learns(&["Service shop/a:80"]).await;
    // What happens meanwhile is told to nobody.
    fake.silence_watches();
    fake.delete("services", "shop", "a");
    fake.put(service("b", 80));
    assert_eq!((fake.watching("services"), bench.knows(&["Service shop/a:80"])), (0, true));
    drop(bench);
    // A watch that is broken, and one that ends as metaServer ends them.
    for regular in [false, true] {
        let mut bench = Bench::synced(&fake, NEVER).await;
        let lists = fake.count("list", "services");
        if regular {
            fake.end_watches()
        } else {
            fake.break_watches()
        }
        bench.until("it lists again", |_| fake.count("list", "services") > lists).await;
        bench.until("it watches again", |_| fake.watching("services") > 0).await;
        fake.put(service("b", if regular { 81 } else { 82 }));
        bench.learns(&[if regular { "Service shop/b:81" } else { "Service shop/b:82" }]).await;
        bench.well().await;
    }
}

#[tokio::test]
async fn rule_3_a_watch_that_died_silently_is_made_good_by_the_next_list_and_begun_anew() {
    let fake = fake();
    fake.put(service("a", 80));
    let mut bench = Bench::synced(&fake, OFTEN).await;
    sleep(Duration::from_millis(1_100)).await;
    for break_it in [FakeMetaServer::silence_watches, FakeMetaServer::restart_cloudcore] {
        let watches = fake.count("watch", "services");
        break_it(&fake);
        fake.put(service("a", 81));
        fake.put(service("b", 80));
        bench.learns(&["Service shop/a:81", "Service shop/b:80"]).await;
        bench.until("it watches anew", |_| fake.count("watch", "services") > watches).await;
        fake.delete("services", "shop", "b");
        bench.learns(&["Service shop/a:81"]).await;
        // Only a watch that has lived for a while is suspected.
        sleep(Duration::from_millis(1_100)).await;
    }
    bench.well().await;
}

#[tokio::test]
async fn rule_5_ghosts_stored_on_the_node_stay_away_once_a_list_of_the_api_server_lacked_them() {
    let fake = fake();
    fake.put(service("a", 80));
    fake.put(service("ghost", 80));
    let mut bench = Bench::synced(&fake, OFTEN).await;
    bench.learns(&["Service shop/a:80", "Service shop/ghost:80"]).await;
    fake.link(Link::Down);
    fake.delete("services", "shop", "ghost");
    bench.health(SourceHealth::Offline).await;
    assert!(bench.knows(&["Service shop/a:80", "Service shop/ghost:80"]), "{:?}", bench.known);
    fake.link(Link::Up);
    bench.learns(&["Service shop/a:80"]).await;
    // It is still stored, replayed by every watch and in every stored list.
    assert!(fake.stored().contains(&"/core/v1/services/shop/ghost".to_owned()), "{:?}", fake.stored());
    fake.end_watches();
    fake.put(service("b", 80));
    bench.learns(&["Service shop/a:80", "Service shop/b:80"]).await;
    fake.link(Link::Down);
    bench.health(SourceHealth::Offline).await;
    let lists = fake.count("list", "services");
    bench.until("it was listed", |_| fake.count("list", "services") > lists + 1).await;
    assert!(bench.knows(&["Service shop/a:80", "Service shop/b:80"]), "{:?}", bench.known);
}

#[tokio::test]
async fn rule_6_nothing_is_lost_by_any_failure_and_the_condition_says_why() {
    let fake = fake();
    fake.put(service("a", 80));
    fake.put(endpoints("a", "10.0.0.1"));
    let server = format!("http://{}", fake.address());
    let mut bench = Bench::start_with(config(server, OFTEN, Duration::from_millis(600))).unwrap();
    bench.until("it is in sync", |bench| bench.synced).await;
    let all = ["Endpoints shop/a", "Service shop/a:80"];
    bench.learns(&all).await;
    let status = |code, message: &str| Fault::Status(code, message.to_owned());
    for (fault, reason, subject, part) in [
        (Fault::Empty, EMPTY, "services", "an empty list of services, which no cluster has"),
        (Fault::EmptyOnline, EMPTY, "endpoints", "check that cloudcore has modules.dynamicController.enable"),
        (
            status(404, "the server could not find"),
            ANSWER,
            "services",
            "failed to list services: 404 the server could not",
        ),
        (status(500, "request timed out"), ANSWER, "endpoints", "failed to list endpoints: 500 request timed out"),
        (status(503, ""), ANSWER, "services", "503"),
        (Fault::Garbage, ANSWER, "services", "the answer is expected value at line 1 column 1, in \"<html>"),
        (Fault::Truncated, ANSWER, "services", "the answer broke off"),
        (Fault::Silence, UNREACHABLE, "", "no complete answer within 600ms"),
        (status(403, "services is forbidden"), FORBIDDEN, "services", "bind a ClusterRole"),
    ] {
        fake.fault("list *", fault.clone());
        let condition = bench.condition(reason, subject).await;
        assert!(condition.message.contains(part), "{part} in {condition:?}");
        assert!(condition.message.contains("the last known state is served meanwhile"), "{condition:?}");
        // So that there is a second of its kind.
        let lists = fake.count("list", "services");
        bench.until("it tried again", |_| fake.count("list", "services") > lists).await;
        let status = bench.state.status();
        assert_ne!(status.health, SourceHealth::Connected, "{fault:?}");
        assert!(status.reason.is_some() && status.hint.is_some(), "{status:?}");
        assert!(bench.knows(&all), "after {fault:?}: {:?}", bench.known);
        fake.heal();
        bench.well().await;
        assert!(bench.knows(&all), "after {fault:?}: {:?}", bench.known);
    }
}

#[tokio::test]
async fn rule_6_items_that_are_no_objects_keep_what_is_known_of_them_and_of_all_others() {
    let fake = fake();
    fake.put(service("a", 80));
    let mut bench = Bench::synced(&fake, OFTEN).await;
    bench.learns(&["Service shop/a:80"]).await;
    fake.fault("list *", Fault::OddItems);
    // The first is the one of every cluster.
    let condition = bench.condition("ObjectInvalid", "Service default/kubernetes").await;
    assert!(condition.message.contains("invalid type: string"), "{condition:?}");
    let lists = fake.count("list", "services");
    bench.until("it was listed again", |_| fake.count("list", "services") > lists + 2).await;
    assert!(bench.knows(&["Service shop/a:80"]), "{:?}", bench.known);
    fake.heal();
    bench.well().await;
}

#[tokio::test]
async fn rule_6_events_that_are_none_end_the_watch_and_nothing_else() {
    let fake = fake();
    fake.put(service("a", 80));
    let mut bench = Bench::synced(&fake, NEVER).await;
    for line in ["garbage", "{\"type\":\"DELETED\",\"object\":{\"metadata\":{}}}"] {
        let (lists, watches) = (fake.count("list", "services"), fake.count("watch", "services"));
        fake.say("services", line);
        bench.until("it lists again", |_| fake.count("list", "services") > lists).await;
        bench.until("it watches again", |_| fake.count("watch", "services") > watches).await;
        assert!(bench.knows(&["Service shop/a:80"]), "after {line}: {:?}", bench.known);
    }
    // Of types that are not known, and empty lines, there is nothing to say.
    let lists = fake.count("list", "services");
    bench.until("it watches", |_| fake.watching("services") > 0).await;
    fake.say("services", "\n{\"type\":\"BOOKMARK\",\"object\":{\"metadata\":{\"resourceVersion\":\"9\"}}}");
    fake.put(service("b", 80));
    bench.learns(&["Service shop/a:80", "Service shop/b:80"]).await;
    assert_eq!(fake.count("list", "services"), lists);
}

#[tokio::test]
async fn rule_7_ten_seconds_and_an_empty_list_degrade_the_source_with_the_hint_of_the_guide() {
    let fake = fake();
    fake.put(service("a", 80));
    let mut bench = Bench::synced(&fake, OFTEN).await;
    bench.learns(&["Service shop/a:80"]).await;
    fake.wipe_store();
    fake.link(Link::HalfOpen(Duration::from_millis(3_200)));
    let status = bench.health(SourceHealth::Degraded).await;
    assert!(status.reason.unwrap().contains("took 3 s"), "{:?}", bench.state.status());
    assert!(status.hint.unwrap().contains("curl 127.0.0.1:10550/api/v1/services"));
    bench.condition(SLOW, "services").await;
    assert!(bench.knows(&["Service shop/a:80"]), "{:?}", bench.known);
    fake.link(Link::Up);
    bench.well().await;
    assert!(bench.knows(&["Service shop/a:80"]), "{:?}", bench.known);
}

#[tokio::test]
async fn nodes_that_may_not_all_be_seen_are_replaced_by_this_one() {
    let fake = fake();
    fake.put(node("edge1"));
    fake.put(node("edge2"));
    fake.forbid("nodes", Some("edge1"));
    let mut bench = Bench::start(&fake, NEVER);
    bench.until("it is in sync", |bench| bench.synced).await;
    bench.learns(&["Node edge1"]).await;
    bench.well().await;
    bench.until("it watches", |_| fake.watching("nodes") > 0).await;
    let watch = fake.requests().into_iter().rfind(|made| made.verb == "watch" && made.resource == "nodes").unwrap();
    assert_eq!(watch.query["fieldSelector"], "metadata.name=edge1");
    fake.allow();
    fake.end_watches();
    bench.learns(&["Node edge1", "Node edge2"]).await;
}

#[tokio::test]
async fn kinds_that_are_refused_are_told_and_hold_nothing_back() {
    let fake = fake();
    fake.forbid("nodes", None);
    fake.forbid("destinationrules", None);
    fake.put(service("a", 80));
    let mut bench = Bench::start(&fake, NEVER);
    bench.until("it is in sync", |bench| bench.synced).await;
    bench.learns(&["Service shop/a:80"]).await;
    let condition = bench.condition(FORBIDDEN, "nodes").await;
    assert!(condition.message.contains("list and watch on nodes to the agent's ServiceAccount"), "{condition:?}");
    bench.condition(FORBIDDEN, "destinationrules.networking.istio.io").await;
    assert_eq!(bench.state.status().health, SourceHealth::Degraded);
    fake.allow();
    bench.well().await;
}

#[tokio::test]
async fn rules_are_read_in_whatever_version_the_cluster_has_and_their_lack_is_no_trouble() {
    for versions in [&["v1", "v1beta1", "v1alpha3"][..], &["v1alpha3"], &[]] {
        let fake = fake();
        for version in ["v1", "v1beta1", "v1alpha3"].iter().filter(|version| !versions.contains(version)) {
            fake.unserve(&format!("networking.istio.io/{version}"), "destinationrules");
        }
        fake.put(rule("a"));
        let mut bench = Bench::start(&fake, NEVER);
        bench.until("it is in sync", |bench| bench.synced).await;
        let Some(best) = versions.first() else {
            bench.learns(&[]).await;
            bench.well().await;
            assert_eq!(fake.count("list", "destinationrules"), 3, "one for each version");
            continue;
        };
        bench.learns(&["DestinationRule shop/a"]).await;
        bench.until("it watches", |_| fake.watching("destinationrules") > 0).await;
        let made = fake.requests();
        let watch = made.iter().find(|made| made.verb == "watch" && made.resource == "destinationrules").unwrap();
        assert_eq!(watch.path, format!("/apis/networking.istio.io/{best}/destinationrules"));
        fake.put(rule("b"));
        bench.learns(&["DestinationRule shop/a", "DestinationRule shop/b"]).await;
        for name in ["a", "b"] {
            fake.delete("destinationrules", "shop", name);
        }
        bench.learns(&[]).await;
        bench.well().await;
    }
}

#[tokio::test]
async fn a_watch_that_is_refused_does_not_list_over_and_over() {
    let fake = fake();
    fake.fault("watch services", Fault::Status(403, "services is forbidden".to_owned()));
    let mut bench = Bench::start(&fake, NEVER);
    let condition = bench.condition(FORBIDDEN, "services").await;
    assert!(condition.message.contains("refuses to watch services"), "{condition:?}");
    bench.until("it tried again", |_| fake.count("watch", "services") >= 3).await;
    // Two, and those of the probe that asks whether all is well again are none: the refusal is no matter of the link.
    assert_eq!(fake.count("list", "services"), 2);
    fake.heal();
    bench.well().await;
    fake.put(service("a", 80));
    bench.learns(&["Service shop/a:80"]).await;
}

#[tokio::test]
async fn a_meta_server_that_ends_every_watch_is_not_hammered() {
    let fake = fake();
    let mut bench = Bench::synced(&fake, NEVER).await;
    let begun = Instant::now();
    for round in 2..=4 {
        bench.until("it watches", |_| fake.watching("services") > 0).await;
        fake.end_watches();
        bench.until("it watches again", |_| fake.count("watch", "services") >= round).await;
    }
    // The first new attempt comes at once, the two after it each at least the shortest pause later.
    assert!(begun.elapsed() >= Duration::from_millis(1600), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn waits_for_a_meta_server_that_is_not_there_yet_and_finds_one_that_was_away() {
    let listener = TcpListener::bind("127.0.0.84:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let mut bench = Bench::start_with(config(format!("http://{address}"), NEVER, PATIENCE)).unwrap();
    let condition = bench.condition(UNREACHABLE, "").await;
    assert!(condition.message.contains("Connection refused (os error 111)"), "{condition:?}");
    assert!(condition.message.contains("metaServer.enable"), "{condition:?}");
    let status = bench.health(SourceHealth::Offline).await;
    assert!(status.last_sync.is_none());
    let fake = FakeMetaServer::start(TcpListener::bind(address).unwrap(), Door::Open).unwrap();
    bench.until("it is in sync", |bench| bench.synced).await;
    bench.well().await;
    bench.until("it watches", |_| fake.watching("services") > 0).await;
    drop(fake);
    bench.health(SourceHealth::Offline).await;
    assert!(bench.knows(&[]), "{:?}", bench.known);
    let fake = FakeMetaServer::start(TcpListener::bind(address).unwrap(), Door::Open).unwrap();
    fake.put(service("a", 80));
    bench.learns(&["Service shop/a:80"]).await;
    bench.well().await;
}

#[tokio::test]
async fn keeps_to_the_rate_of_requests_that_is_set() {
    let fake = fake();
    let begun = Instant::now();
    let kind = SourceKind::MetaServer(config(format!("http://{}", fake.address()), NEVER, PATIENCE));
    let (sender, _events) = Events::channel(64);
    let tasks = Tasks::default();
    let config = SourceConfig { kind, qps: 5, burst: 1 };
    let _state = kube::start(&config, "edge1", sender, oneshot::channel().1, Conditions::default(), &tasks).unwrap();
    let made = async {
        while fake.requests().len() < 6 {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, made).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(990), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn ends_when_nobody_listens() {
    let fake = fake();
    let Bench { events, tasks, .. } = Bench::synced(&fake, NEVER).await;
    drop(events);
    assert!(tasks.drain(PATIENCE).await);
}
