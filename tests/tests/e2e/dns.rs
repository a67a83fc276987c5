//! Names from a pod, by dig: of the cluster and of the world outside, and what becomes of both in hard times.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{
    Lab, Node, Pod, Transport,
    agent::{Agent, AgentOptions},
    api::Store,
    eventually,
    manifest::{Endpoint, Service},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{START, TwoNodes};

/// Where the agent under test answers.
const SERVER: &str = "169.254.96.16";
const SERVER6: &str = "fd00:169:254:96::16";
/// Where the agent on `edge2` does, which the one under test has as its upstream: an address among `edge2`'s pods.
const UPSTREAM: &str = "10.244.2.250";
/// More endpoints than fit into a response by UDP of any size.
const MANY: u8 = 100;

/// A node with the agent under test, another with the agent that is its upstream, for the domain `corp.test`.
struct World {
    client: Pod,
    edge1: Node,
    edge2: Node,
    upstream: Agent,
    lab: Lab,
}

impl World {
    fn raise() -> Result<Option<Self>> {
        let Some(TwoNodes { client, edge1, edge2, lab }) = TwoNodes::raise()? else { return Ok(None) };
        lab.manifests().write("services", &services()?)?;
        let options = AgentOptions::default()
            .set("commonConfig.bridgeDeviceIP", UPSTREAM)
            .set("modules.edgeProxy.enable", false)
            .set("modules.edgeDNS", json!({ "enable": true, "clusterDomain": "corp.test", "resolvConf": "/dev/null" }));
        let upstream = edge2.start_agent(&options)?;
        upstream.wait_ready(START)?;
        Ok(Some(Self { client, edge1, edge2, upstream, lab }))
    }

    /// A resolv.conf with these lines, at a place of the node of its own.
    fn resolv_conf(&self, text: &str) -> Result<PathBuf> {
        self.edge1.write_file("resolv.conf", text)
    }

    /// Starts the agent under test with these settings of `modules.edgeDNS`.
    fn start(&self, settings: Value) -> Result<Agent> {
        let agent = self.edge1.start_agent(&dns(settings))?;
        agent.wait_ready(START)?;
        eventually(START, "DNS is answered", || {
            Ok(self.dig(&["+tries=1", "+time=1", "dns-version.cluster.local", "TXT"])?.answered())
        })?;
        Ok(agent)
    }

    /// Starts the agent under test with the other one as its upstream.
    fn start_forwarding(&self) -> Result<Agent> {
        self.start(json!({ "resolvConf": self.resolv_conf(&format!("nameserver {UPSTREAM}\n"))? }))
    }

    /// Starts it as a cache, with these settings of `cacheDNS`.
    fn start_cache(&self, mut settings: Value) -> Result<Agent> {
        settings["enable"] = true.into();
        let agent = self.edge1.start_agent(&dns(json!({ "cacheDNS": settings })))?;
        agent.wait_ready(START)?;
        Ok(agent)
    }

    /// Asks from the pod.
    fn dig(&self, arguments: &[&str]) -> Result<Dug> {
        Dug::ask(&self.client, SERVER, arguments)
    }

    fn status(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&self.edge1.cli(&["status", "-o", "json"])?.stdout)?)
    }

    /// The message of a condition; None if it does not hold.
    fn condition(&self, reason: &str) -> Result<Option<String>> {
        let status = self.status()?;
        let conditions = status["conditions"].as_array().context("no conditions")?;
        let found = conditions.iter().find(|condition| condition["reason"] == reason);
        Ok(found.and_then(|condition| condition["message"].as_str()).map(str::to_owned))
    }
}

/// The usual agent with DNS.
fn dns(mut settings: Value) -> AgentOptions {
    if let Some(settings) = settings.as_object_mut() {
        settings.insert("enable".to_owned(), true.into());
    }
    AgentOptions::default().set("modules.edgeDNS", settings).set("commonConfig.bridgeDeviceIPv6", SERVER6)
}

