//! The demo: the Services of `manifests/examples` in labs, with real agents and real clients.

mod check;
mod example;
mod lan;
mod scene;
mod sites;
mod table;

use std::io::Read as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use example::Examples;
use scene::Scene;
use table::Table;

/// Raises labs with real agents, and shows that pods reach Services through them: on one LAN, and across sites.
#[derive(Debug, Parser)]
#[command(name = "edgemesh-demo", version)]
struct Arguments {
    /// Leaves the labs up until Enter or Ctrl-C, and prints how to look around.
    #[arg(long)]
    keep: bool,
    /// Where the Services and EndpointSlices are, with those of the sites in the directory `sites`.
    #[arg(long, value_name = "DIR", default_value = "manifests/examples")]
    manifests: PathBuf,
}

/// A lab, and the table of what was tried in it.
struct Act {
    name: &'static str,
    about: &'static str,
    examples: Examples,
    show: fn(&Examples) -> Result<(Scene, Table)>,
    /// What the agent is asked by whoever looks around.
    commands: &'static [&'static str],
}

/// Runs the demo with the arguments of this process; fails if any row of its tables does.
pub fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say_to(&mut std::io::stderr(), &format!("edgemesh-demo: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Whether all rows passed.
fn run(arguments: &Arguments) -> Result<bool> {
    let acts = [
        Act {
            name: "One LAN",
            about: "nodes edge1 and edge2, each with pods and an agent of its own",
            examples: Examples::read(&arguments.manifests)?,
            show: lan::show,
            commands: &["status", "services"],
        },
        Act {
            name: "Sites",
            about: "edge1 and edge2, each behind a NAT of its own, and a cloud; pods have the same addresses everywhere",
            examples: Examples::read(&arguments.manifests.join("sites"))?,
            show: sites::show,
            commands: &["status", "peers"],
        },
    ];
    let (mut rows, mut failed, mut kept) = (0, 0, Vec::new());
    for act in &acts {
        say(&format!("{}: {} ...", act.name, act.about));
        let (scene, table) = (act.show)(&act.examples)?;
        say(&format!("{}\n", table.render()));
        rows += table.rows.len();
        failed += table.failed();
        if arguments.keep {
            kept.push((act, scene));
        } else {
            scene.close()?;
        }
    }
    say(&match failed {
        0 => format!("All {rows} rows passed."),
        _ => format!("{failed} of {rows} rows failed."),
    });
    if arguments.keep {
        stay(&kept)?;
    }
    for (_, scene) in kept {
        scene.close()?;
    }
    Ok(failed == 0)
}

/// Tells how to look around, and waits for Enter; Ctrl-C ends the process, and the labs with it.
fn stay(kept: &[(&Act, Scene)]) -> Result<()> {
    say("\nThe labs stay up. Look around from another terminal, as root:");
    for (act, scene) in kept {
        say(&format!("\n{}\n{}", act.name, scene.look_around(act.commands)?));
    }
    say("\nEnter or Ctrl-C ends the labs.");
    if matches!(std::io::stdin().read(&mut [0_u8]), Ok(0) | Err(_)) {
        // Nobody can press Enter where there is no terminal.
        loop {
            std::thread::park();
        }
    }
    Ok(())
}

fn say(text: &str) {
    say_to(&mut std::io::stdout(), text);
}

/// A closed terminal is no reason to leave before the labs are taken down.
fn say_to(out: &mut impl std::io::Write, text: &str) {
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}
