//! TLS 1.3 as libp2p wants it (<https://github.com/libp2p/specs/blob/master/tls/tls.md>), with the cipher that this machine
//! is fastest at.
//!
//! libp2p's own upgrade prefers ChaCha20-Poly1305 everywhere. With instructions for AES a core encrypts two to four times as
//! many bytes by AES-GCM; without, ChaCha20 wins by as much, so a server without them does not follow the client's order.
//! Certificates, their checks and the protocol's name are libp2p's: either end may be any other libp2p node.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use futures::{AsyncRead, AsyncWrite, FutureExt as _, future::BoxFuture};
use futures_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use libp2p::{
    PeerId,
    core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo},
    identity::Keypair,
    tls::certificate,
};
use rustls::{
    ClientConfig, CommonState, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
    SupportedCipherSuite,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{
        CryptoProvider,
        aws_lc_rs::{self, cipher_suite},
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};

const ALPN: &[u8] = b"libp2p";

/// Which ciphers come first.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::tunnel) enum Preference {
    /// AES-GCM.
    Aes,
    /// ChaCha20-Poly1305.
    ChaCha,
}

impl Preference {
    /// What suits this machine.
    pub(in crate::tunnel) fn of_this_machine() -> Self {
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        let aes = std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
        #[cfg(target_arch = "aarch64")]
        let aes = std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull");
        #[cfg(not(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")))]
        let aes = false;
        if aes { Self::Aes } else { Self::ChaCha }
    }

    fn suites(self) -> Vec<SupportedCipherSuite> {
        use cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256};
        match self {
            Self::Aes => vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256],
            Self::ChaCha => vec![TLS13_CHACHA20_POLY1305_SHA256, TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384],
        }
    }
}

/// Why an identity cannot be used for TLS.
#[derive(Debug, thiserror::Error)]
pub(in crate::tunnel) enum ConfigError {
    /// No certificate for it.
    #[error("could not make a certificate: {0}")]
    Certificate(#[from] certificate::GenError),
    /// The library refuses key or protocol.
    #[error("could not set up TLS: {0}")]
    Tls(#[from] Error),
}

/// Why a connection is not encrypted.
#[derive(Debug, thiserror::Error)]
pub(in crate::tunnel) enum UpgradeError {
    /// As the one that was called.
    #[error("TLS handshake of a caller: {0}")]
    Accept(#[source] std::io::Error),
    /// As the caller.
    #[error("TLS handshake: {0}")]
    Connect(#[source] std::io::Error),
    /// The handshake let pass what it should not have.
    #[error("the peer has no certificate of libp2p")]
    Certificate,
}

/// Upgrades connections to TLS 1.3.
#[derive(Clone)]
pub(in crate::tunnel) struct Config {
    client: TlsConnector,
    server: TlsAcceptor,
}

impl Config {
    /// TLS with a certificate, made anew, for an identity.
    ///
    /// # Errors
    ///
    /// The system has no random numbers, or the library lacks what TLS 1.3 needs.
    pub(in crate::tunnel) fn new(identity: &Keypair, preference: Preference) -> Result<Self, ConfigError> {
        let (certificate, key) = certificate::generate(identity)?;
        let provider = Arc::new(CryptoProvider { cipher_suites: preference.suites(), ..aws_lc_rs::default_provider() });
        let key = provider.key_provider.load_private_key(key)?;
        // The library's own check of key and certificate stumbles over the extension of libp2p, which is critical.
        let certified = Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![certificate], key)));

        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Verifier))
            .with_client_cert_resolver(Arc::clone(&certified) as Arc<_>);
        client.alpn_protocols = vec![ALPN.to_vec()];
        // All peers share one name, so a session would be offered to whoever comes next.
        client.resumption = Resumption::disabled();

        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::new(Verifier))
            .with_cert_resolver(certified);
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.send_tls13_tickets = 0;
        server.ignore_client_order = preference == Preference::ChaCha;
        Ok(Self { client: Arc::new(client).into(), server: Arc::new(server).into() })
    }
}

impl UpgradeInfo for Config {
    type Info = &'static str;
    type InfoIter = std::iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once("/tls/1.0.0")
    }
}

