//! Who is no member, and knocks all the same.

use std::{net::SocketAddr, time::Duration};

use anyhow::Result;
use edgemesh_tests::lab::{Transport, agent::AgentOptions};
use serde_json::json;

use super::{
    report,
    sites::{Sites, TCP, UDP, server},
};

/// The tunnel's port.
const PORT: u16 = 20006;
const ATTEMPTS: u32 = 10_000;
/// More than what connections on their way to membership may take, and less than what 10,000 would.
const MEMORY: u64 = 48 << 20;

#[test]
fn a_stranger_is_served_nothing_and_takes_little_whatever_it_sends() -> Result<()> {
    let Some(mut sites) = Sites::raise(&["cloud"], &[("edge1", "plant")], &AgentOptions::default())? else {
        return Ok(());
    };
    sites.connected("edge1", "cloud")?;
    let stranger = sites.plant.node("stranger", &["10.244.9.0/24", "fd00:10:244:9::/64"])?;
    let (edge1, knocker) = (sites.seat("edge1")?, stranger.host());
    let member = edge1.client.open(Transport::Tcp, sites.seat("cloud")?.service(TCP)[0])?;
    let before = edge1.agent.resident_bytes()?;
    for ip in edge1.node.ips() {
        let target = SocketAddr::new(*ip, PORT);
        // Garbage to both transports, ...
        for _ in 0..20 {
            let answered = knocker.within(Duration::from_millis(500)).http_get(target, "/", 1);
            assert!(answered.is_err(), "{answered:?}");
        }
        let said = knocker.within(Duration::from_millis(20)).spread(Transport::Udp, target, 1000, 64)?;
        assert!(said.names.is_empty(), "{said:?}");
        // ... and silence, which a handshake that never comes to its end is too: as many at once as threads there are.
        let held = knocker.within(Duration::from_millis(20)).spread(Transport::Tcp, target, ATTEMPTS / 2, 64)?;
        assert!(held.names.is_empty(), "{held:?}");
        assert_eq!(member.exchange()?.name, server("cloud"), "a member's connection goes on");
        sites.connected("edge1", "cloud")?;
    }
    let more = edge1.agent.peak_bytes()?.saturating_sub(before);
    assert!(more < MEMORY, "{more} bytes more than before, at the most");
    let status = report(&edge1.node, "status")?;
    assert_eq!(status["tunnel"]["counts"]["served"], json!(0), "{status}");
    let log = edge1.agent.log()?;
    for line in ["peer cut off", "connection not taken"] {
        let count = log.lines().filter(|logged| logged.contains(line)).count();
        // One of each kind a minute, of which there are four.
        assert!(count <= 8, "{count} times {line:?} in\n{log}");
    }
    assert!(log.contains("peer cut off"), "{log}");

    // A member that comes while all that goes on gets in.
    let hammer = knocker.within(Duration::from_millis(20)).hammer(
        Transport::Tcp,
        SocketAddr::new(edge1.node.ips()[0], PORT),
        32,
    )?;
    sites.seat("cloud")?.agent.kill()?;
    sites.start_again("cloud")?;
    sites.connected("cloud", "edge1")?;
    sites.connected("edge1", "cloud")?;
    assert_eq!(sites.seat("edge1")?.client.udp(sites.seat("cloud")?.service(UDP)[0])?.name, server("cloud"));
    let knocked = hammer.stop()?;
    assert!(knocked.names.is_empty(), "{knocked:?}");
    Ok(())
}
