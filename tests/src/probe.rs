//! What runs inside the lab's namespaces: the `lab-probe` program.

mod client;
mod crowd;
mod keep;
mod load;
pub mod message;
mod pause;
mod proxy;
mod rate;
mod serve;
mod shell;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "lab-probe", about = "Runs inside the pods and nodes of the EdgeMesh lab; the lab starts it")]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Removes a lab when standard input ends, however its owner ended.
    Keep {
        /// The lab's cgroup.
        #[arg(long)]
        cgroup: PathBuf,
        /// The lab's temporary directory.
        #[arg(long)]
        directory: PathBuf,
    },
    /// Holds a node's mount namespace, with a bpffs and a /run of its own, until standard input ends.
    Pause,
    /// Answers requests, one JSON object a line, until standard input ends.
    Shell,
}

/// Runs the `lab-probe` program with the arguments of this process.
pub fn main() -> ExitCode {
    let outcome = match Arguments::parse().role {
        Role::Keep { cgroup, directory } => keep::run(&cgroup, &directory),
        Role::Pause => pause::run(),
        Role::Shell => shell::run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may be left to read it, which is no reason to fail differently.
            let _ = writeln!(std::io::stderr(), "lab-probe: {error:#}");
            ExitCode::FAILURE
        }
    }
}
