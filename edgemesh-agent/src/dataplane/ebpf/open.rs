//! Bringing the programs up: load, adopt what an earlier agent pinned, attach or update in place.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    panic::resume_unwind,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use aya::{
    Ebpf as Object, EbpfError, EbpfLoader, Pod,
    maps::{Array, HashMap, LpmTrie, MapData, MapError, PerCpuHashMap, RingBuf},
    programs::{CgroupSockAddr, CgroupSockAddrAttachType as Hook, ProgramError, ProgramType},
    sys::{BpfHelper, is_helper_supported},
};
use edgemesh_common::{
    Addr,
    alias::{NO_RANGE_V4, NO_RANGE_V6},
    layout::{
        Affinity, AffinityKey, Backend, BackendKey, CounterKey, Counters, Frontend, FrontendKey, Member, MemberKey,
        Ring, RingKey, UdpSocket,
    },
    nat::SourceRange,
};
use tracing::{debug, info};

use super::{aliases::in_words, hooks, mounts, pins::Pins, tap::Tap, tc};
use crate::{alias::AliasRanges, config::EbpfConfig, net};

/// The compiled eBPF object, absent from builds made before `cargo xtask build-ebpf`.
#[cfg(bpf_object)]
pub(super) const OBJECT: Option<&[u8]> = Some(aya::include_bytes_aligned!(env!("EDGEMESH_BPF_OBJECT_PATH")));
#[cfg(not(bpf_object))]
pub(super) const OBJECT: Option<&[u8]> = None;

/// The programs in the order they are attached. The way back first: a socket must never be translated by a new
/// `connect` before a `getpeername` and `recvmsg` that know its state are there.
pub(super) const PROGRAMS: [(&str, Hook); 8] = [
    ("getpeername4", Hook::GetPeerName4),
    ("getpeername6", Hook::GetPeerName6),
    ("recvmsg4", Hook::UDPRecvMsg4),
    ("recvmsg6", Hook::UDPRecvMsg6),
    ("sendmsg4", Hook::UDPSendMsg4),
    ("sendmsg6", Hook::UDPSendMsg6),
    ("connect4", Hook::Connect4),
    ("connect6", Hook::Connect6),
];

/// The frontends of the agent itself, which take no room from Services: those of the canary.
const RESERVED: u32 = 2;

/// Pinned with the version of the tables.
const TABLES: [&str; 14] = [
    "FRONTENDS",
    "BACKENDS",
    "SERVICE_ADDRS",
    "RINGS",
    "MEMBERS",
    "COUNTERS",
    "AFFINITY",
    "SETTINGS",
    "EVENTS",
    "NAT",
    "FRAGMENTS",
    "INTERFACES",
    "SOURCE_RANGES",
    "TC_DROPS",
];
/// Pinned with the version of what sockets remember.
const SOCKET_MAPS: [&str; 3] = ["CONNECTED", "DATAGRAMS", "UDP_SOCKETS"];

/// Why the eBPF data plane cannot be brought up, in one line each.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "this build of edgemesh-agent has no eBPF programs in it; build them with `cargo xtask build-ebpf` and build the agent again"
    )]
    NoObject,
    #[error(
        "cannot load eBPF programs: the kernel refuses permission ({error}{}); run as root with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, outside a user namespace", lacking(.missing)
    )]
    NotPermitted { error: String, missing: Vec<&'static str> },
    #[error("this kernel has no bpf(2) system call; Linux 5.8 or later with CONFIG_BPF_SYSCALL is needed")]
    NoBpf,
    #[error("cannot load the eBPF programs: {0}")]
    Load(#[source] EbpfError),
    #[error(
        "the eBPF object has no {kind} '{name}'; it does not belong to this agent, build it again with `cargo xtask build-ebpf`"
    )]
    Foreign { kind: &'static str, name: &'static str },
    #[error("cannot load the eBPF program '{name}': {error}; Linux 5.8 or later with CONFIG_CGROUP_BPF is needed")]
    Program { name: &'static str, error: String },
    #[error(
        "no cgroup2 hierarchy is mounted where its root can be seen; mount one (mount -t cgroup2 none /sys/fs/cgroup) or name it in modules.edgeProxy.ebpf.cgroupRoot; a container also needs hostPID or the host's cgroup namespace"
    )]
    NoCgroup2,
    #[error("cannot use modules.edgeProxy.ebpf.cgroupRoot '{}': {error}; name a directory of the host's cgroup2 hierarchy", path.display())]
    CgroupRoot { path: PathBuf, error: io::Error },
    #[error("cannot keep pins in '{}': {error}; modules.edgeProxy.ebpf.pinDirectory must be on a bpffs (mount -t bpf bpffs /sys/fs/bpf)", path.display())]
    Pins { path: PathBuf, error: io::Error },
    #[error("cannot attach the eBPF program '{name}' to cgroup '{}': {error}{}", cgroup.display(), attach_hint(error))]
    Attach { name: &'static str, cgroup: PathBuf, error: io::Error },
    #[error("cannot use the eBPF map '{name}': {error}")]
    Map { name: &'static str, error: String },
}

impl OpenError {
    /// Whether it is permission that is missing, rather than a kernel feature or a mount.
    pub fn is_permission(&self) -> bool {
        matches!(self, Self::NotPermitted { .. })
    }
}

fn attach_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => {
            "; another program holds this hook exclusively (see `bpftool cgroup tree`), or CAP_NET_ADMIN is missing"
        }
        Some(libc::EINVAL) => "; Linux 5.7 or later is needed for cgroup links",
        _ => "",
    }
}

