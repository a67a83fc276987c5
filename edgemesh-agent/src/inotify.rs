//! inotify for tasks.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, RawFd},
    path::Path,
};

use nix::{
    errno::Errno,
    sys::inotify::{self, AddWatchFlags, InitFlags, InotifyEvent, WatchDescriptor},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Watched directories, and what happened in them.
#[derive(Debug)]
pub(crate) struct Inotify(AsyncFd<Descriptor>);

/// [`AsyncFd`] wants [`AsRawFd`], which [`inotify::Inotify`] does not have.
#[derive(Debug)]
struct Descriptor(inotify::Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Inotify {
    pub(crate) fn new() -> io::Result<Self> {
        let inotify = inotify::Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        // SAFETY: the descriptor is owned by the value that is registered, and always the same until that is dropped.
        let inotify = unsafe { AsyncFd::register_with_interest(Descriptor(inotify), Interest::READABLE) }?;
        Ok(Self(inotify))
    }

    /// Watches the directory that is at the path now, for anything that happens to it or its files. For one that is
    /// watched already this gives the same descriptor.
    pub(crate) fn watch(&self, directory: &Path) -> io::Result<WatchDescriptor> {
        let mask = AddWatchFlags::IN_ONLYDIR
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF;
        Ok(self.0.get_ref().0.add_watch(directory, mask)?)
    }

    /// Watches a directory no longer.
    pub(crate) fn forget(&self, watched: WatchDescriptor) {
        // Fails where the kernel dropped the watch with the directory.
        let _gone = self.0.get_ref().0.rm_watch(watched);
    }

    /// Waits for events; there may be none where a signal came. Loses nothing when cancelled.
    pub(crate) async fn events(&self) -> io::Result<Vec<InotifyEvent>> {
        let read = |descriptor: &Descriptor| descriptor.0.read_events().map_err(io::Error::from);
        match self.0.async_io(Interest::READABLE, read).await {
            Err(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => Ok(Vec::new()),
            events => events,
        }
    }
}
