//! Grants (B4): who was let in to a target besides its configuration, by whom, until when. Pure; `grants/file.rs` keeps
//! them on disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::{Duration, Instant},
};

use jiff::Timestamp;

use crate::{
    policy::{CgroupPath, Policy, Principal, Uid},
    wire::{GrantAction, GrantEvent, Schema, rfc3339},
};

mod file;
mod job;
#[cfg(test)]
mod tests;

pub(crate) use file::is_saved;
pub use file::{FileError, load, save};
pub use job::{is_container, scopes};

/// Most grants at a time (F7).
pub const MAX_GRANTS: usize = 1024;

/// Who is let in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grantee {
    /// Whoever is below a cgroup, which is not the root.
    Cgroup(CgroupPath),
    /// A user, anywhere.
    User(Uid),
    /// A user below a cgroup.
    UserWithin(Uid, CgroupPath),
}

/// What a grant is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// A target's name.
    pub target: String,
    /// Who is let in.
    pub to: Grantee,
}

/// How long, and at whose word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Term {
    /// When it was granted first.
    pub since: Timestamp,
    /// When it ends by itself, by the wall clock, if not before (see [`Grants::expire`]); none for never.
    pub expires: Option<Timestamp>,
    /// Who asked for it last.
    pub by: Asker,
    /// Whether it is the asker's own cgroup that was meant, which may be a session's and never come again.
    pub own: bool,
}

/// A moment by two clocks: the wall clock, which may be set, and one that only goes on.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// The wall clock's time.
    pub wall: Timestamp,
    /// The other's, which means nothing to another process.
    pub monotonic: Instant,
}

impl Moment {
    /// This moment.
    #[must_use]
    pub fn now() -> Self {
        Self {
            wall: Timestamp::now(),
            monotonic: Instant::now(),
        }
    }
}

/// Who asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asker {
    /// Its process then, in the daemon's PID namespace; 0 where that cannot see it.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its name, its own choice.
    pub comm: String,
    /// Number and name of the process that started it, as far as both were there when it asked; not saved.
    pub parent: Option<(u32, String)>,
    /// The user who logged in and led to it (proc(5), `loginuid`); not saved.
    pub login_uid: Option<u32>,
}

/// Every grant, active or not: those of targets that are not configured now wait for these to return.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    all: BTreeMap<Key, Term>,
    /// When each of those that end does so at the latest, however the wall clock is set: from when it was first looked
    /// at.
    latest: BTreeMap<Key, Instant>,
    /// Since when the cgroups of some have been gone.
    gone: BTreeMap<Key, Instant>,
    /// Counts changes of whom they let in.
    revision: u64,
}

/// What a grant did to one that was there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GrantOutcome {
    /// There was none.
    New,
    /// There was one, which would have ended then.
    Renewed {
        /// Its end before.
        expired: Option<Timestamp>,
    },
}

/// A limit of grants; each message names it (F7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// [`MAX_GRANTS`].
    #[error("there are {MAX_GRANTS} grants, the maximum; revoke some (enforcer grants lists them)")]
    Grants,
    /// Cgroups of too many depths, those that do not exist now counted too.
    #[error(
        "the cgroups that principals and grants name would lie at {found} different depths, more than the maximum of \
         {}; grant an ancestor at a depth in use, or revoke grants",
        enforcer_ebpf::MAX_CGROUP_LEVELS
    )]
    Depths {
        /// How many.
        found: usize,
    },
    /// A cgroup too deep.
    #[error(
        "the cgroup lies {found} levels deep, more than the maximum of {}; grant an ancestor of it",
        enforcer_ebpf::MAX_CGROUP_DEPTH
    )]
    Depth {
        /// Its depth.
        found: usize,
    },
}

