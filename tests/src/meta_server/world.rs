//! The cluster, the link and the node's store.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;

use super::names::{guessed_kind, guessed_resource, true_resource};
use super::{Door, Fault, Link, Request};

/// What is sent on a watch.
#[derive(Debug, Clone)]
pub(super) enum Tell {
    Event(Value),
    Raw(String),
    /// Its time is up.
    End,
    Break,
    Silence,
}

/// A collection of objects as a path names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Collection {
    /// `v1`, or `GROUP/VERSION`.
    pub(super) group_version: String,
    pub(super) resource: String,
    pub(super) namespace: Option<String>,
}

/// An open watch.
#[derive(Debug)]
struct Hook {
    collection: Collection,
    fields: BTreeMap<String, String>,
    tell: UnboundedSender<Tell>,
}

/// An answer to a list, and what has to pass before it is given.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) body: Value,
    pub(super) after: Duration,
}

/// Everything there is.
#[derive(Debug)]
pub(super) struct World {
    pub(super) door: Door,
    pub(super) unauthorized: Option<String>,
    /// By resource, with the one name that is not.
    pub(super) forbidden: BTreeMap<String, Option<String>>,
    pub(super) faults: BTreeMap<String, Fault>,
    pub(super) requests: Vec<Request>,
    pub(super) unserved: BTreeSet<(String, String)>,
    pub(super) old_names: bool,
    /// What the node has stored (`meta_v2` of edgecore.db), by key.
    pub(super) rows: BTreeMap<String, Value>,
    /// Group, version and resource of what cloudcore tells this node of.
    pub(super) listeners: BTreeSet<(String, String)>,
    /// By resource, namespace and name.
    cluster: BTreeMap<(String, String, String), Value>,
    revision: u64,
    /// The versions that the cloud believes the node to have (ObjectSync), by key.
    believed: BTreeMap<String, u64>,
    link: Link,
    hooks: Vec<Hook>,
}

impl World {
    pub(super) fn new(door: Door) -> Self {
        Self {
            door,
            unauthorized: None,
            forbidden: BTreeMap::new(),
            faults: BTreeMap::new(),
            requests: Vec::new(),
            unserved: BTreeSet::new(),
            old_names: false,
            rows: BTreeMap::new(),
            listeners: BTreeSet::new(),
            cluster: BTreeMap::new(),
            revision: 1000,
            believed: BTreeMap::new(),
            link: Link::Up,
            hooks: Vec::new(),
        }
    }

    pub(super) fn put(&mut self, mut object: Value) -> u64 {
        self.revision += 1;
        let resource = true_resource(text(&object["kind"]));
        let id =
            (resource, text(&object["metadata"]["namespace"]).to_owned(), text(&object["metadata"]["name"]).to_owned());
        let known = self.cluster.get(&id);
        let verb = if known.is_some() { "MODIFIED" } else { "ADDED" };
        object["metadata"]["uid"] =
            known.map_or_else(|| json!(format!("uid-{}", self.revision)), |known| known["metadata"]["uid"].clone());
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        self.cluster.insert(id.clone(), object.clone());
        self.send(verb, &id.0, &object);
        self.revision
    }

    pub(super) fn delete(&mut self, resource: &str, namespace: &str, name: &str) {
        let id = (resource.to_owned(), namespace.to_owned(), name.to_owned());
        let Some(mut object) = self.cluster.remove(&id) else { return };
        self.revision += 1;
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        self.send("DELETED", resource, &object);
    }

    pub(super) fn set_link(&mut self, link: Link) {
        let back = link == Link::Up && self.link != Link::Up;
        self.link = link;
        if !back {
            return;
        }
        // synccontroller sends newer versions of what the node has. Of what is deleted it sends an object without a kind,
        // which edgecore cannot read.
        let newer: Vec<Value> = self
            .rows
            .values()
            .filter_map(|row| {
                let id = (
                    true_resource(text(&row["kind"])),
                    text(&row["metadata"]["namespace"]).to_owned(),
                    text(&row["metadata"]["name"]).to_owned(),
                );
                let now = self.cluster.get(&id).filter(|now| version(now) > version(row))?;
                let mut now = now.clone();
                now["apiVersion"] = row["apiVersion"].clone();
                Some(now)
            })
            .collect();
        for object in newer {
            self.arrive("MODIFIED", &object);
        }
    }

