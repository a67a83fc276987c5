use std::{num::NonZeroU16, time::Instant};

use super::*;
use crate::{
    config::ServiceFilter,
    model::{
        Builder, Endpoint, EndpointPort, EndpointSet, Event, Kind, NamespacedName, Object, Place, Protocol, Service,
        ServiceKind, ServicePort, Subset,
    },
};

mod explained;
mod promises;
mod sites;
mod specification;

const DOMAIN: &str = "cluster.local";

fn settings() -> ZoneSettings {
    let addresses = vec!["169.254.96.16".parse().unwrap(), "fd00:96::16".parse().unwrap()];
    ZoneSettings { domain: DOMAIN.parse().unwrap(), addresses }
}

fn zone(table: &Arc<ServiceTable>) -> Zone {
    Zone::build(table, &settings(), None)
}

fn name(text: &str) -> NamespacedName {
    text.parse().unwrap()
}

/// `https/TCP/443`; the name may be empty.
fn port(text: &str) -> (Box<str>, Protocol, NonZeroU16) {
    let parts: Vec<&str> = text.split('/').collect();
    let protocol = match parts[1] {
        "TCP" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        "SCTP" => Protocol::Sctp,
        other => panic!("{other}"),
    };
    (parts[0].into(), protocol, parts[2].parse().unwrap())
}

fn service(of: &str, kind: ServiceKind, ips: &[&str], ports: &[&str]) -> Service {
    let port = |text: &&str| {
        let (name, protocol, port) = port(text);
        ServicePort { name, protocol, port, node_port: None }
    };
    Service {
        cluster_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        ports: ports.iter().map(port).collect(),
        ..Service::new(name(of), kind)
    }
}

/// `10.3.0.1`, `10.3.0.1 hostname`, `10.3.0.1 - unready` or `10.3.0.1 hostname unready`.
fn endpoint(text: &str) -> Endpoint {
    let words: Vec<&str> = text.split_whitespace().collect();
    let hostname = words.get(1).filter(|name| **name != "-").map(|name| Box::from(*name));
    let ready = words.get(2) != Some(&"unready");
    let place = Place { hostname, node: Some("edge1".into()), ..Place::default() };
    Endpoint { address: words[0].parse().unwrap(), ready, serving: ready, terminating: false, place: Arc::new(place) }
}

fn slice(of: &str, service: &str, ports: &[&str], endpoints: &[&str]) -> EndpointSet {
    let port = |text: &&str| {
        let (name, protocol, port) = port(text);
        EndpointPort { name, protocol, port }
    };
    let subset = Subset {
        ports: ports.iter().map(port).collect(),
        endpoints: endpoints.iter().map(|text| endpoint(text)).collect(),
    };
    EndpointSet { name: name(of), service: name(service), subsets: vec![subset] }
}

fn builder() -> Builder {
    Builder::new(ServiceFilter::UnlabelledOnly, "edge1")
}

fn put(builder: &mut Builder, services: &[Service], slices: &[EndpointSet]) {
    for service in services {
        builder.apply(Event::Apply(Object::Service(service.clone().into())));
    }
    for set in slices {
        builder.apply(Event::Apply(Object::EndpointSlice(set.clone().into())));
    }
}

fn wire(text: &str) -> Box<[u8]> {
    name::wire(text).unwrap_or_else(|| panic!("{text}"))
}

fn type_of(text: &str) -> u16 {
    match text {
        "A" => 1,
        "NS" => 2,
        "CNAME" => 5,
        "SOA" => 6,
        "PTR" => 12,
        "MX" => 15,
        "TXT" => 16,
        "AAAA" => 28,
        "SRV" => 33,
        "ANY" => 255,
        other => panic!("{other}"),
    }
}

fn printed(data: &Data<'_>) -> String {
    match data {
        Data::A(ip) => format!("A {ip}"),
        Data::Aaaa(ip) => format!("AAAA {ip}"),
        Data::Srv { priority, weight, port, target } => format!("SRV {priority} {weight} {port} {target}"),
        Data::Ptr(target) => format!("PTR {target}"),
        Data::Cname(target) => format!("CNAME {target}"),
        Data::Txt(text) => format!("TXT \"{}\"", text.escape_ascii()),
        Data::Soa(soa) => format!("SOA {} {}", soa.name_server, soa.mailbox),
        Data::Ns(target) => format!("NS {target}"),
    }
}

