//! Finds the eBPF object for the agent to embed. Never compiles it: `cargo xtask build-ebpf` does.
//!
//! Sets, for the code of the agent:
//! - `cfg(bpf_object)`: there is an object, and `env!("EDGEMESH_BPF_OBJECT_PATH")` is its path;
//! - `cfg(bpf_alias_object)`: beside it there is that of aliases, and `env!("EDGEMESH_BPF_ALIAS_OBJECT_PATH")` is its path;
//! - `env!("EDGEMESH_VERSION")`: the package's version, in release builds from a git checkout with the commit.
//!
//! The object is `$EDGEMESH_BPF_OBJECT`, else `bpf/edgemesh.bpf.o` in the target directory. Without one the build
//! goes on with a warning, unless `EDGEMESH_REQUIRE_BPF=1`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::SystemTime,
};

const OBJECT: &str = "EDGEMESH_BPF_OBJECT";
const REQUIRE: &str = "EDGEMESH_REQUIRE_BPF";
const ADVICE: &str = "run `cargo xtask build-ebpf`";

fn main() -> ExitCode {
    println!("cargo::rustc-check-cfg=cfg(bpf_object)");
    println!("cargo::rustc-check-cfg=cfg(bpf_alias_object)");
    println!("cargo::rerun-if-changed=build.rs");
    for variable in [OBJECT, REQUIRE] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rustc-env=EDGEMESH_VERSION={}", version());

    let object = match variable(OBJECT) {
        Some(path) => chosen(PathBuf::from(path)),
        None => built(),
    };
    let required = variable(REQUIRE).is_some_and(|value| value != "0");
    match object {
        Ok(path) => {
            println!("cargo::rustc-cfg=bpf_object");
            println!("cargo::rustc-env=EDGEMESH_BPF_OBJECT_PATH={}", path.display());
            match aliases(&path) {
                Ok(path) => {
                    println!("cargo::rustc-cfg=bpf_alias_object");
                    println!("cargo::rustc-env=EDGEMESH_BPF_ALIAS_OBJECT_PATH={}", path.display());
                }
                Err(why) if required => {
                    println!("cargo::error={why}");
                    return ExitCode::FAILURE;
                }
                Err(why) => println!("cargo::warning=this build cannot reach other sites: {why}"),
            }
        }
        Err(why) if variable(OBJECT).is_some() || required => {
            println!("cargo::error={why}");
            return ExitCode::FAILURE;
        }
        Err(why) => println!("cargo::warning=this build has no eBPF data plane: {why}"),
    }
    ExitCode::SUCCESS
}

/// The object someone named; a relative path starts at the repository, whatever directory cargo was called in.
fn chosen(path: PathBuf) -> Result<PathBuf, String> {
    let path = if path.is_absolute() { path } else { package().join("..").join(path) };
    println!("cargo::rerun-if-changed={}", path.display());
    if is_elf(&path) { Ok(path) } else { Err(format!("{OBJECT}: {} is not an eBPF object", path.display())) }
}

/// The object that `cargo xtask build-ebpf` made.
fn built() -> Result<PathBuf, String> {
    let places = places();
    for path in &places {
        if !path.exists() {
            reserve(path);
        }
        println!("cargo::rerun-if-changed={}", path.display());
    }
    match places.iter().find(|path| is_elf(path)) {
        Some(path) => Ok(path.clone()),
        None => Err(match places.first() {
            Some(path) => format!("no {}; {ADVICE}", path.display()),
            None => format!("the target directory is not known; {ADVICE} and set {OBJECT}"),
        }),
    }
}

/// The object of aliases, which is beside the other one.
fn aliases(object: &Path) -> Result<PathBuf, String> {
    let path = object.with_file_name("edgemesh-aliases.bpf.o");
    if !path.exists() {
        reserve(&path);
    }
    println!("cargo::rerun-if-changed={}", path.display());
    if is_elf(&path) { Ok(path) } else { Err(format!("no {}; {ADVICE}", path.display())) }
}

/// Where the object may be: in the target directory this script works in, and in the one the environment names, which
/// are the same unless cargo keeps intermediate files elsewhere (`build.build-dir`).
fn places() -> Vec<PathBuf> {
    let of_script = variable("OUT_DIR").and_then(|out| target_dir(Path::new(&out), variable("TARGET").as_deref()));
    let of_environment = variable("CARGO_TARGET_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let mut places: Vec<PathBuf> = Vec::new();
    for dir in [of_script, of_environment].into_iter().flatten() {
        let path = dir.join("bpf").join("edgemesh.bpf.o");
        if !places.contains(&path) {
            places.push(path);
        }
    }
    places
}

/// `<target>` out of `<target>[/<triple>]/<profile>/build/<package>…/out`.
fn target_dir(out: &Path, triple: Option<&str>) -> Option<PathBuf> {
    let build = out.ancestors().find(|dir| dir.file_name().is_some_and(|name| name == "build"))?;
    let above = build.parent()?.parent()?;
    let named = above.file_name().and_then(|name| name.to_str());
    if named.is_some() && named == triple { above.parent().map(Path::to_path_buf) } else { Some(above.to_path_buf()) }
}

/// Puts an empty file where the object will appear: cargo reruns this script on every build while a watched file does
/// not exist, and would compile the agent again each time. Its date is before that of any build.
fn reserve(path: &Path) {
    let Some(dir) = path.parent() else { return };
    // Without it the agent is compiled more often than needed, and that is all.
    let _unimportant = fs::create_dir_all(dir)
        .and_then(|()| fs::File::create_new(path))
        .and_then(|file| file.set_modified(SystemTime::UNIX_EPOCH));
}

fn is_elf(path: &Path) -> bool {
    fs::read(path).is_ok_and(|bytes| bytes.starts_with(b"\x7fELF"))
}

/// The package's version and the commit. Builds for development leave git alone: a new commit would mean compiling the
/// agent again.
fn version() -> String {
    let version = variable("CARGO_PKG_VERSION").unwrap_or_default();
    if variable("PROFILE").is_none_or(|profile| profile != "release") {
        return version;
    }
    let Some(commit) = git(&["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]) else { return version };
    // The log of HEAD changes with every commit and every checkout.
    for file in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", file]).map(|path| package().join(path))
            && path.exists()
        {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
    format!("{version}+{commit}")
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).current_dir(package()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

fn package() -> PathBuf {
    variable("CARGO_MANIFEST_DIR").map(PathBuf::from).unwrap_or_default()
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}
