//! The part of `trace` that is beyond this node.

use std::fmt::Write;

use super::tunnel::rtt;
use crate::status::{Crossing, FarOutcome, FarRow, PeerRow, TraceReport};

/// A block for each endpoint that only the tunnel reaches: whose the alias is, the way there, what is said there.
pub(super) fn crossings(report: &TraceReport) -> String {
    let mut text = String::new();
    for crossing in &report.crossings {
        let Crossing { node, endpoint, alias, path, far } = crossing;
        let (whose, who) = if endpoint.ip().is_unspecified() {
            (format!("port {} of the node {node} itself", endpoint.port()), "it")
        } else {
            (format!("{endpoint} on {node}"), "its pod")
        };
        let _ = writeln!(text, "\n{alias} is the alias of {whose}");
        let _ = writeln!(text, "  tunnel: {}", path.as_ref().map_or_else(|| no_path(far), way));
        if let Some(said) = said(far, who) {
            let _ = writeln!(text, "  {node}: {said}");
        }
    }
    if report.crossings_left_out > 0 {
        let _ = writeln!(text, "\nand {} more on other nodes, of which none was asked", report.crossings_left_out);
    }
    text
}

/// `hole-punched, quic, 203.0.113.2:20006, rtt 1.2 ms`.
fn way(path: &PeerRow) -> String {
    let mut words = match &path.via {
        Some(via) => format!("{} via {via}, {}", path.path, path.transport),
        None => format!("{}, {}", path.path, path.transport),
    };
    if let Some(address) = path.address {
        let _ = write!(words, ", {address}");
    }
    if let Some(micros) = path.rtt_micros {
        let _ = write!(words, ", rtt {}", rtt(micros));
    }
    words
}

/// As a round trip is told, but for one that does not leave a machine.
fn brief(micros: u64) -> String {
    if micros < 100 { "less than 0.1 ms".to_owned() } else { rtt(micros) }
}

fn no_path(far: &FarRow) -> String {
    if !matches!(far.outcome, FarOutcome::NoPath | FarOutcome::NoTunnel) {
        "not needed, as that is this node".to_owned()
    } else if far.outcome == FarOutcome::NoTunnel {
        "NOT RUNNING on this node; see the conditions in `edgemesh-agent status`".to_owned()
    } else if far.detail.is_empty() {
        "NO PATH".to_owned()
    } else {
        format!("NO PATH: {}", far.detail)
    }
}

/// None where nobody could be asked.
fn said(far: &FarRow, who: &str) -> Option<String> {
    let allowed = || match (far.services.as_slice(), far.rule.as_str()) {
        ([], "") => "allowed".to_owned(),
        ([], rule) => format!("allowed, {rule}"),
        (services, _) => format!("allowed, endpoint of {}", services.join(", ")),
    };
    let detail = &far.detail;
    Some(match far.outcome {
        FarOutcome::Connected => {
            let took = far.dial_micros.map_or_else(String::new, |micros| format!(" in {}", brief(micros)));
            format!("{}; {who} answered{took}", allowed())
        }
        FarOutcome::Allowed => format!("{}; whether {who} answers is not tried with UDP", allowed()),
        FarOutcome::Refused => format!("{}; {who} REFUSES the connection: {detail}", allowed()),
        FarOutcome::Unreachable => format!("{}; {who} is NOT REACHABLE from there: {detail}", allowed()),
        FarOutcome::TimedOut => format!("{}; {who} is SILENT: {detail}", allowed()),
        FarOutcome::NotAllowed => format!("NOT ALLOWED there: {detail}"),
        FarOutcome::Busy => format!("TOO BUSY to be asked: {detail}"),
        FarOutcome::Silent => format!("SILENT: {detail}"),
        FarOutcome::TooOld => "its agent is too old to be asked; connections may work all the same".to_owned(),
        FarOutcome::Misunderstood => format!("its agent says what this one does not understand: {detail}"),
        FarOutcome::NoPath | FarOutcome::NoTunnel => return None,
    })
}
