//! The way from a source to the builder.

use std::time::Instant;

use tokio::sync::mpsc;

use crate::model::Event;

/// What a source tells, and when it learnt of it.
#[derive(Clone, Debug)]
pub struct Received {
    pub event: Event,
    /// When the API server's message, or the directory's notification, arrived.
    pub at: Instant,
}

/// Where a source sends its events; it has to wait while the builder is behind.
#[derive(Clone, Debug)]
pub struct Events(mpsc::Sender<Received>);

/// The builder has ended, and with it the agent.
#[derive(Debug)]
pub(super) struct Closed;

impl Events {
    /// A way for at most so many events at once.
    pub fn channel(capacity: usize) -> (Self, mpsc::Receiver<Received>) {
        let (sender, receiver) = mpsc::channel(capacity);
        (Self(sender), receiver)
    }

    /// Sends an event that the source learnt of at that time.
    pub(super) async fn send(&self, event: Event, at: Instant) -> Result<(), Closed> {
        self.0.send(Received { event, at }).await.map_err(|_| Closed)
    }

    /// Resolves when nobody receives any more.
    pub(super) async fn closed(&self) {
        self.0.closed().await;
    }
}
