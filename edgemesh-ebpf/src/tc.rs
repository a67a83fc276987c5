//! The hooks of `BPF_PROG_TYPE_SCHED_CLS`: Services for those whose sockets never pass a hook of this node.
//!
//! `uplink_ingress` sees what arrives from outside, `guest_ingress` what a guest with a network stack of its own sends.
//! A packet that opens a connection to a frontend gets a backend from [`edgemesh_common::select`] and two entries in
//! `NAT`; from then on one lookup tells what each packet becomes. `uplink_egress` and `guest_egress` turn the answers
//! back that come by the stack; those to a connection under this node's own name arrive at an ingress hook.
//!
//! What is no business of a Service is left as it is, for the next program and the stack: `PASS` below.

mod guard;
mod icmp;
mod maps;
mod packet;
mod refuse;
mod route;

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_ktime_get_ns,
};
use edgemesh_common::{
    layout::{ELSEWHERE, FrontendKey, HAS_SOURCE_RANGES, SCOPE_OUTSIDE, SCOPE_SOCKETS, TCP},
    nat::{
        self, ACK, ANSWERS, CLOSING, DROP_ALIAS, DROP_NO_PORT, DROP_NO_ROUTE, DROP_SOURCE, DROP_UNWRITABLE,
        DROP_WRONG_NODE, GUARD_ONLY, GUEST_EGRESS, GUEST_INGRESS, NO_LINK_HEADER, Nat, Next, REDIRECT, REPLIED, SYN,
        Tuple, UPLINK, UPLINK_EGRESS, UPLINK_INGRESS,
    },
    select::{self, Earlier, Verdict, select_sticky},
};

use self::{
    maps::{FRAGMENTS, INTERFACES, NAT, Scratch, Table, drop_for, ports, scratch},
    packet::{FIRST_FRAGMENT, Kind, LATER_FRAGMENT},
    route::Route,
};
use crate::maps::{Maps, count};

/// On to the next program, then to the stack.
const PASS: i32 = TC_ACT_UNSPEC;
const DROP: i32 = TC_ACT_SHOT;

/// Packets from outside.
#[inline(always)]
pub(crate) fn uplink_ingress(skb: *mut __sk_buff) -> i32 {
    let Some(flags) = flags(skb) else { return PASS };
    if guard::is_for_alias(skb, l3(flags)) {
        return drop_for(DROP_ALIAS);
    }
    if flags & GUARD_ONLY != 0 { PASS } else { incoming(skb, UPLINK_INGRESS) }
}

/// Packets that leave this node.
#[inline(always)]
pub(crate) fn uplink_egress(skb: *mut __sk_buff) -> i32 {
    match flags(skb) {
        Some(flags) if flags & GUARD_ONLY == 0 => outgoing(skb, UPLINK_EGRESS),
        _ => PASS,
    }
}

/// Packets from a guest.
#[inline(always)]
pub(crate) fn guest_ingress(skb: *mut __sk_buff) -> i32 {
    incoming(skb, GUEST_INGRESS)
}

/// Packets to a guest.
#[inline(always)]
pub(crate) fn guest_egress(skb: *mut __sk_buff) -> i32 {
    outgoing(skb, GUEST_EGRESS)
}

#[inline(always)]
fn incoming(skb: *mut __sk_buff, hook: u8) -> i32 {
    let Some(s) = read(skb, hook) else { return PASS };
    if s.packet.kind == Kind::IcmpError {
        return icmp::translate(skb, s);
    }
    let (proto, flags) = (s.packet.tuple.proto, s.packet.flags);
    let now = now();
    let Some(nat) = NAT.get_ptr_mut(s.packet.tuple) else {
        let opens = if proto == TCP { flags & (SYN | ACK) == SYN } else { true };
        if !opens || s.packet.fragment == LATER_FRAGMENT {
            return PASS;
        }
        return connect(skb, s, None, now);
    };
    // SAFETY: see `maps::NAT`.
    let nat = unsafe { &mut *nat };
    let next = if s.packet.fragment == LATER_FRAGMENT { Next::Keep } else { nat.next(proto, flags, now) };
    match next {
        Next::Keep => {
            s.nat = *nat;
            touch(s, nat, now);
            translate(skb, s)
        }
        Next::Confirm => {
            s.nat = *nat;
            connect(skb, s, Some(nat), now)
        }
        Next::Renew => connect(skb, s, None, now),
    }
}

