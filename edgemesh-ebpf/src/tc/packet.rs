//! Reading the headers of a packet, and changing its addresses and ports.
//!
//! Everything goes by the helpers that copy from and to a packet: unlike direct access they reach what is not in its
//! linear part, so no packet has to be pulled together, and they keep the checksums that network devices computed.

use core::mem::offset_of;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM},
    helpers::{bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes},
};
use edgemesh_common::{
    Addr,
    layout::{TCP, UDP},
    nat::{FragmentKey, Nat, Tuple},
};

use super::maps::FRAGMENTS;

/// Length of an Ethernet header.
pub(super) const ETHERNET: u32 = 14;

/// Ethertypes as `__sk_buff.protocol` has them.
pub(super) const IPV4: u32 = (0x0800_u16).to_be() as u32;
pub(super) const IPV6: u32 = (0x86dd_u16).to_be() as u32;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const HOP_BY_HOP: u8 = 0;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// How many extension headers are walked; nobody sends more who means well (RFC 8200, 4.1).
const EXTENSIONS: usize = 4;

/// Places of the checksum in the headers.
const IPV4_CHECKSUM: u32 = 10;
const TCP_CHECKSUM: u32 = 16;
const UDP_CHECKSUM: u32 = 6;

/// Values of [`Packet::fragment`].
pub(super) const FIRST_FRAGMENT: u8 = 1;
pub(super) const LATER_FRAGMENT: u8 = 2;

/// What a packet is.
#[derive(Clone, Copy, Eq, PartialEq)]
#[repr(u8)]
pub(super) enum Kind {
    /// Neither of those below, or not understood.
    Other = 0,
    /// TCP or UDP with the ports known.
    Flow = 1,
    /// An error that quotes another packet.
    IcmpError = 2,
}

/// The headers of a packet.
#[repr(C)]
pub(super) struct Packet {
    /// For an ICMP error the addresses alone are filled in.
    pub(super) tuple: Tuple,
    /// Where the IP header is.
    pub(super) l3: u32,
    /// Where the header after it is, or would be.
    pub(super) l4: u32,
    /// What fragments of one packet have in common.
    pub(super) id: u32,
    /// Of TCP.
    pub(super) flags: u8,
    pub(super) ttl: u8,
    /// 0 for a packet in one piece.
    pub(super) fragment: u8,
    pub(super) v6: bool,
    /// The traffic class, as routing rules may look at it.
    pub(super) tos: u8,
    pub(super) kind: Kind,
}

/// Copies from the packet; false if it is too short.
#[inline(always)]
pub(super) fn load<T>(skb: *mut __sk_buff, at: u32, to: &mut T) -> bool {
    // SAFETY: the context, and a live buffer of the length that is said.
    unsafe { bpf_skb_load_bytes(skb.cast(), at, core::ptr::from_mut(to).cast(), size_of::<T>() as u32) == 0 }
}

/// Copies into the packet; `flags` may be `BPF_F_RECOMPUTE_CSUM`.
#[inline(always)]
pub(super) fn store<T>(skb: *mut __sk_buff, at: u32, from: &T, flags: u32) -> bool {
    // SAFETY: the context, and a live buffer of the length that is said.
    unsafe { bpf_skb_store_bytes(skb, at, core::ptr::from_ref(from).cast(), size_of::<T>() as u32, flags.into()) == 0 }
}

/// What a checksum changes by when `from` becomes `to`; None only where the kernel refuses the sizes.
#[inline(always)]
pub(super) fn difference<T>(from: &T, to: &T) -> u64 {
    let size = const { size_of::<T>() as u32 };
    // SAFETY: two live buffers of the length that is said, a multiple of 4; the helper writes to neither.
    unsafe {
        bpf_csum_diff(
            core::ptr::from_ref(from).cast_mut().cast(),
            size,
            core::ptr::from_ref(to).cast_mut().cast(),
            size,
            0,
        ) as u64
    }
}

/// Both addresses of a tuple, where they stand.
#[inline(always)]
pub(super) fn addresses(tuple: &Tuple) -> &[Addr; 2] {
    const { assert!(offset_of!(Tuple, src) == 0 && offset_of!(Tuple, dst) == 16) };
    // SAFETY: the first two fields of a `repr(C)` struct, without a gap.
    unsafe { &*core::ptr::from_ref(tuple).cast() }
}

/// Both addresses that an entry gives to packets, where they stand.
#[inline(always)]
pub(super) fn translated(nat: &Nat) -> &[Addr; 2] {
    const { assert!(offset_of!(Nat, src) == 0 && offset_of!(Nat, dst) == 16) };
    // SAFETY: as above.
    unsafe { &*core::ptr::from_ref(nat).cast() }
}

