//! Lists that come to nothing.

use super::*;
use crate::kube::watch::fake::Fault;

#[tokio::test]
async fn a_list_that_breaks_off_replaces_nothing() {
    let server = FakeServer::start().await;
    for name in ["a", "b", "c"] {
        server.put("services", service(name, 80));
    }
    server.world().page = 2;
    server.world().break_second_page = true;
    let mut bench = Bench::start(server.address);
    bench.expect(&["replace EndpointSlice []", "replace Endpoints []"]).await;
    let condition = bench.condition(ANSWER, "services").await;
    assert!(condition.message.contains("failed to list services: 500 etcdserver: request timed out"), "{condition:?}");
    server.world().break_second_page = false;
    bench.expect(&["replace Service [shop/a:80 shop/b:80 shop/c:80]", "synced"]).await;
    bench.no_condition().await;
}

#[tokio::test]
async fn no_failure_takes_anything_away_and_each_is_told() {
    for (resource, fault, reason, part) in [
        ("services", Fault::Empty, ANSWER, "the list is empty"),
        ("endpointslices", Fault::Empty, ANSWER, "the list is empty"),
        ("services", Fault::Status(404), ANSWER, "404 not this time"),
        ("services", Fault::Status(500), ANSWER, "500 not this time"),
        ("services", Fault::Garbage, ANSWER, "expected value at line 1"),
        ("services", Fault::Truncated, UNREACHABLE, "cannot reach the API server http"),
        ("services", Fault::Silence, UNREACHABLE, "no answer within"),
    ] {
        let server = FakeServer::start().await;
        server.put("services", service("a", 80));
        server.put("endpointslices", slice("a-1", "a"));
        let mut bench = Bench::synced(&server).await;
        {
            let mut world = server.world();
            for watched in ["services", "endpointslices"] {
                // Has it list again.
                world.refused.insert(format!("watch {watched}"), 410);
            }
            world.faults.insert(resource.to_owned(), fault);
        }
        server.interrupt();
        let subject = match (reason, resource) {
            (UNREACHABLE, _) => "",
            (_, "services") => "services",
            _ => SLICES,
        };
        let condition = bench.condition(reason, subject).await;
        assert!(condition.message.contains(part), "{part} in {condition:?}");
        while let Ok(received) = bench.events.try_recv() {
            let event = describe(&received.event);
            // The other one was listed again, too; and that there are no rules is said late.
            let whole = ["Service [shop/a:80]", "EndpointSlice [shop/a-1]", "Endpoints []", "DestinationRule []"];
            let replaced = event.strip_prefix("replace ").unwrap_or(&event);
            assert!(whole.contains(&replaced), "{event} after {fault:?}");
        }
        {
            let mut world = server.world();
            world.refused.clear();
            world.faults.clear();
        }
        let wanted = match resource {
            "services" => "replace Service [shop/a:80]",
            _ => "replace EndpointSlice [shop/a-1]",
        };
        while bench.next().await != wanted {}
        bench.no_condition().await;
    }
}
