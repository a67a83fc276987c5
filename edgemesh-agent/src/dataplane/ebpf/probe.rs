//! What this kernel offers to the eBPF data plane, found by doing it: load, attach in a scratch cgroup, take away again.
//! A version number says little, as distributions back-port features and leave others out of their builds.

mod attempt;

use std::{fmt, path::Path};

pub(super) use attempt::SCRATCH;
use serde::Serialize;

use super::{
    mounts,
    open::{OpenError, PROGRAMS},
};

/// Something the data plane makes use of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Feature {
    /// A cgroup2 hierarchy whose root can be seen.
    Cgroup2,
    /// The system call, and the permission to use it.
    Bpf,
    /// A cgroup of our own below the one that is served.
    ScratchCgroup,
    /// A program on a hook of a cgroup, attached by a link; named as our program there.
    SockAddr(&'static str),
    /// Another program in a link, in place.
    LinkUpdate,
    SkStorage,
    RingBuffer,
    LruHash,
    LpmTrie,
    /// The helper `bpf_set_retval` in a sock_addr program.
    SetRetval,
    /// The helper `bpf_get_netns_cookie` in a sock_addr program.
    NetnsCookie,
    /// Programs on packets, by links.
    Tcx,
    /// Programs on packets, by the qdisc `clsact`.
    Clsact,
    /// With maps of sockets, what gives the agent the traffic to aliases.
    SkLookup,
    SockMap,
}

/// What the lack of a [`Feature`] means.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Need {
    /// No eBPF data plane without it.
    Required,
    /// The data plane does without, at this cost to its users.
    Costs(&'static str),
    /// The data plane does without, and nobody notices.
    Free,
}

impl Feature {
    /// In the order they are looked for and shown.
    fn all() -> Vec<Self> {
        let hooks = PROGRAMS.iter().rev().map(|(name, _)| Self::SockAddr(name));
        let maps = [Self::SkStorage, Self::RingBuffer, Self::LruHash, Self::LpmTrie];
        let others = [Self::SetRetval, Self::NetnsCookie, Self::Tcx, Self::Clsact, Self::SkLookup, Self::SockMap];
        [Self::Cgroup2, Self::Bpf, Self::ScratchCgroup]
            .into_iter()
            .chain(hooks)
            .chain([Self::LinkUpdate])
            .chain(maps)
            .chain(others)
            .collect()
    }

    /// The kernel that brought it, as a hint: what counts is whether it works.
    pub fn since(self) -> &'static str {
        match self {
            Self::Cgroup2 | Self::ScratchCgroup => "Linux 4.5 with CONFIG_CGROUPS",
            Self::Bpf => "Linux 3.18 with CONFIG_BPF_SYSCALL",
            // Links came with 5.7, whatever the age of the hook.
            Self::SockAddr("getpeername4" | "getpeername6") => "Linux 5.8 with CONFIG_CGROUP_BPF",
            Self::SockAddr(_) | Self::LinkUpdate => "Linux 5.7 with CONFIG_CGROUP_BPF",
            Self::SkStorage => "Linux 5.2",
            Self::RingBuffer => "Linux 5.8",
            Self::LruHash => "Linux 4.10",
            Self::LpmTrie => "Linux 4.11",
            Self::SetRetval => "Linux 5.18",
            Self::NetnsCookie => "Linux 5.7",
            Self::Tcx => "Linux 6.6 with CONFIG_NET_XGRESS",
            Self::Clsact => "Linux 4.5 with CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF",
            Self::SkLookup => "Linux 5.9",
            Self::SockMap => "Linux 5.12, before with CONFIG_BPF_STREAM_PARSER",
        }
    }

    fn need(self) -> Need {
        match self {
            Self::Cgroup2
            | Self::Bpf
            | Self::SockAddr(_)
            | Self::LinkUpdate
            | Self::SkStorage
            | Self::RingBuffer
            | Self::LruHash
            | Self::NetnsCookie => Need::Required,
            Self::ScratchCgroup => {
                Need::Costs("attaching cannot be tried beforehand, and no canary proves translation")
            }
            Self::SetRetval => Need::Costs("a refused call fails with EPERM instead of ECONNREFUSED"),
            // Only where tcx is missing, too; see `Report::losses`.
            Self::Clsact => Need::Costs("Services are not translated for traffic from outside the node"),
            Self::Tcx | Self::LpmTrie | Self::SkLookup | Self::SockMap => Need::Free,
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Cgroup2 => "cgroup2",
            Self::Bpf => "bpf(2)",
            Self::ScratchCgroup => "scratch cgroup",
            Self::SockAddr(hook) => return write!(f, "cgroup/{hook}"),
            Self::LinkUpdate => "link update",
            Self::SkStorage => "socket storage",
            Self::RingBuffer => "ring buffer",
            Self::LruHash => "LRU hash",
            Self::LpmTrie => "LPM trie",
            Self::SetRetval => "bpf_set_retval",
            Self::NetnsCookie => "bpf_get_netns_cookie",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
            Self::SkLookup => "sk_lookup",
            Self::SockMap => "sockmap",
        };
        f.write_str(name)
    }
}

