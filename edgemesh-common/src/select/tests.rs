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
    rings: HashMap<RingKey, Vec<u16>>,
    members: HashMap<MemberKey, Member>,
    affinities: RefCell<HashMap<AffinityKey, Affinity>>,
    /// What another connection of the client, at the same moment, remembers first.
    faster: Cell<Option<Affinity>>,
    writes: Cell<usize>,
    now: Cell<u64>,
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
    fn backend(&self, key: &BackendKey) -> Option<&Backend> {
        self.backends.get(key)
    }
    fn is_service_addr(&self, addr: &Addr) -> bool {
        self.addrs.contains(addr)
    }
    fn ring(&self, key: &RingKey, place: usize) -> Option<u16> {
        self.rings.get(key)?.get(place).copied()
    }
    fn member(&self, key: &MemberKey) -> Option<Member> {
        self.members.get(key).copied()
    }
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.affinities.borrow().get(key).copied()
    }
    fn remember(&self, key: &AffinityKey, value: &Affinity, seen: u64) -> bool {
        let mut affinities = self.affinities.borrow_mut();
        if let Some(faster) = self.faster.take() {
            affinities.insert(*key, faster);
        }
        if affinities.get(key).map_or(NO_AFFINITY, |known| known.last_used) != seen {
            return false;
        }
        self.writes.set(self.writes.get() + 1);
        affinities.insert(*key, *value);
        true
    }
    fn now(&self) -> u64 {
        self.now.get()
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

    /// Gives a frontend that `put` wrote session affinity.
    fn with_affinity(&mut self, key: &FrontendKey, seconds: u32) {
        let value = self.frontends.get_mut(key).unwrap();
        value.affinity_seconds = seconds;
        value.affinity = 0x1_0000_0002;
        self.with_members(key);
    }

    /// Gives a large set that `put` wrote its list of members.
    fn with_members(&mut self, key: &FrontendKey) {
        let value = self.frontends.get_mut(key).unwrap();
        value.flags |= HAS_MEMBERS;
        let (service, generation) = (value.service, value.generation);
        for (place, backend) in &self.backends {
            if place.service == service && place.generation == generation {
                let member = MemberKey { addr: backend.addr, port: backend.port, pad: 0, service };
                self.members.insert(member, Member { generation, id: backend.id });
            }
        }
    }
}

fn client() -> Addr {
    Addr::of_netns(7)
}

