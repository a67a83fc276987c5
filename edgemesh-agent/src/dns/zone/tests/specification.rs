//! Every example of the specification, and what CoreDNS does where it is silent.

use super::*;

/// The Services of the examples, and some more.
fn cluster() -> Zone {
    let mut builder = builder();
    let filtered = Service {
        proxy_labels: crate::model::ProxyLabels { edgemesh: true, standard: true },
        ..service("shop/web", ServiceKind::ClusterIp, &["10.96.0.20"], &["http/TCP/80", "dns/UDP/53", "dns/TCP/53"])
    };
    let all = Service { publish_not_ready: true, ..service("shop/all", ServiceKind::Headless, &[], &["sql/TCP/1"]) };
    let external = |of, to: Option<&str>| Service {
        external_name: to.map(Box::from),
        ..service(of, ServiceKind::ExternalName, &[], &["http/TCP/80"])
    };
    let services = [
        service("default/kubernetes", ServiceKind::ClusterIp, &["10.3.0.1", "2001:db8::1"], &["https/TCP/443"]),
        service("default/headless", ServiceKind::Headless, &[], &["https/TCP/443"]),
        external("default/foo", Some("www.example.com")),
        external("default/inside", Some("kubernetes.default.svc.cluster.local")),
        external("default/nowhere", None),
        filtered,
        service("shop/single", ServiceKind::NodePort, &["10.96.0.21"], &["/TCP/8080"]),
        service("shop/portless", ServiceKind::ClusterIp, &["10.96.0.22"], &[]),
        service("shop/v6", ServiceKind::ClusterIp, &["fd00::10"], &["http/TCP/80"]),
        service("shop/bare", ServiceKind::Headless, &[], &[]),
        service("shop/empty", ServiceKind::Headless, &[], &["sql/TCP/5432"]),
        all,
        service("kube-system/peers", ServiceKind::Headless, &[], &["/TCP/7000"]),
        service("kube-system/two", ServiceKind::Headless, &[], &["a/TCP/1", "b/UDP/1", "c/TCP/3"]),
    ];
    let https = ["https/TCP/8443"];
    let slices = [
        slice(
            "default/headless-4",
            "default/headless",
            &https,
            &["10.3.0.100 my-pet", "10.3.0.2 my-pet-2", "10.3.0.3", "10.3.0.9 sick unready"],
        ),
        slice("default/headless-6", "default/headless", &https, &["2001:db8::64 my-pet", "2001:db8::3"]),
        slice(
            "shop/web-1",
            "shop/web",
            &["http/TCP/8080"],
            &["10.244.1.1", "10.244.1.2 named", "10.244.1.3 - unready", "10.244.1.4 named"],
        ),
        slice("shop/v6-1", "shop/v6", &["http/TCP/8080"], &["fd01::1", "fd01::"]),
        slice("shop/bare-1", "shop/bare", &[], &["10.244.2.1 bare-0", "10.244.2.2 bare-1 unready"]),
        slice("shop/empty-1", "shop/empty", &["sql/TCP/5432"], &["10.244.2.3 - unready"]),
        slice("shop/all-1", "shop/all", &["sql/TCP/5432"], &["10.244.3.1 all-0 unready"]),
        slice(
            "kube-system/p",
            "kube-system/peers",
            &["/TCP/7000"],
            &["10.244.4.3 dup", "10.244.4.1", "10.244.4.2 dup"],
        ),
        // One port has other numbers on other pods, and one pod lacks it.
        slice(
            "kube-system/t1",
            "kube-system/two",
            &["a/TCP/81", "b/UDP/81", "c/TCP/83"],
            &["10.244.5.1", "10.244.5.2 x"],
        ),
        slice("kube-system/t2", "kube-system/two", &["a/TCP/91"], &["10.244.5.3 x", "10.244.3.1 y"]),
    ];
    put(&mut builder, &services, &slices);
    builder.apply(Event::Synced);
    zone(&builder.build().unwrap())
}

const NXDOMAIN: &[&str] = &["NXDOMAIN"];
const NODATA: &[&str] = &["NODATA"];
const FORWARD: &[&str] = &["FORWARD"];

type Row = (&'static str, &'static str, &'static [&'static str]);

