//! DNS on a terminal: `dns NAME`, and its part of `status`.

use std::fmt::Write;

use serde_json::Value;

use super::{columns, duration, word};
use crate::dns::{DnsReport, ForwardedRow, ZoneRow};

/// `dns` as text: the answer, where it is from, and for endpoints why each is in it or not.
pub fn dns(report: &DnsReport) -> String {
    let why = report.extended.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
    let mut text = format!("{} {}: {}{why}\n", report.name, report.qtype, report.rcode);
    for answer in &report.answers {
        let _ = writeln!(text, "  {answer}");
    }
    if let Some(zone) = &report.zone {
        line(&mut text, "zone", &self::zone(zone));
        line(&mut text, "service", &zone.services.join(", "));
    }
    if let Some(alias) = &report.alias {
        line(&mut text, "alias", &format!("of {alias}, which is not of the zone"));
    }
    if let Some(forwarded) = &report.forwarded {
        line(&mut text, "from", &from(forwarded));
        line(&mut text, "asked", &asked(forwarded));
    }
    if let Some(zone) = report.zone.as_ref().filter(|zone| !zone.endpoints.is_empty()) {
        let head = ["ADDRESS", "NAME", "NODE", "ANSWERED", "REASON"].map(str::to_owned).to_vec();
        let rows = zone.endpoints.iter().map(|endpoint| {
            let node = endpoint.node.clone().unwrap_or_else(|| "-".to_owned());
            let included = if endpoint.included { "yes" } else { "no" }.to_owned();
            vec![endpoint.address.to_string(), endpoint.label.clone(), node, included, endpoint.reason.clone()]
        });
        text.push('\n');
        text.push_str(&columns(&std::iter::once(head).chain(rows).collect::<Vec<_>>()));
    }
    text
}

fn line(text: &mut String, label: &str, value: &str) {
    if !value.is_empty() {
        let _ = writeln!(text, "  {label:<8}{value}");
    }
}

fn zone(zone: &ZoneRow) -> String {
    let subject = match zone.subject.as_str() {
        "service" => "the name of a Service",
        "node" => "the name of a node",
        "endpoint" => "the name of an endpoint",
        "port" => "the name of a Service's port",
        "pod" => "an address written as a pod's name",
        "address" => "the reverse name of an address",
        "domain" => "the cluster domain itself",
        "version" => "the version of the schema",
        "name-server" => "this server",
        "parent" => "a name that others are below",
        "foreign" => return format!("the name is not of {}", zone.domain),
        _ => "a name of no form that the cluster has",
    };
    let outcome = match zone.outcome.as_str() {
        "answers" => "",
        "no-data" => ", without records of this type",
        "no-such-name" => ", and there is none",
        "not-yet" => ", not known yet: the metadata source has not delivered everything",
        _ => ", left to other servers",
    };
    format!("{}: {subject}{outcome}", zone.domain)
}

fn from(forwarded: &ForwardedRow) -> String {
    let had = match forwarded.cached {
        Some(cached) if cached.expired => format!(", {} old and past its time", ago(cached.age)),
        Some(cached) => format!(", {} old, good for {} more", ago(cached.age), ago(cached.remaining)),
        None => String::new(),
    };
    match (forwarded.from.as_str(), forwarded.stale) {
        ("cache", true) => format!("the cache{had}: STALE, as no upstream answers"),
        ("cache", false) => format!("the cache{had}"),
        ("nobody", _) => "nobody: no upstream answered".to_owned(),
        (upstream, _) => format!("upstream {upstream}"),
    }
}

fn asked(forwarded: &ForwardedRow) -> String {
    let upstreams = forwarded.upstreams.iter().map(|upstream| {
        let state = match (upstream.healthy, upstream.round_trip) {
            (false, _) => "SILENT".to_owned(),
            (true, Some(seconds)) => format!("{:.1} ms", seconds * 1e3),
            (true, None) => "not asked yet".to_owned(),
        };
        format!("{} ({state})", upstream.address)
    });
    let upstreams = upstreams.collect::<Vec<_>>().join(", then ");
    let upstreams = if upstreams.is_empty() { "nobody: no upstream is known".to_owned() } else { upstreams };
    if forwarded.domain == "." { upstreams } else { format!("for {}: {upstreams}", forwarded.domain) }
}

fn ago(seconds: u64) -> String {
    duration(&Value::from(seconds))
}

