//! Trying one feature at a time.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
};

use aya::{
    maps::MapType,
    programs::{CgroupSockAddrAttachType as Hook, ProgramType, tc},
    sys::{BpfHelper, is_helper_supported, is_map_supported},
};
use aya_obj::generated::{bpf_attach_type, bpf_prog_type};
use nix::sched::{CloneFlags, unshare};

use super::{
    super::{
        open::{self, PROGRAMS},
        sys,
    },
    Feature, Outcome,
};

/// The beginning of the names of scratch cgroups; the process id follows.
pub(in super::super) const SCRATCH: &str = "edgemesh-probe-";

/// Let the call pass; sk_lookup: SK_PASS.
const PASS: i32 = 1;
/// The next program decides (TCX_NEXT, TC_ACT_UNSPEC).
const NEXT: i32 = -1;
/// The loopback device is the first of every network namespace.
const LOOPBACK: u32 = 1;
/// The index of no device.
const NO_DEVICE: u32 = i32::MAX as u32;

/// What the attempts share; dropping it removes the scratch cgroup.
pub(super) struct Attempts {
    scratch: Result<Scratch, (String, bool)>,
    tcx: Outcome,
    clsact: Outcome,
}

impl Attempts {
    pub(super) fn new(cgroup: Option<&Path>) -> Self {
        let scratch = match cgroup {
            Some(cgroup) => Scratch::new(cgroup),
            None => Err(("there is no cgroup to make it in".to_owned(), false)),
        };
        let (tcx, clsact) = packets();
        Self { scratch, tcx, clsact }
    }

    pub(super) fn outcome(&mut self, feature: Feature) -> Outcome {
        let sock_addr = |helper| supported(is_helper_supported(ProgramType::CgroupSockAddr, helper), "call it");
        let map = |kind| supported(is_map_supported(kind), "make a map of this type");
        match feature {
            // The caller knows.
            Feature::Cgroup2 => Outcome::Available,
            // What our programs need of the verifier no program of two instructions shows.
            Feature::Bpf if open::missing_capabilities().contains(&"CAP_PERFMON") => Outcome::Missing {
                reason: "the verifier refuses our programs without CAP_PERFMON, which is missing here".to_owned(),
                permission: true,
            },
            Feature::Bpf => map(MapType::Array),
            Feature::ScratchCgroup => match &self.scratch {
                Ok(_) => Outcome::Available,
                Err((reason, permission)) => Outcome::Missing { reason: reason.clone(), permission: *permission },
            },
            Feature::SockAddr(hook) => self.sock_addr(hook).map_or_else(|missing| missing, |_| Outcome::Available),
            Feature::LinkUpdate => self.link_update().map_or_else(|missing| missing, |()| Outcome::Available),
            Feature::SkStorage => map(MapType::SkStorage),
            Feature::RingBuffer => map(MapType::RingBuf),
            Feature::LruHash => map(MapType::LruHash),
            Feature::LpmTrie => map(MapType::LpmTrie),
            Feature::SetRetval => sock_addr(BpfHelper::BPF_FUNC_set_retval),
            Feature::NetnsCookie => sock_addr(BpfHelper::BPF_FUNC_get_netns_cookie),
            Feature::Tcx => self.tcx.clone(),
            Feature::Clsact => self.clsact.clone(),
            Feature::SockMap => map(MapType::SockMap),
            Feature::SkLookup => {
                let program =
                    sys::load_return(bpf_prog_type::BPF_PROG_TYPE_SK_LOOKUP, bpf_attach_type::BPF_SK_LOOKUP, PASS);
                outcome(program.map(drop), "load a program")
            }
        }
    }

    /// Without a scratch cgroup no more than loading is tried, and there is no link.
    fn sock_addr(&self, name: &str) -> Result<(OwnedFd, Option<OwnedFd>), Outcome> {
        let hook = PROGRAMS.iter().find(|(other, _)| *other == name).map_or(Hook::Connect4, |(_, hook)| *hook);
        let program = sys::load_return(bpf_prog_type::BPF_PROG_TYPE_CGROUP_SOCK_ADDR, hook.into(), PASS)
            .map_err(|error| missing(&error, "load a program"))?;
        let Ok(scratch) = &self.scratch else { return Ok((program, None)) };
        let link = sys::link_create(program.as_fd(), scratch.directory.as_fd(), hook)
            .map_err(|error| missing(&error, "attach a program by a link"))?;
        Ok((program, Some(link)))
    }

    fn link_update(&self) -> Result<(), Outcome> {
        let (program, link) = self.sock_addr("connect4")?;
        let Some(link) = link else { return Ok(()) };
        sys::link_update(link.as_fd(), program.as_fd())
            .map_err(|error| missing(&error, "put another program into a link"))
    }
}

/// A cgroup without processes below the one that is served, removed when dropped.
struct Scratch {
    path: PathBuf,
    directory: File,
}

