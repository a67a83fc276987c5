mod crossing;

use std::{num::NonZeroU16, sync::Arc, time::Duration};

use super::*;
use crate::{
    config::ServiceFilter,
    model::{
        Builder, Endpoint, EndpointPort, EndpointSet, Event, NamespacedName, Object, Place, Protocol, Service,
        ServiceKind, ServicePort, SessionAffinity, Subset,
    },
    show,
};

fn port(name: &str, protocol: Protocol, number: u16) -> ServicePort {
    ServicePort { name: name.into(), protocol, port: NonZeroU16::new(number).unwrap(), node_port: None }
}

fn name(text: &str) -> NamespacedName {
    NamespacedName::new("default", text)
}

fn service(of: &str, ip: &str) -> Service {
    Service {
        cluster_ips: vec![ip.parse().unwrap()],
        ports: vec![port("http", Protocol::Tcp, 80)],
        ..Service::new(name(of), ServiceKind::ClusterIp)
    }
}

fn endpoint(ip: &str, node: &str, ready: bool) -> Endpoint {
    let place = Arc::new(Place { node: Some(node.into()), ..Place::default() });
    Endpoint { address: ip.parse().unwrap(), ready, serving: ready, terminating: false, place }
}

fn slice(service: &str, endpoints: Vec<Endpoint>) -> Event {
    let ports =
        vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: NonZeroU16::new(8080).unwrap() }];
    let set = EndpointSet { name: name(service), service: name(service), subsets: vec![Subset { ports, endpoints }] };
    Event::Apply(Object::EndpointSlice(set.into()))
}

fn table(services: Vec<Service>, slices: Vec<Event>) -> Arc<ServiceTable> {
    let mut builder = Builder::new(ServiceFilter::UnlabelledOnly, "edge1");
    let services = services.into_iter().map(|service| Event::Apply(Object::Service(service.into())));
    services.chain(slices).chain([Event::Synced]).for_each(|event| builder.apply(event));
    builder.build().unwrap()
}

/// `default/web` with two ready endpoints and one that is not.
fn web(change: impl FnOnce(&mut Service)) -> Arc<ServiceTable> {
    let mut web = service("web", "10.96.0.10");
    change(&mut web);
    let endpoints = vec![
        endpoint("10.244.1.1", "edge1", true),
        endpoint("10.244.2.1", "edge2", true),
        endpoint("10.244.2.2", "edge2", false),
    ];
    table(vec![web], vec![slice("web", endpoints)])
}

fn at(addr: &str) -> FrontendAddr {
    FrontendAddr { addr: addr.parse().unwrap(), protocol: Protocol::Tcp }
}

fn shares(backends: &[&str]) -> InForce {
    let backends: Vec<SocketAddr> = backends.iter().map(|backend| backend.parse().unwrap()).collect();
    InForce::Frontend { shares: equal_shares(&backends), choice: None }
}

const BOTH: [&str; 2] = ["10.244.1.1:8080", "10.244.2.1:8080"];

fn facts(table: &ServiceTable, addr: &str, kernel: InForce) -> TraceReport {
    trace(Facts { table, at: at(addr), kernel: Some(Ok(kernel)), cgroup: "/sys/fs/cgroup".to_owned(), client: None })
}

fn pod() -> Client {
    Client {
        process: 42,
        command: "app".to_owned(),
        namespace: 4_026_531_999,
        cookie: Some(7),
        host_network: false,
        cgroup: "/kubepods/a".to_owned(),
        served: Served::Yes,
    }
}

#[test]
fn a_frontend_is_told_with_its_endpoints_and_their_chances() {
    let report = facts(&web(|_| {}), "10.96.0.10:80", shares(&BOTH));
    assert_eq!((report.outcome, report.kernel.state), (Outcome::Forwarded, KernelState::Same));
    assert_eq!(report.answer, "sent to one of 2 backends, each with a chance of 1/2");
    let frontend = report.frontend.as_ref().unwrap();
    assert_eq!((frontend.service.as_str(), frontend.kind.as_str(), frontend.port), ("web", "ClusterIP", 80));
    let rows: Vec<_> =
        report.endpoints.iter().map(|e| (e.eligible, e.in_kernel, e.chance, e.reason.as_str())).collect();
    let (yes, no) = ((true, Some(true), 0.5, "ready"), (false, Some(false), 0.0, "not ready"));
    assert_eq!(rows, [yes, yes, no]);
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    let shown = show::trace(&report);
    for part in [
        "10.96.0.10:80/TCP is a ClusterIP frontend of default/web, port 80 'http'\n",
        "  policy  internal traffic Cluster, no session affinity, balance random\n",
        "  kernel  has the same set in force\n",
        "  connect sent to one of 2 backends, each with a chance of 1/2\n",
        "10.244.2.2:8080  edge2  -     no        no         0       not ready\n",
    ] {
        assert!(shown.contains(part), "{part} in\n{shown}");
    }
}

