//! What is told as it happens, for people and machines: denials, of a kernel record or of what nftables logged; older connections, grants and
//! losses, made elsewhere.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, SystemTime},
};

use crate::{backend::nftables::Denial, text};

use enforcer_ebpf::{Address, EventRecord, NO_UID, UDP, Verdict, is_v4};
use serde::{Deserialize, Serialize};

/// One line of `enforcer events --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
#[allow(clippy::large_enum_variant, reason = "losses are rare, denials the rule")]
pub enum Line {
    /// A denial.
    Event(Event),
    /// A connection older than the rules.
    Existing(Existing),
    /// A grant made or ended.
    Grant(GrantEvent),
    /// Denials that nobody could be told of.
    Lost(Lost),
}

/// A denial.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// `enforcer/event/1`.
    pub schema: String,
    /// RFC 3339, UTC.
    pub time: String,
    /// `deny` or `would-deny`.
    pub verdict: String,
    /// `ebpf` or `nftables`; nftables sees no task.
    pub backend: String,
    /// Process id, in the initial PID namespace.
    pub pid: Option<u32>,
    /// Thread id.
    pub tid: Option<u32>,
    /// Name of the task.
    pub comm: Option<String>,
    /// Whether the task is a kernel thread.
    pub kernel_thread: bool,
    /// Real UID of the task, in the initial user namespace.
    pub task_uid: Option<u32>,
    /// Owner of the socket; absent where the kernel cannot tell, and for what is forwarded.
    pub socket_uid: Option<u32>,
    /// cgroup v2 id of the task.
    pub cgroup_id: Option<u64>,
    /// Cookie of the socket's network namespace.
    pub netns_cookie: Option<u64>,
    /// Where the packet came from, with nftables.
    pub source: Option<String>,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Destination as given to the call.
    pub dialled: String,
    /// Destination as judged.
    pub judged: String,
    /// First of the targets that refused.
    pub target: String,
    /// Generation of the rule set that decided.
    pub generation: u64,
}

/// A connection that the rules would refuse, and that is older than they are (D9).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Existing {
    /// `enforcer/existing/1`.
    pub schema: String,
    /// RFC 3339, UTC, of the sweep that found it.
    pub time: String,
    /// `deny` or `would-deny`.
    pub verdict: String,
    /// `reported`, `cut`, or `kept` where it was to be cut and was not.
    pub action: String,
    /// Why it was kept, or would be.
    pub reason: Option<String>,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// `established`, `syn-sent`, …
    pub state: String,
    /// Our end.
    pub local: String,
    /// The endpoint.
    pub remote: String,
    /// Owner of the socket; absent for the kernel.
    pub uid: Option<u32>,
    /// cgroup v2 id of where the socket was made, if known.
    pub cgroup_id: Option<u64>,
    /// First of the targets that refuse.
    pub target: String,
    /// Generation of the rule set that decided.
    pub generation: u64,
}

/// A grant made or ended (B4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantEvent {
    /// `enforcer/grant/1`.
    pub schema: String,
    /// RFC 3339, UTC.
    pub time: String,
    /// `granted`, `renewed`, `revoked` or `expired`.
    pub action: String,
    /// The target.
    pub target: String,
    /// The user let in; absent for everybody in the cgroup.
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
}

/// Denials that nobody could be told of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// `enforcer/lost/1`.
    pub schema: String,
    /// How many.
    pub lost: u64,
}

impl Lost {
    /// So many.
    #[must_use]
    pub fn new(lost: u64) -> Self {
        Self {
            schema: "enforcer/lost/1".to_owned(),
            lost,
        }
    }
}

/// Reads a record; `boot` is the time at which `CLOCK_BOOTTIME` was zero.
#[must_use]
pub fn read(record: &EventRecord, boot: SystemTime) -> Event {
    let port = u16::from_be(record.port);
    let dialled = match record.family {
        4 => IpAddr::V4(Ipv4Addr::from(u32::from_be(first(record.dialled)))),
        _ => IpAddr::V6(v6(record.dialled)),
    };
    let judged = if is_v4(record.judged) {
        v6(record.judged).to_canonical()
    } else {
        IpAddr::V6(v6(record.judged))
    };
    let name_end = record
        .task
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(record.task.len());
    let time = boot + Duration::from_nanos(record.time);
    Event {
        schema: "enforcer/event/1".to_owned(),
        time: rfc3339(time),
        verdict: if record.verdict == Verdict::WouldDeny as u8 {
            "would-deny"
        } else {
            "deny"
        }
        .to_owned(),
        backend: "ebpf".to_owned(),
        pid: Some(record.pid),
        tid: Some(record.tid),
        comm: Some(String::from_utf8_lossy(record.task.get(..name_end).unwrap_or_default()).into_owned()),
        kernel_thread: record.kernel_thread == 1,
        task_uid: Some(record.task_uid),
        socket_uid: (record.socket_uid != NO_UID).then_some(record.socket_uid),
        cgroup_id: Some(record.cgroup),
        netns_cookie: Some(record.netns),
        source: None,
        protocol: if record.protocol == UDP { "udp" } else { "tcp" }.to_owned(),
        dialled: SocketAddr::new(dialled, port).to_string(),
        judged: SocketAddr::new(judged, port).to_string(),
        target: record.target.as_str().to_owned(),
        generation: record.generation,
    }
}

