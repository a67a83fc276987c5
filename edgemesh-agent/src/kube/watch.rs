//! The sources `in-cluster` and `manual`: lists and watches the API server.
//!
//! The loop is the one of client-go's reflector, with `kube::Api` underneath. `kube::runtime::watcher` does not serve
//! here: it does not tell that an interrupted watch was taken up again, so a condition could never be cleared on a quiet
//! cluster; it puts no bound on a list; and it retries a watch that is answered 410 without listing anew.
//!
//! Nothing is ever removed because of an error: [`Event::Replace`](crate::model::Event::Replace) follows only from a list that was read to its end, and
//! from none that is empty where no cluster's is.
//!
//! Services and one of the two endpoint kinds are needed for [`Event::Synced`](crate::model::Event::Synced). Nodes and DestinationRules are waited for
//! only as long as the server has not refused them, or said that it has no such thing, and not for long.

pub(super) mod limit;
mod pauses;
mod rules;
mod session;

use std::time::{Duration, SystemTime};

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use kube::Client;
use tokio::{
    sync::{Mutex, Notify},
    time::{sleep, timeout},
};
use tracing::info;

use self::{limit::Limiter, pauses::Pauses, session::Session};
use super::{Error, Events, SourceState, client::ApiServer, client::chain, events::Closed, listed::Listed};
use crate::{conditions::Conditions, config::SourceConfig, lifecycle::Tasks, model::Kind};

const UNREACHABLE: &str = "ApiServerUnreachable";
const FORBIDDEN: &str = "ApiServerForbidden";
const ANSWER: &str = "ApiServerError";
const CREDENTIALS: &str = "ApiServerCredentials";

/// For answers that are not streamed: discovery, and one page of a list.
#[cfg(not(test))]
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
#[cfg(test)]
const ANSWER_TIMEOUT: Duration = Duration::from_secs(8);
/// How often a server that has no EndpointSlices is asked whether it has them by now, as after an upgrade.
#[cfg(not(test))]
const RECHECK: Duration = Duration::from_secs(300);
#[cfg(test)]
const RECHECK: Duration = Duration::from_millis(50);

/// Starts the source.
pub(super) fn start(
    server: ApiServer,
    config: &SourceConfig,
    events: Events,
    conditions: Conditions,
    tasks: &Tasks,
) -> Result<SourceState, Error> {
    let state = SourceState::new(config.kind.name(), server.url.clone(), SystemTime::now());
    let source = Source {
        server,
        limiter: Limiter::new(config.qps, config.burst),
        events,
        conditions,
        state: state.clone(),
        listed: Listed::default(),
        turn: Mutex::default(),
        answers: Notify::new(),
    };
    let stop = tasks.stopping();
    tasks.spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = source.events.closed() => {}
            () = source.run() => {}
        }
    });
    Ok(state)
}

struct Source {
    server: ApiServer,
    limiter: Limiter,
    events: Events,
    conditions: Conditions,
    state: SourceState,
    listed: Listed,
    /// Whose turn it is to try a server that does not answer.
    turn: Mutex<()>,
    /// It has answered.
    answers: Notify,
}

/// A request that came to nothing.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    #[error("the answer has no resourceVersion, so the resource cannot be watched")]
    NoVersion,
    #[error("the list is empty, which no cluster's is, so the last known state is served on")]
    Empty,
}

/// What a [`Failure`] means for what to do next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Meaning {
    /// The resourceVersion is too old: list again.
    Expired,
    /// The server does not have the resource.
    NotServed,
    Forbidden,
    /// It answered, but not with what was asked for.
    Answered,
    Unreachable,
}

impl Failure {
    fn meaning(&self) -> Meaning {
        match self {
            Self::Api(kube::Error::Api(status)) => match status.code {
                410 => Meaning::Expired,
                404 => Meaning::NotServed,
                401 | 403 => Meaning::Forbidden,
                _ => Meaning::Answered,
            },
            Self::Api(kube::Error::SerdeError(_)) | Self::NoVersion | Self::Empty => Meaning::Answered,
            Self::Api(_) | Self::TimedOut(_) => Meaning::Unreachable,
        }
    }

    fn detail(&self) -> String {
        match self {
            Self::Api(kube::Error::Api(status)) => {
                let message = status.message.split_whitespace().collect::<Vec<_>>().join(" ");
                format!("{} {message}", status.code).trim_end().to_owned()
            }
            Self::Api(_) | Self::TimedOut(_) | Self::NoVersion | Self::Empty => chain(self),
        }
    }
}

impl Source {
    async fn run(&self) {
        let (_, _, _, _, _) = tokio::join!(
            self.services(),
            self.endpoints(),
            self.nodes(),
            self.destination_rules(),
            self.listed.stop_waiting_for_others(&self.events),
        );
    }

    /// Nodes only refine what Services do, and an account may not be allowed to see them: they hold nothing back.
    async fn nodes(&self) -> Result<(), Closed> {
        let mut pauses = Pauses::default();
        loop {
            Session::<core::Node>::new(self, Kind::Node, (), None).follow().await?;
            sleep(pauses.next()).await;
        }
    }

