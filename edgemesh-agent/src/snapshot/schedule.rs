//! When to write.

use std::time::Duration;

use tokio::time::Instant;

/// What changes together is written together.
const SETTLE: Duration = Duration::from_millis(250);
/// From the end of one write to the next, at least.
const SHORTEST: Duration = Duration::from_secs(2);
/// However large the file is.
const LONGEST: Duration = Duration::from_secs(60);
/// How many bytes a second are written in the long run: the flash of a small computer wears out.
const PACE: u64 = 128 << 10;
/// What has not changed is written again after so long, so that a later start knows how old it is.
const REFRESH: Duration = Duration::from_secs(3600);
/// After a write that failed; doubled each time up to [`LONGEST`].
const RETRY: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub(super) struct Schedule {
    /// Since when something is known that is not in the file.
    changed: Option<Instant>,
    /// Not before the last write, or attempt, is so long ago.
    earliest: Option<Instant>,
    refresh: Option<Instant>,
    failures: u32,
}

impl Schedule {
    /// Something is known that is not in the file.
    pub(super) fn changed(&mut self, now: Instant) {
        self.changed.get_or_insert(now);
    }

    /// Whether there is anything to write that is not in the file.
    pub(super) fn is_needed(&self) -> bool {
        self.changed.is_some()
    }

    /// When to write; None before anything has ever changed.
    pub(super) fn next(&self) -> Option<Instant> {
        match self.changed {
            Some(changed) => Some((changed + SETTLE).max(self.earliest.unwrap_or(changed))),
            None => self.refresh,
        }
    }

    /// What is known now is being written.
    pub(super) fn begun(&mut self) {
        self.changed = None;
    }

    pub(super) fn written(&mut self, size: u64, now: Instant) {
        self.failures = 0;
        self.earliest = Some(now + Duration::from_secs(size / PACE).clamp(SHORTEST, LONGEST));
        self.refresh = Some(now + REFRESH);
    }

    pub(super) fn failed(&mut self, now: Instant) {
        self.changed(now);
        self.earliest = Some(now + (RETRY * 2_u32.saturating_pow(self.failures.min(8))).min(LONGEST));
        self.failures = self.failures.saturating_add(1);
    }

    /// There is no point in writing what has not changed.
    pub(super) fn put_off(&mut self, now: Instant) {
        self.refresh = Some(now + LONGEST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn what_changes_together_is_written_together_and_a_rest_follows() {
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        assert_eq!(schedule.next(), None);
        schedule.changed(start);
        schedule.changed(start + millis(100));
        assert_eq!(schedule.next(), Some(start + SETTLE), "a source that changes all the time does not put it off");
        schedule.begun();
        schedule.changed(start + millis(300));
        schedule.written(1000, start + millis(400));
        assert_eq!(schedule.next(), Some(start + millis(400) + SHORTEST));
    }

    #[test]
    fn large_files_are_written_less_often() {
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        for (size, pause) in [(0, 2), (128 << 10, 2), (1 << 20, 8), (8 << 20, 60), (u64::MAX, 60)] {
            schedule.changed(start);
            schedule.begun();
            schedule.written(size, start);
            schedule.changed(start);
            assert_eq!(schedule.next(), Some(start + Duration::from_secs(pause)), "{size}");
        }
    }

    #[test]
    fn what_failed_is_tried_again_after_growing_pauses() {
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        schedule.changed(start);
        for pause in [5, 10, 20, 40, 60, 60] {
            schedule.begun();
            schedule.failed(start);
            assert_eq!(schedule.next(), Some(start + Duration::from_secs(pause)));
        }
        schedule.begun();
        schedule.written(0, start);
        assert!(!schedule.is_needed());
        schedule.begun();
        schedule.failed(start);
        assert_eq!(schedule.next(), Some(start + RETRY), "a success starts the count anew");
    }

    #[test]
    fn what_does_not_change_is_written_once_an_hour() {
        let (mut schedule, start) = (Schedule::default(), Instant::now());
        schedule.changed(start);
        schedule.begun();
        schedule.written(0, start);
        assert_eq!((schedule.next(), schedule.is_needed()), (Some(start + REFRESH), false));
        schedule.put_off(start + REFRESH);
        assert_eq!(schedule.next(), Some(start + REFRESH + LONGEST));
    }
}
