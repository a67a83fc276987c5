//! ICMP errors about packets that were translated, so that path MTU discovery and refused datagrams work.

use aya_ebpf::{bindings::__sk_buff, helpers::bpf_l3_csum_replace};
use edgemesh_common::{
    Addr, checksum,
    layout::{TCP, UDP},
    nat::{DROP_EXPIRED, DROP_UNWRITABLE, REDIRECT, Tuple},
};

use super::{
    PASS,
    maps::{NAT, Scratch, drop_for},
    packet::{addresses, adjust_l4, difference, load, store, translated},
    route::{self, Route},
};

/// Length of the header before the quoted packet.
const HEADER: u32 = 8;
/// Place of the checksum in it.
const CHECKSUM: u32 = 2;

/// Where the quoted packet's headers are, and its addresses and ports turned round: the key of the entry for what
/// answers it, which says what the packet itself was before it was translated.
#[derive(Default)]
#[repr(C)]
pub(super) struct Quote {
    l3: u32,
    l4: u32,
    answer: Tuple,
}

/// Translates an error as the packets that come from where it comes from, and the packet that it quotes back into what
/// the addressee sent.
#[inline(never)]
pub(super) fn translate(skb: *mut __sk_buff, s: &mut Scratch) -> i32 {
    s.quote.l3 = s.packet.l4 + HEADER;
    s.quote.answer.hook = s.packet.tuple.hook;
    s.quote.answer.pad = 0;
    let known = if s.packet.v6 { quoted_v6(skb, &mut s.quote) } else { quoted_v4(skb, &mut s.quote) };
    // An error goes to the sender of what it quotes.
    if !known || !s.packet.tuple.dst.same(&s.quote.answer.dst) {
        return PASS;
    }
    // SAFETY: see `super::maps::NAT`.
    let Some(nat) = (unsafe { NAT.get(s.quote.answer) }) else { return PASS };
    s.nat = *nat;
    // A router speaks for itself, the backend as the frontend.
    let speaks_for_backend = s.packet.tuple.src.same(&s.quote.answer.src);
    s.outer[0] = if speaks_for_backend { s.nat.src } else { s.packet.tuple.src };
    s.outer[1] = s.nat.dst;
    if s.nat.state & REDIRECT == 0 {
        return if rewrite(skb, s) { PASS } else { drop_for(DROP_UNWRITABLE) };
    }
    if s.packet.ttl <= 1 {
        return drop_for(DROP_EXPIRED);
    }
    let mut route = Route::default();
    route::find(skb, &s.packet, &s.outer[0], &s.outer[1], &mut route);
    if !rewrite(skb, s) || !s.packet.decrement_ttl(skb) {
        return drop_for(DROP_UNWRITABLE);
    }
    route.send(skb, &s.packet)
}

#[inline(always)]
fn quoted_v4(skb: *mut __sk_buff, quote: &mut Quote) -> bool {
    let mut header = [0_u32; 5];
    if !load(skb, quote.l3, &mut header) {
        return false;
    }
    let [version, ..] = header[0].to_ne_bytes();
    let [_, _, fragment_high, fragment_low] = header[1].to_ne_bytes();
    let length = u32::from(version & 0xf) * 4;
    if version >> 4 != 4 || length < 20 || u16::from_be_bytes([fragment_high, fragment_low]) & 0x1fff != 0 {
        return false;
    }
    quote.l4 = quote.l3 + length;
    quote.answer.dst = Addr::from_v4_word(header[3]);
    quote.answer.src = Addr::from_v4_word(header[4]);
    quoted_ports(skb, quote, header[2].to_ne_bytes()[1])
}

#[inline(always)]
fn quoted_v6(skb: *mut __sk_buff, quote: &mut Quote) -> bool {
    let mut header = [0_u32; 10];
    if !load(skb, quote.l3, &mut header) || header[0].to_ne_bytes()[0] >> 4 != 6 {
        return false;
    }
    quote.l4 = quote.l3 + 40;
    quote.answer.dst = Addr::from_words([header[2], header[3], header[4], header[5]]);
    quote.answer.src = Addr::from_words([header[6], header[7], header[8], header[9]]);
    // What has extension headers stays untranslated: IPv6 is fragmented by its sender alone, who knows.
    quoted_ports(skb, quote, header[1].to_ne_bytes()[2])
}

#[inline(always)]
fn quoted_ports(skb: *mut __sk_buff, quote: &mut Quote, proto: u8) -> bool {
    let mut ports = [[0_u8; 2]; 2];
    if (proto != TCP && proto != UDP) || !load(skb, quote.l4, &mut ports) {
        return false;
    }
    quote.answer.proto = proto;
    quote.answer.dst_port = ports[0];
    quote.answer.src_port = ports[1];
    true
}

/// Writes the addresses of the error and those in what it quotes, and all checksums there are.
#[inline(never)]
fn rewrite(skb: *mut __sk_buff, s: &Scratch) -> bool {
    let (packet, quote, nat) = (&s.packet, &s.quote, &s.nat);
    let icmp = packet.l4 + CHECKSUM;
    // The quoted packet came from where the answers go; a sum does not know the difference.
    let change = difference(addresses(&quote.answer), translated(nat));
    let to = [nat.dst_port, nat.src_port];
    let ports = difference(&[quote.answer.dst_port, quote.answer.src_port], &to);

    let at = quote.l4 + if quote.answer.proto == UDP { 6 } else { 16 };
    let mut old = 0_u16;
    // Not all that quote TCP quote as far as to its checksum; zero is "no checksum" in UDP.
    if load(skb, at, &mut old) && (old != 0 || quote.answer.proto == TCP) {
        let new = checksum::adjust(old, change + ports);
        let field = difference(&[old, 0], &[new, 0]);
        if !store(skb, at, &new, 0) || !adjust_l4(skb, icmp, field, false, false) {
            return false;
        }
    }
    if !adjust_l4(skb, icmp, ports, false, false) || !store(skb, quote.l4, &to, 0) {
        return false;
    }
    let outer = difference(addresses(&packet.tuple), &s.outer);
    let quoted = if packet.v6 {
        // ICMPv6 sums up the addresses of its own packet, too.
        adjust_l4(skb, icmp, change, false, false)
            && adjust_l4(skb, icmp, outer, true, false)
            && store(skb, quote.l3 + 8, &nat.dst, 0)
            && store(skb, quote.l3 + 24, &nat.src, 0)
    } else {
        // The header's own checksum balances its addresses.
        // SAFETY: takes the context and numbers.
        let ok = unsafe { bpf_l3_csum_replace(skb, quote.l3 + 10, 0, change, 0) == 0 };
        ok && store(skb, quote.l3 + 12, &[nat.dst.v4_word(), nat.src.v4_word()], 0)
    };
    quoted && packet.store_addresses(skb, &s.outer, outer)
}
