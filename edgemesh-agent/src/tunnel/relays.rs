//! The relays of the mesh: when to resolve, dial and reserve. Pure, the time is an argument.

use std::{
    fmt,
    net::IpAddr,
    str::FromStr,
    time::{Duration, Instant},
};

use super::NodeName;

/// First pause after a failure; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// Longest pause, so that a relay that is back is in use within 15 s. Each is made up to half longer by chance.
const LONGEST_PAUSE: Duration = Duration::from_secs(6);

/// A step that has not been answered by then is taken anew.
const PATIENCE: Duration = Duration::from_secs(15);

/// A node that relays for others, as `relayNodes` names it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RelayNode {
    /// The node.
    pub node: NodeName,
    /// Where everyone reaches it.
    pub addresses: Vec<RelayAddress>,
}

/// An address that a relay is advertised at: an IP address or a DNS name, and a port.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct RelayAddress {
    /// IP address or DNS name.
    pub host: Host,
    /// The relay's port, TCP and UDP.
    pub port: u16,
}

/// IP address or DNS name.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Host {
    /// An IP address.
    Ip(IpAddr),
    /// A name to resolve each time the relay is dialled.
    Name(String),
}

/// A text that is no address of a relay.
#[derive(Debug, thiserror::Error)]
#[error(
    "'{0}' is not an address of a relay: expected an IP address or a DNS name, with ':PORT' if the port is not 20006 \
         (IPv6 then in brackets)"
)]
pub struct ParseRelayAddressError(String);

impl RelayAddress {
    /// The port of an address that names none.
    pub const DEFAULT_PORT: u16 = 20006;
}

impl FromStr for RelayAddress {
    type Err = ParseRelayAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseRelayAddressError(text.chars().take(300).collect());
        if let Ok(ip) = text.parse() {
            return Ok(Self { host: Host::Ip(ip), port: Self::DEFAULT_PORT });
        }
        if let Ok(socket) = text.parse::<std::net::SocketAddr>() {
            if socket.port() == 0 {
                return Err(error());
            }
            return Ok(Self { host: Host::Ip(socket.ip()), port: socket.port() });
        }
        if let Some(ip) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).and_then(|ip| ip.parse().ok())
        {
            return Ok(Self { host: Host::Ip(IpAddr::V6(ip)), port: Self::DEFAULT_PORT });
        }
        let (name, port) = match text.rsplit_once(':') {
            Some((name, port)) => (name, port.parse().ok().filter(|port| *port != 0).ok_or_else(error)?),
            None => (text, Self::DEFAULT_PORT),
        };
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        };
        let plain = name.strip_suffix('.').unwrap_or(name);
        // A name of digits and dots is a mistyped IPv4 address.
        let digits = plain.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        if plain.len() > 253 || digits || !plain.split('.').all(label) {
            return Err(error());
        }
        Ok(Self { host: Host::Name(name.to_owned()), port })
    }
}

impl fmt::Display for RelayAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]:{}", self.port),
            Host::Ip(ip) => write!(f, "{ip}:{}", self.port),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

/// What is to be done about a relay now.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Action {
    /// Resolve its addresses and dial it, then say [`Relays::failed`] or [`Relays::connected`].
    Dial(RelayNode),
    /// Ask it for a reservation, then say [`Relays::reserved`] or [`Relays::failed`].
    Reserve(NodeName),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    /// Not connected; the next attempt is due then.
    Down { due: Instant },
    /// Being dialled, until then at the latest.
    Dialling { until: Instant },
    /// Connected; the reservation is due then.
    Connected { due: Instant },
    /// Being asked for a reservation, until then at the latest.
    Reserving { until: Instant },
    /// Everything is there.
    Reserved,
}

#[derive(Debug)]
struct Relay {
    spec: RelayNode,
    state: State,
    failures: u32,
}

/// All relays but this node itself.
#[derive(Debug)]
pub(super) struct Relays {
    me: NodeName,
    relays: Vec<Relay>,
    /// Whether this node itself is in the list.
    listed: Option<RelayNode>,
}

impl Relays {
    pub(super) fn new(me: NodeName) -> Self {
        Self { me, relays: Vec::new(), listed: None }
    }

    /// Replaces the list. Relays that stay keep their state, unless their addresses have changed and they are down; those
    /// that go are given back.
    pub(super) fn set(&mut self, list: &[RelayNode], now: Instant) -> Vec<NodeName> {
        self.listed = list.iter().find(|relay| relay.node == self.me).cloned();
        let mut old = std::mem::take(&mut self.relays);
        for spec in list.iter().filter(|relay| relay.node != self.me) {
            if self.relays.iter().any(|relay| relay.spec.node == spec.node) {
                continue;
            }
            let known = old.iter().position(|relay| relay.spec.node == spec.node).map(|at| old.swap_remove(at));
            let relay = match known {
                Some(relay) if relay.spec == *spec => relay,
                Some(relay) if !matches!(relay.state, State::Down { .. } | State::Dialling { .. }) => {
                    Relay { spec: spec.clone(), ..relay }
                }
                _ => Relay { spec: spec.clone(), state: State::Down { due: now }, failures: 0 },
            };
            self.relays.push(relay);
        }
        old.into_iter().map(|relay| relay.spec.node).collect()
    }

