//! Which steps to run.

/// A step of `cargo xtask test`, in the order of running.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Step {
    Setup,
    Fmt,
    BuildEbpf,
    Clippy,
    /// Compiles tests and programs.
    Build,
    Unit,
    E2e,
    /// End-to-end tests against a Kubernetes API server.
    Kubernetes,
    Doc,
}

const ALL: [Step; 9] = [
    Step::Setup,
    Step::Fmt,
    Step::BuildEbpf,
    Step::Clippy,
    Step::Build,
    Step::Unit,
    Step::E2e,
    Step::Kubernetes,
    Step::Doc,
];

impl Step {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Fmt => "fmt",
            Self::BuildEbpf => "build-ebpf",
            Self::Clippy => "clippy",
            Self::Build => "build",
            Self::Unit => "unit",
            Self::E2e => "e2e",
            Self::Kubernetes => "kubernetes",
            Self::Doc => "doc",
        }
    }

    /// The steps that have to run before this one. Unit tests do not: they run on a machine that cannot build eBPF.
    fn needs(self) -> &'static [Self] {
        match self {
            Self::Setup | Self::Fmt | Self::Clippy | Self::Build | Self::Doc => &[],
            Self::BuildEbpf => &[Self::Setup],
            Self::Unit => &[Self::Build],
            Self::E2e | Self::Kubernetes => &[Self::Setup, Self::BuildEbpf, Self::Build],
        }
    }
}

/// The steps to run and the tests to select in them.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    /// A part of the names of tests; all tests if absent.
    pub(crate) filter: Option<String>,
}

impl Plan {
    /// `only` is the name of a step, or a part of the names of tests.
    pub(crate) fn new(only: Option<&str>) -> Self {
        let Some(only) = only else { return Self { steps: ALL.to_vec(), filter: None } };
        match ALL.into_iter().find(|step| step.name() == only) {
            Some(step) => Self::of(&[step], None),
            None => Self::of(&[Step::Unit, Step::E2e, Step::Kubernetes], Some(only)),
        }
    }

    /// The end-to-end tests, or those whose names contain `filter`.
    pub(crate) fn end_to_end(filter: Option<&str>) -> Self {
        Self::of(&[Step::E2e, Step::Kubernetes], filter)
    }

    fn of(wanted: &[Step], filter: Option<&str>) -> Self {
        let steps = ALL.into_iter().filter(|step| wanted.iter().any(|w| w == step || w.needs().contains(step)));
        Self { steps: steps.collect(), filter: filter.map(str::to_owned) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_steps_run_in_order_without_a_choice() {
        let plan = Plan::new(None);
        assert_eq!(plan.steps, ALL);
        assert!(plan.steps.is_sorted());
        assert_eq!(plan.filter, None);
    }

    #[test]
    fn a_step_brings_what_it_needs_and_nothing_else() {
        assert_eq!(Plan::new(Some("fmt")).steps, [Step::Fmt]);
        assert_eq!(Plan::new(Some("build-ebpf")).steps, [Step::Setup, Step::BuildEbpf]);
        assert_eq!(Plan::new(Some("unit")).steps, [Step::Build, Step::Unit]);
        let e2e = Plan::new(Some("e2e"));
        assert_eq!(e2e.steps, [Step::Setup, Step::BuildEbpf, Step::Build, Step::E2e]);
        assert_eq!(e2e.filter, None);
    }

    #[test]
    fn needs_are_complete_so_that_one_look_finds_them_all() {
        for step in ALL {
            for need in step.needs() {
                assert!(need < &step, "{need:?} runs after {step:?}");
                assert!(need.needs().iter().all(|deeper| step.needs().contains(deeper)), "{step:?}");
            }
        }
    }

    #[test]
    fn any_other_name_selects_tests_in_both_kinds() {
        let plan = Plan::new(Some("getpeername"));
        let steps = [Step::Setup, Step::BuildEbpf, Step::Build, Step::Unit, Step::E2e, Step::Kubernetes];
        assert_eq!(plan.steps, steps);
        assert_eq!(plan.filter.as_deref(), Some("getpeername"));
    }

    #[test]
    fn end_to_end_tests_come_with_and_without_an_api_server() {
        let plan = Plan::end_to_end(None);
        assert_eq!(plan.steps, [Step::Setup, Step::BuildEbpf, Step::Build, Step::E2e, Step::Kubernetes]);
        assert_eq!(plan.filter, None);
        assert_eq!(Plan::end_to_end(Some("restart")).filter.as_deref(), Some("restart"));
    }
}
