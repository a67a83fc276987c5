//! Taking over the maps of an earlier agent: learn what is in force, drop what it had no time to drop.

use std::collections::{BTreeSet, HashSet};

use aya::maps::MapError;
use edgemesh_common::{
    Addr,
    layout::{
        Backend, BackendKey, Counters, Frontend, FrontendKey, HAS_MEMBERS, HASH_CLIENT, INLINE_BACKENDS, RingKey,
        SCOPE_SOCKETS,
    },
};

use super::{Ebpf, Installed, OpenError, absent_is_fine, sets::Set};

impl Ebpf {
    /// Fills the book-keeping from the maps, so that the first table only changes what differs.
    pub(super) fn adopt(&mut self) -> Result<(), OpenError> {
        let found: Vec<(FrontendKey, Frontend)> =
            self.opened.frontends.iter().collect::<Result<_, _>>().map_err(|error| map_error("FRONTENDS", &error))?;
        let mut ranges = self.found_ranges()?;
        for (key, value) in found {
            let set = Set {
                service: value.service,
                generation: value.generation,
                flags: value.flags,
                backends: self.backends_of(&value).map_err(|error| map_error("BACKENDS", &error))?,
                ring: None,
            };
            self.last_service = self.last_service.max(value.service);
            self.last_generation = self.last_generation.max(value.generation);
            self.services.insert(value.service, key);
            // Which of an address' frontends own it, the first table tells.
            let owns_address = key.scope == SCOPE_SOCKETS && self.opened.service_addrs.get(&key.addr, 0).is_ok();
            if owns_address {
                *self.addrs.entry(key.addr).or_insert(0) += 1;
            }
            let installed = Installed {
                last_backend: set.backends.iter().map(|backend| backend.id).max().unwrap_or(0),
                set,
                retired: Counters::default(),
                affinity_seconds: value.affinity_seconds,
                ranges: ranges.remove(&value.service).unwrap_or_default(),
                owns_address,
            };
            self.installed.insert(key, installed);
        }
        for (service, ranges) in ranges {
            self.forget_ranges(service, ranges);
        }
        self.sweep()
    }

    /// A set too large for its frontend and with a place missing comes back shorter, and one whose ring is missing empty,
    /// so that the first table writes it anew.
    pub(super) fn backends_of(&self, frontend: &Frontend) -> Result<Vec<Backend>, MapError> {
        let count = frontend.count as usize;
        if frontend.flags & HASH_CLIENT != 0 {
            let key = RingKey { service: frontend.service, generation: frontend.generation };
            match self.opened.rings.get(&key, 0) {
                Ok(_) => {}
                Err(MapError::KeyNotFound) => return Ok(Vec::new()),
                Err(error) => return Err(error),
            }
        }
        if count <= INLINE_BACKENDS {
            return Ok(frontend.inline[..count].to_vec());
        }
        let mut backends = Vec::with_capacity(count);
        for index in 0..frontend.count {
            let place = BackendKey { service: frontend.service, generation: frontend.generation, index };
            match self.opened.backends.get(&place, 0) {
                Ok(backend) => backends.push(backend),
                Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(backends)
    }

    /// Deletes entries that nothing refers to.
    fn sweep(&mut self) -> Result<(), OpenError> {
        let sets: BTreeSet<(u32, u32)> = self.installed.values().map(|i| (i.set.service, i.set.generation)).collect();
        let stale =
            keys(self.opened.backends.keys(), "BACKENDS", |key| !sets.contains(&(key.service, key.generation)))?;
        for key in stale {
            absent_is_fine(self.opened.backends.remove(&key)).map_err(|error| map_error("BACKENDS", &error))?;
        }
        let stale = keys(self.opened.rings.keys(), "RINGS", |key| !sets.contains(&(key.service, key.generation)))?;
        for key in stale {
            absent_is_fine(self.opened.rings.remove(&key)).map_err(|error| map_error("RINGS", &error))?;
        }

        let members: HashSet<(u32, Addr, [u8; 2])> = self
            .installed
            .values()
            .filter(|i| i.set.flags & HAS_MEMBERS != 0)
            .flat_map(|i| i.set.backends.iter().map(|b| (i.set.service, b.addr, b.port)))
            .collect();
        let stale =
            keys(self.opened.members.keys(), "MEMBERS", |key| !members.contains(&(key.service, key.addr, key.port)))?;
        for key in stale {
            absent_is_fine(self.opened.members.remove(&key)).map_err(|error| map_error("MEMBERS", &error))?;
        }

        let counted: BTreeSet<(u32, u32)> = self
            .installed
            .values()
            .flat_map(|i| i.set.backends.iter().map(|b| (i.set.service, b.id)).chain([(i.set.service, 0)]))
            .collect();
        let stale = keys(self.opened.counters.keys(), "COUNTERS", |key| {
            key.service != 0 && !counted.contains(&(key.service, key.backend))
        })?;
        for key in stale {
            absent_is_fine(self.opened.counters.remove(&key)).map_err(|error| map_error("COUNTERS", &error))?;
        }

        let stale = keys(self.opened.service_addrs.keys(), "SERVICE_ADDRS", |addr| !self.addrs.contains_key(addr))?;
        for addr in stale {
            absent_is_fine(self.opened.service_addrs.remove(&addr))
                .map_err(|error| map_error("SERVICE_ADDRS", &error))?;
        }
        Ok(())
    }
}

fn keys<K>(
    all: impl Iterator<Item = Result<K, MapError>>,
    name: &'static str,
    stale: impl Fn(&K) -> bool,
) -> Result<Vec<K>, OpenError> {
    let picked = all.filter(|key| key.as_ref().map_or(true, &stale)).collect::<Result<_, _>>();
    picked.map_err(|error| map_error(name, &error))
}

fn map_error(name: &'static str, error: &MapError) -> OpenError {
    OpenError::Map { name, error: error.to_string() }
}
