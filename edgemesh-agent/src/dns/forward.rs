//! Names of the world outside the cluster: asked of upstreams, kept in a cache, and answered from it when the upstreams
//! are silent.
//!
//! [`Forwarder::cached`] answers at once or not at all, [`Forwarder::resolve`] asks. What is asked of whom is in
//! `routes`, how good an upstream is in `upstream`, how one is spoken to in `exchange`, when the next is asked in
//! `flight`; `cache` and `message` know no IO and no clock.

mod cache;
mod exchange;
#[cfg(test)]
mod fake;
mod flight;
mod follow;
mod message;
mod probe;
mod question;
mod resolv_conf;
mod routes;
mod upstream;

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    net::SocketAddr,
    path::PathBuf,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{timeout, timeout_at},
};

use self::{
    cache::{Bounds, Cache, Hit},
    flight::{Outcome, Race},
    message::{Message, NXDOMAIN},
    routes::Routes,
};
pub use self::{
    message::{ClientView, TtlLimits},
    question::Question,
};
use crate::{conditions::Conditions, dns::wire::Extended, lifecycle::Tasks, model::ServiceTable};

/// The longest that a question takes: most clients ask again after 5 s.
pub const DEADLINE: Duration = Duration::from_secs(4);
/// The same while the upstreams of the name are known to be silent.
const DEADLINE_OF_SILENT: Duration = Duration::from_millis(1500);
/// Whoever waits for an answer gets a stale one, if there is one, after as long (RFC 8767 section 5 suggests less than 1.8 s).
pub const STALE_AFTER: Duration = Duration::from_secs(1);

/// When the silence of an upstream that was asked has been noted.
const NOTED: Duration = upstream::SILENCE.saturating_add(Duration::from_millis(20));

/// How many questions are on their way at most …
const FLIGHTS: usize = 512;
/// … of which those to silent upstreams leave some room for the others …
const FLIGHTS_TO_SILENT: usize = 256;
/// … and how many of them for nobody.
const REFRESHES: usize = 32;
const REFRESH_QUEUE: usize = 256;
/// The cache is in parts, each with a lock of its own, unless it is small.
const MOST_SHARDS: usize = 16;
const LEAST_SHARD: usize = 512;

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
    /// By hash of the question.
    shards: Box<[Mutex<Cache>]>,
    hashes: RandomState,
    routes: RwLock<Arc<Routes>>,
    /// Questions on their way; each is asked once for all who wait for it. That also ends the loop of an upstream that asks
    /// us back: its question is on its way already.
    flights: Mutex<HashMap<Question, watch::Receiver<Option<Reply>>>>,
    /// Questions to be asked again though nobody waits.
    refresh: mpsc::Sender<Question>,
    /// An upstream has fallen silent, or upstreams have changed.
    look_after: Notify,
    conditions: Conditions,
    tasks: Tasks,
}

impl Forwarder {
    /// Starts to follow its upstreams, as tasks of `tasks`; `tables` is what `cacheDNS` finds the cluster's DNS in.
    ///
    /// Nothing is waited for: as long as no upstream is known, questions are answered from the cache or with SERVFAIL.
    pub fn start(
        settings: Settings,
        tables: watch::Receiver<Arc<ServiceTable>>,
        conditions: Conditions,
        tasks: &Tasks,
    ) -> Self {
        let count = (settings.cache.max_entries / LEAST_SHARD).clamp(1, MOST_SHARDS);
        let bounds = Bounds {
            entries: settings.cache.max_entries / count,
            bytes: settings.cache.max_bytes / count,
            stale: settings.cache.stale,
        };
        let (refresh, refreshes) = mpsc::channel(REFRESH_QUEUE);
        let forwarder = Self(Arc::new(Inner {
            shards: (0..count).map(|_| Mutex::new(Cache::new(bounds))).collect(),
            hashes: RandomState::new(),
            routes: RwLock::new(Arc::new(Routes::new(&settings.stub_domains, &settings.own))),
            flights: Mutex::default(),
            refresh,
            look_after: Notify::new(),
            conditions,
            tasks: tasks.clone(),
            settings,
        }));
        let follow = follow::Follow::new(forwarder.clone(), tables);
        forwarder.spawn(follow.run());
        forwarder.spawn(forwarder.clone().refresh(refreshes));
        forwarder.spawn(probe::run(forwarder.clone()));
        forwarder
    }

