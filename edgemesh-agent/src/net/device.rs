//! The device (`edgemesh0`) that carries the node-local service address (169.254.96.16), as EdgeMesh's
//! `pkg/util/bridge.go` makes it.

use std::{fmt, io, net::IpAddr};

use futures::TryStreamExt;
use rtnetlink::{
    Error as NetlinkError, Handle, LinkBridge, LinkDummy, LinkUnspec, new_connection,
    packet_route::{
        address::{AddressAttribute, AddressHeaderFlags},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    },
};
use serde::Serialize;
use tracing::debug;

/// What carries the address, in the order they are tried.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    Dummy,
    /// A bridge without ports: for kernels without the dummy driver, and as EdgeMesh (Go) leaves it.
    Bridge,
    /// The address on `lo`: for kernels with neither driver.
    Loopback,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dummy => "dummy",
            Self::Bridge => "bridge",
            Self::Loopback => "loopback",
        })
    }
}

/// The device in place.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Device {
    /// Where the address is: the configured name, or `lo`.
    pub name: String,
    pub kind: DeviceKind,
    pub address: IpAddr,
}

/// Why there is no device, in one line.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("cannot speak to the kernel's routing socket: {0}")]
    Netlink(#[source] io::Error),
    #[error("cannot {attempt} '{name}': {error}{}", hint(.error))]
    Refused { attempt: &'static str, name: String, error: NetlinkError },
    #[error(
        "a network device '{name}' exists and is neither a dummy nor a bridge; remove it (ip link delete {name}) or choose another commonConfig.bridgeDeviceName"
    )]
    Foreign { name: String },
}

impl DeviceError {
    /// Whether it is permission that is missing.
    pub fn is_permission(&self) -> bool {
        matches!(self, Self::Refused { error, .. } if matches!(errno(error), Some(libc::EPERM | libc::EACCES)))
    }
}

fn hint(error: &NetlinkError) -> &'static str {
    match errno(error) {
        Some(libc::EPERM | libc::EACCES) => "; CAP_NET_ADMIN is needed",
        _ => "",
    }
}

/// Makes the device and gives it the address, unless they are there already.
///
/// # Errors
///
/// See [`DeviceError`].
pub async fn ensure_device(name: &str, address: IpAddr) -> Result<Device, DeviceError> {
    with_netlink(async |netlink| {
        let (link, kind) = match find(&netlink, name).await? {
            Some(link) => {
                let kind = kind_of(&link).ok_or_else(|| DeviceError::Foreign { name: name.to_owned() })?;
                if !link.header.flags.contains(LinkFlags::Up) {
                    let up = LinkUnspec::new_with_index(link.header.index).up().build();
                    netlink.link().set(up).execute().await.map_err(refused("bring up", name))?;
                }
                (link, kind)
            }
            None => make(&netlink, name).await?,
        };
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        let mut request = netlink.address().add(link.header.index, address, prefix);
        // The address is this node's own by construction; a bridge without ports would wait for ever to be sure.
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        match request.execute().await {
            Err(error) if errno(&error) != Some(libc::EEXIST) => {
                return Err(refused("give the service address to", name)(error));
            }
            Ok(()) | Err(_) => {}
        }
        let name = if kind == DeviceKind::Loopback { "lo" } else { name };
        Ok(Device { name: name.to_owned(), kind, address })
    })
    .await
}

/// Removes what [`ensure_device`] made: the device, or the address from `lo`. Says what was removed; nothing there is
/// no error, and a device of another kind is left alone.
///
/// # Errors
///
/// See [`DeviceError`].
pub async fn remove_device(name: &str, address: IpAddr) -> Result<Option<String>, DeviceError> {
    with_netlink(async |netlink| {
        if let Some(link) = find(&netlink, name).await? {
            if kind_of(&link).is_none() {
                return Ok(None);
            }
            netlink.link().del(link.header.index).execute().await.map_err(refused("remove", name))?;
            return Ok(Some(format!("device {name}")));
        }
        let Some(loopback) = find(&netlink, "lo").await? else { return Ok(None) };
        let mut addresses = netlink.address().get().set_link_index_filter(loopback.header.index).execute();
        while let Some(found) = addresses.try_next().await.map_err(refused("list the addresses of", "lo"))? {
            if found.attributes.contains(&AddressAttribute::Address(address)) {
                netlink
                    .address()
                    .del(found)
                    .execute()
                    .await
                    .map_err(refused("remove the service address from", "lo"))?;
                return Ok(Some(format!("address {address} on lo")));
            }
        }
        Ok(None)
    })
    .await
}

async fn make(netlink: &Handle, name: &str) -> Result<(LinkMessage, DeviceKind), DeviceError> {
    let requests =
        [(DeviceKind::Dummy, LinkDummy::new(name).up().build()), (DeviceKind::Bridge, LinkBridge::new(name).build())];
    for (kind, request) in requests {
        match netlink.link().add(request).execute().await {
            // EEXIST: made by somebody since we looked; what it is is looked at below.
            Ok(()) => {}
            Err(error) if errno(&error) == Some(libc::EEXIST) => {}
            Err(error) if errno(&error) == Some(libc::EOPNOTSUPP) => {
                debug!(%kind, "the kernel has no such kind of device");
                continue;
            }
            Err(error) => return Err(refused("make the device", name)(error)),
        }
        if let Some(link) = find(netlink, name).await? {
            let kind = kind_of(&link).ok_or_else(|| DeviceError::Foreign { name: name.to_owned() })?;
            return Ok((link, kind));
        }
    }
    match find(netlink, "lo").await? {
        Some(link) => Ok((link, DeviceKind::Loopback)),
        None => Err(refused("find", "lo")(NetlinkError::RequestFailed)),
    }
}

async fn find(netlink: &Handle, name: &str) -> Result<Option<LinkMessage>, DeviceError> {
    let mut links = netlink.link().get().match_name(name.to_owned()).execute();
    match links.try_next().await {
        Ok(link) => Ok(link),
        Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(refused("look for the device", name)(error)),
    }
}

fn kind_of(link: &LinkMessage) -> Option<DeviceKind> {
    link.attributes.iter().find_map(|attribute| {
        let LinkAttribute::LinkInfo(infos) = attribute else { return None };
        [(InfoKind::Dummy, DeviceKind::Dummy), (InfoKind::Bridge, DeviceKind::Bridge)]
            .into_iter()
            .find_map(|(info, kind)| infos.contains(&LinkInfo::Kind(info)).then_some(kind))
    })
}

fn errno(error: &NetlinkError) -> Option<i32> {
    if let NetlinkError::NetlinkError(message) = error { message.code.map(|code| -code.get()) } else { None }
}

fn refused(attempt: &'static str, name: &str) -> impl FnOnce(NetlinkError) -> DeviceError {
    let name = name.to_owned();
    move |error| DeviceError::Refused { attempt, name, error }
}

/// Runs `work` with a netlink connection that lives exactly as long.
async fn with_netlink<T>(work: impl AsyncFnOnce(Handle) -> Result<T, DeviceError>) -> Result<T, DeviceError> {
    let (connection, handle, _) = new_connection().map_err(DeviceError::Netlink)?;
    tokio::select! {
        biased;
        result = work(handle) => result,
        () = connection => Err(DeviceError::Netlink(io::Error::other("the connection closed"))),
    }
}
