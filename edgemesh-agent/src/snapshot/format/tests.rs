use std::{
    net::IpAddr,
    num::{NonZeroU16, NonZeroU32},
    sync::Arc,
};

use proptest::{collection::vec, option, prelude::*, sample::Index};

use super::*;
use crate::model::{
    Balance, DestinationRule, Endpoint, EndpointPort, EndpointSet, Ignored, IpPrefix, NamespacedName, Node, Protocol,
    ProxyLabels, Service, ServiceKind, ServicePort, SessionAffinity, Subset, TrafficDistribution, TrafficPolicy,
};

/// Written by each version of the format: they are never to change, and always to be read.
const GOLDEN_1: &[u8] = include_bytes!("golden-v1.snapshot");
const GOLDEN: &[u8] = include_bytes!("golden-v2.snapshot");

fn written(contents: &Contents) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(contents, &mut bytes).unwrap();
    bytes
}

/// Every field with something else than its usual value, and every variant at least once.
fn everything() -> Contents {
    let name = |name: &str| NamespacedName::new("default", name);
    let port = |number| NonZeroU16::new(number).unwrap();
    let ips = |texts: &[&str]| -> Vec<IpAddr> { texts.iter().map(|text| text.parse().unwrap()).collect() };
    let service_port = |name: &str, protocol, number, node_port| ServicePort {
        name: name.into(),
        protocol,
        port: port(number),
        node_port,
    };
    let full = Service {
        kind: ServiceKind::LoadBalancer,
        cluster_ips: ips(&["10.96.0.10", "fd00:10:96::10"]),
        external_ips: ips(&["192.0.2.1"]),
        load_balancer_ips: ips(&["198.51.100.1"]),
        source_ranges: Some(vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()]),
        ports: vec![
            service_port("http", Protocol::Tcp, 80, Some(port(30_080))),
            service_port("dns", Protocol::Udp, 53, None),
            service_port("sctp", Protocol::Sctp, 9, None),
        ],
        affinity: SessionAffinity::ClientIp { timeout: NonZeroU32::new(10_800).unwrap() },
        internal_policy: TrafficPolicy::Local,
        external_policy: TrafficPolicy::Local,
        distribution: Some(TrafficDistribution::SameNode),
        within_node_group: true,
        topology_keys: vec!["kubernetes.io/hostname".into(), "*".into()],
        publish_not_ready: true,
        proxy_labels: ProxyLabels { edgemesh: true, standard: true },
        ..Service::new(name("full"), ServiceKind::ClusterIp)
    };
    let plain = Service {
        cluster_ips: ips(&["10.96.0.11"]),
        source_ranges: Some(Vec::new()),
        ports: vec![service_port("", Protocol::Tcp, 80, None)],
        distribution: Some(TrafficDistribution::SameZone),
        cluster_dns: true,
        ..Service::new(name("plain"), ServiceKind::ClusterIp)
    };
    let others = [ServiceKind::Headless, ServiceKind::NodePort, ServiceKind::ExternalName].map(|kind| {
        let name = NamespacedName::new("kube-system", format!("{kind:?}").to_lowercase());
        let external_name = (kind == ServiceKind::ExternalName).then(|| "www.example.org".into());
        Object::Service(Service { external_name, ..Service::new(name, kind) }.into())
    });
    let place = Place {
        node: Some("edge1".into()),
        zone: Some("z\u{fc}rich \"1\"".into()),
        for_zones: ["a".into(), "b".into()].into(),
        for_nodes: ["edge1".into()].into(),
        hostname: Some("full-0".into()),
    };
    let endpoint = |ip: &str, place: &Place, [ready, serving, terminating]: [bool; 3]| Endpoint {
        address: ip.parse().unwrap(),
        ready,
        serving,
        terminating,
        place: Arc::new(place.clone()),
    };
    let subset = |endpoints| Subset {
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: port(8080) }],
        endpoints,
    };
    let slice = EndpointSet {
        name: name("full-x7z2q"),
        service: name("full"),
        subsets: vec![subset(vec![
            endpoint("10.244.1.2", &place, [true, true, false]),
            endpoint("10.244.1.3", &Place::default(), [false, true, true]),
            endpoint("fd00::3", &Place::default(), [false, false, false]),
        ])],
    };
    let old = EndpointSet { name: name("plain"), service: name("plain"), subsets: vec![subset(Vec::new())] };
    let label = |key: &str, value: &str| (Arc::from(key), Arc::from(value));
    let node = Node {
        name: NamespacedName::new("", "edge1"),
        addresses: ips(&["192.168.10.11"]),
        labels: [label("apps.kubeedge.io/belonging-to", "shop"), label("topology.kubernetes.io/zone", "z1")].into(),
    };
    let rule = DestinationRule {
        created: Some(1_700_000_000),
        host: Some(name("full")),
        for_some_clients: true,
        balance: Balance::SourceIp,
        ports: [(port(80), Balance::Random), (port(81), Balance::SourceIp)].into(),
        ignored: vec![Ignored { field: "spec.trafficPolicy.tls".into(), why: "not supported".into() }],
        ..DestinationRule::new(name("full"))
    };
    let section = |kind, as_of, objects| Section { kind, as_of, reached: None, objects };
    let services = [Object::Service(full.into()), Object::Service(plain.into())].into_iter().chain(others).collect();
    Contents {
        identity: Identity {
            source: "https://10.0.0.1:6443".to_owned(),
            node: "edge1".to_owned(),
            cluster: Some("c0ffee".to_owned()),
        },
        taken: 1_767_225_600,
        sections: vec![
            Section { reached: Some(1007), ..section(Kind::Service, 1_767_225_600, services) },
            section(Kind::EndpointSlice, 1_767_225_600, vec![Object::EndpointSlice(slice.into())]),
            section(Kind::Endpoints, 1_767_225_600, vec![Object::Endpoints(old.into())]),
            section(Kind::Node, 1_767_139_200, vec![Object::Node(node.into())]),
            section(Kind::DestinationRule, 1_767_225_600, vec![Object::DestinationRule(rule.into())]),
        ],
    }
}

