use super::*;

fn explained(zone: &Zone, name: &str, of_type: &str) -> (Explanation, Vec<(String, EndpointReason)>) {
    let explanation = zone.explain(&wire(name), type_of(of_type));
    let reasons = explanation.endpoints.iter().map(|endpoint| (endpoint.ip.to_string(), endpoint.reason)).collect();
    (explanation, reasons)
}

fn cluster() -> Zone {
    let mut builder = builder();
    let services = [
        service("shop/web", ServiceKind::ClusterIp, &["10.96.0.20"], &["http/TCP/80"]),
        service("shop/db", ServiceKind::Headless, &[], &["sql/TCP/5432", "http/TCP/80"]),
        Service { publish_not_ready: true, ..service("shop/all", ServiceKind::Headless, &[], &[]) },
    ];
    let mut dying = slice("shop/db-2", "shop/db", &["sql/TCP/5432"], &["10.244.2.4 db-3 unready"]);
    dying.subsets[0].endpoints[0].terminating = true;
    let slices = [
        slice("shop/web-1", "shop/web", &["http/TCP/80"], &["10.244.1.1"]),
        slice(
            "shop/db-1",
            "shop/db",
            &["sql/TCP/5432"],
            &["10.244.2.1 db-0", "10.244.2.2 db-1 unready", "fd00::1 db-0", "10.244.2.3"],
        ),
        dying,
        slice("shop/all-1", "shop/all", &[], &["10.244.3.1 - unready"]),
    ];
    put(&mut builder, &services, &slices);
    builder.apply(Event::Synced);
    zone(&builder.build().unwrap())
}

fn listed(expected: &[(&str, EndpointReason)]) -> Vec<(String, EndpointReason)> {
    expected.iter().map(|(ip, reason)| ((*ip).to_owned(), *reason)).collect()
}

#[test]
fn each_endpoint_of_a_headless_service_has_its_reason() {
    use EndpointReason::{NotReady, OtherFamily, OtherName, OtherPort, Published, Ready, Terminating};

    let zone = cluster();
    let (explanation, reasons) = explained(&zone, "db.shop.svc.cluster.local", "A");
    assert_eq!((explanation.subject, explanation.outcome), (Subject::Service, Outcome::Answers));
    assert_eq!(explanation.services, ["shop/db"]);
    let expected = [
        ("10.244.2.1", Ready),
        ("10.244.2.2", NotReady),
        ("10.244.2.3", Ready),
        ("10.244.2.4", Terminating),
        ("fd00::1", OtherFamily),
    ];
    assert_eq!(reasons, listed(&expected));
    let labels: Vec<&str> = explanation.endpoints.iter().map(|endpoint| &*endpoint.label).collect();
    assert_eq!(labels, ["db-0", "db-1", "10-244-2-3", "db-3", "db-0"]);
    assert_eq!(explanation.endpoints[0].node.as_deref(), Some("edge1"));

    let (explanation, reasons) = explained(&zone, "db-1.db.shop.svc.cluster.local", "A");
    assert_eq!((explanation.subject, explanation.outcome), (Subject::Endpoint, Outcome::NoSuchName));
    assert_eq!(reasons[..2], listed(&[("10.244.2.1", OtherName), ("10.244.2.2", NotReady)]));

    let (explanation, reasons) = explained(&zone, "_sql._tcp.db.shop.svc.cluster.local", "SRV");
    assert_eq!((explanation.subject, explanation.outcome), (Subject::Port, Outcome::Answers));
    assert_eq!(reasons[..2], listed(&[("10.244.2.1", Ready), ("10.244.2.2", NotReady)]));

    let (explanation, reasons) = explained(&zone, "_http._tcp.db.shop.svc.cluster.local", "SRV");
    assert_eq!((explanation.subject, explanation.outcome), (Subject::Port, Outcome::NoSuchName));
    assert_eq!(reasons[0], listed(&[("10.244.2.1", OtherPort)])[0]);

    let (_, reasons) = explained(&zone, "all.shop.svc.cluster.local", "A");
    assert_eq!(reasons, listed(&[("10.244.3.1", Published)]));

    let (explanation, reasons) = explained(&zone, "1.2.244.10.in-addr.arpa", "PTR");
    assert_eq!((explanation.subject, explanation.outcome), (Subject::Address, Outcome::Answers));
    assert_eq!(reasons[..2], listed(&[("10.244.2.1", Ready), ("10.244.2.2", OtherName)]));
}

#[test]
fn what_is_not_made_of_endpoints_has_none() {
    let zone = cluster();
    for (name, of_type, subject, outcome, services) in [
        ("web.shop.svc.cluster.local", "A", Subject::Service, Outcome::Answers, &["shop/web"][..]),
        ("other.shop.svc.cluster.local", "A", Subject::Service, Outcome::NoSuchName, &[]),
        ("_tcp.web.shop.svc.cluster.local", "A", Subject::Parent, Outcome::NoData, &["shop/web"]),
        ("shop.svc.cluster.local", "A", Subject::Parent, Outcome::NoData, &[]),
        ("20.0.96.10.in-addr.arpa", "PTR", Subject::Address, Outcome::Answers, &["shop/web"]),
        ("10-0-0-1.shop.pod.cluster.local", "A", Subject::Pod, Outcome::Answers, &[]),
        ("cluster.local", "SOA", Subject::Domain, Outcome::Answers, &[]),
        ("dns-version.cluster.local", "TXT", Subject::Version, Outcome::Answers, &[]),
        ("ns.dns.cluster.local", "TXT", Subject::NameServer, Outcome::NoData, &[]),
        ("www.example.org.cluster.local", "A", Subject::Nothing, Outcome::NoSuchName, &[]),
        ("www.example.org", "A", Subject::Foreign, Outcome::Foreign, &[]),
    ] {
        let (explanation, reasons) = explained(&zone, name, of_type);
        assert_eq!((explanation.subject, explanation.outcome), (subject, outcome), "{name}");
        assert_eq!(
            (&explanation.services[..], &reasons[..]),
            (&services.iter().map(|s| String::from(*s)).collect::<Vec<_>>()[..], &[][..]),
            "{name}"
        );
    }
    let (explanation, reasons) = explained(&zone, "10-244-1-1.web.shop.svc.cluster.local", "A");
    assert_eq!((explanation.subject, explanation.outcome), (Subject::Endpoint, Outcome::Answers));
    assert_eq!(reasons, listed(&[("10.244.1.1", EndpointReason::Ready)]));
}
