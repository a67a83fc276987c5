use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use proptest::prelude::*;

use super::{
    Verdict::{
        NodeUnknown, NotOnThisNode, NotReady, OtherNode, OtherNodeGroup, OtherTopologyKey, OtherZone, Ready,
        ServingTerminating, Terminating, TerminatingUnneeded,
    },
    *,
};
use crate::model::{NamespacedName, ServiceKind};

const ZONE: &str = "topology.kubernetes.io/zone";
const GROUP: &str = "apps.kubeedge.io/belonging-to";

fn service() -> Service {
    Service::new(NamespacedName::new("default", "web"), ServiceKind::ClusterIp)
}

fn node(name: &str, labels: &[(&str, &str)]) -> Node {
    let mut labels: Vec<(Arc<str>, Arc<str>)> = labels.iter().map(|&(key, value)| (key.into(), value.into())).collect();
    labels.sort();
    Node { name: NamespacedName::new("", name), addresses: Vec::new(), labels: labels.into() }
}

fn nodes(list: &[Node]) -> Nodes {
    list.iter().map(|node| (Arc::clone(&node.name.name), Arc::new(node.clone()))).collect()
}

/// Ready, and nowhere in particular.
fn endpoint(place: Place) -> PortEndpoint {
    PortEndpoint {
        addr: "10.244.0.1:80".parse().unwrap(),
        ready: true,
        serving: true,
        terminating: false,
        verdicts: Verdicts { cluster: NotReady, local: NotReady },
        place: Arc::new(place),
        path: None,
    }
}

fn on(node: &str) -> Place {
    Place { node: Some(node.into()), ..Place::default() }
}

/// On a node, in a zone, with hints for zones and nodes; words apart by spaces.
fn hinted(node: &str, zone: &str, for_zones: &str, for_nodes: &str) -> PortEndpoint {
    let list = |words: &str| words.split_whitespace().map(Box::from).collect();
    let zone = Some(zone).filter(|zone| !zone.is_empty()).map(Box::from);
    let (for_zones, for_nodes) = (list(for_zones), list(for_nodes));
    endpoint(Place { node: Some(node.into()), zone, for_zones, for_nodes, hostname: None })
}

fn conditions(mut endpoint: PortEndpoint, ready: bool, serving: bool, terminating: bool) -> PortEndpoint {
    (endpoint.ready, endpoint.serving, endpoint.terminating) = (ready, serving, terminating);
    endpoint
}

/// The verdicts for clients on `edge1`.
fn verdicts(service: &Service, endpoints: &[PortEndpoint], nodes: &Nodes) -> (Vec<Verdict>, Vec<Verdict>) {
    let mut endpoints = endpoints.to_vec();
    judge(service, &mut endpoints, &Vantage { name: "edge1", nodes });
    endpoints.iter().map(|endpoint| (endpoint.verdicts.cluster, endpoint.verdicts.local)).unzip()
}

#[test]
fn by_conditions_alone_ready_ones_serve_and_then_terminating_ones() {
    let all =
        [(true, true, false), (false, true, true), (false, false, true), (false, true, false), (true, true, true)];
    let with = |which: &[usize]| -> Vec<PortEndpoint> {
        which.iter().map(|&i| conditions(endpoint(on("edge1")), all[i].0, all[i].1, all[i].2)).collect()
    };
    let cases: [(&[usize], &[Verdict]); 5] = [
        (&[0, 1, 2, 3], &[Ready, TerminatingUnneeded, Terminating, NotReady]),
        (&[1, 2, 3], &[ServingTerminating, Terminating, NotReady]),
        (&[2, 3], &[Terminating, NotReady]),
        // Ready counts before terminating: publishNotReadyAddresses makes such endpoints.
        (&[4, 1], &[Ready, TerminatingUnneeded]),
        (&[], &[]),
    ];
    for (which, expected) in cases {
        let (cluster, local) = verdicts(&service(), &with(which), &nodes(&[]));
        assert_eq!((&cluster[..], &local[..]), (expected, expected), "{which:?}");
    }
}

