//! What is in the file, and nothing of where it is.
//!
//! ```text
//! edgemesh-metadata-snapshot 2
//! {"of":{"source":"https://10.0.0.1:6443","node":"edge1"},"taken":1767225600,"sections":[{"kind":"Service","as_of":1767225600,"reached":1007,"objects":2}, …]}
//! one object a line, section by section
//! sha256 0f5c…
//! ```
//!
//! Text, so that a person can look into it; a line for each object, so that neither side ever holds more of it than one.
//! The sum covers every byte before its own line. It is no signature: whoever can write the file is root. It is SHA-256
//! because it is linked in anyway (for TLS) and fast enough; a sum of 32 bits would let one in four thousand million
//! damaged files through, and damage on flash comes in whole blocks.
//!
//! A file of a later version is never interpreted. [`VERSION`] counts up with any change of the lines, and a reader keeps
//! reading the versions before it: so far they differ in fields that the earlier ones do not have.
//!
//! 1. The first.
//! 2. `reached` of sections, `external_name` and `cluster_dns` of Services, `hostname` of endpoints.

mod line;

use std::io::{self, BufRead, Read, Write};

use aws_lc_rs::digest::{Context, Digest, SHA256};
use serde::{Deserialize, Serialize};

use self::line::Line;
use crate::model::{Kind, Object, Place, Shared};

/// The version written.
const VERSION: u64 = 2;
const MAGIC: &str = "edgemesh-metadata-snapshot";
const SUM: &str = "sha256";
/// 10,000 Services with 100,000 endpoints are 11 MiB.
pub(super) const MAX_SIZE: u64 = 256 << 20;
/// The API server takes objects of at most 3 MiB, in a form less compact than this one.
const MAX_LINE: u64 = 8 << 20;
/// The first and the last one.
const MAX_SHORT_LINE: u64 = 128;

/// Everything a file holds.
#[derive(Debug, PartialEq)]
pub(super) struct Contents {
    pub(super) identity: Identity,
    /// When it was written; seconds since the Unix epoch.
    pub(super) taken: u64,
    /// By kind, in the order of [`Kind::ALL`]; a kind that is not among them was never delivered.
    pub(super) sections: Vec<Section>,
}

/// Whose metadata it is.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Identity {
    /// The server's URL.
    pub(super) source: String,
    pub(super) node: String,
    /// A digest of the cluster's CA, where the agent runs as a pod: URLs such as https://10.96.0.1 say little.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) cluster: Option<String>,
}

/// All objects of one kind.
#[derive(Debug, PartialEq)]
pub(super) struct Section {
    pub(super) kind: Kind,
    /// When the source last stood behind them; seconds since the Unix epoch.
    pub(super) as_of: u64,
    /// The `resourceVersion` as of which these were all objects of the kind, where the source can tell.
    pub(super) reached: Option<u64>,
    pub(super) objects: Vec<Object>,
}

/// The second line.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Head {
    of: Identity,
    taken: u64,
    sections: Vec<SectionHead>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct SectionHead {
    kind: line::KindWord,
    as_of: u64,
    /// Since version 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reached: Option<u64>,
    objects: u64,
}

/// Why bytes are no snapshot that can be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Flaw {
    #[error("it is no snapshot of an edgemesh-agent")]
    Foreign,
    #[error("it has version {0} of the format, and this agent knows no later one than {VERSION}")]
    Newer(u64),
    #[error("it ends too early")]
    Truncated,
    #[error("it is damaged: {0}")]
    Damaged(String),
    #[error("it is larger than {} MiB", MAX_SIZE >> 20)]
    TooLarge,
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// Writes a file's bytes; the caller flushes. Holds no more than one object's line in memory.
///
/// # Errors
///
/// Those of `out`; and `FileTooLarge` for what [`read`] would not take back.
pub(super) fn write(contents: &Contents, out: impl Write) -> io::Result<()> {
    let mut out = Summing { out, sum: Context::new(&SHA256), left: MAX_SIZE - MAX_SHORT_LINE };
    let mut buffer = format!("{MAGIC} {VERSION}").into_bytes();
    out.line(&mut buffer)?;
    let heads = contents.sections.iter().map(|section| SectionHead {
        kind: section.kind.into(),
        as_of: section.as_of,
        reached: section.reached,
        objects: section.objects.len() as u64,
    });
    let head = Head { of: contents.identity.clone(), taken: contents.taken, sections: heads.collect() };
    serde_json::to_writer(&mut buffer, &head)?;
    out.line(&mut buffer)?;
    for object in contents.sections.iter().flat_map(|section| &section.objects) {
        Line::from(object).write(&mut buffer)?;
        out.line(&mut buffer)?;
    }
    let Summing { mut out, sum, .. } = out;
    writeln!(out, "{SUM} {}", hex(&sum.finish()))
}

