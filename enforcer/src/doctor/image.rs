//! An unpacked image, a stemcell say: its kernel's configuration, modules and files, looked at and not run.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{
    judge::finding,
    legacy::{AGENT_FILES, is_ours},
};
use crate::{
    backend::probe::{Fact, Facts, Feature},
    config::{Config, Settings},
    policy::{FileUsers, Policy},
    wire::doctor::{Finding, Unseen, Weight},
};

/// What was seen of an image.
#[derive(Clone, Debug, Default)]
pub(super) struct ImageSeen {
    pub(super) root: PathBuf,
    pub(super) config: PathBuf,
    pub(super) settings: Settings,
    /// Why the configuration means nothing.
    pub(super) fault: Option<String>,
    /// Principals whose users do not exist there.
    pub(super) absent: Vec<String>,
    /// The newest kernel.
    pub(super) release: Option<String>,
    /// Its options that are `y` or `m`.
    pub(super) options: BTreeMap<String, char>,
    /// Its modules, built in ones too, by name.
    pub(super) modules: BTreeSet<String>,
    /// Files of ours that are missing, in words.
    pub(super) missing: Vec<String>,
    /// Files of ours that others can write.
    pub(super) writable: Vec<String>,
    /// Pieces of earlier firewalls.
    pub(super) old: Vec<String>,
    pub(super) unseen: Vec<Unseen>,
}

/// Options of a kernel's configuration that a feature takes.
struct Option_ {
    feature: Feature,
    options: &'static [&'static str],
    /// The module where it is one, and neither option nor built in list names it.
    module: Option<&'static str>,
    why: &'static str,
}

const OPTIONS: [Option_; 16] = [
    option(Feature::BpfSyscall, &["BPF_SYSCALL"], None, "bpf(2) itself"),
    option(
        Feature::CgroupSockAddr,
        &["CGROUPS", "CGROUP_BPF", "INET"],
        None,
        "programs at connect",
    ),
    option(
        Feature::SocketOwner,
        &["DEBUG_INFO_BTF"],
        None,
        "where the socket's owner lies",
    ),
    option(Feature::NfTables, &["NF_TABLES"], Some("nf_tables"), "nf_tables"),
    option(
        Feature::NfTables,
        &["NF_TABLES_INET"],
        None,
        "tables for IPv4 and IPv6 together",
    ),
    option(
        Feature::NftForward,
        &["NF_TABLES_IPV4", "NF_TABLES_IPV6"],
        None,
        "its hooks",
    ),
    option(
        Feature::NftReject,
        &["NFT_REJECT"],
        Some("nft_reject"),
        "answers to what is refused",
    ),
    option(
        Feature::NftReject,
        &["NFT_REJECT_INET"],
        Some("nft_reject_inet"),
        "answers to what is refused",
    ),
    option(
        Feature::NftLimit,
        &["NFT_LIMIT"],
        Some("nft_limit"),
        "a bound for what is logged",
    ),
    option(
        Feature::NftLog,
        &["NFT_LOG"],
        Some("nft_log"),
        "denials told one by one",
    ),
    option(
        Feature::NftLog,
        &["NETFILTER_NETLINK_LOG"],
        Some("nfnetlink_log"),
        "denials told one by one",
    ),
    option(
        Feature::NftSocketCgroup,
        &["NFT_SOCKET"],
        Some("nft_socket"),
        "the cgroup of a socket",
    ),
    option(
        Feature::SockDiag,
        &["INET_DIAG"],
        Some("inet_diag"),
        "the list of connections",
    ),
    option(
        Feature::SockDiag,
        &["INET_TCP_DIAG"],
        Some("tcp_diag"),
        "the list of TCP connections",
    ),
    option(Feature::SockDestroy, &["INET_DIAG_DESTROY"], None, "existing = \"cut\""),
    option(Feature::Bpffs, &["BPF_SYSCALL"], None, "a bpffs for pins"),
];

const fn option(
    feature: Feature,
    options: &'static [&'static str],
    module: Option<&'static str>,
    why: &'static str,
) -> Option_ {
    Option_ {
        feature,
        options,
        module,
        why,
    }
}

