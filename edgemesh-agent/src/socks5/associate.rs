//! `UDP ASSOCIATE`: datagrams of one client, each with its destination before it, for as long as the client's TCP
//! connection is there.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use tokio::{
    io::AsyncReadExt,
    net::{TcpStream, UdpSocket},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, sleep_until, timeout_at},
};
use tracing::debug;

use super::{
    Failure, Server,
    counters::{Open, add},
    resolve::Route,
    wire::{DATAGRAM_PREFIX, Destination, Host, parse_datagram},
};
use crate::{
    model::Protocol,
    net::keep_alive,
    proxy::{DIAL_DEADLINE, Dial, DirectFlow, ReceiveDatagram, Refusal, SendDatagram},
};

/// How many destinations one client may have at a time; for one more, that which has been silent longest goes.
const MAX_FLOWS: usize = 64;
/// How many bytes of one client may wait for the ways they are to go.
const MAX_WAITING: usize = 256 << 10;
/// How many datagrams may wait for one way.
const QUEUE: usize = 32;
/// The largest datagram.
const LARGEST: usize = 65_535;
/// How many datagrams are taken until others have their turn.
const TURN: usize = 64;
/// For how long a destination may be silent that has not answered; `nf_conntrack_udp_timeout`.
const IDLE: Duration = Duration::from_secs(30);
/// The same for one that has; `nf_conntrack_udp_timeout_stream`.
const IDLE_ANSWERED: Duration = Duration::from_secs(120);
/// For how long datagrams to a destination are dropped after there was no way to it, rather than looking for one anew with
/// each of them.
const REFUSED: Duration = Duration::from_secs(1);

/// A client's socket, and where its datagrams go.
pub(super) struct Association<D> {
    server: Arc<Server<D>>,
    socket: Arc<UdpSocket>,
    client: IpAddr,
    /// The client's port, once it is known: it may say it at the beginning, and else its first datagram does.
    port: Option<u16>,
    /// By the destination as the client writes it, so that each answer comes from where it takes it to have asked.
    flows: HashMap<Box<[u8]>, Flow>,
    waiting: Arc<Semaphore>,
    ended: mpsc::Receiver<(Box<[u8]>, u64)>,
    /// A flow sends one message, and there is room for those that are about to go, too.
    end: mpsc::Sender<(Box<[u8]>, u64)>,
    last: u64,
    _place: OwnedSemaphorePermit,
}

struct Flow {
    /// Tells it from a later one to the same destination.
    number: u64,
    queue: mpsc::Sender<Waiting>,
    used: Instant,
}

/// A payload, and its share of what may wait.
struct Waiting {
    payload: Box<[u8]>,
    _share: OwnedSemaphorePermit,
}

/// Binds a socket for a client where its TCP connection ends; returns where the client is to send to.
pub(super) fn open<D: Dial>(
    server: &Arc<Server<D>>,
    stream: &TcpStream,
    client: SocketAddr,
    from: &Destination,
) -> Result<(Association<D>, SocketAddr), Failure> {
    let place = Arc::clone(&server.associations).try_acquire_owned().map_err(|_| Refusal::Overloaded)?;
    let bind = || -> io::Result<(UdpSocket, SocketAddr)> {
        let socket = std::net::UdpSocket::bind(SocketAddr::new(stream.local_addr()?.ip(), 0))?;
        // Before anybody can have sent anything.
        server.guard.close_now(socket.as_fd())?;
        socket.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(socket)?;
        let bound = socket.local_addr()?;
        Ok((socket, bound))
    };
    let (socket, bound) = bind().map_err(|error| Refusal::Failed(format!("no socket for datagrams: {error}")))?;
    if let Err(error) = keep_alive(stream) {
        debug!(%client, "a client that vanishes will not be missed: {error}");
    }
    add(&server.counters.associations);
    let (end, ended) = mpsc::channel(2 * MAX_FLOWS);
    let client = client.ip().to_canonical();
    let association = Association {
        server: Arc::clone(server),
        socket: Arc::new(socket),
        client,
        port: port_of(from, client),
        flows: HashMap::new(),
        waiting: Arc::new(Semaphore::new(MAX_WAITING)),
        ended,
        end,
        last: 0,
        _place: place,
    };
    Ok((association, bound))
}

/// The port that a client says it will send from. With an address that is not its own it is behind a translation, and knows
/// its port no better.
fn port_of(from: &Destination, client: IpAddr) -> Option<u16> {
    let own = matches!(from.host, Host::Ip(ip) if ip.is_unspecified() || ip == client);
    Some(from.port).filter(|port| own && *port != 0)
}