/// What came of looking for a [`Feature`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    Available,
    Missing {
        /// What was tried and what came of it.
        reason: String,
        /// It was refused for lack of permission, which says nothing of the kernel.
        permission: bool,
    },
}

/// One feature and what came of looking for it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Probe {
    pub feature: Feature,
    pub outcome: Outcome,
}

/// How much of the data plane a kernel carries.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Everything works as documented.
    Full,
    /// Everything required is there; see the losses.
    Reduced,
    /// Something required is missing.
    None,
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "eBPF, full",
            Self::Reduced => "eBPF, reduced",
            Self::None => "none",
        })
    }
}

/// A feature that is missing, and what it costs the user.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Loss {
    pub feature: String,
    pub cost: &'static str,
    pub reason: String,
    /// The kernel that brought the feature.
    pub since: &'static str,
}

/// The tier, and why it is not a higher one. Where there is none, the losses are what it would take.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Standing {
    pub tier: Tier,
    pub losses: Vec<Loss>,
}

/// What it costs to lack something required.
const NO_DATA_PLANE: &str = "no eBPF data plane";

/// `edgemesh-agent probe`: the tier and every feature.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Answer {
    #[serde(flatten)]
    pub standing: Standing,
    pub features: Vec<FeatureRow>,
}

/// One feature of an [`Answer`].
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct FeatureRow {
    pub feature: String,
    pub available: bool,
    /// Why it is not available.
    pub reason: Option<String>,
    /// The kernel that brought it.
    pub since: &'static str,
}

/// All probes of one run, in order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Report {
    pub probes: Vec<Probe>,
}

impl Report {
    /// The tier this kernel carries, and what keeps it from a higher one.
    pub fn standing(&self) -> Standing {
        let mut tier = Tier::Full;
        let mut losses = Vec::new();
        for Probe { feature, outcome } in &self.probes {
            let Outcome::Missing { reason, .. } = outcome else { continue };
            let cost = match feature.need() {
                Need::Required => {
                    tier = Tier::None;
                    NO_DATA_PLANE
                }
                // One of the two is enough.
                Need::Costs(_) if *feature == Feature::Clsact && self.has(Feature::Tcx) => continue,
                Need::Costs(cost) => {
                    tier = if tier == Tier::None { tier } else { Tier::Reduced };
                    cost
                }
                Need::Free => continue,
            };
            losses.push(Loss { feature: feature.to_string(), cost, reason: reason.clone(), since: feature.since() });
        }
        if tier == Tier::None {
            losses.retain(|loss| loss.cost == NO_DATA_PLANE);
        }
        Standing { tier, losses }
    }

    /// Everything, as the command `probe` prints it.
    pub fn answer(&self) -> Answer {
        let row = |probe: &Probe| FeatureRow {
            feature: probe.feature.to_string(),
            available: probe.outcome == Outcome::Available,
            reason: match &probe.outcome {
                Outcome::Available => None,
                Outcome::Missing { reason, .. } => Some(reason.clone()),
            },
            since: probe.feature.since(),
        };
        Answer { standing: self.standing(), features: self.probes.iter().map(row).collect() }
    }

    /// Whether anything was refused for lack of permission.
    pub fn lacks_permission(&self) -> bool {
        self.probes.iter().any(|probe| matches!(probe.outcome, Outcome::Missing { permission: true, .. }))
    }

    fn has(&self, wanted: Feature) -> bool {
        self.probes.iter().any(|probe| probe.feature == wanted && probe.outcome == Outcome::Available)
    }
}

