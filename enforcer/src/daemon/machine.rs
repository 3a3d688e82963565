//! What a daemon takes from the machine below it; its tests have one that is made up.

use crate::backend::{BackendError, Enforcement, Start, Store};

/// What a daemon takes from the machine that it runs on.
pub(super) trait Machine {
    /// Takes over what enforces, or makes it.
    fn take_over(&self, start: Start<'_>) -> Result<Box<dyn Store>, BackendError>;
}

/// The kernel below.
pub(super) struct ThisMachine;

impl Machine for ThisMachine {
    fn take_over(&self, start: Start<'_>) -> Result<Box<dyn Store>, BackendError> {
        Enforcement::take_over(start)
    }
}
