//! What to do about what was found: use it, install something, or give up. Deciding is pure; [`Step::run`] acts.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;

use super::{
    apt,
    compiler::{self, Compiler, Origin, Route, State},
    linker::{self, Linker},
};
use crate::{
    build_ebpf,
    console::Console,
    process::{self, Stdout},
    workspace::Workspace,
};

/// The compiler that Debian keeps current for its browsers, on every release.
pub(crate) const COMPILER_PACKAGES: &[&str] = &["rustc-web", "cargo-web", "rust-web-src"];
/// The ordinary one, new enough on young releases alone.
const PLAIN_COMPILER_PACKAGES: &[&str] = &["rustc", "cargo", "rust-src"];
/// bpf-linker compiles in two minutes on two cores.
const LINKER_LIMIT: Duration = Duration::from_secs(20 * 60);

/// What to do next.
#[derive(Debug)]
pub(crate) enum Plan<'a> {
    Ready { compiler: &'a Compiler, route: Route, linker: &'a Linker },
    Install(Step),
    GiveUp,
}

/// Something that can be installed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Step {
    /// The distribution's compiler with its source.
    Compiler,
    /// bpf-linker for this LLVM major.
    Linker { llvm: u32 },
}

/// Decides from what is here and from what was `tried` already.
///
/// A compiler that a present linker fits wins over a preferred one that needs an installation.
pub(crate) fn decide<'a>(compilers: &'a [Compiler], linkers: &'a [Linker], tried: &[(Step, String)]) -> Plan<'a> {
    let usable = usable(compilers);
    for &(compiler, route, llvm) in &usable {
        if let Some(linker) = linkers.iter().find(|linker| linker.fits(llvm)) {
            return Plan::Ready { compiler, route, linker };
        }
    }
    let untried = |step: &Step| tried.iter().all(|(other, _)| other != step);
    let mut steps = Vec::new();
    if !linkers.iter().any(|linker| linker.chosen) {
        let llvms = usable.iter().map(|&(_, _, llvm)| llvm).filter(|llvm| linker::LLVMS.contains(llvm));
        steps.extend(llvms.map(|llvm| Step::Linker { llvm }));
    }
    if usable.is_empty() && compilers.iter().all(|compiler| compiler.origin != Origin::Chosen) {
        steps.push(Step::Compiler);
    }
    steps.into_iter().find(untried).map_or(Plan::GiveUp, Plan::Install)
}

/// The LLVM major that a linker has to have, if there is a compiler at all.
pub(crate) fn wanted_llvm(compilers: &[Compiler]) -> Option<u32> {
    usable(compilers).first().map(|&(_, _, llvm)| llvm)
}

impl Step {
    /// Installs it.
    ///
    /// # Errors
    ///
    /// When this user or system cannot, or when the installation fails.
    pub(crate) fn run(self, workspace: &Workspace, console: &Console) -> anyhow::Result<()> {
        match self {
            Self::Compiler => {
                apt::update(console)?;
                let packages = compiler_packages(apt::candidate).context(
                    "no package of this system has a new enough compiler (rustc-web or rustc with rust-src)",
                )?;
                apt::install(packages, console)
            }
            Self::Linker { llvm } => install_linker(llvm, workspace, console),
        }
    }

    /// The commands that do the same by hand.
    pub(crate) fn by_hand(self) -> String {
        match self {
            Self::Compiler => {
                format!("rustup component add rust-src --toolchain nightly; or {}", apt::command(COMPILER_PACKAGES))
            }
            Self::Linker { llvm } => {
                format!(
                    "cargo binstall bpf-linker; or {} and `cargo xtask setup`",
                    apt::command(&[&llvm_package(llvm)])
                )
            }
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compiler => f.write_str("install a compiler"),
            Self::Linker { llvm } => write!(f, "install bpf-linker {} (LLVM {llvm})", linker::VERSION),
        }
    }
}

