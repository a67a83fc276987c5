use std::{num::NonZeroU16, sync::Arc, time::Instant};

use super::*;
use crate::{
    alias::{Book, Overrides, Reach},
    config::ServiceFilter,
    dns::zone::ZoneSettings,
    model::{
        Builder, Endpoint, EndpointPort, EndpointSet, Event, NamespacedName, Node, Object, Service, ServiceKind,
        ServicePort, SessionAffinity, Subset,
    },
};

const CLIENT: &str = "10.244.1.9";

fn ranges() -> AliasRanges {
    AliasRanges { v4: "198.18.0.0/16".parse().unwrap(), v6: "fd00:a11a::/64".parse().unwrap() }
}

/// As `edge1` sees it, from which no route leads anywhere.
struct Cluster {
    builder: Builder,
}

impl Cluster {
    fn new() -> Self {
        let reach = Reach::new("edge1", ranges(), Overrides::default());
        let book = Book::new(ranges(), Instant::now());
        Self { builder: Builder::new(ServiceFilter::UnlabelledOnly, "edge1").with_detours(reach, book) }
    }

    fn put(mut self, object: Object) -> Self {
        self.builder.apply(Event::Apply(object));
        self
    }

    fn node(self, name: &str, addresses: &[&str]) -> Self {
        let addresses = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
        self.put(Object::Node(Node { name: NamespacedName::new("", name), addresses, labels: Box::default() }.into()))
    }

    /// A Service in `default` with port 80 of both protocols; endpoints are on port 8080, `10.0.0.1@edge1`.
    fn service(self, name: &str, change: impl FnOnce(Service) -> Service, endpoints: &[&str]) -> Self {
        let number = |number| NonZeroU16::new(number).unwrap();
        let protocols = [Protocol::Tcp, Protocol::Udp];
        let port = |protocol: Protocol| ServicePort {
            name: protocol.to_string().to_lowercase().into(),
            protocol,
            port: number(80),
            node_port: None,
        };
        let name = NamespacedName::new("default", name);
        let ports = protocols.map(port).to_vec();
        let service = change(Service { ports, ..Service::new(name.clone(), ServiceKind::ClusterIp) });
        let of_slice = |protocol: Protocol| EndpointPort {
            name: protocol.to_string().to_lowercase().into(),
            protocol,
            port: number(8080),
        };
        let endpoint = |text: &&str| {
            let (ip, node) = text.split_once('@').unwrap();
            let (node, hostname) = node.split_once('/').map_or((node, None), |(node, name)| (node, Some(name.into())));
            let place = Place { node: Some(node.into()), hostname, ..Place::default() };
            let address = ip.parse().unwrap();
            Endpoint { address, ready: true, serving: true, terminating: false, place: Arc::new(place) }
        };
        let ports = if service.ports.is_empty() { Vec::new() } else { protocols.map(of_slice).to_vec() };
        let subset = Subset { ports, endpoints: endpoints.iter().map(endpoint).collect() };
        let set = EndpointSet { name: name.clone(), service: name, subsets: vec![subset] };
        self.put(Object::Service(service.into())).put(Object::EndpointSlice(set.into()))
    }

    fn complete(mut self) -> Seen {
        self.builder.apply(Event::Synced);
        self.seen()
    }

    fn seen(mut self) -> Seen {
        let table = self.builder.build().unwrap_or_else(|| self.builder.last_table());
        let zone = Zone::build(&table, &ZoneSettings::default(), None);
        Seen { table, zone }
    }
}

struct Seen {
    table: Arc<ServiceTable>,
    zone: Zone,
}

impl Seen {
    fn ask(&self, to: &str, protocol: Protocol, random: u32) -> Result<Vec<String>, &'static str> {
        let (host, port) = to.rsplit_once(':').unwrap();
        let bytes = [&[0, 0, 0, 3, u8::try_from(host.len()).unwrap()][..], host.as_bytes(), &[0, 0]].concat();
        let (mut destination, _) = crate::socks5::wire::parse_datagram(&bytes).unwrap();
        destination.port = port.parse().unwrap();
        let domain = ClusterDomain::default();
        let (table, zone) = (&*self.table, Some(&self.zone));
        let known = Known { table, zone, domain: &domain, ranges: ranges(), node: "edge1" };
        let question = Question { destination: &destination, protocol, client: CLIENT.parse().unwrap(), random };
        let show = |route: Route| match route {
            Route::Via { node, addr } if addr.ip().is_unspecified() => format!("{node}:{}", addr.port()),
            Route::Via { node, addr } => format!("{node}/{addr}"),
            Route::Direct(addr) => addr.to_string(),
        };
        let routes = known.routes(&question).map_err(|failure| failure.reason())?;
        Ok(routes.into_iter().map(show).collect())
    }

    fn tcp(&self, to: &str) -> Result<String, &'static str> {
        self.ask(to, Protocol::Tcp, 0).map(|routes| routes.join(" "))
    }
}

