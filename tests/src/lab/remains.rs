//! What a lab leaves outside its namespaces, a cgroup and a directory, and its removal.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

/// Cgroups and directories of labs begin with it; the owner's process id and a number follow.
const PREFIX: &str = "edgemesh-lab-";
/// Killing hundreds of processes takes a while on a busy machine.
const REMOVAL: Duration = Duration::from_secs(20);

/// The name of the `number`th lab of the process `owner`.
pub(crate) fn lab_name(owner: u32, number: u32) -> String {
    format!("{PREFIX}{owner}-{number}")
}

/// Finds where cgroup2 is mounted.
pub(crate) fn cgroup2_mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("could not read /proc/self/mountinfo")?;
    mount_of(&mounts, "cgroup2")
        .context("cgroup2 is not mounted; try: mkdir /run/cgroup2 && mount -t cgroup2 none /run/cgroup2")
}

/// Creates a cgroup, with those above it.
pub(crate) fn create(cgroup: &Path) -> Result<()> {
    fs::create_dir_all(cgroup).with_context(|| format!("could not create the cgroup {}", cgroup.display()))
}

/// Kills what runs in a lab's cgroup, and removes the cgroup and the lab's directory. Either may be gone already.
pub(crate) fn remove(cgroup: &Path, directory: &Path) -> Result<()> {
    let end = Instant::now() + REMOVAL;
    // Again and again, because a process that was just starting may enter after the others were killed.
    while let Err(error) = clear(cgroup) {
        if Instant::now() >= end {
            return Err(error.context(format!("could not remove the cgroup {}", cgroup.display())));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    ignore_missing(fs::remove_dir_all(directory))
        .with_context(|| format!("could not remove the directory {}", directory.display()))
}

/// Removes the labs whose owner is gone; what cannot be removed stays for the next sweep.
pub(crate) fn sweep(cgroup2: &Path, temporary: &Path) {
    for parent in [cgroup2, temporary] {
        let Ok(entries) = fs::read_dir(parent) else { continue };
        for name in entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
            let Some(owner) = owner_of(&name) else { continue };
            let cgroup = cgroup2.join(&name);
            if Path::new("/proc").join(owner.to_string()).exists() || is_foreign(&cgroup) {
                continue;
            }
            let _ = remove(&cgroup, &temporary.join(&name));
        }
    }
}

/// The process id in the name of a lab.
fn owner_of(name: &str) -> Option<u32> {
    let (owner, number) = name.strip_prefix(PREFIX)?.split_once('-')?;
    number.parse::<u32>().ok()?;
    owner.parse().ok()
}

/// Whether a cgroup holds processes of another pid namespace, where the owner's id means somebody else.
fn is_foreign(cgroup: &Path) -> bool {
    let mut pending = vec![cgroup.to_owned()];
    while let Some(cgroup) = pending.pop() {
        let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        if processes.lines().any(|process| process == "0") {
            return true;
        }
        pending.extend(children(&cgroup).unwrap_or_default());
    }
    false
}

/// One try to empty and remove a cgroup.
fn clear(cgroup: &Path) -> Result<()> {
    if !cgroup.exists() {
        return Ok(());
    }
    ignore_missing(fs::write(cgroup.join("cgroup.kill"), "1")).context("could not write to cgroup.kill")?;
    let events = match fs::read_to_string(cgroup.join("cgroup.events")) {
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        events => events.context("could not read cgroup.events")?,
    };
    ensure!(!events.contains("populated 1"), "processes remain");
    remove_tree(cgroup)
}

fn remove_tree(cgroup: &Path) -> Result<()> {
    for child in children(cgroup)? {
        remove_tree(&child)?;
    }
    // Only empty cgroups can be removed, so this cannot hit anything else.
    ignore_missing(fs::remove_dir(cgroup)).with_context(|| format!("could not remove {}", cgroup.display()))
}

fn children(cgroup: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    match fs::read_dir(cgroup) {
        Ok(entries) => {
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    found.push(entry.path());
                }
            }
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("could not list {}", cgroup.display())),
    }
    Ok(found)
}

/// Somebody else removing the same thing at the same time is as good.
fn ignore_missing(outcome: std::io::Result<()>) -> std::io::Result<()> {
    match outcome {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The mount point of the first mount of a file system type (proc_pid_mountinfo(5)).
fn mount_of(mountinfo: &str, kind: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        (file_system.split(' ').next() == Some(kind)).then(|| PathBuf::from(point.replace("\\040", " ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_cgroup2_beside_the_old_hierarchies() {
        let mounts = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw\n\
                      32 31 0:29 / /sys/fs/cgroup/cpu rw shared:7 - cgroup cgroup rw,cpu\n\
                      41 31 0:38 / /sys/fs/my\\040groups rw,relatime shared:9 master:1 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_of(mounts, "cgroup2"), Some(PathBuf::from("/sys/fs/my groups")));
        assert_eq!(mount_of("", "cgroup2"), None);
    }

    #[test]
    fn only_names_of_labs_have_an_owner() {
        assert_eq!(owner_of(&lab_name(42, 7)), Some(42));
        for other in ["edgemesh-lab-42", "edgemesh-lab-x-1", "edgemesh-lab-42-x", "system.slice", "edgemesh-lab--1"] {
            assert_eq!(owner_of(other), None, "{other}");
        }
    }
}
