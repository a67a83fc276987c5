mod faults;

use std::{collections::BTreeSet, net::SocketAddr, time::Instant};

use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use super::{fake::FakeServer, *};
use crate::{
    conditions::Condition,
    config::SourceKind,
    kube::{self, Received, listed::GRACE},
    model::{Event, Object},
};

/// Far longer than anything takes; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(30);
const SLICES: &str = "endpointslices.discovery.k8s.io";

struct Bench {
    events: mpsc::Receiver<Received>,
    conditions: Conditions,
    state: SourceState,
    tasks: Tasks,
    /// The server has had rules.
    rules_seen: bool,
}

fn service(name: &str, port: u16) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop"}, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": port}]}})
}

fn slice(name: &str, service: &str) -> Value {
    let labels = json!({"kubernetes.io/service-name": service});
    json!({
        "metadata": {"name": name, "namespace": "shop", "labels": labels},
        "addressType": "IPv4", "ports": [{"port": 80}], "endpoints": [{"addresses": ["10.0.0.1"]}],
    })
}

fn describe(event: &Event) -> String {
    let object = |object: &Object| match object {
        Object::Service(service) => format!("{}:{}", service.name, service.ports[0].port),
        Object::EndpointSlice(_) | Object::Endpoints(_) | Object::Node(_) | Object::DestinationRule(_) => {
            object.name().to_string()
        }
    };
    match event {
        Event::Apply(applied) => format!("apply {} {}", applied.kind(), object(applied)),
        Event::Delete(kind, name) => format!("delete {kind} {name}"),
        Event::Replace(kind, objects) => {
            // What every cluster has goes without saying.
            let said = objects.iter().filter(|object| &*object.name().name != "kubernetes");
            format!("replace {kind} [{}]", said.map(object).collect::<Vec<_>>().join(" "))
        }
        Event::Reached(kind, version) => format!("reached {kind} {version}"),
        Event::Synced => "synced".to_owned(),
    }
}

impl Bench {
    fn start(address: SocketAddr) -> Self {
        Self::start_with(&format!("http://{address}"))
    }

    fn start_with(master: &str) -> Self {
        let _installed_before = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let (sender, events) = Events::channel(16);
        let (conditions, tasks) = (Conditions::default(), Tasks::default());
        let kind = SourceKind::Kubeconfig { path: None, master: Some(master.to_owned()) };
        let config = SourceConfig { kind, qps: 100, burst: 200 };
        let state = kube::start(&config, "edge1", sender, oneshot::channel().1, conditions.clone(), &tasks).unwrap();
        Self { events, conditions, state, tasks, rules_seen: false }
    }

    /// A source that has said all that a server with nothing but these objects makes it say.
    async fn synced(server: &FakeServer) -> Self {
        let mut bench = Self::start(server.address);
        while bench.next().await != "synced" {}
        // Else a test could interrupt a watch that has not begun.
        for resource in ["services", "endpointslices", "nodes"] {
            let call = format!("watch {resource}");
            wait_for(|| (server.count(&call) > 0).then_some(())).await;
        }
        bench
    }

    /// The next event; there are neither Nodes nor rules in most tests, and when that is said is open.
    async fn next(&mut self) -> String {
        loop {
            let event = timeout(PATIENCE, self.events.recv()).await.expect("an event in time");
            let event = describe(&event.expect("a living source").event);
            self.rules_seen |= event.starts_with("replace DestinationRule [s");
            if event != "replace Node []" && (self.rules_seen || event != "replace DestinationRule []") {
                return event;
            }
        }
    }

    async fn expect(&mut self, expected: &[&str]) {
        for expected in expected {
            assert_eq!(self.next().await, *expected);
        }
    }

    /// The two halves run side by side: their order is open, but for what comes last.
    async fn expect_in_any_order(&mut self, expected: &[&str], last: &str) {
        let mut seen = BTreeSet::new();
        for _ in expected {
            seen.insert(self.next().await);
        }
        assert_eq!(seen, expected.iter().map(|&text| text.to_owned()).collect());
        assert_eq!(self.next().await, last);
    }