fn is(text: &str) -> Result<String, &'static str> {
    Ok(text.to_owned())
}

fn with_ip(ip: &str) -> impl FnOnce(Service) -> Service {
    let ip = ip.parse().unwrap();
    move |service| Service { cluster_ips: vec![ip], ..service }
}

fn headless(service: Service) -> Service {
    Service { kind: ServiceKind::Headless, ..service }
}

#[test]
fn a_node_is_found_by_each_of_its_names_and_its_address() {
    let seen = Cluster::new()
        .node("edge1", &["192.168.1.1"])
        .node("edge2", &["192.168.1.2"])
        .node("ip-10-0-0-1.eu.internal", &["10.0.0.1"])
        .node("twin1", &["192.168.1.50"])
        .node("twin2", &["192.168.1.50", "192.168.1.1"])
        .complete();
    for to in ["edge2", "EDGE2.", "edge2.node", "edge2.node.cluster.local", "edge2.node.cluster.local.", "192.168.1.2"]
    {
        assert_eq!(seen.tcp(&format!("{to}:22")), is("edge2:22"), "{to}");
    }
    assert_eq!(seen.tcp("edge1:22"), is("edge1:22"), "this one");
    assert_eq!(seen.tcp("192.168.1.1:22"), is("edge1:22"), "this one comes first");
    assert_eq!(seen.tcp("ip-10-0-0-1.eu.internal:22"), is("ip-10-0-0-1.eu.internal:22"));
    assert_eq!(seen.tcp("ip-10-0-0-1.eu.internal.node.cluster.local:22"), is("ip-10-0-0-1.eu.internal:22"));
    assert_eq!(seen.tcp("192.168.1.50:22"), Err("ambiguous"));
    for alias in &seen.table.node("edge2").unwrap().aliases {
        assert_eq!(seen.tcp(&format!("{alias}:53")), is("edge2:53"));
    }
    assert_eq!(seen.tcp("198.18.255.1:22"), Err("unknown_host"), "an alias of nobody");
}

#[test]
fn names_and_addresses_that_nobody_has_are_refused() {
    let seen = Cluster::new().node("edge1", &[]).node("edge2", &[]).complete();
    for (to, reason) in [
        ("edge3:22", "unknown_host"),
        ("edge3.node.cluster.local:22", "unknown_host"),
        ("web.default.svc.cluster.local:80", "unknown_host"),
        ("a b:80", "unknown_host"),
        ("www.example.org:80", "outside"),
        ("93.184.216.34:80", "outside"),
        ("127.0.0.1:22", "outside"),
        ("169.254.96.16:10800", "outside"),
        ("::1:22", "outside"),
        ("edge2:0", "failed"),
    ] {
        assert_eq!(seen.tcp(to), Err(reason), "{to}");
    }
    let early = Cluster::new().node("edge1", &[]).node("edge2", &[]).seen();
    for to in ["web.default:80", "edge3:22", "10.96.0.1:80"] {
        assert_eq!(early.tcp(to), Err("not_known_yet"), "{to}");
    }
    assert_eq!(early.tcp("edge2:22"), is("edge2:22"));
}

#[test]
fn where_not_all_nodes_are_told_of_the_tunnel_is_asked() {
    let seen = Cluster::new().node("edge1", &[]).complete();
    assert_eq!(seen.tcp("edge7:22"), is("edge7:22"));
    assert_eq!(seen.tcp("a.b.node.cluster.local:22"), is("a.b:22"));
    assert_eq!(seen.tcp("www.example.org:80"), Err("outside"));
}