impl Grants {
    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Term)> {
        self.all.iter()
    }

    /// Changes whenever whom they let in does.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Grants, or gives what was granted another end. What was granted first keeps its beginning, unless the wall clock
    /// was set back behind it.
    pub fn grant(&mut self, key: Key, term: Term) -> Result<GrantOutcome, LimitError> {
        if let Some(known) = self.all.get_mut(&key) {
            let expired = known.expires;
            *known = Term {
                since: known.since.min(term.since),
                // What was named once stays named.
                own: known.own && term.own,
                ..term
            };
            self.latest.remove(&key);
            return Ok(GrantOutcome::Renewed { expired });
        }
        if self.all.len() >= MAX_GRANTS {
            return Err(LimitError::Grants);
        }
        self.all.insert(key, term);
        self.revision += 1;
        Ok(GrantOutcome::New)
    }

    /// Ends one grant, or all of a target's; tells which.
    pub fn revoke(&mut self, target: &str, to: Option<&Grantee>) -> Vec<(Key, Term)> {
        self.remove(|key, _| key.target == target && to.is_none_or(|to| key.to == *to))
    }

    /// Ends those whose time has come by either clock; tells which. Only the wall clock goes on over restarts, and
    /// counts a host's sleep; set back by a year, it would let each grant last a year longer.
    pub fn expire(&mut self, now: Moment) -> Vec<(Key, Term)> {
        for (key, term) in &self.all {
            if !self.latest.contains_key(key)
                && let Some(latest) = term.left(now.wall).and_then(|left| now.monotonic.checked_add(left))
            {
                self.latest.insert(key.clone(), latest);
            }
        }
        let latest = std::mem::take(&mut self.latest);
        let gone = self.remove(|key, term| {
            let is_past = latest.get(key).is_some_and(|latest| *latest <= now.monotonic);
            is_past || term.expires.is_some_and(|end| end <= now.wall)
        });
        self.latest = latest;
        self.latest.retain(|key, _| self.all.contains_key(key));
        gone
    }

    /// Drops those to their askers' own cgroups that have been gone for as long as `retain`, and tells which: sessions
    /// do not come again. Whatever was named stays granted.
    pub fn forget(&mut self, is_gone: impl Fn(&Key) -> bool, now: Instant, retain: Duration) -> Vec<(Key, Term)> {
        let gone = self.all.iter().filter(|(key, term)| term.own && is_gone(key));
        let since = |key| self.gone.get(key).copied().unwrap_or(now);
        let gone: BTreeMap<Key, Instant> = gone.map(|(key, _)| (key.clone(), since(key))).collect();
        self.gone.clone_from(&gone);
        self.remove(|key, _| {
            let since = gone.get(key);
            since.is_some_and(|since| now.saturating_duration_since(*since) >= retain)
        })
    }

    /// Leaves out what has an end: where nobody stays to see to it.
    pub fn without_end(&mut self) -> Vec<(Key, Term)> {
        self.remove(|_, term| term.expires.is_some())
    }

    fn remove(&mut self, goes: impl Fn(&Key, &Term) -> bool) -> Vec<(Key, Term)> {
        let gone: Vec<_> = self.all.extract_if(.., |key, term| goes(key, term)).collect();
        self.latest.retain(|key, _| self.all.contains_key(key));
        self.gone.retain(|key, _| self.all.contains_key(key));
        self.revision += u64::from(!gone.is_empty());
        gone
    }

    /// How long until the next one ends, as the clocks go now.
    #[must_use]
    pub fn until_expiry(&self, now: Moment) -> Option<Duration> {
        let by_wall = self.all.values().filter_map(|term| term.left(now.wall));
        let latest = self.latest.values();
        let at_latest = latest.map(|latest| latest.saturating_duration_since(now.monotonic));
        by_wall.chain(at_latest).min()
    }

    /// The policy with what was granted: only targets that may be granted now.
    #[must_use]
    pub fn add_to(&self, policy: &Policy) -> Policy {
        let mut policy = policy.clone();
        for target in policy.targets.iter_mut().filter(|target| target.grants) {
            let granted = self.all.keys().filter(|key| key.target == target.name);
            target.principals.extend(granted.map(|key| key.to.principal()));
        }
        policy
    }
}

/// Whether there is room for cgroups at these depths, all of them existing (F7).
pub fn check_depths(depths: &BTreeSet<usize>) -> Result<(), LimitError> {
    if let Some(found) = depths.last().copied()
        && found > enforcer_ebpf::MAX_CGROUP_DEPTH as usize
    {
        return Err(LimitError::Depth { found });
    }
    if depths.len() > enforcer_ebpf::MAX_CGROUP_LEVELS as usize {
        return Err(LimitError::Depths { found: depths.len() });
    }
    Ok(())
}

impl Term {
    /// How long it still lasts by the wall clock, nothing once it is over: never longer than it was granted for. A
    /// beginning that is still to come was written when the clock was ahead of what it is now.
    fn left(&self, wall: Timestamp) -> Option<Duration> {
        let end = self.expires?;
        let left = end.duration_since(wall.max(self.since));
        Some(Duration::try_from(left).unwrap_or_default())
    }
}

impl fmt::Display for Grantee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cgroup(cgroup) => write!(f, "anybody in {cgroup}"),
            Self::User(uid) => write!(f, "user {}", uid.0),
            Self::UserWithin(uid, cgroup) => write!(f, "user {} in {cgroup}", uid.0),
        }
    }
}

impl Grantee {
    /// Whom a rule set is to admit.
    #[must_use]
    pub fn principal(&self) -> Principal {
        match self {
            Self::Cgroup(cgroup) => Principal::Anybody { cgroup: cgroup.clone() },
            Self::User(uid) => Principal::User {
                uid: *uid,
                cgroup: None,
            },
            Self::UserWithin(uid, cgroup) => Principal::User {
                uid: *uid,
                cgroup: Some(cgroup.clone()),
            },
        }
    }

    /// Whether its cgroup may be granted before it exists: a job's container is known by the job's name.
    #[must_use]
    pub fn may_come(&self) -> bool {
        self.cgroup().is_some_and(job::is_scope)
    }

    /// The user, if one was named.
    #[must_use]
    pub fn user(&self) -> Option<Uid> {
        match self {
            Self::Cgroup(_) => None,
            Self::User(uid) | Self::UserWithin(uid, _) => Some(*uid),
        }
    }

    /// The cgroup, unless it is anywhere.
    #[must_use]
    pub fn cgroup(&self) -> Option<&CgroupPath> {
        match self {
            Self::Cgroup(cgroup) | Self::UserWithin(_, cgroup) => Some(cgroup),
            Self::User(_) => None,
        }
    }
}

impl Key {
    /// As events tell that something was done about it at a time; `by` where somebody asked.
    #[must_use]
    pub fn event(
        &self,
        action: GrantAction,
        time: Timestamp,
        expires: Option<Timestamp>,
        by: Option<&Asker>,
    ) -> GrantEvent {
        let parent = by.and_then(|by| by.parent.as_ref());
        GrantEvent {
            schema: Schema::Grant,
            time: rfc3339(time.into()),
            action,
            target: self.target.clone(),
            user: self.to.user().map(|uid| uid.0),
            cgroup: self.to.cgroup().map(ToString::to_string),
            expires: expires.map(|end| rfc3339(end.into())),
            expires_before: None,
            pid: by.map(|by| by.pid),
            uid: by.map(|by| by.uid),
            comm: by.map(|by| by.comm.clone()),
            parent_pid: parent.map(|(pid, _)| *pid),
            parent_comm: parent.map(|(_, comm)| comm.clone()),
            login_uid: by.and_then(|by| by.login_uid),
        }
    }
}
