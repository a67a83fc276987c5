//! Where maps and links are pinned, and how a new layout takes over from an old one.
//!
//! Tables and links are in `vN`, what sockets remember in `sockets-vN`, each with the version of its layout. An agent with
//! other tables than the last one's builds its own in full first; then each link is switched to its new program in place,
//! and moved, and the old tables go. So every call is translated, by the old tables or the new.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::programs::CgroupSockAddrAttachType as Hook;
use edgemesh_common::layout;
use tracing::debug;

use super::sys::{self, LinkInfo};

/// The pins of this agent's layouts below one directory.
#[derive(Debug)]
pub(super) struct Pins {
    root: PathBuf,
    /// The tables and links.
    pub(super) tables: PathBuf,
    /// What sockets remember.
    pub(super) sockets: PathBuf,
}

impl Pins {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            tables: root.join(format!("v{}", layout::VERSION)),
            sockets: root.join(format!("sockets-v{}", layout::SOCKETS_VERSION)),
        }
    }

    fn link(&self, program: &str) -> PathBuf {
        self.tables.join(format!("link_{program}"))
    }

    /// Whether translation goes through links of another layout, and none of this one.
    pub(super) fn awaits_switch(&self) -> bool {
        !has_links(&self.tables) && self.others().iter().any(|directory| has_links(directory))
    }

    /// Puts a program into the link that an earlier agent pinned, of this layout or another, or makes and pins a new one;
    /// says whether there was one.
    pub(super) fn attach(&self, name: &str, program: BorrowedFd<'_>, cgroup: &File, hook: Hook) -> io::Result<bool> {
        let pin = self.link(name);
        if take_over(&pin, program, cgroup)?.is_some() {
            return Ok(true);
        }
        for other in self.others() {
            let old = other.join(format!("link_{name}"));
            if let Some(link) = take_over(&old, program, cgroup)? {
                // Pinned twice for a moment: it must never be without a pin.
                sys::pin(link.as_fd(), &pin)?;
                fs::remove_file(old)?;
                return Ok(true);
            }
        }
        let link = sys::link_create(program, cgroup.as_fd(), hook)?;
        sys::pin(link.as_fd(), &pin)?;
        Ok(false)
    }

    /// The link of a program, of this layout or of another that is still to be taken over.
    pub(super) fn link_info(&self, program: &str) -> Option<LinkInfo> {
        let info = |pin: &Path| sys::open_pin(pin).and_then(|link| sys::link_info(link.as_fd())).ok();
        let others = || self.others().iter().find_map(|other| info(&other.join(format!("link_{program}"))));
        info(&self.link(program)).or_else(others)
    }

    /// Removes what other layouts have left; call it once every link is this layout's.
    pub(super) fn drop_others(&self) -> io::Result<()> {
        for directory in self.others() {
            remove_pins(&directory)?;
            debug!(directory = %directory.display(), "the pins of another layout are removed");
        }
        Ok(())
    }

    /// The directories of other layouts.
    fn others(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.root).into_iter().flatten().flatten().map(|entry| entry.path());
        entries.filter(|path| is_version(path) && *path != self.tables && *path != self.sockets).collect()
    }
}

/// Whether a path is a directory named as those above, of any version.
pub(super) fn is_version(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let version = name.strip_prefix("sockets-").unwrap_or(name).strip_prefix('v');
    version.is_some_and(|number| number.parse::<u32>().is_ok()) && path.is_dir()
}

/// Removes the pins in a directory of a version, and the directory; returns the pins.
///
/// Forward programs first: from then on nothing new is translated, while what is still finds its way back.
pub(super) fn remove_pins(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut pins: Vec<PathBuf> = fs::read_dir(directory)?.map(|pin| Ok(pin?.path())).collect::<io::Result<_>>()?;
    pins.sort_by_key(|pin| !pin.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"link_connect")));
    for pin in &pins {
        fs::remove_file(pin)?;
    }
    fs::remove_dir(directory)?;
    Ok(pins)
}

fn has_links(directory: &Path) -> bool {
    let mut entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.any(|entry| entry.file_name().as_encoded_bytes().starts_with(b"link_"))
}

/// Puts a program into a pinned link. None where there is none to this cgroup; a pin to another one is removed.
fn take_over(pin: &Path, program: BorrowedFd<'_>, cgroup: &File) -> io::Result<Option<OwnedFd>> {
    let Ok(link) = sys::open_pin(pin) else { return Ok(None) };
    if sys::link_info(link.as_fd())?.cgroup == sys::cgroup_id(cgroup)? {
        match sys::link_update(link.as_fd(), program) {
            Ok(()) => return Ok(Some(link)),
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
            Err(error) => return Err(error),
        }
    }
    debug!(pin = %pin.display(), "a pinned link belongs to another cgroup; making a new one");
    fs::remove_file(pin)?;
    Ok(None)
}
