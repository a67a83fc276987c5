use std::{
    os::unix::fs::{PermissionsExt, symlink},
    process::Command,
};

use super::*;
use crate::{
    model::{Kind, NamespacedName, Object, Service, ServiceKind},
    snapshot::format::{Identity, Section},
};

fn contents(name: &str) -> Contents {
    let service = Service::new(NamespacedName::new("default", name), ServiceKind::ClusterIp);
    let section =
        Section { kind: Kind::Service, as_of: 1, reached: None, objects: vec![Object::Service(service.into())] };
    let identity = Identity { source: "s".to_owned(), node: "n".to_owned(), cluster: None };
    Contents { identity, taken: 1, sections: vec![section] }
}

struct Bench {
    file: SnapshotFile,
    directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { file: SnapshotFile::new(directory.path().join("state/agent/metadata.snapshot")), directory }
    }

    /// With a file in place.
    fn written() -> Self {
        let bench = Self::new();
        bench.file.write(&contents("first")).unwrap();
        bench
    }

    fn refusal(&self) -> String {
        self.file.read().unwrap_err().to_string()
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.file.directory()).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn chmod(&self, path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
}

#[test]
fn a_file_is_private_and_so_is_the_directory_made_for_it() {
    let bench = Bench::new();
    assert_eq!(bench.file.read().unwrap(), None);
    let size = bench.file.write(&contents("first")).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!((mode(bench.file.path()), mode(bench.file.directory())), (0o600, 0o700));
    assert_eq!(fs::metadata(bench.file.path()).unwrap().len(), size);
    assert_eq!(bench.file.read().unwrap(), Some(contents("first")));
    bench.file.write(&contents("second")).unwrap();
    assert_eq!(bench.file.read().unwrap(), Some(contents("second")));
    assert_eq!(bench.names(), ["metadata.snapshot"]);
}

#[test]
fn what_others_can_have_written_is_not_used() {
    let bench = Bench::written();
    bench.chmod(bench.file.path(), 0o660);
    assert_eq!(bench.refusal(), "others than its owner may write to it (mode 660)");
    bench.chmod(bench.file.path(), 0o644);
    assert!(bench.file.read().unwrap().is_some(), "reading it is another matter");
    bench.chmod(bench.file.directory(), 0o1777);
    let told = format!("{} can be written to by others (mode 1777)", bench.file.directory().display());
    assert_eq!(bench.refusal(), format!("its directory {told}"));
    let error = bench.file.write(&contents("second")).unwrap_err();
    assert_eq!(error.to_string(), format!("the directory {told}"));
}

#[test]
fn what_belongs_to_another_is_not_used() {
    if !geteuid().is_root() {
        return;
    }
    let bench = Bench::written();
    std::os::unix::fs::chown(bench.file.path(), Some(65_534), None).unwrap();
    assert_eq!(bench.refusal(), "it belongs to uid 65534");
    bench.file.set_aside().unwrap();
    std::os::unix::fs::chown(bench.file.directory(), Some(65_534), None).unwrap();
    let error = bench.file.write(&contents("second")).unwrap_err();
    assert!(error.to_string().ends_with("belongs to uid 65534"), "{error}");
    assert_eq!(bench.names(), ["metadata.snapshot.unusable-1"]);
}

#[test]
fn a_link_is_not_followed_and_what_it_leads_to_is_left_alone() {
    let bench = Bench::written();
    let elsewhere = bench.directory.path().join("elsewhere");
    fs::rename(bench.file.path(), &elsewhere).unwrap();
    symlink(&elsewhere, bench.file.path()).unwrap();
    assert_eq!(bench.refusal(), "it is a symbolic link");
    let aside = bench.file.set_aside().unwrap();
    assert_eq!(fs::read_link(&aside).unwrap(), elsewhere);
    symlink("/nowhere", bench.file.path()).unwrap();
    assert_eq!(bench.refusal(), "it is a symbolic link");
    bench.file.write(&contents("second")).unwrap();
    assert_eq!(bench.file.read().unwrap(), Some(contents("second")), "the link was replaced");
    // What an attacker could have put where the unfinished file goes.
    symlink(&elsewhere, bench.file.beside("draft")).unwrap();
    let before = fs::read(&elsewhere).unwrap();
    bench.file.write(&contents("third")).unwrap();
    assert_eq!(fs::read(&elsewhere).unwrap(), before);
}

