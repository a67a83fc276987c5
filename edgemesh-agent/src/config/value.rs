//! From a node of the file to a typed value, or to a sentence on what is wrong with it.

use std::{
    borrow::Cow,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper::Uri;

use super::{
    AllowedTarget, DataplaneMode, ServiceFilter, SourceChoice,
    document::{Node, Scalar, Value},
    keys::{Draft, Plain, Slot},
};
use crate::{
    dns::{forward::StubDomain, zone::ClusterDomain},
    model::IpPrefix,
    tunnel::{NodeName, RelayAddress, RelayNode, ServeRelay},
};

/// `sun_path` of Linux holds 108 bytes, the last of them NUL.
pub(super) const MAX_SOCKET_PATH: usize = 107;
/// A day in seconds; what happens less often might as well not.
pub(super) const MAX_PERIOD: u64 = 86_400;
/// IFNAMSIZ less the NUL.
pub(super) const MAX_INTERFACE: usize = 15;
/// The modes that a file may ask for, as it spells them.
pub(super) const FILTERS: [(&str, ServiceFilter); 2] = [
    ("FilterIfLabelExists", ServiceFilter::UnlabelledOnly),
    ("FilterIfLabelDoesNotExists", ServiceFilter::LabelledOnly),
];
/// The data planes that a file may ask for.
pub(super) const DATAPLANES: [(&str, DataplaneMode); 2] =
    [("auto", DataplaneMode::Auto), ("ebpf", DataplaneMode::Ebpf)];
/// The sources that a file may ask for.
pub(super) const SOURCES: [(&str, SourceChoice); 3] =
    [("auto", SourceChoice::Auto), ("inCluster", SourceChoice::InCluster), ("metaServer", SourceChoice::MetaServer)];

/// When a node may be asked to relay, as a file spells it.
pub(super) const SERVE_RELAY: [(&str, ServeRelay); 3] =
    [("whenListed", ServeRelay::WhenListed), ("whenPublic", ServeRelay::WhenPublic), ("always", ServeRelay::Always)];

/// Why a value cannot be used.
#[derive(Debug)]
pub(super) struct Refusal {
    /// What was given, or what is wrong with it.
    pub(super) problem: String,
    pub(super) expected: Cow<'static, str>,
}

/// Puts the value of a used key into its place; `Null` leaves the default.
pub(super) fn store(node: &Node, slot: &Slot, draft: &mut Draft) -> Result<(), Refusal> {
    if matches!(node.value, Value::Null) {
        return Ok(());
    }
    match slot {
        Slot::Bool(at) => *at(draft) = truth(node).ok_or_else(|| given(node, "true or false"))?,
        Slot::Auto(at) => *at(draft) = Some(truth(node).ok_or_else(|| given(node, "true or false"))?),
        Slot::Count(at) => *at(draft) = count(node)?,
        Slot::Limit(at) => *at(draft) = limit(node)?,
        Slot::Period(at) => *at(draft) = period(node)?,
        Slot::Interface(at) => *at(draft) = interface(node)?,
        Slot::Ip(at) => *at(draft) = ip(node)?,
        Slot::OptionalIpv6(at) => *at(draft) = optional_ipv6(node)?,
        Slot::Port(at) => *at(draft) = port(node)?,
        Slot::Domain(at) => *at(draft) = domain(node)?,
        Slot::Servers(at) => *at(draft) = servers(node)?,
        Slot::StubDomains(at) => *at(draft) = stub_domains(node)?,
        Slot::Listen(at) => *at(draft) = listen(node)?,
        Slot::Path(at) => *at(draft) = path(text(node, PATH)?, PATH)?,
        Slot::UnixSocket(at) => *at(draft) = unix_socket(node)?,
        Slot::OptionalPath(at) => {
            let text = text(node, OPTIONAL_PATH)?;
            *at(draft) = if text.is_empty() { None } else { Some(path(text, OPTIONAL_PATH)?) };
        }
        Slot::Interfaces(at) => *at(draft) = interfaces(node)?,
        Slot::AliasRangeV4(at) => *at(draft) = alias_range(node, ALIAS_RANGE_V4, |ip| ip.is_ipv4(), 8..=28)?,
        Slot::AliasRangeV6(at) => *at(draft) = alias_range(node, ALIAS_RANGE_V6, |ip| ip.is_ipv6(), 32..=112)?,
        Slot::Networks(at) => *at(draft) = networks(node)?,
        Slot::Url(at) => *at(draft) = url(node)?,
        Slot::Filter(at) => *at(draft) = filter(node)?,
        Slot::Dataplane(at) => *at(draft) = dataplane(node)?,
        Slot::Source(at) => *at(draft) = source(node)?,
        Slot::SecretBool(at) => *at(draft) = truth(node).ok_or_else(|| unnamed(node, "true or false"))?,
        Slot::SecretPath(at) => {
            let path = words(node).and_then(|text| path(text, PATH).ok());
            *at(draft) = path.ok_or_else(|| unnamed(node, PATH))?;
        }
        Slot::RelayNodes(at, _) => *at(draft) = relay_nodes(node)?,
        Slot::ServeRelay(at) => *at(draft) = serve_relay(node)?,
        Slot::Targets(at) => *at(draft) = targets(node)?,
        Slot::Sockets(at) => *at(draft) = sockets(node)?,
        Slot::Peers(at) => *at(draft) = peers(node)?,
    }
    Ok(())
}

/// Whether the value of a key without effect asks for anything but EdgeMesh's default. Its text is never in the
/// refusal: among these keys are those that stand beside secrets.
pub(super) fn differs(node: &Node, plain: &Plain) -> Result<bool, Refusal> {
    let refuse = |expected: Cow<'static, str>| Refusal { problem: format!("given {}", type_of(node)), expected };
    if matches!(node.value, Value::Null) {
        return Ok(false);
    }
    match plain {
        Plain::Bool(default) => truth(node).map(|v| v != *default).ok_or_else(|| refuse("true or false".into())),
        Plain::Whole(default) => whole(node).map(|v| v != *default).ok_or_else(|| refuse("a whole number".into())),
        Plain::Number(default) => number(node).map(|v| v != *default).ok_or_else(|| refuse("a number".into())),
        Plain::Text(defaults) => words(node).map(|v| !defaults.contains(&v)).ok_or_else(|| refuse("a text".into())),
        Plain::Choice(choices) => match words(node).filter(|v| choices.contains(v)) {
            Some(word) => Ok(choices.first() != Some(&word)),
            None => Err(refuse(one_of(choices.iter().copied()))),
        },
        Plain::Texts => match &node.value {
            Value::List(items) if items.iter().all(|item| words(item).is_some()) => Ok(!items.is_empty()),
            Value::List(_) => {
                Err(Refusal { problem: "given something else in the list".to_owned(), expected: "texts alone".into() })
            }
            Value::Null | Value::Scalar(_) | Value::Map(_) => Err(refuse("a list of texts".into())),
        },
        Plain::Opaque => Ok(false),
    }
}

/// A node's type, in words that hold nothing of its content.
pub(super) fn type_of(node: &Node) -> &'static str {
    match &node.value {
        Value::Null => "nothing",
        Value::List(_) => "a list",
        Value::Map(_) => "a mapping",
        Value::Scalar(scalar) if scalar.quoted => "a text in quotes",
        Value::Scalar(_) if truth(node).is_some() => "a truth value",
        Value::Scalar(_) if number(node).is_some() => "a number",
        Value::Scalar(_) => "a text",
    }
}

