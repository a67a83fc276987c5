use std::{fs, time::Duration};

use proptest::prelude::*;
use serde_json::Value;

use super::{
    keys::{Draft, KEYS, Key, Kind, Plain},
    *,
};
use crate::{
    alias::Overrides,
    dns::forward::StubDomain,
    tunnel::{RelayNode, ServeRelay},
};

mod edgemesh;
mod fuzz;
mod mistakes;

/// A pod of the cluster, so that a file need not name a source.
const POD: Environment = Environment { kubernetes_port: true, kubernetes_service_host: true };
/// A process on some machine, or a pod of KubeEdge's edged, which has neither variable or the second one empty.
const NOWHERE: Environment = Environment { kubernetes_port: false, kubernetes_service_host: false };

fn parsed(text: &str) -> Result<Loaded, ConfigError> {
    parse(text, "agent.yaml", Leniency::Strict, &POD)
}

fn accepted(text: &str) -> Loaded {
    parsed(text).unwrap_or_else(|error| panic!("refused:\n{error}\nin:\n{text}"))
}

/// The lines of the refusal.
fn refused(text: &str) -> Vec<String> {
    match parsed(text) {
        Ok(loaded) => panic!("accepted {loaded:?}\nin:\n{text}"),
        Err(error) => error.to_string().lines().map(str::to_owned).collect(),
    }
}

fn notes(loaded: &Loaded) -> Vec<String> {
    loaded.notes.iter().map(Note::to_string).collect()
}

fn defaults() -> AgentConfig {
    AgentConfig {
        source: SourceConfig { kind: SourceKind::InCluster, qps: 100, burst: 200 },
        common: CommonConfig::default(),
        proxy: ProxyConfig::default(),
        dns: None,
        tunnel: TunnelConfig::default(),
        file: None,
    }
}

/// `a.b.c` and a value as nested YAML.
fn nested(path: &str, value: &str) -> String {
    let names: Vec<&str> = path.split('.').collect();
    let mut text = String::new();
    for (depth, name) in names.iter().enumerate() {
        let end = if depth + 1 == names.len() { format!(" {value}") } else { String::new() };
        text.push_str(&format!("{}{name}:{end}\n", "  ".repeat(depth)));
    }
    text
}

/// Every key of the table that holds a value, with its path.
fn leaves() -> Vec<(String, &'static Key)> {
    fn walk(keys: &'static [Key], path: &str, leaves: &mut Vec<(String, &'static Key)>) {
        for key in keys {
            let path = if path.is_empty() { key.name.to_owned() } else { format!("{path}.{}", key.name) };
            match &key.kind {
                Kind::Section(keys) => walk(keys, &path, leaves),
                Kind::Header(_) | Kind::Used(_) | Kind::Accepted(_) => leaves.push((path, key)),
            }
        }
    }
    let mut leaves = Vec::new();
    walk(KEYS, "", &mut leaves);
    leaves
}

#[test]
fn documents_the_defaults() {
    let config = accepted("").config;
    assert_eq!(config, defaults());
    assert_eq!(config.common.bridge_device_name, "edgemesh0");
    assert_eq!(config.common.bridge_device_ip.to_string(), "169.254.96.16");
    assert_eq!(config.common.admin_address, Some("127.0.0.1:20008".parse().unwrap()));
    assert_eq!(config.common.control_socket, Path::new("/run/edgemesh/agent.sock"));
    assert_eq!(config.common.max_backend_series, 1000);
    let snapshot = Path::new("/var/lib/edgemesh/agent/metadata.snapshot");
    assert_eq!(config.common.metadata_snapshot.as_deref(), Some(snapshot));
    assert!(!config.proxy.enable);
    assert_eq!(config.proxy.filter, ServiceFilter::UnlabelledOnly);
    assert_eq!(config.proxy.dataplane, DataplaneMode::Auto);
    assert_eq!(config.proxy.ebpf.cgroup_root, None);
    assert_eq!(config.proxy.ebpf.pin_directory, Path::new("/sys/fs/bpf/edgemesh"));
    assert_eq!((config.proxy.ebpf.max_frontends, config.proxy.ebpf.max_backends), (20_000, 200_000));
    assert_eq!(config.proxy.ebpf.canary_period.as_secs(), 30);
}

