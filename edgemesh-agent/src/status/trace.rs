//! `edgemesh-agent trace`: what becomes of a connection to one address, and why.

mod answer;
mod crossing;
mod notes;
mod target;
#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, net::SocketAddr, num::NonZeroU32};

use serde::{Deserialize, Serialize};

pub use crossing::{Crossing, FarOutcome, FarRow};
pub(super) use notes::owner;
pub use target::{ParseTargetError, PortRef, Target, Unresolved};

use super::PathRow;
use crate::{
    dataplane::{Choice, ChosenBy, InForce, Share},
    model::{
        Frontend, FrontendAddr, FrontendKind, PortEndpoint, ServedPort, ServiceEntry, ServiceTable,
        TrafficDistribution, TrafficPolicy, Verdict, Way,
    },
    net::client::{Client, Served},
};

/// `edgemesh-agent trace`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct TraceReport {
    /// `10.96.0.1:80/TCP`.
    pub address: String,
    pub outcome: Outcome,
    /// What a connection gets now, in a sentence.
    pub answer: String,
    /// None where the address is no frontend.
    pub frontend: Option<TracedFrontend>,
    pub kernel: KernelRow,
    /// All of the port's, eligible or not.
    pub endpoints: Vec<TracedEndpoint>,
    /// What is in store for the client that was asked for; None where it is left to chance.
    pub choice: Option<ChoiceRow>,
    /// Who was asked for.
    pub client: Option<ClientRow>,
    /// The endpoints in question that only the tunnel reaches, with what becomes of a connection on its way there.
    pub crossings: Vec<Crossing>,
    /// How many more there are, of which nobody was asked.
    pub crossings_left_out: usize,
    /// What else is to be known, each in a sentence.
    pub notes: Vec<String>,
}

/// What becomes of a connection that is made now.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It goes to a backend.
    Forwarded,
    /// The address is an alias: this agent takes the connection and carries it to a pod of another node.
    Carried,
    /// It fails at once, with ECONNREFUSED (EPERM before Linux 5.18).
    Refused,
    /// It goes on to the address itself.
    Untouched,
}

/// The frontend that a [`TraceReport`] is about.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct TracedFrontend {
    pub namespace: String,
    pub service: String,
    /// As in [`super::FrontendRow`].
    pub kind: String,
    /// The Service's port.
    pub port: u16,
    /// Empty where it has none.
    pub port_name: String,
    /// Where else the same port answers.
    pub also: Vec<String>,
    pub policy: PolicyRow,
}

/// Everything that has a say in which endpoints are eligible and which of them is taken.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PolicyRow {
    /// `Cluster` or `Local`.
    pub internal_traffic: String,
    pub external_traffic: String,
    /// `PreferSameZone` or `PreferSameNode`.
    pub distribution: Option<String>,
    /// Limited to the own node group (KubeEdge).
    pub within_node_group: bool,
    /// Limited by these labels of nodes (SuperEdge).
    pub topology_keys: Vec<String>,
    pub publish_not_ready: bool,
    /// The seconds for which a client's endpoint is remembered; None without session affinity.
    pub affinity_seconds: Option<u32>,
    /// `random` or `source-ip`.
    pub balance: String,
    /// `NAMESPACE/NAME` of the DestinationRule that says so; None without one.
    pub destination_rule: Option<String>,
}

/// What was read back from the kernel.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct KernelRow {
    pub state: KernelState,
    /// Eligible, and not in the kernel.
    pub missing: Vec<SocketAddr>,
    /// In the kernel, and not eligible.
    pub extra: Vec<SocketAddr>,
    /// Why it could not be read.
    pub error: Option<String>,
}

/// How the kernel agrees with the table.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelState {
    Same,
    /// A newer table is on its way into the kernel, or it does not fit.
    Different,
    /// It could not be read.
    Unknown,
    /// `edgeProxy` is not enabled.
    Off,
}

