//! An upstream on loopback that does as it is told, and messages for tests.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, UdpSocket},
    time::sleep,
};

use super::{Question, question::wire_name};
use crate::lifecycle::Tasks;

pub(super) const A: u16 = 1;
pub(super) const SOA: u16 = 6;

/// How the upstream takes queries.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Manner {
    Answer,
    Slow(Duration),
    /// Says nothing by UDP or TCP.
    Silent,
    /// By UDP it says that the answer is too long, by TCP it gives one of 200 records.
    Truncate,
    /// An answer with another id, then one to another question, then the answer.
    Stray,
    /// An answer from another port comes first.
    Forged,
    /// Always with other ids.
    Guessing,
    /// By UDP it says that the answer is too long, and it closes what comes by TCP.
    TruncateOnly,
    /// The question comes back in lower case.
    LowerCase,
    /// The same by UDP alone.
    LowerCaseByUdp,
    /// Names that begin with `hard` get SERVFAIL after 3 s, all others their answer.
    Hard,
    /// Queries with EDNS are not understood.
    NoEdns,
    Code(u8),
    /// Id and question are right, what follows is not.
    Broken,
    /// Not a message at all.
    Noise,
}

#[derive(Debug)]
pub(super) struct FakeUpstream {
    pub(super) address: SocketAddr,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    manner: Mutex<Manner>,
    ttl: Mutex<u32>,
    /// The last byte of the address that is answered.
    answer: AtomicU8,
    udp: AtomicUsize,
    tcp: AtomicUsize,
}

impl FakeUpstream {
    pub(super) async fn start(tasks: &Tasks) -> Self {
        // The port must be free for both.
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let state = Arc::new(State {
            manner: Mutex::new(Manner::Answer),
            ttl: Mutex::new(60),
            answer: AtomicU8::new(1),
            udp: AtomicUsize::new(0),
            tcp: AtomicUsize::new(0),
        });
        let fake = Self { address: udp.local_addr().unwrap(), state };
        let (stop, state) = (tasks.stopping(), Arc::clone(&fake.state));
        let (on_udp, on_tcp) = (Arc::clone(&state).serve_udp(Arc::new(udp), tasks.clone()), state.serve_tcp(tcp));
        tasks.spawn(async move {
            stop.run_until_cancelled(async { tokio::join!(on_udp, on_tcp) }).await;
        });
        fake
    }

    pub(super) fn set(&self, manner: Manner) {
        *self.state.manner.lock().unwrap() = manner;
    }

    pub(super) fn set_ttl(&self, ttl: u32) {
        *self.state.ttl.lock().unwrap() = ttl;
    }

    /// From now on the address answered is 192.0.2.`last`.
    pub(super) fn set_answer(&self, last: u8) {
        self.state.answer.store(last, Relaxed);
    }

    /// How many queries came by UDP and by TCP.
    pub(super) fn seen(&self) -> (usize, usize) {
        (self.state.udp.load(Relaxed), self.state.tcp.load(Relaxed))
    }
}

impl State {
    async fn serve_udp(self: Arc<Self>, socket: Arc<UdpSocket>, tasks: Tasks) {
        let mut buffer = [0; 2048];
        loop {
            let (length, client) = socket.recv_from(&mut buffer).await.unwrap();
            self.udp.fetch_add(1, Relaxed);
            let (state, socket, query) = (Arc::clone(&self), Arc::clone(&socket), buffer[..length].to_vec());
            let stop = tasks.stopping();
            tasks.spawn(async move {
                stop.run_until_cancelled(state.answer_udp(&socket, client, query)).await;
            });
        }
    }

