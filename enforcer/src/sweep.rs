//! Connections older than the rules that would refuse them (D9): which they are, and which of them may be cut. Pure;
//! the facts come from `host/sock_diag.rs`, the effects are in `sweep/rounds.rs`.

use std::{
    collections::{BTreeSet, HashMap},
    fmt, io,
    net::{IpAddr, SocketAddr},
};

use enforcer_ebpf::Verdict;
use ipnet::IpNet;

use crate::{
    policy::{Protocol, Uid, canonical},
    ruleset::{self, RuleSet, Subject, owners, weigh},
    wire::SocketState,
};

mod rounds;
#[cfg(test)]
mod tests;

pub(crate) use crate::host::sock_diag::{Connection, Listener};
pub(crate) use rounds::{SweepJob, SweepQueue, SweepReport, listening, once, run};

/// The cgroups of this host, as far as they matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cgroups {
    /// The cgroup below which sockets are judged; none means all are.
    pub judged: Option<u64>,
    /// The parent of each cgroup, by id. Empty where neither `judged` nor a principal asks.
    pub parents: HashMap<u64, u64>,
}

/// A connection that the rules would refuse.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OffendingConnection {
    pub connection: Connection,
    /// Whose it is: none for the kernel.
    pub user: Option<Uid>,
    /// `Deny`, or `WouldDeny` in audit mode.
    pub verdict: Verdict,
    /// First of the targets that refuse, by index.
    pub target: usize,
    /// Why it may be an allowed user's after all. Then it is never cut.
    pub doubt: Option<Doubt>,
}

/// Why a connection may be allowed after all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// Its cgroup decides, and is not known.
    Cgroup,
    /// It may be the accepted end.
    Accepted,
}

/// Why connections are not known or not cut. Never a reason to stop enforcing (F4).
#[derive(Debug, thiserror::Error)]
pub(crate) enum SweepError {
    /// The kernel does not list.
    #[error("list {protocol} connections over {} by sock_diag: {error}; connections older than the rules are not \
             found: {}", version(*v6), list_remedy(*protocol, error))]
    List {
        protocol: Protocol,
        v6: bool,
        error: io::Error,
    },
    /// The kernel does not cut.
    #[error(
        "terminate a {protocol} connection to {remote}: {error}; it stays: {}",
        cut_remedy(error)
    )]
    Cut {
        protocol: Protocol,
        remote: SocketAddr,
        error: io::Error,
    },
    /// The cgroups are not known.
    #[error(
        "list the cgroups below {mount}: {error}; connections that a cgroup decides on are reported, not \
             terminated"
    )]
    Cgroups { mount: String, error: io::Error },
}

/// Whether the rules would refuse a connection, had it to be opened now.
#[must_use]
pub(crate) fn judge(rules: &RuleSet, cgroups: &Cgroups, connection: &Connection) -> Option<OffendingConnection> {
    let Connection { protocol, remote, .. } = *connection;
    let owners = owners(rules, protocol, remote.ip(), remote.port());
    if owners == 0 {
        return None; // D1
    }
    let known = connection.cgroup.and_then(|id| cgroups.ancestors(id));
    if let (Some(judged), Some(known)) = (cgroups.judged, &known)
        && !known.contains(&judged)
    {
        return None;
    }
    let (users, or_kernel) = subjects(connection)?;
    let within = known.clone().unwrap_or_default();
    let ask = |within: &[u64]| {
        let kernel = or_kernel.then(|| weigh(rules, owners, &subject(Uid(0), true, within)));
        let user = users.map(|uid| weigh(rules, owners, &subject(uid, false, within)));
        // Who it is of the two is not known: what either may is allowed.
        let allowed = |one: &crate::ruleset::Explanation| one.verdict == Verdict::Allow;
        if kernel.as_ref().is_some_and(allowed) {
            kernel
        } else {
            user.or(kernel)
        }
    };
    let explanation = ask(&within)?;
    match explanation.verdict {
        Verdict::Allow | Verdict::Unjudged => return None,
        Verdict::Deny | Verdict::WouldDeny => {}
    }
    let everywhere = || ask(&principal_cgroups(rules)).is_some_and(|best| best.verdict == Verdict::Allow);
    // eBPF judges by the cgroup of the task that dials, which is not kept: who may dial from some cgroup may have (D9).
    let doubtful = match cgroups.judged {
        Some(_) => known.is_none() || everywhere(),
        None => known.is_none() && everywhere(),
    };
    Some(OffendingConnection {
        connection: connection.clone(),
        user: users,
        verdict: explanation.verdict,
        target: explanation.owners.iter().find(|(_, admits)| !admits)?.0,
        doubt: doubtful.then_some(Doubt::Cgroup),
    })
}

