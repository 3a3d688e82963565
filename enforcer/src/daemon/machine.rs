//! What a daemon takes from the machine below it; its tests have one that is made up.

use std::path::Path;

use tokio::net::UnixListener;

use crate::{
    backend::{BackendError, Enforcement, Start, Store},
    control::{self, ControlError},
};

/// What a daemon takes from the machine that it runs on.
pub(super) trait Machine {
    /// Takes over what enforces, or makes it.
    fn take_over(&self, start: Start<'_>) -> Result<Box<dyn Store>, BackendError>;
    /// Binds the control socket.
    fn listen(&self, socket: &Path) -> Result<UnixListener, ControlError>;
}

/// The kernel below, and the file system.
pub(super) struct ThisMachine;

impl Machine for ThisMachine {
    fn take_over(&self, start: Start<'_>) -> Result<Box<dyn Store>, BackendError> {
        Enforcement::take_over(start)
    }

    fn listen(&self, socket: &Path) -> Result<UnixListener, ControlError> {
        control::listen(socket)
    }
}
