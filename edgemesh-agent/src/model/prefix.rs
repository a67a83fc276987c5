use std::{fmt, net::IpAddr, str::FromStr};

/// A network: the addresses that share their first `length` bits, `10.0.0.0/8` or `fd00::/8`.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct IpPrefix {
    network: IpAddr,
    length: u8,
}

impl IpPrefix {
    /// A network that is written down in the code: `network` is its first address, `length` within its family.
    pub(crate) const fn written(network: IpAddr, length: u8) -> Self {
        Self { network, length }
    }

    /// The network of that length with this address in it; None if the family has fewer bits.
    pub fn new(address: IpAddr, length: u8) -> Option<Self> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        (length <= bits).then(|| Self { network: masked(address, length), length })
    }

    /// The first address of the network.
    pub fn network(&self) -> IpAddr {
        self.network
    }

    /// How many bits are fixed: 0 to 32 for IPv4, 0 to 128 for IPv6.
    pub fn length(&self) -> u8 {
        self.length
    }

    /// Whether the address lies in the network; never true for one of the other family.
    pub fn contains(&self, address: IpAddr) -> bool {
        masked(address, self.length) == self.network
    }

    /// Whether the two have an address in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.network) || other.contains(self.network)
    }
}

/// A text that is no prefix.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("not of the form ADDRESS/LENGTH")]
pub struct ParsePrefixError;

impl FromStr for IpPrefix {
    type Err = ParsePrefixError;

    /// Bits after the prefix do not matter, as in Kubernetes: `10.1.2.3/8` is `10.0.0.0/8`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, length) = text.split_once('/').ok_or(ParsePrefixError)?;
        let address: IpAddr = address.parse().map_err(|_| ParsePrefixError)?;
        let digits = !length.is_empty() && length.bytes().all(|digit| digit.is_ascii_digit());
        let length = length.parse().ok().filter(|_| digits).ok_or(ParsePrefixError)?;
        Self::new(address, length).ok_or(ParsePrefixError)
    }
}

impl fmt::Display for IpPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.length)
    }
}

fn masked(address: IpAddr, length: u8) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(length.into())).unwrap_or(0);
            IpAddr::V4((u32::from(address) & mask).into())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(length.into())).unwrap_or(0);
            IpAddr::V6((u128::from(address) & mask).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_read_masked_and_written() {
        for (text, shown) in [
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("10.1.2.3/32", "10.1.2.3/32"),
            ("fd00:1::1/16", "fd00::/16"),
            ("::1/128", "::1/128"),
            ("fd00::1/0", "::/0"),
        ] {
            assert_eq!(text.parse::<IpPrefix>().unwrap().to_string(), shown, "{text}");
        }
        for text in ["", "10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/+8", "10.0.0/8", "::/129", "/8", "a/b/c"] {
            assert_eq!(text.parse::<IpPrefix>(), Err(ParsePrefixError), "{text}");
        }
    }

    #[test]
    fn a_prefix_contains_what_shares_its_bits_and_nothing_of_the_other_family() {
        let contains =
            |prefix: &str, address: &str| prefix.parse::<IpPrefix>().unwrap().contains(address.parse().unwrap());
        assert!(contains("10.0.0.0/8", "10.255.0.1") && !contains("10.0.0.0/8", "11.0.0.1"));
        assert!(contains("0.0.0.0/0", "192.0.2.1") && !contains("0.0.0.0/0", "::1"));
        assert!(contains("fd00::/8", "fdff::1") && !contains("fd00::/8", "fe80::1"));
        assert!(contains("192.0.2.1/32", "192.0.2.1") && !contains("192.0.2.1/32", "192.0.2.2"));
        assert!(contains("::/0", "fe80::1") && !contains("::/0", "127.0.0.1"));
        let overlap = |a: &str, b: &str| a.parse::<IpPrefix>().unwrap().overlaps(&b.parse().unwrap());
        assert!(overlap("10.0.0.0/8", "10.1.0.0/16") && overlap("10.1.0.0/16", "10.0.0.0/8"));
        assert!(!overlap("10.0.0.0/16", "10.1.0.0/16") && !overlap("0.0.0.0/0", "::/0"));
    }
}
