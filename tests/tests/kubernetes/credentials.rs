//! Tokens and CAs that are replaced while the agent runs, as kubelet does it.

use anyhow::Result;
use edgemesh_tests::lab::eventually;

use crate::{Cluster, FOLLOW, WEB, account, at, web};

#[test]
fn a_token_that_is_replaced_on_disk_is_used_at_once() -> Result<()> {
    let Some((cluster, agent)) = Cluster::with_agent()? else { return Ok(()) };
    cluster.apply(&web(WEB), &["a"])?;
    cluster.expect_answers(at(WEB, 80)?, &["a"])?;
    // Tokens of an account that is deleted are refused, also when another of that name is made.
    let name = account().name;
    cluster.plane.kubectl(&["--namespace=kubeedge", "delete", "serviceaccount", &name])?;
    cluster.plane.kubectl(&["--namespace=kubeedge", "create", "serviceaccount", &name])?;
    // Watches that have begun go on; a restart ends them.
    cluster.plane.kill_server()?;
    cluster.plane.start_server()?;
    let message = cluster.expect_condition("ApiServerForbidden", "services")?;
    assert!(message.contains("401") && message.ends_with("check the token or client certificate it uses"), "{message}");
    assert_eq!(cluster.answers(at(WEB, 80)?)?.len(), 1, "what was learned before is served");

    cluster.plane.mount_credentials(&cluster.edge, &account())?;
    cluster.expect_no_condition()?;
    cluster.apply(&web(WEB), &["b"])?;
    cluster.expect_answers(at(WEB, 80)?, &["b"])?;
    assert!(agent.log()?.contains("the credentials for the API server have changed"));
    Ok(())
}

#[test]
fn a_ca_that_is_replaced_on_disk_is_trusted_at_once_and_no_other_is() -> Result<()> {
    let Some((cluster, _agent)) = Cluster::with_agent()? else { return Ok(()) };
    cluster.apply(&web(WEB), &["a"])?;
    cluster.expect_answers(at(WEB, 80)?, &["a"])?;
    cluster.plane.kill_server()?;
    cluster.plane.rotate_ca()?;
    cluster.plane.start_server()?;
    let mut message = String::new();
    eventually(crate::START, "the certificate to be refused", || {
        message = cluster.condition("ApiServerUnreachable", "")?.unwrap_or_default();
        Ok(message.to_lowercase().contains("certificate") && message.contains("UnknownIssuer"))
    })?;
    assert_eq!(cluster.answers(at(WEB, 80)?)?.len(), 1, "what was learned before is served");

    cluster.plane.mount_ca(&cluster.edge)?;
    eventually(FOLLOW, "the new CA is trusted", || Ok(cluster.condition("ApiServerUnreachable", "")?.is_none()))?;
    cluster.apply(&web(WEB), &["b"])?;
    cluster.expect_answers(at(WEB, 80)?, &["b"])
}
