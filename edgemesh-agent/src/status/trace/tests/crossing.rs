//! Connections that leave for other nodes.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    alias::{AliasRanges, Book, Overrides, Reach},
    status::PeerRow,
};

/// What `edge1` knows, which has no route to any other node's pods.
fn far_table(services: Vec<Service>, slices: Vec<Event>) -> Arc<ServiceTable> {
    let ranges = AliasRanges { v4: "198.18.0.0/16".parse().unwrap(), v6: "fd00:a11a::/64".parse().unwrap() };
    let reach = Reach::new("edge1", ranges, Overrides::default());
    let mut builder =
        Builder::new(ServiceFilter::UnlabelledOnly, "edge1").with_detours(reach, Book::new(ranges, Instant::now()));
    let services = services.into_iter().map(|service| Event::Apply(Object::Service(service.into())));
    services.chain(slices).chain([Event::Synced]).for_each(|event| builder.apply(event));
    builder.build().unwrap()
}

/// `default/web` with these endpoints, in pods of these nodes.
fn far_web(endpoints: &[(&str, &str)]) -> Arc<ServiceTable> {
    let endpoints = endpoints.iter().map(|(ip, node)| endpoint(ip, node, true)).collect();
    far_table(vec![service("web", "10.96.0.10")], vec![slice("web", endpoints)])
}

fn backends(table: &ServiceTable) -> Vec<SocketAddr> {
    table.services[0].frontends[0].backends.to_vec()
}

fn alias_of(table: &ServiceTable, node: &str) -> SocketAddr {
    let stands_for = |at: &SocketAddr| table.aliases.target(at.ip()).is_some_and(|target| &*target.node == node);
    backends(table).into_iter().find(stands_for).unwrap()
}

/// The trace of the frontend, of which the kernel has all backends.
fn of_frontend(table: &ServiceTable) -> TraceReport {
    let in_force = InForce::Frontend { shares: equal_shares(&backends(table)), choice: None };
    facts(table, "10.96.0.10:80", in_force)
}

fn hole() -> PeerRow {
    PeerRow {
        node: "edge2".to_owned(),
        peer_id: "12D3".to_owned(),
        path: "hole-punched".to_owned(),
        via: None,
        transport: "quic".to_owned(),
        address: Some("203.0.113.2:20006".parse().unwrap()),
        rtt_micros: Some(1234),
        streams: 0,
        sent_bytes: 0,
        received_bytes: 0,
        up_seconds: 60,
    }
}

#[test]
fn an_endpoint_of_another_site_is_followed_to_its_node() {
    let table = far_web(&[("10.244.1.7", "edge2")]);
    let alias = alias_of(&table, "edge2");
    let mut report = of_frontend(&table);
    assert!(report.answer.ends_with("that is the alias of 10.244.1.7 on edge2, reached by the tunnel"), "{report:?}");
    let endpoint = "10.244.1.7:8080".parse().unwrap();
    assert_eq!(report.crossings, [Crossing::new("edge2", endpoint, alias)]);
    assert!(!report.arrives(), "nobody has been asked, as there is no tunnel");
    let shown = show::trace(&report);
    assert!(shown.contains("  tunnel: NOT RUNNING on this node; see the conditions"), "{shown}");

    report.crossings[0].path = Some(hole());
    report.crossings[0].far = FarRow {
        rule: "an endpoint of a Service on this node".to_owned(),
        services: vec!["default/web".to_owned()],
        dial_micros: Some(312),
        ..FarRow::of(FarOutcome::Connected, "")
    };
    assert!(report.arrives());
    let wanted = format!(
        "\n{alias} is the alias of 10.244.1.7:8080 on edge2\n  tunnel: hole-punched, quic, 203.0.113.2:20006, rtt 1.2 ms\n  \
         edge2: allowed, endpoint of default/web; its pod answered in 0.3 ms\n"
    );
    let shown = show::trace(&report);
    assert!(shown.contains(&wanted), "{wanted} in\n{shown}");
}

#[test]
fn each_end_of_a_way_has_its_words_and_says_whether_connections_are_lost() {
    let table = far_web(&[("10.244.1.7", "edge2")]);
    let mut report = of_frontend(&table);
    for (outcome, path, arrives, words) in [
        (FarOutcome::Allowed, true, true, "edge2: allowed, a rule; whether its pod answers is not tried with UDP\n"),
        (FarOutcome::Refused, true, false, "edge2: allowed, a rule; its pod REFUSES the connection: why\n"),
        (FarOutcome::Unreachable, true, false, "its pod is NOT REACHABLE from there: why\n"),
        (FarOutcome::TimedOut, true, false, "its pod is SILENT: why\n"),
        (FarOutcome::NotAllowed, true, false, "edge2: NOT ALLOWED there: why\n"),
        (FarOutcome::Busy, true, true, "edge2: TOO BUSY to be asked: why\n"),
        (FarOutcome::Silent, true, false, "tunnel: relayed via cloud, tcp\n  edge2: SILENT: why\n"),
        (
            FarOutcome::TooOld,
            true,
            true,
            "edge2: its agent is too old to be asked; connections may work all the same\n",
        ),
        (FarOutcome::Misunderstood, true, true, "edge2: its agent says what this one does not understand: why\n"),
        (FarOutcome::NoPath, false, false, "  tunnel: NO PATH: why\n"),
        (FarOutcome::NoTunnel, false, false, "  tunnel: NOT RUNNING"),
    ] {
        let relayed = || PeerRow {
            path: "relayed".to_owned(),
            via: Some("cloud".to_owned()),
            transport: "tcp".to_owned(),
            address: None,
            rtt_micros: None,
            ..hole()
        };
        report.crossings[0].path = path.then(relayed);
        report.crossings[0].far = FarRow { rule: "a rule".to_owned(), ..FarRow::of(outcome, "why") };
        let shown = show::trace(&report);
        assert!(shown.contains(words), "{words} in\n{shown}");
        assert_eq!(shown.contains("edge2:"), path, "who was not asked says nothing:\n{shown}");
        assert_eq!(report.arrives(), arrives, "{outcome:?}");
    }
}

