//! What happens to a connection: look the destination up, pick a backend.

use crate::{
    Addr,
    layout::{Backend, BackendKey, Frontend, FrontendKey, INLINE_BACKENDS},
};

/// How often a lookup that met a torn value is repeated.
///
/// One repetition meets a torn value again only if the frontend was rewritten twice more within it, so four is already
/// far beyond what a writer can do.
const ATTEMPTS: usize = 4;

/// The tables as one side sees them: maps in the kernel, `HashMap`s in the tests.
pub trait Tables {
    /// A frontend by key. The reference may be to memory that changes while it is held.
    fn frontend(&self, key: &FrontendKey) -> Option<&Frontend>;
    /// One place of a set that does not fit into its frontend.
    fn backend(&self, key: &BackendKey) -> Option<Backend>;
    /// Whether any Service port answers on this address.
    fn is_service_addr(&self, addr: &Addr) -> bool;
    /// A uniformly distributed number.
    fn random(&self) -> u32;
}

/// What to do with a destination.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// Not an address of a Service: leave it alone.
    Untouched,
    /// A Service without an eligible backend, or (`service` 0) a port that a known Service address does not have.
    Refuse { service: u32 },
    /// Go to `backend` instead.
    Forward { service: u32, generation: u32, backend: Backend },
}

/// Decides where a connection to `key` goes.
#[inline(always)]
pub fn select<T: Tables>(tables: &T, key: &FrontendKey) -> Verdict {
    pick(tables, key, || None)
}

/// Decides where a datagram to `key` goes, staying with the backend of an earlier datagram of the same socket while it
/// is still eligible.
///
/// `earlier` is asked only once `key` is known to be a frontend: other datagrams pay for the lookup alone.
#[inline(always)]
pub fn select_sticky<T: Tables>(tables: &T, key: &FrontendKey, earlier: impl Fn() -> Option<Earlier>) -> Verdict {
    pick(tables, key, earlier)
}

/// The backend that an earlier datagram of a socket to the same frontend went to.
#[derive(Clone, Copy, Debug)]
pub struct Earlier {
    pub service: u32,
    pub generation: u32,
    pub backend: Backend,
}

#[inline(always)]
fn pick<T: Tables>(tables: &T, key: &FrontendKey, earlier: impl Fn() -> Option<Earlier>) -> Verdict {
    for _ in 0..ATTEMPTS {
        let Some(frontend) = tables.frontend(key) else {
            return if tables.is_service_addr(&key.addr) { Verdict::Refuse { service: 0 } } else { Verdict::Untouched };
        };
        let generation = read(&frontend.generation);
        let service = read(&frontend.service);
        let count = read(&frontend.count);
        if !read(&frontend.key).same(key) {
            // The element was freed and now is another frontend's.
            continue;
        }

        let kept = match earlier() {
            Some(e) if e.service == service && e.generation == generation => Some(e.backend),
            Some(e) if e.service == service => find_inline(frontend, count, &e.backend),
            _ => None,
        };
        let backend = match kept {
            Some(backend) => Some(backend),
            None if count == 0 => None,
            None => {
                let index = scale(tables.random(), count);
                if count as usize <= INLINE_BACKENDS {
                    // The mask is for the verifier; `index < count <= INLINE_BACKENDS` holds already.
                    Some(read(&frontend.inline[index as usize & (INLINE_BACKENDS - 1)]))
                } else {
                    match tables.backend(&BackendKey { service, generation, index }) {
                        Some(backend) => Some(backend),
                        // The set was replaced and this generation is already gone: look again.
                        None => continue,
                    }
                }
            }
        };
        if read(&frontend.generation_check) != generation {
            continue;
        }
        return match backend {
            Some(backend) => Verdict::Forward { service, generation, backend },
            None => Verdict::Refuse { service },
        };
    }
    Verdict::Refuse { service: 0 }
}

/// The backend of an inline set at the address of `wanted`, with the id that it has now: one that was away has a new one.
/// A larger set answers None: its members are found by place, not by address, and a new random choice is never wrong.
#[inline(always)]
fn find_inline(frontend: &Frontend, count: u32, wanted: &Backend) -> Option<Backend> {
    if count as usize > INLINE_BACKENDS {
        return None;
    }
    let mut found = None;
    for (place, backend) in frontend.inline.iter().enumerate() {
        let backend = read(backend);
        if (place as u32) < count && backend.port == wanted.port && backend.addr.same(&wanted.addr) {
            found = Some(backend);
        }
    }
    found
}

