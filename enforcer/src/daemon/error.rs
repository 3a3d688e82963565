//! Why the daemon cannot start, or cannot make a configuration active.

use std::{io, path::PathBuf};

use crate::{
    backend::BackendError, config::Mistakes, control::ControlError, host, inputs::InputError, state::StateError, text,
};

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

impl DaemonError {
    /// Each thing that is wrong with what the configuration says, if that is why.
    pub(crate) fn mistakes(&self) -> Option<&Mistakes> {
        match self {
            Self::Input(error) => error.mistakes(),
            Self::Backend(_)
            | Self::Control(_)
            | Self::State(_)
            | Self::Frozen
            | Self::FixedKeys { .. }
            | Self::Io { .. } => None,
        }
    }

    /// In as many lines as there are mistakes, each escaped so that it is one.
    pub(super) fn lines(&self) -> Vec<String> {
        let lines = self.mistakes().map_or_else(|| vec![self.to_string()], Mistakes::lines);
        lines.iter().map(|line| text::line(line).into_owned()).collect()
    }
}
