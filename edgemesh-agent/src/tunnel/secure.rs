//! Encryption of TCP connections and circuits, with a buffer on either side of it.
//!
//! yamux writes the 12 bytes of a frame's header, then the frame, and flushes: without a buffer each of them is a TLS record,
//! a system call and, as Nagle's algorithm is off, a packet of its own. And rustls asks for 4 KiB at a time, a quarter of a
//! record.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures::{
    AsyncRead, AsyncWrite, FutureExt as _, TryFutureExt as _,
    future::BoxFuture,
    io::{BufReader, IoSliceMut},
};
use libp2p::{
    PeerId,
    core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo},
};

/// Bytes read from the socket at once: a record is 16 KiB and a little.
const READ: usize = 32 * 1024;

/// Bytes that wait to be written together, at most.
const WRITE: usize = 64 * 1024;

/// So many are not held back for more to come.
const ENOUGH: usize = 32 * 1024;

/// An encryption whose connections are buffered.
#[derive(Clone)]
pub(super) struct Buffered<U>(pub(super) U);

impl<U: UpgradeInfo> UpgradeInfo for Buffered<U> {
    type Info = U::Info;
    type InfoIter = U::InfoIter;

    fn protocol_info(&self) -> Self::InfoIter {
        self.0.protocol_info()
    }
}

impl<U, C, S> InboundConnectionUpgrade<C> for Buffered<U>
where
    U: InboundConnectionUpgrade<BufReader<C>, Output = (PeerId, S)>,
    U::Future: Send + 'static,
    C: AsyncRead + AsyncWrite,
{
    type Output = (PeerId, Gathered<S>);
    type Error = U::Error;
    type Future = BoxFuture<'static, Result<Self::Output, Self::Error>>;

    fn upgrade_inbound(self, socket: C, info: Self::Info) -> Self::Future {
        let secured = self.0.upgrade_inbound(BufReader::with_capacity(READ, socket), info);
        secured.map_ok(|(peer, stream)| (peer, Gathered::new(stream))).boxed()
    }
}

impl<U, C, S> OutboundConnectionUpgrade<C> for Buffered<U>
where
    U: OutboundConnectionUpgrade<BufReader<C>, Output = (PeerId, S)>,
    U::Future: Send + 'static,
    C: AsyncRead + AsyncWrite,
{
    type Output = (PeerId, Gathered<S>);
    type Error = U::Error;
    type Future = BoxFuture<'static, Result<Self::Output, Self::Error>>;

    fn upgrade_outbound(self, socket: C, info: Self::Info) -> Self::Future {
        let secured = self.0.upgrade_outbound(BufReader::with_capacity(READ, socket), info);
        secured.map_ok(|(peer, stream)| (peer, Gathered::new(stream))).boxed()
    }
}

/// Gathers small writes, and flushes that follow each other within one turn of the connection's task.
pub(super) struct Gathered<S> {
    inner: S,
    waiting: Vec<u8>,
    written: usize,
    /// Whether something was written since the last flush was asked for.
    fresh: bool,
}

impl<S> Gathered<S> {
    fn new(inner: S) -> Self {
        Self { inner, waiting: Vec::new(), written: 0, fresh: false }
    }
}

impl<S: AsyncWrite + Unpin> Gathered<S> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.waiting.len() {
            match ready!(Pin::new(&mut self.inner).poll_write(cx, &self.waiting[self.written..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.written += count,
            }
        }
        self.waiting.clear();
        self.written = 0;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gathered<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.waiting.len() >= WRITE {
            ready!(self.poll_drain(cx))?;
        }
        let count = data.len().min(WRITE);
        self.waiting.extend_from_slice(&data[..count]);
        self.fresh = true;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if std::mem::take(&mut self.fresh) && self.waiting.len() < ENOUGH {
            // yamux flushes after each frame and goes on with the next meanwhile. If there is none, it comes back at once.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gathered<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_read(cx, buffer)
    }

    fn poll_read_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_read_vectored(cx, buffers)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Takes so many bytes at a time, every other time, and remembers each write.
    struct Reluctant {
        most: usize,
        willing: bool,
        writes: Vec<Vec<u8>>,
    }

    impl AsyncWrite for Reluctant {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
            self.willing = !self.willing;
            if !self.willing {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let count = data.len().min(self.most);
            self.writes.push(data[..count].to_vec());
            Poll::Ready(Ok(count))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn gathered(most: usize) -> Gathered<Reluctant> {
        Gathered::new(Reluctant { most, willing: false, writes: Vec::new() })
    }

    #[test]
    fn frames_that_follow_each_other_are_one_write() {
        let mut stream = gathered(usize::MAX);
        let cx = &mut Context::from_waker(std::task::Waker::noop());
        for _ in 0..3 {
            for piece in [[1u8; 12].as_slice(), &[2; 500]] {
                assert!(
                    matches!(Pin::new(&mut stream).poll_write(cx, piece), Poll::Ready(Ok(count)) if count == piece.len())
                );
            }
            assert!(Pin::new(&mut stream).poll_flush(cx).is_pending());
        }
        assert!(Pin::new(&mut stream).poll_flush(cx).is_ready());
        assert_eq!(stream.inner.writes.iter().map(Vec::len).collect::<Vec<_>>(), [3 * 512]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_changed(
            pieces in proptest::collection::vec((0..70_000usize, any::<bool>()), 0..12),
            most in 1..100_000usize,
        ) {
            let mut stream = gathered(most.max(500));
            let (mut expected, mut next) = (Vec::new(), 0u8);
            let cx = &mut Context::from_waker(std::task::Waker::noop());
            for (length, flush) in pieces {
                let mut piece = vec![0; length];
                piece.fill_with(|| { next = next.wrapping_add(1); next });
                expected.extend_from_slice(&piece);
                let mut rest = piece.as_slice();
                while !rest.is_empty() {
                    if let Poll::Ready(count) = Pin::new(&mut stream).poll_write(cx, rest) {
                        rest = &rest[count.unwrap()..];
                    }
                    prop_assert!(stream.waiting.len() <= 2 * WRITE);
                }
                while flush && Pin::new(&mut stream).poll_flush(cx).is_pending() {}
                if flush {
                    prop_assert_eq!(stream.inner.writes.concat().len(), expected.len());
                }
            }
            while Pin::new(&mut stream).poll_close(cx).is_pending() {}
            prop_assert!(stream.inner.writes.concat() == expected);
        }
    }
}
