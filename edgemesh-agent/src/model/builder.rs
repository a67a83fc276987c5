//! Events in, tables out.

mod detours;
mod resolve;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Instant,
};

use smallvec::SmallVec;

use self::{
    detours::Detours,
    resolve::{Surroundings, resolve},
};
use super::{
    EndpointSet, Event, FrontendAddr, FrontendKind, Kind, KnownNode, NamespacedName, Node, Nodes, Note, Object, Place,
    Service, ServiceEntry, ServiceTable, Vantage, rule::Rules, shared::Shared,
};
use crate::{
    alias::{Book, Reach, Target},
    config::ServiceFilter,
};

/// Keeps what the source has delivered and resolves it into tables.
///
/// Only Services touched since the last table are resolved again; all others are shared with it.
#[derive(Debug, Default)]
pub struct Builder {
    filter: ServiceFilter,
    /// The name of this node.
    node: Box<str>,
    services: BTreeMap<NamespacedName, Arc<Service>>,
    slices: Sets,
    endpoints: Sets,
    nodes: Nodes,
    rules: Rules,
    places: Shared<Place>,
    labels: Shared<str>,
    /// Who answers on a frontend, and as what, for as long as somebody does.
    owners: HashMap<FrontendAddr, Claim>,
    /// Services that want a frontend another one has.
    waiting: HashMap<FrontendAddr, BTreeSet<NamespacedName>>,
    dirty: BTreeSet<NamespacedName>,
    /// Nodes touched since the last table, each as it was then.
    touched_nodes: HashMap<Box<str>, Touched>,
    /// None without a tunnel.
    detours: Option<Detours>,
    table: ServiceTable,
    synced: bool,
    revision: u64,
}

/// What of a Node matters to endpoints on it.
#[derive(Debug, Default, Eq, PartialEq)]
struct Touched {
    zone: Option<Box<str>>,
    addresses: Vec<IpAddr>,
}

impl Touched {
    fn of(node: Option<&Node>) -> Self {
        Self {
            zone: node.and_then(Node::zone).map(Box::from),
            addresses: node.map(|node| node.addresses.clone()).unwrap_or_default(),
        }
    }
}

/// A Service's wish for a frontend; of several, the first in order is granted.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Claim {
    kind: FrontendKind,
    service: NamespacedName,
}

impl Builder {
    /// A builder for the node of that name, as endpoints and Nodes spell it.
    pub fn new(filter: ServiceFilter, node: &str) -> Self {
        Self { filter, node: node.into(), ..Self::default() }
    }

    /// The same for a node with a tunnel: `reach` says which endpoints need it, and `book` has the aliases of those.
    #[must_use]
    pub fn with_detours(mut self, reach: Reach, book: Book) -> Self {
        let detours = Detours::new(reach, book);
        self.table.aliases = detours.book.aliases().clone();
        self.detours = Some(detours);
        self
    }

    /// The table as it was built last. Before the first one it has the aliases that an earlier agent gave out, to which
    /// the kernel may still send.
    pub fn last_table(&self) -> Arc<ServiceTable> {
        Arc::new(self.table.clone())
    }

    /// Says what time it is, for the aliases that are to rest for an hour; [`Builder::build`] knows no other clock.
    pub fn tell_time(&mut self, now: Instant) {
        if let Some(detours) = &mut self.detours
            && detours.book.advance(now)
        {
            detours.supply_nodes();
            self.dirty.extend(detours.wanting());
        }
    }

    /// Says that pods are reached otherwise than before: routes have changed, or the tunnel has met somebody.
    pub fn follow_reach(&mut self, change: impl FnOnce(Reach) -> Reach) {
        let Some(detours) = &mut self.detours else { return };
        detours.change(change);
        let touched = self.table.services.iter().filter(|entry| detours.differs(entry, &self.nodes));
        self.dirty.extend(touched.map(|entry| entry.service.name.clone()));
    }

