//! What can be wrong with a BOSH agent's settings. Nothing here holds a value of a file, but for a URL without credentials.

use std::{io, path::PathBuf};

use thiserror::Error;

use super::{MAX_BYTES, MAX_URLS};

/// Settings that do not say where the message bus is.
#[derive(Debug, Error)]
#[error("{}: {fault}", path.display())]
pub struct BoshError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    pub fault: BoshFault,
}

/// What is wrong with a file.
#[derive(Debug, Error)]
pub enum BoshFault {
    /// It is not there, or not yet.
    #[error("no such file")]
    Missing,
    /// Whatever is behind it could be anybody's.
    #[error("a symbolic link, which is not followed; put the file there itself")]
    Link,
    /// A directory, a FIFO.
    #[error("not a regular file; put the agent's settings there")]
    NotAFile,
    /// Somebody else could have written it.
    #[error("owned by uid {uid} with mode {mode:04o}, so it is not trusted; make it root's and writable by root alone")]
    Untrusted {
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// F7.
    #[error("longer than {} MiB; no agent's settings are", MAX_BYTES >> 20)]
    TooLong,
    /// A file operation.
    #[error("read: {0}")]
    Read(io::Error),
    /// Not JSON. The parser gives line and column and quotes nothing.
    #[error("not JSON, or not whole: {0}")]
    Json(serde_json::Error),
    /// A value of another kind.
    #[error("{} is {found} instead of {expected}", if key.is_empty() { "the whole" } else { key })]
    Kind {
        /// `env.bosh.mbus`.
        key: String,
        /// What it is.
        found: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// Nothing of a message bus in it.
    #[error("neither mbus nor env.bosh.mbus.urls names a message bus")]
    NoUrl,
    /// A URL that cannot be protected.
    #[error("message-bus URL {url}: {problem}; expected nats://, tls:// or tcp:// with HOST:PORT")]
    Url {
        /// The URL without credentials.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// F7.
    #[error("{found} message-bus URLs are more than the maximum of {MAX_URLS}")]
    TooMany {
        /// How many.
        found: usize,
    },
}

impl BoshError {
    /// Whether the file is not there, or says nothing yet: no fault while a machine starts.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self.fault, BoshFault::Missing)
    }
}
