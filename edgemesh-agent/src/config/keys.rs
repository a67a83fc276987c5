//! Every key of the file, once: what is read, checked, suggested, printed and described all follows from this table.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use super::{
    AllowedTarget, CommonConfig, DataplaneMode, DnsConfig, ProxyConfig, ServiceFilter, SourceChoice, TunnelConfig,
};
use crate::{
    dns::{forward::StubDomain, zone::ClusterDomain},
    model::IpPrefix,
    tunnel::{RelayNode, ServeRelay},
};

/// The `apiVersion` of EdgeMesh's agent configuration.
pub(super) const API_VERSION: &str = "agent.edgemesh.config.kubeedge.io/v1alpha1";
/// The `kind` of EdgeMesh's agent configuration.
pub(super) const KIND: &str = "EdgeMeshAgent";

/// One key.
#[derive(Debug)]
pub(super) struct Key {
    /// As EdgeMesh spells it; a file may use any case.
    pub(super) name: &'static str,
    /// One line, for the comments of the default file and for the schema.
    pub(super) doc: &'static str,
    pub(super) kind: Kind,
    /// A used key that the smallest file with which the agent does its work has to set.
    pub(super) essential: bool,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// A mapping of further keys.
    Section(&'static [Key]),
    /// `apiVersion` and `kind`, with the value this agent wants.
    Header(&'static str),
    /// A key this agent acts on.
    Used(Slot),
    /// A key of EdgeMesh that has no effect in this version.
    Accepted(Plain),
}

/// Where the value of a key goes, which also says what it has to look like. Defaults are those of [`Draft::default`].
#[derive(Debug)]
pub(super) enum Slot {
    Bool(fn(&mut Draft) -> &mut bool),
    /// True, false, or as it fits the node.
    Auto(fn(&mut Draft) -> &mut Option<bool>),
    /// 1 or more.
    Count(fn(&mut Draft) -> &mut u32),
    /// 0 or more.
    Limit(fn(&mut Draft) -> &mut u32),
    /// Whole seconds, 0 to switch it off.
    Period(fn(&mut Draft) -> &mut Duration),
    Interface(fn(&mut Draft) -> &mut String),
    Ip(fn(&mut Draft) -> &mut IpAddr),
    /// An IPv6 address, or empty.
    OptionalIpv6(fn(&mut Draft) -> &mut Option<Ipv6Addr>),
    Port(fn(&mut Draft) -> &mut u16),
    Domain(fn(&mut Draft) -> &mut ClusterDomain),
    /// DNS servers: IP or IP:PORT.
    Servers(fn(&mut Draft) -> &mut Vec<SocketAddr>),
    /// Mappings of a domain to such servers.
    StubDomains(fn(&mut Draft) -> &mut Vec<StubDomain>),
    /// IP:PORT, or empty.
    Listen(fn(&mut Draft) -> &mut Option<SocketAddr>),
    Path(fn(&mut Draft) -> &mut PathBuf),
    /// A path that fits into a `sockaddr_un`.
    UnixSocket(fn(&mut Draft) -> &mut PathBuf),
    /// A path, or empty.
    OptionalPath(fn(&mut Draft) -> &mut Option<PathBuf>),
    /// Names of interfaces, `*` standing for any characters.
    Interfaces(fn(&mut Draft) -> &mut Vec<String>),
    /// A network of IPv4 that aliases are from.
    AliasRangeV4(fn(&mut Draft) -> &mut IpPrefix),
    /// One of IPv6.
    AliasRangeV6(fn(&mut Draft) -> &mut IpPrefix),
    /// Networks of either family.
    Networks(fn(&mut Draft) -> &mut Vec<IpPrefix>),
    /// An http or https URL, or empty.
    Url(fn(&mut Draft) -> &mut Option<String>),
    Filter(fn(&mut Draft) -> &mut ServiceFilter),
    Dataplane(fn(&mut Draft) -> &mut DataplaneMode),
    Source(fn(&mut Draft) -> &mut SourceChoice),
    /// As `Bool`, with its text kept out of messages: it stands beside a secret.
    SecretBool(fn(&mut Draft) -> &mut bool),
    /// As `Path`, with its text kept out of messages: it stands where users might write a secret.
    SecretPath(fn(&mut Draft) -> &mut PathBuf),
    /// Mappings with the keys given, [`RELAY_NODE`].
    RelayNodes(fn(&mut Draft) -> &mut Vec<RelayNode>, &'static [Key]),
    ServeRelay(fn(&mut Draft) -> &mut ServeRelay),
    /// `HOST:PORT` each.
    Targets(fn(&mut Draft) -> &mut Vec<AllowedTarget>),
    Sockets(fn(&mut Draft) -> &mut Vec<SocketAddr>),
    /// Names of nodes or PeerIds.
    Peers(fn(&mut Draft) -> &mut Vec<String>),
}

/// The type of a key without effect, with the values that change nothing: EdgeMesh's defaults.
#[derive(Debug)]
pub(super) enum Plain {
    Bool(bool),
    Whole(i64),
    Number(f64),
    Text(&'static [&'static str]),
    /// One of the words; the first is the default.
    Choice(&'static [&'static str]),
    /// Texts; none by default.
    Texts,
    /// EdgeMesh overwrites it at start, whatever it holds.
    Opaque,
}

/// The values of all used keys: those of the file over the defaults.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Draft {
    pub(super) master: Option<String>,
    pub(super) kube_config: Option<PathBuf>,
    pub(super) static_directory: Option<PathBuf>,
    pub(super) source: SourceChoice,
    pub(super) meta_server: MetaServerDraft,
    pub(super) qps: u32,
    pub(super) burst: u32,
    pub(super) common: CommonConfig,
    pub(super) proxy: ProxyConfig,
    /// None: where EdgeMesh has it on.
    pub(super) dns_enable: Option<bool>,
    pub(super) dns: DnsConfig,
    pub(super) tunnel: TunnelConfig,
}

