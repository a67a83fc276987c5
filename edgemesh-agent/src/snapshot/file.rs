//! Where the file is, and how it gets there and back without ever being half of something.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufReader, BufWriter, Write},
    os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    unistd::geteuid,
};

use super::format::{self, Contents, Flaw};

/// How many files that could not be used are kept, the newest as `.unusable-1`.
const KEPT: u32 = 3;
/// For reading and for writing: a line is far smaller, the system calls are few.
const BUFFER: usize = 64 << 10;
/// Permissions that let others change what is there.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// How long another writer in the same directory is waited for, and how often it is looked at.
const LOCK_PATIENCE: u32 = 40;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// The file of a snapshot, or another one that the agent keeps beside it.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotFile {
    path: PathBuf,
}

/// Why there is nothing to restore, though something is there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unusable {
    #[error(transparent)]
    Flaw(#[from] Flaw),
    #[error("it is a symbolic link")]
    Link,
    #[error("it belongs to uid {0}")]
    Owner(u32),
    #[error("others than its owner may write to it (mode {0:o})")]
    Mode(u32),
    /// A directory, a device or the like, which is nobody's snapshot and is left alone.
    #[error("it is no regular file")]
    NoFile,
    /// The directory is not ours alone, so that anybody may have put it there.
    #[error("its directory {}", .0)]
    Directory(String),
}

impl SnapshotFile {
    pub(crate) fn new(path: PathBuf) -> Self {
        // Without a trailing slash, which would turn the names of the files beside it into those of files within it.
        Self { path: path.components().collect() }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// None where there is no file.
    ///
    /// # Errors
    ///
    /// What is there cannot be used.
    pub(super) fn read(&self) -> Result<Option<Contents>, Unusable> {
        let Some(file) = self.open()? else { return Ok(None) };
        if file.metadata().map_err(Flaw::Io)?.len() > format::MAX_SIZE {
            return Err(Flaw::TooLarge.into());
        }
        Ok(Some(format::read(BufReader::with_capacity(BUFFER, file))?))
    }

    /// Opens it for reading; None where there is no file.
    ///
    /// # Errors
    ///
    /// What is there may be somebody else's.
    pub(crate) fn open(&self) -> Result<Option<File>, Unusable> {
        let found = match fs::symlink_metadata(&self.path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Flaw::Io(error).into()),
        };
        if found.file_type().is_symlink() {
            return Err(Unusable::Link);
        }
        if let Some(trouble) = trouble_with_directory(self.directory()).map_err(Flaw::Io)? {
            return Err(Unusable::Directory(trouble));
        }
        // What was looked at may have been replaced since: nothing is followed, nothing is waited for (a FIFO), and all
        // checks are made on what was opened.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(&self.path);
        let file = file.map_err(|error| match error.raw_os_error() {
            Some(libc::ELOOP) => Unusable::Link,
            // A socket, or a device without a driver.
            Some(libc::ENXIO) => Unusable::NoFile,
            _ => Flaw::Io(error).into(),
        })?;
        let metadata = file.metadata().map_err(Flaw::Io)?;
        if !metadata.is_file() {
            return Err(Unusable::NoFile);
        }
        if metadata.uid() != geteuid().as_raw() {
            return Err(Unusable::Owner(metadata.uid()));
        }
        if metadata.mode() & WRITABLE_BY_OTHERS != 0 {
            return Err(Unusable::Mode(metadata.mode() & 0o7777));
        }
        Ok(Some(file))
    }

