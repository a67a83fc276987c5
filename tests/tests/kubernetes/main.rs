//! Against a real Kubernetes API server: etcd, kube-apiserver and kubectl, with TLS, RBAC and tokens.

mod credentials;
mod follow;
mod manifests;
mod outage;
mod rules;
mod scale;

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use edgemesh_tests::lab::{
    App, Attempt, Lab, Node, Pod, Transport,
    agent::{Agent, AgentOptions},
    control_plane::{ControlPlane, ServiceAccount, assets},
    eventually,
    manifest::{self, Endpoint, Service},
};
use serde_json::Value;

/// How long an agent may take until it is ready, on a machine that builds something else meanwhile.
const START: Duration = Duration::from_secs(30);
/// How long a change in the API may take until connections follow it.
const FOLLOW: Duration = Duration::from_secs(5);
/// What most tests connect to.
const WEB: &str = "10.96.0.80";

/// A control plane with the CRDs and the agent's manifests applied; a node with a client pod and the backends `a`, `b` and
/// `c`; no agent yet.
struct Cluster {
    // Dropped last, as everything else lives in it.
    plane: ControlPlane,
    client: Pod,
    backends: Vec<Pod>,
    edge: Node,
    _lab: Lab,
}

impl Cluster {
    /// None where there is no root, or no control plane to be had; either is said loudly.
    fn raise() -> Result<Option<Self>> {
        let Some(lab) = Lab::for_test()? else { return Ok(None) };
        if assets()?.is_none() {
            return Ok(None);
        }
        let lan = lab.site("lan", &["192.168.10.0/24"])?;
        let master = lan.node("master", &["10.244.0.0/24"])?;
        let edge = lan.node("edge1", &["10.244.1.0/24"])?;
        let client = edge.pod("client")?;
        let backends = ["a", "b", "c"].map(|name| edge.pod(name)).into_iter().collect::<Result<Vec<_>>>()?;
        for pod in &backends {
            pod.serve(App::Tcp, 7001)?;
            pod.serve(App::Udp, 7002)?;
        }
        let plane = ControlPlane::start(&master)?;
        let cluster = Self { plane, client, backends, edge, _lab: lab };
        let (crds, agent) = (manifests("crds"), manifests("agent"));
        cluster.plane.kubectl(&["apply", "-f", &crds.to_string_lossy(), "-f", &agent.to_string_lossy()])?;
        cluster.plane.apply(&manifest::node(&cluster.edge, &[])?)?;
        Ok(Some(cluster))
    }

    /// Starts an agent with the account of the manifests, as in a pod of the cluster.
    fn start_agent(&self) -> Result<Agent> {
        self.start_agent_with(AgentOptions::default())
    }

    fn start_agent_with(&self, options: AgentOptions) -> Result<Agent> {
        self.plane.mount_credentials(&self.edge, &account())?;
        self.edge.start_agent(&self.plane.in_cluster(options))
    }

    /// With an agent that is ready.
    fn with_agent() -> Result<Option<(Self, Agent)>> {
        let Some(cluster) = Self::raise()? else { return Ok(None) };
        let agent = cluster.start_agent()?;
        agent.wait_ready(START)?;
        Ok(Some((cluster, agent)))
    }

    /// The endpoints that these backends are.
    fn endpoints(&self, names: &[&str]) -> Vec<Endpoint> {
        let wanted = self.backends.iter().filter(|pod| names.contains(&pod.name()));
        wanted.flat_map(|pod| Endpoint::of(pod, self.edge.name())).collect()
    }

    /// Applies a Service with these backends.
    fn apply(&self, service: &Service, backends: &[&str]) -> Result<()> {
        self.plane.apply(&self.plane.endpoints_yaml(service, &self.endpoints(backends))?).map(drop)
    }

    /// Whose answers a client gets, of so many connections that none of three is missed.
    fn answers(&self, target: SocketAddr) -> Result<BTreeSet<String>> {
        let report = self.client.spread(Transport::Tcp, target, 40, 4)?;
        Ok(report.names.into_keys().collect())
    }

    /// Waits until exactly these backends answer.
    fn expect_answers(&self, target: SocketAddr, names: &[&str]) -> Result<()> {
        let expected: BTreeSet<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut last = BTreeSet::new();
        eventually(FOLLOW, &format!("{names:?} to answer at {target}"), || {
            last = self.answers(target)?;
            Ok(last == expected)
        })
        .with_context(|| format!("{last:?} answered"))
    }

    /// Waits until a connection is refused at once.
    fn expect_refused(&self, target: SocketAddr) -> Result<()> {
        eventually(FOLLOW, &format!("{target} to be refused"), || Ok(self.client.connect(target)? == refused()))
    }

    /// Waits until no one answers for an address any more, which is no Service's then.
    fn expect_left_alone(&self, target: SocketAddr) -> Result<()> {
        let client = self.client.within(Duration::from_millis(200));
        eventually(FOLLOW, &format!("{target} to be left alone"), || {
            Ok(client.connect(target)? != refused() && client.tcp(target).is_err())
        })
    }

    /// What `status` says.
    fn status(&self) -> Result<Value> {
        let output = self.edge.cli(&["status", "-o", "json"])?;
        serde_json::from_slice(&output.stdout).context("status is no JSON")
    }

    /// The message of a condition, if it holds.
    fn condition(&self, reason: &str, subject: &str) -> Result<Option<String>> {
        let status = self.status()?;
        let conditions = status["conditions"].as_array().context("status has no conditions")?;
        let found = conditions.iter().find(|found| found["reason"] == reason && found["subject"] == subject);
        Ok(found.map(|found| found["message"].as_str().unwrap_or_default().to_owned()))
    }

    /// Waits until a condition holds; its message.
    fn expect_condition(&self, reason: &str, subject: &str) -> Result<String> {
        let mut message = None;
        eventually(START, &format!("the condition {reason} {subject}"), || {
            message = self.condition(reason, subject)?;
            Ok(message.is_some())
        })
        .with_context(|| {
            format!("status: {}", self.status().map_or_else(|error| error.to_string(), |s| s.to_string()))
        })?;
        message.context("the condition has no message")
    }

    /// Waits until no condition of the API server holds.
    fn expect_no_condition(&self) -> Result<()> {
        let mut last = String::new();
        eventually(START, "no condition of the API server", || {
            let status = self.status()?;
            last = status["conditions"].to_string();
            Ok(!last.contains("ApiServer"))
        })
        .with_context(|| last.clone())
    }
}

fn refused() -> Attempt {
    Attempt::Failed("ECONNREFUSED".to_owned())
}

/// The account in manifests/agent.
fn account() -> ServiceAccount {
    ServiceAccount { namespace: "kubeedge".to_owned(), name: "edgemesh-agent".to_owned() }
}

/// A directory of the repository's manifests.
fn manifests(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests").join(name)
}

/// A Service on a ClusterIP, with a TCP port that backends serve.
fn service(name: &str, ip: &str) -> Service {
    Service::new(name, &[ip]).port("tcp", Transport::Tcp, 80, 7001)
}

/// The Service `web`.
fn web(ip: &str) -> Service {
    service("web", ip)
}

fn at(ip: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(ip.parse()?, port))
}
