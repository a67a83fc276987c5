//! The table of keys as text: the default file, the minimal file and the JSON schema.

use serde_json::{Map, Value, json};

use super::{
    keys::{API_VERSION, Draft, KEYS, Key, Kind, Plain, Slot},
    value::{DATAPLANES, FILTERS, MAX_INTERFACE, MAX_PERIOD, MAX_SOCKET_PATH, SERVE_RELAY, SOURCES},
};
use crate::{dns::forward::StubDomain, tunnel::RelayNode};

/// The default configuration with every key this agent acts on, each under a comment of what it does.
pub fn default_yaml() -> String {
    yaml(KEYS, &mut Draft::default(), "", Extent::Full)
}

/// The shortest configuration that makes the agent carry connections to Services; all else is default.
pub fn minimal_yaml() -> String {
    let mut draft = Draft::default();
    draft.proxy.enable = true;
    yaml(KEYS, &mut draft, "", Extent::Essential)
}

/// The JSON Schema (draft 2020-12) of the configuration file, for editors.
///
/// Stricter than the agent in that it minds the case of keys and knows one spelling of each word and truth value.
pub fn schema() -> Value {
    let mut schema = object(KEYS, &mut Draft::default());
    if let Value::Object(members) = &mut schema {
        members.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
        members.insert("title".to_owned(), json!(format!("EdgeMeshAgent ({API_VERSION})")));
    }
    schema
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Extent {
    /// With comments.
    Full,
    Essential,
}

/// Keys without effect are left out: printed, they would look like something the agent does.
fn yaml(keys: &'static [Key], draft: &mut Draft, indent: &str, extent: Extent) -> String {
    let mut text = String::new();
    for key in keys {
        let content = match &key.kind {
            Kind::Section(keys) => {
                let inner = yaml(keys, draft, &format!("{indent}  "), extent);
                (!inner.is_empty()).then(|| format!("\n{inner}"))
            }
            Kind::Header(value) => Some(format!(" {value}\n")),
            Kind::Used(slot) if extent == Extent::Full || key.essential => {
                Some(format!(" {}\n", scalar(&current(slot, draft))))
            }
            Kind::Used(_) | Kind::Accepted(_) => None,
        };
        if let Some(content) = content {
            if extent == Extent::Full {
                text.push_str(&format!("{indent}# {}\n", key.doc));
            }
            text.push_str(&format!("{indent}{}:{content}", key.name));
        }
    }
    text
}

/// A JSON scalar as YAML: a word or a path stands as it is, any other text in quotes, which mean the same in both.
fn scalar(value: &Value) -> String {
    match value {
        Value::String(text)
            if text.starts_with(|c: char| c == '/' || c.is_ascii_alphabetic())
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-".contains(&b)) =>
        {
            text.clone()
        }
        Value::String(_) | Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            value.to_string()
        }
    }
}

