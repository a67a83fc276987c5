//! Reading back what is in force: how full the maps are, and what they hold of one address.

use std::{cell::Cell, time::Duration};

use aya::maps::MapError;
use edgemesh_common::{
    Addr,
    layout::{
        Affinity, AffinityKey, Backend, BackendKey, Frontend, FrontendKey, HASH_CLIENT, INLINE_BACKENDS, Member,
        MemberKey, RING_PLACES, Ring, RingKey, SCOPE_HOST, TCP, UDP,
    },
    select::{Tables, Verdict, select},
};

use super::{Abandoned, Ebpf, Error, absent_is_fine, kernel, socket_addr, sys};
use crate::{
    dataplane::{Choice, ChosenBy, InForce, Room, Share},
    model::{FrontendAddr, Protocol},
    net,
};

/// How often a value is read that was being replaced.
const ATTEMPTS: usize = 8;

impl Ebpf {
    pub(super) fn count_rooms(&self) -> Vec<Room> {
        let larger = |count: &usize| *count > INLINE_BACKENDS;
        let abandoned = self.abandoned.iter().filter_map(|(_, what)| match what {
            Abandoned::Set(set) => Some(set),
            Abandoned::Counter(_) | Abandoned::Service(_) => None,
        });
        let sets = self.installed.values().map(|installed| &installed.set).chain(abandoned);
        vec![
            Room {
                map: "FRONTENDS",
                used: self.installed.len() - self.reserved.len(),
                capacity: self.opened.max_frontends,
            },
            Room {
                map: "BACKENDS",
                used: sets.map(|set| set.backends.len()).filter(larger).sum(),
                capacity: self.opened.max_backends,
            },
        ]
    }

    /// Asks the maps alone: what this agent believes to have written is what is to be checked.
    pub(super) fn read_back(&self, at: &FrontendAddr, netns: Option<u64>) -> Result<InForce, Error> {
        let Some(key) = self.key_of(at, netns) else { return Ok(InForce::Nothing) };
        let Some(frontend) = self.read_whole(&key)? else {
            let known = present(self.opened.service_addrs.get(&key.addr, 0));
            let known = known.map_err(|error| kernel("read the Service addresses", &error))?;
            return Ok(if known.is_some() { InForce::ServiceAddress } else { InForce::Nothing });
        };
        let backends = self.backends_of(&frontend).map_err(|error| kernel("read a set of backends", &error))?;
        let ring = if frontend.flags & HASH_CLIENT == 0 { None } else { self.read_ring(&frontend)? };
        let choice = netns.and_then(|netns| self.choice(&key, &frontend, &backends, ring.as_ref(), netns));
        Ok(InForce::Frontend { shares: shares(&backends, ring.as_ref()), choice })
    }

    /// What a socket in that network namespace would have looked up.
    fn key_of(&self, at: &FrontendAddr, netns: Option<u64>) -> Option<FrontendKey> {
        let proto = match at.protocol {
            Protocol::Tcp => TCP,
            Protocol::Udp => UDP,
            Protocol::Sctp => return None,
        };
        let key = FrontendKey::new(at.addr.ip().into(), at.addr.port().to_be_bytes(), proto);
        // This thread is where the host is. Nobody in particular, on 127.0.0.1, can only mean the host.
        let is_host = || netns.is_none() || netns == net::netns_cookie().ok().flatten();
        Some(if key.addr.is_v4_loopback() && is_host() { key.in_scope(SCOPE_HOST) } else { key })
    }

    fn read_whole(&self, key: &FrontendKey) -> Result<Option<Frontend>, Error> {
        for _ in 0..ATTEMPTS {
            match present(self.opened.frontends.get(key, 0)).map_err(|error| kernel("read a frontend", &error))? {
                Some(value) if value.generation != value.generation_check || value.key != *key => {}
                other => return Ok(other),
            }
        }
        Err(Error::Kernel { attempt: "read a frontend".to_owned(), error: "its value is broken".to_owned() })
    }

