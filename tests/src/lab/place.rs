//! Where a process of the lab runs, and how it gets there.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_no_new_privs;

/// Where a child runs; what is `None` or empty it shares with the owner of the lab.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Place<'a> {
    /// Its cgroup's directory.
    pub(super) cgroup: Option<&'a Path>,
    /// Its mount namespace.
    pub(super) mount: Option<BorrowedFd<'a>>,
    /// Its network namespace.
    pub(super) net: Option<BorrowedFd<'a>>,
    /// Whether it gets a new mount namespace, a copy of the one it is in.
    pub(super) new_mount: bool,
    /// Mount points it does not see.
    pub(super) hidden: &'a [&'a Path],
    /// Capabilities that neither it nor what it runs can have.
    pub(super) without: &'a [Capability],
}

/// A capability a process can be run without; see capabilities(7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability(u8);

impl Capability {
    /// CAP_NET_BIND_SERVICE
    pub const NET_BIND_SERVICE: Self = Self(10);
    /// CAP_NET_ADMIN
    pub const NET_ADMIN: Self = Self(12);
    /// CAP_SYS_PTRACE
    pub const SYS_PTRACE: Self = Self(19);
    /// CAP_SYS_ADMIN
    pub const SYS_ADMIN: Self = Self(21);
    /// CAP_SYS_RESOURCE
    pub const SYS_RESOURCE: Self = Self(24);
    /// CAP_PERFMON
    pub const PERFMON: Self = Self(38);
    /// CAP_BPF
    pub const BPF: Self = Self(39);

    /// All that this kernel knows but the named ones, named as in a pod's `securityContext`.
    pub(super) fn all_but(names: &[String]) -> Result<Vec<Self>> {
        let kept = names.iter().map(|name| Self::named(name)).collect::<Result<Vec<_>>>()?;
        let path = "/proc/sys/kernel/cap_last_cap";
        let last = std::fs::read_to_string(path).with_context(|| format!("could not read {path}"))?;
        let last: u8 = last.trim().parse().with_context(|| format!("{path} holds no number"))?;
        Ok((0..=last).map(Self).filter(|capability| !kept.contains(capability)).collect())
    }

    fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "NET_BIND_SERVICE" => Self::NET_BIND_SERVICE,
            "NET_ADMIN" => Self::NET_ADMIN,
            "SYS_PTRACE" => Self::SYS_PTRACE,
            "SYS_ADMIN" => Self::SYS_ADMIN,
            "SYS_RESOURCE" => Self::SYS_RESOURCE,
            "PERFMON" => Self::PERFMON,
            "BPF" => Self::BPF,
            other => bail!("the lab does not know the capability {other}"),
        })
    }
}

/// Has `command` run in `place`.
pub(super) fn enter(command: &mut Command, place: &Place<'_>) -> Result<()> {
    // All that may allocate or fail with a message happens here; the child only makes system calls.
    let procs = match place.cgroup {
        Some(cgroup) => {
            let path = cgroup.join("cgroup.procs");
            let file = File::options().write(true).open(&path);
            Some(file.with_context(|| format!("could not open {}", path.display()))?)
        }
        None => None,
    };
    let copy = |fd: Option<BorrowedFd<'_>>| -> Result<Option<OwnedFd>> {
        fd.map(|fd| fd.try_clone_to_owned().context("could not duplicate a namespace's descriptor")).transpose()
    };
    // In a copy of the machine's own namespace, unmounting would reach the machine.
    ensure!(place.mount.is_some() || place.hidden.is_empty(), "mounts can only be hidden in a node");
    let (mount, net) = (copy(place.mount)?, copy(place.net)?);
    let new_mount = place.new_mount || !place.hidden.is_empty();
    let hidden = place
        .hidden
        .iter()
        .map(|path| CString::new(path.as_os_str().as_bytes()).context("a path to hide has a zero byte"))
        .collect::<Result<Vec<_>>>()?;
    let without = place.without.to_vec();
    let prepare = move || {
        if let Some(mut procs) = procs.as_ref() {
            procs.write_all(b"0")?;
        }
        if let Some(mount) = &mount {
            setns(mount.as_fd(), CloneFlags::CLONE_NEWNS)?;
        }
        if let Some(net) = &net {
            setns(net.as_fd(), CloneFlags::CLONE_NEWNET)?;
        }
        if new_mount {
            unshare(CloneFlags::CLONE_NEWNS)?;
        }
        for path in &hidden {
            umount2(path.as_c_str(), MntFlags::MNT_DETACH)?;
        }
        for capability in &without {
            drop_capability(*capability)?;
        }
        if !without.is_empty() {
            // What it runs shall not get them either, as with allowPrivilegeEscalation: false.
            set_no_new_privs()?;
        }
        Ok(())
    };
    // SAFETY: `prepare` runs in the child between fork and exec and only makes system calls on what was set up before:
    // it takes no lock and allocates nothing.
    unsafe { command.pre_exec(prepare) };
    Ok(())
}

