//! What this node dials for others: its own endpoints, as its model knows them, and what the configuration adds.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{Arc, OnceLock, PoisonError, RwLock},
};

use tokio::sync::watch;

use crate::{
    alias::AliasRanges,
    config::AllowedTarget,
    model::{self, Change, Place, ServiceEntry, ServiceTable, changes},
    tunnel::{Decision, DialPolicy, Grounds, NodeName, Protocol, Target},
};

/// The rules. What leads to the inside of a node is refused by the tunnel itself, whatever they say.
#[derive(Debug)]
pub(super) struct Policy {
    node: Box<str>,
    ranges: AliasRanges,
    targets: Vec<AllowedTarget>,
    /// Where this node listens for others, which is where it is.
    own: OnceLock<watch::Receiver<Vec<SocketAddr>>>,
    /// Written for each table, for as long as its changes take.
    endpoints: RwLock<Endpoints>,
}

/// The endpoints on this node, each with how many Services have it.
#[derive(Debug, Default)]
struct Endpoints {
    /// The table they are from.
    table: Arc<ServiceTable>,
    ports: HashMap<(Protocol, SocketAddr), u32>,
    /// Those of headless Services without ports, which any port of leads to.
    hosts: HashMap<IpAddr, u32>,
}

impl Policy {
    pub(super) fn new(node: &str, ranges: AliasRanges, targets: Vec<AllowedTarget>) -> Self {
        Self { node: node.into(), ranges, targets, own: OnceLock::new(), endpoints: RwLock::default() }
    }

    /// Where to learn the addresses of this node.
    pub(super) fn set_own(&self, addresses: watch::Receiver<Vec<SocketAddr>>) {
        let _already = self.own.set(addresses);
    }

    /// Takes the endpoints of a newer table.
    pub(super) fn follow(&self, table: Arc<ServiceTable>) {
        let mut endpoints = self.endpoints.write().unwrap_or_else(PoisonError::into_inner);
        let old = Arc::clone(&endpoints.table);
        for change in changes(&old, &table) {
            match change {
                Change::Added(new) => endpoints.add(new, &self.node),
                Change::Removed(old) => endpoints.remove(old, &self.node),
                Change::Changed { old, new } => {
                    endpoints.add(new, &self.node);
                    endpoints.remove(old, &self.node);
                }
            }
        }
        endpoints.table = table;
    }

    /// The address by which this node dials itself: that of its Node object, as that is what others know it by and what
    /// its services are bound to, if they are not bound to all; else the one that it speaks to the world from, which a
    /// bridge of containers has not; else any. IPv4 comes first.
    fn own_address(&self) -> Option<IpAddr> {
        let table = Arc::clone(&self.endpoints.read().unwrap_or_else(PoisonError::into_inner).table);
        choose_own(
            self.own_addresses(),
            table.node(&self.node).map_or(&[][..], |node| &node.addresses),
            source_for_world,
        )
    }

    /// Where the tunnel listens; before it does, what the system says.
    fn own_addresses(&self) -> Vec<IpAddr> {
        if let Some(own) = self.own.get() {
            return own.borrow().iter().map(|address| address.ip().to_canonical()).collect();
        }
        let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
        let addresses = interfaces.filter_map(|interface| interface.address);
        addresses
            .filter_map(|address| {
                let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
            })
            .collect()
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        self.own.get().is_some_and(|own| own.borrow().iter().any(|address| address.ip().to_canonical() == ip))
    }

    fn decide_address(&self, protocol: Protocol, address: SocketAddr) -> Decision {
        let ip = address.ip().to_canonical();
        let address = SocketAddr::new(ip, address.port());
        if self.ranges.contains(ip) {
            return refuse("addresses that stand for pods of other nodes are never dialled for others");
        }
        let endpoints = self.endpoints.read().unwrap_or_else(PoisonError::into_inner);
        // A pod on the host network has the node's address, and with it all that listens on the node.
        let host = endpoints.hosts.contains_key(&ip) && !self.is_own(ip);
        let known = endpoints.ports.contains_key(&(protocol, address)) || host;
        if known || self.targets.iter().any(|target| target.covers(ip, address.port())) {
            Decision::Allowed(address)
        } else if endpoints.table.complete {
            refuse("neither an endpoint of a Service on this node nor in its edgeTunnel.allowedTargets")
        } else {
            refuse("not an endpoint that this node knows of, and its metadata source has not told all yet")
        }
    }
}

