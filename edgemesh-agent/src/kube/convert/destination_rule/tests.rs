use proptest::prelude::*;
use serde_json::json;

use super::*;

fn read(rule: Value) -> (model::DestinationRule, Vec<String>) {
    let converted = serde_json::from_value::<DestinationRule>(rule).unwrap().convert().unwrap();
    let Object::DestinationRule(rule) = converted.object else { panic!("not a rule") };
    (model::DestinationRule::clone(&rule), converted.faults.iter().map(ToString::to_string).collect())
}

/// A rule with this `spec`, and what is wrong with it.
fn rule(spec: Value) -> (model::DestinationRule, Vec<String>) {
    read(json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": spec}))
}

fn load_balancer(policy: Value) -> (model::DestinationRule, Vec<String>) {
    rule(json!({"host": "web", "trafficPolicy": {"loadBalancer": policy}}))
}

fn ignored(rule: &model::DestinationRule) -> Vec<String> {
    rule.ignored.iter().map(ToString::to_string).collect()
}

fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap()
}

#[test]
fn a_host_means_a_service_in_each_of_its_forms() {
    let hosts = [
        ("web", "shop/web"),
        ("WEB", "shop/web"),
        ("web.", "shop/web"),
        ("api.prod", "prod/api"),
        ("api.prod.svc", "prod/api"),
        ("api.prod.svc.", "prod/api"),
        ("api.prod.svc.cluster.local", "prod/api"),
        ("Api.Prod.Svc.Cluster.Local.", "prod/api"),
    ];
    for (host, service) in hosts {
        assert_eq!(service_of(host, "shop").unwrap().to_string(), service, "{host}");
    }
}

#[test]
fn wildcards_and_hosts_of_elsewhere_mean_no_service() {
    let long = "a".repeat(64);
    let hosts = [
        "",
        ".",
        "..",
        "*",
        "*.shop",
        "*.shop.svc.cluster.local",
        "*.local",
        "www.example.com",
        "web.shop.svc.example.com",
        "web.shop.pod",
        "web.shop.pod.cluster.local",
        "web.shop.svc.cluster.local.example.com",
        "web.shop.svc.cluster",
        "a.web.shop.svc.cluster.local",
        "web..svc",
        "web shop",
        "10.0.0.1",
        "web:80",
        "bücher",
        &long,
        &"web.".repeat(100),
    ];
    for host in hosts {
        assert_eq!(service_of(host, "shop"), None, "{host}");
    }
}

#[test]
fn metadata_names_the_rule_and_says_how_old_it_is() {
    let metadata = json!({"name": "web", "creationTimestamp": "2024-05-31T12:00:00Z"});
    let (rule, faults) = read(json!({"metadata": metadata}));
    assert_eq!((rule.name.to_string(), rule.created, faults), ("default/web".into(), Some(1_717_156_800), vec![]));
    for metadata in [json!({}), json!({"name": ""}), json!({"name": "Web!"}), json!({"name": "a", "namespace": "B"})] {
        let parsed: DestinationRule = serde_json::from_value(json!({"metadata": metadata})).unwrap();
        assert!(matches!(parsed.convert(), Err(ConvertError::Invalid(_))), "{metadata}");
    }
}

#[test]
fn section_2_6_simple_every_value_means_the_default_and_is_no_fault() {
    for simple in ["ROUND_ROBIN", "RANDOM", "LEAST_CONN", "LEAST_REQUEST", "PASSTHROUGH", "UNSPECIFIED", ""] {
        let (rule, faults) = load_balancer(json!({"simple": simple}));
        assert_eq!((rule.balance, ignored(&rule), faults), (Balance::Random, vec![], vec![]), "{simple}");
    }
    let (rule, faults) = load_balancer(json!({"simple": "BEST\n"}));
    assert_eq!((rule.balance, faults), (Balance::Random, vec![]));
    let expected = r#"spec.trafficPolicy.loadBalancer.simple: "BEST\n" (unknown, so the default is used)"#;
    assert_eq!(ignored(&rule), [expected]);
}

