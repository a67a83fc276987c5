//! The swarm: transports and behaviours, put together.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU8,
    sync::Arc,
    time::Duration,
};

use libp2p::{
    Multiaddr, Swarm, SwarmBuilder, autonat, dcutr, identify,
    identity::Keypair,
    mdns,
    multiaddr::Protocol,
    noise, ping, relay,
    swarm::{NetworkBehaviour, behaviour::toggle::Toggle},
    tcp, yamux,
};

use super::{
    NodeName, Transport,
    counters::Counters,
    gate::{Gate, Rules},
    identity::Membership,
    secure::{
        Admitted, Buffered,
        tls::{self, Preference},
    },
    serve::Server,
    streams::Streams,
};

/// Streams of a connection, from both sides and for all purposes. yamux ends a connection that has more, and grants each
/// of them 256 KiB of its GiB.
const MAX_STREAMS: usize = 4096;

/// Round trips are measured, and dead connections found, at this interval.
const PING_EVERY: Duration = Duration::from_secs(2);

/// How long an answer to that may take.
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a connection that nothing uses and nobody needs is kept.
const IDLE: Duration = Duration::from_secs(300);

/// Streams that one side of a QUIC connection may have open: those of a path, and what libp2p needs itself. For each of them
/// quinn (0.11) holds some 50 bytes from the beginning, in tables that double.
const QUIC_STREAMS: u32 = 1792;

/// Bytes in flight on one QUIC stream: 100 Mbit/s over 160 ms.
const QUIC_STREAM_WINDOW: u32 = 2 << 20;

/// Bytes in flight on one QUIC connection.
const QUIC_CONNECTION_WINDOW: u32 = 16 << 20;

/// What a relay does for members, all of whom hold the PSK. Counts are bounded, bytes and time are not.
const MAX_RESERVATIONS: usize = 8192;
const MAX_CIRCUITS: usize = 16_384;
const MAX_CIRCUITS_PER_PEER: usize = 4096;

/// In effect without end: the protocol has room for 2^32 s, and timers for less.
const CIRCUIT_DURATION: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How a TCP connection is encrypted.
///
/// TLS 1.3 is the default; noise (always ChaCha20-Poly1305) is there to be measured against it.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Security {
    /// TLS 1.3.
    #[default]
    Tls,
    /// Noise XX.
    Noise,
}

/// Everything that is served to members.
#[derive(NetworkBehaviour)]
pub(super) struct Mesh {
    pub(super) streams: Streams,
    pub(super) identify: identify::Behaviour,
    pub(super) ping: ping::Behaviour,
    pub(super) relay_client: relay::client::Behaviour,
    pub(super) relay: relay::Behaviour,
    pub(super) dcutr: Toggle<dcutr::Behaviour>,
    pub(super) autonat: autonat::v2::client::Behaviour,
    /// Only of relays: what a neighbour on the LAN can reach is no address for other sites.
    pub(super) autonat_server: Toggle<autonat::v2::server::Behaviour>,
    pub(super) mdns: Toggle<mdns::tokio::Behaviour>,
}

/// What the swarm is built from.
pub(super) struct Parts {
    pub(super) node: NodeName,
    pub(super) keypair: Keypair,
    pub(super) membership: Arc<Membership>,
    pub(super) server: Arc<Server>,
    pub(super) counters: Arc<Counters>,
    pub(super) security: Security,
    pub(super) hole_punching: bool,
    pub(super) mdns: bool,
    pub(super) deadline: Duration,
}

/// Builds the swarm; it does not listen yet. Within a runtime.
///
/// # Errors
///
/// Keys cannot be used for TLS, or the system has no random numbers.
pub(super) fn build(parts: Parts) -> Result<Swarm<Gate<Mesh>>, String> {
    let tcp = tcp::Config::default().nodelay(true).listen_backlog(1024);
    let builder = SwarmBuilder::with_existing_identity(parts.keypair.clone()).with_tokio();
    let (deadline, admitted) = (parts.deadline, Arc::<Admitted>::default());
    let buffered = Arc::clone(&admitted);
    // The builder's types differ with the encryption.
    macro_rules! finish {
        ($security:expr) => {
            builder
                .with_tcp(tcp, $security, yamux)
                .map_err(|error| error.to_string())?
                .with_quic_config(quic)
                .with_relay_client($security, yamux)
                .map_err(|error| error.to_string())?
                .with_behaviour(|keypair, client| behaviour(keypair, client, parts, admitted))
                .map_err(|error| error.to_string())?
                .with_swarm_config(swarm)
                .with_connection_timeout(deadline)
                .build()
        };
    }
    Ok(match parts.security {
        Security::Tls => finish!(|keypair: &Keypair| {
            let security = tls::Config::new(keypair, Preference::of_this_machine());
            security.map(|security| Buffered { security, admitted: Arc::clone(&buffered) })
        }),
        Security::Noise => finish!(|keypair: &Keypair| {
            noise::Config::new(keypair).map(|security| Buffered { security, admitted: Arc::clone(&buffered) })
        }),
    })
}

