//! Node ports, external addresses, traffic policies and what depends on Nodes.

use std::net::IpAddr;

use super::*;
use crate::model::{FrontendKind, PortEndpoint, SessionAffinity, Verdict};

const ZONE: &str = "topology.kubernetes.io/zone";

fn node(of: &str, addresses: &[&str], labels: &[(&str, &str)]) -> Node {
    let mut labels: Vec<(Arc<str>, Arc<str>)> = labels.iter().map(|&(key, value)| (key.into(), value.into())).collect();
    labels.sort();
    let addresses = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
    Node { name: NamespacedName::new("", of), addresses, labels: labels.into() }
}

fn put_node(node: Node) -> Event {
    Event::Apply(Object::Node(node.into()))
}

fn on(node: &str, ip: &str) -> Endpoint {
    Endpoint { place: Arc::new(Place { node: Some(node.into()), ..Place::default() }), ..ready(ip) }
}

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|ip| ip.parse().unwrap()).collect()
}

fn node_port(of: &str, ips: &[&str], number: u16) -> Service {
    let mut service = Service { kind: ServiceKind::NodePort, ..service(of, ips) };
    service.ports[0].node_port = NonZeroU16::new(number);
    service
}

/// A builder on `edge1` that has seen these events.
fn builder(events: impl IntoIterator<Item = Event>) -> Builder {
    let mut builder = Builder::new(ServiceFilter::UnlabelledOnly, "edge1");
    events.into_iter().for_each(|event| builder.apply(event));
    builder
}

fn frontends(builder: &Builder, of: &str) -> Vec<(FrontendKind, String)> {
    let entry = builder.table.get(&name(of)).unwrap();
    entry.frontends.iter().map(|frontend| (frontend.kind, frontend.at.to_string())).collect()
}

fn endpoints<'a>(builder: &'a Builder, of: &str) -> &'a [PortEndpoint] {
    &builder.table.get(&name(of)).unwrap().ports[0].endpoints
}

#[test]
fn a_service_answers_on_everything_that_leads_to_it() {
    use FrontendKind::{ClusterIp, ExternalIp, LoadBalancer, NodePort};
    let mut service = node_port("web", &["10.96.0.1"], 30_080);
    service.kind = ServiceKind::LoadBalancer;
    service.external_ips = ips(&["192.0.2.1", "2001:db8::1"]);
    service.load_balancer_ips = ips(&["198.51.100.1"]);
    service.affinity = SessionAffinity::ClientIp { timeout: 60.try_into().unwrap() };
    let mut builder = builder([put(service), put_node(node("edge1", &["192.168.10.11", "fd00::11"], &[]))]);
    let table = builder.build().unwrap();
    let at = |text: &str| text.to_owned();
    // Nothing of IPv6, as there is no ClusterIP of that family.
    assert_eq!(
        frontends(&builder, "web"),
        [
            (ClusterIp, at("10.96.0.1:80/TCP")),
            (NodePort, at("192.168.10.11:30080/TCP")),
            (NodePort, at("127.0.0.1:30080/TCP")),
            (LoadBalancer, at("198.51.100.1:80/TCP")),
            (ExternalIp, at("192.0.2.1:80/TCP")),
        ]
    );
    let entry = table.get(&name("web")).unwrap();
    assert!(entry.frontends.iter().all(|frontend| frontend.affinity == 60.try_into().ok()));
    let host_only: Vec<bool> = entry.frontends.iter().map(|frontend| frontend.host_only()).collect();
    assert_eq!(host_only, [false, false, true, false, false]);
}

#[test]
fn an_ipv6_node_port_has_no_loopback_address() {
    let service = node_port("web", &["fd00:96::1"], 30_080);
    let mut builder = builder([put(service), put_node(node("edge1", &["192.168.10.11", "fd00::11"], &[]))]);
    builder.build().unwrap();
    let shown: Vec<String> = frontends(&builder, "web").into_iter().map(|(_, at)| at).collect();
    assert_eq!(shown, ["[fd00:96::1]:80/TCP", "[fd00::11]:30080/TCP"]);
}

