//! core/v1 Service, with the labels and annotations that other systems at the edge put on it.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    num::{NonZeroU16, NonZeroU32},
};

use k8s_openapi::api::core::v1 as core;

use super::{
    Convert, ConvertError, Converted, Fault, address, check_name, invalid, is_label, object_name, port,
    port_and_protocol, quote,
};
use crate::model::{
    IpPrefix, NamespacedName, Object, Protocol, ProxyLabels, Service, ServiceKind, ServicePort, SessionAffinity,
    TrafficDistribution, TrafficPolicy,
};

/// EdgeMesh's `serviceFilterMode` looks at this label.
const EDGEMESH_PROXY_LABEL: &str = "service.edgemesh.kubeedge.io/service-proxy-name";
/// KEP-2447.
const STANDARD_PROXY_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// What the Services of CoreDNS and kube-dns have always been found by.
const CLUSTER_DNS_LABEL: (&str, &str) = ("k8s-app", "kube-dns");
/// KubeEdge; `range-nodegroup` is its only value (see KubeEdge's nodegroup controller).
const NODE_GROUP_ANNOTATION: &str = "apps.kubeedge.io/service-topology";
/// SuperEdge: a JSON list of node label keys (see its application-grid-wrapper).
const TOPOLOGY_KEYS_ANNOTATION: &str = "topologyKeys";
/// The API's default for `sessionAffinityConfig.clientIP.timeoutSeconds`: three hours.
const AFFINITY_TIMEOUT: NonZeroU32 = NonZeroU32::new(10_800).unwrap();
/// The longest that the API allows: a day.
const LONGEST_AFFINITY: u32 = 86_400;

impl Convert for core::Service {
    fn convert(&self) -> Result<Converted, ConvertError> {
        let empty = core::ServiceSpec::default();
        let spec = self.spec.as_ref().unwrap_or(&empty);
        let mut service = Service::new(self.model_name()?, kind(spec)?);
        let mut faults = Vec::new();
        if matches!(service.kind, ServiceKind::ClusterIp | ServiceKind::NodePort | ServiceKind::LoadBalancer) {
            service.cluster_ips = cluster_ips(spec, &mut faults)?;
            service.external_ips = external_ips(spec, &mut faults);
        }
        if service.kind == ServiceKind::LoadBalancer {
            service.load_balancer_ips = load_balancer_ips(self, &mut faults);
            service.source_ranges = source_ranges(spec, &mut faults);
        }
        if service.kind == ServiceKind::ExternalName {
            service.external_name = external_name(spec, &mut faults);
        }
        service.ports = ports(spec.ports.as_deref().unwrap_or_default(), service.kind, &mut faults);
        service.affinity = affinity(spec, &mut faults);
        let (internal, external) = (&spec.internal_traffic_policy, &spec.external_traffic_policy);
        service.internal_policy = policy("spec.internalTrafficPolicy", internal.as_deref(), &mut faults);
        service.external_policy = policy("spec.externalTrafficPolicy", external.as_deref(), &mut faults);
        service.distribution = distribution(spec, &mut faults);
        service.publish_not_ready = spec.publish_not_ready_addresses.unwrap_or(false);
        service.within_node_group = within_node_group(self, &mut faults);
        service.topology_keys = topology_keys(self, &mut faults);
        let label = |label| self.metadata.labels.as_ref().and_then(|labels| labels.get(label));
        service.cluster_dns = label(CLUSTER_DNS_LABEL.0).is_some_and(|value| value == CLUSTER_DNS_LABEL.1);
        let has = |name| label(name).is_some();
        service.proxy_labels = ProxyLabels { edgemesh: has(EDGEMESH_PROXY_LABEL), standard: has(STANDARD_PROXY_LABEL) };
        Ok(Converted { object: Object::Service(service.into()), faults })
    }

    fn model_name(&self) -> Result<NamespacedName, ConvertError> {
        object_name(&self.metadata)
    }
}

fn kind(spec: &core::ServiceSpec) -> Result<ServiceKind, ConvertError> {
    let addresses = spec.cluster_ips.as_deref().unwrap_or_default();
    let headless = addresses.first().or(spec.cluster_ip.as_ref()).is_some_and(|first| first == "None");
    Ok(match spec.type_.as_deref().unwrap_or("ClusterIP") {
        "ExternalName" => ServiceKind::ExternalName,
        _ if headless => ServiceKind::Headless,
        "ClusterIP" | "" => ServiceKind::ClusterIp,
        "NodePort" => ServiceKind::NodePort,
        "LoadBalancer" => ServiceKind::LoadBalancer,
        other => {
            let expected = "ClusterIP, NodePort, LoadBalancer or ExternalName";
            return Err(invalid("spec.type", format!("{} is unknown; expected {expected}", quote(other))));
        }
    })
}

