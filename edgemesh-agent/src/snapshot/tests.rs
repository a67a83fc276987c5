use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::*;
use crate::model::{
    Endpoint, EndpointSet, NamespacedName, Node, Object, Place, Service, ServiceKind, ServiceTable, Subset,
};

const SERVER: &str = "https://10.0.0.1:6443";

/// A node's disk and what agents on it see.
struct World {
    directory: tempfile::TempDir,
    conditions: Conditions,
}

/// One run of an agent.
struct Run {
    snapshot: Snapshot,
    builder: Builder,
    connected: Arc<AtomicBool>,
    /// What the source was told at the start.
    reached: BTreeMap<Kind, u64>,
}

impl World {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), conditions: Conditions::default() }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("metadata.snapshot")
    }

    async fn start(&self) -> (Run, bool) {
        self.start_as(SERVER, "edge1").await
    }

    async fn start_as(&self, server: &str, node: &str) -> (Run, bool) {
        let connected = Arc::new(AtomicBool::new(false));
        let state = Arc::clone(&connected);
        let (restored, reached) = oneshot::channel();
        let source =
            Source { url: server.to_owned(), connected: Box::new(move || state.load(Ordering::SeqCst)), restored };
        let mut snapshot = Snapshot::open(&self.path(), source, node, self.conditions.clone());
        let mut builder = Builder::new(Default::default(), node);
        let restored = snapshot.restore(&mut builder).await;
        let reached = reached.await.unwrap_or_default();
        (Run { snapshot, builder, connected, reached }, restored)
    }

    /// Leaves the file of an agent that had one Service, one slice, one Endpoints and one Node.
    async fn learn(&self) {
        let (mut run, _) = self.start().await;
        run.deliver([
            Event::Replace(Kind::Service, vec![service("web")]),
            Event::Replace(Kind::EndpointSlice, vec![Object::EndpointSlice(set("web-1", "web", "10.244.0.1"))]),
            Event::Replace(Kind::Endpoints, vec![Object::Endpoints(set("api", "api", "10.244.0.2"))]),
            Event::Replace(Kind::Node, vec![node("edge1")]),
            Event::Synced,
        ]);
        run.snapshot.finish(&run.builder).await;
    }

    fn reasons(&self) -> Vec<&'static str> {
        self.conditions.list().iter().map(|condition| condition.reason).collect()
    }

    fn message(&self) -> String {
        self.conditions.list().remove(0).message
    }
}

impl Run {
    fn deliver(&mut self, events: impl IntoIterator<Item = Event>) {
        for event in events {
            let more = self.snapshot.note(&event, SystemTime::now());
            self.builder.apply(event);
            more.into_iter().for_each(|more| self.builder.apply(more));
            self.snapshot.follow(&self.builder);
        }
    }

    fn table(&mut self) -> Arc<ServiceTable> {
        self.builder.build().unwrap()
    }

    fn status(&self) -> SnapshotStatus {
        self.snapshot.state().status(SystemTime::now())
    }

    /// Waits until it is time to write, writes, and waits until that is done.
    async fn write(&mut self) {
        self.snapshot.due().await;
        self.snapshot.write(&self.builder, SystemTime::now());
        let outcome = self.snapshot.writing.take().unwrap().await;
        self.snapshot.written(outcome);
    }
}

fn service(name: &str) -> Object {
    Object::Service(Service::new(NamespacedName::new("default", name), ServiceKind::ClusterIp).into())
}

fn node(name: &str) -> Object {
    let name = NamespacedName::new("", name);
    Object::Node(Node { name, addresses: Vec::new(), labels: [("a".into(), "b".into())].into() }.into())
}

fn set(name: &str, service: &str, ip: &str) -> Arc<EndpointSet> {
    let place = Arc::new(Place { node: Some("edge1".into()), ..Place::default() });
    let endpoint = Endpoint { address: ip.parse().unwrap(), ready: true, serving: true, terminating: false, place };
    let [name, service] = [name, service].map(|name| NamespacedName::new("default", name));
    Arc::new(EndpointSet { name, service, subsets: vec![Subset { ports: Vec::new(), endpoints: vec![endpoint] }] })
}

fn now() -> u64 {
    state::seconds(SystemTime::now())
}