/// A text for a message: on one line, without control characters, and not too long.
pub(super) fn quote(text: &str) -> String {
    const SHOWN: usize = 64;
    let shown: String = text.chars().take(SHOWN).collect();
    let rest = if text.chars().nth(SHOWN).is_some() { "..." } else { "" };
    format!("\"{}{rest}\"", shown.escape_debug())
}

const ALIAS_RANGE_V4: &str = "a network of IPv4 from /8 to /28 such as 198.18.0.0/16";
const ALIAS_RANGE_V6: &str = "a network of IPv6 from /32 to /112 such as fd6d:e54a:1a5e:a11a::/64";
const PATH: &str = "an absolute path";
const OPTIONAL_PATH: &str = "an absolute path, or \"\"";
const LISTEN: &str = "IP:PORT such as 127.0.0.1:20008 or [::1]:20008, or \"\" for none";
const INTERFACE: &str = "a device name of 1 to 15 bytes without '/', ':', '%' or white space";
const URL: &str = "an http:// or https:// URL such as https://10.0.0.1:6443, without user and query, or \"\"";

fn given(node: &Node, expected: &'static str) -> Refusal {
    let problem = match &node.value {
        Value::Scalar(scalar) => format!("given {} {}", type_of(node), quote(&scalar.text)),
        Value::Null | Value::List(_) | Value::Map(_) => format!("given {}", type_of(node)),
    };
    Refusal { problem, expected: expected.into() }
}

