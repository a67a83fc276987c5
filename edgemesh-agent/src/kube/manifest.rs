//! The text of a manifest file to objects: YAML with several documents, JSON, and lists.

mod one_pass;

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};
use tracing::debug;

use super::convert::{
    Convert, ConvertError, Fault,
    destination_rule::{self, DestinationRule},
};
use crate::model::{Kind, Object};

/// A broken file has one cause; further messages of it would only bury that.
const MAX_PROBLEMS: usize = 8;

/// The reader gives up at 128 by itself, but only once it has gone through all of the text.
const MAX_DEPTH: usize = 1000;

/// How a file is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Format {
    Yaml,
    Json,
}

/// What a file gives.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Parsed {
    /// In the order of the file.
    pub(super) objects: Vec<Object>,
    /// Documents and objects of which nothing can be used; while there are any, nothing that the file gave before is
    /// known to be gone.
    pub(super) broken: Vec<String>,
    /// Parts that were left out of usable objects, and objects that say nothing about any Service.
    pub(super) partial: Vec<String>,
}

impl Parsed {
    /// All that is wrong, in one line; `None` where nothing is.
    pub(super) fn problem(&self) -> Option<String> {
        let all: Vec<&str> = self.broken.iter().chain(&self.partial).map(String::as_str).collect();
        match all.len() {
            0 => None,
            n if n > MAX_PROBLEMS => {
                Some(format!("{}; and {} more", all.get(..MAX_PROBLEMS)?.join("; "), n - MAX_PROBLEMS))
            }
            _ => Some(all.join("; ")),
        }
    }

    fn object<T: Convert>(&mut self, place: &str, value: &T) {
        match value.convert() {
            Ok(converted) => {
                let at = |fault: &Fault| {
                    format!("{place}: {} {}: {fault}", converted.object.kind(), converted.object.name())
                };
                self.partial.extend(converted.faults.iter().map(at));
                self.objects.push(converted.object);
            }
            Err(ConvertError::Invalid(fault)) => self.broken.push(format!("{place}: {fault}")),
            // Well-formed, so it hides nothing that the file gave before.
            Err(ConvertError::Foreign(fault)) => self.partial.push(format!("{place}: {fault}")),
        }
    }
}

/// Reads all documents of a file; never fails as a whole.
pub(super) fn parse(text: &str, format: Format) -> Parsed {
    let mut parsed = Parsed::default();
    // Editors on Windows begin files with a byte order mark, which neither reader takes for nothing.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    match format {
        Format::Yaml => yaml(text, &mut parsed),
        Format::Json => json(text, &mut parsed),
    }
    parsed
}

/// What says how to read the rest of a document.
#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "an object with apiVersion and kind")]
struct Head {
    #[serde(rename = "apiVersion")]
    api_version: Option<String>,
    kind: Option<String>,
}

