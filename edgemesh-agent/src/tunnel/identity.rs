//! Who a node is on the tunnel: names, shared keys, and the identity that follows from both.
//!
//! The identity of a node is an Ed25519 key pair derived from the pre-shared key (PSK) and the node's name. So every member
//! can work out the `PeerId` of every other from its name alone, and nobody without the PSK can be anyone. EdgeMesh (Go)
//! derives it from the name only (`pkg/tunnel/util.go`), which makes private keys public knowledge.

use std::{borrow::Borrow, collections::BTreeSet, fmt, path::Path, str::FromStr, sync::Arc};

use hkdf::Hkdf;
use libp2p::{PeerId, identity::Keypair};
use sha2::Sha256;

/// Separates this use of the PSK from any other, and this derivation from later ones.
const SALT: &[u8] = b"edgemesh/peer-id/v1";

/// Shortest PSK taken, in bytes. `PeerId`s are public, so a guess at the PSK can be tried offline.
const MIN_PSK: usize = 16;

/// Longest PSK file read, in bytes.
const MAX_PSK_FILE: u64 = 64 * 1024;

/// The PSK in the manifests and charts that EdgeMesh (Go) publishes.
const PUBLIC_PSK: &[u8] = b"JugH9HP1XBouyO5pWGeZa8LtipDURrf17EJvUHcJGuQ=";

/// Name of a Kubernetes node: a DNS subdomain, 253 bytes at most. Cheap to clone.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NodeName(Arc<str>);

/// A text that is no node name.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not a node name: expected 1 to 253 of the characters a-z, A-Z, 0-9, '-', '_' and '.'")]
pub struct ParseNodeNameError(String);

impl NodeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = ParseNodeNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if (1..=253).contains(&text.len()) && text.bytes().all(valid) {
            Ok(Self(text.into()))
        } else {
            Err(ParseNodeNameError(text.chars().take(300).collect()))
        }
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for NodeName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// One pre-shared key. Never printed.
#[derive(Clone, Eq, PartialEq)]
struct Psk(Arc<[u8]>);

impl Psk {
    fn keypair(&self, node: &NodeName) -> Option<Keypair> {
        let mut seed = [0u8; 32];
        Hkdf::<Sha256>::new(Some(SALT), &self.0).expand(node.as_str().as_bytes(), &mut seed).ok()?;
        Keypair::ed25519_from_bytes(&mut seed).ok()
    }

    fn peer_id(&self, node: &NodeName) -> Option<PeerId> {
        Some(self.keypair(node)?.public().to_peer_id())
    }
}

/// The pre-shared keys of a node: the one its own identity comes from, and at most one more that members may use.
///
/// Rotation without a gap, each step on all nodes before the next:
///
/// 1. `old`, then a second line `new`: members of either key are accepted, everyone still is who he was.
/// 2. `new`, then `old`: each node takes its new identity when it reads the file; its connections are made anew.
/// 3. `new` alone: the old key opens nothing any more.
#[derive(Clone, Eq, PartialEq)]
pub struct Psks {
    own: Psk,
    also: Option<Psk>,
}

/// Why a PSK file was not taken.
#[derive(Debug, thiserror::Error)]
pub enum PskError {
    /// The file holds nothing but white space.
    #[error("the PSK is empty; create one with 'openssl rand -base64 32'")]
    Empty,
    /// A line is shorter than 16 bytes.
    #[error(
        "the PSK in line {line} is too short to resist guessing: use at least 16 characters, for example from \
             'openssl rand -base64 32'"
    )]
    Short {
        /// Counted from one, lines without a key left out.
        line: usize,
    },
    /// The file has more than two lines.
    #[error(
        "{0} PSKs given; at most two are in use at a time: the node's own, then the other one that members may use"
    )]
    TooMany(usize),
    /// The file could not be read.
    #[error("cannot read the PSK from {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
}

