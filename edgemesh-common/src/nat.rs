//! Connections that are translated packet by packet: those of clients whose sockets are not on this node.
//!
//! A connection has two entries in `NAT`. The one of its first direction says what the client's packets become, the other
//! what the answers become; each is keyed by the packets it is for, and by the hook that sees them. The layouts here
//! belong to [`crate::layout::VERSION`].

use crate::{
    Addr,
    layout::{Backend, TCP},
};

/// The hooks, as [`Tuple::hook`] has them. One address pair may pass two hooks and mean two different things.
pub const UPLINK_INGRESS: u8 = 0;
pub const UPLINK_EGRESS: u8 = 1;
pub const GUEST_INGRESS: u8 = 2;
pub const GUEST_EGRESS: u8 = 3;

/// Bits of [`Nat::state`].
///
/// The entry is for the answers.
pub const ANSWERS: u32 = 1;
/// The packets leave by the interface that the routing table names, at once: their new source is an address of this
/// node, and what has one of those and comes from outside, the stack takes for forged (RFC 1812, 5.3.8).
pub const REDIRECT: u32 = 1 << 1;
/// The backend has answered.
pub const REPLIED: u32 = 1 << 2;
/// One side has closed or reset the connection.
pub const CLOSING: u32 = 1 << 3;

/// TCP flags (RFC 9293, 3.1).
pub const FIN: u8 = 1;
pub const SYN: u8 = 1 << 1;
pub const RST: u8 = 1 << 2;
pub const ACK: u8 = 1 << 4;

const SECOND: u64 = 1_000_000_000;

/// How long a SYN counts as a repetition of the one before. Repetitions come after 1, 2, 4 and 8 s (RFC 6298); after a
/// longer silence another backend is as good as the one that did not answer.
const SYN_MEMORY: u64 = 10 * SECOND;
/// How long the addresses and ports of a closed connection stay its own: the default of `nf_conntrack_tcp_timeout_time_wait`
/// is as long, and the backend's own TIME-WAIT half as long.
const CLOSED_MEMORY: u64 = 120 * SECOND;
/// How long those of a UDP client do after the last datagram: `nf_conntrack_udp_timeout_stream`.
const UDP_MEMORY: u64 = 120 * SECOND;
/// How exact [`Nat::last_seen`] is: a write for each packet would keep CPUs busy with each other's caches.
const SEEN_GRAIN: u64 = SECOND;

/// How many ports are tried for one connection; with half of them taken, one in a million fails.
pub const PORT_ATTEMPTS: u32 = 20;

/// Key of `NAT`: the packets of one direction.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct Tuple {
    pub src: Addr,
    pub dst: Addr,
    /// Network order, as are all ports here.
    pub src_port: [u8; 2],
    pub dst_port: [u8; 2],
    /// [`TCP`] or [`crate::layout::UDP`].
    pub proto: u8,
    /// The hook that sees these packets.
    pub hook: u8,
    /// Always zero.
    pub pad: u16,
}

impl Tuple {
    /// The other direction, at `hook`.
    #[inline(always)]
    pub const fn reversed(&self, hook: u8) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            src_port: self.dst_port,
            dst_port: self.src_port,
            proto: self.proto,
            hook,
            pad: 0,
        }
    }
}

/// Value of `NAT`: what the packets of its key become.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Nat {
    pub src: Addr,
    pub dst: Addr,
    pub src_port: [u8; 2],
    pub dst_port: [u8; 2],
    /// The frontend's service when the backend was chosen.
    pub service: u32,
    /// The frontend's generation when the backend was chosen or last confirmed.
    pub generation: u32,
    /// [`Backend::id`].
    pub backend: u32,
    /// [`ANSWERS`] and the other bits.
    pub state: u32,
    /// Always zero.
    pub pad: u32,
    /// When the last packet passed, to the second; monotonic, in nanoseconds.
    pub last_seen: u64,
}

/// Key of `FRAGMENTS`: the fragments of one packet (RFC 791, RFC 8200).
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct FragmentKey {
    pub src: Addr,
    pub dst: Addr,
    pub id: u32,
    pub proto: u8,
    pub hook: u8,
    /// Always zero.
    pub pad: u16,
}

