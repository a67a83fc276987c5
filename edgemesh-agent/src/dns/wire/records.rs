//! Reads the records of a response that somebody else wrote.

use std::{
    fmt::{self, Display, Formatter},
    net::{Ipv4Addr, Ipv6Addr},
};

use super::{HEADER, Name, query::skip_name, rtype, u16_at, u32_at};

/// Where a record stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Section {
    Answer,
    Authority,
    Additional,
}

/// A record of a message.
#[derive(Clone, Copy, Debug)]
pub struct ReadRecord<'m> {
    pub section: Section,
    pub rtype: u16,
    pub class: u16,
    pub ttl: u32,
    /// As it stands in the message; names in it may be compressed, see [`ReadRecord::name_in_data`].
    pub data: &'m [u8],
    message: &'m [u8],
    owner_at: usize,
    data_at: usize,
}

impl ReadRecord<'_> {
    /// The owner, uncompressed; None if it is malformed.
    pub fn owner(&self) -> Option<Name> {
        expand(self.message, self.owner_at)
    }

    /// The name that stands at `offset` of the data (0 for CNAME, PTR and NS); None if it is malformed.
    pub fn name_in_data(&self, offset: usize) -> Option<Name> {
        expand(self.message, self.data_at.checked_add(offset)?)
    }

    /// Where the numbers of an SOA record begin in its data, and its two names; None if it is malformed.
    pub fn soa_names(&self) -> Option<(Name, Name, usize)> {
        let second = skip_name(self.message, self.data_at)?;
        let numbers = skip_name(self.message, second)?;
        Some((expand(self.message, self.data_at)?, expand(self.message, second)?, numbers.checked_sub(self.data_at)?))
    }
}

impl Display for ReadRecord<'_> {
    /// As in zone files; what is not known there or malformed in the form for unknown types (RFC 3597 5).
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let owner = self.owner().unwrap_or_else(Name::root);
        write!(f, "{owner} {} {} ", self.ttl, rtype::name(self.rtype))?;
        let number = |at| u16_at(self.data, at).unwrap_or_default();
        let known = match self.rtype {
            rtype::A => <[u8; 4]>::try_from(self.data).ok().map(|octets| Ipv4Addr::from(octets).to_string()),
            rtype::AAAA => <[u8; 16]>::try_from(self.data).ok().map(|octets| Ipv6Addr::from(octets).to_string()),
            rtype::CNAME | rtype::PTR | rtype::NS => self.name_in_data(0).map(|name| name.to_string()),
            rtype::MX => self.name_in_data(2).map(|name| format!("{} {name}", number(0))),
            rtype::SRV => self.name_in_data(6).map(|name| format!("{} {} {} {name}", number(0), number(2), number(4))),
            rtype::TXT | rtype::HINFO => strings(self.data),
            _ => None,
        };
        if let Some(known) = known {
            return f.write_str(&known);
        }
        write!(f, "\\# {} ", self.data.len())?;
        self.data.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Strings, each after its length, in quotes.
fn strings(mut data: &[u8]) -> Option<String> {
    let mut all = Vec::new();
    while let Some((length, rest)) = data.split_first() {
        let (text, rest) = rest.split_at_checked(usize::from(*length))?;
        all.push(format!("\"{}\"", text.escape_ascii()));
        data = rest;
    }
    Some(all.join(" "))
}

/// The records of a message in order, up to its end or to the first that is malformed.
#[derive(Clone, Debug)]
pub struct Records<'m> {
    message: &'m [u8],
    at: usize,
    left: [u16; 3],
}

impl<'m> Records<'m> {
    /// None if there is no header, or if the questions are malformed.
    pub fn of(message: &'m [u8]) -> Option<Self> {
        let mut at = HEADER;
        for _ in 0..u16_at(message, 4)? {
            at = skip_name(message, at)? + 4;
        }
        let left = [u16_at(message, 6)?, u16_at(message, 8)?, u16_at(message, 10)?];
        Some(Self { message, at, left })
    }
}

impl<'m> Iterator for Records<'m> {
    type Item = ReadRecord<'m>;

    fn next(&mut self) -> Option<ReadRecord<'m>> {
        let sections = [Section::Answer, Section::Authority, Section::Additional];
        let (section, left) = sections.into_iter().zip(&mut self.left).find(|(_, left)| **left > 0)?;
        *left -= 1;
        let (message, owner_at) = (self.message, self.at);
        let at = skip_name(message, owner_at)?;
        let length = usize::from(u16_at(message, at + 8)?);
        let data_at = at + 10;
        let data = message.get(data_at..data_at + length)?;
        self.at = data_at + length;
        Some(ReadRecord {
            section,
            rtype: u16_at(message, at)?,
            class: u16_at(message, at + 2)?,
            ttl: u32_at(message, at + 4)?,
            data,
            message,
            owner_at,
            data_at,
        })
    }
}

/// Follows pointers, each of which has to lead further back.
fn expand(message: &[u8], mut at: usize) -> Option<Name> {
    let mut name = Name::root();
    let mut before = at;
    loop {
        match *message.get(at)? {
            0 => return Some(name),
            length @ 1..=63 => {
                let end = at + 1 + usize::from(length);
                name.push(message.get(at + 1..end)?)?;
                at = end;
            }
            0xc0.. => {
                at = usize::from(u16_at(message, at)? & 0x3fff);
                if at >= before {
                    return None;
                }
                before = at;
            }
            64..=0xbf => return None,
        }
    }
}
