//! The canary: a connection to a frontend of its own, made as an application makes it, which only translation brings to
//! its goal.
//!
//! The frontend is port 1 of the node-local address, TCP and UDP; its backend are the agent's own sockets on the loopback
//! address. A child process in a cgroup of its own below the one that is served talks to it.

pub mod child;

use std::{
    fs,
    hash::{BuildHasher, Hasher, RandomState},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use futures::{StreamExt, stream::FuturesUnordered};
use serde::Serialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    process::{Child, Command},
    time::timeout,
};

use crate::dataplane::ebpf::CANARY_CGROUP;
use child::{Fault, Report};

/// The reserved port (tcpmux), which no Service in its right mind answers on.
const PORT: u16 = 1;
/// How long the child may take, from its start to its end.
const DEADLINE: Duration = Duration::from_secs(2);
/// What a report holds at most.
const MAX_REPORT: u64 = 16 << 10;
/// How many failures in a row make the node unready: one slow child on a loaded node does not.
const FAILURES: u32 = 2;

/// The length of a [`Nonce`] in bytes.
pub const NONCE: usize = 16;
/// What tells one run of the canary from another.
pub type Nonce = [u8; NONCE];

/// Reads a nonce as [`Canary::run`] writes it on the child's command line.
///
/// # Errors
///
/// It is not hexadecimal, or too long.
pub fn parse_nonce(text: &str) -> Result<Nonce, std::num::ParseIntError> {
    u128::from_str_radix(text, 16).map(u128::to_be_bytes)
}

fn reply_to(nonce: Nonce) -> Nonce {
    nonce.map(|byte| !byte)
}

/// The frontend and what answers behind it.
#[derive(Debug)]
pub struct Canary {
    frontend: SocketAddr,
    tcp: TcpListener,
    udp: UdpSocket,
    cgroup: PathBuf,
}

/// Why a run of the canary is no success.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Failure {
    /// It could not be done at all, which says nothing of translation.
    #[error("{0}")]
    NotRun(String),
    /// What an application would have met.
    #[error("{0}")]
    Failed(String),
}

