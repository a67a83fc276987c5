//! Why a name is answered as it is, for `edgemesh-agent dns`.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{
    Dns,
    forward::Source,
    serve::Asked,
    wire::{CLASS_IN, Extended, MAX_TCP, Name, Opt, Query, ReadRecord, Records, Section, flag, rtype, u16_at},
};

/// The answer to a question, and where it comes from.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct DnsReport {
    /// With the dot at the end.
    pub name: String,
    /// `A`, `SRV`, `TYPE65`.
    pub qtype: String,
    /// `NOERROR`, `NXDOMAIN`, `SERVFAIL`, …
    pub rcode: String,
    /// Why the answer is not what it could be: `Stale Answer` and other extended errors (RFC 8914).
    pub extended: Option<String>,
    /// As in zone files.
    pub answers: Vec<String>,
    /// What the zone says; None where it is not asked (`cacheDNS`).
    pub zone: Option<ZoneRow>,
    /// The name outside that an ExternalName leads to.
    pub alias: Option<String>,
    /// Who was asked; None where the zone has the answer.
    pub forwarded: Option<ForwardedRow>,
}

/// The zone's part of a [`DnsReport`].
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ZoneRow {
    pub domain: String,
    /// What the name stands for: `service`, `endpoint`, `pod`, `foreign`, …
    pub subject: String,
    /// `answers`, `no-data`, `no-such-name`, `not-yet`, or `foreign` for what is not the zone's.
    pub outcome: String,
    /// `NAMESPACE/NAME`.
    pub services: Vec<String>,
    pub endpoints: Vec<NamedEndpointRow>,
}

/// An endpoint of a Service whose name is made of endpoints.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct NamedEndpointRow {
    pub address: IpAddr,
    /// Its own label below the Service.
    pub label: String,
    pub node: Option<String>,
    /// Whether it is in the answer.
    pub included: bool,
    /// Why it is or is not.
    pub reason: String,
}

/// The forwarder's part of a [`DnsReport`].
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct ForwardedRow {
    /// The stub domain that the name is in, `.` for none.
    pub domain: String,
    /// `cache`, an upstream's address, or `nobody`, where no upstream answered.
    pub from: String,
    /// Whether the answer is past its time, and given because no upstream answers.
    pub stale: bool,
    /// What the cache had before.
    pub cached: Option<CachedRow>,
    /// In the order in which they are asked.
    pub upstreams: Vec<UpstreamRow>,
}

/// What the cache had for a question.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct CachedRow {
    /// Seconds since it came from an upstream.
    pub age: u64,
    /// Seconds until it has to be asked again.
    pub remaining: u64,
    pub expired: bool,
}

/// An upstream.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct UpstreamRow {
    pub address: String,
    pub healthy: bool,
    /// Seconds.
    pub round_trip: Option<f64>,
}

impl Dns {
    /// Answers a question as for a client that speaks EDNS, asking upstreams if need be, and tells why it is answered so.
    ///
    /// With `dnssec_ok` as for one that wants DNSSEC's records: upstreams are asked for these, and the answer is kept
    /// beside the one for clients that do not.
    pub async fn explain(&self, name: &Name, qtype: u16, dnssec_ok: bool) -> DnsReport {
        let name = name.lowered();
        let zone = self.core.zone().map(|zone| {
            let explanation = zone.explain(name.as_wire(), qtype);
            ZoneRow {
                domain: zone.domain().to_string(),
                subject: word(&explanation.subject),
                outcome: word(&explanation.outcome),
                services: explanation.services,
                endpoints: explanation
                    .endpoints
                    .into_iter()
                    .map(|endpoint| NamedEndpointRow {
                        address: endpoint.ip,
                        label: endpoint.label,
                        node: endpoint.node,
                        included: endpoint.reason.included(),
                        reason: endpoint.reason.to_string(),
                    })
                    .collect(),
            }
        });
        let message = query(&name, qtype, dnssec_ok);
        let mut report = DnsReport {
            name: name.to_string(),
            qtype: rtype::name(qtype),
            rcode: "REFUSED".to_owned(),
            extended: None,
            answers: Vec::new(),
            zone,
            alias: None,
            forwarded: None,
        };
        // Types that are refused to everybody are refused here, too.
        if let Ok(query) = Query::parse(&message) {
            let mut out = vec![0; MAX_TCP];
            let asked = self.core.ask(&query, &mut out).await;
            out.truncate(asked.length);
            let records = Records::of(&out).into_iter().flatten();
            let opt = records.clone().find(|record| record.rtype == rtype::OPT);
            report.rcode = rcode(&out, opt.as_ref());
            report.extended = opt.as_ref().and_then(extended);
            let answers = records.filter(|record| record.section == Section::Answer);
            report.answers = answers.map(|record| record.to_string()).collect();
            report.alias = asked.alias.map(|name| name.to_string());
            report.forwarded = forwarded(asked);
        }
        report
    }
}

fn forwarded(asked: Asked) -> Option<ForwardedRow> {
    let (explanation, reply) = asked.forwarded?;
    let cached = explanation.cached.map(|cached| CachedRow {
        age: cached.age,
        remaining: cached.remaining,
        expired: cached.expired,
    });
    let upstreams = explanation.upstreams.into_iter().map(|upstream| UpstreamRow {
        address: upstream.address.to_string(),
        healthy: upstream.healthy,
        round_trip: upstream.round_trip,
    });
    Some(ForwardedRow {
        domain: explanation.domain,
        from: match reply.source() {
            Source::Cache => "cache".to_owned(),
            Source::Upstream(address) => address.to_string(),
            Source::None => "nobody".to_owned(),
        },
        stale: reply.stale(),
        cached,
        upstreams: upstreams.collect(),
    })
}

/// A query as a client with EDNS would send it.
fn query(name: &Name, qtype: u16, dnssec_ok: bool) -> Vec<u8> {
    let [rd_high, rd_low] = flag::RD.to_be_bytes();
    let mut message = vec![0, 0, rd_high, rd_low, 0, 1, 0, 0, 0, 0, 0, 1];
    message.extend_from_slice(name.as_wire());
    message.extend_from_slice(&qtype.to_be_bytes());
    message.extend_from_slice(&CLASS_IN.to_be_bytes());
    message.extend_from_slice(Opt::new(0, dnssec_ok, None).as_wire());
    message
}

/// The extended error in an OPT record, by its name.
fn extended(opt: &ReadRecord<'_>) -> Option<String> {
    const OPTION: u16 = 15;
    let mut options = opt.data;
    while let (Some(option), Some(length)) = (u16_at(options, 0), u16_at(options, 2)) {
        if option == OPTION {
            let code = u16_at(options, 4)?;
            let known = [Extended::Stale, Extended::StaleNxdomain, Extended::NoReachableAuthority];
            let known = known.into_iter().find(|known| *known as u16 == code);
            return Some(known.map_or_else(|| format!("extended error {code}"), |known| known.name().to_owned()));
        }
        options = options.get(4 + usize::from(length)..)?;
    }
    None
}

/// With the upper bits in the OPT record (RFC 6891 6.1.3).
fn rcode(response: &[u8], opt: Option<&ReadRecord<'_>>) -> String {
    let code = u16_at(response, 2).map_or(flag::RCODE, |flags| flags & flag::RCODE);
    let upper = opt.map_or(0, |opt| opt.ttl >> 24);
    let code = code | u16::try_from(upper << 4).unwrap_or_default();
    let known = ["NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED"].get(usize::from(code));
    known.map_or_else(|| format!("RCODE{code}"), |word| (*word).to_owned())
}

/// As it is serialized.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}
