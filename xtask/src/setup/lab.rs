//! The programs that the lab calls.

use std::{env, ffi::OsString, path::PathBuf};

/// Each with the Debian package that has it.
const TOOLS: [(&str, &str); 9] = [
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("dig", "bind9-dnsutils"),
    ("iptables-restore", "iptables"),
    ("curl", "curl"),
    ("nc.openbsd", "netcat-openbsd"),
    ("ncat", "ncat"),
    ("ssh", "openssh-client"),
    (SSHD, "openssh-server"),
];
/// The one that is also a service of the system, which nobody asked for.
pub(crate) const SSHD: &str = "sshd";
/// What benchmarks compare with, or measure by.
const COMPARED: [(&str, &str); 1] = [("dnsperf", "dnsperf")];
/// Not on the PATH of every user, while the lab looks there.
const SYSTEM: [&str; 3] = ["/usr/sbin", "/usr/bin", "/sbin"];

/// The programs of the lab that are not here.
pub(crate) fn missing() -> Vec<&'static str> {
    missing_of(&TOOLS)
}

/// The programs, given with their packages, that are not here.
pub(crate) fn missing_of(tools: &[(&'static str, &'static str)]) -> Vec<&'static str> {
    tools.iter().map(|(tool, _)| *tool).filter(|tool| locate(tool, env::var_os("PATH")).is_none()).collect()
}

/// The packages of programs that only benchmarks need, as far as those are not here.
pub(crate) fn missing_for_benchmarks() -> Vec<&'static str> {
    packages_of(&COMPARED, &missing_of(&COMPARED))
}

/// Where the programs are that are here.
pub(crate) fn found() -> Vec<String> {
    let paths = TOOLS.iter().filter_map(|(tool, _)| locate(tool, env::var_os("PATH")));
    paths.map(|path| path.display().to_string()).collect()
}

/// The packages that have some of the lab's programs.
pub(crate) fn packages(tools: &[&str]) -> Vec<&'static str> {
    packages_of(&TOOLS, tools)
}

/// The packages that have `wanted`, of programs given with their packages.
pub(crate) fn packages_of(tools: &[(&'static str, &'static str)], wanted: &[&str]) -> Vec<&'static str> {
    tools.iter().filter(|(tool, _)| wanted.contains(tool)).map(|(_, package)| *package).collect()
}

fn locate(tool: &str, path: Option<OsString>) -> Option<PathBuf> {
    let path = path.unwrap_or_default();
    let places = env::split_paths(&path).chain(SYSTEM.map(PathBuf::from));
    places.map(|dir| dir.join(tool)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_told_its_package() {
        assert_eq!(packages(&["nsenter"]), ["util-linux"]);
        assert_eq!(packages(&["ip", "nsenter"]), ["iproute2", "util-linux"]);
        assert!(packages(&[]).is_empty());
    }

    #[test]
    fn programs_are_found_on_the_path_given() {
        let dir = tempfile::tempdir().unwrap();
        let tool = "edgemesh-no-such-tool";
        assert_eq!(locate(tool, Some(dir.path().into())), None);
        std::fs::write(dir.path().join(tool), "").unwrap();
        assert_eq!(locate(tool, Some(dir.path().into())), Some(dir.path().join(tool)));
    }
}
