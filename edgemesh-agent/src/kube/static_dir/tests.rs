use std::{
    fs::File,
    io::Write,
    os::unix::fs::symlink,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::{sync::mpsc, time::timeout};

use super::*;
use crate::{
    conditions::Condition,
    kube::Received,
    model::{Event, Object},
};

/// Far longer than anything takes; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

struct Bench {
    directory: TempDir,
    events: mpsc::Receiver<Received>,
    conditions: Conditions,
    state: SourceState,
    tasks: Tasks,
}

fn service(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: 10.96.0.1, ports: [{{port: {port}}}]}}\n"
    )
}

fn slice(name: &str, service: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}\n  labels: {{kubernetes.io/service-name: {service}}}\naddressType: IPv4\nports: [{{port: 80}}]\nendpoints: [{{addresses: [10.0.0.1]}}]\n"
    )
}

/// `apply Service default/web:80`, and so on.
fn describe(event: &Event) -> String {
    let object = |object: &Object| match object {
        Object::Service(service) => {
            let ports: Vec<String> = service.ports.iter().map(|port| port.port.to_string()).collect();
            format!("Service {}:{}", service.name, ports.join(","))
        }
        Object::EndpointSlice(_) | Object::Endpoints(_) | Object::Node(_) | Object::DestinationRule(_) => {
            format!("{} {}", object.kind(), object.name())
        }
    };
    match event {
        Event::Apply(applied) => format!("apply {}", object(applied)),
        Event::Delete(kind, name) => format!("delete {kind} {name}"),
        Event::Replace(kind, objects) => {
            format!("replace {kind} [{}]", objects.iter().map(object).collect::<Vec<_>>().join(" "))
        }
        Event::Reached(kind, version) => format!("reached {kind} {version}"),
        Event::Synced => "synced".to_owned(),
    }
}

impl Bench {
    /// Starts the source on a directory that is filled first, and passes over what it says at the start.
    async fn start(fill: impl FnOnce(&Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("m")).unwrap();
        fill(&directory.path().join("m"));
        let (sender, events) = Events::channel(16);
        let (conditions, tasks) = (Conditions::default(), Tasks::default());
        let state = start(&directory.path().join("m"), sender, conditions.clone(), &tasks).unwrap();
        let mut bench = Self { directory, events, conditions, state, tasks };
        while bench.next().await != "synced" {}
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join("m").join(name)
    }

    /// Replaces a file at once, as a careful writer does.
    fn put(&self, name: &str, content: &str) {
        let temporary = self.directory.path().join("temporary");
        fs::write(&temporary, content).unwrap();
        fs::rename(temporary, self.path(name)).unwrap();
    }

    async fn next(&mut self) -> String {
        describe(
            &timeout(PATIENCE, self.events.recv()).await.expect("an event in time").expect("a living source").event,
        )
    }

    async fn expect(&mut self, expected: &[&str]) {
        for expected in expected {
            assert_eq!(self.next().await, *expected);
        }
    }

    /// Asserts that nothing has been said until the source reacts to a change made now, and so has seen all before it.
    async fn expect_nothing_else(&mut self) {
        self.put("zz-probe.yaml", &service("probe", 1));
        self.expect(&["apply Service default/probe:1"]).await;
        fs::remove_file(self.path("zz-probe.yaml")).unwrap();
        self.expect(&["delete Service default/probe"]).await;
    }

    async fn condition(&self, reason: &str, subject: &str) -> Condition {
        let find = || self.conditions.list().into_iter().find(|c| c.reason == reason && c.subject == subject);
        wait_for(find).await
    }

    async fn no_condition(&self) {
        wait_for(|| self.conditions.list().is_empty().then_some(())).await;
    }
}

async fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, looking).await.expect("it to come true in time")
}

