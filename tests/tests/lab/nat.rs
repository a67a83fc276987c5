//! Sites behind NAT routers: each kind maps and filters as its name says, as STUN (RFC 5780) finds it out.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{App, Attempt, DEADLINE, Datagrams, Lab, Nat, Node, Site, Transport, errno, eventually};

/// The port that hosts send from.
const PORT: u16 = 20006;
const KINDS: [Nat; 3] = [Nat::FullCone { port: PORT }, Nat::PortRestricted, Nat::Symmetric];
/// How long a connect may take that nobody answers.
const SILENCE: Duration = Duration::from_millis(300);

/// Two servers that all can reach.
struct Internet {
    lan: Site,
    one: Node,
    two: Node,
    /// Each tells its clients at which address it sees them; two of them are on `one`.
    stun: [SocketAddr; 3],
}

impl Internet {
    fn new(lab: &Lab) -> Result<Self> {
        let lan = lab.site("internet", &["203.0.113.0/24"])?;
        let (one, two) = (lan.node("one", &[])?, lan.node("two", &[])?);
        let stun = [serve(&one, App::Udp, 3478)?, serve(&one, App::Udp, 3479)?, serve(&two, App::Udp, 3478)?];
        Ok(Self { lan, one, two, stun })
    }

    /// A site with one node behind a NAT.
    fn home(&self, name: &str, nat: Nat) -> Result<(Site, Node)> {
        let site = self.lan.behind(name, &["192.168.1.0/24"], nat)?;
        let node = site.node(&format!("{name}-host"), &["10.244.1.0/24"])?;
        Ok((site, node))
    }
}

fn serve(node: &Node, app: App, port: u16) -> Result<SocketAddr> {
    node.host().serve(app, port)?.first().copied().context("the node has no address")
}

fn bind(node: &Node, port: u16) -> Result<Datagrams> {
    node.host().bind_udp(SocketAddr::from(([0, 0, 0, 0], port)))
}

/// Whether nothing has come to a socket: the next thing it receives is what it asks for now.
fn nothing_came(socket: &Datagrams, internet: &Internet) -> bool {
    socket.mapped_by(internet.stun[0]).is_ok()
}

#[test]
fn a_cone_maps_a_port_the_same_for_all_destinations_and_a_symmetric_nat_does_not() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let internet = Internet::new(&lab)?;
    for (number, nat) in KINDS.into_iter().enumerate() {
        let (home, host) = internet.home(&format!("home{number}"), nat)?;
        let udp = bind(&host, PORT)?;
        let mut mappings = internet.stun.map(|server| udp.mapped_by(server)).into_iter().collect::<Result<Vec<_>>>()?;
        // TCP likewise (RFC 5382, REQ-1).
        let from_port = host.host().from_port(PORT);
        let mut held = Vec::new();
        for (node, port) in [(&internet.one, 80), (&internet.one, 81), (&internet.two, 80)] {
            let server = SocketAddr::new(node.ips()[0], port);
            if number == 0 {
                serve(node, App::Tcp, port)?;
            }
            let connection = from_port.open(Transport::Tcp, server)?;
            mappings.push(connection.exchange()?.client);
            held.push(connection);
        }
        let public = home.public_ip()?;
        assert!(mappings.iter().all(|mapped| mapped.ip() == public), "{nat:?} is {public}: {mappings:?}");
        let ports = |of: &[SocketAddr]| of.iter().map(SocketAddr::port).collect::<BTreeSet<_>>();
        let (udp, tcp) = (ports(&mappings[..3]), ports(&mappings[3..]));
        match nat {
            Nat::FullCone { .. } | Nat::PortRestricted => assert_eq!((udp.len(), tcp.len()), (1, 1), "{nat:?}"),
            // Three random ports of some 28,000 are hardly ever one and the same.
            Nat::Symmetric => assert!(udp.len() > 1 && tcp.len() > 1, "{mappings:?}"),
        }
    }
    Ok(())
}

#[test]
fn only_a_full_cone_lets_strangers_in_and_only_once_its_host_has_sent() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let internet = Internet::new(&lab)?;
    let (same_address, stranger) = (bind(&internet.one, 3480)?, bind(&internet.two, 3480)?);
    for (number, nat) in KINDS.into_iter().enumerate() {
        let (home, host) = internet.home(&format!("home{number}"), nat)?;
        let socket = bind(&host, PORT)?;
        stranger.send(SocketAddr::new(home.public_ip()?, PORT), "unsolicited")?;
        assert!(nothing_came(&socket, &internet), "{nat:?} let in what no mapping was there for");

        let mapped = socket.mapped_by(internet.stun[0])?;
        same_address.send(mapped, "another port")?;
        stranger.send(mapped, "another address")?;
        match nat {
            Nat::FullCone { .. } => {
                let said = [socket.receive()?, socket.receive()?].map(|(_, text)| text);
                assert_eq!(said, ["another port", "another address"]);
            }
            Nat::PortRestricted | Nat::Symmetric => {
                assert!(nothing_came(&socket, &internet), "{nat:?} let a stranger in");
            }
        }
    }
    Ok(())
}

