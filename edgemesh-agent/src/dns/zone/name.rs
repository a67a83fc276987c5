//! Names in wire form (RFC 1035 section 3.1): each label behind its length, and a zero.

use std::{
    fmt::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// The longest name, in wire form.
pub(super) const MAX_NAME: usize = 255;
/// The longest label, without its length.
pub(super) const MAX_LABEL: usize = 63;
/// No name of [`MAX_NAME`] bytes has more.
const MAX_LABELS: usize = MAX_NAME / 2;
/// The longest cluster domain, in wire form: half of what there is, so that names have room below it.
const MAX_DOMAIN: usize = 128;

/// The domain under which Kubernetes publishes Services, such as `cluster.local`.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct ClusterDomain(Box<[u8]>);

impl ClusterDomain {
    /// In wire form, lower case: `b"\x07cluster\x05local\x00"`.
    pub fn as_wire(&self) -> &[u8] {
        &self.0
    }
}

impl Default for ClusterDomain {
    /// `cluster.local`, which is what clusters have that were not set up with another.
    fn default() -> Self {
        Self(b"\x07cluster\x05local\x00".as_slice().into())
    }
}

impl FromStr for ClusterDomain {
    type Err = ParseDomainError;

    /// Reads `cluster.local` or `cluster.local.`, in any case.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let domain = wire(text).filter(|domain| domain.len() <= MAX_DOMAIN);
        domain.map(Self).ok_or_else(|| ParseDomainError(text.to_owned()))
    }
}

impl fmt::Display for ClusterDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text(&self.0))
    }
}

/// A text that is no domain.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "{0:?} is not a cluster domain; expected labels of letters, digits, '-' and '_' between dots, such as \
     cluster.local, and at most 126 characters"
)]
pub struct ParseDomainError(String);

/// A name, in two parts so that the names of endpoints need not be stored.
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct Name<'z> {
    first: Label,
    rest: &'z [u8],
}

impl<'z> Name<'z> {
    /// A name below `parent`, which must leave room for it: domains, and the Services that are published, do.
    pub(super) fn below(first: Label, parent: &'z [u8]) -> Self {
        Self { first, rest: parent }
    }

    /// A name that is stored whole.
    pub(super) fn whole(name: &'z [u8]) -> Self {
        Self { first: Label::NONE, rest: name }
    }

    /// The first label with its length; empty where [`Name::rest`] is all of the name.
    pub fn first(&self) -> &[u8] {
        self.first.as_wire()
    }

    /// What follows the first label, with the terminal zero; the longest part that names of one Service share.
    pub fn rest(&self) -> &'z [u8] {
        self.rest
    }
}

impl fmt::Display for Name<'_> {
    /// Presentation form, with the final dot.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.first().is_empty() {
            write!(f, "{}.", text(self.first()))?;
        }
        write!(f, "{}.", text(self.rest))
    }
}

impl fmt::Debug for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One label, kept in place.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) struct Label([u8; 1 + MAX_LABEL]);

impl Label {
    const NONE: Self = Self([0; 1 + MAX_LABEL]);

    /// Of a text that is too long for a label, what fits into one.
    pub(super) fn of(text: &str) -> Self {
        let mut label = Self::NONE;
        let fitting = text.len().min(MAX_LABEL);
        let places = label.0.iter_mut().skip(1).zip(text.bytes().take(fitting));
        places.for_each(|(place, byte)| *place = byte);
        label.0[0] = u8::try_from(fitting).unwrap_or_default();
        label
    }

    /// The label of an endpoint that has no hostname, as CoreDNS makes it (endpointHostname in its plugin/kubernetes).
    pub(super) fn of_ip(ip: IpAddr) -> Self {
        let mut label = Self::NONE;
        // No address is as long as a label, so this never fails.
        let _ = write!(label, "{ip}");
        let length = usize::from(label.0[0]);
        for byte in label.0.iter_mut().skip(1).take(length) {
            if matches!(byte, b'.' | b':') {
                *byte = b'-';
            }
        }
        // No name may end with a dash.
        if label.as_wire().last() == Some(&b'-') {
            let _ = label.write_char('0');
        }
        label
    }

    /// With its length; empty for [`Label::NONE`].
    pub(super) fn as_wire(&self) -> &[u8] {
        match self.0[0] {
            0 => &[],
            length => self.0.get(..=usize::from(length)).unwrap_or_default(),
        }
    }
}

