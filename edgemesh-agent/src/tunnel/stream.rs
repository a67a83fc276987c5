//! One flow over the tunnel, as the two ends of it see it.
//!
//! After request and answer, a stream carries frames: a length of two bytes, big endian, then that many bytes. For UDP a
//! frame is a datagram. For TCP it is a piece of the byte stream, and an empty one is the end of a direction.
//!
//! TCP has frames too because neither yamux nor libp2p's QUIC streams tell a reset from an end when they are read, and a
//! connection that was cut must not look like one that was finished. A frame costs 2 bytes in up to 64 KiB and no copy.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures::{AsyncRead as _, AsyncWrite as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    paths::{Path, PathKind, Permit},
    substream::Substream,
};

/// Bytes of a frame's length.
pub(super) const HEADER: usize = 2;

/// Longest frame with its header; one thread reads and writes through one such buffer.
pub(super) const MAX_FRAME: usize = HEADER + u16::MAX as usize;

/// A frame of TCP that is full, with its header: what yamux sends in pieces of 16 KiB (`DEFAULT_SPLIT_SEND_SIZE`) fills four
/// of them to the last byte.
pub(super) const FULL_FRAME: usize = 4 * (16 << 10);

/// Largest payload of a datagram over IPv4 and IPv6, without jumbograms.
pub const MAX_DATAGRAM: usize = 65_507;

thread_local! {
    /// What passes through a thread at this moment. Streams that wait have no buffers of their own, so thousands of them
    /// cost little.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; MAX_FRAME].into());
}

/// Runs `work` with this thread's buffer; it must not be used within itself.
pub(super) fn with_scratch<R>(work: impl FnOnce(&mut [u8]) -> R) -> R {
    SCRATCH.with(|scratch| match scratch.try_borrow_mut() {
        Ok(mut scratch) => work(&mut scratch),
        Err(_) => work(&mut vec![0; MAX_FRAME]),
    })
}

/// The raw stream, with what both kinds of flow need to write frames.
pub(super) struct Frames {
    inner: Substream,
    path: Arc<Path>,
    /// Its place among the streams that may be open; `None` on the side that serves, which counts elsewhere.
    _permit: Option<Permit>,
    /// A frame that is not wholly written, and how far it is.
    unsent: Vec<u8>,
    sent: usize,
    header: [u8; HEADER],
    header_len: usize,
    /// Bytes of the current frame that have not been read.
    remaining: usize,
}

impl Frames {
    pub(super) fn new(inner: Substream, path: Arc<Path>, permit: Option<Permit>) -> Self {
        path.stream_began();
        Self {
            inner,
            path,
            _permit: permit,
            unsent: Vec::new(),
            sent: 0,
            header: [0; HEADER],
            header_len: 0,
            remaining: 0,
        }
    }

    /// Ready when a frame can be taken: nothing is left of the one before.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.unsent.len() {
            match ready!(Pin::new(&mut self.inner).poll_write(cx, &self.unsent[self.sent..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.sent += count,
            }
        }
        // A stream that waits for its application holds no memory.
        self.unsent = Vec::new();
        self.sent = 0;
        Poll::Ready(Ok(()))
    }