/// `kubeAPIConfig.metaServer`, with EdgeMesh's defaults (its `pkg/apis/config/defaults/default.go`).
#[derive(Clone, Debug, PartialEq)]
pub(super) struct MetaServerDraft {
    pub(super) server: Option<String>,
    /// Seconds.
    pub(super) relist_period: u32,
    /// Seconds.
    pub(super) request_timeout: u32,
    pub(super) require_authorization: bool,
    pub(super) insecure: bool,
    pub(super) ca: PathBuf,
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
    pub(super) token: PathBuf,
}

impl Default for MetaServerDraft {
    fn default() -> Self {
        Self {
            server: Some("http://127.0.0.1:10550".to_owned()),
            relist_period: 300,
            request_timeout: 30,
            require_authorization: false,
            insecure: false,
            ca: PathBuf::from("/etc/edgemesh/metaserver/rootCA.crt"),
            certificate: PathBuf::from("/etc/edgemesh/metaserver/server.crt"),
            key: PathBuf::from("/etc/edgemesh/metaserver/server.key"),
            token: PathBuf::from("/var/run/secrets/kubernetes.io/serviceaccount/token"),
        }
    }
}

impl Default for Draft {
    fn default() -> Self {
        Self {
            master: None,
            kube_config: None,
            static_directory: None,
            source: SourceChoice::default(),
            meta_server: MetaServerDraft::default(),
            qps: 100,
            burst: 200,
            common: CommonConfig::default(),
            proxy: ProxyConfig::default(),
            dns_enable: None,
            dns: DnsConfig::default(),
            tunnel: TunnelConfig::default(),
        }
    }
}

const fn section(name: &'static str, doc: &'static str, keys: &'static [Key]) -> Key {
    Key { name, doc, kind: Kind::Section(keys), essential: false }
}

const fn header(name: &'static str, doc: &'static str, wanted: &'static str) -> Key {
    Key { name, doc, kind: Kind::Header(wanted), essential: false }
}

const fn used(name: &'static str, doc: &'static str, slot: Slot) -> Key {
    Key { name, doc, kind: Kind::Used(slot), essential: false }
}

