use std::fs;

use super::*;

fn kubeconfig_text(server: &str, user: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
         clusters: [{{name: k, cluster: {{{server}}}}}]\nusers: [{{name: u, user: {{{user}}}}}]\n"
    )
}

fn open(text: &str, master: Option<&str>) -> Result<String, String> {
    let _installed_before = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kubeconfig");
    fs::write(&path, text).unwrap();
    let opened = kubeconfig(Some(&path), master);
    opened.map(|server| server.url).map_err(|error| error.to_string().replace(path.to_str().unwrap(), "PATH"))
}

#[tokio::test]
async fn takes_the_server_of_the_kubeconfig_unless_master_overrides_it() {
    let text = kubeconfig_text("server: 'https://10.0.0.1:6443'", "token: secret");
    assert_eq!(open(&text, None).unwrap(), "https://10.0.0.1:6443");
    assert_eq!(open(&text, Some("http://127.0.0.1:8080")).unwrap(), "http://127.0.0.1:8080");
    assert_eq!(open(&text, Some("10.0.0.2:6443")).unwrap(), "https://10.0.0.2:6443");
    assert_eq!(kubeconfig(None, Some("127.0.0.1:8080")).unwrap().url, "http://127.0.0.1:8080");
}

#[tokio::test]
async fn says_in_one_line_what_is_wrong_with_a_kubeconfig() {
    let good = "server: 'https://10.0.0.1:6443'";
    let missing_file = kubeconfig_text(&format!("{good}, certificate-authority: no-such-ca.crt"), "token: secret");
    let cases = [
        ("clusters: [", "cannot use the kubeconfig PATH: failed to parse kubeconfig YAML"),
        ("", "cannot use the kubeconfig PATH: failed to determine current context"),
        (missing_file.as_str(), "cannot use the kubeconfig PATH: failed to load certificate authority"),
        (&kubeconfig_text("proxy-url: 'http://10.0.0.9', server: 'https://10.0.0.1'", ""), "cannot set up a client"),
    ];
    for (text, expected) in cases {
        let error = open(text, None).unwrap_err();
        assert!(error.starts_with(expected) && !error.contains('\n'), "{error}");
    }
    let error = kubeconfig(Some(Path::new("/no/such/kubeconfig")), None).err().unwrap().to_string();
    assert_eq!(
        error,
        "cannot use the kubeconfig /no/such/kubeconfig: No such file or directory (os error 2); correct the file, or \
         kubeAPIConfig.kubeConfig"
    );
}

#[tokio::test]
async fn refuses_a_master_that_is_no_url() {
    for master in ["ftp://10.0.0.1", "http://", "a b", ""] {
        let error = kubeconfig(None, Some(master)).err().unwrap().to_string();
        assert!(error.starts_with(&format!("cannot use {master:?} as the API server's URL: ")), "{error}");
    }
}

#[tokio::test]
async fn outside_of_a_pod_the_in_cluster_source_says_what_to_do() {
    let error = in_cluster().err().unwrap().to_string();
    assert!(error.starts_with("cannot use the pod's ServiceAccount: "), "{error}");
    assert!(error.contains("automountServiceAccountToken"), "{error}");
}

#[tokio::test]
async fn a_changed_kubeconfig_is_used_and_a_broken_one_leaves_the_last_good_client() {
    let _installed_before = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kubeconfig");
    let server = |port: u16| format!("server: 'http://127.0.0.1:{port}'");
    // Replaced as a careful writer does, so that no half of it is seen.
    let replace = |text: &str| {
        fs::write(path.with_extension("new"), text).unwrap();
        fs::rename(path.with_extension("new"), &path).unwrap();
    };
    let (first, second) = (Listener::bind().await, Listener::bind().await);
    replace(&kubeconfig_text(&server(first.port()), "token: one"));
    let api = kubeconfig(Some(&path), None).unwrap();
    assert!(first.hears(&api).await.contains("authorization: Bearer one"));

    replace("clusters: [");
    let (_, problem) = api.client();
    assert!(problem.unwrap().contains("failed to parse kubeconfig YAML"));
    assert!(first.hears(&api).await.contains("authorization: Bearer one"), "the last good one stays");

    // A kubeconfig that comes before the file it names.
    let token = directory.path().join("token");
    replace(&kubeconfig_text(&server(second.port()), "client-certificate: token, client-key: token, token: two"));
    assert!(api.client().1.unwrap().contains("failed to read file"));
    replace(&kubeconfig_text(&server(second.port()), "tokenFile: token"));
    assert!(api.client().1.unwrap().contains("token"));
    fs::write(&token, "two").unwrap();
    assert_eq!(api.client().1, None);
    assert!(second.hears(&api).await.contains("authorization: Bearer two"));
}

#[tokio::test]
async fn a_token_in_a_file_is_read_anew_as_soon_as_it_changes() {
    let _installed_before = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let directory = tempfile::tempdir().unwrap();
    let (path, token) = (directory.path().join("kubeconfig"), directory.path().join("token"));
    let listener = Listener::bind().await;
    fs::write(&token, "first").unwrap();
    let server = format!("server: 'http://127.0.0.1:{}'", listener.port());
    fs::write(&path, kubeconfig_text(&server, "tokenFile: token")).unwrap();
    let api = kubeconfig(Some(&path), None).unwrap();
    assert!(listener.hears(&api).await.contains("authorization: Bearer first"));
    fs::write(&token, "the second").unwrap();
    assert!(listener.hears(&api).await.contains("authorization: Bearer the second"));
}

/// Hears what clients say, and answers nothing.
struct Listener(tokio::net::TcpListener);

impl Listener {
    async fn bind() -> Self {
        Self(tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    fn port(&self) -> u16 {
        self.0.local_addr().unwrap().port()
    }

    /// The head of one request of a client.
    async fn hears(&self, api: &ApiServer) -> String {
        use tokio::io::AsyncReadExt as _;

        let (client, _) = api.client();
        let request = client.apiserver_version();
        let hearing = async {
            let (mut connection, _) = self.0.accept().await.unwrap();
            let mut heard = Vec::new();
            while !heard.ends_with(b"\r\n\r\n") {
                heard.push(connection.read_u8().await.unwrap());
            }
            String::from_utf8(heard).unwrap()
        };
        tokio::select! {
            heard = hearing => heard,
            answer = request => panic!("answered by nobody: {answer:?}"),
            () = tokio::time::sleep(Duration::from_secs(20)) => panic!("nothing was heard"),
        }
    }
}
