//! Reverse names: of IPv4 by RFC 1035 section 3.5, of IPv6 by RFC 3596 section 2.5.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::name::Labels;

/// The domain of IPv4's, in wire form.
pub(super) const V4: &[u8] = b"\x07in-addr\x04arpa\x00";
/// The domain of IPv6's, in wire form.
pub(super) const V6: &[u8] = b"\x03ip6\x04arpa\x00";

/// The address whose name it is; None for other names, and for those of parts of addresses.
pub(super) fn address(labels: &Labels<'_>) -> Option<IpAddr> {
    if labels.before(V4) == Some(4) {
        let mut octets = [0; 4];
        for (index, octet) in octets.iter_mut().rev().enumerate() {
            *octet = decimal(labels.get(index))?;
        }
        return Some(Ipv4Addr::from(octets).into());
    }
    if labels.before(V6) == Some(32) {
        let mut bits = 0;
        for index in (0..32).rev() {
            bits = bits << 4 | nibble(labels.get(index))?;
        }
        // What is stored is canonical, too.
        return Some(IpAddr::V6(Ipv6Addr::from(bits)).to_canonical());
    }
    None
}

/// Without leading zeros, so that no address has two names.
fn decimal(label: &[u8]) -> Option<u8> {
    match label {
        [b'0'] => Some(0),
        [b'1'..=b'9', rest @ ..] if rest.iter().all(u8::is_ascii_digit) => str::from_utf8(label).ok()?.parse().ok(),
        _ => None,
    }
}

fn nibble(label: &[u8]) -> Option<u128> {
    match label {
        [digit @ b'0'..=b'9'] => Some(u128::from(digit - b'0')),
        [letter @ b'a'..=b'f'] => Some(u128::from(letter - b'a' + 10)),
        _ => None,
    }
}
