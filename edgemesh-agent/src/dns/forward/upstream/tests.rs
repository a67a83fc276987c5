use super::*;
use crate::dns::forward::fake::{A, question};

fn milliseconds(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

#[test]
fn is_silent_after_one_question_that_nothing_came_to_and_until_a_usable_answer() {
    let (mut health, now, name) = (Health::default(), Instant::now(), question("a", A));
    health.unanswered(&name, now, now + SILENCE, 0.5);
    assert!(health.silence.is_some());
    assert_eq!(health.silent_since(), Some(now + SILENCE));
    health.heard(now + SILENCE, now + 2 * SILENCE);
    assert!(health.silence.is_some(), "SERVFAIL is what a resolver says that has lost its own upstreams");
    assert!(health.silent_since().unwrap() > now + SILENCE, "but it lives");
    health.answered(&name, now + SILENCE, now + SILENCE);
    assert!(health.silence.is_none());
}

#[test]
fn a_question_that_is_hard_says_nothing_where_others_are_answered() {
    let (mut health, now) = (Health::default(), Instant::now());
    health.answered(&question("a", A), now + milliseconds(500), now + milliseconds(510));
    health.unanswered(&question("hard", A), now, now + SILENCE, 0.5);
    assert!(health.silence.is_none());
    health.unanswered(&question("hard", A), now + milliseconds(511), now + 2 * SILENCE, 0.5);
    assert!(health.silence.is_some());
}

#[test]
fn is_probed_at_growing_pauses_of_2_s_at_most() {
    for random in [0.0, 0.999] {
        let (mut health, start, name) = (Health::default(), Instant::now(), question("a", A));
        assert!(health.probe(start, random).is_none() && health.next_probe().is_none());
        health.unanswered(&name, start, start, random);
        let mut times = Vec::new();
        let mut before = start;
        for i in 0..10 {
            let at = health.next_probe().unwrap();
            assert!(health.probe(at - milliseconds(1), random).is_none());
            assert_eq!(health.probe(at, random), if i % 2 == 0 { Some(name) } else { root_servers() });
            times.push((at - before).as_millis());
            before = at;
        }
        let expected = if random > 0.5 { [249, 499, 999, 1999] } else { [125, 250, 500, 1000] };
        assert_eq!(times[..4], expected);
        assert!(times[4..].iter().all(|&pause| pause == expected[3]));
    }
}

#[test]
fn one_hard_name_is_told_from_a_silence_by_what_was_answered_before() {
    let (mut health, mut now) = (Health::default(), Instant::now());
    let [easy, hard, other] = ["easy", "hard", "other"].map(|name| question(name, A));
    let hard_too = question("hard", 28);
    health.answered(&easy, now, now);
    now += milliseconds(1);
    health.unanswered(&hard, now, now + SILENCE, 0.5);
    health.unanswered(&hard_too, now, now + SILENCE, 0.5);
    now += milliseconds(10_000);
    assert_eq!(
        [0.0; 4].map(|random| {
            now += LAST_PAUSE;
            health.probe(now, random).unwrap()
        }),
        [hard, easy, hard, easy]
    );
    health.answered(&easy, now, now);
    assert!(health.silence.is_none());

    now += milliseconds(1);
    health.unanswered(&hard_too, now, now, 0.5);
    assert!(health.silence.is_none(), "it is known to be hard");
    health.unanswered(&other, now, now, 0.5);
    assert!(health.silence.is_some(), "two are not");
    assert_eq!(
        [0.0; 2].map(|random| {
            now += LAST_PAUSE;
            health.probe(now, random).unwrap()
        }),
        [other, hard],
        "what is easy may be known to a resolver that has lost its own upstreams"
    );
    health.answered(&other, now, now);
    now += HARD;
    health.unanswered(&hard, now, now, 0.5);
    assert!(health.silence.is_some(), "it may be tried again");
}

#[test]
fn two_hard_names_do_not_keep_a_resolver_silent_that_answers_all_others() {
    let (mut health, mut now) = (Health::default(), Instant::now());
    let [easy, hard, hard_too, other] = ["easy", "hard", "hard-too", "other"].map(|name| question(name, A));
    health.answered(&easy, now, now);
    now += milliseconds(1);
    health.unanswered(&hard, now, now, 0.5);
    health.unanswered(&hard_too, now, now, 0.5);
    let silent = now;
    while let Some(at) = health.next_probe() {
        now = at;
        let probe = health.probe(now, 0.5).unwrap();
        if probe == easy {
            health.answered(&probe, now, now);
        } else {
            health.unanswered(&probe, now, now, 0.5);
        }
        assert!(now - silent < HARD + 3 * LAST_PAUSE, "nobody but these two is asked for, and it stays silent");
    }
    for _ in 0..20 {
        now += HARD / 2;
        health.unanswered(&hard, now, now, 0.5);
        health.unanswered(&hard_too, now, now, 0.5);
        assert!(health.silence.is_none(), "both are known to be hard");
    }
    health.unanswered(&other, now, now, 0.5);
    assert!(health.silence.is_some(), "a third one is not");
}

#[test]
fn a_resolver_that_answers_but_one_name_has_lost_its_own_upstreams() {
    let (mut health, mut now) = (Health::default(), Instant::now());
    let easy = question("easy", A);
    for number in 0..20 {
        now += milliseconds(1);
        health.unanswered(&question(&format!("name{number}"), A), now, now, 0.5);
        assert!(health.silence.is_some(), "after {number} names");
        health.answered(&easy, now, now);
        assert!(health.hard.len() <= MOST_HARD);
    }
}

#[test]
fn the_ways_of_an_upstream_are_forgotten_after_an_hour() {
    let now = Instant::now();
    let health = Health { changes_case: Some(now), lacks_edns: Some(now), ..Health::default() };
    let soon = now + WAYS - milliseconds(1);
    assert!(!health.keeps_case(soon) && !health.edns(soon));
    assert!(health.keeps_case(now + WAYS) && health.edns(now + WAYS));
}

#[test]
fn others_are_asked_sooner_the_faster_it_is() {
    let (mut health, now) = (Health::default(), Instant::now());
    let mut hedge_after = |round_trip| {
        for _ in 0..64 {
            health.answered(&question("a", A), now, now + milliseconds(round_trip));
        }
        health.hedge().as_millis()
    };
    assert_eq!(Health::default().hedge(), milliseconds(200));
    assert_eq!(hedge_after(1), 50);
    assert!((78..=80).contains(&hedge_after(40)));
    assert_eq!(hedge_after(600), 200);
}
