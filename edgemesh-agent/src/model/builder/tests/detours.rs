//! Endpoints of other sites, and their aliases.

use std::{collections::BTreeSet, time::Duration};

use super::*;
use crate::{
    alias::{AliasRanges, Meetings, Overrides},
    model::{Place, PortEndpoint, Reason, Way},
    net::route::{Leads, Routes, Table},
};

const HOUR: Duration = Duration::from_secs(3600);

fn ranges(v4: &str) -> AliasRanges {
    AliasRanges { v4: v4.parse().unwrap(), v6: "fd00:a11a::/64".parse().unwrap() }
}

/// On `edge1`, with a route to the pods of `edge2`.
fn builder(v4: &str) -> Builder {
    let reach = Reach::new("edge1", ranges(v4), Overrides::default()).with_routes(Arc::new(routes(&["10.244.2.0/24"])));
    let mut builder =
        Builder::new(ServiceFilter::UnlabelledOnly, "edge1").with_detours(reach, Book::new(ranges(v4), Instant::now()));
    builder.apply(Event::Synced);
    builder
}

fn routes(direct: &[&str]) -> Routes {
    Routes::new(direct.iter().map(|prefix| (Table::Main, prefix.parse().unwrap(), 0, Leads::Gateway)))
}

fn on(node: &str, ip: &str) -> Endpoint {
    Endpoint { place: Arc::new(Place { node: Some(node.into()), ..Place::default() }), ..ready(ip) }
}

fn endpoint<'a>(table: &'a ServiceTable, service: &str, node: &str) -> &'a PortEndpoint {
    let served = &table.get(&name(service)).unwrap().ports[0];
    served.endpoints.iter().find(|endpoint| endpoint.place.node.as_deref() == Some(node)).unwrap()
}

fn alias_of(table: &ServiceTable, service: &str, node: &str) -> Option<IpAddr> {
    endpoint(table, service, node).path.as_ref().unwrap().alias
}

fn web(endpoints: Vec<Endpoint>) -> [Event; 2] {
    [put(service("web", &["10.96.0.1"])), put_slice(slice("web", "web", endpoints))]
}

fn build_with(builder: &mut Builder, events: impl IntoIterator<Item = Event>) -> Arc<ServiceTable> {
    events.into_iter().for_each(|event| builder.apply(event));
    builder.build().unwrap()
}

#[test]
fn backends_of_other_sites_are_aliases_and_all_others_themselves() {
    let mut builder = builder("198.18.0.0/16");
    let endpoints = vec![on("edge1", "10.244.1.1"), on("edge2", "10.244.2.1"), on("edge3", "172.17.0.2")];
    let table = build_with(&mut builder, web(endpoints));
    let alias = alias_of(&table, "web", "edge3").unwrap();
    assert!(ranges("198.18.0.0/16").contains(alias));
    let backends = backends(&table, "web", "10.96.0.1:80").unwrap();
    assert_eq!(
        backends.iter().map(String::as_str).collect::<BTreeSet<_>>(),
        BTreeSet::from(["10.244.1.1:8080", "10.244.2.1:8080", format!("{alias}:8080").as_str()])
    );
    let target = table.aliases.target(alias).unwrap();
    assert_eq!((&*target.node, target.addr.to_string().as_str()), ("edge3", "172.17.0.2"));
    assert_eq!(endpoint(&table, "web", "edge1").path.as_ref().unwrap().reason, Reason::OwnNode);
    assert_eq!(endpoint(&table, "web", "edge2").path.as_ref().unwrap().way(), Way::Direct);
}

#[test]
fn without_a_tunnel_there_are_no_ways_and_no_aliases() {
    let table = build(web(vec![on("edge3", "172.17.0.2")]));
    assert_eq!(backends(&table, "web", "10.96.0.1:80").unwrap(), ["172.17.0.2:8080"]);
    assert!(endpoint(&table, "web", "edge3").path.is_none() && table.aliases.is_empty());
}

