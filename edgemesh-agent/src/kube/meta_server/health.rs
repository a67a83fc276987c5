//! From what became of each request to how the source fares, and to what is to be said of it. Pure: time is an argument.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::ledger::{List, Origin};
use crate::{kube::SourceHealth, model::Kind};

pub(super) const UNREACHABLE: &str = "MetaServerUnreachable";
pub(super) const OFFLINE: &str = "MetaServerOffline";
pub(super) const SLOW: &str = "MetaServerSlow";
pub(super) const EMPTY: &str = "MetaServerEmpty";
pub(super) const FORBIDDEN: &str = "MetaServerForbidden";
pub(super) const ANSWER: &str = "MetaServerError";
/// Of these, and of these alone, conditions are raised here.
pub(super) const REASONS: [&str; 6] = [UNREACHABLE, OFFLINE, SLOW, EMPTY, FORBIDDEN, ANSWER];

/// A sound answer takes milliseconds and a trip to the cloud. When it takes longer, metaServer is probably waiting for an
/// answer of the cloud that does not come (10 s; `agent.go` of edgecore).
pub(super) const LONGEST_SOUND_ANSWER: Duration = Duration::from_secs(3);

/// In the words of the guide "Edge Kube-API Endpoint" of KubeEdge and EdgeMesh.
const HINT: &str = "an empty list, or an answer after about 10 s, means that KubeEdge is probably not set up for this: \
                    check that cloudcore has modules.dynamicController.enable and edgecore \
                    modules.metaManager.metaServer.enable set to true (both restarted since), and that edgecore is \
                    connected to cloudcore; then `curl 127.0.0.1:10550/api/v1/services` gives all Services at once";
const OFFLINE_HINT: &str = "nothing, if this node is meant to be offline; else check its link to cloudcore in edgecore's \
                            log, and that cloudcore runs with modules.dynamicController.enable: true";
const UNREACHABLE_HINT: &str = "check that edgecore runs with modules.metaManager.metaServer.enable: true, and compare its \
                                address and certificates with kubeAPIConfig.metaServer";

/// What one request came to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Report {
    /// The API server's own list, in good time.
    Current,
    /// It took this long.
    Slow(Duration),
    /// A list of nothing, which cannot be.
    Empty,
    /// What metaServer had stored.
    Stored,
    /// 401 or 403, with what metaServer said and what to do.
    Refused { said: String, todo: String },
    /// Another code, or nothing that could be read.
    Wrong(String),
    /// No connection, or no answer within the time set for it.
    Unreachable(String),
}

impl Report {
    /// Judges a list that could be read.
    pub(super) fn of(kind: Kind, took: Duration, list: &List) -> Self {
        if took > LONGEST_SOUND_ANSWER {
            return Self::Slow(took);
        }
        match list.origin {
            _ if list.items.is_empty() && is_essential(kind) => Self::Empty,
            Origin::Online(_) => Self::Current,
            Origin::Stored => Self::Stored,
        }
    }
}

/// What a report is about.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Concern {
    pub(super) kind: Kind,
    pub(super) verb: Verb,
}

/// What was asked for.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Verb {
    List,
    Watch,
}

impl Verb {
    fn word(self) -> &'static str {
        match self {
            Self::List => "list",
            Self::Watch => "watch",
        }
    }
}

/// What the latest requests came to.
#[derive(Debug, Default)]
pub(super) struct Health {
    reports: BTreeMap<Concern, Report>,
    synced: BTreeSet<Kind>,
}

/// How the source fares, why, and what to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Verdict {
    pub(super) health: SourceHealth,
    pub(super) reason: Option<String>,
    pub(super) hint: Option<String>,
}

impl Health {
    /// Notes what a request came to. Says whether Services and endpoints have both been read as they are by now, since
    /// it last said so.
    pub(super) fn note(&mut self, concern: Concern, report: Report) -> bool {
        if concern.verb == Verb::List && is_essential(concern.kind) && report == Report::Current {
            self.synced.insert(concern.kind);
        }
        self.reports.insert(concern, report);
        let synced = self.synced.len() == ESSENTIAL.len();
        if synced {
            self.synced.clear();
        }
        synced
    }

