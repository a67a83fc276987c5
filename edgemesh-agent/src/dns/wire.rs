//! DNS messages (RFC 1035 4) without allocation: a view of a query, a writer of responses, a reader of records.
//!
//! Only what a server for one question a message needs. What clients may get wrong is decided here once, by the RFCs,
//! so that whoever answers sees sound questions alone.

mod name;
mod query;
mod records;
mod response;
#[cfg(test)]
pub(super) mod tests;

pub use name::{MAX_NAME, Name, NameError, labels};
pub(super) use query::Opt;
pub use query::{Edns, Query, Refusal, Rejected};
pub use records::{ReadRecord, Records, Section};
pub use response::{Data, Response, Soa, SrvData};

/// The largest UDP response: what passes any path unfragmented (the DNS flag day of 2020), and what Unbound and Knot send.
pub const MAX_UDP: usize = 1232;
/// What a client takes that says nothing (RFC 1035 2.3.4).
pub const MIN_UDP: usize = 512;
/// What the two bytes before a message on TCP can tell (RFC 1035 4.2.2).
pub const MAX_TCP: usize = 65_535;
/// Without it a message is none.
pub const HEADER: usize = 12;

/// Types of records and questions, of IANA's registry.
pub mod rtype {
    pub const A: u16 = 1;
    pub const NS: u16 = 2;
    pub const CNAME: u16 = 5;
    pub const SOA: u16 = 6;
    pub const PTR: u16 = 12;
    pub const HINFO: u16 = 13;
    pub const MX: u16 = 15;
    pub const TXT: u16 = 16;
    pub const AAAA: u16 = 28;
    pub const SRV: u16 = 33;
    pub const OPT: u16 = 41;
    pub const SVCB: u16 = 64;
    pub const HTTPS: u16 = 65;
    /// Transfers, keys and other questions that are no types of data begin here.
    pub const TKEY: u16 = 249;
    pub const MAILA: u16 = 254;
    pub const ANY: u16 = 255;

    const NAMES: [(&str, u16); 13] = [
        ("A", A),
        ("NS", NS),
        ("CNAME", CNAME),
        ("SOA", SOA),
        ("PTR", PTR),
        ("HINFO", HINFO),
        ("MX", MX),
        ("TXT", TXT),
        ("AAAA", AAAA),
        ("SRV", SRV),
        ("SVCB", SVCB),
        ("HTTPS", HTTPS),
        ("ANY", ANY),
    ];

    /// Reads `A`, `srv` or, for any type at all, `TYPE65` (RFC 3597 5).
    pub fn parse(text: &str) -> Option<u16> {
        let named = NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
        let numbered = || text.get(..4).filter(|word| word.eq_ignore_ascii_case("type")).and_then(|_| text.get(4..));
        named.map(|(_, number)| *number).or_else(|| numbered()?.parse().ok())
    }

    /// As it is written in zone files.
    pub fn name(number: u16) -> String {
        let named = NAMES.iter().find(|(_, known)| *known == number);
        named.map_or_else(|| format!("TYPE{number}"), |(name, _)| (*name).to_owned())
    }
}

/// The class of everything this server knows.
pub const CLASS_IN: u16 = 1;

/// Flags and the fields beside them, in the second word of the header.
pub mod flag {
    /// A response.
    pub const QR: u16 = 0x8000;
    pub const OPCODE: u16 = 0x7800;
    /// The server is the authority.
    pub const AA: u16 = 0x0400;
    /// Something did not fit.
    pub const TC: u16 = 0x0200;
    /// Recursion desired.
    pub const RD: u16 = 0x0100;
    /// Recursion available.
    pub const RA: u16 = 0x0080;
    /// Checking disabled (RFC 4035 3.2.2).
    pub const CD: u16 = 0x0010;
    pub const RCODE: u16 = 0x000f;
}

/// How a response says that all is well, or what is not (RFC 1035 4.1.1, RFC 6891 9).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[repr(u16)]
pub enum Rcode {
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NxDomain = 3,
    NotImp = 4,
    Refused = 5,
    BadVers = 16,
}

/// Why an answer is not what it could be (extended DNS errors, RFC 8914), as far as this server has it to tell.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u16)]
pub enum Extended {
    Stale = 3,
    StaleNxdomain = 19,
    NoReachableAuthority = 22,
}

impl Extended {
    /// What IANA's registry calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stale => "Stale Answer",
            Self::StaleNxdomain => "Stale NXDOMAIN Answer",
            Self::NoReachableAuthority => "No Reachable Authority",
        }
    }
}

/// The big-endian number at `at`, if the message goes that far.
pub(super) fn u16_at(message: &[u8], at: usize) -> Option<u16> {
    let bytes = message.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

/// As [`u16_at`], of four bytes.
pub(super) fn u32_at(message: &[u8], at: usize) -> Option<u32> {
    let bytes = message.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}
