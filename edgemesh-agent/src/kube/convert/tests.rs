use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn slice(value: Value) -> Result<Converted, ConvertError> {
    serde_json::from_value::<discovery::EndpointSlice>(value).unwrap().convert()
}

fn endpoints(value: Value) -> Result<Converted, ConvertError> {
    serde_json::from_value::<core::Endpoints>(value).unwrap().convert()
}

fn as_set(converted: &Converted) -> &EndpointSet {
    match &converted.object {
        Object::EndpointSlice(set) | Object::Endpoints(set) => set,
        Object::Service(_) | Object::Node(_) | Object::DestinationRule(_) => panic!("no endpoints"),
    }
}

fn faults(converted: &Converted) -> Vec<String> {
    converted.faults.iter().map(ToString::to_string).collect()
}

fn basic_slice(extra: &Value) -> Value {
    let mut value = json!({
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": ["10.0.0.1"]}],
    });
    for (key, entry) in extra.as_object().unwrap() {
        value[key] = entry.clone();
    }
    value
}

#[test]
fn resolves_endpoint_conditions_as_documented() {
    // API docs: absent ready and serving mean true, absent terminating means false.
    let cases = [
        (json!(null), (true, true, false)),
        (json!({}), (true, true, false)),
        (json!({"ready": false}), (false, true, false)),
        (json!({"ready": false, "serving": true, "terminating": true}), (false, true, true)),
        (json!({"ready": true, "serving": false}), (true, false, false)),
    ];
    for (conditions, expected) in cases {
        let endpoints = json!({"endpoints": [{"addresses": ["10.0.0.1"], "conditions": conditions}]});
        let converted = slice(basic_slice(&endpoints)).unwrap();
        let endpoint = &as_set(&converted).subsets[0].endpoints[0];
        assert_eq!((endpoint.ready, endpoint.serving, endpoint.terminating), expected, "{conditions}");
    }
}

#[test]
fn reads_a_whole_slice() {
    let converted = slice(basic_slice(&json!({
        "ports": [{"name": "http", "port": 8080}, {"port": 53, "protocol": "UDP"}],
        "endpoints": [
            {"addresses": ["10.0.0.1", "10.0.0.2"], "nodeName": "edge-1", "zone": "a",
             "hints": {"forZones": [{"name": "a"}, {"name": "b"}], "forNodes": [{"name": "edge-1"}]}},
            {"addresses": ["10.0.0.3"], "nodeName": "", "zone": ""}],
    })))
    .unwrap();
    let set = as_set(&converted);
    assert_eq!((set.name.to_string(), set.service.to_string()), ("default/web-1".into(), "default/web".into()));
    let subset = &set.subsets[0];
    let ports: Vec<_> = subset.ports.iter().map(|port| (&*port.name, port.protocol, port.port.get())).collect();
    assert_eq!(ports, [("http", Protocol::Tcp, 8080), ("", Protocol::Udp, 53)]);
    let places: Vec<_> = subset
        .endpoints
        .iter()
        .map(|e| (e.address.to_string(), e.place.node.as_deref(), e.place.zone.as_deref()))
        .collect();
    assert_eq!(places, [("10.0.0.1".to_owned(), Some("edge-1"), Some("a")), ("10.0.0.3".to_owned(), None, None)]);
    let hints: Vec<_> = subset.endpoints.iter().map(|e| (e.place.for_zones.len(), e.place.for_nodes.len())).collect();
    assert_eq!((hints, &*subset.endpoints[0].place.for_zones[1]), (vec![(2, 1), (0, 0)], "b"));
    assert!(converted.faults.is_empty());
}

#[test]
fn slices_that_are_not_for_a_service_are_foreign_and_wrong_ones_invalid() {
    let cases = [
        (json!({"metadata": {"name": "x"}}), true, "metadata.labels[kubernetes.io/service-name]: missing"),
        (json!({"addressType": "FQDN"}), true, "addressType: \"FQDN\" cannot be proxied; expected IPv4 or IPv6"),
        (json!({"addressType": "IPX"}), false, "addressType: \"IPX\" cannot be proxied"),
        (
            json!({"metadata": {"name": "x", "labels": {"kubernetes.io/service-name": ""}}}),
            false,
            "metadata.labels[kubernetes.io/service-name]: \"\" is not a name",
        ),
    ];
    for (extra, foreign, expected) in cases {
        let error = slice(basic_slice(&extra)).unwrap_err();
        assert_eq!(matches!(error, ConvertError::Foreign(_)), foreign, "{extra}");
        assert!(error.to_string().starts_with(expected), "{error}");
    }
}

#[test]
fn bad_endpoints_of_a_slice_cost_only_themselves() {
    let converted = slice(basic_slice(&json!({
        "ports": [{"port": 80}, {"name": "nil"}, {"port": -1}],
        "endpoints": [
            {"addresses": []}, {"addresses": ["fd00::1"]}, {"addresses": ["10.0.0.1"]}, {"addresses": ["224.0.0.1"]},
            {"addresses": ["127.0.0.1"]}],
    })))
    .unwrap();
    let subset = &as_set(&converted).subsets[0];
    assert_eq!((subset.ports.len(), subset.endpoints.len()), (1, 1));
    assert_eq!(
        faults(&converted),
        [
            "ports[1].port: missing",
            "ports[2].port: -1 is not a port; expected 1 to 65535",
            "endpoints[0].addresses[0]: missing",
            "endpoints[1].addresses[0]: fd00::1 is not IPv4, as addressType says",
            "endpoints[3].addresses[0]: 224.0.0.1 is not the address of a host",
            "endpoints[4].addresses[0]: 127.0.0.1 is a loopback address",
        ]
    );
}

