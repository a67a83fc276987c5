//! Events: what became of each call to a Service address, for whoever listens. While nobody does, the programs write
//! none.

use std::{
    fmt, io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, SystemTime},
};

use tokio::sync::broadcast::{
    self,
    error::{RecvError, TryRecvError},
};
use tracing::warn;

use super::Error;
use crate::model::FrontendAddr;

/// How many events wait for a listener at most; a slower one loses the oldest. About half a MiB, while anybody listens.
const WAITING: usize = 4096;
/// How long the reader waits for events before it looks whether anybody still listens.
const WAIT: Duration = Duration::from_millis(100);

/// What became of one call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Event {
    pub time: SystemTime,
    /// The cookie of the network namespace the call came from.
    pub netns: u64,
    /// The cookie of the socket.
    pub socket: u64,
    pub frontend: FrontendAddr,
    /// Where it was sent; None where it was refused.
    pub backend: Option<SocketAddr>,
    pub call: Call,
}

/// The kind of call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Call {
    /// `connect()`, TCP or UDP.
    Connect,
    /// `sendto()` of an unconnected UDP socket.
    Datagram,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connect",
            Self::Datagram => "datagram",
        })
    }
}

/// The kernel's end: where events come out.
pub trait Ring: Send {
    /// Hands over all events there are; if there are none, waits for some, at most `wait`.
    ///
    /// # Errors
    ///
    /// The kernel refuses to be read.
    fn read(&mut self, wait: Duration, take: &mut dyn FnMut(Event)) -> io::Result<()>;
}

/// Makes the programs write events, or stop it.
pub type Switch = Box<dyn FnMut(bool) -> Result<(), Error> + Send>;

/// Where listeners come to. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Events(Arc<Mutex<State>>);

struct State {
    switch: Switch,
    /// None while a thread reads it.
    ring: Option<Box<dyn Ring>>,
    /// None while nobody listens.
    listeners: Option<broadcast::Sender<Event>>,
    count: usize,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    /// Events out of `ring`, which `switch` turns on and off. It should be off.
    pub fn new(switch: Switch, ring: Box<dyn Ring>) -> Self {
        Self(Arc::new(Mutex::new(State { switch, ring: Some(ring), listeners: None, count: 0 })))
    }

    /// Listens from now on; the first listener switches the programs' events on, the last one to go off.
    ///
    /// # Errors
    ///
    /// They cannot be switched on, or there is no thread to read them.
    pub fn listen(&self) -> Result<Listener, Error> {
        let failed = |error: io::Error| Error::Kernel { attempt: "read events".to_owned(), error: error.to_string() };
        let mut state = self.state();
        if let Some(mut ring) = state.ring.take() {
            // What was written when the last listener left, or for an agent that was killed.
            let cleared = if state.listeners.is_none() { ring.read(Duration::ZERO, &mut |_| {}) } else { Ok(()) };
            state.ring = Some(ring);
            cleared.map_err(failed)?;
            let events = self.clone();
            // It takes the ring as soon as this lock is free.
            thread::Builder::new().name("events".to_owned()).spawn(move || events.pass_on()).map_err(failed)?;
        }
        let listener = match &state.listeners {
            Some(listeners) => listeners.subscribe(),
            None => {
                (state.switch)(true)?;
                let (listeners, listener) = broadcast::channel(WAITING);
                state.listeners = Some(listeners);
                listener
            }
        };
        state.count += 1;
        drop(state);
        Ok(Listener { events: self.clone(), listener })
    }

