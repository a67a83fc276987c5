//! Answers of upstreams as they are kept: the bytes as they came, with the places of what is changed for each client.
//!
//! Nothing is decoded that need not be, so records of any type pass through unharmed.

use std::time::Duration;

use super::Question;
use crate::dns::wire::Extended;

const HEADER: usize = 12;
/// What we, too, tell clients and upstreams to send at most: it passes every path unfragmented (DNS flag day 2020).
pub(super) const PAYLOAD: u16 = 1232;

const TYPE_SOA: u16 = 6;
const TYPE_OPT: u16 = 41;
const TYPE_ANY: u16 = 255;

pub(super) const NOERROR: u16 = 0;
pub(super) const FORMERR: u16 = 1;
pub(super) const SERVFAIL: u16 = 2;
pub(super) const NXDOMAIN: u16 = 3;
pub(super) const NOTIMP: u16 = 4;
pub(super) const REFUSED: u16 = 5;

const QR: u8 = 0x80;
const OPCODE: u8 = 0x78;
const TC: u8 = 0x02;
const RD: u8 = 0x01;
const RA: u8 = 0x80;
const AD: u8 = 0x20;
const CD: u8 = 0x10;
/// Of the flags in the second half of a TTL of an OPT record.
const DO: u8 = 0x80;

/// How long records may be kept, whatever their TTL says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TtlLimits {
    /// Shorter TTLs count as this.
    pub floor: Duration,
    /// Longer TTLs count as this.
    pub ceiling: Duration,
    /// The same for answers that say that there is nothing.
    pub negative_ceiling: Duration,
}

impl Default for TtlLimits {
    /// 5 s (as CoreDNS), an hour and five minutes.
    fn default() -> Self {
        Self {
            floor: Duration::from_secs(5),
            ceiling: Duration::from_secs(3600),
            negative_ceiling: Duration::from_secs(300),
        }
    }
}

/// A message with what was asked, its records and no OPT.
#[derive(Debug)]
pub(super) struct Message {
    bytes: Box<[u8]>,
    /// Where the question ends and records begin.
    records: u16,
    /// Where the records of the section of additional ones begin.
    additional: u16,
    /// Where the TTLs are, which are within [`TtlLimits`] already.
    ttls: Box<[u16]>,
    /// With the upper bits that an OPT record adds.
    rcode: u16,
    /// The upstream has checked the signatures.
    authentic: bool,
    /// How long it may be kept; None for not at all.
    lifetime: Option<Duration>,
}

/// What a packet turned out to be.
#[derive(Debug)]
pub(super) enum Received {
    /// The answer.
    Answer(Message),
    /// The answer, which is to be asked for by TCP.
    Truncated,
    /// The answer to this question but for the case of its name.
    OtherCase,
    /// No answer to this question: a late or a forged one.
    NotOurs,
    /// The answer to this question, but broken.
    Malformed,
}

/// What a client wants to see in its copy.
#[derive(Clone, Copy, Debug)]
pub struct ClientView<'a> {
    pub id: u16,
    /// Its question as it came: name, type and class.
    pub question: &'a [u8],
    pub recursion_desired: bool,
    pub checking_disabled: bool,
    /// Whether it sent an OPT record, and so wants one.
    pub edns: bool,
    pub dnssec_ok: bool,
    /// The longest message it can take.
    pub limit: usize,
}

impl Message {
    /// What is answered where no upstream answers.
    pub(super) fn failure(question: &Question) -> Self {
        let mut bytes = vec![0; HEADER];
        if let Some(count) = bytes.get_mut(5) {
            *count = 1;
        }
        bytes.extend_from_slice(question.name());
        bytes.extend_from_slice(&question.qtype().to_be_bytes());
        bytes.extend_from_slice(&[0, 1]);
        let end = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        Self {
            bytes: bytes.into(),
            records: end,
            additional: end,
            ttls: Box::default(),
            rcode: SERVFAIL,
            authentic: false,
            lifetime: None,
        }
    }

    /// Takes apart what came in reply to a query with this id and question (name as sent, type and class).
    pub(super) fn receive(packet: &[u8], id: u16, question: &[u8], limits: &TtlLimits) -> Received {
        let Some((header, body)) = packet.split_at_checked(HEADER) else { return Received::NotOurs };
        let &[id_high, id_low, first, second, ..] = header else { return Received::NotOurs };
        let ours = id == u16::from_be_bytes([id_high, id_low]) && first & QR != 0 && first & OPCODE == 0;
        if !ours {
            return Received::NotOurs;
        }
        let rcode = u16::from(second & 0x0f);
        // A server that does not understand the query may leave the question away (RFC 1035 section 4.1.1).
        if number(header, 4) == Some(0) && matches!(rcode, FORMERR | NOTIMP) && body.is_empty() {
            return Received::Answer(Self::without_records(packet, question, rcode));
        }
        let asked = body.get(..question.len());
        if number(header, 4) != Some(1) || !asked.is_some_and(|asked| asked.eq_ignore_ascii_case(question)) {
            return Received::NotOurs;
        }
        if asked != Some(question) {
            return Received::OtherCase;
        }
        if first & TC != 0 {
            return Received::Truncated;
        }
        let authentic = second & AD != 0;
        Self::records_of(packet, question, rcode, authentic, limits).map_or(Received::Malformed, Received::Answer)
    }

