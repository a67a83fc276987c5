use std::path::Path;

use super::*;
use crate::{
    lifecycle::{Readiness, Tasks},
    model::{Kind, NamespacedName, Object, Service, ServiceKind},
    snapshot::Source,
};

/// The task, with a source and a data plane that are the test's.
struct Bench {
    events: mpsc::Sender<Received>,
    tables: watch::Receiver<Arc<ServiceTable>>,
    readiness: Readiness,
    tasks: Tasks,
}

impl Bench {
    /// On a node whose kernel serves so many frontends already; a path is where to keep a snapshot.
    fn start(path: Option<&Path>, adopted: usize) -> Self {
        let (events, received) = mpsc::channel(EVENTS);
        let (publish, tables) = watch::channel(Arc::default());
        let (conditions, readiness, tasks) = (Conditions::default(), Readiness::default(), Tasks::default());
        let source =
            Source { url: "https://10.0.0.1".to_owned(), connected: Box::new(|| true), restored: oneshot::channel().0 };
        let snapshot = path.map(|path| Snapshot::open(path, source, "edge1", conditions.clone()));
        let publish = Publisher {
            tables: publish,
            latency: Latency::default(),
            sight_of_node: SightOfNode { name: "edge1".to_owned(), conditions: conditions.clone() },
            sight_of_rules: SightOfRules::new(conditions),
        };
        let (tell, adopted_frontends) = oneshot::channel();
        tell.send(adopted).unwrap();
        let builder = Builder::new(Default::default(), "edge1");
        let task = Tables { builder, received, publish, snapshot, adopted: adopted_frontends, ways: None };
        tasks.spawn(task.run(readiness.block("the metadata source")));
        Self { events, tables, readiness, tasks }
    }

    async fn send(&self, event: Event) {
        self.events.send(Received { event, at: Instant::now() }).await.unwrap();
    }

    /// The names in the next table.
    async fn next(&mut self) -> Vec<String> {
        tokio::time::timeout(Duration::from_secs(20), self.tables.changed()).await.unwrap().unwrap();
        let table = self.tables.borrow_and_update();
        assert!(table.complete);
        table.services.iter().map(|entry| entry.service.name.name.to_string()).collect()
    }

    async fn nothing_for(&mut self, time: Duration) {
        let changed = tokio::time::timeout(time, self.tables.changed()).await;
        assert!(changed.is_err(), "{:?}", self.tables.borrow());
    }

    /// The source ends, and the agent with it.
    async fn stop(self) {
        drop(self.events);
        assert!(self.tasks.drain(Duration::from_secs(5)).await);
    }
}

fn services(names: &[&str]) -> Event {
    let service = |name: &&str| Service::new(NamespacedName::new("default", *name), ServiceKind::ClusterIp);
    Event::Replace(Kind::Service, names.iter().map(|name| Object::Service(service(name).into())).collect())
}

/// A directory with the snapshot of an agent that knew these Services.
async fn left_behind(names: &[&str]) -> (tempfile::TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("metadata.snapshot");
    let mut bench = Bench::start(Some(&path), 0);
    bench.send(services(names)).await;
    bench.send(Event::Synced).await;
    let _ = bench.next().await;
    bench.stop().await;
    assert!(path.exists(), "it is written at the stop");
    (directory, path)
}

#[tokio::test]
async fn without_a_snapshot_tables_follow_events_at_once() {
    let mut bench = Bench::start(None, 3);
    bench.send(services(&["a"])).await;
    bench.tables.changed().await.unwrap();
    assert!(!bench.tables.borrow_and_update().complete);
    assert_eq!(bench.readiness.waiting_for(), ["the metadata source"]);
    bench.send(Event::Synced).await;
    assert_eq!(bench.next().await, ["a"]);
    assert!(bench.readiness.waiting_for().is_empty());
    bench.stop().await;
}

#[tokio::test]
async fn a_restored_table_is_in_force_at_once_and_the_sources_replaces_it_when_it_is_whole() {
    let (_directory, path) = left_behind(&["a", "b"]).await;
    let mut bench = Bench::start(Some(&path), 0);
    assert_eq!(bench.next().await, ["a", "b"]);
    assert!(bench.readiness.waiting_for().is_empty());
    bench.send(services(&["a"])).await;
    // Half of it: of the kinds that are missing, everything is as of old.
    bench.nothing_for(QUIET / 4).await;
    bench.send(Event::Synced).await;
    assert_eq!(bench.next().await, ["a"]);
    bench.send(services(&["a", "c"])).await;
    assert_eq!(bench.next().await, ["a", "c"], "from now on at once");
    bench.stop().await;
}

#[tokio::test]
async fn what_the_kernel_has_is_not_replaced_by_a_snapshot_while_the_source_may_come() {
    let (_directory, path) = left_behind(&["a"]).await;
    let mut bench = Bench::start(Some(&path), 3);
    bench.nothing_for(QUIET / 4).await;
    bench.send(services(&["b"])).await;
    bench.send(Event::Synced).await;
    assert_eq!(bench.next().await, ["b"], "the old table was never in force");
    bench.stop().await;
}

#[tokio::test]
async fn a_source_that_does_not_come_or_does_not_go_on_is_not_waited_for_for_long() {
    let (_directory, path) = left_behind(&["a"]).await;
    let mut bench = Bench::start(Some(&path), 3);
    assert_eq!(bench.next().await, ["a"]);
    // An account that may read nothing else.
    bench.send(services(&["b"])).await;
    assert_eq!(bench.next().await, ["b"]);
    bench.send(services(&["c"])).await;
    let begun = Instant::now();
    assert_eq!(bench.next().await, ["c"]);
    assert!(begun.elapsed() < QUIET, "it has been waited for once");
    bench.stop().await;
}

#[test]
fn a_source_that_goes_on_and_on_is_waited_for_no_longer_than_that() {
    let start = Instant::now();
    let mut handover = Some(Handover::new(false, start));
    for second in 0..=9 {
        let now = start + Duration::from_secs(second);
        handover = handover.unwrap().heard(false, now);
        let until = (now + QUIET).min(start + PATIENCE);
        assert_eq!(handover, Some(Handover { held_until: Some(until), begun: Some(start) }));
    }
    assert_eq!(handover.unwrap().heard(false, start + PATIENCE), None);
    assert_eq!(handover.unwrap().heard(true, start + QUIET), None);
    assert_eq!(handover.unwrap().passed(), None);
    let idle = Handover::new(true, start);
    assert_eq!(idle.held_until, Some(start + QUIET));
    assert_eq!(idle.passed(), Some(Handover::new(false, start)), "the source can still come");
}
