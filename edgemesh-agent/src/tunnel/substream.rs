//! A libp2p stream that ends when its connection does.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures::{AsyncRead, AsyncWrite};
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::paths::Path;

/// One stream of a connection, for one task to read and write.
///
/// By itself a stream may outlive its connection: yamux (0.14) leaves those who wait for a stream waiting when the
/// connection is closed by this side, and a stream of QUIC keeps the connection, and with it the socket, for as long as it
/// is held.
pub(super) struct Substream {
    inner: libp2p::Stream,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Substream {
    pub(super) fn new(inner: libp2p::Stream, path: &Path) -> Self {
        Self { inner, ended: Box::pin(path.ended.clone().cancelled_owned()) }
    }

    /// What to say where the stream has nothing to say.
    fn or_ended<T>(&mut self, polled: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            return polled;
        }
        ready!(self.ended.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
    }
}

impl AsyncRead for Substream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_read(cx, buffer);
        self.or_ended(polled, cx)
    }
}

impl AsyncWrite for Substream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(cx, data);
        self.or_ended(polled, cx)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_flush(cx);
        self.or_ended(polled, cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.inner).poll_close(cx);
        self.or_ended(polled, cx)
    }
}
