//! What a client sees of a Service on one LAN, and what it should see.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::example::ExampleService;
use super::table::Row;
use crate::lab::{App, Attempt, Pod, Reply, Transport};

/// Connections after which every replica of a Service must have answered: with three, one is missed once in 10^10.
const SPREAD: u32 = 60;
/// How many of them at once.
const AT_ONCE: u32 = 12;
/// Bounds each step; nothing in the lab takes long, and a demo that fails should soon say so.
const STEP: Duration = Duration::from_secs(2);
/// Connects per measured path.
const ROUNDS: u32 = 300;

/// Tries a Service as `client`, which is a `kind` ("pod" or "host").
pub(super) fn rows(service: &ExampleService, kind: &str, client: &Pod) -> Vec<Row> {
    let client = &client.within(STEP);
    let name = &service.name;
    let replicas: BTreeSet<&str> = service.backends.iter().map(|backend| backend.pod.as_str()).collect();
    let all = replicas.into_iter().collect::<Vec<_>>().join(" ");
    let row = |what: &str, expected: &str, got: Result<String>| Row {
        what: format!("{kind}: {name}: {what}"),
        expected: expected.to_owned(),
        got,
        figures: None,
    };
    let Some(frontend) = service.frontend else {
        return vec![row("headless, pods by their addresses", &all, direct(service, client))];
    };
    if service.backends.is_empty() {
        let attempt = || -> Result<String> {
            Ok(match client.connect(frontend)? {
                Attempt::Connected(_) => "connected".to_owned(),
                Attempt::Failed(errno) => errno,
            })
        };
        return vec![row(&format!("{frontend}, no endpoints"), "ECONNREFUSED", attempt())];
    }
    let mut rows = match service.app {
        App::Http => vec![
            row(&format!("HTTP to {frontend}"), &all, http_spread(client, frontend)),
            row("3 requests on one connection", "1 replica, 3 answers", keep_alive(client, frontend)),
        ],
        App::Tcp | App::Count | App::Reset | App::Echo | App::Source => vec![row(
            &format!("TCP to {frontend}"),
            &seen(&all, frontend),
            client.tcp(frontend).and_then(|reply| describe(&reply, client)),
        )],
        App::WebSocket => vec![row(
            &format!("WebSocket to {frontend}"),
            &seen(&all, frontend),
            client.websocket(frontend).and_then(|reply| describe(&reply, client)),
        )],
        App::Udp => vec![
            row(&format!("UDP to {frontend}, connected"), &all, udp_spread(client, frontend)),
            row("unconnected, the reply comes from", &frontend.to_string(), udp_source(client, frontend)),
        ],
    };
    if let Some(first) = rows.first_mut().filter(|row| row.passed()) {
        match medians(service, frontend, client) {
            Ok(medians) => first.figures = Some(medians),
            Err(error) => first.got = Err(error.context("could not measure it")),
        }
    }
    rows
}

/// Asks the agent, as `client`, for the address of a Service by its name: that of the Service, or those of its pods where
/// it is headless.
pub(super) fn by_name(service: &ExampleService, kind: &str, client: &Pod) -> Row {
    let addresses: BTreeSet<IpAddr> = match service.frontend {
        Some(frontend) => BTreeSet::from([frontend.ip()]),
        None => service.backends.iter().map(|backend| backend.address.ip()).collect(),
    };
    let qtype = if addresses.iter().all(IpAddr::is_ipv4) { "A" } else { "AAAA" };
    let name = format!("{}.default.svc.cluster.local", service.name);
    Row {
        what: format!("{kind}: {}: {qtype} record of its name", service.name),
        expected: joined(&addresses.iter().map(ToString::to_string).collect()),
        got: look_up(&client.within(STEP), &name, qtype)
            .map(|found| joined(&found.iter().map(ToString::to_string).collect())),
        figures: None,
    }
}

/// The addresses of a name, as the agent says.
pub(super) fn look_up(client: &Pod, name: &str, qtype: &str) -> Result<BTreeSet<IpAddr>> {
    let output = client.run("dig", &["+short", "+tries=1", "+time=1", "@169.254.96.16", name, qtype])?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "dig: {}", said.trim());
    let mut addresses = BTreeSet::new();
    for line in said.lines() {
        addresses.insert(line.parse::<IpAddr>().with_context(|| format!("dig says {line:?}"))?);
    }
    Ok(addresses)
}

/// Which pod answered, with the address that getpeername() shows.
fn seen(names: &str, peer: SocketAddr) -> String {
    format!("{names}, peer {peer}")
}

fn describe(reply: &Reply, client: &Pod) -> Result<String> {
    // Which address of its own a node uses depends on the route; a pod has one per family.
    let own = client.ips().contains(&reply.client.ip()) || reply.client == reply.local;
    ensure!(own, "{} saw the client as {}, not {}", reply.name, reply.client, reply.local);
    Ok(seen(&reply.name, reply.peer))
}

fn direct(service: &ExampleService, client: &Pod) -> Result<String> {
    let mut names = BTreeSet::new();
    for backend in &service.backends {
        names.insert(match service.app.transport() {
            Transport::Tcp => client.tcp(backend.address)?.name,
            Transport::Udp => client.udp(backend.address)?.name,
        });
    }
    Ok(joined(&names))
}

fn http_spread(client: &Pod, frontend: SocketAddr) -> Result<String> {
    let mut names = BTreeSet::new();
    for _ in 0..SPREAD {
        names.extend(http_names(client, frontend, 1)?);
    }
    Ok(joined(&names))
}

fn keep_alive(client: &Pod, frontend: SocketAddr) -> Result<String> {
    let answers = http_names(client, frontend, 3)?;
    let replicas: BTreeSet<&String> = answers.iter().collect();
    Ok(format!("{} replica, {} answers", replicas.len(), answers.len()))
}

/// The names in the answers to requests on one connection.
pub(super) fn http_names(client: &Pod, frontend: SocketAddr, requests: u32) -> Result<Vec<String>> {
    let report = client.http(frontend, requests)?;
    ensure!(report.peer == frontend, "getpeername() says {}, not {frontend}", report.peer);
    let name = |body: &str| body.split(' ').next().map(str::to_owned);
    report
        .replies
        .iter()
        .map(|reply| {
            ensure!(reply.status == 200, "the answer has the status {}", reply.status);
            name(&reply.body).context("the answer is empty")
        })
        .collect()
}

fn udp_spread(client: &Pod, frontend: SocketAddr) -> Result<String> {
    let report = client.spread(Transport::Udp, frontend, SPREAD, AT_ONCE)?;
    ensure!(report.failures.is_empty(), "some of {SPREAD} exchanges failed: {:?}", report.failures);
    Ok(joined(&report.names.into_keys().collect()))
}

fn udp_source(client: &Pod, frontend: SocketAddr) -> Result<String> {
    let reply = client.udp_fan(&[frontend])?.pop().context("no answer was reported")??;
    Ok(reply.source.to_string())
}

fn medians(service: &ExampleService, frontend: SocketAddr, client: &Pod) -> Result<[String; 2]> {
    let groups = [vec![frontend], service.backends.iter().map(|backend| backend.address).collect()];
    let quantiles = client.latency(service.app.transport(), &groups, ROUNDS)?;
    let [through, direct] = quantiles.as_slice() else { anyhow::bail!("two paths were not measured") };
    Ok([through, direct].map(|of| format!("{:.1} µs", of.p50.as_secs_f64() * 1e6)))
}

fn joined(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(" ")
}