impl Psks {
    /// Takes keys from the text of a PSK file: one a line, the node's own first. White space around a key does not count,
    /// so a trailing newline does not make another key, as it does in EdgeMesh (Go).
    ///
    /// # Errors
    ///
    /// [`PskError`], with no part of any key in it.
    pub fn parse(text: &str) -> Result<Self, PskError> {
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        if let Some(short) = lines.iter().position(|line| line.len() < MIN_PSK) {
            return Err(PskError::Short { line: short + 1 });
        }
        let psk = |line: &str| Psk(line.as_bytes().into());
        match lines.as_slice() {
            [] => Err(PskError::Empty),
            [own] => Ok(Self { own: psk(own), also: None }),
            [own, also] => Ok(Self { own: psk(own), also: (also != own).then(|| psk(also)) }),
            more => Err(PskError::TooMany(more.len())),
        }
    }

    /// Reads a PSK file, such as one mounted from a Secret; see [`Psks::parse`]. Blocks.
    ///
    /// # Errors
    ///
    /// [`PskError`].
    pub fn read(path: &Path) -> Result<Self, PskError> {
        use std::io::Read as _;
        let mut text = String::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_PSK_FILE).read_to_string(&mut text))
            .map_err(|source| PskError::Read { path: path.display().to_string(), source })?;
        Self::parse(&text)
    }

    /// Whether one of them is known to everybody: the one that EdgeMesh (Go) ships, and which is in use wherever nobody has
    /// changed it.
    pub fn has_public(&self) -> bool {
        [Some(&self.own), self.also.as_ref()].into_iter().flatten().any(|psk| &*psk.0 == PUBLIC_PSK)
    }

    /// Whether both give a node the same identity, so that going from one to the other breaks no connection.
    pub fn same_identity(&self, other: &Self) -> bool {
        self.own == other.own
    }

    /// The key pair of `node`; `None` never for a valid name, as far as the libraries' contracts say.
    pub(super) fn keypair(&self, node: &NodeName) -> Option<Keypair> {
        self.own.keypair(node)
    }

    /// Every `PeerId` that `node` may have, the likely one first.
    pub(super) fn peer_ids(&self, node: &NodeName) -> Vec<PeerId> {
        [Some(&self.own), self.also.as_ref()].into_iter().flatten().filter_map(|psk| psk.peer_id(node)).collect()
    }
}

impl fmt::Debug for Psks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Psks({} redacted)", 1 + usize::from(self.also.is_some()))
    }
}

/// The `PeerId` of `node` under the key that `psks` gives identities from, as text (`12D3KooW…`).
pub fn peer_id(psks: &Psks, node: &NodeName) -> Option<String> {
    psks.own.peer_id(node).map(|id| id.to_string())
}

/// Which members a node talks to: all of them, or only those listed by node name or `PeerId`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct AllowList(Option<BTreeSet<String>>);

impl AllowList {
    /// Allows only the given nodes, each by its name or its `PeerId`.
    pub fn only<I, S>(entries: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        Self(Some(entries.into_iter().map(Into::into).collect()))
    }

    fn allows(&self, node: &NodeName, id: &PeerId) -> bool {
        self.0.as_ref().is_none_or(|list| list.contains(node.as_str()) || list.contains(&id.to_base58()))
    }
}

/// What decides whether a peer is a member.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Membership {
    pub(super) psks: Psks,
    pub(super) allow: AllowList,
}

/// Why a peer is no member.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum NotMember {
    /// The identity is not what any accepted key gives the claimed name.
    #[error(
        "its identity is not that of the node it claims to be by the PSK of this node: is the PSK the same on both?"
    )]
    Identity,
    #[error("it is not in this node's allow-list")]
    NotAllowed,
}