/// The compilers that can build for the kernel, with how and with which LLVM, best first.
fn usable(compilers: &[Compiler]) -> Vec<(&Compiler, Route, u32)> {
    let mut usable: Vec<_> = compilers
        .iter()
        .filter_map(|compiler| match (compiler::route(compiler), &compiler.state) {
            (Ok(route), State::Works(facts)) => Some((compiler, route, facts.llvm)),
            _ => None,
        })
        .collect();
    // Under bootstrap the distribution's compiler comes before rustup's stable ones: its source belongs to it by package.
    usable.sort_by_key(|&(compiler, route, _)| (route, route == Route::Bootstrap && compiler.origin == Origin::Rustup));
    usable
}

/// The first set of packages whose compiler the workspace can use.
fn compiler_packages(candidate: impl Fn(&str) -> Option<String>) -> Option<&'static [&'static str]> {
    let oldest = compiler::version(env!("CARGO_PKG_RUST_VERSION"));
    [COMPILER_PACKAGES, PLAIN_COMPILER_PACKAGES].into_iter().find(|packages| {
        let version = packages.first().and_then(|package| candidate(package));
        version.is_some_and(|version| compiler::version(&version) >= oldest)
    })
}

fn llvm_package(llvm: u32) -> String {
    format!("llvm-{llvm}-dev")
}

fn install_linker(llvm: u32, workspace: &Workspace, console: &Console) -> anyhow::Result<()> {
    let prefix = match llvm_prefix(llvm) {
        Some(prefix) => prefix,
        None => {
            apt::update(console)?;
            apt::install(&[&llvm_package(llvm)], console)?;
            llvm_prefix(llvm).with_context(|| format!("no LLVM {llvm} in /usr/lib after installing it"))?
        }
    };
    console.line(&format!("installing bpf-linker {} for LLVM {llvm} (about 2 minutes)", linker::VERSION));
    let mut cargo = workspace.cargo();
    build_ebpf::clean_environment(&mut cargo, workspace);
    cargo
        .args(["install", &format!("bpf-linker@{}", linker::VERSION), "--locked", "--force"])
        .args(["--no-default-features", "--features", &format!("llvm-{llvm}"), "--root"])
        .arg(&workspace.tools)
        .env("LLVM_PREFIX", prefix);
    process::run(console, cargo, LINKER_LIMIT, Stdout::Shown)?.check(console, "cargo install bpf-linker")?;
    linker::record(&workspace.tools, llvm)
}

/// `$LLVM_PREFIX`, or where Debian puts this LLVM, if its development files are there.
fn llvm_prefix(llvm: u32) -> Option<PathBuf> {
    let chosen = env::var_os("LLVM_PREFIX").filter(|prefix| !prefix.is_empty()).map(PathBuf::from);
    chosen.or_else(|| {
        let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
        has_library(&prefix, llvm).then_some(prefix)
    })
}

