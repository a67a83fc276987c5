//! The probe shell: reads requests, works on them side by side, writes answers.

use std::collections::HashMap;
use std::io::{BufRead as _, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use super::client::{self, Connection, connect_blocking};
use super::crowd;
use super::load::{self, Hammer};
use super::message::{Answer, App, Call, Failure, Request, Response, Tls};
use super::proxy::Proxy;
use super::rate;
use super::serve::Server;

/// Answers requests until standard input ends.
pub(super) fn run() -> Result<()> {
    let shell = Arc::new(Shell {
        runtime: tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .context("could not start the async runtime")?,
        next: AtomicU64::new(1),
        servers: Mutex::default(),
        connections: Mutex::default(),
        sockets: Mutex::default(),
        hammers: Mutex::default(),
    });
    for line in std::io::stdin().lock().lines() {
        let line = line.context("could not read a request")?;
        let call: Call = serde_json::from_str(&line).with_context(|| format!("{line:?} is no request"))?;
        let shell = Arc::clone(&shell);
        // A thread each: most requests block, and an answer may wait for another request.
        std::thread::spawn(move || {
            let answer = Answer { id: call.id, outcome: shell.answer(call.request) };
            write_answer(&answer);
        });
    }
    Ok(())
}

struct Shell {
    runtime: Runtime,
    next: AtomicU64,
    servers: Mutex<HashMap<(App, SocketAddr), JoinHandle<()>>>,
    connections: Mutex<HashMap<u64, Connection>>,
    sockets: Mutex<HashMap<u64, Arc<UdpSocket>>>,
    hammers: Mutex<HashMap<u64, Hammer>>,
}

impl Shell {
    fn answer(&self, request: Request) -> Result<Response, Failure> {
        match request {
            Request::Serve { name, app, listen } => self.serve(&name, app, listen),
            Request::Proxy { listen, backend, tls } => self.proxy(listen, backend, tls),
            Request::StopServing { app, listen } => {
                let server = locked(&self.servers).remove(&(app, listen));
                let server =
                    server.ok_or_else(|| Failure::other(format!("nothing of that kind listens on {listen}")))?;
                server.abort();
                // The listener is closed once the task is gone, not before; how it went is known.
                let _ = self.runtime.block_on(server);
                Ok(Response::Done)
            }
            Request::Once(transport, dial) => {
                let mut connection = Connection::open(transport, dial)?;
                connection.exchange(false, dial.deadline).map(Response::Reply)
            }
            Request::Open(transport, dial) => {
                let connection = Connection::open(transport, dial)?;
                Ok(Response::Opened(self.keep(&self.connections, connection)))
            }
            Request::Exchange { connection, addressed, deadline } => {
                // Taken out meanwhile, so that one slow peer holds up no other request.
                let mut taken = take(&self.connections, connection)?;
                let reply = taken.exchange(addressed, deadline);
                locked(&self.connections).insert(connection, taken);
                reply.map(Response::Reply)
            }
            Request::Reconnect { connection, target } => {
                let mut taken = take(&self.connections, connection)?;
                let outcome = taken.reconnect(target);
                locked(&self.connections).insert(connection, taken);
                outcome.map(|()| Response::Done)
            }
            Request::Say { connection, deadline } => {
                let mut taken = take(&self.connections, connection)?;
                let outcome = taken.say(deadline);
                locked(&self.connections).insert(connection, taken);
                outcome.map(|()| Response::Done)
            }
            Request::ReadToEnd { connection, finish, deadline } => {
                let mut taken = take(&self.connections, connection)?;
                let ending = taken.read_to_end(finish, deadline);
                locked(&self.connections).insert(connection, taken);
                ending.map(Response::Ended)
            }
            Request::Close { connection } => take(&self.connections, connection).map(|_| Response::Done),
            Request::Connect(transport, dial) => {
                connect_blocking(transport, dial).map(|(_, took)| Response::Connected(took))
            }
            Request::UdpFan { targets, deadline } => client::udp_fan(&targets, deadline).map(Response::Fan),
            Request::BindUdp { local } => {
                let socket = UdpSocket::bind(local);
                let socket = socket.map_err(|error| Failure::from_io(&format!("bind {local}"), &error))?;
                Ok(Response::Opened(self.keep(&self.sockets, Arc::new(socket))))
            }
            Request::SendTo { socket, target, text } => {
                let sent = self.socket(socket)?.send_to(text.as_bytes(), target);
                sent.map(|_| Response::Done).map_err(|error| Failure::from_io(&format!("send to {target}"), &error))
            }
            Request::Receive { socket, deadline } => {
                let (source, text) = client::receive(&*self.socket(socket)?, deadline)?;
                Ok(Response::Datagram(source, text))
            }
            Request::CloseUdp { socket } => take(&self.sockets, socket).map(|_| Response::Done),
            Request::Http { dial, path, requests } => {
                self.runtime.block_on(client::http(dial, &path, requests)).map(Response::Http)
            }
            Request::WebSocket(dial) => self.runtime.block_on(client::websocket(dial)).map(Response::Reply),
            Request::Spread { transport, dial, count, concurrency } => {
                load::spread(transport, dial, count, concurrency).map(Response::Spread)
            }
            Request::Crowd { transport, dial, count, rounds } => {
                self.runtime.block_on(crowd::crowd(transport, dial, count, rounds)).map(Response::Spread)
            }
            Request::Bulk { dial, bytes } => self.runtime.block_on(crowd::bulk(dial, bytes)).map(Response::Bulk),
            Request::Drain { dial, warm_up, length } => {
                self.runtime.block_on(rate::drain(dial, warm_up, length)).map(Response::Rate)
            }
            Request::Turnover { dial, clients, length } => {
                self.runtime.block_on(rate::turnover(dial, clients, length)).map(Response::Rate)
            }
            Request::Latency { measure, groups, rounds, deadline } => {
                load::latency(&self.runtime, measure, &groups, rounds, deadline).map(Response::Latency)
            }
            Request::StartHammer { transport, dial, concurrency } => {
                let hammer = Hammer::start(transport, dial, concurrency);
                Ok(Response::Hammering(self.keep(&self.hammers, hammer)))
            }
            Request::StopHammer { hammer } => take(&self.hammers, hammer)?.stop().map(Response::Hammered),
        }
    }

    fn serve(&self, name: &str, app: App, listen: SocketAddr) -> Result<Response, Failure> {
        let server = self.runtime.block_on(Server::bind(name, app, listen))?;
        let address = server.address()?;
        let task = self.runtime.spawn(server.run());
        locked(&self.servers).insert((app, address), task);
        Ok(Response::Serving(address))
    }

    fn proxy(&self, listen: SocketAddr, backend: SocketAddr, tls: Tls) -> Result<Response, Failure> {
        let proxy = self.runtime.block_on(Proxy::bind(listen, backend, tls))?;
        let address = proxy.address()?;
        self.runtime.spawn(proxy.run());
        Ok(Response::Serving(address))
    }

    fn socket(&self, id: u64) -> Result<Arc<UdpSocket>, Failure> {
        let socket = locked(&self.sockets).get(&id).cloned();
        socket.ok_or_else(|| Failure::other(format!("{id} is not open")))
    }

    fn keep<T>(&self, kept: &Mutex<HashMap<u64, T>>, value: T) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        locked(kept).insert(id, value);
        id
    }
}

fn take<T>(kept: &Mutex<HashMap<u64, T>>, id: u64) -> Result<T, Failure> {
    locked(kept).remove(&id).ok_or_else(|| Failure::other(format!("{id} is not open, or busy")))
}

/// The maps stay consistent whatever panics: each access is a single call.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write_answer(answer: &Answer) {
    let Ok(mut line) = serde_json::to_vec(answer) else { return };
    line.push(b'\n');
    // The lock of standard output keeps lines whole. When nobody reads, nobody misses the answer.
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(&line).and_then(|()| out.flush());
}
