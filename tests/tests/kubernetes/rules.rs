//! DestinationRules: their CRD is absent, appears, is served in other versions, goes.

use std::time::Duration;

use anyhow::{Context as _, Result};
use edgemesh_tests::lab::eventually;
use serde_json::Value;

use crate::{Cluster, WEB, at, manifests, web};

/// The agent asks every minute whether the server has such rules by now.
const SEARCH: Duration = Duration::from_secs(75);
const RULE: &str = "
apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: { name: web, namespace: default }
spec: { host: web, trafficPolicy: { loadBalancer: { consistentHash: { useSourceIp: true } } } }
";

#[test]
fn destination_rules_are_followed_when_their_crd_appears_and_forgotten_when_it_goes() -> Result<()> {
    let Some(cluster) = Cluster::raise()? else { return Ok(()) };
    let crds = manifests("crds");
    let crds = crds.to_string_lossy();
    cluster.plane.kubectl(&["delete", "--ignore-not-found", "-f", &crds])?;
    cluster.apply(&web(WEB), &["a", "b", "c"])?;
    let agent = cluster.start_agent()?;
    agent.wait_ready(crate::START)?;
    cluster.expect_answers(at(WEB, 80)?, &["a", "b", "c"])?;
    cluster.expect_no_condition()?;

    cluster.plane.kubectl(&["apply", "-f", &crds])?;
    let established = ["wait", "--for=condition=established", "--timeout=20s", "-f", &crds];
    cluster.plane.kubectl(&established)?;
    cluster.plane.apply(RULE)?;
    eventually(SEARCH, "the rule is in force", || Ok(balance(&cluster)? == "source-ip"))?;
    assert_eq!(cluster.answers(at(WEB, 80)?)?.len(), 1, "one client, one endpoint");

    // Another version alone: the watch of the old one ends, and the rule stays.
    let patch = r#"[{"op": "replace", "path": "/spec/versions/0/served", "value": false}]"#;
    let crd = "customresourcedefinition/destinationrules.networking.istio.io";
    cluster.plane.kubectl(&["patch", crd, "--type=json", "-p", patch])?;
    cluster.plane.kubectl(&[
        "patch",
        "destinationrule.v1beta1.networking.istio.io/web",
        "--type=merge",
        "-p",
        RANDOM,
    ])?;
    eventually(SEARCH, "the changed rule is in force", || Ok(balance(&cluster)? == "random"))?;

    cluster.plane.kubectl(&["patch", "destinationrule.v1beta1.networking.istio.io/web", "--type=merge", "-p", HASH])?;
    eventually(SEARCH, "the rule is in force again", || Ok(balance(&cluster)? == "source-ip"))?;
    cluster.plane.kubectl(&["delete", "-f", &crds])?;
    eventually(2 * SEARCH, "the rule is forgotten", || Ok(balance(&cluster)? == "random"))?;
    cluster.expect_answers(at(WEB, 80)?, &["a", "b", "c"])?;
    cluster.expect_no_condition()
}

const RANDOM: &str = r#"{"spec": {"trafficPolicy": null}}"#;
const HASH: &str = r#"{"spec": {"trafficPolicy": {"loadBalancer": {"consistentHash": {"useSourceIp": true}}}}}"#;

/// How an endpoint of the Service `web` is chosen.
fn balance(cluster: &Cluster) -> Result<String> {
    let output = cluster.edge.cli(&["services", "-o", "json"])?;
    let rows: Value = serde_json::from_slice(&output.stdout).context("services are no JSON")?;
    let row = rows.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == "web"));
    let balance = row.and_then(|row| row["frontends"][0]["balance"].as_str());
    Ok(balance.context("there is no frontend of web")?.to_owned())
}
