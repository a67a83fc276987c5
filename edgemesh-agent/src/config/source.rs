//! Which source of Services and endpoints a configuration asks for.

use std::fs;

use super::{Environment, SourceKind, check::Findings};

const KUBE_CONFIG: &str = "kubeAPIConfig.kubeConfig";
const MASTER: &str = "kubeAPIConfig.master";
const STATIC_DIRECTORY: &str = "kubeAPIConfig.staticDirectory";

/// Chooses the source: a directory, else a kubeconfig or an API server's address, else the cluster this pod runs in.
///
/// Adds a problem where there is none, where there are two at once, and where the kubeconfig does not exist.
pub(super) fn choose(findings: &mut Findings<'_>, environment: Environment) -> Option<SourceKind> {
    let draft = &findings.draft;
    let (path, master, directory) = (draft.kube_config.clone(), draft.master.clone(), draft.static_directory.clone());
    if let Some(directory) = directory {
        for key in [path.map(|_| KUBE_CONFIG), master.map(|_| MASTER)].into_iter().flatten() {
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
        return Some(SourceKind::Kubeconfig { path, master });
    }
    if environment.kubernetes_service_host {
        return Some(SourceKind::InCluster);
    }
    // A source that was given and refused is no missing source.
    if !findings.problems.concern(&[KUBE_CONFIG, MASTER, STATIC_DIRECTORY]) {
        let node = if environment.kubernetes_port {
            "KUBERNETES_PORT is set but KUBERNETES_SERVICE_HOST is not"
        } else {
            "this is no pod of a cloud node, and KubeEdge's metaServer is not in this version"
        };
        findings.problem_with(
            "kubeAPIConfig",
            format!(
                "no metadata source, as {node}; expected {KUBE_CONFIG} (or {MASTER}), or {STATIC_DIRECTORY}, or to run \
                 in a pod of the cluster, with KUBERNETES_SERVICE_HOST set"
            ),
        );
    }
    None
}