/// As [`given`], with nothing of the text.
fn unnamed(node: &Node, expected: &'static str) -> Refusal {
    Refusal { problem: format!("given {}", type_of(node)), expected: expected.into() }
}

fn wrong(text: &str, expected: &'static str) -> Refusal {
    Refusal { problem: format!("given {}", quote(text)), expected: expected.into() }
}

fn one_of<'a>(choices: impl Iterator<Item = &'a str>) -> Cow<'static, str> {
    choices.collect::<Vec<_>>().join(" or ").into()
}

fn plain(node: &Node) -> Option<&str> {
    match &node.value {
        Value::Scalar(Scalar { text, quoted: false }) => Some(text),
        Value::Scalar(_) | Value::Null | Value::List(_) | Value::Map(_) => None,
    }
}

/// The truth values of YAML 1.1, which EdgeMesh's YAML library reads.
fn truth(node: &Node) -> Option<bool> {
    match plain(node)? {
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" | "y" | "Y" => Some(true),
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" | "n" | "N" => Some(false),
        _ => None,
    }
}

/// Text, in quotes or not. A number may be meant as text (a node may be named 7); a truth value hardly ever.
fn words(node: &Node) -> Option<&str> {
    match &node.value {
        Value::Scalar(scalar) if truth(node).is_none() => Some(&scalar.text),
        Value::Scalar(_) | Value::Null | Value::List(_) | Value::Map(_) => None,
    }
}

fn text<'a>(node: &'a Node, expected: &'static str) -> Result<&'a str, Refusal> {
    words(node).ok_or_else(|| given(node, expected))
}

/// A number, also with a fraction or an exponent, as Helm prints large ones (`1e+06`).
fn number(node: &Node) -> Option<f64> {
    let text = plain(node)?;
    // Rust would also read "inf", "nan" and their like.
    text.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b)).then(|| text.parse().ok())?
}

/// A whole number. A leading zero is octal to EdgeMesh's library and nothing to YAML 1.2, so it is refused.
fn whole(node: &Node) -> Option<i64> {
    let text = plain(node)?;
    let digits = text.trim_start_matches(['+', '-']);
    if digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().or_else(|| {
        // Up to here a double holds every whole number.
        let number = number(node).filter(|v| v.fract() == 0.0 && v.abs() <= 9_007_199_254_740_992.0)?;
        Some(number as i64)
    })
}

fn count(node: &Node) -> Result<u32, Refusal> {
    whole(node)
        .and_then(|v| u32::try_from(v).ok())
        .filter(|v| *v > 0)
        .ok_or_else(|| given(node, "a whole number from 1 to 4294967295"))
}

fn limit(node: &Node) -> Result<u32, Refusal> {
    let limit = whole(node).and_then(|v| u32::try_from(v).ok());
    limit.ok_or_else(|| given(node, "a whole number from 0 to 4294967295"))
}

fn period(node: &Node) -> Result<Duration, Refusal> {
    whole(node)
        .and_then(|v| u64::try_from(v).ok())
        .filter(|v| *v <= MAX_PERIOD)
        .map(Duration::from_secs)
        .ok_or_else(|| given(node, "a whole number of seconds from 0, which switches it off, to 86400"))
}

/// What `dev_valid_name` of the kernel takes, less '%', which the kernel would replace by a number.
fn interface(node: &Node) -> Result<String, Refusal> {
    let name = text(node, INTERFACE)?;
    let fits = (1..=MAX_INTERFACE).contains(&name.len()) && name != "." && name != "..";
    if fits && !name.contains(|c: char| matches!(c, '/' | ':' | '%') || c.is_whitespace() || c.is_control()) {
        Ok(name.to_owned())
    } else {
        Err(wrong(name, INTERFACE))
    }
}

