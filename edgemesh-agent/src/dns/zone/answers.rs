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
    Endpoints(&'z [Endpoint], u16),
    /// Those of the type, of endpoints that share a name.
    SameName(&'z [Endpoint], u16),
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
        Section { set: self.set, next: 0 }
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
}

impl<'z> Iterator for Section<'z> {
    type Item = Record<'z>;

    fn next(&mut self) -> Option<Record<'z>> {
        loop {
            let index = self.next;
            let data = self.set.get(index)?;
            self.next += 1;
            if let Some(data) = data {
                return Some(Record { owner: Owner::Question, data });
            }
        }
    }
}

impl<'z> Set<'z> {
    /// What is at an index: None beyond the end, and Some(None) where there is nothing for the question.
    fn get(&self, index: usize) -> Option<Option<Data<'z>>> {
        match *self {
            Self::One(data) => (index == 0).then_some(Some(data)),
            Self::NameServer(name, _) => (index == 0).then_some(Some(Data::Ns(name))),
            Self::Addresses(ips, wanted) => ips.get(index).map(|&ip| Data::of_type(ip, wanted)),
            Self::Endpoints(list, wanted) => {
                list.get(index).map(|endpoint| Data::of_type(endpoint.ip, wanted).filter(|_| !endpoint.repeated))
            }
            Self::SameName(list, wanted) => list.get(index).map(|endpoint| Data::of_type(endpoint.ip, wanted)),
            Self::Ports(service, port) => match &service.records {
                Records::ClusterIps { ips, .. } => cluster_port(service, ips, port, index),
                Records::Headless(headless) => headless_port(service, headless, port, index),
                Records::Alias(_) | Records::Nothing => None,
            },
            Self::Reverse(list) => list.get(index).map(|record| {
                let service = &*record.service;
                match (record.endpoint, &service.records) {
                    (Some(endpoint), Records::Headless(headless)) => {
                        let endpoint = headless.endpoints.get(usize::try_from(endpoint).ok()?)?;
                        Some(Data::Ptr(service.name_of(endpoint)))
                    }
                    _ => Some(Data::Ptr(service.name())),
                }
            }),
        }
    }
}

fn srv(port: u16, target: Name<'_>) -> Data<'_> {
    Data::Srv { priority: PRIORITY, weight: WEIGHT, port, target }
}

/// The SRV record of the Service port at an index.
fn cluster_port<'z>(
    service: &'z Published,
    ips: &[IpAddr],
    only: Option<usize>,
    index: usize,
) -> Option<Option<Data<'z>>> {
    let ports = &service.entry.service.ports;
    let port = ports.get(index)?;
    let wanted = match only {
        Some(only) => only == index,
        // The same number may be there for TCP and for UDP.
        None => !ports.iter().take(index).any(|other| other.port == port.port),
    };
    let wanted = wanted && !ips.is_empty();
    Some(wanted.then(|| srv(port.port.get(), service.name())))
}

/// The SRV record of the target at an index.
fn headless_port<'z>(
    service: &'z Published,
    headless: &'z Headless,
    only: Option<usize>,
    index: usize,
) -> Option<Option<Data<'z>>> {
    let target = headless.targets.get(index)?;
    let before = index.checked_sub(1).and_then(|before| headless.targets.get(before));
    let wanted = match only {
        Some(only) => only == usize::from(target.port),
        None => before.is_none_or(|before| (before.endpoint, before.number) != (target.endpoint, target.number)),
    };
    let endpoint = headless.same_name(target.endpoint).first().filter(|_| wanted);
    Some(endpoint.map(|endpoint| srv(target.number, service.name_of(endpoint))))
}

/// The addresses of all targets of a port, or of all ports.
fn target_addresses<'z>(
    service: &'z Published,
    headless: &'z Headless,
    only: Option<usize>,
) -> impl Iterator<Item = Record<'z>> + Clone {
    let targets =
        headless.targets.iter().filter(move |target| only.is_none_or(|only| only == usize::from(target.port)));
    let mut last = None;
    // Those with one name follow each other.
    let names = targets.filter(move |target| last.replace(target.endpoint) != Some(target.endpoint));
    names.flat_map(move |target| {
        headless.same_name(target.endpoint).iter().map(move |endpoint| Record {
            owner: Owner::Name(service.name_of(endpoint)),
            data: Data::of_ip(endpoint.ip),
        })
    })
}
