//! Ethernet frames for the programs, made and checked by the letter of the RFCs and with nothing of the code under test.

use std::net::{IpAddr, SocketAddr};

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const SYN: u8 = 2;
pub(super) const ACK: u8 = 16;
pub(super) const RST: u8 = 4;

/// RFC 1071.
pub(super) fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn pseudo(src: IpAddr, dst: IpAddr, proto: u8, length: usize) -> Vec<u8> {
    let mut bytes = [octets(src), octets(dst)].concat();
    bytes.extend((length as u32).to_be_bytes());
    bytes.extend([0, 0, 0, proto]);
    bytes
}

/// How a frame is to be made.
#[derive(Clone, Debug)]
pub(super) struct Make {
    pub(super) src: SocketAddr,
    pub(super) dst: SocketAddr,
    pub(super) proto: u8,
    /// Of TCP.
    pub(super) flags: u8,
    pub(super) ttl: u8,
    pub(super) payload: Vec<u8>,
    /// Options of IPv4, or a destination options header of IPv6.
    pub(super) options: bool,
    /// UDP over IPv4 may do without.
    pub(super) checksum: bool,
}

impl Make {
    pub(super) fn new(src: &str, dst: &str, proto: u8) -> Self {
        let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
        let payload = b"some payload".to_vec();
        Self { src, dst, proto, flags: SYN, ttl: 64, payload, options: false, checksum: true }
    }

    fn l4(&self) -> Vec<u8> {
        let mut l4 = [self.src.port().to_be_bytes(), self.dst.port().to_be_bytes()].concat();
        let field = if self.proto == TCP {
            l4.extend(1000_u32.to_be_bytes());
            l4.extend(0_u32.to_be_bytes());
            l4.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
            16
        } else {
            l4.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            l4.extend([0, 0]);
            6
        };
        l4.extend(&self.payload);
        if self.checksum {
            let all = [pseudo(self.src.ip(), self.dst.ip(), self.proto, l4.len()), l4.clone()].concat();
            l4[field..field + 2].copy_from_slice(&(!sum(&all)).to_be_bytes());
        }
        l4
    }

    pub(super) fn frame(&self) -> Vec<u8> {
        ip(self.src.ip(), self.dst.ip(), self.proto, self.ttl, self.options, 0, &self.l4())
    }

    /// The same in two IPv4 fragments, the first with `first` bytes of payload.
    pub(super) fn fragments(&self, first: usize) -> [Vec<u8>; 2] {
        let l4 = self.l4();
        let (a, b) = l4.split_at(first);
        let fragment = |bits: u16, l4: &[u8]| ip(self.src.ip(), self.dst.ip(), self.proto, self.ttl, false, bits, l4);
        [fragment(0x2000, a), fragment((first / 8) as u16, b)]
    }

    /// An ICMP error of `from` that says `kind` and `code` of this packet.
    pub(super) fn error(&self, from: &str, kind: u8, code: u8) -> Vec<u8> {
        let from: IpAddr = from.parse().unwrap();
        let mut icmp = vec![kind, code, 0, 0, 0, 0, 5, 0];
        icmp.extend(&self.frame()[14..]);
        let proto = if from.is_ipv4() { 1 } else { 58 };
        let mut all = if from.is_ipv4() { Vec::new() } else { pseudo(from, self.src.ip(), proto, icmp.len()) };
        all.extend(&icmp);
        icmp[2..4].copy_from_slice(&(!sum(&all)).to_be_bytes());
        ip(from, self.src.ip(), proto, 64, false, 0, &icmp)
    }
}

