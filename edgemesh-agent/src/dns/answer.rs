//! From a query and the zone to the bytes of an answer.

use super::{
    stats::Outcome,
    wire::{
        self, CLASS_IN, Extended, Name, Query, Rcode, ReadRecord, Records, Response, Section, flag, rtype, u16_at,
        u32_at,
    },
    zone::{self, Found, Owner, Zone},
};

/// For how many seconds what is there may be remembered: EdgeMesh's `ttl 30` (its `pkg/dns/util.go`).
pub(super) const TTL: u32 = 30;
/// For how many seconds what is not there may be (RFC 2308): CoreDNS's default, since a Service that is made shortly
/// after it was asked for should not be missed for long.
pub(super) const NEGATIVE_TTL: u32 = 5;
/// How many aliases are followed, one to the next.
const MAX_ALIASES: usize = 8;

/// What the zone makes of a query.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a name in a box would be an allocation for a query")]
pub(super) enum Answer {
    /// The whole response was written, with this length.
    Written(usize, Outcome),
    /// The name is of the world outside: somebody else has the answer.
    Foreign,
    /// The name is an alias of this name of the world outside, whose addresses belong into the answer: to be called
    /// again with them.
    Alias(Name),
}

/// The response to the question for an alias's addresses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outside<'m> {
    pub(super) message: &'m [u8],
    /// Why it is not what it could be, which then is so of the whole answer.
    pub(super) extended: Option<Extended>,
}

/// Answers `query` from `zone` in at most `limit` bytes of `out`, which has at least [`wire::MIN_UDP`].
///
/// `turn` says which of several records comes first, so that clients that take the first one spread. `outside` is what
/// was asked for an alias, once it is there.
pub(super) fn answer(
    query: &Query<'_>,
    zone: &Zone,
    turn: usize,
    outside: Option<Outside<'_>>,
    limit: usize,
    out: &mut [u8],
) -> Answer {
    let found = zone.find(query.name().as_wire(), query.qtype);
    match found {
        // RFC 8482 4.2, as nobody needs all records: what is known of a name would be a tool to amplify attacks.
        Found::Foreign | Found::NoData | Found::Answers(_) if query.qtype == rtype::ANY => {
            return minimal(query, limit, out);
        }
        Found::Foreign => return Answer::Foreign,
        Found::NotYet | Found::NoSuchName | Found::NoData | Found::Answers(_) => {}
    }
    let mut missing = None;
    let answer = respond(query, limit, out, |response| {
        response.authoritative();
        let outcome = follow(query, zone, found, turn, outside, response);
        match outcome {
            Followed::Done(outcome) => Ok(outcome),
            Followed::Failed(why) => Err(why),
            Followed::Outside(name) => {
                missing = Some(name);
                Err(None)
            }
        }
    });
    missing.map_or(answer, Answer::Alias)
}

/// Answers a question for all records of a name (RFC 8482 4.2).
pub(super) fn minimal(query: &Query<'_>, limit: usize, out: &mut [u8]) -> Answer {
    respond(query, limit, out, |response| {
        response.answer(query.name().as_wire(), TTL, &wire::Data::Hinfo(b"RFC8482", b""));
        Ok(Outcome::Answer)
    })
}