    /// A list, by the cloud or from the store.
    pub(super) fn list(&self, collection: &Collection, fields: &BTreeMap<String, String>) -> Answer {
        match self.link {
            Link::Up if self.serves(collection) => {
                Answer { body: self.online(collection, fields), after: Duration::ZERO }
            }
            Link::Up | Link::Down => Answer { body: self.offline(collection, fields), after: Duration::ZERO },
            Link::HalfOpen(after) => Answer { body: self.offline(collection, fields), after },
        }
    }

    /// Opens a watch, and tells it of everything that is stored; says how long that takes.
    pub(super) fn watch(
        &mut self,
        collection: Collection,
        fields: BTreeMap<String, String>,
        tell: UnboundedSender<Tell>,
    ) -> Duration {
        for row in self.rows_of(&collection, &fields) {
            // The receiver is held by whoever called.
            let _ = tell.send(Tell::Event(json!({"type": "ADDED", "object": row})));
        }
        let listener = (collection.group_version.clone(), collection.resource.clone());
        let served = self.serves(&collection);
        self.hooks.push(Hook { collection: collection.clone(), fields, tell });
        match self.link {
            Link::Down => Duration::ZERO,
            Link::HalfOpen(wait) => wait,
            Link::Up => {
                if served {
                    self.listeners.insert(listener);
                    self.send_what_is_not_believed_there(&collection);
                }
                Duration::ZERO
            }
        }
    }

    /// What an API server alone can say: a list with a version.
    pub(super) fn online(&self, collection: &Collection, fields: &BTreeMap<String, String>) -> Value {
        let mut items = self.objects_of(collection);
        items.retain(|object| fields.iter().all(|(field, value)| field_of(object, field) == value));
        for item in &mut items {
            if collection.resource == "endpointslices" {
                lead_to_meta_server(item);
            }
        }
        let kind = guessed_kind(&collection.resource, false);
        json!({
            "apiVersion": collection.group_version, "kind": format!("{kind}List"),
            "metadata": {"resourceVersion": self.revision.to_string()}, "items": items,
        })
    }

