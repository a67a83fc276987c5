//! `cargo xtask test`: runs every check, in the order in which they are cheapest to fail.

mod plan;
mod totals;

use std::{
    env,
    process::{Command, ExitCode},
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nix::unistd::Uid;
use plan::{Plan, Step};
use totals::Totals;

use crate::{
    artifacts::{Artifacts, TestProgram},
    build_ebpf,
    console::{Console, seconds},
    kube,
    process::{self, Stdout},
    setup::{self, Toolchain},
    workspace::{self, Workspace},
};

const CLIPPY: &[&str] = &["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"];
/// A compilation from nothing on two cores takes five.
const CARGO_LIMIT: Duration = Duration::from_secs(60 * 60);
/// One program of unit tests.
const UNIT_LIMIT: Duration = Duration::from_secs(10 * 60);
/// One program of end-to-end tests.
const E2E_LIMIT: Duration = Duration::from_secs(20 * 60);

/// Runs every check: format, clippy, unit tests, end-to-end tests, docs
///
/// The steps are setup, fmt, build-ebpf, clippy, build, unit, e2e, kubernetes and doc; a failure does not stop the next. The last line says how many tests passed and failed; a failed step that runs no tests counts
/// as one. Exits non-zero after any failure.
///
/// The end-to-end tests need root: without it they are left out, which with CI=true is a failure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run one step with what it needs; any other name selects
    /// the tests whose names contain it.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
}

/// Runs the command.
///
/// # Errors
///
/// None of a step: those are counted and told.
pub(crate) fn run(args: &Args, workspace: &Workspace, console: &Console) -> anyhow::Result<ExitCode> {
    run_plan(&Plan::new(args.only.as_deref()), workspace, console)
}

/// Runs the end-to-end tests, or those whose names contain `filter`, with what they need.
///
/// # Errors
///
/// None of a step: those are counted and told.
pub(crate) fn end_to_end(filter: Option<&str>, workspace: &Workspace, console: &Console) -> anyhow::Result<ExitCode> {
    run_plan(&Plan::end_to_end(filter), workspace, console)
}

fn run_plan(plan: &Plan, workspace: &Workspace, console: &Console) -> anyhow::Result<ExitCode> {
    let mut run = Run {
        workspace,
        console,
        filter: plan.filter.as_deref(),
        root: Uid::effective().is_root(),
        ci: workspace::is_set("CI"),
        toolchain: None,
        ebpf_built: false,
        artifacts: None,
        totals: Totals::default(),
        failed: Vec::new(),
        skipped: Vec::new(),
    };
    for (index, step) in plan.steps.iter().enumerate() {
        run.step(&format!("[{}/{}] {}", index + 1, plan.steps.len(), step.name()), *step);
    }
    Ok(run.close())
}

/// The steps done so far and what they left for later ones.
struct Run<'a> {
    workspace: &'a Workspace,
    console: &'a Console,
    filter: Option<&'a str>,
    root: bool,
    ci: bool,
    toolchain: Option<Toolchain>,
    ebpf_built: bool,
    artifacts: Option<Rc<Artifacts>>,
    totals: Totals,
    failed: Vec<String>,
    skipped: Vec<String>,
}