fn forwarded(verdict: Verdict) -> u32 {
    match verdict {
        Verdict::Forward { backend, .. } => backend.id,
        Verdict::Untouched | Verdict::Refuse { .. } => panic!("{verdict:?}"),
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
            let verdict = select(&fake, &key, client);
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

    /// Small sets and large ones, and from one to the other.
    #[test]
    fn a_socket_stays_with_its_backend_while_it_is_eligible(
        before in proptest::collection::hash_set(1u32..40, 1..20),
        after in proptest::collection::hash_set(1u32..40, 0..20),
        randoms: [u32; 2],
    ) {
        let key = key(1, 1, UDP);
        let mut fake = Fake::default();
        let ids: Vec<u32> = before.iter().copied().collect();
        fake.put(key, 3, 1, &ids);
        fake.randoms.borrow_mut().push(randoms[0]);
        let Verdict::Forward { service, generation, backend } = select_sticky(&fake, &key, client, || None) else {
            return Err(TestCaseError::fail("no backend"));
        };
        let earlier = Earlier { service, generation, backend };
        let ids: Vec<u32> = after.iter().copied().collect();
        fake.put(key, 3, 2, &ids);
        fake.with_members(&key);
        fake.randoms.borrow_mut().push(randoms[1]);
        match select_sticky(&fake, &key, client, || Some(earlier)) {
            Verdict::Forward { backend: now, .. } if after.contains(&backend.id) => prop_assert_eq!(now, backend),
            Verdict::Forward { backend: now, .. } => prop_assert!(after.contains(&now.id)),
            Verdict::Refuse { service: 3 } => prop_assert!(after.is_empty()),
            other @ (Verdict::Untouched | Verdict::Refuse { .. }) => {
                return Err(TestCaseError::fail(format!("{other:?}")));
            }
        }
    }

    /// The plain model: one remembered (time, backend) per client.
    #[test]
    fn a_client_stays_with_its_backend_until_it_was_idle_for_the_time_out(
        steps in proptest::collection::vec((0u64..20_000, 0u64..3, proptest::collection::hash_set(1u32..30, 1..16), any::<u32>()), 1..40),
    ) {
        let key = key(1, 1, TCP);
        let mut fake = Fake::default();
        let mut model: HashMap<u64, (u64, u32)> = HashMap::new();
        for (generation, (pause, who, ids, random)) in (1u32..).zip(steps) {
            fake.now.set(fake.now.get() + pause * (SECOND / 1000));
            let ids: Vec<u32> = ids.into_iter().collect();
            fake.members.retain(|_, member| member.generation + 2 > generation);
            fake.put(key, 3, generation, &ids);
            fake.with_affinity(&key, 10);
            fake.randoms.borrow_mut().push(random);
            let got = forwarded(select(&fake, &key, || Addr::of_netns(who)));
            fake.randoms.borrow_mut().clear();
            let now = fake.now.get();
            if let Some((used, backend)) = model.get(&who)
                && ids.contains(backend)
            {
                // Between the two the entry may or may not have been renewed by the last connection.
                if now - used + RENEWAL <= 10 * SECOND {
                    prop_assert_eq!(got, *backend);
                } else if now - used > 10 * SECOND {
                    prop_assert_eq!(got, ids[scale(random, ids.len() as u32) as usize]);
                }
            }
            prop_assert!(ids.contains(&got));
            model.insert(who, (now, got));
        }
    }
}

#[test]
fn all_frontends_of_a_service_port_share_the_affinity_of_a_client() {
    let mut fake = Fake::default();
    let (cluster_ip, node_port) = (key(1, 1, TCP), key(2, 30, TCP));
    for (service, key) in [(3, cluster_ip), (4, node_port)] {
        fake.put(key, service, service, &[1, 2, 3, 4]);
        fake.with_affinity(&key, 10);
    }
    fake.randoms.borrow_mut().extend([0, u32::MAX]);
    assert_eq!(forwarded(select(&fake, &cluster_ip, client)), 4);
    assert_eq!(forwarded(select(&fake, &node_port, client)), 4);
    assert_eq!(forwarded(select(&fake, &node_port, || Addr::of_netns(8))), 1, "another client has a choice of its own");
}

#[test]
fn of_first_connections_at_the_same_moment_the_fastest_decides_for_all() {
    // Three are in the frontend itself.
    for ids in [&[1, 2, 3][..], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]] {
        let last = *ids.last().unwrap();
        // The client was never here, or too long ago.
        for before in [None, Some(Affinity { last_used: SECOND, backend: backend(2) })] {
            let key = key(1, 1, TCP);
            let mut fake = Fake::default();
            fake.now.set(100 * SECOND);
            fake.put(key, 3, 1, ids);
            fake.with_affinity(&key, 10);
            let of_client = AffinityKey { client: client(), affinity: [2, 1] };
            fake.affinities.borrow_mut().extend(before.map(|before| (of_client, before)));
            fake.faster.set(Some(Affinity { last_used: 100 * SECOND, backend: backend(last) }));
            fake.randoms.borrow_mut().push(0);
            assert_eq!(forwarded(select(&fake, &key, client)), last);
            // Unless what it chose is none of the set any more.
            fake.affinities.borrow_mut().clear();
            fake.faster.set(Some(Affinity { last_used: 100 * SECOND, backend: backend(99) }));
            fake.randoms.borrow_mut().push(0);
            assert_eq!(forwarded(select(&fake, &key, client)), 1);
        }
    }
}

#[test]
fn a_datagram_stays_where_its_socket_is_whoever_remembers_first() {
    let key = key(1, 1, UDP);
    let mut fake = Fake::default();
    fake.put(key, 3, 1, &[1, 2]);
    fake.with_affinity(&key, 10);
    fake.faster.set(Some(Affinity { last_used: 5, backend: backend(2) }));
    let earlier = Earlier { service: 3, generation: 1, backend: backend(1) };
    assert_eq!(forwarded(select_sticky(&fake, &key, client, || Some(earlier))), 1);
}

#[test]
fn a_changed_time_out_counts_from_the_next_connection() {
    let key = key(1, 1, TCP);
    let mut fake = Fake::default();
    fake.put(key, 3, 1, &[1, 2]);
    fake.with_affinity(&key, 100);
    fake.randoms.borrow_mut().push(0);
    assert_eq!(forwarded(select(&fake, &key, client)), 1);
    fake.now.set(50 * SECOND);
    fake.with_affinity(&key, 10);
    fake.randoms.borrow_mut().push(u32::MAX);
    assert_eq!(forwarded(select(&fake, &key, client)), 2, "idle for longer than it may be now");
}