/// An endpoint of a [`TraceReport`].
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct TracedEndpoint {
    pub address: SocketAddr,
    pub node: Option<String>,
    pub zone: Option<String>,
    pub eligible: bool,
    /// Why it is or is not.
    pub reason: String,
    /// How it is reached; None without a tunnel.
    pub path: Option<PathRow>,
    /// Whether the kernel sends connections there, or to its alias; None where that is not known.
    pub in_kernel: Option<bool>,
    /// How likely a connection is to go there now, from 0 to 1.
    pub chance: f64,
}

impl TracedEndpoint {
    fn is_remote(&self) -> bool {
        self.path.as_ref().is_some_and(|path| path.way == Way::Remote.to_string())
    }

    /// Where the kernel is to send what is for it.
    fn target(&self) -> Option<SocketAddr> {
        match &self.path {
            Some(path) if self.is_remote() => path.alias.map(|alias| SocketAddr::new(alias, self.address.port())),
            Some(path) if path.way == Way::None.to_string() => None,
            Some(_) | None => Some(self.address),
        }
    }
}

/// The backend that the client's next connection gets.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ChoiceRow {
    pub backend: SocketAddr,
    /// `affinity`: it was there last; `hash`: by who it is.
    pub by: String,
    /// For how much longer it is kept there if it does not connect again; None where that has no end.
    pub kept_seconds: Option<u64>,
}

impl From<Choice> for ChoiceRow {
    fn from(choice: Choice) -> Self {
        let (by, kept_seconds) = match choice.by {
            ChosenBy::Affinity { left } => ("affinity", Some(left.as_secs())),
            ChosenBy::Hash => ("hash", None),
        };
        Self { backend: choice.backend, by: by.to_owned(), kept_seconds }
    }
}

/// Who was asked for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct ClientRow {
    /// As it was named.
    pub name: String,
    pub process: u32,
    pub command: String,
    /// Inode number and cookie of its network namespace.
    pub namespace: u64,
    pub cookie: Option<u64>,
    pub host_network: bool,
    pub cgroup: String,
    /// Whether its sockets are translated; None where that cannot be told.
    pub served: Option<bool>,
}

/// What a [`TraceReport`] is made from.
#[derive(Debug)]
pub struct Facts<'a> {
    pub table: &'a ServiceTable,
    pub at: FrontendAddr,
    /// None where `edgeProxy` is off.
    pub kernel: Option<Result<InForce, String>>,
    /// The cgroup whose processes are served.
    pub cgroup: String,
    /// How the client was named, and what it is.
    pub client: Option<(String, Client)>,
}

/// `trace`: everything about connections to one address.
pub fn trace(facts: Facts<'_>) -> TraceReport {
    let found = find(facts.table, &facts.at);
    let owner = owner(facts.table, &facts.at);
    let intended = match &found {
        Some(found) => InForce::Frontend { shares: equal_shares(&found.frontend.backends), choice: None },
        None if owner.is_some() => InForce::ServiceAddress,
        None => InForce::Nothing,
    };
    // To a pod, 127.0.0.1 is its own, whatever the host's means.
    let in_pod = facts.client.as_ref().is_some_and(|(_, client)| !client.host_network);
    let others = in_pod && facts.at.addr.ip().is_loopback();
    let intended = if others { InForce::Nothing } else { intended };
    let kernel = compare(&facts.kernel, &intended);
    let in_force = match &facts.kernel {
        Some(Ok(in_force)) => in_force,
        Some(Err(_)) => &intended,
        None => &InForce::Nothing,
    };
    let client = facts.client.as_ref().map(|(name, client)| client_row(name, client));
    let served = client.as_ref().is_none_or(|client| client.served != Some(false));
    let (shares, choice) = match in_force {
        InForce::Frontend { shares, choice } if served => (&shares[..], *choice),
        InForce::Frontend { .. } | InForce::ServiceAddress | InForce::Nothing => (&[][..], None),
    };
    let alias_of = |ip| facts.table.aliases.target(ip);
    // Whoever's sockets these are: it is the kernel's routes that lead there.
    let stands_for = alias_of(facts.at.addr.ip()).filter(|_| *in_force == InForce::Nothing);
    let outcome = match in_force {
        _ if stands_for.is_some() => Outcome::Carried,
        _ if !served => Outcome::Untouched,
        InForce::Frontend { .. } if !shares.is_empty() => Outcome::Forwarded,
        InForce::Frontend { .. } | InForce::ServiceAddress => Outcome::Refused,
        InForce::Nothing => Outcome::Untouched,
    };
    let certain = choice.map(|choice| choice.backend).or(match shares {
        [only] => Some(only.backend),
        _ => None,
    });
    let target = if outcome == Outcome::Carried { stands_for } else { certain.and_then(|at| alias_of(at.ip())) };
    let answer = answer::sentence(&answer::Grounds {
        outcome,
        in_force,
        shares,
        choice,
        affine: found.as_ref().is_some_and(|found| found.frontend.affinity.is_some()),
        target,
        owner: owner.as_ref(),
        client: client.as_ref().map(|_| served),
        own_loopback: others,
        is_off: kernel.state == KernelState::Off,
    });
    let mut notes = notes::of(facts.table, &facts.at, found.as_ref().map(|found| found.entry), &kernel, outcome);
    notes.extend(facts.client.iter().flat_map(|(_, client)| notes::of_client(client, &facts.cgroup)));
    let (crossings, crossings_left_out) = crossing::of(facts.table, &facts.at, outcome, shares, choice);
    TraceReport {
        address: facts.at.to_string(),
        outcome,
        answer,
        frontend: found.as_ref().map(Found::row),
        endpoints: endpoints(found.as_ref(), &facts.kernel, &kernel, shares, choice),
        kernel,
        choice: choice.map(ChoiceRow::from),
        client,
        crossings,
        crossings_left_out,
        notes,
    }
}

