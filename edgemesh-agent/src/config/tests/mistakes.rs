//! What a user gets to read about a mistake.

use super::*;

#[test]
fn names_key_line_and_what_was_meant_of_an_unknown_key() {
    let cases = [
        (
            "modules:\n  edgeProxy:\n    enabel: true",
            "agent.yaml:3: modules.edgeProxy.enabel: unknown key; did you mean modules.edgeProxy.enable?",
        ),
        (
            "common: {}",
            "agent.yaml:1: common: unknown key; known here: apiVersion, kind, kubeAPIConfig, commonConfig, modules",
        ),
        ("commonconfg: {}", "agent.yaml:1: commonconfg: unknown key; did you mean commonConfig?"),
        // Right in name, wrong in place.
        (
            "bridgeDeviceIP: 1.2.3.4",
            "agent.yaml:1: bridgeDeviceIP: unknown key; did you mean commonConfig.bridgeDeviceIP?",
        ),
        (
            "\n\n? x y\n: 1",
            "agent.yaml:3: \"x y\": unknown key; known here: apiVersion, kind, kubeAPIConfig, commonConfig, modules",
        ),
        (
            "modules: {edgeTunnel: {relayNodes: [{nodeName: a}, {nodename: b, adress: [c]}]}}",
            "agent.yaml:1: modules.edgeTunnel.relayNodes[1].adress: unknown key; known here: nodeName, advertiseAddress",
        ),
        (
            "modules: {edgeTunnel: {relayNodes: [{nodeName: a, advertiseAdress: [c]}]}}",
            "agent.yaml:1: modules.edgeTunnel.relayNodes[0].advertiseAdress: unknown key; \
             did you mean modules.edgeTunnel.relayNodes[0].advertiseAddress?",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(refused(text), [expected], "{text}");
        // Lenient, the same is a note.
        let mut loaded = parse(text, "agent.yaml", Leniency::Lenient, &POD).unwrap();
        let note = expected.replace("unknown key;", "unknown key, ignored;");
        assert!(notes(&loaded).contains(&note), "{:?}", loaded.notes);
        // What is right beside it counts.
        loaded.config.tunnel.relays.clear();
        assert_eq!(loaded.config, defaults());
    }
}

#[test]
fn says_what_a_value_has_to_look_like() {
    let long = format!("/{}", "x".repeat(107));
    let long_message = format!(
        "given \"/{}...\"; expected an absolute path of at most 107 bytes that does not end in '/'",
        "x".repeat(63)
    );
    let of_servers = |given: &str| {
        format!(
            "given {given}; expected a list of DNS servers, each IP or IP:PORT, such as [10.96.0.10, '[fd00::10]:53']"
        )
    };
    let servers = (of_servers("a text \"10.96.0.10\""), of_servers("\"coredns\""), of_servers("\"0.0.0.0\""));
    let of_stubs = |given: &str| {
        format!(
            "given {given}; expected a list of mappings with domain and servers, such as {{domain: corp.example, servers: \
             [192.0.2.53]}}"
        )
    };
    let stubs = (of_stubs("a mapping"), of_stubs("\"server\""));
    let cases = [
        ("modules.edgeProxy.enable", "maybe", "given a text \"maybe\"; expected true or false"),
        ("modules.edgeProxy.enable", "'true'", "given a text in quotes \"true\"; expected true or false"),
        ("modules.edgeProxy.enable", "1", "given a number \"1\"; expected true or false"),
        ("modules.edgeProxy.enable", "[true]", "given a list; expected true or false"),
        ("modules.edgeProxy", "true", "given a truth value; expected a mapping"),
        ("modules", "[]", "given a list; expected a mapping"),
        (
            "commonConfig.aliasCIDR",
            "198.18.0.0/30",
            "given \"198.18.0.0/30\"; expected a network of IPv4 from /8 to /28 such as 198.18.0.0/16",
        ),
        (
            "commonConfig.aliasCIDR",
            "127.0.0.0/8",
            "given \"127.0.0.0/8\"; expected a network of IPv4 from /8 to /28 such as 198.18.0.0/16",
        ),
        (
            "commonConfig.aliasCIDRv6",
            "198.18.0.0/16",
            "given \"198.18.0.0/16\"; expected a network of IPv6 from /32 to /112 such as fd6d:e54a:1a5e:a11a::/64",
        ),
        (
            "modules.edgeTunnel.directCIDRs",
            "[10.0.0.0]",
            "given \"10.0.0.0\"; expected a list of networks, such as [10.0.0.0/8, 'fd00::/8']",
        ),
        (
            "modules.edgeTunnel.neverDirectCIDRs",
            "10.0.0.0/8",
            "given a text \"10.0.0.0/8\"; expected a list of networks, such as [10.0.0.0/8, 'fd00::/8']",
        ),
        ("kubeAPIConfig.qps", "0", "given a number \"0\"; expected a whole number from 1 to 4294967295"),
        ("kubeAPIConfig.qps", "-1", "given a number \"-1\"; expected a whole number from 1 to 4294967295"),
        (
            "kubeAPIConfig.burst",
            "4294967296",
            "given a number \"4294967296\"; expected a whole number from 1 to 4294967295",
        ),
        ("kubeAPIConfig.burst", "1.5", "given a number \"1.5\"; expected a whole number from 1 to 4294967295"),
        ("kubeAPIConfig.burst", "'5'", "given a text in quotes \"5\"; expected a whole number from 1 to 4294967295"),
        ("kubeAPIConfig.burst", "010", "given a number \"010\"; expected a whole number from 1 to 4294967295"),
        (
            "modules.edgeProxy.ebpf.canaryPeriod",
            "30s",
            "given a text \"30s\"; expected a whole number of seconds from 0, which switches it off, to 86400",
        ),
        (
            "modules.edgeProxy.ebpf.canaryPeriod",
            "-1",
            "given a number \"-1\"; expected a whole number of seconds from 0, which switches it off, to 86400",
        ),
        (
            "modules.edgeProxy.ebpf.maxFrontends",
            "many",
            "given a text \"many\"; expected a whole number from 1 to 4294967295",
        ),
        ("commonConfig.maxBackendSeries", "-1", "given a number \"-1\"; expected a whole number from 0 to 4294967295"),
        (
            "commonConfig.bridgeDeviceIP",
            "300.1.1.1",
            "given \"300.1.1.1\"; expected an IP address such as 169.254.96.16",
        ),
        (
            "commonConfig.bridgeDeviceIP",
            "169.254.96.16/32",
            "given \"169.254.96.16/32\"; expected an IP address such as 169.254.96.16",
        ),
        ("commonConfig.bridgeDeviceIP", "0.0.0.0", "given \"0.0.0.0\"; expected the address of one host"),
        ("commonConfig.bridgeDeviceIP", "ff02::1", "given \"ff02::1\"; expected the address of one host"),
        (
            "commonConfig.bridgeDeviceName",
            "sixteen-bytes-xx",
            "given \"sixteen-bytes-xx\"; expected a device name of 1 to 15 bytes without '/', ':', '%' or white space",
        ),
        (
            "commonConfig.bridgeDeviceName",
            "''",
            "given \"\"; expected a device name of 1 to 15 bytes without '/', ':', '%' or white space",
        ),
        (
            "commonConfig.bridgeDeviceName",
            "\"a\\tb\"",
            "given \"a\\tb\"; expected a device name of 1 to 15 bytes without '/', ':', '%' or white space",
        ),
        (
            "commonConfig.bridgeDeviceName",
            "true",
            "given a truth value \"true\"; expected a device name of 1 to 15 bytes without '/', ':', '%' or white space",
        ),
        (
            "commonConfig.adminAddress",
            "':20008'",
            "given \":20008\"; expected IP:PORT such as 127.0.0.1:20008 or [::1]:20008, or \"\" for none",
        ),
        ("commonConfig.controlSocket", long.as_str(), long_message.as_str()),
        (
            "commonConfig.controlSocket",
            "run/agent.sock",
            "given \"run/agent.sock\"; expected an absolute path of at most 107 bytes that does not end in '/'",
        ),
        ("modules.edgeProxy.ebpf.pinDirectory", "bpf", "given \"bpf\"; expected an absolute path"),
        ("modules.edgeProxy.ebpf.cgroupRoot", "\"/a\\0b\"", "given \"/a\\0b\"; expected an absolute path, or \"\""),
        ("kubeAPIConfig.staticDirectory", "manifests", "given \"manifests\"; expected an absolute path, or \"\""),
        ("kubeAPIConfig.kubeConfig", "~/.kube/config", "given \"~/.kube/config\"; expected an absolute path, or \"\""),
        (
            "kubeAPIConfig.master",
            "10.0.0.1:6443",
            "given \"10.0.0.1:6443\"; expected an http:// or https:// URL such as https://10.0.0.1:6443, \
             without user and query, or \"\"",
        ),
        (
            "modules.edgeProxy.serviceFilterMode",
            "filterIfLabelExists",
            "given \"filterIfLabelExists\"; expected FilterIfLabelExists or FilterIfLabelDoesNotExists",
        ),
        ("modules.edgeProxy.dataplane", "nftables", "given \"nftables\"; expected auto or ebpf"),
        (
            "modules.edgeProxy.dataplane",
            "iptables",
            "the iptables data plane is not in this version; expected auto or ebpf",
        ),
        ("modules.edgeDNS.enable", "auto", "given a text \"auto\"; expected true or false"),
        ("modules.edgeDNS.listenPort", "0", "given a number \"0\"; expected a port from 1 to 65535"),
        ("modules.edgeDNS.listenPort", "65536", "given a number \"65536\"; expected a port from 1 to 65535"),
        ("modules.edgeDNS.clusterDomain", "a..b", "given \"a..b\"; expected a domain such as cluster.local"),
        ("modules.edgeDNS.cacheDNS.upstreamServers", "10.96.0.10", servers.0.as_str()),
        ("modules.edgeDNS.cacheDNS.upstreamServers", "[coredns]", servers.1.as_str()),
        ("modules.edgeDNS.cacheDNS.upstreamServers", "[0.0.0.0]", servers.2.as_str()),
        ("modules.edgeDNS.stubDomains", "[{domain: corp.example}]", stubs.0.as_str()),
        ("modules.edgeDNS.stubDomains", "[{domain: corp.example, server: [192.0.2.1]}]", stubs.1.as_str()),
        (
            "commonConfig.bridgeDeviceIPv6",
            "fe80::1",
            "given \"fe80::1\"; expected an IPv6 address of one host such as fd00:169:254:96::16, or \"\"",
        ),
        // Keys without effect: checked for their type, and their text is kept out of the message.
        ("modules.edgeTunnel.transport", "udp", "given a text; expected tcp or ws or quic"),
        ("modules.edgeTunnel.maxCandidates", "'15'", "given a text in quotes; expected a whole number"),
        ("modules.edgeCNI.enable", "5", "given a number; expected true or false"),
        ("modules.edgeTunnel.rendezvous", "{a: b}", "given a mapping; expected a text"),
        ("modules.edgeTunnel.relayNodes", "{nodeName: a}", "given a mapping; expected a list of mappings"),
        ("modules.edgeProxy.loadBalancer.consistentHash.load", "much", "given a text; expected a number"),
        ("kind", "Deployment", "given \"Deployment\"; expected EdgeMeshAgent"),
        ("kind", "ConfigMap", "given a whole ConfigMap; expected EdgeMeshAgent, the text under its data key"),
        ("kind", "[]", "given a list; expected EdgeMeshAgent"),
        ("apiVersion", "[]", "given a list; expected agent.edgemesh.config.kubeedge.io/v1alpha1"),
    ];
    for (path, value, expected) in cases {
        let line = path.split('.').count();
        assert_eq!(
            refused(&nested(path, value)),
            [format!("agent.yaml:{line}: {path}: {expected}")],
            "{path}: {value}"
        );
    }
}

#[test]
fn reports_all_mistakes_at_once_in_the_order_of_the_file() {
    let text = "kubeAPIConfig:
  kubeConfig: config
  qps: fast
modules:
  edgeProxy:
    enabled: true
    dataplane: xdp
commonConfig:
  bridgeDeviceIP: nowhere
  BridgeDeviceIP: 1.2.3.4
";
    assert_eq!(
        refused(text),
        [
            "agent.yaml:2: kubeAPIConfig.kubeConfig: given \"config\"; expected an absolute path, or \"\"",
            "agent.yaml:3: kubeAPIConfig.qps: given a text \"fast\"; expected a whole number from 1 to 4294967295",
            "agent.yaml:6: modules.edgeProxy.enabled: unknown key; did you mean modules.edgeProxy.enable?",
            "agent.yaml:7: modules.edgeProxy.dataplane: given \"xdp\"; expected auto or ebpf",
            "agent.yaml:9: commonConfig.bridgeDeviceIP: given \"nowhere\"; expected an IP address such as 169.254.96.16",
            "agent.yaml:10: commonConfig.bridgeDeviceIP: given twice, on lines 9 and 10; expected once, in any case",
        ]
    );
}

#[test]
fn a_cache_with_nobody_to_ask_is_a_mistake() {
    let text = "modules: {edgeDNS: {enable: true, cacheDNS: {enable: true, autoDetect: false}}}";
    let expected = "agent.yaml: modules.edgeDNS.cacheDNS.upstreamServers: empty, and autoDetect is false; expected the \
                    cluster's DNS servers, or autoDetect: true";
    assert_eq!(refused(text), [expected]);
    accepted(&text.replace("{enable: true,", "{enable: false,"));
}

#[test]
fn shows_no_more_than_a_screenful() {
    let text: String = (0..80).map(|n| format!("key{n}: 1\n")).collect();
    let lines = refused(&text);
    assert_eq!(lines.len(), 51);
    assert_eq!(lines[50], "agent.yaml: 30 more such lines are left out");
    let lenient = parse(&text, "agent.yaml", Leniency::Lenient, &POD).unwrap();
    assert_eq!(lenient.notes.len(), 51);
}

#[test]
fn refuses_a_key_given_twice() {
    let cases = [
        ("kind: EdgeMeshAgent\nmodules:\nkind: EdgeMeshAgent", "3: kind: given twice, on lines 1 and 3"),
        (
            "modules:\n  edgeProxy:\n    enable: true\n    Enable: false",
            "4: modules.edgeProxy.enable: given twice, on lines 3 and 4",
        ),
        ("{modules: {}, MODULES: {}}", "1: modules: given twice, on lines 1 and 1"),
    ];
    for (text, expected) in cases {
        let expected = format!("agent.yaml:{expected}; expected once, in any case");
        assert_eq!(refused(text), [expected.as_str()], "{text}");
        // Which of the two would count is a guess in any case.
        let lenient = parse(text, "agent.yaml", Leniency::Lenient, &POD).unwrap_err().to_string();
        assert_eq!(lenient, expected, "{text}");
    }
}

#[test]
fn says_where_text_is_no_yaml() {
    let cases = [
        ("modules:\n  edgeProxy: [", "agent.yaml:2:", "malformed YAML: "),
        ("a: b: c", "agent.yaml:1:", "malformed YAML: "),
        ("modules:\n\tedgeProxy: 1", "agent.yaml:2:", "malformed YAML: "),
        ("kind: \"EdgeMeshAgent", "agent.yaml:1:", "malformed YAML: "),
        ("a: &x 1\nb: *x", "agent.yaml:2:4: ", "an alias (*name); write the value out in its place"),
        ("a: !secret 1", "agent.yaml:1:", "a YAML tag (!name); remove it"),
        ("? [a]\n: 1", "agent.yaml:1:3: ", "a list or a mapping as a key; expected a word"),
        (
            "kind: EdgeMeshAgent\n---\nkind: x",
            "agent.yaml:3:",
            "a second YAML document; expected one document in the file",
        ),
        ("kubeAPIConfig", "agent.yaml:1: ", "the file is a text; expected a mapping of keys"),
        ("- a", "agent.yaml:1: ", "the file is a list; expected a mapping of keys"),
    ];
    for (text, place, message) in cases {
        let lines = refused(text);
        assert_eq!(lines.len(), 1, "{lines:?} of {text}");
        assert!(lines[0].starts_with(place) && lines[0].contains(message), "{} of {text}", lines[0]);
    }
    let deep = refused(&format!("{}{}", "[".repeat(33), "]".repeat(33)));
    assert_eq!(deep, ["agent.yaml:1:33: nested more than 32 levels deep"]);
}

#[test]
fn reads_what_yaml_leaves_to_taste() {
    for text in [
        "---\n",
        "# nothing\n",
        "{}",
        "\u{feff}kind: EdgeMeshAgent\n",
        "---\nkind: EdgeMeshAgent\n---\n",
        "kind: !!str EdgeMeshAgent\r\n",
        "kind: &anchor EdgeMeshAgent\n...\n",
    ] {
        assert_eq!(accepted(text).config, defaults(), "{text:?}");
    }
}

#[test]
fn says_how_to_give_a_source_where_there_is_none() {
    let ways = "expected it, or kubeAPIConfig.kubeConfig (or kubeAPIConfig.master), or kubeAPIConfig.staticDirectory, or \
                kubeAPIConfig.source: metaServer";
    let cloud = Environment { kubernetes_port: true, kubernetes_service_host: false };
    for (text, environment, place) in
        [("", cloud, "f: "), ("kind: EdgeMeshAgent\nkubeAPIConfig: {source: inCluster}", NOWHERE, "f:2: ")]
    {
        let error = parse(text, "f", Leniency::Strict, &environment).unwrap_err().to_string();
        let reason = "KUBERNETES_SERVICE_HOST is not set in this pod of the cluster";
        assert_eq!(error, format!("{place}kubeAPIConfig: no metadata source, as {reason}; {ways}"), "{text}");
    }
}

#[test]
fn a_refused_source_is_no_missing_source() {
    let error = parse("kubeAPIConfig: {master: nowhere}", "f", Leniency::Strict, &NOWHERE).unwrap_err().to_string();
    assert!(error.starts_with("f:1: kubeAPIConfig.master: given") && !error.contains('\n'), "{error}");
}

#[test]
fn refuses_a_source_beside_one_that_names_itself() {
    let expected =
        |key: &str| format!("agent.yaml:3: kubeAPIConfig.source: given together with {key}; expected one of the two");
    for (other, key) in
        [("master: https://m", "kubeAPIConfig.master"), ("staticDirectory: /m", "kubeAPIConfig.staticDirectory")]
    {
        let text = format!("kubeAPIConfig:\n  {other}\n  source: metaServer\n");
        assert_eq!(refused(&text), [expected(key)]);
    }
    let lines = refused("kubeAPIConfig: {source: edge}");
    assert!(lines[0].ends_with("expected auto, inCluster or metaServer") && lines.len() == 1, "{lines:?}");
}

#[test]
fn refuses_two_sources() {
    let text = "kubeAPIConfig:\n  staticDirectory: /m\n  kubeConfig: /k\n  master: https://m\n";
    assert_eq!(
        refused(text),
        [
            "agent.yaml:3: kubeAPIConfig.kubeConfig: given together with kubeAPIConfig.staticDirectory; expected one of the two",
            "agent.yaml:4: kubeAPIConfig.master: given together with kubeAPIConfig.staticDirectory; expected one of the two",
        ]
    );
}

#[test]
fn refuses_a_kubeconfig_that_is_not_there() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path().to_str().unwrap();
    let cases = [
        (directory.to_owned(), format!("{directory} is a directory")),
        (
            format!("{directory}/none"),
            format!("cannot look up {directory}/none: No such file or directory (os error 2)"),
        ),
    ];
    for (path, problem) in cases {
        let expected =
            format!("agent.yaml:2: kubeAPIConfig.kubeConfig: {problem}; expected the path of an existing kubeconfig");
        assert_eq!(refused(&nested("kubeAPIConfig.kubeConfig", &path)), [expected]);
    }
}

