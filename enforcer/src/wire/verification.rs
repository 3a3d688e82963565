//! What the kernel holds against what is desired.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use super::{ActiveBackend, GrantEvent, Schema};

/// `enforcer verify --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verification {
    /// `enforcer/verify/1`.
    pub schema: Schema,
    /// Whether the kernel holds exactly what is desired.
    pub identical: bool,
    /// Compared with what.
    pub against: Against,
    /// What was looked at.
    pub backend: ActiveBackend,
    /// Number of the active rule set, 0 for none.
    pub generation: u64,
    /// Entries compared.
    pub compared: u64,
    /// How many differences of each object.
    pub counts: BTreeMap<Object, u64>,
    /// The first of the differences.
    pub differences: Vec<Difference>,
    /// Grants that have ended and are still active, as no daemon was there to end them.
    #[serde(default)]
    pub expired_grants: Vec<GrantEvent>,
}

/// Something in which the kernel differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// What it is part of.
    pub object: Object,
    /// How.
    pub kind: DifferenceKind,
    /// Which entry.
    pub entry: String,
    /// As desired; null for what is extra.
    pub wanted: Option<String>,
    /// As found; null for what is missing.
    pub found: Option<String>,
}

words! {
    /// What the kernel was compared with.
    Against {
        /// What the daemon desires now.
        Daemon = "daemon",
        /// The file, and the addresses known last.
        Configuration = "configuration",
    }
}

words! {
    /// How something differs.
    DifferenceKind {
        /// Desired, and not there.
        Missing = "missing",
        /// There, and not desired.
        Extra = "extra",
        /// There, but not as desired.
        Changed = "changed",
    }
}

/// What entries are part of, in the order of their names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
#[allow(missing_docs, reason = "each has a name in `NAMES`")]
pub enum Object {
    Backend,
    Link,
    ActiveMap,
    BucketsMap,
    GenerationsMap,
    InlineUsers,
    Nat64Map,
    PortsMap,
    PrincipalsMap,
    TargetsMap,
    EndpointMaps,
    Chain(String),
    Chains,
    Counters,
    Set(String),
    Sets,
    Table,
    Pin,
    PinDirectory,
    PinnedMap,
}

const CHAIN: &str = "nft chain ";
const SET: &str = "nft set ";

impl Object {
    /// Of chains and sets each has its own after these.
    pub(super) const NAMES: [(Self, &'static str); 18] = [
        (Self::Backend, "backend"),
        (Self::Link, "link"),
        (Self::ActiveMap, "map active"),
        (Self::BucketsMap, "map buckets"),
        (Self::GenerationsMap, "map generations"),
        (Self::InlineUsers, "map generations, users at hand"),
        (Self::Nat64Map, "map nat64"),
        (Self::PortsMap, "map ports"),
        (Self::PrincipalsMap, "map principals (kind, user, cgroup)"),
        (Self::TargetsMap, "map targets"),
        (Self::EndpointMaps, "maps endpoints and prefixes"),
        (Self::Chains, "nft chains"),
        (Self::Counters, "nft counters"),
        (Self::Sets, "nft sets"),
        (Self::Table, "nft table"),
        (Self::Pin, "pin"),
        (Self::PinDirectory, "pin directory"),
        (Self::PinnedMap, "pinned map"),
    ];
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((_, name)) = Self::NAMES.iter().find(|(object, _)| object == self) {
            f.write_str(name)?;
        } else if let Self::Chain(name) = self {
            write!(f, "{CHAIN}{name}")?;
        } else if let Self::Set(name) = self {
            write!(f, "{SET}{name}")?;
        }
        Ok(())
    }
}

impl From<Object> for String {
    fn from(object: Object) -> Self {
        object.to_string()
    }
}

impl TryFrom<String> for Object {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let plain = Self::NAMES.into_iter().find(|(_, plain)| *plain == name);
        let own = |prefix, object: fn(String) -> Self| name.strip_prefix(prefix).map(|name| object(name.to_owned()));
        plain
            .map(|(object, _)| object)
            .or_else(|| own(CHAIN, Self::Chain))
            .or_else(|| own(SET, Self::Set))
            .ok_or_else(|| format!("{name:?} is no object of this version"))
    }
}
