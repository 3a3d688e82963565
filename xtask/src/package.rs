//! The Debian package: built with all that belongs in it, installed into a scratch root and checked there.

mod check;
mod libraries;
mod scratch;

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    progress::build,
    run::{as_root, cargo, is_root, quiet, read, root, target_dir},
    setup::{
        self,
        packages::{self, Package},
    },
};

/// Release of cargo-deb that the metadata is written for.
const CARGO_DEB: &str = "3.8.0";
/// The profile of what is shipped.
const PROFILE: &str = "ship";

/// Builds the package, and unless told otherwise checks it as root.
pub(crate) fn run(build_only: bool) -> Result<()> {
    setup::run(false)?;
    tools(build_only)?;
    let libraries = libraries::ensure()?;
    build(
        "package: build enforcer (a few minutes when nothing is built yet)",
        cargo()
            .args(["build", "--profile", PROFILE, "--package", "enforcer", "--bins"])
            .env("LIBMNL_LIB_DIR", &libraries)
            .env("LIBNFTNL_LIB_DIR", &libraries),
    )?;
    // Only what it writes is shipped: the developer's everyday profile will do.
    build(
        "package: build what writes the man pages",
        cargo().args(["build", "--package", "enforcer", "--example", "pages"]),
    )?;
    let pages = target_dir().join("debug/examples/pages");
    // The metadata in enforcer/Cargo.toml names this directory.
    let generated = root().join("target/package");
    if generated.join("man").exists() {
        std::fs::remove_dir_all(generated.join("man")).context("remove the old man pages")?;
    }
    quiet(
        "package: write man pages, completions and the example configuration",
        Command::new(&pages).arg(&generated),
    )?;
    let package = assemble(1)?;
    let next = assemble(2)?;
    if !build_only {
        let this = env::current_exe().context("find this program")?;
        let mut check = as_root(&this)?;
        check.arg("package-check").args([&package, &next]);
        let status = check.status().context("run the checks")?;
        if !status.success() {
            bail!("{} does not stand its checks", package.display());
        }
    }
    eprintln!("package: {}", package.display());
    eprintln!("package: install it with: apt install {}", package.display());
    Ok(())
}

/// Where both revisions are, once built.
pub(crate) fn paths() -> Result<[PathBuf; 2]> {
    Ok([path(1)?, path(2)?])
}

fn path(revision: u32) -> Result<PathBuf> {
    // Not target/debian: cargo-deb empties it each time.
    let dir = if revision == 1 { "package" } else { "package/next" };
    let arch = read("dpkg", &["--print-architecture"]).context("dpkg --print-architecture failed")?;
    let name = format!("enforcer_{}-{revision}_{arch}.deb", env!("CARGO_PKG_VERSION"));
    Ok(target_dir().join(dir).join(name))
}

/// Checks a package, and the upgrade to its next revision. As root.
pub(crate) fn check(package: &Path, next: &Path) -> Result<()> {
    if !is_root() {
        bail!("package-check needs root: it installs into a scratch root; run cargo xtask package");
    }
    check::run(package, next)
}

/// What this task needs beyond the others.
fn tools(build_only: bool) -> Result<()> {
    let root: &[Package] = if build_only { &[] } else { packages::ROOT };
    setup::also(&[packages::PACKAGE, root])?;
    if read("cargo-deb", &["--version"]).is_none_or(|version| !version.ends_with(CARGO_DEB)) {
        quiet(
            &format!("package: build cargo-deb {CARGO_DEB} (a minute or two)"),
            cargo().args(["install", "cargo-deb", "--version", CARGO_DEB, "--locked", "--force"]),
        )?;
    }
    Ok(())
}

/// Makes `target/package/enforcer_VERSION-REVISION_ARCH.deb`. The second revision is there to be upgraded to.
fn assemble(revision: u32) -> Result<PathBuf> {
    let package = path(revision)?;
    let dir = package.parent().context("the package has no directory")?;
    std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    let mut deb = cargo();
    // Most paths of the metadata start at the manifest, but that of the description starts here.
    deb.current_dir(root().join("enforcer"));
    deb.args([
        "deb",
        "--quiet",
        "--no-build",
        "--package",
        "enforcer",
        "--profile",
        PROFILE,
    ]);
    deb.args(["--deb-revision", &revision.to_string(), "--output"])
        .arg(&package);
    if revision > 1 {
        deb.arg("--fast");
    }
    quiet(&format!("package: assemble revision {revision}"), &mut deb)?;
    Ok(package)
}