    /// This node's own entry in the list.
    pub(super) fn listed(&self) -> Option<&RelayNode> {
        self.listed.as_ref()
    }

    /// Whether `node` is a relay other than this node.
    pub(super) fn contains(&self, node: &NodeName) -> bool {
        self.relays.iter().any(|relay| relay.spec.node == *node)
    }

    /// The relays' names.
    pub(super) fn nodes(&self) -> impl Iterator<Item = &NodeName> {
        self.relays.iter().map(|relay| &relay.spec.node)
    }

    /// Whether a relay may be there of which nothing is known yet.
    pub(super) fn fresh(&self) -> bool {
        let fresh = |relay: &Relay| match relay.state {
            State::Down { .. } | State::Dialling { .. } => relay.failures == 0,
            State::Connected { .. } | State::Reserving { .. } | State::Reserved => false,
        };
        self.relays.iter().any(fresh)
    }

    /// What is due, and taken as begun; `random` in 0..1 spreads the pauses of nodes that lost a relay together.
    pub(super) fn due(&mut self, now: Instant, mut random: impl FnMut() -> f64) -> Vec<Action> {
        let mut actions = Vec::new();
        for relay in &mut self.relays {
            match relay.state {
                State::Dialling { until } if until <= now => relay.fail(now, random()),
                State::Reserving { until } if until <= now => relay.fail_reservation(now, random()),
                State::Down { .. }
                | State::Dialling { .. }
                | State::Connected { .. }
                | State::Reserving { .. }
                | State::Reserved => {}
            }
            match relay.state {
                State::Down { due } if due <= now => {
                    relay.state = State::Dialling { until: now + PATIENCE };
                    actions.push(Action::Dial(relay.spec.clone()));
                }
                State::Connected { due } if due <= now => {
                    relay.state = State::Reserving { until: now + PATIENCE };
                    actions.push(Action::Reserve(relay.spec.node.clone()));
                }
                State::Down { .. }
                | State::Dialling { .. }
                | State::Connected { .. }
                | State::Reserving { .. }
                | State::Reserved => {}
            }
        }
        actions
    }

    /// When [`Self::due`] has something next.
    pub(super) fn next(&self) -> Option<Instant> {
        let when = |relay: &Relay| match relay.state {
            State::Down { due } | State::Connected { due } => Some(due),
            State::Dialling { until } | State::Reserving { until } => Some(until),
            State::Reserved => None,
        };
        self.relays.iter().filter_map(when).min()
    }

    /// There is a direct connection to `node`, whoever made it.
    pub(super) fn connected(&mut self, node: &NodeName, now: Instant) {
        if let Some(relay) = self.get(node)
            && matches!(relay.state, State::Down { .. } | State::Dialling { .. })
        {
            relay.state = State::Connected { due: now };
        }
    }

    /// The reservation at `node` is made.
    pub(super) fn reserved(&mut self, node: &NodeName) {
        if let Some(relay) = self.get(node) {
            relay.state = State::Reserved;
            relay.failures = 0;
        }
    }

    /// The last direct connection to `node` is gone.
    pub(super) fn lost(&mut self, node: &NodeName, now: Instant, random: f64) {
        if let Some(relay) = self.get(node)
            && !matches!(relay.state, State::Down { .. } | State::Dialling { .. })
        {
            // Soon, but not all nodes in the same moment.
            relay.failures = 1;
            relay.state = State::Down { due: now + FIRST_PAUSE.mul_f64(random) };
        }
    }

    /// Dialling `node` came to nothing.
    pub(super) fn failed(&mut self, node: &NodeName, now: Instant, random: f64) {
        if let Some(relay) = self.get(node)
            && matches!(relay.state, State::Dialling { .. })
        {
            relay.fail(now, random);
        }
    }

    /// `node` gave no reservation, or took it back.
    pub(super) fn unreserved(&mut self, node: &NodeName, now: Instant, random: f64) {
        if let Some(relay) = self.get(node)
            && matches!(relay.state, State::Reserving { .. } | State::Reserved)
        {
            relay.fail_reservation(now, random);
        }
    }

    fn get(&mut self, node: &NodeName) -> Option<&mut Relay> {
        self.relays.iter_mut().find(|relay| relay.spec.node == *node)
    }
}