#[test]
fn takes_every_key_it_uses() {
    let loaded = accepted(
        "apiVersion: agent.edgemesh.config.kubeedge.io/v1alpha1
kind: EdgeMeshAgent
kubeAPIConfig:
  master: https://[fd00::1]:6443
  qps: 5
  burst: 1e+06
commonConfig:
  bridgeDeviceName: mesh
  bridgeDeviceIP: fd00::53
  bridgeDeviceIPv6: fd00::54
  adminAddress: '[::1]:0'
  controlSocket: /tmp/agent.sock
  maxBackendSeries: 0
  metadataSnapshot: ''
  aliasCIDR: 100.64.1.2/10
  aliasCIDRv6: fd00:a11a::/56
  aliasFile: ''
modules:
  edgeDNS:
    enable: true
    listenPort: 5353
    clusterDomain: Edge.Example.
    resolvConf: /run/resolv.conf
    stubDomains:
    - domain: Corp.Example
      servers: [192.0.2.53, '[fd00::53]:5353']
    serveStale: 0
    maxCacheEntries: 5
    answerOutside: true
    maxClientQueries: 0
    maxClientForwarded: 6
    maxWaiting: 7
    cacheDNS:
      enable: true
      autoDetect: false
      upstreamServers: [10.96.0.10, '10.96.0.11:5353', 'fd00::10']
      cacheTTL: 60
  edgeProxy:
    socks5Proxy: {Enable: true, listenPort: 1080, credentialsPath: /etc/edgemesh/socks5}
    enable: yes
    serviceFilterMode: FilterIfLabelDoesNotExists
    dataplane: ebpf
    ebpf:
      cgroupRoot: /sys/fs/cgroup/pods
      pinDirectory: /sys/fs/bpf/x
      maxFrontends: 7
      maxBackends: 8
      canaryPeriod: 0
      maxConnections: 9
      uplinks: [eth0, 'bond*']
      guestInterfaces: ['tap*']
      tcx: false
  edgeTunnel:
    enable: true
    directCIDRs: [10.0.0.0/8, 'fd00:10::/32']
    neverDirectCIDRs: [10.1.0.0/16]
    listenPort: 443
    allowedTargets: ['node:2222', '192.168.1.0/24:*']
    allowedPeers: [edge1, cloud1]
    serveRelay: whenPublic
    enableHolePunch: false
    announceAddresses: ['198.51.100.7:4443', '[2001:db8::7]:20006']
    relayNodes: [{nodeName: cloud1, advertiseAddress: [203.0.113.7, 'relay.example.org:443', '2001:db8::7']}]
    psk: {enable: false, path: /run/psk}
    tunnelLimitConfig: {tunnelBaseStreamIn: 7}
",
    );
    assert_eq!(notes(&loaded), [""; 0]);
    let kind = SourceKind::Kubeconfig { path: None, master: Some("https://[fd00::1]:6443".to_owned()) };
    let expected = AgentConfig {
        source: SourceConfig { kind, qps: 5, burst: 1_000_000 },
        common: CommonConfig {
            bridge_device_name: "mesh".to_owned(),
            bridge_device_ip: "fd00::53".parse().unwrap(),
            bridge_device_ipv6: Some("fd00::54".parse().unwrap()),
            admin_address: Some("[::1]:0".parse().unwrap()),
            control_socket: PathBuf::from("/tmp/agent.sock"),
            max_backend_series: 0,
            metadata_snapshot: None,
            aliases: AliasRanges { v4: "100.64.0.0/10".parse().unwrap(), v6: "fd00:a11a::/56".parse().unwrap() },
            alias_file: None,
        },
        proxy: ProxyConfig {
            enable: true,
            filter: ServiceFilter::LabelledOnly,
            dataplane: DataplaneMode::Ebpf,
            ebpf: EbpfConfig {
                cgroup_root: Some(PathBuf::from("/sys/fs/cgroup/pods")),
                pin_directory: PathBuf::from("/sys/fs/bpf/x"),
                max_frontends: 7,
                max_backends: 8,
                canary_period: Duration::ZERO,
                max_connections: 9,
                uplinks: vec!["eth0".to_owned(), "bond*".to_owned()],
                guest_interfaces: vec!["tap*".to_owned()],
                tcx: false,
            },
            socks5: Socks5Config {
                enable: true,
                listen_port: 1080,
                credentials: Some(PathBuf::from("/etc/edgemesh/socks5")),
            },
        },
        dns: Some(DnsConfig {
            listen_port: 5353,
            cluster_domain: "edge.example".parse().unwrap(),
            resolv_conf: PathBuf::from("/run/resolv.conf"),
            stub_domains: vec![StubDomain {
                domain: "corp.example".to_owned(),
                servers: vec!["192.0.2.53:53".parse().unwrap(), "[fd00::53]:5353".parse().unwrap()],
            }],
            serve_stale: Duration::ZERO,
            max_cache_entries: 5,
            max_client_queries: 0,
            max_client_forwarded: 6,
            max_waiting: 7,
            answer_outside: true,
            cache_dns: CacheDnsConfig {
                enable: true,
                auto_detect: false,
                upstream_servers: ["10.96.0.10:53", "10.96.0.11:5353", "[fd00::10]:53"]
                    .map(|at| at.parse().unwrap())
                    .to_vec(),
                cache_ttl: 60,
            },
        }),
        tunnel: TunnelConfig {
            enable: true,
            overrides: Overrides {
                direct: vec!["10.0.0.0/8".parse().unwrap(), "fd00:10::/32".parse().unwrap()],
                never_direct: vec!["10.1.0.0/16".parse().unwrap()],
            },
            listen_port: 443,
            allowed_targets: ["node:2222", "192.168.1.0/24:*"].map(|target| target.parse().unwrap()).to_vec(),
            allowed_peers: vec!["edge1".to_owned(), "cloud1".to_owned()],
            serve_relay: ServeRelay::WhenPublic,
            hole_punching: false,
            announce: ["198.51.100.7:4443", "[2001:db8::7]:20006"].map(|address| address.parse().unwrap()).to_vec(),
            relays: vec![RelayNode {
                node: "cloud1".parse().unwrap(),
                addresses: ["203.0.113.7", "relay.example.org:443", "2001:db8::7"]
                    .map(|address| address.parse().unwrap())
                    .to_vec(),
            }],
            psk_enable: false,
            psk: "/run/psk".into(),
            max_served: 7,
        },
        file: None,
    };
    assert_eq!(loaded.config, expected);
}

