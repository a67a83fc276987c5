use std::collections::BTreeMap;

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::dns::forward::{
    TtlLimits,
    fake::{A, query, question, record, respond, soa},
    message::Received,
};

const STALE: Duration = Duration::from_secs(1000);
const BOUNDS: Bounds = Bounds { entries: 100, bytes: 1 << 20, stale: STALE };

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn received(packet: &[u8], asked: &[u8]) -> Arc<Message> {
    let limits = TtlLimits { floor: Duration::ZERO, ..TtlLimits::default() };
    let Received::Answer(message) = Message::receive(packet, 7, asked, &limits) else {
        panic!("no answer: {packet:?}")
    };
    Arc::new(message)
}

/// An answer that is as large as wanted.
fn sized(name: &str, ttl: u32, size: usize) -> Arc<Message> {
    let (query, asked) = query(7, name, A);
    received(&respond(&query, 0, [&[record(A, ttl, vec![0; size])], &[], &[]]), &asked)
}

fn message(name: &str, ttl: u32) -> Arc<Message> {
    sized(name, ttl, 4)
}

fn failure(name: &str) -> Arc<Message> {
    Arc::new(Message::failure(&question(name, A)))
}

fn get(cache: &mut Cache, name: &str, now: Instant, silent: bool) -> Option<Hit> {
    cache.get(&question(name, A), now, || silent)
}

#[test]
fn an_answer_is_given_until_its_ttl_is_over() {
    let (mut cache, now) = (Cache::new(BOUNDS), Instant::now());
    cache.put(&question("a", A), message("a", 60), now);
    assert!(get(&mut cache, "b", now, true).is_none());
    assert!(get(&mut cache, "a", now + seconds(59), false).is_some_and(|hit| !hit.stale && hit.since == now));
    assert!(get(&mut cache, "a", now + seconds(60), false).is_none());
    let (query, asked) = query(7, "none", A);
    cache.put(&question("none", A), received(&respond(&query, 3, [&[], &[soa(9, 30)], &[]]), &asked), now);
    assert!(get(&mut cache, "none", now + seconds(8), false).is_some());
    assert!(get(&mut cache, "none", now + seconds(9), false).is_none());
    assert_eq!(cache.counts(), Counts { hits: 2, misses: 3, ..Counts::default() });
}

#[test]
fn a_stale_answer_is_given_where_asking_is_in_vain() {
    let (mut cache, now) = (Cache::new(BOUNDS), Instant::now());
    cache.put(&question("a", A), message("a", 60), now);
    let over = now + seconds(60);
    let hit = get(&mut cache, "a", over, true).unwrap();
    assert!(hit.stale && hit.refresh, "all upstreams are silent");
    assert!(!get(&mut cache, "a", over + seconds(1), true).unwrap().refresh, "somebody asks already");
    assert!(get(&mut cache, "a", over + seconds(2), true).unwrap().refresh);
    assert!(get(&mut cache, "a", over + seconds(3), false).is_none(), "they are not, so it is asked");
    cache.fail(&question("a", A), failure("a"), None, over + seconds(3));
    let hit = get(&mut cache, "a", over + seconds(4), false).unwrap();
    assert!(hit.stale && hit.refresh, "which has just failed, and is tried again for nobody");
    assert!(get(&mut cache, "a", over + seconds(32), false).unwrap().stale);
    assert!(get(&mut cache, "a", over + seconds(33), false).is_none(), "and is waited for again");
    cache.fail(&question("a", A), failure("a"), None, over + seconds(33));
    cache.put(&question("a", A), message("a", 10), over + seconds(34));
    assert!(get(&mut cache, "a", over + seconds(44), false).is_none(), "an answer ends that");
    cache.put(&question("a", A), message("a", 60), now);
    assert!(get(&mut cache, "a", over + STALE - seconds(1), true).is_some());
    assert!(cache.last_resort(&question("a", A), over + STALE).is_none());
    assert!(get(&mut cache, "a", over + STALE, true).is_none());
    assert_eq!(cache.len(), 0);
}

#[test]
fn a_failure_is_remembered_for_two_seconds_and_displaces_no_answer() {
    let (mut cache, now) = (Cache::new(BOUNDS), Instant::now());
    cache.fail(&question("a", A), failure("a"), None, now);
    assert_eq!(get(&mut cache, "a", now + seconds(1), false).unwrap().message.rcode(), 2);
    assert!(cache.last_resort(&question("a", A), now).is_none(), "it helps nobody");
    assert!(get(&mut cache, "a", now + seconds(2), true).is_none());
    cache.put(&question("a", A), message("a", 60), now);
    cache.fail(&question("a", A), failure("a"), None, now);
    let hit = get(&mut cache, "a", now + seconds(1), false).unwrap();
    assert_eq!((hit.message.rcode(), hit.stale), (0, false), "a refresh that came too early");
}

#[test]
fn an_answer_that_may_not_be_kept_ends_the_one_before() {
    let (mut cache, now) = (Cache::new(BOUNDS), Instant::now());
    cache.put(&question("a", A), message("a", 60), now);
    cache.put(&question("a", A), message("a", 0), now);
    assert!(get(&mut cache, "a", now, true).is_none());
    assert_eq!((cache.len(), cache.bytes()), (0, 0));
}