/// Reads a file's bytes. Nothing of them is given out before the sum was found right.
///
/// # Errors
///
/// A [`Flaw`], for any bytes that [`write`] did not make.
pub(super) fn read(input: impl BufRead) -> Result<Contents, Flaw> {
    let mut input = Lines { input, sum: Context::new(&SHA256), left: MAX_SIZE, line: Vec::new(), number: 0 };
    check_version(input.take_line(MAX_SHORT_LINE)?)?;
    let head = serde_json::from_slice::<Head>(input.take_line(MAX_LINE)?).map_err(|_| input.unreadable())?;
    let mut sections = Vec::new();
    let mut places = Shared::<Place>::default();
    for section in head.sections {
        let kind = Kind::from(section.kind);
        if sections.iter().any(|known: &Section| known.kind == kind) {
            return Err(Flaw::Damaged(format!("two sections of kind {kind}")));
        }
        // The count is not to be trusted with memory before the lines are there.
        let mut objects = Vec::new();
        for _ in 0..section.objects {
            let line = Line::read(kind, input.take_line(MAX_LINE)?).map(Object::from);
            let mut object = line.map_err(|_| input.unreadable())?;
            places.share(&mut object);
            objects.push(object);
        }
        objects.shrink_to_fit();
        sections.push(Section { kind, as_of: section.as_of, reached: section.reached, objects });
    }
    input.check_sum()?;
    if !sections.iter().any(|section| section.kind == Kind::Service) {
        // Not written by [`write`] as it is used, and a table without any would take everything out of the kernel.
        return Err(Flaw::Damaged("it has no section of Services".to_owned()));
    }
    Ok(Contents { identity: head.of, taken: head.taken, sections })
}

fn check_version(line: &[u8]) -> Result<(), Flaw> {
    let line = str::from_utf8(line).map_err(|_| Flaw::Foreign)?;
    let version = line.strip_prefix(MAGIC).and_then(|rest| rest.strip_prefix(' ')).ok_or(Flaw::Foreign)?;
    match version.parse() {
        Ok(newer) if newer > VERSION => Err(Flaw::Newer(newer)),
        Ok(known @ 1..) if version == known.to_string() => Ok(()),
        _ => Err(Flaw::Damaged("its version is none".to_owned())),
    }
}

fn hex(digest: &Digest) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The digest of some bytes, as text.
pub(super) fn digest(bytes: &[u8]) -> String {
    hex(&aws_lc_rs::digest::digest(&SHA256, bytes))
}

/// Sums up what passes through.
struct Summing<W> {
    out: W,
    sum: Context,
    /// How many more bytes may follow.
    left: u64,
}

impl<W: Write> Summing<W> {
    /// Ends the line, writes it and empties it.
    fn line(&mut self, line: &mut Vec<u8>) -> io::Result<()> {
        line.push(b'\n');
        let length = line.len() as u64;
        if length > MAX_LINE || length > self.left {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "there is more metadata than a snapshot holds"));
        }
        self.left -= length;
        self.sum.update(line);
        self.out.write_all(line)?;
        line.clear();
        Ok(())
    }
}

/// Reads line by line and sums up.
struct Lines<R> {
    input: R,
    sum: Context,
    left: u64,
    line: Vec<u8>,
    number: usize,
}

impl<R: BufRead> Lines<R> {
    /// The next line, without its end, and part of the sum.
    fn take_line(&mut self, longest: u64) -> Result<&[u8], Flaw> {
        self.fetch(longest)?;
        self.sum.update(&self.line);
        Ok(self.line.strip_suffix(b"\n").unwrap_or_default())
    }

    fn fetch(&mut self, longest: u64) -> Result<(), Flaw> {
        self.line.clear();
        let limit = longest.min(self.left);
        let length = (&mut self.input).take(limit).read_until(b'\n', &mut self.line)? as u64;
        if self.line.last() != Some(&b'\n') {
            return Err(match length == limit {
                true if limit == self.left => Flaw::TooLarge,
                true => Flaw::Damaged(format!("line {} is too long", self.number + 1)),
                false => Flaw::Truncated,
            });
        }
        self.left -= length;
        self.number += 1;
        Ok(())
    }

    fn unreadable(&self) -> Flaw {
        Flaw::Damaged(format!("line {} cannot be read", self.number))
    }

    /// The last line is the sum of all before it, and nothing follows.
    fn check_sum(mut self) -> Result<(), Flaw> {
        self.fetch(MAX_SHORT_LINE)?;
        let expected = format!("{SUM} {}\n", hex(&self.sum.clone().finish()));
        if self.line != expected.as_bytes() {
            return Err(Flaw::Damaged("its checksum does not fit".to_owned()));
        }
        match self.input.fill_buf()? {
            [] => Ok(()),
            _ => Err(Flaw::Damaged("something follows its end".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests;
