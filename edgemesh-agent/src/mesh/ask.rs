//! `trace` across the tunnel: the way to a node, and what its agent says of an endpoint there.

use std::{net::SocketAddr, time::Duration};

use futures::future::join_all;
use tokio::time::Instant;

use super::{Sight, peer_row};
use crate::{
    alias, model,
    proxy::{Direct, Refusal},
    status::{Crossing, FarOutcome, FarRow, PeerRow},
    tunnel::{Answer, Fate, NodeName, OpenError, Protocol},
};

/// How long all nodes together have for their answers; the command line waits for 5 s.
const DEADLINE: Duration = Duration::from_secs(3);

impl Sight {
    /// Completes each crossing with the way that the tunnel takes now and with what the node there says. All nodes are
    /// asked at once, and those that are silent are said to be after 3 s.
    pub async fn follow(&self, protocol: model::Protocol, crossings: &mut [Crossing]) {
        let protocol = match protocol {
            model::Protocol::Tcp => Protocol::Tcp,
            model::Protocol::Udp => Protocol::Udp,
            // No frontend has it, and so no trace.
            model::Protocol::Sctp => return,
        };
        let found = join_all(crossings.iter().map(|crossing| self.cross(protocol, crossing))).await;
        for (crossing, (path, far)) in crossings.iter_mut().zip(found) {
            (crossing.path, crossing.far) = (path, far);
        }
    }

    async fn cross(&self, protocol: Protocol, crossing: &Crossing) -> (Option<PeerRow>, FarRow) {
        let target = alias::stream_target(crossing.endpoint);
        if let Some(here) = self.through.here(&crossing.node, protocol, target) {
            return (None, try_here(protocol, here).await);
        }
        let Some(tunnel) = self.through.tunnel() else { return (None, FarRow::of(FarOutcome::NoTunnel, "")) };
        let Ok(node) = crossing.node.parse::<NodeName>() else {
            return (None, FarRow::of(FarOutcome::NoPath, "that is no name of a node"));
        };
        match tunnel.ask(&node, protocol, target, DEADLINE).await {
            Ok(answer) => {
                let far = far_row(&answer);
                (Some(peer_row(answer.path)), far)
            }
            Err(error) => {
                let path = tunnel.peers().borrow().best(&node).map(peer_row);
                unanswered(error, path)
            }
        }
    }
}

/// What becomes of a connection to this node itself, which takes no tunnel.
async fn try_here(protocol: Protocol, here: Result<SocketAddr, Refusal>) -> FarRow {
    let begin = Instant::now();
    let at = here.as_ref().map_or_else(|_| String::new(), SocketAddr::to_string);
    let tried = match (here, protocol) {
        (Ok(_), Protocol::Udp) => return FarRow::of(FarOutcome::Allowed, ""),
        (Ok(addr), Protocol::Tcp) => Direct::connect(addr, begin + DEADLINE).await.map(drop),
        (Err(refusal), _) => Err(refusal),
    };
    let dial_micros = Some(u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX));
    match tried {
        Ok(()) => FarRow { dial_micros, ..FarRow::of(FarOutcome::Connected, "") },
        Err(Refusal::NotAllowed { rule }) => FarRow::of(FarOutcome::NotAllowed, &rule),
        Err(Refusal::Refused) => FarRow { dial_micros, ..FarRow::of(FarOutcome::Refused, &at) },
        Err(Refusal::TimedOut) => FarRow { dial_micros, ..FarRow::of(FarOutcome::TimedOut, &at) },
        Err(_) => FarRow::of(FarOutcome::Unreachable, &at),
    }
}

/// Longest text of another node that is shown, in characters.
const LONGEST: usize = 512;

/// The words of another node, fit for anybody's terminal.
fn plain(words: &str) -> String {
    words.chars().take(LONGEST).map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn far_row(answer: &Answer) -> FarRow {
    let (outcome, detail) = match &answer.fate {
        Fate::Connected => (FarOutcome::Connected, ""),
        Fate::Allowed => (FarOutcome::Allowed, ""),
        Fate::Refused(why) => (FarOutcome::Refused, why.as_str()),
        Fate::Unreachable(why) => (FarOutcome::Unreachable, why.as_str()),
        Fate::TimedOut(why) => (FarOutcome::TimedOut, why.as_str()),
        Fate::NotAllowed { rule } => (FarOutcome::NotAllowed, rule.as_str()),
        Fate::Busy(why) => (FarOutcome::Busy, why.as_str()),
        Fate::TooOld => (FarOutcome::TooOld, ""),
    };
    FarRow {
        rule: plain(&answer.grounds.rule),
        services: answer.grounds.services.iter().map(|service| plain(service)).collect(),
        dial_micros: answer.dial.map(|dial| u64::try_from(dial.as_micros()).unwrap_or(u64::MAX)),
        ..FarRow::of(outcome, &plain(detail))
    }
}

/// What is known where the far agent said nothing, with the path that there is at the end.
fn unanswered(error: OpenError, path: Option<PeerRow>) -> (Option<PeerRow>, FarRow) {
    match error {
        OpenError::NoPath { why, .. } => (None, FarRow::of(FarOutcome::NoPath, &why)),
        OpenError::TimedOut(_) if path.is_none() => {
            (None, FarRow::of(FarOutcome::NoPath, &format!("none was found within {DEADLINE:?}")))
        }
        OpenError::TimedOut(why) => (path, FarRow::of(FarOutcome::Silent, &why)),
        OpenError::Busy(why) => (path, FarRow::of(FarOutcome::Busy, &why)),
        OpenError::Stopped => (None, FarRow::of(FarOutcome::NoTunnel, "")),
        OpenError::Protocol { why, .. } => (path, FarRow::of(FarOutcome::Misunderstood, &plain(&why))),
        // A far node says these of a target, and then there is an answer.
        OpenError::Refused(why) | OpenError::Unreachable(why) | OpenError::NotAllowed { rule: why } => {
            (path, FarRow::of(FarOutcome::Misunderstood, &why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_a_tunnel_nobody_is_asked() {
        let sight = Sight { through: crate::proxy::Through::default(), relays: std::sync::Arc::default() };
        let endpoint = "10.244.1.7:8080".parse().unwrap();
        let mut crossings = [Crossing::new("edge2", endpoint, "198.18.0.5:8080".parse().unwrap())];
        sight.follow(model::Protocol::Tcp, &mut crossings).await;
        assert_eq!((crossings[0].far.outcome, &crossings[0].path), (FarOutcome::NoTunnel, &None));
    }

    #[test]
    fn what_another_node_says_leaves_terminals_alone() {
        assert_eq!(plain("not \u{1b}[2Jan\nendpoint"), "not ?[2Jan?endpoint");
        assert_eq!(plain(&"x".repeat(5000)).len(), 512);
    }

    #[test]
    fn silence_without_a_path_is_the_lack_of_one() {
        let row = PeerRow {
            node: "edge2".to_owned(),
            peer_id: String::new(),
            path: "lan".to_owned(),
            via: None,
            transport: "tcp".to_owned(),
            address: None,
            rtt_micros: None,
            streams: 0,
            sent_bytes: 0,
            received_bytes: 0,
            up_seconds: 0,
        };
        let silent = || OpenError::TimedOut("edge2 has not answered within 3s".to_owned());
        let (path, far) = unanswered(silent(), Some(row));
        assert_eq!((path.is_some(), far.outcome), (true, FarOutcome::Silent));
        let (path, far) = unanswered(silent(), None);
        assert_eq!((path, far.outcome, &*far.detail), (None, FarOutcome::NoPath, "none was found within 3s"));
    }
}
