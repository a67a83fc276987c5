//! Istio DestinationRules: which of them says how connections to a Service are balanced.

use std::{
    borrow::Cow,
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    num::NonZeroU16,
    sync::Arc,
};

use super::{Balance, NamespacedName};

/// A networking.istio.io DestinationRule, reduced to what is used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DestinationRule {
    pub name: NamespacedName,
    /// `metadata.creationTimestamp` in seconds since the Unix epoch; None where it has none, as manifests do.
    pub created: Option<i64>,
    /// The Service that `spec.host` means; None where it means none of this cluster.
    pub host: Option<NamespacedName>,
    /// `spec.workloadSelector` limits the rule to some clients, so its policy is not for everybody: it says nothing.
    pub for_some_clients: bool,
    /// `spec.trafficPolicy.loadBalancer`.
    pub balance: Balance,
    /// `spec.trafficPolicy.portLevelSettings[].loadBalancer` by the number of the Service port.
    pub ports: BTreeMap<NonZeroU16, Balance>,
    /// What the rule asks for beyond that.
    pub ignored: Vec<Ignored>,
}

impl DestinationRule {
    /// A rule that asks for nothing.
    pub fn new(name: NamespacedName) -> Self {
        Self {
            name,
            created: None,
            host: None,
            for_some_clients: false,
            balance: Balance::default(),
            ports: BTreeMap::new(),
            ignored: Vec::new(),
        }
    }

    /// What it says for a Service port. The settings of a port stand alone: of those of the whole rule nothing is
    /// inherited (Istio's reference on `portLevelSettings`).
    pub fn balance_on(&self, port: NonZeroU16) -> Balance {
        match (self.for_some_clients, self.ports.get(&port)) {
            (true, _) => Balance::default(),
            (false, Some(&balance)) => balance,
            (false, None) => self.balance,
        }
    }
}

/// A field of a rule that has no effect here, though it is a legal one; prints as `FIELD (REASON)`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Ignored {
    /// Its path: `spec.trafficPolicy.connectionPool`.
    pub field: Box<str>,
    /// Why it has none.
    pub why: Cow<'static, str>,
}

impl fmt::Display for Ignored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.field, self.why)
    }
}

/// All rules, and which of them match a Service.
#[derive(Debug, Default)]
pub(super) struct Rules {
    rules: BTreeMap<NamespacedName, Arc<DestinationRule>>,
    /// The names of the rules whose host is a Service.
    by_host: HashMap<NamespacedName, BTreeSet<NamespacedName>>,
}

/// What is said about the balancing of one Service.
#[derive(Clone, Debug)]
pub(super) struct Ruling {
    /// The rule that counts.
    pub(super) rule: Arc<DestinationRule>,
    /// The next in order of those that match as well.
    pub(super) overruled: Option<NamespacedName>,
}

impl Rules {
    pub(super) fn names(&self) -> impl Iterator<Item = &NamespacedName> {
        self.rules.keys()
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &Arc<DestinationRule>> {
        self.rules.values()
    }

    /// Adds or replaces a rule, and marks the Services it matches or matched; says whether it is news.
    pub(super) fn put(&mut self, rule: Arc<DestinationRule>, dirty: &mut BTreeSet<NamespacedName>) -> bool {
        if self.rules.get(&rule.name).is_some_and(|known| *known == rule) {
            return false;
        }
        self.remove(&rule.name, dirty);
        dirty.insert(rule.name.clone());
        if let Some(host) = &rule.host {
            dirty.insert(host.clone());
            self.by_host.entry(host.clone()).or_default().insert(rule.name.clone());
        }
        self.rules.insert(rule.name.clone(), rule);
        true
    }

    /// Takes a rule away, and marks the Services it matched; says whether there was one.
    pub(super) fn remove(&mut self, name: &NamespacedName, dirty: &mut BTreeSet<NamespacedName>) -> bool {
        let Some(rule) = self.rules.remove(name) else { return false };
        dirty.insert(name.clone());
        let Some(host) = &rule.host else { return true };
        dirty.insert(host.clone());
        if let Some(names) = self.by_host.get_mut(host) {
            names.remove(name);
            if names.is_empty() {
                self.by_host.remove(host);
            }
        }
        true
    }

    /// The rule that counts for a Service, whatever the order in which rules came:
    ///
    /// 1. one for all clients, before one for some;
    /// 2. one in the Service's own namespace, before one that somebody in another namespace wrote;
    /// 3. one that names the Service by its host, before one that merely has its name;
    /// 4. the oldest, then the first by name.
    pub(super) fn of(&self, service: &NamespacedName) -> Option<Ruling> {
        let by_host = self.by_host.get(service).into_iter().flatten().filter_map(|name| self.rules.get(name));
        let by_name = self.rules.get(service).filter(|rule| rule.host.as_ref() != Some(service));
        let mut matching: Vec<&Arc<DestinationRule>> = by_host.chain(by_name).collect();
        matching.sort_unstable_by_key(|rule| {
            let near = rule.name.namespace == service.namespace;
            let hosted = rule.host.as_ref() == Some(service);
            // Rules without a time come after those with one.
            let age = (rule.created.is_none(), rule.created);
            (rule.for_some_clients, Reverse(near), Reverse(hosted), age, &rule.name)
        });
        let mut matching = matching.into_iter();
        let rule = Arc::clone(matching.next()?);
        Some(Ruling { rule, overruled: matching.next().map(|rule| rule.name.clone()) })
    }
}