#[test]
fn keeps_secrets_out_of_messages() {
    const SECRET: &str = "JugH9HP1XBouyO5pWGeZa8Lt";
    let texts = [
        SECRET.to_owned(),
        format!("- {SECRET}"),
        format!("secret: {SECRET}"),
        format!("modules: {{edgeTunnel: {{psk: {SECRET}}}}}"),
        format!("modules: {{edgeTunnel: {{psk: {{path: [{SECRET}]}}}}}}"),
        format!("modules: {{edgeTunnel: {{psk: {{path: {SECRET}}}}}}}"),
        format!("modules: {{edgeTunnel: {{psk: {{enable: {SECRET}, key: {SECRET}}}}}}}"),
        format!("modules: {{edgeTunnel: {{transport: {SECRET}}}}}"),
        format!("kubeAPIConfig: {{master: 'https://user:{SECRET}@host:6443'}}"),
        format!("kubeAPIConfig: {{master: 'user:{SECRET}@host'}}"),
        format!("kubeAPIConfig: {{master: 'https://host?token={SECRET}'}}"),
        format!("psk: *{SECRET}"),
        format!("psk: !{SECRET} x"),
        format!("psk: \"{SECRET}"),
        format!("psk: [{SECRET}"),
        format!("psk: a: {SECRET}"),
    ];
    for text in texts {
        let error = parsed(&text).unwrap_err();
        assert!(!format!("{error}{error:?}").contains(SECRET), "{error:?}");
    }
}

