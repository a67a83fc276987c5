//! Which Rust compilers are here, and whether and how each can build for the kernel.

use std::{
    collections::BTreeSet,
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::process;

/// What the kernel runs: eBPF in the byte order of this machine.
pub(crate) const TARGET: &str = if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };

/// The oldest compiler that the workspace builds with.
const OLDEST: &str = env!("CARGO_PKG_RUST_VERSION");
const CHOSEN: &str = "EDGEMESH_BPF_RUSTC";
/// Where distributions put theirs.
const SYSTEM: &str = "/usr/bin/rustc";

/// A compiler that is here, or that was looked for.
#[derive(Clone, Debug)]
pub(crate) struct Compiler {
    pub(crate) origin: Origin,
    /// The rustup toolchain, or the path.
    pub(crate) name: String,
    pub(crate) rustc: PathBuf,
    /// The cargo beside it, else the one running this program.
    pub(crate) cargo: PathBuf,
    pub(crate) state: State,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Origin {
    /// `$EDGEMESH_BPF_RUSTC`.
    Chosen,
    Rustup,
    /// On PATH or in /usr/bin.
    System,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum State {
    Absent,
    /// It does not answer, or not as a compiler does.
    Broken(String),
    Works(Facts),
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Facts {
    /// `1.97.0-nightly`.
    pub(crate) release: String,
    /// The major version of its LLVM.
    pub(crate) llvm: u32,
    /// Its sysroot has a compiled libcore for [`TARGET`].
    pub(crate) core: bool,
    /// Its sysroot has the source of libcore.
    pub(crate) source: bool,
}

/// How a compiler builds for the kernel; in order of preference.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Route {
    /// With the libcore it has.
    Prebuilt,
    /// Compiling libcore, which a nightly allows.
    Nightly,
    /// Compiling libcore, which a stable compiler allows under `RUSTC_BOOTSTRAP=1`.
    Bootstrap,
}

impl Route {
    /// For the line that tells what was chosen.
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Prebuilt => "with its own libcore",
            Self::Nightly => "compiling libcore",
            Self::Bootstrap => "compiling libcore under RUSTC_BOOTSTRAP=1",
        }
    }
}

/// Why a compiler will not do, and what helps.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Refusal {
    pub(crate) why: String,
    pub(crate) fix: String,
}

impl Compiler {
    /// Its version, for people; `-` when there is none.
    pub(crate) fn found(&self) -> String {
        match &self.state {
            State::Works(facts) => format!("{}, LLVM {}", facts.release, facts.llvm),
            State::Absent | State::Broken(_) => "-".to_owned(),
        }
    }
}

/// Looks for compilers; the best known first within each kind, and [`SYSTEM`] in any case, since that is where an
/// installed one goes. Only the chosen one when there is a choice: nobody wants another instead of it.
pub(crate) fn find() -> Vec<Compiler> {
    if let Some(rustc) = env::var_os(CHOSEN).filter(|path| !path.is_empty()) {
        let rustc = PathBuf::from(rustc);
        return vec![examine(Origin::Chosen, rustc.display().to_string(), rustc)];
    }
    let mut seen = BTreeSet::new();
    let mut first_time = |rustc: &Path| fs::canonicalize(rustc).is_ok_and(|real| seen.insert(real));
    let mut found = Vec::new();
    for (name, rustc) in rustup_toolchains() {
        if first_time(&rustc) {
            found.push(examine(Origin::Rustup, name, rustc));
        }
    }
    let path = env::var_os("PATH").unwrap_or_default();
    for rustc in env::split_paths(&path).map(|dir| dir.join("rustc")).chain([PathBuf::from(SYSTEM)]) {
        if !is_rustup_proxy(&rustc) && first_time(&rustc) {
            found.push(examine(Origin::System, rustc.display().to_string(), rustc));
        }
    }
    if !Path::new(SYSTEM).exists() {
        found.push(examine(Origin::System, SYSTEM.to_owned(), PathBuf::from(SYSTEM)));
    }
    found
}

