//! What members say to each other on streams of their own: protobuf, each message after its length as a varint.

use std::{io, net::IpAddr};

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use prost::Message;

/// Longest message that is read or written, in bytes; EdgeMesh (Go) has the same bound.
const MAX_MESSAGE: usize = 4096;

/// Most addresses in a [`Hello`].
pub(super) const MAX_ADDRESSES: usize = 16;

/// Most Services in an [`Explanation`].
pub(super) const MAX_SERVICES: usize = 4;

/// [`Request::protocol`] of a question.
pub(super) const NO_PROTOCOL: i32 = 0;

/// The first message on each connection, in both directions: who the sender claims to be.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Hello {
    /// Name of the sender's node.
    #[prost(string, tag = "1")]
    pub(super) node: String,
    /// Where the sender might be reached directly, as binary multiaddresses.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(super) addresses: Vec<Vec<u8>>,
    /// Another number each time that the sender starts, so that who knows it tells connections of before from those that
    /// are still alive.
    #[prost(fixed64, tag = "3")]
    pub(super) run: u64,
}

/// What kind of flow a stream carries.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, prost::Enumeration)]
#[repr(i32)]
pub enum Protocol {
    /// A byte stream; each end can close its own direction.
    Tcp = 1,
    /// Datagrams, each kept whole.
    Udp = 2,
}

/// The first message on a stream: where it is to lead.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Request {
    #[prost(enumeration = "Protocol", tag = "1")]
    pub(super) protocol: i32,
    /// Node that is meant, so that a mistake in names is told and not served.
    #[prost(string, tag = "2")]
    pub(super) node: String,
    /// 4 or 16 bytes; empty for the node itself.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) ip: Vec<u8>,
    #[prost(uint32, tag = "4")]
    pub(super) port: u32,
    /// How long the sender waits for the answer, in milliseconds: who dials longer dials for nobody.
    #[prost(uint32, tag = "5")]
    pub(super) patience: u32,
    /// What kind of flow the sender asks about without opening one. Such a question has [`NO_PROTOCOL`], which nodes that
    /// know no questions refuse as [`Status::Invalid`].
    #[prost(enumeration = "Protocol", optional, tag = "6")]
    pub(super) question: Option<i32>,
}

/// How a [`Request`] went.
#[derive(Clone, Copy, Debug, Eq, PartialEq, prost::Enumeration)]
#[repr(i32)]
pub(super) enum Status {
    /// What no version sends: an answer without a status.
    Unknown = 0,
    /// Connected; what follows is the flow itself.
    Connected = 1,
    /// The target refused the connection.
    Refused = 2,
    /// The target, or its network, cannot be reached.
    Unreachable = 3,
    /// The far node does not dial this target for others; `rule` says why.
    NotAllowed = 4,
    /// The target did not answer in time.
    TimedOut = 5,
    /// The far node has as many streams as it takes.
    Busy = 6,
    /// The request makes no sense to the far node.
    Invalid = 7,
    /// Only to a question: the far node would send there, which it has not tried.
    Allowed = 8,
}

/// The answer to a [`Request`].
#[derive(Clone, PartialEq, Message)]
pub(super) struct Response {
    #[prost(enumeration = "Status", tag = "1")]
    pub(super) status: i32,
    /// Of `NotAllowed`, the rule; else what the system said, for people.
    #[prost(string, tag = "2")]
    pub(super) detail: String,
    /// In every answer to a question of a node that knows what a question is; but one that is busy may not have read it.
    #[prost(message, optional, tag = "3")]
    pub(super) explanation: Option<Explanation>,
}

/// What an answer to a question has beyond its status.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Explanation {
    /// The rule that allows the target; empty where none does.
    #[prost(string, tag = "1")]
    pub(super) rule: String,
    /// `NAMESPACE/NAME` of Services that have the target as an endpoint on the far node, [`MAX_SERVICES`] at most.
    #[prost(string, repeated, tag = "2")]
    pub(super) services: Vec<String>,
    /// How long the target took to accept or to refuse a connection, in microseconds; none where it was not tried.
    #[prost(uint64, optional, tag = "3")]
    pub(super) dial_micros: Option<u64>,
}

/// An address in the form of [`Request::ip`].
pub(super) fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The address in [`Request::ip`]; `Ok(None)` for the node itself.
pub(super) fn ip_of(bytes: &[u8]) -> Result<Option<IpAddr>, ()> {
    if bytes.is_empty() {
        return Ok(None);
    }
    if let Ok(octets) = <[u8; 4]>::try_from(bytes) {
        return Ok(Some(IpAddr::from(octets)));
    }
    <[u8; 16]>::try_from(bytes).map(|octets| Some(IpAddr::from(octets).to_canonical())).map_err(|_| ())
}

/// Writes one message and flushes.
pub(super) async fn write<M: Message>(stream: &mut (impl AsyncWrite + Unpin), message: &M) -> io::Result<()> {
    if message.encoded_len() > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "message is longer than 4096 bytes"));
    }
    stream.write_all(&message.encode_length_delimited_to_vec()).await?;
    stream.flush().await
}

