//! The program that gives the agent everything that is sent to an alias, to any port: `BPF_PROG_TYPE_SK_LOOKUP`.
//!
//! The range of the aliases is local to the node, so the kernel looks for a socket there, and asks this program before it
//! looks among those that listen. Established connections it finds by itself, as ever.
//!
//! An object of its own, loaded only where there is a tunnel: kernels before Linux 5.12 may have been built without maps
//! of sockets, and serve Services all the same.
//!
//! On the host an empty program, as the other one is.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(not(target_arch = "bpf"), allow(dead_code, reason = "the host build exists for clippy alone"))]

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::{
    macros::{map, sk_lookup},
    maps::SockMap,
    programs::SkLookupContext,
};
use edgemesh_common::{
    alias::{TCP4, TCP6, UDP4, UDP6},
    layout::{TCP, UDP},
};

/// The agent's sockets, by the numbers of `edgemesh_common::alias`. The kernel takes those out that are closed.
#[map]
static ALIAS_SOCKETS: SockMap = SockMap::with_max_entries(4, 0);

/// Network and mask of each range, in words of network order. The agent sets them before it loads the program; as they
/// are here, nothing is in them.
#[unsafe(no_mangle)]
static ALIAS_RANGE_V4: [u32; 2] = [1, 0];
#[unsafe(no_mangle)]
static ALIAS_RANGE_V6: [u32; 8] = [1, 0, 0, 0, 0, 0, 0, 0];

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// `SK_PASS` with a socket assigned: that one; without: whatever the kernel finds.
const PASS: u32 = 1;
/// `SK_DROP`: no socket, so that the kernel refuses the packet (RST, port unreachable).
const REFUSE: u32 = 0;

#[sk_lookup]
fn aliases(ctx: SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    // SAFETY: fields of the program's context, each read as it is declared, as the verifier wants it; the same below.
    let (family, protocol) =
        unsafe { (read_volatile(addr_of!((*lookup).family)), read_volatile(addr_of!((*lookup).protocol))) };
    let v6 = match family {
        AF_INET => false,
        AF_INET6 => true,
        _ => return PASS,
    };
    let (is_alias, tcp, udp) = if v6 { (in_v6(&ctx), TCP6, UDP6) } else { (in_v4(&ctx), TCP4, UDP4) };
    if !is_alias {
        return PASS;
    }
    let socket = if protocol == TCP as u32 {
        tcp
    } else if protocol == UDP as u32 {
        udp
    } else {
        return PASS;
    };
    // While no agent runs, its sockets are gone. To go on would be to meet what else listens on this port of this node,
    // which is not who was asked for.
    if ALIAS_SOCKETS.redirect_sk_lookup(&ctx, socket, 0).is_ok() { PASS } else { REFUSE }
}

#[inline(always)]
fn in_v4(ctx: &SkLookupContext) -> bool {
    // SAFETY: as above; the range is read-only data that the agent may have set before loading.
    unsafe {
        let local = read_volatile(addr_of!((*ctx.lookup).local_ip4));
        local & read_volatile(addr_of!(ALIAS_RANGE_V4[1])) == read_volatile(addr_of!(ALIAS_RANGE_V4[0]))
    }
}

#[inline(always)]
fn in_v6(ctx: &SkLookupContext) -> bool {
    // SAFETY: as above.
    unsafe {
        let word = |index: usize| {
            let network = read_volatile(addr_of!(ALIAS_RANGE_V6[index]));
            let mask = read_volatile(addr_of!(ALIAS_RANGE_V6[index + 4]));
            (network, mask)
        };
        let local = addr_of!((*ctx.lookup).local_ip6);
        let (n0, m0) = word(0);
        let (n1, m1) = word(1);
        let (n2, m2) = word(2);
        let (n3, m3) = word(3);
        read_volatile(addr_of!((*local)[0])) & m0 == n0
            && read_volatile(addr_of!((*local)[1])) & m1 == n1
            && read_volatile(addr_of!((*local)[2])) & m2 == n2
            && read_volatile(addr_of!((*local)[3])) & m3 == n3
    }
}

/// As that of the programs for Services.
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
