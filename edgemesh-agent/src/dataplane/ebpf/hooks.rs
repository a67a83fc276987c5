//! Who is on the hooks of the cgroup that is served: our own programs, and those of others.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::programs::{ProgramError, loaded_programs};
use aya_obj::generated::bpf_prog_type;

use super::{
    open::{PROGRAMS, io_error},
    pins::Pins,
    sys::{self, PROBE_NAME, Scope},
};

/// How many cgroups below the one that is served are looked at, for programs that run before ours.
const MAX_CGROUPS: usize = 4096;

/// What a look at the hooks has found.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Survey {
    /// The programs of others, each once per hook and cgroup.
    pub foreign: Vec<Foreign>,
    /// The hooks on which our program is not attached, though it should be.
    pub detached: Vec<&'static str>,
}

/// A program of somebody else on one of our hooks.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Foreign {
    pub id: u32,
    /// As the kernel has it, 15 bytes at most; empty if it has none, or may not be asked (CAP_SYS_ADMIN).
    pub name: String,
    /// `connect4` and its like.
    pub hook: &'static str,
    pub place: Place,
}

/// Where a [`Foreign`] program runs, seen from ours.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Place {
    Before,
    After,
    /// Before ours, for the processes of this cgroup alone.
    Below(PathBuf),
    /// Ours is not attached.
    Alone,
}

/// Whether an agent with another map layout was here and its programs are still the ones in force.
pub fn awaits_switch(pins: &Path) -> bool {
    Pins::new(pins).awaits_switch()
}

/// Looks at all hooks of `cgroup`, and at those of the cgroups below if there is any program that could be there.
///
/// Costs some dozens of system calls, and eight for each cgroup below where somebody else has programs of this kind.
///
/// # Errors
///
/// The cgroup cannot be opened, or its hooks may not be looked at (CAP_NET_ADMIN).
pub fn survey(cgroup: &Path, pins: &Path) -> io::Result<Survey> {
    let directory = File::open(cgroup)?;
    let served = sys::cgroup_id(&directory)?;
    let pins = Pins::new(pins);
    let (mut survey, mut ours, names) = (Survey::default(), HashSet::new(), names());
    for (name, hook) in PROGRAMS {
        let own = pins.link_info(name).filter(|link| link.cgroup == served).map(|link| link.program);
        if own.is_none() {
            survey.detached.push(name);
        }
        ours.extend(own);
        let effective = sys::prog_query(directory.as_fd(), hook, Scope::Effective)?;
        for (id, place) in places(&effective, own) {
            if let Some(known) = name_of(id, names.as_ref()) {
                survey.add(Foreign { id, name: known, hook: name, place });
            }
        }
    }
    let mut elsewhere = names.unwrap_or_default();
    for id in survey.foreign.iter().map(|foreign| foreign.id).chain(ours) {
        elsewhere.remove(&id);
    }
    elsewhere.retain(|_, name| name != PROBE_NAME);
    if !elsewhere.is_empty() {
        survey.look_below(cgroup, &elsewhere);
    }
    Ok(survey)
}

impl Survey {
    fn add(&mut self, foreign: Foreign) {
        if foreign.name != PROBE_NAME {
            self.foreign.push(foreign);
        }
    }

    /// Cgroups come and go, so one that cannot be looked at is gone.
    fn look_below(&mut self, cgroup: &Path, names: &BTreeMap<u32, String>) {
        let (mut pending, mut seen) = (children(cgroup), 0);
        while let Some(path) = pending.pop() {
            seen += 1;
            if seen > MAX_CGROUPS {
                tracing::debug!(cgroup = %cgroup.display(), "more than {MAX_CGROUPS} cgroups; the rest is not looked at");
                return;
            }
            let Ok(directory) = File::open(&path) else { continue };
            for (name, hook) in PROGRAMS {
                for id in sys::prog_query(directory.as_fd(), hook, Scope::Attached).unwrap_or_default() {
                    // What was loaded since the names were read is for the next time.
                    if let Some(known) = names.get(&id) {
                        self.add(Foreign { id, name: known.clone(), hook: name, place: Place::Below(path.clone()) });
                    }
                }
            }
            pending.extend(children(&path));
        }
    }
}

