//! Other Service proxies of this node: kube-proxy and EdgeMesh (Go), by their processes, devices and chains.

use std::{
    fs::{self, File},
    io::Read,
    path::Path,
};

use super::netfilter::{has_chain, has_nft_table};

/// What there is of each, in words; nothing where there is none of it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Proxies {
    pub(super) kube_proxy: Vec<String>,
    pub(super) edgemesh: Vec<String>,
}

/// Where the Go toolchain looks for its note in an executable, too (cmd/internal/buildid).
const GO_PREFIX: u64 = 32 << 10;

/// Looks for them in this network namespace. Reads a line for each process, and asks the kernel for four chains.
pub(super) fn look() -> Proxies {
    let mut proxies = Proxies::default();
    let own = namespace("self");
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) else { continue };
        let Ok(command) = fs::read_to_string(format!("/proc/{pid}/comm")) else { continue };
        let found = match command.trim_end() {
            "kube-proxy" => &mut proxies.kube_proxy,
            // Ours has the same name.
            "edgemesh-agent" if is_go(Path::new(&format!("/proc/{pid}/exe"))) => &mut proxies.edgemesh,
            _ => continue,
        };
        // Those of other network namespaces serve others: kind and its like run whole nodes in containers.
        if own.is_some() && namespace(pid) == own {
            found.push(format!("process {pid}"));
        }
    }
    if nix::net::if_::if_nametoindex("kube-ipvs0").is_ok() {
        proxies.kube_proxy.push("the device kube-ipvs0".to_owned());
    }
    if has_nft_table("kube-proxy") {
        proxies.kube_proxy.push("the nftables table kube-proxy".to_owned());
    }
    // The canary is in a table that is small whatever the number of Services. The chain before it is that of old
    // kube-proxies, and of those inside another process (k3s).
    for (table, chain) in [("nat", "KUBE-SERVICES"), ("mangle", "KUBE-PROXY-CANARY")] {
        if has_chain(table, chain) {
            proxies.kube_proxy.push(format!("the chain {chain} in the table {table}"));
        }
    }
    // The userspace proxy of old kube-proxies, which is where EdgeMesh has it from.
    if has_chain("nat", "KUBE-PORTALS-CONTAINER") {
        proxies.edgemesh.push("the chain KUBE-PORTALS-CONTAINER in the table nat".to_owned());
    }
    proxies
}

fn namespace(pid: &str) -> Option<std::path::PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/net")).ok()
}

/// Whether an executable was built by the Go toolchain, which leaves an ELF note.
fn is_go(path: &Path) -> bool {
    let mut head = Vec::new();
    File::open(path).is_ok_and(|file| file.take(GO_PREFIX).read_to_end(&mut head).is_ok()) && has_go_note(&head)
}

/// The note's type, 4, and its name.
fn has_go_note(head: &[u8]) -> bool {
    head.windows(8).any(|window| window == b"\x04\0\0\0Go\0\0" || window == b"\0\0\0\x04Go\0\0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_go_program_is_told_by_its_note() {
        let note = [&[0x7f, b'E', b'L', b'F'][..], &[0; 100], &[4, 0, 0, 0, 0x53, 0, 0, 0], b"\x04\0\0\0Go\0\0id"];
        assert!(has_go_note(&note.concat()));
        assert!(!has_go_note(b"Go to the store"));
        assert!(!is_go(Path::new("/proc/self/exe")), "this very program is none");
        assert!(!is_go(Path::new("/nonexistent")));
    }
}
