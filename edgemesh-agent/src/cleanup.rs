//! `edgemesh-agent cleanup`: takes back everything the agent ever put into this node's kernel and network, and nothing else.

use std::{io, net::IpAddr, path::Path};

use crate::{admin, alias::AliasFile, config::AgentConfig, dataplane::ebpf, mesh::MeetingsFile, net, snapshot};

/// What stands in the way, one line each.
#[derive(Debug, thiserror::Error)]
#[error("{}", messages.join("\n"))]
pub struct CleanupError {
    messages: Vec<String>,
    /// Whether anything failed for lack of permission.
    pub permission: bool,
}

/// Removes links and maps, the cgroups of the canary and of probes, the local routes of aliases, the device and its
/// address, and the control socket; goes on after an error and reports all of them. With `forget`, the metadata snapshot
/// and the file of aliases go, too: they are for the next start of an agent, which a cleanup may well be followed by. Returns what was removed, for people to read.
///
/// # Errors
///
/// See [`CleanupError`]; what is not named in it is gone.
pub async fn cleanup(config: &AgentConfig, forget: bool) -> (Vec<String>, Result<(), CleanupError>) {
    let (mut removed, mut messages, mut permission) = (Vec::new(), Vec::new(), false);
    let pins = &config.proxy.ebpf.pin_directory;
    // Before the program goes that refuses what is sent to aliases, which other sockets would get.
    match net::route::remove_local().await {
        Ok(names) => removed.extend(names),
        Err(error) => {
            permission |= error.is_permission();
            messages.push(error.to_string());
        }
    }
    // Before the map goes that says where they are.
    match ebpf::remove_filters(pins).await {
        Ok(names) => removed.extend(names),
        Err(error) => {
            permission |= error.kind() == io::ErrorKind::PermissionDenied;
            messages.push(format!("cannot remove the filters of interfaces: {error}; run as root"));
        }
    }
    match ebpf::remove_all(pins) {
        Ok(names) => removed.extend(names),
        Err(error) => {
            permission |= error.kind() == io::ErrorKind::PermissionDenied;
            messages.push(format!("cannot remove the pins in {}: {error}; run as root", pins.display()));
        }
    }
    match ebpf::remove_scratch(config.proxy.ebpf.cgroup_root.as_deref()) {
        Ok(names) => removed.extend(names),
        Err(error) => {
            permission |= error.kind() == io::ErrorKind::PermissionDenied;
            messages.push(format!("cannot remove the agent's own cgroups: {error}; run as root"));
        }
    }
    let second = config.common.bridge_device_ipv6.map(IpAddr::V6);
    for address in [Some(config.common.bridge_device_ip), second].into_iter().flatten() {
        match net::remove_device(&config.common.bridge_device_name, address).await {
            Ok(name) => removed.extend(name),
            Err(error) => {
                permission |= error.is_permission();
                messages.push(error.to_string());
            }
        }
    }
    let socket = &config.common.control_socket;
    match remove_socket(socket) {
        Ok(names) => removed.extend(names),
        Err(error) => {
            permission |= error.kind() == io::ErrorKind::PermissionDenied;
            messages.push(format!("cannot remove the control socket {}: {error}", socket.display()));
        }
    }
    if let Some(path) = config.common.metadata_snapshot.as_deref().filter(|_| forget) {
        match remove_snapshot(path) {
            Ok(names) => removed.extend(names),
            Err(error) => {
                permission |= error.kind() == io::ErrorKind::PermissionDenied;
                messages.push(format!("cannot remove the metadata snapshot {}: {error}", path.display()));
            }
        }
    }
    if let Some(path) = config.common.alias_file.as_deref().filter(|_| forget) {
        match remove_aliases(path) {
            Ok(names) => removed.extend(names),
            Err(error) => {
                permission |= error.kind() == io::ErrorKind::PermissionDenied;
                messages.push(format!("cannot remove the file of aliases {}: {error}", path.display()));
            }
        }
    }
    (removed, if messages.is_empty() { Ok(()) } else { Err(CleanupError { messages, permission }) })
}

/// Whether an agent answers on the socket.
pub fn is_running(socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}

fn remove_snapshot(path: &Path) -> io::Result<Vec<String>> {
    let removed = snapshot::remove(path)?.iter().map(|path| path.display().to_string()).collect();
    Ok(with_directories(path, removed))
}

fn remove_aliases(path: &Path) -> io::Result<Vec<String>> {
    let mut removed = AliasFile::new(path.to_owned()).remove()?;
    removed.extend(MeetingsFile::beside(path).remove()?);
    Ok(with_directories(path, removed.iter().map(|path| path.display().to_string()).collect()))
}

/// Removes the directories around a file of ours, where they are ours and empty.
fn with_directories(path: &Path, mut removed: Vec<String>) -> Vec<String> {
    // As below; /var/lib/edgemesh may hold what others keep there.
    for directory in path.ancestors().skip(1).take(2) {
        let ours = directory.ends_with("edgemesh/agent") || directory.ends_with("edgemesh");
        if ours && std::fs::remove_dir(directory).is_ok() {
            removed.push(directory.display().to_string());
        }
    }
    removed
}

fn remove_socket(socket: &Path) -> io::Result<Vec<String>> {
    let mut removed = Vec::new();
    if admin::remove_socket(socket)? {
        removed.push(socket.display().to_string());
    }
    // The directory is ours only if it bears our name; one with something else in it stays.
    if let Some(directory) = socket.parent().filter(|directory| directory.ends_with("edgemesh"))
        && std::fs::remove_dir(directory).is_ok()
    {
        removed.push(directory.display().to_string());
    }
    Ok(removed)
}
