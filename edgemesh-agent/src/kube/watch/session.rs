//! One resource: list it, watch it, and list again when the watch cannot go on.

use std::{
    collections::HashSet,
    fmt::Debug,
    hash::{DefaultHasher, Hash, Hasher},
    pin::pin,
    time::{Duration, SystemTime},
};

use futures::StreamExt;
use kube::{
    Api, Resource, ResourceExt,
    api::{ListParams, WatchEvent, WatchParams},
};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};

use super::{ANSWER, Failure, Meaning, Pauses, Source, bounded};
use crate::{
    kube::{
        convert::Convert,
        events::Closed,
        invalid::{Invalid, convert, subject},
        may_be_empty,
    },
    model::{Event, Kind, NamespacedName},
};

/// As client-go: keeps the memory of both sides bounded.
const PAGE: u32 = 500;
/// The server is asked to end a watch after so many seconds, as kube and client-go do (5 to 10 minutes there).
const WATCH_SECONDS: u32 = 290;
/// A watch that brings nothing for longer than the server was asked for is dead.
const WATCH_IDLE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 15);
/// A watch that ends sooner did not work.
const WATCH_MINIMUM: Duration = Duration::from_secs(1);

/// Follows all objects of one kind.
pub(super) struct Session<'a, K: Resource> {
    source: &'a Source,
    /// Which version of the resource, where it has several.
    api: K::DynamicType,
    kind: Kind,
    resource: String,
    /// The kind that is not watched because this one is.
    instead_of: Option<Kind>,
    /// Hashes of the names of all objects delivered: enough to count them.
    delivered: HashSet<u64>,
    invalid: Invalid,
}

/// Why a list or watch came to nothing, and the version from which to watch on, where that is still known.
enum Trouble {
    Closed,
    Request { failure: Failure, resume: Option<String> },
}

impl From<Closed> for Trouble {
    fn from(Closed: Closed) -> Self {
        Self::Closed
    }
}