fn interfaces(node: &Node) -> Result<Vec<String>, Refusal> {
    const EXPECTED: &str = "a list of names of interfaces, such as [eth0, 'tap*']";
    match &node.value {
        Value::List(items) => items.iter().map(interface).collect(),
        Value::Null | Value::Scalar(_) | Value::Map(_) => Err(given(node, EXPECTED)),
    }
}

fn network(node: &Node, expected: &'static str) -> Result<IpPrefix, Refusal> {
    let text = text(node, expected)?;
    text.parse().map_err(|_| wrong(text, expected))
}

fn networks(node: &Node) -> Result<Vec<IpPrefix>, Refusal> {
    const EXPECTED: &str = "a list of networks, such as [10.0.0.0/8, 'fd00::/8']";
    match &node.value {
        Value::List(items) => items.iter().map(|item| network(item, EXPECTED)).collect(),
        Value::Null | Value::Scalar(_) | Value::Map(_) => Err(given(node, EXPECTED)),
    }
}

/// A range that hosts can have addresses from.
fn alias_range(
    node: &Node,
    expected: &'static str,
    family: impl Fn(IpAddr) -> bool,
    lengths: RangeInclusive<u8>,
) -> Result<IpPrefix, Refusal> {
    let range = network(node, expected)?;
    let first = range.network();
    let special = first.is_loopback() || first.is_multicast() || first.is_unspecified();
    if family(first) && lengths.contains(&range.length()) && !special {
        Ok(range)
    } else {
        Err(wrong(&range.to_string(), expected))
    }
}

fn ip(node: &Node) -> Result<IpAddr, Refusal> {
    const EXPECTED: &str = "an IP address such as 169.254.96.16";
    let text = text(node, EXPECTED)?;
    let ip: IpAddr = text.parse().map_err(|_| wrong(text, EXPECTED))?;
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    if ip.is_unspecified() || ip.is_multicast() || broadcast {
        return Err(wrong(text, "the address of one host"));
    }
    Ok(ip)
}

fn optional_ipv6(node: &Node) -> Result<Option<Ipv6Addr>, Refusal> {
    const EXPECTED: &str = "an IPv6 address of one host such as fd00:169:254:96::16, or \"\"";
    let text = text(node, EXPECTED)?;
    if text.is_empty() {
        return Ok(None);
    }
    let ip =
        text.parse::<Ipv6Addr>().ok().filter(|ip| !ip.is_unspecified() && !ip.is_multicast() && !is_link_local(ip));
    ip.map(Some).ok_or_else(|| wrong(text, EXPECTED))
}

/// An address of fe80::/10 says nothing without an interface.
fn is_link_local(ip: &Ipv6Addr) -> bool {
    ip.segments().first().is_some_and(|segment| segment & 0xffc0 == 0xfe80)
}

fn port(node: &Node) -> Result<u16, Refusal> {
    let port = whole(node).and_then(|v| u16::try_from(v).ok()).filter(|v| *v > 0);
    port.ok_or_else(|| given(node, "a port from 1 to 65535"))
}

fn domain(node: &Node) -> Result<ClusterDomain, Refusal> {
    const EXPECTED: &str = "a domain such as cluster.local";
    let text = text(node, EXPECTED)?;
    text.parse().map_err(|_| wrong(text, EXPECTED))
}

fn servers(node: &Node) -> Result<Vec<SocketAddr>, Refusal> {
    const EXPECTED: &str = "a list of DNS servers, each IP or IP:PORT, such as [10.96.0.10, '[fd00::10]:53']";
    match &node.value {
        Value::List(items) => items
            .iter()
            .map(|item| {
                let text = text(item, EXPECTED)?;
                server(text).ok_or_else(|| wrong(text, EXPECTED))
            })
            .collect(),
        Value::Null | Value::Scalar(_) | Value::Map(_) => Err(given(node, EXPECTED)),
    }
}

/// An address of one host, with DNS's port unless another is given.
fn server(text: &str) -> Option<SocketAddr> {
    let address = text.parse().or_else(|_| text.parse().map(|ip| SocketAddr::new(ip, 53))).ok()?;
    let sound = !address.ip().is_unspecified() && !address.ip().is_multicast() && address.port() != 0;
    sound.then_some(address)
}