    /// The answer if the cache has one that may be given now: without waiting, and without an allocation.
    ///
    /// It is a stale one where asking would be in vain: the upstreams of the name were silent when they were last asked,
    /// or could not answer just this a moment ago.
    pub fn cached(&self, question: &Question, now: Instant) -> Option<Reply> {
        let hit = self.shard(question).get(question, now, || self.routes().group(question.name()).is_silent())?;
        if hit.refresh {
            // Where there is much to refresh, it is not urgent.
            let _full = self.0.refresh.try_send(*question);
        }
        Some(Reply::of(hit))
    }

    /// Asks upstreams, or waits with others for the answer to the same question. Takes at most [`DEADLINE`], and not longer
    /// than [`STALE_AFTER`] where there is a stale answer; it never fails, as SERVFAIL is an answer too.
    ///
    /// `now` is when the client asked. To be called when [`Forwarder::cached`] has nothing.
    pub async fn resolve(&self, question: &Question, now: Instant) -> Reply {
        let patience = if self.shard(question).has_last_resort(question, now) { STALE_AFTER } else { DEADLINE };
        let answered = async {
            let mut answer = self.join(question, None)?;
            answer.wait_for(Option::is_some).await.ok()?.clone()
        };
        match timeout_at((now + patience).into(), answered).await {
            Ok(Some(reply)) => return reply,
            Ok(None) => {}
            Err(_elapsed) => self.shard(question).note_failure(question, now + patience),
        }
        self.last_resort(question, now).unwrap_or_else(|| Reply::failure(question, now))
    }

    /// What it knows of its upstreams, and what its cache holds.
    pub fn status(&self) -> ForwarderStatus {
        let routes = self.routes();
        let upstreams = routes.upstreams().iter().map(|upstream| routes.status(upstream)).collect();
        let mut cache = CacheStatus::default();
        for shard in &self.0.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let counts = shard.counts();
            cache.entries += shard.len();
            cache.bytes += shard.bytes();
            cache.hits += counts.hits;
            cache.misses += counts.misses;
            cache.stale += counts.stale;
            cache.refreshed += counts.refreshed;
            cache.evicted += counts.evicted;
        }
        ForwarderStatus { upstreams, cache }
    }

    /// How a question would be answered now.
    pub fn explain(&self, question: &Question, now: Instant) -> Explanation {
        let routes = self.routes();
        let group = routes.group(question.name());
        let cached = self.shard(question).look(question, now).map(|(message, since, expires)| Cached {
            age: now.saturating_duration_since(since).as_secs(),
            remaining: expires.saturating_duration_since(now).as_secs(),
            expired: now >= expires,
            rcode: message.rcode(),
            answers: message.answers(),
        });
        let upstreams = group.ranked().iter().map(|upstream| routes.status(upstream)).collect();
        Explanation { domain: group.domain(), upstreams, cached }
    }

    /// What is given where nobody answers.
    fn last_resort(&self, question: &Question, now: Instant) -> Option<Reply> {
        self.shard(question).last_resort(question, now).map(Reply::of)
    }

    /// The answer to a question that is on its way, now if it was not yet; None where there are too many. `permit` is
    /// held until it is there.
    fn join(
        &self,
        question: &Question,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Option<watch::Receiver<Option<Reply>>> {
        let mut flights = self.0.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = flights.get(question)
            && answer.has_changed().is_ok()
        {
            return Some(answer.clone());
        }
        let silent = || self.routes().group(question.name()).is_silent();
        if flights.len() >= FLIGHTS || flights.len() >= FLIGHTS_TO_SILENT && silent() {
            return None;
        }
        let (tell, answer) = watch::channel(None);
        flights.insert(*question, answer.clone());
        self.spawn(self.clone().fly(*question, tell, permit));
        Some(answer)
    }

    async fn fly(self, question: Question, tell: watch::Sender<Option<Reply>>, permit: Option<OwnedSemaphorePermit>) {
        let routes = self.routes();
        let group = routes.group(question.name());
        let deadline = tokio::time::Instant::now() + if group.is_silent() { DEADLINE_OF_SILENT } else { DEADLINE };
        let mut race = Race::new(question, group.ranked(), self.0.settings.cache.ttl);
        let outcome = {
            let mut run = pin!(race.run(deadline));
            loop {
                if let Ok(outcome) = timeout(NOTED, &mut run).await {
                    break outcome;
                }
                // Who has fallen silent is probed while this question waits: that may find it well, and only this hard.
                if group.upstreams.iter().any(|upstream| upstream.is_silent()) {
                    self.0.look_after.notify_one();
                }
            }
        };
        let mut answered = matches!(outcome, Outcome::Answer(..));
        let reply = self.land(&question, outcome, tokio::time::Instant::now().into_std());
        self.0.flights.lock().unwrap_or_else(PoisonError::into_inner).remove(&question);
        tell.send_replace(Some(reply));
        drop(permit);
        if group.upstreams.iter().any(|upstream| upstream.is_silent()) {
            self.0.look_after.notify_one();
        }
        let keep = |message| {
            if !std::mem::replace(&mut answered, true) {
                self.shard(&question).put(&question, Arc::new(message), Instant::now());
            }
        };
        race.rest(keep).await;
        if group.upstreams.iter().any(|upstream| upstream.is_silent()) {
            self.0.look_after.notify_one();
        }
    }

    /// Keeps what came, and makes it an answer.
    fn land(&self, question: &Question, outcome: Outcome, now: Instant) -> Reply {
        let (message, by) = match outcome {
            Outcome::Answer(message, address) => {
                let message = Arc::new(message);
                self.shard(question).put(question, Arc::clone(&message), now);
                return Reply { message, since: now, stale: false, source: Source::Upstream(address) };
            }
            Outcome::Excuse(message, address) => (Arc::new(message), Some(address)),
            Outcome::Silence => (Arc::new(Message::failure(question)), None),
        };
        let mut shard = self.shard(question);
        shard.fail(question, Arc::clone(&message), by, now);
        let known = shard.last_resort(question, now);
        let source = by.map_or(Source::None, Source::Upstream);
        known.map_or(Reply { message, since: now, stale: false, source }, Reply::of)
    }

    /// Asks what is to be asked again, few at a time.
    async fn refresh(self, mut questions: mpsc::Receiver<Question>) {
        let permits = Arc::new(Semaphore::new(REFRESHES));
        while let Some(question) = questions.recv().await {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
            self.join(&question, Some(permit));
        }
    }

    fn shard(&self, question: &Question) -> MutexGuard<'_, Cache> {
        let shards = &self.0.shards;
        let index = (self.0.hashes.hash_one(question.key()) as usize) % shards.len();
        shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn routes(&self) -> Arc<Routes> {
        Arc::clone(&self.0.routes.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes `servers` the upstreams for all names outside stub domains. Says whether any is left without ourselves;
    /// where none is, those before stay.
    fn set_servers(&self, servers: &[SocketAddr]) -> bool {
        let own = &self.0.settings.own;
        if servers.iter().all(|&server| routes::is_own(server, own)) {
            return false;
        }
        let mut routes = self.0.routes.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(changed) = routes.with_rest(servers, own) {
            tracing::info!(?servers, "upstream name servers");
            *routes = Arc::new(changed);
            self.0.look_after.notify_one();
        }
        true
    }

    /// Runs until told to stop.
    fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        let stop = self.0.tasks.stopping();
        self.0.tasks.spawn(async move {
            stop.run_until_cancelled(future).await;
        });
    }
}

/// Where an answer comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub enum Source {
    /// Kept from an earlier question, or asked for another client at the same time.
    Cache,
    /// It said so just now; or, where it said that it cannot, within the last two seconds.
    Upstream(SocketAddr),
    /// No upstream answered: it is SERVFAIL.
    None,
}