fn cluster_ips(spec: &core::ServiceSpec, faults: &mut Vec<Fault>) -> Result<Vec<IpAddr>, ConvertError> {
    let mut addresses = Vec::new();
    let before = faults.len();
    let list = spec.cluster_ips.as_deref().unwrap_or_default();
    let single = spec.cluster_ip.as_deref().filter(|address| !address.is_empty());
    if !list.is_empty() {
        for (i, text) in list.iter().enumerate() {
            add(&mut addresses, address(text), || format!("spec.clusterIPs[{i}]"), faults);
        }
    } else if let Some(text) = single {
        add(&mut addresses, address(text), || "spec.clusterIP".into(), faults);
    } else {
        let problem = "missing; the Service has no address to connect to".into();
        faults.push(Fault { field: "spec.clusterIP".into(), problem });
        return Ok(addresses);
    }
    if addresses.is_empty() && faults.len() > before {
        return Err(ConvertError::Invalid(faults.swap_remove(before)));
    }
    Ok(addresses)
}

/// Without a usable one the Service is known, and leads nowhere.
///
/// What looks like an IPv4 address is legal for the API server, whose documentation says that DNS servers do not resolve
/// it; as an alias, it would be a name below the top-level domain `4`.
fn external_name(spec: &core::ServiceSpec, faults: &mut Vec<Fault>) -> Option<Box<str>> {
    let text = spec.external_name.as_deref().unwrap_or_default();
    let name = text.strip_suffix('.').unwrap_or(text);
    let problem = if name.is_empty() {
        "missing; the Service leads nowhere".to_owned()
    } else if name.parse::<IpAddr>().is_ok() {
        format!("{} is an address, which no alias in DNS can lead to", quote(text))
    } else if let Err(problem) = check_name(name) {
        problem
    } else if !name.split('.').all(is_label) {
        format!("{} is not a DNS name; expected labels of 1 to 63 characters between dots", quote(text))
    } else {
        return Some(name.into());
    };
    faults.push(Fault { field: "spec.externalName".into(), problem });
    None
}

fn external_ips(spec: &core::ServiceSpec, faults: &mut Vec<Fault>) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for (i, text) in spec.external_ips.as_deref().unwrap_or_default().iter().enumerate() {
        add(&mut addresses, external_address(text), || format!("spec.externalIPs[{i}]"), faults);
    }
    addresses
}

/// Ingress points with only a host name, and those that are proxies, are no addresses that arrive at a node.
fn load_balancer_ips(service: &core::Service, faults: &mut Vec<Fault>) -> Vec<IpAddr> {
    let ingress = service.status.as_ref().and_then(|status| status.load_balancer.as_ref()?.ingress.as_deref());
    let mut addresses = Vec::new();
    for (i, point) in ingress.unwrap_or_default().iter().enumerate() {
        let path = || format!("status.loadBalancer.ingress[{i}].ip");
        let Some(text) = point.ip.as_deref().filter(|ip| !ip.is_empty()) else { continue };
        match point.ip_mode.as_deref() {
            None | Some("" | "VIP") => add(&mut addresses, address(text), path, faults),
            Some("Proxy") => {}
            Some(other) => {
                faults.push(unknown(&format!("{}Mode", path()), other, "VIP or Proxy; the address is not served"));
            }
        }
    }
    addresses
}

/// White space around a range is passed over, as the API server lets it pass.
fn source_ranges(spec: &core::ServiceSpec, faults: &mut Vec<Fault>) -> Option<Vec<IpPrefix>> {
    let texts = spec.load_balancer_source_ranges.as_deref().filter(|texts| !texts.is_empty())?;
    let mut ranges = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        match text.trim().parse::<IpPrefix>() {
            Ok(range) => ranges.push(range),
            Err(error) => faults.push(Fault {
                field: format!("spec.loadBalancerSourceRanges[{i}]"),
                problem: format!("{} is {error}; it admits no client", quote(text)),
            }),
        }
    }
    Some(ranges)
}

/// As the API server demands of external addresses: link-local ones mean something else on each link.
fn external_address(text: &str) -> Result<IpAddr, String> {
    let address = address(text)?;
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    if link_local { Err(format!("{address} is a link-local address")) } else { Ok(address) }
}

fn add(
    addresses: &mut Vec<IpAddr>,
    parsed: Result<IpAddr, String>,
    field: impl FnOnce() -> String,
    faults: &mut Vec<Fault>,
) {
    match parsed {
        Ok(address) if addresses.contains(&address) => {}
        Ok(address) => addresses.push(address),
        Err(problem) => faults.push(Fault { field: field(), problem }),
    }
}

fn ports(specs: &[core::ServicePort], kind: ServiceKind, faults: &mut Vec<Fault>) -> Vec<ServicePort> {
    let mut ports = Vec::with_capacity(specs.len());
    let (mut taken, mut taken_on_node) = (BTreeMap::new(), BTreeMap::new());
    for (i, spec) in specs.iter().enumerate() {
        let path = format!("spec.ports[{i}]");
        let Some((port, protocol)) = port_and_protocol(&path, spec.port, spec.protocol.as_deref(), faults) else {
            continue;
        };
        // The API server refuses this; a manifest that nobody checked may have it, and a frontend can only be one of them.
        if let Some(other) = claim(&mut taken, port, protocol, i) {
            faults.push(Fault { field: path, problem: format!("{port}/{protocol} is already spec.ports[{other}]") });
            continue;
        }
        let mut node_port = node_port(&path, spec.node_port, kind, faults);
        if let Some(number) = node_port
            && let Some(other) = claim(&mut taken_on_node, number, protocol, i)
        {
            let problem = format!("{number}/{protocol} is already the node port of spec.ports[{other}]");
            faults.push(Fault { field: format!("{path}.nodePort"), problem });
            node_port = None;
        }
        ports.push(ServicePort { name: spec.name.as_deref().unwrap_or_default().into(), protocol, port, node_port });
    }
    ports
}