const fn accepted(name: &'static str, doc: &'static str, plain: Plain) -> Key {
    Key { name, doc, kind: Kind::Accepted(plain), essential: false }
}

impl Key {
    const fn essential(self) -> Self {
        Self { essential: true, ..self }
    }
}

/// The top level. EdgeMesh's part is its `pkg/apis/config/v1alpha1/types.go`, with the defaults of `default.go`.
pub(super) static KEYS: &[Key] = &[
    header("apiVersion", "The version of this file's form.", API_VERSION),
    header("kind", "What this file configures.", KIND),
    section("kubeAPIConfig", "Where Services and endpoints come from.", KUBE_API),
    section("commonConfig", "What all modules share.", COMMON),
    section("modules", "The parts of the agent.", MODULES),
];

const KUBE_API: &[Key] = &[
    used("master", "URL of the API server, overriding the one in kubeConfig.", Slot::Url(|d| &mut d.master)),
    used(
        "kubeConfig",
        "Path of a kubeconfig. With this, master and staticDirectory empty, source says where from.",
        Slot::OptionalPath(|d| &mut d.kube_config),
    ),
    used(
        "staticDirectory",
        "Directory of manifests to read instead of asking an API server; watched. Excludes kubeConfig and master.",
        Slot::OptionalPath(|d| &mut d.static_directory),
    ),
    used(
        "source",
        "Whom to ask: inCluster (the API server), metaServer (KubeEdge's at the edge), or auto: inCluster where \
         KUBERNETES_PORT is set, as kubelet does, else metaServer.",
        Slot::Source(|d| &mut d.source),
    ),
    used("qps", "Requests per second to the API server or metaServer.", Slot::Count(|d| &mut d.qps)),
    used("burst", "How many of these requests may come at once.", Slot::Count(|d| &mut d.burst)),
    accepted(
        "contentType",
        "Encoding of API objects; this agent always speaks JSON.",
        // The one for cloud nodes and the one for edge nodes.
        Plain::Text(&["application/vnd.kubernetes.protobuf", "application/json"]),
    ),
    // No override: EdgeMesh overwrites it, so files that all nodes share hold whatever the node had that printed them.
    accepted("mode", "Detected at start.", Plain::Opaque),
    section("metaServer", "KubeEdge's API for nodes at the edge.", META_SERVER),
    accepted("deleteKubeConfig", "Whether to delete the kubeconfig made for metaServer.", Plain::Bool(false)),
];

const META_SERVER: &[Key] = &[
    used(
        "server",
        "URL of metaServer; https where security.requireAuthorization is true, whatever is written here.",
        Slot::Url(|d| &mut d.meta_server.server),
    ),
    used(
        "relistPeriod",
        "Seconds from one complete list to the next, by which what watches missed is found.",
        Slot::Count(|d| &mut d.meta_server.relist_period),
    ),
    used(
        "requestTimeout",
        "Seconds that metaServer may take for a complete answer.",
        Slot::Count(|d| &mut d.meta_server.request_timeout),
    ),
    section("security", "How to log in to metaServer.", META_SERVER_SECURITY),
];

const META_SERVER_SECURITY: &[Key] = &[
    used(
        "requireAuthorization",
        "Whether metaServer wants TLS and a token: KubeEdge's feature gate of that name.",
        Slot::Bool(|d| &mut d.meta_server.require_authorization),
    ),
    used(
        "insecureSkipTLSVerify",
        "Whether to trust any certificate of metaServer.",
        Slot::Bool(|d| &mut d.meta_server.insecure),
    ),
    used(
        "tlsCaFile",
        "Path of the CA that signed metaServer's certificate. The default, where missing: the ServiceAccount's ca.crt.",
        Slot::Path(|d| &mut d.meta_server.ca),
    ),
    used(
        "tlsCertFile",
        "Path of the client certificate. The default, where missing together with its key: none.",
        Slot::Path(|d| &mut d.meta_server.certificate),
    ),
    used("tlsPrivateKeyFile", "Path of its key.", Slot::Path(|d| &mut d.meta_server.key)),
    used(
        "tokenFile",
        "Path of the ServiceAccount's token, read anew for each request.",
        Slot::Path(|d| &mut d.meta_server.token),
    ),
];

