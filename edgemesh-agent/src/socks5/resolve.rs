//! From what a client asks for to the ways there: pure, no IO and no clock.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    Failure,
    wire::{Destination, Host},
};
use crate::{
    alias::{AliasRanges, NODE_ITSELF},
    dataplane::choice_of,
    dns::zone::{ClusterDomain, Data, Found, Zone, wire_name},
    model::{Balance, Frontend, FrontendKind, Path, Place, Protocol, ServiceEntry, ServiceTable, Way},
    proxy::Refusal,
};

/// So many ways are tried one after the other.
const MOST: usize = 4;
/// So many aliases of one name for the next are followed.
const MAX_ALIASES: usize = 8;
/// The record types of addresses.
const ADDRESSES: [u16; 2] = [1, 28];

/// How to get there.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub(super) enum Route {
    /// By the agent of the node; the address as in [`crate::alias::Target::addr`].
    Via { node: Arc<str>, addr: SocketAddr },
    /// By this node's own routes.
    Direct(SocketAddr),
}

/// Who asks, and what for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Question<'a> {
    pub(super) destination: &'a Destination,
    pub(super) protocol: Protocol,
    pub(super) client: IpAddr,
    /// Chooses where there is a choice.
    pub(super) random: u32,
}

/// What is known at the moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known<'a> {
    pub(super) table: &'a ServiceTable,
    /// None before the first one.
    pub(super) zone: Option<&'a Zone>,
    pub(super) domain: &'a ClusterDomain,
    pub(super) ranges: AliasRanges,
    /// This node.
    pub(super) node: &'a str,
}

