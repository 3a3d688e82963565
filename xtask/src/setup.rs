//! What a fresh machine lacks: facts, a plan made from them, and its steps.

mod apt;
pub(crate) mod packages;

use std::{env, fmt, path::Path, process::Command};

use anyhow::{Result, bail, ensure};

use self::packages::{BASE, COMPILER, Package, missing};
use crate::run::{captured, cargo, has, is_root, quiet, read};

/// The release of bpf-linker that works with the LLVM inside the compilers used here.
const BPF_LINKER: &str = "0.10.3";
/// The distribution's compiler under rustup, where rustup itself cannot fetch rust-src.
const LINKED: &str = "debian";
/// Where apt-get has all that the lists name.
const DISTRIBUTIONS: &str = "Debian 12 and 13, Ubuntu 22.04 and 24.04";

/// What is there.
#[derive(Debug, Default)]
struct Facts {
    missing_packages: Vec<&'static str>,
    missing_compiler: Vec<&'static str>,
    linked: bool,
    rust_src: bool,
    linker: Option<String>,
    sysroot: String,
    toolchain: String,
}

/// What must be done.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Install packages of the distribution.
    Packages(Vec<&'static str>),
    /// Let rustup fetch a component; without it the rest of the plan may do.
    Component(&'static str),
    /// Use the distribution's compiler for the kernel programs.
    Link,
    /// Build bpf-linker.
    Linker,
}

/// Carries the plan out, or only says it.
pub(crate) fn run(dry_run: bool) -> Result<()> {
    let mut refused = None;
    for round in 0..2 {
        let facts = facts();
        let plan = plan(&facts, round > 0);
        if plan.is_empty() {
            eprintln!("setup: nothing is missing");
            return Ok(());
        }
        if dry_run {
            for step in &plan {
                eprintln!("setup: would {step}");
            }
            return Ok(());
        }
        if plan.iter().any(|step| matches!(step, Step::Packages(_))) {
            may_install(&plan.iter().map(|step| step.command(&facts)).collect::<Vec<_>>())?;
        }
        for step in &plan {
            match (step, step.effect(&facts)) {
                // rustup may have no network, or no such component: the distribution's compiler is next.
                (Step::Component("rust-src"), Err(error)) => {
                    eprintln!("setup: rustup has no rust-src here: {error:#}");
                    refused = Some(error);
                }
                (Step::Packages(packages), _) if packages.contains(&"rustc-web") && !apt::is_available("rustc-web") => {
                    bail!(
                        "the sources of Rust's library (rust-src) are not to be had: rustup fails ({}), and {} has no \
                         package rustc-web with a compiler that is new enough; get rustup to the network, and run `{}`",
                        refused.map_or_else(String::new, |error| format!("{error:#}")),
                        apt::distribution(),
                        Step::Component("rust-src").command(&facts)
                    );
                }
                (_, done) => done?,
            }
        }
    }
    let left = plan(&facts(), true);
    if !left.is_empty() {
        let left: Vec<String> = left.iter().map(Step::to_string).collect();
        bail!("all steps are done, and there still remains to {}", left.join(", "));
    }
    Ok(())
}

/// Installs what a task needs beyond the others and is not there.
pub(crate) fn also(lists: &[&[Package]]) -> Result<()> {
    let mut absent: Vec<&str> = lists.iter().flat_map(|list| missing(list)).collect();
    absent.sort_unstable();
    absent.dedup();
    if absent.is_empty() {
        return Ok(());
    }
    may_install(&[apt_commands(&absent)])?;
    apt::install(&absent)?;
    let left: Vec<&str> = lists.iter().flat_map(|list| missing(list)).collect();
    ensure!(
        left.is_empty(),
        "{} installed, and what they are for is still missing; reinstall them",
        left.join(", ")
    );
    Ok(())
}

/// Fetches what checks format and lints, which nothing else needs.
pub(crate) fn lints() -> Result<()> {
    let facts = facts();
    for (component, program) in [("rustfmt", "cargo-fmt"), ("clippy", "cargo-clippy")] {
        if !Path::new(&facts.sysroot).join("bin").join(program).exists() {
            Step::Component(component).effect(&facts)?;
        }
    }
    Ok(())
}

/// Fails where this user cannot install packages, with what root would run.
fn may_install(commands: &[String]) -> Result<()> {
    ensure!(
        has("apt-get"),
        "packages are missing, and can be installed with apt-get only ({DISTRIBUTIONS}); what to install: {}",
        commands.join("; ")
    );
    if is_root() || has("sudo") {
        return Ok(());
    }
    eprintln!("setup: this user is not root, and there is no sudo; run these, the first as root, then try again:");
    for command in commands {
        eprintln!("  {command}");
    }
    bail!("packages are missing, and this user may not install them")
}

/// A program as root, through sudo where we are not.
fn sudo(program: &str) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

fn facts() -> Facts {
    let sysroot = read("rustc", &["--print", "sysroot"]).unwrap_or_default();
    let sources = |sysroot: &str| Path::new(sysroot).join("lib/rustlib/src/rust/library/core").exists();
    Facts {
        missing_packages: missing(BASE),
        missing_compiler: missing(COMPILER),
        linked: read("rustup", &["run", LINKED, "rustc", "--print", "sysroot"])
            .is_some_and(|sysroot| sources(&sysroot)),
        rust_src: sources(&sysroot),
        linker: read("bpf-linker", &["--version"]),
        sysroot,
        toolchain: env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "stable".to_owned()),
    }
}