#[test]
fn the_format_is_what_it_always_was() {
    let bytes = written(&everything());
    assert_eq!(String::from_utf8_lossy(&bytes), String::from_utf8_lossy(GOLDEN), "a change needs a new VERSION");
    assert_eq!(read(GOLDEN).unwrap(), everything());
}

#[test]
fn what_version_1_did_not_know_is_absent() {
    let mut expected = everything();
    expected.sections.iter_mut().for_each(|section| section.reached = None);
    for object in expected.sections.iter_mut().flat_map(|section| &mut section.objects) {
        match object {
            Object::Service(service) => {
                let service = Arc::make_mut(service);
                (service.external_name, service.cluster_dns) = (None, false);
            }
            Object::EndpointSlice(set) | Object::Endpoints(set) => {
                let subsets = &mut Arc::make_mut(set).subsets;
                for endpoint in subsets.iter_mut().flat_map(|subset| &mut subset.endpoints) {
                    Arc::make_mut(&mut endpoint.place).hostname = None;
                }
            }
            Object::Node(_) | Object::DestinationRule(_) => {}
        }
    }
    assert_eq!(read(GOLDEN_1).unwrap(), expected);
}

#[test]
fn what_is_no_snapshot_is_told_apart() {
    let refusal = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
    assert_eq!(refusal(b""), "it ends too early");
    assert_eq!(refusal(b"apiVersion: v1\n"), "it is no snapshot of an edgemesh-agent");
    assert_eq!(refusal(b"\xff\xfe\n"), "it is no snapshot of an edgemesh-agent");
    assert_eq!(refusal(&[0; 4096]), "it is damaged: line 1 is too long");
    let newer = "it has version 3 of the format, and this agent knows no later one than 2";
    assert_eq!(refusal(b"edgemesh-metadata-snapshot 3\nanything"), newer);
    for version in ["0", "01", "02", "", "+1", "-1", "1 ", "one", "18446744073709551616"] {
        let text = format!("edgemesh-metadata-snapshot {version}\n");
        assert_eq!(refusal(text.as_bytes()), "it is damaged: its version is none", "{version:?}");
    }
    assert_eq!(refusal(&[GOLDEN, b"\n"].concat()), "it is damaged: something follows its end");
    let halfway = &GOLDEN[..GOLDEN.len() / 2];
    assert_eq!(refusal(halfway), "it ends too early");
}