/// The index that has the port already, if one has.
fn claim(
    taken: &mut BTreeMap<(NonZeroU16, Protocol), usize>,
    port: NonZeroU16,
    protocol: Protocol,
    index: usize,
) -> Option<usize> {
    let owner = *taken.entry((port, protocol)).or_insert(index);
    (owner != index).then_some(owner)
}

/// Absent and 0 both mean that none has been given out (yet).
fn node_port(path: &str, number: Option<i32>, kind: ServiceKind, faults: &mut Vec<Fault>) -> Option<NonZeroU16> {
    let number = number.filter(|&number| number != 0)?;
    let parsed = match kind {
        ServiceKind::NodePort | ServiceKind::LoadBalancer => port(number),
        ServiceKind::ClusterIp | ServiceKind::Headless | ServiceKind::ExternalName => {
            Err(format!("{number} is not served; only types NodePort and LoadBalancer have node ports"))
        }
    };
    parsed.map_err(|problem| faults.push(Fault { field: format!("{path}.nodePort"), problem })).ok()
}

fn affinity(spec: &core::ServiceSpec, faults: &mut Vec<Fault>) -> SessionAffinity {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return SessionAffinity::None,
        Some("ClientIP") => {}
        Some(other) => {
            faults.push(unknown("spec.sessionAffinity", other, "None or ClientIP; None is used"));
            return SessionAffinity::None;
        }
    }
    let given = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref()?.timeout_seconds);
    let timeout = given.map(|seconds| {
        let timeout = u32::try_from(seconds).ok().and_then(NonZeroU32::new);
        timeout.filter(|timeout| timeout.get() <= LONGEST_AFFINITY).ok_or(seconds)
    });
    let timeout = match timeout {
        None => AFFINITY_TIMEOUT,
        Some(Ok(timeout)) => timeout,
        Some(Err(seconds)) => {
            faults.push(Fault {
                field: "spec.sessionAffinityConfig.clientIP.timeoutSeconds".into(),
                problem: format!(
                    "{seconds} is out of range; expected 1 to {LONGEST_AFFINITY}; {AFFINITY_TIMEOUT} is used"
                ),
            });
            AFFINITY_TIMEOUT
        }
    };
    SessionAffinity::ClientIp { timeout }
}

fn policy(field: &str, text: Option<&str>, faults: &mut Vec<Fault>) -> TrafficPolicy {
    match text {
        None | Some("" | "Cluster") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => {
            faults.push(unknown(field, other, "Cluster or Local; Cluster is used"));
            TrafficPolicy::Cluster
        }
    }
}

fn distribution(spec: &core::ServiceSpec, faults: &mut Vec<Fault>) -> Option<TrafficDistribution> {
    match spec.traffic_distribution.as_deref() {
        None | Some("") => None,
        Some("PreferClose" | "PreferSameZone") => Some(TrafficDistribution::SameZone),
        Some("PreferSameNode") => Some(TrafficDistribution::SameNode),
        Some(other) => {
            let expected = "PreferSameZone, PreferSameNode or PreferClose; nothing is preferred";
            faults.push(unknown("spec.trafficDistribution", other, expected));
            None
        }
    }
}

fn within_node_group(service: &core::Service, faults: &mut Vec<Fault>) -> bool {
    match annotation(service, NODE_GROUP_ANNOTATION) {
        None | Some("") => false,
        Some("range-nodegroup") => true,
        Some(other) => {
            let field = format!("metadata.annotations[{NODE_GROUP_ANNOTATION}]");
            faults.push(unknown(&field, other, "range-nodegroup; no node group limits the Service"));
            false
        }
    }
}

fn topology_keys(service: &core::Service, faults: &mut Vec<Fault>) -> Vec<Box<str>> {
    let Some(text) = annotation(service, TOPOLOGY_KEYS_ANNOTATION) else { return Vec::new() };
    serde_json::from_str(text).unwrap_or_else(|_| {
        let problem = format!(
            "{} is no JSON list of node label keys, such as [\"zone\"]; nothing limits the Service",
            quote(text)
        );
        faults.push(Fault { field: format!("metadata.annotations[{TOPOLOGY_KEYS_ANNOTATION}]"), problem });
        Vec::new()
    })
}

fn annotation<'a>(service: &'a core::Service, name: &str) -> Option<&'a str> {
    service.metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

fn unknown(field: &str, value: &str, expected: &str) -> Fault {
    Fault { field: field.to_owned(), problem: format!("{} is unknown; expected {expected}", quote(value)) }
}

#[cfg(test)]
mod tests;
