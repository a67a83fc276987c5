//! How an upstream is: how fast, whether it answers, and when it is tried again where it does not.

use std::{
    net::SocketAddr,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::sync::Semaphore;

use super::{Question, UpstreamStatus};

/// An upstream that says nothing for so long, to anybody, is taken for silent. Shorter than [`super::STALE_AFTER`], so that
/// only the first who meets the silence waits for it.
pub(super) const SILENCE: Duration = Duration::from_millis(800);
/// From silence to the first probe; each pause is twice the one before …
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// … up to this, so that fresh answers come within 5 s of its return, a lost probe included.
const LAST_PAUSE: Duration = Duration::from_secs(2);
/// How long others wait for it before they ask the next, where it has not been timed yet; also the longest.
const HEDGE: Duration = Duration::from_millis(200);
const SHORTEST_HEDGE: Duration = Duration::from_millis(50);
/// How long a name that alone was not answered does not make its upstream count as silent again, and how long an upstream
/// that says anything at all is not called unreachable.
const HARD: Duration = Duration::from_secs(30);
/// How long the ways of an upstream are remembered: it may be replaced by a better one, and nothing is to be lost for ever
/// by one odd packet.
const WAYS: Duration = Duration::from_secs(3600);

/// A resolver has so many names at most that are hard; where more are not answered, it is not the names.
const MOST_HARD: usize = 4;

/// How many queries are on their way to one upstream at most.
const SOCKETS: usize = 256;

/// A server that questions are sent to.
#[derive(Debug)]
pub(super) struct Upstream {
    pub(super) address: SocketAddr,
    health: Mutex<Health>,
    /// As in `health`, to be read without a lock.
    silent: AtomicBool,
    /// One for each query on its way: those to a silent upstream must not take what others need.
    pub(super) sockets: Semaphore,
    pub(super) asked: AtomicU64,
    pub(super) silences: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) rejected: AtomicU64,
}

/// What is known of an upstream. Knows no clock.
#[derive(Debug, Default)]
pub(super) struct Health {
    round_trip: Option<Duration>,
    heard: Option<Instant>,
    silence: Option<Silence>,
    /// What it answered usably when it last did.
    easy: Option<Question>,
    /// What it did not answer while it answered something else, and when that was last seen. At most [`MOST_HARD`].
    hard: Vec<(Question, Instant)>,
    /// Since when it is known not to repeat the case of names.
    changes_case: Option<Instant>,
    /// Since when it is known not to understand EDNS.
    lacks_edns: Option<Instant>,
}

/// An upstream that does not answer.
#[derive(Debug)]
struct Silence {
    since: Instant,
    /// What it did not answer. To ask just that shows more than whether it lives: a resolver that lost its own upstreams
    /// still answers what it knows.
    question: Question,
    /// Another name that it did not answer either: then it is not the question that is hard.
    other: Option<Question>,
    /// How often it was asked.
    probes: usize,
    probe_at: Instant,
    pause: Duration,
}

impl Health {
    /// Something came to what was asked at `asked`, so it lives; that need not be of use to anybody.
    pub(super) fn heard(&mut self, asked: Instant, now: Instant) {
        let sample = now.saturating_duration_since(asked);
        // RFC 6298.
        self.round_trip = Some(self.round_trip.map_or(sample, |smooth| (smooth * 7 + sample) / 8));
        self.heard = Some(now);
    }

    /// It answered what was asked at `asked`, and not with an excuse such as SERVFAIL.
    ///
    /// Nothing less ends a silence: SERVFAIL is what a resolver says that has lost its own upstreams, and after seconds
    /// for which nobody should wait.
    pub(super) fn answered(&mut self, question: &Question, asked: Instant, now: Instant) {
        self.heard(asked, now);
        self.easy = Some(*question);
        self.hard.retain(|(hard, at)| hard.name() != question.name() && is_recent(*at, now));
        let Some(silence) = self.silence.take() else { return };
        let unanswered = [Some(silence.question), silence.other];
        if unanswered.iter().flatten().any(|unanswered| unanswered.name() == question.name()) {
            return;
        }
        for unanswered in unanswered.into_iter().flatten() {
            self.hard.retain(|(hard, _)| hard.name() != unanswered.name());
            self.hard.push((unanswered, now));
        }
        if self.hard.len() > MOST_HARD {
            self.hard.clear();
        }
    }

    /// Nothing came to what was asked at `asked`. Means nothing where anything has come since: then it is the question
    /// that is hard, as it is where that was found out a short while ago.
    pub(super) fn unanswered(&mut self, question: &Question, asked: Instant, now: Instant, random: f64) {
        if self.heard.is_some_and(|heard| heard >= asked) {
            return;
        }
        if let Some(silence) = &mut self.silence {
            if silence.question.name() != question.name() {
                silence.other = Some(*question);
            }
            return;
        }
        self.hard.retain(|(_, at)| is_recent(*at, now));
        if let Some((_, at)) = self.hard.iter_mut().find(|(hard, _)| hard.name() == question.name()) {
            // It is still hard.
            *at = now;
            return;
        }
        let other = self.hard.last().map(|(hard, _)| *hard);
        let probe_at = now + FIRST_PAUSE.mul_f64(jitter(random));
        let question = *question;
        self.silence = Some(Silence { since: now, question, other, probes: 0, probe_at, pause: FIRST_PAUSE });
    }

