//! Names of the world outside the cluster: asked of upstreams, kept in a cache, and answered from it when the upstreams
//! are silent.
//!
//! [`Forwarder::cached`] answers at once or not at all, [`Forwarder::resolve`] asks. What is asked of whom is in
//! `routes`, how good an upstream is in `upstream`, how one is spoken to in `exchange`, when the next is asked in
//! `flight`; `cache` and `message` know no IO and no clock.

mod message;
mod question;

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::sync::watch;

use self::message::{Extended, Message, NXDOMAIN};
pub use self::{
    message::{ClientView, TtlLimits},
    question::Question,
};
use crate::{conditions::Conditions, lifecycle::Tasks, model::ServiceTable};

/// The longest that a question takes.
pub const DEADLINE: Duration = Duration::from_secs(4);

/// TTL of records that are past their own (RFC 8767 section 4).
const STALE_TTL: u32 = 30;

/// What the forwarder is told once, at its start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whom to ask what no stub domain covers.
    pub upstreams: Upstreams,
    /// The longest domain that a name is in counts.
    pub stub_domains: Vec<StubDomain>,
    /// Where this agent's own DNS listens: an upstream of that address and port is passed over, as it would be ourselves.
    pub own: Vec<SocketAddr>,
    pub cache: CacheSettings,
}

/// Whom to ask what no stub domain covers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Upstreams {
    /// The name servers of a file in the form of resolv.conf(5), followed as it changes.
    ResolvConf(PathBuf),
    /// EdgeMesh's `cacheDNS`: the cluster's own DNS, for all names.
    ClusterDns {
        /// Whether to ask the cluster IPs of its DNS Services, too, as they are in the model at any time.
        auto_detect: bool,
        servers: Vec<SocketAddr>,
    },
}

/// Names to be asked of servers of their own.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StubDomain {
    /// With dots, in any case; the names below it belong to it.
    pub domain: String,
    pub servers: Vec<SocketAddr>,
}

/// How much is kept, and how long.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CacheSettings {
    /// Default 10,000.
    pub max_entries: usize,
    /// Default 16 MiB.
    pub max_bytes: usize,
    pub ttl: TtlLimits,
    /// How long after the end of its TTL an answer is given while upstreams are silent; default a day.
    pub stale: Duration,
}

impl Default for CacheSettings {
    fn default() -> Self {
        Self {
            max_entries: 10_000,
            max_bytes: 16 << 20,
            ttl: TtlLimits::default(),
            stale: Duration::from_secs(24 * 60 * 60),
        }
    }
}

/// Answers from its cache and asks upstreams. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Forwarder(Arc<Inner>);

/// What the forwarder does, for `status` and the metrics.
#[derive(Clone, Debug, Serialize)]
pub struct ForwarderStatus {
    pub upstreams: Vec<UpstreamStatus>,
    pub cache: CacheStatus,
}

/// One upstream of one domain.
#[derive(Clone, Debug, Serialize)]
pub struct UpstreamStatus {
    pub address: SocketAddr,
    /// The stub domains it is asked for, `.` for all the rest.
    pub domains: Vec<String>,
    /// Whether it answered when it was last asked; true before that.
    pub healthy: bool,
    /// Smoothed, in seconds; None before the first answer.
    pub round_trip: Option<f64>,
    /// How many times it was asked, probes included.
    pub asked: u64,
    /// How many times it was silent or unreachable.
    pub silent: u64,
    /// How many times it said that it could not answer (SERVFAIL, REFUSED and their like).
    pub refused: u64,
    /// How many packets were not what was asked for.
    pub rejected: u64,
}

/// What the cache holds and has done.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize)]
pub struct CacheStatus {
    pub entries: usize,
    pub bytes: usize,
    /// Answers given from it within their TTL.
    pub hits: u64,
    /// Questions it had no such answer for.
    pub misses: u64,
    /// Answers given after their TTL.
    pub stale: u64,
    /// Questions asked again before anybody had to wait for them.
    pub refreshed: u64,
    /// Entries that went to make room.
    pub evicted: u64,
}

