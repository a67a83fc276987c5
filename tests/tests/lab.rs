//! The lab itself: what pods see of each other, and that nothing stays behind.

#[path = "lab/nat.rs"]
mod nat;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use edgemesh_tests::lab::{
    App, Attempt, DEADLINE, Lab, Measure, Node, Pod, Tls, Transport, errno, eventually, monotonic, skip, v4_mapped,
};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// Two nodes on one LAN, as most tests want them.
fn two_nodes(lab: &Lab) -> Result<(Node, Node)> {
    let lan = lab.site("lan", &["192.168.10.0/24", "fd00:192:168:10::/64"])?;
    let edge1 = lan.node("edge1", &["10.244.1.0/24", "fd00:10:244:1::/64"])?;
    let edge2 = lan.node("edge2", &["10.244.2.0/24", "fd00:10:244:2::/64"])?;
    Ok((edge1, edge2))
}

#[test]
fn pods_of_two_nodes_reach_each_other_directly_and_see_their_own_addresses() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let (edge1, edge2) = two_nodes(&lab)?;
    let (client, server) = (edge1.pod("client")?, edge2.pod("server")?);
    let tcp = server.serve(App::Tcp, 7000)?;
    let udp = server.serve(App::Udp, 7000)?;
    let http = server.serve(App::Http, 8080)?;
    let websocket = server.serve(App::WebSocket, 8081)?;
    assert_eq!(tcp, ["10.244.2.2:7000".parse()?, "[fd00:10:244:2::2]:7000".parse::<SocketAddr>()?]);
    for (family, own) in client.ips().iter().enumerate() {
        for reply in [client.tcp(tcp[family])?, client.udp(udp[family])?, client.websocket(websocket[family])?] {
            assert_eq!((reply.name.as_str(), reply.client.ip()), ("server", *own));
            assert_eq!(reply.client, reply.local);
        }
        let report = client.http(http[family], 3)?;
        let expected = format!("server {}\n", report.local);
        assert_eq!(report.replies.iter().map(|reply| reply.body.as_str()).collect::<Vec<_>>(), [&expected; 3]);
        assert_eq!((report.local.ip(), report.peer), (*own, http[family]));
    }
    // From the node itself, to the other node's pod and to its own.
    assert_eq!(edge1.host().tcp(tcp[0])?.client.ip(), edge1.ips()[0]);
    assert_eq!(edge2.host().tcp(tcp[1])?.client.ip(), "fd00:10:244:2::1".parse::<std::net::IpAddr>()?);
    Ok(())
}

#[test]
fn sockets_of_all_kinds_work_and_report_what_getpeername_says() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let (edge1, _) = two_nodes(&lab)?;
    let (client, one, two) =
        (edge1.pod("client")?, edge1.pod("one")?, edge1.pod_at("two", &["10.244.1.200", "10.244.1.201"])?);
    let mapped = v4_mapped(one.serve(App::Tcp, 7000)?[0]);
    let reply = client.tcp(mapped)?;
    assert_eq!(reply.peer, mapped);
    assert_eq!(reply.client.ip(), client.ips()[0]);

    let targets = [one.serve(App::Udp, 53)?[0], two.serve(App::Udp, 53)?[0]];
    for targets in [targets, targets.map(v4_mapped)] {
        let replies = client.udp_fan(&targets)?.into_iter().collect::<Result<Vec<_>, _>>()?;
        assert_eq!(replies.iter().map(|reply| reply.name.as_str()).collect::<Vec<_>>(), ["one", "two"]);
        assert_eq!(replies.iter().map(|reply| reply.source).collect::<Vec<_>>(), targets);
        assert_eq!(replies[0].client, replies[1].client, "both were sent from one socket");
    }

    let held = client.open(Transport::Tcp, targets[0]);
    assert_eq!(errno(&held.unwrap_err()), Some("ECONNREFUSED"), "only UDP is served there");
    let held = client.open(Transport::Tcp, mapped)?;
    assert_eq!(held.exchange()?.client, held.exchange()?.client);
    Ok(())
}

