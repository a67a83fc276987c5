//! The program that gives the agent's sockets everything that is sent to an alias.
//!
//! Its link is pinned: while no agent runs, the program refuses what is sent to aliases rather than let the kernel look
//! for another socket that listens on that port. The next agent puts its own program, with its own sockets, into the link
//! in one step.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use aya::{Ebpf as Object, EbpfLoader, maps::SockMap, programs::SkLookup};
use edgemesh_common::alias::{TCP4, TCP6, UDP4, UDP6, range_v4, range_v6};
use tracing::debug;

use super::{
    mounts,
    open::{self, in_one_line, load},
    pins::Pins,
    sys,
};
use crate::{alias::AliasRanges, config::EbpfConfig};

/// The compiled eBPF object, absent from builds made before `cargo xtask build-ebpf`.
#[cfg(bpf_alias_object)]
const OBJECT: Option<&[u8]> = Some(aya::include_bytes_aligned!(env!("EDGEMESH_BPF_ALIAS_OBJECT_PATH")));
#[cfg(not(bpf_alias_object))]
const OBJECT: Option<&[u8]> = None;

const PROGRAM: &str = "aliases";
const SOCKETS: &str = "ALIAS_SOCKETS";
/// Beside the links of the other programs, and not named as they are.
const PIN: &str = "lookup_aliases";

/// Why the kernel cannot give the agent what is sent to aliases, in one line each.
#[derive(Debug, thiserror::Error)]
pub enum AliasError {
    #[error(
        "this build of edgemesh-agent has no eBPF program for aliases in it; build it with `cargo xtask build-ebpf` and build the agent again"
    )]
    NoObject,
    /// Later versions have another way for such kernels.
    #[error(
        "this kernel has no programs that look sockets up, or no maps of sockets ({0}); Linux 5.9 or later is needed, before 5.12 with CONFIG_BPF_STREAM_PARSER"
    )]
    NotAvailable(String),
    #[error("cannot {attempt} for aliases: {error}")]
    Kernel { attempt: &'static str, error: String },
}

/// Has the kernel give `sockets` all TCP and UDP to the ranges, any port, from now on, in the network namespace of this
/// thread; each socket with whether it is of TCP and whether of IPv6. It lasts until all of them are closed.
///
/// # Errors
///
/// See [`AliasError`]; what an earlier agent has attached is as it was.
pub fn divert_aliases<'a>(
    config: &EbpfConfig,
    ranges: AliasRanges,
    sockets: impl IntoIterator<Item = (BorrowedFd<'a>, bool, bool)>,
) -> Result<(), AliasError> {
    let pins = Pins::new(&config.pin_directory);
    mounts::prepare_pins(&config.pin_directory, &[&pins.tables])
        .map_err(|error| kernel("prepare the directory of pins")(&error))?;
    let mut object = load_object(ranges)?;
    let map = object.map_mut(SOCKETS).ok_or_else(foreign)?;
    let mut map = SockMap::try_from(map).map_err(|error| kernel("use the map of sockets")(&error))?;
    for (socket, tcp, v6) in sockets {
        let index = match (tcp, v6) {
            (true, false) => TCP4,
            (true, true) => TCP6,
            (false, false) => UDP4,
            (false, true) => UDP6,
        };
        map.set(index, &socket, 0).map_err(|error| kernel("put a socket into the map")(&error))?;
    }
    let fd = program(&mut object)?.fd().map_err(|error| kernel("use the program")(&error))?;
    // The link holds the program, and that its map.
    put_in_force(&pins.tables.join(PIN), fd.as_fd()).map_err(|error| kernel("attach the program")(&error))
}

/// Whether an earlier agent has attached the program.
pub fn is_diverted(config: &EbpfConfig) -> bool {
    Pins::new(&config.pin_directory).tables.join(PIN).exists()
}

/// Takes the program away that an earlier agent has attached; says whether there was one.
///
/// # Errors
///
/// It is there and cannot be removed.
pub fn leave_aliases(config: &EbpfConfig) -> io::Result<bool> {
    match fs::remove_file(Pins::new(&config.pin_directory).tables.join(PIN)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn load_object(ranges: AliasRanges) -> Result<Object, AliasError> {
    let bytes = OBJECT.ok_or(AliasError::NoObject)?;
    let (v4, v6) = in_words(ranges);
    let loaded = EbpfLoader::new()
        .override_global("ALIAS_RANGE_V4", &v4, true)
        .override_global("ALIAS_RANGE_V6", &v6, true)
        .load(bytes);
    let mut object = loaded.map_err(|error| unavailable(&error))?;
    let program = program(&mut object)?;
    load(|| program.load()).map_err(|error| match open::io_error(&error).and_then(io::Error::raw_os_error) {
        Some(libc::EINVAL) if open::missing_capabilities().is_empty() => AliasError::NotAvailable(in_one_line(&error)),
        _ => AliasError::Kernel { attempt: "load the program", error: in_one_line(&error) },
    })?;
    Ok(object)
}

fn program(object: &mut Object) -> Result<&mut SkLookup, AliasError> {
    object.program_mut(PROGRAM).and_then(|program| program.try_into().ok()).ok_or_else(foreign)
}

/// The ranges as programs compare them.
pub(super) fn in_words(ranges: AliasRanges) -> ([u32; 2], [u32; 8]) {
    let (v4, v6) = (ranges.v4, ranges.v6);
    let v4 = match v4.network() {
        std::net::IpAddr::V4(network) => range_v4(network.octets(), v4.length()),
        std::net::IpAddr::V6(_) => edgemesh_common::alias::NO_RANGE_V4,
    };
    let v6 = match v6.network() {
        std::net::IpAddr::V6(network) => range_v6(network.octets(), v6.length()),
        std::net::IpAddr::V4(_) => edgemesh_common::alias::NO_RANGE_V6,
    };
    (v4, v6)
}

/// Puts the program into the link that an earlier agent pinned, or into a new one.
fn put_in_force(pin: &Path, program: BorrowedFd<'_>) -> io::Result<()> {
    let netns = File::open("/proc/thread-self/ns/net")?;
    if let Ok(link) = sys::open_pin(pin) {
        if u64::from(sys::link_namespace(link.as_fd())?) == nix::sys::stat::fstat(&netns)?.st_ino {
            match sys::link_update(link.as_fd(), program) {
                // Of a network namespace that is gone, whose number this one has got.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                result => return result,
            }
        }
        debug!(pin = %pin.display(), "a pinned link belongs to another network namespace; making a new one");
        fs::remove_file(pin)?;
    }
    let link = sys::lookup_create(program, netns.as_fd())?;
    sys::pin(link.as_fd(), pin)
}

/// A map that the kernel does not know is refused with EINVAL.
fn unavailable(error: &(dyn std::error::Error + 'static)) -> AliasError {
    match open::io_error(error) {
        Some(error) if error.raw_os_error() == Some(libc::EINVAL) => AliasError::NotAvailable(error.to_string()),
        _ => kernel("load the object")(error),
    }
}

fn foreign() -> AliasError {
    AliasError::Kernel { attempt: "use the object", error: "it does not belong to this agent".to_owned() }
}

fn kernel(attempt: &'static str) -> impl Fn(&(dyn std::error::Error + 'static)) -> AliasError {
    move |error| {
        let error = open::io_error(error).map_or_else(|| error.to_string(), ToString::to_string);
        AliasError::Kernel { attempt, error }
    }
}