impl<'a, K> Session<'a, K>
where
    K: Resource + Convert + Clone + Debug + DeserializeOwned + Send + 'static,
{
    pub(super) fn new(source: &'a Source, kind: Kind, api: K::DynamicType, instead_of: Option<Kind>) -> Self {
        let group = K::group(&api);
        let dot = if group.is_empty() { "" } else { "." };
        let resource = format!("{}{dot}{group}", K::plural(&api));
        let invalid = Invalid::new(source.conditions.clone());
        Self { source, api, kind, resource, instead_of, delivered: HashSet::new(), invalid }
    }

    /// Returns when the server says that it does not have the resource.
    ///
    /// # Errors
    ///
    /// The receiver of events is gone.
    pub(super) async fn follow(mut self) -> Result<(), Closed> {
        let mut pauses = Pauses::default();
        let mut version = None;
        let (mut in_vain, mut expired) = (false, false);
        loop {
            let begun = Instant::now();
            let verb = if version.is_some() { "watch" } else { "list" };
            let watched = version.is_some();
            let ended = match version.take() {
                None => self.list().await,
                Some(version) => self.watch(version).await,
            };
            match ended {
                Ok(reached) => {
                    version = Some(reached);
                    if watched && begun.elapsed() < WATCH_MINIMUM {
                        // One may have been bad luck. More are a server that ends every watch, which must not make
                        // this a tight loop.
                        if in_vain {
                            sleep(pauses.next()).await;
                        }
                        in_vain = true;
                    } else if watched {
                        (in_vain, expired) = (false, false);
                        pauses.reset();
                    }
                }
                Err(Trouble::Closed) => return Err(Closed),
                Err(Trouble::Request { failure, resume }) => {
                    version = resume;
                    match failure.meaning() {
                        Meaning::Expired => {
                            info!(resource = self.resource, "the resource version has expired; listing again");
                            version = None;
                            // Usual after a long absence, whose long pauses must not delay the list any further.
                            if !std::mem::replace(&mut expired, true) {
                                pauses.reset();
                                continue;
                            }
                        }
                        Meaning::NotServed => {
                            // Custom resources come and go; that Kubernetes' own are missing is a fault.
                            if self.kind != Kind::DestinationRule {
                                self.source.failed(verb, &self.resource, &failure);
                            }
                            self.go_without().await?;
                            return Ok(());
                        }
                        Meaning::Forbidden | Meaning::Answered => {
                            self.source.failed(verb, &self.resource, &failure);
                            self.go_without().await?;
                        }
                        Meaning::Unreachable => self.source.failed(verb, &self.resource, &failure),
                    }
                    self.source.pause(&mut pauses, failure.meaning()).await;
                }
            }
        }
    }

    /// What the server refuses may be missing for good, which only matters where nothing works without it.
    async fn go_without(&self) -> Result<(), Closed> {
        match self.kind {
            Kind::Node | Kind::DestinationRule => self.source.listed.note(self.kind, &self.source.events).await,
            Kind::Service | Kind::EndpointSlice | Kind::Endpoints => Ok(()),
        }
    }

    fn api(&self) -> Api<K> {
        Api::all_with(self.source.client(), &self.api)
    }

    /// Gives the version from which to watch.
    async fn list(&mut self) -> Result<String, Trouble> {
        let failed = |failure| Trouble::Request { failure, resume: None };
        let (mut objects, mut invalid, mut token) = (Vec::new(), Vec::new(), None::<String>);
        let mut empty = true;
        let version = loop {
            let mut params = ListParams::default().limit(PAGE);
            params.continue_token = token;
            self.source.limiter.permit().await;
            let page = bounded(self.api().list(&params)).await.map_err(failed)?;
            self.source.answered();
            empty &= page.items.is_empty();
            for item in page.items {
                let (object, problem) = convert(&item, self.kind);
                objects.extend(object);
                invalid.extend(problem);
            }
            token = page.metadata.continue_.filter(|token| !token.is_empty());
            if token.is_none() {
                break page.metadata.resource_version.filter(|version| !version.is_empty());
            }
        };
        let version = version.ok_or_else(|| failed(Failure::NoVersion))?;
        if empty && !may_be_empty(self.kind) {
            return Err(failed(Failure::Empty));
        }
        // Not `allowed` yet: an account that may list but not watch would make that condition come and go.
        self.source.conditions.clear(ANSWER, &self.resource);
        debug!(resource = self.resource, objects = objects.len(), version, "listed");

        self.invalid.replace(&invalid);
        self.delivered = objects.iter().map(|object| fingerprint(object.name())).collect();
        self.source.state.count(self.kind, objects.len());
        self.source.state.synced(SystemTime::now());
        self.send(Event::Replace(self.kind, objects)).await?;
        if let Some(other) = self.instead_of {
            self.source.state.count(other, 0);
            self.send(Event::Replace(other, Vec::new())).await?;
        }
        self.source.listed.note(self.kind, &self.source.events).await?;
        Ok(version)
    }

    /// Gives the version that was reached when the watch ended.
    async fn watch(&mut self, mut version: String) -> Result<String, Trouble> {
        let params = WatchParams::default().timeout(WATCH_SECONDS);
        self.source.limiter.permit().await;
        let stream = bounded(self.api().watch(&params, &version)).await;
        let failed = |failure, version: String| Trouble::Request { failure, resume: Some(version) };
        let stream = match stream {
            Ok(stream) => stream,
            Err(failure) => return Err(failed(failure, version)),
        };
        self.source.answered();
        self.source.allowed(&self.resource);
        let mut stream = pin!(stream);
        loop {
            let Ok(Some(next)) = timeout(WATCH_IDLE, stream.next()).await else {
                // Regular: the server ends each watch after a while, and networks do so too. What is wrong, if
                // anything, shows when the next one begins.
                return Ok(version);
            };
            match next {
                Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                    advance(&mut version, object.resource_version());
                    self.apply(&object).await?;
                }
                Ok(WatchEvent::Deleted(object)) => {
                    advance(&mut version, object.resource_version());
                    if let Ok(name) = object.model_name() {
                        self.invalid.report(&subject(self.kind, &object), None);
                        self.remove(name).await?;
                    }
                }
                Ok(WatchEvent::Bookmark(bookmark)) => advance(&mut version, Some(bookmark.metadata.resource_version)),
                Ok(WatchEvent::Error(status)) => return Err(failed(kube::Error::Api(status).into(), version)),
                // The change it told of is unknown now.
                Err(kube::Error::SerdeError(error)) => {
                    let failure = Failure::Api(kube::Error::SerdeError(error));
                    return Err(Trouble::Request { failure, resume: None });
                }
                Err(kube::Error::Api(status)) => return Err(failed(kube::Error::Api(status).into(), version)),
                Err(error) => {
                    debug!(resource = self.resource, %error, "the watch was interrupted");
                    return Ok(version);
                }
            }
        }
    }

    async fn apply(&mut self, item: &K) -> Result<(), Closed> {
        let (object, problem) = convert(item, self.kind);
        self.invalid.report(&subject(self.kind, item), problem.as_ref().map(|problem| problem.text.as_str()));
        match object {
            Some(object) => {
                self.delivered.insert(fingerprint(object.name()));
                self.source.state.count(self.kind, self.delivered.len());
                self.send(Event::Apply(object)).await
            }
            // Its former content is known to be out of date.
            None => match item.model_name() {
                Ok(name) => self.remove(name).await,
                Err(_) => Ok(()),
            },
        }
    }

    async fn remove(&mut self, name: NamespacedName) -> Result<(), Closed> {
        self.delivered.remove(&fingerprint(&name));
        self.source.state.count(self.kind, self.delivered.len());
        self.send(Event::Delete(self.kind, name)).await
    }

    async fn send(&self, event: Event) -> Result<(), Closed> {
        self.source.events.send(event, Instant::now().into_std()).await
    }
}

fn fingerprint(name: &NamespacedName) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

fn advance(version: &mut String, newer: Option<String>) {
    if let Some(newer) = newer.filter(|newer| !newer.is_empty()) {
        *version = newer;
    }
}
