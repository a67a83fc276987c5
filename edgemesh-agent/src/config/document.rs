//! The configuration file as a tree of nodes that remember their lines.

use granit_parser::{Event, Parser, ScalarStyle, Tag};

/// Bounds the recursion of everything that walks a tree; the deepest key there is has six levels.
const MAX_DEPTH: usize = 32;

/// One YAML node.
#[derive(Debug)]
pub(super) struct Node {
    /// Where it begins, counted from 1.
    pub(super) line: usize,
    pub(super) value: Value,
}

#[derive(Debug)]
pub(super) enum Value {
    Null,
    Scalar(Scalar),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A word, a number or a text.
#[derive(Debug)]
pub(super) struct Scalar {
    pub(super) text: String,
    /// Written in quotes or as a block, so it is text and never a number or a truth value.
    pub(super) quoted: bool,
}

/// One `name: value` of a mapping, in the order of the file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Of the name: the value may stand on a later line.
    pub(super) line: usize,
    pub(super) value: Node,
}

/// Why a text is no YAML that this agent reads.
#[derive(Debug)]
pub(super) struct Malformed {
    pub(super) line: usize,
    /// Counted from 1, in characters.
    pub(super) column: usize,
    /// Never holds text of the file, which may be a secret in the wrong place.
    pub(super) message: String,
}

/// Reads the one document of a file; an empty file is [`Value::Null`].
///
/// Aliases are refused: no configuration needs them, and without them the tree is never larger than the file.
pub(super) fn read(text: &str) -> Result<Node, Malformed> {
    let options = granit_parser::options! { emit_comments: false };
    let mut tree = Tree::default();
    for step in Parser::new_from_str_with_options(text, options) {
        let (event, span) = step.map_err(|error| Malformed {
            line: error.marker().line(),
            column: error.marker().col() + 1,
            message: format!("malformed YAML: {}", error.info()),
        })?;
        // The stream's own first event has no position yet.
        let (line, column) = (span.start.line().max(1), span.start.col() + 1);
        tree.take(event, line).map_err(|message| Malformed { line, column, message: message.to_owned() })?;
    }
    Ok(tree.root.unwrap_or(Node { line: 1, value: Value::Null }))
}

/// The tree while it is built.
#[derive(Debug, Default)]
struct Tree {
    /// The containers not yet closed, outermost first.
    open: Vec<Open>,
    root: Option<Node>,
}

#[derive(Debug)]
struct Open {
    line: usize,
    content: Content,
}

#[derive(Debug)]
enum Content {
    List(Vec<Node>),
    /// With the name that still waits for its value.
    Map(Vec<Entry>, Option<(String, usize)>),
}

impl Tree {
    #[expect(clippy::wildcard_enum_match_arm, reason = "the events left over carry no data of the document")]
    fn take(&mut self, event: Event<'_>, line: usize) -> Result<(), &'static str> {
        match event {
            Event::Scalar(text, style, _, tag) => {
                let quoted = style != ScalarStyle::Plain || tagged_text(tag.as_deref())?;
                let value = if !quoted && is_null(&text) && !self.wants_name() {
                    Value::Null
                } else {
                    Value::Scalar(Scalar { text: text.into_owned(), quoted })
                };
                self.add(Node { line, value })
            }
            Event::SequenceStart(_, _, tag) => {
                tagged_text(tag.as_deref())?;
                self.enter(Open { line, content: Content::List(Vec::new()) })
            }
            Event::MappingStart(_, _, tag) => {
                tagged_text(tag.as_deref())?;
                self.enter(Open { line, content: Content::Map(Vec::new(), None) })
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open { line, content: Content::List(items) }) => {
                    self.add(Node { line, value: Value::List(items) })
                }
                Some(Open { line, content: Content::Map(entries, _) }) => {
                    self.add(Node { line, value: Value::Map(entries) })
                }
                None => Ok(()),
            },
            Event::Alias(_) | Event::UnresolvedAlias(_) => Err("an alias (*name); write the value out in its place"),
            _ => Ok(()),
        }
    }

    fn enter(&mut self, container: Open) -> Result<(), &'static str> {
        if self.wants_name() {
            return Err("a list or a mapping as a key; expected a word");
        }
        if self.open.len() >= MAX_DEPTH {
            return Err("nested more than 32 levels deep");
        }
        self.open.push(container);
        Ok(())
    }

    fn add(&mut self, node: Node) -> Result<(), &'static str> {
        match self.open.last_mut().map(|open| &mut open.content) {
            Some(Content::List(items)) => items.push(node),
            Some(Content::Map(entries, name)) => match (name.take(), node.value) {
                (Some((name, line)), value) => {
                    entries.push(Entry { name, line, value: Node { line: node.line, value } })
                }
                (None, Value::Scalar(scalar)) => *name = Some((scalar.text, node.line)),
                (None, Value::Null | Value::List(_) | Value::Map(_)) => return Err("a key that is no word"),
            },
            None => match (&self.root, &node.value) {
                // `---` at the end of a file begins a document too.
                (Some(_), Value::Null) => {}
                (Some(_), Value::Scalar(_) | Value::List(_) | Value::Map(_)) => {
                    return Err("a second YAML document; expected one document in the file");
                }
                (None, _) => self.root = Some(node),
            },
        }
        Ok(())
    }

    fn wants_name(&self) -> bool {
        matches!(self.open.last(), Some(Open { content: Content::Map(_, None), .. }))
    }
}

/// Whether a tag makes its node a text (`!!str`); the other tags of the core schema only say what is checked anyway.
fn tagged_text(tag: Option<&Tag>) -> Result<bool, &'static str> {
    match tag {
        None => Ok(false),
        Some(tag) if tag.is_yaml_core_schema() => Ok(tag.is_yaml_core_schema_tag("str")),
        Some(_) => Err("a YAML tag (!name); remove it"),
    }
}

fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}