#[test]
fn the_same_address_in_two_sites_is_two_backends() {
    let mut builder = builder("198.18.0.0/16");
    let table = build_with(&mut builder, web(vec![on("edge3", "172.17.0.2"), on("edge4", "172.17.0.2")]));
    let aliases = [alias_of(&table, "web", "edge3").unwrap(), alias_of(&table, "web", "edge4").unwrap()];
    assert_ne!(aliases[0], aliases[1]);
    assert_eq!(backends(&table, "web", "10.96.0.1:80").unwrap().len(), 2);
    assert_eq!(table.get(&name("web")).unwrap().ports[0].endpoints.len(), 2);
}

#[test]
fn a_change_of_routes_touches_the_services_it_concerns_and_keeps_their_aliases() {
    let mut builder = builder("198.18.0.0/16");
    let other =
        [put(service("other", &["10.96.0.2"])), put_slice(slice("other", "other", vec![on("edge1", "10.244.1.9")]))];
    let first = build_with(&mut builder, web(vec![on("edge3", "172.17.0.2")]).into_iter().chain(other));
    let alias = alias_of(&first, "web", "edge3").unwrap();

    builder.follow_reach(|reach| reach.with_routes(Arc::new(routes(&["10.244.2.0/24", "172.17.0.0/16"]))));
    let second = builder.build().unwrap();
    assert_eq!(backends(&second, "web", "10.96.0.1:80").unwrap(), ["172.17.0.2:8080"]);
    assert_eq!(alias_of(&second, "web", "edge3"), Some(alias), "clients may have it from DNS");
    assert!(second.aliases.target(alias).is_some());
    assert!(Arc::ptr_eq(first.get(&name("other")).unwrap(), second.get(&name("other")).unwrap()));

    builder.follow_reach(|reach| reach.with_routes(Arc::new(routes(&["10.244.2.0/24", "192.0.2.0/24"]))));
    let third = builder.build().unwrap();
    assert_eq!(backends(&third, "web", "10.96.0.1:80").unwrap(), [format!("{alias}:8080")]);
    builder.follow_reach(|reach| reach.with_routes(Arc::new(routes(&["10.244.2.0/24"]))));
    assert!(builder.build().is_none(), "a route to nobody's pods changes nothing");
}

#[test]
fn a_host_network_is_direct_once_its_node_is_met_there_and_follows_the_nodes_addresses() {
    let mut builder = builder("198.18.0.0/16");
    let node = |addresses: &[&str]| {
        let node = Node {
            name: NamespacedName::new("", "edge2"),
            addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
            labels: Box::default(),
        };
        Event::Apply(Object::Node(node.into()))
    };
    // A route leads to the address, but not to that node's host network.
    let address = "10.244.2.200";
    let table = build_with(&mut builder, web(vec![on("edge2", address)]).into_iter().chain([node(&[address])]));
    let reason = |table: &ServiceTable| endpoint(table, "web", "edge2").path.as_ref().unwrap().reason;
    assert_eq!(reason(&table), Reason::NotMet);
    let met = Meetings::from([("edge2".into(), address.parse().unwrap())]);
    builder.follow_reach(|reach| reach.with_meetings(Arc::new(met)));
    assert_eq!(reason(&builder.build().unwrap()), Reason::Met);
    let table = build_with(&mut builder, [node(&["192.168.1.12"])]);
    assert_eq!(reason(&table).way(), Way::Direct);
    assert!(matches!(reason(&table), Reason::Gateway(_)), "it is a pod's by now");
}

