//! The example manifests: which Services there are, and which pods they are about.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use crate::lab::App;

/// All manifests of a directory.
pub(super) struct Examples {
    files: Vec<(String, String)>,
    services: Vec<ServiceObject>,
    slices: Vec<SliceObject>,
}

/// A pod that an EndpointSlice names.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ExamplePod {
    pub(super) name: String,
    pub(super) node: String,
    pub(super) ips: Vec<IpAddr>,
    /// What it serves, and on which ports.
    pub(super) apps: Vec<(App, u16)>,
}

/// One port of a Service.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ExampleService {
    pub(super) name: String,
    pub(super) app: App,
    /// The address it is reached at; `None` where it is headless.
    pub(super) frontend: Option<SocketAddr>,
    pub(super) backends: Vec<Backend>,
}

/// A pod behind a Service.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Backend {
    pub(super) pod: String,
    pub(super) node: String,
    /// Where it listens; pods of other nodes may have the same.
    pub(super) address: SocketAddr,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PortObject {
    #[serde(default)]
    name: String,
    #[serde(default)]
    protocol: Option<String>,
    port: u16,
    #[serde(default)]
    app_protocol: Option<String>,
}

#[derive(Deserialize)]
struct ServiceObject {
    metadata: Metadata,
    spec: ServiceSpec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ServiceSpec {
    #[serde(rename = "clusterIPs")]
    cluster_ips: Vec<String>,
    ports: Vec<PortObject>,
}

#[derive(Deserialize)]
struct SliceObject {
    metadata: Metadata,
    ports: Vec<PortObject>,
    endpoints: Vec<EndpointObject>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct EndpointObject {
    addresses: Vec<IpAddr>,
    node_name: String,
    target_ref: TargetRef,
}

#[derive(Deserialize)]
struct TargetRef {
    name: String,
}

impl Examples {
    /// Reads every `.yaml` file of a directory.
    pub(super) fn read(directory: &Path) -> Result<Self> {
        let attempt = || format!("could not read the manifests of {}; name them with --manifests", directory.display());
        let mut files = Vec::new();
        for entry in std::fs::read_dir(directory).with_context(attempt)? {
            let path = entry.with_context(attempt)?.path();
            if path.extension().is_some_and(|extension| extension == "yaml") {
                let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                files.push((name, std::fs::read_to_string(&path).with_context(attempt)?));
            }
        }
        ensure!(!files.is_empty(), "{}: there is no .yaml file", attempt());
        files.sort_unstable();
        Self::parse(files)
    }

    /// The files' names without `.yaml`, and their texts.
    pub(super) fn files(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().map(|(name, text)| (name.as_str(), text.as_str()))
    }

    fn parse(files: Vec<(String, String)>) -> Result<Self> {
        let (mut services, mut slices) = (Vec::new(), Vec::new());
        for (name, text) in &files {
            for document in serde_yaml::Deserializer::from_str(text) {
                let attempt = || format!("{name}.yaml is nothing the demo can show");
                let object = serde_yaml::Value::deserialize(document).with_context(attempt)?;
                match object.get("kind").and_then(|kind| kind.as_str()) {
                    Some("Service") => services.push(serde_yaml::from_value(object).with_context(attempt)?),
                    Some("EndpointSlice") => slices.push(serde_yaml::from_value(object).with_context(attempt)?),
                    kind => bail!("{}: it has the kind {kind:?}, not Service or EndpointSlice", attempt()),
                }
            }
        }
        Ok(Self { files, services, slices })
    }

    /// The pods of all EndpointSlices; one that several name, once, with all its addresses and servers.
    pub(super) fn pods(&self) -> Vec<ExamplePod> {
        let mut pods: Vec<ExamplePod> = Vec::new();
        for slice in &self.slices {
            for endpoint in &slice.endpoints {
                let name = &endpoint.target_ref.name;
                let place = pods.iter().position(|pod| pod.name == *name).unwrap_or_else(|| {
                    let node = endpoint.node_name.clone();
                    pods.push(ExamplePod { name: name.clone(), node, ips: Vec::new(), apps: Vec::new() });
                    pods.len() - 1
                });
                let Some(pod) = pods.get_mut(place) else { continue };
                for ip in &endpoint.addresses {
                    add(&mut pod.ips, *ip);
                }
                for port in &slice.ports {
                    add(&mut pod.apps, (port.app(), port.port));
                }
            }
        }
        pods
    }