#[test]
fn dns_is_answered_at_the_edge_and_in_the_cloud_where_it_is_asked_for() {
    let edge = Environment { kubernetes_port: false, kubernetes_service_host: false };
    for (text, environment, answered) in [
        ("", &edge, true),
        ("modules: {edgeDNS: {enable: null}}", &edge, true),
        ("modules: {edgeDNS: {enable: false}}", &edge, false),
        ("", &POD, false),
        ("modules: {edgeDNS: {enable: true}}", &POD, true),
    ] {
        let loaded = parse(text, "f", Leniency::Strict, environment).unwrap();
        assert_eq!(loaded.config.dns, answered.then(DnsConfig::default), "{text} in {environment:?}");
    }
}

#[test]
fn an_empty_text_switches_off_what_may_be_off() {
    let config =
        accepted("commonConfig: {adminAddress: ''}\nkubeAPIConfig: {kubeConfig: '', master: '', staticDirectory: ''}")
            .config;
    assert_eq!(config.common.admin_address, None);
    assert_eq!(config.source.kind, SourceKind::InCluster);
}

#[test]
fn prints_a_default_file_that_means_the_defaults() {
    let text = default_yaml();
    let loaded = accepted(&text);
    assert_eq!(loaded.config, defaults());
    assert_eq!(notes(&loaded), [""; 0]);
    for (path, key) in leaves() {
        let name = format!("{}: ", key.name);
        let printed = text.lines().any(|line| line.trim_start().starts_with(&name));
        match key.kind {
            Kind::Used(_) | Kind::Header(_) => {
                assert!(printed, "{path} is missing in:\n{text}");
                assert!(text.contains(&format!("# {}\n", key.doc)), "{path} is undocumented in:\n{text}");
            }
            Kind::Accepted(_) | Kind::Section(_) => {}
        }
    }
    assert!(!text.contains("edgeCNI"), "a key without effect is printed as if it had one:\n{text}");
}

#[test]
fn prints_a_minimal_file_that_enables_the_proxy_and_nothing_else() {
    assert_eq!(
        minimal_yaml(),
        "apiVersion: agent.edgemesh.config.kubeedge.io/v1alpha1\nkind: EdgeMeshAgent\nmodules:\n  edgeProxy:\n    enable: true\n"
    );
    let mut expected = defaults();
    expected.proxy.enable = true;
    assert_eq!(accepted(&minimal_yaml()).config, expected);
}

