use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use proptest::prelude::*;

use super::*;
use crate::layout::UDP;

#[derive(Default)]
struct World {
    nat: RefCell<HashMap<Tuple, Nat>>,
    sockets: HashSet<[u8; 2]>,
    random: Cell<u32>,
}

impl Connections for World {
    fn look<R>(&self, key: &Tuple, at: impl FnOnce(&Nat) -> R) -> Option<R> {
        self.nat.borrow().get(key).map(at)
    }
    fn create(&self, key: &Tuple, nat: &Nat) -> bool {
        let mut map = self.nat.borrow_mut();
        let free = !map.contains_key(key);
        map.entry(*key).or_insert(*nat);
        free
    }
    fn put(&self, key: &Tuple, nat: &Nat) {
        self.nat.borrow_mut().insert(*key, *nat);
    }
    fn has_socket(&self, tuple: &Tuple) -> bool {
        self.sockets.contains(&tuple.dst_port)
    }
    fn random(&self) -> u32 {
        // A linear congruence over all 32 bits (Numerical Recipes).
        self.random.set(self.random.get().wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
        self.random.get()
    }
}

impl World {
    fn find(&self, key: &Tuple) -> Option<Nat> {
        self.look(key, |nat| *nat)
    }
}

fn open(world: &World, packet: &Tuple, opening: &Opening) -> Option<Nat> {
    let mut forward = Nat::default();
    super::open(world, packet, opening, &mut forward).then_some(forward)
}

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

/// A packet of client 203.0.113.`client`:`port` to node port 30080.
fn packet(client: u8, port: u16, proto: u8) -> Tuple {
    Tuple {
        src: addr(&format!("203.0.113.{client}")),
        dst: addr("192.168.10.11"),
        src_port: port.to_be_bytes(),
        dst_port: 30_080_u16.to_be_bytes(),
        proto,
        hook: UPLINK_INGRESS,
        pad: 0,
    }
}

fn backend(n: u8) -> Backend {
    Backend { addr: addr(&format!("10.244.1.{n}")), port: 7001_u16.to_be_bytes(), pad: 0, id: n.into() }
}

fn kept(packet: &Tuple, backend: Backend) -> Opening {
    Opening {
        backend,
        service: 5,
        generation: 9,
        source: packet.src,
        masquerade: false,
        answers_at: UPLINK_EGRESS,
        ports: (1024, 1000),
        now: 1,
    }
}

fn masqueraded(packet: &Tuple, backend: Backend) -> Opening {
    Opening { source: addr("192.168.10.11"), masquerade: true, answers_at: UPLINK_INGRESS, ..kept(packet, backend) }
}

/// What `nat` makes of the packets of `key`.
fn applied(key: &Tuple, nat: &Nat) -> Tuple {
    Tuple { src: nat.src, dst: nat.dst, src_port: nat.src_port, dst_port: nat.dst_port, ..*key }
}

/// The answer to what `nat` made of `packet`, turned back by the map.
fn answered(world: &World, packet: &Tuple, nat: &Nat, hook: u8) -> Tuple {
    let key = applied(packet, nat).reversed(hook);
    applied(&key, &world.find(&key).expect("an entry for the answers"))
}

proptest! {
    #[test]
    fn the_answer_comes_back_from_the_frontend_to_the_client(
        clients in prop::collection::vec((1_u8..5, 1_u16.., 1_u8..4, any::<bool>(), any::<bool>()), 1..60),
    ) {
        let world = World::default();
        let mut live: HashMap<Tuple, (Nat, u8)> = HashMap::new();
        for (client, port, to, tcp, masquerade) in clients {
            let packet = packet(client, port, if tcp { TCP } else { UDP });
            let opening = if masquerade { masqueraded(&packet, backend(to)) } else { kept(&packet, backend(to)) };
            let nat = open(&world, &packet, &opening).expect("a thousand ports are enough for sixty");
            live.insert(packet, (nat, opening.answers_at));
            prop_assert_eq!((nat.dst, nat.dst_port, nat.src), (backend(to).addr, backend(to).port, opening.source));
        }
        // All at once, and not only right after each was made.
        for (packet, (nat, hook)) in live {
            prop_assert_eq!(world.find(&packet), Some(nat));
            prop_assert_eq!(answered(&world, &packet, &nat, hook), packet.reversed(hook));
        }
    }
}

#[test]
fn a_client_that_keeps_its_address_keeps_its_port() {
    let world = World::default();
    let packet = packet(1, 40_000, TCP);
    let nat = open(&world, &packet, &kept(&packet, backend(2))).unwrap();
    assert_eq!((nat.src, nat.src_port, nat.state), (packet.src, packet.src_port, 0));
    let again = open(&world, &packet, &kept(&packet, backend(2))).unwrap();
    assert_eq!(again, nat, "the same packet again is the same connection");
    assert_eq!(world.nat.borrow().len(), 2);
}

#[test]
fn two_frontends_with_a_backend_in_common_do_not_mix_up_one_client_port() {
    let world = World::default();
    let first = packet(1, 40_000, TCP);
    let second = Tuple { dst_port: 30_081_u16.to_be_bytes(), ..first };
    let one = open(&world, &first, &kept(&first, backend(2))).unwrap();
    let two = open(&world, &second, &kept(&second, backend(2))).unwrap();
    assert_ne!(one.src_port, two.src_port);
    assert_eq!(answered(&world, &first, &one, UPLINK_EGRESS), first.reversed(UPLINK_EGRESS));
    assert_eq!(answered(&world, &second, &two, UPLINK_EGRESS), second.reversed(UPLINK_EGRESS));
}

#[test]
fn a_port_with_a_socket_is_not_chosen_and_without_a_free_one_there_is_no_connection() {
    let mut world = World::default();
    world.sockets.insert(2000_u16.to_be_bytes());
    let packet = packet(1, 40_000, UDP);
    let opening = Opening { ports: (2000, 2), ..masqueraded(&packet, backend(2)) };
    assert_eq!(open(&world, &packet, &opening).unwrap().src_port, 2001_u16.to_be_bytes());
    let other = Tuple { src_port: [1, 1], ..packet };
    assert_eq!(open(&world, &other, &Opening { ports: (2000, 2), ..masqueraded(&other, backend(2)) }), None);
    assert_eq!(world.find(&other), None, "nothing is left of the attempt");
    let free = Opening { ports: (2000, 2), now: UDP_MEMORY + 2, ..masqueraded(&other, backend(2)) };
    assert_eq!(open(&world, &other, &free).unwrap().src_port, 2001_u16.to_be_bytes(), "the other's time is over");
}

#[test]
fn all_ports_of_the_range_are_chosen_and_no_other() {
    let world = World::default();
    let mut seen = HashSet::new();
    for n in 0..300 {
        let packet = packet(1, 1 + n, TCP);
        // Another backend each time, so that nothing is ever taken.
        let to = Backend { port: n.to_be_bytes(), ..backend(2) };
        let nat = open(&world, &packet, &Opening { ports: (65_530, 6), ..masqueraded(&packet, to) }).unwrap();
        seen.insert(u16::from_be_bytes(nat.src_port));
    }
    assert_eq!(seen, (65_530..=65_535).collect());
}

#[test]
fn a_repeated_syn_keeps_its_backend_and_a_new_connection_of_the_same_port_does_not() {
    let fresh = Nat { last_seen: 100 * SECOND, ..Nat::default() };
    let replied = Nat { state: REPLIED, ..fresh };
    let closing = Nat { state: REPLIED | CLOSING, ..fresh };
    let soon = 103 * SECOND;
    let late = 111 * SECOND;
    for (nat, flags, now, expected) in [
        (fresh, SYN, soon, Next::Confirm),
        (fresh, SYN, late, Next::Renew),
        (fresh, ACK, late, Next::Keep),
        (replied, SYN, soon, Next::Keep),
        (replied, SYN, late, Next::Renew),
        (replied, SYN | ACK, late, Next::Keep),
        (closing, SYN, soon, Next::Renew),
        (closing, FIN | ACK, soon, Next::Keep),
        (Nat { state: ANSWERS | CLOSING, ..fresh }, SYN, late, Next::Keep),
    ] {
        assert_eq!(nat.next(TCP, flags, now), expected, "{nat:?} {flags}");
    }
    assert_eq!(replied.next(UDP, 0, soon), Next::Confirm);
}

#[test]
fn a_connection_is_over_some_time_after_its_end() {
    let open = Nat { last_seen: SECOND, ..Nat::default() };
    let (state, _) = open.seen(FIN | ACK, 2 * SECOND);
    let closed = Nat { state, ..open };
    assert!(!open.is_over(TCP, 1_000_000 * SECOND), "an idle connection may go on");
    assert!(!closed.is_over(TCP, 30 * SECOND) && closed.is_over(TCP, 200 * SECOND));
    assert!(!open.is_over(UDP, 30 * SECOND) && open.is_over(UDP, 200 * SECOND));
}

#[test]
fn the_time_is_written_once_a_second() {
    let nat = Nat { last_seen: 10 * SECOND, ..Nat::default() };
    assert_eq!(nat.seen(ACK, 10 * SECOND + 1), (0, false));
    assert_eq!(nat.seen(ACK, 12 * SECOND), (0, true));
    assert_eq!(nat.seen(RST, 9 * SECOND), (CLOSING, false), "clocks of CPUs may differ");
}