/// Reads one message and not a byte more: what follows belongs to the flow.
pub(super) async fn read<M: Message + Default>(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<M> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut length = 0usize;
    // 4096 takes two bytes of seven bits.
    for shift in [0, 7] {
        let mut byte = [0];
        stream.read_exact(&mut byte).await?;
        length |= usize::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            if length > MAX_MESSAGE {
                break;
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await?;
            return M::decode(body.as_slice()).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error));
        }
    }
    Err(invalid("message is longer than 4096 bytes"))
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt as _, io::Cursor};
    use proptest::prelude::*;

    use super::*;

    /// The result of a future that never has to wait, as nothing in memory does.
    fn block_on_ready<T>(future: impl Future<Output = T>) -> T {
        future.now_or_never().unwrap()
    }

    proptest! {
        #[test]
        fn messages_come_through_and_leave_what_follows(node in ".{0,60}", ip in any::<[u8; 16]>(), port: u32, rest: Vec<u8>) {
            let protocol = Protocol::Udp.into();
            let request = Request { protocol, node, ip: ip.to_vec(), port, patience: 5000, question: None };
            let mut bytes = Vec::new();
            block_on_ready(write(&mut bytes, &request)).unwrap();
            bytes.extend(&rest);
            let mut cursor = Cursor::new(bytes);
            prop_assert_eq!(block_on_ready(read::<Request>(&mut cursor)).unwrap(), request);
            let mut left = Vec::new();
            block_on_ready(cursor.read_to_end(&mut left)).unwrap();
            prop_assert_eq!(left, rest);
        }

        #[test]
        fn garbage_is_an_error_and_never_a_panic(bytes: Vec<u8>) {
            let _ = block_on_ready(read::<Hello>(&mut Cursor::new(&bytes)));
            let _ = block_on_ready(read::<Request>(&mut Cursor::new(&bytes)));
            let _ = block_on_ready(read::<Response>(&mut Cursor::new(&bytes)));
        }
    }

    /// A request as nodes know it that know no questions.
    #[derive(Clone, PartialEq, Message)]
    struct OldRequest {
        #[prost(enumeration = "Protocol", tag = "1")]
        protocol: i32,
        #[prost(string, tag = "2")]
        node: String,
        #[prost(bytes = "vec", tag = "3")]
        ip: Vec<u8>,
        #[prost(uint32, tag = "4")]
        port: u32,
        #[prost(uint32, tag = "5")]
        patience: u32,
    }

    /// An answer as they know it.
    #[derive(Clone, PartialEq, Message)]
    struct OldResponse {
        #[prost(enumeration = "Status", tag = "1")]
        status: i32,
        #[prost(string, tag = "2")]
        detail: String,
    }

    #[test]
    fn a_question_opens_nothing_at_a_node_that_knows_none() {
        let question = Request {
            protocol: NO_PROTOCOL,
            node: "far".to_owned(),
            ip: vec![10, 0, 0, 1],
            port: 80,
            patience: 3000,
            question: Some(Protocol::Tcp.into()),
        };
        let read = OldRequest::decode(question.encode_to_vec().as_slice()).unwrap();
        assert!(Protocol::try_from(read.protocol).is_err(), "{read:?}");
        assert_eq!((&*read.node, read.port), ("far", 80));
        let again = Request::decode(question.encode_to_vec().as_slice()).unwrap();
        assert_eq!(again, question);
    }

    #[test]
    fn streams_are_asked_for_and_answered_as_ever() {
        let old = OldRequest {
            protocol: Protocol::Udp.into(),
            node: "far".to_owned(),
            ip: vec![10, 0, 0, 1],
            port: 80,
            patience: 3000,
        };
        let new = Request::decode(old.encode_to_vec().as_slice()).unwrap();
        assert_eq!((new.protocol, new.question), (Protocol::Udp.into(), None));
        assert_eq!(new.encode_to_vec(), old.encode_to_vec(), "byte for byte");

        let old = OldResponse { status: Status::NotAllowed.into(), detail: "a rule".to_owned() };
        let new = Response::decode(old.encode_to_vec().as_slice()).unwrap();
        assert_eq!((new.status(), &*new.detail, &new.explanation), (Status::NotAllowed, "a rule", &None));
        assert_eq!(new.encode_to_vec(), old.encode_to_vec(), "byte for byte");
    }

    #[test]
    fn a_status_of_a_later_version_is_unknown() {
        let later = Response { status: 99, ..Response::default() };
        assert_eq!(Response::decode(later.encode_to_vec().as_slice()).unwrap().status(), Status::Unknown);
    }

    #[test]
    fn long_messages_are_refused_before_they_are_read() {
        let mut claim = vec![0xff, 0xff, 0xff, 0x7f];
        claim.extend([0; 8]);
        assert_eq!(
            block_on_ready(read::<Hello>(&mut Cursor::new(claim))).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        let long = Hello { node: "x".repeat(5000), ..Hello::default() };
        assert!(block_on_ready(write(&mut Vec::new(), &long)).is_err());
    }

    #[test]
    fn addresses_are_four_or_sixteen_bytes_or_none() {
        for ip in ["10.0.0.1", "2001:db8::1"] {
            let ip: IpAddr = ip.parse().unwrap();
            assert_eq!(ip_of(&ip_bytes(ip)), Ok(Some(ip)));
        }
        assert_eq!(ip_of(&[]), Ok(None));
        assert_eq!(ip_of(&[1, 2, 3]), Err(()));
        let mapped: IpAddr = "::ffff:127.0.0.1".parse().unwrap();
        assert_eq!(ip_of(&ip_bytes(mapped)), Ok(Some("127.0.0.1".parse().unwrap())), "in the form that is judged");
    }
}
