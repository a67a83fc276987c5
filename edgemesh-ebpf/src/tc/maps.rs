//! The maps of the connections that are translated packet by packet.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_NO_PREALLOC, BPF_NOEXIST, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
    },
    helpers::{bpf_get_prandom_u32, bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp},
    macros::map,
    maps::{HashMap, LpmTrie, LruHashMap, PerCpuArray, lpm_trie::Key},
};
use edgemesh_common::{
    Addr,
    layout::TCP,
    nat::{Connections, DROP_REASONS, FragmentKey, Interface, Nat, Opening, SourceRange, Tuple},
};

use super::{DROP, icmp::Quote, packet::Packet};

/// Room for an IP header, an ICMP header, and another packet's IP and TCP headers.
pub(super) const HEADER_WORDS: usize = 27;

/// Both directions of every connection. The agent sets the capacity, which an LRU map pays for at once, 160 bytes each.
///
/// The kernel reuses the element of the connection that was silent longest while a program may still hold it. Such a
/// program reads or writes another connection's entry, once: a packet goes astray, which its addressee takes for one
/// that never was its own, or the other connection counts as closed and may get another backend at its next SYN.
#[map]
pub(super) static NAT: LruHashMap<Tuple, Nat> = LruHashMap::with_max_entries(65_536, 0);

/// The ports of packets whose first fragment was translated, for the fragments after it.
#[map]
pub(super) static FRAGMENTS: LruHashMap<FragmentKey, u32> = LruHashMap::with_max_entries(4096, 0);

/// The interfaces that the programs are attached to.
#[map]
pub(super) static INTERFACES: HashMap<u32, Interface> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);

/// Who may use a load balancer's address, where not everybody may; the value is not used.
#[map]
pub(super) static SOURCE_RANGES: LpmTrie<SourceRange, u32> = LpmTrie::with_max_entries(20_000, BPF_F_NO_PREALLOC);

/// How many packets were dropped, by reason.
#[map]
static TC_DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(DROP_REASONS, 0);

/// Where a program keeps what would not fit onto its stack of 512 bytes. Programs here run with bottom halves disabled
/// and call nothing that runs another, so each has it to itself.
#[map]
static TC_SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// See [`TC_SCRATCH`].
#[repr(C)]
pub(super) struct Scratch {
    pub(super) packet: Packet,
    pub(super) nat: Nat,
    pub(super) opening: Opening,
    pub(super) quote: Quote,
    /// Source and destination that an ICMP error is to have.
    pub(super) outer: [Addr; 2],
    /// When the next ICMP error of this CPU is due; see [`super::refuse`].
    pub(super) next_error: u64,
    /// Headers to be written.
    pub(super) buffer: [u32; HEADER_WORDS],
}

/// The ports that stand in for those of clients: the first, and how many. The agent sets them before it loads the
/// programs, outside `net.ipv4.ip_local_port_range`, from which the kernel gives ports to sockets of this node.
#[unsafe(no_mangle)]
static NAT_PORTS: [u16; 2] = [1024, 31_744];

#[inline(always)]
pub(super) fn ports() -> (u16, u16) {
    // SAFETY: plain reads of read-only data that the agent may have set before loading.
    unsafe { (read_volatile(addr_of!(NAT_PORTS[0])), read_volatile(addr_of!(NAT_PORTS[1]))) }
}

#[inline(always)]
pub(super) fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: see `TC_SCRATCH`; zeroes, which it begins with, are a value of its type.
    TC_SCRATCH.get_ptr_mut(0).map(|s| unsafe { &mut *s })
}

/// Whether a client may use the frontend of `service`, which has source ranges.
#[inline(never)]
pub(super) fn is_admitted(service: u32, client: &Addr) -> bool {
    let range = SourceRange { service: service.to_be_bytes(), addr: *client };
    SOURCE_RANGES.get(Key::new(size_of::<SourceRange>() as u32 * 8, range)).is_some()
}

/// Drops the packet and counts it.
#[inline(always)]
pub(super) fn drop_for(reason: u32) -> i32 {
    if let Some(drops) = TC_DROPS.get_ptr_mut(reason) {
        // SAFETY: a per-CPU value, valid while the program runs.
        unsafe { *drops += 1 };
    }
    DROP
}

/// `NAT` as [`Connections`].
pub(super) struct Table {
    pub(super) skb: *mut __sk_buff,
}

impl Connections for Table {
    #[inline(always)]
    fn look<R>(&self, key: &Tuple, at: impl FnOnce(&Nat) -> R) -> Option<R> {
        // SAFETY: see `NAT`.
        unsafe { NAT.get(key) }.map(at)
    }

    #[inline(always)]
    fn create(&self, key: &Tuple, nat: &Nat) -> bool {
        NAT.insert(key, nat, BPF_NOEXIST.into()).is_ok()
    }

    #[inline(always)]
    fn put(&self, key: &Tuple, nat: &Nat) {
        // An LRU map makes room for itself; should it fail all the same, the client repeats its packet.
        let _ = NAT.insert(key, nat, 0);
    }

    #[inline(always)]
    fn has_socket(&self, tuple: &Tuple) -> bool {
        has_socket(self.skb, tuple)
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper takes no argument.
        unsafe { bpf_get_prandom_u32() }
    }
}

#[inline(never)]
fn has_socket(skb: *mut __sk_buff, tuple: &Tuple) -> bool {
    const THIS_NETNS: u64 = u64::MAX;
    let (sport, dport) = (u16::from_ne_bytes(tuple.src_port), u16::from_ne_bytes(tuple.dst_port));
    let (mut wanted, size) = if tuple.dst.is_v4() {
        let ipv4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
            saddr: tuple.src.v4_word(),
            daddr: tuple.dst.v4_word(),
            sport,
            dport,
        };
        let mut wanted = no_socket();
        wanted.__bindgen_anon_1.ipv4 = ipv4;
        (wanted, size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1>())
    } else {
        let ipv6 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 {
            saddr: tuple.src.words(),
            daddr: tuple.dst.words(),
            sport,
            dport,
        };
        (bpf_sock_tuple { __bindgen_anon_1: bpf_sock_tuple__bindgen_ty_1 { ipv6 } }, size_of::<bpf_sock_tuple>())
    };
    // SAFETY: the context, a tuple on the stack and its length; the socket found is released below.
    let socket = unsafe {
        if tuple.proto == TCP {
            bpf_skc_lookup_tcp(skb.cast(), &raw mut wanted, size as u32, THIS_NETNS, 0)
        } else {
            bpf_sk_lookup_udp(skb.cast(), &raw mut wanted, size as u32, THIS_NETNS, 0)
        }
    };
    if socket.is_null() {
        return false;
    }
    // SAFETY: a socket that a lookup returned, and the only use of it.
    unsafe { bpf_sk_release(socket.cast()) };
    true
}

#[inline(always)]
fn no_socket() -> bpf_sock_tuple {
    let ipv6 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 { saddr: [0; 4], daddr: [0; 4], sport: 0, dport: 0 };
    bpf_sock_tuple { __bindgen_anon_1: bpf_sock_tuple__bindgen_ty_1 { ipv6 } }
}
