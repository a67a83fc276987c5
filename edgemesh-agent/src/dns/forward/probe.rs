//! Upstreams that are silent are asked again until they answer.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use futures::{StreamExt as _, stream::FuturesUnordered};
use tokio::time::{sleep_until, timeout};

use super::{Forwarder, flight, routes::Group};

/// How long an answer to a probe is waited for: a slow link must not be taken for a dead one for ever.
const PATIENCE: Duration = Duration::from_secs(2);
/// A shorter silence is nobody's concern.
const WORTH_TELLING: Duration = Duration::from_secs(3);

pub(super) const UNREACHABLE: &str = "DnsUpstreamsUnreachable";

/// Probes, and tells as a condition which domains have no upstream that answers.
pub(super) async fn run(forwarder: Forwarder) {
    let mut probes = FuturesUnordered::new();
    loop {
        let now = tokio::time::Instant::now();
        let routes = forwarder.routes();
        let mut next = None;
        for upstream in routes.upstreams() {
            if let Some(question) = upstream.probe(now.into_std()) {
                let (forwarder, upstream) = (forwarder.clone(), Arc::clone(&upstream));
                probes.push(async move {
                    let limits = &forwarder.0.settings.cache.ttl;
                    let attempt = flight::attempt(&upstream, &question, limits);
                    // What came of it is noted at the upstream.
                    let _late = timeout(PATIENCE, attempt).await;
                });
            }
            next = next.into_iter().chain(upstream.next_probe()).min();
        }
        tell(&forwarder, routes.groups(), now.into_std());
        tokio::select! {
            Some(()) = probes.next(), if !probes.is_empty() => {}
            () = forwarder.0.look_after.notified() => {}
            () = async {
                match next {
                    Some(at) => sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            } => {}
        }
    }
}

fn tell<'a>(forwarder: &Forwarder, groups: impl Iterator<Item = &'a Group>, now: Instant) {
    let mut silent = Vec::new();
    for group in groups {
        let long = group.silent_since().is_some_and(|since| now.saturating_duration_since(since) >= WORTH_TELLING);
        if long && !group.upstreams.is_empty() {
            silent.push(group.domain());
            let servers: Vec<String> = group.upstreams.iter().map(|upstream| upstream.address.to_string()).collect();
            let message = format!(
                "none of the name servers {} answers; names that are known are answered from the cache, others not at all; \
                 check the link, and that the servers are up",
                servers.join(", ")
            );
            forwarder.0.conditions.raise(UNREACHABLE, group.domain(), message, SystemTime::now());
        }
    }
    forwarder.0.conditions.retain(UNREACHABLE, |domain| silent.iter().any(|silent| silent == domain));
}