    /// Nothing is to be said of this, nor of anything that was.
    pub(super) fn forget(&mut self, concern: Concern) {
        self.reports.remove(&concern);
    }

    /// How the source fares.
    pub(super) fn verdict(&self) -> Verdict {
        let of = |essential: bool, wanted: fn(&Report) -> bool| {
            self.reports.iter().find(|(concern, report)| is_essential(concern.kind) == essential && wanted(report))
        };
        let bad: fn(&Report) -> bool = |report| match report {
            Report::Slow(_) | Report::Empty | Report::Refused { .. } | Report::Wrong(_) => true,
            Report::Current | Report::Stored | Report::Unreachable(_) => false,
        };
        let unreachable: fn(&Report) -> bool = |report| matches!(report, Report::Unreachable(_));
        let stored: fn(&Report) -> bool = |report| matches!(report, Report::Stored);
        let (health, found) = if let Some(found) = of(true, unreachable).or_else(|| of(false, unreachable)) {
            (SourceHealth::Offline, found)
        } else if let Some(found) = of(true, bad) {
            (SourceHealth::Degraded, found)
        } else if let Some(found) = of(true, stored) {
            (SourceHealth::Offline, found)
        } else if let Some(found) = of(false, bad) {
            (SourceHealth::Degraded, found)
        } else {
            // Nodes or rules that are stored while Services are not are on their way, or not in the cluster at all.
            let known = self.reports.keys().any(|concern| is_essential(concern.kind));
            let health = if known { SourceHealth::Connected } else { SourceHealth::Connecting };
            return Verdict { health, reason: None, hint: None };
        };
        let (reason, hint) = tell(*found.0, found.1);
        Verdict { health, reason: Some(reason), hint: Some(hint) }
    }

    /// Whether Services and endpoints are not read as they are, so that it is worth asking whether they could be.
    pub(super) fn wants_probing(&self) -> bool {
        self.reports.iter().any(|(concern, report)| match report {
            Report::Unreachable(_) => true,
            Report::Stored | Report::Empty | Report::Slow(_) | Report::Wrong(_) => is_essential(concern.kind),
            // Not a matter of the link.
            Report::Current | Report::Refused { .. } => false,
        })
    }

    /// The conditions that hold, by reason and subject, with their messages.
    pub(super) fn conditions(&self, url: &str) -> BTreeMap<(&'static str, String), String> {
        let mut conditions = BTreeMap::new();
        for (concern, report) in &self.reports {
            let subject = || resource(concern.kind).to_owned();
            let (reason, subject) = match report {
                Report::Current => continue,
                // Their lack is no trouble of its own.
                Report::Stored if !is_essential(concern.kind) => continue,
                Report::Stored => (OFFLINE, String::new()),
                Report::Unreachable(_) => (UNREACHABLE, String::new()),
                Report::Slow(_) => (SLOW, subject()),
                Report::Empty => (EMPTY, subject()),
                Report::Refused { .. } => (FORBIDDEN, subject()),
                Report::Wrong(_) => (ANSWER, subject()),
            };
            let (why, todo) = tell(*concern, report);
            let message = format!("metaServer at {url}: {why}; the last known state is served meanwhile; {todo}");
            conditions.entry((reason, subject)).or_insert(message);
        }
        conditions
    }
}

const ESSENTIAL: [Kind; 2] = [Kind::Service, Kind::Endpoints];

/// Nothing is served without them.
pub(super) fn is_essential(kind: Kind) -> bool {
    ESSENTIAL.contains(&kind)
}

