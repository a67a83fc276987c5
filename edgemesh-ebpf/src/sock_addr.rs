//! The hooks of `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`, written once for both families.

use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_set_retval},
    programs::SockAddrContext,
};
use aya_log_ebpf::warn;
use edgemesh_common::{
    Addr,
    layout::{
        Backend, CALL_CONNECT, CALL_CONNECT_REFUSED, CALL_DATAGRAM, CALL_DATAGRAM_REFUSED, Connected, Datagrams,
        FrontendKey, SCOPE_HOST, TCP, UDP, UdpSocket,
    },
    select::{Verdict, select, select_sticky},
};

use crate::maps::{CONNECTED, DATAGRAMS, Maps, count, events_wanted, note_udp_socket, write_event};

/// The call goes on, to the address as it now stands.
const PROCEED: i32 = 1;
/// The call fails: with EPERM, or with what `bpf_set_retval` said.
const REJECT: i32 = 0;

const ECONNREFUSED: i32 = 111;

/// Whether the kernel has `bpf_set_retval` (5.18); the agent clears it where it does not, and the verifier then drops
/// the call as dead code.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: u32 = 1;

/// The cookie of the host's network namespace; 0 where the agent cannot know it (before Linux 5.14).
#[unsafe(no_mangle)]
static HOST_NETNS: u64 = 0;

/// Reads and writes the address of a call in its family's own fields.
pub(crate) trait Family {
    fn addr(ctx: &SockAddrContext) -> Addr;
    fn set_addr(ctx: &SockAddrContext, addr: &Addr);
    /// The address that the socket is connected to; unspecified if to none.
    fn peer(ctx: &SockAddrContext) -> Addr;
}

pub(crate) struct V4;
pub(crate) struct V6;

// The verifier wants each context field accessed at its own offset and width, which volatile accesses guarantee.

impl Family for V4 {
    #[inline(always)]
    fn addr(ctx: &SockAddrContext) -> Addr {
        // SAFETY: `sock_addr` is the program's context, valid while it runs; the same holds for all accesses below.
        Addr::from_v4_word(unsafe { read_volatile(addr_of!((*ctx.sock_addr).user_ip4)) })
    }

    #[inline(always)]
    fn set_addr(ctx: &SockAddrContext, addr: &Addr) {
        // SAFETY: see `addr`; the field is writable in every hook used here.
        unsafe { write_volatile(addr_of_mut!((*ctx.sock_addr).user_ip4), addr.v4_word()) }
    }

    #[inline(always)]
    fn peer(ctx: &SockAddrContext) -> Addr {
        // SAFETY: see `socket`.
        Addr::from_v4_word(unsafe { read_volatile(addr_of!((*socket(ctx)).dst_ip4)) })
    }
}

impl Family for V6 {
    #[inline(always)]
    fn addr(ctx: &SockAddrContext) -> Addr {
        let ip: *const bpf_sock_addr = ctx.sock_addr;
        // SAFETY: see `V4::addr`.
        unsafe {
            Addr::from_words([
                read_volatile(addr_of!((*ip).user_ip6[0])),
                read_volatile(addr_of!((*ip).user_ip6[1])),
                read_volatile(addr_of!((*ip).user_ip6[2])),
                read_volatile(addr_of!((*ip).user_ip6[3])),
            ])
        }
    }

    #[inline(always)]
    fn set_addr(ctx: &SockAddrContext, addr: &Addr) {
        let words = addr.words();
        // SAFETY: see `V4::set_addr`.
        unsafe {
            write_volatile(addr_of_mut!((*ctx.sock_addr).user_ip6[0]), words[0]);
            write_volatile(addr_of_mut!((*ctx.sock_addr).user_ip6[1]), words[1]);
            write_volatile(addr_of_mut!((*ctx.sock_addr).user_ip6[2]), words[2]);
            write_volatile(addr_of_mut!((*ctx.sock_addr).user_ip6[3]), words[3]);
        }
    }

