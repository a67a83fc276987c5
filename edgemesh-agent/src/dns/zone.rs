//! What the Kubernetes DNS specification says about a [`ServiceTable`]: pure, no IO and no clock.
//!
//! Version 1.1.0 of the specification (docs/specification.md in kubernetes/dns). Where it is silent, CoreDNS's
//! plugin/kubernetes is the measure, as that is what clusters are used to.

mod name;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

pub use self::name::{ClusterDomain, Name, ParseDomainError};
use self::name::{Label, Labels};
use crate::model::ServiceTable;

/// What a zone is made from besides the table.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ZoneSettings {
    pub domain: ClusterDomain,
    /// The server's own addresses, which its name server's name (`ns.dns.<domain>`) leads to.
    pub addresses: Vec<IpAddr>,
}

/// All that can be answered about the cluster's names at one moment.
///
/// Immutable; a change of a Service makes a new one that shares what did not change.
#[derive(Clone, Debug)]
pub struct Zone {
    settings: ZoneSettings,
    /// `dns.<domain>`.
    dns: Box<[u8]>,
    table: Arc<ServiceTable>,
}

/// What a zone says to a question.
#[derive(Clone, Debug)]
pub enum Found<'z> {
    /// Not of this zone (another domain, or the reverse name of an address that no Service has): to be forwarded.
    Foreign,
    /// Below the cluster domain, and nothing has this name: NXDOMAIN with [`Zone::soa`].
    NoSuchName,
    /// The name exists and has no record of the type: NOERROR with [`Zone::soa`].
    NoData,
    /// Not known yet, as the source has not delivered everything: SERVFAIL.
    NotYet,
    Answers(Answers<'z>),
}

/// The records that answer a question; never none. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Answers<'z> {
    only: Data<'z>,
}

impl<'z> Answers<'z> {
    /// The answer section, each record once. Nothing is allocated.
    pub fn answers(&self) -> impl Iterator<Item = Record<'z>> + use<'z> {
        std::iter::once(Record { owner: Owner::Question, data: self.only })
    }

    /// What the additional section may hold: addresses of the targets of SRV and NS records. Nothing is allocated.
    pub fn additionals(&self) -> impl Iterator<Item = Record<'z>> + use<'z> {
        std::iter::empty()
    }
}

/// A resource record without class and TTL.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Record<'z> {
    pub owner: Owner<'z>,
    pub data: Data<'z>,
}

/// Whose record it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Owner<'z> {
    /// The name that was asked for.
    Question,
    Name(Name<'z>),
}

/// The type of a record and its data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Data<'z> {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    Srv {
        priority: u16,
        weight: u16,
        port: u16,
        target: Name<'z>,
    },
    Ptr(Name<'z>),
    /// Where the target is of this zone, it can be asked for in turn; in wire form it is [`Name::rest`].
    Cname(Name<'z>),
    /// One character string, without its length.
    Txt(&'z [u8]),
    Soa(Soa<'z>),
    Ns(Name<'z>),
}

/// What the zone itself says in its SOA record; the times are the server's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Soa<'z> {
    pub name_server: Name<'z>,
    pub mailbox: Name<'z>,
    pub serial: u32,
}

/// Query types, as far as the zone tells them apart.
mod qtype {
    pub(super) const TXT: u16 = 16;
    pub(super) const ANY: u16 = 255;
}

impl Zone {
    /// Makes the zone of a table. Services that `previous` was made from, too, are shared with it.
    pub fn build(table: &Arc<ServiceTable>, settings: &ZoneSettings, _previous: Option<&Self>) -> Self {
        let dns = [b"\x03dns", settings.domain.as_wire()].concat().into();
        Self { settings: settings.clone(), dns, table: Arc::clone(table) }
    }

    /// Looks a name up: uncompressed wire form, ASCII letters lowered, with the terminal zero. Any bytes are allowed;
    /// what is no name is [`Found::Foreign`]. Nothing is allocated.
    pub fn find(&self, name: &[u8], qtype: u16) -> Found<'_> {
        let Some(labels) = Labels::of(name) else { return Found::Foreign };
        let Some(count) = labels.before(self.domain().as_wire()) else { return Found::Foreign };
        match (count, labels.get(0), qtype) {
            (1, b"dns-version", qtype::TXT | qtype::ANY) => Found::Answers(Answers { only: Data::Txt(b"1.1.0") }),
            (1, b"dns-version", _) => Found::NoData,
            _ if self.table.complete => Found::NoSuchName,
            _ => Found::NotYet,
        }
    }

    /// The domain that the zone is for.
    pub fn domain(&self) -> &ClusterDomain {
        &self.settings.domain
    }

    /// The SOA record; its owner is [`Zone::authority`].
    pub fn soa(&self) -> Soa<'_> {
        let of = |label, parent| Label::of(label).and_then(|label| Name::below(label, parent));
        let domain = self.domain().as_wire();
        Soa {
            name_server: of("ns", &self.dns).unwrap_or(Name::whole(domain)),
            mailbox: of("hostmaster", domain).unwrap_or(Name::whole(domain)),
            serial: self.serial(),
        }
    }

    /// In wire form, the zone that a name found here belongs to: the cluster domain, or the one of reverse names.
    pub fn authority(&self, name: &[u8]) -> &[u8] {
        let reverse: [&'static [u8]; 2] = [b"\x07in-addr\x04arpa\x00", b"\x03ip6\x04arpa\x00"];
        reverse.into_iter().find(|zone| name.ends_with(zone)).unwrap_or(self.domain().as_wire())
    }

    /// Counts up with each table.
    pub fn serial(&self) -> u32 {
        // Serials wrap (RFC 1982).
        u32::try_from(self.table.generation & u64::from(u32::MAX)).unwrap_or(0)
    }
}