/// Reads a denial of nftables, logged just before `now`.
#[must_use]
pub fn read_logged(denial: &Denial, now: SystemTime) -> Event {
    Event {
        schema: "enforcer/event/1".to_owned(),
        time: rfc3339(now),
        verdict: if denial.denied { "deny" } else { "would-deny" }.to_owned(),
        backend: "nftables".to_owned(),
        pid: None,
        tid: None,
        comm: None,
        kernel_thread: false,
        task_uid: None,
        socket_uid: denial.user,
        cgroup_id: None,
        netns_cookie: None,
        source: Some(denial.from.to_string()),
        protocol: denial.protocol.to_string(),
        dialled: denial.to.to_string(),
        judged: denial.to.to_string(),
        target: denial.target.clone(),
        generation: denial.generation,
    }
}

/// A time as events and status give it.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| String::new(), |time| format!("{time:.6}"))
}

/// The time at which `CLOCK_BOOTTIME` was zero, by the wall clock of now.
pub fn boot_time() -> std::io::Result<SystemTime> {
    let since = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?;
    Ok(SystemTime::now() - Duration::from(since))
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Event(event) => event.fmt(f),
            Self::Existing(existing) => existing.fmt(f),
            Self::Grant(grant) => grant.fmt(f),
            Self::Lost(lost) => write!(f, "{} events were lost: more came than were read", lost.lost),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.time, self.verdict)?;
        if let (Some(comm), Some(pid), Some(uid)) = (&self.comm, self.pid, self.task_uid) {
            write!(f, " {}[{pid}] uid {uid}", text::name(comm))?;
            if self.kernel_thread {
                f.write_str(" (kernel thread)")?;
            }
            if let Some(owner) = self.socket_uid.filter(|owner| *owner != uid) {
                write!(f, " with a socket of uid {owner}")?;
            }
        } else {
            match self.socket_uid {
                Some(uid) => write!(f, " uid {uid}")?,
                None => f.write_str(" no user")?,
            }
            write!(f, " from {}", self.source.as_deref().unwrap_or_default())?;
        }
        write!(f, " → {} {}", self.protocol, self.dialled)?;
        if self.judged != self.dialled {
            write!(f, " (= {})", self.judged)?;
        }
        write!(f, ", target {}", self.target)
    }
}

impl fmt::Display for Existing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} existing ", self.time, self.verdict)?;
        match self.uid {
            Some(uid) => write!(f, "uid {uid}")?,
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
        let Self {
            time, action, target, ..
        } = self;
        match action.as_str() {
            "revoked" => write!(f, "{time} revoked {target} for ")?,
            "expired" | "dropped" => write!(f, "{time} the grant of {target} to ")?,
            action => write!(f, "{time} {action} {target} to ")?,
        }
        match (self.user, &self.cgroup) {
            (Some(user), None) => write!(f, "user {user}")?,
            (Some(user), Some(cgroup)) => write!(f, "user {user} in {cgroup}")?,
            (None, cgroup) => write!(f, "anybody in {}", cgroup.as_deref().unwrap_or_default())?,
        }
        match (action.as_str(), &self.expires) {
            ("revoked", _) => {}
            ("expired", _) => f.write_str(" ended")?,
            ("dropped", _) => f.write_str(" is dropped, as that cgroup has been gone for longer than retain")?,
            (_, Some(end)) => write!(f, " until {end}")?,
            (_, None) => f.write_str(" until it is revoked")?,
        }
        match self.expires_before.as_deref() {
            Some("never") => f.write_str(" (before: until it is revoked)")?,
            Some(before) => write!(f, " (before: until {before})")?,
            None => {}
        }
        if let (Some(comm), Some(pid), Some(uid)) = (&self.comm, self.pid, self.uid) {
            write!(f, ", asked by {}[{pid}] uid {uid}", text::name(comm))?;
        }
        Ok(())
    }
}

fn v6(address: Address) -> Ipv6Addr {
    let [a, b, c, d] = address.map(u32::from_be).map(u128::from);
    Ipv6Addr::from(a << 96 | b << 64 | c << 32 | d)
}

fn first([word, ..]: Address) -> u32 {
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grants_are_told_in_words() {
        let told = |action: &str, expires: Option<&str>, before: Option<&str>| {
            GrantEvent {
                schema: "enforcer/grant/1".to_owned(),
                time: "NOW".to_owned(),
                action: action.to_owned(),
                target: "monit".to_owned(),
                user: Some(7),
                cgroup: None,
                expires: expires.map(str::to_owned),
                expires_before: before.map(str::to_owned),
                pid: None,
                uid: None,
                comm: None,
            }
            .to_string()
        };
        for (action, expires, before, words) in [
            ("granted", Some("T"), None, "NOW granted monit to user 7 until T"),
            ("granted", None, None, "NOW granted monit to user 7 until it is revoked"),
            (
                "renewed",
                Some("T"),
                Some("never"),
                "NOW renewed monit to user 7 until T (before: until it is revoked)",
            ),
            ("revoked", Some("T"), None, "NOW revoked monit for user 7"),
            ("expired", Some("T"), None, "NOW the grant of monit to user 7 ended"),
        ] {
            assert_eq!(told(action, expires, before), words);
        }
        assert_eq!(
            Line::Lost(Lost::new(3)).to_string(),
            "3 events were lost: more came than were read"
        );
    }
}