#[test]
fn headless_and_external_name_services_answer_nowhere_whatever_else_they_say() {
    for kind in [ServiceKind::Headless, ServiceKind::ExternalName] {
        let mut service = node_port("web", &["10.96.0.1"], 30_080);
        service.kind = kind;
        service.external_ips = ips(&["192.0.2.1"]);
        let mut builder = builder([put(service)]);
        builder.build().unwrap();
        assert_eq!(frontends(&builder, "web"), [], "{kind:?}");
    }
}

#[test]
fn the_policies_choose_the_backends_of_each_sort_of_frontend_and_client() {
    use TrafficPolicy::{Cluster, Local};
    let (all, here, none) = (vec!["10.244.1.1:8080", "10.244.2.1:8080"], vec!["10.244.1.1:8080"], vec![]);
    let spread = || vec![on("edge1", "10.244.1.1"), on("edge2", "10.244.2.1")];
    let elsewhere = || vec![on("edge2", "10.244.2.1")];
    let cases = [
        ((Cluster, Cluster), spread(), (&all, &all, &all)),
        ((Local, Cluster), spread(), (&here, &all, &all)),
        ((Cluster, Local), spread(), (&all, &all, &here)),
        ((Local, Local), spread(), (&here, &all, &here)),
        ((Local, Local), elsewhere(), (&none, &vec!["10.244.2.1:8080"], &none)),
    ];
    for ((internal_policy, external_policy), endpoints, (cluster_ip, on_node, from_outside)) in cases {
        let service = Service { internal_policy, external_policy, ..node_port("web", &["10.96.0.1"], 30_080) };
        let mut builder = builder([put(service), put_slice(slice("s", "web", endpoints))]);
        let table = builder.build().unwrap();
        let shown = |list: &[SocketAddr]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        for frontend in &table.get(&name("web")).unwrap().frontends {
            let (own, outside) = match frontend.kind {
                FrontendKind::ClusterIp => (cluster_ip, cluster_ip),
                FrontendKind::NodePort | FrontendKind::LoadBalancer | FrontendKind::ExternalIp => {
                    (on_node, from_outside)
                }
            };
            let what = (internal_policy, external_policy, frontend.kind);
            assert_eq!(shown(&frontend.backends), *own, "{what:?}");
            assert_eq!(shown(&frontend.external_backends), *outside, "{what:?}");
        }
    }
}

#[test]
fn not_ready_addresses_that_are_published_are_served() {
    let starting = Endpoint { ready: false, serving: false, ..ready("10.244.1.1") };
    for (publish_not_ready, expected) in [(false, vec![]), (true, vec!["10.244.1.1:8080"])] {
        let service = Service { publish_not_ready, ..service("web", &["10.96.0.1"]) };
        let table = build([put(service), put_slice(slice("s", "web", vec![starting.clone()]))]);
        assert_eq!(backends(&table, "web", "10.96.0.1:80").unwrap(), expected);
    }
}

#[test]
fn nobody_takes_a_cluster_ip_by_naming_it_as_an_external_ip() {
    let thief = || Service { external_ips: ips(&["10.96.0.9"]), ..service("a-thief", &["10.96.0.1"]) };
    for thief_first in [true, false] {
        let mut events = [put(thief()), put(service("victim", &["10.96.0.9"]))];
        if !thief_first {
            events.reverse();
        }
        let mut builder = builder([]);
        for event in events {
            builder.apply(event);
            builder.build();
        }
        let owner = (FrontendKind::ClusterIp, "10.96.0.9:80/TCP".to_owned());
        assert_eq!(frontends(&builder, "victim"), [owner]);
        assert_eq!(frontends(&builder, "a-thief").len(), 1);
        let notes = &builder.table.get(&name("a-thief")).unwrap().notes;
        assert!(matches!(&notes[..], [Note::Taken { by, .. }] if *by == name("victim")), "{notes:?}");

        // The victim now has the address only as an external one, so the first by name has it.
        builder.apply(put(Service { external_ips: ips(&["10.96.0.9"]), ..service("victim", &["10.96.0.2"]) }));
        builder.build().unwrap();
        assert_eq!(frontends(&builder, "a-thief")[1].0, FrontendKind::ExternalIp);
        assert_eq!(frontends(&builder, "victim").len(), 1);
    }
}