const COMMON: &[Key] = &[
    used(
        "bridgeDeviceName",
        "The network device that is created to hold bridgeDeviceIP.",
        Slot::Interface(|d| &mut d.common.bridge_device_name),
    ),
    used(
        "bridgeDeviceIP",
        "The node-local address (EdgeMesh's), on which pods find DNS.",
        Slot::Ip(|d| &mut d.common.bridge_device_ip),
    ),
    used(
        "bridgeDeviceIPv6",
        "A second node-local address, such as fd00:169:254:96::16, for pods with IPv6 alone. Empty: none.",
        Slot::OptionalIpv6(|d| &mut d.common.bridge_device_ipv6),
    ),
    used(
        "adminAddress",
        "IP:PORT that answers /healthz, /readyz and /metrics. Empty: none.",
        Slot::Listen(|d| &mut d.common.admin_address),
    ),
    used(
        "controlSocket",
        "The unix socket that `edgemesh-agent status` and its like talk to.",
        Slot::UnixSocket(|d| &mut d.common.control_socket),
    ),
    used(
        "maxBackendSeries",
        "How many backends may have series of their own in /metrics, two for each; those beyond are left out. 0: none.",
        Slot::Limit(|d| &mut d.common.max_backend_series),
    ),
    used(
        "metadataSnapshot",
        "The file that holds what the API server delivered last, for a start without it. Empty: none.",
        Slot::OptionalPath(|d| &mut d.common.metadata_snapshot),
    ),
    used(
        "aliasCIDR",
        "Where the addresses are from that stand on this node for pods of other sites; /8 to /28, used nowhere else.",
        Slot::AliasRangeV4(|d| &mut d.common.aliases.v4),
    ),
    used("aliasCIDRv6", "The same for IPv6; /32 to /112.", Slot::AliasRangeV6(|d| &mut d.common.aliases.v6)),
    used(
        "aliasFile",
        "The file that holds which pod has which of these addresses, for the next start. Empty: none.",
        Slot::OptionalPath(|d| &mut d.common.alias_file),
    ),
    section("pprofConfig", "Go's profiler.", PPROF),
];

const PPROF: &[Key] = &[
    accepted("enableProfiling", "Whether to serve /debug/pprof.", Plain::Bool(false)),
    accepted("profilingAddress", "IP to serve it on.", Plain::Text(&[""])),
    accepted("profilingPort", "Port to serve it on.", Plain::Whole(0)),
];

const MODULES: &[Key] = &[
    section("edgeDNS", "Answers the cluster's DNS names on this node.", EDGE_DNS),
    section("edgeProxy", "Carries connections to Services to their endpoints.", EDGE_PROXY),
    section("edgeTunnel", "Reaches nodes of other networks.", EDGE_TUNNEL),
    section("edgeCNI", "Gives pods their addresses.", EDGE_CNI),
];

