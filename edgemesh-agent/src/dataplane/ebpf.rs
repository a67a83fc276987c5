//! The eBPF data plane: keeps the maps in step with the tables.
//!
//! An update never shows a half-written set: up to eight backends are swapped with their frontend in one map update,
//! a larger set is written under a new generation first and then switched to, and the old generation is dropped once no
//! running program can hold it.

mod adopt;
mod log;
mod mounts;
mod open;
mod remove;
mod stale;
mod sys;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    net::{IpAddr, SocketAddr},
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use aya::maps::MapError;
use edgemesh_common::{
    Addr,
    layout::{Backend, BackendKey, CounterKey, Counters, Frontend, FrontendKey, INLINE_BACKENDS, TCP, UDP},
};
use tracing::warn;

pub use open::OpenError;
pub use remove::{is_pinned, remove_all};

/// Whether this build has the eBPF programs in it.
pub fn is_built_in() -> bool {
    open::OBJECT.is_some()
}

use super::{Count, Dataplane, Error};
use crate::{
    conditions::Conditions,
    config::EbpfConfig,
    model::{self, Change, FrontendAddr, FrontendKind, Protocol, ServiceTable},
    net::sock_diag,
};

/// Where the machine's own bpffs is.
const SYS_FS_BPF: &str = "/sys/fs/bpf";

/// How long an abandoned set stays in its map. A program runs for microseconds; a second is far beyond the longest.
const GRACE: Duration = Duration::from_secs(1);

/// The programs, attached, and their maps.
pub struct Ebpf {
    opened: open::Opened,
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
    /// What to delete, and from when on; in order of time.
    abandoned: VecDeque<(Instant, Abandoned)>,
}

#[derive(Debug, Default)]
struct Installed {
    service: u32,
    generation: u32,
    backends: Vec<Backend>,
    /// The highest [`Backend::id`] given out so far.
    last_backend: u32,
    /// What backends that are gone had counted, so that the frontend's sum never goes down.
    retired: Counters,
    /// See [`Wanted::owns_address`].
    owns_address: bool,
}

/// What a frontend is to be.
#[derive(Clone, Copy, Debug)]
struct Wanted<'a> {
    backends: &'a [SocketAddr],
    /// Whether all other ports of its address are refused. Only a ClusterIP belongs to its Service alone: a node has
    /// other ports than node ports, and what else listens on an external IP is not for Kubernetes to say.
    owns_address: bool,
}

impl<'a> Wanted<'a> {
    /// None for frontends that the programs cannot serve.
    fn of(frontend: &'a model::Frontend) -> Option<(FrontendKey, Self)> {
        // The programs do not ask whose 127.0.0.1 it is, and a pod's is its own.
        let key = key_of(&frontend.at).filter(|_| !frontend.host_only())?;
        Some((key, Self { backends: &frontend.backends, owns_address: frontend.kind == FrontendKind::ClusterIp }))
    }
}

/// An entry that nothing refers to any more.
#[derive(Debug)]
enum Abandoned {
    Set {
        service: u32,
        generation: u32,
        count: u32,
    },
    Counter(CounterKey),
    /// The id may be given out again only when nothing keyed by it is left.
    Service(u32),
}