#[test]
fn the_policies_are_judged_apart() {
    let terminating = |node| conditions(endpoint(on(node)), false, true, true);
    let cases = [
        // A ready endpoint elsewhere does not keep a terminating one here from serving those who may not leave.
        (
            vec![terminating("edge1"), endpoint(on("edge2"))],
            [TerminatingUnneeded, Ready],
            [ServingTerminating, NotOnThisNode],
        ),
        (vec![endpoint(on("edge1")), terminating("edge1")], [Ready, TerminatingUnneeded], [Ready, TerminatingUnneeded]),
        (vec![endpoint(on("edge2")), endpoint(Place::default())], [Ready, Ready], [NotOnThisNode, NotOnThisNode]),
    ];
    for (endpoints, cluster, local) in cases {
        assert_eq!(verdicts(&service(), &endpoints, &nodes(&[])), (cluster.to_vec(), local.to_vec()));
    }
}

#[test]
fn families_are_judged_apart() {
    let mut endpoints = vec![conditions(endpoint(on("edge1")), false, true, true), endpoint(on("edge1"))];
    endpoints[1].addr = "[fd00::1]:80".parse().unwrap();
    let (cluster, _) = verdicts(&service(), &endpoints, &nodes(&[]));
    assert_eq!(cluster, [ServingTerminating, Ready]);
}

#[test]
fn zone_hints_are_followed_only_if_all_ready_endpoints_have_them_and_one_is_for_this_zone() {
    let here = nodes(&[node("edge1", &[(ZONE, "a")])]);
    let not_ready = |endpoint| conditions(endpoint, false, false, false);
    let cases = [
        ("followed", vec![hinted("e2", "a", "a", ""), hinted("e3", "b", "b", "")], vec![Ready, OtherZone]),
        ("several zones", vec![hinted("e2", "b", "a b", ""), hinted("e3", "b", "b c", "")], vec![Ready, OtherZone]),
        ("one without", vec![hinted("e2", "a", "a", ""), hinted("e3", "b", "", "")], vec![Ready, Ready]),
        ("none for this zone", vec![hinted("e2", "b", "b", ""), hinted("e3", "c", "c", "")], vec![Ready, Ready]),
        (
            "only ready ones count",
            vec![hinted("e2", "a", "a", ""), hinted("e3", "b", "b", ""), not_ready(hinted("e4", "c", "", ""))],
            vec![Ready, OtherZone, NotReady],
        ),
        (
            "not ready for this zone",
            vec![not_ready(hinted("e2", "a", "a", "")), hinted("e3", "b", "b", "")],
            vec![NotReady, Ready],
        ),
    ];
    for (what, endpoints, expected) in cases {
        assert_eq!(verdicts(&service(), &endpoints, &here).0, expected, "{what}");
    }
    let endpoints = [hinted("e2", "a", "a", ""), hinted("e3", "b", "b", "")];
    for (what, nodes) in [("unknown node", nodes(&[])), ("node without a zone", nodes(&[node("edge1", &[])]))] {
        assert_eq!(verdicts(&service(), &endpoints, &nodes).0, [Ready, Ready], "{what}");
    }
}

#[test]
fn node_hints_go_before_zone_hints() {
    let here = nodes(&[node("edge1", &[(ZONE, "a")])]);
    let cases = [
        ("this node", vec![hinted("edge1", "a", "a", "edge1"), hinted("e2", "a", "a", "e2")], vec![Ready, OtherNode]),
        (
            "none for this node, so the zone",
            vec![hinted("e2", "a", "a", "e2"), hinted("e3", "b", "b", "e3")],
            vec![Ready, OtherZone],
        ),
        (
            "one without a node hint, so the zone",
            vec![hinted("edge1", "b", "b", "edge1"), hinted("e2", "a", "a", "")],
            vec![OtherZone, Ready],
        ),
        ("neither", vec![hinted("e2", "b", "b", "e2"), hinted("e3", "c", "c", "e3")], vec![Ready, Ready]),
        // The node's name is known without its object.
        (
            "named otherwise than where it is",
            vec![hinted("e2", "b", "b", "edge1"), hinted("edge1", "a", "a", "e2")],
            vec![Ready, OtherNode],
        ),
    ];
    for (what, endpoints, expected) in cases {
        let (cluster, local) = verdicts(&service(), &endpoints, &here);
        assert_eq!(cluster, expected, "{what}");
        // Hints do not matter to policy Local.
        for (endpoint, verdict) in endpoints.iter().zip(local) {
            let here = endpoint.place.node.as_deref() == Some("edge1");
            assert_eq!(verdict, if here { Ready } else { NotOnThisNode }, "{what}");
        }
    }
}

