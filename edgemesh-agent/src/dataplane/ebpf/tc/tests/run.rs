//! The programs themselves, run by the kernel on frames made for them (`BPF_PROG_TEST_RUN`).

use std::{process::Command, thread};

use aya::{
    EbpfLoader,
    programs::{TestRun, TestRunOptions},
};
use edgemesh_common::{
    Addr,
    alias::{range_v4, range_v6},
    layout::{Backend, Frontend, FrontendKey, SCOPE_OUTSIDE},
};
use nix::sched::{CloneFlags, unshare};

use super::{
    super::*,
    frame::{ACK, Make, RST, SYN, Seen, TCP, UDP, read},
};
use crate::dataplane::ebpf::open::OBJECT;

const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;

const CLIENTS: [&str; 2] = ["203.0.113.7:40000", "[2001:db8::7]:40000"];
const FRONTENDS: [&str; 2] = ["192.168.10.11:30080", "[fd00:10::11]:30080"];
const LOCAL: [&str; 2] = ["10.244.1.2:7001", "[fd00:10:244:1::2]:7001"];
const REMOTE: [&str; 2] = ["10.244.2.2:7001", "[fd00:10:244:2::2]:7001"];
const NODE: [&str; 2] = ["192.168.10.11", "fd00:10::11"];

/// The node's network, and the programs with maps of their own.
struct Bench {
    object: Object,
    uplink: u32,
    interfaces: HashMap<MapData, u32, Interface>,
    frontends: HashMap<MapData, FrontendKey, Frontend>,
    generation: u32,
}

impl Bench {
    /// In a network namespace of this thread's own: `up0` leads to the world and to other nodes, `pods0` to pods.
    fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let batch = "link add up0 type veth peer name up1
            link add pods0 type veth peer name pods1
            link set lo up
            link set up0 up
            link set up1 up
            link set pods0 up
            link set pods1 up
            address add 192.168.10.11/24 dev up0
            address add fd00:10::11/64 dev up0 nodad
            address add 10.244.1.1/24 dev pods0
            address add fd00:10:244:1::1/64 dev pods0 nodad
            route add default via 192.168.10.1
            route add default via fd00:10::1
            route add 10.244.2.0/24 via 192.168.10.12
            route add fd00:10:244:2::/64 via fd00:10::12
            route add local 198.18.0.0/16 dev lo
            route add local fd00:a11a::/64 dev lo";
        for line in batch.lines() {
            let output = Command::new("ip").args(line.split_whitespace()).output().unwrap();
            assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        }
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        let network: std::net::Ipv6Addr = "fd00:a11a::".parse().unwrap();
        let mut object = EbpfLoader::new()
            .override_global("NAT_PORTS", &[1024_u16, 31_744], true)
            .override_global("ALIAS_RANGE_V4", &range_v4([198, 18, 0, 0], 16), true)
            .override_global("ALIAS_RANGE_V6", &range_v6(network.octets(), 64), true)
            .load(OBJECT.expect("build-ebpf was run"))
            .unwrap();
        drop(load_all(&mut object).unwrap());
        let uplink = nix::net::if_::if_nametoindex("up0").unwrap();
        let mut interfaces: HashMap<_, u32, Interface> = hash_map(&mut object, "INTERFACES").unwrap();
        let [v4, v6] = NODE.map(|ip| Addr::from(ip.parse::<IpAddr>().unwrap()));
        interfaces.insert(uplink, Interface { v4, v6, flags: UPLINK }, 0).unwrap();
        let frontends = hash_map(&mut object, "FRONTENDS").unwrap();
        Self { object, uplink, interfaces, frontends, generation: 0 }
    }

    /// Has the uplink let in all but what is for aliases, and nothing else be done there.
    fn guard_only(&mut self) {
        let [v4, v6] = NODE.map(|ip| Addr::from(ip.parse::<IpAddr>().unwrap()));
        self.interfaces.insert(self.uplink, Interface { v4, v6, flags: UPLINK | GUARD_ONLY }, 0).unwrap();
    }

    /// Serves `frontend` for the outside by `backend`, or by nobody.
    fn serve(&mut self, frontend: &str, proto: u8, backend: Option<&str>) {
        let at: std::net::SocketAddr = frontend.parse().unwrap();
        let key = FrontendKey::new(at.ip().into(), at.port().to_be_bytes(), proto).in_scope(SCOPE_OUTSIDE);
        self.generation += 1;
        let mut value = Frontend {
            generation: self.generation,
            service: 7,
            count: u32::from(backend.is_some()),
            key,
            generation_check: self.generation,
            ..Frontend::default()
        };
        if let Some(backend) = backend {
            let at: std::net::SocketAddr = backend.parse().unwrap();
            value.inline[0] = Backend { addr: at.ip().into(), port: at.port().to_be_bytes(), pad: 0, id: 1 };
        }
        self.frontends.insert(key, value, 0).unwrap();
    }

    /// Runs a program on a frame that came in, or leaves, by the uplink.
    fn run(&mut self, name: &str, frame: &[u8]) -> (u32, Vec<u8>) {
        // `struct __sk_buff` of include/uapi/linux/bpf.h; the interface is its eleventh word.
        let mut context = [0_u8; 192];
        context[40..44].copy_from_slice(&self.uplink.to_ne_bytes());
        let mut out = vec![0; frame.len() + 256];
        let program: &mut SchedClassifier = self.object.program_mut(name).unwrap().try_into().unwrap();
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let result = program.test_run(options).unwrap();
        out.truncate(result.data_size_out as usize);
        (result.return_value, out)
    }

    /// As `run`, of a frame that must still be in order.
    fn see(&mut self, name: &str, frame: &[u8]) -> (u32, Seen) {
        let (verdict, out) = self.run(name, frame);
        (verdict, read(&out))
    }
}