const EDGE_DNS: &[Key] = &[
    used(
        "enable",
        "Whether to answer DNS on the node-local addresses. Null: at the edge, that is where KUBERNETES_PORT is not set.",
        Slot::Auto(|d| &mut d.dns_enable),
    ),
    accepted("kubeAPIConfig", "Overwritten at start.", Plain::Opaque),
    accepted("listenInterface", "Overwritten at start.", Plain::Opaque),
    used("listenPort", "Port to answer on, by UDP and TCP.", Slot::Port(|d| &mut d.dns.listen_port)),
    used(
        "clusterDomain",
        "The domain of the cluster's names, as kubelets have it.",
        Slot::Domain(|d| &mut d.dns.cluster_domain),
    ),
    used(
        "resolvConf",
        "The file that names the DNS servers for all other names; watched.",
        Slot::Path(|d| &mut d.dns.resolv_conf),
    ),
    used(
        "stubDomains",
        "Domains with DNS servers of their own: a list of {domain: corp.example, servers: [192.0.2.53]}.",
        Slot::StubDomains(|d| &mut d.dns.stub_domains),
    ),
    used(
        "serveStale",
        "Seconds for which answers are given past their time while the DNS servers are silent. 0: never.",
        Slot::Period(|d| &mut d.dns.serve_stale),
    ),
    used(
        "maxCacheEntries",
        "How many answers of other DNS servers are kept.",
        Slot::Count(|d| &mut d.dns.max_cache_entries),
    ),
    used(
        "maxClientQueries",
        "Queries a second that one client may send; those beyond are not answered. 0: any number.",
        Slot::Limit(|d| &mut d.dns.max_client_queries),
    ),
    used(
        "maxClientForwarded",
        "Queries a second of one client for which other DNS servers are asked; those beyond are refused. 0: any number.",
        Slot::Limit(|d| &mut d.dns.max_client_forwarded),
    ),
    used(
        "maxWaiting",
        "How many queries of all clients may wait for other DNS servers at a time; those beyond fail at once.",
        Slot::Count(|d| &mut d.dns.max_waiting),
    ),
    used(
        "answerOutside",
        "Whether queries that come in by an uplink, from other machines, are answered, too.",
        Slot::Bool(|d| &mut d.dns.answer_outside),
    ),
    section("cacheDNS", "A cache before the cluster's own DNS, in place of answers from Services.", CACHE_DNS),
];

const CACHE_DNS: &[Key] = &[
    used("enable", "Whether to ask the cluster's DNS for all names.", Slot::Bool(|d| &mut d.dns.cache_dns.enable)),
    used(
        "autoDetect",
        "Whether to ask the Services coredns and kube-dns of kube-system and those labelled k8s-app=kube-dns.",
        Slot::Bool(|d| &mut d.dns.cache_dns.auto_detect),
    ),
    used(
        "upstreamServers",
        "DNS servers to ask beside those: IP or IP:PORT.",
        Slot::Servers(|d| &mut d.dns.cache_dns.upstream_servers),
    ),
    used(
        "cacheTTL",
        "Seconds that an answer is kept at most, in this mode.",
        Slot::Count(|d| &mut d.dns.cache_dns.cache_ttl),
    ),
];

const EDGE_PROXY: &[Key] = &[
    used("enable", "Whether to carry connections to Services.", Slot::Bool(|d| &mut d.proxy.enable)).essential(),
    used(
        "serviceFilterMode",
        "Which Services are carried: FilterIfLabelExists all but those labelled \
         service.edgemesh.kubeedge.io/service-proxy-name, FilterIfLabelDoesNotExists only those.",
        Slot::Filter(|d| &mut d.proxy.filter),
    ),
    used(
        "dataplane",
        "How the kernel is made to translate: auto (the best it allows) or ebpf.",
        Slot::Dataplane(|d| &mut d.proxy.dataplane),
    ),
    section("ebpf", "Translation by eBPF programs.", EBPF),
    accepted("listenInterface", "Overwritten at start.", Plain::Opaque),
    section("socks5Proxy", "A SOCKS5 server that knows nodes by name.", SOCKS5),
    section("loadBalancer", "How an endpoint is chosen.", LOAD_BALANCER),
];

