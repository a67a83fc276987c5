//! Service, EndpointSlice and Node manifests, and the directory agents read them from.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{Node, Pod, Transport};

/// The directory the lab's agents read their objects from.
#[derive(Debug, Clone)]
pub struct Manifests {
    directory: PathBuf,
}

impl Manifests {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Where it is.
    pub fn directory(&self) -> &std::path::Path {
        &self.directory
    }

    /// Writes or replaces `NAME.yaml` in one step, so that no agent sees half of it.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path(name)?;
        // Beside the directory and not in it: only the finished file may appear there.
        let draft = self.directory.with_extension("draft");
        std::fs::create_dir_all(&draft)
            .and_then(|()| std::fs::write(draft.join(name), text))
            .and_then(|()| std::fs::rename(draft.join(name), &path))
            .with_context(|| format!("could not write {}", path.display()))
    }

    /// Removes `NAME.yaml`.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name)?;
        std::fs::remove_file(&path).with_context(|| format!("could not remove {}", path.display()))
    }

    fn path(&self, name: &str) -> Result<PathBuf> {
        ensure!(!name.is_empty() && !name.contains('/'), "{name:?} is no name for a manifest");
        Ok(self.directory.join(format!("{name}.yaml")))
    }
}

/// A Service, with the EndpointSlices that go with it.
#[derive(Debug, Clone)]
pub struct Service {
    namespace: String,
    name: String,
    metadata: Value,
    spec: Value,
    status: Value,
    ports: Vec<Port>,
}

#[derive(Debug, Clone)]
struct Port {
    name: String,
    transport: Transport,
    port: u16,
    target: u16,
    node_port: Option<u16>,
}

/// One endpoint of an EndpointSlice.
#[derive(Debug, Clone)]
pub struct Endpoint {
    ip: IpAddr,
    fields: Value,
}

impl Service {
    /// A Service of type ClusterIP in the namespace `default`. `cluster_ips` is empty for a headless one.
    pub fn new(name: &str, cluster_ips: &[&str]) -> Self {
        let first = cluster_ips.first().copied().unwrap_or("None");
        let all = if cluster_ips.is_empty() { &["None"] } else { cluster_ips };
        let families: Vec<&str> = cluster_ips.iter().map(|ip| if ip.contains(':') { "IPv6" } else { "IPv4" }).collect();
        let mut spec = json!({ "type": "ClusterIP", "clusterIP": first, "clusterIPs": all });
        if !families.is_empty() {
            spec["ipFamilyPolicy"] = json!(if families.len() > 1 { "RequireDualStack" } else { "SingleStack" });
            spec["ipFamilies"] = json!(families);
        }
        Self {
            namespace: "default".to_owned(),
            name: name.to_owned(),
            metadata: json!({ "name": name, "namespace": "default" }),
            spec,
            status: json!({}),
            ports: Vec::new(),
        }
    }

