//! Checks that setup installs every program that the sources run, or that the minimal system has it. What is run is
//! read from the sources themselves; the minimal system is what this host's package database marks as such.

mod rust;
mod shell;
mod text;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context as _, Result, ensure};

use self::rust::Found;
use super::{Complaint, Files, is_a, source::Source};
#[cfg(test)]
use crate::run::root;
use crate::{
    run::read,
    setup::packages::{BASE, COMPILER, DISK, GUEST, HOST, PACKAGE, PRISTINE, Package, ROOT, SCRATCH, VM},
};

/// Who may run what: the longest path that a file's begins with decides. All have the minimal system besides.
const SCOPES: [(&str, &[&[Package]]); 11] = [
    ("enforcer/", &[HOST]),
    ("enforcer/src/testing.rs", &[BASE]),
    ("tests/", &[BASE]),
    // Inside a virtual machine.
    ("tests/src/guest", &[BASE, VM, GUEST]),
    ("xtask/", &[BASE, ROOT, PRISTINE, COMPILER]),
    ("xtask/src/package", &[BASE, ROOT, PACKAGE]),
    ("xtask/src/package/check.rs", &[BASE, ROOT, PACKAGE, SCRATCH]),
    ("xtask/src/package/life.sh", &[SCRATCH]),
    ("xtask/src/vm", &[BASE, ROOT, VM, DISK]),
    ("xtask/src/vm/system/", &[GUEST]),
    ("xtask/src/pristine/", &[PRISTINE]),
];
/// What a new user has from rustup and, if not root, from sudo; what is built by cargo.
const TOOLCHAIN: [&str; 10] = [
    "bpf-linker",
    "cargo",
    "cargo-deb",
    "enforcer",
    "privileged",
    "rustc",
    "rustdoc",
    "rustup",
    "sudo",
    "xtask",
];

/// Every program that is run and that nothing installs.
pub(super) fn check(files: &Files, sources: &[Source]) -> Result<Vec<Complaint>> {
    Ok(unprovided(&programs(files, sources), &minimal()?, all))
}

/// What each file runs.
fn programs(files: &Files, sources: &[Source]) -> BTreeMap<String, BTreeSet<Found>> {
    let files: Vec<(&String, &String)> = files.iter().filter(|(path, _)| !scope(path).is_empty()).collect();
    let mut found: BTreeMap<String, BTreeSet<Found>> = BTreeMap::new();
    // A name means one thing within a package.
    for package in ["enforcer/", "tests/", "xtask/"] {
        let of_package: Vec<&Source> = sources
            .iter()
            .filter(|source| source.path.starts_with(package))
            .collect();
        found.extend(rust::programs(&of_package));
    }
    // Scripts here run each other, and what scripts define that they read in.
    let mut own: BTreeSet<String> = BTreeSet::new();
    for (path, text) in files.iter().filter(|(path, _)| !is_a(path, "rs")) {
        own.extend(path.rsplit('/').next().map(str::to_owned));
        own.extend(shell::parts(text).1);
    }
    for (path, text) in &files {
        let first = text.lines().next().unwrap_or_default();
        let script = (first.starts_with("#!") && first.ends_with("sh")) || is_a(path, "sh");
        let names: BTreeSet<String> = if script {
            shell::programs(text)
        } else if is_a(path, "service") {
            unit(text)
        } else {
            continue;
        };
        let names = names.into_iter().map(Found::Program);
        found.entry((*path).clone()).or_default().extend(names);
    }
    for programs in found.values_mut() {
        programs
            .retain(|program| !matches!(program, Found::Program(name) if own.contains(name) || name.starts_with('_')));
    }
    found
}

/// What a unit runs.
fn unit(text: &str) -> BTreeSet<String> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("Exec"));
    let lines = lines.filter_map(|line| Some(line.split_once('=')?.1.trim_start_matches(['-', '+', '!', '@', ':'])));
    lines.flat_map(shell::programs).collect()
}

/// The lists that a file's programs may be in.
fn scope(path: &str) -> &'static [&'static [Package]] {
    let fitting = SCOPES.iter().filter(|(start, _)| path.starts_with(start));
    fitting
        .max_by_key(|(start, _)| start.len())
        .map_or(&[], |(_, lists)| lists)
}

/// What is run and not brought by anything: the path and the program, or why it is not seen.
fn unprovided(
    found: &BTreeMap<String, BTreeSet<Found>>,
    minimal: &BTreeSet<String>,
    lists: impl Fn(&str) -> Vec<Package>,
) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    for (path, programs) in found {
        let brought: BTreeSet<&str> = lists(path)
            .iter()
            .flat_map(|package| package.programs)
            .copied()
            .collect();
        for program in programs {
            match program {
                Found::Program(name)
                    if brought.iter().any(|brought| brought.rsplit('/').next() == Some(name))
                        || minimal.contains(name)
                        || TOOLCHAIN.contains(&name.as_str()) => {}
                Found::Program(name) => complaints.push(Complaint::new(
                    path,
                    1,
                    format!("runs {name}, which no package that setup installs brings"),
                    "add the package to xtask/src/setup/packages.rs",
                )),
                Found::Unseen(place) => complaints.push(Complaint::new(
                    path,
                    1,
                    format!("it is not seen which program runs {place}"),
                    "name it in a literal or a constant",
                )),
            }
        }
    }
    complaints
}

