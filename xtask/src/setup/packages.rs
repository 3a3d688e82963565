//! Every package that a task needs besides the minimal system, with the programs and files for which it is installed.
//!
//! `programs.rs` checks that each program that the sources run is in one of these lists, or in the minimal system.

use std::path::Path;

use crate::run::has;

/// A package of Debian and Ubuntu.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Package {
    pub(crate) name: &'static str,
    /// Programs that are run.
    pub(crate) programs: &'static [&'static str],
    /// Files that are read.
    pub(crate) files: &'static [&'static str],
}

const fn runs(name: &'static str, programs: &'static [&'static str]) -> Package {
    Package {
        name,
        programs,
        files: &[],
    }
}

const fn has_file(name: &'static str, files: &'static [&'static str]) -> Package {
    Package {
        name,
        programs: &[],
        files,
    }
}

impl Package {
    /// Whether all that it is for is here.
    fn is_installed(&self) -> bool {
        self.programs.iter().all(|program| has(program)) && self.files.iter().all(|file| Path::new(file).exists())
    }
}

/// Those of a list that are not installed.
pub(super) fn missing(list: &[Package]) -> Vec<&'static str> {
    let missing = list.iter().filter(|package| !package.is_installed());
    missing.map(|package| package.name).collect()
}

/// For the build, the demo, the tests and the benchmarks.
pub(crate) const BASE: &[Package] = &[
    runs("gcc", &["cc", "gcc"]),
    runs("iproute2", &["ip"]),
    runs("iptables", &["iptables", "iptables-restore"]),
    has_file("libc6-dev", &["/usr/include/stdlib.h"]),
    has_file("libmnl-dev", &["/usr/include/libmnl/libmnl.h"]),
    has_file("libnftnl-dev", &["/usr/include/libnftnl/rule.h"]),
    runs("monit", &["monit"]),
    runs("nats-server", &["nats-server"]),
    runs("nftables", &["nft"]),
    runs("pkg-config", &["pkg-config"]),
    runs("runc", &["runc"]),
];

/// For virtual machines: to emulate, to unpack and build kernels, to fill guests.
pub(crate) const VM: &[Package] = &[
    runs("bc", &["bc"]),
    runs("binutils", &["strip"]),
    runs("bison", &["bison"]),
    runs("busybox-static", &["busybox"]),
    has_file(
        "debian-archive-keyring",
        &["/usr/share/keyrings/debian-archive-keyring.gpg"],
    ),
    runs("flex", &["flex"]),
    runs("kmod", &["depmod", "modprobe"]),
    has_file("libelf-dev", &["/usr/include/libelf.h"]),
    runs("make", &["make"]),
    runs("qemu-system-x86", &["qemu-system-x86_64"]),
    runs("xz-utils", &["xz"]),
    runs("zstd", &["zstd"]),
];

/// For a minimal root: of the package's checks, of `pristine`, of a guest with systemd.
pub(crate) const ROOT: &[Package] = &[runs("mmdebstrap", &["mmdebstrap"])];

/// Inside the minimal system of `pristine`: what a new user has, and no more.
pub(crate) const PRISTINE: &[Package] = &[
    runs("apt", &["apt-get"]),
    runs("ca-certificates", &["update-ca-certificates"]),
    runs("curl", &["curl"]),
    runs("git", &["git"]),
];

/// For a guest's disk.
pub(crate) const DISK: &[Package] = &[runs("e2fsprogs", &["mke2fs"])];

/// For the Debian package.
pub(crate) const PACKAGE: &[Package] = &[runs("binutils", &["readelf"]), runs("dpkg-dev", &["dpkg-shlibdeps"])];

/// The distribution's compiler and the sources of its library, where rustup has no rust-src.
pub(crate) const COMPILER: &[Package] = &[
    runs("cargo-web", &["/usr/bin/cargo"]),
    runs("rustc-web", &["/usr/bin/rustc"]),
    has_file("rust-web-src", &["/usr/lib/rustlib/src/rust/library/core"]),
];

/// Inside the scratch root in which the Debian package is checked: nothing that brings libmnl or libnftnl, as one check
/// is that the program starts without them.
pub(crate) const SCRATCH: &[Package] = &[
    runs("bash-completion", &[]),
    runs("fish", &["fish"]),
    runs("groff", &["groff"]),
    runs("man-db", &["lexgrog", "man"]),
    runs("procps", &["pgrep", "pkill"]),
    runs("runit", &["runsvdir", "sv"]),
    runs("systemd", &["systemctl", "systemd-analyze"]),
    runs("zsh", &["zsh"]),
];

/// Inside a guest with systemd; perl attacks, dnsmasq knows names.
pub(crate) const GUEST: &[Package] = &[
    runs("dbus", &[]),
    runs("dnsmasq-base", &["dnsmasq"]),
    runs("iproute2", &["ip"]),
    runs("kmod", &["modprobe"]),
    runs("nftables", &["nft"]),
    runs("perl", &[]),
    runs("procps", &["pgrep", "sysctl"]),
    runs("systemd", &["journalctl", "systemctl"]),
    runs("systemd-sysv", &["init"]),
    runs("udev", &["udevadm"]),
];

/// What a host may have: `enforcer` and its package run these where they are there, and do without them elsewhere.
pub(crate) const HOST: &[Package] = &[
    runs(
        "iptables",
        &[
            "ip6tables-legacy-save",
            "ip6tables-save",
            "iptables-legacy-save",
            "iptables-save",
        ],
    ),
    runs("nftables", &["nft"]),
    runs("runit", &["sv", "svlogd"]),
    runs("systemd", &["systemctl"]),
];

/// The names in a list, as mmdebstrap takes them.
pub(crate) fn names(list: &[Package]) -> String {
    let names: Vec<&str> = list.iter().map(|package| package.name).collect();
    names.join(",")
}
