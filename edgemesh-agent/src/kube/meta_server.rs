//! The source `metaServer`: KubeEdge's API for nodes at the edge, which goes on answering when the cloud is gone, and does
//! not say so.
//!
//! What it takes to live with that are nine rules, each with its tests:
//!
//! 1. JSON alone; a list and then a watch, of a random 300 to 600 s; neither bookmarks nor `sendInitialEvents`.
//! 2. A list's version is no place to watch on from, and it may have none.
//! 3. Everything is listed again every few minutes and at each end of a watch, and compared with what is known.
//! 4. What is known never goes back: older versions of an object are ignored.
//! 5. What a list of the API server lacked and was there before it, is a ghost when it comes again.
//! 6. Nothing is taken away for an empty list, an error or a time-out: only by a DELETED event, or by two lists of the API
//!    server in a row.
//! 7. An answer that takes more than 3 s, or is empty, makes the source degraded, with the hint of KubeEdge's guide.
//! 8. The token is read anew for each request; a refusal is told by its cause.
//! 9. The agent has a snapshot of its own, which is fed by the events like everything else. It holds the version as of which
//!    it is all there was, so that rules 4 and 5 go on after a restart: else an agent that starts offline would be told of
//!    ghosts again, and of endpoints as they were stored long ago.
//!
//! The deciding is pure: [`answer`] says what the bytes mean, [`ledger`] which of them count (rules 2 to 6), [`health`]
//! how the source fares (rule 7), [`refusal`] why it is refused (rule 8). [`session`] is the loop around it, one for each
//! kind. Endpoints are read as core/v1 Endpoints, as EdgeMesh does: in lists of EndpointSlices, KubeEdge 1.12 to 1.23 and
//! later replace the endpoints of other Services by its own address (kubeedge/kubeedge#7194).

mod answer;
mod client;
mod health;
mod ledger;
mod refusal;
mod session;

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use k8s_openapi::api::core::v1 as core;
use kube::runtime::{utils::Backoff, watcher::DefaultBackoff};
use tokio::{
    sync::{Notify, watch},
    time::sleep,
};
use tracing::{debug, info, warn};

use self::{
    answer::read_list,
    client::MetaClient,
    health::{Concern, Health, REASONS, Report},
    session::{Place, Session},
};
use super::{
    Error, Events, Restored, SourceState,
    convert::destination_rule::{DestinationRule, GROUP, PLURAL, VERSIONS},
    events::Closed,
    listed::Listed,
    watch::limit::Limiter,
};
use crate::{
    conditions::Conditions,
    config::{MetaServerConfig, SourceConfig},
    kube::SourceHealth,
    lifecycle::Tasks,
    model::Kind,
};

/// How long after a list that lacks something, or the first, another one is asked for.
#[cfg(not(test))]
const CONFIRM: Duration = Duration::from_secs(1);
#[cfg(test)]
const CONFIRM: Duration = Duration::from_millis(50);
/// How often it is asked whether the cloud is back: a small request, which metaServer answers by itself while it is not.
#[cfg(not(test))]
const PROBE: Duration = Duration::from_secs(3);
#[cfg(test)]
const PROBE: Duration = Duration::from_millis(50);
/// One Service that every cluster has.
const PROBED: &str = "/api/v1/namespaces/default/services?fieldSelector=metadata.name%3Dkubernetes";

/// Starts the source for `node`; must be called within a tokio runtime.
///
/// # Errors
///
/// [`Error::MetaServer`] for certificates and keys that are missing or unusable.
pub(super) fn start(
    meta_server: &MetaServerConfig,
    config: &SourceConfig,
    node: &str,
    events: Events,
    restored: Restored,
    conditions: Conditions,
    tasks: &Tasks,
) -> Result<SourceState, Error> {
    let client = MetaClient::new(meta_server, Limiter::new(config.qps, config.burst))?;
    let state = SourceState::new(config.kind.name(), meta_server.server.clone(), SystemTime::now());
    let source = Source {
        client,
        url: meta_server.server.clone(),
        node: node.to_owned(),
        relist_period: meta_server.relist_period,
        events,
        conditions,
        state: state.clone(),
        listed: Listed::default(),
        health: Mutex::default(),
        ailing: Notify::new(),
        kick: watch::Sender::new(()),
    };
    let stop = tasks.stopping();
    tasks.spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = source.events.closed() => {}
            () = source.run(restored) => {}
        }
    });
    Ok(state)
}

struct Source {
    client: MetaClient,
    url: String,
    node: String,
    relist_period: Duration,
    events: Events,
    conditions: Conditions,
    state: SourceState,
    listed: Listed,
    health: Mutex<Health>,
    /// Woken when it becomes worth asking whether all is well again.
    ailing: Notify,
    /// Has all sessions list at once.
    kick: watch::Sender<()>,
}

