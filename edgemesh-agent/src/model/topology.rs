//! Which endpoints clients are sent to from this node, and why not to the others.
//!
//! The rules are those of kube-proxy (`CategorizeEndpoints` in its pkg/proxy/topology.go), for one address family at a
//! time, as it runs once for each. What KubeEdge and SuperEdge put in front of kube-proxy, list filters that leave
//! endpoints out before it sees them, comes before them here too:
//!
//! 1. Limits, which hold even where nothing is left: KubeEdge's node group, SuperEdge's `topologyKeys`.
//! 2. Readiness: ready endpoints; where there are none, those that still serve while they terminate (KEP-1669).
//! 3. Under policy Cluster, hints: followed only if every ready endpoint has one and at least one names this node, or
//!    else this zone. Under policy Local, the node itself: what is on no other.
//!
//! kube-proxy leaves `trafficDistribution` to the controller that writes hints into slices. Where nobody wrote any, as
//! in core/v1 Endpoints, which have no place for them, the hints that controller would give are assumed.

use std::{collections::HashMap, fmt, sync::Arc};

use super::{Node, Place, PortEndpoint, Service, TrafficDistribution, TrafficPolicy};

/// All known Nodes by name.
pub type Nodes = HashMap<Arc<str>, Arc<Node>>;

/// Where clients are: this node among all others.
#[derive(Clone, Copy, Debug)]
pub struct Vantage<'a> {
    /// This node's name.
    pub name: &'a str,
    /// All Nodes; without this one among them no limit holds and no zone is near.
    pub nodes: &'a Nodes,
}

impl<'a> Vantage<'a> {
    /// This node's own object.
    pub fn node(&self) -> Option<&'a Node> {
        self.nodes.get(self.name).map(|node| &**node)
    }

    fn is_here(&self, place: &Place) -> bool {
        place.node.as_deref() == Some(self.name)
    }
}

/// Why an endpoint is or is not eligible for new connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    Ready,
    /// It still serves, and nothing is ready.
    ServingTerminating,
    NotReady,
    /// No longer serving.
    Terminating,
    /// It still serves, but others are ready.
    TerminatingUnneeded,
    /// Traffic policy Local.
    NotOnThisNode,
    /// Hints name other nodes.
    OtherNode,
    /// Hints name other zones.
    OtherZone,
    /// KubeEdge's node group; a node without one shares it with nobody.
    OtherNodeGroup,
    /// SuperEdge's `topologyKeys`.
    OtherTopologyKey,
    /// A limit asks for its node's labels, and it has no node or one that is not known.
    NodeUnknown,
}

impl Verdict {
    /// Whether new connections may go there.
    pub fn eligible(self) -> bool {
        match self {
            Self::Ready | Self::ServingTerminating => true,
            Self::NotReady
            | Self::Terminating
            | Self::TerminatingUnneeded
            | Self::NotOnThisNode
            | Self::OtherNode
            | Self::OtherZone
            | Self::OtherNodeGroup
            | Self::OtherTopologyKey
            | Self::NodeUnknown => false,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ready => "ready",
            Self::ServingTerminating => "terminating but still serving, and nothing is ready",
            Self::NotReady => "not ready",
            Self::Terminating => "terminating and no longer serving",
            Self::TerminatingUnneeded => "terminating, and others are ready",
            Self::NotOnThisNode => "not on this node, and the traffic policy is Local",
            Self::OtherNode => "meant for clients on other nodes, by its hints or trafficDistribution",
            Self::OtherZone => "meant for clients in other zones, by its hints or trafficDistribution",
            Self::OtherNodeGroup => "not in this node's group, to which the Service is limited",
            Self::OtherTopologyKey => "its node shares no value of the Service's topologyKeys with this one",
            Self::NodeUnknown => "its node is not known, and the Service is limited by labels of nodes",
        })
    }
}

/// The verdicts on one endpoint under both traffic policies.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Verdicts {
    pub cluster: Verdict,
    pub local: Verdict,
}

impl Verdicts {
    /// The one that counts under a policy.
    pub fn under(self, policy: TrafficPolicy) -> Verdict {
        match policy {
            TrafficPolicy::Cluster => self.cluster,
            TrafficPolicy::Local => self.local,
        }
    }
}

/// Gives the verdicts on all endpoints of one port, which must be ordered by address.
pub fn judge(service: &Service, endpoints: &mut [PortEndpoint], vantage: &Vantage<'_>) {
    // IPv4 orders before IPv6.
    let v6 = endpoints.partition_point(|endpoint| endpoint.addr.is_ipv4());
    let (v4, v6) = endpoints.split_at_mut(v6);
    for family in [v4, v6] {
        let verdicts = verdicts_of(service, family, vantage);
        for (endpoint, verdicts) in family.iter_mut().zip(verdicts) {
            endpoint.verdicts = verdicts;
        }
    }
}