/// Looks again at what was found, now that it is known who listens; `local` is what this host delivers to itself. What
/// nobody holds and somebody accepts is left out: it was never dialled here.
#[must_use]
pub(crate) fn mark_accepted(
    found: Vec<OffendingConnection>,
    listeners: &[Listener],
    local: &BTreeSet<IpNet>,
) -> Vec<OffendingConnection> {
    let mut kept = found;
    kept.retain_mut(|one| {
        let accepted = accepted(&one.connection, listeners, local);
        if accepted {
            one.doubt = Some(Doubt::Accepted);
        }
        !accepted || one.connection.held
    });
    kept
}

/// Whether it may have been accepted: somebody listens at its local end, and nobody here at its remote end.
fn accepted(connection: &Connection, listeners: &[Listener], local: &BTreeSet<IpNet>) -> bool {
    let here = |address: IpAddr| address.is_loopback() || ruleset::contains(local, address);
    let covers = |listener: &Listener, end: SocketAddr, here: bool| {
        let (at, end_ip) = (canonical(listener.at.ip()), canonical(end.ip()));
        listener.protocol == connection.protocol
            && listener.at.port() == end.port()
            && (at == end_ip || (at.is_unspecified() && here))
    };
    let remote_here = here(canonical(connection.remote.ip()));
    let listeners_of = |end, here| listeners.iter().any(|listener| covers(listener, end, here));
    !listeners_of(connection.remote, remote_here) && listeners_of(connection.local, true)
}

/// Whose connection it is: a user's, the kernel's, or one of both; none if that cannot be told and does not matter any
/// more.
fn subjects(connection: &Connection) -> Option<(Option<Uid>, bool)> {
    let uid = connection.uid;
    if connection.held {
        // A socket of the kernel's own looks like root's.
        return Some((Some(uid), uid == Uid(0)));
    }
    match connection.state {
        SocketState::Established | SocketState::SynSent | SocketState::CloseWait => Some((None, true)),
        // Half-open and never accepted: dialled elsewhere.
        SocketState::SynReceived => None,
        // Closed; the rest is on its way. Before Linux 6.17 the kernel calls everybody's root's.
        SocketState::FinWait1 | SocketState::FinWait2 | SocketState::LastAck | SocketState::Closing => {
            (uid != Uid(0)).then_some((Some(uid), false))
        }
    }
}

fn subject(uid: Uid, kernel_thread: bool, cgroups: &[u64]) -> Subject {
    Subject {
        task: uid,
        socket: Some(uid),
        kernel_thread,
        cgroups: cgroups.to_vec(),
    }
}

/// Every cgroup that some principal names.
pub(crate) fn principal_cgroups(rules: &RuleSet) -> Vec<u64> {
    let principals = rules.targets.iter().flat_map(|target| &target.principals);
    principals
        .filter_map(|principal| principal.cgroup().map(|(_, cgroup)| cgroup.id))
        .collect()
}

impl Cgroups {
    /// A cgroup and those around it; none if it is not known.
    fn ancestors(&self, id: u64) -> Option<Vec<u64>> {
        let mut all = vec![id];
        let mut at = *self.parents.get(&id)?;
        // The root is its own parent.
        while all.last() != Some(&at) {
            all.push(at);
            at = *self.parents.get(&at)?;
        }
        Some(all)
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cgroup => "the verdict depends on a cgroup that is not known",
            Self::Accepted => "its local port has a listener: it may have been accepted",
        })
    }
}

fn version(v6: bool) -> &'static str {
    if v6 { "IPv6" } else { "IPv4" }
}

fn list_remedy(protocol: Protocol, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::EPROTONOSUPPORT | libc::EOPNOTSUPP) => format!(
            "load the module {protocol}_diag, or use a kernel with CONFIG_INET_DIAG and CONFIG_INET_{}_DIAG",
            protocol.to_string().to_uppercase()
        ),
        Some(_) | None => "it is tried again within a minute".to_owned(),
    }
}

fn cut_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => {
            "use a kernel with CONFIG_INET_DIAG_DESTROY, or end the programs that hold such connections and set \
             existing = \"report\""
        }
        Some(libc::EPERM) => "enforcer needs CAP_NET_ADMIN in the user namespace that owns this network namespace",
        Some(_) | None => "it is tried again within a minute",
    }
}
