//! `/v1/trace?to=TARGET&from=CLIENT`.

use std::path::PathBuf;

use http_body_util::Full;
use hyper::{Response, StatusCode, body::Bytes};
use tracing::warn;

use super::{Sight, json, text};
use crate::{
    net::client::{self, Client, Who},
    status::{self, Facts, Target},
};

/// The values of a query, which is made of characters that need no escape: `a=b&c=d`.
pub(super) fn parameter<'a>(query: Option<&'a str>, name: &str) -> Option<&'a str> {
    let mut parts = query.unwrap_or_default().split('&').filter_map(|part| part.split_once('='));
    parts.find(|(key, _)| *key == name).map(|(_, value)| value)
}

pub(super) async fn answer(query: Option<&str>, sight: &Sight) -> Response<Full<Bytes>> {
    let bad = |error: String| text(StatusCode::BAD_REQUEST, format!("{error}\n"));
    let target: Target = match parameter(query, "to").unwrap_or_default().parse() {
        Ok(target) => target,
        Err(error) => return bad(format!("{error}")),
    };
    let who = match parameter(query, "from").map(str::parse::<Who>).transpose() {
        Ok(who) => who,
        Err(error) => return bad(error.to_string()),
    };
    let table = std::sync::Arc::clone(&sight.tables.borrow());
    let at = match target.resolve(&table) {
        Ok(at) => at,
        Err(error @ status::Unresolved::Ambiguous { .. }) => return bad(error.to_string()),
        Err(error) => return text(StatusCode::NOT_FOUND, format!("{error}\n")),
    };
    let cgroup = sight.dataplane.as_ref().map_or_else(PathBuf::new, |dataplane| dataplane.cgroup.clone());
    let client = match who {
        Some(who) => match find(who.clone(), cgroup.clone()).await {
            Ok(client) => Some((who.to_string(), client)),
            Err(error) => return text(StatusCode::NOT_FOUND, format!("{error}\n")),
        },
        None => None,
    };
    let netns = client.as_ref().and_then(|(_, client): &(_, Client)| client.cookie);
    let kernel = match &sight.dataplane {
        Some(dataplane) => Some(dataplane.handle.inspect(at, netns).await.map_err(|error| error.to_string())),
        None => None,
    };
    let facts = Facts { table: &table, at, kernel, cgroup: cgroup.display().to_string(), client };
    let mut report = status::trace(facts);
    // It may have been replaced long before far nodes have answered.
    drop(table);
    if let Some(tunnel) = &sight.tunnel {
        tunnel.follow(at.protocol, &mut report.crossings).await;
    }
    json(&report)
}

/// Searches on a thread that may block.
pub(super) async fn find(who: Who, cgroup: PathBuf) -> Result<Client, String> {
    let found = tokio::task::spawn_blocking(move || client::find(&who, &cgroup)).await;
    match found {
        Ok(found) => found.map_err(|error| error.to_string()),
        Err(error) => {
            warn!("the search for a client failed: {error}");
            Err("the search for the client failed; see the agent's log".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_found_by_name() {
        let query = Some("to=[fd00::1]:80/udp&from=web-0");
        assert_eq!(parameter(query, "to"), Some("[fd00::1]:80/udp"));
        assert_eq!(parameter(query, "from"), Some("web-0"));
        assert_eq!(parameter(query, "other"), None);
        assert_eq!(parameter(None, "to"), None);
    }
}
