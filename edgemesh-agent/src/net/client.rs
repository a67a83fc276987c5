//! Clients on this node, as the programs tell them apart: finds the process somebody means, its network namespace with
//! that one's cookie, and whether the programs see its sockets.
//!
//! Everything is read from `/proc`, which shows the processes of all pods only in the host's PID namespace. Needs
//! CAP_SYS_PTRACE (to look into processes) and CAP_SYS_ADMIN (to enter their namespaces).

mod cgroup;
mod inside;
mod process;

use std::{
    collections::HashSet,
    fmt, io,
    net::IpAddr,
    path::Path,
    str::FromStr,
    time::{Duration, Instant},
};

pub use inside::{Names, names, netns_cookie};
use process::Process;

/// How long a search may take; a node with 10,000 processes takes some 100 ms.
const DEADLINE: Duration = Duration::from_secs(3);

/// How a user names a client.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Who {
    /// A process id, as the agent sees it.
    Process(u32),
    /// An address of its network namespace.
    Ip(IpAddr),
    /// A pod's name: its UTS host name, or HOSTNAME in the environment of one of its processes.
    Name(Box<str>),
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(id) => write!(f, "{id}"),
            Self::Ip(ip) => write!(f, "{ip}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// A text that names no client.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is neither a process id nor an IP address nor the name of a pod (without its namespace)")]
pub struct ParseWhoError(String);

impl FromStr for Who {
    type Err = ParseWhoError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(id) = text.parse() {
            return Ok(Self::Process(id));
        }
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Ok(Self::Ip(ip.to_canonical()));
        }
        // RFC 1123, as for the names of pods.
        let letter = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        let bytes = text.as_bytes();
        let ends = bytes.first().is_some_and(|c| letter(*c)) && bytes.last().is_some_and(|c| letter(*c));
        if ends && bytes.len() <= 253 && bytes.iter().all(|c| letter(*c) || b"-.".contains(c)) {
            return Ok(Self::Name(text.into()));
        }
        Err(ParseWhoError(text.chars().take(64).collect()))
    }
}

/// A client that was found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Client {
    /// One of its processes: the first of its network namespace, or the one that was named.
    pub process: u32,
    /// Its command, as `ps` shows it.
    pub command: String,
    /// The number that `readlink /proc/PID/ns/net` shows.
    pub namespace: u64,
    /// What the programs know the network namespace by; None before Linux 5.14.
    pub cookie: Option<u64>,
    /// Whether it shares the host's network namespace, as host processes and pods on the host network do. To the programs
    /// all of these are one client.
    pub host_network: bool,
    /// The process's cgroup as `/proc/PID/cgroup` has it.
    pub cgroup: String,
    pub served: Served,
}

/// Whether the programs see the sockets of a process.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Served {
    Yes,
    /// Its cgroup is not below the served one.
    No,
    /// From where the agent is, the two cgroups cannot be compared.
    Unknown,
}

/// Why a client was not found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "no process here is or belongs to '{0}'; pods are seen only with hostPID, and only those of this node (name one by a process id, its IP or its name)"
    )]
    NotFound(Who),
    /// Pods of the same name in several namespaces of Kubernetes, perhaps.
    #[error("'{who}' stands for several pods, with the processes {}; name one by its process id", list(.processes))]
    Ambiguous { who: Who, processes: Vec<u32> },
    #[error("cannot look for '{who}': {attempt}: {error}")]
    Refused { who: Who, attempt: &'static str, error: io::Error },
    #[error("cannot find '{0}' within {DEADLINE:?}: there are too many processes; name a process id")]
    Late(Who),
}

fn list(processes: &[u32]) -> String {
    processes.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}

/// Finds a client whose sockets are served by programs on the cgroup directory `served`. Blocks, for some seconds at
/// most.
///
/// # Errors
///
/// See [`Error`].
pub fn find(who: &Who, served: &Path) -> Result<Client, Error> {
    let search = Search { who, deadline: Instant::now() + DEADLINE };
    let process = match who {
        Who::Process(id) => Process::open(*id).map_err(|_| Error::NotFound(who.clone()))?,
        Who::Ip(ip) => search.by_ip(*ip, served)?,
        Who::Name(name) => search.by_name(name, served)?,
    };
    let cookie = inside::cookie(&process).map_err(|error| search.refused("enter its network namespace", error))?;
    Ok(Client {
        process: process.id,
        command: process.command(),
        namespace: process.network.1,
        cookie,
        host_network: process::own_network().is_ok_and(|own| own == process.network),
        served: cgroup::served(&process.cgroup, served),
        cgroup: process.cgroup,
    })
}