/// How a question would be answered.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// The stub domain that the name is in, `.` for none.
    pub domain: String,
    /// In the order in which they would be asked.
    pub upstreams: Vec<UpstreamStatus>,
    pub cached: Option<Cached>,
}

/// What the cache holds for a question.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cached {
    /// Seconds since it came from an upstream.
    pub age: u64,
    /// Seconds until it must be asked again; 0 where that is over.
    pub remaining: u64,
    /// Whether it is past its TTL.
    pub expired: bool,
    pub rcode: u16,
    /// How many records it has as answers.
    pub answers: u16,
}

/// An answer, which any number of clients may get a copy of.
#[derive(Clone, Debug)]
pub struct Reply {
    message: Arc<Message>,
    /// Since when its TTLs have been running.
    since: Instant,
    stale: bool,
    source: Source,
}

#[derive(Debug)]
struct Inner {
    settings: Settings,
}

impl Forwarder {
    /// Starts to follow its upstreams, as a task of `tasks`; `tables` is what `cacheDNS` finds the cluster's DNS in.
    ///
    /// Nothing is waited for: before the first upstream is known, questions that need one are answered with SERVFAIL.
    pub fn start(
        settings: Settings,
        tables: watch::Receiver<Arc<ServiceTable>>,
        conditions: Conditions,
        tasks: &Tasks,
    ) -> Self {
        drop((tables, conditions, tasks.stopping()));
        Self(Arc::new(Inner { settings }))
    }

    /// The answer if the cache has one that may be given now: without waiting, and without an allocation.
    pub fn cached(&self, question: &Question, now: Instant) -> Option<Reply> {
        let _ = (question, now, &self.0.settings);
        None
    }

    /// Asks upstreams, or waits with others for the answer to the same question. Takes at most [`DEADLINE`]; it never
    /// fails, as SERVFAIL is an answer too.
    pub async fn resolve(&self, question: &Question, now: Instant) -> Reply {
        tokio::task::yield_now().await;
        Reply { message: Arc::new(Message::failure(question)), since: now, stale: false, source: Source::None }
    }

    /// What it knows of its upstreams, and what its cache holds.
    pub fn status(&self) -> ForwarderStatus {
        ForwarderStatus { upstreams: Vec::new(), cache: CacheStatus::default() }
    }

    /// How a question would be answered now.
    pub fn explain(&self, question: &Question, now: Instant) -> Explanation {
        let _ = (question, now);
        Explanation { domain: ".".to_owned(), upstreams: Vec::new(), cached: None }
    }
}

/// Where an answer comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub enum Source {
    /// Kept from an earlier question, or asked for another client at the same time.
    Cache,
    Upstream(SocketAddr),
    /// No upstream answered: it is SERVFAIL.
    None,
}

impl Reply {
    /// Writes the copy for one client into `out` and returns its length, at most `to.limit` and `out.len()`: with its id
    /// and the case of its question, TTLs lowered by what has passed, an OPT only where it sent one, and truncated (TC)
    /// where it is too long. Returns 0 where not even the question fits.
    pub fn write(&self, to: &ClientView<'_>, now: Instant, out: &mut [u8]) -> usize {
        let age = u32::try_from(now.saturating_duration_since(self.since).as_secs()).unwrap_or(u32::MAX);
        let extended = match (self.stale, self.source) {
            (true, _) if self.message.rcode() == NXDOMAIN => Some(Extended::StaleNxdomain),
            (true, _) => Some(Extended::Stale),
            (false, Source::None) => Some(Extended::NoReachableAuthority),
            (false, Source::Cache | Source::Upstream(_)) => None,
        };
        if self.stale {
            self.message.write(to, |ttl| ttl.min(STALE_TTL), extended, out)
        } else {
            self.message.write(to, |ttl| ttl.saturating_sub(age), extended, out)
        }
    }

    /// Whether its TTL is over, and it is given because upstreams do not answer (RFC 8767).
    pub fn stale(&self) -> bool {
        self.stale
    }

    pub fn source(&self) -> Source {
        self.source
    }

    /// The response code, with the upper bits of EDNS: 0 NOERROR, 2 SERVFAIL, 3 NXDOMAIN …
    pub fn rcode(&self) -> u16 {
        self.message.rcode()
    }
}
