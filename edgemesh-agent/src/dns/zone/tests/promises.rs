//! Against a plain model: all records of a table in one map, as the specification lists them.

use std::collections::{BTreeMap, BTreeSet};

use proptest::{collection::vec, option, prelude::*, sample::subsequence};

use super::*;
use crate::model::ServiceEntry;

type Everything = BTreeMap<String, BTreeSet<String>>;

const PORTS: [&str; 4] = ["http/TCP/80", "/TCP/81", "dns/UDP/80", "http/UDP/82"];

fn a_service() -> impl Strategy<Value = Object> {
    let of = (prop_oneof![Just("x"), Just("y")], 0u8..4).prop_map(|(namespace, n)| format!("{namespace}/s{n}"));
    let kind = prop_oneof![
        Just(ServiceKind::ClusterIp),
        Just(ServiceKind::NodePort),
        Just(ServiceKind::Headless),
        Just(ServiceKind::Headless),
        Just(ServiceKind::ExternalName)
    ];
    let ip = prop_oneof![(0u8..3).prop_map(|n| format!("10.96.0.{n}")), (0u8..3).prop_map(|n| format!("fd00::{n}"))];
    let ips = proptest::collection::btree_set(ip, 0..3);
    let external = option::of(prop_oneof![Just("www.example.org"), Just("s1.x.svc.cluster.local")]);
    (of, kind, ips, subsequence(PORTS.to_vec(), 0..=4), any::<bool>(), external).prop_map(
        |(of, kind, ips, ports, publish_not_ready, external_name)| {
            let has_ips = !matches!(kind, ServiceKind::Headless | ServiceKind::ExternalName);
            let ips: Vec<&str> = ips.iter().filter(|_| has_ips).map(String::as_str).collect();
            let external_name = external_name.map(Box::from);
            Object::Service(Service { publish_not_ready, external_name, ..service(&of, kind, &ips, &ports) }.into())
        },
    )
}

fn a_slice() -> impl Strategy<Value = Object> {
    let ip = prop_oneof![(0u8..4).prop_map(|n| format!("10.244.0.{n}")), (0u8..3).prop_map(|n| format!("fd01::{n}"))];
    let hostname = prop_oneof![Just("-"), Just("-"), Just("h0"), Just("h1")];
    let endpoint = (ip, hostname, prop_oneof![Just(""), Just(""), Just("unready")])
        .prop_map(|(ip, hostname, ready)| format!("{ip} {hostname} {ready}"));
    let service = (prop_oneof![Just("x"), Just("y")], 0u8..4);
    (0u8..6, service, subsequence(PORTS.to_vec(), 0..=4), any::<bool>(), vec(endpoint, 0..5)).prop_map(
        |(n, (namespace, service), ports, moved, endpoints)| {
            let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
            let ports: Vec<String> =
                ports.iter().map(|port| if moved { format!("{port}8") } else { (*port).into() }).collect();
            let ports: Vec<&str> = ports.iter().map(String::as_str).collect();
            let (of, service) = (format!("{namespace}/slice{n}"), format!("{namespace}/s{service}"));
            Object::EndpointSlice(slice(&of, &service, &ports, &endpoints).into())
        },
    )
}

fn an_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => a_service().prop_map(Event::Apply),
        4 => a_slice().prop_map(Event::Apply),
        1 => a_service().prop_map(|service| Event::Delete(Kind::Service, service.name().clone())),
        1 => a_slice().prop_map(|set| Event::Delete(Kind::EndpointSlice, set.name().clone())),
        1 => vec(a_service(), 0..4).prop_map(|all| Event::Replace(Kind::Service, all)),
        1 => Just(Event::Synced),
    ]
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    vec(an_event(), 0..30)
}

fn address(ip: IpAddr) -> String {
    if ip.is_ipv4() { format!("A {ip}") } else { format!("AAAA {ip}") }
}

fn dashed(ip: IpAddr) -> String {
    let text = ip.to_string().replace(['.', ':'], "-");
    if text.ends_with('-') { text + "0" } else { text }
}

fn reverse_name(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        IpAddr::V6(ip) => {
            let digits = ip.octets().map(|octet| format!("{octet:02x}")).concat();
            let reversed: Vec<String> = digits.chars().rev().map(String::from).collect();
            format!("{}.ip6.arpa", reversed.join("."))
        }
    }
}

