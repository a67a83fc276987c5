//! Records, made one by one as they are asked for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    index::Reverse,
    name::Name,
    published::{Endpoint, Headless, Published, Records},
    qtype,
};

/// All targets of a Service are equally good; the specification leaves both to the implementation.
const PRIORITY: u16 = 0;
const WEIGHT: u16 = 100;

/// The records that answer a question; never none. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Answers<'z> {
    set: Set<'z>,
}

/// Where records come from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Set<'z> {
    One(Data<'z>),
    /// The NS record and the addresses of the name.
    NameServer(Name<'z>, &'z [IpAddr]),
    /// Those of the type.
    Addresses(&'z [IpAddr], u16),
    /// Those of the type, each address once.
    Endpoints(&'z Headless, u16),
    /// Of endpoints that share a name.
    SameName(&'z [Endpoint]),
    /// SRV records of a port, or of all of them.
    Ports(&'z Published, Option<usize>),
    Reverse(&'z [Reverse]),
}

/// A resource record without class and TTL.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Record<'z> {
    pub owner: Owner<'z>,
    pub data: Data<'z>,
}

/// Whose record it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Owner<'z> {
    /// The name that was asked for.
    Question,
    Name(Name<'z>),
}

/// The type of a record and its data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Data<'z> {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    Srv {
        priority: u16,
        weight: u16,
        port: u16,
        target: Name<'z>,
    },
    Ptr(Name<'z>),
    /// The target is all in [`Name::rest`]. It may be of this zone, and then [`super::Zone::find`] knows more.
    Cname(Name<'z>),
    /// One character string, without its length.
    Txt(&'z [u8]),
    Soa(Soa<'z>),
    Ns(Name<'z>),
}

/// What the zone itself says in its SOA record; the times are the server's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Soa<'z> {
    pub name_server: Name<'z>,
    pub mailbox: Name<'z>,
    pub serial: u32,
}

impl<'z> Answers<'z> {
    /// None if there are no records.
    pub(super) fn of(set: Set<'z>) -> Option<Self> {
        let answers = Self { set };
        answers.answers().next().is_some().then_some(answers)
    }

    /// The answer section, each record once. Nothing is allocated.
    pub fn answers(&self) -> impl Iterator<Item = Record<'z>> + Clone + use<'z> {
        self.turned(0)
    }

    /// As [`Answers::answers`], beginning with another record each `turn`: whichever it is, to get there costs nothing.
    pub fn turned(&self, turn: usize) -> impl Iterator<Item = Record<'z>> + Clone + use<'z> {
        let places = self.set.places();
        Section { set: self.set, next: spread(turn, places), places, left: places }
    }

    /// What the additional section may hold: the addresses of the targets of SRV and NS records, each record once.
    /// Nothing is allocated.
    pub fn additionals(&self) -> impl Iterator<Item = Record<'z>> + Clone + use<'z> {
        let (owner, ips, targets) = match self.set {
            Set::NameServer(name, ips) => (Some(name), ips, None),
            Set::Ports(service, port) => match &service.records {
                Records::ClusterIps { ips, .. } => (Some(service.name()), &**ips, None),
                Records::Headless(headless) => (None, &[][..], Some((service, &**headless, port))),
                Records::Alias(_) | Records::Nothing => (None, &[][..], None),
            },
            Set::One(_) | Set::Addresses(..) | Set::Endpoints(..) | Set::SameName(..) | Set::Reverse(_) => {
                (None, &[][..], None)
            }
        };
        let of_name = owner.into_iter().flat_map(move |name| {
            ips.iter().map(move |&ip| Record { owner: Owner::Name(name), data: Data::of_ip(ip) })
        });
        let of_targets =
            targets.into_iter().flat_map(|(service, headless, port)| target_addresses(service, headless, port));
        of_name.chain(of_targets)
    }
}

impl Data<'_> {
    fn of_ip(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => Self::A(ip),
            IpAddr::V6(ip) => Self::Aaaa(ip),
        }
    }

    /// The record of an address, if it is of the type.
    pub(super) fn of_type(ip: IpAddr, wanted: u16) -> Option<Self> {
        let data = Self::of_ip(ip);
        (wanted == qtype::ANY || wanted == if ip.is_ipv4() { qtype::A } else { qtype::AAAA }).then_some(data)
    }
}

/// Walks over a set.
#[derive(Clone)]
struct Section<'z> {
    set: Set<'z>,
    next: usize,
    /// How many places the set has, and how many have not been looked at.
    places: usize,
    left: usize,
}

impl<'z> Iterator for Section<'z> {
    type Item = Record<'z>;

    fn next(&mut self) -> Option<Record<'z>> {
        while self.left > 0 {
            let data = self.set.get(self.next);
            self.next = if self.next + 1 < self.places { self.next + 1 } else { 0 };
            self.left -= 1;
            if let Some(data) = data {
                return Some(Record { owner: Owner::Question, data });
            }
        }
        None
    }
}

impl<'z> Set<'z> {
    /// How many records there may be. Places without one are between those of one Service's ClusterIPs and ports alone,
    /// of which there are few, and which lead to the same endpoints in any order.
    fn places(&self) -> usize {
        match *self {
            Self::One(_) | Self::NameServer(..) => 1,
            Self::Addresses(ips, _) => ips.len(),
            Self::Endpoints(headless, wanted) => headless.count(wanted),
            Self::SameName(list) => list.len(),
            Self::Ports(service, port) => match &service.records {
                Records::ClusterIps { .. } => service.entry.service.ports.len(),
                Records::Headless(headless) => headless.targets(port).len(),
                Records::Alias(_) | Records::Nothing => 0,
            },
            Self::Reverse(list) => list.len(),
        }
    }

    /// The record at a place, if there is one. No set is walked over for it.
    fn get(&self, place: usize) -> Option<Data<'z>> {
        match *self {
            Self::One(data) => Some(data),
            Self::NameServer(name, _) => Some(Data::Ns(name)),
            Self::Addresses(ips, wanted) => ips.get(place).and_then(|&ip| Data::of_type(ip, wanted)),
            Self::Endpoints(headless, wanted) => headless.address(wanted, place).map(Data::of_ip),
            Self::SameName(list) => list.get(place).map(|endpoint| Data::of_ip(endpoint.ip)),
            Self::Ports(service, port) => match &service.records {
                Records::ClusterIps { ips, .. } => cluster_port(service, ips, port, place),
                Records::Headless(headless) => headless_port(service, headless, port, place),
                Records::Alias(_) | Records::Nothing => None,
            },
            Self::Reverse(list) => list.get(place).and_then(|record| {
                let service = &*record.service;
                match (record.endpoint, &service.records) {
                    (Some(endpoint), Records::Headless(headless)) => {
                        Some(Data::Ptr(service.name_of(headless.endpoint(endpoint)?)))
                    }
                    _ => Some(Data::Ptr(service.name())),
                }
            }),
        }
    }
}

/// The place that a turn begins at. Turns go by multiples of the golden ratio and not one after the other: a name gets
/// only some of them, every second one where A and AAAA are asked for together, and all places should have their share
/// of these, too.
fn spread(turn: usize, places: usize) -> usize {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let part = (turn as u64).wrapping_mul(GOLDEN);
    ((u128::from(part) * places as u128) >> 64) as usize
}

fn srv(port: u16, target: Name<'_>) -> Data<'_> {
    Data::Srv { priority: PRIORITY, weight: WEIGHT, port, target }
}

/// The SRV record of the Service port at an index.
fn cluster_port<'z>(service: &'z Published, ips: &[IpAddr], only: Option<usize>, index: usize) -> Option<Data<'z>> {
    let ports = &service.entry.service.ports;
    let port = ports.get(index)?;
    let wanted = match only {
        Some(only) => only == index,
        // The same number may be there for TCP and for UDP.
        None => !ports.iter().take(index).any(|other| other.port == port.port),
    };
    let wanted = wanted && !ips.is_empty();
    wanted.then(|| srv(port.port.get(), service.name()))
}

/// The SRV record of the target at an index.
fn headless_port<'z>(
    service: &'z Published,
    headless: &'z Headless,
    only: Option<usize>,
    index: usize,
) -> Option<Data<'z>> {
    let target = headless.targets(only).get(index)?;
    Some(srv(target.number, service.name_of(headless.endpoint(target.endpoint)?)))
}

/// The addresses of all targets of a port, or of all ports.
fn target_addresses<'z>(
    service: &'z Published,
    headless: &'z Headless,
    only: Option<usize>,
) -> impl Iterator<Item = Record<'z>> + Clone {
    let mut last = None;
    let names =
        headless.targets(only).iter().filter(move |target| last.replace(target.endpoint) != Some(target.endpoint));
    names.flat_map(move |target| {
        headless.same_name(target.endpoint).iter().map(move |endpoint| Record {
            owner: Owner::Name(service.name_of(endpoint)),
            data: Data::of_ip(endpoint.ip),
        })
    })
}
