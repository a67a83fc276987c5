//! An API server for agents of the lab: lists and watches over HTTP what a test puts into its store.
//!
//! It keeps to what the Kubernetes API promises of lists and watches: versions that only grow and are the store's, pages
//! with a `continue` token, watches from a version on that miss nothing, end after `timeoutSeconds` and are answered 410
//! where their version is unknown, and 404 with a Status for what is not served. There is no TLS, no authentication and
//! no admission. The store outlives its servers, as etcd does.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use futures::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Deserialize as _;
use serde_json::{Value, json};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::{Node, locked};

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// What is served: the kind, the group and version, and the plural.
const RESOURCES: [(&str, &str, &str); 4] = [
    ("Service", "v1", "services"),
    ("Endpoints", "v1", "endpoints"),
    ("Node", "v1", "nodes"),
    ("EndpointSlice", "discovery.k8s.io/v1", "endpointslices"),
];
/// How long a watch lasts that asks for no time, in seconds.
const WATCH_SECONDS: u64 = 300;

/// The objects of a cluster. All clones are one.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    world: Mutex<World>,
    /// Tells watches that there is something new.
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct World {
    version: u64,
    /// By plural, namespace and name.
    objects: BTreeMap<(&'static str, String, String), Value>,
    /// All changes ever, oldest first: the version, the plural, the event.
    log: Vec<(u64, &'static str, Value)>,
}

/// A running API server; dropping it breaks all connections to it.
#[derive(Debug)]
pub struct ApiServer {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Default for Store {
    fn default() -> Self {
        let world = World { version: 100, ..World::default() };
        Self { inner: Arc::new(Inner { world: Mutex::new(world), changed: watch::channel(100).0 }) }
    }
}

impl Store {
    /// Creates or updates every object in some YAML documents, in their order.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        for document in serde_yaml::Deserializer::from_str(yaml) {
            let object = Value::deserialize(document).context("could not read an object")?;
            if !object.is_null() {
                self.put(object)?;
            }
        }
        Ok(())
    }

    /// Deletes an object; the namespace of a Node is empty.
    pub fn delete(&self, kind: &str, namespace: &str, name: &str) -> Result<()> {
        let plural = plural(kind)?;
        let mut world = locked(&self.inner.world);
        let key = (plural, namespace.to_owned(), name.to_owned());
        let object = world.objects.remove(&key).with_context(|| format!("there is no {kind} {namespace}/{name}"))?;
        world.log_change("DELETED", plural, object);
        self.inner.changed.send_replace(world.version);
        Ok(())
    }

    fn put(&self, object: Value) -> Result<()> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let plural = plural(&text(&object["kind"]))?;
        let key = (plural, text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]));
        let mut world = locked(&self.inner.world);
        let event = if world.objects.contains_key(&key) { "MODIFIED" } else { "ADDED" };
        let stored = world.log_change(event, plural, object);
        world.objects.insert(key, stored);
        self.inner.changed.send_replace(world.version);
        Ok(())
    }

    /// Starts a server on a port of a node's first address.
    pub fn serve(&self, node: &Node, port: u16) -> Result<ApiServer> {
        let ip = *node.ips().first().context("the node has no address")?;
        self.serve_on(node.listen(SocketAddr::new(ip, port))?)
    }

    /// Starts a server on a socket.
    pub fn serve_on(&self, listener: TcpListener) -> Result<ApiServer> {
        let address = listener.local_addr().context("could not read the address of a listener")?;
        listener.set_nonblocking(true).context("could not prepare a listener")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("could not start the runtime of an API server")?;
        let (stop, stopped) = oneshot::channel::<()>();
        let inner = Arc::clone(&self.inner);
        let thread = std::thread::Builder::new().name("api-server".to_owned()).spawn(move || {
            runtime.block_on(async {
                let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
                tokio::select! {
                    // An error means that the handle is gone.
                    _ = stopped => {}
                    () = accept(&listener, &inner) => {}
                }
            });
        });
        let thread = thread.context("could not start the thread of an API server")?;
        Ok(ApiServer { address, stop: Some(stop), thread: Some(thread) })
    }
}

impl ApiServer {
    /// For `kubeAPIConfig.master`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Stops it as a power failure does: connections break, and nobody listens any more.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        drop(self.stop.take());
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("the API server at {} panicked", self.address)),
            None => Ok(()),
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        // Its panic has been printed.
        let _ = self.end();
    }
}

impl World {
    /// Gives the object with its new version.
    fn log_change(&mut self, event: &str, plural: &'static str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.log.push((self.version, plural, json!({"type": event, "object": object.clone()})));
        object
    }

    /// `start` objects have been given already.
    fn list(&self, kind: &str, api: &str, plural: &str, limit: usize, start: usize) -> Value {
        let all: Vec<&Value> =
            self.objects.iter().filter(|((other, ..), _)| *other == plural).map(|(_, object)| object).collect();
        let end = if limit == 0 { all.len() } else { all.len().min(start + limit) };
        let items = all.get(start..end).unwrap_or_default();
        let mut metadata = json!({"resourceVersion": self.version.to_string()});
        if end < all.len() {
            metadata["continue"] = json!(end.to_string());
        }
        json!({"apiVersion": api, "kind": format!("{kind}List"), "metadata": metadata, "items": items})
    }
}

