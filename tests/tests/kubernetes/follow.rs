//! Connections follow what kubectl does.

use anyhow::Result;
use edgemesh_tests::lab::{Transport, eventually};

use crate::{Cluster, FOLLOW, START, WEB, at, service, web};

#[test]
fn services_and_endpoints_that_kubectl_creates_scales_relabels_and_deletes_are_followed() -> Result<()> {
    let Some((cluster, agent)) = Cluster::with_agent()? else { return Ok(()) };
    let target = at(WEB, 80)?;
    cluster.expect_left_alone(target)?;

    // Created, scaled up, down, and to nothing.
    cluster.apply(&web(WEB), &["a"])?;
    cluster.expect_answers(target, &["a"])?;
    cluster.apply(&web(WEB), &["a", "b", "c"])?;
    cluster.expect_answers(target, &["a", "b", "c"])?;
    cluster.apply(&web(WEB), &["b"])?;
    cluster.expect_answers(target, &["b"])?;
    cluster.apply(&web(WEB), &[])?;
    cluster.expect_refused(target)?;
    cluster.apply(&web(WEB), &["a", "b"])?;
    cluster.expect_answers(target, &["a", "b"])?;

    // An endpoint that is not ready any more, and again.
    let mut endpoints = cluster.endpoints(&["a", "b"]);
    endpoints[0] = endpoints[0].clone().conditions(false, false, false);
    cluster.plane.apply(&cluster.plane.endpoints_yaml(&web(WEB), &endpoints)?)?;
    cluster.expect_answers(target, &["b"])?;

    // Another port, and a second one.
    cluster.plane.kubectl(&["patch", "service", "web", "--type=json", "-p", PORT_81])?;
    cluster.expect_answers(at(WEB, 81)?, &["b"])?;
    cluster.expect_refused(target)?;
    cluster.plane.kubectl(&["patch", "service", "web", "--type=json", "-p", PORT_80])?;
    let both = web(WEB).port("udp", Transport::Udp, 53, 7002);
    cluster.apply(&both, &["a"])?;
    cluster.expect_answers(target, &["a"])?;
    eventually(FOLLOW, "UDP to be served", || Ok(cluster.client.udp(at(WEB, 53)?)?.name == "a"))?;

    // The label by which EdgeMesh leaves a Service to others.
    let label = "service.edgemesh.kubeedge.io/service-proxy-name";
    cluster.plane.kubectl(&["label", "service", "web", &format!("{label}=other")])?;
    cluster.expect_left_alone(target)?;
    cluster.plane.kubectl(&["label", "service", "web", &format!("{label}-")])?;
    cluster.expect_answers(target, &["a"])?;

    // Deleted, while other Services stay; and the address taken by another one.
    let other = "10.96.0.81";
    cluster.apply(&service("other", other), &[])?;
    cluster.expect_refused(at(other, 80)?)?;
    cluster.plane.delete("web")?;
    cluster.expect_left_alone(target)?;
    cluster.plane.delete("other")?;
    cluster.apply(&web(other), &["c"])?;
    cluster.expect_answers(at(other, 80)?, &["c"])?;

    // Kubernetes' own Service leads to the server, in the pod, too.
    eventually(START, "the API server to answer as a Service", || {
        Ok(cluster.client.connect(at("10.96.0.1", 443)?).is_ok_and(|attempt| attempt != crate::refused()))
    })?;
    cluster.expect_no_condition()?;
    assert!(agent.stop()?.success(), "{}", agent.log()?);
    Ok(())
}

const PORT_80: &str = r#"[{"op": "replace", "path": "/spec/ports/0/port", "value": 80}]"#;
const PORT_81: &str = r#"[{"op": "replace", "path": "/spec/ports/0/port", "value": 81}]"#;
