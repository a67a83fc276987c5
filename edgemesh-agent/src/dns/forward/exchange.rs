//! One question to one upstream: by UDP, and by TCP where the answer is too long for that.
//!
//! Against forged answers (RFC 5452): each query has a socket of its own, so a random port and answers from the upstream
//! alone; a random id; and the case of the letters of its name is random, too (draft-vixie-dnsext-dns0x20).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::atomic::Ordering::Relaxed,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::Instant,
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
const MOST_WAYS: usize = 4;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    #[error(transparent)]
    Io(#[from] io::Error),
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
    let (mut edns, mut by_tcp) = (upstream.edns(), false);
    for _ in 0..MOST_WAYS {
        let query = Query::new(question, edns, upstream.keeps_case()).ok_or(ExchangeError::Random)?;
        let asked = Instant::now();
        upstream.asked.fetch_add(1, Relaxed);
        let received = match by_tcp {
            false => query.by_udp(upstream, limits).await?,
            true => query.by_tcp(upstream.address, limits).await?,
        };
        let heard = |usable| upstream.answered(asked.into_std(), usable, Instant::now().into_std());
        match received {
            Received::Answer(message) if edns && matches!(message.rcode(), FORMERR | NOTIMP) => edns = false,
            Received::Answer(message) => {
                heard(message.is_usable());
                if message.is_usable() && !edns {
                    upstream.lacks_edns();
                }
                return Ok(message);
            }
            Received::OtherCase => upstream.changes_case(),
            Received::Truncated | Received::NotOurs if !by_tcp => by_tcp = true,
            Received::Truncated | Received::NotOurs | Received::Malformed => {
                heard(false);
                return Err(ExchangeError::Malformed);
            }
        }
    }
    Err(ExchangeError::Malformed)
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