fn check(rows: &[Row]) {
    let zone = cluster();
    for (name, of_type, expected) in rows {
        let name = match name.strip_suffix('.') {
            Some(whole) => whole.to_owned(),
            None if name.is_empty() => DOMAIN.to_owned(),
            None => format!("{name}.{DOMAIN}"),
        };
        assert_eq!(ask(&zone, &name, of_type), *expected, "{name} {of_type}");
    }
}

#[test]
fn section_2_2_the_schema_version() {
    check(&[
        ("dns-version", "TXT", &["TXT \"1.1.0\""]),
        ("dns-version", "A", NODATA),
        ("dns-version", "ANY", &["TXT \"1.1.0\""]),
        ("x.dns-version", "TXT", NXDOMAIN),
    ]);
}

#[test]
fn section_2_3_a_service_with_cluster_ips() {
    const SRV: &[&str] = &[
        "SRV 0 100 443 kubernetes.default.svc.cluster.local.",
        "+ kubernetes.default.svc.cluster.local. A 10.3.0.1",
        "+ kubernetes.default.svc.cluster.local. AAAA 2001:db8::1",
    ];
    const PTR: &[&str] = &["PTR kubernetes.default.svc.cluster.local."];
    check(&[
        ("kubernetes.default.svc", "A", &["A 10.3.0.1"]),
        ("kubernetes.default.svc", "AAAA", &["AAAA 2001:db8::1"]),
        ("kubernetes.default.svc", "ANY", &["A 10.3.0.1", "AAAA 2001:db8::1"]),
        ("kubernetes.default.svc", "MX", NODATA),
        ("kubernetes.default.svc", "NS", NODATA),
        ("kubernetes.default.svc", "CNAME", NODATA),
        ("_https._tcp.kubernetes.default.svc", "SRV", SRV),
        ("_https._tcp.kubernetes.default.svc", "ANY", SRV),
        ("_https._tcp.kubernetes.default.svc", "A", NODATA),
        ("_https._udp.kubernetes.default.svc", "SRV", NXDOMAIN),
        ("_http._tcp.kubernetes.default.svc", "SRV", NXDOMAIN),
        ("https.tcp.kubernetes.default.svc", "SRV", NXDOMAIN),
        ("1.0.3.10.in-addr.arpa.", "PTR", PTR),
        ("1.0.3.10.in-addr.arpa.", "ANY", PTR),
        ("1.0.3.10.in-addr.arpa.", "A", NODATA),
        ("1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.", "PTR", PTR),
        // One family, and several ports of which some share name or number.
        ("web.shop.svc", "A", &["A 10.96.0.20"]),
        ("web.shop.svc", "AAAA", NODATA),
        ("v6.shop.svc", "A", NODATA),
        ("v6.shop.svc", "AAAA", &["AAAA fd00::10"]),
        (
            "_dns._udp.web.shop.svc",
            "SRV",
            &["SRV 0 100 53 web.shop.svc.cluster.local.", "+ web.shop.svc.cluster.local. A 10.96.0.20"],
        ),
        (
            "web.shop.svc",
            "SRV",
            &[
                "SRV 0 100 80 web.shop.svc.cluster.local.",
                "SRV 0 100 53 web.shop.svc.cluster.local.",
                "+ web.shop.svc.cluster.local. A 10.96.0.20",
            ],
        ),
        // Unnamed ports have no SRV record of their own.
        ("_tcp.single.shop.svc", "SRV", NXDOMAIN),
        ("single.shop.svc", "A", &["A 10.96.0.21"]),
        ("portless.shop.svc", "A", &["A 10.96.0.22"]),
        ("portless.shop.svc", "SRV", NODATA),
    ]);
}

