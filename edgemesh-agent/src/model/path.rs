//! How an endpoint is reached from this node: locally, directly or through the tunnel, and why so.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use super::IpPrefix;

/// The ways to an endpoint.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// It is on this node, or not on any.
    Local,
    /// This node's own routes lead there.
    Direct,
    /// Only the tunnel does: connections go to its alias.
    Remote,
    /// None does.
    None,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Direct => "direct",
            Self::Remote => "remote",
            Self::None => "none",
        })
    }
}

/// How an endpoint is reached, as long as there is a tunnel to choose.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Path {
    pub reason: Reason,
    /// The address of this node that stands for the endpoint. Once given it stays while the endpoint is known, also
    /// when the way has become direct: clients may have it from DNS.
    pub alias: Option<IpAddr>,
}

/// Why an endpoint is reached the way it is.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Reason {
    /// Local.
    OwnNode,
    /// Local: an address that somebody wrote down, of which Kubernetes knows no node.
    NoNode,
    /// Direct: one of `directCIDRs`.
    DirectCidr(IpPrefix),
    /// Direct: a route with a gateway.
    Gateway(IpPrefix),
    /// Direct: a route into a device that is a tunnel of the cluster's network.
    TunnelDevice(IpPrefix),
    /// Direct: a host network on which the tunnel has met that node.
    Met,
    /// Remote: one of `neverDirectCIDRs`.
    NeverDirectCidr(IpPrefix),
    /// Remote: the host network of a node that the tunnel has not met there.
    NotMet,
    /// Remote: no route, or no more than a default route.
    NoRoute,
    /// Remote: the subnet of one of this node's links.
    OnLink(IpPrefix),
    /// Remote: a route that this node was told of by a router or by DHCP.
    Advertised(IpPrefix),
    /// Remote: a route that says there is nothing.
    Unreachable(IpPrefix),
    /// Remote: this node has the same address.
    OwnAddress,
    /// No way: the address is in the range of the aliases itself.
    InAliasRange,
}

impl Reason {
    /// The way that it is a reason for.
    pub fn way(self) -> Way {
        match self {
            Self::OwnNode | Self::NoNode => Way::Local,
            Self::DirectCidr(_) | Self::Gateway(_) | Self::TunnelDevice(_) | Self::Met => Way::Direct,
            Self::NeverDirectCidr(_)
            | Self::NotMet
            | Self::NoRoute
            | Self::OnLink(_)
            | Self::Advertised(_)
            | Self::Unreachable(_)
            | Self::OwnAddress => Way::Remote,
            Self::InAliasRange => Way::None,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OwnNode => f.write_str("on this node"),
            Self::NoNode => f.write_str("on no node of the cluster"),
            Self::DirectCidr(prefix) => write!(f, "in {prefix} of directCIDRs"),
            Self::Gateway(route) => write!(f, "the route {route} leads there by a gateway"),
            Self::TunnelDevice(route) => {
                write!(f, "the route {route} leads there by a tunnel of the cluster's network")
            }
            Self::Met => f.write_str("on the host network, where the tunnel has met its node"),
            Self::NeverDirectCidr(prefix) => write!(f, "in {prefix} of neverDirectCIDRs"),
            Self::NotMet => f.write_str("on the host network, where the tunnel has not met its node"),
            Self::NoRoute => f.write_str("no route leads there but the default"),
            Self::OnLink(route) => {
                write!(f, "the route {route} is a subnet of this node's own, not another node's pods")
            }
            Self::Advertised(route) => {
                write!(f, "the route {route} is from a router or DHCP, not from the cluster's network")
            }
            Self::Unreachable(route) => write!(f, "the route {route} leads nowhere"),
            Self::OwnAddress => f.write_str("this node has the same address itself"),
            Self::InAliasRange => f.write_str("its address is in the range of the aliases"),
        }
    }
}

impl Path {
    /// The way that connections take now.
    pub fn way(&self) -> Way {
        match self.reason.way() {
            Way::Remote if self.alias.is_none() => Way::None,
            way @ (Way::Local | Way::Direct | Way::Remote | Way::None) => way,
        }
    }

    /// Where this node connects to for the endpoint at `addr`; None where there is no way.
    pub fn target(&self, addr: SocketAddr) -> Option<SocketAddr> {
        match self.way() {
            Way::Local | Way::Direct => Some(addr),
            Way::Remote => self.alias.map(|alias| SocketAddr::new(alias, addr.port())),
            Way::None => None,
        }
    }
}

impl fmt::Display for Path {
    /// `remote as 198.18.3.7: no route leads there but the default`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.reason.way(), self.alias) {
            (Way::Remote, Some(alias)) => write!(f, "remote as {alias}: {}", self.reason),
            (Way::Remote, None) => write!(f, "unreachable, for lack of an alias: {}", self.reason),
            (way, _) => write!(f, "{way}: {}", self.reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_go_to_the_alias_of_what_is_remote_and_to_the_address_of_all_else() {
        let (addr, alias): (SocketAddr, IpAddr) = ("10.1.2.3:80".parse().unwrap(), "198.18.0.7".parse().unwrap());
        let target = |reason, alias| Path { reason, alias }.target(addr);
        assert_eq!(target(Reason::NoRoute, Some(alias)), Some("198.18.0.7:80".parse().unwrap()));
        assert_eq!(target(Reason::NoRoute, None), None, "not by the default route to somebody else's pod");
        assert_eq!(target(Reason::OwnNode, None), Some(addr));
        assert_eq!(target(Reason::Met, Some(alias)), Some(addr), "what was remote once");
        assert_eq!(target(Reason::InAliasRange, Some(alias)), None);
    }
}