#[test]
fn a_traffic_distribution_without_hints_is_followed_as_its_hints_would_be() {
    let here = nodes(&[node("edge1", &[(ZONE, "a")])]);
    let prefer = |distribution| Service { distribution: Some(distribution), ..service() };
    let (zone, on_node) = (prefer(TrafficDistribution::SameZone), prefer(TrafficDistribution::SameNode));
    let plain = |node: &str, zone: &str| hinted(node, zone, "", "");
    let cases = [
        ("zone", &zone, vec![plain("edge1", "a"), plain("e2", "a"), plain("e3", "b")], vec![Ready, Ready, OtherZone]),
        ("no such zone", &zone, vec![plain("e2", "c"), plain("e3", "b")], vec![Ready, Ready]),
        ("one without a zone", &zone, vec![plain("e2", "a"), plain("e3", "")], vec![Ready, Ready]),
        (
            "node",
            &on_node,
            vec![plain("edge1", "a"), plain("e2", "a"), plain("e3", "b")],
            vec![Ready, OtherNode, OtherNode],
        ),
        ("node, else zone", &on_node, vec![plain("e2", "a"), plain("e3", "b")], vec![Ready, OtherZone]),
        ("node, else zone, else any", &on_node, vec![plain("e2", "c"), plain("e3", "b")], vec![Ready, Ready]),
        // The controller knows better, whatever it hints.
        ("hints", &on_node, vec![hinted("edge1", "a", "b", ""), hinted("e2", "a", "a", "")], vec![OtherZone, Ready]),
    ];
    for (what, service, endpoints, expected) in cases {
        assert_eq!(verdicts(service, &endpoints, &here).0, expected, "{what}");
    }
    let endpoints = [plain("e2", "a"), plain("e3", "b")];
    assert_eq!(verdicts(&service(), &endpoints, &here).0, [Ready, Ready], "nothing preferred");
}

#[test]
fn a_node_group_keeps_out_all_others_and_nodes_without_one_are_no_group() {
    let limited = Service { within_node_group: true, ..service() };
    let endpoints = [on("edge1"), on("e2"), on("e3"), on("e4"), on("gone"), Place::default()].map(endpoint);
    let others = [node("e2", &[(GROUP, "hangzhou")]), node("e3", &[(GROUP, "beijing")]), node("e4", &[])];
    let with = |this: &[(&str, &str)]| {
        let mut all = others.to_vec();
        all.push(node("edge1", this));
        nodes(&all)
    };
    let refused = [OtherNodeGroup, OtherNodeGroup, NodeUnknown, NodeUnknown];
    let (cluster, local) = verdicts(&limited, &endpoints, &with(&[(GROUP, "hangzhou")]));
    assert_eq!(cluster, [&[Ready, Ready][..], &refused].concat());
    assert_eq!(local, [&[Ready, NotOnThisNode][..], &refused].concat(), "limits go before the policy");
    for this in [&[][..], &[(GROUP, "")]] {
        let (cluster, _) = verdicts(&limited, &endpoints, &with(this));
        assert_eq!(cluster, [&[Ready, OtherNodeGroup][..], &refused].concat(), "the same node always matches");
    }
    let (cluster, _) = verdicts(&limited, &endpoints, &nodes(&others));
    assert_eq!(cluster, [Ready; 6], "this node is not known");
}

