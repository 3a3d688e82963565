//! Denials added up.

use serde::{Deserialize, Serialize};

use super::{Protocol, Schema, Verdict};

/// One line of `enforcer events --summary --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DenialSum {
    /// Which of them it is.
    pub schema: Schema,
    /// What is added up.
    pub of: SumOf,
    /// A denial of either kind.
    pub verdict: Option<Verdict>,
    /// First of the targets that denied them.
    pub target: Option<String>,
    /// Transport.
    pub protocol: Option<Protocol>,
    /// The last destination, canonical.
    pub endpoint: Option<String>,
    /// The user who connects, or with nftables who opened the socket.
    pub uid: Option<u32>,
    /// Its name.
    pub user: Option<String>,
    /// Whether kernel threads are meant.
    pub kernel_thread: bool,
    /// The socket's owner, if that is another user.
    pub socket_uid: Option<u32>,
    /// Its name.
    pub socket_user: Option<String>,
    /// The task's name, its own choice.
    pub comm: Option<String>,
    /// The path of its program, as an event has it.
    #[serde(default)]
    pub exe: Option<String>,
    /// The task's cgroup.
    pub cgroup: Option<String>,
    /// How many, in the time that was asked for.
    pub count: u64,
    /// Whether there may have been more.
    pub at_least: bool,
    /// When the first was, whatever was asked for: RFC 3339, UTC.
    pub first: String,
    /// When the last was.
    pub last: String,
}

words! {
    /// What is added up.
    SumOf {
        /// Denials alike in verdict, target, protocol, users, name of the task, program and cgroup.
        Kind = "kind",
        /// Denials for a user of whom too many kinds are told apart already.
        MoreKinds = "more-kinds",
        /// Denials for users beyond those who are told apart.
        MoreUsers = "more-users",
        /// Denials of a target that the kernel counted, and that came too fast to be reported one by one.
        Unreported = "unreported",
    }
}