fn services() -> Result<String> {
    let web = Service::new("web", &["10.96.0.10", "fd00:10:96::10"]).port("http", Transport::Tcp, 80, 8080);
    let db = Service::new("db", &[]).port("sql", Transport::Tcp, 5432, 5432);
    let pods = ["10.244.1.21", "10.244.2.22"]
        .iter()
        .enumerate()
        .map(|(number, ip)| Ok(Endpoint::new(ip.parse()?, "edge1").field("hostname", format!("db-{number}"))));
    let many = Service::new("many", &[]).port("main", Transport::Tcp, 80, 80);
    let crowd: Result<Vec<Endpoint>> =
        (1..=MANY).map(|last| Ok(Endpoint::new(format!("10.245.0.{last}").parse()?, "edge2"))).collect();
    Ok([web.yaml()?, db.yaml_with(&pods.collect::<Result<Vec<_>>>()?)?, many.yaml_with(&crowd?)?].join("---\n"))
}

/// What dig printed.
struct Dug(String);

impl Dug {
    fn ask(from: &Pod, server: &str, arguments: &[&str]) -> Result<Self> {
        let mut all = vec!["-r", &*format!("@{server}")].into_iter().map(str::to_owned).collect::<Vec<_>>();
        all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let output = from.run("dig", &all)?;
        Ok(Self(String::from_utf8(output.stdout)?))
    }

    /// The records of the answer section: owner, type and data.
    fn answers(&self) -> Vec<String> {
        let lines = self.0.lines().skip_while(|line| !line.starts_with(";; ANSWER SECTION")).skip(1);
        let records = lines.take_while(|line| !line.is_empty() && !line.starts_with(';'));
        let fields = records.map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
        fields.map(|fields| [&fields[..1], &fields[3..]].concat().join(" ")).collect()
    }

    /// Their data alone.
    fn data(&self) -> Vec<String> {
        let data = self.answers().into_iter().filter_map(|record| Some(record.splitn(3, ' ').nth(2)?.to_owned()));
        data.collect()
    }

    fn answered(&self) -> bool {
        self.0.contains("status: NOERROR") && !self.answers().is_empty()
    }

    fn has(&self, part: &str) -> bool {
        self.0.contains(part)
    }

    fn expect(&self, data: &[&str]) -> Result<()> {
        ensure!(self.data() == data, "expected {data:?}, got:\n{}", self.0);
        Ok(())
    }
}

