//! Clients for the API server: from the pod's ServiceAccount, or from a kubeconfig.

use std::{
    error::Error as StdError,
    path::{Path, PathBuf},
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

use super::Error;

/// For TCP; TLS and the answer have the bounds of the requests.
const CONNECT: Duration = Duration::from_secs(10);
/// A watch may be silent for minutes, and a lost link says nothing: the kernel asks the other end after this long, …
const KEEPALIVE: Duration = Duration::from_secs(20);
/// … repeats it so often …
const KEEPALIVE_RETRIES: u32 = 3;
/// … at this distance, and then ends the connection.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// The same for data that nobody acknowledges.
const UNACKNOWLEDGED: Duration = Duration::from_secs(35);

/// A client, and the server it talks to, for messages.
pub(super) struct ApiServer {
    pub(super) client: Client,
    pub(super) url: String,
}

/// Uses KUBERNETES_SERVICE_HOST, KUBERNETES_SERVICE_PORT and the mounted ServiceAccount; its token and CA are read again as they rotate.
///
/// # Errors
///
/// [`Error::InCluster`] outside of a pod or without a token, [`Error::Client`] where they cannot be used.
pub(super) fn in_cluster() -> Result<ApiServer, Error> {
    let config = Config::incluster_env().map_err(|error| Error::InCluster { cause: chain(&error) })?;
    if let Some(path) = &config.auth_info.token_file {
        std::fs::read(path).map_err(|error| Error::InCluster { cause: format!("{path}: {error}") })?;
    }
    build(config)
}

/// As client-go's BuildConfigFromFlags, which EdgeMesh uses: `master` overrides the server of the kubeconfig, stands
/// alone without one, and with neither the pod's ServiceAccount is used. `$KUBECONFIG` and `~/.kube` are never looked at.
///
/// # Errors
///
/// [`Error::Kubeconfig`], [`Error::Master`] or [`Error::Client`].
pub(super) fn kubeconfig(path: Option<&Path>, master: Option<&str>) -> Result<ApiServer, Error> {
    let config = match (path, master) {
        (None, None) => return in_cluster(),
        (None, Some(master)) => Config::new(server_url(master, "http")?),
        (Some(path), master) => {
            let mut config = read_kubeconfig(path)?;
            if let Some(master) = master {
                config.cluster_url = server_url(master, "https")?;
            }
            config
        }
    };
    build(config)
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

fn read_kubeconfig(path: &Path) -> Result<Config, Error> {
    let broken = |cause| Error::Kubeconfig { path: PathBuf::from(path), cause };
    // Before kube reads it: its message repeats the path, quoted.
    std::fs::metadata(path).map_err(|error| broken(error.to_string()))?;
    let file = Kubeconfig::read_from(path).map_err(|error| broken(chain(&error)))?;
    Config::try_from(file).map_err(|error| broken(chain(&error)))
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
fn build(config: Config) -> Result<ApiServer, Error> {
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
    let client = match auth {
        Some(auth) => builder.with_layer(&auth).with_layer(&base).build(),
        None => builder.with_layer(&base).build(),
    };
    Ok(ApiServer { client, url })
}

#[cfg(test)]
mod tests;
