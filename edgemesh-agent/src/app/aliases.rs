//! Other sites' pods: what has to be in place before the first table, and what follows the tables.

use std::{
    future::pending,
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    sync::watch,
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};
use tracing::info;

use crate::{
    alias::{AliasFile, AliasRanges, Book, Meetings, Reach, Target},
    conditions::Conditions,
    config::AgentConfig,
    dataplane::ebpf::{divert_aliases, is_diverted, leave_aliases},
    lifecycle::Tasks,
    mesh::Threads,
    model::{Builder, ServiceTable},
    net::{
        Device,
        route::{self, Routes},
    },
    proxy::{Dial, Proxy, Sight, Sockets},
};

const NOT_AVAILABLE: &str = "AliasesNotAvailable";
const EXHAUSTED: &str = "AliasesExhausted";
const LOST: &str = "AliasesLost";
const NOT_KEPT: &str = "AliasesNotKept";
const LEFT_BEHIND: &str = "AliasesLeftBehind";

/// How long the first reading of the routes may take before the first table is made without.
const FIRST_ROUTES: Duration = Duration::from_secs(2);
/// Changes that come together are written together.
const SETTLE: Duration = Duration::from_millis(250);
/// From one writing to the next, at least.
const PACE: Duration = Duration::from_secs(2);
/// How often aliases that have rested are let go of.
const TICK: Duration = Duration::from_secs(60);

/// How pods of other sites are reached, as far as it does not depend on what the tunnel knows.
pub(super) struct Detour {
    ranges: AliasRanges,
    book: Book,
    file: Option<AliasFile>,
    /// None where the kernel cannot give this agent what is sent to aliases, which is a condition.
    sockets: Option<Sockets>,
    conditions: Conditions,
}

/// What the builder's task has to follow beside the source.
pub(super) struct Ways {
    routes: watch::Receiver<Option<Arc<Routes>>>,
    meetings: watch::Receiver<Arc<Meetings>>,
    keeper: Option<Keeper>,
    conditions: Conditions,
    available: bool,
    next_tick: tokio::time::Instant,
}

/// What has changed that decides how endpoints are reached.
pub(super) enum Change {
    Routes(Arc<Routes>),
    Meetings(Arc<Meetings>),
    /// Nothing but the time.
    Time,
}

impl Detour {
    /// Restores the aliases given out before and has the kernel give this agent what is sent to any; None without a tunnel.
    ///
    /// What is missing is a condition and never an end: pods of other sites are then refused at once.
    pub(super) async fn prepare(
        config: &AgentConfig,
        device: Option<&Device>,
        threads: Option<&Threads>,
        conditions: &Conditions,
    ) -> Option<Self> {
        let Some(threads) = threads else {
            take_back(config, conditions).await;
            return None;
        };
        let ranges = config.common.aliases;
        let file = config.common.alias_file.clone().map(AliasFile::new);
        let second = config.common.bridge_device_ipv6.map(IpAddr::V6);
        let sources: Vec<IpAddr> =
            device.into_iter().flat_map(|device| [Some(device.address), second]).flatten().collect();
        let sockets = match divert(config, ranges, &sources, threads).await {
            Ok(sockets) => Some(sockets),
            Err(why) => {
                let message = format!("{why}; pods that only the tunnel reaches are refused");
                conditions.raise(NOT_AVAILABLE, "", message, SystemTime::now());
                None
            }
        };
        let now = Instant::now();
        let mut book = if sockets.is_some() { Book::new(ranges, now) } else { Book::closed(ranges, now) };
        if let Some(file) = file.clone() {
            book.restore(restore(file, conditions).await);
        }
        if sockets.is_some() {
            info!(v4 = %ranges.v4, v6 = %ranges.v6, known = book.aliases().len(), "pods of other sites have aliases");
        }
        Some(Self { ranges, book, file, sockets, conditions: conditions.clone() })
    }

