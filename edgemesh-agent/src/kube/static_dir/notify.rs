//! inotify: which files of a directory changed, and which are being written.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::sys::inotify::{AddWatchFlags, InotifyEvent, WatchDescriptor};
use tokio::time::Instant;

use super::scan::is_manifest;
use crate::inotify::Inotify;

/// What happened since it was last looked at.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) due: Due,
    /// When the first of it was seen.
    pub(super) noticed: Option<Instant>,
    /// Complete, and to be read again.
    pub(super) touched: BTreeSet<String>,
    /// Begun to be written, at the given time, and not closed yet.
    pub(super) writing: BTreeMap<String, Instant>,
}

/// What is to be looked at again.
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Due {
    #[default]
    Nothing,
    /// Files that are there and complete.
    Files,
    /// The whole directory.
    Directory,
}

impl Changes {
    fn due(&mut self, due: Due, now: Instant) {
        self.due = self.due.max(due);
        self.noticed.get_or_insert(now);
    }
}

/// Watches one directory, and finds it again after it was replaced.
#[derive(Debug)]
pub(super) struct DirectoryWatch {
    inotify: Inotify,
    watched: Option<WatchDescriptor>,
    directory: PathBuf,
}

impl DirectoryWatch {
    pub(super) fn new(directory: &Path) -> io::Result<Self> {
        Ok(Self { inotify: Inotify::new()?, watched: None, directory: directory.to_owned() })
    }

    /// Watches what is at the path now; says whether that is another directory than before.
    ///
    /// Failure is not reported: the scan that follows fails for the same reason, or finds by itself what is missed here.
    pub(super) fn renew(&mut self, directory: &Path) -> bool {
        let now = self.inotify.watch(directory).ok();
        let before = std::mem::replace(&mut self.watched, now);
        if before == now {
            return false;
        }
        if let Some(before) = before {
            self.inotify.forget(before);
        }
        true
    }

    /// Waits for events and adds them to `changes`. Loses nothing when cancelled.
    pub(super) async fn read(&self, changes: &mut Changes) -> io::Result<()> {
        for event in self.inotify.events().await? {
            self.note(changes, &event, Instant::now());
        }
        Ok(())
    }

    fn note(&self, changes: &mut Changes, event: &InotifyEvent, now: Instant) {
        let is = |flag| event.mask.intersects(flag);
        let Some(name) = event.name.as_ref().and_then(|name| name.to_str()) else {
            // The directory itself changed, or events were lost; also those that say that a writer is done.
            if is(AddWatchFlags::IN_Q_OVERFLOW) {
                changes.touched.extend(std::mem::take(&mut changes.writing).into_keys());
            }
            return changes.due(Due::Directory, now);
        };
        if !is_manifest(name.as_bytes()) {
            // The kubelet replaces the files of a mounted ConfigMap at once, by renaming the link `..data`.
            if name.starts_with("..") {
                changes.due(Due::Directory, now);
            }
            return;
        }
        let begins = is(AddWatchFlags::IN_CREATE) && !complete_at_creation(&self.directory.join(name));
        if begins || is(AddWatchFlags::IN_MODIFY) {
            // Truncating is a modification too: between it and the writer's close the file is not to be trusted.
            changes.writing.entry(name.to_owned()).or_insert(now);
            changes.touched.remove(name);
            return;
        }
        if is(AddWatchFlags::IN_ATTRIB) {
            // Says nothing about a writer. Clearing the fingerprint matters: a chmod makes a file readable.
            changes.touched.insert(name.to_owned());
            return changes.due(Due::Files, now);
        }
        changes.writing.remove(name);
        if is(AddWatchFlags::IN_CREATE | AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO) {
            changes.touched.insert(name.to_owned());
            changes.due(Due::Files, now);
        } else {
            changes.due(Due::Directory, now);
        }
    }
}

/// Links come into being with their content, and nobody closes them.
fn complete_at_creation(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| !metadata.is_file() || metadata.nlink() > 1)
}
