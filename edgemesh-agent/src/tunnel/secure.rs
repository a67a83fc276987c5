//! Encryption of TCP connections and circuits, with a buffer on either side of it.
//!
//! yamux writes the 12 bytes of a frame's header, then the frame, and flushes: without a buffer each of them is a TLS record,
//! a system call and, as Nagle's algorithm is off, a packet of its own. And rustls asks for 4 KiB at a time, a quarter of a
//! record.
//!
//! What a peer sends before it has passed the gate is counted here too: yamux would give each of its streams a window.

mod ahead;
pub(super) mod tls;

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll, ready},
};

use futures::{AsyncRead, AsyncWrite, FutureExt as _, TryFutureExt as _, future::BoxFuture, io::IoSliceMut};
use libp2p::{
    PeerId,
    core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo},
};

use self::ahead::Ahead;

/// Bytes that wait to be written together, at most.
const WRITE: usize = 64 * 1024;

/// So many are not held back for more to come.
const ENOUGH: usize = 32 * 1024;

/// Bytes that a peer may send on a connection before it has passed the gate; a hello has a few hundred.
const BEFORE: usize = 64 * 1024;

/// An encryption whose connections are buffered.
#[derive(Clone)]
pub(super) struct Buffered<U> {
    pub(super) security: U,
    pub(super) admitted: Arc<Admitted>,
}

/// Peers that have passed the gate, by the number of connections on which they did.
#[derive(Debug, Default)]
pub(super) struct Admitted(RwLock<HashMap<PeerId, usize>>);

/// Has a peer be admitted as long as it is held.
#[derive(Debug)]
pub(super) struct Pass {
    peer: PeerId,
    admitted: Arc<Admitted>,
}

impl Admitted {
    /// The peer has passed the gate on a connection.
    pub(super) fn enter(self: &Arc<Self>, peer: PeerId) -> Pass {
        *self.0.write().unwrap_or_else(PoisonError::into_inner).entry(peer).or_insert(0) += 1;
        Pass { peer, admitted: Arc::clone(self) }
    }

    fn contains(&self, peer: &PeerId) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains_key(peer)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut admitted = self.admitted.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = admitted.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                admitted.remove(&self.peer);
            }
        }
    }
}

impl<U: UpgradeInfo> UpgradeInfo for Buffered<U> {
    type Info = U::Info;
    type InfoIter = U::InfoIter;

    fn protocol_info(&self) -> Self::InfoIter {
        self.security.protocol_info()
    }
}

impl<U, C, S> InboundConnectionUpgrade<C> for Buffered<U>
where
    U: InboundConnectionUpgrade<Ahead<C>, Output = (PeerId, S)>,
    U::Future: Send + 'static,
    C: AsyncRead + AsyncWrite,
{
    type Output = (PeerId, Gathered<S>);
    type Error = U::Error;
    type Future = BoxFuture<'static, Result<Self::Output, Self::Error>>;

    fn upgrade_inbound(self, socket: C, info: Self::Info) -> Self::Future {
        let Self { security, admitted } = self;
        let secured = security.upgrade_inbound(Ahead::new(socket), info);
        secured.map_ok(|(peer, stream)| (peer, Gathered::new(stream, peer, admitted))).boxed()
    }
}

impl<U, C, S> OutboundConnectionUpgrade<C> for Buffered<U>
where
    U: OutboundConnectionUpgrade<Ahead<C>, Output = (PeerId, S)>,
    U::Future: Send + 'static,
    C: AsyncRead + AsyncWrite,
{
    type Output = (PeerId, Gathered<S>);
    type Error = U::Error;
    type Future = BoxFuture<'static, Result<Self::Output, Self::Error>>;

    fn upgrade_outbound(self, socket: C, info: Self::Info) -> Self::Future {
        let Self { security, admitted } = self;
        let secured = security.upgrade_outbound(Ahead::new(socket), info);
        secured.map_ok(|(peer, stream)| (peer, Gathered::new(stream, peer, admitted))).boxed()
    }
}

/// Gathers small writes, and flushes that follow each other within one turn of the connection's task.
pub(super) struct Gathered<S> {
    inner: S,
    waiting: Vec<u8>,
    written: usize,
    /// Whether something was written since the last flush was asked for.
    fresh: bool,
    /// None when the peer is known to have passed the gate.
    limit: Option<Limit>,
}

/// What a peer may still send before it must have passed the gate.
struct Limit {
    left: usize,
    peer: PeerId,
    admitted: Arc<Admitted>,
}

impl<S> Gathered<S> {
    fn new(inner: S, peer: PeerId, admitted: Arc<Admitted>) -> Self {
        let limit = Some(Limit { left: BEFORE, peer, admitted });
        Self { inner, waiting: Vec::new(), written: 0, fresh: false, limit }
    }

    fn count(&mut self, read: usize) -> io::Result<usize> {
        if let Some(limit) = &mut self.limit {
            match limit.left.checked_sub(read) {
                Some(left) => limit.left = left,
                None if limit.admitted.contains(&limit.peer) => self.limit = None,
                None => return Err(io::Error::other("it sent too much before it had said who it is")),
            }
        }
        Ok(read)
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
        // A connection that has nothing more to send holds no buffer.
        self.waiting = Vec::new();
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gathered<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let read = ready!(Pin::new(&mut self.inner).poll_read(cx, buffer))?;
        Poll::Ready(self.count(read))
    }

    fn poll_read_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        let read = ready!(Pin::new(&mut self.inner).poll_read_vectored(cx, buffers))?;
        Poll::Ready(self.count(read))
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
        Gathered::new(Reluctant { most, willing: false, writes: Vec::new() }, PeerId::random(), Arc::default())
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

    #[test]
    fn a_peer_sends_little_before_it_has_passed_the_gate_and_all_it_likes_afterwards() {
        let (peer, admitted, cx) =
            (PeerId::random(), Arc::<Admitted>::default(), &mut Context::from_waker(std::task::Waker::noop()));
        let mut read = |stream: &mut Gathered<futures::io::Repeat>| match Pin::new(stream).poll_read(cx, &mut [0; 1024])
        {
            Poll::Ready(read) => read.map(|_| ()),
            Poll::Pending => panic!("there is more"),
        };
        let stream = || Gathered::new(futures::io::repeat(7), peer, Arc::clone(&admitted));
        let (mut stranger, mut member) = (stream(), stream());
        for _ in 0..BEFORE / 1024 {
            read(&mut stranger).unwrap();
        }
        read(&mut stranger).unwrap_err();
        let pass = admitted.enter(peer);
        for _ in 0..2 * BEFORE / 1024 {
            read(&mut member).unwrap();
        }
        drop(pass);
        read(&mut member).unwrap();
        assert!(admitted.0.read().unwrap().is_empty());
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