/// What a successful start hands over.
pub(super) struct Opened {
    pub(super) frontends: HashMap<MapData, FrontendKey, Frontend>,
    pub(super) backends: HashMap<MapData, BackendKey, Backend>,
    pub(super) service_addrs: HashMap<MapData, Addr, u32>,
    pub(super) rings: HashMap<MapData, RingKey, Ring>,
    pub(super) members: HashMap<MapData, MemberKey, Member>,
    pub(super) affinity: HashMap<MapData, AffinityKey, Affinity>,
    /// The value is not used.
    pub(super) source_ranges: LpmTrie<MapData, SourceRange, u32>,
    pub(super) counters: PerCpuHashMap<MapData, CounterKey, Counters>,
    /// The same map, for what aya does not offer.
    pub(super) counters_fd: OwnedFd,
    /// None once it was handed to the thread that looks sockets up in it.
    pub(super) udp_sockets: Option<HashMap<MapData, u64, UdpSocket>>,
    /// None once it was handed over.
    pub(super) tap: Option<Tap>,
    /// What the maps really hold, which for adopted ones may differ from the configuration.
    pub(super) max_frontends: u32,
    pub(super) max_backends: u32,
    /// Keeps the programs loaded and the log ring mapped. Locked for long only while the programs for packets are loaded.
    pub(super) object: Arc<Mutex<Object>>,
    /// The cgroup directory whose processes are served.
    pub(super) cgroup: PathBuf,
    cgroup_directory: File,
    pins: Pins,
    /// Whether the programs are in force; else those of another layout still are.
    pub(super) attached: bool,
    /// How many links were found and updated, rather than made.
    pub(super) adopted_links: usize,
    /// None once it was handed to what attaches it to interfaces.
    pub(super) traffic: Option<tc::Traffic>,
    /// Whether programs can tell the host's sockets from those of pods.
    pub(super) knows_host: bool,
}

impl Opened {
    /// Attaches again what somebody has detached.
    pub(super) fn keep_attached(&self, keeper: &mut hooks::Keeper) {
        // Next time, where the programs for packets are being loaded.
        let (true, Ok(object)) = (self.attached, self.object.try_lock()) else { return };
        keeper.attach_again(&self.pins, &self.cgroup_directory, |name| {
            let program: &CgroupSockAddr = object.program(name)?.try_into().ok()?;
            Some(program.fd().ok()?.as_fd())
        });
    }

    /// Puts the programs in force, in the place of those of an earlier agent.
    pub(super) fn attach(&mut self) -> Result<(), OpenError> {
        let mut object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, hook) in PROGRAMS {
            let program: &mut CgroupSockAddr = program(&mut object, name)?;
            let program = program.fd().map_err(|error| OpenError::Program { name, error: error.to_string() })?.as_fd();
            let adopted = self.pins.attach(name, program, &self.cgroup_directory, hook);
            let cgroup = || self.cgroup.clone();
            let adopted = adopted.map_err(|error| OpenError::Attach { name, cgroup: cgroup(), error })?;
            self.adopted_links += usize::from(adopted);
        }
        drop(object);
        self.attached = true;
        let removed = self.pins.drop_others();
        removed.map_err(|error| OpenError::Pins { path: self.pins.tables.clone(), error })?;
        info!(cgroup = %self.cgroup.display(), adopted_links = self.adopted_links, "eBPF programs are attached");
        Ok(())
    }
}