#[test]
fn a_file_that_says_how_much_is_to_come_is_not_believed() {
    let head = r#"{"of":{"source":"s","node":"n"},"taken":1,"sections":[{"kind":"Service","as_of":1,"objects":18446744073709551615}]}"#;
    let text = format!("edgemesh-metadata-snapshot 2\n{head}\n");
    assert_eq!(read(text.as_bytes()).unwrap_err().to_string(), "it ends too early");
}

#[test]
fn a_file_without_services_is_none() {
    let empty = Contents { sections: Vec::new(), ..everything() };
    assert_eq!(read(&*written(&empty)).unwrap_err().to_string(), "it is damaged: it has no section of Services");
}

#[test]
fn an_object_that_could_not_be_read_back_is_not_written() {
    let name: String = "x".repeat(MAX_LINE as usize);
    let service = Service::new(NamespacedName::new("default", name), ServiceKind::ClusterIp);
    let section =
        Section { kind: Kind::Service, as_of: 1, reached: None, objects: vec![Object::Service(service.into())] };
    let contents = Contents { sections: vec![section], ..everything() };
    assert_eq!(write(&contents, io::sink()).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
}

#[test]
fn equal_places_are_shared_after_reading() {
    let contents = read(GOLDEN).unwrap();
    let Object::EndpointSlice(set) = &contents.sections[1].objects[0] else { panic!("{contents:?}") };
    let [_, b, c] = &set.subsets[0].endpoints[..] else { panic!("{set:?}") };
    assert!(Arc::ptr_eq(&b.place, &c.place));
}

fn a_name() -> impl Strategy<Value = NamespacedName> {
    ("[a-z0-9-]{0,8}", "\\PC{0,12}").prop_map(|(namespace, name)| NamespacedName::new(namespace, name))
}

fn a_protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Sctp)]
}

fn a_port() -> impl Strategy<Value = NonZeroU16> {
    (1..=u16::MAX).prop_filter_map("zero", NonZeroU16::new)
}

fn a_balance() -> impl Strategy<Value = Balance> {
    prop_oneof![Just(Balance::Random), Just(Balance::SourceIp)]
}

fn a_policy() -> impl Strategy<Value = TrafficPolicy> {
    prop_oneof![Just(TrafficPolicy::Cluster), Just(TrafficPolicy::Local)]
}

fn a_text() -> impl Strategy<Value = Box<str>> {
    "\\PC{0,10}|[\"\\\\\n\0]{0,3}".prop_map(Box::from)
}