/// The programs of the minimal system: of packages that every system has, and of apt.
fn minimal() -> Result<BTreeSet<String>> {
    let format = "${db:Status-Abbrev}|${Package}|${Essential}|${Priority}\n";
    let packages = read("dpkg-query", &["--show", "--showformat", format])
        .context("dpkg-query failed; this works on Debian and Ubuntu")?;
    let mut names = BTreeSet::new();
    for line in packages.lines() {
        if let [status, package, essential, priority] = line.split('|').collect::<Vec<_>>().as_slice()
            && status.starts_with("ii")
            && (*essential == "yes" || *priority == "required" || *package == "apt")
        {
            names.extend(of_package(package));
        }
    }
    ensure!(
        names.contains("apt-get") && names.contains("sh"),
        "the minimal system is not seen"
    );
    // Alternatives, as awk is of mawk.
    for (name, to) in alternatives() {
        if to.file_name().is_some_and(|to| names.contains(&*to.to_string_lossy())) {
            names.insert(name);
        }
    }
    Ok(names)
}

fn of_package(package: &str) -> Vec<String> {
    let listed = read("dpkg-query", &["--listfiles", package]).unwrap_or_default();
    let programs = listed.lines().filter_map(|file| file.rsplit_once('/'));
    let programs = programs.filter(|(dir, _)| ["/bin", "/sbin", "/lib/apt"].iter().any(|end| dir.ends_with(end)));
    programs.map(|(_, name)| name.to_owned()).collect()
}

/// Names in /etc/alternatives, and the programs that they stand for.
fn alternatives() -> Vec<(String, std::path::PathBuf)> {
    let entries = fs::read_dir("/etc/alternatives").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            Some((
                entry.file_name().into_string().ok()?,
                fs::canonicalize(entry.path()).ok()?,
            ))
        })
        .collect()
}

fn all(path: &str) -> Vec<Package> {
    scope(path).concat()
}

#[test]
fn what_a_package_no_longer_brings_is_missed() -> Result<()> {
    let files = super::files(root())?;
    let (found, minimal) = (programs(&files, &super::sources(&files)?), minimal()?);
    for gone in [
        "iproute2",
        "nftables",
        "nats-server",
        "monit",
        "qemu-system-x86",
        "runit",
        "mmdebstrap",
    ] {
        let without = |path: &str| all(path).into_iter().filter(|package| package.name != gone).collect();
        let complaints = unprovided(&found, &minimal, without);
        assert!(!complaints.is_empty(), "nothing is known to run a program of {gone}");
    }
    Ok(())
}

#[test]
fn packages_bring_the_programs_that_the_lists_say() {
    for package in [BASE, VM, ROOT, DISK, PACKAGE, COMPILER, SCRATCH, GUEST, PRISTINE].concat() {
        let brought = of_package(package.name);
        if brought.is_empty() {
            continue;
        }
        for program in package.programs {
            let name = program.rsplit('/').next().unwrap_or(program);
            let alternative = alternatives().iter().any(|(alternative, _)| alternative == name);
            assert!(
                brought.iter().any(|one| one == name) || alternative,
                "{} brings no {name}",
                package.name
            );
        }
    }
}

#[test]
fn programs_are_seen_in_rust_code() -> Result<()> {
    let text = r#"
        const SCRIPT: &str = "fifth && sixth";
        fn by(program: &str, arguments: &[&str]) { Command::new(program).args(arguments); }
        impl Net { fn inside(&self, program: &Path) -> Command {
            let mut command = Command::new("nsenter"); command.arg(format!("--net={}", self.0)).arg("--").arg(program); command } }
        fn all(net: &Net) {
            std::process::Command::new("first").arg("not");
            Command::new("kill").arg("-9");
            by("second", &["not"]);
            net.inside(Path::new("third"));
            ensure!(Command::new("setpriv").args(["--reuid", "1", "fourth"]).status()?.success());
            Command::new("sh").args(["-c", SCRIPT, "sh"]);
            let script = format!("seventh {} | eighth", 1);
            let words = ["unshare", "--mount", "sh", "-c", &script];
            let hidden = somewhere();
            Command::new(hidden);
            Command::new(binary("own")?);
        }"#;
    let found = rust::programs(&[&Source::new("a.rs", text)?]);
    let found = found.get("a.rs").cloned().unwrap_or_default();
    let mut names: Vec<String> = Vec::new();
    let mut unseen = 0;
    for one in found {
        match one {
            Found::Program(name) => names.push(name),
            Found::Unseen(_) => unseen += 1,
        }
    }
    let expected = "eighth fifth first fourth kill nsenter second setpriv seventh sh sixth third unshare";
    assert_eq!((names.join(" ").as_str(), unseen), (expected, 1));
    Ok(())
}

#[test]
fn units_run_programs() {
    let found = unit("[Service]\nExecStart=-/usr/bin/one x\nExecReload=/bin/sh -c \"two $MAINPID\"\nRestart=three\n");
    assert_eq!(found.into_iter().collect::<Vec<_>>(), ["one", "sh", "two"]);
}
