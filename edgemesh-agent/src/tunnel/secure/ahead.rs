//! Reads ahead, in buffers that a connection has only while there is something in them.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use futures::{AsyncRead, AsyncWrite, io::IoSlice};

/// Bytes read from the socket at once: a record is 16 KiB and a little.
const READ: usize = 64 * 1024;

/// Buffers that a thread keeps for the next connection that is read.
const SPARE: usize = 4;

thread_local! {
    static SPARES: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

fn lend() -> Box<[u8]> {
    let spare = SPARES.with(|spares| spares.try_borrow_mut().ok().and_then(|mut spares| spares.pop()));
    spare.unwrap_or_else(|| vec![0; READ].into())
}

fn give_back(buffer: Box<[u8]>) {
    // A thread that ends has none to keep.
    let _ = SPARES.try_with(|spares| {
        if let Ok(mut spares) = spares.try_borrow_mut()
            && spares.len() < SPARE
        {
            spares.push(buffer);
        }
    });
}

/// As `BufReader`, but of a thousand connections those that wait hold nothing.
pub(in crate::tunnel) struct Ahead<C> {
    inner: C,
    /// What was read and not asked for yet is `at..end` of it.
    buffer: Option<Box<[u8]>>,
    at: usize,
    end: usize,
}

impl<C> Ahead<C> {
    pub(super) fn new(inner: C) -> Self {
        Self { inner, buffer: None, at: 0, end: 0 }
    }
}

impl<C> Drop for Ahead<C> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            give_back(buffer);
        }
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Ahead<C> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, target: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.at == this.end {
            if target.len() >= READ {
                return Pin::new(&mut this.inner).poll_read(cx, target);
            }
            let mut buffer = this.buffer.take().unwrap_or_else(lend);
            let read = Pin::new(&mut this.inner).poll_read(cx, &mut buffer);
            let Poll::Ready(Ok(count)) = read else {
                give_back(buffer);
                return read;
            };
            (this.buffer, this.at, this.end) = (Some(buffer), 0, count);
        }
        let there = this.buffer.as_deref().unwrap_or_default().get(this.at..this.end).unwrap_or_default();
        let count = there.len().min(target.len());
        target[..count].copy_from_slice(&there[..count]);
        this.at += count;
        Poll::Ready(Ok(count))
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Ahead<C> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use futures::{AsyncReadExt as _, AsyncWriteExt as _, FutureExt as _, TryStreamExt as _, stream};
    use proptest::prelude::*;

    use super::*;
    use crate::tunnel::tests::wire::Wire;

    /// Gives these pieces, one at a time.
    fn source(pieces: Vec<Vec<u8>>) -> Ahead<impl AsyncRead + Unpin> {
        Ahead::new(stream::iter(pieces.into_iter().map(io::Result::Ok)).into_async_read())
    }

    proptest! {
        #[test]
        fn everything_comes_in_order(
            pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..70_000), 0..6),
            wanted in proptest::collection::vec(1..70_000usize, 1..6),
        ) {
            let expected = pieces.concat();
            let (mut source, mut got) = (source(pieces), Vec::new());
            for wanted in wanted.into_iter().cycle() {
                let mut target = vec![0; wanted];
                let count = source.read(&mut target).now_or_never().expect("it never waits").unwrap();
                if count == 0 {
                    break;
                }
                got.extend_from_slice(&target[..count]);
            }
            prop_assert!(got == expected);
        }
    }

    #[tokio::test]
    async fn one_that_waits_holds_no_buffer() {
        let (near, mut far) = Wire::pair();
        let mut near = Ahead::new(near);
        far.write_all(&[7; 100]).await.unwrap();
        let mut target = [0; 60];
        assert_eq!(near.read(&mut target).await.unwrap(), 60);
        assert!(near.buffer.is_some());
        assert_eq!(near.read(&mut target).await.unwrap(), 40);
        assert!(near.read(&mut target).now_or_never().is_none());
        assert!(near.buffer.is_none());
    }
}
