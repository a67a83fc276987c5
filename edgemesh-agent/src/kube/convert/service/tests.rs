use serde_json::{Value, json};

use super::*;

fn service(value: Value) -> Result<Converted, ConvertError> {
    serde_json::from_value::<core::Service>(value).unwrap().convert()
}

fn as_service(converted: &Converted) -> &Service {
    match &converted.object {
        Object::Service(service) => service,
        Object::EndpointSlice(_) | Object::Endpoints(_) | Object::Node(_) | Object::DestinationRule(_) => {
            panic!("not a Service")
        }
    }
}

fn faults(converted: &Converted) -> Vec<String> {
    converted.faults.iter().map(ToString::to_string).collect()
}

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|ip| ip.parse().unwrap()).collect()
}

/// A Service named `web` with these fields in its spec.
fn with_spec(spec: &Value) -> Converted {
    let mut whole = json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]});
    for (field, value) in spec.as_object().unwrap() {
        whole[field] = value.clone();
    }
    service(json!({"metadata": {"name": "web"}, "spec": whole})).unwrap()
}

#[test]
fn reads_a_whole_service() {
    let converted = service(json!({
        "metadata": {
            "name": "web", "namespace": "shop",
            "labels": {
                "service.edgemesh.kubeedge.io/service-proxy-name": "",
                "service.kubernetes.io/service-proxy-name": "other"},
            "annotations": {
                "apps.kubeedge.io/service-topology": "range-nodegroup",
                "topologyKeys": "[\"zone\", \"*\"]"}},
        "spec": {
            "type": "NodePort", "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.1", "fd00::1"],
            "externalIPs": ["192.0.2.1"],
            "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
            "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local",
            "trafficDistribution": "PreferSameNode", "publishNotReadyAddresses": true,
            "ports": [
                {"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080},
                {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30080},
                {"name": "sigtran", "port": 2905, "protocol": "SCTP"},
                {"port": 81}]},
    }))
    .unwrap();
    let port = |name: &str, protocol, number: u16, on_node| ServicePort {
        name: name.into(),
        protocol,
        port: NonZeroU16::new(number).unwrap(),
        node_port: NonZeroU16::new(on_node),
    };
    let proxy_labels = ProxyLabels { edgemesh: true, standard: true };
    assert_eq!(
        as_service(&converted),
        &Service {
            // clusterIPs counts, not clusterIP.
            cluster_ips: ips(&["10.96.0.1", "fd00::1"]),
            external_ips: ips(&["192.0.2.1"]),
            ports: vec![
                port("http", Protocol::Tcp, 80, 30_080),
                // The same node port, for another protocol.
                port("dns", Protocol::Udp, 53, 30_080),
                port("sigtran", Protocol::Sctp, 2905, 0),
                port("", Protocol::Tcp, 81, 0),
            ],
            affinity: SessionAffinity::ClientIp { timeout: NonZeroU32::new(60).unwrap() },
            internal_policy: TrafficPolicy::Local,
            external_policy: TrafficPolicy::Local,
            distribution: Some(TrafficDistribution::SameNode),
            within_node_group: true,
            topology_keys: vec!["zone".into(), "*".into()],
            publish_not_ready: true,
            proxy_labels,
            ..Service::new(NamespacedName::new("shop", "web"), ServiceKind::NodePort)
        }
    );
    assert!(converted.faults.is_empty(), "{:?}", converted.faults);
}

#[test]
fn tells_the_kinds_of_services_apart() {
    let cases = [
        (json!({"clusterIP": "10.96.0.1"}), ServiceKind::ClusterIp, 1),
        (json!({"clusterIP": "10.96.0.1", "type": "LoadBalancer"}), ServiceKind::LoadBalancer, 1),
        (json!({"clusterIP": "None"}), ServiceKind::Headless, 0),
        (json!({"clusterIPs": ["None"]}), ServiceKind::Headless, 0),
        (json!({"type": "ExternalName", "externalName": "example.org"}), ServiceKind::ExternalName, 0),
        // A dual-stack address in v4-mapped form is the IPv4 address.
        (json!({"clusterIPs": ["::ffff:10.96.0.1", "10.96.0.1"]}), ServiceKind::ClusterIp, 1),
    ];
    for (spec, kind, addresses) in cases {
        let converted = service(json!({"metadata": {"name": "web"}, "spec": spec})).unwrap();
        let service = as_service(&converted);
        assert_eq!((service.kind, service.cluster_ips.len()), (kind, addresses), "{spec}");
        assert_eq!(service.name.to_string(), "default/web");
        assert!(converted.faults.is_empty(), "{spec}: {:?}", converted.faults);
    }
}

