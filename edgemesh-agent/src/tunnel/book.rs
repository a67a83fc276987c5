//! Where members might be reached directly.

use std::{collections::HashMap, net::IpAddr};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};

use super::gate::{ip, is_relayed};

/// Peers of which addresses are kept.
const MAX_PEERS: usize = 8192;

/// Peers of which there are only announcements on the LAN.
const MAX_RUMOURS: usize = 512;

/// Addresses kept of a peer, from each source of them.
const MAX_ADDRESSES: usize = 16;

/// Addresses by peer. What a peer says of itself replaces what it said before.
#[derive(Debug)]
pub(super) struct Book {
    entries: HashMap<PeerId, Entry>,
    /// The rule by which an address is not dialled, whoever says that a peer is there.
    refused: Refused,
}

/// [`always_refused`](super::always_refused), or what a test has in its place.
pub(super) type Refused = fn(IpAddr) -> Option<&'static str>;

#[derive(Debug, Default)]
struct Entry {
    /// The last that a connection was made to.
    worked: Option<Multiaddr>,
    /// Seen on this LAN.
    nearby: Vec<Multiaddr>,
    /// What the peer says of itself in its hello, or the configuration says of a relay.
    told: Vec<Multiaddr>,
    /// What the peer says of itself since, by identify: unlike a hello this has addresses of container bridges in it.
    identified: Vec<Multiaddr>,
}

impl Book {
    pub(super) fn new(refused: Refused) -> Self {
        Self { entries: HashMap::new(), refused }
    }

    /// Whether an address may be another node's.
    fn is_elsewhere(&self, address: &Multiaddr) -> bool {
        ip(address).is_some_and(|ip| (self.refused)(ip).is_none())
    }

    /// What the configuration says of `peer`.
    pub(super) fn configured(&mut self, peer: PeerId, addresses: impl IntoIterator<Item = Multiaddr>) {
        let told: Vec<Multiaddr> = addresses.into_iter().filter_map(direct).take(MAX_ADDRESSES).collect();
        if !told.is_empty()
            && let Some(entry) = self.entry(peer)
        {
            entry.told = told;
        }
    }

    /// What `peer` said of itself. No peer has this node dial its own inside.
    pub(super) fn told(&mut self, peer: PeerId, addresses: impl IntoIterator<Item = Multiaddr>) {
        let told: Vec<Multiaddr> = addresses.into_iter().filter(|address| self.is_elsewhere(address)).collect();
        self.configured(peer, told);
    }

    /// What `peer` said of itself by identify. Its loopback is nobody else's.
    pub(super) fn identified(&mut self, peer: PeerId, addresses: impl IntoIterator<Item = Multiaddr>) {
        let identified = addresses.into_iter().filter_map(direct).filter(|address| self.is_elsewhere(address));
        let identified = identified.take(MAX_ADDRESSES).collect();
        if let Some(entry) = self.entry(peer) {
            entry.identified = identified;
        }
    }

    /// `peer` was found on this LAN, or somebody says so: those of whom nothing else is known take the room of nobody.
    pub(super) fn nearby(&mut self, peer: PeerId, address: Multiaddr) {
        let rumours = || self.entries.values().filter(|entry| entry.is_rumour()).count();
        if !self.entries.contains_key(&peer) && (self.entries.len() >= MAX_PEERS || rumours() >= MAX_RUMOURS) {
            return;
        }
        if let Some(address) = direct(address).filter(|address| self.is_elsewhere(address))
            && let Some(entry) = self.entry(peer)
            && !entry.nearby.contains(&address)
        {
            entry.nearby.truncate(MAX_ADDRESSES - 1);
            entry.nearby.insert(0, address);
        }
    }

    /// `peer` is no longer found at `address` on this LAN.
    pub(super) fn gone(&mut self, peer: &PeerId, address: Multiaddr) {
        if let (Some(address), Some(entry)) = (direct(address), self.entries.get_mut(peer)) {
            entry.nearby.retain(|known| *known != address);
            if entry.is_rumour() && entry.nearby.is_empty() {
                self.entries.remove(peer);
            }
        }
    }

    /// A connection to `peer` was made at `address`.
    pub(super) fn worked(&mut self, peer: PeerId, address: Multiaddr) {
        if let Some(address) = direct(address)
            && let Some(entry) = self.entry(peer)
        {
            entry.worked = Some(address);
        }
    }

    /// Where to try `peer`, each address once, the likely ones first.
    pub(super) fn addresses(&self, peer: &PeerId) -> Vec<Multiaddr> {
        let Some(Entry { worked, nearby, told, identified }) = self.entries.get(peer) else { return Vec::new() };
        let mut addresses: Vec<Multiaddr> = Vec::new();
        for address in nearby.iter().chain(worked).chain(told).chain(identified) {
            if !addresses.contains(address) {
                addresses.push(address.clone());
            }
        }
        addresses
    }