/// Changes the checksum of a TCP, UDP or ICMP header by `change`; of the addresses if `addresses`.
#[inline(always)]
pub(super) fn adjust_l4(skb: *mut __sk_buff, at: u32, change: u64, addresses: bool, udp: bool) -> bool {
    let mut flags = 0;
    if addresses {
        flags |= BPF_F_PSEUDO_HDR;
    }
    if udp {
        // Zero is "no checksum", and stays it.
        flags |= BPF_F_MARK_MANGLED_0;
    }
    // SAFETY: takes the context and numbers.
    unsafe { bpf_l4_csum_replace(skb, at, 0, change, flags.into()) == 0 }
}

/// Reads the headers into `packet`, whose `kind` says what came of it.
#[inline(never)]
pub(super) fn parse(skb: *mut __sk_buff, l3: u32, hook: u8, packet: &mut Packet) {
    packet.kind = Kind::Other;
    packet.l3 = l3;
    packet.tuple.hook = hook;
    packet.tuple.pad = 0;
    packet.fragment = 0;
    packet.flags = 0;
    packet.id = 0;
    // SAFETY: the program's context.
    let (protocol, vlan) = unsafe { ((*skb).protocol, (*skb).vlan_present) };
    if vlan != 0 {
        // It is for the device of the VLAN, which has programs of its own.
        return;
    }
    let next = match protocol {
        IPV4 => ipv4(skb, packet),
        IPV6 => ipv6(skb, packet),
        _ => return,
    };
    let Some(next) = next else { return };
    packet.tuple.proto = next;
    match next {
        TCP | UDP if packet.fragment == LATER_FRAGMENT => {
            // SAFETY: written once, before the next fragment can come by.
            let Some(ports) = (unsafe { FRAGMENTS.get(packet.fragment_key()) }) else { return };
            let [a, b, c, d] = ports.to_ne_bytes();
            packet.tuple.src_port = [a, b];
            packet.tuple.dst_port = [c, d];
            packet.kind = Kind::Flow;
        }
        TCP => {
            let mut header = [0_u32; 5];
            if load(skb, packet.l4, &mut header) {
                set_ports(packet, header[0]);
                packet.flags = header[3].to_ne_bytes()[1];
                packet.kind = Kind::Flow;
            }
        }
        UDP => {
            let mut header = [0_u32; 2];
            if load(skb, packet.l4, &mut header) {
                set_ports(packet, header[0]);
                packet.kind = Kind::Flow;
            }
        }
        ICMP | ICMPV6 if packet.fragment == 0 && (next == ICMPV6) == packet.v6 => {
            let mut kind = 0_u8;
            if load(skb, packet.l4, &mut kind) && is_error(packet.v6, kind) {
                packet.kind = Kind::IcmpError;
            }
        }
        _ => {}
    }
}

#[inline(always)]
fn set_ports(packet: &mut Packet, word: u32) {
    let [a, b, c, d] = word.to_ne_bytes();
    packet.tuple.src_port = [a, b];
    packet.tuple.dst_port = [c, d];
}

/// Unreachable, time exceeded, parameter problem; for IPv6 also packet too big (RFC 792, RFC 4443).
#[inline(always)]
const fn is_error(v6: bool, kind: u8) -> bool {
    if v6 { kind >= 1 && kind <= 4 } else { matches!(kind, 3 | 11 | 12) }
}

#[inline(always)]
fn ipv4(skb: *mut __sk_buff, packet: &mut Packet) -> Option<u8> {
    let mut header = [0_u32; 5];
    if !load(skb, packet.l3, &mut header) {
        return None;
    }
    let [version, tos, ..] = header[0].to_ne_bytes();
    let length = u32::from(version & 0xf) * 4;
    if version >> 4 != 4 || length < 20 {
        return None;
    }
    let [id_high, id_low, fragment_high, fragment_low] = header[1].to_ne_bytes();
    let fragment = u16::from_be_bytes([fragment_high, fragment_low]);
    if fragment & 0x1fff != 0 {
        packet.fragment = LATER_FRAGMENT;
    } else if fragment & 0x2000 != 0 {
        packet.fragment = FIRST_FRAGMENT;
    }
    packet.id = u16::from_be_bytes([id_high, id_low]).into();
    let [ttl, proto, ..] = header[2].to_ne_bytes();
    packet.v6 = false;
    packet.ttl = ttl;
    packet.tos = tos;
    packet.l4 = packet.l3 + length;
    packet.tuple.src = Addr::from_v4_word(header[3]);
    packet.tuple.dst = Addr::from_v4_word(header[4]);
    Some(proto)
}