/// How `compiler` would build for the kernel.
///
/// # Errors
///
/// Why it cannot, and what helps.
pub(crate) fn route(compiler: &Compiler) -> Result<Route, Refusal> {
    let refuse = |why: &str, fix: String| Err(Refusal { why: why.to_owned(), fix });
    let another = || match compiler.origin {
        Origin::Chosen => format!("set {CHOSEN} to a rustc with rust-src, or unset it"),
        Origin::Rustup => format!("rustup update {0} && rustup component add rust-src --toolchain {0}", compiler.name),
        Origin::System => format!("as root: {}", super::apt::command(super::plan::COMPILER_PACKAGES)),
    };
    let facts = match &compiler.state {
        State::Works(facts) => facts,
        State::Absent => return refuse("not found", another()),
        State::Broken(why) => return refuse(why, another()),
    };
    if version(&facts.release) < version(OLDEST) {
        return refuse(&format!("older than {OLDEST}"), another());
    }
    if facts.core {
        return Ok(Route::Prebuilt);
    }
    if !facts.source {
        let fix = match compiler.origin {
            Origin::Rustup => format!("rustup component add rust-src --toolchain {}", compiler.name),
            Origin::Chosen | Origin::System => another(),
        };
        return refuse("no rust-src", fix);
    }
    let nightly = facts.release.contains("nightly") || facts.release.contains("dev");
    Ok(if nightly { Route::Nightly } else { Route::Bootstrap })
}

/// `major, minor, patch` of `1.97.0-nightly`, `1.88` or `1.96.0+dfsg1-1`; what is missing or strange counts as 0.
pub(crate) fn version(text: &str) -> [u32; 3] {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    std::array::from_fn(|_| numbers.next().unwrap_or(0))
}

fn examine(origin: Origin, name: String, rustc: PathBuf) -> Compiler {
    let beside = rustc.with_file_name("cargo");
    let cargo = if beside.is_file() {
        beside
    } else {
        env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
    };
    let state =
        if !rustc.exists() { State::Absent } else { facts(origin, &rustc).map_or_else(State::Broken, State::Works) };
    Compiler { origin, name, rustc, cargo, state }
}

fn facts(origin: Origin, rustc: &Path) -> Result<Facts, String> {
    let ask = |args: &[&str]| {
        let mut command = Command::new(rustc);
        command.args(args);
        process::ask(command)
    };
    let (release, llvm) = parse_verbose_version(&ask(&["-vV"])?)?;
    // The layout of a rustup toolchain is known; each question to a compiler takes as long as loading its LLVM.
    let sysroot = match origin {
        Origin::Rustup => rustc.ancestors().nth(2).unwrap_or(rustc).to_path_buf(),
        Origin::Chosen | Origin::System => PathBuf::from(ask(&["--print", "sysroot"])?.trim()),
    };
    let rustlib = sysroot.join("lib/rustlib");
    let is_core = |name: &OsStr| name.to_string_lossy().starts_with("libcore-");
    let core = fs::read_dir(rustlib.join(TARGET).join("lib"))
        .is_ok_and(|entries| entries.flatten().any(|entry| is_core(&entry.file_name())));
    let source = rustlib.join("src/rust/library/Cargo.lock").is_file();
    Ok(Facts { release, llvm, core, source })
}

/// Release and LLVM major out of `rustc -vV`.
fn parse_verbose_version(text: &str) -> Result<(String, u32), String> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let release = field("release:").ok_or("does not tell its release")?;
    let llvm = field("LLVM version:").ok_or("does not tell its LLVM version")?;
    Ok((release.to_owned(), version(llvm)[0]))
}

/// The toolchains of rustup, names descending: `nightly-<host>` stands before dated nightlies, and newer before older.
fn rustup_toolchains() -> Vec<(String, PathBuf)> {
    let home = env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".rustup")));
    let Some(entries) = home.and_then(|home| fs::read_dir(home.join("toolchains")).ok()) else { return Vec::new() };
    let mut toolchains: Vec<_> = entries
        .flatten()
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path().join("bin/rustc")))
        .collect();
    toolchains.sort_unstable_by(|a, b| b.cmp(a));
    toolchains
}