#[tokio::test]
async fn what_was_learnt_is_there_before_the_source_says_anything() {
    let world = World::new();
    let (mut run, restored) = world.start().await;
    assert!(!restored && run.builder.build().is_none());
    drop(run);
    world.learn().await;

    let (mut run, restored) = world.start().await;
    let table = run.table();
    assert!(restored && table.complete && table.node_known);
    assert_eq!(table.services.len(), 1);
    let status = run.status();
    let counts: Vec<(&str, usize)> =
        status.still_served.iter().map(|(kind, served)| (kind.as_str(), served.objects)).collect();
    assert_eq!(counts, [("EndpointSlice", 1), ("Endpoints", 1), ("Node", 1), ("Service", 1)]);
    assert!(status.restored.is_some_and(|restored| restored.age_seconds.is_some_and(|age| age < 60)));
    assert_eq!(world.reasons(), Vec::<&str>::new());
}

#[tokio::test]
async fn equal_objects_from_the_source_change_nothing_and_missing_ones_go() {
    let world = World::new();
    world.learn().await;
    let (mut run, _) = world.start().await;
    run.table();
    run.deliver([
        Event::Replace(Kind::EndpointSlice, vec![Object::EndpointSlice(set("web-1", "web", "10.244.0.1"))]),
        Event::Replace(Kind::Endpoints, Vec::new()),
        Event::Replace(Kind::Service, vec![service("web")]),
        Event::Replace(Kind::Node, vec![node("edge1")]),
        Event::Synced,
    ]);
    assert!(run.builder.build().is_none(), "nothing that is in force has changed");
    assert!(run.status().still_served.is_empty());
    run.deliver([Event::Replace(Kind::Service, Vec::new())]);
    assert_eq!(run.table().services.len(), 0);
}

#[tokio::test]
async fn a_kind_that_the_source_does_not_deliver_stays_and_keeps_its_age() {
    let world = World::new();
    world.learn().await;
    let old = now() - 1000;
    // As if it had been written then.
    let file = SnapshotFile::new(world.path());
    let mut contents = file.read().unwrap().unwrap();
    contents.sections.iter_mut().for_each(|section| section.as_of = old);
    file.write(&contents).unwrap();

    for round in 0..2 {
        let (mut run, _) = world.start().await;
        run.deliver([
            Event::Replace(Kind::Service, vec![service("web")]),
            Event::Replace(Kind::EndpointSlice, Vec::new()),
            Event::Synced,
        ]);
        assert!(run.builder.build().unwrap().node_known, "Nodes are refused, say; those that were known stay");
        let status = run.status();
        let kept: Vec<(&str, u64)> =
            status.still_served.iter().map(|(kind, served)| (kind.as_str(), served.as_of)).collect();
        assert_eq!(kept, [("Node", old)], "round {round}");
        run.snapshot.finish(&run.builder).await;
        let sections = file.read().unwrap().unwrap().sections;
        let as_of = |kind| sections.iter().find(|section| section.kind == kind).map(|section| section.as_of);
        assert_eq!(as_of(Kind::Node), Some(old));
        assert!(as_of(Kind::Service) > Some(old));
        assert_eq!(as_of(Kind::DestinationRule), None, "never delivered, not even as none");
    }
}

#[tokio::test]
async fn what_a_kind_was_complete_as_of_is_told_to_the_source_at_the_next_start() {
    let world = World::new();
    world.learn().await;
    let (mut run, _) = world.start().await;
    assert_eq!(run.reached, BTreeMap::new(), "the source said nothing of it");
    run.deliver([
        Event::Replace(Kind::Service, vec![service("web")]),
        Event::Reached(Kind::Service, 1007),
        Event::Synced,
    ]);
    run.snapshot.finish(&run.builder).await;
    // A source that delivers another kind alone leaves it as it was.
    for _ in 0..2 {
        let (mut run, _) = world.start().await;
        assert_eq!(run.reached, BTreeMap::from([(Kind::Service, 1007)]));
        run.deliver([Event::Replace(Kind::Node, vec![node("edge1")]), Event::Synced]);
        run.snapshot.finish(&run.builder).await;
    }
    let (run, restored) = world.start_as("https://10.0.0.2:6443", "edge1").await;
    assert!(!restored && run.reached.is_empty(), "of another cluster: {:?}", run.reached);
}

