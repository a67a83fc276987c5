//! The programs for packets: loading them, and keeping them on the right interfaces.
//!
//! Which interfaces these are follows from the node's links, addresses and routes ([`choose`]), of which netlink tells
//! each change, and from the tables: no uplink is touched before a Service can be reached from outside, unless there are
//! aliases to keep the outside from. What cannot be attached is a condition and never an end; sockets are served without
//! it.

mod attach;
mod choose;

use std::{
    cell::OnceCell,
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use aya::{
    Ebpf as Object,
    maps::{HashMap, MapData, MapError, PerCpuArray},
    programs::{ProgramError, SchedClassifier},
};
use edgemesh_common::nat::{DROP_REASONS, GUARD_ONLY, GUEST, Interface, UPLINK};
use futures::StreamExt;
use rtnetlink::{Handle, MulticastGroup, new_connection, new_multicast_connection};
use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::{
    attach::Way,
    choose::{Chosen, Wish},
};
use super::{
    Ebpf, OpenError, absent_is_fine,
    open::{hash_map, in_one_line, load, map, map_error},
    pins::Pins,
};
use crate::{
    conditions::Conditions,
    config::EbpfConfig,
    lifecycle::Tasks,
    model::{FrontendKind, ServiceTable},
    net::picture,
};

/// Ingress and egress of an uplink, then of a guest.
const PROGRAMS: [&str; 4] = ["uplink_ingress", "uplink_egress", "guest_ingress", "guest_egress"];

/// Changes of the network come in groups; this is how long the rest of one is waited for.
const SETTLE: Duration = Duration::from_millis(50);
/// How often everything is looked at, for what netlink does not tell: sysctls, and filters that somebody removed.
const PATROL: Duration = Duration::from_secs(30);
/// How long until netlink is tried again after an error.
const RETRY: Duration = Duration::from_secs(5);

/// What goes with [`Interface::flags`] in the map, for `cleanup` and the next agent: the programs are filters.
const BY_FILTER: u32 = 1 << 16;
/// The clsact qdisc is ours.
const OWN_QDISC: u32 = 1 << 17;

const UNATTACHED: &str = "TrafficFromOutside";
const NO_FORWARDING: &str = "ForwardingDisabled";

/// The ports that stand in for clients' where those of this node go out under its name: the first, and how many.
///
/// The larger part of 1024 to 65535 outside `net.ipv4.ip_local_port_range`, from which sockets of this node get theirs;
/// where nothing useful is left, all of it.
pub(super) fn ports() -> [u16; 2] {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut words = text.split_whitespace().map(str::parse::<u16>);
    let (Some(Ok(low)), Some(Ok(high))) = (words.next(), words.next()) else { return [1024, 31_744] };
    free_ports(low, high)
}

fn free_ports(low: u16, high: u16) -> [u16; 2] {
    const FIRST: u16 = 1024;
    const ENOUGH: u16 = 1024;
    let below = low.saturating_sub(FIRST);
    let above = u16::MAX - high;
    let (first, count) = if below >= above { (FIRST, below) } else { (high.saturating_add(1), above) };
    if count >= ENOUGH { [first, count] } else { [FIRST, u16::MAX - FIRST + 1] }
}

/// The maps that only the programs for packets use.
pub(super) struct Maps {
    interfaces: HashMap<MapData, u32, Interface>,
    drops: PerCpuArray<MapData, u64>,
}

impl Maps {
    pub(super) fn of(object: &mut Object) -> Result<Self, OpenError> {
        let drops = map(object, "TC_DROPS")?;
        let drops = PerCpuArray::try_from(drops).map_err(|error| map_error("TC_DROPS", &error))?;
        Ok(Self { interfaces: hash_map(object, "INTERFACES")?, drops })
    }
}

/// The programs for packets and their maps.
pub(super) struct Traffic {
    attacher: Attacher,
    drops: PerCpuArray<MapData, u64>,
    /// Whether there are aliases, which uplinks must not reach.
    guard: bool,
}

/// What it takes to attach.
struct Attacher {
    programs: Programs,
    interfaces: HashMap<MapData, u32, Interface>,
    pins: PathBuf,
    uplinks: Vec<String>,
    guests: Vec<String>,
    tcx: bool,
}

/// What is attached, as `status` shows it. Cheap to clone; all clones see the same.
#[derive(Clone)]
pub struct Sight {
    interfaces: Arc<Mutex<Vec<InterfaceSight>>>,
    drops: Arc<PerCpuArray<MapData, u64>>,
}

impl fmt::Debug for Sight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sight").field("interfaces", &self.interfaces()).finish_non_exhaustive()
    }
}