/// Files that come with enforcer: one of each line is enough.
const FILES: [(&str, &[&str]); 4] = [
    (
        "the binary",
        &[
            "usr/sbin/enforcer",
            "usr/bin/enforcer",
            "sbin/enforcer",
            "usr/local/sbin/enforcer",
            "usr/local/bin/enforcer",
        ],
    ),
    (
        "the unit",
        &[
            "usr/lib/systemd/system/enforcer.service",
            "lib/systemd/system/enforcer.service",
            "etc/systemd/system/enforcer.service",
        ],
    ),
    (
        "the unit switched on",
        &[
            "etc/systemd/system/multi-user.target.wants/enforcer.service",
            "etc/systemd/system/sysinit.target.wants/enforcer.service",
            "etc/systemd/system/basic.target.wants/enforcer.service",
            "etc/systemd/system/network-pre.target.wants/enforcer.service",
        ],
    ),
    (
        "the man page of the command",
        &[
            "usr/share/man/man8/enforcer.8.gz",
            "usr/share/man/man8/enforcer.8",
            "usr/share/man/man1/enforcer.1.gz",
            "usr/share/man/man1/enforcer.1",
        ],
    ),
];

/// Looks at an image below `root`; `config` is the file's path in it.
pub(super) fn collect(root: &Path, config: &Path) -> io::Result<ImageSeen> {
    fs::read_dir(root)?;
    let inside = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    let mut seen = ImageSeen {
        root: root.into(),
        config: inside(config),
        ..ImageSeen::default()
    };
    seen.read_config();
    seen.read_kernel();
    for (what, places) in FILES {
        // A link may lead to where only the image itself is the root.
        if !places.iter().any(|place| root.join(place).symlink_metadata().is_ok()) {
            seen.missing.push(format!("{what}: none of {}", places.join(", ")));
        }
    }
    let binaries = FILES.iter().take(2).flat_map(|(_, places)| places.iter());
    let mut ours: Vec<PathBuf> = binaries.map(|place| root.join(place)).collect();
    ours.extend([seen.config.clone(), inside(&seen.settings.state_dir)]);
    ours.extend(seen.config.parent().map(Path::to_path_buf));
    for path in ours {
        // Unpacked by another user than root, an image tells nothing of owners.
        if let Ok(meta) = fs::metadata(&path)
            && meta.mode() & 0o022 != 0
        {
            let mode = meta.mode() & 0o7777;
            seen.writable.push(format!("{} has mode {mode:04o}", path.display()));
        }
    }
    for (path, what) in AGENT_FILES {
        let there = root.join(path);
        if there.symlink_metadata().is_ok() && !is_ours(&there) {
            seen.old.push(format!("/{path}: {what}"));
        }
    }
    Ok(seen)
}

impl ImageSeen {
    fn read_config(&mut self) {
        let users = FileUsers::below(&self.root).unwrap_or_default();
        let read = Config::load(&self.config).map_err(|error| error.to_string());
        let read = read.and_then(|config| {
            self.settings = config.settings.clone();
            Policy::from_config(&config, &users).map_err(|error| error.to_string())
        });
        match read {
            Ok(read) => self.absent = read.absent.iter().map(ToString::to_string).collect(),
            Err(fault) => self.fault = Some(fault),
        }
    }

    /// The newest kernel's configuration and modules.
    fn read_kernel(&mut self) {
        let modules_of = |name: &str| {
            let places = ["lib/modules", "usr/lib/modules"].map(|dir| self.root.join(dir).join(name));
            places.into_iter().find(|dir| dir.is_dir())
        };
        let mut configs: Vec<(String, PathBuf)> = Vec::new();
        for entry in fs::read_dir(self.root.join("boot")).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(release) = name.strip_prefix("config-") {
                configs.push((release.to_owned(), entry.path()));
            }
        }
        for dir in ["lib/modules", "usr/lib/modules"] {
            for entry in fs::read_dir(self.root.join(dir)).into_iter().flatten().flatten() {
                let config = entry.path().join("config");
                if config.is_file() {
                    configs.push((entry.file_name().to_string_lossy().into_owned(), config));
                }
            }
        }
        configs.sort_by_key(|(release, _)| version(release));
        let Some((release, config)) = configs.pop() else {
            self.unseen.push(Unseen {
                what: "the kernel's configuration".to_owned(),
                why: format!(
                    "there is neither boot/config-* nor lib/modules/*/config below {}",
                    self.root.display()
                ),
            });
            return;
        };
        self.options = options(&fs::read_to_string(&config).unwrap_or_default());
        match modules_of(&release) {
            Some(dir) => {
                for list in ["modules.builtin", "modules.dep"] {
                    self.modules
                        .extend(modules(&fs::read_to_string(dir.join(list)).unwrap_or_default()));
                }
            }
            None => self.unseen.push(Unseen {
                what: format!("modules of {release}"),
                why: "there is no lib/modules of that name".to_owned(),
            }),
        }
        self.release = Some(release);
    }
}

