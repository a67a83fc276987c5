//! Datagrams to aliases: a flow for each client of each alias and port.
//!
//! A client's first datagram comes to the one socket for all. It makes a flow, with a socket of its own that is the alias
//! to this client: what the client sends after that comes there, and the pod's answers go out from there. A flow ends when
//! it has been silent for as long as the kernel remembers one by default (`nf_conntrack_udp_timeout`), so that a pod sees
//! the same client behind the same port for as long as it would without a tunnel; or earlier, where there is no room for
//! another client ([`Crowd`]).

mod crowd;

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::UdpSocket,
    sync::mpsc,
    time::{Instant, sleep_until, timeout_at},
};
use tracing::debug;

pub(super) use self::crowd::Crowd;
use self::crowd::{Activity, Seat};
use super::{
    DIAL_DEADLINE, Dial, MAX_FLOWS, Proxy, ReceiveDatagram, Refusal, SendDatagram,
    buffers::Buffers,
    counters::{Open, add},
    sockets::{answering, receive},
};
use crate::lifecycle::Tasks;

/// `nf_conntrack_udp_timeout`: for how long a flow may be silent that is a question and its answer.
const IDLE: Duration = Duration::from_secs(30);
/// `nf_conntrack_udp_timeout_stream`: the same for one that has gone on both ways.
const IDLE_STREAM: Duration = Duration::from_secs(120);
/// When a flow with answers is one that goes on (net/netfilter/nf_conntrack_proto_udp.c).
const STREAM_AFTER: Duration = Duration::from_secs(2);
/// For how long the datagrams of a client are dropped after there was no way for one, rather than looking for one anew
/// with each of them.
const REFUSED: Duration = Duration::from_secs(1);
/// How many datagrams may wait for a flow that has just been made.
const QUEUE: usize = 32;
/// The largest datagram.
const LARGEST: usize = 65_535;
/// How many datagrams are taken until others have their turn.
const TURN: usize = 64;
/// How often another flow makes room for one that found none on the way to its node: others may be quicker to take it.
const ATTEMPTS: usize = 16;
/// How many datagrams may wait that came to the socket of another client.
const STRAYS: usize = 256;

/// A client, and the alias with the port that it sends to.
type Key = (SocketAddr, SocketAddr);

/// A flow, as it is known to the socket for all.
struct Flow {
    /// Tells it from a later one of the same client.
    number: u64,
    queue: mpsc::Sender<Box<[u8]>>,
}

/// The flows of one socket.
pub(super) struct Flows<D> {
    proxy: Proxy<D>,
    tasks: Tasks,
    crowd: Arc<Crowd>,
    flows: HashMap<Key, Flow>,
    ended: mpsc::Receiver<(Key, u64)>,
    /// A flow sends one message and there are no more flows than fit.
    end: mpsc::Sender<(Key, u64)>,
    strays: mpsc::Receiver<(Key, Box<[u8]>)>,
    stray: mpsc::Sender<(Key, Box<[u8]>)>,
    buffers: Buffers,
}

/// The socket that is an alias to one client.
struct Near {
    socket: UdpSocket,
    client: SocketAddr,
    alias: SocketAddr,
    /// For what others have sent. Between the two calls that bind a socket and connect it, it is bound to the alias and to
    /// no client; the kernel, looking for the socket of a datagram of any client meanwhile, may take it for a match and find
    /// it connected a moment later. With a thousand clients that begin together it happens to a few.
    stray: mpsc::Sender<(Key, Box<[u8]>)>,
}

impl Near {
    /// What has come from the client, if it has; `Ok(None)` after what has come from another, which is passed on.
    fn try_recv(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        let (length, from) = self.socket.try_recv_from(into)?;
        if from.ip() == self.client.ip() && from.port() == self.client.port() {
            return Ok(Some(length));
        }
        // Where there is no room it is lost, as datagrams may be.
        let _ = self.stray.try_send(((from, self.alias), into.get(..length).unwrap_or_default().into()));
        Ok(None)
    }
}

impl<D: Dial> Flows<D> {
    pub(super) fn new(proxy: Proxy<D>, crowd: Arc<Crowd>, tasks: Tasks) -> Self {
        let (end, ended) = mpsc::channel(MAX_FLOWS);
        let (stray, strays) = mpsc::channel(STRAYS);
        let buffers = Buffers::new(LARGEST);
        Self { proxy, tasks, crowd, flows: HashMap::new(), ended, end, strays, stray, buffers }
    }

