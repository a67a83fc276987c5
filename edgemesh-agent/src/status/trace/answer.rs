//! What a connection gets, in a sentence.

use super::Outcome;
use crate::{
    alias,
    dataplane::{Choice, ChosenBy, InForce, Share},
    model::NamespacedName,
    show,
};

/// What the sentence depends on.
pub(super) struct Grounds<'a> {
    pub(super) outcome: Outcome,
    pub(super) in_force: &'a InForce,
    pub(super) shares: &'a [Share],
    pub(super) choice: Option<Choice>,
    /// Whether the frontend has session affinity.
    pub(super) affine: bool,
    /// Whom the address, or the only backend in question, stands for.
    pub(super) target: Option<&'a alias::Target>,
    /// The Service whose the address is.
    pub(super) owner: Option<&'a NamespacedName>,
    /// Whether a client was named, and whether its sockets are translated.
    pub(super) client: Option<bool>,
    /// Whether 127.0.0.1 is another one than the host's.
    pub(super) own_loopback: bool,
    pub(super) is_off: bool,
}

pub(super) fn sentence(grounds: &Grounds<'_>) -> String {
    let Grounds { shares, choice, affine, client, .. } = *grounds;
    match grounds.outcome {
        Outcome::Forwarded => {
            let words = forwarded(shares, choice, affine, client.is_some());
            match grounds.target {
                Some(target) => {
                    format!("{words}; that is the alias of {}, reached by the tunnel", stands_for(target, ""))
                }
                None => words,
            }
        }
        Outcome::Carried => {
            let whose = grounds.target.map_or_else(
                || "an alias".to_owned(),
                |target| format!("the alias of {}", stands_for(target, "node ")),
            );
            format!("taken by this agent: it is {whose}, and is carried there by the tunnel")
        }
        Outcome::Refused => {
            let why = match (grounds.in_force, grounds.owner) {
                (InForce::Frontend { .. }, _) => "no endpoint is eligible".to_owned(),
                (_, Some(owner)) => format!("the address belongs to {owner}, which does not have this port"),
                (_, None) => "the address belongs to a Service, which does not have this port".to_owned(),
            };
            format!("refused at once (ECONNREFUSED; EPERM before Linux 5.18): {why}")
        }
        Outcome::Untouched if client == Some(false) => "left alone: the client's sockets are not translated".to_owned(),
        Outcome::Untouched if grounds.own_loopback => "left alone: 127.0.0.1 is the pod's own".to_owned(),
        Outcome::Untouched if grounds.is_off => {
            "left alone by this agent: modules.edgeProxy.enable is false".to_owned()
        }
        Outcome::Untouched => "left alone: it goes to the address itself, as it would without EdgeMesh".to_owned(),
    }
}

/// Which backend it is, and for how long.
fn forwarded(shares: &[Share], choice: Option<Choice>, affine: bool, known: bool) -> String {
    match (choice, shares) {
        (Some(Choice { backend, by: ChosenBy::Affinity { left } }), _) => format!(
            "sent to {backend}, where the client was before; kept there for {}, counted anew from each connection",
            show::seconds(left.as_secs())
        ),
        (Some(Choice { backend, by: ChosenBy::Hash }), _) => {
            format!("sent to {backend}, as every connection of this client is: the choice is by who it is")
        }
        (None, [only]) => format!("sent to {}, the only backend", only.backend),
        (None, _) => {
            let equal =
                shares.iter().all(|share| share.chance.to_bits() == shares.first().map_or(0, |s| s.chance.to_bits()));
            let count = shares.len();
            let chance =
                if equal { format!("each with a chance of 1/{count}") } else { "by the chances below".to_owned() };
            let more = match (affine, equal, known) {
                (true, _, true) => "; nothing is remembered of this client, and it then stays there",
                (true, _, false) => "; a client stays where it was (--from-pod says where that is)",
                (false, false, _) => "; each client has its own (--from-pod says which)",
                (false, true, _) => "",
            };
            format!("sent to one of {count} backends, {chance}{more}")
        }
    }
}

/// Whom an alias stands for; `kind` stands before the name of a pod's node.
fn stands_for(target: &alias::Target, kind: &str) -> String {
    if target.is_node() {
        format!("the node {} itself", target.node)
    } else {
        format!("{} on {kind}{}", target.addr, target.node)
    }
}