#[tokio::test]
async fn endpoints_of_the_kind_that_the_source_does_not_have_go_with_its_first_synced() {
    let world = World::new();
    world.learn().await;
    let (mut run, _) = world.start().await;
    let table = run.table();
    let addresses = |table: &ServiceTable| table.services.iter().map(|entry| entry.ports.len()).collect::<Vec<_>>();
    assert_eq!(addresses(&table), [0]);
    // A server without EndpointSlices, and a source that says nothing of them.
    run.deliver([
        Event::Replace(Kind::Service, vec![service("web")]),
        Event::Replace(Kind::Endpoints, vec![Object::Endpoints(set("web", "web", "10.244.0.9"))]),
    ]);
    assert_eq!(run.builder.objects(Kind::EndpointSlice).len(), 1, "not before it is known to be all");
    run.deliver([Event::Synced]);
    assert!(run.builder.objects(Kind::EndpointSlice).is_empty());
    assert_eq!(run.builder.objects(Kind::Endpoints).len(), 1);
    run.snapshot.finish(&run.builder).await;
    let (run, _) = world.start().await;
    assert!(run.builder.objects(Kind::EndpointSlice).is_empty());
}

#[tokio::test]
async fn nothing_is_written_before_everything_is_known() {
    let world = World::new();
    let (mut run, _) = world.start().await;
    run.deliver([Event::Replace(Kind::Service, vec![service("web")])]);
    let waited = tokio::time::timeout(Duration::from_millis(500), run.snapshot.due()).await;
    waited.unwrap_err();
    run.snapshot.finish(&run.builder).await;
    assert!(!world.path().exists());
}

#[tokio::test]
async fn changes_are_written_soon_and_news_of_nothing_is_not() {
    let world = World::new();
    world.learn().await;
    let (mut run, _) = world.start().await;
    let lists = [
        Event::Replace(Kind::Service, vec![service("web")]),
        Event::Replace(Kind::EndpointSlice, Vec::new()),
        Event::Replace(Kind::Node, vec![node("edge1")]),
        Event::Synced,
    ];
    run.deliver(lists);
    run.write().await;
    let status = run.status();
    assert!(status.size_bytes.is_some_and(|size| size > 100) && status.written.is_some());
    run.deliver([Event::Apply(node("edge1")), Event::Apply(service("web"))]);
    assert!(!run.snapshot.schedule.is_needed(), "Nodes tell all the time that they are alive");
    run.deliver([Event::Apply(service("api"))]);
    run.write().await;
    let (run, _) = world.start().await;
    assert_eq!(run.builder.objects(Kind::Service).len(), 2);
}

#[tokio::test]
async fn what_nobody_stands_behind_is_not_written_anew() {
    let world = World::new();
    let (mut run, _) = world.start().await;
    run.deliver([Event::Replace(Kind::Service, vec![service("web")]), Event::Synced]);
    run.write().await;
    tokio::time::pause();
    let day = Duration::from_secs(86_400);
    tokio::time::timeout(day, run.snapshot.due()).await.unwrap_err();
    run.connected.store(true, Ordering::SeqCst);
    tokio::time::timeout(day, run.snapshot.due()).await.unwrap();
}

#[tokio::test]
async fn a_snapshot_in_force_is_a_condition_after_a_while() {
    let world = World::new();
    world.learn().await;
    let (mut run, _) = world.start().await;
    assert_eq!(world.reasons(), Vec::<&str>::new(), "most sources are there at once");
    tokio::time::pause();
    tokio::time::timeout(2 * NOTICE, run.snapshot.due()).await.unwrap_err();
    assert_eq!(world.reasons(), [IN_FORCE]);
    assert!(world.message().contains(": Service, EndpointSlice, Endpoints, Node; "), "{}", world.message());
    assert!(world.message().contains(SERVER), "{}", world.message());
    run.deliver([Event::Replace(Kind::Service, Vec::new()), Event::Replace(Kind::EndpointSlice, Vec::new())]);
    assert!(world.message().contains(": Endpoints, Node; "), "{}", world.message());
    run.deliver([Event::Synced]);
    assert!(world.message().contains(": Node; "), "{}", world.message());
    run.deliver([Event::Replace(Kind::Node, Vec::new())]);
    assert_eq!(world.reasons(), Vec::<&str>::new());
}

