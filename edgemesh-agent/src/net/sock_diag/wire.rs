//! The few messages of netlink(7) and sock_diag(7) that are spoken here, as include/uapi/linux/inet_diag.h lays them out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::errno::Errno;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// `TCP_ESTABLISHED` of include/net/tcp_states.h, which a connected UDP socket is in too.
const ESTABLISHED: u32 = 1;

/// `struct nlmsghdr`: u32 length, u16 type, u16 flags, u32 sequence, u32 port.
const HEADER: usize = 16;
/// `struct inet_diag_sockid`: be16 local and remote port, two be32[4] addresses, u32 interface, u32[2] cookie.
const ID: usize = 48;
/// `struct inet_diag_req_v2`: u8 family, protocol, extensions, pad; u32 states; the id.
const REQUEST: usize = HEADER + 8 + ID;
/// Where the id is in `struct inet_diag_msg`: after u8 family, state, timer, retransmissions.
const ID_IN_ANSWER: usize = 4;

const _: () = assert!(HEADER == size_of::<libc::nlmsghdr>());

/// The address family of a socket, which for a v4-mapped peer is not the family of its addresses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(super) enum Family {
    V4 = libc::AF_INET as u8,
    V6 = libc::AF_INET6 as u8,
}

/// A connected socket as the kernel listed it, with what names it exactly.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Socket {
    /// Whom it is connected to; v4-mapped addresses are given as IPv4.
    pub peer: SocketAddr,
    /// Its own address, in the same form.
    pub local: SocketAddr,
    /// What `bpf_get_socket_cookie` and SO_COOKIE say of the same socket.
    pub cookie: u64,
    family: Family,
    /// `struct inet_diag_sockid` to the byte, so that what is ended is what was listed.
    id: [u8; ID],
}

/// Why an answer cannot be read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Malformed;

/// One netlink message from the kernel.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Message {
    sequence: u32,
    body: Body,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Body {
    Socket(Socket),
    /// A dump has come to its end.
    Done(Result<(), Errno>),
    /// What became of a request.
    Status(Result<(), Errno>),
    Other,
}

impl Message {
    /// The body, if this is an answer to the request of that number.
    pub(super) fn answers(self, sequence: u32) -> Option<Body> {
        (self.sequence == sequence).then_some(self.body)
    }
}

/// Asks for all connected UDP sockets of a family.
pub(super) fn dump(sequence: u32, family: Family) -> [u8; REQUEST] {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
    request(SOCK_DIAG_BY_FAMILY, flags, sequence, family, &[0; ID])
}

/// Asks for the end of one socket.
pub(super) fn destroy(sequence: u32, socket: &Socket) -> [u8; REQUEST] {
    request(SOCK_DESTROY, libc::NLM_F_REQUEST | libc::NLM_F_ACK, sequence, socket.family, &socket.id)
}

/// The messages in one datagram; the first that cannot be read is the last.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Result<Message, Malformed>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let (message, rest) = first(datagram).map_or((Err(Malformed), &[][..]), |(message, rest)| (Ok(message), rest));
        datagram = rest;
        Some(message)
    })
}

fn request(kind: u16, flags: libc::c_int, sequence: u32, family: Family, id: &[u8; ID]) -> [u8; REQUEST] {
    let mut bytes = [0; REQUEST];
    let mut rest = &mut bytes[..];
    let mut put = |field: &[u8]| {
        if let Some(room) = rest.split_off_mut(..field.len()) {
            room.copy_from_slice(field);
        }
    };
    put(&(REQUEST as u32).to_ne_bytes());
    put(&kind.to_ne_bytes());
    put(&(flags as u16).to_ne_bytes());
    put(&sequence.to_ne_bytes());
    put(&0_u32.to_ne_bytes());
    put(&[family as u8, libc::IPPROTO_UDP as u8, 0, 0]);
    put(&(1_u32 << ESTABLISHED).to_ne_bytes());
    put(id);
    bytes
}

/// The first message and what follows it.
fn first(datagram: &[u8]) -> Option<(Message, &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(field(datagram, 0)?)).ok()?;
    let payload = datagram.get(HEADER..length)?;
    let body = match u16::from_ne_bytes(field(datagram, 4)?) {
        SOCK_DIAG_BY_FAMILY => Body::Socket(socket(payload)?),
        kind if i32::from(kind) == libc::NLMSG_DONE => Body::Done(status(payload)?),
        kind if i32::from(kind) == libc::NLMSG_ERROR => Body::Status(status(payload)?),
        _ => Body::Other,
    };
    let sequence = u32::from_ne_bytes(field(datagram, 8)?);
    // Messages start at multiples of 4; there may be no padding after the last.
    let rest = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((Message { sequence, body }, rest))
}

fn status(payload: &[u8]) -> Option<Result<(), Errno>> {
    Some(match i32::from_ne_bytes(field(payload, 0)?) {
        0 => Ok(()),
        negated => Err(Errno::from_raw(negated.checked_neg()?)),
    })
}

