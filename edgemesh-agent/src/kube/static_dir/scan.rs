//! What the directory says now, compared with what it said before; blocking file reads, no clock, no channel.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read},
    num::NonZeroUsize,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use super::index::{Index, Key, key};
use crate::{
    kube::manifest::{self, Format, Parsed},
    model::{Event, Kind, Object, Place, Shared},
};

/// Larger files are refused unread.
const MAX_FILE: u64 = 4 << 20;
/// Files beyond the first so many, by name, are not read.
const MAX_FILES: usize = 4096;

/// From so many files on, several threads read them.
const WORTH_THREADS: usize = 32;
/// More would take too much from what else a node does.
const MAX_THREADS: usize = 4;

/// The directory as it was read last. Holds the objects, so that a broken file keeps what it gave before.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    directory: PathBuf,
    files: BTreeMap<Arc<str>, ManifestFile>,
    /// What they hold, and what of it counts.
    index: Index,
    /// How many files there are beyond those that are read.
    left_out: usize,
    places: Shared<Place>,
}

/// What one scan is to take into account.
#[derive(Debug, Default)]
pub(super) struct Hints {
    /// Files that were written to; they are read again though they may look unchanged.
    pub(super) touched: BTreeSet<String>,
    /// Files that are being written; they are left alone, and count as they were read before.
    pub(super) writing: BTreeSet<String>,
    /// Missing files are not taken for deleted.
    pub(super) keep_missing: bool,
    /// Nothing but the touched files has changed, as far as is known, so the directory need not be listed.
    pub(super) only_touched: bool,
}

/// What a scan found.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Changes since the scan before, additions before removals so that no Service is without endpoints between.
    pub(super) events: Vec<Event>,
    /// File name and what is wrong with it.
    pub(super) invalid: BTreeMap<String, String>,
    /// Objects that several files hold, and which of them counts; the first hundred.
    pub(super) duplicates: BTreeMap<String, String>,
    /// Files that changed while they were read, to be read again soon.
    pub(super) unsettled: BTreeSet<String>,
    /// Set if there are more files than are read.
    pub(super) too_many: Option<String>,
}

#[derive(Debug)]
struct ManifestFile {
    fingerprint: Option<Fingerprint>,
    objects: Vec<Object>,
    problem: Option<String>,
}

/// Tells whether a file may have changed; size and inode catch what a coarse clock does not.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Fingerprint {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

#[derive(Debug)]
enum Reading {
    /// Neither a file nor a link of this name.
    Gone,
    /// Not a file at all; sub-directories are allowed to look like manifests.
    Directory,
    Unchanged,
    /// It changed while being read.
    Unsettled,
    Unreadable(String),
    Text(Fingerprint, String),
}

/// What came of looking at a file.
#[derive(Debug)]
enum Look {
    Unchanged,
    Unsettled,
    Gone,
    /// There, but not to be read as a manifest.
    Directory,
    Read(Option<Fingerprint>, Parsed),
}

