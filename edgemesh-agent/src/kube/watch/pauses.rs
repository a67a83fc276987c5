//! How long to wait from one attempt to the next.

use std::time::Duration;

use kube::runtime::watcher::DefaultBackoff;

use super::Meaning;

/// The pause of client-go's reflector does not grow beyond this step: 26 to 51 seconds.
const LAST_STEP: usize = 5;
/// The same towards a server that does not answer at all: 1.6 to 3.2 seconds. An attempt costs it nothing then, and what it
/// has to tell when it is back is wanted at once.
const LAST_STEP_UNREACHABLE: usize = 1;

/// The pauses of one kind of request: longer each time, and each one random within a factor of two, so that the nodes of
/// a cluster do not come all at once.
#[derive(Debug, Default)]
pub(super) struct Pauses {
    step: usize,
    unreachable: bool,
}

impl Pauses {
    /// The pause after an attempt that came to nothing.
    pub(super) fn after(&mut self, meaning: Meaning) -> Duration {
        let unreachable = meaning == Meaning::Unreachable;
        if self.unreachable && !unreachable {
            // It is back; what is wrong now is another matter, such as a server that is still starting.
            self.step = 0;
        }
        self.unreachable = unreachable;
        self.next()
    }

    /// The pause after an attempt that came to nothing of use, though nothing failed.
    pub(super) fn next(&mut self) -> Duration {
        let last = if self.unreachable { LAST_STEP_UNREACHABLE } else { LAST_STEP };
        let step = self.step.min(last);
        self.step = step + 1;
        // Never ends by itself.
        DefaultBackoff::default().nth(step).unwrap_or_default()
    }

    /// All is well: the next pause is the shortest again.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(pauses: &mut Pauses, meaning: Meaning, count: usize) -> Vec<f64> {
        (0..count).map(|_| pauses.after(meaning).as_secs_f64()).collect()
    }

    #[test]
    fn grow_to_half_a_minute_where_something_is_refused() {
        let mut pauses = Pauses::default();
        let seen = seconds(&mut pauses, Meaning::Forbidden, 20);
        for (step, pause) in seen.iter().enumerate() {
            let shortest = 0.8 * f64::from(1 << step.min(LAST_STEP));
            assert!((shortest..=2.0 * shortest + 0.01).contains(pause), "{step}: {seen:?}");
        }
        pauses.reset();
        assert!(seconds(&mut pauses, Meaning::Forbidden, 1)[0] < 1.7);
    }

    #[test]
    fn stay_short_while_nobody_answers_and_begin_anew_when_somebody_does() {
        let mut pauses = Pauses::default();
        seconds(&mut pauses, Meaning::Answered, 10);
        let seen = seconds(&mut pauses, Meaning::Unreachable, 20);
        assert!(seen.iter().all(|pause| (1.6..=3.21).contains(pause)), "{seen:?}");
        assert!(seconds(&mut pauses, Meaning::Answered, 1)[0] < 1.7);
    }

    #[test]
    fn differ_from_node_to_node() {
        let first: std::collections::BTreeSet<Duration> = (0..20).map(|_| Pauses::default().next()).collect();
        assert!(first.len() > 1, "{first:?}");
    }
}