#[test]
fn section_2_6_consistent_hash_by_source_ip_is_followed() {
    let (rule, faults) = load_balancer(json!({"consistentHash": {"useSourceIp": true}}));
    assert_eq!((rule.balance, ignored(&rule), faults), (Balance::SourceIp, vec![], vec![]));
    let (rule, faults) = load_balancer(json!({"consistentHash": {"useSourceIp": false}}));
    assert_eq!((rule.balance, ignored(&rule), faults), (Balance::Random, vec![], vec![]));
}

#[test]
fn section_2_6_consistent_hash_by_what_only_a_proxy_sees_is_recognised_and_reported() {
    let keys = [
        ("httpHeaderName", json!("x-user")),
        ("httpCookie", json!({"name": "user", "ttl": "0s"})),
        ("httpQueryParameterName", json!("user")),
    ];
    for (key, value) in keys {
        let (rule, faults) = load_balancer(json!({"consistentHash": {key: value}}));
        assert_eq!((rule.balance, faults), (Balance::Random, vec![]));
        let expected = format!("spec.trafficPolicy.loadBalancer.consistentHash.{key} ({NEEDS_HTTP})");
        assert_eq!(ignored(&rule), [expected]);
        // Not set, in proto's way of saying so.
        let (rule, faults) = load_balancer(json!({"consistentHash": {key: null}}));
        assert_eq!((rule.balance, ignored(&rule), faults), (Balance::Random, vec![], vec![]));
    }
}

#[test]
fn section_2_6_the_choice_of_a_hash_algorithm_is_reported_and_the_hash_followed() {
    let hash = json!({"useSourceIp": true, "minimumRingSize": 1024, "maglev": {"tableSize": 65537},
        "ringHash": {"minimumRingSize": u64::MAX}});
    let (rule, faults) = load_balancer(json!({"consistentHash": hash}));
    assert_eq!((rule.balance, faults), (Balance::SourceIp, vec![]));
    let fields: Vec<&str> = rule.ignored.iter().map(|ignored| &*ignored.field).collect();
    let at = |field: &str| format!("spec.trafficPolicy.loadBalancer.consistentHash.{field}");
    assert_eq!(fields, ["maglev", "minimumRingSize", "ringHash"].map(at));
}

#[test]
fn of_simple_and_consistent_hash_the_hash_counts() {
    let (rule, faults) = load_balancer(json!({"simple": "LEAST_CONN", "consistentHash": {"useSourceIp": true}}));
    assert_eq!((rule.balance, faults), (Balance::SourceIp, vec![]));
    assert_eq!(ignored(&rule), ["spec.trafficPolicy.loadBalancer.simple (consistentHash counts)"]);
    let (rule, _) = load_balancer(json!({"simple": "UNSPECIFIED", "consistentHash": {"useSourceIp": true}}));
    assert_eq!((rule.balance, ignored(&rule)), (Balance::SourceIp, vec![]));
    // What the hash asks for is not done, so the default is what is left.
    let (rule, _) = load_balancer(json!({"simple": "RANDOM", "consistentHash": {"httpHeaderName": "x"}}));
    assert_eq!((rule.balance, rule.ignored.len()), (Balance::Random, 1));
}

#[test]
fn section_2_6_fields_without_effect_are_reported_once_and_the_rest_counts() {
    let (rule, faults) = rule(json!({
        "host": "web",
        "exportTo": ["."],
        "trafficPolicy": {
            "loadBalancer": {
                "consistentHash": {"useSourceIp": true},
                "localityLbSetting": {"enabled": true}, "warmup": {"duration": "10s"},
            },
            "connectionPool": {"tcp": {"maxConnections": 1}},
            "outlierDetection": {"consecutive5xxErrors": 7},
            "tls": {"mode": "ISTIO_MUTUAL"},
            "tunnel": {"protocol": "CONNECT"},
        },
        "subsets": [
            {"name": "v1", "labels": {"version": "v1"}, "trafficPolicy": {"loadBalancer": {"simple": "RANDOM"}}},
            {"name": "v2", "trafficPolicy": {"loadBalancer": {"simple": "LEAST_CONN"}}},
        ],
    }));
    assert_eq!((rule.balance, faults), (Balance::SourceIp, vec![]));
    assert_eq!(
        ignored(&rule),
        [
            "spec.exportTo (the rule holds for the clients of every namespace)",
            "spec.subsets[].trafficPolicy (connections to a Service use no subset)",
            "spec.trafficPolicy.connectionPool (not supported)",
            "spec.trafficPolicy.loadBalancer.localityLbSetting (not supported)",
            "spec.trafficPolicy.loadBalancer.warmup (not supported)",
            "spec.trafficPolicy.outlierDetection (not supported)",
            "spec.trafficPolicy.tls (not supported)",
            "spec.trafficPolicy.tunnel (not supported)",
        ]
    );
}

