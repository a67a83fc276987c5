//! Installs packages on Debian-like systems.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use nix::unistd::Uid;

use crate::{
    console::Console,
    process::{self, Stdout},
};

/// Half a gigabyte of compilers on a slow line.
const LIMIT: Duration = Duration::from_secs(20 * 60);
/// Mirrors fail for moments; apt's own retries cover single files alone.
const ATTEMPTS: u32 = 3;

/// Refreshes the package lists, once in the life of this program.
///
/// # Errors
///
/// When this is no Debian-like system or the user is not root. A list that cannot be refreshed is no error: the
/// packages may be known already, and the installation tells.
pub(crate) fn update(console: &Console) -> anyhow::Result<()> {
    static DONE: AtomicBool = AtomicBool::new(false);
    able()?;
    if !DONE.swap(true, Ordering::Relaxed) {
        console.line("apt-get update");
        let ended = process::run(console, apt_get(&["update"]), LIMIT, Stdout::Shown)?;
        if !ended.success() {
            console.line(&format!("apt-get update: {}", ended.describe()));
        }
    }
    Ok(())
}

/// Installs `packages`.
///
/// # Errors
///
/// When this is no Debian-like system, the user is not root, or apt-get fails each time.
pub(crate) fn install(packages: &[&str], console: &Console) -> anyhow::Result<()> {
    update(console)?;
    let mut attempt = 1;
    loop {
        console.line(&format!("apt-get install {}", packages.join(" ")));
        let mut command = apt_get(&["install", "--yes", "--no-install-recommends"]);
        command.args(packages);
        let ended = process::run(console, command, LIMIT, Stdout::Shown)?;
        if ended.success() || attempt == ATTEMPTS {
            return ended.check(console, "apt-get install").map(drop);
        }
        attempt += 1;
    }
}

/// Keeps a service of the system from being started, now and at each boot, by a package that is to be installed for the
/// sake of its program. One that is there already is left as it is.
///
/// # Errors
///
/// The user is not root, or systemd's directory cannot be written.
pub(crate) fn mask(service: &str, console: &Console) -> anyhow::Result<()> {
    able()?;
    let units = Path::new("/etc/systemd/system");
    let mut masked = false;
    for unit in [format!("{service}.service"), format!("{service}.socket")] {
        let path = units.join(&unit);
        let there =
            [&path, &Path::new("/lib/systemd/system").join(&unit)].iter().any(|path| path.symlink_metadata().is_ok());
        if !there {
            let made = fs::create_dir_all(units).and_then(|()| symlink("/dev/null", &path));
            made.with_context(|| format!("could not mask {unit} by {}", path.display()))?;
            masked = true;
        }
    }
    if masked {
        console.line(&format!("the service {service} stays off: `systemctl unmask {service}` to have it"));
    }
    Ok(())
}

/// The version that would be installed.
pub(crate) fn candidate(package: &str) -> Option<String> {
    let mut command = Command::new("apt-cache");
    command.args(["policy", package]).env("LC_ALL", "C");
    process::ask(command).ok().and_then(|policy| candidate_in(&policy))
}

/// What a person types to install `packages`.
pub(crate) fn command(packages: &[&str]) -> String {
    format!("apt-get install {}", packages.join(" "))
}

fn able() -> anyhow::Result<()> {
    Some(()).filter(|()| Path::new("/usr/bin/apt-get").exists()).context("this system has no apt-get")?;
    anyhow::ensure!(Uid::effective().is_root(), "installing packages needs root");
    Ok(())
}

fn apt_get(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Another apt may be at work, as on a cloud machine that has just started.
        .args(["--quiet", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3"])
        .args(arguments);
    command
}

/// The candidate in the answer of `apt-cache policy`.
fn candidate_in(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate:"))?.trim();
    (version != "(none)").then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidate_is_read_from_the_policy() {
        let policy = "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n  Version table:\n";
        assert_eq!(candidate_in(policy).as_deref(), Some("1.96.0+dfsg1-1~deb12u2"));
        assert_eq!(candidate_in("x:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(candidate_in(""), None);
    }
}