impl Canary {
    /// Listens behind a frontend on `ip`, for a child in a cgroup below `served`. The frontend is the data plane's to put
    /// in force.
    ///
    /// # Errors
    ///
    /// The loopback address of the family cannot be bound.
    pub async fn bind(ip: IpAddr, served: &Path) -> io::Result<Self> {
        let loopback = match ip {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        let (tcp, udp) = (TcpListener::bind((loopback, 0)).await?, UdpSocket::bind((loopback, 0)).await?);
        Ok(Self { frontend: SocketAddr::new(ip, PORT), tcp, udp, cgroup: served.join(CANARY_CGROUP) })
    }

    /// What the child connects to.
    pub fn frontend(&self) -> SocketAddr {
        self.frontend
    }

    /// What its TCP and UDP frontends have for a backend.
    ///
    /// # Errors
    ///
    /// The kernel does not say.
    pub fn backends(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.tcp.local_addr()?, self.udp.local_addr()?))
    }

    /// Sends the child once and waits for it, two seconds at most.
    ///
    /// # Errors
    ///
    /// See [`Failure`].
    pub async fn run(&self) -> Result<(), Failure> {
        let made = match fs::create_dir(&self.cgroup) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        };
        made.map_err(|error| Failure::NotRun(format!("cannot make the cgroup {}: {error}", self.cgroup.display())))?;
        // Keyed anew for each, so nobody knows it in advance.
        let random = || RandomState::new().build_hasher().finish();
        let nonce = ((u128::from(random()) << 64) | u128::from(random())).to_be_bytes();
        let mut child =
            self.start(nonce).map_err(|error| Failure::NotRun(format!("cannot start a process: {error}")))?;
        let report = async {
            tokio::select! {
                report = read(&mut child) => Some(report),
                // Never ends.
                () = self.answer(nonce) => None,
            }
        };
        match timeout(DEADLINE, report).await {
            Ok(Some(report)) => judge(report),
            Ok(None) | Err(_) => {
                // Waits for it, too. If that fails it is gone already.
                let _ = timeout(DEADLINE, child.kill()).await;
                Err(Failure::Failed(format!("the child did not end within {DEADLINE:?}")))
            }
        }
    }

    /// Takes the child's cgroup away.
    pub fn remove(&self) {
        if let Err(error) = fs::remove_dir(&self.cgroup)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(cgroup = %self.cgroup.display(), "cannot remove the canary's cgroup: {error}");
        }
    }

    /// The child is this very program, also if another version has taken its place on disk since.
    fn start(&self, nonce: Nonce) -> io::Result<Child> {
        Command::new("/proc/self/exe")
            .arg("canary")
            .arg("--cgroup")
            .arg(&self.cgroup)
            .arg("--frontend")
            .arg(self.frontend.to_string())
            .arg("--nonce")
            .arg(format!("{:032x}", u128::from_be_bytes(nonce)))
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
    }

    /// Answers everybody who knows the nonce, for as long as it is polled.
    async fn answer(&self, nonce: Nonce) {
        let mut streams = FuturesUnordered::new();
        let mut datagram = [0; NONCE + 1];
        loop {
            tokio::select! {
                accepted = self.tcp.accept() => match accepted {
                    Ok((stream, _)) => streams.push(answer(stream, nonce)),
                    // Out of descriptors it would fail at once and for ever.
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                },
                received = self.udp.recv_from(&mut datagram) => {
                    if let Ok((length, from)) = received
                        && datagram[..length] == nonce
                    {
                        // The child says so if nothing arrives.
                        let _ = self.udp.send_to(&reply_to(nonce), from).await;
                    }
                }
                Some(()) = streams.next(), if !streams.is_empty() => {}
            }
        }
    }
}

async fn answer(mut stream: TcpStream, nonce: Nonce) {
    let exchange = async {
        let mut asked = [0; NONCE];
        stream.read_exact(&mut asked).await?;
        if asked == nonce { stream.write_all(&reply_to(nonce)).await } else { Ok(()) }
    };
    // What goes wrong here the child tells from its side.
    let _ = timeout(DEADLINE, exchange).await;
}

async fn read(child: &mut Child) -> io::Result<Vec<u8>> {
    let mut report = Vec::new();
    if let Some(output) = &mut child.stdout {
        output.take(MAX_REPORT).read_to_end(&mut report).await?;
    }
    let status = child.wait().await?;
    if status.success() { Ok(report) } else { Err(io::Error::other(format!("it ended with {status}"))) }
}

fn judge(report: io::Result<Vec<u8>>) -> Result<(), Failure> {
    let not_run = |error: &dyn std::fmt::Display| Failure::NotRun(format!("the child gave no report: {error}"));
    let report = report.map_err(|error| not_run(&error))?;
    match serde_json::from_slice(&report).map_err(|error| not_run(&error))? {
        Report::Tried(faults) if faults.is_empty() => Ok(()),
        Report::Tried(faults) => {
            let said = |fault: &Fault| format!("{}: {}: {}", fault.socket, fault.step, fault.error);
            Err(Failure::Failed(faults.iter().map(said).collect::<Vec<_>>().join("; ")))
        }
        Report::Outside(error) => Err(Failure::NotRun(format!("the child cannot enter its cgroup: {error}"))),
    }
}

/// How the canary has fared. Cheap to clone; all clones share one record.
#[derive(Clone, Debug, Default)]
pub struct CanaryState(Arc<Mutex<CanaryStatus>>);

/// The canary's part of `status`.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct CanaryStatus {
    pub runs: u64,
    pub failed_runs: u64,
    /// How many failed one after another, up to now.
    pub failures: u32,
    /// When it passed last, in seconds since the Unix epoch.
    pub passed_at: Option<u64>,
}

