//! What enforcer keeps in the file system: who can write it, whether the host sees it, and how much of the host it
//! covers.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{
    findings::{Findings, Gaps},
    instance::Instance,
};
use crate::{
    config::Backend,
    host::{self, hierarchy},
    ruleset::Host,
    text,
    visibility::{Asset, Visibility},
    wire::{
        ActiveBackend,
        doctor::Weight::{High, Low, Medium},
    },
};

/// What was seen of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Files {
    pub(super) owned: Vec<Owned>,
    pub(super) visibility: Visibility,
    /// Processes that are not covered where only a part of the host is (F9).
    pub(super) outside: Vec<String>,
}

/// A file or directory of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owned {
    pub(super) kind: Kind,
    pub(super) path: PathBuf,
    pub(super) uid: u32,
    pub(super) mode: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The directory that contains the pin directory.
    Bpffs,
    /// The pin directory and all in it.
    Pins,
    State,
    SocketDir,
    Socket,
}

impl Owned {
    /// Whether another user may do what some bits of the mode say.
    fn lets(&self, bits: u32) -> bool {
        self.uid != 0 || self.mode & bits != 0
    }

    /// Whether other users may add files and not touch those of others.
    fn is_sticky(&self) -> bool {
        self.uid == 0 && self.mode & 0o1000 != 0
    }
}

impl Files {
    pub(super) fn collect(instance: &Instance, gaps: &mut Gaps) -> Self {
        let settings = &instance.settings;
        let has_ebpf = instance
            .active
            .map_or(settings.backend != Backend::Nftables, ActiveBackend::has_ebpf);
        // Pins that do not exist yet, where no bpffs does, are the feature's matter.
        let ebpf_on = instance.cgroup.as_deref();
        let ebpf_on = ebpf_on.filter(|_| has_ebpf && settings.pin_dir.exists());
        let visibility = Visibility::of(settings, ebpf_on, true);
        let shown = instance.hierarchy.as_ref().map(|found| found.shown.as_path());
        let outside = shown.filter(|_| visibility.part.is_some()).map(hierarchy::outside);
        let name = |pid| format!("{pid} ({})", text::name(&host::task_name(pid)));
        let mut owned = Vec::new();
        let mut look = |kind, path: &Path| match fs::symlink_metadata(path) {
            Ok(meta) => owned.push(Owned {
                kind,
                path: path.into(),
                uid: meta.uid(),
                mode: meta.mode() & 0o7777,
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => gaps.add(&path.display().to_string(), error),
        };
        look(Kind::State, &settings.state_dir);
        look(Kind::Socket, &settings.socket);
        // With nftables alone nothing need be there.
        if let Some(dir) = settings.pin_dir.parent().filter(|dir| host::is_bpffs(dir)) {
            look(Kind::Bpffs, dir);
        }
        if let Some(dir) = settings.socket.parent() {
            look(Kind::SocketDir, dir);
        }
        look(Kind::Pins, &settings.pin_dir);
        let mut dirs = vec![settings.pin_dir.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                look(Kind::Pins, &entry.path());
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    dirs.push(entry.path());
                }
            }
        }
        Self {
            owned,
            visibility,
            outside: outside.into_iter().flatten().map(name).collect(),
        }
    }

    pub(super) fn findings(&self, host: &Host, findings: &mut Findings) {
        self.modes(findings);
        if let Some(part) = &self.visibility.part {
            let outside = self
                .outside
                .iter()
                .map(|process| format!("not covered: process {process}"));
            findings.each(
                "part-of-host",
                High,
                "only a part of the host is covered: the root of the cgroup v2 hierarchy is not mounted here and no \
                 cgroup is configured, so processes elsewhere can connect to every endpoint",
                std::iter::once(format!("covered: cgroups below {}", part.display())).chain(outside),
                "run enforcer in the host's cgroup and mount namespace (docker run --cgroupns=host -v \
                 /sys/fs/cgroup:/sys/fs/cgroup), or mount the root there; set cgroup to that path if no more is meant",
            );
        }
        // What must outlive the process, or be found by others (F1).
        let hidden = &self.visibility.hidden;
        let pins = hidden.iter().any(|hidden| hidden.kept == Asset::Pins);
        findings.each(
            "hidden-from-host",
            if pins { High } else { Medium },
            "files of enforcer exist only in its own mount namespace: they end with it, and other processes do not \
             find them",
            hidden.iter().map(ToString::to_string),
            "do what each line says; under systemd check PrivateTmp=, ProtectSystem= and TemporaryFileSystem= of the \
             unit",
        );
        findings.each(
            "host-unknown",
            Low,
            "it is unknown whether the host sees enforcer's pins, state and socket",
            self.visibility.unknown.clone().filter(|_| hidden.is_empty()),
            "let root read /proc/1/mountinfo (mount /proc without hidepid=, or with gid=0); in a container, share the \
             host's PID namespace or bind-mount /sys/fs/bpf, state_dir and the socket's directory from the host",
        );
        // A user could make them anew or move into them (F6).
        findings.each(
            "cgroup-writable",
            Medium,
            "cgroups of principals or grants are writable by other users than root: they match nobody",
            host.writable.iter().map(|(path, by)| format!("{path}: {by}")),
            "chown root and chmod go-w the cgroup, cgroup.procs and cgroup.threads in it and in each ancestor; or use \
             a cgroup that is not delegated",
        );
    }

    fn modes(&self, findings: &mut Findings) {
        let of = |is_bad: fn(&Owned) -> bool| -> Vec<String> {
            let bad = self.owned.iter().filter(|file| is_bad(file));
            bad.map(|file| {
                format!(
                    "{} is owned by uid {} with mode {:04o}",
                    file.path.display(),
                    file.uid,
                    file.mode
                )
            })
            .collect()
        };
        findings.each(
            "bpffs-open",
            High,
            "other users can write the directory that contains the pin directory, and replace it",
            of(|file| file.kind == Kind::Bpffs && file.lets(0o022) && !file.is_sticky()),
            "mount -o remount,mode=0700 on that bpffs (or chmod 0700, chown root), then restart the daemon",
        );
        findings.each(
            "bpffs-shared",
            Low,
            "other users can create files beside the pin directory; the sticky bit protects it",
            of(|file| file.kind == Kind::Bpffs && file.lets(0o022) && file.is_sticky()),
            "mount -o remount,mode=0700 on that bpffs, unless other users need it",
        );
        findings.each(
            "pins-open",
            High,
            "other users can open enforcer's pins: they can detach its programs or change its rules",
            of(|file| file.kind == Kind::Pins && file.lets(0o077)),
            "chown root and chmod 0700 the directories, 0600 the pins; then check the rules with enforcer verify",
        );
        findings.each(
            "state-open",
            Medium,
            "other users can write the saved rules and grants: enforcer does not use them until that is fixed",
            of(|file| file.kind == Kind::State && file.lets(0o022)),
            "chown root and chmod 0700 it, and check last-good.json and grants.json in it",
        );
        findings.each(
            "socket-open",
            Medium,
            "other users can reach or replace the control socket: the daemon answers only root and enforcer trusts \
             only root's socket, but other programs may trust a replacement",
            of(|file| match file.kind {
                Kind::SocketDir => file.lets(0o022),
                Kind::Socket => file.lets(0o077),
                Kind::Bpffs | Kind::Pins | Kind::State => false,
            }),
            "chown root and chmod 0700 the directory, 0600 the socket; restart the daemon",
        );
    }
}
