//! DNS where there is no file descriptor left. In a program of its own, as that is so for all of it.
#![expect(clippy::unwrap_used, reason = "all of this is a test")]

#[path = "dns/served.rs"]
mod served;

use std::{
    fs::File,
    net::UdpSocket,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use edgemesh_agent::{
    dns::{
        Limits,
        wire::{Name, rtype},
    },
    model::ServiceTable,
};
use served::Served;

const SERVFAIL: u8 = 2;

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
    let table = ServiceTable { complete: true, ..ServiceTable::default() };
    let served = Served::start(Arc::new(table), Limits { queries: None, forwarded: None, waiting: 100 });
    let Served { socket, dns, .. } = &served;
    assert_eq!(ask(socket, "before.example"), 0);

    let process = std::process::id().to_string();
    let limited = Command::new("prlimit").args(["--pid", &process, "--nofile=256:"]).status().unwrap();
    assert!(limited.success());
    let mut held = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        held.push(file);
    }
    for number in 0..3 {
        let begin = Instant::now();
        assert_eq!(ask(socket, &format!("during{number}.example")), SERVFAIL);
        assert!(begin.elapsed() < Duration::from_millis(500), "{:?}", begin.elapsed());
        assert_eq!(ask(socket, "before.example"), 0, "what is known is answered");
        assert_eq!(ask(socket, "dns-version.cluster.local"), 0, "and the cluster's names");
    }
    let upstreams = dns.status().forwarder.upstreams;
    assert!(upstreams.iter().all(|upstream| upstream.healthy), "it is not the upstream's fault: {upstreams:?}");
    drop(held);
    assert_eq!(ask(socket, "after.example"), 0);
    served.stop();
}
