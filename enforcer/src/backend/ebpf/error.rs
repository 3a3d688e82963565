//! Why the kernel does not hold what was asked for, and what to do about it.

use std::{fmt, io, path::PathBuf};

use crate::{
    backend::{nftables::NftablesError, writer::Holder},
    host::{START, remedy},
};

/// Why the kernel does not hold what was asked for. What was active before still is (F4).
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackendError {
    /// A file operation.
    Io {
        action: &'static str,
        object: PathBuf,
        error: io::Error,
    },
    /// Somebody else could write where our pins lie (F6).
    Untrusted { path: PathBuf, uid: u32, mode: u32 },
    /// Pins can lie on a bpffs only.
    NotBpffs { path: PathBuf },
    /// A bpffs that is missing must not be mounted where it would not last (F1).
    PrivateMounts {
        /// What is wrong with mounting it here.
        why: String,
    },
    /// Another process writes (F11).
    Busy {
        /// What it has locked.
        path: PathBuf,
        /// Which one, where it can be seen from here.
        holder: Option<Holder>,
    },
    /// A pin is not the map that its name says, or is missing among others.
    Damaged { path: PathBuf },
    /// The active programs read maps of another layout.
    OtherVersion { layout: String },
    /// A map operation.
    Map {
        action: &'static str,
        map: &'static str,
        error: io::Error,
    },
    /// The kernel holds something else than was written (F3).
    ReadBack { map: &'static str },
    /// The cgroup to attach to.
    Cgroup { path: PathBuf, error: io::Error },
    /// There is none to attach to.
    NoCgroup2,
    /// The programs do not load.
    Load {
        program: &'static str,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A program does not attach.
    Attach {
        hook: &'static str,
        cgroup: PathBuf,
        error: io::Error,
    },
    /// The nftables half or backend.
    Nftables(NftablesError),
    /// One half of two.
    Half {
        name: &'static str,
        error: Box<BackendError>,
    },
    /// No backend works here.
    Neither {
        ebpf: Box<str>,
        nftables: Box<BackendError>,
    },
}

impl From<NftablesError> for BackendError {
    fn from(error: NftablesError) -> Self {
        Self::Nftables(error)
    }
}

impl fmt::Display for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause())?;
        f.write_str(match self {
            Self::Io { error, .. } | Self::Map { error, .. } => remedy(error),
            Self::Untrusted { .. } => {
                "; it must be a directory of root's that nobody else can write: chown root, chmod 0700"
            }
            Self::NotBpffs { .. } => {
                "; mount one there (mount -t bpf bpf DIRECTORY), or set a pin_dir directly below /sys/fs/bpf"
            }
            Self::PrivateMounts { .. } => {
                "; mount it on the host (mount -t bpf bpf /sys/fs/bpf), then start enforcer again"
            }
            Self::Busy { .. } => {
                "; if that is the daemon, reload it (SIGHUP), or stop it first; else try again once it has ended"
            }
            Self::Damaged { .. } => "; what is active stays: restart the daemon, which takes over without a gap",
            Self::OtherVersion { .. } => return write!(f, "; to take over with this one, {START}"),
            Self::ReadBack { .. } => "; reload enforcer; if this persists, run enforcer verify",
            Self::Cgroup { .. } => "; name a directory of the cgroup v2 hierarchy with `cgroup`",
            Self::NoCgroup2 => "; mount one (mount -t cgroup2 none /sys/fs/cgroup)",
            Self::Load { .. } => "; enforcer needs Linux 5.8 with BPF, and root (CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN)",
            Self::Attach { error, .. } if error.kind() == io::ErrorKind::PermissionDenied => {
                " (another program there or above forbids sharing the cgroup: list them with `bpftool cgroup show`, \
                 and have its owner attach with BPF_F_ALLOW_MULTI; or CAP_NET_ADMIN is missing)"
            }
            Self::Half { .. } => "; the previous rules stay active on both",
            Self::Attach { .. } | Self::Nftables(_) | Self::Neither { .. } => "",
        })
    }
}

impl BackendError {
    /// What happened, without what to do about it.
    #[must_use]
    pub(crate) fn cause(&self) -> String {
        match self {
            Self::Io { action, object, error } => format!("{action} {}: {error}", object.display()),
            Self::Untrusted { path, uid, mode } => {
                format!("{} is owned by uid {uid} with mode {mode:04o}", path.display())
            }
            Self::NotBpffs { path } => format!("pin_dir {} is not on a bpffs", path.display()),
            Self::PrivateMounts { why } => format!("no bpffs is mounted on /sys/fs/bpf, and {why}"),
            Self::Busy { path, holder } => {
                let by = holder.as_ref().map(|holder| format!(", {holder}")).unwrap_or_default();
                format!("{} is in use by another enforcer{by}", path.display())
            }
            Self::Damaged { path } => {
                format!(
                    "{} is missing, or is not a map of this version of enforcer",
                    path.display()
                )
            }
            Self::OtherVersion { layout } => format!("another version of enforcer (map layout {layout}) enforces"),
            Self::Map { action, map, error } => format!("{action} map {map}: {error}"),
            Self::ReadBack { map } => format!("map {map} does not hold what was written to it"),
            Self::Cgroup { path, error } => format!("open cgroup {}: {error}", path.display()),
            Self::NoCgroup2 => "no cgroup v2 hierarchy is mounted".to_owned(),
            Self::Load { program, source } => format!("load {program}: {source}"),
            Self::Attach { hook, cgroup, error } => format!("attach {hook} to {}: {error}", cgroup.display()),
            Self::Nftables(error) => error.to_string(),
            Self::Half { name, error } => format!("the {name} half of backend = \"both\": {error}"),
            Self::Neither { ebpf, nftables } => format!("no backend works here; ebpf: {ebpf}; nftables: {nftables}"),
        }
    }

    /// Whether another process enforces there.
    #[must_use]
    pub(crate) fn is_busy(&self) -> bool {
        let half = |error: &Self| matches!(error, Self::Busy { .. });
        half(self) || matches!(self, Self::Half { error, .. } if half(error))
    }

    /// Whether this kernel, where we run on it, or what we may do with it, is the cause, and not something of ours that
    /// needs repairing. That it has BPF at all is asked only where that decides.
    #[must_use]
    pub(crate) fn is_inability(&self, has_bpf: impl FnOnce() -> bool) -> bool {
        match self {
            Self::NoCgroup2 | Self::PrivateMounts { .. } | Self::Load { .. } | Self::Attach { .. } => true,
            // Without BPF there is no bpffs either; with it, a wrong place is the configuration's fault.
            Self::Io { .. } | Self::NotBpffs { .. } => !has_bpf(),
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
}