#[test]
fn section_2_4_a_headless_service() {
    const SRV: &[&str] = &[
        "SRV 0 100 8443 my-pet.headless.default.svc.cluster.local.",
        "SRV 0 100 8443 my-pet-2.headless.default.svc.cluster.local.",
        "SRV 0 100 8443 10-3-0-3.headless.default.svc.cluster.local.",
        "SRV 0 100 8443 2001-db8--3.headless.default.svc.cluster.local.",
        "+ my-pet.headless.default.svc.cluster.local. A 10.3.0.100",
        "+ my-pet.headless.default.svc.cluster.local. AAAA 2001:db8::64",
        "+ my-pet-2.headless.default.svc.cluster.local. A 10.3.0.2",
        "+ 10-3-0-3.headless.default.svc.cluster.local. A 10.3.0.3",
        "+ 2001-db8--3.headless.default.svc.cluster.local. AAAA 2001:db8::3",
    ];
    const PET: &[&str] = &["PTR my-pet.headless.default.svc.cluster.local."];
    check(&[
        ("headless.default.svc", "A", &["A 10.3.0.100", "A 10.3.0.2", "A 10.3.0.3"]),
        ("headless.default.svc", "AAAA", &["AAAA 2001:db8::64", "AAAA 2001:db8::3"]),
        ("headless.default.svc", "TXT", NODATA),
        ("my-pet.headless.default.svc", "A", &["A 10.3.0.100"]),
        ("my-pet.headless.default.svc", "AAAA", &["AAAA 2001:db8::64"]),
        ("my-pet.headless.default.svc", "ANY", &["A 10.3.0.100", "AAAA 2001:db8::64"]),
        ("my-pet-2.headless.default.svc", "AAAA", NODATA),
        ("sick.headless.default.svc", "A", NXDOMAIN),
        ("10-3-0-3.headless.default.svc", "A", &["A 10.3.0.3"]),
        ("2001-db8--3.headless.default.svc", "AAAA", &["AAAA 2001:db8::3"]),
        ("2001-db8-0-0-0-0-0-3.headless.default.svc", "AAAA", NXDOMAIN),
        // Who has a hostname has no other name.
        ("10-3-0-100.headless.default.svc", "A", NXDOMAIN),
        ("_https._tcp.headless.default.svc", "SRV", SRV),
        ("headless.default.svc", "SRV", SRV),
        ("100.0.3.10.in-addr.arpa.", "PTR", PET),
        ("4.6.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.", "PTR", PET),
        ("3.0.3.10.in-addr.arpa.", "PTR", &["PTR 10-3-0-3.headless.default.svc.cluster.local."]),
        ("9.0.3.10.in-addr.arpa.", "PTR", FORWARD),
        // Without ports, without ready endpoints, and with endpoints that are published anyway.
        ("bare.shop.svc", "A", &["A 10.244.2.1"]),
        ("bare.shop.svc", "SRV", NODATA),
        ("bare-0.bare.shop.svc", "A", &["A 10.244.2.1"]),
        ("bare-1.bare.shop.svc", "A", NXDOMAIN),
        ("1.2.244.10.in-addr.arpa.", "PTR", &["PTR bare-0.bare.shop.svc.cluster.local."]),
        ("empty.shop.svc", "A", NXDOMAIN),
        ("empty.shop.svc", "SRV", NXDOMAIN),
        ("_tcp.empty.shop.svc", "A", NXDOMAIN),
        ("_sql._tcp.empty.shop.svc", "SRV", NXDOMAIN),
        ("all.shop.svc", "A", &["A 10.244.3.1"]),
        ("all-0.all.shop.svc", "A", &["A 10.244.3.1"]),
        // An address may be in several Services.
        (
            "1.3.244.10.in-addr.arpa.",
            "PTR",
            &["PTR all-0.all.shop.svc.cluster.local.", "PTR y.two.kube-system.svc.cluster.local."],
        ),
        // A hostname may have several addresses.
        ("dup.peers.kube-system.svc", "A", &["A 10.244.4.2", "A 10.244.4.3"]),
        // What peer-finder and others ask for, with or without names of ports.
        (
            "peers.kube-system.svc",
            "SRV",
            &[
                "SRV 0 100 7000 dup.peers.kube-system.svc.cluster.local.",
                "SRV 0 100 7000 10-244-4-1.peers.kube-system.svc.cluster.local.",
                "+ dup.peers.kube-system.svc.cluster.local. A 10.244.4.2",
                "+ dup.peers.kube-system.svc.cluster.local. A 10.244.4.3",
                "+ 10-244-4-1.peers.kube-system.svc.cluster.local. A 10.244.4.1",
            ],
        ),
        // Each endpoint has its own port, and each record is there once.
        (
            "_a._tcp.two.kube-system.svc",
            "SRV",
            &[
                "SRV 0 100 81 x.two.kube-system.svc.cluster.local.",
                "SRV 0 100 91 x.two.kube-system.svc.cluster.local.",
                "SRV 0 100 91 y.two.kube-system.svc.cluster.local.",
                "SRV 0 100 81 10-244-5-1.two.kube-system.svc.cluster.local.",
                "+ x.two.kube-system.svc.cluster.local. A 10.244.5.2",
                "+ x.two.kube-system.svc.cluster.local. A 10.244.5.3",
                "+ y.two.kube-system.svc.cluster.local. A 10.244.3.1",
                "+ 10-244-5-1.two.kube-system.svc.cluster.local. A 10.244.5.1",
            ],
        ),
        (
            "_c._tcp.two.kube-system.svc",
            "SRV",
            &[
                "SRV 0 100 83 x.two.kube-system.svc.cluster.local.",
                "SRV 0 100 83 10-244-5-1.two.kube-system.svc.cluster.local.",
                "+ x.two.kube-system.svc.cluster.local. A 10.244.5.2",
                "+ x.two.kube-system.svc.cluster.local. A 10.244.5.3",
                "+ 10-244-5-1.two.kube-system.svc.cluster.local. A 10.244.5.1",
            ],
        ),
    ]);
    let all = ask(&cluster(), "two.kube-system.svc.cluster.local", "SRV");
    let srv: Vec<&String> = all.iter().filter(|record| record.starts_with("SRV")).collect();
    assert_eq!(srv.len(), 6, "{srv:?}");
}

