//! Where upstreams come from, followed as it changes: resolv.conf, or the cluster's DNS Services.

use std::{
    collections::BTreeSet,
    io,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{sync::watch, task::spawn_blocking, time::sleep};

use super::{
    Forwarder, Upstreams,
    resolv_conf::{self, FileWatch},
};
use crate::model::{ServiceKind, ServiceTable};

pub(super) const MISSING: &str = "DnsUpstreamsMissing";
const PORT: u16 = 53;
/// Tables may come by the hundred in a second.
const QUIET: Duration = Duration::from_millis(200);

pub(super) struct Follow {
    forwarder: Forwarder,
    tables: watch::Receiver<Arc<ServiceTable>>,
}

impl Follow {
    /// Looks for upstreams for the first time, so that the very first question finds them.
    pub(super) fn new(forwarder: Forwarder, tables: watch::Receiver<Arc<ServiceTable>>) -> Self {
        let mut follow = Self { forwarder, tables };
        match follow.forwarder.0.settings.upstreams.clone() {
            Upstreams::ResolvConf(path) => follow.take(&path, resolv_conf::read(&path)),
            Upstreams::ClusterDns { auto_detect, servers } => follow.detect(auto_detect, &servers),
        }
        follow
    }

    /// Looks again whenever something may have changed.
    pub(super) async fn run(mut self) {
        match self.forwarder.0.settings.upstreams.clone() {
            Upstreams::ResolvConf(path) => {
                // Watching before reading: what changes in between is seen by one of the two.
                let mut watch = FileWatch::new(&path);
                loop {
                    let reading = path.clone();
                    // A network file system may take its time.
                    if let Ok(read) = spawn_blocking(move || resolv_conf::read(&reading)).await {
                        self.take(&path, read);
                    }
                    watch.changed().await;
                }
            }
            Upstreams::ClusterDns { auto_detect, servers } => {
                while auto_detect && self.tables.changed().await.is_ok() {
                    sleep(QUIET).await;
                    self.detect(auto_detect, &servers);
                }
            }
        }
    }

    fn take(&self, path: &Path, read: io::Result<Vec<SocketAddr>>) {
        let problem = match read {
            Ok(servers) if servers.is_empty() => "it names no name server".to_owned(),
            Ok(servers) if !self.forwarder.set_servers(&servers) => {
                "it names nobody but this agent, which would ask itself".to_owned()
            }
            Ok(_) => return self.forwarder.0.conditions.clear(MISSING, &path.display().to_string()),
            Err(error) => error.to_string(),
        };
        let path = path.display().to_string();
        let message = format!(
            "cannot take name servers from {path}: {problem}; {}; give it a line 'nameserver ADDRESS' with a server that \
             knows the names outside the cluster",
            self.what_stays()
        );
        self.forwarder.0.conditions.raise(MISSING, path, message, SystemTime::now());
    }

    fn detect(&mut self, auto_detect: bool, configured: &[SocketAddr]) {
        const SUBJECT: &str = "cacheDNS";
        let table = Arc::clone(&self.tables.borrow_and_update());
        let found = if auto_detect { cluster_dns(&table) } else { BTreeSet::new() };
        let servers: Vec<SocketAddr> = found.into_iter().chain(configured.iter().copied()).collect();
        if self.forwarder.set_servers(&servers) {
            self.forwarder.0.conditions.clear(MISSING, SUBJECT);
        } else if table.complete || !auto_detect {
            let message = format!(
                "no DNS of the cluster to ask: there is no Service kube-system/coredns, kube-system/kube-dns or one labelled \
                 k8s-app=kube-dns with a ClusterIP other than this agent's, and upstreamServers names none; {}; set \
                 modules.edgeDNS.cacheDNS.upstreamServers",
                self.what_stays()
            );
            self.forwarder.0.conditions.raise(MISSING, SUBJECT, message, SystemTime::now());
        }
    }

    fn what_stays(&self) -> &'static str {
        if self.forwarder.routes().group(b"\0").upstreams.is_empty() {
            "until then they are answered from the cache, or with SERVFAIL"
        } else {
            "those known before stay in use"
        }
    }
}

/// The ClusterIPs of the cluster's DNS, by the names and the label that EdgeMesh looks for (pkg/dns/dns.go).
fn cluster_dns(table: &ServiceTable) -> BTreeSet<SocketAddr> {
    let services = table.services.iter().map(|entry| &entry.service);
    let is_dns = |namespace: &str, name: &str| namespace == "kube-system" && matches!(name, "coredns" | "kube-dns");
    services
        .filter(|service| service.cluster_dns || is_dns(&service.name.namespace, &service.name.name))
        .filter(|service| !matches!(service.kind, ServiceKind::Headless | ServiceKind::ExternalName))
        .flat_map(|service| &service.cluster_ips)
        .map(|&address| SocketAddr::new(address, PORT))
        .collect()
}
