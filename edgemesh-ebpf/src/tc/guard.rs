//! Keeping the outside from aliases: they are local addresses of this node, and whoever has a route to it could otherwise
//! speak to pods of other sites through it.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::bindings::__sk_buff;

use super::packet::{IPV4, IPV6, load};

/// Network and mask of each range, in words of network order. The agent sets them before it loads the programs; as they
/// are here, nothing is in them.
#[unsafe(no_mangle)]
static ALIAS_RANGE_V4: [u32; 2] = [1, 0];
#[unsafe(no_mangle)]
static ALIAS_RANGE_V6: [u32; 8] = [1, 0, 0, 0, 0, 0, 0, 0];

/// Where the destination stands in an IP header.
const DESTINATION_V4: u32 = 16;
const DESTINATION_V6: u32 = 24;

/// Whether a packet, whatever is in it, is addressed to an alias; `l3` is where its IP header begins.
#[inline(never)]
pub(super) fn is_for_alias(skb: *mut __sk_buff, l3: u32) -> bool {
    // SAFETY: the program's context.
    let protocol = unsafe { (*skb).protocol };
    if protocol == IPV4 {
        let mut destination = 0_u32;
        load(skb, l3 + DESTINATION_V4, &mut destination) && {
            // SAFETY: plain reads of read-only data that the agent may have set before loading; the same below.
            let (network, mask) =
                unsafe { (read_volatile(addr_of!(ALIAS_RANGE_V4[0])), read_volatile(addr_of!(ALIAS_RANGE_V4[1]))) };
            destination & mask == network
        }
    } else if protocol == IPV6 {
        let mut destination = [0_u32; 4];
        if !load(skb, l3 + DESTINATION_V6, &mut destination) {
            return false;
        }
        let mut index = 0;
        while index < 4 {
            // SAFETY: as above.
            let (network, mask) = unsafe {
                (read_volatile(addr_of!(ALIAS_RANGE_V6[index])), read_volatile(addr_of!(ALIAS_RANGE_V6[index + 4])))
            };
            if destination[index] & mask != network {
                return false;
            }
            index += 1;
        }
        true
    } else {
        false
    }
}
