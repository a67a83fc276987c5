//! Whether a process is below the cgroup whose sockets the programs see.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::Served;

/// The inode number of the root of the cgroup2 hierarchy.
const ROOT_CGROUP: u64 = 1;

/// Compares the cgroup of a process, as `/proc/PID/cgroup` has it, with the served directory.
///
/// A socket belongs to the cgroup its process was in when it was made, which is hardly ever another.
pub(super) fn served(cgroup: &str, served: &Path) -> Served {
    // Everything is below the root; and that is where the agent is in a container, where paths do not tell.
    if fs::metadata(served).is_ok_and(|metadata| metadata.ino() == ROOT_CGROUP) {
        return Served::Yes;
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    compare(cgroup, served, &mounts)
}

fn compare(cgroup: &str, served: &Path, mountinfo: &str) -> Served {
    // A process outside the agent's cgroup namespace has a path that leads up and away.
    if cgroup.is_empty() || cgroup.split('/').any(|part| part == "..") {
        return Served::Unknown;
    }
    match path_in_hierarchy(served, mountinfo) {
        Some(root) if Path::new(cgroup).starts_with(&root) => Served::Yes,
        Some(_) => Served::No,
        None => Served::Unknown,
    }
}

/// Where a directory is in the cgroup2 hierarchy: what the innermost mount around it shows, and the way below that.
fn path_in_hierarchy(directory: &Path, mountinfo: &str) -> Option<PathBuf> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let (mount, fs) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        fs.starts_with("cgroup2 ").then_some((root, point))
    });
    let around = mounts.filter_map(|(root, point)| Some((root, point, directory.strip_prefix(point).ok()?)));
    let (root, _, below) = around.max_by_key(|(_, point, _)| point.len())?;
    let path = Path::new(root).join(below);
    // A mount from outside the cgroup namespace.
    (!path.components().any(|part| part.as_os_str() == "..")).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
25 30 0:23 / /sys rw,nosuid shared:7 - sysfs sysfs rw
33 25 0:28 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw,nsdelegate
40 25 0:28 /lab/edge1 /mnt/node rw - cgroup2 none rw
";

    #[test]
    fn a_process_is_served_below_the_served_cgroup_alone() {
        for (cgroup, served, expected) in [
            ("/lab/edge1/pods/a", "/sys/fs/cgroup/lab/edge1", Served::Yes),
            ("/lab/edge1", "/sys/fs/cgroup/lab/edge1", Served::Yes),
            ("/lab/edge10/pods/a", "/sys/fs/cgroup/lab/edge1", Served::No),
            ("/lab/edge2", "/sys/fs/cgroup/lab/edge1", Served::No),
            ("/", "/sys/fs/cgroup/lab/edge1", Served::No),
            ("/lab/edge1/pods/a", "/mnt/node/pods", Served::Yes),
            ("/lab/edge1/host", "/mnt/node/pods", Served::No),
            ("/../../kubepods/a", "/sys/fs/cgroup/lab", Served::Unknown),
            ("", "/sys/fs/cgroup/lab", Served::Unknown),
            ("/lab", "/elsewhere", Served::Unknown),
        ] {
            assert_eq!(compare(cgroup, Path::new(served), MOUNTS), expected, "{cgroup} in {served}");
        }
    }
}
