//! How much of this node strangers may take: pure, the time is an argument.
//!
//! A connection from outside costs a handshake before it can be known for a stranger's. So what is not yet known to be a
//! member's is counted, in all and by source, and sources whose connections come to nothing are slowed down. TCP and QUIC
//! are counted apart: whoever sends a first packet of QUIC can put any address on it, and members' TCP must not pay for that.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use super::Transport;

/// Most connections on their way to membership, of one transport.
const MAX_JOINING: usize = 256;

/// Of these, kept for sources that members have come from: strangers cannot keep them out by being many.
const FOR_KNOWN: usize = 64;

/// Sources that members have come from, remembered.
const MAX_KNOWN: usize = 16_384;

/// The same, from one source; a site behind one NAT is one source.
const MAX_JOINING_PER_SOURCE: usize = 64;

/// Failures that a source may make at once, before it is slowed down to [`FAILURES_PER_SECOND`].
const FAILURES_AT_ONCE: f64 = 50.0;

/// What a source may fail beyond that which members have come from: each member of a large site tries several addresses at
/// once, of which all but one come to nothing.
const FAILURES_OF_KNOWN: f64 = 1000.0;

/// Not zero, so that members that share an address with a stranger still get in.
const FAILURES_PER_SECOND: f64 = 10.0;

/// Sources remembered.
const MAX_SOURCES: usize = 4096;

/// Why a connection is not even begun.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum Denied {
    #[error("too many connections are being set up")]
    TooMany,
    #[error("too many connections from this address are being set up")]
    TooManyFromSource,
    #[error("too many connections from this address came to nothing")]
    Failing,
}

/// Connections of which is not known yet whether they are a member's, by `Id`.
#[derive(Debug)]
pub(super) struct Admission<Id> {
    joining: HashMap<Id, (Transport, Option<IpAddr>)>,
    count: HashMap<Transport, usize>,
    sources: HashMap<(Transport, IpAddr), Source>,
    /// Where members have come from, and when last.
    known: HashMap<IpAddr, Instant>,
}

#[derive(Debug)]
struct Source {
    joining: usize,
    /// Failures left, as of `at`.
    tokens: f64,
    at: Instant,
}

impl<Id: Eq + Hash> Admission<Id> {
    pub(super) fn new() -> Self {
        Self { joining: HashMap::new(), count: HashMap::new(), sources: HashMap::new(), known: HashMap::new() }
    }

    /// Asks for leave to set up the connection `id` from `from`; `None` is for connections through a relay, which a
    /// relay makes for members only.
    pub(super) fn admit(
        &mut self,
        id: Id,
        transport: Transport,
        from: Option<IpAddr>,
        now: Instant,
    ) -> Result<(), Denied> {
        let from = from.map(source);
        let known = from.is_none_or(|from| self.known.contains_key(&from));
        let room = if known { MAX_JOINING } else { MAX_JOINING - FOR_KNOWN };
        if self.count.get(&transport).is_some_and(|count| *count >= room) {
            return Err(Denied::TooMany);
        }
        if let Some(from) = from {
            let key = (transport, from);
            if self.sources.len() >= MAX_SOURCES && !self.sources.contains_key(&key) {
                self.sources.retain(|_, source| source.joining > 0);
            }
            let source = self.sources.entry(key).or_insert(Source { joining: 0, tokens: FAILURES_AT_ONCE, at: now });
            source.refill(now);
            if source.joining >= MAX_JOINING_PER_SOURCE {
                return Err(Denied::TooManyFromSource);
            }
            // Each connection under way may still fail.
            if source.tokens < if known { 1.0 - FAILURES_OF_KNOWN } else { 1.0 } {
                return Err(Denied::Failing);
            }
            source.joining += 1;
        }
        self.joining.insert(id, (transport, from));
        *self.count.entry(transport).or_insert(0) += 1;
        Ok(())
    }