/// The parts of a release that are numbers, so that 6.10 comes after 6.9.
fn version(release: &str) -> Vec<u64> {
    release
        .split(|letter: char| !letter.is_ascii_digit())
        .filter_map(|part| part.parse().ok())
        .collect()
}

/// Options that are `y` or `m`.
pub(super) fn options(text: &str) -> BTreeMap<String, char> {
    let lines = text.lines().filter_map(|line| {
        let (name, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
        let value = value.trim().chars().next()?;
        matches!(value, 'y' | 'm').then(|| (name.to_owned(), value))
    });
    lines.collect()
}

/// Names of modules as `modules.builtin` and `modules.dep` list them (man 5 modules.dep).
pub(super) fn modules(text: &str) -> impl Iterator<Item = String> {
    text.lines().filter_map(|line| {
        let path = line.split(':').next()?.trim();
        let file = path.rsplit('/').next()?;
        let name = file.split(".ko").next()?;
        (!name.is_empty()).then(|| name.replace('-', "_"))
    })
}

/// What an image can do, and what is wrong with it. Pure.
pub(super) fn judge_image(seen: &ImageSeen) -> (Facts, Vec<Finding>) {
    let mut facts = Facts::default();
    let mut options = Vec::new();
    if seen.release.is_some() {
        for option in &OPTIONS {
            let missing: Vec<&str> = (option.options.iter().copied())
                .filter(|name| !has(seen, name, option.module))
                .collect();
            let before = facts.of(option.feature);
            let known = facts.iter().any(|(feature, _)| feature == option.feature);
            if missing.is_empty() {
                if !known || before == Fact::Supported {
                    facts.set(option.feature, Fact::Supported);
                }
                continue;
            }
            let names: Vec<String> = missing.iter().map(|name| format!("CONFIG_{name}")).collect();
            let why = format!("{} is not set", names.join(", "));
            options.push(format!("{why}: {}", option.why));
            facts.set(option.feature, Fact::Missing { why });
        }
    } else {
        for feature in [Feature::BpfSyscall, Feature::NfTables] {
            facts.set(
                feature,
                Fact::Inconclusive("no configuration of a kernel was found".to_owned()),
            );
        }
    }
    let mut findings = Vec::new();
    let mut add = |id, weight, what: &str, items: &[String], remedy: &str| {
        if !items.is_empty() {
            findings.push(finding(id, weight, what, items.iter().cloned(), remedy));
        }
    };
    options.sort_unstable();
    options.dedup();
    add(
        "kernel-options",
        Weight::Medium,
        "the kernel was built without options, or the image lacks modules, that enforcer can use",
        &options,
        "take a kernel with them, or add the package with its modules (linux-modules-extra, say)",
    );
    add(
        "configuration",
        Weight::High,
        "the configuration cannot be put in force; enforcer will not start",
        &seen.fault.iter().cloned().collect::<Vec<_>>(),
        "put one there that enforcer config check finds good",
    );
    add(
        "files-missing",
        Weight::High,
        "parts of enforcer are not in the image",
        &seen.missing,
        "install the package, and switch its unit on (systemctl --root=DIR enable enforcer)",
    );
    add(
        "files-writable",
        Weight::High,
        "others can write files of enforcer's",
        &seen.writable,
        "chmod go-w them",
    );
    add(
        "old-stemcell-rules",
        Weight::Medium,
        "the image puts rules of an earlier firewall in force, or has tools that rely on them",
        &seen.old,
        "remove them where enforcer guards the same endpoints",
    );
    (facts, findings)
}

fn has(seen: &ImageSeen, option: &str, module: Option<&str>) -> bool {
    match seen.options.get(option) {
        Some('y') => true,
        // A module must be in the image, where its list could be read.
        Some(_) => module.is_none_or(|module| seen.modules.is_empty() || seen.modules.contains(module)),
        None => false,
    }
}
