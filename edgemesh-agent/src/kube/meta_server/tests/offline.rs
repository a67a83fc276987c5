//! Without the cloud: what is stored on the node, and what the agent knew.

use super::*;

#[tokio::test]
async fn offline_what_is_stored_adds_and_nothing_goes_and_all_is_made_good_when_the_link_is_back() {
    let fake = fake();
    for name in ["a", "b", "c"] {
        fake.put(service(name, 80));
    }
    let mut bench = Bench::synced(&fake, OFTEN).await;
    let all = ["Service shop/a:80", "Service shop/b:80", "Service shop/c:80"];
    bench.learns(&all).await;
    fake.link(Link::Down);
    fake.delete("services", "shop", "a");
    fake.put(service("b", 81));
    fake.put(service("d", 80));
    let status = bench.health(SourceHealth::Offline).await;
    assert!(status.since > 0 && status.hint.unwrap().contains("cloudcore"), "{:?}", bench.state.status());
    bench.condition(OFFLINE, "").await;
    assert!(bench.knows(&all), "{:?}", bench.known);
    let begun = Instant::now();
    fake.link(Link::Up);
    bench.learns(&["Service shop/b:81", "Service shop/c:80", "Service shop/d:80"]).await;
    bench.well().await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    // The watch is one that the cloud knows of.
    fake.put(service("e", 80));
    bench.learns(&["Service shop/b:81", "Service shop/c:80", "Service shop/d:80", "Service shop/e:80"]).await;
}

#[tokio::test]
async fn an_agent_that_starts_offline_serves_what_is_stored() {
    let fake = fake();
    fake.old_names();
    fake.put(service("a", 80));
    drop(Bench::synced(&fake, NEVER).await);
    fake.link(Link::Down);
    let mut bench = Bench::start(&fake, NEVER);
    bench.until("it is in sync", |bench| bench.synced).await;
    bench.learns(&["Service shop/a:80"]).await;
    bench.health(SourceHealth::Offline).await;
    assert_eq!(
        fake.count("watch", "nodes") + fake.watching("services"),
        1,
        "a watch opened now would never come to life"
    );
    fake.delete("services", "shop", "a");
    fake.put(service("b", 80));
    fake.link(Link::Up);
    bench.learns(&["Service shop/b:80"]).await;
    bench.well().await;
}

#[tokio::test]
async fn an_agent_that_starts_offline_with_nothing_stored_waits_and_takes_nothing_for_the_truth() {
    let fake = fake();
    fake.put(service("a", 80));
    fake.link(Link::Down);
    let mut bench = Bench::start(&fake, OFTEN);
    bench.condition(EMPTY, "services").await;
    bench.condition(EMPTY, "endpoints").await;
    let lists = fake.count("list", "endpoints");
    bench.until("it was listed again", |_| fake.count("list", "endpoints") > lists + 2).await;
    assert!(!bench.synced && bench.known.is_empty(), "{:?}", bench.known);
    assert_eq!(bench.state.status().health, SourceHealth::Degraded);
    fake.link(Link::Up);
    bench.until("it is in sync", |bench| bench.synced).await;
    bench.learns(&["Service shop/a:80"]).await;
    bench.well().await;
}

#[tokio::test]
async fn a_node_whose_store_was_wiped_is_served_by_lists() {
    let fake = fake();
    fake.put(service("a", 80));
    drop(Bench::synced(&fake, NEVER).await);
    // The cloud believes that the node has it all, and tells a new watch nothing.
    fake.wipe_store();
    let mut bench = Bench::synced(&fake, NEVER).await;
    bench.learns(&["Service shop/a:80"]).await;
    fake.put(service("a", 81));
    bench.learns(&["Service shop/a:81"]).await;
}

#[tokio::test]
async fn rules_4_5_and_9_a_restart_offline_brings_back_neither_ghosts_nor_what_was_stored_before_the_snapshot() {
    let fake = fake();
    fake.put(service("a", 80));
    fake.put(service("ghost", 80));
    let server = || config(format!("http://{}", fake.address()), OFTEN, PATIENCE);
    let mut bench = Bench::synced(&fake, OFTEN).await;
    bench.learns(&["Service shop/a:80", "Service shop/ghost:80"]).await;
    bench.until("all is stored", |_| fake.stored().contains(&"/core/v1/services/shop/ghost".to_owned())).await;
    // From here on watches are told nothing, and the node stores nothing; lists tell the agent all the same.
    fake.restart_cloudcore();
    fake.delete("services", "shop", "ghost");
    let changed = fake.put(service("a", 81));
    bench.learns(&["Service shop/a:81"]).await;
    bench.until("that is known to be all", |bench| bench.reached.get(&Kind::Service) >= Some(&changed)).await;
    let (known, reached) = (bench.known.clone(), bench.reached.clone());
    drop(bench);
    fake.link(Link::Down);

    // Without what was known before, all that is stored counts.
    let mut bench = Bench::start(&fake, OFTEN);
    bench.until("the ghost is back", |bench| bench.known.contains_key("Service shop/ghost")).await;
    drop(bench);
    let mut bench = Bench::start_after(server(), &reached).unwrap();
    bench.known = known;
    bench.until("it is in sync", |bench| bench.synced).await;
    let lists = fake.count("list", "services");
    bench.until("it was listed again", |_| fake.count("list", "services") > lists + 1).await;
    assert!(bench.knows(&["Service shop/a:81"]), "{:?}", bench.known);
    fake.put(service("b", 80));
    fake.link(Link::Up);
    bench.learns(&["Service shop/a:81", "Service shop/b:80"]).await;
    bench.well().await;
}