impl Source {
    async fn run(&self, restored: Restored) {
        // A file of this node, without which nothing of the source would be used either.
        let reached = restored.await.unwrap_or_default();
        let reached = |kind| reached.get(&kind).copied();
        let place = |paths: Vec<String>| Place { paths, narrower: None };
        let core = |plural: &str| vec![format!("/api/v1/{plural}")];
        let rules = VERSIONS.iter().map(|version| format!("/apis/{GROUP}/{version}/{PLURAL}")).collect();
        let nodes = Place { narrower: Some(format!("metadata.name%3D{}", self.node)), ..place(core("nodes")) };
        let services =
            Session::<core::Service>::new(self, Kind::Service, place(core("services")), reached(Kind::Service));
        let endpoints =
            Session::<core::Endpoints>::new(self, Kind::Endpoints, place(core("endpoints")), reached(Kind::Endpoints));
        let nodes = Session::<core::Node>::new(self, Kind::Node, nodes, reached(Kind::Node));
        let rules =
            Session::<DestinationRule>::new(self, Kind::DestinationRule, place(rules), reached(Kind::DestinationRule));
        let kicks = || self.kick.subscribe();
        let (_, _, _, _, _, ()) = tokio::join!(
            endpoints.follow(kicks()),
            services.follow(kicks()),
            nodes.follow(kicks()),
            rules.follow(kicks()),
            self.listed.stop_waiting_for_others(&self.events),
            self.probe(),
        );
    }

    /// What is refused or broken may stay so, which only matters where nothing works without it.
    async fn go_without(&self, kind: Kind) -> Result<(), Closed> {
        if health::is_essential(kind) { Ok(()) } else { self.listed.note(kind, &self.events).await }
    }

    /// While something is not as it should be, asks for very little, and has everything listed as soon as that is
    /// answered by the API server in good time: the lists themselves may be large, and are asked for rarely.
    async fn probe(&self) {
        let mut backoff = DefaultBackoff::default();
        loop {
            if !self.with_health(|health| health.wants_probing()) {
                backoff.reset();
                self.ailing.notified().await;
                continue;
            }
            sleep(spread(PROBE, random())).await;
            if self.is_back().await {
                debug!(server = self.url, "metaServer answers as it should; listing everything");
                self.kick.send_replace(());
                // That may come to nothing again and again.
                sleep(pause_of(&mut backoff)).await;
            }
        }
    }

    async fn is_back(&self) -> bool {
        let Ok(answer) = self.client.get(PROBED).await else { return false };
        let listed = read_list::<core::Service>(&answer.body, Kind::Service);
        listed.is_ok_and(|listed| Report::of(Kind::Service, answer.took, &listed.list) == Report::Current)
    }

    fn note(&self, concern: Concern, report: Report) {
        let synced = self.with_health(|health| health.note(concern, report));
        if synced {
            self.state.synced(SystemTime::now());
        }
        self.tell();
    }

    fn forget(&self, concern: Concern) {
        self.with_health(|health| health.forget(concern));
        self.tell();
    }

    /// Has state and conditions say what [`Health`] says.
    fn tell(&self) {
        let (verdict, conditions, ailing) =
            self.with_health(|health| (health.verdict(), health.conditions(&self.url), health.wants_probing()));
        let now = SystemTime::now();
        let before = self.state.status().health;
        if before != verdict.health {
            let (health, reason) = (verdict.health.word(), verdict.reason.as_deref().unwrap_or_default());
            match verdict.health {
                SourceHealth::Connected | SourceHealth::Connecting => info!(server = self.url, health, "metaServer"),
                SourceHealth::Degraded | SourceHealth::Offline => {
                    warn!(server = self.url, health, reason, "metaServer");
                }
            }
        }
        self.state.turn(verdict.health, verdict.reason, verdict.hint, now);
        for reason in REASONS {
            let holds = |subject: &str| conditions.contains_key(&(reason, subject.to_owned()));
            self.conditions.retain(reason, holds);
        }
        for ((reason, subject), message) in conditions {
            self.conditions.raise(reason, subject, message, now);
        }
        if ailing {
            self.ailing.notify_one();
        }
    }

    fn with_health<T>(&self, look: impl FnOnce(&mut Health) -> T) -> T {
        look(&mut self.health.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How long to wait before the next attempt: 0.8 s at first, then longer and longer, at random within a factor of two.
fn pause_of(backoff: &mut DefaultBackoff) -> Duration {
    /// Where it stays.
    const LONGEST: Duration = Duration::from_secs(30);
    backoff.next().unwrap_or(LONGEST)
}

/// A tenth more or less, so that nodes that lost their link together do not come back together.
fn spread(period: Duration, random: u64) -> Duration {
    let permille = 900 + u32::try_from(random % 201).unwrap_or_default();
    period * permille / 1000
}

/// How long a watch is to last: as client-go has it, long enough to be few, and never twice the same.
fn watch_seconds(random: u64) -> u32 {
    300 + u32::try_from(random % 301).unwrap_or_default()
}

/// Random enough to keep nodes apart.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests;
