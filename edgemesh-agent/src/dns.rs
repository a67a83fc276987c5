//! Cluster DNS on the node: the zone of the cluster's own names, and a forwarder with a cache for all others.
//!
//! ```text
//! tables ─► Zone::build ─► serve::Core ◄─ UDP threads, TCP tasks
//!                              │
//!                          Forwarder ─► upstreams
//! ```
//!
//! Everything but the UDP threads runs on one thread of its own: neither a large table that is being built nor slow
//! upstreams hold up answers about the cluster.

mod answer;
mod explain;
pub mod forward;
mod serve;
pub mod stats;
#[cfg(test)]
mod tests;
pub mod wire;
pub mod zone;

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::sync::{oneshot, watch};
use tracing::warn;

pub use self::explain::{CachedRow, DnsReport, ForwardedRow, NamedEndpointRow, UpstreamRow, ZoneRow};
pub use self::serve::{Limits, Listener};
use self::{
    forward::{Forwarder, ForwarderStatus},
    serve::{Core, Listening},
    stats::{Counters, Stats},
    zone::{Zone, ZoneSettings},
};
use crate::{
    conditions::Conditions,
    lifecycle::Tasks,
    model::ServiceTable,
    net::guard::{Guard, Guarded},
};

/// Pods come first: they get answers also while nobody knows who is outside.
const GUARDED: Guarded = Guarded { what: "DNS", condition: "DnsOpenToOutside", while_unknown: true };
/// How long the tasks may take to end after a stop signal.
const DRAIN_DEADLINE: Duration = Duration::from_secs(3);

/// What DNS is told once, at its start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where queries are answered, by UDP and by TCP.
    pub listen: Vec<SocketAddr>,
    /// None has upstreams asked for all names (`cacheDNS`).
    pub zone: Option<ZoneSettings>,
    pub forward: forward::Settings,
    pub limits: Limits,
    /// The patterns of [`crate::net::uplinks::choose`]; queries from the interfaces it chooses are not answered. None has
    /// everybody answered.
    pub closed_to: Option<Vec<String>>,
}

/// Running DNS. Clones are one.
#[derive(Clone, Debug)]
pub struct Dns {
    core: Arc<Core>,
    counters: Arc<[Counters]>,
    listening: Listening,
    guard: Guard,
    zone: Option<ZoneSettings>,
}

/// DNS's part of `status`.
#[derive(Clone, Debug, Serialize)]
pub struct DnsStatus {
    pub listeners: Vec<Listener>,
    /// The interfaces from which no query is answered, as other machines are behind them.
    pub closed_to: Vec<String>,
    /// The cluster domain answered from the model; None where all names are asked of upstreams (`cacheDNS`).
    pub domain: Option<String>,
    pub forwarder: ForwarderStatus,
}

impl Dns {
    /// Starts to answer, as soon as the addresses are free, until the agent stops.
    ///
    /// # Errors
    ///
    /// There is no thread to be had.
    pub fn start(
        settings: Settings,
        tables: watch::Receiver<Arc<ServiceTable>>,
        conditions: &Conditions,
        tasks: &Tasks,
    ) -> io::Result<Self> {
        // Large tables of routes are no affair of the thread that answers.
        let guard = Guard::start(GUARDED, settings.closed_to.clone(), conditions, tasks);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let group = tasks.group();
        let started = {
            let _context = runtime.enter();
            Self::start_here(settings, guard, tables, conditions, &group)
        };
        let (tell_ended, ended) = oneshot::channel::<()>();
        let stop = tasks.stopping();
        thread::Builder::new().name("dns".to_owned()).spawn(move || {
            runtime.block_on(async {
                stop.cancelled().await;
                group.drain(DRAIN_DEADLINE).await;
            });
            runtime.shutdown_timeout(DRAIN_DEADLINE);
            drop(tell_ended);
        })?;
        tasks.spawn(async move {
            // Nothing is sent: it ends with the thread.
            let _ = ended.await;
        });
        Ok(started)
    }