/// Waits for a child whose output is piped; kills it when `deadline` has passed.
pub(super) fn output(mut child: Child, deadline: Duration) -> Result<Output> {
    drop(child.stdin.take());
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    let Some(status) = wait(&mut child, deadline)? else {
        // Gone already, or killed now; the pipes end either way.
        let _ = child.kill();
        let _ = child.wait();
        bail!("process {} did not end within {deadline:?} and was killed", child.id());
    };
    Ok(Output { status, stdout: collected(stdout)?, stderr: collected(stderr)? })
}

/// Waits until a child ends, at most for `deadline`; `None` if it has not.
pub(super) fn wait(child: &mut Child, deadline: Duration) -> Result<Option<std::process::ExitStatus>> {
    let end = Instant::now() + deadline;
    loop {
        let ended = child.try_wait().with_context(|| format!("could not wait for process {}", child.id()))?;
        if ended.is_some() || Instant::now() >= end {
            return Ok(ended);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<std::io::Result<Vec<u8>>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).map(|_| bytes)
    })
}

fn collected(reader: Option<JoinHandle<std::io::Result<Vec<u8>>>>) -> Result<Vec<u8>> {
    let Some(reader) = reader else { return Ok(Vec::new()) };
    let bytes = reader.join().map_err(|_| anyhow!("a thread reading a process's output panicked"))?;
    bytes.context("could not read a process's output")
}

/// Takes a capability from what the program to be run can get: as root it gets the bounding and inheritable sets.
fn drop_capability(capability: Capability) -> std::io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[derive(Clone, Copy, Default)]
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    // _LINUX_CAPABILITY_VERSION_3 of <linux/capability.h>: two words per set.
    let mut header = Header { version: 0x2008_0522, pid: 0 };
    let mut data = [Data::default(); 2];
    let Capability(number) = capability;
    // SAFETY: prctl reads its integer arguments only; capget and capset get pointers to a header and to the two data
    // records that version 3 means.
    unsafe {
        if libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) != 0
            || libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) != 0
        {
            return Err(std::io::Error::last_os_error());
        }
        if let Some(word) = data.get_mut(usize::from(number / 32)) {
            word.inheritable &= !(1 << (number % 32));
        }
        if libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    fn run(place: &Place<'_>, program: &str, arguments: &[&str], deadline: Duration) -> Result<Output> {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        enter(&mut command, place)?;
        output(command.spawn()?, deadline)
    }

    #[test]
    fn a_program_cannot_get_back_the_capabilities_taken_from_it() {
        if !nix::unistd::geteuid().is_root() {
            return crate::lab::skip("dropping capabilities").unwrap();
        }
        let without = [Capability::BPF, Capability::SYS_ADMIN];
        let place = Place { without: &without, ..Place::default() };
        let out = run(&place, "cat", &["/proc/self/status"], crate::lab::DEADLINE).unwrap();
        let status = String::from_utf8(out.stdout).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim();
        let mask = u64::from_str_radix(mask, 16).unwrap();
        let has = |capability: Capability| mask & (1 << capability.0) != 0;
        assert!(!has(Capability::BPF) && !has(Capability::SYS_ADMIN) && has(Capability::NET_ADMIN), "{mask:x}");
    }

    #[test]
    fn a_program_that_does_not_end_is_killed_at_its_deadline() {
        let begin = Instant::now();
        let error = run(&Place::default(), "sleep", &["60"], Duration::from_millis(50)).unwrap_err();
        assert!(format!("{error:#}").contains("did not end within 50ms"), "{error:#}");
        assert!(begin.elapsed() < crate::lab::DEADLINE);
    }

    #[test]
    fn mounts_of_the_machine_itself_are_never_hidden() {
        let place = Place { hidden: &[Path::new("/nowhere")], ..Place::default() };
        run(&place, "true", &[], crate::lab::DEADLINE).unwrap_err();
    }
}
