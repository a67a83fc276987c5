//! Much at once: connections, clients, bytes.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use edgemesh_tests::lab::{Transport, agent::AgentOptions};

use super::sites::{Sites, TCP, UDP, server};

const CLIENTS: u32 = 1000;
/// For a machine that does something else meanwhile.
const PATIENT: Duration = Duration::from_secs(30);
/// How much goes through one connection, each way; `EDGEMESH_TUNNEL_MIB=1024` for the whole.
const MIB: u64 = 64;

fn mib() -> Result<u64> {
    match std::env::var("EDGEMESH_TUNNEL_MIB") {
        Ok(text) => text.parse().with_context(|| format!("EDGEMESH_TUNNEL_MIB={text:?} is no number")),
        Err(_) => Ok(MIB),
    }
}

/// A direct path, and one by a relay.
fn raise() -> Result<Option<Sites>> {
    let edges = [("edge1", "plant"), ("edge2", "shop")];
    let Some(sites) = Sites::raise(&["cloud"], &edges, &AgentOptions::default())? else { return Ok(None) };
    for to in ["cloud", "edge2"] {
        sites.connected("edge1", to)?;
    }
    Ok(Some(sites))
}

#[test]
fn a_thousand_clients_at_once_each_get_their_own_answers() -> Result<()> {
    let Some(sites) = raise()? else { return Ok(()) };
    let client = sites.seat("edge1")?.client.within(PATIENT);
    for to in ["cloud", "edge2"] {
        for (transport, port, rounds) in [(Transport::Tcp, TCP, 6), (Transport::Udp, UDP, 6)] {
            let target = sites.seat(to)?.service(port)[0];
            let report = client.crowd(transport, target, CLIENTS, rounds)?;
            if !report.failures.is_empty() {
                let said = super::report(&sites.seat("edge1")?.node, "status")?;
                let far = super::report(&sites.seat(to)?.node, "status")?;
                bail!(
                    "{transport:?} to {to}: {report:?}; {} {}; there {}",
                    said["aliases"],
                    said["tunnel"],
                    far["tunnel"]
                );
            }
            assert_eq!(report.names.get(&server(to)), Some(&u64::from(CLIENTS)), "{transport:?} to {to}: {report:?}");
        }
    }
    Ok(())
}

#[test]
fn clients_that_come_and_never_say_that_they_are_done_leave_room_for_all_others() -> Result<()> {
    // As a resolver that asks each question from a port of its own; more than there is room for on all the connections
    // that the two nodes may have.
    const COMING: u32 = 250;
    const TIMES: u32 = 24;
    const BESIDE: u32 = 50;
    let Some(sites) = raise()? else { return Ok(()) };
    let client = sites.seat("edge1")?.client.within(PATIENT);
    for _ in 0..TIMES {
        for (transport, port, count) in [(Transport::Udp, UDP, COMING), (Transport::Tcp, TCP, BESIDE)] {
            let report = client.crowd(transport, sites.seat("edge2")?.service(port)[0], count, 1)?;
            assert_eq!(report.names.get(&server("edge2")), Some(&u64::from(count)), "{transport:?}: {report:?}");
        }
    }
    let status = super::report(&sites.seat("edge1")?.node, "status")?;
    let proxy = &status["aliases"]["proxy"];
    let count = |name: &str| proxy[name].as_u64().context("no count");
    // Some come from a port that another had before.
    assert!(count("flows")? > 1536, "{proxy}");
    assert!(count("evicted_flows")? > 0, "{proxy}");
    Ok(())
}

#[test]
fn much_data_arrives_both_ways_as_it_was_sent() -> Result<()> {
    let Some(sites) = raise()? else { return Ok(()) };
    let (client, bytes) = (sites.seat("edge1")?.client.within(PATIENT), mib()? << 20);
    for to in ["cloud", "edge2"] {
        let report = client.bulk(sites.seat(to)?.service(TCP)[0], bytes)?;
        assert_eq!((report.received, report.intact), (bytes, true), "to {to}");
    }
    Ok(())
}
