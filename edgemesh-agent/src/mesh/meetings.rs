//! Where other nodes have been met, by which it is decided whether what listens on a node's own network is reached directly.
//!
//! A meeting outlives its connection: that the other node's agent is being replaced, or that neither has anything to say to
//! the other, is no reason to lead what goes there another way. For the same reason it outlives this agent, in a file beside
//! that of the aliases: a line for each, the node and its address. What cannot be read of it is met anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::{self, Read as _, Write as _},
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{alias::Meetings, snapshot::SnapshotFile};

/// How long a node is believed to be where it was met last, if nothing is heard of it.
const BELIEVED: Duration = Duration::from_secs(24 * 3600);
/// How long, if it is connected, and not there.
const ELSEWHERE: Duration = Duration::from_secs(10);
/// Some 10,000 nodes with two addresses each.
const MAX_SIZE: u64 = 1 << 20;

/// The meetings, and when each was true last.
#[derive(Debug, Default)]
pub(super) struct Met(BTreeMap<(Box<str>, IpAddr), Instant>);

impl Met {
    /// Those that were remembered, as if they had been true at `now`.
    pub(super) fn new(remembered: &Meetings, now: Instant) -> Self {
        Self(remembered.iter().map(|meeting| (meeting.clone(), now)).collect())
    }

    /// Takes what is true at `now`: who is connected, and at which addresses directly.
    pub(super) fn follow(&mut self, connected: &BTreeMap<Box<str>, Vec<IpAddr>>, now: Instant) {
        for (node, addresses) in connected {
            self.0.extend(addresses.iter().map(|address| ((node.clone(), *address), now)));
        }
        let taken: BTreeSet<IpAddr> = connected.values().flatten().copied().collect();
        self.0.retain(|(node, address), seen| {
            let believed = if connected.contains_key(node) { ELSEWHERE } else { BELIEVED };
            // Several may be there at once, as those of a site behind one NAT are.
            *seen == now || (!taken.contains(address) && now.saturating_duration_since(*seen) < believed)
        });
    }

    /// All that are believed.
    pub(super) fn all(&self) -> Meetings {
        self.0.keys().cloned().collect()
    }
}

/// The file of meetings, beside that of the aliases.
#[derive(Clone, Debug)]
pub struct MeetingsFile(SnapshotFile);

impl MeetingsFile {
    /// The one that belongs to a file of aliases; it need not exist.
    pub fn beside(aliases: &Path) -> Self {
        Self(SnapshotFile::new(aliases.with_file_name("meetings")))
    }

    /// What is in it, as far as it can be read.
    pub fn read(&self) -> Meetings {
        let mut text = String::new();
        if let Ok(Some(file)) = self.0.open() {
            let _unreadable = file.take(MAX_SIZE).read_to_string(&mut text);
        }
        let meeting = |line: &str| {
            let (node, address) = line.split_once(' ')?;
            Some((node.into(), address.parse().ok()?))
        };
        text.lines().filter_map(meeting).collect()
    }

    /// Replaces it in one step.
    ///
    /// # Errors
    ///
    /// The old one is still there.
    pub fn write(&self, meetings: &Meetings) -> io::Result<()> {
        let mut text = String::new();
        for (node, address) in meetings.iter().filter(|(node, _)| !node.contains(char::is_whitespace)) {
            let _ = writeln!(text, "{node} {address}");
        }
        self.0.replace(|out| out.write_all(text.as_bytes())).map(drop)
    }

    /// Removes it and all that ever was beside it. Gives what was removed.
    ///
    /// # Errors
    ///
    /// Something cannot be removed.
    pub fn remove(&self) -> io::Result<Vec<PathBuf>> {
        self.0.remove()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn connected(nodes: &[(&str, &[&str])]) -> BTreeMap<Box<str>, Vec<IpAddr>> {
        nodes.iter().map(|(node, ips)| ((*node).into(), ips.iter().map(|text| ip(text)).collect())).collect()
    }

    fn meetings(pairs: &[(&str, &str)]) -> Meetings {
        pairs.iter().map(|(node, address)| ((*node).into(), ip(address))).collect()
    }

    #[test]
    fn a_node_whose_agent_is_away_is_still_where_it_was() {
        let (mut met, now) = (Met::default(), Instant::now());
        let both = connected(&[("edge2", &["192.168.1.2"]), ("edge3", &["192.168.1.3"])]);
        met.follow(&both, now);
        let expected = meetings(&[("edge2", "192.168.1.2"), ("edge3", "192.168.1.3")]);
        assert_eq!(met.all(), expected);
        met.follow(&connected(&[]), now + BELIEVED - SECOND);
        assert_eq!(met.all(), expected);
        met.follow(&connected(&[]), now + BELIEVED);
        assert_eq!(met.all(), meetings(&[]));
    }

    #[test]
    fn a_node_that_has_moved_is_not_there_any_more() {
        let (mut met, now) = (Met::default(), Instant::now());
        met.follow(&connected(&[("edge2", &["192.168.1.2"])]), now);
        // It is reached through a relay from now on, ...
        met.follow(&connected(&[("edge2", &[])]), now + SECOND);
        assert_eq!(met.all(), meetings(&[("edge2", "192.168.1.2")]), "a direct path may be made anew at once");
        met.follow(&connected(&[("edge2", &[])]), now + ELSEWHERE);
        assert_eq!(met.all(), meetings(&[]));
        // ... or another has its address.
        met.follow(&connected(&[("edge2", &["192.168.1.2"])]), now);
        met.follow(&connected(&[("edge4", &["192.168.1.2"])]), now + SECOND);
        assert_eq!(met.all(), meetings(&[("edge4", "192.168.1.2")]));
    }

    #[test]
    fn several_nodes_may_be_at_one_address() {
        let (mut met, now) = (Met::default(), Instant::now());
        let site = connected(&[("edge2", &["203.0.113.2"]), ("edge3", &["203.0.113.2"])]);
        for seconds in 0..3 {
            met.follow(&site, now + SECOND * seconds);
            assert_eq!(met.all(), meetings(&[("edge2", "203.0.113.2"), ("edge3", "203.0.113.2")]));
        }
    }

    #[test]
    fn they_are_remembered_and_damage_costs_the_lines_that_it_is_in() {
        let directory = tempfile::tempdir().unwrap();
        let file = MeetingsFile::beside(&directory.path().join("aliases"));
        assert!(file.read().is_empty());
        let known = meetings(&[("edge2", "192.168.1.2"), ("edge2", "fd00::2"), ("edge3", "192.168.1.3")]);
        file.write(&known).unwrap();
        assert_eq!(file.read(), known);
        assert_eq!(Met::new(&known, Instant::now()).all(), known);
        let path = directory.path().join("meetings");
        let text = std::fs::read_to_string(&path).unwrap().replace("fd00::2", "fd00::g");
        std::fs::write(&path, text + "\n\0 garbage").unwrap();
        assert_eq!(file.read(), meetings(&[("edge2", "192.168.1.2"), ("edge3", "192.168.1.3")]));
        assert_eq!(file.remove().unwrap(), [path]);
    }
}
