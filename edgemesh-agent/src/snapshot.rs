//! The snapshot on disk of what the metadata source has delivered: what an agent serves that starts and finds no source.
//!
//! It is written a moment after something changed, and at the stop, but never before the source has delivered everything
//! that exists. At the start its objects go into the builder before any event of the source does, so the first table is
//! complete without it. From then on each kind is the snapshot's until the source sends its first complete list of that
//! kind; what is not in that list goes away then, and what is equal changes nothing.
//!
//! Nothing that is wrong with the file ends an agent: what cannot be used is renamed and told of, what cannot be written
//! is tried again.

mod file;
mod format;
mod schedule;
mod state;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tokio::{
    sync::oneshot,
    task::{JoinError, JoinHandle, spawn_blocking},
    time::{Instant, sleep_until},
};
use tracing::{debug, info};

pub(crate) use self::file::{SnapshotFile, Unusable};
pub use self::state::{RestoredStatus, ServedStatus, SnapshotState, SnapshotStatus};
use self::{
    format::{Contents, Flaw, Identity, Section},
    schedule::Schedule,
};
use crate::{
    conditions::Conditions,
    model::{Builder, Event, Kind},
    show,
};

const IN_FORCE: &str = "SnapshotInForce";
const UNUSABLE: &str = "SnapshotUnusable";
const NOT_WRITTEN: &str = "SnapshotNotWritten";

/// How long a source may take until it is said that a snapshot stands in for it: most starts need less.
const NOTICE: Duration = Duration::from_secs(3);
/// The CA that signed the API server's certificate, as every pod with a ServiceAccount has it.
const CLUSTER_CA: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";

/// The snapshot of one agent, in the hands of the task that has the builder.
pub struct Snapshot {
    file: SnapshotFile,
    url: String,
    connected: Box<dyn Fn() -> bool + Send>,
    node: String,
    conditions: Conditions,
    state: SnapshotState,
    loading: Option<Loading>,
    /// What the objects of a kind are complete as of.
    reached: BTreeMap<Kind, u64>,
    /// How long before the start it was taken, in words.
    age: String,
    /// When to say that it is still in force.
    notice: Option<Instant>,
    /// The kinds of which the source has sent a complete list.
    live: BTreeSet<Kind>,
    /// The source has delivered everything that exists.
    synced: bool,
    /// [`Builder::revision`] of what was written last, or is being written.
    revision: u64,
    schedule: Schedule,
    writing: Option<JoinHandle<io::Result<u64>>>,
}

/// What the snapshot has to know of the metadata source.
pub struct Source {
    /// Its server's URL, without which what is restored would be anybody's.
    pub url: String,
    /// Whether it answers now.
    pub connected: Box<dyn Fn() -> bool + Send>,
    /// Is told what the restored objects were complete as of, by kind ([`Event::Reached`]).
    pub restored: oneshot::Sender<BTreeMap<Kind, u64>>,
}

/// A file that is being read.
struct Loading {
    found: JoinHandle<Found>,
    restored: oneshot::Sender<BTreeMap<Kind, u64>>,
}

/// What was there at the start.
#[derive(Debug)]
enum Found {
    Nothing,
    Contents(Contents),
    /// Why it is not used, and what became of it.
    Unusable(String),
}

impl Snapshot {
    /// Begins to read the file, on a thread of its own; must be called within a tokio runtime.
    pub fn open(path: &Path, source: Source, node: &str, conditions: Conditions) -> Self {
        let file = SnapshotFile::new(path.to_owned());
        let Source { url, connected, restored } = source;
        let (reader, server, name) = (file.clone(), url.clone(), node.to_owned());
        let loading = spawn_blocking(move || load(&reader, &identity(server, name)));
        Self {
            state: SnapshotState::new(path),
            file,
            url,
            connected,
            node: node.to_owned(),
            conditions,
            loading: Some(Loading { found: loading, restored }),
            reached: BTreeMap::new(),
            age: String::new(),
            notice: None,
            live: BTreeSet::new(),
            synced: false,
            revision: 0,
            schedule: Schedule::default(),
            writing: None,
        }
    }

    /// For `status` and the metrics.
    pub fn state(&self) -> SnapshotState {
        self.state.clone()
    }

