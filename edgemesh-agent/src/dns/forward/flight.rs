//! A question on its way: the best upstream is asked first, the next after a short while, and the first usable answer
//! counts.

use std::{net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    Question, TtlLimits,
    exchange::{self, ExchangeError},
    message::Message,
    upstream::{SILENCE, Upstream},
};

/// After all have been asked, how long until they are asked once more, as the packet may be lost.
const AGAIN: Duration = Duration::from_millis(500);
/// How often one upstream is asked, and how many queries there are in all where there are fewer upstreams.
const ROUNDS: usize = 3;
const QUERIES: usize = 6;
/// How long those known to be silent are waited for once the others have said that they cannot: what a neighbour that is
/// just back needs, within the 50 ms in which a stale answer is to be given.
const GRACE: Duration = Duration::from_millis(20);

/// What came of it.
#[derive(Debug)]
pub(super) enum Outcome {
    Answer(Message, SocketAddr),
    /// The upstreams that answered could not: SERVFAIL, REFUSED and their like.
    Excuse(Message, SocketAddr),
    Silence,
}

type Attempt = (usize, Result<Message, ExchangeError>);

pub(super) struct Race {
    question: Question,
    limits: TtlLimits,
    /// The best first.
    runners: Vec<Runner>,
    attempts: FuturesUnordered<BoxFuture<'static, Attempt>>,
    launched: usize,
    /// Only those known to be silent are left, and others have said that they cannot.
    in_vain: bool,
}

struct Runner {
    upstream: Arc<Upstream>,
    /// It was silent before. One that falls silent only now may be busy with just this question.
    was_silent: bool,
    /// It has had its say.
    done: bool,
}

impl Race {
    /// `upstreams` in the order in which to ask them.
    pub(super) fn new(question: Question, upstreams: Vec<Arc<Upstream>>, limits: TtlLimits) -> Self {
        let runner = |upstream: Arc<Upstream>| Runner { was_silent: upstream.is_silent(), upstream, done: false };
        let runners = upstreams.into_iter().map(runner).collect();
        Self { question, limits, runners, attempts: FuturesUnordered::new(), launched: 0, in_vain: false }
    }

    /// Asks until there is a usable answer, or nothing to hope for.
    pub(super) async fn run(&mut self, mut deadline: Instant) -> Outcome {
        let mut excuse = None;
        let mut next = self.launch();
        while !self.attempts.is_empty() || next.is_some() {
            tokio::select! {
                Some((index, result)) = self.attempts.next(), if !self.attempts.is_empty() => {
                    let address = self.runners.get_mut(index).map(|runner| {
                        runner.done = true;
                        runner.upstream.address
                    });
                    match (result, address) {
                        (Ok(answer), Some(address)) if answer.is_usable() => return Outcome::Answer(answer, address),
                        (Ok(answer), Some(address)) => excuse = Some((answer, address)),
                        (Err(error), Some(upstream)) => tracing::debug!(question = ?self.question, %upstream, "{error}"),
                        (_, None) => {}
                    }
                    // Nobody waits for another that was not asked yet.
                    if self.launched < self.runners.len() || self.runners.iter().all(|runner| runner.done) {
                        next = self.launch();
                    }
                    if excuse.is_some() && !self.in_vain && self.runners.iter().all(|r| r.done || r.was_silent) {
                        self.in_vain = true;
                        deadline = deadline.min(Instant::now() + GRACE);
                        while self.launched < self.runners.len() {
                            next = self.launch();
                        }
                    }
                }
                () = sleep_until(next.map_or(deadline, |next| next.min(deadline))) => {
                    if Instant::now() >= deadline {
                        break;
                    }
                    next = self.launch();
                }
            }
        }
        excuse.map_or(Outcome::Silence, |(message, address)| Outcome::Excuse(message, address))
    }

    /// Waits for the others, as long as it takes to learn whether they are silent, and hands a usable answer that is late to
    /// `late`.
    pub(super) async fn rest(mut self, mut late: impl FnMut(Message)) {
        if self.in_vain {
            // That is known, and a flood of names must not leave a task waiting for each.
            return;
        }
        let others = async {
            while let Some((_, result)) = self.attempts.next().await {
                if let Ok(answer) = result
                    && answer.is_usable()
                {
                    late(answer);
                }
            }
        };
        // How long it takes does not matter any more, and each of them has noted what it learnt.
        let _some_are_silent = timeout(SILENCE, others).await;
    }

    /// Asks the next upstream, and says when to ask one more; None where all was tried.
    fn launch(&mut self) -> Option<Instant> {
        let count = self.runners.len();
        let most = (ROUNDS * count).min(QUERIES.max(count));
        while self.launched < most {
            let index = self.launched % count;
            self.launched += 1;
            let Some(Runner { upstream, done: false, .. }) = self.runners.get(index) else { continue };
            let pause = if self.launched < count { upstream.hedge() } else { AGAIN };
            let (upstream, question, limits) = (Arc::clone(upstream), self.question, self.limits);
            let attempt = async move { (index, attempt(&upstream, &question, &limits).await) };
            self.attempts.push(attempt.boxed());
            return Some(Instant::now() + pause);
        }
        None
    }
}

/// Asks one upstream, and notes there if it is silent. Takes as long as it takes.
pub(super) async fn attempt(
    upstream: &Upstream,
    question: &Question,
    limits: &TtlLimits,
) -> Result<Message, ExchangeError> {
    let _socket = upstream.sockets.acquire().await;
    let asked = Instant::now();
    let silent = || upstream.unanswered(question, asked.into_std(), Instant::now().into_std());
    let mut exchange = pin!(exchange::ask(upstream, question, limits));
    let result = match timeout(SILENCE, &mut exchange).await {
        Ok(result) => result,
        Err(_elapsed) => {
            silent();
            return exchange.await;
        }
    };
    if let Err(ExchangeError::Io(_)) = &result {
        silent();
    }
    result
}
