//! Why metaServer refuses a request, told by what it says and by what was sent. Pure.
//!
//! From KubeEdge 1.14 on the node itself judges a token (edgecore's `auth.go` and `claims.go`), and a 401 says nothing but
//! `Unauthorized`; before that the cloud did, and its words come through. So what the token says for itself is told, too.

use std::{fmt, time::SystemTime};

use serde_json::Value;

/// What was sent to prove who asks.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Token {
    /// Plain HTTP has none.
    NotUsed,
    /// There was none to send, and why.
    Missing(String),
    Sent(Claims),
}

/// What a ServiceAccount's token says for itself (RFC 7519); nothing of it is secret.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Claims {
    issuer: Option<String>,
    audiences: Vec<String>,
    /// Seconds since the Unix epoch.
    expires: Option<u64>,
    /// `system:serviceaccount:NAMESPACE:NAME`.
    subject: Option<String>,
}

/// What a refusal comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Cause {
    /// metaServer wants TLS, and was spoken to without.
    NotTls,
    TokenMissing,
    TokenExpired,
    Issuer,
    Audience,
    /// The node knows neither this token nor its account.
    Unknown,
    Rights,
    /// Refused without a word.
    Unsaid,
}

impl Claims {
    /// Reads a token; of one that is no JWT nothing is known.
    pub(super) fn of(token: &str) -> Self {
        let payload = token.split('.').nth(1).and_then(base64url);
        let Some(claims) = payload.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok()) else {
            return Self::default();
        };
        let text = |field: &str| claims[field].as_str().map(str::to_owned);
        let audiences = match &claims["aud"] {
            Value::String(one) => vec![one.clone()],
            Value::Array(several) => several.iter().filter_map(|one| one.as_str().map(str::to_owned)).collect(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => Vec::new(),
        };
        Self { issuer: text("iss"), audiences, expires: claims["exp"].as_u64(), subject: text("sub") }
    }

    fn is_expired(&self, now: SystemTime) -> bool {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.expires.is_some_and(|expires| expires <= now)
    }
}

impl fmt::Display for Claims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unknown = || "unknown".to_owned();
        let audiences = if self.audiences.is_empty() { unknown() } else { self.audiences.join(", ") };
        let (account, issuer) = (self.subject.clone(), self.issuer.clone());
        write!(
            f,
            "of {}, issuer {}, audience {audiences}",
            account.unwrap_or_else(unknown),
            issuer.unwrap_or_else(unknown)
        )
    }
}

/// Tells why a request was refused with 400, 401 or 403; None for a 400 of another kind.
pub(super) fn diagnose(code: u16, message: &str, token: &Token, now: SystemTime) -> Option<Cause> {
    let message = message.to_ascii_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
    match code {
        // Go's net/http.
        400 if says(&["http request to an https server"]) => Some(Cause::NotTls),
        403 => Some(Cause::Rights),
        401 => Some(match token {
            Token::NotUsed | Token::Missing(_) => Cause::TokenMissing,
            Token::Sent(claims) if says(&["expired"]) || claims.is_expired(now) => Cause::TokenExpired,
            Token::Sent(_) if says(&["issuer"]) => Cause::Issuer,
            Token::Sent(_) if says(&["audience"]) => Cause::Audience,
            Token::Sent(_) if says(&["not found", "not exist", "token lookup", "invalidated"]) => Cause::Unknown,
            Token::Sent(_) => Cause::Unsaid,
        }),
        _ => None,
    }
}

/// What to do about it, as the end of a message.
pub(super) fn remedy(cause: Cause, resource: &str, token: &Token) -> String {
    let told = match token {
        Token::Sent(claims) => format!(" (the token is {claims})"),
        Token::NotUsed | Token::Missing(_) => String::new(),
    };
    match cause {
        Cause::NotTls => "it wants TLS: set kubeAPIConfig.metaServer.security.requireAuthorization".to_owned(),
        Cause::TokenMissing => match token {
            Token::Missing(why) => format!(
                "no token was sent, as {why}; mount the ServiceAccount's token, or correct \
                 kubeAPIConfig.metaServer.security.tokenFile"
            ),
            Token::NotUsed | Token::Sent(_) => {
                "no token was sent; set kubeAPIConfig.metaServer.security.requireAuthorization".to_owned()
            }
        },
        Cause::TokenExpired => {
            format!("the token has expired{told}; check that edged renews it and that the node's clock is right")
        }
        Cause::Issuer => {
            format!("edgecore does not know the token's issuer{told}; add it to metaServer's serviceAccountIssuers")
        }
        Cause::Audience => {
            format!(
                "the token is not for this audience{told}; compare it with metaServer's apiAudiences, restart the pod"
            )
        }
        Cause::Unknown => format!(
            "edgecore knows neither token nor account{told}; only tokens of pods on this node count: restart the agent's \
             pod, and check cloudcore's policyController"
        ),
        Cause::Rights => {
            format!("bind a ClusterRole that grants list and watch on {resource} to the agent's ServiceAccount")
        }
        Cause::Unsaid => format!(
            "edgecore's log says why: issuer, audience, or a token that is not of a pod on this node{told}; restarting the \
             agent's pod gives it a new one"
        ),
    }
}

