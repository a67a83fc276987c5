use std::{collections::BTreeMap, sync::Arc};

use proptest::prelude::*;

use super::*;
use crate::model::{EndpointSet, Service, ServiceKind};

/// The Service `default/NAME`; what is in it differs by version and nothing else.
fn item(name: &str, uid: &str, version: u64) -> Item {
    let name = NamespacedName::new("default", name);
    let mut service = Service::new(name.clone(), ServiceKind::ClusterIp);
    service.topology_keys = vec![version.to_string().into()];
    Item { name, uid: uid.into(), version, content: Content::Usable(Object::Service(service.into())) }
}

fn online(version: u64, items: &[Item]) -> List {
    List { items: items.to_vec(), origin: Origin::Online(version), extent: Extent::Whole }
}

fn stored(items: &[Item]) -> List {
    List { items: items.to_vec(), origin: Origin::Stored, extent: Extent::Whole }
}

/// What events say, with each object's version.
fn told(events: impl IntoIterator<Item = Event>) -> Vec<String> {
    let version = |object: &Object| match object {
        Object::Service(service) => format!("{}@{}", service.name.name, service.topology_keys[0]),
        Object::EndpointSlice(_) | Object::Endpoints(_) | Object::Node(_) | Object::DestinationRule(_) => {
            object.name().to_string()
        }
    };
    let tell = |event| match event {
        Event::Apply(object) => format!("apply {}", version(&object)),
        Event::Delete(_, name) => format!("delete {}", name.name),
        Event::Replace(_, objects) => {
            let mut all: Vec<String> = objects.iter().map(version).collect();
            all.sort();
            format!("replace {}", all.join(" "))
        }
        Event::Reached(_, version) => format!("reached {version}"),
        Event::Synced => "synced".to_owned(),
    };
    let mut told: Vec<String> = events.into_iter().map(tell).collect();
    told.sort();
    told
}

fn ledger() -> Ledger {
    Ledger::new(Kind::Service, None)
}

impl Ledger {
    /// Takes a list in that was asked for just now.
    fn now(&mut self, list: List) -> Vec<String> {
        let ticket = self.ask();
        told(self.list(ticket, list))
    }

    /// One that two lists of the API server have confirmed.
    fn settled(version: u64, items: &[Item]) -> Self {
        let mut ledger = ledger();
        ledger.now(online(version, items));
        ledger.now(online(version, items));
        assert!(ledger.is_delivered() && !ledger.wants_confirmation());
        ledger
    }
}

#[test]
fn rule_2_a_list_without_a_version_adds_and_proves_nothing() {
    let mut ledger = ledger();
    assert_eq!(ledger.now(stored(&[item("a", "1", 5)])), ["apply a@5"]);
    assert!(ledger.is_delivered(), "it is all that can be had");
    assert_eq!(ledger.now(stored(&[item("b", "2", 3)])), ["apply b@3"]);
    assert_eq!(ledger.now(stored(&[])), [""; 0]);
    assert_eq!(ledger.len(), 2);
}

#[test]
fn rule_3_a_list_is_compared_with_what_is_known_and_tells_the_difference() {
    let mut ledger = Ledger::settled(10, &[item("a", "1", 5), item("b", "2", 6)]);
    assert_eq!(
        ledger.now(online(20, &[item("a", "1", 5), item("b", "2", 12), item("c", "3", 15)])),
        ["apply b@12", "apply c@15"]
    );
    assert_eq!(ledger.now(online(20, &[item("a", "1", 5), item("b", "2", 12), item("c", "3", 15)])), [""; 0]);
}

#[test]
fn rule_3_the_same_version_with_other_content_counts_as_the_cloud_may_filter_by_nodes() {
    let mut ledger = Ledger::settled(10, &[item("a", "1", 5)]);
    let mut filtered = item("a", "1", 9);
    filtered.version = 5;
    assert_eq!(ledger.now(online(20, &[filtered])), ["apply a@9"]);
}

