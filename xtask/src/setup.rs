//! `cargo xtask setup`: finds or installs what the other commands need.

mod apt;
mod compiler;
mod lab;
mod linker;
mod plan;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use compiler::{Compiler, Refusal};
pub(crate) use compiler::{Route, TARGET};
use linker::Linker;
use plan::Plan;

use crate::{console::Console, table, workspace::Workspace};

/// What unpacks and builds Debian's source packages, each with the package that has it.
const PACKAGING: [(&str, &str); 3] = [("dpkg-source", "dpkg-dev"), ("make", "make"), ("patch", "patch")];

/// Finds or installs what the other commands need
///
/// That is a Rust compiler for the kernel's instruction set, bpf-linker, and the tools of the lab. As root on a Debian-like system, what is missing is installed with apt-get and cargo; elsewhere the command says
/// exactly what to install. It changes nothing when all is there, and may be repeated at will.
///
/// A compiler is taken from the first of: $EDGEMESH_BPF_RUSTC; any with a libcore for bpfel-unknown-none; a rustup nightly
/// with rust-src; /usr/bin/rustc with its source (Debian: rustc-web cargo-web rust-web-src). bpf-linker from: $BPF_LINKER, PATH,
/// ~/.cache/edgemesh/tools. Its LLVM must not be older than the compiler's.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave out the tools of the lab (ip, nsenter, dig, sshd and others), which only tests, demo and benchmarks need.
    #[arg(long)]
    no_lab: bool,
}

/// A compiler and a linker that build for the kernel.
#[derive(Debug)]
pub(crate) struct Toolchain {
    pub(crate) rustc: PathBuf,
    pub(crate) cargo: PathBuf,
    pub(crate) route: Route,
    pub(crate) linker: PathBuf,
    /// What was chosen, for people, a line each.
    pub(crate) summary: [String; 2],
}

/// Runs the command.
///
/// # Errors
///
/// What is missing and could not be installed, with the fix for each.
pub(crate) fn run(args: &Args, workspace: &Workspace, console: &Console) -> anyhow::Result<ExitCode> {
    let toolchain = toolchain(workspace, console)?;
    for line in &toolchain.summary {
        console.line(line);
    }
    if !args.no_lab {
        console.line(&format!("lab         {}", lab_tools(console)?));
    }
    Ok(ExitCode::SUCCESS)
}

/// Finds or installs what builds the eBPF programs.
///
/// # Errors
///
/// A table of what was tried, why it failed and the fix for each.
pub(crate) fn toolchain(workspace: &Workspace, console: &Console) -> anyhow::Result<Toolchain> {
    let mut failed = Vec::new();
    // Each round installs one thing at most; nothing is tried twice.
    loop {
        let compilers = compiler::find();
        let linkers = linker::find(&workspace.tools);
        match plan::decide(&compilers, &linkers, &failed) {
            Plan::Ready { compiler, route, linker } => return Ok(chosen(compiler, route, linker)),
            Plan::Install(step) => {
                if let Err(error) = step.run(workspace, console) {
                    failed.push((step, format!("{error:#}")));
                } else {
                    failed.push((step, "installed, yet not found afterwards".to_owned()));
                }
            }
            Plan::GiveUp => anyhow::bail!("{}", explain(&compilers, &linkers, &failed)),
        }
    }
}

/// Finds or installs the programs the lab calls; returns where they are.
///
/// # Errors
///
/// The package that has what is missing.
pub(crate) fn lab_tools(console: &Console) -> anyhow::Result<String> {
    let missing = lab::missing();
    if !missing.is_empty() {
        let packages = lab::packages(&missing);
        let fix = format!("the lab needs {}: install {}", missing.join(", "), packages.join(" "));
        if missing.contains(&lab::SSHD) {
            apt::mask("ssh", console)?;
        }
        apt::install(&packages, console).context(fix)?;
        let still = lab::missing();
        anyhow::ensure!(
            still.is_empty(),
            "{} still not on PATH after installing {}",
            still.join(", "),
            packages.join(" ")
        );
    }
    Ok(lab::found().join(", "))
}

/// Finds or installs what benchmarks compare with and measure by. Without it they leave that figure out, and say so.
pub(crate) fn comparison_tools(console: &Console) {
    for package in lab::missing_for_benchmarks() {
        if let Err(error) = apt::install(&[package], console) {
            console.line(&format!("no figures with {package}: install {package}: {error:#}"));
        }
    }
}

/// Finds or installs what unpacks and builds source packages.
///
/// # Errors
///
/// The packages to install.
pub(crate) fn packaging_tools(console: &Console) -> anyhow::Result<()> {
    let missing = lab::missing_of(&PACKAGING);
    if missing.is_empty() {
        return Ok(());
    }
    let packages = lab::packages_of(&PACKAGING, &missing);
    let fix = format!("building it needs {}: install {}", missing.join(", "), packages.join(" "));
    apt::install(&packages, console).context(fix)
}

/// Has apt fetch its package lists, once in the life of this program.
///
/// # Errors
///
/// When this is no Debian-like system or the user is not root.
pub(crate) fn refresh_package_lists(console: &Console) -> anyhow::Result<()> {
    apt::update(console)
}

fn chosen(compiler: &Compiler, route: Route, linker: &Linker) -> Toolchain {
    Toolchain {
        rustc: compiler.rustc.clone(),
        cargo: compiler.cargo.clone(),
        route,
        linker: linker.path.clone(),
        summary: [
            format!("compiler    {} {}, {}", compiler.name, compiler.found(), route.describe()),
            format!("bpf-linker  {} {}", linker.path.display(), linker.found()),
        ],
    }
}

fn explain(compilers: &[Compiler], linkers: &[Linker], failed: &[(plan::Step, String)]) -> String {
    let wanted = plan::wanted_llvm(compilers);
    let mut rows = Vec::new();
    for compiler in compilers {
        let refusal = compiler::route(compiler)
            .err()
            .unwrap_or_else(|| Refusal { why: "no bpf-linker fits".to_owned(), fix: "see bpf-linker".to_owned() });
        rows.push([compiler.name.clone(), compiler.found(), refusal.why, refusal.fix]);
    }
    // Without a compiler there is nothing to say against a linker.
    if let Some(llvm) = wanted {
        for linker in linkers {
            let refusal = linker::refusal(linker, llvm);
            rows.push([linker.path.display().to_string(), linker.found(), refusal.why, refusal.fix]);
        }
    }
    for (step, why) in failed {
        rows.push([step.to_string(), "-".to_owned(), why.clone(), step.by_hand()]);
    }
    let lead = match wanted {
        Some(_) => "no bpf-linker here can link the eBPF programs",
        None => "no compiler here can build the eBPF programs",
    };
    format!("{lead}\n{}then run `cargo xtask setup` again", table::render(["tried", "found", "why not", "fix"], &rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setup::plan::Step;

    #[test]
    fn failure_names_each_try_its_reason_and_its_fix() {
        let compilers = [Compiler::bare("nightly-x86_64-unknown-linux-gnu"), Compiler::absent("/usr/bin/rustc")];
        let failed = [(Step::Compiler, "needs root".to_owned())];
        let text = explain(&compilers, &[], &failed);
        assert!(text.starts_with("no compiler here can build the eBPF programs\n"), "{text}");
        for part in [
            "rustup component add rust-src --toolchain nightly-x86_64-unknown-linux-gnu",
            "/usr/bin/rustc",
            "not found",
            "needs root",
            "apt-get install",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
    }
}
