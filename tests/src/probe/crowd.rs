//! Many connections held at once, and much data on one.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinSet;

use super::client::connect_async;
use super::message::{BulkReport, Dial, Failure, SpreadReport, Transport, parse_greeting, unspecified};

/// Sizes of the messages, taken in turn: one byte, some that fill a packet nearly, wholly and more than wholly.
const SIZES: [usize; 6] = [1, 64, 1400, 1472, 1473, 4000];
/// After which a datagram that was not answered is sent again.
const AGAIN: Duration = Duration::from_secs(3);
/// Piece of much data.
const PIECE: usize = 64 * 1024;

/// One client of a crowd, connected.
enum Member {
    Tcp(TcpStream, String),
    Udp(UdpSocket),
}

/// Connects `count` times, and once all are connected exchanges `rounds` messages on each.
pub(super) async fn crowd(transport: Transport, dial: Dial, count: u32, rounds: u32) -> Result<SpreadReport, Failure> {
    let mut joining = JoinSet::new();
    for number in 0..count {
        joining.spawn(async move { (number, join(transport, dial).await) });
    }
    let (mut report, mut members) = (SpreadReport::default(), Vec::new());
    while let Some(joined) = joining.join_next().await {
        match joined.map_err(|error| Failure::other(error.to_string()))? {
            (number, Ok(member)) => members.push((number, member)),
            (_, Err(failure)) => fail(&mut report, failure),
        }
    }
    let mut talking = JoinSet::new();
    for (number, member) in members {
        talking.spawn(talk(member, number, dial, rounds));
    }
    while let Some(talked) = talking.join_next().await {
        match talked.map_err(|error| Failure::other(error.to_string()))? {
            Ok(name) => *report.names.entry(name).or_insert(0) += 1,
            Err(failure) => fail(&mut report, failure),
        }
    }
    Ok(report)
}

fn fail(report: &mut SpreadReport, failure: Failure) {
    *report.failures.entry(failure.errno.unwrap_or(failure.what)).or_insert(0) += 1;
}

async fn join(transport: Transport, dial: Dial) -> Result<Member, Failure> {
    let target = dial.target;
    match transport {
        Transport::Tcp => {
            let (mut stream, ..) = connect_async(dial).await?;
            let name = greeting(&mut stream, dial).await?;
            Ok(Member::Tcp(stream, name))
        }
        Transport::Udp => {
            let failed = |error: std::io::Error| Failure::from_io(&format!("connect to {target}"), &error);
            let socket = UdpSocket::bind(unspecified(target, 0)).await.map_err(failed)?;
            socket.connect(target).await.map_err(failed)?;
            Ok(Member::Udp(socket))
        }
    }
}

/// The name of a server that greets.
async fn greeting(stream: &mut TcpStream, dial: Dial) -> Result<String, Failure> {
    let what = format!("receive the greeting of {}", dial.target);
    let mut line = Vec::new();
    let read = async {
        while line.last() != Some(&b'\n') && line.len() < 512 {
            line.push(stream.read_u8().await?);
        }
        std::io::Result::Ok(())
    };
    timed_io(&what, dial.deadline, read).await?;
    parse_greeting(&String::from_utf8_lossy(&line)).map(|(name, ..)| name)
}