#[test]
fn an_alias_lasts_as_long_as_one_service_has_the_pod_and_rests_after_that() {
    let mut builder = builder("198.18.0.0/29");
    let start = Instant::now();
    builder.tell_time(start);
    let both = [
        put(service("a", &["10.96.0.1"])),
        put_slice(slice("a", "a", vec![on("edge3", "172.17.0.2")])),
        put(service("b", &["10.96.0.2"])),
        put_slice(slice("b", "b", vec![on("edge3", "172.17.0.2")])),
    ];
    let table = build_with(&mut builder, both);
    let alias = alias_of(&table, "a", "edge3").unwrap();
    assert_eq!(alias_of(&table, "b", "edge3"), Some(alias));
    let table = build_with(&mut builder, [Event::Delete(Kind::Service, name("a"))]);
    assert!(table.aliases.target(alias).is_some());
    // The other one's endpoints are written anew.
    let again = vec![on("edge3", "172.17.0.2"), on("edge1", "10.244.1.1")];
    let table = build_with(&mut builder, [put_slice(slice("b", "b", again))]);
    assert_eq!(alias_of(&table, "b", "edge3"), Some(alias));
    let table = build_with(&mut builder, [Event::Delete(Kind::EndpointSlice, name("b"))]);
    assert_eq!(table.aliases.target(alias), None);
    let kept = |builder: &Builder| -> Vec<(IpAddr, Target)> {
        builder.kept_aliases().unwrap().1.filter(|(_, target)| &*target.node != "edge1").collect()
    };
    let of_pods: Vec<IpAddr> = kept(&builder).iter().filter(|(_, of)| !of.is_node()).map(|(alias, _)| *alias).collect();
    assert_eq!(of_pods, [alias], "but it is kept in mind");
    builder.tell_time(start + HOUR);
    assert!(kept(&builder).is_empty());
}

#[test]
fn where_no_alias_is_left_endpoints_are_out_of_reach_until_one_is() {
    // Three nodes, this one, and two pods.
    let mut builder = builder("198.18.0.0/29");
    let start = Instant::now();
    builder.tell_time(start);
    let three = || vec![on("edge3", "172.17.0.2"), on("edge4", "172.17.0.2"), on("edge5", "172.17.0.2")];
    let table = build_with(&mut builder, web(three()));
    assert_eq!((backends(&table, "web", "10.96.0.1:80").unwrap().len(), table.without_alias), (2, 1));
    let paths: Vec<Way> =
        table.get(&name("web")).unwrap().ports[0].endpoints.iter().map(|e| e.path.as_ref().unwrap().way()).collect();
    assert_eq!(paths.iter().filter(|way| **way == Way::None).count(), 1, "{paths:?}");
    // One goes, and its alias is free an hour later.
    let two = three().into_iter().filter(|e| e.place.node.as_deref() != Some("edge3")).collect();
    let table = build_with(&mut builder, [put_slice(slice("web", "web", two))]);
    assert_eq!((backends(&table, "web", "10.96.0.1:80").unwrap().len(), table.without_alias), (1, 1));
    builder.tell_time(start + HOUR);
    let table = builder.build().unwrap();
    assert_eq!((backends(&table, "web", "10.96.0.1:80").unwrap().len(), table.without_alias), (2, 0));
}

#[test]
fn what_an_earlier_agent_gave_out_is_in_force_from_the_first_table_on() {
    let mut first = builder("198.18.0.0/16");
    let table = build_with(&mut first, web(vec![on("edge3", "172.17.0.2"), on("edge4", "172.17.0.2")]));
    let (kept, gone) = (alias_of(&table, "web", "edge3").unwrap(), alias_of(&table, "web", "edge4").unwrap());
    let mut book = Book::new(ranges("198.18.0.0/16"), Instant::now());
    book.restore(first.kept_aliases().unwrap().1);
    let reach = Reach::new("edge1", ranges("198.18.0.0/16"), Overrides::default());
    let mut second = Builder::new(ServiceFilter::UnlabelledOnly, "edge1").with_detours(reach, book);
    assert!(second.last_table().aliases.target(gone).is_some(), "the kernel may still send there");
    let table = build_with(&mut second, web(vec![on("edge3", "172.17.0.2")]));
    assert!(table.aliases.target(gone).is_some(), "not everything has been seen");
    let table = build_with(&mut second, [Event::Synced]);
    assert_eq!(table.aliases.target(gone), None);
    assert_eq!(alias_of(&table, "web", "edge3"), Some(kept));
}