    /// As [`Dns::start`], on the runtime of the caller's context.
    fn start_here(
        settings: Settings,
        guard: Guard,
        tables: watch::Receiver<Arc<ServiceTable>>,
        conditions: &Conditions,
        tasks: &Tasks,
    ) -> Self {
        let Settings { listen, zone, forward, limits, closed_to: _ } = settings;
        let forwarder = Forwarder::start(forward, tables.clone(), conditions.clone(), tasks);
        let core = Arc::new(Core::new(forwarder, zone.is_some(), &limits, Instant::now()));
        let dns = Self {
            core,
            counters: std::iter::repeat_with(Counters::default).take(serve::threads() + 1).collect(),
            listening: Listening::default(),
            guard,
            zone: zone.clone(),
        };
        let (core, counters) = (Arc::clone(&dns.core), Arc::clone(&dns.counters));
        let (listening, guard) = (dns.listening.clone(), dns.guard.clone());
        let (conditions, of_tasks) = (conditions.clone(), tasks.clone());
        tasks.spawn(async move {
            let mut follow = zone.map(|zone| Follow { zone, to: Arc::clone(&core), tables });
            // No query finds less than the table that is there already.
            if let Some(follow) = &mut follow {
                follow.publish().await;
            }
            for address in listen {
                serve::listen(address, &core, &counters, &listening, &guard, &conditions, &of_tasks);
            }
            if let Some(follow) = follow {
                follow.run(&of_tasks).await;
            }
        });
        dns
    }

    /// Its zone, also for others; None where all names are asked of upstreams.
    pub fn zones(&self) -> Option<Zones> {
        self.zone.as_ref().map(|_| Zones(Source::Dns(Arc::clone(&self.core))))
    }

    /// What `status` says of it.
    pub fn status(&self) -> DnsStatus {
        DnsStatus {
            listeners: self.listening.list(),
            closed_to: self.guard.refused(),
            domain: self.zone.as_ref().map(|zone| zone.domain.to_string()),
            forwarder: self.core.forwarder().status(),
        }
    }

    /// What was counted since the start.
    pub fn stats(&self) -> Stats {
        Stats::sum(self.counters.iter())
    }
}

/// The cluster's names, for who wants to look one up and sends no queries. Clones are one.
#[derive(Clone, Debug)]
pub struct Zones(Source);

#[derive(Clone, Debug)]
enum Source {
    Dns(Arc<Core>),
    Own(watch::Receiver<Option<Arc<Zone>>>),
}

impl Zones {
    /// Makes zones of tables until the agent stops, where DNS has none to share.
    pub fn follow(zone: ZoneSettings, tables: watch::Receiver<Arc<ServiceTable>>, tasks: &Tasks) -> Self {
        let (publish, zones) = watch::channel(None);
        let (mut follow, of_tasks) = (Follow { zone, to: publish, tables }, tasks.clone());
        tasks.spawn(async move {
            follow.publish().await;
            follow.run(&of_tasks).await;
        });
        Self(Source::Own(zones))
    }

    /// The newest; None before the first.
    pub fn newest(&self) -> Option<Arc<Zone>> {
        match &self.0 {
            Source::Dns(core) => core.zone(),
            Source::Own(zones) => zones.borrow().clone(),
        }
    }
}

/// Where zones go.
trait Publish {
    fn newest(&self) -> Option<Arc<Zone>>;
    fn publish(&self, zone: Arc<Zone>);
}

impl Publish for Arc<Core> {
    fn newest(&self) -> Option<Arc<Zone>> {
        self.zone()
    }

    fn publish(&self, zone: Arc<Zone>) {
        Core::publish(self, zone);
    }
}

impl Publish for watch::Sender<Option<Arc<Zone>>> {
    fn newest(&self) -> Option<Arc<Zone>> {
        self.borrow().clone()
    }

    fn publish(&self, zone: Arc<Zone>) {
        self.send_replace(Some(zone));
    }
}

/// Makes a zone of each table.
struct Follow<P> {
    zone: ZoneSettings,
    to: P,
    tables: watch::Receiver<Arc<ServiceTable>>,
}

impl<P: Publish> Follow<P> {
    async fn publish(&mut self) {
        let table = Arc::clone(&self.tables.borrow_and_update());
        let (settings, previous) = (self.zone.clone(), self.to.newest());
        let built = tokio::task::spawn_blocking(move || Zone::build(&table, &settings, previous.as_deref())).await;
        match built {
            Ok(zone) => self.to.publish(Arc::new(zone)),
            Err(error) => warn!("names stay those of the Services of before: their zone could not be built: {error}"),
        }
    }

    async fn run(mut self, tasks: &Tasks) {
        let stop = tasks.stopping();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                changed = self.tables.changed() => if changed.is_err() { return },
            }
            self.publish().await;
        }
    }
}