#[test]
fn section_2_5_an_external_name() {
    check(&[
        ("foo.default.svc", "A", &["CNAME www.example.com."]),
        ("foo.default.svc", "AAAA", &["CNAME www.example.com."]),
        ("foo.default.svc", "CNAME", &["CNAME www.example.com."]),
        ("foo.default.svc", "ANY", &["CNAME www.example.com."]),
        ("inside.default.svc", "A", &["CNAME kubernetes.default.svc.cluster.local."]),
        ("x.foo.default.svc", "A", NXDOMAIN),
        ("_tcp.foo.default.svc", "SRV", NXDOMAIN),
        ("_http._tcp.foo.default.svc", "SRV", NXDOMAIN),
        ("nowhere.default.svc", "A", NXDOMAIN),
    ]);
}

#[test]
fn names_above_others_exist() {
    check(&[
        ("svc", "A", NODATA),
        ("pod", "A", NODATA),
        ("dns", "A", NODATA),
        ("default.svc", "A", NODATA),
        ("default.svc", "NS", NODATA),
        ("shop.pod", "A", NODATA),
        ("_tcp.kubernetes.default.svc", "SRV", NODATA),
        ("_tcp.headless.default.svc", "A", NODATA),
        ("_udp.web.shop.svc", "SRV", NODATA),
        ("_udp.kubernetes.default.svc", "SRV", NXDOMAIN),
        ("_sctp.web.shop.svc", "SRV", NXDOMAIN),
        ("other.svc", "A", NXDOMAIN),
        ("other.default.svc", "A", NXDOMAIN),
        ("x.other.default.svc", "A", NXDOMAIN),
    ]);
}

#[test]
fn the_zone_itself() {
    const SOA: &[&str] = &["SOA ns.dns.cluster.local. hostmaster.cluster.local."];
    check(&[
        ("", "SOA", SOA),
        ("", "ANY", SOA),
        (
            "",
            "NS",
            &[
                "NS ns.dns.cluster.local.",
                "+ ns.dns.cluster.local. A 169.254.96.16",
                "+ ns.dns.cluster.local. AAAA fd00:96::16",
            ],
        ),
        ("", "A", NODATA),
        ("ns.dns", "A", &["A 169.254.96.16"]),
        ("ns.dns", "AAAA", &["AAAA fd00:96::16"]),
        ("ns.dns", "TXT", NODATA),
        ("other.dns", "A", NXDOMAIN),
        ("x.ns.dns", "A", NXDOMAIN),
    ]);
    let zone = cluster();
    assert_eq!(zone.authority(&wire("x.cluster.local")), zone.domain().as_wire());
    assert_eq!(zone.authority(&wire("1.0.3.10.in-addr.arpa")), wire("in-addr.arpa").as_ref());
    assert_eq!(zone.authority(&wire("0.ip6.arpa")), wire("ip6.arpa").as_ref());
}