#[test]
fn a_pod_finds_services_endpoints_and_ports_by_udp_and_tcp_however_it_asks() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let _agent = world.start_forwarding()?;
    let web = "web.default.svc.cluster.local";
    let questions: [(&[&str], &[&str]); 10] = [
        (&[web, "A"], &["10.96.0.10"]),
        (&[web, "AAAA"], &["fd00:10:96::10"]),
        (&["db-0.db.default.svc.cluster.local", "A"], &["10.244.1.21"]),
        (&["_http._tcp.web.default.svc.cluster.local", "SRV"], &["0 100 80 web.default.svc.cluster.local."]),
        (&["-x", "10.96.0.10"], &["web.default.svc.cluster.local."]),
        (&["-x", "10.244.1.21"], &["db-0.db.default.svc.cluster.local."]),
        (&["-x", "fd00:10:96::10"], &["web.default.svc.cluster.local."]),
        (&["dns-version.cluster.local", "TXT"], &["\"1.1.0\""]),
        (&["10-244-1-21.default.pod.cluster.local", "A"], &["10.244.1.21"]),
        // The upstream's name.
        (&["web.default.svc.corp.test", "A"], &["10.96.0.10"]),
    ];
    let ways: [&[&str]; 8] = [
        &[],
        &["+tcp"],
        &["+noedns"],
        &["+subnet=192.0.2.0/24"],
        &["+bufsize=512"],
        &["+tcp", "+keepopen"],
        &["+dnssec", "+cookie"],
        &["+norecurse", "+nsid"],
    ];
    for (question, expected) in questions {
        for way in ways {
            world.dig(&[question, way].concat())?.expect(expected).with_context(|| format!("{question:?} {way:?}"))?;
        }
    }
    // The host, and the second address.
    Dug::ask(world.edge1.host(), SERVER, &[web])?.expect(&["10.96.0.10"])?;
    Dug::ask(&world.client, SERVER6, &[web, "AAAA"])?.expect(&["fd00:10:96::10"])?;
    Dug::ask(&world.client, SERVER6, &["+tcp", web])?.expect(&["10.96.0.10"])?;

    let several = world.dig(&["+tcp", "+keepopen", web, "A", web, "AAAA", "nothing.default.svc.cluster.local", "A"])?;
    ensure!(several.0.matches("status: NOERROR").count() == 2 && several.has("status: NXDOMAIN"), "{}", several.0);

    let mixed = world.dig(&["wEB.deFAULT.svc.cluster.local"])?;
    ensure!(mixed.answers() == ["wEB.deFAULT.svc.cluster.local. A 10.96.0.10"], "{}", mixed.0);
    // What a search path with ndots:5 makes of it.
    for miss in [
        "www.example.org.default.svc.cluster.local",
        "www.example.org.svc.cluster.local",
        "www.example.org.cluster.local",
    ] {
        let denied = world.dig(&[miss])?;
        ensure!(denied.has("status: NXDOMAIN") && denied.has("SOA"), "{}", denied.0);
    }
    let none = world.dig(&[web, "MX"])?;
    ensure!(none.has("status: NOERROR") && none.has("ANSWER: 0") && none.has("SOA"), "{}", none.0);

    for (refused, status) in [
        (&["version.bind", "CH", "TXT"][..], "REFUSED"),
        (&["+edns=1", "+noednsneg", web], "BADVERS"),
        (&["+opcode=notify", web], "NOTIMP"),
    ] {
        let answer = world.dig(refused)?;
        ensure!(answer.has(&format!("status: {status}")), "{refused:?}: {}", answer.0);
    }
    let transfer = world.dig(&["cluster.local", "AXFR"])?;
    ensure!(transfer.has("Transfer failed"), "{}", transfer.0);
    ensure!(world.dig(&[web, "ANY"])?.answers() == [format!("{web}. HINFO \"RFC8482\" \"\"")]);
    Ok(())
}

