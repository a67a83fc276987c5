//! What has to be in the eBPF object.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use aya_obj::{
    Object, ProgramSection,
    programs::CgroupSockAddrAttachType::{
        self, Connect4, Connect6, GetPeerName4, GetPeerName6, UDPRecvMsg4, UDPRecvMsg6, UDPSendMsg4, UDPSendMsg6,
    },
};
use object::{Architecture, Object as _, ObjectSection as _};

/// Each program with the hook its section names.
pub(crate) const PROGRAMS: &[(&str, CgroupSockAddrAttachType)] = &[
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
pub(crate) const CLASSIFIERS: &[&str] = &["uplink_ingress", "uplink_egress", "guest_ingress", "guest_egress"];

pub(crate) const MAPS: &[&str] = &[
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
        let classifiers = loaded.programs.iter().filter(|(_, p)| matches!(p.section, ProgramSection::SchedClassifier));
        Ok(Self {
            classifiers: classifiers.map(|(name, _)| name.clone()).collect(),
            programs: loaded.programs.iter().map(|(name, program)| (name.clone(), hook(&program.section))).collect(),
            maps: loaded.maps.keys().cloned().collect(),
            btf: loaded.btf.is_some() && loaded.btf_ext.is_some(),
            licence: licence.map(|text| String::from_utf8_lossy(text).trim_end_matches('\0').to_owned()),
        })
    }

    /// What is not as it has to be, a line each.
    pub(crate) fn problems(&self, programs: &[(&str, CgroupSockAddrAttachType)], maps: &[&str]) -> Vec<String> {
        let mut problems = Vec::new();
        for (name, hook) in programs {
            match self.programs.get(*name) {
                None => problems.push(format!("program {name} is missing")),
                // The type has no equality of its own.
                Some(found) if format!("{found:?}") != format!("{:?}", Some(hook)) => {
                    problems.push(format!("program {name} is for the hook {found:?}, not {hook:?}"));
                }
                Some(_) => {}
            }
        }
        let missing = super::missing(CLASSIFIERS, &self.classifiers);
        problems.extend(missing.iter().map(|name| format!("classifier {name} is missing")));
        problems.extend(super::missing(maps, &self.maps).iter().map(|map| format!("map {map} is missing")));
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
        assert_eq!(contents.problems(PROGRAMS, MAPS), Vec::<String>::new());
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
        let problems = contents.problems(PROGRAMS, MAPS);
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
        contents.licence = None;
        assert!(contents.problems(PROGRAMS, MAPS).iter().any(|problem| problem.starts_with("no licence section")));
    }

    #[test]
    fn what_is_no_ebpf_object_is_refused() {
        assert!(Contents::read(b"").is_err());
        let this_test = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let error = Contents::read(&this_test).unwrap_err().to_string();
        assert!(error.ends_with("not eBPF"), "{error}");
    }
}
