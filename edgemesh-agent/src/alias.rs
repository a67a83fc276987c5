//! Aliases: addresses of this node that stand for pods which only the tunnel reaches.
//!
//! A pod that is `(node, pod IP)`, as pod IPs repeat from site to site, has an alias from a range that is local to each
//! node. The builder puts it into the tables in the place of the pod's own address, so everything downstream sends
//! connections there without knowing why; all that arrives at the range comes to [`crate::proxy`], which asks [`Aliases`]
//! whom it is for.
//!
//! - [`Reach`] decides who needs one, from the node's routes, the configuration, and whom the tunnel has met;
//! - [`Book`] gives them out and keeps them;
//! - [`AliasFile`] keeps them across restarts.
//!
//! A node itself has one, too, for each family: its name in DNS leads there.
//!
//! All but the file is free of IO, and time is an argument.

mod book;
mod file;
mod lookup;
mod reach;

use std::net::IpAddr;

pub use book::Book;
pub use file::{AliasFile, Unreadable};
pub use lookup::{Aliases, NODE_ITSELF, Target, stream_target};
pub use reach::{Meetings, Overrides, Reach};

use crate::model::IpPrefix;

/// Where aliases are from, one range for each family.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AliasRanges {
    /// `commonConfig.aliasCIDR`; default 198.18.0.0/16, a part of what RFC 2544 sets aside for benchmarks: it is in use
    /// nowhere and routed nowhere.
    pub v4: IpPrefix,
    /// `commonConfig.aliasCIDRv6`; default fd6d:e54a:1a5e:a11a::/64 (RFC 4193).
    pub v6: IpPrefix,
}

impl AliasRanges {
    /// Whether the address is in one of them.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.v4.contains(address) || self.v6.contains(address)
    }

    /// That of the same family.
    pub fn of(&self, address: IpAddr) -> IpPrefix {
        if address.is_ipv4() { self.v4 } else { self.v6 }
    }

    /// Both.
    pub fn each(&self) -> [IpPrefix; 2] {
        [self.v4, self.v6]
    }
}
