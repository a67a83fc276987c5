//! How many queries one client may send.

use std::{
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    num::NonZeroU32,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// How many clients are known at a time: more than a node has pods.
const SETS: usize = 512;
const WAYS: usize = 4;
/// What a client may send at once, in seconds of its rate.
const BURST: Duration = Duration::from_secs(2);

/// A rate for each client address, without locks and in bounded memory.
///
/// The generic cell rate algorithm: of each client one moment is kept, until when it has used up its rate. A client that
/// kept quiet has a moment in the past, and forgetting it loses nothing; that one gives way first when there are too many.
/// Two threads that judge one client at the same moment may let one query too many pass.
#[derive(Debug)]
pub(super) struct Limit {
    slots: Box<[Slot]>,
    /// Nanoseconds from one query to the next.
    interval: u64,
    burst: u64,
    began: Instant,
    hasher: RandomState,
}

#[derive(Debug, Default)]
struct Slot {
    /// A hash of the client's address; 0 for nobody.
    client: AtomicU64,
    used_until: AtomicU64,
}

impl Limit {
    /// Of so many queries a second.
    pub(super) fn new(rate: NonZeroU32, now: Instant) -> Self {
        let interval = (1_000_000_000 / u64::from(rate.get())).max(1);
        let slots = std::iter::repeat_with(Slot::default).take(SETS * WAYS).collect();
        Self { slots, interval, burst: nanos(BURST), began: now, hasher: RandomState::new() }
    }

    /// Whether a query that came `now` is within the client's rate; then it counts.
    pub(super) fn admits(&self, client: IpAddr, now: Instant) -> bool {
        let now = nanos(now.saturating_duration_since(self.began));
        let hash = self.hasher.hash_one(client) | 1;
        let slot = self.slot(hash, now);
        let used_until = slot.used_until.load(Relaxed).max(now);
        if used_until - now > self.burst {
            return false;
        }
        slot.used_until.store(used_until.saturating_add(self.interval), Relaxed);
        true
    }

    fn slot(&self, hash: u64, now: u64) -> &Slot {
        // The low bit is the same for all.
        let set = usize::try_from((hash >> 1) % SETS as u64).unwrap_or(0) * WAYS;
        let ways = self.slots.get(set..set + WAYS).unwrap_or(&self.slots);
        if let Some(known) = ways.iter().find(|slot| slot.client.load(Relaxed) == hash) {
            return known;
        }
        let oldest = ways.iter().min_by_key(|slot| slot.used_until.load(Relaxed));
        // There are ways.
        let slot = oldest.unwrap_or(&self.slots[0]);
        slot.client.store(hash, Relaxed);
        slot.used_until.store(now, Relaxed);
        slot
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn client(number: u32) -> IpAddr {
        Ipv4Addr::from(0x0af4_0000 | number).into()
    }

    #[test]
    fn a_client_has_its_rate_after_its_burst_and_others_have_theirs() {
        let start = Instant::now();
        let limit = Limit::new(NonZeroU32::new(100).unwrap(), start);
        let admitted = (0..1000).filter(|_| limit.admits(client(1), start)).count();
        assert_eq!(admitted, 201, "two seconds of the rate, and the one that goes over");
        assert!(limit.admits(client(2), start));
        let later = start + Duration::from_secs(1);
        assert_eq!((0..1000).filter(|_| limit.admits(client(1), later)).count(), 100);
    }

    #[test]
    fn crowds_of_clients_take_no_memory_and_do_not_lock_anybody_out() {
        let start = Instant::now();
        let limit = Limit::new(NonZeroU32::new(10).unwrap(), start);
        let size = limit.slots.len();
        for number in 0..100_000 {
            assert!(limit.admits(client(number), start));
        }
        assert_eq!(limit.slots.len(), size);
    }

    #[test]
    fn a_busy_client_is_remembered_while_quiet_ones_come_and_go() {
        let start = Instant::now();
        let limit = Limit::new(NonZeroU32::new(10).unwrap(), start);
        while limit.admits(client(0), start) {}
        for number in 1..10_000 {
            // Each a second after the one before has been forgotten.
            let _ = limit.admits(client(number), start);
            assert!(!limit.admits(client(0), start), "after {number} others");
        }
    }
}
