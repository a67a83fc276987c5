//! What has to be in the eBPF objects.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use aya_obj::{
    Object, ProgramSection,
    programs::CgroupSockAddrAttachType::{
        self, Connect4, Connect6, GetPeerName4, GetPeerName6, UDPRecvMsg4, UDPRecvMsg6, UDPSendMsg4, UDPSendMsg6,
    },
};
use object::{Architecture, Object as _, ObjectSection as _};

/// An object and all that the agent looks for in it.
#[derive(Debug)]
pub(crate) struct Expected {
    /// What cargo calls the binary.
    pub(crate) binary: &'static str,
    /// What the agent's build calls the file, without its extensions.
    pub(crate) name: &'static str,
    pub(crate) programs: &'static [(&'static str, CgroupSockAddrAttachType)],
    pub(crate) classifiers: &'static [&'static str],
    /// Programs that look sockets up.
    pub(crate) lookups: &'static [&'static str],
    pub(crate) maps: &'static [&'static str],
}

pub(crate) const OBJECTS: [Expected; 2] = [
    Expected {
        binary: "edgemesh-ebpf",
        name: "edgemesh",
        programs: PROGRAMS,
        classifiers: CLASSIFIERS,
        lookups: &[],
        maps: MAPS,
    },
    Expected {
        binary: "edgemesh-aliases",
        name: "edgemesh-aliases",
        programs: &[],
        classifiers: &[],
        lookups: &["aliases"],
        maps: &["ALIAS_SOCKETS"],
    },
];

/// Each program with the hook its section names.
const PROGRAMS: &[(&str, CgroupSockAddrAttachType)] = &[
    ("connect4", Connect4),
    ("connect6", Connect6),
    ("sendmsg4", UDPSendMsg4),
    ("sendmsg6", UDPSendMsg6),
    ("recvmsg4", UDPRecvMsg4),
    ("recvmsg6", UDPRecvMsg6),
    ("getpeername4", GetPeerName4),
    ("getpeername6", GetPeerName6),
];

/// The programs for packets, which find their hook when they are attached.
const CLASSIFIERS: &[&str] = &["uplink_ingress", "uplink_egress", "guest_ingress", "guest_egress"];

const MAPS: &[&str] = &[
    "FRONTENDS",
    "BACKENDS",
    "SERVICE_ADDRS",
    "RINGS",
    "MEMBERS",
    "COUNTERS",
    "AFFINITY",
    "SETTINGS",
    "EVENTS",
    "NAT",
    "FRAGMENTS",
    "INTERFACES",
    "SOURCE_RANGES",
    "TC_DROPS",
    "TC_SCRATCH",
    "CONNECTED",
    "DATAGRAMS",
    "UDP_SOCKETS",
];

/// What `license_is_gpl_compatible` of the kernel accepts (include/linux/license.h).
const LICENCES: [&str; 6] =
    ["GPL", "GPL v2", "GPL and additional rights", "Dual BSD/GPL", "Dual MIT/GPL", "Dual MPL/GPL"];

/// What an object holds, as far as it is checked.
#[derive(Debug)]
pub(crate) struct Contents {
    /// Each program with its hook; no hook for another kind of program.
    programs: BTreeMap<String, Option<CgroupSockAddrAttachType>>,
    classifiers: BTreeSet<String>,
    lookups: BTreeSet<String>,
    maps: BTreeSet<String>,
    btf: bool,
    licence: Option<String>,
}

impl Contents {
    /// Reads an object as the agent's loader does.
    ///
    /// # Errors
    ///
    /// When it is no eBPF object.
    pub(crate) fn read(elf: &[u8]) -> anyhow::Result<Self> {
        let file = object::File::parse(elf).context("not an ELF file")?;
        anyhow::ensure!(
            file.architecture() == Architecture::Bpf,
            "an ELF file for {:?}, not eBPF",
            file.architecture()
        );
        // The loader takes an absent licence for GPL; other tools do not.
        let licence = match file.section_by_name("license") {
            Some(section) => Some(section.data().context("read the licence")?),
            None => None,
        };
        let loaded = Object::parse(elf).context("the loader cannot read it")?;
        let hook = |section: &ProgramSection| {
            if let ProgramSection::CgroupSockAddr { attach_type } = section { Some(*attach_type) } else { None }
        };
        let named = |is: &dyn Fn(&ProgramSection) -> bool| {
            let found = loaded.programs.iter().filter(|(_, program)| is(&program.section));
            found.map(|(name, _)| name.clone()).collect()
        };
        Ok(Self {
            classifiers: named(&|section| matches!(section, ProgramSection::SchedClassifier)),
            lookups: named(&|section| matches!(section, ProgramSection::SkLookup)),
            programs: loaded.programs.iter().map(|(name, program)| (name.clone(), hook(&program.section))).collect(),
            maps: loaded.maps.keys().cloned().collect(),
            btf: loaded.btf.is_some() && loaded.btf_ext.is_some(),
            licence: licence.map(|text| String::from_utf8_lossy(text).trim_end_matches('\0').to_owned()),
        })
    }