#[tokio::test]
async fn the_first_scan_replaces_everything_and_is_then_synced() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("a.yaml"), format!("{}---\n{}", service("web", 80), slice("web-1", "web")))
        .unwrap();
    fs::write(directory.path().join("b.json"), r#"{"apiVersion":"v1","kind":"Endpoints","metadata":{"name":"old"}}"#)
        .unwrap();
    fs::write(directory.path().join("n.yaml"), "apiVersion: v1\nkind: Node\nmetadata: {name: edge1}\n").unwrap();
    let rule = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: web}\nspec: {host: web}\n";
    fs::write(directory.path().join("r.yaml"), rule).unwrap();
    fs::write(directory.path().join(".hidden.yaml"), service("hidden", 80)).unwrap();
    fs::write(directory.path().join("README.md"), "not a manifest").unwrap();
    fs::create_dir(directory.path().join("sub.yaml")).unwrap();
    fs::write(directory.path().join("sub.yaml/c.yaml"), service("deeper", 80)).unwrap();
    let (sender, events) = Events::channel(16);
    let (conditions, tasks) = (Conditions::default(), Tasks::default());
    let state = start(directory.path(), sender, conditions.clone(), &tasks).unwrap();
    let mut bench = Bench { directory, events, conditions, state, tasks };
    bench
        .expect(&[
            "replace Node [Node edge1]",
            "replace DestinationRule [DestinationRule default/web]",
            "replace EndpointSlice [EndpointSlice default/web-1]",
            "replace Endpoints [Endpoints default/old]",
            "replace Service [Service default/web:80]",
            "synced",
        ])
        .await;
    let status = bench.state.status();
    assert!(status.answers() && status.last_error.is_none());
    let counts: Vec<_> = status.objects.iter().map(|(kind, count)| (kind.as_str(), *count)).collect();
    assert_eq!(counts, [("DestinationRule", 1), ("EndpointSlice", 1), ("Endpoints", 1), ("Node", 1), ("Service", 1)]);
    assert!(bench.conditions.list().is_empty());
    assert!(bench.tasks.drain(PATIENCE).await);
}

#[tokio::test]
async fn a_change_arrives_within_50_milliseconds_and_only_what_changed() {
    let mut bench = Bench::start(|directory| {
        fs::write(directory.join("a.yaml"), format!("{}---\n{}", service("web", 80), service("db", 5432))).unwrap();
    })
    .await;
    // The median of several, for a busy machine may delay any one.
    let mut delays = Vec::new();
    for port in 81..90 {
        let begun = Instant::now();
        fs::write(bench.path("a.yaml"), format!("{}---\n{}", service("web", port), service("db", 5432))).unwrap();
        assert_eq!(bench.next().await, format!("apply Service default/web:{port}"));
        delays.push(begun.elapsed());
    }
    delays.sort();
    assert!(delays[delays.len() / 2] < Duration::from_millis(50), "{delays:?}");
    fs::remove_file(bench.path("a.yaml")).unwrap();
    bench.expect(&["delete Service default/db", "delete Service default/web"]).await;
    bench.expect_nothing_else().await;
}

#[tokio::test]
async fn endpoints_come_before_their_service_and_leave_after_it() {
    let mut bench = Bench::start(|_| ()).await;
    bench.put("a.yaml", &format!("{}---\n{}", service("web", 80), slice("web-1", "web")));
    bench.expect(&["apply EndpointSlice default/web-1", "apply Service default/web:80"]).await;
    fs::remove_file(bench.path("a.yaml")).unwrap();
    bench.expect(&["delete Service default/web", "delete EndpointSlice default/web-1"]).await;
}

#[tokio::test]
async fn keeps_last_good_objects_of_a_broken_file() {
    let mut bench = Bench::start(|directory| {
        fs::write(directory.join("a.yaml"), format!("{}---\n{}", service("web", 80), service("db", 5432))).unwrap();
        fs::write(directory.join("b.yaml"), service("other", 80)).unwrap();
    })
    .await;
    // The second document is broken, the first has changed: the change counts, the second object stays.
    bench.put("a.yaml", &format!("{}---\nkind: Service\napiVersion: v1\nmetadata: {{name: [}}\n", service("web", 81)));
    bench.expect(&["apply Service default/web:81"]).await;
    let condition = bench.condition(INVALID, "a.yaml").await;
    assert!(
        condition.message.contains("a.yaml: document 2: ") && condition.message.contains("line 8"),
        "{condition:?}"
    );
    assert!(!condition.message.contains('\n'));
    bench.put("b.yaml", &service("other", 82));
    bench.expect(&["apply Service default/other:82"]).await;
    bench.expect_nothing_else().await;
    // Repaired without the second object: only now it is gone.
    bench.put("a.yaml", &service("web", 81));
    bench.expect(&["delete Service default/db"]).await;
    bench.no_condition().await;
}

