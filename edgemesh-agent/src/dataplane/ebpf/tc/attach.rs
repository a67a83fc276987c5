//! Attaching programs to interfaces: by tcx links, pinned, or by filters of the clsact qdisc.
//!
//! Both outlive the agent. A link is updated and a filter changed in place, so every packet meets the old program or the
//! new one.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
};

use futures::{StreamExt, TryStreamExt};
use rtnetlink::{
    Error, Handle,
    packet_core::{
        DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, Nla,
        NlasIterator,
    },
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcAttribute, TcHandle, TcMessage, TcOption},
    },
};
use tracing::debug;

use super::super::sys;

/// The names and the place of our filters. The priority is one that neither `tc` nor anybody known picks by itself.
const NAMES: [&str; 2] = ["edgemesh_ingress", "edgemesh_egress"];
const PRIORITY: u16 = 20_008;
const FILTER: u32 = 1;
const CLSACT: &str = "clsact";

// Attributes of a bpf filter, include/uapi/linux/pkt_cls.h.
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
/// `htons(ETH_P_ALL)`, for `tcm_info`.
const ALL_PROTOCOLS: u32 = 0x0003_u16.to_be() as u32;

/// A direction of an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Way {
    Ingress,
    Egress,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    fn filter(self) -> &'static str {
        match self {
            Self::Ingress => NAMES[0],
            Self::Egress => NAMES[1],
        }
    }

    fn parent(self) -> TcHandle {
        let minor = match self {
            Self::Ingress => TcHandle::MIN_INGRESS,
            Self::Egress => TcHandle::MIN_EGRESS,
        };
        TcHandle { major: 0xffff, minor }
    }
}

/// Where the link to an interface is pinned.
pub(super) fn pin(directory: &Path, index: u32, way: Way) -> PathBuf {
    directory.join(format!("tc_{index}_{}", way.name()))
}

/// The interfaces that there are pins for.
pub(super) fn pinned(directory: &Path) -> Vec<u32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let index = |name: std::ffi::OsString| name.to_str()?.strip_prefix("tc_")?.split('_').next()?.parse().ok();
    entries.filter_map(|entry| index(entry.file_name())).collect()
}

