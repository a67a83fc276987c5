//! The eBPF data plane: keeps the maps in step with the tables.
//!
//! An update never shows a half-written set: up to eight backends are swapped with their frontend in one map update,
//! a larger set is written under a new generation first and then switched to, and the old generation is dropped once no
//! running program can hold it.

mod adopt;
mod aliases;
mod counters;
pub mod hooks;
mod inspect;
mod log;
mod mounts;
mod open;
mod pins;
pub mod probe;
mod ranges;
mod remove;
mod ring;
mod sets;
mod stale;
mod sys;
mod tap;
mod tc;
mod wanted;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use aya::maps::MapError;
use edgemesh_common::{
    Addr,
    layout::{Backend, CounterKey, Counters, Frontend, FrontendKey, INLINE_BACKENDS, SCOPE_HOST, TCP, UDP},
};
use tracing::warn;

use self::{
    sets::Set,
    wanted::{Wanted, addr_of, keys, same, socket_addr, wanted},
};
pub use aliases::{AliasError, divert_aliases, is_diverted, leave_aliases};
pub use open::OpenError;
pub use remove::{CANARY_CGROUP, is_pinned, remove_all, remove_scratch};
pub(crate) use ring::choice_of;
pub use tc::{InterfaceSight, Sight as TrafficSight, remove_filters};

/// Whether this build has the eBPF programs in it.
pub fn is_built_in() -> bool {
    open::OBJECT.is_some()
}

use super::{Count, Dataplane, Error, InForce, Room};
use crate::{
    alias::AliasRanges,
    conditions::Conditions,
    config::EbpfConfig,
    model::{Change, FrontendAddr, ServiceEntry, ServiceTable},
    net::sock_diag,
};

/// Where the machine's own bpffs is.
const SYS_FS_BPF: &str = "/sys/fs/bpf";

/// How long an abandoned set stays in its map. A program runs for microseconds; a second is far beyond the longest.
const GRACE: Duration = Duration::from_secs(1);

/// The programs, attached, and their maps.
pub struct Ebpf {
    opened: open::Opened,
    /// How many frontends the maps held at the start.
    adopted: usize,
    /// What the maps hold, as far as updates need to know.
    installed: HashMap<FrontendKey, Installed>,
    /// How many frontends that own their whole address each address in `SERVICE_ADDRS` has.
    addrs: HashMap<Addr, usize>,
    /// The key of each service id in use.
    services: HashMap<u32, FrontendKey>,
    last_service: u32,
    /// The generation of the frontend written last. Begins at the time, so that it differs from run to run and a
    /// socket's memory of a frontend that was removed does not fit one that came in its place.
    last_generation: u32,
    /// None where the system refused its thread, which is a condition.
    stale: Option<stale::StaleSockets>,
    /// Frontends of the agent itself, which are no Service's.
    reserved: BTreeSet<FrontendKey>,
    keeper: hooks::Keeper,
    /// What to delete, and from when on; in order of time.
    abandoned: VecDeque<(Instant, Abandoned)>,
}

#[derive(Debug, Default)]
struct Installed {
    set: Set,
    /// The highest [`Backend::id`] given out so far.
    last_backend: u32,
    /// What backends that are gone had counted, so that the frontend's sum never goes down.
    retired: Counters,
    affinity_seconds: u32,
    /// What is in `SOURCE_RANGES` for it.
    ranges: BTreeSet<ranges::Range>,
    /// See [`Wanted::owns_address`].
    owns_address: bool,
}

impl Installed {
    fn is(&self, wanted: &Wanted<'_>) -> bool {
        let backends = &self.set.backends;
        self.set.flags == wanted.flags
            && self.affinity_seconds == wanted.affinity_seconds
            && (wanted.source_ranges.is_empty() && self.ranges.is_empty()
                || self.ranges == ranges::ranges(wanted.source_ranges))
            && backends.len() == wanted.backends.len()
            && backends.iter().zip(wanted.backends).all(|(have, want)| same(have, want))
    }
}

