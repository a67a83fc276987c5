//! Getting in: TLS, certificates and tokens.

use std::{
    fs,
    path::{Path, PathBuf},
};

use edgemesh_tests::meta_server::{pki, token};

use super::*;
use crate::config::ClientCertificate;

/// A directory with the files of a pod, as a kubelet mounts them.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// In one step, as mounts of Secrets and tokens change.
    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path("draft"), content).unwrap();
        fs::rename(self.path("draft"), self.path(name)).unwrap();
    }

    fn copy(&self, from: &str, to: &str) {
        self.write(to, fs::read(pki(from)).unwrap());
    }

    fn security(&self) -> MetaServerSecurity {
        MetaServerSecurity { token_file: self.path("token"), ca_files: vec![self.path("ca.crt")], client: None }
    }

    fn client(&self, optional: bool) -> Option<ClientCertificate> {
        Some(ClientCertificate { certificate: self.path("client.crt"), key: self.path("client.key"), optional })
    }
}

fn guarded(tokens: &[&str]) -> FakeMetaServer {
    let tokens = tokens.iter().map(|&token| token.to_owned()).collect();
    FakeMetaServer::start(TcpListener::bind("127.0.0.1:0").unwrap(), Door::Authorized { tokens }).unwrap()
}

fn secured(fake: &FakeMetaServer, security: MetaServerSecurity) -> MetaServerConfig {
    let server = format!("https://{}", fake.address());
    MetaServerConfig { server, security: Some(security), relist_period: OFTEN, request_timeout: PATIENCE }
}

/// A token of the agent's account that expires then; seconds since the Unix epoch.
fn account(expires: u64) -> String {
    token(&json!({
        "iss": "https://kubernetes.default.svc.cluster.local", "aud": ["https://kubernetes.default.svc.cluster.local"],
        "exp": expires, "sub": "system:serviceaccount:kubeedge:edgemesh-agent",
    }))
}

const FAR: u64 = 4_000_000_000;

#[tokio::test]
async fn https_with_a_token_and_a_verified_authority() {
    let (files, token) = (Files::new(), account(FAR));
    files.copy("ca.crt", "ca.crt");
    files.write("token", format!("{token}\n"));
    let fake = guarded(&[&token]);
    fake.put(service("a", 80));
    let mut bench = Bench::start_with(secured(&fake, files.security())).unwrap();
    bench.learns(&["Service shop/a:80"]).await;
    bench.well().await;
    fake.put(service("b", 80));
    bench.learns(&["Service shop/a:80", "Service shop/b:80"]).await;
    assert!(fake.requests().iter().all(|made| made.token.as_ref() == Some(&token)), "with every request, watches too");
}

#[tokio::test]
async fn https_without_verification_needs_no_authority() {
    let (files, token) = (Files::new(), account(FAR));
    files.write("token", &token);
    let fake = guarded(&[&token]);
    let mut bench =
        Bench::start_with(secured(&fake, MetaServerSecurity { ca_files: Vec::new(), ..files.security() })).unwrap();
    bench.until("it is in sync", |bench| bench.synced).await;
    bench.well().await;
}

#[tokio::test]
async fn https_with_a_client_certificate_sends_the_token_all_the_same() {
    let (files, token) = (Files::new(), account(FAR));
    for name in ["ca.crt", "client.crt", "client.key"] {
        files.copy(name, name);
    }
    files.write("token", &token);
    let fake = guarded(&[&token]);
    let security = MetaServerSecurity { client: files.client(false), ..files.security() };
    let mut bench = Bench::start_with(secured(&fake, security)).unwrap();
    bench.until("it is in sync", |bench| bench.synced).await;
    bench.well().await;
    // One of another authority is refused, until it is replaced.
    files.copy("other-client.crt", "client.crt");
    files.copy("other-client.key", "client.key");
    fake.end_watches();
    let condition = bench.condition(UNREACHABLE, "").await;
    assert!(condition.message.contains("compare its address and certificates"), "{condition:?}");
    files.copy("client.crt", "client.crt");
    files.copy("client.key", "client.key");
    bench.well().await;
}

#[tokio::test]
async fn the_authority_is_read_again_when_its_file_changes() {
    let (files, token) = (Files::new(), account(FAR));
    files.copy("other-ca.crt", "ca.crt");
    files.write("token", &token);
    let fake = guarded(&[&token]);
    let mut bench = Bench::start_with(secured(&fake, files.security())).unwrap();
    let condition = bench.condition(UNREACHABLE, "").await;
    assert!(condition.message.contains("certificate"), "{condition:?}");
    assert!(!condition.message.contains('\n'), "{condition:?}");
    files.copy("ca.crt", "ca.crt");
    bench.until("it is in sync", |bench| bench.synced).await;
    bench.well().await;
    // Half a rotation leaves what works in force.
    for broken in ["", "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n"] {
        files.write("ca.crt", broken);
        let lists = fake.count("list", "services");
        bench.until("it lists again", |_| fake.count("list", "services") > lists + 1).await;
        bench.well().await;
    }
}

#[tokio::test]
async fn rule_8_the_token_is_read_anew_for_each_request() {
    let (files, tokens) = (Files::new(), [account(FAR), account(FAR + 1)]);
    files.copy("ca.crt", "ca.crt");
    files.write("token", &tokens[0]);
    let fake = guarded(&[&tokens[0]]);
    let mut bench = Bench::start_with(secured(&fake, files.security())).unwrap();
    bench.until("it is in sync", |bench| bench.synced).await;
    files.write("token", &tokens[1]);
    fake.accept_tokens(&[&tokens[1]]);
    let lists = fake.count("list", "services");
    bench.until("it lists again", |_| fake.count("list", "services") > lists + 1).await;
    bench.well().await;
    assert_eq!(fake.requests().last().unwrap().token.as_ref(), Some(&tokens[1]));
}

