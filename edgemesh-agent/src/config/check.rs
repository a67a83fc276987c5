//! Holds the tree of a file against the table of keys.

use std::collections::{BTreeMap, HashMap};

use super::{
    Leniency, Note,
    document::{Entry, Node, Value},
    keys::{API_VERSION, Draft, KEYS, KIND, Key, Kind, Slot},
    value::{self, Refusal, quote, type_of},
};

/// What a file says, as far as it could be read.
#[derive(Debug)]
pub(super) struct Findings<'a> {
    file: &'a str,
    leniency: Leniency,
    /// The file is an agent's configuration at all; else its lack of keys means nothing.
    pub(super) readable: bool,
    pub(super) draft: Draft,
    /// The lines of the known keys in the file, by path as the table spells it, also where the value was refused.
    pub(super) lines: BTreeMap<String, usize>,
    pub(super) problems: Remarks,
    pub(super) notes: Remarks,
}

/// Remarks on one file, as many as anyone would read: a file of nothing but mistakes must not flood the log.
#[derive(Debug, Default)]
pub(super) struct Remarks {
    kept: Vec<Note>,
    omitted: usize,
}

impl Remarks {
    const KEPT: usize = 50;

    fn add(&mut self, remark: impl FnOnce() -> Note) {
        if self.kept.len() < Self::KEPT {
            self.kept.push(remark());
        } else {
            self.omitted += 1;
        }
    }

    fn len(&self) -> usize {
        self.kept.len() + self.omitted
    }

    /// Whether there is a remark on one of the keys.
    pub(super) fn concern(&self, keys: &[&str]) -> bool {
        self.kept.iter().any(|remark| keys.contains(&remark.key.as_str()))
    }

    /// All remarks in the order of the file, and one on how many more there would be.
    pub(super) fn in_order(self, file: &str) -> Vec<Note> {
        let mut remarks = self.kept;
        remarks.sort_by_key(|remark| remark.line.unwrap_or(usize::MAX));
        if self.omitted > 0 {
            remarks.push(remark(file, None, "", format!("{} more such lines are left out", self.omitted)));
        }
        remarks
    }
}

fn remark(file: &str, line: Option<usize>, key: &str, message: String) -> Note {
    Note { file: file.to_owned(), line, column: None, key: key.to_owned(), message }
}

/// Checks a whole file. Nothing but the `kind` is reported of a file for something else.
pub(super) fn check<'a>(root: &Node, file: &'a str, leniency: Leniency) -> Findings<'a> {
    let mut findings = Findings {
        file,
        leniency,
        readable: true,
        draft: Draft::default(),
        lines: BTreeMap::new(),
        problems: Remarks::default(),
        notes: Remarks::default(),
    };
    match &root.value {
        Value::Null => {}
        Value::Map(entries) if findings.kind_fits(entries) => findings.section(entries, KEYS, "", Effect::Stands),
        Value::Map(_) => findings.readable = false,
        Value::Scalar(_) | Value::List(_) => {
            findings.readable = false;
            findings.problem(root.line, "", format!("the file is {}; expected a mapping of keys", type_of(root)));
        }
    }
    findings
}

/// Whether keys without effect are to be noted one by one.
#[derive(Clone, Copy)]
enum Effect {
    Stands,
    /// A note on the list above them covers them.
    Covered,
}

