//! Answers that a program makes itself, of the packet that it answers: a client is told at once that there is nobody, as
//! a socket on this node is by ECONNREFUSED.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::{
        bpf_ktime_get_ns, bpf_l3_csum_replace, bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail,
        bpf_skb_load_bytes, bpf_skb_store_bytes,
    },
};
use edgemesh_common::{
    checksum,
    layout::TCP,
    nat::{ACK, DROP_EXPIRED, DROP_UNWRITABLE, RST},
};

use super::{
    DROP,
    maps::{HEADER_WORDS, Scratch, drop_for},
    packet::{adjust_l4, difference, load, store},
};

/// Of packets made here.
const TTL: u8 = 64;
/// How many errors a CPU may send (RFC 4443, 2.4 (f)): as the kernel does (`net.ipv4.icmp_msgs_per_sec`), 1000 a second
/// and 50 at once. In nanoseconds.
const ERROR_INTERVAL: u64 = 1_000_000;
const ERROR_BURST: u64 = 50 * ERROR_INTERVAL;

/// Refuses the first packet of a connection: RST for TCP, port unreachable for UDP.
#[inline(always)]
pub(super) fn refuse(skb: *mut __sk_buff, s: &mut Scratch) -> i32 {
    if s.packet.tuple.proto == TCP {
        return reset(skb, s);
    }
    if s.packet.v6 { error(skb, s, 1, 4, 0) } else { error(skb, s, 3, 3, 0) }
}

/// Says that the packet has been through too many routers.
#[inline(always)]
pub(super) fn expired(skb: *mut __sk_buff, s: &mut Scratch) -> i32 {
    let _ = drop_for(DROP_EXPIRED);
    if s.packet.v6 { error(skb, s, 3, 0, 0) } else { error(skb, s, 11, 0, 0) }
}

/// Says that the packet must not be larger than `mtu`.
#[inline(always)]
pub(super) fn too_big(skb: *mut __sk_buff, s: &mut Scratch, mtu: u32) -> i32 {
    if s.packet.v6 { error(skb, s, 2, 0, mtu) } else { error(skb, s, 3, 4, mtu) }
}

/// Turns a SYN into the RST that answers it (RFC 9293, 3.10.7.1), options and all: none of them matters in a RST.
#[inline(never)]
fn reset(skb: *mut __sk_buff, s: &Scratch) -> i32 {
    let packet = &s.packet;
    let mut header = [0_u32; 5];
    if !load(skb, packet.l4, &mut header) {
        return DROP;
    }
    let [offset, ..] = header[3].to_ne_bytes();
    let from = [header[1], header[2], header[3]];
    let acknowledged = u32::from_be(header[1]).wrapping_add(1).to_be();
    let to = [0, acknowledged, u32::from_ne_bytes([offset & 0xf0, RST | ACK, 0, 0])];
    let tuple = &packet.tuple;
    // Addresses and ports change places, which no checksum notices.
    let written = adjust_l4(skb, packet.l4 + 16, difference(&from, &to), false, false)
        && store(skb, packet.l4, &[tuple.dst_port, tuple.src_port], 0)
        && store(skb, packet.l4 + 4, &to, 0)
        && packet.store_addresses(skb, &[tuple.dst, tuple.src], 0);
    if !written || !set_ttl(skb, s) {
        return drop_for(DROP_UNWRITABLE);
    }
    send_back(skb, packet.l3)
}

#[inline(always)]
fn set_ttl(skb: *mut __sk_buff, s: &Scratch) -> bool {
    let packet = &s.packet;
    if packet.v6 {
        return store(skb, packet.l3 + 7, &TTL, BPF_F_RECOMPUTE_CSUM);
    }
    let word = |ttl: u8| u64::from(u16::from_ne_bytes([ttl, packet.tuple.proto]));
    // SAFETY: takes the context and numbers.
    let ok = unsafe { bpf_l3_csum_replace(skb, packet.l3 + 10, word(packet.ttl), word(TTL), 2) == 0 };
    ok && store(skb, packet.l3 + 8, &TTL, 0)
}

/// Sends the packet out where it came in.
#[inline(always)]
fn send_back(skb: *mut __sk_buff, l3: u32) -> i32 {
    let mut link = [[0_u16; 3]; 2];
    if l3 != 0 && !(load(skb, 0, &mut link) && store(skb, 0, &[link[1], link[0]], 0)) {
        return drop_for(DROP_UNWRITABLE);
    }
    // SAFETY: the program's context, and numbers.
    unsafe { bpf_redirect((*skb).ifindex, 0) as i32 }
}

