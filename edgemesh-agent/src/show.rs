//! How answers look on a terminal.

mod crossing;
mod dns;
mod events;
mod trace;
mod tunnel;

use std::fmt::Write;

use serde_json::Value;

pub use dns::dns;
pub use events::{EVENTS_HEAD, event};
pub use trace::trace;
pub use tunnel::peers;

use crate::dataplane::ebpf::probe::Answer;
use crate::status::{BackendsReport, Counts, EndpointRow, PathRow, ServiceRow, VerdictRow};

/// The form of an answer.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub enum Output {
    #[default]
    Table,
    Json,
    Yaml,
}

/// `status` as text: what matters first, then what is wrong.
pub fn status(status: &Value) -> String {
    let mut text = String::new();
    let ready = match status["ready"].as_bool() {
        Some(true) => "ready".to_owned(),
        _ => format!("NOT READY, waiting for {}", list(&status["waiting_for"])),
    };
    let source = &status["source"];
    let objects = source["objects"]
        .as_object()
        .map_or_else(String::new, |objects| objects.iter().map(|(kind, count)| format!(", {count} {kind}")).collect());
    let mut rows = vec![
        ("Node", format!("{} (agent {})", word(&status["node"]), word(&status["version"]))),
        ("State", format!("{ready}, up {}", duration(&status["uptime_seconds"]))),
    ];
    rows.push(("Source", self::source(source, &objects)));
    for (label, text) in [("because", &source["reason"]), ("do", &source["hint"])] {
        rows.extend(text.as_str().map(|text| ("", format!("{label}: {text}"))));
    }
    rows.extend(snapshot(&status["snapshot"]));
    let dataplane = &status["dataplane"];
    if dataplane.is_null() {
        rows.push(("Data plane", "off (modules.edgeProxy.enable is false)".to_owned()));
    } else {
        let adopted = match dataplane["adopted_frontends"].as_u64() {
            Some(0) | None => String::new(),
            Some(count) => format!(", took over {count} frontends of an earlier agent"),
        };
        rows.push((
            "Data plane",
            format!("{} on cgroup {}{adopted}", word(&dataplane["kind"]), word(&dataplane["cgroup"])),
        ));
        rows.extend(tier(&dataplane["standing"]).into_iter().map(|line| ("", line)));
        rows.extend(canary(&dataplane["canary"]).map(|line| ("", line)));
        rows.extend(interfaces_line(dataplane).map(|line| ("", line)));
        let (now, newest) = (dataplane["generation"].as_u64(), dataplane["newest_generation"].as_u64());
        if now != newest {
            rows.push((
                "",
                format!(
                    "table {} in force, {} waiting",
                    word(&dataplane["generation"]),
                    word(&dataplane["newest_generation"])
                ),
            ));
        }
    }
    rows.extend(dns::status(&status["dns"]));
    let device = &status["device"];
    rows.push((
        "Device",
        match device.as_object() {
            Some(_) => {
                format!("{} ({}) with {}", word(&device["name"]), word(&device["kind"]), word(&device["address"]))
            }
            None => "MISSING".to_owned(),
        },
    ));
    rows.extend(aliases(&status["aliases"]).map(|line| ("Aliases", line)));
    rows.extend(tunnel::status(&status["tunnel"]).map(|line| ("Tunnel", line)));
    rows.extend(socks5(&status["socks5"]).map(|line| ("SOCKS5", line)));
    rows.push((
        "Serving",
        format!(
            "{} Services, {} frontends, {} backends",
            word(&status["services"]),
            word(&status["frontends"]),
            word(&status["backends"])
        ),
    ));
    for (label, value) in rows {
        let _ = writeln!(text, "{label:<12}{value}");
    }
    let conditions = status["conditions"].as_array().map_or(&[][..], Vec::as_slice);
    if conditions.is_empty() {
        text.push_str("Conditions  none\n");
    } else {
        text.push_str("Conditions\n");
    }
    for condition in conditions {
        let subject = condition["subject"].as_str().filter(|subject| !subject.is_empty());
        let subject = subject.map_or_else(String::new, |subject| format!(" {subject}"));
        let _ = writeln!(
            text,
            "  {}{subject} (for {})\n    {}",
            word(&condition["reason"]),
            age(&condition["since"]),
            word(&condition["message"])
        );
    }
    text
}

