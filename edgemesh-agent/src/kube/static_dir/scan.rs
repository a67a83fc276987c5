//! What the directory says now, compared with what it said before; blocking file reads, no clock, no channel.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    kube::manifest::{self, Format, Parsed},
    model::{Event, Kind, NamespacedName, Object},
};

/// Larger files are refused unread.
const MAX_FILE: u64 = 4 << 20;
/// Files beyond the first so many, by name, are not read.
const MAX_FILES: usize = 4096;

/// More would only bury the first ones.
const MAX_DUPLICATES: usize = 100;

/// Kind and name of an object.
pub(super) type Key = (Kind, NamespacedName);

/// The directory as it was read last. Holds the objects, so that a broken file keeps what it gave before.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    directory: PathBuf,
    files: BTreeMap<String, ManifestFile>,
    /// What counts of them, by kind and name.
    published: Vec<Arc<Object>>,
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
}

/// What a scan found.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Changes since the scan before, additions before removals so that no Service is without endpoints between.
    pub(super) events: Vec<Event>,
    /// File name and what is wrong with it.
    pub(super) invalid: BTreeMap<String, String>,
    /// Objects that several files hold, and which of them counts; the first [`MAX_DUPLICATES`].
    pub(super) duplicates: BTreeMap<String, String>,
    /// Files that changed while they were read, to be read again soon.
    pub(super) unsettled: BTreeSet<String>,
    /// Set if there are more files than are read.
    pub(super) too_many: Option<String>,
}

#[derive(Debug)]
struct ManifestFile {
    fingerprint: Option<Fingerprint>,
    objects: Vec<Arc<Object>>,
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

impl Scanner {
    pub(super) fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), ..Self::default() }
    }

    /// How many objects of each kind have been published.
    pub(super) fn counts(&self) -> BTreeMap<Kind, usize> {
        let mut counts = BTreeMap::new();
        for object in &self.published {
            *counts.entry(object.kind()).or_insert(0) += 1;
        }
        counts
    }

    /// Everything, as the first message of a source.
    pub(super) fn everything(&self) -> Vec<Event> {
        // Services last: without endpoints they refuse connections, and without Nodes and rules they know no limits.
        let kinds = [Kind::Node, Kind::DestinationRule, Kind::EndpointSlice, Kind::Endpoints, Kind::Service];
        let of = |kind: Kind| {
            let objects = self.published.iter().filter(|object| object.kind() == kind);
            objects.map(|object| Object::clone(object)).collect()
        };
        kinds.into_iter().map(|kind| Event::Replace(kind, of(kind))).chain([Event::Synced]).collect()
    }

    /// Reads what changed.
    ///
    /// # Errors
    ///
    /// The directory cannot be listed; everything stays as it was.
    pub(super) fn scan(&mut self, hints: &Hints) -> io::Result<Outcome> {
        let mut outcome = Outcome::default();
        let names = self.names(&mut outcome)?;
        if !hints.keep_missing {
            self.files.retain(|name, _| names.contains(name));
        }
        for name in names {
            if !hints.writing.contains(&name) {
                self.read(name, hints, &mut outcome);
            }
        }
        for (name, file) in &self.files {
            if let Some(problem) = &file.problem {
                outcome.invalid.insert(name.clone(), problem.clone());
            }
        }
        self.publish(&mut outcome);
        Ok(outcome)
    }

    fn names(&self, outcome: &mut Outcome) -> io::Result<BTreeSet<String>> {
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
        if left_out > 0 {
            outcome.too_many = Some(format!(
                "{} holds {left_out} manifests more than the {MAX_FILES} that are read; put several objects into one file",
                self.directory.display()
            ));
        }
        Ok(names)
    }

    fn read(&mut self, name: String, hints: &Hints, outcome: &mut Outcome) {
        let known = self.files.get(&name).and_then(|file| file.fingerprint);
        let known = known.filter(|_| !hints.touched.contains(&name));
        let (fingerprint, parsed) = match open_and_read(&self.directory.join(&name), known) {
            Reading::Unchanged => return,
            Reading::Unsettled => {
                outcome.unsettled.insert(name);
                return;
            }
            Reading::Gone if hints.keep_missing => return,
            Reading::Gone | Reading::Directory => {
                self.files.remove(&name);
                return;
            }
            Reading::Unreadable(problem) => (None, Parsed { broken: vec![problem], ..Parsed::default() }),
            Reading::Text(fingerprint, text) => {
                let format = format_of(name.as_bytes()).unwrap_or(Format::Yaml);
                (Some(fingerprint), manifest::parse(&text, format))
            }
        };
        let problem = parsed.problem();
        let mut objects: Vec<Arc<Object>> = parsed.objects.into_iter().map(Arc::new).collect();
        let before = self.files.remove(&name).map(|file| file.objects).unwrap_or_default();
        if !parsed.broken.is_empty() {
            let given: BTreeSet<Key> = objects.iter().map(|object| key(object)).collect();
            objects.extend(before.into_iter().filter(|object| !given.contains(&key(object))));
        }
        self.files.insert(name, ManifestFile { fingerprint, objects, problem });
    }

    /// Merges all files, the first by name winning, and turns the difference to what was published into events.
    ///
    /// One changed file of thousands makes it look at all objects, so it sorts and walks references and copies no name.
    fn publish(&mut self, outcome: &mut Outcome) {
        let files = self.files.iter();
        let mut all: Vec<(&Arc<Object>, &String)> =
            files.flat_map(|(name, file)| file.objects.iter().map(move |object| (object, name))).collect();
        // Stable: of several objects with one name, that of the first file stays the first.
        all.sort_by(|(a, _), (b, _)| place(a).cmp(&place(b)));
        let mut merged: Vec<Arc<Object>> = Vec::with_capacity(all.len());
        for same in all.chunk_by(|(a, _), (b, _)| place(a) == place(b)) {
            let [(object, winner), others @ ..] = same else { continue };
            if let Some((_, name)) = others.first()
                && outcome.duplicates.len() < MAX_DUPLICATES
            {
                let subject = format!("{} {}", object.kind(), object.name());
                let message = if winner == name {
                    format!("{name} holds {subject} twice; the first counts, remove the other")
                } else {
                    format!("{winner} and {name} both hold {subject}; {winner} counts, remove it from one of them")
                };
                outcome.duplicates.insert(subject, message);
            }
            merged.push(Arc::clone(object));
        }
        let (mut applied, mut deleted) = (Vec::new(), Vec::new());
        let delete = |old: &Arc<Object>| Event::Delete(old.kind(), old.name().clone());
        let mut before = self.published.iter().peekable();
        for object in &merged {
            while let Some(old) = before.next_if(|old| place(old) < place(object)) {
                deleted.push(delete(old));
            }
            let old = before.next_if(|old| place(old) == place(object));
            if !old.is_some_and(|old| Arc::ptr_eq(old, object) || old == object) {
                applied.push(Event::Apply(Object::clone(object)));
            }
        }
        deleted.extend(before.map(delete));
        // Kinds order as Service, EndpointSlice, Endpoints, Node, DestinationRule: a Service comes after what it needs
        // and leaves first.
        outcome.events.extend(applied.into_iter().rev().chain(deleted));
        self.published = merged;
    }
}

/// Where an object stands among all.
fn place(object: &Object) -> (Kind, &NamespacedName) {
    (object.kind(), object.name())
}

fn key(object: &Object) -> Key {
    (object.kind(), object.name().clone())
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
