//! Threads that a system short of them may refuse.

use std::{io, thread::JoinHandle, time::Duration};

use tokio_util::sync::CancellationToken;

/// How often a thread that could not be had is tried again.
pub(super) const RETRY: Duration = Duration::from_secs(5);

/// Starts `count` threads, those again that could not be had, until all run or the agent stops; gives those that run.
///
/// After each round `tell` hears how many run and, if these are not all, why.
pub(super) async fn start(
    count: usize,
    mut spawn: impl FnMut(usize) -> io::Result<JoinHandle<()>>,
    tell: impl Fn(usize, Option<&io::Error>),
    stop: &CancellationToken,
) -> Vec<JoinHandle<()>> {
    let mut running = Vec::with_capacity(count);
    loop {
        let mut failure = None;
        while running.len() < count && failure.is_none() {
            match spawn(running.len()) {
                Ok(thread) => running.push(thread),
                Err(error) => failure = Some(error),
            }
        }
        tell(running.len(), failure.as_ref());
        if failure.is_none() {
            return running;
        }
        tokio::select! {
            () = stop.cancelled() => return running,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, thread};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_thread_that_cannot_be_had_is_told_and_tried_again() {
        let (mut attempts, told) = (Vec::new(), RefCell::new(Vec::new()));
        let spawn = |index: usize| {
            attempts.push(index);
            if matches!(attempts.len(), 1 | 3) {
                Err(io::Error::from_raw_os_error(libc::EAGAIN))
            } else {
                Ok(thread::spawn(|| {}))
            }
        };
        let tell = |running: usize, error: Option<&io::Error>| told.borrow_mut().push((running, error.is_some()));
        let running = start(2, spawn, tell, &CancellationToken::new()).await;
        assert_eq!((running.len(), attempts), (2, vec![0, 0, 1, 1]));
        assert_eq!(*told.borrow(), [(0, true), (1, true), (2, false)], "so nobody takes the address for served");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_is_not_waited_for_by_threads_that_cannot_be_had() {
        let stop = CancellationToken::new();
        stop.cancel();
        let none = start(2, |_| Err(io::ErrorKind::WouldBlock.into()), |_, _| {}, &stop).await;
        assert!(none.is_empty());
    }
}