/// An interface with programs.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct InterfaceSight {
    pub name: String,
    /// `uplink` or `guest`.
    pub role: &'static str,
    /// `tcx` or `clsact`.
    pub attached_by: &'static str,
}

impl Sight {
    /// The interfaces with programs.
    pub fn interfaces(&self) -> Vec<InterfaceSight> {
        self.interfaces.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many packets the programs have dropped, by reason; reasons that never came up are left out.
    pub fn drops(&self) -> BTreeMap<&'static str, u64> {
        // In the order of the `DROP_` constants.
        const REASONS: [&str; DROP_REASONS as usize] =
            ["no_port_left", "source_range", "no_route", "ttl_expired", "wrong_node", "unwritable", "alias"];
        let count = |(index, reason): (u32, &'static str)| {
            let counted: u64 = self.drops.get(&index, 0).ok()?.iter().sum();
            (counted > 0).then_some((reason, counted))
        };
        (0..).zip(REASONS).filter_map(count).collect()
    }
}

impl Traffic {
    pub(super) fn new(maps: Maps, object: Arc<Mutex<Object>>, pins: &Pins, config: &EbpfConfig, guard: bool) -> Self {
        let attacher = Attacher {
            programs: Programs { object, loaded: OnceCell::new() },
            interfaces: maps.interfaces,
            pins: pins.tables.clone(),
            uplinks: config.uplinks.clone(),
            guests: config.guest_interfaces.clone(),
            tcx: config.tcx,
        };
        Self { attacher, drops: maps.drops, guard }
    }
}

/// The programs, loaded when the first interface wants them: the verifier takes longer for them than for all others
/// together, and most nodes never need them.
struct Programs {
    object: Arc<Mutex<Object>>,
    /// In the order of [`PROGRAMS`]; or why the kernel does not take them.
    loaded: OnceCell<Result<[OwnedFd; 4], String>>,
}

impl Programs {
    fn get(&self) -> Result<&[OwnedFd; 4], String> {
        let load = || load_all(&mut self.object.lock().unwrap_or_else(PoisonError::into_inner));
        let loaded = self.loaded.get_or_init(load).as_ref();
        loaded.map_err(|why| format!("the kernel does not take the programs ({why})"))
    }
}

fn load_all(object: &mut Object) -> Result<[OwnedFd; 4], String> {
    let mut loaded = |name: &str| {
        let program = object.program_mut(name).ok_or_else(|| format!("the object has no program '{name}'"))?;
        let program: &mut SchedClassifier = program.try_into().map_err(|error: ProgramError| error.to_string())?;
        load(|| program.load()).map_err(|error| format!("{name}: {}", in_one_line(&error)))?;
        let fd = program.fd().map_err(|error| error.to_string())?;
        fd.as_fd().try_clone_to_owned().map_err(|error| error.to_string())
    };
    let [a, b, c, d] = PROGRAMS;
    Ok([loaded(a)?, loaded(b)?, loaded(c)?, loaded(d)?])
}

impl Ebpf {
    /// Keeps the programs for packets on the right interfaces until the agent stops. They stay there after it.
    ///
    /// # Errors
    ///
    /// The system refuses a runtime of its own, which it needs as bpf(2) and the routing lock may block.
    pub fn follow_interfaces(
        &mut self,
        tables: watch::Receiver<Arc<ServiceTable>>,
        conditions: &Conditions,
        tasks: &Tasks,
    ) -> io::Result<Option<Sight>> {
        let Some(Traffic { attacher, drops, guard }) = self.opened.traffic.take() else { return Ok(None) };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let sight = Sight { interfaces: Arc::default(), drops: Arc::new(drops) };
        let (stop, shown, conditions) = (tasks.stopping(), Arc::clone(&sight.interfaces), conditions.clone());
        let follower =
            Follower { attacher, tables, conditions, shown, attached: BTreeMap::new(), outside: false, guard };
        tasks.spawn(async move {
            let followed = tokio::task::spawn_blocking(move || runtime.block_on(follower.run(stop)));
            if followed.await.is_err() {
                warn!("the thread that follows the network's interfaces panicked");
            }
        });
        Ok(Some(sight))
    }
}

