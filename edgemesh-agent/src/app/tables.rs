//! The task between the source and everything downstream: events in, tables out, and a snapshot of it all on disk.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{mpsc, oneshot, watch};

use super::{
    EVENTS, SightOfRules,
    aliases::{Change, Ways},
};
use crate::{
    conditions::Conditions,
    dataplane::Latency,
    kube::Received,
    lifecycle::Blocker,
    model::{Builder, Event, Note, ServiceTable},
    snapshot::Snapshot,
};

const NODE_UNKNOWN: &str = "NodeUnknown";
/// A source that has sent nothing for so long has nothing more to send for now.
const QUIET: Duration = Duration::from_secs(2);
/// One that goes on and on is waited for no longer than this.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the task works with.
pub(super) struct Tables {
    pub(super) builder: Builder,
    pub(super) received: mpsc::Receiver<Received>,
    pub(super) publish: Publisher,
    /// None where none is kept.
    pub(super) snapshot: Option<Snapshot>,
    /// Tells how many frontends the kernel serves already; nothing where there is no data plane.
    pub(super) adopted: oneshot::Receiver<usize>,
    /// None without a tunnel.
    pub(super) ways: Option<Ways>,
}

impl Tables {
    /// Runs until the source ends; `unready` is dropped with the first complete table.
    ///
    /// Events that have queued up while a table was made go into the next one together, so a burst costs a few tables and
    /// a single event is passed on at once.
    pub(super) async fn run(mut self, unready: Blocker) {
        let mut unready = Some(unready);
        if let Some(ways) = &mut self.ways {
            ways.begin(&mut self.builder).await;
        }
        let mut handover = self.restore().await;
        if handover.as_ref().is_some_and(|handover| handover.held_until.is_none()) {
            self.publish_what_is_new(None, &mut unready);
        }
        let mut batch = Vec::with_capacity(EVENTS);
        loop {
            let held_until = handover.as_ref().and_then(|handover| handover.held_until);
            let mut since = None;
            tokio::select! {
                count = self.received.recv_many(&mut batch, EVENTS) => {
                    if count == 0 {
                        break;
                    }
                    let synced = batch.iter().any(|received| matches!(received.event, Event::Synced));
                    since = batch.iter().map(|received| received.at).min().filter(|_| handover.is_none());
                    if self.ways.is_some() {
                        self.builder.tell_time(Instant::now());
                    }
                    for received in batch.drain(..) {
                        self.take(received.event);
                    }
                    handover = handover.and_then(|handover| handover.heard(synced, Instant::now()));
                    if handover.is_some() {
                        continue;
                    }
                }
                () = at(held_until) => handover = handover.and_then(Handover::passed),
                change = changed(&mut self.ways) => {
                    if let Some(ways) = &mut self.ways {
                        ways.apply(change, &mut self.builder);
                        // Also while no table is made: what is due is then done, and not asked for again at once.
                        ways.follow(&self.builder, None);
                    }
                    if handover.is_some() {
                        continue;
                    }
                }
                () = due(&mut self.snapshot) => {
                    if let Some(snapshot) = &mut self.snapshot {
                        snapshot.write(&self.builder, SystemTime::now());
                    }
                    continue;
                }
            }
            self.publish_what_is_new(since, &mut unready);
            // The builder has the thread for as long as it likes; let others have it now and then.
            tokio::task::yield_now().await;
        }
        drop(unready);
        if let Some(ways) = self.ways {
            ways.finish(&self.builder).await;
        }
        if let Some(snapshot) = self.snapshot {
            snapshot.finish(&self.builder).await;
        }
    }

    /// Gives the builder what the snapshot holds; None where there is nothing.
    async fn restore(&mut self) -> Option<Handover> {
        if !self.snapshot.as_mut()?.restore(&mut self.builder).await {
            return None;
        }
        // An agent without a data plane drops the sender.
        let adopted = (&mut self.adopted).await.unwrap_or(0);
        Some(Handover::new(adopted > 0, Instant::now()))
    }

