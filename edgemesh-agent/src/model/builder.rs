//! Events in, tables out.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    EndpointSet, Event, Frontend, FrontendAddr, Kind, NamespacedName, Note, Object, PortEndpoint, Protocol, ServedPort,
    Service, ServiceEntry, ServiceKind, ServicePort, ServiceTable,
};
use crate::config::ServiceFilter;

/// Keeps what the source has delivered and resolves it into tables.
///
/// Only Services touched since the last table are resolved again; all others are shared with it.
#[derive(Debug, Default)]
pub struct Builder {
    filter: ServiceFilter,
    services: BTreeMap<NamespacedName, Service>,
    slices: Sets,
    endpoints: Sets,
    /// Who answers on a frontend, for as long as somebody does.
    owners: HashMap<FrontendAddr, NamespacedName>,
    /// Services that want a frontend another one has.
    waiting: HashMap<FrontendAddr, BTreeSet<NamespacedName>>,
    dirty: BTreeSet<NamespacedName>,
    table: ServiceTable,
    synced: bool,
}

impl Builder {
    pub fn new(filter: ServiceFilter) -> Self {
        Self { filter, ..Self::default() }
    }

    /// Takes one event; [`Builder::build`] shows its effect.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Apply(object) => self.put(object),
            Event::Delete(kind, name) => self.remove(kind, &name),
            Event::Replace(kind, objects) => {
                let keep: HashSet<&NamespacedName> = objects.iter().map(Object::name).collect();
                let gone: Vec<NamespacedName> = match kind {
                    Kind::Service => self.services.keys().filter(|name| !keep.contains(name)).cloned().collect(),
                    Kind::EndpointSlice => self.slices.names().filter(|name| !keep.contains(name)).cloned().collect(),
                    Kind::Endpoints => self.endpoints.names().filter(|name| !keep.contains(name)).cloned().collect(),
                };
                drop(keep);
                for name in gone {
                    self.remove(kind, &name);
                }
                for object in objects {
                    self.put(object);
                }
            }
            Event::Synced => self.synced = true,
        }
    }

    /// The table as of all events so far; None if nothing changed since the last one.
    pub fn build(&mut self) -> Option<Arc<ServiceTable>> {
        let mut changed = self.synced != self.table.complete;
        while let Some(name) = self.dirty.pop_first() {
            changed |= self.refresh(&name);
        }
        if !changed {
            return None;
        }
        self.table.generation += 1;
        self.table.complete = self.synced;
        Some(Arc::new(self.table.clone()))
    }

    fn put(&mut self, object: Object) {
        match object {
            Object::Service(service) => {
                if self.services.get(&service.name) != Some(&service) {
                    self.dirty.insert(service.name.clone());
                    self.services.insert(service.name.clone(), service);
                }
            }
            Object::EndpointSlice(set) => self.slices.put(set, &mut self.dirty),
            Object::Endpoints(set) => self.endpoints.put(set, &mut self.dirty),
        }
    }

    fn remove(&mut self, kind: Kind, name: &NamespacedName) {
        match kind {
            Kind::Service => {
                if self.services.remove(name).is_some() {
                    self.dirty.insert(name.clone());
                }
            }
            Kind::EndpointSlice => self.slices.remove(name, &mut self.dirty),
            Kind::Endpoints => self.endpoints.remove(name, &mut self.dirty),
        }
    }

    /// Resolves one Service into the table; says whether the table changed.
    fn refresh(&mut self, name: &NamespacedName) -> bool {
        let place = self.table.services.binary_search_by(|entry| entry.service.name.cmp(name));
        let Some(service) = self.services.get(name) else {
            self.claim(name, Vec::new());
            return match place {
                Ok(place) => {
                    self.table.services.remove(place);
                    true
                }
                Err(_) => false,
            };
        };
        let mut entry = self.resolve(service);
        let taken = self.claim(name, entry.frontends.iter().map(|frontend| frontend.at).collect());
        entry.frontends.retain(|frontend| !taken.contains_key(&frontend.at));
        entry.notes.extend(taken.into_iter().map(|(at, by)| Note::Taken { at, by }));
        match place {
            Ok(place) if *self.table.services[place] == entry => false,
            Ok(place) => {
                self.table.services[place] = Arc::new(entry);
                true
            }
            Err(place) => {
                self.table.services.insert(place, Arc::new(entry));
                true
            }
        }
    }

    /// Makes `name` the owner of the frontends it `wants` and gives up those it had; returns the ones that belong to
    /// others. Of several Services the first by name owns a frontend, whatever the order they came in.
    fn claim(&mut self, name: &NamespacedName, wants: Vec<FrontendAddr>) -> BTreeMap<FrontendAddr, NamespacedName> {
        let mut given_up = Vec::new();
        if let Ok(place) = self.table.services.binary_search_by(|entry| entry.service.name.cmp(name)) {
            let old = &self.table.services[place];
            given_up.extend(old.frontends.iter().map(|frontend| frontend.at));
            given_up.extend(old.notes.iter().filter_map(|note| match note {
                Note::Taken { at, .. } => Some(*at),
                Note::Filtered | Note::Sctp { .. } => None,
            }));
        }
        given_up.retain(|at| !wants.contains(at));
        for at in given_up {
            self.stop_waiting(name, at);
            if self.owners.get(&at) == Some(name) {
                self.owners.remove(&at);
                self.dirty.extend(self.waiting.get(&at).into_iter().flatten().cloned());
            }
        }
        let mut taken = BTreeMap::new();
        for at in wants {
            match self.owners.get(&at) {
                Some(owner) if owner < name => {
                    taken.insert(at, owner.clone());
                    self.waiting.entry(at).or_default().insert(name.clone());
                }
                Some(owner) if owner == name => {}
                // Nobody's yet, or that of a Service later by name: it and all who wait have a new owner to look at.
                later => {
                    self.dirty.extend(later.cloned());
                    self.owners.insert(at, name.clone());
                    self.stop_waiting(name, at);
                    self.dirty.extend(self.waiting.get(&at).into_iter().flatten().cloned());
                }
            }
        }
        taken
    }

    fn stop_waiting(&mut self, name: &NamespacedName, at: FrontendAddr) {
        if let Some(waiting) = self.waiting.get_mut(&at) {
            waiting.remove(name);
            if waiting.is_empty() {
                self.waiting.remove(&at);
            }
        }
    }

    fn resolve(&self, service: &Service) -> ServiceEntry {
        let mut notes = Vec::new();
        let labelled = service.proxy_labels.edgemesh;
        let wanted = match self.filter {
            ServiceFilter::UnlabelledOnly => !labelled,
            ServiceFilter::LabelledOnly => labelled,
        };
        if !wanted || service.proxy_labels.standard {
            notes.push(Note::Filtered);
        }
        let sets = match self.slices.of(&service.name) {
            [] => self.endpoints.of(&service.name),
            slices => slices,
        };
        let ports: Vec<ServedPort> = service
            .ports
            .iter()
            .map(|port| ServedPort { port: port.clone(), endpoints: endpoints_of(port, sets) })
            .collect();

        let mut frontends = Vec::new();
        for (index, served) in ports.iter().enumerate() {
            if served.port.protocol == Protocol::Sctp {
                notes.push(Note::Sctp { port: served.port.port.get() });
                continue;
            }
            if notes.contains(&Note::Filtered) {
                continue;
            }
            for ip in addresses(service) {
                let at =
                    FrontendAddr { addr: SocketAddr::new(ip, served.port.port.get()), protocol: served.port.protocol };
                if frontends.iter().any(|frontend: &Frontend| frontend.at == at) {
                    continue;
                }
                let backends = served
                    .endpoints
                    .iter()
                    .filter(|endpoint| endpoint.eligible && endpoint.addr.is_ipv4() == ip.is_ipv4())
                    .map(|endpoint| endpoint.addr)
                    .collect();
                frontends.push(Frontend { at, port: index, backends });
            }
        }
        ServiceEntry { service: service.clone(), ports, frontends, notes }
    }
}

