//! Files written for EdgeMesh.

use super::*;

/// The text in EdgeMesh's `build/agent/resources/04-configmap.yaml`.
const SHIPPED: &str = "\
# For more detailed configuration, please refer to: https://edgemesh.netlify.app/reference/config-items.html#edgemesh-agent-cfg
modules:
  edgeProxy:
    enable: true
  edgeTunnel:
    enable: true
    #relayNodes:
    #- nodeName: <your relay node name1>
    #  advertiseAddress:
    #  - 1.1.1.1
";

/// What `edgemesh-agent --defaultconfig` of EdgeMesh 1.17 prints on a cloud node, with its optional sections filled in.
pub(super) const DEFAULT_CONFIG: &str = "\
apiVersion: agent.edgemesh.config.kubeedge.io/v1alpha1
commonConfig:
  bridgeDeviceIP: 169.254.96.16
  bridgeDeviceName: edgemesh0
  pprofConfig:
    enableProfiling: false
    profilingAddress: \"\"
    profilingPort: 0
kind: EdgeMeshAgent
kubeAPIConfig:
  burst: 200
  contentType: application/vnd.kubernetes.protobuf
  metaServer:
    security:
      insecureSkipTLSVerify: false
      requireAuthorization: false
      tlsCaFile: /etc/edgemesh/metaserver/rootCA.crt
      tlsCertFile: /etc/edgemesh/metaserver/server.crt
      tlsPrivateKeyFile: /etc/edgemesh/metaserver/server.key
    server: http://127.0.0.1:10550
  mode: CloudMode
  qps: 100
  deleteKubeConfig: false
modules:
  edgeCNI:
    enable: false
    encapsulationIP: \"\"
    tunMode: 0
    meshCIDRConfig:
      cloudCIDR: null
      edgeCIDR: []
  edgeDNS:
    enable: false
    cacheDNS:
      autoDetect: true
      cacheTTL: 30
    kubeAPIConfig: {qps: 3, anything: [at, all]}
    listenPort: 53
  edgeProxy:
    loadBalancer:
      caller: ProxyCaller
      consistentHash:
        load: 1.25
        partitionCount: 100
        replicationFactor: 10
    serviceFilterMode: FilterIfLabelExists
    socks5Proxy:
      listenPort: 10800
      nodeName: node-1
      namespace: kubeedge
  edgeTunnel:
    configPath: /etc/edgemesh/config/edgemesh-agent.yaml
    finderPeriod: 60
    heartbeatPeriod: 120
    listenInterfaces: '*'
    listenPort: 20006
    maxCandidates: 15
    metricConfig: {enable: false, port: 9999}
    mode: ServerAndClient
    nodeName: node-1
    psk:
      enable: true
      path: /etc/edgemesh/psk
    relayNodes: []
    rendezvous: EDGEMESH_PLAYGOUND
    transport: tcp
    tunnelLimitConfig:
      enable: true
      tunnelBaseStreamIn: 10240
      tunnelBaseStreamOut: 10240
      tunnelPeerBaseStreamIn: 1024
      tunnelPeerBaseStreamOut: 1024
";

#[test]
fn takes_the_shipped_config_map() {
    let loaded = accepted(SHIPPED);
    let mut expected = defaults();
    expected.proxy.enable = true;
    expected.tunnel.enable = true;
    assert_eq!(loaded.config, expected);
    assert_eq!(notes(&loaded), [""; 0]);
}

#[test]
fn takes_the_default_config_without_a_note() {
    let loaded = accepted(DEFAULT_CONFIG);
    assert_eq!(loaded.config, defaults());
    assert_eq!(notes(&loaded), [""; 0]);
}

#[test]
fn does_not_mind_the_case_of_keys() {
    // The spelling of the first key is from EdgeMesh's own documentation.
    let text = "modules:
  edgeTunnel: {tunnelLimitConfig: {TunnelPeerBaseStreamIn: 1024}}
  EDGEPROXY: {Enable: true, servicefiltermode: FilterIfLabelDoesNotExist}
COMMONconfig: {bridgedeviceip: 169.254.96.17}
";
    let loaded = accepted(text);
    assert_eq!(notes(&loaded), [""; 0]);
    assert!(loaded.config.proxy.enable);
    assert_eq!(loaded.config.proxy.filter, ServiceFilter::LabelledOnly);
    assert_eq!(loaded.config.common.bridge_device_ip.to_string(), "169.254.96.17");
}

#[test]
fn merges_sections_over_the_defaults() {
    let config =
        accepted("commonConfig: {bridgeDeviceName: mesh0}\nmodules: {edgeProxy: {ebpf: {maxBackends: 9}}}").config;
    assert_eq!(config.common, CommonConfig { bridge_device_name: "mesh0".to_owned(), ..CommonConfig::default() });
    assert_eq!(config.proxy.ebpf, EbpfConfig { max_backends: 9, ..EbpfConfig::default() });
}

#[test]
fn notes_each_key_without_effect_that_asks_for_something() {
    for (path, key) in leaves() {
        let Kind::Accepted(plain) = &key.kind else { continue };
        let other = match plain {
            Plain::Bool(default) => (!default).to_string(),
            Plain::Whole(default) => (default + 1).to_string(),
            Plain::Number(default) => (default + 0.5).to_string(),
            Plain::Text(_) => "other".to_owned(),
            Plain::Choice(words) => words[1].to_owned(),
            Plain::Texts => "[10.0.0.0/8]".to_owned(),
            // EdgeMesh itself throws the value away.
            Plain::Opaque => {
                assert_eq!(notes(&accepted(&nested(&path, "other"))), [""; 0], "{path}");
                continue;
            }
        };
        let line = path.split('.').count();
        let loaded = accepted(&nested(&path, &other));
        let expected = format!("agent.yaml:{line}: {path}: a key of EdgeMesh that has no effect in this version");
        assert_eq!(notes(&loaded), [expected], "{path}: {other}");
        assert_eq!(loaded.config, defaults(), "{path}: {other}");
    }
}

#[test]
fn notes_an_unfamiliar_api_version() {
    let loaded = accepted("kind: EdgeMeshAgent\napiVersion: v1");
    assert_eq!(
        notes(&loaded),
        ["agent.yaml:2: apiVersion: given \"v1\", read as agent.edgemesh.config.kubeedge.io/v1alpha1"]
    );
}

#[test]
fn says_that_the_gateway_is_not_there_and_nothing_else() {
    let text = "apiVersion: gateway.edgemesh.config.kubeedge.io/v1alpha1\nkind: EdgeMeshGateway\nmodules: {edgeGateway: {nic: '*'}}";
    assert_eq!(
        refused(text),
        ["agent.yaml:2: kind: the gateway (EdgeMeshGateway) is not in this version; expected EdgeMeshAgent"]
    );
}
