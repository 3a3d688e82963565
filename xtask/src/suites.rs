//! The demo, the tests and the benchmarks: built as this user, run as root.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::{
    progress,
    run::{as_root, captured, cargo, check_space, read, root, shown, target_dir},
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

/// What a whole build of everything takes on disk, in MiB.
const SPACE: u64 = 3000;

/// What the privileged suite can be run on. The last one differs from nftables only in how that is chosen.
pub(crate) const BACKENDS: [&str; 4] = ["ebpf", "nftables", "both", "auto-without-bpf"];
/// What it is run on, in this order; `both` has a selection of its cases.
const ROUTINE: [&str; 3] = ["ebpf", "nftables", "both"];

/// Runs every test, or the privileged suite on one backend, or the cases of a name on all. The suite comes last, so
/// that its closing lines end the output.
pub(crate) fn test(backend: Option<&str>, filter: Option<&str>) -> Result<()> {
    build()?;
    if backend.is_none() && filter.is_none() {
        let unit = ["test", "--workspace", "--lib", "--bins"];
        progress::build(
            "build the unit tests (three minutes on two cores when nothing is built yet)",
            cargo().args(unit).arg("--no-run"),
        )?;
        shown(cargo().args(unit))?;
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
pub(crate) fn bench(options: &[String]) -> Result<()> {
    build()?;
    shown(
        as_root(&built("bench"))?
            .args(options)
            .env("ENFORCER_BIN", built("enforcer")),
    )
}

/// Builds the binary and all suites.
pub(crate) fn build() -> Result<()> {
    setup::run(false)?;
    room()?;
    fetch()?;
    progress::build(
        "build enforcer and its suites (six minutes on two cores when nothing is built yet)",
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

/// Fails where what is not yet built finds no room.
fn room() -> Result<()> {
    let target = target_dir();
    let used = read("du", &["-sm", &target.display().to_string()]);
    let used = used.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
    // There is a target directory at least from when this was built.
    let place = if target.exists() { &target } else { root() };
    check_space(place, SPACE.saturating_sub(used.unwrap_or(0)).max(SPACE / 10))
}

/// Fetches the crates, so that a network that fails is not taken for a build that does.
fn fetch() -> Result<()> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = captured(
        "fetch the crates that are not here yet",
        cargo().args(["fetch", "--locked", "--target", &target]),
    )?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "cargo cannot fetch the crates: {}; check the network or proxy, then run this again",
        said.lines().last().unwrap_or_default().trim()
    );
    Ok(())
}

fn built(name: &str) -> PathBuf {
    target_dir().join("release").join(name)
}
