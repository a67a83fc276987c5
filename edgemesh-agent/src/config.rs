//! The configuration file.

use std::{net::IpAddr, net::SocketAddr, path::PathBuf};

/// The agent's configuration, parsed and validated: nothing after this point sees a raw string.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentConfig {
    pub source: SourceConfig,
    pub common: CommonConfig,
    pub proxy: ProxyConfig,
}

/// Where Services and endpoints come from (`kubeAPIConfig`).
#[derive(Clone, Debug, PartialEq)]
pub struct SourceConfig {
    pub kind: SourceKind,
    /// Requests per second to the API server, and how many may come at once.
    pub qps: u32,
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
}

/// `commonConfig`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CommonConfig {
    /// Default `edgemesh0`; at most 15 bytes (IFNAMSIZ).
    pub bridge_device_name: String,
    /// Default 169.254.96.16.
    pub bridge_device_ip: IpAddr,
    /// Serves /healthz, /readyz and /metrics; default 127.0.0.1:20008. None switches it off (`adminAddress: ""`).
    pub admin_address: Option<SocketAddr>,
    /// Default /run/edgemesh/agent.sock.
    pub control_socket: PathBuf,
}

/// `modules.edgeProxy`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ProxyConfig {
    pub enable: bool,
    pub filter: ServiceFilter,
    pub dataplane: DataplaneMode,
    pub ebpf: EbpfConfig,
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
}
