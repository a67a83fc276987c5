//! What else is to be said of an address: who else wanted it, whose neighbour it is, what the kernel makes of it.

use std::collections::BTreeSet;

use super::{KernelRow, KernelState, Outcome};
use crate::{
    model::{FrontendAddr, FrontendKind, NamespacedName, Note, Path, Protocol, ServiceEntry, ServiceTable, Way},
    net::client::{Client, Served},
};

/// The Service to which the whole address belongs: one that has it as its ClusterIP.
pub(in crate::status) fn owner(table: &ServiceTable, at: &FrontendAddr) -> Option<NamespacedName> {
    let owns = |entry: &ServiceEntry| {
        let mut own = entry.frontends.iter().filter(|frontend| frontend.kind == FrontendKind::ClusterIp);
        own.any(|frontend| frontend.at.addr.ip() == at.addr.ip())
    };
    table.services.iter().find(|entry| owns(entry)).map(|entry| entry.service.name.clone())
}

pub(super) fn of(
    table: &ServiceTable,
    at: &FrontendAddr,
    found: Option<&ServiceEntry>,
    kernel: &KernelRow,
    outcome: Outcome,
) -> Vec<String> {
    let mut notes: Vec<String> = of_kernel(kernel).into_iter().collect();
    for entry in &table.services {
        let name = &entry.service.name;
        for note in &entry.notes {
            if let Note::Taken { at: wanted, by } = note
                && wanted == at
            {
                notes.push(format!(
                    "{name} wants this address and port too; {by} has it, being first by kind and then by name"
                ));
            }
        }
    }
    match found {
        Some(entry) => {
            notes.extend(entry.notes.iter().filter(|note| concerns_frontends(note)).map(ToString::to_string));
            let endpoints = entry.frontends.iter().find(|frontend| frontend.at == *at);
            let endpoints = endpoints.and_then(|frontend| entry.ports.get(frontend.port));
            if outcome == Outcome::Refused && endpoints.is_some_and(|served| served.endpoints.is_empty()) {
                notes.push(
                    "the Service has no endpoint for this port: does its selector match pods, and do the names of its \
                     ports match those in its EndpointSlices?"
                        .to_owned(),
                );
            }
            if at.addr.ip().is_loopback() {
                notes.push("127.0.0.1 is meant for sockets of the host alone: a pod's is its own".to_owned());
            }
        }
        None => table.services.iter().for_each(|entry| notes.extend(of_neighbour(entry, at))),
    }
    notes
}

/// Whether a note is about what a frontend does, and not about another that is not served.
fn concerns_frontends(note: &Note) -> bool {
    match note {
        Note::NodeUnknown | Note::Unheeded { .. } | Note::Overruled { .. } => true,
        Note::Filtered | Note::Sctp { .. } | Note::Taken { .. } => false,
    }
}

fn of_kernel(kernel: &KernelRow) -> Option<String> {
    match kernel.state {
        KernelState::Same => None,
        KernelState::Off => Some(
            "modules.edgeProxy.enable is false; what an earlier agent left in the kernel would be named by `status`"
                .to_owned(),
        ),
        KernelState::Unknown => Some(format!(
            "the kernel could not be read ({}); the answer is what it should hold",
            kernel.error.as_deref()?
        )),
        KernelState::Different => Some(
            "the kernel does not hold what it should: right after a change that is so for a moment, else see the \
             conditions in `status`"
                .to_owned(),
        ),
    }
}

/// What a Service has to do with an address that is no frontend.
fn of_neighbour(entry: &ServiceEntry, at: &FrontendAddr) -> Vec<String> {
    let (service, name) = (&entry.service, &entry.service.name);
    let mut notes = Vec::new();
    let ips = [&service.cluster_ips, &service.external_ips, &service.load_balancer_ips];
    if ips.into_iter().flatten().any(|ip| *ip == at.addr.ip()) {
        let port = service.ports.iter().find(|port| port.port.get() == at.addr.port());
        let answers = |frontend: &&crate::model::Frontend| frontend.at.addr.ip() == at.addr.ip();
        let ports: BTreeSet<String> = entry
            .frontends
            .iter()
            .filter(answers)
            .map(|frontend| format!("{}/{}", frontend.at.addr.port(), frontend.at.protocol))
            .collect();
        if entry.notes.contains(&Note::Filtered) {
            notes.push(format!("{name} has this address, and is {}", Note::Filtered));
        } else if let Some(port) = port.filter(|port| port.protocol == Protocol::Sctp) {
            notes.push(format!("{name}: {}", Note::Sctp { port: port.port.get() }));
        } else if !ports.is_empty() {
            let ports: Vec<String> = ports.into_iter().collect();
            notes.push(format!("on this address {name} answers on {}", ports.join(", ")));
        }
    }
    for port in service.ports.iter().filter(|port| port.protocol == at.protocol) {
        if port.node_port.is_some_and(|number| number.get() == at.addr.port()) {
            let own = entry.frontends.iter().filter(|frontend| frontend.at.addr.port() == at.addr.port());
            let own: Vec<String> = own.map(|frontend| frontend.at.addr.ip().to_string()).collect();
            let on = if own.is_empty() { "nowhere".to_owned() } else { own.join(", ") };
            let hint =
                if entry.notes.contains(&Note::NodeUnknown) { "; this node's Node object is not known" } else { "" };
            notes.push(format!(
                "{} is a node port of {name}, which is answered on this node's own addresses: {on}{hint}",
                at.addr.port()
            ));
        }
    }
    for served in entry.ports.iter().filter(|served| served.port.protocol == at.protocol) {
        let endpoint = format!("it is an endpoint of {name}, port {}", served.port.port);
        for found in served.endpoints.iter().filter(|endpoint| endpoint.addr == at.addr) {
            let node = found.place.node.as_deref().unwrap_or("no node");
            let note = match found.path.as_deref().map_or(Way::Direct, Path::way) {
                Way::Local | Way::Direct => format!("{endpoint}: connections go straight there"),
                Way::Remote => {
                    let alias = found.target().map_or_else(String::new, |alias| format!(" {alias}"));
                    format!(
                        "{endpoint}, on {node}, which only the tunnel reaches: from here connect to its alias{alias}"
                    )
                }
                Way::None => format!("{endpoint}, on {node}: there is no way to it from here"),
            };
            notes.push(note);
        }
    }
    notes
}

pub(super) fn of_client(client: &Client, cgroup: &str) -> Vec<String> {
    let mut notes = Vec::new();
    let process = client.process;
    match client.served {
        Served::Yes => {}
        Served::No => notes.push(format!(
            "process {process} is in the cgroup {}, which is not below {cgroup}: the programs do not see its sockets, so \
             nothing is translated for it; see modules.edgeProxy.ebpf.cgroupRoot",
            client.cgroup
        )),
        Served::Unknown => notes.push(format!(
            "whether the programs see the sockets of process {process} cannot be told: its cgroup {} cannot be compared \
             with {cgroup} from the agent's cgroup namespace",
            client.cgroup
        )),
    }
    if client.host_network {
        notes.push("the client is in the host's network namespace: all processes there are one client".to_owned());
    }
    if client.cookie.is_none() {
        notes.push("network namespaces have no cookie before Linux 5.14, so clients are not told apart".to_owned());
    }
    notes
}
