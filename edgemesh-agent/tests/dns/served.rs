//! A DNS server on a loopback address, with an upstream that answers everything.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use edgemesh_agent::{
    conditions::Conditions,
    dns::{
        Dns, Limits, Settings,
        forward::{self, CacheSettings, Upstreams},
        zone::ZoneSettings,
    },
    lifecycle::Tasks,
    model::ServiceTable,
};
use tokio::{runtime::Runtime, sync::watch};

const PATIENCE: Duration = Duration::from_secs(20);

/// The server, and a client's socket that is connected to it.
pub(crate) struct Served {
    pub(crate) socket: UdpSocket,
    pub(crate) dns: Dns,
    runtime: Runtime,
    tasks: Tasks,
    _publish: watch::Sender<Arc<ServiceTable>>,
}

impl Served {
    /// Waits until it listens and knows its upstream.
    pub(crate) fn start(table: Arc<ServiceTable>, limits: Limits) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let tasks = Tasks::default();
        let (publish, tables) = watch::channel(table);
        let settings = Settings {
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            zone: Some(ZoneSettings::default()),
            forward: forward::Settings {
                upstreams: Upstreams::ClusterDns { auto_detect: false, servers: vec![upstream()] },
                stub_domains: Vec::new(),
                own: Vec::new(),
                cache: CacheSettings::default(),
            },
            limits,
            closed_to: None,
        };
        let dns = runtime.block_on(async { Dns::start(settings, tables, &Conditions::default(), &tasks) }).unwrap();
        let end = Instant::now() + PATIENCE;
        let server = loop {
            let status = dns.status();
            let udp = status.listeners.iter().find(|listener| listener.listening && listener.transport == "UDP");
            if let Some(listener) = udp.filter(|_| !status.forwarder.upstreams.is_empty()) {
                break listener.address;
            }
            assert!(Instant::now() < end, "{status:?}");
            thread::sleep(Duration::from_millis(5));
        };
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(server).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, dns, runtime, tasks, _publish: publish }
    }

    /// Stops it.
    pub(crate) fn stop(self) {
        assert!(self.runtime.block_on(self.tasks.drain(PATIENCE)));
    }
}

/// Answers every question with 192.0.2.7, for five minutes.
fn upstream() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let name = 12 + buffer[12..].iter().position(|byte| *byte == 0).unwrap() + 1;
            let mut response = buffer[..length.min(name + 4)].to_vec();
            response[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
            response.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4, 192, 0, 2, 7]);
            socket.send_to(&response, from).unwrap();
        }
    });
    address
}
