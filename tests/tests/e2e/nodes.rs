//! Nodes by their names: with OpenSSH, nc, ncat and curl as Debian has them, from a node behind one NAT to nodes behind
//! another, in the cloud, and to itself.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, SocketAddr, UdpSocket},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    App, Lab, Nat, Node, Pod, Transport,
    agent::{Agent, AgentOptions, Program},
    eventually,
    manifest::{self, Endpoint, Service},
};
use serde_json::{Value, json};

use crate::START;

/// Where an agent serves SOCKS5.
const PROXY: &str = "169.254.96.16:10800";
const CLUSTER_IP: &str = "10.96.9.1";
/// The names of all nodes, `edge1` among them, where clients are.
const NODES: [&str; 3] = ["edge1", "edge2", "cloud"];
/// A node that has an object and no agent.
const DOWN: &str = "edge9";
/// How many clients there are at once.
const CLIENTS: usize = 50;

/// How much is copied by scp; `EDGEMESH_SCP_MIB=16` for a quick run.
fn scp_mib() -> Result<u64> {
    match std::env::var("EDGEMESH_SCP_MIB") {
        Ok(text) => text.parse().with_context(|| format!("no number of MiB: {text:?}")),
        Err(_) => Ok(200),
    }
}

/// `cloud`, which all reach and which relays, and two sites behind NATs of their own. Each node has an sshd, an agent that
/// serves SOCKS5, and what its allowedTargets say.
struct World {
    client: Pod,
    edge1: Node,
    edge2: Node,
    /// Of the LAN of `edge1`, and none of the mesh.
    neighbour: Node,
    server: Pod,
    agent: Agent,
    _others: Vec<Agent>,
    _sshds: Vec<Program>,
    lab: Lab,
}

impl World {
    fn raise() -> Result<Option<Self>> {
        let Some(lab) = Lab::for_test()? else { return Ok(None) };
        let internet = lab.site("internet", &["203.0.113.0/24"])?;
        let cloud = internet.node("cloud", &["10.244.0.0/24"])?;
        let office = internet.behind("office", &["192.168.1.0/24"], Nat::PortRestricted)?;
        let home = internet.behind("home", &["192.168.1.0/24"], Nat::PortRestricted)?;
        // The same addresses in both sites.
        let (edge1, edge2) = (office.node("edge1", &["10.244.1.0/24"])?, home.node("edge2", &["10.244.1.0/24"])?);
        let neighbour = office.node("neighbour", &["10.244.7.0/24"])?;
        let (client, server) = (edge1.pod("client")?, edge2.pod("server")?);
        server.serve(App::Http, 7003)?;
        let web = Service::new("web", &[CLUSTER_IP]).port("http", Transport::Tcp, 80, 7003);
        lab.manifests().write("web", &web.yaml_with(&Endpoint::of(&server, "edge2"))?)?;
        for node in [&edge1, &edge2, &cloud] {
            lab.manifests().write(node.name(), &manifest::node(node, &[])?)?;
        }
        let down = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": DOWN } });
        lab.manifests().write(DOWN, &down.to_string())?;

        let key = key(&lab, "client")?;
        let mut sshds = Vec::new();
        for node in [&cloud, &edge1, &edge2] {
            sshds.push(sshd(&lab, node, &key)?);
        }
        let relays = json!([{ "nodeName": "cloud", "advertiseAddress": [cloud.ips().first().context("no address")?] }]);
        let start = |node: &Node| -> Result<Agent> {
            let psk = node.write_file("psk", "0123456789abcdef-of-all")?;
            let agent = node.start_agent(
                &AgentOptions::default()
                    .set("modules.edgeTunnel.enable", true)
                    .set("modules.edgeTunnel.psk.path", psk.to_string_lossy().into_owned())
                    .set("modules.edgeTunnel.relayNodes", relays.clone())
                    .set("modules.edgeTunnel.allowedTargets", json!(["node:22", "node:53", "node:7"]))
                    .set("modules.edgeProxy.socks5Proxy.enable", true)
                    .set("modules.edgeDNS", json!({ "enable": true, "resolvConf": "/dev/null" }))
                    .log("info,edgemesh_agent::socks5=debug"),
            )?;
            agent.wait_ready(START)?;
            Ok(agent)
        };
        let others = vec![start(&cloud)?, start(&edge2)?];
        let agent = start(&edge1)?;
        let world = Self { client, edge1, edge2, neighbour, server, agent, _others: others, _sshds: sshds, lab };
        for name in NODES {
            eventually(
                START,
                &format!("{name} to be reached"),
                || Ok(world.curl(&format!("http://{name}:22"))? != 97),
            )?;
        }
        Ok(Some(world))
    }

