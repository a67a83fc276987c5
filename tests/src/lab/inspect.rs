//! Looking at a node from outside: its network configuration and the eBPF programs on its cgroup.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::{DEADLINE, Node, place};

impl Node {
    /// Runs `ip` with these arguments in the node and returns what it printed.
    pub fn ip(&self, arguments: &[&str]) -> Result<String> {
        self.tool("ip", arguments).context("is iproute2 installed?")
    }

    /// Runs a tool of the machine with these arguments in the node and returns what it printed.
    pub fn tool(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        place::enter(&mut command, &self.place())?;
        let child = command.spawn().with_context(|| format!("could not run `{program}`"))?;
        let output = place::output(child, DEADLINE)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`{program} {}` on {} failed: {said}", arguments.join(" "), self.name());
        String::from_utf8(output.stdout).with_context(|| format!("`{program}` printed something that is no text"))
    }

    /// The ids of the programs attached to the node's cgroup itself, hook by hook.
    pub fn attached_programs(&self) -> Result<Vec<u32>> {
        let cgroup =
            File::open(self.cgroup()).with_context(|| format!("could not open {}", self.cgroup().display()))?;
        let mut all = Vec::new();
        for hook in HOOKS {
            let what = || format!("could not ask for the programs on {}", self.cgroup().display());
            all.extend(query(&cgroup, hook).with_context(what)?);
        }
        Ok(all)
    }
}

/// `enum bpf_attach_type`, include/uapi/linux/bpf.h: connect4/6, sendmsg4/6, recvmsg4/6, getpeername4/6.
const HOOKS: [u32; 8] = [10, 11, 14, 15, 19, 20, 29, 30];

/// BPF_PROG_QUERY: the programs of one hook of a cgroup, without those of its ancestors.
fn query(cgroup: &File, hook: u32) -> io::Result<Vec<u32>> {
    const BPF_PROG_QUERY: libc::c_long = 16;
    #[repr(C)]
    struct Attr {
        target_fd: RawFd,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        prog_cnt: u32,
        _pad: u32,
    }
    let mut ids = [0_u32; 64];
    let mut attr = Attr {
        target_fd: cgroup.as_raw_fd(),
        attach_type: hook,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: 64,
        _pad: 0,
    };
    // SAFETY: `attr` is the `query` part of `union bpf_attr`, as long as said; the kernel writes to it and at most
    // `prog_cnt` ids to `ids`, both of which outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut attr, size_of::<Attr>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ids.into_iter().take(attr.prog_cnt as usize).collect())
}