/// Removes the links to an interface; whether it still exists does not matter. What comes in first, so that there is
/// nothing new to turn back.
///
/// # Errors
///
/// A pin is there and cannot be removed.
pub(super) fn unpin(directory: &Path, index: u32) -> io::Result<()> {
    for way in [Way::Ingress, Way::Egress] {
        match fs::remove_file(pin(directory, index, way)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Attaches by a tcx link, or updates the one there is.
///
/// # Errors
///
/// EINVAL where the kernel has no tcx (before Linux 6.6).
pub(super) fn tcx(program: BorrowedFd<'_>, pin: &Path, index: u32, way: Way) -> io::Result<()> {
    if let Ok(link) = sys::open_pin(pin) {
        if sys::link_interface(link.as_fd())? == index {
            match sys::link_update(link.as_fd(), program) {
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
                result => return result,
            }
        }
        debug!(pin = %pin.display(), "a pinned link belongs to an interface that is gone; making a new one");
        fs::remove_file(pin)?;
    }
    let link = sys::tcx_create(program, index, way == Way::Egress)?;
    sys::pin(link.as_fd(), pin)
}

/// Makes the clsact qdisc unless it is there; says whether it was made.
///
/// # Errors
///
/// The kernel has none, or another qdisc is in its place.
pub(super) async fn ensure_clsact(netlink: &Handle, index: u32) -> Result<bool, Error> {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle { major: 0xffff, minor: 0 };
    message.attributes.push(TcAttribute::Kind(CLSACT.to_owned()));
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    match request(netlink, RouteNetlinkMessage::NewQueueDiscipline(message), flags).await {
        Ok(()) => Ok(true),
        Err(error) if errno(&error) == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Attaches by a filter of the clsact qdisc, or changes ours.
///
/// # Errors
///
/// Somebody else's filter has our place.
pub(super) async fn filter(netlink: &Handle, program: BorrowedFd<'_>, index: u32, way: Way) -> Result<(), Error> {
    let name = way.filter();
    let taken = filters(netlink, index, way).await?.into_iter().any(|(header, found)| {
        priority_of(&header) == PRIORITY && header.header.handle == TcHandle::from(FILTER) && found != name
    });
    if taken {
        return Err(Error::InvalidNla(format!(
            "another program's filter has priority {PRIORITY} and handle {FILTER}, which are ours"
        )));
    }
    let mut message = filter_message(index, way);
    let option = |kind: u16, value: Vec<u8>| TcOption::Other(DefaultNla::new(kind, value));
    let mut text = name.as_bytes().to_vec();
    text.push(0);
    message.attributes.push(TcAttribute::Kind("bpf".to_owned()));
    message.attributes.push(TcAttribute::Options(vec![
        option(TCA_BPF_FD, program.as_raw_fd().to_ne_bytes().to_vec()),
        option(TCA_BPF_NAME, text),
        option(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes().to_vec()),
    ]));
    request(netlink, RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE).await
}

/// Removes our filters from an interface, and the qdisc if `own_qdisc` and nobody else has a filter there; says whether
/// there was anything.
///
/// # Errors
///
/// The kernel refuses; an interface that is gone is no error.
pub(super) async fn remove_filters(netlink: &Handle, index: u32, own_qdisc: bool) -> Result<bool, Error> {
    let (mut removed, mut others) = (false, false);
    for way in [Way::Ingress, Way::Egress] {
        let found = match filters(netlink, index, way).await {
            Err(error) if matches!(errno(&error), Some(libc::ENODEV | libc::EINVAL | libc::ENOENT)) => {
                return Ok(false);
            }
            found => found?,
        };
        for (message, name) in found {
            if name != way.filter() || priority_of(&message) != PRIORITY {
                // A filter is listed with its chain, which has no handle and no name.
                others |= message.header.handle != TcHandle::default();
                continue;
            }
            request(netlink, RouteNetlinkMessage::DelTrafficFilter(filter_message(index, way)), 0).await?;
            removed = true;
        }
    }
    if own_qdisc && !others {
        let mut message = TcMessage::with_index(index.cast_signed());
        message.header.parent = TcHandle::CLSACT;
        message.header.handle = TcHandle { major: 0xffff, minor: 0 };
        match request(netlink, RouteNetlinkMessage::DelQueueDiscipline(message), 0).await {
            Err(error) if matches!(errno(&error), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => {}
            result => result?,
        }
        removed = true;
    }
    Ok(removed)
}

fn filter_message(index: u32, way: Way) -> TcMessage {
    let mut message = TcMessage::with_index(index.cast_signed());
    message.header.parent = way.parent();
    message.header.handle = TcHandle::from(FILTER);
    message.header.info = u32::from(PRIORITY) << 16 | ALL_PROTOCOLS;
    message
}

fn priority_of(message: &TcMessage) -> u16 {
    (message.header.info >> 16) as u16
}

/// The filters of an interface, with the names of those that are programs.
async fn filters(netlink: &Handle, index: u32, way: Way) -> Result<Vec<(TcMessage, String)>, Error> {
    let request = netlink.traffic_filter(index.cast_signed()).get();
    let request = match way {
        Way::Ingress => request.ingress(),
        Way::Egress => request.egress(),
    };
    let mut found = Vec::new();
    let mut messages = request.execute();
    while let Some(message) = messages.try_next().await? {
        let name = message.attributes.iter().find_map(|attribute| {
            let TcAttribute::Options(options) = attribute else { return None };
            // Of a kind that the library does not know, all options are in one attribute.
            let [TcOption::Other(all)] = options.as_slice() else { return None };
            let mut value = vec![0; all.value_len()];
            all.emit_value(&mut value);
            let name = NlasIterator::new(value.as_slice()).flatten().find(|nla| nla.kind() == TCA_BPF_NAME);
            name.map(|nla| String::from_utf8_lossy(nla.value()).trim_end_matches('\0').to_owned())
        });
        found.push((message, name.unwrap_or_default()));
    }
    Ok(found)
}

async fn request(netlink: &Handle, message: RouteNetlinkMessage, flags: u16) -> Result<(), Error> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    let mut replies = netlink.clone().request(message)?;
    while let Some(reply) = replies.next().await {
        if let NetlinkPayload::Error(error) = reply.payload
            && error.code.is_some()
        {
            return Err(Error::NetlinkError(error));
        }
    }
    Ok(())
}

/// The errno that a netlink request was answered with.
fn errno(error: &Error) -> Option<i32> {
    if let Error::NetlinkError(message) = error { message.code.map(|code| -code.get()) } else { None }
}
