//! DestinationRules: which one counts for a Service, and what it changes.

use super::*;

fn rule(of: &str) -> DestinationRule {
    DestinationRule { balance: Balance::SourceIp, ..DestinationRule::new(of.parse().unwrap()) }
}

fn for_host(of: &str, host: &str) -> DestinationRule {
    DestinationRule { host: Some(host.parse().unwrap()), ..rule(of) }
}

fn put_rule(rule: &DestinationRule) -> Event {
    Event::Apply(Object::DestinationRule(rule.clone().into()))
}

fn drop_rule(of: &str) -> Event {
    Event::Delete(Kind::DestinationRule, of.parse().unwrap())
}

fn web() -> Service {
    let mut service = service("web", &["10.96.0.1", "fd00::1"]);
    service.ports.push(port("other", Protocol::Udp, 81));
    service
}

/// The balance of each frontend of `default/web`.
fn balances(builder: &mut Builder) -> Vec<Balance> {
    builder.build();
    let entry = builder.table.get(&name("web")).unwrap();
    entry.frontends.iter().map(|frontend| frontend.balance).collect()
}

fn builder(events: impl IntoIterator<Item = Event>) -> Builder {
    let mut builder = Builder::default();
    events.into_iter().for_each(|event| builder.apply(event));
    builder
}

/// Which rule counts for `default/web`, whatever the order in which these come.
fn winner(rules: &[DestinationRule]) -> Option<String> {
    let forth: Vec<usize> = (0..rules.len()).collect();
    let back = forth.iter().rev().copied().collect();
    let winners = [forth, back].map(|order: Vec<usize>| {
        let mut builder = builder(order.iter().map(|&at| put_rule(&rules[at])).chain([put(web())]));
        builder.build();
        builder.table.get(&name("web")).unwrap().rule.as_ref().map(|rule| rule.name.to_string())
    });
    assert_eq!(winners[0], winners[1]);
    winners[0].clone()
}

#[test]
fn section_2_6_a_rule_counts_for_the_service_of_its_own_name_and_namespace_on_all_ports() {
    let mut builder = builder([put(web()), put_rule(&rule("default/web"))]);
    assert_eq!(balances(&mut builder), [Balance::SourceIp; 4]);
    builder.apply(drop_rule("default/web"));
    builder.apply(put_rule(&rule("other/web")));
    builder.apply(put_rule(&rule("default/api")));
    assert_eq!(balances(&mut builder), [Balance::Random; 4]);
}

#[test]
fn a_rule_counts_for_the_service_of_its_host_and_for_that_of_its_name() {
    for (of, host, expected) in [
        ("default/x", "default/web", Balance::SourceIp),
        ("istio-system/x", "default/web", Balance::SourceIp),
        ("default/x", "other/web", Balance::Random),
        ("default/web", "default/api", Balance::SourceIp),
    ] {
        let mut builder = builder([put_rule(&for_host(of, host)), put(web())]);
        assert_eq!(balances(&mut builder), [expected; 4], "{of} for {host}");
    }
}

#[test]
fn the_settings_of_a_port_are_those_of_its_number_whatever_the_protocol() {
    let mut of_port = rule("default/web");
    of_port.ports.insert(NonZeroU16::new(81).unwrap(), Balance::Random);
    let mut builder = builder([put(web()), put_rule(&of_port)]);
    assert_eq!(balances(&mut builder), [Balance::SourceIp, Balance::SourceIp, Balance::Random, Balance::Random]);
}

#[test]
fn of_several_rules_the_nearest_then_the_most_certain_then_the_oldest_counts() {
    let aged = |of: &str, created: i64| DestinationRule { created: Some(created), ..for_host(of, "default/web") };
    let limited = |of: &str| DestinationRule { for_some_clients: true, ..for_host(of, "default/web") };
    for (rules, expected) in [
        (vec![], None),
        (vec![limited("default/a")], Some("default/a")),
        (vec![limited("default/a"), aged("z/z", 9)], Some("z/z")),
        (vec![aged("a/a", 1), rule("default/web")], Some("default/web")),
        (vec![aged("a/a", 1), for_host("default/z", "default/web")], Some("default/z")),
        (vec![rule("default/web"), aged("default/z", 9)], Some("default/z")),
        (vec![aged("default/a", 2), aged("default/b", 1), for_host("default/0", "default/web")], Some("default/b")),
        (vec![aged("default/b", 1), aged("default/a", 1)], Some("default/a")),
        (vec![for_host("default/web", "default/web"), aged("default/x", 1)], Some("default/x")),
    ] {
        assert_eq!(winner(&rules).as_deref(), expected, "{rules:?}");
    }
}

#[test]
fn a_rule_that_does_not_count_is_noted_where_it_would_have() {
    let mut builder =
        builder([put(web()), put_rule(&rule("default/web")), put_rule(&for_host("default/x", "default/web"))]);
    builder.build();
    let note = Note::Overruled { rule: name("web"), by: name("x") };
    assert_eq!(builder.table.get(&name("web")).unwrap().notes, [note]);
    builder.apply(drop_rule("default/x"));
    builder.build();
    let entry = builder.table.get(&name("web")).unwrap();
    assert!(entry.notes.is_empty() && entry.rule.as_ref().is_some_and(|rule| rule.name == name("web")));
}

