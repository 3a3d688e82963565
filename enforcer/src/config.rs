//! The configuration file → `Config`: keys, types, defaults, line numbers; and what it means, as a `Policy`.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{
    policy::{AcceptedAnswers, BUS, Dns, Mode, Nat64, shown},
    wire::words,
};

mod changes;
mod contradictions;
mod error;
mod files;
mod meaning;
mod mistakes;
mod read;
mod salvage;
mod show;
#[cfg(test)]
mod tests;
mod tree;
mod trust;
mod value;

pub use crate::wire::{Backend, Existing};
pub use error::{ConfigError, ConfigFault, FileFault};
use files::Trust;
pub use files::beside;
pub(crate) use files::{modified, unread_beside};
pub use meaning::{Absent, Nobody, PolicyFault, Remark, Understood, Warning, WarningKind};
pub use mistakes::{MAX_LISTED, Mistake, Mistakes};
pub(crate) use salvage::key_line;
pub use salvage::{place, state_dir};

/// Where the configuration is unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/enforcer/enforcer.toml";

/// Most bytes of a configuration's files (F7): room for the most endpoints, and an end to `/dev/zero`.
pub const MAX_BYTES: usize = 64 << 20;

/// Longest name of a target (F7).
pub const MAX_TARGET_NAME: usize = enforcer_ebpf::MAX_TARGET_NAME;

/// Longest path of a socket (F7): `sun_path` with its terminating zero has 108 bytes (unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;

/// Shortest duration of any kind.
pub const MIN_DURATION: Duration = Duration::from_secs(1);

/// Longest time between lookups: a failed-over name must not stay unprotected longer.
pub const MAX_REFRESH: Duration = Duration::from_hours(1);

/// Longest time that an address stays protected after it left the answer.
pub const MAX_RETAIN: Duration = Duration::from_hours(30 * 24);

/// Fails where another user could have written the configuration file itself, or could put another in its place (F6).
pub(crate) fn ensure_trusted(path: &Path) -> Result<(), FileFault> {
    trust::ensure(path)
}

/// Why a file of the configuration, or the way there, is another user's to write (F6); the first that is.
#[must_use]
pub fn untrusted(path: &Path) -> Option<FileFault> {
    let mut files = [path.to_path_buf()].into_iter().chain(beside(path));
    files.find_map(|file| trust::ensure(&file).err())
}

/// A configuration file as read, defaults filled in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// The file, for messages.
    #[serde(skip)]
    pub path: PathBuf,
    /// Enforce or audit.
    pub mode: Mode,
    /// How and where it is enforced: keys of the top too, read by themselves, as serde would forget their lines.
    #[serde(flatten, skip_deserializing)]
    pub settings: Settings,
    /// How names are kept.
    #[serde(with = "value::DnsSection")]
    pub dns: Dns,
    /// NAT64 prefixes besides the well-known one (D4).
    #[serde(deserialize_with = "value::nat64")]
    pub nat64: Vec<Nat64>,
    /// The BOSH agent whose host this is; by default where no target is configured (B1).
    pub bosh: Option<Bosh>,
    /// By name, those of the file and of `conf.d`.
    #[serde(rename = "target", deserialize_with = "value::targets")]
    pub targets: BTreeMap<String, TargetSection>,
}

/// The section `[bosh]`: adds the targets `monit` and `nats` where the file has none of that name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a section [bosh]")]
pub struct Bosh {
    /// Where the agent keeps its settings.
    #[serde(deserialize_with = "value::path")]
    pub dir: PathBuf,
}

/// What is no policy: how and where it is enforced. Paths are absolute, without `.` and `..`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// What enforces.
    pub backend: Backend,
    /// What becomes of connections that are older than the rules.
    pub existing: Existing,
    /// Whose descendants are judged; `None` means the root of the cgroup v2 mount found.
    #[serde(deserialize_with = "value::perhaps_path")]
    pub cgroup: Option<PathBuf>,
    /// What becomes of connections to an endpoint that this host forwards, with nftables.
    pub forward: Forward,
    /// The directory of our pins, below a bpffs.
    #[serde(deserialize_with = "value::pin_dir")]
    pub pin_dir: PathBuf,
    /// Where `last-good.json` and `grants.json` are kept.
    #[serde(deserialize_with = "value::path")]
    pub state_dir: PathBuf,
    /// The control socket.
    #[serde(deserialize_with = "value::socket")]
    pub socket: PathBuf,
    /// The nftables table of family inet.
    #[serde(deserialize_with = "value::table_name")]
    pub nft_table: String,
}

words! {
    /// What becomes of connections to an endpoint that this host forwards: their users cannot be told.
    Forward {
        /// Refused.
        Refuse = "refuse",
        /// Not judged.
        Allow = "allow",
    }
}

/// Longest name of a table (F7).
pub const MAX_TABLE_NAME: usize = 64;