    /// Takes a frame, header included, of which the payload is already in its place. Only after [`Self::poll_drain`].
    fn put(&mut self, cx: &mut Context<'_>, frame: &mut [u8]) -> io::Result<()> {
        debug_assert!(self.unsent.is_empty());
        let payload = frame.len() - HEADER;
        frame[..HEADER].copy_from_slice(&u16::try_from(payload).unwrap_or(u16::MAX).to_be_bytes());
        let mut sent = 0;
        while sent < frame.len() {
            match Pin::new(&mut self.inner).poll_write(cx, &frame[sent..]) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(count)) => sent += count,
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => {
                    self.unsent = frame[sent..].to_vec();
                    break;
                }
            }
        }
        self.path.sent(payload);
        Ok(())
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    /// Reads to the next frame's length, which it leaves in `remaining`. `false`: the stream ended between frames.
    fn poll_header(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        while self.header_len < HEADER {
            let header = &mut self.header[self.header_len..];
            match ready!(Pin::new(&mut self.inner).poll_read(cx, header))? {
                0 if self.header_len == 0 => return Poll::Ready(Ok(false)),
                0 => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                count => self.header_len += count,
            }
        }
        self.header_len = 0;
        self.remaining = usize::from(u16::from_be_bytes(self.header));
        Poll::Ready(Ok(true))
    }

    /// Reads some of the current frame.
    fn poll_payload(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let most = self.remaining.min(buffer.len());
        let count = ready!(Pin::new(&mut self.inner).poll_read(cx, &mut buffer[..most]))?;
        if count == 0 {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        self.remaining -= count;
        self.path.received(count);
        Poll::Ready(Ok(count))
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        self.path.stream_ended();
    }
}

/// A TCP connection over the tunnel, connected at the far side.
///
/// Half-closes: [`AsyncWrite::poll_shutdown`] ends one direction, and the far side's end is read as `Ok(0)`. A connection
/// that was reset, or whose tunnel was lost, is read as [`io::ErrorKind::ConnectionReset`]; a stream that is dropped before
/// both directions have ended resets the connection at the far side.
pub struct Stream {
    frames: Frames,
    finished: bool,
    ended: bool,
}

impl Stream {
    pub(super) fn new(frames: Frames) -> Self {
        Self { frames, finished: false, ended: false }
    }

    /// The path it takes, for as long as it lasts: what opens later may take a better one.
    pub fn path(&self) -> PathKind {
        self.frames.path.kind()
    }

    /// Ready when [`Self::put`] may be called.
    pub(super) fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.frames.poll_drain(cx)
    }

    /// Whether it waits for the far side to take a frame.
    pub(super) fn is_full(&self) -> bool {
        !self.frames.unsent.is_empty()
    }

    /// How much of that frame has gone.
    pub(super) fn drained(&self) -> usize {
        self.frames.sent
    }

    /// Looks whether the far side has given the connection up, without reading what it sent before. As long as this side
    /// has not ended its direction the far side cannot be done, and its stream ends by a reset alone; afterwards one
    /// cannot tell.
    ///
    /// # Errors
    ///
    /// It has, or the tunnel was lost.
    pub(super) fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.finished { Ok(()) } else { self.frames.inner.check(cx) }
    }

    /// Sends a frame whose payload stands after [`HEADER`] bytes of room; not an empty one.
    pub(super) fn put(&mut self, cx: &mut Context<'_>, frame: &mut [u8]) -> io::Result<()> {
        self.frames.put(cx, frame)
    }

    /// Reads into `buffer`; 0 is the end that the far side meant.
    pub(super) fn poll_get(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        if buffer.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if self.ended {
            return self.poll_done(cx).map(|()| Ok(0));
        }
        if self.frames.remaining == 0 {
            if !ready!(self.frames.poll_header(cx))? {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            if self.frames.remaining == 0 {
                self.ended = true;
                return self.poll_done(cx).map(|()| Ok(0));
            }
        }
        self.frames.poll_payload(cx, buffer)
    }

    /// Closes the stream below once both directions have ended, so that dropping it resets nothing. Not before: yamux tells
    /// the peer nothing of a stream that is dropped when it is closed already, and a peer that waits for room would wait
    /// for ever.
    fn poll_done(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.finished && self.ended {
            // Nothing is left that could be lost.
            let _ = ready!(Pin::new(&mut self.frames.inner).poll_close(cx));
        }
        Poll::Ready(())
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let count = ready!(self.poll_get(cx, buf.initialize_unfilled()))?;
        buf.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.frames.poll_drain(cx))?;
        with_scratch(|scratch| {
            let count = data.len().min(FULL_FRAME - HEADER);
            scratch[HEADER..HEADER + count].copy_from_slice(&data[..count]);
            self.frames.put(cx, &mut scratch[..HEADER + count])?;
            Poll::Ready(Ok(count))
        })
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.frames.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.finished {
            ready!(self.frames.poll_drain(cx))?;
            self.frames.put(cx, &mut [0; HEADER])?;
            self.finished = true;
        }
        ready!(self.frames.poll_flush(cx))?;
        self.poll_done(cx).map(Ok)
    }
}

