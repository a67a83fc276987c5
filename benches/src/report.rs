//! What was measured, for the terminal and for docs/benchmarks.md.

use std::{
    fmt::Write as _,
    fs,
    io::{self, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result};

use crate::spread::Spread;

/// How docs/benchmarks.md begins, before machine and date.
const INTRODUCTION: &str = "\
# Benchmarks

This page is written by

```sh
cargo xtask bench --write
```

which builds everything in release mode, raises the lab (network namespaces on one machine, real agents, real sockets) and
measures. What is compared takes turns within one run. A figure is the median over repetitions; its spread stands beside
it. Differences and ratios are taken within each repetition. Connections are closed by a reset, so that no port waits in
TIME_WAIT.
";

/// One table, with what to know to read it.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    pub(crate) title: &'static str,
    /// What was done.
    pub(crate) method: String,
    pub(crate) head: Vec<&'static str>,
    pub(crate) rows: Vec<Vec<String>>,
    /// What follows from the rows, a line each.
    pub(crate) findings: Vec<String>,
}

impl Table {
    /// The table as Markdown, aligned so that it can be read as it is.
    pub(crate) fn markdown(&self) -> String {
        let mut widths: Vec<usize> = self.head.iter().map(|cell| cell.chars().count()).collect();
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut line = String::from("|");
            for (cell, width) in cells.zip(&widths) {
                // Writing to a String cannot fail.
                let _ = write!(line, " {cell:<width$} |");
            }
            line + "\n"
        };
        let rules: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
        let mut text = format!("## {}\n\n{}\n\n", self.title, self.method);
        text += &line(&mut self.head.iter().copied());
        text += &line(&mut rules.iter().map(String::as_str));
        for row in &self.rows {
            text += &line(&mut row.iter().map(String::as_str));
        }
        if !self.findings.is_empty() {
            text.push('\n');
        }
        for finding in &self.findings {
            let _ = writeln!(text, "- {finding}");
        }
        text
    }
}

/// All tables of a run, and where it ran.
#[derive(Debug)]
pub(crate) struct Report {
    machine: String,
    pub(crate) tables: Vec<Table>,
}

impl Report {
    /// Notes the machine and the time.
    ///
    /// # Errors
    ///
    /// When /proc cannot be read.
    pub(crate) fn begin() -> Result<Self> {
        let machine = machine()?;
        say(&machine);
        Ok(Self { machine, tables: Vec::new() })
    }

    /// Writes the report as a Markdown document.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let mut text = format!("{INTRODUCTION}\n{}\n", self.machine);
        for table in &self.tables {
            let _ = write!(text, "\n{}", table.markdown());
        }
        let directory = path.parent().unwrap_or_else(|| Path::new("."));
        fs::create_dir_all(directory)
            .and_then(|()| fs::write(path, text))
            .with_context(|| format!("could not write {}", path.display()))
    }
}

/// `12.34 µs`; what takes milliseconds is told in those.
pub(crate) fn micros(value: f64) -> String {
    if value.abs() >= 10_000.0 { millis(value / 1000.0) } else { format!("{value:.2} µs") }
}

/// `12.3 ms`
pub(crate) fn millis(value: f64) -> String {
    format!("{value:.1} ms")
}

/// The middle half of the repetitions: `1.20 … 1.40 µs`.
pub(crate) fn middle_half(spread: &Spread, unit: fn(f64) -> String) -> String {
    format!("{} … {}", unit(spread.lower_quartile), unit(spread.upper_quartile))
}

/// All repetitions: `1.20 … 1.40 µs`.
pub(crate) fn whole(spread: &Spread, unit: fn(f64) -> String) -> String {
    format!("{} … {}", unit(spread.min), unit(spread.max))
}

/// Whether a figure is where it should be, as a finding: `NAME: FIGURE; aim: at most AIM: met`.
pub(crate) fn verdict(what: &str, figure: f64, aim: f64, unit: fn(f64) -> String) -> String {
    let met = if figure <= aim { "met" } else { "**missed**" };
    format!("{what}: {}; aim at most {}: {met}", unit(figure), unit(aim))
}

/// [`verdict`] of a figure that is the better the higher it is.
pub(crate) fn at_least(what: &str, figure: f64, aim: f64, unit: fn(f64) -> String) -> String {
    let met = if figure >= aim { "met" } else { "**missed**" };
    format!("{what}: {}; aim at least {}: {met}", unit(figure), unit(aim))
}

/// Tells whoever watches.
pub(crate) fn say(text: &str) {
    // A closed terminal is no reason to stop measuring.
    let _ = writeln!(io::stdout().lock(), "{text}");
}

/// The date and the machine, in one paragraph.
fn machine() -> Result<String> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("could not read {path}"));
    let (cpuinfo, kernel, load) = (read("/proc/cpuinfo")?, read("/proc/sys/kernel/osrelease")?, read("/proc/loadavg")?);
    let cpus = std::thread::available_parallelism().context("could not count the processors")?;
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or_else(String::new, |(_, model)| format!(" ({model})"));
    let load = load.split(' ').next().unwrap_or_default();
    let date = jiff::Timestamp::now().strftime("%Y-%m-%d");
    Ok(format!("Measured on {date}: {cpus} CPUs{model}, Linux {}, load average {load} before the run.", kernel.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_markdown_with_its_findings_below() {
        let table = Table {
            title: "Speed",
            method: "We ran.".to_owned(),
            head: vec!["path", "µs"],
            rows: vec![vec!["direct".to_owned(), "1.5".to_owned()], vec!["µ".to_owned(), "22.75".to_owned()]],
            findings: vec!["fast".to_owned()],
        };
        let expected = "\
## Speed

We ran.

| path   | µs    |
| ------ | ----- |
| direct | 1.5   |
| µ      | 22.75 |

- fast
";
        assert_eq!(table.markdown(), expected);
    }

    #[test]
    fn a_verdict_compares_with_the_aim() {
        assert_eq!(verdict("added", 0.5, 1.0, micros), "added: 0.50 µs; aim at most 1.00 µs: met");
        assert_eq!(verdict("added", 12_345.6, 1.0, micros), "added: 12.3 ms; aim at most 1.00 µs: **missed**");
        assert_eq!(at_least("rate", 2.0, 1.0, micros), "rate: 2.00 µs; aim at least 1.00 µs: met");
        assert_eq!(at_least("rate", 0.5, 1.0, micros), "rate: 0.50 µs; aim at least 1.00 µs: **missed**");
    }

    #[test]
    fn a_report_is_written_with_the_machine_and_every_table() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("docs/benchmarks.md");
        let mut report = Report::begin().unwrap();
        report.tables.push(Table {
            title: "T",
            method: "m".to_owned(),
            head: vec!["h"],
            rows: vec![vec!["v".to_owned()]],
            findings: vec![],
        });
        report.write(&path).unwrap();
        let text = fs::read_to_string(path).unwrap();
        assert!(text.starts_with("# Benchmarks\n") && text.contains("CPUs") && text.contains("## T\n"), "{text}");
    }
}