/// The answers, then the additional records behind a `+`; or the sort of answer.
fn ask(zone: &Zone, name: &str, of_type: &str) -> Vec<String> {
    match zone.find(&wire(name), type_of(of_type)) {
        Found::Foreign => vec!["FORWARD".to_owned()],
        Found::NoSuchName => vec!["NXDOMAIN".to_owned()],
        Found::NoData => vec!["NODATA".to_owned()],
        Found::NotYet => vec!["SERVFAIL".to_owned()],
        Found::Answers(answers) => {
            let print = |record: Record<'_>| match record.owner {
                Owner::Question => printed(&record.data),
                Owner::Name(owner) => format!("+ {owner} {}", printed(&record.data)),
            };
            answers.answers().map(print).chain(answers.additionals().map(print)).collect()
        }
    }
}

#[test]
fn a_domain_is_read_in_any_case_and_with_a_final_dot() {
    for text in ["cluster.local", "Cluster.LOCAL."] {
        let domain: ClusterDomain = text.parse().unwrap();
        assert_eq!((domain.as_wire(), domain.to_string()), (&b"\x07cluster\x05local\x00"[..], DOMAIN.to_owned()));
        assert_eq!(domain, ClusterDomain::default());
    }
    let long = ["x".repeat(63).as_str(), "y".repeat(63).as_str()].join(".");
    for text in ["", ".", "a..b", ".local", "a b", "b\u{fc}cher", &"x".repeat(64), &long] {
        let error = text.parse::<ClusterDomain>().unwrap_err().to_string();
        assert!(error.starts_with(&format!("{text:?} is not a cluster domain")), "{error}");
    }
}

#[test]
fn what_no_name_can_be_made_of_is_left_out() {
    let mut builder = builder();
    let ip = ["10.96.0.1"];
    for of in ["shop/a.b", "shop.x/web", &format!("shop/{}", "x".repeat(64)), "shop/fine"] {
        put(&mut builder, &[service(of, ServiceKind::ClusterIp, &ip, &[])], &[]);
    }
    builder.apply(Event::Synced);
    let table = builder.build().unwrap();
    let zone = zone(&table);
    assert_eq!(ask(&zone, "fine.shop.svc.cluster.local", "A"), ["A 10.96.0.1"]);
    assert_eq!(ask(&zone, "a.b.shop.svc.cluster.local", "A"), ["NXDOMAIN"]);
    assert_eq!(ask(&zone, "web.shop.x.svc.cluster.local", "A"), ["NXDOMAIN"]);
    // 191 bytes and more leave no room for the name of an endpoint.
    let domain: ClusterDomain = ["x".repeat(63), "y".repeat(61)].join(".").parse().unwrap();
    let long = ZoneSettings { domain, ..settings() };
    let zone = Zone::build(&table, &long, None);
    assert_eq!(ask(&zone, &format!("fine.shop.svc.{}", long.domain), "A"), ["A 10.96.0.1"]);
    put(&mut builder, &[service(&format!("shop/{}", "x".repeat(63)), ServiceKind::ClusterIp, &ip, &[])], &[]);
    let zone = Zone::build(&builder.build().unwrap(), &long, None);
    assert_eq!(ask(&zone, &format!("{}.shop.svc.{}", "x".repeat(63), long.domain), "A"), ["NXDOMAIN"]);
}

