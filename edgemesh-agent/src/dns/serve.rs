//! Sockets: queries in, answers out.
//!
//! What the zone and the cache know is answered where it was received. What has to be asked for waits in a task of its
//! own, and only so much of it may wait: names of the cluster are answered whatever becomes of the world outside.

mod limit;
mod listen;
mod pool;
mod tcp;
mod udp;

use std::{
    net::IpAddr,
    num::NonZeroU32,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use self::limit::Limit;
pub use self::listen::Listener;
pub(super) use self::{
    listen::{Listening, listen},
    udp::threads,
};
use super::{
    answer::{self, Answer, Outside},
    forward::{self, ClientView, Forwarder, Question, Reply},
    stats::{Counters, Origin, Outcome},
    wire::{MAX_NAME, MAX_TCP, Name, Query, Rcode, Rejected, flag, rtype, u16_at},
    zone::Zone,
};
use crate::net::crowd::{Crowd, Seat};

/// As much of an upstream's answer as is looked at, by UDP, for the addresses of an alias; more than fits into a response.
const OUTSIDE: usize = 4096;

/// How much clients may ask for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// Queries a second of one client address; None for any number.
    pub queries: Option<NonZeroU32>,
    /// Those of them that upstreams have to be asked about.
    pub forwarded: Option<NonZeroU32>,
    /// How many queries of all clients may wait for upstreams at a time; one client may have a quarter of them.
    pub waiting: u32,
}

/// What all sockets answer from.
#[derive(Debug)]
pub(super) struct Core {
    /// None before the first table, and where all names are asked of upstreams (`cacheDNS`).
    zone: Mutex<Option<Arc<Zone>>>,
    /// Whether there is to be a zone; without it a name of the cluster would be asked of the world outside.
    needs_zone: bool,
    forwarder: Forwarder,
    queries: Option<Limit>,
    forwarded: Option<Limit>,
    waiting: Arc<Semaphore>,
    waiting_of_one: Crowd,
}

/// How a query came.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// What is to be done about a message.
#[derive(Debug)]
pub(super) enum Handled {
    /// Nothing is sent.
    Ignored,
    /// The response was written, with this length.
    Answered(usize, Origin),
    /// The response has to be waited for.
    Waits(Box<Waiting>),
}

/// A query whose answer upstreams have to be asked for.
#[derive(Debug)]
pub(super) struct Waiting {
    message: Box<[u8]>,
    question: Question,
    /// The question is about the name that this alias leads to.
    alias: bool,
    transport: Transport,
    received: Instant,
    _place: (OwnedSemaphorePermit, Seat),
}

impl Core {
    pub(super) fn new(forwarder: Forwarder, needs_zone: bool, limits: &Limits, now: Instant) -> Self {
        let waiting = usize::try_from(limits.waiting).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self {
            zone: Mutex::default(),
            needs_zone,
            forwarder,
            queries: limits.queries.map(|rate| Limit::new(rate, now)),
            forwarded: limits.forwarded.map(|rate| Limit::new(rate, now)),
            waiting: Arc::new(Semaphore::new(waiting)),
            waiting_of_one: Crowd::new((waiting / 4).max(1)),
        }
    }

    /// Has all queries from now on answered from `zone`.
    pub(super) fn publish(&self, zone: Arc<Zone>) {
        let before = self.zone.lock().unwrap_or_else(PoisonError::into_inner).replace(zone);
        // Freed after the lock is.
        drop(before);
    }

