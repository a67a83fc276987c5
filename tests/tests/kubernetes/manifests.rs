//! The manifests of this repository: accepted, sufficient, and not more than that.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use edgemesh_tests::lab::{agent::AgentOptions, eventually};
use serde::Deserialize as _;
use serde_json::{Value, json};

use crate::{Cluster, START, WEB, account, at, manifests, web};

#[test]
fn the_account_of_the_manifests_may_do_what_the_agent_does_and_nothing_else() -> Result<()> {
    let Some(cluster) = Cluster::raise()? else { return Ok(()) };
    let token = cluster.plane.token(&account())?;
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": { "namespace": "kubeedge" },
    });
    let review = cluster.plane.post(&token, "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", &review)?;
    let mut granted = BTreeSet::new();
    for rule in review["status"]["resourceRules"].as_array().context("a review without rules")? {
        for (group, resource, verb) in combinations(rule)? {
            // What Kubernetes grants every account: to ask what it may do.
            if group != "authorization.k8s.io" && group != "authentication.k8s.io" {
                granted.insert(format!("{verb} {resource}.{group}"));
            }
        }
    }
    let needed = RESOURCES.iter().flat_map(|resource| ["list", "watch"].map(|verb| format!("{verb} {resource}")));
    assert_eq!(granted, needed.collect());

    // And so it is, not only on paper.
    cluster.plane.kubectl_as(&token, &["get", "services", "--all-namespaces"])?;
    for forbidden in [
        &["get", "secrets", "--all-namespaces"][..],
        &["get", "configmaps", "--namespace=kubeedge"],
        &["get", "pods", "--all-namespaces"],
        &["get", "service", "kubernetes"],
        &["create", "namespace", "mine"],
        &["label", "node", "edge1", "mine=yes"],
        &["delete", "service", "kubernetes"],
    ] {
        let said = format!("{:#}", cluster.plane.kubectl_as(&token, forbidden).unwrap_err());
        assert!(said.contains("Forbidden") || said.contains("forbidden"), "{forbidden:?}: {said}");
    }
    Ok(())
}

#[test]
fn without_one_of_its_rights_the_agent_says_which_and_serves_what_it_can() -> Result<()> {
    let Some(cluster) = Cluster::raise()? else { return Ok(()) };
    cluster.apply(&web(WEB), &["a"])?;
    cluster.plane.apply(RULE)?;
    let role = cluster.plane.kubectl(&["get", "clusterrole", "edgemesh-agent", "-o", "json"])?;
    let role: Value = serde_json::from_str(&role)?;
    let rules = role["rules"].as_array().context("a role without rules")?;
    assert_eq!(rules.len(), RESOURCES.len());
    let unused = if cluster.plane.serves_slices()? { "endpoints." } else { "endpointslices.discovery.k8s.io" };
    for (index, rule) in rules.iter().enumerate() {
        let (group, resource, _) = combinations(rule)?.into_iter().next().context("a rule without anything")?;
        let name = format!("{resource}.{group}");
        let mut less = rules.clone();
        less.remove(index);
        cluster.plane.apply_object(&with_rules(&less))?;

        // Not what the last one knew: only what this one may read.
        let agent = cluster.start_agent_with(AgentOptions::default().set("commonConfig.metadataSnapshot", ""))?;
        let subject = name.trim_end_matches('.');
        if name == unused {
            agent.wait_ready(START)?;
            cluster.expect_no_condition()?;
        } else {
            let message = cluster.expect_condition("ApiServerForbidden", subject)?;
            let fix = format!("bind a ClusterRole that grants list and watch on {subject} to its account");
            assert!(message.contains("403") && message.ends_with(&fix), "{message}");
            let essential = ["services.", "endpoints.", "endpointslices.discovery.k8s.io"].contains(&name.as_str());
            if essential {
                assert_eq!(cluster.status()?["ready"], false, "without {subject} there is nothing to serve");
            } else {
                agent.wait_ready(START)?;
                cluster.expect_answers(at(WEB, 80)?, &["a"])?;
            }
        }
        // Given back while the agent runs.
        cluster.plane.apply_object(&with_rules(rules))?;
        agent.wait_ready(2 * START)?;
        eventually(2 * START, &format!("{subject} to be read"), || {
            Ok(cluster.condition("ApiServerForbidden", subject)?.is_none())
        })?;
        cluster.expect_answers(at(WEB, 80)?, &["a"])?;
        assert!(agent.stop()?.success());
        // Else what is in force could be what the last agent left.
        cluster.edge.cleanup()?;
    }
    Ok(())
}

