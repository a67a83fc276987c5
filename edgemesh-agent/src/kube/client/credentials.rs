//! The files that credentials are in, and whether they have changed.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use kube::config::Kubeconfig;

/// Files, and what they were when they were last looked at.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Files(Vec<(PathBuf, Option<Stamp>)>);

/// What changes when a file is written or replaced, behind a symbolic link too: kubelet switches a link to a directory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
}

impl Files {
    /// Looks at files as they are now. One that does not exist is looked for again.
    pub(super) fn of(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        Self(paths.into_iter().map(|path| (path.clone(), stamp(&path))).collect())
    }

    /// Adds files as they are now.
    pub(super) fn add(&mut self, paths: impl IntoIterator<Item = PathBuf>) {
        self.0.extend(Self::of(paths).0);
    }

    /// The same files as they are now.
    pub(super) fn look_again(&self) -> Self {
        Self::of(self.0.iter().map(|(path, _)| path.clone()))
    }
}

/// The files that a kubeconfig names for its current context. Their paths are absolute where it was read from a file.
pub(super) fn named_by(file: &Kubeconfig) -> Vec<PathBuf> {
    let context = file.contexts.iter().find(|named| Some(&named.name) == file.current_context.as_ref());
    let Some(context) = context.and_then(|named| named.context.as_ref()) else { return Vec::new() };
    let cluster = file.clusters.iter().find(|named| named.name == context.cluster);
    let cluster = cluster.and_then(|named| named.cluster.as_ref());
    let user = file.auth_infos.iter().find(|named| Some(&named.name) == context.user.as_ref());
    let user = user.and_then(|named| named.auth_info.as_ref());
    [
        cluster.and_then(|cluster| cluster.certificate_authority.as_ref()),
        user.and_then(|user| user.client_certificate.as_ref()),
        user.and_then(|user| user.client_key.as_ref()),
        user.and_then(|user| user.token_file.as_ref()),
    ]
    .into_iter()
    .flatten()
    .map(PathBuf::from)
    .collect()
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = fs::metadata(path).ok()?;
    Some(Stamp {
        device: metadata.dev(),
        inode: metadata.ino(),
        size: metadata.size(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_directory_switched_behind_a_link_is_a_change_and_nothing_else_is() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for (version, token) in [("..1", "one"), ("..2", "two")] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("token"), token).unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        symlink("..data/token", at("token")).unwrap();
        let before = Files::of([at("token"), at("absent")]);
        assert_eq!(before.look_again(), before);
        symlink("..2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        let after = before.look_again();
        assert_ne!(after, before);
        fs::write(at("absent"), "").unwrap();
        assert_ne!(after.look_again(), after);
    }

    #[test]
    fn a_kubeconfig_names_the_files_of_its_current_context_alone() {
        let text = "
current-context: b
contexts: [{name: a, context: {cluster: a, user: a}}, {name: b, context: {cluster: b, user: b}}]
clusters: [{name: a, cluster: {certificate-authority: /a.crt}}, {name: b, cluster: {certificate-authority: /b.crt}}]
users: [{name: a, user: {tokenFile: /a}}, {name: b, user: {client-certificate: /b.pem, client-key: /b.key, tokenFile: /b}}]
";
        let file = Kubeconfig::from_yaml(text).unwrap();
        assert_eq!(named_by(&file), ["/b.crt", "/b.pem", "/b.key", "/b"].map(PathBuf::from));
    }
}