/// An entry that nothing refers to any more.
#[derive(Debug)]
enum Abandoned {
    Set(Set),
    Counter(CounterKey),
    /// The id may be given out again only when nothing keyed by it is left.
    Service(u32),
}

impl Abandoned {
    fn counter(service: u32, backend: u32) -> Self {
        Self::Counter(CounterKey { service, backend })
    }
}

impl Ebpf {
    /// Loads and attaches the programs, adopting maps and links that an earlier agent left.
    ///
    /// From here on translation is in force: by the adopted maps, or by empty ones, which leave all traffic alone. Where
    /// an agent with another map layout was here, its own goes on until the first table is in the new maps.
    ///
    /// With `aliases`, packets to these ranges are dropped where they come in from outside.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn open(config: &EbpfConfig, aliases: Option<AliasRanges>, conditions: &Conditions) -> Result<Self, OpenError> {
        let mut opened = open::open(config, aliases)?;
        let stale = opened.udp_sockets.take().map(|sockets| stale::StaleSockets::new(sockets, conditions.clone()));
        let stale = stale.and_then(|started| match started {
            Ok(stale) => Some(stale),
            Err(error) => {
                let message =
                    format!("cannot start the thread that ends UDP sockets of backends that are gone: {error}");
                conditions.raise("StaleUdpSockets", "", message, SystemTime::now());
                None
            }
        });
        let mut this = Self {
            opened,
            adopted: 0,
            installed: HashMap::new(),
            addrs: HashMap::new(),
            services: HashMap::new(),
            stale,
            last_service: 0,
            last_generation: SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs() as u32),
            reserved: BTreeSet::new(),
            keeper: hooks::Keeper::default(),
            abandoned: VecDeque::new(),
        };
        this.adopt()?;
        this.adopted = this.installed.len();
        Ok(this)
    }

    /// The cgroup directory whose processes are served.
    pub fn cgroup(&self) -> &Path {
        &self.opened.cgroup
    }

    /// Puts the canary's frontend in force, TCP and UDP, each with its one backend. From then on it is no Service's: tables
    /// neither change it nor take it away.
    ///
    /// # Errors
    ///
    /// The map is full, or a system call failed.
    pub fn put_canary(
        &mut self,
        frontend: SocketAddr,
        tcp: SocketAddr,
        udp: SocketAddr,
        now: Instant,
    ) -> Result<(), Error> {
        for (proto, backend) in [(TCP, tcp), (UDP, udp)] {
            let key = FrontendKey::new(frontend.ip().into(), frontend.port().to_be_bytes(), proto);
            let adopted = self.installed.contains_key(&key);
            let backends = &[backend];
            let wanted = Wanted {
                backends,
                owns_address: false,
                affinity: 0,
                affinity_seconds: 0,
                flags: 0,
                source_ranges: &[],
            };
            self.put(key, wanted, now)?;
            self.reserved.insert(key);
            self.adopted = self.adopted.saturating_sub(usize::from(adopted));
        }
        Ok(())
    }

    /// Counts the UDP sockets that were ended because their backend was gone.
    pub fn ended_sockets(&self) -> Option<sock_diag::Ended> {
        self.stale.as_ref().map(stale::StaleSockets::ended)
    }

    /// How many frontends an earlier agent left in force, less those of the agent itself.
    pub fn adopted(&self) -> usize {
        if self.opened.adopted_links == 0 { 0 } else { self.adopted }
    }

    /// Puts `wanted` in force and takes `unwanted` away; goes on after errors and returns the first.
    fn sync(
        &mut self,
        wanted: BTreeMap<FrontendKey, Wanted<'_>>,
        unwanted: BTreeSet<FrontendKey>,
        now: Instant,
    ) -> Result<(), Error> {
        let mut failures = Failures::default();
        for (key, wanted) in &wanted {
            if self.reserved.contains(key) {
                continue;
            }
            if let Err(error) = self.put(*key, *wanted, now) {
                failures.add(error);
            }
        }
        for key in unwanted.iter().filter(|key| !wanted.contains_key(key)) {
            if self.reserved.contains(key) {
                continue;
            }
            if let Err(error) = self.take(key, now) {
                failures.add(error);
            }
        }
        if let Some(stale) = &mut self.stale {
            stale.flush();
        }
        failures.into_result()
    }

    /// Adds what a Service asks of the maps.
    fn want<'a>(&self, entry: &'a ServiceEntry, all: &mut BTreeMap<FrontendKey, Wanted<'a>>) {
        let wanted = entry.frontends.iter().flat_map(|frontend| wanted(entry, frontend));
        all.extend(wanted.filter(|(key, _)| key.scope != SCOPE_HOST || self.opened.knows_host));
    }

    /// Makes every address with frontends known as one.
    fn know_addrs(&mut self) -> Result<(), MapError> {
        self.addrs.keys().try_for_each(|addr| self.opened.service_addrs.insert(addr, 1, 0))
    }

    fn put(&mut self, key: FrontendKey, wanted: Wanted<'_>, now: Instant) -> Result<(), Error> {
        if self.installed.get(&key).is_some_and(|old| old.is(&wanted)) {
            return self.own_address(&key, wanted.owns_address);
        }
        // Out of the book-keeping while it is compared with what takes its place.
        let old = self.installed.remove(&key);
        match self.write(key, &wanted, old.as_ref()) {
            Ok(new) => {
                if key.proto == UDP
                    && let Some(stale) = &self.stale
                {
                    new.set.backends.iter().for_each(|backend| stale.has(key, socket_addr(backend)));
                }
                self.services.insert(new.set.service, key);
                self.installed.insert(key, new);
                if let Some(old) = old {
                    self.abandon_set(key, old.set, now);
                }
                self.own_address(&key, wanted.owns_address)
            }
            Err(error) => {
                self.installed.extend(old.map(|old| (key, old)));
                Err(error)
            }
        }
    }

    /// Writes a frontend that is new, or other than `old`. After an error the old one is in force.
    fn write(&mut self, key: FrontendKey, wanted: &Wanted<'_>, old: Option<&Installed>) -> Result<Installed, Error> {
        let service = old.map_or_else(|| self.free_service(), |old| old.set.service);
        self.last_generation = self.last_generation.wrapping_add(1);
        let (generation, flags) = (self.last_generation, wanted.flags);
        let (backends, last_backend) = with_ids(old, wanted.backends);
        let mut set = Set { service, generation, flags, backends, ring: None };
        let ranges = ranges::ranges(wanted.source_ranges);
        // A range is admitted with its Service's other ones at worst for the moment until they are written, or for good
        // if they cannot be, which is tried again.
        self.admit(service, &ranges)?;
        self.write_set(&mut set, old.map(|old| &old.set))?;

        let mut value = Frontend {
            generation,
            service,
            count: set.backends.len() as u32,
            flags,
            affinity: wanted.affinity,
            affinity_seconds: wanted.affinity_seconds,
            key,
            generation_check: generation,
            ..Frontend::default()
        };
        if set.backends.len() <= INLINE_BACKENDS {
            value.inline[..set.backends.len()].copy_from_slice(&set.backends);
        }
        if let Err(error) = self.opened.frontends.insert(key, value, 0) {
            self.drop_set(&set);
            return Err(self.frontends_error(&error, &key));
        }
        if let Some(old) = old {
            self.forget_ranges(service, old.ranges.difference(&ranges).copied());
        }
        let (retired, owns_address) = old.map_or_else(Default::default, |old| (old.retired, old.owns_address));
        Ok(Installed { set, last_backend, retired, affinity_seconds: wanted.affinity_seconds, ranges, owns_address })
    }

    /// Has an installed frontend own its whole address, or no more than its port.
    fn own_address(&mut self, key: &FrontendKey, owns: bool) -> Result<(), Error> {
        let Some(installed) = self.installed.get_mut(key).filter(|installed| installed.owns_address != owns) else {
            return Ok(());
        };
        installed.owns_address = owns;
        if owns {
            let owners = self.addrs.entry(key.addr).or_insert(0);
            *owners += 1;
            if *owners == 1
                && let Err(error) = self.opened.service_addrs.insert(key.addr, 1, 0)
            {
                return Err(self.frontends_error(&error, key));
            }
        } else if let Some(owners) = self.addrs.get_mut(&key.addr) {
            *owners -= 1;
            if *owners == 0 {
                self.addrs.remove(&key.addr);
                absent_is_fine(self.opened.service_addrs.remove(&key.addr))
                    .map_err(|error| kernel("remove a Service address", &error))?;
            }
        }
        Ok(())
    }

    fn take(&mut self, key: &FrontendKey, now: Instant) -> Result<(), Error> {
        if !self.installed.contains_key(key) {
            return Ok(());
        }
        let removed = absent_is_fine(self.opened.frontends.remove(key));
        self.own_address(key, false)?;
        let Some(old) = self.installed.remove(key) else { return Ok(()) };
        let service = old.set.service;
        self.forget_ranges(service, old.ranges);
        self.abandon_set(*key, old.set, now);
        self.abandon(now, Abandoned::counter(service, 0));
        self.abandon(now, Abandoned::Service(service));
        removed.map_err(|error| kernel(&format!("remove the frontend {}", addr_of(key)), &error))
    }

    fn abandon(&mut self, now: Instant, what: Abandoned) {
        self.abandoned.push_back((now + GRACE, what));
    }

    /// Moves what a backend that is gone has counted to its frontend.
    fn retire(&mut self, key: &CounterKey) {
        let Ok(values) = self.opened.counters.get(key, 0) else { return };
        let frontend = self.services.get(&key.service);
        if let Some(installed) = frontend.and_then(|frontend| self.installed.get_mut(frontend)) {
            installed.retired = values.iter().fold(installed.retired, sum);
        }
    }

    /// An id that no map entry carries.
    fn free_service(&mut self) -> u32 {
        loop {
            self.last_service = self.last_service.wrapping_add(1);
            if self.last_service != 0 && !self.services.contains_key(&self.last_service) {
                return self.last_service;
            }
        }
    }

    fn frontends_error(&self, error: &MapError, key: &FrontendKey) -> Error {
        if is_full(error) {
            let capacity = self.opened.max_frontends;
            return Error::Full { map: "FRONTENDS", key: "maxFrontends", capacity, missing: 1 };
        }
        kernel(&format!("write the frontend {}", addr_of(key)), error)
    }

    fn backends_error(&self, error: &MapError, missing: usize) -> Error {
        if is_full(error) {
            let capacity = self.opened.max_backends;
            return Error::Full { map: "BACKENDS", key: "maxBackends", capacity, missing };
        }
        kernel("write a backend", error)
    }
}

