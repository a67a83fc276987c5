//! The agent put together: build everything, bind everything, run until told to stop.

mod aliases;
mod dns;
mod rules;
mod socks5;
mod tables;

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    net::{TcpListener, UnixListener},
    sync::{Semaphore, oneshot, watch},
};
use tracing::{debug, info, warn};

use self::{
    aliases::Detour,
    rules::SightOfRules,
    tables::{Publisher, SightOfNode, Tables},
};
use crate::{
    admin::{self, DataplaneSight, Sight},
    conditions::Conditions,
    config::{AgentConfig, DataplaneMode, SourceKind},
    dataplane::{
        self, Latency,
        ebpf::{Ebpf, OpenError, probe},
    },
    dns::Dns,
    health::{self, Canary, CanaryState, Watch},
    kube,
    lifecycle::{Readiness, Tasks},
    mesh::{self, MeetingsFile, Threads},
    model::Builder,
    net::{self, Device},
    snapshot::{self, Snapshot},
};

/// How long the tasks may take to end after a stop signal; well below Kubernetes' 30 s grace period.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);
/// How many events may wait for the builder before the source has to.
const EVENTS: usize = 1024;
const REBIND: Duration = Duration::from_secs(5);

/// Why the agent cannot start, in one line, with what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Source(#[from] kube::Error),
    #[error(transparent)]
    Dataplane(#[from] OpenError),
    #[error("cannot listen on the control socket {}: {error}; stop the other agent, or set commonConfig.controlSocket", path.display())]
    ControlSocket { path: PathBuf, error: io::Error },
    #[error("cannot start the data plane's threads: {0}")]
    Thread(#[source] io::Error),
    #[error("cannot start DNS's thread: {0}")]
    Dns(#[source] io::Error),
}

/// A started agent: everything bound, translation in force as far as an earlier agent left it.
#[derive(Debug)]
pub struct Bound {
    /// Where /healthz, /readyz and /metrics are; None if switched off, or if the port was taken and is waited for.
    pub admin_address: Option<SocketAddr>,
    control_socket: PathBuf,
    tasks: Tasks,
    dataplane: Option<thread::JoinHandle<()>>,
    /// None where nothing is carried.
    threads: Option<Threads>,
}

/// Builds and starts the agent for `node`.
///
/// # Errors
///
/// See [`StartError`]; nothing started is left running.
pub async fn build(config: AgentConfig, node: &str) -> Result<Bound, StartError> {
    let (tasks, readiness, conditions) = (Tasks::default(), Readiness::default(), Conditions::default());
    let socket_path = config.common.control_socket.clone();
    let socket = admin::bind_socket(&socket_path)
        .map_err(|error| StartError::ControlSocket { path: socket_path.clone(), error })?;
    let started = build_on(config, node, socket, &tasks, readiness, conditions).await;
    if started.is_err() {
        tasks.drain(DRAIN_DEADLINE).await;
        remove_socket(&socket_path);
    }
    started
}

async fn build_on(
    config: AgentConfig,
    node: &str,
    socket: UnixListener,
    tasks: &Tasks,
    readiness: Readiness,
    conditions: Conditions,
) -> Result<Bound, StartError> {
    let (events, received) = kube::Events::channel(EVENTS);
    let (tell_restored, restored) = oneshot::channel();
    let source = kube::start(&config.source, node, events, restored, conditions.clone(), tasks)?;
    let builder = Builder::new(config.proxy.filter, node);
    let device = ensure_device(&config, &conditions).await;
    let serves_socks5 = config.proxy.enable && config.proxy.socks5.enable;
    let carries = config.tunnel.enable || serves_socks5;
    let threads = carries.then(Threads::start).transpose().map_err(StartError::Thread)?;
    // Whom the tunnel has met, it tells; until it runs, those whom the agent before had met.
    let met = config.common.alias_file.as_deref().filter(|_| config.tunnel.enable).map(MeetingsFile::beside);
    let met = tokio::task::spawn_blocking(move || met.map(|file| file.read()).unwrap_or_default()).await;
    let (meet, meetings) = watch::channel(Arc::new(met.unwrap_or_default()));
    let of_tunnel = threads.as_ref().filter(|_| config.tunnel.enable);
    let detour = Detour::prepare(&config, device.as_ref(), of_tunnel, &conditions).await;
    let (builder, ways, carrying) = match detour {
        Some(detour) => {
            let entered = detour.enter(builder, &config, node, meetings, tasks);
            let (builder, ways, carrying) = entered.map_err(StartError::Thread)?;
            (builder, Some(ways), Some(carrying))
        }
        None => (builder, None, None),
    };
    let (publish, tables) = watch::channel(builder.last_table());
    let latency = Latency::default();
    let publish = Publisher {
        tables: publish,
        latency: latency.clone(),
        sight_of_node: SightOfNode { name: node.to_owned(), conditions: conditions.clone() },
        sight_of_rules: SightOfRules::new(conditions.clone()),
    };
    // The manifests are on a disk of this node already.
    let is_static = matches!(config.source.kind, SourceKind::Static { .. });
    let snapshot = config.common.metadata_snapshot.as_deref().filter(|_| !is_static);
    let snapshot = snapshot.map(|path| {
        let (url, state) = (source.status().source, source.clone());
        let source = snapshot::Source {
            url,
            connected: Box::new(move || state.status().health == kube::SourceHealth::Connected),
            restored: tell_restored,
        };
        Snapshot::open(path, source, node, conditions.clone())
    });
    let snapshot_state = snapshot.as_ref().map(Snapshot::state);
    let (tell_adopted, adopted) = oneshot::channel();
    let tables_task = Tables { builder, received, publish, snapshot, adopted, ways };
    tasks.spawn(tables_task.run(readiness.block("the metadata source")));

    let (mut dataplane, mut thread) = (None, None);
    if config.proxy.enable {
        // `auto` has one data plane to choose from.
        let (DataplaneMode::Auto | DataplaneMode::Ebpf) = config.proxy.dataplane;
        // The verifier takes its time, and the source has begun to read.
        let (of_ebpf, raise) = (config.proxy.ebpf.clone(), conditions.clone());
        let aliases = config.tunnel.enable.then_some(config.common.aliases);
        let opened = tokio::task::spawn_blocking(move || Ebpf::open(&of_ebpf, aliases, &raise)).await;
        let mut ebpf = opened.map_err(|error| StartError::Thread(io::Error::other(error)))??;
        ebpf.follow_log(tasks);
        let cgroup_root = config.proxy.ebpf.cgroup_root.clone();
        let probed = tokio::task::spawn_blocking(move || probe::run(cgroup_root.as_deref()).standing());
        let standing = probed.await.map_err(|error| StartError::Thread(io::Error::other(error)))?;
        for loss in &standing.losses {
            warn!(feature = loss.feature, reason = loss.reason, "{}", loss.cost);
        }
        let canary = prepare_canary(&config, &mut ebpf, &conditions).await;
        let (cgroup, adopted_frontends) = (ebpf.cgroup().to_owned(), ebpf.adopted());
        // The task may have ended, if the source has.
        let _ = tell_adopted.send(adopted_frontends);
        let ended_sockets = ebpf.ended_sockets();
        let events = ebpf.events().unwrap_or_else(|error| {
            warn!("`edgemesh-agent events` has nothing to tell: {error}");
            None
        });
        let traffic = ebpf.follow_interfaces(tables.clone(), &conditions, tasks).map_err(StartError::Thread)?;
        let unready = readiness.block("the data plane");
        let (handle, started) =
            dataplane::spawn(Box::new(ebpf), tables.clone(), latency, conditions.clone(), unready, tasks.stopping())
                .map_err(StartError::Thread)?;
        tasks.spawn(dataplane::supervise(handle.clone(), conditions.clone(), readiness.clone(), tasks.stopping()));
        let watch = Watch {
            cgroup: cgroup.clone(),
            pins: config.proxy.ebpf.pin_directory.clone(),
            period: config.proxy.ebpf.canary_period,
            conditions: conditions.clone(),
            readiness: readiness.clone(),
            dataplane: handle.clone(),
        };
        let canary = canary.map(|canary| (canary, CanaryState::default()));
        let state = canary.as_ref().map(|(_, state)| state.clone());
        watch.start(canary, tasks);
        dataplane = Some(DataplaneSight {
            handle,
            cgroup,
            adopted_frontends,
            standing,
            canary: state,
            ended_sockets,
            events,
            traffic,
        });
        thread = Some(started);
    } else {
        drop(tell_adopted);
        info!("modules.edgeProxy.enable is false: Services are not translated on this node");
        if dataplane::ebpf::is_pinned(&config.proxy.ebpf.pin_directory) {
            let message = "modules.edgeProxy.enable is false, yet what an earlier agent translated stays in force and \
                           follows no change; stop the agent, run `edgemesh-agent cleanup` and start it again";
            conditions.raise("TranslationLeftBehind", "", message, SystemTime::now());
        }
    }

    let dns = match &config.dns {
        Some(wanted) => {
            let settings = dns::settings(&config.common, wanted, &config.proxy.ebpf.uplinks);
            Some(Dns::start(settings, tables.clone(), &conditions, tasks).map_err(StartError::Dns)?)
        }
        None => None,
    };
    let (through, aliases, tunnel) = match (carrying, &threads) {
        (Some(carrying), Some(threads)) => {
            let (through, sight) = mesh::start(&config, node, tables.clone(), meet, &conditions, tasks, threads);
            let aliases = carrying.start(tables.clone(), Arc::new(through.clone()), &conditions, tasks, threads);
            (Some(through), Some(aliases), Some(sight))
        }
        (None, Some(threads)) => {
            (Some(mesh::without_tunnel(&config, node, tables.clone(), tasks, threads)), None, None)
        }
        (_, None) => (None, None, None),
    };
    let socks5 = match (through, &threads) {
        (Some(through), Some(threads)) if serves_socks5 => {
            Some(socks5::start(&config, node, through, tables.clone(), dns.as_ref(), &conditions, tasks, threads))
        }
        _ => None,
    };
    let sight = Sight {
        node: node.into(),
        started: Instant::now(),
        readiness: readiness.clone(),
        conditions: conditions.clone(),
        tables,
        source,
        snapshot: snapshot_state,
        dataplane,
        dns,
        device,
        aliases,
        tunnel,
        socks5,
        max_backend_series: config.common.max_backend_series,
        rendering: Arc::new(Semaphore::new(1)),
    };
    tasks.spawn(admin::serve_socket(socket, sight.clone(), tasks.clone()));
    let mut admin_address = None;
    if let Some(address) = config.common.admin_address {
        match admin::bind(address).await {
            Ok(listener) => {
                admin_address = listener.local_addr().ok();
                tasks.spawn(admin::serve(listener, sight, tasks.clone()));
            }
            Err(error) => {
                raise_admin(&conditions, address, &error);
                tasks.spawn(serve_when_free(address, sight, tasks.clone()));
            }
        }
    }
    info!(version = crate::status::VERSION, node, "edgemesh-agent has started");
    readiness.started();
    let control_socket = config.common.control_socket;
    Ok(Bound { admin_address, control_socket, tasks: tasks.clone(), dataplane: thread, threads })
}

impl Bound {
    /// Runs until SIGTERM, SIGINT or SIGQUIT, then drains. Translation stays in force.
    ///
    /// # Errors
    ///
    /// The signal handlers cannot be installed.
    pub async fn run(self) -> io::Result<()> {
        let signal = crate::lifecycle::stop_signal().await?;
        info!(signal, "stopping; translation stays in force until `edgemesh-agent cleanup`");
        self.stop().await;
        Ok(())
    }

    /// Ends all tasks and the data plane's thread, within a bound.
    pub async fn stop(self) {
        self.tasks.drain(DRAIN_DEADLINE).await;
        if let Some(thread) = self.dataplane {
            let joined = tokio::task::spawn_blocking(move || thread.join());
            match tokio::time::timeout(DRAIN_DEADLINE, joined).await {
                Ok(Ok(Ok(()))) => {}
                Ok(_) => warn!("the data plane's thread panicked"),
                Err(_) => warn!("the data plane's thread is still busy; stopping without it"),
            }
        }
        drop(self.threads);
        remove_socket(&self.control_socket);
    }
}

fn remove_socket(path: &Path) {
    if let Err(error) = admin::remove_socket(path) {
        debug!(path = %path.display(), "cannot remove the control socket: {error}");
    }
}

/// Its lack is a condition: Services are served all the same. None where it is switched off, too.
async fn prepare_canary(config: &AgentConfig, ebpf: &mut Ebpf, conditions: &Conditions) -> Option<Canary> {
    if config.proxy.ebpf.canary_period.is_zero() {
        return None;
    }
    let bound = Canary::bind(config.common.bridge_device_ip, ebpf.cgroup()).await;
    let placed = bound.and_then(|canary| Ok((canary.backends()?, canary))).map_err(|error| error.to_string()).and_then(
        |((tcp, udp), canary)| {
            let put = ebpf.put_canary(canary.frontend(), tcp, udp, Instant::now());
            put.map(|()| canary).map_err(|error| error.to_string())
        },
    );
    match placed {
        Ok(canary) => Some(canary),
        Err(error) => {
            health::raise_not_run(conditions, &error);
            None
        }
    }
}

/// The device only matters to what listens on its address, so its lack is a condition, not an end.
async fn ensure_device(config: &AgentConfig, conditions: &Conditions) -> Option<Device> {
    let (name, address) = (&config.common.bridge_device_name, config.common.bridge_device_ip);
    let device = match net::ensure_device(name, address).await {
        Ok(device) => {
            info!(device = device.name, kind = %device.kind, %address, "the node-local address is in place");
            device
        }
        Err(error) => {
            conditions.raise("DeviceMissing", name, error.to_string(), SystemTime::now());
            return None;
        }
    };
    if let Some(second) = config.common.bridge_device_ipv6 {
        match net::ensure_device(name, second.into()).await {
            Ok(device) => info!(device = device.name, address = %second, "the second node-local address is in place"),
            Err(error) => {
                conditions.raise("DeviceMissing", second.to_string(), error.to_string(), SystemTime::now());
            }
        }
    }
    Some(device)
}

fn raise_admin(conditions: &Conditions, address: SocketAddr, error: &io::Error) {
    let message = format!(
        "cannot listen on {address}: {error}; /healthz, /readyz and /metrics are missing until it is free, or set \
         commonConfig.adminAddress"
    );
    conditions.raise("AdminAddressUnavailable", address.to_string(), message, SystemTime::now());
}

async fn serve_when_free(address: SocketAddr, sight: Sight, tasks: Tasks) {
    let stop = tasks.stopping();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(REBIND) => {}
        }
        if let Ok(listener) = TcpListener::bind(address).await {
            sight.conditions.clear("AdminAddressUnavailable", &address.to_string());
            return admin::serve(listener, sight, tasks).await;
        }
    }
}