/// What a draft holds for a key, in the form the file has.
fn current(slot: &Slot, draft: &mut Draft) -> Value {
    match slot {
        Slot::Bool(at) => json!(*at(draft)),
        Slot::Auto(at) => json!(*at(draft)),
        Slot::Count(at) | Slot::Limit(at) => json!(*at(draft)),
        Slot::Period(at) => json!(at(draft).as_secs()),
        Slot::Interface(at) => json!(*at(draft)),
        Slot::Ip(at) => json!(at(draft).to_string()),
        Slot::OptionalIpv6(at) => json!(at(draft).map(|ip| ip.to_string()).unwrap_or_default()),
        Slot::Port(at) => json!(*at(draft)),
        Slot::Domain(at) => json!(at(draft).to_string()),
        Slot::Servers(at) => json!(at(draft).iter().map(ToString::to_string).collect::<Vec<_>>()),
        Slot::StubDomains(at) => {
            let stub = |stub: &StubDomain| json!({ "domain": stub.domain, "servers": stub.servers });
            at(draft).iter().map(stub).collect()
        }
        Slot::Listen(at) => json!(at(draft).map(|address| address.to_string()).unwrap_or_default()),
        Slot::Path(at) | Slot::UnixSocket(at) => json!(at(draft).to_string_lossy()),
        Slot::OptionalPath(at) => {
            json!(at(draft).as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default())
        }
        Slot::Interfaces(at) => json!(*at(draft)),
        Slot::AliasRangeV4(at) | Slot::AliasRangeV6(at) => json!(at(draft).to_string()),
        Slot::Networks(at) => json!(at(draft).iter().map(ToString::to_string).collect::<Vec<_>>()),
        Slot::Url(at) => json!(at(draft).clone().unwrap_or_default()),
        Slot::Filter(at) => json!(word(&FILTERS, *at(draft))),
        Slot::Dataplane(at) => json!(word(&DATAPLANES, *at(draft))),
        Slot::Source(at) => json!(word(&SOURCES, *at(draft))),
        Slot::SecretBool(at) => json!(*at(draft)),
        Slot::SecretPath(at) => json!(at(draft).to_string_lossy()),
        Slot::RelayNodes(at, _) => {
            let relay = |relay: &RelayNode| {
                let addresses: Vec<String> = relay.addresses.iter().map(ToString::to_string).collect();
                json!({ "nodeName": relay.node.as_str(), "advertiseAddress": addresses })
            };
            at(draft).iter().map(relay).collect()
        }
        Slot::ServeRelay(at) => json!(word(&SERVE_RELAY, *at(draft))),
        Slot::Targets(at) => json!(at(draft).iter().map(ToString::to_string).collect::<Vec<_>>()),
        Slot::Sockets(at) => json!(*at(draft)),
        Slot::Peers(at) => json!(*at(draft)),
    }
}

