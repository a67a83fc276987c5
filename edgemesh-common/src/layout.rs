//! The keys and values of the maps: `repr(C)`, no implicit padding, addresses and ports as bytes in network order.
//!
//! [`VERSION`] names the directory the maps are pinned in. Any change to a type here, or to what a field means, needs a
//! new version: an agent never adopts maps of another one.

use crate::Addr;

/// The version of every layout below; part of the pin path.
pub const VERSION: u32 = 1;

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
    /// Always zero.
    pub pad: u8,
}

impl FrontendKey {
    #[inline(always)]
    pub const fn new(addr: Addr, port: [u8; 2], proto: u8) -> Self {
        Self { addr, port, proto, pad: 0 }
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
/// The generation stands at both ends. A hash map update replaces the whole element, but the kernel may reuse a freed
/// element while a reader still holds it (since 6.1, and always for preallocated maps); a reader that sees two
/// different stamps knows that it read a mixture and looks again.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Frontend {
    /// Counts up with each update of this frontend.
    pub generation: u32,
    /// Names the Service port and family in `BACKENDS` and `COUNTERS`; unique on the node while in use, never 0.
    pub service: u32,
    /// How many backends are eligible. Up to [`INLINE_BACKENDS`] they are in `inline`; a larger set is in `BACKENDS`
    /// under (service, generation, index).
    pub count: u32,
    pub inline: [Backend; INLINE_BACKENDS],
    /// Equals `generation` in every value ever written.
    pub generation_check: u32,
}

/// Value of `UDP_SOCKETS` under the socket's cookie: where a connected UDP socket was sent, so that the agent can end it,
/// and no other, when that backend is gone. (The kernel's socket dump does not show the storage of UDP sockets.)
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct UdpSocket {
    pub backend: Addr,
    /// Network order.
    pub port: [u8; 2],
    /// Always zero.
    pub pad: u16,
    pub service: u32,
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

const _: () = {
    assert!(size_of::<FrontendKey>() == 20);
    assert!(size_of::<Backend>() == 24);
    assert!(size_of::<Frontend>() == 16 + 24 * INLINE_BACKENDS);
    assert!(size_of::<UdpSocket>() == 24);
    assert!(size_of::<BackendKey>() == 12);
    assert!(size_of::<CounterKey>() == 8);
    assert!(size_of::<Counters>() == 24);
    assert!(size_of::<Connected>() == 40);
    assert!(size_of::<Flow>() == 48);
    assert!(size_of::<Datagrams>() == 8 + 48 * DATAGRAM_FLOWS);
};

#[cfg(feature = "user")]
mod pod {
    use super::{
        Backend, BackendKey, Connected, CounterKey, Counters, Datagrams, Flow, Frontend, FrontendKey, UdpSocket,
    };
    use crate::Addr;

    macro_rules! pod {
        ($($t:ty),*) => {$(
            // SAFETY: `repr(C)`, made of integers and byte arrays alone, without padding (asserted above), so every
            // bit pattern is a value.
            unsafe impl aya::Pod for $t {}
        )*};
    }

    pod!(Addr, FrontendKey, Backend, Frontend, BackendKey, CounterKey, Counters, Connected, Flow, Datagrams, UdpSocket);
}
