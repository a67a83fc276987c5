//! A Kubernetes control plane on a node of the lab: the real etcd and kube-apiserver, with TLS, RBAC and tokens.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! # use edgemesh_tests::lab::{Lab, agent::AgentOptions, control_plane::{ControlPlane, ServiceAccount}};
//! # let lab = Lab::new()?;
//! let cloud = lab.site("cloud", &["192.168.10.0/24"])?;
//! let (master, edge) = (cloud.node("master", &["10.244.0.0/24"])?, cloud.node("edge1", &["10.244.1.0/24"])?);
//! let plane = ControlPlane::start(&master)?;
//! plane.kubectl(&["create", "namespace", "shop"])?;
//! let account = ServiceAccount { namespace: "shop".to_owned(), name: "agent".to_owned() };
//! plane.mount_credentials(&edge, &account)?;
//! let agent = edge.start_agent(&plane.in_cluster(AgentOptions::default()))?;
//! # Ok(())
//! # }
//! ```
//!
//! All it writes is in the node's own `/run`, so its data outlives its processes but not the lab. There is no
//! kube-controller-manager: nobody makes ServiceAccounts, endpoints or pods by themselves.

mod api;
mod process;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::agent::AgentOptions;
use super::manifest::{Endpoint, Service};
use super::{Node, eventually, locked, place};
use process::Process;

/// Names the directory that has etcd, kube-apiserver and kubectl; envtest's variable.
pub const ASSETS: &str = "KUBEBUILDER_ASSETS";
/// What Services get their ClusterIPs from.
const SERVICE_CIDR: &str = "10.96.0.0/16";
/// Where agents find the server.
const PORT: u16 = 6443;
/// Where only this node finds the server that agents do not know.
const HIDDEN_PORT: u16 = 6444;
/// How long the server may take until it is ready, on a machine that builds something else meanwhile.
const START: Duration = Duration::from_secs(90);
/// How long kubectl may take.
const KUBECTL: Duration = Duration::from_secs(60);
/// On the node.
const HOME: &str = "/run/kubernetes";
/// On the node of a pod; kubelet mounts it into the pod as /var/run/secrets/kubernetes.io/serviceaccount.
const CREDENTIALS: &str = "/run/secrets/kubernetes.io/serviceaccount";
/// Whoever has it may do everything.
const ADMIN_TOKEN: &str = "lab-admin";

/// A running control plane; it ends with the lab.
#[derive(Debug)]
pub struct ControlPlane {
    node: Node,
    ip: IpAddr,
    programs: PathBuf,
    etcd: Mutex<Option<Process>>,
    server: Mutex<Option<Process>>,
    files: AtomicU32,
}

/// The account of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// The directory of the programs of a control plane; None where there is none, which is said loudly.
///
/// # Errors
/// Where the environment has `CI=true`: there no such test may be skipped.
pub fn assets() -> Result<Option<PathBuf>> {
    if let Some(directory) = std::env::var_os(ASSETS).filter(|directory| !directory.is_empty()) {
        return Ok(Some(PathBuf::from(directory)));
    }
    super::skip_for("a control plane", &format!("{ASSETS}, as `cargo xtask e2e --prepare` prints it"))?;
    Ok(None)
}

impl ControlPlane {
    /// Starts a control plane on a node and waits until its API server is ready.
    ///
    /// # Errors
    /// Needs the programs in the directory that `KUBEBUILDER_ASSETS` names.
    pub fn start(node: &Node) -> Result<Self> {
        let programs = std::env::var_os(ASSETS).with_context(|| format!("{ASSETS} is not set"))?;
        let ip = *node.ips().first().context("the node has no address")?;
        let plane = Self {
            node: node.clone(),
            ip,
            programs: PathBuf::from(programs),
            etcd: Mutex::default(),
            server: Mutex::default(),
            files: AtomicU32::new(0),
        };
        let home = node.file(HOME);
        for part in ["etcd", "certs", "hidden-certs"] {
            let path = home.join(part);
            std::fs::create_dir_all(&path).with_context(|| format!("could not create {}", path.display()))?;
        }
        write(&home.join("tokens.csv"), &format!("{ADMIN_TOKEN},admin,admin,system:masters\n"))?;
        write(&home.join("accounts.key"), &signing_key()?)?;
        plane.start_etcd()?;
        plane.start_server()?;
        Ok(plane)
    }

    /// Starts the API server again, on the same data and with the same certificates, and waits until it is ready.
    pub fn start_server(&self) -> Result<()> {
        *locked(&self.server) = Some(self.spawn_server(&self.ip.to_string(), PORT, "certs")?);
        self.wait_ready("certs", &self.url())
    }

    /// Kills the API server (SIGKILL) and waits until it is gone.
    pub fn kill_server(&self) -> Result<()> {
        locked(&self.server).take().context("the API server is not running")?.kill()
    }