#[test]
fn connects_that_cannot_succeed_say_why_and_never_leave_the_lab() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let (edge1, edge2) = two_nodes(&lab)?;
    let (client, server) = (edge1.pod("client")?, edge2.pod("server")?);
    let refused = Attempt::Failed("ECONNREFUSED".to_owned());
    for ip in server.ips() {
        assert_eq!(client.connect(SocketAddr::new(*ip, 9))?, refused);
    }
    // Cluster addresses have no route: only a data plane that translates them can make them work.
    for address in ["10.96.0.1:80", "[fd00:10:96::1]:80"] {
        let address = address.parse()?;
        assert_eq!(edge1.host().connect(address)?, Attempt::Failed("ENETUNREACH".to_owned()));
        let attempt = client.within(Duration::from_millis(300)).connect(address)?;
        assert!(matches!(attempt, Attempt::Failed(_)), "{attempt:?}");
    }
    let error = client.udp(SocketAddr::new(server.ips()[0], 9)).unwrap_err();
    assert_eq!(errno(&error), Some("ECONNREFUSED"));
    assert!(format!("{error:#}").starts_with("pod client on edge1: receive from 10.244.2.2:9"), "{error:#}");
    let unserved = server.stop_serving(App::Tcp, 1).unwrap_err();
    assert!(format!("{unserved:#}").contains("nothing of that kind listens"), "{unserved:#}");
    Ok(())
}

#[test]
fn loads_count_time_and_follow_what_happens_meanwhile() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let (edge1, edge2) = two_nodes(&lab)?;
    let (client, server) = (edge1.pod("client")?, edge2.pod("server")?);
    let (tcp, udp) = (server.serve(App::Tcp, 7000)?[0], server.serve(App::Udp, 7000)?[0]);
    for (transport, target) in [(Transport::Tcp, tcp), (Transport::Udp, udp)] {
        let report = client.spread(transport, target, 200, 8)?;
        assert_eq!(report.names, [("server".to_owned(), 200)].into());
        assert!(report.failures.is_empty());
    }
    let refused = client.spread(Transport::Tcp, SocketAddr::new(tcp.ip(), 9), 10, 2)?;
    assert_eq!(refused.failures, [("ECONNREFUSED".to_owned(), 10)].into());

    let quantiles = client.latency(Transport::Tcp, &[vec![tcp], server.serve(App::Tcp, 7001)?], 50)?;
    assert_eq!(quantiles.len(), 2);
    for of in quantiles {
        assert!(Duration::ZERO < of.min && of.min <= of.p50 && of.p50 <= of.max && of.max < DEADLINE, "{of:?}");
    }

    let hammer = client.hammer(Transport::Tcp, tcp, 2)?;
    let begin = monotonic();
    eventually(DEADLINE, "the clock to move on", || Ok(monotonic() > begin + Duration::from_millis(50)))?;
    server.stop_serving(App::Tcp, 7000)?;
    let stopped = monotonic();
    eventually(DEADLINE, "the clock to move on", || Ok(monotonic() > stopped + Duration::from_millis(50)))?;
    let report = hammer.stop()?;
    let served = report.names.get("server").context("the server was never seen")?;
    assert!(served.first < stopped && served.last < stopped && served.count > 1, "{report:?}, stopped at {stopped:?}");
    let refused = report.failures.get("ECONNREFUSED").context("nothing was refused after the server stopped")?;
    assert!(refused.last > stopped, "{report:?}, stopped at {stopped:?}");
    Ok(())
}

