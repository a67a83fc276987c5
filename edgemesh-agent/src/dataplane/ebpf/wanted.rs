//! What the tables ask of the maps.

use std::net::{IpAddr, SocketAddr};

use edgemesh_common::{
    Addr,
    layout::{
        Backend, ELSEWHERE, FrontendKey, HAS_MEMBERS, HAS_SOURCE_RANGES, HASH_CLIENT, INLINE_BACKENDS, SCOPE_HOST,
        SCOPE_OUTSIDE, SCOPE_SOCKETS, TCP, UDP,
    },
};

use super::ring;
use crate::model::{self, Balance, FrontendAddr, FrontendKind, IpPrefix, Protocol, ServiceEntry};

/// What an entry of `FRONTENDS` is to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) backends: &'a [SocketAddr],
    /// Whether all other ports of its address are refused. Only a ClusterIP belongs to its Service alone: a node has
    /// other ports than node ports, and what else listens on an external IP is not for Kubernetes to say.
    pub(super) owns_address: bool,
    /// See [`edgemesh_common::layout::Frontend::affinity`].
    pub(super) affinity: u64,
    pub(super) affinity_seconds: u32,
    /// See [`edgemesh_common::layout::Frontend::flags`].
    pub(super) flags: u32,
    /// Which clients are admitted, where `HAS_SOURCE_RANGES`.
    pub(super) source_ranges: &'a [IpPrefix],
}

/// The entries for a frontend: for sockets, and for traffic from outside where it can come from there.
pub(super) fn wanted<'a>(
    entry: &'a ServiceEntry,
    frontend: &'a model::Frontend,
) -> impl Iterator<Item = (FrontendKey, Wanted<'a>)> {
    let affinity_seconds = frontend.affinity.map_or(0, std::num::NonZeroU32::get);
    let wanted = move |key: FrontendKey, backends: &'a [SocketAddr]| {
        let mut flags = 0;
        if frontend.balance == Balance::SourceIp && !backends.is_empty() && backends.len() <= ring::MAX_BACKENDS {
            flags |= HASH_CLIENT;
        }
        if backends.len() > INLINE_BACKENDS && (key.proto == UDP || affinity_seconds != 0) {
            flags |= HAS_MEMBERS;
        }
        let mut source_ranges: &[IpPrefix] = &[];
        if key.scope == SCOPE_OUTSIDE {
            if backends.is_empty() && !frontend.backends.is_empty() {
                flags |= ELSEWHERE;
            }
            // As kube-proxy: node ports and external IPs are not limited.
            if frontend.kind == FrontendKind::LoadBalancer
                && let Some(ranges) = &entry.service.source_ranges
            {
                flags |= HAS_SOURCE_RANGES;
                source_ranges = ranges;
            }
        }
        let owns_address = frontend.kind == FrontendKind::ClusterIp;
        let affinity = if affinity_seconds == 0 { 0 } else { affinity_of(entry, frontend) };
        (key, Wanted { backends, owns_address, affinity, affinity_seconds, flags, source_ranges })
    };
    keys(frontend).map(move |key| {
        wanted(key, if key.scope == SCOPE_OUTSIDE { &frontend.external_backends } else { &frontend.backends })
    })
}

/// The keys of the entries for a frontend.
pub(super) fn keys(frontend: &model::Frontend) -> impl Iterator<Item = FrontendKey> + use<> {
    let scopes: &[u8] = match frontend.kind {
        FrontendKind::ClusterIp => &[SCOPE_SOCKETS],
        FrontendKind::NodePort | FrontendKind::LoadBalancer | FrontendKind::ExternalIp if frontend.host_only() => {
            &[SCOPE_HOST]
        }
        FrontendKind::NodePort | FrontendKind::LoadBalancer | FrontendKind::ExternalIp => {
            &[SCOPE_SOCKETS, SCOPE_OUTSIDE]
        }
    };
    let at = frontend.at;
    let proto = match at.protocol {
        Protocol::Tcp => Some(TCP),
        Protocol::Udp => Some(UDP),
        Protocol::Sctp => None,
    };
    proto.into_iter().flat_map(move |proto| {
        let key = FrontendKey::new(at.addr.ip().into(), at.addr.port().to_be_bytes(), proto);
        scopes.iter().map(move |scope| key.in_scope(*scope))
    })
}

/// Names what all frontends of a Service port and family share of their clients: derived from what it is, so that it is
/// the same after a restart (64-bit FNV-1a).
fn affinity_of(entry: &ServiceEntry, frontend: &model::Frontend) -> u64 {
    let name = &entry.service.name;
    let port = entry.ports.get(frontend.port).map_or(0, |served| served.port.port.get());
    let family = if frontend.at.addr.is_ipv4() { "4" } else { "6" };
    let text = format!("{}/{}/{port}/{}/{family}", name.namespace, name.name, frontend.at.protocol);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

pub(super) fn addr_of(key: &FrontendKey) -> FrontendAddr {
    let protocol = if key.proto == TCP { Protocol::Tcp } else { Protocol::Udp };
    FrontendAddr { addr: SocketAddr::new(IpAddr::from(key.addr), u16::from_be_bytes(key.port)), protocol }
}

pub(super) fn socket_addr(backend: &Backend) -> SocketAddr {
    SocketAddr::new(IpAddr::from(backend.addr), u16::from_be_bytes(backend.port))
}

pub(super) fn same(have: &Backend, want: &SocketAddr) -> bool {
    have.addr == Addr::from(want.ip()) && have.port == want.port().to_be_bytes()
}