#[test]
fn services_are_found_as_in_dns_and_their_backends_wherever_these_are() {
    let seen = Cluster::new()
        .service("web", with_ip("10.96.0.1"), &["10.244.1.1@edge1"])
        .service("far", with_ip("10.96.0.2"), &["10.244.1.1@edge2"])
        .service("none", with_ip("10.96.0.3"), &[])
        .complete();
    for to in ["web.default", "web.default.svc", "web.default.svc.cluster.local", "10.96.0.1", "WEB.default.svc"] {
        assert_eq!(seen.tcp(&format!("{to}:80")), is("10.244.1.1:8080"), "{to}");
    }
    assert_eq!(seen.tcp("far.default.svc.cluster.local:80"), is("edge2/10.244.1.1:8080"));
    assert_eq!(seen.ask("far.default:80", Protocol::Udp, 0), Ok(vec!["edge2/10.244.1.1:8080".to_owned()]));
    assert_eq!(seen.tcp("none.default:80"), Err("refused"), "as by the data plane");
    assert_eq!(seen.tcp("web.default:81"), Err("refused"), "a port that the Service does not have");
}

#[test]
fn pods_are_found_by_their_names_and_addresses() {
    let seen = Cluster::new()
        .service("db", headless, &["10.244.1.1@edge1/db-0", "10.244.1.2@edge2/db-1", "10.244.1.3@edge2"])
        .service("db2", headless, &["10.244.1.3@edge3"])
        .complete();
    assert_eq!(seen.tcp("db-0.db.default.svc.cluster.local:8080"), is("10.244.1.1:8080"));
    assert_eq!(seen.tcp("db-1.db.default:8080"), is("edge2/10.244.1.2:8080"));
    assert_eq!(seen.tcp("10.244.1.2:8080"), is("edge2/10.244.1.2:8080"));
    assert_eq!(seen.tcp("10-244-1-2.default.pod:8080"), is("edge2/10.244.1.2:8080"));
    assert_eq!(seen.tcp("10.244.1.3:8080"), Err("ambiguous"), "two sites have it");
    assert_eq!(seen.tcp("10.244.1.1:22"), Err("outside"), "no port of an endpoint");
    // All of them, this node's among them, in an order that changes.
    let first = |random| seen.ask("db.default:8080", Protocol::Tcp, random).unwrap();
    assert_eq!(first(0).len(), 3);
    let orders: std::collections::HashSet<Vec<String>> = (0..64).map(first).collect();
    assert!(orders.len() > 1);
}

#[test]
fn any_port_of_a_pod_without_ports_and_none_of_a_node_is_meant() {
    let bare = |service| Service { ports: Vec::new(), ..headless(service) };
    let seen = Cluster::new()
        .node("edge2", &["192.168.1.2"])
        .service("bare", bare, &["10.244.1.1@edge2", "192.168.1.2@edge2"])
        .complete();
    assert_eq!(seen.tcp("10.244.1.1:5432"), is("edge2/10.244.1.1:5432"));
    assert_eq!(seen.tcp("192.168.1.2:5432"), is("edge2:5432"), "which that node's allowedTargets decide on");
}

#[test]
fn an_external_name_leads_no_further_than_the_cluster() {
    let external = |to: &'static str| {
        move |service| Service { kind: ServiceKind::ExternalName, external_name: Some(to.into()), ..service }
    };
    let seen = Cluster::new()
        .service("web", with_ip("10.96.0.1"), &["10.244.1.1@edge1"])
        .service("inside", external("web.default.svc.cluster.local"), &[])
        .service("outside", external("www.example.org"), &[])
        .complete();
    assert_eq!(seen.tcp("inside.default:80"), is("10.244.1.1:8080"));
    assert_eq!(seen.tcp("outside.default:80"), Err("outside"));
}

#[test]
fn backends_are_chosen_as_the_service_wants_it() {
    let endpoints: Vec<String> = (1..=5).map(|n| format!("10.244.1.{n}@edge1")).collect();
    let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
    let timeout = std::num::NonZeroU32::new(10_800).unwrap();
    let sticky = |service| Service { affinity: SessionAffinity::ClientIp { timeout }, ..with_ip("10.96.0.2")(service) };
    let seen =
        Cluster::new().service("any", with_ip("10.96.0.1"), &endpoints).service("one", sticky, &endpoints).complete();
    let spread = |name: &str| {
        let asked = (0..64_u32).map(|n| seen.ask(name, Protocol::Tcp, n << 26).unwrap().join(" "));
        asked.collect::<std::collections::HashSet<_>>().len()
    };
    assert_eq!((spread("any.default:80"), spread("one.default:80")), (5, 1));
}