    #[inline(always)]
    fn peer(ctx: &SockAddrContext) -> Addr {
        let socket = socket(ctx);
        // SAFETY: see `socket`.
        unsafe {
            Addr::from_words([
                read_volatile(addr_of!((*socket).dst_ip6[0])),
                read_volatile(addr_of!((*socket).dst_ip6[1])),
                read_volatile(addr_of!((*socket).dst_ip6[2])),
                read_volatile(addr_of!((*socket).dst_ip6[3])),
            ])
        }
    }
}

/// `connect()` of a TCP or UDP socket.
#[inline(always)]
pub(crate) fn connect<F: Family>(ctx: &SockAddrContext) -> i32 {
    finish(ctx, translate_connect::<F>(ctx))
}

/// `sendto()`/`sendmsg()` of a UDP socket with an address.
#[inline(always)]
pub(crate) fn sendmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    finish(ctx, translate_datagram::<F>(ctx))
}

/// What a translation returns beside [`PROCEED`] and [`REJECT`]: the call goes on, but there was no memory to remember it.
const FORGOTTEN: i32 = 2;

/// Logs what a translation could not say itself: the logger's stack frame and its own are too large for one program, and
/// by now its own is gone.
#[inline(always)]
fn finish(ctx: &SockAddrContext, outcome: i32) -> i32 {
    if outcome == FORGOTTEN {
        log_forgotten(ctx);
        return PROCEED;
    }
    outcome
}

#[inline(never)]
fn log_forgotten(ctx: &SockAddrContext) {
    warn!(ctx, "no memory for the state of a socket; it will see its backend's address instead of its Service's");
}

#[inline(never)]
fn translate_connect<F: Family>(ctx: &SockAddrContext) -> i32 {
    let Some(proto) = protocol(ctx) else { return PROCEED };
    let key = frontend_key::<F>(ctx, proto);
    match select(&Maps, &key, || client(ctx)) {
        Verdict::Untouched => {
            if proto == UDP {
                note_udp_socket(cookie(ctx), None);
            }
            // SAFETY: `ctx` carries the socket of the running call; checked for null.
            if let Some(state) = unsafe { CONNECTED.get_ptr_mut(ctx).as_mut() } {
                // This connection may go to the backend of the one before: it must not pass for that one.
                *state = Connected::default();
            }
            PROCEED
        }
        Verdict::Refuse { service } => refuse(ctx, &key, service, CALL_CONNECT_REFUSED),
        Verdict::Forward { service, backend, .. } => {
            count(service, backend.id, |c| c.connects += 1);
            if proto == UDP {
                let socket = UdpSocket { frontend: key, backend: backend.addr, backend_port: backend.port, pad: 0 };
                note_udp_socket(cookie(ctx), Some(&socket));
            }
            report(ctx, &key, &backend, service, CALL_CONNECT);
            redirect::<F>(ctx, &backend);
            // SAFETY: `ctx` carries the socket of the running call.
            let state = unsafe { CONNECTED.get_or_insert_ptr_mut(ctx, None) };
            if state.is_null() {
                return FORGOTTEN;
            }
            // SAFETY: not null, so it is this socket's storage, which the call holds locked.
            unsafe { *state = Connected::new(&key, &backend, service) };
            PROCEED
        }
    }
}