#[test]
fn a_busy_client_does_not_write_its_affinity_on_every_connection_or_datagram() {
    let key = key(1, 1, UDP);
    let mut fake = Fake::default();
    fake.now.set(SECOND);
    fake.put(key, 3, 1, &[1, 2]);
    fake.with_affinity(&key, 10);
    let mut earlier = None;
    for _ in 0..1000 {
        fake.now.set(fake.now.get() + SECOND / 1000);
        forwarded(select(&fake, &key, client));
        let verdict = select_sticky(&fake, &key, client, || earlier);
        let Verdict::Forward { service, generation, backend } = verdict else { panic!("{verdict:?}") };
        earlier = Some(Earlier { service, generation, backend });
    }
    assert!((4..=5).contains(&fake.writes.get()), "{}", fake.writes.get());
}

#[test]
fn a_hashed_client_goes_where_its_place_on_the_ring_says() {
    for count in [3u16, 20] {
        let key = key(1, 1, TCP);
        let mut fake = Fake::default();
        let ids: Vec<u32> = (1..=u32::from(count)).collect();
        fake.put(key, 3, 1, &ids);
        fake.frontends.get_mut(&key).unwrap().flags = HASH_CLIENT;
        let places = (0..RING_PLACES).map(|place| (place % usize::from(count)) as u16).collect();
        fake.rings.insert(RingKey { service: 3, generation: 1 }, places);
        let mut hits = vec![0u32; usize::from(count)];
        for cookie in 0..20_000 {
            let who = Addr::of_netns(cookie);
            let chosen = forwarded(select(&fake, &key, || who));
            assert_eq!(chosen as usize, ring_place(&who) % usize::from(count) + 1);
            hits[chosen as usize - 1] += 1;
        }
        // Five standard deviations of a binomial.
        let mean = 20_000.0 / f64::from(count);
        assert!(hits.iter().all(|hits| (f64::from(*hits) - mean).abs() < 5.0 * mean.sqrt()), "{hits:?}");
    }
}

#[test]
fn a_hashed_set_whose_ring_is_gone_is_looked_up_again() {
    let key = key(1, 1, TCP);
    let mut fake = Fake::default();
    fake.put(key, 3, 1, &[1, 2]);
    fake.frontends.get_mut(&key).unwrap().flags = HASH_CLIENT;
    assert_eq!(select(&fake, &key, client), Verdict::Refuse { service: 0 });
    assert_eq!(fake.lookups.get(), ATTEMPTS as usize);
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
    fake.torn_value = Frontend { generation: 4, service: 1, count: 1, key, generation_check: 5, ..Frontend::default() };
    fake.torn.set(ATTEMPTS as usize - 1);
    assert!(matches!(select(&fake, &key, client), Verdict::Forward { backend: Backend { id: 42, .. }, .. }));
    assert_eq!(fake.lookups.get(), ATTEMPTS as usize);

    fake.torn.set(usize::MAX);
    assert_eq!(select(&fake, &key, client), Verdict::Refuse { service: 0 });
}

#[test]
fn the_value_of_another_frontend_in_a_reused_element_is_never_used() {
    let mut fake = Fake::default();
    let (mine, other) = (key(1, 1, TCP), key(2, 1, TCP));
    fake.put(mine, 1, 5, &[42]);
    fake.put(other, 2, 6, &[43]);
    fake.torn_value = fake.frontends[&other];
    fake.torn.set(1);
    assert!(matches!(select(&fake, &mine, client), Verdict::Forward { backend: Backend { id: 42, .. }, .. }));
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
    let verdict = select_sticky(&fake, &key, client, || Some(earlier));
    assert!(matches!(verdict, Verdict::Forward { backend: Backend { id: 9, .. }, .. }), "{verdict:?}");
}

#[test]
fn a_large_set_whose_generation_is_gone_is_looked_up_again_not_refused_by_its_service() {
    let key = key(1, 1, TCP);
    let mut fake = Fake::default();
    let ids: Vec<u32> = (1..=9).collect();
    fake.put(key, 1, 1, &ids);
    fake.backends.clear();
    assert_eq!(select(&fake, &key, client), Verdict::Refuse { service: 0 });
    assert_eq!(fake.lookups.get(), ATTEMPTS as usize);
}
