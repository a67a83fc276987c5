//! Requests by the thousand, for which kubectl is too slow.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Deserialize as _;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::process::Process;
use super::{ADMIN_TOKEN, ControlPlane};
use crate::lab::{DEADLINE, eventually, locked};

/// `kubectl proxy`, which adds the TLS and the token to plain HTTP.
const PROXY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8001);
/// How many requests are under way at once.
const PARALLEL: usize = 16;
/// For one request.
const ANSWER: Duration = Duration::from_secs(60);

/// An object, and the path it is posted to.
type Posted = (String, Value);

impl ControlPlane {
    /// Creates Services, Endpoints and EndpointSlices from YAML documents, many at a time.
    ///
    /// # Errors
    /// The first that is refused.
    pub fn create_all(&self, documents: &str) -> Result<()> {
        let parse = |document| -> Result<Posted> {
            let object = Value::deserialize(document).context("could not read a document")?;
            Ok((path(&object)?, object))
        };
        let objects = serde_yaml::Deserializer::from_str(documents).map(parse).collect::<Result<VecDeque<_>>>()?;
        let mut command = Command::new(self.programs.join("kubectl"));
        let config = self.kubeconfig("proxy", ADMIN_TOKEN)?;
        command.arg("--kubeconfig").arg(config).args(["proxy", "--port", &PROXY.port().to_string()]);
        let proxy = Process::start(command, &self.node, "proxy")?;
        let queue = Mutex::new(objects);
        let created = self.node.on_a_thread(|| {
            eventually(DEADLINE, "kubectl proxy to listen", || Ok(std::net::TcpStream::connect(PROXY).is_ok()))?;
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("could not start a runtime")?;
            let workers = (0..PARALLEL).map(|_| create_some(&queue));
            runtime.block_on(futures::future::try_join_all(workers)).map(drop)
        });
        proxy.kill()?;
        created
    }
}

/// Where objects of this one's kind and namespace are created.
fn path(object: &Value) -> Result<String> {
    let (api, resource) = match object["kind"].as_str() {
        Some("Service") => ("/api/v1", "services"),
        Some("Endpoints") => ("/api/v1", "endpoints"),
        Some("EndpointSlice") => ("/apis/discovery.k8s.io/v1", "endpointslices"),
        other => bail!("{other:?} is none of Service, Endpoints, EndpointSlice"),
    };
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default");
    Ok(format!("{api}/namespaces/{namespace}/{resource}"))
}

/// Creates objects of the queue, one after the other, until there are no more.
async fn create_some(queue: &Mutex<VecDeque<Posted>>) -> Result<()> {
    let stream = timeout(DEADLINE, TcpStream::connect(PROXY)).await??;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let requests = async {
        loop {
            let Some((path, object)) = locked(queue).pop_front() else { return Ok(()) };
            let attempt = || format!("could not create {}", object["metadata"]["name"]);
            let request = hyper::Request::post(path)
                .header("host", "localhost")
                .header("content-type", "application/json")
                .body(Full::new(Bytes::from(object.to_string())))?;
            let answer = timeout(ANSWER, sender.send_request(request)).await.with_context(attempt)?;
            let answer = answer.with_context(attempt)?;
            let status = answer.status();
            let body = timeout(ANSWER, answer.into_body().collect()).await.with_context(attempt)?;
            let body = body.with_context(attempt)?.to_bytes();
            ensure!(status.is_success(), "{}: {status} {}", attempt(), String::from_utf8_lossy(&body));
        }
    };
    tokio::select! {
        done = requests => done,
        ended = connection => {
            ended.context("the connection to kubectl proxy broke")?;
            bail!("kubectl proxy closed its connection")
        }
    }
}