/// The same numbers each time (Marsaglia 2003).
struct Random(u32);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }
}

/// Runs `test` with a bench, in a thread of its own.
fn with_bench(test: impl FnOnce(&mut Bench) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "running programs needs root");
        return;
    }
    thread::spawn(|| test(&mut Bench::new())).join().unwrap();
}

/// Every kind of packet: families, protocols, and headers with and without options or checksum.
fn kinds() -> Vec<(usize, Make)> {
    let mut kinds = Vec::new();
    for family in 0..2 {
        for proto in [TCP, UDP] {
            for options in [false, true] {
                for checksum in [true, false] {
                    if checksum || (proto == UDP && family == 0) {
                        let make = Make::new(CLIENTS[family], FRONTENDS[family], proto);
                        kinds.push((family, Make { options, checksum, ..make }));
                    }
                }
            }
        }
    }
    kinds
}

#[test]
fn a_backend_on_this_node_sees_the_client_and_the_client_the_frontend() {
    with_bench(|bench| {
        for (family, make) in kinds() {
            bench.serve(FRONTENDS[family], make.proto, Some(LOCAL[family]));
            let (verdict, seen) = bench.see("uplink_ingress", &make.frame());
            assert_eq!((verdict, seen.src, seen.dst), (NEXT, make.src, LOCAL[family].parse().unwrap()), "{make:?}");
            assert_eq!((seen.ttl, &seen.payload), (64, &make.payload), "the rest is as it was");
            let answer = Make { src: seen.dst, dst: seen.src, flags: SYN | ACK, ..make.clone() };
            let (verdict, seen) = bench.see("uplink_egress", &answer.frame());
            assert_eq!((verdict, seen.src, seen.dst), (NEXT, make.dst, make.src), "{make:?}");
        }
    });
}

