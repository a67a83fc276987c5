//! Raises a two-node lab with real agents, and shows that pods reach Services through them.

use std::process::ExitCode;

fn main() -> ExitCode {
    edgemesh_tests::demo::main()
}
