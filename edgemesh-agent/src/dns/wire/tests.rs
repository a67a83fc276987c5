use std::net::{Ipv4Addr, Ipv6Addr};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{RData, RecordType},
    serialize::binary::BinDecodable,
};
use proptest::prelude::*;

use super::*;

pub(in crate::dns) mod fuzz;

/// A query as dig sends it: recursion desired, no additional records.
fn query(name: &[u8], qtype: u16) -> Vec<u8> {
    let mut message = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(name);
    message.extend_from_slice(&qtype.to_be_bytes());
    message.extend_from_slice(&[0, 1]);
    message
}

/// The same with an OPT record of this payload size, version and data.
fn with_opt(mut message: Vec<u8>, size: u16, version: u8, data: &[u8]) -> Vec<u8> {
    message[11] += 1;
    message.extend_from_slice(&[0, 0, 41]);
    message.extend_from_slice(&size.to_be_bytes());
    message.extend_from_slice(&[0, version, 0x80, 0]);
    message.extend_from_slice(&u16::try_from(data.len()).unwrap().to_be_bytes());
    message.extend_from_slice(data);
    message
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn web() -> Name {
    name("web.default.svc.cluster.local")
}

/// What the message is refused with, as another library reads it; None if nothing is sent.
fn refused(message: &[u8]) -> Option<ResponseCode> {
    match Query::parse(message) {
        Ok(query) => panic!("accepted {query:?}"),
        Err(Rejected::Silently) => None,
        Err(Rejected::With(refusal)) => {
            let mut out = [0; MIN_UDP];
            let length = refusal.write(&mut out);
            let response = Message::from_bytes(&out[..length]).unwrap();
            assert_eq!(response.metadata.id, u16::from_be_bytes([message[0], message[1]]));
            Some(response.metadata.response_code)
        }
    }
}

#[test]
fn reads_what_dig_sends() {
    let mixed: Name = "wEb.deFault.SVC.cluster.local".parse().unwrap();
    let message = with_opt(query(mixed.as_wire(), rtype::A), 4096, 0, &[0, 10, 0, 2, 1, 2]);
    let query = Query::parse(&message).unwrap();
    assert_eq!((query.id, query.qtype, *query.name()), (0xabcd, rtype::A, web()));
    assert_eq!(query.edns, Some(Edns { udp_size: 4096, dnssec_ok: true }));
    assert_eq!(query.udp_limit(), MAX_UDP, "no more than passes unfragmented");
    assert_eq!(query.question(), &message[12..12 + mixed.as_wire().len() + 4]);
}

#[test]
fn a_client_that_does_not_say_or_says_too_little_gets_512_bytes() {
    let plain = query(web().as_wire(), rtype::A);
    assert_eq!(Query::parse(&plain).unwrap().udp_limit(), 512);
    assert_eq!(Query::parse(&with_opt(plain.clone(), 0, 0, &[])).unwrap().udp_limit(), 512);
    assert_eq!(Query::parse(&with_opt(plain, 800, 0, &[])).unwrap().udp_limit(), 800);
}

#[test]
fn responses_and_scraps_are_never_answered() {
    let mut response = query(web().as_wire(), rtype::A);
    response[2] |= 0x80;
    assert_eq!(refused(&response), None);
    for length in 0..HEADER {
        assert_eq!(refused(&response[..length]), None);
        assert_eq!(refused(&query(web().as_wire(), rtype::A)[..length]), None);
    }
}

#[test]
fn what_is_wrong_is_answered_as_the_rfcs_say() {
    // 16 is both, and the other library prefers the one for signatures.
    use ResponseCode::{BADSIG as BADVERS, FormErr, NotImp, Refused};
    let sound = || query(web().as_wire(), rtype::A);
    let changed = |at: usize, value: u8| {
        let mut message = sound();
        message[at] = value;
        message
    };
    let class = |class: u8| {
        let mut message = sound();
        *message.last_mut().unwrap() = class;
        message
    };
    let cut = |length: usize| sound()[..sound().len() - length].to_vec();
    let mut twice = with_opt(with_opt(sound(), 1232, 0, &[]), 1232, 0, &[]);
    twice[11] = 2;
    let mut elsewhere = with_opt(sound(), 1232, 0, &[]);
    (elsewhere[9], elsewhere[11]) = (1, 0);
    let mut owned = with_opt(sound(), 1232, 0, &[]);
    let root = sound().len();
    owned.splice(root..=root, [1, b'x', 0]);
    let pointer = query(&[0xc0, 12], rtype::A);
    let long: Vec<u8> = [b"\x3f".as_slice(), &[b'a'; 63]].concat().repeat(4).into_iter().chain([0]).collect();
    let cases: Vec<(&str, Vec<u8>, ResponseCode)> = vec![
        ("a status query", changed(2, 0x10), NotImp),
        ("a notification", changed(2, 0x20), NotImp),
        ("an update", changed(2, 0x28), NotImp),
        ("no question", changed(5, 0), FormErr),
        ("two questions", changed(5, 2), FormErr),
        ("no name", cut(4 + web().as_wire().len()), FormErr),
        ("half a name", cut(10), FormErr),
        ("no class", cut(2), FormErr),
        ("a record that is announced and missing", changed(11, 1), FormErr),
        ("an answer that is announced and missing", changed(7, 1), FormErr),
        ("a pointer for a name", pointer, FormErr),
        ("a label of an unknown kind", changed(12, 0x41), FormErr),
        ("a name of 257 bytes", query(&long, rtype::A), FormErr),
        ("two OPT records", twice, FormErr),
        ("an OPT record among the authorities", elsewhere, FormErr),
        ("an OPT record of a name", owned, FormErr),
        ("half an option", with_opt(sound(), 1232, 0, &[0, 10, 0, 8, 1]), FormErr),
        ("OPT as a question", query(web().as_wire(), rtype::OPT), FormErr),
        ("type 0", query(web().as_wire(), 0), FormErr),
        ("EDNS version 1", with_opt(sound(), 1232, 1, &[]), BADVERS),
        ("CHAOS, as for version.bind", class(3), Refused),
        ("any class", class(255), Refused),
        ("a transfer", query(web().as_wire(), 252), Refused),
        ("an incremental transfer", query(web().as_wire(), 251), Refused),
        ("a key negotiation", query(web().as_wire(), rtype::TKEY), Refused),
    ];
    for (what, message, expected) in cases {
        assert_eq!(refused(&message), Some(expected), "{what}");
    }
}

#[test]
fn a_refusal_shows_the_question_in_its_own_case_and_speaks_edns_to_who_does() {
    let mixed: Name = "WeB.default".parse().unwrap();
    let message = with_opt(query(mixed.as_wire(), 252), 4096, 0, &[]);
    let Err(Rejected::With(refusal)) = Query::parse(&message) else { panic!() };
    let mut out = [0; MIN_UDP];
    let length = refusal.write(&mut out);
    assert_eq!(out[12..12 + mixed.as_wire().len()], *mixed.as_wire());
    let response = Message::from_bytes(&out[..length]).unwrap();
    assert!(response.metadata.recursion_desired && response.metadata.recursion_available);
    assert_eq!(response.edns.unwrap().max_payload(), 1232);
    assert_eq!(refusal.write(&mut [0; 100]), 0, "no room, no response");
}

/// Writes a response to a query for `name` and gives its bytes.
fn respond(message: &[u8], limit: usize, write: impl FnOnce(&mut Response<'_>)) -> Vec<u8> {
    let query = Query::parse(message).unwrap();
    let mut out = vec![0xee; limit.max(MIN_UDP)];
    let mut response = Response::to(&query, limit, &mut out).unwrap();
    write(&mut response);
    let length = response.finish();
    assert!(length <= limit, "{length} of {limit} bytes");
    out.truncate(length);
    out
}

#[test]
fn every_kind_of_record_is_read_back_by_another_library() {
    let (owner, target) = (web(), name("web-0.web.default.svc.cluster.local"));
    let ns = name("ns.dns.cluster.local");
    let mailbox = name("hostmaster.cluster.local");
    let soa = Soa {
        mname: ns.as_wire(),
        rname: mailbox.as_wire(),
        serial: 7,
        refresh: 7200,
        retry: 1800,
        expire: 86_400,
        minimum: 5,
    };
    let srv = SrvData { priority: 0, weight: 50, port: 80, target: target.as_wire() };
    let bytes = respond(&with_opt(query(owner.as_wire(), rtype::SRV), 1232, 0, &[]), 1232, |response| {
        response.authoritative();
        response.answer(owner.as_wire(), 30, &Data::Srv(srv));
        response.answer(owner.as_wire(), 30, &Data::A(Ipv4Addr::new(10, 96, 0, 1)));
        response.answer(owner.as_wire(), 30, &Data::Cname(target.as_wire()));
        response.answer(owner.as_wire(), 30, &Data::Ptr(target.as_wire()));
        response.answer(owner.as_wire(), 30, &Data::Txt(b"1.1.0"));
        response.answer(owner.as_wire(), 30, &Data::Hinfo(b"RFC8482", b""));
        response.authority(name("cluster.local").as_wire(), 5, &Data::Soa(soa));
        response.authority(name("cluster.local").as_wire(), 5, &Data::Ns(ns.as_wire()));
        response.additional(target.as_wire(), 30, &Data::Aaaa(Ipv6Addr::LOCALHOST));
    });
    let message = Message::from_bytes(&bytes).unwrap();
    assert!(message.metadata.authoritative && message.metadata.recursion_available);
    assert_eq!(message.edns.as_ref().unwrap().max_payload(), 1232);
    let shown: Vec<String> = message
        .answers
        .iter()
        .chain(&message.authorities)
        .chain(&message.additionals)
        .map(|record| format!("{} {} {} {}", record.name, record.ttl, record.record_type(), record.data))
        .collect();
    let web = "web.default.svc.cluster.local.";
    assert_eq!(
        shown,
        [
            format!("{web} 30 SRV 0 50 80 web-0.{web}"),
            format!("{web} 30 A 10.96.0.1"),
            format!("{web} 30 CNAME web-0.{web}"),
            format!("{web} 30 PTR web-0.{web}"),
            format!("{web} 30 TXT 1.1.0"),
            format!("{web} 30 HINFO RFC8482 "),
            "cluster.local. 5 SOA ns.dns.cluster.local. hostmaster.cluster.local. 7 7200 1800 86400 5".to_owned(),
            "cluster.local. 5 NS ns.dns.cluster.local.".to_owned(),
            format!("web-0.{web} 30 AAAA ::1"),
        ]
    );
    // And by our own reader.
    let read: Vec<ReadRecord<'_>> = Records::of(&bytes).unwrap().collect();
    assert_eq!(read.len(), 10, "with the OPT record");
    let printed: Vec<String> =
        read.iter().take(9).filter(|record| record.rtype != rtype::SOA).map(ToString::to_string).collect();
    let quoted = |line: &String| line.replace("TXT 1.1.0", "TXT \"1.1.0\"").replace("RFC8482 ", "\"RFC8482\" \"\"");
    let expected: Vec<String> = shown.iter().filter(|line| !line.contains(" SOA ")).map(quoted).collect();
    assert_eq!(printed, expected);
    assert_eq!(read[2].name_in_data(0), Some(target));
    assert_eq!(read[8].owner(), Some(target));
    assert_eq!((read[7].section, read[8].section), (Section::Authority, Section::Additional));
}

#[test]
fn names_are_compressed_and_the_target_of_an_srv_record_is_not() {
    let owner = web();
    let target = name("web-0.web.default.svc.cluster.local");
    let srv = SrvData { priority: 0, weight: 1, port: 80, target: target.as_wire() };
    let message = query(owner.as_wire(), rtype::SRV);
    let bytes = respond(&message, 512, |response| {
        response.answer(owner.as_wire(), 30, &Data::Srv(srv));
        response.additional(target.as_wire(), 30, &Data::A(Ipv4Addr::LOCALHOST));
    });
    let pointer_and_head = 2 + 10;
    let expected = message.len() + pointer_and_head + 6 + target.as_wire().len() + pointer_and_head + 4;
    assert_eq!(bytes.len(), expected);
}

#[test]
fn what_does_not_fit_is_left_out_whole_and_told() {
    let owner = web();
    for limit in 512..560 {
        let bytes = respond(&with_opt(query(owner.as_wire(), rtype::A), 1232, 0, &[]), limit, |response| {
            for last in 0..100 {
                response.answer(owner.as_wire(), 30, &Data::A(Ipv4Addr::new(10, 0, 0, last)));
            }
            assert!(response.is_truncated());
        });
        let message = Message::from_bytes(&bytes).unwrap();
        assert!(message.metadata.truncation);
        assert!(message.edns.is_some(), "its room is kept");
        assert_eq!(message.answers.len(), (limit - 11 - 12 - owner.as_wire().len() - 4) / 16);
    }
    // An additional record is one that nobody needs.
    let bytes = respond(&query(owner.as_wire(), rtype::A), 512, |response| {
        for last in 0..100 {
            response.additional(owner.as_wire(), 30, &Data::A(Ipv4Addr::new(10, 0, 0, last)));
        }
    });
    let message = Message::from_bytes(&bytes).unwrap();
    assert!(!message.metadata.truncation && message.additionals.len() == 29, "{message:?}");
}

#[test]
fn an_extended_error_has_its_room_set_aside_and_is_for_clients_with_edns() {
    let plain = query(web().as_wire(), rtype::A);
    let edns = with_opt(plain.clone(), 512, 0, &[]);
    let full = |message: &[u8]| {
        respond(message, 512, |response| {
            response.extend(Extended::Stale);
            while response.answer(web().as_wire(), 30, &Data::A(Ipv4Addr::LOCALHOST)) {}
        })
    };
    let (with, without) = (full(&edns), full(&plain));
    assert!(with.len() <= 512 && with.ends_with(&[0, 6, 0, 15, 0, 2, 0, 3]), "{with:?}");
    let (with, without) = (Message::from_bytes(&with).unwrap(), Message::from_bytes(&without).unwrap());
    assert!(with.metadata.truncation && with.edns.is_some() && without.edns.is_none());
    assert_eq!((with.answers.len(), without.answers.len()), (28, 29));
    let parsed = Query::parse(&edns).unwrap_or_else(|error| panic!("{error:?}"));
    let mut out = [0; 512];
    let length = parsed.refuse(Rcode::ServFail).because(Some(Extended::NoReachableAuthority)).write(&mut out);
    assert!(out[..length].ends_with(&[0, 6, 0, 15, 0, 2, 0, 22]));
    assert_eq!(Message::from_bytes(&out[..length]).unwrap().metadata.response_code, ResponseCode::ServFail);
}

#[test]
fn texts_are_names_and_names_are_texts() {
    for (text, wire) in [
        (".", b"\0".as_slice()),
        ("a.", b"\x01a\0"),
        (r"a\.b.\065\\.", b"\x03a.b\x02A\\\0"),
        (r"\000\255.", b"\x02\0\xff\0"),
    ] {
        let name: Name = text.parse().unwrap();
        assert_eq!(name.as_wire(), wire, "{text}");
        assert_eq!(Name::from_wire(wire), Some(name));
        assert_eq!(name.to_string().parse::<Name>().unwrap(), name, "{name}");
    }
    assert_eq!("web".parse::<Name>(), "web.".parse());
    let long = "a".repeat(64);
    let longest = ["a".repeat(63), "a".repeat(63), "a".repeat(63), "a".repeat(61)].join(".");
    assert_eq!(longest.parse::<Name>().unwrap().as_wire().len(), MAX_NAME);
    for (text, error) in [
        ("", NameError::Empty),
        ("a..b", NameError::Empty),
        (".a", NameError::Empty),
        (&long, NameError::LongLabel),
        (&format!("{longest}a"), NameError::Long),
        (r"\", NameError::Escape),
        (r"\12", NameError::Escape),
        (r"\256", NameError::Escape),
    ] {
        assert_eq!(text.parse::<Name>(), Err(error), "{text}");
    }
    for wire in [b"".as_slice(), b"\x01a", b"\x02a\0", b"\xc0\x0c", b"\0\0"] {
        assert_eq!(Name::from_wire(wire), None, "{wire:?}");
    }
}

#[test]
fn types_have_names() {
    for number in [rtype::A, rtype::AAAA, rtype::SRV, rtype::HTTPS, 65_280] {
        assert_eq!(rtype::parse(&rtype::name(number)), Some(number));
    }
    assert_eq!((rtype::parse("ptr"), rtype::parse("type28")), (Some(rtype::PTR), Some(rtype::AAAA)));
    assert_eq!((rtype::parse("WEB"), rtype::parse("TYPE70000"), rtype::parse("€")), (None, None, None));
}

/// Names that share ends, as those of one cluster do.
fn any_name() -> impl Strategy<Value = Name> {
    let label = prop_oneof![
        Just(b"svc".to_vec()),
        Just(b"WEB".to_vec()),
        Just(b"web".to_vec()),
        Just(b"cluster".to_vec()),
        prop::collection::vec(any::<u8>(), 1..64),
    ];
    prop::collection::vec(label, 0..8).prop_map(|labels| {
        let mut name = Name::root();
        for label in labels {
            // Those that would make it too long are left out.
            let _ = name.push(&label);
        }
        name
    })
}

#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a test has a few of them")]
enum Kind {
    A([u8; 4]),
    Aaaa([u8; 16]),
    Named(u8, Name),
    Srv(u16, Name),
    Txt(Vec<u8>),
    Soa(Name, Name, u32),
}

impl Kind {
    fn data(&self) -> Data<'_> {
        match self {
            Self::A(octets) => Data::A((*octets).into()),
            Self::Aaaa(octets) => Data::Aaaa((*octets).into()),
            Self::Named(0, name) => Data::Cname(name.as_wire()),
            Self::Named(1, name) => Data::Ptr(name.as_wire()),
            Self::Named(_, name) => Data::Ns(name.as_wire()),
            Self::Srv(port, target) => {
                Data::Srv(SrvData { priority: 1, weight: 2, port: *port, target: target.as_wire() })
            }
            Self::Txt(text) => Data::Txt(text),
            Self::Soa(mname, rname, serial) => Data::Soa(Soa {
                mname: mname.as_wire(),
                rname: rname.as_wire(),
                serial: *serial,
                refresh: 1,
                retry: 2,
                expire: 3,
                minimum: 4,
            }),
        }
    }
}

fn any_kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        any::<[u8; 4]>().prop_map(Kind::A),
        any::<[u8; 16]>().prop_map(Kind::Aaaa),
        (0_u8..3, any_name()).prop_map(|(which, name)| Kind::Named(which, name)),
        (any::<u16>(), any_name()).prop_map(|(port, name)| Kind::Srv(port, name)),
        prop::collection::vec(any::<u8>(), 0..256).prop_map(Kind::Txt),
        (any_name(), any_name(), any::<u32>()).prop_map(|(mname, rname, serial)| Kind::Soa(mname, rname, serial)),
    ]
}