/// How the API calls objects of a kind, with the group where it is not the core one.
pub(super) fn resource(kind: Kind) -> &'static str {
    match kind {
        Kind::Service => "services",
        Kind::Endpoints => "endpoints",
        Kind::EndpointSlice => "endpointslices.discovery.k8s.io",
        Kind::Node => "nodes",
        Kind::DestinationRule => "destinationrules.networking.istio.io",
    }
}

/// What happened, and what to do.
fn tell(Concern { kind, verb }: Concern, report: &Report) -> (String, String) {
    let (verb, resource) = (verb.word(), resource(kind));
    match report {
        Report::Current => (format!("it gave {resource} as they are"), String::new()),
        // Tenths would make a new message of each attempt.
        Report::Slow(took) => (
            format!("it took {} s to {verb} {resource}, longer than {LONGEST_SOUND_ANSWER:?}", took.as_secs()),
            HINT.to_owned(),
        ),
        Report::Empty => (format!("it gave an empty list of {resource}, which no cluster has"), HINT.to_owned()),
        Report::Stored => (
            format!("it gave {resource} as it had stored them, so it has no connection to the cloud"),
            OFFLINE_HINT.to_owned(),
        ),
        Report::Refused { said, todo } => (format!("it refuses to {verb} {resource}: {said}"), todo.clone()),
        Report::Wrong(what) => (
            format!("it failed to {verb} {resource}: {what}"),
            "check that this is metaServer, and edgecore's log".to_owned(),
        ),
        Report::Unreachable(what) => {
            (format!("it cannot be reached to {verb} {resource}: {what}"), UNREACHABLE_HINT.to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::meta_server::ledger::{Content, Extent, Item};
    use crate::model::NamespacedName;

    fn on(kind: Kind) -> Concern {
        Concern { kind, verb: Verb::List }
    }

    fn list(items: usize, origin: Origin) -> List {
        let item = |n: usize| Item {
            name: NamespacedName::new("default", format!("s{n}")),
            uid: "u".into(),
            version: 1,
            content: Content::Unusable,
        };
        List { items: (0..items).map(item).collect(), origin, extent: Extent::Whole }
    }

    fn health(reports: &[(Kind, Report)]) -> Health {
        let mut health = Health::default();
        for (kind, report) in reports {
            health.note(on(*kind), report.clone());
        }
        health
    }

    #[test]
    fn rule_7_an_answer_after_more_than_three_seconds_or_an_empty_one_is_told_from_a_sound_one() {
        let (quick, slow) = (Duration::from_millis(2_999), Duration::from_millis(3_001));
        for (kind, took, items, origin, expected) in [
            (Kind::Service, quick, 1, Origin::Online(7), Report::Current),
            (Kind::Service, slow, 1, Origin::Online(7), Report::Slow(slow)),
            (Kind::Service, slow, 0, Origin::Stored, Report::Slow(slow)),
            (Kind::Service, quick, 0, Origin::Stored, Report::Empty),
            (Kind::Endpoints, quick, 0, Origin::Online(7), Report::Empty),
            (Kind::Service, quick, 1, Origin::Stored, Report::Stored),
            (Kind::Node, quick, 0, Origin::Stored, Report::Stored),
            (Kind::DestinationRule, quick, 0, Origin::Online(7), Report::Current),
        ] {
            assert_eq!(Report::of(kind, took, &list(items, origin)), expected, "{kind} {took:?} {items} {origin:?}");
        }
    }

    #[test]
    fn rule_7_slow_and_empty_answers_degrade_the_source_with_the_hint_of_the_guide() {
        for report in [Report::Slow(Duration::from_millis(10_015)), Report::Empty] {
            let health = health(&[(Kind::Service, report.clone()), (Kind::Endpoints, Report::Current)]);
            let verdict = health.verdict();
            assert_eq!(verdict.health, SourceHealth::Degraded, "{report:?}");
            let hint = verdict.hint.unwrap();
            assert!(hint.contains("dynamicController") && hint.contains("metaServer.enable"), "{hint}");
            let conditions = health.conditions("http://127.0.0.1:10550");
            let [((reason, subject), message)] = conditions.iter().collect::<Vec<_>>()[..] else {
                panic!("{conditions:?}")
            };
            assert!([SLOW, EMPTY].contains(reason) && subject == "services", "{reason} {subject}");
            assert!(message.contains("http://127.0.0.1:10550") && message.contains("curl"), "{message}");
        }
    }

    #[test]
    fn the_worst_of_what_matters_decides() {
        let stored = Report::Stored;
        let refused = Report::Refused { said: "403".to_owned(), todo: "grant it".to_owned() };
        let wrong = Report::Wrong("500 x".to_owned());
        let gone = Report::Unreachable("refused".to_owned());
        let current = Report::Current;
        for (reports, expected, part) in [
            (vec![], SourceHealth::Connecting, ""),
            (vec![(Kind::DestinationRule, current.clone())], SourceHealth::Connecting, ""),
            (vec![(Kind::Service, current.clone()), (Kind::Endpoints, current.clone())], SourceHealth::Connected, ""),
            (vec![(Kind::Service, current.clone()), (Kind::Node, stored.clone())], SourceHealth::Connected, ""),
            (vec![(Kind::Service, stored.clone()), (Kind::Endpoints, stored.clone())], SourceHealth::Offline, "stored"),
            (vec![(Kind::Service, stored.clone()), (Kind::Endpoints, wrong.clone())], SourceHealth::Degraded, "500 x"),
            (vec![(Kind::Service, current.clone()), (Kind::Node, refused)], SourceHealth::Degraded, "403"),
            (vec![(Kind::Service, wrong), (Kind::DestinationRule, gone)], SourceHealth::Offline, "reached"),
        ] {
            let verdict = health(&reports).verdict();
            assert_eq!(verdict.health, expected, "{reports:?}");
            assert!(verdict.reason.unwrap_or_default().contains(part), "{part} of {reports:?}");
        }
    }

    #[test]
    fn a_failed_watch_is_told_beside_a_list_that_works() {
        let mut health = health(&[(Kind::Service, Report::Current), (Kind::Endpoints, Report::Current)]);
        let watch = Concern { kind: Kind::Service, verb: Verb::Watch };
        health.note(watch, Report::Refused { said: "403 no".to_owned(), todo: "grant it".to_owned() });
        assert_eq!(health.verdict().health, SourceHealth::Degraded);
        let conditions = health.conditions("u");
        let message = &conditions[&(FORBIDDEN, "services".to_owned())];
        assert!(message.contains("refuses to watch services: 403 no") && message.ends_with("grant it"), "{message}");
        health.forget(watch);
        assert_eq!((health.verdict().health, health.conditions("u").len()), (SourceHealth::Connected, 0));
    }

    #[test]
    fn in_sync_is_when_services_and_endpoints_have_both_been_read_since() {
        let mut health = Health::default();
        assert!(!health.note(on(Kind::Service), Report::Current));
        assert!(!health.note(on(Kind::Node), Report::Current));
        assert!(!health.note(on(Kind::Endpoints), Report::Stored));
        assert!(health.note(on(Kind::Endpoints), Report::Current));
        assert!(!health.note(on(Kind::Endpoints), Report::Current));
        assert!(health.note(on(Kind::Service), Report::Current));
    }

    #[test]
    fn only_what_may_pass_with_the_link_is_probed_for() {
        let refused = Report::Refused { said: String::new(), todo: String::new() };
        for (kind, report, expected) in [
            (Kind::Service, Report::Current, false),
            (Kind::Service, refused, false),
            (Kind::Service, Report::Stored, true),
            (Kind::Endpoints, Report::Empty, true),
            (Kind::Node, Report::Stored, false),
            (Kind::Node, Report::Unreachable(String::new()), true),
        ] {
            assert_eq!(health(&[(kind, report.clone())]).wants_probing(), expected, "{kind} {report:?}");
        }
    }
}