#[test]
fn the_clusters_dns_is_known_by_its_label() {
    for (labels, expected) in
        [(json!({"k8s-app": "kube-dns"}), true), (json!({"k8s-app": "web"}), false), (json!({}), false)]
    {
        let spec = json!({"clusterIP": "10.96.0.10"});
        let converted = service(json!({"metadata": {"name": "dns", "labels": labels}, "spec": spec})).unwrap();
        assert_eq!(as_service(&converted).cluster_dns, expected, "{labels}");
    }
}

#[test]
fn an_external_name_is_a_domain() {
    let long = "x".repeat(64);
    let cases = [
        ("www.example.org", Some("www.example.org"), ""),
        ("www.example.org.", Some("www.example.org"), ""),
        ("localhost", Some("localhost"), ""),
        ("", None, "missing; the Service leads nowhere"),
        (".", None, "missing; the Service leads nowhere"),
        ("192.0.2.1", None, "\"192.0.2.1\" is an address, which no alias in DNS can lead to"),
        ("a..b", None, "\"a..b\" is not a DNS name; expected labels of 1 to 63 characters between dots"),
        (&*long, None, "is not a DNS name"),
        ("WWW.example.org", None, "\"WWW.example.org\" is not a name; expected at most 253 lower-case letters"),
    ];
    for (name, expected, fault) in cases {
        let spec = json!({"type": "ExternalName", "externalName": name});
        let converted = service(json!({"metadata": {"name": "web"}, "spec": spec})).unwrap();
        assert_eq!(as_service(&converted).external_name.as_deref(), expected, "{name}");
        match &faults(&converted)[..] {
            [] => assert_eq!(fault, "", "{name}"),
            [one] => assert!(one.starts_with("spec.externalName: ") && one.contains(fault), "{one}"),
            more => panic!("{more:?}"),
        }
    }
    let other = with_spec(&json!({"externalName": "www.example.org"}));
    assert_eq!(as_service(&other).external_name, None);
}

#[test]
fn names_the_field_that_makes_a_service_unusable() {
    let cases = [
        (json!({"metadata": {}}), "metadata.name: missing"),
        (
            json!({"metadata": {"name": "We b"}}),
            "metadata.name: \"We b\" is not a name; expected at most 253 lower-case",
        ),
        (json!({"metadata": {"name": "web", "namespace": "a/b"}}), "metadata.namespace: \"a/b\" is not a name"),
        (
            json!({"metadata": {"name": "web"}, "spec": {"type": "Proxy", "clusterIP": "10.96.0.1"}}),
            "spec.type: \"Proxy\" is unknown; expected ClusterIP, NodePort, LoadBalancer or ExternalName",
        ),
        (
            json!({"metadata": {"name": "web"}, "spec": {"clusterIP": "10.96.0.256"}}),
            "spec.clusterIP: \"10.96.0.256\" is not an IP address",
        ),
        (
            json!({"metadata": {"name": "web"}, "spec": {"clusterIPs": ["0.0.0.0"]}}),
            "spec.clusterIPs[0]: 0.0.0.0 is not the address of a host",
        ),
        (
            json!({"metadata": {"name": "web"}, "spec": {"clusterIP": "127.0.0.1"}}),
            "spec.clusterIP: 127.0.0.1 is a loopback address",
        ),
    ];
    for (value, expected) in cases {
        let error = service(value.clone()).unwrap_err();
        assert!(matches!(error, ConvertError::Invalid(_)), "{value}");
        assert!(error.to_string().starts_with(expected), "{error}");
    }
}

#[test]
fn one_bad_port_or_address_costs_only_itself() {
    let converted = service(json!({
        "metadata": {"name": "web"},
        "spec": {"clusterIPs": ["10.96.0.1", "x"], "ports": [
            {"name": "ok", "port": 80},
            {"name": "zero", "port": 0},
            {"name": "big", "port": 65536, "protocol": "QUIC"},
            {"name": "again", "port": 80},
            {"name": "same-number", "port": 80, "protocol": "UDP"}]},
    }))
    .unwrap();
    let names: Vec<&str> = as_service(&converted).ports.iter().map(|port| &*port.name).collect();
    assert_eq!(names, ["ok", "same-number"]);
    assert_eq!(as_service(&converted).cluster_ips.len(), 1);
    assert_eq!(
        faults(&converted),
        [
            "spec.clusterIPs[1]: \"x\" is not an IP address",
            "spec.ports[1].port: 0 is not a port; expected 1 to 65535",
            "spec.ports[2].port: 65536 is not a port; expected 1 to 65535",
            "spec.ports[2].protocol: \"QUIC\" is unknown; expected TCP, UDP or SCTP",
            "spec.ports[3]: 80/TCP is already spec.ports[0]",
        ]
    );
}

