//! Sites and nodes: bridges, links, addresses and routes.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, ensure};

use super::nat::{Forward, Nat, Router, Uplink};
use super::netns::{self, Netns};
use super::place::{self, Place};
use super::pod::Pod;
use super::shell::Shell;
use super::subnet::{self, Subnet};
use super::{DEADLINE, Inner, Transport, binary, locked, remains};

/// The first node of a site has the address this far into the site's subnets.
const FIRST_NODE: u32 = 11;
/// The first router with an uplink into a site has the address this far into the site's IPv4 subnet.
const FIRST_ROUTER: u32 = 101;
/// The first pod that asks for no address has the address this far into its node's subnets.
const FIRST_POD: u32 = 2;

/// One LAN, a bridge; its nodes reach each other and each other's pods directly.
#[derive(Debug, Clone)]
pub struct Site {
    site: Arc<SiteInner>,
}

#[derive(Debug)]
struct SiteInner {
    lab: Arc<Inner>,
    bridge: String,
    subnets: Vec<Subnet>,
    router: Option<Router>,
    next_router: AtomicU32,
    next_node: AtomicU32,
    nodes: Mutex<Vec<Node>>,
}

/// A machine: namespaces and a cgroup of its own, a bridge for its pods, and a link into its site.
///
/// It has a bpffs on `/sys/fs/bpf` and a `/run` that no other node sees.
#[derive(Debug, Clone)]
pub struct Node {
    node: Arc<NodeInner>,
    ips: Vec<IpAddr>,
    host: Pod,
}

#[derive(Debug)]
struct NodeInner {
    lab: Arc<Inner>,
    name: String,
    pod_subnets: Vec<Subnet>,
    netns: Netns,
    mount: OwnedFd,
    pause: u32,
    cgroup: std::path::PathBuf,
    next_pod: AtomicU32,
    /// Links into sites other than its own.
    more_links: AtomicU32,
}

impl Site {
    pub(super) fn new(lab: &Arc<Inner>, name: &str, subnets: &[&str]) -> Result<Self> {
        Self::make(lab, subnets, |_, _| Ok(None)).with_context(|| format!("could not make the site {name}"))
    }

    /// Adds a site behind a NAT router whose uplink is in this site; several levels of NAT are made so, too.
    ///
    /// `subnets` are those of its nodes, as those of [`super::Lab::site`], the first address of the IPv4 one being the
    /// router's. They and the pods' may be the same as in other sites. The nodes' only way out is the router, for
    /// IPv4 alone: IPv6 stays inside. Pods do not get beyond their site, as nothing masquerades for them.
    pub fn behind(&self, name: &str, subnets: &[&str], nat: Nat) -> Result<Self> {
        let make = |bridge: &str, subnets: &[Subnet]| {
            let lan = ipv4_of(subnets).context("a site behind a NAT needs an IPv4 subnet")?;
            Router::start(self, bridge, lan, nat).map(Some)
        };
        Self::make(self.lab(), subnets, make).with_context(|| format!("could not make the site {name}"))
    }

    fn make(
        lab: &Arc<Inner>,
        subnets: &[&str],
        router: impl FnOnce(&str, &[Subnet]) -> Result<Option<Router>>,
    ) -> Result<Self> {
        let bridge = format!("site{}", lab.sites.fetch_add(1, Ordering::Relaxed));
        let subnets = subnet::parse_all(subnets)?;
        // Without delay and snooping, a link carries packets, multicast too, from the moment it is up.
        lab.backbone
            .ip(&format!("link add {bridge} type bridge forward_delay 0 mcast_snooping 0\nlink set {bridge} up\n"))?;
        let router = router(&bridge, &subnets)?;
        Ok(Self {
            site: Arc::new(SiteInner {
                lab: Arc::clone(lab),
                bridge,
                subnets,
                router,
                next_router: AtomicU32::new(FIRST_ROUTER),
                next_node: AtomicU32::new(FIRST_NODE),
                nodes: Mutex::default(),
            }),
        })
    }

    /// The address by which the site's router is known outside, which is the source of all that leaves the site.
    pub fn public_ip(&self) -> Result<IpAddr> {
        self.router()?.public_ip()
    }