/// The best of this node's `own` addresses to dial it by, `listed` being those of its Node object.
fn choose_own(mut own: Vec<IpAddr>, listed: &[IpAddr], source: impl Fn(bool) -> Option<IpAddr>) -> Option<IpAddr> {
    own.retain(|ip| crate::tunnel::always_refused(*ip).is_none());
    own.sort_unstable();
    [true, false].into_iter().find_map(|v4| {
        let is_own = |ip: &IpAddr| ip.is_ipv4() == v4 && own.contains(ip);
        let listed = listed.iter().copied().find(is_own);
        listed.or_else(|| source(v4).filter(is_own)).or_else(|| own.iter().copied().find(is_own))
    })
}

/// The address of this node that packets to the world have, by its routes. To connect a UDP socket sends nothing.
fn source_for_world(v4: bool) -> Option<IpAddr> {
    // Addresses of documentation (RFC 5737, RFC 3849), to which only default routes lead.
    let (any, world) = if v4 { ("0.0.0.0:0", "192.0.2.1:9") } else { ("[::]:0", "[2001:db8::1]:9") };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(world).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

fn refuse(rule: &str) -> Decision {
    Decision::NotAllowed { rule: rule.to_owned() }
}

impl DialPolicy for Policy {
    fn decide(&self, _: &NodeName, protocol: Protocol, target: Target) -> Decision {
        match target {
            Target::Address(address) => self.decide_address(protocol, address),
            Target::Node { port } if self.targets.iter().any(|target| target.covers_node(port)) => {
                match self.own_address() {
                    Some(ip) => Decision::Allowed(SocketAddr::new(ip, port)),
                    None => refuse("this node has no address but loopback and link-local ones"),
                }
            }
            Target::Node { .. } => refuse("the node's port is not in its edgeTunnel.allowedTargets"),
        }
    }

    fn grounds(&self, protocol: Protocol, target: Target) -> Grounds {
        let configured = |covers: &dyn Fn(&AllowedTarget) -> bool| {
            let target = self.targets.iter().find(|target| covers(target));
            target.map_or_else(String::new, |target| format!("{target} in its edgeTunnel.allowedTargets"))
        };
        let address = match target {
            Target::Node { port } => {
                return Grounds { rule: configured(&|target| target.covers_node(port)), services: Vec::new() };
            }
            Target::Address(address) => SocketAddr::new(address.ip().to_canonical(), address.port()),
        };
        // Whoever writes the next table must not wait for the search.
        let table = Arc::clone(&self.endpoints.read().unwrap_or_else(PoisonError::into_inner).table);
        let leads_there = |entry: &&Arc<ServiceEntry>| {
            ports_of(entry, &self.node).any(|key| key == (protocol, address))
                || hosts_of(entry, &self.node).any(|ip| ip == address.ip())
        };
        let services: Vec<String> =
            table.services.iter().filter(leads_there).map(|entry| entry.service.name.to_string()).collect();
        let rule = if services.is_empty() {
            configured(&|target| target.covers(address.ip(), address.port()))
        } else {
            "an endpoint of a Service on this node".to_owned()
        };
        Grounds { rule, services }
    }
}

impl Endpoints {
    fn add(&mut self, entry: &ServiceEntry, node: &str) {
        for key in ports_of(entry, node) {
            *self.ports.entry(key).or_insert(0) += 1;
        }
        for ip in hosts_of(entry, node) {
            *self.hosts.entry(ip).or_insert(0) += 1;
        }
    }

    fn remove(&mut self, entry: &ServiceEntry, node: &str) {
        for key in ports_of(entry, node) {
            one_less(&mut self.ports, &key);
        }
        for ip in hosts_of(entry, node) {
            one_less(&mut self.hosts, &ip);
        }
    }
}

fn one_less<K: Eq + std::hash::Hash>(counts: &mut HashMap<K, u32>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

fn is_on(place: &Place, node: &str) -> bool {
    place.node.as_deref() == Some(node)
}

fn ports_of(entry: &ServiceEntry, node: &str) -> impl Iterator<Item = (Protocol, SocketAddr)> {
    entry.ports.iter().flat_map(move |served| {
        let protocol = match served.port.protocol {
            model::Protocol::Tcp => Some(Protocol::Tcp),
            model::Protocol::Udp => Some(Protocol::Udp),
            model::Protocol::Sctp => None,
        };
        let here = served.endpoints.iter().filter(move |endpoint| is_on(&endpoint.place, node));
        here.filter_map(move |endpoint| Some((protocol?, endpoint.addr)))
    })
}

fn hosts_of(entry: &ServiceEntry, node: &str) -> impl Iterator<Item = IpAddr> {
    entry.portless.iter().filter(move |endpoint| is_on(&endpoint.place, node)).map(|endpoint| endpoint.ip)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::*;
    use crate::{
        config::ServiceFilter,
        model::{
            Builder, Endpoint, EndpointPort, EndpointSet, Event, NamespacedName, Object, Service, ServiceKind,
            ServicePort, Subset,
        },
    };

    fn name(text: &str) -> NamespacedName {
        NamespacedName::new("default", text)
    }

    /// The Service `of` with a TCP port 80 and endpoints on port 8080, or headless without ports.
    fn service(of: &str, portless: bool, endpoints: &[(&str, &str)]) -> [Event; 2] {
        let number = |number| NonZeroU16::new(number).unwrap();
        let port =
            || ServicePort { name: "http".into(), protocol: model::Protocol::Tcp, port: number(80), node_port: None };
        let (kind, ports) = match portless {
            true => (ServiceKind::Headless, Vec::new()),
            false => (ServiceKind::ClusterIp, vec![port()]),
        };
        let cluster_ips = if portless { Vec::new() } else { vec!["10.96.0.10".parse().unwrap()] };
        let made = Service { cluster_ips, ports, ..Service::new(name(of), kind) };
        let endpoints = endpoints.iter().map(|(ip, node)| {
            let place = Arc::new(Place { node: Some((*node).into()), ..Place::default() });
            Endpoint { address: ip.parse().unwrap(), ready: true, serving: true, terminating: false, place }
        });
        let of_slice = EndpointPort { name: "http".into(), protocol: model::Protocol::Tcp, port: number(8080) };
        let ports = if portless { Vec::new() } else { vec![of_slice] };
        let subsets = vec![Subset { ports, endpoints: endpoints.collect() }];
        let set = EndpointSet { name: name(of), service: name(of), subsets };
        [Event::Apply(Object::Service(made.into())), Event::Apply(Object::EndpointSlice(set.into()))]
    }

    fn policy(targets: &[&str]) -> Policy {
        let ranges =
            AliasRanges { v4: "198.18.0.0/16".parse().unwrap(), v6: "fd6d:e54a:1a5e:a11a::/64".parse().unwrap() };
        Policy::new("edge1", ranges, targets.iter().map(|target| target.parse().unwrap()).collect())
    }

    fn rule(policy: &Policy, protocol: Protocol, target: impl Into<Target>) -> Option<String> {
        match policy.decide(&"edge2".parse().unwrap(), protocol, target.into()) {
            Decision::Allowed(_) => None,
            Decision::NotAllowed { rule } => Some(rule),
        }
    }

    fn tcp(policy: &Policy, target: &str) -> Option<String> {
        rule(policy, Protocol::Tcp, target.parse::<SocketAddr>().unwrap())
    }

    #[test]
    fn endpoints_of_this_node_are_dialled_and_nothing_else_is() {
        let (policy, mut builder) = (policy(&[]), Builder::new(ServiceFilter::UnlabelledOnly, "edge1"));
        assert!(tcp(&policy, "10.244.1.2:8080").unwrap().contains("has not told all yet"));
        let events = service("web", false, &[("10.244.1.2", "edge1"), ("10.244.2.2", "edge2")]);
        events.into_iter().chain([Event::Synced]).for_each(|event| builder.apply(event));
        policy.follow(builder.build().unwrap());
        assert_eq!(tcp(&policy, "10.244.1.2:8080"), None);
        assert_eq!(tcp(&policy, "[::ffff:10.244.1.2]:8080"), None);
        for other in ["10.244.1.2:80", "10.244.2.2:8080", "192.168.1.1:443", "10.96.0.10:80"] {
            assert!(tcp(&policy, other).unwrap().contains("allowedTargets"), "{other}");
        }
        let udp = rule(&policy, Protocol::Udp, "10.244.1.2:8080".parse::<SocketAddr>().unwrap());
        assert!(udp.unwrap().contains("neither an endpoint"));

        // A second Service has the same endpoint: it stays as long as one of them does.
        service("also", false, &[("10.244.1.2", "edge1")]).into_iter().for_each(|event| builder.apply(event));
        policy.follow(builder.build().unwrap());
        service("web", false, &[("10.244.2.2", "edge2")]).into_iter().for_each(|event| builder.apply(event));
        policy.follow(builder.build().unwrap());
        assert_eq!(tcp(&policy, "10.244.1.2:8080"), None);
        service("also", false, &[]).into_iter().for_each(|event| builder.apply(event));
        policy.follow(builder.build().unwrap());
        assert!(tcp(&policy, "10.244.1.2:8080").is_some());
    }

    #[test]
    fn what_allows_a_target_is_named() {
        let (policy, mut builder) =
            (policy(&["node:22", "10.244.1.0/24:*"]), Builder::new(ServiceFilter::UnlabelledOnly, "edge1"));
        let web = service("web", false, &[("10.244.1.2", "edge1"), ("10.244.2.2", "edge2")]);
        let also = service("also", false, &[("10.244.1.2", "edge1")]);
        let db = service("db", true, &[("10.244.1.3", "edge1")]);
        web.into_iter().chain(also).chain(db).chain([Event::Synced]).for_each(|event| builder.apply(event));
        policy.follow(builder.build().unwrap());
        let grounds = |target: &str| {
            let target: SocketAddr = target.parse().unwrap();
            let Grounds { rule, services } = policy.grounds(Protocol::Tcp, target.into());
            (rule, services.join(" "))
        };
        let (endpoint, configured) = ("an endpoint of a Service on this node", "in its edgeTunnel.allowedTargets");
        assert_eq!(grounds("10.244.1.2:8080"), (endpoint.to_owned(), "default/also default/web".to_owned()));
        assert_eq!(grounds("[::ffff:10.244.1.3]:5432"), (endpoint.to_owned(), "default/db".to_owned()));
        assert_eq!(grounds("10.244.1.2:9999"), (format!("10.244.1.0/24:* {configured}"), String::new()));
        let node = policy.grounds(Protocol::Tcp, Target::Node { port: 22 });
        assert_eq!(node, Grounds { rule: format!("node:22 {configured}"), services: Vec::new() });
        assert_eq!(grounds("10.244.2.2:8080"), (String::new(), String::new()), "on another node");
    }

    #[test]
    fn any_port_of_a_pod_of_a_headless_service_without_ports_is_dialled() {
        let (policy, mut builder) = (policy(&[]), Builder::new(ServiceFilter::UnlabelledOnly, "edge1"));
        let events = service("db", true, &[("10.244.1.3", "edge1"), ("10.244.2.3", "edge2")]);
        events.into_iter().chain([Event::Synced]).for_each(|event| builder.apply(event));
        policy.follow(builder.build().unwrap());
        assert_eq!(tcp(&policy, "10.244.1.3:5432"), None);
        assert!(tcp(&policy, "10.244.2.3:5432").is_some());
        // Of a pod on the host network that would be any port of the node.
        let (_tell, own) = watch::channel(vec!["10.244.1.3:20006".parse().unwrap()]);
        policy.set_own(own);
        assert!(tcp(&policy, "10.244.1.3:5432").is_some());
    }

    #[test]
    fn allowed_targets_are_dialled_and_aliases_never_are() {
        let policy = policy(&["node:22", "192.168.1.0/24:554", "198.18.0.0/16:*"]);
        assert_eq!(tcp(&policy, "192.168.1.9:554"), None);
        assert!(tcp(&policy, "192.168.1.9:555").is_some());
        assert!(tcp(&policy, "198.18.0.9:80").unwrap().contains("never dialled"));
        assert!(rule(&policy, Protocol::Tcp, Target::Node { port: 23 }).unwrap().contains("allowedTargets"));
        let addresses = ["127.0.0.1:20006", "[fe80::1]:20006", "[fd00::7]:20006", "192.168.1.7:20006"];
        let (_tell, own) = watch::channel(addresses.map(|address| address.parse().unwrap()).to_vec());
        policy.set_own(own);
        let decision = policy.decide(&"edge2".parse().unwrap(), Protocol::Tcp, Target::Node { port: 22 });
        assert_eq!(decision, Decision::Allowed("192.168.1.7:22".parse().unwrap()));
    }

    #[test]
    fn a_node_is_dialled_by_the_address_that_others_know_it_by() {
        let ips = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>();
        let own = ["::1", "127.0.0.1", "169.254.96.16", "192.168.1.7", "172.17.0.1", "fd00::7", "10.8.0.3"];
        let choose = |own: &[&str], listed: &[&str], source: Option<&str>| {
            let source = |v4| source.map(|ip| ip.parse().unwrap()).filter(|ip: &IpAddr| ip.is_ipv4() == v4);
            choose_own(ips(own), &ips(listed), source).map(|ip| ip.to_string())
        };
        let is = |ip: &str| Some(ip.to_owned());
        assert_eq!(choose(&own, &["fd00::7", "192.168.1.7", "203.0.113.9"], Some("10.8.0.3")), is("192.168.1.7"));
        assert_eq!(choose(&own, &["203.0.113.9"], Some("192.168.1.7")), is("192.168.1.7"), "a NAT has that address");
        assert_eq!(choose(&own, &[], Some("198.51.100.1")), is("10.8.0.3"), "the lowest, where nothing tells");
        assert_eq!(choose(&["::1", "fd00::7", "fe80::1"], &["192.168.1.7"], None), is("fd00::7"));
        assert_eq!(choose(&["127.0.0.1", "169.254.96.16"], &["169.254.96.16"], None), None);
    }
}
