//! The configuration file: EdgeMesh's keys, and a few of our own in the same shape.
//!
//! One table, `keys`, says which keys there are, what they hold and where their values go. Reading a file, printing the
//! default one and the JSON schema all follow it, so they cannot disagree.

mod check;
mod dns;
mod document;
mod keys;
mod render;
mod source;
#[cfg(test)]
mod tests;
mod tunnel;
mod value;

use std::{
    ffi::OsString,
    fmt::{self, Display, Formatter},
    fs::{self, File},
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

pub use self::dns::{CacheDnsConfig, DnsConfig};
pub use self::render::{default_yaml, minimal_yaml, schema};
pub use self::tunnel::{AllowedHost, AllowedTarget, ParseAllowedTargetError, TunnelConfig};
use crate::{alias::AliasRanges, model::IpPrefix};

/// The agent's configuration, parsed and validated: nothing after this point sees a raw string.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentConfig {
    pub source: SourceConfig,
    pub common: CommonConfig,
    pub proxy: ProxyConfig,
    /// None where DNS is not answered on this node.
    pub dns: Option<DnsConfig>,
    pub tunnel: TunnelConfig,
    /// Where it was read from, and is read again for what is followed; None for a text.
    pub file: Option<PathBuf>,
}

/// Where Services and endpoints come from (`kubeAPIConfig`).
#[derive(Clone, Debug, PartialEq)]
pub struct SourceConfig {
    pub kind: SourceKind,
    /// Requests per second to the API server; default 100.
    pub qps: u32,
    /// How many requests may come at once; default 200.
    pub burst: u32,
}

/// The kind of metadata source.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum SourceKind {
    /// The pod's ServiceAccount and KUBERNETES_SERVICE_HOST.
    InCluster,
    /// `kubeConfig` and, overriding its server, `master`.
    Kubeconfig { path: Option<PathBuf>, master: Option<String> },
    /// A directory of manifests, watched (`staticDirectory`).
    Static { directory: PathBuf },
    /// KubeEdge's API for nodes at the edge (`metaServer`).
    MetaServer(MetaServerConfig),
}

impl SourceKind {
    /// As `status` names it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::InCluster => "inCluster",
            Self::Kubeconfig { .. } => "kubeconfig",
            Self::Static { .. } => "static",
            Self::MetaServer(_) => "metaServer",
        }
    }
}

/// What `kubeAPIConfig.source` asks for.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum SourceChoice {
    /// By the keys that are given, else by the environment as EdgeMesh does.
    #[default]
    Auto,
    InCluster,
    MetaServer,
}

/// `kubeAPIConfig.metaServer`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MetaServerConfig {
    /// Its URL without a slash at the end, https where authorization is required; default <http://127.0.0.1:10550>.
    pub server: String,
    /// None: plain HTTP without credentials.
    pub security: Option<MetaServerSecurity>,
    /// From one complete list to the next while all is well; default 300 s.
    pub relist_period: Duration,
    /// For a complete answer to a list, and for the beginning of a watch; default 30 s.
    pub request_timeout: Duration,
}

/// How metaServer is spoken to where it requires authorization. All files are read again as they change.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MetaServerSecurity {
    /// Where the ServiceAccount's token is; sent with each request.
    pub token_file: PathBuf,
    /// Files with the certificates that may have signed metaServer's, of which the first that is there counts; empty: any
    /// certificate is trusted (`insecureSkipTLSVerify`).
    pub ca_files: Vec<PathBuf>,
    /// Certificate and key of the client; a pair at EdgeMesh's default place is optional.
    pub client: Option<ClientCertificate>,
}

/// `tlsCertFile` and `tlsPrivateKeyFile`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ClientCertificate {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Whether to do without where neither file is there.
    pub optional: bool,
}

/// `commonConfig`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CommonConfig {
    /// Default `edgemesh0`; at most 15 bytes (IFNAMSIZ).
    pub bridge_device_name: String,
    /// Default 169.254.96.16.
    pub bridge_device_ip: IpAddr,
    /// A second address on the device; default None.
    pub bridge_device_ipv6: Option<Ipv6Addr>,
    /// Serves /healthz, /readyz and /metrics; default 127.0.0.1:20008. None switches it off (`adminAddress: ""`).
    pub admin_address: Option<SocketAddr>,
    /// Default /run/edgemesh/agent.sock.
    pub control_socket: PathBuf,
    /// How many backends may have series of their own in /metrics; default 1000, 0 for none.
    pub max_backend_series: u32,
    /// Where what the source delivered is kept for a start without it; default
    /// /var/lib/edgemesh/agent/metadata.snapshot. None keeps nothing (`metadataSnapshot: ""`).
    pub metadata_snapshot: Option<PathBuf>,
    /// Where the aliases of other sites' pods are from; default 198.18.0.0/16 and fd6d:e54a:1a5e:a11a::/64.
    pub aliases: AliasRanges,
    /// Where the aliases given out are kept for the next start; default /var/lib/edgemesh/agent/aliases. None keeps
    /// nothing (`aliasFile: ""`).
    pub alias_file: Option<PathBuf>,
}

