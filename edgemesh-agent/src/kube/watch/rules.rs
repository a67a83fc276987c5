//! DestinationRules: most clusters do not have them, and those that do have them from some Istio.

use std::time::{Duration, Instant};

use hyper::Request;
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use tokio::time::sleep;
use tracing::{debug, info};

use super::{Closed, Failure, Meaning, Pauses, Session, Source, bounded};
use crate::{
    kube::convert::destination_rule::{DestinationRule, GROUP, PLURAL, VERSIONS},
    model::{Event, Kind},
};

/// How often the server is asked whether it has rules by now.
#[cfg(not(test))]
const SEARCH: Duration = Duration::from_secs(60);
#[cfg(test)]
const SEARCH: Duration = Duration::from_millis(50);

impl Source {
    /// Follows the rules in whatever version they are served; a server without them is nothing to complain about.
    pub(super) async fn destination_rules(&self) -> Result<(), Closed> {
        let mut pauses = Pauses::default();
        // To begin with there may be rules that a snapshot holds.
        let (mut known, mut missed) = (true, false);
        loop {
            if let Some(version) = self.rule_version().await? {
                info!(version, "the API server serves DestinationRules");
                (known, missed) = (true, false);
                Session::<DestinationRule>::new(self, Kind::DestinationRule, version, None).follow().await?;
                // One that says in one place what it denies in another must not be asked in a tight loop.
                sleep(pauses.next()).await;
                continue;
            }
            // What was wrong with them before no longer matters.
            self.allowed(&format!("{PLURAL}.{GROUP}"));
            self.listed.note(Kind::DestinationRule, &self.events).await?;
            // A server that is starting may not know its custom resources yet (kubernetes/kubernetes#115241): only one
            // that says so again is believed.
            if known && missed {
                info!("the API server serves no DestinationRules");
                self.state.count(Kind::DestinationRule, 0);
                self.events.send(Event::Replace(Kind::DestinationRule, Vec::new()), Instant::now()).await?;
                known = false;
            }
            missed = true;
            sleep(SEARCH).await;
        }
    }

    /// The best version in which the server has rules, if any; asks until it is answered.
    async fn rule_version(&self) -> Result<Option<&'static str>, Closed> {
        let mut pauses = Pauses::default();
        loop {
            let failure = match self.ask_for_rules().await {
                Ok(version) => {
                    self.answered();
                    self.allowed(GROUP);
                    return Ok(version);
                }
                Err(failure) => failure,
            };
            self.failed("get", GROUP, &failure);
            if matches!(failure.meaning(), Meaning::Forbidden | Meaning::Answered) {
                // As for Nodes: what is refused may stay so.
                self.listed.note(Kind::DestinationRule, &self.events).await?;
            }
            self.pause(&mut pauses, failure.meaning()).await;
        }
    }

    async fn ask_for_rules(&self) -> Result<Option<&'static str>, Failure> {
        // One request where there is nothing of Istio at all.
        let Some(group) = self.discover::<meta::APIGroup>(GROUP).await? else { return Ok(None) };
        for version in VERSIONS {
            if !group.versions.iter().any(|served| served.version == version) {
                continue;
            }
            // The group may have other resources in this version.
            let resources = self.discover::<meta::APIResourceList>(&format!("{GROUP}/{version}")).await?;
            if resources.is_some_and(|list| list.resources.iter().any(|resource| resource.name == PLURAL)) {
                return Ok(Some(version));
            }
        }
        debug!(group = GROUP, "the API server has the group, but no DestinationRules in a version that is known");
        Ok(None)
    }

    /// What the server says of an API group or version; None if it does not have it.
    async fn discover<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<Option<T>, Failure> {
        let request = Request::get(format!("/apis/{path}")).body(Vec::new()).map_err(kube::Error::HttpError)?;
        self.limiter.permit().await;
        match bounded(self.client().request::<T>(request)).await {
            Ok(answer) => Ok(Some(answer)),
            Err(failure) if failure.meaning() == Meaning::NotServed => Ok(None),
            Err(failure) => Err(failure),
        }
    }
}