#[test]
fn endpoints_are_ready_by_the_list_they_are_in() {
    let converted = endpoints(json!({
        "metadata": {"name": "web", "namespace": "shop"},
        "subsets": [
            {"addresses": [{"ip": "10.0.0.1", "nodeName": "edge-1"}, {"ip": "?"}],
             "notReadyAddresses": [{"ip": "10.0.0.2"}], "ports": [{"name": "http", "port": 8080}, {"port": 0}]},
            {"addresses": [{"ip": "fd00::1"}], "ports": [{"port": 53, "protocol": "UDP"}]}],
    }))
    .unwrap();
    let set = as_set(&converted);
    assert_eq!(set.name, set.service);
    let ready: Vec<_> = set.subsets.iter().flat_map(|s| &s.endpoints).map(|e| (e.ready, e.serving)).collect();
    assert_eq!(ready, [(true, true), (false, false), (true, true)]);
    assert_eq!(
        faults(&converted),
        [
            "subsets[0].ports[1].port: 0 is not a port; expected 1 to 65535",
            "subsets[0].addresses[1].ip: \"?\" is not an IP address",
        ]
    );
    let empty = endpoints(json!({"metadata": {"name": "web"}})).unwrap();
    assert!(as_set(&empty).subsets.is_empty());
}

#[test]
fn hostnames_of_endpoints_are_labels() {
    let long = "x".repeat(64);
    let named = |name: &str| json!({"addresses": ["10.0.0.1"], "hostname": name});
    let list =
        json!({"endpoints": [named("web-0"), named(""), named("web.0"), named("Web"), named("web_0"), named(&long)]});
    let converted = slice(basic_slice(&list)).unwrap();
    let hostnames = |set: &EndpointSet| -> Vec<Option<Box<str>>> {
        set.subsets.iter().flat_map(|s| &s.endpoints).map(|endpoint| endpoint.place.hostname.clone()).collect()
    };
    assert_eq!(hostnames(as_set(&converted)), [Some("web-0".into()), None, None, None, None, None]);
    assert_eq!(converted.faults.len(), 4);
    assert_eq!(
        faults(&converted)[0],
        "endpoints[2].hostname: \"web.0\" is not a DNS label; expected at most 63 lower-case letters, digits and '-', \
         beginning and ending with a letter or digit"
    );
    let converted = endpoints(json!({
        "metadata": {"name": "web"},
        "subsets": [{"addresses": [{"ip": "10.0.0.1", "hostname": "web-0"}],
                     "notReadyAddresses": [{"ip": "10.0.0.2", "hostname": "web 1"}]}],
    }))
    .unwrap();
    assert_eq!(hostnames(as_set(&converted)), [Some("web-0".into()), None]);
    assert!(faults(&converted)[0].starts_with("subsets[0].notReadyAddresses[0].hostname: \"web 1\""));
}

#[test]
fn quotes_of_wrong_values_are_short_and_on_one_line() {
    let value = json!({"metadata": {"name": format!("a\n{}", "é".repeat(500))}});
    let error = endpoints(value).unwrap_err().to_string();
    assert!(error.len() < 400 && !error.contains('\n'), "{error}");
}

proptest! {
    #[test]
    fn never_panics_on_any_value(
        name in proptest::option::of(".*"), kind in ".*", addresses in proptest::collection::vec(".*", 0..3),
        port in any::<i32>(), protocol in proptest::option::of(".*"), label in ".*",
    ) {
        let metadata = ObjectMeta {
            name: name.clone(),
            namespace: name,
            labels: Some([(SERVICE_NAME_LABEL.to_owned(), label)].into()),
            ..ObjectMeta::default()
        };
        let spec = core::ServiceSpec {
            type_: Some(kind.clone()),
            cluster_ips: Some(addresses.clone()),
            cluster_ip: addresses.first().cloned(),
            ports: Some(vec![core::ServicePort { port, protocol: protocol.clone(), ..Default::default() }]),
            ..core::ServiceSpec::default()
        };
        let _ = core::Service { metadata: metadata.clone(), spec: Some(spec), status: None }.convert();
        let slice = discovery::EndpointSlice {
            address_type: kind,
            endpoints: vec![discovery::Endpoint { addresses: addresses.clone(), ..Default::default() }],
            metadata: metadata.clone(),
            ports: Some(vec![discovery::EndpointPort { port: Some(port), protocol: protocol.clone(), ..Default::default() }]),
        };
        let _ = slice.convert();
        let subset = core::EndpointSubset {
            addresses: Some(addresses.into_iter().map(|ip| core::EndpointAddress { ip, ..Default::default() }).collect()),
            not_ready_addresses: None,
            ports: Some(vec![core::EndpointPort { port, protocol, ..Default::default() }]),
        };
        let _ = core::Endpoints { metadata, subsets: Some(vec![subset]) }.convert();
    }
}