    /// The aliases that must be known after a restart, and a number that counts up with their changes; None without a
    /// tunnel.
    pub fn kept_aliases(&self) -> Option<(u64, impl Iterator<Item = (IpAddr, Target)>)> {
        let book = &self.detours.as_ref()?.book;
        Some((book.revision(), book.entries()))
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
                    Kind::Node => {
                        let names = self.nodes.values().map(|node| &node.name);
                        names.filter(|name| !keep.contains(name)).cloned().collect()
                    }
                    Kind::DestinationRule => self.rules.names().filter(|name| !keep.contains(name)).cloned().collect(),
                };
                drop(keep);
                for name in gone {
                    self.remove(kind, &name);
                }
                for object in objects {
                    self.put(object);
                }
            }
            Event::Reached(..) => {}
            Event::Synced => self.synced = true,
        }
    }

    /// All objects of a kind, in no particular order; they are shared, not copied.
    pub fn objects(&self, kind: Kind) -> Vec<Object> {
        match kind {
            Kind::Service => self.services.values().cloned().map(Object::Service).collect(),
            Kind::EndpointSlice => self.slices.values().cloned().map(Object::EndpointSlice).collect(),
            Kind::Endpoints => self.endpoints.values().cloned().map(Object::Endpoints).collect(),
            Kind::Node => self.nodes.values().cloned().map(Object::Node).collect(),
            Kind::DestinationRule => self.rules.values().cloned().map(Object::DestinationRule).collect(),
        }
    }

    /// Counts up whenever [`Builder::objects`] would give something else, which not every event does: most of those about
    /// Nodes tell nothing new.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The table as of all events so far; None if nothing changed since the last one.
    pub fn build(&mut self) -> Option<Arc<ServiceTable>> {
        let nodes_touched = self.follow_nodes();
        let node_known = self.nodes.contains_key(&*self.node);
        let mut changed = self.synced != self.table.complete || node_known != self.table.node_known;
        while let Some(name) = self.dirty.pop_first() {
            changed |= self.refresh(&name);
        }
        // After the endpoints, which tell of nodes, too.
        let differ = self.detours.as_mut().is_some_and(Detours::nodes_differ);
        if nodes_touched || differ {
            let nodes = self.known_nodes();
            if nodes != *self.table.nodes {
                self.table.nodes = nodes.into();
                changed = true;
            }
            self.table.all_nodes = self.nodes.keys().any(|name| **name != *self.node);
        }
        if !changed {
            return None;
        }
        if let Some(detours) = &mut self.detours {
            if self.synced {
                detours.settle();
            }
            self.table.aliases = detours.book.aliases().clone();
            self.table.without_alias = detours.without_alias();
        }
        self.table.generation += 1;
        self.table.complete = self.synced;
        self.table.node_known = node_known;
        Some(Arc::new(self.table.clone()))
    }

    fn put(&mut self, mut object: Object) {
        self.places.share(&mut object);
        let news = match object {
            Object::Service(service) => self.put_service(service),
            Object::EndpointSlice(set) => self.slices.put(set, &mut self.dirty),
            Object::Endpoints(set) => self.endpoints.put(set, &mut self.dirty),
            Object::Node(node) => self.put_node(node),
            Object::DestinationRule(rule) => self.rules.put(rule, &mut self.dirty),
        };
        self.revision += u64::from(news);
    }

    fn put_service(&mut self, service: Arc<Service>) -> bool {
        let news = self.services.get(&service.name).is_none_or(|known| *known != service);
        if news {
            self.dirty.insert(service.name.clone());
            self.services.insert(service.name.clone(), service);
        }
        news
    }

    fn put_node(&mut self, mut node: Arc<Node>) -> bool {
        let known = self.nodes.get(&*node.name.name);
        if known == Some(&node) {
            return false;
        }
        touch(&mut self.touched_nodes, &node.name.name, known.map(|node| &**node));
        if let (None, Some(detours)) = (known, &mut self.detours) {
            detours.mention(&node.name.name);
        }
        for (key, value) in &mut Arc::make_mut(&mut node).labels {
            self.labels.one(key);
            self.labels.one(value);
        }
        self.nodes.insert(Arc::clone(&node.name.name), node);
        true
    }

    fn remove(&mut self, kind: Kind, name: &NamespacedName) {
        let known = match kind {
            Kind::Service => self.services.remove(name).map(|_| self.dirty.insert(name.clone())).is_some(),
            Kind::EndpointSlice => self.slices.remove(name, &mut self.dirty),
            Kind::Endpoints => self.endpoints.remove(name, &mut self.dirty),
            Kind::Node => {
                let known = self.nodes.remove(&*name.name);
                if let Some(known) = &known {
                    touch(&mut self.touched_nodes, &name.name, Some(known));
                    self.detours.iter_mut().for_each(|detours| detours.forget(&name.name));
                }
                known.is_some()
            }
            Kind::DestinationRule => self.rules.remove(name, &mut self.dirty),
        };
        self.revision += u64::from(known);
    }

    /// All nodes that are known, in order of their names. Without a tunnel these are the Node objects.
    fn known_nodes(&self) -> Vec<KnownNode> {
        let addresses = |name: &str| self.nodes.get(name).map_or(&[][..], |node| &node.addresses).into();
        match &self.detours {
            Some(detours) => detours
                .nodes()
                .map(|(name, aliases)| KnownNode {
                    name: Arc::clone(name),
                    addresses: addresses(name),
                    aliases: aliases.clone(),
                })
                .collect(),
            None => {
                let mut names: Vec<&Arc<str>> = self.nodes.keys().collect();
                names.sort_unstable();
                let known = |name: &Arc<str>| KnownNode {
                    name: Arc::clone(name),
                    addresses: addresses(name),
                    aliases: SmallVec::new(),
                };
                names.into_iter().map(known).collect()
            }
        }
    }

    /// Marks the Services that may look different since Nodes changed; says whether any have.
    fn follow_nodes(&mut self) -> bool {
        let touched = std::mem::take(&mut self.touched_nodes);
        if touched.is_empty() {
            return false;
        }
        if touched.contains_key(&self.node) {
            self.dirty.extend(self.services.keys().cloned());
            return true;
        }
        let moved = |node: &str| match touched.get(node) {
            Some(before) => before.zone.as_deref() != self.nodes.get(node).and_then(|node| node.zone()),
            None => false,
        };
        let any_moved = touched.keys().any(|node| moved(node));
        // Whether an endpoint is on the host network, its Node's addresses tell.
        let readdressed: HashSet<&str> = match &self.detours {
            Some(_) => {
                let now = |node: &str| self.nodes.get(node).map_or(&[][..], |node| &node.addresses);
                touched.iter().filter(|(node, before)| before.addresses != now(node)).map(|(node, _)| &**node).collect()
            }
            None => HashSet::new(),
        };
        for (name, service) in &self.services {
            let limited = service.within_node_group || !service.topology_keys.is_empty();
            let concerned = |set: &Arc<EndpointSet>| {
                let mut places =
                    set.subsets.iter().flat_map(|subset| &subset.endpoints).map(|endpoint| &endpoint.place);
                places.any(|place| {
                    let of = |is: &dyn Fn(&str) -> bool| place.node.as_deref().is_some_and(is);
                    (place.zone.is_none() && of(&moved)) || of(&|node| readdressed.contains(node))
                })
            };
            let look = any_moved || !readdressed.is_empty();
            if limited || (look && counting(&self.slices, &self.endpoints, name).iter().any(concerned)) {
                self.dirty.insert(name.clone());
            }
        }
        true
    }

    /// Resolves one Service into the table; says whether the table changed.
    fn refresh(&mut self, name: &NamespacedName) -> bool {
        let place = self.table.services.binary_search_by(|entry| entry.service.name.cmp(name));
        let known = place.ok().and_then(|place| self.table.services.get(place)).map(Arc::clone);
        let Some(service) = self.services.get(name) else {
            self.follow_detours(name, known.as_deref(), None);
            self.claim(name, BTreeMap::new());
            self.note_unheeded(name, None);
            return match place {
                Ok(place) => {
                    self.table.services.remove(place);
                    true
                }
                Err(_) => false,
            };
        };
        let sets = counting(&self.slices, &self.endpoints, name);
        let vantage = Vantage { name: &self.node, nodes: &self.nodes };
        let around = Surroundings {
            filter: self.filter,
            vantage,
            sets,
            ruling: self.rules.of(name),
            places: &mut self.places,
            detours: self.detours.as_mut(),
        };
        let mut entry = resolve(service, around);
        self.follow_detours(name, known.as_deref(), Some(&entry));
        let taken = self.claim(name, entry.frontends.iter().map(|frontend| (frontend.at, frontend.kind)).collect());
        entry.frontends.retain(|frontend| !taken.contains_key(&frontend.at));
        entry.notes.extend(taken.into_iter().map(|(at, by)| Note::Taken { at, by }));
        self.note_unheeded(name, Some(&entry));
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

    /// Keeps the count of aliases in step with an entry that takes the place of another: that of the new one is already
    /// counted.
    fn follow_detours(&mut self, name: &NamespacedName, old: Option<&ServiceEntry>, new: Option<&ServiceEntry>) {
        if let Some(detours) = &mut self.detours {
            if let Some(old) = old {
                detours.release(old);
            }
            detours.note_lack(name, new);
        }
    }

    /// Keeps [`ServiceTable::unheeded`] in step with one entry.
    fn note_unheeded(&mut self, name: &NamespacedName, entry: Option<&ServiceEntry>) {
        let rule = entry.and_then(|entry| entry.rule.as_ref()).filter(|rule| !rule.ignored.is_empty());
        let known = self.table.unheeded.get(name);
        if known != rule {
            let unheeded = Arc::make_mut(&mut self.table.unheeded);
            match rule {
                Some(rule) => unheeded.insert(name.clone(), Arc::clone(rule)),
                None => unheeded.remove(name),
            };
        }
    }

    /// Makes `name` the owner of the frontends it `wants` and gives up those it had; returns the ones that belong to
    /// others. Who owns a frontend does not depend on the order in which Services come.
    fn claim(
        &mut self,
        name: &NamespacedName,
        wants: BTreeMap<FrontendAddr, FrontendKind>,
    ) -> BTreeMap<FrontendAddr, NamespacedName> {
        let mut given_up = Vec::new();
        if let Ok(place) = self.table.services.binary_search_by(|entry| entry.service.name.cmp(name)) {
            let old = &self.table.services[place];
            given_up.extend(old.frontends.iter().map(|frontend| frontend.at));
            given_up.extend(old.notes.iter().filter_map(|note| match note {
                Note::Taken { at, .. } => Some(*at),
                Note::Filtered
                | Note::Sctp { .. }
                | Note::NodeUnknown
                | Note::Unheeded { .. }
                | Note::Overruled { .. } => None,
            }));
        }
        given_up.retain(|at| !wants.contains_key(at));
        for at in given_up {
            self.stop_waiting(name, at);
            if self.owners.get(&at).is_some_and(|owner| owner.service == *name) {
                self.owners.remove(&at);
                self.dirty.extend(self.waiting.get(&at).into_iter().flatten().cloned());
            }
        }
        let mut taken = BTreeMap::new();
        for (at, kind) in wants {
            let claim = Claim { kind, service: name.clone() };
            match self.owners.get(&at) {
                Some(owner) if *owner == claim => {}
                Some(owner) if owner.service != *name && *owner < claim => {
                    taken.insert(at, owner.service.clone());
                    self.waiting.entry(at).or_default().insert(name.clone());
                }
                // Nobody's yet, or that of a later claim: its owner and all who wait have a new one to look at.
                later => {
                    self.dirty.extend(later.map(|owner| owner.service.clone()).filter(|owner| owner != name));
                    self.owners.insert(at, claim);
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
}

/// Remembers what a Node was like when the last table was made.
fn touch(touched: &mut HashMap<Box<str>, Touched>, name: &str, known: Option<&Node>) {
    if !touched.contains_key(name) {
        touched.insert(name.into(), Touched::of(known));
    }
}

/// The endpoints that count for a Service: its slices, else its core/v1 Endpoints.
fn counting<'a>(slices: &'a Sets, endpoints: &'a Sets, service: &NamespacedName) -> &'a [Arc<EndpointSet>] {
    match slices.of(service) {
        [] => endpoints.of(service),
        slices => slices,
    }
}

/// The endpoint sets of one kind, by object and by Service.
#[derive(Debug, Default)]
struct Sets {
    service_of: HashMap<NamespacedName, NamespacedName>,
    by_service: HashMap<NamespacedName, Vec<Arc<EndpointSet>>>,
}

impl Sets {
    fn names(&self) -> impl Iterator<Item = &NamespacedName> {
        self.service_of.keys()
    }

    /// Ordered by object name, so that what is resolved from them does not depend on the order they came in.
    fn of(&self, service: &NamespacedName) -> &[Arc<EndpointSet>] {
        self.by_service.get(service).map_or(&[], Vec::as_slice)
    }

    fn values(&self) -> impl Iterator<Item = &Arc<EndpointSet>> {
        self.by_service.values().flatten()
    }

    /// Adds or replaces a set, and marks its Service; says whether it is news.
    fn put(&mut self, set: Arc<EndpointSet>, dirty: &mut BTreeSet<NamespacedName>) -> bool {
        if self.service_of.get(&set.name).is_some_and(|service| *service != set.service) {
            // Relabelled to another Service.
            self.remove(&set.name, dirty);
        }
        self.service_of.insert(set.name.clone(), set.service.clone());
        let sets = self.by_service.entry(set.service.clone()).or_default();
        let service = set.service.clone();
        match sets.binary_search_by(|other| other.name.cmp(&set.name)) {
            Ok(place) if sets[place] == set => return false,
            Ok(place) => sets[place] = set,
            Err(place) => sets.insert(place, set),
        }
        dirty.insert(service);
        true
    }

    /// Takes a set away, and marks its Service; says whether there was one.
    fn remove(&mut self, name: &NamespacedName, dirty: &mut BTreeSet<NamespacedName>) -> bool {
        let Some(service) = self.service_of.remove(name) else { return false };
        if let Some(sets) = self.by_service.get_mut(&service) {
            sets.retain(|set| set.name != *name);
            if sets.is_empty() {
                self.by_service.remove(&service);
            }
        }
        dirty.insert(service);
        true
    }
}

#[cfg(test)]
mod tests;
