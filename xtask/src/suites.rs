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

/// What the privileged suite can be run on. The last one differs from nftables only in how that is chosen.
pub(crate) const BACKENDS: [&str; 4] = ["ebpf", "nftables", "both", "auto-without-bpf"];
/// What it is run on, in this order; `both` has a selection of its cases.
const ROUTINE: [&str; 3] = ["ebpf", "nftables", "both"];

/// Runs every test, or the privileged suite on one backend, or the cases of a name on all. The suite comes last, so that its closing
/// lines end the output.
pub(crate) fn test(backend: Option<&str>, filter: Option<&str>) -> Result<()> {
    build()?;
    if backend.is_none() && filter.is_none() {
        shown(cargo().args(["test", "--workspace", "--lib", "--bins"]))?;
        shown(cargo().args(["test", "--workspace", "--doc"]))?;
    }
    for backend in backend.as_ref().map_or(&ROUTINE[..], std::slice::from_ref) {
        eprintln!("privileged suite, {backend}");
        shown(
            as_root(&built("privileged"))?
                .args(["--backend", backend])
                .args(filter)
                .env("ENFORCER_BIN", built("enforcer")),
        )?;
    }
    Ok(())
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
