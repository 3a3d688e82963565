//! What CI checks before the tests: format, lints with warnings denied, that the client library needs nothing but Rust,
//! and what `tidy` checks.

use anyhow::Result;

use crate::{
    progress::build,
    run::{cargo, shown},
    setup, stock, tidy,
};

/// Checks all that.
pub(crate) fn run() -> Result<()> {
    setup::run(false)?;
    setup::lints()?;
    shown(cargo().args(["fmt", "--all", "--check"]))?;
    tidy::run()?;
    build(
        "ci: check lints (a few minutes when nothing is built yet)",
        cargo().args(["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]),
    )?;
    stock::run()
}