/// `List` and its typed forms; the items are read one by one, so that a bad one costs only itself.
#[derive(Deserialize)]
struct List<V> {
    #[serde(default = "Vec::new")]
    items: Vec<V>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Shape {
    One(Kind),
    /// Items of the kind, or of the kind that each names itself.
    List(Option<Kind>),
    Ignored,
}

impl Head {
    fn shape(&self) -> Result<Shape, String> {
        let kind = self.kind.as_deref().filter(|kind| !kind.is_empty()).ok_or("kind: missing")?;
        let version = self.api_version.as_deref().filter(|version| !version.is_empty()).ok_or("apiVersion: missing")?;
        let (group, bare) = match version.split_once('/') {
            Some((group, bare)) if !group.is_empty() => (group, bare),
            _ => ("", version),
        };
        let (shape, served): (_, &[&str]) = match (group, kind) {
            ("", "Service") => (Shape::One(Kind::Service), &["v1"]),
            ("", "Endpoints") => (Shape::One(Kind::Endpoints), &["v1"]),
            ("", "Node") => (Shape::One(Kind::Node), &["v1"]),
            ("discovery.k8s.io", "EndpointSlice") => (Shape::One(Kind::EndpointSlice), &["v1"]),
            (destination_rule::GROUP, "DestinationRule") => {
                (Shape::One(Kind::DestinationRule), &destination_rule::VERSIONS)
            }
            ("", "List") => (Shape::List(None), &["v1"]),
            ("", "ServiceList") => (Shape::List(Some(Kind::Service)), &["v1"]),
            ("", "EndpointsList") => (Shape::List(Some(Kind::Endpoints)), &["v1"]),
            ("", "NodeList") => (Shape::List(Some(Kind::Node)), &["v1"]),
            ("discovery.k8s.io", "EndpointSliceList") => (Shape::List(Some(Kind::EndpointSlice)), &["v1"]),
            (destination_rule::GROUP, "DestinationRuleList") => {
                (Shape::List(Some(Kind::DestinationRule)), &destination_rule::VERSIONS)
            }
            _ => return Ok(Shape::Ignored),
        };
        if served.contains(&bare) {
            return Ok(shape);
        }
        let slash = if group.is_empty() { "" } else { "/" };
        let expected: Vec<String> = served.iter().map(|version| format!("{group}{slash}{version}")).collect();
        let expected = expected.join(" or ");
        Err(format!("apiVersion: {version:?} of kind {kind} is not supported; expected {expected}"))
    }
}

fn yaml(text: &str, parsed: &mut Parsed) {
    if is_too_deep(text) {
        parsed.broken.push(format!("brackets are nested more than {MAX_DEPTH} deep"));
        return;
    }
    match one_pass::objects(text) {
        Some(objects) => parsed.objects = objects,
        None => yaml_documents(text, parsed),
    }
}

/// Reads any YAML, with messages that name the document, line and column.
fn yaml_documents(text: &str, parsed: &mut Parsed) {
    // Three passes in step. The first finds out whether the document is well-formed, the second which type it has; and
    // only reading it straight into that type, not by way of a generic value, keeps line and column in the errors.
    let documents = || serde_yaml::Deserializer::from_str(text);
    for (n, ((whole, head), body)) in documents().zip(documents()).zip(documents()).enumerate() {
        let place = format!("document {}", n + 1);
        if let Err(error) = IgnoredAny::deserialize(whole) {
            parsed.broken.push(format!("{place}: {}", one_line(&error)));
            // The reader does not find the next document, and would give this error for ever.
            return;
        }
        // An empty document (two separators, or comments alone) is none.
        let head = match Option::<Head>::deserialize(head) {
            Ok(Some(head)) => head,
            Ok(None) => continue,
            Err(error) => {
                parsed.broken.push(format!("{place}: {}", one_line(&error)));
                continue;
            }
        };
        let outcome = match head.shape() {
            Ok(Shape::One(Kind::Service)) => core::Service::deserialize(body).map(|v| parsed.object(&place, &v)),
            Ok(Shape::One(Kind::Endpoints)) => core::Endpoints::deserialize(body).map(|v| parsed.object(&place, &v)),
            Ok(Shape::One(Kind::Node)) => core::Node::deserialize(body).map(|v| parsed.object(&place, &v)),
            Ok(Shape::One(Kind::EndpointSlice)) => {
                discovery::EndpointSlice::deserialize(body).map(|v| parsed.object(&place, &v))
            }
            Ok(Shape::One(Kind::DestinationRule)) => {
                DestinationRule::deserialize(body).map(|v| parsed.object(&place, &v))
            }
            Ok(Shape::List(kind)) => List::<serde_yaml::Value>::deserialize(body)
                .map(|list| items(&place, kind, list.items, parsed, &YamlItem)),
            Ok(Shape::Ignored) => {
                ignored(&place, &head);
                Ok(())
            }
            Err(problem) => {
                parsed.broken.push(format!("{place}: {problem}"));
                Ok(())
            }
        };
        if let Err(error) = outcome {
            parsed.broken.push(format!("{place}: {}", one_line(&error)));
        }
    }
}

/// Whether so many brackets are open at once that the reader, which does work for each of them at every token, would take
/// hours. Brackets in texts count, too: no manifest has that many, either way.
fn is_too_deep(text: &str) -> bool {
    let mut depth = 0_usize;
    text.bytes().any(|byte| {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth > MAX_DEPTH
    })
}

fn json(text: &str, parsed: &mut Parsed) {
    // Not by the YAML reader, though JSON is nearly a subset: that one refuses tabs between tokens.
    let mut documents = serde_json::Deserializer::from_str(text).into_iter::<IgnoredAny>();
    let (mut start, mut n) = (0, 0);
    while let Some(document) = documents.next() {
        n += 1;
        let place = format!("document {n}");
        let outcome = document.and_then(|_| {
            let end = documents.byte_offset();
            let body = text.get(start..end).unwrap_or_default();
            json_document(&place, body, parsed)
        });
        if let Err(error) = outcome {
            parsed.broken.push(format!("{place}: {}", positioned(&error, text, start)));
        }
        start = documents.byte_offset();
    }
}

/// The message of an error in the document that begins at `start`; the reader counts lines from there.
fn positioned(error: &serde_json::Error, text: &str, start: usize) -> String {
    let message = one_line(error);
    if error.is_syntax() || error.is_eof() {
        return message;
    }
    let before = text.bytes().take(start).filter(|&byte| byte == b'\n').count();
    let what = message.rsplit_once(" at line ").map_or(message.as_str(), |(what, _)| what);
    format!("{what} at line {} column {}", before + error.line(), error.column())
}

fn json_document(place: &str, text: &str, parsed: &mut Parsed) -> Result<(), serde_json::Error> {
    let Some(head) = serde_json::from_str::<Option<Head>>(text)? else { return Ok(()) };
    match head.shape() {
        Ok(Shape::One(Kind::Service)) => parsed.object(place, &serde_json::from_str::<core::Service>(text)?),
        Ok(Shape::One(Kind::Endpoints)) => parsed.object(place, &serde_json::from_str::<core::Endpoints>(text)?),
        Ok(Shape::One(Kind::Node)) => parsed.object(place, &serde_json::from_str::<core::Node>(text)?),
        Ok(Shape::One(Kind::EndpointSlice)) => {
            parsed.object(place, &serde_json::from_str::<discovery::EndpointSlice>(text)?);
        }
        Ok(Shape::One(Kind::DestinationRule)) => {
            parsed.object(place, &serde_json::from_str::<DestinationRule>(text)?);
        }
        Ok(Shape::List(kind)) => {
            items(place, kind, serde_json::from_str::<List<serde_json::Value>>(text)?.items, parsed, &JsonItem);
        }
        Ok(Shape::Ignored) => ignored(place, &head),
        Err(problem) => parsed.broken.push(format!("{place}: {problem}")),
    }
    Ok(())
}

/// How a list's item is read into a type; one for each format.
trait ReadItem<V> {
    fn read<T: DeserializeOwned>(&self, value: V) -> Result<T, String>;
}

struct YamlItem;

impl ReadItem<serde_yaml::Value> for YamlItem {
    fn read<T: DeserializeOwned>(&self, value: serde_yaml::Value) -> Result<T, String> {
        serde_yaml::from_value(value).map_err(|error| one_line(&error))
    }
}

struct JsonItem;

impl ReadItem<serde_json::Value> for JsonItem {
    fn read<T: DeserializeOwned>(&self, value: serde_json::Value) -> Result<T, String> {
        serde_json::from_value(value).map_err(|error| one_line(&error))
    }
}

fn items<V: Clone>(place: &str, kind: Option<Kind>, items: Vec<V>, parsed: &mut Parsed, reader: &impl ReadItem<V>) {
    for (i, item) in items.into_iter().enumerate() {
        let place = format!("{place}: items[{i}]");
        let shape = match kind {
            Some(kind) => Ok(Shape::One(kind)),
            None => reader.read::<Head>(item.clone()).and_then(|head| head.shape()),
        };
        let outcome = match shape {
            Ok(Shape::One(Kind::Service)) => reader.read::<core::Service>(item).map(|v| parsed.object(&place, &v)),
            Ok(Shape::One(Kind::Endpoints)) => reader.read::<core::Endpoints>(item).map(|v| parsed.object(&place, &v)),
            Ok(Shape::One(Kind::Node)) => reader.read::<core::Node>(item).map(|v| parsed.object(&place, &v)),
            Ok(Shape::One(Kind::EndpointSlice)) => {
                reader.read::<discovery::EndpointSlice>(item).map(|v| parsed.object(&place, &v))
            }
            Ok(Shape::One(Kind::DestinationRule)) => {
                reader.read::<DestinationRule>(item).map(|v| parsed.object(&place, &v))
            }
            Ok(Shape::Ignored) => Ok(()),
            Ok(Shape::List(_)) => Err("a list inside a list is not supported".to_owned()),
            Err(problem) => Err(problem),
        };
        if let Err(problem) = outcome {
            parsed.broken.push(format!("{place}: {problem}"));
        }
    }
}

fn ignored(place: &str, head: &Head) {
    let (version, kind) = (head.api_version.as_deref().unwrap_or(""), head.kind.as_deref().unwrap_or(""));
    debug!(place, version, kind, "ignored: neither Service, EndpointSlice, Endpoints, Node nor DestinationRule");
}

fn one_line(error: &impl ToString) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
