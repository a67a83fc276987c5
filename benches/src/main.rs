//! The benchmarks of the data plane, run in the lab by `cargo xtask bench`.
//!
//! Each figure is of one run: what is compared takes turns within it, so that a busy machine disturbs all alike, and
//! every number is a median over repetitions with its spread beside it.

mod api;
mod change;
mod connect;
mod dns;
mod generated;
mod iptables;
mod load;
mod memory;
mod mesh;
mod offline;
mod report;
mod scene;
mod spread;

use std::{
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Result;
use clap::{Parser, ValueEnum};

use report::{Report, Table, say};

/// Where `--write` puts the report, from the root of the repository.
const DOCUMENT: &str = "docs/benchmarks.md";

#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", about = "Measures the data plane and the agent in the lab; needs root")]
struct Cli {
    /// Few repetitions: shows in under a minute that every benchmark works; the figures are rough
    #[arg(long)]
    quick: bool,
    /// Only this figure; may be repeated
    #[arg(long, value_name = "NAME")]
    only: Vec<Figure>,
    /// Also write the report to docs/benchmarks.md
    #[arg(long, conflicts_with_all = ["quick", "only"])]
    write: bool,
}

/// What there is to measure.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Figure {
    /// What a connection through a ClusterIP costs, beside a direct one, iptables and a userspace proxy
    Connect,
    /// How soon new connections follow a changed endpoint
    Change,
    /// The agent's memory at 1,000 Services with 5,000 endpoints
    Memory,
    /// From start to ready, one change and memory at 10,000 Services with 100,000 endpoints
    Load,
    /// From start to the first connection with neither an API server nor anything in the kernel
    Offline,
    /// What the tunnel carries and costs, beside a plain pair of TLS proxies, directly and over a relay
    Mesh,
    /// Queries a second and how soon, for names of 10,000 Services, by dnsperf
    Dns,
    /// The same as `load` from a real Kubernetes API server; left out where KUBEBUILDER_ASSETS names none
    Api,
}

/// How much time to spend.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Effort {
    /// Enough to see that it works.
    Quick,
    /// Enough for a figure.
    Full,
}

impl Effort {
    pub(crate) fn pick<T>(self, quick: T, full: T) -> T {
        match self {
            Self::Quick => quick,
            Self::Full => full,
        }
    }
}

impl Figure {
    fn measure(self, effort: Effort) -> Result<Vec<Table>> {
        match self {
            Self::Connect => connect::measure(effort),
            Self::Change => change::measure(effort),
            Self::Memory => memory::measure(effort),
            Self::Load => load::measure(effort),
            Self::Offline => offline::measure(effort),
            Self::Mesh => mesh::measure(effort),
            Self::Dns => dns::measure(effort),
            Self::Api => api::measure(effort),
        }
    }
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let effort = if cli.quick { Effort::Quick } else { Effort::Full };
    // Before the benchmarks load the machine themselves.
    let mut report = Report::begin()?;
    let begin = Instant::now();
    for figure in Figure::value_variants() {
        if cli.only.is_empty() || cli.only.contains(figure) {
            let tables = figure.measure(effort)?;
            for table in &tables {
                say(&format!("\n{}", table.markdown()));
            }
            report.tables.extend(tables);
        }
    }
    say(&format!("measured in {:?}", Duration::from_secs(begin.elapsed().as_secs())));
    if cli.write {
        report.write(Path::new(DOCUMENT))?;
        say(&format!("written to {DOCUMENT}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn only_a_full_run_of_everything_can_be_written() {
        let parse = |arguments: &[&str]| Cli::try_parse_from(["bench"].iter().chain(arguments));
        assert!(parse(&["--write"]).is_ok_and(|cli| cli.write));
        assert!(parse(&["--write", "--quick"]).is_err());
        assert!(parse(&["--write", "--only", "memory"]).is_err());
        assert_eq!(
            parse(&["--only", "load", "--only", "change"]).map(|cli| cli.only).ok(),
            Some(vec![Figure::Load, Figure::Change])
        );
    }
}
