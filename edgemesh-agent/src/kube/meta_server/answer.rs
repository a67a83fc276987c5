//! What metaServer says, as bytes, to what it means: lists and the lines of a watch. Pure.
//!
//! The kind of a list is never looked at: offline, metaServer makes it up from the resource's name (`DestinationruleList`,
//! before KubeEdge 1.16.4 `NamespacList`), and those of its items are known from the request.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, SeqAccess, Visitor},
};
use serde_json::Value;

use super::ledger::{Content, Extent, Item, List, Origin};
use crate::{
    kube::{
        convert::Convert,
        invalid::{Problem, convert},
    },
    model::{Kind, NamespacedName},
};

/// The longest part of a foreign text in a message.
const MAX_QUOTE: usize = 200;

/// A list, and what is wrong with its items.
#[derive(Debug, PartialEq)]
pub(super) struct ListAnswer {
    pub(super) list: List,
    pub(super) problems: Vec<Problem>,
}

impl ListAnswer {
    /// A list that nobody has made, of nothing.
    pub(super) fn nothing() -> Self {
        Self { list: List { items: Vec::new(), origin: Origin::Stored, extent: Extent::Part }, problems: Vec::new() }
    }
}

/// One line of a watch.
#[derive(Debug, PartialEq)]
pub(super) enum Frame {
    /// ADDED and MODIFIED, which metaServer does not keep apart.
    Upsert(Entry),
    Deleted(Entry),
    /// ERROR, with code and message; code 500 is how metaServer ends a watch whose time is up.
    Error {
        code: u64,
        message: String,
    },
    /// Of a type that says nothing about an object, such as BOOKMARK.
    Other,
}

/// An object in a watch.
#[derive(Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) item: Item,
    pub(super) subject: String,
    /// What is wrong with it.
    pub(super) problem: Option<String>,
}

/// Objects that the model has a counterpart for, as kube-rs and this agent know them.
pub(super) trait Known: Convert + kube::ResourceExt + DeserializeOwned {}

impl<K: Convert + kube::ResourceExt + DeserializeOwned> Known for K {}

/// Reads the body of an answer to a list.
///
/// # Errors
///
/// It is no list at all, with what it is.
pub(super) fn read_list<K: Known>(body: &[u8], kind: Kind) -> Result<ListAnswer, String> {
    let raw: RawList<K> = serde_json::from_slice(body).map_err(|error| format!("{error}, in {}", quote(body)))?;
    let Some(Items { entries, nameless, .. }) = raw.items else {
        return Err(format!("no list of objects, but {}", quote(body)));
    };
    let metadata = raw.metadata.unwrap_or_default();
    let version = number(&metadata.resource_version).filter(|&version| version > 0);
    let link = metadata.self_link.as_str().unwrap_or_default();
    // What metaServer has stored is linked as `/core/v1/services/null/null`. API servers before 1.20 gave links, too.
    let stored = !link.is_empty() && !link.starts_with("/api/") && !link.starts_with("/apis/");
    let origin = match version {
        Some(version) if !stored => Origin::Online(version),
        Some(_) | None => Origin::Stored,
    };
    let whole = nameless == 0 && metadata.r#continue.as_str().is_none_or(str::is_empty);
    let extent = if whole { Extent::Whole } else { Extent::Part };
    let (mut items, mut problems) = (Vec::with_capacity(entries.len()), Vec::new());
    for raw in entries {
        let Entry { item, subject, problem } = raw.into_entry(kind);
        items.push(item);
        problems.extend(problem.map(|text| Problem { subject, text }));
    }
    Ok(ListAnswer { list: List { items, origin, extent }, problems })
}

/// Reads one line of a watch.
///
/// # Errors
///
/// It is no event, or one of an object without a name.
pub(super) fn read_frame<K: Known>(line: &[u8], kind: Kind) -> Result<Frame, String> {
    let event: RawEvent = serde_json::from_slice(line).map_err(|error| format!("{error}, in {}", quote(line)))?;
    let entry = |object: Value| {
        let raw = RawItem::<K>::of(object).ok_or_else(|| format!("an object without a name, in {}", quote(line)))?;
        Ok::<_, String>(raw.into_entry(kind))
    };
    Ok(match event.r#type.as_str() {
        "ADDED" | "MODIFIED" => Frame::Upsert(entry(event.object)?),
        "DELETED" => Frame::Deleted(entry(event.object)?),
        "ERROR" => Frame::Error {
            code: event.object["code"].as_u64().unwrap_or_default(),
            message: one_line(event.object["message"].as_str().unwrap_or("no message").as_bytes()),
        },
        _ => Frame::Other,
    })
}