#[test]
fn a_backend_on_another_node_sees_this_node_and_the_client_the_frontend() {
    with_bench(|bench| {
        for (family, make) in kinds() {
            bench.serve(FRONTENDS[family], make.proto, Some(REMOTE[family]));
            let (verdict, seen) = bench.see("uplink_ingress", &make.frame());
            assert_eq!((verdict, seen.dst), (REDIRECT, REMOTE[family].parse().unwrap()), "{make:?}");
            assert_eq!((seen.src.ip(), seen.ttl), (NODE[family].parse::<IpAddr>().unwrap(), 63));
            assert!((1024..32_768).contains(&seen.src.port()), "{seen:?}");
            let again = bench.see("uplink_ingress", &make.frame()).1;
            assert_eq!(again.src, seen.src, "a repeated packet is one of the same connection");
            let answer = Make { src: seen.dst, dst: seen.src, flags: SYN | ACK, ..make.clone() };
            let (verdict, seen) = bench.see("uplink_ingress", &answer.frame());
            assert_eq!((verdict, seen.src, seen.dst), (REDIRECT, make.dst, make.src), "{make:?}");
        }
    });
}

#[test]
fn whoever_finds_nobody_is_told() {
    with_bench(|bench| {
        for family in 0..2 {
            let tcp = Make::new(CLIENTS[family], FRONTENDS[family], TCP);
            let udp = Make::new(CLIENTS[family], FRONTENDS[family], UDP);
            bench.serve(FRONTENDS[family], TCP, None);
            bench.serve(FRONTENDS[family], UDP, None);
            let (verdict, seen) = bench.see("uplink_ingress", &tcp.frame());
            assert_eq!((verdict, seen.src, seen.dst), (REDIRECT, tcp.dst, tcp.src));
            assert_eq!((seen.flags, seen.acknowledged), (u16::from(RST | ACK), 1001));
            let (verdict, seen) = bench.see("uplink_ingress", &udp.frame());
            assert_eq!((verdict, seen.src.ip(), seen.dst.ip()), (REDIRECT, udp.dst.ip(), udp.src.ip()));
            assert_eq!(seen.flags.to_be_bytes(), if family == 0 { [3, 3] } else { [1, 4] }, "port unreachable");
            assert_eq!(seen.quoted, Some((udp.src, udp.dst)));
            // Bounded: the sixty-first within a moment goes without.
            let verdicts: Vec<u32> = (0..200).map(|_| bench.run("uplink_ingress", &udp.frame()).0).collect();
            assert!(verdicts.contains(&DROP) && verdicts[0] == REDIRECT, "{verdicts:?}");
            thread::sleep(Duration::from_millis(60));
        }
    });
}

#[test]
fn a_packet_at_the_end_of_its_time_is_answered_and_not_sent_on() {
    with_bench(|bench| {
        for family in 0..2 {
            for proto in [TCP, UDP] {
                bench.serve(FRONTENDS[family], proto, Some(REMOTE[family]));
                let make = Make { ttl: 1, ..Make::new(CLIENTS[family], FRONTENDS[family], proto) };
                let (verdict, seen) = bench.see("uplink_ingress", &make.frame());
                assert_eq!((verdict, seen.dst.ip()), (REDIRECT, make.src.ip()));
                assert_eq!(seen.flags.to_be_bytes(), if family == 0 { [11, 0] } else { [3, 0] }, "time exceeded");
                assert_eq!(seen.quoted, Some((make.src, make.dst)));
            }
        }
    });
}

#[test]
fn errors_are_translated_with_what_they_quote() {
    with_bench(|bench| {
        let router = ["198.51.100.1", "2001:db8:ffff::1"];
        for family in 0..2 {
            let (kind, code) = if family == 0 { (3, 4) } else { (2, 0) };
            for proto in [TCP, UDP] {
                let make = Make::new(CLIENTS[family], FRONTENDS[family], proto);
                // From the backend itself, on this node, about what it got; it leaves by the uplink.
                bench.serve(FRONTENDS[family], proto, Some(LOCAL[family]));
                let sent = bench.see("uplink_ingress", &make.frame()).1;
                let error = Make { src: sent.src, dst: sent.dst, ..make.clone() };
                let from = sent.dst.ip().to_string();
                let (verdict, seen) = bench.see("uplink_egress", &error.error(&from, kind, code));
                assert_eq!((verdict, seen.src.ip(), seen.dst.ip()), (NEXT, make.dst.ip(), make.src.ip()));
                assert_eq!(seen.quoted, Some((make.src, make.dst)));
                // From a router between us and the client, about the backend's answer.
                let answer = Make { src: make.dst, dst: make.src, ..make.clone() };
                let (verdict, seen) = bench.see("uplink_ingress", &answer.error(router[family], kind, code));
                assert_eq!((verdict, seen.src.ip()), (NEXT, router[family].parse::<IpAddr>().unwrap()));
                assert_eq!(seen.quoted, Some((sent.dst, sent.src)), "it reaches who sent the answer");
                assert_eq!(seen.dst.ip(), sent.dst.ip());
                // From a router between us and a backend elsewhere, about what we sent on.
                let other = Make { src: (make.src.ip(), 50_000).into(), ..make.clone() };
                bench.serve(FRONTENDS[family], proto, Some(REMOTE[family]));
                let sent = bench.see("uplink_ingress", &other.frame()).1;
                let error = Make { src: sent.src, dst: sent.dst, ..other.clone() };
                let (verdict, seen) = bench.see("uplink_ingress", &error.error(router[family], kind, code));
                assert_eq!((verdict, seen.dst.ip()), (REDIRECT, other.src.ip()));
                assert_eq!(seen.quoted, Some((other.src, other.dst)));
            }
        }
    });
}

