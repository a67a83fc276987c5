use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn ranges(v4: &str, v6: &str) -> AliasRanges {
    AliasRanges { v4: v4.parse().unwrap(), v6: v6.parse().unwrap() }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn book(v4: &str) -> Book {
    Book::new(ranges(v4, "fd00:a11a::/64"), Instant::now())
}

#[test]
fn the_same_pod_has_the_same_alias_and_another_node_s_pod_with_the_same_address_has_another() {
    let mut book = book("198.18.0.0/16");
    let one = book.acquire("edge1", ip("10.0.0.2")).unwrap();
    assert_eq!(book.acquire("edge1", ip("10.0.0.2")), Some(one));
    let other = book.acquire("edge2", ip("10.0.0.2")).unwrap();
    assert_ne!(one, other);
    assert_eq!(book.aliases().target(other), Some(&Target { node: "edge2".into(), addr: ip("10.0.0.2") }));
    let v6 = book.acquire("edge1", ip("fd00::2")).unwrap();
    assert!(book.ranges.v6.contains(v6), "{v6}");
    assert_eq!(book.aliases().len(), 3);
}

#[test]
fn an_alias_rests_for_an_hour_and_goes_back_to_its_pod_if_that_comes_back_meanwhile() {
    let mut book = book("198.18.0.0/30");
    let start = book.now;
    let (a, b) = (book.acquire("n", ip("10.0.0.1")).unwrap(), book.acquire("n", ip("10.0.0.2")).unwrap());
    assert_eq!(book.acquire("n", ip("10.0.0.3")), None, "a range of two");
    book.release("n", ip("10.0.0.1"));
    assert_eq!(book.aliases().target(a), None, "it stands for nobody at once");
    assert_eq!(book.acquire("n", ip("10.0.0.1")), Some(a));
    book.release("n", ip("10.0.0.1"));
    book.advance(start + REST - Duration::from_secs(1));
    assert_eq!(book.acquire("n", ip("10.0.0.3")), None);
    assert!(book.advance(start + REST));
    assert_eq!(book.acquire("n", ip("10.0.0.3")), Some(a));
    assert_eq!(book.alias_of("n", ip("10.0.0.2")), Some(b));
}

#[test]
fn one_that_was_taken_up_again_rests_from_its_last_release_on() {
    let mut book = book("198.18.0.0/30");
    let start = book.now;
    book.acquire("n", ip("10.0.0.1"));
    book.acquire("n", ip("10.0.0.2"));
    book.release("n", ip("10.0.0.1"));
    book.acquire("n", ip("10.0.0.1"));
    book.advance(start + REST / 2);
    book.release("n", ip("10.0.0.1"));
    assert!(!book.advance(start + REST), "the first rest was broken off");
    assert_eq!(book.acquire("n", ip("10.0.0.3")), None);
    assert!(book.advance(start + REST + REST / 2));
    assert!(book.acquire("n", ip("10.0.0.3")).is_some());
}

#[test]
fn a_pod_that_comes_and_goes_all_the_time_takes_no_more_memory_for_it() {
    let mut book = book("198.18.0.0/16");
    let start = book.now;
    for n in 0..20_000_u64 {
        book.advance(start + Duration::from_millis(n));
        assert!(book.acquire("n", ip("10.0.0.1")).is_some());
        book.release("n", ip("10.0.0.1"));
    }
    assert!(book.resting.len() <= FEW + 2, "{}", book.resting.len());
    book.advance(book.now + REST);
    assert_eq!((book.entries().count(), book.resting.len()), (0, 0));
}

#[test]
fn without_its_file_a_book_mostly_gives_the_same_aliases_in_any_order() {
    let keys: Vec<(String, IpAddr)> =
        (0..1000).map(|n| (format!("edge{}", n % 20), ip(&format!("10.0.{}.{}", n / 200, n % 200)))).collect();
    let (mut first, mut second) = (book("198.18.0.0/16"), book("198.18.0.0/16"));
    let before: Vec<_> = keys.iter().map(|(node, addr)| first.acquire(node, *addr).unwrap()).collect();
    let after: Vec<_> = keys.iter().rev().map(|(node, addr)| second.acquire(node, *addr).unwrap()).collect();
    let same = before.iter().zip(after.iter().rev()).filter(|(a, b)| a == b).count();
    assert!(same >= 970, "{same} of 1000");
}

#[test]
fn what_was_restored_is_in_force_until_everything_was_seen_and_then_rests() {
    let mut book = book("198.18.0.0/29");
    let target = |node: &str, addr: &str| Target { node: node.into(), addr: ip(addr) };
    book.restore([
        (ip("198.18.0.1"), target("n", "10.0.0.1")),
        (ip("198.18.0.2"), target("n", "10.0.0.2")),
        // Twice the same alias, twice the same pod, and what is no alias here.
        (ip("198.18.0.2"), target("n", "10.0.0.3")),
        (ip("198.18.0.3"), target("n", "10.0.0.2")),
        (ip("198.18.0.0"), target("n", "10.0.0.4")),
        (ip("198.18.0.7"), target("n", "10.0.0.5")),
        (ip("198.18.0.8"), target("n", "10.0.0.6")),
        (ip("198.18.0.4"), target("n", "fd00::1")),
        (ip("fd00:a11a::"), target("n", "fd00::1")),
    ]);
    assert_eq!(book.entries().count(), 2, "{:?}", book.entries().collect::<Vec<_>>());
    assert!(book.aliases().target(ip("198.18.0.2")).is_some(), "the kernel may still send there");
    assert_eq!(book.acquire("n", ip("10.0.0.1")), Some(ip("198.18.0.1")));
    book.settle();
    assert!(book.aliases().target(ip("198.18.0.1")).is_some());
    assert_eq!(book.aliases().target(ip("198.18.0.2")), None);
    assert_eq!(book.alias_of("n", ip("10.0.0.2")), Some(ip("198.18.0.2")), "but it is nobody else's yet");
    book.advance(book.now + REST);
    assert_eq!(book.alias_of("n", ip("10.0.0.2")), None);
}

#[test]
fn a_full_range_is_searched_through_and_the_last_free_alias_found() {
    let mut book = book("198.18.0.0/24");
    let given: HashSet<IpAddr> = (1..=254).map(|n| book.acquire("n", ip(&format!("10.0.0.{n}"))).unwrap()).collect();
    assert_eq!(given.len(), 254);
    assert!(!given.contains(&ip("198.18.0.0")) && !given.contains(&ip("198.18.0.255")));
    assert_eq!(book.acquire("n", ip("10.0.1.1")), None);
    assert!(book.acquire("n", ip("fd00::1")).is_some(), "the other family has room");
}

#[test]
fn a_closed_book_gives_nothing_out_and_loses_nothing() {
    let mut book = Book::closed(ranges("198.18.0.0/16", "fd00:a11a::/64"), Instant::now());
    let kept = (ip("198.18.0.1"), Target { node: "n".into(), addr: ip("10.0.0.1") });
    book.restore([kept.clone()]);
    assert_eq!((book.acquire("n", ip("10.0.0.1")), book.acquire("n", ip("10.0.0.2"))), (None, None));
    assert_eq!(book.entries().collect::<Vec<_>>(), [kept]);
}

#[derive(Clone, Debug)]
enum Step {
    Acquire(u8),
    Release(u8),
    Wait(u64),
    Restart,
    Settle,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..12_u8).prop_map(Step::Acquire),
        4 => (0..12_u8).prop_map(Step::Release),
        2 => (1..3000_u64).prop_map(Step::Wait),
        1 => Just(Step::Restart),
        1 => Just(Step::Settle),
    ];
    prop::collection::vec(step, 0..200)
}

