//! Whatever bytes come, there is an answer or none, and no panic: random bytes, and sound messages with something changed,
//! for a bounded time. `EDGEMESH_FUZZ_SECONDS` has it go on for longer.

use std::time::{Duration, Instant};

use proptest::test_runner::{RngAlgorithm, TestRng};

use super::*;

/// What everything that reads or answers does with a message.
fn take(message: &[u8]) {
    let mut out = [0; MAX_UDP];
    match Query::parse(message) {
        Err(Rejected::Silently) => {}
        Err(Rejected::With(refusal)) => {
            let length = refusal.write(&mut out);
            assert_response(&out[..length], message);
        }
        Ok(query) => {
            assert!(query.udp_limit() <= MAX_UDP);
            assert_eq!(Name::from_wire(query.name().as_wire()), Some(*query.name()));
            let mut response = Response::to(&query, query.udp_limit(), &mut out).expect("room for the question");
            for _ in 0..3 {
                response.answer(query.name().as_wire(), 30, &Data::Cname(web().as_wire()));
            }
            let length = response.finish();
            assert_response(&out[..length], message);
        }
    }
    // As if it were an upstream's.
    for record in Records::of(message).into_iter().flatten() {
        let (owner, data) = (record.owner(), record.name_in_data(0));
        assert!(!record.to_string().contains(char::is_control), "{record}");
        for name in [owner, data].into_iter().flatten() {
            assert_eq!(Name::from_wire(name.as_wire()), Some(name));
        }
    }
}

/// A response to the message, which nobody answers, and which another library can read.
fn assert_response(response: &[u8], message: &[u8]) {
    assert_eq!(response[..2], message[..2]);
    assert!(matches!(Query::parse(response), Err(Rejected::Silently)));
    if let Err(error) = Message::from_bytes(response) {
        panic!("{error}: {response:?} to {message:?}");
    }
}

fn corpus() -> Vec<Vec<u8>> {
    let plain = query(web().as_wire(), rtype::A);
    let answered = respond(&plain, 512, |response| {
        response.answer(web().as_wire(), 30, &Data::Cname(name("a.example.com").as_wire()));
        response.answer(name("a.example.com").as_wire(), 30, &Data::A(Ipv4Addr::LOCALHOST));
        response.authority(name("example.com").as_wire(), 30, &Data::Ns(name("ns.example.com").as_wire()));
    });
    vec![
        plain.clone(),
        with_opt(plain.clone(), 1232, 0, &[]),
        with_opt(plain, 4096, 0, &[0, 8, 0, 7, 0, 1, 24, 0, 10, 0, 0, 0, 10, 0, 2, 1, 2]),
        query(&[0], rtype::ANY),
        query(
            &[[63].as_slice(), &[b'a'; 63]].concat().repeat(3).into_iter().chain([0]).collect::<Vec<u8>>(),
            rtype::PTR,
        ),
        answered,
    ]
}

/// For how long to go on.
pub(in crate::dns) fn budget() -> Duration {
    let seconds = std::env::var("EDGEMESH_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2);
    Duration::from_secs(seconds)
}

/// Always the same numbers, so that what fails once fails again.
pub(in crate::dns) struct Dice(TestRng);

impl Default for Dice {
    fn default() -> Self {
        Self(TestRng::deterministic_rng(RngAlgorithm::ChaCha))
    }
}

impl Dice {
    pub(in crate::dns) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.0.next_u64() % (bound.max(1) as u64)).unwrap()
    }

    /// One of the corpus, with up to six changes.
    pub(in crate::dns) fn mutated(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut message = corpus[self.below(corpus.len())].clone();
        for _ in 0..=self.below(6) {
            let at = self.below(message.len());
            match self.below(6) {
                0 => message[at] = self.below(256) as u8,
                1 => message[at] ^= 1 << self.below(8),
                2 => message.truncate(at.max(1)),
                3 => message.insert(at, [0, 0xc0, 0xff, 63, 12][self.below(5)]),
                4 => {
                    let part = message[at..message.len().min(at + 8)].to_vec();
                    message.extend(part);
                }
                _ => {
                    let other = &corpus[self.below(corpus.len())];
                    let from = self.below(other.len());
                    message.truncate(at.max(1));
                    message.extend_from_slice(&other[from..]);
                }
            }
        }
        message
    }
}

#[test]
fn no_message_does_harm() {
    let (end, corpus, mut dice) = (Instant::now() + budget(), corpus(), Dice::default());
    for message in &corpus {
        for length in 0..=message.len() {
            take(&message[..length]);
        }
    }
    let mut tried = 0_u64;
    while Instant::now() < end || tried < 1000 {
        take(&dice.mutated(&corpus));
        let scrap: Vec<u8> = (0..dice.below(80)).map(|_| dice.below(256) as u8).collect();
        take(&scrap);
        tried += 1;
    }
}