#[test]
fn every_measure_times_servers_that_answer_and_fails_where_none_does() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let (edge1, edge2) = two_nodes(&lab)?;
    let (client, server) = (edge1.pod("client")?, edge2.pod("server")?);
    let (tcp, udp) = (server.serve(App::Tcp, 7000)?[0], server.serve(App::Udp, 7000)?[0]);
    let (http, websocket) = (server.serve(App::Http, 8080)?[0], server.serve(App::WebSocket, 8081)?[0]);
    let proxy = edge1.host().proxy(SocketAddr::new(edge1.ips()[0], 0), tcp)?;
    assert_eq!(client.tcp(proxy)?.name, "server", "a proxy carries the connection to its backend");
    assert_eq!(client.tcp(proxy)?.client.ip(), edge1.ips()[0], "which sees the proxy as its client");
    for (measure, groups) in [
        (Measure::Connect(Transport::Tcp), [vec![tcp], vec![tcp, proxy]]),
        (Measure::Connect(Transport::Udp), [vec![udp], vec![udp]]),
        (Measure::Send, [vec![udp], vec![udp]]),
        (Measure::Exchange, [vec![tcp], vec![proxy]]),
        (Measure::RoundTrip, [vec![tcp], vec![proxy]]),
        (Measure::Visit(App::Tcp), [vec![tcp], vec![proxy]]),
        (Measure::Visit(App::Udp), [vec![udp], vec![udp]]),
        (Measure::Visit(App::Http), [vec![http], vec![http]]),
        (Measure::Visit(App::WebSocket), [vec![websocket], vec![websocket]]),
    ] {
        let quantiles = client.measure(measure, &groups, 20)?;
        assert_eq!(quantiles.len(), 2, "{measure:?}");
        for of in quantiles {
            assert!(Duration::ZERO < of.min && of.min <= of.p50 && of.p50 <= of.max, "{measure:?}: {of:?}");
        }
    }
    let nobody = SocketAddr::new(tcp.ip(), 9);
    for (measure, server) in [
        (Measure::Connect(Transport::Tcp), tcp),
        (Measure::Exchange, tcp),
        (Measure::RoundTrip, tcp),
        (Measure::Visit(App::Http), http),
    ] {
        let error = client.measure(measure, &[vec![server], vec![nobody]], 2).unwrap_err();
        assert_eq!(errno(&error), Some("ECONNREFUSED"), "{measure:?}");
    }
    Ok(())
}

#[test]
fn rates_are_of_servers_that_answer_also_through_proxies_with_tls_between_them() -> Result<()> {
    const SOON: Duration = Duration::from_millis(50);
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let (edge1, edge2) = two_nodes(&lab)?;
    let (client, server) = (edge1.pod("client")?, edge2.pod("server")?);
    let by_proxies = |server| -> Result<SocketAddr> {
        let far = edge2.host().tls_proxy(SocketAddr::new(edge2.ips()[0], 0), server, Tls::Accepted)?;
        edge1.host().tls_proxy(SocketAddr::new(edge1.ips()[0], 0), far, Tls::Dialled)
    };
    let (echo, source) = (server.serve(App::Echo, 7000)?[0], server.serve(App::Source, 7001)?[0]);
    for target in [source, by_proxies(source)?] {
        let rate = client.drain(target, SOON, SOON)?;
        assert!(rate.took >= SOON && rate.count > 100_000, "{target}: {rate:?}");
    }
    for target in [echo, by_proxies(echo)?] {
        let rate = client.turnover(target, 4, SOON)?;
        assert!(rate.took >= SOON && rate.count >= 4, "{target}: {rate:?}");
    }
    let nobody = SocketAddr::new(echo.ip(), 9);
    assert_eq!(errno(&client.drain(nobody, SOON, SOON).unwrap_err()), Some("ECONNREFUSED"));
    assert_eq!(errno(&client.turnover(nobody, 4, SOON).unwrap_err()), Some("ECONNREFUSED"));
    Ok(())
}

#[test]
fn labs_with_the_same_addresses_do_not_meet() -> Result<()> {
    let Some(first) = Lab::for_test()? else { return Ok(()) };
    let second = Lab::new()?;
    let server = |lab: &Lab, name: &str| -> Result<(Pod, SocketAddr)> {
        let (edge1, edge2) = two_nodes(lab)?;
        let listening = edge2.pod(name)?.serve(App::Tcp, 7000)?;
        Ok((edge1.pod("client")?, listening[0]))
    };
    let ((client1, target1), (client2, target2)) = (server(&first, "one")?, server(&second, "two")?);
    assert_eq!(target1, target2);
    assert_eq!(client1.tcp(target1)?.name, "one");
    assert_eq!(client2.tcp(target2)?.name, "two");
    drop(first);
    assert_eq!(client2.tcp(target2)?.name, "two");
    client1.tcp(target1).unwrap_err();
    Ok(())
}

