use proptest::prelude::*;

use super::*;

const SERVICE: &str =
    "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}\n";
const SLICE: &str = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: web-1\n  labels: {kubernetes.io/service-name: web}\naddressType: IPv4\nports: [{port: 8080}]\nendpoints: [{addresses: [10.0.0.1]}]\n";

fn names(parsed: &Parsed) -> Vec<String> {
    parsed.objects.iter().map(|object| format!("{} {}", object.kind(), object.name())).collect()
}

#[test]
fn reads_all_documents_and_skips_empty_and_foreign_ones() {
    let foreign = "apiVersion: apps/v1\nkind: Deployment\nspec: {replicas: many}\n";
    // Same kind, other group.
    let knative = "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: other}\n";
    let text =
        format!("# a comment\n---\n{SERVICE}---\n---\n# nothing\n---\n{foreign}---\n{knative}...\n---\n{SLICE}---\n");
    let parsed = parse(&text, Format::Yaml);
    assert_eq!(names(&parsed), ["Service default/web", "EndpointSlice default/web-1"]);
    assert_eq!(parsed.problem(), None);
    assert_eq!(parse("", Format::Yaml), Parsed::default());
    assert_eq!(parse(" \n", Format::Json), Parsed::default());
}

#[test]
fn reads_lists_of_every_form_in_both_formats() {
    let service = r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"web"},"spec":{"clusterIP":"None"}}"#;
    let bare = r#"{"metadata":{"name":"bare"},"spec":{"clusterIP":"None"}}"#;
    let endpoints = r#"{"metadata":{"name":"web"},"subsets":[]}"#;
    let slice = r#"{"metadata":{"name":"web-1","labels":{"kubernetes.io/service-name":"web"}},"addressType":"IPv6","endpoints":[]}"#;
    let cases = [
        (
            format!(r#"{{"apiVersion":"v1","kind":"List","items":[{service},{{"apiVersion":"v1","kind":"Pod"}}]}}"#),
            "Service default/web",
        ),
        (format!(r#"{{"apiVersion":"v1","kind":"ServiceList","items":[{bare}]}}"#), "Service default/bare"),
        (format!(r#"{{"apiVersion":"v1","kind":"EndpointsList","items":[{endpoints}]}}"#), "Endpoints default/web"),
        (
            r#"{"apiVersion":"v1","kind":"NodeList","items":[{"metadata":{"name":"edge1"}}]}"#.to_owned(),
            "Node edge1",
        ),
        (
            r#"{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Node","metadata":{"name":"edge1"}}]}"#
                .to_owned(),
            "Node edge1",
        ),
        (
            format!(r#"{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSliceList","items":[{slice}]}}"#),
            "EndpointSlice default/web-1",
        ),
    ];
    for (text, expected) in cases {
        for format in [Format::Yaml, Format::Json] {
            let parsed = parse(&text, format);
            assert_eq!((names(&parsed), parsed.problem()), (vec![expected.to_owned()], None), "{format:?}: {text}");
        }
    }
    // Several documents, and tabs between tokens, as jq --tab writes them.
    let parsed = parse(&format!("{service}\n\t{service}"), Format::Json);
    assert_eq!((parsed.objects.len(), parsed.problem()), (2, None));
}

#[test]
fn reads_nodes_in_both_formats() {
    let json = r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"edge1","labels":{"zone":"a"}}}"#;
    let yaml = "apiVersion: v1\nkind: Node\nmetadata: {name: edge1, labels: {zone: a}}\n";
    for (text, format) in [(json, Format::Json), (yaml, Format::Yaml)] {
        let parsed = parse(text, format);
        assert_eq!((names(&parsed), parsed.problem()), (vec!["Node edge1".to_owned()], None));
        assert!(matches!(&parsed.objects[0], Object::Node(node) if node.label("zone") == Some("a")));
    }
}

#[test]
fn an_object_that_belongs_to_no_service_is_reported_and_hides_nothing() {
    let orphan = SLICE.replace("kubernetes.io/service-name: web", "app: web");
    let parsed = parse(&format!("{SERVICE}---\n{orphan}"), Format::Yaml);
    assert_eq!(names(&parsed), ["Service default/web"]);
    assert!(parsed.problem().unwrap().contains("belongs to no Service"));
    assert_eq!(parsed.broken, Vec::<String>::new(), "what the file no longer has is known to be gone");
}

#[test]
fn a_byte_order_mark_and_windows_line_ends_are_nothing() {
    let text = format!("\u{feff}{}", SERVICE.replace('\n', "\r\n"));
    let parsed = parse(&text, Format::Yaml);
    assert_eq!((names(&parsed), parsed.problem()), (vec!["Service default/web".to_owned()], None));
    let parsed = parse("\u{feff}{\"apiVersion\": \"v1\", \"kind\": \"Pod\"}", Format::Json);
    assert_eq!(parsed.problem(), None);
}

#[test]
fn brackets_without_end_are_refused_at_once() {
    // Unread, as the reader's time goes with the square of the depth.
    let parsed = parse(&"[".repeat(4 << 20), Format::Yaml);
    assert!(parsed.problem().unwrap().contains("nested more than"));
}

#[test]
fn reads_destination_rules_of_every_version_in_both_formats() {
    for version in ["v1alpha3", "v1beta1", "v1"] {
        let metadata = r#"{"name":"web","creationTimestamp":null}"#;
        let spec = r#"{"host":"web","trafficPolicy":{"loadBalancer":{"consistentHash":{"useSourceIp":true}}}}"#;
        let body = format!(r#""metadata":{metadata},"spec":{spec}"#);
        let head = format!(r#""apiVersion":"networking.istio.io/{version}","kind":"DestinationRule"#);
        let texts = [
            format!("{{{head}\",{body}}}"),
            format!(r#"{{"apiVersion":"v1","kind":"List","items":[{{{head}",{body}}}]}}"#),
            format!(r#"{{{head}List","items":[{{{body}}}]}}"#),
        ];
        for (text, format) in texts.iter().flat_map(|text| [(text, Format::Json), (text, Format::Yaml)]) {
            let parsed = parse(text, format);
            assert_eq!(parsed.problem(), None, "{text}");
            let Object::DestinationRule(rule) = &parsed.objects[0] else { panic!("{text}") };
            assert_eq!(rule.balance, crate::model::Balance::SourceIp, "{text}");
        }
    }
    let rule = "apiVersion: networking.istio.io/v2\nkind: DestinationRule\n";
    assert_eq!(
        parse(rule, Format::Yaml).broken,
        ["document 1: apiVersion: \"networking.istio.io/v2\" of kind DestinationRule is not supported; expected \
          networking.istio.io/v1 or networking.istio.io/v1beta1 or networking.istio.io/v1alpha3"]
    );
}

#[test]
fn a_rule_with_a_bad_field_is_partly_used_and_one_that_is_no_rule_costs_only_itself() {
    let head = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: web}\n";
    let parsed = parse(&format!("{head}spec: {{host: [web]}}\n---\n{SERVICE}"), Format::Yaml);
    assert_eq!(names(&parsed), ["DestinationRule default/web", "Service default/web"]);
    let fault = "document 1: DestinationRule default/web: spec.host: a list is wrong; expected a string";
    assert_eq!((&parsed.broken[..], &parsed.partial[..]), (&[][..], &[fault.to_owned()][..]));
    // What only YAML can say.
    for spec in ["{1: 2, [a]: b}", "!tag x", ".nan", "[.inf]", "0xffffffffffffffffffffff"] {
        let parsed = parse(&format!("{head}spec: {spec}\n---\n{SERVICE}"), Format::Yaml);
        assert_eq!(names(&parsed).last().unwrap(), "Service default/web", "{spec}");
    }
}

#[test]
fn a_bad_document_costs_only_itself_and_is_named_with_its_line() {
    let bad = "apiVersion: v1\nkind: Service\nmetadata: {name: bad}\nspec:\n  ports:\n  - port: eighty\n";
    let parsed = parse(&format!("{SERVICE}---\n{bad}---\n{SLICE}"), Format::Yaml);
    assert_eq!(names(&parsed), ["Service default/web", "EndpointSlice default/web-1"]);
    assert_eq!(
        parsed.broken,
        ["document 2: spec.ports[0].port: invalid type: string \"eighty\", expected i32 at line 11 column 11"]
    );
}

#[test]
fn a_syntax_error_is_named_with_its_line_and_keeps_what_came_before() {
    let parsed = parse(&format!("{SERVICE}---\nkind: [\n"), Format::Yaml);
    assert_eq!(names(&parsed), ["Service default/web"]);
    assert_eq!(parsed.broken.len(), 1, "{:?}", parsed.broken);
    assert!(
        parsed.broken[0].starts_with("document 2: ") && parsed.broken[0].contains("at line"),
        "{:?}",
        parsed.broken
    );

    let parsed = parse("{\"apiVersion\": \"v1\",\n\"kind\": }", Format::Json);
    assert_eq!(parsed.broken, ["document 1: expected value at line 2 column 9"]);
    // The reader of the second document would say line 2.
    let text = "{\"apiVersion\":\"v1\",\n\"kind\":\"Pod\"}\n{\"apiVersion\":\"v1\",\n\"kind\":7}";
    let parsed = parse(text, Format::Json);
    assert_eq!(parsed.broken, ["document 2: invalid type: integer `7`, expected a string at line 4 column 8"]);
}

#[test]
fn says_what_a_document_lacks() {
    let cases = [
        ("kind: Service\n", "document 1: apiVersion: missing"),
        ("apiVersion: v1\n", "document 1: kind: missing"),
        ("just text\n", "document 1: invalid type: string \"just text\", expected an object with apiVersion and kind"),
        (
            "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\n",
            "document 1: apiVersion: \"discovery.k8s.io/v1beta1\" of kind EndpointSlice is not supported; expected discovery.k8s.io/v1",
        ),
        ("apiVersion: v1\nkind: Service\nspec: {}\n", "document 1: metadata.name: missing"),
        (
            "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: List}\n",
            "document 1: items[0]: a list inside a list is not supported",
        ),
        (
            "apiVersion: v1\nkind: ServiceList\nitems:\n- {spec: {ports: [{port: x}]}}\n",
            "document 1: items[0]: invalid type: string \"x\", expected i32",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(parse(text, Format::Yaml).broken, [expected], "{text}");
    }
}

#[test]
fn faults_inside_a_usable_object_are_partial() {
    let parsed = parse(&SERVICE.replace("port: 80", "port: 0"), Format::Yaml);
    assert_eq!(names(&parsed), ["Service default/web"]);
    assert!(parsed.broken.is_empty());
    assert_eq!(
        parsed.partial,
        ["document 1: Service default/web: spec.ports[0].port: 0 is not a port; expected 1 to 65535"]
    );
}

#[test]
fn many_problems_are_counted_rather_than_listed() {
    let parsed = parse(&"kind: Service\n---\n".repeat(20), Format::Yaml);
    let problem = parsed.problem().unwrap();
    assert!(problem.ends_with("; and 12 more"), "{problem}");
}

#[test]
fn aliases_do_not_blow_up() {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for i in 1..12 {
        let part = vec![format!("*a{}", i - 1); 10].join(", ");
        text.push_str(&format!("a{i}: &a{i} [{part}]\n"));
    }
    let parsed = parse(&format!("apiVersion: v1\nkind: List\nitems: *a11\n{text}"), Format::Yaml);
    assert!(!parsed.broken.is_empty());
}

proptest! {
    #[test]
    fn never_panics_on_any_text(text in ".*") {
        parse(&text, Format::Yaml);
        parse(&text, Format::Json);
    }

    #[test]
    fn never_panics_on_a_damaged_manifest(at in 0_usize..400, end in 0_usize..40, insert in "[-\\[\\]{}:,&*!#'\" \n\t\\PC]{0,4}") {
        let mut text = format!("{SERVICE}---\n{SLICE}");
        let at = at.min(text.len());
        text.replace_range(at..(at + end).min(text.len()), &insert);
        parse(&text, Format::Yaml);
        parse(&text, Format::Json);
    }
}

#[test]
fn what_is_read_in_one_pass_reads_the_same_document_by_document() {
    let flow =
        "{apiVersion: v1, kind: Service, metadata: {name: flow}, spec: {clusterIP: 10.0.0.9, ports: [{port: 80}]}}\n";
    // Lines that look like a head and are none, and a head that no line shows.
    let inside = "apiVersion: v1\nkind: Secret\ndata: {text: 'a\nkind: Service\napiVersion: v1\n'}\n";
    let hidden =
        "metadata: {name: x,\nkind: Service,\napiVersion: v1}\nspec: {clusterIP: 10.0.0.9, ports: [{port: 80}]}\n";
    let twice = format!("kind: Secret\n{SERVICE}");
    let quoted = SERVICE.replace("kind: Service", "kind: \"Service\" # so it is");
    let pod = "apiVersion: v1\nkind: Pod\nspec: {nodeName: [x]}\n";
    let wrong = SERVICE.replace("name: web", "name: [web]");
    let faulty = SERVICE.replace("port: 80", "port: 0");
    let pieces = [
        "",
        "# nothing\n",
        "---\n",
        "--- # empty\n",
        "...\n",
        "%YAML 1.1\n",
        "null\n",
        "- kind: Service\n",
        SERVICE,
        SLICE,
        flow,
        inside,
        hidden,
        &twice,
        &quoted,
        pod,
        &wrong,
        &faulty,
        "kind: [\n",
    ];
    let mut at_once = 0;
    for a in pieces {
        for b in pieces {
            for text in [format!("{a}{b}"), format!("{a}---\n{b}"), format!("---\n{a}---\n{b}---\n")] {
                let mut expected = Parsed::default();
                yaml_documents(&text, &mut expected);
                assert_eq!(parse(&text, Format::Yaml), expected, "{text}");
                at_once += usize::from(one_pass::objects(&text).is_some_and(|objects| !objects.is_empty()));
            }
        }
    }
    assert!(at_once > 20, "{at_once}");
    assert!(one_pass::objects(&format!("{SERVICE}---\n{SLICE}---\n{pod}")).is_some_and(|objects| objects.len() == 2));
}