#[test]
fn an_unknown_node_is_a_note_on_those_whom_it_concerns() {
    let plain = service("plain", &["10.96.0.1"]);
    let grouped = Service { within_node_group: true, ..service("grouped", &["10.96.0.2"]) };
    let keyed = Service { topology_keys: vec!["zone".into()], ..service("keyed", &["10.96.0.3"]) };
    let near = Service { distribution: Some(TrafficDistribution::SameZone), ..service("near", &["10.96.0.4"]) };
    let on_node = node_port("on-node", &["10.96.0.5"], 30_080);
    let hinted = Place { for_zones: ["a".into()].into(), ..Place::default() };
    let hinted = vec![Endpoint { place: Arc::new(hinted), ..ready("10.244.1.1") }];
    let mut builder = builder([plain, grouped, keyed, near, on_node, service("hinted", &["10.96.0.6"])].map(put));
    builder.apply(put_slice(slice("s", "hinted", hinted)));
    let table = builder.build().unwrap();
    let concerned: Vec<&str> = table
        .services
        .iter()
        .filter(|entry| entry.notes == [Note::NodeUnknown])
        .map(|entry| &*entry.service.name.name)
        .collect();
    assert_eq!(concerned, ["grouped", "hinted", "keyed", "near", "on-node"]);
    assert!(!table.node_known);
    assert_eq!(frontends(&builder, "on-node")[1].1, "127.0.0.1:30080/TCP");

    builder.apply(put_node(node("edge1", &["192.168.10.11"], &[])));
    let table = builder.build().unwrap();
    assert!(table.node_known && table.services.iter().all(|entry| entry.notes.is_empty()));
    assert_eq!(frontends(&builder, "on-node").len(), 3);

    builder.apply(Event::Replace(Kind::Node, Vec::new()));
    assert!(!builder.build().unwrap().node_known);
}

#[test]
fn the_zone_of_an_endpoint_that_names_none_is_that_of_its_node_and_follows_it() {
    let near = Service { distribution: Some(TrafficDistribution::SameZone), ..service("near", &["10.96.0.1"]) };
    let of = vec![on("edge2", "10.244.2.1"), on("edge3", "10.244.3.1")];
    let mut builder = builder([
        put_node(node("edge1", &[], &[(ZONE, "a")])),
        put_node(node("edge2", &[], &[(ZONE, "a")])),
        put_node(node("edge3", &[], &[(ZONE, "b")])),
        put(near),
        put(service("other", &["10.96.0.2"])),
        Event::Apply(Object::Endpoints(slice("near", "near", of).into())),
    ]);
    let before = builder.build().unwrap();
    let seen = |builder: &Builder| {
        let endpoints = endpoints(builder, "near").iter();
        endpoints.map(|e| (e.place.zone.as_deref().unwrap().to_owned(), e.verdicts.cluster)).collect::<Vec<_>>()
    };
    let (a, b) = ("a".to_owned(), "b".to_owned());
    assert_eq!(seen(&builder), [(a.clone(), Verdict::Ready), (b.clone(), Verdict::OtherZone)]);

    builder.apply(put_node(node("edge3", &[], &[(ZONE, "a")])));
    let after = builder.build().unwrap();
    assert_eq!(seen(&builder), [(a.clone(), Verdict::Ready), (a.clone(), Verdict::Ready)]);
    assert!(matches!(&changes(&before, &after)[..], [Change::Changed { new, .. }] if new.service.name == name("near")));
    let shared = |table: &ServiceTable| Arc::clone(table.get(&name("other")).unwrap());
    assert!(Arc::ptr_eq(&shared(&before), &shared(&after)));

    builder.apply(put_node(node("edge1", &[], &[(ZONE, "b")])));
    builder.apply(put_node(node("edge3", &[], &[(ZONE, "b")])));
    builder.build().unwrap();
    assert_eq!(seen(&builder), [(a, Verdict::OtherZone), (b, Verdict::Ready)]);
}

