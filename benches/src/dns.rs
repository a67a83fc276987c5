//! The cluster's names, asked for by dnsperf from a pod.

mod floor;

use std::{collections::BTreeMap, net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use edgemesh_tests::lab::{Lab, Pod, agent::AgentOptions, eventually};
use serde_json::json;

use self::floor::Floor;
use crate::{
    Effort,
    generated::{self, Generated},
    report::{Table, say, whole},
    scene::READY,
    spread::Spread,
};

const CLUSTER: Generated = Generated { services: 10_000, endpoints: 3 };
/// Where the agent answers.
const SERVER: &str = "169.254.96.16";
const PORT: &str = "53";
/// Where a thread that knows nothing answers.
const FLOOR_PORT: &str = "5353";
/// The aims: queries a second, and milliseconds for 99 of 100 answers at a rate of so many.
const MOST: f64 = 100_000.0;
const RATE: u32 = 30_000;
const LATENCY: f64 = 5.0;
/// No client is held back; the limit is judged for each query all the same.
const NO_LIMIT: u32 = 1_000_000_000;

/// One run of dnsperf.
struct Run {
    /// Answered queries a second.
    rate: f64,
    lost: u64,
    codes: String,
}

/// Measures how many queries are answered, and how soon at a rate that leaves room; without dnsperf nothing.
pub(crate) fn measure(effort: Effort) -> Result<Vec<Table>> {
    if Command::new("dnsperf").arg("-h").output().is_err() {
        say("no figure of DNS: dnsperf is not installed");
        return Ok(Vec::new());
    }
    let (repetitions, seconds) = effort.pick((1, 2), (5, 10));
    let lab = Lab::new()?;
    let node = lab.site("lan", &["192.168.10.0/24"])?.node("edge1", &["10.244.1.0/24"])?;
    let client = node.pod("client")?;
    CLUSTER.write(&lab.manifests(), &[])?;
    let settings = json!({ "enable": true, "resolvConf": "/dev/null", "maxClientQueries": NO_LIMIT });
    let agent = node.start_agent(&AgentOptions::default().set("modules.edgeDNS", settings))?;
    agent.wait_ready(READY)?;
    let hits = node.write_file("hits", &questions(|name| format!("{name}.default.svc.cluster.local A\n")))?;
    let misses =
        node.write_file("misses", &questions(|name| format!("{name}.example.org.default.svc.cluster.local A\n")))?;
    let (hits, misses) = (hits.display().to_string(), misses.display().to_string());
    eventually(READY, "names to be answered", || Ok(ask(&client, &hits, &["-n", "1", "-Q", "5000"])?.lost == 0))?;

    let reflector = Floor::start(node.bind(format!("{SERVER}:{FLOOR_PORT}").parse::<SocketAddr>()?)?)?;
    let most = [
        ("A of a Service, UDP", &hits, "udp", PORT),
        ("nothing but the query sent back, UDP", &hits, "udp", FLOOR_PORT),
        ("a name that is none, UDP", &misses, "udp", PORT),
        ("A of a Service, TCP", &hits, "tcp", PORT),
    ];
    let mut runs = most.map(|_| (Vec::new(), 0, String::new()));
    let length = seconds.to_string();
    // In turns, since the machine is not equally fast at all times.
    for _ in 0..repetitions {
        for ((_, file, transport, port), (rates, lost, codes)) in most.iter().zip(&mut runs) {
            let arguments = ["-p", port, "-m", transport, "-l", &length, "-c", "16", "-T", "2", "-q", "200"];
            let run = ask(&client, file, &arguments)?;
            rates.push(run.rate);
            *lost += run.lost;
            *codes = run.codes;
        }
    }
    drop(reflector);
    let (mut rows, mut medians) = (Vec::new(), Vec::new());
    for ((what, ..), (rates, lost, codes)) in most.iter().zip(runs) {
        let rate = Spread::of(rates)?;
        say(&format!("{what}: {} ({codes})", per_second(rate.median)));
        rows.push(vec![(*what).to_owned(), per_second(rate.median), whole(&rate, per_second), lost.to_string()]);
        medians.push(rate.median);
    }
    let mut findings = Vec::new();
    if let [hits, floor, ..] = *medians {
        let met = if hits >= MOST { "met" } else { "**missed**" };
        findings.push(format!("most queries: {}; aim at least {}: {met}", per_second(hits), per_second(MOST)));
        findings.push(format!("of what the kernel and dnsperf leave to any server: {:.0}%", hits / floor * 100.0));
    }
    let most = Table {
        title: "DNS: most queries",
        method: format!(
            "{} Services; two dnsperf threads in a pod ask for all of their names in turn, from 16 sockets (or on 16 \
             connections) with 200 queries under way, as fast as answers come; on the same CPUs as the agent, \
             which puts no limit on a client here. The second row is a thread that takes and sends datagrams as the agent does \
             and looks at none: what the kernel and dnsperf cost. {repetitions} runs of {seconds} s, in turns.",
            CLUSTER.services
        ),
        head: vec!["queries", "answers a second, median", "all runs", "lost"],
        rows,
        findings,
    };
    Ok(vec![most, latencies(&client, &hits, repetitions, seconds)?])
}

/// How soon answers come at a fixed rate.
fn latencies(client: &Pod, file: &str, repetitions: u32, seconds: u32) -> Result<Table> {
    let (rate, length) = (RATE.to_string(), seconds.to_string());
    let (mut middle, mut late, mut last, mut lost) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for _ in 0..repetitions {
        let output = dnsperf(client, file, &["-l", &length, "-c", "16", "-T", "1", "-Q", &rate, "-v"])?;
        let latencies = Spread::of(times(&output))?;
        middle.push(latencies.median);
        last.push(latencies.max);
        late.push(percentile(&output)?);
        lost += parse(&output)?.lost;
    }
    let (middle, late, last) = (Spread::of(middle)?, Spread::of(late)?, Spread::of(last)?);
    say(&format!("at {RATE} queries/s: 99% within {}", milliseconds(late.median)));
    let met = if late.median <= LATENCY { "met" } else { "**missed**" };
    Ok(Table {
        title: "DNS: how soon",
        method: format!(
            "The same by UDP at {RATE} queries a second, as dnsperf measures each ({repetitions} runs of {seconds} s); {lost} \
             queries were lost."
        ),
        head: vec!["of a run's answers", "median of the runs", "all runs"],
        rows: vec![
            vec!["half within".to_owned(), milliseconds(middle.median), whole(&middle, milliseconds)],
            vec!["99% within".to_owned(), milliseconds(late.median), whole(&late, milliseconds)],
            vec!["all within".to_owned(), milliseconds(last.median), whole(&last, milliseconds)],
        ],
        findings: vec![format!(
            "99% at {RATE} queries/s: {}; aim at most {}: {met}",
            milliseconds(late.median),
            milliseconds(LATENCY)
        )],
    })
}

/// All names, in an order without neighbours, so that no cache of the CPU is of more use than in a cluster.
fn questions(question: impl Fn(&str) -> String) -> String {
    let numbers = (0..CLUSTER.services).map(|number| number * 7919 % CLUSTER.services);
    numbers.map(|number| question(&generated::name(number))).collect()
}

fn ask(client: &Pod, file: &str, arguments: &[&str]) -> Result<Run> {
    parse(&dnsperf(client, file, arguments)?)
}

fn dnsperf(client: &Pod, file: &str, arguments: &[&str]) -> Result<String> {
    let all = [&["-s", SERVER, "-d", file, "-t", "2"], arguments].concat();
    let output = client.within(Duration::from_secs(60)).run("dnsperf", &all)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "dnsperf: {}{said}", String::from_utf8_lossy(&output.stderr));
    Ok(said)
}

