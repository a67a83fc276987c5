//! Making the kernel translate: a [`Dataplane`] on a thread of its own, fed with tables.

pub mod ebpf;
pub mod events;
mod latency;
mod run;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

pub(crate) use ebpf::choice_of;
pub use latency::Latency;
pub use run::{Handle, spawn, supervise};

use crate::model::{Change, FrontendAddr, ServiceTable};

/// Makes the kernel send traffic for Service addresses to backends.
///
/// All methods block (system calls, child processes); [`spawn`] gives an implementation its own thread.
pub trait Dataplane: Send {
    /// What `status` calls it.
    fn name(&self) -> &'static str;

    /// Brings the kernel from whatever it holds to `table`, which must be complete. Called first, and after any error.
    ///
    /// # Errors
    ///
    /// What could not be done; everything else has been.
    fn replace(&mut self, table: &ServiceTable, now: Instant) -> Result<(), Error>;

    /// Applies what changed since the last table.
    ///
    /// # Errors
    ///
    /// What could not be done; the caller goes back to [`Dataplane::replace`].
    fn apply(&mut self, changes: &[Change<'_>], now: Instant) -> Result<(), Error>;

    /// Does what was put off, such as dropping sets that a running program may still have been reading.
    fn maintain(&mut self, now: Instant);

    /// The counters of everything since it was made; each frontend in force has at least one entry.
    ///
    /// # Errors
    ///
    /// The kernel refuses to be read.
    fn counters(&mut self) -> Result<Vec<Count>, Error>;

    /// How full the maps are whose lack of room is [`Error::Full`].
    fn rooms(&self) -> Vec<Room>;

    /// Reads back what the kernel does with connections to an address now; those of the network namespace with this
    /// cookie, or of nobody in particular.
    ///
    /// # Errors
    ///
    /// The kernel refuses to be read.
    fn inspect(&mut self, at: &FrontendAddr, netns: Option<u64>) -> Result<InForce, Error>;
}

/// The entries of one map.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Room {
    /// As in [`Error::Full`].
    pub map: &'static str,
    pub used: usize,
    pub capacity: u32,
}

/// What the kernel holds of an address, whatever the tables say.
#[derive(Clone, Debug, PartialEq)]
pub enum InForce {
    /// A frontend; without backends, connections are refused.
    Frontend {
        shares: Vec<Share>,
        /// What is in store for the client that was asked for; None where it is left to chance.
        choice: Option<Choice>,
    },
    /// No frontend, but an address that belongs to a Service: connections are refused.
    ServiceAddress,
    /// Nothing: connections are left alone.
    Nothing,
}

/// The counters of one (frontend, backend).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Count {
    pub frontend: FrontendAddr,
    /// None counts calls that reached no backend, and those that reached one that is gone since.
    pub backend: Option<SocketAddr>,
    pub connects: u64,
    pub datagrams: u64,
    pub refused: u64,
}

/// What a data plane could not do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Some entries found no room; all others are in force.
    #[error(
        "{missing} entries found no room in {map}, which holds {capacity}; stop the agent, raise modules.edgeProxy.ebpf.{key}, run `edgemesh-agent cleanup` and start it again"
    )]
    Full { map: &'static str, key: &'static str, capacity: u32, missing: usize },
    /// A system call failed.
    #[error("cannot {attempt}: {error}")]
    Kernel { attempt: String, error: String },
}

/// A backend in force.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    pub backend: SocketAddr,
    /// How likely it is taken for a client of which nothing is known, from 0 to 1.
    pub chance: f64,
}

/// The backend that a client's next connection gets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Choice {
    pub backend: SocketAddr,
    pub by: ChosenBy,
}

/// Why it gets that one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ChosenBy {
    /// By who it is.
    Hash,
    /// It was there last, and is kept there for this long if it does not connect again.
    Affinity { left: Duration },
}
