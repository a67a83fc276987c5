//! The lab: sites, nodes and pods on one machine, in network namespaces and cgroups of their own.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use edgemesh_tests::lab::{App, Lab};
//!
//! let lab = Lab::new()?;
//! let lan = lab.site("lan", &["192.168.10.0/24", "fd00:192:168:10::/64"])?;
//! let edge1 = lan.node("edge1", &["10.244.1.0/24", "fd00:10:244:1::/64"])?;
//! let edge2 = lan.node("edge2", &["10.244.2.0/24", "fd00:10:244:2::/64"])?;
//! let (client, server) = (edge1.pod("client")?, edge2.pod("server")?);
//! let listening = server.serve(App::Tcp, 7000)?;
//! assert_eq!(client.tcp(listening[0])?.name, "server");
//! # Ok(())
//! # }
//! ```
//!
//! Several sites are connected as they are at the edge, each behind a NAT router, with whatever addresses inside, the same
//! as another's too:
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! # use edgemesh_tests::lab::{Lab, Nat};
//! # let lab = Lab::new()?;
//! let internet = lab.site("internet", &["203.0.113.0/24"])?;
//! let relay = internet.node("relay", &["10.244.0.0/24"])?;
//! let home = internet.behind("home", &["192.168.1.0/24"], Nat::PortRestricted)?;
//! let office = internet.behind("office", &["192.168.1.0/24"], Nat::Symmetric)?;
//! let (edge1, edge2) = (home.node("edge1", &["10.244.1.0/24"])?, office.node("edge2", &["10.244.1.0/24"])?);
//! # Ok(())
//! # }
//! ```
//!
//! Nothing of a lab is visible outside it: all links are in anonymous namespaces with no way out, and all processes are
//! below one cgroup. A keeper process removes that cgroup, the processes in it and the lab's directory as soon as the
//! owner drops the [`Lab`] or ends in any way, SIGKILL included; the namespaces go with their last process.

pub mod agent;
pub mod api;
pub mod control_plane;
pub mod hooks;
mod inspect;
pub mod manifest;
mod nat;
mod netns;
mod place;
mod pod;
pub(crate) mod remains;
mod shell;
mod subnet;
mod topology;

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

pub use crate::probe::message::{
    App, BulkReport, Ending, Failure, FanReply, HammerReport, HttpReport, Measure, Quantiles, Rate, Reply, Seen,
    SpreadReport, Tls, Transport, monotonic, v4_mapped,
};
pub use manifest::Manifests;
pub use nat::Nat;
pub use place::Capability;
pub use pod::{Attempt, Connection, Datagrams, Hammer, Pod};
pub use topology::{Node, Site};

use netns::Netns;
use shell::Shell;

/// What a single operation in the lab may take unless it is told otherwise.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// A lab; dropping it ends every process in it and removes every trace of it.
#[derive(Debug)]
pub struct Lab {
    inner: Arc<Inner>,
}

/// What the handles of a lab share.
#[derive(Debug)]
struct Inner {
    cgroup: PathBuf,
    directory: PathBuf,
    /// Holds the bridges of the sites.
    backbone: Netns,
    /// All children, to be waited for when the keeper has killed them.
    children: Mutex<Vec<SharedChild>>,
    /// All shells, to keep them running.
    shells: Mutex<Vec<Arc<Shell>>>,
    keeper: Mutex<Option<Child>>,
    /// The NAT routers; no process holds their namespaces.
    routers: Mutex<Vec<nat::Running>>,
    sites: AtomicU32,
    links: AtomicU32,
}

/// A child that a handle uses and that the lab waits for in the end.
type SharedChild = Arc<Mutex<Child>>;