/// Turns the packet into an ICMP error about itself; drops it where there are too many, or where it has options.
#[inline(always)]
fn error(skb: *mut __sk_buff, s: &mut Scratch, kind: u8, code: u8, info: u32) -> i32 {
    // SAFETY: takes no argument.
    let now = unsafe { bpf_ktime_get_ns() };
    // The generic cell rate algorithm.
    let due = if s.next_error > now { s.next_error } else { now };
    if due - now > ERROR_BURST {
        return DROP;
    }
    s.next_error = due + ERROR_INTERVAL;
    let head = u32::from_ne_bytes([kind, code, 0, 0]);
    match (s.packet.v6, s.packet.tuple.proto == TCP) {
        (false, false) => quote::<5, 2>(skb, s, head, info),
        (false, true) => quote::<5, 5>(skb, s, head, info),
        (true, false) => quote::<10, 2>(skb, s, head, info),
        (true, true) => quote::<10, 5>(skb, s, head, info),
    }
}

/// Makes the error, of an IP header of `IP` words, the ICMP header, and a quote of `IP + L4` words: as much as there must
/// be (RFC 792), and of TCP as much as has its checksum in it.
#[inline(never)]
fn quote<const IP: usize, const L4: usize>(skb: *mut __sk_buff, s: &mut Scratch, head: u32, info: u32) -> i32 {
    const { assert!(2 * IP + 2 + L4 <= HEADER_WORDS) };
    let (packet, buffer) = (&s.packet, &mut s.buffer);
    let l3 = packet.l3;
    if packet.l4 - l3 != IP as u32 * 4 {
        return DROP;
    }
    let start = IP + 2;
    let end = start + IP + L4;
    // SAFETY: the context, and the part of a live buffer that is as long as said.
    let quoted =
        unsafe { bpf_skb_load_bytes(skb.cast(), l3, buffer.as_mut_ptr().add(start).cast(), (IP + L4) as u32 * 4) };
    if quoted != 0 {
        return DROP;
    }
    let l4 = start + IP;
    // UDP has its checksum in the upper half of its second word, TCP in the lower one of its fifth.
    let (field, shift) = if L4 == 2 { (l4 + 1, 16) } else { (l4 + 4, 0) };
    buffer[field] &= !(0xffff << shift);
    let rest = checksum::add(0, &buffer[l4..end]);
    buffer[field] |= u32::from(checksum::fixed_point(rest)) << shift;

    let length = (end * 4) as u16;
    let (src, dst) = (packet.tuple.dst, packet.tuple.src);
    buffer[IP] = head;
    buffer[IP + 1] = info.to_be();
    let mut sum = checksum::add(0, &buffer[IP..end]);
    if IP == 5 {
        let [high, low] = length.to_be_bytes();
        buffer[0] = u32::from_ne_bytes([0x45, 0, high, low]);
        buffer[1] = 0;
        buffer[2] = u32::from_ne_bytes([TTL, 1, 0, 0]);
        buffer[3] = src.v4_word();
        buffer[4] = dst.v4_word();
        let header = checksum::finish(checksum::add(0, &buffer[..5]));
        buffer[2] |= u32::from(header) << 16;
    } else {
        let payload = length - 40;
        let [high, low] = payload.to_be_bytes();
        buffer[0] = u32::from_ne_bytes([0x60, 0, 0, 0]);
        buffer[1] = u32::from_ne_bytes([high, low, 58, TTL]);
        let (from, to) = (src.words(), dst.words());
        let mut n = 0;
        while n < 4 {
            buffer[2 + n] = from[n];
            buffer[6 + n] = to[n];
            n += 1;
        }
        // The pseudo-header (RFC 8200, 8.1).
        sum = checksum::add(sum, &from);
        sum = checksum::add(sum, &to);
        sum = checksum::add(sum, &[u32::from(payload).to_be(), 58_u32.to_be()]);
    }
    buffer[IP] |= u32::from(checksum::finish(sum)) << 16;

    // SAFETY: the context and numbers; and a live buffer of the length that is said.
    let written = unsafe {
        bpf_skb_change_tail(skb, l3 + (IP + L4) as u32 * 4, 0) == 0
            && bpf_skb_adjust_room(skb, start as i32 * 4, BPF_ADJ_ROOM_MAC, 0) == 0
            && bpf_skb_store_bytes(skb, l3, buffer.as_ptr().cast(), end as u32 * 4, BPF_F_RECOMPUTE_CSUM.into()) == 0
    };
    if written { send_back(skb, l3) } else { drop_for(DROP_UNWRITABLE) }
}