/// Tries everything, which takes some milliseconds, and takes all of it away again.
///
/// `cgroup_root` is the configured cgroup; None finds it as the agent would. What is already served there is not
/// disturbed: programs are attached only in a cgroup of their own without processes, and to devices of a network
/// namespace that lasts as long as the probe.
pub fn run(cgroup_root: Option<&Path>) -> Report {
    let (cgroup, found) = match mounts::open_cgroup(cgroup_root) {
        Ok((_, path)) => (Some(path), Outcome::Available),
        Err(error) => (None, missing(&error)),
    };
    let mut attempts = attempt::Attempts::new(cgroup.as_deref());
    let probes = Feature::all().into_iter().map(|feature| {
        let outcome = if feature == Feature::Cgroup2 { found.clone() } else { attempts.outcome(feature) };
        Probe { feature, outcome }
    });
    Report { probes: probes.collect() }
}

fn missing(error: &OpenError) -> Outcome {
    Outcome::Missing { reason: error.to_string(), permission: error.is_permission() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(missing: &[Feature]) -> Report {
        let outcome = |feature| {
            if missing.contains(&feature) {
                Outcome::Missing { reason: "gone".to_owned(), permission: false }
            } else {
                Outcome::Available
            }
        };
        let probes = Feature::all().into_iter().map(|feature| Probe { feature, outcome: outcome(feature) });
        Report { probes: probes.collect() }
    }

    /// Has bpf(2) fail with `errno` for the calling thread and those it starts.
    fn forbid_bpf(errno: i32) {
        use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO};
        let step = |code: u32, k: u32, jf| libc::sock_filter { code: code as u16, jt: 0, jf, k };
        let mut filter = [
            step(BPF_LD | BPF_W | BPF_ABS, 0, 0),
            step(BPF_JMP | BPF_JEQ | BPF_K, libc::SYS_bpf as u32, 1),
            step(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | errno as u32, 0),
            step(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0),
        ];
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: `program` and what it points to outlive the call, which copies them.
        let result = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
        };
        assert_eq!(result, 0);
    }

    #[test]
    fn a_seccomp_filter_is_not_taken_for_an_old_kernel() {
        let whole = crate::dataplane::ebpf::open::missing_capabilities().is_empty();
        for (errno, permission) in [(libc::EPERM, true), (libc::ENOSYS, false)] {
            let probes = std::thread::spawn(move || {
                forbid_bpf(errno);
                run(None).probes
            });
            for Probe { feature, outcome } in probes.join().unwrap() {
                if matches!(feature, Feature::Cgroup2 | Feature::ScratchCgroup) {
                    continue;
                }
                let Outcome::Missing { reason, permission: refused } = outcome else { panic!("{feature} was found") };
                assert!(!reason.contains("does not know it"), "{feature}: {reason}");
                // As anybody but root, it is permission that is missing first.
                assert!(!whole || (refused == permission && reason.contains("seccomp")), "{feature}: {reason}");
            }
        }
    }

    #[test]
    fn every_hook_the_agent_attaches_to_is_looked_for() {
        let all = Feature::all();
        assert!(PROGRAMS.iter().all(|(name, _)| all.contains(&Feature::SockAddr(name))));
    }

    #[test]
    fn the_tier_follows_from_what_is_missing_and_each_loss_has_its_cost() {
        let names = |standing: &Standing| standing.losses.iter().map(|loss| loss.feature.clone()).collect::<Vec<_>>();
        let cases: [(&[Feature], Tier, &[&str]); 7] = [
            (&[], Tier::Full, &[]),
            (&[Feature::SkLookup], Tier::Full, &[]),
            // Either is enough.
            (&[Feature::Tcx], Tier::Full, &[]),
            (&[Feature::Clsact], Tier::Full, &[]),
            (&[Feature::Tcx, Feature::Clsact], Tier::Reduced, &["clsact"]),
            (&[Feature::SetRetval], Tier::Reduced, &["bpf_set_retval"]),
            (&[Feature::SockAddr("getpeername6"), Feature::SetRetval], Tier::None, &["cgroup/getpeername6"]),
        ];
        for (missing, tier, losses) in cases {
            let standing = report(missing).standing();
            assert_eq!((standing.tier, names(&standing)), (tier, losses.iter().map(|l| (*l).to_owned()).collect()));
        }
    }
}