impl<D: Dial> Association<D> {
    /// Carries datagrams until the client closes its connection.
    pub(super) async fn run(mut self, mut control: TcpStream) {
        let (mut said, socket) = ([0; 64], Arc::clone(&self.socket));
        loop {
            tokio::select! {
                read = control.read(&mut said) => match read {
                    // There is nothing to be said on it any more.
                    Ok(1..) => {}
                    Ok(0) | Err(_) => return debug!(client = %self.client, "datagrams of a client are carried no more"),
                },
                Some((key, number)) = self.ended.recv() => {
                    if self.flows.get(&key).is_some_and(|flow| flow.number == number) {
                        self.flows.remove(&key);
                    }
                }
                ready = socket.readable() => {
                    if ready.is_err() {
                        return;
                    }
                    for _ in 0..TURN {
                        // Held while there is something to be read, and no longer.
                        let mut datagram = Vec::with_capacity(LARGEST);
                        match socket.try_recv_buf_from(&mut datagram) {
                            Ok((_, from)) => self.take(from, &datagram),
                            // Also what became of an answer that nobody took.
                            Err(_) => break,
                        }
                    }
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    fn take(&mut self, from: SocketAddr, datagram: &[u8]) {
        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
        let is_client = from.ip() == self.client && self.port.is_none_or(|port| port == from.port());
        let taken = is_client && self.pass(from, datagram).is_some();
        if !taken {
            add(&self.server.counters.datagrams_dropped);
        }
    }

    /// Gives a datagram of the client to its flow, which is made if need be; None if it is dropped.
    fn pass(&mut self, from: SocketAddr, datagram: &[u8]) -> Option<()> {
        let (destination, at) = parse_datagram(datagram)?;
        if self.port.is_none() {
            self.port = Some(from.port());
        }
        let (address, payload) = (datagram.get(DATAGRAM_PREFIX..at)?, datagram.get(at..)?);
        // A datagram may be empty, and takes room all the same.
        let size = u32::try_from(payload.len().max(1)).ok()?;
        let share = Arc::clone(&self.waiting).try_acquire_many_owned(size).ok()?;
        let waiting = Waiting { payload: payload.into(), _share: share };
        let now = Instant::now();
        if let Some(flow) = self.flows.get_mut(address).filter(|flow| !flow.queue.is_closed()) {
            flow.used = now;
            return flow.queue.try_send(waiting).ok();
        }
        if self.flows.len() >= MAX_FLOWS {
            let silent = self.flows.iter().min_by_key(|(_, flow)| flow.used).map(|(key, _)| key.clone())?;
            // Its task ends with its queue.
            self.flows.remove(&silent);
        }
        let Ok(place) = Arc::clone(&self.server.flows).try_acquire_owned() else {
            self.server.fail(from, Some(&destination), &Refusal::Overloaded.into());
            return None;
        };
        let (queue, queued) = mpsc::channel(QUEUE);
        let sent = queue.try_send(waiting).ok();
        self.last += 1;
        self.flows.insert(address.into(), Flow { number: self.last, queue, used: now });
        let carrying = Carrying {
            server: Arc::clone(&self.server),
            socket: Arc::clone(&self.socket),
            client: from,
            address: address.into(),
            destination,
            _place: place,
        };
        let (end, number, key, stop) = (self.end.clone(), self.last, address.into(), self.server.tasks.stopping());
        self.server.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => return,
                () = carrying.run(queued) => {}
            }
            // Nobody listens any more when the client has gone.
            let _ = end.send((key, number)).await;
        });
        sent
    }
}

/// Carries datagrams between a client and one destination.
struct Carrying<D> {
    server: Arc<Server<D>>,
    socket: Arc<UdpSocket>,
    client: SocketAddr,
    /// The destination as the client writes it.
    address: Box<[u8]>,
    destination: Destination,
    _place: OwnedSemaphorePermit,
}

impl<D: Dial> Carrying<D> {
    async fn run(self, mut queued: mpsc::Receiver<Waiting>) {
        match self.open().await {
            Ok(Way::Via(sender, receiver)) => self.carry(sender, receiver, queued).await,
            Ok(Way::Direct(flow)) => self.carry(flow.clone(), flow, queued).await,
            Err(failure) => {
                self.server.fail(self.client, Some(&self.destination), &failure);
                let until = Instant::now() + REFUSED;
                while let Ok(Some(_)) = timeout_at(until, queued.recv()).await {
                    add(&self.server.counters.datagrams_dropped);
                }
            }
        }
    }