#[tokio::test]
async fn what_is_another_clusters_or_nodes_is_set_aside() {
    let world = World::new();
    for (server, node, told) in [
        ("https://10.0.0.2:6443", "edge1", "it is of another source, https://10.0.0.1:6443"),
        (SERVER, "edge2", "it is of another node, edge1"),
    ] {
        world.learn().await;
        assert_eq!(world.reasons(), Vec::<&str>::new());
        let (mut run, restored) = world.start_as(server, node).await;
        assert!(!restored && run.builder.build().is_none());
        assert_eq!(world.reasons(), [UNUSABLE]);
        let aside = world.directory.path().join("metadata.snapshot.unusable-1");
        assert!(world.message().contains(told), "{}", world.message());
        assert!(world.message().contains(&aside.display().to_string()) && aside.exists() && !world.path().exists());
        run.deliver([Event::Replace(Kind::Service, Vec::new()), Event::Synced]);
        run.write().await;
        assert_eq!(world.reasons(), Vec::<&str>::new());
        fs::remove_file(world.path()).unwrap();
    }
}

#[test]
fn the_cas_of_clusters_tell_them_apart_where_both_are_known() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ca.crt");
    assert_eq!(cluster_digest(&path), None);
    fs::write(&path, "one").unwrap();
    let one = cluster_digest(&path);
    fs::write(&path, "two").unwrap();
    let of =
        |cluster: &Option<String>| Identity { source: String::new(), node: String::new(), cluster: cluster.clone() };
    let two = cluster_digest(&path);
    assert!(mismatch(&of(&one), &of(&two)).is_some_and(|why| why.contains("another cluster")));
    for (a, b) in [(&one, &one), (&one, &None), (&None, &two)] {
        assert_eq!(mismatch(&of(a), &of(b)), None);
    }
}

#[tokio::test]
async fn a_damaged_or_newer_file_is_set_aside_and_one_in_a_foreign_directory_is_left_alone() {
    let world = World::new();
    world.learn().await;
    let newer = fs::read_to_string(world.path()).unwrap().replacen(" 2\n", " 3\n", 1);
    fs::write(world.path(), &newer).unwrap();
    let (_, restored) = world.start().await;
    assert!(!restored && world.message().contains("it has version 3 of the format"), "{}", world.message());
    let aside = world.path().with_extension("snapshot.unusable-1");
    assert_eq!(fs::read_to_string(aside).unwrap(), newer, "for the agent that wrote it");

    world.learn().await;
    let mut bytes = fs::read(world.path()).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(world.path(), &bytes).unwrap();
    let (_, restored) = world.start().await;
    assert!(!restored && world.message().contains("it ends too early; it was renamed to"), "{}", world.message());

    world.learn().await;
    fs::set_permissions(world.directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let (run, restored) = world.start().await;
    assert!(!restored && world.message().contains("can be written to by others"), "{}", world.message());
    assert!(world.path().exists());
    let mut run = run;
    run.deliver([Event::Replace(Kind::Service, Vec::new()), Event::Synced]);
    run.write().await;
    assert_eq!(world.reasons(), [NOT_WRITTEN, UNUSABLE]);
    assert!(run.status().last_error.is_some());
    fs::set_permissions(world.directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
    run.write().await;
    assert_eq!(world.reasons(), Vec::<&str>::new());
    assert_eq!(run.status().last_error, None);
}

#[tokio::test]
async fn a_clock_that_is_behind_the_snapshot_makes_its_age_unknown_and_nothing_else() {
    let world = World::new();
    world.learn().await;
    let file = SnapshotFile::new(world.path());
    let mut contents = file.read().unwrap().unwrap();
    contents.taken = now() + 1_000_000;
    contents.sections.iter_mut().for_each(|section| section.as_of = contents.taken);
    file.write(&contents).unwrap();
    let (mut run, restored) = world.start().await;
    assert!(restored && run.table().complete);
    let status = run.status();
    assert_eq!(status.restored.unwrap().age_seconds, None);
    assert!(status.still_served.values().all(|served| served.age_seconds.is_none()));
    tokio::time::pause();
    tokio::time::timeout(2 * NOTICE, run.snapshot.due()).await.unwrap_err();
    assert!(world.message().contains("at a time that the clock of this node has not reached"), "{}", world.message());
    // The clock is right again.
    let later = SystemTime::now() + Duration::from_secs(1_000_100);
    let age = run.snapshot.state().status(later).restored.unwrap().age_seconds;
    assert!(age.is_some_and(|age| (90..=110).contains(&age)), "{age:?}");
}
