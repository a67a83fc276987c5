//! A query as a client sent it.

use super::{CLASS_IN, Extended, HEADER, MAX_NAME, MAX_UDP, MIN_UDP, Name, Rcode, flag, rtype, u16_at, u32_at};

/// A sound query: one question of class IN. Borrows the message, whose question goes into the response unchanged: its
/// upper and lower case may be the client's protection against forged answers (0x20).
#[derive(Clone, Copy, Debug)]
pub struct Query<'m> {
    pub id: u16,
    /// The header's second word, as it was sent.
    pub flags: u16,
    pub qtype: u16,
    /// None from a client that does not speak EDNS.
    pub edns: Option<Edns>,
    name: Name,
    question: &'m [u8],
}

/// What a client says of itself in the OPT record (RFC 6891).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Edns {
    /// The largest UDP response it takes; what is below 512 counts as 512.
    pub udp_size: u16,
    /// Whether it wants DNSSEC's records.
    pub dnssec_ok: bool,
}

/// What becomes of a message that is no sound query.
#[derive(Clone, Copy, Debug)]
pub enum Rejected<'m> {
    /// Nothing is sent: to a response, which might be one of ours (two servers would answer each other for ever), and to
    /// what has no header.
    Silently,
    With(Refusal<'m>),
}

/// A response that holds nothing but an error.
#[derive(Clone, Copy, Debug)]
pub struct Refusal<'m> {
    pub rcode: Rcode,
    /// The question's type, as far as one could be read.
    pub qtype: Option<u16>,
    id: u16,
    flags: u16,
    question: &'m [u8],
    edns: Option<Edns>,
    extended: Option<Extended>,
}

impl<'m> Query<'m> {
    /// Reads a message.
    ///
    /// # Errors
    ///
    /// What to do instead of answering.
    pub fn parse(message: &'m [u8]) -> Result<Self, Rejected<'m>> {
        let header = message.get(..HEADER).ok_or(Rejected::Silently)?;
        let word = |at| u16_at(header, at).unwrap_or_default();
        let (id, flags) = (word(0), word(2));
        if flags & flag::QR != 0 {
            return Err(Rejected::Silently);
        }
        let mut refusal =
            Refusal { rcode: Rcode::FormErr, qtype: None, id, flags, question: &[], edns: None, extended: None };
        if flags & flag::OPCODE != 0 {
            // An update's or a notification's first section is no question.
            return Err(Rejected::With(Refusal { rcode: Rcode::NotImp, ..refusal }));
        }
        // RFC 9619: more than one is an error; none is only of use with cookies, which this server does not hand out.
        if word(4) != 1 {
            return Err(Rejected::With(refusal));
        }
        let (name, at) = read_question_name(message).ok_or(Rejected::With(refusal))?;
        let (Some(qtype), Some(class)) = (u16_at(message, at), u16_at(message, at + 2)) else {
            return Err(Rejected::With(refusal));
        };
        let end = at + 4;
        refusal.question = message.get(HEADER..end).unwrap_or_default();
        refusal.qtype = Some(qtype);
        let counts = [word(6), word(8), word(10)];
        match read_opt(message, end, counts) {
            Err(Malformed) => return Err(Rejected::With(refusal)),
            Ok(None) => {}
            Ok(Some((edns, version))) => {
                refusal.edns = Some(edns);
                if version > 0 {
                    return Err(Rejected::With(Refusal { rcode: Rcode::BadVers, ..refusal }));
                }
            }
        }
        match (qtype, class) {
            (0 | rtype::OPT, _) => Err(Rejected::With(refusal)),
            (rtype::TKEY..=rtype::MAILA, _) => Err(Rejected::With(Refusal { rcode: Rcode::Refused, ..refusal })),
            (_, CLASS_IN) => Ok(Self { id, flags, qtype, edns: refusal.edns, name, question: refusal.question }),
            _ => Err(Rejected::With(Refusal { rcode: Rcode::Refused, ..refusal })),
        }
    }

    /// The name asked for, in lower case.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The question as it was sent: name, type and class.
    pub fn question(&self) -> &'m [u8] {
        self.question
    }

    /// The length of the largest response to send by UDP.
    pub fn udp_limit(&self) -> usize {
        self.edns.map_or(MIN_UDP, |edns| usize::from(edns.udp_size).clamp(MIN_UDP, MAX_UDP))
    }

    /// Whether records that prove others are wanted.
    pub fn dnssec_ok(&self) -> bool {
        self.edns.is_some_and(|edns| edns.dnssec_ok)
    }

    /// A response with an error alone.
    pub fn refuse(&self, rcode: Rcode) -> Refusal<'m> {
        Refusal {
            rcode,
            qtype: Some(self.qtype),
            id: self.id,
            flags: self.flags,
            question: self.question,
            edns: self.edns,
            extended: None,
        }
    }
}

