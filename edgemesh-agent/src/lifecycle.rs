//! Start and stop: who still blocks readiness, who still works while the agent drains.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    signal::unix::{SignalKind, signal},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

/// Owns every task of the agent: they are told to stop together and waited for together.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    stop: CancellationToken,
    tracker: TaskTracker,
}

impl Tasks {
    /// Runs `future` as a task; it is to end soon after [`Tasks::stopping`] resolves.
    pub fn spawn<F>(&self, future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tracker.spawn(future);
    }

    /// As [`Tasks::spawn`], from a thread that is none of the runtime's.
    pub fn spawn_on<F>(&self, runtime: &Handle, future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tracker.spawn_on(future, runtime);
    }

    /// Tasks of their own, which are told to stop with these and can be drained without them.
    pub fn group(&self) -> Self {
        Self { stop: self.stop.child_token(), tracker: TaskTracker::new() }
    }

    /// Resolves when the agent is told to stop.
    pub fn stopping(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Tells every task to stop and waits for them, at most `deadline`; says whether all ended.
    pub async fn drain(&self, deadline: Duration) -> bool {
        self.stop.cancel();
        self.tracker.close();
        let ended = tokio::time::timeout(deadline, self.tracker.wait()).await.is_ok();
        if !ended {
            warn!(tasks = self.tracker.len(), ?deadline, "some tasks did not end in time; stopping without them");
        }
        ended
    }
}

/// What still stands in the way of readiness.
///
/// Each part that must come up first holds a [`Blocker`]; the agent is ready when none is left. A part that loses its
/// footing later takes a new one.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    blockers: BTreeMap<&'static str, usize>,
    /// Set once the agent has started; before that, blockers also go when a start fails.
    started: bool,
}

/// Keeps the agent unready until dropped.
#[derive(Debug)]
pub struct Blocker {
    readiness: Readiness,
    what: &'static str,
}

impl Readiness {
    /// Blocks readiness for `what`, a few words that complete "waiting for …".
    pub fn block(&self, what: &'static str) -> Blocker {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).blockers.entry(what).or_insert(0) += 1;
        Blocker { readiness: self.clone(), what }
    }

    /// What is still waited for; empty means ready.
    pub fn waiting_for(&self) -> Vec<&'static str> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).blockers.keys().copied().collect()
    }

    /// Says that the start has succeeded; from now on, readiness is logged.
    pub fn started(&self) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.started = true;
        waiting.log_if_ready();
    }
}

impl Waiting {
    fn log_if_ready(&self) {
        if self.started && self.blockers.is_empty() {
            info!("ready");
        }
    }
}

impl Drop for Blocker {
    fn drop(&mut self) {
        let mut waiting = self.readiness.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = waiting.blockers.get_mut(self.what) {
            *count -= 1;
            if *count == 0 {
                waiting.blockers.remove(self.what);
            }
        }
        waiting.log_if_ready();
    }
}

/// Resolves with the name of the first signal that asks the agent to stop: SIGTERM (Kubernetes), SIGINT or SIGQUIT.
///
/// # Errors
///
/// The kernel refuses to install a handler.
pub async fn stop_signal() -> std::io::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut quit = signal(SignalKind::quit())?;
    Ok(tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        _ = quit.recv() => "SIGQUIT",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_the_last_blocker_is_gone() {
        let readiness = Readiness::default();
        let (a, b, b2) = (readiness.block("a"), readiness.block("b"), readiness.block("b"));
        assert_eq!(readiness.waiting_for(), ["a", "b"]);
        drop(b);
        assert_eq!(readiness.waiting_for(), ["a", "b"]);
        drop(b2);
        assert_eq!(readiness.waiting_for(), ["a"]);
        drop(a);
        assert!(readiness.waiting_for().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn drain_waits_for_tasks_but_not_for_ever() {
        let tasks = Tasks::default();
        let stop = tasks.stopping();
        tasks.spawn(async move { stop.cancelled().await });
        assert!(tasks.drain(Duration::from_secs(5)).await);

        let tasks = Tasks::default();
        tasks.spawn(std::future::pending());
        assert!(!tasks.drain(Duration::from_secs(5)).await);
    }
}
