//! `trace` on a terminal.

use std::{collections::BTreeSet, fmt::Write};

use super::columns;
use crate::status::{ClientRow, KernelState, PolicyRow, TraceReport, TracedEndpoint};

/// `trace` as text: what the address is, by which rules, what a connection gets; then its endpoints.
pub fn trace(report: &TraceReport) -> String {
    let mut text = format!("{} ", report.address);
    match &report.frontend {
        Some(frontend) => {
            let name = if frontend.port_name.is_empty() { String::new() } else { format!(" '{}'", frontend.port_name) };
            let _ = writeln!(
                text,
                "is a {} frontend of {}/{}, port {}{name}",
                frontend.kind, frontend.namespace, frontend.service, frontend.port
            );
            line(&mut text, "also", &frontend.also.join(", "));
            line(&mut text, "policy", &policy(&frontend.policy));
        }
        None => text.push_str("is no frontend\n"),
    }
    line(&mut text, "client", &report.client.as_ref().map_or_else(String::new, client));
    line(&mut text, "kernel", &kernel(report));
    line(&mut text, "connect", &report.answer);
    for note in &report.notes {
        line(&mut text, "note", note);
    }
    text.push_str(&super::crossing::crossings(report));
    if !report.endpoints.is_empty() {
        text.push('\n');
        text.push_str(&endpoints(&report.endpoints));
    }
    text
}

fn line(text: &mut String, label: &str, value: &str) {
    if !value.is_empty() {
        let _ = writeln!(text, "  {label:<8}{value}");
    }
}

fn policy(policy: &PolicyRow) -> String {
    let mut parts = vec![format!("internal traffic {}", policy.internal_traffic)];
    // Of a Service with nothing but a ClusterIP it says nothing.
    if policy.external_traffic != "Cluster" {
        parts.push(format!("external traffic {}", policy.external_traffic));
    }
    parts.extend(policy.distribution.as_ref().map(|distribution| format!("trafficDistribution {distribution}")));
    parts.extend(policy.within_node_group.then(|| "only the own node group".to_owned()));
    if !policy.topology_keys.is_empty() {
        parts.push(format!("topologyKeys {}", policy.topology_keys.join(", ")));
    }
    parts.extend(policy.publish_not_ready.then(|| "readiness does not matter".to_owned()));
    parts.push(match policy.affinity_seconds {
        Some(seconds) => format!("session affinity {seconds}s"),
        None => "no session affinity".to_owned(),
    });
    let rule = policy.destination_rule.as_ref();
    let rule = rule.map_or_else(String::new, |rule| format!(" by DestinationRule {rule}"));
    parts.push(format!("balance {}{rule}", policy.balance));
    parts.join(", ")
}

fn client(client: &ClientRow) -> String {
    let mut text = format!("{}: process {} ({})", client.name, client.process, client.command);
    let _ = write!(text, ", network namespace {}", client.namespace);
    if let Some(cookie) = client.cookie {
        let _ = write!(text, " with cookie {cookie}");
    }
    if client.host_network {
        text.push_str(" (the host's)");
    }
    text.push_str(match client.served {
        Some(true) => ", served",
        Some(false) => ", NOT SERVED",
        None => ", perhaps served",
    });
    text
}

fn kernel(report: &TraceReport) -> String {
    let kernel = &report.kernel;
    match kernel.state {
        KernelState::Same if report.frontend.is_some() => "has the same set in force".to_owned(),
        KernelState::Same => "has no such frontend either".to_owned(),
        KernelState::Off => "not asked: edgeProxy is off".to_owned(),
        KernelState::Unknown => "COULD NOT BE READ".to_owned(),
        KernelState::Different => {
            let list =
                |all: &[std::net::SocketAddr]| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let mut text = "DIFFERS".to_owned();
            if !kernel.missing.is_empty() {
                let _ = write!(text, ", does not have {}", list(&kernel.missing));
            }
            if !kernel.extra.is_empty() {
                let _ = write!(text, ", still has {}", list(&kernel.extra));
            }
            text
        }
    }
}

fn endpoints(endpoints: &[TracedEndpoint]) -> String {
    let paths = endpoints.iter().any(|endpoint| endpoint.path.is_some());
    let mut head = vec!["ENDPOINT", "NODE", "ZONE", "ELIGIBLE", "IN KERNEL", "CHANCE", "REASON"];
    head.extend(paths.then_some("PATH"));
    let mut rows = vec![head.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    // Nearly always all of one set have the same chance, which reads better as a fraction.
    let chosen = endpoints.iter().filter(|endpoint| endpoint.chance > 0.0);
    let equal = chosen.clone().map(|endpoint| endpoint.chance.to_bits()).collect::<BTreeSet<_>>().len() == 1;
    let count = chosen.count();
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let dash = || "-".to_owned();
    for endpoint in endpoints {
        let chance = match endpoint.chance {
            0.0 => "0".to_owned(),
            1.0 => "1".to_owned(),
            _ if equal => format!("1/{count}"),
            chance => format!("{chance:.3}"),
        };
        let mut row = vec![
            endpoint.address.to_string(),
            endpoint.node.clone().unwrap_or_else(dash),
            endpoint.zone.clone().unwrap_or_else(dash),
            yes(endpoint.eligible),
            endpoint.in_kernel.map_or_else(dash, yes),
            chance,
            endpoint.reason.clone(),
        ];
        row.extend(paths.then(|| super::path(&endpoint.path)));
        rows.push(row);
    }
    columns(&rows)
}