#[test]
fn says_so_if_a_service_has_no_address() {
    let converted = service(json!({"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}})).unwrap();
    assert!(as_service(&converted).cluster_ips.is_empty());
    assert_eq!(faults(&converted), ["spec.clusterIP: missing; the Service has no address to connect to"]);
}

#[test]
fn load_balancer_addresses_are_those_that_arrive_at_nodes() {
    let read = |kind: &str, ingress: Value| {
        let spec = json!({"type": kind, "clusterIP": "10.96.0.1", "loadBalancerSourceRanges": ["192.0.2.0/24"]});
        let status = json!({"loadBalancer": {"ingress": ingress}});
        service(json!({"metadata": {"name": "web"}, "spec": spec, "status": status})).unwrap()
    };
    let ingress = json!([
        {"ip": "198.51.100.1"},
        {"ip": "198.51.100.2", "ipMode": "VIP"},
        {"ip": "198.51.100.3", "ipMode": "Proxy"},
        {"ip": "198.51.100.4", "ipMode": "Direct"},
        {"hostname": "lb.example.org"},
        {"ip": "127.0.0.1"},
        {"ip": "198.51.100.1"},
    ]);
    let converted = read("LoadBalancer", ingress.clone());
    assert_eq!(as_service(&converted).load_balancer_ips, ips(&["198.51.100.1", "198.51.100.2"]));
    assert_eq!(
        faults(&converted),
        [
            "status.loadBalancer.ingress[3].ipMode: \"Direct\" is unknown; expected VIP or Proxy; the address is not served",
            "status.loadBalancer.ingress[5].ip: 127.0.0.1 is a loopback address",
        ]
    );
    // Left over from an earlier type.
    let converted = read("ClusterIP", ingress);
    assert!(as_service(&converted).load_balancer_ips.is_empty() && as_service(&converted).source_ranges.is_none());
}

#[test]
fn source_ranges_that_cannot_be_read_admit_nobody() {
    let ranges = |list: Value| with_spec(&json!({"type": "LoadBalancer", "loadBalancerSourceRanges": list}));
    let shown = |converted: &Converted| {
        let ranges = as_service(converted).source_ranges.as_ref();
        ranges.map(|ranges| ranges.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    assert_eq!(shown(&ranges(json!([]))), None);
    let converted = ranges(json!([" 10.1.2.3/8 ", "fd00::/8"]));
    assert_eq!(shown(&converted).unwrap(), ["10.0.0.0/8", "fd00::/8"]);
    assert!(converted.faults.is_empty());
    let converted = ranges(json!(["10.0.0.0"]));
    assert_eq!(shown(&converted).unwrap(), Vec::<String>::new());
    assert_eq!(
        faults(&converted),
        ["spec.loadBalancerSourceRanges[0]: \"10.0.0.0\" is not of the form ADDRESS/LENGTH; it admits no client"]
    );
}

#[test]
fn wrong_values_of_options_are_reported_and_leave_the_default() {
    let cases = [
        (
            json!({"internalTrafficPolicy": "local"}),
            "spec.internalTrafficPolicy: \"local\" is unknown; expected Cluster or Local; Cluster is used",
        ),
        (
            json!({"externalTrafficPolicy": "Node"}),
            "spec.externalTrafficPolicy: \"Node\" is unknown; expected Cluster or Local; Cluster is used",
        ),
        (
            json!({"trafficDistribution": "PreferFar"}),
            "spec.trafficDistribution: \"PreferFar\" is unknown; expected PreferSameZone, PreferSameNode or PreferClose; nothing is preferred",
        ),
        (
            json!({"sessionAffinity": "Cookie"}),
            "spec.sessionAffinity: \"Cookie\" is unknown; expected None or ClientIP; None is used",
        ),
        (json!({"externalIPs": ["169.254.96.16"]}), "spec.externalIPs[0]: 169.254.96.16 is a link-local address"),
        (json!({"externalIPs": ["::1"]}), "spec.externalIPs[0]: ::1 is a loopback address"),
        (
            json!({"ports": [{"port": 80, "nodePort": 30080}]}),
            "spec.ports[0].nodePort: 30080 is not served; only types NodePort and LoadBalancer have node ports",
        ),
        (
            json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 70000}]}),
            "spec.ports[0].nodePort: 70000 is not a port; expected 1 to 65535",
        ),
    ];
    for (spec, expected) in cases {
        let converted = with_spec(&spec);
        assert_eq!(faults(&converted), [expected]);
        let read = as_service(&converted);
        let kind = read.kind;
        let default = Service {
            cluster_ips: read.cluster_ips.clone(),
            ports: read.ports.clone(),
            ..Service::new(read.name.clone(), kind)
        };
        assert_eq!(*read, default, "{spec}");
        assert_eq!(read.ports.len(), 1);
        assert_eq!(read.ports[0].node_port, None);
    }
}

#[test]
fn a_node_port_belongs_to_the_first_port_that_has_it() {
    let converted = with_spec(&json!({"type": "NodePort", "ports": [
        {"name": "a", "port": 80, "nodePort": 30080}, {"name": "b", "port": 81, "nodePort": 30080}]}));
    let on_node: Vec<_> = as_service(&converted).ports.iter().map(|port| port.node_port.map(NonZeroU16::get)).collect();
    assert_eq!(on_node, [Some(30_080), None]);
    assert_eq!(faults(&converted), ["spec.ports[1].nodePort: 30080/TCP is already the node port of spec.ports[0]"]);
}

#[test]
fn session_affinity_lasts_three_hours_unless_told_and_at_most_a_day() {
    let affinity = |timeout: Value| {
        let config = json!({"clientIP": {"timeoutSeconds": timeout}});
        with_spec(&json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config}))
    };
    for (given, seconds, good) in [
        (json!(null), 10_800, true),
        (json!(1), 1, true),
        (json!(86_400), 86_400, true),
        (json!(0), 10_800, false),
        (json!(-1), 10_800, false),
        (json!(86_401), 10_800, false),
    ] {
        let converted = affinity(given.clone());
        let timeout = NonZeroU32::new(seconds).unwrap();
        assert_eq!(as_service(&converted).affinity, SessionAffinity::ClientIp { timeout }, "{given}");
        assert_eq!(converted.faults.is_empty(), good, "{given}");
    }
    assert_eq!(
        faults(&affinity(json!(0))),
        ["spec.sessionAffinityConfig.clientIP.timeoutSeconds: 0 is out of range; expected 1 to 86400; 10800 is used"]
    );
    assert_eq!(as_service(&with_spec(&json!({"sessionAffinity": "None"}))).affinity, SessionAffinity::None);
}