/// Exchanges messages that nobody else sends; the name of the server, where they come back whole and alone.
async fn talk(mut member: Member, number: u32, dial: Dial, rounds: u32) -> Result<String, Failure> {
    let what = format!("exchange a message with {}", dial.target);
    let mut answered = String::new();
    let mut buffer = vec![0; 65_536];
    for round in 0..rounds {
        let message = message(number, round, size_of(number, round));
        let heard = match &mut member {
            Member::Tcp(stream, name) => {
                answered.clone_from(name);
                let exchange = async {
                    stream.write_all(&message).await?;
                    stream.read_exact(&mut buffer[..message.len()]).await
                };
                let length = timed_io(&what, dial.deadline, exchange).await?;
                buffer[..length].to_vec()
            }
            Member::Udp(socket) => {
                let exchange = async {
                    loop {
                        socket.send(&message).await?;
                        // A datagram may be lost, and is sent again as by any client of UDP.
                        if let Ok(heard) = tokio::time::timeout(AGAIN, socket.recv(&mut buffer)).await {
                            return heard;
                        }
                    }
                };
                let mut length = timed_io(&what, dial.deadline, exchange).await?;
                loop {
                    let text = String::from_utf8_lossy(&buffer[..length]);
                    let (name, _, echo) = parse_greeting(&text)?;
                    // The answer to a datagram of before that was only late, and was answered twice so.
                    if round > 0 && echo.as_bytes() == self::message(number, round - 1, size_of(number, round - 1)) {
                        length = timed_io(&what, dial.deadline, socket.recv(&mut buffer)).await?;
                        continue;
                    }
                    answered = name;
                    break echo.as_bytes().to_vec();
                }
            }
        };
        if heard != message {
            let head = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(24)]).into_owned();
            return Err(Failure::other(format!(
                "the answer to {:?}, {} bytes, is {:?}, {} bytes",
                head(&message),
                message.len(),
                head(&heard),
                heard.len()
            )));
        }
    }
    Ok(answered)
}

/// The size of a client's message.
fn size_of(number: u32, round: u32) -> usize {
    SIZES[(number as usize + round as usize) % SIZES.len()]
}

/// Text of about `size` bytes with the client and the round in it.
fn message(number: u32, round: u32, size: usize) -> Vec<u8> {
    let mut message = format!("{number}/{round}/").into_bytes();
    let letters = (b'a'..=b'z').cycle().skip(number as usize % 26);
    let missing = size.saturating_sub(message.len());
    message.extend(letters.take(missing));
    message
}

/// Sends `bytes` to an echo while it receives them again.
pub(super) async fn bulk(dial: Dial, bytes: u64) -> Result<BulkReport, Failure> {
    let what = format!("exchange data with {}", dial.target);
    let (mut stream, ..) = connect_async(dial).await?;
    greeting(&mut stream, dial).await?;
    let (mut from, mut to) = stream.split();
    let begin = Instant::now();
    let sending = async {
        let mut noise = Noise::new(bytes);
        while let Some(piece) = noise.next() {
            timed_io(&what, dial.deadline, to.write_all(piece)).await?;
        }
        timed_io(&what, dial.deadline, to.shutdown()).await
    };
    let receiving = async {
        let (mut noise, mut heard, mut received) = (Noise::new(bytes), vec![0; PIECE], 0);
        while let Some(piece) = noise.next() {
            let heard = &mut heard[..piece.len()];
            timed_io(&what, dial.deadline, from.read_exact(heard)).await?;
            if heard != piece {
                return Ok(BulkReport { received, intact: false, took: begin.elapsed() });
            }
            received += piece.len() as u64;
        }
        let more = timed_io(&what, dial.deadline, from.read(&mut heard)).await?;
        Ok(BulkReport { received, intact: more == 0, took: begin.elapsed() })
    };
    tokio::try_join!(sending, receiving).map(|((), report)| report)
}

/// Bytes that no compression, repetition or shift could pass for, by Marsaglia's xorshift generator; always the same.
struct Noise {
    state: u64,
    left: u64,
    piece: Vec<u8>,
}

impl Noise {
    fn new(bytes: u64) -> Self {
        Self { state: 0x9E37_79B9_7F4A_7C15, left: bytes, piece: vec![0; PIECE] }
    }

    /// The next piece; none after the last.
    fn next(&mut self) -> Option<&[u8]> {
        let length = usize::try_from(self.left).unwrap_or(PIECE).min(PIECE);
        for word in self.piece[..length].chunks_mut(8) {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            word.copy_from_slice(&self.state.to_le_bytes()[..word.len()]);
        }
        self.left -= length as u64;
        (length > 0).then(|| &self.piece[..length])
    }
}

async fn timed_io<T>(
    what: &str,
    deadline: Duration,
    step: impl Future<Output = std::io::Result<T>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(deadline, step).await {
        Ok(outcome) => outcome.map_err(|error| Failure::from_io(what, &error)),
        Err(_) => Err(Failure::timed_out(what)),
    }
}
