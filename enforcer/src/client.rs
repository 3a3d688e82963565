//! For programs that connect to what is protected: they ask for a refresh before each connection (B3).

use std::{path::Path, time::Duration};

use crate::{
    control::{self, ControlError, Reply, Request},
    status::Status,
};

/// Where the daemon answers unless the configuration names another socket.
pub const DEFAULT_SOCKET: &str = "/run/enforcer/control.sock";

/// Asks the daemon on `socket` to look all names up now, and returns when the kernel holds the result: whoever connects then is
/// judged by the addresses that a resolver answers now (B3). Root only.
///
/// A name that could not be looked up is no error: the status is then [`Degraded`](crate::status::State::Degraded), its
/// causes say why, and the addresses known before stay protected (N3). An error means that no daemon answered within `timeout`, or
/// that what was looked up could not be put in force.
///
/// ```no_run
/// use std::{path::Path, time::Duration};
///
/// # async fn connect() -> Result<(), Box<dyn std::error::Error>> {
/// let status = enforcer::refresh(Path::new(enforcer::DEFAULT_SOCKET), Duration::from_secs(10)).await?;
/// for cause in &status.causes {
///     eprintln!("{cause}");
/// }
/// // Now connect.
/// # Ok(())
/// # }
/// ```
pub async fn refresh(socket: &Path, timeout: Duration) -> Result<Status, ControlError> {
    match control::ask(socket, &Request::Refresh, timeout).await? {
        Reply::Status(status) => Ok(*status),
        Reply::Event(_)
        | Reply::Grant(_)
        | Reply::Revoked(_)
        | Reply::Grants(_)
        | Reply::Verification(_)
        | Reply::Done
        | Reply::Error(_) => Err(ControlError::Protocol { path: socket.into() }),
    }
}

/// As [`refresh`], for programs without a runtime; inside one it would block a thread of it.
///
/// ```no_run
/// # use std::{path::Path, time::Duration};
/// enforcer::refresh_blocking(Path::new(enforcer::DEFAULT_SOCKET), Duration::from_secs(10))?;
/// # Ok::<(), enforcer::control::ControlError>(())
/// ```
pub fn refresh_blocking(socket: &Path, timeout: Duration) -> Result<Status, ControlError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| ControlError::Io {
            action: "start a runtime to ask",
            path: socket.into(),
            error,
        })?;
    runtime.block_on(refresh(socket, timeout))
}
