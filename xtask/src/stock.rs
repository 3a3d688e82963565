//! Checks that the client library builds with a stock toolchain, with tokio and without (B3): no BPF, no C library, no
//! build script of its own. What it is made of is read from cargo.

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use crate::{
    progress::build,
    run::{cargo, shown, text},
};

/// The crate.
const CLIENT: &str = "enforcer-client";
/// Crates that build or find what is not Rust, or that are ours for it.
const FOREIGN: [&str; 9] = [
    "aya",
    "bindgen",
    "bpf-linker",
    "cc",
    "cmake",
    "mnl",
    "nftnl",
    "pkg-config",
    "vcpkg",
];

/// `cargo metadata`.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    /// The native library that its build script links or builds.
    links: Option<String>,
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
}

/// Checks what it is made of, then builds and tests it both ways.
pub(crate) fn run() -> Result<()> {
    let metadata = printed(&["metadata", "--locked", "--format-version", "1"])?;
    let metadata: Metadata = serde_json::from_str(&metadata).context("cargo metadata is not understood")?;
    let faults_of = |package| -> Result<Vec<String>> {
        let edges = ["--edges", "normal,build", "--prefix", "none", "--format", "{p}"];
        let tree = [&["tree", "--locked", "--package", package][..], &edges].concat();
        Ok(faults(&printed(&tree)?, &metadata))
    };
    // The daemon needs all that: where none of it is seen there, nothing is seen.
    ensure!(
        !faults_of("enforcer")?.is_empty(),
        "what a crate is made of is not seen"
    );
    let faults = faults_of(CLIENT)?;
    ensure!(
        faults.is_empty(),
        "{CLIENT} no longer builds with a stock toolchain: {}",
        faults.join("; ")
    );
    for features in [&[][..], &["--no-default-features"]] {
        let test = [&["test", "--package", CLIENT][..], features].concat();
        build("ci: build the client library", cargo().args(&test).arg("--no-run"))?;
        shown(cargo().args(&test).arg("--quiet"))?;
    }
    Ok(())
}

/// What of a crate's tree, a line each, needs more than Rust.
fn faults(tree: &str, metadata: &Metadata) -> Vec<String> {
    let mut faults = Vec::new();
    for line in tree.lines() {
        let mut words = line.split(' ');
        let name = words.next().unwrap_or_default();
        let version = words.next().and_then(|version| version.strip_prefix('v'));
        let mut packages = metadata.packages.iter();
        let Some(package) = packages.find(|package| package.name == name && Some(&*package.version) == version) else {
            faults.push(format!("cargo metadata does not list {line}"));
            continue;
        };
        if let Some(library) = &package.links {
            faults.push(format!("{name} links {library}"));
        }
        let is_foreign = |foreign: &str| {
            name.strip_prefix(foreign)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        if FOREIGN.into_iter().any(is_foreign) {
            faults.push(format!("{name} is for BPF or C"));
        }
        let has_script = package.targets.iter().any(|target| target.kind == ["custom-build"]);
        if name == CLIENT && has_script {
            faults.push(format!("{name} has a build script"));
        }
    }
    faults
}

/// What a cargo command prints.
fn printed(arguments: &[&str]) -> Result<String> {
    let mut command = cargo();
    command.args(arguments);
    let output = command.output().with_context(|| format!("run {}", text(&command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed: {}", text(&command), said.trim());
    }
    Ok(String::from_utf8(output.stdout)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b3_what_needs_more_than_rust_is_found() -> Result<()> {
        let package = |name: &str, links: &str, kind: &str| {
            format!(r#"{{"name":"{name}","version":"1.0.0","links":{links},"targets":[{{"kind":["{kind}"]}}]}}"#)
        };
        let packages = [
            package("aya-build", "null", "lib"),
            package("cc", "null", "lib"),
            package("ccc", "null", "lib"),
            package("enforcer-client", "null", "custom-build"),
            package("libc", "null", "custom-build"),
            package("some-sys", "\"some\"", "lib"),
        ];
        let metadata = serde_json::from_str(&format!(r#"{{"packages":[{}]}}"#, packages.join(",")))?;
        let of = |tree| faults(tree, &metadata).join("; ");
        assert_eq!(of("libc v1.0.0\nccc v1.0.0 (*)\nlibc v1.0.0 (*)"), "");
        assert_eq!(
            of("aya-build v1.0.0\ncc v1.0.0"),
            "aya-build is for BPF or C; cc is for BPF or C"
        );
        assert_eq!(
            of("enforcer-client v1.0.0 (/a b)"),
            "enforcer-client has a build script"
        );
        assert_eq!(of("some-sys v1.0.0"), "some-sys links some");
        assert_eq!(of("libc v2.0.0"), "cargo metadata does not list libc v2.0.0");
        Ok(())
    }
}