#[inline(always)]
fn outgoing(skb: *mut __sk_buff, hook: u8) -> i32 {
    let Some(s) = read(skb, hook) else { return PASS };
    if s.packet.kind == Kind::IcmpError {
        return icmp::translate(skb, s);
    }
    let Some(nat) = NAT.get_ptr_mut(s.packet.tuple) else { return PASS };
    // SAFETY: see `maps::NAT`.
    let nat = unsafe { &mut *nat };
    s.nat = *nat;
    touch(s, nat, now());
    translate(skb, s)
}

/// What the agent says of the interface; None for one that it does not want programs on.
#[inline(always)]
fn flags(skb: *mut __sk_buff) -> Option<u32> {
    // SAFETY: the program's context, valid while it runs; the same holds wherever `skb` is read.
    let index = unsafe { (*skb).ifindex };
    // SAFETY: an interface's element is replaced, and what may be read in between is one or the other of two settings.
    unsafe { INTERFACES.get(index) }.map(|interface| interface.flags)
}

/// Where the IP header is.
#[inline(always)]
fn l3(flags: u32) -> u32 {
    if flags & NO_LINK_HEADER != 0 { 0 } else { packet::ETHERNET }
}

/// Reads the headers of a packet into the scratch; None for what is never translated.
#[inline(always)]
fn read(skb: *mut __sk_buff, hook: u8) -> Option<&'static mut Scratch> {
    let l3 = l3(flags(skb)?);
    let s = scratch()?;
    packet::parse(skb, l3, hook, &mut s.packet);
    if s.packet.kind == Kind::Other { None } else { Some(s) }
}

/// Finds a backend for the first packet of a connection, or for one whose entry is to be confirmed, and translates it.
#[inline(always)]
fn connect(skb: *mut __sk_buff, s: &mut Scratch, earlier: Option<&mut Nat>, now: u64) -> i32 {
    s.opening.now = now;
    match choose(s, earlier.is_some()) {
        Choice::Untouched => {
            if earlier.is_some() {
                // The frontend is gone, and with it what its clients were told.
                let _ = NAT.remove(s.packet.tuple);
            }
            PASS
        }
        Choice::Refuse => {
            count(s.opening.service, 0, |c| c.refused += 1);
            if has(s, ELSEWHERE) { drop_for(DROP_WRONG_NODE) } else { refuse::refuse(skb, s) }
        }
        Choice::Forward => {
            let chosen = &s.opening;
            if let Some(nat) = earlier
                && s.nat.dst.same(&chosen.backend.addr)
                && s.nat.dst_port == chosen.backend.port
            {
                nat.service = chosen.service;
                nat.generation = chosen.generation;
                nat.backend = chosen.backend.id;
                touch(s, nat, now);
                return translate(skb, s);
            }
            if has(s, HAS_SOURCE_RANGES) && !maps::is_admitted(s.opening.service, &s.packet.tuple.src) {
                return drop_for(DROP_SOURCE);
            }
            // A call of its own and not the last of `open`, which would keep its stack.
            if let Err(reason) = open(skb, s) { drop_for(reason) } else { translate(skb, s) }
        }
    }
}

/// A [`Verdict`], whose details are in [`Scratch::opening`].
enum Choice {
    Untouched,
    Refuse,
    Forward,
}

/// The frontend that the packet is for.
#[inline(always)]
fn key_of(tuple: &Tuple) -> FrontendKey {
    let scope = if tuple.hook == UPLINK_INGRESS { SCOPE_OUTSIDE } else { SCOPE_SOCKETS };
    FrontendKey::new(tuple.dst, tuple.dst_port, tuple.proto).in_scope(scope)
}

/// Whether the packet's frontend has one of these flags.
#[inline(never)]
fn has(s: &Scratch, flags: u32) -> bool {
    select::flags(&Maps, &key_of(&s.packet.tuple)) & flags != 0
}

/// Asks where the packet goes; to the backend of `s.nat` if `earlier` and that is still eligible.
#[inline(never)]
fn choose(s: &mut Scratch, earlier: bool) -> Choice {
    let tuple = &s.packet.tuple;
    let key = key_of(tuple);
    let outside = key.scope == SCOPE_OUTSIDE;
    let nat = &s.nat;
    let known = || {
        if !earlier {
            return None;
        }
        Some(Earlier { service: nat.service, generation: nat.generation, backend: nat.chosen() })
    };
    match select_sticky(&Maps, &key, || tuple.src, known) {
        Verdict::Untouched => Choice::Untouched,
        Verdict::Refuse { service } => {
            s.opening.service = service;
            // What else listens on a node's address is no business of Services, and ClusterIPs are not for the outside.
            if outside && service == 0 { Choice::Untouched } else { Choice::Refuse }
        }
        Verdict::Forward { service, generation, backend } => {
            s.opening.service = service;
            s.opening.generation = generation;
            s.opening.backend = backend;
            Choice::Forward
        }
    }
}

