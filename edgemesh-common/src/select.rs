//! What happens to a connection: look the destination up, pick a backend.

use crate::{
    Addr,
    layout::{
        Affinity, AffinityKey, Backend, BackendKey, Frontend, FrontendKey, HAS_MEMBERS, HASH_CLIENT, INLINE_BACKENDS,
        Member, MemberKey, RING_PLACES, RingKey,
    },
};

/// How often a lookup that met a torn value is repeated.
///
/// One repetition meets a torn value again only if the frontend was rewritten twice more within it, so four is already
/// far beyond what a writer can do.
///
/// A static and not a constant, so that the compiler keeps the loop: unrolled, it needs more stack than a program has.
static ATTEMPTS: u32 = 4;

const SECOND: u64 = 1_000_000_000;

/// How old a client's affinity may grow before a connection renews it: it is kept to within this, and a busy client
/// does not write on every connection.
pub const RENEWAL: u64 = SECOND / 4;

/// Instead of the moment at which a client's affinity was last used: it has none yet. No clock gets there.
pub const NO_AFFINITY: u64 = u64::MAX - 1;
/// What is remembered of a client is as it should be.
const SETTLED: u64 = u64::MAX;

/// The tables as one side sees them: maps in the kernel, `HashMap`s in the tests.
pub trait Tables {
    /// A frontend by key. The reference may be to memory that changes while it is held.
    fn frontend(&self, key: &FrontendKey) -> Option<&Frontend>;
    /// One place of a set that does not fit into its frontend.
    fn backend(&self, key: &BackendKey) -> Option<&Backend>;
    /// Whether any Service port answers on this address.
    fn is_service_addr(&self, addr: &Addr) -> bool;
    /// The index of a backend at one place of a ring, `place` below [`RING_PLACES`].
    fn ring(&self, key: &RingKey, place: usize) -> Option<u16>;
    fn member(&self, key: &MemberKey) -> Option<Member>;
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;
    /// Remembers where a client went, unless somebody has changed what was remembered since `seen`, when it was last used
    /// ([`NO_AFFINITY`] if there was none): of a client's first connections at the same moment, the first to get here
    /// decides for all. Returns whether it was not too late.
    fn remember(&self, key: &AffinityKey, value: &Affinity, seen: u64) -> bool;
    /// A uniformly distributed number.
    fn random(&self) -> u32;
    /// CLOCK_MONOTONIC, nanoseconds.
    fn now(&self) -> u64;
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

/// The backend that an earlier datagram of a socket to the same frontend went to.
#[derive(Clone, Copy, Debug)]
pub struct Earlier {
    pub service: u32,
    pub generation: u32,
    pub backend: Backend,
}

/// Decides where a connection to `key` goes.
///
/// `client` names who connects (its IP, or [`Addr::of_netns`]), for affinity and hashing; it is asked only where the
/// Service wants either.
#[inline(always)]
pub fn select<T: Tables>(tables: &T, key: &FrontendKey, client: impl Fn() -> Addr) -> Verdict {
    select_sticky(tables, key, client, || None)
}

/// Decides where a datagram to `key` goes, staying with the backend of an earlier datagram of the same socket while it
/// is still eligible.
///
/// `earlier` is asked only once `key` is known to be a frontend: other datagrams pay for the lookup alone.
#[inline(always)]
pub fn select_sticky<T: Tables>(
    tables: &T,
    key: &FrontendKey,
    client: impl Fn() -> Addr,
    earlier: impl Fn() -> Option<Earlier>,
) -> Verdict {
    for _ in 0..read(&ATTEMPTS) {
        let Some(frontend) = tables.frontend(key) else {
            return if tables.is_service_addr(&key.addr) { Verdict::Refuse { service: 0 } } else { Verdict::Untouched };
        };
        let set = Set {
            frontend,
            generation: read(&frontend.generation),
            service: read(&frontend.service),
            count: read(&frontend.count),
            flags: read(&frontend.flags),
        };
        if !is_key(&frontend.key, key) {
            // The element was freed and now is another frontend's.
            continue;
        }
        let service = set.service;
        if set.count == 0 {
            if set.is_torn() {
                continue;
            }
            return Verdict::Refuse { service };
        }

        let mut backend = Backend::default();
        if let Some(e) = earlier()
            && e.service == service
        {
            let id = if e.generation == set.generation { e.backend.id } else { set.find(tables, &e.backend) };
            backend = Backend { id, ..e.backend };
        }
        let affine = read(&frontend.affinity_seconds) != 0;
        let client = if affine || set.flags & HASH_CLIENT != 0 { client() } else { Addr::default() };
        let seen = if affine { set.recall(tables, &client, &mut backend) } else { SETTLED };
        let is_new = backend.id == 0;
        if is_new && !set.choose(tables, &client, &mut backend) {
            // The set was replaced and this generation is already gone: look again.
            continue;
        }
        if set.is_torn() {
            continue;
        }
        if seen != SETTLED {
            set.remember(tables, &client, &mut backend, seen, is_new);
        }
        return Verdict::Forward { service, generation: set.generation, backend };
    }
    Verdict::Refuse { service: 0 }
}

/// The [`Frontend::flags`] of `key`; 0 where there is no such frontend.
#[inline(always)]
pub fn flags<T: Tables>(tables: &T, key: &FrontendKey) -> u32 {
    for _ in 0..read(&ATTEMPTS) {
        let Some(frontend) = tables.frontend(key) else { return 0 };
        let (generation, flags) = (read(&frontend.generation), read(&frontend.flags));
        if is_key(&frontend.key, key) && read(&frontend.generation_check) == generation {
            return flags;
        }
    }
    0
}

/// The place of a client on a [`crate::layout::Ring`].
#[inline(always)]
pub const fn ring_place(client: &Addr) -> usize {
    let words = client.words();
    let hash = mix(mix(mix(mix(0, words[0]), words[1]), words[2]), words[3]);
    hash as usize & (RING_PLACES - 1)
}

/// Mixes a word into a hash so that every bit of either changes about half of the result (MurmurHash3: one round and its
/// finaliser).
#[inline(always)]
pub const fn mix(hash: u32, word: u32) -> u32 {
    let word = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    let mut hash = (hash ^ word).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64);
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

/// The eligible backends of a frontend, as one read of it found them; not empty.
struct Set<'a> {
    frontend: &'a Frontend,
    generation: u32,
    service: u32,
    count: u32,
    flags: u32,
}

