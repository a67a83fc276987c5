//! One client, from its first byte to the end of what it asked for.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};
use tracing::debug;

use super::{
    Failure, Server, associate,
    counters::add,
    failure::code,
    resolve::Route,
    wire::{self, Command, Destination, NO_AUTH, NO_METHOD, PASSWORD},
};
use crate::{
    model::Protocol,
    net::keep_alive,
    proxy::{Carry, DIAL_DEADLINE, Dial, Direct, Refusal},
    tunnel::{Cut, Passed},
};

/// How long a client may take to say what it wants.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How long a client may take to read an answer.
const ANSWER: Duration = Duration::from_secs(1);
/// How long the answer to a wrong login waits, so that guessing takes its time.
const WRONG: Duration = Duration::from_millis(500);
/// So much of what a client has said too much is read, so that the answer to it is not overtaken by a reset.
const LEFT: u64 = 64 << 10;

/// Serves a client to the end.
pub(super) async fn serve<D: Dial>(server: &Arc<Server<D>>, mut stream: TcpStream, client: SocketAddr) {
    let asked = timeout(HANDSHAKE, handshake(server, &mut stream)).await.unwrap_or(Err(Failure::Slow));
    let (command, destination) = match asked {
        Ok(asked) => asked,
        Err(failure) => return refuse(server, stream, client, None, &failure).await,
    };
    match command {
        Command::Connect => match dial(server, &destination, client).await {
            Ok(far) => carry(server, stream, client, &destination, far).await,
            Err(failure) => refuse(server, stream, client, Some(&destination), &failure).await,
        },
        Command::Associate => match associate::open(server, &stream, client, &destination) {
            Ok((association, bound)) => {
                let granted = wire::reply(code::SUCCEEDED, Some((bound.ip(), bound.port())));
                if write(&mut stream, &granted).await.is_err() {
                    return server.fail(client, None, &Failure::CutOff(io::ErrorKind::BrokenPipe));
                }
                debug!(%client, %bound, "datagrams of a client of SOCKS5 are carried");
                association.run(stream).await;
            }
            Err(failure) => refuse(server, stream, client, Some(&destination), &failure).await,
        },
    }
}

/// What the client wants, once it may want anything.
async fn handshake<D>(server: &Server<D>, stream: &mut TcpStream) -> Result<(Command, Destination), Failure> {
    let offered = wire::read_methods(stream).await?;
    let (wanted, problem) = match &server.credentials {
        None => (NO_AUTH, "none is needed here"),
        Some(_) => (PASSWORD, "user name and password are needed here"),
    };
    if !offered.contains(&wanted) {
        let _ = write(stream, &wire::method(NO_METHOD)).await;
        return Err(Failure::NoMethod(problem));
    }
    write(stream, &wire::method(wanted)).await?;
    if let Some(credentials) = server.credentials.clone() {
        let (user, password) = wire::read_login(stream).await?;
        let accepted = tokio::task::spawn_blocking(move || credentials.accept(&user, &password)).await;
        let failure = match accepted {
            Ok(Ok(true)) => None,
            Ok(Ok(false)) => Some(Failure::WrongLogin),
            Ok(Err(why)) => Some(Failure::NoCredentials(why)),
            Err(_) => Some(Failure::NoCredentials("the agent is stopping".to_owned())),
        };
        if let Some(failure) = failure {
            tokio::time::sleep(WRONG).await;
            let _ = write(stream, &wire::login(false)).await;
            return Err(failure);
        }
        write(stream, &wire::login(true)).await?;
    }
    wire::read_request(stream).await
}

/// A connection to where a client wants to be.
enum Far<S> {
    Via(S),
    Direct(Direct),
}

/// Connects by the first way that leads there.
async fn dial<D: Dial>(
    server: &Server<D>,
    destination: &Destination,
    client: SocketAddr,
) -> Result<Far<D::Stream>, Failure> {
    let deadline = Instant::now() + DIAL_DEADLINE;
    let mut last = Failure::UnknownHost;
    for route in server.routes(destination, Protocol::Tcp, client)? {
        let dialled = async {
            match &route {
                Route::Via { node, addr } => server.dial.dial_tcp(node, *addr, deadline).await.map(Far::Via),
                Route::Direct(addr) => Direct::connect(*addr, deadline).await.map(Far::Direct),
            }
        };
        let dialled = timeout_at(deadline, dialled).await.unwrap_or(Err(Refusal::TimedOut));
        match dialled.map_err(Failure::from) {
            Ok(far) => {
                debug!(%client, %destination, ?route, "connected for a client of SOCKS5");
                return Ok(far);
            }
            Err(failure) if failure.is_of_one_address() => last = failure,
            Err(failure) => return Err(failure),
        }
    }
    Err(last)
}

async fn carry<D: Dial>(
    server: &Server<D>,
    mut near: TcpStream,
    client: SocketAddr,
    destination: &Destination,
    far: Far<D::Stream>,
) {
    let counters = &*server.counters;
    add(&counters.connections);
    // What comes from the far side is in pieces already; waiting for more would only delay it.
    let _ = near.set_nodelay(true);
    if let Err(error) = keep_alive(&near) {
        debug!(%client, "a client that vanishes will not be missed: {error}");
    }
    if let Err(failure) = write(&mut near, &wire::reply(code::SUCCEEDED, None)).await {
        let _ = near.set_zero_linger();
        return server.fail(client, Some(destination), &failure);
    }
    let passed = Passed { up: &counters.bytes_out, down: &counters.bytes_in };
    let carried = match far {
        Far::Via(stream) => stream.carry(&mut near, passed).await,
        Far::Direct(direct) => direct.carry(&mut near, passed).await,
    };
    match carried {
        Ok(()) => debug!(%client, %destination, "closed"),
        Err(Cut::Socket(error)) => debug!(%client, %destination, "the client has gone: {error}"),
        Err(Cut::Stream(error)) => debug!(%client, %destination, "the far side has gone: {error}"),
    }
}

/// Tells the client, as far as there is something to tell, and ends.
async fn refuse<D>(
    server: &Server<D>,
    mut stream: TcpStream,
    client: SocketAddr,
    destination: Option<&Destination>,
    failure: &Failure,
) {
    server.fail(client, destination, failure);
    let farewell = async {
        if let Some(code) = failure.code() {
            stream.write_all(&wire::reply(code, None)).await?;
        }
        stream.shutdown().await?;
        let mut rest = (&mut stream).take(LEFT);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    };
    // Whoever speaks no SOCKS, or nothing at all, is not waited for.
    if !matches!(failure, Failure::Garbage(_) | Failure::Slow) {
        let _ = timeout(ANSWER, farewell).await;
    }
}

async fn write(stream: &mut TcpStream, bytes: &[u8]) -> Result<(), Failure> {
    match timeout(ANSWER, stream.write_all(bytes)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Failure::CutOff(error.kind())),
        Err(_) => Err(Failure::CutOff(io::ErrorKind::TimedOut)),
    }
}