    /// Gives the builder its part and starts following routes. Connections are carried once [`Carrying::start`] is called.
    pub(super) fn enter(
        self,
        builder: Builder,
        config: &AgentConfig,
        node: &str,
        meetings: watch::Receiver<Arc<Meetings>>,
        tasks: &Tasks,
    ) -> io::Result<(Builder, Ways, Carrying)> {
        let (tell, routes) = watch::channel(None);
        route::follow(tell, &self.conditions, tasks)?;
        let reach = Reach::new(node, self.ranges, config.tunnel.overrides.clone());
        let builder = builder.with_detours(reach, self.book);
        let available = self.sockets.is_some();
        let written = builder.kept_aliases().map_or(0, |(revision, _)| revision);
        let ways = Ways {
            routes,
            meetings,
            keeper: self.file.map(|file| Keeper::new(file, written, self.conditions.clone())),
            conditions: self.conditions,
            available,
            next_tick: tokio::time::Instant::now() + TICK,
        };
        let sight = Sight { ranges: self.ranges, available, counters: Arc::default() };
        Ok((builder, ways, Carrying { sockets: self.sockets, sight }))
    }
}

/// The sockets that get what is sent to aliases, until something carries it.
pub(super) struct Carrying {
    sockets: Option<Sockets>,
    sight: Sight,
}

impl Carrying {
    /// Carries what is sent to aliases by `dial`, on the threads of the tunnel.
    pub(super) fn start<D: Dial>(
        self,
        tables: watch::Receiver<Arc<ServiceTable>>,
        dial: Arc<D>,
        conditions: &Conditions,
        tasks: &Tasks,
        threads: &Threads,
    ) -> Sight {
        if let Some(sockets) = self.sockets {
            let _there = threads.handle().enter();
            let counters = Arc::clone(&self.sight.counters);
            Proxy { tables, dial, counters, conditions: conditions.clone() }.start(sockets, tasks);
        }
        self.sight
    }
}

impl Ways {
    /// Waits for the routes to have been read once, and tells the builder of them: without, every pod would seem to need
    /// an alias.
    pub(super) async fn begin(&mut self, builder: &mut Builder) {
        builder.tell_time(Instant::now());
        let known = self.routes.wait_for(Option::is_some);
        let known = match timeout(FIRST_ROUTES, known).await {
            Ok(Ok(routes)) => routes.clone(),
            // Conditions say why.
            Ok(Err(_)) | Err(_) => None,
        };
        if let Some(routes) = known {
            builder.follow_reach(|reach| reach.with_routes(routes));
        }
        let meetings = Arc::clone(&self.meetings.borrow_and_update());
        builder.follow_reach(|reach| reach.with_meetings(meetings));
    }

    /// The next change. Can be dropped at any time.
    pub(super) async fn changed(&mut self) -> Change {
        tokio::select! {
            routes = next(&mut self.routes) => match routes {
                Some(routes) => Change::Routes(routes),
                None => Change::Time,
            },
            meetings = next(&mut self.meetings) => Change::Meetings(meetings),
            () = Keeper::due(&mut self.keeper) => Change::Time,
            () = tokio::time::sleep_until(self.next_tick) => {
                self.next_tick = tokio::time::Instant::now() + TICK;
                Change::Time
            }
        }
    }

    /// Tells the builder of a change.
    pub(super) fn apply(&mut self, change: Change, builder: &mut Builder) {
        builder.tell_time(Instant::now());
        match change {
            Change::Routes(routes) => builder.follow_reach(|reach| reach.with_routes(routes)),
            Change::Meetings(meetings) => builder.follow_reach(|reach| reach.with_meetings(meetings)),
            Change::Time => {}
        }
    }

    /// Looks at a new table, or at the one there was.
    pub(super) fn follow(&mut self, builder: &Builder, table: Option<&ServiceTable>) {
        if let Some(table) = table
            && self.available
        {
            if table.without_alias == 0 {
                self.conditions.clear(EXHAUSTED, "");
            } else {
                let message = format!(
                    "no alias is left for {} endpoints of other sites and addresses of nodes, which are refused; choose a larger \
                     commonConfig.aliasCIDR (an alias that is nobody's any more rests for an hour)",
                    table.without_alias
                );
                self.conditions.raise(EXHAUSTED, "", message, SystemTime::now());
            }
        }
        if let Some(keeper) = &mut self.keeper {
            keeper.follow(builder);
        }
    }

