//! The demo, the tests and the benchmarks: built as this user, run as root.

use std::path::PathBuf;

use anyhow::Result;

use crate::{
    run::{as_root, cargo, quiet, shown, target_dir},
    setup,
};

/// Shows the main job.
pub(crate) fn demo(backend: &str) -> Result<()> {
    build()?;
    shown(
        as_root(&built("demo"))?
            .args(["--backend", backend])
            .env("ENFORCER_BIN", built("enforcer")),
    )
}

/// Runs every test. The privileged suite comes last, so that its closing lines end the output.
pub(crate) fn test(filter: Option<&str>) -> Result<()> {
    build()?;
    if filter.is_none() {
        shown(cargo().args(["test", "--workspace", "--lib", "--bins"]))?;
    }
    shown(
        as_root(&built("privileged"))?
            .args(filter)
            .env("ENFORCER_BIN", built("enforcer")),
    )
}

/// Measures.
pub(crate) fn bench() -> Result<()> {
    build()?;
    shown(as_root(&built("bench"))?.env("ENFORCER_BIN", built("enforcer")))
}

/// Builds the binary and all suites.
pub(crate) fn build() -> Result<()> {
    setup::run(false)?;
    let what = "build enforcer and its suites (two minutes when nothing is built yet)";
    quiet(
        what,
        cargo().args([
            "build",
            "--release",
            "--package",
            "enforcer",
            "--package",
            "tests",
            "--bins",
        ]),
    )
}

fn built(name: &str) -> PathBuf {
    target_dir().join("release").join(name)
}
