//! core/v1 Node.

use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;

use super::{Convert, ConvertError, Converted, Fault, address, check_name, invalid};
use crate::model::{NamespacedName, Node, Object};

impl Convert for core::Node {
    fn convert(&self) -> Result<Converted, ConvertError> {
        let name = self.model_name()?;
        let mut faults = Vec::new();
        let listed = self.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
        let mut addresses = Vec::new();
        for wanted in ["InternalIP", "ExternalIP"] {
            for (i, entry) in listed.iter().enumerate().filter(|(_, entry)| entry.type_ == wanted) {
                match address(&entry.address) {
                    Ok(address) if addresses.contains(&address) => {}
                    Ok(address) => addresses.push(address),
                    Err(problem) => faults.push(Fault { field: format!("status.addresses[{i}].address"), problem }),
                }
            }
        }
        // Ordered, as they come from a BTreeMap.
        let labels = self.metadata.labels.iter().flatten();
        let labels = labels.map(|(key, value)| (Arc::from(&**key), Arc::from(&**value))).collect();
        Ok(Converted { object: Object::Node(Node { name, addresses, labels }.into()), faults })
    }

    /// A namespace, which only a manifest that nobody checked can have, is passed over.
    fn model_name(&self) -> Result<NamespacedName, ConvertError> {
        let name = self.metadata.name.as_deref().unwrap_or_default();
        if name.is_empty() {
            return Err(invalid("metadata.name", "missing".to_owned()));
        }
        check_name(name).map_err(|problem| invalid("metadata.name", problem))?;
        Ok(NamespacedName::new("", name))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(value: Value) -> Result<Converted, ConvertError> {
        serde_json::from_value::<core::Node>(value).unwrap().convert()
    }

    #[test]
    fn a_node_has_its_labels_and_the_addresses_it_can_be_reached_at() {
        let converted = node(json!({
            "metadata": {"name": "edge1", "namespace": "ignored", "labels": {
                "topology.kubernetes.io/zone": "a", "apps.kubeedge.io/belonging-to": "hangzhou", "b": ""}},
            "status": {"addresses": [
                {"type": "Hostname", "address": "edge1"},
                {"type": "ExternalIP", "address": "203.0.113.1"},
                {"type": "InternalIP", "address": "192.168.10.11"},
                {"type": "InternalIP", "address": "fd00::11"},
                {"type": "InternalIP", "address": "203.0.113.1"},
                {"type": "InternalIP", "address": "127.0.0.1"},
                {"type": "ExternalIP", "address": "edge1.example.org"}]},
        }))
        .unwrap();
        let Object::Node(node) = converted.object else { panic!("not a Node") };
        assert_eq!(node.name.to_string(), "edge1");
        let addresses: Vec<String> = node.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["192.168.10.11", "fd00::11", "203.0.113.1"]);
        assert_eq!(
            (node.zone(), node.group(), node.label("b"), node.label("c")),
            (Some("a"), Some("hangzhou"), Some(""), None)
        );
        let faults: Vec<String> = converted.faults.iter().map(ToString::to_string).collect();
        assert_eq!(
            faults,
            [
                "status.addresses[5].address: 127.0.0.1 is a loopback address",
                "status.addresses[6].address: \"edge1.example.org\" is not an IP address",
            ]
        );
    }

    #[test]
    fn empty_labels_are_neither_zone_nor_group() {
        let labels = json!({"topology.kubernetes.io/zone": "", "apps.kubeedge.io/belonging-to": ""});
        let converted = node(json!({"metadata": {"name": "edge1", "labels": labels}})).unwrap();
        let Object::Node(node) = converted.object else { panic!("not a Node") };
        assert_eq!((node.zone(), node.group()), (None, None));
    }

    #[test]
    fn a_node_needs_a_name() {
        for metadata in [json!({}), json!({"name": "Edge 1"})] {
            assert!(node(json!({"metadata": metadata})).unwrap_err().to_string().starts_with("metadata.name: "));
        }
    }
}
