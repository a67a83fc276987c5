//! Queries of every kind against a whole server with a small zone and a cache: whatever comes, what goes out is a proper
//! answer to it.

use std::net::IpAddr;

use super::*;
use crate::dns::{
    serve::{From, Handled, Transport},
    wire::{
        MAX_TCP, MAX_UDP, MIN_UDP, Query,
        tests::fuzz::{Dice, budget},
    },
};

/// Names of every form that there is, and names that are near to them.
const NAMES: [&str; 34] = [
    "web.shop.svc.cluster.local",
    "db.shop.svc.cluster.local",
    "_sql._tcp.db.shop.svc.cluster.local",
    "_sql._tcp.web.shop.svc.cluster.local",
    "_tcp.db.shop.svc.cluster.local",
    "_sql._udp.db.shop.svc.cluster.local",
    "10-244-1-7.db.shop.svc.cluster.local",
    "10-244-9-9.db.shop.svc.cluster.local",
    "outside.shop.svc.cluster.local",
    "missing.shop.svc.cluster.local",
    "many.shop.svc.cluster.local",
    "inside.shop.svc.cluster.local",
    "loop.shop.svc.cluster.local",
    "nothing.shop.svc.cluster.local",
    "shop.svc.cluster.local",
    "other.svc.cluster.local",
    "svc.cluster.local",
    "cluster.local",
    "dns-version.cluster.local",
    "ns.dns.cluster.local",
    "dns.cluster.local",
    "10-1-2-3.shop.pod.cluster.local",
    "fd00--1.shop.pod.cluster.local",
    "shop.pod.cluster.local",
    "www.example.com.shop.svc.cluster.local",
    "1.0.96.10.in-addr.arpa",
    "7.1.244.10.in-addr.arpa",
    "9.9.9.9.in-addr.arpa",
    "1.0.0.0.ip6.arpa",
    "outside.example.com",
    "many.example.com",
    "missing.example.com",
    "local",
    ".",
];

/// What a message was answered with, and how.
struct Bench<'w> {
    core: &'w Core,
    counters: Counters,
    zone: Option<Arc<Zone>>,
    waited: usize,
    answered: usize,
    truncated: usize,
}

impl Bench<'_> {
    /// The answer in a buffer that is just as long as those of the sockets; None where there is none, or not yet.
    fn handle(&mut self, message: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let mut out = vec![0; if transport == Transport::Udp { MAX_UDP } else { MAX_TCP }];
        let client = IpAddr::from([10, 244, 1, 2]);
        let from = From { client, transport, received: Instant::now(), counters: &self.counters };
        match self.core.handle(message, &from, self.zone.as_deref(), &mut out) {
            Handled::Ignored => None,
            Handled::Waits(_) => {
                self.waited += 1;
                None
            }
            Handled::Answered(length, _) => {
                assert!(length > 0, "{message:?}");
                out.truncate(length);
                Some(out)
            }
        }
    }

    fn take(&mut self, message: &[u8]) {
        let Some(whole) = self.handle(message, Transport::Tcp) else { return };
        let Some(response) = self.handle(message, Transport::Udp) else { panic!("no answer by UDP to {message:?}") };
        let query = Query::parse(message).ok();
        let limit = query.as_ref().map_or(MIN_UDP, Query::udp_limit);
        assert!(response.len() <= limit, "{} bytes of {limit} to {message:?}", response.len());
        let [whole, read] = [&whole, &response].map(|bytes| {
            assert_eq!(bytes[..2], message[..2], "the id");
            assert!(bytes[2] & 0x80 != 0, "it is a response");
            if let Some(query) = &query {
                let question = query.question();
                assert_eq!(&bytes[12..12 + question.len()], question, "the question in its own case");
                assert_eq!(bytes[2] & 1, message[2] & 1, "recursion desired");
            }
            Message::from_bytes(bytes).unwrap_or_else(|error| panic!("{error}: {bytes:?} to {message:?}"))
        });
        assert!(query.as_ref().is_none_or(|query| query.edns.is_some() == whole.edns.is_some()), "EDNS to {message:?}");
        assert!(!whole.metadata.truncation, "nothing here is too long for TCP: {message:?}");
        let records = |message: &Message| message.answers.len() + message.authorities.len();
        let cut = records(&read) < records(&whole);
        assert_eq!(read.metadata.truncation, cut, "TC for {message:?}: {read:?} of {whole:?}");
        assert_eq!(read.metadata.response_code, whole.metadata.response_code, "{message:?}");
        self.answered += 1;
        self.truncated += usize::from(cut);
    }
}

/// In any mixture of cases.
fn in_any_case(message: &mut [u8], dice: &mut Dice) {
    let end = message.len() - 4;
    for byte in &mut message[12..end] {
        if byte.is_ascii_lowercase() && dice.below(2) == 0 {
            byte.make_ascii_uppercase();
        }
    }
}

#[tokio::test]
async fn every_question_is_answered_properly_or_waits() {
    let mut world = World::start().await;
    world.sync().await;
    // So that what is outside comes from the cache.
    for name in ["outside.example.com", "many.example.com", "missing.example.com"] {
        for kind in [RecordType::A, RecordType::AAAA] {
            world.ask(name, kind).await;
        }
    }
    let (dns, end) = (world.dns.clone(), Instant::now() + budget());
    let counted = tokio::task::spawn_blocking(move || {
        let zone = dns.core.zone();
        let counters = Counters::default();
        let mut bench = Bench { core: &dns.core, counters, zone, waited: 0, answered: 0, truncated: 0 };
        let (mut dice, mut corpus) = (Dice::default(), Vec::new());
        for name in NAMES {
            for kind in (0..67).chain(249..258) {
                let mut message = question(7, name, RecordType::from(kind));
                in_any_case(&mut message, &mut dice);
                bench.take(&message);
                let edns = with_edns(message.clone());
                bench.take(&edns);
                if [1, 12, 16, 28, 33, 255].contains(&kind) {
                    corpus.extend([message, edns]);
                }
            }
        }
        let mut tried = 0;
        while Instant::now() < end || tried < 1000 {
            bench.take(&dice.mutated(&corpus));
            // Sound, but for its flags, size and class.
            let mut message = corpus[dice.below(corpus.len())].clone();
            message[2] = dice.below(2) as u8;
            message[3] = dice.below(256) as u8;
            if message[11] == 1 {
                let at = message.len() - 8;
                message[at..at + 2].copy_from_slice(&(dice.below(3000) as u16).to_be_bytes());
                message[at + 4] = [0, 0x80][dice.below(2)];
            }
            bench.take(&message);
            tried += 1;
        }
        (bench.answered, bench.truncated, bench.waited)
    });
    let (answered, truncated, waited) = counted.await.unwrap();
    assert!(answered > 1000 && truncated > 0 && waited > 0, "{answered} answered, {truncated} cut, {waited} waited");
    world.stop().await;
}