#[inline(never)]
fn translate_datagram<F: Family>(ctx: &SockAddrContext) -> i32 {
    let key = frontend_key::<F>(ctx, UDP);
    let earlier = || {
        // SAFETY: `ctx` carries the socket of the running call, which holds it locked; checked for null.
        let state: Option<&Datagrams> = unsafe { DATAGRAMS.get_ptr_mut(ctx).as_ref() };
        state.and_then(|state| state.earlier(&key))
    };
    match select_sticky(&Maps, &key, || client(ctx), earlier) {
        Verdict::Untouched => {
            // SAFETY: as above.
            if let Some(state) = unsafe { DATAGRAMS.get_ptr_mut(ctx).as_mut() } {
                state.forget(&key.addr, key.port);
            }
            PROCEED
        }
        Verdict::Refuse { service } => refuse(ctx, &key, service, CALL_DATAGRAM_REFUSED),
        Verdict::Forward { service, generation, backend } => {
            // SAFETY: as above.
            let connected: Option<&Connected> = unsafe { CONNECTED.get_ptr_mut(ctx).as_ref() };
            if let Some(backend) = connected.and_then(|state| state.backend_of(&key, &F::peer(ctx), peer_port(ctx))) {
                // The address of its own peer: from anywhere else the kernel would not let an answer in.
                count(service, backend.id, |c| c.datagrams += 1);
                report(ctx, &key, &backend, service, CALL_DATAGRAM);
                redirect::<F>(ctx, &backend);
                return PROCEED;
            }
            count(service, backend.id, |c| c.datagrams += 1);
            report(ctx, &key, &backend, service, CALL_DATAGRAM);
            redirect::<F>(ctx, &backend);
            // SAFETY: as above.
            match unsafe { DATAGRAMS.get_or_insert_ptr_mut(ctx, None).as_mut() } {
                Some(state) => {
                    state.remember(&key, &backend, service, generation);
                    PROCEED
                }
                None => FORGOTTEN,
            }
        }
    }
}

/// `recvfrom()`/`recvmsg()` of a UDP socket, after the datagram's source was filled in.
#[inline(always)]
pub(crate) fn recvmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    let (addr, port) = (F::addr(ctx), port(ctx));
    // SAFETY: `ctx` carries the socket of the running call; checked for null.
    let connected: Option<&Connected> = unsafe { CONNECTED.get_ptr_mut(ctx).as_ref() };
    let mut frontend = connected.and_then(|state| state.frontend_of(&addr, port));
    if frontend.is_none() {
        // SAFETY: as above.
        let datagrams: Option<&Datagrams> = unsafe { DATAGRAMS.get_ptr_mut(ctx).as_ref() };
        frontend = datagrams.and_then(|state| state.frontend_of(&addr, port));
    }
    restore::<F>(ctx, frontend)
}

/// `getpeername()` of a connected socket.
#[inline(always)]
pub(crate) fn getpeername<F: Family>(ctx: &SockAddrContext) -> i32 {
    // SAFETY: `ctx` carries the socket of the running call; checked for null.
    let state: Option<&Connected> = unsafe { CONNECTED.get_ptr_mut(ctx).as_ref() };
    let frontend = state.and_then(|state| state.frontend_of(&F::addr(ctx), port(ctx)));
    restore::<F>(ctx, frontend)
}

/// What the call asks for. A socket of the host that goes to 127.0.0.0/8 may mean a node port.
#[inline(always)]
fn frontend_key<F: Family>(ctx: &SockAddrContext, proto: u8) -> FrontendKey {
    let key = FrontendKey::new(F::addr(ctx), port(ctx), proto);
    if !key.addr.is_v4_loopback() {
        return key;
    }
    // SAFETY: a plain read of read-only data that the agent may have set before loading.
    let host = unsafe { read_volatile(addr_of!(HOST_NETNS)) };
    if host != 0 && netns(ctx) == host { key.in_scope(SCOPE_HOST) } else { key }
}

/// Who makes the call, for affinity and hashing: its IP is not known before the kernel has chosen a route, but sockets of
/// one network namespace share it.
#[inline(always)]
fn client(ctx: &SockAddrContext) -> Addr {
    Addr::of_netns(netns(ctx))
}

#[inline(always)]
fn netns(ctx: &SockAddrContext) -> u64 {
    // SAFETY: takes the program's context.
    unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) }
}

/// Tells the agent of a call, if it wants to know.
#[inline(always)]
fn report(ctx: &SockAddrContext, key: &FrontendKey, backend: &Backend, service: u32, call: u8) {
    if events_wanted() {
        write_report(ctx, key, backend, service, call);
    }
}

