//! Clusters of any size: Services that all look alike, with endpoints on nodes that are not there.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::Result;
use edgemesh_tests::lab::{
    Manifests, Transport,
    manifest::{Endpoint, Service},
};

/// What Services listen on.
pub(crate) const PORT: u16 = 80;
/// What endpoints listen on.
pub(crate) const TARGET_PORT: u16 = 7000;
/// How many Services a file holds; a directory may hold some thousand files.
const PER_FILE: u32 = 10;

/// So many Services with so many endpoints each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Generated {
    /// Up to 10,000.
    pub(crate) services: u32,
    /// Up to 16.
    pub(crate) endpoints: u32,
}

impl Generated {
    /// Writes all Services but those of `without`.
    pub(crate) fn write(self, manifests: &Manifests, without: &[u32]) -> Result<()> {
        for file in 0..self.services.div_ceil(PER_FILE) {
            self.write_file(manifests, file, without, None)?;
        }
        Ok(())
    }

    /// All Services with Endpoints, or with EndpointSlices, as YAML documents for an API server.
    pub(crate) fn documents(self, slices: bool) -> Result<String> {
        let mut text = String::new();
        // The first address is that of Kubernetes' own Service.
        for number in 1..=self.services {
            let endpoints: Vec<Endpoint> = (0..self.endpoints)
                .map(|endpoint| Endpoint::new(endpoint_ip(number, endpoint, false), &format!("far{endpoint}")))
                .collect();
            let service = named(number, Transport::Tcp);
            text += &if slices { service.yaml_with(&endpoints) } else { service.yaml_with_endpoints(&endpoints) }?;
        }
        Ok(text)
    }

    /// Gives the first endpoint of one Service another address; returns its address and port.
    pub(crate) fn move_endpoint(self, manifests: &Manifests, service: u32) -> Result<SocketAddr> {
        self.write_file(manifests, service / PER_FILE, &[], Some(service))?;
        Ok(SocketAddr::new(endpoint_ip(service, 0, true), TARGET_PORT))
    }

    /// Writes one Service more, in a file of its own, with or without its first endpoint moved.
    pub(crate) fn write_single(self, manifests: &Manifests, moved: bool) -> Result<()> {
        manifests.write("single", &self.yaml(self.services, moved)?)
    }

    fn write_file(self, manifests: &Manifests, file: u32, without: &[u32], moved: Option<u32>) -> Result<()> {
        let mut text = String::new();
        let all = file * PER_FILE..self.services.min((file + 1) * PER_FILE);
        for service in all.filter(|service| !without.contains(service)) {
            text.push_str(&self.yaml(service, moved == Some(service))?);
        }
        manifests.write(&format!("services-{file:04}"), &text)
    }

    /// A Service and its endpoints, the first of which may have moved.
    fn yaml(self, service: u32, moved: bool) -> Result<String> {
        let endpoints = (0..self.endpoints).map(|endpoint| {
            Endpoint::new(endpoint_ip(service, endpoint, moved && endpoint == 0), &format!("far{endpoint}"))
        });
        named(service, Transport::Tcp).yaml_with(&endpoints.collect::<Vec<_>>())
    }
}

/// The Service of this number, without endpoints.
pub(crate) fn named(service: u32, transport: Transport) -> Service {
    Service::new(&name(service), &[&cluster_ip(service).to_string()]).port("main", transport, PORT, TARGET_PORT)
}

/// `service-01234`
pub(crate) fn name(service: u32) -> String {
    format!("service-{service:05}")
}

/// The ClusterIP of a Service.
pub(crate) fn cluster_ip(service: u32) -> IpAddr {
    place([10, 96], service)
}

/// The address of an endpoint, and another one that it may move to.
pub(crate) fn endpoint_ip(service: u32, endpoint: u32, moved: bool) -> IpAddr {
    let network = if moved { 192 } else { 128 };
    place([10, network + (endpoint % 16) as u8], service)
}

/// The address of this number in a /16; no byte of it is 0 or 255 at the end.
pub(crate) fn place(network: [u8; 2], number: u32) -> IpAddr {
    let [a, b] = network;
    Ipv4Addr::new(a, b, (number / 250) as u8, (number % 250 + 1) as u8).into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn addresses_of_the_largest_cluster_all_differ() {
        let mut seen = BTreeSet::new();
        for service in 0..10_000 {
            assert!(seen.insert(cluster_ip(service)));
            assert!((0..16).all(|endpoint| seen.insert(endpoint_ip(service, endpoint, false))), "{service}");
            assert!(seen.insert(endpoint_ip(service, 0, true)));
        }
    }
}