/// A headless Service of both families with hostnames on some of its endpoints, one that publishes what is not ready, one
/// that does not, and aliases.
const FORMS: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: set}
spec: {clusterIP: None, ports: [{name: peer, port: 7000, protocol: UDP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: set-v4, labels: {kubernetes.io/service-name: set}}
addressType: IPv4
ports: [{name: peer, port: 7000, protocol: UDP}]
endpoints:
- {addresses: [10.244.1.31], hostname: set-0}
- {addresses: [10.244.2.32]}
- {addresses: [10.244.2.33], hostname: set-2, conditions: {ready: false}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: set-v6, labels: {kubernetes.io/service-name: set}}
addressType: IPv6
ports: [{name: peer, port: 7000, protocol: UDP}]
endpoints:
- {addresses: ["fd00:10:244:1::31"], hostname: set-0}
---
apiVersion: v1
kind: Service
metadata: {name: early}
spec: {clusterIP: None, publishNotReadyAddresses: true, ports: [{name: peer, port: 7000}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: early-v4, labels: {kubernetes.io/service-name: early}}
addressType: IPv4
ports: [{name: peer, port: 7000, protocol: TCP}]
endpoints:
- {addresses: [10.244.1.41], hostname: early-0, conditions: {ready: false}}
---
apiVersion: v1
kind: Service
metadata: {name: inside}
spec: {type: ExternalName, externalName: early.default.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: outside}
spec: {type: ExternalName, externalName: web.default.svc.corp.test}
---
apiVersion: v1
kind: Service
metadata: {name: nowhere}
spec: {type: ExternalName, externalName: missing.default.svc.corp.test}
"#;

#[test]
fn every_form_of_name_of_the_specification_is_answered_by_udp_and_tcp() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    world.lab.manifests().write("forms", FORMS)?;
    let _agent = world.start_forwarding()?;
    let set = "set.default.svc.cluster.local";
    let early = "early.default.svc.cluster.local";
    let unnamed = format!("10-244-2-32.{set}");
    // Priority and weight are the same for all.
    let peers = [(7000, format!("{unnamed}.")), (7000, format!("set-0.{set}."))];
    let aliased = |target: &str, address: &str| vec![format!("{target}."), address.to_owned()];
    let questions: Vec<(String, &str, Vec<String>)> = vec![
        (set.to_owned(), "A", vec!["10.244.1.31".into(), "10.244.2.32".into()]),
        (set.to_owned(), "AAAA", vec!["fd00:10:244:1::31".into()]),
        (format!("set-0.{set}"), "A", vec!["10.244.1.31".into()]),
        (format!("set-0.{set}"), "AAAA", vec!["fd00:10:244:1::31".into()]),
        (unnamed.clone(), "A", vec!["10.244.2.32".into()]),
        (early.to_owned(), "A", vec!["10.244.1.41".into()]),
        (format!("early-0.{early}"), "A", vec!["10.244.1.41".into()]),
        (format!("_peer._tcp.{early}"), "SRV", vec![format!("0 100 7000 early-0.{early}.")]),
        ("inside.default.svc.cluster.local".into(), "A", aliased(early, "10.244.1.41")),
        ("inside.default.svc.cluster.local".into(), "CNAME", vec![format!("{early}.")]),
        ("outside.default.svc.cluster.local".into(), "A", aliased("web.default.svc.corp.test", "10.96.0.10")),
        ("outside.default.svc.cluster.local".into(), "AAAA", aliased("web.default.svc.corp.test", "fd00:10:96::10")),
        ("fd00-10-244-1--31.default.pod.cluster.local".into(), "AAAA", vec!["fd00:10:244:1::31".into()]),
    ];
    for way in [&[][..], &["+tcp"]] {
        for (name, qtype, expected) in &questions {
            let answer = world.dig(&[way, &[name, qtype]].concat())?;
            let (mut data, mut expected) = (answer.data(), expected.clone());
            data.sort_unstable();
            expected.sort_unstable();
            ensure!(data == expected, "{name} {qtype} {way:?}: expected {expected:?}, got:\n{}", answer.0);
        }
        let servers = world.dig(&[way, &[&format!("_peer._udp.{set}"), "SRV"]].concat())?;
        let mut targets: Vec<(u16, String)> = Vec::new();
        for data in servers.data() {
            let fields: Vec<&str> = data.split(' ').collect();
            let [_, _, port, target] = fields[..] else { anyhow::bail!("{}", servers.0) };
            targets.push((port.parse()?, target.to_owned()));
        }
        targets.sort_unstable();
        ensure!(targets == peers, "expected {peers:?}, got:\n{}", servers.0);
        let reverse = world.dig(&[way, &["-x", "10.244.2.32"]].concat())?;
        reverse.expect(&[&format!("{unnamed}.")])?;
        // There is such a name, but nothing of the type; there is no such name; an alias of what is none.
        let without = world.dig(&[way, &[&*unnamed, "AAAA"]].concat())?;
        ensure!(without.has("status: NOERROR") && without.has("ANSWER: 0") && without.has("SOA"), "{}", without.0);
        let unready = world.dig(&[way, &[&format!("set-2.{set}"), "A"]].concat())?;
        ensure!(unready.has("status: NXDOMAIN") && unready.has("SOA"), "{}", unready.0);
        let nowhere = world.dig(&[way, &["nowhere.default.svc.cluster.local", "A"]].concat())?;
        ensure!(nowhere.has("status: NXDOMAIN") && nowhere.has("SOA"), "{}", nowhere.0);
        nowhere.expect(&["missing.default.svc.corp.test."])?;
    }
    Ok(())
}

#[test]
fn who_is_not_on_the_node_gets_no_answer_whatever_its_routes_are() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let resolv_conf = world.resolv_conf("")?;
    let agent = world.start(json!({ "resolvConf": resolv_conf }))?;
    let same_family = |ips: &[IpAddr], like: &str| {
        ips.iter().find(|ip| ip.is_ipv6() == like.contains(':')).map(ToString::to_string).context("no address")
    };
    for server in [SERVER, SERVER6] {
        world.edge2.ip(&["route", "add", server, "via", &same_family(world.edge1.ips(), server)?])?;
    }
    let web = "web.default.svc.cluster.local";
    let answered = |from: &Pod| -> Result<Vec<bool>> {
        let ways = [(SERVER, "+notcp"), (SERVER, "+tcp"), (SERVER6, "+notcp"), (SERVER6, "+tcp")];
        let ask = |(server, way)| Ok(Dug::ask(from, server, &["+tries=1", "+time=1", way, web])?.answered());
        ways.into_iter().map(ask).collect()
    };
    let (neighbour, own) = (world.edge2.host(), [&world.client, world.edge1.host()]);
    ensure!(answered(neighbour)? == [true; 4], "nothing tells that the LAN is one");
    world.edge1.ip(&["route", "add", "default", "via", &same_family(world.edge2.ips(), SERVER)?])?;
    eventually(START, "the neighbour gets no answer", || Ok(answered(neighbour)? == [false; 4]))?;
    for client in own {
        ensure!(answered(client)? == [true; 4]);
    }
    ensure!(world.status()?["dns"]["closed_to"] == json!(["eth0"]));
    ensure!(world.condition("DnsOpenToOutside")?.is_none());

    agent.kill()?;
    let _open = world.start(json!({ "resolvConf": resolv_conf, "answerOutside": true }))?;
    ensure!(answered(neighbour)? == [true; 4], "it was asked to");
    Ok(())
}

#[test]
fn what_is_too_long_for_a_datagram_is_fetched_by_tcp() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let _agent = world.start(json!({ "resolvConf": world.resolv_conf("")? }))?;
    let many = "many.default.svc.cluster.local";
    for size in ["+bufsize=512", "+bufsize=4096", "+noedns"] {
        let cut = world.dig(&["+ignore", size, many])?;
        ensure!(cut.has("flags: qr aa tc"), "{size}: {}", cut.0);
        ensure!(cut.answers().len() < usize::from(MANY), "{size}: {}", cut.0);
        let whole = world.dig(&[size, many])?;
        ensure!(whole.answers().len() == usize::from(MANY) && !whole.has("tc rd"), "{size}: {}", whole.0);
    }
    Ok(())
}