impl Default for CommonConfig {
    fn default() -> Self {
        Self {
            bridge_device_name: "edgemesh0".to_owned(),
            bridge_device_ip: IpAddr::V4(Ipv4Addr::new(169, 254, 96, 16)),
            bridge_device_ipv6: None,
            admin_address: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 20008))),
            control_socket: PathBuf::from("/run/edgemesh/agent.sock"),
            max_backend_series: 1000,
            metadata_snapshot: Some(PathBuf::from("/var/lib/edgemesh/agent/metadata.snapshot")),
            aliases: AliasRanges {
                v4: IpPrefix::written(IpAddr::V4(Ipv4Addr::new(198, 18, 0, 0)), 16),
                v6: IpPrefix::written(IpAddr::V6(Ipv6Addr::new(0xfd6d, 0xe54a, 0x1a5e, 0xa11a, 0, 0, 0, 0)), 64),
            },
            alias_file: Some(PathBuf::from("/var/lib/edgemesh/agent/aliases")),
        }
    }
}

/// `modules.edgeProxy`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ProxyConfig {
    /// Default false, as in EdgeMesh, whose manifests set it.
    pub enable: bool,
    pub filter: ServiceFilter,
    pub dataplane: DataplaneMode,
    pub ebpf: EbpfConfig,
    pub socks5: Socks5Config,
}

/// `socks5Proxy`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Socks5Config {
    /// Default false. Without `edgeProxy.enable` it means nothing, as in EdgeMesh.
    pub enable: bool,
    /// Port on the node-local addresses; default 10800.
    pub listen_port: u16,
    /// The directory with the files `username` and `password` that clients log in with; None (`credentialsPath: ""`, the
    /// default) asks nobody for either.
    pub credentials: Option<PathBuf>,
}

impl Default for Socks5Config {
    fn default() -> Self {
        Self { enable: false, listen_port: 10_800, credentials: None }
    }
}

/// `serviceFilterMode`: which Services are proxied, by the label `service.edgemesh.kubeedge.io/service-proxy-name`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum ServiceFilter {
    /// `FilterIfLabelExists`: all but labelled ones.
    #[default]
    UnlabelledOnly,
    /// `FilterIfLabelDoesNotExists` (EdgeMesh's spelling): labelled ones alone.
    LabelledOnly,
}

/// `dataplane`: how the kernel is made to translate.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum DataplaneMode {
    /// The best that this kernel allows.
    #[default]
    Auto,
    Ebpf,
}

/// `ebpf`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EbpfConfig {
    /// The cgroup2 directory whose processes are served; None: found from the host's mounts.
    pub cgroup_root: Option<PathBuf>,
    /// Where maps and links are pinned; on a bpffs, mounted there if need be. Default /sys/fs/bpf/edgemesh.
    pub pin_directory: PathBuf,
    /// Capacity; default 20000.
    pub max_frontends: u32,
    /// Capacity of sets larger than 8; default 200000.
    pub max_backends: u32,
    /// From one canary connection to the next; default 30 s. Zero switches it off.
    pub canary_period: Duration,
    /// How many connections are translated packet by packet at a time; default 32768.
    pub max_connections: u32,
    /// Patterns of the interfaces where traffic from outside is served; empty: found from addresses and routes.
    pub uplinks: Vec<String>,
    /// Patterns of the interfaces to guests whose sockets are not this kernel's.
    pub guest_interfaces: Vec<String>,
    /// Whether tcx is used where the kernel has it; default true.
    pub tcx: bool,
}

impl Default for EbpfConfig {
    fn default() -> Self {
        Self {
            cgroup_root: None,
            pin_directory: PathBuf::from("/sys/fs/bpf/edgemesh"),
            max_frontends: 20_000,
            max_backends: 200_000,
            canary_period: Duration::from_secs(30),
            max_connections: 32_768,
            uplinks: Vec::new(),
            guest_interfaces: Vec::new(),
            tcx: true,
        }
    }
}

/// What to do about keys that neither EdgeMesh nor this agent has.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Leniency {
    /// They are errors.
    #[default]
    Strict,
    /// They are notes (`--lenient`).
    Lenient,
}

/// What EdgeMesh learns from its environment about where it runs.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Environment {
    /// `KUBERNETES_PORT` is there, which makes a node one of the cloud to EdgeMesh (`DetectRunningMode`).
    pub kubernetes_port: bool,
    /// `KUBERNETES_SERVICE_HOST` is there and not empty: the API server's address for pods, or, in a pod of KubeEdge's
    /// edged, metaServer's (its InClusterConfig; empty there unless edgecore requires authorization).
    pub kubernetes_service_host: bool,
}

