//! The routes that make the ranges of the aliases local to this node, all addresses of them, without giving any to a
//! device ("AnyIP").

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use rtnetlink::{
    Error as NetlinkError, Handle, RouteMessageBuilder, new_connection,
    packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
};
use tracing::debug;

use super::read;
use crate::model::IpPrefix;

/// Marks the routes as ours, for the next agent and for `cleanup`: the kernel keeps it and gives it no meaning
/// (rtnetlink(7), `rtm_protocol`); /etc/iproute2/rt_protos knows none of this number.
const OURS: u8 = 206;
const LOCAL_TABLE: u32 = 255;

/// Why a range cannot be made local, in one line.
#[derive(Debug, thiserror::Error)]
pub enum LocalRangeError {
    #[error("cannot speak to the kernel's routing socket: {0}")]
    Netlink(#[source] io::Error),
    #[error("cannot {attempt} {range}: {error}{}", hint(.error))]
    Refused { attempt: &'static str, range: IpPrefix, error: NetlinkError },
    #[error(
        "cannot make {range} local to this node: it already has a route to {other}, so somebody uses these addresses; choose another commonConfig.{key}"
    )]
    Taken { range: IpPrefix, other: IpPrefix, key: &'static str },
}

impl LocalRangeError {
    /// Whether it is permission that is missing.
    pub fn is_permission(&self) -> bool {
        matches!(self, Self::Refused { error, .. } if matches!(errno(error), Some(libc::EPERM | libc::EACCES)))
    }

    /// Whether this node has no such family.
    pub fn is_unsupported(&self) -> bool {
        let unsupported = [libc::EOPNOTSUPP, libc::EAFNOSUPPORT];
        matches!(self, Self::Refused { error, .. } if errno(error).is_some_and(|errno| unsupported.contains(&errno)))
    }
}

fn hint(error: &NetlinkError) -> &'static str {
    match errno(error) {
        Some(libc::EPERM | libc::EACCES) => "; CAP_NET_ADMIN is needed",
        Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT) => "; this family is switched off on this node",
        _ => "",
    }
}

/// Makes a range local, and no other of its family that an earlier agent had made so.
///
/// `source` is the address of this node that the node's own processes go to the range from. Without one the kernel takes
/// the alias itself, and an answer to it would be taken for traffic to the alias.
///
/// # Errors
///
/// See [`LocalRangeError`].
pub async fn ensure_local(range: IpPrefix, source: Option<IpAddr>) -> Result<(), LocalRangeError> {
    with_netlink(async |netlink| {
        let (mut others, mut taken) = (Vec::new(), None);
        let looked = read::each(&netlink, |route| {
            let Some(prefix) = read::prefix_of(route) else { return true };
            if is_ours(route) {
                if prefix != range && prefix.network().is_ipv4() == range.network().is_ipv4() {
                    others.push(route.clone());
                }
            } else if collides(range, prefix, read::has_gateway(route)) {
                taken.get_or_insert(prefix);
            }
            true
        });
        looked.await.map_err(refused("look for other routes to", range))?;
        if let Some(other) = taken {
            let key = if range.network().is_ipv4() { "aliasCIDR" } else { "aliasCIDRv6" };
            return Err(LocalRangeError::Taken { range, other, key });
        }
        let mut route = message(range, source);
        let mut added = netlink.route().add(route.clone()).replace().execute().await;
        if added.is_err() && source.is_some() {
            // The address may be gone with its device.
            debug!(%range, ?source, "the route is refused with a source address; trying without");
            route = message(range, None);
            added = netlink.route().add(route).replace().execute().await;
        }
        added.map_err(refused("make local", range))?;
        for other in others {
            let prefix = read::prefix_of(&other).unwrap_or(range);
            netlink.route().del(other).execute().await.map_err(refused("give up the local range", prefix))?;
        }
        Ok(())
    })
    .await
}

/// Removes all that [`ensure_local`] ever made, whatever the configuration says now. Returns what was removed.
///
/// # Errors
///
/// See [`LocalRangeError`].
pub async fn remove_local() -> Result<Vec<String>, LocalRangeError> {
    with_netlink(async |netlink| {
        let mut ours = Vec::new();
        let all = IpPrefix::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        let looked = read::each(&netlink, |route| {
            ours.extend(read::prefix_of(route).filter(|_| is_ours(route)).map(|prefix| (prefix, route.clone())));
            true
        });
        if let (Err(error), Some(all)) = (looked.await, all) {
            return Err(refused("look for the local ranges in", all)(error));
        }
        let mut removed = Vec::new();
        for (prefix, route) in ours {
            match netlink.route().del(route).execute().await {
                // Gone by itself meanwhile.
                Err(error) if errno(&error) == Some(libc::ESRCH) => continue,
                result => result.map_err(refused("remove the local range", prefix))?,
            }
            removed.push(format!("local route {prefix}"));
        }
        Ok(removed)
    })
    .await
}

/// Whether a route means that somebody else uses addresses of the range: one into it, or a link's own network around it.
/// A route around it to a gateway does not: 192.0.0.0/2 or fd00::/8 are where unknown addresses are sent.
fn collides(range: IpPrefix, route: IpPrefix, gateway: bool) -> bool {
    let around = route.length() < range.length();
    range.overlaps(&route) && !(around && (gateway || route.length() <= 1))
}