fn a_service() -> impl Strategy<Value = Object> {
    let kind = prop_oneof![
        Just(ServiceKind::ClusterIp),
        Just(ServiceKind::Headless),
        Just(ServiceKind::NodePort),
        Just(ServiceKind::LoadBalancer),
        Just(ServiceKind::ExternalName)
    ];
    let prefix =
        (any::<IpAddr>(), 0u8..=32).prop_map(|(ip, length)| format!("{ip}/{length}").parse::<IpPrefix>().unwrap());
    let port = (a_text(), a_protocol(), a_port(), option::of(a_port()))
        .prop_map(|(name, protocol, port, node_port)| ServicePort { name, protocol, port, node_port });
    let affinity = option::of(1..=86_400u32).prop_map(|timeout| match timeout.and_then(NonZeroU32::new) {
        Some(timeout) => SessionAffinity::ClientIp { timeout },
        None => SessionAffinity::None,
    });
    let distribution =
        option::of(prop_oneof![Just(TrafficDistribution::SameZone), Just(TrafficDistribution::SameNode)]);
    let addresses = || vec(any::<IpAddr>(), 0..3);
    (
        (a_name(), kind, [addresses(), addresses(), addresses()], option::of(vec(prefix, 0..3))),
        (vec(port, 0..3), affinity, a_policy(), a_policy(), distribution),
        (vec(a_text(), 0..3), any::<[bool; 5]>(), option::of(a_text())),
    )
        .prop_map(|(a, b, (topology_keys, flags, external_name))| {
            let [within_node_group, publish_not_ready, cluster_dns, edgemesh, standard] = flags;
            let (name, kind, [cluster_ips, external_ips, load_balancer_ips], source_ranges) = a;
            let (ports, affinity, internal_policy, external_policy, distribution) = b;
            let service = Service {
                name,
                kind,
                cluster_ips,
                external_ips,
                load_balancer_ips,
                source_ranges,
                ports,
                affinity,
                internal_policy,
                external_policy,
                distribution,
                within_node_group,
                topology_keys,
                publish_not_ready,
                external_name,
                cluster_dns,
                proxy_labels: ProxyLabels { edgemesh, standard },
            };
            Object::Service(service.into())
        })
}

fn a_set() -> impl Strategy<Value = Arc<EndpointSet>> {
    let texts = || vec(a_text(), 0..3).prop_map(Vec::into_boxed_slice);
    let place = (option::of(a_text()), option::of(a_text()), texts(), texts(), option::of(a_text()))
        .prop_map(|(node, zone, for_zones, for_nodes, hostname)| Place { node, zone, for_zones, for_nodes, hostname });
    let endpoint = (any::<IpAddr>(), any::<[bool; 3]>(), place).prop_map(|(address, [a, b, c], place)| Endpoint {
        address,
        ready: a,
        serving: b,
        terminating: c,
        place: place.into(),
    });
    let port =
        (a_text(), a_protocol(), a_port()).prop_map(|(name, protocol, port)| EndpointPort { name, protocol, port });
    let subset = (vec(port, 0..3), vec(endpoint, 0..4)).prop_map(|(ports, endpoints)| Subset { ports, endpoints });
    (a_name(), option::of(a_name()), vec(subset, 0..3)).prop_map(|(name, service, subsets)| {
        let service = service.unwrap_or_else(|| name.clone());
        Arc::new(EndpointSet { name, service, subsets })
    })
}

fn a_node() -> impl Strategy<Value = Object> {
    let labels = proptest::collection::btree_map(a_text(), a_text(), 0..4);
    (a_text(), vec(any::<IpAddr>(), 0..3), labels).prop_map(|(name, addresses, labels)| {
        let labels = labels.into_iter().map(|(key, value)| (Arc::from(key), Arc::from(value)));
        let name = NamespacedName::new("", name);
        Object::Node(Node { name, addresses, labels: labels.collect() }.into())
    })
}

fn a_rule() -> impl Strategy<Value = Object> {
    let ignored = (a_text(), a_text()).prop_map(|(field, why)| Ignored { field, why: String::from(why).into() });
    (
        (a_name(), option::of(any::<i64>()), option::of(a_name()), any::<bool>(), a_balance()),
        proptest::collection::btree_map(a_port(), a_balance(), 0..3),
        vec(ignored, 0..3),
    )
        .prop_map(|((name, created, host, for_some_clients, balance), ports, ignored)| {
            let rule = DestinationRule { name, created, host, for_some_clients, balance, ports, ignored };
            Object::DestinationRule(rule.into())
        })
}