    /// Kills etcd and the API server.
    pub fn kill(&self) -> Result<()> {
        self.kill_server()?;
        locked(&self.etcd).take().context("etcd is not running")?.kill()
    }

    /// Starts what [`Self::kill`] killed, on the same data.
    pub fn start_again(&self) -> Result<()> {
        self.start_etcd()?;
        self.start_server()
    }

    /// Runs an API server that only kubectl on its own node knows, while `work` runs kubectl there: so objects change
    /// while agents see no server at all.
    pub fn behind_the_back<T>(&self, work: impl FnOnce(&Hidden<'_>) -> Result<T>) -> Result<T> {
        let process = self.spawn_server("127.0.0.1", HIDDEN_PORT, "hidden-certs")?;
        let hidden = Hidden { plane: self };
        self.wait_ready("hidden-certs", &hidden.url())?;
        let done = work(&hidden);
        process.kill()?;
        done
    }

    /// Gives the API server a new CA and certificate, which it uses once it is started again.
    pub fn rotate_ca(&self) -> Result<()> {
        for name in ["apiserver.crt", "apiserver.key"] {
            let path = self.node.file(HOME).join("certs").join(name);
            std::fs::remove_file(&path).with_context(|| format!("could not remove {}", path.display()))?;
        }
        Ok(())
    }

    /// `https://ADDRESS:6443`, for agents.
    pub fn url(&self) -> String {
        format!("https://{}", std::net::SocketAddr::new(self.ip, PORT))
    }

    /// The CA of the server's certificate, as PEM.
    pub fn ca(&self) -> Result<String> {
        self.ca_in("certs")
    }

    /// Runs kubectl as an administrator; returns what it printed.
    ///
    /// # Errors
    /// What kubectl said.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.run_kubectl("certs", &self.url(), ADMIN_TOKEN, arguments)
    }

    /// Runs kubectl with another token.
    ///
    /// # Errors
    /// What kubectl said.
    pub fn kubectl_as(&self, token: &str, arguments: &[&str]) -> Result<String> {
        self.run_kubectl("certs", &self.url(), token, arguments)
    }

    /// Runs `kubectl apply` on manifests.
    ///
    /// # Errors
    /// What kubectl said.
    pub fn apply(&self, text: &str) -> Result<String> {
        let path = self.file(text)?;
        self.kubectl(&["apply", "-f", &path.to_string_lossy()])
    }

    /// Runs `kubectl apply` on one object.
    ///
    /// # Errors
    /// What kubectl said.
    pub fn apply_object(&self, object: &Value) -> Result<String> {
        self.apply(&object.to_string())
    }

    /// Deletes a Service of the namespace `default` and the endpoints made with it.
    pub fn delete(&self, service: &str) -> Result<()> {
        self.kubectl(&strs(&deletion(service))).map(drop)
    }

    /// Makes a request that kubectl has no command for; `body` is posted to `path`.
    ///
    /// # Errors
    /// What kubectl said.
    pub fn post(&self, token: &str, path: &str, body: &Value) -> Result<Value> {
        let file = self.file(&body.to_string())?;
        let text = self.kubectl_as(token, &["create", "--raw", path, "-f", &file.to_string_lossy()])?;
        serde_json::from_str(&text).with_context(|| format!("the answer of {path} is no JSON"))
    }

    /// The Service, and its endpoints in the form that agents read here: EndpointSlices of `discovery.k8s.io/v1`, or
    /// Endpoints where the server does not serve those.
    pub fn endpoints_yaml(&self, service: &Service, endpoints: &[Endpoint]) -> Result<String> {
        if self.serves_slices()? { service.yaml_with(endpoints) } else { service.yaml_with_endpoints(endpoints) }
    }

    /// Whether the server serves EndpointSlices of `discovery.k8s.io/v1`.
    pub fn serves_slices(&self) -> Result<bool> {
        Ok(self.kubectl(&["api-versions"])?.lines().any(|version| version == "discovery.k8s.io/v1"))
    }