#[test]
fn what_is_no_file_is_neither_read_nor_moved() {
    let bench = Bench::written();
    let path = bench.file.path().to_owned();
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert_eq!(bench.refusal(), "it is no regular file");
    assert_eq!(bench.file.set_aside().unwrap_err().kind(), io::ErrorKind::InvalidInput);
    bench.file.write(&contents("second")).unwrap_err();
    assert_eq!(bench.names(), ["metadata.snapshot"], "nothing unfinished is left");
    fs::remove_dir(&path).unwrap();
    // Opening it for reading would wait for a writer.
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    assert_eq!(bench.refusal(), "it is no regular file");
    bench.file.set_aside().unwrap_err();
}

#[test]
fn a_trailing_slash_does_not_make_it_a_directory() {
    let bench = Bench::new();
    let file = SnapshotFile::new(PathBuf::from(format!("{}/", bench.file.path().display())));
    file.write(&contents("first")).unwrap();
    assert_eq!(bench.file.read().unwrap(), Some(contents("first")));
}

#[test]
fn few_unusable_files_are_kept_and_the_newest_is_the_first() {
    let bench = Bench::new();
    bench.file.write(&contents("0")).unwrap();
    for n in 1..=5 {
        fs::write(bench.file.path(), format!("{n}\n")).unwrap();
        bench.chmod(bench.file.path(), 0o600);
        assert_eq!(bench.refusal(), "it is no snapshot of an edgemesh-agent");
        assert_eq!(bench.file.set_aside().unwrap(), bench.file.aside(1));
    }
    let kept = (1..=KEPT).map(|number| fs::read_to_string(bench.file.aside(number)).unwrap()).collect::<Vec<_>>();
    assert_eq!(kept, ["5\n", "4\n", "3\n"]);
    assert_eq!(bench.names().len(), 3);
    let removed = bench.file.remove().unwrap();
    assert_eq!((removed.len(), bench.names().len()), (3, 0));
}

#[test]
fn an_oversized_file_is_refused_unread() {
    let bench = Bench::written();
    OpenOptions::new().write(true).open(bench.file.path()).unwrap().set_len(format::MAX_SIZE + 1).unwrap();
    assert_eq!(bench.refusal(), "it is larger than 256 MiB");
}

#[test]
fn two_agents_do_not_write_at_once() {
    let bench = Bench::written();
    let other = Flock::lock(File::open(bench.file.directory()).unwrap(), FlockArg::LockExclusive).unwrap();
    let error = bench.file.write(&contents("second")).unwrap_err();
    assert_eq!(error.to_string(), "another agent is writing there");
    drop(other);
    bench.file.write(&contents("second")).unwrap();
}

/// Mounts a small tmpfs where the file goes, seen by this thread alone.
fn on_a_small_disk(test: impl FnOnce(&Bench) + Send + 'static) {
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };
    if !geteuid().is_root() {
        return;
    }
    let thread = thread::spawn(|| {
        let bench = Bench::written();
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let nothing = None::<&str>;
        mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing).unwrap();
        let options = Some("size=64k,mode=0700");
        mount(Some("tmpfs"), bench.file.directory(), Some("tmpfs"), MsFlags::empty(), options).unwrap();
        test(&bench);
    });
    thread.join().unwrap();
}

#[test]
fn a_full_disk_leaves_the_old_file_and_nothing_else() {
    on_a_small_disk(|bench| {
        bench.file.write(&contents("first")).unwrap();
        let many = (0..2000).map(|n| contents(&format!("service-{n}")).sections.remove(0).objects.remove(0));
        let section = Section { kind: Kind::Service, as_of: 1, reached: None, objects: many.collect() };
        let large = Contents { sections: vec![section], ..contents("x") };
        assert_eq!(bench.file.write(&large).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(bench.names(), ["metadata.snapshot"]);
        assert_eq!(bench.file.read().unwrap(), Some(contents("first")));
        bench.file.write(&contents("second")).unwrap();
        assert_eq!(bench.file.read().unwrap(), Some(contents("second")));
    });
}

#[test]
fn a_read_only_disk_is_read_and_not_written() {
    use nix::mount::{MsFlags, mount};
    on_a_small_disk(|bench| {
        bench.file.write(&contents("first")).unwrap();
        let (nothing, flags) = (None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY);
        mount(nothing, bench.file.directory(), nothing, flags, nothing).unwrap();
        assert_eq!(bench.file.write(&contents("second")).unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        assert_eq!(bench.file.read().unwrap(), Some(contents("first")));
        bench.file.set_aside().unwrap_err();
        assert_eq!(bench.names(), ["metadata.snapshot"]);
    });
}

#[test]
fn a_draft_that_a_kill_left_is_replaced() {
    let bench = Bench::written();
    fs::write(bench.file.beside("draft"), "half of someth").unwrap();
    assert_eq!(bench.file.read().unwrap(), Some(contents("first")));
    bench.file.write(&contents("second")).unwrap();
    assert_eq!(bench.names(), ["metadata.snapshot"]);
}
