//! A program of the control plane, running on its node.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::lab::{Node, SharedChild, locked, place};

/// How many of its last lines an error shows.
const TAIL: usize = 15;

/// A started program; it ends with the lab, or when it is killed.
#[derive(Debug)]
pub(super) struct Process {
    name: &'static str,
    child: SharedChild,
    log: PathBuf,
}

impl Process {
    /// Starts `command` on a node; what it says goes to the log `NODE.NAME.log`.
    pub(super) fn start(mut command: Command, node: &Node, name: &'static str) -> Result<Self> {
        let (log, file) = node.lab().log_file(&format!("{}.{name}.log", node.name()))?;
        let copy = file.try_clone().context("could not duplicate a log's descriptor")?;
        command.env_clear().current_dir("/").stdin(Stdio::null()).stdout(file).stderr(copy);
        place::enter(&mut command, &node.place())?;
        let child = command.spawn().with_context(|| format!("could not start {name}"))?;
        Ok(Self { name, child: node.lab().adopt(child), log })
    }

    /// Fails with the end of its log once it has ended.
    pub(super) fn ensure_running(&self) -> Result<()> {
        let Some(status) = place::wait(&mut locked(&self.child), Duration::ZERO)? else { return Ok(()) };
        let log = std::fs::read(&self.log).with_context(|| format!("could not read {}", self.log.display()))?;
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(TAIL)..).unwrap_or_default();
        bail!("{} ended with {status}; its log ends with:\n{}", self.name, tail.join("\n"))
    }

    /// Kills it (SIGKILL) and waits until it is gone.
    pub(super) fn kill(&self) -> Result<()> {
        let mut child = locked(&self.child);
        child.kill().and_then(|()| child.wait()).with_context(|| format!("could not kill {}", self.name))?;
        Ok(())
    }
}
