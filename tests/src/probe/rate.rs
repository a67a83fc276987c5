//! How much in a time: the bytes of one connection, the connections of many clients.

use std::io;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;

use super::client::{PAYLOAD, connect_async};
use super::message::{Dial, Failure, Rate};

/// Bytes taken from a socket at once, at most.
const PIECE: usize = 256 * 1024;

/// Receives for `warm_up`, then counts the bytes that come in `length`.
pub(super) async fn drain(dial: Dial, warm_up: Duration, length: Duration) -> Result<Rate, Failure> {
    let what = format!("receive from {}", dial.target);
    let (mut stream, ..) = connect_async(dial).await?;
    let receive = async {
        let mut buffer = vec![0; PIECE];
        let mut begin = Instant::now();
        let (mut warm, mut count) = (false, 0);
        loop {
            let received = stream.read(&mut buffer).await?;
            if received == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let took = begin.elapsed();
            if warm {
                count += received as u64;
                if took >= length {
                    // So that no port waits in TIME_WAIT.
                    return stream.set_zero_linger().map(|()| Rate { count, took });
                }
            } else if took >= warm_up {
                (warm, begin) = (true, Instant::now());
            }
        }
    };
    bounded(&what, warm_up.saturating_add(length).saturating_add(dial.deadline), receive).await
}

/// Has `clients` make connections for `length`, each with a request and its answer; counts them.
pub(super) async fn turnover(dial: Dial, clients: u32, length: Duration) -> Result<Rate, Failure> {
    let begin = Instant::now();
    let mut working = JoinSet::new();
    for _ in 0..clients {
        working.spawn(async move {
            let mut count = 0_u64;
            while begin.elapsed() < length {
                exchange(dial).await?;
                count += 1;
            }
            Ok::<_, Failure>(count)
        });
    }
    let mut count = 0;
    while let Some(worked) = working.join_next().await {
        count += worked.map_err(|error| Failure::other(error.to_string()))??;
    }
    Ok(Rate { count, took: begin.elapsed() })
}

/// A connection, a request and its answer; closed by a reset.
async fn exchange(dial: Dial) -> Result<(), Failure> {
    let what = format!("exchange a message with {}", dial.target);
    let (mut stream, ..) = connect_async(dial).await?;
    let mut echo = [0; PAYLOAD.len()];
    let talk = async {
        stream.write_all(PAYLOAD.as_bytes()).await?;
        stream.read_exact(&mut echo).await?;
        stream.set_zero_linger()
    };
    bounded(&what, dial.deadline, talk).await?;
    if echo == PAYLOAD.as_bytes() { Ok(()) } else { Err(Failure::other(format!("{} does not echo", dial.target))) }
}

async fn bounded<T>(what: &str, deadline: Duration, step: impl Future<Output = io::Result<T>>) -> Result<T, Failure> {
    match tokio::time::timeout(deadline, step).await {
        Ok(outcome) => outcome.map_err(|error| Failure::from_io(what, &error)),
        Err(_) => Err(Failure::timed_out(what)),
    }
}
