//! What can be wrong with a configuration file. Every message is one line: where, what, and what to do.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use humantime::format_duration;
use thiserror::Error;

use super::{MAX_BYTES, MAX_SOCKET_PATH, MAX_TABLE_NAME, MAX_TARGET_NAME, MIN_DURATION, Mistakes, files::MORE};
use crate::policy::MAX_NAT64;

/// A configuration that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// There is no file.
    #[error("read {}: no such file; write it or name another with --config", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// There was one, by what was active last.
    #[error("{} is gone, but rules from it were active last; restore it, or, for the defaults, run enforcer unload and \
             remove last-good.json from the state directory", path.display())]
    Gone {
        /// The file.
        path: PathBuf,
    },
    /// There is one, and it is not read.
    #[error(transparent)]
    File(#[from] FileFault),
    /// What it says is wrong.
    #[error(transparent)]
    Invalid(#[from] Mistakes),
}

impl ConfigError {
    /// Each thing that is wrong with what it says, if that is why.
    #[must_use]
    pub fn mistakes(&self) -> Option<&Mistakes> {
        match self {
            Self::Invalid(mistakes) => Some(mistakes),
            Self::Missing { .. } | Self::Gone { .. } | Self::File(_) => None,
        }
    }
}

/// Why a file of a configuration, or its directory, is not read.
#[derive(Debug, Error)]
pub enum FileFault {
    /// It cannot be.
    #[error("read {}: {cause}; make it a file that root can read{}", path.display(), without_it(path))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// F7.
    #[error("read {}: the configuration is longer than {} MiB; shorten it{}", path.display(), MAX_BYTES >> 20,
        without_it(path))]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// Others may have written it, or could put another in its place (F6).
    #[error("{} is owned by uid {uid} with mode {mode:04o}; make root its owner and the only user who can write \
             it (chown root, chmod go-w)", path.display())]
    Untrusted {
        /// The file or directory.
        path: PathBuf,
        /// Whose it is.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
}

impl FileFault {
    /// The file or directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Unreadable { path, .. } | Self::TooLong { path } | Self::Untrusted { path, .. } => path,
        }
    }
}

/// What else can be done about a file: what lies in `conf.d` can be without.
fn without_it(path: &Path) -> &'static str {
    let names = [Some(path), path.parent()].into_iter().flatten();
    if names.filter_map(Path::file_name).any(|name| name == MORE) {
        ", or remove it"
    } else {
        " or name another with --config"
    }
}

/// What is wrong with a line. Keys are given as written or as `…` (B2: an endpoint in their place may hold
/// credentials), values by their kind only.
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
    #[error("appears twice; keep one")]
    Twice,
    /// A key that means nothing.
    #[error("has an unknown key `{key}`; {}known keys are {}", belongs(key, known), known.join(", "))]
    UnknownKey {
        /// The key.
        key: String,
        /// What would have been accepted.
        known: Vec<&'static str>,
    },
    /// In a file that adds targets, a key of the configuration file.
    #[error("has `{key}`, which belongs in {}; a file in conf.d has sections [target.NAME] only", main.display())]
    NoTarget {
        /// The key.
        key: String,
        /// The configuration file.
        main: PathBuf,
    },
    /// A target that another file has, too.
    #[error("is in {}:{line}, too; keep one", path.display())]
    TargetTwice {
        /// The other file.
        path: PathBuf,
        /// Its line there.
        line: usize,
    },
    /// A key that must be there; each such key is a list.
    #[error("has no {key}; add {key} = [ … ]")]
    MissingKey {
        /// The key.
        key: &'static str,
    },
    /// A value of another kind.
    #[error("is of type {found}; write {expected}")]
    Kind {
        /// TOML's name of the kind found.
        found: &'static str,
        /// What is accepted.
        expected: String,
    },
    /// No word of a few.
    #[error("has an unknown value; write {choices}")]
    Word {
        /// What it may be.
        choices: String,
    },
    /// An integer beyond 64 bits.
    #[error("is a number of more than 64 bits; write another value")]
    Number,
    /// `min_refresh` above `max_refresh`.
    #[error("min_refresh in [dns] is {} and max_refresh {}; make max_refresh the \
        longer", format_duration(*min), format_duration(*max))]
    RefreshOrder {
        /// `min_refresh`.
        min: Duration,
        /// `max_refresh`.
        max: Duration,
    },
    /// More of them than fit.
    #[error(
        "nat64 names {found} prefixes besides 64:ff9b::/96, and the limit is {MAX_NAT64}; leave out those that no \
         network of this host translates"
    )]
    Nat64Prefixes {
        /// How many there are.
        found: usize,
    },
    /// A value that its own parser refuses.
    #[error("{message}")]
    Value {
        /// The parser's words; they quote nothing.
        message: String,
    },
}

