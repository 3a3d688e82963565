//! Events as they are reported: denials, older connections, grants, and how many events were lost.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{ActiveBackend, Protocol, Schema, Verdict};
use crate::text::{self, user};

/// One line of `enforcer events --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
#[allow(clippy::large_enum_variant, reason = "losses are rare, denials the rule")]
pub enum Event {
    /// A denial.
    Denial(Denial),
    /// A connection older than the rules.
    Existing(ExistingEvent),
    /// A grant made or ended.
    Grant(GrantEvent),
    /// Events dropped before they could be delivered.
    Lost(Lost),
}

/// A denial.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// Which of them it is.
    pub schema: Schema,
    /// RFC 3339, UTC; with nftables when the daemon read it.
    pub time: String,
    /// A denial of either kind.
    pub verdict: Verdict,
    /// eBPF or nftables; nftables sees no task.
    pub backend: ActiveBackend,
    /// Process id, in the initial PID namespace.
    pub pid: Option<u32>,
    /// Thread id.
    pub tid: Option<u32>,
    /// Name of the task.
    pub comm: Option<String>,
    /// Path of its program within the file system that the program lies on; `…` stands for what was left out. Absent
    /// where the kernel does not show it.
    #[serde(default)]
    pub exe: Option<String>,
    /// Whether the task is a kernel thread.
    pub kernel_thread: bool,
    /// Real UID of the task, in the initial user namespace.
    pub task_uid: Option<u32>,
    /// Its name, by the configuration or passwd(5).
    #[serde(default)]
    pub task_user: Option<String>,
    /// Owner of the socket; absent where the kernel cannot tell, and for what is forwarded.
    pub socket_uid: Option<u32>,
    /// Its name.
    #[serde(default)]
    pub socket_user: Option<String>,
    /// cgroup v2 id of the task.
    pub cgroup_id: Option<u64>,
    /// Its path from the root of the hierarchy, where it could still be found.
    #[serde(default)]
    pub cgroup: Option<String>,
    /// Cookie of the socket's network namespace.
    pub netns_cookie: Option<u64>,
    /// Where the packet came from, with nftables.
    pub source: Option<String>,
    /// Transport.
    pub protocol: Protocol,
    /// Destination as given to the call; with nftables the packet's, after NAT.
    pub dialled: String,
    /// Destination as evaluated: canonical.
    pub judged: String,
    /// First of the targets that denied it.
    pub target: String,
    /// Generation of the rule set that decided.
    pub generation: u64,
}

/// A connection that the rules would deny, and that is older than they are (D9).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExistingEvent {
    /// Which of them it is.
    pub schema: Schema,
    /// RFC 3339, UTC, of the sweep that found it.
    pub time: String,
    /// A denial of either kind.
    pub verdict: Verdict,
    /// What became of it.
    pub action: ExistingAction,
    /// Why it was kept, or would be.
    pub reason: Option<String>,
    /// Transport.
    pub protocol: Protocol,
    /// How far it is.
    pub state: SocketState,
    /// Our end.
    pub local: String,
    /// The endpoint.
    pub remote: String,
    /// Owner of the socket; absent for the kernel.
    pub uid: Option<u32>,
    /// Its name.
    #[serde(default)]
    pub user: Option<String>,
    /// cgroup v2 id of where the socket was made, if known.
    pub cgroup_id: Option<u64>,
    /// Its path.
    #[serde(default)]
    pub cgroup: Option<String>,
    /// First of the targets that deny it.
    pub target: String,
    /// Generation of the rule set that decided.
    pub generation: u64,
}

