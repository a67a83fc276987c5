//! Following the routes: netlink tells that something has changed, and all of it is read anew.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::Arc,
    time::{Duration, SystemTime},
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket},
};
use rtnetlink::new_connection;
use tokio::{io::unix::AsyncFd, sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{
    Routes,
    read::{self, MAX_ROUTES},
};
use crate::{conditions::Conditions, lifecycle::Tasks};

/// RTMGRP_LINK, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE (rtnetlink(7)).
const GROUPS: u32 = 1 | 0x40 | 0x400;
/// Changes come in groups; this is how long the rest of one is waited for.
const SETTLE: Duration = Duration::from_millis(50);
/// Reading takes at most this share of the time, one in so many, where routes never stop changing.
const SHARE: u32 = 10;
/// How often everything is looked at in any case.
const PATROL: Duration = Duration::from_secs(30);
/// How long until netlink is tried again after an error.
const RETRY: Duration = Duration::from_secs(5);

const UNKNOWN: &str = "RoutesUnknown";
const TOO_MANY: &str = "TooManyRoutes";

/// Follows the routes of the network namespace that this thread is in, until the agent stops.
///
/// `news` gets them when they have been read for the first time, and whenever they are others in what they say. The
/// socket that is told of changes is only asked whether there were any: what overran it is read anew as all else is.
///
/// # Errors
///
/// The system refuses a runtime; it runs on a thread of its own, as a large table takes its time.
pub fn follow(news: watch::Sender<Option<Arc<Routes>>>, conditions: &Conditions, tasks: &Tasks) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let follower = Follower { news, conditions: conditions.clone() };
    let stop = tasks.stopping();
    tasks.spawn(async move {
        if tokio::task::spawn_blocking(move || runtime.block_on(follower.run(stop))).await.is_err() {
            warn!("the thread that follows the node's routes panicked");
        }
    });
    Ok(())
}

struct Follower {
    news: watch::Sender<Option<Arc<Routes>>>,
    conditions: Conditions,
}

