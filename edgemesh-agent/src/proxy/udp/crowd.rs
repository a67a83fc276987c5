//! Who has to go where there are more clients of UDP than fit.
//!
//! A client of UDP never says that it is done, so most of those remembered are not needed any more: of somebody who asks
//! DNS from ever new ports, all but the last few. Where there is no room for one more, the client goes that has been silent
//! longest, one that has had its answer and been silent for a second before all others, as conntrack drops early
//! (`nf_conntrack` `early_drop`). Should it come back after all, it is a new client.
//!
//! Clients are ordered by when something last passed, as far as it is known: a datagram only notes the time, and who is
//! found at the front with a later one is put in its place then. So a datagram costs nothing here, and an eviction
//! O(log n), with one more O(log n) at most for each client that something has passed of meanwhile.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

use crate::proxy::counters::{Counters, add};

/// For how long a client that has been answered is silent until it goes before those that wait for an answer.
const DONE: Duration = Duration::from_secs(1);
/// How many clients may be about to go.
const LEAVING: usize = 1024;

/// The clients of all sockets. Not locked for a datagram, but when a client comes, is first answered, and goes.
#[derive(Debug)]
pub(in crate::proxy) struct Crowd {
    state: Mutex<State>,
    most: usize,
    counters: Arc<Counters>,
}

/// A client's place in the crowd, which it gives up by dropping it.
#[derive(Debug)]
pub(super) struct Seat {
    crowd: Arc<Crowd>,
    pub(super) number: u64,
    pub(super) activity: Arc<Activity>,
}

/// Comes when a client has to go, with whom to tell that it has gone.
pub(super) type GiveWay = oneshot::Receiver<Option<Gone>>;

/// Told when a client has gone.
pub(super) type Gone = oneshot::Sender<()>;

#[derive(Debug, Default)]
struct State {
    last: u64,
    /// Those that are about to go, too.
    members: HashMap<u64, Member>,
    all: Order,
    /// Of each node, those that something is held for on the way there.
    by_node: HashMap<Arc<str>, Order>,
}

#[derive(Debug)]
struct Member {
    node: Arc<str>,
    activity: Arc<Activity>,
    /// Where it stands.
    answered: bool,
    last: Instant,
    carried: bool,
    /// None once it has to go.
    give_way: Option<oneshot::Sender<Option<Gone>>>,
}

/// Clients by when something last passed, the longest ago first.
#[derive(Debug, Default)]
struct Order {
    answered: BTreeSet<(Instant, u64)>,
    unanswered: BTreeSet<(Instant, u64)>,
}

impl Order {
    fn of(&mut self, answered: bool) -> &mut BTreeSet<(Instant, u64)> {
        if answered { &mut self.answered } else { &mut self.unanswered }
    }

    fn is_empty(&self) -> bool {
        self.answered.is_empty() && self.unanswered.is_empty()
    }

    fn len(&self) -> usize {
        self.answered.len() + self.unanswered.len()
    }
}

impl Crowd {
    /// With room for so many.
    pub(in crate::proxy) fn new(most: usize, counters: Arc<Counters>) -> Self {
        Self { state: Mutex::default(), most, counters }
    }

