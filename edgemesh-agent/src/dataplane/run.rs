//! The data plane's thread: waits for tables, applies them, tries again after errors.

use std::{
    io,
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{Count, Dataplane, Error, InForce, Latency, Room};
use crate::{
    allocator,
    conditions::Conditions,
    lifecycle::{Blocker, Readiness},
    model::{FrontendAddr, ServiceTable, changes},
};

/// How often put-off work is looked at.
const MAINTENANCE: Duration = Duration::from_secs(1);
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(30);
/// How long a reader waits for an answer before it goes without.
const ANSWER_DEADLINE: Duration = Duration::from_secs(2);

/// After so many changes at once, what they needed for a moment goes back to the kernel.
const MANY: usize = 1000;

/// The conditions a data plane raises.
const FULL: &str = "DataplaneFull";
const FAILED: &str = "DataplaneFailed";
const ENDED: &str = "DataplaneEnded";

/// A running data plane. It ends with the token it was given; what it put into the kernel stays in force.
#[derive(Clone, Debug)]
pub struct Handle {
    name: &'static str,
    questions: mpsc::Sender<Question>,
    applied: watch::Receiver<u64>,
    latency: Latency,
}

/// What readers ask of the thread, each with where the answer goes.
#[derive(Debug)]
enum Question {
    Counters(oneshot::Sender<Result<Vec<Count>, Error>>),
    Rooms(oneshot::Sender<Result<Vec<Room>, Error>>),
    Inspect(FrontendAddr, Option<u64>, oneshot::Sender<Result<InForce, Error>>),
}

impl Handle {
    /// What `status` calls this data plane.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The generation of the table in force; 0 before the first.
    pub fn generation(&self) -> u64 {
        *self.applied.borrow()
    }

    /// How long changes took to come into force.
    pub fn latency(&self) -> &Latency {
        &self.latency
    }

    /// Reads the counters.
    ///
    /// # Errors
    ///
    /// The kernel refuses, or the thread is too busy to answer within two seconds.
    pub async fn counters(&self) -> Result<Vec<Count>, Error> {
        self.ask("read the counters", Question::Counters).await
    }

    /// How full the maps are.
    ///
    /// # Errors
    ///
    /// The thread is too busy to answer within two seconds.
    pub async fn rooms(&self) -> Result<Vec<Room>, Error> {
        self.ask("count the entries of the maps", Question::Rooms).await
    }

    /// Reads back what the kernel does with connections to an address, see [`Dataplane::inspect`].
    ///
    /// # Errors
    ///
    /// The kernel refuses, or the thread is too busy to answer within two seconds.
    pub async fn inspect(&self, at: FrontendAddr, netns: Option<u64>) -> Result<InForce, Error> {
        self.ask("read a frontend back", |reply| Question::Inspect(at, netns, reply)).await
    }

    async fn ask<T>(
        &self,
        attempt: &str,
        question: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Question,
    ) -> Result<T, Error> {
        let late = |error: &str| Error::Kernel { attempt: attempt.to_owned(), error: error.to_owned() };
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.questions.send(question(reply)).await.map_err(|_| late("the data plane has stopped"))?;
            answer.await.map_err(|_| late("the data plane has stopped"))?
        };
        tokio::time::timeout(ANSWER_DEADLINE, exchange).await.unwrap_or_else(|_| Err(late("it is busy")))
    }
}

/// Makes it known if the thread ends though nobody told it to: by a panic, or because no more tables come.
pub async fn supervise(handle: Handle, conditions: Conditions, readiness: Readiness, stop: CancellationToken) {
    let mut applied = handle.applied;
    let ended = async { while applied.changed().await.is_ok() {} };
    tokio::select! {
        biased;
        () = stop.cancelled() => return,
        () = ended => {}
    }
    let message = "the data plane's thread has ended by itself; what it put in force stays, but follows no change: see \
                   the log, and restart the agent";
    conditions.raise(ENDED, handle.name, message, SystemTime::now());
    let _unready = readiness.block("the data plane");
    stop.cancelled().await;
}