    /// A token of an account, good for an hour.
    pub fn token(&self, account: &ServiceAccount) -> Result<String> {
        let ServiceAccount { namespace, name } = account;
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token");
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": { "expirationSeconds": 3600 },
        });
        let answer = self.post(ADMIN_TOKEN, &path, &request)?;
        let token = answer["status"]["token"].as_str().context("the answer to a TokenRequest has no token")?;
        Ok(token.to_owned())
    }

    /// Puts a fresh token, the CA and the namespace where a pod of `node` finds them, replacing those that are there all
    /// at once, as kubelet does.
    pub fn mount_credentials(&self, node: &Node, account: &ServiceAccount) -> Result<()> {
        let token = self.token(account)?;
        self.mount(node, &token, &self.ca()?, &account.namespace)
    }

    /// Replaces only the CA, as kubelet does when the cluster's is renewed.
    pub fn mount_ca(&self, node: &Node) -> Result<()> {
        let read = |name: &str| {
            let path = node.file(CREDENTIALS).join(name);
            std::fs::read_to_string(&path).with_context(|| format!("could not read {}", path.display()))
        };
        self.mount(node, &read("token")?, &self.ca()?, &read("namespace")?)
    }

    /// The environment and configuration of an agent in a pod of this cluster.
    pub fn in_cluster(&self, options: AgentOptions) -> AgentOptions {
        options
            .set("kubeAPIConfig", json!({}))
            .env("KUBERNETES_SERVICE_HOST", &self.ip.to_string())
            .env("KUBERNETES_SERVICE_PORT", &PORT.to_string())
            .env("KUBERNETES_PORT", &format!("tcp://{}:{PORT}", self.ip))
    }

    /// Writes a kubeconfig of an administrator into the lab's directory.
    pub fn admin_kubeconfig(&self) -> Result<PathBuf> {
        self.kubeconfig("admin", ADMIN_TOKEN)
    }

    fn kubeconfig(&self, name: &str, token: &str) -> Result<PathBuf> {
        self.write_kubeconfig(name, "certs", &self.url(), token)
    }

    fn start_etcd(&self) -> Result<()> {
        let mut command = Command::new(self.programs.join("etcd"));
        let client = "http://127.0.0.1:2379";
        command
            .args(["--data-dir", &format!("{HOME}/etcd")])
            .args(["--listen-client-urls", client, "--advertise-client-urls", client])
            .args(["--listen-peer-urls", "http://127.0.0.1:2380"])
            // 10,000 Services with their history are more than the default of 2 GB.
            .args(["--quota-backend-bytes", "6442450944"]);
        *locked(&self.etcd) = Some(Process::start(command, &self.node, "etcd")?);
        Ok(())
    }

    fn spawn_server(&self, bind: &str, port: u16, certs: &str) -> Result<Process> {
        let mut command = Command::new(self.programs.join("kube-apiserver"));
        let key = format!("{HOME}/accounts.key");
        for (flag, value) in [
            ("etcd-servers", "http://127.0.0.1:2379"),
            ("bind-address", bind),
            ("secure-port", &port.to_string()),
            // A loopback address is refused for the Endpoints of the Service `kubernetes`.
            ("advertise-address", &self.ip.to_string()),
            ("cert-dir", &format!("{HOME}/{certs}")),
            ("service-cluster-ip-range", SERVICE_CIDR),
            ("service-account-issuer", "https://kubernetes.default.svc"),
            ("service-account-key-file", &key),
            ("service-account-signing-key-file", &key),
            ("authorization-mode", "RBAC"),
            // As everywhere; EdgeMesh's own DaemonSet needs it.
            ("allow-privileged", "true"),
            ("token-auth-file", &format!("{HOME}/tokens.csv")),
            // It waits for accounts that the controller manager would make.
            ("disable-admission-plugins", "ServiceAccount"),
        ] {
            command.arg(format!("--{flag}={value}"));
        }
        Process::start(command, &self.node, if certs == "certs" { "apiserver" } else { "apiserver-hidden" })
    }

    fn wait_ready(&self, certs: &str, url: &str) -> Result<()> {
        let alive = || -> Result<()> {
            for process in [&self.etcd, &self.server] {
                if let Some(process) = &*locked(process) {
                    process.ensure_running()?;
                }
            }
            Ok(())
        };
        let mut died = None;
        let ready = eventually(START, "the API server to become ready", || {
            if let Err(error) = alive() {
                died = Some(error);
                return Ok(true);
            }
            self.run_kubectl(certs, url, ADMIN_TOKEN, &["get", "--raw", "/readyz"]).map(|_| true)
        });
        died.map_or(ready, Err)
    }

    fn ca_in(&self, certs: &str) -> Result<String> {
        let path = self.node.file(HOME).join(certs).join("apiserver.crt");
        let chain = std::fs::read_to_string(&path).with_context(|| format!("could not read {}", path.display()))?;
        // The certificate itself comes first.
        let begin = "-----BEGIN CERTIFICATE-----";
        let ca = chain.rfind(begin).filter(|place| *place > 0).and_then(|place| chain.get(place..));
        ca.map(str::to_owned).with_context(|| format!("{} has no CA after the certificate", path.display()))
    }

    fn run_kubectl(&self, certs: &str, url: &str, token: &str, arguments: &[&str]) -> Result<String> {
        let what = || format!("kubectl {}", arguments.join(" "));
        let config = self.write_kubeconfig(&format!("kubectl-{certs}"), certs, url, token)?;
        let mut command = Command::new(self.programs.join("kubectl"));
        command.env_clear().env("HOME", self.directory()).arg("--kubeconfig").arg(config).args(arguments);
        place::enter(&mut command, &self.node.place())?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let output = place::output(child.with_context(what)?, KUBECTL).with_context(what)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {}", what(), said.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn write_kubeconfig(&self, name: &str, certs: &str, url: &str, token: &str) -> Result<PathBuf> {
        let ca = self.node.write_file(&format!("{certs}.crt"), &self.ca_in(certs)?)?;
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "lab", "cluster": { "server": url, "certificate-authority": ca } }],
            "users": [{ "name": "user", "user": { "token": token } }],
            "contexts": [{ "name": "lab", "context": { "cluster": "lab", "user": "user" } }],
            "current-context": "lab",
        });
        self.node.write_file(&format!("{name}.kubeconfig"), &config.to_string())
    }

    fn mount(&self, node: &Node, token: &str, ca: &str, namespace: &str) -> Result<()> {
        // Where /run is the node's own, /var/run has to be too.
        let run = std::fs::canonicalize("/var/run").context("could not look up /var/run")?;
        ensure!(run == Path::new("/run"), "/var/run is {} on this machine, and not /run", run.display());
        let parent = node.file(CREDENTIALS);
        // As AtomicWriter of kubelet: files are links through `..data`, which is switched in one step.
        let version = format!("..version-{}", self.files.fetch_add(1, Ordering::Relaxed));
        let attempt = || format!("could not write the credentials in {}", parent.display());
        let directory = parent.join(&version);
        std::fs::create_dir_all(&directory).with_context(attempt)?;
        for (name, text) in [("token", token), ("ca.crt", ca), ("namespace", namespace)] {
            write(&directory.join(name), text)?;
            let link = parent.join(name);
            if link.symlink_metadata().is_err() {
                std::os::unix::fs::symlink(format!("..data/{name}"), &link).with_context(attempt)?;
            }
        }
        let draft = parent.join("..data_tmp");
        std::os::unix::fs::symlink(&version, &draft).with_context(attempt)?;
        std::fs::rename(&draft, parent.join("..data")).with_context(attempt)?;
        Ok(())
    }

    /// Writes a file that kubectl is to read.
    fn file(&self, text: &str) -> Result<PathBuf> {
        self.node.write_file(&format!("input-{}", self.files.fetch_add(1, Ordering::Relaxed)), text)
    }

    fn directory(&self) -> PathBuf {
        self.node.lab().directory.join(self.node.name())
    }
}

