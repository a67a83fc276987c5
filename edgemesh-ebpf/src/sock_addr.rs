//! The hooks of `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`, written once for both families.

use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::{bpf_get_socket_cookie, bpf_set_retval},
    programs::SockAddrContext,
};
use aya_log_ebpf::warn;
use edgemesh_common::{
    Addr,
    layout::{Backend, Connected, Datagrams, FrontendKey, TCP, UDP, UdpSocket},
    select::{Verdict, select, select_sticky},
};

use crate::maps::{CONNECTED, DATAGRAMS, Maps, count, note_udp_socket};

/// The call goes on, to the address as it now stands.
const PROCEED: i32 = 1;
/// The call fails: with EPERM, or with what `bpf_set_retval` said.
const REJECT: i32 = 0;

const ECONNREFUSED: i32 = 111;

/// Whether the kernel has `bpf_set_retval` (5.18); the agent clears it where it does not, and the verifier then drops
/// the call as dead code.
#[unsafe(no_mangle)]
static HAS_SET_RETVAL: u32 = 1;

/// Reads and writes the address of a call in its family's own fields.
pub(crate) trait Family {
    fn addr(ctx: &SockAddrContext) -> Addr;
    fn set_addr(ctx: &SockAddrContext, addr: &Addr);
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
}

/// `connect()` of a TCP or UDP socket.
#[inline(always)]
pub(crate) fn connect<F: Family>(ctx: &SockAddrContext) -> i32 {
    let Some(proto) = protocol(ctx) else { return PROCEED };
    let key = FrontendKey::new(F::addr(ctx), port(ctx), proto);
    match select(&Maps, &key) {
        Verdict::Untouched => {
            if proto == UDP {
                note_udp_socket(cookie(ctx), None);
            }
            PROCEED
        }
        Verdict::Refuse { service } => refuse(service),
        Verdict::Forward { service, backend, .. } => {
            count(service, backend.id, |c| c.connects += 1);
            if proto == UDP {
                let socket = UdpSocket { backend: backend.addr, port: backend.port, pad: 0, service };
                note_udp_socket(cookie(ctx), Some(&socket));
            }
            // SAFETY: `ctx` carries the socket of the running call.
            let state = unsafe { CONNECTED.get_or_insert_ptr_mut(ctx, None) };
            if state.is_null() {
                warn!(ctx, "no memory for the state of a socket; getpeername will show its backend");
            } else {
                // SAFETY: not null, so it is this socket's storage, which the call holds locked.
                unsafe { *state = Connected::new(&key, &backend, service) };
            }
            redirect::<F>(ctx, &backend);
            PROCEED
        }
    }
}

/// `sendto()`/`sendmsg()` of a UDP socket with an address.
#[inline(always)]
pub(crate) fn sendmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    let key = FrontendKey::new(F::addr(ctx), port(ctx), UDP);
    let earlier = || {
        // SAFETY: `ctx` carries the socket of the running call, which holds it locked; checked for null.
        let state: Option<&Datagrams> = unsafe { DATAGRAMS.get_ptr_mut(ctx).as_ref() };
        state.and_then(|state| state.earlier(&key))
    };
    match select_sticky(&Maps, &key, earlier) {
        Verdict::Untouched => PROCEED,
        Verdict::Refuse { service } => refuse(service),
        Verdict::Forward { service, generation, backend } => {
            count(service, backend.id, |c| c.datagrams += 1);
            // SAFETY: as above.
            match unsafe { DATAGRAMS.get_or_insert_ptr_mut(ctx, None).as_mut() } {
                Some(state) => state.remember(&key, &backend, service, generation),
                None => warn!(ctx, "no memory for the state of a socket; answers will show the backend"),
            }
            redirect::<F>(ctx, &backend);
            PROCEED
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
fn refuse(service: u32) -> i32 {
    count(service, 0, |c| c.refused += 1);
    // SAFETY: a plain read of read-only data that the agent may have set before loading.
    if unsafe { read_volatile(addr_of!(HAS_SET_RETVAL)) } != 0 {
        // SAFETY: takes a number; available to this program type where the flag says so.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    REJECT
}