const EBPF: &[Key] = &[
    used(
        "cgroupRoot",
        "The cgroup2 directory whose processes are served. Empty: found from the node's mounts.",
        Slot::OptionalPath(|d| &mut d.proxy.ebpf.cgroup_root),
    ),
    used(
        "pinDirectory",
        "Where maps and links are pinned so that they outlive the agent; on a bpffs, mounted there if need be.",
        Slot::Path(|d| &mut d.proxy.ebpf.pin_directory),
    ),
    used(
        "maxFrontends",
        "How many address:port pairs Services may answer on.",
        Slot::Count(|d| &mut d.proxy.ebpf.max_frontends),
    ),
    used(
        "maxBackends",
        "How many endpoints there may be in all in sets of more than 8.",
        Slot::Count(|d| &mut d.proxy.ebpf.max_backends),
    ),
    used(
        "canaryPeriod",
        "Seconds from one canary connection, which proves that translation works, to the next. 0: none.",
        Slot::Period(|d| &mut d.proxy.ebpf.canary_period),
    ),
    used(
        "maxConnections",
        "How many connections from outside and from guests are known at a time; the one silent longest gives way.",
        Slot::Count(|d| &mut d.proxy.ebpf.max_connections),
    ),
    used(
        "uplinks",
        "The interfaces where traffic from outside is served, such as eth*. Empty: those with the Node's addresses, and \
         those that routes through a gateway lead to.",
        Slot::Interfaces(|d| &mut d.proxy.ebpf.uplinks),
    ),
    used(
        "guestInterfaces",
        "The host's interfaces to guests with a network stack of their own (Kata, gVisor, KubeVirt), such as tap*: what \
         they send to Services is translated packet by packet.",
        Slot::Interfaces(|d| &mut d.proxy.ebpf.guest_interfaces),
    ),
    used(
        "tcx",
        "Whether programs for packets are attached by tcx where the kernel has it (Linux 6.6); else always by clsact.",
        Slot::Bool(|d| &mut d.proxy.ebpf.tcx),
    ),
];

const SOCKS5: &[Key] = &[
    used("enable", "Whether to serve SOCKS5 on the node-local addresses.", Slot::Bool(|d| &mut d.proxy.socks5.enable)),
    used("listenPort", "Port to serve it on.", Slot::Port(|d| &mut d.proxy.socks5.listen_port)),
    used(
        "credentialsPath",
        "Directory with the files username and password that clients log in with, as a Secret of type \
         kubernetes.io/basic-auth is mounted; read at each login. Empty: nobody has to log in.",
        Slot::OptionalPath(|d| &mut d.proxy.socks5.credentials),
    ),
    accepted("nodeName", "Overwritten at start.", Plain::Opaque),
    accepted("namespace", "Overwritten at start.", Plain::Opaque),
];

const LOAD_BALANCER: &[Key] = &[
    accepted("caller", "Overwritten at start.", Plain::Opaque),
    accepted("nodeName", "Overwritten at start.", Plain::Opaque),
    section("consistentHash", "The ring for DestinationRules that hash.", CONSISTENT_HASH),
];

const CONSISTENT_HASH: &[Key] = &[
    accepted("partitionCount", "Partitions of the ring.", Plain::Whole(100)),
    accepted("replicationFactor", "Points on the ring per endpoint.", Plain::Whole(10)),
    accepted("load", "How far above the mean an endpoint may be loaded.", Plain::Number(1.25)),
];