impl Relay {
    fn pause(&mut self, random: f64) -> Duration {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(8)).min(LONGEST_PAUSE);
        self.failures = self.failures.saturating_add(1);
        pause.mul_f64(1.0 + random.clamp(0.0, 1.0) / 2.0)
    }

    fn fail(&mut self, now: Instant, random: f64) {
        self.state = State::Down { due: now + self.pause(random) };
    }

    fn fail_reservation(&mut self, now: Instant, random: f64) {
        self.state = State::Connected { due: now + self.pause(random) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relay(node: &str, address: &str) -> RelayNode {
        RelayNode { node: node.parse().unwrap(), addresses: vec![address.parse().unwrap()] }
    }

    fn one() -> (Relays, RelayNode, Instant) {
        let (mut relays, spec, now) = (Relays::new("me".parse().unwrap()), relay("r", "192.0.2.1"), Instant::now());
        relays.set(std::slice::from_ref(&spec), now);
        (relays, spec, now)
    }

    #[test]
    fn a_relay_is_dialled_then_asked_for_a_reservation_then_left_alone() {
        let (mut relays, spec, now) = one();
        assert_eq!(relays.due(now, || 0.0), [Action::Dial(spec.clone())]);
        assert_eq!(relays.due(now, || 0.0), []);
        relays.connected(&spec.node, now);
        assert_eq!(relays.due(now, || 0.0), [Action::Reserve(spec.node.clone())]);
        relays.reserved(&spec.node);
        assert_eq!(relays.next(), None);
    }

    #[test]
    fn pauses_grow_to_a_bound_and_one_that_is_back_is_found_within_fifteen_seconds() {
        let (mut relays, spec, mut now) = one();
        let mut longest = Duration::ZERO;
        for _ in 0..40 {
            assert_eq!(relays.due(now, || 1.0).len(), 1);
            relays.failed(&spec.node, now, 1.0);
            let next = relays.next().unwrap();
            longest = longest.max(next - now);
            now = next;
        }
        assert!(longest > Duration::from_secs(5) && longest <= Duration::from_secs(9), "{longest:?}");
    }

    #[test]
    fn what_is_never_answered_is_tried_again() {
        let (mut relays, spec, now) = one();
        relays.due(now, || 0.0);
        let later = now + PATIENCE;
        assert_eq!(relays.due(later, || 0.0), []);
        assert_eq!(relays.due(later + FIRST_PAUSE, || 0.0), [Action::Dial(spec)]);
    }

    #[test]
    fn a_lost_relay_is_dialled_at_once_and_a_lost_reservation_is_asked_for_again() {
        let (mut relays, spec, now) = one();
        relays.due(now, || 0.0);
        relays.connected(&spec.node, now);
        relays.due(now, || 0.0);
        relays.reserved(&spec.node);
        relays.unreserved(&spec.node, now, 0.0);
        assert_eq!(relays.due(now + FIRST_PAUSE, || 0.0), [Action::Reserve(spec.node.clone())]);
        relays.lost(&spec.node, now, 0.5);
        assert_eq!(relays.due(now + FIRST_PAUSE / 2, || 0.0), [Action::Dial(spec)]);
    }

    #[test]
    fn replacing_the_list_leaves_what_stays_alone() {
        let (mut relays, spec, now) = one();
        relays.due(now, || 0.0);
        relays.connected(&spec.node, now);
        relays.due(now, || 0.0);
        relays.reserved(&spec.node);
        let (moved, new, me) = (relay("r", "192.0.2.7"), relay("s", "relay.example.com:1"), relay("me", "192.0.2.9"));
        assert!(relays.set(&[moved, new.clone(), me.clone()], now).is_empty());
        assert_eq!(relays.due(now, || 0.0), [Action::Dial(new.clone())]);
        assert_eq!(relays.listed(), Some(&me));
        assert_eq!(relays.set(&[new], now), [spec.node]);
        assert_eq!(relays.listed(), None);
    }

    #[test]
    fn addresses_are_ips_and_names_with_and_without_a_port() {
        let show = |text: &str| text.parse::<RelayAddress>().map(|address| address.to_string()).ok();
        for (text, expected) in [
            ("192.0.2.1", Some("192.0.2.1:20006")),
            ("192.0.2.1:7", Some("192.0.2.1:7")),
            ("2001:db8::1", Some("[2001:db8::1]:20006")),
            ("[2001:db8::1]", Some("[2001:db8::1]:20006")),
            ("[2001:db8::1]:7", Some("[2001:db8::1]:7")),
            ("relay.example.com", Some("relay.example.com:20006")),
            ("relay.example.com.:7", Some("relay.example.com.:7")),
            ("192.0.2", None),
            ("192.0.2.1:0", None),
            ("relay:70000", None),
            ("", None),
            ("a b", None),
            ("/ip4/192.0.2.1", None),
        ] {
            assert_eq!(show(text).as_deref(), expected, "{text}");
        }
    }
}