/// An API server that agents do not know; see [`ControlPlane::behind_the_back`].
#[derive(Debug)]
pub struct Hidden<'a> {
    plane: &'a ControlPlane,
}

impl Hidden<'_> {
    /// Runs kubectl as an administrator; returns what it printed.
    ///
    /// # Errors
    /// What kubectl said.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.plane.run_kubectl("hidden-certs", &self.url(), ADMIN_TOKEN, arguments)
    }

    /// As [`ControlPlane::delete`].
    pub fn delete(&self, service: &str) -> Result<()> {
        self.kubectl(&strs(&deletion(service))).map(drop)
    }

    /// Runs `kubectl apply` on manifests.
    ///
    /// # Errors
    /// What kubectl said.
    pub fn apply(&self, text: &str) -> Result<String> {
        let path = self.plane.file(text)?;
        self.kubectl(&["apply", "-f", &path.to_string_lossy()])
    }

    fn url(&self) -> String {
        format!("https://127.0.0.1:{HIDDEN_PORT}")
    }
}

/// kubectl's arguments to delete a Service with its Endpoints and slices, whichever there are.
fn deletion(service: &str) -> Vec<String> {
    let mut arguments = vec!["delete".to_owned(), "--ignore-not-found".to_owned()];
    for (kind, suffix) in [("service", ""), ("endpoints", ""), ("endpointslice", "-v4"), ("endpointslice", "-v6")] {
        arguments.push(format!("{kind}/{service}{suffix}"));
    }
    arguments
}

fn strs(texts: &[String]) -> Vec<&str> {
    texts.iter().map(String::as_str).collect()
}

/// A new key for tokens of ServiceAccounts, as PEM (ECDSA on P-256, RFC 5915).
fn signing_key() -> Result<String> {
    use aws_lc_rs::encoding::{AsDer as _, EcPrivateKeyRfc5915Der};
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};

    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).context("could not generate a key")?;
    let der: EcPrivateKeyRfc5915Der<'_> = pair.private_key().as_der().context("could not encode a key")?;
    Ok(pem::encode(&pem::Pem::new("EC PRIVATE KEY", der.as_ref())))
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("could not write {}", path.display()))
}