impl Dataplane for Ebpf {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn replace(&mut self, table: &ServiceTable, now: Instant) -> Result<(), Error> {
        let mut all = BTreeMap::new();
        for entry in &table.services {
            self.want(entry, &mut all);
        }
        let unwanted = self.installed.keys().copied().collect();
        let result = self.sync(all, unwanted, now);
        // What `put` could not make known it does not try again: its frontend is there, and unchanged.
        let known = self.know_addrs().map_err(|error| kernel("write the Service addresses", &error));
        let result = result.and(known);
        // What found no room has none in the maps of an earlier layout's size either; all else is better followed.
        if !self.opened.attached && !matches!(result, Err(Error::Kernel { .. })) {
            let attached = self.opened.attach();
            attached.map_err(|error| Error::Kernel {
                attempt: "put the programs in force".to_owned(),
                error: error.to_string(),
            })?;
        }
        result
    }

    fn apply(&mut self, changes: &[Change<'_>], now: Instant) -> Result<(), Error> {
        let (mut all, mut unwanted) = (BTreeMap::new(), BTreeSet::new());
        for change in changes {
            let (old, new) = match change {
                Change::Added(new) => (None, Some(new)),
                Change::Removed(old) => (Some(old), None),
                Change::Changed { old, new } => (Some(old), Some(new)),
            };
            unwanted.extend(old.into_iter().flat_map(|entry| &entry.frontends).flat_map(keys));
            if let Some(new) = new {
                self.want(new, &mut all);
            }
        }
        self.sync(all, unwanted, now)
    }

    fn maintain(&mut self, now: Instant) {
        if let Some(stale) = &mut self.stale {
            stale.maintain(now);
        }
        self.opened.keep_attached(&mut self.keeper);
        while self.abandoned.front().is_some_and(|(due, _)| *due <= now) {
            let Some((_, what)) = self.abandoned.pop_front() else { return };
            match what {
                Abandoned::Set(set) => self.drop_set(&set),
                Abandoned::Counter(key) => {
                    self.retire(&key);
                    if let Err(error) = absent_is_fine(self.opened.counters.remove(&key)) {
                        warn!("cannot drop abandoned counters: {error}");
                    }
                }
                Abandoned::Service(service) => {
                    self.services.remove(&service);
                }
            }
        }
    }

    fn counters(&mut self) -> Result<Vec<Count>, Error> {
        self.read_counters()
    }

    fn rooms(&self) -> Vec<Room> {
        self.count_rooms()
    }

    fn inspect(&mut self, at: &FrontendAddr, netns: Option<u64>) -> Result<InForce, Error> {
        self.read_back(at, netns)
    }
}

fn sum(a: Counters, b: &Counters) -> Counters {
    Counters { connects: a.connects + b.connects, datagrams: a.datagrams + b.datagrams, refused: a.refused + b.refused }
}

/// Keeps the ids of backends that stay and gives new ones to the others; returns the highest id, too.
///
/// Ids count up for as long as the frontend is there, so that counters about to be dropped are never a new backend's.
fn with_ids(old: Option<&Installed>, wanted: &[SocketAddr]) -> (Vec<Backend>, u32) {
    let (known, mut last): (&[Backend], u32) = old.map_or((&[], 0), |old| (&old.set.backends, old.last_backend));
    let known: HashMap<(Addr, [u8; 2]), u32> = known.iter().map(|b| ((b.addr, b.port), b.id)).collect();
    let backends = wanted
        .iter()
        .map(|at| {
            let (addr, port) = (Addr::from(at.ip()), at.port().to_be_bytes());
            let id = known.get(&(addr, port)).copied().unwrap_or_else(|| {
                last += 1;
                last
            });
            Backend { addr, port, pad: 0, id }
        })
        .collect();
    (backends, last)
}

fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

fn is_full(error: &MapError) -> bool {
    matches!(error, MapError::SyscallError(error) if error.io_error.raw_os_error() == Some(libc::E2BIG))
}

fn kernel(attempt: &str, error: &MapError) -> Error {
    let error = if let MapError::SyscallError(error) = error { error.io_error.to_string() } else { error.to_string() };
    Error::Kernel { attempt: attempt.to_owned(), error }
}

/// Many failures as one error: lack of room is added up, anything else is told first.
#[derive(Default)]
struct Failures {
    full: Option<Error>,
    kernel: Option<Error>,
}

impl Failures {
    fn add(&mut self, error: Error) {
        match (error, &mut self.full) {
            (Error::Full { missing: more, .. }, Some(Error::Full { missing, .. })) => *missing += more,
            (error @ Error::Full { .. }, full) => *full = Some(error),
            (error @ Error::Kernel { .. }, _) => {
                self.kernel.get_or_insert(error);
            }
        }
    }

    fn into_result(self) -> Result<(), Error> {
        match self.kernel.or(self.full) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}
