//! Metadata sources: where Services and endpoints come from.
//!
//! A source is a task that sends [`Event`](crate::model::Event)s into a bounded channel: [`start`] chooses it by the configuration. It says
//! what is wrong through [`Conditions`], what it has and since when through [`SourceState`], and never takes anything
//! away because of an error of its own.

mod client;
mod convert;
mod events;
mod invalid;
mod listed;
mod manifest;
mod meta_server;
mod state;
mod static_dir;
mod watch;

use std::{collections::BTreeMap, path::PathBuf};

use tokio::sync::oneshot;

pub use self::{
    events::{Events, Received},
    state::{SourceHealth, SourceState, SourceStatus},
};
use crate::{
    conditions::Conditions,
    config::{SourceConfig, SourceKind},
    lifecycle::Tasks,
    model::Kind,
};

/// Why a source cannot even begin; everything that may pass by itself is a condition instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Missing, unreadable or malformed, or it names files that are.
    #[error("cannot use the kubeconfig {}: {cause}; correct the file, or kubeAPIConfig.kubeConfig", path.display())]
    Kubeconfig { path: PathBuf, cause: String },
    /// Not a URL.
    #[error(
        "cannot use {url:?} as the API server's URL: {cause}; correct kubeAPIConfig.master, for example https://10.0.0.1:6443"
    )]
    Master { url: String, cause: String },
    /// Not in a pod, or the pod has no ServiceAccount token.
    #[error(
        "cannot use the pod's ServiceAccount: {cause}; run as a pod with automountServiceAccountToken, or set \
         kubeAPIConfig.kubeConfig or kubeAPIConfig.staticDirectory"
    )]
    InCluster { cause: String },
    /// Certificates, keys or tokens that do not fit together.
    #[error(
        "cannot set up a client for the API server {server}: {cause}; check the credentials and certificates given for it"
    )]
    Client { server: String, cause: String },
    /// Certificates or keys for metaServer that are missing or unusable.
    #[error(
        "cannot set up a client for metaServer at {server}: {cause}; correct the files, or \
         kubeAPIConfig.metaServer.security"
    )]
    MetaServer { server: String, cause: String },
    /// Missing, no directory, or not readable.
    #[error("cannot read the manifest directory {}: {cause}; create it, or correct kubeAPIConfig.staticDirectory", path.display())]
    Directory { path: PathBuf, cause: std::io::Error },
    /// The kernel gives no inotify instance.
    #[error("cannot watch for changes of files: {0}; raise the sysctl fs.inotify.max_user_instances")]
    Inotify(std::io::Error),
}

/// What a snapshot that is in force was complete as of ([`Event::Reached`](crate::model::Event::Reached)), by kind; nothing where there is none. A source
/// that needs it waits for it: the sender is to be used or dropped.
pub type Restored = oneshot::Receiver<BTreeMap<Kind, u64>>;

/// Starts the configured source for `node` on `tasks`; must be called within a tokio runtime.
///
/// What it finds goes to `events`: `Replace` for each kind, then `Synced`, then changes. The source
/// ends when the receiver is dropped or the agent stops.
///
/// # Errors
///
/// [`Error`] for what the operator must correct first. An API server that cannot be reached is none: the source keeps
/// trying and raises `ApiServerUnreachable`. Nor is metaServer.
pub fn start(
    config: &SourceConfig,
    node: &str,
    events: Events,
    restored: Restored,
    conditions: Conditions,
    tasks: &Tasks,
) -> Result<SourceState, Error> {
    match &config.kind {
        SourceKind::Static { directory } => static_dir::start(directory, events, conditions, tasks),
        SourceKind::MetaServer(meta_server) => {
            meta_server::start(meta_server, config, node, events, restored, conditions, tasks)
        }
        SourceKind::InCluster => watch::start(client::in_cluster()?, config, events, conditions, tasks),
        SourceKind::Kubeconfig { path, master } => {
            watch::start(client::kubeconfig(path.as_deref(), master.as_deref())?, config, events, conditions, tasks)
        }
    }
}

/// Every cluster has a Service `default/kubernetes` with its endpoints, and this very Node: an empty list of them says
/// that something is broken. Of rules there may be none.
fn may_be_empty(kind: Kind) -> bool {
    match kind {
        Kind::DestinationRule => true,
        Kind::Service | Kind::Endpoints | Kind::EndpointSlice | Kind::Node => false,
    }
}