#[tokio::test]
async fn rule_8_a_refusal_is_told_by_its_cause_and_passes_with_it() {
    let (files, good) = (Files::new(), account(FAR));
    files.copy("ca.crt", "ca.crt");
    files.write("token", &good);
    let fake = guarded(&[&good]);
    fake.put(service("a", 80));
    let mut bench = Bench::start_with(secured(&fake, files.security())).unwrap();
    bench.learns(&["Service shop/a:80"]).await;
    let missing = files.path("token").display().to_string();
    for (token, said, parts) in [
        (None, "Unauthorized", ["no token was sent, as", missing.as_str()]),
        (Some(account(1)), "Unauthorized", ["the token has expired", "clock"]),
        (
            Some(good.clone()),
            "Unauthorized",
            ["edgecore's log says why", "issuer https://kubernetes.default.svc.cluster.local"],
        ),
        (
            Some(good.clone()),
            "unknown issuer",
            ["serviceAccountIssuers", "system:serviceaccount:kubeedge:edgemesh-agent"],
        ),
        (Some(good.clone()), "token audience does not match", ["apiAudiences", "audience https://kubernetes"]),
        (
            Some(good.clone()),
            "serviceaccount kubeedge/edgemesh-agent not found",
            ["only tokens of pods on this node", "policyController"],
        ),
    ] {
        match &token {
            Some(token) => files.write("token", token),
            None => fs::remove_file(files.path("token")).unwrap(),
        }
        fake.refuse_tokens(said);
        // A request that was under way may be refused first, with the token that was there before.
        let told = |bench: &Bench| {
            let message =
                bench.conditions.list().into_iter().find(|c| c.reason == FORBIDDEN && c.subject == "services");
            message.map_or_else(String::new, |condition| condition.message)
        };
        let said = format!("401 {said}");
        bench
            .until(&format!("{said} is told with {parts:?}"), |bench| {
                [said.as_str()].iter().chain(&parts).all(|part| told(bench).contains(part))
            })
            .await;
        let condition = bench.condition(FORBIDDEN, "services").await;
        let signature = good.rsplit('.').next().unwrap();
        assert!(!condition.message.contains(signature), "{condition:?}");
        assert_eq!(bench.state.status().health, SourceHealth::Degraded);
        assert!(bench.knows(&["Service shop/a:80"]), "{:?}", bench.known);
        files.write("token", &good);
        fake.accept_tokens(&[&good]);
        bench.well().await;
    }
}

#[tokio::test]
async fn plain_http_to_a_meta_server_that_wants_tls_says_what_to_set() {
    let fake = guarded(&[]);
    let mut bench = Bench::start(&fake, OFTEN);
    let condition = bench.condition(FORBIDDEN, "services").await;
    assert!(condition.message.contains("400 Client sent an HTTP request to an HTTPS server."), "{condition:?}");
    assert!(condition.message.ends_with("set kubeAPIConfig.metaServer.security.requireAuthorization"), "{condition:?}");
}

#[tokio::test]
async fn tls_to_a_meta_server_without_it_is_unreachable() {
    let (fake, files) = (fake(), Files::new());
    files.copy("ca.crt", "ca.crt");
    let mut bench = Bench::start_with(secured(&fake, files.security())).unwrap();
    let condition = bench.condition(UNREACHABLE, "").await;
    assert!(!condition.message.contains('\n'), "{condition:?}");
}

#[tokio::test]
async fn files_that_are_missing_or_no_certificates_end_the_start_and_are_named() {
    let files = Files::new();
    let fake = fake();
    let refused = |security: MetaServerSecurity| match Bench::start_with(secured(&fake, security)) {
        Ok(_) => panic!("it started"),
        Err(error) => error.to_string(),
    };
    let error = refused(files.security());
    assert!(error.contains(&format!("{}: No such file", files.path("ca.crt").display())), "{error}");
    files.write("ca.crt", "nothing");
    assert!(refused(files.security()).contains("there is no certificate in the CA's file"));
    files.copy("ca.crt", "ca.crt");
    let named = MetaServerSecurity { client: files.client(false), ..files.security() };
    let error = refused(named.clone());
    assert!(error.contains("client.crt: No such file"), "{error}");
    // Half a pair is a mistake, too.
    files.copy("client.crt", "client.crt");
    for optional in [false, true] {
        let error = refused(MetaServerSecurity { client: files.client(optional), ..files.security() });
        assert!(error.contains("client.key: No such file"), "{error}");
    }
    files.write("client.key", "no key");
    assert!(refused(named).starts_with("cannot set up a client for metaServer at https://127.0.0.1:"));
    // The default pair may be missing, and the second authority stands in for the first.
    fs::remove_file(files.path("client.crt")).unwrap();
    fs::remove_file(files.path("client.key")).unwrap();
    let fallback = vec![Path::new("/nowhere/ca.crt").to_owned(), files.path("ca.crt")];
    let security = MetaServerSecurity { client: files.client(true), ca_files: fallback, ..files.security() };
    drop(Bench::start_with(secured(&fake, security)).unwrap());
}
