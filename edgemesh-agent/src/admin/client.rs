//! The command line's side of the unix socket.

use std::{
    io,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, header::HOST};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// How long the agent may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// More than 10,000 Services with their counters need.
const MAX_ANSWER: usize = 64 << 20;
/// More than any line of a stream has.
const MAX_LINE: usize = 64 << 10;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "cannot reach the agent on {}: {error}; is it running on this node, and are you root? (--socket names another socket)",
        path.display()
    )]
    Unreachable { path: PathBuf, error: io::Error },
    #[error("the agent on {} did not answer within {DEADLINE:?}", path.display())]
    Silent { path: PathBuf },
    #[error("the agent on {} broke off: {error}", path.display())]
    Broken { path: PathBuf, error: String },
    /// The question is wrong or of two meanings, in the agent's own words.
    #[error("{0}")]
    Question(String),
    /// The agent's own words.
    #[error("{0}")]
    Refused(String),
}

/// Asks the agent at `socket` for `path` and returns the body of its answer.
///
/// # Errors
///
/// See [`ClientError`].
pub async fn get(socket: &Path, path: &str) -> Result<Bytes, ClientError> {
    let silent = || ClientError::Silent { path: socket.to_owned() };
    let (status, body) = tokio::time::timeout(DEADLINE, exchange(socket, path)).await.map_err(|_| silent())??;
    if status == StatusCode::OK {
        return Ok(body);
    }
    Err(refusal(status, &body))
}

fn refusal(status: StatusCode, body: &[u8]) -> ClientError {
    let words = String::from_utf8_lossy(body).trim_end().to_owned();
    if status == StatusCode::BAD_REQUEST { ClientError::Question(words) } else { ClientError::Refused(words) }
}

/// Asks the agent at `socket` for `path` and hands over its answer line by line, as it comes, until it ends or `take` has
/// enough.
///
/// # Errors
///
/// See [`ClientError`].
pub async fn stream(
    socket: &Path,
    path: &str,
    mut take: impl FnMut(&[u8]) -> ControlFlow<()>,
) -> Result<(), ClientError> {
    let silent = || ClientError::Silent { path: socket.to_owned() };
    let broken = |error: String| ClientError::Broken { path: socket.to_owned(), error };
    let (mut sender, connection) = tokio::time::timeout(DEADLINE, connect(socket)).await.map_err(|_| silent())??;
    let answer = async {
        let response = tokio::time::timeout(DEADLINE, sender.send_request(request(path).map_err(broken)?)).await;
        let response = response.map_err(|_| silent())?.map_err(|error| broken(error.to_string()))?;
        let (status, mut body) = (response.status(), response.into_body());
        if status != StatusCode::OK {
            let body = Limited::new(body, MAX_ANSWER).collect().await.map_err(|error| broken(error.to_string()))?;
            return Err(refusal(status, &body.to_bytes()));
        }
        let mut rest = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(|error| broken(error.to_string()))?.into_data() else { continue };
            rest.extend_from_slice(&data);
            let Some(end) = rest.iter().rposition(|byte| *byte == b'\n') else {
                if rest.len() > MAX_LINE {
                    return Err(broken("it sent a line without an end".to_owned()));
                }
                continue;
            };
            let whole: Vec<u8> = rest.drain(..=end).collect();
            let mut lines = whole.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
            if lines.try_for_each(&mut take).is_break() {
                return Ok(());
            }
        }
        Ok(())
    };
    drive(connection, answer).await
}

type Connection = hyper::client::conn::http1::Connection<TokioIo<UnixStream>, Empty<Bytes>>;

async fn connect(
    socket: &Path,
) -> Result<(hyper::client::conn::http1::SendRequest<Empty<Bytes>>, Connection), ClientError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|error| ClientError::Unreachable { path: socket.to_owned(), error })?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    handshake.map_err(|error| ClientError::Broken { path: socket.to_owned(), error: error.to_string() })
}

fn request(path: &str) -> Result<Request<Empty<Bytes>>, String> {
    let request = Request::get(path).header(HOST, "edgemesh-agent").body(Empty::<Bytes>::new());
    request.map_err(|error| error.to_string())
}

/// The connection's future moves the bytes; the answer is complete before it ends.
async fn drive<T>(connection: Connection, answer: impl Future<Output = T>) -> T {
    let (mut connection, mut answer) = (std::pin::pin!(connection), std::pin::pin!(answer));
    tokio::select! {
        answer = answer.as_mut() => answer,
        _ = connection.as_mut() => answer.await,
    }
}

async fn exchange(socket: &Path, path: &str) -> Result<(StatusCode, Bytes), ClientError> {
    let broken = |error: String| ClientError::Broken { path: socket.to_owned(), error };
    let (mut sender, connection) = connect(socket).await?;
    let request = request(path).map_err(broken)?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|error| broken(error.to_string()))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|e| broken(e.to_string()))?;
        Ok((status, body.to_bytes()))
    };
    drive(connection, answer).await
}