impl<C: AsyncRead + AsyncWrite + Send + Unpin + 'static> InboundConnectionUpgrade<C> for Config {
    type Output = (PeerId, TlsStream<C>);
    type Error = UpgradeError;
    type Future = BoxFuture<'static, Result<Self::Output, Self::Error>>;

    fn upgrade_inbound(self, socket: C, _: Self::Info) -> Self::Future {
        async move {
            let stream = self.server.accept(socket).await.map_err(UpgradeError::Accept)?;
            Ok((peer(stream.get_ref().1)?, TlsStream::Server(stream)))
        }
        .boxed()
    }
}

impl<C: AsyncRead + AsyncWrite + Send + Unpin + 'static> OutboundConnectionUpgrade<C> for Config {
    type Output = (PeerId, TlsStream<C>);
    type Error = UpgradeError;
    type Future = BoxFuture<'static, Result<Self::Output, Self::Error>>;

    fn upgrade_outbound(self, socket: C, _: Self::Info) -> Self::Future {
        async move {
            // An address rather than a name: the specification forbids a server name to be sent.
            let nobody = ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
            let stream = self.client.connect(nobody, socket).await.map_err(UpgradeError::Connect)?;
            Ok((peer(stream.get_ref().1)?, TlsStream::Client(stream)))
        }
        .boxed()
    }
}

/// Who is at the other end, by the certificate that the handshake has checked.
fn peer(state: &CommonState) -> Result<PeerId, UpgradeError> {
    match state.peer_certificates() {
        Some([only]) => Ok(certificate::parse(only).map_err(|_| UpgradeError::Certificate)?.peer_id()),
        Some(_) | None => Err(UpgradeError::Certificate),
    }
}

/// Takes the certificates of libp2p: one alone, signed by itself, in which an identity vouches for the key.
///
/// Whether that identity is the one that was dialled, libp2p's transport looks afterwards; whether it is a member's, the gate.
#[derive(Debug)]
struct Verifier;