    /// Has the site's router forward a port of its public address to the same port of a node, as the owner of a router
    /// sets it up. It stays with the node's present address, and also when the router gets another one itself.
    pub fn forward(&self, transport: Transport, port: u16, node: &Node) -> Result<()> {
        let host = node.ips().iter().find(|ip| ip.is_ipv4());
        let host = *host.with_context(|| format!("{} has no IPv4 address to forward to", node.name()))?;
        let forward = Forward { transport, port, host };
        self.router()?.forward(forward, &self.hosts()).context("could not have a router forward a port")
    }

    /// Cuts the uplink: from now on, packets into and out of the site vanish in silence.
    pub fn cut_uplink(&self) -> Result<()> {
        self.router()?.carry(false)
    }

    /// Heals a cut uplink; the router's mappings are as old as they are.
    pub fn heal_uplink(&self) -> Result<()> {
        self.router()?.carry(true)
    }

    /// Gives the site's router another public address, which is returned. It forgets all mappings, as routers do that
    /// dial in anew.
    pub fn renumber_uplink(&self) -> Result<IpAddr> {
        let router = self.router()?;
        router.replace(&self.hosts()).context("could not replace a router")?;
        router.public_ip()
    }

    /// Gives a node other addresses in this site, as a lease that was lost does. Its pods keep theirs, and its
    /// neighbours reach them. Older handles of the node go on telling the addresses that it has no more.
    pub fn renumber(&self, node: Node) -> Result<Node> {
        let name = node.name().to_owned();
        self.renumber_node(node).with_context(|| format!("could not renumber the node {name}"))
    }

    fn renumber_node(&self, node: Node) -> Result<Node> {
        let mut nodes = locked(&self.site.nodes);
        let place = nodes.iter().position(|other| other.name() == node.name()).context("it is in another site")?;
        let ips = self.next_ips();
        let mut batch = String::new();
        for (subnet, ip) in self.site.subnets.iter().zip(&node.ips) {
            push(&mut batch, format_args!("address del {} dev eth0", subnet.with_prefix(*ip)));
        }
        for (subnet, ip) in self.site.subnets.iter().zip(&ips) {
            add_address(&mut batch, *subnet, *ip, "eth0");
        }
        // Routes went with the addresses they belonged to.
        self.add_default_route(&mut batch);
        node.node.netns.ip(&batch)?;
        let node = Node { host: node.host.at(ips.clone()), ips, node: node.node };
        for (index, other) in nodes.iter().enumerate() {
            if index != place {
                node.add_routes_to(other)?;
                other.add_routes_to(&node)?;
            }
        }
        if let Some(old) = nodes.get_mut(place) {
            *old = node.clone();
        }
        drop(nodes);
        if let Some(router) = &self.site.router {
            router.set_hosts(&self.hosts())?;
        }
        Ok(node)
    }

    pub(super) fn lab(&self) -> &Arc<Inner> {
        &self.site.lab
    }

    /// The site's bridge, in the lab's backbone.
    pub(super) fn bridge(&self) -> &str {
        &self.site.bridge
    }

    fn router(&self) -> Result<&Router> {
        self.site.router.as_ref().context("the site is not behind a router")
    }

    /// Where the next router with an uplink into this site is attached.
    pub(super) fn next_uplink(&self) -> Result<Uplink> {
        let site = &*self.site;
        let subnet = ipv4_of(&site.subnets).context("an uplink needs a site with an IPv4 subnet")?;
        let number = site.next_router.fetch_add(1, Ordering::Relaxed);
        Ok(Uplink { ip: subnet.nth(number), subnet, gateway: site.router.as_ref().map(Router::gateway) })
    }

    /// The addresses of the next node, one per subnet.
    fn next_ips(&self) -> Vec<IpAddr> {
        let number = self.site.next_node.fetch_add(1, Ordering::Relaxed);
        self.site.subnets.iter().map(|subnet| subnet.nth(number)).collect()
    }

    /// The IPv4 addresses that nodes have been given so far, those they have no more included.
    fn hosts(&self) -> Vec<IpAddr> {
        let numbers = FIRST_NODE..self.site.next_node.load(Ordering::Relaxed);
        ipv4_of(&self.site.subnets).map_or_else(Vec::new, |subnet| numbers.map(|number| subnet.nth(number)).collect())
    }

    fn add_default_route(&self, batch: &mut String) {
        if let Some(router) = &self.site.router {
            push(batch, format_args!("route add default via {} dev eth0", router.gateway()));
        }
    }