impl Environment {
    /// Asks `lookup` (in a program, [`std::env::var_os`]) for the variables.
    pub fn of(lookup: impl Fn(&str) -> Option<OsString>) -> Self {
        Self {
            kubernetes_port: lookup("KUBERNETES_PORT").is_some(),
            kubernetes_service_host: lookup("KUBERNETES_SERVICE_HOST").is_some_and(|host| !host.is_empty()),
        }
    }
}

/// A configuration and what its user should know about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    pub config: AgentConfig,
    /// In the order of the file; at most 50, and one on how many more there would be.
    pub notes: Vec<Note>,
}

/// A remark on one place in a file; its text is one line, `FILE:LINE: KEY: MESSAGE`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Note {
    /// As the user named it.
    pub file: String,
    /// Counted from 1; `None` where the matter is something the file does not say.
    pub line: Option<usize>,
    /// Counted from 1; given for text that is not YAML.
    pub column: Option<usize>,
    /// The key's full path, `modules.edgeProxy.enable`; empty for the file as a whole.
    pub key: String,
    /// Lower case and without full stop; holds no secret.
    pub message: String,
}

impl Display for Note {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        for position in [self.line, self.column].into_iter().flatten() {
            write!(f, ":{position}")?;
        }
        if !self.key.is_empty() {
            write!(f, ": {}", self.key)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Why a file is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read at all.
    #[error("cannot read the configuration file {}: {source}; check the path and its permissions", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    /// Neither a file nor a link to one, so that reading it might never end.
    #[error("cannot read the configuration file {}: it is not a regular file", path.display())]
    NotAFile { path: PathBuf },
    /// Larger than 1 MiB, as much as a ConfigMap holds.
    #[error("cannot use the configuration file {file}: it is larger than 1 MiB")]
    TooLarge { file: String },
    /// Everything that is wrong in the file (of more than 50 things, the first 50), in its order; shown one to a line.
    #[error("{}", lines(problems))]
    Invalid { problems: Vec<Note> },
}

/// A ConfigMap holds no more either.
const MAX_SIZE: usize = 1 << 20;

/// Reads and checks a configuration file.
///
/// # Errors
/// The file cannot be read, or holds anything wrong: then all of it is reported together.
pub fn load(path: &Path, leniency: Leniency, environment: &Environment) -> Result<Loaded, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(ConfigError::NotAFile { path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_SIZE as u64 + 1).read_to_end(&mut bytes)).map_err(unreadable)?;
    let file = path.display().to_string();
    // Before UTF-8, as the cut may go through a character.
    if bytes.len() > MAX_SIZE {
        return Err(ConfigError::TooLarge { file });
    }
    match str::from_utf8(&bytes) {
        Ok(text) => {
            let mut loaded = parse(text, &file, leniency, environment)?;
            loaded.config.file = Some(path.to_owned());
            Ok(loaded)
        }
        Err(error) => {
            let line = 1 + bytes.iter().take(error.valid_up_to()).filter(|byte| **byte == b'\n').count();
            let message = "not UTF-8; expected a YAML text".to_owned();
            let problem = Note { file, line: Some(line), column: None, key: String::new(), message };
            Err(ConfigError::Invalid { problems: vec![problem] })
        }
    }
}

/// Checks the text of a configuration file, which messages call `file`.
///
/// Absent keys and `null` mean the default. Looks at the file system for one thing: whether `kubeConfig` is there.
///
/// # Errors
/// As [`load`].
pub fn parse(text: &str, file: &str, leniency: Leniency, environment: &Environment) -> Result<Loaded, ConfigError> {
    if text.len() > MAX_SIZE {
        return Err(ConfigError::TooLarge { file: file.to_owned() });
    }
    let root = document::read(text).map_err(|document::Malformed { line, column, message }| {
        let (line, column) = (Some(line), Some(column));
        let problem = Note { file: file.to_owned(), line, column, key: String::new(), message };
        ConfigError::Invalid { problems: vec![problem] }
    })?;
    let mut findings = check::check(&root, file, leniency);
    let kind = if findings.readable { source::choose(&mut findings, *environment) } else { None };
    dns::check(&mut findings);
    let check::Findings { draft, problems, notes, .. } = findings;
    let (problems, notes) = (problems.in_order(file), notes.in_order(file));
    match kind {
        Some(kind) if problems.is_empty() => {
            let source = SourceConfig { kind, qps: draft.qps, burst: draft.burst };
            // As EdgeMesh's `DetectRunningMode` and its defaults for each mode have it.
            let dns = draft.dns_enable.unwrap_or(!environment.kubernetes_port).then_some(draft.dns);
            let (common, proxy, tunnel) = (draft.common, draft.proxy, draft.tunnel);
            Ok(Loaded { config: AgentConfig { source, common, proxy, tunnel, dns, file: None }, notes })
        }
        _ => Err(ConfigError::Invalid { problems }),
    }
}

fn lines(problems: &[Note]) -> String {
    problems.iter().map(Note::to_string).collect::<Vec<_>>().join("\n")
}
