//! Proving again and again that translation works, and seeing what stands in its way.

pub mod canary;
mod netfilter;
mod proxies;
mod report;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::task::spawn_blocking;
use tracing::debug;

pub use canary::{Canary, CanaryState, CanaryStatus};

use crate::{
    conditions::Conditions,
    dataplane::{self, ebpf::hooks},
    lifecycle::{Readiness, Tasks},
};
use canary::{Failure, Verdict};

/// How often the surroundings are looked at where the canary does not say.
const PERIOD: Duration = Duration::from_secs(30);
/// How soon a failure of the canary is looked into: a node does not wait half a minute to know that it is cut off.
const SECOND_LOOK: Duration = Duration::from_secs(5);

/// How often to look whether the programs of an earlier agent with other maps have given way.
const SWITCH: Duration = Duration::from_secs(1);

/// The reason of the condition for a canary that fails.
pub const CANARY_FAILED: &str = "CanaryFailed";
const CANARY_NOT_RUN: &str = "CanaryNotRun";
/// The reason of the condition for hooks that our programs are no longer on.
pub const DETACHED: &str = "ProgramsDetached";
const FOREIGN: &str = "ForeignProgram";
const ANOTHER_AGENT: &str = "AnotherAgent";
const KUBE_PROXY: &str = "KubeProxyPresent";
const EDGEMESH: &str = "EdgeMeshGoPresent";

/// Says that there is no canary, and why.
pub fn raise_not_run(conditions: &Conditions, reason: &str) {
    let message = format!("nothing proves that translation works, the canary cannot be sent: {reason}");
    conditions.raise(CANARY_NOT_RUN, "", message, SystemTime::now());
}

/// What is watched, and whom to tell.
#[derive(Clone, Debug)]
pub struct Watch {
    /// The cgroup that is served, and where the links are pinned.
    pub cgroup: PathBuf,
    pub pins: PathBuf,
    /// From one canary to the next; zero without canary.
    pub period: Duration,
    pub conditions: Conditions,
    pub readiness: Readiness,
    pub dataplane: dataplane::Handle,
}

impl Watch {
    /// Watches until the agent stops. Without a canary, only the surroundings.
    pub fn start(self, canary: Option<(Canary, CanaryState)>, tasks: &Tasks) {
        if let Some((canary, state)) = canary {
            tasks.spawn(Arc::new(self.clone()).prove(canary, state, tasks.stopping()));
        }
        tasks.spawn(self.look_around(tasks.stopping()));
    }

    /// Runs the canary again and again.
    async fn prove(self: Arc<Self>, canary: Canary, state: CanaryState, stop: tokio_util::sync::CancellationToken) {
        let mut unready = None;
        let mut wait = Duration::ZERO;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(wait) => {}
            }
            // The programs of an earlier agent do not know of the canary.
            if hooks::awaits_switch(&self.pins) {
                wait = SWITCH;
                continue;
            }
            wait = self.period;
            let run = self.run(&canary, state.status().failures > 0);
            let outcome = tokio::select! {
                () = stop.cancelled() => break,
                outcome = run => outcome,
            };
            let reason = match outcome {
                Ok(()) => {
                    state.take(true, SystemTime::now());
                    unready = None;
                    self.conditions.clear(CANARY_FAILED, "");
                    self.conditions.clear(CANARY_NOT_RUN, "");
                    continue;
                }
                Err(Failure::NotRun(reason)) => {
                    raise_not_run(&self.conditions, &reason);
                    continue;
                }
                Err(Failure::Failed(reason)) => reason,
            };
            wait = wait.min(SECOND_LOOK);
            if state.take(false, SystemTime::now()) == Verdict::Broken {
                let message = format!(
                    "a process of this node does not reach a Service ({} over {}): {reason}",
                    canary.frontend(),
                    self.cgroup.display()
                );
                unready.get_or_insert_with(|| self.readiness.block("the canary"));
                self.conditions.raise(CANARY_FAILED, "", message, SystemTime::now());
            } else {
                debug!("the canary failed once: {reason}");
            }
        }
        canary.remove();
    }

    /// Once, and where it has just failed with a look at what may be the reason.
    async fn run(&self, canary: &Canary, explain: bool) -> Result<(), Failure> {
        if !explain {
            return canary.run().await;
        }
        let before = self.translated(canary).await;
        let outcome = canary.run().await;
        let Err(Failure::Failed(reason)) = outcome else { return outcome };
        let after = self.translated(canary).await;
        let hooks = self.hooks().await.unwrap_or_default();
        Err(Failure::Failed(format!("{reason}; {}", report::why(before, after, &hooks))))
    }

    /// How many of the canary's calls our programs have translated; None if they cannot be asked.
    async fn translated(&self, canary: &Canary) -> Option<u64> {
        let counts = self.dataplane.counters().await.ok()?;
        let own = counts.iter().filter(|count| count.frontend.addr == canary.frontend());
        Some(own.map(|count| count.connects + count.datagrams).sum())
    }

    async fn hooks(&self) -> Option<hooks::Survey> {
        let (cgroup, pins) = (self.cgroup.clone(), self.pins.clone());
        match spawn_blocking(move || hooks::survey(&cgroup, &pins)).await {
            Ok(Ok(survey)) => Some(survey),
            Ok(Err(error)) => {
                debug!("the hooks cannot be looked at: {error}");
                None
            }
            Err(_) => None,
        }
    }

    /// Looks at the hooks and for other proxies again and again.
    async fn look_around(self, stop: tokio_util::sync::CancellationToken) {
        let mut ticks = tokio::time::interval(if self.period.is_zero() { PERIOD } else { self.period });
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut unready = None;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let look = async { (self.hooks().await, spawn_blocking(proxies::look).await.ok()) };
            let (hooks, proxies) = tokio::select! {
                () = stop.cancelled() => return,
                found = look => found,
            };
            let now = SystemTime::now();
            if let Some(hooks) = hooks {
                let detached = report::detached(&hooks, &self.cgroup);
                match &detached {
                    Some(_) => _ = unready.get_or_insert_with(|| self.readiness.block("the eBPF programs")),
                    None => unready = None,
                }
                self.tell(DETACHED, detached.into_iter().map(|message| (String::new(), message)).collect(), now);
                self.tell(ANOTHER_AGENT, report::another_agent(&hooks, &self.cgroup), now);
                self.tell(FOREIGN, report::foreign(&hooks, &self.cgroup), now);
            }
            if let Some(proxies) = proxies {
                self.tell(KUBE_PROXY, report::kube_proxy(&proxies), now);
                self.tell(EDGEMESH, report::edgemesh(&proxies), now);
            }
        }
    }

    /// Has exactly these conditions, as subject and message, hold of a reason.
    fn tell(&self, reason: &'static str, held: Vec<(String, String)>, now: SystemTime) {
        self.conditions.retain(reason, |subject| held.iter().any(|(other, _)| other == subject));
        for (subject, message) in held {
            self.conditions.raise(reason, subject, message, now);
        }
    }
}