    /// Moves it to another namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.metadata["namespace"] = json!(namespace);
        namespace.clone_into(&mut self.namespace);
        self
    }

    /// Adds a named port and the port its endpoints listen on.
    #[must_use]
    pub fn port(mut self, name: &str, transport: Transport, port: u16, target: u16) -> Self {
        self.ports.push(Port { name: name.to_owned(), transport, port, target, node_port: None });
        self
    }

    /// Gives the port added last a node port, and makes the Service one of type NodePort unless it is of another that
    /// has node ports.
    #[must_use]
    pub fn node_port(mut self, number: u16) -> Self {
        if self.spec["type"] == "ClusterIP" {
            self.spec["type"] = json!("NodePort");
        }
        if let Some(port) = self.ports.last_mut() {
            port.node_port = Some(number);
        }
        self
    }

    /// Makes it a Service of type LoadBalancer and adds an ingress point, with the `ipMode` unless that is empty.
    #[must_use]
    pub fn ingress(mut self, ip: &str, mode: &str) -> Self {
        self.spec["type"] = json!("LoadBalancer");
        let point = if mode.is_empty() { json!({ "ip": ip }) } else { json!({ "ip": ip, "ipMode": mode }) };
        let points = &mut self.status["loadBalancer"]["ingress"];
        match points.as_array_mut() {
            Some(points) => points.push(point),
            None => *points = json!([point]),
        }
        self
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.metadata["labels"][name] = json!(value);
        self
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.metadata["annotations"][name] = json!(value);
        self
    }

    /// Sets a field of `spec`, such as `sessionAffinity`.
    #[must_use]
    pub fn spec(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.spec[field] = value.into();
        self
    }

    /// The Service alone, as YAML.
    pub fn yaml(&self) -> Result<String> {
        let ports: Vec<Value> = self
            .ports
            .iter()
            .map(|port| {
                let mut entry = json!({
                    "name": port.name,
                    "protocol": protocol(port.transport),
                    "port": port.port,
                    "targetPort": port.target,
                });
                if let Some(number) = port.node_port {
                    entry["nodePort"] = json!(number);
                }
                entry
            })
            .collect();
        let mut spec = self.spec.clone();
        spec["ports"] = json!(ports);
        let (metadata, status) = (&self.metadata, &self.status);
        document(&json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec, "status": status,
        }))
    }

    /// The Service, and an EndpointSlice per address family with these endpoints; without any, an empty IPv4 one.
    pub fn yaml_with(&self, endpoints: &[Endpoint]) -> Result<String> {
        let mut text = self.yaml()?;
        for (family, suffix) in [("IPv4", "v4"), ("IPv6", "v6")] {
            let four = family == "IPv4";
            let members: Vec<Endpoint> =
                endpoints.iter().filter(|endpoint| endpoint.ip.is_ipv4() == four).cloned().collect();
            if !members.is_empty() || (four && endpoints.is_empty()) {
                text.push_str(&self.slice(&format!("{}-{suffix}", self.name), family, &members)?);
            }
        }
        Ok(text)
    }

    /// The Service, and core/v1 Endpoints with these endpoints: where the API has no `discovery.k8s.io/v1`.
    pub fn yaml_with_endpoints(&self, endpoints: &[Endpoint]) -> Result<String> {
        let (ready, not_ready): (Vec<&Endpoint>, Vec<&Endpoint>) =
            endpoints.iter().partition(|endpoint| endpoint.fields["conditions"]["ready"] == true);
        let addresses = |endpoints: &[&Endpoint]| -> Vec<Value> {
            let address = |endpoint: &&Endpoint| json!({ "ip": endpoint.ip, "nodeName": endpoint.fields["nodeName"] });
            endpoints.iter().map(address).collect()
        };
        let subsets = if endpoints.is_empty() {
            json!([])
        } else {
            json!([{
                "addresses": addresses(&ready),
                "notReadyAddresses": addresses(&not_ready),
                "ports": self.endpoint_ports(),
            }])
        };
        let mut text = self.yaml()?;
        text.push_str(&document(&json!({
            "apiVersion": "v1",
            "kind": "Endpoints",
            "metadata": { "name": self.name, "namespace": self.namespace },
            "subsets": subsets,
        }))?);
        Ok(text)
    }

    fn endpoint_ports(&self) -> Vec<Value> {
        let port =
            |port: &Port| json!({ "name": port.name, "protocol": protocol(port.transport), "port": port.target });
        self.ports.iter().map(port).collect()
    }

    /// One EndpointSlice of the Service, as YAML; `family` is `IPv4` or `IPv6`.
    pub fn slice(&self, name: &str, family: &str, endpoints: &[Endpoint]) -> Result<String> {
        let endpoints: Vec<&Value> = endpoints.iter().map(|endpoint| &endpoint.fields).collect();
        document(&json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": name,
                "namespace": self.namespace,
                "labels": { "kubernetes.io/service-name": self.name },
            },
            "addressType": family,
            "ports": self.endpoint_ports(),
            "endpoints": endpoints,
        }))
    }
}

impl Endpoint {
    /// A ready endpoint on a node.
    pub fn new(ip: IpAddr, node: &str) -> Self {
        let fields = json!({
            "addresses": [ip],
            "nodeName": node,
            "conditions": { "ready": true, "serving": true, "terminating": false },
        });
        Self { ip, fields }
    }

    /// The endpoints of a pod on a node, one per address.
    pub fn of(pod: &Pod, node: &str) -> Vec<Self> {
        pod.ips().iter().map(|ip| Self::new(*ip, node)).collect()
    }

