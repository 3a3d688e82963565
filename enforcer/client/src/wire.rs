//! What goes over the control socket: one line of JSON in, lines of JSON out.
//!
//! [`Request`] is all that can be asked. Of the answers only what a caller of
//! [`refresh_blocking`](crate::refresh_blocking) needs is here: a caller that asks for more brings a type for it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// What is active.
    Status,
    /// Look all names up now; answered when the kernel holds the result.
    Refresh,
    /// The last denials, and with `follow` those to come.
    Events {
        /// Go on until the caller hangs up.
        #[serde(default)]
        follow: bool,
        /// Only these.
        #[serde(default, skip_serializing_if = "EventFilter::is_empty")]
        filter: EventFilter,
    },
    /// Denials added up, over restarts.
    Summary {
        /// Only these.
        #[serde(default, skip_serializing_if = "EventFilter::is_empty")]
        filter: EventFilter,
    },
    /// Let a user, or all in a cgroup, reach a target.
    Grant(GrantRequest),
    /// End what was granted.
    Revoke(RevokeRequest),
    /// What is granted.
    Grants,
    /// Compare all that the kernel holds with what is desired.
    Verify,
    /// Take the configuration file as it is now; answered when the kernel and the disk hold the result.
    Reload {
        /// Only compare: nothing changes.
        #[serde(default)]
        dry_run: bool,
    },
    /// Remove everything from the kernel and end.
    Unload,
}

/// Which events are meant: all where nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventFilter {
    /// Since then: RFC 3339.
    #[serde(default)]
    pub since: Option<String>,
    /// Of this target.
    #[serde(default)]
    pub target: Option<String>,
    /// Of this user's tasks or sockets.
    #[serde(default)]
    pub user: Option<u32>,
    /// Of these the last so many; of sums the largest.
    #[serde(default)]
    pub last: Option<usize>,
}

impl EventFilter {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Let a user, or all in a cgroup, reach a target; answered when the kernel holds it and the disk keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantRequest {
    /// The target's name.
    pub target: String,
    /// Who.
    #[serde(default)]
    pub to: Selector,
    /// The job whose container is allowed instead, where the caller's own cgroup holds more than a job.
    #[serde(default)]
    pub otherwise: Option<String>,
    /// How long, in seconds; for good where absent.
    #[serde(default)]
    pub seconds: Option<u64>,
}

/// End what was granted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RevokeRequest {
    /// The target's name.
    pub target: String,
    /// Who.
    #[serde(default)]
    pub to: Selector,
    /// Everybody, whatever `to` says.
    #[serde(default)]
    pub all: bool,
}

/// Who is meant: the caller's own cgroup where all are absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selector {
    /// A user's name or UID; anywhere, unless a cgroup or a process is given too.
    #[serde(default)]
    pub user: Option<String>,
    /// A cgroup's path from the root of the hierarchy.
    #[serde(default)]
    pub cgroup: Option<String>,
    /// A BOSH job, whose BPM container's cgroup is meant.
    #[serde(default)]
    pub job: Option<String>,
    /// A process, whose cgroup is meant.
    #[serde(default)]
    pub pid: Option<u32>,
}

/// What a client reads of a status; other keys are ignored, so that daemon and client may be of different versions.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// The state in a word.
    pub state: State,
    /// Why it is degraded, or off; for people, and empty otherwise.
    pub causes: Vec<String>,
    /// Number of the active rule set, 0 for none; grows with every change.
    pub generation: u64,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enforcing => "enforcing",
            Self::Audit => "audit",
            Self::Degraded => "degraded",
            Self::Off => "off",
        })
    }
}

/// The state in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// All as asked for.
    Enforcing,
    /// All as asked for, and nothing is denied.
    Audit,
    /// Enforced, but not all as asked for.
    Degraded,
    /// Nothing is active.
    Off,
}