/// RFC 4648 section 5, without padding, as JWTs have it.
fn base64url(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3 + 2);
    let (mut bits, mut count) = (0_u32, 0);
    for c in text.trim_end_matches('=').bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        };
        (bits, count) = (bits << 6 | u32::from(value), count + 6);
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// `{"iss":"https://kubernetes.default.svc.cluster.local","aud":["kubeedge"],"exp":100,"sub":"system:serviceaccount:kubeedge:edgemesh-agent"}`
    const TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJodHRwczovL2t1YmVybmV0ZXMuZGVmYXVsdC5zdmMuY2x1c3Rlci5sb2NhbCIsImF1ZCI6WyJrdWJlZWRnZSJdLCJleHAiOjEwMCwic3ViIjoic3lzdGVtOnNlcnZpY2VhY2NvdW50Omt1YmVlZGdlOmVkZ2VtZXNoLWFnZW50In0.c2lnbmF0dXJl";

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn rule_8_what_a_token_says_for_itself_is_read_and_nothing_else_of_it_is_kept() {
        let claims = Claims::of(TOKEN);
        let text = "of system:serviceaccount:kubeedge:edgemesh-agent, issuer \
                    https://kubernetes.default.svc.cluster.local, audience kubeedge";
        assert_eq!(claims.to_string(), text);
        assert!(!format!("{claims:?}").contains("c2lnbmF0dXJl"), "a signature in {claims:?}");
        for garbage in ["", "a.b.c", "..", "x.é.y", "a.e30.c", "opaque"] {
            assert_eq!(Claims::of(garbage), Claims::default(), "{garbage}");
        }
        let one = Claims { audiences: vec!["api".to_owned()], ..Claims::default() };
        // {"aud":"api"}
        assert_eq!(Claims::of("h.eyJhdWQiOiJhcGkifQ.s"), one);
    }

    #[test]
    fn rule_8_tells_which_of_token_issuer_audience_and_rights_is_the_matter() {
        let (sent, missing) = (Token::Sent(Claims::of(TOKEN)), Token::Missing("/t: no such file".to_owned()));
        let unknown = "services is forbidden: User \"system:serviceaccount:kubeedge:edgemesh-agent\" cannot list";
        for (code, message, token, expected) in [
            (400, "Client sent an HTTP request to an HTTPS server.", &Token::NotUsed, Some(Cause::NotTls)),
            (400, "bad request", &Token::NotUsed, None),
            (401, "Unauthorized", &missing, Some(Cause::TokenMissing)),
            (401, "Unauthorized", &Token::NotUsed, Some(Cause::TokenMissing)),
            (401, "Unauthorized", &sent, Some(Cause::Unsaid)),
            (401, "token has expired", &sent, Some(Cause::TokenExpired)),
            (401, "[invalid bearer token, unknown issuer]", &sent, Some(Cause::Issuer)),
            (401, "token audiences [\"a\"] is invalid for the target audiences [\"b\"]", &sent, Some(Cause::Audience)),
            (401, "serviceaccount kubeedge/edgemesh-agent not found", &sent, Some(Cause::Unknown)),
            (403, unknown, &sent, Some(Cause::Rights)),
            (404, "not found", &sent, None),
            (500, "issuer", &sent, None),
        ] {
            assert_eq!(diagnose(code, message, token, at(99)), expected, "{code} {message} with {token:?}");
        }
        assert_eq!(diagnose(401, "Unauthorized", &sent, at(100)), Some(Cause::TokenExpired));
        assert_eq!(diagnose(401, "Unauthorized", &Token::Sent(Claims::default()), at(100)), Some(Cause::Unsaid));
    }

    #[test]
    fn rule_8_every_cause_has_a_remedy_that_can_be_followed() {
        let sent = Token::Sent(Claims::of(TOKEN));
        for (cause, token, part) in [
            (Cause::NotTls, &Token::NotUsed, "requireAuthorization"),
            (Cause::TokenMissing, &Token::Missing("/t: no such file".to_owned()), "/t: no such file"),
            (Cause::TokenMissing, &Token::NotUsed, "requireAuthorization"),
            (Cause::TokenExpired, &sent, "clock"),
            (Cause::Issuer, &sent, "issuer https://kubernetes.default.svc.cluster.local"),
            (Cause::Audience, &sent, "audience kubeedge"),
            (Cause::Unknown, &sent, "restart the agent's pod"),
            (Cause::Rights, &sent, "list and watch on nodes"),
            (Cause::Unsaid, &sent, "edgecore's log"),
        ] {
            let text = remedy(cause, "nodes", token);
            assert!(text.contains(part) && !text.contains("c2lnbmF0dXJl"), "{part} in {text}");
        }
    }
}