#[test]
fn a_node_has_aliases_for_as_long_as_somebody_speaks_of_it() {
    let mut builder = builder("198.18.0.0/16");
    let object = |name: &str, ip: &str| {
        let addresses = vec![ip.parse().unwrap()];
        Object::Node(Node { name: NamespacedName::new("", name), addresses, labels: Box::default() }.into())
    };
    let names =
        |table: &ServiceTable| table.nodes.iter().map(|node| node.name.to_string()).collect::<Vec<_>>().join(" ");
    let table = build_with(&mut builder, [Event::Apply(object("edge9", "192.168.1.9"))]);
    assert_eq!((&*names(&table), table.all_nodes), ("edge1 edge9", true));
    let met = |nodes: &[&str]| -> Arc<Meetings> {
        Arc::new(nodes.iter().map(|node| ((*node).into(), "192.168.1.7".parse().unwrap())).collect())
    };
    builder.follow_reach(|reach| reach.with_meetings(met(&["edge3", "edge7"])));
    let table = build_with(&mut builder, web(vec![on("edge3", "172.17.0.2"), on("edge2", "10.244.2.1")]));
    assert_eq!(names(&table), "edge1 edge2 edge3 edge7 edge9");
    let of = |table: &ServiceTable, name: &str| table.node(name).unwrap().aliases.clone();
    let aliases = of(&table, "edge3");
    for (alias, v4) in aliases.iter().zip([true, false]) {
        let target = table.aliases.target(*alias).unwrap();
        assert_eq!((&*target.node, target.is_node(), alias.is_ipv4()), ("edge3", true, v4));
    }
    assert_eq!(&*table.node("edge9").unwrap().addresses, ["192.168.1.9".parse::<IpAddr>().unwrap()]);

    builder.follow_reach(|reach| reach.with_meetings(met(&["edge7"])));
    let table = build_with(&mut builder, [put_slice(slice("web", "web", vec![on("edge3", "172.17.0.3")]))]);
    assert_eq!((&*names(&table), of(&table, "edge3")), ("edge1 edge3 edge7 edge9", aliases.clone()));
    builder.follow_reach(|reach| reach.with_meetings(Arc::default()));
    let gone = Event::Delete(Kind::Node, NamespacedName::new("", "edge9"));
    let table = build_with(&mut builder, [Event::Delete(Kind::Service, name("web")), gone]);
    assert_eq!((&*names(&table), table.all_nodes), ("edge1", false));
    assert_eq!(table.aliases.target(aliases[0]), None);
    let table = build_with(&mut builder, [Event::Apply(object("edge3", "192.168.1.3"))]);
    assert_eq!(of(&table, "edge3"), aliases, "the same again within the hour");
}

