//! Sending a packet on without the stack: by its routing table and its neighbours, but past its checks of the source.

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup,
        bpf_fib_lookup__bindgen_ty_1, bpf_fib_lookup__bindgen_ty_2, bpf_fib_lookup__bindgen_ty_3,
        bpf_fib_lookup__bindgen_ty_4, bpf_fib_lookup__bindgen_ty_5, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1,
    },
    helpers::{bpf_fib_lookup as fib_lookup, bpf_redirect_neigh, bpf_skb_change_head},
};
use edgemesh_common::{
    Addr,
    nat::{DROP_NO_ROUTE, DROP_UNWRITABLE, Interface},
};

use super::{
    maps::{INTERFACES, drop_for},
    packet::{ETHERNET, Packet},
};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Where a packet would go.
#[derive(Default)]
pub(super) struct Route {
    /// What the lookup said.
    outcome: u32,
    ifindex: u32,
    /// For `BPF_FIB_LKUP_RET_FRAG_NEEDED`.
    mtu: u32,
    /// Family and address of the next hop.
    family: u32,
    next_hop: [u32; 4],
}

/// Asks the routing table as for a packet that arrived where this one did, with these addresses.
#[inline(never)]
pub(super) fn find(skb: *mut __sk_buff, packet: &Packet, src: &Addr, dst: &Addr, route: &mut Route) {
    let (family, source, destination) = if packet.v6 {
        (AF_INET6, src.words(), dst.words())
    } else {
        (AF_INET, [src.v4_word(), 0, 0, 0], [dst.v4_word(), 0, 0, 0])
    };
    // SAFETY: the program's context.
    let ifindex = unsafe { (*skb).ifindex };
    let flowinfo = if packet.v6 { 0 } else { u32::from(packet.tos) };
    let mut params = bpf_fib_lookup {
        family,
        l4_protocol: packet.tuple.proto,
        sport: 0,
        dport: 0,
        __bindgen_anon_1: bpf_fib_lookup__bindgen_ty_1 { tot_len: 0 },
        ifindex,
        __bindgen_anon_2: bpf_fib_lookup__bindgen_ty_2 { flowinfo },
        __bindgen_anon_3: bpf_fib_lookup__bindgen_ty_3 { ipv6_src: source },
        __bindgen_anon_4: bpf_fib_lookup__bindgen_ty_4 { ipv6_dst: destination },
        __bindgen_anon_5: bpf_fib_lookup__bindgen_ty_5 { tbid: 0 },
        smac: [0; 6],
        dmac: [0; 6],
    };
    // SAFETY: the context, and parameters on the stack with their length.
    let outcome = unsafe { fib_lookup(skb.cast(), &raw mut params, size_of::<bpf_fib_lookup>() as i32, 0) };
    route.outcome = if outcome < 0 { u32::MAX } else { outcome as u32 };
    route.ifindex = params.ifindex;
    // SAFETY: all readings of these unions are plain numbers.
    unsafe {
        route.mtu = params.__bindgen_anon_1.mtu_result.into();
        route.next_hop = params.__bindgen_anon_4.ipv6_dst;
    }
    // The next hop of an IPv4 route may be an IPv6 address.
    route.family = params.family.into();
}

impl Route {
    /// The interface it leaves by, if that is one of ours. None where the packet is for this node itself, or the table
    /// has no answer, which is the stack's to tell.
    #[inline(always)]
    pub(super) fn interface(&self) -> Option<&'static Interface> {
        match self.outcome {
            // SAFETY: see `super::read`.
            BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED => unsafe {
                INTERFACES.get(self.ifindex)
            },
            _ => None,
        }
    }

    /// The size that the packet must not exceed and does.
    #[inline(always)]
    pub(super) fn too_big(&self) -> Option<u32> {
        if self.outcome == BPF_FIB_LKUP_RET_FRAG_NEEDED { Some(self.mtu) } else { None }
    }

    /// Sends the packet there; the kernel finds the neighbour, and asks for it if need be.
    #[inline(always)]
    pub(super) fn send(&self, skb: *mut __sk_buff, packet: &Packet) -> i32 {
        if !matches!(self.outcome, BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH) {
            return drop_for(DROP_NO_ROUTE);
        }
        // The helper takes a link header away, so there has to be one.
        // SAFETY: takes the context and numbers.
        if packet.l3 == 0 && unsafe { bpf_skb_change_head(skb, ETHERNET, 0) } != 0 {
            return drop_for(DROP_UNWRITABLE);
        }
        let mut neighbour = bpf_redir_neigh {
            nh_family: self.family,
            __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: self.next_hop },
        };
        // SAFETY: parameters on the stack with their length.
        unsafe { bpf_redirect_neigh(self.ifindex, &raw mut neighbour, size_of::<bpf_redir_neigh>() as i32, 0) as i32 }
    }
}