fn has_library(prefix: &Path, llvm: u32) -> bool {
    prefix.join("lib/libLLVM.so").exists() || prefix.join(format!("lib/libLLVM-{llvm}.so")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setup::compiler::Facts;

    fn nightly(llvm: u32) -> Compiler {
        let facts = Facts { release: "1.99.0-nightly".into(), llvm, core: false, source: true };
        Compiler::works(Origin::Rustup, "nightly-x", facts)
    }

    fn debian() -> Compiler {
        let facts = Facts { release: "1.96.0".into(), llvm: 22, core: false, source: true };
        Compiler::works(Origin::System, "/usr/bin/rustc", facts)
    }

    fn step(plan: &Plan<'_>) -> Option<Step> {
        match plan {
            Plan::Install(step) => Some(*step),
            Plan::Ready { .. } | Plan::GiveUp => None,
        }
    }

    fn ready(plan: &Plan<'_>) -> Option<(String, Route, String)> {
        match plan {
            Plan::Ready { compiler, route, linker } => {
                Some((compiler.name.clone(), *route, linker.path.display().to_string()))
            }
            Plan::Install(_) | Plan::GiveUp => None,
        }
    }

    #[test]
    fn nightly_is_preferred_to_the_distribution_and_a_ready_libcore_to_both() {
        let linkers = [Linker::works("/l", Some(22))];
        let both = [debian(), nightly(22)];
        let chosen = ready(&decide(&both, &linkers, &[])).unwrap();
        assert_eq!(chosen, ("nightly-x".into(), Route::Nightly, "/l".into()));

        let gentoo = Facts { release: "1.95.0".into(), llvm: 21, core: true, source: false };
        let three = [debian(), nightly(22), Compiler::works(Origin::System, "/opt/rustc", gentoo)];
        let chosen = ready(&decide(&three, &linkers, &[])).unwrap();
        assert_eq!((chosen.0.as_str(), chosen.1), ("/opt/rustc", Route::Prebuilt));
    }

    #[test]
    fn a_compiler_that_a_present_linker_fits_wins_over_a_better_one_without() {
        let both = [nightly(23), debian()];
        let chosen = ready(&decide(&both, &[Linker::works("/l", Some(22))], &[])).unwrap();
        assert_eq!(chosen.0, "/usr/bin/rustc");
    }

    #[test]
    fn a_linker_too_old_for_every_compiler_is_replaced() {
        let compilers = [nightly(22)];
        let linkers = [Linker::works("/old", Some(21))];
        assert_eq!(step(&decide(&compilers, &linkers, &[])), Some(Step::Linker { llvm: 22 }));
    }

    #[test]
    fn an_llvm_the_linker_does_not_know_yet_is_not_tried() {
        let compilers = [nightly(LLVM_OF_THE_FUTURE)];
        assert!(matches!(decide(&compilers, &[], &[]), Plan::GiveUp));
        let compilers = [nightly(LLVM_OF_THE_FUTURE), debian()];
        assert_eq!(step(&decide(&compilers, &[], &[])), Some(Step::Linker { llvm: 22 }));
    }

    const LLVM_OF_THE_FUTURE: u32 = 99;

    #[test]
    fn a_bare_machine_installs_the_compiler_then_the_linker_then_gives_up() {
        let bare = [Compiler::bare("nightly-x"), Compiler::absent("/usr/bin/rustc")];
        assert_eq!(step(&decide(&bare, &[], &[])), Some(Step::Compiler));
        let tried = [(Step::Compiler, "needs root".to_owned())];
        assert!(matches!(decide(&bare, &[], &tried), Plan::GiveUp));

        let compilers = [debian()];
        assert_eq!(step(&decide(&compilers, &[], &tried)), Some(Step::Linker { llvm: 22 }));
        let tried = [tried[0].clone(), (Step::Linker { llvm: 22 }, "no network".to_owned())];
        assert!(matches!(decide(&compilers, &[], &tried), Plan::GiveUp));
    }

    #[test]
    fn nothing_is_installed_instead_of_what_was_chosen() {
        let chosen = [Compiler { origin: Origin::Chosen, ..Compiler::absent("/nowhere/rustc") }];
        assert!(matches!(decide(&chosen, &[], &[]), Plan::GiveUp));
        let compilers = [debian()];
        let linkers = [Linker { chosen: true, state: Err("cannot run".into()), ..Linker::works("/l", None) }];
        assert!(matches!(decide(&compilers, &linkers, &[]), Plan::GiveUp));
    }

    #[test]
    fn packages_are_those_with_a_new_enough_compiler() {
        let bookworm = |package: &str| match package {
            "rustc-web" => Some("1.96.0+dfsg1-1~deb12u2".to_owned()),
            "rustc" => Some("1.63.0+dfsg1-2".to_owned()),
            _ => None,
        };
        assert_eq!(compiler_packages(bookworm), Some(COMPILER_PACKAGES));
        let sid = |package: &str| (package == "rustc").then(|| "1.95.0+dfsg1-1".to_owned());
        assert_eq!(compiler_packages(sid), Some(PLAIN_COMPILER_PACKAGES));
        assert_eq!(compiler_packages(|_| Some("1.75.0".to_owned())), None);
    }
}