#[test]
fn the_schema_knows_every_key_and_no_other() {
    let schema = schema();
    for (path, key) in leaves() {
        let pointer = format!("/properties/{}", path.replace('.', "/properties/"));
        let member = schema.pointer(&pointer).unwrap_or_else(|| panic!("no {pointer} in the schema"));
        let description = member["description"].as_str().unwrap();
        assert!(description.starts_with(key.doc), "{path}: {description}");
        let without_effect = description.contains("no effect in this version");
        assert_eq!(without_effect, matches!(key.kind, Kind::Accepted(_)), "{path}: {description}");
        // A default of the schema is one to the agent too.
        if let Some(default) = member.get("default") {
            let loaded = accepted(&nested(&path, &default.to_string()));
            assert_eq!(loaded.config, defaults(), "{path}: {default}");
            assert_eq!(notes(&loaded), [""; 0], "{path}: {default}");
        }
    }
    assert_eq!(schema["additionalProperties"], Value::Bool(false));
    assert_eq!(schema["properties"]["modules"]["properties"]["edgeProxy"]["additionalProperties"], Value::Bool(false));
    assert_eq!(
        schema.pointer("/properties/modules/properties/edgeProxy/properties/dataplane/enum"),
        Some(&serde_json::json!(["auto", "ebpf", null]))
    );
}

#[test]
fn null_means_the_default_everywhere() {
    for (path, _) in leaves() {
        let loaded = accepted(&nested(&path, "null"));
        assert_eq!(loaded.config, defaults(), "{path}");
        assert_eq!(notes(&loaded), [""; 0], "{path}");
    }
    // EdgeMesh crashes on these.
    for section in
        ["kubeAPIConfig:", "kubeAPIConfig: {metaServer: ~}", "modules: {edgeProxy: NULL, edgeTunnel: {psk: }}"]
    {
        assert_eq!(accepted(section).config, defaults(), "{section}");
    }
}

#[test]
fn chooses_the_source() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("kubeconfig");
    fs::write(&file, "").unwrap();
    let file = file.to_str().unwrap();
    let given = |path: Option<&str>, master: Option<&str>| SourceKind::Kubeconfig {
        path: path.map(PathBuf::from),
        master: master.map(str::to_owned),
    };
    // KubeEdge's InClusterConfig: the address is metaServer's.
    let of_edged = Environment { kubernetes_port: false, kubernetes_service_host: true };
    let cases = [
        ("{staticDirectory: /m}".to_owned(), POD, SourceKind::Static { directory: "/m".into() }),
        ("{staticDirectory: /m}".to_owned(), NOWHERE, SourceKind::Static { directory: "/m".into() }),
        (format!("{{kubeConfig: {file}}}"), POD, given(Some(file), None)),
        (format!("{{kubeConfig: {file}}}"), NOWHERE, given(Some(file), None)),
        ("{master: http://m:80}".to_owned(), NOWHERE, given(None, Some("http://m:80"))),
        (format!("{{kubeConfig: {file}, master: http://m}}"), POD, given(Some(file), Some("http://m"))),
        ("{}".to_owned(), POD, SourceKind::InCluster),
        ("{}".to_owned(), NOWHERE, plain_meta_server()),
        ("{}".to_owned(), of_edged, plain_meta_server()),
        ("{source: auto}".to_owned(), POD, SourceKind::InCluster),
        ("{source: inCluster}".to_owned(), of_edged, SourceKind::InCluster),
        ("{source: metaServer}".to_owned(), POD, plain_meta_server()),
        // EdgeMesh overwrites it at start, so it says nothing of this node.
        ("{mode: CloudMode}".to_owned(), NOWHERE, plain_meta_server()),
        ("{mode: EdgeMode}".to_owned(), POD, SourceKind::InCluster),
    ];
    for (section, environment, expected) in cases {
        let loaded = parse(&format!("kubeAPIConfig: {section}"), "f", Leniency::Strict, &environment);
        assert_eq!(loaded.unwrap().config.source.kind, expected, "{section} in {environment:?}");
    }
}

fn plain_meta_server() -> SourceKind {
    SourceKind::MetaServer(MetaServerConfig {
        server: "http://127.0.0.1:10550".to_owned(),
        security: None,
        relist_period: Duration::from_secs(300),
        request_timeout: Duration::from_secs(30),
    })
}

fn meta_server(section: &str) -> (MetaServerConfig, Vec<String>) {
    let text = format!("kubeAPIConfig: {{source: metaServer, metaServer: {section}}}");
    let loaded = parse(&text, "f", Leniency::Strict, &NOWHERE).unwrap();
    let notes = notes(&loaded);
    match loaded.config.source.kind {
        SourceKind::MetaServer(meta_server) => (meta_server, notes),
        other @ (SourceKind::InCluster | SourceKind::Kubeconfig { .. } | SourceKind::Static { .. }) => {
            panic!("{other:?}")
        }
    }
}

