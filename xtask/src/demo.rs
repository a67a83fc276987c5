//! `cargo xtask demo`: raises a small mesh on this machine and shows that it works.

use std::{ffi::OsString, process::ExitCode};

use crate::{console::Console, launch::launch, workspace::Workspace};

/// Raises a small mesh on this machine and shows that it works
///
/// Two nodes in network namespaces, with real agents and the Services of manifests/examples; real clients in pods use
/// them, and a table says what worked and how fast. Exits non-zero if anything did not.
///
/// Needs root. Installs what is missing first (see `cargo xtask setup`).
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave the lab up at the end, and print how to look around in it.
    #[arg(long)]
    keep: bool,
    /// More arguments for the demo itself.
    #[arg(last = true, value_name = "ARGS")]
    rest: Vec<OsString>,
}

/// Runs the command; does not return when the demo itself could be started.
///
/// # Errors
///
/// When the demo could not be built or started.
pub(crate) fn run(args: Args, workspace: &Workspace, console: &Console) -> anyhow::Result<ExitCode> {
    let keep = args.keep.then(|| OsString::from("--keep"));
    // The build for developers shares every dependency with the tests.
    launch("edgemesh-demo", &["--examples"], keep.into_iter().chain(args.rest), &[], workspace, console)
}
