//! What was found, in words: what it means and what to do.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use super::proxies::Proxies;
use crate::dataplane::ebpf::hooks::{Foreign, Place, Survey};

/// A condition's subject and message.
type Held = (String, String);

/// How many programs or hooks one message names.
const NAMED: usize = 8;

/// Beginnings of the names of programs that others put on these hooks.
const OWNERS: [(&str, &str); 7] = [
    ("cil_", "Cilium"),
    ("sock4_", "Cilium"),
    ("sock6_", "Cilium"),
    ("calico_", "Calico"),
    ("cali_", "Calico"),
    ("cgroup_connect", "Kmesh"),
    ("mb_", "Merbridge"),
];

/// What can be told of a canary that failed, from the counters of its frontend before and after, and from the hooks.
pub(super) fn why(before: Option<u64>, after: Option<u64>, hooks: &Survey) -> String {
    let mut parts = Vec::new();
    if !hooks.detached.is_empty() {
        parts.push(format!("our programs are not attached to {}", hooks.detached.join(", ")));
    }
    parts.extend(match (before, after) {
        (Some(before), Some(after)) if after > before => Some(
            "our programs did translate its calls: what they sent on was lost or answered by somebody else".to_owned(),
        ),
        (Some(_), Some(_)) => Some("our programs translated none of its calls".to_owned()),
        _ => None,
    });
    if !hooks.foreign.is_empty() {
        let others: Vec<String> = hooks.foreign.iter().take(NAMED).map(placed).collect();
        parts.push(format!("programs of others: {}", others.join(", ")));
    }
    parts.join("; ")
}

/// Hooks that lack our program.
pub(super) fn detached(hooks: &Survey, cgroup: &Path) -> Option<String> {
    (!hooks.detached.is_empty()).then(|| {
        format!(
            "our programs are not attached to {} of cgroup {}: Services are not translated there; somebody detached \
             them, or removed their pins (`cleanup --force`); what was detached is attached again within a second, \
             after a removal restart the agent",
            hooks.detached.join(", "),
            cgroup.display()
        )
    })
}

/// Another agent of ours on the same cgroup: its programs have our names.
pub(super) fn another_agent(hooks: &Survey, cgroup: &Path) -> Vec<Held> {
    let same: Vec<&Foreign> = hooks.foreign.iter().filter(|foreign| is_agent(foreign)).collect();
    if same.is_empty() {
        return Vec::new();
    }
    let message = format!(
        "another edgemesh-agent, with pins elsewhere, serves processes of cgroup {} too ({}): each translates by its own \
         table, and the one that runs first decides; remove the other with `edgemesh-agent cleanup` under its \
         configuration",
        cgroup.display(),
        listed(&same)
    );
    vec![(String::new(), message)]
}

/// All other programs, those of one owner together.
pub(super) fn foreign(hooks: &Survey, cgroup: &Path) -> Vec<Held> {
    let mut owners: BTreeMap<String, Vec<&Foreign>> = BTreeMap::new();
    for foreign in hooks.foreign.iter().filter(|foreign| !is_agent(foreign)) {
        owners.entry(owner(foreign)).or_default().push(foreign);
    }
    let described = |(owner, programs): (String, Vec<&Foreign>)| {
        let anywhere = |wanted: fn(&Place) -> bool| programs.iter().any(|foreign| wanted(&foreign.place));
        let order = if anywhere(|place| matches!(place, Place::Before | Place::Below(_))) {
            "it runs before ours, so what it rewrites or refuses, ours never sees"
        } else if anywhere(|place| *place == Place::After) {
            "it runs after ours and sees the endpoints that ours chose"
        } else {
            "ours are not there"
        };
        let advice = match owner.as_str() {
            "Cilium" => "set socketLB.enabled=false and kubeProxyReplacement=false in Cilium",
            "Calico" => "set bpfConnectTimeLoadBalancing to Disabled in Calico's FelixConfiguration",
            _ => "see `bpftool cgroup tree`",
        };
        let message = format!(
            "another program is on the hooks of cgroup {}: {}; {order}. If Services do not work as they should, have one \
             of the two do the job: {advice}",
            cgroup.display(),
            listed(&programs)
        );
        (owner, message)
    };
    owners.into_iter().map(described).collect()
}

/// kube-proxy beside us, which is fine.
pub(super) fn kube_proxy(proxies: &Proxies) -> Vec<Held> {
    held(&proxies.kube_proxy, |found| {
        format!(
            "kube-proxy is on this node ({found}): no harm, as sockets of this node are translated before a packet \
             reaches its rules; what this agent does not translate remains kube-proxy's"
        )
    })
}