impl Scanner {
    pub(super) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), ..Self::default() }
    }

    /// How many objects of each kind count.
    pub(super) fn counts(&self) -> &BTreeMap<Kind, usize> {
        self.index.counts()
    }

    /// Everything, as the first message of a source.
    pub(super) fn everything(&self) -> Vec<Event> {
        // Services last: without endpoints they refuse connections, and without Nodes and rules they know no limits.
        let kinds = [Kind::Node, Kind::DestinationRule, Kind::EndpointSlice, Kind::Endpoints, Kind::Service];
        let of = |kind: Kind| self.index.counting().filter(|object| object.kind() == kind).cloned().collect();
        kinds.into_iter().map(|kind| Event::Replace(kind, of(kind))).chain([Event::Synced]).collect()
    }

    /// Reads what changed.
    ///
    /// # Errors
    ///
    /// The directory cannot be listed; everything stays as it was.
    pub(super) fn scan(&mut self, hints: &Hints) -> io::Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut changed = BTreeMap::new();
        let known = |name: &String| self.files.contains_key(name.as_str());
        let names = if hints.only_touched && hints.touched.iter().all(known) {
            hints.touched.clone()
        } else {
            let names = self.names()?;
            if !hints.keep_missing {
                self.files.retain(|name, file| {
                    let there = names.contains(&**name);
                    if !there {
                        changed.insert(Arc::clone(name), std::mem::take(&mut file.objects));
                    }
                    there
                });
            }
            names
        };
        let names = names.into_iter().filter(|name| !hints.writing.contains(name)).collect();
        for (name, look) in self.look(names, hints) {
            self.take_in(name, look, hints, &mut changed, &mut outcome);
        }
        for (name, file) in &self.files {
            if let Some(problem) = &file.problem {
                outcome.invalid.insert(name.to_string(), problem.clone());
            }
        }
        if self.left_out > 0 {
            outcome.too_many = Some(format!(
                "{} holds {} manifests more than the {MAX_FILES} that are read; put several objects into one file",
                self.directory.display(),
                self.left_out
            ));
        }
        let now = |name: &str| self.files.get(name).map_or(&[][..], |file| &file.objects);
        outcome.events = self.index.update(changed.iter().map(|(name, before)| (name, &before[..], now(name))));
        outcome.duplicates = self.index.duplicates();
        Ok(outcome)
    }

    fn names(&mut self) -> io::Result<BTreeSet<String>> {
        let (mut names, mut left_out) = (BTreeSet::new(), 0_usize);
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            let Some(name) = name.to_str().filter(|name| is_manifest(name.as_bytes())) else {
                continue;
            };
            names.insert(name.to_owned());
            if names.len() > MAX_FILES {
                names.pop_last();
                left_out += 1;
            }
        }
        self.left_out = left_out;
        Ok(names)
    }

    /// Looks at files, at many of them from several threads: nearly all of a start's time goes into reading YAML.
    fn look(&self, names: Vec<String>, hints: &Hints) -> Vec<(String, Look)> {
        let look = |name: String| {
            let known = self.files.get(name.as_str()).and_then(|file| file.fingerprint);
            let known = known.filter(|_| !hints.touched.contains(&name));
            let look = look(&self.directory, &name, known);
            (name, look)
        };
        if names.len() < WORTH_THREADS {
            return names.into_iter().map(look).collect();
        }
        let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MAX_THREADS);
        let left = Mutex::new(names.into_iter());
        let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
        let all = || std::iter::from_fn(next).map(look).collect::<Vec<_>>();
        thread::scope(|scope| {
            // A thread that the system refuses leaves its share to the others.
            let spawn = || thread::Builder::new().name("manifests".to_owned()).spawn_scoped(scope, all).ok();
            let others: Vec<_> = (1..threads).filter_map(|_| spawn()).collect();
            let mut looks = all();
            for other in others {
                looks.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            looks
        })
    }

    /// Notes what a file holds now. What it held goes into `changed`.
    fn take_in(
        &mut self,
        name: String,
        look: Look,
        hints: &Hints,
        changed: &mut BTreeMap<Arc<str>, Vec<Object>>,
        outcome: &mut Outcome,
    ) {
        let (fingerprint, parsed) = match look {
            Look::Unchanged => return,
            Look::Unsettled => {
                outcome.unsettled.insert(name);
                return;
            }
            Look::Gone if hints.keep_missing => return,
            Look::Gone | Look::Directory => {
                changed.extend(self.files.remove_entry(name.as_str()).map(|(name, file)| (name, file.objects)));
                return;
            }
            Look::Read(fingerprint, parsed) => (fingerprint, parsed),
        };
        let problem = parsed.problem();
        let mut objects = parsed.objects;
        objects.iter_mut().for_each(|object| self.places.share(object));
        let (name, before) = match self.files.remove_entry(name.as_str()) {
            Some((name, file)) => (name, file.objects),
            None => (name.into(), Vec::new()),
        };
        if !parsed.broken.is_empty() {
            let given: BTreeSet<Key<'_>> = objects.iter().map(key).collect();
            let kept: Vec<Object> = before.iter().filter(|object| !given.contains(&key(object))).cloned().collect();
            objects.extend(kept);
        }
        // As many as files, and they live long.
        objects.shrink_to_fit();
        changed.insert(Arc::clone(&name), before);
        self.files.insert(name, ManifestFile { fingerprint, objects, problem });
    }
}

fn look(directory: &Path, name: &str, known: Option<Fingerprint>) -> Look {
    match open_and_read(&directory.join(name), known) {
        Reading::Unchanged => Look::Unchanged,
        Reading::Unsettled => Look::Unsettled,
        Reading::Gone => Look::Gone,
        Reading::Directory => Look::Directory,
        Reading::Unreadable(problem) => Look::Read(None, Parsed { broken: vec![problem], ..Parsed::default() }),
        Reading::Text(fingerprint, text) => {
            let format = format_of(name.as_bytes()).unwrap_or(Format::Yaml);
            Look::Read(Some(fingerprint), manifest::parse(&text, format))
        }
    }
}

/// Whether a file of this name is read at all.
pub(super) fn is_manifest(name: &[u8]) -> bool {
    format_of(name).is_some()
}

/// `None` for what is no manifest by its name: other endings, and dot files, among them editors' and ConfigMap mounts' own.
fn format_of(name: &[u8]) -> Option<Format> {
    if name.starts_with(b".") {
        None
    } else if name.ends_with(b".yaml") || name.ends_with(b".yml") {
        Some(Format::Yaml)
    } else if name.ends_with(b".json") {
        Some(Format::Json)
    } else {
        None
    }
}

fn open_and_read(path: &Path, known: Option<Fingerprint>) -> Reading {
    let unreadable = |error: &io::Error| Reading::Unreadable(format!("cannot be read: {error}"));
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => return Reading::Directory,
        Ok(metadata) if known == Some(Fingerprint::of(&metadata)) => return Reading::Unchanged,
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(path).is_err() => {
            return Reading::Gone;
        }
        Err(error) => return unreadable(&error),
    }
    // Opening a FIFO that nobody writes to must not hang.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) => return unreadable(&error),
    };
    read_open_file(&file).unwrap_or_else(|error| unreadable(&error))
}

fn read_open_file(file: &File) -> io::Result<Reading> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(Reading::Unreadable("is not a regular file".to_owned()));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(metadata.len().min(MAX_FILE)).unwrap_or(0));
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Ok(Reading::Unreadable(format!("is larger than {MAX_FILE} bytes; split it into several files")));
    }
    let fingerprint = Fingerprint::of(&metadata);
    if fingerprint != Fingerprint::of(&file.metadata()?) {
        return Ok(Reading::Unsettled);
    }
    let text = String::from_utf8(bytes);
    Ok(text.map_or_else(
        |error| Reading::Unreadable(format!("is not UTF-8: {}", error.utf8_error())),
        |text| Reading::Text(fingerprint, text),
    ))
}
