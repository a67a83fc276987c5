//! `cargo xtask`: the commands a developer or a CI job runs in this repository.
//!
//! One file per command. Nothing beyond a stable Rust, git and a C compiler has to be on the machine before; `setup`
//! finds or installs the rest.

#![expect(clippy::print_stderr, reason = "a command-line tool says on standard error why it failed")]

mod artifacts;
mod bench;
mod build_ebpf;
mod console;
mod demo;
mod e2e;
mod kube;
mod launch;
mod process;
mod setup;
mod table;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use console::Console;
use workspace::Workspace;

/// Builds, demonstrates, tests and measures EdgeMesh.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Setup(setup::Args),
    BuildEbpf(build_ebpf::Args),
    Test(test::Args),
    E2e(e2e::Args),
    Demo(demo::Args),
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let console = Console::new();
    let done = Workspace::find().and_then(|workspace| match cli.command {
        Command::Setup(args) => setup::run(&args, &workspace, &console),
        Command::BuildEbpf(args) => build_ebpf::run(&args, &workspace, &console),
        Command::Test(args) => test::run(&args, &workspace, &console),
        Command::E2e(args) => e2e::run(&args, &workspace, &console),
        Command::Demo(args) => demo::run(args, &workspace, &console),
        Command::Bench(args) => bench::run(args, &workspace, &console),
    });
    match done {
        Ok(code) => code,
        Err(error) => {
            console.break_line();
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
