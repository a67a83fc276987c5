//! DNS as the configuration has it.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    time::Duration,
};

use crate::{
    config::{CommonConfig, DnsConfig},
    dns::{
        Limits, Settings,
        forward::{self, CacheSettings, TtlLimits, Upstreams},
        zone::ZoneSettings,
    },
};

/// Puts the settings together: DNS answers on the node-local addresses, and not from `uplinks`, or what passes for them.
pub(super) fn settings(common: &CommonConfig, dns: &DnsConfig, uplinks: &[String]) -> Settings {
    let second = common.bridge_device_ipv6.map(IpAddr::V6);
    let addresses: Vec<IpAddr> = [Some(common.bridge_device_ip), second].into_iter().flatten().collect();
    let listen: Vec<SocketAddr> = addresses.iter().map(|ip| SocketAddr::new(*ip, dns.listen_port)).collect();
    let cache = &dns.cache_dns;
    let (zone, upstreams, ttl) = if cache.enable {
        let upstreams =
            Upstreams::ClusterDns { auto_detect: cache.auto_detect, servers: cache.upstream_servers.clone() };
        (None, upstreams, limits(Duration::from_secs(cache.cache_ttl.into())))
    } else {
        let zone = ZoneSettings { domain: dns.cluster_domain.clone(), addresses };
        (Some(zone), Upstreams::ResolvConf(dns.resolv_conf.clone()), TtlLimits::default())
    };
    let entries = usize::try_from(dns.max_cache_entries).unwrap_or(usize::MAX);
    Settings {
        zone,
        forward: forward::Settings {
            upstreams,
            stub_domains: dns.stub_domains.clone(),
            own: listen.clone(),
            cache: CacheSettings { max_entries: entries, ttl, stale: dns.serve_stale, ..CacheSettings::default() },
        },
        listen,
        limits: Limits {
            queries: NonZeroU32::new(dns.max_client_queries),
            forwarded: NonZeroU32::new(dns.max_client_forwarded),
            waiting: dns.max_waiting,
        },
        closed_to: (!dns.answer_outside).then(|| uplinks.to_vec()),
    }
}

/// Those of CoreDNS's `cache TTL`, which is one ceiling for all answers.
fn limits(ceiling: Duration) -> TtlLimits {
    let usual = TtlLimits::default();
    TtlLimits { floor: usual.floor.min(ceiling), ceiling, negative_ceiling: usual.negative_ceiling.min(ceiling) }
}
