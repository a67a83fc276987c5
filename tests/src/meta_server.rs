//! A metaServer of KubeEdge for tests: the cluster, cloudcore and a node's edgecore in one, with the quirks of the real
//! one, to be scripted.
//!
//! It serves lists and watches of any resource, over HTTP or HTTPS, from a thread of its own, so that it can be used from
//! tests with and without a runtime, and on a socket of any network namespace (`Node::listen` of the lab).
//!
//! What it reproduces, each with the place in KubeEdge's code where the behaviour comes from (at commit 16cd8548, paths
//! below `edge/pkg/metamanager/metaserver` unless they say otherwise):
//!
//! | quirk | how to have it |
//! |---|---|
//! | A list goes to the cloud first; on any error, a 404 too, what is stored on the node is given, with code 200 (`kubernetes/storage/storage.go`) | [`Link`], [`FakeMetaServer::unserve`] |
//! | A list of the cloud is not stored; only what watches are told is (same) | always |
//! | The cloud is waited for 10 s (`agent/agent.go`); since 1.13 a link that is known to be down is not waited for | [`Link::HalfOpen`], [`Link::Down`] |
//! | A stored list has `selfLink: /core/v1/services/null/null` and the highest version ever stored; an empty one has no metadata at all (`kubernetes/storage/sqlite/imitator`, `store.go`) | [`Link::Down`] |
//! | The kind of a stored list is guessed from the resource: `DestinationruleList`, up to 1.15 `NamespacList` (`pkg/metaserver/util/util.go`) | [`FakeMetaServer::old_names`] |
//! | Field selectors work offline for `metadata.name` and `metadata.namespace`; any other drops everything (`store.go`) | always |
//! | A watch ignores its resourceVersion and replays all that is stored as ADDED (`watcher.go`) | always |
//! | The cloud then sends every object that it does not believe the node to have, so ADDED may come twice | always; [`FakeMetaServer::wipe_store`] makes that belief wrong |
//! | No bookmarks, no initial-events-end | always |
//! | A watch ends with ERROR 500 (`watcher.go`) | [`FakeMetaServer::end_watches`] |
//! | A watch that is opened offline is never told to the cloud, so it stays silent when the link is back (`agent/agent.go`) | [`Link::Down`] |
//! | Messages are lost while the link is down (`cloud/pkg/cloudhub/handler`); afterwards updates of known objects are sent again and deletions are not, as they come without a kind and are refused (`cloud/pkg/synccontroller`): ghosts | [`Link::Down`], then [`Link::Up`] |
//! | A cloudcore that restarts has no listeners any more (`cloud/pkg/dynamiccontroller`) | [`FakeMetaServer::restart_cloudcore`] |
//! | Objects of kind Gateway are stored and told as `gatewaies`, so nobody hears of them | always |
//! | In lists of EndpointSlices each slice with a port `https` leads to 127.0.0.1:10550 (`cloud/pkg/dynamiccontroller/filter/defaultmaster`) | always |
//! | Anything that is neither list nor watch of a resource: 500 `request[PATH::VERB] isn't supported` (`server.go`) | always |
//! | TLS with an optional client certificate, which must be of the right CA if there is one; a bearer token in any case (`server.go`); 401 without a reason (`auth.go`) | [`Door`] |
//!
//! Besides these there are [faults](Fault) that no KubeEdge promises, and any may have.

mod names;
mod serve;
mod tls;
mod world;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use world::{Tell, World};

/// How a client gets in.
#[derive(Debug, Clone, Default)]
pub enum Door {
    /// Plain HTTP, for anybody: KubeEdge without `requireAuthorization`.
    #[default]
    Open,
    /// HTTPS, with one of these bearer tokens.
    Authorized { tokens: Vec<String> },
}

/// How the node is linked to the cloud.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    Up,
    /// Known to be down.
    Down,
    /// Believed to be up, or cloudcore's dynamicController is off: every request is waited for so long (10 s in KubeEdge).
    HalfOpen(Duration),
}