    /// Gives the builder what the file holds; says whether there was anything. Called once, before any event.
    pub async fn restore(&mut self, builder: &mut Builder) -> bool {
        let Some(Loading { found, restored }) = self.loading.take() else { return false };
        let found = found.await.unwrap_or_else(|error| Found::Unusable(unexpected(&error).to_string()));
        let (now, path) = (SystemTime::now(), self.file.path().display());
        let contents = match found {
            Found::Contents(contents) => contents,
            Found::Nothing => {
                info!(%path, "there is no metadata snapshot");
                return false;
            }
            Found::Unusable(why) => {
                let message = format!(
                    "cannot restore the metadata snapshot {path}: {why}; the agent starts without it, and writes a new \
                     one when the source has delivered everything"
                );
                self.conditions.raise(UNUSABLE, path.to_string(), message, now);
                return false;
            }
        };
        self.age = match state::age(contents.taken, now) {
            Some(age) => format!("{} before this start", show::seconds(age)),
            None => "at a time that the clock of this node has not reached yet".to_owned(),
        };
        let objects: usize = contents.sections.iter().map(|section| section.objects.len()).sum();
        info!(%path, objects, "restored the metadata snapshot, taken {}", self.age);
        self.state.restored(&contents);
        for Section { kind, reached, objects, .. } in contents.sections {
            self.reached.extend(reached.map(|version| (kind, version)));
            builder.apply(Event::Replace(kind, objects));
        }
        // The source may have ended.
        let _ = restored.send(self.reached.clone());
        builder.apply(Event::Synced);
        self.revision = builder.revision();
        self.notice = Some(Instant::now() + NOTICE);
        true
    }

    /// Takes note of an event that the source sent. What it gives is to go to the builder after it.
    pub fn note(&mut self, event: &Event, now: SystemTime) -> Option<Event> {
        match event {
            Event::Replace(kind, _) => {
                self.take_over(*kind, now);
                None
            }
            Event::Synced => {
                self.synced = true;
                // Even if nothing is new: that it still is so is worth knowing after the next start.
                self.schedule.changed(Instant::now());
                // A source has endpoints of one of two kinds. What the snapshot has of the other is from a time when it
                // was the other way round, and would be in force beside it for ever.
                let other = |kind| match kind {
                    Kind::EndpointSlice => Some(Kind::Endpoints),
                    Kind::Endpoints => Some(Kind::EndpointSlice),
                    Kind::Service | Kind::Node | Kind::DestinationRule => None,
                };
                let left = self.live.iter().copied().filter_map(other).find(|kind| self.state.serves(*kind))?;
                self.take_over(left, now);
                Some(Event::Replace(left, Vec::new()))
            }
            Event::Reached(kind, version) => {
                // Not worth a write by itself: what a list has changed is written, and this with it.
                self.reached.insert(*kind, *version);
                None
            }
            Event::Apply(_) | Event::Delete(..) => None,
        }
    }

    /// Takes note of what the builder has after some events.
    pub fn follow(&mut self, builder: &Builder) {
        if builder.revision() != self.revision {
            self.schedule.changed(Instant::now());
        }
    }

    /// Resolves when it is time for [`Snapshot::write`]; may be dropped and called again at any time.
    pub async fn due(&mut self) {
        loop {
            if let Some(writing) = &mut self.writing {
                let outcome = writing.await;
                self.writing = None;
                self.written(outcome);
            }
            let write = self.schedule.next().filter(|_| self.synced);
            let Some(wake) = self.notice.into_iter().chain(write).min() else { return std::future::pending().await };
            sleep_until(wake).await;
            if self.notice.is_some_and(|at| at <= wake) {
                self.notice = None;
                self.tell(SystemTime::now());
            } else if self.schedule.is_needed() || (self.connected)() {
                return;
            } else {
                // Nobody stands behind what is known: it is not to look younger than it is.
                self.schedule.put_off(wake);
            }
        }
    }

    /// Begins to write what the builder has; does not wait for it.
    pub fn write(&mut self, builder: &Builder, now: SystemTime) {
        let taken = state::seconds(now);
        let sections: Vec<Section> = Kind::ALL
            .into_iter()
            .filter_map(|kind| {
                let objects = builder.objects(kind);
                // Objects can come without a list of all.
                let given = self.live.contains(&kind) || !objects.is_empty();
                let as_of = self.state.as_of(kind).or_else(|| given.then_some(taken))?;
                Some(Section { kind, as_of, reached: self.reached.get(&kind).copied(), objects })
            })
            .collect();
        self.revision = builder.revision();
        self.schedule.begun();
        if !sections.iter().any(|section| section.kind == Kind::Service) {
            return;
        }
        self.state.writing(taken);
        let (file, source, node) = (self.file.clone(), self.url.clone(), self.node.clone());
        self.writing =
            Some(spawn_blocking(move || file.write(&Contents { identity: identity(source, node), taken, sections })));
    }

