//! `modules.edgeDNS`.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use super::check::Findings;
use crate::dns::{forward::StubDomain, zone::ClusterDomain};

/// How DNS is answered on this node; EdgeMesh's keys, and a few of our own.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct DnsConfig {
    /// Default 53.
    pub listen_port: u16,
    /// Default `cluster.local`, which EdgeMesh has fixed.
    pub cluster_domain: ClusterDomain,
    /// Default /etc/resolv.conf, EdgeMesh's upstream too.
    pub resolv_conf: PathBuf,
    /// Default none.
    pub stub_domains: Vec<StubDomain>,
    /// For how long answers are given past their TTL while upstreams are silent; default a day, zero for never.
    pub serve_stale: Duration,
    /// Default 10,000.
    pub max_cache_entries: u32,
    /// Queries a second of one client address; default 50,000, 0 for any number.
    pub max_client_queries: u32,
    /// Those of them that upstreams are asked about; default 1,000, 0 for any number.
    pub max_client_forwarded: u32,
    /// How many queries may wait for upstreams at a time; default 1,000.
    pub max_waiting: u32,
    /// Whether queries from other machines are answered; default false.
    pub answer_outside: bool,
    pub cache_dns: CacheDnsConfig,
}

/// `cacheDNS`: all names are asked of the cluster's own DNS.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CacheDnsConfig {
    /// Default false.
    pub enable: bool,
    /// Whether to find the cluster's DNS in its Services; default true.
    pub auto_detect: bool,
    /// Whom to ask beside those; default none.
    pub upstream_servers: Vec<SocketAddr>,
    /// Seconds; default 30.
    pub cache_ttl: u32,
}

impl Default for DnsConfig {
    fn default() -> Self {
        Self {
            listen_port: 53,
            cluster_domain: ClusterDomain::default(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            stub_domains: Vec::new(),
            serve_stale: Duration::from_secs(86_400),
            max_cache_entries: 10_000,
            max_client_queries: 50_000,
            max_client_forwarded: 1000,
            max_waiting: 1000,
            answer_outside: false,
            cache_dns: CacheDnsConfig { enable: false, auto_detect: true, upstream_servers: Vec::new(), cache_ttl: 30 },
        }
    }
}

/// Adds a problem where there is nobody to ask; EdgeMesh ends on it, too ("failed to get nodelocal dns upstream servers").
pub(super) fn check(findings: &mut Findings<'_>) {
    let cache = &findings.draft.dns.cache_dns;
    if findings.draft.dns_enable != Some(false)
        && cache.enable
        && !cache.auto_detect
        && cache.upstream_servers.is_empty()
    {
        let message = "empty, and autoDetect is false; expected the cluster's DNS servers, or autoDetect: true";
        findings.problem_with("modules.edgeDNS.cacheDNS.upstreamServers", message.to_owned());
    }
}