    /// Adds a node with `pod_subnets` for its pods, such as `10.244.1.0/24`, one per address family. The nodes of a site
    /// have routes to each other's pods, as a CNI makes them, unless their subnets are the same.
    pub fn node(&self, name: &str, pod_subnets: &[&str]) -> Result<Node> {
        self.add_node(name, pod_subnets).with_context(|| format!("could not make the node {name}"))
    }

    fn add_node(&self, name: &str, pod_subnets: &[&str]) -> Result<Node> {
        check_name(name)?;
        let site = &*self.site;
        let mut nodes = locked(&site.nodes);
        let ips = self.next_ips();
        let pod_subnets = subnet::parse_all(pod_subnets)?;
        let netns = Netns::new()?;
        netns.sysctl(netns::QUIET)?;
        netns.sysctl(netns::FORWARDING)?;
        let link = format!("node{}", site.lab.next_link());
        site.lab.backbone.ip(&format!(
            "link add {link} type veth peer name eth0 netns {}\nlink set {link} master {} up\n",
            netns.path(),
            site.bridge
        ))?;
        // Without an address of its own a bridge takes the lowest of its ports, and changes it with each pod, which its
        // neighbours learn half a minute later.
        let mut batch = String::from(
            "link add cni0 address 02:00:00:00:00:01 type bridge forward_delay 0 mcast_snooping 0\nlink set cni0 up\nlink set eth0 up\n",
        );
        for subnet in &pod_subnets {
            add_address(&mut batch, *subnet, subnet.nth(1), "cni0");
        }
        for (subnet, ip) in site.subnets.iter().zip(&ips) {
            add_address(&mut batch, *subnet, *ip, "eth0");
        }
        self.add_default_route(&mut batch);
        netns.ip(&batch)?;

        let cgroup = site.lab.cgroup.join(name);
        let host_cgroup = cgroup.join("host");
        remains::create(&host_cgroup)?;
        let (pause, mount) = hold_mounts(&site.lab, name, &netns, &host_cgroup)?;
        let place = Place {
            cgroup: Some(&host_cgroup),
            mount: Some(mount.as_fd()),
            net: Some(netns.as_fd()),
            ..Place::default()
        };
        let shell = Shell::start(&site.lab, &place, name, &format!("node {name}"), &format!("{name}.host"))?;
        let host = Pod::new(name, ips.clone(), shell, host_cgroup);
        let node = Node {
            node: Arc::new(NodeInner {
                lab: Arc::clone(&site.lab),
                name: name.to_owned(),
                pod_subnets,
                netns,
                mount,
                pause,
                cgroup,
                next_pod: AtomicU32::new(FIRST_POD),
                more_links: AtomicU32::new(0),
            }),
            ips,
            host,
        };
        for other in &*nodes {
            node.add_routes_to(other)?;
            other.add_routes_to(&node)?;
        }
        nodes.push(node.clone());
        drop(nodes);
        if let Some(router) = &site.router {
            router.set_hosts(&self.hosts())?;
        }
        Ok(node)
    }
}

impl Node {
    /// The node's name.
    pub fn name(&self) -> &str {
        &self.node.name
    }

    /// The node's addresses in its site, one per subnet of the site.
    pub fn ips(&self) -> &[IpAddr] {
        &self.ips
    }

    /// The cgroup of the node: its own processes are in `host` below it, its pods' in `pods/NAME`.
    pub fn cgroup(&self) -> &Path {
        &self.node.cgroup
    }

    /// Where this process finds a file that the node has at an absolute path.
    pub fn file(&self, path: &str) -> std::path::PathBuf {
        std::path::PathBuf::from(format!("/proc/{}/root{path}", self.node.pause))
    }

    /// The process that holds the node's mount and network namespaces.
    pub fn pause_process(&self) -> u32 {
        self.node.pause
    }

    /// The node itself, as a pod on the host network would see it.
    pub fn host(&self) -> &Pod {
        &self.host
    }

