//! Why a configuration comes to no rules on this host.

use std::{io, path::PathBuf};

use crate::{
    backend::BackendError,
    config::{ConfigError, Mistakes},
    grants::FileError,
    host,
    ruleset::CompileError,
};

/// Why a configuration comes to no rules on this host.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InputError {
    /// The configuration file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A limit.
    #[error("{}: {error}", path.display())]
    Compile {
        /// The configuration file.
        path: PathBuf,
        /// Which limit.
        error: CompileError,
    },
    /// Rules of jobs, in the kernel.
    #[error(transparent)]
    Jobs(#[from] BackendError),
    /// The grants on disk, where no daemon has them.
    #[error(
        "{error}; no daemon runs now: what the kernel holds stays as it is, grants among it, until it starts \
         (systemctl start enforcer, or sv start enforcer), which takes no grant from this file"
    )]
    Grants {
        /// What is wrong with the file, and what to do.
        error: FileError,
    },
    /// No cgroup v2 at all.
    #[error(
        "no cgroup v2 hierarchy is mounted; mount one (mount -t cgroup2 none /sys/fs/cgroup), or name its directory \
         with `cgroup`"
    )]
    NoCgroup2,
    /// Something of the operating system.
    #[error("{action}: {error}{}", host::remedy(error))]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why not.
        error: io::Error,
    },
}

impl InputError {
    /// Each thing that is wrong with what the configuration says, if that is why.
    pub(crate) fn mistakes(&self) -> Option<&Mistakes> {
        match self {
            Self::Config(error) => error.mistakes(),
            Self::Compile { .. } | Self::Jobs(_) | Self::Grants { .. } | Self::NoCgroup2 | Self::Io { .. } => None,
        }
    }
}
