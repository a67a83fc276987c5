//! Whatever the text, there is an answer and no panic.

use super::*;

/// A file with every kind of value.
fn valid() -> String {
    format!("{}{}", default_yaml(), edgemesh::DEFAULT_CONFIG.replace("apiVersion", "x").replace("kind", "y"))
}

/// What every answer has to keep to.
fn answers(text: &str) -> Result<(), TestCaseError> {
    let lines = text.split(['\n', '\r']).count() + 1;
    for leniency in [Leniency::Strict, Leniency::Lenient] {
        let notes = match parse(text, "f", leniency, &POD) {
            Ok(loaded) => loaded.notes,
            Err(ConfigError::Invalid { problems }) => {
                prop_assert!(!problems.is_empty());
                problems
            }
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        };
        for note in notes {
            prop_assert!(note.line.is_none_or(|line| (1..=lines).contains(&line)), "{note} of {lines} lines");
            prop_assert!(!note.to_string().contains(char::is_control), "{note:?}");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn answers_any_text(text in "(?s).{0,300}") {
        answers(&text)?;
    }

    #[test]
    fn answers_any_heap_of_yaml_signs(text in r#"([ \n\t:\-,#&*!|>'"%@`?{}\[\]~]|\.\.\.|---|<<|a|kind|modules|edgeProxy|enable|true|0x|1e9){0,120}"#) {
        answers(&text)?;
    }

    #[test]
    fn answers_a_file_with_something_changed(
        cuts in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..40, r#"([ \n:\-&*!|>'"{}\[\],#a0]|\PC){0,6}"#), 1..6),
    ) {
        let mut text: Vec<char> = valid().chars().collect();
        for (at, length, insert) in cuts {
            let start = at.index(text.len() + 1);
            let end = (start + length).min(text.len());
            text.splice(start..end, insert.chars());
        }
        answers(&text.into_iter().collect::<String>())?;
    }

    #[test]
    fn answers_any_value_of_any_key(
        key in any::<prop::sample::Index>(),
        value in prop_oneof![
            r#""\PC{0,80}""#, r"\PC{0,80}", r"[-+]?[0-9_.eExob]{1,40}", r"/[a-z/\x00-\x7f]{0,130}", r"[0-9a-f:.\[\]%]{1,45}",
            Just("[[], {}, ~]".to_owned()), Just("{a: 1}".to_owned()), Just("[{nodeName: [], x: 1}, 5]".to_owned()),
        ],
    ) {
        let leaves = leaves();
        let (path, _) = key.get(&leaves);
        answers(&nested(path, &value))?;
    }
}

#[test]
fn answers_hostile_files_in_time_and_space() {
    let size = MAX_SIZE - 100;
    let aliases = (1..20).fold("a0: &a0 [x]\n".to_owned(), |text, n| {
        let items = vec![format!("*a{}", n - 1); 10].join(", ");
        format!("{text}a{n}: &a{n} [{items}]\n")
    });
    let cases = [
        ("deep flow lists", "[".repeat(size)),
        ("deep flow mappings", "{a: ".repeat(size / 4)),
        ("deep block lists", "- ".repeat(size / 2)),
        ("deep block mappings", (0..1000).map(|n| format!("{}a:\n", " ".repeat(n))).collect()),
        ("billion laughs", aliases),
        ("one long key", "a".repeat(size) + ": 1"),
        ("one long value", format!("commonConfig: {{bridgeDeviceName: {}}}", "x".repeat(size))),
        ("many unknown keys", (0..size / 10).map(|n| format!("k{n}: 1\n")).collect()),
        ("many duplicates", "kind: a\n".repeat(size / 8)),
        ("many list items", format!("modules: {{edgeTunnel: {{relayNodes: [{}]}}}}", "1,".repeat(size / 2 - 40))),
        ("anchors", (0..size / 12).map(|n| format!("- &x{n} y\n")).collect()),
        ("a text that never ends", format!("kind: \"{}", "\\n".repeat(size / 2))),
        ("tabs", "\t".repeat(size)),
        ("document ends", "---\n".repeat(size / 4)),
    ];
    for (name, text) in cases {
        let start = std::time::Instant::now();
        let shown = match parse(&text, "f", Leniency::Lenient, &POD) {
            Ok(loaded) => notes(&loaded).first().cloned().unwrap_or_default(),
            Err(error) => error.to_string(),
        };
        assert!(shown.len() < 16 * 1024, "{name}: {} bytes of message", shown.len());
        assert!(start.elapsed() < Duration::from_secs(30), "{name} took {:?}", start.elapsed());
    }
}
