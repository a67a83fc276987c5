//! The userspace leg: what is sent to an alias is taken here and carried to the pod that it stands for.
//!
//! The kernel gives this agent all TCP and UDP to the range of the aliases ([`crate::dataplane::ebpf::divert_aliases`]). Of
//! a connection, the local address is the alias and the port that the client asked for; the newest table says who that is
//! ([`crate::alias::Aliases`]); [`Dial`] gets there; and bytes or datagrams are passed on both ways until both ends are
//! done. What does not get there is reset at once, so that the client hears of it as if the pod itself had refused.

mod buffers;
mod counters;
mod dial;
mod direct;
mod sockets;
mod tcp;
mod through;
mod udp;

use std::{net::IpAddr, sync::Arc, time::Duration};

use tokio::sync::{Semaphore, watch};

pub use counters::{Counters, ProxyStatus, RefusalCount, Sight};
pub use dial::{Carry, Dial, ReceiveDatagram, Refusal, SendDatagram};
pub use direct::{Direct, DirectFlow};
pub use sockets::Sockets;
pub use through::{Far, Flow, Receiver, Sender, Through};

use crate::{alias::Target, conditions::Conditions, lifecycle::Tasks, model::ServiceTable};

/// How long getting to a pod, or a node, may take.
pub const DIAL_DEADLINE: Duration = Duration::from_secs(5);
/// How many connections are carried at a time; those beyond are reset.
const MAX_CONNECTIONS: usize = 16_384;
/// How many clients of UDP are remembered; for those beyond, others are forgotten.
const MAX_FLOWS: usize = 8192;

/// Everything it takes to carry.
#[derive(Debug)]
pub struct Proxy<D> {
    /// Whose newest one has the aliases.
    pub tables: watch::Receiver<Arc<ServiceTable>>,
    pub dial: Arc<D>,
    pub counters: Arc<Counters>,
    pub conditions: Conditions,
}

impl<D> Clone for Proxy<D> {
    fn clone(&self) -> Self {
        Self {
            tables: self.tables.clone(),
            dial: Arc::clone(&self.dial),
            counters: Arc::clone(&self.counters),
            conditions: self.conditions.clone(),
        }
    }
}

impl<D: Dial> Proxy<D> {
    /// Carries what comes to the sockets until the agent stops; connections end with it.
    pub fn start(self, sockets: Sockets, tasks: &Tasks) {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let crowd = Arc::new(udp::Crowd::new(MAX_FLOWS, Arc::clone(&self.counters)));
        for listener in sockets.tcp {
            let accepting = tcp::Accepting { proxy: self.clone(), room: Arc::clone(&room), tasks: tasks.clone() };
            tasks.spawn(accepting.run(listener));
        }
        for socket in sockets.udp {
            tasks.spawn(udp::Flows::new(self.clone(), Arc::clone(&crowd), tasks.clone()).run(socket));
        }
    }

    /// Whom an alias stands for now.
    fn target(&self, alias: IpAddr) -> Option<Target> {
        self.tables.borrow().aliases.target(alias).cloned()
    }
}

#[cfg(test)]
mod tests;