#[test]
fn section_b1_and_b16_a_rule_may_come_before_its_service_and_go_before_or_after_it() {
    let mut builder = builder([put_rule(&for_host("default/x", "default/web"))]);
    builder.build();
    builder.apply(put(web()));
    assert_eq!(balances(&mut builder), [Balance::SourceIp; 4], "it counts at once, not at some resync");
    builder.apply(Event::Delete(Kind::Service, name("web")));
    builder.build();
    builder.apply(put(web()));
    assert_eq!(balances(&mut builder), [Balance::SourceIp; 4], "it outlives the Service");
    builder.apply(drop_rule("default/x"));
    assert_eq!(balances(&mut builder), [Balance::Random; 4]);

    // Never a Service at all: deleted twice, and before it was there.
    let mut builder = Builder::default();
    for event in [drop_rule("default/x"), put_rule(&rule("default/x")), drop_rule("default/x"), drop_rule("default/x")]
    {
        builder.apply(event);
        builder.build();
    }
    builder.apply(put_rule(&rule("default/web")));
    builder.apply(put(web()));
    builder.apply(Event::Delete(Kind::Service, name("web")));
    builder.apply(Event::Replace(Kind::DestinationRule, vec![]));
    builder.apply(put(web()));
    assert_eq!(balances(&mut builder), [Balance::Random; 4], "nothing of the rule is left");
}

#[test]
fn section_b1_a_rule_that_asks_for_nothing_harms_nothing_when_it_comes_changes_and_goes() {
    let (empty, full) = (DestinationRule::new(name("web")), rule("default/web"));
    let mut builder = builder([put(web()), put_slice(slice("s", "web", vec![ready("10.244.1.1")]))]);
    builder.build();
    for (rule, expected) in [(&empty, Balance::Random), (&full, Balance::SourceIp), (&empty, Balance::Random)] {
        builder.apply(put_rule(rule));
        assert_eq!(balances(&mut builder), [expected; 4]);
        assert_eq!(backends(&builder.table, "web", "10.96.0.1:80").unwrap(), ["10.244.1.1:8080"]);
    }
    builder.apply(drop_rule("default/web"));
    assert_eq!(balances(&mut builder), [Balance::Random; 4]);
}

#[test]
fn section_b1_the_same_rule_again_makes_no_table() {
    let mut builder = builder([put(web()), put_rule(&rule("default/web"))]);
    builder.build().unwrap();
    builder.apply(put_rule(&rule("default/web")));
    builder.apply(Event::Replace(Kind::DestinationRule, vec![Object::DestinationRule(rule("default/web").into())]));
    assert!(builder.build().is_none());
}

#[test]
fn section_2_6_and_b4_more_endpoints_than_a_hash_ring_has_partitions_are_all_backends() {
    let endpoints = (1..=200).map(|n| ready(&format!("10.244.1.{n}"))).collect();
    let mut builder = builder([put(web()), put_rule(&rule("default/web")), put_slice(slice("s", "web", endpoints))]);
    assert_eq!(balances(&mut builder), [Balance::SourceIp; 4]);
    assert_eq!(backends(&builder.table, "web", "10.96.0.1:80").unwrap().len(), 200);
}

#[test]
fn only_the_services_a_rule_matches_are_resolved_again() {
    let mut builder = builder([put(web()), put(service("api", &["10.96.0.2"])), put(service("z", &["10.96.0.3"]))]);
    let before = builder.build().unwrap();
    builder.apply(put_rule(&for_host("default/api", "default/web")));
    let after = builder.build().unwrap();
    let touched = |before: &ServiceTable, after: &ServiceTable| {
        let changes = changes(before, after);
        let names = changes.iter().map(|change| match change {
            Change::Changed { new, .. } => new.service.name.name.to_string(),
            Change::Added(_) | Change::Removed(_) => panic!("{change:?}"),
        });
        names.collect::<Vec<_>>()
    };
    assert_eq!(touched(&before, &after), ["api", "web"]);
    // The host moves.
    builder.apply(put_rule(&for_host("default/api", "default/z")));
    let moved = builder.build().unwrap();
    assert_eq!(touched(&after, &moved), ["api", "web", "z"]);
}

#[test]
fn what_a_rule_asks_for_in_vain_is_noted_where_it_counts_and_nowhere_else() {
    let mut greedy = rule("default/web");
    greedy.ignored = vec![Ignored { field: "spec.trafficPolicy.tls".into(), why: "not supported".into() }];
    let greedy_for = |host: &str| DestinationRule { host: Some(name(host)), ..greedy.clone() };
    let headless = Service { kind: ServiceKind::Headless, cluster_ips: vec![], ..service("headless", &[]) };
    let mut builder = builder([put(web()), put(service("api", &["10.96.0.2"])), put(headless)]);
    builder.apply(put_rule(&greedy_for("api")));
    let table = builder.build().unwrap();
    let note = Note::Unheeded { rule: name("web"), fields: vec!["spec.trafficPolicy.tls".into()] };
    for of in ["web", "api"] {
        assert_eq!(table.get(&name(of)).unwrap().notes, std::slice::from_ref(&note), "{of}");
    }
    assert_eq!(table.unheeded.keys().collect::<Vec<_>>(), [&name("api"), &name("web")]);
    // Nothing that concerns rules: the same allocation.
    builder.apply(put(service("z", &["10.96.0.3"])));
    assert!(Arc::ptr_eq(&table.unheeded, &builder.build().unwrap().unheeded));
    // A Service that is not translated has no use for a rule, and no word about it.
    builder.apply(put_rule(&greedy_for("headless")));
    builder.apply(Event::Delete(Kind::Service, name("web")));
    let table = builder.build().unwrap();
    let entry = table.get(&name("headless")).unwrap();
    assert!(entry.notes.is_empty() && entry.rule.is_none() && table.unheeded.is_empty());
}
