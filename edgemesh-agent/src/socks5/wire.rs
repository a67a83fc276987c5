//! What client and server say to each other: RFC 1928, and RFC 1929 for user names.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use tokio::io::{AsyncRead, AsyncReadExt};

use super::Failure;

const VERSION: u8 = 5;
/// Of the negotiation of user name and password (RFC 1929).
const AUTH_VERSION: u8 = 1;
/// Method: none.
pub(super) const NO_AUTH: u8 = 0;
/// Method: user name and password.
pub(super) const PASSWORD: u8 = 2;
/// No method is acceptable.
pub(super) const NO_METHOD: u8 = 0xff;

const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;
/// The longest address with its type and port: a name of 255 bytes.
const MAX_ADDRESS: usize = 1 + 1 + 255 + 2;

/// What is asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Command {
    Connect,
    Associate,
}

/// Where to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Destination {
    pub(super) host: Host,
    pub(super) port: u16,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Host {
    /// Canonical.
    Ip(IpAddr),
    /// In lower case, without a final dot; letters, digits, `-`, `_` and `.`.
    Name(Box<str>),
    /// Bytes that are no name.
    Nonsense,
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip @ IpAddr::V6(_)) => write!(f, "[{ip}]:{}", self.port),
            Host::Ip(ip) => write!(f, "{ip}:{}", self.port),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
            Host::Nonsense => write!(f, "?:{}", self.port),
        }
    }
}

impl Host {
    fn named(bytes: &[u8]) -> Self {
        let Ok(text) = str::from_utf8(bytes) else { return Self::Nonsense };
        // Clients that leave resolving to the proxy leave this to it as well.
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        if let Ok(ip) = bare.parse::<IpAddr>() {
            return Self::Ip(ip.to_canonical());
        }
        let name = text.strip_suffix('.').unwrap_or(text);
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if name.is_empty() || !name.bytes().all(legal) {
            return Self::Nonsense;
        }
        Self::Name(name.to_ascii_lowercase().into())
    }
}

/// The methods that a client offers.
pub(super) async fn read_methods(stream: &mut (impl AsyncRead + Unpin)) -> Result<Vec<u8>, Failure> {
    let [version, count] = read(stream).await?;
    if version != VERSION {
        return Err(Failure::Garbage(match version {
            4 => "it speaks SOCKS version 4",
            b'A'..=b'Z' => "it speaks HTTP, perhaps",
            _ => "it does not speak SOCKS version 5",
        }));
    }
    let mut methods = vec![0; usize::from(count)];
    stream.read_exact(&mut methods).await.map_err(Failure::cut_off)?;
    Ok(methods)
}

/// The answer to the methods.
pub(super) fn method(method: u8) -> [u8; 2] {
    [VERSION, method]
}

/// User name and password.
pub(super) async fn read_login(stream: &mut (impl AsyncRead + Unpin)) -> Result<(Vec<u8>, Vec<u8>), Failure> {
    let [version] = read(stream).await?;
    if version != AUTH_VERSION {
        return Err(Failure::Garbage("its user name is not as RFC 1929 has it"));
    }
    let mut texts = [Vec::new(), Vec::new()];
    for text in &mut texts {
        let [length] = read(stream).await?;
        text.resize(usize::from(length), 0);
        stream.read_exact(text).await.map_err(Failure::cut_off)?;
    }
    let [user, password] = texts;
    Ok((user, password))
}

/// The answer to them.
pub(super) fn login(accepted: bool) -> [u8; 2] {
    [AUTH_VERSION, u8::from(!accepted)]
}