/// What stands for pods of other sites, and what was carried there; None without a tunnel.
fn aliases(aliases: &Value) -> Option<String> {
    let ranges: Vec<String> = aliases["ranges"].as_array()?.iter().map(word).collect();
    if aliases["available"] != true {
        return Some("NOT AVAILABLE: pods of other sites are refused".to_owned());
    }
    let proxy = &aliases["proxy"];
    let mut line = format!(
        "{} of {} in use; {} connections and {} UDP flows open",
        word(&aliases["in_use"]),
        ranges.join(" and "),
        word(&proxy["open_connections"]),
        word(&proxy["open_flows"])
    );
    if proxy["evicted_flows"].as_u64().is_some_and(|evicted| evicted > 0) {
        let _ = write!(line, "; {} UDP flows ended early for others", word(&proxy["evicted_flows"]));
    }
    let refusals = proxy["refusals"].as_array().into_iter().flatten();
    let refusals: Vec<String> =
        refusals.map(|refusal| format!("{} {}", word(&refusal["count"]), word(&refusal["kind"]))).collect();
    if !refusals.is_empty() {
        let _ = write!(line, "; refused: {}", refusals.join(", "));
    }
    Some(line)
}

/// Where SOCKS5 is served, and what came of it; None where it is not.
fn socks5(socks5: &Value) -> Option<String> {
    let listeners = socks5["listeners"].as_array()?.iter().map(|listener| match listener["listening"].as_bool() {
        Some(true) => word(&listener["address"]),
        _ => format!("{} NOT LISTENING", word(&listener["address"])),
    });
    let login = if socks5["login"] == true { " with login" } else { "" };
    let counts = &socks5["counts"];
    let mut line = format!(
        "{}{login}; {} clients, {} connections and {} UDP associations so far",
        listeners.collect::<Vec<_>>().join(", "),
        word(&counts["open_sessions"]),
        word(&counts["connections"]),
        word(&counts["associations"])
    );
    let failures = counts["failures"].as_array().into_iter().flatten();
    let failures: Vec<String> =
        failures.map(|failure| format!("{} {}", word(&failure["count"]), word(&failure["reason"]))).collect();
    if !failures.is_empty() {
        let _ = write!(line, "; came to nothing: {}", failures.join(", "));
    }
    Some(line)
}

/// Where packets are translated, and what was dropped there; None where no program is on an interface.
fn interfaces_line(dataplane: &Value) -> Option<String> {
    let all = dataplane["interfaces"].as_array().filter(|all| !all.is_empty())?;
    let names =
        all.iter().map(|one| format!("{} {} by {}", word(&one["role"]), word(&one["name"]), word(&one["attached_by"])));
    let mut line = format!("interfaces: {}", names.collect::<Vec<_>>().join(", "));
    let dropped = dataplane["dropped_packets"].as_object().into_iter().flatten();
    let dropped: Vec<String> = dropped.map(|(reason, count)| format!("{} {reason}", word(count))).collect();
    if !dropped.is_empty() {
        let _ = write!(line, "; packets dropped: {}", dropped.join(", "));
    }
    Some(line)
}

/// What was restored and is still in force comes first: it may be out of date.
fn snapshot(snapshot: &Value) -> Option<(&'static str, String)> {
    let path = snapshot["path"].as_str()?;
    let ago = |age: &Value| match age.as_u64() {
        Some(age) => format!("{} ago", seconds(age)),
        None => "at a time that this node's clock has not reached".to_owned(),
    };
    let mut parts = Vec::new();
    let served = snapshot["still_served"].as_object().into_iter().flatten();
    let served: Vec<String> = served
        .map(|(kind, kept)| format!("{} {kind} as of {}", word(&kept["objects"]), ago(&kept["age_seconds"])))
        .collect();
    if !served.is_empty() {
        parts.push(format!("STILL IN FORCE: {}", served.join(", ")));
    }
    if !snapshot["restored"].is_null() {
        parts.push(format!("restored at the start, taken {}", ago(&snapshot["restored"]["age_seconds"])));
    }
    parts.push(match (snapshot["written"].as_u64(), snapshot["size_bytes"].as_u64()) {
        (Some(_), Some(size)) => format!("written {} ago, {} KiB", age(&snapshot["written"]), size.div_ceil(1024)),
        (Some(_), None) => "not written anew yet".to_owned(),
        (None, _) => "not written yet".to_owned(),
    });
    if !snapshot["last_error"].is_null() {
        parts.push("CANNOT BE WRITTEN".to_owned());
    }
    Some(("Snapshot", format!("{path}: {}", parts.join("; "))))
}