    /// Writes what is not in the file yet.
    pub(super) async fn finish(self, builder: &Builder) {
        if let Some(keeper) = self.keeper {
            keeper.finish(builder).await;
        }
    }
}

/// The next value of a channel; never, where none comes any more.
async fn next<T: Clone>(receiver: &mut watch::Receiver<T>) -> T {
    match receiver.changed().await {
        Ok(()) => receiver.borrow_and_update().clone(),
        Err(_) => pending().await,
    }
}

/// Keeps the aliases in a file.
struct Keeper {
    file: AliasFile,
    conditions: Conditions,
    /// What is in the file.
    written: u64,
    /// When to write next, if there is anything.
    due: Option<tokio::time::Instant>,
    /// Not before.
    earliest: tokio::time::Instant,
    /// What is on its way into the file, and whether it got there.
    writing: Option<(u64, JoinHandle<bool>)>,
}

impl Keeper {
    fn new(file: AliasFile, written: u64, conditions: Conditions) -> Self {
        Self { file, conditions, written, due: None, earliest: tokio::time::Instant::now(), writing: None }
    }

    /// When there is something to do for [`Self::follow`]. Can be dropped at any time.
    async fn due(keeper: &mut Option<Self>) {
        let Some(keeper) = keeper else { return pending().await };
        if keeper.writing.is_some() {
            return keeper.wait().await;
        }
        match keeper.due {
            Some(due) => tokio::time::sleep_until(due).await,
            None => pending().await,
        }
    }

    /// Waits for what is being written.
    async fn wait(&mut self) {
        let Some((revision, writing)) = &mut self.writing else { return };
        if matches!(writing.await, Ok(true)) {
            self.written = *revision;
        }
        self.writing = None;
    }

    fn follow(&mut self, builder: &Builder) {
        let Some((revision, entries)) = builder.kept_aliases() else { return };
        let now = tokio::time::Instant::now();
        if revision == self.written {
            self.due = None;
            return;
        }
        let due = *self.due.get_or_insert_with(|| (now + SETTLE).max(self.earliest));
        // What is being written is waited for first: it may be that it has to be written again.
        if due > now || self.writing.is_some() {
            return;
        }
        let entries = entries.collect();
        self.write(revision, entries);
        (self.due, self.earliest) = (None, now + PACE);
    }

    fn write(&mut self, revision: u64, entries: Vec<(IpAddr, Target)>) {
        let (file, conditions) = (self.file.clone(), self.conditions.clone());
        let writing = spawn_blocking(move || {
            let path = file.path().display().to_string();
            match file.write(&entries) {
                Ok(()) => {
                    conditions.clear(NOT_KEPT, &path);
                    true
                }
                Err(error) => {
                    let message = format!(
                        "cannot write the aliases of other sites' pods: {error}; some may be others after a restart of the \
                         agent; see commonConfig.aliasFile"
                    );
                    conditions.raise(NOT_KEPT, path, message, SystemTime::now());
                    false
                }
            }
        });
        self.writing = Some((revision, writing));
    }

    async fn finish(mut self, builder: &Builder) {
        self.wait().await;
        let Some((revision, entries)) = builder.kept_aliases() else { return };
        if revision != self.written {
            let entries = entries.collect();
            self.write(revision, entries);
            self.wait().await;
        }
    }
}

/// Makes the ranges local and has what is sent there come to sockets of this agent.
async fn divert(
    config: &AgentConfig,
    ranges: AliasRanges,
    sources: &[IpAddr],
    threads: &Threads,
) -> Result<Sockets, String> {
    let sockets = {
        // The runtime that carries has to know them.
        let _there = threads.handle().enter();
        Sockets::bind().map_err(|error| format!("cannot make the sockets of aliases: {error}"))?
    };
    // The program comes first: until the range is local, nothing gets to it, and what else listens on this node must
    // never get what was meant for an alias.
    divert_aliases(&config.proxy.ebpf, ranges, sockets.each()).map_err(|error| error.to_string())?;
    for range in ranges.each() {
        let source = sources.iter().copied().find(|source| source.is_ipv4() == range.network().is_ipv4());
        let made = route::ensure_local(range, source).await;
        match made {
            Err(error) if range.network().is_ipv6() && error.is_unsupported() => {}
            made => made.map_err(|error| error.to_string())?,
        }
    }
    Ok(sockets)
}