fn ip(src: IpAddr, dst: IpAddr, proto: u8, ttl: u8, options: bool, fragment: u16, l4: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    if src.is_ipv4() {
        frame.extend([8, 0]);
        let header = if options { 24 } else { 20 };
        let mut ip = vec![0x40 | (header / 4) as u8, 0];
        ip.extend(((header + l4.len()) as u16).to_be_bytes());
        ip.extend([0x12, 0x34]);
        ip.extend(fragment.to_be_bytes());
        ip.extend([ttl, proto, 0, 0]);
        ip.extend([octets(src), octets(dst)].concat());
        // No operation, three times, and the end of the list.
        ip.extend(&[1, 1, 1, 0][..header - 20]);
        let checksum = !sum(&ip);
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        frame.extend(ip);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        let extra: &[u8] = if options { &[proto, 0, 1, 4, 0, 0, 0, 0] } else { &[] };
        frame.extend(((extra.len() + l4.len()) as u16).to_be_bytes());
        frame.extend([if options { 60 } else { proto }, ttl]);
        frame.extend([octets(src), octets(dst)].concat());
        frame.extend(extra);
    }
    frame.extend(l4);
    frame
}

/// What is in a frame whose checksums are all right.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Seen {
    pub(super) src: SocketAddr,
    pub(super) dst: SocketAddr,
    pub(super) proto: u8,
    pub(super) ttl: u8,
    /// TCP flags, or type and code of an ICMP error.
    pub(super) flags: u16,
    /// TCP's acknowledgement number.
    pub(super) acknowledged: u32,
    pub(super) payload: Vec<u8>,
    /// Whom an ICMP error is about: source and destination.
    pub(super) quoted: Option<(SocketAddr, SocketAddr)>,
}

/// Reads a frame.
///
/// # Panics
///
/// Anything in it is not as it should be.
pub(super) fn read(frame: &[u8]) -> Seen {
    let seen = read_ip(&frame[14..], true);
    assert_eq!(seen.src.is_ipv4(), frame[12..14] == [8, 0]);
    seen
}

fn read_ip(ip: &[u8], whole: bool) -> Seen {
    let (src, dst, mut proto, ttl, l4): (IpAddr, IpAddr, u8, u8, &[u8]) = if ip[0] >> 4 == 4 {
        let header = usize::from(ip[0] & 15) * 4;
        assert_eq!(sum(&ip[..header]), 0xffff, "the header's checksum");
        let at = |n: usize| IpAddr::from(<[u8; 4]>::try_from(&ip[n..n + 4]).unwrap());
        if whole {
            assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len());
        }
        (at(12), at(16), ip[9], ip[8], &ip[header..])
    } else {
        let at = |n: usize| IpAddr::from(<[u8; 16]>::try_from(&ip[n..n + 16]).unwrap());
        if whole {
            assert_eq!(usize::from(u16::from_be_bytes([ip[4], ip[5]])), ip.len() - 40);
        }
        (at(8), at(24), ip[6], ip[7], &ip[40..])
    };
    let l4 = if proto == 60 {
        proto = l4[0];
        &l4[8..]
    } else {
        l4
    };
    let mut all = if proto == 1 { Vec::new() } else { pseudo(src, dst, proto, l4.len()) };
    all.extend(l4);
    let unsummed = proto == UDP && l4[6..8] == [0, 0];
    if whole && !unsummed {
        assert_eq!(sum(&all), 0xffff, "the checksum of {proto} from {src} to {dst}");
    }
    let port = |n: usize| u16::from_be_bytes([l4[n], l4[n + 1]]);
    let mut seen = Seen {
        src: SocketAddr::new(src, 0),
        dst: SocketAddr::new(dst, 0),
        proto,
        ttl,
        flags: 0,
        acknowledged: 0,
        payload: Vec::new(),
        quoted: None,
    };
    if proto == TCP || proto == UDP {
        seen.src.set_port(port(0));
        seen.dst.set_port(port(2));
    }
    match proto {
        TCP if l4.len() >= 20 => {
            seen.flags = l4[13].into();
            seen.acknowledged = u32::from_be_bytes([l4[8], l4[9], l4[10], l4[11]]);
            seen.payload = l4[usize::from(l4[12] >> 4) * 4..].to_vec();
        }
        UDP => seen.payload = l4[8..].to_vec(),
        1 | 58 => {
            seen.flags = u16::from_be_bytes([l4[0], l4[1]]);
            let inner = read_ip(&l4[8..], false);
            seen.quoted = Some((inner.src, inner.dst));
        }
        _ => {}
    }
    seen
}
