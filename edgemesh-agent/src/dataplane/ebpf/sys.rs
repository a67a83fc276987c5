//! The few bpf(2) commands that aya does not offer: pinned links, their update in place, what they are attached to.

use std::{
    ffi::CString,
    io,
    mem::size_of,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use aya::programs::CgroupSockAddrAttachType;
use aya_obj::generated::bpf_attach_type;

// Commands of `enum bpf_cmd`, include/uapi/linux/bpf.h.
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;

/// Attaches a program to a cgroup by a link, which detaches when its last file descriptor and pin are gone.
///
/// Links allow several programs on one hook. Kernel 5.7.
///
/// # Errors
///
/// EPERM also if a program was attached to the hook of this cgroup without `BPF_F_ALLOW_MULTI`.
pub(super) fn link_create(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    hook: CgroupSockAddrAttachType,
) -> io::Result<OwnedFd> {
    let hook: bpf_attach_type = hook.into();
    let target = cgroup.as_raw_fd().cast_unsigned();
    bpf_fd(BPF_LINK_CREATE, &LinkAttr { program: program.as_raw_fd(), target, attach_type: hook as u32, flags: 0 })
}

/// Attaches a program to an interface after those that are there, by a link as [`link_create`]'s. Linux 6.6.
///
/// # Errors
///
/// EINVAL where the kernel has no tcx.
pub(super) fn tcx_create(program: BorrowedFd<'_>, interface: u32, egress: bool) -> io::Result<OwnedFd> {
    let hook = if egress { bpf_attach_type::BPF_TCX_EGRESS } else { bpf_attach_type::BPF_TCX_INGRESS };
    let attr = LinkAttr { program: program.as_raw_fd(), target: interface, attach_type: hook as u32, flags: 0 };
    bpf_fd(BPF_LINK_CREATE, &attr)
}

#[repr(C)]
struct LinkAttr {
    program: RawFd,
    /// A file descriptor, or the index of an interface.
    target: u32,
    attach_type: u32,
    flags: u32,
}

/// Puts another program into a link: every call sees either the old or the new one. Kernel 5.7.
///
/// # Errors
///
/// ENOLINK if the cgroup of the link is gone.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link_fd: RawFd,
        new_prog_fd: RawFd,
        flags: u32,
        old_prog_fd: u32,
    }
    let attr = Attr { link_fd: link.as_raw_fd(), new_prog_fd: program.as_raw_fd(), flags: 0, old_prog_fd: 0 };
    bpf(BPF_LINK_UPDATE, &attr).map(drop)
}

/// The index of the interface that a tcx link is attached to; 0 once that interface is gone.
pub(super) fn link_interface(link: BorrowedFd<'_>) -> io::Result<u32> {
    // Both are at the beginning of what is particular to the kind of link, the index in four bytes of it.
    Ok(link_cgroup(link)? as u32)
}

/// The id (inode number) of the cgroup that a cgroup link is attached to; 0 once that cgroup is gone.
pub(super) fn link_cgroup(link: BorrowedFd<'_>) -> io::Result<u64> {
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        prog_id: u32,
        _align: u32,
        cgroup_id: u64,
        attach_type: u32,
        _align2: u32,
    }
    #[repr(C)]
    struct Attr {
        bpf_fd: RawFd,
        info_len: u32,
        info: u64,
    }
    let mut info = Info::default();
    let attr = Attr {
        bpf_fd: link.as_raw_fd(),
        info_len: size_of::<Info>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &attr)?;
    Ok(info.cgroup_id)
}

/// Gives an object a name on a bpffs, which keeps it alive.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attr = PathAttr { pathname: path.as_ptr() as u64, bpf_fd: object.as_raw_fd(), file_flags: 0 };
    bpf(BPF_OBJ_PIN, &attr).map(drop)
}

/// Opens a pinned object.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf_fd(BPF_OBJ_GET, &PathAttr { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 })
}

#[repr(C)]
struct PathAttr {
    pathname: u64,
    bpf_fd: RawFd,
    file_flags: u32,
}

fn bpf<Attr>(command: libc::c_long, attr: &Attr) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a prefix of `union bpf_attr` as long as said; the kernel takes missing fields as zero and only
    // follows the pointers in it, all of which are to live objects of the callers above.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<Attr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn bpf_fd<Attr>(command: libc::c_long, attr: &Attr) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the commands that come here return a new file descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The id of a cgroup directory, as [`link_cgroup`] reports it.
pub(super) fn cgroup_id(directory: impl AsFd) -> io::Result<u64> {
    Ok(nix::sys::stat::fstat(directory)?.st_ino)
}

/// The cookie of this thread's network namespace, as programs see it (`SO_NETNS_COOKIE`, Linux 5.14).
pub(super) fn netns_cookie() -> io::Result<u64> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, which has as many.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}
