//! One kind: list it, watch it, and list it again, whatever the watch says.

use std::{
    future::pending,
    marker::PhantomData,
    pin::Pin,
    time::{Duration, SystemTime},
};

use kube::runtime::{utils::Backoff, watcher::DefaultBackoff};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tracing::{debug, info};

use super::{
    CONFIRM, Source,
    answer::{Entry, Frame, Known, ListAnswer, read_frame, read_list},
    client::{Answer, Failure, Lines},
    health::{Concern, Report, Verb, is_essential, resource},
    ledger::{Extent, Ledger, Origin, Ticket},
    pause_of, random, spread, watch_seconds,
};
use crate::{
    kube::{events::Closed, invalid::Invalid},
    model::{Event, Kind},
};

/// A watch that ends sooner did not work.
const WATCH_MINIMUM: Duration = Duration::from_secs(1);
/// What the end of a watch may be late.
const WATCH_GRACE: Duration = Duration::from_secs(15);

/// Where a kind is found.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Paths of the collection, of which the first that the API server has counts: a kind may be there in one of several versions.
    pub(super) paths: Vec<String>,
    /// A selector to do with where everything may not be seen.
    pub(super) narrower: Option<String>,
}

/// Follows all objects of one kind.
pub(super) struct Session<'a, K> {
    source: &'a Source,
    kind: Kind,
    place: Place,
    /// The path in use.
    chosen: usize,
    /// Only `place.narrower` is asked for.
    narrow: bool,
    ledger: Ledger,
    watch: Option<Watch>,
    /// A list has shown the API server since the last watch: one that is opened without it may never come to life.
    may_watch: bool,
    /// When the next list is due.
    list_at: Instant,
    /// The list that is under way was asked for too early to be the next one.
    list_again: bool,
    /// When the next attempt at a watch is due.
    watch_at: Instant,
    lists: DefaultBackoff,
    watches: DefaultBackoff,
    /// The last watch ended at once.
    in_vain: bool,
    /// The API server has not been seen since the watch began.
    out_of_sight: bool,
    invalid: Invalid,
    objects: PhantomData<K>,
}

struct Watch {
    lines: Lines,
    begun: Instant,
    /// When it should have been ended by metaServer.
    dead_at: Instant,
}

/// What became of a list: the path that gave it, the objects, and how long it took.
type Fetched = (usize, Result<(ListAnswer, Duration), Failure>);

/// A list that is under way.
struct Listing<'a> {
    ticket: Ticket,
    /// Only `place.narrower` was asked for.
    narrow: bool,
    fetched: Pin<Box<dyn Future<Output = Fetched> + Send + 'a>>,
}

/// What a session waits for.
enum Woken {
    Listed(Fetched),
    Line(Result<Option<bytes::Bytes>, Failure>),
    /// metaServer is back, or may be.
    Kicked,
    ListDue,
    WatchDue,
    WatchDead,
}