#[tokio::test]
async fn a_broken_file_that_is_removed_takes_its_objects_and_its_condition_along() {
    let mut bench = Bench::start(|directory| {
        fs::write(directory.join("a.yaml"), service("web", 80)).unwrap();
        fs::write(directory.join("broken.yaml"), "kind: [").unwrap();
    })
    .await;
    bench.condition(INVALID, "broken.yaml").await;
    fs::remove_file(bench.path("broken.yaml")).unwrap();
    bench.no_condition().await;
    bench.put("a.yaml", "kind: [");
    bench.condition(INVALID, "a.yaml").await;
    fs::remove_file(bench.path("a.yaml")).unwrap();
    bench.expect(&["delete Service default/web"]).await;
    bench.no_condition().await;
}

#[tokio::test]
async fn a_partly_usable_object_is_served_and_reported() {
    let mut bench = Bench::start(|_| ()).await;
    bench.put("a.yaml", &service("web", 80).replace("[{port: 80}]", "[{port: 80}, {port: 0}]"));
    bench.expect(&["apply Service default/web:80"]).await;
    let condition = bench.condition(INVALID, "a.yaml").await;
    assert!(condition.message.contains("spec.ports[1].port: 0 is not a port"), "{condition:?}");
}

#[tokio::test]
async fn a_slow_writer_loses_no_objects() {
    let before = format!("{}---\n{}", service("web", 80), service("db", 5432));
    let mut bench = Bench::start(|directory| fs::write(directory.join("a.yaml"), &before).unwrap()).await;
    // Truncated, and then a whole first document: both would be valid files.
    let mut file = File::create(bench.path("a.yaml")).unwrap();
    bench.expect_nothing_else().await;
    file.write_all(service("web", 81).as_bytes()).unwrap();
    file.flush().unwrap();
    bench.expect_nothing_else().await;
    file.write_all(format!("---\n{}", service("db", 5432)).as_bytes()).unwrap();
    drop(file);
    bench.expect(&["apply Service default/web:81"]).await;
    bench.expect_nothing_else().await;
    bench.no_condition().await;
}

#[tokio::test]
async fn of_two_files_with_the_same_object_the_first_by_name_counts() {
    let mut bench = Bench::start(|directory| fs::write(directory.join("b.yaml"), service("web", 82)).unwrap()).await;
    bench.put("c.yaml", &service("web", 83));
    let condition = bench.condition(DUPLICATE, "Service default/web").await;
    assert_eq!(
        condition.message,
        "b.yaml and c.yaml both hold Service default/web; b.yaml counts, remove it from one of them"
    );
    bench.expect_nothing_else().await;
    bench.put("a.yaml", &service("web", 81));
    bench.expect(&["apply Service default/web:81"]).await;
    fs::remove_file(bench.path("a.yaml")).unwrap();
    bench.expect(&["apply Service default/web:82"]).await;
    fs::remove_file(bench.path("b.yaml")).unwrap();
    bench.expect(&["apply Service default/web:83"]).await;
    bench.no_condition().await;
}

#[tokio::test]
async fn a_copy_of_a_large_file_does_not_flood_the_conditions() {
    let all: String = (0..1000).map(|n| format!("{}---\n", service(&format!("s{n}"), 80))).collect();
    let mut bench = Bench::start(|directory| {
        for name in ["a.yaml", "b.yaml"] {
            fs::write(directory.join(name), &all).unwrap();
        }
    })
    .await;
    assert_eq!(bench.conditions.list().len(), 100);
    fs::remove_file(bench.path("b.yaml")).unwrap();
    bench.no_condition().await;
    bench.expect_nothing_else().await;
}

#[tokio::test]
async fn follows_a_config_map_mount() {
    // As the kubelet lays it out: names link into `..data`, which links to a directory that is replaced as a whole.
    let mut bench = Bench::start(|directory| {
        fs::create_dir(directory.join("..1")).unwrap();
        fs::write(directory.join("..1/a.yaml"), service("web", 80)).unwrap();
        symlink("..1", directory.join("..data")).unwrap();
        symlink("..data/a.yaml", directory.join("a.yaml")).unwrap();
    })
    .await;
    fs::create_dir(bench.path("..2")).unwrap();
    fs::write(bench.path("..2/a.yaml"), service("web", 81)).unwrap();
    symlink("..2", bench.path("..data_tmp")).unwrap();
    fs::rename(bench.path("..data_tmp"), bench.path("..data")).unwrap();
    bench.expect(&["apply Service default/web:81"]).await;
    fs::remove_dir_all(bench.path("..1")).unwrap();
    bench.expect_nothing_else().await;
    bench.no_condition().await;
}