    /// A seat for a new client of a node, for which another one may have to go; None where too many are about to already.
    pub(super) fn enter(self: &Arc<Self>, node: &Arc<str>, now: Instant) -> Option<(Seat, GiveWay)> {
        let mut state = self.lock();
        if state.members.len() >= self.most + LEAVING {
            return None;
        }
        while state.all.len() >= self.most {
            state.evict(None, now, None).then(|| add(&self.counters.evicted_flows, 1))?;
        }
        state.last += 1;
        let (number, activity) = (state.last, Arc::new(Activity::new(now)));
        let (give_way, asked) = oneshot::channel();
        let member = Member {
            node: Arc::clone(node),
            activity: Arc::clone(&activity),
            answered: false,
            last: now,
            carried: false,
            give_way: Some(give_way),
        };
        state.members.insert(number, member);
        state.all.unanswered.insert((now, number));
        drop(state);
        Some((Seat { crowd: Arc::clone(self), number, activity }, asked))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// It is carried: from now on it holds something on the way to its node, which it can make room of for others.
    pub(super) fn carried(&self) {
        self.crowd.lock().moved(self.number, |member| member.carried = true);
    }

    /// Something has come back for the first time.
    pub(super) fn answered(&self) {
        self.crowd.lock().moved(self.number, |member| member.answered = true);
    }

    /// Has another client of the same node go, and tells when it has gone; None where there is none.
    pub(super) fn make_room(&self, now: Instant) -> Option<oneshot::Receiver<()>> {
        let mut state = self.crowd.lock();
        let node = Arc::clone(&state.members.get(&self.number)?.node);
        let (tell, told) = oneshot::channel();
        state.evict(Some(&node), now, Some(tell)).then(|| add(&self.crowd.counters.evicted_flows, 1))?;
        Some(told)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.crowd.lock();
        state.take_out(self.number);
        state.members.remove(&self.number);
    }
}

impl State {
    /// Has the client go that can best be done without, of a node or of all.
    fn evict(&mut self, node: Option<&Arc<str>>, now: Instant, tell: Option<Gone>) -> bool {
        let done = self.longest_silent(node, true);
        let victim = match done {
            Some((last, number)) if now.saturating_duration_since(last) >= DONE => Some(number),
            done => done.into_iter().chain(self.longest_silent(node, false)).min().map(|(_, number)| number),
        };
        let Some(number) = victim else { return false };
        self.take_out(number);
        if let Some(give_way) = self.members.get_mut(&number).and_then(|member| member.give_way.take()) {
            // It may be going by itself; then who waits is told that by `tell` being dropped.
            let _ = give_way.send(tell);
        }
        true
    }

    fn longest_silent(&mut self, node: Option<&Arc<str>>, answered: bool) -> Option<(Instant, u64)> {
        loop {
            let order = match node {
                Some(node) => self.by_node.get_mut(node)?,
                None => &mut self.all,
            };
            let (known, number) = *order.of(answered).first()?;
            let last = self.members.get(&number)?.activity.last();
            if last <= known {
                return Some((known, number));
            }
            self.moved(number, |member| member.last = last);
        }
    }

    /// Changes where a client stands.
    fn moved(&mut self, number: u64, change: impl FnOnce(&mut Member)) {
        if !self.take_out(number) {
            return;
        }
        let Some(member) = self.members.get_mut(&number) else { return };
        change(member);
        self.all.of(member.answered).insert((member.last, number));
        if member.carried {
            let order = self.by_node.entry(Arc::clone(&member.node)).or_default();
            order.of(member.answered).insert((member.last, number));
        }
    }

    /// Takes a client out of the orders, if it is not about to go already.
    fn take_out(&mut self, number: u64) -> bool {
        let Some(member) = self.members.get(&number) else { return false };
        if member.give_way.is_none() {
            return false;
        }
        let place = (member.last, number);
        self.all.of(member.answered).remove(&place);
        if let Some(order) = self.by_node.get_mut(&member.node) {
            order.of(member.answered).remove(&place);
            if order.is_empty() {
                self.by_node.remove(&member.node);
            }
        }
        true
    }
}

/// When something last passed, in milliseconds since the beginning, and whether anything came back.
#[derive(Debug)]
pub(super) struct Activity {
    begun: Instant,
    opened: AtomicU64,
    last: AtomicU64,
    answered: AtomicBool,
}

impl Activity {
    pub(super) fn new(now: Instant) -> Self {
        Self { begun: now, opened: AtomicU64::new(0), last: AtomicU64::new(0), answered: AtomicBool::new(false) }
    }