    /// With the upper bits of an OPT record.
    pub(super) fn rcode(&self) -> u16 {
        self.rcode
    }

    /// Whether it says something of the name, rather than that the upstream could not.
    pub(super) fn is_usable(&self) -> bool {
        !matches!(self.rcode, FORMERR | SERVFAIL | NOTIMP | REFUSED) && self.rcode <= 0x0f
    }

    /// How long it may be kept; None for not at all.
    pub(super) fn lifetime(&self) -> Option<Duration> {
        self.lifetime
    }

    /// The bytes that it holds.
    pub(super) fn size(&self) -> usize {
        size_of::<Self>() + self.bytes.len() + 2 * self.ttls.len()
    }

    /// How many records there are as answers.
    pub(super) fn answers(&self) -> u16 {
        number(&self.bytes, 6).unwrap_or(0)
    }

    /// Writes the copy for a client into `out` and says how long it is; 0 where not even the question fits.
    ///
    /// `ttl` makes each TTL what the client is to see.
    pub(super) fn write(
        &self,
        to: &ClientView<'_>,
        ttl: impl Fn(u32) -> u32,
        extended: Option<Extended>,
        out: &mut [u8],
    ) -> usize {
        let limit = to.limit.min(out.len());
        let opt = match (to.edns, extended) {
            (false, _) => 0,
            (true, None) => 11,
            (true, Some(_)) => 17,
        };
        let (all, some, none) = (self.bytes.len(), usize::from(self.additional), usize::from(self.records));
        // Whatever is only additional may go without a word (RFC 2181 section 9).
        let Some(end) = [all, some, none].into_iter().find(|end| end + opt <= limit) else { return 0 };
        let Some(source) = self.bytes.get(..end) else { return 0 };
        let Some(target) = out.get_mut(..end) else { return 0 };
        target.copy_from_slice(source);
        // It is as long, so what points back to it still does.
        if let Some(question) = target.get_mut(HEADER..none)
            && question.len() == to.question.len()
        {
            question.copy_from_slice(to.question);
        }
        let truncated = end < some;
        // An upper half needs an OPT to be told.
        let rcode = if self.rcode > 0x0f && !to.edns { SERVFAIL } else { self.rcode };
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        let [id_high, id_low] = to.id.to_be_bytes();
        let first = QR | flag(truncated, TC) | flag(to.recursion_desired, RD);
        let authentic = self.authentic && to.dnssec_ok && extended.is_none();
        let second = RA | flag(authentic, AD) | flag(to.checking_disabled, CD) | (rcode & 0x0f) as u8;
        put(target, 0, &[id_high, id_low, first, second]);
        if truncated {
            put(target, 6, &[0; 6]);
        } else if end < all {
            put(target, 10, &[0; 2]);
        }
        for at in self.ttls.iter().map(|at| usize::from(*at)).take_while(|at| *at < end) {
            let Some(kept) = long(target, at) else { break };
            put(target, at, &ttl(kept).to_be_bytes());
        }
        if opt == 0 {
            return end;
        }
        let additional = if end < all { 0 } else { number(target, 10).unwrap_or(0) };
        put(target, 10, &additional.saturating_add(1).to_be_bytes());
        let [size_high, size_low] = PAYLOAD.to_be_bytes();
        let [_, type_low] = TYPE_OPT.to_be_bytes();
        let upper = (self.rcode >> 4) as u8;
        let rdata = (opt - 11) as u8;
        let Some(place) = out.get_mut(end..end + opt) else { return 0 };
        put(place, 0, &[0, 0, type_low, size_high, size_low, upper, 0, flag(to.dnssec_ok, DO), 0, 0, rdata]);
        if let Some(code) = extended {
            put(place, 11, &[0, 15, 0, 2, 0, code as u8]);
        }
        end + opt
    }

    fn without_records(packet: &[u8], question: &[u8], rcode: u16) -> Self {
        let mut bytes = packet.get(..HEADER).unwrap_or_default().to_vec();
        put(&mut bytes, 4, &[0, 1, 0, 0, 0, 0, 0, 0]);
        bytes.extend_from_slice(question);
        let end = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        let bytes = bytes.into();
        Self { bytes, records: end, additional: end, ttls: Box::default(), rcode, authentic: false, lifetime: None }
    }