fn parse(output: &str) -> Result<Run> {
    let fields: BTreeMap<&str, &str> =
        output.lines().filter(|line| line.starts_with("  ")).filter_map(|line| line.trim().split_once(':')).collect();
    let field = |name: &str| -> Result<&str> {
        Ok(fields.get(name).with_context(|| format!("dnsperf did not say '{name}':\n{output}"))?.trim())
    };
    let first = |text: &str| text.split(' ').next().unwrap_or_default().to_owned();
    Ok(Run {
        rate: field("Queries per second")?.parse()?,
        lost: first(field("Queries lost")?).parse()?,
        codes: field("Response codes")?.to_owned(),
    })
}

/// The milliseconds that each answer took, of the lines `> NOERROR NAME A 0.000123`.
fn times(output: &str) -> impl Iterator<Item = f64> {
    let answers = output.lines().filter(|line| line.starts_with("> "));
    answers.filter_map(|line| Some(line.rsplit(' ').next()?.parse::<f64>().ok()? * 1000.0))
}

fn percentile(output: &str) -> Result<f64> {
    let mut times: Vec<f64> = times(output).collect();
    times.sort_unstable_by(f64::total_cmp);
    let place = times.len().saturating_mul(99) / 100;
    times.get(place).copied().context("dnsperf told no answer")
}

fn per_second(rate: f64) -> String {
    format!("{rate:.0}/s")
}

fn milliseconds(value: f64) -> String {
    format!("{value:.2} ms")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "DNS Performance Testing Tool\n> NOERROR a.default.svc.cluster.local A 0.000100\n\
        > NOERROR b.default.svc.cluster.local A 0.000300\n[Status] Testing complete\nStatistics:\n\n  \
        Queries sent:         200\n  Queries completed:    198 (99.00%)\n  Queries lost:         2 (1.00%)\n\n  \
        Response codes:       NOERROR 198 (100.00%)\n  Run time (s):         0.1\n  Queries per second:   1980.5\n";

    #[test]
    fn reads_what_dnsperf_says() {
        let run = parse(SAID).unwrap();
        assert_eq!((run.rate, run.lost, run.codes.as_str()), (1980.5, 2, "NOERROR 198 (100.00%)"));
        let times: Vec<f64> = times(SAID).collect();
        assert_eq!(times.len(), 2);
        assert!((percentile(SAID).unwrap() - 0.3).abs() < 1e-9);
        assert!(parse("nothing").is_err());
    }

    #[test]
    fn every_name_is_asked_for_once() {
        let all: std::collections::BTreeSet<String> =
            questions(|name| format!("{name}\n")).lines().map(str::to_owned).collect();
        assert_eq!(all.len(), usize::try_from(CLUSTER.services).unwrap());
    }
}
