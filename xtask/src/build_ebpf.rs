//! `cargo xtask build-ebpf`: compiles the eBPF programs and checks what came out.

mod object;

use std::{
    collections::BTreeSet,
    env,
    ffi::{OsStr, OsString},
    fs,
    path::Path,
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::Context as _;

use crate::{
    console::Console,
    process::{self, Stdout},
    setup::{self, Route, TARGET, Toolchain},
    workspace::Workspace,
};

const PACKAGE: &str = "edgemesh-ebpf";
/// One minute on two cores, libcore included.
const LIMIT: Duration = Duration::from_secs(20 * 60);

/// Builds the eBPF programs and checks the object
///
/// There are two objects: that of Services, and that of aliases. Each has to have every program, every map, BTF and a
/// GPL-compatible licence. They go where the build of edgemesh-agent looks for them: bpf/edgemesh.bpf.o and
/// bpf/edgemesh-aliases.bpf.o in cargo's target directory.
///
/// A file is replaced only when every check passes and its content differs, so the agent is recompiled only then.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs the command.
///
/// # Errors
///
/// No toolchain, a failed compilation, or an object that is not as expected.
pub(crate) fn run(_: &Args, workspace: &Workspace, console: &Console) -> anyhow::Result<ExitCode> {
    let toolchain = console.step("setup", || setup::toolchain(workspace, console))?;
    for line in &toolchain.summary {
        console.line(&format!("  {line}"));
    }
    console.step("build-ebpf", || build(&toolchain, workspace, console))?;
    for expected in &object::OBJECTS {
        console.line(&format!("  {}", workspace.bpf_object(expected.name).display()));
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds, checks and delivers the objects.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn build(toolchain: &Toolchain, workspace: &Workspace, console: &Console) -> anyhow::Result<()> {
    let ended = process::run(console, cargo(toolchain, workspace), LIMIT, Stdout::Shown)?;
    ended.check(console, "compile the eBPF programs")?;
    for expected in &object::OBJECTS {
        let built = workspace.bpf_target().join(TARGET).join("release").join(expected.binary);
        let elf = fs::read(&built).with_context(|| format!("read {}", built.display()))?;
        let problems =
            object::Contents::read(&elf).with_context(|| format!("parse {}", built.display()))?.problems(expected);
        anyhow::ensure!(
            problems.is_empty(),
            "{} is not the object the agent expects:\n  {}",
            built.display(),
            problems.join("\n  ")
        );
        deliver(&elf, &workspace.bpf_object(expected.name))?;
    }
    Ok(())
}

/// Takes out of `command` what would steer another cargo or rustc than the one meant: this program runs under cargo
/// and rustup, and inherits what they set for it.
pub(crate) fn clean_environment(command: &mut Command, workspace: &Workspace) {
    for (name, _) in env::vars_os() {
        if steers_cargo(&name) {
            command.env_remove(name);
        }
    }
    if let Some(path) = env::var_os("LD_LIBRARY_PATH") {
        let kept: Vec<_> = env::split_paths(&path).filter(|dir| !is_cargos_library(dir, &workspace.target)).collect();
        match env::join_paths(kept) {
            Ok(path) if !path.is_empty() => command.env("LD_LIBRARY_PATH", path),
            _ => command.env_remove("LD_LIBRARY_PATH"),
        };
    }
}

fn cargo(toolchain: &Toolchain, workspace: &Workspace) -> Command {
    let mut command = Command::new(&toolchain.cargo);
    clean_environment(&mut command, workspace);
    command
        .current_dir(&workspace.root)
        .args(["build", "--locked", "--release", "--package", PACKAGE, "--target", TARGET])
        .env("RUSTC", &toolchain.rustc)
        .env("CARGO_TARGET_DIR", workspace.bpf_target())
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(&toolchain.linker));
    match toolchain.route {
        Route::Prebuilt => {}
        Route::Nightly => {
            command.args(["-Z", "build-std=core"]);
        }
        Route::Bootstrap => {
            command.args(["-Z", "build-std=core"]).env("RUSTC_BOOTSTRAP", "1");
        }
    }
    command
}

/// The flags, in the encoding that allows spaces in a path.
fn rustflags(linker: &Path) -> OsString {
    let mut flags = OsString::from(format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH));
    // Line information for the verifier's log; the linker makes the kernel's BTF of it.
    for flag in ["-Cdebuginfo=2", "-Clink-arg=--btf", "-Clinker="] {
        flags.push("\u{1f}");
        flags.push(flag);
    }
    flags.push(linker);
    flags
}

/// Variables that choose a toolchain, flags, a target or a profile. Cargo's home, its network settings and its
/// registries stay.
fn steers_cargo(name: &OsStr) -> bool {
    const NAMES: [&str; 10] = [
        "CARGO",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_TARGET_DIR",
        "RUSTC",
        "RUSTC_BOOTSTRAP",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
    ];
    // What cargo sets for the program that it runs, and its `build`, `target`, `profile` and `unstable` settings.
    const PREFIXES: [&str; 7] = [
        "CARGO_BIN_",
        "CARGO_BUILD_",
        "CARGO_MANIFEST_",
        "CARGO_PKG_",
        "CARGO_PROFILE_",
        "CARGO_TARGET_",
        "CARGO_UNSTABLE_",
    ];
    let name = name.to_string_lossy();
    NAMES.contains(&name.as_ref()) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Whether cargo put `dir` on the library path of the program that it runs.
fn is_cargos_library(dir: &Path, target: &Path) -> bool {
    dir.starts_with(target) || dir.join("rustlib").is_dir()
}

/// Replaces `to` if the content differs, at once: a build of the agent may read it meanwhile.
fn deliver(elf: &[u8], to: &Path) -> anyhow::Result<()> {
    if fs::read(to).is_ok_and(|old| old == elf) {
        return Ok(());
    }
    let new = to.with_extension("o.new");
    fs::write(&new, elf).with_context(|| format!("write {}", new.display()))?;
    fs::rename(&new, to).with_context(|| format!("rename {} to {}", new.display(), to.display()))
}

/// `expected` without what is in `found`.
fn missing<'a>(expected: &[&'a str], found: &BTreeSet<String>) -> Vec<&'a str> {
    expected.iter().copied().filter(|name| !found.contains(*name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_another_toolchain_is_taken_out_and_the_network_is_left() {
        for name in [
            "RUSTUP_TOOLCHAIN",
            "CARGO",
            "RUSTC_WRAPPER",
            "RUSTFLAGS",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_BUILD_TARGET",
            "CARGO_TARGET_DIR",
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER",
            "CARGO_PROFILE_RELEASE_LTO",
            "CARGO_PKG_NAME",
        ] {
            assert!(steers_cargo(OsStr::new(name)), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_HTTP_CAINFO", "CARGO_REGISTRIES_X_INDEX", "PATH"] {
            assert!(!steers_cargo(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn flags_keep_a_path_with_spaces_whole() {
        let flags = rustflags(Path::new("/a b/bpf-linker")).into_string().unwrap();
        let flags: Vec<_> = flags.split('\u{1f}').collect();
        assert_eq!(flags.len(), 4);
        assert_eq!(flags[0], format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH));
        assert_eq!(flags[3], "-Clinker=/a b/bpf-linker");
    }

    #[test]
    fn an_object_is_replaced_only_when_it_differs() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("edgemesh.bpf.o");
        deliver(b"one", &to).unwrap();
        let old = fs::File::open(&to).unwrap();
        old.set_modified(std::time::UNIX_EPOCH).unwrap();
        deliver(b"one", &to).unwrap();
        assert_eq!(fs::metadata(&to).unwrap().modified().unwrap(), std::time::UNIX_EPOCH);
        deliver(b"two", &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn libraries_of_cargo_are_told_from_those_of_the_user() {
        assert!(is_cargos_library(Path::new("/repo/target/debug/deps"), Path::new("/repo/target")));
        assert!(!is_cargos_library(Path::new("/opt/llvm/lib"), Path::new("/repo/target")));
    }
}