#[test]
fn loads_a_file_and_names_it_in_messages() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("edgemesh-agent.yaml");
    let loads = || load(&path, Leniency::Strict, &POD);
    let shown = path.display();

    let missing = loads().unwrap_err().to_string();
    assert!(missing.starts_with(&format!("cannot read the configuration file {shown}: No such file")), "{missing}");

    fs::write(&path, minimal_yaml()).unwrap();
    assert!(loads().unwrap().config.proxy.enable);

    fs::write(&path, "commonConfig:\n  nothing: 1\n").unwrap();
    assert!(loads().unwrap_err().to_string().starts_with(&format!("{shown}:2: commonConfig.nothing: unknown key")));

    fs::write(&path, b"kind: EdgeMeshAgent\nmodules: \xff\n").unwrap();
    assert_eq!(loads().unwrap_err().to_string(), format!("{shown}:2: not UTF-8; expected a YAML text"));

    fs::write(&path, "#".repeat(MAX_SIZE)).unwrap();
    assert_eq!(loads().unwrap().config, AgentConfig { file: Some(path.clone()), ..defaults() });
    fs::write(&path, "#".repeat(MAX_SIZE + 1)).unwrap();
    assert!(matches!(loads(), Err(ConfigError::TooLarge { .. })));

    let directory = load(directory.path(), Leniency::Strict, &POD).unwrap_err();
    assert!(matches!(directory, ConfigError::NotAFile { .. }), "{directory}");
}

#[test]
fn does_not_wait_for_a_pipe_that_nobody_writes_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert!(matches!(load(&path, Leniency::Strict, &POD), Err(ConfigError::NotAFile { .. })));
}