#[test]
fn nodes_have_mounts_and_cgroups_of_their_own() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let (edge1, edge2) = two_nodes(&lab)?;
    let pod = edge1.pod("web")?;
    assert_eq!(cgroup_of(pod.process())?, edge1.cgroup().join("pods/web"));
    assert_eq!(cgroup_of(edge1.host().process())?, edge1.cgroup().join("host"));
    for node in [&edge1, &edge2] {
        let root = PathBuf::from(format!("/proc/{}/root", node.pause_process()));
        assert_eq!(std::fs::read_dir(root.join("run"))?.count(), 0, "its /run was shared with another node");
        std::fs::write(root.join("run/mark"), node.name())?;
        let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", node.pause_process()))?;
        assert!(mounts.contains(" /sys/fs/bpf rw") && mounts.contains(" - bpf bpf"), "{mounts}");
    }
    assert!(!Path::new("/run/mark").exists());
    Ok(())
}

#[test]
fn names_and_addresses_that_cannot_work_are_refused() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let lan = lab.site("lan", &["192.168.10.0/24"])?;
    for name in ["", "a b", "../x", ".hidden"] {
        lan.node(name, &[]).unwrap_err();
    }
    let node = lan.node("edge1", &["10.244.1.0/24"])?;
    let error = node.pod_at("web", &["10.99.0.1"]).unwrap_err();
    assert_eq!(
        format!("{error:#}"),
        "could not make the pod web on edge1: 10.99.0.1 is in none of the node's pod subnets"
    );
    lab.site("broken", &["192.168.10.0"]).unwrap_err();
    Ok(())
}

#[test]
fn nothing_stays_behind_when_a_lab_is_closed() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let machine = Machine::now()?;
    let traces = Traces::of_busy(&lab)?;
    lab.close()?;
    traces.assert_gone(Duration::ZERO)?;
    machine.assert_unchanged()
}

#[test]
fn nothing_stays_behind_when_a_test_panics() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let machine = Machine::now()?;
    let traces = Traces::of_busy(&lab)?;
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _lab = lab;
        std::panic::resume_unwind(Box::new("a test fails"));
    }));
    assert!(outcome.is_err());
    traces.assert_gone(Duration::ZERO)?;
    machine.assert_unchanged()
}

#[test]
fn nothing_stays_behind_when_the_owner_of_a_lab_is_killed() -> Result<()> {
    after_the_owner_gets(|owner| Ok(kill(owner, Signal::SIGKILL)?))
}

#[test]
fn nothing_stays_behind_after_ctrl_c() -> Result<()> {
    // A terminal sends it to the whole foreground process group.
    after_the_owner_gets(|owner| Ok(killpg(owner, Signal::SIGINT)?))
}

#[test]
fn a_lab_whose_keeper_was_killed_too_is_swept_away_by_the_next() -> Result<()> {
    let Some(lab) = Lab::for_test()? else { return Ok(()) };
    let mut owner = Command::new("true").spawn()?;
    let gone = owner.id();
    owner.wait()?;
    let name = format!("edgemesh-lab-{gone}-0");
    let cgroup = lab.cgroup().with_file_name(&name);
    let directory = lab.directory().with_file_name(&name);
    std::fs::create_dir_all(cgroup.join("edge1/host"))?;
    std::fs::create_dir(&directory)?;
    let mut left = Command::new("sleep").arg("600").spawn()?;
    std::fs::write(cgroup.join("edge1/host/cgroup.procs"), left.id().to_string())?;
    let next = Lab::new()?;
    assert!(!cgroup.exists() && !directory.exists());
    assert!(!left.wait()?.success());
    assert!(lab.cgroup().exists() && next.cgroup().exists(), "a lab with an owner was swept away");
    Ok(())
}

/// Not a test of its own: the process that other tests end in the middle of its lab.
#[test]
#[ignore = "run by the tests of what stays behind"]
fn a_process_that_holds_a_lab() -> Result<()> {
    if std::env::var_os("EDGEMESH_LAB_HOLD").is_none() {
        return skip("being killed by another test");
    }
    let lab = Lab::new()?;
    let traces = Traces::of_busy(&lab)?;
    println!("\n{}", serde_json::to_string(&traces)?);
    // Ends with the test that started it, should that not get to the killing.
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}