    /// What is not as it has to be, a line each.
    pub(crate) fn problems(&self, expected: &Expected) -> Vec<String> {
        let mut problems = Vec::new();
        for (name, hook) in expected.programs {
            match self.programs.get(*name) {
                None => problems.push(format!("program {name} is missing")),
                // The type has no equality of its own.
                Some(found) if format!("{found:?}") != format!("{:?}", Some(hook)) => {
                    problems.push(format!("program {name} is for the hook {found:?}, not {hook:?}"));
                }
                Some(_) => {}
            }
        }
        for (kind, wanted, found) in [
            ("classifier", expected.classifiers, &self.classifiers),
            ("socket lookup", expected.lookups, &self.lookups),
            ("map", expected.maps, &self.maps),
        ] {
            problems.extend(super::missing(wanted, found).iter().map(|name| format!("{kind} {name} is missing")));
        }
        if !self.btf {
            problems.push("no BTF (.BTF and .BTF.ext): is the linker called with --btf?".to_owned());
        }
        match &self.licence {
            None => problems.push("no licence section: the kernel gives GPL-only helpers to nobody else".to_owned()),
            Some(licence) if !LICENCES.contains(&licence.as_str()) => {
                problems.push(format!("licence {licence:?} is not one the kernel takes for GPL-compatible"));
            }
            Some(_) => {}
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete() -> Contents {
        Contents {
            programs: PROGRAMS.iter().map(|(name, hook)| ((*name).to_owned(), Some(*hook))).collect(),
            classifiers: CLASSIFIERS.iter().map(|name| (*name).to_owned()).collect(),
            lookups: BTreeSet::new(),
            maps: MAPS.iter().map(|map| (*map).to_owned()).collect(),
            btf: true,
            licence: Some("Dual MIT/GPL".to_owned()),
        }
    }

    #[test]
    fn a_complete_object_has_no_problems_and_more_does_not_hurt() {
        let mut contents = complete();
        contents.programs.insert("later".to_owned(), None);
        contents.maps.insert(".rodata".to_owned());
        assert_eq!(contents.problems(&OBJECTS[0]), Vec::<String>::new());
    }

    #[test]
    fn each_thing_missing_is_named() {
        let mut contents = complete();
        contents.programs.remove("sendmsg6");
        contents.programs.insert("connect4".to_owned(), Some(Connect6));
        contents.programs.insert("recvmsg4".to_owned(), None);
        contents.maps.remove("COUNTERS");
        contents.classifiers.remove("guest_egress");
        contents.btf = false;
        contents.licence = Some("Apache-2.0".to_owned());
        let problems = contents.problems(&OBJECTS[0]);
        assert_eq!(problems.len(), 7, "{problems:#?}");
        for part in [
            "sendmsg6 is missing",
            "connect4 is for",
            "recvmsg4 is for",
            "guest_egress is missing",
            "COUNTERS",
            "BTF",
            "Apache-2.0",
        ] {
            assert!(problems.iter().any(|problem| problem.contains(part)), "{part} in {problems:#?}");
        }
        assert_eq!(
            complete().problems(&OBJECTS[1]),
            ["socket lookup aliases is missing", "map ALIAS_SOCKETS is missing"]
        );
        contents.licence = None;
        assert!(contents.problems(&OBJECTS[0]).iter().any(|problem| problem.starts_with("no licence section")));
    }

    #[test]
    fn what_is_no_ebpf_object_is_refused() {
        assert!(Contents::read(b"").is_err());
        let this_test = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let error = Contents::read(&this_test).unwrap_err().to_string();
        assert!(error.ends_with("not eBPF"), "{error}");
    }
}