    /// Links the node into another site too, as a node that several LANs can reach is: `eth1`, then `eth2`. Nobody gets a
    /// route to its pods, or it to anybody's, by that. Returns its addresses there.
    pub fn also_in(&self, site: &Site) -> Result<Vec<IpAddr>> {
        let ips = site.next_ips();
        let node = &*self.node;
        let name = format!("eth{}", node.more_links.fetch_add(1, Ordering::Relaxed) + 1);
        let link = format!("node{}", node.lab.next_link());
        let attempt = || format!("could not link the node {} into another site", node.name);
        let backbone = format!(
            "link add {link} type veth peer name {name} netns {}\nlink set {link} master {} up\n",
            node.netns.path(),
            site.site.bridge
        );
        node.lab.backbone.ip(&backbone).with_context(attempt)?;
        let mut batch = format!("link set {name} up\n");
        for (subnet, ip) in site.site.subnets.iter().zip(&ips) {
            add_address(&mut batch, *subnet, *ip, &name);
        }
        node.netns.ip(&batch).with_context(attempt)?;
        if let Some(router) = &site.site.router {
            router.set_hosts(&site.hosts()).with_context(attempt)?;
        }
        Ok(ips)
    }

    /// Adds a pod with the next free address of each of the node's pod subnets.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        let number = self.node.next_pod.fetch_add(1, Ordering::Relaxed);
        let ips = self.node.pod_subnets.iter().map(|subnet| subnet.nth(number)).collect();
        let cgroup = self.pod_cgroup(name);
        self.add_pod(name, ips, "pod", cgroup)
            .with_context(|| format!("could not make the pod {name} on {}", self.node.name))
    }

    /// Adds a guest: a pod whose processes are in none of the node's cgroups, as those of a virtual machine are not, so
    /// that nothing of the node sees its sockets. Its interface on the node is named `tap` and a number.
    pub fn guest(&self, name: &str) -> Result<Pod> {
        let number = self.node.next_pod.fetch_add(1, Ordering::Relaxed);
        let ips = self.node.pod_subnets.iter().map(|subnet| subnet.nth(number)).collect();
        let cgroup = self.node.lab.cgroup.join(format!("guest-{name}"));
        self.add_pod(name, ips, "tap", cgroup)
            .with_context(|| format!("could not make the guest {name} on {}", self.node.name))
    }

    /// Adds a pod with addresses of the node's pod subnets, such as `10.244.1.10`.
    pub fn pod_at(&self, name: &str, ips: &[&str]) -> Result<Pod> {
        let attempt = || format!("could not make the pod {name} on {}", self.node.name);
        let parse = |ip: &&str| ip.parse().with_context(|| format!("{ip:?} is no address"));
        let ips = ips.iter().map(parse).collect::<Result<_>>().with_context(attempt)?;
        self.add_pod(name, ips, "pod", self.pod_cgroup(name)).with_context(attempt)
    }

    fn pod_cgroup(&self, name: &str) -> std::path::PathBuf {
        self.node.cgroup.join("pods").join(name)
    }

    fn add_pod(&self, name: &str, ips: Vec<IpAddr>, link: &str, cgroup: std::path::PathBuf) -> Result<Pod> {
        check_name(name)?;
        let node = &*self.node;
        let netns = Netns::new()?;
        netns.sysctl(netns::QUIET)?;
        let link = format!("{link}{}", node.lab.next_link());
        node.netns.ip(&format!(
            "link add {link} type veth peer name eth0 netns {}\nlink set {link} master cni0 up\n",
            netns.path()
        ))?;
        let mut batch = String::from("link set eth0 up\n");
        for ip in &ips {
            let subnet = node.pod_subnets.iter().find(|subnet| subnet.contains(*ip));
            let subnet = subnet.with_context(|| format!("{ip} is in none of the node's pod subnets"))?;
            add_address(&mut batch, *subnet, *ip, "eth0");
            // A pod may have several addresses of a family, and so meet its default route again.
            push(&mut batch, format_args!("route replace default via {} dev eth0", subnet.nth(1)));
        }
        netns.ip(&batch)?;
        remains::create(&cgroup)?;
        let place = Place { cgroup: Some(&cgroup), net: Some(netns.as_fd()), ..Place::default() };
        let what = format!("pod {name} on {}", node.name);
        let shell = Shell::start(&node.lab, &place, name, &what, &format!("{}.{name}", node.name))?;
        Ok(Pod::new(name, ips, shell, cgroup))
    }

    /// Runs `work` on a thread in the node's network namespace.
    pub(super) fn on_a_thread<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.node.netns.on_a_thread(work)
    }

    /// Opens a TCP listener of this process in the node's network namespace, such as on `127.0.0.1:10550`.
    pub fn listen(&self, address: SocketAddr) -> Result<TcpListener> {
        self.node.netns.listen(address)
    }

    /// Opens a TCP connection of this process from the node's network namespace.
    pub fn connect(&self, address: SocketAddr) -> Result<TcpStream> {
        self.node.netns.connect(address, DEADLINE)
    }

    /// Opens a UDP socket of this process in the node's network namespace.
    pub fn bind(&self, address: SocketAddr) -> Result<UdpSocket> {
        self.node.netns.bind(address)
    }

    /// Writes a file where the node's processes see it, below a `/run` that no other node has; in one step.
    pub fn write_run_file(&self, name: &str, content: &[u8]) -> Result<()> {
        let path = Path::new("/proc").join(self.node.pause.to_string()).join("root/run").join(name);
        let draft = path.with_extension("draft");
        let directory = path.parent().context("a file has no directory")?;
        std::fs::create_dir_all(directory)
            .and_then(|()| std::fs::write(&draft, content))
            .and_then(|()| std::fs::rename(&draft, &path))
            .with_context(|| format!("could not write {}", path.display()))
    }

    /// Sets a sysctl of the node, given as a path below `/proc/sys/net`.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        self.node.netns.sysctl(&[(name, value)])
    }

    /// Has this node reach the pods of another node of its site through that node, unless it has pods of its own there.
    fn add_routes_to(&self, other: &Self) -> Result<()> {
        let mut batch = String::new();
        // A node that has the subnet itself has no use for another's.
        for subnet in other.node.pod_subnets.iter().filter(|subnet| !self.node.pod_subnets.contains(subnet)) {
            let same_family = |ip: &&IpAddr| ip.is_ipv4() == subnet.nth(0).is_ipv4();
            let gateway = other.ips.iter().find(same_family);
            let gateway = gateway.with_context(|| format!("{} has no address to reach {subnet} by", other.name()))?;
            push(&mut batch, format_args!("route replace {subnet} via {gateway} dev eth0"));
        }
        self.node.netns.ip(&batch)
    }

    /// Where the node's own processes run.
    pub(super) fn place(&self) -> Place<'_> {
        Place {
            cgroup: Some(self.host.cgroup()),
            mount: Some(self.node.mount.as_fd()),
            net: Some(self.node.netns.as_fd()),
            ..Place::default()
        }
    }

    pub(super) fn lab(&self) -> &Arc<Inner> {
        &self.node.lab
    }
}