#[test]
fn distributions_have_the_names_of_all_kubernetes_versions() {
    for (name, expected) in [
        ("PreferClose", TrafficDistribution::SameZone),
        ("PreferSameZone", TrafficDistribution::SameZone),
        ("PreferSameNode", TrafficDistribution::SameNode),
    ] {
        let converted = with_spec(&json!({"trafficDistribution": name}));
        assert_eq!((as_service(&converted).distribution, converted.faults.len()), (Some(expected), 0), "{name}");
    }
}

#[test]
fn annotations_that_mean_nothing_limit_nothing_and_are_reported() {
    let annotated = |annotations: Value| {
        let metadata = json!({"name": "web", "annotations": annotations});
        service(json!({"metadata": metadata, "spec": {"clusterIP": "None"}})).unwrap()
    };
    for (annotations, expected) in [
        (
            json!({"apps.kubeedge.io/service-topology": "range-cluster"}),
            "metadata.annotations[apps.kubeedge.io/service-topology]: \"range-cluster\" is unknown; expected range-nodegroup; no node group limits the Service",
        ),
        (
            json!({"topologyKeys": "zone"}),
            "metadata.annotations[topologyKeys]: \"zone\" is no JSON list of node label keys, such as [\"zone\"]; nothing limits the Service",
        ),
        (
            json!({"topologyKeys": "[1]"}),
            "metadata.annotations[topologyKeys]: \"[1]\" is no JSON list of node label keys, such as [\"zone\"]; nothing limits the Service",
        ),
    ] {
        let converted = annotated(annotations);
        assert_eq!(faults(&converted), [expected]);
        let read = as_service(&converted);
        assert!(!read.within_node_group && read.topology_keys.is_empty());
    }
    let converted = annotated(json!({"topologyKeys": "[]", "apps.kubeedge.io/service-topology": ""}));
    assert!(converted.faults.is_empty() && as_service(&converted).topology_keys.is_empty());
}
