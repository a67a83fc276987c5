//! A small API server for tests: paged lists, watches from a resourceVersion, 410 for versions that are too old.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Request, Response,
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};

type Body = UnsyncBoxBody<Bytes, io::Error>;

pub(super) struct FakeServer {
    pub(super) address: SocketAddr,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

struct Shared {
    world: Mutex<World>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
pub(super) struct World {
    revision: u64,
    objects: BTreeMap<(String, String), Value>,
    log: Vec<(u64, String, Value)>,
    /// Versions before this are gone.
    pub(super) compacted: u64,
    /// 410 as HTTP status instead of within the stream.
    pub(super) gone_as_status: bool,
    /// `verb resource` and the status code it is answered with.
    pub(super) refused: BTreeMap<String, u16>,
    /// Resources that are not served at all.
    pub(super) absent: BTreeSet<String>,
    /// What comes of lists of a resource instead of an answer.
    pub(super) faults: BTreeMap<String, Fault>,
    /// Resources about which nothing is ever answered.
    pub(super) silent: BTreeSet<String>,
    /// The versions of networking.istio.io, and whether DestinationRules are served in it; the group is not there
    /// without any.
    pub(super) istio: BTreeMap<String, bool>,
    /// Objects on a page of a list; 0 for all.
    pub(super) page: usize,
    /// Refuses all pages but the first.
    pub(super) break_second_page: bool,
    /// Ends each watch at once.
    pub(super) end_watches: bool,
    /// Breaks the connections of watches begun at an earlier count.
    interruptions: u64,
    /// The latest version sent to a watch of a resource.
    pub(super) sent: BTreeMap<String, u64>,
    /// The versions that watches of a resource began with.
    pub(super) begun: Vec<(String, u64)>,
    /// `verb resource` of all requests.
    pub(super) requests: Vec<String>,
    /// The paths of all lists and watches.
    pub(super) paths: BTreeSet<String>,
}

/// What comes of a list instead of an answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fault {
    Status(u16),
    /// No items, and a version.
    Empty,
    Garbage,
    /// The connection breaks in the middle.
    Truncated,
    Silence,
}

impl FakeServer {
    /// Serves what every cluster has, which is named `kubernetes`.
    pub(super) async fn start() -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap()).await
    }

    pub(super) async fn start_at(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut world = World { revision: 10, ..World::default() };
        for (resource, object) in of_every_cluster() {
            world.objects.insert((resource.to_owned(), "kubernetes".to_owned()), object);
        }
        let shared = Arc::new(Shared { world: Mutex::new(world), changed: watch::channel(0).0 });
        let mut tasks = JoinSet::new();
        let served = Arc::clone(&shared);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((connection, _)) = listener.accept().await {
                let shared = Arc::clone(&served);
                let answer = service_fn(move |request| {
                    let response = shared.answer(&request);
                    let silent = shared.is_silent(&request);
                    async move {
                        if silent {
                            std::future::pending::<()>().await;
                        }
                        Ok::<_, Infallible>(response)
                    }
                });
                connections.spawn(async move {
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(connection), answer).await;
                });
            }
        });
        Self { address, shared, _tasks: tasks }
    }

    pub(super) fn world(&self) -> MutexGuard<'_, World> {
        self.shared.world.lock().unwrap()
    }

    pub(super) fn put(&self, resource: &str, mut object: Value) {
        self.change(|world| {
            object["metadata"]["resourceVersion"] = json!(world.revision.to_string());
            let key = (resource.to_owned(), object["metadata"]["name"].as_str().unwrap().to_owned());
            let kind = if world.objects.insert(key, object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
            world.log.push((world.revision, resource.to_owned(), json!({"type": kind, "object": object})));
        });
    }

    pub(super) fn delete(&self, resource: &str, name: &str) {
        self.change(|world| {
            let mut object = world.objects.remove(&(resource.to_owned(), name.to_owned())).unwrap();
            object["metadata"]["resourceVersion"] = json!(world.revision.to_string());
            world.log.push((world.revision, resource.to_owned(), json!({"type": "DELETED", "object": object})));
        });
    }

    /// Tells watches of the current version, which is given back.
    pub(super) fn bookmark(&self, resource: &str) -> u64 {
        self.change(|world| {
            let metadata = json!({"resourceVersion": world.revision.to_string()});
            let event = json!({"type": "BOOKMARK", "object": {"apiVersion": "v1", "kind": "X", "metadata": metadata}});
            world.log.push((world.revision, resource.to_owned(), event));
        });
        self.world().revision
    }

    /// Breaks the connections of all watches.
    pub(super) fn interrupt(&self) {
        self.world().interruptions += 1;
        self.shared.changed.send_modify(|tick| *tick += 1);
    }

    pub(super) fn count(&self, request: &str) -> usize {
        self.world().requests.iter().filter(|made| *made == request).count()
    }

    fn change(&self, change: impl FnOnce(&mut World)) {
        let mut world = self.world();
        world.revision += 1;
        change(&mut world);
        drop(world);
        self.shared.changed.send_modify(|tick| *tick += 1);
    }
}