    /// What to ask it now, to learn whether it is back; the next probe comes after a longer pause.
    ///
    /// In turn what it did not answer, and another name that it did not, or else what it last did: as long as it is about
    /// one name, that may be the reason. After [`HARD`], what it last did in any case: there may be two such names.
    pub(super) fn probe(&mut self, now: Instant, random: f64) -> Option<Question> {
        let easy = self.easy.or_else(root_servers);
        let silence = self.silence.as_mut().filter(|silence| silence.probe_at <= now)?;
        silence.pause = LAST_PAUSE.min(silence.pause * 2);
        silence.probe_at = now + silence.pause.mul_f64(jitter(random));
        let long = now.saturating_duration_since(silence.since) >= HARD;
        let [other, last] = [silence.other.or(easy), easy.filter(|_| long && silence.other.is_some())];
        let turn = silence.probes % (2 + usize::from(last.is_some()));
        silence.probes += 1;
        match turn {
            0 => Some(silence.question),
            1 => other.or(Some(silence.question)),
            _ => last,
        }
    }

    pub(super) fn next_probe(&self) -> Option<Instant> {
        self.silence.as_ref().map(|silence| silence.probe_at)
    }

    /// Since when it is silent; None where it is not. Whatever came meanwhile shows that it lives, and puts that off.
    pub(super) fn silent_since(&self) -> Option<Instant> {
        let since = self.silence.as_ref()?.since;
        Some(self.heard.filter(|heard| *heard > since).map_or(since, |heard| heard + HARD))
    }

    pub(super) fn keeps_case(&self, now: Instant) -> bool {
        self.changes_case.is_none_or(|at| now.saturating_duration_since(at) >= WAYS)
    }

    pub(super) fn edns(&self, now: Instant) -> bool {
        self.lacks_edns.is_none_or(|at| now.saturating_duration_since(at) >= WAYS)
    }

    /// How long to wait for its answer before another is asked.
    pub(super) fn hedge(&self) -> Duration {
        self.round_trip.map_or(HEDGE, |smooth| (smooth * 2).clamp(SHORTEST_HEDGE, HEDGE))
    }
}

fn is_recent(at: Instant, now: Instant) -> bool {
    now.saturating_duration_since(at) < HARD
}

/// What every resolver must know, and asks first itself (RFC 9609): the name servers of the root.
fn root_servers() -> Option<Question> {
    const NS: u16 = 2;
    Question::new(&[0], NS, false, false)
}

/// A pause is random within a factor of two, so that the nodes of a site do not come all at once.
fn jitter(random: f64) -> f64 {
    0.5 + random / 2.0
}

impl Upstream {
    pub(super) fn new(address: SocketAddr) -> Self {
        Self {
            address,
            health: Mutex::default(),
            silent: AtomicBool::new(false),
            sockets: Semaphore::new(SOCKETS),
            asked: AtomicU64::new(0),
            silences: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
        }
    }

    pub(super) fn heard(&self, asked: Instant, now: Instant) {
        self.change(|health| health.heard(asked, now));
    }

    pub(super) fn answered(&self, question: &Question, asked: Instant, now: Instant) {
        self.change(|health| health.answered(question, asked, now));
    }

    /// It said that it could not, or nothing that makes sense.
    pub(super) fn refused(&self, asked: Instant, now: Instant) {
        self.heard(asked, now);
        self.refused.fetch_add(1, Relaxed);
    }

    pub(super) fn unanswered(&self, question: &Question, asked: Instant, now: Instant) {
        self.change(|health| health.unanswered(question, asked, now, random()));
        self.silences.fetch_add(1, Relaxed);
    }

    pub(super) fn probe(&self, now: Instant) -> Option<Question> {
        self.health().probe(now, random())
    }

    pub(super) fn next_probe(&self) -> Option<Instant> {
        self.health().next_probe()
    }

    pub(super) fn hedge(&self) -> Duration {
        self.health().hedge()
    }

    /// Whether it did not answer when it was last asked.
    pub(super) fn is_silent(&self) -> bool {
        self.silent.load(Relaxed)
    }

    pub(super) fn silent_since(&self) -> Option<Instant> {
        self.health().silent_since()
    }

    /// Sorts the best first: those that answer, the fastest of them, and those not timed yet before that.
    pub(super) fn rank(&self) -> (bool, Duration) {
        (self.is_silent(), self.health().round_trip.unwrap_or_default())
    }

    pub(super) fn keeps_case(&self, now: Instant) -> bool {
        self.health().keeps_case(now)
    }

    /// It does not repeat the case of names, which costs it a protection for a while.
    pub(super) fn changes_case(&self, now: Instant) {
        self.health().changes_case = Some(now);
    }

    pub(super) fn edns(&self, now: Instant) -> bool {
        self.health().edns(now)
    }

    /// It answers only queries without EDNS.
    pub(super) fn lacks_edns(&self, now: Instant) {
        self.health().lacks_edns = Some(now);
    }

    pub(super) fn status(&self, domains: Vec<String>) -> UpstreamStatus {
        UpstreamStatus {
            address: self.address,
            domains,
            healthy: !self.is_silent(),
            round_trip: self.health().round_trip.map(|smooth| smooth.as_secs_f64()),
            asked: self.asked.load(Relaxed),
            silent: self.silences.load(Relaxed),
            refused: self.refused.load(Relaxed),
            rejected: self.rejected.load(Relaxed),
        }
    }

    fn change(&self, change: impl FnOnce(&mut Health)) {
        let mut health = self.health();
        change(&mut health);
        self.silent.store(health.silence.is_some(), Relaxed);
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// From 0 to below 1.
fn random() -> f64 {
    let mut bytes = [0; 4];
    // Without random numbers, which the kernel always has, nodes would come at once; nothing worse.
    let _always = aws_lc_rs::rand::fill(&mut bytes);
    f64::from(u32::from_ne_bytes(bytes)) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests;
