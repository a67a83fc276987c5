//! The programs of a Kubernetes control plane: etcd, kube-apiserver and kubectl, for tests against the real thing.

mod build;
mod debian;

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use crate::{console::Console, workspace::Workspace};

/// Names the directory of the programs; envtest's variable, which the tests read too.
pub(crate) const VARIABLE: &str = "KUBEBUILDER_ASSETS";
/// What has to be in that directory.
const PROGRAMS: [&str; 3] = ["etcd", "kube-apiserver", "kubectl"];
/// What Debian's source package holds.
const VERSION: &str = "1.20.2";
const INSTEAD: &str = "or name a directory that has etcd, kube-apiserver and kubectl, as `setup-envtest use` of \
                       controller-runtime makes it, in KUBEBUILDER_ASSETS";

/// The directory of the programs, built first if need be.
///
/// It is `$KUBEBUILDER_ASSETS` if set, else `kube-1.20.2` in the cache. Building them takes 5 minutes on two cores and
/// 2.5 GB in the cache for that time; nothing is installed.
///
/// # Errors
///
/// What is missing, and what to do.
pub(crate) fn find_or_build(workspace: &Workspace, console: &Console) -> anyhow::Result<PathBuf> {
    if let Some(directory) = find(workspace)? {
        return Ok(directory);
    }
    let (name, cached) = (name(), cached(workspace));
    let fix = || format!("could not prepare Kubernetes {VERSION}; correct that, {INSTEAD}");
    fs::create_dir_all(&workspace.cache)
        .with_context(|| format!("create {}", workspace.cache.display()))
        .with_context(fix)?;
    // Another clone of this repository may be at it.
    let _only_one = lock(&workspace.cache.join(format!("{name}.lock"))).with_context(fix)?;
    if !missing(&cached).is_empty() {
        build::run(VERSION, &workspace.cache.join(format!("{name}.build")), &cached, console).with_context(fix)?;
    }
    Ok(cached)
}

/// The directory of the programs, if they are there.
///
/// # Errors
///
/// When `$KUBEBUILDER_ASSETS` is set and lacks one.
pub(crate) fn find(workspace: &Workspace) -> anyhow::Result<Option<PathBuf>> {
    let cached = || Some(cached(workspace)).filter(|cached| missing(cached).is_empty());
    Ok(chosen(env::var_os(VARIABLE))?.or_else(cached))
}

fn name() -> String {
    format!("kube-{VERSION}")
}

fn cached(workspace: &Workspace) -> PathBuf {
    workspace.cache.join(name())
}

/// `$KUBEBUILDER_ASSETS`, if there is one.
fn chosen(variable: Option<OsString>) -> anyhow::Result<Option<PathBuf>> {
    let Some(directory) = variable.filter(|directory| !directory.is_empty()).map(PathBuf::from) else {
        return Ok(None);
    };
    let missing = missing(&directory);
    anyhow::ensure!(
        missing.is_empty(),
        "{VARIABLE} names {}, which has no {}; correct it, or unset it to have them built",
        directory.display(),
        missing.join(" and no ")
    );
    std::path::absolute(&directory).with_context(|| format!("resolve {}", directory.display())).map(Some)
}

fn missing(directory: &Path) -> Vec<&'static str> {
    PROGRAMS.into_iter().filter(|program| !directory.join(program).is_file()).collect()
}

/// Waits for the lock; it ends with the file returned.
fn lock(path: &Path) -> anyhow::Result<File> {
    let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    file.lock().with_context(|| format!("lock {}", path.display()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chosen_directory_must_have_all_programs() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(chosen(None).unwrap(), None);
        assert_eq!(chosen(Some("".into())).unwrap(), None);
        for program in ["etcd", "kubectl"] {
            fs::write(directory.path().join(program), "").unwrap();
        }
        let error = chosen(Some(directory.path().into())).unwrap_err().to_string();
        assert!(error.contains("which has no kube-apiserver; correct it"), "{error}");
        fs::write(directory.path().join("kube-apiserver"), "").unwrap();
        assert_eq!(chosen(Some(directory.path().into())).unwrap().as_deref(), Some(directory.path()));
    }
}
