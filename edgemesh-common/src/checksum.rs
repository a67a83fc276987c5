//! The internet checksum (RFC 1071), for headers that are written rather than changed.

/// Adds the words of a header, each as it stands in memory, to a sum.
#[inline(always)]
pub fn add(mut sum: u64, words: &[u32]) -> u64 {
    for word in words {
        sum += u64::from(*word);
    }
    sum
}

/// Folds a sum to its 16 bits, as they stand in memory.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    // Three carries at most: 64 bits to 33, to 18, to 17, to 16.
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    sum as u16
}

/// The checksum of what adds up to `sum`, as it goes into memory.
#[inline(always)]
pub const fn finish(sum: u64) -> u16 {
    !fold(sum)
}

/// The checksum `old` after what it sums up has changed by `change` (RFC 1624).
#[inline(always)]
pub const fn adjust(old: u16, change: u64) -> u16 {
    finish((!old) as u64 + change)
}

/// A checksum field that stays what it is when somebody fills it in: with it the words adding up to `rest` without it
/// have the complement of their whole sum, itself included, in the field.
///
/// The headers that an ICMP error quotes may come from a sender on this machine that left the checksum to the network
/// device. Their packet does not say so, and the device still fills it in after the ICMP checksum was made. With this
/// value there, it makes no difference. Nobody looks at a quoted checksum.
#[inline(always)]
pub const fn fixed_point(rest: u64) -> u16 {
    // c = ~(rest + c) modulo 65,535, where ~x = -x; so 2c = -rest, and the inverse of 2 is 32,768.
    let rest = fold(rest) as u32;
    let c = ((65_535 - rest) % 65_535) * 32_768 % 65_535;
    // Zero stands for "no checksum" in UDP, and a device puts its other form in its place.
    if c == 0 { 0xffff } else { c as u16 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071 by the letter: 16-bit words in network order.
    fn plain(bytes: &[u8]) -> u16 {
        let mut sum = 0_u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    fn words(bytes: &[u8]) -> Vec<u32> {
        bytes.chunks_exact(4).map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]])).collect()
    }

    proptest! {
        #[test]
        fn is_the_checksum_of_the_rfc(bytes in prop::collection::vec(any::<u8>(), 0..40).prop_map(|mut bytes| {
            bytes.truncate(bytes.len() & !3);
            bytes
        })) {
            prop_assert_eq!(finish(add(0, &words(&bytes))).to_ne_bytes(), plain(&bytes).to_be_bytes());
        }

        #[test]
        fn an_adjusted_checksum_is_that_of_the_changed_bytes(
            (before, after) in (any::<[u8; 20]>(), any::<[u8; 20]>()),
        ) {
            // What `bpf_csum_diff` computes: the sum of the new words and of the old ones' complements.
            let complement: Vec<u32> = words(&before).iter().map(|word| !word).collect();
            let change = add(add(0, &words(&after)), &complement);
            let adjusted = adjust(finish(add(0, &words(&before))), change);
            prop_assume!(before.iter().chain(&after).any(|byte| *byte != 0));
            prop_assert_eq!(adjusted, finish(add(0, &words(&after))));
        }

        #[test]
        fn a_fixed_point_survives_being_filled_in(mut header: [u8; 8]) {
            header[6..].fill(0);
            let field = fixed_point(add(0, &words(&header)));
            header[6..].copy_from_slice(&field.to_ne_bytes());
            // What a device does: the complement of the sum over everything, with what is in the field.
            let filled = match plain(&header) {
                0 => 0xffff,
                sum => sum,
            };
            prop_assert_eq!(filled.to_be_bytes(), field.to_ne_bytes());
        }
    }
}
