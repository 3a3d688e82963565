//! A guest with a system of its own: a small Debian with systemd on a disk, the package in it, its life told over some
//! boots: after a reboot, a power cut, and a soft reboot, which is none of the machine's.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    initramfs::Initramfs,
    kernel::Kernel,
    machine::{self, Outcome, Settings},
    plan::Plan,
    table::Table,
};
use crate::{
    debian, package,
    root::Recipe,
    run::{digest_of, is_root, quiet, read},
    setup::packages::GUEST,
};

/// The first whose systemd knows soft reboots.
const SUITE: &str = "trixie";
/// How often the machine boots, as life.sh divides it.
const BOOTS: usize = 4;
/// Modules without which there is no disk; what a kernel has built in needs none, which not every package tells.
const DISK_MODULES: [&str; 4] = [
    "virtio_pci|virtio_blk",
    "virtio_blk",
    "crc32c_generic|virtio_blk",
    "ext4|virtio_blk",
];
/// What is added to the system, and its mode.
const FILES: [(&str, u32, &str); 12] = [
    ("life/life.sh", 0o755, include_str!("system/life.sh")),
    ("life/attacker.pl", 0o755, include_str!("system/attacker.pl")),
    (
        "etc/systemd/system/life.service",
        0o644,
        include_str!("system/life.service"),
    ),
    (
        "etc/systemd/system/attacker.service",
        0o644,
        include_str!("system/attacker.service"),
    ),
    (
        "etc/systemd/system/bosh-agent.service",
        0o644,
        include_str!("system/bosh-agent.service"),
    ),
    (
        "etc/systemd/system/names.service",
        0o644,
        include_str!("system/names.service"),
    ),
    (
        "etc/systemd/system/remount-rootdir-as-rprivate.service",
        0o644,
        include_str!("system/remount-rootdir-as-rprivate.service"),
    ),
    (
        "etc/systemd/network/net0.netdev",
        0o644,
        include_str!("system/net0.netdev"),
    ),
    (
        "etc/systemd/network/net0.network",
        0o644,
        include_str!("system/net0.network"),
    ),
    ("etc/fstab", 0o644, "/dev/vda / ext4 defaults 0 0\n"),
    ("etc/hostname", 0o644, "guest\n"),
    ("etc/resolv.conf", 0o644, "nameserver 127.0.0.1\n"),
];
/// What is started at boot, and by which target.
const ENABLED: [(&str, &str); 6] = [
    ("/etc/systemd/system/attacker.service", "sysinit.target"),
    (
        "/etc/systemd/system/remount-rootdir-as-rprivate.service",
        "sysinit.target",
    ),
    ("/etc/systemd/system/bosh-agent.service", "multi-user.target"),
    ("/etc/systemd/system/life.service", "multi-user.target"),
    ("/lib/systemd/system/systemd-networkd.service", "multi-user.target"),
    (
        "/lib/systemd/system/systemd-networkd-wait-online.service",
        "network-online.target",
    ),
];

/// What costs an emulated machine seconds at boot, and says nothing about enforcer.
const MASKED: [&str; 5] = [
    "e2scrub_reap.service",
    "getty.target",
    "systemd-logind.service",
    "systemd-udev-trigger.service",
    "systemd-update-utmp.service",
];
/// The only generator of units that is left, of a dozen that run with each reload.
const GENERATOR: &str = "systemd-fstab-generator";

/// Which packages live there.
#[derive(Debug)]
pub(super) struct Packages {
    first: PathBuf,
    /// What the first is upgraded to.
    second: PathBuf,
}

impl Packages {
    /// Those given, or those of `cargo xtask package`: built now, or `as_they_are` if they are there.
    pub(super) fn find(given: &[PathBuf], as_they_are: bool) -> Result<Self> {
        let this = match given {
            [] => Self::ours(as_they_are)?,
            [first, second] => Self {
                first: first.clone(),
                second: second.clone(),
            },
            _ => bail!("--deb is given once for the package to install and once for the one to upgrade to"),
        };
        let (first, second) = (version(&this.first)?, version(&this.second)?);
        ensure!(
            first != second,
            "both packages are of version {first}, so that nothing is upgraded; make two with cargo xtask package, or \
             name others with --deb"
        );
        Ok(this)
    }

    fn ours(as_they_are: bool) -> Result<Self> {
        let [first, second] = package::paths()?;
        let there = first.exists() && second.exists();
        if there && as_they_are {
            eprintln!(
                "vm: the packages as they are: {} and its next revision",
                first.display()
            );
        } else {
            let long = if there { "" } else { ", which takes some minutes" };
            eprintln!("vm: build the packages with cargo xtask package --build-only{long}");
            package::run(true)?;
        }
        Ok(Self { first, second })
    }
}

fn version(package: &Path) -> Result<String> {
    let version = read("dpkg-deb", &["--field", &package.display().to_string(), "Version"]);
    version.with_context(|| {
        format!(
            "{} is no Debian package; make packages with cargo xtask package",
            package.display()
        )
    })
}