/// The lines of `status`.
pub(super) fn status(dns: &Value) -> Vec<(&'static str, String)> {
    if dns.is_null() {
        return vec![("DNS", "off (modules.edgeDNS.enable is false)".to_owned())];
    }
    let listeners = dns["listeners"].as_array().into_iter().flatten().map(|listener| {
        let state = if listener["listening"] == true { "" } else { " NOT LISTENING" };
        format!("{} {}{state}", word(&listener["address"]), word(&listener["transport"]))
    });
    let what = match dns["domain"].as_str() {
        Some(domain) => format!("{domain} on "),
        None => "a cache before the cluster's DNS on ".to_owned(),
    };
    let upstreams = dns["forwarder"]["upstreams"].as_array().into_iter().flatten().map(|upstream| {
        let state = if upstream["healthy"] == true { "" } else { " SILENT" };
        let domains = upstream["domains"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let domains: Vec<&str> = domains.filter(|domain| *domain != ".").collect();
        let domains = if domains.is_empty() { String::new() } else { format!(" for {}", domains.join(" ")) };
        format!("{}{domains}{state}", word(&upstream["address"]))
    });
    let upstreams = upstreams.collect::<Vec<_>>().join(", ");
    let upstreams = if upstreams.is_empty() { "NO UPSTREAM".to_owned() } else { format!("upstreams {upstreams}") };
    let entries = word(&dns["forwarder"]["cache"]["entries"]);
    let closed_to: Vec<&str> = dns["closed_to"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let whom = match closed_to.as_slice() {
        [] => "queries are answered wherever they come from".to_owned(),
        uplinks => format!("queries from {} are not answered", uplinks.join(", ")),
    };
    vec![
        ("DNS", format!("{what}{}", listeners.collect::<Vec<_>>().join(", "))),
        ("", format!("{upstreams}; {entries} answers cached")),
        ("", whom),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dns::{CachedRow, NamedEndpointRow, UpstreamRow};

    fn report() -> DnsReport {
        DnsReport {
            name: "db.shop.svc.cluster.local.".to_owned(),
            qtype: "A".to_owned(),
            rcode: "NOERROR".to_owned(),
            extended: None,
            answers: vec!["db.shop.svc.cluster.local. 30 A 10.244.1.1".to_owned()],
            zone: Some(ZoneRow {
                domain: "cluster.local".to_owned(),
                subject: "service".to_owned(),
                outcome: "answers".to_owned(),
                services: vec!["shop/db".to_owned()],
                endpoints: vec![NamedEndpointRow {
                    address: "10.244.1.1".parse().unwrap(),
                    label: "db-0".to_owned(),
                    node: Some("edge1".to_owned()),
                    included: true,
                    reason: "ready".to_owned(),
                }],
            }),
            alias: None,
            forwarded: None,
        }
    }

    #[test]
    fn a_name_of_the_cluster_shows_its_service_and_endpoints() {
        let shown = dns(&report());
        for part in [
            "db.shop.svc.cluster.local. A: NOERROR\n  db.shop",
            "zone    cluster.local: the name of a Service\n",
            "service shop/db\n",
            "10.244.1.1  db-0  edge1  yes       ready",
        ] {
            assert!(shown.contains(part), "{part:?} in\n{shown}");
        }
    }

    #[test]
    fn a_stale_answer_is_shown_as_such_with_who_is_silent() {
        let forwarded = ForwardedRow {
            domain: ".".to_owned(),
            from: "cache".to_owned(),
            stale: true,
            cached: Some(CachedRow { age: 125, remaining: 0, expired: true }),
            upstreams: vec![UpstreamRow { address: "192.0.2.53:53".to_owned(), healthy: false, round_trip: None }],
        };
        let extended = Some("Stale Answer".to_owned());
        let shown = dns(&DnsReport { forwarded: Some(forwarded), zone: None, extended, ..report() });
        assert!(shown.starts_with("db.shop.svc.cluster.local. A: NOERROR (Stale Answer)\n"), "{shown}");
        let from = "from    the cache, 2m5s old and past its time: STALE, as no upstream answers";
        assert!(shown.contains(from), "{shown}");
        assert!(shown.contains("asked   192.0.2.53:53 (SILENT)"), "{shown}");
    }

    #[test]
    fn status_names_addresses_upstreams_and_what_is_wrong_with_them() {
        let rows = status(&serde_json::json!({
            "listeners": [
                {"address": "169.254.96.16:53", "transport": "UDP", "listening": true},
                {"address": "169.254.96.16:53", "transport": "TCP", "listening": false},
            ],
            "closed_to": ["eth0", "wwan0"],
            "domain": "cluster.local",
            "forwarder": {
                "upstreams": [{"address": "192.0.2.53:53", "domains": ["."], "healthy": false}],
                "cache": {"entries": 7},
            },
        }));
        let shown: Vec<&str> = rows.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(
            shown,
            [
                "cluster.local on 169.254.96.16:53 UDP, 169.254.96.16:53 TCP NOT LISTENING",
                "upstreams 192.0.2.53:53 SILENT; 7 answers cached",
                "queries from eth0, wwan0 are not answered",
            ]
        );
        assert_eq!(status(&Value::Null)[0].1, "off (modules.edgeDNS.enable is false)");
    }
}
