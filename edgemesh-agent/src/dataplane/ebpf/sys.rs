//! The few bpf(2) commands that aya does not offer: pinned links, their update in place, what is attached where, and
//! programs of two instructions for probing.

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
use aya_obj::generated::{bpf_attach_type, bpf_prog_type};

// Commands of `enum bpf_cmd`, include/uapi/linux/bpf.h.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
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
    bpf_fd(BPF_LINK_CREATE, &LinkCreate::new(program, cgroup.as_raw_fd() as u32, hook.into()))
}

/// Attaches a program to an interface after those that are there, by a link as [`link_create`]'s. Linux 6.6.
///
/// # Errors
///
/// EINVAL where the kernel has no tcx.
pub(super) fn tcx_create(program: BorrowedFd<'_>, interface: u32, egress: bool) -> io::Result<OwnedFd> {
    let hook = if egress { bpf_attach_type::BPF_TCX_EGRESS } else { bpf_attach_type::BPF_TCX_INGRESS };
    bpf_fd(BPF_LINK_CREATE, &LinkCreate::new(program, interface, hook))
}

/// Attaches a program that looks sockets up to a network namespace, by a link as [`link_create`]'s. Linux 5.9.
pub(super) fn lookup_create(program: BorrowedFd<'_>, netns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    bpf_fd(BPF_LINK_CREATE, &LinkCreate::new(program, netns.as_raw_fd() as u32, bpf_attach_type::BPF_SK_LOOKUP))
}

#[repr(C)]
struct LinkCreate {
    prog_fd: RawFd,
    /// A descriptor or the index of a device, as the attach type has it.
    target: u32,
    attach_type: u32,
    flags: u32,
}

impl LinkCreate {
    fn new(program: BorrowedFd<'_>, target: u32, hook: bpf_attach_type) -> Self {
        Self { prog_fd: program.as_raw_fd(), target, attach_type: hook as u32, flags: 0 }
    }
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

/// What a cgroup link holds together.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct LinkInfo {
    pub(super) program: u32,
    /// The id (inode number) of the cgroup; 0 once that is gone, or the link was detached by force.
    pub(super) cgroup: u64,
}

/// The program and the cgroup of a cgroup link.
pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
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
    Ok(LinkInfo { program: info.prog_id, cgroup: info.cgroup_id })
}

/// Which programs a query is about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Scope {
    /// Those attached to the cgroup itself.
    Attached,
    /// Those that run for the processes in it, with those of the cgroups above, in the order they run.
    Effective,
}

/// The ids of the programs on one hook of a cgroup, 256 at most. Kernel 4.15.
pub(super) fn prog_query(cgroup: BorrowedFd<'_>, hook: CgroupSockAddrAttachType, scope: Scope) -> io::Result<Vec<u32>> {
    const BPF_F_QUERY_EFFECTIVE: u32 = 1;
    #[repr(C)]
    struct Attr {
        target_fd: RawFd,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        prog_cnt: u32,
        _pad: u32,
    }
    let hook: bpf_attach_type = hook.into();
    let mut ids = vec![0_u32; 256];
    let mut attr = Attr {
        target_fd: cgroup.as_raw_fd(),
        attach_type: hook as u32,
        query_flags: if scope == Scope::Effective { BPF_F_QUERY_EFFECTIVE } else { 0 },
        attach_flags: 0,
        prog_ids: ids.as_mut_ptr() as u64,
        prog_cnt: ids.len() as u32,
        _pad: 0,
    };
    // SAFETY: `attr` is the `query` part of `union bpf_attr`, as long as said; the kernel writes to it and at most
    // `prog_cnt` ids to `ids`, both of which outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut attr, size_of::<Attr>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    ids.truncate(attr.prog_cnt as usize);
    Ok(ids)
}

/// The name that programs of [`load_return`] have in the kernel.
pub(super) const PROBE_NAME: &str = "edgemesh_probe";

