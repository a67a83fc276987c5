//! Writes a response into a buffer.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{CLASS_IN, Extended, HEADER, Query, Rcode, flag, query::Opt, rtype};

/// How many places in the message names are compared with before they are written out.
const PLACES: usize = 32;
/// A pointer has 14 bits.
const MAX_POINTER: usize = 0x3fff;

/// A response being written: header and question, then answers, authorities and additional records in this order.
///
/// What does not fit is left out whole. The truncation bit is set for answers and authorities, and not for additional
/// records, which a client can do without (RFC 2181 9).
#[derive(Debug)]
pub struct Response<'o> {
    out: &'o mut [u8],
    len: usize,
    limit: usize,
    flags: u16,
    rcode: Rcode,
    /// Whether the client speaks EDNS, and whether it wants DNSSEC.
    edns: Option<bool>,
    extended: Option<Extended>,
    counts: [u16; 3],
    section: usize,
    truncated: bool,
    places: [Place; PLACES],
    known: usize,
}

/// Where a name begins that may be pointed to, and the length it would have uncompressed.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    at: u16,
    length: u8,
}

/// The data of a record. Names are in wire form.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Data<'a> {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    Cname(&'a [u8]),
    Ptr(&'a [u8]),
    Ns(&'a [u8]),
    Srv(SrvData<'a>),
    /// One string of at most 255 bytes.
    Txt(&'a [u8]),
    Soa(Soa<'a>),
    /// CPU and OS; of use for [RFC 8482](https://www.rfc-editor.org/rfc/rfc8482) alone.
    Hinfo(&'a [u8], &'a [u8]),
}

/// RFC 2782.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SrvData<'a> {
    pub priority: u16,
    pub weight: u16,
    pub port: u16,
    pub target: &'a [u8],
}

/// RFC 1035 3.3.13; times in seconds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Soa<'a> {
    pub mname: &'a [u8],
    pub rname: &'a [u8],
    pub serial: u32,
    pub refresh: u32,
    pub retry: u32,
    pub expire: u32,
    pub minimum: u32,
}

impl Data<'_> {
    /// The number of its type.
    pub fn rtype(&self) -> u16 {
        match self {
            Self::A(_) => rtype::A,
            Self::Aaaa(_) => rtype::AAAA,
            Self::Cname(_) => rtype::CNAME,
            Self::Ptr(_) => rtype::PTR,
            Self::Ns(_) => rtype::NS,
            Self::Srv(_) => rtype::SRV,
            Self::Txt(_) => rtype::TXT,
            Self::Soa(_) => rtype::SOA,
            Self::Hinfo(..) => rtype::HINFO,
        }
    }
}

impl<'o> Response<'o> {
    /// Begins the response to `query`, of at most `limit` bytes; None if `out` has no room for header and question.
    pub fn to(query: &Query<'_>, limit: usize, out: &'o mut [u8]) -> Option<Self> {
        let edns = query.edns.map(|edns| edns.dnssec_ok);
        let reserved = if edns.is_some() { Opt::LENGTH } else { 0 };
        let mut response = Self {
            limit: limit.min(out.len()).checked_sub(reserved)?,
            out,
            len: HEADER,
            flags: flag::QR | flag::RA | (query.flags & (flag::RD | flag::CD)),
            rcode: Rcode::NoError,
            edns,
            extended: None,
            counts: [0; 3],
            section: 0,
            truncated: false,
            places: [Place::default(); PLACES],
            known: 0,
        };
        response.put(&query.id.to_be_bytes(), 0)?;
        response.append(query.question())?;
        let name = query.name().as_wire();
        response.remember(name, HEADER);
        Some(response)
    }

    /// Says that this server is the authority for the name.
    pub fn authoritative(&mut self) {
        self.flags |= flag::AA;
    }

    /// Sets the response code; [`Rcode::NoError`] without it.
    pub fn set_rcode(&mut self, rcode: Rcode) {
        self.rcode = rcode;
    }

    /// Says why the answer is not what it could be, if the client speaks EDNS and there is still room.
    pub fn extend(&mut self, extended: Extended) {
        if self.edns.is_some() && self.extended.is_none() && self.len + Opt::EXTENDED <= self.limit {
            self.limit -= Opt::EXTENDED;
            self.extended = Some(extended);
        }
    }

    /// Whether an answer or authority was left out.
    pub fn is_truncated(&self) -> bool {
        self.truncated
    }

    /// Says that there would be more, as where what is copied was cut; nothing can be added then.
    pub fn truncate(&mut self) {
        self.truncated = true;
    }

    /// Adds an answer; nothing once one did not fit. Says whether there was room.
    pub fn answer(&mut self, owner: &[u8], ttl: u32, data: &Data<'_>) -> bool {
        self.add(0, owner, ttl, data)
    }

    /// Adds a record to the authority section, after all answers. Says whether there was room.
    pub fn authority(&mut self, owner: &[u8], ttl: u32, data: &Data<'_>) -> bool {
        self.add(1, owner, ttl, data)
    }

    /// Adds an additional record, after everything else. Says whether there was room.
    pub fn additional(&mut self, owner: &[u8], ttl: u32, data: &Data<'_>) -> bool {
        self.add(2, owner, ttl, data)
    }

    /// Completes the message and gives its length.
    pub fn finish(mut self) -> usize {
        if self.truncated {
            self.flags |= flag::TC;
        }
        let rcode = self.rcode as u16;
        let mut additional = self.counts[2];
        if let Some(dnssec_ok) = self.edns {
            let opt = Opt::new(rcode, dnssec_ok, self.extended);
            // Its room was set aside.
            self.limit += opt.as_wire().len();
            if self.append(opt.as_wire()).is_some() {
                additional += 1;
            }
        }
        let words = [self.flags | (rcode & flag::RCODE), 1, self.counts[0], self.counts[1], additional];
        for (at, word) in (2..).step_by(2).zip(words) {
            // Within the header, which is there.
            let _ = self.put(&word.to_be_bytes(), at);
        }
        self.len
    }

    fn add(&mut self, section: usize, owner: &[u8], ttl: u32, data: &Data<'_>) -> bool {
        if self.truncated || section < self.section {
            return false;
        }
        self.section = section;
        let (len, known) = (self.len, self.known);
        let fits = self.record(owner, ttl, data).is_some();
        if fits {
            if let Some(count) = self.counts.get_mut(section) {
                *count += 1;
            }
        } else {
            (self.len, self.known) = (len, known);
            self.truncated |= section < 2;
        }
        fits
    }

    fn record(&mut self, owner: &[u8], ttl: u32, data: &Data<'_>) -> Option<()> {
        self.name(owner, true)?;
        self.append(&data.rtype().to_be_bytes())?;
        self.append(&CLASS_IN.to_be_bytes())?;
        self.append(&ttl.to_be_bytes())?;
        let length_at = self.len;
        self.append(&[0, 0])?;
        self.data(data)?;
        let length = u16::try_from(self.len - length_at - 2).ok()?;
        self.put(&length.to_be_bytes(), length_at)
    }

    fn data(&mut self, data: &Data<'_>) -> Option<()> {
        match data {
            Data::A(address) => self.append(&address.octets()),
            Data::Aaaa(address) => self.append(&address.octets()),
            Data::Cname(name) | Data::Ptr(name) | Data::Ns(name) => self.name(name, true),
            Data::Srv(srv) => {
                for number in [srv.priority, srv.weight, srv.port] {
                    self.append(&number.to_be_bytes())?;
                }
                // RFC 2782: the target is not compressed.
                self.name(srv.target, false)
            }
            Data::Txt(text) => self.string(text),
            Data::Hinfo(cpu, os) => {
                self.string(cpu)?;
                self.string(os)
            }
            Data::Soa(soa) => {
                self.name(soa.mname, true)?;
                self.name(soa.rname, true)?;
                for number in [soa.serial, soa.refresh, soa.retry, soa.expire, soa.minimum] {
                    self.append(&number.to_be_bytes())?;
                }
                Some(())
            }
        }
    }

    fn string(&mut self, text: &[u8]) -> Option<()> {
        self.append(&[u8::try_from(text.len()).ok()?])?;
        self.append(text)
    }

    /// Writes a name, its end as a pointer if that end is in the message already (RFC 1035 4.1.4).
    fn name(&mut self, name: &[u8], compress: bool) -> Option<()> {
        let mut rest = name;
        loop {
            let length = usize::from(*rest.first()?);
            if length == 0 {
                return self.append(&[0]);
            }
            match self.find(rest).filter(|_| compress) {
                Some(at) => return self.append(&(0xc000 | at).to_be_bytes()),
                None => self.remember_one(rest, self.len),
            }
            let (label, after) = rest.split_at_checked(1 + length)?;
            self.append(label)?;
            rest = after;
        }
    }

    /// Notes every label of a name that stands uncompressed at `at`.
    fn remember(&mut self, name: &[u8], mut at: usize) {
        let mut rest = name;
        while let Some(length) = rest.first().filter(|length| **length > 0) {
            self.remember_one(rest, at);
            let step = 1 + usize::from(*length);
            at += step;
            rest = rest.get(step..).unwrap_or_default();
        }
    }

    fn remember_one(&mut self, rest: &[u8], at: usize) {
        let Some(place) = self.places.get_mut(self.known) else { return };
        if let (Ok(at), Ok(length), true) = (u16::try_from(at), u8::try_from(rest.len()), at <= MAX_POINTER) {
            *place = Place { at, length };
            self.known += 1;
        }
    }

    fn find(&self, rest: &[u8]) -> Option<u16> {
        let known = self.places.get(..self.known)?;
        let same = |place: &&Place| usize::from(place.length) == rest.len() && self.stands_at(place.at.into(), rest);
        known.iter().find(same).map(|place| place.at)
    }

    /// Whether the message has the name at `at`, whatever the case. A name that is only half written is none.
    fn stands_at(&self, mut at: usize, mut name: &[u8]) -> bool {
        let Some(written) = self.out.get(..self.len) else { return false };
        loop {
            let (Some(length), Some(wanted)) = (written.get(at), name.first()) else { return false };
            if *length >= 0xc0 {
                let Some(low) = written.get(at + 1) else { return false };
                // Pointers lead back to what stood before them, so this ends.
                at = usize::from(u16::from_be_bytes([length & 0x3f, *low]));
                continue;
            }
            if length != wanted {
                return false;
            }
            let step = 1 + usize::from(*length);
            let (Some(label), Some(other)) = (written.get(at..at + step), name.get(..step)) else { return false };
            if !label.eq_ignore_ascii_case(other) {
                return false;
            }
            if step == 1 {
                return true;
            }
            at += step;
            name = name.get(step..).unwrap_or_default();
        }
    }

    fn append(&mut self, bytes: &[u8]) -> Option<()> {
        let end = self.len + bytes.len();
        if end > self.limit {
            return None;
        }
        self.put(bytes, self.len)?;
        self.len = end;
        Some(())
    }

    fn put(&mut self, bytes: &[u8], at: usize) -> Option<()> {
        self.out.get_mut(at..at + bytes.len())?.copy_from_slice(bytes);
        Some(())
    }
}