/// A request, and not a byte of what follows it.
pub(super) async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> Result<(Command, Destination), Failure> {
    let [version, command, _reserved, kind] = read(stream).await?;
    if version != VERSION {
        return Err(Failure::Garbage("its request is not as RFC 1928 has it"));
    }
    let mut address = [0; MAX_ADDRESS];
    address[0] = kind;
    // What is behind the type: how much has been read, and how much there is.
    let (had, length) = match kind {
        IPV4 => (0, 4),
        IPV6 => (0, 16),
        NAME => {
            let [length] = read(stream).await?;
            address[1] = length;
            (1, 1 + usize::from(length))
        }
        // How long it is nobody knows.
        other => return Err(Failure::AddressType(other)),
    };
    let all = 1 + length + 2;
    if let Some(rest) = address.get_mut(1 + had..all) {
        stream.read_exact(rest).await.map_err(Failure::cut_off)?;
    }
    let parsed = address.get(..all).and_then(parse_address);
    let (destination, _) = parsed.ok_or(Failure::Garbage("its address is not as RFC 1928 has it"))?;
    match command {
        1 => Ok((Command::Connect, destination)),
        3 => Ok((Command::Associate, destination)),
        other => Err(Failure::Command(other)),
    }
}

/// An answer to a request with the address that a client of UDP sends to; else, that address says nothing.
pub(super) fn reply(code: u8, bound: Option<(IpAddr, u16)>) -> Vec<u8> {
    let (ip, port) = bound.unwrap_or_else(|| (Ipv4Addr::UNSPECIFIED.into(), 0));
    let mut reply = vec![VERSION, code, 0];
    match ip {
        IpAddr::V4(ip) => {
            reply.push(IPV4);
            reply.extend(ip.octets());
        }
        IpAddr::V6(ip) => {
            reply.push(IPV6);
            reply.extend(ip.octets());
        }
    }
    reply.extend(port.to_be_bytes());
    reply
}

/// Bytes before the address of a datagram: reserved, and the number of the fragment.
pub(super) const DATAGRAM_PREFIX: usize = 3;

/// The destination of a datagram, and where its payload begins; None for what is none, and for fragments: they are not put
/// together, which RFC 1928 leaves to the server.
pub(super) fn parse_datagram(datagram: &[u8]) -> Option<(Destination, usize)> {
    let ([0, 0, 0], rest) = datagram.split_first_chunk::<DATAGRAM_PREFIX>()? else { return None };
    let (destination, length) = parse_address(rest)?;
    Some((destination, DATAGRAM_PREFIX + length))
}

/// An address with its type and port, and how long it is.
fn parse_address(bytes: &[u8]) -> Option<(Destination, usize)> {
    let (&kind, rest) = bytes.split_first()?;
    let (host, used, rest) = match kind {
        IPV4 => {
            let (octets, rest) = rest.split_first_chunk::<4>()?;
            (Host::Ip(Ipv4Addr::from(*octets).into()), 4, rest)
        }
        IPV6 => {
            let (octets, rest) = rest.split_first_chunk::<16>()?;
            (Host::Ip(IpAddr::V6(Ipv6Addr::from(*octets)).to_canonical()), 16, rest)
        }
        NAME => {
            let (&length, rest) = rest.split_first()?;
            let (name, rest) = rest.split_at_checked(usize::from(length))?;
            (Host::named(name), 1 + usize::from(length), rest)
        }
        _ => return None,
    };
    let port = u16::from_be_bytes(*rest.first_chunk::<2>()?);
    Some((Destination { host, port }, 1 + used + 2))
}

async fn read<const N: usize>(stream: &mut (impl AsyncRead + Unpin)) -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await.map_err(Failure::cut_off)?;
    Ok(bytes)
}

