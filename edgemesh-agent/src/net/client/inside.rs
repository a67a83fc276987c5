//! What is only seen from inside a namespace. A thread enters it and ends: one that has left its process's namespace must
//! not do anything else.

use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, OwnedFd},
    thread,
};

use nix::{
    ifaddrs::getifaddrs,
    sched::{CloneFlags, setns},
    sys::{
        socket::{AddressFamily, SockFlag, SockType, socket},
        utsname::uname,
    },
};

use super::process::{self, NamespaceId, Process};

/// The cookie of the process's network namespace; None before Linux 5.14.
pub(super) fn cookie(process: &Process) -> io::Result<Option<u64>> {
    inside(&process.namespace("net")?, CloneFlags::CLONE_NEWNET, netns_cookie)?
}

/// Whether the process's network namespace has this address on one of its devices.
pub(super) fn has_address(process: &Process, ip: IpAddr) -> io::Result<bool> {
    inside(&process.namespace("net")?, CloneFlags::CLONE_NEWNET, || Ok(own_addresses()?.contains(&ip)))?
}

/// The UTS host names of processes; each namespace is entered once.
#[derive(Debug, Default)]
pub(super) struct HostNames(HashMap<NamespaceId, Option<String>>);

impl HostNames {
    /// None where it may not be asked, or is no text.
    pub(super) fn of(&mut self, process: &Process) -> Option<String> {
        let name = self.0.entry(process.uts).or_insert_with(|| {
            let file = process.namespace("uts").ok()?;
            let name = inside(&file, CloneFlags::CLONE_NEWUTS, || uname().ok()).ok()??;
            name.nodename().to_str().map(str::to_owned)
        });
        name.clone()
    }
}

/// The addresses of every network namespace of the node, by cookie.
pub type Names = HashMap<u64, Vec<IpAddr>>;

/// Looks into every network namespace with a process in it; those that may not be entered are left out, and so are
/// loopback and link-local addresses. Blocks, for some milliseconds.
pub fn names() -> Names {
    let mut seen = BTreeSet::new();
    let mut names = Names::new();
    for id in process::ids().unwrap_or_default() {
        let Ok(process) = Process::open(id) else { continue };
        if !seen.insert(process.network) {
            continue;
        }
        let Ok(file) = process.namespace("net") else { continue };
        let found = inside(&file, CloneFlags::CLONE_NEWNET, || Some((netns_cookie().ok()??, own_addresses().ok()?)));
        if let Ok(Some((cookie, addresses))) = found {
            names.insert(cookie, addresses.into_iter().filter(|ip| !is_local(ip)).collect());
        }
    }
    names
}

fn is_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local(),
    }
}

/// Runs `look` on a thread of its own inside a namespace; it must not wait for anything.
fn inside<T: Send>(namespace: &File, kind: CloneFlags, look: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("inside".to_owned()).spawn_scoped(scope, || {
            setns(namespace, kind)?;
            Ok(look())
        })?;
        thread.join().map_err(|_| io::Error::other("the thread that looks into a namespace panicked"))?
    })
}

/// The cookie of this thread's network namespace, which programs know it by; None before Linux 5.14.
///
/// # Errors
///
/// No socket can be made.
pub fn netns_cookie() -> io::Result<Option<u64>> {
    // A socket of any family has it; this one is there on every kernel.
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, and the length it wrote to `length`; both outlive the
    // call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        return Ok(Some(cookie));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(None),
        error => Err(error),
    }
}

fn own_addresses() -> io::Result<Vec<IpAddr>> {
    let addresses = getifaddrs()?.filter_map(|device| {
        let address = device.address?;
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    });
    Ok(addresses.collect())
}