    /// Sets its conditions.
    #[must_use]
    pub fn conditions(mut self, ready: bool, serving: bool, terminating: bool) -> Self {
        self.fields["conditions"] = json!({ "ready": ready, "serving": serving, "terminating": terminating });
        self
    }

    /// Sets any other field, such as `zone`.
    #[must_use]
    pub fn field(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.fields[name] = value.into();
        self
    }
}

/// The Node object of a node, with labels, as YAML.
pub fn node(node: &Node, labels: &[(&str, &str)]) -> Result<String> {
    let labels: BTreeMap<&str, &str> = labels.iter().copied().collect();
    let addresses: Vec<Value> = node.ips().iter().map(|ip| json!({ "type": "InternalIP", "address": ip })).collect();
    document(&json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": node.name(), "labels": labels },
        "status": { "addresses": addresses },
    }))
}

fn protocol(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "TCP",
        Transport::Udp => "UDP",
    }
}

fn document(object: &Value) -> Result<String> {
    let text = serde_yaml::to_string(object).context("could not write an object as YAML")?;
    Ok(format!("---\n{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Vec<Value> {
        use serde::Deserialize as _;
        serde_yaml::Deserializer::from_str(text).map(|document| Value::deserialize(document).unwrap()).collect()
    }

    #[test]
    fn a_dual_stack_service_comes_with_a_slice_per_family() {
        let endpoints = ["10.244.1.2", "fd00::2"].map(|ip| Endpoint::new(ip.parse().unwrap(), "edge1"));
        let service = Service::new("web", &["10.96.0.1", "fd00:96::1"]).port("http", Transport::Tcp, 80, 8080);
        let objects = parse(&service.yaml_with(&endpoints).unwrap());
        assert_eq!(objects.len(), 3);
        assert_eq!(objects[0]["spec"]["clusterIPs"], json!(["10.96.0.1", "fd00:96::1"]));
        assert_eq!(objects[1]["addressType"], "IPv4");
        assert_eq!(objects[1]["endpoints"][0]["addresses"], json!(["10.244.1.2"]));
        assert_eq!(objects[2]["addressType"], "IPv6");
        assert_eq!(objects[2]["metadata"]["labels"]["kubernetes.io/service-name"], "web");
        assert_eq!(objects[2]["ports"], json!([{"name": "http", "protocol": "TCP", "port": 8080}]));
    }

    #[test]
    fn node_ports_and_ingress_points_make_the_type_that_has_them() {
        let service = Service::new("web", &["10.96.0.1"]).port("http", Transport::Tcp, 80, 8080).node_port(30_080);
        let object = &parse(&service.yaml().unwrap())[0];
        assert_eq!(
            (&object["spec"]["type"], &object["spec"]["ports"][0]["nodePort"]),
            (&json!("NodePort"), &json!(30_080))
        );
        let service = service.ingress("198.51.100.1", "").ingress("198.51.100.2", "Proxy");
        let object = &parse(&service.yaml().unwrap())[0];
        assert_eq!(object["spec"]["type"], "LoadBalancer");
        let points = json!([{"ip": "198.51.100.1"}, {"ip": "198.51.100.2", "ipMode": "Proxy"}]);
        assert_eq!(object["status"]["loadBalancer"]["ingress"], points);
    }

    #[test]
    fn a_headless_service_without_endpoints_is_still_whole() {
        let objects = parse(&Service::new("none", &[]).namespace("edge").yaml_with(&[]).unwrap());
        assert_eq!(objects[0]["spec"]["clusterIP"], "None");
        assert_eq!(objects[1]["endpoints"], json!([]));
        assert_eq!(objects[1]["metadata"]["namespace"], "edge");
    }

    #[test]
    fn a_manifest_appears_whole_and_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("manifests");
        std::fs::create_dir(&path).unwrap();
        let manifests = Manifests::new(path.clone());
        manifests.write("a", "x: 1\n").unwrap();
        assert_eq!(std::fs::read_to_string(path.join("a.yaml")).unwrap(), "x: 1\n");
        assert_eq!(std::fs::read_dir(&path).unwrap().count(), 1);
        manifests.remove("a").unwrap();
        manifests.remove("a").unwrap_err();
        manifests.write("../a", "").unwrap_err();
    }
}
