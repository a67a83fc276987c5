//! HTTPS as metaServer has it: a certificate of the client is optional, and must be of the right CA if there is one
//! (`tls.VerifyClientCertIfGiven`).

use std::sync::Arc;

use anyhow::{Context as _, Result};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

use super::pki;

pub(super) fn acceptor() -> Result<TlsAcceptor> {
    let certificate = |name: &str| {
        let path = pki(name);
        CertificateDer::from_pem_file(&path).with_context(|| format!("could not read {}", path.display()))
    };
    let key = PrivateKeyDer::from_pem_file(pki("server.key")).context("could not read the server's key")?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut authorities = RootCertStore::empty();
    authorities.add(certificate("ca.crt")?).context("could not use the test CA")?;
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(authorities), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .context("could not verify clients by the test CA")?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("could not choose versions of TLS")?
        .with_client_cert_verifier(clients)
        .with_single_cert(vec![certificate("server.crt")?], key)
        .context("could not use the server's certificate")?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}
