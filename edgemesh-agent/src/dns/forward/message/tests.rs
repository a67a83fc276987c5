use proptest::{collection::vec, prelude::*};

use super::*;
use crate::dns::forward::fake::{A, Record, opt, query, record, respond, soa};

const AAAA: u16 = 28;
const MX: u16 = 15;

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn limits() -> TtlLimits {
    TtlLimits { floor: seconds(5), ceiling: seconds(3600), negative_ceiling: seconds(300) }
}

fn answer(name: &str, qtype: u16, code: u8, sections: [&[Record]; 3]) -> Message {
    let (query, question) = query(7, name, qtype);
    let packet = respond(&query, code, sections);
    let Received::Answer(message) = Message::receive(&packet, 7, &question, &limits()) else { panic!("{packet:?}") };
    message
}

fn view(question: &[u8]) -> ClientView<'_> {
    ClientView {
        id: 0x1234,
        question,
        recursion_desired: true,
        checking_disabled: false,
        edns: false,
        dnssec_ok: false,
        limit: 65535,
    }
}

fn copy(message: &Message, to: &ClientView<'_>, age: u32) -> Vec<u8> {
    let mut out = vec![0xee; 65535];
    let length = message.write(to, |ttl| ttl.saturating_sub(age), None, &mut out);
    assert!(out[length..].iter().all(|&byte| byte == 0xee), "nothing is written past the end");
    out.truncate(length);
    out
}

#[test]
fn a_client_gets_its_id_its_case_and_ttls_that_have_run_down() {
    let sections: [&[Record]; 3] = [&[record(A, 60, vec![192, 0, 2, 1])], &[record(2, 90, vec![0xc0, 12])], &[]];
    let message = answer("www.example", A, 0, sections);
    let asked = b"\x03WwW\x07eXample\0\0\x01\0\x01";
    let (query, _) = query(0x1234, "www.example", A);
    let mut expected =
        respond(&query, 0, [&[record(A, 50, vec![192, 0, 2, 1])], &[record(2, 80, vec![0xc0, 12])], &[]]);
    expected[12..12 + asked.len()].copy_from_slice(asked);
    assert_eq!(copy(&message, &view(asked), 10), expected);
    assert_eq!((message.rcode(), message.answers(), message.lifetime()), (0, 1, Some(seconds(60))));
}

#[test]
fn edns_is_between_us_and_each_side() {
    let (_, question) = query(0, "www.example", A);
    let sections: [&[Record]; 3] = [&[record(A, 60, vec![192, 0, 2, 1])], &[], &[record(AAAA, 60, vec![1; 16]), opt()]];
    let message = answer("www.example", A, 0, sections);
    let plain = copy(&message, &view(&question), 0);
    assert_eq!(plain[10..12], [0, 1], "the upstream's OPT is gone");
    assert!(!plain.windows(3).any(|bytes| bytes == [0, 0, 41]));
    let with = copy(&message, &ClientView { edns: true, dnssec_ok: true, ..view(&question) }, 0);
    assert_eq!(with[10..12], [0, 2]);
    assert_eq!(with[plain.len()..], [0, 0, 41, 4, 208, 0, 0, 0x80, 0, 0, 0]);
    let mut stale = [0; 512];
    let edns = ClientView { edns: true, ..view(&question) };
    let length = message.write(&edns, |_| 30, Some(Extended::Stale), &mut stale);
    assert_eq!(stale[plain.len()..length], [0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 6, 0, 15, 0, 2, 0, 3]);
}

#[test]
fn what_is_behind_an_opt_goes_with_it() {
    let sections: [&[Record]; 3] = [&[record(A, 60, vec![192, 0, 2, 1])], &[], &[opt(), record(AAAA, 60, vec![1; 16])]];
    let (_, question) = query(0, "www.example", A);
    let bytes = copy(&answer("www.example", A, 0, sections), &view(&question), 0);
    assert_eq!(bytes[4..12], [0, 1, 0, 1, 0, 0, 0, 0]);
    assert_eq!(bytes.len(), 12 + question.len() + 16);
}

