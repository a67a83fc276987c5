use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;

use super::*;

fn service(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"}})
}

/// Sends a request in HTTP/1.0, whose answer ends with the connection and has no chunks.
fn ask(fake: &FakeMetaServer, path: &str) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(fake.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    BufReader::new(stream)
}

/// The code and the body of an answer.
fn get(fake: &FakeMetaServer, path: &str) -> (u16, Value) {
    let mut answer = String::new();
    ask(fake, path).read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap())
}

fn names(list: &Value) -> Vec<&str> {
    list["items"].as_array().unwrap().iter().map(|item| item["metadata"]["name"].as_str().unwrap()).collect()
}

/// A watch, past its headers.
struct Watch(BufReader<TcpStream>);

impl Watch {
    fn of(fake: &FakeMetaServer, path: &str) -> Self {
        let mut watch = Self(ask(fake, path));
        while !watch.line().trim().is_empty() {}
        watch
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line
    }

    fn next(&mut self) -> String {
        let event: Value = serde_json::from_str(&self.line()).unwrap();
        let name = event["object"]["metadata"]["name"].as_str().or_else(|| event["object"]["message"].as_str());
        format!("{} {}", event["type"].as_str().unwrap(), name.unwrap())
    }
}

const SERVICES: &str = "/api/v1/services";
const WATCH: &str = "/api/v1/services?watch=true&resourceVersion=999999";

#[test]
fn online_lists_are_those_of_the_cluster_and_offline_ones_those_of_the_store() {
    let fake = FakeMetaServer::local().unwrap();
    fake.put(service("a"));
    let (code, list) = get(&fake, SERVICES);
    assert_eq!((code, names(&list)), (200, vec!["kubernetes", "a"]));
    assert!(list["metadata"]["resourceVersion"].is_string() && list["metadata"]["selfLink"].is_null(), "{list}");
    fake.link(Link::Down);
    // Lists are not stored.
    let bare = json!({"apiVersion": "v1", "items": [], "kind": "ServiceList"});
    assert_eq!(get(&fake, SERVICES), (200, bare));
    fake.link(Link::Up);
    let mut watch = Watch::of(&fake, WATCH);
    assert_eq!((watch.next(), watch.next()), ("ADDED kubernetes".to_owned(), "ADDED a".to_owned()));
    fake.link(Link::Down);
    let (_, list) = get(&fake, SERVICES);
    assert_eq!(list["metadata"]["selfLink"], "/core/v1/services/null/null");
    assert_eq!(names(&list), ["kubernetes", "a"]);
    let one = get(&fake, "/api/v1/namespaces/shop/services?fieldSelector=metadata.name%3Da").1;
    assert_eq!((names(&one), &one["metadata"]["selfLink"]), (vec!["a"], &json!("/core/v1/services/shop/null")));
    assert_eq!(names(&get(&fake, "/api/v1/services?fieldSelector=spec.type=ClusterIP").1), [""; 0]);
}

#[test]
fn a_half_open_link_costs_its_time_and_a_resource_that_is_not_there_is_an_empty_list() {
    let fake = FakeMetaServer::local().unwrap();
    fake.link(Link::HalfOpen(Duration::from_millis(200)));
    let begun = std::time::Instant::now();
    assert_eq!(names(&get(&fake, SERVICES).1), [""; 0]);
    assert!(begun.elapsed() >= Duration::from_millis(200));
    fake.link(Link::Up);
    fake.unserve("networking.istio.io/v1", "destinationrules");
    let list = get(&fake, "/apis/networking.istio.io/v1/destinationrules");
    let expected = json!({"apiVersion": "networking.istio.io/v1", "items": [], "kind": "DestinationruleList"});
    assert_eq!(list, (200, expected));
    assert_eq!(get(&fake, "/version").0, 500);
}

