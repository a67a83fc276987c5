//! Packages of Debian bookworm, unpacked beside the system instead of installed into it.
//!
//! apt works on lists and sources of its own, so the system's stay as they are, nothing is started as a daemon, and no
//! root is needed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::Context as _;

use crate::{
    console::Console,
    process::{self, Stdout},
    setup,
};

/// The last release whose source package `kubernetes` has more than kubectl.
const CODENAME: &str = "bookworm";
/// Of the package `debian-archive-keyring`.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// A hundred megabytes on a slow line.
const LIMIT: Duration = Duration::from_secs(20 * 60);
/// Unpacking what was downloaded.
const UNPACK_LIMIT: Duration = Duration::from_secs(5 * 60);

/// apt, seeing one release and keeping everything in one directory.
pub(super) struct Archive<'a> {
    directory: PathBuf,
    console: &'a Console,
}

impl<'a> Archive<'a> {
    /// Fetches the lists of the release from the mirror that this system uses.
    ///
    /// # Errors
    ///
    /// When the system has no apt or knows no mirror of Debian, or when the lists cannot be fetched.
    pub(super) fn open(directory: PathBuf, console: &'a Console) -> anyhow::Result<Self> {
        anyhow::ensure!(Path::new("/usr/bin/apt-get").exists(), "this system has no apt-get");
        for part in ["sources", "lists/partial", "cache/archives/partial", "packages"] {
            let path = directory.join(part);
            fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        }
        let archive = Self { directory, console };
        let path = archive.directory.join("sources/debian.sources");
        fs::write(&path, sources(&mirror(console)?, Path::new(KEYRING).exists()))
            .with_context(|| format!("write {}", path.display()))?;
        archive.apt(&["update"])?;
        Ok(archive)
    }

    /// Downloads binary packages and unpacks them all into `root`.
    ///
    /// # Errors
    ///
    /// When one cannot be downloaded or unpacked.
    pub(super) fn unpack(&self, packages: &[&str], root: &Path) -> anyhow::Result<()> {
        let mut arguments = vec!["download"];
        arguments.extend(packages);
        self.apt(&arguments)?;
        for file in self.files("deb")? {
            let mut command = Command::new("dpkg-deb");
            command.arg("-x").arg(&file).arg(root);
            self.check(command, UNPACK_LIMIT, &format!("unpack {}", file.display()))?;
        }
        Ok(())
    }

    /// Downloads the source of a package and unpacks it, with Debian's patches, into `tree`, which must not exist.
    ///
    /// # Errors
    ///
    /// When it cannot be downloaded or unpacked.
    pub(super) fn unpack_source(&self, package: &str, tree: &Path) -> anyhow::Result<()> {
        self.apt(&["source", "--download-only", package])?;
        let file = self.files("dsc")?.pop().with_context(|| format!("apt-get fetched no .dsc of {package}"))?;
        let mut command = Command::new("dpkg-source");
        command.arg("--extract").arg(&file).arg(tree);
        self.check(command, UNPACK_LIMIT, &format!("unpack {}", file.display()))
    }

    fn apt(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let option = |name: &str, part: &str| format!("{name}={}", self.directory.join(part).display());
        let mut command = Command::new("apt-get");
        command.current_dir(self.directory.join("packages")).arg("--quiet");
        for option in [
            "Dir::Etc::SourceList=/dev/null".to_owned(),
            option("Dir::Etc::SourceParts", "sources"),
            option("Dir::State::Lists", "lists"),
            option("Dir::Cache", "cache"),
            // Its own user may not write here.
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Retries=3".to_owned(),
            "Acquire::Languages=none".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command.args(arguments);
        self.check(command, LIMIT, &format!("apt-get {}", arguments.join(" ")))
    }

    fn check(&self, command: Command, limit: Duration, what: &str) -> anyhow::Result<()> {
        process::run(self.console, command, limit, Stdout::Shown)?.check(self.console, what).map(drop)
    }

    /// The downloaded files with this extension.
    fn files(&self, extension: &str) -> anyhow::Result<Vec<PathBuf>> {
        let directory = self.directory.join("packages");
        let read = || -> std::io::Result<Vec<PathBuf>> {
            fs::read_dir(&directory)?.map(|entry| entry.map(|entry| entry.path())).collect()
        };
        let mut files = read().with_context(|| format!("read {}", directory.display()))?;
        files.retain(|file| file.extension().is_some_and(|other| other == extension));
        Ok(files)
    }
}

/// The mirror of Debian's archive that this system uses.
fn mirror(console: &Console) -> anyhow::Result<String> {
    let ask = || {
        let mut command = Command::new("apt-get");
        command.args(["indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"]);
        process::ask(command).map_err(anyhow::Error::msg).context("ask apt for its mirrors")
    };
    if let Some(mirror) = mirror_in(&ask()?) {
        return Ok(mirror);
    }
    // The lists say whose mirror it is, and images of systems come without lists.
    setup::refresh_package_lists(console)?;
    mirror_in(&ask()?).context("apt knows no mirror of Debian: this system is none of Debian's")
}

/// The first in the answer of `apt-get indextargets`; security updates have another label, and not this package.
fn mirror_in(targets: &str) -> Option<String> {
    targets.lines().find_map(|line| line.strip_prefix("Debian ")).map(|uri| uri.trim().to_owned())
}

fn sources(mirror: &str, keyring: bool) -> String {
    let mut text = format!("Types: deb deb-src\nURIs: {mirror}\nSuites: {CODENAME}\nComponents: main\n");
    // Without it, apt takes the keys that the system trusts for everything.
    if keyring {
        text.push_str(&format!("Signed-By: {KEYRING}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_that_of_the_archive_and_not_of_security_updates() {
        let targets = "Debian-Security http://mirror.example/debian-security/\nDebian http://mirror.example/debian/\n";
        assert_eq!(mirror_in(targets).as_deref(), Some("http://mirror.example/debian/"));
        // Without lists, labels are not known.
        assert_eq!(mirror_in(" http://mirror.example/debian/\n"), None);
    }

    #[test]
    fn sources_name_the_keyring_where_there_is_one() {
        let text = sources("http://mirror.example/debian/", true);
        assert_eq!(
            text,
            "Types: deb deb-src\nURIs: http://mirror.example/debian/\nSuites: bookworm\nComponents: main\n\
             Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        );
        assert!(!sources("http://mirror.example/debian/", false).contains("Signed-By"));
    }
}