#[test]
fn a_node_that_says_nothing_new_makes_no_table() {
    let mut builder = builder([
        put_node(node("edge1", &["192.168.10.11"], &[(ZONE, "a")])),
        put_node(node("edge2", &[], &[])),
        put(service("web", &["10.96.0.1"])),
    ]);
    builder.build().unwrap();
    builder.apply(put_node(node("edge1", &["192.168.10.11"], &[(ZONE, "a")])));
    builder.apply(put_node(node("edge2", &[], &[("other", "label")])));
    assert!(builder.build().is_none());
    // What names and addresses nodes have is news to those who look for nodes.
    let before = builder.last_table();
    builder.apply(put_node(node("edge2", &["192.168.10.12"], &[("other", "label")])));
    builder.apply(put_node(node("edge3", &[], &[(ZONE, "b")])));
    let table = builder.build().unwrap();
    assert_eq!(table.nodes.iter().map(|node| &*node.name).collect::<Vec<_>>(), ["edge1", "edge2", "edge3"]);
    assert!(changes(&before, &table).is_empty());
}

#[test]
fn groups_and_keys_follow_the_labels_of_other_nodes() {
    let grouped = Service { within_node_group: true, ..service("grouped", &["10.96.0.1"]) };
    let keyed = Service { topology_keys: vec!["site".into()], ..service("keyed", &["10.96.0.2"]) };
    let group = "apps.kubeedge.io/belonging-to";
    let mut builder = builder([
        put_node(node("edge1", &[], &[(group, "g"), ("site", "x")])),
        put_node(node("edge2", &[], &[(group, "h"), ("site", "x")])),
        put(grouped),
        put(keyed),
        put_slice(slice("g", "grouped", vec![on("edge2", "10.244.2.1")])),
        put_slice(slice("k", "keyed", vec![on("edge2", "10.244.2.1")])),
    ]);
    let verdict = |builder: &mut Builder, of: &str| {
        builder.build();
        endpoints(builder, of)[0].verdicts.cluster
    };
    assert_eq!(verdict(&mut builder, "grouped"), Verdict::OtherNodeGroup);
    assert_eq!(verdict(&mut builder, "keyed"), Verdict::Ready);
    builder.apply(put_node(node("edge2", &[], &[(group, "g"), ("site", "y")])));
    assert_eq!(verdict(&mut builder, "grouped"), Verdict::Ready);
    assert_eq!(verdict(&mut builder, "keyed"), Verdict::OtherTopologyKey);
    builder.apply(Event::Delete(Kind::Node, NamespacedName::new("", "edge2")));
    assert_eq!(verdict(&mut builder, "grouped"), Verdict::NodeUnknown);
    assert_eq!(verdict(&mut builder, "keyed"), Verdict::NodeUnknown);
}

/// A hundred thousand endpoints, each several times in memory, are what decides how much an agent needs.
#[test]
fn endpoints_are_small_and_share_what_many_of_them_have() {
    assert_eq!(size_of::<Endpoint>(), 32);
    assert_eq!(size_of::<PortEndpoint>(), 56);
    let mut builder = builder([
        put(service("a", &["10.96.0.1"])),
        put(service("b", &["10.96.0.2"])),
        put_slice(slice("a-1", "a", vec![on("edge2", "10.244.2.1")])),
        put_slice(slice("b-1", "b", vec![on("edge2", "10.244.2.2")])),
        put_node(node("edge2", &[], &[(ZONE, "a")])),
        put_node(node("edge3", &[], &[(ZONE, "a")])),
    ]);
    builder.build().unwrap();
    assert!(Arc::ptr_eq(&endpoints(&builder, "a")[0].place, &endpoints(&builder, "b")[0].place));
    let labels = |of: &str| builder.nodes[of].labels[0].clone();
    let ((key, value), (other_key, other_value)) = (labels("edge2"), labels("edge3"));
    assert!(Arc::ptr_eq(&key, &other_key) && Arc::ptr_eq(&value, &other_value));
    let frontend = &builder.table.get(&name("a")).unwrap().frontends[0];
    assert!(Arc::ptr_eq(&frontend.backends, &frontend.external_backends));
}