impl Ebpf {
    /// Loads and attaches the programs, adopting maps and links that an earlier agent left.
    ///
    /// From here on translation is in force: by the adopted maps, or by empty ones, which leave all traffic alone.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn open(config: &EbpfConfig, conditions: &Conditions) -> Result<Self, OpenError> {
        let mut opened = open::open(config)?;
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
            installed: HashMap::new(),
            addrs: HashMap::new(),
            services: HashMap::new(),
            stale,
            last_service: 0,
            last_generation: SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_secs() as u32),
            abandoned: VecDeque::new(),
        };
        this.adopt()?;
        Ok(this)
    }

    /// The cgroup directory whose processes are served.
    pub fn cgroup(&self) -> &Path {
        &self.opened.cgroup
    }

    /// Counts the UDP sockets that were ended because their backend was gone.
    pub fn ended_sockets(&self) -> Option<sock_diag::Ended> {
        self.stale.as_ref().map(stale::StaleSockets::ended)
    }

    /// How many frontends an earlier agent left in force.
    pub fn adopted(&self) -> usize {
        if self.opened.adopted_links == 0 { 0 } else { self.installed.len() }
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
            if let Err(error) = self.put(*key, *wanted, now) {
                failures.add(error);
            }
        }
        for key in unwanted.iter().filter(|key| !wanted.contains_key(key)) {
            if let Err(error) = self.take(key, now) {
                failures.add(error);
            }
        }
        if let Some(stale) = &mut self.stale {
            stale.flush();
        }
        failures.into_result()
    }

    /// Makes every address with frontends known as one.
    fn know_addrs(&mut self) -> Result<(), MapError> {
        self.addrs.keys().try_for_each(|addr| self.opened.service_addrs.insert(addr, 1, 0))
    }

    fn put(&mut self, key: FrontendKey, wanted: Wanted<'_>, now: Instant) -> Result<(), Error> {
        let (backends, old) = (wanted.backends, self.installed.get(&key));
        if let Some(old) = old
            && old.backends.len() == backends.len()
            && old.backends.iter().zip(backends).all(|(have, want)| same(have, want))
        {
            return self.own_address(&key, wanted.owns_address);
        }
        let (service, retired, owns_address) = match old {
            Some(old) => (old.service, old.retired, old.owns_address),
            None => (self.free_service(), Counters::default(), false),
        };
        self.last_generation = self.last_generation.wrapping_add(1);
        let generation = self.last_generation;
        let (backends, last_backend) = with_ids(self.installed.get(&key), backends);
        let count = backends.len() as u32;
        let mut value =
            Frontend { generation, service, count, key, generation_check: generation, ..Frontend::default() };
        if backends.len() <= INLINE_BACKENDS {
            value.inline[..backends.len()].copy_from_slice(&backends);
        } else {
            for (index, backend) in (0u32..).zip(&backends) {
                let place = BackendKey { service, generation, index };
                if let Err(error) = self.opened.backends.insert(place, backend, 0) {
                    // The frontend stays at its old set. Nobody has seen the new one, so it can go at once.
                    self.drop_set(service, generation, index);
                    return Err(self.backends_error(&error, count - index));
                }
            }
        }
        if let Err(error) = self.opened.frontends.insert(key, value, 0) {
            if backends.len() > INLINE_BACKENDS {
                self.drop_set(service, generation, count);
            }
            return Err(self.frontends_error(&error, &key));
        }

        // The new set is in force; the rest is book-keeping.
        if key.proto == UDP
            && let Some(stale) = &self.stale
        {
            backends.iter().for_each(|backend| stale.has(service, socket_addr(backend)));
        }
        let new = Installed { service, generation, backends, last_backend, retired, owns_address };
        match self.installed.insert(key, new) {
            None => {
                self.services.insert(service, key);
            }
            Some(old) => self.abandon_old(key, &old, now),
        }
        self.own_address(&key, wanted.owns_address)
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

    /// Drops what a replaced set leaves behind: its places, and the counters of backends that are gone.
    fn abandon_old(&mut self, key: FrontendKey, old: &Installed, now: Instant) {
        if old.backends.len() > INLINE_BACKENDS {
            let count = old.backends.len() as u32;
            self.abandon(now, Abandoned::Set { service: old.service, generation: old.generation, count });
        }
        let kept: BTreeSet<u32> =
            self.installed.get(&key).into_iter().flat_map(|new| &new.backends).map(|backend| backend.id).collect();
        for backend in old.backends.iter().filter(|backend| !kept.contains(&backend.id)) {
            self.abandon(now, Abandoned::Counter(CounterKey { service: old.service, backend: backend.id }));
            if key.proto == UDP
                && let Some(stale) = &mut self.stale
            {
                stale.lost(old.service, socket_addr(backend), now);
            }
        }
    }

    fn take(&mut self, key: &FrontendKey, now: Instant) -> Result<(), Error> {
        if !self.installed.contains_key(key) {
            return Ok(());
        }
        let removed = absent_is_fine(self.opened.frontends.remove(key));
        self.own_address(key, false)?;
        let Some(old) = self.installed.remove(key) else { return Ok(()) };
        self.abandon_old(*key, &old, now);
        self.abandon(now, Abandoned::Counter(CounterKey { service: old.service, backend: 0 }));
        self.abandon(now, Abandoned::Service(old.service));
        removed.map_err(|error| kernel(&format!("remove the frontend {}", addr_of(key)), &error))
    }

    fn abandon(&mut self, now: Instant, what: Abandoned) {
        self.abandoned.push_back((now + GRACE, what));
    }

    fn drop_set(&mut self, service: u32, generation: u32, count: u32) {
        for index in 0..count {
            let place = BackendKey { service, generation, index };
            if let Err(error) = absent_is_fine(self.opened.backends.remove(&place)) {
                warn!("cannot drop an abandoned backend: {error}");
            }
        }
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

    fn backends_error(&self, error: &MapError, missing: u32) -> Error {
        if is_full(error) {
            let capacity = self.opened.max_backends;
            return Error::Full { map: "BACKENDS", key: "maxBackends", capacity, missing: missing as usize };
        }
        kernel("write a backend", error)
    }
}

impl Dataplane for Ebpf {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn replace(&mut self, table: &ServiceTable, now: Instant) -> Result<(), Error> {
        let mut wanted = BTreeMap::new();
        for frontend in table.services.iter().flat_map(|entry| &entry.frontends) {
            wanted.extend(Wanted::of(frontend));
        }
        let unwanted = self.installed.keys().copied().collect();
        let result = self.sync(wanted, unwanted, now);
        // What `put` could not make known it does not try again: its frontend is there, and unchanged.
        let known = self.know_addrs().map_err(|error| kernel("write the Service addresses", &error));
        result.and(known)
    }

    fn apply(&mut self, changes: &[Change<'_>], now: Instant) -> Result<(), Error> {
        let (mut wanted, mut unwanted) = (BTreeMap::new(), BTreeSet::new());
        for change in changes {
            let (old, new) = match change {
                Change::Added(new) => (None, Some(new)),
                Change::Removed(old) => (Some(old), None),
                Change::Changed { old, new } => (Some(old), Some(new)),
            };
            unwanted.extend(old.into_iter().flat_map(|e| &e.frontends).filter_map(|f| key_of(&f.at)));
            for frontend in new.into_iter().flat_map(|entry| &entry.frontends) {
                wanted.extend(Wanted::of(frontend));
            }
        }
        self.sync(wanted, unwanted, now)
    }

    fn maintain(&mut self, now: Instant) {
        if let Some(stale) = &mut self.stale {
            stale.maintain(now);
        }
        while self.abandoned.front().is_some_and(|(due, _)| *due <= now) {
            let Some((_, what)) = self.abandoned.pop_front() else { return };
            match what {
                Abandoned::Set { service, generation, count } => self.drop_set(service, generation, count),
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
        let mut counts: BTreeMap<(FrontendKey, Option<SocketAddr>), Counters> = BTreeMap::new();
        for (key, installed) in &self.installed {
            counts.insert((*key, None), installed.retired);
        }
        for item in self.opened.counters.iter() {
            let (key, values) = item.map_err(|error| kernel("read the counters", &error))?;
            let Some(frontend) = self.services.get(&key.service) else { continue };
            let Some(installed) = self.installed.get(frontend) else { continue };
            // A backend that has just gone counts with its frontend, as it will once it is retired.
            let backend = installed.backends.iter().find(|backend| backend.id == key.backend).map(socket_addr);
            let known = counts.entry((*frontend, backend)).or_default();
            *known = values.iter().fold(*known, sum);
        }
        let count = |((frontend, backend), counters): ((FrontendKey, _), Counters)| Count {
            frontend: addr_of(&frontend),
            backend,
            connects: counters.connects,
            datagrams: counters.datagrams,
            refused: counters.refused,
        };
        Ok(counts.into_iter().map(count).collect())
    }
}

fn sum(a: Counters, b: &Counters) -> Counters {
    Counters { connects: a.connects + b.connects, datagrams: a.datagrams + b.datagrams, refused: a.refused + b.refused }
}

/// Keeps the ids of backends that stay and gives new ones to the others; returns the highest id, too.
///
/// Ids count up for as long as the frontend is there, so that counters about to be dropped are never a new backend's.
fn with_ids(old: Option<&Installed>, wanted: &[SocketAddr]) -> (Vec<Backend>, u32) {
    let (known, mut last): (&[Backend], u32) = old.map_or((&[], 0), |old| (&old.backends, old.last_backend));
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

fn same(have: &Backend, want: &SocketAddr) -> bool {
    have.addr == Addr::from(want.ip()) && have.port == want.port().to_be_bytes()
}

fn key_of(at: &FrontendAddr) -> Option<FrontendKey> {
    let proto = match at.protocol {
        Protocol::Tcp => TCP,
        Protocol::Udp => UDP,
        Protocol::Sctp => return None,
    };
    Some(FrontendKey::new(at.addr.ip().into(), at.addr.port().to_be_bytes(), proto))
}

fn addr_of(key: &FrontendKey) -> FrontendAddr {
    let protocol = if key.proto == TCP { Protocol::Tcp } else { Protocol::Udp };
    FrontendAddr { addr: SocketAddr::new(IpAddr::from(key.addr), u16::from_be_bytes(key.port)), protocol }
}

fn socket_addr(backend: &Backend) -> SocketAddr {
    SocketAddr::new(IpAddr::from(backend.addr), u16::from_be_bytes(backend.port))
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