/// A grant made or ended (B4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantEvent {
    /// Which of them it is.
    pub schema: Schema,
    /// RFC 3339, UTC.
    pub time: String,
    /// What was done.
    pub action: GrantAction,
    /// The target.
    pub target: String,
    /// The user who was granted; absent for everybody in the cgroup.
    pub user: Option<u32>,
    /// The cgroup below which they are; absent for anywhere.
    pub cgroup: Option<String>,
    /// When it ends by itself.
    pub expires: Option<String>,
    /// When it would have ended before it was renewed; `never`, or absent for what was not.
    pub expires_before: Option<String>,
    /// Process that asked; absent where time ended it.
    pub pid: Option<u32>,
    /// Its user.
    pub uid: Option<u32>,
    /// Its name.
    pub comm: Option<String>,
    /// The process that started it.
    #[serde(default)]
    pub parent_pid: Option<u32>,
    /// That process's name.
    #[serde(default)]
    pub parent_comm: Option<String>,
    /// The user who logged in and led to it, if one did.
    #[serde(default)]
    pub login_uid: Option<u32>,
}

/// Events dropped before they could be delivered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// Which of them it is.
    pub schema: Schema,
    /// How many.
    pub lost: u64,
}

impl Lost {
    /// So many.
    #[must_use]
    pub fn new(lost: u64) -> Self {
        Self {
            schema: Schema::Lost,
            lost,
        }
    }
}

words! {
    /// What became of a connection that is older than the rules.
    ExistingAction {
        /// It stays.
        Reported = "reported",
        /// It was destroyed.
        Cut = "cut",
        /// It was to be destroyed, and was not.
        Kept = "kept",
    }
}

words! {
    /// How far a connection is (`include/net/tcp_states.h`).
    #[allow(missing_docs, reason = "the names are RFC 9293's")]
    SocketState {
        Established = "established",
        SynSent = "syn-sent",
        SynReceived = "syn-received",
        FinWait1 = "fin-wait-1",
        FinWait2 = "fin-wait-2",
        CloseWait = "close-wait",
        LastAck = "last-ack",
        Closing = "closing",
    }
}

words! {
    /// What was done about a grant.
    GrantAction {
        /// There was none.
        Granted = "granted",
        /// It was given another end.
        Renewed = "renewed",
        /// Somebody ended it.
        Revoked = "revoked",
        /// Its time was over.
        Expired = "expired",
        /// Its cgroup has been gone for longer than `retain`.
        Dropped = "dropped",
        /// Nobody stays to end it; only logged.
        #[serde(skip)]
        LeftOut = "left out",
    }
}

/// A line of `enforcer events`: the time first. What happened alone is a line of the log, which has a time of its own.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Denial(event) => write!(f, "{} {event}", event.time),
            Self::Existing(existing) => write!(f, "{} {existing}", existing.time),
            Self::Grant(grant) => write!(f, "{} {grant}", grant.time),
            Self::Lost(lost) => write!(
                f,
                "{} lost: they arrived faster than they could be read",
                text::counted(lost.lost, "event")
            ),
        }
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.verdict.fmt(f)?;
        let socket_user = self.socket_user.as_deref();
        if let (Some(comm), Some(pid), Some(uid)) = (&self.comm, self.pid, self.task_uid) {
            write!(
                f,
                " {}[{pid}] {}",
                text::name(comm),
                user(uid, self.task_user.as_deref())
            )?;
            if self.kernel_thread {
                f.write_str(" (kernel thread)")?;
            }
            if let Some(owner) = self.socket_uid.filter(|owner| *owner != uid) {
                write!(f, " with a socket of {}", user(owner, socket_user))?;
            }
        } else {
            match self.socket_uid {
                Some(uid) => write!(f, " {}", user(uid, socket_user))?,
                None => f.write_str(" no user")?,
            }
            write!(f, " from {}", self.source.as_deref().unwrap_or_default())?;
        }
        write!(f, " → {} {}", self.protocol, self.dialled)?;
        if self.judged != self.dialled {
            write!(f, " (= {})", self.judged)?;
        }
        write!(f, ", target {}", self.target)?;
        for (what, known) in [("program", &self.exe), ("cgroup", &self.cgroup)] {
            if let Some(known) = known {
                write!(f, ", {what} {}", text::name(known))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for ExistingEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} existing ", self.verdict)?;
        match self.uid {
            Some(uid) => f.write_str(&user(uid, self.user.as_deref()))?,
            None => f.write_str("kernel")?,
        }
        write!(
            f,
            " {} {} → {} ({}), target {}: {}",
            self.protocol, self.local, self.remote, self.state, self.target, self.action
        )?;
        self.reason.iter().try_for_each(|reason| write!(f, " ({reason})"))
    }
}