    /// The zone in force. To be held for a batch of queries and no longer, since a zone may be large.
    pub(super) fn zone(&self) -> Option<Arc<Zone>> {
        self.zone.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn forwarder(&self) -> &Forwarder {
        &self.forwarder
    }

    /// Answers a message of `client` that was received at `now`, as far as can be done at once. Allocates nothing but for
    /// what has to wait.
    pub(super) fn handle(&self, message: &[u8], from: &From<'_>, zone: Option<&Zone>, out: &mut [u8]) -> Handled {
        let counters = from.counters;
        if self.queries.as_ref().is_some_and(|limit| !limit.admits(from.client, from.received)) {
            counters.count(None, Origin::None, Outcome::Limited);
            return Handled::Ignored;
        }
        let query = match Query::parse(message) {
            Ok(query) => query,
            Err(Rejected::Silently) => {
                counters.count(None, Origin::None, Outcome::Ignored);
                return Handled::Ignored;
            }
            Err(Rejected::With(refusal)) => {
                counters.count(refusal.qtype, Origin::None, Outcome::of(refusal.rcode));
                return Handled::Answered(refusal.write(out), Origin::None);
            }
        };
        let limit = from.transport.limit(&query);
        let answered = self.answer_from_zone(&query, zone, counters.turn(), limit, out);
        let (question, alias) = match answered {
            Answer::Written(length, outcome) => {
                counters.count(Some(query.qtype), Origin::Cluster, outcome);
                return Handled::Answered(length, Origin::Cluster);
            }
            Answer::Foreign => (question(&query, query.name()), false),
            Answer::Alias(target) => (question(&query, &target), true),
        };
        let origin = if alias { Origin::Cluster } else { Origin::Forwarded };
        let refuse = |rcode: Rcode, out: &mut [u8]| {
            counters.count(Some(query.qtype), origin, Outcome::of(rcode));
            Handled::Answered(query.refuse(rcode).write(out), origin)
        };
        let Some(question) = question else { return refuse(Rcode::FormErr, out) };
        if let Some(reply) = self.forwarder.cached(&question, from.received) {
            let length = complete(&query, &question, zone.filter(|_| alias), limit, &reply, from.received, out);
            counters.count(Some(query.qtype), origin, outcome_of(out, length));
            return Handled::Answered(length, origin);
        }
        if self.forwarded.as_ref().is_some_and(|limit| !limit.admits(from.client, from.received)) {
            return refuse(Rcode::Refused, out);
        }
        let place = Arc::clone(&self.waiting).try_acquire_owned().ok().zip(self.waiting_of_one.seat(from.client));
        let Some(place) = place else { return refuse(Rcode::ServFail, out) };
        Handled::Waits(Box::new(Waiting {
            message: message.into(),
            question,
            alias,
            transport: from.transport,
            received: from.received,
            _place: place,
        }))
    }
}

impl Core {
    /// What can be said without asking anybody.
    fn answer_from_zone(
        &self,
        query: &Query<'_>,
        zone: Option<&Zone>,
        turn: usize,
        limit: usize,
        out: &mut [u8],
    ) -> Answer {
        match zone {
            Some(zone) => answer::answer(query, zone, turn, None, limit, out),
            None if self.needs_zone => {
                Answer::Written(query.refuse(Rcode::ServFail).write(out), Outcome::of(Rcode::ServFail))
            }
            None if query.qtype == rtype::ANY => answer::minimal(query, limit, out),
            None => Answer::Foreign,
        }
    }
}

/// How a query was answered for [`Core::ask`].
#[derive(Debug)]
pub(super) struct Asked {
    /// The response's length.
    pub(super) length: usize,
    /// The name of the world outside that the zone's answer leads to.
    pub(super) alias: Option<Name>,
    /// What the forwarder had to say before and did; None where the zone had the answer.
    pub(super) forwarded: Option<(forward::Explanation, Reply)>,
}

impl Core {
    /// Answers as for a client on TCP, without limits and uncounted.
    pub(super) async fn ask(&self, query: &Query<'_>, out: &mut [u8]) -> Asked {
        let zone = self.zone();
        let answered = self.answer_from_zone(query, zone.as_deref(), 0, MAX_TCP, out);
        let alias = match answered {
            Answer::Written(length, _) => return Asked { length, alias: None, forwarded: None },
            Answer::Foreign => None,
            Answer::Alias(target) => Some(target),
        };
        let Some(question) = question(query, alias.as_ref().unwrap_or_else(|| query.name())) else {
            return Asked { length: query.refuse(Rcode::FormErr).write(out), alias, forwarded: None };
        };
        let now = Instant::now();
        let explanation = self.forwarder.explain(&question, now);
        let reply = match self.forwarder.cached(&question, now) {
            Some(reply) => reply,
            None => self.forwarder.resolve(&question, now).await,
        };
        let of_alias = zone.as_deref().filter(|_| alias.is_some());
        let length = complete(query, &question, of_alias, MAX_TCP, &reply, Instant::now(), out);
        Asked { length, alias, forwarded: Some((explanation, reply)) }
    }
}

/// Whose message it is, and who counts it.
#[derive(Debug)]
pub(super) struct From<'a> {
    pub(super) client: IpAddr,
    pub(super) transport: Transport,
    pub(super) received: Instant,
    pub(super) counters: &'a Counters,
}

