//! Clients for the API server: from the pod's ServiceAccount, or from a kubeconfig.

mod credentials;

use std::{
    error::Error as StdError,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use hyper::{Uri, http::uri::InvalidUri};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Client, Config,
    client::{ClientBuilder, ConfigExt},
    config::Kubeconfig,
};
use tower::{BoxError, util::MapErrLayer};
use tracing::info;

use self::credentials::Files;
use super::Error;

/// For TCP; TLS and the answer have the bounds of the requests.
const CONNECT: Duration = Duration::from_secs(5);
/// A watch may be silent for minutes, and a lost link says nothing: the kernel asks the other end after this long, …
const KEEPALIVE: Duration = Duration::from_secs(20);
/// … repeats it so often …
const KEEPALIVE_RETRIES: u32 = 3;
/// … at this distance, and then ends the connection.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// The same for data that nobody acknowledges.
const UNACKNOWLEDGED: Duration = Duration::from_secs(35);

/// An API server, and a client for it that follows the files its credentials come from: tokens, CAs, client certificates
/// and kubeconfigs are replaced while an agent runs.
pub(super) struct ApiServer {
    /// For messages.
    pub(super) url: String,
    load: Box<dyn Fn() -> Result<Loaded, Error> + Send + Sync>,
    current: Mutex<Current>,
}

/// What a configuration is at one time.
struct Loaded {
    config: Config,
    /// What it was read from.
    files: Files,
}

struct Current {
    client: Client,
    files: Files,
    /// Why what the files hold now cannot be used.
    problem: Option<String>,
}

impl ApiServer {
    fn new(load: impl Fn() -> Result<Loaded, Error> + Send + Sync + 'static) -> Result<Self, Error> {
        let Loaded { config, files } = load()?;
        let url = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        let current = Current { client: build(&config)?, files, problem: None };
        Ok(Self { url, load: Box::new(load), current: Mutex::new(current) })
    }

    /// A client with the credentials that are in the files now; where those cannot be used, one with the last that could,
    /// and why.
    ///
    /// kube re-reads some of these files too, by the clock and for the ServiceAccount's alone; a clock that jumps back
    /// would keep an old token for long.
    pub(super) fn client(&self) -> (Client, Option<String>) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        // What could not be used may name files that are not looked at, and become whole by them.
        if current.problem.is_some() || current.files.look_again() != current.files {
            match (self.load)().and_then(|loaded| Ok((build(&loaded.config)?, loaded.files))) {
                Ok((client, files)) => {
                    info!(server = self.url, "the credentials for the API server have changed");
                    *current = Current { client, files, problem: None };
                }
                Err(error) => current.problem = Some(error.to_string()),
            }
        }
        (current.client.clone(), current.problem.clone())
    }
}

/// Uses KUBERNETES_SERVICE_HOST, KUBERNETES_SERVICE_PORT and the mounted ServiceAccount.
///
/// # Errors
///
/// [`Error::InCluster`] outside of a pod or without a token, [`Error::Client`] where they cannot be used.
pub(super) fn in_cluster() -> Result<ApiServer, Error> {
    ApiServer::new(load_in_cluster)
}

fn load_in_cluster() -> Result<Loaded, Error> {
    let refused = |cause| Error::InCluster { cause };
    let config = Config::incluster_env().map_err(|error| refused(chain(&error)))?;
    let token = config.auth_info.token_file.as_ref().map(PathBuf::from);
    if let Some(path) = &token {
        std::fs::read(path).map_err(|error| refused(format!("{}: {error}", path.display())))?;
    }
    let files = Files::of(token.into_iter().chain(config.root_cert_file.clone()));
    Ok(Loaded { config, files })
}

/// As client-go's BuildConfigFromFlags, which EdgeMesh uses: `master` overrides the server of the kubeconfig, stands
/// alone without one, and with neither the pod's ServiceAccount is used. `$KUBECONFIG` and `~/.kube` are never looked at.
///
/// # Errors
///
/// [`Error::Kubeconfig`], [`Error::Master`] or [`Error::Client`].
pub(super) fn kubeconfig(path: Option<&Path>, master: Option<&str>) -> Result<ApiServer, Error> {
    let scheme = if path.is_some() { "https" } else { "http" };
    let master = master.map(|master| server_url(master, scheme)).transpose()?;
    let path = path.map(Path::to_owned);
    ApiServer::new(move || match (&path, &master) {
        (None, None) => load_in_cluster(),
        (None, Some(master)) => Ok(Loaded { config: Config::new(master.clone()), files: Files::default() }),
        (Some(path), master) => {
            let mut loaded = read_kubeconfig(path)?;
            if let Some(master) = master {
                loaded.config.cluster_url = master.clone();
            }
            Ok(loaded)
        }
    })
}

/// The messages of an error and its causes in one line, each said once.
pub(super) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn read_kubeconfig(path: &Path) -> Result<Loaded, Error> {
    let broken = |cause| Error::Kubeconfig { path: PathBuf::from(path), cause };
    // Before kube reads it: its message repeats the path, quoted.
    std::fs::metadata(path).map_err(|error| broken(error.to_string()))?;
    // Looked at before it is read, so that no change in between goes unseen.
    let mut files = Files::of([path.to_owned()]);
    let file = Kubeconfig::read_from(path).map_err(|error| broken(chain(&error)))?;
    files.add(credentials::named_by(&file));
    let config = Config::try_from(file).map_err(|error| broken(chain(&error)))?;
    Ok(Loaded { config, files })
}

fn server_url(text: &str, scheme: &str) -> Result<Uri, Error> {
    let broken = |cause| Error::Master { url: text.to_owned(), cause };
    let full = if text.contains("://") { text.to_owned() } else { format!("{scheme}://{text}") };
    let url: Uri = full.parse().map_err(|error: InvalidUri| broken(error.to_string()))?;
    match (url.scheme_str(), url.host()) {
        (Some("http" | "https"), Some(host)) if !host.is_empty() => Ok(url),
        _ => Err(broken("it has no http or https scheme, or no host".to_owned())),
    }
}

/// kube's own client stack has no keep-alive, hides failed requests behind retries, and logs at error level; this one
/// leaves all of that to the watch.
pub(super) fn build(config: &Config) -> Result<Client, Error> {
    let url = config.cluster_url.to_string().trim_end_matches('/').to_owned();
    let broken = |cause| Error::Client { server: url.clone(), cause };
    if config.proxy_url.is_some() {
        return Err(broken("proxy-url is not supported".to_owned()));
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT));
    tcp.set_keepalive(Some(KEEPALIVE));
    tcp.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    tcp.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
    tcp.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    let tls = config.rustls_https_connector_with_connector(tcp).map_err(|error| broken(chain(&error)))?;
    let http = legacy::Client::builder(TokioExecutor::new()).build(tls);
    let headers = config.extra_headers_layer().map_err(|error| broken(chain(&error)))?;
    let auth = config.auth_layer().map_err(|error| broken(chain(&error)))?;
    let base = config.base_uri_layer();
    let builder = ClientBuilder::new(http, config.default_namespace.clone())
        .with_layer(&MapErrLayer::new(|error: legacy::Error| BoxError::from(error)))
        .with_layer(&headers);
    Ok(match auth {
        Some(auth) => builder.with_layer(&auth).with_layer(&base).build(),
        None => builder.with_layer(&base).build(),
    })
}

#[cfg(test)]
mod tests;
