//! HTTP: requests to what the world says.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderName};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::world::{Collection, Tell, World};
use super::{Door, Fault, Request, locked};

type Body = UnsyncBoxBody<Bytes, io::Error>;
type Response = hyper::Response<Body>;

/// The first byte of a TLS handshake.
const HANDSHAKE: u8 = 0x16;
/// How long a watch lasts that asks for nothing else (KubeEdge: 1800 to 3600 s).
const WATCH: Duration = Duration::from_secs(1800);

/// Serves until dropped, which closes all connections.
pub(super) async fn run(listener: TcpListener, acceptor: Option<TlsAcceptor>, world: Arc<Mutex<World>>) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                connections.spawn(connection(stream, acceptor.clone(), Arc::clone(&world)));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(mut stream: TcpStream, acceptor: Option<TlsAcceptor>, world: Arc<Mutex<World>>) {
    let Some(acceptor) = acceptor else { return http(stream, world).await };
    let mut first = [0];
    match stream.peek(&mut first).await {
        Ok(1) if first[0] == HANDSHAKE => {
            if let Ok(stream) = acceptor.accept(stream).await {
                http(stream, world).await;
            }
        }
        // As Go's net/http does.
        Ok(1) => {
            let answer = "HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n";
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
        Ok(_) | Err(_) => {}
    }
}

async fn http(stream: impl AsyncRead + AsyncWrite + Unpin, world: Arc<Mutex<World>>) {
    let service = service_fn(|request| {
        let world = Arc::clone(&world);
        async move { Ok::<_, Infallible>(answer(&request, &world).await) }
    });
    // Ends with the connection, whichever way that ends.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(request: &hyper::Request<Incoming>, world: &Arc<Mutex<World>>) -> Response {
    let path = request.uri().path().to_owned();
    let query = parse_query(request.uri().query().unwrap_or_default());
    let header =
        |name: HeaderName| request.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let token = header(AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer ").map(str::to_owned));
    let collection = parse_path(&path).filter(|_| request.method() == hyper::Method::GET);
    let watch = query.get("watch").is_some_and(|watch| watch == "true" || watch == "1");
    let verb = match collection {
        Some(_) if watch => "watch",
        Some(_) => "list",
        None => request.method().as_str(),
    };
    let resource = collection.as_ref().map_or(&path, |collection| &collection.resource).clone();
    let fields = parse_fields(query.get("fieldSelector").map_or("", String::as_str));
    let fault = {
        let mut world = locked(world);
        world.requests.push(Request {
            verb: verb.to_owned(),
            resource: resource.clone(),
            path: path.clone(),
            query: query.clone(),
            token: token.clone(),
            accept: header(ACCEPT),
        });
        if let Some(refusal) = refuse(&world, verb, &resource, &fields, token.as_deref()) {
            return refusal;
        }
        let fault = world.faults.get(&format!("{verb} {resource}")).or_else(|| world.faults.get(&format!("{verb} *")));
        fault.cloned()
    };
    let Some(collection) = collection else {
        return status(500, &format!("request[{path}::{}] isn't supported", verb.to_ascii_lowercase()));
    };
    let mut odd = false;
    match fault {
        Some(Fault::Status(code, message)) => return status(code, &message),
        Some(Fault::Garbage) => return bytes(200, Bytes::from_static(b"<html>Gateway</html>\n")),
        Some(Fault::Truncated) => return truncated(),
        Some(Fault::Silence) => std::future::pending().await,
        Some(Fault::Empty) => return json_answer(200, &locked(world).empty_list(&collection)),
        Some(Fault::EmptyOnline) => {
            let world = locked(world);
            let mut list = world.empty_list(&collection);
            list["metadata"] = json!({"resourceVersion": world.revision().to_string()});
            return json_answer(200, &list);
        }
        Some(Fault::Late(late)) => sleep(late).await,
        Some(Fault::OddItems) => odd = true,
        None => {}
    }
    if watch {
        return begin_watch(collection, fields, &query, world).await;
    }
    let answer = locked(world).list(&collection, &fields);
    sleep(answer.after).await;
    let mut body = answer.body;
    if odd && let Some(items) = body["items"].as_array_mut() {
        if let Some(first) = items.first_mut() {
            first["spec"] = json!("no spec");
            first["subsets"] = json!("no subsets");
        }
        items.push(json!({"metadata": {}}));
    }
    json_answer(200, &body)
}

fn refuse(
    world: &World,
    verb: &str,
    resource: &str,
    fields: &BTreeMap<String, String>,
    token: Option<&str>,
) -> Option<Response> {
    if let Door::Authorized { tokens } = &world.door {
        if let Some(message) = &world.unauthorized {
            return Some(status(401, message));
        }
        if !token.is_some_and(|token| tokens.iter().any(|known| known == token)) {
            return Some(status(401, "Unauthorized"));
        }
    }
    let but_for = world.forbidden.get(resource)?;
    // An authorizer takes a list by name for one of that name.
    if but_for.is_some() && fields.get("metadata.name") == but_for.as_ref() {
        return None;
    }
    let user = "system:serviceaccount:kubeedge:edgemesh-agent";
    let message = format!(
        "{resource} is forbidden: User \"{user}\" cannot {verb} resource \"{resource}\" in API group \"\" at the cluster scope"
    );
    Some(status(403, &message))
}

async fn begin_watch(
    collection: Collection,
    fields: BTreeMap<String, String>,
    query: &BTreeMap<String, String>,
    world: &Mutex<World>,
) -> Response {
    let seconds = query.get("timeoutSeconds").and_then(|seconds| seconds.parse().ok());
    let lasts = seconds.map_or(WATCH, Duration::from_secs);
    let (tell, told) = unbounded_channel();
    let wait = locked(world).watch(collection, fields, tell);
    sleep(wait).await;
    let end = tokio::time::Instant::now() + lasts;
    let frames = stream::unfold((told, false), move |(mut told, over)| async move {
        if over {
            return None;
        }
        let left = end.saturating_duration_since(tokio::time::Instant::now());
        let next = timeout(left, next(&mut told)).await.unwrap_or(Some(Tell::End));
        let (frame, over) = match next {
            Some(Tell::Event(event)) => (line(&event), false),
            Some(Tell::Raw(line)) => (Ok(Frame::data(Bytes::from(line))), false),
            Some(Tell::Break) => (Ok(Frame::data(Bytes::from_static(b"{\"type\":\"MODIFIED\",\"obj"))), true),
            Some(Tell::End | Tell::Silence) | None => {
                let message = "stop to watch sqlite/meta_v2";
                let stopped =
                    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": 500});
                (line(&json!({"type": "ERROR", "object": stopped})), true)
            }
        };
        Some((frame, (told, over)))
    });
    stream_answer(StreamBody::new(frames))
}

/// What is told next; nothing after a silence.
async fn next(told: &mut UnboundedReceiver<Tell>) -> Option<Tell> {
    match told.recv().await {
        Some(Tell::Silence) | None => std::future::pending().await,
        other => other,
    }
}

/// Half of something, and then an end that is none.
fn truncated() -> Response {
    let beginning = Ok(Frame::data(Bytes::from_static(b"{\"apiVersion\":\"v1\",\"items\":[{\"metadata\":{\"name\":")));
    let broken = Err(io::Error::from(io::ErrorKind::ConnectionReset));
    let frames = stream::unfold(vec![broken, beginning], |mut frames| async move {
        let frame = frames.pop()?;
        // Lest the end overtakes the beginning.
        sleep(Duration::from_millis(20)).await;
        Some((frame, frames))
    });
    stream_answer(StreamBody::new(frames))
}

fn stream_answer(body: impl hyper::body::Body<Data = Bytes, Error = io::Error> + Send + 'static) -> Response {
    let mut response = Response::new(body.boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
    response
}

fn line(event: &Value) -> io::Result<Frame<Bytes>> {
    Ok(Frame::data(Bytes::from(format!("{event}\n"))))
}

fn status(code: u16, message: &str) -> Response {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "code": code});
    json_answer(code, &status)
}

fn json_answer(code: u16, body: &Value) -> Response {
    bytes(code, Bytes::from(body.to_string()))
}

fn bytes(code: u16, body: Bytes) -> Response {
    let mut response = Response::new(Full::new(body).map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = hyper::StatusCode::from_u16(code).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
    response
}

/// `/api/v1/[namespaces/NS/]RESOURCE` and `/apis/GROUP/VERSION/[namespaces/NS/]RESOURCE`.
fn parse_path(path: &str) -> Option<Collection> {
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    let (group_version, rest) = match parts.as_slice() {
        ["api", version, rest @ ..] => ((*version).to_owned(), rest),
        ["apis", group, version, rest @ ..] => (format!("{group}/{version}"), rest),
        _ => return None,
    };
    let (namespace, resource) = match rest {
        ["namespaces", namespace, resource] => (Some((*namespace).to_owned()), resource),
        [resource] => (None, resource),
        _ => return None,
    };
    Some(Collection { group_version, resource: (*resource).to_owned(), namespace })
}

fn parse_query(query: &str) -> BTreeMap<String, String> {
    let decode = |text: &str| text.replace("%3D", "=").replace("%2C", ",");
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name.to_owned(), decode(value)))
        .collect()
}

fn parse_fields(selector: &str) -> BTreeMap<String, String> {
    selector
        .split(',')
        .filter_map(|pair| pair.split_once('='))
        .map(|(field, value)| (field.to_owned(), value.trim_start_matches('=').to_owned()))
        .collect()
}