fn word<T: Copy + PartialEq>(words: &[(&'static str, T)], wanted: T) -> Option<&'static str> {
    words.iter().find(|(_, value)| *value == wanted).map(|(word, _)| *word)
}

/// A mapping of known keys; `null` stands for the default everywhere.
fn object(keys: &'static [Key], draft: &mut Draft) -> Value {
    let mut properties = Map::new();
    for key in keys {
        let (mut schema, default, note) = match &key.kind {
            Kind::Section(keys) => (object(keys, draft), None, ""),
            Kind::Header(wanted) => (json!({ "type": ["string", "null"] }), Some(json!(wanted)), ""),
            Kind::Used(slot) => (used(slot, draft), Some(current(slot, draft)), ""),
            Kind::Accepted(plain) => {
                let (schema, default) = accepted(plain);
                (schema, default, " A key of EdgeMesh that has no effect in this version.")
            }
        };
        if let Value::Object(members) = &mut schema {
            members.insert("description".to_owned(), json!(format!("{}{note}", key.doc)));
            if let Some(default) = default {
                members.insert("default".to_owned(), default);
            }
        }
        properties.insert(key.name.to_owned(), schema);
    }
    json!({ "type": ["object", "null"], "properties": properties, "additionalProperties": false })
}

fn used(slot: &Slot, draft: &mut Draft) -> Value {
    let text = json!(["string", "null"]);
    match slot {
        Slot::Bool(_) => json!({ "type": ["boolean", "null"] }),
        Slot::Auto(_) => json!({ "type": ["boolean", "null"] }),
        Slot::Count(_) => json!({ "type": ["integer", "null"], "minimum": 1, "maximum": u32::MAX }),
        Slot::Limit(_) => json!({ "type": ["integer", "null"], "minimum": 0, "maximum": u32::MAX }),
        Slot::Period(_) => json!({ "type": ["integer", "null"], "minimum": 0, "maximum": MAX_PERIOD }),
        Slot::Interface(_) => {
            json!({ "type": text, "minLength": 1, "maxLength": MAX_INTERFACE, "pattern": "^[^/:%\\s]*$" })
        }
        Slot::Ip(_) => json!({ "type": text, "anyOf": [{ "format": "ipv4" }, { "format": "ipv6" }] }),
        Slot::OptionalIpv6(_) => json!({ "type": text, "pattern": "^([0-9a-fA-F:.]+)?$" }),
        Slot::Port(_) => json!({ "type": ["integer", "null"], "minimum": 1, "maximum": u16::MAX }),
        Slot::Domain(_) => json!({ "type": text, "pattern": "^[A-Za-z0-9_-]+(\\.[A-Za-z0-9_-]+)*\\.?$" }),
        Slot::Servers(_) => json!({ "type": ["array", "null"], "items": { "type": "string" } }),
        Slot::StubDomains(_) => {
            let servers = json!({ "type": "array", "minItems": 1, "items": { "type": "string" } });
            let item = json!({
                "type": "object",
                "properties": { "domain": { "type": "string" }, "servers": servers },
                "required": ["domain", "servers"],
                "additionalProperties": false,
            });
            json!({ "type": ["array", "null"], "items": item })
        }
        Slot::Listen(_) => json!({ "type": text, "pattern": "^(.+:[0-9]+)?$" }),
        Slot::Path(_) => json!({ "type": text, "pattern": "^/" }),
        Slot::UnixSocket(_) => json!({ "type": text, "maxLength": MAX_SOCKET_PATH, "pattern": "^/.*[^/]$" }),
        Slot::OptionalPath(_) => json!({ "type": text, "pattern": "^(/.*)?$" }),
        Slot::Interfaces(_) => {
            let name =
                json!({ "type": "string", "minLength": 1, "maxLength": MAX_INTERFACE, "pattern": "^[^/:%\\s]*$" });
            json!({ "type": ["array", "null"], "items": name })
        }
        Slot::AliasRangeV4(_) => json!({ "type": text, "pattern": "^[0-9.]+/[0-9]+$" }),
        Slot::AliasRangeV6(_) => json!({ "type": text, "pattern": "^[0-9A-Fa-f:.]+/[0-9]+$" }),
        Slot::Networks(_) => {
            json!({ "type": ["array", "null"], "items": { "type": "string", "pattern": "^[0-9A-Fa-f:.]+/[0-9]+$" } })
        }
        Slot::Url(_) => json!({ "type": text, "pattern": "^(https?://[^@?]+)?$" }),
        Slot::Filter(_) => choice(FILTERS.iter().map(|(word, _)| *word)),
        Slot::Dataplane(_) => choice(DATAPLANES.iter().map(|(word, _)| *word)),
        Slot::Source(_) => choice(SOURCES.iter().map(|(word, _)| *word)),
        Slot::SecretBool(_) => json!({ "type": ["boolean", "null"] }),
        Slot::SecretPath(_) => json!({ "type": text, "pattern": "^/" }),
        Slot::RelayNodes(_, keys) => list_of(keys, draft),
        Slot::ServeRelay(_) => choice(SERVE_RELAY.iter().map(|(word, _)| *word)),
        Slot::Targets(_) => {
            json!({ "type": ["array", "null"], "items": { "type": "string", "pattern": "^.+:([0-9]+|\\*)$" } })
        }
        Slot::Sockets(_) => {
            json!({ "type": ["array", "null"], "items": { "type": "string", "pattern": "^.+:[0-9]+$" } })
        }
        Slot::Peers(_) => json!({ "type": ["array", "null"], "items": { "type": "string" } }),
    }
}

fn choice<'a>(words: impl Iterator<Item = &'a str>) -> Value {
    let words: Vec<Value> = words.map(|word| json!(word)).chain([Value::Null]).collect();
    json!({ "enum": words })
}

fn accepted(plain: &Plain) -> (Value, Option<Value>) {
    match plain {
        Plain::Bool(default) => (json!({ "type": ["boolean", "null"] }), Some(json!(default))),
        Plain::Whole(default) => (json!({ "type": ["integer", "null"] }), Some(json!(default))),
        Plain::Number(default) => (json!({ "type": ["number", "null"] }), Some(json!(default))),
        Plain::Text(defaults) => (json!({ "type": ["string", "null"] }), defaults.first().map(|text| json!(text))),
        Plain::Choice(words) => (choice(words.iter().copied()), words.first().map(|word| json!(word))),
        Plain::Texts => (json!({ "type": ["array", "null"], "items": { "type": "string" } }), None),
        Plain::Opaque => (json!({}), None),
    }
}

/// A list of mappings of known keys.
fn list_of(keys: &'static [Key], draft: &mut Draft) -> Value {
    let mut item = object(keys, draft);
    if let Value::Object(members) = &mut item {
        members.insert("type".to_owned(), json!("object"));
    }
    json!({ "type": ["array", "null"], "items": item })
}
