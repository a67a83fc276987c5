//! Passing bytes on between two connections, both ways at once.
//!
//! A direction holds a buffer only while there is something in it: of ten thousand connections most are silent most of
//! the time. Each direction ends by itself, so a side that has sent all it has may still listen.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::counters::add;

/// As much of a connection as is read at once, and held at most for each direction.
pub(super) const BUFFER: usize = 32 << 10;
/// How many buffers are kept for the next who needs one.
const SPARE: usize = 64;

/// Buffers of one size that nobody needs now.
#[derive(Clone, Debug)]
pub(super) struct Buffers {
    size: usize,
    spare: Arc<Mutex<Vec<Box<[u8]>>>>,
}

impl Buffers {
    pub(super) fn new(size: usize) -> Self {
        Self { size, spare: Arc::default() }
    }

    pub(super) fn take(&self) -> Lent<'_> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Lent { bytes: spare.unwrap_or_else(|| vec![0; self.size].into_boxed_slice()), buffers: self }
    }
}

/// A buffer, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Lent<'a> {
    pub(super) bytes: Box<[u8]>,
    buffers: &'a Buffers,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut spare = self.buffers.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE {
            spare.push(std::mem::take(&mut self.bytes));
        }
    }
}

/// Which side failed.
#[derive(Debug)]
pub(super) enum Broken {
    Near(io::Error),
    Far(io::Error),
}

/// Passes on until both directions have ended.
///
/// # Errors
///
/// One side failed or was reset; the other one is as it was.
pub(super) async fn both_ways<A, B>(
    near: &mut A,
    far: &mut B,
    buffers: &Buffers,
    (out_bytes, in_bytes): (&AtomicU64, &AtomicU64),
) -> Result<(), Broken>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let (mut there, mut back) = (Pump::new(buffers, out_bytes), Pump::new(buffers, in_bytes));
    poll_fn(|cx| {
        let there = there.poll(cx, near, far).map_err(|fault| match fault {
            Fault::Reading(error) => Broken::Near(error),
            Fault::Writing(error) => Broken::Far(error),
        })?;
        let back = back.poll(cx, far, near).map_err(|fault| match fault {
            Fault::Reading(error) => Broken::Far(error),
            Fault::Writing(error) => Broken::Near(error),
        })?;
        if there.is_ready() && back.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await
}

enum Fault {
    Reading(io::Error),
    Writing(io::Error),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    Open,
    /// Everything has been read, and the end is to be passed on.
    Ending,
    Ended,
}

/// One direction.
struct Pump<'a> {
    buffers: &'a Buffers,
    passed: &'a AtomicU64,
    buffer: Option<Lent<'a>>,
    /// What of the buffer is still to be written.
    from: usize,
    to: usize,
    /// Something was written that may not have gone out yet.
    unflushed: bool,
    stage: Stage,
}

impl<'a> Pump<'a> {
    fn new(buffers: &'a Buffers, passed: &'a AtomicU64) -> Self {
        Self { buffers, passed, buffer: None, from: 0, to: 0, unflushed: false, stage: Stage::Open }
    }