/// Keys at the top of the configuration file, but for sections.
pub(super) const TOP_KEYS: [&str; 10] = [
    "mode",
    "backend",
    "existing",
    "forward",
    "cgroup",
    "pin_dir",
    "state_dir",
    "socket",
    "nft_table",
    "nat64",
];

/// Where a key belongs that is known elsewhere.
fn belongs(key: &str, known: &[&str]) -> &'static str {
    let is_top = known.contains(&"mode");
    match key {
        key if !is_top && TOP_KEYS.contains(&key) => "it belongs at the top of the file, above the first [section]; ",
        "min_refresh" | "max_refresh" | "retain" | "unresolved" => "it belongs in [dns]; ",
        "dir" => "it belongs in [bosh]; ",
        "endpoints" | "allow" | "grants" | "answers" => "it belongs in a section [target.NAME]; ",
        "targets" if is_top => "a target is a section [target.NAME]; ",
        _ => "",
    }
}

/// Why a value is refused; serde carries it as text.
#[derive(Debug, Error)]
pub(super) enum ValueFault {
    /// A path that depends on where we are.
    #[error("is not an absolute path; begin it with /")]
    RelativePath,
    /// A path that no file can have, or not surely the file it seems to name.
    #[error("has `..` or a control character in it; write the path without")]
    OddPath,
    /// bpffs keeps names with dots for itself.
    #[error("has no last part, or one with a dot, which a bpffs rejects; write another")]
    PinDir,
    /// F7.
    #[error("is a path of more than {MAX_SOCKET_PATH} bytes; choose a shorter one")]
    SocketTooLong,
    /// The root itself is no place for a socket.
    #[error("is the root directory; write the path of a file")]
    SocketRoot,
    /// F7, and what `nft` takes without quotes.
    #[error("is not the name of a table; use a letter, then letters, digits and _, at most {MAX_TABLE_NAME}")]
    TableName,
    /// Not a duration.
    #[error("is not a duration; write one such as \"5s\", \"2m\" or \"1h\"")]
    Duration,
    /// Too short or too long a duration.
    #[error("is {}; write {} to {}", format_duration(*found), format_duration(MIN_DURATION), format_duration(*max))]
    DurationRange { found: Duration, max: Duration },
    /// A name that cannot be a target's.
    #[error("has a name {name} that is not 1 to {MAX_TARGET_NAME} letters, digits, - and _; rename it")]
    TargetName { name: String },
    /// `{ cgroup = … }`.
    #[error(
        "is a cgroup without a user or group; add one (a cgroup as a whole can be granted: enforcer grant TARGET \
         --cgroup PATH)"
    )]
    CgroupAlone,
    /// `{ user = …, kernel = … }`, `{ kernel = false }`, `{}`.
    #[error("is not a principal; write {PRINCIPALS}")]
    Principal,
}

/// What a principal looks like.
pub(super) const PRINCIPALS: &str =
    "\"NAME\", UID, { user = …, cgroup = \"/path\" }, { group = …, cgroup = \"/path\" } or { kernel = true }";