#[test]
fn each_host_of_a_full_cone_has_a_public_port_of_its_own() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let internet = Internet::new(&lab)?;
    let (home, first) = internet.home("home", Nat::FullCone { port: PORT })?;
    let second = home.node("second", &[])?;
    let stranger = bind(&internet.two, 3480)?;
    for (host, port) in [(&first, PORT), (&second, PORT + 1)] {
        let socket = bind(host, PORT)?;
        let mapped = socket.mapped_by(internet.stun[0])?;
        assert_eq!(mapped, SocketAddr::new(home.public_ip()?, port));
        stranger.send(mapped, host.name())?;
        assert_eq!(socket.receive()?.1, host.name());
    }
    Ok(())
}

#[test]
fn holes_can_be_punched_unless_the_other_side_cannot_know_the_port() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let internet = Internet::new(&lab)?;
    let full_cone = Nat::FullCone { port: PORT };
    for (number, (one, other, punched)) in [
        (Nat::PortRestricted, Nat::PortRestricted, true),
        (full_cone, Nat::Symmetric, true),
        (Nat::PortRestricted, Nat::Symmetric, false),
        (Nat::Symmetric, Nat::Symmetric, false),
    ]
    .into_iter()
    .enumerate()
    {
        let [a, b] = [("a", one), ("b", other)].map(|(name, nat)| internet.home(&format!("{name}{number}"), nat));
        let (a, b) = (bind(&a?.1, PORT)?, bind(&b?.1, PORT)?);
        let (at_a, at_b) = (a.mapped_by(internet.stun[0])?, b.mapped_by(internet.stun[0])?);
        // The first may come before the other side's filter is open; the third has both open if anything has.
        a.send(at_b, "first")?;
        b.send(at_a, "second")?;
        if punched {
            let (source, text) = a.receive()?;
            assert_eq!(text, "second");
            a.send(source, "third")?;
            let mut said = b.receive()?.1;
            if said == "first" {
                said = b.receive()?.1;
            }
            assert_eq!(said, "third", "{one:?} and {other:?}");
        } else {
            a.send(at_b, "third")?;
            let silence = nothing_came(&a, &internet) && nothing_came(&b, &internet);
            assert!(silence, "{one:?} and {other:?} were punched");
        }
    }
    Ok(())
}

#[test]
fn tcp_gets_out_of_a_site_and_into_none_but_through_the_mapping_of_a_full_cone() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let internet = Internet::new(&lab)?;
    let server = serve(&internet.one, App::Tcp, 7000)?;
    let unanswered = Attempt::Failed("ETIMEDOUT".to_owned());
    for (number, nat) in KINDS.into_iter().enumerate() {
        let (home, host) = internet.home(&format!("home{number}"), nat)?;
        let public = home.public_ip()?;
        serve(&host, App::Tcp, PORT)?;
        let outside = internet.two.host().within(SILENCE);
        assert_eq!(outside.connect(SocketAddr::new(public, PORT))?, unanswered, "{nat:?}, before any mapping");
        host.host().stop_serving(App::Tcp, PORT)?;
        let mapped = host.host().from_port(PORT).open(Transport::Tcp, server)?;
        let seen = mapped.exchange()?.client;
        assert_eq!(seen.ip(), public);
        drop(mapped);
        // The connection that opened the mapping may linger on the port.
        eventually(DEADLINE, "the port to be free", || Ok(serve(&host, App::Tcp, PORT).is_ok()))?;
        let attempt = outside.connect(seen)?;
        match nat {
            Nat::FullCone { .. } => {
                assert_eq!(internet.two.host().tcp(seen)?.name, host.name());
            }
            Nat::PortRestricted | Nat::Symmetric => assert_eq!(attempt, unanswered, "{nat:?}"),
        }
    }
    Ok(())
}

#[test]
fn sites_with_the_same_addresses_do_not_meet_and_nothing_leads_out_of_the_lab() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let internet = Internet::new(&lab)?;
    let (near, far) = (internet.home("near", Nat::PortRestricted)?, internet.home("far", Nat::PortRestricted)?);
    assert_eq!(near.1.ips(), far.1.ips());
    for (site, host) in [near, far] {
        let neighbour = site.node(&format!("{}-neighbour", host.name()), &["10.244.2.0/24"])?;
        let pod = host.pod(&format!("{}-pod", host.name()))?;
        let served = pod.serve(App::Tcp, 7000)?[0];
        assert_eq!(served, "10.244.1.2:7000".parse()?);
        assert_eq!(neighbour.host().tcp(served)?.name, pod.name());
        // From outside, neither the site's nodes nor its pods are there.
        for inside in [served, SocketAddr::new(host.ips()[0], 22)] {
            assert_eq!(internet.one.host().connect(inside)?, Attempt::Failed("ENETUNREACH".to_owned()));
        }
        assert_eq!(host.ip(&["-4", "route", "show", "default"])?.trim(), "default via 192.168.1.1 dev eth0");
        // The router has no way to go from here, and says so.
        let elsewhere = host.host().connect("192.0.2.1:80".parse()?)?;
        assert_eq!(elsewhere, Attempt::Failed("ENETUNREACH".to_owned()));
    }
    Ok(())
}