#[test]
fn what_asks_for_nothing_is_not_reported() {
    let (rule, faults) = rule(json!({
        "host": "web", "exportTo": ["*"], "workloadSelector": {}, "other": null,
        "subsets": [{"name": "v1"}, null],
        "trafficPolicy": {
            "tls": {}, "connectionPool": {"tcp": {}}, "portLevelSettings": [],
            "loadBalancer": {"localityLbSetting": {"enabled": false}, "warmupDurationSecs": 0},
        },
    }));
    assert_eq!((ignored(&rule), faults), (vec![], vec![]));
}

#[test]
fn a_rule_for_some_workloads_says_so() {
    let (rule, _) = rule(json!({
        "host": "web", "workloadSelector": {"matchLabels": {"app": "x"}},
        "trafficPolicy": {"loadBalancer": {"consistentHash": {"useSourceIp": true}}},
    }));
    assert!(rule.for_some_clients);
    assert_eq!(rule.balance_on(port(80)), Balance::Random);
    assert_eq!(rule.ignored[0].field, "spec.workloadSelector".into());
}

#[test]
fn a_port_of_its_own_inherits_nothing() {
    let hash = json!({"loadBalancer": {"consistentHash": {"useSourceIp": true}}});
    let with = |number: u16, of: &Value| {
        let mut entry = of.clone();
        entry["port"] = json!({"number": number});
        entry
    };
    let mut policy = hash.clone();
    policy["portLevelSettings"] =
        json!([with(80, &json!({})), with(81, &json!({"tls": {"mode": "SIMPLE"}})), with(82, &hash)]);
    let (all, faults) = rule(json!({"host": "web", "trafficPolicy": policy}));
    let balances = [80, 81, 82, 83].map(|number| all.balance_on(port(number)));
    assert_eq!(balances, [Balance::Random, Balance::Random, Balance::SourceIp, Balance::SourceIp]);
    assert_eq!(faults, Vec::<String>::new());
    assert_eq!(ignored(&all), ["spec.trafficPolicy.portLevelSettings[1].tls (not supported)"]);

    let (one, _) = rule(json!({"host": "web", "trafficPolicy": {"portLevelSettings": [with(82, &hash)]}}));
    assert_eq!([82, 83].map(|number| one.balance_on(port(number))), [Balance::SourceIp, Balance::Random]);
}

#[test]
fn bad_entries_for_ports_cost_only_themselves() {
    let hash = json!({"consistentHash": {"useSourceIp": true}});
    let settings = json!([
        {"loadBalancer": hash},
        {"port": {"number": 0}, "loadBalancer": hash},
        {"port": {"number": 65_536}},
        {"port": {"number": "80"}},
        {"port": {"number": 1e99}},
        {"port": 80},
        "80",
        {"port": {"number": 80}, "loadBalancer": hash},
        {"port": {"number": 80}},
    ]);
    let (rule, faults) = rule(json!({"host": "web", "trafficPolicy": {"portLevelSettings": settings}}));
    assert_eq!(rule.ports, BTreeMap::from([(port(80), Balance::SourceIp)]));
    let at = |text: &str| format!("spec.trafficPolicy.portLevelSettings{text}");
    assert_eq!(
        faults,
        [
            at("[0].port.number: missing; expected 1 to 65535"),
            at("[1].port.number: \"0\" is wrong; expected 1 to 65535"),
            at("[2].port.number: \"65536\" is wrong; expected 1 to 65535"),
            at("[3].port.number: \"80\" is wrong; expected 1 to 65535"),
            at("[4].port.number: \"1e+99\" is wrong; expected 1 to 65535"),
            at("[5].port: \"80\" is wrong; expected an object"),
            at("[5].port.number: missing; expected 1 to 65535"),
            at("[6]: \"80\" is wrong; expected an object"),
            "spec: and 2 more".to_owned(),
        ]
    );
}

