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

    /// Looks whether the peer, or the connection, has ended the stream; what was sent before may still be unread.
    ///
    /// # Errors
    ///
    /// It has.
    pub(super) fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let gone = || io::Error::from(io::ErrorKind::ConnectionReset);
        if self.ended.as_mut().poll(cx).is_ready() {
            return Err(gone());
        }
        // Reading nothing: yamux waits while the peer has neither ended nor reset the stream, and then says 0; QUIC says
        // 0 in any case.
        if Pin::new(&mut self.inner).poll_read(cx, &mut []).is_pending() {
            return Ok(());
        }
        // Writing nothing: fails on a stream that was reset, or that the peer of a QUIC connection has stopped reading.
        match Pin::new(&mut self.inner).poll_write(cx, &[]) {
            Poll::Ready(Err(_)) => Err(gone()),
            Poll::Ready(Ok(_)) | Poll::Pending => Ok(()),
        }
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
