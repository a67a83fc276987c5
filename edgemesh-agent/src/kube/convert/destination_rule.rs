//! Istio's DestinationRule.
//!
//! Rules are written for Istio of any version, whose proxies do far more than a data plane that decides at connect time
//! can, and most of them not with this agent in mind. So of what a rule says nothing is taken for granted: only
//! `metadata` is typed, and the rest is looked at field by field. A value of a wrong type is a [`Fault`] and costs its
//! field; a legal field that has no effect here is [`Ignored`]; and whatever is left of the rule counts.

use std::{borrow::Cow, collections::BTreeMap, num::NonZeroU16};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, core::NamespaceResourceScope};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Convert, ConvertError, Converted, Fault, MAX_LABEL, object_name, quote};
use crate::model::{self, Balance, Ignored, NamespacedName, Object};

/// The API group of Istio's networking objects.
pub(in crate::kube) const GROUP: &str = "networking.istio.io";
/// The versions in which the group serves rules, best first; what is used of them is the same in all.
pub(in crate::kube) const VERSIONS: [&str; 3] = ["v1", "v1beta1", "v1alpha3"];
/// The resource of the group.
pub(in crate::kube) const PLURAL: &str = "destinationrules";

/// The domain that Kubernetes gives to Services, unless the cluster was set up with another one.
const CLUSTER_DOMAIN: &str = "cluster.local";
/// More faults, or more ignored fields, of one rule would only bury the first.
const MAX_REPORTED: usize = 8;
/// Beyond this a key is no field name of any Istio, and is quoted.
const MAX_KEY: usize = 64;

const UNSUPPORTED: &str = "not supported";
const NEEDS_HTTP: &str = "seen only by an HTTP proxy, which this version does not have";
const ONE_ALGORITHM: &str = "the agent's own hash table is used";
const HASH_COUNTS: &str = "consistentHash counts";
const ALL_CLIENTS: &str = "the rule holds for the clients of every namespace";
const SOME_CLIENTS: &str = "only some clients are meant, so none of the rule counts";
const NOT_FOR_SERVICES: &str = "connections to a Service use no subset";
const UNKNOWN_CHOICE: &str = "unknown, so the default is used";

/// A networking.istio.io DestinationRule, as the API and manifests have it.
#[derive(Clone, Debug, Deserialize)]
pub(in crate::kube) struct DestinationRule {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Value,
}

impl Resource for DestinationRule {
    /// One of [`VERSIONS`].
    type DynamicType = &'static str;
    type Scope = NamespaceResourceScope;

    fn kind(_: &Self::DynamicType) -> Cow<'_, str> {
        "DestinationRule".into()
    }

    fn group(_: &Self::DynamicType) -> Cow<'_, str> {
        GROUP.into()
    }

    fn version(version: &Self::DynamicType) -> Cow<'_, str> {
        (*version).into()
    }

    fn plural(_: &Self::DynamicType) -> Cow<'_, str> {
        PLURAL.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl Convert for DestinationRule {
    fn convert(&self) -> Result<Converted, ConvertError> {
        let mut rule = model::DestinationRule::new(object_name(&self.metadata)?);
        rule.created = self.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second());
        let mut reader = Reader::default();
        for (field, value) in reader.object(&self.spec, "spec") {
            let path = join("spec", field);
            match field.as_str() {
                "host" => rule.host = service_of(reader.text(value, &path), &rule.name.namespace),
                "trafficPolicy" => (rule.balance, rule.ports) = reader.traffic_policy(value, &path),
                "subsets" => reader.subsets(value, &path),
                "exportTo" => reader.export_to(value, &path),
                "workloadSelector" if !says_nothing(value) => {
                    rule.for_some_clients = true;
                    reader.ignore(path, SOME_CLIENTS);
                }
                _ => reader.unsupported(value, path),
            }
        }
        let (ignored, faults) = reader.reported();
        rule.ignored = ignored;
        Ok(Converted { object: Object::DestinationRule(rule.into()), faults })
    }

    fn model_name(&self) -> Result<NamespacedName, ConvertError> {
        object_name(&self.metadata)
    }
}

/// Reads fields and keeps what is to be said of them.
#[derive(Debug, Default)]
struct Reader {
    faults: Vec<Fault>,
    ignored: Vec<Ignored>,
    /// How many of each are not kept.
    left_out: (usize, usize),
}

impl Reader {
    fn reported(self) -> (Vec<Ignored>, Vec<Fault>) {
        let (mut ignored, mut faults) = (self.ignored, self.faults);
        if self.left_out.0 > 0 {
            faults.push(Fault { field: "spec".into(), problem: format!("and {} more", self.left_out.0) });
        }
        if self.left_out.1 > 0 {
            let field = format!("{} more", self.left_out.1).into();
            ignored.push(Ignored { field, why: UNSUPPORTED.into() });
        }
        (ignored, faults)
    }