/// Follows the network and the tables.
struct Follower {
    attacher: Attacher,
    tables: watch::Receiver<Arc<ServiceTable>>,
    conditions: Conditions,
    shown: Arc<Mutex<Vec<InterfaceSight>>>,
    attached: BTreeMap<u32, Attached>,
    /// Whether there was anything to serve for the outside since the start: uplinks are not given up with the last such
    /// Service, as its connections go on.
    outside: bool,
    guard: bool,
}

/// An interface that this agent has attached to.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Attached {
    name: String,
    /// As it is in the map.
    interface: Interface,
}

/// What the newest table says.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Demand {
    complete: bool,
    /// Whether a Service can be reached from outside.
    outside: bool,
    /// This node's addresses, as far as node ports tell.
    node: BTreeSet<IpAddr>,
}

impl Demand {
    fn of(table: &ServiceTable) -> Self {
        let frontends = || table.services.iter().flat_map(|entry| &entry.frontends).filter(|f| !f.host_only());
        let node_ports = frontends().filter(|frontend| frontend.kind == FrontendKind::NodePort);
        Self {
            complete: table.complete,
            outside: frontends().any(|frontend| frontend.kind != FrontendKind::ClusterIp),
            node: node_ports.map(|frontend| frontend.at.addr.ip()).collect(),
        }
    }
}

