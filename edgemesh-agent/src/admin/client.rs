//! The command line's side of the unix socket.

use std::{
    io,
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

async fn exchange(socket: &Path, path: &str) -> Result<(StatusCode, Bytes), ClientError> {
    let broken = |error: String| ClientError::Broken { path: socket.to_owned(), error };
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|error| ClientError::Unreachable { path: socket.to_owned(), error })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(e.to_string()))?;
    let request = Request::get(path)
        .header(HOST, "edgemesh-agent")
        .body(Empty::<Bytes>::new())
        .map_err(|error| broken(error.to_string()))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|error| broken(error.to_string()))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|e| broken(e.to_string()))?;
        Ok((status, body.to_bytes()))
    };
    // The connection's future moves the bytes; the answer is complete before it ends.
    let mut connection = std::pin::pin!(connection);
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        answer = answer.as_mut() => answer,
        _ = connection.as_mut() => answer.await,
    }
}
