use std::{
    fmt::{self, Write as _},
    hash::{Hash, Hasher},
};

/// The longest name on the wire, its root label included (RFC 1035 section 2.3.4).
const MAX_NAME: usize = 255;
/// Type and flags.
const SUFFIX: usize = 3;

/// What is asked, of class IN, as the cache tells questions apart. A plain value: making, copying and looking one up
/// allocates nothing.
#[derive(Clone, Copy)]
pub struct Question {
    /// The name, the type in network order, then the flags.
    bytes: [u8; MAX_NAME + SUFFIX],
    length: u16,
}

impl Question {
    /// The question for `name`, uncompressed and with its root label, in any case; None where that is no name.
    pub fn new(name: &[u8], qtype: u16, dnssec_ok: bool, checking_disabled: bool) -> Option<Self> {
        if !is_name(name) {
            return None;
        }
        let mut bytes = [0; MAX_NAME + SUFFIX];
        let end = name.len();
        let lower = bytes.get_mut(..end)?;
        lower.copy_from_slice(name);
        // Lengths of labels are below the letters.
        lower.make_ascii_lowercase();
        let [high, low] = qtype.to_be_bytes();
        let flags = u8::from(dnssec_ok) | u8::from(checking_disabled) << 1;
        bytes.get_mut(end..end + SUFFIX)?.copy_from_slice(&[high, low, flags]);
        Some(Self { bytes, length: u16::try_from(end + SUFFIX).ok()? })
    }

    /// In lower case, on the wire's form, with the root label.
    pub fn name(&self) -> &[u8] {
        let key = self.key();
        key.get(..key.len() - SUFFIX).unwrap_or_default()
    }

    /// The number of the record type.
    pub fn qtype(&self) -> u16 {
        match self.suffix() {
            [high, low, _] => u16::from_be_bytes([*high, *low]),
            _ => 0,
        }
    }

    /// Whether signatures are wanted (RFC 3225).
    pub fn dnssec_ok(&self) -> bool {
        self.flags() & 1 != 0
    }

    /// Whether the asker checks signatures itself (RFC 4035 section 3.2.2).
    pub fn checking_disabled(&self) -> bool {
        self.flags() & 2 != 0
    }

    /// All of it as bytes: equal for equal questions alone.
    pub(super) fn key(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.length)).unwrap_or(&self.bytes)
    }

    fn suffix(&self) -> &[u8] {
        let key = self.key();
        key.get(key.len() - SUFFIX..).unwrap_or_default()
    }

    fn flags(&self) -> u8 {
        self.suffix().last().copied().unwrap_or(0)
    }
}

impl PartialEq for Question {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Question {}

impl Hash for Question {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl fmt::Debug for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} TYPE{}", NameText(self.name()), self.qtype())?;
        f.write_str(if self.dnssec_ok() { " DO" } else { "" })?;
        f.write_str(if self.checking_disabled() { " CD" } else { "" })
    }
}

/// Prints a name in its usual form, without the dot at the end; the root is `.`.
pub(super) struct NameText<'a>(pub(super) &'a [u8]);

impl fmt::Display for NameText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0;
        if rest.first().is_none_or(|&length| length == 0) {
            return f.write_char('.');
        }
        let mut first = true;
        while let Some((&length, tail)) = rest.split_first()
            && length > 0
            && let Some((label, tail)) = tail.split_at_checked(usize::from(length))
        {
            if !std::mem::take(&mut first) {
                f.write_char('.')?;
            }
            for &byte in label {
                match byte {
                    b'.' | b'\\' => write!(f, "\\{}", char::from(byte))?,
                    b'!'..=b'~' => f.write_char(char::from(byte))?,
                    // RFC 1035 section 5.1.
                    _ => write!(f, "\\{byte:03}")?,
                }
            }
            rest = tail;
        }
        Ok(())
    }
}

