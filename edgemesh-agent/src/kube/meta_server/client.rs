//! Requests to metaServer: JSON alone, a bound for each, and credentials read anew for each.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::{
    Request, Response, StatusCode, Uri,
    header::{ACCEPT, AUTHORIZATION, HeaderValue},
};
use kube::{Client, Config, client::Body};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};
use tracing::{info, warn};

use super::{
    answer,
    health::Report,
    refusal::{self, Claims, Token},
};
use crate::{
    config::{MetaServerConfig, MetaServerSecurity},
    kube::{
        Error,
        client::{build, chain},
        watch::limit::Limiter,
    },
};

/// More than 10,000 Services and 100,000 endpoints come to.
const MAX_LIST: usize = 256 << 20;
/// metaServer's own limit on a request is 3 MiB, etcd's on an object 1.5 MiB.
const MAX_LINE: usize = 8 << 20;
/// Of an answer that is not what was asked for.
const MAX_EXCUSE: usize = 64 << 10;
/// For files, which may be on something that hangs.
const READ: Duration = Duration::from_secs(5);

/// A client of one metaServer.
pub(super) struct MetaClient {
    url: String,
    security: Option<Arc<MetaServerSecurity>>,
    timeout: Duration,
    limiter: Limiter,
    connection: Mutex<Connection>,
}

/// What was made of the certificates, and of which.
struct Connection {
    client: Client,
    made_of: Material,
    /// Why the newest certificates cannot be used, where that has been said.
    unusable: Option<String>,
}

/// The files that a client is made of, as they are.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Material {
    authorities: Option<Vec<u8>>,
    identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// A request that came to nothing.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(super) enum Failure {
    #[error("{0}")]
    Unreachable(String),
    #[error("no complete answer within {0:?}")]
    Silent(Duration),
    #[error("the answer broke off: {0}")]
    Truncated(String),
    #[error("{code} {message}")]
    Status { code: u16, message: String, token: Token },
    #[error("the answer is {0}")]
    Unreadable(String),
}

impl Failure {
    /// What it says of metaServer when it was about `resource`.
    pub(super) fn report(&self, resource: &str, now: SystemTime) -> Report {
        match self {
            Self::Unreachable(_) | Self::Silent(_) => Report::Unreachable(self.to_string()),
            Self::Truncated(_) | Self::Unreadable(_) => Report::Wrong(self.to_string()),
            Self::Status { code, message, token } => match refusal::diagnose(*code, message, token, now) {
                Some(cause) => {
                    Report::Refused { said: self.to_string(), todo: refusal::remedy(cause, resource, token) }
                }
                None => Report::Wrong(self.to_string()),
            },
        }
    }

    /// The code it was answered with.
    pub(super) fn code(&self) -> Option<u16> {
        match self {
            Self::Status { code, .. } => Some(*code),
            Self::Unreachable(_) | Self::Silent(_) | Self::Truncated(_) | Self::Unreadable(_) => None,
        }
    }
}

/// A complete answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) body: Bytes,
    /// From the request to its last byte.
    pub(super) took: Duration,
}

/// The lines of a watch.
pub(super) struct Lines {
    body: Body,
    unread: BytesMut,
    /// So much of it has no line's end.
    searched: usize,
}

impl MetaClient {
    /// Reads certificates and keys, and makes a client of them.
    ///
    /// # Errors
    ///
    /// [`Error::MetaServer`] for those that are missing or not what they should be. metaServer is not asked yet.
    pub(super) fn new(config: &MetaServerConfig, limiter: Limiter) -> Result<Self, Error> {
        let failed = |cause| Error::MetaServer { server: config.server.clone(), cause };
        let security = config.security.clone().map(Arc::new);
        let made_of = security.as_deref().map_or_else(|| Ok(Material::default()), Material::read).map_err(failed)?;
        let client = connect(&config.server, security.as_deref(), &made_of).map_err(failed)?;
        Ok(Self {
            url: config.server.clone(),
            security,
            timeout: config.request_timeout,
            limiter,
            connection: Mutex::new(Connection { client, made_of, unusable: None }),
        })
    }

