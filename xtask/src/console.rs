//! Progress on the terminal: one line per step, completed when the step ends.

use std::{
    cell::{Cell, RefCell},
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

/// Standard output, and what stands on its last line.
#[derive(Debug)]
pub(crate) struct Console {
    line: Cell<Line>,
    step: RefCell<String>,
    terminal: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Line {
    Empty,
    /// The name of a step that is waiting for its end.
    Step,
    /// Something else.
    Text,
}

impl Console {
    pub(crate) fn new() -> Self {
        Self { line: Cell::new(Line::Empty), step: RefCell::default(), terminal: io::stdout().is_terminal() }
    }

    /// Whether a person is likely to be watching.
    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Writes `name ... ` and leaves the line open; [`Self::end`] completes it.
    pub(crate) fn begin(&self, name: &str) {
        self.break_line();
        write(format!("{name} ... ").as_bytes());
        self.step.replace(name.to_owned());
        self.line.set(Line::Step);
    }

    /// Completes the line of [`Self::begin`], repeating the name if something was written in between.
    pub(crate) fn end(&self, result: &str) {
        if self.line.get() == Line::Step {
            write(format!("{result}\n").as_bytes());
            self.line.set(Line::Empty);
        } else {
            self.line(&format!("{} ... {result}", self.step.borrow()));
        }
    }

    /// Writes a line of its own.
    pub(crate) fn line(&self, text: &str) {
        self.break_line();
        write(format!("{text}\n").as_bytes());
    }

    /// Passes on what a command wrote, or a piece of it.
    pub(crate) fn raw(&self, bytes: &[u8]) {
        if self.line.get() == Line::Step {
            self.break_line();
        }
        write(bytes);
        if let Some(last) = bytes.last() {
            self.line.set(if *last == b'\n' { Line::Empty } else { Line::Text });
        }
    }

    /// Ends a line that something stands on, so that what follows starts at the margin.
    pub(crate) fn break_line(&self) {
        if self.line.replace(Line::Empty) != Line::Empty {
            write(b"\n");
        }
    }

    /// Runs `work` as a step with its own line, which ends in the time taken.
    ///
    /// # Errors
    ///
    /// What `work` returns.
    pub(crate) fn step<T>(&self, name: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        self.begin(name);
        let started = Instant::now();
        let result = work();
        let took = seconds(started.elapsed());
        match &result {
            Ok(_) => self.end(&format!("ok ({took})")),
            Err(_) => self.end(&format!("FAILED ({took})")),
        }
        result
    }
}

/// `0.4 s`, `12.0 s`, `2 min 05 s`.
pub(crate) fn seconds(time: Duration) -> String {
    match time.as_secs() {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        whole => format!("{} min {:02} s", whole / 60, whole % 60),
    }
}

/// A closed terminal must not end the work: the exit code still counts.
fn write(bytes: &[u8]) {
    let mut stdout = io::stdout().lock();
    let _ignored = stdout.write_all(bytes).and_then(|()| stdout.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_well_at_every_size() {
        assert_eq!(seconds(Duration::from_millis(440)), "0.4 s");
        assert_eq!(seconds(Duration::from_secs(59)), "59.0 s");
        assert_eq!(seconds(Duration::from_secs(125)), "2 min 05 s");
    }
}
