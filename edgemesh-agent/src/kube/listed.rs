//! When a source of lists has told everything.
//!
//! Services and one of the two endpoint kinds are needed for [`Event::Synced`]; Nodes and DestinationRules are waited for,
//! but not for long.

use std::{
    sync::atomic::{AtomicU8, Ordering},
    time::{Duration, Instant},
};

use tokio::{sync::Notify, time::sleep};

use super::{Events, events::Closed};
use crate::model::{Event, Kind};

/// How long Nodes and rules may take once Services and endpoints are known.
pub(super) const GRACE: Duration = Duration::from_secs(5);

/// What has been listed at least once.
#[derive(Debug, Default)]
pub(super) struct Listed {
    kinds: AtomicU8,
    /// Services and endpoints have been.
    essential: Notify,
}

impl Listed {
    const SERVICES: u8 = 1;
    const ENDPOINTS: u8 = 2;
    const NODES: u8 = 4;
    const RULES: u8 = 8;
    const ESSENTIAL: u8 = Self::SERVICES | Self::ENDPOINTS;
    const ALL: u8 = Self::ESSENTIAL | Self::NODES | Self::RULES;

    /// Notes that everything of a kind has been delivered, or that nothing of it will be.
    pub(super) async fn note(&self, kind: Kind, events: &Events) -> Result<(), Closed> {
        if self.complete_with(kind) {
            events.send(Event::Synced, Instant::now()).await?;
        }
        Ok(())
    }

    /// Goes without Nodes and rules that are not there [`GRACE`] after Services and endpoints are.
    pub(super) async fn stop_waiting_for_others(&self, events: &Events) -> Result<(), Closed> {
        self.essential.notified().await;
        sleep(GRACE).await;
        self.note(Kind::Node, events).await?;
        self.note(Kind::DestinationRule, events).await
    }

    /// Says whether `kind` was the last that was missing.
    fn complete_with(&self, kind: Kind) -> bool {
        let kind = match kind {
            Kind::Service => Self::SERVICES,
            Kind::EndpointSlice | Kind::Endpoints => Self::ENDPOINTS,
            Kind::Node => Self::NODES,
            Kind::DestinationRule => Self::RULES,
        };
        let before = self.kinds.fetch_or(kind, Ordering::SeqCst);
        let now = before | kind;
        if now & Self::ESSENTIAL == Self::ESSENTIAL {
            self.essential.notify_one();
        }
        before != Self::ALL && now == Self::ALL
    }
}
