//! What the programs log: the rare failure that has no other way out of the kernel.

use std::sync::PoisonError;

use aya_log::EbpfLogger;
use tokio::io::unix::AsyncFd;
use tracing::warn;

use super::Ebpf;
use crate::lifecycle::Tasks;

impl Ebpf {
    /// Passes the programs' log lines on to ours until the agent stops.
    pub fn follow_log(&mut self, tasks: &Tasks) {
        let logger = match EbpfLogger::init(&mut self.opened.object.lock().unwrap_or_else(PoisonError::into_inner)) {
            Ok(logger) => logger,
            Err(error) => return warn!("the log of the eBPF programs cannot be followed: {error}"),
        };
        // SAFETY: the logger owns the descriptor of its ring buffer and keeps it open and unchanged until it is dropped,
        // which is after the `AsyncFd` that owns it has deregistered it.
        let mut logger = match unsafe { AsyncFd::register(logger) } {
            Ok(logger) => logger,
            Err(error) => return warn!("the log of the eBPF programs cannot be followed: {error}"),
        };
        let stop = tasks.stopping();
        tasks.spawn(async move {
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    ready = logger.readable_mut() => match ready {
                        Ok(mut ready) => {
                            ready.get_inner_mut().flush();
                            ready.clear_ready();
                        }
                        Err(error) => return warn!("the log of the eBPF programs is lost: {error}"),
                    },
                }
            }
        });
    }
}
