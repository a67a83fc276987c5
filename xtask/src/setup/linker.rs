//! Which bpf-linkers are here, and whether one can read what a compiler writes.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;

use super::{compiler::Refusal, plan::Step};
use crate::process;

/// The version that [`super::plan`] installs.
pub(crate) const VERSION: &str = "0.13.0";
/// The LLVM versions that [`VERSION`] can be built with.
pub(crate) const LLVMS: std::ops::RangeInclusive<u32> = 21..=23;

const NAME: &str = "bpf-linker";

/// A bpf-linker that is here, or that `$BPF_LINKER` names.
#[derive(Clone, Debug)]
pub(crate) struct Linker {
    /// Whether `$BPF_LINKER` chose it.
    pub(crate) chosen: bool,
    pub(crate) path: PathBuf,
    /// What it answers, or why it does not.
    pub(crate) state: Result<Facts, String>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Facts {
    /// `0.13.0`.
    pub(crate) version: String,
    /// The major version of its LLVM, if it can be told.
    pub(crate) llvm: Option<u32>,
}

impl Linker {
    /// Its version, for people; `-` when there is none.
    pub(crate) fn found(&self) -> String {
        match &self.state {
            Ok(Facts { version, llvm: Some(llvm) }) => format!("{version}, LLVM {llvm}"),
            Ok(Facts { version, llvm: None }) => format!("{version}, LLVM unknown"),
            Err(_) => "-".to_owned(),
        }
    }

    /// Whether it can read the bitcode of a compiler with this LLVM: LLVM reads what older ones wrote. One whose LLVM
    /// is linked in statically does not tell; the linking itself will.
    pub(crate) fn fits(&self, llvm: u32) -> bool {
        self.state.as_ref().is_ok_and(|facts| facts.llvm.is_none_or(|own| own >= llvm))
    }
}

/// Looks in `$BPF_LINKER`, which is the only one if it is set, then on PATH, then below `tools`.
pub(crate) fn find(tools: &Path) -> Vec<Linker> {
    if let Some(path) = env::var_os("BPF_LINKER").filter(|path| !path.is_empty()) {
        return vec![examine(true, PathBuf::from(path))];
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let places = env::split_paths(&path).map(|dir| dir.join(NAME)).chain([installed(tools)]);
    let mut found: Vec<Linker> = Vec::new();
    for place in places.filter(|place| place.is_file()) {
        if found.iter().all(|linker| linker.path != place) {
            found.push(examine(false, place));
        }
    }
    found
}

/// Where `cargo install --root tools` puts it.
pub(crate) fn installed(tools: &Path) -> PathBuf {
    tools.join("bin").join(NAME)
}

/// Writes down the LLVM that the linker installed below `tools` was built with: its `--version` does not tell.
///
/// # Errors
///
/// When the file cannot be written.
pub(crate) fn record(tools: &Path, llvm: u32) -> anyhow::Result<()> {
    let file = record_of(&installed(tools));
    fs::write(&file, format!("{llvm}\n")).with_context(|| format!("write {}", file.display()))
}

/// Why `linker` will not do for a compiler with LLVM `wanted`, and what helps.
pub(crate) fn refusal(linker: &Linker, wanted: u32) -> Refusal {
    let why = match &linker.state {
        Err(why) => why.clone(),
        Ok(_) => format!("LLVM older than the compiler's {wanted}"),
    };
    let fix = if linker.chosen {
        "set BPF_LINKER to a bpf-linker that works, or unset it".to_owned()
    } else {
        Step::Linker { llvm: wanted }.by_hand()
    };
    Refusal { why, fix }
}

fn examine(chosen: bool, path: PathBuf) -> Linker {
    let mut command = Command::new(&path);
    command.arg("--version");
    let state = process::ask(command).map(|answer| {
        let answer = answer.trim();
        let version = answer.strip_prefix(NAME).unwrap_or(answer).trim().to_owned();
        Facts { version, llvm: llvm_of(&path) }
    });
    Linker { chosen, path, state }
}

fn llvm_of(linker: &Path) -> Option<u32> {
    let recorded = fs::read_to_string(record_of(linker)).ok().and_then(|text| text.trim().parse().ok());
    recorded.or_else(|| fs::read(linker).ok().and_then(|elf| llvm_named_in(&elf)))
}

fn record_of(linker: &Path) -> PathBuf {
    linker.with_extension("llvm")
}

/// The major version of the libLLVM that a dynamically linked program asks for: `libLLVM.so.22.1` or `libLLVM-17.so`.
fn llvm_named_in(elf: &[u8]) -> Option<u32> {
    const LIBRARY: &[u8] = b"libLLVM";
    let after = elf.windows(LIBRARY.len()).enumerate().filter(|(_, name)| *name == LIBRARY).map(|(at, _)| at);
    after.filter_map(|at| elf.get(at + LIBRARY.len()..)).find_map(|rest| {
        let digits = rest.strip_prefix(b".so.").or_else(|| rest.strip_prefix(b"-"))?;
        let end = digits.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(digits.len());
        std::str::from_utf8(&digits[..end]).ok()?.parse().ok()
    })
}

#[cfg(test)]
impl Linker {
    pub(crate) fn works(path: &str, llvm: Option<u32>) -> Self {
        let facts = Facts { version: "0.13.0".into(), llvm };
        Self { chosen: false, path: PathBuf::from(path), state: Ok(facts) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linker_reads_the_bitcode_of_its_own_and_older_llvms() {
        assert!(Linker::works("l", Some(22)).fits(22));
        assert!(Linker::works("l", Some(22)).fits(21));
        assert!(!Linker::works("l", Some(21)).fits(22));
        assert!(Linker::works("l", None).fits(22));
        let broken = Linker { state: Err("cannot run".into()), ..Linker::works("l", Some(22)) };
        assert!(!broken.fits(22));
    }

    #[test]
    fn llvm_is_told_by_the_library_it_is_linked_to() {
        assert_eq!(llvm_named_in(b"\0libLLVM.so.22.1\0libc.so.6"), Some(22));
        assert_eq!(llvm_named_in(b"libLLVMCore libLLVM-17.so.1"), Some(17));
        assert_eq!(llvm_named_in(b"libc.so.6"), None);
        assert_eq!(llvm_named_in(b"libLLVM-"), None);
    }

    #[test]
    fn what_was_recorded_beside_the_linker_is_believed() {
        let tools = tempfile::tempdir().unwrap();
        fs::create_dir(tools.path().join("bin")).unwrap();
        fs::write(installed(tools.path()), "libLLVM.so.21.1").unwrap();
        assert_eq!(llvm_of(&installed(tools.path())), Some(21));
        record(tools.path(), 22).unwrap();
        assert_eq!(llvm_of(&installed(tools.path())), Some(22));
    }

    #[test]
    fn refusal_says_what_is_wrong_and_how_to_get_another() {
        let old = refusal(&Linker::works("l", Some(21)), 22);
        assert_eq!(old.why, "LLVM older than the compiler's 22");
        assert!(old.fix.contains("llvm-22"), "{}", old.fix);
        let chosen = Linker { chosen: true, state: Err("cannot run l".into()), ..Linker::works("l", None) };
        let chosen = refusal(&chosen, 22);
        assert_eq!(chosen.why, "cannot run l");
        assert!(chosen.fix.contains("BPF_LINKER"), "{}", chosen.fix);
    }
}
