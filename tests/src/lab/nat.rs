//! NAT routers: the namespace between a site and the one its uplink is in, and the rules in it.

use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context as _, Result, bail, ensure};

use super::netns::{self, Netns};
use super::place::{self, Place};
use super::subnet::Subnet;
use super::topology::Site;
use super::{DEADLINE, Inner, Transport, locked};

/// Seconds for which a full cone keeps a port open after the last packet from inside; RFC 4787 recommends 300 (REQ-5).
const MAPPING_SECONDS: u32 = 300;
/// Which of them the machine has decides nothing: the rules are the same.
const RESTORE: [&str; 2] = ["iptables-restore", "iptables-legacy-restore"];
/// A router that is replaced keeps this address, so that its site's nodes need not find it anew.
const LAN_MAC: &str = "02:00:00:00:00:fe";

/// How a router translates and filters, in the terms of RFC 4787, and of RFC 5382 for TCP.
///
/// All of them answer unsolicited packets with silence, none carries packets between two of its own hosts that use its
/// public address (no hairpinning), and none tells hosts of anything (no UPnP, no NAT-PMP).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nat {
    /// Endpoint-independent mapping and filtering, known as full cone, for what hosts send from one TCP and UDP port:
    /// whoever knows the public port reaches the host, once it has sent anything from it in the last five minutes. The
    /// public port is the same for the first host of the site, and one higher for each further one, or further address
    /// of one. Other ports are treated as by [`Nat::PortRestricted`].
    FullCone {
        /// The port on the hosts.
        port: u16,
    },
    /// Endpoint-independent mapping, address and port-dependent filtering: a port-restricted cone. What Linux and with
    /// it most home routers do. As there, the public port is the host's own unless another host has it already.
    PortRestricted,
    /// Address and port-dependent mapping and filtering: a symmetric NAT. Each destination sees another, random port.
    Symmetric,
}

/// The router of a site, a handle; the router itself lives as long as the lab.
#[derive(Debug)]
pub(super) struct Router {
    /// The place in [`Inner::routers`].
    number: usize,
    /// The site that its uplink is in.
    outside: Site,
    /// The bridge of its own site.
    inside: String,
    /// The IPv4 subnet of its own site, whose first address it has.
    lan: Subnet,
    nat: Nat,
    forwards: Mutex<Vec<Forward>>,
}

/// A port that a router forwards to the same port of a host.
#[derive(Debug, Clone, Copy)]
pub(super) struct Forward {
    pub(super) transport: Transport,
    pub(super) port: u16,
    pub(super) host: IpAddr,
}

/// How a router is attached to the site outside.
#[derive(Debug)]
pub(super) struct Uplink {
    /// The router's address outside.
    pub(super) ip: IpAddr,
    /// The subnet that the address is of.
    pub(super) subnet: Subnet,
    /// The router of the site outside, if that is behind one itself.
    pub(super) gateway: Option<IpAddr>,
}

/// A router as it is now; the lab holds it, as no process is in its namespace.
#[derive(Debug)]
pub(super) struct Running {
    netns: Netns,
    public_ip: IpAddr,
    /// The ends of its links on the lab's backbone.
    wan: String,
    lan: String,
}

impl Router {
    /// Puts a router between the site `outside` and the bridge `inside`.
    pub(super) fn start(outside: &Site, inside: &str, lan: Subnet, nat: Nat) -> Result<Self> {
        let mut routers = locked(&outside.lab().routers);
        let (number, outside, inside) = (routers.len(), outside.clone(), inside.to_owned());
        let router = Self { number, outside, inside, lan, nat, forwards: Mutex::default() };
        routers.push(router.run(&[])?);
        drop(routers);
        Ok(router)
    }

    /// The address of the router in the site, through which its hosts reach all else.
    pub(super) fn gateway(&self) -> IpAddr {
        self.lan.nth(1)
    }

    /// The router's address outside.
    pub(super) fn public_ip(&self) -> Result<IpAddr> {
        self.with(|running| Ok(running.public_ip))
    }