#[test]
fn names_are_answered_from_the_snapshot_and_fail_where_nothing_is_known() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let api = world.edge1.ips().first().context("a node without an address")?;
    let store = Store::default();
    store.apply(&services()?)?;
    let options = || -> Result<AgentOptions> {
        Ok(dns(json!({ "resolvConf": world.resolv_conf("")? }))
            .set("kubeAPIConfig.staticDirectory", Value::Null)
            .set("kubeAPIConfig.master", format!("http://{api}:6443")))
    };
    let web = "web.default.svc.cluster.local";
    // Never has there been an API server: the name may exist for all that is known.
    let agent = world.edge1.start_agent(&options()?)?;
    eventually(START, "SERVFAIL for what is not known", || {
        Ok(world.dig(&["+tries=1", "+time=1", web])?.has("status: SERVFAIL"))
    })?;
    let server = store.serve(&world.edge1, 6443)?;
    agent.wait_ready(START)?;
    eventually(START, "the name", || Ok(world.dig(&[web])?.answered()))?;
    eventually(START, "the snapshot", || Ok(world.status()?["snapshot"]["size_bytes"].is_u64()))?;
    drop(server);
    agent.kill()?;
    let _again = world.edge1.start_agent(&options()?)?;
    eventually(START, "the name without an API server", || Ok(world.dig(&["+tries=1", "+time=1", web])?.answered()))?;
    world.dig(&["-x", "10.96.0.10"])?.expect(&["web.default.svc.cluster.local."])
}