#[test]
fn before_everything_is_delivered_only_what_is_known_is_answered() {
    let mut builder = builder();
    let web = service("shop/web", ServiceKind::ClusterIp, &["10.96.0.1"], &["http/TCP/80"]);
    let db = service("shop/db", ServiceKind::Headless, &[], &["sql/TCP/5432"]);
    put(&mut builder, &[web, db], &[]);
    let zone = zone(&builder.build().unwrap());
    for (name, of_type, expected) in [
        ("web.shop.svc.cluster.local", "A", "A 10.96.0.1"),
        ("web.shop.svc.cluster.local", "AAAA", "NODATA"),
        ("shop.svc.cluster.local", "A", "NODATA"),
        ("other.shop.svc.cluster.local", "A", "SERVFAIL"),
        ("other.svc.cluster.local", "A", "SERVFAIL"),
        ("web-0.web.shop.svc.cluster.local", "A", "SERVFAIL"),
        // Its endpoints may be still to come.
        ("db.shop.svc.cluster.local", "A", "SERVFAIL"),
        ("_sql._tcp.db.shop.svc.cluster.local", "SRV", "SERVFAIL"),
        // These do not depend on what is delivered.
        ("dns-version.cluster.local", "TXT", "TXT \"1.1.0\""),
        ("www.example.org.cluster.local", "A", "NXDOMAIN"),
        ("x.y.z.web.shop.svc.cluster.local", "A", "NXDOMAIN"),
        ("nonsense.shop.pod.cluster.local", "A", "NXDOMAIN"),
        ("10-0-0-1.shop.pod.cluster.local", "A", "A 10.0.0.1"),
        ("www.example.org", "A", "FORWARD"),
        ("1.1.96.10.in-addr.arpa", "PTR", "FORWARD"),
    ] {
        assert_eq!(ask(&zone, name, of_type), [expected], "{name} {of_type}");
    }
}

#[test]
fn a_change_of_one_service_shares_all_others() {
    let mut builder = builder();
    let names: Vec<String> = (0..1000).map(|n| format!("ns{}/svc{n}", n % 10)).collect();
    for (n, of) in names.iter().enumerate() {
        let ip = format!("10.96.{}.{}", n / 250, n % 250 + 1);
        put(&mut builder, &[service(of, ServiceKind::ClusterIp, &[&ip], &["http/TCP/80"])], &[]);
    }
    builder.apply(Event::Synced);
    let before = zone(&builder.build().unwrap());
    put(&mut builder, &[service("ns7/svc7", ServiceKind::ClusterIp, &["10.97.0.1"], &[])], &[]);
    let table = builder.build().unwrap();
    let after = Zone::build(&table, &settings(), Some(&before));
    assert_eq!(ask(&before, "svc7.ns7.svc.cluster.local", "A"), ["A 10.96.0.8"]);
    assert_eq!(ask(&after, "svc7.ns7.svc.cluster.local", "A"), ["A 10.97.0.1"]);
    assert_eq!(ask(&after, "8.0.96.10.in-addr.arpa", "PTR"), ["FORWARD"]);
    assert_eq!(after.soa().serial, before.soa().serial + 1);
    let (shared, all) = after.index.shared_with(&before.index);
    assert_eq!((shared, all), (999, 1000));
    // A zone of other settings is another zone.
    let other = ZoneSettings { domain: "other.test".parse().unwrap(), ..settings() };
    let moved = Zone::build(&table, &other, Some(&after));
    assert_eq!(ask(&moved, "svc7.ns7.svc.other.test", "A"), ["A 10.97.0.1"]);
    assert_eq!(ask(&moved, "svc7.ns7.svc.cluster.local", "A"), ["FORWARD"]);
}

#[test]
fn of_many_endpoints_each_is_first_in_its_turn_and_a_question_costs_what_is_answered() {
    /// Asks for the first 29 records, which is what fits into a datagram, at 1,000 turns.
    fn ask(zone: &Zone, name: &str, of_type: u16) -> (std::collections::BTreeSet<String>, std::time::Duration) {
        let (name, mut first) = (wire(name), std::collections::BTreeSet::new());
        let started = Instant::now();
        for turn in 0..1000 {
            let Found::Answers(answers) = zone.find(&name, of_type) else { panic!("no answers") };
            let records: Vec<Record<'_>> = answers.turned(turn).take(29).collect();
            first.insert(printed(&records[0].data));
        }
        (first, started.elapsed())
    }
    let mut builder = builder();
    for (of, endpoints) in [("shop/few", 50), ("shop/many", 10_000)] {
        let ips: Vec<String> = (0..endpoints).map(|n| format!("10.{}.{}.1", n / 250, n % 250)).collect();
        let ips: Vec<&str> = ips.iter().map(String::as_str).collect();
        put(
            &mut builder,
            &[service(of, ServiceKind::Headless, &[], &["sql/TCP/5432", "web/TCP/80"])],
            &[slice(&format!("{of}-0"), of, &["sql/TCP/5432", "web/TCP/80"], &ips)],
        );
    }
    builder.apply(Event::Synced);
    let zone = zone(&builder.build().unwrap());
    for (prefix, of_type, few_records) in [("", "A", 50), ("", "SRV", 100), ("_web._tcp.", "SRV", 50)] {
        let of = |name: &str| format!("{prefix}{name}.shop.svc.cluster.local");
        let times = (0..5).map(|_| {
            let (few, took_few) = ask(&zone, &of("few"), type_of(of_type));
            let (many, took_many) = ask(&zone, &of("many"), type_of(of_type));
            assert_eq!((few.len(), many.len()), (few_records, 1000), "{prefix}{of_type}: each in its turn");
            took_many.as_secs_f64() / took_few.as_secs_f64()
        });
        let ratio = times.fold(f64::INFINITY, f64::min);
        // A walk over all of them costs a hundred times as much.
        assert!(ratio < 5.0, "{prefix}{of_type}: 10,000 endpoints cost {ratio} times what 50 do");
    }
}

