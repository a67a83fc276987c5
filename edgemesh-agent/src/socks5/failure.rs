//! Why a client does not get what it asks for, and what it is told.

use std::io;

use crate::proxy::Refusal;

/// Reply codes (RFC 1928 section 6).
pub(super) mod code {
    pub(in super::super) const SUCCEEDED: u8 = 0;
    pub(in super::super) const FAILED: u8 = 1;
    pub(in super::super) const NOT_ALLOWED: u8 = 2;
    pub(in super::super) const NETWORK_UNREACHABLE: u8 = 3;
    pub(in super::super) const HOST_UNREACHABLE: u8 = 4;
    pub(in super::super) const REFUSED: u8 = 5;
    /// What servers say of a time-out, as no other code is for it.
    pub(in super::super) const TTL_EXPIRED: u8 = 6;
    pub(in super::super) const COMMAND: u8 = 7;
    pub(in super::super) const ADDRESS_TYPE: u8 = 8;
}

/// Why a session comes to nothing.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum Failure {
    /// Nothing that a client of SOCKS would say.
    #[error("{0}")]
    Garbage(&'static str),
    /// The client went away in the middle of it.
    #[error("the client is gone: {0}")]
    CutOff(io::ErrorKind),
    /// It took too long to say what it wants.
    #[error("the client has not said what it wants in time")]
    Slow,
    /// It offers no method that is accepted here.
    #[error("the client offers no method of authentication that is accepted; {0}")]
    NoMethod(&'static str),
    #[error("user name or password is wrong")]
    WrongLogin,
    /// There is nothing to hold a login against.
    #[error("nobody can log in: {0}")]
    NoCredentials(String),
    /// `BIND`, or one that nobody knows.
    #[error("command {0} is not supported; CONNECT (1) and UDP ASSOCIATE (3) are")]
    Command(u8),
    #[error("addresses of type {0} are not supported")]
    AddressType(u8),
    /// A name, or an address for other sites, that nobody has.
    #[error("no node, Service or pod is known by it")]
    UnknownHost,
    /// Nobody has it so far, and the source has not told all.
    #[error("nothing is known by it so far, and the metadata source has not told all yet")]
    NotKnownYet,
    /// It is of the world outside.
    #[error("it is outside the mesh, where this proxy does not lead")]
    Outside,
    /// Sites repeat addresses.
    #[error("{0} nodes have that address, of other sites; use a name")]
    Ambiguous(usize),
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl Failure {
    /// All reasons, as metrics have them.
    pub(super) const REASONS: [&str; 19] = [
        "address_type",
        "ambiguous",
        "auth",
        "command",
        "cut_off",
        "failed",
        "garbage",
        "no_method",
        "no_path",
        "no_tunnel",
        "not_allowed",
        "not_known_yet",
        "outside",
        "overloaded",
        "refused",
        "slow",
        "timed_out",
        "unknown_host",
        "unreachable",
    ];

    /// One of [`Failure::REASONS`].
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Garbage(_) => "garbage",
            Self::CutOff(_) => "cut_off",
            Self::Slow => "slow",
            Self::NoMethod(_) => "no_method",
            Self::WrongLogin | Self::NoCredentials(_) => "auth",
            Self::Command(_) => "command",
            Self::AddressType(_) => "address_type",
            Self::UnknownHost | Self::Refused(Refusal::NoSuchAlias) => "unknown_host",
            Self::NotKnownYet => "not_known_yet",
            Self::Outside => "outside",
            Self::Ambiguous(_) => "ambiguous",
            Self::Refused(refusal) => match refusal {
                Refusal::Refused => "refused",
                Refusal::Unreachable => "unreachable",
                Refusal::NoPath => "no_path",
                Refusal::NotAllowed { .. } => "not_allowed",
                Refusal::TimedOut => "timed_out",
                Refusal::Overloaded => "overloaded",
                Refusal::NoTunnel => "no_tunnel",
                Refusal::NoSuchAlias => "unknown_host",
                Refusal::Failed(_) => "failed",
            },
        }
    }

    /// The reply; None where there is nobody to be told, or the client would take it for something else.
    pub(super) fn code(&self) -> Option<u8> {
        match self {
            Self::Garbage(_)
            | Self::CutOff(_)
            | Self::Slow
            | Self::NoMethod(_)
            | Self::WrongLogin
            | Self::NoCredentials(_) => None,
            Self::Command(_) => Some(code::COMMAND),
            Self::AddressType(_) => Some(code::ADDRESS_TYPE),
            Self::UnknownHost => Some(code::HOST_UNREACHABLE),
            Self::NotKnownYet | Self::Ambiguous(_) => Some(code::FAILED),
            Self::Outside => Some(code::NOT_ALLOWED),
            Self::Refused(refusal) => Some(match refusal {
                Refusal::Refused => code::REFUSED,
                Refusal::Unreachable | Refusal::NoPath | Refusal::NoSuchAlias => code::HOST_UNREACHABLE,
                Refusal::NotAllowed { .. } => code::NOT_ALLOWED,
                Refusal::TimedOut => code::TTL_EXPIRED,
                Refusal::NoTunnel => code::NETWORK_UNREACHABLE,
                Refusal::Overloaded | Refusal::Failed(_) => code::FAILED,
            }),
        }
    }

    /// Whether another address of the same name may do better.
    pub(super) fn is_of_one_address(&self) -> bool {
        match self {
            Self::Refused(refusal) => match refusal {
                Refusal::Refused
                | Refusal::Unreachable
                | Refusal::NoPath
                | Refusal::NotAllowed { .. }
                | Refusal::NoTunnel
                | Refusal::NoSuchAlias
                | Refusal::Failed(_) => true,
                // The time of all, and a limit for all.
                Refusal::TimedOut | Refusal::Overloaded => false,
            },
            Self::Garbage(_)
            | Self::CutOff(_)
            | Self::Slow
            | Self::NoMethod(_)
            | Self::WrongLogin
            | Self::NoCredentials(_)
            | Self::Command(_)
            | Self::AddressType(_)
            | Self::UnknownHost
            | Self::NotKnownYet
            | Self::Outside
            | Self::Ambiguous(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_has_a_reason_and_the_code_that_clients_know() {
        let rule = "no such port".to_owned();
        for (failure, reason, code) in [
            (Failure::UnknownHost, "unknown_host", Some(4)),
            (Refusal::NoPath.into(), "no_path", Some(4)),
            (Refusal::Unreachable.into(), "unreachable", Some(4)),
            (Refusal::NotAllowed { rule }.into(), "not_allowed", Some(2)),
            (Failure::Outside, "outside", Some(2)),
            (Refusal::Refused.into(), "refused", Some(5)),
            (Refusal::TimedOut.into(), "timed_out", Some(6)),
            (Refusal::NoTunnel.into(), "no_tunnel", Some(3)),
            (Failure::Command(2), "command", Some(7)),
            (Failure::AddressType(9), "address_type", Some(8)),
            (Refusal::Overloaded.into(), "overloaded", Some(1)),
            (Refusal::Failed(String::new()).into(), "failed", Some(1)),
            (Failure::Ambiguous(2), "ambiguous", Some(1)),
            (Failure::NotKnownYet, "not_known_yet", Some(1)),
            (Refusal::NoSuchAlias.into(), "unknown_host", Some(4)),
            (Failure::Garbage("x"), "garbage", None),
            (Failure::Slow, "slow", None),
            (Failure::CutOff(io::ErrorKind::UnexpectedEof), "cut_off", None),
            (Failure::NoMethod(""), "no_method", None),
            (Failure::WrongLogin, "auth", None),
        ] {
            assert_eq!((failure.reason(), failure.code()), (reason, code), "{failure}");
            assert!(Failure::REASONS.contains(&reason), "{reason}");
        }
        assert!(Failure::REASONS.is_sorted());
    }
}
