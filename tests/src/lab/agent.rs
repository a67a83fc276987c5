//! The agent under test: the real binary, inside a node.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::place::{self, Capability};
use super::{DEADLINE, Node, Pod, SharedChild, binary, eventually, locked, remains};

/// Where an agent of the lab serves its admin HTTP, inside its node.
pub const ADMIN: &str = "127.0.0.1:20008";
/// Where an agent of the lab has its control socket, inside its node.
pub const CONTROL_SOCKET: &str = "/run/edgemesh/agent.sock";
/// Where an agent of the lab pins its programs and maps, inside its node.
pub const PIN_DIRECTORY: &str = "/sys/fs/bpf/edgemesh";
/// How long a stopping agent may drain.
const DRAIN: Duration = Duration::from_secs(15);
/// How much of a log an error shows.
const TAIL: usize = 2000;

/// How an agent differs from the lab's usual one.
#[derive(Debug, Clone, Default)]
pub struct AgentOptions {
    changes: Vec<(String, Value)>,
    variables: Vec<(String, String)>,
    only: Option<Vec<String>>,
}

impl AgentOptions {
    /// Sets a key of the configuration file, such as `modules.edgeProxy.enable`; null removes it.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.changes.push((key.to_owned(), value.into()));
        self
    }

    /// Sets an environment variable, such as those that edged gives to pods.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets `RUST_LOG`; `info` unless set.
    #[must_use]
    pub fn log(mut self, filter: &str) -> Self {
        self.variables.push(("RUST_LOG".to_owned(), filter.to_owned()));
        self
    }

    /// Gives it these capabilities and no others, named as in a pod's `securityContext`, such as `NET_ADMIN`.
    #[must_use]
    pub fn only(mut self, capabilities: &[String]) -> Self {
        self.only = Some(capabilities.to_vec());
        self
    }
}

/// A started agent. Dropping this leaves it running until the lab ends.
#[derive(Debug)]
pub struct Agent {
    node: String,
    host: Pod,
    process: SharedChild,
    pid: u32,
    log: PathBuf,
}

/// A program of the machine, such as sshd, that runs on a node until it is stopped or the lab ends.
#[derive(Debug)]
pub struct Program {
    name: String,
    process: SharedChild,
    log: PathBuf,
}

impl Program {
    /// Kills it (SIGKILL) and waits until it is gone.
    pub fn stop(&self) -> Result<()> {
        let mut process = locked(&self.process);
        process.kill().and_then(|()| process.wait()).with_context(|| format!("could not kill {}", self.name))?;
        Ok(())
    }

