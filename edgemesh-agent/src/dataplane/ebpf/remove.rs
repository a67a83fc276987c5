use std::{fs, io, path::Path};

use nix::{
    mount::umount,
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// Whether an agent has left links or maps below `directory`.
pub fn is_pinned(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut versions| versions.next().is_some())
}

/// Removes every pin of every version below `directory`, and the directory: links detach, maps are freed, translation
/// ends. Returns the names of what was removed; nothing there is no error.
///
/// Only files on a bpffs are touched. A bpffs that [`super::Ebpf::open`] mounted at the directory itself is unmounted.
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
    for version in fs::read_dir(directory)? {
        let version = version?.path();
        if !version.is_dir() {
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
    if directory.parent().is_some_and(on_bpffs) {
        fs::remove_dir(directory)?;
    } else {
        umount(directory)?;
        fs::remove_dir(directory)?;
    }
    removed.push(directory.display().to_string());
    Ok(removed)
}
