//! What is active, and whether it is as desired.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{ActiveBackend, Condition, Existing, ExistingEvent, Mode, Schema, State};
use crate::text;

/// `enforcer status --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// `enforcer/status/1`.
    pub schema: Schema,
    /// The state in a word.
    pub state: State,
    /// Why it is degraded, or off: the texts of its conditions that are no mere information.
    pub causes: Vec<String>,
    /// What is not as asked for, or worth knowing.
    #[serde(default)]
    pub conditions: Vec<Condition>,
    /// What enforces.
    pub backend: ActiveBackend,
    /// Why `auto` took nftables, if it did.
    pub backend_reason: Option<String>,
    /// Whose user is checked (D3).
    pub subject: SubjectKind,
    /// Whether anything is denied.
    pub mode: Mode,
    /// Number of the active rule set, 0 for none.
    pub generation: u64,
    /// The daemon.
    pub daemon: DaemonStatus,
    /// The cgroup whose tasks are evaluated.
    pub cgroup: String,
    /// Where the pins lie.
    pub pin_dir: String,
    /// The nftables table, of family inet.
    pub nft_table: String,
    /// Where saved rules and grants lie; empty in the answer of a version that does not tell.
    #[serde(default)]
    pub state_dir: String,
    /// How often something that others removed or changed was put back (F5).
    pub restored: u64,
    /// Endpoints active.
    pub endpoints: u64,
    /// The active targets.
    pub targets: Vec<TargetStatus>,
    /// The names looked up; only the daemon knows them.
    pub names: Vec<NameStatus>,
    /// Ports of names that were dialled at other addresses (N8); only the daemon knows them.
    #[serde(default)]
    pub dials: Vec<DialStatus>,
    /// Denials dropped before they could be delivered.
    pub events_lost: u64,
    /// Connections older than the rules; only the daemon knows them.
    #[serde(default)]
    pub existing: Option<ExistingStatus>,
}

/// The daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Whether it answers.
    pub running: bool,
    /// Its process id.
    pub pid: Option<u32>,
}

/// A target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetStatus {
    /// Its name.
    pub name: String,
    /// Its endpoints.
    pub endpoints: u64,
    /// Its principals, as the kernel has them.
    pub allow: Vec<String>,
    /// The same with names and paths.
    #[serde(default)]
    pub principals: Vec<PrincipalStatus>,
    /// Attempts it allowed.
    pub allowed: u64,
    /// Attempts it denied.
    pub denied: u64,
    /// Attempts it would have denied, in audit mode.
    pub would_deny: u64,
}

/// Who may connect: whoever is all that is said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrincipalStatus {
    /// Kernel threads; nobody else.
    pub kernel: bool,
    /// The user; absent for anybody.
    pub uid: Option<u32>,
    /// The user's name, by the configuration or passwd(5).
    pub user: Option<String>,
    /// The cgroup below which they are; absent for anywhere.
    pub cgroup_id: Option<u64>,
    /// Its path from the root of the hierarchy, where there is one.
    pub cgroup: Option<String>,
}

impl PrincipalStatus {
    /// By numbers alone.
    pub(crate) fn numbers(&self) -> String {
        Self {
            user: None,
            cgroup: None,
            ..self.clone()
        }
        .to_string()
    }
}

impl fmt::Display for PrincipalStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.uid {
            _ if self.kernel => f.write_str("kernel")?,
            None => f.write_str("anybody")?,
            Some(uid) => write!(f, "user {}", text::with_name(uid, self.user.as_deref()))?,
        }
        match (&self.cgroup, self.cgroup_id) {
            (Some(path), _) => write!(f, " in {}", text::name(path)),
            (None, Some(id)) => write!(f, " in cgroup id {id}"),
            (None, None) => Ok(()),
        }
    }
}

/// A name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameStatus {
    /// The name.
    pub name: String,
    /// The addresses that are protected for it.
    pub addresses: Vec<String>,
    /// Whether the last lookup failed (N3).
    pub stale: bool,
    /// Why.
    pub cause: Option<String>,
    /// What is protected for it.
    #[serde(default)]
    pub protects: NameProtection,
    /// How many addresses of its last answer are not protected, as it has more than a name may have (N4).
    #[serde(default)]
    pub cut: usize,
}

words! {
    /// What is protected for a name.
    #[derive(Default)]
    NameProtection {
        /// Its addresses.
        #[default]
        Addresses = "addresses",
        /// Nothing: it has none, and `unresolved = "open"`.
        Nothing = "nothing",
        /// Its port on every address: it has none, and `unresolved = "closed"`.
        Port = "port",
    }
}

impl NameProtection {
    /// What is wrong with a name whose last lookup failed.
    pub(crate) fn fault(self, name: &str, why: &str) -> String {
        match self {
            Self::Addresses => format!("name {name} is stale ({why}); its last addresses stay protected"),
            Self::Nothing => format!("name {name} is unresolved ({why}); nothing is protected for it"),
            Self::Port => {
                format!("name {name} is unresolved ({why}); its port is protected on every address until it resolves")
            }
        }
    }
}

/// Dials of a port of names, at addresses that were no endpoints then: each has the names looked up, or soon after
/// (N8).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DialStatus {
    /// The port.
    pub port: u16,
    /// How often dials had its names looked up since the daemon started.
    pub lookups: u64,
    /// The address of the last dial that was reported.
    pub last: String,
    /// Who dialled it, where that is known.
    pub uid: Option<u32>,
    /// The user's name.
    #[serde(default)]
    pub user: Option<String>,
    /// When, RFC 3339, UTC.
    pub time: String,
}

/// Connections older than the rules that would deny them, as of the last sweep (D9).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExistingStatus {
    /// What becomes of them.
    pub action: Existing,
    /// When was swept, RFC 3339, UTC.
    pub time: String,
    /// By which rule set.
    pub generation: u64,
    /// How many there are, cut ones not among them.
    pub found: u64,
    /// How many were cut since the daemon started.
    pub cut: u64,
    /// The first of those there are.
    pub connections: Vec<ExistingEvent>,
}

words! {
    /// Whose user is checked (D3).
    SubjectKind {
        /// Both the connecting task's and the socket's owner.
        TaskAndSocket = "task+socket",
        /// Both, where the socket is of TCP: of others the kernel shows no owner (`lockdown=confidentiality`
        /// before Linux 6.2).
        TaskAndTcpSocket = "task+tcp-socket",
        /// The connecting task's alone, as the kernel has no BTF.
        Task = "task",
        /// The user by whom the socket was opened: nftables alone.
        File = "file",
    }
}
