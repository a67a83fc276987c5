//! The lab's end of a probe shell.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};

use super::place::{self, Place};
use super::{Inner, binary, locked};
use crate::probe::message::{Answer, Call, Failure, Request, Response};

/// A shell bounds what it does itself; this long after that bound it must have said so, on a busy machine too.
const GRACE: Duration = Duration::from_secs(10);

/// A running probe shell.
#[derive(Debug)]
pub(super) struct Shell {
    /// Where it runs, for errors: `pod web on edge1`.
    place: String,
    pid: u32,
    stdin: Mutex<ChildStdin>,
    next: AtomicU64,
    waiting: Arc<Mutex<Waiting>>,
}

/// Who waits for which answer; `None` once no more will come.
type Waiting = Option<HashMap<u64, Sender<Result<Response, Failure>>>>;

impl Shell {
    /// Starts a shell that runs in `place`, called `what`, and writes complaints to the log `log`.
    ///
    /// `hostname` is what its environment has as HOSTNAME, as a container's has its pod's name.
    pub(super) fn start(lab: &Inner, place: &Place<'_>, hostname: &str, what: &str, log: &str) -> Result<Arc<Self>> {
        let mut command = Command::new(binary("EDGEMESH_LAB_PROBE", "lab-probe")?);
        let (_, log) = lab.log_file(&format!("{log}.log"))?;
        command.arg("shell").env("HOSTNAME", hostname).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        place::enter(&mut command, place)?;
        let mut child = command.spawn().with_context(|| format!("could not start the probe shell of {what}"))?;
        let pid = child.id();
        let stdin = child.stdin.take();
        let stdout = child.stdout.take();
        lab.adopt(child);
        let waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        let reader = Arc::clone(&waiting);
        let stdout = stdout.context("a probe shell has no output")?;
        // Ends with the shell, which ends with the lab.
        std::thread::spawn(move || deliver(stdout, &reader));
        let shell = Arc::new(Self {
            place: what.to_owned(),
            pid,
            stdin: Mutex::new(stdin.context("a probe shell has no input")?),
            next: AtomicU64::new(1),
            waiting,
        });
        // A shell ends with its input; the lab keeps that open when no handle does.
        locked(&lab.shells).push(Arc::clone(&shell));
        Ok(shell)
    }

    /// Has the shell work on `request`, which it should finish within `bound`.
    pub(super) fn call(&self, request: Request, bound: Duration) -> Result<Response> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut line = serde_json::to_vec(&Call { id, request }).context("could not write a request as JSON")?;
        line.push(b'\n');
        let answer = self.expect(id)?;
        let sent = locked(&self.stdin).write_all(&line);
        sent.with_context(|| format!("{}: the probe shell is gone", self.place))?;
        match answer.recv_timeout(bound.saturating_add(GRACE)) {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(failure)) => Err(anyhow::Error::new(failure).context(self.place.clone())),
            Err(RecvTimeoutError::Timeout) => Err(anyhow!("{}: no answer of the probe shell", self.place)),
            Err(RecvTimeoutError::Disconnected) => Err(anyhow!("{}: the probe shell ended", self.place)),
        }
    }

    /// The shell's process.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    fn expect(&self, id: u64) -> Result<Receiver<Result<Response, Failure>>> {
        let (sender, receiver) = channel();
        let mut waiting = locked(&self.waiting);
        waiting.as_mut().with_context(|| format!("{}: the probe shell has ended", self.place))?.insert(id, sender);
        Ok(receiver)
    }
}

/// Passes answers on until the shell ends; then everyone who waits is told so by their channel's end.
fn deliver(stdout: ChildStdout, waiting: &Mutex<Waiting>) {
    for line in BufReader::new(stdout).lines() {
        let Some(answer) = line.ok().and_then(|line| serde_json::from_str::<Answer>(&line).ok()) else { break };
        let receiver = locked(waiting).as_mut().and_then(|waiting| waiting.remove(&answer.id));
        if let Some(receiver) = receiver {
            // Nobody waits any more after a time-out.
            let _ = receiver.send(answer.outcome);
        }
    }
    *locked(waiting) = None;
}