    /// The connection turned out to be a member's.
    pub(super) fn joined(&mut self, id: &Id, now: Instant) {
        if let Some((_, Some(from))) = self.joining.get(id) {
            if self.known.len() >= MAX_KNOWN && !self.known.contains_key(from) {
                let oldest = self.known.iter().min_by_key(|(_, at)| **at).map(|(from, _)| *from);
                oldest.and_then(|oldest| self.known.remove(&oldest));
            }
            self.known.insert(*from, now);
        }
        self.end(id, now, 0.0);
    }

    /// The connection is given up, and it is nobody's fault.
    pub(super) fn withdrawn(&mut self, id: &Id, now: Instant) {
        self.end(id, now, 0.0);
    }

    /// The connection came to nothing; does nothing for one that was not admitted or has joined.
    pub(super) fn failed(&mut self, id: &Id, now: Instant) {
        self.end(id, now, 1.0);
    }

    fn end(&mut self, id: &Id, now: Instant, cost: f64) {
        let Some((transport, from)) = self.joining.remove(id) else { return };
        if let Some(count) = self.count.get_mut(&transport) {
            *count -= 1;
        }
        let Some(key) = from.map(|from| (transport, from)) else { return };
        let least = if self.known.contains_key(&key.1) { -FAILURES_OF_KNOWN } else { 0.0 };
        let Some(source) = self.sources.get_mut(&key) else { return };
        source.refill(now);
        source.joining -= 1;
        source.tokens = (source.tokens - cost).max(least);
        if source.joining == 0 && source.tokens >= FAILURES_AT_ONCE {
            self.sources.remove(&key);
        }
    }
}

impl Source {
    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + passed * FAILURES_PER_SECOND).min(FAILURES_AT_ONCE);
        self.at = now;
    }
}

