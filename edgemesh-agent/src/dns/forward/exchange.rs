//! One question to one upstream: by UDP, and by TCP where the answer is too long for that.
//!
//! Against forged answers (RFC 5452): each query has a socket of its own, so a random port and answers from the upstream
//! alone; a random id; and the case of the letters of its name is random, too (draft-vixie-dnsext-dns0x20).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::Ordering::Relaxed,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::{Instant, timeout},
};

use super::{
    Question, TtlLimits,
    message::{FORMERR, Message, NOTIMP, PAYLOAD, Received},
    upstream::Upstream,
};

/// Some servers do not heed how much they were told to send.
const BUFFER: usize = 4096;
/// After so many packets that are not the answer somebody is guessing, and TCP leaves nothing to guess.
const MOST_REJECTED: usize = 16;
/// How often a query is put in another way: without EDNS, without mixed case, by TCP.
const MOST_WAYS: usize = 6;
/// How long TCP may take to show how the upstream treats the case of names; some have no TCP.
const CASE_BY_TCP: Duration = Duration::from_millis(500);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Which is not the upstream's fault.
    #[error("cannot open a socket: {0}; raise the limit of open files, or lower the load")]
    Exhausted(io::Error),
    #[error("the answer is not a proper message")]
    Malformed,
    #[error("no random numbers")]
    Random,
}

/// Asks, and waits as long as it takes: the caller has a deadline. What is learnt of the upstream is noted there, but for
/// its silence.
pub(super) async fn ask(
    upstream: &Upstream,
    question: &Question,
    limits: &TtlLimits,
) -> Result<Message, ExchangeError> {
    let now = || Instant::now().into_std();
    let edns_tried = upstream.edns(now());
    let (mut edns, mut by_tcp, mut other_case) = (edns_tried, false, false);
    for _ in 0..MOST_WAYS {
        let asked = now();
        let query = Query::new(question, edns, upstream.keeps_case(asked)).ok_or(ExchangeError::Random)?;
        upstream.asked.fetch_add(1, Relaxed);
        let received = match (by_tcp, other_case) {
            (false, _) => query.by_udp(upstream, limits).await,
            (true, false) => query.by_tcp(upstream.address, limits).await,
            (true, true) => {
                let by_tcp = timeout(CASE_BY_TCP, query.by_tcp(upstream.address, limits));
                by_tcp.await.unwrap_or_else(|elapsed| Err(elapsed.into()))
            }
        };
        let received = match received {
            Err(error) if is_exhausted(&error) => return Err(ExchangeError::Exhausted(error)),
            // A second packet of another case shows as much: each has a port and an id to be guessed.
            Err(_) if by_tcp && other_case && upstream.keeps_case(asked) => {
                by_tcp = false;
                continue;
            }
            received => received?,
        };
        match received {
            Received::Answer(message) if edns && matches!(message.rcode(), FORMERR | NOTIMP) => {
                upstream.heard(asked, now());
                edns = false;
            }
            Received::Answer(message) => {
                if !message.is_usable() {
                    upstream.refused(asked, now());
                    return Ok(message);
                }
                upstream.answered(question, asked, now());
                if edns_tried && !edns {
                    upstream.lacks_edns(now());
                }
                return Ok(message);
            }
            // One such packet may be forged; TCP leaves nothing to guess.
            Received::OtherCase if !other_case && !by_tcp => {
                upstream.heard(asked, now());
                (other_case, by_tcp) = (true, true);
            }
            Received::OtherCase => {
                upstream.heard(asked, now());
                upstream.changes_case(now());
            }
            Received::Truncated if !by_tcp => {
                upstream.answered(question, asked, now());
                by_tcp = true;
            }
            Received::NotOurs if !by_tcp => by_tcp = true,
            Received::Truncated | Received::NotOurs | Received::Malformed => {
                upstream.refused(asked, now());
                return Err(ExchangeError::Malformed);
            }
        }
    }
    Err(ExchangeError::Malformed)
}

/// Whether it is this machine that lacks something, rather than the way to the upstream.
fn is_exhausted(error: &io::Error) -> bool {
    let codes = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM, libc::EADDRINUSE];
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}

struct Query {
    id: u16,
    /// Name, type and class.
    question: Vec<u8>,
    bytes: Vec<u8>,
}

impl Query {
    /// None where there are no random numbers.
    fn new(question: &Question, edns: bool, mix_case: bool) -> Option<Self> {
        let mut random = [0; 2 + 32];
        aws_lc_rs::rand::fill(&mut random).ok()?;
        let (id, bits) = random.split_first_chunk::<2>()?;
        let id = u16::from_be_bytes(*id);
        let mut name = question.name().to_vec();
        if mix_case {
            for (i, byte) in name.iter_mut().enumerate() {
                // Lengths of labels are no letters.
                let upper = bits.get(i / 8).is_some_and(|bits| bits >> (i % 8) & 1 != 0);
                if upper && byte.is_ascii_lowercase() {
                    byte.make_ascii_uppercase();
                }
            }
        }
        let mut asked = name;
        asked.extend_from_slice(&question.qtype().to_be_bytes());
        asked.extend_from_slice(&[0, 1]);
        let checking = u8::from(question.checking_disabled()) << 4;
        let mut bytes = id.to_be_bytes().to_vec();
        bytes.extend_from_slice(&[1, checking, 0, 1, 0, 0, 0, 0, 0, u8::from(edns)]);
        bytes.extend_from_slice(&asked);
        if edns {
            let [high, low] = PAYLOAD.to_be_bytes();
            let dnssec = u8::from(question.dnssec_ok()) << 7;
            bytes.extend_from_slice(&[0, 0, 41, high, low, 0, 0, dnssec, 0, 0, 0]);
        }
        Some(Self { id, question: asked, bytes })
    }

    async fn by_udp(&self, upstream: &Upstream, limits: &TtlLimits) -> io::Result<Received> {
        let any = match upstream.address {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(upstream.address).await?;
        socket.send(&self.bytes).await?;
        let mut buffer = vec![0; BUFFER];
        for _ in 0..MOST_REJECTED {
            let length = socket.recv(&mut buffer).await?;
            let packet = buffer.get(..length).unwrap_or_default();
            let received = Message::receive(packet, self.id, &self.question, limits);
            if !matches!(received, Received::NotOurs) {
                return Ok(received);
            }
            upstream.rejected.fetch_add(1, Relaxed);
        }
        Ok(Received::NotOurs)
    }

    async fn by_tcp(&self, address: SocketAddr, limits: &TtlLimits) -> io::Result<Received> {
        let mut stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let length = u16::try_from(self.bytes.len()).map_err(io::Error::other)?;
        // In one segment: some servers read no more than the first (RFC 7766 section 8).
        let framed = [&length.to_be_bytes()[..], &self.bytes].concat();
        stream.write_all(&framed).await?;
        let length = stream.read_u16().await?;
        let mut packet = vec![0; length.into()];
        stream.read_exact(&mut packet).await?;
        Ok(Message::receive(&packet, self.id, &self.question, limits))
    }
}