#[test]
fn wrong_types_cost_only_their_field() {
    let hash = json!({"consistentHash": {"useSourceIp": true}});
    let cases = [
        (json!(7), "spec: \"7\" is wrong; expected an object", Balance::Random),
        (json!([]), "spec: a list is wrong; expected an object", Balance::Random),
        (json!({"trafficPolicy": "x"}), "spec.trafficPolicy: \"x\" is wrong; expected an object", Balance::Random),
        (
            json!({"trafficPolicy": {"loadBalancer": true}}),
            "spec.trafficPolicy.loadBalancer: true is wrong; expected an object",
            Balance::Random,
        ),
        (
            json!({"trafficPolicy": {"loadBalancer": {"consistentHash": {"useSourceIp": "true"}}}}),
            "spec.trafficPolicy.loadBalancer.consistentHash.useSourceIp: \"true\" is wrong; expected true or false",
            Balance::Random,
        ),
        (
            json!({"trafficPolicy": {"loadBalancer": {"simple": {}, "consistentHash": {"useSourceIp": true}}}}),
            "spec.trafficPolicy.loadBalancer.simple: an object is wrong; expected a string",
            Balance::SourceIp,
        ),
        (
            json!({"trafficPolicy": {"loadBalancer": {"consistentHash": {"useSourceIp": true, "httpCookie": "c"}}}}),
            "spec.trafficPolicy.loadBalancer.consistentHash.httpCookie: \"c\" is wrong; expected an object",
            Balance::SourceIp,
        ),
        (
            json!({"host": ["web"], "trafficPolicy": {"loadBalancer": hash}}),
            "spec.host: a list is wrong; expected a string",
            Balance::SourceIp,
        ),
        (
            json!({"subsets": {}, "trafficPolicy": {"loadBalancer": hash}}),
            "spec.subsets: an object is wrong; expected a list",
            Balance::SourceIp,
        ),
        (
            json!({"exportTo": "*", "trafficPolicy": {"loadBalancer": hash}}),
            "spec.exportTo: \"*\" is wrong; expected a list",
            Balance::SourceIp,
        ),
    ];
    for (spec, fault, balance) in cases {
        let (rule, faults) = rule(spec.clone());
        assert_eq!((faults, rule.balance), (vec![fault.to_owned()], balance), "{spec}");
    }
}

#[test]
fn section_b1_missing_and_empty_parts_are_no_fault() {
    let shapes = [
        json!({"metadata": {"name": "web"}}),
        json!({"metadata": {"name": "web"}, "spec": null}),
        json!({"metadata": {"name": "web"}, "spec": {}}),
        json!({"metadata": {"name": "web"}, "spec": {"host": "web"}}),
        json!({"metadata": {"name": "web"}, "spec": {"host": "web", "trafficPolicy": null}}),
        json!({"metadata": {"name": "web"}, "spec": {"host": "web", "trafficPolicy": {}}}),
        json!({"metadata": {"name": "web"}, "spec": {"host": "web", "trafficPolicy": {"loadBalancer": null}}}),
        json!({"metadata": {"name": "web"}, "spec": {"host": "web", "trafficPolicy": {"loadBalancer": {}}}}),
        json!({"metadata": {"name": "web"}, "spec": {"host": "web",
            "trafficPolicy": {"loadBalancer": {"consistentHash": {}}}}}),
        json!({"metadata": {"name": "web"}, "spec": {"host": "web", "subsets": [{"name": "v1"}]}}),
    ];
    for shape in shapes {
        let (rule, faults) = read(shape.clone());
        assert_eq!((rule.balance, ignored(&rule), faults), (Balance::Random, vec![], vec![]), "{shape}");
    }
}