/// Boots the system as often as its life has parts.
pub(super) fn run(
    table: &Table,
    kernel: &Kernel,
    packages: &Packages,
    cache: &Path,
    binaries: &Path,
    dir: &Path,
    settings: &Settings,
) -> Result<Outcome> {
    ensure!(is_root(), "a system's root can be made by root only; run this as root");
    let mut initramfs = Initramfs::new(binaries, &binaries.join("enforcer"))?;
    let plan = Plan {
        modules: initramfs.modules(kernel, &DISK_MODULES)?,
        root: Some("/dev/vda".to_owned()),
        ..Plan::default()
    };
    initramfs.text("plan.json", &serde_json::to_string_pretty(&plan)?)?;
    // Hundreds of megabytes that nobody looks at later.
    let scratch = tempfile::Builder::new().prefix("scratch").tempdir_in(dir)?;
    let file = scratch.path().join("initramfs.cpio");
    initramfs.write(&file)?;
    let disk = scratch.path().join("disk.ext4");
    // An upgrade takes longer than any case of the suite.
    let patience = settings.patience * 2;
    make_disk(table, kernel, packages, patience, cache, &disk)?;
    let settings = Settings {
        disk: Some(disk),
        patience,
        ..settings.clone()
    };
    let mut all = Outcome::default();
    for boot in 1..=BOOTS {
        let dir = dir.join(format!("boot-{boot}"));
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let outcome = machine::run(&format!("systemd, boot {boot}"), &kernel.image, &file, &dir, &settings)?;
        let green = outcome.is_green();
        all.add(outcome);
        if !green {
            if boot < BOOTS {
                eprintln!("vm: systemd: not booted again after what failed");
            }
            break;
        }
    }
    Ok(all)
}

/// A file system with the base, the kernel's modules, the packages and what tells their life.
fn make_disk(
    table: &Table,
    kernel: &Kernel,
    packages: &Packages,
    patience: Duration,
    cache: &Path,
    disk: &Path,
) -> Result<()> {
    let base = base(table, cache)?;
    let root = tempfile::Builder::new().prefix("root").tempdir_in(cache)?;
    let mut tar = Command::new("tar");
    tar.arg("--extract")
        .arg("--file")
        .arg(&base)
        .arg("--directory")
        .arg(root.path());
    for left_out in [
        "./dev/*",
        "./usr/share/doc/*",
        "./usr/share/locale/*",
        "./usr/share/man/*",
    ] {
        tar.args(["--exclude", left_out]);
    }
    quiet("vm: unpack the system", &mut tar)?;
    let at = |path: &str| root.path().join(path);
    if let Some((home, release)) = &kernel.modules {
        fs::create_dir_all(at("usr/lib/modules"))?;
        let mut copy = Command::new("cp");
        copy.arg("--recursive")
            .arg(home.join("lib/modules").join(release))
            .arg(at("usr/lib/modules"));
        quiet("vm: add the kernel's modules", &mut copy)?;
    }
    for dir in ["life", "var/lib/life"] {
        fs::create_dir_all(at(dir))?;
    }
    for (from, to) in [(&packages.first, "first.deb"), (&packages.second, "second.deb")] {
        fs::copy(from, at("life").join(to)).with_context(|| format!("copy {}", from.display()))?;
    }
    // So that a part that hangs is told by its name.
    let limit = patience.as_secs().saturating_sub(20).max(1);
    fs::write(at("life/limit"), limit.to_string())?;
    for (name, mode, text) in FILES {
        let path = at(name);
        let _ = fs::remove_file(&path);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    for (unit, target) in ENABLED {
        let wants = at("etc/systemd/system").join(format!("{target}.wants"));
        fs::create_dir_all(&wants)?;
        let name = Path::new(unit).file_name().unwrap_or_default();
        symlink(unit, wants.join(name)).with_context(|| format!("enable {unit}"))?;
    }
    for unit in MASKED {
        symlink("/dev/null", at("etc/systemd/system").join(unit)).with_context(|| format!("mask {unit}"))?;
    }
    fs::create_dir_all(at("etc/systemd/system-generators"))?;
    for generator in fs::read_dir(at("usr/lib/systemd/system-generators"))? {
        let name = generator?.file_name();
        if name != GENERATOR {
            symlink("/dev/null", at("etc/systemd/system-generators").join(name))?;
        }
    }
    let mut make = Command::new("/sbin/mke2fs");
    make.args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(root.path())
        .arg(disk)
        .arg("1500M");
    quiet("vm: make its disk", &mut make)
}

/// The archive of a minimal Debian, made once.
fn base(table: &Table, cache: &Path) -> Result<PathBuf> {
    let dir = cache.join("roots");
    fs::create_dir_all(&dir)?;
    let address = debian::mirror()?;
    let recipe = Recipe {
        suite: SUITE,
        packages: GUEST,
        sources: &[format!("deb {address} {SUITE} main")],
        keyring: Some(&table.keyring),
    };
    let key = digest_of(&format!("{recipe:?}"));
    let file = dir.join(format!("{SUITE}-{}.tar", key.get(..12).unwrap_or(&key)));
    if file.exists() {
        return Ok(file);
    }
    recipe.make("vm: make a small Debian with systemd (two minutes, once)", &file)?;
    Ok(file)
}
