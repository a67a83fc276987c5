//! What a connection through a ClusterIP costs.
//!
//! The lab stands twice, with few Services and with many, and the two take turns as the paths within each do. The paths
//! by iptables start in a pod of their own, so that its rules and its connection tracking touch no other path.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{Measure, Pod, Transport};

use crate::{
    Effort,
    iptables::Rules,
    report::{Table, micros, middle_half, say, verdict},
    scene::{ENDPOINTS, Scene, addresses},
    spread::Spread,
};

const SIZES: [u32; 2] = [10, 10_000];
/// The aim for what translation adds to `connect()`, in microseconds.
const AIM: f64 = 1.0;
/// The single calls that are measured.
const CALLS: [Measure; 3] = [Measure::Connect(Transport::Tcp), Measure::Connect(Transport::Udp), Measure::Send];
const DIRECT: &str = "direct";
const EBPF: &str = "ClusterIP, eBPF";

/// One kind of call over one path in one scene.
#[derive(Debug)]
struct Line {
    measure: Measure,
    path: &'static str,
    services: u32,
    /// The median of each repetition, in microseconds.
    medians: Vec<f64>,
}

/// Calls that take turns in one pod.
#[derive(Debug)]
struct Batch {
    pod: Pod,
    measure: Measure,
    services: u32,
    /// Each with the addresses that it leads to, which take turns.
    paths: Vec<(&'static str, Vec<SocketAddr>)>,
    rounds: u32,
}

/// Measures; one table of single calls, one of whole exchanges.
pub(crate) fn measure(effort: Effort) -> Result<Vec<Table>> {
    let mut scenes = Vec::new();
    let mut batches = Vec::new();
    let mut skipped = Vec::new();
    for services in SIZES {
        let scene = Scene::raise(services)?;
        let (own, without) = prepare(&scene, effort)?;
        batches.extend(own);
        skipped.extend(without);
        scenes.push(scene);
    }
    let repetitions = effort.pick(4, 40);
    let lines = run(&batches, repetitions)?;
    let calls = |measure: &Measure| CALLS.contains(measure);
    let mut single = Table {
        title: "Calls through a ClusterIP",
        method: format!(
            "From a pod to a pod on the same node, {ENDPOINTS} endpoints per Service; the measured Service is one of the \
             many. `connect()` on a blocking socket; `sendto()` on one unconnected socket. Added: the median through the \
             ClusterIP less the median of direct calls in the same repetition. A direct call passes the eBPF programs too, \
             which leave it alone; on a node without an agent there are none. {repetitions} repetitions, {} calls each \
             (`sendto()`: half as many).",
            rounds(Measure::Connect(Transport::Tcp), effort)
        ),
        head: vec!["call", "path", "Services", "median", "added", "middle half of added", "ratio"],
        rows: rows(&lines, calls)?,
        findings: findings(&lines)?,
    };
    single.findings.extend(skipped.iter().cloned());
    let exchange = Table {
        title: "Connection, request and answer",
        method: format!(
            "A new TCP connection, the server's greeting, a request of a few bytes and its answer. iptables: rules as \
             kube-proxy writes them, in the client's network namespace, with the rule of the measured Service in the \
             middle of the list or last; a direct connection there meets all rules and none matches. Userspace proxy: an \
             asynchronous one on the node, two connections and a copy between them. {repetitions} repetitions, {} \
             exchanges each.",
            rounds(Measure::Exchange, effort)
        ),
        head: vec!["call", "path", "Services", "median", "added", "middle half of added", "ratio"],
        rows: rows(&lines, |measure| !calls(measure))?,
        findings: skipped,
    };
    Ok(vec![single, exchange])
}

fn rounds(measure: Measure, effort: Effort) -> u32 {
    match measure {
        Measure::Connect(_) => effort.pick(200, 1000),
        Measure::Send => effort.pick(100, 500),
        Measure::Exchange | Measure::RoundTrip | Measure::Visit(_) => effort.pick(50, 200),
    }
}

/// What to measure in a scene, and what not and why.
fn prepare(scene: &Scene, effort: Effort) -> Result<(Vec<Batch>, Option<String>)> {
    let (direct, services) = (addresses(&scene.server), scene.services);
    let node = *scene.node.ips().first().context("the node has no address")?;
    let mut proxies = Vec::new();
    for endpoint in &direct {
        proxies.push(scene.node.host().proxy(SocketAddr::new(node, 0), *endpoint)?);
    }
    let batch = |pod: &Pod, measure, paths| Batch {
        pod: pod.clone(),
        measure,
        services,
        paths,
        rounds: rounds(measure, effort),
    };
    let (tcp, udp) = (vec![scene.tcp.address()], vec![scene.udp.address()]);
    let (connect, client) = (Measure::Connect(Transport::Tcp), &scene.client);
    let mut batches = vec![
        batch(client, connect, vec![(DIRECT, direct.clone()), (EBPF, tcp.clone())]),
        batch(client, Measure::Connect(Transport::Udp), vec![(DIRECT, direct.clone()), (EBPF, udp.clone())]),
        batch(client, Measure::Send, vec![(DIRECT, direct.clone()), (EBPF, udp)]),
        batch(client, Measure::Exchange, vec![(DIRECT, direct.clone()), (EBPF, tcp), ("userspace proxy", proxies)]),
    ];
    let [bare_client, bare_server] = &scene.bare;
    let bare = || vec![("direct, no agent", addresses(bare_server))];
    batches.extend(CALLS.map(|measure| batch(bare_client, measure, bare())));
    let pod = scene.node.pod("client-with-rules")?;
    match Rules::load(&scene.lab, &pod, services, &scene.server) {
        Ok(rules) => {
            for address in [rules.middle, rules.last] {
                let reply = pod.tcp(address)?;
                ensure!(reply.name == scene.server.name(), "the rule of {address} leads to {}", reply.name);
            }
            say(&format!("{services} Services: their rules are loaded by {}", rules.program));
            let paths = vec![
                ("direct, past the rules", direct),
                ("iptables, in the middle", vec![rules.middle]),
                ("iptables, last", vec![rules.last]),
            ];
            batches.extend([batch(&pod, connect, paths.clone()), batch(&pod, Measure::Exchange, paths)]);
            Ok((batches, None))
        }
        Err(error) => {
            let skipped = format!("**SKIPPED**: iptables with {services} Services: {error:#}");
            say(&skipped);
            Ok((batches, Some(skipped)))
        }
    }
}

fn run(batches: &[Batch], repetitions: u32) -> Result<Vec<Line>> {
    let line = |batch: &Batch, path| Line { measure: batch.measure, path, services: batch.services, medians: vec![] };
    let mut lines: Vec<Line> =
        batches.iter().flat_map(|batch| batch.paths.iter().map(move |(path, _)| line(batch, path))).collect();
    for repetition in 0..repetitions {
        // In the order of `lines`.
        let mut at = lines.iter_mut();
        for batch in batches {
            let targets: Vec<_> = batch.paths.iter().map(|(_, targets)| targets.clone()).collect();
            for quantiles in batch.pod.measure(batch.measure, &targets, batch.rounds)? {
                let line = at.next().context("more answers than questions")?;
                line.medians.push(quantiles.p50.as_secs_f64() * 1e6);
            }
        }
        if (repetition + 1) % 10 == 0 {
            say(&format!("repetition {} of {repetitions}", repetition + 1));
        }
    }
    // So that the same call stands together, and within it the same path.
    lines.sort_by_key(|line| (call(line.measure), line.services));
    Ok(lines)
}

fn find<'a>(lines: &'a [Line], measure: Measure, path: &str, services: u32) -> Result<&'a Line> {
    lines
        .iter()
        .find(|line| line.measure == measure && line.path == path && line.services == services)
        .with_context(|| format!("{} was not measured: {path}", call(measure)))
}

