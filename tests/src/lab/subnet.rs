//! Address ranges of sites and pods.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use anyhow::{Context as _, Result, ensure};

/// A range of addresses, such as `10.244.1.0/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Subnet {
    base: IpAddr,
    prefix: u8,
}

impl Subnet {
    /// The address `number` places after the first.
    pub(crate) fn nth(self, number: u32) -> IpAddr {
        match self.base {
            IpAddr::V4(base) => Ipv4Addr::from(u32::from(base).wrapping_add(number)).into(),
            IpAddr::V6(base) => Ipv6Addr::from(u128::from(base).wrapping_add(u128::from(number))).into(),
        }
    }

    /// Whether the subnet holds an address.
    pub(crate) fn contains(self, ip: IpAddr) -> bool {
        match (self.base, ip) {
            (IpAddr::V4(base), IpAddr::V4(ip)) => {
                (u32::from(base) ^ u32::from(ip)).checked_shr(32 - u32::from(self.prefix)).unwrap_or(0) == 0
            }
            (IpAddr::V6(base), IpAddr::V6(ip)) => {
                (u128::from(base) ^ u128::from(ip)).checked_shr(128 - u32::from(self.prefix)).unwrap_or(0) == 0
            }
            _ => false,
        }
    }

    /// An address of the subnet with the length of its prefix, as `ip address add` takes it.
    pub(crate) fn with_prefix(self, ip: IpAddr) -> String {
        format!("{ip}/{}", self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let expected = || format!("{text:?} is no subnet; expected a form like 10.244.1.0/24");
        let (base, prefix) = text.split_once('/').with_context(expected)?;
        let base: IpAddr = base.parse().with_context(expected)?;
        let prefix: u8 = prefix.parse().with_context(expected)?;
        ensure!(prefix <= if base.is_ipv4() { 32 } else { 128 }, "{}", expected());
        Ok(Self { base, prefix })
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

/// Parses one subnet per address family.
pub(crate) fn parse_all(texts: &[&str]) -> Result<Vec<Subnet>> {
    texts.iter().map(|text| text.parse()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_its_own_addresses_and_no_others() {
        let subnet: Subnet = "10.244.1.0/24".parse().unwrap();
        assert_eq!(subnet.nth(255), IpAddr::from([10, 244, 1, 255]));
        assert!(subnet.contains(subnet.nth(255)) && !subnet.contains(subnet.nth(256)));
        let six: Subnet = "fd00:10:244:1::/64".parse().unwrap();
        assert!(six.contains(six.nth(7)) && !six.contains(subnet.nth(7)));
        assert_eq!(six.with_prefix(six.nth(1)), "fd00:10:244:1::1/64");
        assert!("0.0.0.0/0".parse::<Subnet>().unwrap().contains(subnet.nth(1)));
    }

    #[test]
    fn refuses_what_is_no_subnet() {
        for text in ["", "10.0.0.0", "10.0.0.0/33", "::/129", "10.0.0/8", "10.0.0.0/x"] {
            text.parse::<Subnet>().unwrap_err();
        }
    }
}