impl Known<'_> {
    /// The ways to a destination, the best first; never none.
    ///
    /// Costs a pass over all Services, which with 10,000 of them takes a millisecond.
    pub(super) fn routes(&self, question: &Question<'_>) -> Result<Vec<Route>, Failure> {
        match &question.destination.host {
            _ if question.destination.port == 0 => Err(Refusal::Failed("nothing is at port 0".to_owned()).into()),
            Host::Nonsense => Err(Failure::UnknownHost),
            Host::Ip(ip) => self.by_address(*ip, question).map(|route| vec![route]),
            Host::Name(name) => self.by_name(name, question),
        }
    }

    fn by_name(&self, name: &str, question: &Question<'_>) -> Result<Vec<Route>, Failure> {
        let domain = self.domain.to_string();
        let within = name.strip_suffix(&*domain).and_then(|name| name.strip_suffix('.'));
        let below_node = within.unwrap_or(name).strip_suffix(".node");
        if let Some(node) = [Some(name), below_node].into_iter().flatten().find_map(|name| self.table.node(name)) {
            return Ok(vec![itself(&node.name, question)]);
        }
        let mut not_yet = !self.table.complete;
        if below_node.is_none() {
            let found = self.look_up(name, within.is_some(), &domain, question)?;
            let (addresses, later) = found;
            not_yet |= later;
            if !addresses.is_empty() {
                return self.by_addresses(&addresses, question);
            }
        }
        // Where the source does not tell of all nodes, the tunnel may know better.
        let perhaps = below_node.or_else(|| Some(name).filter(|name| !name.contains('.')));
        match perhaps {
            Some(node) if !self.table.all_nodes => Ok(vec![itself(&node.into(), question)]),
            _ if not_yet => Err(Failure::NotKnownYet),
            None if within.is_none() => Err(Failure::Outside),
            Some(_) | None => Err(Failure::UnknownHost),
        }
    }

    /// The addresses of a name, as written or as the search lists of pods would complete it, less the namespace; and whether
    /// there may be some later.
    fn look_up(
        &self,
        name: &str,
        is_full: bool,
        domain: &str,
        question: &Question<'_>,
    ) -> Result<(Vec<IpAddr>, bool), Failure> {
        let Some(zone) = self.zone else { return Ok((Vec::new(), true)) };
        let candidates = match is_full {
            true => vec![name.to_owned()],
            false => vec![format!("{name}.{domain}"), format!("{name}.svc.{domain}")],
        };
        let mut later = false;
        for candidate in candidates {
            let mut addresses = Vec::new();
            for kind in ADDRESSES {
                match addresses_of(zone, &candidate, kind, question.random) {
                    Looked::Addresses(found) => addresses.extend(found),
                    Looked::Nothing => {}
                    Looked::Later => later = true,
                    Looked::Outside => return Err(Failure::Outside),
                }
            }
            if !addresses.is_empty() {
                return Ok((addresses, false));
            }
        }
        Ok((Vec::new(), later))
    }

    /// The ways to the first of them that there are ways to.
    fn by_addresses(&self, addresses: &[IpAddr], question: &Question<'_>) -> Result<Vec<Route>, Failure> {
        let (mut routes, mut failure) = (Vec::new(), Failure::UnknownHost);
        for ip in addresses {
            match self.by_address(*ip, question) {
                Ok(route) => routes.push(route),
                Err(error) => failure = error,
            }
            if routes.len() == MOST {
                break;
            }
        }
        if routes.is_empty() { Err(failure) } else { Ok(routes) }
    }

    fn by_address(&self, ip: IpAddr, question: &Question<'_>) -> Result<Route, Failure> {
        let at = SocketAddr::new(ip, question.destination.port);
        if self.ranges.contains(ip) {
            return self.by_alias(at);
        }
        if let Some(backend) = self.frontend(at, question)? {
            return if self.ranges.contains(backend.ip()) {
                self.by_alias(backend)
            } else {
                Ok(Route::Direct(backend))
            };
        }
        if let Some(route) = self.endpoint(at, question.protocol)? {
            return Ok(route);
        }
        self.node_at(ip, question)
    }

    fn by_alias(&self, alias: SocketAddr) -> Result<Route, Failure> {
        let target = self.table.aliases.target(alias.ip()).ok_or(Failure::Refused(Refusal::NoSuchAlias))?;
        Ok(Route::Via { node: Arc::clone(&target.node), addr: SocketAddr::new(target.addr, alias.port()) })
    }

    /// The backend for an address that a Service answers on, chosen as the data plane does: its programs leave the agent's
    /// own connections alone. None where it is no Service's.
    fn frontend(&self, at: SocketAddr, question: &Question<'_>) -> Result<Option<SocketAddr>, Failure> {
        let mut is_service = false;
        for entry in &self.table.services {
            for frontend in &entry.frontends {
                if frontend.host_only() || frontend.at.addr.ip() != at.ip() {
                    continue;
                }
                if frontend.at.addr == at && frontend.at.protocol == question.protocol {
                    return choose(frontend, question).map(Some).ok_or(Failure::Refused(Refusal::Refused));
                }
                is_service |= frontend.kind != FrontendKind::NodePort;
            }
        }
        if is_service { Err(Refusal::Refused.into()) } else { Ok(None) }
    }

    /// The way to an endpoint of a Service at its own address. Sites repeat addresses: of this node's come first, then those
    /// that a route leads to.
    fn endpoint(&self, at: SocketAddr, protocol: Protocol) -> Result<Option<Route>, Failure> {
        let mut best: Option<(Way, Route)> = None;
        let mut remote: Vec<Arc<str>> = Vec::new();
        let mut see = |path: Option<&Path>, place: &Place| match path.map_or(Way::Direct, Path::way) {
            way @ (Way::Local | Way::Direct) => {
                if best.as_ref().is_none_or(|(known, _)| (*known, way) == (Way::Direct, Way::Local)) {
                    best = Some((way, Route::Direct(at)));
                }
            }
            Way::None => {}
            Way::Remote => {
                if let Some(node) = &place.node
                    && !remote.iter().any(|known| **known == **node)
                {
                    remote.push((**node).into());
                }
            }
        };
        let is_node = self.table.nodes.iter().any(|node| node.addresses.contains(&at.ip()));
        for entry in &self.table.services {
            for endpoint in with_address(entry, at, protocol) {
                see(endpoint.path.as_deref(), &endpoint.place);
            }
            // Without a port of its own, a pod on the host network would stand for all that listens on its node.
            for endpoint in entry.portless.iter().filter(|endpoint| endpoint.ip == at.ip() && !is_node) {
                see(endpoint.path.as_deref(), &endpoint.place);
            }
        }
        match (best, &remote[..]) {
            (Some((_, route)), _) => Ok(Some(route)),
            (None, []) => Ok(None),
            (None, [node]) => Ok(Some(Route::Via { node: Arc::clone(node), addr: at })),
            (None, several) => Err(Failure::Ambiguous(several.len())),
        }
    }

    /// The way to a node by one of its addresses.
    fn node_at(&self, ip: IpAddr, question: &Question<'_>) -> Result<Route, Failure> {
        let mut nodes = self.table.nodes.iter().filter(|node| node.addresses.contains(&ip));
        match (nodes.clone().find(|node| *node.name == *self.node), nodes.next(), nodes.count()) {
            (Some(node), ..) | (None, Some(node), 0) => Ok(itself(&node.name, question)),
            (None, Some(_), others) => Err(Failure::Ambiguous(1 + others)),
            (None, None, _) if self.table.complete => Err(Failure::Outside),
            (None, None, _) => Err(Failure::NotKnownYet),
        }
    }
}

