//! The name servers in a resolv.conf(5), and when to look for them again.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6},
    path::{Component, Path, PathBuf},
    time::Duration,
};

use nix::sys::inotify::WatchDescriptor;
use tokio::time::sleep;

use crate::inotify::Inotify;

const PORT: u16 = 53;
/// The C library uses three; systemd lists all that it knows.
const MOST_SERVERS: usize = 8;
const MAX_SIZE: u64 = 64 * 1024;
/// As many links as Linux follows.
const MOST_LINKS: usize = 40;
/// A file is looked at so often whatever inotify says: it does not see through the mount of a single file, nor that a
/// directory above those watched was replaced.
const POLL: Duration = Duration::from_secs(10);
/// Writers empty the file first.
const QUIET: Duration = Duration::from_millis(50);

/// The addresses of the lines `nameserver`, in their order, each once and at most eight.
///
/// All else is passed over, `options` too: when to ask the next server is decided by how fast each of them is. `scope`
/// gives the index of an interface by its name, for link-local addresses.
pub(super) fn name_servers(text: &str, scope: impl Fn(&str) -> Option<u32>) -> Vec<SocketAddr> {
    let mut servers = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let Some(server) = words.next().and_then(|word| address(word, &scope)) else { continue };
        if servers.len() < MOST_SERVERS && !servers.contains(&server) {
            servers.push(server);
        }
    }
    servers
}

/// The name servers in a file.
///
/// # Errors
///
/// It cannot be read, or is no regular file, from which reading might never end.
pub(super) fn read(path: &Path) -> io::Result<Vec<SocketAddr>> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_SIZE).read_to_end(&mut bytes)?;
    let index = |name: &str| nix::net::if_::if_nametoindex(name).ok();
    Ok(name_servers(&String::from_utf8_lossy(&bytes), index))
}

/// Says when a file may have changed, be it behind symbolic links.
#[derive(Debug)]
pub(super) struct FileWatch {
    path: PathBuf,
    /// None where the kernel gave none; looking now and then has to do.
    inotify: Option<Inotify>,
    watched: BTreeMap<PathBuf, WatchDescriptor>,
}

impl FileWatch {
    pub(super) fn new(path: &Path) -> Self {
        let inotify = Inotify::new().map_err(|error| {
            tracing::warn!(path = %path.display(), "cannot watch with inotify: {error}; looking every {POLL:?}");
        });
        let mut watch = Self { path: path.to_owned(), inotify: inotify.ok(), watched: BTreeMap::new() };
        watch.renew();
        watch
    }

