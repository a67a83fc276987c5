//! Why a name is answered as it is.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

use serde::Serialize;

use super::{
    Found, Labels, Located, Zone,
    name::text,
    published::{Published, Records, label_of},
    qtype,
};
use crate::model::{Place, ServiceEntry};

/// Why a name is answered as it is, without the answer itself.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Explanation {
    pub subject: Subject,
    pub outcome: Outcome,
    /// `namespace/name` of the Services that the name is of, if they are known.
    pub services: Vec<String>,
    /// All endpoints of these Services, ordered by address, where the answer is made of endpoints; connections to a
    /// ClusterIP go to endpoints that DNS does not choose.
    pub endpoints: Vec<ExplainedEndpoint>,
}

/// What a name stands for, by its form.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// A name of another domain.
    Foreign,
    /// The cluster domain itself.
    Domain,
    /// The version of the schema.
    Version,
    /// This server.
    NameServer,
    /// An address, written as a pod's name; whether there is such a pod is not known.
    Pod,
    Service,
    /// A node, by its alias.
    Node,
    /// An endpoint of a Service, or what would be one.
    Endpoint,
    /// A port of a Service, or what would be one.
    Port,
    /// The reverse name of an address.
    Address,
    /// A name that only has others below it.
    Parent,
    /// Below the cluster domain, and of no known form.
    Nothing,
}

/// The sort of answer; see [`Found`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Foreign,
    NoSuchName,
    NoData,
    NotYet,
    Answers,
}

/// An endpoint, and whether it is in the answer.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct ExplainedEndpoint {
    pub ip: IpAddr,
    /// Its label below the Service.
    pub label: String,
    pub node: Option<String>,
    pub reason: EndpointReason,
}

/// Why an endpoint is in an answer, or not.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndpointReason {
    Ready,
    /// `publishNotReadyAddresses`: its readiness does not matter.
    Published,
    NotReady,
    Terminating,
    /// The name is that of another endpoint.
    OtherName,
    /// It does not have the port.
    OtherPort,
    /// Its address is not of the type asked for.
    OtherFamily,
}

impl EndpointReason {
    /// Whether the endpoint is in the answer.
    pub fn included(self) -> bool {
        match self {
            Self::Ready | Self::Published => true,
            Self::NotReady | Self::Terminating | Self::OtherName | Self::OtherPort | Self::OtherFamily => false,
        }
    }
}

impl fmt::Display for EndpointReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ready => "ready",
            Self::Published => "published, ready or not, as publishNotReadyAddresses says",
            Self::NotReady => "not ready",
            Self::Terminating => "terminating",
            Self::OtherName => "has another name",
            Self::OtherPort => "does not have the port",
            Self::OtherFamily => "has an address of the other family",
        })
    }
}

/// Which endpoints an answer is made of.
#[derive(Clone, Copy, Default)]
struct Selection<'a> {
    label: Option<&'a [u8]>,
    /// The index of the port that was asked for; None within, if there is no such port.
    port: Option<Option<usize>>,
    ip: Option<IpAddr>,
}

impl Zone {
    /// Tells why [`Zone::find`] answers as it does.
    pub fn explain(&self, name: &[u8], qtype: u16) -> Explanation {
        let outcome = match self.find(name, qtype) {
            Found::Foreign => Outcome::Foreign,
            Found::NoSuchName => Outcome::NoSuchName,
            Found::NoData => Outcome::NoData,
            Found::NotYet => Outcome::NotYet,
            Found::Answers(_) => Outcome::Answers,
        };
        let located = self.locate(name);
        let mut explanation =
            Explanation { subject: subject(&located), outcome, services: Vec::new(), endpoints: Vec::new() };
        if let Located::Reverse(owners) = located {
            // Those of one Service follow each other.
            for owners in owners.chunk_by(|a, b| Arc::ptr_eq(&a.service, &b.service)) {
                let Some(owner) = owners.first() else { continue };
                let selection = Selection { ip: Some(owner.ip), ..Selection::default() };
                explanation.add(&owner.service, owner.endpoint.is_some().then_some(selection), qtype);
            }
        } else if let Some(labels) = Labels::of(name)
            && let Some(count @ 3..=5) = labels.before(self.domain().as_wire())
            && labels.get(count - 1) == b"svc"
        {
            self.explain_service(&labels, count, qtype, &mut explanation);
        }
        explanation
    }

