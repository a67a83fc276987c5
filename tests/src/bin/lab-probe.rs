//! The lab's hands inside pods and nodes; started by the lab, not by people.

use std::process::ExitCode;

fn main() -> ExitCode {
    edgemesh_tests::probe::main()
}