/// What a line adds to the direct path, repetition by repetition.
fn added(lines: &[Line], line: &Line) -> Result<Spread> {
    let direct = find(lines, line.measure, DIRECT, line.services)?;
    Spread::of(line.medians.iter().zip(&direct.medians).map(|(through, direct)| through - direct))
}

fn rows(lines: &[Line], of: impl Fn(&Measure) -> bool) -> Result<Vec<Vec<String>>> {
    let mut rows = Vec::new();
    for line in lines.iter().filter(|line| of(&line.measure)) {
        let direct = find(lines, line.measure, DIRECT, line.services)?;
        let mut row = vec![call(line.measure).to_owned(), line.path.to_owned(), line.services.to_string()];
        row.push(micros(Spread::of(line.medians.iter().copied())?.median));
        if line.path == DIRECT {
            row.extend(["", "", "1"].map(str::to_owned));
        } else {
            let added = added(lines, line)?;
            let ratio = Spread::of(line.medians.iter().zip(&direct.medians).map(|(through, direct)| through / direct))?;
            row.extend([micros(added.median), middle_half(&added, micros), format!("{:.3}", ratio.median)]);
        }
        rows.push(row);
    }
    Ok(rows)
}

/// Holds the figures against the aim: a microsecond, whatever the number of Services.
fn findings(lines: &[Line]) -> Result<Vec<String>> {
    let [few, many] = SIZES;
    let mut findings = Vec::new();
    for measure in CALLS {
        let at = |services| added(lines, find(lines, measure, EBPF, services)?).map(|spread| spread.median);
        let (at_few, at_many) = (at(few)?, at(many)?);
        for (services, figure) in [(few, at_few), (many, at_many)] {
            findings.push(verdict(&format!("{} adds, at {services} Services", call(measure)), figure, AIM, micros));
        }
        findings.push(format!("{}: {} more at {many} Services than at {few}", call(measure), micros(at_many - at_few)));
    }
    Ok(findings)
}

fn call(measure: Measure) -> &'static str {
    match measure {
        Measure::Connect(Transport::Tcp) => "TCP connect()",
        Measure::Connect(Transport::Udp) => "UDP connect()",
        Measure::Send => "UDP sendto()",
        Measure::Exchange => "TCP exchange",
        Measure::Visit(_) => "visit",
        Measure::RoundTrip => "TCP round trip",
    }
}
