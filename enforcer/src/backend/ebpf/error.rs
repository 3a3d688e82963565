//! Why the kernel does not hold what was asked for, and what to do about it.

use std::{io, path::PathBuf};

use crate::{
    backend::writer::Holder,
    host::{START, remedy},
};

/// Why the kernel does not hold what was asked for. What was in force before still is (F4).
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A file operation.
    #[error("{action} {}: {error}{}", object.display(), remedy(error))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        object: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// Somebody else could write where our pins lie (F6).
    #[error("{} is owned by uid {uid} with mode {mode:04o}; it must be a directory of root's with mode 0700: remove it, or name another pin_dir", path.display())]
    Untrusted {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// Pins can lie on a bpffs only.
    #[error("pin_dir {} is not on a bpffs; mount one there (mount -t bpf bpf DIRECTORY), or name a pin_dir directly below /sys/fs/bpf", path.display())]
    NotBpffs {
        /// The directory.
        path: PathBuf,
    },
    /// A bpffs that is missing must not be mounted where it would not last (F1).
    #[error(
        "no bpffs is mounted on /sys/fs/bpf, and {why}; mount it on the host (mount -t bpf bpf /sys/fs/bpf), then start enforcer again"
    )]
    PrivateMounts {
        /// What is wrong with mounting it here.
        why: String,
    },
    /// Another process writes (F11).
    #[error("{} is in use by another enforcer{}; if that is the daemon, reload it (SIGHUP), or stop it first; else try again once it has ended", path.display(), by(holder.as_ref()))]
    Busy {
        /// What it has locked.
        path: PathBuf,
        /// Which one, where it can be seen from here.
        holder: Option<Holder>,
    },
    /// A pin is not the map that its name says, or is missing among others.
    #[error("{} is missing, or is no map of this version of enforcer; what is in force stays: restart the daemon, which takes over without a gap, or run enforcer unload", path.display())]
    Damaged {
        /// The pin.
        path: PathBuf,
    },
    /// The programs in force read maps of another layout.
    #[error("another version of enforcer (map layout {layout}) enforces; to take over with this one, {START}")]
    OtherVersion {
        /// Which layout.
        layout: String,
    },
    /// A map operation.
    #[error("{action} map {map}: {error}{}", remedy(error))]
    Map {
        /// What was tried.
        action: &'static str,
        /// On which map.
        map: &'static str,
        /// Why not.
        error: io::Error,
    },
    /// The kernel holds something else than was written (F3).
    #[error("map {map} does not hold what was written to it; reload enforcer; if it stays, run enforcer verify")]
    ReadBack {
        /// Which map.
        map: &'static str,
    },
    /// The cgroup to attach to.
    #[error("open cgroup {}: {error}; name a directory of the cgroup v2 hierarchy with `cgroup`", path.display())]
    Cgroup {
        /// Its path.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// There is none to attach to.
    #[error("no cgroup v2 hierarchy is mounted; mount one (mount -t cgroup2 none /sys/fs/cgroup)")]
    NoCgroup2,
    /// The programs do not load.
    #[error(
        "load {program}: {source}; enforcer needs Linux 5.8 with BPF, and root (CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN)"
    )]
    Load {
        /// Which one.
        program: &'static str,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A program does not attach.
    #[error("attach {hook} to {}: {error}{}", cgroup.display(), attach_hint(error))]
    Attach {
        /// Which hook.
        hook: &'static str,
        /// To what.
        cgroup: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// The nftables half or backend.
    #[error(transparent)]
    Nftables(#[from] crate::backend::nftables::NftablesError),
    /// One half of two.
    #[error("the {name} half of backend = \"both\": {error}; the rule set before stays in force on both")]
    Half {
        /// Which one.
        name: &'static str,
        /// Why not.
        error: Box<BackendError>,
    },
    /// No backend works here.
    #[error("no backend works here; ebpf: {ebpf}; nftables: {nftables}")]
    Neither {
        /// Why ebpf does not.
        ebpf: Box<str>,
        /// Why nftables does not.
        nftables: Box<BackendError>,
    },
}

impl BackendError {
    /// Whether another process enforces there.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        let half = |error: &Self| matches!(error, Self::Busy { .. });
        half(self) || matches!(self, Self::Half { error, .. } if half(error))
    }

    /// Whether this kernel, where we run on it, or what we may do with it, is the cause, and not something of ours that needs mending.
    #[must_use]
    pub fn is_inability(&self) -> bool {
        match self {
            Self::NoCgroup2 | Self::PrivateMounts { .. } | Self::Load { .. } | Self::Attach { .. } => true,
            // Without BPF there is no bpffs either; with it, a wrong place is the configuration's fault.
            Self::Io { .. } | Self::NotBpffs { .. } => super::sys::wait_for_programs().is_err(),
            Self::Map { error, .. } => error.raw_os_error() == Some(libc::EPERM),
            Self::Untrusted { .. }
            | Self::Busy { .. }
            | Self::Damaged { .. }
            | Self::OtherVersion { .. }
            | Self::ReadBack { .. }
            | Self::Cgroup { .. }
            | Self::Nftables(_)
            | Self::Half { .. }
            | Self::Neither { .. } => false,
        }
    }

    /// The message up to its advice.
    #[must_use]
    pub fn without_hint(&self) -> Box<str> {
        let text = self.to_string();
        text.split("; ").next().unwrap_or_default().into()
    }
}

fn by(holder: Option<&Holder>) -> String {
    holder.map_or_else(String::new, |holder| format!(", {holder}"))
}

fn attach_hint(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied {
        " (another program there or above forbids sharing the cgroup: list them with `bpftool cgroup show`, and have its owner attach with BPF_F_ALLOW_MULTI; or CAP_NET_ADMIN is missing)"
    } else {
        ""
    }
}
