//! The two file systems the data plane stands on: cgroup2 for its reach, bpffs for its pins.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, fstatfs, statfs},
};
use tracing::info;

use super::{OpenError, SYS_FS_BPF};

/// The inode number of the root of the cgroup2 hierarchy; other cgroups have larger ones.
const ROOT_CGROUP: u64 = 1;

/// Opens the cgroup whose processes are served: the configured one, or the root of the hierarchy.
///
/// In a container with a cgroup namespace of its own the root of a mount is the container's own cgroup; serving only
/// that is the classic silent failure, so the root is told by its inode number, and init's mounts are tried too.
///
/// # Errors
///
/// The configured path is no cgroup2 directory, or no root can be found.
pub(super) fn open_cgroup(configured: Option<&Path>) -> Result<(File, PathBuf), OpenError> {
    if let Some(path) = configured {
        let error = |error| OpenError::CgroupRoot { path: path.to_owned(), error };
        let kind = statfs(path).map_err(|errno| error(errno.into()))?.filesystem_type();
        if kind != CGROUP2_SUPER_MAGIC {
            return Err(error(io::Error::other("not on a cgroup2 file system")));
        }
        return Ok((File::open(path).map_err(error)?, path.to_owned()));
    }
    for (prefix, mountinfo) in [("", "/proc/self/mountinfo"), ("/proc/1/root", "/proc/1/mountinfo")] {
        let Ok(text) = fs::read_to_string(mountinfo) else { continue };
        for point in mount_points(&text, "cgroup2") {
            let path = PathBuf::from(format!("{prefix}{point}"));
            if let Ok(directory) = File::open(&path)
                && is_root(&directory)
            {
                return Ok((directory, path));
            }
        }
    }
    Err(OpenError::NoCgroup2)
}

/// Whether this is the root of the cgroup2 hierarchy. The type is looked at, too: another file system may be mounted over
/// the cgroup2 one, and the roots of many have the same inode number.
fn is_root(directory: &File) -> bool {
    fstatfs(directory).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC)
        && directory.metadata().is_ok_and(|meta| meta.ino() == ROOT_CGROUP)
}

/// Makes the directories `versions` below `pins`, mounting a bpffs on `pins` where there is none.
///
/// # Errors
///
/// The directory cannot be made, or the mount is refused.
pub(super) fn prepare_pins(pins: &Path, versions: &[&Path]) -> Result<(), OpenError> {
    let error = |error: io::Error| OpenError::Pins { path: pins.to_owned(), error };
    let on_bpffs = |path: &Path| statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC);
    let nearest = pins.ancestors().find(|path| path.exists()).unwrap_or_else(|| Path::new("/"));
    if !on_bpffs(nearest) {
        let target = if pins.starts_with(SYS_FS_BPF) { Path::new(SYS_FS_BPF) } else { pins };
        if target == pins {
            fs::create_dir_all(target).map_err(error)?;
        }
        mount(Some("bpffs"), target, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
            .map_err(|errno| error(errno.into()))?;
        info!(path = %target.display(), "mounted a bpffs");
    }
    versions.iter().try_for_each(fs::create_dir_all).map_err(error)
}

/// The mount points of a file system type in the order of `mountinfo` (proc(5)), with its octal escapes undone.
fn mount_points<'a>(mountinfo: &'a str, fs_type: &'a str) -> impl Iterator<Item = String> + 'a {
    mountinfo.lines().filter_map(move |line| {
        let (mount, fs) = line.split_once(" - ")?;
        (fs.split(' ').next() == Some(fs_type)).then_some(())?;
        mount.split(' ').nth(4).map(unescape)
    })
}

fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_mounts_of_a_type_in_mountinfo() {
        let text = "\
25 30 0:23 / /sys rw,nosuid shared:7 - sysfs sysfs rw
33 25 0:28 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw,nsdelegate
34 25 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
35 25 0:30 / /mnt/with\\040space rw - cgroup2 none rw
malformed line
";
        let points: Vec<String> = mount_points(text, "cgroup2").collect();
        assert_eq!(points, ["/sys/fs/cgroup/unified", "/mnt/with space"]);
    }

    #[test]
    fn a_configured_root_that_is_no_cgroup_is_refused_by_name() {
        let error = open_cgroup(Some(Path::new("/proc"))).unwrap_err().to_string();
        assert!(error.contains("/proc") && error.contains("not on a cgroup2"), "{error}");
        let error = open_cgroup(Some(Path::new("/nonexistent"))).unwrap_err().to_string();
        assert!(error.contains("/nonexistent"), "{error}");
    }

    #[test]
    fn a_file_system_mounted_over_cgroup2_is_not_taken_for_it() {
        let other = File::open("/proc").unwrap();
        assert_eq!(other.metadata().unwrap().ino(), ROOT_CGROUP, "else this proves nothing");
        assert!(!is_root(&other));
    }
}