    /// Waits until the file may have changed. Changes since the last call, or since [`FileWatch::new`], count.
    pub(super) async fn changed(&mut self) {
        let event = async {
            match &self.inotify {
                Some(inotify) => inotify.events().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            events = event => {
                if events.is_err() {
                    self.inotify = None;
                }
                sleep(QUIET).await;
            }
            () = sleep(POLL) => {}
        }
        self.renew();
    }

    /// Watches the directories that the file and the links to it are in now.
    fn renew(&mut self) {
        let Some(inotify) = &self.inotify else { return };
        let mut watched = BTreeMap::new();
        for directory in directories(&self.path) {
            // A missing one is found by looking again.
            if let Ok(descriptor) = inotify.watch(&directory) {
                watched.insert(directory, descriptor);
            }
        }
        let before = std::mem::replace(&mut self.watched, watched);
        for descriptor in before.into_values() {
            if !self.watched.values().any(|still| *still == descriptor) {
                inotify.forget(descriptor);
            }
        }
    }
}

/// The directories that hold a file and each link on the way to it, links to directories among them.
fn directories(path: &Path) -> Vec<PathBuf> {
    let mut directories = Vec::new();
    let mut links = 0;
    let mut here = PathBuf::new();
    let mut ahead: Vec<PathBuf> = parts(&std::path::absolute(path).unwrap_or_else(|_| path.to_owned()));
    while let Some(part) = ahead.pop() {
        match part.components().next() {
            Some(Component::ParentDir) => {
                here.pop();
            }
            Some(Component::Normal(_)) => {
                let next = here.join(&part);
                match fs::read_link(&next) {
                    Ok(target) if links < MOST_LINKS => {
                        links += 1;
                        directories.push(here.clone());
                        ahead.extend(parts(&target));
                    }
                    _ => here = next,
                }
            }
            Some(Component::RootDir | Component::Prefix(_) | Component::CurDir) | None => here.push(&part),
        }
    }
    directories.extend(here.parent().map(Path::to_owned));
    directories
}

/// The last part first.
fn parts(path: &Path) -> Vec<PathBuf> {
    path.components().rev().map(|part| PathBuf::from(part.as_os_str())).collect()
}

fn address(word: &str, scope: impl Fn(&str) -> Option<u32>) -> Option<SocketAddr> {
    if let Some((address, zone)) = word.split_once('%') {
        let address: Ipv6Addr = address.parse().ok()?;
        let zone = zone.parse().ok().or_else(|| scope(zone))?;
        return Some(SocketAddrV6::new(address, PORT, 0, zone).into());
    }
    let address: IpAddr = word.parse().ok()?;
    Some(SocketAddr::new(address, PORT)).filter(|_| !address.is_unspecified() && !address.is_multicast())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;

    fn servers(text: &str) -> Vec<String> {
        let scope = |name: &str| (name == "eth0").then_some(7);
        name_servers(text, scope).iter().map(SocketAddr::to_string).collect()
    }

    #[test]
    fn name_servers_are_found_among_everything_else() {
        let text = "\u{feff}# by hand\n; nameserver 10.0.0.9\n#nameserver 10.0.0.9\nsearch a.example b.example\r\n\
            nameserver 10.0.0.1\r\n\tnameserver\t2001:db8::1   # second\nnameserver fe80::1%eth0\nnameserver fe80::2%3\n\
            nameserver fe80::3%nosuch\nnameserver\nnameserver one.example\nnameserver 10.0.0.1\nnameserver 10.0.0.256\n\
            nameservers 10.0.0.9\nnameserver 0.0.0.0\nnameserver 224.0.0.251\noptions timeout:1 attempts:2 rotate\n\u{0}\u{1}";
        assert_eq!(servers(text), ["10.0.0.1:53", "[2001:db8::1]:53", "[fe80::1%7]:53", "[fe80::2%3]:53"]);
        assert_eq!(servers(""), [""; 0]);
        let many: String = (1..20).map(|n| format!("nameserver 10.0.0.{n}\n")).collect();
        assert_eq!(servers(&many).len(), MOST_SERVERS);
    }

    #[test]
    fn a_directory_or_a_huge_file_does_no_harm() {
        let directory = tempfile::tempdir().unwrap();
        assert!(read(directory.path()).is_err());
        let path = directory.path().join("resolv.conf");
        assert!(read(&path).is_err());
        fs::write(&path, [b"nameserver 10.0.0.1\n".to_vec(), vec![b'x'; 1 << 20]].concat()).unwrap();
        assert_eq!(read(&path).unwrap().len(), 1);
    }

    /// The layout of systemd-resolved, and of a ConfigMap.
    #[tokio::test]
    async fn a_replaced_link_anywhere_on_the_way_is_a_change() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        for directory in ["etc", "run", "..1", "..2"] {
            fs::create_dir(at(directory)).unwrap();
        }
        fs::write(at("..1/resolv.conf"), "nameserver 10.0.0.1").unwrap();
        fs::write(at("..2/resolv.conf"), "nameserver 10.0.0.2").unwrap();
        symlink("..1", at("..data")).unwrap();
        symlink("../..data/resolv.conf", at("run/resolv.conf")).unwrap();
        symlink("../run/resolv.conf", at("etc/resolv.conf")).unwrap();
        let path = at("etc/resolv.conf");
        let mut watch = FileWatch::new(&path);
        let first = |path: &Path| read(path).unwrap()[0].to_string();
        assert_eq!(first(&path), "10.0.0.1:53");

        let soon = Duration::from_secs(5);
        let replace = |target: &str, link: &str| {
            symlink(target, at("new")).unwrap();
            fs::rename(at("new"), at(link)).unwrap();
        };
        replace("..2", "..data");
        tokio::time::timeout(soon, watch.changed()).await.unwrap();
        assert_eq!(first(&path), "10.0.0.2:53");

        fs::write(at("run/other"), "nameserver 10.0.0.3").unwrap();
        replace("other", "run/resolv.conf");
        tokio::time::timeout(soon, watch.changed()).await.unwrap();
        assert_eq!(first(&path), "10.0.0.3:53");

        fs::write(at("run/other"), "nameserver 10.0.0.4").unwrap();
        tokio::time::timeout(soon, watch.changed()).await.unwrap();
        assert_eq!(first(&path), "10.0.0.4:53");
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_harm(text in any::<String>()) {
            servers(&text);
        }
    }
}
