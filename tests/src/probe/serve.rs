//! The servers of the lab: each tells its name and the address it sees its client at.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use futures::{SinkExt as _, StreamExt as _};
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;

use super::message::{App, Failure};

/// Bytes of datagrams that may wait for a server.
const CROWD: usize = 8 << 20;

/// A bound server that does not serve yet.
pub(super) enum Server {
    Stream(TcpListener, App, Arc<str>),
    Datagram(UdpSocket, Arc<str>),
}

impl Server {
    /// Binds `listen`.
    pub(super) async fn bind(name: &str, app: App, listen: SocketAddr) -> Result<Self, Failure> {
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(Failure::other(format!("{name:?} is no name for a server: it may not hold white space")));
        }
        let failed = |error: std::io::Error| Failure::from_io(&format!("listen on {listen}"), &error);
        match app {
            App::Udp => {
                let socket = UdpSocket::bind(listen).await.map_err(failed)?;
                // A crowd that asks at once is not to fail for want of room in a server of the lab; root may have it.
                let _ = setsockopt(&socket, RcvBufForce, &CROWD);
                Ok(Self::Datagram(socket, name.into()))
            }
            App::Tcp | App::Http | App::WebSocket | App::Count | App::Reset | App::Echo | App::Source => {
                Ok(Self::Stream(TcpListener::bind(listen).await.map_err(failed)?, app, name.into()))
            }
        }
    }

    /// The address that was bound.
    pub(super) fn address(&self) -> Result<SocketAddr, Failure> {
        match self {
            Self::Stream(listener, ..) => listener.local_addr(),
            Self::Datagram(socket, _) => socket.local_addr(),
        }
        .map_err(|error| Failure::from_io("read the address of a listener", &error))
    }

    /// Serves until dropped; dropping closes all connections.
    pub(super) async fn run(self) {
        match self {
            Self::Stream(listener, app, name) => serve_streams(&listener, app, &name).await,
            Self::Datagram(socket, name) => serve_datagrams(&socket, &name).await,
        }
    }
}

async fn serve_streams(listener: &TcpListener, app: App, name: &Arc<str>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                // A client that was gone before it was accepted is its own affair.
                let Ok((stream, client)) = accepted else { continue };
                let name = Arc::clone(name);
                connections.spawn(async move {
                    match app {
                        App::Http => serve_http(stream, client, &name).await,
                        App::WebSocket => serve_websocket(stream, client, &name).await,
                        App::Count => serve_count(stream, client, &name).await,
                        App::Reset => serve_reset(stream, client, &name).await,
                        App::Echo => echo(stream).await,
                        App::Source => serve_source(stream).await,
                        App::Tcp | App::Udp => serve_echo(stream, client, &name).await,
                    }
                });
            }
            // Reaps what has ended, so that a long load does not pile up.
            Some(_) = connections.join_next() => {}
        }
    }
}

// The servers below end with the connection, whichever way it ends: the client is the one who judges.

async fn serve_echo(mut stream: TcpStream, client: SocketAddr, name: &str) {
    if stream.write_all(format!("{name} {client}\n").as_bytes()).await.is_ok() {
        echo(stream).await;
    }
}

async fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0_u8; 65_536];
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        if stream.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

async fn serve_count(mut stream: TcpStream, client: SocketAddr, name: &str) {
    if stream.write_all(format!("{name} {client}\n").as_bytes()).await.is_err() {
        return;
    }
    if let Ok(heard) = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await {
        let _ = stream.write_all(heard.to_string().as_bytes()).await;
    }
}

async fn serve_reset(mut stream: TcpStream, client: SocketAddr, name: &str) {
    if stream.write_all(format!("{name} {client}\n").as_bytes()).await.is_ok() && stream.read_u8().await.is_ok() {
        let _ = stream.set_zero_linger();
    }
}

async fn serve_source(mut stream: TcpStream) {
    let piece = vec![b's'; 65_536];
    while stream.write_all(&piece).await.is_ok() {}
}

async fn serve_http(stream: TcpStream, client: SocketAddr, name: &str) {
    let answer = Bytes::from(format!("{name} {client}\n"));
    let service = service_fn(|_| {
        let response = hyper::Response::new(Full::new(answer.clone()));
        async { Ok::<_, Infallible>(response) }
    });
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn serve_websocket(stream: TcpStream, client: SocketAddr, name: &str) {
    // The greeting follows the upgrade at once, and would wait for the client's kernel to acknowledge that.
    let _ = stream.set_nodelay(true);
    let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else { return };
    if socket.send(Message::text(format!("{name} {client}"))).await.is_err() {
        return;
    }
    while let Some(Ok(message)) = socket.next().await {
        let echo = message.is_text() || message.is_binary();
        if echo && socket.send(message).await.is_err() {
            return;
        }
    }
}

async fn serve_datagrams(socket: &UdpSocket, name: &str) {
    let mut buffer = vec![0_u8; 65_536];
    loop {
        // Errors here are ICMP messages about clients that are gone.
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
        let mut answer = format!("{name} {client} ").into_bytes();
        answer.extend_from_slice(&buffer[..length]);
        let _ = socket.send_to(&answer, client).await;
    }
}