/// The addresses that a Service answers on.
fn addresses(service: &Service) -> impl Iterator<Item = IpAddr> + '_ {
    let served = match service.kind {
        ServiceKind::ClusterIp | ServiceKind::NodePort | ServiceKind::LoadBalancer => true,
        ServiceKind::Headless | ServiceKind::ExternalName => false,
    };
    service.cluster_ips.iter().copied().filter(move |_| served)
}

/// All endpoints of a port, merged over the sets, with the eligible ones marked.
///
/// Within a family, ready endpoints are eligible; if there is none, those that still serve while they terminate
/// (KEP-1669).
fn endpoints_of(port: &ServicePort, sets: &[EndpointSet]) -> Vec<PortEndpoint> {
    let mut merged: BTreeMap<SocketAddr, PortEndpoint> = BTreeMap::new();
    for subset in sets.iter().flat_map(|set| &set.subsets) {
        let matching = subset.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
        for target in matching {
            for endpoint in &subset.endpoints {
                let found = PortEndpoint {
                    addr: SocketAddr::new(endpoint.address, target.port.get()),
                    ready: endpoint.ready,
                    serving: endpoint.serving,
                    terminating: endpoint.terminating,
                    node: endpoint.node.clone(),
                    zone: endpoint.zone.clone(),
                    eligible: false,
                };
                // While a pod moves between slices it may be in both; the better word about it counts.
                match merged.get(&found.addr) {
                    Some(known) if rank(known) >= rank(&found) => {}
                    Some(_) | None => {
                        merged.insert(found.addr, found);
                    }
                }
            }
        }
    }
    let mut endpoints: Vec<PortEndpoint> = merged.into_values().collect();
    for v4 in [true, false] {
        let family = |endpoint: &PortEndpoint| endpoint.addr.is_ipv4() == v4;
        let any_ready = endpoints.iter().any(|endpoint| family(endpoint) && endpoint.ready);
        for endpoint in endpoints.iter_mut().filter(|endpoint| family(endpoint)) {
            endpoint.eligible = if any_ready { endpoint.ready } else { endpoint.serving && endpoint.terminating };
        }
    }
    endpoints
}

