//! Builds programs and tests with cargo and learns where each one is.
//!
//! Every build selects the workspace's default members, and says `--examples` (there are none) where it builds programs
//! alone: cargo then resolves the features of dependencies as it does for tests, so that tests and demo share one
//! compilation of each dependency instead of making two.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::Context as _;
use serde_json::Value;

use crate::{
    console::Console,
    process::{self, Stdout},
    workspace::Workspace,
};

pub(crate) const AGENT: &str = "edgemesh-agent";
pub(crate) const PROBE: &str = "lab-probe";

/// From nothing, release with its link-time optimisation, on two cores.
const LIMIT: Duration = Duration::from_secs(60 * 60);

/// What a build made.
#[derive(Debug, Default)]
pub(crate) struct Artifacts {
    /// Programs by name.
    programs: BTreeMap<String, PathBuf>,
    pub(crate) tests: Vec<TestProgram>,
}

/// A compiled set of tests.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct TestProgram {
    /// `edgemesh-agent`, `edgemesh-agent (bin)` or `edgemesh-tests/e2e`.
    pub(crate) name: String,
    /// The directory of its package, where it has to run.
    pub(crate) package: PathBuf,
    pub(crate) path: PathBuf,
}

impl Artifacts {
    /// Runs `cargo build` with `arguments` on the default members.
    ///
    /// # Errors
    ///
    /// When the build fails; its messages are on the terminal then.
    pub(crate) fn build(arguments: &[&str], workspace: &Workspace, console: &Console) -> anyhow::Result<Self> {
        let mut cargo = workspace.cargo();
        cargo.args(["build", "--locked", "--message-format=json-render-diagnostics"]).args(arguments);
        let ended = process::run(console, cargo, LIMIT, Stdout::Kept)?.check(console, "cargo build")?;
        Self::parse(&ended.stdout)
    }

    /// The program called `name`.
    ///
    /// # Errors
    ///
    /// When the build did not make it.
    pub(crate) fn program(&self, name: &str) -> anyhow::Result<&Path> {
        self.programs.get(name).map(PathBuf::as_path).with_context(|| format!("the build made no program {name}"))
    }

    /// Hands the lab what it runs, and makes the absence of eBPF a failure.
    ///
    /// # Errors
    ///
    /// When the build made no agent or no probe.
    pub(crate) fn equip(&self, command: &mut Command) -> anyhow::Result<()> {
        command
            .env("EDGEMESH_AGENT", self.program(AGENT)?)
            .env("EDGEMESH_LAB_PROBE", self.program(PROBE)?)
            .env("EDGEMESH_REQUIRE_BPF", "1");
        Ok(())
    }

    /// Reads cargo's messages, one JSON object a line.
    fn parse(messages: &str) -> anyhow::Result<Self> {
        let mut artifacts = Self::default();
        for line in messages.lines().filter(|line| line.starts_with('{')) {
            let message: Value = serde_json::from_str(line).context("parse a message of cargo")?;
            let text = |pointer: &str| message.pointer(pointer).and_then(Value::as_str);
            let (Some("compiler-artifact"), Some(path)) = (text("/reason"), text("/executable")) else { continue };
            let (Some(target), Some(kind), Some(manifest)) =
                (text("/target/name"), text("/target/kind/0"), text("/manifest_path"))
            else {
                anyhow::bail!("a message of cargo is not as documented: {line}");
            };
            let path = PathBuf::from(path);
            if message.pointer("/profile/test").and_then(Value::as_bool) == Some(true) {
                let package = Path::new(manifest).parent().map(Path::to_path_buf).unwrap_or_default();
                let name = match kind {
                    "bin" => format!("{target} (bin)"),
                    "test" => format!("{} {target}", package.file_name().unwrap_or_default().display()),
                    _ => target.to_owned(),
                };
                artifacts.tests.push(TestProgram { name, package, path });
            } else if kind == "bin" {
                artifacts.programs.insert(target.to_owned(), path);
            }
        }
        // Cargo reports in the order of compilation, which differs from run to run.
        artifacts.tests.sort_unstable_by(|a, b| (&a.package, &a.name).cmp(&(&b.package, &b.name)));
        Ok(artifacts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(package: &str, target: &str, kind: &str, test: bool, executable: Option<&str>) -> String {
        serde_json::json!({
            "reason": "compiler-artifact",
            "package_id": format!("path+file:///repo/{package}#0.1.0"),
            "manifest_path": format!("/repo/{package}/Cargo.toml"),
            "target": { "kind": [kind], "name": target },
            "profile": { "test": test },
            "executable": executable,
        })
        .to_string()
    }

    #[test]
    fn programs_and_tests_are_told_apart() {
        let messages = [
            message("edgemesh-agent", "edgemesh_agent", "lib", false, None),
            message("edgemesh-agent", "edgemesh-agent", "bin", false, Some("/t/debug/edgemesh-agent")),
            message("tests", "e2e", "test", true, Some("/t/debug/deps/e2e-1")),
            message("edgemesh-agent", "edgemesh_agent", "lib", true, Some("/t/debug/deps/edgemesh_agent-1")),
            message("edgemesh-agent", "edgemesh-agent", "bin", true, Some("/t/debug/deps/edgemesh_agent-2")),
            r#"{"reason":"build-finished","success":true}"#.to_owned(),
        ]
        .join("\n");
        let artifacts = Artifacts::parse(&messages).unwrap();
        assert_eq!(artifacts.program(AGENT).unwrap(), Path::new("/t/debug/edgemesh-agent"));
        let names: Vec<_> = artifacts.tests.iter().map(|test| test.name.as_str()).collect();
        assert_eq!(names, ["edgemesh-agent (bin)", "edgemesh_agent", "tests e2e"]);
        assert_eq!(artifacts.tests[2].package, Path::new("/repo/tests"));
    }

    #[test]
    fn a_program_that_was_not_built_is_named() {
        let error = Artifacts::parse("").unwrap().program("edgemesh-demo").unwrap_err();
        assert_eq!(error.to_string(), "the build made no program edgemesh-demo");
    }

    #[test]
    fn messages_that_are_not_json_are_an_error() {
        assert!(Artifacts::parse("{nonsense").is_err());
    }
}