#[test]
fn rule_4_added_is_as_good_as_modified_and_nothing_goes_back() {
    let mut ledger = Ledger::settled(10, &[item("a", "1", 5)]);
    assert_eq!(told(ledger.upsert(item("a", "1", 12))), ["apply a@12"]);
    assert_eq!(told(ledger.upsert(item("a", "1", 11))), [""; 0], "an older one of the same object");
    assert_eq!(told(ledger.upsert(item("a", "1", 12))), [""; 0], "replayed");
    assert_eq!(ledger.now(online(11, &[item("a", "1", 11)])), [""; 0], "a list that was made before");
    assert_eq!(ledger.now(stored(&[item("a", "1", 5)])), [""; 0]);
    assert_eq!(told(ledger.delete(&item("a", "1", 11))), [""; 0], "a deletion that is older than what is known");
}

#[test]
fn rule_4_another_uid_is_another_object() {
    let mut ledger = Ledger::settled(10, &[item("a", "1", 8)]);
    assert_eq!(told(ledger.upsert(item("a", "2", 12))), ["apply a@12"]);
    assert_eq!(told(ledger.delete(&item("a", "1", 11))), [""; 0], "the one before was deleted, not this one");
    assert_eq!(ledger.now(online(20, &[item("a", "3", 15)])), ["apply a@15"]);
    assert_eq!(told(ledger.delete(&item("a", "4", 30))), ["delete a"], "a later one is gone, and this one before it");
}

#[test]
fn rule_4_versions_are_compared_as_numbers() {
    let mut ledger = Ledger::settled(999, &[item("a", "1", 998)]);
    assert_eq!(told(ledger.upsert(item("a", "1", 1000))), ["apply a@1000"]);
}

#[test]
fn rule_5_a_ghost_that_a_list_lacked_is_not_let_in() {
    let mut ledger = Ledger::settled(10, &[item("a", "1", 5)]);
    assert_eq!(told(ledger.upsert(item("ghost", "9", 10))), [""; 0]);
    assert_eq!(told(ledger.upsert(item("new", "3", 11))), ["apply new@11"]);
    assert_eq!(ledger.now(stored(&[item("a", "1", 5), item("ghost", "9", 10)])), [""; 0], "nor from what was stored");
    assert_eq!(told(ledger.upsert(item("a", "0", 4))), [""; 0], "a former object of the same name is one, too");
    assert_eq!(told(ledger.upsert(item("unversioned", "7", 0))), [""; 0]);
}

#[test]
fn rule_5_without_a_list_of_the_api_server_nothing_is_known_to_be_a_ghost() {
    let mut ledger = ledger();
    ledger.now(stored(&[item("a", "1", 5)]));
    assert_eq!(told(ledger.upsert(item("b", "2", 3))), ["apply b@3"]);
}

#[test]
fn rule_5_a_ghost_does_not_save_itself_from_the_second_list() {
    let mut ledger = Ledger::settled(10, &[item("a", "1", 5), item("b", "2", 6)]);
    assert_eq!(ledger.now(online(20, &[item("a", "1", 5)])), [""; 0]);
    // Replayed by the watch that was opened meanwhile, from what is stored on the node.
    assert_eq!(told(ledger.upsert(item("b", "2", 6))), [""; 0]);
    assert_eq!(ledger.now(stored(&[item("a", "1", 5), item("b", "2", 6)])), [""; 0]);
    assert_eq!(ledger.now(online(20, &[item("a", "1", 5)])), ["delete b"]);
    assert_eq!(told(ledger.upsert(item("b", "2", 6))), [""; 0]);
}

#[test]
fn rule_6_nothing_is_taken_away_for_an_empty_list() {
    let known = [item("a", "1", 5), item("b", "2", 6)];
    let mut ledger = Ledger::settled(10, &known);
    for list in [stored(&[]), online(20, &[]), online(30, &[]), stored(&[])] {
        assert_eq!(ledger.now(list), [""; 0]);
    }
    assert_eq!(ledger.len(), 2);
    // And they are no ghosts because of it.
    assert_eq!(told(ledger.upsert(item("c", "3", 25))), ["apply c@25"]);
}

