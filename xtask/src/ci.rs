//! What CI checks before the tests: format and lints, warnings denied.

use anyhow::Result;

use crate::{
    run::{cargo, shown},
    setup,
};

/// Checks format and lints.
pub(crate) fn run() -> Result<()> {
    setup::run(false)?;
    shown(cargo().args(["fmt", "--all", "--check"]))?;
    shown(cargo().args(["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]))
}