#[test]
fn whichever_turns_a_name_gets_its_endpoints_have_even_shares_of_them() {
    let mut builder = builder();
    let ips = ["10.3.0.1", "10.3.0.2", "10.3.0.3"];
    let db = service("shop/db", ServiceKind::Headless, &[], &["sql/TCP/5432"]);
    put(&mut builder, &[db], &[slice("shop/db-0", "shop/db", &["sql/TCP/5432"], &ips)]);
    builder.apply(Event::Synced);
    let zone = zone(&builder.build().unwrap());
    let Found::Answers(answers) = zone.find(&wire("db.shop.svc.cluster.local"), 1) else { panic!("no answers") };
    for step in 1..=12 {
        let mut firsts = std::collections::BTreeMap::new();
        for turn in (0..).step_by(step).take(300) {
            *firsts.entry(printed(&answers.turned(turn).next().unwrap().data)).or_insert(0) += 1;
        }
        assert!(firsts.len() == 3 && firsts.values().all(|n| (85..=115).contains(n)), "every {step}th: {firsts:?}");
    }
}

#[test]
fn a_namespace_is_known_while_it_has_services() {
    let mut builder = builder();
    let web = service("shop/web", ServiceKind::ClusterIp, &["10.96.0.1"], &[]);
    put(&mut builder, &[web, service("shop/db", ServiceKind::ClusterIp, &["10.96.0.2"], &[])], &[]);
    builder.apply(Event::Synced);
    let mut now = zone(&builder.build().unwrap());
    assert_eq!(ask(&now, "shop.svc.cluster.local", "A"), ["NODATA"]);
    for (gone, expected) in [("shop/db", "NODATA"), ("shop/web", "NXDOMAIN")] {
        builder.apply(Event::Delete(Kind::Service, name(gone)));
        now = Zone::build(&builder.build().unwrap(), &settings(), Some(&now));
        assert_eq!(ask(&now, "shop.svc.cluster.local", "A"), [expected], "without {gone}");
    }
}

#[test]
fn a_change_in_a_large_cluster_costs_a_small_part_of_it() {
    let mut builder = builder();
    for n in 0..10_000 {
        let (of, ip) = (format!("ns{}/svc{n}", n % 100), format!("10.96.{}.{}", n / 250, n % 250 + 1));
        put(&mut builder, &[service(&of, ServiceKind::ClusterIp, &[&ip], &["http/TCP/80"])], &[]);
    }
    let table = builder.build().unwrap();
    let started = Instant::now();
    let mut now = zone(&table);
    let whole = started.elapsed();
    let times = (0..20).map(|n| {
        put(&mut builder, &[service("ns7/svc7", ServiceKind::ClusterIp, &[&format!("10.97.0.{n}")], &[])], &[]);
        let table = builder.build().unwrap();
        let started = Instant::now();
        now = Zone::build(&table, &settings(), Some(&now));
        started.elapsed()
    });
    let change = times.min().unwrap();
    println!("{whole:?} for all, {change:?} for a change");
    assert!(change * 20 < whole, "{change:?} of {whole:?}");
}
