//! What the tunnel depends on and what depends on it, followed while the agent runs.

use std::{
    fs,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::{MeetingsFile, Sight, meetings::Met, policy::Policy};
use crate::{
    alias::Meetings,
    conditions::Conditions,
    config::{self, AgentConfig, Environment, Leniency, TunnelConfig},
    model::ServiceTable,
    proxy::Through,
    tunnel::{AllowList, DialPolicy, NodeName, Peers, Psks, RelayNode, Settings, Tunnel},
};

const PSK_UNUSABLE: &str = "PskUnusable";
const PSK_PUBLIC: &str = "PskPublic";
const NOT_STARTED: &str = "TunnelNotStarted";
const NO_RELAY: &str = "RelaysUnreachable";
const WRONG_PSK: &str = "WrongPskSeen";
const NOT_FOLLOWED: &str = "RelayNodesNotFollowed";

/// How often files are looked at and conditions judged. Watching would be quicker, but misses changes on file systems
/// without notifications and loses track when a mount is replaced; and a new relay or key is not a matter of seconds.
const LOOK: Duration = Duration::from_secs(5);
/// How long no relay may be connected before it is a condition: a start and a restart of a relay take less.
const RELAY_GRACE: Duration = Duration::from_secs(15);
/// How long a node with another PSK is remembered.
const WRONG_PSK_STAYS: Duration = Duration::from_secs(300);

/// Starts the tunnel and goes with it to its end.
pub(super) struct Follower {
    node: String,
    config: TunnelConfig,
    file: Option<PathBuf>,
    policy: Arc<Policy>,
    meet: watch::Sender<Arc<Meetings>>,
    met: Met,
    remembered: Option<MeetingsFile>,
    /// Whether what is in the file is not what is believed.
    forgotten: bool,
    through: Through,
    sight: Sight,
    conditions: Conditions,
    psk_seen: Option<Stamp>,
    file_seen: Option<Stamp>,
    /// When a relay was last connected, or the tunnel started.
    relayed: Instant,
    wrong: u64,
    wrong_since: Option<Instant>,
}

/// Takes over the endpoints of each table until the agent stops.
pub(super) async fn tables(
    policy: Arc<Policy>,
    mut tables: watch::Receiver<Arc<ServiceTable>>,
    stop: CancellationToken,
) {
    loop {
        let table = Arc::clone(&tables.borrow_and_update());
        policy.follow(table);
        tokio::select! {
            () = stop.cancelled() => return,
            changed = tables.changed() => if changed.is_err() { return },
        }
    }
}

impl Follower {
    pub(super) fn new(
        config: &AgentConfig,
        node: &str,
        policy: Arc<Policy>,
        meet: watch::Sender<Arc<Meetings>>,
        through: Through,
        sight: Sight,
        conditions: Conditions,
    ) -> Self {
        let tunnel = config.tunnel.clone();
        let met = Met::new(&meet.borrow(), Instant::now());
        Self {
            node: node.to_owned(),
            file_seen: config.file.as_deref().and_then(Stamp::of),
            file: config.file.clone(),
            config: tunnel,
            policy,
            met,
            meet,
            remembered: config.common.alias_file.as_deref().map(MeetingsFile::beside),
            forgotten: false,
            through,
            sight,
            conditions,
            psk_seen: None,
            relayed: Instant::now(),
            wrong: 0,
            wrong_since: None,
        }
    }

    pub(super) async fn run(mut self, stop: CancellationToken) {
        let Ok(node) = self.node.parse::<NodeName>() else {
            let message = format!("the tunnel is off: NODE_NAME is no name of a node: {:?}", self.node);
            return self.raise(NOT_STARTED, message);
        };
        if !self.config.psk_enable {
            let message = "the tunnel is off: modules.edgeTunnel.psk.enable is false, and without a PSK anybody could \
                           be any node; set it to true, with the same PSK on all nodes";
            return self.raise(NOT_STARTED, message.to_owned());
        }
        self.name_relays(&node);
        let tunnel = loop {
            if let Some(tunnel) = self.try_to_start(&node).await {
                break tunnel;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
        };
        info!(port = self.config.listen_port, relays = self.config.relays.len(), "the tunnel has started");
        self.relayed = Instant::now();
        self.policy.set_own(tunnel.addresses());
        self.through.set(tunnel.clone());
        let mut peers = tunnel.peers();
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                changed = peers.changed() => {
                    if changed.is_err() {
                        stop.cancelled().await;
                        break;
                    }
                    let newest = Arc::clone(&peers.borrow_and_update());
                    self.tell_meetings(&newest);
                }
                _ = look.tick() => self.look(&node, &tunnel).await,
            }
        }
        tunnel.stop().await;
    }

    async fn try_to_start(&mut self, node: &NodeName) -> Option<Tunnel> {
        let psks = self.read_psks().await?;
        let limit = usize::try_from(self.config.max_served).unwrap_or(usize::MAX);
        let settings = Settings {
            allow: self.allow_list(),
            port: self.config.listen_port,
            relays: self.config.relays.clone(),
            serve_relay: self.config.serve_relay,
            hole_punching: self.config.hole_punching,
            announce: self.config.announce.clone(),
            max_served: limit.min(tokio::sync::Semaphore::MAX_PERMITS),
            ..Settings::new(node.clone(), psks)
        };
        let policy: Arc<dyn DialPolicy> = Arc::<Policy>::clone(&self.policy);
        match Tunnel::start(settings, policy) {
            Ok(tunnel) => {
                self.conditions.clear(NOT_STARTED, "");
                Some(tunnel)
            }
            Err(error) => {
                let message = format!(
                    "{error}; pods of other sites are refused until it can; stop what uses the port (an EdgeMesh of \
                     before?), or set modules.edgeTunnel.listenPort"
                );
                self.raise(NOT_STARTED, message);
                // The next attempt needs the keys again.
                self.psk_seen = None;
                None
            }
        }
    }

    fn allow_list(&self) -> AllowList {
        if self.config.allowed_peers.is_empty() {
            AllowList::default()
        } else {
            AllowList::only(self.config.allowed_peers.iter().cloned())
        }
    }

    /// The keys, if they can be used; a condition else.
    async fn read_psks(&mut self) -> Option<Psks> {
        let path = self.config.psk.clone();
        let read = spawn_blocking(move || (Stamp::of(&path), Psks::read(&path))).await;
        let subject = self.config.psk.display().to_string();
        match read {
            Ok((stamp, Ok(psks))) => {
                self.psk_seen = stamp;
                self.conditions.clear(PSK_UNUSABLE, &subject);
                if psks.has_public() {
                    let message = "the PSK is the one in EdgeMesh's published manifests, so anybody can be any node of this \
                                   mesh; make another, with 'openssl rand -base64 32', and give it to all nodes";
                    self.conditions.raise(PSK_PUBLIC, subject, message.to_owned(), SystemTime::now());
                } else {
                    self.conditions.clear(PSK_PUBLIC, &subject);
                }
                Some(psks)
            }
            Ok((stamp, Err(error))) => {
                self.psk_seen = stamp;
                let effect = match self.through.tunnel() {
                    Some(_) => "the PSK of before stays in use",
                    None => "pods of other sites are refused until there is one; see modules.edgeTunnel.psk.path",
                };
                self.conditions.raise(PSK_UNUSABLE, subject, format!("{error}; {effect}"), SystemTime::now());
                None
            }
            // The runtime is ending.
            Err(_) => None,
        }
    }

    async fn look(&mut self, node: &NodeName, tunnel: &Tunnel) {
        if Stamp::of(&self.config.psk) != self.psk_seen
            && let Some(psks) = self.read_psks().await
        {
            info!("the PSK file has changed and is followed");
            tunnel.set_membership(psks, self.allow_list()).await;
        }
        if let Some(file) = self.file.clone()
            && let Some(stamp) = Stamp::of(&file)
            && Some(stamp) != self.file_seen
        {
            self.file_seen = Some(stamp);
            self.follow_relays(&file, node, tunnel).await;
        }
        let peers = Arc::clone(&tunnel.peers().borrow());
        self.tell_meetings(&peers);
        self.remember().await;
        let now = Instant::now();
        self.judge_relays(node, &Arc::clone(&tunnel.peers().borrow()), now);
        self.judge_strangers(tunnel.counters().wrong_identities.get(), now);
    }

    async fn follow_relays(&mut self, file: &Path, node: &NodeName, tunnel: &Tunnel) {
        let path = file.to_owned();
        match spawn_blocking(move || relays_of(&path)).await {
            Ok(Ok(relays)) => {
                self.conditions.clear(NOT_FOLLOWED, "");
                if relays != self.config.relays {
                    info!(relays = relays.len(), "relayNodes have changed and are followed");
                    self.config.relays.clone_from(&relays);
                    self.name_relays(node);
                    tunnel.set_relays(relays).await;
                }
            }
            Ok(Err(error)) => {
                let message = format!("the configuration file has changed and is wrong, relayNodes stay: {error}");
                self.raise(NOT_FOLLOWED, message.replace('\n', "; "));
            }
            Err(_) => {}
        }
    }

    fn name_relays(&self, node: &NodeName) {
        let others = self.config.relays.iter().map(|relay| relay.node.clone()).filter(|relay| relay != node);
        self.sight.set_relays(others.collect());
    }

    /// A node that is a relay itself needs no other.
    fn judge_relays(&mut self, node: &NodeName, peers: &Peers, now: Instant) {
        let relays = &self.config.relays;
        let is_relay = relays.iter().any(|relay| relay.node == *node);
        if relays.is_empty() || is_relay || relays.iter().any(|relay| peers.path(&relay.node).is_some()) {
            self.relayed = now;
            return self.conditions.clear(NO_RELAY, "");
        }
        if now.saturating_duration_since(self.relayed) >= RELAY_GRACE {
            let names: Vec<&str> = relays.iter().map(|relay| relay.node.as_str()).collect();
            let message = format!(
                "no relay is connected ({}): nodes of other sites are reached as far as they are connected already; check \
                 that the relays run, and their advertiseAddress and port from this node",
                names.join(", ")
            );
            self.raise(NO_RELAY, message);
        }
    }

    fn judge_strangers(&mut self, wrong: u64, now: Instant) {
        if wrong > self.wrong {
            (self.wrong, self.wrong_since) = (wrong, Some(now));
            let message = "a node has another PSK than this one: it was cut off, or is a relay; the log has its address \
                           (\"peer cut off\", \"relay cannot be reached\"); is the PSK the same on all nodes?";
            self.raise(WRONG_PSK, message.to_owned());
        } else if self.wrong_since.is_some_and(|since| now.saturating_duration_since(since) >= WRONG_PSK_STAYS) {
            self.wrong_since = None;
            self.conditions.clear(WRONG_PSK, "");
        }
    }

    fn tell_meetings(&mut self, peers: &Peers) {
        let at = |node| peers.seen_at(node).iter().map(IpAddr::to_canonical).collect();
        let connected = peers.nodes().map(|node| (node.as_str().into(), at(node))).collect();
        self.met.follow(&connected, Instant::now());
        let met = self.met.all();
        self.forgotten |= self.meet.send_if_modified(|known| {
            let news = **known != met;
            if news {
                *known = Arc::new(met);
            }
            news
        });
    }

    /// Writes what has changed for the next agent. If it cannot be, that agent meets everybody anew.
    async fn remember(&mut self) {
        let Some(file) = self.remembered.clone().filter(|_| self.forgotten) else { return };
        let meetings = Arc::clone(&self.meet.borrow());
        match spawn_blocking(move || file.write(&meetings)).await {
            Ok(Ok(())) => self.forgotten = false,
            Ok(Err(error)) => debug!("meetings cannot be written: {error}"),
            Err(_) => {}
        }
    }

    fn raise(&self, reason: &'static str, message: String) {
        self.conditions.raise(reason, "", message, SystemTime::now());
    }
}

/// What changes when a file is written or replaced.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    /// Of owner and mode too: who could not read it may be able to now.
    changed: (i64, i64),
}

impl Stamp {
    /// None where there is no file.
    fn of(path: &Path) -> Option<Self> {
        let metadata = fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

/// Lenient: the file was good when the agent started, and what else is in it is read at the next start.
fn relays_of(path: &Path) -> Result<Vec<RelayNode>, String> {
    let environment = Environment::of(|name| std::env::var_os(name));
    let loaded = config::load(path, Leniency::Lenient, &environment).map_err(|error| error.to_string())?;
    Ok(loaded.config.tunnel.relays)
}
