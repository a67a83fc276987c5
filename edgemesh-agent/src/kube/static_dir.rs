//! The source `static`: a directory of manifests, watched.
//!
//! inotify says when to look, a full scan every [`RESCAN`] catches what it cannot see (files behind links, network file
//! systems). What counts is always what the directory holds at the time of a scan, never the event itself.

mod index;
mod notify;
mod scan;

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tokio::time::{Instant, timeout_at};
use tracing::info;

use self::{
    notify::{Changes, DirectoryWatch, Due},
    scan::{Hints, Outcome, Scanner},
};
use super::{Error, Events, SourceState};
use crate::{conditions::Conditions, lifecycle::Tasks, model::Kind};

const INVALID: &str = "ManifestInvalid";
const DUPLICATE: &str = "ManifestDuplicate";
const TOO_MANY: &str = "ManifestLimit";
const UNFOLLOWED: &str = "ManifestWatchFailed";
const MISSING: &str = "ManifestDirectoryMissing";

/// Changes closer together than this are read at once, but for the first finished file after as long a rest …
const QUIET: Duration = Duration::from_millis(10);
/// … but none waits longer than this.
const MAX_DELAY: Duration = Duration::from_millis(25);
/// How long may pass between scans of an unchanged directory, and how long a writer may keep a file open before the
/// file is read nevertheless.
const RESCAN: Duration = Duration::from_secs(30);
/// How soon a file that changed while being read is read again.
const RETRY: Duration = Duration::from_millis(20);
/// How often a missing directory is looked for.
const SEARCH: Duration = Duration::from_millis(250);
/// How long after the directory came back a missing file is not yet taken for deleted: it is filled file by file.
const REFILL: Duration = Duration::from_secs(1);

/// Starts the source.
///
/// # Errors
///
/// The directory cannot be read, or not be watched.
pub(super) fn start(
    directory: &Path,
    events: Events,
    conditions: Conditions,
    tasks: &Tasks,
) -> Result<SourceState, Error> {
    fs::read_dir(directory).map_err(|cause| Error::Directory { path: directory.to_owned(), cause })?;
    let watch = DirectoryWatch::new(directory).map_err(Error::Inotify)?;
    let state = SourceState::new("static", directory.display().to_string(), SystemTime::now());
    let source = Source {
        directory: directory.to_owned(),
        watch,
        changes: Changes::default(),
        events,
        conditions,
        state: state.clone(),
        missing: false,
        returned: None,
    };
    let (stop, failures) = (tasks.stopping(), source.conditions.clone());
    tasks.spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            ended = source.run() => match ended {
                Ok(()) => {}
                Err(cause) => {
                    let message = format!("the manifest directory is no longer followed: {cause}; restart the agent");
                    failures.raise(UNFOLLOWED, "", message, SystemTime::now());
                }
            }
        }
    });
    Ok(state)
}

struct Source {
    directory: PathBuf,
    watch: DirectoryWatch,
    changes: Changes,
    events: Events,
    conditions: Conditions,
    state: SourceState,
    missing: bool,
    /// When the directory came back, within the last [`REFILL`].
    returned: Option<Instant>,
}

impl Source {
    /// Returns when nobody receives events any more.
    async fn run(mut self) -> io::Result<()> {
        let mut scanner = Scanner::new(&self.directory);
        let mut synced = false;
        loop {
            let noticed = self.changes.noticed.take().unwrap_or_else(Instant::now);
            let (back, outcome) = self.scan(scanner).await?;
            scanner = back;
            let mut next = Instant::now() + RESCAN;
            match outcome {
                Ok(outcome) => {
                    if self.found_again() {
                        next = Instant::now() + REFILL;
                    }
                    if !outcome.unsettled.is_empty() {
                        next = Instant::now() + RETRY;
                    }
                    self.report(&outcome, &scanner);
                    let changes = if synced { outcome.events } else { scanner.everything() };
                    synced = true;
                    for event in changes {
                        if self.events.send(event, noticed.into_std()).await.is_err() {
                            return Ok(());
                        }
                    }
                }
                Err(cause) => {
                    self.lost(&cause);
                    next = Instant::now() + SEARCH;
                }
            }
            if let Some(returned) = self.returned {
                next = next.min(returned + REFILL);
            }
            tokio::select! {
                () = self.events.closed() => return Ok(()),
                changed = changed(&self.watch, &mut self.changes, Instant::now(), next) => changed?,
            }
        }
    }

