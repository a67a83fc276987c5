//! `/v1/events?for=SECONDS&service=NAMESPACE/NAME&from=CLIENT`: JSON, a line for each event, as they come.

use std::{convert::Infallible, sync::Arc, time::Duration};

use futures::stream::{self, BoxStream};
use http_body_util::{Either, StreamBody};
use hyper::{
    Response, StatusCode,
    body::{Bytes, Frame},
    header::{CONTENT_TYPE, HeaderValue},
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{Body, Sight, Stay, text, trace};
use crate::{
    dataplane::events::{Event, Heard, Listener},
    model::{NamespacedName, ServiceTable},
    net::client::{self, Who},
    status::{EventLine, EventRow, Services},
};

/// How long a stream may be asked to last.
pub const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// How many events are written together, when there are many.
const BATCH: usize = 256;
/// How often the network namespaces are looked through for one that is not known.
const LOOK: Duration = Duration::from_secs(5);

/// What a stream is made of.
pub(super) type Stream = StreamBody<BoxStream<'static, Result<Frame<Bytes>, Infallible>>>;

/// Which events are asked for.
#[derive(Debug)]
struct Question {
    last: Duration,
    service: Option<NamespacedName>,
    who: Option<Who>,
}

impl Question {
    fn parse(query: Option<&str>) -> Result<Self, String> {
        let last = match trace::parameter(query, "for").map(str::parse) {
            None => Duration::from_secs(60),
            Some(Ok(seconds)) => Duration::from_secs(seconds),
            Some(Err(_)) => return Err("'for' is no whole number of seconds".to_owned()),
        };
        if last > LONGEST {
            return Err(format!("events are not streamed for longer than {LONGEST:?}"));
        }
        let service = trace::parameter(query, "service").map(str::parse).transpose();
        let who = trace::parameter(query, "from").map(str::parse).transpose();
        Ok(Self {
            last,
            service: service.map_err(|error| format!("{error}"))?,
            who: who.map_err(|error: client::ParseWhoError| error.to_string())?,
        })
    }
}

pub(super) async fn answer(query: Option<&str>, sight: &Sight, stay: &Stay, stop: CancellationToken) -> Response<Body> {
    let refuse = |status, error: String| text(status, format!("{error}\n")).map(Either::Left);
    let question = match Question::parse(query) {
        Ok(question) => question,
        Err(error) => return refuse(StatusCode::BAD_REQUEST, error),
    };
    let Some(dataplane) = &sight.dataplane else {
        return refuse(StatusCode::NOT_FOUND, "modules.edgeProxy.enable is false: there are no events".to_owned());
    };
    let netns = match question.who {
        None => None,
        Some(who) => match trace::find(who, dataplane.cgroup.clone()).await.map(|client| client.cookie) {
            Ok(Some(cookie)) => Some(cookie),
            Ok(None) => {
                let error = "clients cannot be told apart before Linux 5.14; leave --from-pod out".to_owned();
                return refuse(StatusCode::NOT_FOUND, error);
            }
            Err(error) => return refuse(StatusCode::NOT_FOUND, error),
        },
    };
    let listener = match dataplane.events.as_ref().map(crate::dataplane::events::Events::listen) {
        Some(Ok(listener)) => listener,
        Some(Err(error)) => return refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        None => return refuse(StatusCode::NOT_FOUND, "this data plane writes no events".to_owned()),
    };
    stay.at_least(question.last);
    let lines = Lines {
        listener,
        tables: sight.tables.clone(),
        services: Services::default(),
        names: client::Names::new(),
        looked: None,
        service: question.service,
        netns,
        end: Instant::now() + question.last,
        stop,
    };
    let chunks = stream::unfold(lines, |mut lines| async move {
        let chunk = lines.next().await?;
        Some((Ok(Frame::data(Bytes::from(chunk))), lines))
    });
    let mut response = Response::new(Either::Right(StreamBody::new(Box::pin(chunks) as BoxStream<'static, _>)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    response
}

/// The state of one stream.
struct Lines {
    listener: Listener,
    tables: watch::Receiver<Arc<ServiceTable>>,
    services: Services,
    names: client::Names,
    /// When the names were looked up last.
    looked: Option<Instant>,
    service: Option<NamespacedName>,
    netns: Option<u64>,
    end: Instant,
    stop: CancellationToken,
}

impl Lines {
    /// Some lines together; None at the end.
    async fn next(&mut self) -> Option<String> {
        let mut text = String::new();
        while text.is_empty() {
            let mut heard = tokio::select! {
                () = self.stop.cancelled() => return None,
                () = tokio::time::sleep_until(self.end) => return None,
                heard = self.listener.next() => Some(heard?),
            };
            let table = Arc::clone(&self.tables.borrow());
            for _ in 0..BATCH {
                let Some(next) = heard.take().or_else(|| self.listener.try_next()) else { break };
                let line = match next {
                    Heard::Lost(lost) => Some(EventLine::Lost { lost }),
                    Heard::Event(event) => self.row(&event, &table).await.map(EventLine::Event),
                };
                if let Some(json) = line.and_then(|line| serde_json::to_string(&line).ok()) {
                    text.push_str(&json);
                    text.push('\n');
                }
            }
        }
        Some(text)
    }

    /// None where it is not asked for.
    async fn row(&mut self, event: &Event, table: &ServiceTable) -> Option<EventRow> {
        if self.netns.is_some_and(|netns| netns != event.netns) {
            return None;
        }
        let service = self.services.of(table, event.frontend).cloned();
        if self.service.is_some() && self.service != service {
            return None;
        }
        let is_due = self.looked.is_none_or(|looked| looked.elapsed() >= LOOK);
        if is_due && !self.names.contains_key(&event.netns) {
            match tokio::task::spawn_blocking(client::names).await {
                Ok(names) => self.names = names,
                Err(error) => warn!("the look through the network namespaces failed: {error}"),
            }
            self.looked = Some(Instant::now());
        }
        Some(EventRow::new(event, service.as_ref(), &self.names))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_bounded() {
        assert_eq!(Question::parse(None).unwrap().last, Duration::from_secs(60));
        let full = Question::parse(Some("for=5&service=default/web&from=10.244.1.5")).unwrap();
        assert_eq!(full.last, Duration::from_secs(5));
        assert_eq!(full.service, Some(NamespacedName::new("default", "web")));
        assert_eq!(full.who, Some(Who::Ip([10, 244, 1, 5].into())));
        for wrong in ["for=x", "for=-1", "for=86401", "service=web", "from=a/b"] {
            Question::parse(Some(wrong)).unwrap_err();
        }
    }
}