    fn entry(&mut self, peer: PeerId) -> Option<&mut Entry> {
        if self.entries.len() >= MAX_PEERS && !self.entries.contains_key(&peer) {
            // Whom exactly it hits is no matter: a relay knows everybody.
            let victim = self.entries.keys().next().copied()?;
            self.entries.remove(&victim);
        }
        Some(self.entries.entry(peer).or_default())
    }
}

impl Entry {
    /// Whether nothing but announcements on the LAN is known, which anybody there can make.
    fn is_rumour(&self) -> bool {
        self.worked.is_none() && self.told.is_empty() && self.identified.is_empty()
    }
}

/// The address without the peer at its end, if it is one that can be dialled directly.
fn direct(address: Multiaddr) -> Option<Multiaddr> {
    if is_relayed(&address) || ip(&address).is_none_or(|ip| ip.is_unspecified()) {
        return None;
    }
    let plain: Multiaddr = address.iter().filter(|part| !matches!(part, Protocol::P2p(_))).collect();
    let parts: Vec<Protocol<'_>> = plain.iter().skip(1).collect();
    matches!(parts.as_slice(), [Protocol::Tcp(1..)] | [Protocol::Udp(1..), Protocol::QuicV1]).then(|| plain.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::always_refused;

    fn a(text: &str) -> Multiaddr {
        text.parse().unwrap()
    }

    #[test]
    fn keeps_what_can_be_dialled_directly() {
        let (mut book, peer) = (Book::new(always_refused), PeerId::random());
        let at_peer = format!("/ip4/10.0.0.1/tcp/20006/p2p/{peer}");
        book.told(
            peer,
            [
                a(&at_peer),
                a("/ip4/10.0.0.1/udp/20006/quic-v1"),
                a("/ip4/10.0.0.1/udp/20006"),
                a("/ip4/0.0.0.0/tcp/20006"),
                a("/dns/example.org/tcp/20006"),
                a(&format!("/ip4/10.0.0.9/tcp/1/p2p/{peer}/p2p-circuit")),
                a("/ip4/10.0.0.1/tcp/0"),
            ],
        );
        assert_eq!(book.addresses(&peer), [a("/ip4/10.0.0.1/tcp/20006"), a("/ip4/10.0.0.1/udp/20006/quic-v1")]);
    }

    #[test]
    fn the_newest_word_of_a_peer_counts_and_neighbours_come_first() {
        let (mut book, peer) = (Book::new(always_refused), PeerId::random());
        book.told(peer, [a("/ip4/10.0.0.1/tcp/1")]);
        book.told(peer, [a("/ip4/10.0.0.2/tcp/1")]);
        book.worked(peer, a("/ip4/10.0.0.3/tcp/1"));
        book.nearby(peer, a("/ip4/10.0.0.4/tcp/1"));
        book.nearby(peer, a("/ip4/10.0.0.2/tcp/1"));
        let order = [a("/ip4/10.0.0.2/tcp/1"), a("/ip4/10.0.0.4/tcp/1"), a("/ip4/10.0.0.3/tcp/1")];
        assert_eq!(book.addresses(&peer), order);
        book.gone(&peer, a("/ip4/10.0.0.4/tcp/1"));
        assert_eq!(book.addresses(&peer).len(), 2);
    }

    #[test]
    fn is_bounded() {
        let mut book = Book::new(always_refused);
        for _ in 0..MAX_PEERS + 10 {
            book.told(PeerId::random(), [a("/ip4/10.0.0.1/tcp/1")]);
        }
        assert_eq!(book.entries.len(), MAX_PEERS);
        let peer = PeerId::random();
        book.nearby(peer, a("/ip4/10.0.0.1/tcp/1"));
        assert!(book.addresses(&peer).is_empty(), "an announcement has taken a member's room");
        let mut book = Book::new(always_refused);
        for _ in 0..2 * MAX_RUMOURS {
            book.nearby(PeerId::random(), a("/ip4/10.0.0.1/tcp/1"));
        }
        assert_eq!(book.entries.len(), MAX_RUMOURS);
        book.told(peer, [a("/ip4/127.0.0.1/tcp/22"), a("/ip4/169.254.169.254/tcp/80"), a("/ip4/10.0.0.9/tcp/1")]);
        assert_eq!(book.addresses(&peer), [a("/ip4/10.0.0.9/tcp/1")]);
        book.configured(peer, [a("/ip4/127.0.0.1/tcp/1")]);
        assert_eq!(book.addresses(&peer), [a("/ip4/127.0.0.1/tcp/1")]);
        let mut book = Book::new(always_refused);
        for port in 1..100 {
            book.nearby(peer, a(&format!("/ip4/10.0.0.1/tcp/{port}")));
        }
        assert_eq!(book.addresses(&peer).len(), MAX_ADDRESSES);
    }
}