#[test]
fn meta_server_is_spoken_to_in_the_ways_of_the_guide() {
    let place = |name: &str| PathBuf::from(format!("/etc/edgemesh/metaserver/{name}"));
    let account = |name: &str| PathBuf::from(format!("/var/run/secrets/kubernetes.io/serviceaccount/{name}"));
    // Two ways: the CA and, where it is there, the client's certificate.
    let (two_way, notes) = meta_server("{security: {requireAuthorization: true}}");
    assert_eq!((two_way.server.as_str(), notes.len()), ("https://127.0.0.1:10550", 0));
    let pair = ClientCertificate { certificate: place("server.crt"), key: place("server.key"), optional: true };
    let expected = MetaServerSecurity {
        token_file: account("token"),
        ca_files: vec![place("rootCA.crt"), account("ca.crt")],
        client: Some(pair),
    };
    assert_eq!(two_way.security, Some(expected));
    // One way: any certificate is trusted, and none is shown.
    let (one_way, _) = meta_server("{security: {requireAuthorization: true, insecureSkipTLSVerify: true}}");
    let expected = MetaServerSecurity { token_file: account("token"), ca_files: Vec::new(), client: None };
    assert_eq!(one_way.security, Some(expected));
    // What is named has to be there.
    let (own, notes) = meta_server(
        "{server: 'HTTPS://169.254.30.10:10550/', relistPeriod: 7, requestTimeout: 8, \
         security: {tlsCaFile: /ca, tlsCertFile: /c, tlsPrivateKeyFile: /k, tokenFile: /t}}",
    );
    let pair = ClientCertificate { certificate: "/c".into(), key: "/k".into(), optional: false };
    let security = MetaServerSecurity { token_file: "/t".into(), ca_files: vec!["/ca".into()], client: Some(pair) };
    let expected = MetaServerConfig {
        server: "https://169.254.30.10:10550".to_owned(),
        security: Some(security),
        relist_period: Duration::from_secs(7),
        request_timeout: Duration::from_secs(8),
    };
    assert_eq!(own, expected);
    assert!(notes[0].starts_with("f:1: kubeAPIConfig.metaServer.server: https, so taken as if"), "{notes:?}");
}

#[test]
fn an_address_injected_by_edged_is_not_used_and_says_that_authorization_is_required() {
    let of_edged = Environment { kubernetes_port: false, kubernetes_service_host: true };
    for (text, expected) in [
        ("", 1),
        ("kubeAPIConfig: {metaServer: {security: {requireAuthorization: true}}}", 0),
        ("kubeAPIConfig: {source: inCluster}", 0),
    ] {
        let notes = notes(&parse(text, "f", Leniency::Strict, &of_edged).unwrap());
        assert_eq!(notes.len(), expected, "{text}: {notes:?}");
        assert!(
            notes.iter().all(|note| note.contains("security.requireAuthorization: false, yet KUBERNETES_SERVICE_HOST"))
        );
    }
    // Where authorization is not required, edged injects empty texts.
    let empty = Environment::of(|name| name.starts_with("KUBERNETES_SERVICE_").then(OsString::new));
    let loaded = parse("", "f", Leniency::Strict, &empty).unwrap();
    assert_eq!((loaded.config.source.kind, loaded.notes.len()), (plain_meta_server(), 0));
}

#[test]
fn learns_of_its_place_from_the_variables() {
    let of = |set: &[(&str, &str)]| {
        Environment::of(|name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value)))
    };
    assert_eq!(of(&[]), NOWHERE);
    assert_eq!(of(&[("KUBERNETES_PORT", "tcp://10.96.0.1:443"), ("KUBERNETES_SERVICE_HOST", "10.96.0.1")]), POD);
    // EdgeMesh asks whether the first is there, whatever it holds; the second is needed as an address.
    let empty = of(&[("KUBERNETES_PORT", ""), ("KUBERNETES_SERVICE_HOST", "")]);
    assert_eq!(empty, Environment { kubernetes_port: true, kubernetes_service_host: false });
}

#[test]
fn the_table_is_sound() {
    let leaves = leaves();
    for (path, key) in &leaves {
        assert!(!key.doc.is_empty() && !key.doc.contains('\n') && key.doc.ends_with('.'), "{path}: {:?}", key.doc);
        let same = leaves.iter().filter(|(other, _)| other.eq_ignore_ascii_case(path)).count();
        assert_eq!(same, 1, "{path} is in the table more than once");
    }
    assert_eq!(Draft::default().common, CommonConfig::default());
}
