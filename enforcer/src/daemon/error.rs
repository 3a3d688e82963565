//! Why the daemon cannot start, or cannot put a configuration in force.

use std::{io, path::PathBuf};

use crate::{
    backend::BackendError,
    config::{ConfigError, PolicyError},
    control::ControlError,
    host,
    ruleset::CompileError,
    state::StateError,
};

/// Why the daemon cannot start, or an attempt to put a configuration in force failed.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The configuration file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What it says.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// A limit.
    #[error("{}: {error}", path.display())]
    Compile {
        /// The configuration file.
        path: PathBuf,
        /// Which limit.
        error: CompileError,
    },
    /// The kernel.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The last rule set known good.
    #[error(transparent)]
    State(#[from] StateError),
    /// What is in force is not known here.
    #[error(
        "what is in force is newer than the last rule set known good, and stays as it is until the configuration is mended"
    )]
    Frozen,
    /// Keys that hold for the whole run have changed.
    #[error("{}: {} cannot change while enforcer runs; restart it", path.display(), keys.join(", "))]
    FixedKeys {
        /// The configuration file.
        path: PathBuf,
        /// Which keys.
        keys: Vec<&'static str>,
    },
    /// No cgroup v2 at all.
    #[error(
        "no cgroup v2 hierarchy is mounted; mount one (mount -t cgroup2 none /sys/fs/cgroup), or name its directory with `cgroup`"
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