/// Loads and adopts. When this returns, translation by whatever the maps hold is in force, unless an agent with another
/// layout was here: then its translation goes on until [`Opened::attach`].
pub(super) fn open(config: &EbpfConfig, aliases: Option<AliasRanges>) -> Result<Opened, OpenError> {
    let bytes = OBJECT.ok_or(OpenError::NoObject)?;
    let (cgroup_directory, cgroup) = mounts::open_cgroup(config.cgroup_root.as_deref())?;
    let pins = Pins::new(&config.pin_directory);
    probe_permission()?;
    mounts::prepare_pins(&config.pin_directory, &[&pins.tables, &pins.sockets])?;

    let has_set_retval =
        u32::from(is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval).unwrap_or(false));
    let host_netns = net::netns_cookie().ok().flatten().unwrap_or(0);
    let nat_ports = tc::ports();
    let (alias_v4, alias_v6) = aliases.map_or((NO_RANGE_V4, NO_RANGE_V6), in_words);
    let mut loader = EbpfLoader::new();
    loader
        .override_global("HAS_SET_RETVAL", &has_set_retval, true)
        .override_global("HOST_NETNS", &host_netns, true)
        .override_global("NAT_PORTS", &nat_ports, true)
        .override_global("ALIAS_RANGE_V4", &alias_v4, true)
        .override_global("ALIAS_RANGE_V6", &alias_v6, true)
        .map_max_entries("FRONTENDS", config.max_frontends.saturating_add(RESERVED))
        .map_max_entries("SERVICE_ADDRS", config.max_frontends)
        .map_max_entries("RINGS", config.max_frontends)
        .map_max_entries("BACKENDS", config.max_backends)
        .map_max_entries("MEMBERS", config.max_backends)
        .map_max_entries("SOURCE_RANGES", config.max_frontends)
        .map_max_entries("NAT", config.max_connections.saturating_mul(2))
        .map_max_entries("COUNTERS", config.max_backends.saturating_add(config.max_frontends));
    for name in TABLES {
        loader.map_pin_path(name, pins.tables.join(name));
    }
    for name in SOCKET_MAPS {
        loader.map_pin_path(name, pins.sockets.join(name));
    }
    let mut object = loader.load(bytes).map_err(load_error)?;
    load_programs(&mut object)?;
    debug!(has_set_retval, host_netns, "eBPF programs are loaded");

    let frontends = map(&mut object, "FRONTENDS")?;
    let max_frontends = config.max_frontends.saturating_add(RESERVED);
    let max_frontends = capacity(&frontends, "FRONTENDS", max_frontends).saturating_sub(RESERVED);
    let backends = map(&mut object, "BACKENDS")?;
    let max_backends = capacity(&backends, "BACKENDS", config.max_backends);
    let counters = map(&mut object, "COUNTERS")?;
    let counters_fd = descriptor(&counters, "COUNTERS")?;
    let packet_maps = tc::Maps::of(&mut object)?;
    let mut opened = Opened {
        frontends: HashMap::try_from(frontends).map_err(|error| map_error("FRONTENDS", &error))?,
        backends: HashMap::try_from(backends).map_err(|error| map_error("BACKENDS", &error))?,
        service_addrs: hash_map(&mut object, "SERVICE_ADDRS")?,
        rings: hash_map(&mut object, "RINGS")?,
        members: hash_map(&mut object, "MEMBERS")?,
        counters: PerCpuHashMap::try_from(counters).map_err(|error| map_error("COUNTERS", &error))?,
        counters_fd,
        affinity: hash_map(&mut object, "AFFINITY")?,
        source_ranges: LpmTrie::try_from(map(&mut object, "SOURCE_RANGES")?)
            .map_err(|error| map_error("SOURCE_RANGES", &error))?,
        udp_sockets: Some(hash_map(&mut object, "UDP_SOCKETS")?),
        tap: Some(Tap {
            settings: Array::try_from(map(&mut object, "SETTINGS")?).map_err(|error| map_error("SETTINGS", &error))?,
            events: RingBuf::try_from(map(&mut object, "EVENTS")?).map_err(|error| map_error("EVENTS", &error))?,
        }),
        max_frontends,
        max_backends,
        object: Arc::new(Mutex::new(object)),
        cgroup,
        cgroup_directory,
        pins,
        attached: false,
        adopted_links: 0,
        traffic: None,
        knows_host: host_netns != 0,
    };
    opened.traffic =
        Some(tc::Traffic::new(packet_maps, Arc::clone(&opened.object), &opened.pins, config, aliases.is_some()));
    if opened.pins.awaits_switch() {
        info!("an agent with another map layout was here: its translation goes on until the new maps are complete");
    } else {
        opened.attach()?;
    }
    Ok(opened)
}