/// `services` as a table, a row for each frontend.
pub fn services(services: &[ServiceRow]) -> String {
    let mut rows = vec![
        ["NAMESPACE", "NAME", "KIND", "FRONTEND", "AS", "BACKENDS", "CONNECTS", "DATAGRAMS", "REFUSED", "NOTES"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for service in services {
        let mut first = vec![service.namespace.clone(), service.name.clone(), service.kind.clone()];
        let notes = service.notes.join("; ");
        if service.frontends.is_empty() {
            first.extend(["-", "-", "-", "-", "-", "-"].map(str::to_owned));
            first.push(notes);
            rows.push(first);
            continue;
        }
        for frontend in &service.frontends {
            let mut row = first.clone();
            row.extend([frontend.address.clone(), frontend.kind.clone(), frontend.backends.to_string()]);
            row.extend(numbers(&frontend.counts));
            row.push(if frontend.in_force { notes.clone() } else { format!("NOT IN FORCE {notes}") });
            rows.push(row);
        }
    }
    columns(&rows)
}

/// `backends` as tables, one for each port.
pub fn backends(report: &BackendsReport) -> String {
    let service = &report.service;
    let mut text = format!("Service {}/{} ({})\n", service.namespace, service.name, service.kind);
    if let Some(rule) = &service.destination_rule {
        let _ = writeln!(text, "  balanced by DestinationRule {rule}");
    }
    for note in &service.notes {
        let _ = writeln!(text, "  {note}");
    }
    for frontend in &service.frontends {
        let refused = frontend.counts.refused;
        let _ = write!(text, "  answers on {}", frontend.address);
        if frontend.kind != "ClusterIP" {
            let _ = write!(text, " ({})", frontend.kind);
        }
        let _ = write!(text, ", {} eligible", frontend.backends);
        if frontend.external_backends != frontend.backends {
            let _ = write!(text, " ({} for traffic from outside)", frontend.external_backends);
        }
        let _ = write!(text, ", {refused} refused, balance: {}", frontend.balance);
        if let Some(seconds) = frontend.affinity_seconds {
            let _ = write!(text, ", clients stay for {seconds}s");
        }
        text.push_str(if frontend.in_force { "\n" } else { ", NOT IN FORCE\n" });
    }
    for port in &report.ports {
        let name = if port.name.is_empty() { String::new() } else { format!(" '{}'", port.name) };
        let _ = writeln!(text, "\nPort {}/{}{name}", port.port, port.protocol);
        // Most Services treat all clients alike; only for the others are there more columns.
        let same = |endpoint: &EndpointRow, verdict: &Option<VerdictRow>| {
            verdict.as_ref().is_none_or(|verdict| verdict.eligible == endpoint.eligible)
        };
        let external = port.endpoints.iter().any(|endpoint| !same(endpoint, &endpoint.external));
        let outside = port.endpoints.iter().any(|endpoint| !same(endpoint, &endpoint.from_outside));
        let paths = port.endpoints.iter().any(|endpoint| endpoint.path.is_some());
        let mut head = vec!["ENDPOINT", "NODE", "ZONE", "ELIGIBLE", "REASON", "CONNECTS", "DATAGRAMS"];
        head.extend(paths.then_some("PATH"));
        head.extend(external.then_some("NODE PORT, LB AND EXTERNAL IPS"));
        head.extend(outside.then_some("FROM OUTSIDE"));
        let mut rows = vec![head.into_iter().map(str::to_owned).collect()];
        for endpoint in &port.endpoints {
            let dash = || "-".to_owned();
            let mut row = vec![
                endpoint.address.to_string(),
                endpoint.node.clone().unwrap_or_else(dash),
                endpoint.zone.clone().unwrap_or_else(dash),
                if endpoint.eligible { "yes" } else { "no" }.to_owned(),
                endpoint.reason.clone(),
                endpoint.counts.connects.to_string(),
                endpoint.counts.datagrams.to_string(),
            ];
            row.extend(paths.then(|| path(&endpoint.path)));
            row.extend(external.then(|| verdict(&endpoint.external)));
            row.extend(outside.then(|| verdict(&endpoint.from_outside)));
            rows.push(row);
        }
        text.push_str(&columns(&rows));
    }
    text
}

/// `remote as 198.18.3.7: no route leads there but the default`.
fn path(path: &Option<PathRow>) -> String {
    match path {
        Some(PathRow { way, alias: Some(alias), reason }) if way == "remote" => format!("remote as {alias}: {reason}"),
        Some(PathRow { way, reason, .. }) => format!("{way}: {reason}"),
        None => "-".to_owned(),
    }
}

/// `probe` as a table, a row for each feature, and what is missing below it.
pub fn probe(answer: &Answer) -> String {
    let mut rows = vec![["FEATURE", "FOUND", "SINCE", "WHY NOT"].map(str::to_owned).to_vec()];
    for row in &answer.features {
        let found = if row.available { "yes" } else { "NO" };
        let why = row.reason.clone().unwrap_or_default();
        rows.push(vec![row.feature.clone(), found.to_owned(), row.since.to_owned(), why]);
    }
    let mut text = columns(&rows);
    let _ = writeln!(text, "\nTier: {}", answer.standing.tier);
    for loss in &answer.standing.losses {
        let _ = writeln!(text, "  without {}: {}", loss.feature, loss.cost);
    }
    text
}

/// Where from, how it fares and what it gave.
fn source(source: &Value, objects: &str) -> String {
    let health = match source["health"].as_str() {
        Some("degraded") => "DEGRADED",
        Some("offline") => "OFFLINE",
        Some(health) => health,
        None => "unknown",
    };
    // What is followed by watches is up to date while it is connected.
    let followed = health == "connected" && source["kind"] != "metaServer";
    let synced = match source["last_sync"].as_u64() {
        _ if followed => String::new(),
        Some(_) => format!(", in sync {} ago", age(&source["last_sync"])),
        None => ", never in sync".to_owned(),
    };
    let (kind, place) = (word(&source["kind"]), word(&source["source"]));
    format!("{kind} {place}, {health} for {}{synced}{objects}", age(&source["since"]))
}

/// The tier on one line, and a line for everything that is missing.
fn tier(standing: &Value) -> Vec<String> {
    let losses = standing["losses"].as_array().map_or(&[][..], Vec::as_slice);
    let first = format!("tier {}", word(&standing["tier"]));
    let loss = |loss: &Value| {
        let (feature, cost) = (word(&loss["feature"]), word(&loss["cost"]));
        format!("without {feature}: {cost}; {} ({})", word(&loss["reason"]), word(&loss["since"]))
    };
    std::iter::once(first).chain(losses.iter().map(loss)).collect()
}

fn canary(canary: &Value) -> Option<String> {
    let passed = canary["passed_at"].as_u64();
    let line = match canary["failures"].as_u64()? {
        0 if passed.is_none() => "canary: no run yet".to_owned(),
        0 => format!("canary: passed {} ago", age(&canary["passed_at"])),
        failures => match passed {
            Some(_) => format!("canary: FAILED {failures} times, passed last {} ago", age(&canary["passed_at"])),
            None => format!("canary: FAILED {failures} times, never passed"),
        },
    };
    Some(line)
}

fn verdict(verdict: &Option<VerdictRow>) -> String {
    match verdict {
        Some(VerdictRow { eligible: true, .. }) => "yes".to_owned(),
        Some(VerdictRow { eligible: false, reason }) => format!("no: {reason}"),
        None => "-".to_owned(),
    }
}

fn numbers(counts: &Counts) -> [String; 3] {
    [counts.connects, counts.datagrams, counts.refused].map(|count| count.to_string())
}

/// Pads every column to its widest cell; the last is left as it is.
fn columns(rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        widths.resize(widths.len().max(row.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn word(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn list(value: &Value) -> String {
    value.as_array().map_or_else(String::new, |items| items.iter().map(word).collect::<Vec<_>>().join(", "))
}

fn age(since: &Value) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    seconds(now.saturating_sub(since.as_u64().unwrap_or(now)))
}

fn duration(value: &Value) -> String {
    seconds(value.as_u64().unwrap_or(0))
}

/// A duration of so many seconds as people say it: `1m5s`.
pub(crate) fn seconds(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{FrontendRow, PortRow};

    #[test]
    fn durations_read_as_people_say_them() {
        for (given, shown) in [(5, "5s"), (65, "1m5s"), (3_700, "1h1m"), (90_000, "1d1h")] {
            assert_eq!(seconds(given), shown);
        }
    }

    #[test]
    fn interfaces_are_shown_with_what_was_dropped_on_them() {
        let one = serde_json::json!({"name": "eth0", "role": "uplink", "attached_by": "tcx"});
        let shown = |interfaces: &[&Value], dropped: Value| {
            interfaces_line(&serde_json::json!({"interfaces": interfaces, "dropped_packets": dropped}))
        };
        let none = serde_json::json!({});
        assert_eq!(shown(&[], none.clone()), None);
        assert_eq!(shown(&[&one], none).unwrap(), "interfaces: uplink eth0 by tcx");
        let dropped = serde_json::json!({"source_range": 3});
        assert_eq!(shown(&[&one], dropped).unwrap(), "interfaces: uplink eth0 by tcx; packets dropped: 3 source_range");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["A".to_owned(), "B".to_owned()], vec!["long".to_owned(), "x".to_owned()]];
        assert_eq!(columns(&rows), "A     B\nlong  x\n");
    }

    #[test]
    fn backends_have_columns_for_other_clients_only_where_they_are_treated_otherwise() {
        let verdict = |eligible, reason: &str| Some(VerdictRow { eligible, reason: reason.to_owned() });
        let report = |external, from_outside| BackendsReport {
            service: ServiceRow {
                namespace: "default".to_owned(),
                name: "web".to_owned(),
                kind: "NodePort".to_owned(),
                frontends: vec![FrontendRow {
                    address: "192.0.2.1:30080/TCP".to_owned(),
                    kind: "NodePort".to_owned(),
                    backends: 1,
                    external_backends: 0,
                    affinity_seconds: Some(60),
                    balance: "source-ip".to_owned(),
                    in_force: true,
                    counts: Counts::default(),
                }],
                destination_rule: Some("default/web".to_owned()),
                notes: Vec::new(),
            },
            ports: vec![PortRow {
                name: String::new(),
                port: 80,
                protocol: "TCP".to_owned(),
                endpoints: vec![EndpointRow {
                    address: "10.244.0.1:8080".parse().unwrap(),
                    node: None,
                    zone: None,
                    eligible: true,
                    reason: "ready".to_owned(),
                    external,
                    from_outside,
                    path: None,
                    counts: Counts::default(),
                }],
            }],
        };
        let shown = backends(&report(verdict(true, "ready"), verdict(false, "not here")));
        let answers = "answers on 192.0.2.1:30080/TCP (NodePort), 1 eligible (0 for traffic from outside), 0 refused, \
                       balance: source-ip, clients stay for 60s\n";
        assert!(shown.contains(answers) && shown.contains("balanced by DestinationRule default/web\n"), "{shown}");
        assert!(shown.contains("FROM OUTSIDE") && shown.contains("no: not here"), "{shown}");
        assert!(!shown.contains("EXTERNAL IPS"), "{shown}");
        let shown = backends(&report(None, None));
        assert!(shown.contains("REASON") && !shown.contains("FROM OUTSIDE"), "{shown}");
    }

    #[test]
    fn the_source_is_told_with_its_state_what_it_gave_and_what_to_do() {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let mut given = serde_json::json!({
            "kind": "metaServer", "source": "http://127.0.0.1:10550", "health": "connected", "since": now - 65,
            "last_sync": now - 5, "reason": null, "hint": null, "objects": {},
        });
        assert_eq!(
            source(&given, ", 3 Service"),
            "metaServer http://127.0.0.1:10550, connected for 1m5s, in sync 5s ago, 3 Service"
        );
        given["health"] = "degraded".into();
        given["last_sync"] = Value::Null;
        assert_eq!(source(&given, ""), "metaServer http://127.0.0.1:10550, DEGRADED for 1m5s, never in sync");
        given["kind"] = "static".into();
        given["health"] = "connected".into();
        assert_eq!(source(&given, ""), "static http://127.0.0.1:10550, connected for 1m5s");
    }

    #[test]
    fn status_names_what_is_wrong() {
        let shown = status(&serde_json::json!({
            "version": "1", "node": "edge1", "uptime_seconds": 3, "ready": false, "waiting_for": ["the data plane"],
            "source": {"kind": "static", "source": "/m", "health": "offline", "since": 0, "reason": "refused", "objects": {}},
            "dataplane": null, "device": null, "services": 0, "frontends": 0, "backends": 0,
            "conditions": [{"reason": "ManifestInvalid", "subject": "a.yaml", "message": "bad", "since": 0}],
        }));
        for part in
            ["NOT READY, waiting for the data plane", "static /m, OFFLINE for", "because: refused", "off", "MISSING"]
        {
            assert!(shown.contains(part), "{part} in\n{shown}");
        }
        assert!(shown.contains("ManifestInvalid a.yaml"), "{shown}");
    }
}