fn itself(node: &Arc<str>, question: &Question<'_>) -> Route {
    Route::Via { node: Arc::clone(node), addr: SocketAddr::new(NODE_ITSELF[0], question.destination.port) }
}

fn with_address(
    entry: &ServiceEntry,
    at: SocketAddr,
    protocol: Protocol,
) -> impl Iterator<Item = &crate::model::PortEndpoint> {
    let served = entry.ports.iter().filter(move |served| served.port.protocol == protocol);
    served.flat_map(|served| &served.endpoints).filter(move |endpoint| endpoint.addr == at)
}

/// One of the backends. The data plane remembers clients for session affinity; here a client's address decides, which
/// keeps it at one backend for as long as that is there.
fn choose(frontend: &Frontend, question: &Question<'_>) -> Option<SocketAddr> {
    let by_client = frontend.affinity.is_some() || frontend.balance == Balance::SourceIp;
    let index = if by_client {
        choice_of(question.client.into(), &frontend.backends)?
    } else {
        scale(question.random, frontend.backends.len())
    };
    frontend.backends.get(index).copied()
}

/// Maps a random number to `0..count`.
fn scale(random: u32, count: usize) -> usize {
    ((u128::from(random) * count as u128) >> 32) as usize
}

enum Looked {
    Addresses(Vec<IpAddr>),
    Nothing,
    Later,
    /// An alias of a name of another domain.
    Outside,
}

/// A few addresses of a name, of one type.
fn addresses_of(zone: &Zone, name: &str, kind: u16, random: u32) -> Looked {
    let Some(mut name) = wire_name(name) else { return Looked::Nothing };
    for alias in 0..MAX_ALIASES {
        let answers = match zone.find(&name, kind) {
            Found::Foreign if alias > 0 => return Looked::Outside,
            Found::Foreign | Found::NoSuchName | Found::NoData => return Looked::Nothing,
            Found::NotYet => return Looked::Later,
            Found::Answers(answers) => answers,
        };
        let mut addresses = Vec::new();
        let mut next = None;
        for record in answers.turned(usize::try_from(random).unwrap_or_default()).take(MOST) {
            match record.data {
                Data::A(ip) => addresses.push(ip.into()),
                Data::Aaaa(ip) => addresses.push(ip.into()),
                // The target is all in its second part.
                Data::Cname(target) => next = Some(target.rest().into()),
                Data::Srv { .. } | Data::Ptr(_) | Data::Txt(_) | Data::Soa(_) | Data::Ns(_) => {}
            }
        }
        match next {
            Some(target) => name = target,
            None => return Looked::Addresses(addresses),
        }
    }
    Looked::Nothing
}

#[cfg(test)]
mod tests;