impl Scratch {
    fn new(below: &Path) -> Result<Self, (String, bool)> {
        let path = below.join(format!("{SCRATCH}{}", std::process::id()));
        let refused = |error: io::Error| (format!("cannot make {}: {error}", path.display()), is_permission(&error));
        match fs::create_dir(&path) {
            // Left by an agent of the same id that was killed here.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(refused(error)),
            _ => {}
        }
        match File::open(&path) {
            Ok(directory) => Ok(Self { path, directory }),
            Err(error) => {
                let refusal = refused(error);
                let _ = fs::remove_dir(&path);
                Err(refusal)
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            tracing::warn!(cgroup = %self.path.display(), "cannot remove a scratch cgroup: {error}");
        }
    }
}

/// tcx and clsact, tried on the loopback device of a network namespace that ends with the thread that made it.
fn packets() -> (Outcome, Outcome) {
    let tried = thread::Builder::new().name("probe".to_owned()).spawn(|| {
        // Without CAP_SYS_ADMIN there is no such namespace, and no device of ours to attach to.
        let own = unshare(CloneFlags::CLONE_NEWNET).is_ok();
        (tcx(own), clsact(own))
    });
    match tried.map(thread::JoinHandle::join) {
        Ok(Ok(outcomes)) => outcomes,
        Ok(Err(_)) | Err(_) => {
            let missing = Outcome::Missing { reason: "cannot start a thread to try it".to_owned(), permission: false };
            (missing.clone(), missing)
        }
    }
}

fn tcx(own: bool) -> Outcome {
    let program = match sys::load_return(bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS, bpf_attach_type::BPF_TCX_INGRESS, NEXT)
    {
        Ok(program) => program,
        Err(error) => return missing(&error, "load a program"),
    };
    let device = if own { LOOPBACK } else { NO_DEVICE };
    match sys::tcx_create(program.as_fd(), device, false) {
        Ok(_) => Outcome::Available,
        // Only a kernel with tcx gets as far as to look for the device.
        Err(error) if !own && error.raw_os_error() == Some(libc::ENODEV) => Outcome::Available,
        Err(error) => missing(&error, "attach a program to packets coming in"),
    }
}

fn clsact(own: bool) -> Outcome {
    // Kernels without tcx take programs of this type without an attach type only, which is the value 0.
    let unspecified = bpf_attach_type::BPF_CGROUP_INET_INGRESS;
    match sys::load_return(bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS, unspecified, NEXT) {
        Ok(_) if own => tc::qdisc_add_clsact("lo")
            .map_or_else(|error| refusal(&error, "add the qdisc to a device"), |()| Outcome::Available),
        Ok(_) => Outcome::Available,
        Err(error) => missing(&error, "load a program"),
    }
}

fn supported<E: std::error::Error + 'static>(answer: Result<bool, E>, attempt: &str) -> Outcome {
    match answer {
        Ok(true) => Outcome::Available,
        Ok(false) => missing(&io::Error::from_raw_os_error(libc::EINVAL), attempt),
        Err(error) => refusal(&error, attempt),
    }
}

/// An error with the kernel's somewhere in its chain.
fn refusal(error: &(dyn std::error::Error + 'static), attempt: &str) -> Outcome {
    match open::io_error(error) {
        Some(error) => missing(error, attempt),
        None => Outcome::Missing { reason: format!("cannot {attempt}: {error}"), permission: false },
    }
}

fn outcome(result: io::Result<()>, attempt: &str) -> Outcome {
    result.map_or_else(|error| missing(&error, attempt), |()| Outcome::Available)
}

fn missing(error: &io::Error, attempt: &str) -> Outcome {
    let why = why(error, &open::missing_capabilities());
    Outcome::Missing { reason: format!("cannot {attempt}: {why}"), permission: is_permission(error) }
}

fn is_permission(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES))
}

fn why(error: &io::Error, lacking: &[&str]) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) if lacking.is_empty() => format!(
            "{error}, though no capability is missing: a seccomp filter, a security module, kernel lockdown or a user \
             namespace is in the way"
        ),
        Some(libc::EPERM | libc::EACCES) => format!("{error}; missing here: {}", lacking.join(", ")),
        Some(libc::ENOSYS) => "the kernel, or a seccomp filter, has no bpf(2)".to_owned(),
        Some(libc::EINVAL) => "this kernel does not know it".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_whether_the_kernel_a_capability_or_something_else_is_in_the_way() {
        let said = |errno, lacking: &[&str]| why(&io::Error::from_raw_os_error(errno), lacking);
        assert!(said(libc::EINVAL, &[]).contains("kernel does not know"));
        assert!(said(libc::ENOSYS, &[]).contains("has no bpf(2)"));
        assert!(said(libc::EPERM, &["CAP_BPF"]).ends_with("missing here: CAP_BPF"));
        assert!(said(libc::EPERM, &[]).contains("seccomp"));
        assert!(said(libc::ENOMEM, &[]).contains("memory"));
    }
}