#[test]
fn what_is_refused_and_what_is_left_alone_are_told_apart() {
    let table = web(|_| {});
    let unknown = facts(&table, "10.96.0.10:9999", InForce::ServiceAddress);
    assert_eq!((unknown.outcome, unknown.kernel.state), (Outcome::Refused, KernelState::Same));
    assert!(unknown.answer.contains("belongs to default/web, which does not have this port"), "{}", unknown.answer);
    assert_eq!(unknown.notes, ["on this address default/web answers on 80/TCP"]);

    let elsewhere = facts(&table, "192.0.2.1:80", InForce::Nothing);
    assert_eq!((elsewhere.outcome, elsewhere.kernel.state), (Outcome::Untouched, KernelState::Same));
    assert!(elsewhere.notes.is_empty(), "{:?}", elsewhere.notes);

    let endpoint = facts(&table, "10.244.1.1:8080", InForce::Nothing);
    assert_eq!(endpoint.notes, ["it is an endpoint of default/web, port 80: connections go straight there"]);
}

#[test]
fn a_service_without_endpoints_is_refused_with_a_hint() {
    let table = table(vec![service("empty", "10.96.0.11")], vec![]);
    let report = facts(&table, "10.96.0.11:80", shares(&[]));
    assert_eq!((report.outcome, report.kernel.state), (Outcome::Refused, KernelState::Same));
    assert!(report.answer.ends_with("no endpoint is eligible"), "{}", report.answer);
    assert!(report.notes[0].contains("no endpoint for this port"), "{:?}", report.notes);
}

#[test]
fn a_kernel_that_holds_something_else_decides_and_is_flagged() {
    let report = facts(&web(|_| {}), "10.96.0.10:80", shares(&["10.244.1.1:8080", "10.244.9.9:8080"]));
    assert_eq!(report.kernel.state, KernelState::Different);
    assert_eq!(report.kernel.missing, ["10.244.2.1:8080".parse().unwrap()]);
    assert_eq!(report.kernel.extra, ["10.244.9.9:8080".parse().unwrap()]);
    let gone = report.endpoints.iter().find(|endpoint| endpoint.address.to_string() == "10.244.9.9:8080").unwrap();
    assert_eq!((gone.eligible, gone.in_kernel, gone.chance), (false, Some(true), 0.5));
    let shown = show::trace(&report);
    assert!(shown.contains("DIFFERS, does not have 10.244.2.1:8080, still has 10.244.9.9:8080"), "{shown}");

    let missing = facts(&web(|_| {}), "10.96.0.10:80", InForce::Nothing);
    assert_eq!((missing.outcome, missing.kernel.state), (Outcome::Untouched, KernelState::Different));
}

#[test]
fn a_kernel_that_cannot_be_read_is_answered_for_by_the_table() {
    let table = web(|_| {});
    let facts = |kernel| Facts { table: &table, at: at("10.96.0.10:80"), kernel, cgroup: String::new(), client: None };
    let report = trace(facts(Some(Err("it is busy".to_owned()))));
    assert_eq!((report.outcome, report.kernel.state), (Outcome::Forwarded, KernelState::Unknown));
    assert!(report.notes[0].contains("it is busy"), "{:?}", report.notes);
    assert!(report.endpoints.iter().all(|endpoint| endpoint.in_kernel.is_none()));
    let off = trace(facts(None));
    assert_eq!((off.outcome, off.kernel.state), (Outcome::Untouched, KernelState::Off));
}

#[test]
fn affinity_says_where_a_client_goes_and_for_how_long() {
    let table = web(|web| web.affinity = SessionAffinity::ClientIp { timeout: 300.try_into().unwrap() });
    let anybody = facts(&table, "10.96.0.10:80", shares(&BOTH));
    assert_eq!(anybody.frontend.unwrap().policy.affinity_seconds, Some(300));
    assert!(anybody.answer.contains("--from-pod says where that is"), "{}", anybody.answer);

    let choice =
        Choice { backend: BOTH[1].parse().unwrap(), by: ChosenBy::Affinity { left: Duration::from_secs(125) } };
    let InForce::Frontend { shares, .. } = shares(&BOTH) else { panic!("no frontend") };
    let kernel = Some(Ok(InForce::Frontend { shares, choice: Some(choice) }));
    let client = Some(("web-0".to_owned(), pod()));
    let report = trace(Facts { table: &table, at: at("10.96.0.10:80"), kernel, cgroup: String::new(), client });
    assert!(
        report.answer.starts_with("sent to 10.244.2.1:8080, where the client was before; kept there for 2m5s"),
        "{}",
        report.answer
    );
    assert_eq!(report.choice.as_ref().unwrap().kept_seconds, Some(125));
    assert_eq!(report.endpoints.iter().map(|endpoint| endpoint.chance).collect::<Vec<_>>(), [0.0, 1.0, 0.0]);
    let shown = show::trace(&report);
    assert!(
        shown.contains("client  web-0: process 42 (app), network namespace 4026531999 with cookie 7, served"),
        "{shown}"
    );
}

