//! Keeps the sockets for clients on this node: Linux answers on every interface for the addresses of all, so that a host
//! with a route by way of this node could ask, too.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    socket_filter,
    uplinks::{self, Uplink},
};
use crate::{conditions::Conditions, lifecycle::Tasks};

/// How long until netlink is tried again after an error.
const RETRY: Duration = Duration::from_secs(5);

/// What sockets are for, and so what it means where they cannot be kept from others.
#[derive(Clone, Copy, Debug)]
pub struct Guarded {
    /// For sentences: `DNS`.
    pub what: &'static str,
    /// The reason of the condition.
    pub condition: &'static str,
    /// Whether it is served, too, while nobody knows which interfaces lead to other machines.
    pub while_unknown: bool,
}

/// Has sockets hear nothing from where other machines are. Clones are one.
#[derive(Clone, Debug)]
pub struct Guard {
    guarded: Guarded,
    /// None where everybody may ask; the inner one until the interfaces are known.
    uplinks: Option<watch::Receiver<Option<Arc<[Uplink]>>>>,
    conditions: Conditions,
}

impl Guard {
    /// Follows the node's interfaces until the agent stops; `names` are those of [`uplinks::choose`], and None has
    /// everybody answered.
    pub fn start(guarded: Guarded, names: Option<Vec<String>>, conditions: &Conditions, tasks: &Tasks) -> Self {
        let conditions = conditions.clone();
        let Some(names) = names else { return Self { guarded, uplinks: None, conditions } };
        let (publish, uplinks) = watch::channel(None);
        let (stop, raise) = (tasks.stopping(), conditions.clone());
        tasks.spawn(async move {
            loop {
                let tell = |uplinks: Vec<Uplink>| {
                    raise.clear(guarded.condition, "");
                    publish.send_if_modified(|known: &mut Option<Arc<[Uplink]>>| {
                        let differs = known.as_deref() != Some(&uplinks);
                        *known = Some(uplinks.into());
                        differs
                    });
                };
                let error = tokio::select! {
                    () = stop.cancelled() => return,
                    error = uplinks::follow(&names, tell) => error,
                };
                let (what, every) = (guarded.what, RETRY.as_secs());
                let effect = if guarded.while_unknown || publish.borrow().is_some() {
                    "is open to all interfaces but those known before"
                } else {
                    "waits for it"
                };
                let message = format!(
                    "cannot follow which interfaces lead to other machines: {error}; {what} {effect}; tried again every \
                     {every} s"
                );
                raise.raise(guarded.condition, "", message, SystemTime::now());
                publish.send_if_modified(|known| {
                    let first = known.is_none() && guarded.while_unknown;
                    if first {
                        *known = Some(Arc::default());
                    }
                    first
                });
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(RETRY) => {}
                }
            }
        });
        Self { guarded, uplinks: Some(uplinks), conditions }
    }

    /// The names of the interfaces that nobody is answered from.
    pub fn refused(&self) -> Vec<String> {
        let known = self.uplinks.as_ref().and_then(|uplinks| uplinks.borrow().clone());
        known.iter().flat_map(|uplinks| uplinks.iter()).map(|uplink| uplink.name.clone()).collect()
    }

    /// Waits until the outside is known; false if the agent stops before.
    pub async fn is_ready(&self, stop: &CancellationToken) -> bool {
        let Some(mut uplinks) = self.uplinks.clone() else { return true };
        tokio::select! {
            () = stop.cancelled() => false,
            known = uplinks.wait_for(Option::is_some) => known.is_ok(),
        }
    }

    /// Closes a socket to the outside now, as far as the outside is known.
    ///
    /// # Errors
    ///
    /// The kernel does not take the filter.
    pub fn close_now(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let known = self.uplinks.as_ref().and_then(|uplinks| uplinks.borrow().clone());
        let indexes: Vec<u32> = known.iter().flat_map(|uplinks| uplinks.iter()).map(|uplink| uplink.index).collect();
        socket_filter::refuse_from(socket, &indexes)
    }

    /// Closes a socket to the outside, and keeps it closed until the agent stops. `subject` is what a condition calls it.
    /// Waits until the outside is known.
    pub async fn keep(&self, socket: BorrowedFd<'_>, subject: &str, tasks: &Tasks) {
        let Some(mut uplinks) = self.uplinks.clone() else { return };
        if uplinks.wait_for(Option::is_some).await.is_err() {
            // The agent is stopping.
            return;
        }
        // The option is the socket's, whichever descriptor it is set by.
        let own = match socket.try_clone_to_owned() {
            Ok(own) => own,
            Err(error) => return self.tell(subject, Err(error)),
        };
        self.close(own.as_fd(), subject, &mut uplinks);
        let (guard, subject, stop) = (self.clone(), subject.to_owned(), tasks.stopping());
        tasks.spawn(async move {
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    changed = uplinks.changed() => if changed.is_err() { return },
                }
                guard.close(own.as_fd(), &subject, &mut uplinks);
            }
        });
    }

    fn close(&self, socket: BorrowedFd<'_>, subject: &str, uplinks: &mut watch::Receiver<Option<Arc<[Uplink]>>>) {
        let indexes: Vec<u32> = match &*uplinks.borrow_and_update() {
            Some(uplinks) => uplinks.iter().map(|uplink| uplink.index).collect(),
            None => Vec::new(),
        };
        self.tell(subject, socket_filter::refuse_from(socket, &indexes));
    }

    fn tell(&self, subject: &str, closed: io::Result<()>) {
        match closed {
            Ok(()) => self.conditions.clear(self.guarded.condition, subject),
            Err(error) => {
                let what = self.guarded.what;
                let message =
                    format!("cannot keep other machines from {what} on {subject}: {error}; drop what they send");
                self.conditions.raise(self.guarded.condition, subject, message, SystemTime::now());
            }
        }
    }
}