impl fmt::Display for GrantEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { action, target, .. } = self;
        match action {
            GrantAction::Revoked => write!(f, "{action} {target} for ")?,
            GrantAction::Expired | GrantAction::Dropped => write!(f, "the grant of {target} to ")?,
            GrantAction::Granted | GrantAction::Renewed | GrantAction::LeftOut => {
                write!(f, "{action} {target} to ")?;
            }
        }
        match (self.user, &self.cgroup) {
            (Some(user), None) => write!(f, "user {user}")?,
            (Some(user), Some(cgroup)) => write!(f, "user {user} in {cgroup}")?,
            (None, cgroup) => write!(f, "anybody in {}", cgroup.as_deref().unwrap_or_default())?,
        }
        match (action, &self.expires) {
            (GrantAction::Revoked, _) => {}
            (GrantAction::Expired, _) => f.write_str(" ended")?,
            (GrantAction::Dropped, _) => {
                f.write_str(" is dropped, as that cgroup has been gone for longer than retain")?;
            }
            (GrantAction::Granted | GrantAction::Renewed | GrantAction::LeftOut, Some(end)) => {
                write!(f, " until {end}")?;
            }
            (GrantAction::Granted | GrantAction::Renewed | GrantAction::LeftOut, None) => {
                f.write_str(" until it is revoked")?;
            }
        }
        match self.expires_before.as_deref() {
            Some("never") => f.write_str(" (before: until it is revoked)")?,
            Some(before) => write!(f, " (before: until {before})")?,
            None => {}
        }
        if let (Some(comm), Some(pid), Some(uid)) = (&self.comm, self.pid, self.uid) {
            write!(f, ", asked by {}[{pid}] uid {uid}", text::name(comm))?;
            if let (Some(parent), Some(pid)) = (&self.parent_comm, self.parent_pid) {
                write!(f, ", started by {}[{pid}]", text::name(parent))?;
            }
            if let Some(login) = self.login_uid {
                write!(f, ", logged in as uid {login}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grants_are_told_in_words() {
        let told = |action, expires: Option<&str>, before: Option<&str>| {
            GrantEvent {
                schema: Schema::Grant,
                time: "NOW".to_owned(),
                action,
                target: "monit".to_owned(),
                user: Some(7),
                cgroup: None,
                expires: expires.map(str::to_owned),
                expires_before: before.map(str::to_owned),
                pid: None,
                uid: None,
                comm: None,
                parent_pid: None,
                parent_comm: None,
                login_uid: None,
            }
            .to_string()
        };
        for (action, expires, before, words) in [
            (GrantAction::Granted, Some("T"), None, "granted monit to user 7 until T"),
            (
                GrantAction::Granted,
                None,
                None,
                "granted monit to user 7 until it is revoked",
            ),
            (
                GrantAction::Renewed,
                Some("T"),
                Some("never"),
                "renewed monit to user 7 until T (before: until it is revoked)",
            ),
            (GrantAction::Revoked, Some("T"), None, "revoked monit for user 7"),
            (
                GrantAction::Expired,
                Some("T"),
                None,
                "the grant of monit to user 7 ended",
            ),
        ] {
            assert_eq!(told(action, expires, before), words);
        }
        assert_eq!(
            Event::Lost(Lost::new(3)).to_string(),
            "3 events lost: they arrived faster than they could be read"
        );
    }
}