#[derive(Clone, Debug)]
enum Step {
    Put(usize, Vec<(u8, u8)>),
    Delete(usize),
    Routes(Vec<u8>),
    Wait(u64),
    Build,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let pods = || prop::collection::vec((0..4_u8, 0..4_u8), 0..4);
    let step = prop_oneof![
        4 => (0..3_usize, pods()).prop_map(|(service, pods)| Step::Put(service, pods)),
        1 => (0..3_usize).prop_map(Step::Delete),
        2 => prop::collection::vec(0..4_u8, 0..3).prop_map(Step::Routes),
        1 => (1..3000_u64).prop_map(Step::Wait),
        4 => Just(Step::Build),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// Whatever happens in between, the table is as one that was made of the last state alone, but for which alias each
    /// pod has; and each alias in a backend stands for that very pod.
    #[test]
    fn increments_come_to_the_same_as_a_fresh_start(steps in steps()) {
        let mut now = Instant::now();
        let mut kept = builder("198.18.0.0/16");
        let service_name = |number: usize| format!("s{number}");
        let mut state: BTreeMap<usize, Vec<(u8, u8)>> = BTreeMap::new();
        let mut reached: Vec<u8> = vec![];
        let route = |nodes: &[u8]| {
            Routes::new(nodes.iter().map(|node| {
                (Table::Main, format!("10.{node}.0.0/16").parse().unwrap(), 0, Leads::Gateway)
            }))
        };
        kept.follow_reach(|reach| reach.with_routes(Arc::default()));
        let events = |number: usize, pods: &[(u8, u8)]| {
            let name = service_name(number);
            let endpoints = pods.iter().map(|(node, pod)| on(&format!("edge{node}"), &format!("10.{node}.0.{}", pod + 1)));
            [put(service(&name, &[&format!("10.96.0.{}", number + 1)])), put_slice(slice(&name, &name, endpoints.collect()))]
        };
        for step in steps.into_iter().chain([Step::Build]) {
            match step {
                Step::Put(number, pods) => {
                    events(number, &pods).into_iter().for_each(|event| kept.apply(event));
                    state.insert(number, pods);
                }
                Step::Delete(number) => {
                    kept.apply(Event::Delete(Kind::Service, name(&service_name(number))));
                    kept.apply(Event::Delete(Kind::EndpointSlice, name(&service_name(number))));
                    state.remove(&number);
                }
                Step::Routes(nodes) => {
                    kept.follow_reach(|reach| reach.with_routes(Arc::new(route(&nodes))));
                    reached = nodes;
                }
                Step::Wait(seconds) => {
                    now += Duration::from_secs(seconds);
                    kept.tell_time(now);
                }
                Step::Build => {
                    kept.build();
                    let table = kept.last_table();
                    let mut fresh = builder("198.18.0.0/16");
                    fresh.follow_reach(|reach| reach.with_routes(Arc::new(route(&reached))));
                    for (number, pods) in &state {
                        events(*number, pods).into_iter().for_each(|event| fresh.apply(event));
                    }
                    let fresh = fresh.build().unwrap();
                    prop_assert_eq!(table.services.len(), fresh.services.len());
                    let mut held = BTreeSet::new();
                    let names = |table: &ServiceTable| -> Vec<Arc<str>> {
                        table.nodes.iter().map(|node| Arc::clone(&node.name)).collect()
                    };
                    prop_assert_eq!(names(&table), names(&fresh));
                    for node in table.nodes.iter() {
                        prop_assert_eq!(node.aliases.len(), 2);
                        for alias in &node.aliases {
                            let target = table.aliases.target(*alias).unwrap();
                            prop_assert!(target.is_node() && target.node == node.name);
                            held.insert(*alias);
                        }
                    }
                    for (ours, theirs) in table.services.iter().zip(&fresh.services) {
                        let (ours, theirs) = (&ours.ports[0].endpoints, &theirs.ports[0].endpoints);
                        prop_assert_eq!(ours.len(), theirs.len());
                        for (a, b) in ours.iter().zip(theirs) {
                            let (a_path, b_path) = (a.path.as_ref().unwrap(), b.path.as_ref().unwrap());
                            prop_assert_eq!((a.addr, a_path.reason), (b.addr, b_path.reason));
                            prop_assert!(a_path.way() != Way::Remote || a_path.alias.is_some());
                            if let Some(alias) = a_path.alias {
                                let target = table.aliases.target(alias).unwrap();
                                prop_assert_eq!(
                                    (Some(&*target.node), target.addr),
                                    (a.place.node.as_deref(), a.addr.ip())
                                );
                                held.insert(alias);
                            }
                        }
                    }
                    prop_assert_eq!(table.aliases.len(), held.len(), "aliases that nobody has");
                }
            }
        }
    }
}