impl Follower {
    async fn run(self, stop: CancellationToken) {
        loop {
            let error = tokio::select! {
                () = stop.cancelled() => return,
                result = self.follow() => match result {
                    Ok(()) => return,
                    Err(error) => error,
                },
            };
            let message = format!(
                "cannot follow the node's routes: {error}; which pods are reached directly is decided by what they were"
            );
            self.conditions.raise(UNKNOWN, "", message, SystemTime::now());
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
    }

    /// Ends without an error when nobody listens any more.
    async fn follow(&self) -> io::Result<()> {
        // Before the first reading, so that nothing falls in between.
        let changes = listen()?;
        let (asking, netlink, _) = new_connection()?;
        tokio::pin!(asking);
        loop {
            let begun = Instant::now();
            let (routes, more) = tokio::select! {
                routes = read::read(&netlink) => routes.map_err(io::Error::other)?,
                () = &mut asking => return Err(io::Error::other("the connection closed")),
            };
            if self.tell(routes, more).is_err() {
                return Ok(());
            }
            let took = begun.elapsed();
            tokio::time::sleep(took * SHARE).await;
            tokio::select! {
                changed = wait(&changes) => changed?,
                () = tokio::time::sleep(PATROL) => {}
                () = self.news.closed() => return Ok(()),
                () = &mut asking => return Err(io::Error::other("the connection closed")),
            }
            tokio::time::sleep(SETTLE).await;
            drain(&changes)?;
        }
    }

    fn tell(&self, routes: Routes, more: bool) -> Result<(), ()> {
        self.conditions.clear(UNKNOWN, "");
        if more {
            let message = format!(
                "this node has more than {MAX_ROUTES} routes, and those beyond are not looked at when deciding which pods \
                 are reached directly; name the pods' networks in modules.edgeTunnel.directCIDRs"
            );
            self.conditions.raise(TOO_MANY, "", message, SystemTime::now());
        } else {
            self.conditions.clear(TOO_MANY, "");
        }
        let told = self.news.send_if_modified(|known| {
            let same = known.as_ref().is_some_and(|known| **known == routes);
            if !same {
                *known = Some(Arc::new(routes));
            }
            !same
        });
        if told {
            debug!("the node's routes have changed");
        }
        if self.news.is_closed() { Err(()) } else { Ok(()) }
    }
}

/// A socket that can be read from when routes or links have changed.
fn listen() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
    // SAFETY: the descriptor is open and owned by what is registered; nobody closes it or puts another in its place before
    // that is dropped.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

/// Waits for news; that some were lost is news, too.
async fn wait(socket: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut ready = socket.readable().await?;
        let mut byte = [0; 1];
        match recv(socket.as_fd().as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) {
            Ok(_) | Err(Errno::ENOBUFS) => return Ok(()),
            Err(Errno::EAGAIN) => ready.clear_ready(),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Forgets the news that there are.
fn drain(socket: &AsyncFd<OwnedFd>) -> io::Result<()> {
    /// More than fit into the socket; should more come meanwhile, they are read next time.
    const MOST: usize = 10_000;
    for _ in 0..MOST {
        let mut byte = [0; 1];
        match recv(socket.as_fd().as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) {
            Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{process::Command, thread};

    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::net::route::Leads;

    fn ip(arguments: &str) {
        let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Runs in a network namespace of its own, or not at all, which is said loudly.
    fn alone<T: Send + 'static>(work: impl AsyncFnOnce() -> T + Send + 'static) -> Option<T> {
        if !nix::unistd::geteuid().is_root() {
            edgemesh_tests::lab::skip("following routes").unwrap();
            return None;
        }
        let inside = move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(work())
        };
        Some(thread::spawn(inside).join().unwrap())
    }

    async fn until(routes: &mut watch::Receiver<Option<Arc<Routes>>>, addr: &str, expected: Option<Leads>) {
        let addr = addr.parse().unwrap();
        let seen = routes.wait_for(|routes| {
            routes.as_ref().is_some_and(|routes| routes.to(addr).map(|(_, leads)| leads) == expected)
        });
        tokio::time::timeout(Duration::from_secs(10), seen).await.unwrap().unwrap();
    }

    #[test]
    fn routes_are_followed_as_they_come_and_go_and_through_a_flood_of_them() {
        alone(async || {
            let (tell, mut routes) = watch::channel(None);
            let follower = Follower { news: tell, conditions: Conditions::default() };
            let work = async {
                until(&mut routes, "127.0.0.1", Some(Leads::Here)).await;
                ip("link add eth0 type veth peer name eth1");
                ip("link set eth0 up");
                ip("link set eth1 up");
                ip("address add 192.168.1.10/24 dev eth0");
                until(&mut routes, "192.168.1.12", Some(Leads::OnLink)).await;
                ip("route add 10.244.2.0/24 via 192.168.1.12");
                until(&mut routes, "10.244.2.9", Some(Leads::Gateway)).await;
                ip("route add blackhole 10.244.2.8/29");
                until(&mut routes, "10.244.2.9", Some(Leads::Nowhere)).await;
                // Far more news than the socket holds, while nobody reads.
                let batch: String = (0..20_000)
                    .map(|n| format!("route add 10.{}.{}.0/24 via 192.168.1.12\n", 100 + n / 256, n % 256))
                    .collect();
                let file = tempfile::NamedTempFile::new().unwrap();
                std::fs::write(file.path(), batch).unwrap();
                ip(&format!("-batch {}", file.path().display()));
                until(&mut routes, "10.178.31.1", Some(Leads::Gateway)).await;
                ip("link set eth0 down");
                until(&mut routes, "10.244.2.200", None).await;
                // The blackhole needs no link.
                until(&mut routes, "10.244.2.9", Some(Leads::Nowhere)).await;
            };
            tokio::select! {
                () = work => {}
                ended = follower.follow() => panic!("{ended:?}"),
            }
        });
    }
}
