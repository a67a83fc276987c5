//! The pause process: keeps a node's mount namespace alive.

use std::io::{Read as _, Write as _};

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};

/// Makes the mounts a node has for itself, says `ready`, and waits for the end of standard input.
pub(super) fn run() -> Result<()> {
    let none: Option<&str> = None;
    // The lab has put this process into a new mount namespace; nothing mounted here may reach the machine's own.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("could not make all mounts private")?;
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .context("could not mount a bpffs on /sys/fs/bpf")?;
    mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
        .context("could not mount a tmpfs on /run")?;
    std::io::stdout().write_all(b"ready\n").context("could not tell the lab that the mounts are there")?;
    let mut nothing = [0_u8; 64];
    while matches!(std::io::stdin().read(&mut nothing), Ok(1..)) {}
    Ok(())
}