/// Has `write` fill a response; where it fails, the response is SERVFAIL, with why.
fn respond(
    query: &Query<'_>,
    limit: usize,
    out: &mut [u8],
    write: impl FnOnce(&mut Response<'_>) -> Result<Outcome, Option<Extended>>,
) -> Answer {
    let mut why = None;
    if let Some(mut response) = Response::to(query, limit, out) {
        match write(&mut response) {
            Ok(outcome) => return Answer::Written(response.finish(), outcome),
            Err(extended) => why = extended,
        }
    }
    Answer::Written(query.refuse(Rcode::ServFail).because(why).write(out), Outcome::ServFail)
}

#[expect(clippy::large_enum_variant, reason = "as for `Answer`")]
enum Followed {
    Done(Outcome),
    /// Not known yet, aliases without end, or a failure outside.
    Failed(Option<Extended>),
    Outside(Name),
}

/// Writes what was found, and what its aliases lead to.
fn follow<'z>(
    query: &Query<'_>,
    zone: &'z Zone,
    mut found: Found<'z>,
    turn: usize,
    outside: Option<Outside<'_>>,
    response: &mut Response<'_>,
) -> Followed {
    let mut owner = *query.name();
    for _ in 0..MAX_ALIASES {
        match found {
            Found::NotYet => return Followed::Failed(None),
            Found::NoSuchName => {
                // Of the last name (RFC 6604).
                response.set_rcode(Rcode::NxDomain);
                deny(zone, &owner, response);
                return Followed::Done(Outcome::NxDomain);
            }
            Found::NoData => {
                deny(zone, &owner, response);
                return Followed::Done(Outcome::NoData);
            }
            Found::Foreign => return add_outside(query, owner, outside, response),
            Found::Answers(ref answers) => {
                let first = answers.answers().next();
                if let Some(zone::Record { data: zone::Data::Cname(target), .. }) = first
                    && query.qtype != rtype::CNAME
                {
                    let Some(target) = whole(target) else { return Followed::Failed(None) };
                    response.answer(owner.as_wire(), TTL, &wire::Data::Cname(target.as_wire()));
                    owner = target;
                    found = zone.find(owner.as_wire(), query.qtype);
                    continue;
                }
                let mut turned = answers.turned(turn);
                // What follows the first one without room is not made: a Service may have thousands of endpoints.
                if turned.all(|record| add(response, Section::Answer, &owner, &record)) {
                    answers.additionals().all(|record| add(response, Section::Additional, &owner, &record));
                }
                return Followed::Done(Outcome::Answer);
            }
        }
    }
    Followed::Failed(None)
}

/// The end of a chain of aliases outside the zone. For types other than addresses the alias is the answer, as with
/// CoreDNS: the client asks on.
fn add_outside(query: &Query<'_>, name: Name, outside: Option<Outside<'_>>, response: &mut Response<'_>) -> Followed {
    if !matches!(query.qtype, rtype::A | rtype::AAAA) {
        return Followed::Done(Outcome::Answer);
    }
    let Some(Outside { message, extended }) = outside else { return Followed::Outside(name) };
    let flags = u16_at(message, 2).unwrap_or(Rcode::ServFail as u16);
    let outcome = match flags & flag::RCODE {
        rcode if rcode == Rcode::NoError as u16 => Outcome::NoData,
        rcode if rcode == Rcode::NxDomain as u16 => Outcome::NxDomain,
        _ => return Followed::Failed(extended),
    };
    if let Some(extended) = extended {
        response.extend(extended);
    }
    if flags & flag::TC != 0 {
        response.truncate();
        return Followed::Done(Outcome::Answer);
    }
    let Some(records) = Records::of(message) else { return Followed::Failed(extended) };
    let mut owner = name;
    let mut outcome = outcome;
    // What leads from the name to its addresses, and nothing else that somebody put into the message.
    for _ in 0..MAX_ALIASES {
        let mut next = None;
        let of_owner = |record: &ReadRecord<'_>| {
            record.section == Section::Answer
                && record.class == CLASS_IN
                && record.owner().is_some_and(|name| name.lowered() == owner.lowered())
        };
        for record in records.clone().filter(of_owner) {
            if record.rtype == rtype::CNAME {
                next = record.name_in_data(0);
                if let Some(target) = &next {
                    response.answer(owner.as_wire(), record.ttl, &wire::Data::Cname(target.as_wire()));
                }
            } else if record.rtype == query.qtype
                && let Some(data) = address(&record)
            {
                response.answer(owner.as_wire(), record.ttl, &data);
                outcome = Outcome::Answer;
            }
        }
        let Some(target) = next else { break };
        owner = target;
    }
    if outcome != Outcome::Answer {
        if outcome == Outcome::NxDomain {
            response.set_rcode(Rcode::NxDomain);
        }
        let soa = records.clone().find(|record| record.section == Section::Authority && record.rtype == rtype::SOA);
        // For how long it may be remembered is for the upstream to say (RFC 2308 5); where it does not, it may not be.
        if let Some(record) = soa {
            copy_soa(&record, response);
        }
    }
    Followed::Done(outcome)
}

