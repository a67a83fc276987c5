//! Pods of other sites: their names lead to their aliases.

use std::net::IpAddr;

use super::*;
use crate::{
    alias::{AliasRanges, Book, Overrides, Reach},
    model::ServiceEntry,
};

/// On `edge1`, from which no route leads anywhere.
fn far_builder() -> Builder {
    let ranges = AliasRanges { v4: "198.18.0.0/16".parse().unwrap(), v6: "fd00:a11a::/64".parse().unwrap() };
    let reach = Reach::new("edge1", ranges, Overrides::default());
    builder().with_detours(reach, Book::new(ranges, Instant::now()))
}

fn on(node: &str, mut set: EndpointSet) -> EndpointSet {
    for endpoint in set.subsets.iter_mut().flat_map(|subset| &mut subset.endpoints) {
        Arc::make_mut(&mut endpoint.place).node = Some(node.into());
    }
    set
}

fn aliases(entry: &ServiceEntry) -> Vec<IpAddr> {
    let with_ports = entry.ports.iter().flat_map(|port| &port.endpoints).filter_map(|endpoint| endpoint.path.clone());
    let portless = entry.portless.iter().filter_map(|endpoint| endpoint.path.clone());
    with_ports.chain(portless).filter_map(|path| path.alias).collect()
}

#[test]
fn headless_services_and_pods_of_stateful_sets_of_another_site_are_answered_with_aliases() {
    let mut builder = far_builder();
    let db = service("shop/db", ServiceKind::Headless, &[], &["sql/TCP/5432"]);
    let bare = service("shop/bare", ServiceKind::Headless, &[], &[]);
    // The same pod addresses in both sites.
    let near = slice("shop/db-1", "shop/db", &["sql/TCP/5432"], &["10.0.0.1 db-0"]);
    let far = on("far", slice("shop/db-2", "shop/db", &["sql/TCP/5432"], &["10.0.0.1 db-1", "10.0.0.2"]));
    let portless = on("far", slice("shop/bare-1", "shop/bare", &[], &["10.0.0.9"]));
    put(&mut builder, &[db, bare], &[near, far, portless]);
    builder.apply(Event::Synced);
    let table = builder.build().unwrap();
    let zone = zone(&table);

    let [db_1, unnamed] = aliases(table.get(&name("shop/db")).unwrap())[..] else { panic!("two are far") };
    let of = |name: &str| format!("{name}.db.shop.svc.cluster.local");
    assert_eq!(ask(&zone, &of("db-0"), "A"), ["A 10.0.0.1"]);
    assert_eq!(ask(&zone, &of("db-1"), "A"), [format!("A {db_1}")]);
    let mut all = ask(&zone, "db.shop.svc.cluster.local", "A");
    all.sort();
    let mut expected = vec!["A 10.0.0.1".to_owned(), format!("A {db_1}"), format!("A {unnamed}")];
    expected.sort();
    assert_eq!(all, expected);
    // The name that an SRV record gives to a pod without one leads to the same place.
    let dashed = of(&unnamed.to_string().replace('.', "-"));
    assert_eq!(ask(&zone, &dashed, "A"), [format!("A {unnamed}")]);
    let services = ask(&zone, "_sql._tcp.db.shop.svc.cluster.local", "SRV");
    assert!(services.iter().any(|record| record.contains(&format!("5432 {dashed}."))), "{services:?}");
    let [one] = aliases(table.get(&name("shop/bare")).unwrap())[..] else { panic!("one is far") };
    assert_eq!(ask(&zone, "bare.shop.svc.cluster.local", "A"), [format!("A {one}")]);
    let reversed: Vec<String> = db_1.to_string().rsplit('.').map(str::to_owned).collect();
    let pointer = ask(&zone, &format!("{}.in-addr.arpa", reversed.join(".")), "PTR");
    assert_eq!(pointer, [format!("PTR {}.", of("db-1"))]);
}