    fn take(&mut self, event: Event) {
        let more = self.snapshot.as_mut().and_then(|snapshot| snapshot.note(&event, SystemTime::now()));
        self.builder.apply(event);
        if let Some(more) = more {
            self.builder.apply(more);
        }
        if let Some(snapshot) = &mut self.snapshot {
            snapshot.follow(&self.builder);
        }
    }

    fn publish_what_is_new(&mut self, since: Option<Instant>, unready: &mut Option<Blocker>) {
        let table = self.builder.build();
        if let Some(ways) = &mut self.ways {
            ways.follow(&self.builder, table.as_deref());
        }
        if let Some(table) = table {
            if table.complete {
                *unready = None;
            }
            self.publish.publish(table, since);
        }
    }
}

/// From what a snapshot held to what the source delivers, without a table of half of each.
///
/// Lists come kind by kind. Services of today with the endpoints of last week would be in force for as long as it takes,
/// so while the lists come in, no table is published: not before the source has delivered everything, nor for longer
/// than it goes on delivering.
///
/// Where an earlier agent left frontends in force, not even the restored table is published at once. What the kernel has
/// is at least as new as the snapshot, which is written a moment after a change, and may have been cut off by the kill.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Handover {
    /// Until when no table is published; None while the restored one is in force, and nothing has come yet.
    held_until: Option<Instant>,
    /// When the first event came.
    begun: Option<Instant>,
}

impl Handover {
    fn new(kernel_serves: bool, now: Instant) -> Self {
        Self { held_until: kernel_serves.then(|| now + QUIET), begun: None }
    }

    /// Events have come; None ends the handover.
    fn heard(self, synced: bool, now: Instant) -> Option<Self> {
        let begun = self.begun.unwrap_or(now);
        let handover = Self { held_until: Some((now + QUIET).min(begun + PATIENCE)), begun: Some(begun) };
        (!synced && now < begun + PATIENCE).then_some(handover)
    }

    /// It was waited for long enough. A source that has begun and does not go on may never, so changes are passed on as
    /// they come from now on.
    fn passed(self) -> Option<Self> {
        match self.begun {
            Some(_) => None,
            None => Some(Self { held_until: None, begun: None }),
        }
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

async fn changed(ways: &mut Option<Ways>) -> Change {
    match ways {
        Some(ways) => ways.changed().await,
        None => std::future::pending().await,
    }
}

async fn due(snapshot: &mut Option<Snapshot>) {
    match snapshot {
        Some(snapshot) => snapshot.due().await,
        None => std::future::pending().await,
    }
}

/// Where tables go.
pub(super) struct Publisher {
    pub(super) tables: watch::Sender<Arc<ServiceTable>>,
    pub(super) latency: Latency,
    pub(super) sight_of_node: SightOfNode,
    pub(super) sight_of_rules: SightOfRules,
}

impl Publisher {
    fn publish(&mut self, table: Arc<ServiceTable>, since: Option<Instant>) {
        if table.complete
            && let Some(since) = since
        {
            self.latency.built(table.generation, since);
        }
        self.tables.send_replace(Arc::clone(&table));
        // Afterwards: nobody waits for it.
        if table.complete {
            let now = SystemTime::now();
            self.sight_of_node.report(&table, now);
            self.sight_of_rules.report(&table.unheeded, now);
        }
    }
}

/// Says so where this node's own object is missing and a Service wants to know something of it.
pub(super) struct SightOfNode {
    pub(super) name: String,
    pub(super) conditions: Conditions,
}

impl SightOfNode {
    fn report(&self, table: &ServiceTable, now: SystemTime) {
        let concerned = || table.services.iter().filter(|entry| entry.notes.contains(&Note::NodeUnknown)).count();
        let concerned = if table.node_known { 0 } else { concerned() };
        if concerned == 0 {
            self.conditions.clear(NODE_UNKNOWN, &self.name);
            return;
        }
        let message = format!(
            "the Node {} is not known: node ports are answered on 127.0.0.1 alone, and neither zones, node groups nor \
             topologyKeys limit endpoints ({concerned} Services are concerned, see `services`); grant the agent's \
             account list and watch on nodes (or add the Node's manifest), and check NODE_NAME",
            self.name
        );
        self.conditions.raise(NODE_UNKNOWN, self.name.clone(), message, now);
    }
}

#[cfg(test)]
mod tests;
