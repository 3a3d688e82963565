//! A guest with a system of its own: a small Debian with systemd on a disk, the package in it, its life told over two boots.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    archive::digest_of,
    initramfs::Initramfs,
    kernel::Kernel,
    machine::{self, Outcome, Settings},
    plan::Plan,
    table::Table,
};
use crate::{
    debian,
    run::{is_root, quiet, target_dir},
};

/// Of what the system consists.
const PACKAGES: &str = "systemd,systemd-sysv,dbus,iproute2,nftables,kmod,procps,udev";
const SUITE: &str = "bookworm";
const BOOTS: usize = 2;
/// Modules without which there is no disk; what a kernel has built in needs none, which not every package tells.
const DISK_MODULES: [&str; 4] = [
    "virtio_pci|virtio_blk",
    "virtio_blk",
    "crc32c_generic|virtio_blk",
    "ext4|virtio_blk",
];
const UNITS: [(&str, &str, &str); 2] = [
    (
        "life.service",
        "[Unit]\nDescription=The package's life\nAfter=multi-user.target\n[Service]\nType=oneshot\nExecStart=/packages/life.sh\nStandardOutput=journal+console\nTimeoutStartSec=infinity\n",
        "multi-user.target",
    ),
    (
        "early.service",
        "[Unit]\nDescription=An attempt before there is any network\nDefaultDependencies=no\nAfter=network-pre.target\nBefore=network.target sysinit.target\nWants=network-pre.target\n[Service]\nType=oneshot\nExecStart=/packages/early.sh\n",
        "sysinit.target",
    ),
];
const EARLY: &str = "#!/bin/bash\nip link set lo up\nsetpriv --reuid 65534 --regid 65534 --clear-groups bash -c ': </dev/tcp/127.0.0.1/2822' 2>&1 | grep -oEm 1 'Operation not permitted|Connection refused' >/run/early || echo other >/run/early\n";

/// Which packages live there.
#[derive(Debug)]
pub(super) struct Packages {
    pub(super) first: PathBuf,
    pub(super) second: PathBuf,
}

impl Packages {
    /// Those given, or what `cargo xtask package` has made; the second is what the first is upgraded to.
    pub(super) fn find(given: &[PathBuf]) -> Result<Self> {
        let mut found = given.to_vec();
        if found.is_empty() {
            let dir = target_dir().join("package");
            let mut dirs = vec![dir.clone()];
            dirs.extend(
                fs::read_dir(&dir)
                    .into_iter()
                    .flatten()
                    .flatten()
                    .map(|entry| entry.path()),
            );
            let files = dirs
                .iter()
                .flat_map(|dir| fs::read_dir(dir).into_iter().flatten().flatten());
            found = files
                .map(|entry| entry.path())
                .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
                .collect();
            found.sort_by_key(|path| path.file_name().map(std::ffi::OsStr::to_owned));
        }
        match found.as_slice() {
            [] => bail!("no package in target/package; make it with cargo xtask package, or name one with --deb"),
            [only] => Ok(Self {
                first: only.clone(),
                second: only.clone(),
            }),
            [first, second, ..] => Ok(Self {
                first: first.clone(),
                second: second.clone(),
            }),
        }
    }
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
    let file = dir.join("initramfs.cpio");
    initramfs.write(&file)?;
    let disk = dir.join("disk.ext4");
    make_disk(table, kernel, packages, cache, &disk)?;
    let settings = Settings {
        disk: Some(disk.clone()),
        ..settings.clone()
    };
    let started = Instant::now();
    let mut all = Outcome::default();
    for boot in 1..=BOOTS {
        let outcome = machine::run(&format!("systemd, boot {boot}"), &kernel.image, &file, dir, &settings)?;
        let green = outcome.failure.is_none();
        all.booted = all.booted.or(outcome.booted);
        all.cells.extend(outcome.cells);
        all.failure = outcome.failure;
        if !green {
            break;
        }
    }
    all.time = started.elapsed();
    for file in [file, disk] {
        let _ = fs::remove_file(file);
    }
    Ok(all)
}

/// A file system with the base, the kernel's modules, the packages and what tells their life.
fn make_disk(table: &Table, kernel: &Kernel, packages: &Packages, cache: &Path, disk: &Path) -> Result<()> {
    let base = base(table, cache)?;
    let root = tempfile::Builder::new().prefix("root").tempdir_in(cache)?;
    let mut tar = Command::new("tar");
    tar.arg("--extract")
        .arg("--file")
        .arg(&base)
        .arg("--directory")
        .arg(root.path());
    quiet("vm: unpack the system", tar.args(["--exclude", "./dev/*"]))?;
    let at = |path: &str| root.path().join(path);
    if let Some((home, release)) = &kernel.modules {
        fs::create_dir_all(at("usr/lib/modules"))?;
        let mut copy = Command::new("cp");
        copy.arg("--recursive")
            .arg(home.join("lib/modules").join(release))
            .arg(at("usr/lib/modules"));
        quiet("vm: add the kernel's modules", &mut copy)?;
    }
    fs::create_dir(at("packages"))?;
    for (from, to) in [(&packages.first, "first.deb"), (&packages.second, "second.deb")] {
        fs::copy(from, at("packages").join(to)).with_context(|| format!("copy {}", from.display()))?;
    }
    for (name, text) in [("life.sh", include_str!("life.sh")), ("early.sh", EARLY)] {
        let path = at("packages").join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    for (name, text, wanted_by) in UNITS {
        fs::write(at("etc/systemd/system").join(name), text)?;
        let wants = at("etc/systemd/system").join(format!("{wanted_by}.wants"));
        fs::create_dir_all(&wants)?;
        symlink(format!("/etc/systemd/system/{name}"), wants.join(name))?;
    }
    fs::write(at("etc/fstab"), "/dev/vda / ext4 defaults 0 0\n")?;
    fs::write(at("etc/hostname"), "guest\n")?;
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
    let key = digest_of(PACKAGES);
    let file = dir.join(format!("{SUITE}-{}.tar", key.get(..12).unwrap_or(&key)));
    if file.exists() {
        return Ok(file);
    }
    let address = debian::mirror()?;
    let aside = file.with_extension("new.tar");
    let mut make = Command::new("mmdebstrap");
    make.args(["--quiet", "--variant=minbase", &format!("--include={PACKAGES}")])
        .arg(format!("--keyring={}", table.keyring.display()))
        .args([SUITE])
        .arg(&aside)
        .arg(format!("deb {address} {SUITE} main"));
    quiet("vm: make a small Debian with systemd (two minutes, once)", &mut make)?;
    fs::rename(&aside, &file).with_context(|| format!("make {}", file.display()))?;
    Ok(file)
}