    /// A client on `edge1`, of OpenSSH.
    fn ssh(&self, from: &Pod, options: &[&str], to: &str) -> Result<Output> {
        let key = self.lab.directory().join("keys/client").display().to_string();
        let mut arguments = ["-F", "none", "-i", &key, "-o", "BatchMode=yes", "-o", "ConnectTimeout=20"].to_vec();
        arguments.extend([
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "LogLevel=ERROR",
        ]);
        arguments.extend(options);
        arguments.extend([to, "echo $EDGEMESH_NODE"]);
        from.run("ssh", &arguments)
    }

    /// How curl ends that gets a URL through the proxy: 0, or 97 for what the proxy refuses.
    fn curl(&self, url: &str) -> Result<i32> {
        self.curled(url)?.status.code().context("curl was killed")
    }

    fn curled(&self, url: &str) -> Result<Output> {
        curl(self.edge1.host(), url)
    }

    fn status(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&self.edge1.cli(&["status", "-o", "json"])?.stdout)?)
    }

    /// How often something came to nothing for a reason.
    fn failures(&self, reason: &str) -> Result<u64> {
        let status = self.status()?;
        let failures = status["socks5"]["counts"]["failures"].as_array().context("no failures")?;
        let found = failures.iter().find(|failure| failure["reason"] == reason);
        Ok(found.and_then(|failure| failure["count"].as_u64()).unwrap_or(0))
    }
}

fn curl(from: &Pod, url: &str) -> Result<Output> {
    // What sshd says is no HTTP, and has come all the same.
    from.run(
        "curl",
        &["-sS", "--http0.9", "--max-time", "8", "--connect-timeout", "8", "--socks5-hostname", PROXY, url],
    )
}

/// Makes a key pair in the lab's directory.
fn key(lab: &Lab, name: &str) -> Result<PathBuf> {
    let directory = lab.directory().join("keys");
    fs::create_dir_all(&directory)?;
    let path = directory.join(name);
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&path).output()?;
    ensure!(made.status.success(), "ssh-keygen: {}", String::from_utf8_lossy(&made.stderr));
    Ok(path)
}

/// Debian's sshd on a node, whose banner and environment name it.
fn sshd(lab: &Lab, node: &Node, client: &std::path::Path) -> Result<Program> {
    let name = node.name();
    let host = key(lab, &format!("host-{name}"))?;
    let text = format!(
        "Port 22\nHostKey {}\nPidFile none\nUsePAM no\nStrictModes no\nAuthorizedKeysFile {}\nPermitRootLogin yes\n\
         PasswordAuthentication no\nMaxStartups 200\nVersionAddendum {name}\nSetEnv EDGEMESH_NODE={name}\n\
         Subsystem sftp internal-sftp\n",
        host.display(),
        client.with_extension("pub").display()
    );
    let config = node.write_file("sshd_config", &text)?;
    // For its processes before somebody has logged in; nodes have a /run of their own.
    fs::create_dir_all(node.file("/run/sshd"))?;
    node.start_program("/usr/sbin/sshd", &["-D", "-e", "-f", &config.to_string_lossy()])
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

/// A client of the proxy that stays until it is dropped.
struct Held(Child);

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Held {
    /// `nc` to the sshd of a node.
    fn open(from: &Pod, node: &str) -> Result<Self> {
        let process = from.process().to_string();
        let child = Command::new("nsenter")
            .args(["--target", &process, "--net", "nc.openbsd", "-X", "5", "-x", PROXY, node, "22"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self(child))
    }

    /// The first line that the far side says; it says so once it is connected, or the proxy has refused.
    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().context("no output")?).read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }
}