impl Lab {
    /// Raises an empty lab, after removing what labs without an owner have left.
    ///
    /// # Errors
    /// Needs root, a cgroup2 mount (in `/proc/self/mountinfo`), `ip` of iproute2, and the `lab-probe` binary: the one
    /// named by `EDGEMESH_LAB_PROBE`, else the one beside this program or one directory up.
    pub fn new() -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "a lab makes namespaces and cgroups, which needs root");
        let cgroup2 = remains::cgroup2_mount()?;
        let temporary = temporary();
        remains::sweep(&cgroup2, &temporary);
        let probe = binary("EDGEMESH_LAB_PROBE", "lab-probe")?;
        let name = claim_name(&temporary)?;
        let (cgroup, directory) = (cgroup2.join(&name), temporary.join(&name));
        // The keeper comes first: from here on, nothing that is made can be left behind.
        let keeper = start_keeper(&probe, &cgroup, &directory)?;
        let inner = Inner {
            cgroup,
            directory,
            backbone: Netns::new()?,
            children: Mutex::default(),
            shells: Mutex::default(),
            keeper: Mutex::new(Some(keeper)),
            routers: Mutex::default(),
            sites: AtomicU32::new(0),
            links: AtomicU32::new(0),
        };
        let lab = Self { inner: Arc::new(inner) };
        remains::create(&lab.inner.cgroup)?;
        for part in ["logs", "manifests"] {
            let path = lab.inner.directory.join(part);
            std::fs::create_dir(&path).with_context(|| format!("could not create {}", path.display()))?;
        }
        lab.inner.backbone.sysctl(netns::QUIET)?;
        Ok(lab)
    }

    /// Raises a lab for a test, or says loudly that the test is skipped where there is no root.
    ///
    /// # Errors
    /// As [`Lab::new`]; and instead of a skip where the environment has `CI=true`.
    pub fn for_test() -> Result<Option<Self>> {
        if nix::unistd::geteuid().is_root() {
            return Self::new().map(Some);
        }
        skip("raising a lab")?;
        Ok(None)
    }

    /// Adds a site: one LAN. `subnets` are those of its nodes, such as `192.168.10.0/24`, one per address family.
    ///
    /// A site that others are put behind ([`Site::behind`]) is their internet: its nodes have addresses that all can
    /// reach, as relays in a cloud have.
    pub fn site(&self, name: &str, subnets: &[&str]) -> Result<Site> {
        Site::new(&self.inner, name, subnets)
    }

    /// The directory the lab's agents read Services and EndpointSlices from.
    pub fn manifests(&self) -> Manifests {
        Manifests::new(self.inner.directory.join("manifests"))
    }

    /// The cgroup that everything in the lab is below.
    pub fn cgroup(&self) -> &Path {
        &self.inner.cgroup
    }

    /// The lab's temporary directory: logs, configuration files, manifests.
    pub fn directory(&self) -> &Path {
        &self.inner.directory
    }

    /// Ends the lab as dropping it does, and tells whether nothing was left behind.
    pub fn close(self) -> Result<()> {
        self.inner.close()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.inner.close() {
            let _ = writeln!(std::io::stderr(), "LAB LEFT BEHIND: {error:#}");
        }
    }
}

impl Inner {
    fn close(&self) -> Result<()> {
        let Some(mut keeper) = locked(&self.keeper).take() else { return Ok(()) };
        // Waiting closes the pipe, which is what the keeper waits for; it bounds its own work.
        let status = keeper.wait().context("could not wait for the keeper")?;
        for child in locked(&self.children).drain(..) {
            // Killed by the keeper; waiting only clears the zombie away.
            if status.success() {
                let _ = locked(&child).wait();
            }
        }
        ensure!(status.success(), "the keeper of {} ended with {status}", self.cgroup.display());
        Ok(())
    }

    /// Has the lab wait for a child in the end.
    fn adopt(&self, child: Child) -> SharedChild {
        let shared = Arc::new(Mutex::new(child));
        locked(&self.children).push(Arc::clone(&shared));
        shared
    }

    /// A number no other link of the lab has, for its name.
    fn next_link(&self) -> u32 {
        self.links.fetch_add(1, Ordering::Relaxed)
    }

    /// Creates the log file `name`, for a child to write to.
    fn log_file(&self, name: &str) -> Result<(PathBuf, File)> {
        let path = self.directory.join("logs").join(name);
        let file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("could not create the log {}", path.display()))?;
        Ok((path, file))
    }
}