impl Failure {
    fn cut_off(error: io::Error) -> Self {
        Self::CutOff(error.kind())
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use proptest::prelude::*;

    use super::*;

    fn ready<T>(future: impl Future<Output = T>) -> T {
        future.now_or_never().expect("nothing in memory has to be waited for")
    }

    fn request(bytes: &[u8]) -> Result<(Command, String), Failure> {
        let mut rest = bytes;
        ready(read_request(&mut rest)).map(|(command, destination)| {
            assert_eq!(rest, b"rest", "what follows belongs to the connection");
            (command, destination.to_string())
        })
    }

    #[test]
    fn requests_are_read_to_their_last_byte_and_no_further() {
        let name = [&[5, 1, 0, 3, 6][..], b"Edge2.", &[0, 22], b"rest"].concat();
        assert_eq!(request(&name).unwrap(), (Command::Connect, "edge2:22".to_owned()));
        let v4 = [&[5, 3, 0, 1, 10, 96, 0, 1, 0, 53][..], b"rest"].concat();
        assert_eq!(request(&v4).unwrap(), (Command::Associate, "10.96.0.1:53".to_owned()));
        let v6 = [&[5, 1, 0, 4][..], &Ipv6Addr::LOCALHOST.octets(), &[1, 0], b"rest"].concat();
        assert_eq!(request(&v6).unwrap(), (Command::Connect, "[::1]:256".to_owned()));
        let mapped = [&[5, 1, 0, 4][..], &Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets(), &[1, 0], b"rest"].concat();
        assert_eq!(request(&mapped).unwrap().1, "127.0.0.1:256");
        let text = [&[5, 1, 0, 3, 10][..], b"10.96.0.10", &[0, 80], b"rest"].concat();
        assert_eq!(request(&text).unwrap().1, "10.96.0.10:80");
    }

    #[test]
    fn what_cannot_be_done_is_told_apart_from_garbage() {
        assert!(matches!(request(&[5, 2, 0, 1, 1, 2, 3, 4, 0, 80]), Err(Failure::Command(2))));
        assert!(matches!(request(&[5, 1, 0, 7, 1]), Err(Failure::AddressType(7))));
        assert!(matches!(request(&[4, 1, 0, 80, 1, 2, 3, 4, 0]), Err(Failure::Garbage(_))));
        assert!(matches!(request(&[5, 1, 0, 3, 200, b'a']), Err(Failure::CutOff(io::ErrorKind::UnexpectedEof))));
        let methods = |mut bytes: &[u8]| ready(read_methods(&mut bytes));
        assert_eq!(methods(&[5, 2, 0, 2]).unwrap(), [0, 2]);
        let why = |bytes: &[u8]| methods(bytes).unwrap_err().to_string();
        assert!(why(&[4, 1, 0, 80]).contains("version 4"));
        assert!(why(b"GET / HTTP/1.1").contains("HTTP"));
    }

    #[test]
    fn bytes_that_are_no_name_are_none() {
        for (bytes, expected) in [
            (&b""[..], Host::Nonsense),
            (b".", Host::Nonsense),
            (b"a b", Host::Nonsense),
            (b"a\0", Host::Nonsense),
            (b"\xff", Host::Nonsense),
            (b"EDGE-1", Host::Name("edge-1".into())),
            (b"[fd00::1]", Host::Ip("fd00::1".parse().unwrap())),
        ] {
            assert_eq!(Host::named(bytes), expected, "{bytes:?}");
        }
    }

    #[test]
    fn a_fragment_is_no_datagram() {
        let datagram = [&[0, 0, 0, 3, 5][..], b"edge2", &[0, 53], b"question"].concat();
        let (destination, at) = parse_datagram(&datagram).unwrap();
        assert_eq!((&*destination.to_string(), &datagram[at..]), ("edge2:53", &b"question"[..]));
        for (place, value) in [(0, 1), (1, 1), (2, 1), (2, 0x80), (3, 2)] {
            let mut other = datagram.clone();
            other[place] = value;
            assert_eq!(parse_datagram(&other), None, "{place}");
        }
        assert_eq!(parse_datagram(&datagram[..datagram.len() - 9]), None);
    }

    #[test]
    fn logins_are_read_as_they_were_sent() {
        let mut bytes = &[&[1, 2][..], b"me", &[3], b"p\xffw"].concat()[..];
        assert_eq!(ready(read_login(&mut bytes)).unwrap(), (b"me".to_vec(), b"p\xffw".to_vec()));
        assert!(matches!(ready(read_login(&mut &[5, 0, 0][..])), Err(Failure::Garbage(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_are_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = ready(read_methods(&mut &bytes[..]));
            let _ = ready(read_login(&mut &bytes[..]));
            let _ = ready(read_request(&mut &bytes[..]));
            if let Some((_, at)) = parse_datagram(&bytes) {
                prop_assert!(at <= bytes.len());
            }
            let request = [&[5, 1, 0][..], &bytes].concat();
            let _ = ready(read_request(&mut &request[..]));
        }
    }
}
