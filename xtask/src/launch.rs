//! Builds a program that works in the lab and hands this process over to it.

use std::{
    ffi::OsString,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::Context as _;
use nix::unistd::Uid;

use crate::{
    artifacts::{AGENT, Artifacts, PROBE},
    build_ebpf,
    console::Console,
    setup,
    workspace::Workspace,
};

/// Builds `program` with the agent and the probe and becomes it. `profile` is cargo's arguments for the build, `variables` what
/// its environment has besides.
///
/// # Errors
///
/// When the user is not root, or the program could not be built or started; it does not return otherwise.
pub(crate) fn launch(
    program: &str,
    profile: &[&str],
    arguments: impl IntoIterator<Item = OsString>,
    variables: &[(&str, PathBuf)],
    workspace: &Workspace,
    console: &Console,
) -> anyhow::Result<ExitCode> {
    // Better now than after minutes of building.
    anyhow::ensure!(Uid::effective().is_root(), "the lab makes network namespaces and loads eBPF: run this as root");
    let toolchain = console.step("[1/3] setup", || {
        setup::lab_tools(console)?;
        setup::toolchain(workspace, console)
    })?;
    console.step("[2/3] build-ebpf", || build_ebpf::build(&toolchain, workspace, console))?;
    let artifacts = console.step("[3/3] build", || {
        let mut cargo = profile.to_vec();
        cargo.extend(["--bin", AGENT, "--bin", PROBE, "--bin", program]);
        Artifacts::build(&cargo, workspace, console)
    })?;
    let mut command = Command::new(artifacts.program(program)?);
    artifacts.equip(&mut command)?;
    command.args(arguments).envs(variables.iter().map(|(name, value)| (name, value))).current_dir(&workspace.root);
    // Taking this process over makes signals and the exit code the program's own.
    Err(command.exec()).with_context(|| format!("start {program}"))
}