/// Starts the thread. `unready` is dropped when the first complete table is in force; `latency` is told of later ones.
///
/// # Errors
///
/// The system refuses a thread or its runtime.
pub fn spawn(
    dataplane: Box<dyn Dataplane>,
    tables: watch::Receiver<Arc<ServiceTable>>,
    latency: Latency,
    conditions: Conditions,
    unready: Blocker,
    stop: CancellationToken,
) -> io::Result<(Handle, thread::JoinHandle<()>)> {
    let (questions, asked) = mpsc::channel(4);
    let (applied, seen) = watch::channel(0);
    let name = dataplane.name();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let (measured, unready) = (latency.clone(), Some(unready));
    let worker = Worker { dataplane, conditions, unready, in_force: None, applied, latency: measured, retry: None };
    let thread = thread::Builder::new()
        .name("dataplane".to_owned())
        .spawn(move || runtime.block_on(worker.run(tables, asked, stop)))?;
    Ok((Handle { name, questions, applied: seen, latency }, thread))
}

struct Worker {
    dataplane: Box<dyn Dataplane>,
    conditions: Conditions,
    unready: Option<Blocker>,
    /// The last table applied without an error; None sends the next one through `replace`.
    in_force: Option<Arc<ServiceTable>>,
    applied: watch::Sender<u64>,
    latency: Latency,
    retry: Option<Retry>,
}

#[derive(Clone, Copy)]
struct Retry {
    at: tokio::time::Instant,
    delay: Duration,
}

impl Worker {
    async fn run(
        mut self,
        mut tables: watch::Receiver<Arc<ServiceTable>>,
        mut asked: mpsc::Receiver<Question>,
        stop: CancellationToken,
    ) {
        let mut maintenance = tokio::time::interval(MAINTENANCE);
        maintenance.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tables.mark_changed();
        loop {
            let retry_at = self.retry.map(|retry| retry.at);
            let retry = async {
                match retry_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // Not biased: tables may change all the time, and abandoned sets would fill the maps.
                () = stop.cancelled() => return,
                _ = maintenance.tick() => self.dataplane.maintain(Instant::now()),
                changed = tables.changed() => match changed {
                    Ok(()) => {
                        let table = Arc::clone(&tables.borrow_and_update());
                        // Its failure says nothing about how long to wait: the back-off is for trying the same again.
                        self.retry = None;
                        self.take(&table);
                    }
                    Err(_) => return,
                },
                Some(question) = asked.recv() => self.answer(question),
                () = retry => {
                    let table = Arc::clone(&tables.borrow());
                    self.take(&table);
                }
            }
        }
    }

    /// A reader that gave up needs no answer.
    fn answer(&mut self, question: Question) {
        match question {
            Question::Counters(reply) => drop(reply.send(self.dataplane.counters())),
            Question::Rooms(reply) => drop(reply.send(Ok(self.dataplane.rooms()))),
            Question::Inspect(at, netns, reply) => drop(reply.send(self.dataplane.inspect(&at, netns))),
        }
    }

