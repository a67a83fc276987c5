//! The keeper: outlives the lab's owner and removes what the lab made.

use std::io::{Read as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigHandler, Signal, signal};

use crate::lab::remains;

/// Waits for the end of standard input, then removes the lab.
pub(super) fn run(cgroup: &Path, directory: &Path) -> Result<()> {
    // A Ctrl-C goes to the whole foreground process group; the keeper has work to do after it.
    nix::unistd::setsid().context("could not leave the owner's session")?;
    for ignored in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGPIPE] {
        // SAFETY: SIG_IGN installs no handler, so no code runs in a signal's context.
        unsafe { signal(ignored, SigHandler::SigIgn) }.with_context(|| format!("could not ignore {ignored}"))?;
    }
    std::io::stdout().write_all(b"ready\n").context("could not tell the owner that the keeper is there")?;
    let mut nothing = [0_u8; 64];
    // The owner never writes: bytes are as meaningless as a read error, and both must not stop the removal.
    while matches!(std::io::stdin().read(&mut nothing), Ok(1..)) {}
    remains::remove(cgroup, directory)
}
