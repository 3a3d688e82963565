//! What can be wrong with a BOSH agent's settings. Nothing here holds a value of a file, but for a URL without
//! credentials.

use std::{io, path::PathBuf};

use thiserror::Error;

use super::{MAX_BYTES, MAX_URLS};
use crate::policy::EndpointFault;

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
    #[error("no such file yet: the agent writes it; or set its directory with `dir` in [bosh]")]
    Missing,
    /// Whatever is behind it could be anybody's.
    #[error("a symbolic link, which is not followed; put the file itself there")]
    Link,
    /// A directory, a FIFO.
    #[error("not a regular file; put the agent's settings there")]
    NotAFile,
    /// Another user could have written it.
    #[error(
        "owned by uid {uid} with mode {mode:04o}, so it is not trusted; make root its owner and the only user who \
             can write it"
    )]
    Untrusted {
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// Members of a group could have written it.
    #[error(
        "mode {mode:04o} lets group {gid} write it, so it changes nothing that is known; make it writable by root only \
         (chmod g-w)"
    )]
    GroupWritable {
        /// The group.
        gid: u32,
        /// Its mode.
        mode: u32,
    },
    /// F7.
    #[error("longer than {} MiB, which an agent's settings never are", MAX_BYTES >> 20)]
    TooLong,
    /// A file operation.
    #[error("read: {0}; have the agent or the director write it again")]
    Read(io::Error),
    /// Not JSON. The parser gives line and column and quotes nothing.
    #[error("invalid or incomplete JSON: {0}; have the agent or the director write it again")]
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
    #[error("neither mbus nor env.bosh.mbus.urls names a message bus; set mbus, or configure [target.nats]")]
    NoUrl,
    /// A URL that cannot be protected.
    #[error("{key}: message-bus URL {url}: {fault}")]
    Url {
        /// `env.bosh.mbus.urls[1]`.
        key: String,
        /// The URL without credentials.
        url: String,
        /// What is wrong.
        fault: UrlFault,
    },
    /// F7.
    #[error(
        "more than the maximum of {MAX_URLS} message-bus URLs; the rest is not protected: configure [target.nats] with \
         prefixes"
    )]
    TooMany,
}

/// Why a URL cannot be protected.
#[derive(Debug, Error)]
pub enum UrlFault {
    /// `amqp://`.
    #[error("the scheme is not one of a message bus; use nats://, tls:// or tcp://")]
    Scheme,
    /// `10.0.0.0/8`, `local`.
    #[error("the host is neither an address nor a name; name each server")]
    Host,
    /// Anything else.
    #[error(transparent)]
    Endpoint(EndpointFault),
}

impl BoshError {
    /// Whether the file is not there, or says nothing yet: no fault while a machine starts.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self.fault, BoshFault::Missing)
    }

    /// Whether the file ends before its content does.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        matches!(&self.fault, BoshFault::Json(error) if error.is_eof())
    }
}