#[test]
fn what_is_asked_for_often_is_refreshed_shortly_before_its_end() {
    let (mut cache, now) = (Cache::new(BOUNDS), Instant::now());
    cache.put(&question("a", A), message("a", 100), now);
    for _ in 0..3 {
        assert!(!get(&mut cache, "a", now + seconds(89), false).unwrap().refresh, "too early");
    }
    assert!(get(&mut cache, "a", now + seconds(90), false).unwrap().refresh);
    assert!(!get(&mut cache, "a", now + seconds(91), false).unwrap().refresh, "one is enough");
    cache.put(&question("a", A), message("a", 100), now + seconds(91));
    assert!(!get(&mut cache, "a", now + seconds(190), false).unwrap().refresh, "nobody has asked since");
    assert_eq!(cache.counts().refreshed, 1);
}

#[test]
fn a_flood_of_names_displaces_nothing_that_is_used() {
    let (mut cache, now) = (Cache::new(BOUNDS), Instant::now());
    for i in 0..50 {
        let name = format!("used{i}");
        cache.put(&question(&name, A), message(&name, 60), now);
        assert!(get(&mut cache, &name, now, false).is_some());
    }
    for i in 0..10_000 {
        let name = format!("flood{i}");
        cache.put(&question(&name, A), message(&name, 60), now);
    }
    assert_eq!(cache.len(), BOUNDS.entries);
    assert!((0..50).all(|i| get(&mut cache, &format!("used{i}"), now, false).is_some()));
}

#[test]
fn no_single_answer_fills_the_cache() {
    let (mut cache, now) = (Cache::new(Bounds { bytes: 10_000, ..BOUNDS }), Instant::now());
    cache.put(&question("small", A), message("small", 60), now);
    cache.put(&question("huge", A), sized("huge", 60, 5_000), now);
    assert!(get(&mut cache, "huge", now, false).is_none());
    for i in 0..100 {
        let name = format!("n{i}");
        cache.put(&question(&name, A), sized(&name, 60, 500), now);
        assert!(cache.bytes() <= 10_000);
    }
    assert!(cache.len() > 5);
}

#[derive(Clone, Debug)]
enum Step {
    Get { name: u8, silent: bool },
    Put { name: u8, ttl: u32, size: usize },
    Fail { name: u8 },
    Pass { seconds: u64 },
}

fn a_step() -> impl Strategy<Value = Step> {
    let name = || 0_u8..12;
    prop_oneof![
        4 => (name(), any::<bool>()).prop_map(|(name, silent)| Step::Get { name, silent }),
        3 => (name(), 0_u32..60, 0_usize..400).prop_map(|(name, ttl, size)| Step::Put { name, ttl, size }),
        1 => name().prop_map(|name| Step::Fail { name }),
        2 => prop_oneof![0_u64..10, 0_u64..2000].prop_map(|seconds| Step::Pass { seconds }),
    ]
}

/// What the cache may know of a name.
#[derive(Default)]
struct Known {
    answer: Option<(Arc<Message>, Instant, Duration)>,
    failed: Option<Instant>,
}

proptest! {
    #[test]
    fn never_gives_what_is_over_nor_calls_it_fresh(
        steps in vec(a_step(), 1..300), entries in 1_usize..16, bytes in 500_usize..20_000,
    ) {
        let (mut cache, mut now) = (Cache::new(Bounds { entries, bytes, stale: STALE }), Instant::now());
        let mut model: BTreeMap<u8, Known> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Pass { seconds } => now += Duration::from_secs(seconds),
                Step::Put { name, ttl, size } => {
                    let text = format!("n{name}");
                    let message = sized(&text, ttl, size);
                    cache.put(&question(&text, A), Arc::clone(&message), now);
                    let answer = (ttl > 0).then(|| (Arc::clone(&message), now, seconds(ttl.into())));
                    model.insert(name, Known { answer, failed: None });
                    let fits = ttl > 0 && message.size() + OVERHEAD + 20 <= bytes / 8;
                    if fits {
                        prop_assert!(cache.look(&question(&text, A), now).is_some_and(|(kept, ..)| Arc::ptr_eq(&kept, &message)));
                    }
                }
                Step::Fail { name } => {
                    let text = format!("n{name}");
                    cache.fail(&question(&text, A), failure(&text), None, now);
                    model.entry(name).or_default().failed = Some(now);
                }
                Step::Get { name, silent } => {
                    let known = model.entry(name).or_default();
                    let at = known.failed;
                    let failed = |within| at.is_some_and(|at| now < at + within);
                    match get(&mut cache, &format!("n{name}"), now, silent) {
                        Some(hit) if hit.message.rcode() == 2 => prop_assert!(failed(FAILURE) && !hit.stale),
                        Some(hit) => {
                            let (message, since, ttl) = known.answer.clone().unwrap();
                            prop_assert!(Arc::ptr_eq(&hit.message, &message) && hit.since == since, "the newest");
                            prop_assert_eq!(hit.stale, now >= since + ttl);
                            prop_assert!(now < since + ttl + STALE);
                            prop_assert!(!hit.stale || silent || failed(RECHECK));
                        }
                        None => {}
                    }
                }
            }
            prop_assert!(cache.len() <= entries && cache.bytes() <= bytes);
            prop_assert_eq!(cache.len() == 0, cache.bytes() == 0);
        }
    }
}
