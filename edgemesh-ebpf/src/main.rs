//! The eBPF programs: a socket that goes to a Service is sent to a backend instead, and believes it is at the Service.
//!
//! A connection's path: `connect4`/`connect6` below read the destination, [`edgemesh_common::select`] picks a backend from
//! the maps in [`maps`], the destination is rewritten and the pair kept in socket storage. `getpeername4`/`6` and
//! `recvmsg4`/`6` turn the backend back into the frontend. Unconnected UDP goes the same way through `sendmsg4`/`6`.
//! After `connect()` nothing of this runs again: the packets of a connection cost what they cost without us.
//!
//! On the host the crate compiles to an empty program, so that clippy and the editor see it like any other.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(not(target_arch = "bpf"), allow(dead_code, reason = "the host build exists for clippy alone"))]

mod maps;
mod sock_addr;
mod tc;

use aya_ebpf::{
    macros::{cgroup_sock_addr, classifier},
    programs::{SockAddrContext, TcContext},
};
use sock_addr::{V4, V6};

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    sock_addr::connect::<V4>(&ctx)
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    sock_addr::connect::<V6>(&ctx)
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    sock_addr::sendmsg::<V4>(&ctx)
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    sock_addr::sendmsg::<V6>(&ctx)
}

#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(ctx: SockAddrContext) -> i32 {
    sock_addr::recvmsg::<V4>(&ctx)
}

#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(ctx: SockAddrContext) -> i32 {
    sock_addr::recvmsg::<V6>(&ctx)
}

#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    sock_addr::getpeername::<V4>(&ctx)
}

#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    sock_addr::getpeername::<V6>(&ctx)
}

#[classifier]
fn uplink_ingress(ctx: TcContext) -> i32 {
    tc::uplink_ingress(ctx.skb.skb)
}

#[classifier]
fn uplink_egress(ctx: TcContext) -> i32 {
    tc::uplink_egress(ctx.skb.skb)
}

#[classifier]
fn guest_ingress(ctx: TcContext) -> i32 {
    tc::guest_ingress(ctx.skb.skb)
}

#[classifier]
fn guest_egress(ctx: TcContext) -> i32 {
    tc::guest_egress(ctx.skb.skb)
}

/// Helpers such as `bpf_set_retval` are for GPL-compatible programs; Apache-2.0 code may be loaded under both.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