impl World {
    /// Forgets all changes so far, as etcd's compaction does.
    pub(super) fn compact(&mut self) {
        self.compacted = self.revision;
        self.log.clear();
    }

    /// What there is of networking.istio.io, or of a version of it.
    fn istio(mut world: MutexGuard<'_, Self>, version: Option<&str>) -> Response<Body> {
        world.requests.push("get istio".to_owned());
        if let Some(code) = world.refused.get("get istio") {
            return status(*code, "not now");
        }
        let served = version.map(|version| world.istio.get(version));
        match served {
            _ if world.istio.is_empty() => status(404, "the server could not find the requested resource"),
            Some(None) => status(404, "the server could not find the requested resource"),
            Some(Some(rules)) => {
                let name = if *rules { "destinationrules" } else { "gateways" };
                let resource = json!({"name": name, "singularName": "", "namespaced": true, "kind": "X", "verbs": []});
                answer(200, &json!({"groupVersion": "networking.istio.io", "resources": [resource]}))
            }
            None => {
                let version =
                    |version| json!({"groupVersion": format!("networking.istio.io/{version}"), "version": version});
                let versions: Vec<Value> = world.istio.keys().map(version).collect();
                answer(200, &json!({"name": "networking.istio.io", "versions": versions}))
            }
        }
    }

    fn list(&self, resource: &str, token: usize) -> Response<Body> {
        let fault = self.faults.get(resource).copied();
        match fault {
            Some(Fault::Garbage) => return answer_bytes(200, Bytes::from_static(b"<html>Gateway</html>")),
            Some(Fault::Truncated) => return truncated(),
            Some(Fault::Status(code)) => return status(code, "not this time"),
            Some(Fault::Empty | Fault::Silence) | None => {}
        }
        let of_resource = self.objects.iter().filter(|((r, _), _)| r == resource && fault.is_none());
        let all: Vec<&Value> = of_resource.map(|(_, object)| object).collect();
        let page = if self.page == 0 { all.len().max(1) } else { self.page };
        if token > 0 && self.break_second_page {
            return status(500, "etcdserver: request timed out");
        }
        let items: Vec<&Value> = all.iter().skip(token).take(page).copied().collect();
        let next = if token + page < all.len() { (token + page).to_string() } else { String::new() };
        let metadata = json!({"resourceVersion": self.revision.to_string(), "continue": next});
        answer(200, &json!({"apiVersion": "v1", "kind": "List", "metadata": metadata, "items": items}))
    }
}

impl Shared {
    fn is_silent(&self, request: &Request<Incoming>) -> bool {
        let resource = request.uri().path().rsplit('/').next().unwrap();
        let world = self.world.lock().unwrap();
        let is_list = !request.uri().query().is_some_and(|query| query.contains("watch="));
        world.silent.contains(resource) || is_list && world.faults.get(resource) == Some(&Fault::Silence)
    }

    fn answer(self: &Arc<Self>, request: &Request<Incoming>) -> Response<Body> {
        let query: BTreeMap<&str, &str> =
            request.uri().query().unwrap_or("").split('&').filter_map(|pair| pair.split_once('=')).collect();
        let path = request.uri().path();
        if path == "/apis/discovery.k8s.io/v1" {
            return self.discovery();
        }
        if let Some(rest) = path.strip_prefix("/apis/networking.istio.io") {
            let mut parts = rest.split('/').skip(1);
            let (version, resource) = (parts.next(), parts.next());
            let world = self.world.lock().unwrap();
            let served = version.and_then(|version| world.istio.get(version));
            if resource.is_none() || served != Some(&true) {
                return World::istio(world, version);
            }
        }
        let resource = path.rsplit('/').next().unwrap().to_owned();
        let verb = if query.contains_key("watch") { "watch" } else { "list" };
        let call = format!("{verb} {resource}");
        let mut world = self.world.lock().unwrap();
        world.requests.push(call.clone());
        world.paths.insert(path.to_owned());
        if world.absent.contains(&resource) {
            return status(404, "the server could not find the requested resource");
        }
        if let Some(code) = world.refused.get(&call) {
            return status(*code, &format!("{resource} is forbidden: User \"edge\" cannot {verb} resource"));
        }
        if verb == "list" {
            return world.list(&resource, query.get("continue").map_or(0, |token| token.parse().unwrap()));
        }
        let version: u64 = query["resourceVersion"].parse().unwrap();
        if version < world.compacted && world.gone_as_status {
            return status(410, "too old resource version");
        }
        if world.end_watches {
            return answer_bytes(200, Bytes::new());
        }
        let begun = world.interruptions;
        world.begun.push((resource.clone(), version));
        drop(world);
        self.watch(resource, version, begun)
    }