#[test]
fn a_cut_uplink_swallows_everything_and_connections_outlive_it() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let internet = Internet::new(&lab)?;
    let (home, host) = internet.home("home", Nat::PortRestricted)?;
    let server = serve(&internet.one, App::Tcp, 7000)?;
    let held = host.host().within(SILENCE).open(Transport::Tcp, server)?;
    let before = held.exchange()?.client;
    home.cut_uplink()?;
    assert_eq!(errno(&held.exchange().unwrap_err()), Some("ETIMEDOUT"));
    assert_eq!(host.host().within(SILENCE).connect(server)?, Attempt::Failed("ETIMEDOUT".to_owned()));
    home.heal_uplink()?;
    let mut after = None;
    eventually(DEADLINE, "the connection to go on", || {
        after = Some(held.exchange()?.client);
        Ok(true)
    })?;
    assert_eq!(after, Some(before));
    Ok(())
}

#[test]
fn a_new_public_address_ends_all_mappings_and_a_new_lease_is_served_at_once() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let internet = Internet::new(&lab)?;
    let (home, host) = internet.home("home", Nat::FullCone { port: PORT })?;
    let neighbour = home.node("neighbour", &["10.244.2.0/24"])?;
    let served = host.pod("pod")?.serve(App::Tcp, 7000)?[0];
    let (socket, stranger) = (bind(&host, PORT)?, bind(&internet.two, 3480)?);
    let old = socket.mapped_by(internet.stun[0])?;
    let public = home.renumber_uplink()?;
    ensure!(public == home.public_ip()? && public != old.ip(), "{public} is no new address");
    for address in [old, SocketAddr::new(public, PORT)] {
        stranger.send(address, "stale")?;
    }
    assert_eq!(socket.mapped_by(internet.stun[0])?, SocketAddr::new(public, PORT), "a mapping outlived its router");

    let before: IpAddr = host.ips()[0];
    let host = home.renumber(host)?;
    assert_ne!(host.ips()[0], before);
    assert_eq!(host.host().tcp(serve(&internet.one, App::Tcp, 7000)?)?.local.ip(), host.ips()[0]);
    assert_eq!(neighbour.host().tcp(served)?.name, "pod", "the way to its pods has moved along");
    let moved = socket.mapped_by(internet.stun[0])?;
    assert_eq!(moved, SocketAddr::new(public, PORT + 2), "three addresses have been given");
    stranger.send(moved, "moved")?;
    assert_eq!(socket.receive()?.1, "moved", "the full cone leads to the new address");
    Ok(())
}

#[test]
fn a_site_behind_two_nats_gets_out_by_both() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let internet = Internet::new(&lab)?;
    let carrier = internet.lan.behind("carrier", &["100.64.0.0/10"], Nat::Symmetric)?;
    let home = carrier.behind("home", &["192.168.1.0/24"], Nat::PortRestricted)?;
    let host = home.node("host", &[])?;
    let seen = bind(&host, PORT)?.mapped_by(internet.stun[0])?;
    assert_eq!(seen.ip(), carrier.public_ip()?);
    assert_eq!(internet.lan.public_ip().unwrap_err().to_string(), "the site is not behind a router");
    Ok(())
}

#[test]
fn a_port_that_a_router_forwards_leads_to_its_node_and_no_other_does() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let internet = Internet::new(&lab)?;
    let (home, host) = internet.home("home", Nat::PortRestricted)?;
    for port in [7000, 7001] {
        serve(&host, App::Tcp, port)?;
    }
    serve(&host, App::Udp, 7000)?;
    for transport in [Transport::Tcp, Transport::Udp] {
        home.forward(transport, 7000, &host)?;
    }
    let client = internet.one.host();
    for _ in 0..2 {
        let public = home.public_ip()?;
        let forwarded = SocketAddr::new(public, 7000);
        assert_eq!(client.tcp(forwarded)?.name, "home-host");
        assert_eq!(client.udp(forwarded)?.name, "home-host");
        let other = client.within(SILENCE).connect(SocketAddr::new(public, 7001))?;
        assert_eq!(other, Attempt::Failed("ETIMEDOUT".to_owned()));
        // A router that dials in anew is set up as it was.
        home.renumber_uplink()?;
    }
    Ok(())
}