fn equal_shares(backends: &[SocketAddr]) -> Vec<Share> {
    let chance = 1.0 / backends.len() as f64;
    backends.iter().map(|backend| Share { backend: *backend, chance }).collect()
}

/// The port's endpoints, and what the kernel has beyond them.
fn endpoints(
    found: Option<&Found<'_>>,
    in_force: &Option<Result<InForce, String>>,
    kernel: &KernelRow,
    shares: &[Share],
    choice: Option<Choice>,
) -> Vec<TracedEndpoint> {
    let chance = |backend: &SocketAddr| match choice {
        Some(choice) => f64::from(u8::from(choice.backend == *backend)),
        None => shares.iter().find(|share| share.backend == *backend).map_or(0.0, |share| share.chance),
    };
    let in_kernel: Option<BTreeSet<SocketAddr>> = match in_force {
        Some(Ok(in_force)) => Some(backends_of(in_force)),
        Some(Err(_)) | None => None,
    };
    let mut endpoints: Vec<TracedEndpoint> = found.into_iter().flat_map(Found::endpoints).collect();
    for endpoint in &mut endpoints {
        let target = endpoint.target();
        endpoint.chance = target.map_or(0.0, |target| chance(&target));
        endpoint.in_kernel = in_kernel.as_ref().map(|there| target.is_some_and(|target| there.contains(&target)));
    }
    let known: BTreeSet<SocketAddr> = endpoints.iter().filter_map(TracedEndpoint::target).collect();
    let gone = kernel.extra.iter().filter(|extra| !known.contains(extra)).map(|address| TracedEndpoint {
        address: *address,
        node: None,
        zone: None,
        eligible: false,
        reason: "no endpoint of the Service any more".to_owned(),
        path: None,
        in_kernel: Some(true),
        chance: chance(address),
    });
    endpoints.extend(gone);
    endpoints
}

fn backends_of(in_force: &InForce) -> BTreeSet<SocketAddr> {
    match in_force {
        InForce::Frontend { shares, .. } => shares.iter().map(|share| share.backend).collect(),
        InForce::ServiceAddress | InForce::Nothing => BTreeSet::new(),
    }
}

/// A frontend in the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found<'a> {
    pub(super) entry: &'a ServiceEntry,
    frontend: &'a Frontend,
    served: &'a ServedPort,
}

pub(super) fn find<'a>(table: &'a ServiceTable, at: &FrontendAddr) -> Option<Found<'a>> {
    table.services.iter().find_map(|entry| {
        let frontend = entry.frontends.iter().find(|frontend| frontend.at == *at)?;
        Some(Found { entry, frontend, served: entry.ports.get(frontend.port)? })
    })
}

