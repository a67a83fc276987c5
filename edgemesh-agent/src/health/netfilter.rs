//! Whether a netfilter chain exists in this network namespace, asked of the kernel itself: the tools may not be
//! installed, and would print every rule of a large cluster to say so.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::sys::{
    socket::{self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, setsockopt, sockopt},
    time::TimeVal,
};

/// How long the kernel may take for an answer.
const DEADLINE_SECONDS: i64 = 1;
/// Larger tables of the old kind can only be read as a whole, which is not worth it.
const MAX_TABLE: u32 = 1 << 20;

/// Whether a chain of iptables is there, for IPv4, be it kept by the old kernel interface or by nf_tables.
pub(super) fn has_chain(table: &str, chain: &str) -> bool {
    nft_has(GET_CHAIN, &[(CHAIN_TABLE, table), (CHAIN_NAME, chain)]).unwrap_or(false)
        || legacy_has(table, chain).unwrap_or(false)
}

/// Whether a table of nf_tables is there, for IPv4.
pub(super) fn has_nft_table(table: &str) -> bool {
    nft_has(GET_TABLE, &[(TABLE_NAME, table)]).unwrap_or(false)
}

// include/uapi/linux/netfilter/nf_tables.h and nfnetlink.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const GET_TABLE: u16 = 1;
const GET_CHAIN: u16 = 4;
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const NFPROTO_IPV4: u8 = 2;
const HEADER: usize = 16;

/// Asks for one object; the answer is the object or an error.
fn nft_has(request: u16, attributes: &[(u16, &str)]) -> io::Result<bool> {
    let socket = socket::socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        Some(SockProtocol::NetlinkNetFilter),
    )?;
    let limit = TimeVal::new(DEADLINE_SECONDS, 0);
    setsockopt(&socket, sockopt::ReceiveTimeout, &limit)?;
    socket::send(socket.as_raw_fd(), &message(request, attributes), MsgFlags::empty())?;
    let mut answer = [0; 4096];
    let length = socket::recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    exists(&answer[..length])
}

/// `nlmsghdr`, `nfgenmsg` and attributes of text.
fn message(request: u16, attributes: &[(u16, &str)]) -> Vec<u8> {
    let mut message = vec![0; 4];
    message.extend(((NFNL_SUBSYS_NFTABLES << 8) | request).to_ne_bytes());
    message.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    // Sequence number and port.
    message.extend([0; 8]);
    message.extend([NFPROTO_IPV4, 0, 0, 0]);
    for (kind, text) in attributes {
        let length = 4 + text.len() + 1;
        message.extend((length as u16).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(text.bytes());
        message.resize(message.len() + 1 + length.next_multiple_of(4) - length, 0);
    }
    let length = message.len() as u32;
    message[..4].copy_from_slice(&length.to_ne_bytes());
    message
}

fn exists(answer: &[u8]) -> io::Result<bool> {
    let short = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes).ok_or_else(short)?;
    if i32::from(kind) != libc::NLMSG_ERROR {
        return Ok(true);
    }
    let error = answer.get(HEADER..HEADER + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match error.ok_or_else(short)? {
        0 => Ok(true),
        error if error == -libc::ENOENT => Ok(false),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// Only asks for tables that are in use: asking for another would make the kernel load it.
fn legacy_has(table: &str, chain: &str) -> io::Result<bool> {
    if !fs::read_to_string("/proc/net/ip_tables_names")?.lines().any(|name| name == table) {
        return Ok(false);
    }
    // Any socket of the family does; one for datagrams takes no further capability.
    let socket = socket::socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // The chain's name stands in the target that begins it, with a NUL after it.
    let name = [chain.as_bytes(), b"\0"].concat();
    let entries = legacy_entries(&socket, table)?;
    Ok(entries.windows(name.len()).any(|window| window == name))
}

/// All of a table; nothing if it is too large. include/uapi/linux/netfilter_ipv4/ip_tables.h
fn legacy_entries(socket: &OwnedFd, table: &str) -> io::Result<Vec<u8>> {
    const IPT_SO_GET_INFO: libc::c_int = 64;
    const IPT_SO_GET_ENTRIES: libc::c_int = 65;
    /// `ipt_getinfo`: the name, 12 words on hooks and their number, and the size.
    const INFO: usize = 32 + 13 * 4;
    /// `ipt_get_entries` before its entries: the name, their size, and four bytes to align them.
    const HEAD: usize = 32 + 4 + 4;
    let mut info = vec![0; INFO];
    let name = table.as_bytes().get(..31.min(table.len())).unwrap_or_default();
    info[..name.len()].copy_from_slice(name);
    get(socket, IPT_SO_GET_INFO, &mut info)?;
    let size = info.get(INFO - 4..).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes);
    if size > MAX_TABLE {
        return Ok(Vec::new());
    }
    let mut entries = vec![0; HEAD + size as usize];
    entries[..name.len()].copy_from_slice(name);
    entries[32..36].copy_from_slice(&size.to_ne_bytes());
    get(socket, IPT_SO_GET_ENTRIES, &mut entries)?;
    Ok(entries)
}

fn get(socket: &OwnedFd, option: libc::c_int, value: &mut [u8]) -> io::Result<()> {
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: the kernel reads and writes at most `length` bytes of `value`, which is as long and outlives the call.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, option, value.as_mut_ptr().cast(), &raw mut length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_laid_out_as_nf_tables_wants_it() {
        let message = message(GET_CHAIN, &[(CHAIN_TABLE, "nat"), (CHAIN_NAME, "A")]);
        assert_eq!(message.len(), 36);
        assert_eq!(message[..4], 36_u32.to_ne_bytes());
        assert_eq!(message[4..6], 0x0a04_u16.to_ne_bytes());
        assert_eq!(message[16..20], [2, 0, 0, 0]);
        assert_eq!(message[20..28], [&8_u16.to_ne_bytes()[..], &1_u16.to_ne_bytes(), b"nat\0"].concat());
        assert_eq!(message[28..], [&6_u16.to_ne_bytes()[..], &3_u16.to_ne_bytes(), b"A\0\0\0"].concat());
    }

    #[test]
    fn an_answer_is_the_object_or_an_error() {
        let answer =
            |kind: u16, error: i32| [&[0; 4][..], &kind.to_ne_bytes(), &[0; 10], &error.to_ne_bytes()].concat();
        assert!(exists(&answer(0x0a03, 0)).unwrap());
        assert!(!exists(&answer(2, -libc::ENOENT)).unwrap());
        assert_eq!(exists(&answer(2, -libc::EPERM)).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert!(exists(&[0; 5]).is_err());
        assert!(exists(&answer(2, 0)[..17]).is_err());
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        assert!(!has_chain("nat", "EDGEMESH-TEST-NO-SUCH-CHAIN"));
        assert!(!has_nft_table("edgemesh-test-no-such-table"));
    }
}