#[test]
fn pods_by_their_address() {
    check(&[
        ("10-244-1-2.default.pod", "A", &["A 10.244.1.2"]),
        ("10-244-1-2.default.pod", "AAAA", NODATA),
        ("10-244-1-2.default.pod", "SRV", NODATA),
        // A namespace without Services is as good as any.
        ("10-244-1-2.nobody-knows.pod", "A", &["A 10.244.1.2"]),
        ("fd00--1.default.pod", "AAAA", &["AAAA fd00::1"]),
        ("fd00--1.default.pod", "A", NODATA),
        ("fd00--0.default.pod", "AAAA", &["AAAA fd00::"]),
        ("fd00-0-0-0-0-0-0-1.default.pod", "AAAA", &["AAAA fd00::1"]),
        ("10-244-1.default.pod", "A", NXDOMAIN),
        ("10-244-1-256.default.pod", "A", NXDOMAIN),
        ("10-244-1-02.default.pod", "A", NXDOMAIN),
        ("10-244--2.default.pod", "AAAA", &["AAAA 10:244::2"]),
        ("web-0.default.pod", "A", NXDOMAIN),
        ("x.10-244-1-2.default.pod", "A", NXDOMAIN),
        ("10-244-1-2.de_fault.pod", "A", NXDOMAIN),
        ("de_fault.pod", "A", NXDOMAIN),
    ]);
}

#[test]
fn endpoints_below_services_with_a_cluster_ip() {
    check(&[
        ("10-244-1-1.web.shop.svc", "A", &["A 10.244.1.1"]),
        ("10-244-1-1.web.shop.svc", "AAAA", NODATA),
        ("named.web.shop.svc", "A", &["A 10.244.1.2", "A 10.244.1.4"]),
        ("10-244-1-2.web.shop.svc", "A", NXDOMAIN),
        ("10-244-1-3.web.shop.svc", "A", NXDOMAIN),
        ("10-244-9-9.web.shop.svc", "A", NXDOMAIN),
        ("fd01--1.v6.shop.svc", "AAAA", &["AAAA fd01::1"]),
        ("fd01--0.v6.shop.svc", "AAAA", &["AAAA fd01::"]),
        ("fd01--.v6.shop.svc", "AAAA", NXDOMAIN),
        // Only endpoints of headless Services have reverse names.
        ("1.1.244.10.in-addr.arpa.", "PTR", FORWARD),
    ]);
}

#[test]
fn what_is_not_of_the_zone_is_forwarded() {
    check(&[
        ("www.example.org.", "A", FORWARD),
        ("local.", "A", FORWARD),
        ("notcluster.local.", "A", FORWARD),
        ("xcluster.local.", "SOA", FORWARD),
        ("8.8.8.8.in-addr.arpa.", "PTR", FORWARD),
        ("0.3.10.in-addr.arpa.", "PTR", FORWARD),
        ("1.0.3.10.x.in-addr.arpa.", "PTR", FORWARD),
        ("01.0.3.10.in-addr.arpa.", "PTR", FORWARD),
        ("256.0.3.10.in-addr.arpa.", "PTR", FORWARD),
        ("x.0.3.10.in-addr.arpa.", "PTR", FORWARD),
        ("in-addr.arpa.", "SOA", FORWARD),
        ("1.0.0.2.ip6.arpa.", "PTR", FORWARD),
        // Names that the search path makes of others.
        ("www.example.org.default.svc", "A", NXDOMAIN),
        ("www.example.org.svc", "A", NXDOMAIN),
        ("www.example.org", "A", NXDOMAIN),
        ("a.b.c.d.e.f.default.svc", "A", NXDOMAIN),
    ]);
    let zone = cluster();
    for no_name in [&b""[..], b"\0", b"\x03abc", b"\x07cluster\x05local", b"\xc0\x0c", &[1; 300]] {
        assert!(matches!(zone.find(no_name, 1), Found::Foreign), "{no_name:?}");
    }
    // The domain's bytes, but not as labels of their own.
    let inside = b"\x14x\x07cluster\x05localyyyyy\x00";
    assert!(matches!(zone.find(inside, 1), Found::Foreign));
    let across = b"\x0fx\x07cluster\x05local\x00";
    assert!(matches!(zone.find(across, 1), Found::Foreign));
}

#[test]
fn wildcards_are_no_names() {
    let zone = cluster();
    for labels in [&b"\x01*\x07default\x03svc"[..], b"\x01*\x08headless\x07default\x03svc", b"\x03any\x03svc"] {
        let name = [labels, zone.domain().as_wire()].concat();
        assert!(matches!(zone.find(&name, 1), Found::NoSuchName), "{name:?}");
    }
}