fn is_ours(route: &RouteMessage) -> bool {
    route.header.protocol == RouteProtocol::Other(OURS)
        && route.header.kind == RouteType::Local
        && u32::from(route.header.table) == LOCAL_TABLE
}

fn message(range: IpPrefix, source: Option<IpAddr>) -> RouteMessage {
    /// The loopback device is the first of every network namespace.
    const LOOPBACK: u32 = 1;
    let ours = RouteProtocol::Other(OURS);
    match range.network() {
        IpAddr::V4(network) => {
            let mut message = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(network, range.length())
                .table_id(LOCAL_TABLE)
                .kind(RouteType::Local)
                .scope(RouteScope::Host)
                .protocol(ours)
                .output_interface(LOOPBACK)
                .build();
            if let Some(IpAddr::V4(source)) = source {
                message.attributes.push(RouteAttribute::PrefSource(RouteAddress::Inet(source)));
            }
            message
        }
        IpAddr::V6(network) => {
            let mut message = RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(network, range.length())
                .table_id(LOCAL_TABLE)
                .kind(RouteType::Local)
                .protocol(ours)
                .output_interface(LOOPBACK)
                .build();
            if let Some(IpAddr::V6(source)) = source {
                message.attributes.push(RouteAttribute::PrefSource(RouteAddress::Inet6(source)));
            }
            message
        }
    }
}

fn errno(error: &NetlinkError) -> Option<i32> {
    if let NetlinkError::NetlinkError(message) = error { message.code.map(|code| -code.get()) } else { None }
}

fn refused(attempt: &'static str, range: IpPrefix) -> impl FnOnce(NetlinkError) -> LocalRangeError {
    move |error| LocalRangeError::Refused { attempt, range, error }
}

/// Runs `work` with a netlink connection that lives exactly as long.
async fn with_netlink<T>(work: impl AsyncFnOnce(Handle) -> Result<T, LocalRangeError>) -> Result<T, LocalRangeError> {
    let (connection, handle, _) = new_connection().map_err(LocalRangeError::Netlink)?;
    tokio::select! {
        biased;
        result = work(handle) => result,
        () = connection => Err(LocalRangeError::Netlink(io::Error::other("the connection closed"))),
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, thread};

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn ip(arguments: &str) -> String {
        let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn prefix(text: &str) -> IpPrefix {
        text.parse().unwrap()
    }

    #[test]
    fn a_range_collides_with_routes_into_it_and_with_networks_around_it_but_not_with_ways_out() {
        let range = prefix("198.18.0.0/16");
        for (route, gateway, expected) in [
            ("198.18.0.0/30", false, true),
            ("198.18.0.0/30", true, true),
            ("198.18.0.0/16", true, true),
            // As some VPN clients have it for the names they resolve themselves.
            ("198.18.0.0/15", false, true),
            ("192.0.0.0/2", true, false),
            ("0.0.0.0/0", false, false),
            ("128.0.0.0/1", false, false),
            ("198.19.0.0/16", false, false),
            ("10.0.0.0/8", false, false),
        ] {
            assert_eq!(collides(range, prefix(route), gateway), expected, "{route} {gateway}");
        }
    }

    #[test]
    fn a_range_is_local_as_a_whole_moves_with_the_configuration_and_is_taken_back() {
        if !nix::unistd::geteuid().is_root() {
            edgemesh_tests::lab::skip("making a range local").unwrap();
            return;
        }
        let inside = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            ip("address add 169.254.96.16/32 dev lo");
            ip("route add local 192.0.2.0/24 dev lo");
            let everything = || ip("route show table all") + &ip("-6 route show table all");
            let before = everything();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let source: IpAddr = "169.254.96.16".parse().unwrap();
            let [old, v4, v6] = ["198.19.0.0/16", "198.18.0.0/16", "fd00:a11a::/64"].map(prefix);
            runtime.block_on(async {
                ensure_local(old, Some(source)).await.unwrap();
                for _ in 0..2 {
                    ensure_local(v4, Some(source)).await.unwrap();
                    ensure_local(v6, None).await.unwrap();
                }
            });
            let shown = ip("route get 198.18.77.7");
            assert!(shown.contains("local 198.18.77.7 dev lo src 169.254.96.16"), "{shown}");
            let shown = ip("-6 route get fd00:a11a::77:7");
            assert!(shown.starts_with("local fd00:a11a::77:7 ") && shown.contains("dev lo"), "{shown}");
            assert!(!everything().contains("198.19."), "{}", everything());
            runtime.block_on(async {
                // Its address may go; the range is more important.
                ip("address del 169.254.96.16/32 dev lo");
                ensure_local(v4, Some(source)).await.unwrap();
                let error = ensure_local(prefix("192.0.0.0/16"), None).await.unwrap_err();
                let words = error.to_string();
                assert!(words.contains("192.0.2.0/24") && words.contains("aliasCIDR"), "{words}");
                ip("address add 169.254.96.16/32 dev lo");
                let removed = remove_local().await.unwrap();
                assert_eq!(removed, ["local route 198.18.0.0/16", "local route fd00:a11a::/64"]);
                assert!(remove_local().await.unwrap().is_empty());
            });
            assert_eq!(everything(), before, "and nothing else");
        };
        thread::spawn(inside).join().unwrap();
    }
}