    async fn condition(&self, reason: &str, subject: &str) -> Condition {
        let find = || self.conditions.list().into_iter().find(|c| c.reason == reason && c.subject == subject);
        wait_for(find).await
    }

    async fn no_condition(&self) {
        wait_for(|| self.conditions.list().is_empty().then_some(())).await;
    }
}

async fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, looking).await.expect("it to come true in time")
}

#[tokio::test]
async fn lists_page_by_page_and_follows_changes() {
    let server = FakeServer::start().await;
    server.world().page = 2;
    for name in ["a", "b", "c", "d", "e"] {
        server.put("services", service(name, 80));
    }
    server.put("endpointslices", slice("a-1", "a"));
    let mut bench = Bench::start(server.address);
    bench
        .expect_in_any_order(
            &[
                "replace Service [shop/a:80 shop/b:80 shop/c:80 shop/d:80 shop/e:80]",
                "replace EndpointSlice [shop/a-1]",
                "replace Endpoints []",
            ],
            "synced",
        )
        .await;
    assert_eq!(server.count("list services"), 3);
    server.put("services", service("f", 80));
    bench.expect(&["apply Service shop/f:80"]).await;
    server.put("services", service("f", 81));
    bench.expect(&["apply Service shop/f:81"]).await;
    server.delete("endpointslices", "a-1");
    bench.expect(&["delete EndpointSlice shop/a-1"]).await;
    let status = bench.state.status();
    assert!(status.answers() && status.last_error.is_none(), "{status:?}");
    assert_eq!((status.objects["Service"], status.objects["EndpointSlice"]), (7, 1));
    assert!(bench.conditions.list().is_empty());
    assert!(bench.tasks.drain(PATIENCE).await);
}