impl fmt::Write for Label {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let start = 1 + usize::from(self.0[0]);
        let end = start + text.len();
        self.0.get_mut(start..end).ok_or(fmt::Error)?.copy_from_slice(text.as_bytes());
        self.0[0] = u8::try_from(end - 1).map_err(|_| fmt::Error)?;
        Ok(())
    }
}

/// The address that a label like `10-244-1-2` or `fd00--1` stands for, read as CoreDNS reads it (findPods in its
/// plugin/kubernetes); `label` is without its length.
pub(super) fn dashed_ip(label: &[u8]) -> Option<IpAddr> {
    // The longest IPv6 address.
    let mut buffer = [0; 39];
    let text = buffer.get_mut(..label.len())?;
    text.copy_from_slice(label);
    let dashes = label.iter().filter(|&&byte| byte == b'-').count();
    let v4 = dashes == 3 && !label.windows(2).any(|pair| pair == b"--");
    for byte in text.iter_mut().filter(|byte| **byte == b'-') {
        *byte = if v4 { b'.' } else { b':' };
    }
    let text = str::from_utf8(text).ok()?;
    if v4 {
        return text.parse::<Ipv4Addr>().ok().map(IpAddr::V4);
    }
    text.parse::<Ipv6Addr>().ok().map(|ip| IpAddr::V6(ip).to_canonical())
}

/// Where the labels of a name begin.
pub(super) struct Labels<'n> {
    name: &'n [u8],
    starts: [u8; MAX_LABELS],
    count: usize,
}

impl<'n> Labels<'n> {
    /// None for bytes that are no uncompressed name, and for the root.
    pub(super) fn of(name: &'n [u8]) -> Option<Self> {
        if name.len() > MAX_NAME {
            return None;
        }
        let mut labels = Self { name, starts: [0; MAX_LABELS], count: 0 };
        let mut at = 0;
        loop {
            match *name.get(at)? {
                0 => return (at + 1 == name.len() && labels.count > 0).then_some(labels),
                length if usize::from(length) <= MAX_LABEL => {
                    *labels.starts.get_mut(labels.count)? = u8::try_from(at).ok()?;
                    labels.count += 1;
                    at += 1 + usize::from(length);
                }
                _ => return None,
            }
        }
    }

    /// How many labels stand before `parent`, if the name is it or below it.
    pub(super) fn before(&self, parent: &[u8]) -> Option<usize> {
        if !self.name.ends_with(parent) {
            return None;
        }
        let start = u8::try_from(self.name.len() - parent.len()).ok()?;
        self.starts.get(..self.count)?.binary_search(&start).ok()
    }

    /// Label `index` without its length, counted from the front; empty if there is none.
    pub(super) fn get(&self, index: usize) -> &'n [u8] {
        self.wire(index, index + 1).get(1..).unwrap_or_default()
    }

    /// Labels `from..to` in wire form, without a terminal zero; empty if there are none.
    pub(super) fn wire(&self, from: usize, to: usize) -> &'n [u8] {
        if from >= to || to > self.count {
            return &[];
        }
        let start = |index: usize| self.starts.get(index).map_or(0, |&start| usize::from(start));
        let end = if to == self.count { self.name.len() - 1 } else { start(to) };
        self.name.get(start(from)..end).unwrap_or_default()
    }
}

/// A name in wire form, in lower case; None for a text that is none. A dot at the end makes no difference.
pub fn wire(text: &str) -> Option<Box<[u8]>> {
    let text = text.strip_suffix('.').unwrap_or(text);
    let mut name = Vec::with_capacity(text.len() + 2);
    for label in text.split('.') {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let length = u8::try_from(label.len()).ok().filter(|&length| (1..=MAX_LABEL).contains(&usize::from(length)))?;
        if !label.bytes().all(legal) {
            return None;
        }
        name.push(length);
        name.extend(label.bytes().map(|byte| byte.to_ascii_lowercase()));
    }
    name.push(0);
    (name.len() <= MAX_NAME).then(|| name.into())
}

/// A name or label for people, without a final dot.
pub(super) fn text(name: &[u8]) -> String {
    let mut text = String::with_capacity(name.len());
    let mut rest = name;
    while let [length, tail @ ..] = rest
        && *length > 0
        && let Some((label, tail)) = tail.split_at_checked(usize::from(*length))
    {
        if !text.is_empty() {
            text.push('.');
        }
        text.extend(label.escape_ascii().map(char::from));
        rest = tail;
    }
    text
}