    /// Replaces the router by one without a memory, with another address outside, for the site's `hosts`.
    pub(super) fn replace(&self, hosts: &[IpAddr]) -> Result<()> {
        self.with(|running| {
            let Running { wan, lan, .. } = running;
            self.lab().backbone.ip(&format!("link del {wan}\nlink del {lan}\n"))?;
            *running = self.run(hosts)?;
            Ok(())
        })
    }

    /// Tells the router which addresses hosts of the site have been given, in that order.
    pub(super) fn set_hosts(&self, hosts: &[IpAddr]) -> Result<()> {
        // Only these rules name hosts.
        let Nat::FullCone { .. } = self.nat else { return Ok(()) };
        self.load_rules(hosts)
    }

    /// Forwards a port, for the site's `hosts`.
    pub(super) fn forward(&self, forward: Forward, hosts: &[IpAddr]) -> Result<()> {
        locked(&self.forwards).push(forward);
        self.load_rules(hosts)
    }

    fn load_rules(&self, hosts: &[IpAddr]) -> Result<()> {
        self.with(|running| restore(self.lab(), &running.netns, &self.rules(hosts)))
    }

    fn rules(&self, hosts: &[IpAddr]) -> String {
        rules(self.nat, hosts, &locked(&self.forwards))
    }

    /// Has the uplink swallow all packets in silence, or carry them again.
    pub(super) fn carry(&self, carry: bool) -> Result<()> {
        let bridge = if carry { format!("master {}", self.outside.bridge()) } else { "nomaster".to_owned() };
        self.with(|running| self.lab().backbone.ip(&format!("link set {} {bridge}\n", running.wan)))
    }

    fn lab(&self) -> &Inner {
        self.outside.lab()
    }

    fn with<T>(&self, work: impl FnOnce(&mut Running) -> Result<T>) -> Result<T> {
        work(locked(&self.lab().routers).get_mut(self.number).context("the site's router is gone")?)
    }

    fn run(&self, hosts: &[IpAddr]) -> Result<Running> {
        let Uplink { ip, subnet, gateway } = self.outside.next_uplink()?;
        let netns = Netns::new()?;
        netns.sysctl(netns::QUIET)?;
        netns.sysctl(netns::FORWARDING)?;
        // Before there is anything to forward.
        restore(self.lab(), &netns, &self.rules(hosts))?;
        let link = self.lab().next_link();
        let (wan, lan, path) = (format!("wan{link}"), format!("lan{link}"), netns.path());
        self.lab().backbone.ip(&format!(
            "link add {wan} type veth peer name wan netns {path}\n\
             link add {lan} type veth peer name lan address {LAN_MAC} netns {path}\n\
             link set {wan} master {} up\nlink set {lan} master {} up\n",
            self.outside.bridge(),
            self.inside,
        ))?;
        let mut batch = format!(
            "address add {} dev wan\naddress add {} dev lan\nlink set wan up\nlink set lan up\n",
            subnet.with_prefix(ip),
            self.lan.with_prefix(self.gateway()),
        );
        if let Some(gateway) = gateway {
            // Writing to a String cannot fail.
            let _ = writeln!(batch, "route add default via {gateway} dev wan");
        }
        netns.ip(&batch)?;
        Ok(Running { netns, public_ip: ip, wan, lan })
    }
}