    /// Gets the whole of an answer.
    pub(super) async fn get(&self, path: &str) -> Result<Answer, Failure> {
        self.limiter.permit().await;
        let begun = Instant::now();
        let answered = async {
            let body = Limited::new(self.send(path).await?.into_body(), MAX_LIST);
            let body = body.collect().await.map_err(|error| {
                if error.downcast_ref::<LengthLimitError>().is_some() {
                    Failure::Unreadable(format!("longer than {} MiB", MAX_LIST >> 20))
                } else {
                    Failure::Truncated(chain(&*error))
                }
            })?;
            Ok(Answer { body: body.to_bytes(), took: begun.elapsed() })
        };
        timeout(self.timeout, answered).await.map_err(|_| Failure::Silent(self.timeout))?
    }

    /// Begins a watch.
    pub(super) async fn watch(&self, path: &str) -> Result<Lines, Failure> {
        self.limiter.permit().await;
        let response = timeout(self.timeout, self.send(path)).await.map_err(|_| Failure::Silent(self.timeout))??;
        Ok(Lines { body: response.into_body(), unread: BytesMut::new(), searched: 0 })
    }

    /// Gives an answer with code 200, whose body is still to come.
    async fn send(&self, path: &str) -> Result<Response<Body>, Failure> {
        let (client, token) = self.prepare().await;
        let mut request = Request::get(path)
            // A client that also takes protobuf would be given it by an API server, and by metaServer an error.
            .header(ACCEPT, HeaderValue::from_static("application/json"))
            .body(Body::empty())
            .map_err(|error| Failure::Unreachable(error.to_string()))?;
        let token = match token {
            None => Token::NotUsed,
            Some(Ok((header, claims))) => {
                request.headers_mut().insert(AUTHORIZATION, header);
                Token::Sent(claims)
            }
            Some(Err(cause)) => Token::Missing(cause),
        };
        let response = client.send(request).await.map_err(|error| Failure::Unreachable(chain(&error)))?;
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        let code = response.status().as_u16();
        let body = Limited::new(response.into_body(), MAX_EXCUSE).collect().await;
        let message = body.map_or_else(|_| String::new(), |body| answer::message(&body.to_bytes()));
        Err(Failure::Status { code, message, token })
    }

    /// The client, made anew where certificates have changed, and the token as it is now.
    ///
    /// A client that cannot be made leaves the last one in use: half a rotation is no reason to lose metaServer.
    async fn prepare(&self) -> (Client, Option<Result<Bearer, String>>) {
        let Some(security) = self.security.clone() else { return (self.connection.lock().await.client.clone(), None) };
        let files = Arc::clone(&security);
        let read = tokio::task::spawn_blocking(move || (Material::read(&files), read_token(&files.token_file)));
        let (material, token) = match timeout(READ, read).await {
            Ok(Ok(read)) => read,
            Ok(Err(error)) => (Err(error.to_string()), Err(error.to_string())),
            Err(_) => {
                let cause = format!("reading the files takes longer than {READ:?}");
                (Err(cause.clone()), Err(cause))
            }
        };
        let mut connection = self.connection.lock().await;
        let made = match material {
            Ok(material) if material == connection.made_of => Ok(None),
            Ok(material) => connect(&self.url, Some(&security), &material).map(|client| Some((client, material))),
            Err(cause) => Err(cause),
        };
        match made {
            Ok(None) => connection.unusable = None,
            Ok(Some((client, material))) => {
                info!(server = self.url, "the certificates for metaServer have changed and are used from now on");
                *connection = Connection { client, made_of: material, unusable: None };
            }
            Err(cause) => {
                if connection.unusable.as_ref() != Some(&cause) {
                    warn!(server = self.url, "cannot use the new certificates for metaServer: {cause}; using the last");
                    connection.unusable = Some(cause);
                }
            }
        }
        (connection.client.clone(), Some(token))
    }
}

