use std::{
    fs, io,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    mount::umount,
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::{
    SYS_FS_BPF, mounts,
    pins::{is_version, remove_pins},
    probe,
};

/// The cgroup of the canary's child, below the one that is served.
pub const CANARY_CGROUP: &str = "edgemesh-canary";

/// How long the last process of a cgroup of ours may take to end: the canary's child lives for two seconds at most.
const EMPTY: Duration = Duration::from_secs(3);

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

/// Removes the cgroups that agents have made below the one they serve: that of the canary, and those of probes that were
/// killed. Returns their names. A child of an agent that has just been killed is waited for.
///
/// # Errors
///
/// There are still processes in one, or permission is missing.
pub fn remove_scratch(cgroup_root: Option<&Path>) -> io::Result<Vec<String>> {
    let mut removed = Vec::new();
    // Where there is no cgroup2, there is nothing in it.
    let Ok((_, served)) = mounts::open_cgroup(cgroup_root) else { return Ok(removed) };
    for entry in fs::read_dir(&served)? {
        let name = entry?.file_name();
        let is_ours = |name: &str| {
            let process = name.strip_prefix(probe::SCRATCH).and_then(|process| process.parse::<u32>().ok());
            name == CANARY_CGROUP || process.is_some()
        };
        if name.to_str().is_some_and(is_ours) {
            removed.extend(remove_cgroup(&served.join(name))?);
        }
    }
    Ok(removed)
}

/// None if it is gone by then.
fn remove_cgroup(path: &Path) -> io::Result<Option<String>> {
    let end = Instant::now() + EMPTY;
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(Some(path.display().to_string())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        }
    }
}