impl Membership {
    /// Checks that `id`, which the transport has authenticated, is `node`'s.
    pub(super) fn check(&self, node: &NodeName, id: &PeerId) -> Result<(), NotMember> {
        if !self.psks.peer_ids(node).contains(id) {
            return Err(NotMember::Identity);
        }
        if !self.allow.allows(node, id) {
            return Err(NotMember::NotAllowed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeName {
        name.parse().unwrap()
    }

    #[test]
    fn identities_are_pinned() {
        let psks = Psks::parse("JugH9HP1XBouyO5pWGeZa8LtipDURrf17EJvUHcJGuQ=\n").unwrap();
        // Worked out with Python's hmac and cryptography: any change cuts a mesh in two while it is being upgraded.
        assert_eq!(
            peer_id(&psks, &node("k8s-master")).unwrap(),
            "12D3KooWG1Nx6SV5chGRst37q3G6rMSNZcVgFHNpEjNJ8M9rzthA"
        );
    }

    #[test]
    fn white_space_around_a_key_does_not_count() {
        let key = "0123456789abcdef0123";
        assert_eq!(Psks::parse(key).unwrap(), Psks::parse(&format!("\r\n  {key}\t\r\n\n")).unwrap());
    }

    #[test]
    fn takes_one_or_two_keys_of_sixteen_bytes() {
        assert!(matches!(Psks::parse(" \n"), Err(PskError::Empty)));
        assert!(matches!(Psks::parse("0123456789abcdef\nshort"), Err(PskError::Short { line: 2 })));
        let line = "0123456789abcdef\n";
        assert!(matches!(Psks::parse(&line.repeat(3)), Err(PskError::TooMany(3))));
        assert_eq!(Psks::parse(&line.repeat(2)).unwrap(), Psks::parse(line).unwrap());
    }

    #[test]
    fn keys_are_never_printed() {
        let psks = Psks::parse("0123456789abcdef\nfedcba9876543210").unwrap();
        assert_eq!(format!("{psks:?}"), "Psks(2 redacted)");
    }

    #[test]
    fn a_key_that_everybody_knows_is_told() {
        let public = "JugH9HP1XBouyO5pWGeZa8LtipDURrf17EJvUHcJGuQ=";
        for (text, expected) in [
            (format!("{public}\n"), true),
            (format!("0123456789abcdef\n{public}"), true),
            ("0123456789abcdef".to_owned(), false),
        ] {
            assert_eq!(Psks::parse(&text).unwrap().has_public(), expected);
        }
    }

    #[test]
    fn members_of_either_key_are_accepted_and_nobody_else() {
        let (old, new) = ("old-old-old-old-old", "new-new-new-new-new");
        let both = Membership { psks: Psks::parse(&format!("{old}\n{new}")).unwrap(), allow: AllowList::default() };
        let edge = node("edge1");
        for key in [old, new] {
            let id = Psks::parse(key).unwrap().peer_ids(&edge)[0];
            assert_eq!(both.check(&edge, &id), Ok(()));
            assert_eq!(both.check(&node("edge2"), &id), Err(NotMember::Identity), "another's name");
        }
        let stranger = Psks::parse("someone-else's key").unwrap().peer_ids(&edge)[0];
        assert_eq!(both.check(&edge, &stranger), Err(NotMember::Identity));
    }

    #[test]
    fn the_allow_list_takes_names_and_peer_ids() {
        let psks = Psks::parse("0123456789abcdef").unwrap();
        let (by_name, by_id, neither) = (node("a"), node("b"), node("c"));
        let allow = AllowList::only([by_name.to_string(), peer_id(&psks, &by_id).unwrap()]);
        let membership = Membership { psks: psks.clone(), allow };
        for allowed in [by_name, by_id] {
            assert_eq!(membership.check(&allowed, &psks.peer_ids(&allowed)[0]), Ok(()));
        }
        assert_eq!(membership.check(&neither, &psks.peer_ids(&neither)[0]), Err(NotMember::NotAllowed));
    }

    #[test]
    fn node_names_are_checked() {
        for bad in ["", "a b", "a/b", "é", &"x".repeat(254)] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad}");
        }
        assert_eq!(node("edge-1.site_A").as_str(), "edge-1.site_A");
    }
}