fn socket(payload: &[u8]) -> Option<Socket> {
    let family = match i32::from(*payload.first()?) {
        libc::AF_INET => Family::V4,
        libc::AF_INET6 => Family::V6,
        _ => return None,
    };
    let id: [u8; ID] = field(payload, ID_IN_ANSWER)?;
    let address = |address, port| {
        let ip = match family {
            Family::V4 => IpAddr::V4(Ipv4Addr::from(field::<4>(&id, address)?)),
            Family::V6 => IpAddr::V6(Ipv6Addr::from(field::<16>(&id, address)?)),
        };
        Some(SocketAddr::new(ip.to_canonical(), u16::from_be_bytes(field(&id, port)?)))
    };
    let (low, high) = (u32::from_ne_bytes(field(&id, 40)?), u32::from_ne_bytes(field(&id, 44)?));
    Some(Socket {
        local: address(4, 0)?,
        peer: address(20, 2)?,
        cookie: u64::from(high) << 32 | u64::from(low),
        family,
        id,
    })
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(HEADER + payload.len()).unwrap().to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0, 0]);
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes
    }

    /// An answer's payload: a v4-mapped socket, with all of `inet_diag_msg`.
    fn listed() -> Vec<u8> {
        let mut bytes = vec![libc::AF_INET6 as u8, ESTABLISHED as u8, 0, 0];
        bytes.extend(1000_u16.to_be_bytes());
        bytes.extend(53_u16.to_be_bytes());
        bytes.extend("::ffff:10.0.0.1".parse::<Ipv6Addr>().unwrap().octets());
        bytes.extend("::ffff:10.0.0.2".parse::<Ipv6Addr>().unwrap().octets());
        bytes.extend(7_u32.to_ne_bytes());
        bytes.extend(0x5566_7788_u32.to_ne_bytes());
        bytes.extend(0x1122_3344_u32.to_ne_bytes());
        bytes.extend([0; 20]);
        bytes
    }

    #[test]
    fn a_v4_mapped_socket_has_ipv4_addresses_and_is_ended_as_the_ipv6_socket_it_is() {
        let datagram = message(SOCK_DIAG_BY_FAMILY, 3, &listed());
        let body = messages(&datagram).next().unwrap().unwrap().answers(3);
        let Some(Body::Socket(socket)) = body else { panic!("not a socket: {body:?}") };
        assert_eq!(socket.local, "10.0.0.1:1000".parse().unwrap());
        assert_eq!(socket.peer, "10.0.0.2:53".parse().unwrap());
        assert_eq!(socket.cookie, 0x1122_3344_5566_7788);

        let request = destroy(9, &socket);
        assert_eq!(request[HEADER], libc::AF_INET6 as u8);
        assert_eq!(request[REQUEST - ID..], listed()[ID_IN_ANSWER..][..ID]);
    }

    #[test]
    fn only_connected_udp_sockets_are_asked_for() {
        let request = dump(1, Family::V4);
        assert_eq!(request[..4], u32::try_from(request.len()).unwrap().to_ne_bytes());
        assert_eq!(request[HEADER..HEADER + 4], [libc::AF_INET as u8, libc::IPPROTO_UDP as u8, 0, 0]);
        assert_eq!(request[HEADER + 4..HEADER + 8], 0b10_u32.to_ne_bytes());
    }

    #[test]
    fn answers_to_other_requests_are_told_apart() {
        let message = messages(&message(libc::NLMSG_DONE as u16, 3, &[0; 4])).next().unwrap().unwrap();
        assert_eq!(message.clone().answers(4), None);
        assert_eq!(message.answers(3), Some(Body::Done(Ok(()))));
    }

    #[test]
    fn several_messages_of_odd_lengths_are_read_from_one_datagram() {
        let mut datagram = message(99, 1, &[1]);
        datagram.extend([0; 3]);
        datagram.extend(message(libc::NLMSG_ERROR as u16, 1, &(-libc::ENOENT).to_ne_bytes()));
        let bodies: Vec<_> = messages(&datagram).map(|message| message.unwrap().answers(1).unwrap()).collect();
        assert_eq!(bodies, [Body::Other, Body::Status(Err(Errno::ENOENT))]);
    }

    #[test]
    fn a_message_cut_short_is_malformed() {
        let whole = message(SOCK_DIAG_BY_FAMILY, 1, &listed());
        for length in 1..whole.len() {
            assert_eq!(messages(&whole[..length]).collect::<Vec<_>>(), [Err(Malformed)], "of {length} bytes");
        }
        let short = message(SOCK_DIAG_BY_FAMILY, 1, &listed()[..ID]);
        assert_eq!(messages(&short).collect::<Vec<_>>(), [Err(Malformed)]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_their_end(kind in 0..32_u16, noise in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut datagram = message(kind, 1, &noise);
            datagram.extend(&noise);
            prop_assert!(messages(&datagram).count() <= 2 + noise.len() / HEADER);
            prop_assert!(messages(&noise).count() <= 1 + noise.len() / HEADER);
        }
    }
}
