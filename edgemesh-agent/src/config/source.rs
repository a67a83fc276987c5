//! Which source of Services and endpoints a configuration asks for.

use std::{fs, iter, path::PathBuf, time::Duration};

use super::{
    ClientCertificate, Environment, MetaServerConfig, MetaServerSecurity, SourceChoice, SourceKind, check::Findings,
    keys::MetaServerDraft,
};

const KUBE_CONFIG: &str = "kubeAPIConfig.kubeConfig";
const MASTER: &str = "kubeAPIConfig.master";
const STATIC_DIRECTORY: &str = "kubeAPIConfig.staticDirectory";
const SOURCE: &str = "kubeAPIConfig.source";
const SERVER: &str = "kubeAPIConfig.metaServer.server";
const REQUIRE_AUTHORIZATION: &str = "kubeAPIConfig.metaServer.security.requireAuthorization";
/// Signs metaServer's certificate from KubeEdge 1.17 on, as it signs the API server's.
const SERVICE_ACCOUNT_CA: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";

/// Chooses the source: a directory, else a kubeconfig or an API server's address, else what `source` says, and else, as
/// EdgeMesh's `DetectRunningMode` does, the cluster this pod runs in where `KUBERNETES_PORT` is set, and metaServer where it is not.
///
/// KubeEdge's edged gives its pods `KUBERNETES_SERVICE_HOST`, too (metaServer's address or nothing), so that variable
/// decides nothing.
///
/// Adds a problem where there are two sources at once, where the kubeconfig does not exist, and where a pod of the cluster does not know the API server's address.
pub(super) fn choose(findings: &mut Findings<'_>, environment: Environment) -> Option<SourceKind> {
    let draft = &findings.draft;
    let (path, master, directory) = (draft.kube_config.clone(), draft.master.clone(), draft.static_directory.clone());
    let (choice, meta_server) = (draft.source, draft.meta_server.clone());
    if let Some(directory) = directory {
        let others =
            [path.map(|_| KUBE_CONFIG), master.map(|_| MASTER), (choice != SourceChoice::Auto).then_some(SOURCE)];
        for key in others.into_iter().flatten() {
            findings.problem_with(key, format!("given together with {STATIC_DIRECTORY}; expected one of the two"));
        }
        return Some(SourceKind::Static { directory });
    }
    if let Some(path) = &path {
        // As EdgeMesh's validation.go has it: a wrong mount is to show here and not as a failure to connect.
        let problem = match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => Some(format!("{} is a directory", path.display())),
            Ok(_) => None,
            Err(error) => Some(format!("cannot look up {}: {error}", path.display())),
        };
        if let Some(problem) = problem {
            findings.problem_with(KUBE_CONFIG, format!("{problem}; expected the path of an existing kubeconfig"));
        }
    }
    if path.is_some() || master.is_some() {
        if choice != SourceChoice::Auto {
            let other = if path.is_some() { KUBE_CONFIG } else { MASTER };
            findings.problem_with(SOURCE, format!("given together with {other}; expected one of the two"));
        }
        return Some(SourceKind::Kubeconfig { path, master });
    }
    // A source that was given and refused is no missing source.
    if findings.problems.concern(&[KUBE_CONFIG, MASTER, STATIC_DIRECTORY, SOURCE]) {
        return None;
    }
    let at_edge = match choice {
        SourceChoice::Auto => !environment.kubernetes_port,
        SourceChoice::InCluster => false,
        SourceChoice::MetaServer => true,
    };
    if at_edge {
        return Some(SourceKind::MetaServer(read_meta_server(findings, meta_server, environment)));
    }
    if !environment.kubernetes_service_host {
        findings.problem_with(
            "kubeAPIConfig",
            format!(
                "no metadata source, as KUBERNETES_SERVICE_HOST is not set in this pod of the cluster; expected it, or \
                 {KUBE_CONFIG} (or {MASTER}), or {STATIC_DIRECTORY}, or {SOURCE}: metaServer"
            ),
        );
        return None;
    }
    Some(SourceKind::InCluster)
}

fn read_meta_server(findings: &mut Findings<'_>, draft: MetaServerDraft, environment: Environment) -> MetaServerConfig {
    let defaults = MetaServerDraft::default();
    let server = draft.server.or(defaults.server).unwrap_or_default();
    let server = server.trim_end_matches('/');
    let (scheme, address) = server.split_once("://").unwrap_or(("http", server));
    let mut secure = draft.require_authorization;
    if !secure && scheme.eq_ignore_ascii_case("https") {
        // metaServer has TLS under that gate and never without.
        findings.note_on(SERVER, format!("https, so taken as if {REQUIRE_AUTHORIZATION} were true"));
        secure = true;
    }
    if !secure && environment.kubernetes_service_host && !environment.kubernetes_port {
        let message = format!(
            "false, yet KUBERNETES_SERVICE_HOST is set, as KubeEdge does where metaServer wants TLS and a token; expected \
             true there, or {SOURCE}: inCluster if this is no node of KubeEdge"
        );
        findings.note_on(REQUIRE_AUTHORIZATION, message);
    }
    let security = secure.then(|| {
        let fallback = (draft.ca == defaults.ca).then(|| PathBuf::from(SERVICE_ACCOUNT_CA));
        let ca_files = if draft.insecure { Vec::new() } else { iter::once(draft.ca).chain(fallback).collect() };
        let optional = draft.certificate == defaults.certificate && draft.key == defaults.key;
        let client = ClientCertificate { certificate: draft.certificate, key: draft.key, optional };
        // EdgeMesh sends it in this case alone: who does not check the other side has no reason to prove his own.
        let client = (!draft.insecure || !optional).then_some(client);
        MetaServerSecurity { token_file: draft.token, ca_files, client }
    });
    MetaServerConfig {
        server: format!("{}://{address}", if secure { "https" } else { "http" }),
        security,
        relist_period: Duration::from_secs(draft.relist_period.into()),
        request_timeout: Duration::from_secs(draft.request_timeout.into()),
    }
}