    /// Brings one table into force.
    fn take(&mut self, table: &Arc<ServiceTable>) {
        if !table.complete {
            return;
        }
        let started = Instant::now();
        let (result, changed) = match &self.in_force {
            Some(old) => {
                let changes = changes(old, table);
                (self.dataplane.apply(&changes, started), changes.len())
            }
            None => (self.dataplane.replace(table, started), table.services.len()),
        };
        match result {
            Ok(()) => {
                let (generation, now) = (table.generation, Instant::now());
                let took = now.duration_since(started);
                if *self.applied.borrow() == 0 {
                    self.latency.started(generation, now);
                    debug!(generation, changed, ?took, "table in force");
                } else {
                    let since_event = self.latency.in_force(generation, now);
                    debug!(generation, changed, ?took, ?since_event, "table in force");
                }
                self.in_force = Some(Arc::clone(table));
                self.unready = None;
                self.retry = None;
                self.conditions.clear(FULL, self.dataplane.name());
                self.conditions.clear(FAILED, self.dataplane.name());
                self.applied.send_replace(table.generation);
                if changed >= MANY {
                    allocator::give_back();
                }
            }
            Err(error) => {
                let reason = match error {
                    // All that found room is served; staying unready would help nobody.
                    Error::Full { .. } => {
                        self.unready = None;
                        FULL
                    }
                    Error::Kernel { .. } => FAILED,
                };
                self.conditions.raise(reason, self.dataplane.name(), error.to_string(), SystemTime::now());
                self.in_force = None;
                let delay = self.retry.map_or(FIRST_RETRY, |retry| (retry.delay * 2).min(LAST_RETRY));
                self.retry = Some(Retry { at: tokio::time::Instant::now() + delay, delay });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    };

    use super::*;
    use crate::{
        lifecycle::Tasks,
        model::{Builder, Change, Event, NamespacedName, Object, Service, ServiceKind},
    };

    /// Records what it is told, in short words, and fails as often as it is asked to.
    #[derive(Clone, Default)]
    struct Fake {
        calls: Arc<Mutex<Vec<String>>>,
        failures: Arc<Mutex<usize>>,
        maintained: Arc<AtomicUsize>,
        panics: Arc<AtomicBool>,
        /// Sends another table with each change, so that there always is one.
        endless: Arc<Mutex<Option<watch::Sender<Arc<ServiceTable>>>>>,
    }

    impl Fake {
        fn note(&self, call: String) -> Result<(), Error> {
            self.calls.lock().unwrap().push(call);
            assert!(!self.panics.load(Ordering::SeqCst), "asked to panic");
            let mut failures = self.failures.lock().unwrap();
            if *failures > 0 {
                *failures -= 1;
                return Err(Error::Kernel { attempt: "work".to_owned(), error: "asked to fail".to_owned() });
            }
            Ok(())
        }
    }

    impl Dataplane for Fake {
        fn name(&self) -> &'static str {
            "fake"
        }
        fn replace(&mut self, table: &ServiceTable, _: Instant) -> Result<(), Error> {
            self.note(format!("replace {}", table.services.len()))
        }
        fn apply(&mut self, changes: &[Change<'_>], _: Instant) -> Result<(), Error> {
            if let Some(tables) = &*self.endless.lock().unwrap() {
                let generation = tables.borrow().generation + 1;
                tables.send_replace(Arc::new(ServiceTable { generation, complete: true, ..ServiceTable::default() }));
            }
            self.note(format!("apply {}", changes.len()))
        }
        fn maintain(&mut self, _: Instant) {
            self.maintained.fetch_add(1, Ordering::SeqCst);
        }
        fn counters(&mut self) -> Result<Vec<Count>, Error> {
            Ok(Vec::new())
        }
        fn rooms(&self) -> Vec<Room> {
            Vec::new()
        }
        fn inspect(&mut self, _: &FrontendAddr, _: Option<u64>) -> Result<InForce, Error> {
            Ok(InForce::Nothing)
        }
    }

    fn service(name: &str) -> Event {
        let name = NamespacedName::new("default", name);
        Event::Apply(Object::Service(Service::new(name, ServiceKind::ClusterIp).into()))
    }

    struct Bench {
        fake: Fake,
        builder: Builder,
        tables: watch::Sender<Arc<ServiceTable>>,
        readiness: Readiness,
        conditions: Conditions,
        handle: Handle,
        stop: CancellationToken,
        thread: Option<thread::JoinHandle<()>>,
    }

    impl Bench {
        fn new(fake: Fake) -> Self {
            let (tables, receiver) = watch::channel(Arc::default());
            let (readiness, conditions, stop) = (Readiness::default(), Conditions::default(), CancellationToken::new());
            let (handle, thread) = spawn(
                Box::new(fake.clone()),
                receiver,
                Latency::default(),
                conditions.clone(),
                readiness.block("the data plane"),
                stop.clone(),
            )
            .unwrap();
            Self {
                fake,
                builder: Builder::default(),
                tables,
                readiness,
                conditions,
                handle,
                stop,
                thread: Some(thread),
            }
        }

        fn send(&mut self, events: impl IntoIterator<Item = Event>) -> u64 {
            events.into_iter().for_each(|event| self.builder.apply(event));
            let table = self.builder.build().unwrap();
            let generation = table.generation;
            self.tables.send_replace(table);
            generation
        }

        async fn applied(&mut self, generation: u64) {
            let wait = self.handle.applied.wait_for(|applied| *applied >= generation);
            tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap().unwrap();
        }

        fn calls(&self) -> Vec<String> {
            self.fake.calls.lock().unwrap().clone()
        }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            self.stop.cancel();
            if let Some(thread) = self.thread.take() {
                thread.join().unwrap();
            }
        }
    }

    #[tokio::test]
    async fn an_incomplete_table_touches_nothing_and_is_not_ready() {
        let mut bench = Bench::new(Fake::default());
        bench.send([service("a")]);
        assert!(bench.handle.counters().await.unwrap().is_empty(), "the thread is alive and has seen the table");
        assert!(bench.calls().is_empty());
        assert_eq!(bench.readiness.waiting_for(), ["the data plane"]);
        let generation = bench.send([Event::Synced]);
        bench.applied(generation).await;
        assert_eq!(bench.calls(), ["replace 1"]);
        assert!(bench.readiness.waiting_for().is_empty());
    }

    #[tokio::test]
    async fn later_tables_are_applied_as_changes() {
        let mut bench = Bench::new(Fake::default());
        let generation = bench.send([service("a"), service("b"), Event::Synced]);
        bench.applied(generation).await;
        let generation = bench.send([service("c"), service("d")]);
        bench.applied(generation).await;
        assert_eq!(bench.calls(), ["replace 2", "apply 2"]);
    }

    #[tokio::test]
    async fn an_error_is_a_condition_and_the_whole_table_is_tried_again() {
        let fake = Fake::default();
        *fake.failures.lock().unwrap() = 2;
        let mut bench = Bench::new(fake);
        let generation = bench.send([service("a"), Event::Synced]);
        let reasons = |conditions: &Conditions| conditions.list().iter().map(|c| c.reason).collect::<Vec<_>>();
        tokio::time::timeout(Duration::from_secs(10), async {
            while reasons(&bench.conditions).is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
        assert_eq!(reasons(&bench.conditions), [FAILED]);
        assert_eq!(bench.readiness.waiting_for(), ["the data plane"]);
        assert_eq!(bench.handle.generation(), 0, "a table that failed is not in force");
        bench.applied(generation).await;
        assert_eq!(reasons(&bench.conditions), Vec::<&str>::new());
        assert_eq!(bench.calls(), ["replace 1"; 3]);
    }

    #[tokio::test]
    async fn maintenance_goes_on_while_tables_never_stop_changing() {
        let mut bench = Bench::new(Fake::default());
        let generation = bench.send([service("a"), Event::Synced]);
        bench.applied(generation).await;
        *bench.fake.endless.lock().unwrap() = Some(bench.tables.clone());
        bench.send([service("b")]);
        let before = bench.fake.maintained.load(Ordering::SeqCst);
        let more = async {
            while bench.fake.maintained.load(Ordering::SeqCst) < before + 2 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(10 * MAINTENANCE, more).await.unwrap();
    }

    #[tokio::test]
    async fn tables_that_fail_one_after_another_do_not_put_off_the_next_attempt() {
        let fake = Fake::default();
        *fake.failures.lock().unwrap() = usize::MAX;
        let mut bench = Bench::new(fake);
        let mut generation = bench.send([Event::Synced]);
        for n in 0..8 {
            generation = bench.send([service(&format!("s{n}"))]);
            let tried = format!("replace {}", n + 1);
            while bench.calls().last() != Some(&tried) {
                tokio::task::yield_now().await;
            }
        }
        *bench.fake.failures.lock().unwrap() = 0;
        tokio::time::timeout(4 * FIRST_RETRY, bench.applied(generation)).await.unwrap();
    }

    #[tokio::test]
    async fn a_thread_that_ends_by_itself_is_a_condition_and_not_ready() {
        let mut bench = Bench::new(Fake::default());
        let generation = bench.send([service("a"), Event::Synced]);
        bench.applied(generation).await;
        let (handle, tasks) = (bench.handle.clone(), Tasks::default());
        tasks.spawn(supervise(handle, bench.conditions.clone(), bench.readiness.clone(), tasks.stopping()));
        bench.fake.panics.store(true, Ordering::SeqCst);
        bench.send([service("b")]);
        bench.thread.take().unwrap().join().unwrap_err();
        let told = async {
            while bench.readiness.waiting_for().is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), told).await.unwrap();
        assert_eq!(bench.conditions.list().iter().map(|c| c.reason).collect::<Vec<_>>(), [ENDED]);
        assert!(tasks.drain(Duration::from_secs(10)).await);
    }
}