impl Found<'_> {
    fn row(&self) -> TracedFrontend {
        let service = &self.entry.service;
        let siblings = self.entry.frontends.iter().filter(|other| other.port == self.frontend.port);
        let also = siblings.filter(|other| other.at != self.frontend.at).map(|other| other.at.to_string());
        let policy = |policy: TrafficPolicy| match policy {
            TrafficPolicy::Cluster => "Cluster".to_owned(),
            TrafficPolicy::Local => "Local".to_owned(),
        };
        TracedFrontend {
            namespace: service.name.namespace.to_string(),
            service: service.name.name.to_string(),
            kind: self.frontend.kind.to_string(),
            port: self.served.port.port.get(),
            port_name: self.served.port.name.to_string(),
            also: also.collect(),
            policy: PolicyRow {
                internal_traffic: policy(service.internal_policy),
                external_traffic: policy(service.external_policy),
                distribution: service.distribution.map(|distribution| {
                    match distribution {
                        TrafficDistribution::SameZone => "PreferSameZone",
                        TrafficDistribution::SameNode => "PreferSameNode",
                    }
                    .to_owned()
                }),
                within_node_group: service.within_node_group,
                topology_keys: service.topology_keys.iter().map(ToString::to_string).collect(),
                publish_not_ready: service.publish_not_ready,
                affinity_seconds: self.frontend.affinity.map(NonZeroU32::get),
                balance: self.frontend.balance.to_string(),
                destination_rule: self.entry.rule.as_ref().map(|rule| rule.name.to_string()),
            },
        }
    }

    fn endpoints(&self) -> impl Iterator<Item = TracedEndpoint> {
        self.served.endpoints.iter().map(|endpoint| {
            let own_family = endpoint.addr.is_ipv4() == self.frontend.at.addr.is_ipv4();
            let verdict = self.verdict(endpoint);
            TracedEndpoint {
                address: endpoint.addr,
                node: endpoint.place.node.as_deref().map(str::to_owned),
                zone: endpoint.place.zone.as_deref().map(str::to_owned),
                eligible: own_family && verdict.eligible(),
                reason: if own_family { verdict.to_string() } else { "of the other address family".to_owned() },
                path: PathRow::of(endpoint),
                in_kernel: None,
                chance: 0.0,
            }
        })
    }

    /// What holds for sockets on this node, see [`Frontend::backends`].
    fn verdict(&self, endpoint: &PortEndpoint) -> Verdict {
        match self.frontend.kind {
            FrontendKind::ClusterIp => endpoint.verdicts.under(self.entry.service.internal_policy),
            FrontendKind::NodePort | FrontendKind::LoadBalancer | FrontendKind::ExternalIp => endpoint.verdicts.cluster,
        }
    }
}

fn compare(kernel: &Option<Result<InForce, String>>, intended: &InForce) -> KernelRow {
    let row = |state| KernelRow { state, missing: Vec::new(), extra: Vec::new(), error: None };
    match kernel {
        None => row(KernelState::Off),
        Some(Err(error)) => KernelRow { error: Some(error.clone()), ..row(KernelState::Unknown) },
        Some(Ok(in_force)) => {
            let (wanted, there) = (backends_of(intended), backends_of(in_force));
            let (missing, extra): (Vec<_>, Vec<_>) =
                (wanted.difference(&there).copied().collect(), there.difference(&wanted).copied().collect());
            let alike = std::mem::discriminant(in_force) == std::mem::discriminant(intended);
            let same = alike && missing.is_empty() && extra.is_empty();
            let state = if same { KernelState::Same } else { KernelState::Different };
            KernelRow { state, missing, extra, error: None }
        }
    }
}

fn client_row(name: &str, client: &Client) -> ClientRow {
    ClientRow {
        name: name.to_owned(),
        process: client.process,
        command: client.command.clone(),
        namespace: client.namespace,
        cookie: client.cookie,
        host_network: client.host_network,
        cgroup: client.cgroup.clone(),
        served: match client.served {
            Served::Yes => Some(true),
            Served::No => Some(false),
            Served::Unknown => None,
        },
    }
}