    /// There is a way from now on.
    pub(super) fn opened(&self, now: Instant) {
        self.note(now, false);
        self.opened.store(self.last.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Something has passed; says whether it is the first answer.
    pub(super) fn note(&self, now: Instant, answer: bool) -> bool {
        let since = u64::try_from((now - self.begun).as_millis()).unwrap_or(u64::MAX);
        self.last.store(since, Ordering::Relaxed);
        answer && !self.answered.swap(true, Ordering::Relaxed)
    }

    /// When something last passed.
    pub(super) fn last(&self) -> Instant {
        self.begun + Duration::from_millis(self.last.load(Ordering::Relaxed))
    }

    /// For how long it has gone on both ways, if it has.
    pub(super) fn both_ways_for(&self) -> Option<Duration> {
        let [last, opened] = [&self.last, &self.opened].map(|time| time.load(Ordering::Relaxed));
        self.answered.load(Ordering::Relaxed).then(|| Duration::from_millis(last.saturating_sub(opened)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Room {
        crowd: Arc<Crowd>,
        begun: Instant,
        seats: Vec<(Seat, GiveWay)>,
    }

    impl Room {
        fn new(most: usize) -> Self {
            let crowd = Arc::new(Crowd::new(most, Arc::default()));
            Self { crowd, begun: Instant::now(), seats: Vec::new() }
        }

        fn at(&self, millis: u64) -> Instant {
            self.begun + Duration::from_millis(millis)
        }

        /// A client that is carried from that moment on.
        fn enter(&mut self, node: &str, millis: u64) -> usize {
            let entered = self.crowd.enter(&node.into(), self.at(millis)).unwrap();
            entered.0.carried();
            self.seats.push(entered);
            self.seats.len() - 1
        }

        fn pass(&self, client: usize, millis: u64, answer: bool) {
            let (seat, _) = &self.seats[client];
            if seat.activity.note(self.at(millis), answer) {
                seat.answered();
            }
        }

        /// Who has to go, by their numbers.
        fn asked(&mut self) -> Vec<usize> {
            let asked = self.seats.iter_mut().enumerate();
            asked.filter_map(|(client, (_, give_way))| give_way.try_recv().is_ok().then_some(client)).collect()
        }
    }

    #[tokio::test]
    async fn who_was_answered_and_has_been_silent_for_a_second_goes_first() {
        let mut room = Room::new(4);
        let (waiting, long, short) = (room.enter("a", 0), room.enter("a", 100), room.enter("a", 200));
        room.pass(long, 300, true);
        room.pass(short, 900, true);
        room.enter("a", 1000);
        room.enter("a", 1350);
        assert_eq!(room.asked(), [long], "before one that waits longer for its answer");
        room.enter("a", 1400);
        assert_eq!(room.asked(), [waiting], "as no other has been answered a second ago");
        assert_eq!(room.crowd.counters.read().evicted_flows, 2);
    }

    #[tokio::test]
    async fn who_goes_on_stays_however_long_ago_it_came() {
        let mut room = Room::new(3);
        let stream = room.enter("a", 0);
        room.pass(stream, 1, true);
        for client in 1..100u64 {
            room.enter("a", client * 100);
            room.pass(stream, client * 100, client % 2 == 0);
        }
        let asked = room.asked();
        assert!(!asked.contains(&stream), "{asked:?}");
        assert_eq!(asked, (1..98).collect::<Vec<_>>(), "and of the others the oldest each time");
    }

    #[tokio::test]
    async fn room_on_the_way_to_a_node_is_made_by_a_client_of_that_node_that_is_carried() {
        let mut room = Room::new(10);
        let (other, own, next) = (room.enter("b", 0), room.enter("a", 10), room.enter("a", 20));
        let now = room.at(100);
        let (wants, _asked) = room.crowd.enter(&"a".into(), now).unwrap();
        let mut told = wants.make_room(now).unwrap();
        assert!(told.try_recv().is_err_and(|error| error == oneshot::error::TryRecvError::Empty));
        let gone = room.seats[own].1.try_recv().unwrap().unwrap();
        gone.send(()).unwrap();
        told.await.unwrap();
        wants.make_room(now).unwrap();
        assert_eq!(room.asked(), [next]);
        assert!(wants.make_room(now).is_none(), "it does not go itself, nor does one of another node");
        let (nobody, _asked) = room.crowd.enter(&"c".into(), now).unwrap();
        assert!(nobody.make_room(now).is_none());
        assert_eq!(room.asked(), [0; 0], "not even {other}");
    }

    #[tokio::test]
    async fn nothing_is_kept_of_who_has_gone() {
        let mut room = Room::new(5);
        for client in 0..50 {
            room.enter("a", client);
        }
        assert_eq!(room.crowd.lock().members.len(), 50, "those that are about to go are known");
        room.seats.clear();
        let state = room.crowd.lock();
        assert!(state.members.is_empty() && state.all.is_empty() && state.by_node.is_empty(), "{state:?}");
    }

    #[tokio::test]
    async fn no_more_are_asked_to_go_than_can_be_waited_for() {
        let mut room = Room::new(5);
        for client in 0..(5 + LEAVING as u64) {
            room.enter("a", client);
        }
        assert!(room.crowd.enter(&"a".into(), room.at(9999)).is_none());
        room.seats.clear();
        assert!(room.crowd.enter(&"a".into(), room.at(9999)).is_some());
    }
}
