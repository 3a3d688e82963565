//! Crates against `.cargo/deny.toml`: their licences, where they come from, and which are there twice. It is the file
//! of cargo-deny, which takes too long to build for what is asked of it here; a key that is not understood here is an
//! error.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use serde::Deserialize;
use spdx::{Expression, Licensee, ParseMode};

use super::{Complaint, Files};
use crate::run::{cargo, text};

/// The rules.
const FILE: &str = ".cargo/deny.toml";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Deny {
    graph: Graph,
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Graph {
    targets: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Bans {
    #[serde(rename = "multiple-versions")]
    _multiple_versions: Denied,
    skip: Vec<Skip>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Skip {
    /// `name@version`.
    #[serde(rename = "crate")]
    what: String,
    #[serde(rename = "reason")]
    _reason: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Sources {
    #[serde(rename = "unknown-registry")]
    _unknown_registry: Denied,
    #[serde(rename = "unknown-git")]
    _unknown_git: Denied,
    allow_registry: Vec<String>,
}

/// The one choice that is checked.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Denied {
    Deny,
}

/// What cargo says of all crates.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
}

/// Every crate that should not be there.
pub(super) fn check(files: &Files) -> Result<Vec<Complaint>> {
    let rules = files.get(FILE).with_context(|| format!("{FILE} is missing"))?;
    let deny: Deny = toml::from_str(rules).with_context(|| format!("read {FILE}"))?;
    let mut command = cargo();
    command.args(["metadata", "--format-version", "1", "--locked", "--quiet"]);
    for target in &deny.graph.targets {
        command.args(["--filter-platform", target]);
    }
    let output = command.output().with_context(|| format!("run {}", text(&command)))?;
    let metadata = String::from_utf8(output.stdout)?;
    faults(rules, &deny, &metadata).with_context(|| format!("read what {} prints", text(&command)))
}

fn faults(rules: &str, deny: &Deny, metadata: &str) -> Result<Vec<Complaint>> {
    let Metadata { packages, resolve } = serde_json::from_str(metadata)?;
    let built: BTreeSet<&str> = resolve.nodes.iter().map(|node| node.id.as_str()).collect();
    let packages: Vec<&Package> = packages
        .iter()
        .filter(|package| built.contains(package.id.as_str()))
        .collect();
    let mut complaints = Vec::new();
    let mut complain = |package: &Package, what: String, remedy: &str| {
        let what = format!("{} {} {what}", package.name, package.version);
        complaints.push(Complaint::new("Cargo.lock", 1, what, format!("{remedy} in {FILE}")));
    };
    let mut versions: BTreeMap<&str, Vec<&Package>> = BTreeMap::new();
    for package in &packages {
        let licence = package.license.as_deref().unwrap_or_default();
        if !may_use(licence, &deny.licenses.allow) {
            complain(
                package,
                format!("is under {licence:?}"),
                "use another crate, or allow that licence",
            );
        }
        if let Some(source) = &package.source
            && !deny
                .sources
                .allow_registry
                .iter()
                .any(|one| source.strip_prefix("registry+") == Some(one))
        {
            complain(
                package,
                format!("is from {source}"),
                "take it from crates.io, or allow that registry",
            );
        }
        let skipped = deny.bans.skip.iter().any(|skip| skip.is(package));
        if !skipped {
            versions.entry(&package.name).or_default().push(package);
        }
    }
    for several in versions.values().filter(|several| several.len() > 1) {
        for package in several.iter().skip(1) {
            complain(
                package,
                "is there beside another version".to_owned(),
                "use one version, or skip the older one with its reason",
            );
        }
    }
    for skip in deny
        .bans
        .skip
        .iter()
        .filter(|skip| !packages.iter().any(|package| skip.is(package)))
    {
        let line = rules
            .lines()
            .position(|line| line.contains(&format!("{:?}", skip.what)));
        let what = format!("{} is not there any more", skip.what);
        complaints.push(Complaint::new(
            FILE,
            line.map_or(1, |at| at + 1),
            what,
            "remove this line",
        ));
    }
    Ok(complaints)
}

impl Skip {
    fn is(&self, package: &Package) -> bool {
        self.what == format!("{}@{}", package.name, package.version)
    }
}

/// Whether a crate may be used by one of the licences that are allowed; old crates write `/` for OR.
fn may_use(licence: &str, allowed: &[String]) -> bool {
    let allowed: Vec<Licensee> = allowed.iter().filter_map(|one| Licensee::parse(one).ok()).collect();
    Expression::parse_mode(licence, ParseMode::LAX)
        .is_ok_and(|expression| expression.evaluate(|asked| allowed.iter().any(|one| one.satisfies(asked))))
}