#[inline(never)]
fn write_report(ctx: &SockAddrContext, key: &FrontendKey, backend: &Backend, service: u32, call: u8) {
    let (netns, socket) = (netns(ctx), cookie(ctx));
    // SAFETY: the helper takes no argument.
    let time = unsafe { bpf_ktime_get_ns() };
    write_event(|event| {
        // SAFETY: `event` is memory of an `Event` in the ring buffer, this program's until it is submitted. All fields are
        // written, one by one: a whole one on the stack is more than there is room for.
        unsafe {
            (*event).time = time;
            (*event).netns = netns;
            (*event).socket = socket;
            (*event).frontend = *key;
            (*event).backend = backend.addr;
            (*event).backend_port = backend.port;
            (*event).call = call;
            (*event).pad = 0;
            (*event).service = service;
            (*event).pad2 = 0;
        }
    });
}

/// Names the socket, as the agent sees it in the kernel's socket dump.
#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: takes the program's context.
    unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) }
}

/// The protocol number to look a socket's destination up with; None for what is never translated.
#[inline(always)]
fn protocol(ctx: &SockAddrContext) -> Option<u8> {
    const IPPROTO_UDPLITE: u32 = 136;
    const IPPROTO_MPTCP: u32 = 262;
    // SAFETY: see `V4::addr`.
    match unsafe { read_volatile(addr_of!((*ctx.sock_addr).protocol)) } {
        // Multipath TCP falls back to TCP with a server that does not speak it.
        6 | IPPROTO_MPTCP => Some(TCP),
        17 | IPPROTO_UDPLITE => Some(UDP),
        _ => None,
    }
}

/// The socket of the running call.
#[inline(always)]
fn socket(ctx: &SockAddrContext) -> *const bpf_sock {
    // SAFETY: see `V4::addr`. The verifier knows the pointer as that of a socket, valid while the program runs.
    unsafe { read_volatile(addr_of!((*ctx.sock_addr).__bindgen_anon_1.sk)) }.cast_const()
}

/// The port that the socket is connected to, in network order.
#[inline(always)]
fn peer_port(ctx: &SockAddrContext) -> [u8; 2] {
    // SAFETY: see `socket`.
    unsafe { read_volatile(addr_of!((*socket(ctx)).dst_port)) }.to_ne_bytes()
}

/// The port in network order: the context field holds the two bytes in its low half, in memory order.
#[inline(always)]
fn port(ctx: &SockAddrContext) -> [u8; 2] {
    // SAFETY: see `V4::addr`.
    (unsafe { read_volatile(addr_of!((*ctx.sock_addr).user_port)) } as u16).to_ne_bytes()
}

#[inline(always)]
fn set_port(ctx: &SockAddrContext, port: [u8; 2]) {
    // SAFETY: see `V4::set_addr`.
    unsafe { write_volatile(addr_of_mut!((*ctx.sock_addr).user_port), u16::from_ne_bytes(port).into()) }
}

#[inline(always)]
fn redirect<F: Family>(ctx: &SockAddrContext, backend: &Backend) {
    F::set_addr(ctx, &backend.addr);
    set_port(ctx, backend.port);
}

#[inline(always)]
fn restore<F: Family>(ctx: &SockAddrContext, frontend: Option<(Addr, [u8; 2])>) -> i32 {
    if let Some((addr, port)) = frontend {
        F::set_addr(ctx, &addr);
        set_port(ctx, port);
    }
    PROCEED
}

#[inline(always)]
fn refuse(ctx: &SockAddrContext, key: &FrontendKey, service: u32, call: u8) -> i32 {
    count(service, 0, |c| c.refused += 1);
    report(ctx, key, &Backend::default(), service, call);
    // SAFETY: a plain read of read-only data that the agent may have set before loading.
    if unsafe { read_volatile(addr_of!(HAS_SET_RETVAL)) } != 0 {
        // SAFETY: takes a number; available to this program type where the flag says so.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    REJECT
}
