//! The maps, and the view of them that the selection logic takes.

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST},
    btf_maps::SkStorage,
    helpers::bpf_get_prandom_u32,
    macros::{btf_map, map},
    maps::{HashMap, LruHashMap, PerCpuHashMap},
};
use edgemesh_common::{
    Addr,
    layout::{Backend, BackendKey, Connected, CounterKey, Counters, Datagrams, Frontend, FrontendKey, UdpSocket},
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
static COUNTERS: PerCpuHashMap<CounterKey, Counters> = PerCpuHashMap::with_max_entries(200_000, BPF_F_NO_PREALLOC);

/// An LRU map is preallocated by its nature, so this capacity is paid for at once (about 1.5 MiB). A socket that is
/// pushed out is merely not ended when its backend goes away.
#[map]
static UDP_SOCKETS: LruHashMap<u64, UdpSocket> = LruHashMap::with_max_entries(16_384, 0);

#[btf_map]
pub(crate) static CONNECTED: SkStorage<Connected> = SkStorage::new();

#[btf_map]
pub(crate) static DATAGRAMS: SkStorage<Datagrams> = SkStorage::new();

/// The maps above as [`Tables`].
pub(crate) struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<&Frontend> {
        // SAFETY: the element may be rewritten while it is read; `select` checks its generation stamps for that.
        unsafe { FRONTENDS.get(key) }
    }

    #[inline(always)]
    fn backend(&self, key: &BackendKey) -> Option<Backend> {
        // SAFETY: an element of `BACKENDS` is written before its generation is published and removed long after that
        // generation was replaced, so it does not change while a program can read it.
        unsafe { BACKENDS.get(key) }.copied()
    }

    #[inline(always)]
    fn is_service_addr(&self, addr: &Addr) -> bool {
        // SAFETY: only the presence of the element is looked at.
        unsafe { SERVICE_ADDRS.get(addr) }.is_some()
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper takes no argument and is there for every program type.
        unsafe { bpf_get_prandom_u32() }
    }
}

/// Changes this CPU's counters of (service, backend), making them on first use.
#[inline(always)]
pub(crate) fn count(service: u32, backend: u32, change: impl Fn(&mut Counters)) {
    let key = CounterKey { service, backend };
    if let Some(counters) = COUNTERS.get_ptr_mut(key) {
        // SAFETY: a per-CPU value, and a sock_addr program is not interrupted by another one of its kind on its CPU.
        change(unsafe { &mut *counters });
        return;
    }
    let mut first = Counters::default();
    change(&mut first);
    // Another CPU may have made the element meanwhile, and a full map has no room: at worst one event goes uncounted.
    let _ = COUNTERS.insert(key, first, BPF_NOEXIST.into());
}

/// Remembers where a connected UDP socket was sent; None, that it went elsewhere and is not our business any more.
#[inline(always)]
pub(crate) fn note_udp_socket(cookie: u64, socket: Option<&UdpSocket>) {
    match socket {
        // A failure leaves the socket unknown, so it is not ended when its backend goes away.
        Some(socket) => drop(UDP_SOCKETS.insert(cookie, socket, 0)),
        // SAFETY: only the presence of the element is looked at.
        None if unsafe { UDP_SOCKETS.get(cookie) }.is_some() => drop(UDP_SOCKETS.remove(cookie)),
        None => {}
    }
}
