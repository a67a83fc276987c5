//! Aliases across restarts: a file beside the metadata snapshot.
//!
//! ```text
//! edgemesh-aliases 1
//! 198.18.23.4 10.244.1.7 edge1
//! fd6d:e54a:1a5e:a11a:1:2:3:4 fd00:10:244:1::7 edge1
//! sha256 0f5c…
//! ```
//!
//! A line for each alias: the alias, the pod's address, its node. The sum covers every byte before its own line; there is
//! no time in it, see [`super::Book::restore`].

use std::{
    fmt::Write as _,
    fs::File,
    io::{self, Read as _, Write as _},
    net::IpAddr,
    path::{Path, PathBuf},
};

use aws_lc_rs::digest::{SHA256, digest};

use super::Target;
use crate::snapshot::{SnapshotFile, Unusable};

const HEADER: &str = "edgemesh-aliases 1";
const MAGIC: &str = "edgemesh-aliases ";
const SUM: &str = "sha256 ";
/// Some 200,000 aliases.
const MAX_SIZE: u64 = 16 << 20;

/// The file.
#[derive(Clone, Debug)]
pub struct AliasFile {
    file: SnapshotFile,
}

/// Why there is nothing to restore, though something is there.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    #[error("{0}")]
    Unusable(String),
    #[error("it is no file of aliases")]
    Foreign,
    #[error("it has version {0} of the format, which this agent does not know")]
    Version(String),
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
}

impl From<Unusable> for Unreadable {
    fn from(unusable: Unusable) -> Self {
        Self::Unusable(unusable.to_string())
    }
}

impl AliasFile {
    /// The file at that path, which need not exist.
    pub fn new(path: PathBuf) -> Self {
        Self { file: SnapshotFile::new(path) }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// What is in it; empty where there is no file.
    ///
    /// # Errors
    ///
    /// See [`Unreadable`]: nothing of it can be used.
    pub fn read(&self) -> Result<Vec<(IpAddr, Target)>, Unreadable> {
        let Some(file) = self.file.open()? else { return Ok(Vec::new()) };
        parse(&contents(file)?)
    }

    /// Renames what is there, so that it can be looked at and is not in the way.
    ///
    /// # Errors
    ///
    /// It cannot be renamed.
    pub fn set_aside(&self) -> io::Result<PathBuf> {
        self.file.set_aside()
    }

    /// Replaces the file in one step, readable for its owner alone.
    ///
    /// # Errors
    ///
    /// The old one is still there.
    pub fn write(&self, entries: &[(IpAddr, Target)]) -> io::Result<()> {
        let mut text = format!("{HEADER}\n");
        for (alias, target) in entries.iter().filter(|(_, target)| is_word(&target.node)) {
            let _ = writeln!(text, "{alias} {} {}", target.addr, target.node);
        }
        let sum = sum(text.as_bytes());
        let _ = writeln!(text, "{SUM}{sum}");
        self.file.replace(|out| out.write_all(text.as_bytes())).map(drop)
    }

    /// Removes it and all that ever was beside it. Gives what was removed.
    ///
    /// # Errors
    ///
    /// Something cannot be removed.
    pub fn remove(&self) -> io::Result<Vec<PathBuf>> {
        self.file.remove()
    }
}

fn contents(file: File) -> Result<String, Unreadable> {
    let mut text = String::new();
    let length = file.take(MAX_SIZE + 1).read_to_string(&mut text).map_err(|error| {
        // Not UTF-8.
        let foreign = error.kind() == io::ErrorKind::InvalidData;
        if foreign { Unreadable::Foreign } else { Unreadable::Io(error) }
    })?;
    if length as u64 > MAX_SIZE { Err(Unreadable::Damaged("it is too large")) } else { Ok(text) }
}

fn parse(text: &str) -> Result<Vec<(IpAddr, Target)>, Unreadable> {
    let first = text.lines().next().unwrap_or_default();
    if first != HEADER {
        let version = first.strip_prefix(MAGIC).ok_or(Unreadable::Foreign)?;
        return Err(Unreadable::Version(version.chars().take(20).filter(|c| !c.is_control()).collect()));
    }
    let (body, last) = text.rsplit_once(SUM).ok_or(Unreadable::Damaged("it ends too early"))?;
    if last.strip_suffix('\n') != Some(sum(body.as_bytes()).as_str()) {
        return Err(Unreadable::Damaged("its checksum does not fit"));
    }
    let line = |line: &str| {
        let mut words = line.split(' ');
        let (alias, addr, node) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?);
        (words.next().is_none() && is_word(node)).then(|| (alias, Target { node: node.into(), addr }))
    };
    let lines = body.lines().skip(1).map(|text| line(text).ok_or(Unreadable::Damaged("a line cannot be read")));
    lines.collect()
}

/// Whether a node's name can stand in a line; Kubernetes knows no others (RFC 1123).
fn is_word(name: &str) -> bool {
    !name.is_empty() && !name.contains(|c: char| c.is_whitespace() || c.is_control())
}

fn sum(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    fn entries() -> Vec<(IpAddr, Target)> {
        [("198.18.23.4", "10.244.1.7", "edge1"), ("fd00:a11a::1", "fd00:10:244:1::7", "edge1")]
            .map(|(alias, addr, node)| {
                (alias.parse().unwrap(), Target { node: node.into(), addr: addr.parse().unwrap() })
            })
            .to_vec()
    }

    fn file() -> (tempfile::TempDir, AliasFile) {
        let directory = tempfile::tempdir().unwrap();
        let file = AliasFile::new(directory.path().join("state/aliases"));
        (directory, file)
    }

    #[test]
    fn what_was_written_is_read_again_and_is_private() {
        let (_directory, file) = file();
        assert_eq!(file.read().unwrap(), []);
        let mut written = entries();
        written.push(("198.18.0.9".parse().unwrap(), Target { node: "no name".into(), addr: written[0].1.addr }));
        file.write(&written).unwrap();
        assert_eq!(file.read().unwrap(), entries(), "without what no node is called");
        let mode = std::fs::metadata(file.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn what_was_not_written_like_this_is_refused_and_said_why() {
        let (_directory, file) = file();
        file.write(&entries()).unwrap();
        let good = std::fs::read_to_string(file.path()).unwrap();
        for (bad, why) in [
            (String::new(), "no file of aliases"),
            ("{}\n".to_owned(), "no file of aliases"),
            (good.replace("aliases 1", "aliases 2"), "version 2"),
            (good.replace("edge1", "edge2"), "checksum"),
            (good[..good.len() - 1].to_owned(), "checksum"),
            (good.clone() + "\n", "checksum"),
            (good[..60].to_owned(), "too early"),
        ] {
            std::fs::write(file.path(), bad).unwrap();
            let error = file.read().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let aside = file.set_aside().unwrap();
        assert!(aside.exists() && file.read().unwrap().is_empty());
        assert_eq!(file.remove().unwrap(), [aside]);
    }

    #[test]
    fn writers_in_one_directory_wait_for_each_other() {
        let (directory, _) = file();
        let writers: Vec<_> = (0..4)
            .map(|n| {
                let file = AliasFile::new(directory.path().join(format!("state/aliases-{n}")));
                std::thread::spawn(move || (0..10).for_each(|_| file.write(&entries()).unwrap()))
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
    }

    proptest! {
        #[test]
        fn no_bytes_are_a_reason_to_panic(text in "(edgemesh-aliases 1\n)?[0-9a-f:. \n]{0,80}(sha256 [0-9a-f]{0,64}\n)?") {
            let _ = parse(&text);
        }
    }
}