    /// The Service of a name is told, too, where the name itself is not published.
    fn explain_service(&self, labels: &Labels<'_>, count: usize, qtype: u16, explanation: &mut Explanation) {
        let first = labels.get(0);
        explanation.subject = match count {
            3 => Subject::Service,
            4 if first.starts_with(b"_") => Subject::Parent,
            4 => Subject::Endpoint,
            _ => Subject::Port,
        };
        let Some(service) = self.index.service(labels.wire(count - 3, count - 1)) else { return };
        let selection = Selection {
            label: (explanation.subject == Subject::Endpoint).then_some(first),
            port: (explanation.subject == Subject::Port).then(|| service.port(first, labels.get(1))),
            ip: None,
        };
        let by_endpoint = selection.label.is_some() || matches!(service.records, Records::Headless(_));
        explanation.add(service, by_endpoint.then_some(selection), qtype);
    }
}

impl Explanation {
    fn add(&mut self, service: &Published, selection: Option<Selection<'_>>, qtype: u16) {
        self.services.push(service.entry.service.name.to_string());
        if let Some(selection) = selection {
            self.endpoints.extend(endpoints(&service.entry, selection, qtype));
        }
    }
}

/// The sort of name it is, where that does not depend on a Service being known.
fn subject(located: &Located<'_>) -> Subject {
    match located {
        Located::Foreign => Subject::Foreign,
        Located::Nothing | Located::Unknown => Subject::Nothing,
        Located::Empty => Subject::Parent,
        Located::Apex => Subject::Domain,
        Located::Version => Subject::Version,
        Located::NameServer => Subject::NameServer,
        Located::Address(_) => Subject::Pod,
        Located::Service(_) => Subject::Service,
        Located::Node(_) => Subject::Node,
        Located::Endpoints(_) => Subject::Endpoint,
        Located::Port(..) => Subject::Port,
        Located::Reverse(_) | Located::OfNode(_) => Subject::Address,
    }
}

/// What is known of an endpoint over all ports.
struct Known<'a> {
    ready: bool,
    terminating: bool,
    place: &'a Arc<Place>,
    /// Indexes of the ports on which it is ready.
    ports: Vec<usize>,
}

/// All endpoints of a Service, each with the reason why it is in the answer, or not.
fn endpoints(entry: &ServiceEntry, selection: Selection<'_>, qtype: u16) -> Vec<ExplainedEndpoint> {
    let mut all: BTreeMap<IpAddr, Known<'_>> = BTreeMap::new();
    for (index, port) in entry.ports.iter().enumerate() {
        for endpoint in &port.endpoints {
            let ip = endpoint.target().unwrap_or(endpoint.addr).ip();
            let known = all.entry(ip).or_insert(Known {
                ready: false,
                terminating: endpoint.terminating,
                place: &endpoint.place,
                ports: Vec::new(),
            });
            if endpoint.ready {
                known.ready = true;
                known.ports.push(index);
            }
        }
    }
    for endpoint in &entry.portless {
        let (ready, terminating, place) = (endpoint.ready, endpoint.terminating, &endpoint.place);
        all.entry(endpoint.target().unwrap_or(endpoint.ip)).or_insert(Known {
            ready,
            terminating,
            place,
            ports: Vec::new(),
        });
    }
    let explained = all.into_iter().map(|(ip, known)| {
        let label = label_of(ip, known.place);
        let family_fits = match qtype {
            qtype::A => ip.is_ipv4(),
            qtype::AAAA => ip.is_ipv6(),
            _ => true,
        };
        let wrong_port = match (selection.port, qtype) {
            (Some(port), _) => port.is_none_or(|port| !known.ports.contains(&port)),
            (None, qtype::SRV) => known.ports.is_empty(),
            (None, _) => false,
        };
        let named = label.as_wire().get(1..).unwrap_or_default();
        let reason = match known {
            _ if selection.label.is_some_and(|label| label != named) => EndpointReason::OtherName,
            _ if selection.ip.is_some_and(|wanted| wanted != ip) => EndpointReason::OtherName,
            Known { ready: false, terminating: true, .. } => EndpointReason::Terminating,
            Known { ready: false, .. } => EndpointReason::NotReady,
            _ if wrong_port => EndpointReason::OtherPort,
            _ if !family_fits => EndpointReason::OtherFamily,
            _ if entry.service.publish_not_ready => EndpointReason::Published,
            _ => EndpointReason::Ready,
        };
        let node = known.place.node.as_deref().map(str::to_owned);
        ExplainedEndpoint { ip, label: text(label.as_wire()), node, reason }
    });
    explained.collect()
}