    /// Writes a last time, at the stop; returns when that is done.
    pub async fn finish(mut self, builder: &Builder) {
        if let Some(writing) = &mut self.writing {
            let outcome = writing.await;
            self.writing = None;
            self.written(outcome);
        }
        self.follow(builder);
        if self.synced && (self.schedule.is_needed() || (self.connected)()) {
            self.write(builder, SystemTime::now());
            if let Some(writing) = self.writing.take() {
                let outcome = writing.await;
                self.written(outcome);
            }
        }
    }

    /// From now on a kind is the source's.
    fn take_over(&mut self, kind: Kind, now: SystemTime) {
        self.live.insert(kind);
        if self.state.took_over(kind) {
            debug!(%kind, "the source has delivered what the metadata snapshot stood in for");
            if !self.state.serves_any() {
                info!("nothing of the metadata snapshot is in force any more");
                self.notice = None;
            }
            if self.notice.is_none() {
                self.tell(now);
            }
        }
    }

    /// Says, or no longer says, that the snapshot is in force.
    fn tell(&self, now: SystemTime) {
        if !self.state.serves_any() {
            self.conditions.clear(IN_FORCE, "");
            return;
        }
        let kinds: Vec<String> =
            Kind::ALL.into_iter().filter(|kind| self.state.serves(*kind)).map(|kind| kind.to_string()).collect();
        let message = format!(
            "served as in the metadata snapshot taken {}: {}; the source {} has not delivered them since, so what changed \
             meanwhile is not known; its own conditions say why",
            self.age,
            kinds.join(", "),
            self.url
        );
        self.conditions.raise(IN_FORCE, "", message, now);
    }

    fn written(&mut self, outcome: Result<io::Result<u64>, JoinError>) {
        let (path, now) = (self.file.path().display().to_string(), Instant::now());
        match outcome.unwrap_or_else(|error| Err(unexpected(&error))) {
            Ok(size) => {
                debug!(path, size, "wrote the metadata snapshot");
                self.schedule.written(size, now);
                self.state.written(size);
                self.conditions.clear(NOT_WRITTEN, &path);
                self.conditions.clear(UNUSABLE, &path);
            }
            Err(error) => {
                self.schedule.failed(now);
                let message = format!(
                    "cannot write the metadata snapshot {path}: {error}; make room or correct the directory, or set \
                     commonConfig.metadataSnapshot; without it, an agent that starts without its metadata source serves \
                     an older state or none"
                );
                self.state.failed(message.clone());
                self.conditions.raise(NOT_WRITTEN, path, message, SystemTime::now());
            }
        }
    }
}

/// Removes the file at `path` and what was set aside beside it, for `cleanup`. Gives what was removed.
///
/// # Errors
///
/// Something cannot be removed.
pub fn remove(path: &Path) -> io::Result<Vec<PathBuf>> {
    SnapshotFile::new(path.to_owned()).remove()
}

fn load(file: &SnapshotFile, wanted: &Identity) -> Found {
    let (why, movable) = match file.read() {
        Ok(None) => return Found::Nothing,
        Ok(Some(contents)) => match mismatch(&contents.identity, wanted) {
            None => return Found::Contents(contents),
            Some(why) => (why, true),
        },
        // Reading may work another time, and what others put there may be anything.
        Err(error @ (Unusable::Flaw(Flaw::Io(_)) | Unusable::NoFile | Unusable::Directory(_))) => {
            (error.to_string(), false)
        }
        Err(error) => (error.to_string(), true),
    };
    if !movable {
        return Found::Unusable(why);
    }
    Found::Unusable(match file.set_aside() {
        Ok(aside) => format!("{why}; it was renamed to {}", aside.display()),
        Err(error) => format!("{why}; it cannot be renamed: {error}"),
    })
}

/// Why the objects of one identity are not for the other.
fn mismatch(found: &Identity, wanted: &Identity) -> Option<String> {
    if found.source != wanted.source {
        Some(format!("it is of another source, {}", found.source))
    } else if found.node != wanted.node {
        Some(format!("it is of another node, {}", found.node))
    } else if let (Some(found), Some(wanted)) = (&found.cluster, &wanted.cluster)
        && found != wanted
    {
        Some("it is of another cluster: the CA in the ServiceAccount differs".to_owned())
    } else {
        None
    }
}

fn identity(source: String, node: String) -> Identity {
    Identity { source, node, cluster: cluster_digest(Path::new(CLUSTER_CA)) }
}

fn cluster_digest(path: &Path) -> Option<String> {
    /// As much as a ConfigMap, from which it comes, holds.
    const MAX_CA: u64 = 1 << 20;
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_CA).read_to_end(&mut bytes)).ok()?;
    Some(format::digest(&bytes))
}

fn unexpected(error: &JoinError) -> io::Error {
    io::Error::other(format!("the thread ended: {error}"))
}

#[cfg(test)]
mod tests;
