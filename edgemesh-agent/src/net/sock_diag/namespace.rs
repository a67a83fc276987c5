//! The network namespaces of the node, by the processes in them.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use nix::sched::{CloneFlags, setns};

use super::Error;

/// A network namespace, held open: it stays as long as this.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    /// The number that `readlink /proc/PID/ns/net` shows.
    pub inode: u64,
}

impl Namespace {
    /// Moves the calling thread into the namespace, for good; only for threads that are made for that.
    ///
    /// # Errors
    ///
    /// CAP_SYS_ADMIN is missing, here or in the user namespace that owns the network namespace.
    pub fn enter(&self) -> Result<(), Error> {
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|error| Error::Refused {
            attempt: "enter a network namespace",
            capability: "CAP_SYS_ADMIN",
            error: error.into(),
        })
    }
}

/// Every network namespace with a process in it, each once; opened as they are asked for, so that however many there are,
/// the agent has open only those it works on. Ends after as many steps as there are processes.
#[derive(Debug)]
pub struct Namespaces {
    processes: fs::ReadDir,
    seen: HashSet<(u64, u64)>,
}

/// Looks for the network namespaces of the processes in `/proc`. Threads that left their process's namespace do not count,
/// nor does process 1: it is in the node's namespace as the agent is, and may be barred even to root.
///
/// # Errors
///
/// `/proc` cannot be read. The items are errors where a process may not be looked into.
pub fn namespaces() -> Result<Namespaces, Error> {
    let processes = fs::read_dir("/proc").map_err(|error| refused("list the processes in /proc", error))?;
    Ok(Namespaces { processes, seen: HashSet::new() })
}

impl Iterator for Namespaces {
    type Item = Result<Namespace, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let process = match self.processes.next()? {
                Ok(process) => process,
                Err(error) => return Some(Err(refused("list the processes in /proc", error))),
            };
            let number = process.file_name();
            if number == "1" || !number.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
                continue;
            }
            match open(&process.path().join("ns/net")) {
                Ok((namespace, device)) => {
                    if self.seen.insert((device, namespace.inode)) {
                        return Some(Ok(namespace));
                    }
                }
                // The process is a zombie or has ended since; the kernel's word for that may be EACCES.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
                Err(_) if !process.path().exists() => {}
                Err(error) => return Some(Err(refused("look into the network namespace of a process", error))),
            }
        }
    }
}

fn open(path: &Path) -> io::Result<(Namespace, u64)> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    Ok((Namespace { file, inode: metadata.ino() }, metadata.dev()))
}

fn refused(attempt: &'static str, error: io::Error) -> Error {
    Error::Refused { attempt, capability: "CAP_SYS_PTRACE", error }
}
