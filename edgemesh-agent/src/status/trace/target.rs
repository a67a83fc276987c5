//! What a user may point at: an address, or a Service and one of its ports.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use crate::model::{Frontend, FrontendAddr, NamespacedName, Protocol, ServiceEntry, ServiceTable};

/// What to trace.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Target {
    /// `10.96.0.1:80`, `[fd00::1]:80/udp`; a v4-mapped address is its IPv4 one, as it is to the programs.
    Address { addr: SocketAddr, protocol: Option<Protocol> },
    /// `default/web`, `default/web:http`, `default/web:53/udp`.
    Service { name: NamespacedName, port: Option<PortRef>, protocol: Option<Protocol> },
}

/// A port of a Service.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum PortRef {
    Number(u16),
    Name(Box<str>),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self {
            Self::Address { addr, protocol } => {
                write!(f, "{addr}")?;
                protocol
            }
            Self::Service { name, port, protocol } => {
                write!(f, "{name}")?;
                match port {
                    Some(PortRef::Number(number)) => write!(f, ":{number}")?,
                    Some(PortRef::Name(name)) => write!(f, ":{name}")?,
                    None => {}
                }
                protocol
            }
        };
        protocol.map_or(Ok(()), |protocol| write!(f, "/{protocol}"))
    }
}

/// A text that is no target.
#[derive(Debug, thiserror::Error)]
#[error(
    "'{0}' is neither ADDRESS:PORT[/tcp|/udp], such as 10.96.0.10:80 or [fd00::10]:53/udp, nor NAMESPACE/NAME[:PORT]"
)]
pub struct ParseTargetError(String);

impl FromStr for Target {
    type Err = ParseTargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, word)) if word.eq_ignore_ascii_case("tcp") => (rest, Some(Protocol::Tcp)),
            Some((rest, word)) if word.eq_ignore_ascii_case("udp") => (rest, Some(Protocol::Udp)),
            _ => (text, None),
        };
        let parsed = parse(rest, protocol);
        // A Service may be called `tcp`.
        parsed.or_else(|| parse(text, None)).ok_or_else(|| ParseTargetError(text.chars().take(128).collect()))
    }
}

fn parse(text: &str, protocol: Option<Protocol>) -> Option<Target> {
    if let Ok(addr) = text.parse::<SocketAddr>() {
        // A scope is no part of what the programs compare.
        return Some(Target::Address { addr: SocketAddr::new(addr.ip().to_canonical(), addr.port()), protocol });
    }
    let (name, port) = match text.split_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (text, None),
    };
    let name: NamespacedName = name.parse().ok()?;
    let port = match port {
        Some(port) => match port.parse() {
            Ok(number) => Some(PortRef::Number(number)),
            Err(_) => Some(PortRef::Name(Some(port).filter(|port| is_label(port))?.into())),
        },
        None => None,
    };
    let labels = [&name.namespace, &name.name];
    labels.iter().all(|part| is_label(part)).then_some(Target::Service { name, port, protocol })
}

/// As the names of objects and ports are (RFC 1123, with dots).
fn is_label(text: &str) -> bool {
    (1..=253).contains(&text.len())
        && text.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'-' | b'.'))
}

/// Why a target stands for no one address.
#[derive(Debug, thiserror::Error)]
pub enum Unresolved {
    #[error("no Service {0} is known; see `edgemesh-agent services`")]
    NoService(NamespacedName),
    #[error("Service {name} has no port {port}; it has {}", list(.ports))]
    NoPort { name: NamespacedName, port: String, ports: Vec<String> },
    #[error("Service {name} has several ports; name one: {}", list(.ports))]
    Ambiguous { name: NamespacedName, ports: Vec<String> },
    /// Headless, filtered, without an address.
    #[error("Service {name} ({kind}) answers on no address, so nothing is translated for it{}", because(.notes))]
    NoFrontend { name: NamespacedName, kind: &'static str, notes: Vec<String> },
}

fn list(ports: &[String]) -> String {
    if ports.is_empty() { "none".to_owned() } else { ports.join(", ") }
}

fn because(notes: &[String]) -> String {
    if notes.is_empty() { String::new() } else { format!(": {}", notes.join("; ")) }
}

impl Target {
    /// The one address that is meant. Without a protocol TCP, unless only UDP is answered; for a Service, its first
    /// address: the ClusterIP, if it has one.
    ///
    /// # Errors
    ///
    /// See [`Unresolved`].
    pub fn resolve(&self, table: &ServiceTable) -> Result<FrontendAddr, Unresolved> {
        match self {
            Self::Address { addr, protocol } => {
                let answers = |protocol| super::find(table, &FrontendAddr { addr: *addr, protocol }).is_some();
                let only_udp = || !answers(Protocol::Tcp) && answers(Protocol::Udp);
                let default = || if only_udp() { Protocol::Udp } else { Protocol::Tcp };
                Ok(FrontendAddr { addr: *addr, protocol: protocol.unwrap_or_else(default) })
            }
            Self::Service { name, port, protocol } => {
                let entry = table.get(name).ok_or_else(|| Unresolved::NoService(name.clone()))?;
                frontend_of(entry, port.as_ref(), *protocol).map(|frontend| frontend.at)
            }
        }
    }
}

fn frontend_of<'a>(
    entry: &'a ServiceEntry,
    port: Option<&PortRef>,
    protocol: Option<Protocol>,
) -> Result<&'a Frontend, Unresolved> {
    let name = || entry.service.name.clone();
    if entry.frontends.is_empty() {
        let notes = entry.notes.iter().map(ToString::to_string).collect();
        return Err(Unresolved::NoFrontend { name: name(), kind: super::super::kind_of(&entry.service), notes });
    }
    let matches = |frontend: &&Frontend| {
        let Some(served) = entry.ports.get(frontend.port) else { return false };
        let this = match port {
            Some(PortRef::Number(number)) => served.port.port.get() == *number,
            Some(PortRef::Name(name)) => served.port.name == *name,
            None => true,
        };
        this && protocol.is_none_or(|protocol| protocol == frontend.at.protocol)
    };
    let mut found: Vec<&Frontend> = entry.frontends.iter().filter(matches).collect();
    // One number on both protocols: TCP, as for an address.
    if matches!(port, Some(PortRef::Number(_))) && found.iter().any(|f| f.at.protocol == Protocol::Tcp) {
        found.retain(|frontend| frontend.at.protocol == Protocol::Tcp);
    }
    let ports = || -> Vec<String> {
        let ports = entry.ports.iter().filter(|served| served.port.protocol != Protocol::Sctp);
        ports.map(|served| format!("{}:{}/{}", entry.service.name, served.port.port, served.port.protocol)).collect()
    };
    match found.first() {
        Some(first) if found.iter().all(|other| other.port == first.port) => {
            // ClusterIPs come first in a Service's frontends.
            Ok(found.iter().find(|frontend| !is_loopback(frontend)).unwrap_or(first))
        }
        Some(_) => Err(Unresolved::Ambiguous { name: name(), ports: ports() }),
        None => {
            let asked = match port {
                Some(PortRef::Number(number)) => number.to_string(),
                Some(PortRef::Name(name)) => format!("'{name}'"),
                None => protocol.map_or_else(String::new, |protocol| protocol.to_string()),
            };
            Err(Unresolved::NoPort { name: name(), port: asked, ports: ports() })
        }
    }
}

fn is_loopback(frontend: &Frontend) -> bool {
    matches!(frontend.at.addr.ip(), IpAddr::V4(ip) if ip.is_loopback())
}