    async fn scan(&mut self, mut scanner: Scanner) -> io::Result<(Scanner, io::Result<Outcome>)> {
        let now = Instant::now();
        self.returned = self.returned.filter(|&returned| now < returned + REFILL);
        // Watching before reading: what changes in between is seen by one of the two.
        let due = std::mem::take(&mut self.changes.due);
        let mut only_touched = due == Due::Files && !self.missing && self.returned.is_none();
        if self.watch.renew(&self.directory) {
            self.changes.writing.clear();
            only_touched = false;
        }
        self.changes.writing.retain(|_, &mut since| now < since + RESCAN);
        let hints = Hints {
            touched: std::mem::take(&mut self.changes.touched),
            writing: self.changes.writing.keys().cloned().collect::<BTreeSet<_>>(),
            keep_missing: self.missing || self.returned.is_some(),
            only_touched,
        };
        let scan = move || {
            let outcome = scanner.scan(&hints);
            (scanner, outcome)
        };
        tokio::task::spawn_blocking(scan).await.map_err(io::Error::other)
    }

    /// Notes that the directory could be read; says whether it could not before.
    fn found_again(&mut self) -> bool {
        let again = std::mem::take(&mut self.missing);
        if again {
            info!(directory = %self.directory.display(), "the manifest directory is back");
            self.returned = Some(Instant::now());
        }
        self.conditions.clear(MISSING, "");
        self.state.connected(SystemTime::now());
        again
    }

    fn lost(&mut self, cause: &io::Error) {
        self.missing = true;
        let message = format!(
            "cannot read the manifest directory {}: {cause}; the last known objects are served until it is back",
            self.directory.display()
        );
        self.state.failed(message.clone(), SystemTime::now());
        self.conditions.raise(MISSING, "", message, SystemTime::now());
    }

    fn report(&self, outcome: &Outcome, scanner: &Scanner) {
        let now = SystemTime::now();
        self.conditions.retain(INVALID, |file| outcome.invalid.contains_key(file));
        for (file, problem) in &outcome.invalid {
            let path = self.directory.join(file);
            let message = format!("cannot use all of {}: {problem}; correct the file", path.display());
            self.conditions.raise(INVALID, file.clone(), message, now);
        }
        self.conditions.retain(DUPLICATE, |object| outcome.duplicates.contains_key(object));
        for (object, message) in &outcome.duplicates {
            self.conditions.raise(DUPLICATE, object.clone(), message.clone(), now);
        }
        match &outcome.too_many {
            Some(message) => self.conditions.raise(TOO_MANY, "", message.clone(), now),
            None => self.conditions.clear(TOO_MANY, ""),
        }
        self.state.synced(now);
        let counts = scanner.counts();
        for kind in Kind::ALL {
            self.state.count(kind, counts.get(&kind).copied().unwrap_or(0));
        }
    }
}

/// Waits until the directory changed and came to rest, at most until `next`; `rest` is since when it has been at rest.
///
/// A finished file that comes after a rest is not waited with. All else may be part of something larger: what is gone may
/// come back at once under another name, and of many files one may need another.
async fn changed(watch: &DirectoryWatch, changes: &mut Changes, rest: Instant, next: Instant) -> io::Result<()> {
    while changes.due == Due::Nothing {
        match timeout_at(next, watch.read(changes)).await {
            Ok(read) => read?,
            Err(_) => return Ok(()),
        }
    }
    if changes.due == Due::Files && Instant::now() >= rest + QUIET {
        return Ok(());
    }
    let latest = Instant::now() + MAX_DELAY;
    while let Ok(read) = timeout_at(latest.min(Instant::now() + QUIET), watch.read(changes)).await {
        read?;
        // Never ending changes would always be ready before the time-out is looked at.
        if Instant::now() >= latest {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