impl Follower {
    async fn run(mut self, stop: CancellationToken) {
        loop {
            let error = tokio::select! {
                () = stop.cancelled() => return,
                error = self.follow() => error,
            };
            debug!("netlink: {error:#}; trying again");
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
    }

    /// Follows until netlink fails; returns why.
    async fn follow(&mut self) -> rtnetlink::Error {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        // Questions have a connection of their own: a socket that was flooded with news loses answers, too.
        let (news, questions) = match (new_multicast_connection(&groups), new_connection()) {
            (Ok(news), Ok(questions)) => (news, questions),
            (Err(error), _) | (_, Err(error)) => return rtnetlink::Error::NamespaceError(error.to_string()),
        };
        let (listening, _keep, mut changes) = news;
        let (asking, netlink, _) = questions;
        tokio::pin!(listening, asking);
        let work = async {
            let mut patrol = tokio::time::interval(PATROL);
            let mut demand = Demand::default();
            loop {
                let thorough = tokio::select! {
                    _ = patrol.tick() => true,
                    change = changes.next() => {
                        if change.is_none() {
                            return rtnetlink::Error::RequestFailed;
                        }
                        tokio::time::sleep(SETTLE).await;
                        while futures::FutureExt::now_or_never(changes.next()).flatten().is_some() {}
                        false
                    }
                    changed = self.tables.changed() => {
                        if changed.is_err() {
                            // The agent is stopping.
                            return std::future::pending().await;
                        }
                        let newest = Demand::of(&self.tables.borrow_and_update());
                        if newest == demand {
                            continue;
                        }
                        false
                    }
                };
                demand = Demand::of(&self.tables.borrow_and_update());
                // Until the tables are whole, what an earlier agent has attached stays as it is.
                if demand.complete
                    && let Err(error) = self.reconcile(&netlink, &demand, thorough).await
                {
                    return error;
                }
            }
        };
        tokio::select! {
            error = work => error,
            () = &mut listening => rtnetlink::Error::RequestFailed,
            () = &mut asking => rtnetlink::Error::RequestFailed,
        }
    }

    /// Brings the interfaces to what they should be; `thorough` attaches anew even where nothing seems to have changed.
    async fn reconcile(&mut self, netlink: &Handle, demand: &Demand, thorough: bool) -> Result<(), rtnetlink::Error> {
        self.outside |= demand.outside;
        let node: Vec<IpAddr> = demand.node.iter().copied().collect();
        let picture = picture::take(netlink).await?;
        let Attacher { uplinks, guests, .. } = &self.attacher;
        let wish = Wish { uplinks, guests, node: &node, outside: self.outside, guard: self.guard };
        let chosen = choose::choose(&picture, wish);

        let held: BTreeSet<u32> = attach::pinned(&self.attacher.pins)
            .into_iter()
            .chain(self.attacher.interfaces.keys().flatten())
            .filter(|index| !chosen.contains_key(index))
            .collect();
        for index in held {
            self.attacher.detach(netlink, index).await;
            self.attached.remove(&index);
        }
        let mut failed = BTreeSet::new();
        for (index, chosen) in &chosen {
            let known = self.attached.get(index).map(|attached| {
                let interface =
                    Interface { flags: attached.interface.flags & !(BY_FILTER | OWN_QDISC), ..attached.interface };
                attached.name == chosen.name && interface == chosen.interface
            });
            if known == Some(true) && !thorough {
                continue;
            }
            match self.attacher.attach(netlink, *index, chosen).await {
                Ok(interface) => {
                    if known.is_none() {
                        info!(
                            interface = chosen.name,
                            by = attached_by(interface),
                            "serving traffic from {}",
                            role(interface)
                        );
                    }
                    self.attached.insert(*index, Attached { name: chosen.name.clone(), interface });
                }
                Err(why) => {
                    let open = if self.guard && chosen.interface.flags & UPLINK != 0 {
                        ", and what is sent to aliases from there is not kept out"
                    } else {
                        ""
                    };
                    let message = format!(
                        "cannot serve traffic from the {} {}: {why}; sockets on this node are served all the same{open}",
                        role(chosen.interface),
                        chosen.name
                    );
                    self.conditions.raise(UNATTACHED, &chosen.name, message, SystemTime::now());
                    failed.insert(chosen.name.clone());
                }
            }
        }
        if self.outside && !chosen.values().any(|chosen| chosen.interface.flags & UPLINK != 0) {
            let message = "Services can be reached from outside, but no interface is known to lead there; name some in \
                           modules.edgeProxy.ebpf.uplinks";
            self.conditions.raise(UNATTACHED, "", message, SystemTime::now());
            failed.insert(String::new());
        }
        self.conditions.retain(UNATTACHED, |name| failed.contains(name));
        self.look_at_forwarding();
        let shown = self.attached.values().map(|attached| InterfaceSight {
            name: attached.name.clone(),
            role: role(attached.interface),
            attached_by: attached_by(attached.interface),
        });
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = shown.collect();
        Ok(())
    }

    /// Without forwarding a packet from outside gets no further than to this node's own sockets.
    fn look_at_forwarding(&self) {
        for (family, path, sysctl) in [
            ("IPv4", "/proc/sys/net/ipv4/ip_forward", "net.ipv4.ip_forward"),
            ("IPv6", "/proc/sys/net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
        ] {
            let off = fs::read_to_string(path).is_ok_and(|text| text.trim() == "0");
            let four = family == "IPv4";
            let concerned = self.attached.values().any(|attached| {
                let Interface { v4, v6, flags } = attached.interface;
                if flags & GUARD_ONLY != 0 {
                    return false;
                }
                (if four { v4 } else { v6 }) != edgemesh_common::Addr::default()
            });
            if off && concerned {
                let message = format!(
                    "{sysctl} is 0: {family} traffic from outside and from guests reaches no pod; set it to 1 (the cluster's network normally does)"
                );
                self.conditions.raise(NO_FORWARDING, family, message, SystemTime::now());
            } else {
                self.conditions.clear(NO_FORWARDING, family);
            }
        }
    }
}

impl Attacher {
    /// Attaches both programs of an interface, or brings them up to date, and returns what the map now says of it.
    async fn attach(&mut self, netlink: &Handle, index: u32, chosen: &Chosen) -> Result<Interface, String> {
        let programs = self.programs.get()?;
        let first = if chosen.interface.flags & GUEST == 0 { 0 } else { 2 };
        let before = self.interfaces.get(&index, 0).map_or(0, |known| known.flags & (BY_FILTER | OWN_QDISC));
        // The programs pass over what they find no entry for, so that comes first.
        let mut interface = Interface { flags: chosen.interface.flags | before, ..chosen.interface };
        let mut note = |interface: &Interface| {
            let noted = self.interfaces.insert(index, interface, 0);
            noted.map_err(|error| format!("no room in the map INTERFACES: {error}"))
        };
        note(&interface)?;
        // What turns answers back, before what makes them necessary.
        let ways = [(Way::Egress, &programs[first + 1]), (Way::Ingress, &programs[first])];
        if self.tcx {
            let mut attached = Ok(());
            for (way, program) in ways {
                attached = attached
                    .and_then(|()| attach::tcx(program.as_fd(), &attach::pin(&self.pins, index, way), index, way));
            }
            match attached {
                Ok(()) => {
                    if before & BY_FILTER != 0 {
                        // An earlier agent's, whose answers the links turn back by now.
                        let removed = attach::remove_filters(netlink, index, before & OWN_QDISC != 0).await;
                        removed.map_err(|error| format!("cannot remove the clsact filters: {error}"))?;
                        interface.flags = chosen.interface.flags;
                        note(&interface)?;
                    }
                    return Ok(interface);
                }
                // No tcx before Linux 6.6.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => return Err(format!("tcx: {error}")),
            }
        }
        let made = attach::ensure_clsact(netlink, index).await;
        let made = made.map_err(|error| format!("clsact: {error}; Linux with CONFIG_NET_SCH_INGRESS is needed"))?;
        interface.flags |= BY_FILTER | if made { OWN_QDISC } else { 0 };
        note(&interface)?;
        for (way, program) in ways {
            let attached = attach::filter(netlink, program.as_fd(), index, way).await;
            attached.map_err(|error| format!("clsact: {error}; Linux with CONFIG_NET_CLS_BPF is needed"))?;
        }
        attach::unpin(&self.pins, index).map_err(|error| format!("cannot remove the tcx links: {error}"))?;
        Ok(interface)
    }

    /// Takes the programs off an interface, which may be gone.
    async fn detach(&mut self, netlink: &Handle, index: u32) {
        if let Err(error) = attach::unpin(&self.pins, index) {
            warn!(index, "cannot remove the links to an interface: {error}");
        }
        let flags = self.interfaces.get(&index, 0).map_or(0, |known| known.flags);
        if flags & BY_FILTER != 0
            && let Err(error) = attach::remove_filters(netlink, index, flags & OWN_QDISC != 0).await
        {
            warn!(index, "cannot remove the filters of an interface: {error}");
            return;
        }
        if let Err(error) = absent_is_fine(self.interfaces.remove(&index)) {
            warn!(index, "cannot forget an interface: {error}");
        }
    }
}

fn role(interface: Interface) -> &'static str {
    if interface.flags & GUEST == 0 { "uplink" } else { "guest" }
}

fn attached_by(interface: Interface) -> &'static str {
    if interface.flags & BY_FILTER == 0 { "tcx" } else { "clsact" }
}

