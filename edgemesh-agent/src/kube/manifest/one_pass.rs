//! YAML in which nothing is wrong, read once.
//!
//! Reading YAML is what a start from many manifests costs, and finding out the type of a document takes a pass of its
//! own. So the type is guessed from the lines, and the document itself says whether the guess was right.

use std::{fmt, marker::PhantomData};

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error as _, IgnoredAny, IntoDeserializer, MapAccess, Visitor, value::MapAccessDeserializer},
};

use super::{Head, Shape};
use crate::{
    kube::convert::{Convert, destination_rule::DestinationRule},
    model::{Kind, Object},
};

/// The objects of all documents; None where there is anything to report, a list, or what the guess does not see through.
pub(super) fn objects(text: &str) -> Option<Vec<Object>> {
    let mut guesses = guesses(text)?.into_iter();
    let mut objects = Vec::with_capacity(guesses.len());
    for document in serde_yaml::Deserializer::from_str(text) {
        match guesses.next()? {
            Shape::One(Kind::Service) => objects.push(object::<core::Service>(document, Kind::Service)?),
            Shape::One(Kind::Endpoints) => objects.push(object::<core::Endpoints>(document, Kind::Endpoints)?),
            Shape::One(Kind::EndpointSlice) => {
                objects.push(object::<discovery::EndpointSlice>(document, Kind::EndpointSlice)?);
            }
            Shape::One(Kind::DestinationRule) => {
                objects.push(object::<DestinationRule>(document, Kind::DestinationRule)?);
            }
            Shape::One(Kind::Node) => objects.push(object::<core::Node>(document, Kind::Node)?),
            Shape::Ignored => {
                read::<IgnoredAny>(document, Shape::Ignored)?;
            }
            Shape::List(_) => return None,
        }
    }
    guesses.next().is_none().then_some(objects)
}

fn object<T>(document: serde_yaml::Deserializer<'_>, kind: Kind) -> Option<Object>
where
    T: Convert + for<'de> Deserialize<'de>,
{
    let converted = read::<T>(document, Shape::One(kind))?.convert().ok()?;
    converted.faults.is_empty().then_some(converted.object)
}

fn read<T: for<'de> Deserialize<'de>>(document: serde_yaml::Deserializer<'_>, expected: Shape) -> Option<T> {
    let Typed { head, body } = Typed::<T>::deserialize(document).ok()?;
    (head.shape() == Ok(expected)).then_some(body)
}

/// One for each document, from the lines that begin with `apiVersion:` and `kind:`.
fn guesses(text: &str) -> Option<Vec<Shape>> {
    let mut guesses = Vec::new();
    let (mut head, mut empty, mut first) = (Head::default(), true, true);
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("---") {
            if !rest.trim().is_empty() {
                return None;
            }
            match (empty, first) {
                // What precedes the first separator is a document only if there is something in it.
                (true, true) => {}
                (true, false) => return None,
                (false, _) => guesses.push(std::mem::take(&mut head).shape().ok()?),
            }
            (empty, first) = (true, false);
        } else if line.starts_with(['%', '.']) {
            // A directive, or the end of a document.
            return None;
        } else {
            let value = |key| Some(line.strip_prefix(key)?.trim().trim_matches(['"', '\'']).to_owned());
            head.api_version = value("apiVersion:").or(head.api_version);
            head.kind = value("kind:").or(head.kind);
            empty &= line.is_empty() || line.starts_with('#');
        }
    }
    if !empty {
        guesses.push(head.shape().ok()?);
    }
    // A separator with nothing behind it begins an empty document.
    (!empty || first).then_some(guesses)
}

/// A value read as `T`, and what it says of its type.
struct Typed<T> {
    head: Head,
    body: T,
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Typed<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TypedVisitor(PhantomData))
    }
}

struct TypedVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for TypedVisitor<T> {
    type Value = Typed<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with apiVersion and kind")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Typed<T>, A::Error> {
        let mut head = Head::default();
        let body = T::deserialize(MapAccessDeserializer::new(Listening { map, head: &mut head, heard: None }))?;
        Ok(Typed { head, body })
    }
}

/// Passes a map on, and keeps what it hears of the head.
struct Listening<'a, A> {
    map: A,
    head: &'a mut Head,
    /// The key passed on last, if it belongs to the head.
    heard: Option<HeadKey>,
}

#[derive(Clone, Copy)]
enum HeadKey {
    ApiVersion,
    Kind,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Listening<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        let Some(key) = self.map.next_key::<String>()? else { return Ok(None) };
        self.heard = match key.as_str() {
            "apiVersion" => Some(HeadKey::ApiVersion),
            "kind" => Some(HeadKey::Kind),
            _ => None,
        };
        seed.deserialize(key.into_deserializer()).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        let field = match self.heard.take() {
            None => return self.map.next_value_seed(seed),
            Some(HeadKey::ApiVersion) => &mut self.head.api_version,
            Some(HeadKey::Kind) => &mut self.head.kind,
        };
        let value: String = self.map.next_value()?;
        if field.replace(value.clone()).is_some() {
            return Err(A::Error::custom("apiVersion or kind twice"));
        }
        seed.deserialize(value.into_deserializer())
    }
}