/// Value of `INTERFACES` under an interface's index.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Interface {
    /// This node's address on it, for connections that leave by it under the node's name; unspecified (all zero) if
    /// there is none of that family.
    pub v4: Addr,
    pub v6: Addr,
    /// [`NO_LINK_HEADER`] and the other bits.
    pub flags: u32,
}

/// Bits of [`Interface::flags`].
///
/// Its packets begin with their IP header.
pub const NO_LINK_HEADER: u32 = 1;
/// Other nodes and the outside world are behind it.
pub const UPLINK: u32 = 1 << 1;
/// A guest is behind it.
pub const GUEST: u32 = 1 << 2;
/// No Service can be reached from there: packets to aliases are dropped, and no other is looked at.
pub const GUARD_ONLY: u32 = 1 << 3;

impl Interface {
    /// The node's address of the family of `peer`; None if there is none.
    #[inline(always)]
    pub fn source_for(&self, peer: &Addr) -> Option<Addr> {
        let source = if peer.is_v4() { self.v4 } else { self.v6 };
        if source.same(&Addr::default()) { None } else { Some(source) }
    }
}

/// The data part of a key of `SOURCE_RANGES`, a longest-prefix-match map: service, then address. So the prefix length
/// of a key is 32 (the service, whole) and that of the range in the 16-byte form.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct SourceRange {
    /// In network order, as the map compares bit by bit from the first byte on.
    pub service: [u8; 4],
    pub addr: Addr,
}

/// Bits of [`SourceRange::service`].
pub const SERVICE_BITS: u32 = 32;

/// Why a packet was dropped: places of `TC_DROPS`, a per-CPU array.
pub const DROP_NO_PORT: u32 = 0;
pub const DROP_SOURCE: u32 = 1;
pub const DROP_NO_ROUTE: u32 = 2;
pub const DROP_EXPIRED: u32 = 3;
pub const DROP_WRONG_NODE: u32 = 4;
pub const DROP_UNWRITABLE: u32 = 5;
pub const DROP_ALIAS: u32 = 6;
pub const DROP_REASONS: u32 = 7;

const _: () = {
    assert!(size_of::<Tuple>() == 40);
    assert!(size_of::<Nat>() == 64);
    assert!(size_of::<FragmentKey>() == 40);
    assert!(size_of::<Interface>() == 36);
    assert!(size_of::<SourceRange>() == 20);
};

/// What a packet does to the entry that it belongs to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// It becomes what the entry says.
    Keep,
    /// So it does if the entry's backend still is one of the frontend's; else there is a new choice.
    Confirm,
    /// It begins another connection that happens to have the same addresses and ports.
    Renew,
}

impl Nat {
    /// Judges a packet of this entry; `flags` are those of TCP, zero for UDP.
    ///
    /// UDP asks each time whether its backend is still there: nothing else would ever end such a connection.
    #[inline(always)]
    pub fn next(&self, proto: u8, flags: u8, now: u64) -> Next {
        if self.state & ANSWERS != 0 {
            return Next::Keep;
        }
        if proto != TCP {
            return Next::Confirm;
        }
        if flags & (SYN | ACK) != SYN {
            return Next::Keep;
        }
        if self.state & CLOSING != 0 || now.saturating_sub(self.last_seen) > SYN_MEMORY {
            return Next::Renew;
        }
        if self.state & REPLIED != 0 { Next::Keep } else { Next::Confirm }
    }

    /// What a packet with these TCP flags (zero for UDP) changes: the new state, and whether [`Nat::last_seen`] is to be
    /// written.
    #[inline(always)]
    pub fn seen(&self, flags: u8, now: u64) -> (u32, bool) {
        let closing = if flags & (FIN | RST) != 0 { CLOSING } else { 0 };
        (self.state | closing, now.saturating_sub(self.last_seen) > SEEN_GRAIN)
    }

    /// Whether another connection may have the addresses and ports of this one, because it is over.
    #[inline(always)]
    pub fn is_over(&self, proto: u8, now: u64) -> bool {
        let silent = now.saturating_sub(self.last_seen);
        if proto == TCP { self.state & CLOSING != 0 && silent > CLOSED_MEMORY } else { silent > UDP_MEMORY }
    }

    /// The backend as it was when it was chosen.
    #[inline(always)]
    pub const fn chosen(&self) -> Backend {
        Backend { addr: self.dst, port: self.dst_port, pad: 0, id: self.backend }
    }
}

