//! Keeps the sockets for clients on this node: Linux answers on every interface for the addresses of all, so that a host
//! with a route by way of this node could ask, too.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::watch;

use crate::{
    conditions::Conditions,
    lifecycle::Tasks,
    net::{
        socket_filter,
        uplinks::{self, Uplink},
    },
};

/// How long until netlink is tried again after an error.
const RETRY: Duration = Duration::from_secs(5);
const OPEN: &str = "DnsOpenToOutside";

/// Has sockets hear nothing from where other machines are. Clones are one.
#[derive(Clone, Debug)]
pub(in crate::dns) struct Guard {
    /// None where everybody may ask; the inner one until the interfaces are known.
    uplinks: Option<watch::Receiver<Option<Arc<[Uplink]>>>>,
    conditions: Conditions,
}

impl Guard {
    /// Follows the node's interfaces until the agent stops; `names` are those of [`uplinks::choose`], and None has
    /// everybody answered.
    pub(in crate::dns) fn start(names: Option<Vec<String>>, conditions: &Conditions, tasks: &Tasks) -> Self {
        let conditions = conditions.clone();
        let Some(names) = names else { return Self { uplinks: None, conditions } };
        let (publish, uplinks) = watch::channel(None);
        let (stop, raise) = (tasks.stopping(), conditions.clone());
        tasks.spawn(async move {
            loop {
                let tell = |uplinks: Vec<Uplink>| {
                    raise.clear(OPEN, "");
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
                let message = format!(
                    "cannot follow which interfaces lead to other machines: {error}; DNS answers queries from all but \
                     those known before; tried again every {} s",
                    RETRY.as_secs()
                );
                raise.raise(OPEN, "", message, SystemTime::now());
                // Pods come first.
                publish.send_if_modified(|known| {
                    let first = known.is_none();
                    known.get_or_insert_default();
                    first
                });
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(RETRY) => {}
                }
            }
        });
        Self { uplinks: Some(uplinks), conditions }
    }

    /// The names of the interfaces that nobody is answered from.
    pub(in crate::dns) fn refused(&self) -> Vec<String> {
        let known = self.uplinks.as_ref().and_then(|uplinks| uplinks.borrow().clone());
        known.iter().flat_map(|uplinks| uplinks.iter()).map(|uplink| uplink.name.clone()).collect()
    }

    /// Closes a socket to the outside, and keeps it closed until the agent stops. `subject` is what a condition calls it.
    pub(super) async fn keep(&self, socket: BorrowedFd<'_>, subject: &str, tasks: &Tasks) {
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
            Ok(()) => self.conditions.clear(OPEN, subject),
            Err(error) => {
                let message = format!("cannot keep other machines from DNS on {subject}: {error}; drop their queries");
                self.conditions.raise(OPEN, subject, message, SystemTime::now());
            }
        }
    }
}