impl<'a, K: Known + Send + 'static> Session<'a, K> {
    /// `reached` is the version as of which an earlier agent knew everything, where what it knew is in force.
    pub(super) fn new(source: &'a Source, kind: Kind, place: Place, reached: Option<u64>) -> Self {
        let now = Instant::now();
        Self {
            source,
            kind,
            place,
            chosen: 0,
            narrow: false,
            ledger: Ledger::new(kind, reached),
            watch: None,
            may_watch: false,
            list_at: now,
            list_again: false,
            watch_at: now,
            lists: DefaultBackoff::default(),
            watches: DefaultBackoff::default(),
            in_vain: false,
            out_of_sight: false,
            invalid: Invalid::new(source.conditions.clone()),
            objects: PhantomData,
        }
    }

    /// Goes on until nobody receives events any more.
    pub(super) async fn follow(mut self, mut kicks: watch::Receiver<()>) -> Result<(), Closed> {
        let mut listing: Option<Listing<'a>> = None;
        loop {
            let wants_watch = self.may_watch && self.watch.is_none();
            let (watch_at, list_at, list_due) = (self.watch_at, self.list_at, listing.is_none());
            let dead_at = self.watch.as_ref().map(|watch| watch.dead_at);
            let woken = tokio::select! {
                fetched = maybe(listing.as_mut().map(|listing| &mut listing.fetched)) => Woken::Listed(fetched),
                line = maybe(self.watch.as_mut().map(|watch| Box::pin(watch.lines.next()))) => Woken::Line(line),
                Ok(()) = kicks.changed() => Woken::Kicked,
                () = sleep_until(list_at), if list_due => Woken::ListDue,
                () = sleep_until(watch_at), if wants_watch => Woken::WatchDue,
                () = maybe(dead_at.map(|at| Box::pin(sleep_until(at)))) => Woken::WatchDead,
            };
            match woken {
                Woken::Listed(fetched) => {
                    if let Some(Listing { ticket, narrow, .. }) = listing.take() {
                        self.take_list(ticket, narrow, fetched).await?;
                    }
                }
                Woken::Line(line) => self.take_line(line).await?,
                Woken::Kicked => self.list_now(),
                Woken::ListDue => {
                    let (ticket, narrow) = (self.ledger.ask(), self.narrow);
                    self.list_again = false;
                    listing = Some(Listing { ticket, narrow, fetched: Box::pin(self.fetch()) });
                }
                Woken::WatchDue => self.begin_watch().await,
                Woken::WatchDead => self.end_watch(),
            }
        }
    }

    fn list_now(&mut self) {
        self.list_at = Instant::now();
        self.list_again = true;
    }

    /// Has the next list begin so much later, unless one is wanted at once.
    fn list_in(&mut self, pause: Duration) {
        if !self.list_again {
            self.list_at = Instant::now() + pause;
        }
    }

    async fn take_list(&mut self, ticket: Ticket, narrow: bool, (path, fetched): Fetched) -> Result<(), Closed> {
        let on = Concern { kind: self.kind, verb: Verb::List };
        let (ListAnswer { mut list, problems }, took) = match fetched {
            Ok(fetched) => fetched,
            Err(failure) => {
                if failure.code() == Some(403) && self.place.narrower.is_some() && !narrow {
                    info!(kind = %self.kind, "not all may be listed; asking for this node's alone");
                    self.narrow = true;
                    self.list_now();
                    return Ok(());
                }
                self.narrow = false;
                self.out_of_sight = true;
                self.source.note(on, failure.report(resource(self.kind), SystemTime::now()));
                let pause = pause_of(&mut self.lists);
                self.list_in(pause);
                return self.source.go_without(self.kind).await;
            }
        };
        let moved = std::mem::replace(&mut self.chosen, path) != path;
        let report = Report::of(self.kind, took, &list);
        let online = matches!(list.origin, Origin::Online(_));
        debug!(kind = %self.kind, objects = list.items.len(), origin = ?list.origin, ?took, "listed");
        if self.kind == Kind::DestinationRule && !online && !matches!(report, Report::Slow(_)) {
            // Stored, or not in the cluster at all: metaServer answers both alike.
            self.source.forget(on);
        } else {
            self.source.note(on, report);
        }
        self.lists.reset();
        if narrow && list.extent == Extent::Whole {
            list.extent = Extent::Selection;
        }
        let events = self.ledger.list(ticket, list);
        let missed = !events.is_empty();
        self.invalid.replace(&problems);
        self.send(events).await?;
        if let Some(version) = self.ledger.reached().filter(|_| online) {
            self.source.events.send(Event::Reached(self.kind, version), Instant::now().into_std()).await?;
        }
        if self.ledger.is_delivered() || !is_essential(self.kind) && (narrow || online) {
            self.source.listed.note(self.kind, &self.source.events).await?;
        }
        self.list_in(match online && self.ledger.wants_confirmation() {
            true => CONFIRM,
            false => spread(self.source.relist_period, random()),
        });
        let lost = std::mem::replace(&mut self.out_of_sight, !online) && online;
        let old = self.watch.as_ref().is_some_and(|watch| watch.begun.elapsed() > WATCH_MINIMUM);
        if moved || lost || (missed && old) {
            // It should have told of what was missed: its listener in the cloud is gone, or never was. And whether it
            // outlived a time without the cloud, nobody tells.
            debug!(kind = %self.kind, moved, lost, "watching anew");
            self.watch = None;
        }
        self.may_watch |= online;
        Ok(())
    }

    async fn take_line(&mut self, line: Result<Option<bytes::Bytes>, Failure>) -> Result<(), Closed> {
        let on = Concern { kind: self.kind, verb: Verb::Watch };
        let broken = |this: &mut Self, failure: &Failure| {
            this.source.note(on, failure.report(resource(this.kind), SystemTime::now()));
            this.end_watch();
        };
        let line = match line {
            Ok(Some(line)) => line,
            // Regular: its time was up.
            Ok(None) => {
                self.end_watch();
                return Ok(());
            }
            Err(failure) => {
                broken(self, &failure);
                return Ok(());
            }
        };
        match read_frame::<K>(&line, self.kind) {
            Ok(Frame::Upsert(Entry { item, subject, problem })) => {
                self.invalid.report(&subject, problem.as_deref());
                let event = self.ledger.upsert(item);
                self.send(event).await
            }
            Ok(Frame::Deleted(Entry { item, subject, .. })) => {
                let event = self.ledger.delete(&item);
                if event.is_some() {
                    self.invalid.report(&subject, None);
                }
                self.send(event).await
            }
            Ok(Frame::Error { code, message }) => {
                // A 500 is how metaServer ends a watch, with "stop to watch sqlite/meta_v2".
                debug!(kind = %self.kind, code, message, "metaServer has ended the watch");
                self.end_watch();
                Ok(())
            }
            Ok(Frame::Other) => Ok(()),
            Err(what) => {
                broken(self, &Failure::Unreadable(what));
                Ok(())
            }
        }
    }

    /// Every end of a watch is followed by a list, as it may have ended long ago without a word.
    fn end_watch(&mut self) {
        let Some(watch) = self.watch.take() else { return };
        self.may_watch = false;
        self.list_now();
        if watch.begun.elapsed() >= WATCH_MINIMUM {
            self.in_vain = false;
            self.watches.reset();
        } else if std::mem::replace(&mut self.in_vain, true) {
            // One may have been bad luck. More are a metaServer that ends every watch, which must not make this a tight loop.
            self.list_at += pause_of(&mut self.watches);
        }
        self.watch_at = self.list_at;
        // More may be allowed by now.
        self.narrow = false;
    }

    async fn begin_watch(&mut self) {
        let on = Concern { kind: self.kind, verb: Verb::Watch };
        let seconds = watch_seconds(random());
        let selector = self.selector("&");
        let path = self.place.paths.get(self.chosen).map_or("/", String::as_str);
        // No resourceVersion, which is ignored; no bookmarks, which never come; and no two watches alike, as the end of one
        // of two that are would be the end of both in the cloud.
        match self.source.client.watch(&format!("{path}?watch=true&timeoutSeconds={seconds}{selector}")).await {
            Ok(lines) => {
                self.source.forget(on);
                let begun = Instant::now();
                let dead_at = begun + Duration::from_secs(seconds.into()) + WATCH_GRACE;
                self.watch = Some(Watch { lines, begun, dead_at });
            }
            Err(failure) => {
                self.source.note(on, failure.report(resource(self.kind), SystemTime::now()));
                self.watch_at = Instant::now() + pause_of(&mut self.watches);
            }
        }
    }

    /// Asks the paths in turn until one is answered by the API server; else what was stored first counts.
    fn fetch(&self) -> impl Future<Output = Fetched> + Send + 'a + use<'a, K> {
        let (source, kind, selector) = (self.source, self.kind, self.selector("?"));
        let (paths, first) = (self.place.paths.clone(), self.chosen);
        async move {
            let mut next_best: Option<Fetched> = None;
            let last = paths.len().saturating_sub(1);
            let mut order: Vec<(usize, String)> = paths.into_iter().enumerate().collect();
            // The one that was right last time saves asking the others.
            order.sort_by_key(|(index, _)| *index != first);
            for (index, path) in order {
                let fetched = match source.client.get(&format!("{path}{selector}")).await {
                    Ok(Answer { body, took }) => {
                        read_list::<K>(&body, kind).map(|listed| (listed, took)).map_err(Failure::Unreadable)
                    }
                    Err(failure) => Err(failure),
                };
                let stored =
                    |fetched: &Fetched| fetched.1.as_ref().is_ok_and(|(listed, _)| !listed.list.items.is_empty());
                match &fetched {
                    Ok((listed, _)) if matches!(listed.list.origin, Origin::Online(_)) => return (index, fetched),
                    // Not in this version.
                    Err(failure) if failure.code() == Some(404) && last > 0 => {}
                    Err(_) => return (index, fetched),
                    Ok(_) if next_best.as_ref().is_some_and(stored) => {}
                    Ok(_) => {
                        let better = (index, fetched);
                        if next_best.is_none() || stored(&better) {
                            next_best = Some(better);
                        }
                    }
                }
            }
            next_best.unwrap_or_else(|| (first, Ok((ListAnswer::nothing(), Duration::ZERO))))
        }
    }

    fn selector(&self, begin: &str) -> String {
        match &self.place.narrower {
            Some(selector) if self.narrow => format!("{begin}fieldSelector={selector}"),
            Some(_) | None => String::new(),
        }
    }

    async fn send(&mut self, events: impl IntoIterator<Item = Event>) -> Result<(), Closed> {
        let now = Instant::now().into_std();
        for event in events {
            let replaced = matches!(event, Event::Replace(..));
            self.source.events.send(event, now).await?;
            if replaced && self.kind == Kind::Endpoints {
                // What another source may have known by them.
                self.source.events.send(Event::Replace(Kind::EndpointSlice, Vec::new()), now).await?;
            }
        }
        self.source.state.count(self.kind, self.ledger.len());
        Ok(())
    }
}

/// Waits for a future that may not be there, in which case it never comes.
async fn maybe<F: Future + Unpin>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}
