use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{AliasRanges, Aliases, Target};
use crate::model::IpPrefix;

/// How long an alias that is nobody's any more stays so: clients may still have it, from DNS or in a connection, and
/// would reach somebody else.
pub(super) const REST: Duration = Duration::from_secs(3600);

/// So many notes of rests are worth no tidying.
const FEW: usize = 1024;

/// Who has which alias.
///
/// Each is preferred by a hash of whom it is for, so that a node whose file is lost gives out nearly the same ones again,
/// and so do two nodes that know the same pods.
#[derive(Debug)]
pub struct Book {
    ranges: AliasRanges,
    /// By node and address on it, as an address alone may be many pods'.
    entries: HashMap<Arc<str>, HashMap<IpAddr, Entry>>,
    /// All that cannot be given out: in use or resting.
    taken: HashSet<IpAddr>,
    /// How many of `taken` are of IPv4.
    taken_v4: u64,
    /// Those in use, and those that were when the file was written and may still be.
    live: Aliases,
    /// When each began to rest, the oldest first. One that was taken up again meanwhile is still in it.
    resting: VecDeque<(Instant, Target)>,
    now: Instant,
    revision: u64,
    /// Whether any are given out.
    open: bool,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    alias: IpAddr,
    state: State,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// By how many.
    Used(usize),
    /// From the file, and nobody has asked for it yet.
    Restored,
    Resting(Instant),
}

impl Book {
    /// An empty one, at a time that later ones are not before.
    pub fn new(ranges: AliasRanges, now: Instant) -> Self {
        Self {
            ranges,
            entries: HashMap::new(),
            taken: HashSet::new(),
            taken_v4: 0,
            live: Aliases::default(),
            resting: VecDeque::new(),
            now,
            revision: 0,
            open: true,
        }
    }

    /// One that gives nothing out and keeps what was: for an agent that cannot take what would be sent there.
    pub fn closed(ranges: AliasRanges, now: Instant) -> Self {
        Self { open: false, ..Self::new(ranges, now) }
    }

    /// Takes what an earlier agent gave out, until [`Book::settle`] in force as it was. What does not fit, as the ranges
    /// are others now, is left out.
    ///
    /// The file says nothing of time, as the clocks of small computers jump: what rested begins to rest anew.
    pub fn restore(&mut self, pairs: impl IntoIterator<Item = (IpAddr, Target)>) {
        for (alias, target) in pairs {
            let fits = target.addr.is_ipv4() == alias.is_ipv4() && is_usable(self.ranges.of(alias), alias);
            if fits && self.entry(&target.node, target.addr).is_none() && !self.taken.contains(&alias) {
                self.put(alias, target, State::Restored);
            }
        }
    }

    /// Says what time it is, and lets go of what has rested; says whether there was any.
    pub fn advance(&mut self, now: Instant) -> bool {
        self.now = now;
        let mut any = false;
        while let Some((since, _)) = self.resting.front()
            && now.saturating_duration_since(*since) >= REST
        {
            let Some((since, target)) = self.resting.pop_front() else { break };
            if let Some(Entry { alias, state: State::Resting(begun) }) = self.entry(&target.node, target.addr).copied()
                && begun == since
            {
                self.forget(&target, alias);
                any = true;
            }
        }
        any
    }

    /// The alias of a pod, one use more of it; None if none is left.
    pub fn acquire(&mut self, node: &str, addr: IpAddr) -> Option<IpAddr> {
        if !self.open {
            return None;
        }
        if let Some(entry) = self.entries.get_mut(node).and_then(|addrs| addrs.get_mut(&addr)) {
            let alias = entry.alias;
            let before = entry.state;
            entry.state = match before {
                State::Used(uses) => State::Used(uses + 1),
                State::Restored | State::Resting(_) => State::Used(1),
            };
            if matches!(before, State::Resting(_)) {
                self.live.insert(alias, Target { node: node.into(), addr });
            }
            return Some(alias);
        }
        let alias = self.free(node, addr)?;
        self.put(alias, Target { node: node.into(), addr }, State::Used(1));
        Some(alias)
    }

    /// One use less; after the last it rests.
    pub fn release(&mut self, node: &str, addr: IpAddr) {
        let now = self.now;
        let Some(entry) = self.entries.get_mut(node).and_then(|addrs| addrs.get_mut(&addr)) else { return };
        match &mut entry.state {
            State::Used(uses) if *uses > 1 => *uses -= 1,
            State::Used(_) => {
                entry.state = State::Resting(now);
                let alias = entry.alias;
                self.rest(alias, Target { node: node.into(), addr });
            }
            State::Restored | State::Resting(_) => {}
        }
    }

