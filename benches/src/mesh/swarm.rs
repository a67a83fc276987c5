//! The rest of a mesh: the tunnels of many nodes, in this process, on threads that are in the network of one of the lab's.
//!
//! To the agents that are measured they are nodes like others, with names, identities, ports and connections of their own.

use std::{
    fs::File,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use edgemesh_agent::tunnel::{Decision, NodeName, Protocol, Psks, RelayNode, Settings, Stream, Target, Tunnel};
use edgemesh_tests::lab::Node;
use nix::sched::{CloneFlags, setns};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    runtime::{Builder, Runtime},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::sites::{PSK, RELAY, first};

/// The port of the first member; the others follow.
const PORT: u16 = 21_000;
/// Bounds every step of a member.
const PATIENCE: Duration = Duration::from_secs(30);
/// So many do something at a time: more that come from one address at once are taken for strangers.
const AT_ONCE: usize = 10;
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(200);
/// How the names of members begin.
pub(super) const NAMED: &str = "peer-";
const REQUEST: &[u8] = b"the quick brown fox";

/// Tunnels that are connected to the relay; they end when this is dropped.
pub(super) struct Swarm {
    members: Vec<Tunnel>,
    streams: Vec<Stream>,
    runtime: Runtime,
}

impl Swarm {
    /// Starts `count` members at the address of `node` and waits until the relay has each of them.
    pub(super) fn join(node: &Node, relay: &RelayNode, count: u32) -> Result<Self> {
        let path = format!("/proc/{}/ns/net", node.pause_process());
        let network = File::open(&path).with_context(|| format!("could not open {path}"))?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .on_thread_start(move || {
                // A thread that stays outside cannot listen on the node's address, and that ends the start.
                let _ = setns(&network, CloneFlags::CLONE_NEWNET);
            })
            .build()
            .context("could not start the async runtime")?;
        let ip = first(node.ips())?;
        let mut settings = Vec::new();
        for number in 0..count {
            let psks = Psks::parse(PSK).context("the PSK is none")?;
            settings.push(Settings {
                listen: vec![ip],
                port: PORT + u16::try_from(number)?,
                relays: vec![relay.clone()],
                mdns: false,
                ..Settings::new(name(number)?, psks)
            });
        }
        let mut swarm = Self { members: Vec::new(), streams: Vec::new(), runtime };
        swarm.members = swarm.each(settings, join)?;
        Ok(swarm)
    }

    /// Has each member reach a node once, by a stream to `target`, an [`edgemesh_tests::lab::App::Echo`].
    pub(super) fn connect(&self, node: &NodeName, target: SocketAddr) -> Result<()> {
        self.each(self.members.clone(), |member| {
            let node = node.clone();
            async move { persist(&member, &node, target).await.map(drop) }
        })?;
        Ok(())
    }

    /// Has each member open `count` streams to `target` on a node, exchange a few bytes on each, and keep them.
    pub(super) fn open(&mut self, node: &NodeName, target: SocketAddr, count: u32) -> Result<()> {
        let opened = self.each(self.members.clone(), |member| {
            let node = node.clone();
            async move {
                let mut streams = Vec::new();
                for _ in 0..count {
                    streams.push(open(&member, &node, target).await?);
                }
                Ok(streams)
            }
        })?;
        self.streams.extend(opened.into_iter().flatten());
        Ok(())
    }

    /// Runs `work` for all, some at a time, on the runtime's threads: this one is not in the node's network.
    fn each<T, U, F>(&self, all: Vec<T>, work: impl Fn(T) -> F) -> Result<Vec<U>>
    where
        U: Send + 'static,
        F: Future<Output = Result<U>> + Send + 'static,
    {
        self.runtime.block_on(async {
            let (mut tasks, mut done) = (JoinSet::new(), Vec::new());
            for one in all {
                if tasks.len() >= AT_ONCE
                    && let Some(task) = tasks.join_next().await
                {
                    done.push(task.context("a member of the swarm panicked")??);
                }
                tasks.spawn_on(work(one), self.runtime.handle());
            }
            while let Some(task) = tasks.join_next().await {
                done.push(task.context("a member of the swarm panicked")??);
            }
            Ok(done)
        })
    }
}

/// The name of a member.
pub(super) fn name(number: u32) -> Result<NodeName> {
    Ok(format!("{NAMED}{number:03}").parse()?)
}

async fn join(settings: Settings) -> Result<Tunnel> {
    let everything = |_: &NodeName, _: Protocol, target: Target| match target {
        Target::Address(address) => Decision::Allowed(address),
        Target::Node { .. } => Decision::NotAllowed { rule: "a member of a swarm is no node".to_owned() },
    };
    let tunnel = Tunnel::start(settings, Arc::new(everything))?;
    let mut peers = tunnel.peers();
    let relay = peers.wait_for(|peers| peers.nodes().any(|node| node.as_str() == RELAY));
    timeout(PATIENCE, relay).await.with_context(|| format!("{} has no relay", tunnel.node()))??;
    Ok(tunnel)
}

/// [`open`], again and again: a node that everybody comes to at once may refuse some for a moment, as it may strangers.
async fn persist(member: &Tunnel, node: &NodeName, target: SocketAddr) -> Result<Stream> {
    let end = Instant::now() + PATIENCE;
    loop {
        match open(member, node, target).await {
            Err(_) if Instant::now() < end => sleep(PAUSE).await,
            outcome => return outcome,
        }
    }
}

async fn open(member: &Tunnel, node: &NodeName, target: SocketAddr) -> Result<Stream> {
    let mut stream = member.open_tcp(node, target, PATIENCE).await?;
    let mut answer = [0; REQUEST.len()];
    let talk = async {
        stream.write_all(REQUEST).await?;
        stream.flush().await?;
        stream.read_exact(&mut answer).await
    };
    timeout(PATIENCE, talk).await.with_context(|| format!("{target} does not answer {}", member.node()))??;
    ensure!(answer == REQUEST, "{target} does not echo");
    Ok(stream)
}