#[test]
fn fragments_go_where_the_first_went() {
    with_bench(|bench| {
        bench.serve(FRONTENDS[0], UDP, Some(LOCAL[0]));
        let payload: Vec<u8> = (0..200).collect();
        let make = Make { payload: payload.clone(), ..Make::new(CLIENTS[0], FRONTENDS[0], UDP) };
        let [first, later] = make.fragments(104);
        let (verdict, untouched) = bench.run("uplink_ingress", &later);
        assert_eq!((verdict, &untouched), (NEXT, &later), "nothing is known of it yet");
        let (a, b) = (bench.run("uplink_ingress", &first), bench.run("uplink_ingress", &later));
        assert_eq!((a.0, b.0), (NEXT, NEXT));
        // Put together again, they are the packet that a single frame would be.
        let mut whole = a.1;
        whole.extend(&b.1[34..]);
        let length = (whole.len() - 14) as u16;
        whole[16..18].copy_from_slice(&length.to_be_bytes());
        whole[20..22].fill(0);
        whole[24..26].fill(0);
        let checksum = !super::frame::sum(&whole[14..34]);
        whole[24..26].copy_from_slice(&checksum.to_be_bytes());
        let seen = read(&whole);
        assert_eq!((seen.dst, seen.payload), (LOCAL[0].parse().unwrap(), payload));
        assert_eq!(b.1[30..34], [10, 244, 1, 2]);
    });
}

#[test]
fn what_is_no_packet_of_ours_passes_as_it_is() {
    with_bench(|bench| {
        for family in 0..2 {
            bench.serve(FRONTENDS[family], TCP, Some(LOCAL[family]));
            let make = Make::new(CLIENTS[family], FRONTENDS[family], TCP);
            let other_port = Make { dst: (make.dst.ip(), 30_081).into(), ..make.clone() };
            let mid_stream = Make { flags: ACK, src: (make.src.ip(), 50_001).into(), ..make.clone() };
            let udp = Make { proto: UDP, ..make.clone() };
            let mut tagged = make.frame();
            tagged.splice(12..12, [0x81, 0, 0, 100]);
            let mut routed = make.frame();
            routed[20] = if family == 0 { routed[20] } else { 43 };
            let mut frames = vec![other_port.frame(), mid_stream.frame(), udp.frame(), tagged];
            if family == 1 {
                frames.push(routed);
            }
            for frame in frames {
                for program in ["uplink_ingress", "uplink_egress", "guest_ingress", "guest_egress"] {
                    assert_eq!(bench.run(program, &frame), (NEXT, frame.clone()), "{program}");
                }
            }
        }
    });
}

