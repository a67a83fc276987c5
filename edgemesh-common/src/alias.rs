//! What the programs know of aliases: which socket of the agent takes what, and which addresses are aliases.

/// Places in `ALIAS_SOCKETS`.
pub const TCP4: u32 = 0;
pub const TCP6: u32 = 1;
pub const UDP4: u32 = 2;
pub const UDP6: u32 = 3;

/// Network and mask of a range of IPv4 in words of network order, as the programs compare them; nothing is in the default.
pub const NO_RANGE_V4: [u32; 2] = [1, 0];
/// Network (four words) and mask of a range of IPv6.
pub const NO_RANGE_V6: [u32; 8] = [1, 0, 0, 0, 0, 0, 0, 0];

/// A range of IPv4 for the programs: its first address and how many bits are fixed (1 to 32).
pub const fn range_v4(network: [u8; 4], length: u8) -> [u32; 2] {
    let mask = u32::MAX << (32 - length as u32);
    [u32::from_ne_bytes(network), mask.to_be()]
}

/// A range of IPv6 for the programs: its first address and how many bits are fixed (1 to 128).
pub const fn range_v6(network: [u8; 16], length: u8) -> [u32; 8] {
    let mask = (u128::MAX << (128 - length as u32)).to_be_bytes();
    let mut words = [0; 8];
    let mut index = 0;
    while index < 4 {
        let at = index * 4;
        words[index] = u32::from_ne_bytes([network[at], network[at + 1], network[at + 2], network[at + 3]]);
        words[index + 4] = u32::from_ne_bytes([mask[at], mask[at + 1], mask[at + 2], mask[at + 3]]);
        index += 1;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_v4(range: [u32; 2], address: [u8; 4]) -> bool {
        u32::from_ne_bytes(address) & range[1] == range[0]
    }

    #[test]
    fn an_address_is_in_a_range_if_its_masked_words_are_the_network() {
        let range = range_v4([198, 18, 0, 0], 16);
        assert!(in_v4(range, [198, 18, 255, 255]) && !in_v4(range, [198, 19, 0, 0]));
        assert!(in_v4(range_v4([10, 0, 0, 0], 8), [10, 1, 2, 3]));
        for address in [[0; 4], [255; 4], [0, 0, 0, 1], [1, 0, 0, 0]] {
            assert!(!in_v4(NO_RANGE_V4, address));
        }
        let network = [0xfd, 0x6d, 0xe5, 0x4a, 0x1a, 0x5e, 0xa1, 0x1a, 0, 0, 0, 0, 0, 0, 0, 0];
        let range = range_v6(network, 64);
        assert_eq!(range[4..], [u32::MAX, u32::MAX, 0, 0]);
        assert_eq!(range[0], u32::from_ne_bytes([0xfd, 0x6d, 0xe5, 0x4a]));
        assert_eq!(range_v6(network, 48)[5].to_be(), 0xffff_0000);
    }
}