/// A section `[target.NAME]`. Whether it has the keys that it needs, `config/read.rs` looks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a section [target.NAME]")]
pub struct TargetSection {
    /// The file.
    #[serde(skip)]
    pub path: PathBuf,
    /// The line of its name.
    #[serde(skip)]
    pub line: usize,
    /// Endpoints as written.
    pub endpoints: Vec<Located<EndpointText>>,
    /// Who may connect.
    pub allow: Vec<Located<Allow>>,
    /// Whether others may be let in while it is active (B4).
    pub grants: bool,
    /// What DNS may answer for its names (N6).
    pub answers: AcceptedAnswers,
}

/// Who may connect, as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Allow {
    /// A user, anywhere.
    User(NameOrId),
    /// A user below a cgroup.
    Within {
        /// The user.
        user: NameOrId,
        /// The cgroup's path.
        cgroup: String,
    },
    /// The members of a group, perhaps below a cgroup.
    Group {
        /// The group.
        group: NameOrId,
        /// The cgroup's path.
        #[serde(skip_serializing_if = "Option::is_none")]
        cgroup: Option<String>,
    },
    /// Kernel threads.
    #[serde(serialize_with = "value::kernel")]
    Kernel,
}

/// A user or a group as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "is neither a name nor a number; write \"NAME\" or a number without quotes"
)]
pub enum NameOrId {
    /// By name.
    Name(String),
    /// By number, not yet known to be one.
    Number(i64),
}

/// An endpoint as written. It may hold credentials: all that prints or compares it leaves them out (B2).
#[derive(Clone)]
pub struct EndpointText(String);

/// A value and the line it came from, counted from 1.
// `config/tree.rs` knows the type by its name, as serde tells it: LOCATED is renamed with it.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Located<T> {
    /// The value.
    pub value: T,
    /// Its line.
    pub line: usize,
}

/// The name of [`Located`].
const LOCATED: &str = "Located";

impl Config {
    /// Reads the configuration file at `path`, and the targets in `conf.d/*.toml` beside it, none of which another user
    /// can have written (F6). No file at [`DEFAULT_PATH`] is as an empty one (B1).
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        files::load(path, Trust::Needed)
    }

    /// As [`Config::load`], whoever can have written it: to be checked or shown.
    pub fn load_to_check(path: &Path) -> Result<Self, ConfigError> {
        files::load(path, Trust::Ignored)
    }

    /// As [`Config::load`], without the files in `conf.d` that have a mistake of their own (F8); none where they have
    /// all the targets.
    pub(crate) fn load_what_is_right(path: &Path) -> Result<Option<Self>, ConfigError> {
        files::load_what_is_right(path)
    }

    /// As [`Config::load`], of the default file in an unpacked image.
    pub fn load_in(root: &Path, path: &Path) -> Result<Self, ConfigError> {
        let agent = Bosh::default().dir;
        files::load_from(
            path,
            Trust::Ignored,
            true,
            &root.join(agent.strip_prefix("/").unwrap_or(&agent)),
        )
    }

    /// Where the settings lie that say what target `nats` protects; none where the file says it itself, or nothing does
    /// (B1).
    #[must_use]
    pub fn bus_dir(&self) -> Option<&Path> {
        let ours = !self.targets.contains_key(BUS);
        self.bosh.as_ref().filter(|_| ours).map(|bosh| bosh.dir.as_path())
    }

    /// Reads a configuration of one file; `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        Ok(read::with_defaults(read::config(text, path)?))
    }
}

impl Default for Bosh {
    fn default() -> Self {
        Self {
            dir: "/var/vcap/bosh".into(),
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            backend: Backend::Auto,
            existing: Existing::Report,
            cgroup: None,
            forward: Forward::Refuse,
            pin_dir: "/sys/fs/bpf/enforcer".into(),
            state_dir: "/var/lib/enforcer".into(),
            socket: "/run/enforcer/control.sock".into(),
            nft_table: "enforcer".to_owned(),
        }
    }
}

impl Settings {
    /// Whether an instance with the one is found by the other.
    pub(crate) fn is_at_same_place(&self, other: &Self) -> bool {
        fn places(this: &Settings) -> (&Path, &Path, &str) {
            (&this.pin_dir, &this.socket, &this.nft_table)
        }
        places(self) == places(other)
    }
}

impl EndpointText {
    /// The text whole, credentials and all: to be parsed, never to be printed.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl PartialEq for EndpointText {
    fn eq(&self, other: &Self) -> bool {
        shown(&self.0) == shown(&other.0)
    }
}

impl Eq for EndpointText {}

impl fmt::Display for EndpointText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        shown(&self.0).fmt(f)
    }
}

impl fmt::Debug for EndpointText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&shown(&self.0), f)
    }
}

impl<T> Located<T> {
    /// Another value at the same line.
    pub fn with<U>(&self, value: U) -> Located<U> {
        Located { value, line: self.line }
    }
}

impl<T: PartialEq> PartialEq for Located<T> {
    /// Where a value stands does not matter to what it is.
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

impl<T: Eq> Eq for Located<T> {}