/// A name of the other library in our form.
fn wire_of(name: &hickory_proto::rr::Name) -> Vec<u8> {
    let labels =
        name.iter().flat_map(|label| std::iter::once(u8::try_from(label.len()).unwrap()).chain(label.iter().copied()));
    labels.chain([0]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn another_library_reads_what_we_write(
        question in any_name(),
        edns in any::<bool>(),
        limit in 512_usize..3000,
        records in prop::collection::vec((0_usize..3, any_name(), any::<u32>(), any_kind()), 0..24),
    ) {
        let mut records = records;
        records.sort_by_key(|(section, ..)| *section);
        let plain = query(question.as_wire(), rtype::A);
        let message = if edns { with_opt(plain, 1232, 0, &[]) } else { plain };
        let mut truncated = false;
        let bytes = respond(&message, limit, |response| {
            for (section, owner, ttl, kind) in &records {
                let add = [Response::answer, Response::authority, Response::additional][*section];
                add(response, owner.as_wire(), *ttl, &kind.data());
            }
            truncated = response.is_truncated();
        });
        let read = Message::from_bytes(&bytes).map_err(|error| TestCaseError::fail(format!("{error}: {bytes:?}")))?;
        prop_assert_eq!(read.metadata.truncation, truncated);
        prop_assert_eq!(read.edns.is_some(), edns);
        let sections = [&read.answers, &read.authorities, &read.additionals];
        let all: Vec<_> = sections.into_iter().enumerate().flat_map(|(section, records)| records.iter().map(move |record| (section, record))).collect();
        let mut written = records.iter();
        for (section, record) in &all {
            // Additional records may be left out anywhere, others only at the end.
            let kind = loop {
                let (place, owner, ttl, kind) = written.next().expect("more was read than written");
                let same = place == section && *ttl == record.ttl && wire_of(&record.name).eq_ignore_ascii_case(owner.as_wire());
                if same || *section < 2 {
                    prop_assert!(same, "{record:?} for {place} {owner} {kind:?}");
                    break kind;
                }
            };
            let same = match (kind, &record.data) {
                (Kind::A(octets), RData::A(address)) => address.0.octets() == *octets,
                (Kind::Aaaa(octets), RData::AAAA(address)) => address.0.octets() == *octets,
                (Kind::Named(0, name), RData::CNAME(read)) => wire_of(&read.0).eq_ignore_ascii_case(name.as_wire()),
                (Kind::Named(1, name), RData::PTR(read)) => wire_of(&read.0).eq_ignore_ascii_case(name.as_wire()),
                (Kind::Named(_, name), RData::NS(read)) => wire_of(&read.0).eq_ignore_ascii_case(name.as_wire()),
                (Kind::Srv(port, target), RData::SRV(read)) => {
                    read.port == *port && wire_of(&read.target) == target.as_wire()
                }
                (Kind::Txt(text), RData::TXT(read)) => read.txt_data.concat() == *text,
                (Kind::Soa(mname, rname, serial), RData::SOA(read)) => {
                    wire_of(&read.mname).eq_ignore_ascii_case(mname.as_wire())
                        && wire_of(&read.rname).eq_ignore_ascii_case(rname.as_wire())
                        && read.serial == *serial
                }
                _ => false,
            };
            prop_assert!(same, "{:?} for {kind:?}", record.data);
        }
        if !truncated {
            let needed = records.iter().filter(|(section, ..)| *section < 2).count();
            prop_assert_eq!(read.answers.len() + read.authorities.len(), needed);
        }
        let ours: Vec<_> = Records::of(&bytes).unwrap().collect();
        prop_assert_eq!(ours.len(), all.len() + usize::from(edns));
        for (record, (_, read)) in ours.iter().filter(|record| record.rtype != rtype::OPT).zip(&all) {
            let owner = record.owner().unwrap();
            prop_assert_eq!(owner.as_wire(), wire_of(&read.name));
        }
    }

    #[test]
    fn we_read_what_another_library_writes(question in any_name(), qtype in 1_u16..40, id in any::<u16>(), dnssec in any::<bool>()) {
        use hickory_proto::{op::{Edns, Query as Theirs}, serialize::binary::BinEncodable};
        let labels = labels(question.as_wire()).map(<[u8]>::to_vec);
        let Ok(mut theirs) = hickory_proto::rr::Name::from_labels(labels) else { return Ok(()) };
        theirs.set_fqdn(true);
        let mut message = Message::query();
        message.metadata.id = id;
        message.add_query(Theirs::query(theirs.clone(), RecordType::from(qtype)));
        let mut edns = Edns::new();
        edns.set_dnssec_ok(dnssec).set_max_payload(1400);
        message.set_edns(edns);
        let bytes = message.to_bytes().unwrap();
        let query = Query::parse(&bytes).map_err(|error| TestCaseError::fail(format!("{error:?}")))?;
        prop_assert_eq!((query.id, query.qtype, query.dnssec_ok(), query.udp_limit()), (id, qtype, dnssec, 1232));
        prop_assert_eq!(query.name().as_wire(), wire_of(&theirs).to_ascii_lowercase());
    }
}
