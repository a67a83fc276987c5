//! SOCKS5 as the configuration has it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use tokio::sync::watch;

use crate::{
    conditions::Conditions,
    config::AgentConfig,
    dns::{Dns, Zones, zone::ZoneSettings},
    lifecycle::Tasks,
    mesh::Threads,
    model::ServiceTable,
    proxy::Through,
    socks5::{self, Settings, Sight},
};

/// Serves clients on the node-local addresses, on the threads of the tunnel. Names are those that DNS has; where it has
/// none, they are made for this alone.
#[expect(clippy::too_many_arguments, reason = "called once, and each is a part of the agent of its own")]
pub(super) fn start(
    config: &AgentConfig,
    node: &str,
    through: Through,
    tables: watch::Receiver<Arc<ServiceTable>>,
    dns: Option<&Dns>,
    conditions: &Conditions,
    tasks: &Tasks,
    threads: &Threads,
) -> Sight {
    let (common, wanted) = (&config.common, &config.proxy.socks5);
    let domain = config.dns.as_ref().map(|dns| dns.cluster_domain.clone()).unwrap_or_default();
    let _there = threads.handle().enter();
    let zones = dns.and_then(Dns::zones).unwrap_or_else(|| {
        let zone = ZoneSettings { domain: domain.clone(), addresses: Vec::new() };
        Zones::follow(zone, tables.clone(), tasks)
    });
    let second = common.bridge_device_ipv6.map(IpAddr::V6);
    let addresses = [Some(common.bridge_device_ip), second].into_iter().flatten();
    let settings = Settings {
        listen: addresses.map(|ip| SocketAddr::new(ip, wanted.listen_port)).collect(),
        credentials: wanted.credentials.clone(),
        uplinks: config.proxy.ebpf.uplinks.clone(),
        domain,
        ranges: common.aliases,
        node: node.to_owned(),
    };
    socks5::start(settings, Arc::new(through), tables, zones, conditions, tasks)
}
