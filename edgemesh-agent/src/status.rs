//! What the agent says of itself: the answers behind `status`, `services` and `backends`, as they go over the control
//! socket in JSON.

mod events;
mod trace;
mod tunnel;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
};

use serde::{Deserialize, Serialize};

pub use events::{EventLine, EventRow, Services};
pub use trace::{
    ClientRow, Crossing, Facts, FarOutcome, FarRow, KernelRow, KernelState, Outcome, ParseTargetError, PolicyRow,
    PortRef, Target, TraceReport, TracedEndpoint, TracedFrontend, Unresolved, trace,
};

pub use tunnel::{PeerRow, RelayRow, TunnelCounts, TunnelStatus};

use crate::{
    conditions::Condition,
    dataplane::{
        Count,
        ebpf::{InterfaceSight, probe::Standing},
    },
    dns::DnsStatus,
    health::CanaryStatus,
    kube::SourceStatus,
    model::{
        FrontendAddr, FrontendKind, Path, PortEndpoint, Service, ServiceEntry, ServiceKind, ServiceTable, Verdict,
    },
    net::Device,
    proxy::ProxyStatus,
    snapshot::SnapshotStatus,
    socks5,
};

/// The version of this build.
pub const VERSION: &str = env!("EDGEMESH_VERSION");

/// `edgemesh-agent status`.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    pub version: &'static str,
    pub node: String,
    pub uptime_seconds: u64,
    pub ready: bool,
    /// What readiness still waits for.
    pub waiting_for: Vec<&'static str>,
    pub source: SourceStatus,
    /// None where no snapshot is kept.
    pub snapshot: Option<SnapshotStatus>,
    /// None where `edgeProxy` is not enabled.
    pub dataplane: Option<DataplaneStatus>,
    /// None where DNS is not answered on this node.
    pub dns: Option<DnsStatus>,
    pub device: Option<Device>,
    /// None where `edgeTunnel` is not enabled.
    pub aliases: Option<AliasStatus>,
    /// None where `edgeTunnel` is not enabled.
    pub tunnel: Option<TunnelStatus>,
    /// None where `edgeProxy.socks5Proxy` is not enabled.
    pub socks5: Option<socks5::Status>,
    pub services: usize,
    pub frontends: usize,
    /// Eligible (frontend, backend) pairs.
    pub backends: usize,
    pub conditions: Vec<Condition>,
}

/// The data plane's part of [`Status`].
#[derive(Clone, Debug, Serialize)]
pub struct DataplaneStatus {
    pub kind: &'static str,
    /// The cgroup whose processes are served.
    pub cgroup: String,
    /// The tier, and what keeps it from a higher one.
    pub standing: Standing,
    /// None where the canary is switched off.
    pub canary: Option<CanaryStatus>,
    /// Frontends that an earlier agent left in force and this one took over.
    pub adopted_frontends: usize,
    /// Connected UDP sockets that were ended because their backend was gone.
    pub ended_udp_sockets: u64,
    /// The interfaces where packets are translated.
    pub interfaces: Vec<InterfaceSight>,
    /// How many packets were dropped there, by reason.
    pub dropped_packets: BTreeMap<&'static str, u64>,
    /// The generation of the table in force, and of the newest one.
    pub generation: u64,
    pub newest_generation: u64,
}

/// What is known of aliases, in [`Status`].
#[derive(Clone, Debug, Serialize)]
pub struct AliasStatus {
    /// Where they are from, for IPv4 and IPv6.
    pub ranges: [String; 2],
    /// Whether the kernel gives this agent what is sent to them.
    pub available: bool,
    /// How many stand for a pod, or a node.
    pub in_use: usize,
    pub proxy: ProxyStatus,
}

/// One row of `edgemesh-agent services`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ServiceRow {
    pub namespace: String,
    pub name: String,
    pub kind: String,
    pub frontends: Vec<FrontendRow>,
    /// `NAMESPACE/NAME` of the DestinationRule that counts for them.
    pub destination_rule: Option<String>,
    /// Why something of this Service is not served, or not as asked.
    pub notes: Vec<String>,
}

/// A frontend of a [`ServiceRow`].
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct FrontendRow {
    /// `10.96.0.1:80/TCP`.
    pub address: String,
    /// `ClusterIP`, `NodePort`, `LoadBalancer` or `ExternalIP`.
    pub kind: String,
    /// How many endpoints are eligible for sockets on this node.
    pub backends: usize,
    /// How many are for packets that arrive from outside, which externalTrafficPolicy may limit.
    pub external_backends: usize,
    /// The seconds for which a client's endpoint is remembered; None without session affinity.
    pub affinity_seconds: Option<u32>,
    /// How an endpoint is chosen: `random` or `source-ip`.
    pub balance: String,
    /// Whether the kernel has it: not yet for a moment after a change, not at all if a map is full.
    pub in_force: bool,
    pub counts: Counts,
}

/// What a frontend or backend has counted.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Counts {
    pub connects: u64,
    pub datagrams: u64,
    pub refused: u64,
}

/// `edgemesh-agent backends NS/NAME`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct BackendsReport {
    pub service: ServiceRow,
    pub ports: Vec<PortRow>,
}

/// A port of a [`BackendsReport`].
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct PortRow {
    pub name: String,
    pub port: u16,
    pub protocol: String,
    pub endpoints: Vec<EndpointRow>,
}

