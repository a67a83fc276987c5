//! One process, as `/proc` shows it.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
};

/// More than an environment has in which the runtime's own variables come first.
const MAX_ENVIRONMENT: u64 = 256 << 10;
const MAX_LINE: u64 = 8 << 10;

/// A namespace by device and inode, which no other has while a process is in it.
pub(super) type NamespaceId = (u64, u64);

/// A process that was there a moment ago.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) id: u32,
    pub(super) network: NamespaceId,
    pub(super) uts: NamespaceId,
    /// Of the cgroup2 hierarchy, as seen from the agent's cgroup namespace; empty where there is none.
    pub(super) cgroup: String,
}

/// The processes, in order of their ids: a pod's first one is the one that holds its namespaces.
pub(super) fn ids() -> io::Result<Vec<u32>> {
    let mut ids: Vec<u32> =
        fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    ids.sort_unstable();
    Ok(ids)
}

/// The network namespace this thread is in.
pub(super) fn own_network() -> io::Result<NamespaceId> {
    fs::metadata("/proc/thread-self/ns/net").map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Process {
    /// Looks a process up.
    ///
    /// # Errors
    ///
    /// It is gone, a zombie or a thread of the kernel, or may not be looked into.
    pub(super) fn open(id: u32) -> io::Result<Self> {
        let namespace =
            |kind: &str| fs::metadata(format!("/proc/{id}/ns/{kind}")).map(|metadata| (metadata.dev(), metadata.ino()));
        let cgroups = read(&path(id, "cgroup"), MAX_LINE)?;
        let cgroups = String::from_utf8_lossy(&cgroups);
        let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().to_owned();
        Ok(Self { id, network: namespace("net")?, uts: namespace("uts")?, cgroup })
    }

    /// Opens a namespace of the process, which stays as long as the file.
    pub(super) fn namespace(&self, kind: &str) -> io::Result<File> {
        File::open(format!("/proc/{}/ns/{kind}", self.id))
    }

    /// `comm`, at most 15 bytes; empty if the process is gone.
    pub(super) fn command(&self) -> String {
        let command = read(&path(self.id, "comm"), MAX_LINE).unwrap_or_default();
        String::from_utf8_lossy(&command).trim_end().to_owned()
    }

    /// Whether HOSTNAME in its environment is the name, or what the kubelet makes of it.
    pub(super) fn says_hostname(&self, name: &str, host: &str) -> bool {
        let environment = read(&path(self.id, "environ"), MAX_ENVIRONMENT).unwrap_or_default();
        let mut variables = environment.split(|byte| *byte == 0);
        variables.any(|variable| {
            variable
                .strip_prefix(b"HOSTNAME=")
                .is_some_and(|value| value == name.as_bytes() || value == host.as_bytes())
        })
    }
}

fn path(id: u32, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{id}/{file}"))
}

/// The beginning of a file of `/proc`, which the kernel makes when it is read.
fn read(path: &std::path::Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn a_process_says_its_name_in_its_environment() {
        let mut child =
            Command::new("cat").env("HOSTNAME", "web-0").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // `spawn` returns within execve, before the kernel has given the new program its environment; one that answers has it.
        child.stdin.as_mut().unwrap().write_all(b"!").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let process = Process::open(child.id()).unwrap();
        let (own, other) = (process.says_hostname("web-0", "web-0"), process.says_hostname("web", "web"));
        let (command, network) = (process.command(), process.network);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(own, "its own name");
        assert!(!other, "another's name");
        assert_eq!((command.as_str(), network), ("cat", own_network().unwrap()));
    }

    #[test]
    fn a_process_that_is_gone_cannot_be_opened() {
        Process::open(u32::MAX).unwrap_err();
    }
}
