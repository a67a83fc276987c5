//! Builds kube-apiserver from Debian's source package, with Debian's Go; etcd and kubectl are in packages.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::Context as _;

use super::debian::Archive;
use crate::{
    console::Console,
    process::{self, Stdout},
    setup,
};

/// Of Debian bookworm; the code is of 2021, and later compilers may refuse it.
const PACKAGES: [&str; 5] =
    ["etcd-server", "golang-1.19-go", "golang-1.19-src", "golang-github-modern-go-reflect2-dev", "kubernetes-client"];
const GOROOT: &str = "usr/lib/go-1.19";
/// Each of the two takes 3 minutes on two cores.
const LIMIT: Duration = Duration::from_secs(40 * 60);

/// Makes the directory `to` with the programs of Kubernetes `version`, working in `scratch`.
///
/// # Errors
///
/// The step that failed. Nothing is left behind but what the system was asked to install.
pub(super) fn run(version: &str, scratch: &Path, to: &Path, console: &Console) -> anyhow::Result<()> {
    console.line(&format!("preparing Kubernetes {version} in {}, once: about 5 minutes and 2.5 GB", to.display()));
    setup::packaging_tools(console)?;
    discard(scratch)?;
    let built = build(version, scratch, console)
        .and_then(|done| fs::rename(&done, to).with_context(|| format!("move {} to {}", done.display(), to.display())));
    discard(scratch)?;
    built
}

/// Returns the directory of the programs.
fn build(version: &str, scratch: &Path, console: &Console) -> anyhow::Result<PathBuf> {
    let (root, gopath, done) = (scratch.join("root"), scratch.join("go"), scratch.join("done"));
    let parent = gopath.join("src/k8s.io");
    for path in [&root, &parent, &done] {
        fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
    }
    console.line("fetching etcd, kubectl, Go and the source of Kubernetes");
    let archive = Archive::open(scratch.join("apt"), console)?;
    archive.unpack(&PACKAGES, &root)?;
    // Where the code of that time expects itself to be.
    let tree = parent.join("kubernetes");
    archive.unpack_source("kubernetes", &tree)?;
    use_cp_for_rsync(&tree)?;
    replace_reflect2(&tree, &root, console)?;

    let go = Go { root: root.join(GOROOT), path: gopath, cache: scratch.join("cache"), home: scratch.to_path_buf() };
    console.line("generating code (1 of 2)");
    let mut make = go.command("make", &tree)?;
    make.arg("generated_files");
    process::run(console, make, LIMIT, Stdout::Shown)?.check(console, "make generated_files")?;
    console.line("compiling kube-apiserver (2 of 2)");
    let mut build = go.command("go", &tree)?;
    let stamp = "k8s.io/component-base/version";
    build
        .args(["build", "-ldflags"])
        .arg(format!("-s -w -X {stamp}.gitVersion=v{version} -X {stamp}.gitMajor=1 -X {stamp}.gitMinor=20"))
        .arg("-o")
        .args([&done.join("kube-apiserver"), Path::new("./cmd/kube-apiserver")]);
    process::run(console, build, LIMIT, Stdout::Shown)?.check(console, "go build ./cmd/kube-apiserver")?;
    for program in ["etcd", "kubectl"] {
        let from = root.join("usr/bin").join(program);
        fs::rename(&from, done.join(program)).with_context(|| format!("take {}", from.display()))?;
    }
    Ok(done)
}

/// A compiler and the directories it may use.
struct Go {
    root: PathBuf,
    path: PathBuf,
    cache: PathBuf,
    home: PathBuf,
}

impl Go {
    /// A command in `directory` that finds this compiler and nothing of the user's.
    fn command(&self, program: &str, directory: &Path) -> anyhow::Result<Command> {
        let path = env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
        let bin = self.root.join("bin");
        let all = env::join_paths([bin.clone()].into_iter().chain(env::split_paths(&path))).context("extend PATH")?;
        // The system's own compiler must not be found first, which PATH alone does not prevent for the program itself.
        let mut command = if program == "go" { Command::new(bin.join(program)) } else { Command::new(program) };
        command
            .current_dir(directory)
            .env("PATH", all)
            .env("HOME", &self.home)
            .env("GOROOT", &self.root)
            .env("GOPATH", &self.path)
            .env("GOCACHE", &self.cache)
            .env("GO111MODULE", "off")
            .env("CGO_ENABLED", "0");
        for variable in ["GOFLAGS", "GOENV", "GOOS", "GOARCH", "MAKEFLAGS", "MFLAGS", "CARGO_MAKEFLAGS"] {
            command.env_remove(variable);
        }
        Ok(command)
    }
}

/// Its only use there is to copy a file.
fn use_cp_for_rsync(tree: &Path) -> anyhow::Result<()> {
    let path = tree.join("hack/lib/golang.sh");
    let script = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    fs::write(&path, script.replace("rsync -pc {}", "cp -p {}")).with_context(|| format!("write {}", path.display()))
}

/// Its version in the tree reaches into maps as Go before 1.18 laid them out, and so crashes the server at the first custom
/// resource; 1.0.2 does not.
fn replace_reflect2(tree: &Path, root: &Path, console: &Console) -> anyhow::Result<()> {
    let package = Path::new("github.com/modern-go/reflect2");
    let (from, to) = (root.join("usr/share/gocode/src").join(package), tree.join("vendor").join(package));
    discard(&to)?;
    let mut command = Command::new("cp");
    command.args(["--recursive", "--dereference"]).args([&from, &to]);
    process::run(console, command, LIMIT, Stdout::Shown)?.check(console, &format!("copy {}", from.display())).map(drop)
}

fn discard(directory: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}