/// What a body without success says for itself: the message of a `Status`, else its beginning.
pub(super) fn message(body: &[u8]) -> String {
    match serde_json::from_slice::<Value>(body) {
        Ok(Value::Object(status)) => match status.get("message").and_then(Value::as_str) {
            Some(message) => one_line(message.as_bytes()),
            None => quote(body),
        },
        Ok(_) | Err(_) => one_line(body),
    }
}

#[derive(Deserialize)]
#[serde(bound = "")]
struct RawList<K: Known> {
    #[serde(default)]
    metadata: Option<RawMetadata>,
    #[serde(default, deserialize_with = "items")]
    items: Option<Items<K>>,
}

#[derive(Default, Deserialize)]
struct RawMetadata {
    #[serde(default, rename = "resourceVersion")]
    resource_version: Value,
    #[serde(default, rename = "selfLink")]
    self_link: Value,
    #[serde(default)]
    r#continue: Value,
}

#[derive(Deserialize)]
struct RawEvent {
    r#type: String,
    #[serde(default)]
    object: Value,
}

/// One object, reduced at once to what can be made of it, as a list may have very many.
struct RawItem<K> {
    namespace: String,
    name: String,
    uid: Box<str>,
    version: u64,
    object: Result<K, String>,
}

/// The items of a list that have a name, and how many have none.
struct Items<K> {
    entries: Vec<RawItem<K>>,
    nameless: usize,
}

impl<K: Known> RawItem<K> {
    fn of(mut object: Value) -> Option<Self> {
        let metadata = &object["metadata"];
        let text = |field: &str| metadata[field].as_str().unwrap_or_default();
        let (namespace, name) = (text("namespace").to_owned(), text("name").to_owned());
        let (uid, version) = (Box::from(text("uid")), number(&metadata["resourceVersion"]).unwrap_or_default());
        if name.is_empty() {
            return None;
        }
        if let Value::Object(members) = &mut object {
            // The types mind them, and they are known.
            members.remove("apiVersion");
            members.remove("kind");
        }
        let object = K::deserialize(object).map_err(|error| error.to_string());
        Some(Self { namespace, name, uid, version, object })
    }

    fn into_entry(self, kind: Kind) -> Entry {
        let Self { namespace, name, uid, version, object } = self;
        let read = object.and_then(|object| match object.model_name() {
            Ok(name) => Ok((name, convert(&object, kind))),
            Err(error) => Err(error.to_string()),
        });
        let (name, content, problem) = match read {
            Ok((name, (object, problem))) => {
                (name, object.map_or(Content::Unusable, Content::Usable), problem.map(|problem| problem.text))
            }
            Err(text) => {
                let namespace = match (kind, namespace.as_str()) {
                    (Kind::Node, _) => "",
                    (_, "") => "default",
                    (_, namespace) => namespace,
                };
                (NamespacedName::new(namespace, name), Content::Unreadable, Some(one_line(text.as_bytes())))
            }
        };
        let subject = format!("{kind} {name}");
        Entry { item: Item { name, uid, version, content }, subject, problem }
    }
}

/// `null` is how Go writes a list without items.
fn items<'de, D: Deserializer<'de>, K: Known>(deserializer: D) -> Result<Option<Items<K>>, D::Error> {
    struct ItemsVisitor<K>(PhantomData<K>);

    impl<'de, K: Known> Visitor<'de> for ItemsVisitor<K> {
        type Value = Items<K>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of objects")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(Items { entries: Vec::new(), nameless: 0 })
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let (mut entries, mut nameless) = (Vec::new(), 0);
            while let Some(object) = seq.next_element::<Value>()? {
                match RawItem::of(object) {
                    Some(item) => entries.push(item),
                    None => nameless += 1,
                }
            }
            Ok(Items { entries, nameless })
        }
    }

    deserializer.deserialize_any(ItemsVisitor(PhantomData)).map(Some)
}

/// A resourceVersion: a number in a text. The API calls it opaque; behind metaServer it is all there is to tell old from new.
fn number(value: &Value) -> Option<u64> {
    value.as_str().map_or_else(|| value.as_u64(), |text| text.parse().ok())
}

fn quote(body: &[u8]) -> String {
    format!("{:?}", one_line(body))
}

/// The beginning of a text, on one line.
fn one_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text.get(..4 * MAX_QUOTE).unwrap_or(text)).into_owned();
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let printable = words.chars().filter(|c| !c.is_control());
    let mut shown: String = printable.clone().take(MAX_QUOTE).collect();
    if printable.count() > MAX_QUOTE {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests;
