//! Domain names as messages carry them: labels, each after its length, and a zero.

use std::{
    fmt::{self, Display, Formatter},
    str::FromStr,
};

/// The longest name, its lengths and the zero included (RFC 1035 2.3.4).
pub const MAX_NAME: usize = 255;
/// The longest label.
const MAX_LABEL: usize = 63;

/// A name in its wire form, uncompressed and well-formed. On the stack, so that a query costs no allocation.
#[derive(Clone, Copy)]
pub struct Name {
    octets: [u8; MAX_NAME],
    len: u8,
}

/// Why a text is no name.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NameError {
    #[error("a label is empty; expected a name such as web.default.svc.cluster.local")]
    Empty,
    #[error("a label is longer than 63 bytes")]
    LongLabel,
    #[error("the name is longer than 255 bytes")]
    Long,
    #[error("a backslash is not followed by a character or by three digits up to 255")]
    Escape,
}

impl Name {
    /// The root, from which names are made.
    pub(super) fn root() -> Self {
        Self { octets: [0; MAX_NAME], len: 1 }
    }

    /// The wire form, with the zero at its end.
    pub fn as_wire(&self) -> &[u8] {
        self.octets.get(..usize::from(self.len)).unwrap_or(&[0])
    }

    /// Takes a wire form, which has to be the whole of `wire`; None if it is none.
    pub fn from_wire(wire: &[u8]) -> Option<Self> {
        let mut name = Self::root();
        let mut rest = wire;
        loop {
            let (length, after) = rest.split_first()?;
            if *length == 0 {
                return after.is_empty().then_some(name);
            }
            let (label, after) = after.split_at_checked(usize::from(*length))?;
            name.push(label)?;
            rest = after;
        }
    }

    /// A name from its first label, with its length (or nothing), and a wire form for the rest; both are trusted to be well-formed. None
    /// if it would be too long.
    pub(in crate::dns) fn of_parts(first: &[u8], rest: &[u8]) -> Option<Self> {
        let mut name = Self::root();
        let end = first.len() + rest.len();
        name.len = u8::try_from(end).ok().filter(|length| *length > 0)?;
        name.octets.get_mut(..first.len())?.copy_from_slice(first);
        name.octets.get_mut(first.len()..end)?.copy_from_slice(rest);
        Some(name)
    }

    /// The same name in lower case (ASCII alone, RFC 4343).
    pub fn lowered(mut self) -> Self {
        // A length is at most 63 and so no letter.
        self.octets.make_ascii_lowercase();
        self
    }

    /// Adds a label before the zero; None if it is empty or too long, or the name would be.
    pub(super) fn push(&mut self, label: &[u8]) -> Option<()> {
        let at = usize::from(self.len).checked_sub(1)?;
        if label.is_empty() || label.len() > MAX_LABEL {
            return None;
        }
        let end = at + 1 + label.len();
        let len = u8::try_from(end + 1).ok()?;
        self.octets.get_mut(at + 1..end)?.copy_from_slice(label);
        *self.octets.get_mut(end)? = 0;
        *self.octets.get_mut(at)? = u8::try_from(label.len()).ok()?;
        self.len = len;
        Some(())
    }
}

/// The labels of a well-formed wire name, without the root's; ends early on anything else.
pub fn labels(wire: &[u8]) -> impl Iterator<Item = &[u8]> + Clone {
    let mut rest = wire;
    std::iter::from_fn(move || {
        let (length, after) = rest.split_first()?;
        let (label, after) = after.split_at_checked(usize::from(*length)).filter(|(label, _)| !label.is_empty())?;
        rest = after;
        Some(label)
    })
}

impl FromStr for Name {
    type Err = NameError;

    /// Reads the form of zone files (RFC 1035 5.1), with or without the dot at the end.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let mut name = Self::root();
        if text == "." {
            return Ok(name);
        }
        let mut label = Vec::new();
        let mut bytes = text.bytes();
        let mut open = true;
        while let Some(byte) = bytes.next() {
            open = byte != b'.';
            match byte {
                b'.' => name.take(&mut label)?,
                b'\\' => label.push(unescape(&mut bytes)?),
                byte => label.push(byte),
            }
        }
        if open {
            name.take(&mut label)?;
        }
        Ok(name)
    }
}

impl Name {
    fn take(&mut self, label: &mut Vec<u8>) -> Result<(), NameError> {
        if label.is_empty() {
            return Err(NameError::Empty);
        }
        if label.len() > MAX_LABEL {
            return Err(NameError::LongLabel);
        }
        self.push(label).ok_or(NameError::Long)?;
        label.clear();
        Ok(())
    }
}

fn unescape(bytes: &mut impl Iterator<Item = u8>) -> Result<u8, NameError> {
    let first = bytes.next().ok_or(NameError::Escape)?;
    if !first.is_ascii_digit() {
        return Ok(first);
    }
    let mut value = u16::from(first - b'0');
    for _ in 0..2 {
        let digit = bytes.next().filter(u8::is_ascii_digit).ok_or(NameError::Escape)?;
        value = value * 10 + u16::from(digit - b'0');
    }
    u8::try_from(value).map_err(|_| NameError::Escape)
}

impl Display for Name {
    /// The form of zone files, with the dot at the end.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if self.len == 1 {
            return f.write_str(".");
        }
        for label in labels(self.as_wire()) {
            for byte in label {
                match byte {
                    b'.' | b'\\' | b'"' | b';' | b'(' | b')' | b'@' | b'$' => write!(f, "\\{}", char::from(*byte))?,
                    0x21..=0x7e => write!(f, "{}", char::from(*byte))?,
                    _ => write!(f, "\\{byte:03}")?,
                }
            }
            f.write_str(".")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.as_wire() == other.as_wire()
    }
}

impl Eq for Name {}