/// What comes of a request instead of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// A `Status` with this code and message.
    Status(u16, String),
    /// Code 200, and no JSON.
    Garbage,
    /// The connection breaks in the middle of the answer; a watch begins well and breaks in the middle of an event.
    Truncated,
    /// Nothing at all.
    Silence,
    /// Code 200, no items, and no metadata.
    Empty,
    /// Code 200, no items, and a resourceVersion, as only an API server would say.
    EmptyOnline,
    /// The right answer, so much later.
    Late(Duration),
    /// The right answer with an item that is no object of its kind, and one that has no name.
    OddItems,
}

/// A request that was made.
#[derive(Debug, Clone)]
pub struct Request {
    /// `list` or `watch`, else the method.
    pub verb: String,
    /// `services`, or the whole path where it names no resource.
    pub resource: String,
    pub path: String,
    pub query: BTreeMap<String, String>,
    /// The bearer token.
    pub token: Option<String>,
    pub accept: Option<String>,
}

/// A running fake; dropping it ends it and all its connections.
#[derive(Debug)]
pub struct FakeMetaServer {
    address: SocketAddr,
    world: Arc<Mutex<World>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl FakeMetaServer {
    /// Serves on `listener`, with what every cluster has: the Service `default/kubernetes` and its endpoints.
    pub fn start(listener: TcpListener, door: Door) -> Result<Self> {
        let address = listener.local_addr().context("could not read the address of a listener")?;
        listener.set_nonblocking(true).context("could not prepare a listener")?;
        let acceptor = match &door {
            Door::Open => None,
            Door::Authorized { .. } => Some(tls::acceptor()?),
        };
        let world = Arc::new(Mutex::new(World::new(door)));
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("could not make the fake metaServer's runtime")?;
        let served = Arc::clone(&world);
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = serve::run(listener, acceptor, served) => {}
                    _ = stopped => {}
                }
            });
        });
        let fake = Self { address, world, stop: Some(stop), thread: Some(thread) };
        for object in default_kubernetes() {
            fake.put(object);
        }
        Ok(fake)
    }

    /// Serves plain HTTP on a port of 127.0.0.1.
    pub fn local() -> Result<Self> {
        Self::start(TcpListener::bind("127.0.0.1:0").context("could not listen on 127.0.0.1")?, Door::Open)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes or changes an object in the cluster, which gives it version and, if new, uid; returns the version.
    pub fn put(&self, object: Value) -> u64 {
        self.world().put(object)
    }

    /// Deletes an object from the cluster, if it is there.
    pub fn delete(&self, resource: &str, namespace: &str, name: &str) {
        self.world().delete(resource, namespace, name);
    }

    /// Has the cluster not serve a resource in a version, such as `networking.istio.io/v1`, `destinationrules`.
    pub fn unserve(&self, group_version: &str, resource: &str) {
        self.world().unserved.insert((group_version.to_owned(), resource.to_owned()));
    }

    /// Lets the link go up or down.
    pub fn link(&self, link: Link) {
        self.world().set_link(link);
    }

    /// Has cloudcore forget whom it is to tell of changes.
    pub fn restart_cloudcore(&self) {
        self.world().listeners.clear();
    }

    /// Empties the node's store, as a reinstallation does; the cloud goes on believing that the node has everything.
    pub fn wipe_store(&self) {
        self.world().rows.clear();
    }

    /// Guesses the kinds of lists as KubeEdge up to 1.15 does.
    pub fn old_names(&self) {
        self.world().old_names = true;
    }

    /// Has requests fail from now on: `list services`, `watch services`, or `list *`.
    pub fn fault(&self, call: &str, fault: Fault) {
        self.world().faults.insert(call.to_owned(), fault);
    }

    /// Has requests fail no more.
    pub fn heal(&self) {
        self.world().faults.clear();
    }

    /// Answers 401 to every token, with this message (KubeEdge says `Unauthorized`).
    pub fn refuse_tokens(&self, message: &str) {
        self.world().unauthorized = Some(message.to_owned());
    }

    /// Takes these tokens from now on.
    pub fn accept_tokens(&self, tokens: &[&str]) {
        let mut world = self.world();
        world.unauthorized = None;
        world.door = Door::Authorized { tokens: tokens.iter().map(|&token| token.to_owned()).collect() };
    }

    /// Answers 403 to lists and watches of a resource, but for those of this one name.
    pub fn forbid(&self, resource: &str, but_for: Option<&str>) {
        self.world().forbidden.insert(resource.to_owned(), but_for.map(str::to_owned));
    }

    /// Answers no 403 any more.
    pub fn allow(&self) {
        self.world().forbidden.clear();
    }

    /// Ends all watches as when their time is up.
    pub fn end_watches(&self) {
        self.world().tell_all(&Tell::End);
    }

    /// Breaks all watches in the middle of an event.
    pub fn break_watches(&self) {
        self.world().tell_all(&Tell::Break);
    }

    /// Lets all watches die without a word: their connections stay, and nothing comes any more.
    pub fn silence_watches(&self) {
        self.world().tell_all(&Tell::Silence);
    }

    /// Sends a line on all watches of a resource.
    pub fn say(&self, resource: &str, line: &str) {
        self.world().tell(resource, &Tell::Raw(format!("{line}\n")));
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.world().requests.clone()
    }

    /// How many requests there were of a verb for a resource.
    pub fn count(&self, verb: &str, resource: &str) -> usize {
        self.world().requests.iter().filter(|made| made.verb == verb && made.resource == resource).count()
    }

    /// How many watches of a resource are open.
    pub fn watching(&self, resource: &str) -> usize {
        self.world().watching(resource)
    }

    /// The keys of all that is stored on the node: `/core/v1/services/default/web`.
    pub fn stored(&self) -> Vec<String> {
        self.world().rows.keys().cloned().collect()
    }

    fn world(&self) -> MutexGuard<'_, World> {
        locked(&self.world)
    }
}