/// The predecessor beside us, which is not.
pub(super) fn edgemesh(proxies: &Proxies) -> Vec<Held> {
    held(&proxies.edgemesh, |found| {
        format!(
            "EdgeMesh (Go) is on this node ({found}): connections never reach its rules, so endpoints behind its tunnel \
             cannot be reached; remove its DaemonSet from this node, and if its chains stay, restart the node"
        )
    })
}

fn held(found: &[String], message: impl Fn(String) -> String) -> Vec<Held> {
    if found.is_empty() { Vec::new() } else { vec![(String::new(), message(found.join(", ")))] }
}

/// Its programs have the names of the hooks.
fn is_agent(foreign: &Foreign) -> bool {
    foreign.name == foreign.hook
}

fn owner(foreign: &Foreign) -> String {
    let known = OWNERS.iter().find(|(prefix, _)| foreign.name.starts_with(prefix));
    match known {
        Some((_, owner)) => (*owner).to_owned(),
        None if foreign.name.is_empty() => format!("program {}", foreign.id),
        None => foreign.name.clone(),
    }
}

fn listed(programs: &[&Foreign]) -> String {
    let all: BTreeSet<String> = programs.iter().map(|foreign| placed(foreign)).collect();
    let more = all.len().saturating_sub(NAMED);
    let mut text = all.into_iter().take(NAMED).collect::<Vec<_>>().join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

fn placed(foreign: &Foreign) -> String {
    let name = if foreign.name.is_empty() { "a program" } else { &foreign.name };
    let place = match &foreign.place {
        Place::Before => "before ours".to_owned(),
        Place::After => "after ours".to_owned(),
        Place::Below(cgroup) => format!("before ours, in {}", cgroup.display()),
        Place::Alone => "where ours is missing".to_owned(),
    };
    format!("{name} (id {}) on {} {place}", foreign.id, foreign.hook)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(id: u32, name: &str, hook: &'static str, place: Place) -> Foreign {
        Foreign { id, name: name.to_owned(), hook, place }
    }

    fn survey(foreign: Vec<Foreign>) -> Survey {
        Survey { foreign, detached: Vec::new() }
    }

    #[test]
    fn programs_of_one_owner_are_one_condition_that_says_who_runs_first() {
        let survey = survey(vec![
            program(1, "cil_sock4_conne", "connect4", Place::Before),
            program(2, "cil_sock6_conne", "connect6", Place::Before),
            program(3, "audit", "connect4", Place::After),
            program(4, "", "sendmsg4", Place::Below("/c/pod".into())),
        ]);
        let held = foreign(&survey, Path::new("/c"));
        assert_eq!(
            held.iter().map(|(subject, _)| subject.as_str()).collect::<Vec<_>>(),
            ["Cilium", "audit", "program 4"]
        );
        let [(_, cilium), (_, audit), (_, nameless)] = &held[..] else { panic!("{held:?}") };
        for part in ["cil_sock4_conne (id 1) on connect4 before ours", "socketLB", "runs before ours"] {
            assert!(cilium.contains(part), "{cilium}");
        }
        assert!(audit.contains("runs after ours"), "{audit}");
        assert!(nameless.contains("in /c/pod") && nameless.contains("runs before ours"), "{nameless}");
        assert!(another_agent(&survey, Path::new("/c")).is_empty());
    }

    #[test]
    fn another_agent_is_told_by_the_names_of_its_programs() {
        let survey = survey(vec![program(1, "connect4", "connect4", Place::After)]);
        assert!(foreign(&survey, Path::new("/c")).is_empty());
        let [(_, message)] = &another_agent(&survey, Path::new("/c"))[..] else { panic!("not one") };
        assert!(message.contains("id 1") && message.contains("/c"), "{message}");
    }

    #[test]
    fn the_reason_of_a_failed_canary_tells_untranslated_from_lost() {
        let nobody = Survey::default();
        assert!(why(Some(3), Some(3), &nobody).contains("translated none"));
        assert!(why(Some(3), Some(4), &nobody).contains("did translate"));
        assert_eq!(why(None, Some(4), &nobody), "");
        let gone = Survey { detached: vec!["connect4"], foreign: vec![program(9, "x", "connect4", Place::Alone)] };
        let reason = why(Some(3), Some(3), &gone);
        assert!(reason.contains("not attached to connect4") && reason.contains("x (id 9)"), "{reason}");
    }

    #[test]
    fn nothing_found_is_no_condition() {
        let (survey, proxies) = (Survey::default(), Proxies::default());
        let cgroup = Path::new("/c");
        assert!(foreign(&survey, cgroup).is_empty() && another_agent(&survey, cgroup).is_empty());
        assert!(detached(&survey, cgroup).is_none());
        assert!(kube_proxy(&proxies).is_empty() && edgemesh(&proxies).is_empty());
    }
}
