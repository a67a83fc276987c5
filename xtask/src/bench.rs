//! `cargo xtask bench`: runs the benchmarks.

use std::{ffi::OsString, process::ExitCode};

use crate::{console::Console, kube, launch::launch, setup, workspace::Workspace};

/// Runs the benchmarks
///
/// They measure the data plane in the lab, with everything built in release mode. Needs root, and a machine that is
/// otherwise idle.
///
/// Arguments go to the benchmarks; `cargo xtask bench -- --help` lists them.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Arguments for the benchmarks.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    rest: Vec<OsString>,
}

/// Runs the command; does not return when the benchmarks could be started.
///
/// # Errors
///
/// When the benchmarks could not be built or started.
pub(crate) fn run(args: Args, workspace: &Workspace, console: &Console) -> anyhow::Result<ExitCode> {
    setup::comparison_tools(console);
    // What is measured has the features of a release, not those of tests, so no `--examples` here.
    let kubernetes: Vec<_> = kube::find(workspace)?.into_iter().map(|directory| (kube::VARIABLE, directory)).collect();
    if kubernetes.is_empty() {
        console.line("no figure with a Kubernetes API server: `cargo xtask e2e --prepare` builds one");
    }
    launch("edgemesh-benches", &["--release"], args.rest, &kubernetes, workspace, console)
}