impl Findings<'_> {
    /// Adds a problem with a key, on the line where the file sets it, if it does.
    pub(super) fn problem_with(&mut self, key: &str, message: String) {
        self.problems.add(|| remark(self.file, self.lines.get(key).copied(), key, message));
    }

    /// Adds a note on a key, on the line where the file sets it, if it does.
    pub(super) fn note_on(&mut self, key: &str, message: String) {
        self.notes.add(|| remark(self.file, self.lines.get(key).copied(), key, message));
    }

    fn problem(&mut self, line: usize, key: &str, message: String) {
        self.problems.add(|| remark(self.file, Some(line), key, message));
    }

    fn note(&mut self, line: usize, key: &str, message: String) {
        self.notes.add(|| remark(self.file, Some(line), key, message));
    }

    fn refused(&mut self, line: usize, key: &str, refusal: Refusal) {
        self.problem(line, key, format!("{}; expected {}", refusal.problem, refusal.expected));
    }

    fn kind_fits(&mut self, entries: &[Entry]) -> bool {
        let Some(entry) = entries.iter().find(|entry| entry.name.eq_ignore_ascii_case("kind")) else { return true };
        let problem = match &entry.value.value {
            Value::Null => return true,
            Value::Scalar(scalar) if scalar.text == KIND => return true,
            Value::Scalar(scalar) if scalar.text == "EdgeMeshGateway" => {
                format!("the gateway (EdgeMeshGateway) is not in this version; expected {KIND}")
            }
            Value::Scalar(scalar) if scalar.text == "ConfigMap" => {
                format!("given a whole ConfigMap; expected {KIND}, the text under its data key")
            }
            Value::Scalar(scalar) => format!("given {}; expected {KIND}", quote(&scalar.text)),
            Value::List(_) | Value::Map(_) => format!("given {}; expected {KIND}", type_of(&entry.value)),
        };
        self.problem(entry.line, "kind", problem);
        false
    }

    fn section(&mut self, entries: &[Entry], keys: &'static [Key], path: &str, effect: Effect) {
        let mut seen: HashMap<String, usize> = HashMap::new();
        for entry in entries {
            // Go's encoding/json, which EdgeMesh reads with, does not mind the case of keys either.
            let known = keys.iter().find(|key| key.name.eq_ignore_ascii_case(&entry.name));
            let path = join(path, &known.map_or_else(|| shown(&entry.name), |key| key.name.to_owned()));
            match (seen.get(&entry.name.to_ascii_lowercase()), known) {
                (Some(first), _) => {
                    let message =
                        format!("given twice, on lines {first} and {}; expected once, in any case", entry.line);
                    self.problem(entry.line, &path, message);
                    continue;
                }
                (None, Some(key)) => self.key(entry, key, &path, effect),
                (None, None) => self.unknown(entry, keys, &path),
            }
            seen.insert(entry.name.to_ascii_lowercase(), entry.line);
        }
    }

    fn key(&mut self, entry: &Entry, key: &'static Key, path: &str, effect: Effect) {
        self.lines.insert(path.to_owned(), entry.line);
        match &key.kind {
            Kind::Section(keys) => match &entry.value.value {
                // EdgeMesh crashes on it; the defaults are what is meant.
                Value::Null => {}
                Value::Map(entries) => self.section(entries, keys, path, effect),
                Value::Scalar(_) | Value::List(_) => {
                    self.problem(entry.line, path, format!("given {}; expected a mapping", type_of(&entry.value)));
                }
            },
            Kind::Header(wanted) => self.header(entry, path, wanted),
            Kind::Used(slot) => {
                if let (Slot::RelayNodes(_, keys), Value::List(items)) = (slot, &entry.value.value) {
                    let before = self.problems.len();
                    self.items(items, keys, path);
                    if self.problems.len() > before {
                        return;
                    }
                }
                if let Err(refusal) = value::store(&entry.value, slot, &mut self.draft) {
                    self.refused(entry.line, path, refusal);
                }
            }
            Kind::Accepted(plain) => match value::differs(&entry.value, plain) {
                Err(refusal) => self.refused(entry.line, path, refusal),
                Ok(true) if matches!(effect, Effect::Stands) => {
                    self.note(entry.line, path, "a key of EdgeMesh that has no effect in this version".to_owned());
                }
                Ok(_) => {}
            },
        }
    }

    fn items(&mut self, items: &[Node], keys: &'static [Key], path: &str) {
        for (index, item) in items.iter().enumerate() {
            let path = format!("{path}[{index}]");
            match &item.value {
                Value::Map(entries) => self.section(entries, keys, &path, Effect::Covered),
                Value::Null | Value::Scalar(_) | Value::List(_) => {
                    self.problem(item.line, &path, format!("given {}; expected a mapping", type_of(item)));
                }
            }
        }
    }

    /// EdgeMesh looks at neither key, so its users' files may hold anything in `apiVersion`.
    fn header(&mut self, entry: &Entry, path: &str, wanted: &str) {
        match &entry.value.value {
            Value::Null => {}
            Value::Scalar(scalar) if scalar.text == wanted => {}
            Value::Scalar(scalar) => {
                let message = format!("given {}, read as {API_VERSION}", quote(&scalar.text));
                self.note(entry.line, path, message);
            }
            Value::List(_) | Value::Map(_) => {
                self.problem(entry.line, path, format!("given {}; expected {wanted}", type_of(&entry.value)));
            }
        }
    }

    fn unknown(&mut self, entry: &Entry, keys: &'static [Key], path: &str) {
        let (remarks, what) = match self.leniency {
            Leniency::Strict => (&mut self.problems, "unknown key"),
            Leniency::Lenient => (&mut self.notes, "unknown key, ignored"),
        };
        remarks.add(|| {
            let advice = match suggest(&entry.name, keys, path) {
                Some(meant) => format!("did you mean {meant}?"),
                None => format!("known here: {}", keys.iter().map(|key| key.name).collect::<Vec<_>>().join(", ")),
            };
            remark(self.file, Some(entry.line), path, format!("{what}; {advice}"))
        });
    }
}

/// The known key, with its path, that a user most likely meant.
fn suggest(name: &str, siblings: &'static [Key], path: &str) -> Option<String> {
    const LONGEST_NAME: usize = 64;
    let lower = name.to_ascii_lowercase();
    if lower.len() > LONGEST_NAME {
        return None;
    }
    let parent = path.rsplit_once('.').map_or("", |(parent, _)| parent);
    let (distance, nearest) = siblings
        .iter()
        .map(|key| (strsim::damerau_levenshtein(&lower, &key.name.to_ascii_lowercase()), key))
        .min_by_key(|(distance, _)| *distance)?;
    if distance <= (lower.len() / 3).max(1) {
        return Some(join(parent, nearest.name));
    }
    // A right name in the wrong place; one that stands in several places says nothing.
    let mut places = Vec::new();
    places_of(&lower, KEYS, "", &mut places);
    match places.as_slice() {
        [place] => Some(place.clone()),
        _ => None,
    }
}

fn places_of(lower: &str, keys: &'static [Key], path: &str, places: &mut Vec<String>) {
    for key in keys {
        let path = join(path, key.name);
        if let Kind::Section(keys) = &key.kind {
            places_of(lower, keys, &path, places);
        }
        if key.name.eq_ignore_ascii_case(lower) {
            places.push(path);
        }
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// A name as a path shows it: as it is if it is a word, else in quotes.
fn shown(name: &str) -> String {
    let word = (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_/".contains(&b));
    if word { name.to_owned() } else { quote(name) }
}