fn address(record: &ReadRecord<'_>) -> Option<wire::Data<'static>> {
    match record.rtype {
        rtype::A => <[u8; 4]>::try_from(record.data).ok().map(|octets| wire::Data::A(octets.into())),
        rtype::AAAA => <[u8; 16]>::try_from(record.data).ok().map(|octets| wire::Data::Aaaa(octets.into())),
        _ => None,
    }
}

fn copy_soa(record: &ReadRecord<'_>, response: &mut Response<'_>) {
    let Some(owner) = record.owner() else { return };
    let Some((mname, rname, numbers)) = record.soa_names() else { return };
    let number = |index: usize| u32_at(record.data, numbers + 4 * index);
    if let (Some(serial), Some(refresh), Some(retry), Some(expire), Some(minimum)) =
        (number(0), number(1), number(2), number(3), number(4))
    {
        let (mname, rname) = (mname.as_wire(), rname.as_wire());
        let soa = wire::Soa { mname, rname, serial, refresh, retry, expire, minimum };
        response.authority(owner.as_wire(), record.ttl, &wire::Data::Soa(soa));
    }
}

/// Adds the SOA record that says for how long a name may be taken not to be there (RFC 2308 3).
fn deny(zone: &Zone, name: &Name, response: &mut Response<'_>) {
    let soa = zone.soa();
    let (Some(mname), Some(rname)) = (whole(soa.name_server), whole(soa.mailbox)) else { return };
    let data = soa_data(&mname, &rname, soa.serial);
    response.authority(zone.authority(name.as_wire()), NEGATIVE_TTL, &data);
}

/// The times are CoreDNS's; nobody transfers the zone.
fn soa_data<'a>(mname: &'a Name, rname: &'a Name, serial: u32) -> wire::Data<'a> {
    wire::Data::Soa(wire::Soa {
        mname: mname.as_wire(),
        rname: rname.as_wire(),
        serial,
        refresh: 7200,
        retry: 1800,
        expire: 86_400,
        minimum: NEGATIVE_TTL,
    })
}

/// Says whether there was room.
fn add(response: &mut Response<'_>, section: Section, question: &Name, record: &zone::Record<'_>) -> bool {
    let named = match record.owner {
        Owner::Question => Some(*question),
        Owner::Name(name) => whole(name),
    };
    let Some(owner) = named else { return true };
    let (first, second);
    let data = match record.data {
        zone::Data::A(address) => wire::Data::A(address),
        zone::Data::Aaaa(address) => wire::Data::Aaaa(address),
        zone::Data::Txt(text) => wire::Data::Txt(text),
        zone::Data::Srv { priority, weight, port, target } => {
            let Some(target) = whole(target) else { return true };
            first = target;
            wire::Data::Srv(wire::SrvData { priority, weight, port, target: first.as_wire() })
        }
        zone::Data::Ptr(target) => {
            let Some(target) = whole(target) else { return true };
            first = target;
            wire::Data::Ptr(first.as_wire())
        }
        zone::Data::Cname(target) => {
            let Some(target) = whole(target) else { return true };
            first = target;
            wire::Data::Cname(first.as_wire())
        }
        zone::Data::Ns(target) => {
            let Some(target) = whole(target) else { return true };
            first = target;
            wire::Data::Ns(first.as_wire())
        }
        zone::Data::Soa(soa) => {
            let (Some(mname), Some(rname)) = (whole(soa.name_server), whole(soa.mailbox)) else { return true };
            (first, second) = (mname, rname);
            soa_data(&first, &second, soa.serial)
        }
    };
    let owner = owner.as_wire();
    match section {
        Section::Answer => response.answer(owner, TTL, &data),
        Section::Authority => response.authority(owner, TTL, &data),
        Section::Additional => response.additional(owner, TTL, &data),
    }
}

fn whole(name: zone::Name<'_>) -> Option<Name> {
    Name::of_parts(name.first(), name.rest())
}