/// Starts the process that makes and holds a node's mounts.
fn hold_mounts(lab: &Arc<Inner>, node: &str, netns: &Netns, cgroup: &Path) -> Result<(u32, OwnedFd)> {
    let mut command = Command::new(binary("EDGEMESH_LAB_PROBE", "lab-probe")?);
    let (log_path, log) = lab.log_file(&format!("{node}.pause.log"))?;
    command.arg("pause").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
    let place = Place { cgroup: Some(cgroup), net: Some(netns.as_fd()), new_mount: true, ..Place::default() };
    place::enter(&mut command, &place)?;
    let mut pause = command.spawn().context("could not start the pause process")?;
    let pid = pause.id();
    let stdout = pause.stdout.take();
    // Its standard input stays open in the lab's list of children.
    lab.adopt(pause);
    let mut said = String::new();
    // The pipe ends with the process, so this waits no longer than three mounts take.
    BufReader::new(stdout.context("the pause process has no output")?).read_line(&mut said)?;
    if said != "ready\n" {
        let why = std::fs::read_to_string(&log_path).unwrap_or_default();
        ensure!(!why.is_empty(), "the pause process ended without a word");
        anyhow::bail!("{}", why.trim());
    }
    let path = format!("/proc/{pid}/ns/mnt");
    let mount = File::open(&path).with_context(|| format!("could not open {path}"))?;
    Ok((pid, mount.into()))
}

fn ipv4_of(subnets: &[Subnet]) -> Option<Subnet> {
    subnets.iter().find(|subnet| subnet.nth(0).is_ipv4()).copied()
}

fn add_address(batch: &mut String, subnet: Subnet, ip: IpAddr, link: &str) {
    let nodad = if ip.is_ipv6() { " nodad" } else { "" };
    push(batch, format_args!("address add {} dev {link}{nodad}", subnet.with_prefix(ip)));
}

fn push(batch: &mut String, command: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(batch, "{command}");
}

/// Names become names of cgroups, files and servers.
fn check_name(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    ensure!(
        name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(good),
        "{name:?} is no name; letters, digits, dashes and dots make one"
    );
    Ok(())
}
