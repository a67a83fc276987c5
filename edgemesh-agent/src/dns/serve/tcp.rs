//! TCP (RFC 7766): many queries on one connection, answered as soon as each can be, in whichever order that is (6.2.1.1
//! and 7).
//!
//! Those that wait for upstreams do not keep others from being read: a connection carries what all of a pod asks, and names
//! of the cluster are answered whatever becomes of the world outside. How many may wait is a matter of the client
//! ([`Limits::waiting`](super::Limits::waiting)) and not of its connections; more are told SERVFAIL, as by UDP.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep_until, timeout},
};
use tracing::debug;

use super::{Core, From, Handled, Transport};
use crate::{
    dns::{stats::Counters, wire::MAX_TCP},
    lifecycle::Tasks,
    net::crowd::Crowd,
};

/// How many connections there may be.
const CONNECTIONS: usize = 512;
/// How many of them one client may have.
const CONNECTIONS_OF_ONE: usize = 64;
/// How long a connection may be silent, or take over one query.
const IDLE: Duration = Duration::from_secs(10);
/// How long a client may take to make room for answers.
const WRITE_DEADLINE: Duration = Duration::from_secs(5);
/// The longest query that is read.
const MAX_QUERY: usize = 4096;
/// From so many bytes of answers on they are sent before more queries are looked at.
const FLUSH: usize = 16 << 10;
/// Out of descriptors, accept fails at once and for ever.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves connections until the agent stops.
pub(super) async fn serve(listener: TcpListener, core: Arc<Core>, counters: Arc<[Counters]>, tasks: Tasks) {
    let (stop, places, crowd) =
        (tasks.stopping(), Arc::new(Semaphore::new(CONNECTIONS)), Crowd::new(CONNECTIONS_OF_ONE));
    loop {
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await.map_err(io::Error::other)?;
            Ok::<_, io::Error>((listener.accept().await?, place))
        };
        let ((stream, client), place) = tokio::select! {
            () = stop.cancelled() => return,
            accepted = next => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    debug!("cannot accept a DNS connection: {error}");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
        };
        let Some(seat) = crowd.seat(client.ip()) else {
            debug!(%client, "a DNS connection was refused: its client has {CONNECTIONS_OF_ONE}");
            continue;
        };
        let (core, counters, stop) = (Arc::clone(&core), Arc::clone(&counters), stop.clone());
        tasks.spawn(async move {
            let _held = (place, seat);
            tokio::select! {
                () = stop.cancelled() => {}
                ended = converse(stream, client, &core, &counters) => if let Err(error) = ended {
                    debug!(%client, "a DNS connection ended early: {error}");
                },
            }
        });
    }
}

async fn converse(stream: TcpStream, client: SocketAddr, core: &Core, counters: &[Counters]) -> io::Result<()> {
    // The last ones are those of the thread that all connections share.
    let Some(counters) = counters.last() else { return Ok(()) };
    stream.set_nodelay(true)?;
    let (mut reading, mut writing) = stream.into_split();
    let mut incoming = Vec::with_capacity(2 + MAX_QUERY);
    let (mut outgoing, mut room) = (Vec::new(), vec![0; MAX_TCP]);
    let mut waiting = FuturesUnordered::new();
    let mut open = true;
    let mut deadline = tokio::time::Instant::now() + IDLE;
    loop {
        while outgoing.len() < FLUSH
            && let Some((length, message)) = frame(&incoming)?
        {
            let from = From { client: client.ip(), transport: Transport::Tcp, received: Instant::now(), counters };
            let zone = core.zone();
            match core.handle(message, &from, zone.as_deref(), &mut room) {
                Handled::Ignored => {}
                Handled::Answered(length, origin) => {
                    push(&mut outgoing, room.get(..length).unwrap_or_default());
                    counters.took(origin, 1, from.received.elapsed());
                }
                Handled::Waits(query) => waiting.push(query.answer(core, counters)),
            }
            incoming.drain(..2 + length);
            deadline = tokio::time::Instant::now() + IDLE;
        }
        if !outgoing.is_empty() {
            timeout(WRITE_DEADLINE, writing.write_all(&outgoing)).await??;
            outgoing.clear();
            // A large answer is rare, and a connection may be idle for long.
            outgoing.shrink_to(FLUSH);
            continue;
        }
        if !open && waiting.is_empty() {
            return Ok(());
        }
        tokio::select! {
            Some(answer) = waiting.next(), if !waiting.is_empty() => {
                push(&mut outgoing, &answer);
                deadline = tokio::time::Instant::now() + IDLE;
            }
            read = reading.read_buf(&mut incoming), if open => open = read? > 0,
            () = sleep_until(deadline), if waiting.is_empty() => return Ok(()),
        }
    }
}

/// The first whole message, with its length.
fn frame(incoming: &[u8]) -> io::Result<Option<(usize, &[u8])>> {
    let Some((head, rest)) = incoming.split_first_chunk::<2>() else { return Ok(None) };
    let length = usize::from(u16::from_be_bytes(*head));
    if length > MAX_QUERY {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a query of {length} bytes")));
    }
    Ok(rest.get(..length).map(|message| (length, message)))
}

fn push(outgoing: &mut Vec<u8>, message: &[u8]) {
    if let Some(length) = u16::try_from(message.len()).ok().filter(|length| *length > 0) {
        outgoing.extend_from_slice(&length.to_be_bytes());
        outgoing.extend_from_slice(message);
    }
}
