//! The parts of a frontend's value that stand in maps of their own: large sets, their members, and rings.

use std::time::Instant;

use edgemesh_common::layout::{
    Backend, BackendKey, FrontendKey, HAS_MEMBERS, HASH_CLIENT, INLINE_BACKENDS, Member, MemberKey, Ring, RingKey, UDP,
};
use tracing::warn;

use super::{Abandoned, Ebpf, absent_is_fine, ring::ring, wanted::socket_addr};
use crate::dataplane::Error;

/// What a frontend's value refers to in other maps.
#[derive(Debug, Default)]
pub(super) struct Set {
    pub(super) service: u32,
    pub(super) generation: u32,
    /// See [`edgemesh_common::layout::Frontend::flags`].
    pub(super) flags: u32,
    pub(super) backends: Vec<Backend>,
    /// None also for an adopted one: it is in its map.
    pub(super) ring: Option<Box<Ring>>,
}

impl Set {
    fn is_inline(&self) -> bool {
        self.backends.len() <= INLINE_BACKENDS
    }

    fn ring_key(&self) -> RingKey {
        RingKey { service: self.service, generation: self.generation }
    }

    fn places(&self) -> impl Iterator<Item = (BackendKey, &Backend)> {
        let (service, generation) = (self.service, self.generation);
        (0u32..).zip(&self.backends).map(move |(index, backend)| (BackendKey { service, generation, index }, backend))
    }

    fn member_key(&self, backend: &Backend) -> MemberKey {
        MemberKey { addr: backend.addr, port: backend.port, pad: 0, service: self.service }
    }
}

impl Ebpf {
    /// Writes what has to be there before the frontend's value is. After an error nothing of it is left.
    pub(super) fn write_set(&mut self, set: &mut Set, previous: Option<&Set>) -> Result<(), Error> {
        let result = self.try_write_set(set, previous);
        if result.is_err() {
            // Nobody has seen it, so it can go at once.
            self.drop_set(set);
        }
        result
    }

    fn try_write_set(&mut self, set: &mut Set, previous: Option<&Set>) -> Result<(), Error> {
        let generation = set.generation;
        if set.flags & HASH_CLIENT != 0 {
            let previous = previous.and_then(|set| Some((set.backends.as_slice(), set.ring.as_deref()?)));
            let ring = ring(&set.backends, previous);
            let written = self.opened.rings.insert(set.ring_key(), ring.as_ref(), 0);
            written.map_err(|error| self.backends_error(&error, set.backends.len()))?;
            set.ring = Some(ring);
        }
        if set.is_inline() {
            return Ok(());
        }
        for (key, backend) in set.places() {
            let written = self.opened.backends.insert(key, backend, 0);
            written.map_err(|error| self.backends_error(&error, set.backends.len() - key.index as usize))?;
        }
        if set.flags & HAS_MEMBERS != 0 {
            for (missing, backend) in set.backends.iter().enumerate() {
                let member = Member { generation, id: backend.id };
                let written = self.opened.members.insert(set.member_key(backend), member, 0);
                written.map_err(|error| self.backends_error(&error, set.backends.len() - missing))?;
            }
        }
        Ok(())
    }

    /// Removes what [`Ebpf::write_set`] wrote.
    pub(super) fn drop_set(&mut self, set: &Set) {
        let mut first_error = None;
        let mut note = |result| {
            if let Err(error) = absent_is_fine(result) {
                first_error.get_or_insert(error);
            }
        };
        if set.flags & HASH_CLIENT != 0 {
            note(self.opened.rings.remove(&set.ring_key()));
        }
        if !set.is_inline() {
            for (key, _) in set.places() {
                note(self.opened.backends.remove(&key));
            }
            for backend in set.backends.iter().filter(|_| set.flags & HAS_MEMBERS != 0) {
                let key = set.member_key(backend);
                // A later set has taken over those that stayed.
                if self.opened.members.get(&key, 0).is_ok_and(|member| member.generation == set.generation) {
                    note(self.opened.members.remove(&key));
                }
            }
        }
        if let Some(error) = first_error {
            warn!("cannot drop an abandoned set of backends: {error}");
        }
    }

    /// Puts off the removal of what a replaced set leaves behind, and of the counters of backends that are gone; has the
    /// UDP sockets that are connected to those ended.
    pub(super) fn abandon_set(&mut self, key: FrontendKey, old: Set, now: Instant) {
        let kept: std::collections::HashSet<u32> =
            self.installed.get(&key).into_iter().flat_map(|new| &new.set.backends).map(|backend| backend.id).collect();
        for backend in old.backends.iter().filter(|backend| !kept.contains(&backend.id)) {
            self.abandon(now, Abandoned::counter(old.service, backend.id));
            if key.proto == UDP
                && let Some(stale) = &mut self.stale
            {
                stale.lost(key, socket_addr(backend), now);
            }
        }
        if !old.is_inline() || old.flags & HASH_CLIENT != 0 {
            self.abandon(now, Abandoned::Set(old));
        }
    }
}