/// `second`: rustup was asked for rust-src already.
fn plan(facts: &Facts, second: bool) -> Vec<Step> {
    let mut packages = facts.missing_packages.clone();
    let mut steps = Vec::new();
    let sources = facts.rust_src || facts.linked;
    if !sources && second {
        packages.extend(&facts.missing_compiler);
    }
    if !packages.is_empty() {
        steps.push(Step::Packages(packages));
    }
    if !sources {
        steps.push(if second {
            Step::Link
        } else {
            Step::Component("rust-src")
        });
    }
    if !facts
        .linker
        .as_deref()
        .is_some_and(|version| version.ends_with(BPF_LINKER))
    {
        steps.push(Step::Linker);
    }
    steps
}

impl Step {
    fn effect(&self, facts: &Facts) -> Result<()> {
        let what = format!("setup: {self}");
        match self {
            Self::Packages(packages) => apt::install(packages),
            Self::Component(_) | Self::Link => {
                let line = self.command(facts);
                let output = captured(&what, Command::new("rustup").args(line.split(' ').skip(1)))?;
                let said = String::from_utf8_lossy(&output.stderr);
                let error = said.lines().find(|line| line.starts_with("error"));
                ensure!(
                    output.status.success(),
                    "{}",
                    error.or(said.lines().last()).unwrap_or("no reason is given")
                );
                Ok(())
            }
            Self::Linker => quiet(
                &what,
                cargo().args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--force"]),
            ),
        }
    }

    /// What one would type.
    fn command(&self, facts: &Facts) -> String {
        match self {
            Self::Packages(packages) => apt_commands(packages),
            Self::Component(component) => {
                format!("rustup component add {component} --toolchain {}", facts.toolchain)
            }
            Self::Link => format!("rustup toolchain link {LINKED} /usr"),
            Self::Linker => format!("cargo install bpf-linker --version {BPF_LINKER} --locked --force"),
        }
    }
}

fn apt_commands(packages: &[&str]) -> String {
    format!(
        "apt-get update && apt-get install --no-install-recommends {}",
        packages.join(" ")
    )
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Packages(packages) => write!(f, "install {} with apt-get (as root)", packages.join(", ")),
            Self::Component(component) => write!(f, "fetch {component} with rustup"),
            Self::Link => write!(f, "let rustup know the distribution's compiler as `{LINKED}`"),
            Self::Linker => write!(f, "build bpf-linker {BPF_LINKER} (a minute or two)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete() -> Facts {
        Facts {
            rust_src: true,
            linker: Some(format!("bpf-linker {BPF_LINKER}")),
            ..Facts::default()
        }
    }

    #[test]
    fn nothing_missing_is_nothing_to_do() {
        assert_eq!(plan(&complete(), false), []);
        assert_eq!(
            plan(
                &Facts {
                    rust_src: false,
                    linked: true,
                    ..complete()
                },
                false
            ),
            []
        );
    }

    #[test]
    fn rustup_is_asked_before_the_distribution() {
        let facts = Facts {
            rust_src: false,
            missing_compiler: vec!["rustc-web"],
            ..complete()
        };
        assert_eq!(plan(&facts, false), [Step::Component("rust-src")]);
        assert_eq!(plan(&facts, true), [Step::Packages(vec!["rustc-web"]), Step::Link]);
    }

    #[test]
    fn another_linker_is_replaced() {
        let facts = Facts {
            linker: Some("bpf-linker 0.9.0".to_owned()),
            ..complete()
        };
        assert_eq!(plan(&facts, false), [Step::Linker]);
    }
}