fn stub_domains(node: &Node) -> Result<Vec<StubDomain>, Refusal> {
    const EXPECTED: &str =
        "a list of mappings with domain and servers, such as {domain: corp.example, servers: [192.0.2.53]}";
    let Value::List(items) = &node.value else { return Err(given(node, EXPECTED)) };
    items
        .iter()
        .map(|item| {
            let Value::Map(entries) = &item.value else { return Err(given(item, EXPECTED)) };
            let (mut domain, mut asked) = (None, Vec::new());
            for entry in entries {
                match entry.name.to_ascii_lowercase().as_str() {
                    "domain" if domain.is_none() => {
                        let text = text(&entry.value, EXPECTED)?;
                        // Only to see that it is one.
                        let sound = text.parse::<ClusterDomain>().map_err(|_| wrong(text, EXPECTED))?;
                        domain = Some(sound.to_string());
                    }
                    "servers" if asked.is_empty() => asked = servers(&entry.value)?,
                    _ => return Err(wrong(&entry.name, EXPECTED)),
                }
            }
            match domain {
                Some(domain) if !asked.is_empty() => Ok(StubDomain { domain, servers: asked }),
                _ => Err(given(item, EXPECTED)),
            }
        })
        .collect()
}

fn listen(node: &Node) -> Result<Option<SocketAddr>, Refusal> {
    match text(node, LISTEN)? {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|_| wrong(text, LISTEN)),
    }
}

fn path(text: &str, expected: &'static str) -> Result<PathBuf, Refusal> {
    if Path::new(text).is_absolute() && !text.contains(char::is_control) {
        Ok(PathBuf::from(text))
    } else {
        Err(wrong(text, expected))
    }
}

fn unix_socket(node: &Node) -> Result<PathBuf, Refusal> {
    const EXPECTED: &str = "an absolute path of at most 107 bytes that does not end in '/'";
    let text = text(node, EXPECTED)?;
    if text.len() > MAX_SOCKET_PATH || text.ends_with('/') {
        return Err(wrong(text, EXPECTED));
    }
    path(text, EXPECTED)
}

fn url(node: &Node) -> Result<Option<String>, Refusal> {
    let text = text(node, URL)?;
    if text.is_empty() {
        return Ok(None);
    }
    let sound = text.parse::<Uri>().is_ok_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty())
    });
    // A password or a token stands before an @ or in a query, and must not reach the log.
    match (sound, text.contains(['@', '?'])) {
        (true, false) => Ok(Some(text.to_owned())),
        (false, false) => Err(wrong(text, URL)),
        (_, true) => Err(Refusal { problem: "given a URL with a user or a query".to_owned(), expected: URL.into() }),
    }
}

fn filter(node: &Node) -> Result<ServiceFilter, Refusal> {
    const EXPECTED: &str = "FilterIfLabelExists or FilterIfLabelDoesNotExists";
    let word = text(node, EXPECTED)?;
    // EdgeMesh's spelling, and the one a user would take for right.
    let word = if word == "FilterIfLabelDoesNotExist" { "FilterIfLabelDoesNotExists" } else { word };
    FILTERS.iter().find(|(name, _)| *name == word).map(|(_, mode)| *mode).ok_or_else(|| wrong(word, EXPECTED))
}

fn dataplane(node: &Node) -> Result<DataplaneMode, Refusal> {
    const EXPECTED: &str = "auto or ebpf";
    let word = text(node, EXPECTED)?;
    if word == "iptables" {
        let problem = "the iptables data plane is not in this version".to_owned();
        return Err(Refusal { problem, expected: EXPECTED.into() });
    }
    DATAPLANES.iter().find(|(name, _)| *name == word).map(|(_, mode)| *mode).ok_or_else(|| wrong(word, EXPECTED))
}

fn source(node: &Node) -> Result<SourceChoice, Refusal> {
    const EXPECTED: &str = "auto, inCluster or metaServer";
    let word = text(node, EXPECTED)?;
    SOURCES.iter().find(|(name, _)| *name == word).map(|(_, choice)| *choice).ok_or_else(|| wrong(word, EXPECTED))
}

const RELAY_NODES: &str = "a list of mappings with nodeName and advertiseAddress, such as {nodeName: cloud1, \
                           advertiseAddress: [203.0.113.7]}";

