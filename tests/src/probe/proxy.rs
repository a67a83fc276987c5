//! A userspace proxy: two connections and a copy between them. One of the two may be TLS, so that a pair of proxies carries
//! connections as a tunnel of two nodes does.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Context as _;
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::message::{Failure, Tls};
use crate::meta_server::pki;

/// Bytes that each direction of a connection may hold: some TLS records of 16 KiB.
const BUFFER: usize = 64 * 1024;
/// What the certificate is for, wherever the proxies are.
const NAME: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A proxy that listens.
pub(super) struct Proxy {
    listener: TcpListener,
    backend: SocketAddr,
    side: Side,
}

/// [`Tls`], with what it takes.
#[derive(Clone)]
enum Side {
    Neither,
    Accepted(TlsAcceptor),
    Dialled(TlsConnector),
}

impl Proxy {
    /// Listens on `listen`, for connections to `backend`.
    pub(super) async fn bind(listen: SocketAddr, backend: SocketAddr, tls: Tls) -> Result<Self, Failure> {
        let side = Side::new(tls).map_err(|error| Failure::other(format!("{error:#}")))?;
        let listener = TcpListener::bind(listen).await;
        let listener = listener.map_err(|error| Failure::from_io(&format!("listen on {listen}"), &error))?;
        Ok(Self { listener, backend, side })
    }

    /// The address that was bound.
    pub(super) fn address(&self) -> Result<SocketAddr, Failure> {
        self.listener.local_addr().map_err(|error| Failure::from_io("read the address of a listener", &error))
    }

    /// Carries each connection, until dropped.
    pub(super) async fn run(self) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept() => {
                    let Ok((stream, _)) = accepted else { continue };
                    let (backend, side) = (self.backend, self.side.clone());
                    // How a connection ends, its client sees.
                    connections.spawn(async move { carry(stream, backend, &side).await.is_ok() });
                }
                Some(_) = connections.join_next() => {}
            }
        }
    }
}

impl Side {
    fn new(tls: Tls) -> anyhow::Result<Self> {
        Ok(match tls {
            Tls::Neither => Self::Neither,
            Tls::Accepted => Self::Accepted(acceptor()?),
            Tls::Dialled => Self::Dialled(connector()?),
        })
    }
}

async fn carry(near: TcpStream, backend: SocketAddr, side: &Side) -> io::Result<()> {
    // Neither side may wait for more to send: small messages are what is carried.
    near.set_nodelay(true)?;
    let dial = async {
        let far = TcpStream::connect(backend).await?;
        far.set_nodelay(true).map(|()| far)
    };
    match side {
        Side::Neither => copy(near, dial.await?).await,
        Side::Accepted(acceptor) => {
            let near = acceptor.accept(near).await?;
            copy(near, dial.await?).await
        }
        Side::Dialled(connector) => copy(near, connector.connect(NAME.into(), dial.await?).await?).await,
    }
}

/// Copies both ways until both have ended; a reset of one side is passed on to the other.
async fn copy(mut near: impl Stream, mut far: impl Stream) -> io::Result<()> {
    let outcome = copy_bidirectional_with_sizes(&mut near, &mut far, BUFFER, BUFFER).await;
    if outcome.is_err() {
        near.tcp().set_zero_linger()?;
        far.tcp().set_zero_linger()?;
    }
    outcome.map(|_| ())
}

/// What can be copied from and to.
trait Stream: AsyncRead + AsyncWrite + Unpin {
    /// The socket below it.
    fn tcp(&self) -> &TcpStream;
}

impl Stream for TcpStream {
    fn tcp(&self) -> &TcpStream {
        self
    }
}

impl Stream for client::TlsStream<TcpStream> {
    fn tcp(&self) -> &TcpStream {
        self.get_ref().0
    }
}

impl Stream for server::TlsStream<TcpStream> {
    fn tcp(&self) -> &TcpStream {
        self.get_ref().0
    }
}

fn acceptor() -> anyhow::Result<TlsAcceptor> {
    let key = PrivateKeyDer::from_pem_file(pki("server.key")).context("could not read the server's key")?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .context("could not choose TLS 1.3")?
        .with_no_client_auth()
        .with_single_cert(vec![certificate("server.crt")?], key)
        .context("could not use the server's certificate")?;
    // Nobody would come back with one.
    config.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn connector() -> anyhow::Result<TlsConnector> {
    let mut authorities = RootCertStore::empty();
    authorities.add(certificate("ca.crt")?).context("could not use the test CA")?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .context("could not choose TLS 1.3")?
        .with_root_certificates(authorities)
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(TlsConnector::from(Arc::new(config)))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn certificate(name: &str) -> anyhow::Result<CertificateDer<'static>> {
    let path = pki(name);
    CertificateDer::from_pem_file(&path).with_context(|| format!("could not read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const ANY: SocketAddr = SocketAddr::new(NAME, 0);

    async fn started(backend: SocketAddr, tls: Tls, running: &mut JoinSet<()>) -> SocketAddr {
        let proxy = Proxy::bind(ANY, backend, tls).await.unwrap();
        let address = proxy.address().unwrap();
        running.spawn(proxy.run());
        address
    }

    #[tokio::test]
    async fn a_pair_of_proxies_carries_bytes_by_tls_and_a_reset_as_one() {
        let mut running = JoinSet::new();
        let (backend, between) = (TcpListener::bind(ANY).await.unwrap(), TcpListener::bind(ANY).await.unwrap());
        let far = started(backend.local_addr().unwrap(), Tls::Accepted, &mut running).await;
        let near = started(far, Tls::Dialled, &mut running).await;
        let mut client = TcpStream::connect(near).await.unwrap();
        client.write_all(b"hello").await.unwrap();
        let (mut server, _) = backend.accept().await.unwrap();
        let mut heard = [0; 5];
        server.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"hello");
        client.set_zero_linger().unwrap();
        drop(client);
        assert_eq!(server.read(&mut heard).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);

        // What lies between them is no plain text.
        let near = started(between.local_addr().unwrap(), Tls::Dialled, &mut running).await;
        let _client = TcpStream::connect(near).await.unwrap();
        let (mut server, _) = between.accept().await.unwrap();
        // The record of a TLS handshake (RFC 8446 section 5.1).
        assert_eq!(server.read_u8().await.unwrap(), 22);
    }
}