#[test]
fn topology_keys_want_one_label_in_common() {
    let keyed = |keys: &[&str]| Service { topology_keys: keys.iter().map(|&key| key.into()).collect(), ..service() };
    let all = nodes(&[
        node("edge1", &[("site", "x"), ("rack", "1"), ("empty", "")]),
        node("e2", &[("site", "x"), ("rack", "2")]),
        node("e3", &[("site", "y"), ("rack", "1"), ("empty", "")]),
        node("e4", &[]),
    ]);
    let endpoints = [on("edge1"), on("e2"), on("e3"), on("e4"), on("gone"), Place::default()].map(endpoint);
    let other = OtherTopologyKey;
    let cases: [(&[&str], [Verdict; 6]); 7] = [
        (&["site"], [Ready, Ready, other, other, NodeUnknown, NodeUnknown]),
        (&["site", "rack"], [Ready, Ready, Ready, other, NodeUnknown, NodeUnknown]),
        (&["rack", "site"], [Ready, Ready, Ready, other, NodeUnknown, NodeUnknown]),
        // As in SuperEdge, this node's own endpoints are no exception.
        (&["absent"], [other, other, other, other, NodeUnknown, NodeUnknown]),
        (&["empty"], [Ready, other, Ready, other, NodeUnknown, NodeUnknown]),
        (&["absent", "*"], [Ready; 6]),
        (&[], [Ready; 6]),
    ];
    for (keys, expected) in cases {
        assert_eq!(verdicts(&keyed(keys), &endpoints, &all).0, expected, "{keys:?}");
    }
    assert_eq!(verdicts(&keyed(&["site"]), &endpoints, &nodes(&[])).0, [Ready; 6], "this node is not known");
}

#[test]
fn what_limits_leave_out_counts_for_nothing_else() {
    let limited = Service { within_node_group: true, ..service() };
    let all = nodes(&[
        node("edge1", &[(GROUP, "g"), (ZONE, "a")]),
        node("e2", &[(GROUP, "g")]),
        node("e3", &[(GROUP, "other")]),
    ]);
    // Ready, but not in the group: the terminating one in the group is the last that serves.
    let endpoints = [conditions(endpoint(on("e2")), false, true, true), endpoint(on("e3"))];
    assert_eq!(verdicts(&limited, &endpoints, &all).0, [ServingTerminating, OtherNodeGroup]);
    // Without hints, but not in the group: the others' hints are followed.
    let endpoints = [hinted("edge1", "a", "a", ""), hinted("e2", "b", "b", ""), hinted("e3", "a", "", "")];
    assert_eq!(verdicts(&limited, &endpoints, &all).0, [Ready, OtherZone, OtherNodeGroup]);
}

/// kube-proxy's `CategorizeEndpoints`, written down as its documentation tells it: two sets, made by filters.
fn categorize(endpoints: &[PortEndpoint], name: &str, zone: &str) -> (BTreeSet<usize>, BTreeSet<usize>) {
    let set = |keep: &dyn Fn(&PortEndpoint) -> bool| -> BTreeSet<usize> {
        endpoints.iter().enumerate().filter(|(_, endpoint)| keep(endpoint)).map(|(i, _)| i).collect()
    };
    let has = |list: &[Box<str>], wanted: &str| list.iter().any(|entry| **entry == *wanted);
    let is_local = |endpoint: &PortEndpoint| endpoint.place.node.as_deref() == Some(name);
    let draining = |endpoint: &PortEndpoint| endpoint.serving && endpoint.terminating;

    let ready: Vec<&PortEndpoint> = endpoints.iter().filter(|endpoint| endpoint.ready).collect();
    let node_mode =
        ready.iter().all(|e| !e.place.for_nodes.is_empty()) && ready.iter().any(|e| has(&e.place.for_nodes, name));
    let zone_mode =
        ready.iter().all(|e| !e.place.for_zones.is_empty()) && ready.iter().any(|e| has(&e.place.for_zones, zone));
    let mut cluster = set(&|e| {
        e.ready && if node_mode { has(&e.place.for_nodes, name) } else { !zone_mode || has(&e.place.for_zones, zone) }
    });
    if cluster.is_empty() {
        cluster = set(&|e| draining(e));
    }
    let mut local = set(&|e| is_local(e) && e.ready);
    if local.is_empty() {
        local = set(&|e| is_local(e) && draining(e));
    }
    (cluster, local)
}

fn any_name() -> impl Strategy<Value = Box<str>> {
    prop_oneof![Just("edge1"), Just("e2"), Just("e3")].prop_map(Box::from)
}

fn any_zone() -> impl Strategy<Value = Box<str>> {
    prop_oneof![Just("a"), Just("b")].prop_map(Box::from)
}

