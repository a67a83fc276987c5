//! `/metrics` in OpenMetrics text; docs/metrics.md names and explains each family.

use std::collections::BTreeMap;

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::ConstCounter, family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};

use crate::{
    model::ServiceTable,
    status::{Counts, CountsByFrontend, Status, total},
};

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct ConditionLabels {
    reason: &'static str,
    subject: String,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, Ord, PartialEq, PartialOrd)]
struct PortLabels {
    namespace: String,
    service: String,
    port: u16,
    protocol: String,
}

/// Renders everything as of now.
///
/// # Errors
///
/// None in practice: writing to a `String` does not fail.
pub fn render(
    status: &Status,
    table: &ServiceTable,
    counts: Option<&CountsByFrontend>,
) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("edgemesh");
    registry.register("build", "The version of the agent", Info::new([("version", status.version)]));
    gauge(&mut registry, "ready", "Whether /readyz answers 200", i64::from(status.ready));
    gauge(&mut registry, "source_connected", "Whether the metadata source answers", i64::from(status.source.connected));
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
    }
    let conditions = Family::<ConditionLabels, Gauge>::default();
    for condition in &status.conditions {
        let labels = ConditionLabels { reason: condition.reason, subject: condition.subject.clone() };
        conditions.get_or_create(&labels).set(1);
    }
    registry.register("condition", "1 for each condition that holds", conditions);

    if let Some(counts) = counts {
        let ports = by_port(table, counts);
        let mut family = |name, help, value: fn(&Counts) -> u64| {
            let rows =
                ports.iter().map(|(labels, counts)| (labels.clone(), ConstCounter::new(value(counts)))).collect();
            registry.register_collector(Box::new(Rows { name, help, rows }));
        };
        family("connects", "connect() calls sent to a backend, TCP and UDP", |counts| counts.connects);
        family("datagrams", "Datagrams of unconnected UDP sockets sent to a backend", |counts| counts.datagrams);
        family("refused", "Calls refused because no endpoint was eligible", |counts| counts.refused);
    }
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// Frontends of one Service port, over all its addresses, count together.
fn by_port(table: &ServiceTable, counts: &CountsByFrontend) -> BTreeMap<PortLabels, Counts> {
    let mut ports: BTreeMap<PortLabels, Counts> = BTreeMap::new();
    for entry in &table.services {
        for frontend in &entry.frontends {
            let Some(served) = entry.ports.get(frontend.port) else { continue };
            let labels = PortLabels {
                namespace: entry.service.name.namespace.to_string(),
                service: entry.service.name.name.to_string(),
                port: served.port.port.get(),
                protocol: frontend.at.protocol.to_string(),
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

/// A counter family whose values come from the kernel.
#[derive(Debug)]
struct Rows {
    name: &'static str,
    help: &'static str,
    rows: Vec<(PortLabels, ConstCounter<u64>)>,
}

impl prometheus_client::collector::Collector for Rows {
    fn encode(&self, mut encoder: prometheus_client::encoding::DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        use prometheus_client::{encoding::EncodeMetric, metrics::MetricType};
        let name = format!("service_{}", self.name);
        let mut family = encoder.encode_descriptor(&name, self.help, None, MetricType::Counter)?;
        for (labels, value) in &self.rows {
            value.encode(family.encode_family(labels)?)?;
        }
        Ok(())
    }
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: i64) {
    let gauge: Gauge = Gauge::default();
    gauge.set(value);
    registry.register(name, help, gauge);
}

fn whole(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
