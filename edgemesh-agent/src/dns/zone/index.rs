//! Services by name and by address, so that a change costs a small part of them.

use std::{
    borrow::Borrow,
    collections::{HashMap, HashSet},
    hash::{BuildHasher, Hash, Hasher, RandomState},
    net::IpAddr,
    sync::Arc,
};

use super::published::Published;

/// With 10,000 Services, a change copies the pointers to 40 of them.
const SHARDS: usize = 256;

/// All that is published. A clone shares everything, and a change copies the shards concerned.
#[derive(Clone, Debug)]
pub(super) struct Index {
    hasher: RandomState,
    services: Vec<Arc<HashSet<ByKey>>>,
    /// Each ordered by address; for one address, ClusterIPs first.
    reverse: Vec<Arc<Vec<Reverse>>>,
    /// How many Services are published in each namespace.
    namespaces: Arc<HashMap<Box<[u8]>, usize>>,
}

/// A Service that is found by [`Published::key`].
#[derive(Clone, Debug)]
struct ByKey(Arc<Published>);

/// Who an address belongs to.
#[derive(Clone, Debug)]
pub(super) struct Reverse {
    pub(super) ip: IpAddr,
    /// Index of the endpoint; None for a ClusterIP.
    pub(super) endpoint: Option<u32>,
    pub(super) service: Arc<Published>,
}

impl Default for Index {
    fn default() -> Self {
        Self {
            hasher: RandomState::new(),
            services: vec![Arc::default(); SHARDS],
            reverse: vec![Arc::default(); SHARDS],
            namespaces: Arc::default(),
        }
    }
}

impl Index {
    /// The Service with the key (service and namespace in wire form).
    pub(super) fn service(&self, key: &[u8]) -> Option<&Arc<Published>> {
        self.services.get(self.shard(key))?.get(key).map(|found| &found.0)
    }

    /// Whether anything is published in the namespace (one label in wire form).
    pub(super) fn has_namespace(&self, namespace: &[u8]) -> bool {
        self.namespaces.contains_key(namespace)
    }

    /// Who has the address. Of those that have it as their ClusterIP and those that have an endpoint there, only the
    /// former count, as in CoreDNS (serviceRecordForIP).
    pub(super) fn reverse(&self, ip: IpAddr) -> &[Reverse] {
        let Some(shard) = self.reverse.get(self.shard(&ip)) else { return &[] };
        let from = shard.get(shard.partition_point(|record| record.ip < ip)..).unwrap_or_default();
        let is_cluster_ip = from.first().is_some_and(|record| record.endpoint.is_none());
        let count = from.partition_point(|record| record.ip == ip && record.endpoint.is_none() == is_cluster_ip);
        from.get(..count).unwrap_or_default()
    }

    /// Takes Services out and puts others in.
    pub(super) fn change(&mut self, gone: &[Arc<Published>], new: &[Arc<Published>]) {
        for service in gone {
            let shard = self.shard(service.key());
            if let Some(shard) = self.services.get_mut(shard) {
                Arc::make_mut(shard).remove(service.key());
            }
        }
        for service in new {
            let shard = self.shard(service.key());
            if let Some(shard) = self.services.get_mut(shard) {
                Arc::make_mut(shard).insert(ByKey(Arc::clone(service)));
            }
        }
        self.change_namespaces(gone, new);
        self.change_reverse(gone, new);
    }

    fn change_namespaces(&mut self, gone: &[Arc<Published>], new: &[Arc<Published>]) {
        let mut differences: HashMap<&[u8], (usize, usize)> = HashMap::new();
        for service in gone {
            differences.entry(service.namespace()).or_default().0 += 1;
        }
        for service in new {
            differences.entry(service.namespace()).or_default().1 += 1;
        }
        for (namespace, (gone, new)) in differences {
            if gone == new {
                continue;
            }
            let namespaces = Arc::make_mut(&mut self.namespaces);
            let count = (namespaces.get(namespace).copied().unwrap_or(0) + new).saturating_sub(gone);
            match count {
                0 => namespaces.remove(namespace),
                count => namespaces.insert(namespace.into(), count),
            };
        }
    }

    fn change_reverse(&mut self, gone: &[Arc<Published>], new: &[Arc<Published>]) {
        let mut touched: HashMap<usize, Vec<Reverse>> = HashMap::new();
        for (ip, _) in gone.iter().flat_map(|service| service.reverse()) {
            touched.entry(self.shard(&ip)).or_default();
        }
        for service in new {
            for (ip, endpoint) in service.reverse() {
                let record = Reverse { ip, endpoint, service: Arc::clone(service) };
                touched.entry(self.shard(&ip)).or_default().push(record);
            }
        }
        let gone: HashSet<*const Published> = gone.iter().map(Arc::as_ptr).collect();
        for (shard, records) in touched {
            if let Some(shard) = self.reverse.get_mut(shard) {
                let shard = Arc::make_mut(shard);
                shard.retain(|record| !gone.contains(&Arc::as_ptr(&record.service)));
                shard.extend(records);
                shard.sort_by(|a, b| a.order().cmp(&b.order()));
                shard.shrink_to_fit();
            }
        }
    }

    fn shard(&self, key: &(impl Hash + ?Sized)) -> usize {
        // The low bits choose the place within a shard.
        usize::try_from(self.hasher.hash_one(key) >> 32).unwrap_or_default() % SHARDS
    }
}

impl Reverse {
    fn order(&self) -> (IpAddr, bool, &[u8], Option<u32>) {
        (self.ip, self.endpoint.is_some(), self.service.key(), self.endpoint)
    }
}

impl Borrow<[u8]> for ByKey {
    fn borrow(&self) -> &[u8] {
        self.0.key()
    }
}

impl Hash for ByKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.key().hash(state);
    }
}

impl PartialEq for ByKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.key() == other.0.key()
    }
}

impl Eq for ByKey {}

#[cfg(test)]
impl Index {
    /// All there is, in an order that does not depend on how it came about.
    pub(super) fn dump(&self) -> Vec<String> {
        let mut all = Vec::new();
        for (index, shard) in self.services.iter().enumerate() {
            for ByKey(service) in shard.iter() {
                assert_eq!(self.shard(service.key()), index);
                all.push(format!("{service:?}"));
            }
        }
        for (index, shard) in self.reverse.iter().enumerate() {
            assert!(shard.is_sorted_by(|a, b| a.order() < b.order()));
            for record in shard.iter() {
                assert_eq!(self.shard(&record.ip), index);
                // Not one that was replaced.
                assert!(self.service(record.service.key()).is_some_and(|found| Arc::ptr_eq(found, &record.service)));
                all.push(format!("{} {:?} {:?}", record.ip, record.endpoint, record.service.key()));
            }
        }
        all.extend(self.namespaces.iter().map(|(namespace, count)| format!("{namespace:?} {count}")));
        all.sort();
        all
    }

    /// How many Services are the same allocation in another index, and how many there are.
    pub(super) fn shared_with(&self, other: &Self) -> (usize, usize) {
        let all = || self.services.iter().flat_map(|shard| shard.iter());
        let shared =
            |service: &&ByKey| other.service(service.0.key()).is_some_and(|found| Arc::ptr_eq(found, &service.0));
        (all().filter(shared).count(), all().count())
    }
}