    pub(super) async fn run(mut self, socket: UdpSocket) {
        let stop = self.tasks.stopping();
        let mut datagram = vec![0; LARGEST].into_boxed_slice();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some((key, number)) = self.ended.recv() => {
                    self.forget(key, number);
                    // With many new clients, as many end: not one for each turn of datagrams.
                    while let Ok((key, number)) = self.ended.try_recv() {
                        self.forget(key, number);
                    }
                }
                Some(((client, alias), datagram)) = self.strays.recv() => self.take(client, alias, &datagram),
                ready = socket.readable() => {
                    if let Err(error) = ready {
                        debug!("the socket for datagrams to other sites: {error}");
                        return;
                    }
                    for _ in 0..TURN {
                        match receive(&socket, &mut datagram) {
                            Ok(Some((length, client, alias))) => {
                                self.take(client, alias, datagram.get(..length).unwrap_or_default());
                            }
                            Ok(None) => add(&self.proxy.counters.datagrams_dropped, 1),
                            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                            // What became of a datagram that was sent from here; there is none.
                            Err(error) => {
                                debug!("the socket for datagrams to other sites: {error}");
                                break;
                            }
                        }
                    }
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    fn forget(&mut self, key: Key, number: u64) {
        if self.flows.get(&key).is_some_and(|flow| flow.number == number) {
            self.flows.remove(&key);
        }
    }

    /// Gives a datagram to its flow, which is made if need be.
    fn take(&mut self, client: SocketAddr, alias: SocketAddr, datagram: &[u8]) {
        let key = (client, alias);
        // One that has ended is not known to have yet.
        let known = self.flows.get(&key).filter(|flow| !flow.queue.is_closed()).map(|flow| flow.queue.clone());
        let queue = match known {
            Some(queue) => Ok(queue),
            None => self.begin(client, alias),
        };
        let counters = &self.proxy.counters;
        match queue {
            Ok(queue) => {
                if queue.try_send(datagram.into()).is_err() {
                    add(&counters.datagrams_dropped, 1);
                }
            }
            Err(refusal) => {
                debug!(%client, %alias, "a datagram to another site is dropped: {refusal}");
                counters.refuse(&refusal);
                add(&counters.datagrams_dropped, 1);
            }
        }
    }

    fn begin(&mut self, client: SocketAddr, alias: SocketAddr) -> Result<mpsc::Sender<Box<[u8]>>, Refusal> {
        let target = self.proxy.target(alias.ip()).ok_or(Refusal::NoSuchAlias)?;
        let socket = answering(alias, client).map_err(|error| Refusal::Failed(error.to_string()))?;
        let near = Near { socket, client, alias, stray: self.stray.clone() };
        let (seat, mut give_way) = self.crowd.enter(&target.node, Instant::now()).ok_or(Refusal::Overloaded)?;
        let (queue, mut queued) = mpsc::channel(QUEUE);
        let number = seat.number;
        self.flows.insert((client, alias), Flow { number, queue: queue.clone() });
        let (proxy, buffers) = (self.proxy.clone(), self.buffers.clone());
        let (stop, end) = (self.tasks.stopping(), self.end.clone());
        let addr = SocketAddr::new(target.addr, alias.port());
        self.tasks.spawn(async move {
            let mut gone = None;
            let carried = tokio::select! {
                () = stop.cancelled() => return,
                Ok(tell) = &mut give_way => {
                    debug!(%client, %alias, "a flow gives way to another");
                    gone = tell;
                    Ok(())
                }
                carried = carry(&proxy, &target.node, addr, &near, &mut queued, &buffers, &seat) => carried,
            };
            // What it held on the way is free.
            if let Some(gone) = gone {
                let _ = gone.send(());
            }
            if let Err(refusal) = carried {
                debug!(%client, %alias, node = &*target.node, "datagrams to another site are dropped: {refusal}");
                proxy.counters.refuse(&refusal);
                let waiting = std::iter::from_fn(|| queued.try_recv().ok()).count();
                add(&proxy.counters.datagrams_dropped, waiting as u64);
                // Its socket and its queue stay until then, and take what the client sends meanwhile.
                tokio::select! {
                    () = stop.cancelled() => return,
                    _ = &mut give_way => {}
                    () = tokio::time::sleep(REFUSED) => {}
                }
            }
            drop((near, queued, seat, give_way));
            // Nobody listens any more when the agent stops.
            let _ = end.send(((client, alias), number)).await;
        });
        Ok(queue)
    }
}

/// Carries one flow until it is silent or broken.
async fn carry<D: Dial>(
    proxy: &Proxy<D>,
    node: &str,
    addr: SocketAddr,
    near: &Near,
    queued: &mut mpsc::Receiver<Box<[u8]>>,
    buffers: &Buffers,
    seat: &Seat,
) -> Result<(), Refusal> {
    let (mut sender, mut receiver) = open(&*proxy.dial, node, addr, seat).await?;
    seat.carried();
    let counters = &*proxy.counters;
    add(&counters.flows, 1);
    let _open = Open::new(&counters.open_flows);
    let activity = &*seat.activity;
    activity.opened(Instant::now());
    let there = async {
        loop {
            let sent = tokio::select! {
                Some(datagram) = queued.recv() => sender.send(&datagram).await,
                readable = near.socket.readable() => match readable {
                    Ok(()) => {
                        // Held while it is in use and no longer: most flows are silent.
                        let mut lent = buffers.take();
                        match near.try_recv(&mut lent.bytes) {
                            Ok(Some(length)) => sender.send(lent.bytes.get(..length).unwrap_or_default()).await,
                            Ok(None) => continue,
                            // That an earlier answer found nobody; the client may be back.
                            Err(error) if is_passing(&error) || error.kind() == io::ErrorKind::WouldBlock => continue,
                            Err(error) => Err(error),
                        }
                    }
                    Err(error) => Err(error),
                },
            };
            if let Err(error) = sent {
                return error;
            }
            activity.note(Instant::now(), false);
            add(&counters.datagrams_out, 1);
        }
    };
    let back = async {
        loop {
            let datagram = match receiver.receive().await {
                Ok(datagram) => datagram,
                Err(error) => return error,
            };
            match near.socket.send(&datagram).await {
                Ok(_) => {}
                Err(error) if is_passing(&error) => {
                    add(&counters.datagrams_dropped, 1);
                    continue;
                }
                Err(error) => return error,
            }
            if activity.note(Instant::now(), true) {
                seat.answered();
            }
            add(&counters.datagrams_in, 1);
        }
    };
    tokio::select! {
        error = there => debug!(%addr, node, "a flow has ended: {error}"),
        error = back => debug!(%addr, node, "a flow has ended: {error}"),
        () = silence(activity) => {}
    }
    Ok(())
}

/// Opens a way, for which another flow to that node may have to go.
async fn open<D: Dial>(
    dial: &D,
    node: &str,
    addr: SocketAddr,
    seat: &Seat,
) -> Result<(D::Sender, D::Receiver), Refusal> {
    let deadline = Instant::now() + DIAL_DEADLINE;
    for _ in 0..ATTEMPTS {
        let opened = timeout_at(deadline, dial.open_udp(node, addr, deadline)).await;
        match opened.unwrap_or(Err(Refusal::TimedOut)) {
            Err(Refusal::Overloaded) => {}
            opened => return opened,
        }
        let Some(gone) = seat.make_room(Instant::now()) else { break };
        // Whether it was told to go or went by itself, its place is free.
        let _ = timeout_at(deadline, gone).await;
    }
    Err(Refusal::Overloaded)
}

/// Whether it is of one datagram and not of the flow: nobody took the one before, it is too large, or there is no room.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ECONNREFUSED | libc::EMSGSIZE | libc::ENOBUFS | libc::EPERM))
}

/// When a flow has been silent for long enough, if nothing passes until then.
fn ends(activity: &Activity) -> Instant {
    let stream = activity.both_ways_for().is_some_and(|lasted| lasted >= STREAM_AFTER);
    activity.last() + if stream { IDLE_STREAM } else { IDLE }
}

async fn silence(activity: &Activity) {
    loop {
        sleep_until(ends(activity)).await;
        if ends(activity) <= Instant::now() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flow_is_remembered_as_long_as_the_kernel_would() {
        let begun = Instant::now();
        let activity = Activity::new(begun);
        let seconds = |seconds| begun + Duration::from_secs(seconds);
        assert_eq!(ends(&activity), seconds(30));
        activity.note(seconds(1), false);
        activity.note(seconds(1), true);
        assert_eq!(ends(&activity), seconds(31), "a question and its answer");
        activity.note(seconds(5), false);
        assert_eq!(ends(&activity), seconds(125));
        silence(&activity).await;
        assert_eq!(Instant::now(), seconds(125));
        let late = Activity::new(begun);
        late.opened(seconds(4));
        late.note(seconds(5), true);
        assert_eq!(ends(&late), seconds(35), "what came before there was a way is no part of it");
        let unanswered = Activity::new(begun);
        unanswered.note(seconds(50), false);
        assert_eq!(ends(&unanswered), seconds(80));
    }

    #[tokio::test]
    async fn what_came_to_the_socket_of_another_client_is_passed_on() {
        let bind = || UdpSocket::bind("127.0.0.1:0");
        // Not connected, as the kernel has it for a moment.
        let (socket, own, other) = (bind().await.unwrap(), bind().await.unwrap(), bind().await.unwrap());
        let alias = socket.local_addr().unwrap();
        let (stray, mut strays) = mpsc::channel(1);
        let near = Near { socket, client: own.local_addr().unwrap(), alias, stray };
        let mut buffer = [0; 16];
        other.send_to(b"another's", alias).await.unwrap();
        near.socket.readable().await.unwrap();
        assert_eq!(near.try_recv(&mut buffer).unwrap(), None);
        let expected = ((other.local_addr().unwrap(), alias), Box::from(*b"another's"));
        assert_eq!(strays.recv().await.unwrap(), expected);
        own.send_to(b"own", alias).await.unwrap();
        near.socket.readable().await.unwrap();
        assert_eq!(near.try_recv(&mut buffer).unwrap(), Some(3));
        assert!(strays.try_recv().is_err());
    }
}