#[test]
fn a_backend_here_is_enough_and_a_backend_there_that_is_left_out_may_be() {
    let table = far_web(&[("10.244.0.1", "edge1"), ("10.244.1.7", "edge2")]);
    let report = of_frontend(&table);
    assert_eq!(report.crossings.len(), 1);
    assert!(report.arrives(), "at the one on this node");

    let many: Vec<(String, String)> =
        (0..20).map(|number| (format!("10.244.9.{number}"), format!("edge{}", 2 + number / 10))).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(ip, node)| (ip.as_str(), node.as_str())).collect();
    let report = of_frontend(&far_web(&many));
    assert_eq!((report.crossings.len(), report.crossings_left_out), (16, 4));
    let nodes: BTreeSet<&str> = report.crossings[..2].iter().map(|crossing| crossing.node.as_str()).collect();
    assert_eq!(nodes, BTreeSet::from(["edge2", "edge3"]), "no node is left out for another's many");
    assert!(report.arrives(), "as nobody knows better");
    assert!(show::trace(&report).contains("and 4 more on other nodes, of which none was asked\n"));
}

#[test]
fn of_a_client_that_stays_with_one_backend_only_that_is_followed() {
    let table = far_web(&[("10.244.1.7", "edge2"), ("10.244.1.7", "edge3")]);
    for node in ["edge2", "edge3"] {
        let backend = alias_of(&table, node);
        let choice = Choice { backend, by: ChosenBy::Affinity { left: Duration::from_secs(9) } };
        let in_force = InForce::Frontend { shares: equal_shares(&backends(&table)), choice: Some(choice) };
        let client = Some(("web-0".to_owned(), pod()));
        let kernel = Some(Ok(in_force));
        let report = trace(Facts { table: &table, at: at("10.96.0.10:80"), kernel, cgroup: String::new(), client });
        let nodes: Vec<&str> = report.crossings.iter().map(|crossing| crossing.node.as_str()).collect();
        assert_eq!(nodes, [node]);
    }
}

#[test]
fn an_alias_is_carried_whoever_connects_and_followed() {
    let table = far_web(&[("10.244.1.7", "edge2")]);
    let alias = SocketAddr::new(alias_of(&table, "edge2").ip(), 9);
    let report = facts(&table, &alias.to_string(), InForce::Nothing);
    assert_eq!((report.outcome, report.kernel.state), (Outcome::Carried, KernelState::Same));
    let words = "taken by this agent: it is the alias of 10.244.1.7 on node edge2, and is carried there by the tunnel";
    assert_eq!(report.answer, words);
    assert_eq!(report.crossings, [Crossing::new("edge2", "10.244.1.7:9".parse().unwrap(), alias)]);

    let client = Some(("42".to_owned(), Client { served: Served::No, ..pod() }));
    let at = FrontendAddr { addr: alias, protocol: Protocol::Tcp };
    let unserved = Facts { table: &table, at, kernel: Some(Ok(InForce::Nothing)), cgroup: String::new(), client };
    assert_eq!(trace(unserved).outcome, Outcome::Carried, "the kernel's routes lead there, and no program");
}

#[test]
fn a_pods_own_address_is_followed_where_it_is_only_another_nodes() {
    let table = far_web(&[("10.244.1.7", "edge2"), ("10.244.1.7", "edge3"), ("10.244.0.1", "edge1")]);
    let report = facts(&table, "10.244.1.7:8080", InForce::Nothing);
    assert_eq!(report.outcome, Outcome::Untouched);
    let crossings: BTreeSet<(&str, IpAddr)> =
        report.crossings.iter().map(|crossing| (crossing.node.as_str(), crossing.alias.ip())).collect();
    let (edge2, edge3) = (alias_of(&table, "edge2"), alias_of(&table, "edge3"));
    assert_eq!(crossings, BTreeSet::from([("edge2", edge2.ip()), ("edge3", edge3.ip())]));
    let note = format!(
        "it is an endpoint of default/web, port 80, on edge2, which only the tunnel reaches: from here connect to its alias \
         {edge2}"
    );
    assert!(report.notes.contains(&note), "{note} in {:?}", report.notes);
    assert!(!report.arrives(), "at the address itself nobody is");

    // Another node's pod has the address of one here, which is the one that is reached.
    let table = far_web(&[("10.244.0.1", "edge1"), ("10.244.0.1", "edge2")]);
    assert!(facts(&table, "10.244.0.1:8080", InForce::Nothing).crossings.is_empty());
    // And one of no Service is nobody's.
    assert!(facts(&table, "10.244.1.7:1", InForce::Nothing).crossings.is_empty());
}

#[test]
fn what_is_refused_here_is_followed_nowhere() {
    let table = far_web(&[("10.244.1.7", "edge2")]);
    let report = facts(&table, "10.96.0.10:99", InForce::ServiceAddress);
    assert_eq!((report.outcome, report.crossings.len()), (Outcome::Refused, 0));
}