/// Every record of a Service, by owner.
fn add(entry: &ServiceEntry, all: &mut Everything, reverse: &mut [Everything; 2]) {
    let NamespacedName { namespace, name } = &entry.service.name;
    let owner = format!("{name}.{namespace}.svc.{DOMAIN}");
    let mut put = |owner: String, record: String| {
        all.entry(owner).or_default().insert(record);
    };
    let of_port = |port: &ServicePort| {
        let protocol = port.protocol.to_string().to_lowercase();
        (!port.name.is_empty()).then(|| format!("_{}._{protocol}.{owner}", port.name))
    };
    let label = |ip: IpAddr, place: &Place| place.hostname.as_deref().map_or_else(|| dashed(ip), str::to_owned);
    match entry.service.kind {
        ServiceKind::ExternalName => {
            if let Some(target) = &entry.service.external_name {
                put(owner, format!("CNAME {target}."));
            }
        }
        ServiceKind::Headless => {
            for port in &entry.ports {
                for endpoint in port.endpoints.iter().filter(|endpoint| endpoint.ready) {
                    let name = format!("{}.{owner}", label(endpoint.addr.ip(), &endpoint.place));
                    let record = format!("SRV 0 100 {} {name}.", endpoint.addr.port());
                    put(owner.clone(), record.clone());
                    if let Some(owner) = of_port(&port.port) {
                        put(owner, record);
                    }
                }
            }
            let in_ports = entry.ports.iter().flat_map(|port| &port.endpoints).filter(|endpoint| endpoint.ready);
            let in_ports = in_ports.map(|endpoint| (endpoint.addr.ip(), &endpoint.place));
            let portless = entry.portless.iter().filter(|endpoint| endpoint.ready).map(|e| (e.ip, &e.place));
            for (ip, place) in in_ports.chain(portless) {
                let name = format!("{}.{owner}", label(ip, place));
                put(owner.clone(), address(ip));
                put(name.clone(), address(ip));
                reverse[1].entry(reverse_name(ip)).or_default().insert(format!("PTR {name}."));
            }
        }
        ServiceKind::ClusterIp | ServiceKind::NodePort | ServiceKind::LoadBalancer => {
            for &ip in &entry.service.cluster_ips {
                put(owner.clone(), address(ip));
                reverse[0].entry(reverse_name(ip)).or_default().insert(format!("PTR {owner}."));
                for port in &entry.service.ports {
                    let record = format!("SRV 0 100 {} {owner}.", port.port);
                    put(owner.clone(), record.clone());
                    if let Some(owner) = of_port(port) {
                        put(owner, record);
                    }
                }
            }
            for endpoint in entry.ports.iter().flat_map(|port| &port.endpoints).filter(|endpoint| endpoint.ready) {
                let ip = endpoint.addr.ip();
                put(format!("{}.{owner}", label(ip, &endpoint.place)), address(ip));
            }
        }
    }
}

fn everything(table: &ServiceTable) -> Everything {
    let (mut all, mut reverse) = (Everything::new(), [Everything::new(), Everything::new()]);
    for entry in &table.services {
        add(entry, &mut all, &mut reverse);
    }
    let [cluster_ips, mut endpoints] = reverse;
    endpoints.extend(cluster_ips);
    all.extend(endpoints);
    all
}

