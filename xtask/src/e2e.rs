//! `cargo xtask e2e`: runs the end-to-end tests alone.

use std::process::ExitCode;

use crate::{console::Console, kube, test, workspace::Workspace};

/// Runs the end-to-end tests, those against a real Kubernetes API server included
///
/// etcd, kube-apiserver and kubectl are taken from $KUBEBUILDER_ASSETS (envtest's variable), else from the cache
/// (~/.cache/edgemesh), where they are built once from Debian's packages: about 5 minutes on two cores.
///
/// Needs root. Installs what is missing first (see `cargo xtask setup`).
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only tests whose names contain it.
    name: Option<String>,
    /// Only find or build etcd, kube-apiserver and kubectl, and say where they are.
    #[arg(long, conflicts_with = "name")]
    prepare: bool,
}

/// Runs the command.
///
/// # Errors
///
/// With `--prepare`, what is missing and what to do; none of a test: those are counted and told.
pub(crate) fn run(args: &Args, workspace: &Workspace, console: &Console) -> anyhow::Result<ExitCode> {
    if args.prepare {
        let directory = kube::find_or_build(workspace, console)?;
        console.line(&format!("{}={}", kube::VARIABLE, directory.display()));
        return Ok(ExitCode::SUCCESS);
    }
    test::end_to_end(args.name.as_deref(), workspace, console)
}