#[tokio::test]
async fn odd_files_are_reported_and_harmless() {
    let mut bench = Bench::start(|directory| {
        symlink("loop.yaml", directory.join("loop.yaml")).unwrap();
        symlink("nowhere", directory.join("dangling.yaml")).unwrap();
        symlink(".", directory.join("self.yaml")).unwrap();
        nix::unistd::mkfifo(&directory.join("fifo.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(directory.join("binary.yaml"), [0xff, 0xfe, 0x00]).unwrap();
        File::create(directory.join("huge.yaml")).unwrap().set_len((4 << 20) + 1).unwrap();
        fs::write(directory.join("good.yaml"), service("web", 80)).unwrap();
    })
    .await;
    let expected = [
        ("loop.yaml", "cannot be read: Too many levels of symbolic links"),
        ("dangling.yaml", "cannot be read: No such file or directory"),
        ("fifo.yaml", "is not a regular file"),
        ("binary.yaml", "is not UTF-8"),
        ("huge.yaml", "is larger than 4194304 bytes"),
    ];
    for (file, problem) in expected {
        let condition = bench.condition(INVALID, file).await;
        assert!(condition.message.contains(problem), "{condition:?}");
    }
    assert_eq!(bench.conditions.list().len(), expected.len());
    assert_eq!(bench.state.status().objects["Service"], 1);
    bench.expect_nothing_else().await;
}

#[tokio::test]
async fn more_files_than_allowed_are_reported() {
    let bench = Bench::start(|directory| {
        for i in 0..4100 {
            File::create(directory.join(format!("{i:05}.yaml"))).unwrap();
        }
    })
    .await;
    let condition = bench.condition(TOO_MANY, "").await;
    assert!(condition.message.contains("holds 4 manifests more than the 4096"), "{condition:?}");
}

#[tokio::test]
async fn keeps_everything_while_the_directory_is_missing_and_while_it_is_filled_again() {
    let mut bench = Bench::start(|directory| {
        fs::write(directory.join("a.yaml"), service("web", 80)).unwrap();
        fs::write(directory.join("b.yaml"), service("db", 5432)).unwrap();
    })
    .await;
    let (path, away) = (bench.path(""), bench.directory.path().join("away"));
    fs::rename(&path, away).unwrap();
    let condition = bench.condition(MISSING, "").await;
    assert!(condition.message.contains("last known objects are served"), "{condition:?}");
    assert!(!bench.state.status().answers());
    fs::create_dir(&path).unwrap();
    bench.no_condition().await;
    // Only what is still missing when the directory has come to rest is gone.
    bench.put("a.yaml", &service("web", 81));
    bench.expect(&["apply Service default/web:81", "delete Service default/db"]).await;
    assert!(bench.state.status().answers());
    // The new directory is watched like the old one.
    bench.expect_nothing_else().await;
}

#[tokio::test]
async fn follows_a_directory_that_is_replaced_at_once() {
    let mut bench = Bench::start(|directory| fs::write(directory.join("a.yaml"), service("web", 80)).unwrap()).await;
    let (path, new) = (bench.path(""), bench.directory.path().join("new"));
    fs::create_dir(&new).unwrap();
    fs::write(new.join("a.yaml"), service("web", 81)).unwrap();
    nix::fcntl::renameat2(
        nix::fcntl::AT_FDCWD,
        &new,
        nix::fcntl::AT_FDCWD,
        &path,
        nix::fcntl::RenameFlags::RENAME_EXCHANGE,
    )
    .unwrap();
    bench.expect(&["apply Service default/web:81"]).await;
    bench.expect_nothing_else().await;
}

#[tokio::test]
async fn a_missing_directory_or_a_file_in_its_place_is_an_error_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "").unwrap();
    for (name, expected) in [("missing", "No such file or directory"), ("file", "Not a directory")] {
        let (sender, _events) = Events::channel(1);
        let path = directory.path().join(name);
        let error = start(&path, sender, Conditions::default(), &Tasks::default()).unwrap_err().to_string();
        assert!(error.starts_with("cannot read the manifest directory ") && error.contains(expected), "{error}");
        assert!(error.ends_with("create it, or correct kubeAPIConfig.staticDirectory"), "{error}");
    }
}

#[tokio::test]
async fn ends_when_nobody_listens_or_the_agent_stops() {
    let Bench { directory: _directory, events, tasks, .. } = Bench::start(|_| ()).await;
    drop(events);
    assert!(tasks.drain(PATIENCE).await);
    let bench = Bench::start(|_| ()).await;
    assert!(bench.tasks.drain(PATIENCE).await);
}