/// Loads a program that does nothing but return `value`.
///
/// # Errors
///
/// EINVAL where the kernel knows no such type, or not for this hook.
pub(super) fn load_return(kind: bpf_prog_type, hook: bpf_attach_type, value: i32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
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
    let [a, b, c, d] = value.to_le_bytes();
    // r0 = value; exit
    let instructions: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, a, b, c, d], [0x95, 0, 0, 0, 0, 0, 0, 0]];
    let mut prog_name = [0; 16];
    prog_name[..PROBE_NAME.len()].copy_from_slice(PROBE_NAME.as_bytes());
    let attr = Attr {
        prog_type: kind as u32,
        insn_cnt: instructions.len() as u32,
        insns: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name,
        prog_ifindex: 0,
        expected_attach_type: hook as u32,
    };
    bpf_fd(BPF_PROG_LOAD, &attr)
}

/// The index of the interface that a tcx link is attached to; 0 once that interface is gone.
pub(super) fn link_interface(link: BorrowedFd<'_>) -> io::Result<u32> {
    // Both are at the beginning of what is particular to the kind of link, the index in four bytes of it.
    Ok(link_info(link)?.cgroup as u32)
}

/// The inode number of the network namespace that a link of [`lookup_create`] is attached to; 0 once that is gone.
pub(super) fn link_namespace(link: BorrowedFd<'_>) -> io::Result<u32> {
    // Both are at the beginning of what is particular to the kind of link, the number in four bytes of it.
    Ok(link_info(link)?.cgroup as u32)
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

/// One step through a map: how many elements came, and whether those were the last.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Batch {
    pub(super) count: usize,
    pub(super) last: bool,
}

/// Reads as many elements of a hash map as find room, from `position` on, which is moved; None begins at the beginning.
/// Kernel 5.6. Of a map that changes meanwhile, elements may be missed or come twice, as with any iteration.
///
/// `keys` and `values` are as the kernel lays them out: each value, for a per-CPU map one for each possible CPU, filled
/// up to 8 bytes.
///
/// # Errors
///
/// ENOSPC where a single bucket holds more elements than find room.
pub(super) fn lookup_batch<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    position: &mut Option<u32>,
    keys: &mut [K],
    values: &mut [V],
    per_key: usize,
) -> io::Result<Batch> {
    #[repr(C)]
    struct Attr {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map_fd: RawFd,
        elem_flags: u64,
        flags: u64,
    }
    const { assert!(size_of::<V>().is_multiple_of(8), "the kernel would put padding between the values") };
    let count = keys.len().min(values.len() / per_key.max(1));
    // A hash map's position is the number of a bucket.
    let (before, mut after) = (position.unwrap_or(0), 0u32);
    let attr = Attr {
        in_batch: if position.is_some() { std::ptr::from_ref(&before) as u64 } else { 0 },
        out_batch: std::ptr::from_mut(&mut after) as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: u32::try_from(count).unwrap_or(u32::MAX),
        map_fd: map.as_raw_fd(),
        elem_flags: 0,
        flags: 0,
    };
    // The kernel writes the number of elements back into the attributes.
    let attr = std::cell::UnsafeCell::new(attr);
    let result = bpf(BPF_MAP_LOOKUP_BATCH, &attr);
    let count = attr.into_inner().count as usize;
    *position = Some(after);
    match result {
        Ok(_) => Ok(Batch { count, last: false }),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Batch { count, last: true }),
        Err(error) => Err(error),
    }
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

/// The id of a cgroup directory, as [`link_info`] reports it.
pub(super) fn cgroup_id(directory: impl AsFd) -> io::Result<u64> {
    Ok(nix::sys::stat::fstat(directory)?.st_ino)
}

/// CLOCK_MONOTONIC in nanoseconds, which is what programs are told by `bpf_ktime_get_ns`.
pub(super) fn monotonic() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes to `now`, which outlives the call. This clock is always there.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// Waits until there is something to read, at most `wait`.
pub(super) fn wait_readable(fd: BorrowedFd<'_>, wait: std::time::Duration) -> io::Result<()> {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let wait = libc::c_int::try_from(wait.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: one record, which outlives the call; its descriptor is borrowed for as long.
    let result = unsafe { libc::poll(&raw mut poll, 1, wait) };
    match io::Error::last_os_error() {
        error if result < 0 && error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}