/// The wire's form of a name written with dots, in lower case; None where it is no name. Knows no escapes.
pub(super) fn wire_name(text: &str) -> Option<Box<[u8]>> {
    let text = text.strip_suffix('.').unwrap_or(text);
    let mut wire = Vec::with_capacity(text.len() + 2);
    for label in text.split('.').filter(|_| !text.is_empty()) {
        wire.push(u8::try_from(label.len()).ok().filter(|length| (1..=63).contains(length))?);
        wire.extend(label.bytes().map(|byte| byte.to_ascii_lowercase()));
    }
    wire.push(0);
    (wire.len() <= MAX_NAME).then(|| wire.into())
}

/// Whether a name, in lower case, is `domain` or below it.
pub(super) fn within(name: &[u8], domain: &[u8]) -> bool {
    let mut rest = name;
    while rest.len() > domain.len() {
        let Some((&length, tail)) = rest.split_first() else { return false };
        let Some(tail) = tail.get(usize::from(length)..) else { return false };
        rest = tail;
    }
    rest == domain
}

fn is_name(name: &[u8]) -> bool {
    let mut rest = name;
    name.len() <= MAX_NAME
        && loop {
            match rest.split_first() {
                Some((0, tail)) => break tail.is_empty(),
                Some((&length, tail)) if length <= 63 && tail.len() > usize::from(length) => {
                    rest = tail.get(usize::from(length)..).unwrap_or_default();
                }
                _ => break false,
            }
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differ_by_name_type_and_flags_and_not_by_case() {
        let question = |name: &str, qtype, dnssec, disabled| {
            let mut wire = wire_name(name).unwrap();
            wire.iter_mut().skip(1).for_each(|byte| byte.make_ascii_uppercase());
            Question::new(&wire, qtype, dnssec, disabled).unwrap()
        };
        let it = question("www.example.com", 28, true, false);
        assert_eq!(it, Question::new(&wire_name("www.EXAMPLE.com.").unwrap(), 28, true, false).unwrap());
        assert_eq!((it.qtype(), it.dnssec_ok(), it.checking_disabled()), (28, true, false));
        assert_eq!(it.name(), b"\x03www\x07example\x03com\0");
        assert_eq!(format!("{it:?}"), "www.example.com TYPE28 DO");
        for other in [
            question("example.com", 28, true, false),
            question("www.example.com", 1, true, false),
            question("www.example.com", 28, false, false),
            question("www.example.com", 28, true, true),
        ] {
            assert_ne!(it, other);
        }
    }

    #[test]
    fn what_is_no_name_is_no_question() {
        let long: Vec<u8> = [&[63; 64][..]; 4].concat().into_iter().chain([0]).collect();
        let no_root = b"\x03www".to_vec();
        for name in [&long[..], &no_root, b"", b"\x04www\0", b"\xc0\x0c", b"\0\0", &[&[64; 65][..], &[0]].concat()] {
            assert!(Question::new(name, 1, false, false).is_none(), "{name:?}");
        }
        let longest: Vec<u8> = [&[63; 64][..], &[63; 64], &[63; 64], &[61; 62], &[0]].concat();
        assert_eq!(longest.len(), 255);
        assert_eq!(Question::new(&longest, 1, true, true).unwrap().name().len(), 255);
        assert!(wire_name("a..b").is_none() && wire_name(&"a".repeat(64)).is_none());
        assert_eq!(*wire_name(".").unwrap(), [0]);
    }

    #[test]
    fn a_domain_holds_itself_and_what_is_below() {
        let within = |name, domain| within(&wire_name(name).unwrap(), &wire_name(domain).unwrap());
        assert!(within("corp.example", "corp.example") && within("a.b.corp.example", "corp.example"));
        assert!(within("anything", ".") && within(".", "."));
        assert!(!within("acorp.example", "corp.example") && !within("example", "corp.example"));
        assert!(!within("corp.example.org", "corp.example"));
    }

    #[test]
    fn odd_bytes_of_a_name_are_printed_escaped() {
        assert_eq!(NameText(b"\x04a.b\x07\x01c\0").to_string(), "a\\.b\\007.c");
        assert_eq!(NameText(b"\0").to_string(), ".");
    }
}
