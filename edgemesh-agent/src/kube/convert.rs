//! Kubernetes API types to the model, parsed once: pure functions without IO.
//!
//! The rule for wrong values: an object is refused as a whole only where nothing sensible is left of it; one bad port or
//! address costs that port or address and becomes a [`Fault`] beside the object.

pub(super) mod destination_rule;
mod node;
mod service;

use std::{fmt, net::IpAddr, num::NonZeroU16, sync::Arc};

use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use crate::model::{Endpoint, EndpointPort, EndpointSet, NamespacedName, Object, Place, Protocol, Subset};

/// Names the Service that an EndpointSlice belongs to (API field docs of discovery/v1).
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// RFC 1123 subdomains, as the API server demands of names.
const MAX_NAME: usize = 253;
/// The longest label of a DNS name (RFC 1035).
const MAX_LABEL: usize = 63;
/// A message quotes at most so much of a wrong value.
const MAX_QUOTE: usize = 64;

/// A value that cannot be used, and where it is: `spec.ports[1].port: 70000 is not a port; expected 1 to 65535`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Fault {
    /// Path of the field, as `kubectl explain` and the API server's messages write it.
    pub(super) field: String,
    /// What is wrong with the value and what was expected.
    pub(super) problem: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

/// Why nothing of an object can be used.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum ConvertError {
    /// A value that the API does not allow.
    #[error("{0}")]
    Invalid(Fault),
    /// Allowed by the API, but it says nothing about a Service that can be proxied: a slice that belongs to no Service,
    /// or one of addressType FQDN.
    #[error("{0}")]
    Foreign(Fault),
}

/// A usable object, and what had to be left out of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Converted {
    pub(super) object: Object,
    pub(super) faults: Vec<Fault>,
}

/// A kind of API object that has a counterpart in the model.
pub(super) trait Convert {
    /// Converts one object.
    ///
    /// # Errors
    ///
    /// [`ConvertError`] names the field that makes all of it unusable.
    fn convert(&self) -> Result<Converted, ConvertError>;

    /// The object's name in the model.
    ///
    /// # Errors
    ///
    /// It is missing, or nothing that the API server would accept.
    fn model_name(&self) -> Result<NamespacedName, ConvertError>;
}

impl Convert for discovery::EndpointSlice {
    fn convert(&self) -> Result<Converted, ConvertError> {
        let name = object_name(&self.metadata)?;
        let mut faults = Vec::new();
        let field = format!("metadata.labels[{SERVICE_NAME_LABEL}]");
        let Some(service) = self.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME_LABEL)) else {
            return Err(ConvertError::Foreign(Fault {
                field,
                problem: "missing; the slice belongs to no Service".into(),
            }));
        };
        check_name(service).map_err(|problem| invalid(field, problem))?;
        let family = match self.address_type.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            other => {
                let problem = format!("{} cannot be proxied; expected IPv4 or IPv6", quote(other));
                let fault = Fault { field: "addressType".into(), problem };
                return Err(if other == "FQDN" { ConvertError::Foreign(fault) } else { ConvertError::Invalid(fault) });
            }
        };
        let ports = slice_ports(self.ports.as_deref().unwrap_or_default(), &mut faults);
        let endpoints = self.endpoints.iter().enumerate();
        let mut kept = Vec::with_capacity(self.endpoints.len());
        kept.extend(endpoints.filter_map(|(i, endpoint)| slice_endpoint(i, endpoint, family, &mut faults)));
        let service = NamespacedName::new(Arc::clone(&name.namespace), service.as_str());
        let set = EndpointSet { name, service, subsets: vec![Subset { ports, endpoints: kept }] };
        Ok(Converted { object: Object::EndpointSlice(Arc::new(set)), faults })
    }

    fn model_name(&self) -> Result<NamespacedName, ConvertError> {
        object_name(&self.metadata)
    }
}

impl Convert for core::Endpoints {
    fn convert(&self) -> Result<Converted, ConvertError> {
        let name = object_name(&self.metadata)?;
        let mut faults = Vec::new();
        let subsets = self.subsets.as_deref().unwrap_or_default().iter().enumerate();
        let subsets = subsets.map(|(i, subset)| endpoints_subset(i, subset, &mut faults)).collect();
        let set = EndpointSet { service: name.clone(), name, subsets };
        Ok(Converted { object: Object::Endpoints(Arc::new(set)), faults })
    }

