//! Who may use a load balancer's address: `spec.loadBalancerSourceRanges`, a longest-prefix-match map for all Services.

use std::collections::{BTreeMap, BTreeSet};

use aya::maps::{MapError, lpm_trie::Key};
use edgemesh_common::{
    Addr,
    nat::{SERVICE_BITS, SourceRange},
};
use tracing::warn;

use super::{Ebpf, OpenError, absent_is_fine, is_full, kernel, open::map_error};
use crate::{dataplane::Error, model::IpPrefix};

/// How many bits stand before an IPv4 address in its 16-byte form.
const MAPPED: u32 = 96;

/// A range in the form of the map: the length of the prefix in 16 bytes, and its first address.
pub(super) type Range = (u32, Addr);

pub(super) fn ranges(prefixes: &[IpPrefix]) -> BTreeSet<Range> {
    let range = |prefix: &IpPrefix| {
        let before = if prefix.network().is_ipv4() { MAPPED } else { 0 };
        (before + u32::from(prefix.length()), Addr::from(prefix.network()))
    };
    prefixes.iter().map(range).collect()
}

impl Ebpf {
    /// Admits the clients of `new` to a service, before it is said to have ranges.
    pub(super) fn admit(&mut self, service: u32, new: &BTreeSet<Range>) -> Result<(), Error> {
        for range in new {
            if let Err(error) = self.opened.source_ranges.insert(&key(service, *range), 0, 0) {
                return Err(if is_full(&error) {
                    let capacity = self.opened.max_frontends;
                    Error::Full { map: "SOURCE_RANGES", key: "maxFrontends", capacity, missing: new.len() }
                } else {
                    kernel("write a source range", &error)
                });
            }
        }
        Ok(())
    }

    /// Forgets ranges that a service does not have any more.
    pub(super) fn forget_ranges(&mut self, service: u32, old: impl IntoIterator<Item = Range>) {
        for range in old {
            if let Err(error) = absent_is_fine(self.opened.source_ranges.remove(&key(service, range))) {
                warn!("cannot remove a source range: {error}");
            }
        }
    }

    /// The ranges of each service that is in the map.
    pub(super) fn found_ranges(&self) -> Result<BTreeMap<u32, BTreeSet<Range>>, OpenError> {
        let mut found: BTreeMap<u32, BTreeSet<Range>> = BTreeMap::new();
        for key in self.opened.source_ranges.keys() {
            let key: Key<SourceRange> = key.map_err(|error: MapError| map_error("SOURCE_RANGES", &error))?;
            let range = (key.prefix_len().saturating_sub(SERVICE_BITS), key.data().addr);
            found.entry(u32::from_be_bytes(key.data().service)).or_default().insert(range);
        }
        Ok(found)
    }
}

fn key(service: u32, (length, addr): Range) -> Key<SourceRange> {
    Key::new(SERVICE_BITS + length, SourceRange { service: service.to_be_bytes(), addr })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_both_families_are_prefixes_of_sixteen_bytes() {
        let prefixes = ["10.0.0.0/8", "0.0.0.0/0", "fd00::/8", "::/0"].map(|text| text.parse().unwrap());
        let addr = |text: &str| Addr::from(text.parse::<std::net::IpAddr>().unwrap());
        let expected = [(104, addr("10.0.0.0")), (96, addr("0.0.0.0")), (8, addr("fd00::")), (0, addr("::"))];
        assert_eq!(ranges(&prefixes), BTreeSet::from(expected));
    }
}