fn plural(kind: &str) -> Result<&'static str> {
    match RESOURCES.iter().find(|(other, ..)| *other == kind) {
        Some((.., plural)) => Ok(plural),
        None => bail!("the API server of the lab has no kind {kind:?}"),
    }
}

/// Serves until dropped; dropping closes all connections.
async fn accept(listener: &tokio::net::TcpListener, inner: &Arc<Inner>) {
    let mut connections = JoinSet::new();
    while let Ok((connection, _)) = listener.accept().await {
        let inner = Arc::clone(inner);
        let service = service_fn(move |request| {
            let response = answer(&inner, &request);
            async move { Ok::<_, Infallible>(response) }
        });
        connections.spawn(async move {
            // A client that went away is no concern of ours.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(connection), service).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

fn answer(inner: &Arc<Inner>, request: &Request<Incoming>) -> Response<Body> {
    if request.method() != Method::GET {
        return status(405, "MethodNotAllowed", "this server is for reading");
    }
    let path = request.uri().path();
    if let Some(group) = discovery(path) {
        return respond(200, &group);
    }
    let found = RESOURCES.iter().find(|(_, api, plural)| path == format!("{}/{plural}", root(api)));
    let Some(&(kind, api, plural)) = found else {
        return status(404, "NotFound", "the server could not find the requested resource");
    };
    let query: BTreeMap<&str, &str> =
        request.uri().query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('=')).collect();
    let number = |name: &str| query.get(name).and_then(|value| value.parse::<u64>().ok());
    if !matches!(query.get("watch"), Some(&("1" | "true"))) {
        let size = |name| usize::try_from(number(name).unwrap_or(0)).unwrap_or(usize::MAX);
        return respond(200, &locked(&inner.world).list(kind, api, plural, size("limit"), size("continue")));
    }
    let from = number("resourceVersion").unwrap_or(0);
    if from == 0 || from > locked(&inner.world).version {
        return status(410, "Expired", "too old resource version");
    }
    watch_from(Arc::clone(inner), plural, from, number("timeoutSeconds").unwrap_or(WATCH_SECONDS))
}

fn root(api: &str) -> String {
    if api.contains('/') { format!("/apis/{api}") } else { format!("/api/{api}") }
}

/// The resources of a group and version.
fn discovery(path: &str) -> Option<Value> {
    let (_, api, _) = RESOURCES.iter().find(|(_, api, _)| path == root(api))?;
    let resources = RESOURCES.iter().filter(|(_, other, _)| other == api).map(|(kind, _, plural)| {
        let verbs = ["list", "watch"];
        json!({"name": plural, "singularName": "", "namespaced": *kind != "Node", "kind": kind, "verbs": verbs})
    });
    let resources: Vec<Value> = resources.collect();
    Some(json!({"apiVersion": "v1", "kind": "APIResourceList", "groupVersion": api, "resources": resources}))
}

fn watch_from(inner: Arc<Inner>, plural: &'static str, from: u64, seconds: u64) -> Response<Body> {
    let end = tokio::time::Instant::now() + Duration::from_secs(seconds);
    let state = (inner.changed.subscribe(), from);
    let frames = stream::unfold(state, move |(mut changed, version)| {
        let inner = Arc::clone(&inner);
        async move {
            loop {
                // Before looking: what comes in between is seen the next time.
                changed.mark_unchanged();
                let (reached, lines) = news(&locked(&inner.world), plural, version);
                if !lines.is_empty() {
                    return Some((Ok(Frame::data(Bytes::from(lines))), (changed, reached)));
                }
                tokio::select! {
                    () = tokio::time::sleep_until(end) => return None,
                    _ = changed.changed() => {}
                }
            }
        }
    });
    Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)))
}

/// The events after a version, a line each, and the version they lead to.
fn news(world: &World, plural: &str, version: u64) -> (u64, String) {
    let begin = world.log.partition_point(|(other, ..)| *other <= version);
    let new = world.log.get(begin..).unwrap_or_default().iter().filter(|(_, other, _)| *other == plural);
    new.fold((version, String::new()), |(_, lines), (reached, _, event)| (*reached, format!("{lines}{event}\n")))
}

fn status(code: u16, reason: &str, message: &str) -> Response<Body> {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "code": code, "reason": reason, "message": message,
    });
    respond(code, &status)
}

fn respond(code: u16, value: &Value) -> Response<Body> {
    let mut response = Response::new(BodyExt::boxed_unsync(Full::new(Bytes::from(value.to_string()))));
    *response.status_mut() = hyper::StatusCode::from_u16(code).unwrap_or_default();
    let json = hyper::header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, json);
    response
}