    /// Renames what is there, so that it can be looked at and is not in the way; the oldest of what was renamed before
    /// goes. Gives its new path.
    ///
    /// # Errors
    ///
    /// It cannot be renamed; `InvalidInput` where it is neither a regular file nor a link.
    pub(crate) fn set_aside(&self) -> io::Result<PathBuf> {
        let kind = fs::symlink_metadata(&self.path)?.file_type();
        if kind.is_dir() || kind.is_fifo() || kind.is_socket() || kind.is_block_device() || kind.is_char_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file, and is left where it is"));
        }
        for number in (1..KEPT).rev() {
            match fs::rename(self.aside(number), self.aside(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let aside = self.aside(1);
        fs::rename(&self.path, &aside)?;
        Ok(aside)
    }

    /// Replaces the file in one step: whoever reads it, whenever, and whatever happens to this process or to the power,
    /// finds the old one or the new one. Gives its size.
    ///
    /// # Errors
    ///
    /// The old one is still there, and nothing else.
    pub(super) fn write(&self, contents: &Contents) -> io::Result<u64> {
        self.replace(|out| format::write(contents, out))
    }

    /// As [`SnapshotFile::write`], for contents of any kind.
    ///
    /// # Errors
    ///
    /// The old one is still there, and nothing else.
    pub(crate) fn replace(&self, fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<u64> {
        let directory = self.directory();
        // Only what is missing gets this mode; one that was made for us may be open for reading.
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        if let Some(trouble) = trouble_with_directory(directory)? {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("the directory {trouble}")));
        }
        let lock = lock(directory)?;
        let draft = self.beside("draft");
        remove_if_there(&draft)?;
        let written = self.write_through(&draft, fill).inspect_err(|_| {
            // What cannot be removed is removed next time.
            let _ = fs::remove_file(&draft);
        })?;
        match lock.sync_all() {
            // Some file systems know no such thing for directories (fsync(2)); the file is in place all the same.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(written),
            synced => synced.map(|()| written),
        }
    }

    fn write_through(
        &self,
        draft: &Path,
        fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> io::Result<u64> {
        // Whatever the umask is.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(draft)?;
        let mut out = BufWriter::with_capacity(BUFFER, file);
        fill(&mut out)?;
        out.flush()?;
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        let size = file.metadata()?.len();
        fs::rename(draft, &self.path)?;
        Ok(size)
    }

    /// Removes the file and all that ever was beside it. Gives what was removed.
    ///
    /// # Errors
    ///
    /// Something cannot be removed.
    pub(crate) fn remove(&self) -> io::Result<Vec<PathBuf>> {
        let mut removed = Vec::new();
        let others = (1..=KEPT).map(|number| self.aside(number)).chain([self.beside("draft")]);
        for path in [self.path.clone()].into_iter().chain(others) {
            // A directory was never ours, and is not removed by this either.
            if remove_if_there(&path)? {
                removed.push(path);
            }
        }
        Ok(removed)
    }

    fn directory(&self) -> &Path {
        match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("/"),
        }
    }

    fn aside(&self, number: u32) -> PathBuf {
        self.beside(&format!("unusable-{number}"))
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(".");
        name.push(suffix);
        PathBuf::from(name)
    }
}

/// Keeps others from writing there: two agents could rename each other's unfinished file. One agent has several files
/// there, so whoever is there already is waited for.
fn lock(directory: &Path) -> io::Result<Flock<File>> {
    let mut file = File::open(directory)?;
    for _ in 0..LOCK_PATIENCE {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((given_back, Errno::EWOULDBLOCK)) => file = given_back,
            Err((_, errno)) => return Err(errno.into()),
        }
        thread::sleep(LOCK_PAUSE);
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "another agent is writing there"))
}

/// What lets others than us decide what is in a directory, in words that follow its name.
fn trouble_with_directory(directory: &Path) -> io::Result<Option<String>> {
    let metadata = fs::metadata(directory)?;
    let shown = directory.display();
    Ok(if metadata.uid() != geteuid().as_raw() {
        Some(format!("{shown} belongs to uid {}", metadata.uid()))
    } else if metadata.mode() & WRITABLE_BY_OTHERS != 0 {
        Some(format!("{shown} can be written to by others (mode {:o})", metadata.mode() & 0o7777))
    } else {
        None
    })
}

fn remove_if_there(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