    fn poll<R, W>(&mut self, cx: &mut Context<'_>, reader: &mut R, writer: &mut W) -> Poll<Result<(), Fault>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            if let Some(rest) = self.buffer.as_ref().and_then(|lent| lent.bytes.get(self.from..self.to))
                && !rest.is_empty()
            {
                let written = ready!(Pin::new(&mut *writer).poll_write(cx, rest)).map_err(Fault::Writing)?;
                if written == 0 {
                    return Poll::Ready(Err(Fault::Writing(io::ErrorKind::WriteZero.into())));
                }
                self.from += written;
                self.unflushed = true;
                add(self.passed, written as u64);
                continue;
            }
            match self.stage {
                Stage::Open => match self.fill(cx, reader) {
                    Poll::Ready(Ok(0)) => self.stage = Stage::Ending,
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(Fault::Reading(error))),
                    Poll::Pending => {
                        if self.unflushed {
                            ready!(Pin::new(&mut *writer).poll_flush(cx)).map_err(Fault::Writing)?;
                            self.unflushed = false;
                        }
                        return Poll::Pending;
                    }
                },
                Stage::Ending => {
                    match ready!(Pin::new(&mut *writer).poll_shutdown(cx)) {
                        // It has ended already, by itself.
                        Err(error) if error.kind() != io::ErrorKind::NotConnected => {
                            return Poll::Ready(Err(Fault::Writing(error)));
                        }
                        _ => self.stage = Stage::Ended,
                    }
                }
                Stage::Ended => return Poll::Ready(Ok(())),
            }
        }
    }

    fn fill<R: AsyncRead + Unpin>(&mut self, cx: &mut Context<'_>, reader: &mut R) -> Poll<io::Result<usize>> {
        let mut lent = self.buffer.take().unwrap_or_else(|| self.buffers.take());
        let mut read = ReadBuf::new(&mut lent.bytes);
        let polled = Pin::new(reader).poll_read(cx, &mut read).map_ok(|()| read.filled().len());
        (self.from, self.to) = (0, 0);
        if let Poll::Ready(Ok(length)) = polled
            && length > 0
        {
            self.to = length;
            self.buffer = Some(lent);
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::Ordering, time::Duration};

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn bytes_go_both_ways_and_one_end_of_writing_leaves_the_other_direction_open() {
        let ((mut client, mut near), (mut far, mut pod)) = (duplex(1 << 10), duplex(1 << 10));
        let (out, back) = (AtomicU64::new(0), AtomicU64::new(0));
        let buffers = Buffers::new(BUFFER);
        let carry = both_ways(&mut near, &mut far, &buffers, (&out, &back));
        let ends = async {
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut asked = String::new();
            pod.read_to_string(&mut asked).await.unwrap();
            assert_eq!(asked, "question", "and then its end");
            let answer = vec![7; 100_000];
            let reply = async {
                pod.write_all(&answer).await.unwrap();
                pod.shutdown().await.unwrap();
            };
            let mut answered = Vec::new();
            let (_, length) = tokio::join!(reply, client.read_to_end(&mut answered));
            assert_eq!((length.unwrap(), answered.len()), (100_000, 100_000));
        };
        let (carried, ()) = tokio::join!(carry, ends);
        carried.unwrap();
        assert_eq!((out.load(Ordering::Relaxed), back.load(Ordering::Relaxed)), (8, 100_000));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_holds_no_buffer() {
        let ((mut client, mut near), (mut far, _pod)) = (duplex(64), duplex(64));
        let (out, back) = (AtomicU64::new(0), AtomicU64::new(0));
        let buffers = Buffers::new(BUFFER);
        let mut carry = Box::pin(both_ways(&mut near, &mut far, &buffers, (&out, &back)));
        let spare = || buffers.spare.lock().unwrap().len();
        client.write_all(&[1; 32]).await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(1), &mut carry).await.is_err());
        assert_eq!(spare(), 1, "one buffer serves both directions, one after the other");
        // More than the other side takes: what is stuck is kept, and no more than that.
        client.write_all(&[1; 64]).await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(1), &mut carry).await.is_err());
        let more = client.write_all(&[1; 64]);
        assert!(
            tokio::time::timeout(Duration::from_millis(1), async { tokio::join!(&mut carry, more) }).await.is_err()
        );
        drop(carry);
        assert!(spare() <= 2);
    }

    /// Fails after so many bytes.
    struct Failing;

    impl AsyncRead for Failing {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
        }
    }

    impl AsyncWrite for Failing {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(bytes.len()))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn the_side_that_was_reset_is_named_and_the_other_is_not_shut_down() {
        let (mut client, mut near) = duplex(64);
        let (out, back) = (AtomicU64::new(0), AtomicU64::new(0));
        let result = both_ways(&mut near, &mut Failing, &Buffers::new(BUFFER), (&out, &back)).await;
        assert!(matches!(result, Err(Broken::Far(error)) if error.kind() == io::ErrorKind::ConnectionReset));
        client.write_all(b"still open").await.unwrap();
        let result = both_ways(&mut Failing, &mut near, &Buffers::new(BUFFER), (&out, &back)).await;
        assert!(matches!(result, Err(Broken::Near(_))));
    }
}
