use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IP address as the maps hold it: 16 bytes in network order, IPv4 in its v4-mapped form (RFC 4291, 2.5.5.2).
///
/// One form for both families means one map and one code path, and IPv6 sockets that carry `::ffff:a.b.c.d` work by
/// construction.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[repr(C, align(4))]
pub struct Addr(pub [u8; 16]);

impl Addr {
    /// Takes the IPv4 address as `bpf_sock_addr.user_ip4` holds it: four bytes in memory order.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self::from_words([0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), word])
    }

    /// Takes the IPv6 address as `bpf_sock_addr.user_ip6` holds it: four words in memory order.
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        let (a, b, c, d) =
            (words[0].to_ne_bytes(), words[1].to_ne_bytes(), words[2].to_ne_bytes(), words[3].to_ne_bytes());
        Self([a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]])
    }

    /// Names the clients of one network namespace by its cookie, where their IP is not known yet, as at `connect()`. No
    /// host has such an address: it is in `::/64`, and cookies are far below those of the v4-mapped form.
    #[inline(always)]
    pub const fn of_netns(cookie: u64) -> Self {
        Self::from_words([0, 0, (cookie >> 32) as u32, cookie as u32])
    }

    /// The four words to store into `bpf_sock_addr.user_ip6`.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        let b = &self.0;
        [
            u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
            u32::from_ne_bytes([b[8], b[9], b[10], b[11]]),
            u32::from_ne_bytes([b[12], b[13], b[14], b[15]]),
        ]
    }

    /// The word to store into `bpf_sock_addr.user_ip4`; meaningful only where [`Addr::is_v4`] holds.
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.words()[3]
    }

    /// Equality in four word comparisons; `==` would become a byte loop in the kernel.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        let (a, b) = (self.words(), other.words());
        (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) == 0
    }

    /// Whether this is one of 127.0.0.0/8 (and not whether it is `::1`).
    #[inline(always)]
    pub const fn is_v4_loopback(&self) -> bool {
        self.is_v4() && self.v4_word() & u32::from_ne_bytes([0xff, 0, 0, 0]) == u32::from_ne_bytes([127, 0, 0, 0])
    }

    /// Whether this is an IPv4 address in its v4-mapped form.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        let w = self.words();
        w[0] == 0 && w[1] == 0 && w[2] == u32::from_ne_bytes([0, 0, 0xff, 0xff])
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Self {
        Self(ip.to_ipv6_mapped().octets())
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(ip: Ipv6Addr) -> Self {
        Self(ip.octets())
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => ip.into(),
        }
    }
}

impl From<Addr> for IpAddr {
    /// The canonical form: a v4-mapped address becomes IPv4 again.
    fn from(addr: Addr) -> Self {
        Ipv6Addr::from(addr.0).to_canonical()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn words_and_bytes_are_the_same_memory(octets: [u8; 16]) {
            let addr = Addr(octets);
            prop_assert_eq!(Addr::from_words(addr.words()), addr);
        }

        #[test]
        fn same_is_equality(a: [u8; 16], byte in 0usize..16, other: u8) {
            let mut b = a;
            b[byte] = other;
            prop_assert_eq!(Addr(a).same(&Addr(b)), a == b);
        }

        #[test]
        fn an_ipv4_address_is_the_same_from_either_hook(octets: [u8; 4]) {
            let ip = Ipv4Addr::from(octets);
            let addr = Addr::from_v4_word(u32::from_ne_bytes(octets));
            prop_assert_eq!(addr, Addr::from(ip));
            prop_assert!(addr.is_v4());
            prop_assert_eq!(addr.v4_word().to_ne_bytes(), octets);
            prop_assert_eq!(IpAddr::from(addr), IpAddr::V4(ip));
        }
    }

    #[test]
    fn only_127_is_the_ipv4_loopback() {
        for (text, loopback) in [
            ("127.0.0.1", true),
            ("127.255.255.254", true),
            ("126.0.0.1", false),
            ("0.0.0.127", false),
            ("::1", false),
            ("::7f00:1", false),
        ] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(Addr::from(ip).is_v4_loopback(), loopback, "{text}");
        }
    }

    #[test]
    fn a_network_namespace_is_no_address_of_a_host() {
        for cookie in [1, 0x1234_5678_9abc] {
            let addr = Addr::of_netns(cookie);
            assert!(!addr.is_v4());
            assert_eq!(addr.words()[..2], [0, 0]);
        }
        assert_ne!(Addr::of_netns(1), Addr::of_netns(1 << 32));
    }

    #[test]
    fn only_v4_mapped_addresses_count_as_ipv4() {
        for (text, v4) in [("::ffff:10.0.0.1", true), ("::10.0.0.1", false), ("fd00::1", false), ("::", false)] {
            let ip: Ipv6Addr = text.parse().unwrap();
            assert_eq!(Addr::from(ip).is_v4(), v4, "{text}");
        }
    }
}