impl Set<'_> {
    /// Whether the frontend was rewritten since its first field was read.
    #[inline(always)]
    fn is_torn(&self) -> bool {
        read(&self.frontend.generation_check) != self.generation
    }

    #[inline(always)]
    const fn is_inline(&self) -> bool {
        self.count as usize <= INLINE_BACKENDS
    }

    // What follows are functions of their own in the kernel: a program and all it calls at a time have 512 bytes of stack.

    /// Puts a new choice into `backend`; false if the set is being replaced.
    #[inline(never)]
    fn choose<T: Tables>(&self, tables: &T, client: &Addr, backend: &mut Backend) -> bool {
        let (service, generation) = (self.service, self.generation);
        let index = if self.flags & HASH_CLIENT != 0 {
            match tables.ring(&RingKey { service, generation }, ring_place(client)) {
                Some(index) => u32::from(index),
                None => return false,
            }
        } else {
            scale(tables.random(), self.count)
        };
        if self.is_inline() {
            // The mask is for the verifier; `index < count <= INLINE_BACKENDS` holds already.
            copy_backend(&self.frontend.inline[index as usize & (INLINE_BACKENDS - 1)], backend);
            return true;
        }
        match tables.backend(&BackendKey { service, generation, index }) {
            Some(chosen) => {
                copy_backend(chosen, backend);
                true
            }
            None => false,
        }
    }

    /// Puts the backend that a client was last sent to into `backend`, unless that has one already, if it was not too long
    /// ago and the backend still is in the set. Returns [`SETTLED`] unless what it gets this time is to be remembered, and
    /// then when the client was last remembered.
    #[inline(never)]
    fn recall<T: Tables>(&self, tables: &T, client: &Addr, backend: &mut Backend) -> u64 {
        let Some(known) = tables.affinity(&self.affinity_key(client)) else { return NO_AFFINITY };
        let age = tables.now().saturating_sub(known.last_used);
        if backend.id == 0 && age <= u64::from(read(&self.frontend.affinity_seconds)) * SECOND {
            *backend = Backend { id: self.find(tables, &known.backend), ..known.backend };
        }
        let changes = age >= RENEWAL
            || backend.id == 0
            || backend.port != known.backend.port
            || !backend.addr.same(&known.backend.addr);
        if changes { known.last_used } else { SETTLED }
    }

    /// Remembers `backend`; where another connection of the client was faster, and this one `is_new`, `backend` becomes
    /// the other's.
    #[inline(never)]
    fn remember<T: Tables>(&self, tables: &T, client: &Addr, backend: &mut Backend, seen: u64, is_new: bool) {
        let key = self.affinity_key(client);
        let value = Affinity { last_used: tables.now(), backend: *backend };
        if tables.remember(&key, &value, seen) || !is_new {
            return;
        }
        if let Some(other) = tables.affinity(&key) {
            let id = self.find(tables, &other.backend);
            if id != 0 {
                *backend = Backend { id, ..other.backend };
            }
        }
    }

    #[inline(always)]
    fn affinity_key(&self, client: &Addr) -> AffinityKey {
        let affinity = read(&self.frontend.affinity);
        AffinityKey { client: *client, affinity: [affinity as u32, (affinity >> 32) as u32] }
    }

    /// The id of the backend of the set at the address of `wanted`, which is another than before if it was away; 0 for
    /// none. Large sets that keep no members answer 0, and a new choice is made, which is never wrong.
    #[inline(never)]
    fn find<T: Tables>(&self, tables: &T, wanted: &Backend) -> u32 {
        if !self.is_inline() {
            if self.flags & HAS_MEMBERS == 0 {
                return 0;
            }
            let key = MemberKey { addr: wanted.addr, port: wanted.port, pad: 0, service: self.service };
            return match tables.member(&key) {
                Some(member) if member.generation.wrapping_sub(self.generation).cast_signed() >= 0 => member.id,
                _ => 0,
            };
        }
        let mut id = 0;
        for (place, backend) in self.frontend.inline.iter().enumerate() {
            let same = same_words(read_words(&backend.addr), wanted.addr.words()) && read(&backend.port) == wanted.port;
            if (place as u32) < self.count && same {
                id = read(&backend.id);
            }
        }
        id
    }
}

