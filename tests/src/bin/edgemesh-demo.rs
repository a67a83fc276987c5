//! Raises labs with real agents, and shows that pods reach Services through them, on one LAN and across sites.

use std::process::ExitCode;

fn main() -> ExitCode {
    edgemesh_tests::demo::main()
}
