//! Progress on the terminal: one line per step, completed when the step ends.

use std::{
    cell::{Cell, RefCell},
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

/// Standard output, and whether a step's line is waiting for its end.
#[derive(Debug)]
pub(crate) struct Console {
    open: Cell<bool>,
    step: RefCell<String>,
    terminal: bool,
}

impl Console {
    pub(crate) fn new() -> Self {
        Self { open: Cell::new(false), step: RefCell::new(String::new()), terminal: io::stdout().is_terminal() }
    }

    /// Whether a person is likely to be watching.
    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Writes `name ... ` and leaves the line open; [`Self::end`] completes it.
    pub(crate) fn begin(&self, name: &str) {
        self.break_line();
        print!("{name} ... ");
        flush();
        self.step.replace(name.to_owned());
        self.open.set(true);
    }

    /// Completes the line of [`Self::begin`], repeating the name if something was written in between.
    pub(crate) fn end(&self, result: &str) {
        if self.open.replace(false) {
            println!("{result}");
        } else {
            println!("{} ... {result}", self.step.borrow());
        }
    }

    /// Writes a line of its own.
    pub(crate) fn line(&self, text: &str) {
        self.break_line();
        println!("{text}");
    }

    /// Passes on what a command wrote.
    pub(crate) fn raw(&self, bytes: &[u8]) {
        self.break_line();
        // A closed terminal must not end the work: the exit code still counts.
        let _ignored = io::stdout().write_all(bytes);
        flush();
    }

    /// Ends an open line, so that what follows starts at the margin.
    pub(crate) fn break_line(&self) {
        if self.open.replace(false) {
            println!();
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

fn flush() {
    let _ignored = io::stdout().flush();
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
