//! `/metrics` in OpenMetrics text; docs/metrics.md names and explains each family.

mod dns;
mod socks5;
mod tunnel;

use std::{collections::BTreeMap, fmt::Write as _, net::SocketAddr, sync::Arc};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text::encode},
    metrics::{counter::ConstCounter, family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};

use crate::{
    dataplane::{Latency, Room},
    dns::stats::Stats,
    kube::{SourceHealth, SourceStatus},
    model::{Protocol, ServiceEntry, ServiceTable},
    snapshot::SnapshotStatus,
    status::{AliasStatus, Counts, CountsByFrontend, Status, total},
};

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ConditionLabels {
    reason: &'static str,
    subject: String,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct DropLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, Ord, PartialEq, PartialOrd)]
struct PortLabels {
    namespace: Arc<str>,
    service: Arc<str>,
    port: u16,
    protocol: Protocol,
}

impl EncodeLabelValue for Protocol {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        write!(encoder, "{self}")
    }
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct BackendLabels {
    namespace: Arc<str>,
    service: Arc<str>,
    port: u16,
    protocol: Protocol,
    backend: String,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct MapLabels {
    map: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct HealthLabels {
    state: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct KindLabels {
    kind: String,
}

/// What the kernel tells for the metrics.
#[derive(Debug)]
pub struct Readings<'a> {
    pub counts: &'a CountsByFrontend,
    pub rooms: &'a [Room],
    /// How many backends may have series of their own.
    pub max_backends: u32,
}

/// Renders everything as of now. With 100,000 series it takes a good part of a second: not for a thread that has other
/// things to do.
///
/// # Errors
///
/// None in practice: writing to a `String` does not fail.
pub fn render(
    status: &Status,
    table: &ServiceTable,
    readings: Option<&Readings<'_>>,
    latency: Option<&Latency>,
    queries: Option<&Stats>,
) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("edgemesh");
    registry.register("build", "The version of the agent", Info::new([("version", status.version)]));
    gauge(&mut registry, "ready", "Whether /readyz answers 200", i64::from(status.ready));
    gauge(&mut registry, "source_connected", "Whether the metadata source answers", i64::from(status.source.answers()));
    add_source(&mut registry, &status.source);
    if let Some(snapshot) = &status.snapshot {
        add_snapshot(&mut registry, snapshot);
    }
    gauge(&mut registry, "services", "Services known", whole(status.services));
    gauge(
        &mut registry,
        "frontends",
        "Address, port and protocol triples that are translated",
        whole(status.frontends),
    );
    gauge(&mut registry, "backends", "Eligible pairs of frontend and backend", whole(status.backends));
    if let Some(dataplane) = &status.dataplane {
        let behind = dataplane.newest_generation.saturating_sub(dataplane.generation);
        let help = "Tables that were built and are not in force in the kernel yet";
        let ended = ConstCounter::new(dataplane.ended_udp_sockets);
        let about = "Connected UDP sockets ended because their backend was gone";
        registry.register("stale_udp_sockets_ended", about, ended);
        gauge(&mut registry, "dataplane_tables_behind", help, i64::try_from(behind).unwrap_or(i64::MAX));
        let dropped = dataplane.dropped_packets.iter();
        registry.register_collector(Box::new(Rows {
            name: "tc_dropped_packets",
            help: "Packets for Services dropped on interfaces",
            rows: dropped.map(|(reason, count)| (DropLabels { reason }, ConstCounter::new(*count))).collect(),
        }));
    }
    if let Some(aliases) = &status.aliases {
        add_aliases(&mut registry, aliases);
    }
    if let Some(tunnel) = &status.tunnel {
        tunnel::add(&mut registry, tunnel);
    }
    if let Some(socks5) = &status.socks5 {
        socks5::add(&mut registry, &socks5.counts);
    }
    if let Some(latency) = latency {
        let help = "Seconds from a change's arrival at the source until it was in force in the kernel";
        registry.register("dataplane_change_seconds", help, latency.histogram());
    }
    if let Some(canary) = status.dataplane.as_ref().and_then(|dataplane| dataplane.canary.as_ref()) {
        registry.register("canary_runs", "Canary connections that were made", ConstCounter::new(canary.runs));
        let about = "Canary connections that failed, which two in a row of make the node unready";
        registry.register("canary_failures", about, ConstCounter::new(canary.failed_runs));
    }
    if let Some(status) = &status.dns {
        dns::add(&mut registry, status, queries);
    }
    let conditions = Family::<ConditionLabels, Gauge>::default();
    for condition in &status.conditions {
        let labels = ConditionLabels { reason: condition.reason, subject: condition.subject.clone() };
        conditions.get_or_create(&labels).set(1);
    }
    registry.register("condition", "1 for each condition that holds", conditions);

    if let Some(readings) = readings {
        add_rooms(&mut registry, readings.rooms);
        let ports = Arc::new(by_port(table, readings.counts));
        let mut family = |name, help, value: fn(&Counts) -> u64| {
            registry.register_collector(Box::new(PortRows { name, help, ports: Arc::clone(&ports), value }));
        };
        family("service_connects", "connect() calls sent to a backend, TCP and UDP", |counts| counts.connects);
        family("service_datagrams", "Datagrams of unconnected UDP sockets sent to a backend", |counts| {
            counts.datagrams
        });
        family("service_refused", "Calls refused because no endpoint was eligible", |counts| counts.refused);

        let (backends, omitted) = by_backend(table, readings);
        let mut family = |name, help, value: fn(&Counts) -> u64| {
            let counted = backends.iter().filter(|(_, counts)| value(counts) > 0);
            let rows = counted.map(|(labels, counts)| (labels.clone(), ConstCounter::new(value(counts)))).collect();
            registry.register_collector(Box::new(Rows { name, help, rows }));
        };
        family("backend_connects", "connect() calls sent to this backend, TCP and UDP", |counts| counts.connects);
        family("backend_datagrams", "Datagrams of unconnected UDP sockets sent to this backend", |counts| {
            counts.datagrams
        });
        let help = "Backends that have counted something and have no series of their own, as there are too many";
        gauge(&mut registry, "backend_series_omitted", help, whole(omitted));
    }
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// What is carried to pods of other sites.
fn add_aliases(registry: &mut Registry, aliases: &AliasStatus) {
    let proxy = &aliases.proxy;
    gauge(
        registry,
        "aliases",
        "Addresses of this node that stand for pods of other sites and for nodes",
        whole(aliases.in_use),
    );
    let open = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    gauge(registry, "alias_connections_open", "Connections carried to other sites now", open(proxy.open_connections));
    gauge(registry, "alias_flows_open", "Clients of UDP carried to other sites now", open(proxy.open_flows));
    for (name, help, count) in [
        ("alias_connections", "Connections carried to other sites", proxy.connections),
        ("alias_flows", "Clients of UDP carried to other sites", proxy.flows),
        (
            "alias_evicted_flows",
            "Clients of UDP that were forgotten early, for others to have room",
            proxy.evicted_flows,
        ),
        ("alias_sent_bytes", "Bytes of connections to pods of other sites", proxy.bytes_out),
        ("alias_received_bytes", "Bytes of connections from pods of other sites", proxy.bytes_in),
        ("alias_sent_datagrams", "Datagrams to pods of other sites", proxy.datagrams_out),
        ("alias_received_datagrams", "Datagrams from pods of other sites", proxy.datagrams_in),
        ("alias_dropped_datagrams", "Datagrams for which there was no room or no way", proxy.datagrams_dropped),
    ] {
        registry.register(name, help, ConstCounter::new(count));
    }
    let refusals = proxy.refusals.iter();
    registry.register_collector(Box::new(Rows {
        name: "alias_refusals",
        help: "Connections and flows that did not get to their pod",
        rows: refusals.map(|refusal| (DropLabels { reason: refusal.kind }, ConstCounter::new(refusal.count))).collect(),
    }));
}

/// Frontends of one Service port, over all its addresses, count together.
fn by_port(table: &ServiceTable, counts: &CountsByFrontend) -> BTreeMap<PortLabels, Counts> {
    let mut ports: BTreeMap<PortLabels, Counts> = BTreeMap::new();
    for entry in &table.services {
        for frontend in &entry.frontends {
            let Some(served) = entry.ports.get(frontend.port) else { continue };
            let labels = PortLabels {
                namespace: Arc::clone(&entry.service.name.namespace),
                service: Arc::clone(&entry.service.name.name),
                port: served.port.port.get(),
                protocol: frontend.at.protocol,
            };
            let part = total(counts, &frontend.at);
            let sum = ports.entry(labels).or_default();
            sum.connects += part.connects;
            sum.datagrams += part.datagrams;
            sum.refused += part.refused;
        }
    }
    ports
}

/// The backends in use that have counted anything, in order of Service, port and address; and how many are left out.
fn by_backend(table: &ServiceTable, readings: &Readings<'_>) -> (Vec<(BackendLabels, Counts)>, usize) {
    let max = usize::try_from(readings.max_backends).unwrap_or(usize::MAX);
    let (mut rows, mut omitted) = (Vec::new(), 0);
    for entry in &table.services {
        for ((port, backend), counts) in backends_of(entry, readings.counts) {
            let Some(served) = entry.ports.get(port) else { continue };
            if rows.len() >= max {
                omitted += 1;
                continue;
            }
            let labels = BackendLabels {
                namespace: Arc::clone(&entry.service.name.namespace),
                service: Arc::clone(&entry.service.name.name),
                port: served.port.port.get(),
                protocol: served.port.protocol,
                backend: backend.to_string(),
            };
            rows.push((labels, counts));
        }
    }
    (rows, omitted)
}

/// What each backend of one Service has counted, by index of the port; those without a count are left out.
fn backends_of(entry: &ServiceEntry, counts: &CountsByFrontend) -> BTreeMap<(usize, SocketAddr), Counts> {
    let mut backends: BTreeMap<(usize, SocketAddr), Counts> = BTreeMap::new();
    for frontend in &entry.frontends {
        for (backend, part) in counts.get(&frontend.at).into_iter().flatten() {
            let Some(backend) = backend else { continue };
            if part.connects > 0 || part.datagrams > 0 {
                let sum = backends.entry((frontend.port, *backend)).or_default();
                sum.connects += part.connects;
                sum.datagrams += part.datagrams;
            }
        }
    }
    backends
}

/// Whatever is not known has no series.
fn add_snapshot(registry: &mut Registry, snapshot: &SnapshotStatus) {
    let kept = Family::<KindLabels, Gauge>::default();
    let ages = Family::<KindLabels, Gauge>::default();
    for (kind, served) in &snapshot.still_served {
        let labels = KindLabels { kind: kind.clone() };
        kept.get_or_create(&labels).set(whole(served.objects));
        if let Some(age) = served.age_seconds {
            ages.get_or_create(&labels).set(signed(age));
        }
    }
    let help = "Objects in force as they were restored from the snapshot, as the source has not delivered them since";
    registry.register("snapshot_objects_in_force", help, kept);
    let help = "Seconds since the source stood behind them; none where there are none";
    registry.register("snapshot_age_seconds", help, ages);
    if let Some(written) = snapshot.written {
        let help = "When the snapshot was written last, in seconds since the Unix epoch";
        gauge(registry, "snapshot_written_timestamp_seconds", help, signed(written));
    }
    if let Some(size) = snapshot.size_bytes {
        gauge(registry, "snapshot_size_bytes", "The size of the snapshot that was written last", signed(size));
    }
}

fn add_source(registry: &mut Registry, source: &SourceStatus) {
    let health = Family::<HealthLabels, Gauge>::default();
    for state in SourceHealth::ALL {
        health.get_or_create(&HealthLabels { state: state.word() }).set(i64::from(source.health == state));
    }
    registry.register("source_health", "1 for the state that the metadata source is in", health);
    if let Some(synced) = source.last_sync {
        let help = "When the metadata source last gave everything as it was then, in seconds since the Unix epoch";
        gauge(registry, "source_last_sync_timestamp_seconds", help, i64::try_from(synced).unwrap_or(i64::MAX));
    }
    let objects = Family::<KindLabels, Gauge>::default();
    for (kind, count) in &source.objects {
        objects.get_or_create(&KindLabels { kind: kind.clone() }).set(whole(*count));
    }
    registry.register("source_objects", "Objects that the metadata source delivered", objects);
}

fn add_rooms(registry: &mut Registry, rooms: &[Room]) {
    let (used, limit) = (Family::<MapLabels, Gauge>::default(), Family::<MapLabels, Gauge>::default());
    for room in rooms {
        let labels = MapLabels { map: room.map };
        used.get_or_create(&labels).set(whole(room.used));
        limit.get_or_create(&labels).set(room.capacity.into());
    }
    registry.register("dataplane_entries", "Entries in a map of the kernel whose capacity is configured", used);
    registry.register("dataplane_entries_limit", "How many entries the map can have", limit);
}

/// A counter family whose values come from the kernel.
#[derive(Debug)]
struct Rows<L> {
    name: &'static str,
    help: &'static str,
    rows: Vec<(L, ConstCounter<u64>)>,
}

impl<L> prometheus_client::collector::Collector for Rows<L>
where
    L: EncodeLabelSet + std::fmt::Debug + Send + Sync + 'static,
{
    fn encode(&self, mut encoder: prometheus_client::encoding::DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        use prometheus_client::{encoding::EncodeMetric, metrics::MetricType};
        let mut family = encoder.encode_descriptor(self.name, self.help, None, MetricType::Counter)?;
        for (labels, value) in &self.rows {
            value.encode(family.encode_family(labels)?)?;
        }
        Ok(())
    }
}

/// One of the counters of every Service port; all families share the ports.
#[derive(Debug)]
struct PortRows {
    name: &'static str,
    help: &'static str,
    ports: Arc<BTreeMap<PortLabels, Counts>>,
    value: fn(&Counts) -> u64,
}

impl prometheus_client::collector::Collector for PortRows {
    fn encode(&self, mut encoder: prometheus_client::encoding::DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        use prometheus_client::{encoding::EncodeMetric, metrics::MetricType};
        let mut family = encoder.encode_descriptor(self.name, self.help, None, MetricType::Counter)?;
        for (labels, counts) in &*self.ports {
            ConstCounter::new((self.value)(counts)).encode(family.encode_family(labels)?)?;
        }
        Ok(())
    }
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: i64) {
    let gauge: Gauge = Gauge::default();
    gauge.set(value);
    registry.register(name, help, gauge);
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn whole(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::*;
    use crate::{
        dataplane::Count,
        model::{Builder, Event, FrontendAddr, NamespacedName, Object, Protocol, Service, ServiceKind, ServicePort},
        status::by_frontend,
    };

    /// `default/web` on port 80 of two addresses.
    fn table() -> Arc<ServiceTable> {
        let port = |number| NonZeroU16::new(number).unwrap();
        let http = ServicePort { name: "".into(), protocol: Protocol::Tcp, port: port(80), node_port: None };
        let service = Service {
            cluster_ips: vec!["10.96.0.1".parse().unwrap()],
            external_ips: vec!["192.0.2.1".parse().unwrap()],
            ports: vec![http],
            ..Service::new(NamespacedName::new("default", "web"), ServiceKind::ClusterIp)
        };
        let mut builder = Builder::default();
        builder.apply(Event::Apply(Object::Service(service.into())));
        builder.apply(Event::Synced);
        builder.build().unwrap()
    }

    fn count(frontend: &str, backend: Option<&str>, connects: u64, refused: u64) -> Count {
        let frontend = FrontendAddr { addr: frontend.parse().unwrap(), protocol: Protocol::Tcp };
        Count { frontend, backend: backend.map(|backend| backend.parse().unwrap()), connects, datagrams: 0, refused }
    }

    fn status() -> Status {
        Status {
            version: "1",
            node: "edge1".to_owned(),
            uptime_seconds: 1,
            ready: true,
            waiting_for: vec![],
            source: SourceStatus {
                kind: "metaServer",
                source: "http://127.0.0.1:10550".to_owned(),
                health: SourceHealth::Degraded,
                since: 0,
                reason: None,
                hint: None,
                last_sync: Some(1_700_000_000),
                last_error: None,
                objects: BTreeMap::from([("Service".to_owned(), 3)]),
            },
            snapshot: None,
            dataplane: None,
            dns: None,
            device: None,
            aliases: None,
            tunnel: None,
            socks5: None,
            services: 1,
            frontends: 2,
            backends: 0,
            conditions: vec![],
        }
    }

    fn rendered(max_backends: u32) -> String {
        let counts = by_frontend(&[
            count("10.96.0.1:80", None, 4, 1),
            count("10.96.0.1:80", Some("10.244.1.1:8080"), 5, 0),
            count("192.0.2.1:80", Some("10.244.1.1:8080"), 2, 0),
            count("10.96.0.1:80", Some("10.244.1.2:8080"), 3, 0),
            count("10.96.0.1:80", Some("10.244.1.3:8080"), 0, 0),
        ]);
        let rooms = [Room { map: "FRONTENDS", used: 2, capacity: 20_000 }];
        render(&status(), &table(), Some(&Readings { counts: &counts, rooms: &rooms, max_backends }), None, None)
            .unwrap()
    }

    #[test]
    fn backends_that_have_counted_something_have_series_over_all_addresses_of_their_port() {
        let text = rendered(10);
        let series = |backend: &str, count: u64| {
            let labels = r#"namespace="default",service="web",port="80",protocol="TCP""#;
            format!("edgemesh_backend_connects_total{{{labels},backend=\"{backend}\"}} {count}\n")
        };
        for line in [series("10.244.1.1:8080", 7), series("10.244.1.2:8080", 3)] {
            assert!(text.contains(&line), "{line} in\n{text}");
        }
        assert!(!text.contains("10.244.1.3") && !text.contains("edgemesh_backend_datagrams_total{"), "{text}");
        assert!(text.contains("edgemesh_backend_series_omitted 0\n"), "{text}");
        assert!(
            text.contains(
                r#"edgemesh_service_connects_total{namespace="default",service="web",port="80",protocol="TCP"} 14"#
            ),
            "{text}"
        );
    }

    #[test]
    fn the_source_is_in_one_state_and_tells_what_it_gave_and_when() {
        let text = rendered(0);
        for line in [
            "edgemesh_source_connected 1\n",
            "edgemesh_source_health{state=\"degraded\"} 1\n",
            "edgemesh_source_health{state=\"connected\"} 0\n",
            "edgemesh_source_health{state=\"offline\"} 0\n",
            "edgemesh_source_last_sync_timestamp_seconds 1700000000\n",
            "edgemesh_source_objects{kind=\"Service\"} 3\n",
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }

    #[test]
    fn series_of_backends_are_bounded_and_their_lack_is_counted() {
        let text = rendered(1);
        assert!(text.contains("10.244.1.1:8080") && !text.contains("10.244.1.2:8080"), "{text}");
        assert!(text.contains("edgemesh_backend_series_omitted 1\n"), "{text}");
        let none = rendered(0);
        assert!(!none.contains("edgemesh_backend_connects_total{"), "{none}");
        assert!(none.contains("edgemesh_backend_series_omitted 2\n"), "{none}");
    }

    #[test]
    fn how_full_a_map_is_stands_beside_how_much_it_holds() {
        let text = rendered(0);
        assert!(text.contains("edgemesh_dataplane_entries{map=\"FRONTENDS\"} 2\n"), "{text}");
        assert!(text.contains("edgemesh_dataplane_entries_limit{map=\"FRONTENDS\"} 20000\n"), "{text}");
    }
}