/// What a plain list knows of each pod.
#[derive(Clone, Copy, Debug)]
struct Known {
    alias: IpAddr,
    uses: usize,
    /// None: not resting.
    since: Option<Instant>,
}

proptest! {
    /// Against a model that keeps everything in one list: an alias is one pod's at a time, stays with it, and is another's
    /// only after an hour.
    #[test]
    fn an_alias_is_never_two_pods_within_an_hour(steps in steps()) {
        let ranges = ranges("198.18.0.0/29", "fd00:a11a::/126");
        let mut now = Instant::now();
        let mut book = Book::new(ranges, now);
        let mut model: BTreeMap<u8, Known> = BTreeMap::new();
        let key = |n: u8| {
            let addr = if n.is_multiple_of(3) { format!("fd00::{n}") } else { format!("10.0.0.{n}") };
            (format!("node{}", n % 2), ip(&addr))
        };
        for step in steps {
            match step {
                Step::Acquire(n) => {
                    let (node, addr) = key(n);
                    let given = book.acquire(&node, addr);
                    if let Some(known) = model.get_mut(&n) {
                        prop_assert_eq!(given, Some(known.alias));
                        (known.uses, known.since) = (known.uses + 1, None);
                    } else if let Some(alias) = given {
                        prop_assert!(ranges.of(addr).contains(alias));
                        prop_assert!(model.values().all(|known| known.alias != alias), "{alias} was another's");
                        model.insert(n, Known { alias, uses: 1, since: None });
                    } else {
                        let family = model.values().filter(|known| known.alias.is_ipv4() == addr.is_ipv4()).count();
                        prop_assert_eq!(family as u64, usable(ranges.of(addr)), "refused, and there is room");
                    }
                }
                Step::Release(n) => {
                    let (node, addr) = key(n);
                    book.release(&node, addr);
                    if let Some(known) = model.get_mut(&n).filter(|known| known.uses > 0) {
                        known.uses -= 1;
                        known.since = (known.uses == 0).then_some(now);
                    }
                }
                Step::Wait(seconds) => {
                    now += Duration::from_secs(seconds);
                    book.advance(now);
                    model.retain(|_, known| known.since.is_none_or(|since| now - since < REST));
                }
                Step::Restart => {
                    let kept: Vec<_> = book.entries().collect();
                    book = Book::new(ranges, now);
                    book.restore(kept);
                    model.values_mut().for_each(|known| (known.uses, known.since) = (0, None));
                }
                Step::Settle => {
                    book.settle();
                    model.values_mut().filter(|known| known.uses == 0).for_each(|known| {
                        known.since.get_or_insert(now);
                    });
                }
            }
            let mut entries: Vec<IpAddr> = book.entries().map(|(alias, _)| alias).collect();
            let mut expected: Vec<IpAddr> = model.values().map(|known| known.alias).collect();
            entries.sort();
            expected.sort();
            prop_assert_eq!(entries, expected);
            for (n, known) in &model {
                let (node, addr) = key(*n);
                let stands_for = book.aliases().target(known.alias);
                let expected = known.since.is_none().then(|| Target { node: node.as_str().into(), addr });
                prop_assert_eq!(stands_for, expected.as_ref());
            }
            prop_assert_eq!(book.aliases().len(), model.values().filter(|known| known.since.is_none()).count());
        }
    }
}