#[test]
fn rule_6_an_object_goes_when_two_lists_of_the_api_server_lack_it() {
    let mut ledger = Ledger::settled(10, &[item("a", "1", 5), item("b", "2", 6)]);
    assert_eq!(ledger.now(online(20, &[item("a", "1", 5)])), [""; 0]);
    assert!(ledger.wants_confirmation());
    // What proves nothing neither counts as the second list nor takes the first one back.
    assert_eq!(ledger.now(stored(&[item("b", "2", 6)])), [""; 0]);
    assert!(ledger.wants_confirmation());
    assert_eq!(ledger.now(online(21, &[item("a", "1", 5)])), ["delete b"]);
    assert!(!ledger.wants_confirmation());
}

#[test]
fn rule_6_a_list_that_has_it_again_takes_the_doubt_away() {
    let both = [item("a", "1", 5), item("b", "2", 6)];
    let mut ledger = Ledger::settled(10, &both);
    ledger.now(online(20, &both[..1]));
    assert_eq!(ledger.now(online(21, &both)), [""; 0]);
    assert_eq!(ledger.now(online(22, &both[..1])), [""; 0], "the first of two again");
}

#[test]
fn rule_6_an_object_newer_than_the_list_is_not_missing_from_it() {
    let mut ledger = Ledger::settled(10, &[item("a", "1", 5)]);
    ledger.upsert(item("b", "2", 30));
    for _ in 0..3 {
        assert_eq!(ledger.now(online(20, &[item("a", "1", 5)])), [""; 0]);
    }
}

#[test]
fn rule_6_a_list_that_is_not_whole_proves_nothing() {
    let both = [item("a", "1", 5), item("b", "2", 6)];
    let mut ledger = Ledger::settled(10, &both);
    for version in [20, 21, 22] {
        let list = List { extent: Extent::Part, ..online(version, &[item("a", "1", 15)]) };
        let expected: &[&str] = if version == 20 { &["apply a@15"] } else { &[] };
        assert_eq!(ledger.now(list), expected, "what it has still counts");
    }
    assert_eq!(ledger.len(), 2);
}

#[test]
fn rule_6_what_a_selector_leaves_out_is_neither_missing_nor_a_ghost() {
    let mut ledger = Ledger::settled(10, &[item("a", "1", 5), item("b", "2", 6)]);
    for version in [20, 21, 22] {
        let list = List { extent: Extent::Selection, ..online(version, &[item("a", "1", 5)]) };
        assert_eq!(ledger.now(list), [""; 0]);
        assert!(!ledger.wants_confirmation());
    }
    assert_eq!(told(ledger.upsert(item("c", "3", 15))), ["apply c@15"]);
}

#[test]
fn a_selection_that_was_listed_twice_is_all_that_there_will_be() {
    let mut ledger = ledger();
    let selection = |version| List { extent: Extent::Selection, ..online(version, &[item("a", "1", 5)]) };
    assert_eq!(ledger.now(selection(10)), ["apply a@5"]);
    assert!(ledger.wants_confirmation());
    assert_eq!(ledger.now(selection(11)), ["replace a@5"]);
    assert!(ledger.is_delivered() && !ledger.wants_confirmation());
}

#[test]
fn rule_6_rules_may_all_be_gone_when_two_lists_of_the_api_server_say_so() {
    let mut ledger = Ledger::new(Kind::DestinationRule, None);
    let name = NamespacedName::new("default", "a");
    let set = EndpointSet { name: name.clone(), service: name.clone(), subsets: Vec::new() };
    let object = Object::Endpoints(Arc::new(set));
    let rule = Item { name, uid: "1".into(), version: 5, content: Content::Usable(object) };
    ledger.now(online(10, &[rule]));
    for list in [stored(&[]), stored(&[]), online(20, &[])] {
        ledger.now(list);
        assert_eq!(ledger.len(), 1);
    }
    ledger.now(online(21, &[]));
    assert_eq!(ledger.len(), 0);
}