    pub(super) fn empty_list(&self, collection: &Collection) -> Value {
        let kind = guessed_kind(&collection.resource, self.old_names);
        json!({"apiVersion": collection.group_version, "items": [], "kind": format!("{kind}List")})
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn watching(&self, resource: &str) -> usize {
        self.hooks.iter().filter(|hook| hook.collection.resource == resource && !hook.tell.is_closed()).count()
    }

    pub(super) fn tell(&mut self, resource: &str, what: &Tell) {
        self.hooks.retain(|hook| hook.collection.resource != resource || hook.tell.send(what.clone()).is_ok());
    }

    pub(super) fn tell_all(&mut self, what: &Tell) {
        self.hooks.retain(|hook| hook.tell.send(what.clone()).is_ok());
        // Nothing is told of after any of these.
        self.hooks.clear();
    }

    fn serves(&self, collection: &Collection) -> bool {
        !self.unserved.contains(&(collection.group_version.clone(), collection.resource.clone()))
    }

    /// The cluster's objects of a collection, in its version.
    fn objects_of(&self, collection: &Collection) -> Vec<Value> {
        let of = self.cluster.iter().filter(|((resource, namespace, _), _)| {
            *resource == collection.resource && collection.namespace.as_ref().is_none_or(|wanted| wanted == namespace)
        });
        let versioned = |object: &Value| {
            let mut object = object.clone();
            object["apiVersion"] = json!(collection.group_version);
            object
        };
        of.map(|(_, object)| versioned(object)).collect()
    }

    fn offline(&self, collection: &Collection, fields: &BTreeMap<String, String>) -> Value {
        let mut list = self.empty_list(collection);
        let items = self.rows_of(collection, fields);
        if !items.is_empty() {
            let highest = self.rows.values().map(version).max().unwrap_or_default();
            let path = key_path(&collection.group_version);
            let namespace = collection.namespace.as_deref().unwrap_or("null");
            let link = format!("/{path}/{}/{namespace}/null", collection.resource);
            list["metadata"] = json!({"resourceVersion": highest.to_string(), "selfLink": link});
            list["items"] = json!(items);
        }
        list
    }

    fn rows_of(&self, collection: &Collection, fields: &BTreeMap<String, String>) -> Vec<Value> {
        let mut prefix = format!("/{}/{}/", key_path(&collection.group_version), collection.resource);
        if let Some(namespace) = &collection.namespace {
            prefix = format!("{prefix}{namespace}/");
        }
        let known = |field: &str| matches!(field, "metadata.name" | "metadata.namespace");
        let fits = |row: &Value| {
            // Any other field is held against an empty text.
            fields
                .iter()
                .all(|(field, value)| if known(field) { field_of(row, field) == value } else { value.is_empty() })
        };
        self.rows
            .range(prefix.clone()..)
            .take_while(|(key, _)| key.starts_with(&prefix))
            .map(|(_, row)| row)
            .filter(|row| fits(row))
            .cloned()
            .collect()
    }

    /// A change in the cluster, told to the node if it listens and the link is up.
    fn send(&mut self, verb: &str, resource: &str, object: &Value) {
        if self.link != Link::Up {
            return;
        }
        let versions: Vec<String> = self
            .listeners
            .iter()
            .filter(|(_, of)| of == resource)
            .map(|(group_version, _)| group_version.clone())
            .collect();
        for group_version in versions {
            let mut object = object.clone();
            object["apiVersion"] = json!(group_version);
            self.arrive(verb, &object);
        }
    }

    fn send_what_is_not_believed_there(&mut self, collection: &Collection) {
        for object in self.objects_of(collection) {
            let key = key_of(&object);
            if self.believed.get(&key).is_none_or(|&believed| version(&object) > believed) {
                self.arrive("ADDED", &object);
            }
        }
    }

    /// A message at the node: stored, then told to watches, by the resource that its kind is taken for.
    fn arrive(&mut self, verb: &str, object: &Value) {
        let key = key_of(object);
        self.believed.insert(key.clone(), version(object));
        if verb == "DELETED" {
            self.rows.remove(&key);
        } else {
            self.rows.insert(key, object.clone());
        }
        let resource = guessed_resource(text(&object["kind"]));
        let event = json!({"type": verb, "object": object});
        self.hooks.retain(|hook| {
            let at = &hook.collection;
            let wanted = at.resource == resource
                && at.group_version == text(&object["apiVersion"])
                && at.namespace.as_ref().is_none_or(|wanted| wanted == text(&object["metadata"]["namespace"]))
                && hook.fields.iter().all(|(field, value)| field_of(object, field) == value);
            !wanted || hook.tell.send(Tell::Event(event.clone())).is_ok()
        });
    }
}

/// As the filter `defaultMaster` does to whole lists.
fn lead_to_meta_server(slice: &mut Value) {
    let Some(ports) = slice["ports"].as_array_mut() else { return };
    for port in ports.iter_mut().filter(|port| port["name"] == "https") {
        port["port"] = json!(10550);
    }
    if ports.iter().any(|port| port["name"] == "https")
        && let Some(endpoints) = slice["endpoints"].as_array_mut().filter(|endpoints| !endpoints.is_empty())
    {
        endpoints.truncate(1);
        endpoints[0]["addresses"] = json!(["127.0.0.1"]);
    }
}

/// Where an object is stored.
fn key_of(object: &Value) -> String {
    let or_null = |value: &Value| value.as_str().filter(|text| !text.is_empty()).unwrap_or("null").to_owned();
    let metadata = &object["metadata"];
    let resource = guessed_resource(text(&object["kind"]));
    let path = key_path(text(&object["apiVersion"]));
    format!("/{path}/{resource}/{}/{}", or_null(&metadata["namespace"]), or_null(&metadata["name"]))
}

fn key_path(group_version: &str) -> String {
    if group_version.contains('/') { group_version.to_owned() } else { format!("core/{group_version}") }
}

fn field_of<'a>(object: &'a Value, field: &str) -> &'a str {
    field.split('.').fold(object, |value, part| &value[part]).as_str().unwrap_or_default()
}

fn version(object: &Value) -> u64 {
    text(&object["metadata"]["resourceVersion"]).parse().unwrap_or_default()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