impl Verifier {
    fn check(certificate: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Result<(), Error> {
        if !others.is_empty() {
            return Err(Error::General("the peer sent more than one certificate".to_owned()));
        }
        // Also looks at the signatures of both keys, and at the dates.
        certificate::parse(certificate)?;
        Ok(())
    }

    fn check_signature(
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        certificate::parse(certificate)?.verify_signature(signed.scheme, message, signed.signature())?;
        Ok(HandshakeSignatureValid::assertion())
    }

    fn schemes() -> Vec<SignatureScheme> {
        // Those that the specification lets a certificate have and libp2p can check, RSA last.
        vec![
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ED25519,
            SignatureScheme::RSA_PSS_SHA512,
            SignatureScheme::RSA_PSS_SHA384,
            SignatureScheme::RSA_PSS_SHA256,
            SignatureScheme::RSA_PKCS1_SHA512,
            SignatureScheme::RSA_PKCS1_SHA384,
            SignatureScheme::RSA_PKCS1_SHA256,
        ]
    }
}

/// TLS 1.2 is not offered, so nothing of it comes to be checked.
fn no_tls12() -> Error {
    Error::General("TLS 1.2 is not spoken here".to_owned())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Self::check(certificate, others).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Self::check(certificate, others).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::check_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

#[cfg(test)]
mod tests {
    use futures::{AsyncReadExt as _, AsyncWriteExt as _, future::join};
    use rustls::{CipherSuite, ProtocolVersion};

    use super::*;
    use crate::tunnel::tests::wire::Wire;

    async fn meet<F, N>(near: N, far: F) -> (Result<N::Output, N::Error>, Result<F::Output, F::Error>)
    where
        N: OutboundConnectionUpgrade<Wire, Info = &'static str>,
        F: InboundConnectionUpgrade<Wire, Info = &'static str>,
    {
        let (near_wire, far_wire) = Wire::pair();
        join(near.upgrade_outbound(near_wire, "/tls/1.0.0"), far.upgrade_inbound(far_wire, "/tls/1.0.0")).await
    }

    fn config(identity: &Keypair, preference: Preference) -> Config {
        Config::new(identity, preference).unwrap()
    }

    #[tokio::test]
    async fn both_learn_who_the_other_is_and_the_one_that_is_slow_at_aes_has_its_way() {
        use CipherSuite::{TLS13_AES_128_GCM_SHA256 as AES, TLS13_CHACHA20_POLY1305_SHA256 as CHACHA};
        use Preference::{Aes, ChaCha};
        let (near, far) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        for (client, server, suite) in
            [(Aes, Aes, AES), (Aes, ChaCha, CHACHA), (ChaCha, Aes, CHACHA), (ChaCha, ChaCha, CHACHA)]
        {
            let (met, called) = meet(config(&near, client), config(&far, server)).await;
            let ((far_id, mut stream), (near_id, mut other)) = (met.unwrap(), called.unwrap());
            assert_eq!((near_id, far_id), (near.public().to_peer_id(), far.public().to_peer_id()));
            let state = stream.get_ref().1;
            assert_eq!(state.negotiated_cipher_suite().unwrap().suite(), suite);
            assert_eq!(state.protocol_version(), Some(ProtocolVersion::TLSv1_3));
            assert_eq!(state.alpn_protocol(), Some(ALPN));
            stream.write_all(b"hello").await.unwrap();
            stream.flush().await.unwrap();
            let mut heard = [0; 5];
            other.read_exact(&mut heard).await.unwrap();
            assert_eq!(&heard, b"hello");
        }
    }

    #[tokio::test]
    async fn other_nodes_of_libp2p_are_understood_either_way() {
        let (ours, theirs) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let mine = || config(&ours, Preference::Aes);
        let libp2p = || libp2p::tls::Config::new(&theirs).unwrap();
        let (met, called) = meet(mine(), libp2p()).await;
        assert_eq!((met.unwrap().0, called.unwrap().0), (theirs.public().to_peer_id(), ours.public().to_peer_id()));
        let (met, called) = meet(libp2p(), mine()).await;
        assert_eq!((met.unwrap().0, called.unwrap().0), (ours.public().to_peer_id(), theirs.public().to_peer_id()));
    }

    /// A server whose certificate is `certificate`, and which signs with `key`.
    fn impostor(certificate: CertificateDer<'static>, key: &Keypair) -> TlsAcceptor {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let key = provider.key_provider.load_private_key(certificate::generate(key).unwrap().1).unwrap();
        let resolver = Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![certificate], key)));
        let builder = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]).unwrap();
        let mut server = builder.with_client_cert_verifier(Arc::new(Verifier)).with_cert_resolver(resolver);
        server.alpn_protocols = vec![ALPN.to_vec()];
        Arc::new(server).into()
    }

    #[tokio::test]
    async fn anothers_certificate_is_worth_nothing_without_its_key() {
        let (victim, thief) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let (stolen, _) = certificate::generate(&victim).unwrap();
        let (near, far) = Wire::pair();
        let ours = config(&Keypair::generate_ed25519(), Preference::Aes);
        let dialled = ours.upgrade_outbound(near, "/tls/1.0.0");
        let (met, _) = join(dialled, impostor(stolen, &thief).accept(far)).await;
        let error = met.err().expect("the handshake must fail").to_string();
        assert!(error.contains("signature") || error.contains("Signature"), "{error}");
    }

    #[test]
    fn certificates_that_are_not_of_libp2p_are_refused() {
        let (certificate, _) = certificate::generate(&Keypair::generate_ed25519()).unwrap();
        Verifier::check(&certificate, &[]).unwrap();
        Verifier::check(&certificate, std::slice::from_ref(&certificate)).unwrap_err();
        let bytes = certificate.to_vec();
        for at in (0..bytes.len()).step_by(7) {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(Verifier::check(&changed.into(), &[]).is_err(), "byte {at} may be changed");
        }
        Verifier::check(&CertificateDer::from(Vec::new()), &[]).unwrap_err();
    }

    #[tokio::test]
    async fn a_caller_without_a_certificate_is_refused() {
        let (near, far) = Wire::pair();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]).unwrap();
        let verifier = builder.dangerous().with_custom_certificate_verifier(Arc::new(Verifier));
        let mut client = verifier.with_no_client_auth();
        client.alpn_protocols = vec![ALPN.to_vec()];
        let nobody = ServerName::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let server = config(&Keypair::generate_ed25519(), Preference::Aes);
        let calls = TlsConnector::from(Arc::new(client));
        let (_, called) = join(calls.connect(nobody, near), server.upgrade_inbound(far, "/tls/1.0.0")).await;
        assert!(matches!(called, Err(UpgradeError::Accept(_))));
    }
}
