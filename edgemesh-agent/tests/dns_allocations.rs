//! A query is answered without an allocation, where the zone or the cache has the answer. In a program of its own, as
//! all of its allocations are counted.
#![expect(clippy::unwrap_used, reason = "all of this is a test")]

#[path = "dns/served.rs"]
mod served;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    num::{NonZeroU16, NonZeroU32},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use edgemesh_agent::{
    dns::{
        Limits,
        wire::{Name, rtype},
    },
    model::{
        Builder, Endpoint, EndpointPort, EndpointSet, Event, Object, Place, Protocol, Service, ServiceKind,
        ServicePort, Subset,
    },
};
use served::Served;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is left to the system's allocator; counting touches no memory of its own.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above; the pointer came from `alloc`, and so from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// For what other threads do in the meantime, such as to look whether upstreams are well.
const OTHERS: u64 = 50;
const ROUNDS: u64 = 1000;

fn query(name: &str, qtype: u16) -> Vec<u8> {
    let name: Name = name.parse().unwrap();
    let mut message = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
    message.extend_from_slice(name.as_wire());
    message.extend_from_slice(&qtype.to_be_bytes());
    // Class IN, then an OPT record.
    message.extend_from_slice(&[0, 1, 0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
    message
}

fn table() -> Arc<edgemesh_agent::model::ServiceTable> {
    let number = NonZeroU16::new(5432).unwrap();
    let service = |name: &str, kind| {
        let port = ServicePort { name: "sql".into(), protocol: Protocol::Tcp, port: number, node_port: None };
        Service { ports: vec![port], ..Service::new(name.parse().unwrap(), kind) }
    };
    let web =
        Service { cluster_ips: vec!["10.96.0.1".parse().unwrap()], ..service("shop/web", ServiceKind::ClusterIp) };
    let mut builder = Builder::default();
    for service in [web, service("shop/db", ServiceKind::Headless)] {
        builder.apply(Event::Apply(Object::Service(service.into())));
    }
    let endpoints = (1..20).map(|last: u8| Endpoint {
        address: [10, 244, 1, last].into(),
        ready: true,
        serving: true,
        terminating: false,
        place: Arc::new(Place::default()),
    });
    let port = EndpointPort { name: "sql".into(), protocol: Protocol::Tcp, port: number };
    let subset = Subset { ports: vec![port], endpoints: endpoints.collect() };
    let (name, service) = ("shop/db-1".parse().unwrap(), "shop/db".parse().unwrap());
    builder.apply(Event::Apply(Object::EndpointSlice(EndpointSet { name, service, subsets: vec![subset] }.into())));
    builder.apply(Event::Synced);
    builder.build().unwrap()
}

#[test]
fn names_of_the_cluster_and_of_the_cache_cost_no_allocation() {
    let limits = Limits { queries: NonZeroU32::new(1_000_000), forwarded: NonZeroU32::new(1_000_000), waiting: 100 };
    let served = Served::start(table(), limits);
    let socket = &served.socket;
    let mut buffer = [0; 2048];
    for (name, qtype) in [
        ("web.shop.svc.cluster.local", rtype::A),
        ("web.shop.svc.cluster.local", rtype::AAAA),
        ("WEB.shop.svc.cluster.local", rtype::ANY),
        ("db.shop.svc.cluster.local", rtype::A),
        ("db.shop.svc.cluster.local", rtype::SRV),
        ("10-244-1-2.db.shop.svc.cluster.local", rtype::A),
        ("1-2-3-4.shop.pod.cluster.local", rtype::A),
        ("1.0.96.10.in-addr.arpa", rtype::PTR),
        ("www.example.org.shop.svc.cluster.local", rtype::A),
        ("www.example.org", rtype::A),
    ] {
        let message = query(name, qtype);
        let mut ask = || {
            socket.send(&message).unwrap();
            let length = socket.recv(&mut buffer).unwrap();
            assert!(length > message.len(), "{name} {qtype}");
        };
        // The first may have to be asked for.
        ask();
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for _ in 0..ROUNDS {
            ask();
        }
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert!(allocations < OTHERS, "{name} {qtype}: {allocations} allocations for {ROUNDS} queries");
    }
    let counted: u64 = served.dns.stats().queries.iter().map(|(_, count)| *count).sum();
    assert!(counted > 10 * ROUNDS, "{counted} queries counted");
    served.stop();
}