/// What counts as one source: an IPv4 address, an IPv6 /64.
fn source(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from(u128::from(ip) & !u128::from(u64::MAX))),
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// Lets one log line of each kind through a minute, and counts the rest.
#[derive(Debug, Default)]
pub(super) struct Quiet(HashMap<&'static str, (Instant, u64)>);

/// How long a kind of line stays away after one.
const QUIET: Duration = Duration::from_secs(60);

impl Quiet {
    /// Whether to write a line of this kind now: `Some` with the number that were left out since the last.
    pub(super) fn pass(&mut self, kind: &'static str, now: Instant) -> Option<u64> {
        match self.0.get_mut(kind) {
            Some((at, left_out)) if now.saturating_duration_since(*at) < QUIET => {
                *left_out += 1;
                None
            }
            last => {
                let left_out = last.map_or(0, |(_, left_out)| *left_out);
                self.0.insert(kind, (now, 0));
                Some(left_out)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Transport::*, *};

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    #[test]
    fn a_source_that_fails_is_slowed_down_and_others_are_not() {
        let (mut admission, start) = (Admission::new(), Instant::now());
        let mut admitted = 0;
        // 10,000 attempts in ten seconds.
        for id in 0..10_000u64 {
            let now = start + Duration::from_millis(id);
            if admission.admit(id, Tcp, Some(A), now).is_ok() {
                admitted += 1;
                admission.failed(&id, now);
            }
        }
        assert!((100..=151).contains(&admitted), "{admitted} of 10,000");
        let now = start + Duration::from_secs(10);
        assert_eq!(admission.admit(10_001, Tcp, Some(B), now), Ok(()));
        // It costs the same source no more than a tenth of a second each.
        assert_eq!(admission.admit(10_002, Tcp, Some(A), now + Duration::from_millis(101)), Ok(()));
    }

    #[test]
    fn connections_on_their_way_are_bounded_by_source_and_in_all() {
        let (mut admission, now) = (Admission::new(), Instant::now());
        for id in 0..64 {
            assert_eq!(admission.admit(id, Tcp, Some(A), now), Ok(()));
        }
        assert_eq!(admission.admit(64, Tcp, Some(A), now), Err(Denied::TooManyFromSource));
        admission.joined(&0, now);
        assert_eq!(admission.admit(64, Tcp, Some(A), now), Ok(()));
        for id in 65..257 {
            assert_eq!(admission.admit(id, Tcp, None, now), Ok(()));
        }
        assert_eq!(admission.admit(257, Tcp, Some(B), now), Err(Denied::TooMany));
        assert_eq!(admission.admit(257, Quic, Some(B), now), Ok(()), "TCP takes nothing from QUIC");
    }

    #[test]
    fn strangers_from_everywhere_leave_room_for_where_members_have_come_from() {
        let (mut admission, now) = (Admission::new(), Instant::now());
        assert_eq!(admission.admit(0, Tcp, Some(A), now), Ok(()));
        admission.joined(&0, now);
        let mut taken = 0;
        for id in 1..1000u32 {
            let from = IpAddr::from((0x0a00_0000 + id).to_be_bytes());
            taken += usize::from(admission.admit(id, Tcp, Some(from), now).is_ok());
        }
        assert_eq!(taken, MAX_JOINING - FOR_KNOWN);
        for id in 1000..1000 + FAILURES_OF_KNOWN as u32 {
            assert_eq!(admission.admit(id, Tcp, Some(A), now), Ok(()), "a site of many fails often");
            admission.failed(&id, now);
        }
        assert_eq!(admission.admit(9000, Tcp, Some(B), now), Err(Denied::TooMany));
        assert_eq!(admission.admit(9000, Tcp, Some(A), now), Ok(()));
    }

    #[test]
    fn packets_with_a_forged_address_keep_nobody_from_tcp() {
        let (mut admission, now) = (Admission::new(), Instant::now());
        for id in 0..10_000u32 {
            if admission.admit(id, Quic, Some(A), now).is_ok() {
                admission.failed(&id, now);
            }
        }
        assert_eq!(admission.admit(10_000, Quic, Some(A), now), Err(Denied::Failing));
        assert_eq!(admission.admit(10_000, Tcp, Some(A), now), Ok(()));
    }

    #[test]
    fn joining_costs_nothing() {
        let (mut admission, now) = (Admission::new(), Instant::now());
        for id in 0..1000 {
            assert_eq!(admission.admit(id, Tcp, Some(A), now), Ok(()));
            admission.joined(&id, now);
        }
        assert!(admission.sources.is_empty() && admission.joining.is_empty() && admission.count[&Tcp] == 0);
    }

    #[test]
    fn what_is_remembered_of_sources_is_bounded() {
        let (mut admission, now) = (Admission::new(), Instant::now());
        for id in 0..100_000u32 {
            let from = IpAddr::from(id.to_be_bytes());
            if admission.admit(id, Tcp, Some(from), now).is_ok() {
                admission.failed(&id, now);
            }
        }
        assert!(admission.sources.len() <= MAX_SOURCES);
        assert_eq!(source("2001:db8::1".parse().unwrap()), source("2001:db8::ffff:1".parse().unwrap()));
    }

    #[test]
    fn what_is_remembered_of_members_is_bounded_and_the_oldest_goes() {
        let (mut admission, now) = (Admission::new(), Instant::now());
        for id in 0..MAX_KNOWN + 10 {
            let from = IpAddr::from(u32::try_from(id).unwrap().to_be_bytes());
            assert_eq!(admission.admit(id, Tcp, Some(from), now), Ok(()));
            admission.joined(&id, now + Duration::from_micros(id as u64));
        }
        assert_eq!(admission.known.len(), MAX_KNOWN);
        assert!(!admission.known.contains_key(&IpAddr::from([0, 0, 0, 9])));
    }

    #[test]
    fn one_line_a_minute_with_the_number_left_out() {
        let (mut quiet, now) = (Quiet::default(), Instant::now());
        assert_eq!(quiet.pass("a", now), Some(0));
        assert_eq!(quiet.pass("a", now), None);
        assert_eq!(quiet.pass("a", now + QUIET / 2), None);
        assert_eq!(quiet.pass("b", now), Some(0));
        assert_eq!(quiet.pass("a", now + QUIET), Some(2));
    }
}