    /// The ports of all Services, one entry per ClusterIP.
    pub(super) fn services(&self) -> Vec<ExampleService> {
        let mut found = Vec::new();
        for service in &self.services {
            for port in &service.spec.ports {
                for ip in &service.spec.cluster_ips {
                    let frontend = ip.parse().ok().map(|ip| SocketAddr::new(ip, port.port));
                    found.push(ExampleService {
                        name: service.metadata.name.clone(),
                        app: port.app(),
                        frontend,
                        backends: self.backends(&service.metadata.name, &port.name, frontend),
                    });
                }
            }
        }
        found
    }

    fn backends(&self, service: &str, port: &str, frontend: Option<SocketAddr>) -> Vec<Backend> {
        let mut found = Vec::new();
        for slice in &self.slices {
            if slice.metadata.labels.get("kubernetes.io/service-name").is_none_or(|name| name != service) {
                continue;
            }
            for port in slice.ports.iter().filter(|other| other.name == port) {
                for endpoint in &slice.endpoints {
                    let same_family = |ip: &&IpAddr| frontend.is_none_or(|f| f.is_ipv4() == ip.is_ipv4());
                    for ip in endpoint.addresses.iter().filter(same_family) {
                        let (pod, node) = (endpoint.target_ref.name.clone(), endpoint.node_name.clone());
                        found.push(Backend { pod, node, address: SocketAddr::new(*ip, port.port) });
                    }
                }
            }
        }
        found
    }
}

impl PortObject {
    /// What listens behind a port: `appProtocol` says so, as Kubernetes suggests (KEP-3726).
    fn app(&self) -> App {
        match (self.app_protocol.as_deref(), self.protocol.as_deref()) {
            (_, Some("UDP")) => App::Udp,
            (Some("http"), _) => App::Http,
            (Some("kubernetes.io/ws"), _) => App::WebSocket,
            _ => App::Tcp,
        }
    }
}

fn add<T: PartialEq>(list: &mut Vec<T>, item: T) {
    if !list.contains(&item) {
        list.push(item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_cover_what_the_demo_promises() {
        let examples = Examples::read(Path::new("../manifests/examples")).unwrap();
        let services = examples.services();
        let names: Vec<&str> = services.iter().map(|service| service.name.as_str()).collect();
        assert_eq!(
            names,
            ["headless", "hostname", "hostname-ipv6", "no-endpoints", "tcp-echo", "udp-echo", "websocket"]
        );
        let of = |name: &str| services.iter().find(|service| service.name == name).unwrap();
        assert_eq!((of("headless").frontend, of("headless").backends.len()), (None, 2));
        assert_eq!((of("hostname").app, of("hostname").backends.len()), (App::Http, 3));
        assert!(of("hostname-ipv6").backends.iter().all(|backend| backend.address.is_ipv6()));
        assert!(of("no-endpoints").backends.is_empty());
        assert_eq!(of("websocket").app, App::WebSocket);
        let pods = examples.pods();
        let replica = pods.iter().find(|pod| pod.name == "hostname-2").unwrap();
        assert_eq!((replica.node.as_str(), replica.ips.len()), ("edge2", 2));
        assert_eq!(replica.apps, [(App::Http, 8080)]);
    }

    #[test]
    fn the_examples_of_sites_have_pods_with_the_same_address_on_all_nodes() {
        let examples = Examples::read(Path::new("../manifests/examples/sites")).unwrap();
        let services = examples.services();
        let at = |node: &str| {
            let all = services.iter().flat_map(|service| &service.backends);
            all.filter(|backend| backend.node == node).map(|backend| backend.address).collect::<Vec<_>>()
        };
        assert_eq!((at("edge1").len(), at("edge1")), (5, at("edge2")));
        assert!(at("edge1").contains(at("cloud").first().unwrap()));
        let apps: Vec<App> = services.iter().filter(|s| s.name == "app-edge1").map(|service| service.app).collect();
        assert_eq!(apps, [App::Http, App::WebSocket, App::Tcp, App::Udp]);
    }

    #[test]
    fn other_kinds_are_refused_by_name() {
        let file = |text: &str| vec![("x".to_owned(), text.to_owned())];
        let error = Examples::parse(file("kind: Pod\n")).err().unwrap();
        assert!(format!("{error:#}").contains("Some(\"Pod\")"), "{error:#}");
        Examples::parse(file("kind: Service\nmetadata: {}\n")).err().unwrap();
    }
}
