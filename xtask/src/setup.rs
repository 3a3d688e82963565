//! What a fresh machine lacks: facts, a plan made from them, and its steps.

use std::{env, fmt, path::Path, process::Command};

use anyhow::{Result, bail};

use crate::run::{has, is_root, quiet, read, root};

/// The release of bpf-linker that works with the LLVM inside the compilers used here.
const BPF_LINKER: &str = "0.10.3";
/// The distribution's compiler under rustup, where rustup itself cannot fetch rust-src.
const LINKED: &str = "debian";

/// Debian packages, and a file that each brings.
const PACKAGES: [(&str, &str); 9] = [
    ("gcc", "/usr/bin/cc"),
    ("iproute2", "/usr/sbin/ip|/sbin/ip|/usr/bin/ip"),
    ("nats-server", "/usr/sbin/nats-server|/usr/bin/nats-server"),
    ("libc6-dev", "/usr/include/stdlib.h"),
    ("libmnl-dev", "/usr/include/libmnl/libmnl.h"),
    ("monit", "/usr/bin/monit"),
    ("libnftnl-dev", "/usr/include/libnftnl/rule.h"),
    ("nftables", "/usr/sbin/nft|/sbin/nft|/usr/bin/nft"),
    ("pkg-config", "/usr/bin/pkg-config"),
];
/// What virtual machines need besides: to emulate, to unpack and build kernels, to fill guests.
const VM_PACKAGES: [(&str, &str); 15] = [
    ("bc", "/usr/bin/bc"),
    ("binutils", "/usr/bin/strip"),
    ("bison", "/usr/bin/bison"),
    ("busybox-static", "/bin/busybox|/usr/bin/busybox"),
    (
        "debian-archive-keyring",
        "/usr/share/keyrings/debian-archive-keyring.gpg",
    ),
    ("flex", "/usr/bin/flex"),
    ("gcc", "/usr/bin/gcc"),
    ("kmod", "/sbin/depmod|/usr/sbin/depmod"),
    ("libc6-dev", "/usr/include/stdlib.h"),
    ("libelf-dev", "/usr/include/libelf.h"),
    ("make", "/usr/bin/make"),
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    ("util-linux", "/usr/bin/setpriv"),
    ("xz-utils", "/usr/bin/xz"),
    ("zstd", "/usr/bin/zstd"),
];
/// What makes a system with systemd for one of them.
const SYSTEM_PACKAGES: [(&str, &str); 2] = [
    ("e2fsprogs", "/sbin/mke2fs|/usr/sbin/mke2fs"),
    ("mmdebstrap", "/usr/bin/mmdebstrap"),
];
const COMPILER: [(&str, &str); 3] = [
    ("rustc-web", "/usr/bin/rustc"),
    ("cargo-web", "/usr/bin/cargo"),
    ("rust-web-src", "/usr/lib/rustlib/src/rust/library/core"),
];

/// What is there.
#[derive(Debug, Default)]
struct Facts {
    missing_packages: Vec<&'static str>,
    missing_compiler: Vec<&'static str>,
    missing_components: Vec<&'static str>,
    linked: bool,
    rust_src: bool,
    linker: Option<String>,
    can_install: bool,
    sudo: bool,
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
        if !facts.can_install && plan.iter().any(|step| matches!(step, Step::Packages(_))) {
            eprintln!("setup: this user may not install packages here; run these, then try again:");
            for step in &plan {
                eprintln!("  {}", step.command(&facts));
            }
            bail!("{} steps are left to you", plan.len());
        }
        for step in &plan {
            let done = quiet(&format!("setup: {step}"), &mut step.effect(&facts));
            match (step, done) {
                // rustup may have no network, or no such component: the distribution's compiler is next.
                (Step::Component("rust-src"), Err(error)) => {
                    eprintln!(
                        "setup: rustup has no rust-src here ({})",
                        error.to_string().lines().next().unwrap_or("")
                    );
                }
                (_, done) => done?,
            }
        }
    }
    let left = plan(&facts(), true);
    if !left.is_empty() {
        bail!("after all steps this is still missing: {left:?}");
    }
    Ok(())
}

/// Installs what virtual machines need and is not there, and what a `system` on a disk does.
pub(crate) fn vm(system: bool) -> Result<()> {
    let wanted: Vec<_> = VM_PACKAGES
        .into_iter()
        .chain(SYSTEM_PACKAGES.into_iter().filter(|_| system))
        .collect();
    let missing = absent(&wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let facts = facts();
    let step = Step::Packages(missing);
    if !facts.can_install {
        bail!(
            "virtual machines need packages that this user may not install; run {}",
            step.command(&facts)
        );
    }
    quiet(&format!("setup: {step}"), &mut step.effect(&facts))?;
    let left = absent(&wanted);
    if !left.is_empty() {
        bail!("after installing, this is still missing: {}", left.join(", "));
    }
    Ok(())
}

fn absent(list: &[(&'static str, &str)]) -> Vec<&'static str> {
    let there = |paths: &str| paths.split('|').any(|path| Path::new(path).exists());
    list.iter()
        .filter(|(_, paths)| !there(paths))
        .map(|(package, _)| *package)
        .collect()
}

fn facts() -> Facts {
    let toolchain = env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "stable".to_owned());
    let sysroot = read("rustc", &["--print", "sysroot"]).unwrap_or_default();
    let sources = |sysroot: &str| Path::new(sysroot).join("lib/rustlib/src/rust/library/core").exists();
    let components = [("rustfmt", "cargo-fmt"), ("clippy", "cargo-clippy")];
    let sudo = !is_root() && has("sudo");
    Facts {
        missing_packages: absent(&PACKAGES),
        missing_compiler: absent(&COMPILER),
        missing_components: components
            .iter()
            .filter(|(_, program)| !Path::new(&sysroot).join("bin").join(program).exists())
            .map(|(component, _)| *component)
            .collect(),
        linked: read("rustup", &["run", LINKED, "rustc", "--print", "sysroot"])
            .is_some_and(|sysroot| sources(&sysroot)),
        rust_src: sources(&sysroot),
        linker: read("bpf-linker", &["--version"]),
        can_install: has("apt-get") && (is_root() || sudo),
        sudo,
        toolchain,
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
    steps.extend(
        facts
            .missing_components
            .iter()
            .map(|component| Step::Component(component)),
    );
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
    fn effect(&self, facts: &Facts) -> Command {
        let mut command = Command::new("sh");
        command.current_dir(root()).args(["-c", &self.command(facts)]);
        command
    }

    fn command(&self, facts: &Facts) -> String {
        let sudo = if facts.sudo { "sudo " } else { "" };
        match self {
            Self::Packages(packages) => format!(
                "{sudo}apt-get update -q && DEBIAN_FRONTEND=noninteractive {sudo}apt-get install -q -y --no-install-recommends {}",
                packages.join(" ")
            ),
            Self::Component(component) => {
                format!("rustup component add {component} --toolchain {}", facts.toolchain)
            }
            Self::Link => format!("rustup toolchain link {LINKED} /usr"),
            Self::Linker => format!("cargo install bpf-linker --version {BPF_LINKER} --locked --force"),
        }
    }
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