#[test]
fn rule_6_a_deleted_event_takes_away_at_once_and_for_good() {
    let mut ledger = Ledger::settled(10, &[item("a", "1", 5), item("b", "2", 6)]);
    assert_eq!(told(ledger.delete(&item("b", "2", 12))), ["delete b"]);
    assert_eq!(told(ledger.delete(&item("b", "2", 12))), [""; 0]);
    assert_eq!(told(ledger.upsert(item("b", "2", 11))), [""; 0], "replayed");
    assert_eq!(told(ledger.upsert(item("b", "3", 14))), ["apply b@14"], "made again");
}

#[test]
fn rule_6_a_deletion_is_not_undone_by_a_list_that_was_made_before() {
    let both = [item("a", "1", 5), item("b", "2", 6)];
    let mut ledger = Ledger::settled(10, &both);
    let ticket = ledger.ask();
    // The cloud has made the list at version 11, and it is still under way.
    assert_eq!(told(ledger.delete(&item("b", "2", 12))), ["delete b"]);
    assert_eq!(told(ledger.list(ticket, online(11, &both))), [""; 0]);
    // One that was asked for afterwards is the truth, whatever the event said.
    assert_eq!(ledger.now(online(13, &both)), ["apply b@6"]);
}

#[test]
fn rule_6_what_cannot_be_read_keeps_what_is_known() {
    let mut ledger = Ledger::settled(10, &[item("a", "1", 5), item("b", "2", 6)]);
    let garbage = Item { content: Content::Unreadable, ..item("a", "1", 15) };
    assert_eq!(ledger.now(online(20, &[garbage.clone(), item("b", "2", 6)])), [""; 0]);
    assert_eq!(
        ledger.now(online(21, &[garbage.clone(), item("b", "2", 6)])),
        [""; 0],
        "it is there, so it is not missing"
    );
    assert_eq!(told(ledger.upsert(garbage)), [""; 0]);
    assert_eq!(told(ledger.upsert(item("a", "1", 25))), ["apply a@25"]);
}

#[test]
fn an_object_that_has_become_unusable_is_served_no_more() {
    let mut ledger = Ledger::settled(10, &[item("a", "1", 5)]);
    let unusable = Item { content: Content::Unusable, ..item("a", "1", 15) };
    assert_eq!(told(ledger.upsert(unusable)), ["delete a"]);
    assert_eq!((ledger.len(), told(ledger.upsert(item("a", "1", 16)))), (0, vec!["apply a@16".to_owned()]));
}

#[test]
fn the_first_list_is_told_at_once_and_the_second_says_that_it_was_all() {
    let mut ledger = ledger();
    let (a, b) = (item("a", "1", 5), item("b", "2", 6));
    assert_eq!(ledger.now(online(10, &[a.clone(), b.clone()])), ["apply a@5", "apply b@6"]);
    assert!(ledger.wants_confirmation() && !ledger.is_delivered());
    assert_eq!(ledger.now(online(11, &[a.clone(), b.clone()])), ["replace a@5 b@6"], "a snapshot may have had more");
    assert_eq!(ledger.now(online(12, &[a, b])), [""; 0]);
}