/// What follows from a run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Verdict {
    Works,
    /// Failed, but not often enough to say so.
    Suspect,
    Broken,
}

impl CanaryState {
    /// The record up to now.
    pub fn status(&self) -> CanaryStatus {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn take(&self, passed: bool, now: SystemTime) -> Verdict {
        let mut record = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        record.runs += 1;
        if passed {
            record.failures = 0;
            record.passed_at = now.duration_since(SystemTime::UNIX_EPOCH).ok().map(|since| since.as_secs());
            return Verdict::Works;
        }
        record.failed_runs += 1;
        record.failures = record.failures.saturating_add(1);
        if record.failures < FAILURES { Verdict::Suspect } else { Verdict::Broken }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_is_a_suspicion_two_in_a_row_are_the_verdict_and_a_success_clears_it() {
        let (state, now) = (CanaryState::default(), SystemTime::UNIX_EPOCH + Duration::from_secs(7));
        let verdicts = [true, false, true, false, false, false, true].map(|passed| state.take(passed, now));
        use Verdict::{Broken, Suspect, Works};
        assert_eq!(verdicts, [Works, Suspect, Works, Suspect, Broken, Broken, Works]);
        let status = CanaryStatus { runs: 7, failed_runs: 4, failures: 0, passed_at: Some(7) };
        assert_eq!(state.status(), status);
    }

    #[test]
    fn a_report_is_judged_by_whether_anything_was_tried() {
        let judged = |report: &Report| judge(Ok(serde_json::to_vec(report).unwrap()));
        assert_eq!(judged(&Report::Tried(Vec::new())), Ok(()));
        let fault = Fault { socket: "TCP over IPv4".into(), step: "connect".into(), error: "refused".into() };
        let failed = Failure::Failed("TCP over IPv4: connect: refused".to_owned());
        assert_eq!(judged(&Report::Tried(vec![fault])), Err(failed));
        assert!(matches!(judged(&Report::Outside("no".to_owned())), Err(Failure::NotRun(_))));
        assert!(matches!(judge(Ok(b"{".to_vec())), Err(Failure::NotRun(_))));
        assert!(matches!(judge(Err(io::Error::other("killed"))), Err(Failure::NotRun(_))));
    }

    #[test]
    fn nonces_survive_the_command_line() {
        let nonce: Nonce = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255];
        assert_eq!(parse_nonce(&format!("{:032x}", u128::from_be_bytes(nonce))), Ok(nonce));
        assert!(parse_nonce("x").is_err());
    }

    #[tokio::test]
    async fn only_who_knows_the_nonce_is_answered() {
        let canary = Canary::bind(IpAddr::V4(Ipv4Addr::LOCALHOST), Path::new("/nonexistent")).await.unwrap();
        let (tcp, udp) = canary.backends().unwrap();
        let (right, wrong) = ([7; NONCE], [8; NONCE]);
        let client = async {
            let mut replies = Vec::new();
            for nonce in [right, wrong] {
                let mut stream = TcpStream::connect(tcp).await.unwrap();
                stream.write_all(&nonce).await.unwrap();
                let mut reply = Vec::new();
                stream.read_to_end(&mut reply).await.unwrap();
                replies.push(reply);
            }
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            socket.send_to(&wrong, udp).await.unwrap();
            socket.send_to(&right, udp).await.unwrap();
            let mut reply = [0; NONCE];
            let (length, _) = socket.recv_from(&mut reply).await.unwrap();
            replies.push(reply[..length].to_vec());
            replies
        };
        let replies = tokio::select! {
            replies = timeout(Duration::from_secs(10), client) => replies.unwrap(),
            () = canary.answer(right) => panic!("it ended"),
        };
        assert_eq!(replies, [reply_to(right).to_vec(), Vec::new(), reply_to(right).to_vec()]);
    }
}