/// What `iptables-restore` makes a router of, between its interfaces `lan` and `wan`.
///
/// MASQUERADE keeps the mapping of a host's port for all destinations, whatever port it had to take, unless it is asked
/// for a random one: then each connection has its own (`get_unique_tuple`, net/netfilter/nf_nat_core.c).
fn rules(nat: Nat, hosts: &[IpAddr], forwards: &[Forward]) -> String {
    let random = if nat == Nat::Symmetric { " --random-fully" } else { "" };
    let (mut mark, mut open, mut map) = (String::new(), String::new(), String::new());
    for Forward { transport, port, host } in forwards {
        let protocol = match transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        // Writing to a String cannot fail.
        let _ =
            writeln!(open, "-A PREROUTING -i wan -p {protocol} --dport {port} -j DNAT --to-destination {host}:{port}");
    }
    if let Nat::FullCone { port } = nat {
        for (public, host) in (port..).zip(hosts) {
            for protocol in ["udp", "tcp"] {
                // Linux maps connections, so an endpoint-independent mapping is made of fixed ports, which no two hosts
                // may ever share. One entry, of any address (the mask), tells whether the host has used its port.
                let recent = format!("-m recent --name {protocol}{public} --mask 0.0.0.0");
                let from = format!("-s {host} -p {protocol} --sport {port}");
                // Writing to a String cannot fail.
                let _ = writeln!(mark, "-A FORWARD -i lan -o wan {from} {recent} --set");
                let _ = writeln!(
                    open,
                    "-A PREROUTING -i wan -p {protocol} --dport {public} {recent} --rcheck --seconds {MAPPING_SECONDS} \
                     -j DNAT --to-destination {host}:{port}"
                );
                let _ = writeln!(map, "-A POSTROUTING -o wan {from} -j MASQUERADE --to-ports {public}");
            }
        }
    }
    if !open.is_empty() {
        mark.push_str("-A FORWARD -i wan -m conntrack --ctstate DNAT -j ACCEPT\n");
    }
    // The router's own silence is part of the job: a refusal of a packet that came too early would have it remembered,
    // and the mapping it was meant for would then get another port.
    format!(
        "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n\
         -A INPUT -i wan -m conntrack ! --ctstate ESTABLISHED,RELATED -j DROP\n\
         -A FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         {mark}\
         -A FORWARD -i lan -o wan -j ACCEPT\n\
         -A FORWARD -i wan -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n\
         COMMIT\n\
         *nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n\
         {open}{map}\
         -A POSTROUTING -o wan -j MASQUERADE{random}\n\
         COMMIT\n"
    )
}

/// Loads rules with the first `iptables-restore` that can.
fn restore(lab: &Inner, netns: &Netns, rules: &str) -> Result<()> {
    let mut failures = Vec::new();
    for program in RESTORE {
        match restore_with(program, lab, netns, rules) {
            Ok(()) => return Ok(()),
            Err(error) => failures.push(format!("{program}: {error:#}")),
        }
    }
    bail!("could not load the rules of a router: {}; is iptables installed?", failures.join("; "))
}

fn restore_with(program: &str, lab: &Inner, netns: &Netns, rules: &str) -> Result<()> {
    // Read from a file, so that a program that reads nothing needs no care.
    let mut input = tempfile::tempfile_in(&lab.directory).context("could not make a file for rules")?;
    io::Write::write_all(&mut input, rules.as_bytes())
        .and_then(|()| io::Seek::rewind(&mut input))
        .context("could not write rules")?;
    let mut command = Command::new(program);
    command
        // The lock of the machine's own rules is of no concern here.
        .env("XTABLES_LOCKFILE", lab.directory.join("xtables.lock"))
        .stdin(input)
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    place::enter(&mut command, &Place { net: Some(netns.as_fd()), ..Place::default() })?;
    let output = place::output(command.spawn().context("could not run it")?, DEADLINE)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts() -> [IpAddr; 2] {
        [[192, 168, 1, 11], [192, 168, 1, 12]].map(IpAddr::from)
    }

    #[test]
    fn only_a_full_cone_lets_anybody_in() {
        for nat in [Nat::PortRestricted, Nat::Symmetric] {
            assert!(!rules(nat, &hosts(), &[]).contains("PREROUTING -"), "{nat:?}");
        }
        let text = rules(Nat::FullCone { port: 20006 }, &hosts(), &[]);
        for line in [
            "-A FORWARD -i lan -o wan -s 192.168.1.11 -p udp --sport 20006 -m recent --name udp20006 --mask 0.0.0.0 --set",
            "-A PREROUTING -i wan -p tcp --dport 20007 -m recent --name tcp20007 --mask 0.0.0.0 --rcheck --seconds 300 \
             -j DNAT --to-destination 192.168.1.12:20006",
            "-A POSTROUTING -o wan -s 192.168.1.12 -p tcp --sport 20006 -j MASQUERADE --to-ports 20007",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is not in:\n{text}");
        }
    }

    #[test]
    fn only_a_symmetric_nat_maps_at_random() {
        let random = |nat| rules(nat, &hosts(), &[]).contains("--random-fully");
        assert!(random(Nat::Symmetric));
        assert!(!random(Nat::PortRestricted) && !random(Nat::FullCone { port: 20006 }));
    }
}