#[test]
fn what_has_no_way_has_no_record() {
    let ranges = AliasRanges { v4: "198.18.0.0/16".parse().unwrap(), v6: "fd00:a11a::/64".parse().unwrap() };
    let reach = Reach::new("edge1", ranges, Overrides::default());
    let mut builder = builder().with_detours(reach, Book::closed(ranges, Instant::now()));
    let db = service("shop/db", ServiceKind::Headless, &[], &["sql/TCP/5432"]);
    let far = on("far", slice("shop/db-2", "shop/db", &["sql/TCP/5432"], &["10.0.0.1 db-1"]));
    put(&mut builder, &[db], &[far]);
    builder.apply(Event::Synced);
    let zone = zone(&builder.build().unwrap());
    assert_eq!(ask(&zone, "db-1.db.shop.svc.cluster.local", "A"), ["NXDOMAIN"]);
}

fn node(name: &str) -> Event {
    let node = crate::model::Node {
        name: NamespacedName::new("", name),
        addresses: vec!["192.168.1.7".parse().unwrap()],
        labels: Box::default(),
    };
    Event::Apply(Object::Node(node.into()))
}

#[test]
fn nodes_have_names_that_lead_to_their_aliases_and_back() {
    let mut builder = far_builder();
    // Known by its object, with a name of several labels; by an endpoint; and this one, of itself.
    builder.apply(node("ip-10-0-0-1.eu.internal"));
    let web = service("shop/web", ServiceKind::ClusterIp, &["10.96.0.1"], &["http/TCP/80"]);
    put(&mut builder, &[web], &[on("far", slice("shop/web-1", "shop/web", &["http/TCP/80"], &["10.0.0.1"]))]);
    builder.apply(Event::Synced);
    let table = builder.build().unwrap();
    let known = zone(&table);
    for name in ["ip-10-0-0-1.eu.internal", "far", "edge1"] {
        let aliases = &table.node(name).unwrap().aliases;
        let [v4, v6] = aliases[..] else { panic!("{name} has {aliases:?}") };
        let target = table.aliases.target(v4).unwrap();
        assert!(target.is_node() && &*target.node == name);
        let full = format!("{name}.node.cluster.local");
        assert_eq!(ask(&known, &full, "A"), [format!("A {v4}")]);
        assert_eq!(ask(&known, &full, "AAAA"), [format!("AAAA {v6}")]);
        assert_eq!(ask(&known, &full, "SRV"), ["NODATA"]);
        let reversed: Vec<String> = v4.to_string().rsplit('.').map(str::to_owned).collect();
        let reversed = format!("{}.in-addr.arpa", reversed.join("."));
        assert_eq!(ask(&known, &reversed, "PTR"), [format!("PTR {full}.")]);
        assert_eq!(ask(&known, &reversed, "A"), ["NODATA"]);
    }
    for above in ["eu.internal.node.cluster.local", "internal.node.cluster.local", "node.cluster.local"] {
        assert_eq!(ask(&known, above, "A"), ["NODATA"], "{above} has names below it");
    }
    for other in ["other.node.cluster.local", "x.far.node.cluster.local", "rnal.node.cluster.local"] {
        assert_eq!(ask(&known, other, "A"), ["NXDOMAIN"], "{other}");
    }
    assert_eq!(known.explain(&wire("far.node.cluster.local"), type_of("A")).subject, Subject::Node);

    builder.apply(Event::Delete(Kind::EndpointSlice, name("shop/web-1")));
    let zone = Zone::build(&builder.build().unwrap(), &settings(), Some(&known));
    assert_eq!(ask(&zone, "far.node.cluster.local", "A"), ["NXDOMAIN"], "nobody speaks of it any more");
    assert!(ask(&zone, "edge1.node.cluster.local", "A")[0].starts_with("A 198.18."));
}

#[test]
fn without_a_tunnel_nodes_have_no_names() {
    let mut builder = builder();
    builder.apply(node("edge2"));
    builder.apply(Event::Synced);
    let zone = zone(&builder.build().unwrap());
    assert_eq!(ask(&zone, "edge2.node.cluster.local", "A"), ["NXDOMAIN"]);
}
