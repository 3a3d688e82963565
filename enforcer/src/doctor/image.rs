//! An unpacked image, a stemcell say: its kernel's configuration, modules and files, looked at and not run.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{
    findings::{Findings, Gaps},
    instance::{Read, StartWithout, of_configuration},
    old_rules,
};
use crate::{
    backend::probe::{Fact, Facts, Feature},
    config::{self, Config, DEFAULT_PATH, Settings},
    policy::FileUsers,
    wire::doctor::{
        HostReport, Report,
        Weight::{High, Medium},
    },
};

/// What was seen of an image.
#[derive(Clone, Debug, Default)]
pub(super) struct Image {
    pub(super) root: PathBuf,
    pub(super) config: PathBuf,
    pub(super) settings: Settings,
    /// Why the configuration is invalid.
    pub(super) fault: Option<String>,
    /// Principals whose users do not exist there.
    pub(super) absent: Vec<String>,
    /// The newest kernel.
    pub(super) release: Option<String>,
    /// Its options that are `y` or `m`.
    pub(super) options: BTreeMap<String, char>,
    /// Its modules, built in ones too, by name.
    pub(super) modules: BTreeSet<String>,
    /// Files of ours that are missing.
    pub(super) missing: Vec<String>,
    /// Files of ours that others can write.
    pub(super) writable: Vec<String>,
    /// Pieces of earlier firewalls.
    pub(super) old: Vec<String>,
    pub(super) gaps: Gaps,
}

/// Options of a kernel's configuration that a feature takes, each with its module where it can be one.
pub(super) const OPTIONS: [(Feature, &str, &str); 19] = [
    (Feature::BpfSyscall, "BPF_SYSCALL", ""),
    (Feature::CgroupSockAddr, "CGROUPS", ""),
    (Feature::CgroupSockAddr, "CGROUP_BPF", ""),
    (Feature::CgroupSockAddr, "INET", ""),
    (Feature::Bpffs, "BPF_SYSCALL", ""),
    (Feature::SocketOwner, "DEBUG_INFO_BTF", ""),
    (Feature::NfTables, "NF_TABLES", "nf_tables"),
    (Feature::NfTables, "NF_TABLES_INET", ""),
    (Feature::NftForward, "NF_TABLES_IPV4", ""),
    (Feature::NftForward, "NF_TABLES_IPV6", ""),
    (Feature::NftReject, "NFT_REJECT", "nft_reject"),
    (Feature::NftReject, "NFT_REJECT_INET", "nft_reject_inet"),
    (Feature::NftLimit, "NFT_LIMIT", "nft_limit"),
    (Feature::NftLog, "NFT_LOG", "nft_log"),
    (Feature::NftLog, "NETFILTER_NETLINK_LOG", "nfnetlink_log"),
    (Feature::NftSocketCgroup, "NFT_SOCKET", "nft_socket"),
    (Feature::SockDiag, "INET_DIAG", "inet_diag"),
    (Feature::SockDiag, "INET_TCP_DIAG", "tcp_diag"),
    (Feature::SockDestroy, "INET_DIAG_DESTROY", ""),
];

/// What the package brings without which nothing is enforced: the program and its units.
pub(super) const FILES: [&str; 3] = [
    "usr/sbin/enforcer",
    "usr/lib/systemd/system/enforcer-early.service",
    "usr/lib/systemd/system/enforcer.service",
];
/// Links by which the units are switched on.
pub(super) const LINKS: [&str; 2] = [
    "etc/systemd/system/sysinit.target.wants/enforcer-early.service",
    "etc/systemd/system/multi-user.target.wants/enforcer.service",
];

impl Image {
    /// Looks at an image below `root`; `config` is the file's path in it.
    pub(super) fn collect(root: &Path, config: &Path) -> io::Result<Self> {
        fs::read_dir(root)?;
        let inside = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
        let (named, config) = (config, inside(config));
        // As on a host (B1).
        let read = if named == Path::new(DEFAULT_PATH) {
            Config::load_in(root, &config)
        } else {
            Config::load_to_check(&config)
        };
        let Read {
            settings,
            absent,
            policy,
        } = Read::of(read, &config, &FileUsers::below(root).unwrap_or_default());
        let settings = settings.unwrap_or_default();
        let ours = FILES.map(|path| root.join(path)).into_iter();
        let ours = ours.chain([config.clone(), inside(&settings.state_dir)]);
        let ours = ours.chain(config.parent().map(Path::to_path_buf));
        let ours = ours.chain(config::beside(&config));
        let writable = ours.filter_map(|path| {
            // Unpacked by another user than root, an image shows nothing of owners.
            let mode = fs::metadata(&path).ok()?.mode() & 0o7777;
            (mode & 0o022 != 0).then(|| format!("{} has mode {mode:04o}", path.display()))
        });
        // A link may lead to where only the image itself is the root.
        let missing = FILES.into_iter().chain(LINKS);
        let missing = missing.filter(|path| root.join(path).symlink_metadata().is_err());
        let mut this = Self {
            root: root.into(),
            fault: policy.err(),
            absent,
            missing: missing.map(|path| format!("/{path}")).collect(),
            writable: writable.collect(),
            old: old_rules::files(root),
            config,
            settings,
            ..Self::default()
        };
        this.read_kernel();
        Ok(this)
    }