    fn read_ring(&self, frontend: &Frontend) -> Result<Option<Ring>, Error> {
        let key = RingKey { service: frontend.service, generation: frontend.generation };
        present(self.opened.rings.get(&key, 0)).map_err(|error| kernel("read a ring", &error))
    }

    /// Has the code that the programs run decide for a client; None where it leaves it to chance.
    fn choice(
        &self,
        key: &FrontendKey,
        frontend: &Frontend,
        backends: &[Backend],
        ring: Option<&Ring>,
        netns: u64,
    ) -> Option<Choice> {
        let (client, now) = (Addr::of_netns(netns), sys::monotonic());
        let snapshot = Snapshot {
            ebpf: self,
            frontend,
            backends,
            ring,
            now,
            by_chance: Cell::default(),
            recalled: Cell::default(),
        };
        let Verdict::Forward { backend, .. } = select(&snapshot, key, || client) else { return None };
        if snapshot.by_chance.get() {
            return None;
        }
        let recalled = snapshot
            .recalled
            .get()
            .filter(|known| known.backend.addr.same(&backend.addr) && known.backend.port == backend.port);
        let by = match recalled {
            Some(known) => {
                let age = Duration::from_nanos(now.saturating_sub(known.last_used));
                let kept = Duration::from_secs(frontend.affinity_seconds.into());
                ChosenBy::Affinity { left: kept.saturating_sub(age) }
            }
            None => ChosenBy::Hash,
        };
        Some(Choice { backend: socket_addr(&backend), by })
    }
}

/// One frontend as it was read, which `select` takes for the maps; it changes nothing.
struct Snapshot<'a> {
    ebpf: &'a Ebpf,
    frontend: &'a Frontend,
    backends: &'a [Backend],
    ring: Option<&'a Ring>,
    now: u64,
    /// Whether the choice was random.
    by_chance: Cell<bool>,
    /// What is remembered of the client.
    recalled: Cell<Option<Affinity>>,
}

impl Tables for Snapshot<'_> {
    fn frontend(&self, _: &FrontendKey) -> Option<&Frontend> {
        Some(self.frontend)
    }

    fn backend(&self, key: &BackendKey) -> Option<&Backend> {
        self.backends.get(key.index as usize)
    }

    fn is_service_addr(&self, _: &Addr) -> bool {
        true
    }

    fn ring(&self, _: &RingKey, place: usize) -> Option<u16> {
        self.ring.and_then(|ring| ring.places.get(place).copied())
    }

    fn member(&self, key: &MemberKey) -> Option<Member> {
        self.ebpf.opened.members.get(key, 0).ok()
    }

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        let known = self.ebpf.opened.affinity.get(key, 0).ok()?;
        let age = self.now.saturating_sub(known.last_used);
        if age <= u64::from(self.frontend.affinity_seconds) * 1_000_000_000 {
            self.recalled.set(Some(known));
        }
        Some(known)
    }

    fn remember(&self, _: &AffinityKey, _: &Affinity, _: u64) -> bool {
        true
    }

    fn random(&self) -> u32 {
        self.by_chance.set(true);
        0
    }

    fn now(&self) -> u64 {
        self.now
    }
}

/// How clients nobody knows anything of are spread.
fn shares(backends: &[Backend], ring: Option<&Ring>) -> Vec<Share> {
    let mut chances = vec![0.0; backends.len()];
    match ring {
        Some(ring) => {
            for place in ring.places {
                if let Some(chance) = chances.get_mut(usize::from(place)) {
                    *chance += 1.0 / RING_PLACES as f64;
                }
            }
        }
        None => chances.fill(1.0 / backends.len() as f64),
    }
    backends.iter().zip(chances).map(|(backend, chance)| Share { backend: socket_addr(backend), chance }).collect()
}

/// An element that is not there is no error.
fn present<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) => absent_is_fine(Err(error)).map(|()| None),
    }
}
