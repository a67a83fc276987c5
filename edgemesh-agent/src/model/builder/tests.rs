use std::{net::SocketAddr, num::NonZeroU16};

use proptest::prelude::*;

use super::*;
use crate::model::{
    Balance, Change, DestinationRule, Endpoint, EndpointPort, Ignored, Protocol, ServiceKind, ServicePort, Subset,
    TrafficDistribution, TrafficPolicy, changes,
};

mod detours;
mod frontends;
mod rules;

fn name(text: &str) -> NamespacedName {
    NamespacedName::new("default", text)
}

fn port(name: &str, protocol: Protocol, number: u16) -> ServicePort {
    ServicePort { name: name.into(), protocol, port: NonZeroU16::new(number).unwrap(), node_port: None }
}

fn service(of: &str, ips: &[&str]) -> Service {
    Service {
        cluster_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        ports: vec![port("http", Protocol::Tcp, 80)],
        ..Service::new(name(of), ServiceKind::ClusterIp)
    }
}

fn ready(ip: &str) -> Endpoint {
    let place = Arc::default();
    Endpoint { address: ip.parse().unwrap(), ready: true, serving: true, terminating: false, place }
}

fn slice(of: &str, service: &str, endpoints: Vec<Endpoint>) -> EndpointSet {
    let ports =
        vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: NonZeroU16::new(8080).unwrap() }];
    EndpointSet { name: name(of), service: name(service), subsets: vec![Subset { ports, endpoints }] }
}

fn build(events: impl IntoIterator<Item = Event>) -> Arc<ServiceTable> {
    let mut builder = Builder::default();
    for event in events {
        builder.apply(event);
    }
    builder.apply(Event::Synced);
    builder.build().unwrap()
}

fn put(service: Service) -> Event {
    Event::Apply(Object::Service(service.into()))
}

fn put_slice(set: EndpointSet) -> Event {
    Event::Apply(Object::EndpointSlice(set.into()))
}

fn backends(table: &ServiceTable, service: &str, frontend: &str) -> Option<Vec<String>> {
    let frontend: SocketAddr = frontend.parse().unwrap();
    let entry = table.get(&name(service))?;
    let found = entry.frontends.iter().find(|f| f.at.addr == frontend)?;
    Some(found.backends.iter().map(ToString::to_string).collect())
}

#[test]
fn a_service_answers_on_each_of_its_addresses_with_endpoints_of_the_same_family() {
    let table = build([
        put(service("web", &["10.96.0.1", "fd00::1"])),
        put_slice(slice("web-v4", "web", vec![ready("10.244.1.2"), ready("10.244.1.1")])),
        put_slice(slice("web-v6", "web", vec![ready("fd01::1")])),
    ]);
    assert_eq!(backends(&table, "web", "10.96.0.1:80").unwrap(), ["10.244.1.1:8080", "10.244.1.2:8080"]);
    assert_eq!(backends(&table, "web", "[fd00::1]:80").unwrap(), ["[fd01::1]:8080"]);
}

#[test]
fn slices_are_merged_and_win_over_core_endpoints() {
    let table = build([
        put(service("web", &["10.96.0.1"])),
        Event::Apply(Object::Endpoints(slice("web", "web", vec![ready("10.244.9.9")]).into())),
        put_slice(slice("b", "web", vec![ready("10.244.1.2")])),
        put_slice(slice("a", "web", vec![ready("10.244.1.1"), ready("10.244.1.2")])),
    ]);
    assert_eq!(backends(&table, "web", "10.96.0.1:80").unwrap(), ["10.244.1.1:8080", "10.244.1.2:8080"]);
}

#[test]
fn terminating_endpoints_serve_only_when_nothing_is_ready() {
    let terminating = Endpoint { ready: false, terminating: true, ..ready("10.244.1.2") };
    let starting = Endpoint { ready: false, serving: false, ..ready("10.244.1.3") };
    let dying = Endpoint { serving: false, ..terminating.clone() };
    let both = build([
        put(service("web", &["10.96.0.1"])),
        put_slice(slice("a", "web", vec![ready("10.244.1.1"), terminating.clone(), starting.clone()])),
    ]);
    assert_eq!(backends(&both, "web", "10.96.0.1:80").unwrap(), ["10.244.1.1:8080"]);
    let last =
        build([put(service("web", &["10.96.0.1"])), put_slice(slice("a", "web", vec![terminating, starting.clone()]))]);
    assert_eq!(backends(&last, "web", "10.96.0.1:80").unwrap(), ["10.244.1.2:8080"]);
    let none = build([put(service("web", &["10.96.0.1"])), put_slice(slice("a", "web", vec![dying, starting]))]);
    assert_eq!(backends(&none, "web", "10.96.0.1:80").unwrap(), Vec::<String>::new());
}

