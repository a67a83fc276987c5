//! `/v1/dns?name=NAME&type=TYPE&dnssec=true`.

use http_body_util::Full;
use hyper::{Response, StatusCode, body::Bytes};

use super::{Sight, json, text, trace::parameter};
use crate::dns::wire::{Name, rtype};

/// Answers a question as for a client, and says why so.
pub(super) async fn answer(query: Option<&str>, sight: &Sight) -> Response<Full<Bytes>> {
    let Some(dns) = &sight.dns else {
        return text(StatusCode::NOT_FOUND, "DNS is not answered on this node: modules.edgeDNS.enable is false\n");
    };
    let name: Name = match parameter(query, "name").unwrap_or_default().parse() {
        Ok(name) => name,
        Err(error) => return text(StatusCode::BAD_REQUEST, format!("this is no name: {error}\n")),
    };
    let Some(qtype) = rtype::parse(parameter(query, "type").unwrap_or("A")) else {
        return text(
            StatusCode::BAD_REQUEST,
            "this is no type of records; expected one such as A, AAAA, SRV or TYPE65\n",
        );
    };
    let dnssec_ok = parameter(query, "dnssec") == Some("true");
    json(&dns.explain(&name, qtype, dnssec_ok).await)
}