    /// Reads for as long as anybody listens.
    fn pass_on(&self) {
        let Some(mut ring) = self.state().ring.take() else { return };
        loop {
            let mut state = self.state();
            let Some(listeners) = state.listeners.clone() else {
                state.ring = Some(ring);
                return;
            };
            drop(state);
            let mut tell = |event| {
                // All that listened when this read began have gone; others may have come.
                if listeners.send(event).is_err()
                    && let Some(others) = &self.state().listeners
                {
                    let _ = others.send(event);
                }
            };
            if let Err(error) = ring.read(WAIT, &mut tell) {
                warn!("events cannot be read any more: {error}");
                let mut state = self.state();
                state.ring = Some(ring);
                state.stop();
                return;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn stop(&mut self) {
        if self.listeners.take().is_some()
            && let Err(error) = (self.switch)(false)
        {
            warn!("events cannot be switched off, and cost some time on each connect: {error}");
        }
    }
}

/// Hears events until dropped.
#[derive(Debug)]
pub struct Listener {
    events: Events,
    listener: broadcast::Receiver<Event>,
}

/// What a listener hears.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Heard {
    Event(Event),
    /// So many events had to give way, as the listener is too slow.
    Lost(u64),
}

impl Listener {
    /// The next event; None when there will be no more.
    pub async fn next(&mut self) -> Option<Heard> {
        match self.listener.recv().await {
            Ok(event) => Some(Heard::Event(event)),
            Err(RecvError::Lagged(lost)) => Some(Heard::Lost(lost)),
            Err(RecvError::Closed) => None,
        }
    }

    /// The next event, if there is one already.
    pub fn try_next(&mut self) -> Option<Heard> {
        match self.listener.try_recv() {
            Ok(event) => Some(Heard::Event(event)),
            Err(TryRecvError::Lagged(lost)) => Some(Heard::Lost(lost)),
            Err(TryRecvError::Empty | TryRecvError::Closed) => None,
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut state = self.events.state();
        state.count = state.count.saturating_sub(1);
        if state.count == 0 {
            state.stop();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    };

    use super::*;
    use crate::model::Protocol;

    /// A ring that events are put into by hand.
    struct Fake(mpsc::Receiver<io::Result<Event>>);

    impl Ring for Fake {
        fn read(&mut self, wait: Duration, take: &mut dyn FnMut(Event)) -> io::Result<()> {
            match self.0.recv_timeout(wait) {
                Ok(first) => take(first?),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(()),
            }
            self.0.try_iter().try_for_each(|event| event.map(&mut *take))
        }
    }

    struct Bench {
        events: Events,
        ring: mpsc::Sender<io::Result<Event>>,
        on: Arc<AtomicBool>,
    }

    fn bench() -> Bench {
        let (ring, fake) = mpsc::channel();
        let on = Arc::new(AtomicBool::new(false));
        let switched = Arc::clone(&on);
        let switch: Switch = Box::new(move |on| {
            switched.store(on, Ordering::SeqCst);
            Ok(())
        });
        Bench { events: Events::new(switch, Box::new(Fake(fake))), ring, on }
    }

    fn event(socket: u64) -> Event {
        let frontend = FrontendAddr { addr: ([10, 96, 0, 1], 80).into(), protocol: Protocol::Tcp };
        Event { time: SystemTime::UNIX_EPOCH, netns: 1, socket, frontend, backend: None, call: Call::Connect }
    }

    async fn next(listener: &mut Listener) -> Option<Heard> {
        tokio::time::timeout(Duration::from_secs(10), listener.next()).await.unwrap()
    }

    #[tokio::test]
    async fn events_are_written_only_while_somebody_listens() {
        let Bench { events, ring, on } = bench();
        ring.send(Ok(event(0))).unwrap();
        assert!(!on.load(Ordering::SeqCst));
        for round in 0..3 {
            let (mut a, mut b) = (events.listen().unwrap(), events.listen().unwrap());
            assert!(on.load(Ordering::SeqCst), "round {round}");
            ring.send(Ok(event(1))).unwrap();
            // What was left from before has been thrown away.
            assert_eq!(next(&mut a).await, Some(Heard::Event(event(1))));
            assert_eq!(next(&mut b).await, Some(Heard::Event(event(1))));
            drop(a);
            assert!(on.load(Ordering::SeqCst), "round {round}: one still listens");
            drop(b);
            assert!(!on.load(Ordering::SeqCst), "round {round}");
        }
    }

    #[tokio::test]
    async fn a_slow_listener_is_told_how_many_it_has_lost() {
        let Bench { events, ring, .. } = bench();
        let (mut slow, mut quick) = (events.listen().unwrap(), events.listen().unwrap());
        let all = 2 * WAITING as u64;
        for socket in 0..all {
            ring.send(Ok(event(socket))).unwrap();
            assert_eq!(next(&mut quick).await, Some(Heard::Event(event(socket))));
        }
        let Some(Heard::Lost(lost)) = next(&mut slow).await else { panic!("nothing was lost") };
        assert_eq!(lost, all - WAITING as u64);
        assert_eq!(slow.try_next(), Some(Heard::Event(event(lost))));
    }

    #[tokio::test]
    async fn a_ring_that_breaks_ends_the_stream_and_may_be_tried_again() {
        let Bench { events, ring, on } = bench();
        let mut listener = events.listen().unwrap();
        ring.send(Err(io::Error::other("broken"))).unwrap();
        assert_eq!(next(&mut listener).await, None);
        assert!(!on.load(Ordering::SeqCst));
        drop(listener);
        let mut listener = events.listen().unwrap();
        ring.send(Ok(event(7))).unwrap();
        assert_eq!(next(&mut listener).await, Some(Heard::Event(event(7))));
    }
}