#[test]
fn endpoints_belong_to_the_port_of_their_name_and_protocol() {
    let mut dns = service("dns", &["10.96.0.10"]);
    dns.ports = vec![port("dns", Protocol::Udp, 53), port("dns-tcp", Protocol::Tcp, 53)];
    let ports = vec![
        EndpointPort { name: "dns".into(), protocol: Protocol::Udp, port: NonZeroU16::new(5300).unwrap() },
        EndpointPort { name: "dns-tcp".into(), protocol: Protocol::Tcp, port: NonZeroU16::new(5301).unwrap() },
    ];
    let set = EndpointSet {
        name: name("dns-1"),
        service: name("dns"),
        subsets: vec![Subset { ports, endpoints: vec![ready("10.244.1.1")] }],
    };
    let table = build([put(dns), put_slice(set)]);
    let frontends = &table.get(&name("dns")).unwrap().frontends;
    let of = |protocol| {
        let found = frontends.iter().find(|f| f.at.protocol == protocol).unwrap();
        found.backends.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(of(Protocol::Udp), ["10.244.1.1:5300"]);
    assert_eq!(of(Protocol::Tcp), ["10.244.1.1:5301"]);
}

#[test]
fn services_that_are_not_for_this_data_plane_have_no_frontends_and_say_why() {
    let headless = Service { kind: ServiceKind::Headless, cluster_ips: vec![], ..service("headless", &[]) };
    let mut edgemesh = service("edgemesh", &["10.96.0.2"]);
    edgemesh.proxy_labels.edgemesh = true;
    let mut standard = service("standard", &["10.96.0.3"]);
    standard.proxy_labels.standard = true;
    let mut sctp = service("sctp", &["10.96.0.4"]);
    sctp.ports = vec![port("a", Protocol::Sctp, 132), port("http", Protocol::Tcp, 80)];
    let events = [headless, edgemesh, standard, sctp, service("plain", &["10.96.0.5"])].map(put);

    let table = build(events.clone());
    let served: Vec<&str> =
        table.services.iter().filter(|e| !e.frontends.is_empty()).map(|e| &*e.service.name.name).collect();
    assert_eq!(served, ["plain", "sctp"]);
    assert_eq!(table.get(&name("edgemesh")).unwrap().notes, [Note::Filtered]);
    assert_eq!(table.get(&name("standard")).unwrap().notes, [Note::Filtered]);
    assert_eq!(table.get(&name("sctp")).unwrap().notes, [Note::Sctp { port: 132 }]);
    assert_eq!(table.get(&name("sctp")).unwrap().frontends.len(), 1);

    let mut builder = Builder::new(ServiceFilter::LabelledOnly, "edge1");
    events.into_iter().for_each(|event| builder.apply(event));
    let table = builder.build().unwrap();
    let served: Vec<&str> =
        table.services.iter().filter(|e| !e.frontends.is_empty()).map(|e| &*e.service.name.name).collect();
    assert_eq!(served, ["edgemesh"]);
}

#[test]
fn a_headless_service_keeps_the_endpoints_that_no_port_of_it_leads_to() {
    let headless = Service { kind: ServiceKind::Headless, ..service("db", &[]) };
    let mut bare = slice("db-bare", "db", vec![ready("10.244.1.2"), ready("10.244.1.1")]);
    bare.subsets[0].ports.clear();
    let moving = Endpoint { ready: false, ..ready("10.244.1.3") };
    let mut again = slice("db-again", "db", vec![moving, ready("10.244.1.4")]);
    again.subsets[0].ports.clear();
    let with_ports = slice("db-1", "db", vec![ready("10.244.1.1")]);
    let sets = [bare.clone(), again.clone(), with_ports].map(put_slice);
    let portless = |table: &ServiceTable| -> Vec<(String, bool)> {
        table.get(&name("db")).unwrap().portless.iter().map(|e| (e.ip.to_string(), e.ready)).collect()
    };
    let expected = [("10.244.1.2", true), ("10.244.1.3", false), ("10.244.1.4", true)];
    let table = build([put(headless.clone())].into_iter().chain(sets.clone()));
    assert_eq!(portless(&table), expected.map(|(ip, ready)| (ip.to_owned(), ready)));
    let all = Service { publish_not_ready: true, ..headless.clone() };
    assert!(portless(&build([put(all)].into_iter().chain(sets.clone()))).iter().all(|(_, ready)| *ready));
    let plain = Service { kind: ServiceKind::ClusterIp, ..headless };
    assert_eq!(portless(&build([put(plain)].into_iter().chain(sets))), []);
}

#[test]
fn of_two_services_on_one_address_the_first_by_name_serves_and_the_other_follows_it() {
    for order in [["a", "b"], ["b", "a"]] {
        let mut builder = Builder::default();
        for of in order {
            builder.apply(put(service(of, &["10.96.0.1"])));
            builder.build();
        }
        let entry = |builder: &Builder, of: &str| Arc::clone(builder.table.get(&name(of)).unwrap());
        assert_eq!(entry(&builder, "a").frontends.len(), 1);
        assert!(entry(&builder, "b").frontends.is_empty());
        assert!(matches!(&entry(&builder, "b").notes[..], [Note::Taken { by, .. }] if *by == name("a")));

        builder.apply(Event::Delete(Kind::Service, name("a")));
        builder.build().unwrap();
        assert_eq!(entry(&builder, "b").frontends.len(), 1);
        assert!(entry(&builder, "b").notes.is_empty());
    }
}

#[test]
fn a_relabelled_slice_leaves_its_old_service() {
    let mut builder = Builder::default();
    builder.apply(put(service("old", &["10.96.0.1"])));
    builder.apply(put(service("new", &["10.96.0.2"])));
    builder.apply(put_slice(slice("s", "old", vec![ready("10.244.1.1")])));
    builder.build().unwrap();
    builder.apply(put_slice(slice("s", "new", vec![ready("10.244.1.1")])));
    let table = builder.build().unwrap();
    assert_eq!(backends(&table, "old", "10.96.0.1:80").unwrap(), Vec::<String>::new());
    assert_eq!(backends(&table, "new", "10.96.0.2:80").unwrap(), ["10.244.1.1:8080"]);
}

#[test]
fn nothing_new_makes_no_table_and_a_change_shares_the_rest() {
    let mut builder = Builder::default();
    for of in ["a", "b", "c"] {
        builder.apply(put(service(of, &[&format!("10.96.0.{}", of.as_bytes()[0])])));
    }
    let before = builder.build().unwrap();
    builder.apply(put(service("a", &["10.96.0.97"])));
    assert!(builder.build().is_none(), "the same object again");
    builder.apply(put_slice(slice("b-1", "b", vec![ready("10.244.1.1")])));
    let after = builder.build().unwrap();
    assert!(matches!(&changes(&before, &after)[..], [Change::Changed { new, .. }] if new.service.name == name("b")));
    assert!(Arc::ptr_eq(&before.services[0], &after.services[0]));
    assert!(!before.complete && !after.complete);
    builder.apply(Event::Synced);
    assert!(builder.build().unwrap().complete);
}

fn any_event() -> impl Strategy<Value = Event> {
    let of = prop_oneof![Just("a"), Just("b"), Just("c"), Just("d")];
    let ip = (0u8..3).prop_map(|n| format!("10.96.0.{n}"));
    let ips = || proptest::collection::vec(ip.clone(), 0..3);
    let a_service =
        (of.clone(), ips(), ips(), any::<[bool; 3]>()).prop_map(|(of, ips, external, [keyed, near, local])| {
            let mut service = service(of, &ips.iter().map(String::as_str).collect::<Vec<_>>());
            service.external_ips = external.iter().map(|ip| ip.parse().unwrap()).collect();
            if keyed {
                service.topology_keys = vec!["topology.kubernetes.io/zone".into()];
                service.kind = ServiceKind::NodePort;
                service.ports[0].node_port = NonZeroU16::new(30_080);
            }
            if near {
                service.distribution = Some(TrafficDistribution::SameZone);
            }
            if local {
                service.internal_policy = TrafficPolicy::Local;
            }
            Object::Service(service.into())
        });
    let a_node = (0u8..3, 0u8..3, proptest::option::of(0u8..2)).prop_map(|(n, ip, zone)| {
        let labels = zone.iter().map(|zone| ("topology.kubernetes.io/zone".into(), zone.to_string().into()));
        let addresses = vec![format!("10.96.0.{ip}").parse().unwrap()];
        Object::Node(
            Node { name: NamespacedName::new("", format!("edge{n}")), addresses, labels: labels.collect() }.into(),
        )
    });
    let endpoints = proptest::collection::vec((0u8..4, 0u8..3, any::<[bool; 3]>()), 0..4).prop_map(|list| {
        list.into_iter()
            .map(|(n, on, [ready_, serving, terminating])| Endpoint {
                place: Arc::new(Place { node: Some(format!("edge{on}").into()), ..Place::default() }),
                ready: ready_,
                serving,
                terminating,
                ..ready(&format!("10.244.0.{n}"))
            })
            .collect::<Vec<_>>()
    });
    let a_slice = (0u8..4, of.clone(), endpoints)
        .prop_map(|(n, of, endpoints)| Object::EndpointSlice(slice(&format!("s{n}"), of, endpoints).into()));
    let a_rule = (of.clone(), proptest::option::of(of.clone()), proptest::option::of(0i64..3), any::<[bool; 4]>())
        .prop_map(|(of, host, created, [foreign, hashed, limited, too_much])| {
            let namespace = if foreign { "other" } else { "default" };
            let mut rule = DestinationRule::new(NamespacedName::new(namespace, of));
            rule.host = host.map(name);
            rule.created = created;
            rule.for_some_clients = limited;
            if hashed {
                rule.balance = Balance::SourceIp;
            }
            if too_much {
                rule.ignored = vec![Ignored { field: "spec.x".into(), why: "not supported".into() }];
            }
            Object::DestinationRule(rule.into())
        });
    let object = prop_oneof![a_service.clone(), a_slice.clone(), a_node.clone(), a_rule.clone()];
    prop_oneof![
        6 => object.prop_map(Event::Apply),
        1 => of.clone().prop_map(|of| Event::Delete(Kind::Service, name(of))),
        1 => (0u8..4).prop_map(|n| Event::Delete(Kind::EndpointSlice, name(&format!("s{n}")))),
        1 => (0u8..3).prop_map(|n| Event::Delete(Kind::Node, NamespacedName::new("", format!("edge{n}")))),
        1 => (of.clone(), any::<bool>()).prop_map(|(of, foreign)| {
            let namespace = if foreign { "other" } else { "default" };
            Event::Delete(Kind::DestinationRule, NamespacedName::new(namespace, of))
        }),
        1 => proptest::collection::vec(a_rule, 0..3).prop_map(|list| Event::Replace(Kind::DestinationRule, list)),
        1 => proptest::collection::vec(a_node, 0..3).prop_map(|list| Event::Replace(Kind::Node, list)),
        1 => proptest::collection::vec(a_service, 0..3).prop_map(|list| Event::Replace(Kind::Service, list)),
        1 => proptest::collection::vec(a_slice, 0..3).prop_map(|list| Event::Replace(Kind::EndpointSlice, list)),
    ]
}

proptest! {
    /// Whatever the events and however often a table is taken between them, the result is what a builder that saw only
    /// the final objects makes; and the changes between two tables lead from one to the other.
    #[test]
    fn the_table_depends_only_on_the_final_objects(
        events in proptest::collection::vec((any_event(), any::<bool>()), 0..40),
    ) {
        let mut incremental = Builder::new(ServiceFilter::UnlabelledOnly, "edge1");
        let mut previous = Arc::new(ServiceTable::default());
        let mut applied = previous.services.clone();
        for (event, take) in events {
            incremental.apply(event);
            if take && let Some(table) = incremental.build() {
                for change in changes(&previous, &table) {
                    match change {
                        Change::Added(new) => applied.push(Arc::new(new.clone())),
                        Change::Removed(old) => applied.retain(|e| e.service.name != old.service.name),
                        Change::Changed { old, new } => {
                            let place = applied.iter().position(|e| **e == *old).unwrap();
                            applied[place] = Arc::new(new.clone());
                        }
                    }
                }
                applied.sort_by(|a, b| a.service.name.cmp(&b.service.name));
                prop_assert_eq!(&applied, &table.services);
                previous = table;
            }
        }
        incremental.build();
        let mut fresh = Builder::new(ServiceFilter::UnlabelledOnly, "edge1");
        fresh.apply(Event::Replace(Kind::Node, incremental.nodes.values().cloned().map(Object::Node).collect()));
        fresh.apply(Event::Replace(
            Kind::Service,
            incremental.services.values().map(|service| Object::Service(Arc::clone(service))).collect(),
        ));
        fresh.apply(Event::Replace(
            Kind::EndpointSlice,
            incremental.slices.by_service.values().flatten().cloned().map(Object::EndpointSlice).collect(),
        ));
        for rule in incremental.rules.values() {
            fresh.apply(Event::Apply(Object::DestinationRule(Arc::clone(rule))));
        }
        fresh.build();
        prop_assert_eq!(&incremental.table.services, &fresh.table.services);
        prop_assert_eq!(&incremental.table.unheeded, &fresh.table.unheeded);
        // No frontend has two owners.
        let mut seen = HashSet::new();
        for frontend in incremental.table.services.iter().flat_map(|e| &e.frontends) {
            prop_assert!(seen.insert(frontend.at));
        }
    }
}
