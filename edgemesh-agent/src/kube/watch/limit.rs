//! `kubeAPIConfig.qps` and `burst`: how often the API server is asked.

use std::time::Duration;

use tokio::{
    sync::Mutex,
    time::{Instant, sleep_until},
};

/// Lets `burst` requests through at once, and `qps` a second in the long run.
#[derive(Debug)]
pub(in crate::kube) struct Limiter {
    interval: Duration,
    allowance: Duration,
    /// When the next request would be due if all kept to `interval` (the generic cell rate algorithm).
    due: Mutex<Instant>,
}

impl Limiter {
    /// A `qps` or `burst` of 0 counts as 1: a source that may not ask is none.
    pub(in crate::kube) fn new(qps: u32, burst: u32) -> Self {
        let interval = Duration::from_secs(1) / qps.max(1);
        Self { interval, allowance: interval * burst.max(1), due: Mutex::new(Instant::now()) }
    }

    /// Resolves when a request may be sent.
    pub(in crate::kube) async fn permit(&self) {
        let at = {
            let mut due = self.due.lock().await;
            let now = Instant::now();
            *due = (*due).max(now) + self.interval;
            due.checked_sub(self.allowance)
        };
        if let Some(at) = at {
            sleep_until(at).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn lets_a_burst_through_and_then_keeps_the_rate() {
        let limiter = Limiter::new(10, 5);
        let start = Instant::now();
        for _ in 0..5 {
            limiter.permit().await;
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        for _ in 0..10 {
            limiter.permit().await;
        }
        assert!((990..=1010).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
    }
}