    fn discovery(&self) -> Response<Body> {
        let mut world = self.world.lock().unwrap();
        world.requests.push("get discovery".to_owned());
        if let Some(code) = world.refused.get("get discovery") {
            return status(*code, "not now");
        }
        if world.absent.contains("endpointslices") {
            return status(404, "the server could not find the requested resource");
        }
        let resource = json!({"name": "endpointslices", "singularName": "", "namespaced": true, "kind": "EndpointSlice", "verbs": []});
        answer(200, &json!({"kind": "APIResourceList", "groupVersion": "discovery.k8s.io/v1", "resources": [resource]}))
    }

    fn watch(self: &Arc<Self>, resource: String, version: u64, begun: u64) -> Response<Body> {
        let state = (Arc::clone(self), self.changed.subscribe(), version, false);
        let frames = stream::unfold(state, move |(shared, mut changed, mut version, ended)| {
            let resource = resource.clone();
            async move {
                if ended {
                    return None;
                }
                loop {
                    let (line, over) = {
                        let mut world = shared.world.lock().unwrap();
                        if world.interruptions > begun {
                            let broken = Err(io::Error::from(io::ErrorKind::ConnectionReset));
                            return Some((broken, (Arc::clone(&shared), changed, version, true)));
                        }
                        let news = world.log.iter().find(|(revision, r, _)| *revision > version && *r == resource);
                        if version < world.compacted {
                            let gone = json!({"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired", "message": "too old resource version"});
                            (Some(json!({"type": "ERROR", "object": gone})), true)
                        } else {
                            let news = news.cloned();
                            version = news.as_ref().map_or(version, |(revision, _, _)| *revision);
                            world.sent.insert(resource.clone(), version);
                            (news.map(|(_, _, event)| event), false)
                        }
                    };
                    if let Some(line) = line {
                        let frame = Ok(Frame::data(Bytes::from(format!("{line}\n"))));
                        return Some((frame, (shared, changed, version, over)));
                    }
                    if changed.changed().await.is_err() {
                        return None;
                    }
                }
            }
        });
        Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)))
    }
}

/// The default Service with its endpoints of both kinds, and a Node.
fn of_every_cluster() -> [(&'static str, Value); 4] {
    let metadata = json!({"name": "kubernetes", "namespace": "default", "resourceVersion": "10"});
    let mut of_slice = metadata.clone();
    of_slice["labels"] = json!({"kubernetes.io/service-name": "kubernetes"});
    [
        ("services", json!({"metadata": metadata, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 443}]}})),
        ("endpoints", json!({"metadata": metadata})),
        ("endpointslices", json!({"metadata": of_slice, "addressType": "IPv4", "endpoints": []})),
        ("nodes", json!({"metadata": {"name": "kubernetes", "resourceVersion": "10"}})),
    ]
}

fn truncated() -> Response<Body> {
    let frames = stream::unfold(0, |frame| async move {
        match frame {
            0 => Some((Ok(Frame::data(Bytes::from_static(b"{\"kind\":\"List\",\"items\":[{\"meta"))), 1)),
            1 => {
                // Lest the end overtakes the beginning.
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                Some((Err(io::Error::from(io::ErrorKind::ConnectionReset)), 2))
            }
            _ => None,
        }
    });
    Response::new(BodyExt::boxed_unsync(StreamBody::new(frames)))
}

fn status(code: u16, message: &str) -> Response<Body> {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "message": message});
    answer(code, &status)
}

fn answer(code: u16, value: &Value) -> Response<Body> {
    answer_bytes(code, Bytes::from(value.to_string()))
}

fn answer_bytes(code: u16, bytes: Bytes) -> Response<Body> {
    let body = BodyExt::boxed_unsync(Full::new(bytes).map_err(|never| match never {}));
    Response::builder().status(code).header("content-type", "application/json").body(body).unwrap()
}
