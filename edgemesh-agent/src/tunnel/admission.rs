//! How much of this node strangers may take: pure, the time is an argument.
//!
//! A connection from outside costs a handshake before it can be known for a stranger's. So what is not yet known to be a
//! member's is counted, in all and by source, and sources whose connections come to nothing are slowed down.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

/// Most connections on their way to membership, in all.
const MAX_JOINING: usize = 256;

/// The same, from one source; a site behind one NAT is one source.
const MAX_JOINING_PER_SOURCE: usize = 64;

/// Failures that a source may make at once, before it is slowed down to [`FAILURES_PER_SECOND`].
const FAILURES_AT_ONCE: f64 = 50.0;

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
    joining: HashMap<Id, Option<IpAddr>>,
    sources: HashMap<IpAddr, Source>,
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
        Self { joining: HashMap::new(), sources: HashMap::new() }
    }

    /// Asks for leave to set up the connection `id` from `from`; `None` is for connections through a relay, which a
    /// relay makes for members only.
    pub(super) fn admit(&mut self, id: Id, from: Option<IpAddr>, now: Instant) -> Result<(), Denied> {
        if self.joining.len() >= MAX_JOINING {
            return Err(Denied::TooMany);
        }
        let from = from.map(source);
        if let Some(from) = from {
            if self.sources.len() >= MAX_SOURCES && !self.sources.contains_key(&from) {
                self.sources.retain(|_, source| source.joining > 0);
            }
            let source = self.sources.entry(from).or_insert(Source { joining: 0, tokens: FAILURES_AT_ONCE, at: now });
            source.refill(now);
            if source.joining >= MAX_JOINING_PER_SOURCE {
                return Err(Denied::TooManyFromSource);
            }
            // Each connection under way may still fail.
            if source.tokens < 1.0 {
                return Err(Denied::Failing);
            }
            source.joining += 1;
        }
        self.joining.insert(id, from);
        Ok(())
    }

    /// The connection turned out to be a member's.
    pub(super) fn joined(&mut self, id: &Id, now: Instant) {
        self.end(id, now, 0.0);
    }

    /// The connection came to nothing; does nothing for one that was not admitted or has joined.
    pub(super) fn failed(&mut self, id: &Id, now: Instant) {
        self.end(id, now, 1.0);
    }

    fn end(&mut self, id: &Id, now: Instant, cost: f64) {
        let Some(Some(from)) = self.joining.remove(id) else { return };
        let Some(source) = self.sources.get_mut(&from) else { return };
        source.refill(now);
        source.joining -= 1;
        source.tokens = (source.tokens - cost).max(0.0);
        if source.joining == 0 && source.tokens >= FAILURES_AT_ONCE {
            self.sources.remove(&from);
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
    use super::*;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    #[test]
    fn a_source_that_fails_is_slowed_down_and_others_are_not() {
        let (mut admission, start) = (Admission::new(), Instant::now());
        let mut admitted = 0;
        // 10,000 attempts in ten seconds.
        for id in 0..10_000u64 {
            let now = start + Duration::from_millis(id);
            if admission.admit(id, Some(A), now).is_ok() {
                admitted += 1;
                admission.failed(&id, now);
            }
        }
        assert!((100..=151).contains(&admitted), "{admitted} of 10,000");
        let now = start + Duration::from_secs(10);
        assert_eq!(admission.admit(10_001, Some(B), now), Ok(()));
        // It costs the same source no more than a tenth of a second each.
        assert_eq!(admission.admit(10_002, Some(A), now + Duration::from_millis(101)), Ok(()));
    }

    #[test]
    fn connections_on_their_way_are_bounded_by_source_and_in_all() {
        let (mut admission, now) = (Admission::new(), Instant::now());
        for id in 0..64 {
            assert_eq!(admission.admit(id, Some(A), now), Ok(()));
        }
        assert_eq!(admission.admit(64, Some(A), now), Err(Denied::TooManyFromSource));
        admission.joined(&0, now);
        assert_eq!(admission.admit(64, Some(A), now), Ok(()));
        for id in 65..257 {
            assert_eq!(admission.admit(id, None, now), Ok(()));
        }
        assert_eq!(admission.admit(257, Some(B), now), Err(Denied::TooMany));
    }

    #[test]
    fn joining_costs_nothing() {
        let (mut admission, now) = (Admission::new(), Instant::now());
        for id in 0..1000 {
            assert_eq!(admission.admit(id, Some(A), now), Ok(()));
            admission.joined(&id, now);
        }
        assert!(admission.sources.is_empty() && admission.joining.is_empty());
    }

    #[test]
    fn what_is_remembered_of_sources_is_bounded() {
        let (mut admission, now) = (Admission::new(), Instant::now());
        for id in 0..100_000u32 {
            let from = IpAddr::from(id.to_be_bytes());
            if admission.admit(id, Some(from), now).is_ok() {
                admission.failed(&id, now);
            }
        }
        assert!(admission.sources.len() <= MAX_SOURCES);
        assert_eq!(source("2001:db8::1".parse().unwrap()), source("2001:db8::ffff:1".parse().unwrap()));
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