#[test]
fn what_is_too_long_loses_the_additional_and_then_everything() {
    let (_, question) = query(0, "www.example", A);
    let sections: [&[Record]; 3] =
        [&vec![record(A, 60, vec![192, 0, 2, 1]); 20], &[], &vec![record(AAAA, 60, vec![1; 16]); 20]];
    let message = answer("www.example", A, 0, sections);
    let all = copy(&message, &view(&question), 0);
    let part = all.len() - 20 * 28;
    for (limit, length, counts, truncated) in [
        (all.len(), all.len(), [0, 20, 0, 0, 0, 20], 0),
        (all.len() - 1, part, [0, 20, 0, 0, 0, 0], 0),
        (part, part, [0, 20, 0, 0, 0, 0], 0),
        (part - 1, 12 + question.len(), [0; 6], TC),
        (12, 0, [0; 6], 0),
    ] {
        let bytes = copy(&message, &ClientView { limit, ..view(&question) }, 0);
        assert_eq!(bytes.len(), length, "{limit}");
        if length > 0 {
            assert_eq!((&bytes[6..12], bytes[2] & TC), (&counts[..], truncated), "{limit}");
        }
        let with = copy(&message, &ClientView { limit, edns: true, ..view(&question) }, 0);
        assert!(with.len() <= limit);
    }
}

#[test]
fn ttls_are_kept_within_limits() {
    let a = |ttl| record(A, ttl, vec![192, 0, 2, 1]);
    let lifetime = |ttls: [u32; 2]| answer("a", A, 0, [&ttls.map(a), &[], &[]]).lifetime();
    assert_eq!(lifetime([300, 60]), Some(seconds(60)), "the shortest counts");
    assert_eq!(lifetime([0, 60]), Some(seconds(5)), "the floor");
    assert_eq!(lifetime([100_000, 200_000]), Some(seconds(3600)), "the ceiling");
    assert_eq!(lifetime([0x8000_0000, 60]), Some(seconds(5)), "the highest bit means zero (RFC 2181)");
    let (_, question) = query(0, "a", A);
    let bytes = copy(&answer("a", A, 0, [&[a(100_000)], &[], &[]]), &view(&question), 0);
    assert_eq!(bytes[bytes.len() - 10..bytes.len() - 6], 3600_u32.to_be_bytes());
}

#[test]
fn nothing_is_kept_as_long_as_the_soa_says() {
    let cname = record(5, 60, vec![0xc0, 12]);
    let lifetime =
        |code, answers: &[Record], authority: &[Record]| answer("a", AAAA, code, [answers, authority, &[]]).lifetime();
    assert_eq!(lifetime(3, &[], &[soa(900, 30)]), Some(seconds(30)), "its minimum");
    assert_eq!(lifetime(3, &[], &[soa(20, 900)]), Some(seconds(20)), "its TTL");
    assert_eq!(lifetime(0, &[], &[soa(9000, 9000)]), Some(seconds(300)), "the ceiling");
    assert_eq!(lifetime(0, &[], &[soa(0, 0)]), Some(seconds(5)), "the floor");
    assert_eq!(lifetime(0, std::slice::from_ref(&cname), &[soa(900, 90)]), Some(seconds(60)), "the alias");
    assert_eq!(lifetime(0, &[], &[]), None, "RFC 2308 section 5");
    assert_eq!(lifetime(3, &[], &[]), None);
    assert_eq!(lifetime(0, &[cname], &[]), None);
    assert_eq!(lifetime(0, &[], &[record(2, 60, vec![0xc0, 12])]), None, "a referral");
    assert_eq!(lifetime(2, &[], &[soa(900, 30)]), None, "a failure");
    assert_eq!(lifetime(0, &[record(AAAA, 60, vec![1; 16])], &[soa(900, 30)]), Some(seconds(60)), "no NODATA");
    let ours = answer("a", AAAA, 3, [&[], &[soa(900, 30)], &[]]);
    let (_, question) = query(0, "a", AAAA);
    let bytes = copy(&ours, &view(&question), 10);
    let ttl = 12 + question.len() + 6;
    assert_eq!(bytes[ttl..ttl + 4], 20_u32.to_be_bytes(), "clients are told the same");
}

#[test]
fn records_of_unknown_types_pass_unharmed() {
    let data: Vec<u8> = (0..=255).collect();
    let message = answer("a", 65280, 0, [&[record(65280, 60, data.clone())], &[], &[]]);
    let (_, question) = query(0, "a", 65280);
    assert!(copy(&message, &view(&question), 0).ends_with(&data));
    assert_eq!(message.lifetime(), Some(seconds(60)));
}