#[test]
fn a_port_that_is_taken_is_told_with_who_has_it_and_taken_over_when_it_is_free() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let taken = world.edge1.listen("0.0.0.0:53".parse()?)?;
    let agent = world.start(json!({ "resolvConf": world.resolv_conf("")? }))?;
    agent.wait_ready(START)?;
    let web = "web.default.svc.cluster.local";
    ensure!(world.dig(&[web])?.answered(), "UDP is free");
    let message = world.condition("DnsAddressUnavailable")?.context("no condition")?;
    let holder = format!("(process {}) has it", std::process::id());
    ensure!(message.contains("169.254.96.16:53 (TCP)") && message.contains(&holder), "{message}");
    drop(taken);
    eventually(START, "TCP is answered", || Ok(world.dig(&["+tcp", "+tries=1", "+time=1", web])?.answered()))?;
    eventually(START, "no condition", || Ok(world.condition("DnsAddressUnavailable")?.is_none()))
}

#[test]
fn a_resolv_conf_without_use_is_told_and_a_replaced_one_is_followed() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let directory =
        world.edge1.write_file("empty", "# nothing\n")?.parent().map(Path::to_owned).context("no directory")?;
    world.edge1.write_file("ourselves", &format!("search cluster.local\nnameserver {SERVER}\n"))?;
    world.edge1.write_file("good", &format!("options ndots:5\nnameserver {UPSTREAM}\n"))?;
    let link = directory.join("link");
    let point_to = |name: &str| -> Result<()> {
        let draft = directory.join("link.draft");
        std::os::unix::fs::symlink(name, &draft)?;
        Ok(fs::rename(&draft, &link)?)
    };
    point_to("ourselves")?;
    let agent = world.start(json!({ "resolvConf": link }))?;
    let outside = "web.default.svc.corp.test";
    let missing = |part: &str| -> Result<()> {
        eventually(START, &format!("'{part}' to be told"), || {
            Ok(world.condition("DnsUpstreamsMissing")?.is_some_and(|message| message.contains(part)))
        })
    };
    missing("nobody but this agent")?;
    ensure!(world.dig(&[outside])?.has("status: SERVFAIL"), "there is nobody to ask");
    ensure!(world.dig(&["web.default.svc.cluster.local"])?.answered());
    agent.wait_ready(START)?;

    point_to("good")?;
    eventually(START, "the new upstream", || Ok(world.dig(&[outside])?.answered()))?;
    ensure!(world.condition("DnsUpstreamsMissing")?.is_none());

    point_to("empty")?;
    missing("names no name server")?;
    ensure!(world.dig(&["other.default.svc.corp.test"])?.has("status: NXDOMAIN"), "those known before are still asked");
    fs::remove_file(&link)?;
    missing("No such file")?;
    ensure!(world.dig(&["web.default.svc.cluster.local"])?.answered());
    point_to("good")?;
    eventually(START, "no condition", || Ok(world.condition("DnsUpstreamsMissing")?.is_none()))
}