    fn fault(&mut self, field: &str, problem: impl FnOnce() -> String) {
        if self.faults.len() < MAX_REPORTED {
            self.faults.push(Fault { field: field.to_owned(), problem: problem() });
        } else {
            self.left_out.0 += 1;
        }
    }

    fn ignore(&mut self, field: String, why: &'static str) {
        if self.ignored.len() < MAX_REPORTED {
            self.ignored.push(Ignored { field: field.into(), why: why.into() });
        } else {
            self.left_out.1 += 1;
        }
    }

    /// Any field that this agent does nothing about.
    fn unsupported(&mut self, value: &Value, path: String) {
        if !says_nothing(value) {
            self.ignore(path, UNSUPPORTED);
        }
    }

    /// The fields of an object; none where it is absent, or something else.
    fn object<'a>(&mut self, value: &'a Value, path: &str) -> impl Iterator<Item = (&'a String, &'a Value)> + use<'a> {
        let fields: Option<&Map<String, Value>> = match value {
            Value::Object(fields) => Some(fields),
            Value::Null => None,
            other @ (Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)) => {
                self.fault(path, || expected("an object", other));
                None
            }
        };
        fields.into_iter().flatten()
    }

    fn list<'a>(&mut self, value: &'a Value, path: &str) -> &'a [Value] {
        match value {
            Value::Array(items) => items,
            Value::Null => &[],
            other @ (Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Object(_)) => {
                self.fault(path, || expected("a list", other));
                &[]
            }
        }
    }

    fn text<'a>(&mut self, value: &'a Value, path: &str) -> &'a str {
        match value {
            Value::String(text) => text,
            Value::Null => "",
            other @ (Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
                self.fault(path, || expected("a string", other));
                ""
            }
        }
    }

    fn flag(&mut self, value: &Value, path: &str) -> bool {
        match value {
            Value::Bool(flag) => *flag,
            Value::Null => false,
            other @ (Value::Number(_) | Value::String(_) | Value::Array(_) | Value::Object(_)) => {
                self.fault(path, || expected("true or false", other));
                false
            }
        }
    }

    /// `spec.trafficPolicy`: what it says for all ports, and for single ones.
    fn traffic_policy(&mut self, value: &Value, path: &str) -> (Balance, BTreeMap<NonZeroU16, Balance>) {
        let (mut balance, mut ports) = (Balance::default(), BTreeMap::new());
        for (field, value) in self.object(value, path) {
            let path = join(path, field);
            match field.as_str() {
                "loadBalancer" => balance = self.load_balancer(value, &path),
                "portLevelSettings" => {
                    for (i, entry) in self.list(value, &path).iter().enumerate() {
                        self.port_level(entry, &format!("{path}[{i}]"), &mut ports);
                    }
                }
                _ => self.unsupported(value, path),
            }
        }
        (balance, ports)
    }

    fn port_level(&mut self, value: &Value, path: &str, ports: &mut BTreeMap<NonZeroU16, Balance>) {
        let (mut balance, mut number) = (Balance::default(), &Value::Null);
        for (field, value) in self.object(value, path) {
            let path = join(path, field);
            match field.as_str() {
                "port" => {
                    for (field, value) in self.object(value, &path) {
                        match field.as_str() {
                            "number" => number = value,
                            _ => self.unsupported(value, join(&path, field)),
                        }
                    }
                }
                "loadBalancer" => balance = self.load_balancer(value, &path),
                _ => self.unsupported(value, path),
            }
        }
        let port = number.as_u64().and_then(|number| u16::try_from(number).ok()).and_then(NonZeroU16::new);
        match port {
            Some(port) if ports.contains_key(&port) => {
                self.fault(&format!("{path}.port.number"), || format!("{port} stands there twice; the first counts"));
            }
            Some(port) => {
                ports.insert(port, balance);
            }
            None => self.fault(&format!("{path}.port.number"), || expected("1 to 65535", number)),
        }
    }

    fn load_balancer(&mut self, value: &Value, path: &str) -> Balance {
        let (mut balance, mut simple) = (Balance::default(), "");
        for (field, value) in self.object(value, path) {
            let path = join(path, field);
            match field.as_str() {
                "simple" => simple = self.simple(value, &path),
                "consistentHash" => balance = self.consistent_hash(value, &path),
                _ => self.unsupported(value, path),
            }
        }
        // Istio allows one of the two. The hash is what an application may depend on.
        if balance != Balance::default() && !matches!(simple, "" | "UNSPECIFIED") {
            self.ignore(join(path, "simple"), HASH_COUNTS);
        }
        balance
    }

    /// All values mean the same here, see docs/policies.md; returned for what else is to be said of them.
    fn simple<'a>(&mut self, value: &'a Value, path: &str) -> &'a str {
        let text = self.text(value, path);
        match text {
            "" | "UNSPECIFIED" | "RANDOM" | "ROUND_ROBIN" | "LEAST_CONN" | "LEAST_REQUEST" | "PASSTHROUGH" => {}
            _ => self.ignore(format!("{path}: {}", quote(text)), UNKNOWN_CHOICE),
        }
        text
    }

    fn consistent_hash(&mut self, value: &Value, path: &str) -> Balance {
        let mut by_source_ip = false;
        for (field, value) in self.object(value, path) {
            let path = join(path, field);
            match field.as_str() {
                "useSourceIp" => by_source_ip = self.flag(value, &path),
                "httpHeaderName" | "httpQueryParameterName" => {
                    if !self.text(value, &path).is_empty() {
                        self.ignore(path, NEEDS_HTTP);
                    }
                }
                "httpCookie" => {
                    if self.object(value, &path).next().is_some() {
                        self.ignore(path, NEEDS_HTTP);
                    }
                }
                "minimumRingSize" | "ringHash" | "maglev" => {
                    if !says_nothing(value) {
                        self.ignore(path, ONE_ALGORITHM);
                    }
                }
                _ => self.unsupported(value, path),
            }
        }
        if by_source_ip { Balance::SourceIp } else { Balance::default() }
    }

    fn subsets(&mut self, value: &Value, path: &str) {
        let mut own_policies = false;
        for (i, subset) in self.list(value, path).iter().enumerate() {
            let mut fields = self.object(subset, &format!("{path}[{i}]"));
            own_policies |= fields.any(|(field, value)| field == "trafficPolicy" && !says_nothing(value));
        }
        if own_policies {
            self.ignore(format!("{path}[].trafficPolicy"), NOT_FOR_SERVICES);
        }
    }

    fn export_to(&mut self, value: &Value, path: &str) {
        let namespaces = self.list(value, path);
        if !namespaces.is_empty() && !namespaces.iter().any(|namespace| namespace == "*") {
            self.ignore(path.to_owned(), ALL_CLIENTS);
        }
    }
}

