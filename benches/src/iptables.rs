//! The rules kube-proxy would write, in a pod's own network namespace.
//!
//! They follow the chains and matches of kube-proxy's iptables mode (pkg/proxy/iptables/proxier.go of Kubernetes), as a
//! process on the node meets them: OUTPUT, KUBE-SERVICES, one rule per Service in it, KUBE-SVC-*, KUBE-SEP-*, DNAT.

use std::{
    fmt::Write as _,
    fs::File,
    net::{IpAddr, SocketAddr},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use edgemesh_tests::lab::{Lab, Pod};

use crate::{
    generated::{self, PORT, TARGET_PORT},
    scene::ENDPOINTS,
};

/// What loads rules, in the order they are tried: the nft variant takes minutes for 10,000 Services.
const RESTORE: [&str; 2] = ["iptables-legacy-restore", "iptables-restore"];
/// Seconds that loading the rules may take.
const LIMIT: &str = "90";

/// A pod whose own rules translate Services that the agent does not know.
#[derive(Debug)]
pub(crate) struct Rules {
    /// The Service whose rule is in the middle of the list, and the one whose rule is the last.
    pub(crate) middle: SocketAddr,
    pub(crate) last: SocketAddr,
    /// What loaded the rules.
    pub(crate) program: &'static str,
}

impl Rules {
    /// Loads rules for so many Services; two of them lead to `server`.
    ///
    /// # Errors
    ///
    /// When there is no iptables, or it refuses or takes too long.
    pub(crate) fn load(lab: &Lab, pod: &Pod, services: u32, server: &Pod) -> Result<Self> {
        let (middle, last) = (services / 2, services - 1);
        let file = lab.directory().join("rules");
        let endpoints = |service: u32| {
            let generated = (0..ENDPOINTS).map(|endpoint| generated::endpoint_ip(service, endpoint, false)).collect();
            if [middle, last].contains(&service) { server.ips().to_vec() } else { generated }
        };
        std::fs::write(&file, render(services, endpoints))
            .with_context(|| format!("could not write {}", file.display()))?;
        let mut failures = Vec::new();
        for program in RESTORE {
            match restore(program, pod.process(), &file, lab) {
                Ok(()) => return Ok(Self { middle: address(middle), last: address(last), program }),
                Err(error) => failures.push(format!("{program}: {error:#}")),
            }
        }
        bail!("{}; install iptables", failures.join("; "))
    }
}

fn address(service: u32) -> SocketAddr {
    SocketAddr::new(generated::place([10, 98], service), PORT)
}

fn restore(program: &str, process: u32, rules: &std::path::Path, lab: &Lab) -> Result<()> {
    let rules = File::open(rules).with_context(|| format!("could not open {}", rules.display()))?;
    let output = Command::new("timeout")
        .args(["--kill-after=5", LIMIT, "nsenter", &format!("--net=/proc/{process}/ns/net"), program, "--noflush"])
        // The lock of the machine's own rules is of no concern here.
        .env("XTABLES_LOCKFILE", lab.directory().join("xtables.lock"))
        .stdin(rules)
        .stdout(Stdio::null())
        .output()
        .context("could not run it")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() != Some(124), "took longer than {LIMIT} s");
    ensure!(output.status.success(), "{} ({})", said.lines().next().unwrap_or("failed").trim(), output.status);
    Ok(())
}

/// The table `nat`, as input for iptables-restore.
fn render(services: u32, endpoints: impl Fn(u32) -> Vec<IpAddr>) -> String {
    let mut chains = String::from("*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n");
    let mut rules = String::from(
        "-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
         -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE\n",
    );
    // Writing to a String cannot fail.
    for service in 0..services {
        let (ip, name) = (address(service).ip(), format!("default/{}:main", generated::name(service)));
        // kube-proxy's names end in 16 characters of a hash.
        let chain = format!("KUBE-SVC-{service:016}");
        let frontend = format!("-m tcp -p tcp -d {ip}/32 --dport {PORT}");
        let _ = writeln!(chains, ":{chain} - [0:0]");
        let comment = format!("-m comment --comment \"{name} cluster IP\"");
        let _ = writeln!(rules, "-A KUBE-SERVICES {comment} {frontend} -j {chain}");
        let _ = writeln!(rules, "-A {chain} {comment} {frontend} ! -s 10.244.0.0/16 -j KUBE-MARK-MASQ");
        let endpoints = endpoints(service);
        for (index, ip) in endpoints.iter().enumerate() {
            let (left, target) = (endpoints.len() - index, SocketAddr::new(*ip, TARGET_PORT));
            let endpoint = format!("KUBE-SEP-{service:014}{index:02}");
            let _ = writeln!(chains, ":{endpoint} - [0:0]");
            let share = match left {
                1 => String::new(),
                _ => format!(" -m statistic --mode random --probability {:.10}", 1.0 / left as f64),
            };
            let comment = format!("-m comment --comment \"{name} -> {target}\"");
            let _ = writeln!(rules, "-A {chain} {comment}{share} -j {endpoint}");
            let comment = format!("-m comment --comment {name}");
            let _ = writeln!(rules, "-A {endpoint} {comment} -s {ip}/32 -j KUBE-MARK-MASQ");
            let _ = writeln!(rules, "-A {endpoint} {comment} -m tcp -p tcp -j DNAT --to-destination {target}");
        }
    }
    chains + &rules + "COMMIT\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_have_the_form_of_those_kube_proxy_writes() {
        let two = |_| ["10.244.1.10", "10.244.1.11"].map(|ip| ip.parse().unwrap()).to_vec();
        let text = render(1, two);
        for line in [
            ":KUBE-SVC-0000000000000000 - [0:0]",
            ":KUBE-SEP-0000000000000001 - [0:0]",
            "-A KUBE-SERVICES -m comment --comment \"default/service-00000:main cluster IP\" -m tcp -p tcp \
             -d 10.98.0.1/32 --dport 80 -j KUBE-SVC-0000000000000000",
            "-A KUBE-SVC-0000000000000000 -m comment --comment \"default/service-00000:main -> 10.244.1.10:7000\" \
             -m statistic --mode random --probability 0.5000000000 -j KUBE-SEP-0000000000000000",
            "-A KUBE-SVC-0000000000000000 -m comment --comment \"default/service-00000:main -> 10.244.1.11:7000\" \
             -j KUBE-SEP-0000000000000001",
            "-A KUBE-SEP-0000000000000001 -m comment --comment default/service-00000:main -m tcp -p tcp \
             -j DNAT --to-destination 10.244.1.11:7000",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}\nis not in\n{text}");
        }
        assert!(text.starts_with("*nat\n") && text.ends_with("COMMIT\n"));
    }
}