impl Waiting {
    /// Asks upstreams and gives the response.
    pub(super) async fn answer(self, core: &Core, counters: &Counters) -> Vec<u8> {
        let reply = core.forwarder.resolve(&self.question, self.received).await;
        // It was one before.
        let Ok(query) = Query::parse(&self.message) else { return Vec::new() };
        let limit = self.transport.limit(&query);
        let now = Instant::now();
        let zone = core.zone();
        // Not before there is something to write: a thousand may wait.
        let mut out = vec![0; limit];
        let alias = zone.as_deref().filter(|_| self.alias);
        let length = complete(&query, &self.question, alias, limit, &reply, now, &mut out);
        let origin = if self.alias { Origin::Cluster } else { Origin::Forwarded };
        counters.count(Some(query.qtype), origin, outcome_of(&out, length));
        counters.took(Origin::Forwarded, 1, self.received.elapsed());
        out.truncate(length);
        out
    }
}

impl Transport {
    fn limit(self, query: &Query<'_>) -> usize {
        match self {
            Self::Udp => query.udp_limit(),
            Self::Tcp => MAX_TCP,
        }
    }
}

fn question(query: &Query<'_>, name: &Name) -> Option<Question> {
    Question::new(name.as_wire(), query.qtype, query.dnssec_ok(), query.flags & flag::CD != 0)
}

/// Writes what upstreams said, by itself or, with the zone that has it, as the end of an alias.
fn complete(
    query: &Query<'_>,
    question: &Question,
    alias: Option<&Zone>,
    limit: usize,
    reply: &Reply,
    now: Instant,
    out: &mut [u8],
) -> usize {
    let view = ClientView {
        id: query.id,
        question: query.question(),
        recursion_desired: query.flags & flag::RD != 0,
        checking_disabled: query.flags & flag::CD != 0,
        edns: query.edns.is_some(),
        dnssec_ok: query.dnssec_ok(),
        limit,
    };
    let Some(zone) = alias else { return reply.write(&view, now, out) };
    let mut asked = [0; MAX_NAME + 4];
    let length = question.name().len();
    let Some(place) = asked.get_mut(..length + 4) else { return 0 };
    let (name, rest) = place.split_at_mut(length);
    name.copy_from_slice(question.name());
    let [high, low] = question.qtype().to_be_bytes();
    rest.copy_from_slice(&[high, low, 0, 1]);
    let (mut small, mut large) = ([0; OUTSIDE], Vec::new());
    let view = ClientView { question: place, limit: OUTSIDE, ..view };
    let length = reply.write(&view, now, &mut small);
    let mut outside = small.get(..length).unwrap_or_default();
    if limit > OUTSIDE && u16_at(outside, 2).is_some_and(|flags| flags & flag::TC != 0) {
        large.resize(MAX_TCP, 0);
        let length = reply.write(&ClientView { limit: MAX_TCP, ..view }, now, &mut large);
        outside = large.get(..length).unwrap_or_default();
    }
    let outside = Outside { message: outside, extended: reply.extended() };
    match answer::answer(query, zone, 0, Some(outside), limit, out) {
        Answer::Written(length, _) => length,
        // The Service has changed meanwhile; the client will ask again.
        Answer::Foreign | Answer::Alias(_) => query.refuse(Rcode::ServFail).write(out),
    }
}

/// What a response says.
fn outcome_of(out: &[u8], length: usize) -> Outcome {
    let Some(message) = out.get(..length) else { return Outcome::ServFail };
    let (Some(flags), Some(answers)) = (u16_at(message, 2), u16_at(message, 6)) else { return Outcome::ServFail };
    match flags & flag::RCODE {
        0 if answers > 0 => Outcome::Answer,
        0 => Outcome::NoData,
        1 => Outcome::FormErr,
        3 => Outcome::NxDomain,
        4 => Outcome::NotImp,
        5 => Outcome::Refused,
        _ => Outcome::ServFail,
    }
}