/// The Service that a rule's host means: `NAME` in the rule's own namespace, `NAME.NAMESPACE`, `NAME.NAMESPACE.svc`, or
/// that with the cluster's domain, in any case, with or without a dot at the end.
///
/// None for hosts outside the cluster and for wildcards: a policy for many is none for a Service.
fn service_of(host: &str, namespace: &str) -> Option<NamespacedName> {
    // Nothing longer is a DNS name (RFC 1035), and need not be copied.
    if host.len() > 254 {
        return None;
    }
    let host = host.to_ascii_lowercase();
    let host = host.strip_suffix('.').unwrap_or(&host);
    let (name, namespace) = match host.split_once('.') {
        None => (host, namespace),
        Some((name, rest)) => match rest.split_once('.') {
            None => (name, rest),
            Some((namespace, "svc")) => (name, namespace),
            Some((namespace, domain)) if domain.strip_prefix("svc.") == Some(CLUSTER_DOMAIN) => (name, namespace),
            Some(_) => return None,
        },
    };
    let label = |text: &str| {
        let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        !text.is_empty() && text.len() <= MAX_LABEL && text.bytes().all(inner)
    };
    (label(name) && label(namespace)).then(|| NamespacedName::new(namespace, name))
}

/// Whether a value asks for nothing: it is absent, or has nothing but the defaults of its types in it.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        // No deeper than what was parsed, which is bounded.
        Value::Array(items) => items.iter().all(says_nothing),
        Value::Object(fields) => fields.values().all(says_nothing),
    }
}

fn join(path: &str, field: &str) -> String {
    let plain = field.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'-'));
    if plain && !field.is_empty() && field.len() <= MAX_KEY {
        format!("{path}.{field}")
    } else {
        format!("{path}[{}]", quote(field))
    }
}

fn expected(what: &str, value: &Value) -> String {
    let got = match value {
        Value::Null => "missing".to_owned(),
        Value::Bool(flag) => format!("{flag} is wrong"),
        Value::Number(number) => format!("{} is wrong", quote(&number.to_string())),
        Value::String(text) => format!("{} is wrong", quote(text)),
        Value::Array(_) => "a list is wrong".to_owned(),
        Value::Object(_) => "an object is wrong".to_owned(),
    };
    format!("{got}; expected {what}")
}

#[cfg(test)]
mod tests;