#[test]
fn whatever_arrives_comes_out_whole_or_as_it_was() {
    with_bench(|bench| {
        let mut random = Random(0x2545_f491);
        let mut frames = Vec::new();
        for (family, make) in kinds() {
            bench.serve(
                FRONTENDS[family],
                make.proto,
                Some(if random.next().is_multiple_of(2) { LOCAL } else { REMOTE }[family]),
            );
            frames.push(make.frame());
            let error = Make { src: make.dst, dst: make.src, ..make.clone() };
            frames.push(error.error(
                if family == 0 { "198.51.100.1" } else { "2001:db8:ffff::1" },
                if family == 0 { 3 } else { 1 },
                1,
            ));
        }
        for frame in &frames {
            // The kernel runs nothing on frames whose IP header is not whole.
            let least = if frame[12] == 8 { 34 } else { 54 };
            for length in least..frame.len() {
                for program in ["uplink_ingress", "uplink_egress"] {
                    let (verdict, out) = bench.run(program, &frame[..length]);
                    assert!(verdict != NEXT || out.len() == length, "{verdict} {} {length}", out.len());
                }
            }
        }
        for _ in 0..4000 {
            let mut frame = frames[random.next() as usize % frames.len()].clone();
            for _ in 0..=random.next() % 3 {
                let at = 12 + random.next() as usize % (frame.len() - 12);
                frame[at] = random.next() as u8;
            }
            for program in ["uplink_ingress", "uplink_egress", "guest_ingress", "guest_egress"] {
                let (verdict, _) = bench.run(program, &frame);
                assert!([NEXT, DROP, REDIRECT].contains(&verdict), "{verdict}");
            }
        }
    });
}

#[test]
fn nothing_that_is_addressed_to_an_alias_comes_in_whatever_it_is() {
    const ALIASES: [&str; 2] = ["198.18.7.7:80", "[fd00:a11a::77]:80"];
    const OTHERS: [&str; 2] = ["198.19.7.7:80", "[fd00:a11b::77]:80"];
    const ICMP: [u8; 2] = [1, 58];
    const GRE: u8 = 47;
    with_bench(|bench| {
        for guard_only in [false, true] {
            if guard_only {
                bench.guard_only();
            }
            for family in 0..2 {
                for proto in [TCP, UDP, ICMP[family], GRE] {
                    for flags in [SYN, ACK, RST] {
                        let make = Make { flags, ..Make::new(CLIENTS[family], ALIASES[family], proto) };
                        assert_eq!(bench.run("uplink_ingress", &make.frame()).0, DROP, "{make:?}");
                        let other = Make { flags, ..Make::new(CLIENTS[family], OTHERS[family], proto) };
                        let frame = other.frame();
                        assert_eq!(bench.run("uplink_ingress", &frame), (NEXT, frame), "{other:?}");
                    }
                }
            }
            let udp = Make::new(CLIENTS[0], ALIASES[0], UDP);
            for fragment in udp.fragments(16) {
                assert_eq!(bench.run("uplink_ingress", &fragment).0, DROP);
            }
        }
    });
}

#[test]
fn a_service_with_a_backend_in_another_site_is_served_for_the_outside_and_a_mere_guard_serves_none() {
    const ALIASES: [&str; 2] = ["198.18.7.7:7001", "[fd00:a11a::77]:7001"];
    with_bench(|bench| {
        for (family, make) in kinds() {
            bench.serve(FRONTENDS[family], make.proto, Some(ALIASES[family]));
            let (verdict, seen) = bench.see("uplink_ingress", &make.frame());
            assert_eq!((verdict, seen.src, seen.dst), (NEXT, make.src, ALIASES[family].parse().unwrap()), "{make:?}");
            let answer = Make { src: seen.dst, dst: seen.src, flags: SYN | ACK, ..make.clone() };
            let (verdict, seen) = bench.see("uplink_egress", &answer.frame());
            assert_eq!((verdict, seen.src, seen.dst), (NEXT, make.dst, make.src), "{make:?}");
        }
        bench.guard_only();
        for (family, make) in kinds() {
            let frame = make.frame();
            assert_eq!(bench.run("uplink_ingress", &frame), (NEXT, frame.clone()), "{make:?}");
            let answer = Make { src: ALIASES[family].parse().unwrap(), dst: make.src, ..make.clone() }.frame();
            assert_eq!(bench.run("uplink_egress", &answer), (NEXT, answer.clone()), "{make:?}");
        }
    });
}