fn any_endpoints() -> impl Strategy<Value = Vec<PortEndpoint>> {
    let list = |one: BoxedStrategy<Box<str>>| {
        // Mostly present, as hints are only followed if they always are.
        prop_oneof![1 => Just(Vec::new()), 6 => proptest::collection::vec(one, 1..3)].prop_map(Box::from)
    };
    let place = (
        proptest::option::of(any_name()),
        proptest::option::of(any_zone()),
        list(any_zone().boxed()),
        list(any_name().boxed()),
    )
        .prop_map(|(node, zone, for_zones, for_nodes)| Place { node, zone, for_zones, for_nodes, hostname: None });
    let one = (place, any::<[bool; 3]>())
        .prop_map(|(place, [ready, serving, terminating])| conditions(endpoint(place), ready, serving, terminating));
    proptest::collection::vec(one, 0..5).prop_map(|mut endpoints| {
        for (n, endpoint) in endpoints.iter_mut().enumerate() {
            endpoint.addr = SocketAddr::new([10, 244, 0, n as u8].into(), 80);
        }
        endpoints
    })
}

fn eligible(verdicts: &[Verdict]) -> BTreeSet<usize> {
    verdicts.iter().enumerate().filter(|(_, verdict)| verdict.eligible()).map(|(i, _)| i).collect()
}

proptest! {
    #[test]
    fn without_limits_the_eligible_endpoints_are_those_of_kube_proxy(
        mut endpoints in any_endpoints(), zone in proptest::option::of(any_zone()), hints in any::<[bool; 2]>(),
    ) {
        for (hints, wanted) in hints.into_iter().enumerate() {
            for endpoint in endpoints.iter_mut().filter(|_| !wanted) {
                let place = Arc::make_mut(&mut endpoint.place);
                if hints == 0 { place.for_nodes = Box::default() } else { place.for_zones = Box::default() }
            }
        }
        let labels: Vec<(&str, &str)> = zone.iter().map(|zone| (ZONE, &**zone)).collect();
        let all = nodes(&[node("edge1", &labels)]);
        let (cluster, local) = verdicts(&service(), &endpoints, &all);
        let model = categorize(&endpoints, "edge1", zone.as_deref().unwrap_or(""));
        prop_assert_eq!((eligible(&cluster), eligible(&local)), model);
    }

    #[test]
    fn limits_act_as_if_what_they_refuse_were_not_there(
        endpoints in any_endpoints(),
        groups in proptest::collection::vec(prop_oneof![Just(""), Just("g"), Just("h")], 3),
        keys in proptest::collection::vec(prop_oneof![Just(GROUP), Just(ZONE), Just("*")], 0..3),
        within_node_group in any::<bool>(),
        distribution in proptest::option::of(
            prop_oneof![Just(TrafficDistribution::SameZone), Just(TrafficDistribution::SameNode)],
        ),
    ) {
        let all: Vec<Node> = ["edge1", "e2", "e3"]
            .iter()
            .zip(&groups)
            .map(|(name, group)| node(name, &[(GROUP, group), (ZONE, "a")]))
            .collect();
        let all = nodes(&all);
        let topology_keys = keys.into_iter().map(Box::from).collect();
        let limited = Service { within_node_group, topology_keys, distribution, ..service() };
        let (cluster, local) = verdicts(&limited, &endpoints, &all);
        let is_refusal = |verdict: &Verdict| matches!(verdict, OtherNodeGroup | OtherTopologyKey | NodeUnknown);
        let left: Vec<PortEndpoint> =
            endpoints.iter().zip(&cluster).filter(|(_, v)| !is_refusal(v)).map(|(e, _)| e.clone()).collect();
        // Whether hints are assumed is decided by all endpoints, hence the same hints.
        let hinted = |e: &PortEndpoint| !e.place.for_zones.is_empty() || !e.place.for_nodes.is_empty();
        let distribution = distribution.filter(|_| !endpoints.iter().any(hinted));
        let unlimited = Service { distribution, ..service() };
        let (again_cluster, again_local) = verdicts(&unlimited, &left, &all);
        let kept = |verdicts: Vec<Verdict>| -> Vec<Verdict> { verdicts.into_iter().filter(|v| !is_refusal(v)).collect() };
        prop_assert_eq!((kept(cluster), kept(local)), (again_cluster, again_local));
    }
}