/// What a search does with a further process of a network namespace.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Known {
    Skip,
    /// What is searched for may differ from process to process.
    LookAgain,
}

/// A search that comes to an end.
struct Search<'a> {
    who: &'a Who,
    deadline: Instant,
}

impl Search<'_> {
    fn by_ip(&self, ip: IpAddr, served: &Path) -> Result<Process, Error> {
        // A namespace that may not be entered is not known to have the address.
        self.first(served, Known::Skip, |process| inside::has_address(process, ip).unwrap_or(false))
    }

    fn by_name(&self, name: &str, served: &Path) -> Result<Process, Error> {
        // A host name has at most 63 bytes, so the kubelet cuts a longer name and what the cut leaves at its end.
        let host = name.get(..63).map_or(name, |cut| cut.trim_end_matches(['-', '.']));
        let mut hosts = inside::HostNames::default();
        self.first(served, Known::LookAgain, |process| {
            hosts.of(process).as_deref() == Some(host) || process.says_hostname(name, host)
        })
    }

    /// The first process of the one network namespace with a process that is meant; of several, the one that is served.
    fn first(&self, served: &Path, known: Known, mut is_meant: impl FnMut(&Process) -> bool) -> Result<Process, Error> {
        let mut seen = HashSet::new();
        let mut found: Vec<Process> = Vec::new();
        for id in self.processes()? {
            let Ok(process) = Process::open(self.in_time(id)?) else { continue };
            let is_new = seen.insert(process.network);
            let is_found = || found.iter().any(|other| other.network == process.network);
            if (is_new || known == Known::LookAgain && !is_found()) && is_meant(&process) {
                found.push(process);
            }
        }
        let is_served = |process: &Process| cgroup::served(&process.cgroup, served) == Served::Yes;
        if found.len() > 1 && found.iter().any(is_served) {
            found.retain(is_served);
        }
        let processes = found.iter().map(|process| process.id).collect();
        match (found.pop(), found.is_empty()) {
            (Some(process), true) => Ok(process),
            (Some(_), false) => Err(Error::Ambiguous { who: self.who.clone(), processes }),
            (None, _) => Err(Error::NotFound(self.who.clone())),
        }
    }

    fn processes(&self) -> Result<Vec<u32>, Error> {
        process::ids().map_err(|error| self.refused("list the processes in /proc", error))
    }

    fn in_time(&self, id: u32) -> Result<u32, Error> {
        if Instant::now() < self.deadline { Ok(id) } else { Err(Error::Late(self.who.clone())) }
    }

    fn refused(&self, attempt: &'static str, error: io::Error) -> Error {
        Error::Refused { who: self.who.clone(), attempt, error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_ids_addresses_and_names_are_told_apart() {
        for (text, who) in [
            ("4711", Who::Process(4711)),
            ("10.244.1.5", Who::Ip("10.244.1.5".parse().unwrap())),
            ("::ffff:10.244.1.5", Who::Ip("10.244.1.5".parse().unwrap())),
            ("fd00::5", Who::Ip("fd00::5".parse().unwrap())),
            ("web-7d4b9-x2x1z", Who::Name("web-7d4b9-x2x1z".into())),
        ] {
            assert_eq!(text.parse::<Who>().unwrap(), who, "{text}");
        }
        for wrong in ["", "-web", "default/web", "Web", "a b", "x&y=z", &"x".repeat(254)] {
            assert!(wrong.parse::<Who>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn this_process_is_found_by_its_id() {
        let client = find(&Who::Process(std::process::id()), Path::new("/sys/fs/cgroup")).unwrap();
        assert_eq!(client.process, std::process::id());
        assert!(client.host_network, "it is where this code runs");
        assert!(client.cookie.is_none_or(|cookie| cookie > 0));
        let again = find(&Who::Process(std::process::id()), Path::new("/sys/fs/cgroup")).unwrap();
        assert_eq!(client.cookie, again.cookie);
    }

    #[test]
    fn who_is_not_there_is_not_found() {
        for who in [Who::Process(u32::MAX), Who::Name("there-is-no-such-pod".into()), Who::Ip([203, 0, 113, 77].into())]
        {
            assert!(matches!(find(&who, Path::new("/sys/fs/cgroup")), Err(Error::NotFound(_))), "{who}");
        }
    }
}
