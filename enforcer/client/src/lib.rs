//! For programs that connect to what `enforcer` protects: they ask for a refresh before each connection (B3).
//!
//! Builds with stable Rust alone: no BPF, no C library, no build script of its own. Without the feature `tokio` it
//! needs no runtime.
//!
//! The daemon runs as root, and so does its caller. Nothing is sent to another user's process that listens on the
//! socket. Here a thread stands for the daemon:
//!
//! ```
//! use std::{io::{BufRead, BufReader, Write}, os::unix::net::UnixListener, thread, time::Duration};
//! use enforcer_client::{AskError, State, refresh_blocking};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! let socket = dir.path().join("control.sock");
//! let listener = UnixListener::bind(&socket)?;
//! thread::spawn(move || -> std::io::Result<()> {
//!     let (mut stream, _) = listener.accept()?;
//!     let mut request = String::new();
//!     BufReader::new(&stream).read_line(&mut request)?;
//!     assert_eq!(request, "{\"request\":\"refresh\"}\n");
//!     stream.write_all(b"{\"status\":{\"state\":\"enforcing\",\"causes\":[],\"generation\":7}}\n")
//! });
//!
//! match refresh_blocking(&socket, Duration::from_secs(10)) {
//!     Ok(status) => assert_eq!((status.state, status.generation), (State::Enforcing, 7)),
//!     // Run by a user, the thread and the directory are that user's. They are asked nothing.
//!     Err(AskError::Impostor { uid, .. }) => assert_ne!(uid, 0),
//!     Err(error) => return Err(error.into()),
//! }
//! # Ok(())
//! # }
//! ```

pub mod ask;
pub mod trust;
pub mod wire;

#[cfg(test)]
mod tests;

use std::{path::Path, time::Duration};

use serde::Deserialize;

pub use crate::{
    ask::{Ask, AskError},
    wire::{Request, State, Status},
};

/// Where the daemon answers unless the configuration names another socket.
pub const DEFAULT_SOCKET: &str = "/run/enforcer/control.sock";

/// The answer to [`Request::Refresh`].
#[derive(Deserialize)]
struct Refreshed {
    status: Status,
}

/// Asks the daemon on `socket` to look all names up now, and returns when the kernel holds the result: a client that
/// connects then is checked against the addresses that a resolver answers now (B3). Root only. Inside a runtime it
/// blocks a thread of it.
///
/// A name that could not be looked up is no error: the status is then [`State::Degraded`], its causes say why, and the
/// addresses known before stay protected (N3). An error means that no daemon of root's answered within `timeout`, which
/// bounds all of it, or that the result could not be enforced.
///
/// ```no_run
/// use std::{path::Path, time::Duration};
/// use enforcer_client::{DEFAULT_SOCKET, refresh_blocking};
///
/// let status = refresh_blocking(Path::new(DEFAULT_SOCKET), Duration::from_secs(10))?;
/// for cause in &status.causes {
///     eprintln!("{cause}");
/// }
/// // Now connect.
/// # Ok::<(), enforcer_client::AskError>(())
/// ```
pub fn refresh_blocking(socket: &Path, timeout: Duration) -> Result<Status, AskError> {
    let answer = Ask::new(socket, &Request::Refresh, timeout).answer_blocking();
    answer.map(|Refreshed { status }| status)
}

/// As [`refresh_blocking`], for programs with a tokio runtime, whose I/O and time drivers are enabled.
///
/// ```no_run
/// # use std::{path::Path, time::Duration};
/// # async fn connect() -> Result<(), enforcer_client::AskError> {
/// let socket = Path::new(enforcer_client::DEFAULT_SOCKET);
/// enforcer_client::refresh(socket, Duration::from_secs(10)).await?;
/// # Ok(())
/// # }
/// ```
#[cfg(feature = "tokio")]
pub async fn refresh(socket: &Path, timeout: Duration) -> Result<Status, AskError> {
    let answer = Ask::new(socket, &Request::Refresh, timeout).answer().await;
    answer.map(|Refreshed { status }| status)
}