fn contents() -> impl Strategy<Value = Contents> {
    let section = |kind, objects: BoxedStrategy<Object>| {
        (any::<u64>(), option::of(any::<u64>()), vec(objects, 0..4))
            .prop_map(move |(as_of, reached, objects)| Section { kind, as_of, reached, objects })
    };
    let sections = (
        section(Kind::Service, a_service().boxed()),
        option::of(section(Kind::EndpointSlice, a_set().prop_map(Object::EndpointSlice).boxed())),
        option::of(section(Kind::Endpoints, a_set().prop_map(Object::Endpoints).boxed())),
        option::of(section(Kind::Node, a_node().boxed())),
        option::of(section(Kind::DestinationRule, a_rule().boxed())),
    );
    let identity = (a_text(), a_text(), option::of(a_text()));
    (identity, any::<u64>(), sections).prop_map(|((source, node, cluster), taken, (services, a, b, c, d))| Contents {
        identity: Identity { source: source.into(), node: node.into(), cluster: cluster.map(String::from) },
        taken,
        sections: [Some(services), a, b, c, d].into_iter().flatten().collect(),
    })
}

/// What can happen to a file.
#[derive(Clone, Debug)]
enum Mutation {
    Flip(Index, u8),
    Cut(Index),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    /// A block that the flash lost, or has from elsewhere.
    Overwrite(Index, Vec<u8>),
    SwapLines(Index, Index),
}

fn a_mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        4 => (any::<Index>(), 1..=u8::MAX).prop_map(|(at, bits)| Mutation::Flip(at, bits)),
        1 => any::<Index>().prop_map(Mutation::Cut),
        1 => (any::<Index>(), vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
        1 => (any::<Index>(), 1usize..200).prop_map(|(at, length)| Mutation::Remove(at, length)),
        1 => (any::<Index>(), vec(any::<u8>(), 1..512)).prop_map(|(at, bytes)| Mutation::Overwrite(at, bytes)),
        1 => (any::<Index>(), any::<Index>()).prop_map(|(a, b)| Mutation::SwapLines(a, b)),
    ]
}

fn mutated(mut bytes: Vec<u8>, mutation: &Mutation) -> Vec<u8> {
    match mutation {
        Mutation::Flip(at, bits) => {
            let at = at.index(bytes.len());
            bytes[at] ^= bits;
        }
        Mutation::Cut(at) => bytes.truncate(at.index(bytes.len())),
        Mutation::Insert(at, new) => {
            let at = at.index(bytes.len() + 1);
            bytes.splice(at..at, new.iter().copied());
        }
        Mutation::Remove(at, length) => {
            let at = at.index(bytes.len());
            let end = bytes.len().min(at + length);
            bytes.drain(at..end);
        }
        Mutation::Overwrite(at, new) => {
            let at = at.index(bytes.len());
            bytes.iter_mut().skip(at).zip(new).for_each(|(byte, new)| *byte = *new);
        }
        Mutation::SwapLines(a, b) => {
            let mut lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
            let (a, b) = (a.index(lines.len()), b.index(lines.len()));
            lines.swap(a, b);
            bytes = lines.concat();
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn what_is_written_is_read(contents in contents()) {
        prop_assert_eq!(read(&*written(&contents)).unwrap(), contents);
    }

    #[test]
    fn a_damaged_file_is_refused_or_gives_the_same(
        contents in contents(),
        mutations in vec(a_mutation(), 1..4),
    ) {
        let bytes = mutations.iter().fold(written(&contents), mutated_by);
        match read(&*bytes) {
            Ok(found) => prop_assert_eq!(found, contents),
            Err(flaw) => prop_assert!(!flaw.to_string().contains('\n')),
        }
    }

    #[test]
    fn a_damaged_file_with_a_right_sum_does_no_harm(
        mutations in vec(a_mutation(), 1..4),
    ) {
        let end = GOLDEN.len() - GOLDEN.rsplit(|byte| *byte == b'\n').nth(1).unwrap().len() - 1;
        let mut bytes = mutations.iter().fold(GOLDEN[..end].to_vec(), mutated_by);
        bytes.extend(format!("{SUM} {}\n", digest(&bytes)).bytes());
        // Refused or read: it must not panic, and what was read must be writable.
        if let Ok(found) = read(&*bytes) {
            prop_assert_eq!(read(&*written(&found)).unwrap(), found);
        }
    }
}

fn mutated_by(bytes: Vec<u8>, mutation: &Mutation) -> Vec<u8> {
    if bytes.is_empty() { bytes } else { mutated(bytes, mutation) }
}
