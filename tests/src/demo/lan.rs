//! One LAN: nodes whose pods reach each other directly, so that all that Services need is the kernel's choice.

use anyhow::Result;

use super::check;
use super::example::Examples;
use super::scene::Scene;
use super::table::Table;
use crate::lab::Lab;

/// Raises the two nodes, and tries every Service of the examples from a pod and from the host.
pub(super) fn show(examples: &Examples) -> Result<(Scene, Table)> {
    let lab = Lab::new()?;
    let lan = lab.site("lan", &["192.168.10.0/24", "fd00:192:168:10::/64"])?;
    let nodes = vec![
        lan.node("edge1", &["10.244.1.0/24", "fd00:10:244:1::/64"])?,
        lan.node("edge2", &["10.244.2.0/24", "fd00:10:244:2::/64"])?,
    ];
    let scene = Scene::raise(lab, nodes, examples, |_, options| Ok(options))?;
    let (client, host) = (scene.client("edge1")?, scene.node("edge1")?.host());
    let services = examples.services();
    let rows = services
        .iter()
        .flat_map(|service| check::rows(service, "pod", client))
        .chain(services.iter().flat_map(|service| check::rows(service, "host", host)))
        .chain(services.iter().map(|service| check::by_name(service, "pod", client)))
        .collect();
    let note = "connect(): median through the ClusterIP; direct: median to the pods themselves, taking turns";
    Ok((scene, Table { figures: ["connect()", "direct"], note, rows }))
}