    async fn open(&self) -> Result<Way<D>, Failure> {
        let deadline = Instant::now() + DIAL_DEADLINE;
        let mut last = Failure::UnknownHost;
        for route in self.server.routes(&self.destination, Protocol::Udp, self.client)? {
            let opened = async {
                match &route {
                    Route::Via { node, addr } => {
                        let (sender, receiver) = self.server.dial.open_udp(node, *addr, deadline).await?;
                        Ok(Way::Via(sender, receiver))
                    }
                    Route::Direct(addr) => DirectFlow::open(*addr).await.map(Way::Direct),
                }
            };
            let opened = timeout_at(deadline, opened).await.unwrap_or(Err(Refusal::TimedOut));
            match opened.map_err(Failure::from) {
                Ok(way) => return Ok(way),
                Err(failure) if failure.is_of_one_address() => last = failure,
                Err(failure) => return Err(failure),
            }
        }
        Err(last)
    }

    async fn carry(
        &self,
        mut sender: impl SendDatagram,
        mut receiver: impl ReceiveDatagram,
        mut queued: mpsc::Receiver<Waiting>,
    ) {
        let counters = &*self.server.counters;
        add(&counters.flows);
        let _open = Open::new(&counters.open_flows);
        debug!(client = %self.client, destination = %self.destination, "datagrams are carried");
        let activity = Activity::new();
        let there = async {
            // Ends when the client has gone, or others of its flows need the place.
            while let Some(waiting) = queued.recv().await {
                sender.send(&waiting.payload).await?;
                activity.note(false);
                add(&counters.datagrams_out);
            }
            Ok::<_, io::Error>(())
        };
        let back = async {
            loop {
                let payload = receiver.receive().await?;
                let answer = [&[0; DATAGRAM_PREFIX][..], &self.address, &payload].concat();
                // What does not fit into a datagram with its address, or finds nobody, is lost alone.
                let sent = self.socket.send_to(&answer, self.client).await;
                add(if sent.is_ok() { &counters.datagrams_in } else { &counters.datagrams_dropped });
                activity.note(true);
            }
        };
        let ended = tokio::select! {
            ended = there => ended,
            ended = back => ended,
            () = activity.silence() => Ok(()),
        };
        debug!(client = %self.client, destination = %self.destination, ?ended, "datagrams are carried no more");
    }
}

enum Way<D: Dial> {
    Via(D::Sender, D::Receiver),
    Direct(DirectFlow),
}

/// When something last passed.
struct Activity {
    begun: Instant,
    /// Milliseconds since then.
    last: AtomicU64,
    answered: AtomicU64,
}

impl Activity {
    fn new() -> Self {
        Self { begun: Instant::now(), last: AtomicU64::new(0), answered: AtomicU64::new(0) }
    }

    fn note(&self, answer: bool) {
        use std::sync::atomic::Ordering::Relaxed;
        let millis = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(millis, Relaxed);
        if answer {
            self.answered.store(1, Relaxed);
        }
    }

    fn ends(&self) -> Instant {
        use std::sync::atomic::Ordering::Relaxed;
        let idle = if self.answered.load(Relaxed) == 0 { IDLE } else { IDLE_ANSWERED };
        self.begun + Duration::from_millis(self.last.load(Relaxed)) + idle
    }

    /// Comes when nothing has passed for long enough.
    async fn silence(&self) {
        while self.ends() > Instant::now() {
            sleep_until(self.ends()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_destination_that_has_answered_is_remembered_for_longer() {
        let begun = Instant::now();
        let silent = Activity::new();
        silent.silence().await;
        assert_eq!(begun.elapsed(), IDLE);
        let (begun, answered) = (Instant::now(), Activity::new());
        tokio::time::sleep(Duration::from_secs(10)).await;
        answered.note(true);
        answered.silence().await;
        assert_eq!(begun.elapsed(), Duration::from_secs(10) + IDLE_ANSWERED);
    }

    #[test]
    fn a_client_may_say_which_port_it_sends_from() {
        let client = "10.244.1.7".parse().unwrap();
        let from = |host: &str, port| Destination { host: Host::Ip(host.parse().unwrap()), port };
        assert_eq!(port_of(&from("0.0.0.0", 5000), client), Some(5000));
        assert_eq!(port_of(&from("10.244.1.7", 5000), client), Some(5000));
        assert_eq!(port_of(&from("192.168.1.1", 5000), client), None, "that of another side of a NAT");
        assert_eq!(port_of(&from("0.0.0.0", 0), client), None);
    }
}