    async fn answer_udp(&self, socket: &UdpSocket, client: SocketAddr, query: Vec<u8>) {
        let manner = *self.manner.lock().unwrap();
        let answer = self.answer(&query, 1);
        let mut packets = Vec::new();
        match manner {
            Manner::Answer => packets.push(answer),
            Manner::Silent => {}
            Manner::Slow(pause) => {
                sleep(pause).await;
                packets.push(answer);
            }
            Manner::Truncate | Manner::TruncateOnly => packets.push(changed(&answer, 2, |flags| flags | 2)),
            Manner::Stray => {
                let (other, _) = self::query(u16::from_be_bytes([query[0], query[1]]), "other", A);
                packets.extend([changed(&answer, 0, |id| id ^ 1), self.answer(&other, 1), answer]);
            }
            Manner::Forged => {
                let forger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
                let end = answer.len() - 1;
                // Refused by the socket that waits, which may show here.
                let _refused = forger.send_to(&changed(&answer, end, |_| 66), client).await;
                sleep(Duration::from_millis(20)).await;
                packets.push(answer);
            }
            Manner::Guessing => packets.extend((1..=64).map(|n| changed(&answer, 0, |id| id ^ n))),
            Manner::LowerCase | Manner::LowerCaseByUdp => packets.push(in_lower_case(answer)),
            Manner::Hard if query[13..].to_ascii_lowercase().starts_with(b"hard") => {
                sleep(Duration::from_secs(3)).await;
                packets.push(respond(&query, 2, [&[], &[], &[]]));
            }
            Manner::Hard => packets.push(answer),
            Manner::NoEdns if query[11] > 0 => packets.push(respond(&query, 1, [&[], &[], &[]])),
            Manner::NoEdns => packets.push(answer),
            Manner::Code(code) => packets.push(respond(&query, code, [&[], &[], &[]])),
            Manner::Broken => packets.push(answer[..answer.len() - 2].to_vec()),
            Manner::Noise => packets.extend([vec![], b"HTTP/1.1 400 Bad Request".to_vec(), vec![0; 600]]),
        }
        for packet in packets {
            // The client may have what it wants already.
            let _closed = socket.send_to(&packet, client).await;
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            self.tcp.fetch_add(1, Relaxed);
            let manner = *self.manner.lock().unwrap();
            if manner == Manner::Silent {
                continue;
            }
            if manner == Manner::TruncateOnly {
                drop(stream);
                continue;
            }
            let mut query = vec![0; stream.read_u16().await.unwrap().into()];
            stream.read_exact(&mut query).await.unwrap();
            let answer = self.answer(&query, if manner == Manner::Truncate { 200 } else { 1 });
            let answer = if manner == Manner::LowerCase { in_lower_case(answer) } else { answer };
            let framed = [&u16::try_from(answer.len()).unwrap().to_be_bytes()[..], &answer].concat();
            stream.write_all(&framed).await.unwrap();
        }
    }

    /// As good as any: names that begin with `nx` do not exist.
    fn answer(&self, query: &[u8], count: usize) -> Vec<u8> {
        let ttl = *self.ttl.lock().unwrap();
        if query[13..].to_ascii_lowercase().starts_with(b"nx") {
            return respond(query, 3, [&[], &[soa(ttl, ttl)], &[opt()]]);
        }
        let address = vec![192, 0, 2, self.answer.load(Relaxed)];
        respond(query, 0, [&vec![record(A, ttl, address); count], &[], &[]])
    }
}

/// A record, whose owner is what was asked for, or the root for an OPT.
#[derive(Clone, Debug)]
pub(super) struct Record(Vec<u8>);

pub(super) fn record(kind: u16, ttl: u32, data: Vec<u8>) -> Record {
    let length = u16::try_from(data.len()).unwrap();
    let owner = [&[0xc0, 12][..], &kind.to_be_bytes(), &[0, 1]].concat();
    Record([&owner[..], &ttl.to_be_bytes(), &length.to_be_bytes(), &data].concat())
}

pub(super) fn soa(ttl: u32, minimum: u32) -> Record {
    let times: Vec<u8> = [1, 7200, 1800, 86400, minimum].iter().flat_map(|time: &u32| time.to_be_bytes()).collect();
    record(SOA, ttl, [&[0xc0, 12, 0xc0, 12][..], &times].concat())
}

pub(super) fn opt() -> Record {
    // With a cookie that is not for clients.
    Record(vec![0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 12, 0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8])
}

/// The response to a query, as most servers write it.
pub(super) fn respond(query: &[u8], code: u8, sections: [&[Record]; 3]) -> Vec<u8> {
    let name = query[12..].iter().position(|&byte| byte == 0).unwrap();
    let end = 12 + name + 5;
    let mut bytes = query[..end].to_vec();
    bytes[2] |= 0x80;
    bytes[3] = 0x80 | code;
    for (i, section) in sections.iter().enumerate() {
        bytes[6 + 2 * i..8 + 2 * i].copy_from_slice(&u16::try_from(section.len()).unwrap().to_be_bytes());
        section.iter().for_each(|record| bytes.extend_from_slice(&record.0));
    }
    bytes
}

/// A query without EDNS, and its question (name, type and class).
pub(super) fn query(id: u16, name: &str, qtype: u16) -> (Vec<u8>, Vec<u8>) {
    let question = [&wire_name(name).unwrap()[..], &qtype.to_be_bytes(), &[0, 1]].concat();
    let header = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    ([header, question.clone()].concat(), question)
}

pub(super) fn question(name: &str, qtype: u16) -> Question {
    Question::new(&wire_name(name).unwrap(), qtype, false, false).unwrap()
}

/// With the name of its question so.
fn in_lower_case(mut answer: Vec<u8>) -> Vec<u8> {
    let end = 12 + answer[12..].iter().position(|&byte| byte == 0).unwrap();
    answer[12..end].make_ascii_lowercase();
    answer
}

fn changed(bytes: &[u8], at: usize, change: impl Fn(u8) -> u8) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] = change(bytes[at]);
    bytes
}