impl Lines {
    /// The next line; None at the regular end. Nothing is lost where the future is dropped before it is ready.
    ///
    /// # Errors
    ///
    /// [`Failure::Truncated`] where the watch ends in the middle of a line, or its connection breaks.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        loop {
            let unsearched = self.unread.get(self.searched..).unwrap_or_default();
            if let Some(end) = unsearched.iter().position(|&byte| byte == b'\n') {
                let line = self.unread.split_to(self.searched + end + 1).freeze();
                self.searched = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(Some(line));
            }
            self.searched = self.unread.len();
            if self.searched > MAX_LINE {
                return Err(Failure::Unreadable(format!("a line longer than {} MiB", MAX_LINE >> 20)));
            }
            match self.body.frame().await {
                None if self.unread.iter().all(u8::is_ascii_whitespace) => return Ok(None),
                None => return Err(Failure::Truncated("it ends in the middle of an event".to_owned())),
                Some(Err(error)) => return Err(Failure::Truncated(chain(&error))),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.unread.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

impl Material {
    fn read(security: &MetaServerSecurity) -> Result<Self, String> {
        let authorities = match &*security.ca_files {
            [] => None,
            files => Some(read_first(files)?),
        };
        let identity = match &security.client {
            None => None,
            Some(pair) => match (read_file(&pair.certificate), read_file(&pair.key)) {
                (Ok(certificate), Ok(key)) => Some((certificate, key)),
                (Err(certificate), Err(key)) if pair.optional && certificate.is_missing() && key.is_missing() => None,
                (Err(unread), _) | (_, Err(unread)) => return Err(unread.to_string()),
            },
        };
        Ok(Self { authorities, identity })
    }
}

/// A file that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{}: {error}", path.display())]
struct Unread {
    path: PathBuf,
    error: io::Error,
}

impl Unread {
    fn is_missing(&self) -> bool {
        self.error.kind() == io::ErrorKind::NotFound
    }
}

fn read_file(path: &Path) -> Result<Vec<u8>, Unread> {
    fs::read(path).map_err(|error| Unread { path: path.to_owned(), error })
}

/// The first of these files that is there.
fn read_first(files: &[PathBuf]) -> Result<Vec<u8>, String> {
    let mut causes = Vec::new();
    for file in files {
        match read_file(file) {
            Ok(bytes) => return Ok(bytes),
            Err(unread) => {
                causes.push(unread.to_string());
                if !unread.is_missing() {
                    break;
                }
            }
        }
    }
    Err(causes.join(", and "))
}

/// The header that a token is sent in, and what it says for itself.
type Bearer = (HeaderValue, Claims);

fn read_token(path: &Path) -> Result<Bearer, String> {
    let bytes = read_file(path).map_err(|unread| unread.to_string())?;
    let wrong = || format!("{} holds no token", path.display());
    let token = str::from_utf8(&bytes).map_err(|_| wrong())?.trim();
    if token.is_empty() {
        return Err(wrong());
    }
    let mut header = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| wrong())?;
    header.set_sensitive(true);
    Ok((header, Claims::of(token)))
}

fn connect(url: &str, security: Option<&MetaServerSecurity>, material: &Material) -> Result<Client, String> {
    let uri: Uri = url.parse().map_err(|error| format!("{url:?} is no URL: {error}"))?;
    let mut config = Config::new(uri);
    if let Some(security) = security {
        let mut authorities = Vec::new();
        for certificate in CertificateDer::pem_slice_iter(material.authorities.as_deref().unwrap_or_default()) {
            let certificate = certificate.map_err(|error| format!("the CA's certificate is unusable: {error}"))?;
            authorities.push(certificate.to_vec());
        }
        config.accept_invalid_certs = security.ca_files.is_empty();
        if authorities.is_empty() && !config.accept_invalid_certs {
            return Err("there is no certificate in the CA's file".to_owned());
        }
        // Never None, for which the machine's own authorities would be trusted.
        config.root_cert = Some(authorities);
        if let (Some(pair), Some(_)) = (&security.client, &material.identity) {
            config.auth_info.client_certificate = Some(pair.certificate.to_string_lossy().into_owned());
            config.auth_info.client_key = Some(pair.key.to_string_lossy().into_owned());
        }
    }
    build(&config).map_err(|error| match &error {
        Error::Client { cause, .. } => cause.clone(),
        Error::Kubeconfig { .. }
        | Error::Master { .. }
        | Error::InCluster { .. }
        | Error::MetaServer { .. }
        | Error::Directory { .. }
        | Error::Inotify(_) => error.to_string(),
    })
}
