//! Why the daemon cannot start, or cannot make a configuration active.

use std::{io, path::PathBuf};

use crate::{backend::BackendError, control::ControlError, host, inputs::InputError, state::StateError};

/// Why the daemon cannot start, or an attempt to make a configuration active failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    /// What rules are made from.
    #[error(transparent)]
    Input(#[from] InputError),
    /// The kernel.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The last known good rule set.
    #[error(transparent)]
    State(#[from] StateError),
    /// The active rules are not those that this process knows.
    #[error("the active rules differ from the last known good ones and stay until a valid configuration is loaded")]
    Frozen,
    /// Keys that hold for the whole run have changed.
    #[error("{}: {} cannot change while enforcer runs; restart it", path.display(), keys.join(", "))]
    FixedKeys {
        /// The configuration file.
        path: PathBuf,
        /// Which keys.
        keys: Vec<&'static str>,
    },
    /// Something of the operating system.
    #[error("{action}: {error}{}", host::remedy(error))]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why not.
        error: io::Error,
    },
}