    async fn services(&self) -> Result<(), Closed> {
        let mut pauses = Pauses::default();
        loop {
            Session::<core::Service>::new(self, Kind::Service, (), None).follow().await?;
            sleep(pauses.next()).await;
        }
    }

    async fn endpoints(&self) -> Result<(), Closed> {
        let mut pauses = Pauses::default();
        loop {
            let slices = self.serves_slices().await;
            info!(
                slices,
                "the API server answered whether it serves EndpointSlices of version v1; else Endpoints are used"
            );
            // What was wrong with the kind that is not used no longer matters.
            self.allowed(if slices { "endpoints" } else { "endpointslices.discovery.k8s.io" });
            if slices {
                let other = Some(Kind::Endpoints);
                Session::<discovery::EndpointSlice>::new(self, Kind::EndpointSlice, (), other).follow().await?;
            } else {
                let other = Some(Kind::EndpointSlice);
                let session = Session::<core::Endpoints>::new(self, Kind::Endpoints, (), other);
                tokio::select! {
                    ended = session.follow() => ended?,
                    // What the Endpoints said stays until the slices are there.
                    () = self.slices_appear() => {}
                }
            }
            sleep(pauses.next()).await;
        }
    }

    async fn slices_appear(&self) {
        loop {
            sleep(RECHECK).await;
            if self.serves_slices().await {
                return;
            }
        }
    }

    /// Asks until it is answered.
    async fn serves_slices(&self) -> bool {
        const VERSION: &str = "discovery.k8s.io/v1";
        let mut pauses = Pauses::default();
        loop {
            self.limiter.permit().await;
            let failure = match bounded(self.client().list_api_group_resources(VERSION)).await {
                Ok(list) => {
                    self.answered();
                    self.allowed(VERSION);
                    return list.resources.iter().any(|resource| resource.name == "endpointslices");
                }
                Err(failure) => failure,
            };
            if failure.meaning() == Meaning::NotServed {
                self.answered();
                self.allowed(VERSION);
                return false;
            }
            self.failed("get", VERSION, &failure);
            self.pause(&mut pauses, failure.meaning()).await;
        }
    }

    /// A client with the credentials that are on disk now.
    fn client(&self) -> Client {
        let (client, problem) = self.server.client();
        match problem {
            None => self.conditions.clear(CREDENTIALS, ""),
            Some(problem) => {
                let message = format!(
                    "cannot use the changed credentials for the API server {}: {problem}; correct them, the earlier ones \
                     are used meanwhile",
                    self.server.url
                );
                self.conditions.raise(CREDENTIALS, "", message, SystemTime::now());
            }
        }
        client
    }

    /// Waits for the next attempt after one that failed.
    ///
    /// While the server does not answer, only one request after the other tries it; all go on once one was answered.
    async fn pause(&self, pauses: &mut Pauses, meaning: Meaning) {
        let pause = pauses.after(meaning);
        if meaning != Meaning::Unreachable {
            return sleep(pause).await;
        }
        let answered = self.answers.notified();
        let turn = async {
            let _turn = self.turn.lock().await;
            sleep(pause).await;
        };
        tokio::select! {
            () = answered => {}
            () = turn => {}
        }
    }

    /// The server can be reached.
    fn answered(&self) {
        self.conditions.clear(UNREACHABLE, "");
        self.state.connected(SystemTime::now());
        self.answers.notify_waiters();
    }

    /// The server gives what it was asked for.
    fn allowed(&self, resource: &str) {
        self.conditions.clear(FORBIDDEN, resource);
        self.conditions.clear(ANSWER, resource);
    }

    fn failed(&self, verb: &str, resource: &str, failure: &Failure) {
        let now = SystemTime::now();
        let (url, detail) = (&self.server.url, failure.detail());
        let (reason, subject, message) = match failure.meaning() {
            Meaning::Forbidden => {
                let todo = if matches!(failure, Failure::Api(kube::Error::Api(status)) if status.code == 401) {
                    "check the token or client certificate it uses".to_owned()
                } else {
                    format!("bind a ClusterRole that grants list and watch on {resource} to its account")
                };
                (FORBIDDEN, resource, format!("the API server {url} refuses to {verb} {resource}: {detail}; {todo}"))
            }
            Meaning::Unreachable => {
                let todo =
                    "check the address, the network and the certificates; the last known state is served meanwhile";
                (UNREACHABLE, "", format!("cannot reach the API server {url}: {detail}; {todo}"))
            }
            Meaning::Answered | Meaning::Expired | Meaning::NotServed => {
                let todo = "check that this is a Kubernetes API server, and its log";
                (ANSWER, resource, format!("the API server {url} failed to {verb} {resource}: {detail}; {todo}"))
            }
        };
        if reason == UNREACHABLE {
            self.state.failed(message.clone(), now);
        } else {
            self.conditions.clear(UNREACHABLE, "");
            self.state.refused(message.clone(), now);
            self.answers.notify_waiters();
        }
        self.conditions.raise(reason, subject, message, now);
    }
}

async fn bounded<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, Failure> {
    timeout(ANSWER_TIMEOUT, request).await.map_err(|_| Failure::TimedOut(ANSWER_TIMEOUT))?.map_err(Failure::Api)
}

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