#[test]
fn while_the_upstream_is_silent_names_are_answered_stale_and_afterwards_fresh() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let _agent = world.start_forwarding()?;
    // Negative answers are the ones that age soon: their TTL is 5 s.
    let (gone, cluster) = ("gone.default.svc.corp.test", "web.default.svc.cluster.local");
    ensure!(world.dig(&[gone])?.has("status: NXDOMAIN"));
    let pid = Pid::from_raw(i32::try_from(world.upstream.pid())?);
    kill(pid, Signal::SIGSTOP)?;
    // The first failure is what a client of another name waits for.
    let first = world.dig(&["+tries=1", "+time=10", "other.default.svc.corp.test"])?;
    ensure!(first.has("status: SERVFAIL"), "{}", first.0);
    eventually(START, "a stale answer", || Ok(world.dig(&["+tries=1", "+time=10", gone])?.has("Stale NXDOMAIN")))?;
    for _ in 0..3 {
        let stale = world.dig(&["+tries=1", "+time=1", gone])?;
        ensure!(stale.has("status: NXDOMAIN") && stale.has("Stale NXDOMAIN"), "{}", stale.0);
        ensure!(query_time(&stale)? <= Duration::from_millis(50), "{}", stale.0);
        let own = world.dig(&["+tries=1", "+time=1", cluster])?;
        ensure!(own.answered() && query_time(&own)? <= Duration::from_millis(50), "{}", own.0);
    }
    let told = String::from_utf8(world.edge1.cli(&["dns", gone])?.stdout)?;
    ensure!(told.contains("STALE") && told.contains(&format!("{UPSTREAM}:53 (SILENT)")), "{told}");
    kill(pid, Signal::SIGCONT)?;
    let back = Instant::now();
    eventually(START, "a fresh answer", || {
        Ok(!world.dig(&["+tries=1", "+time=1", gone])?.has("Stale")
            && world.dig(&["web.default.svc.corp.test"])?.answered())
    })?;
    ensure!(back.elapsed() < Duration::from_secs(5), "{:?}", back.elapsed());
    Ok(())
}

#[test]
fn a_cache_before_the_clusters_dns_asks_it_for_all_names() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let _agent = world.start_cache(json!({ "autoDetect": false, "upstreamServers": [UPSTREAM], "cacheTTL": 5 }))?;
    eventually(START, "an answer of the upstream", || {
        Ok(world.dig(&["+tries=1", "+time=1", "web.default.svc.corp.test"])?.answered())
    })?;
    let not_ours = world.dig(&["web.default.svc.cluster.local"])?;
    ensure!(!not_ours.answered(), "the upstream has no such domain: {}", not_ours.0);
    let status = String::from_utf8(world.edge1.cli(&["status"])?.stdout)?;
    ensure!(status.contains("a cache before the cluster's DNS on 169.254.96.16:53 UDP"), "{status}");
    Ok(())
}

#[test]
fn a_name_that_is_known_keeps_its_addresses_while_the_upstream_is_silent() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    // Positive answers that age soon.
    let _agent = world.start_cache(json!({ "autoDetect": false, "upstreamServers": [UPSTREAM], "cacheTTL": 5 }))?;
    let name = "web.default.svc.corp.test";
    eventually(START, "an answer", || Ok(world.dig(&["+tries=1", "+time=1", name])?.answered()))?;
    let pid = Pid::from_raw(i32::try_from(world.upstream.pid())?);
    kill(pid, Signal::SIGSTOP)?;
    let first = world.dig(&["+tries=1", "+time=10", "other.default.svc.corp.test"])?;
    ensure!(first.has("status: SERVFAIL"), "{}", first.0);
    // From the first failure on, each answer comes soon; past its time they say so.
    eventually(START, "a stale answer", || {
        let known = world.dig(&["+tries=1", "+time=1", name])?;
        known.expect(&["10.96.0.10"])?;
        ensure!(query_time(&known)? <= Duration::from_millis(50), "{}", known.0);
        Ok(known.has("Stale Answer"))
    })?;
    kill(pid, Signal::SIGCONT)?;
    let back = Instant::now();
    eventually(START, "a fresh answer", || {
        let fresh = world.dig(&["+tries=1", "+time=1", name])?;
        Ok(fresh.answered() && !fresh.has("Stale"))
    })?;
    ensure!(back.elapsed() < Duration::from_secs(5), "{:?}", back.elapsed());
    Ok(())
}