#[test]
fn what_is_said_of_a_rule_is_bounded_and_of_one_line() {
    let fields: Map<String, Value> =
        (0..1000).map(|n| (format!("field\n{n:04}{}", "x".repeat(200)), json!(1))).collect();
    let bad: Vec<Value> = (0..60_000).map(|_| json!({"port": 7})).collect();
    let policy = json!({"portLevelSettings": bad, "loadBalancer": fields});
    let (rule, faults) = rule(json!({"host": "web", "trafficPolicy": policy}));
    let ignored = ignored(&rule);
    assert_eq!((ignored.len(), faults.len()), (MAX_REPORTED + 1, MAX_REPORTED + 1));
    assert_eq!(ignored.last().unwrap(), "992 more (not supported)");
    assert_eq!(faults.last().unwrap(), "spec: and 119992 more");
    for text in ignored.iter().chain(&faults) {
        assert!(text.len() < 300 && !text.contains('\n'), "{text}");
    }
}

/// JSON of any shape, in which the fields that are looked at turn up more often than chance would have it.
pub(super) fn any_json() -> impl Strategy<Value = Value> {
    let key = prop_oneof![
        3 => proptest::sample::select(vec![
            "host", "trafficPolicy", "loadBalancer", "consistentHash", "useSourceIp", "simple", "httpCookie",
            "httpHeaderName", "portLevelSettings", "port", "number", "subsets", "exportTo", "workloadSelector", "tls",
        ]).prop_map(str::to_owned),
        1 => any::<String>(),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u32..200).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        proptest::sample::select(vec!["web", "web.shop", "PASSTHROUGH", "*"]).prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(key.clone(), inner, 0..6)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// As [`any_json`], with the outer layers as a rule has them.
fn any_spec() -> impl Strategy<Value = Value> {
    let any = any_json;
    let spec = (any(), any(), any(), any(), any()).prop_map(|(simple, hash, settings, policy, other)| {
        json!({
            "host": "web", "subsets": other,
            "trafficPolicy": {
                "loadBalancer": {"simple": simple, "consistentHash": {"useSourceIp": true, "httpCookie": hash}},
                "portLevelSettings": [{"port": {"number": 80}, "loadBalancer": settings}, policy],
            },
        })
    });
    prop_oneof![any_json(), spec]
}

proptest! {
    /// Whatever stands in `spec`, a Service and its endpoints are served as without the rule, but for the balance.
    #[test]
    fn a_rule_of_any_shape_changes_nothing_but_the_balance(spec in any_spec()) {
        use crate::model::{Builder, Event, Note, ServiceEntry};
        let parsed: DestinationRule =
            serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": spec})).unwrap();
        let rule = parsed.convert().unwrap().object;
        let service: k8s_openapi::api::core::v1::Service = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "a", "port": 80}, {"name": "b", "port": 81}],
                "sessionAffinity": "ClientIP"},
        })).unwrap();
        let slice: k8s_openapi::api::discovery::v1::EndpointSlice = serde_json::from_value(json!({
            "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"name": "a", "port": 8080}, {"name": "b", "port": 8081}],
            "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}],
        })).unwrap();
        let objects = [service.convert().unwrap().object, slice.convert().unwrap().object];
        let entry = |rule: Option<Object>| {
            let mut builder = Builder::default();
            objects.iter().cloned().chain(rule).for_each(|object| builder.apply(Event::Apply(object)));
            ServiceEntry::clone(&builder.build().unwrap().services[0])
        };
        let (without, mut with) = (entry(None), entry(Some(rule)));
        prop_assert!(with.rule.take().is_some());
        with.notes.retain(|note| !matches!(note, Note::Unheeded { .. }));
        with.frontends.iter_mut().for_each(|frontend| frontend.balance = Balance::default());
        prop_assert_eq!(with, without);
    }
}
