//! Where connections leave for other nodes, and what becomes of them there.

use std::{collections::BTreeSet, net::SocketAddr};

use serde::{Deserialize, Serialize};

use super::{Outcome, TraceReport};
use crate::{
    dataplane::{Choice, Share},
    model::{FrontendAddr, Path, Place, ServiceTable, Way},
    status::PeerRow,
};

/// Endpoints whose nodes are asked, at most.
const MOST: usize = 16;

/// An endpoint on another node that only the tunnel reaches, and what was found on the way there.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Crossing {
    pub node: String,
    /// Its address there.
    pub endpoint: SocketAddr,
    /// Where connections to it go on this node.
    pub alias: SocketAddr,
    /// The way that the tunnel takes now; None where there is none.
    pub path: Option<PeerRow>,
    pub far: FarRow,
}

/// What the agent of the node at the other end says of a [`Crossing`].
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct FarRow {
    pub outcome: FarOutcome,
    /// What refuses, or why there is no answer; of the system or of an agent, for people. May be empty.
    pub detail: String,
    /// Its rule that allows the endpoint; empty where none does.
    pub rule: String,
    /// `NAMESPACE/NAME` of Services that have it, as that node knows them; four at most.
    pub services: Vec<String>,
    /// How long the endpoint took to accept a connection, or to refuse it; None where none was tried.
    pub dial_micros: Option<u64>,
}

/// What becomes of a connection at the other end.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FarOutcome {
    /// The endpoint accepts.
    Connected,
    /// Datagrams are sent there, which is not tried.
    Allowed,
    /// The endpoint refuses.
    Refused,
    /// Its node does not reach it.
    Unreachable,
    /// It does not answer.
    TimedOut,
    /// Its node does not dial it for others.
    NotAllowed,
    /// A limit, there or here.
    Busy,
    /// No path leads to its node.
    NoPath,
    /// Its node does not answer.
    Silent,
    /// Its node runs an agent that knows no questions.
    TooOld,
    /// The two agents do not understand each other.
    Misunderstood,
    /// The tunnel is not running on this node.
    NoTunnel,
}

impl FarOutcome {
    /// Whether a connection is known to be lost.
    fn is_lost(self) -> bool {
        match self {
            Self::Connected | Self::Allowed | Self::Busy | Self::TooOld | Self::Misunderstood => false,
            Self::Refused
            | Self::Unreachable
            | Self::TimedOut
            | Self::NotAllowed
            | Self::NoPath
            | Self::Silent
            | Self::NoTunnel => true,
        }
    }
}

impl FarRow {
    /// One that says no more than this.
    pub fn of(outcome: FarOutcome, detail: &str) -> Self {
        Self { outcome, detail: detail.to_owned(), rule: String::new(), services: Vec::new(), dial_micros: None }
    }
}

impl Crossing {
    /// One of which nothing has been found out, as where there is no tunnel.
    pub fn new(node: &str, endpoint: SocketAddr, alias: SocketAddr) -> Self {
        Self { node: node.to_owned(), endpoint, alias, path: None, far: FarRow::of(FarOutcome::NoTunnel, "") }
    }

    fn to(table: &ServiceTable, alias: SocketAddr) -> Option<Self> {
        let target = table.aliases.target(alias.ip())?;
        Some(Self::new(&target.node, SocketAddr::new(target.addr, alias.port()), alias))
    }
}

impl TraceReport {
    /// Whether a connection gets to a backend, as far as is known: not where it would be lost behind the tunnel whichever
    /// backend it went to.
    pub fn arrives(&self) -> bool {
        let here = || self.endpoints.iter().any(|endpoint| endpoint.chance > 0.0 && !endpoint.is_remote());
        match self.outcome {
            Outcome::Refused | Outcome::Untouched => false,
            Outcome::Forwarded | Outcome::Carried => {
                let lost = self.crossings.iter().filter(|crossing| crossing.far.outcome.is_lost()).count();
                lost < self.crossings.len() + self.crossings_left_out || here()
            }
        }
    }
}

/// The endpoints in question that only the tunnel reaches, [`MOST`] at most, and how many more there are.
pub(super) fn of(
    table: &ServiceTable,
    at: &FrontendAddr,
    outcome: Outcome,
    shares: &[Share],
    choice: Option<Choice>,
) -> (Vec<Crossing>, usize) {
    let all = match (outcome, choice) {
        (Outcome::Forwarded, Some(choice)) => Crossing::to(table, choice.backend).into_iter().collect(),
        (Outcome::Forwarded, None) => {
            let possible = shares.iter().filter(|share| share.chance > 0.0);
            possible.filter_map(|share| Crossing::to(table, share.backend)).collect()
        }
        (Outcome::Carried, _) => Crossing::to(table, at.addr).into_iter().collect(),
        (Outcome::Untouched, _) => with_address(table, at),
        (Outcome::Refused, _) => Vec::new(),
    };
    // Better one endpoint of each node than all of one node.
    let mut nodes = BTreeSet::new();
    let (mut ordered, more): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|crossing: &Crossing| nodes.insert(crossing.node.clone()));
    ordered.extend(more);
    let left_out = ordered.len().saturating_sub(MOST);
    ordered.truncate(MOST);
    (ordered, left_out)
}

/// The endpoints on other nodes that have this address, unless one is reached at it.
fn with_address(table: &ServiceTable, at: &FrontendAddr) -> Vec<Crossing> {
    let mut found: Vec<Crossing> = Vec::new();
    let mut is_reached = false;
    let mut see = |path: Option<&Path>, place: &Place| match path.map_or(Way::Direct, Path::way) {
        Way::Local | Way::Direct => is_reached = true,
        Way::None => {}
        Way::Remote => {
            let alias = path.and_then(|path| path.target(at.addr));
            if let (Some(node), Some(alias)) = (&place.node, alias)
                && found.iter().all(|known| known.alias != alias)
            {
                found.push(Crossing::new(node, at.addr, alias));
            }
        }
    };
    for entry in &table.services {
        let served = entry.ports.iter().filter(|served| served.port.protocol == at.protocol);
        for endpoint in served.flat_map(|served| &served.endpoints).filter(|endpoint| endpoint.addr == at.addr) {
            see(endpoint.path.as_deref(), &endpoint.place);
        }
        for endpoint in entry.portless.iter().filter(|endpoint| endpoint.ip == at.addr.ip()) {
            see(endpoint.path.as_deref(), &endpoint.place);
        }
    }
    if is_reached { Vec::new() } else { found }
}
