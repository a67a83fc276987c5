use std::{fs, io, path::Path};

use nix::{
    mount::umount,
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::{
    SYS_FS_BPF,
    pins::{is_version, remove_pins},
};

/// What the kernel itself puts into a bpffs (kernel/bpf/preload).
const KERNELS: [&str; 2] = ["maps.debug", "progs.debug"];

/// Whether an agent has left links or maps below `directory`.
pub fn is_pinned(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|entries| entries.flatten().any(|entry| is_version(&entry.path())))
}

/// Removes every pin of every version below `directory`, and the directory: links detach, maps are freed, translation
/// ends. Returns the names of what was removed; nothing there is no error.
///
/// Only files on a bpffs are touched, and only in directories of versions. The directory stays if it holds anything
/// else. A bpffs that [`super::Ebpf::open`] mounted at the directory itself is unmounted.
///
/// # Errors
///
/// The directory or one of the pins cannot be removed.
pub fn remove_all(directory: &Path) -> io::Result<Vec<String>> {
    let mut removed = Vec::new();
    let on_bpffs = |path: &Path| statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC);
    if !on_bpffs(directory) {
        return Ok(removed);
    }
    let mut others = false;
    for entry in fs::read_dir(directory)? {
        let version = entry?.path();
        if !is_version(&version) {
            others |= !KERNELS.iter().any(|name| version.ends_with(name));
            continue;
        }
        removed.extend(remove_pins(&version)?.iter().map(|pin| pin.display().to_string()));
    }
    if others || directory == Path::new(SYS_FS_BPF) {
        return Ok(removed);
    }
    if !directory.parent().is_some_and(on_bpffs) {
        umount(directory)?;
    }
    fs::remove_dir(directory)?;
    removed.push(directory.display().to_string());
    Ok(removed)
}