impl Refusal<'_> {
    /// The same with why, for a client that speaks EDNS.
    pub fn because(self, extended: Option<Extended>) -> Self {
        Self { extended, ..self }
    }

    /// Writes the response and gives its length; 0 if `out` is shorter than [`MIN_UDP`].
    pub fn write(&self, out: &mut [u8]) -> usize {
        let Some(out) = out.get_mut(..MIN_UDP) else { return 0 };
        let kept = self.flags & (flag::OPCODE | flag::RD | flag::CD);
        let rcode = self.rcode as u16;
        let flags = flag::QR | flag::RA | kept | (rcode & flag::RCODE);
        let opt = self.edns.map(|edns| Opt::new(rcode, edns.dnssec_ok, self.extended));
        let counts = [u16::from(!self.question.is_empty()), 0, 0, u16::from(opt.is_some())];
        let words = [self.id, flags].into_iter().chain(counts).flat_map(u16::to_be_bytes);
        let all = words.chain(self.question.iter().copied()).chain(opt.iter().flat_map(Opt::as_wire).copied());
        // A question has at most 259 bytes: it fits.
        out.iter_mut().zip(all).map(|(place, byte)| *place = byte).count()
    }
}

/// Our OPT record: what we take by UDP, the upper bits of the response code, and an extended error.
pub(in crate::dns) struct Opt {
    octets: [u8; Self::LENGTH + Self::EXTENDED],
    length: usize,
}

impl Opt {
    /// Without an extended error.
    pub(super) const LENGTH: usize = 11;
    /// What an extended error takes: the option's code and length, and its own code.
    pub(super) const EXTENDED: usize = 6;

    pub(in crate::dns) fn new(rcode: u16, dnssec_ok: bool, extended: Option<Extended>) -> Self {
        let [size_high, size_low] = (MAX_UDP as u16).to_be_bytes();
        let [_, upper, ..] = ((u32::from(rcode) >> 4) << 16).to_be_bytes();
        let options = if extended.is_some() { Self::EXTENDED } else { 0 };
        let [high, low] = extended.map_or(0, |code| code as u16).to_be_bytes();
        let dnssec_ok = u8::from(dnssec_ok) << 7;
        let [type_high, type_low] = rtype::OPT.to_be_bytes();
        let record = [0, type_high, type_low, size_high, size_low, upper, 0, dnssec_ok, 0, 0, options as u8];
        let option = [0, 15, 0, 2, high, low];
        let mut opt = Self { octets: [0; Self::LENGTH + Self::EXTENDED], length: Self::LENGTH + options };
        opt.octets.iter_mut().zip(record.into_iter().chain(option)).for_each(|(place, octet)| *place = octet);
        opt
    }

    pub(in crate::dns) fn as_wire(&self) -> &[u8] {
        self.octets.get(..self.length).unwrap_or_default()
    }
}

struct Malformed;

/// The name in lower case and where it ends. A pointer would have nothing before it to point to.
fn read_question_name(message: &[u8]) -> Option<(Name, usize)> {
    let mut name = Name::root();
    let mut at = HEADER;
    loop {
        let length = usize::from(*message.get(at)?);
        if length == 0 {
            return Some((name.lowered(), at + 1));
        }
        name.push(message.get(at + 1..at + 1 + length)?)?;
        at += 1 + length;
    }
}

/// Walks the records after the question for the OPT record and its version.
fn read_opt(message: &[u8], mut at: usize, counts: [u16; 3]) -> Result<Option<(Edns, u8)>, Malformed> {
    let mut found = None;
    for (section, count) in counts.into_iter().enumerate() {
        for _ in 0..count {
            let is_root = message.get(at) == Some(&0);
            at = skip_name(message, at).ok_or(Malformed)?;
            let kind = u16_at(message, at).ok_or(Malformed)?;
            let class = u16_at(message, at + 2).ok_or(Malformed)?;
            let ttl = u32_at(message, at + 4).ok_or(Malformed)?;
            let length = usize::from(u16_at(message, at + 8).ok_or(Malformed)?);
            let data = message.get(at + 10..at + 10 + length).ok_or(Malformed)?;
            at += 10 + length;
            if kind != rtype::OPT {
                continue;
            }
            // RFC 6891 6.1.1 and 6.1.2: once, among the additional records, for the root.
            if section != 2 || found.is_some() || !is_root || !options_are_whole(data) {
                return Err(Malformed);
            }
            let [_, version, flags, _] = ttl.to_be_bytes();
            found = Some((Edns { udp_size: class, dnssec_ok: flags & 0x80 != 0 }, version));
        }
    }
    Ok(found)
}

/// No option is acted on: a client's subnet (RFC 7871) or cookie (RFC 7873) may be left out of account.
fn options_are_whole(mut data: &[u8]) -> bool {
    while !data.is_empty() {
        let Some(length) = u16_at(data, 2) else { return false };
        let Some(rest) = data.get(4 + usize::from(length)..) else { return false };
        data = rest;
    }
    true
}

/// Where a name ends, wherever a pointer at its end leads.
pub(super) fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    // So much for a name of labels of one byte.
    for _ in 0..=MAX_NAME / 2 {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length @ 1..=63 => at += 1 + usize::from(length),
            0xc0.. => return message.get(at + 1).map(|_| at + 2),
            64..=0xbf => return None,
        }
    }
    None
}
