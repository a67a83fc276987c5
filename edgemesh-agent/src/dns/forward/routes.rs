//! Which upstreams are asked for which names.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use super::{
    StubDomain, UpstreamStatus,
    question::{NameText, wire_name, within},
    upstream::Upstream,
};

/// All upstreams. Immutable; a change makes new ones, which share the upstreams that stay.
#[derive(Debug, Default)]
pub(super) struct Routes {
    /// The longest first.
    stubs: Vec<Group>,
    /// For all other names.
    rest: Group,
}

/// The upstreams of one domain.
#[derive(Debug, Default)]
pub(super) struct Group {
    domain: Box<[u8]>,
    pub(super) upstreams: Vec<Arc<Upstream>>,
}

impl Routes {
    /// Routes for stub domains alone. A domain that is no name is left out.
    pub(super) fn new(stubs: &[StubDomain], own: &[SocketAddr]) -> Self {
        let mut routes = Self::default();
        for stub in stubs {
            let Some(domain) = wire_name(&stub.domain) else { continue };
            let upstreams = routes.upstreams_at(&stub.servers, own);
            routes.stubs.push(Group { domain, upstreams });
        }
        routes.stubs.sort_by_key(|group| std::cmp::Reverse(group.domain.len()));
        routes.rest.domain = Box::new([0]);
        routes
    }

    /// The same with `servers` for all names outside stub domains; None where these are what there is already.
    pub(super) fn with_rest(&self, servers: &[SocketAddr], own: &[SocketAddr]) -> Option<Self> {
        let rest = Group { domain: Box::new([0]), upstreams: self.upstreams_at(servers, own) };
        let same = rest.upstreams.iter().map(|upstream| upstream.address);
        if self.rest.upstreams.iter().map(|upstream| upstream.address).eq(same) {
            return None;
        }
        let share = |group: &Group| Group { domain: group.domain.clone(), upstreams: group.upstreams.clone() };
        Some(Self { stubs: self.stubs.iter().map(share).collect(), rest })
    }

    /// The group that a name, in lower case, belongs to.
    pub(super) fn group(&self, name: &[u8]) -> &Group {
        self.stubs.iter().find(|group| within(name, &group.domain)).unwrap_or(&self.rest)
    }

    pub(super) fn groups(&self) -> impl Iterator<Item = &Group> {
        self.stubs.iter().chain([&self.rest])
    }

    /// Each upstream once.
    pub(super) fn upstreams(&self) -> Vec<Arc<Upstream>> {
        let mut all: Vec<Arc<Upstream>> = Vec::new();
        for upstream in self.groups().flat_map(|group| &group.upstreams) {
            if !all.iter().any(|known| known.address == upstream.address) {
                all.push(Arc::clone(upstream));
            }
        }
        all
    }

    /// What `status` says of an upstream.
    pub(super) fn status(&self, upstream: &Upstream) -> UpstreamStatus {
        let uses = |group: &&Group| group.upstreams.iter().any(|used| used.address == upstream.address);
        upstream.status(self.groups().filter(uses).map(Group::domain).collect())
    }

    fn upstreams_at(&self, servers: &[SocketAddr], own: &[SocketAddr]) -> Vec<Arc<Upstream>> {
        let known = self.upstreams();
        let mut upstreams: Vec<Arc<Upstream>> = Vec::new();
        for &address in servers {
            if is_own(address, own) || upstreams.iter().any(|upstream| upstream.address == address) {
                continue;
            }
            let same = known.iter().find(|upstream| upstream.address == address);
            upstreams.push(same.map_or_else(|| Arc::new(Upstream::new(address)), Arc::clone));
        }
        upstreams
    }
}

impl Group {
    /// With dots; `.` for the names that no stub domain holds.
    pub(super) fn domain(&self) -> String {
        NameText(&self.domain).to_string()
    }

    /// In the order in which to ask them.
    pub(super) fn ranked(&self) -> Vec<Arc<Upstream>> {
        let mut upstreams = self.upstreams.clone();
        upstreams.sort_by_cached_key(|upstream| upstream.rank());
        upstreams
    }

    /// Whether none answers, or there is none.
    pub(super) fn is_silent(&self) -> bool {
        self.upstreams.iter().all(|upstream| upstream.is_silent())
    }

    /// Since when none has answered; None where one does, or there is none.
    pub(super) fn silent_since(&self) -> Option<Instant> {
        let since: Option<Vec<Instant>> = self.upstreams.iter().map(|upstream| upstream.silent_since()).collect();
        since?.into_iter().max()
    }
}

/// Whether what is sent there comes back to ourselves. The scope of an IPv6 address does not matter, nor
/// whether one of IPv4 is written as one of IPv6.
pub(super) fn is_own(address: SocketAddr, own: &[SocketAddr]) -> bool {
    let same =
        |own: &SocketAddr| own.ip().to_canonical() == address.ip().to_canonical() && own.port() == address.port();
    own.iter().any(same)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(group: &Group) -> Vec<String> {
        group.upstreams.iter().map(|upstream| upstream.address.to_string()).collect()
    }

    fn stub(domain: &str, server: &str) -> StubDomain {
        StubDomain { domain: domain.to_owned(), servers: vec![server.parse().unwrap()] }
    }

    #[test]
    fn the_longest_stub_domain_counts_and_the_rest_goes_to_the_rest() {
        let stubs = [stub("example", "10.0.0.1:53"), stub("Corp.Example.", "10.0.0.2:53")];
        let routes = Routes::new(&stubs, &[]).with_rest(&["10.0.0.3:53".parse().unwrap()], &[]).unwrap();
        for (name, server) in [
            ("www.corp.example", "10.0.0.2:53"),
            ("corp.example", "10.0.0.2:53"),
            ("xcorp.example", "10.0.0.1:53"),
            ("example", "10.0.0.1:53"),
            ("example.org", "10.0.0.3:53"),
            (".", "10.0.0.3:53"),
        ] {
            assert_eq!(addresses(routes.group(&wire_name(name).unwrap())), [server], "{name}");
        }
    }

    #[test]
    fn ourselves_and_repetitions_are_passed_over() {
        let own = ["169.254.96.16:53".parse().unwrap(), "[fe80::1]:53".parse().unwrap()];
        let ours = ["169.254.96.16:53", "[fe80::1%7]:53", "[::ffff:169.254.96.16]:53"];
        assert!(ours.iter().all(|server| is_own(server.parse().unwrap(), &own)));
        let servers = [ours[0], ours[1], ours[2], "169.254.96.16:54", "10.0.0.1:53", "10.0.0.1:53"];
        let servers = servers.map(|server| server.parse().unwrap());
        let routes = Routes::new(&[], &[]).with_rest(&servers, &own).unwrap();
        assert_eq!(addresses(routes.group(b"\0")), ["169.254.96.16:54", "10.0.0.1:53"]);
        assert!(routes.with_rest(&servers, &own).is_none(), "nothing has changed");
    }

    #[test]
    fn what_is_known_of_an_upstream_outlives_a_change_of_the_others() {
        let [a, b, c] = ["10.0.0.1:53", "10.0.0.2:53", "10.0.0.3:53"].map(|server| server.parse().unwrap());
        let before = Routes::new(&[], &[]).with_rest(&[a, b], &[]).unwrap();
        let after = before.with_rest(&[b, c], &[]).unwrap();
        assert!(Arc::ptr_eq(&before.rest.upstreams[1], &after.rest.upstreams[0]));
    }
}
