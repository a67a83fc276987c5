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
    health.answered(now + SILENCE, false, now + SILENCE);
    assert!(health.silence.is_some(), "SERVFAIL is what a resolver says that has lost its own upstreams");
    health.answered(now + SILENCE, true, now + SILENCE);
    assert!(health.silence.is_none());
}

#[test]
fn a_question_that_is_hard_says_nothing_where_others_are_answered() {
    let (mut health, now) = (Health::default(), Instant::now());
    health.answered(now + milliseconds(500), true, now + milliseconds(510));
    health.unanswered(&question("hard", A), now, now + SILENCE, 0.5);
    assert!(health.silence.is_none());
    health.unanswered(&question("hard", A), now + milliseconds(511), now + 2 * SILENCE, 0.5);
    assert!(health.silence.is_some());
}

#[test]
fn is_probed_with_what_it_did_not_answer_at_growing_pauses_of_2_s_at_most() {
    for random in [0.0, 0.999] {
        let (mut health, start, name) = (Health::default(), Instant::now(), question("a", A));
        assert!(health.probe(start, random).is_none() && health.next_probe().is_none());
        health.unanswered(&name, start, start, random);
        let mut times = Vec::new();
        let mut before = start;
        for _ in 0..10 {
            let at = health.next_probe().unwrap();
            assert!(health.probe(at - milliseconds(1), random).is_none());
            assert_eq!(health.probe(at, random).unwrap(), name);
            times.push((at - before).as_millis());
            before = at;
        }
        let expected = if random > 0.5 { [249, 499, 999, 1999] } else { [125, 250, 500, 1000] };
        assert_eq!(times[..4], expected);
        assert!(times[4..].iter().all(|&pause| pause == expected[3]));
    }
}

#[test]
fn others_are_asked_sooner_the_faster_it_is() {
    let (mut health, now) = (Health::default(), Instant::now());
    let mut hedge_after = |round_trip| {
        for _ in 0..64 {
            health.answered(now, true, now + milliseconds(round_trip));
        }
        health.hedge().as_millis()
    };
    assert_eq!(Health::default().hedge(), milliseconds(200));
    assert_eq!(hedge_after(1), 50);
    assert!((78..=80).contains(&hedge_after(40)));
    assert_eq!(hedge_after(600), 200);
}