impl Drop for FakeMetaServer {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // It may have ended by itself.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Where a file of the test certificates is: `ca.crt`, `other-ca.crt`, and `.crt` and `.key` of `client` and
/// `other-client`; see `tests/pki/make.sh`.
pub fn pki(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("pki").join(name)
}

/// A token as a ServiceAccount has it, with these claims; nobody has signed it.
pub fn token(claims: &Value) -> String {
    let part = |value: &Value| base64url(value.to_string().as_bytes());
    format!("{}.{}.{}", part(&json!({"alg": "RS256"})), part(claims), base64url(b"signature"))
}

/// RFC 4648 section 5, without padding.
fn base64url(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..=chunk.len() {
            let digit = word >> (18 - 6 * place) & 63;
            text.push(char::from(DIGITS[digit as usize]));
        }
    }
    text
}

fn default_kubernetes() -> [Value; 3] {
    let metadata = json!({"name": "kubernetes", "namespace": "default"});
    let mut of_slice = metadata.clone();
    of_slice["labels"] = json!({"kubernetes.io/service-name": "kubernetes"});
    [
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata,
            "spec": {"type": "ClusterIP", "clusterIP": "10.96.0.1", "ports": [{"name": "https", "port": 443}]},
        }),
        json!({
            "apiVersion": "v1", "kind": "Endpoints", "metadata": metadata,
            "subsets": [{"addresses": [{"ip": "192.0.2.1"}], "ports": [{"name": "https", "port": 6443}]}],
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": of_slice, "addressType": "IPv4",
            "endpoints": [{"addresses": ["192.0.2.1"]}], "ports": [{"name": "https", "port": 6443}],
        }),
    ]
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