#[test]
fn an_operator_gets_to_any_node_by_its_name_and_to_no_other() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let host = world.edge1.host();
    for proxy in [
        format!("ProxyCommand=nc.openbsd -X 5 -x {PROXY} %h %p"),
        format!("ProxyCommand=ncat --proxy-type socks5 --proxy {PROXY} %h %p"),
    ] {
        for node in NODES {
            let told = world.ssh(host, &["-o", &proxy], &format!("root@{node}"))?;
            ensure!(stdout(&told) == node, "{proxy} to {node}: {:?}, {}", stdout(&told), stderr(&told));
        }
    }

    // Fifty at once, each at its own.
    let mut held = Vec::new();
    for number in 0..CLIENTS {
        let node = NODES[number % NODES.len()];
        held.push((node, Held::open([host, &world.client][number % 2], node)?));
    }
    for (node, held) in &mut held {
        let line = held.line()?;
        ensure!(line.starts_with("SSH-2.0-OpenSSH") && line.ends_with(&format!(" {node}")), "{line:?} is not {node}");
    }
    let open = world.status()?["socks5"]["counts"]["open_sessions"].as_u64();
    ensure!(open == Some(CLIENTS as u64), "{open:?} are open");
    drop(held);

    // Without any proxy, by DNS, from a pod and from the host.
    let resolv_conf = world.edge1.write_file("resolv.conf.own", "nameserver 169.254.96.16\n")?;
    let key = world.lab.directory().join("keys/client");
    for from in [&world.client, host] {
        for node in NODES {
            let script = format!(
                "mount --bind {} /etc/resolv.conf && exec ssh -F none -i {} -o BatchMode=yes -o ConnectTimeout=20 \
                 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \
                 root@{node}.node.cluster.local 'echo $EDGEMESH_NODE'",
                resolv_conf.display(),
                key.display()
            );
            let told = from.run("unshare", &["--mount", "sh", "-c", &script])?;
            ensure!(stdout(&told) == node, "{} to {node}: {:?}, {}", from.name(), stdout(&told), stderr(&told));
        }
    }
    let dig = |arguments: &[&str]| -> Result<String> {
        Ok(stdout(&world.client.run("dig", &[&["@169.254.96.16", "+short"][..], arguments].concat())?))
    };
    let alias = dig(&["edge2.node.cluster.local", "A"])?;
    ensure!(alias.starts_with("198.18."), "{alias}");
    ensure!(dig(&["edge2.node.cluster.local", "AAAA"])?.starts_with("fd6d:e54a:"));
    ensure!(dig(&["-x", &alias])? == "edge2.node.cluster.local.");
    ensure!(dig(&["nobody.node.cluster.local", "A"])?.is_empty());
    // The ports are those of the far node's allowedTargets, by TCP and by UDP; 7 and 53 are, 2222 is not.
    let alias: IpAddr = alias.parse()?;
    world.edge2.host().serve_at(App::Udp, SocketAddr::new(*world.edge2.ips().first().context("no address")?, 7))?;
    ensure!(world.client.udp(SocketAddr::new(alias, 7))?.name == "edge2");
    let refused = world.client.tcp(SocketAddr::new(alias, 2222)).err().context("a port that nobody allows answers")?;
    ensure!(edgemesh_tests::lab::errno(&refused) == Some("ECONNRESET"), "{refused:#}");
    let trace = stdout(&world.edge1.cli(&["trace", &format!("{alias}:22")])?);
    ensure!(trace.contains("port 22 of the node edge2 itself") && trace.contains("node:22 in its"), "{trace}");
    let own = dig(&["edge1.node.cluster.local", "A"])?;
    let trace = stdout(&world.edge1.cli(&["trace", &format!("{own}:22")])?);
    ensure!(
        trace.contains("not needed, as that is this node") && trace.contains("edge1: allowed; it answered"),
        "{trace}"
    );

    let bytes = scp_mib()? << 20;
    let (source, target) = (world.lab.directory().join("sent"), world.lab.directory().join("received"));
    // No page like another, so that one that is lost or comes twice is missed.
    let words: Vec<u8> = (0..bytes / 8).flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect();
    fs::write(&source, &words)?;
    let begin = Instant::now();
    let copied = host.run(
        "scp",
        &[
            &["-F", "none", "-q", "-i", &key.display().to_string(), "-o", "BatchMode=yes"][..],
            &["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"],
            &["-o", &format!("ProxyCommand=nc.openbsd -X 5 -x {PROXY} %h %p")],
            &[&source.display().to_string(), &format!("root@edge2:{}", target.display())],
        ]
        .concat(),
    )?;
    ensure!(copied.status.success(), "scp: {}", stderr(&copied));
    ensure!(fs::read(&target)? == words, "what came is not what was sent");
    let _ = writeln!(std::io::stderr(), "scp of {} MiB took {:?}", bytes >> 20, begin.elapsed());
    Ok(())
}