#[test]
fn rules_4_and_5_what_was_complete_as_of_a_version_stays_so_after_a_restart() {
    let mut ledger = Ledger::new(Kind::Service, Some(10));
    let (ghost, a, new) = (item("ghost", "1", 5), item("a", "2", 7), item("new", "3", 11));
    assert_eq!(ledger.now(stored(&[ghost.clone(), a.clone(), new.clone()])), ["apply new@11"]);
    assert!(ledger.is_delivered(), "it is all that can be had");
    assert_eq!(ledger.reached(), None, "nothing is known to be all of it since");
    assert_eq!(ledger.now(online(12, &[a.clone(), new.clone()])), ["apply a@7"]);
    assert_eq!(told(ledger.upsert(ghost)), [""; 0]);
    assert_eq!(ledger.now(online(13, &[a.clone(), new])), ["replace a@7 new@11"]);
    assert_eq!(ledger.reached(), Some(13));
    ledger.now(online(14, std::slice::from_ref(&a)));
    assert_eq!(ledger.reached(), None, "what is missing is still in force");
    ledger.now(online(15, &[a]));
    assert_eq!(ledger.reached(), Some(15));
}

#[test]
fn a_cluster_restored_from_a_backup_is_believed_when_it_says_so_twice() {
    let mut ledger = Ledger::settled(1000, &[item("a", "1", 900), item("b", "2", 950)]);
    let older = [item("a", "1", 400)];
    assert_eq!(ledger.now(online(500, &older)), [""; 0]);
    assert!(ledger.wants_confirmation());
    assert_eq!(ledger.now(online(501, &older)), ["apply a@400"]);
    assert!(ledger.wants_confirmation(), "b is missing for the first time");
    assert_eq!(ledger.now(online(502, &older)), ["delete b"]);
    assert!(!ledger.wants_confirmation());
}

/// What may happen between a cluster and a node.
#[derive(Clone, Debug)]
enum Step {
    /// Something is made or changed in the cluster; the watch tells if the link is up.
    Put(u8),
    /// Something is deleted there.
    Delete(u8),
    /// The link goes up or down.
    Link(bool),
    /// A list, by the cluster or from what is stored.
    List,
    /// A list that is asked for now and answered after the next steps; this one answers it.
    Ask,
    Answer,
    /// All stored objects are replayed as ADDED, as at each beginning of a watch.
    Replay,
    /// What metaServer makes of an error: nothing, with code 200.
    Empty,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..6_u8).prop_map(Step::Put),
        3 => (0..6_u8).prop_map(Step::Delete),
        2 => any::<bool>().prop_map(Step::Link),
        3 => Just(Step::List),
        1 => Just(Step::Ask),
        1 => Just(Step::Answer),
        2 => Just(Step::Replay),
        1 => Just(Step::Empty),
    ];
    prop::collection::vec(step, 1..80)
}

/// The cluster, what is stored on the node, and what the agent has made of it.
struct Sim {
    version: u64,
    cluster: BTreeMap<u8, Item>,
    stored: BTreeMap<u8, Item>,
    up: bool,
    ledger: Ledger,
    /// What a consumer of the events knows.
    known: HashMap<NamespacedName, Object>,
    asked: Option<(Ticket, List)>,
    /// How many lists of the API server in a row lack a name, in the eyes of a plain observer.
    lacked: HashMap<NamespacedName, u32>,
}

impl Sim {
    fn new() -> Self {
        Self {
            version: 10,
            cluster: BTreeMap::new(),
            stored: BTreeMap::new(),
            up: true,
            ledger: Ledger::new(Kind::Service, None),
            known: HashMap::new(),
            asked: None,
            lacked: HashMap::new(),
        }
    }

    fn name(n: u8) -> String {
        format!("s{n}")
    }

    /// Hands events on, and checks that a removal has a reason.
    fn tell(&mut self, events: impl IntoIterator<Item = Event>, deleted: Option<&NamespacedName>) {
        for event in events {
            match event {
                Event::Apply(object) => {
                    self.known.insert(object.name().clone(), object);
                }
                Event::Delete(_, name) => {
                    let proven = self.lacked.get(&name).is_some_and(|&times| times >= 2);
                    assert!(proven || deleted == Some(&name), "{name} went without a reason");
                    self.known.remove(&name);
                }
                Event::Replace(_, objects) => {
                    let all: HashMap<_, _> = objects.into_iter().map(|o| (o.name().clone(), o)).collect();
                    for name in self.known.keys().filter(|name| !all.contains_key(*name)) {
                        assert!(self.lacked.get(name).is_some_and(|&times| times >= 2), "{name} was replaced away");
                    }
                    self.known = all;
                }
                Event::Reached(..) | Event::Synced => {}
            }
        }
    }