#[test]
fn the_clusters_dns_is_found_among_its_services_and_followed() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let _agent = world.start_cache(json!({ "autoDetect": true }))?;
    let name = "web.default.svc.corp.test";
    eventually(START, "that there is nobody to ask is told", || {
        Ok(world.dig(&["+tries=1", "+time=1", name])?.has("status: SERVFAIL")
            && world.condition("DnsUpstreamsMissing")?.is_some())
    })?;
    for (ip, name) in [("10.96.0.53", name), ("10.96.0.54", "db-0.db.default.svc.corp.test")] {
        let kube_dns = Service::new("kube-dns", &[ip]).namespace("kube-system");
        let kube_dns = kube_dns.port("dns", Transport::Udp, 53, 53).port("dns-tcp", Transport::Tcp, 53, 53);
        let server = Endpoint::new(UPSTREAM.parse()?, "edge2");
        world.lab.manifests().write("kube-dns", &kube_dns.yaml_with(&[server])?)?;
        eventually(START, "the Service's address is the upstream", || {
            let upstreams = world.status()?["dns"]["forwarder"]["upstreams"].clone();
            Ok(upstreams.as_array().is_some_and(|all| all.len() == 1) && upstreams[0]["address"] == format!("{ip}:53"))
        })?;
        eventually(START, "an answer of the cluster's DNS", || {
            Ok(world.dig(&["+tries=1", "+time=1", name])?.answered())
        })?;
    }
    ensure!(world.condition("DnsUpstreamsMissing")?.is_none());
    Ok(())
}

#[test]
fn the_dns_command_and_the_metrics_tell_where_an_answer_is_from() -> Result<()> {
    let Some(world) = World::raise()? else { return Ok(()) };
    let agent = world.start_forwarding()?;
    let told = |arguments: &[&str]| -> Result<String> {
        let output = world.edge1.cli(&[&["dns"], arguments].concat())?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let db = told(&["db.default.svc.cluster.local"])?;
    for part in ["NOERROR", "the name of a Service", "default/db", "10.244.1.21  db-0  edge1  yes       ready"] {
        ensure!(db.contains(part), "{part:?} is not in\n{db}");
    }
    let outside = told(&["web.default.svc.corp.test"])?;
    ensure!(outside.contains(&format!("from    upstream {UPSTREAM}:53")), "{outside}");
    let outside = told(&["web.default.svc.corp.test"])?;
    ensure!(outside.contains("from    the cache"), "{outside}");
    let reverse = told(&["10.0.96.10.in-addr.arpa", "PTR"])?;
    ensure!(reverse.contains("10.0.96.10.in-addr.arpa. PTR: "), "{reverse}");
    let wrong = world.edge1.cli(&["dns", "a b"])?;
    ensure!(wrong.status.code() == Some(64), "{wrong:?}");

    ensure!(world.dig(&["web.default.svc.cluster.local"])?.answered());
    ensure!(world.dig(&["web.default.svc.corp.test"])?.answered());
    let metrics = agent.metrics()?;
    for part in [
        "edgemesh_dns_queries_total{type=\"A\",zone=\"cluster\",result=\"answer\"} ",
        "edgemesh_dns_queries_total{type=\"A\",zone=\"forwarded\",result=\"answer\"} ",
        "edgemesh_dns_query_seconds_bucket{le=\"+Inf\",zone=\"cluster\"} ",
        "edgemesh_dns_upstream_healthy{upstream=\"10.244.2.250:53\"} 1",
        "edgemesh_dns_listening{address=\"[fd00:169:254:96::16]:53\",transport=\"TCP\"} 1",
    ] {
        ensure!(metrics.contains(part), "{part:?} is not in\n{metrics}");
    }
    Ok(())
}

/// As dig measured it.
fn query_time(dug: &Dug) -> Result<Duration> {
    let line = dug.0.lines().find_map(|line| line.strip_prefix(";; Query time: ")).context("no query time")?;
    let milliseconds = line.split(' ').next().context("no time")?.parse()?;
    Ok(Duration::from_millis(milliseconds))
}
