//! `cargo xtask demo`: raises a small mesh on this machine and shows that it works.

use std::{ffi::OsString, process::ExitCode};

use crate::{console::Console, launch::launch, workspace::Workspace};

/// Raises a small mesh on this machine and shows that it works
///
/// Nodes in network namespaces, with real agents and the Services of manifests/examples: two on one LAN, then two in sites
/// behind NATs of their own, and a cloud. Real clients in pods use them, and tables say what worked, which way it went
/// and how fast. Exits non-zero if anything did not.
///
/// Needs root. Installs what is missing first (see `cargo xtask setup`).
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave the labs up at the end, and print how to look around in them.
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