#[test]
fn a_client_outside_the_served_cgroup_is_not_translated() {
    let table = web(|_| {});
    let client = Some(("42".to_owned(), Client { served: Served::No, ..pod() }));
    let facts = Facts {
        table: &table,
        at: at("10.96.0.10:80"),
        kernel: Some(Ok(shares(&BOTH))),
        cgroup: "/sys/fs/cgroup/served".to_owned(),
        client,
    };
    let report = trace(facts);
    assert_eq!(report.outcome, Outcome::Untouched);
    assert!(report.notes[0].contains("/kubepods/a, which is not below /sys/fs/cgroup/served"), "{:?}", report.notes);
    assert!(report.endpoints.iter().all(|endpoint| endpoint.chance == 0.0));
}

#[test]
fn who_else_wants_an_address_and_why_it_is_not_served_is_explained() {
    let mut filtered = service("filtered", "10.96.0.20");
    filtered.proxy_labels.standard = true;
    let mut sctp = service("sctp", "10.96.0.21");
    sctp.ports = vec![port("", Protocol::Sctp, 132)];
    let table = table(vec![service("a", "10.96.0.10"), service("b", "10.96.0.10"), filtered, sctp], vec![]);
    for (addr, part) in [
        ("10.96.0.10:80", "default/b wants this address and port too; default/a has it"),
        ("10.96.0.20:80", "default/filtered has this address, and is left to another proxy"),
        ("10.96.0.21:132", "SCTP is not supported"),
    ] {
        let report = facts(&table, addr, InForce::Nothing);
        assert!(report.notes.iter().any(|note| note.contains(part)), "{part} in {:?}", report.notes);
    }
}

#[test]
fn targets_are_addresses_or_ports_of_services() {
    for (text, shown) in [
        ("10.96.0.10:80", "10.96.0.10:80"),
        ("10.96.0.10:80/udp", "10.96.0.10:80/UDP"),
        ("[fd00::10]:53/TCP", "[fd00::10]:53/TCP"),
        ("[::ffff:10.96.0.10]:80", "10.96.0.10:80"),
        ("default/web", "default/web"),
        ("default/web:80", "default/web:80"),
        ("default/web:http/tcp", "default/web:http/TCP"),
        ("default/tcp", "default/tcp"),
    ] {
        let target: Target = text.parse().unwrap();
        assert_eq!(target.to_string(), shown, "{text}");
        assert_eq!(shown.parse::<Target>().unwrap(), target, "what goes over the socket is read as it was meant");
    }
    for wrong in
        ["", "10.96.0.10", "web", "web:80", "a/b/c", "default/web:", "default/we b", "10.96.0.10:99999", "a/b&c=d"]
    {
        assert!(wrong.parse::<Target>().is_err(), "{wrong}");
    }
}

#[test]
fn a_target_stands_for_one_address_or_says_which_it_could() {
    let mut dns = service("dns", "10.96.0.53");
    dns.ports =
        vec![port("dns", Protocol::Udp, 53), port("dns-tcp", Protocol::Tcp, 53), port("m", Protocol::Tcp, 9153)];
    let mut udp = service("udp", "10.96.0.54");
    udp.ports = vec![port("", Protocol::Udp, 53)];
    let headless = Service::new(name("headless"), ServiceKind::Headless);
    let table = table(vec![dns, udp, headless], vec![]);
    let resolve = |text: &str| text.parse::<Target>().unwrap().resolve(&table);
    for (text, expected) in [
        ("default/dns:53", "10.96.0.53:53/TCP"),
        ("default/dns:53/udp", "10.96.0.53:53/UDP"),
        ("default/dns:dns", "10.96.0.53:53/UDP"),
        ("default/udp", "10.96.0.54:53/UDP"),
        ("10.96.0.54:53", "10.96.0.54:53/UDP"),
        ("10.96.0.53:53", "10.96.0.53:53/TCP"),
        ("192.0.2.1:53", "192.0.2.1:53/TCP"),
    ] {
        assert_eq!(resolve(text).unwrap().to_string(), expected, "{text}");
    }
    for (text, part) in [
        ("default/dns", "name one: default/dns:53/UDP, default/dns:53/TCP, default/dns:9153/TCP"),
        ("default/dns:80", "has no port 80; it has default/dns:53/UDP"),
        ("default/none", "no Service default/none is known"),
        ("default/headless", "answers on no address"),
    ] {
        let error = resolve(text).unwrap_err().to_string();
        assert!(error.contains(part), "{part} in {error}");
    }
}
