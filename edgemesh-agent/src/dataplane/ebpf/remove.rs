use std::{fs, io, path::Path};

use nix::{
    mount::umount,
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::SYS_FS_BPF;

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
        // Forward programs first: from then on nothing new is translated, while what is still finds its way back.
        let mut pins: Vec<_> = fs::read_dir(&version)?.map(|pin| Ok(pin?.path())).collect::<io::Result<_>>()?;
        pins.sort_by_key(|pin| {
            !pin.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"link_connect"))
        });
        for pin in pins {
            fs::remove_file(&pin)?;
            removed.push(pin.display().to_string());
        }
        fs::remove_dir(&version)?;
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

/// Whether a path is a directory named as [`super::open::version_directory`] names one, of any version.
fn is_version(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix('v'));
    name.is_some_and(|number| number.parse::<u32>().is_ok()) && path.is_dir()
}
