//! Where things are: the repository, cargo's target directory, the cache of tools.

use std::{
    env,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;

/// The directories every command works in; all absolute.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// The repository.
    pub(crate) root: PathBuf,
    /// Cargo's target directory.
    pub(crate) target: PathBuf,
    /// Where what takes long to make is kept; shared by all clones of one user.
    pub(crate) cache: PathBuf,
    /// The root in the cache that `cargo install` puts tools under (`bin/` below it).
    pub(crate) tools: PathBuf,
}

impl Workspace {
    /// Finds the directories from the environment that `cargo run` leaves.
    ///
    /// # Errors
    ///
    /// When the current directory or the path of this program cannot be read.
    pub(crate) fn find() -> anyhow::Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("find the repository: the directory of xtask has no parent")?
            .to_path_buf();
        let here = env::current_dir().context("read the current directory")?;
        let program = env::current_exe().context("read the path of this program")?;
        let target = target_dir(env::var_os("CARGO_TARGET_DIR"), &here, &program, &root);
        let cache = cache_dir(env::var_os("XDG_CACHE_HOME"), env::var_os("HOME"), &target);
        let tools = cache.join("tools");
        Ok(Self { root, target, cache, tools })
    }

    /// The private target directory of the eBPF build.
    pub(crate) fn bpf_target(&self) -> PathBuf {
        self.target.join("bpf")
    }

    /// A checked eBPF object; `edgemesh-agent/build.rs` looks for it here.
    pub(crate) fn bpf_object(&self, name: &str) -> PathBuf {
        self.bpf_target().join(name).with_extension("bpf.o")
    }

    /// The cargo that runs xtask, working on this repository.
    pub(crate) fn cargo(&self) -> Command {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
        cargo.current_dir(&self.root).env("CARGO_TARGET_DIR", &self.target);
        cargo
    }
}

/// Whether a variable says yes: set, and neither empty, `0` nor `false`.
pub(crate) fn is_set(name: &str) -> bool {
    env::var_os(name).is_some_and(|value| says_yes(&value))
}

fn says_yes(value: &OsStr) -> bool {
    !value.is_empty() && value != "0" && !value.eq_ignore_ascii_case("false")
}

/// `$CARGO_TARGET_DIR`; else the directory this program was built in, which also follows cargo's configuration files;
/// else `target`.
fn target_dir(variable: Option<OsString>, here: &Path, program: &Path, root: &Path) -> PathBuf {
    if let Some(dir) = variable.filter(|dir| !dir.is_empty()) {
        return here.join(dir);
    }
    // <target>/<profile>/xtask
    match program.ancestors().nth(2) {
        Some(target) if target.join("CACHEDIR.TAG").is_file() => target.to_path_buf(),
        Some(_) | None => root.join("target"),
    }
}

/// `edgemesh` in the user's cache directory; below the target directory for a user who has none.
fn cache_dir(xdg: Option<OsString>, home: Option<OsString>, target: &Path) -> PathBuf {
    // The XDG specification wants relative paths ignored.
    let absolute = |dir: OsString| Some(PathBuf::from(dir)).filter(|dir| dir.is_absolute());
    xdg.and_then(absolute)
        .or_else(|| home.and_then(absolute).map(|home| home.join(".cache")))
        .map_or_else(|| target.to_path_buf(), |cache| cache.join("edgemesh"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_directory_variable_wins_and_is_relative_to_the_current_directory() {
        let dir = target_dir(Some("out".into()), Path::new("/here"), Path::new("/x/debug/xtask"), Path::new("/repo"));
        assert_eq!(dir, Path::new("/here/out"));
    }

    #[test]
    fn target_directory_is_where_the_program_was_built() {
        let target = tempfile::tempdir().unwrap();
        std::fs::write(target.path().join("CACHEDIR.TAG"), "").unwrap();
        let program = target.path().join("debug/xtask");
        assert_eq!(target_dir(None, Path::new("/here"), &program, Path::new("/repo")), target.path());
        assert_eq!(target_dir(Some("".into()), Path::new("/here"), &program, Path::new("/repo")), target.path());
    }

    #[test]
    fn target_directory_of_a_program_moved_elsewhere_is_the_default() {
        let dir = target_dir(None, Path::new("/here"), Path::new("/usr/local/bin/xtask"), Path::new("/repo"));
        assert_eq!(dir, Path::new("/repo/target"));
    }

    #[test]
    fn cache_follows_xdg_then_home_then_the_target_directory() {
        let target = Path::new("/repo/target");
        assert_eq!(cache_dir(Some("/xdg".into()), Some("/root".into()), target), Path::new("/xdg/edgemesh"));
        assert_eq!(cache_dir(Some("rel".into()), Some("/root".into()), target), Path::new("/root/.cache/edgemesh"));
        assert_eq!(cache_dir(None, None, target), target);
    }

    #[test]
    fn a_variable_says_yes_unless_empty_zero_or_false() {
        for (value, yes) in [("true", true), ("1", true), ("", false), ("0", false), ("False", false)] {
            assert_eq!(says_yes(OsStr::new(value)), yes, "{value:?}");
        }
    }
}