fn after_the_owner_gets(end: impl FnOnce(Pid) -> Result<()>) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return skip("raising a lab");
    }
    let machine = Machine::now()?;
    // Whoever started the tests in the background of a shell without job control has them ignore SIGINT.
    let mut owner = Command::new("env")
        .arg("--default-signal=INT")
        .arg(std::env::current_exe()?)
        .args(["--exact", "a_process_that_holds_a_lab", "--ignored", "--nocapture"])
        .env("EDGEMESH_LAB_HOLD", "1")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    // Stays open: an owner that cannot write any more ends by itself.
    let mut stdout = BufReader::new(owner.stdout.take().context("the owner has no output")?);
    let traces = read_traces(&mut stdout)?;
    traces.assert_there()?;
    end(Pid::from_raw(i32::try_from(owner.id())?))?;
    assert!(!owner.wait()?.success());
    traces.assert_gone(Duration::from_secs(20))?;
    machine.assert_unchanged()
}

fn read_traces(output: &mut impl BufRead) -> Result<Traces> {
    for line in output.lines() {
        if let Ok(traces) = serde_json::from_str(&line?) {
            return Ok(traces);
        }
    }
    bail!("the owner of a lab ended before it raised one")
}

/// What shows that a lab exists.
#[derive(serde::Serialize, serde::Deserialize)]
struct Traces {
    cgroup: PathBuf,
    directory: PathBuf,
    processes: BTreeSet<u32>,
}

impl Traces {
    /// Puts pods with connections between them into a lab, and notes what it consists of.
    fn of_busy(lab: &Lab) -> Result<Self> {
        let (edge1, edge2) = two_nodes(lab)?;
        let (client, server) = (edge1.pod("client")?, edge2.pod("server")?);
        let target = server.serve(App::Tcp, 7000)?[0];
        std::mem::forget(client.open(Transport::Tcp, target)?);
        std::mem::forget(client.hammer(Transport::Tcp, target, 1)?);
        let mut processes = BTreeSet::new();
        let mut pending = vec![lab.cgroup().to_owned()];
        while let Some(cgroup) = pending.pop() {
            for entry in std::fs::read_dir(&cgroup)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    pending.push(entry.path());
                }
            }
            for process in std::fs::read_to_string(cgroup.join("cgroup.procs"))?.lines() {
                processes.insert(process.parse()?);
            }
        }
        ensure!(processes.len() == 6, "two pauses, two hosts, two pods make six processes, not {processes:?}");
        Ok(Self { cgroup: lab.cgroup().to_owned(), directory: lab.directory().to_owned(), processes })
    }

    fn assert_there(&self) -> Result<()> {
        ensure!(self.cgroup.exists() && self.directory.exists(), "the lab was not raised");
        ensure!(self.processes.iter().all(|process| alive(*process)), "a process of the lab is gone");
        Ok(())
    }

    fn assert_gone(&self, deadline: Duration) -> Result<()> {
        // The lab's namespaces need no look: with no process in them, and none mounted or named (see Machine), they end.
        eventually(deadline, "the lab to vanish", || {
            ensure!(!self.cgroup.exists(), "{} is still there", self.cgroup.display());
            ensure!(!self.directory.exists(), "{} is still there", self.directory.display());
            ensure!(!self.processes.iter().any(|process| alive(*process)), "a process of the lab is still there");
            Ok(true)
        })
    }
}

/// What labs must not touch on the machine.
#[derive(Debug, PartialEq)]
struct Machine {
    links: BTreeSet<String>,
    mounts: String,
    named_namespaces: usize,
}

impl Machine {
    fn now() -> Result<Self> {
        let names = |path: &str| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.file_name());
        Ok(Self {
            links: names("/sys/class/net").map(|name| name.to_string_lossy().into_owned()).collect(),
            mounts: std::fs::read_to_string("/proc/self/mountinfo")?,
            named_namespaces: names("/run/netns").count(),
        })
    }

    fn assert_unchanged(&self) -> Result<()> {
        assert_eq!(Self::now()?, *self);
        Ok(())
    }
}

/// Whether a process runs; a zombie does not.
fn alive(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// The directory of a process's cgroup2.
fn cgroup_of(process: u32) -> Result<PathBuf> {
    let groups = std::fs::read_to_string(format!("/proc/{process}/cgroup"))?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/")).context("no cgroup2")?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 ")).context("cgroup2 is not mounted")?;
    Ok(Path::new(mount.split(' ').nth(4).context("no mount point")?).join(path))
}
