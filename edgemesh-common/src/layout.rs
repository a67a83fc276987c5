//! The keys and values of the maps: `repr(C)`, no implicit padding, addresses and ports as bytes in network order.
//!
//! [`VERSION`] and [`SOCKETS_VERSION`] name the directories the maps are pinned in. Any change to a type here, or to what
//! a field means, needs a new version: an agent never adopts maps of another one.

use crate::Addr;

/// The version of the tables, which is every layout below that is not a socket's; part of their pin path.
pub const VERSION: u32 = 2;

/// The version of what sockets remember: [`Connected`], [`Datagrams`] and [`UdpSocket`].
///
/// Apart from the tables', because the tables can be built anew at any time, but what an open socket remembers is known
/// to nobody else.
pub const SOCKETS_VERSION: u32 = 2;

/// How many backends a [`Frontend`] holds itself; a set of this size or smaller is swapped in one map update.
pub const INLINE_BACKENDS: usize = 8;

/// How many (frontend, backend) pairs an unconnected UDP socket remembers; the oldest gives way.
pub const DATAGRAM_FLOWS: usize = 16;

/// IP protocol numbers the data plane translates.
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// Key of `FRONTENDS`: an address, port and protocol that a Service answers on.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[repr(C)]
pub struct FrontendKey {
    pub addr: Addr,
    /// Network order.
    pub port: [u8; 2],
    /// [`TCP`] or [`UDP`].
    pub proto: u8,
    /// Whom it answers: one of the `SCOPE_` constants.
    pub scope: u8,
}

/// [`FrontendKey::scope`]: sockets on this node.
pub const SCOPE_SOCKETS: u8 = 0;
/// [`FrontendKey::scope`]: packets that come from outside, to node ports, external and load balancers' IPs. What they are
/// sent to may differ from what sockets are sent to, by `externalTrafficPolicy`.
pub const SCOPE_OUTSIDE: u8 = 1;
/// [`FrontendKey::scope`]: sockets in the host's network namespace, on 127.0.0.0/8: to all others, that is their own.
pub const SCOPE_HOST: u8 = 2;

impl FrontendKey {
    /// Of [`SCOPE_SOCKETS`].
    #[inline(always)]
    pub const fn new(addr: Addr, port: [u8; 2], proto: u8) -> Self {
        Self { addr, port, proto, scope: SCOPE_SOCKETS }
    }

    /// The same address in another scope.
    #[inline(always)]
    #[must_use]
    pub const fn in_scope(self, scope: u8) -> Self {
        Self { scope, ..self }
    }
}

/// One address to connect to instead of the frontend.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct Backend {
    pub addr: Addr,
    /// Network order.
    pub port: [u8; 2],
    /// Always zero.
    pub pad: u16,
    /// Names this backend in `COUNTERS`; unique on the node while in use, never 0.
    pub id: u32,
}

/// Value of `FRONTENDS`.
///
/// A hash map update replaces the whole element, but the kernel may reuse a freed element while a reader still holds it
/// (since 6.1, and always for preallocated maps), for any key. So the generation stands at both ends, a stamp that no
/// other value has: a reader that sees two different ones knows that it read a mixture. And the value names its key, for
/// a reader that finds another frontend's value, whole. Either way it looks again.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Frontend {
    /// Counts up with each write of any frontend; unique among all values ever written.
    pub generation: u32,
    /// Names the frontend in `BACKENDS`, `RINGS`, `MEMBERS` and `COUNTERS`; unique on the node while in use, never 0.
    pub service: u32,
    /// How many backends are eligible. Up to [`INLINE_BACKENDS`] they are in `inline`; a larger set is in `BACKENDS`
    /// under (service, generation, index).
    pub count: u32,
    /// Any of [`HASH_CLIENT`], [`HAS_MEMBERS`], [`HAS_SOURCE_RANGES`] and [`ELSEWHERE`].
    pub flags: u32,
    /// Names the Service port and family in `AFFINITY`: all of its frontends share what they remember of a client.
    pub affinity: u64,
    /// How long a client stays with its backend after its last connection (`sessionAffinity: ClientIP`); 0 for not at
    /// all.
    pub affinity_seconds: u32,
    /// The key that this is the value of.
    pub key: FrontendKey,
    pub inline: [Backend; INLINE_BACKENDS],
    /// Equals `generation` in every value ever written.
    pub generation_check: u32,
    /// Always zero.
    pub pad: u32,
}

