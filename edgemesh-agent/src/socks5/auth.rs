//! Who may log in: the one user of a mounted Secret of type `kubernetes.io/basic-auth`.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    digest::{SHA256, digest},
};

/// What the keys of such a Secret are called, and with them the files.
const USER: &str = "username";
const PASSWORD: &str = "password";
/// The longest of either (RFC 1929), and the end of a line.
const MAX: u64 = 255 + 2;
/// Where kubelet puts what belongs together; it is exchanged in one step.
const WHOLE: &str = "..data";

/// The directory with the files `username` and `password`, which are read anew for each login: a Secret that is changed
/// counts at once.
#[derive(Clone, Debug)]
pub(super) struct Credentials {
    directory: PathBuf,
}

impl Credentials {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Whether a user is the one. How long it takes says nothing of either text.
    ///
    /// # Errors
    ///
    /// The files cannot be read, or are empty: nobody is.
    pub(super) fn accept(&self, user: &[u8], password: &[u8]) -> Result<bool, String> {
        // A Secret may be exchanged between the two files, and what it was is removed then.
        let read = self.read().or_else(|_| self.read());
        let (known_user, known_password) = read?;
        let same = |a: &[u8], b: &[u8]| {
            verify_slices_are_equal(digest(&SHA256, a).as_ref(), digest(&SHA256, b).as_ref()).is_ok()
        };
        Ok(same(user, &known_user) & same(password, &known_password))
    }

    fn read(&self) -> Result<(Vec<u8>, Vec<u8>), String> {
        let whole = self.directory.join(WHOLE);
        // What the link leads to now, so that both files are of one version.
        let directory = whole.canonicalize().unwrap_or_else(|_| self.directory.clone());
        let text = |name: &str| {
            let path = directory.join(name);
            let shown = self.directory.join(name);
            match read_line(&path) {
                Ok(text) if text.is_empty() => Err(format!("{} is empty", shown.display())),
                Ok(text) => Ok(text),
                Err(error) => Err(format!("{} cannot be read: {error}", shown.display())),
            }
        };
        Ok((text(USER)?, text(PASSWORD)?))
    }

    /// Whether somebody can log in at all.
    ///
    /// # Errors
    ///
    /// As [`Credentials::accept`].
    pub(super) fn check(&self) -> Result<(), String> {
        self.read().map(drop)
    }
}

/// What is in a file, without the end of its line.
fn read_line(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is longer than 255 bytes"));
    }
    if text.ends_with(b"\n") {
        text.pop();
        if text.ends_with(b"\r") {
            text.pop();
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn write(directory: &Path, user: &str, password: &str) {
        fs::create_dir_all(directory).unwrap();
        fs::write(directory.join(USER), user).unwrap();
        fs::write(directory.join(PASSWORD), password).unwrap();
    }

    #[test]
    fn the_user_of_the_secret_may_log_in_and_nobody_else() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), "operator\n", "pass word\r\n");
        let credentials = Credentials::new(directory.path().to_owned());
        assert_eq!(credentials.accept(b"operator", b"pass word"), Ok(true));
        for (user, password) in
            [("operator", "pass word\n"), ("operator", ""), ("", "pass word"), ("Operator", "pass word"), ("", "")]
        {
            assert_eq!(credentials.accept(user.as_bytes(), password.as_bytes()), Ok(false), "{user} {password}");
        }
    }

    #[test]
    fn a_secret_that_is_exchanged_as_kubelet_does_counts_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        write(&at("..1"), "operator", "old");
        symlink("..1", at(WHOLE)).unwrap();
        for name in [USER, PASSWORD] {
            symlink(Path::new(WHOLE).join(name), at(name)).unwrap();
        }
        let credentials = Credentials::new(directory.path().to_owned());
        assert_eq!(credentials.accept(b"operator", b"old"), Ok(true));
        write(&at("..2"), "operator", "new");
        symlink("..2", at("..next")).unwrap();
        fs::rename(at("..next"), at(WHOLE)).unwrap();
        fs::remove_dir_all(at("..1")).unwrap();
        assert_eq!(credentials.accept(b"operator", b"old"), Ok(false));
        assert_eq!(credentials.accept(b"operator", b"new"), Ok(true));
    }

    #[test]
    fn without_a_password_nobody_may_log_in_and_no_text_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let credentials = Credentials::new(directory.path().to_owned());
        assert!(credentials.check().unwrap_err().contains("username cannot be read: No such file"));
        write(directory.path(), "operator", "");
        assert!(credentials.accept(b"operator", b"").unwrap_err().ends_with("password is empty"));
        write(directory.path(), "operator", &"s3cret".repeat(50));
        let error = credentials.accept(b"operator", b"s3cret").unwrap_err();
        assert!(error.contains("longer than 255 bytes") && !error.contains("s3cret"), "{error}");
    }
}