/// Makes the entries of a connection to `s.opening.backend`; `s.nat` is that of the packet. Fails with a reason to drop it.
#[inline(never)]
fn open(skb: *mut __sk_buff, s: &mut Scratch) -> Result<(), u32> {
    let packet = &s.packet;
    let opening = &mut s.opening;
    let outside = packet.tuple.hook == UPLINK_INGRESS;
    opening.source = packet.tuple.src;
    opening.ports = ports();
    opening.masquerade = false;
    opening.answers_at = if outside { UPLINK_EGRESS } else { GUEST_EGRESS };
    if outside {
        // Not to a backend of this node: its answers would not come by here.
        let mut route = Route::default();
        route::find(skb, packet, &packet.tuple.src, &opening.backend.addr, &mut route);
        if let Some(interface) = route.interface()
            && interface.flags & UPLINK != 0
        {
            let Some(source) = interface.source_for(&opening.backend.addr) else { return Err(DROP_NO_ROUTE) };
            opening.source = source;
            opening.masquerade = true;
            opening.answers_at = UPLINK_INGRESS;
        }
    } else if opening.backend.addr.same(&packet.tuple.src) {
        // A guest that was sent to itself: it must answer somebody else, or it would not answer by here.
        // SAFETY: see `read`.
        let interface = unsafe { INTERFACES.get((*skb).ifindex) };
        let Some(source) = interface.and_then(|interface| interface.source_for(&packet.tuple.src)) else {
            return Err(DROP_NO_ROUTE);
        };
        opening.source = source;
        opening.masquerade = true;
        opening.answers_at = GUEST_INGRESS;
    }
    let table = Table { skb };
    if !nat::open(&table, &packet.tuple, opening, &mut s.nat) {
        return Err(DROP_NO_PORT);
    }
    let (service, backend) = (opening.service, opening.backend.id);
    count(service, backend, |c| c.connects += 1);
    Ok(())
}

/// Writes down that a packet of `nat` has passed, of which `s.nat` is a copy.
#[inline(always)]
fn touch(s: &Scratch, nat: &mut Nat, now: u64) {
    let flags = s.packet.flags;
    let (mut state, write) = s.nat.seen(flags, now);
    if state & ANSWERS != 0 {
        state |= REPLIED;
        if state != s.nat.state {
            // The first answer, or the last: the client's direction wants to know.
            let hook = if s.packet.tuple.hook >= GUEST_INGRESS { GUEST_INGRESS } else { UPLINK_INGRESS };
            let there = s.packet.applied(&s.nat).reversed(hook);
            if let Some(forward) = NAT.get_ptr_mut(there) {
                // SAFETY: see `maps::NAT`.
                unsafe { (*forward).state |= state & (REPLIED | CLOSING) };
            }
        }
    }
    if state != s.nat.state {
        nat.state = state;
    }
    if write {
        nat.last_seen = now;
    }
}

/// Makes of the packet what `s.nat` says, and sends it on its way.
#[inline(never)]
fn translate(skb: *mut __sk_buff, s: &mut Scratch) -> i32 {
    let (packet, nat) = (&s.packet, &s.nat);
    if packet.fragment == FIRST_FRAGMENT {
        let [a, b] = packet.tuple.src_port;
        let [c, d] = packet.tuple.dst_port;
        // Without room its other fragments stay what they are, and the packet is lost.
        let _ = FRAGMENTS.insert(packet.fragment_key(), u32::from_ne_bytes([a, b, c, d]), 0);
    }
    if nat.state & REDIRECT == 0 {
        return if packet.rewrite(skb, nat) { PASS } else { drop_for(DROP_UNWRITABLE) };
    }
    if packet.ttl <= 1 {
        return refuse::expired(skb, s);
    }
    let mut route = Route::default();
    route::find(skb, packet, &nat.src, &nat.dst, &mut route);
    if let Some(mtu) = route.too_big() {
        return refuse::too_big(skb, s, mtu);
    }
    if !packet.rewrite(skb, nat) || !packet.decrement_ttl(skb) {
        return drop_for(DROP_UNWRITABLE);
    }
    route.send(skb, packet)
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: takes no argument.
    unsafe { bpf_ktime_get_ns() }
}
