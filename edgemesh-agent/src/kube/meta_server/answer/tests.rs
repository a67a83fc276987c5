use k8s_openapi::api::core::v1 as core;
use proptest::prelude::*;
use serde_json::json;

use super::*;

fn listed(body: &str) -> Result<ListAnswer, String> {
    read_list::<core::Service>(body.as_bytes(), Kind::Service)
}

fn names(listed: &ListAnswer) -> Vec<String> {
    listed.list.items.iter().map(|item| format!("{}@{}", item.name, item.version)).collect()
}

#[test]
fn rule_2_a_list_is_of_the_api_server_only_if_it_has_a_version_and_no_link_into_the_store() {
    for (metadata, expected) in [
        (json!({"resourceVersion": "377360"}), Origin::Online(377_360)),
        (json!({"resourceVersion": "377360", "selfLink": "/api/v1/services"}), Origin::Online(377_360)),
        (
            json!({"resourceVersion": "5", "selfLink": "/apis/networking.istio.io/v1/destinationrules"}),
            Origin::Online(5),
        ),
        (json!({"resourceVersion": 5}), Origin::Online(5)),
        (json!({"resourceVersion": "377360", "selfLink": "/core/v1/services/null/null"}), Origin::Stored),
        (
            json!({"resourceVersion": "5", "selfLink": "/networking.istio.io/v1/destinationrules/null/null"}),
            Origin::Stored,
        ),
        (json!({"resourceVersion": ""}), Origin::Stored),
        (json!({"resourceVersion": "0"}), Origin::Stored),
        (json!({"resourceVersion": "x"}), Origin::Stored),
        (json!({}), Origin::Stored),
        (json!(null), Origin::Stored),
    ] {
        let body = json!({"kind": "ServiceList", "metadata": metadata, "items": []}).to_string();
        assert_eq!(listed(&body).unwrap().list.origin, expected, "{metadata}");
    }
    // As metaServer writes an empty one: issue kubeedge/kubeedge#4459.
    let bare = listed(r#"{"apiVersion":"v1","items":[],"kind":"ServiceList"}"#).unwrap();
    assert_eq!((bare.list.origin, bare.list.items.len(), bare.list.extent), (Origin::Stored, 0, Extent::Whole));
}

#[test]
fn kinds_do_not_matter_be_they_wrong_or_missing() {
    for kind in ["ServiceList", "Servic", "NamespacList", ""] {
        let item = json!({"apiVersion": "wrong/v9", "kind": kind, "metadata": {"name": "a", "resourceVersion": "7"},
            "spec": {"clusterIP": "10.96.0.1"}});
        let body = json!({"apiVersion": 1, "kind": kind, "metadata": {"resourceVersion": "9"}, "items": [item]});
        let listed = listed(&body.to_string()).unwrap();
        assert_eq!((names(&listed), listed.problems.len()), (vec!["default/a@7".to_owned()], 0), "{kind}");
    }
}

#[test]
fn what_is_no_list_is_told_with_its_beginning() {
    for (body, part) in [
        ("<html>\n<b>Gateway</b>", "expected value at line 1 column 1, in \"<html> <b>Gateway</b>\""),
        ("", "EOF while parsing"),
        ("{\"kind\":\"Status\",\"code\":500}", "no list of objects, but"),
        ("{\"items\":[{\"metadata\":", "EOF while parsing"),
        ("{\"items\":{}}", "invalid type: map, expected a list of objects"),
        ("[]", "no list of objects, but \"[]\""),
    ] {
        let error = listed(body).unwrap_err();
        assert!(error.contains(part) && !error.contains('\n'), "{part} in {error}");
    }
    let long = format!("{{{}", "x".repeat(10_000));
    assert!(listed(&long).unwrap_err().len() < 400);
}

#[test]
fn no_items_in_go_is_an_empty_list() {
    let listed = listed(r#"{"metadata":{"resourceVersion":"5"},"items":null}"#).unwrap();
    assert!(listed.list.extent == Extent::Whole && listed.list.items.is_empty());
}

#[test]
fn rule_6_a_list_with_items_that_have_no_name_or_with_a_next_page_is_not_whole() {
    for body in [
        json!({"items": [{"metadata": {}}]}),
        json!({"items": [{}, {"metadata": {"name": "a"}}]}),
        json!({"items": [7]}),
        json!({"metadata": {"continue": "more"}, "items": []}),
    ] {
        assert_eq!(listed(&body.to_string()).unwrap().list.extent, Extent::Part, "{body}");
    }
}

#[test]
fn what_can_be_made_of_an_item_is_told() {
    let body = json!({"items": [
        {"metadata": {"name": "good", "namespace": "shop", "uid": "u1", "resourceVersion": "5"},
         "spec": {"clusterIP": "10.96.0.1"}},
        {"metadata": {"name": "wrong-type", "resourceVersion": "6"}, "spec": "x"},
        {"metadata": {"name": "wrong-value", "resourceVersion": "7"}, "spec": {"clusterIP": "10.0.0.300"}},
        {"metadata": {"name": "Not A Name", "resourceVersion": "8"}},
    ]});
    let listed = listed(&body.to_string()).unwrap();
    let content: Vec<&Content> = listed.list.items.iter().map(|item| &item.content).collect();
    assert!(matches!(content[..], [Content::Usable(_), Content::Unreadable, Content::Unusable, Content::Unreadable]));
    assert_eq!(&*listed.list.items[0].uid, "u1");
    let subjects: Vec<&str> = listed.problems.iter().map(|problem| problem.subject.as_str()).collect();
    assert_eq!(subjects, ["Service default/wrong-type", "Service default/wrong-value", "Service default/Not A Name"]);
    assert!(listed.problems[0].text.contains("invalid type: string"), "{:?}", listed.problems);
    assert!(listed.problems[1].text.contains("spec.clusterIP"), "{:?}", listed.problems);
}

#[test]
fn nodes_have_no_namespace_not_even_when_they_cannot_be_read() {
    let body = json!({"items": [{"metadata": {"name": "edge1"}, "spec": 7}]}).to_string();
    let listed = read_list::<core::Node>(body.as_bytes(), Kind::Node).unwrap();
    assert_eq!(listed.list.items[0].name.to_string(), "edge1");
}

#[test]
fn lines_of_a_watch_are_told_apart() {
    let frame = |line: &str| read_frame::<core::Service>(line.as_bytes(), Kind::Service);
    let object = r#"{"kind":"Service","metadata":{"name":"a","resourceVersion":"7"}}"#;
    for kind in ["ADDED", "MODIFIED"] {
        let Ok(Frame::Upsert(entry)) = frame(&format!(r#"{{"type":"{kind}","object":{object}}}"#)) else { panic!() };
        assert_eq!((entry.subject.as_str(), entry.item.version), ("Service default/a", 7));
    }
    assert!(matches!(frame(&format!(r#"{{"type":"DELETED","object":{object}}}"#)), Ok(Frame::Deleted(_))));
    let stopped = r#"{"type":"ERROR","object":{"code":500,"message":"stop to watch sqlite/meta_v2"}}"#;
    let expected = Frame::Error { code: 500, message: "stop to watch sqlite/meta_v2".to_owned() };
    assert_eq!(frame(stopped), Ok(expected));
    assert_eq!(frame(r#"{"type":"BOOKMARK","object":{}}"#), Ok(Frame::Other));
    for garbage in
        ["", "{}", "x", r#"{"type":"ADDED"}"#, r#"{"type":"DELETED","object":{"metadata":{}}}"#, r#"{"type":7}"#]
    {
        frame(garbage).unwrap_err();
    }
}

#[test]
fn the_message_of_a_refusal_is_that_of_its_status_or_its_beginning() {
    for (body, expected) in [
        (r#"{"kind":"Status","message":"Unauthorized\n"}"#, "Unauthorized"),
        ("Client sent an HTTP request to an HTTPS server.\n", "Client sent an HTTP request to an HTTPS server."),
        ("", ""),
        ("{\"a\":1}", "\"{\\\"a\\\":1}\""),
        ("\u{1b}[31mred", "[31mred"),
    ] {
        assert_eq!(message(body.as_bytes()), expected, "{body}");
    }
}

proptest! {
    #[test]
    fn no_body_and_no_line_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), text in "[\\[\\]{}\":,a-z0-9 ]{0,200}") {
        for input in [bytes.as_slice(), text.as_bytes()] {
            let _ = read_list::<core::Service>(input, Kind::Service);
            let _ = read_frame::<core::Endpoints>(input, Kind::Endpoints);
            let _ = message(input);
        }
    }
}
