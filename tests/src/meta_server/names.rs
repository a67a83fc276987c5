//! Kinds and resources guessed from each other, as KubeEdge does it and as it is right.

/// Right and wrong are the same for these.
const KNOWN: [(&str, &str); 5] = [
    ("endpoints", "Endpoints"),
    ("endpointslices", "EndpointSlice"),
    ("nodes", "Node"),
    ("namespaces", "Namespace"),
    ("services", "Service"),
];

/// What metaServer takes for the kind of a resource; `old` is KubeEdge up to 1.15.
pub(super) fn guessed_kind(resource: &str, old: bool) -> String {
    // Only the later ones know that namespaces are Namespaces.
    let known = KNOWN.iter().find(|(known, _)| *known == resource && !(old && resource == "namespaces"));
    if let Some((_, kind)) = known {
        return (*kind).to_owned();
    }
    let mut letters = resource.chars();
    let title: String = letters.next().into_iter().flat_map(char::to_uppercase).chain(letters).collect();
    if let Some(stem) = title.strip_suffix("ies") {
        return format!("{stem}y");
    }
    let plural_es = if old { title.ends_with("es") } else { title.ends_with("ses") };
    let stem = if plural_es { title.strip_suffix("es") } else { title.strip_suffix('s') };
    stem.map_or_else(|| title.clone(), str::to_owned)
}

/// What metaServer takes for the resource of a kind.
pub(super) fn guessed_resource(kind: &str) -> String {
    let lower = kind.to_ascii_lowercase();
    match lower.chars().last() {
        _ if kind == "Endpoints" => lower,
        Some('s') => format!("{lower}es"),
        Some('y') => format!("{}ies", lower.trim_end_matches('y')),
        _ => format!("{lower}s"),
    }
}

/// The resource that a kind really is.
pub(super) fn true_resource(kind: &str) -> String {
    if kind == "Gateway" { "gateways".to_owned() } else { guessed_resource(kind) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_as_kubeedge_does() {
        for (resource, now, before) in [
            ("services", "Service", "Service"),
            ("destinationrules", "Destinationrule", "Destinationrul"),
            ("namespaces", "Namespace", "Namespac"),
            ("configmaps", "Configmap", "Configmap"),
            ("ingresses", "Ingress", "Ingress"),
            ("policies", "Policy", "Policy"),
        ] {
            let before = if resource == "destinationrules" { "Destinationrul" } else { before };
            assert_eq!(guessed_kind(resource, false), now);
            assert_eq!(guessed_kind(resource, true), before);
        }
        assert_eq!(guessed_resource("Gateway"), "gatewaies");
        assert_eq!(guessed_resource("DestinationRule"), "destinationrules");
        assert_eq!(guessed_resource("Endpoints"), "endpoints");
    }
}
