//! The families of DNS.

use std::{collections::BTreeMap, fmt};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet},
    metrics::{MetricType, counter::ConstCounter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::{Rows, gauge, whole};
use crate::dns::{
    DnsStatus,
    forward::UpstreamStatus,
    stats::{BOUNDS_MICROS, Histogram, Stats},
};

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct QueryLabels {
    r#type: &'static str,
    zone: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ZoneLabels {
    zone: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ListenerLabels {
    address: String,
    transport: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct UpstreamLabels {
    upstream: String,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct FailureLabels {
    upstream: String,
    reason: &'static str,
}

/// Adds what DNS counted and what it knows of its upstreams.
pub(super) fn add(registry: &mut Registry, status: &DnsStatus, queries: Option<&Stats>) {
    let listening = Family::<ListenerLabels, Gauge>::default();
    for listener in &status.listeners {
        let labels = ListenerLabels { address: listener.address.to_string(), transport: listener.transport };
        listening.get_or_create(&labels).set(i64::from(listener.listening));
    }
    registry.register("dns_listening", "Whether queries are answered on an address", listening);
    if let Some(stats) = queries {
        let rows = stats.queries.iter().map(|([kind, zone, result], count)| {
            (QueryLabels { r#type: kind, zone, result }, ConstCounter::new(*count))
        });
        let help = "Queries by type, by whose name was asked for, and by what became of them";
        registry.register_collector(Box::new(Rows { name: "dns_queries", help, rows: rows.collect() }));
        registry.register_collector(Box::new(Latency(stats.latency.clone())));
    }
    let cache = &status.forwarder.cache;
    gauge(registry, "dns_cache_entries", "Answers of upstreams in the cache", whole(cache.entries));
    gauge(registry, "dns_cache_bytes", "The size of these answers", whole(cache.bytes));
    for (name, help, count) in [
        ("dns_cache_hits", "Questions answered from the cache in time", cache.hits),
        ("dns_cache_misses", "Questions that the cache had no answer for in time", cache.misses),
        ("dns_stale_answers", "Answers given past their time, as no upstream answered", cache.stale),
        ("dns_cache_refreshed", "Answers asked for again before anybody had to wait for them", cache.refreshed),
        ("dns_cache_evicted", "Answers that went from the cache to make room", cache.evicted),
    ] {
        registry.register(name, help, ConstCounter::new(count));
    }
    add_upstreams(registry, &status.forwarder.upstreams);
}

/// An upstream that serves several domains counts once.
fn add_upstreams(registry: &mut Registry, upstreams: &[UpstreamStatus]) {
    let upstreams: BTreeMap<String, &UpstreamStatus> =
        upstreams.iter().map(|upstream| (upstream.address.to_string(), upstream)).collect();
    let healthy = Family::<UpstreamLabels, Gauge>::default();
    for (address, upstream) in &upstreams {
        let labels = UpstreamLabels { upstream: address.clone() };
        healthy.get_or_create(&labels).set(i64::from(upstream.healthy));
    }
    registry.register("dns_upstream_healthy", "Whether the upstream answered when it was last asked", healthy);
    let asked = upstreams
        .iter()
        .map(|(address, upstream)| (UpstreamLabels { upstream: address.clone() }, ConstCounter::new(upstream.asked)));
    let help = "Questions that the upstream was asked, probes included";
    registry.register_collector(Box::new(Rows { name: "dns_upstream_queries", help, rows: asked.collect() }));
    let failures = upstreams.iter().flat_map(|(address, upstream)| {
        let of = |reason, count| (FailureLabels { upstream: address.clone(), reason }, ConstCounter::new(count));
        [of("silent", upstream.silent), of("refused", upstream.refused), of("rejected", upstream.rejected)]
    });
    let help = "Questions that the upstream did not answer, said it could not answer, or answered wrongly";
    registry.register_collector(Box::new(Rows { name: "dns_upstream_failures", help, rows: failures.collect() }));
}

/// The histograms, by zone.
#[derive(Debug)]
struct Latency(Vec<(&'static str, Histogram)>);

impl Collector for Latency {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Seconds from the receipt of a query until its answer was on its way";
        let mut family = encoder.encode_descriptor("dns_query_seconds", help, None, MetricType::Histogram)?;
        let bounds = || BOUNDS_MICROS.iter().map(|micros| *micros as f64 / 1e6).chain([f64::INFINITY]);
        for (zone, histogram) in &self.0 {
            let buckets: Vec<(f64, u64)> = bounds().zip(histogram.buckets).collect();
            let count = histogram.buckets.iter().sum();
            family.encode_family(&ZoneLabels { zone })?.encode_histogram::<NoLabelSet>(
                histogram.sum,
                count,
                &buckets,
                None,
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;
    use crate::dns::{
        Listener,
        forward::{CacheStatus, ForwarderStatus},
    };

    #[test]
    fn queries_times_cache_and_upstreams_have_their_series() {
        let upstream = |address: &str, domain: &str| UpstreamStatus {
            address: address.parse().unwrap(),
            domains: vec![domain.to_owned()],
            healthy: false,
            round_trip: None,
            asked: 4,
            silent: 3,
            refused: 1,
            rejected: 0,
        };
        let listener = Listener { address: "169.254.96.16:53".parse().unwrap(), transport: "UDP", listening: true };
        let status = DnsStatus {
            listeners: vec![listener],
            closed_to: Vec::new(),
            domain: Some("cluster.local".to_owned()),
            forwarder: ForwarderStatus {
                upstreams: vec![upstream("192.0.2.53:53", "."), upstream("192.0.2.53:53", "corp.example")],
                cache: CacheStatus { entries: 2, hits: 5, stale: 1, ..CacheStatus::default() },
            },
        };
        let mut buckets = [0; BOUNDS_MICROS.len() + 1];
        (buckets[0], buckets[BOUNDS_MICROS.len()]) = (3, 1);
        let stats = Stats {
            queries: vec![(["A", "cluster", "answer"], 4)],
            latency: vec![("cluster", Histogram { buckets, sum: 7.5 })],
        };
        let mut registry = Registry::with_prefix("edgemesh");
        add(&mut registry, &status, Some(&stats));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for line in [
            "edgemesh_dns_listening{address=\"169.254.96.16:53\",transport=\"UDP\"} 1",
            "edgemesh_dns_queries_total{type=\"A\",zone=\"cluster\",result=\"answer\"} 4",
            "edgemesh_dns_query_seconds_sum{zone=\"cluster\"} 7.5",
            "edgemesh_dns_query_seconds_count{zone=\"cluster\"} 4",
            "edgemesh_dns_query_seconds_bucket{le=\"0.00005\",zone=\"cluster\"} 3",
            "edgemesh_dns_query_seconds_bucket{le=\"5.0\",zone=\"cluster\"} 3",
            "edgemesh_dns_query_seconds_bucket{le=\"+Inf\",zone=\"cluster\"} 4",
            "edgemesh_dns_cache_entries 2",
            "edgemesh_dns_cache_hits_total 5",
            "edgemesh_dns_stale_answers_total 1",
            "edgemesh_dns_upstream_healthy{upstream=\"192.0.2.53:53\"} 0",
            "edgemesh_dns_upstream_queries_total{upstream=\"192.0.2.53:53\"} 4",
            "edgemesh_dns_upstream_failures_total{upstream=\"192.0.2.53:53\",reason=\"silent\"} 3",
        ] {
            assert_eq!(text.lines().filter(|printed| *printed == line).count(), 1, "{line} in\n{text}");
        }
    }
}