/// Removes the clsact filters that an agent with pins below `directory` has left; links go with their pins. Returns what
/// was removed.
///
/// # Errors
///
/// The maps or netlink cannot be read, or the kernel refuses.
pub async fn remove_filters(directory: &std::path::Path) -> io::Result<Vec<String>> {
    let mut removed = Vec::new();
    let pin = Pins::new(directory).tables.join("INTERFACES");
    if !pin.exists() {
        return Ok(removed);
    }
    let other = |error: &dyn fmt::Display| io::Error::other(error.to_string());
    let data = MapData::from_pin(&pin).map_err(|error| other(&error))?;
    let interfaces: HashMap<MapData, u32, Interface> =
        HashMap::try_from(aya::maps::Map::HashMap(data)).map_err(|error| other(&error))?;
    let all: Vec<(u32, Interface)> =
        interfaces.iter().collect::<Result<_, MapError>>().map_err(|error| other(&error))?;
    let (connection, netlink, _) = new_connection()?;
    let work = async {
        for (index, interface) in all.into_iter().filter(|(_, interface)| interface.flags & BY_FILTER != 0) {
            match attach::remove_filters(&netlink, index, interface.flags & OWN_QDISC != 0).await {
                Ok(true) => removed.push(format!("filters of interface {index}")),
                Ok(false) => {}
                Err(error) => return Err(other(&error)),
            }
        }
        Ok(())
    };
    tokio::select! {
        biased;
        result = work => result?,
        () = connection => return Err(io::Error::other("the connection closed")),
    }
    Ok(removed)
}

#[cfg(test)]
mod tests;
