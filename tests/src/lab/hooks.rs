//! What others may do to a node's hooks: put a program on one, or take one away by force.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

// `enum bpf_cmd`, `bpf_prog_type` and `bpf_attach_type`, include/uapi/linux/bpf.h.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_DETACH: libc::c_long = 34;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const BPF_CGROUP_INET4_CONNECT: u32 = 10;

/// What a foreign program says to each call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Says {
    /// It is refused with EPERM.
    No,
    /// It goes on.
    Yes,
}

/// A program of somebody else on `connect4` of a cgroup, until dropped.
#[derive(Debug)]
pub struct Foreign {
    _link: OwnedFd,
}

impl Foreign {
    /// Attaches one called `name`, of at most 15 bytes.
    pub fn attach(cgroup: &Path, name: &str, says: Says) -> Result<Self> {
        #[repr(C)]
        struct Link {
            prog_fd: RawFd,
            target_fd: RawFd,
            attach_type: u32,
            flags: u32,
        }
        let program = load(name, says).context("could not load a program")?;
        let directory = File::open(cgroup).with_context(|| format!("could not open {}", cgroup.display()))?;
        let (prog_fd, target_fd) = (program.as_raw_fd(), directory.as_raw_fd());
        let attr = Link { prog_fd, target_fd, attach_type: BPF_CGROUP_INET4_CONNECT, flags: 0 };
        let link = bpf_fd(BPF_LINK_CREATE, &attr).context("could not attach a program")?;
        Ok(Self { _link: link })
    }
}

/// Detaches the link pinned at `pin`, which stays pinned, as `bpftool link detach` does.
pub fn detach(pin: &Path) -> Result<()> {
    #[repr(C)]
    struct Get {
        pathname: u64,
        bpf_fd: u32,
        file_flags: u32,
    }
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let get = Get { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    let link = bpf_fd(BPF_OBJ_GET, &get).with_context(|| format!("could not open {}", pin.display()))?;
    bpf(BPF_LINK_DETACH, &link.as_raw_fd()).with_context(|| format!("could not detach {}", pin.display()))?;
    Ok(())
}

/// `r0 = verdict; exit`
fn load(name: &str, says: Says) -> Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
        prog_name: [u8; 16],
        prog_ifindex: u32,
        expected_attach_type: u32,
    }
    ensure!(name.len() < 16, "a program's name has at most 15 bytes");
    let instructions: [[u8; 8]; 2] =
        [[0xb7, 0, 0, 0, u8::from(says == Says::Yes), 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];
    let mut prog_name = [0; 16];
    prog_name[..name.len()].copy_from_slice(name.as_bytes());
    let attr = Load {
        prog_type: BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
        insn_cnt: 2,
        insns: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name,
        prog_ifindex: 0,
        expected_attach_type: BPF_CGROUP_INET4_CONNECT,
    };
    Ok(bpf_fd(BPF_PROG_LOAD, &attr)?)
}

fn bpf<Attr>(command: libc::c_long, attr: &Attr) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a prefix of `union bpf_attr` as long as said; the pointers in it are to live objects of the
    // callers, and these commands write nothing.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<Attr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn bpf_fd<Attr>(command: libc::c_long, attr: &Attr) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(bpf(command, attr)?).map_err(io::Error::other)?;
    // SAFETY: the commands that come here return a new file descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