    /// The newest kernel's configuration and modules.
    fn read_kernel(&mut self) {
        let entries = |dir: &str| fs::read_dir(self.root.join(dir)).into_iter().flatten().flatten();
        let name = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
        let of_boot = entries("boot").filter_map(|entry| {
            let release = name(&entry).strip_prefix("config-")?.to_owned();
            Some((release, entry.path()))
        });
        let of_modules = ["lib/modules", "usr/lib/modules"].into_iter().flat_map(entries);
        let of_modules = of_modules.map(|entry| (name(&entry), entry.path().join("config")));
        let configs = of_boot.chain(of_modules).filter(|(_, config)| config.is_file());
        let Some((release, config)) = configs.max_by_key(|(release, _)| version(release)) else {
            let why = "there is neither boot/config-* nor lib/modules/*/config below ";
            let why = format!("{why}{}", self.root.display());
            return self.gaps.add("the kernel's configuration", why);
        };
        self.options = options(&fs::read_to_string(&config).unwrap_or_default());
        let dirs = ["lib/modules", "usr/lib/modules"].map(|dir| self.root.join(dir).join(&release));
        if let Some(dir) = dirs.iter().find(|dir| dir.is_dir()) {
            let lists = ["modules.builtin", "modules.dep"].map(|list| fs::read_to_string(dir.join(list)));
            self.modules = lists.iter().flatten().flat_map(|list| modules(list)).collect();
        } else {
            let what = format!("modules of {release}");
            self.gaps.add(&what, "there is no lib/modules of that name");
        }
        self.release = Some(release);
    }

    pub(super) fn report(self) -> Report {
        let missing = self.missing_options();
        let facts = self.facts(&missing);
        let options = missing.iter().flat_map(|(feature, missing)| {
            let title = feature.about().title;
            missing.iter().map(move |option| format!("{option}: {title}"))
        });
        let mut findings = Findings::default();
        of_configuration(
            self.fault.as_deref(),
            StartWithout::NothingSaved,
            &self.absent,
            &mut findings,
        );
        findings.each(
            "kernel-options",
            Medium,
            "the kernel is built without options, or the image lacks modules, that enforcer uses",
            options,
            "use a kernel with them, or add the package with its modules (linux-modules-extra, say)",
        );
        findings.each(
            "files-missing",
            High,
            "parts of enforcer are missing from the image",
            self.missing,
            "install the package, and switch its units on (systemctl --root=DIR enable enforcer-early enforcer)",
        );
        findings.each(
            "files-writable",
            High,
            "other users than root can write files of enforcer",
            self.writable,
            "chmod go-w them",
        );
        findings.each(
            "old-stemcell-rules",
            Medium,
            "the image installs rules of an earlier firewall, or tools that rely on them",
            self.old,
            "remove them where enforcer guards the same endpoints",
        );
        let host = HostReport {
            root: Some(self.root.display().to_string()),
            kernel: self.release.unwrap_or_else(|| "none found".to_owned()),
            config: self.config.display().to_string(),
            ..HostReport::default()
        };
        findings.report(host, &facts, self.settings.backend, self.gaps)
    }

    /// What each feature lacks; nothing where no kernel was found.
    fn missing_options(&self) -> BTreeMap<Feature, Vec<String>> {
        let mut all: BTreeMap<Feature, Vec<String>> = BTreeMap::new();
        for (feature, option, module) in OPTIONS.into_iter().filter(|_| self.release.is_some()) {
            let missing = match self.options.get(option) {
                Some('y') => None,
                // A module must be in the image, where its list could be read.
                Some(_) if self.modules.is_empty() || self.modules.contains(module) => None,
                Some(_) => Some(format!("module {module} (CONFIG_{option}) is not there")),
                None => Some(format!("CONFIG_{option} is not set")),
            };
            all.entry(feature).or_default().extend(missing);
        }
        all
    }

    fn facts(&self, missing: &BTreeMap<Feature, Vec<String>>) -> Facts {
        let mut facts = Facts::default();
        for (feature, missing) in missing {
            let why = missing.join(", ");
            let is_there = missing.is_empty();
            facts.set(
                *feature,
                if is_there {
                    Fact::Supported
                } else {
                    Fact::Missing { why }
                },
            );
        }
        if self.release.is_none() {
            for feature in [Feature::BpfSyscall, Feature::NfTables] {
                let why = "no configuration of a kernel was found".to_owned();
                facts.set(feature, Fact::Inconclusive(why));
            }
        }
        facts
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