#[test]
fn the_pod_of_the_manifests_has_the_capabilities_and_the_configuration_that_the_agent_needs() -> Result<()> {
    let Some(cluster) = Cluster::raise()? else { return Ok(()) };
    cluster.apply(&web(WEB), &["a"])?;
    let object = |kind: &str, name: &str| -> Result<Value> {
        let text = cluster.plane.kubectl(&["--namespace=kubeedge", "get", kind, name, "-o", "json"])?;
        Ok(serde_json::from_str(&text)?)
    };
    let pod = &object("daemonset", "edgemesh-agent")?["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let capabilities = &container["securityContext"]["capabilities"];
    assert_eq!(capabilities["drop"], json!(["ALL"]));
    let capabilities: Vec<String> = serde_json::from_value(capabilities["add"].clone())?;

    // The file as the pod gets it, with what is special about a node of the lab.
    let given = object("configmap", "edgemesh-agent-cfg")?["data"]["edgemesh-agent.yaml"].clone();
    let given: Value = serde_yaml::from_str(given.as_str().context("there is no edgemesh-agent.yaml")?)?;
    let mut options = cluster.plane.in_cluster(AgentOptions::default()).only(&capabilities);
    for module in ["edgeDNS", "edgeProxy", "edgeTunnel", "edgeCNI"] {
        for (key, value) in given["modules"][module].as_object().into_iter().flatten() {
            options = options.set(&format!("modules.{module}.{key}"), value.clone());
        }
    }
    // As at the edge, where it is on without being named; port 53 is one of those that need a capability.
    options = options.set("modules.edgeDNS.enable", true);
    cluster.plane.mount_credentials(&cluster.edge, &account())?;
    let agent = cluster.edge.start_agent(&options)?;
    agent.wait_ready(START)?;
    cluster.expect_answers(at(WEB, 80)?, &["a"])?;
    // The probes of the pod ask where the agent answers.
    let probe = &container["readinessProbe"]["httpGet"];
    let admin = format!("{}:{}", probe["host"].as_str().unwrap_or_default(), probe["port"]);
    assert_eq!(admin, edgemesh_tests::lab::agent::ADMIN);
    let status = cluster.status()?;
    assert_eq!(status["conditions"], json!([]), "nothing is missing: {status}");
    assert!(agent.stop()?.success());
    Ok(())
}

#[test]
fn applied_again_the_manifests_change_nothing_and_keep_the_secret() -> Result<()> {
    let Some(cluster) = Cluster::raise()? else { return Ok(()) };
    let psk = r#"{"stringData": {"psk": "kept"}}"#;
    let secret = ["--namespace=kubeedge", "secret", "edgemesh-agent-psk"];
    cluster.plane.kubectl(&[secret[0], "patch", secret[1], secret[2], "-p", psk])?;
    let (crds, agent) = (manifests("crds"), manifests("agent"));
    let again = cluster.plane.kubectl(&["apply", "-f", &crds.to_string_lossy(), "-f", &agent.to_string_lossy()])?;
    for line in again.lines() {
        assert!(line.ends_with(" unchanged"), "{again}");
    }
    let kept = cluster.plane.kubectl(&[secret[0], "get", secret[1], secret[2], "-o", "jsonpath={.data.psk}"])?;
    assert_eq!(kept, "a2VwdA==");
    // Rules of any Istio are stored in whatever version they come.
    for version in ["v1alpha3", "v1beta1", "v1"] {
        cluster.plane.apply(&RULE.replace("v1alpha3", version))?;
        let path = format!("destinationrules.{version}.networking.istio.io");
        let rule = cluster.plane.kubectl(&["get", &path, "web", "-o", "json"])?;
        let rule: Value = serde_json::from_str(&rule)?;
        assert_eq!(rule["spec"]["exportTo"], json!(["*"]), "a field of no interest here is kept");
    }
    Ok(())
}

#[test]
fn the_daemonset_takes_the_place_of_edgemeshs_and_keeps_nothing_of_it() -> Result<()> {
    let Some(cluster) = Cluster::raise()? else { return Ok(()) };
    let daemonset = ["--namespace=kubeedge", "daemonset", "edgemesh-agent"];
    cluster.plane.kubectl(&[daemonset[0], "delete", daemonset[1], daemonset[2]])?;
    // What matters of EdgeMesh's own (v1.17, build/agent/resources): names, labels, privilege and mounts.
    let labels = json!({ "k8s-app": "kubeedge", "kubeedge": "edgemesh-agent" });
    cluster.plane.apply_object(&json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": { "name": "edgemesh-agent", "namespace": "kubeedge", "labels": labels },
        "spec": {
            "selector": { "matchLabels": labels },
            "template": {
                "metadata": { "labels": labels },
                "spec": {
                    "hostNetwork": true,
                    "containers": [{
                        "name": "edgemesh-agent",
                        "image": "kubeedge/edgemesh-agent:v1.17.0",
                        "securityContext": { "privileged": true },
                        "env": [{ "name": "NAMESPACE", "value": "kubeedge" }],
                        "volumeMounts": [
                            { "name": "conf", "mountPath": "/etc/edgemesh/config" },
                            { "name": "psk", "mountPath": "/etc/edgemesh" },
                            { "name": "resolv", "mountPath": "/etc/resolv.conf" },
                        ],
                    }],
                    "volumes": [
                        { "name": "conf", "configMap": { "name": "edgemesh-agent-cfg" } },
                        { "name": "psk", "configMap": { "name": "edgemesh-agent-psk" } },
                        { "name": "resolv", "hostPath": { "path": "/etc/resolv.conf" } },
                    ],
                },
            },
        },
    }))?;
    let uid =
        || cluster.plane.kubectl(&[daemonset[0], "get", daemonset[1], daemonset[2], "-o", "jsonpath={.metadata.uid}"]);
    let before = uid()?;
    cluster.plane.kubectl(&["apply", "-f", &manifests("agent/05-daemonset.yaml").to_string_lossy()])?;
    assert_eq!(uid()?, before, "it is changed in place");
    let text = cluster.plane.kubectl(&[daemonset[0], "get", daemonset[1], daemonset[2], "-o", "json"])?;
    let pod = &serde_json::from_str::<Value>(&text)?["spec"]["template"]["spec"];
    let names = |list: &Value| -> BTreeSet<String> {
        let items = list.as_array().into_iter().flatten();
        items.filter_map(|item| item["name"].as_str().map(str::to_owned)).collect()
    };
    assert_eq!(pod["containers"][0]["securityContext"]["privileged"], Value::Null);
    let ours = BTreeSet::from(["bpffs", "cgroup", "config", "run", "state"].map(str::to_owned));
    assert_eq!(names(&pod["volumes"]), ours);
    assert_eq!(names(&pod["containers"][0]["volumeMounts"]), ours);
    assert_eq!(names(&pod["containers"][0]["env"]), BTreeSet::from(["NODE_NAME".to_owned()]));
    // /etc/edgemesh/psk: of two sources that have the file, kubelet takes the later.
    let sources = pod["volumes"].as_array().into_iter().flatten().find(|volume| volume["name"] == "config");
    let sources = sources.context("no volume of the configuration")?["projected"]["sources"].clone();
    let psk = |kind: &str| json!({ kind: { "name": "edgemesh-agent-psk", "optional": true } });
    let sources = sources.as_array().context("no sources")?;
    assert!(sources.ends_with(&[psk("configMap"), psk("secret")]), "{sources:?}");
    Ok(())
}

/// What the agent reads.
const RESOURCES: [&str; 5] =
    ["services.", "endpointslices.discovery.k8s.io", "endpoints.", "nodes.", "destinationrules.networking.istio.io"];

const RULE: &str = "
apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: { name: web, namespace: default }
spec: { host: web, exportTo: ['*'], trafficPolicy: { loadBalancer: { simple: ROUND_ROBIN } } }
";

/// The agent's role with these rules.
fn with_rules(rules: &[Value]) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": { "name": "edgemesh-agent" }, "rules": rules,
    })
}

/// All that a rule of RBAC grants: groups, resources, verbs.
fn combinations(rule: &Value) -> Result<Vec<(String, String, String)>> {
    let texts = |field: &str| Vec::<String>::deserialize(&rule[field]).with_context(|| format!("{field} of {rule}"));
    let mut all = Vec::new();
    for group in texts("apiGroups")? {
        for resource in texts("resources")? {
            for verb in texts("verbs")? {
                all.push((group.clone(), resource.clone(), verb));
            }
        }
    }
    Ok(all)
}