#[test]
fn what_comes_to_nothing_is_told_by_its_code_counted_and_logged() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    // By a Service's name, as DNS has it.
    for name in ["web.default.svc.cluster.local", "web.default", CLUSTER_IP] {
        let got = world.curled(&format!("http://{name}/"))?;
        ensure!(got.status.success() && stdout(&got).contains("server"), "{name}: {}", stderr(&got));
    }
    // The pod hears and cannot answer, from now on.
    let node = "10.244.1.1/32";
    let blackhole = world.server.run("ip", &["route", "add", "blackhole", node])?;
    ensure!(blackhole.status.success(), "{}", stderr(&blackhole));
    for (to, code, reason, words) in [
        ("nobody:22", 4, "unknown_host", "no node, Service or pod is known by it"),
        (&format!("{DOWN}:22"), 4, "no_path", "no path leads to its node"),
        ("edge2:2222", 2, "not_allowed", "in its edgeTunnel.allowedTargets"),
        ("edge1:2222", 2, "not_allowed", "in its edgeTunnel.allowedTargets"),
        ("www.example.org:80", 2, "outside", "outside the mesh"),
        ("192.0.2.1:80", 2, "outside", "outside the mesh"),
        ("edge2:53", 5, "refused", "refused there"),
        ("web.default:81", 5, "refused", "refused there"),
        ("web.default:80", 6, "timed_out", "not reached in time"),
    ] {
        let before = world.failures(reason)?;
        let told = world.curled(&format!("http://{to}/"))?;
        ensure!(told.status.code() == Some(97), "{to}: {:?}, {}", told.status, stderr(&told));
        ensure!(stderr(&told).contains(&format!("({code})")), "{to}: {}", stderr(&told));
        ensure!(world.failures(reason)? == before + 1, "{to} is not counted");
        let log = world.agent.log()?;
        let line = log.lines().rfind(|line| line.contains("SOCKS5 refused")).context("it is not logged")?;
        ensure!(line.contains("DEBUG") && line.contains(words) && line.contains(reason), "{to}: {line}");
    }
    let metrics = world.agent.metrics()?;
    ensure!(metrics.contains("edgemesh_socks5_failures_total{reason=\"no_path\"} 1"), "{metrics}");
    let text = stdout(&world.edge1.cli(&["status"])?);
    ensure!(text.contains(&format!("SOCKS5      {PROXY}; 0 clients")) && text.contains("1 no_path"), "{text}");

    // Whoever is not on the node is not even heard.
    let (edge1, neighbour) = (world.edge1.ips().first().context("no address")?.to_string(), world.neighbour.host());
    let route = neighbour.run("ip", &["route", "add", "169.254.96.16/32", "via", &edge1])?;
    ensure!(route.status.success(), "{}", stderr(&route));
    let heard = neighbour.run("curl", &["-sS", "--max-time", "1", "--socks5-hostname", PROXY, "http://edge1:22"])?;
    ensure!(heard.status.code() == Some(28), "a neighbour is served: {:?}, {}", heard.status, stderr(&heard));
    asks_dns_of_a_node(&world)
}

/// A question to the DNS server of `edge2`, by UDP ASSOCIATE.
fn asks_dns_of_a_node(world: &World) -> Result<()> {
    // `web. A IN`.
    const QUESTION: &[u8] = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03web\x00\x00\x01\x00\x01";
    const ANSWER: &[u8] = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x1e\x00\x04\x0a\x00\x00\x07";
    let at = SocketAddr::new(*world.edge2.ips().first().context("no address")?, 53);
    let server = world.edge2.bind(at)?;
    server.set_read_timeout(Some(START))?;
    let answering = thread::spawn(move || -> Result<()> {
        let mut buffer = [0; 512];
        let (length, client) = server.recv_from(&mut buffer)?;
        let question = buffer.get(..length).context("no question")?;
        ensure!(question == QUESTION, "{question:?}");
        let mut answer = [question, ANSWER].concat();
        (answer[2], answer[7]) = (0x81, 1);
        server.send_to(&answer, client)?;
        Ok(())
    });
    let mut control = world.edge1.connect(PROXY.parse()?)?;
    control.set_read_timeout(Some(START))?;
    control.write_all(&[5, 1, 0, 5, 3, 0, 1, 0, 0, 0, 0, 0, 0])?;
    let mut told = [0; 12];
    control.read_exact(&mut told)?;
    ensure!(told.starts_with(&[5, 0, 5, 0, 0, 1]), "{told:?}");
    let relay = SocketAddr::new([told[6], told[7], told[8], told[9]].into(), u16::from_be_bytes([told[10], told[11]]));
    ensure!(relay.ip() == PROXY.parse::<SocketAddr>()?.ip(), "{relay}");
    let socket: UdpSocket = world.edge1.bind("0.0.0.0:0".parse()?)?;
    socket.set_read_timeout(Some(START))?;
    let head = [&[0, 0, 0, 3, 5][..], b"edge2", &[0, 53]].concat();
    socket.send_to(&[&head, QUESTION].concat(), relay)?;
    let mut buffer = [0; 512];
    let (length, from) = socket.recv_from(&mut buffer)?;
    let answer = buffer.get(..length).context("no answer")?;
    ensure!(from == relay && answer.starts_with(&head) && answer.ends_with(&[10, 0, 0, 7]), "{answer:?} of {from}");
    answering.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;

    // The association goes with its connection.
    drop(control);
    eventually(Duration::from_secs(5), "the association to end", || {
        Ok(world.status()?["socks5"]["counts"]["open_flows"] == json!(0))
    })
}
