//! Runs commands: bounded in time, quiet while they are short, live once they take long.

use std::{
    env,
    io::{self, Read},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};

use crate::console::{Console, seconds};

/// A command that takes longer shows its output as it comes.
const LIVE_AFTER: Duration = Duration::from_secs(10);
/// How long a command that is told to end has to clean up.
const GRACE: Duration = Duration::from_secs(15);
/// How often to look at the clock and the child while nothing is written.
const TICK: Duration = Duration::from_millis(200);
/// How long output is awaited from an ended child: something it left behind may hold the pipe open for ever.
const LEFT_OPEN: Duration = Duration::from_secs(2);

/// What to do with a command's standard output; standard error is always part of [`Ended::output`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Stdout {
    /// It is for people, as standard error is.
    Shown,
    /// It is for the caller, in [`Ended::stdout`].
    Kept,
}

/// How a command ended and what it wrote.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Nothing when it had to be killed for taking too long.
    pub(crate) status: Option<ExitStatus>,
    /// What is for people.
    pub(crate) output: String,
    /// What is for the caller; empty with [`Stdout::Shown`].
    pub(crate) stdout: String,
    /// Whether `output` was on the terminal already.
    pub(crate) shown: bool,
    limit: Duration,
}

impl Ended {
    pub(crate) fn success(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// `exit status: 101`, `signal: 9 (SIGKILL)` or `did not end within 2 min 00 s`.
    pub(crate) fn describe(&self) -> String {
        match self.status {
            Some(status) => status.to_string(),
            None => format!("did not end within {}", seconds(self.limit)),
        }
    }

    /// Shows the output, if it was not shown live, when the command failed.
    ///
    /// # Errors
    ///
    /// When the command failed: `what` and how it ended.
    pub(crate) fn check(self, console: &Console, what: &str) -> anyhow::Result<Self> {
        if self.success() {
            return Ok(self);
        }
        if !self.shown {
            console.raw(self.output.as_bytes());
        }
        anyhow::bail!("{what}: {}", self.describe())
    }
}

/// Runs `command` without input, for at most `limit`.
///
/// # Errors
///
/// When it cannot be started; a command that fails is an [`Ended`].
pub(crate) fn run(console: &Console, mut command: Command, limit: Duration, stdout: Stdout) -> anyhow::Result<Ended> {
    let started = Instant::now();
    let (reader, writer) = io::pipe().context("make a pipe")?;
    command.stdin(Stdio::null()).stderr(writer.try_clone().context("copy a pipe")?);
    match stdout {
        Stdout::Shown => command.stdout(writer),
        Stdout::Kept => {
            drop(writer);
            command.stdout(Stdio::piped())
        }
    };
    // What writes into a pipe looks uncoloured to cargo, although a terminal is behind it.
    if console.is_terminal() && env::var_os("CARGO_TERM_COLOR").is_none() && env::var_os("NO_COLOR").is_none() {
        command.env("CARGO_TERM_COLOR", "always");
    }
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().with_context(|| format!("start {name}"))?;
    // The command owns the rest of the write ends of the pipe, which must close for the output to end.
    drop(command);

    let (sender, chunks) = mpsc::channel();
    if let Some(kept) = child.stdout.take() {
        let sender = sender.clone();
        thread::spawn(move || pass_on(kept, |bytes| sender.send((Stdout::Kept, bytes)).is_ok()));
    }
    thread::spawn(move || pass_on(reader, |bytes| sender.send((Stdout::Shown, bytes)).is_ok()));

    let (mut output, mut kept) = (Vec::new(), Vec::new());
    let mut shown = false;
    let mut status = None;
    let mut ended_at = None;
    loop {
        match chunks.recv_timeout(TICK) {
            Ok((Stdout::Kept, bytes)) => kept.extend(bytes),
            Ok((Stdout::Shown, bytes)) => {
                if shown {
                    console.raw(&bytes);
                }
                output.extend(bytes);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if !shown && started.elapsed() >= LIVE_AFTER && !output.is_empty() {
            shown = true;
            console.raw(&output);
        }
        if started.elapsed() >= limit {
            break;
        }
        if status.is_none() {
            status = child.try_wait().with_context(|| format!("wait for {name}"))?;
            ended_at = status.map(|_| Instant::now());
        }
        if ended_at.is_some_and(|at| at.elapsed() >= LEFT_OPEN) {
            break;
        }
    }
    if status.is_none() {
        status = wait_until(&mut child, started + limit).with_context(|| format!("wait for {name}"))?;
    }
    if status.is_none() {
        terminate(&mut child)?;
    }
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Ended { status, output: text(output), stdout: text(kept), shown, limit })
}

/// Runs a short question to a tool and returns what it writes to standard output.
///
/// # Errors
///
/// One line saying why there is no answer.
pub(crate) fn ask(mut command: Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("cannot run {name}: {error}"))?;
    let deadline = Instant::now() + Duration::from_secs(20);
    // An answer is far shorter than a pipe holds, so it can be read after the end.
    let status = match wait_until(&mut child, deadline) {
        Ok(Some(status)) => status,
        Ok(None) => {
            let _gone = child.kill();
            let _reaped = child.wait();
            return Err(format!("{name} did not answer within 20 s"));
        }
        Err(error) => return Err(format!("wait for {name}: {error}")),
    };
    let read = |pipe: Option<&mut dyn Read>| {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            let _partial = pipe.take(1 << 20).read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let stdout = read(child.stdout.as_mut().map(|pipe| pipe as &mut dyn Read));
    let stderr = read(child.stderr.as_mut().map(|pipe| pipe as &mut dyn Read));
    if status.success() {
        Ok(stdout)
    } else {
        let line = stderr.lines().find(|line| !line.trim().is_empty()).unwrap_or("no message");
        Err(format!("{status}: {}", line.trim()))
    }
}

fn wait_until(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Asks the child to end, so that a test can take its lab down, then insists.
fn terminate(child: &mut Child) -> anyhow::Result<()> {
    if let Ok(pid) = i32::try_from(child.id()) {
        // It may just have ended by itself.
        let _gone = signal::kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if wait_until(child, Instant::now() + GRACE).context("wait for a command that was told to end")?.is_none() {
        child.kill().context("kill a command that took too long")?;
        child.wait().context("wait for a killed command")?;
    }
    Ok(())
}

fn pass_on(mut from: impl Read, mut to: impl FnMut(Vec<u8>) -> bool) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => {
                if !to(buffer[..n].to_vec()) {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_for_people_and_for_the_caller_is_kept_apart() {
        let console = Console::new();
        let started = Instant::now();
        let ended = run(&console, shell("echo data; echo note >&2"), Duration::from_secs(20), Stdout::Kept).unwrap();
        assert!(ended.success());
        assert_eq!((ended.stdout.as_str(), ended.output.as_str(), ended.shown), ("data\n", "note\n", false));
        assert!(started.elapsed() < LEFT_OPEN, "the end of the output was not seen");
    }

    #[test]
    fn both_streams_arrive_in_order_when_both_are_for_people() {
        let console = Console::new();
        let ended =
            run(&console, shell("echo a; echo b >&2; echo c; exit 3"), Duration::from_secs(20), Stdout::Shown).unwrap();
        assert_eq!(ended.output, "a\nb\nc\n");
        assert_eq!(ended.describe(), "exit status: 3");
        assert_eq!(ended.check(&console, "try").unwrap_err().to_string(), "try: exit status: 3");
    }

    #[test]
    fn a_command_that_takes_too_long_is_ended_and_keeps_what_it_wrote() {
        let console = Console::new();
        let started = Instant::now();
        let ended =
            run(&console, shell("echo begun; exec sleep 60"), Duration::from_millis(300), Stdout::Shown).unwrap();
        assert!(!ended.success());
        assert_eq!(ended.output, "begun\n");
        assert!(ended.describe().starts_with("did not end within"), "{}", ended.describe());
        assert!(started.elapsed() < GRACE);
    }

    #[test]
    fn something_left_behind_does_not_hold_up_the_end() {
        let console = Console::new();
        let started = Instant::now();
        let ended = run(&console, shell("sleep 30 & echo done"), Duration::from_secs(25), Stdout::Shown).unwrap();
        assert!(ended.success());
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_question_fails_with_the_first_line_of_its_errors() {
        assert_eq!(ask(shell("echo yes")), Ok("yes\n".to_owned()));
        assert_eq!(ask(shell("echo; echo no such thing >&2; exit 1")), Err("exit status: 1: no such thing".to_owned()));
        assert!(ask(Command::new("/nonexistent/tool")).unwrap_err().starts_with("cannot run /nonexistent/tool"));
    }
}