/// How a step ended.
enum Outcome {
    /// With something to add, or nothing.
    Done(String),
    /// It could not be run here.
    Skipped(&'static str),
}

impl Run<'_> {
    fn step(&mut self, title: &str, step: Step) {
        self.console.begin(title);
        let started = Instant::now();
        let before = self.totals;
        let outcome = match step {
            Step::Setup => self.setup(),
            Step::Fmt => self.cargo(&["fmt", "--all", "--check"]),
            Step::BuildEbpf => self.build_ebpf(),
            Step::Clippy => self.cargo(CLIPPY),
            Step::Build => self.build(),
            Step::Unit => self.unit(),
            Step::E2e => self.e2e(),
            Step::Kubernetes => self.kubernetes(),
            Step::Doc => self.doc(),
        };
        let took = seconds(started.elapsed());
        match outcome {
            Ok(Outcome::Done(detail)) if self.totals.failed == before.failed => {
                self.console.end(&format!("ok ({took}){detail}"));
            }
            Ok(Outcome::Done(detail)) => {
                self.console.end(&format!("FAILED ({took}){detail}"));
                self.failed.push(step.name().to_owned());
            }
            Ok(Outcome::Skipped(why)) if self.ci => {
                self.console.end(&format!("FAILED: {why}, and with CI set nothing may be left out"));
                self.totals.failed += 1;
                self.failed.push(step.name().to_owned());
            }
            Ok(Outcome::Skipped(why)) => {
                self.console.end(&format!("SKIPPED: {why}"));
                self.skipped.push(format!("{} ({why})", step.name()));
            }
            Err(error) => {
                self.console.end(&format!("FAILED ({took}): {error:#}"));
                // A step that counted its failures itself is not counted twice.
                if self.totals.failed == before.failed {
                    self.totals.failed += 1;
                }
                self.failed.push(step.name().to_owned());
            }
        }
    }