/// The relays, each once. One without an address counts, as it does for EdgeMesh: nodes of its LAN find it anyway.
fn relay_nodes(node: &Node) -> Result<Vec<RelayNode>, Refusal> {
    let Value::List(items) = &node.value else { return Err(unnamed(node, "a list of mappings")) };
    let mut relays: Vec<RelayNode> = Vec::new();
    for item in items {
        let Value::Map(entries) = &item.value else { return Err(given(item, RELAY_NODES)) };
        let (mut name, mut addresses) = (None, Vec::new());
        for entry in entries {
            match entry.name.to_ascii_lowercase().as_str() {
                "nodename" => {
                    let text = text(&entry.value, RELAY_NODES)?;
                    name = Some(text.parse::<NodeName>().map_err(|_| wrong(text, "the name of a node"))?);
                }
                "advertiseaddress" => addresses = relay_addresses(&entry.value)?,
                // Said of it elsewhere.
                _ => {}
            }
        }
        let name = name.ok_or_else(|| given(item, RELAY_NODES))?;
        match relays.iter_mut().find(|relay| relay.node == name) {
            Some(known) => known.addresses.extend(addresses),
            None => relays.push(RelayNode { node: name, addresses }),
        }
    }
    Ok(relays)
}

fn relay_addresses(node: &Node) -> Result<Vec<RelayAddress>, Refusal> {
    const EXPECTED: &str = "a list of IP addresses or DNS names, each with :PORT if it is not 20006, such as \
                            [203.0.113.7, relay.example.org:443, '[2001:db8::7]:20006']";
    match &node.value {
        Value::Null => Ok(Vec::new()),
        Value::List(items) => items
            .iter()
            .map(|item| {
                let text = text(item, EXPECTED)?;
                text.parse().map_err(|_| wrong(text, EXPECTED))
            })
            .collect(),
        Value::Scalar(_) | Value::Map(_) => Err(given(node, EXPECTED)),
    }
}

fn serve_relay(node: &Node) -> Result<ServeRelay, Refusal> {
    const EXPECTED: &str = "whenListed, whenPublic or always";
    let word = text(node, EXPECTED)?;
    SERVE_RELAY.iter().find(|(name, _)| *name == word).map(|(_, when)| *when).ok_or_else(|| wrong(word, EXPECTED))
}

fn targets(node: &Node) -> Result<Vec<AllowedTarget>, Refusal> {
    const EXPECTED: &str = "a list of HOST:PORT, such as ['node:22', '192.168.1.0/24:554', '[fd00::7]:*']";
    match &node.value {
        Value::List(items) => items
            .iter()
            .map(|item| {
                let text = text(item, EXPECTED)?;
                text.parse().map_err(|_| wrong(text, EXPECTED))
            })
            .collect(),
        Value::Null | Value::Scalar(_) | Value::Map(_) => Err(given(node, EXPECTED)),
    }
}

fn sockets(node: &Node) -> Result<Vec<SocketAddr>, Refusal> {
    const EXPECTED: &str = "a list of IP:PORT, such as ['203.0.113.7:20006', '[2001:db8::7]:20006']";
    match &node.value {
        Value::List(items) => items
            .iter()
            .map(|item| {
                let text = text(item, EXPECTED)?;
                let usable = |address: &SocketAddr| address.port() != 0 && !address.ip().is_unspecified();
                text.parse().ok().filter(usable).ok_or_else(|| wrong(text, EXPECTED))
            })
            .collect(),
        Value::Null | Value::Scalar(_) | Value::Map(_) => Err(given(node, EXPECTED)),
    }
}

/// A PeerId consists of characters that names of nodes may have, too.
fn peers(node: &Node) -> Result<Vec<String>, Refusal> {
    const EXPECTED: &str = "a list of names of nodes or PeerIds, such as [edge1, cloud1]";
    match &node.value {
        Value::List(items) => items
            .iter()
            .map(|item| {
                let text = text(item, EXPECTED)?;
                text.parse::<NodeName>().map(|name| name.to_string()).map_err(|_| wrong(text, EXPECTED))
            })
            .collect(),
        Value::Null | Value::Scalar(_) | Value::Map(_) => Err(given(node, EXPECTED)),
    }
}