#[test]
fn the_upstreams_word_on_signatures_is_for_those_who_ask() {
    let (query, question) = query(7, "a", MX);
    let mut packet = respond(&query, 0, [&[record(MX, 60, vec![0, 1, 0xc0, 12])], &[], &[]]);
    packet[2] |= 0x04;
    packet[3] |= AD;
    let Received::Answer(message) = Message::receive(&packet, 7, &question, &limits()) else { panic!() };
    let plain = copy(&message, &view(&question), 0);
    assert_eq!(plain[2..4], [QR | RD, RA], "we are not its authority either");
    let wanted = ClientView { edns: true, dnssec_ok: true, checking_disabled: true, ..view(&question) };
    assert_eq!(copy(&message, &wanted, 0)[2..4], [QR | RD, RA | AD | CD]);
}

#[test]
fn only_the_answer_to_the_question_is_taken() {
    let (sent, question) = query(7, "www.example", A);
    let right = respond(&sent, 0, [&[record(A, 60, vec![192, 0, 2, 1])], &[], &[]]);
    let receive = |packet: &[u8]| format!("{:?}", Message::receive(packet, 7, &question, &limits()));
    let with = |at: usize, byte: u8| {
        let mut packet = right.clone();
        packet[at] = byte;
        receive(&packet)
    };
    assert!(receive(&right).starts_with("Answer"));
    assert_eq!(with(1, 8), "NotOurs", "another id");
    assert_eq!(with(2, 1), "NotOurs", "a query");
    assert_eq!(with(2, 0xa8), "NotOurs", "another opcode");
    assert_eq!(with(2, 0x82), "Truncated");
    assert_eq!(with(5, 2), "NotOurs", "two questions");
    assert_eq!(with(13, b'v'), "NotOurs", "another name");
    assert_eq!(with(13, b'W'), "OtherCase");
    assert_eq!(with(26, 28), "NotOurs", "another type");
    assert_eq!(with(7, 2), "Malformed", "a record is missing");
    let record = 12 + question.len();
    assert_eq!(with(record + 1, 0xff), "Malformed", "a pointer ahead");
    assert_eq!(with(record, 0x40), "Malformed", "a label of no known kind");
    assert_eq!(with(record + 11, 5), "Malformed", "data past the end");
    for length in 0..right.len() {
        let text = receive(&right[..length]);
        assert!(text == "NotOurs" || text == "Malformed", "{length}: {text}");
    }
    let refused = [&[0, 7, 0x80, 0x81][..], &[0; 8]].concat();
    let Received::Answer(message) = Message::receive(&refused, 7, &question, &limits()) else { panic!() };
    assert_eq!(message.rcode(), FORMERR);
    assert_eq!(copy(&message, &view(&question), 0).len(), 12 + question.len());
}

#[test]
fn a_failure_is_servfail_with_the_question() {
    let question = crate::dns::forward::fake::question("www.example", A);
    let (_, asked) = query(0, "www.example", A);
    let bytes = copy(&Message::failure(&question), &view(&asked), 0);
    assert_eq!(bytes, [&[0x12, 0x34, QR | RD, RA | 2, 0, 1, 0, 0, 0, 0, 0, 0][..], &asked].concat());
}

proptest! {
    #[test]
    fn damaged_answers_never_hurt(
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
        limit in 0_usize..700,
        edns in any::<bool>(),
        age in any::<u32>(),
    ) {
        let (sent, question) = query(7, "www.example", A);
        let records = vec![record(A, 60, vec![192, 0, 2, 1]); 3];
        let mut packet = respond(&sent, 0, [&records, &[soa(900, 30)], &[record(AAAA, 60, vec![1; 16]), opt()]]);
        for (at, byte) in changes {
            let at = at.index(packet.len());
            packet[at] = byte;
        }
        packet.truncate(cut.index(packet.len() + 1).max(12 + question.len()));
        if let Received::Answer(message) = Message::receive(&packet, 7, &question, &limits()) {
            let mut out = [0; 1024];
            let to = ClientView { limit, edns, ..view(&question) };
            let length = message.write(&to, |ttl| ttl.saturating_sub(age), None, &mut out);
            prop_assert!(length <= limit);
            prop_assert!(length == 0 || out[12..12 + question.len()] == question[..]);
            // What we write is a message that we would take.
            if length > 0 && out[2] & TC == 0 {
                let again = Message::receive(&out[..length], 0x1234, &question, &limits());
                prop_assert!(matches!(again, Received::Answer(_)), "{again:?}");
            }
        }
    }

    #[test]
    fn noise_never_hurts(packet in vec(any::<u8>(), 0..600)) {
        let (_, question) = query(7, "www.example", A);
        let taken = Message::receive(&packet, 7, &question, &limits());
        prop_assert!(!matches!(taken, Received::OtherCase | Received::Truncated));
    }
}