impl Reply {
    fn of(hit: Hit) -> Self {
        // A failure that is remembered is nobody's answer.
        let source = match (hit.message.lifetime(), hit.refused_by) {
            (Some(_), _) => Source::Cache,
            (None, Some(address)) => Source::Upstream(address),
            (None, None) => Source::None,
        };
        Self { message: hit.message, since: hit.since, stale: hit.stale, source }
    }

    fn failure(question: &Question, now: Instant) -> Self {
        Self { message: Arc::new(Message::failure(question)), since: now, stale: false, source: Source::None }
    }

    /// Writes the copy for one client into `out` and returns its length, at most `to.limit` and `out.len()`: with its id
    /// and the case of its question, TTLs lowered by what has passed, an OPT only where it sent one, and truncated (TC)
    /// where it is too long. Returns 0 where not even the question fits.
    pub fn write(&self, to: &ClientView<'_>, now: Instant, out: &mut [u8]) -> usize {
        let age = u32::try_from(now.saturating_duration_since(self.since).as_secs()).unwrap_or(u32::MAX);
        if self.stale {
            self.message.write(to, |ttl| ttl.min(STALE_TTL), self.extended(), out)
        } else {
            self.message.write(to, |ttl| ttl.saturating_sub(age), self.extended(), out)
        }
    }

    /// Why it is not what it could be.
    pub fn extended(&self) -> Option<Extended> {
        match (self.stale, self.source) {
            (true, _) if self.message.rcode() == NXDOMAIN => Some(Extended::StaleNxdomain),
            (true, _) => Some(Extended::Stale),
            (false, Source::None) => Some(Extended::NoReachableAuthority),
            (false, Source::Cache | Source::Upstream(_)) => None,
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

#[cfg(test)]
mod tests;
