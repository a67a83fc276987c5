//! DNS where there is no file descriptor left. In a program of its own, as that is so for all of it.
#![expect(clippy::unwrap_used, reason = "all of this is a test")]

use std::{
    fs::File,
    net::{SocketAddr, UdpSocket},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use edgemesh_agent::{
    conditions::Conditions,
    dns::{
        Dns, Limits, Settings,
        forward::{self, CacheSettings, Upstreams},
        wire::{Name, rtype},
        zone::ZoneSettings,
    },
    lifecycle::Tasks,
    model::ServiceTable,
};
use tokio::sync::watch;

const PATIENCE: Duration = Duration::from_secs(20);
const SERVFAIL: u8 = 2;

/// Answers every question with a record of no use.
fn upstream() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
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

/// The response code.
fn ask(socket: &UdpSocket, name: &str) -> u8 {
    let name: Name = name.parse().unwrap();
    let mut message = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(name.as_wire());
    message.extend_from_slice(&rtype::A.to_be_bytes());
    message.extend_from_slice(&[0, 1]);
    socket.send(&message).unwrap();
    let mut buffer = [0; 2048];
    let length = socket.recv(&mut buffer).unwrap();
    assert!(length >= message.len());
    buffer[3] & 0x0f
}

#[test]
fn without_descriptors_names_outside_fail_at_once_and_no_upstream_is_blamed() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let tasks = Tasks::default();
    let table = ServiceTable { complete: true, ..ServiceTable::default() };
    let (_publish, tables) = watch::channel(Arc::new(table));
    let settings = Settings {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        zone: Some(ZoneSettings::default()),
        forward: forward::Settings {
            upstreams: Upstreams::ClusterDns { auto_detect: false, servers: vec![upstream()] },
            stub_domains: Vec::new(),
            own: Vec::new(),
            cache: CacheSettings::default(),
        },
        limits: Limits { queries: None, forwarded: None, waiting: 100 },
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
        std::thread::sleep(Duration::from_millis(5));
    };
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(server).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(ask(&socket, "before.example"), 0);

    let process = std::process::id().to_string();
    let limited = Command::new("prlimit").args(["--pid", &process, "--nofile=256:"]).status().unwrap();
    assert!(limited.success());
    let mut held = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        held.push(file);
    }
    for number in 0..3 {
        let begin = Instant::now();
        assert_eq!(ask(&socket, &format!("during{number}.example")), SERVFAIL);
        assert!(begin.elapsed() < Duration::from_millis(500), "{:?}", begin.elapsed());
        assert_eq!(ask(&socket, "before.example"), 0, "what is known is answered");
        assert_eq!(ask(&socket, "dns-version.cluster.local"), 0, "and the cluster's names");
    }
    let upstreams = dns.status().forwarder.upstreams;
    assert!(upstreams.iter().all(|upstream| upstream.healthy), "it is not the upstream's fault: {upstreams:?}");
    drop(held);
    assert_eq!(ask(&socket, "after.example"), 0);
    assert!(runtime.block_on(tasks.drain(PATIENCE)));
}