/// An endpoint of a [`PortRow`].
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct EndpointRow {
    pub address: SocketAddr,
    pub node: Option<String>,
    pub zone: Option<String>,
    /// For sockets on this node that connect to a ClusterIP.
    pub eligible: bool,
    /// Why it is or is not.
    pub reason: String,
    /// For sockets on this node that connect to a node port, external IP or load balancer's IP; None where the port
    /// has none of these.
    pub external: Option<VerdictRow>,
    /// For packets that arrive there from outside; None where the port has none of these.
    pub from_outside: Option<VerdictRow>,
    /// How it is reached; None without a tunnel.
    pub path: Option<PathRow>,
    pub counts: Counts,
}

/// How an endpoint is reached from this node, and why so.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PathRow {
    /// `local`, `direct`, `remote`, or `none` where it cannot be reached.
    pub way: String,
    /// The address of this node that stands for it.
    pub alias: Option<IpAddr>,
    pub reason: String,
}

impl From<&Path> for PathRow {
    fn from(path: &Path) -> Self {
        Self { way: path.way().to_string(), alias: path.alias, reason: path.reason.to_string() }
    }
}

impl PathRow {
    fn of(endpoint: &PortEndpoint) -> Option<Self> {
        endpoint.path.as_deref().map(Self::from)
    }
}

/// Whether an endpoint of an [`EndpointRow`] is eligible for other clients, and why.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct VerdictRow {
    pub eligible: bool,
    pub reason: String,
}

impl From<Verdict> for VerdictRow {
    fn from(verdict: Verdict) -> Self {
        Self { eligible: verdict.eligible(), reason: verdict.to_string() }
    }
}

impl Counts {
    fn add(&mut self, count: &Count) {
        self.connects += count.connects;
        self.datagrams += count.datagrams;
        self.refused += count.refused;
    }
}

/// The counters by frontend and, within it, by backend.
pub type CountsByFrontend = BTreeMap<FrontendAddr, BTreeMap<Option<SocketAddr>, Counts>>;

/// Sorts raw counters.
pub fn by_frontend(counts: &[Count]) -> CountsByFrontend {
    let mut sorted = CountsByFrontend::new();
    for count in counts {
        sorted.entry(count.frontend).or_default().entry(count.backend).or_default().add(count);
    }
    sorted
}

/// All counters of one frontend together.
pub fn total(counts: &CountsByFrontend, at: &FrontendAddr) -> Counts {
    let parts = counts.get(at).into_iter().flat_map(BTreeMap::values);
    parts.fold(Counts::default(), |sum, part| Counts {
        connects: sum.connects + part.connects,
        datagrams: sum.datagrams + part.datagrams,
        refused: sum.refused + part.refused,
    })
}

/// `services`: one row each, in order of names.
pub fn services(table: &ServiceTable, counts: &CountsByFrontend) -> Vec<ServiceRow> {
    table.services.iter().map(|entry| service_row(entry, counts)).collect()
}

/// `backends`: everything about one Service.
pub fn backends(entry: &ServiceEntry, counts: &CountsByFrontend) -> BackendsReport {
    let service = &entry.service;
    let ports = entry.ports.iter().enumerate().map(|(index, served)| {
        let frontends = || entry.frontends.iter().filter(move |frontend| frontend.port == index);
        let external = frontends().any(|frontend| frontend.kind != FrontendKind::ClusterIp);
        let endpoints = served.endpoints.iter().map(|endpoint| {
            let target = endpoint.target();
            let parts = frontends().filter_map(|f| counts.get(&f.at)?.get(&Some(target?)));
            let counts = parts.fold(Counts::default(), |sum, part| Counts {
                connects: sum.connects + part.connects,
                datagrams: sum.datagrams + part.datagrams,
                refused: sum.refused + part.refused,
            });
            let internal = endpoint.verdicts.under(service.internal_policy);
            EndpointRow {
                address: endpoint.addr,
                node: endpoint.place.node.as_deref().map(str::to_owned),
                zone: endpoint.place.zone.as_deref().map(str::to_owned),
                eligible: internal.eligible(),
                reason: internal.to_string(),
                external: external.then(|| endpoint.verdicts.cluster.into()),
                from_outside: external.then(|| endpoint.verdicts.under(service.external_policy).into()),
                path: PathRow::of(endpoint),
                counts,
            }
        });
        PortRow {
            name: served.port.name.to_string(),
            port: served.port.port.get(),
            protocol: served.port.protocol.to_string(),
            endpoints: endpoints.collect(),
        }
    });
    BackendsReport { service: service_row(entry, counts), ports: ports.collect() }
}

fn service_row(entry: &ServiceEntry, counts: &CountsByFrontend) -> ServiceRow {
    let frontends = entry.frontends.iter().map(|frontend| FrontendRow {
        address: frontend.at.to_string(),
        kind: frontend.kind.to_string(),
        backends: frontend.backends.len(),
        external_backends: frontend.external_backends.len(),
        affinity_seconds: frontend.affinity.map(NonZeroU32::get),
        balance: frontend.balance.to_string(),
        in_force: counts.contains_key(&frontend.at),
        counts: total(counts, &frontend.at),
    });
    ServiceRow {
        namespace: entry.service.name.namespace.to_string(),
        name: entry.service.name.name.to_string(),
        kind: kind_of(&entry.service).to_owned(),
        frontends: frontends.collect(),
        destination_rule: entry.rule.as_ref().map(|rule| rule.name.to_string()),
        notes: entry.notes.iter().map(ToString::to_string).collect(),
    }
}

fn kind_of(service: &Service) -> &'static str {
    match service.kind {
        ServiceKind::ClusterIp => "ClusterIP",
        ServiceKind::Headless => "Headless",
        ServiceKind::NodePort => "NodePort",
        ServiceKind::LoadBalancer => "LoadBalancer",
        ServiceKind::ExternalName => "ExternalName",
    }
}