/// Where each foreign program of one hook runs, seen from ours; `effective` is in the order they run.
fn places(effective: &[u32], own: Option<u32>) -> Vec<(u32, Place)> {
    let ours = own.and_then(|own| effective.iter().position(|id| *id == own));
    let place = |index| match ours {
        None => Place::Alone,
        Some(ours) if index < ours => Place::Before,
        Some(_) => Place::After,
    };
    let others = effective.iter().enumerate().filter(|(_, id)| Some(**id) != own);
    others.map(|(index, id)| (*id, place(index))).collect()
}

/// The name of a program that is on a hook, empty where names may not be asked. None for one that came since they were: it is
/// for the next time, since it cannot be told whose it is.
fn name_of(id: u32, names: Option<&BTreeMap<u32, String>>) -> Option<String> {
    names.map_or_else(|| Some(String::new()), |names| names.get(&id).cloned())
}

/// All programs of this kind in the kernel, with their names; None where that may not be asked.
fn names() -> Option<BTreeMap<u32, String>> {
    let mut names = BTreeMap::new();
    for program in loaded_programs() {
        match program {
            Ok(program) if program.program_type() == bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR => {
                names.insert(program.id(), String::from_utf8_lossy(program.name()).into_owned());
            }
            Ok(_) => {}
            // Unloaded while we looked.
            Err(error) if is_gone(&error) => {}
            Err(error) => {
                tracing::debug!("the names of other programs cannot be read: {error}");
                return None;
            }
        }
    }
    Some(names)
}

fn is_gone(error: &ProgramError) -> bool {
    io_error(error).and_then(io::Error::raw_os_error) == Some(libc::ENOENT)
}

fn children(cgroup: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cgroup).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

/// Attaches our programs again where somebody detached them by force.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    /// What was said last, so that a failure that repeats is said once.
    failure: String,
}

impl Keeper {
    /// A link that lost its cgroup is made anew, in the order of the start. One whose pin is gone is left so: that is
    /// what `cleanup --force` does, and it must win.
    pub(super) fn attach_again<'a>(
        &mut self,
        pins: &Pins,
        cgroup: &File,
        program: impl Fn(&'static str) -> Option<BorrowedFd<'a>>,
    ) {
        for (name, hook) in PROGRAMS {
            if pins.link_info(name).is_none_or(|link| link.cgroup != 0) {
                continue;
            }
            let Some(program) = program(name) else { continue };
            match pins.attach(name, program, cgroup, hook) {
                Ok(_) => tracing::warn!(hook = name, "somebody has detached our program; it is attached again"),
                Err(error) => {
                    let failure = format!("cannot attach {name} again, which somebody has detached: {error}");
                    if failure != self.failure {
                        tracing::warn!("{failure}");
                        self.failure = failure;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_program_is_placed_by_the_order_in_which_the_kernel_runs_them() {
        assert_eq!(places(&[7], Some(7)), []);
        assert_eq!(places(&[3, 7, 9], Some(7)), [(3, Place::Before), (9, Place::After)]);
        assert_eq!(places(&[3], None), [(3, Place::Alone)]);
        assert_eq!(places(&[3], Some(7)), [(3, Place::Alone)]);
        assert_eq!(places(&[], Some(7)), []);
    }

    #[test]
    fn a_program_that_came_after_the_names_were_read_is_not_taken_for_a_nameless_one() {
        let names = BTreeMap::from([(3, "cil_sock4_connect".to_owned()), (4, String::new())]);
        assert_eq!(name_of(3, Some(&names)).as_deref(), Some("cil_sock4_connect"));
        assert_eq!(name_of(4, Some(&names)).as_deref(), Some(""));
        assert_eq!(name_of(7, Some(&names)), None);
        assert_eq!(name_of(7, None).as_deref(), Some(""), "names may not be asked");
    }

    #[test]
    fn a_cgroup_that_is_not_there_is_an_error() {
        assert!(survey(Path::new("/nonexistent"), Path::new("/nonexistent")).is_err());
    }
}