fn verdicts_of(service: &Service, endpoints: &[PortEndpoint], vantage: &Vantage<'_>) -> Vec<Verdicts> {
    let refusals: Vec<Option<Verdict>> =
        endpoints.iter().map(|endpoint| refusal(service, &endpoint.place, vantage)).collect();
    let admitted = endpoints.iter().zip(&refusals).filter(|(_, refusal)| refusal.is_none());
    let ready: Vec<&PortEndpoint> = admitted.map(|(endpoint, _)| endpoint).filter(|endpoint| endpoint.ready).collect();
    let (any_ready, any_ready_here) =
        (!ready.is_empty(), ready.iter().any(|endpoint| vantage.is_here(&endpoint.place)));
    let hints = Hints { source: HintSource::of(service, endpoints), vantage };
    let preferred = hints.preferred(&ready);
    let verdicts = endpoints.iter().zip(&refusals).map(|(endpoint, refusal)| match *refusal {
        Some(refusal) => Verdicts { cluster: refusal, local: refusal },
        None => Verdicts {
            cluster: match preferred {
                Some(Near::Node) if endpoint.ready && hints.node(&endpoint.place) != Some(true) => Verdict::OtherNode,
                Some(Near::Zone) if endpoint.ready && hints.zone(&endpoint.place) != Some(true) => Verdict::OtherZone,
                Some(Near::Node | Near::Zone) | None => by_conditions(endpoint, any_ready),
            },
            local: if vantage.is_here(&endpoint.place) {
                by_conditions(endpoint, any_ready_here)
            } else {
                Verdict::NotOnThisNode
            },
        },
    });
    verdicts.collect()
}

fn by_conditions(endpoint: &PortEndpoint, any_ready: bool) -> Verdict {
    match (endpoint.ready, endpoint.terminating, endpoint.serving) {
        (true, ..) => Verdict::Ready,
        (false, true, true) if any_ready => Verdict::TerminatingUnneeded,
        (false, true, true) => Verdict::ServingTerminating,
        (false, true, false) => Verdict::Terminating,
        (false, false, _) => Verdict::NotReady,
    }
}

/// What the limits have against an endpoint.
///
/// While this node's own labels are not known, limits would cut the Service off wherever it goes; they do not hold then.
fn refusal(service: &Service, place: &Place, vantage: &Vantage<'_>) -> Option<Verdict> {
    let this = vantage.node()?;
    let other = || place.node.as_deref().and_then(|name| vantage.nodes.get(name));
    if service.within_node_group && !vantage.is_here(place) {
        match other() {
            None => return Some(Verdict::NodeUnknown),
            Some(other) if this.group().is_none() || this.group() != other.group() => {
                return Some(Verdict::OtherNodeGroup);
            }
            Some(_) => {}
        }
    }
    let keys = &service.topology_keys;
    if keys.is_empty() || keys.iter().any(|key| **key == *"*") {
        return None;
    }
    let Some(other) = other() else { return Some(Verdict::NodeUnknown) };
    let shares = |key: &str| this.label(key).is_some_and(|value| other.label(key) == Some(value));
    if keys.iter().any(|key| shares(key)) { None } else { Some(Verdict::OtherTopologyKey) }
}

/// How near the preferred endpoints are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Near {
    Node,
    Zone,
}

#[derive(Clone, Copy, Debug)]
enum HintSource {
    Slices,
    /// What the EndpointSlice controller writes for `trafficDistribution`: each endpoint's own node and zone.
    Distribution(TrafficDistribution),
}

impl HintSource {
    fn of(service: &Service, endpoints: &[PortEndpoint]) -> Self {
        let hinted = |place: &Place| !place.for_zones.is_empty() || !place.for_nodes.is_empty();
        match service.distribution {
            Some(distribution) if !endpoints.iter().any(|endpoint| hinted(&endpoint.place)) => {
                Self::Distribution(distribution)
            }
            Some(_) | None => Self::Slices,
        }
    }
}

struct Hints<'a> {
    source: HintSource,
    vantage: &'a Vantage<'a>,
}

impl Hints<'_> {
    fn preferred(&self, ready: &[&PortEndpoint]) -> Option<Near> {
        let usable = |hint: &dyn Fn(&Place) -> Option<bool>| {
            ready.iter().all(|endpoint| hint(&endpoint.place).is_some())
                && ready.iter().any(|endpoint| hint(&endpoint.place) == Some(true))
        };
        if usable(&|place| self.node(place)) {
            Some(Near::Node)
        } else if usable(&|place| self.zone(place)) {
            Some(Near::Zone)
        } else {
            None
        }
    }

    /// Whether the endpoint's hints name this node; None without node hints.
    fn node(&self, place: &Place) -> Option<bool> {
        match self.source {
            HintSource::Slices if place.for_nodes.is_empty() => None,
            HintSource::Slices => Some(place.for_nodes.iter().any(|name| **name == *self.vantage.name)),
            HintSource::Distribution(TrafficDistribution::SameNode) => {
                place.node.as_ref().map(|_| self.vantage.is_here(place))
            }
            HintSource::Distribution(TrafficDistribution::SameZone) => None,
        }
    }

    /// Whether the endpoint's hints name this node's zone; None without zone hints.
    fn zone(&self, place: &Place) -> Option<bool> {
        let this = self.vantage.node().and_then(Node::zone);
        match self.source {
            HintSource::Slices if place.for_zones.is_empty() => None,
            HintSource::Slices => Some(place.for_zones.iter().any(|zone| Some(&**zone) == this)),
            HintSource::Distribution(_) => place.zone.as_deref().map(|zone| Some(zone) == this),
        }
    }
}

#[cfg(test)]
mod tests;