#[test]
fn a_watch_replays_what_is_stored_and_then_tells_of_changes() {
    let fake = FakeMetaServer::local().unwrap();
    fake.put(service("a"));
    let mut first = Watch::of(&fake, WATCH);
    assert_eq!((first.next(), first.next()), ("ADDED kubernetes".to_owned(), "ADDED a".to_owned()));
    // A second one is told from the store, as the cloud believes the node to know.
    let mut second = Watch::of(&fake, WATCH);
    assert_eq!((second.next(), second.next()), ("ADDED kubernetes".to_owned(), "ADDED a".to_owned()));
    fake.put(service("a"));
    fake.delete("services", "shop", "a");
    for watch in [&mut first, &mut second] {
        assert_eq!((watch.next(), watch.next()), ("MODIFIED a".to_owned(), "DELETED a".to_owned()));
    }
    fake.end_watches();
    assert_eq!(first.next(), "ERROR stop to watch sqlite/meta_v2");
    assert_eq!(first.line(), "");
}

#[test]
fn what_is_deleted_while_the_link_is_down_stays_as_a_ghost_and_what_is_changed_is_sent_again() {
    let fake = FakeMetaServer::local().unwrap();
    fake.put(service("a"));
    fake.put(service("b"));
    let mut watch = Watch::of(&fake, WATCH);
    for _ in 0..3 {
        watch.next();
    }
    fake.link(Link::Down);
    fake.delete("services", "shop", "a");
    fake.put(service("b"));
    fake.put(service("c"));
    fake.link(Link::Up);
    assert_eq!(watch.next(), "MODIFIED b", "c is not known to the node, so it is not sent");
    assert_eq!(names(&get(&fake, SERVICES).1), ["kubernetes", "b", "c"]);
    let mut again = Watch::of(&fake, WATCH);
    let mut replayed: Vec<String> = (0..4).map(|_| again.next()).collect();
    replayed.sort();
    assert_eq!(replayed, ["ADDED a", "ADDED b", "ADDED c", "ADDED kubernetes"]);
}

#[test]
fn a_watch_that_is_opened_offline_never_comes_to_life_by_itself() {
    let fake = FakeMetaServer::local().unwrap();
    fake.link(Link::Down);
    let mut offline = Watch::of(&fake, WATCH);
    fake.link(Link::Up);
    fake.put(service("a"));
    assert!(fake.stored().is_empty(), "nobody told the cloud that this node listens");
    // Only another watch does.
    let mut online = Watch::of(&fake, WATCH);
    assert_eq!(online.next(), "ADDED kubernetes");
    assert_eq!(offline.next(), "ADDED kubernetes");
    // And a cloudcore that restarts forgets it again.
    fake.restart_cloudcore();
    fake.put(service("b"));
    assert!(!fake.stored().iter().any(|key| key.ends_with("/b")), "{:?}", fake.stored());
}

#[test]
fn gateways_are_told_as_gatewaies_and_slices_of_https_lead_to_meta_server() {
    let fake = FakeMetaServer::local().unwrap();
    fake.put(json!({
        "apiVersion": "networking.istio.io/v1", "kind": "Gateway", "metadata": {"name": "g", "namespace": "shop"},
    }));
    let path = "/apis/networking.istio.io/v1/gateways";
    assert_eq!(names(&get(&fake, path).1), ["g"]);
    let _watch = Watch::of(&fake, &format!("{path}?watch=1"));
    assert!(fake.stored().contains(&"/networking.istio.io/v1/gatewaies/shop/g".to_owned()), "{:?}", fake.stored());
    fake.link(Link::Down);
    assert_eq!(names(&get(&fake, path).1), [""; 0]);
    fake.link(Link::Up);
    fake.put(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "shop-1", "namespace": "shop"},
        "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}], "ports": [{"name": "https", "port": 8443}],
    }));
    let list = get(&fake, "/apis/discovery.k8s.io/v1/endpointslices").1;
    for slice in list["items"].as_array().unwrap() {
        assert_eq!(slice["endpoints"], json!([{"addresses": ["127.0.0.1"]}]));
        assert_eq!(slice["ports"][0]["port"], 10550);
    }
}

#[test]
fn a_token_has_the_form_of_a_jwt() {
    assert_eq!(token(&json!({"exp": 1})), "eyJhbGciOiJSUzI1NiJ9.eyJleHAiOjF9.c2lnbmF0dXJl");
}