proptest! {
    #[test]
    fn every_promised_name_is_found_and_nothing_else(events in events()) {
        let mut builder = builder();
        events.into_iter().chain([Event::Synced]).for_each(|event| builder.apply(event));
        let table = builder.build().unwrap();
        let zone = zone(&table);
        let all = everything(&table);
        for (owner, records) in &all {
            for of_type in ["A", "AAAA", "SRV", "PTR", "CNAME", "TXT", "MX"] {
                let cname = records.iter().any(|record| record.starts_with("CNAME"));
                let expected: BTreeSet<String> =
                    records.iter().filter(|record| cname || record.starts_with(&format!("{of_type} "))).cloned().collect();
                let found = ask(&zone, owner, of_type);
                let (additional, found): (Vec<String>, Vec<String>) = found.into_iter().partition(|r| r.starts_with('+'));
                let unique: BTreeSet<String> = found.iter().cloned().collect();
                prop_assert_eq!(found.len(), unique.len(), "{} {}: {:?}", owner, of_type, found);
                if expected.is_empty() {
                    prop_assert_eq!(&found, &["NODATA"], "{} {}", owner, of_type);
                } else {
                    prop_assert_eq!(&unique, &expected, "{} {}", owner, of_type);
                }
                // All addresses of all targets, each once.
                let mut promised = BTreeSet::new();
                for target in expected.iter().filter(|r| r.starts_with("SRV")).map(|r| r.rsplit(' ').next().unwrap()) {
                    let addresses = all[target.trim_end_matches('.')].iter().filter(|r| r.starts_with('A'));
                    promised.extend(addresses.map(|address| format!("+ {target} {address}")));
                }
                prop_assert_eq!(additional.len(), promised.len(), "{} {}", owner, of_type);
                prop_assert_eq!(additional.into_iter().collect::<BTreeSet<_>>(), promised, "{} {}", owner, of_type);
            }
            let below = format!("zz.{owner}");
            if owner.ends_with(".arpa") {
                prop_assert_eq!(ask(&zone, &below, "PTR"), ["FORWARD"], "{}", below);
                continue;
            }
            prop_assert_eq!(ask(&zone, &below, "A"), ["NXDOMAIN"], "{}", below);
            let mut above = owner.as_str();
            while let Some((_, parent)) = above.split_once('.') && parent != DOMAIN {
                prop_assert_ne!(ask(&zone, parent, "A"), ["NXDOMAIN"], "{} exists", owner);
                above = parent;
            }
        }
        // Names of all forms that are not promised.
        let (services, parents) = (0..5, ["x", "y", "z"]);
        for owner in services.flat_map(|n| parents.map(|namespace| format!("s{n}.{namespace}.svc.{DOMAIN}"))) {
            for below in ["", "h0.", "h1.", "h2.", "10-244-0-1.", "fd01--1.", "fd01--0.", "_http._tcp.", "_dns._udp.", "_x._udp."] {
                let name = format!("{below}{owner}");
                let exists = all.contains_key(&name) || (below.is_empty() && is_bare(&table, &owner));
                if !exists {
                    prop_assert_eq!(ask(&zone, &name, "A"), ["NXDOMAIN"], "{}", name);
                }
            }
        }
    }

    #[test]
    fn a_zone_does_not_depend_on_those_before_it(steps in vec(events(), 0..6)) {
        let mut builder = builder();
        let mut now: Option<Zone> = None;
        for step in steps {
            step.into_iter().for_each(|event| builder.apply(event));
            let Some(table) = builder.build() else { continue };
            let next = Zone::build(&table, &settings(), now.as_ref());
            prop_assert_eq!(next.index.dump(), zone(&table).index.dump());
            now = Some(next);
        }
    }

    #[test]
    fn no_question_does_harm(
        events in events(),
        bytes in vec(any::<u8>(), 0..300),
        words in vec(prop_oneof![
            Just("s0"), Just("s1"), Just("x"), Just("y"), Just("svc"), Just("pod"), Just("dns"), Just("ns"), Just("_tcp"),
            Just("_http"), Just("h0"), Just("h1"), Just("10-244-0-1"), Just("fd01--1"), Just("1"), Just("0"), Just("-"),
            Just("cluster"), Just("local"), Just("in-addr"), Just("ip6"), Just("arpa"), Just("*"), Just("\u{7}cluster"),
        ], 0..9),
        of_zone in any::<bool>(),
        of_type in prop_oneof![0u16..40, 250u16..260, any::<u16>()],
    ) {
        let mut builder = builder();
        events.into_iter().chain([Event::Synced]).for_each(|event| builder.apply(event));
        let zone = zone(&builder.build().unwrap());
        let mut name: Vec<u8> = Vec::new();
        for word in words {
            name.push(u8::try_from(word.len()).unwrap());
            name.extend(word.bytes());
        }
        name.extend_from_slice(if of_zone { zone.domain().as_wire() } else { b"\0" });
        for name in [&name[..], &bytes, &[&bytes[..], &name].concat()] {
            zone.explain(name, of_type);
            if let Found::Answers(answers) = zone.find(name, of_type) {
                prop_assert!(answers.answers().next().is_some());
                let all: Vec<Record<'_>> = answers.answers().collect();
                let turned = [1, 2, 7, usize::MAX].map(|turn| answers.turned(turn).collect::<Vec<_>>());
                prop_assert!(turned.iter().all(|turned| turned.len() == all.len() && all.iter().all(|r| turned.contains(r))));
                for record in answers.answers().chain(answers.additionals()) {
                    if let Data::Srv { target, .. } | Data::Ptr(target) | Data::Cname(target) | Data::Ns(target) = record.data {
                        let whole = [target.first(), target.rest()].concat();
                        prop_assert!(Labels::of(&whole).is_some(), "{:?}", whole);
                    }
                }
            }
        }
    }
}

/// Whether a Service exists and has no record, as one that waits for its ClusterIP.
fn is_bare(table: &ServiceTable, owner: &str) -> bool {
    let has_name = |entry: &&Arc<ServiceEntry>| {
        let NamespacedName { namespace, name } = &entry.service.name;
        format!("{name}.{namespace}.svc.{DOMAIN}") == owner
    };
    let entry = table.services.iter().find(has_name);
    entry.is_some_and(|entry| !matches!(entry.service.kind, ServiceKind::Headless | ServiceKind::ExternalName))
}