fn node(name: &str, zone: &str) -> Value {
    json!({"metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}}})
}

#[tokio::test]
async fn nodes_are_followed_like_everything_else() {
    let server = FakeServer::start().await;
    server.put("nodes", node("edge1", "a"));
    let mut bench = Bench::start(server.address);
    let listed = ["replace Node [edge1]", "replace Service []", "replace EndpointSlice []", "replace Endpoints []"];
    bench.expect_in_any_order(&listed, "synced").await;
    server.put("nodes", node("edge2", "b"));
    bench.expect(&["apply Node edge2"]).await;
    server.delete("nodes", "edge1");
    bench.expect(&["delete Node edge1"]).await;
    assert_eq!(bench.state.status().objects["Node"], 2);
    let mut bad = node("edge2", "b");
    bad["status"] = json!({"addresses": [{"type": "InternalIP", "address": "?"}]});
    server.put("nodes", bad);
    bench.expect(&["apply Node edge2"]).await;
    let condition = bench.condition("ObjectInvalid", "Node edge2").await;
    assert!(condition.message.contains("status.addresses[0].address: \"?\" is not an IP address"), "{condition:?}");
}

fn rule(name: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop"}, "spec": {"host": name}})
}

#[tokio::test]
async fn destination_rules_are_followed_in_the_best_version_that_serves_them() {
    for (served, expected) in [
        (&[("v1", true), ("v1alpha3", true), ("v1beta1", true)][..], "v1"),
        (&[("v1", false), ("v1alpha3", true), ("v1beta1", true), ("v2", true)], "v1beta1"),
        (&[("v1alpha3", true)], "v1alpha3"),
    ] {
        let server = FakeServer::start().await;
        server.world().istio = served.iter().map(|&(version, rules)| (version.to_owned(), rules)).collect();
        server.put("destinationrules", rule("a"));
        let mut bench = Bench::start(server.address);
        let listed = [
            "replace DestinationRule [shop/a]",
            "replace Service []",
            "replace EndpointSlice []",
            "replace Endpoints []",
        ];
        bench.expect_in_any_order(&listed, "synced").await;
        assert!(server.world().paths.contains(&format!("/apis/networking.istio.io/{expected}/destinationrules")));
        server.put("destinationrules", rule("b"));
        bench.expect(&["apply DestinationRule shop/b"]).await;
        server.delete("destinationrules", "a");
        bench.expect(&["delete DestinationRule shop/a"]).await;
        assert_eq!(bench.state.status().objects["DestinationRule"], 1);
        assert!(bench.conditions.list().is_empty());
    }
}

#[tokio::test]
async fn a_server_without_destination_rules_delays_nothing_and_is_asked_again() {
    for (before, after) in [(None, "v1"), (Some(("v1", false)), "v1")] {
        let server = FakeServer::start().await;
        server.world().istio.extend(before.map(|(version, rules)| (version.to_owned(), rules)));
        let begun = Instant::now();
        let mut bench = Bench::synced(&server).await;
        assert!(begun.elapsed() < GRACE, "{:?}", begun.elapsed());
        wait_for(|| (server.count("get istio") > 3).then_some(())).await;
        assert!(bench.conditions.list().is_empty() && bench.state.status().last_error.is_none());
        server.put("destinationrules", rule("a"));
        server.world().istio.insert(after.to_owned(), true);
        bench.expect(&["replace DestinationRule [shop/a]"]).await;
        assert!(bench.conditions.list().is_empty());
    }
}

#[tokio::test]
async fn rules_that_a_snapshot_may_hold_are_done_away_with_by_a_server_that_has_none() {
    let server = FakeServer::start().await;
    let mut bench = Bench::start(server.address);
    bench.rules_seen = true;
    while bench.next().await != "replace DestinationRule []" {}
    assert!(server.count("get istio") >= 2, "it was asked twice");
}

#[tokio::test]
async fn rules_go_with_their_definition_but_not_for_one_answer() {
    let server = FakeServer::start().await;
    server.world().istio.insert("v1".to_owned(), true);
    let mut bad = rule("a");
    bad["spec"] = json!(7);
    server.put("destinationrules", bad);
    let mut bench = Bench::synced(&server).await;
    bench.condition("ObjectInvalid", "DestinationRule shop/a").await;
    let asked = server.count("get istio");
    server.world().istio.clear();
    server.interrupt();
    bench.expect(&["replace DestinationRule []"]).await;
    assert!(server.count("get istio") >= asked + 2, "it was asked twice");
    bench.no_condition().await;
    let status = bench.state.status();
    assert_eq!((status.objects["DestinationRule"], status.last_error), (0, None));
    server.world().istio.insert("v1beta1".to_owned(), true);
    bench.expect(&["replace DestinationRule [shop/a]"]).await;
}

#[tokio::test]
async fn destination_rules_that_are_refused_hold_nothing_back() {
    for call in ["list destinationrules", "get istio"] {
        let server = FakeServer::start().await;
        server.world().istio.insert("v1".to_owned(), true);
        server.world().refused.insert(call.to_owned(), 403);
        server.put("destinationrules", rule("a"));
        let begun = Instant::now();
        let mut bench = Bench::synced(&server).await;
        assert!(begun.elapsed() < GRACE, "{:?}", begun.elapsed());
        let list = call.starts_with("list");
        let subject = if list { "destinationrules.networking.istio.io" } else { "networking.istio.io" };
        let condition = bench.condition(FORBIDDEN, subject).await;
        assert!(!list || condition.message.contains("grants list and watch on destinationrules"), "{condition:?}");
        server.world().refused.clear();
        bench.expect(&["replace DestinationRule [shop/a]"]).await;
        bench.no_condition().await;
    }
}

#[tokio::test]
async fn an_answer_about_destination_rules_that_never_comes_is_waited_for_only_for_a_while() {
    let server = FakeServer::start().await;
    server.world().silent.insert("networking.istio.io".to_owned());
    let begun = Instant::now();
    Bench::synced(&server).await;
    assert!(begun.elapsed() >= GRACE, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_server_that_names_destination_rules_and_does_not_have_them_is_not_hammered() {
    let server = FakeServer::start().await;
    server.world().istio.insert("v1".to_owned(), true);
    server.world().absent.insert("destinationrules".to_owned());
    let begun = Instant::now();
    let bench = Bench::synced(&server).await;
    wait_for(|| (server.count("list destinationrules") >= 3).then_some(())).await;
    assert!(begun.elapsed() >= Duration::from_millis(1600), "{:?}", begun.elapsed());
    assert!(bench.conditions.list().is_empty());
}

#[tokio::test]
async fn nodes_that_are_refused_or_not_served_hold_nothing_back() {
    for absent in [false, true] {
        let server = FakeServer::start().await;
        server.put("nodes", node("edge1", "a"));
        if absent {
            server.world().absent.insert("nodes".to_owned());
        } else {
            server.world().refused.insert("list nodes".to_owned(), 403);
        }
        let begun = Instant::now();
        let mut bench = Bench::start(server.address);
        let listed = ["replace Service []", "replace EndpointSlice []", "replace Endpoints []"];
        bench.expect_in_any_order(&listed, "synced").await;
        assert!(begun.elapsed() < GRACE, "an answer is all it waits for");
        let reason = if absent { ANSWER } else { FORBIDDEN };
        let condition = bench.condition(reason, "nodes").await;
        assert!(condition.message.contains("list nodes"), "{condition:?}");
        assert!(bench.state.status().answers(), "it was answered");
        {
            let mut world = server.world();
            world.absent.clear();
            world.refused.clear();
        }
        bench.expect(&["replace Node [edge1]"]).await;
        bench.no_condition().await;
    }
}

#[tokio::test]
async fn nodes_that_never_come_are_waited_for_only_for_a_while() {
    let server = FakeServer::start().await;
    server.world().silent.insert("nodes".to_owned());
    let begun = Instant::now();
    let mut bench = Bench::start(server.address);
    let listed = ["replace Service []", "replace EndpointSlice []", "replace Endpoints []"];
    bench.expect_in_any_order(&listed, "synced").await;
    assert!(begun.elapsed() >= GRACE, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn an_interrupted_watch_goes_on_where_it_was_without_listing_again() {
    let server = FakeServer::start().await;
    let mut bench = Bench::synced(&server).await;
    server.put("services", service("a", 80));
    bench.expect(&["apply Service shop/a:80"]).await;
    server.interrupt();
    server.put("services", service("b", 80));
    bench.expect(&["apply Service shop/b:80"]).await;
    assert_eq!((server.count("list services"), server.count("watch services")), (1, 2));
}

#[tokio::test]
async fn lists_again_when_the_version_is_too_old() {
    for gone_as_status in [false, true] {
        let server = FakeServer::start().await;
        server.put("services", service("a", 80));
        server.put("services", service("b", 80));
        let mut bench = Bench::synced(&server).await;
        {
            let mut world = server.world();
            world.gone_as_status = gone_as_status;
            // Keeps the watch from going on before the version is too old.
            world.refused.insert("watch services".to_owned(), 503);
        }
        server.interrupt();
        bench.condition(ANSWER, "services").await;
        server.delete("services", "a");
        server.put("services", service("c", 80));
        server.world().compact();
        server.world().refused.clear();
        // Deleted while nobody looked.
        let mut event = bench.next().await;
        while event.contains("Endpoint") {
            event = bench.next().await;
        }
        assert_eq!(event, "replace Service [shop/b:80 shop/c:80]");
        assert_eq!(server.count("list services"), 2);
        bench.no_condition().await;
    }
}

#[tokio::test]
async fn bookmarks_carry_the_version_over_a_compaction() {
    let server = FakeServer::start().await;
    let mut bench = Bench::synced(&server).await;
    // The version moves on by changes of other kinds.
    server.put("endpointslices", slice("a-1", "a"));
    bench.expect(&["apply EndpointSlice shop/a-1"]).await;
    let version = server.bookmark("services");
    wait_for(|| (server.world().sent.get("services") == Some(&version)).then_some(())).await;
    server.interrupt();
    let resumed = ("services".to_owned(), version);
    wait_for(|| server.world().begun.contains(&resumed).then_some(())).await;
    server.world().compact();
    server.put("services", service("b", 80));
    // The other watches stood at older versions, and list again.
    let mut event = bench.next().await;
    while event.contains("Endpoint") {
        event = bench.next().await;
    }
    assert_eq!(event, "apply Service shop/b:80");
    assert_eq!(server.count("list services"), 1);
}

#[tokio::test]
async fn a_refused_kind_is_reported_and_holds_back_only_itself() {
    let server = FakeServer::start().await;
    server.put("services", service("a", 80));
    server.world().refused.insert("list endpointslices".to_owned(), 403);
    let mut bench = Bench::start(server.address);
    bench.expect(&["replace Service [shop/a:80]"]).await;
    let condition = bench.condition(FORBIDDEN, SLICES).await;
    let expected = format!(
        "the API server http://{} refuses to list {SLICES}: 403 endpointslices is forbidden: User \"edge\" cannot list \
         resource; bind a ClusterRole that grants list and watch on {SLICES} to its account",
        server.address
    );
    assert_eq!(condition.message, expected);
    assert!(bench.state.status().last_error.is_some());
    // Services are followed meanwhile.
    server.put("services", service("b", 80));
    bench.expect(&["apply Service shop/b:80"]).await;
    server.world().refused.clear();
    bench.expect(&["replace EndpointSlice []", "replace Endpoints []", "synced"]).await;
    bench.no_condition().await;
}

#[tokio::test]
async fn a_refused_watch_does_not_list_over_and_over() {
    let server = FakeServer::start().await;
    server.world().refused.insert("watch services".to_owned(), 401);
    let bench = Bench::start(server.address);
    let condition = bench.condition(FORBIDDEN, "services").await;
    assert!(condition.message.ends_with("check the token or client certificate it uses"), "{condition:?}");
    wait_for(|| (server.count("watch services") >= 3).then_some(())).await;
    assert_eq!(server.count("list services"), 1);
    server.world().refused.clear();
    bench.no_condition().await;
}

#[tokio::test]
async fn without_endpoint_slices_endpoints_are_used() {
    let server = FakeServer::start().await;
    server.world().absent.insert("endpointslices".to_owned());
    server.put("endpoints", json!({"metadata": {"name": "a", "namespace": "shop"}, "subsets": []}));
    let mut bench = Bench::start(server.address);
    bench
        .expect_in_any_order(
            &["replace Service []", "replace Endpoints [shop/a]", "replace EndpointSlice []"],
            "synced",
        )
        .await;
    assert_eq!(server.count("list endpointslices"), 0);
    assert!(bench.conditions.list().is_empty());
}

#[tokio::test]
async fn discovery_is_asked_again_until_it_is_answered() {
    let server = FakeServer::start().await;
    server.world().refused.insert("get discovery".to_owned(), 503);
    let mut bench = Bench::start(server.address);
    bench.expect(&["replace Service []"]).await;
    bench.condition(ANSWER, "discovery.k8s.io/v1").await;
    assert_eq!(server.count("list endpoints") + server.count("list endpointslices"), 0);
    server.world().refused.clear();
    bench.expect(&["replace EndpointSlice []", "replace Endpoints []", "synced"]).await;
    bench.no_condition().await;
}

#[tokio::test]
async fn the_choice_is_made_anew_when_slices_are_served_no_more() {
    let server = FakeServer::start().await;
    server.put("endpointslices", slice("a-1", "a"));
    let mut bench = Bench::synced(&server).await;
    server.put("endpoints", json!({"metadata": {"name": "a", "namespace": "shop"}}));
    server.world().absent.insert("endpointslices".to_owned());
    server.interrupt();
    // What the slices said stays until the endpoints are there.
    bench.expect(&["replace Endpoints [shop/a]", "replace EndpointSlice []"]).await;
    assert_eq!(bench.state.status().objects["EndpointSlice"], 0);
    bench.no_condition().await;
}

#[tokio::test]
async fn slices_are_used_once_they_are_served_as_after_an_upgrade() {
    let server = FakeServer::start().await;
    server.world().absent.insert("endpointslices".to_owned());
    server.put("endpoints", json!({"metadata": {"name": "a", "namespace": "shop"}}));
    server.put(
        "endpoints",
        json!({"metadata": {"name": "b", "namespace": "shop"}, "subsets": [{"ports": [{"port": 0}]}]}),
    );
    let mut bench = Bench::start(server.address);
    while bench.next().await != "synced" {}
    bench.condition("ObjectInvalid", "Endpoints shop/b").await;
    server.put("endpointslices", slice("a-1", "a"));
    server.world().absent.clear();
    // What the Endpoints said stays until the slices are there.
    bench.expect(&["replace EndpointSlice [shop/a-1]", "replace Endpoints []"]).await;
    bench.no_condition().await;
}

#[tokio::test]
async fn while_the_server_is_away_one_request_at_a_time_tries_it() {
    let server = FakeServer::start().await;
    let mut bench = Bench::synced(&server).await;
    let address = server.address;
    drop(server);
    bench.condition(UNREACHABLE, "").await;
    // The first attempts of all are over; from here on they take turns.
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let mut attempts = 0;
    let counting = async {
        while let Ok((connection, _)) = listener.accept().await {
            drop(connection);
            attempts += 1;
        }
    };
    let _over = timeout(Duration::from_secs(6), counting).await;
    assert!((1..=8).contains(&attempts), "{attempts} attempts in 6 s");
    drop(listener);
    let server = FakeServer::start_at(address).await;
    server.put("services", service("a", 80));
    let begun = Instant::now();
    while !bench.next().await.contains("shop/a:80") {}
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    bench.no_condition().await;
}

#[tokio::test]
async fn waits_for_a_server_that_is_not_there_yet() {
    // An address of its own, for nobody else to take the port meanwhile.
    let address = {
        let listener = std::net::TcpListener::bind("127.0.0.83:0").unwrap();
        listener.local_addr().unwrap()
    };
    let mut bench = Bench::start(address);
    let condition = bench.condition(UNREACHABLE, "").await;
    let (begin, middle) =
        (format!("cannot reach the API server http://{address}: "), "Connection refused (os error 111)");
    assert!(condition.message.starts_with(&begin) && condition.message.contains(middle), "{condition:?}");
    assert!(!bench.state.status().answers());
    let server = FakeServer::start_at(address).await;
    assert_eq!(server.address, address);
    bench
        .expect_in_any_order(&["replace Service []", "replace EndpointSlice []", "replace Endpoints []"], "synced")
        .await;
    bench.no_condition().await;
    assert!(bench.state.status().answers());
}

#[tokio::test]
async fn a_server_without_tls_where_tls_is_expected_is_unreachable() {
    let server = FakeServer::start().await;
    let bench = Bench::start_with(&format!("https://{}", server.address));
    let condition = bench.condition(UNREACHABLE, "").await;
    assert!(!condition.message.contains('\n') && condition.message.contains("certificates"), "{condition:?}");
}

#[tokio::test]
async fn an_unusable_object_is_reported_and_counts_as_absent() {
    let server = FakeServer::start().await;
    server.put("services", service("a", 80));
    // Belongs to no Service, which is no fault.
    let mut foreign = slice("x", "x");
    foreign["metadata"]["labels"] = json!({});
    server.put("endpointslices", foreign);
    let mut bench = Bench::synced(&server).await;
    let mut broken = service("a", 80);
    broken["spec"]["clusterIP"] = json!("10.96.0.1.1");
    server.put("services", broken);
    bench.expect(&["delete Service shop/a"]).await;
    let condition = bench.condition("ObjectInvalid", "Service shop/a").await;
    assert_eq!(
        condition.message,
        "cannot use all of Service shop/a: spec.clusterIP: \"10.96.0.1.1\" is not an IP address; correct the object"
    );
    server.put("services", service("a", 81));
    bench.expect(&["apply Service shop/a:81"]).await;
    bench.no_condition().await;
}

#[tokio::test]
async fn a_server_that_ends_every_watch_is_not_hammered() {
    let server = FakeServer::start().await;
    server.world().end_watches = true;
    let begun = Instant::now();
    let _bench = Bench::start(server.address);
    wait_for(|| (server.count("watch services") >= 4).then_some(())).await;
    // The second attempt comes at once, the two after it each at least the shortest pause later.
    assert!(begun.elapsed() >= Duration::from_millis(1600), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn ends_when_nobody_listens() {
    let server = FakeServer::start().await;
    let Bench { events, tasks, .. } = Bench::synced(&server).await;
    drop(events);
    assert!(tasks.drain(PATIENCE).await);
}
