//! Says what of the DestinationRules in force has no effect.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::SystemTime,
};

use crate::{
    conditions::Conditions,
    model::{DestinationRule, NamespacedName},
};

const UNSUPPORTED: &str = "DestinationRuleUnsupported";
/// Where an Istio is installed there may be a rule for every Service; more conditions would bury all others.
const MAX_RULES: usize = 50;

type Unheeded = BTreeMap<NamespacedName, Arc<DestinationRule>>;

/// Raises a condition for each rule that asks for more than is done, and clears it again.
#[derive(Debug)]
pub(super) struct SightOfRules {
    conditions: Conditions,
    reported: Arc<Unheeded>,
}

impl SightOfRules {
    pub(super) fn new(conditions: Conditions) -> Self {
        Self { conditions, reported: Arc::default() }
    }

    /// Costs nothing while `unheeded` stays the same.
    pub(super) fn report(&mut self, unheeded: &Arc<Unheeded>, now: SystemTime) {
        if Arc::ptr_eq(unheeded, &self.reported) {
            return;
        }
        self.reported = Arc::clone(unheeded);
        // One rule may count for two Services.
        let rules: BTreeMap<&NamespacedName, &DestinationRule> =
            unheeded.values().map(|rule| (&rule.name, &**rule)).collect();
        let mut messages: BTreeMap<String, String> =
            rules.values().take(MAX_RULES).map(|rule| (rule.name.to_string(), message(rule))).collect();
        if let Some(more) = rules.len().checked_sub(MAX_RULES).filter(|&more| more > 0) {
            let message =
                format!("{more} more DestinationRules ask for what is not supported; `services` has a note at each");
            messages.insert(String::new(), message);
        }
        let subjects: BTreeSet<&str> = messages.keys().map(String::as_str).collect();
        self.conditions.retain(UNSUPPORTED, |subject| subjects.contains(subject));
        for (subject, message) in &messages {
            self.conditions.raise(UNSUPPORTED, subject.clone(), message.clone(), now);
        }
    }
}

fn message(rule: &DestinationRule) -> String {
    let fields: Vec<String> = rule.ignored.iter().map(ToString::to_string).collect();
    format!(
        "of DestinationRule {} these have no effect: {}; what else it says is in force, see `backends` of its Service; \
         docs/policies.md lists what is supported",
        rule.name,
        fields.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Ignored;

    fn rule(name: &str, field: &str) -> Arc<DestinationRule> {
        let mut rule = DestinationRule::new(NamespacedName::new("default", name));
        rule.ignored = vec![Ignored { field: field.into(), why: "not supported".into() }];
        Arc::new(rule)
    }

    fn shown(conditions: &Conditions) -> Vec<(String, String)> {
        conditions.list().into_iter().map(|condition| (condition.subject, condition.message)).collect()
    }

    fn report(sight: &mut SightOfRules, rules: &[(&str, &Arc<DestinationRule>)]) {
        let unheeded: Unheeded =
            rules.iter().map(|(of, rule)| (NamespacedName::new("default", *of), Arc::clone(rule))).collect();
        sight.report(&Arc::new(unheeded), SystemTime::UNIX_EPOCH);
    }

    #[test]
    fn a_rule_has_one_condition_for_as_long_as_it_asks_for_too_much() {
        let conditions = Conditions::default();
        let mut sight = SightOfRules::new(conditions.clone());
        let web = rule("web", "spec.trafficPolicy.tls");
        report(&mut sight, &[("web", &web), ("other", &web), ("api", &rule("api", "spec.x"))]);
        let [(first, _), (second, message)] = &shown(&conditions)[..] else { panic!("{:?}", shown(&conditions)) };
        assert_eq!((&**first, &**second), ("default/api", "default/web"));
        assert_eq!(
            message,
            "of DestinationRule default/web these have no effect: spec.trafficPolicy.tls (not supported); what else it \
             says is in force, see `backends` of its Service; docs/policies.md lists what is supported"
        );
        report(&mut sight, &[("other", &web)]);
        assert_eq!(shown(&conditions).len(), 1);
        report(&mut sight, &[]);
        assert_eq!(shown(&conditions), []);
    }

    #[test]
    fn so_many_rules_that_nobody_would_read_them_share_a_condition() {
        let conditions = Conditions::default();
        let mut sight = SightOfRules::new(conditions.clone());
        let names: Vec<String> = (0..MAX_RULES + 7).map(|n| format!("r{n:03}")).collect();
        let rules: Vec<Arc<DestinationRule>> = names.iter().map(|name| rule(name, "spec.x")).collect();
        let pairs: Vec<(&str, &Arc<DestinationRule>)> = names.iter().map(String::as_str).zip(&rules).collect();
        report(&mut sight, &pairs);
        let conditions = shown(&conditions);
        assert_eq!(conditions.len(), MAX_RULES + 1);
        assert!(conditions[0].0.is_empty() && conditions[0].1.starts_with("7 more DestinationRules"), "{conditions:?}");
    }
}
