//! The command line of the EdgeMesh node agent.

use std::{
    io::{self, Write},
    net::SocketAddr,
    ops::ControlFlow,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Parser, Subcommand};
use edgemesh_agent::{
    admin, allocator, app, cleanup,
    config::{self, Environment, Leniency, Loaded},
    dataplane::ebpf::{self, probe},
    dns,
    health::canary,
    net::client::Who,
    show::{self, Output},
    status, telemetry,
};
use tracing::warn;

const EXIT_CODES: &str = "\
Exit codes (sysexits.h):
  0   success
  1   an error with no code of its own
  64  wrong use of the command line
  68  trace: a connection would not get to a backend, but be refused, left alone or lost on its way through the tunnel
  69  the agent is not running, does not answer, or knows no such Service or client; or, for cleanup, is running
  71  this system lacks something: cgroup2, bpf(2), a bpffs, the control socket
  77  no permission: run as root, see the message for the capability
  78  the configuration, NODE_NAME, the kubeconfig or the manifest directory is wrong";

/// The EdgeMesh node agent: Kubernetes Services by eBPF, at the edge and in the cloud.
///
/// Without a command it runs as the agent of the node named by NODE_NAME until SIGTERM. RUST_LOG sets the log level
/// (default info).
#[derive(Debug, Parser)]
#[command(version, disable_version_flag = true, after_help = EXIT_CODES)]
struct Cli {
    /// The configuration file
    #[arg(long, global = true, value_name = "FILE", default_value = "/etc/edgemesh/config/edgemesh-agent.yaml")]
    config_file: PathBuf,
    /// Unknown keys in the configuration are warnings, not errors
    #[arg(long, global = true)]
    lenient: bool,
    /// How log lines look
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: telemetry::LogFormat,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check the configuration file and say what is wrong with it
    CheckConfig,
    /// Print a configuration: all keys with their defaults, the shortest useful one, or a JSON schema
    Config {
        #[arg(value_enum)]
        what: Print,
    },
    /// What the running agent serves, from where, and what is wrong
    Status(Ask),
    /// Every Service with its frontends and counters
    Services(Ask),
    /// The endpoints of one Service, and why each is used or not
    Backends {
        /// NAMESPACE/NAME
        service: edgemesh_agent::model::NamespacedName,
        #[command(flatten)]
        ask: Ask,
    },
    /// The nodes that the tunnel is connected with, and which way: LAN, direct, hole-punched or relayed
    Peers(Ask),
    /// What becomes of a connection to an address, and why: frontend, policy, endpoints, what the kernel holds, and what
    /// the nodes say of endpoints that only the tunnel reaches
    ///
    /// Their agents are asked for 3 s at most, and connect to the endpoint once. Exits with 0 if a connection would get to a
    /// backend, with 68 if it would be refused, left alone or lost.
    Trace {
        /// ADDRESS:PORT[/tcp|/udp], or NAMESPACE/NAME[:PORT][/tcp|/udp]
        #[arg(value_name = "ADDRESS:PORT")]
        target: status::Target,
        /// Who connects: a process id, a pod's IP, or a pod's name without its namespace
        #[arg(long, value_name = "POD")]
        from_pod: Option<Who>,
        #[command(flatten)]
        ask: Ask,
    },
    /// How a DNS name is answered to pods of this node, and why: zone or upstream, from the cache, by which endpoints
    Dns {
        /// The whole name, such as web.default.svc.cluster.local: no search path is followed
        #[arg(value_parser = dns_name)]
        name: String,
        /// The type of records, such as A, AAAA, SRV or PTR
        #[arg(value_name = "TYPE", default_value = "A", value_parser = dns_type)]
        qtype: String,
        /// As a client is answered that asks for DNSSEC's records (the DO bit)
        #[arg(long)]
        dnssec: bool,
        #[command(flatten)]
        ask: Ask,
    },
    /// Each connect() and datagram to a Service address as it happens: from where, to which backend, or refused
    ///
    /// Only while this runs do the eBPF programs report their calls. Ends after --for, or by Ctrl-C.
    Events {
        /// Only those of one Service, NAMESPACE/NAME
        #[arg(long, value_name = "SERVICE")]
        service: Option<edgemesh_agent::model::NamespacedName>,
        /// Only those of one client: a process id, a pod's IP, or a pod's name without its namespace
        #[arg(long, value_name = "POD")]
        from_pod: Option<Who>,
        /// How long, such as 30s, 5m or 1h; at most 24h
        #[arg(long = "for", value_name = "DURATION", default_value = "60s", value_parser = duration)]
        last: Duration,
        #[command(flatten)]
        ask: Ask,
    },
    /// What this kernel offers to the eBPF data plane, tried out without an agent; 0 if it is enough
    Probe {
        /// The form of the answer
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// What the agent runs in a cgroup of its own to prove that translation works
    #[command(hide = true)]
    Canary {
        #[arg(long)]
        cgroup: PathBuf,
        #[arg(long)]
        frontend: SocketAddr,
        #[arg(long, value_parser = canary::parse_nonce)]
        nonce: canary::Nonce,
    },
    /// Remove what the agent made on this node: eBPF links and maps, the device, the control socket
    Cleanup {
        /// Even while an agent is running
        #[arg(long)]
        force: bool,
        /// The metadata snapshot, too, without which the next start needs its API server
        #[arg(long)]
        snapshot: bool,
    },
    /// The version, and whether this build has its eBPF programs
    Version,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Print {
    Default,
    Min,
    Schema,
}

#[derive(Debug, clap::Args)]
struct Ask {
    /// The running agent's control socket
    #[arg(long, value_name = "PATH", default_value = "/run/edgemesh/agent.sock")]
    socket: PathBuf,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

/// An error on its way to the terminal, with the code to exit with.
struct Failure {
    code: u8,
    message: String,
}

const USAGE: u8 = 64;
const NO_BACKEND: u8 = 68;
const UNAVAILABLE: u8 = 69;
const OS: u8 = 71;
const NO_PERMISSION: u8 = 77;
const CONFIG: u8 = 78;

fn main() -> ExitCode {
    allocator::share_heaps();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { USAGE } else { 0 };
            // Nothing can be done about a closed terminal.
            let _ = error.print();
            return code.into();
        }
    };
    match dispatch(&cli) {
        Ok(code) => code,
        Err(failure) => {
            let _ = writeln!(io::stderr(), "error: {}", failure.message);
            failure.code.into()
        }
    }
}

fn dispatch(cli: &Cli) -> Result<ExitCode, Failure> {
    match &cli.command {
        None => run(cli)?,
        Some(Command::CheckConfig) => {
            let loaded = load(cli)?;
            for note in &loaded.notes {
                print(&format!("note: {note}\n"));
            }
            print(&format!("{} is good\n", cli.config_file.display()));
        }
        Some(Command::Config { what }) => match what {
            Print::Default => print(&config::default_yaml()),
            Print::Min => print(&config::minimal_yaml()),
            Print::Schema => print(&format!("{:#}\n", config::schema())),
        },
        Some(Command::Status(ask)) => {
            let answer = fetch(ask, "/v1/status")?;
            print(&render(ask.output, &answer, || show::status(&answer))?);
        }
        Some(Command::Services(ask)) => {
            let answer = fetch(ask, "/v1/services")?;
            let rows: Vec<status::ServiceRow> = serde_json::from_value(answer.clone()).map_err(other_version)?;
            print(&render(ask.output, &answer, || show::services(&rows))?);
        }
        Some(Command::Peers(ask)) => {
            let answer = fetch(ask, "/v1/peers")?;
            let rows: Vec<status::PeerRow> = serde_json::from_value(answer.clone()).map_err(other_version)?;
            print(&render(ask.output, &answer, || show::peers(&rows))?);
        }
        Some(Command::Backends { service, ask }) => {
            let answer = fetch(ask, &format!("/v1/backends/{service}"))?;
            let report: status::BackendsReport = serde_json::from_value(answer.clone()).map_err(other_version)?;
            print(&render(ask.output, &answer, || show::backends(&report))?);
        }
        Some(Command::Trace { target, from_pod, ask }) => {
            let from = from_pod.as_ref().map_or_else(String::new, |who| format!("&from={who}"));
            let answer = fetch(ask, &format!("/v1/trace?to={target}{from}"))?;
            let report: status::TraceReport = serde_json::from_value(answer.clone()).map_err(other_version)?;
            print(&render(ask.output, &answer, || show::trace(&report))?);
            if !report.arrives() {
                return Ok(NO_BACKEND.into());
            }
        }
        Some(Command::Dns { name, qtype, dnssec, ask }) => {
            let answer = fetch(ask, &format!("/v1/dns?name={name}&type={qtype}&dnssec={dnssec}"))?;
            let report: dns::DnsReport = serde_json::from_value(answer.clone()).map_err(other_version)?;
            print(&render(ask.output, &answer, || show::dns(&report))?);
        }
        Some(Command::Events { service, from_pod, last, ask }) => {
            let service = service.as_ref().map_or_else(String::new, |service| format!("&service={service}"));
            let from = from_pod.as_ref().map_or_else(String::new, |who| format!("&from={who}"));
            follow(ask, &format!("/v1/events?for={}{service}{from}", last.as_secs()))?;
        }
        Some(Command::Probe { output }) => probe(cli, *output)?,
        Some(Command::Canary { cgroup, frontend, nonce }) => {
            let report = canary::child::run(cgroup, *frontend, *nonce);
            let report = serde_json::to_string(&report)
                .map_err(|error| Failure { code: 1, message: format!("cannot write the report: {error}") })?;
            print(&report);
        }
        Some(Command::Cleanup { force, snapshot }) => clean_up(cli, *force, *snapshot)?,
        Some(Command::Version) => {
            let programs = if ebpf::is_built_in() { "built in" } else { "not in this build (cargo xtask build-ebpf)" };
            print(&format!("edgemesh-agent {}\neBPF programs: {programs}\n", status::VERSION));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run(cli: &Cli) -> Result<(), Failure> {
    telemetry::init(cli.log_format).map_err(|error| Failure { code: CONFIG, message: format!("{error:#}") })?;
    let node = node_name(std::env::var("NODE_NAME").ok())?;
    let loaded = load(cli)?;
    for note in &loaded.notes {
        warn!("{note}");
    }
    // Two providers in one process would make rustls refuse to choose; an error means that one is chosen already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    block_on(async {
        let bound = app::build(loaded.config, &node).await.map_err(|failure| start_failure(&failure))?;
        bound.run().await.map_err(|error| Failure { code: 1, message: format!("cannot wait for signals: {error}") })
    })?
}

fn start_failure(error: &app::StartError) -> Failure {
    let code = match error {
        app::StartError::Source(_) => CONFIG,
        app::StartError::Dataplane(error) if error.is_permission() => NO_PERMISSION,
        app::StartError::ControlSocket { error, .. } if error.kind() == io::ErrorKind::PermissionDenied => {
            NO_PERMISSION
        }
        app::StartError::Dataplane(_)
        | app::StartError::ControlSocket { .. }
        | app::StartError::Thread(_)
        | app::StartError::Dns(_) => OS,
    };
    Failure { code, message: error.to_string() }
}

fn node_name(value: Option<String>) -> Result<String, Failure> {
    value.filter(|name| !name.is_empty()).ok_or_else(|| Failure {
        code: CONFIG,
        message: "the environment variable NODE_NAME is not set; set it to this node's name (in a DaemonSet from the \
                  field spec.nodeName)"
            .to_owned(),
    })
}

fn load(cli: &Cli) -> Result<Loaded, Failure> {
    let leniency = if cli.lenient { Leniency::Lenient } else { Leniency::Strict };
    config::load(&cli.config_file, leniency, &Environment::of(|name| std::env::var_os(name)))
        .map_err(|error| Failure { code: CONFIG, message: error.to_string() })
}

/// Before an installation there is no configuration yet; then the defaults are tried.
fn probe(cli: &Cli, output: Output) -> Result<(), Failure> {
    let cgroup_root = if cli.config_file.exists() { load(cli)?.config.proxy.ebpf.cgroup_root } else { None };
    let report = probe::run(cgroup_root.as_deref());
    let answer = report.answer();
    let json = serde_json::to_value(&answer)
        .map_err(|error| Failure { code: 1, message: format!("cannot print the answer: {error}") })?;
    print(&render(output, &json, || show::probe(&answer))?);
    match answer.standing.tier {
        probe::Tier::Full | probe::Tier::Reduced => Ok(()),
        probe::Tier::None => {
            let missing: Vec<&str> = answer.standing.losses.iter().map(|loss| loss.feature.as_str()).collect();
            let code = if report.lacks_permission() { NO_PERMISSION } else { OS };
            let message = format!("the eBPF data plane cannot run here; missing: {}", missing.join(", "));
            Err(Failure { code, message })
        }
    }
}

fn clean_up(cli: &Cli, force: bool, snapshot: bool) -> Result<(), Failure> {
    let config = load(cli)?.config;
    let socket = &config.common.control_socket;
    if !force && cleanup::is_running(socket) {
        let message = format!(
            "an agent is running (it answers on {}); stop it first, or use --force to cut Services off under it",
            socket.display()
        );
        return Err(Failure { code: UNAVAILABLE, message });
    }
    let (removed, result) = block_on(cleanup::cleanup(&config, snapshot))?;
    for name in &removed {
        print(&format!("removed {name}\n"));
    }
    if removed.is_empty() && result.is_ok() {
        print("nothing to remove\n");
    }
    result.map_err(|error| Failure {
        code: if error.permission { NO_PERMISSION } else { OS },
        message: error.to_string(),
    })
}

fn fetch(ask: &Ask, path: &str) -> Result<serde_json::Value, Failure> {
    let body = block_on(admin::get(&ask.socket, path))?.map_err(|error| client_failure(&error))?;
    serde_json::from_slice(&body).map_err(other_version)
}

/// Prints the lines of a stream as they come, until it ends or the user has enough.
fn follow(ask: &Ask, path: &str) -> Result<(), Failure> {
    if ask.output == Output::Table {
        print(show::EVENTS_HEAD);
    }
    let mut failure = None;
    let mut take = |line: &[u8]| {
        let text = serde_json::from_slice::<serde_json::Value>(line).map_err(other_version).and_then(|value| {
            Ok(match ask.output {
                Output::Table => show::event(&serde_json::from_value(value).map_err(other_version)?),
                Output::Json => format!("{value}\n"),
                Output::Yaml => format!("---\n{}", render(ask.output, &value, String::new)?),
            })
        });
        match text {
            Ok(text) if io::stdout().lock().write_all(text.as_bytes()).is_ok() => ControlFlow::Continue(()),
            // The reader went away (`| head`).
            Ok(_) => ControlFlow::Break(()),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        }
    };
    let streamed = block_on(async {
        tokio::select! {
            streamed = admin::stream(&ask.socket, path, &mut take) => streamed,
            _ = tokio::signal::ctrl_c() => Ok(()),
        }
    })?;
    streamed.map_err(|error| client_failure(&error))?;
    failure.map_or(Ok(()), Err)
}

/// A name of the characters that occur in names of hosts and Services.
fn dns_name(text: &str) -> Result<String, String> {
    let usual = |c: char| c.is_ascii_alphanumeric() || "-_.*".contains(c);
    if !text.chars().all(usual) {
        return Err("a name is made of letters, digits and - _ . *".to_owned());
    }
    text.parse::<dns::wire::Name>().map(|_| text.to_owned()).map_err(|error| error.to_string())
}

fn dns_type(text: &str) -> Result<String, String> {
    let number = dns::wire::rtype::parse(text).ok_or("expected a type such as A, AAAA, SRV, PTR, TXT or TYPE65")?;
    Ok(dns::wire::rtype::name(number))
}

/// `90`, `90s`, `5m`, `1h`.
fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix(['s', 'm', 'h']) {
        Some(number) if text.ends_with('m') => (number, 60),
        Some(number) if text.ends_with('h') => (number, 3600),
        Some(number) => (number, 1),
        None => (text, 1),
    };
    let seconds = number.parse().ok().and_then(|number: u64| number.checked_mul(unit));
    let duration = seconds
        .map(Duration::from_secs)
        .filter(|duration| (1..=admin::LONGEST.as_secs()).contains(&duration.as_secs()));
    duration.ok_or_else(|| "not a duration from 1s to 24h, such as 30s, 5m or 1h".to_owned())
}

fn client_failure(error: &admin::ClientError) -> Failure {
    let code = match error {
        admin::ClientError::Question(_) => USAGE,
        admin::ClientError::Unreachable { .. }
        | admin::ClientError::Silent { .. }
        | admin::ClientError::Broken { .. }
        | admin::ClientError::Refused(_) => UNAVAILABLE,
    };
    Failure { code, message: error.to_string() }
}

fn other_version(error: serde_json::Error) -> Failure {
    let message = format!("cannot understand the agent's answer: {error}; is it of another version than this command?");
    Failure { code: UNAVAILABLE, message }
}

fn render(output: Output, answer: &serde_json::Value, table: impl FnOnce() -> String) -> Result<String, Failure> {
    let failure = |error: String| Failure { code: 1, message: format!("cannot print the answer: {error}") };
    match output {
        Output::Table => Ok(table()),
        Output::Json => Ok(format!("{answer:#}\n")),
        Output::Yaml => serde_yaml::to_string(answer).map_err(|error| failure(error.to_string())),
    }
}

/// One thread carries all of the agent's waiting; what blocks has threads of its own.
fn block_on<T>(future: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime =
        runtime.map_err(|error| Failure { code: OS, message: format!("cannot start the runtime: {error}") })?;
    let value = runtime.block_on(future);
    // A blocking call that hangs must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(value)
}

/// Writes to standard output; a reader that went away (`| head`) is no error.
fn print(text: &str) {
    let _ = io::stdout().lock().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, seconds) in [("1", 1), ("90s", 90), ("5m", 300), ("24h", 86_400)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for wrong in ["", "s", "0", "-1", "1d", "25h", "1.5m", "18446744073709551615h"] {
            duration(wrong).unwrap_err();
        }
    }

    #[test]
    fn a_missing_or_empty_node_name_is_a_configuration_error() {
        for value in [None, Some(String::new())] {
            let Err(failure) = node_name(value) else { panic!("accepted") };
            assert_eq!(failure.code, CONFIG);
            assert!(failure.message.contains("NODE_NAME"));
        }
        assert!(node_name(Some("edge1".to_owned())).is_ok());
    }
}