    /// Lets what was restored and nobody has asked for rest: everything that exists has been seen.
    pub fn settle(&mut self) {
        let now = self.now;
        let mut unclaimed = Vec::new();
        for (node, addrs) in &mut self.entries {
            for (addr, entry) in addrs {
                if entry.state == State::Restored {
                    entry.state = State::Resting(now);
                    unclaimed.push((entry.alias, Target { node: Arc::clone(node), addr: *addr }));
                }
            }
        }
        for (alias, target) in unclaimed {
            self.rest(alias, target);
        }
    }

    /// The alias that a pod has, or had within the hour.
    pub fn alias_of(&self, node: &str, addr: IpAddr) -> Option<IpAddr> {
        self.entry(node, addr).map(|entry| entry.alias)
    }

    /// Those that stand for somebody.
    pub fn aliases(&self) -> &Aliases {
        &self.live
    }

    /// Counts up whenever [`Book::entries`] would give something else.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// All that must not be given to others, for the file; in no particular order.
    pub fn entries(&self) -> impl Iterator<Item = (IpAddr, Target)> {
        self.entries.iter().flat_map(|(node, addrs)| {
            addrs.iter().map(|(addr, entry)| (entry.alias, Target { node: Arc::clone(node), addr: *addr }))
        })
    }

    fn entry(&self, node: &str, addr: IpAddr) -> Option<&Entry> {
        self.entries.get(node)?.get(&addr)
    }

    fn put(&mut self, alias: IpAddr, target: Target, state: State) {
        self.taken.insert(alias);
        self.taken_v4 += u64::from(alias.is_ipv4());
        self.revision += 1;
        self.entries.entry(Arc::clone(&target.node)).or_default().insert(target.addr, Entry { alias, state });
        self.live.insert(alias, target);
    }

    fn rest(&mut self, alias: IpAddr, target: Target) {
        self.live.remove(alias);
        self.resting.push_back((self.now, target));
        // Of a pod that comes and goes all the time there may be many, of which the last counts.
        if self.resting.len() > FEW + 2 * self.taken.len() {
            let entries = &self.entries;
            self.resting.retain(|(since, target)| {
                let entry = entries.get(&target.node).and_then(|addrs| addrs.get(&target.addr));
                entry.is_some_and(|entry| entry.state == State::Resting(*since))
            });
        }
    }

    fn forget(&mut self, target: &Target, alias: IpAddr) {
        self.taken.remove(&alias);
        self.taken_v4 -= u64::from(alias.is_ipv4());
        self.revision += 1;
        if let Some(addrs) = self.entries.get_mut(&target.node) {
            addrs.remove(&target.addr);
            if addrs.is_empty() {
                self.entries.remove(&target.node);
            }
        }
    }

    /// The first one from the preferred place on that is free.
    fn free(&self, node: &str, addr: IpAddr) -> Option<IpAddr> {
        let range = self.ranges.of(addr);
        let usable = usable(range);
        let taken = if addr.is_ipv4() { self.taken_v4 } else { self.taken.len() as u64 - self.taken_v4 };
        if taken >= usable {
            return None;
        }
        let first = hash(node, addr) % usable;
        // Among one more than there are taken, one is free.
        (0..=taken).map(|step| nth(range, (first + step) % usable)).find(|alias| !self.taken.contains(alias))
    }
}

/// How many aliases a range has: not its first and not its last address, which IPv4 takes for the network and for all its
/// hosts; of IPv6 as many as fit into a number.
pub(super) fn usable(range: IpPrefix) -> u64 {
    let bits = if range.network().is_ipv4() { 32 } else { 128 } - u32::from(range.length());
    if bits >= 63 { 1 << 62 } else { (1_u64 << bits).saturating_sub(2) }
}

fn nth(range: IpPrefix, index: u64) -> IpAddr {
    match range.network() {
        IpAddr::V4(network) => IpAddr::V4((u32::from(network).wrapping_add(index as u32 + 1)).into()),
        IpAddr::V6(network) => IpAddr::V6((u128::from(network) + u128::from(index) + 1).into()),
    }
}

fn is_usable(range: IpPrefix, alias: IpAddr) -> bool {
    let place = match (range.network(), alias) {
        (IpAddr::V4(network), IpAddr::V4(alias)) => u64::from(u32::from(alias).wrapping_sub(network.into())),
        (IpAddr::V6(network), IpAddr::V6(alias)) => {
            u64::try_from(u128::from(alias).wrapping_sub(network.into())).unwrap_or(u64::MAX)
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return false,
    };
    range.contains(alias) && (1..=usable(range)).contains(&place)
}

/// 64-bit FNV-1a, and a last step that spreads it (the finisher of SplitMix64), as FNV's low bits are weak.
fn hash(node: &str, addr: IpAddr) -> u64 {
    let addr: Vec<u8> = match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    };
    let bytes = node.bytes().chain([0]).chain(addr);
    let fnv =
        bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let mixed = (fnv ^ (fnv >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests;