fn rank(endpoint: &PortEndpoint) -> u8 {
    match (endpoint.ready, endpoint.serving) {
        (true, _) => 2,
        (false, true) => 1,
        (false, false) => 0,
    }
}

/// The endpoint sets of one kind, by object and by Service.
#[derive(Debug, Default)]
struct Sets {
    service_of: HashMap<NamespacedName, NamespacedName>,
    by_service: HashMap<NamespacedName, Vec<EndpointSet>>,
}

impl Sets {
    fn names(&self) -> impl Iterator<Item = &NamespacedName> {
        self.service_of.keys()
    }

    /// Ordered by object name, so that what is resolved from them does not depend on the order they came in.
    fn of(&self, service: &NamespacedName) -> &[EndpointSet] {
        self.by_service.get(service).map_or(&[], Vec::as_slice)
    }

    fn put(&mut self, set: EndpointSet, dirty: &mut BTreeSet<NamespacedName>) {
        if self.service_of.get(&set.name).is_some_and(|service| *service != set.service) {
            // Relabelled to another Service.
            self.remove(&set.name, dirty);
        }
        self.service_of.insert(set.name.clone(), set.service.clone());
        let sets = self.by_service.entry(set.service.clone()).or_default();
        let service = set.service.clone();
        match sets.binary_search_by(|other| other.name.cmp(&set.name)) {
            Ok(place) if sets[place] == set => return,
            Ok(place) => sets[place] = set,
            Err(place) => sets.insert(place, set),
        }
        dirty.insert(service);
    }

    fn remove(&mut self, name: &NamespacedName, dirty: &mut BTreeSet<NamespacedName>) {
        let Some(service) = self.service_of.remove(name) else { return };
        if let Some(sets) = self.by_service.get_mut(&service) {
            sets.retain(|set| set.name != *name);
            if sets.is_empty() {
                self.by_service.remove(&service);
            }
        }
        dirty.insert(service);
    }
}

#[cfg(test)]
mod tests;
