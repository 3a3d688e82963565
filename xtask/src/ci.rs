//! What CI checks before the tests: format, lints with warnings denied, that the client library needs nothing but Rust, and that setup
//! installs every program that the sources run.

use anyhow::Result;

use crate::{
    progress::build,
    run::{cargo, shown},
    setup, stock,
};

/// Checks all that.
pub(crate) fn run() -> Result<()> {
    setup::run(false)?;
    setup::lints()?;
    shown(cargo().args(["fmt", "--all", "--check"]))?;
    build(
        "ci: check lints (a few minutes when nothing is built yet)",
        cargo().args(["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]),
    )?;
    stock::run()?;
    let programs = ["test", "--package", "xtask", "--lib"];
    build(
        "ci: build what finds the programs",
        cargo().args(programs).arg("--no-run"),
    )?;
    shown(cargo().args(programs).args(["--quiet", "--", "programs::"]))
}