/// [`Frontend::flags`]: the client decides the backend, by [`Ring`] (DestinationRule `consistentHash.useSourceIp`).
pub const HASH_CLIENT: u32 = 1;
/// [`Frontend::flags`]: the backends of this large set can be found by address in `MEMBERS`.
pub const HAS_MEMBERS: u32 = 2;
/// [`Frontend::flags`]: only clients in `SOURCE_RANGES` may connect ([`SCOPE_OUTSIDE`] only).
pub const HAS_SOURCE_RANGES: u32 = 4;
/// [`Frontend::flags`]: other nodes have backends, so that a packet that finds none here went to the wrong node and is
/// dropped, not refused ([`SCOPE_OUTSIDE`] only).
pub const ELSEWHERE: u32 = 8;

/// Places of a [`Ring`].
pub const RING_PLACES: usize = 8192;

/// Value of `RINGS` under [`RingKey`]: which backend, by its index in the set, each share of the clients goes to.
///
/// Each place belongs to the backend that has the highest weight for it (rendezvous hashing, Thaler and Ravishankar
/// 1998), so a backend that comes or goes moves its own places and no other.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Ring {
    pub places: [u16; RING_PLACES],
}

/// Key of `RINGS`.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct RingKey {
    pub service: u32,
    pub generation: u32,
}

/// Key of `AFFINITY`: a client of a Service port.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct AffinityKey {
    /// Its IP; for a socket on this node [`Addr::of_netns`].
    pub client: Addr,
    /// [`Frontend::affinity`] in two halves, as the key is aligned to words.
    pub affinity: [u32; 2],
}

/// Value of `AFFINITY`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Affinity {
    /// CLOCK_MONOTONIC, nanoseconds.
    pub last_used: u64,
    pub backend: Backend,
}

/// Key of `MEMBERS`: a backend of a set that is too large for its frontend and has [`HAS_MEMBERS`].
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct MemberKey {
    pub addr: Addr,
    /// Network order.
    pub port: [u8; 2],
    /// Always zero.
    pub pad: u16,
    pub service: u32,
}

/// Value of `MEMBERS`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Member {
    /// The newest generation of the frontend that has this backend. It is written before that generation is published, so
    /// a backend is in the set that a reader sees if its generation is not older than the set's.
    pub generation: u32,
    /// [`Backend::id`].
    pub id: u32,
}

/// Value of `UDP_SOCKETS` under the socket's cookie: where a connected UDP socket was sent, so that the agent can end it,
/// and no other, when that backend is gone. (The kernel's socket dump does not show the storage of UDP sockets.)
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct UdpSocket {
    pub frontend: FrontendKey,
    pub backend: Addr,
    /// Network order.
    pub backend_port: [u8; 2],
    /// Always zero.
    pub pad: u16,
}

/// Key of `BACKENDS`: one place in a set too large for [`Frontend::inline`].
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(C)]
pub struct BackendKey {
    pub service: u32,
    pub generation: u32,
    pub index: u32,
}

/// Key of `COUNTERS`; `backend` 0 counts what reached no backend.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[repr(C)]
pub struct CounterKey {
    pub service: u32,
    pub backend: u32,
}

/// Value of `COUNTERS`, one per CPU, created by the first event.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Counters {
    /// `connect()` calls translated, TCP and UDP.
    pub connects: u64,
    /// Datagrams of unconnected UDP sockets translated.
    pub datagrams: u64,
    /// Calls answered with ECONNREFUSED.
    pub refused: u64,
}

/// Value of `CONNECTED`, socket storage of a connected TCP or UDP socket: where it thinks it is, and where it is.
///
/// `connect(AF_UNSPEC)` passes no hook, so an entry can outlive its connection; it is believed only while the socket's
/// peer still is `backend`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Connected {
    pub frontend: Addr,
    pub backend: Addr,
    pub frontend_port: [u8; 2],
    pub backend_port: [u8; 2],
    pub service: u32,
}