const EDGE_TUNNEL: &[Key] = &[
    used("enable", "Whether pods of other sites are reached by the tunnel.", Slot::Bool(|d| &mut d.tunnel.enable)),
    used(
        "directCIDRs",
        "Networks whose pods and nodes are always reached directly, such as [10.0.0.0/8].",
        Slot::Networks(|d| &mut d.tunnel.overrides.direct),
    ),
    used(
        "neverDirectCIDRs",
        "Networks whose pods and nodes on other nodes are always reached by the tunnel; of two networks the longer counts.",
        Slot::Networks(|d| &mut d.tunnel.overrides.never_direct),
    ),
    accepted("mode", "Overwritten at start.", Plain::Opaque),
    accepted("nodeName", "Overwritten at start.", Plain::Opaque),
    accepted("configPath", "Overwritten at start.", Plain::Opaque),
    used("listenPort", "Port for other nodes, TCP and UDP.", Slot::Port(|d| &mut d.tunnel.listen_port)),
    used(
        "allowedTargets",
        "What is dialled for other nodes besides this node's endpoints: HOST:PORT each, HOST being node (this one), an \
         address or a network, PORT a port or *.",
        Slot::Targets(|d| &mut d.tunnel.allowed_targets),
    ),
    used(
        "allowedPeers",
        "The nodes that this one talks to, each by its name or PeerId. Empty: all that know the PSK.",
        Slot::Peers(|d| &mut d.tunnel.allowed_peers),
    ),
    used(
        "serveRelay",
        "When this node forwards for others: whenListed in relayNodes, whenPublic (also when others can reach it) or \
         always.",
        Slot::ServeRelay(|d| &mut d.tunnel.serve_relay),
    ),
    used(
        "enableHolePunch",
        "Whether holes are punched in NATs, so that traffic leaves the relays.",
        Slot::Bool(|d| &mut d.tunnel.hole_punching),
    ),
    used(
        "announceAddresses",
        "Where else others reach this node, such as at a port that a NAT forwards to it: IP:PORT each, TCP and UDP.",
        Slot::Sockets(|d| &mut d.tunnel.announce),
    ),
    accepted(
        "transport",
        "What carries the tunnel; this agent always uses TCP and QUIC.",
        Plain::Choice(&["tcp", "ws", "quic"]),
    ),
    // Sic.
    accepted("rendezvous", "Name under which nodes find each other.", Plain::Text(&["EDGEMESH_PLAYGOUND"])),
    used(
        "relayNodes",
        "Nodes that others can reach and that forward for them; followed while the agent runs.",
        Slot::RelayNodes(|d| &mut d.tunnel.relays, RELAY_NODE),
    ),
    accepted("enableIpfsLog", "Whether libp2p logs its details.", Plain::Bool(false)),
    accepted("maxCandidates", "How many relays are considered.", Plain::Whole(15)),
    accepted("heartbeatPeriod", "Seconds between looks at the relays' connections.", Plain::Whole(120)),
    accepted("finderPeriod", "Seconds between searches for relays.", Plain::Whole(60)),
    section("psk", "The secret that the nodes share.", PSK),
    section("tunnelLimitConfig", "Limits on streams.", TUNNEL_LIMITS),
    accepted("listenInterfaces", "Devices to listen on.", Plain::Text(&["*", ""])),
    accepted("extraFilteredInterfaces", "Further devices not to listen on.", Plain::Text(&[""])),
    section("metricConfig", "The tunnel's metrics.", METRICS),
];

const RELAY_NODE: &[Key] = &[
    accepted("nodeName", "The node's name in Kubernetes.", Plain::Text(&[""])),
    accepted("advertiseAddress", "Its addresses that others can reach.", Plain::Texts),
];

const PSK: &[Key] = &[
    used(
        "enable",
        "Whether nodes have to know the secret; without, this agent has no tunnel.",
        Slot::SecretBool(|d| &mut d.tunnel.psk_enable),
    ),
    used(
        "path",
        "Path of the file that holds it; followed while the agent runs. A second line is another one that others may use.",
        Slot::SecretPath(|d| &mut d.tunnel.psk),
    ),
];

const TUNNEL_LIMITS: &[Key] = &[
    accepted("enable", "Whether streams are limited.", Plain::Bool(true)),
    used("tunnelBaseStreamIn", "Streams from all nodes at a time.", Slot::Count(|d| &mut d.tunnel.max_served)),
    accepted("tunnelBaseStreamOut", "Streams to all nodes.", Plain::Whole(10240)),
    accepted("tunnelPeerBaseStreamIn", "Streams from one node.", Plain::Whole(1024)),
    accepted("tunnelPeerBaseStreamOut", "Streams to one node.", Plain::Whole(1024)),
];

const METRICS: &[Key] = &[
    accepted("enable", "Whether to serve them.", Plain::Bool(false)),
    accepted("port", "Port to serve them on.", Plain::Whole(9999)),
];

const EDGE_CNI: &[Key] = &[
    accepted("enable", "Whether to give pods addresses.", Plain::Bool(false)),
    accepted("encapsulationIP", "Never read by EdgeMesh.", Plain::Text(&[""])),
    accepted("tunMode", "Never read by EdgeMesh.", Plain::Whole(0)),
    section("meshCIDRConfig", "The ranges of pod addresses.", MESH_CIDRS),
];

const MESH_CIDRS: &[Key] = &[
    accepted("cloudCIDR", "Ranges of cloud nodes.", Plain::Texts),
    accepted("edgeCIDR", "Ranges of edge nodes.", Plain::Texts),
];
