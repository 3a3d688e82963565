//! What can be wrong with a configuration file. Every message is one line: where, what, and what to do.

use std::{io, path::PathBuf, time::Duration};

use humantime::format_duration;
use thiserror::Error;

use super::{MAX_BYTES, MAX_SOCKET_PATH, MAX_TABLE_NAME, MAX_TARGET_NAME};
use crate::policy::{MAX_NAT64, Nat64Error};

/// A configuration that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// There is no file.
    #[error("read {}: no such file; write it or name another with --config", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// There was one, by what was in force last.
    #[error("{} is gone, and what it named was in force last; write it again, or run enforcer unload and remove last-good.json in the state directory if the defaults are meant", path.display())]
    Gone {
        /// The file.
        path: PathBuf,
    },
    /// There is one, and it cannot be read.
    #[error("read {}: {cause}; make it a file that root can read or name another with --config", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// F7.
    #[error("read {}: longer than {} MiB; name another with --config", path.display(), MAX_BYTES >> 20)]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// A line of it is wrong.
    #[error("{}:{line}: {fault}", path.display())]
    At {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        fault: ConfigFault,
    },
}

/// What is wrong with a line. Keys are given as written or as `…` (B2: an endpoint in their place may hold credentials),
/// values of the wrong kind by their kind only.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigFault {
    /// Not text.
    #[error("not UTF-8; save the file as UTF-8")]
    NotUtf8,
    /// Not TOML.
    #[error("not TOML: {message}; correct it here")]
    Syntax {
        /// The TOML parser's words; it quotes nothing.
        message: String,
    },
    /// A key or section that was there before.
    #[error("{what} appears twice; keep one")]
    Twice {
        /// `mode` or `[target.bus]`.
        what: String,
    },
    /// A key that means nothing.
    #[error("unknown key `{key}`{}; known keys are {}", inside(section), known.join(", "))]
    UnknownKey {
        /// The key.
        key: String,
        /// `[target.bus]`, empty for the top.
        section: String,
        /// What would have been accepted.
        known: &'static [&'static str],
    },
    /// A key that must be there.
    #[error("{section} has no {key}; add {example}")]
    MissingKey {
        /// The key.
        key: &'static str,
        /// `[target.bus]`.
        section: String,
        /// What it might be.
        example: &'static str,
    },
    /// A value of another kind.
    #[error("{key}{} is a value of kind {found}; write {expected}", inside(section))]
    Kind {
        /// The key.
        key: String,
        /// `[target.bus]`, empty for the top.
        section: String,
        /// TOML's name of the kind found.
        found: &'static str,
        /// What is accepted.
        expected: &'static str,
    },
    /// A word of a few.
    #[error("{key}{} is {found}; write {choices}", inside(section))]
    Choice {
        /// The key.
        key: &'static str,
        /// `[dns]`, empty for the top.
        section: String,
        /// What it is.
        found: String,
        /// What it may be.
        choices: &'static str,
    },
    /// A text that is no NAT64 prefix.
    #[error("nat64: {error}")]
    Nat64 {
        /// What is wrong.
        error: Nat64Error,
    },
    /// More of them than fit.
    #[error(
        "nat64 names {found} prefixes besides 64:ff9b::/96, and the limit is {MAX_NAT64}; leave out those that no network of this host translates"
    )]
    Nat64Prefixes {
        /// How many there are.
        found: usize,
    },
    /// A path that depends on where we are.
    #[error("{key} is not an absolute path; begin it with /")]
    RelativePath {
        /// The key.
        key: &'static str,
    },
    /// A path that no file can have, or not surely the file it seems to name.
    #[error("{key} has `..` or a control character in it; write the path without")]
    OddPath {
        /// The key.
        key: &'static str,
    },
    /// bpffs keeps names with dots for itself.
    #[error("the last part of pin_dir is missing or has a dot, which bpffs refuses; write another")]
    PinDir,
    /// F7.
    #[error("socket is a path of more than {MAX_SOCKET_PATH} bytes; choose a shorter one")]
    SocketTooLong,
    /// F7, and what `nft` takes without quotes.
    #[error("nft_table is not the name of a table; use a letter, then letters, digits and _, at most {MAX_TABLE_NAME}")]
    TableName,
    /// The root itself is no place for a socket.
    #[error("socket is the root directory; write the path of a file")]
    SocketRoot,
    /// Not a duration.
    #[error("{key} in [dns] is not a duration; write one such as \"5s\", \"2m\" or \"1h\"")]
    Duration {
        /// The key.
        key: &'static str,
    },
    /// Too short or too long a duration.
    #[error("{key} in [dns] is {}; write {} to {}", format_duration(*found), format_duration(*min), format_duration(*max))]
    DurationRange {
        /// The key.
        key: &'static str,
        /// What it is.
        found: Duration,
        /// Shortest.
        min: Duration,
        /// Longest.
        max: Duration,
    },
    /// `min_refresh` above `max_refresh`.
    #[error("min_refresh in [dns] is {} and max_refresh {}; make max_refresh the longer", format_duration(*min), format_duration(*max))]
    RefreshOrder {
        /// `min_refresh`.
        min: Duration,
        /// `max_refresh`.
        max: Duration,
    },
    /// A name that cannot be a target's.
    #[error("target name {name} is not 1 to {MAX_TARGET_NAME} letters, digits, - and _; rename it")]
    TargetName {
        /// The name.
        name: String,
    },
    /// `{ user = …, kernel = … }`, `{ kernel = false }`, `{ cgroup = … }`, `{}`.
    #[error(
        "no principal in {section} looks like this; write \"NAME\", UID, {{ user = …, cgroup = \"/path\" }}, {{ group = …, cgroup = \"/path\" }} or {{ kernel = true }}"
    )]
    Principal {
        /// `[target.bus]`.
        section: String,
    },
    /// An integer beyond 64 bits.
    #[error("a number in {section} is no user; a UID is a number from 0 to 4294967294")]
    Number {
        /// `[target.bus]`.
        section: String,
    },
}

fn inside(section: &str) -> String {
    if section.is_empty() {
        String::new()
    } else {
        format!(" in {section}")
    }
}