/// Maps a uniform `random` to `0..count` without a division (the bias is below 2^-15 for any real `count`).
#[inline(always)]
const fn scale(random: u32, count: u32) -> u32 {
    ((random as u64 * count as u64) >> 32) as u32
}

/// Reads a field of a value that another CPU may be rewriting, once, where the program says so.
#[inline(always)]
fn read<V: Copy>(place: &V) -> V {
    // SAFETY: the reference is valid for reads; volatile keeps the compiler from moving the read across the check of
    // the generation stamps. A torn value is thrown away by that check.
    unsafe { core::ptr::read_volatile(place) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{TCP, UDP};
    use proptest::prelude::*;
    use std::cell::{Cell, RefCell};
    use std::collections::{BTreeMap, HashMap, HashSet};

    /// The maps, laid out exactly as the agent writes them.
    #[derive(Default)]
    struct Fake {
        frontends: HashMap<FrontendKey, Frontend>,
        backends: HashMap<BackendKey, Backend>,
        addrs: HashSet<Addr>,
        randoms: RefCell<Vec<u32>>,
        lookups: Cell<usize>,
        torn: Cell<usize>,
        torn_value: Frontend,
    }

    impl Tables for Fake {
        fn frontend(&self, key: &FrontendKey) -> Option<&Frontend> {
            self.lookups.set(self.lookups.get() + 1);
            if self.torn.get() > 0 {
                self.torn.set(self.torn.get() - 1);
                return Some(&self.torn_value);
            }
            self.frontends.get(key)
        }
        fn backend(&self, key: &BackendKey) -> Option<Backend> {
            self.backends.get(key).copied()
        }
        fn is_service_addr(&self, addr: &Addr) -> bool {
            self.addrs.contains(addr)
        }
        fn random(&self) -> u32 {
            self.randoms.borrow_mut().pop().unwrap_or(0)
        }
    }

    fn backend(id: u32) -> Backend {
        let mut addr = [0; 16];
        addr[12..].copy_from_slice(&id.to_be_bytes());
        Backend { addr: Addr(addr), port: [0x1f, 0x90], pad: 0, id }
    }

    fn key(addr: u8, port: u8, proto: u8) -> FrontendKey {
        FrontendKey::new(Addr([addr; 16]), [0, port], proto)
    }

    impl Fake {
        fn put(&mut self, key: FrontendKey, service: u32, generation: u32, ids: &[u32]) {
            let mut value = Frontend {
                generation,
                service,
                count: ids.len() as u32,
                key,
                generation_check: generation,
                ..Frontend::default()
            };
            if ids.len() <= INLINE_BACKENDS {
                for (slot, id) in value.inline.iter_mut().zip(ids) {
                    *slot = backend(*id);
                }
            } else {
                for (index, id) in (0u32..).zip(ids) {
                    self.backends.insert(BackendKey { service, generation, index }, backend(*id));
                }
            }
            self.frontends.insert(key, value);
            self.addrs.insert(key.addr);
        }
    }

    fn any_key() -> impl Strategy<Value = FrontendKey> {
        (0u8..4, 0u8..4, prop_oneof![Just(TCP), Just(UDP)]).prop_map(|(a, p, proto)| key(a, p, proto))
    }

    proptest! {
        /// The plain model: a map from frontend to the list of its backends.
        #[test]
        fn agrees_with_the_plain_model(
            model in proptest::collection::btree_map(any_key(), proptest::collection::vec(1u32..1000, 0..40), 0..16),
            asked in proptest::collection::vec((any_key(), any::<u32>()), 1..64),
        ) {
            let model: BTreeMap<FrontendKey, Vec<u32>> = model;
            let mut fake = Fake::default();
            for (service, (key, ids)) in (1u32..).zip(&model) {
                fake.put(*key, service, 7, ids);
            }
            for (key, random) in asked {
                fake.randoms.borrow_mut().push(random);
                let verdict = select(&fake, &key);
                fake.randoms.borrow_mut().clear();
                match model.get(&key) {
                    None if model.keys().any(|k| k.addr == key.addr) => {
                        prop_assert_eq!(verdict, Verdict::Refuse { service: 0 });
                    }
                    None => prop_assert_eq!(verdict, Verdict::Untouched),
                    Some(ids) if ids.is_empty() => {
                        let refused_by_its_service = matches!(verdict, Verdict::Refuse { service } if service != 0);
                        prop_assert!(refused_by_its_service);
                    }
                    Some(ids) => {
                        let wanted = ids[((u64::from(random) * ids.len() as u64) >> 32) as usize];
                        let Verdict::Forward { backend: got, generation, .. } = verdict else {
                            return Err(TestCaseError::fail(format!("{verdict:?}")));
                        };
                        prop_assert_eq!(got, backend(wanted));
                        prop_assert_eq!(generation, 7);
                    }
                }
            }
        }

        #[test]
        fn a_socket_stays_with_its_backend_while_it_is_eligible(
            before in proptest::collection::hash_set(1u32..20, 1..8),
            after in proptest::collection::hash_set(1u32..20, 0..8),
            randoms: [u32; 2],
        ) {
            let key = key(1, 1, UDP);
            let mut fake = Fake::default();
            let ids: Vec<u32> = before.iter().copied().collect();
            fake.put(key, 3, 1, &ids);
            fake.randoms.borrow_mut().push(randoms[0]);
            let Verdict::Forward { service, generation, backend } = select_sticky(&fake, &key, || None) else {
                return Err(TestCaseError::fail("no backend"));
            };
            let earlier = Earlier { service, generation, backend };
            let ids: Vec<u32> = after.iter().copied().collect();
            fake.put(key, 3, 2, &ids);
            fake.randoms.borrow_mut().push(randoms[1]);
            match select_sticky(&fake, &key, || Some(earlier)) {
                Verdict::Forward { backend: now, .. } if after.contains(&backend.id) => prop_assert_eq!(now, backend),
                Verdict::Forward { backend: now, .. } => prop_assert!(after.contains(&now.id)),
                Verdict::Refuse { service: 3 } => prop_assert!(after.is_empty()),
                other @ (Verdict::Untouched | Verdict::Refuse { .. }) => {
                    return Err(TestCaseError::fail(format!("{other:?}")));
                }
            }
        }
    }

    #[test]
    fn every_backend_gets_its_share() {
        for count in [1u32, 3, 8, 9, 300] {
            let mut hits = vec![0u32; count as usize];
            let steps = 300 * count;
            for step in 0..steps {
                let random = (u64::from(step) * (1 << 32) / u64::from(steps)) as u32;
                hits[scale(random, count) as usize] += 1;
            }
            assert!(hits.iter().all(|h| (299..=301).contains(h)), "{count}: {hits:?}");
        }
    }

    #[test]
    fn a_torn_value_is_read_again_and_never_used() {
        let key = key(1, 1, TCP);
        let mut fake = Fake::default();
        fake.put(key, 1, 5, &[42]);
        fake.torn_value =
            Frontend { generation: 4, service: 1, count: 1, key, generation_check: 5, ..Frontend::default() };
        fake.torn.set(ATTEMPTS - 1);
        assert!(matches!(select(&fake, &key), Verdict::Forward { backend: Backend { id: 42, .. }, .. }));
        assert_eq!(fake.lookups.get(), ATTEMPTS);

        fake.torn.set(usize::MAX);
        assert_eq!(select(&fake, &key), Verdict::Refuse { service: 0 });
    }

    #[test]
    fn the_value_of_another_frontend_in_a_reused_element_is_never_used() {
        let mut fake = Fake::default();
        let (mine, other) = (key(1, 1, TCP), key(2, 1, TCP));
        fake.put(mine, 1, 5, &[42]);
        fake.put(other, 2, 6, &[43]);
        fake.torn_value = fake.frontends[&other];
        fake.torn.set(1);
        assert!(matches!(select(&fake, &mine), Verdict::Forward { backend: Backend { id: 42, .. }, .. }));
    }

    #[test]
    fn a_backend_that_was_away_is_kept_under_its_new_id() {
        let key = key(1, 1, UDP);
        let mut fake = Fake::default();
        fake.put(key, 3, 1, &[7]);
        let earlier = Earlier { service: 3, generation: 1, backend: backend(7) };
        fake.put(key, 3, 2, &[7, 8]);
        fake.frontends.get_mut(&key).unwrap().inline[0].id = 9;
        fake.randoms.borrow_mut().push(u32::MAX);
        let verdict = select_sticky(&fake, &key, || Some(earlier));
        assert!(matches!(verdict, Verdict::Forward { backend: Backend { id: 9, .. }, .. }), "{verdict:?}");
    }

    #[test]
    fn a_large_set_whose_generation_is_gone_is_looked_up_again_not_refused_by_its_service() {
        let key = key(1, 1, TCP);
        let mut fake = Fake::default();
        let ids: Vec<u32> = (1..=9).collect();
        fake.put(key, 1, 1, &ids);
        fake.backends.clear();
        assert_eq!(select(&fake, &key), Verdict::Refuse { service: 0 });
        assert_eq!(fake.lookups.get(), ATTEMPTS);
    }
}