/// The NAT map and what is needed to choose ports: maps and helpers in the kernel, a `HashMap` in the tests.
pub trait Connections {
    /// Looks at an entry where it stands: a program has no room for many copies.
    fn look<R>(&self, key: &Tuple, at: impl FnOnce(&Nat) -> R) -> Option<R>;
    /// Makes the entry; false if there is one already.
    fn create(&self, key: &Tuple, nat: &Nat) -> bool;
    /// Makes or replaces the entry.
    fn put(&self, key: &Tuple, nat: &Nat);
    /// Whether a socket of this node would get packets with these addresses and ports.
    fn has_socket(&self, tuple: &Tuple) -> bool;
    /// A uniformly distributed number.
    fn random(&self) -> u32;
}

/// A connection to be made.
#[derive(Clone, Copy, Debug)]
pub struct Opening {
    pub backend: Backend,
    pub service: u32,
    pub generation: u32,
    /// The source that the backend is to see: the client's own address, or one of this node.
    pub source: Addr,
    /// Whether `source` is this node's, so that its sockets have to be minded, and packets go out at once.
    pub masquerade: bool,
    /// The hook that sees the answers.
    pub answers_at: u8,
    /// The ports to choose from where the client's own does not serve: the first, and how many.
    pub ports: (u16, u16),
    pub now: u64,
}

/// Makes the two entries of a connection whose first packet is `packet`, and puts the one for its direction into
/// `forward`; false if there is no port left to tell its answers from those of others.
///
/// The client's own port is kept where its address is, unless another connection to the same backend has it: such are
/// two connections of one client port to two frontends with a backend in common.
#[inline(always)]
pub fn open<C: Connections>(connections: &C, packet: &Tuple, opening: &Opening, forward: &mut Nat) -> bool {
    let redirect = if opening.masquerade { REDIRECT } else { 0 };
    *forward = Nat {
        src: opening.source,
        dst: opening.backend.addr,
        src_port: packet.src_port,
        dst_port: opening.backend.port,
        service: opening.service,
        generation: opening.generation,
        backend: opening.backend.id,
        state: redirect,
        pad: 0,
        last_seen: opening.now,
    };
    let answer = Nat {
        src: packet.dst,
        dst: packet.src,
        src_port: packet.dst_port,
        dst_port: packet.src_port,
        state: redirect | ANSWERS,
        ..*forward
    };
    let mut key = Tuple {
        src: opening.backend.addr,
        dst: opening.source,
        src_port: opening.backend.port,
        dst_port: packet.src_port,
        proto: packet.proto,
        hook: opening.answers_at,
        pad: 0,
    };
    for attempt in 0..PORT_ATTEMPTS {
        if attempt > 0 || opening.masquerade {
            let (first, count) = opening.ports;
            let offset = ((u64::from(connections.random()) * u64::from(count)) >> 32) as u16;
            key.dst_port = first.wrapping_add(offset).to_be_bytes();
        }
        if opening.masquerade && connections.has_socket(&key) {
            continue;
        }
        let mut mine = connections.create(&key, &answer);
        if !mine {
            // The same client and frontend: an earlier connection of this one, or another CPU with the same packet.
            let free = connections.look(&key, |other| {
                let same = other.dst.same(&answer.dst)
                    && other.src.same(&answer.src)
                    && other.dst_port == answer.dst_port
                    && other.src_port == answer.src_port;
                same || other.is_over(packet.proto, opening.now)
            });
            if free == Some(true) {
                connections.put(&key, &answer);
                mine = true;
            }
        }
        if mine {
            forward.src_port = key.dst_port;
            connections.put(packet, forward);
            return true;
        }
    }
    false
}

#[cfg(feature = "user")]
mod pod {
    use super::{FragmentKey, Interface, Nat, SourceRange, Tuple};

    macro_rules! pod {
        ($($t:ty),*) => {$(
            // SAFETY: `repr(C)`, made of integers and byte arrays alone, without padding (asserted above), so every
            // bit pattern is a value.
            unsafe impl aya::Pod for $t {}
        )*};
    }

    pod!(Tuple, Nat, FragmentKey, Interface, SourceRange);
}

#[cfg(test)]
mod tests;