/// Tries `condition` until it holds or `deadline` has passed; a condition that fails is tried again too.
///
/// # Errors
/// Tells `what` was waited for, and the error of the last try if that failed.
pub fn eventually(deadline: Duration, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + deadline;
    loop {
        let outcome = condition();
        if matches!(outcome, Ok(true)) {
            return Ok(());
        }
        if Instant::now() >= end {
            let waited = format!("waited {deadline:?} in vain: {what}");
            return Err(match outcome {
                Ok(_) => anyhow::anyhow!(waited),
                Err(error) => error.context(waited),
            });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The errno name behind an error of a lab operation, such as `ECONNREFUSED`, where a system call failed.
pub fn errno(error: &anyhow::Error) -> Option<&str> {
    error.downcast_ref::<Failure>().and_then(|failure| failure.errno.as_deref())
}

/// Says loudly that the current test is skipped, as `what` needs root.
///
/// # Errors
/// Where the environment has `CI=true`: there no such test may be skipped.
pub fn skip(what: &str) -> Result<()> {
    skip_for(what, "root")
}

/// Says loudly that the current test is skipped, as `what` needs `need`.
fn skip_for(what: &str, need: &str) -> Result<()> {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    if std::env::var("CI").is_ok_and(|ci| ci == "true") {
        bail!("{test}: {what} needs {need}, and with CI=true it may not be skipped");
    }
    // Past the test harness, which shows what a passing test prints to nobody.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {what} needs {need}");
    Ok(())
}

/// Starts the keeper of a lab, and waits until it cannot be interrupted any more.
fn start_keeper(probe: &Path, cgroup: &Path, directory: &Path) -> Result<Child> {
    let attempt = || format!("could not start the keeper {}", probe.display());
    let mut keeper = Command::new(probe)
        .arg("keep")
        .arg("--cgroup")
        .arg(cgroup)
        .arg("--directory")
        .arg(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(attempt)?;
    let mut said = String::new();
    if let Some(stdout) = keeper.stdout.take() {
        // Ends with the keeper, which has two system calls to make before it speaks.
        BufReader::new(stdout).read_line(&mut said).with_context(attempt)?;
    }
    ensure!(said == "ready\n", "the keeper {} ended at once", probe.display());
    Ok(keeper)
}

/// Finds a binary of this workspace: named by an environment variable, else where cargo puts it.
fn binary(variable: &str, name: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "{variable} names {}, which is no file", path.display());
        return std::path::absolute(&path).with_context(|| format!("could not resolve {}", path.display()));
    }
    let this = std::env::current_exe().context("could not find the path of this program")?;
    // Tests are in target/PROFILE/deps, binaries one directory up.
    this.ancestors().skip(1).take(2).map(|directory| directory.join(name)).find(|path| path.is_file()).with_context(
        || format!("there is no {name} beside {}; run `cargo xtask test`, or name it with {variable}", this.display()),
    )
}

/// Where directories of labs are: `$TMPDIR`, else memory, else the system's directory. A file that replaces another on a
/// disk is written out at once by some file systems, which takes some ten milliseconds; tests change manifests faster.
fn temporary() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if std::env::var_os("TMPDIR").is_none() && memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() }
}

/// Makes the directory of a new lab, and so claims its name.
fn claim_name(temporary: &Path) -> Result<String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let name = remains::lab_name(std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = temporary.join(&name);
        match std::fs::create_dir(&directory) {
            Ok(()) => return Ok(name),
            // Of an earlier process with this id.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("could not create {}", directory.display())),
        }
    }
}

/// What the lab's locks guard stays consistent whatever panics: each access is a single call.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_for_a_condition_that_fails_at_first() {
        let mut tries = 0;
        eventually(DEADLINE, "three tries", || {
            tries += 1;
            ensure!(tries > 1, "too early");
            Ok(tries == 3)
        })
        .unwrap();
    }

    #[test]
    fn a_condition_that_never_holds_ends_with_its_last_error() {
        let error = eventually(Duration::ZERO, "the moon to turn", || bail!("still there")).unwrap_err();
        assert_eq!(format!("{error:#}"), "waited 0ns in vain: the moon to turn: still there");
    }

    #[test]
    fn the_errno_of_a_failure_is_found_through_its_context() {
        let failure = Failure { errno: Some("EPERM".to_owned()), what: "connect".to_owned() };
        let error = anyhow::Error::new(failure).context("pod a");
        assert_eq!(errno(&error), Some("EPERM"));
        assert_eq!(errno(&anyhow::anyhow!("other")), None);
    }
}
