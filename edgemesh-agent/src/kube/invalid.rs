//! Objects that a server has but that cannot be used, wholly or in part, and the condition that says so.

use std::{collections::BTreeSet, time::SystemTime};

use kube::ResourceExt;
use tracing::debug;

use super::convert::{Convert, ConvertError};
use crate::{
    conditions::Conditions,
    model::{Kind, Object},
};

const INVALID: &str = "ObjectInvalid";
/// More of one kind would only bury the first ones.
const MAX_INVALID: usize = 100;

/// What is wrong with one object.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Problem {
    /// As [`subject`] has it.
    pub(super) subject: String,
    pub(super) text: String,
}

/// The objects of one kind whose condition holds. Dropping it clears them: whoever follows the kind next finds out anew.
#[derive(Debug)]
pub(super) struct Invalid {
    conditions: Conditions,
    subjects: BTreeSet<String>,
}

impl Invalid {
    pub(super) fn new(conditions: Conditions) -> Self {
        Self { conditions, subjects: BTreeSet::new() }
    }

    /// Raises or clears the condition of one object.
    pub(super) fn report(&mut self, subject: &str, problem: Option<&str>) {
        match problem {
            Some(problem) if self.subjects.contains(subject) || self.subjects.len() < MAX_INVALID => {
                let message = format!("cannot use all of {subject}: {problem}; correct the object");
                self.conditions.raise(INVALID, subject, message, SystemTime::now());
                self.subjects.insert(subject.to_owned());
            }
            Some(problem) => debug!(subject, problem, "cannot use all of an object"),
            None => {
                if self.subjects.remove(subject) {
                    self.conditions.clear(INVALID, subject);
                }
            }
        }
    }

    /// Has the condition hold of exactly these objects, as after a list.
    pub(super) fn replace(&mut self, problems: &[Problem]) {
        let stay: BTreeSet<&str> = problems.iter().map(|problem| problem.subject.as_str()).collect();
        let conditions = &self.conditions;
        self.subjects.retain(|subject| {
            let stays = stay.contains(subject.as_str());
            if !stays {
                conditions.clear(INVALID, subject);
            }
            stays
        });
        for Problem { subject, text } in problems {
            self.report(subject, Some(text));
        }
    }
}

impl Drop for Invalid {
    fn drop(&mut self) {
        for subject in &self.subjects {
            self.conditions.clear(INVALID, subject);
        }
    }
}

/// The object as far as it can be used, and what is wrong with it.
pub(super) fn convert<K: Convert + ResourceExt>(item: &K, kind: Kind) -> (Option<Object>, Option<Problem>) {
    let problem = |text| Problem { subject: subject(kind, item), text };
    match item.convert() {
        Ok(converted) => {
            let faults: Vec<String> = converted.faults.iter().map(ToString::to_string).collect();
            let problem = (!faults.is_empty()).then(|| problem(faults.join("; ")));
            (Some(converted.object), problem)
        }
        Err(ConvertError::Invalid(fault)) => (None, Some(problem(fault.to_string()))),
        Err(ConvertError::Foreign(fault)) => {
            debug!(object = subject(kind, item), %fault, "not for a Service");
            (None, None)
        }
    }
}

/// What a condition calls an object: `Service default/web`, `Node edge1`.
pub(super) fn subject<K: ResourceExt>(kind: Kind, item: &K) -> String {
    match item.namespace() {
        Some(namespace) => format!("{kind} {namespace}/{}", item.name_any()),
        None => format!("{kind} {}", item.name_any()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(names: &[&str]) -> Vec<Problem> {
        let problem = |name: &&str| Problem { subject: (*name).to_owned(), text: format!("{name} is odd") };
        names.iter().map(problem).collect()
    }

    fn subjects(conditions: &Conditions) -> Vec<String> {
        conditions.list().into_iter().map(|condition| condition.subject).collect()
    }

    #[test]
    fn the_condition_holds_of_what_was_reported_last_and_of_nothing_once_nobody_follows() {
        let conditions = Conditions::default();
        let mut invalid = Invalid::new(conditions.clone());
        invalid.replace(&problems(&["Node a", "Node b"]));
        invalid.report("Node c", Some("c is odd"));
        invalid.report("Node a", None);
        assert_eq!(subjects(&conditions), ["Node b", "Node c"]);
        assert_eq!(conditions.list()[0].message, "cannot use all of Node b: Node b is odd; correct the object");
        invalid.replace(&problems(&["Node c", "Node d"]));
        assert_eq!(subjects(&conditions), ["Node c", "Node d"]);
        drop(invalid);
        assert_eq!(subjects(&conditions), Vec::<String>::new());
    }

    #[test]
    fn so_many_that_nobody_reads_them_are_cut_off_and_others_follow_when_there_is_room() {
        let conditions = Conditions::default();
        let mut invalid = Invalid::new(conditions.clone());
        let names: Vec<String> = (0..MAX_INVALID + 5).map(|n| format!("Node n{n:03}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        invalid.replace(&problems(&names));
        assert_eq!(subjects(&conditions), names[..MAX_INVALID]);
        invalid.replace(&problems(&names[5..]));
        assert_eq!(subjects(&conditions), names[5..]);
    }
}