/// Takes back what an earlier agent with a tunnel has left. In the order of [`divert`] reversed, and for the same reason.
async fn take_back(config: &AgentConfig, conditions: &Conditions) {
    if !is_diverted(&config.proxy.ebpf) {
        return;
    }
    let removed = match route::remove_local().await {
        Ok(_) => leave_aliases(&config.proxy.ebpf).map(drop).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match removed {
        Ok(()) => info!("modules.edgeTunnel.enable is false: the aliases of an earlier agent are gone"),
        Err(error) => {
            let message = format!("modules.edgeTunnel.enable is false, and what an earlier agent made stays: {error}");
            conditions.raise(LEFT_BEHIND, "", message, SystemTime::now());
        }
    }
}

/// What an earlier agent gave out; a file that cannot be used is renamed, and a condition.
async fn restore(file: AliasFile, conditions: &Conditions) -> Vec<(IpAddr, Target)> {
    let path = file.path().display().to_string();
    let read = spawn_blocking(move || {
        file.read().map_err(|error| {
            let moved = match file.set_aside() {
                Ok(aside) => format!("it is now {}", aside.display()),
                Err(error) => format!("it cannot be renamed ({error})"),
            };
            format!("the file of aliases cannot be used: {error}; {moved}, and nearly all aliases will be the same as before")
        })
    });
    match read.await {
        Ok(Ok(pairs)) => {
            conditions.clear(LOST, &path);
            pairs
        }
        Ok(Err(message)) => {
            conditions.raise(LOST, path, message, SystemTime::now());
            Vec::new()
        }
        Err(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{alias::Overrides, config::ServiceFilter};

    const LONG: Duration = Duration::from_secs(20);

    /// Does what the builder's task does, until there is nothing left to do or for as long.
    async fn keep(keeper: &mut Option<Keeper>, builder: &Builder, long: Duration) {
        let work = async {
            loop {
                keeper.as_mut().unwrap().follow(builder);
                Keeper::due(keeper).await;
            }
        };
        let _ = timeout(long, work).await;
    }

    #[tokio::test]
    async fn what_could_not_be_written_is_written_once_it_can_be_though_nothing_changes() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("agent");
        // In the way of the directory that the file is to be in.
        std::fs::write(&place, "").unwrap();
        let file = AliasFile::new(place.join("aliases"));
        let ranges = AliasRanges { v4: "198.18.0.0/16".parse().unwrap(), v6: "fd00:a11a::/64".parse().unwrap() };
        let mut book = Book::new(ranges, Instant::now());
        let alias = book.acquire("edge2", "10.244.1.7".parse().unwrap()).unwrap();
        let reach = Reach::new("edge1", ranges, Overrides::default());
        let builder = Builder::new(ServiceFilter::UnlabelledOnly, "edge1").with_detours(reach, book);
        let conditions = Conditions::default();
        let mut keeper = Some(Keeper::new(file.clone(), 0, conditions.clone()));
        let failing = async {
            while conditions.list().is_empty() {
                keep(&mut keeper, &builder, SETTLE).await;
            }
        };
        timeout(LONG, failing).await.unwrap();
        std::fs::remove_file(&place).unwrap();
        std::fs::create_dir(&place).unwrap();
        let written = async {
            while !file.read().is_ok_and(|kept| kept.iter().any(|(kept, _)| *kept == alias)) {
                keep(&mut keeper, &builder, SETTLE).await;
            }
        };
        timeout(LONG, written).await.unwrap();
        keep(&mut keeper, &builder, 2 * SETTLE).await;
        assert!(conditions.list().is_empty());
        let keeper = keeper.unwrap();
        assert!(keeper.due.is_none() && keeper.writing.is_none(), "and then there is nothing to do");
    }
}
