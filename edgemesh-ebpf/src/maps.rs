//! The maps, and the view of them that the selection logic takes.

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST},
    btf_maps::SkStorage,
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns},
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap, PerCpuHashMap, RingBuf},
};
use edgemesh_common::{
    Addr,
    layout::{
        Affinity, AffinityKey, Backend, BackendKey, Connected, CounterKey, Counters, Datagrams, Event, Frontend,
        FrontendKey, Member, MemberKey, RING_PLACES, Ring, RingKey, Settings, UdpSocket,
    },
    select::Tables,
};

// Capacities here are placeholders: the agent sets them from its configuration before it creates the maps. Nothing is
// preallocated, so a place that is not used costs no more than its hash bucket.

#[map]
static FRONTENDS: HashMap<FrontendKey, Frontend> = HashMap::with_max_entries(20_000, BPF_F_NO_PREALLOC);

#[map]
static BACKENDS: HashMap<BackendKey, Backend> = HashMap::with_max_entries(200_000, BPF_F_NO_PREALLOC);

/// Addresses with at least one frontend; the value is not used.
#[map]
static SERVICE_ADDRS: HashMap<Addr, u32> = HashMap::with_max_entries(20_000, BPF_F_NO_PREALLOC);

#[map]
static RINGS: HashMap<RingKey, Ring> = HashMap::with_max_entries(20_000, BPF_F_NO_PREALLOC);

#[map]
static MEMBERS: HashMap<MemberKey, Member> = HashMap::with_max_entries(200_000, BPF_F_NO_PREALLOC);

#[map]
static COUNTERS: PerCpuHashMap<CounterKey, Counters> = PerCpuHashMap::with_max_entries(200_000, BPF_F_NO_PREALLOC);

/// An LRU map is preallocated by its nature, so this capacity is paid for at once (about 2 MiB). A client that is pushed
/// out, the one that was idle longest, is led to any backend the next time.
#[map]
static AFFINITY: LruHashMap<AffinityKey, Affinity> = LruHashMap::with_max_entries(16_384, 0);

/// As `AFFINITY`. A socket that is pushed out is merely not ended when its backend goes away.
#[map]
static UDP_SOCKETS: LruHashMap<u64, UdpSocket> = LruHashMap::with_max_entries(16_384, 0);

#[btf_map]
pub(crate) static CONNECTED: SkStorage<Connected> = SkStorage::new();

#[btf_map]
pub(crate) static DATAGRAMS: SkStorage<Datagrams> = SkStorage::new();

#[map]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

/// About 3,600 events; what finds no room while the agent is slow is not reported.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// The maps above as [`Tables`].
pub(crate) struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<&Frontend> {
        // SAFETY: the element may be rewritten while it is read; `select` checks its generation stamps for that.
        unsafe { FRONTENDS.get(key) }
    }

    #[inline(always)]
    fn backend(&self, key: &BackendKey) -> Option<&Backend> {
        // SAFETY: an element of `BACKENDS` is written before its generation is published and removed long after that
        // generation was replaced, so it does not change while a program can read it.
        unsafe { BACKENDS.get(key) }
    }

    #[inline(always)]
    fn is_service_addr(&self, addr: &Addr) -> bool {
        // SAFETY: only the presence of the element is looked at.
        unsafe { SERVICE_ADDRS.get(addr) }.is_some()
    }

    #[inline(always)]
    fn ring(&self, key: &RingKey, place: usize) -> Option<u16> {
        // SAFETY: as `backend`. The mask is for the verifier.
        unsafe { RINGS.get(key) }.map(|ring| ring.places[place & (RING_PLACES - 1)])
    }

    #[inline(always)]
    fn member(&self, key: &MemberKey) -> Option<Member> {
        // SAFETY: an update puts a new element in its place. Should this one be reused while it is read, a socket stays
        // with a backend that has left, or leaves one that has not, once.
        unsafe { MEMBERS.get(key) }.copied()
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        // SAFETY: an element that is reused while it is read may give another client's backend; `select` takes it only
        // if it is one of this Service.
        unsafe { AFFINITY.get(key) }.copied()
    }

    #[inline(always)]
    fn remember(&self, key: &AffinityKey, value: &Affinity, seen: u64) -> bool {
        let Some(known) = AFFINITY.get_ptr_mut(key) else {
            // A failure for lack of memory is as one for being late, after which nothing is found: the client is left to
            // chance the next time.
            return AFFINITY.insert(key, value, BPF_NOEXIST.into()).is_ok();
        };
        // SAFETY: as `affinity`; at worst another client is remembered for longer.
        let known = unsafe { &mut *known };
        if known.backend.addr.same(&value.backend.addr) && known.backend.port == value.backend.port {
            // In place, as an update would take a new element from the LRU list for each client that is busy.
            known.last_used = value.last_used;
            return true;
        }
        if known.last_used != seen {
            return false;
        }
        // Two that both get here at once still part; what they would need is an exchange that is atomic, which programs
        // have since Linux 5.12.
        let _ = AFFINITY.insert(key, value, 0);
        true
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper takes no argument and is there for every program type.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: as `random`.
        unsafe { bpf_ktime_get_ns() }
    }
}

/// Whether the agent wants events.
#[inline(always)]
pub(crate) fn events_wanted() -> bool {
    SETTINGS.get(0).is_some_and(|settings| settings.events != 0)
}

/// Writes an event, all of it: `fill` gets memory of any content.
#[inline(always)]
pub(crate) fn write_event(fill: impl FnOnce(*mut Event)) {
    if let Some(mut entry) = EVENTS.reserve::<Event>(0) {
        fill(entry.as_mut_ptr());
        entry.submit(0);
    }
}

/// Changes this CPU's counters of (service, backend), making them on first use.
#[inline(never)]
pub(crate) fn count(service: u32, backend: u32, change: impl Fn(&mut Counters)) {
    let key = CounterKey { service, backend };
    if COUNTERS.get_ptr_mut(key).is_none() {
        // Refused where another CPU has made the element meanwhile, which is as good, and where the map is full.
        let _ = COUNTERS.insert(key, Counters::default(), BPF_NOEXIST.into());
    }
    if let Some(counters) = COUNTERS.get_ptr_mut(key) {
        // SAFETY: a per-CPU value, valid while the program runs. The kernel keeps the program on its CPU, but another of
        // its kind may preempt it there (PREEMPT_RCU): at worst one event goes uncounted.
        change(unsafe { &mut *counters });
    }
}

/// Remembers where a connected UDP socket was sent; None, that it went elsewhere and is not our business any more.
#[inline(never)]
pub(crate) fn note_udp_socket(cookie: u64, socket: Option<&UdpSocket>) {
    match socket {
        // A failure leaves the socket unknown, so it is not ended when its backend goes away.
        Some(socket) => drop(UDP_SOCKETS.insert(cookie, socket, 0)),
        // SAFETY: only the presence of the element is looked at.
        None if unsafe { UDP_SOCKETS.get(cookie) }.is_some() => drop(UDP_SOCKETS.remove(cookie)),
        None => {}
    }
}