/// Whether `rustc` only stands for one of rustup's toolchains, which are looked at by themselves.
fn is_rustup_proxy(rustc: &Path) -> bool {
    rustc.with_file_name("rustup").exists()
}

#[cfg(test)]
impl Compiler {
    pub(crate) fn works(origin: Origin, name: &str, facts: Facts) -> Self {
        let rustc = PathBuf::from(name);
        Self { origin, name: name.to_owned(), cargo: rustc.with_file_name("cargo"), rustc, state: State::Works(facts) }
    }

    pub(crate) fn bare(name: &str) -> Self {
        let facts = Facts { release: "1.97.0-nightly".into(), llvm: 22, core: false, source: false };
        Self::works(Origin::Rustup, name, facts)
    }

    pub(crate) fn absent(path: &str) -> Self {
        let facts = Facts { release: String::new(), llvm: 0, core: false, source: false };
        Self { state: State::Absent, ..Self::works(Origin::System, path, facts) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(release: &str) -> Facts {
        Facts { release: release.into(), llvm: 22, core: false, source: true }
    }

    #[test]
    fn a_libcore_for_the_kernel_is_used_as_it_is_on_any_compiler() {
        let facts = Facts { core: true, source: false, ..facts("1.95.0") };
        assert_eq!(route(&Compiler::works(Origin::System, "/usr/bin/rustc", facts)), Ok(Route::Prebuilt));
    }

    #[test]
    fn a_nightly_with_source_builds_libcore_and_a_stable_one_needs_bootstrap() {
        let nightly = Compiler::works(Origin::Rustup, "nightly-x", facts("1.97.0-nightly"));
        assert_eq!(route(&nightly), Ok(Route::Nightly));
        let debian = Compiler::works(Origin::System, "/usr/bin/rustc", facts("1.96.0"));
        assert_eq!(route(&debian), Ok(Route::Bootstrap));
    }

    #[test]
    fn a_nightly_without_source_is_told_the_component_to_add() {
        let refusal = route(&Compiler::bare("nightly-x")).unwrap_err();
        assert_eq!(refusal.fix, "rustup component add rust-src --toolchain nightly-x");
    }

    #[test]
    fn a_compiler_older_than_the_workspace_allows_is_refused() {
        let old = Compiler::works(Origin::System, "/usr/bin/rustc", facts("1.63.0"));
        assert_eq!(route(&old).unwrap_err().why, format!("older than {OLDEST}"));
        let oldest = Compiler::works(Origin::System, "/usr/bin/rustc", facts(&format!("{OLDEST}.0")));
        assert_eq!(route(&oldest), Ok(Route::Bootstrap));
    }

    #[test]
    fn a_missing_system_compiler_is_told_the_packages() {
        let refusal = route(&Compiler::absent("/usr/bin/rustc")).unwrap_err();
        assert_eq!(refusal.why, "not found");
        assert!(refusal.fix.contains("rust-web-src"), "{}", refusal.fix);
    }

    #[test]
    fn versions_of_every_spelling_compare() {
        assert_eq!(version("1.97.0-nightly"), [1, 97, 0]);
        assert_eq!(version("1.88"), [1, 88, 0]);
        assert_eq!(version("1.96.0+dfsg1-1~deb12u2"), [1, 96, 0]);
        assert_eq!(version("(none)"), [0, 0, 0]);
        assert!(version("1.100.0") > version("1.88"));
    }

    #[test]
    fn release_and_llvm_are_read_from_the_verbose_version() {
        let text = "rustc 1.96.0 (ac68faa20 2026-05-25)\nbinary: rustc\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(parse_verbose_version(text), Ok(("1.96.0".to_owned(), 22)));
        assert!(parse_verbose_version("gcc 12").is_err());
    }
}