/// One remembered pair of an unconnected UDP socket.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Flow {
    pub frontend: Addr,
    pub backend: Addr,
    pub frontend_port: [u8; 2],
    pub backend_port: [u8; 2],
    /// The frontend's service when the pair was made; 0 marks an empty slot.
    pub service: u32,
    /// The frontend's generation when the pair was made or last confirmed.
    pub generation: u32,
    /// [`Backend::id`] while this is where datagrams to the frontend go; 0 once they go elsewhere and the pair is kept
    /// only for answers still on their way.
    pub backend_id: u32,
}

/// Value of `DATAGRAMS`, socket storage of an unconnected UDP socket.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Datagrams {
    /// The slot that the next new flow takes.
    pub next: u32,
    /// Always zero.
    pub pad: u32,
    pub flows: [Flow; DATAGRAM_FLOWS],
}

/// Value of `SETTINGS`, at index 0: what the agent switches while the programs run.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Settings {
    /// Whether an [`Event`] is written for each call; 0 for no.
    pub events: u32,
}

/// An entry of the ring buffer `EVENTS`: what became of one call to a Service address.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Event {
    /// CLOCK_MONOTONIC, nanoseconds.
    pub time: u64,
    /// The cookie of the network namespace that the call came from.
    pub netns: u64,
    /// The cookie of the socket.
    pub socket: u64,
    pub frontend: FrontendKey,
    /// Unspecified where the call was refused.
    pub backend: Addr,
    /// Network order.
    pub backend_port: [u8; 2],
    /// One of the `CALL_` constants.
    pub call: u8,
    /// Always zero.
    pub pad: u8,
    /// [`Frontend::service`]; 0 for an unknown port of a Service address.
    pub service: u32,
    /// Always zero.
    pub pad2: u32,
}

/// [`Event::call`]: `connect()`, sent to the backend.
pub const CALL_CONNECT: u8 = 1;
/// [`Event::call`]: `connect()`, refused.
pub const CALL_CONNECT_REFUSED: u8 = 2;
/// [`Event::call`]: a datagram of an unconnected UDP socket, sent to the backend.
pub const CALL_DATAGRAM: u8 = 3;
/// [`Event::call`]: a datagram of an unconnected UDP socket, refused.
pub const CALL_DATAGRAM_REFUSED: u8 = 4;

const _: () = {
    assert!(size_of::<FrontendKey>() == 20);
    assert!(size_of::<Backend>() == 24);
    assert!(size_of::<Frontend>() == 56 + 24 * INLINE_BACKENDS);
    assert!(size_of::<Ring>() == 2 * RING_PLACES && RING_PLACES.is_power_of_two());
    assert!(size_of::<RingKey>() == 8);
    assert!(size_of::<AffinityKey>() == 24);
    assert!(size_of::<Affinity>() == 32);
    assert!(size_of::<MemberKey>() == 24);
    assert!(size_of::<Member>() == 8);
    assert!(size_of::<UdpSocket>() == 40);
    assert!(size_of::<BackendKey>() == 12);
    assert!(size_of::<CounterKey>() == 8);
    assert!(size_of::<Counters>() == 24);
    assert!(size_of::<Connected>() == 40);
    assert!(size_of::<Flow>() == 48);
    assert!(size_of::<Datagrams>() == 8 + 48 * DATAGRAM_FLOWS);
    assert!(size_of::<Settings>() == 4);
    assert!(size_of::<Event>() == 72);
};

#[cfg(feature = "user")]
mod pod {
    use super::{
        Affinity, AffinityKey, Backend, BackendKey, Connected, CounterKey, Counters, Datagrams, Event, Flow, Frontend,
        FrontendKey, Member, MemberKey, Ring, RingKey, Settings, UdpSocket,
    };
    use crate::Addr;

    macro_rules! pod {
        ($($t:ty),*) => {$(
            // SAFETY: `repr(C)`, made of integers and byte arrays alone, without padding (asserted above), so every
            // bit pattern is a value.
            unsafe impl aya::Pod for $t {}
        )*};
    }

    pod!(
        Addr,
        FrontendKey,
        Backend,
        Frontend,
        BackendKey,
        CounterKey,
        Counters,
        Connected,
        Flow,
        Datagrams,
        Ring,
        RingKey,
        AffinityKey,
        Affinity,
        MemberKey,
        Member,
        UdpSocket,
        Settings,
        Event
    );
}