#[inline(always)]
fn ipv6(skb: *mut __sk_buff, packet: &mut Packet) -> Option<u8> {
    let mut header = [0_u32; 10];
    if !load(skb, packet.l3, &mut header) {
        return None;
    }
    let [version, class, ..] = header[0].to_ne_bytes();
    if version >> 4 != 6 {
        return None;
    }
    let [_, _, mut next, ttl] = header[1].to_ne_bytes();
    packet.v6 = true;
    packet.ttl = ttl;
    packet.tos = version << 4 | class >> 4;
    packet.tuple.src = Addr::from_words([header[2], header[3], header[4], header[5]]);
    packet.tuple.dst = Addr::from_words([header[6], header[7], header[8], header[9]]);
    if packet.tuple.src.is_v4() || packet.tuple.dst.is_v4() {
        // Not for the wire (RFC 4291, 2.5.5.2), and here they would be IPv4's.
        return None;
    }
    packet.l4 = packet.l3 + 40;
    for _ in 0..EXTENSIONS {
        let mut extension = [0_u32; 2];
        if !matches!(next, HOP_BY_HOP | DESTINATION_OPTIONS | FRAGMENT) {
            // With a routing header, the destination is not where the packet is to end up: that is passed over, too.
            return Some(next);
        }
        if !load(skb, packet.l4, &mut extension) {
            return None;
        }
        let [after, length, offset_high, offset_low] = extension[0].to_ne_bytes();
        if next == FRAGMENT {
            let offset = u16::from_be_bytes([offset_high, offset_low]);
            if offset & 0xfff8 != 0 {
                packet.fragment = LATER_FRAGMENT;
            } else if offset & 1 != 0 {
                packet.fragment = FIRST_FRAGMENT;
            }
            packet.id = extension[1];
            packet.l4 += 8;
            next = after;
            if packet.fragment == LATER_FRAGMENT {
                // What follows is the middle of something.
                return Some(next);
            }
        } else {
            packet.l4 += (u32::from(length) + 1) * 8;
            next = after;
        }
    }
    None
}

impl Packet {
    #[inline(always)]
    pub(super) fn fragment_key(&self) -> FragmentKey {
        FragmentKey {
            src: self.tuple.src,
            dst: self.tuple.dst,
            id: self.id,
            proto: self.tuple.proto,
            hook: self.tuple.hook,
            pad: 0,
        }
    }

    /// The packet's addresses and ports as `nat` makes them.
    #[inline(always)]
    pub(super) fn applied(&self, nat: &Nat) -> Tuple {
        Tuple { src: nat.src, dst: nat.dst, src_port: nat.src_port, dst_port: nat.dst_port, ..self.tuple }
    }

    /// Writes the addresses and ports of `nat`; false if the packet cannot be written to.
    #[inline(never)]
    pub(super) fn rewrite(&self, skb: *mut __sk_buff, nat: &Nat) -> bool {
        let change = difference(addresses(&self.tuple), translated(nat));
        if self.fragment != LATER_FRAGMENT {
            let udp = self.tuple.proto == UDP;
            let checksum = self.l4 + if udp { UDP_CHECKSUM } else { TCP_CHECKSUM };
            let from = [self.tuple.src_port, self.tuple.dst_port];
            let to = [nat.src_port, nat.dst_port];
            let ports = difference(&from, &to);
            if !adjust_l4(skb, checksum, change, true, udp)
                || !adjust_l4(skb, checksum, ports, false, udp)
                || !store(skb, self.l4, &to, 0)
            {
                return false;
            }
        }
        self.store_addresses(skb, translated(nat), change)
    }

    /// Writes addresses into the IP header, whose difference to those there is `change`.
    #[inline(always)]
    pub(super) fn store_addresses(&self, skb: *mut __sk_buff, to: &[Addr; 2], change: u64) -> bool {
        if self.v6 {
            // IPv6 has no checksum of its own to balance that of the payload in what a device summed up.
            return store(skb, self.l3 + 8, to, BPF_F_RECOMPUTE_CSUM);
        }
        let words = [to[0].v4_word(), to[1].v4_word()];
        // SAFETY: takes the context and numbers.
        let ok = unsafe { bpf_l3_csum_replace(skb, self.l3 + IPV4_CHECKSUM, 0, change, 0) == 0 };
        ok && store(skb, self.l3 + 12, &words, 0)
    }

    /// Takes one from the time to live, which must be more than one.
    #[inline(always)]
    pub(super) fn decrement_ttl(&self, skb: *mut __sk_buff) -> bool {
        let ttl = self.ttl - 1;
        if self.v6 {
            return store(skb, self.l3 + 7, &ttl, BPF_F_RECOMPUTE_CSUM);
        }
        let word = |ttl: u8| u64::from(u16::from_ne_bytes([ttl, self.tuple.proto]));
        // SAFETY: takes the context and numbers.
        let ok = unsafe { bpf_l3_csum_replace(skb, self.l3 + IPV4_CHECKSUM, word(self.ttl), word(ttl), 2) == 0 };
        ok && store(skb, self.l3 + 8, &ttl, 0)
    }
}
