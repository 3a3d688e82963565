//! Why the daemon cannot start, or cannot put a configuration in force.

use std::{io, path::PathBuf};

use crate::{
    backend::BackendError, config::ConfigError, control::ControlError, host, policy::PolicyError,
    ruleset::CompileError, state::StateError,
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
    /// A cgroup that a principal names.
    #[error("{}: cgroup {cgroup} does not exist below {}; make it first, or start enforcer after the unit that does", path.display(), mount.display())]
    NoCgroup {
        /// The configuration file.
        path: PathBuf,
        /// The cgroup.
        cgroup: String,
        /// Where cgroups are looked for.
        mount: PathBuf,
    },
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
