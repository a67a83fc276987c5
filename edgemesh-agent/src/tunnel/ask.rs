//! The near side of questions: what would become of a stream, without opening one.

use std::time::{Duration, Instant};

use tokio::time::timeout_at;

use super::{
    Grounds, NodeName, OpenError, PeerView, Protocol, Target, Tunnel,
    open::{Answered, Wanted},
    wire::{Explanation, Response, Status},
};

/// What a far node says of a target.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The way by which it was asked, which a stream would take too.
    pub path: PeerView,
    /// What would become of a stream.
    pub fate: Fate,
    /// Why the target is allowed; empty where it is not, or nobody could say.
    pub grounds: Grounds,
    /// How long the target took to accept or to refuse; none where it was not tried.
    pub dial: Option<Duration>,
}

/// What would become of a stream, as the far node says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Fate {
    /// The target has accepted a connection, which was then closed.
    Connected,
    /// The far node would send there; datagrams cannot be tried.
    Allowed,
    /// The target refused the connection.
    Refused(String),
    /// The far node cannot reach the target.
    Unreachable(String),
    /// The target did not answer in time.
    TimedOut(String),
    /// The far node does not dial this target for others.
    NotAllowed {
        /// The rule, in its words.
        rule: String,
    },
    /// The far node has as many streams, or questions, as it takes.
    Busy(String),
    /// The far node runs an agent that knows no questions.
    TooOld,
}

impl Tunnel {
    /// Asks `node` what would become of a stream to `target`. It judges as for a stream, and connects to a TCP target for as
    /// long as that takes. Costs one round trip when the node is connected already, and connects it if not, as a stream
    /// would.
    ///
    /// # Errors
    ///
    /// [`OpenError`], within `deadline`, where there is no answer: `NoPath`, `TimedOut`, `Stopped`, `Busy` if this node has as
    /// many streams as one connection takes, or `Protocol`.
    pub async fn ask(
        &self,
        node: &NodeName,
        protocol: Protocol,
        target: impl Into<Target>,
        deadline: Duration,
    ) -> Result<Answer, OpenError> {
        let until = Instant::now() + deadline;
        let wanted = Wanted { protocol, target: target.into(), question: true };
        let answered = timeout_at(until.into(), self.try_paths(node, wanted, until)).await;
        let silent = |_| Err(OpenError::TimedOut(format!("{node} has not answered within {deadline:?}")));
        let Answered { response, path, .. } = answered.unwrap_or_else(silent)?;
        let path = path.view(node);
        understand(response, path).map_err(|why| OpenError::Protocol { node: node.clone(), why })
    }
}

fn understand(response: Response, path: PeerView) -> Result<Answer, String> {
    let status = response.status();
    let Response { detail, explanation, .. } = response;
    let fate = match status {
        Status::Connected => Fate::Connected,
        Status::Allowed => Fate::Allowed,
        Status::Refused => Fate::Refused(detail),
        Status::Unreachable => Fate::Unreachable(detail),
        Status::TimedOut => Fate::TimedOut(detail),
        Status::NotAllowed => Fate::NotAllowed { rule: detail },
        Status::Busy => Fate::Busy(detail),
        Status::Invalid if explanation.is_none() => Fate::TooOld,
        Status::Unknown | Status::Invalid => return Err(detail),
    };
    let Explanation { rule, services, dial_micros } = explanation.unwrap_or_default();
    let dial = dial_micros.map(Duration::from_micros);
    Ok(Answer { path, fate, grounds: Grounds { rule, services }, dial })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::{PathKind, Transport};

    fn said(status: Status, explanation: Option<Explanation>) -> Result<Answer, String> {
        let path = PeerView {
            node: "far".parse().unwrap(),
            peer_id: String::new(),
            path: PathKind::Lan,
            transport: Transport::Tcp,
            remote: None,
            rtt: None,
            streams: 0,
            sent_bytes: 0,
            received_bytes: 0,
            up: Duration::ZERO,
        };
        understand(Response { status: status.into(), detail: "words".to_owned(), explanation }, path)
    }

    #[test]
    fn an_agent_without_an_explanation_for_what_it_finds_invalid_is_too_old() {
        // As its `parse` has always answered a protocol that it does not know.
        assert_eq!(said(Status::Invalid, None).unwrap().fate, Fate::TooOld);
        // One that has read the question means something else by it: another node's name, perhaps.
        assert_eq!(said(Status::Invalid, Some(Explanation::default())).unwrap_err(), "words");
        assert_eq!(said(Status::Busy, None).unwrap().fate, Fate::Busy("words".to_owned()));
        assert!(said(Status::Unknown, None).is_err(), "of a later version");
    }

    #[test]
    fn an_explanation_is_handed_on_as_it_is() {
        let explanation =
            Explanation { rule: "a rule".to_owned(), services: vec!["a/b".to_owned()], dial_micros: Some(300) };
        let answer = said(Status::Connected, Some(explanation)).unwrap();
        assert_eq!((answer.fate, answer.dial), (Fate::Connected, Some(Duration::from_micros(300))));
        assert_eq!((&*answer.grounds.rule, &*answer.grounds.services), ("a rule", &["a/b".to_owned()][..]));
    }
}
