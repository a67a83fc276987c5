//! Which process has a port, for messages: from the tables of procfs, as ss(8) and lsof(8) do without netlink.

use std::{
    fmt::{self, Display, Formatter},
    fs::{self, File},
    io::Read,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::MetadataExt,
    path::Path,
};

/// No more of a table is read: a node may have a million connections.
const MAX_TABLE: u64 = 16 << 20;
/// The state of a socket that listens (TCP_LISTEN), as the tables print it.
const LISTEN: &str = "0A";

/// A port of this network namespace.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Port {
    Udp(SocketAddr),
    Tcp(SocketAddr),
}

/// A process.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Holder {
    pub process: u32,
    /// The first 15 bytes of its program's name.
    pub name: String,
}

impl Display for Holder {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} (process {})", self.name, self.process)
    }
}

/// The process that has `port`, by its address or by all addresses; None where it is out of sight, such as one of another
/// PID namespace.
pub fn find(port: Port) -> Option<Holder> {
    let (tables, wanted, tcp) = match port {
        Port::Udp(address) => (["udp", "udp6"], address, false),
        Port::Tcp(address) => (["tcp", "tcp6"], address, true),
    };
    let inodes: Vec<u64> = tables
        .iter()
        .filter_map(|table| {
            let mut text = String::new();
            File::open(format!("/proc/self/net/{table}")).ok()?.take(MAX_TABLE).read_to_string(&mut text).ok()?;
            Some(text)
        })
        .flat_map(|text| inodes(&text, wanted, tcp))
        .collect();
    if inodes.is_empty() { None } else { owner(&inodes) }
}

/// The sockets in a table that are in the way of `wanted`.
fn inodes(table: &str, wanted: SocketAddr, tcp: bool) -> Vec<u64> {
    let rows = table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let local = parse_address(fields.nth(1)?)?;
        let state = fields.nth(1)?;
        let inode = fields.nth(5)?.parse().ok()?;
        let conflicts = local.port() == wanted.port()
            && (local.ip().is_unspecified() || wanted.ip().is_unspecified() || local.ip() == wanted.ip());
        (conflicts && (!tcp || state == LISTEN)).then_some(inode)
    });
    rows.collect()
}

/// `1060FEA9:0035`: words of the address as the machine has them, the port as a number.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let ip = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut octets = [0; 16];
            for (index, part) in octets.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(8 * index)?);
            }
            IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

fn owner(inodes: &[u64]) -> Option<Holder> {
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let process: u32 = entry.file_name().to_str()?.parse().ok()?;
        let has = fs::read_dir(entry.path().join("fd")).ok()?.flatten().any(|descriptor| {
            // Of a socket, that of the descriptor's file is the one of the tables.
            let link = fs::read_link(descriptor.path());
            link.is_ok_and(|link| link.to_str().is_some_and(|link| link.starts_with("socket:")))
                && fs::metadata(descriptor.path()).is_ok_and(|file| inodes.contains(&file.ino()))
        });
        has.then(|| Holder { process, name: name_of(&entry.path()) })
    })
}

fn name_of(process: &Path) -> String {
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    // A program may call itself anything.
    let printable: String = name.trim_end().chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    if printable.is_empty() { "a process".to_owned() } else { printable }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn a_port_of_this_process_is_found_whatever_it_is_bound_to() {
        for (at, asked) in [("127.0.0.1:0", "127.0.0.1"), ("0.0.0.0:0", "127.0.0.1"), ("[::]:0", "::1")] {
            let Ok(udp) = UdpSocket::bind(at) else { continue };
            let tcp = TcpListener::bind(at).unwrap();
            let port = |bound: SocketAddr| SocketAddr::new(asked.parse().unwrap(), bound.port());
            for port in [Port::Udp(port(udp.local_addr().unwrap())), Port::Tcp(port(tcp.local_addr().unwrap()))] {
                let holder = find(port).unwrap();
                assert_eq!(holder.process, std::process::id(), "{holder} for {port:?} at {at}");
            }
        }
    }

    #[test]
    fn only_sockets_in_the_way_are_held_against_it() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
             0: 0100007F:0035 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1\n\
             1: 1060FEA9:0035 0200000A:1F90 01 00000000:00000000 00:00000000 00000000     0        0 12 1\n\
             2: 00000000:0035 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 13 1\n\
             3: nonsense\n";
        if cfg!(target_endian = "little") {
            let wanted = "169.254.96.16:53".parse().unwrap();
            assert_eq!(inodes(table, wanted, true), [13]);
            assert_eq!(inodes(table, wanted, false), [12, 13]);
        }
    }
}