    /// Says what has to be known at the end.
    fn close(mut self) -> ExitCode {
        if let Some(filter) = self.filter.filter(|_| self.totals.passed + self.totals.failed == 0) {
            self.failed.push(format!("no test's name contains {filter:?}"));
            self.totals.failed += 1;
        }
        self.console.line("");
        if self.totals.ignored > 0 {
            self.console.line(&format!("{} ignored", self.totals.ignored));
        }
        if !self.skipped.is_empty() {
            self.console.line(&format!("SKIPPED: {}", self.skipped.join(", ")));
        }
        if !self.failed.is_empty() {
            self.console.line(&format!("FAILED: {}", self.failed.join(", ")));
        }
        self.console.line(&format!("{} passed, {} failed", self.totals.passed, self.totals.failed));
        if self.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    fn setup(&mut self) -> anyhow::Result<Outcome> {
        self.toolchain = Some(setup::toolchain(self.workspace, self.console)?);
        if self.root {
            setup::lab_tools(self.console)?;
        }
        Ok(Outcome::Done(String::new()))
    }

    fn build_ebpf(&mut self) -> anyhow::Result<Outcome> {
        let toolchain = self.toolchain.as_ref().context("not run: setup found no toolchain")?;
        build_ebpf::build(toolchain, self.workspace, self.console)?;
        self.ebpf_built = true;
        Ok(Outcome::Done(String::new()))
    }

    fn build(&mut self) -> anyhow::Result<Outcome> {
        self.artifacts = Some(Rc::new(Artifacts::build(&["--bins", "--tests"], self.workspace, self.console)?));
        Ok(Outcome::Done(String::new()))
    }

    fn unit(&mut self) -> anyhow::Result<Outcome> {
        let artifacts = self.artifacts.clone().context("not run: the build failed")?;
        let before = self.totals;
        for test in artifacts.tests.iter().filter(|test| !is_e2e(test, self.workspace)) {
            self.run_tests(test, Command::new(&test.path), UNIT_LIMIT)?;
        }
        let mut doctests = self.workspace.cargo();
        doctests.args(["test", "--locked", "--doc", "--no-fail-fast", "--"]).args(self.filter);
        self.count("doctests", doctests, CARGO_LIMIT)?;
        Ok(Outcome::Done(self.totals.since(before)))
    }

    fn e2e(&mut self) -> anyhow::Result<Outcome> {
        if !self.root {
            return Ok(Outcome::Skipped("the end-to-end tests need root"));
        }
        // An object of an earlier run may still be there, and would be what is tested.
        anyhow::ensure!(self.ebpf_built, "not run: build-ebpf failed");
        let artifacts = self.artifacts.clone().context("not run: the build failed")?;
        let before = self.totals;
        for test in artifacts.tests.iter().filter(|test| is_e2e(test, self.workspace) && !needs_kubernetes(test)) {
            self.run_in_lab(test, &artifacts, |command| command)?;
        }
        Ok(Outcome::Done(self.totals.since(before)))
    }

    fn kubernetes(&mut self) -> anyhow::Result<Outcome> {
        if !self.root {
            return Ok(Outcome::Skipped("the end-to-end tests need root"));
        }
        anyhow::ensure!(self.ebpf_built, "not run: build-ebpf failed");
        let artifacts = self.artifacts.clone().context("not run: the build failed")?;
        let before = self.totals;
        for test in artifacts.tests.iter().filter(|test| needs_kubernetes(test)) {
            // Minutes of building are not for nothing.
            if self.filter.is_some_and(|filter| !has_test(test, filter)) {
                continue;
            }
            let directory = kube::find_or_build(self.workspace, self.console)?;
            self.run_in_lab(test, &artifacts, |command| command.env(kube::VARIABLE, &directory))?;
        }
        Ok(Outcome::Done(self.totals.since(before)))
    }

    fn run_in_lab(
        &mut self,
        test: &TestProgram,
        artifacts: &Artifacts,
        prepare: impl FnOnce(&mut Command) -> &mut Command,
    ) -> anyhow::Result<()> {
        let mut command = Command::new(&test.path);
        artifacts.equip(&mut command)?;
        // They measure times and share the machine's cgroup tree: one at a time, unless someone knows better.
        if env::var_os("RUST_TEST_THREADS").is_none() {
            command.env("RUST_TEST_THREADS", "1");
        }
        prepare(&mut command);
        self.run_tests(test, command, E2E_LIMIT)
    }

    fn doc(&self) -> anyhow::Result<Outcome> {
        let mut cargo = self.workspace.cargo();
        cargo.args(["doc", "--locked", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
        self.check(cargo, "cargo doc")
    }

    fn cargo(&self, arguments: &[&str]) -> anyhow::Result<Outcome> {
        let mut cargo = self.workspace.cargo();
        cargo.args(arguments);
        self.check(cargo, &format!("cargo {}", arguments.first().copied().unwrap_or_default()))
    }

    fn check(&self, command: Command, what: &str) -> anyhow::Result<Outcome> {
        process::run(self.console, command, CARGO_LIMIT, Stdout::Shown)?.check(self.console, what)?;
        Ok(Outcome::Done(String::new()))
    }

    /// Runs one compiled set of tests where and as cargo would.
    fn run_tests(&mut self, test: &TestProgram, mut command: Command, limit: Duration) -> anyhow::Result<()> {
        command.current_dir(&test.package).env("CARGO_MANIFEST_DIR", &test.package).args(self.filter);
        self.count(&test.name, command, limit)
    }

    /// Counts what a run of the test harness reports; one that breaks off is a failure more.
    fn count(&mut self, name: &str, command: Command, limit: Duration) -> anyhow::Result<()> {
        let ended = process::run(self.console, command, limit, Stdout::Shown)?;
        let mut totals = Totals::read(&ended.output);
        if !ended.success() {
            if totals.failed == 0 {
                totals.failed = 1;
            }
            if !ended.shown {
                self.console.raw(ended.output.as_bytes());
            }
            self.console.line(&format!("{name}: {}", ended.describe()));
        }
        self.totals.add(totals);
        Ok(())
    }
}

/// Whether a set of tests works in the lab, and so as root alone: all of the package `tests`.
fn is_e2e(test: &TestProgram, workspace: &Workspace) -> bool {
    test.package == workspace.root.join("tests")
}

/// Whether a set of tests is against a Kubernetes API server.
fn needs_kubernetes(test: &TestProgram) -> bool {
    test.name == "tests kubernetes"
}

/// Whether the name of a test contains `filter`. A program that cannot tell is run, and says why then.
fn has_test(test: &TestProgram, filter: &str) -> bool {
    let mut command = Command::new(&test.path);
    command.args(["--list", "--format", "terse", filter]);
    process::ask(command).map_or(true, |list| list.lines().any(|line| line.ends_with(": test")))
}