    /// What it has printed so far.
    pub fn log(&self) -> Result<String> {
        let bytes = std::fs::read(&self.log).with_context(|| format!("could not read {}", self.log.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// A run of the agent binary inside a node, with any arguments.
#[derive(Debug)]
#[must_use = "nothing runs before output() or start()"]
pub struct AgentCommand<'a> {
    node: &'a Node,
    arguments: Vec<String>,
    variables: Vec<(String, String)>,
    without: Vec<Capability>,
    hidden: Vec<PathBuf>,
}

impl Node {
    /// Starts an agent that reads the lab's manifests; does not wait until it is ready.
    pub fn start_agent(&self, options: &AgentOptions) -> Result<Agent> {
        let mut config = self.agent_config();
        for (key, value) in &options.changes {
            set(&mut config, key, value.clone())
                .with_context(|| format!("could not set {key} in the configuration"))?;
        }
        let text = serde_yaml::to_string(&config).context("could not write a configuration as YAML")?;
        let path = self.write_file("agent.yaml", &text)?;
        let mut command = self.agent(&["--config-file", &path.to_string_lossy()]);
        for (name, value) in &options.variables {
            command = command.env(name, value);
        }
        if let Some(names) = &options.only {
            command = command.without(&Capability::all_but(names)?);
        }
        command.start()
    }

    /// Prepares a run of the agent binary with any arguments, with `NODE_NAME` set to the node's name.
    pub fn agent<'a>(&'a self, arguments: &[&str]) -> AgentCommand<'a> {
        AgentCommand {
            node: self,
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            variables: vec![
                ("NODE_NAME".to_owned(), self.name().to_owned()),
                ("RUST_LOG".to_owned(), "info".to_owned()),
                ("RUST_BACKTRACE".to_owned(), "1".to_owned()),
            ],
            without: Vec::new(),
            hidden: Vec::new(),
        }
    }

    /// Starts a program of the machine on this node: in its network, its cgroup and its mounts.
    pub fn start_program(&self, program: &str, arguments: &[&str]) -> Result<Program> {
        let name = Path::new(program).file_name().map_or_else(|| program.into(), |name| name.to_string_lossy());
        let name = format!("{name} on {}", self.name());
        let (log, file) = self.lab().log_file(&format!("{}.log", name.replace(' ', "-")))?;
        let copy = file.try_clone().context("could not duplicate a log's descriptor")?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(file).stderr(copy);
        place::enter(&mut command, &self.place())?;
        let child = command.spawn().with_context(|| format!("could not start {name}"))?;
        Ok(Program { name, process: self.lab().adopt(child), log })
    }

    /// Runs a subcommand of the agent binary that talks to the running agent, such as `["status", "-o", "json"]`.
    pub fn cli(&self, arguments: &[&str]) -> Result<Output> {
        let mut all = arguments.to_vec();
        all.extend(["--socket", CONTROL_SOCKET]);
        self.agent(&all).output(2 * DEADLINE)
    }

    /// Removes what an agent has left on this node, after it has ended.
    pub fn cleanup(&self) -> Result<()> {
        let config = self.write_file("cleanup.yaml", &self.agent_config().to_string())?;
        let output = self.agent(&["cleanup", "--config-file", &config.to_string_lossy()]).output(2 * DEADLINE)?;
        ensure!(output.status.success(), "cleanup: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    /// The configuration of the lab's usual agent on this node.
    pub fn agent_config(&self) -> Value {
        json!({
            "apiVersion": "agent.edgemesh.config.kubeedge.io/v1alpha1",
            "kind": "EdgeMeshAgent",
            "kubeAPIConfig": { "staticDirectory": self.lab().directory.join("manifests") },
            "commonConfig": {
                "bridgeDeviceName": "edgemesh0",
                "bridgeDeviceIP": "169.254.96.16",
                "adminAddress": ADMIN,
                "controlSocket": CONTROL_SOCKET,
                // Nodes of a lab see the machine's /var.
                "metadataSnapshot": self.snapshot_path(),
                "aliasFile": self.snapshot_path().with_file_name("aliases"),
            },
            "modules": {
                // Its upstreams would be the machine's.
                "edgeDNS": { "enable": false },
                "edgeProxy": {
                    "enable": true,
                    "dataplane": "ebpf",
                    "ebpf": { "cgroupRoot": self.cgroup(), "pinDirectory": PIN_DIRECTORY },
                },
            },
        })
    }

    /// Where an agent of this node keeps what its API server delivered.
    pub fn snapshot_path(&self) -> PathBuf {
        self.lab().directory.join(self.name()).join("state/metadata.snapshot")
    }

    /// Writes a file into a directory of this node in the lab's directory; returns its path.
    pub fn write_file(&self, name: &str, text: &str) -> Result<PathBuf> {
        let directory = self.lab().directory.join(self.name());
        let path = directory.join(name);
        std::fs::create_dir_all(&directory)
            .and_then(|()| std::fs::write(&path, text))
            .with_context(|| format!("could not write {}", path.display()))?;
        Ok(path)
    }
}

impl AgentCommand<'_> {
    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self = self.env_remove(name);
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Leaves out an environment variable, such as `NODE_NAME`.
    pub fn env_remove(mut self, name: &str) -> Self {
        self.variables.retain(|(other, _)| other != name);
        self
    }

    /// Runs it without capabilities.
    pub fn without(mut self, capabilities: &[Capability]) -> Self {
        self.without.extend(capabilities);
        self
    }

    /// Runs it where cgroup2 is not mounted.
    pub fn without_cgroup2(mut self) -> Result<Self> {
        self.hidden.push(remains::cgroup2_mount()?);
        Ok(self)
    }

    /// Runs it where no bpffs is mounted on `/sys/fs/bpf`.
    pub fn without_bpffs(mut self) -> Self {
        self.hidden.push(PathBuf::from("/sys/fs/bpf"));
        self
    }

    /// Runs it where `/proc` is not mounted, so that it finds no mount of anything.
    pub fn without_proc(mut self) -> Self {
        self.hidden.push(PathBuf::from("/proc"));
        self
    }

    /// Runs it to its end, at most for `deadline`, and collects its status and what it printed.
    pub fn output(self, deadline: Duration) -> Result<Output> {
        let mut command = self.prepare()?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let what = || format!("could not run edgemesh-agent {} on {}", self.arguments.join(" "), self.node.name());
        place::output(child.with_context(what)?, deadline).with_context(what)
    }

    /// Starts it as an agent whose output goes to a log.
    pub fn start(self) -> Result<Agent> {
        static STARTS: AtomicU32 = AtomicU32::new(0);
        let node = self.node.name();
        let number = STARTS.fetch_add(1, Ordering::Relaxed);
        let (log, file) = self.node.lab().log_file(&format!("{node}.agent-{number}.log"))?;
        let copy = file.try_clone().context("could not duplicate a log's descriptor")?;
        let child = self
            .prepare()?
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(copy)
            .spawn()
            .with_context(|| format!("could not start the agent of {node}"))?;
        let pid = child.id();
        let process = self.node.lab().adopt(child);
        Ok(Agent { node: node.to_owned(), host: self.node.host().clone(), process, pid, log })
    }

    fn prepare(&self) -> Result<Command> {
        let mut command = Command::new(agent_binary()?);
        command.args(&self.arguments).env_clear().envs(self.variables.iter().map(|(name, value)| (name, value)));
        if let Some(path) = std::env::var_os("PATH") {
            command.env("PATH", path);
        }
        let hidden: Vec<&Path> = self.hidden.iter().map(PathBuf::as_path).collect();
        let place = place::Place { without: &self.without, hidden: &hidden, ..self.node.place() };
        place::enter(&mut command, &place)?;
        Ok(command)
    }
}

impl Agent {
    /// Waits until `/readyz` says that the agent serves.
    pub fn wait_ready(&self, deadline: Duration) -> Result<()> {
        let admin = ADMIN.parse().context("the admin address is none")?;
        let host = self.host.within(Duration::from_secs(1));
        let ready = eventually(deadline, &format!("the agent of {} to become ready", self.node), || {
            // No reason to wait any longer; told below.
            if self.ended()?.is_some() {
                return Ok(true);
            }
            let report = host.http_get(admin, "/readyz", 1)?;
            let reply = report.replies.first().context("/readyz did not answer")?;
            ensure!(reply.status == 200, "/readyz says {}: {}", reply.status, reply.body.trim());
            Ok(true)
        });
        match self.ended()? {
            Some(status) => {
                bail!("the agent of {} ended with {status}; its log ends with:\n{}", self.node, self.tail())
            }
            None => ready.with_context(|| format!("the agent's log ends with:\n{}", self.tail())),
        }
    }

    /// What it answers on `/metrics`.
    pub fn metrics(&self) -> Result<String> {
        let admin = ADMIN.parse().context("the admin address is none")?;
        let report = self.host.http_get(admin, "/metrics", 1)?;
        let reply = report.replies.into_iter().next().context("/metrics did not answer")?;
        ensure!(reply.status == 200, "/metrics says {}: {}", reply.status, reply.body.trim());
        Ok(reply.body)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Result<Option<ExitStatus>> {
        place::wait(&mut locked(&self.process), Duration::ZERO)
    }

    /// Kills it (SIGKILL) and waits until it is gone.
    pub fn kill(&self) -> Result<()> {
        let mut process = locked(&self.process);
        process
            .kill()
            .and_then(|()| process.wait())
            .with_context(|| format!("could not kill the agent of {}", self.node))?;
        Ok(())
    }

    /// Asks it to end (SIGTERM) and waits for that; returns how it ended.
    pub fn stop(&self) -> Result<ExitStatus> {
        let mut process = locked(&self.process);
        // Only signalled while the lock keeps others from reaping it, so the id cannot be another process's by now.
        if let Some(status) = place::wait(&mut process, Duration::ZERO)? {
            return Ok(status);
        }
        let pid = Pid::from_raw(i32::try_from(self.pid).context("a process id is out of range")?);
        kill(pid, Signal::SIGTERM).with_context(|| format!("could not signal the agent of {}", self.node))?;
        place::wait(&mut process, DRAIN)?
            .ok_or_else(|| anyhow!("the agent of {} did not end within {DRAIN:?} after SIGTERM", self.node))
    }

    /// Stops it in its tracks (SIGSTOP): its sockets stay open, and nobody answers on them.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets it go on after [`Agent::freeze`] (SIGCONT).
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        // As in `stop`.
        let mut process = locked(&self.process);
        let ended = place::wait(&mut process, Duration::ZERO)?;
        ensure!(ended.is_none(), "the agent of {} has ended", self.node);
        let pid = Pid::from_raw(i32::try_from(self.pid).context("a process id is out of range")?);
        kill(pid, signal).with_context(|| format!("could not signal the agent of {}", self.node))
    }

    /// What it has logged and printed so far.
    pub fn log(&self) -> Result<String> {
        let bytes = std::fs::read(&self.log).with_context(|| format!("could not read {}", self.log.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Its resident memory in bytes (VmRSS of proc_pid_status(5)).
    pub fn resident_bytes(&self) -> Result<u64> {
        self.memory("VmRSS:")
    }

    /// The most it has had resident so far, in bytes (VmHWM of proc_pid_status(5)).
    pub fn peak_bytes(&self) -> Result<u64> {
        self.memory("VmHWM:")
    }

    fn memory(&self, field: &str) -> Result<u64> {
        let path = format!("/proc/{}/status", self.pid);
        let status = std::fs::read_to_string(&path).with_context(|| format!("could not read {path}"))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        Ok(kib.with_context(|| format!("{path} has no {field}"))? * 1024)
    }

    fn tail(&self) -> String {
        let log = self.log().unwrap_or_else(|error| format!("{error:#}"));
        let mut start = log.len().saturating_sub(TAIL);
        while !log.is_char_boundary(start) {
            start += 1;
        }
        log.get(start..).unwrap_or_default().to_owned()
    }
}

/// The agent binary that is tested: named by `EDGEMESH_AGENT`, else the one beside this program or a directory up.
pub fn agent_binary() -> Result<PathBuf> {
    binary("EDGEMESH_AGENT", "edgemesh-agent")
}

/// Sets the value at a dotted path, making the objects on the way.
fn set(config: &mut Value, key: &str, value: Value) -> Result<()> {
    let (path, last) = key.rsplit_once('.').map_or((None, key), |(path, last)| (Some(path), last));
    let mut at = config;
    for part in path.into_iter().flat_map(|path| path.split('.')) {
        at = object(at, part)?.entry(part).or_insert_with(|| json!({}));
    }
    let parent = object(at, last)?;
    if value.is_null() {
        parent.remove(last);
    } else {
        parent.insert(last.to_owned(), value);
    }
    Ok(())
}

fn object<'a>(value: &'a mut Value, key: &str) -> Result<&'a mut serde_json::Map<String, Value>> {
    value.as_object_mut().with_context(|| format!("what holds {key} is no object"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_the_configuration_are_set_made_and_removed_by_their_path() {
        let mut config = json!({"a": {"b": 1, "c": 2}, "kind": "x"});
        set(&mut config, "a.b", json!(3)).unwrap();
        set(&mut config, "a.c", Value::Null).unwrap();
        set(&mut config, "new.deep.key", json!(true)).unwrap();
        set(&mut config, "top", json!("t")).unwrap();
        assert_eq!(config, json!({"a": {"b": 3}, "kind": "x", "new": {"deep": {"key": true}}, "top": "t"}));
        set(&mut config, "kind.x", json!(1)).unwrap_err();
    }
}