    fn records_of(packet: &[u8], question: &[u8], rcode: u16, authentic: bool, limits: &TtlLimits) -> Option<Self> {
        let start = HEADER + question.len();
        let qtype = number(question, question.len().checked_sub(4)?)?;
        let mut seen = Seen::default();
        let mut at = start;
        let (mut additional, mut kept, mut upper) = (start, 0, 0);
        'sections: for section in [Section::Answer, Section::Authority, Section::Additional] {
            additional = at;
            for index in 0..number(packet, section.count_at())? {
                let record = Record::at(packet, at)?;
                if record.kind == TYPE_OPT {
                    if section != Section::Additional {
                        return None;
                    }
                    // Records behind it might be pointed to, or point; they are only additional.
                    upper = (record.ttl >> 24) as u16;
                    kept = index;
                    break 'sections;
                }
                seen.note(section, &record, qtype, packet)?;
                at = record.end;
                kept = index + 1;
            }
            if section != Section::Additional {
                kept = 0;
            }
        }
        let mut bytes: Box<[u8]> = packet.get(..at)?.into();
        put(&mut bytes, 10, &kept.to_be_bytes());
        let rcode = upper << 4 | rcode;
        let lifetime = seen.limit_ttls(rcode, limits, &mut bytes);
        let ttls = seen.ttls.iter().map(|(at, _)| *at).collect();
        let (records, additional) = (u16::try_from(start).ok()?, u16::try_from(additional).ok()?);
        Some(Self { bytes, records, additional, ttls, rcode, authentic, lifetime })
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Section {
    Answer,
    Authority,
    Additional,
}

impl Section {
    /// Where the header has the number of its records.
    fn count_at(self) -> usize {
        match self {
            Self::Answer => 6,
            Self::Authority => 8,
            Self::Additional => 10,
        }
    }
}

struct Record {
    kind: u16,
    ttl: u32,
    ttl_at: usize,
    end: usize,
}

impl Record {
    fn at(packet: &[u8], start: usize) -> Option<Self> {
        let fixed = skip_name(packet, start)?;
        let end = fixed + 10 + usize::from(number(packet, fixed + 8)?);
        (end <= packet.len()).then_some(())?;
        let ttl = long(packet, fixed + 4)?;
        Some(Self { kind: number(packet, fixed)?, ttl, ttl_at: fixed + 4, end })
    }
}

/// What the records of a message amount to.
#[derive(Debug, Default)]
struct Seen {
    ttls: Vec<(u16, u32)>,
    /// There is an answer of the type asked for.
    found: bool,
    /// Where the SOA's TTL is in `ttls`, and the TTL of the fact that there is nothing (RFC 2308 section 5).
    negative: Option<(usize, u32)>,
}

impl Seen {
    fn note(&mut self, section: Section, record: &Record, qtype: u16, packet: &[u8]) -> Option<()> {
        // RFC 2181 section 8.
        let ttl = if record.ttl > i32::MAX.cast_unsigned() { 0 } else { record.ttl };
        match section {
            Section::Answer if record.kind == qtype || qtype == TYPE_ANY => self.found = true,
            Section::Authority if record.kind == TYPE_SOA => {
                let minimum = long(packet, record.end.checked_sub(4).filter(|at| *at >= record.ttl_at + 6)?)?;
                self.negative = Some((self.ttls.len(), ttl.min(minimum)));
            }
            Section::Answer | Section::Authority | Section::Additional => {}
        }
        self.ttls.push((u16::try_from(record.ttl_at).ok()?, ttl));
        Some(())
    }

    /// Brings the TTLs within the limits, and says how long the message may be kept.
    fn limit_ttls(&mut self, rcode: u16, limits: &TtlLimits, bytes: &mut [u8]) -> Option<Duration> {
        let seconds = |duration: Duration| u32::try_from(duration.as_secs()).unwrap_or(u32::MAX);
        let within = |ttl: u32, ceiling| ttl.max(seconds(limits.floor)).min(seconds(ceiling));
        let is_negative = rcode == NXDOMAIN || !self.found;
        for (_, ttl) in &mut self.ttls {
            *ttl = within(*ttl, limits.ceiling);
        }
        if is_negative
            && let Some((index, ttl)) = self.negative
            && let Some((_, of_soa)) = self.ttls.get_mut(index)
        {
            *of_soa = within(ttl, limits.negative_ceiling);
        }
        for &(at, ttl) in &self.ttls {
            put(bytes, at.into(), &ttl.to_be_bytes());
        }
        let may_be_kept = match rcode {
            NOERROR | NXDOMAIN => !is_negative || self.negative.is_some(),
            _ => false,
        };
        let shortest = self.ttls.iter().map(|(_, ttl)| *ttl).min().filter(|ttl| may_be_kept && *ttl > 0)?;
        Some(Duration::from_secs(shortest.into()))
    }
}

/// Where a name ends that begins at `at`; None where it does not, or points anywhere but back.
fn skip_name(packet: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *packet.get(at)? {
            0 => return Some(at + 1),
            length @ 1..=63 => at += 1 + usize::from(length),
            192.. => {
                let target = usize::from(number(packet, at)? & 0x3fff);
                return (target < at).then_some(at + 2);
            }
            _ => return None,
        }
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

fn long(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

#[cfg(test)]
mod tests;