/// A UDP flow over the tunnel, from a socket of its own at the far side.
///
/// Each datagram arrives whole and alone, or not at all: what the far side's socket or a slow receiver has no room for is
/// lost, as with UDP. The far side ends the flow when it has been idle.
pub struct DatagramStream {
    frames: Frames,
    /// Whether a header has been read whose datagram is not complete.
    within: bool,
    datagram: Vec<u8>,
}

impl DatagramStream {
    pub(super) fn new(frames: Frames) -> Self {
        Self { frames, within: false, datagram: Vec::new() }
    }

    /// The path it takes, for as long as it lasts.
    pub fn path(&self) -> PathKind {
        self.frames.path.kind()
    }

    /// Ready when a datagram can be sent without waiting.
    pub(super) fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.frames.poll_drain(cx)
    }

    /// Sends a datagram that stands after [`HEADER`] bytes of room. Only after [`Self::poll_drain`].
    pub(super) fn put(&mut self, cx: &mut Context<'_>, frame: &mut [u8]) -> io::Result<()> {
        self.frames.put(cx, frame)
    }

    /// Sends a datagram, waiting for room.
    ///
    /// # Errors
    ///
    /// The datagram is longer than [`MAX_DATAGRAM`], or the flow has ended.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, datagram: &[u8]) -> Poll<io::Result<()>> {
        if datagram.len() > MAX_DATAGRAM {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "datagram is longer than 65507 bytes",
            )));
        }
        ready!(self.frames.poll_drain(cx))?;
        with_scratch(|scratch| {
            scratch[HEADER..HEADER + datagram.len()].copy_from_slice(datagram);
            self.frames.put(cx, &mut scratch[..HEADER + datagram.len()])
        })?;
        Poll::Ready(Ok(()))
    }

    /// Has everything that was sent leave this node, as far as the far side lets it.
    ///
    /// # Errors
    ///
    /// The flow has ended.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.frames.poll_flush(cx)
    }

    /// Receives a datagram into `buffer`, which it replaces; `false` when the flow has ended.
    ///
    /// # Errors
    ///
    /// The tunnel was lost.
    pub fn poll_recv(&mut self, cx: &mut Context<'_>, buffer: &mut Vec<u8>) -> Poll<io::Result<bool>> {
        if !self.within {
            if !ready!(self.frames.poll_header(cx))? {
                return Poll::Ready(Ok(false));
            }
            self.within = true;
        }
        while self.frames.remaining > 0 {
            let Self { frames, datagram, .. } = self;
            let count = ready!(with_scratch(|scratch| {
                let count = ready!(frames.poll_payload(cx, scratch))?;
                datagram.extend_from_slice(&scratch[..count]);
                Poll::Ready(io::Result::Ok(count))
            }))?;
            debug_assert!(count > 0);
        }
        self.within = false;
        buffer.clear();
        buffer.append(&mut self.datagram);
        self.datagram = Vec::new();
        Poll::Ready(Ok(true))
    }

    /// Sends a datagram; see [`Self::poll_send`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        std::future::poll_fn(|cx| self.poll_send(cx, datagram)).await?;
        std::future::poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Receives a datagram; see [`Self::poll_recv`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn recv(&mut self, buffer: &mut Vec<u8>) -> io::Result<bool> {
        std::future::poll_fn(|cx| self.poll_recv(cx, buffer)).await
    }
}