/// Maps a uniform `random` to `0..count` without a division (the bias is below 2^-15 for any real `count`).
#[inline(always)]
const fn scale(random: u32, count: u32) -> u32 {
    ((random as u64 * count as u64) >> 32) as u32
}

#[inline(always)]
const fn same_words(a: [u32; 4], b: [u32; 4]) -> bool {
    (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) == 0
}

/// Whether the key in a value that may be changing is `key`.
#[inline(always)]
fn is_key(found: &FrontendKey, key: &FrontendKey) -> bool {
    same_words(read_words(&found.addr), key.addr.words())
        && read(&found.port) == key.port
        && read(&found.proto) == key.proto
        && read(&found.scope) == key.scope
}

#[inline(always)]
fn copy_backend(from: &Backend, to: &mut Backend) {
    to.addr = Addr::from_words(read_words(&from.addr));
    to.port = read(&from.port);
    to.id = read(&from.id);
}

/// [`read`], word by word: the whole of an address at once would go over the stack, of which a program has 512 bytes.
#[inline(always)]
fn read_words(place: &Addr) -> [u32; 4] {
    let words = core::ptr::from_ref(place).cast::<u32>();
    // SAFETY: an `Addr` is four words, aligned as such; volatile as in `read`.
    unsafe {
        [
            core::ptr::read_volatile(words),
            core::ptr::read_volatile(words.add(1)),
            core::ptr::read_volatile(words.add(2)),
            core::ptr::read_volatile(words.add(3)),
        ]
    }
}

/// Reads a field of a value that another CPU may be rewriting, once, where the program says so.
#[inline(always)]
fn read<V: Copy>(place: &V) -> V {
    // SAFETY: the reference is valid for reads; volatile keeps the compiler from moving the read across the check of
    // the generation stamps. A torn value is thrown away by that check.
    unsafe { core::ptr::read_volatile(place) }
}

#[cfg(test)]
mod tests;