/// Loads all [`PROGRAMS`] at once: nearly all of a start is the verifier's, and it verifies one program on each CPU.
fn load_programs(object: &mut Object) -> Result<(), OpenError> {
    let mut wanted: BTreeMap<&str, &'static str> = PROGRAMS.iter().map(|(name, _)| (*name, *name)).collect();
    let results: Vec<Result<(), OpenError>> = thread::scope(|scope| {
        let mut threads = Vec::new();
        for (name, program) in object.programs_mut() {
            let Some(name) = wanted.remove(name) else { continue };
            threads.push(scope.spawn(move || {
                let program: &mut CgroupSockAddr =
                    program.try_into().map_err(|_| OpenError::Foreign { kind: "program", name })?;
                load(|| program.load()).map_err(|error| program_error(name, &error))
            }));
        }
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    results.into_iter().collect::<Result<(), OpenError>>()?;
    match wanted.into_values().next() {
        Some(name) => Err(OpenError::Foreign { kind: "program", name }),
        None => Ok(()),
    }
}

fn program<'a>(object: &'a mut Object, name: &'static str) -> Result<&'a mut CgroupSockAddr, OpenError> {
    let program = object.program_mut(name).and_then(|program| program.try_into().ok());
    program.ok_or(OpenError::Foreign { kind: "program", name })
}

pub(super) fn hash_map<K: Pod, V: Pod>(
    object: &mut Object,
    name: &'static str,
) -> Result<HashMap<MapData, K, V>, OpenError> {
    HashMap::try_from(map(object, name)?).map_err(|error| map_error(name, &error))
}

/// Asks for the smallest thing that needs the permission all else needs, so that its lack has one clear message.
fn probe_permission() -> Result<(), OpenError> {
    match is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_map_lookup_elem) {
        Ok(_) => Ok(()),
        Err(error) => match io_error(&error).and_then(io::Error::raw_os_error) {
            Some(libc::EPERM | libc::EACCES) => Err(not_permitted(&error)),
            Some(libc::ENOSYS) => Err(OpenError::NoBpf),
            _ => Err(OpenError::Load(EbpfError::ProgramError(error))),
        },
    }
}

/// Loads a program, again where a signal has interrupted the verifier, which gives up with EAGAIN then.
///
/// # Errors
///
/// Those of the last attempt.
pub(super) fn load(mut attempt: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    /// As often as libbpf (`PROG_LOAD_ATTEMPTS`).
    const ATTEMPTS: u32 = 5;
    let mut result = attempt();
    for _ in 1..ATTEMPTS {
        let interrupted = |error| io_error(error).is_some_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        if !result.as_ref().is_err_and(|error| interrupted(error)) {
            break;
        }
        result = attempt();
    }
    result
}

pub(super) fn io_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a io::Error> {
    std::iter::successors(Some(error), |error| error.source()).find_map(|error| error.downcast_ref::<io::Error>())
}

fn os_words(error: &(dyn std::error::Error + 'static)) -> String {
    io_error(error).map_or_else(|| error.to_string(), ToString::to_string)
}

fn load_error(error: EbpfError) -> OpenError {
    match io_error(&error).and_then(io::Error::raw_os_error) {
        Some(libc::EPERM | libc::EACCES) => not_permitted(&error),
        _ => OpenError::Load(error),
    }
}

/// Without CAP_PERFMON the verifier refuses what it otherwise accepts, with the errno of a faulty program.
fn program_error(name: &'static str, error: &ProgramError) -> OpenError {
    if missing_capabilities().is_empty() {
        OpenError::Program { name, error: in_one_line(error) }
    } else {
        not_permitted(error)
    }
}

fn not_permitted(error: &(dyn std::error::Error + 'static)) -> OpenError {
    OpenError::NotPermitted { error: os_words(error), missing: missing_capabilities() }
}

fn lacking(missing: &[&str]) -> String {
    if missing.is_empty() { String::new() } else { format!("; missing here: {}", missing.join(", ")) }
}

/// Which of the needed capabilities this process does not have; none where it cannot be told. CAP_SYS_ADMIN stands for
/// CAP_BPF and CAP_PERFMON (capabilities(7)).
pub(super) fn missing_capabilities() -> Vec<&'static str> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let Some(effective) = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()) else {
        return Vec::new();
    };
    let has = |bit: u32| effective & (1 << bit) != 0;
    let (net_admin, sys_admin, perfmon, bpf) = (has(12), has(21), has(38), has(39));
    [("CAP_NET_ADMIN", net_admin), ("CAP_PERFMON", perfmon || sys_admin), ("CAP_BPF", bpf || sys_admin)]
        .into_iter()
        .filter_map(|(name, there)| (!there).then_some(name))
        .collect()
}

/// A verifier log has hundreds of lines, of which the last says what is wrong; all of it goes to the debug log.
pub(super) fn in_one_line(error: &ProgramError) -> String {
    if let ProgramError::LoadError { io_error, verifier_log } = error {
        let log = verifier_log.to_string();
        debug!("{log}");
        let last = log.lines().rev().find(|line| !line.trim().is_empty() && !line.starts_with("processed "));
        return format!("{io_error} ({})", last.unwrap_or("no verifier output").trim());
    }
    error.to_string()
}

pub(super) fn map(object: &mut Object, name: &'static str) -> Result<aya::maps::Map, OpenError> {
    object.take_map(name).ok_or(OpenError::Foreign { kind: "map", name })
}

/// Another descriptor of a map.
fn descriptor(map: &aya::maps::Map, name: &'static str) -> Result<OwnedFd, OpenError> {
    let aya::maps::Map::PerCpuHashMap(data) = map else { return Err(OpenError::Foreign { kind: "per-CPU map", name }) };
    let copy = data.fd().as_fd().try_clone_to_owned();
    copy.map_err(|error| OpenError::Map { name, error: error.to_string() })
}

pub(super) fn map_error(name: &'static str, error: &MapError) -> OpenError {
    OpenError::Map { name, error: error.to_string() }
}

/// How many entries a map can have: a pinned one keeps the capacity it was made with.
fn capacity(map: &aya::maps::Map, name: &'static str, wanted: u32) -> u32 {
    let aya::maps::Map::HashMap(data) = map else { return wanted };
    let Ok(has) = data.info().map(|info| info.max_entries()) else { return wanted };
    if has != wanted {
        tracing::warn!(
            map = name,
            has,
            wanted,
            "an adopted map keeps its old capacity; to change it stop the agent, run `edgemesh-agent cleanup` and start it again"
        );
    }
    has
}

#[cfg(test)]
mod tests {
    use aya::sys::SyscallError;

    use super::*;

    #[test]
    fn a_verifier_that_a_signal_interrupts_is_asked_again_and_not_for_ever() {
        let refusal = |kind: io::ErrorKind| {
            ProgramError::SyscallError(SyscallError { call: "bpf_prog_load", io_error: kind.into() })
        };
        let mut attempts = 0;
        let mut try_with = |kind: io::ErrorKind, failures: u32| {
            attempts = 0;
            let result = load(|| {
                attempts += 1;
                if attempts <= failures { Err(refusal(kind)) } else { Ok(()) }
            });
            (result.is_ok(), attempts)
        };
        assert_eq!(try_with(io::ErrorKind::WouldBlock, 0), (true, 1));
        assert_eq!(try_with(io::ErrorKind::WouldBlock, 3), (true, 4));
        assert_eq!(try_with(io::ErrorKind::WouldBlock, u32::MAX), (false, 5));
        assert_eq!(try_with(io::ErrorKind::PermissionDenied, u32::MAX), (false, 1));
    }
}