    fn model_name(&self) -> Result<NamespacedName, ConvertError> {
        object_name(&self.metadata)
    }
}

/// Namespace (default `default`) and name of an object.
///
/// # Errors
///
/// The name is missing, or one of the two is nothing that the API server would accept.
fn object_name(metadata: &ObjectMeta) -> Result<NamespacedName, ConvertError> {
    let name = metadata.name.as_deref().unwrap_or_default();
    if name.is_empty() {
        return Err(invalid("metadata.name", "missing".to_owned()));
    }
    check_name(name).map_err(|problem| invalid("metadata.name", problem))?;
    let namespace = metadata.namespace.as_deref().filter(|namespace| !namespace.is_empty()).unwrap_or("default");
    check_name(namespace).map_err(|problem| invalid("metadata.namespace", problem))?;
    Ok(NamespacedName::new(namespace, name))
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Family {
    V4,
    V6,
}

fn invalid(field: impl Into<String>, problem: String) -> ConvertError {
    ConvertError::Invalid(Fault { field: field.into(), problem })
}

fn check_name(name: &str) -> Result<(), String> {
    let edge = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = name.as_bytes();
    let legal = bytes.iter().all(|&c| edge(c) || c == b'-' || c == b'.')
        && bytes.first().is_some_and(|&c| edge(c))
        && bytes.last().is_some_and(|&c| edge(c));
    if name.len() > MAX_NAME || !legal {
        let expected = "lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit";
        return Err(format!("{} is not a name; expected at most {MAX_NAME} {expected}", quote(name)));
    }
    Ok(())
}

/// A value as it may stand in a one-line message: escaped, and cut where it is long.
fn quote(value: &str) -> String {
    let cut: String = value.chars().take(MAX_QUOTE).collect();
    if cut.len() < value.len() { format!("{cut:?}…") } else { format!("{cut:?}") }
}

/// v4-mapped IPv6 addresses count as the IPv4 addresses they stand for.
fn address(text: &str) -> Result<IpAddr, String> {
    let Ok(address) = text.parse::<IpAddr>() else {
        return Err(format!("{} is not an IP address", quote(text)));
    };
    let address = address.to_canonical();
    // Either would catch, or reach, more than the one host that is meant.
    if address.is_unspecified() || address.is_multicast() {
        return Err(format!("{address} is not the address of a host"));
    }
    // Another host for every client, and a Service there would take all other ports of it away. The API server refuses
    // it as an endpoint, too.
    if address.is_loopback() {
        return Err(format!("{address} is a loopback address"));
    }
    Ok(address)
}

fn port(number: i32) -> Result<NonZeroU16, String> {
    u16::try_from(number)
        .ok()
        .and_then(NonZeroU16::new)
        .ok_or_else(|| format!("{number} is not a port; expected 1 to 65535"))
}

fn protocol(text: Option<&str>) -> Result<Protocol, String> {
    match text {
        None | Some("" | "TCP") => Ok(Protocol::Tcp),
        Some("UDP") => Ok(Protocol::Udp),
        Some("SCTP") => Ok(Protocol::Sctp),
        Some(other) => Err(format!("{} is unknown; expected TCP, UDP or SCTP", quote(other))),
    }
}

/// Number and protocol of the port at `path`; every wrong field of it is reported.
fn port_and_protocol(
    path: &str,
    number: i32,
    text: Option<&str>,
    faults: &mut Vec<Fault>,
) -> Option<(NonZeroU16, Protocol)> {
    let number = port(number).map_err(|problem| faults.push(Fault { field: format!("{path}.port"), problem }));
    let protocol = protocol(text).map_err(|problem| faults.push(Fault { field: format!("{path}.protocol"), problem }));
    Some((number.ok()?, protocol.ok()?))
}

fn slice_ports(specs: &[discovery::EndpointPort], faults: &mut Vec<Fault>) -> Vec<EndpointPort> {
    let mut ports = Vec::with_capacity(specs.len());
    for (i, spec) in specs.iter().enumerate() {
        let path = format!("ports[{i}]");
        let Some(number) = spec.port else {
            faults.push(Fault { field: format!("{path}.port"), problem: "missing".into() });
            continue;
        };
        if let Some((port, protocol)) = port_and_protocol(&path, number, spec.protocol.as_deref(), faults) {
            ports.push(EndpointPort { name: spec.name.as_deref().unwrap_or_default().into(), protocol, port });
        }
    }
    ports
}

fn slice_endpoint(
    i: usize,
    endpoint: &discovery::Endpoint,
    family: Family,
    faults: &mut Vec<Fault>,
) -> Option<Endpoint> {
    let first = endpoint.addresses.first().ok_or_else(|| "missing".to_owned());
    let parsed = first.and_then(|text| address(text)).and_then(|address| match (family, address) {
        (Family::V4, IpAddr::V4(_)) | (Family::V6, IpAddr::V6(_)) => Ok(address),
        (Family::V4, IpAddr::V6(_)) => Err(format!("{address} is not IPv4, as addressType says")),
        (Family::V6, IpAddr::V4(_)) => Err(format!("{address} is not IPv6, as addressType says")),
    });
    let address =
        parsed.map_err(|problem| faults.push(Fault { field: format!("endpoints[{i}].addresses[0]"), problem })).ok()?;
    let (conditions, hints) = (endpoint.conditions.as_ref(), endpoint.hints.as_ref());
    Some(Endpoint {
        address,
        ready: conditions.and_then(|conditions| conditions.ready).unwrap_or(true),
        serving: conditions.and_then(|conditions| conditions.serving).unwrap_or(true),
        terminating: conditions.and_then(|conditions| conditions.terminating).unwrap_or(false),
        place: Arc::new(Place {
            node: non_empty(endpoint.node_name.as_deref()),
            zone: non_empty(endpoint.zone.as_deref()),
            for_zones: hints.and_then(|hints| hints.for_zones.as_ref()).map_or_else(Box::default, |zones| {
                zones.iter().filter_map(|zone| non_empty(Some(&zone.name))).collect()
            }),
            for_nodes: hints.and_then(|hints| hints.for_nodes.as_ref()).map_or_else(Box::default, |nodes| {
                nodes.iter().filter_map(|node| non_empty(Some(&node.name))).collect()
            }),
            hostname: hostname(endpoint.hostname.as_deref(), || format!("endpoints[{i}].hostname"), faults),
        }),
    })
}

fn endpoints_subset(i: usize, subset: &core::EndpointSubset, faults: &mut Vec<Fault>) -> Subset {
    let mut ports = Vec::new();
    for (j, spec) in subset.ports.as_deref().unwrap_or_default().iter().enumerate() {
        let path = format!("subsets[{i}].ports[{j}]");
        if let Some((port, protocol)) = port_and_protocol(&path, spec.port, spec.protocol.as_deref(), faults) {
            ports.push(EndpointPort { name: spec.name.as_deref().unwrap_or_default().into(), protocol, port });
        }
    }
    let mut endpoints = Vec::new();
    let lists = [("addresses", &subset.addresses, true), ("notReadyAddresses", &subset.not_ready_addresses, false)];
    for (list, entries, ready) in lists {
        for (j, entry) in entries.as_deref().unwrap_or_default().iter().enumerate() {
            let path = || format!("subsets[{i}].{list}[{j}]");
            match address(&entry.ip) {
                Ok(address) => {
                    let node = non_empty(entry.node_name.as_deref());
                    let hostname = hostname(entry.hostname.as_deref(), || format!("{}.hostname", path()), faults);
                    let place = Arc::new(Place { node, hostname, ..Place::default() });
                    endpoints.push(Endpoint { address, ready, serving: ready, terminating: false, place });
                }
                Err(problem) => faults.push(Fault { field: format!("{}.ip", path()), problem }),
            }
        }
    }
    Subset { ports, endpoints }
}

/// A wrong one costs the endpoint its name and nothing else.
fn hostname(text: Option<&str>, field: impl FnOnce() -> String, faults: &mut Vec<Fault>) -> Option<Box<str>> {
    let text = text.filter(|text| !text.is_empty())?;
    if is_label(text) && check_name(text).is_ok() {
        return Some(text.into());
    }
    let expected = "at most 63 lower-case letters, digits and '-', beginning and ending with a letter or digit";
    let problem = format!("{} is not a DNS label; expected {expected}", quote(text));
    faults.push(Fault { field: field(), problem });
    None
}

/// Whether a name that is otherwise legal fits into one label of a DNS name (RFC 1035).
fn is_label(text: &str) -> bool {
    (1..=MAX_LABEL).contains(&text.len()) && !text.contains('.')
}

fn non_empty(text: Option<&str>) -> Option<Box<str>> {
    text.filter(|text| !text.is_empty()).map(Box::from)
}

#[cfg(test)]
mod tests;