    fn listing(&self) -> List {
        let items = |of: &BTreeMap<u8, Item>| of.values().cloned().collect::<Vec<_>>();
        if self.up { online(self.version, &items(&self.cluster)) } else { stored(&items(&self.stored)) }
    }

    fn answer(&mut self, ticket: Ticket, list: List) {
        if matches!(list.origin, Origin::Online(_)) && !list.items.is_empty() {
            for n in 0..6 {
                let name = item(&Self::name(n), "", 0).name;
                let has = list.items.iter().any(|item| item.name == name);
                let count = self.lacked.entry(name).or_default();
                *count = if has { 0 } else { *count + 1 };
            }
        }
        let events = self.ledger.list(ticket, list);
        self.tell(events, None);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Put(n) => {
                self.version += 1;
                let uid = self.cluster.get(&n).map_or_else(|| self.version.to_string().into(), |old| old.uid.clone());
                let new = item(&Self::name(n), &uid, self.version);
                self.cluster.insert(n, new.clone());
                if self.up {
                    self.stored.insert(n, new.clone());
                    let event = self.ledger.upsert(new);
                    self.tell(event, None);
                }
            }
            Step::Delete(n) => {
                let Some(mut old) = self.cluster.remove(&n) else { return };
                self.version += 1;
                if self.up {
                    self.stored.remove(&n);
                    old.version = self.version;
                    let event = self.ledger.delete(&old);
                    self.tell(event, Some(&old.name));
                }
            }
            Step::Link(up) => {
                // Updates of what the node has are sent again, deletions never.
                if up && !self.up {
                    for (n, object) in &mut self.stored {
                        if let Some(now) = self.cluster.get(n) {
                            *object = now.clone();
                        }
                    }
                }
                self.up = up;
            }
            Step::List => {
                let ticket = self.ledger.ask();
                self.answer(ticket, self.listing());
            }
            Step::Ask => self.asked = Some((self.ledger.ask(), self.listing())),
            Step::Answer => {
                if let Some((ticket, list)) = self.asked.take() {
                    self.answer(ticket, list);
                }
            }
            Step::Replay => {
                for object in self.stored.values().cloned().collect::<Vec<_>>() {
                    let event = self.ledger.upsert(object);
                    self.tell(event, None);
                }
            }
            Step::Empty => {
                let ticket = self.ledger.ask();
                self.answer(ticket, stored(&[]));
            }
        }
    }

    fn check(&self) {
        let own: HashMap<_, _> = self.ledger.objects().into_iter().map(|o| (o.name().clone(), o)).collect();
        assert_eq!(own, self.known, "events and ledger tell the same");
        assert_eq!(self.ledger.len(), own.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_nothing_goes_without_a_reason_and_two_lists_bring_the_truth(steps in steps()) {
        let mut sim = Sim::new();
        for step in steps {
            sim.step(step);
            sim.check();
        }
        // The node is back: whatever it has stored, ghosts and all, two lists later it knows the cluster.
        sim.step(Step::Link(true));
        sim.step(Step::Put(0));
        sim.step(Step::Answer);
        for step in [Step::List, Step::Replay, Step::List, Step::Replay] {
            sim.step(step);
            sim.check();
        }
        let truth: HashMap<_, _> = sim.cluster.values().map(|item| match &item.content {
            Content::Usable(object) => (item.name.clone(), object.clone()),
            Content::Unusable | Content::Unreadable => panic!("{item:?}"),
        }).collect();
        prop_assert_eq!(truth, sim.known);
    }
}