fn yamux() -> yamux::Config {
    let mut config = yamux::Config::default();
    config.set_max_num_streams(MAX_STREAMS);
    config
}

fn quic(mut config: libp2p::quic::Config) -> libp2p::quic::Config {
    config.handshake_timeout = Duration::from_secs(5);
    config.max_idle_timeout = 8000;
    config.keep_alive_interval = Duration::from_secs(3);
    config.max_concurrent_stream_limit = QUIC_STREAMS;
    config.max_stream_data = QUIC_STREAM_WINDOW;
    config.max_connection_data = QUIC_CONNECTION_WINDOW;
    config
}

fn swarm(config: libp2p::swarm::Config) -> libp2p::swarm::Config {
    config
        .with_idle_connection_timeout(IDLE)
        .with_max_negotiating_inbound_streams(1024)
        .with_dial_concurrency_factor(NonZeroU8::MAX)
        // The first bytes of a stream travel with the choice of its protocol.
        .with_substream_upgrade_protocol_override(libp2p::core::upgrade::Version::V1Lazy)
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

fn behaviour(
    keypair: &Keypair,
    relay_client: relay::client::Behaviour,
    parts: Parts,
    admitted: Arc<Admitted>,
) -> Result<Gate<Mesh>, BoxError> {
    let Parts { node, keypair: _, membership, server, counters, security: _, hole_punching, mdns, deadline } = parts;
    let me = keypair.public().to_peer_id();
    let relay_config = relay::Config {
        max_reservations: MAX_RESERVATIONS,
        max_reservations_per_peer: 8,
        reservation_duration: Duration::from_secs(3600),
        reservation_rate_limiters: Vec::new(),
        max_circuits: MAX_CIRCUITS,
        max_circuits_per_peer: MAX_CIRCUITS_PER_PEER,
        max_circuit_duration: CIRCUIT_DURATION,
        max_circuit_bytes: 0,
        circuit_src_rate_limiters: Vec::new(),
    };
    // A node without multicast, or without the right to it, has a mesh all the same.
    let mdns =
        mdns.then(|| mdns::tokio::Behaviour::new(mdns::Config::default(), me)).transpose().unwrap_or_else(|error| {
            tracing::warn!(%error, "no mDNS: nodes on this LAN are found through relays only");
            None
        });
    let agent = format!("edgemesh/{}", env!("CARGO_PKG_VERSION"));
    let identify =
        identify::Config::new("/edgemesh/1".to_owned(), keypair.public()).with_agent_version(agent).with_cache_size(0);
    let mesh = Mesh {
        streams: Streams::new(me, server, Arc::clone(&counters), deadline),
        identify: identify::Behaviour::new(identify),
        ping: ping::Behaviour::new(ping::Config::new().with_interval(PING_EVERY).with_timeout(PING_TIMEOUT)),
        relay_client,
        relay: relay::Behaviour::new(me, relay_config),
        dcutr: hole_punching.then(|| dcutr::Behaviour::new(me)).into(),
        autonat: autonat::v2::client::Behaviour::default(),
        autonat_server: None.into(),
        mdns: mdns.into(),
    };
    Ok(Gate::new(mesh, &node, Rules { membership, admitted, deadline }, counters))
}

/// Where to listen: each transport on each address.
pub(super) fn listen_addresses(port: u16, ips: &[IpAddr], transports: &[Transport]) -> Vec<Multiaddr> {
    let at = |ip: &IpAddr, transport: &Transport| multiaddr(SocketAddr::new(*ip, port), *transport);
    ips.iter().flat_map(|ip| transports.iter().map(move |transport| at(ip, transport))).collect()
}

/// A transport at a socket address.
pub(super) fn multiaddr(address: SocketAddr, transport: Transport) -> Multiaddr {
    let base = Multiaddr::from(address.ip().to_canonical());
    match transport {
        Transport::Tcp => base.with(Protocol::Tcp(address.port())),
        Transport::Quic => base.with(Protocol::Udp(address.port())).with(Protocol::QuicV1),
    }
}

/// What a direct address runs on.
pub(super) fn transport(address: &Multiaddr) -> Transport {
    if address.iter().any(|part| part == Protocol::QuicV1) { Transport::Quic } else { Transport::Tcp }
}
