//! Anonymous network namespaces.

use std::fs::File;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns, unshare};

use super::place::{self, Place};

/// No duplicate address detection and no router advertisements: addresses can be used as soon as they are set.
pub(super) const QUIET: &[(&str, &str)] = &[
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/all/accept_ra", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/default/disable_ipv6", "0"),
];
/// What a node needs to pass packets on for its pods.
pub(super) const FORWARDING: &[(&str, &str)] = &[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")];

/// A network namespace without a name; it lives as long as this, or a process in it.
#[derive(Debug)]
pub(super) struct Netns {
    fd: OwnedFd,
}

impl Netns {
    /// Makes an empty namespace with `lo` up.
    pub(super) fn new() -> Result<Self> {
        let fd = on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("could not make a network namespace")?;
            let path = "/proc/thread-self/ns/net";
            Ok(OwnedFd::from(File::open(path).with_context(|| format!("could not open {path}"))?))
        })?;
        let netns = Self { fd };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Sets sysctls, given as paths below `/proc/sys/net`.
    pub(super) fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.on_a_thread(|| {
            for (name, value) in settings {
                let path = format!("/proc/sys/net/{name}");
                std::fs::write(&path, value).with_context(|| format!("could not write {value} to {path}"))?;
            }
            Ok(())
        })
    }

    /// Runs `work` inside, on a thread of its own.
    pub(super) fn on_a_thread<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_a_thread(|| {
            setns(&self.fd, CloneFlags::CLONE_NEWNET).context("could not enter a network namespace")?;
            work()
        })
    }

    /// Runs `ip -batch` inside, one command a line, up to the first that fails.
    pub(super) fn ip(&self, batch: &str) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["-batch", "-"]).stdin(Stdio::piped());
        place::enter(&mut command, &Place { net: Some(self.as_fd()), ..Place::default() })?;
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("could not run `ip`; install iproute2")?;
        if let Some(mut stdin) = child.stdin.take() {
            // A broken pipe means that ip has given up; its own words say why.
            let _ = stdin.write_all(batch.as_bytes());
        }
        let output = place::output(child, super::DEADLINE)?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`ip {}` failed: {}", failed_line(&said, batch), said.trim())
    }

    /// Opens a TCP listener inside; it stays there, whoever uses it.
    pub(super) fn listen(&self, address: SocketAddr) -> Result<TcpListener> {
        let failed = || format!("could not listen on {address} in a network namespace");
        self.on_a_thread(|| TcpListener::bind(address).with_context(failed))
    }

    /// Opens a UDP socket inside; it stays there, whoever uses it.
    pub(super) fn bind(&self, address: SocketAddr) -> Result<UdpSocket> {
        let failed = || format!("could not bind {address} in a network namespace");
        self.on_a_thread(|| UdpSocket::bind(address).with_context(failed))
    }

    /// Opens a TCP connection from inside; it stays there, whoever uses it.
    pub(super) fn connect(&self, address: SocketAddr, deadline: Duration) -> Result<TcpStream> {
        let failed = || format!("could not connect to {address} from a network namespace");
        self.on_a_thread(|| TcpStream::connect_timeout(&address, deadline).with_context(failed))
    }

    /// A path other processes can name the namespace by, while this one has it open.
    pub(super) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Runs `work` on a thread of its own, because a thread that has changed its namespace is good for nothing else.
fn on_a_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join().map_err(|_| anyhow!("a thread in a namespace panicked"))?)
}

/// The command of a batch that `ip` complains about: it ends with `Command failed -:LINE`.
fn failed_line<'a>(said: &str, batch: &'a str) -> &'a str {
    let line = said.rsplit_once("Command failed -:").and_then(|(_, line)| line.trim().parse::<usize>().ok());
    line.and_then(|line| batch.lines().nth(line.checked_sub(1)?)).map_or(batch, str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_batch_names_the_command() {
        let said = "RTNETLINK answers: File exists\nCommand failed -:2\n";
        assert_eq!(failed_line(said, "link set lo up\nlink add x type bridge\n"), "link add x type bridge");
        assert_eq!(failed_line("ip: not understood", "link show"), "link show");
    }
}
