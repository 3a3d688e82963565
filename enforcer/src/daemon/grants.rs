//! Grants asked for, ended and kept (B4): what each changes in the kernel and on disk, in which order.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use tracing::{info, warn};

use super::{About, Daemon, DaemonError};
use crate::{
    control::{CgroupError, Peer},
    grants::{self, FileError, GrantOutcome, Grantee, Grants, Key, LimitError, Moment, Term},
    host::{self, NoMatch},
    inputs::Inputs,
    policy::{CgroupPath, CgroupPathError, HostUsers, MONIT, Uid, UserError},
    ruleset::Writable,
    text,
    wire::{Event, GrantAction, GrantEvent, GrantRequest, Reply, RevokeRequest, Selector, rfc3339},
};

/// Longest time that a grant with an end may have (F7).
const MAX_TIME: Duration = Duration::from_hours(10 * 365 * 24);
/// How long to wait where no grant ends.
const LONG: Duration = Duration::from_hours(1);

/// Why something was not granted, or not revoked.
#[derive(Debug, thiserror::Error)]
pub(super) enum GrantError {
    #[error("there is no target {target}; the configuration has {}", if known.is_empty() { "none" } else { known })]
    UnknownTarget { target: String, known: String },
    #[error("target {target} may not be granted; write grants = true in its section [target.{target}] of {} and \
        reload", path.display())]
    NotGrantable { target: String, path: PathBuf },
    #[error(
        "{cgroup} contains every process that is evaluated here, so granting it would allow everybody; run this from \
         the job's own cgroup, or name one with --cgroup, --job or --pid, or a user with --user"
    )]
    Everybody { cgroup: CgroupPath },
    #[error("cgroup {cgroup} does not exist below {}; create it first, or correct the path", mount.display())]
    NoCgroup { cgroup: CgroupPath, mount: PathBuf },
    #[error(
        "cgroup {cgroup} may not be granted: {by}, who could let in anyone; name a cgroup that only root can write, up \
         to the root of the hierarchy, such as a system service's, or a user with --user"
    )]
    Writable { cgroup: CgroupPath, by: Writable },
    #[error(
        "the depth of cgroup {cgroup} is not known from within this cgroup namespace, so a grant would allow nobody; \
         run the daemon in the host's cgroup namespace, or grant a user with --user alone"
    )]
    Unplaced { cgroup: CgroupPath },
    #[error(
        "cgroup {cgroup} contains {what}, so granting it would allow more than the job; name the job's BPM container \
         with --job JOB, or a user with --user"
    )]
    Shared { cgroup: CgroupPath, what: String },
    #[error("cgroup {path:?}: {error}")]
    CgroupPath { path: String, error: CgroupPathError },
    #[error("name a cgroup, a job or a process, not several of them")]
    Several,
    #[error(transparent)]
    Process(#[from] CgroupError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error("a grant lasts from 1 s to {} days", MAX_TIME.as_secs() / 86_400)]
    Time,
    #[error(
        "this kernel's nftables cannot match a socket's cgroup (Linux 5.13 can), so the grant would allow nobody; \
         grant a user with --user alone"
    )]
    CgroupsIgnored,
    #[error(transparent)]
    Limit(#[from] LimitError),
    #[error("{0}; nothing was granted")]
    NotActive(DaemonError),
    #[error("{0}; nothing was granted, as a restart would lose it")]
    NotKept(FileError),
    #[error("granted, but {0}")]
    NotWritten(String),
    #[error("{0}; the grant is revoked, but the previous rules stay active until this is fixed")]
    StillActive(DaemonError),
    #[error("{0}; the grant is revoked, but returns with a restart until this is fixed")]
    StillKept(FileError),
}

impl Daemon {
    /// What was granted before this start. What cannot be trusted grants nothing, and is kept for its owner to see
    /// (F4).
    pub(super) fn load_grants(dir: &std::path::Path, stays: bool) -> (Grants, Option<String>) {
        let mut granted = match grants::load(dir) {
            Ok(granted) => granted,
            Err(error) => {
                let fault = match &error {
                    FileError::Io { .. } | FileError::Untrusted { .. } => {
                        format!("{error}; then restart enforcer: until then a new grant replaces those in the file")
                    }
                    FileError::Version { .. } | FileError::Damaged { .. } => error.to_string(),
                };
                return (Grants::default(), Some(fault));
            }
        };
        let moment = Moment::now();
        let now = moment.wall;
        for (key, _) in granted.expire(moment) {
            info!("{}", key.event(GrantAction::Expired, now, None, None));
        }
        if !stays {
            for (key, term) in granted.without_end() {
                let event = key.event(GrantAction::LeftOut, now, term.expires, None);
                warn!("{event}: no daemon stays to end it; it is allowed once enforcer run has started");
            }
        }
        (granted, None)
    }

    pub(super) fn answer_grant(&mut self, asked: &GrantRequest, peer: &Peer) -> Reply {
        match self.grant(asked, peer) {
            Ok(event) => Reply::Grant(Box::new(event)),
            Err(error) => {
                warn!("grant {} for {}: {error}", asked.target, describe(peer));
                Reply::Error(format!("grant {}: {error}", asked.target))
            }
        }
    }

    pub(super) fn answer_revoke(&mut self, asked: &RevokeRequest, peer: &Peer) -> Reply {
        self.revoke(asked, peer).map_or_else(
            |error| {
                warn!("revoke {} for {}: {error}", asked.target, describe(peer));
                Reply::Error(format!("revoke {}: {error}", asked.target))
            },
            Reply::Revoked,
        )
    }

    /// Answered only when the kernel holds it, and a restart would too.
    fn grant(&mut self, asked: &GrantRequest, peer: &Peer) -> Result<GrantEvent, GrantError> {
        let Some(target) = self.inputs.config.policy.target(&asked.target) else {
            return Err(self.unknown(&asked.target));
        };
        if !target.grants {
            return Err(GrantError::NotGrantable {
                target: asked.target.clone(),
                path: self.inputs.config.path.clone(),
            });
        }
        let (whom, own) = self.whom(asked, peer)?;
        let of = |to| Key {
            target: asked.target.clone(),
            to,
        };
        let keys: Vec<Key> = whom.into_iter().map(of).collect();
        self.end_expired();
        let now = Timestamp::now();
        let by = peer.asker();
        let term = Term {
            since: now,
            expires: asked.seconds.map(|seconds| end(now, seconds)).transpose()?,
            by: by.clone(),
            own,
        };
        let expires = term.expires;
        let mut inputs = self.inputs.clone();
        let changes: Vec<GrantOutcome> = (keys.iter())
            .map(|key| inputs.grants.grant(key.clone(), term.clone()))
            .collect::<Result<_, _>>()?;
        grants::check_depths(&inputs.granted().depths())?;
        let before = self.activate(inputs).map_err(GrantError::NotActive)?;
        // The cgroup may have gone since it was looked for; a job's container need not be there yet.
        let gone = keys.iter().find_map(|key| {
            let cgroup = key.to.cgroup()?;
            let is_missed = !self.inputs.host.cgroups.contains_key(cgroup)
                && (!key.to.may_come() || self.inputs.host.writable.contains_key(cgroup));
            is_missed.then_some(cgroup)
        });
        if let Some(cgroup) = gone {
            let error = self.no_match(cgroup, self.inputs.host.writable.get(cgroup).cloned());
            self.take_back(before);
            return Err(error);
        }
        let (unsaved, fault) = (self.grants_unsaved, self.faults.of(About::Grants).map(str::to_owned));
        if let Err(error) = self.keep_grants() {
            self.take_back(before);
            // Nothing was granted: the file is left as it was, and what may be in it, for its owner to see.
            self.grants_unsaved = unsaved;
            self.faults.set_silently(About::Grants, fault);
            return Err(GrantError::NotKept(error));
        }
        let mut told = None;
        for (key, change) in keys.iter().zip(changes) {
            let (action, was) = match change {
                GrantOutcome::New => (GrantAction::Granted, None),
                GrantOutcome::Renewed { expired } => (GrantAction::Renewed, Some(expired)),
            };
            let event = GrantEvent {
                expires_before: was.map(|was| was.map_or_else(|| "never".to_owned(), |end| rfc3339(end.into()))),
                ..key.event(action, Timestamp::now(), expires, Some(&by))
            };
            self.tell(&event);
            // Of the names that a container may have, the first speaks for all.
            told.get_or_insert(event);
        }
        // Ours let them in, the agent's rules do not: whoever asked is not to find that out by a time-out.
        match self.faults.of(About::JobsChain).filter(|_| asked.target == MONIT) {
            Some(fault) => Err(GrantError::NotWritten(fault.to_owned())),
            None => told.ok_or(GrantError::Process(CgroupError::Invisible)),
        }
    }

    /// The file first: a restart in between must not bring back what was revoked.
    fn revoke(&mut self, asked: &RevokeRequest, peer: &Peer) -> Result<Vec<GrantEvent>, GrantError> {
        let of_target = |grants: &Grants| grants.iter().any(|(key, _)| key.target == asked.target);
        if self.inputs.config.policy.target(&asked.target).is_none() && !of_target(&self.inputs.grants) {
            return Err(self.unknown(&asked.target));
        }
        let gone = if asked.all {
            self.inputs.grants.revoke(&asked.target, None)
        } else {
            let meant = grantees(&asked.to, peer)?;
            let each = meant
                .iter()
                .map(|to| self.inputs.grants.revoke(&asked.target, Some(to)));
            each.flatten().collect()
        };
        if gone.is_empty() {
            return Ok(Vec::new());
        }
        let kept = self.keep_grants();
        let activated = self.activate(self.inputs.clone());
        let (by, now) = (peer.asker(), Timestamp::now());
        let events: Vec<_> = gone
            .iter()
            .map(|(key, term)| key.event(GrantAction::Revoked, now, term.expires, Some(&by)))
            .collect();
        for event in &events {
            self.tell(event);
        }
        if let Err(error) = activated {
            let fault = format!("{error}; the previous rules stay active");
            self.faults.set(About::RuleSet, Some(fault));
            return Err(GrantError::StillActive(error));
        }
        kept.map_err(GrantError::StillKept)?;
        Ok(events)
    }

    /// Ends what is over, and drops what was granted to cgroups that have gone; the policy is without both then, and
    /// the rule set is to be made anew.
    pub(super) fn end_expired(&mut self) {
        let now = Moment::now();
        let expired = self
            .inputs
            .grants
            .expire(now)
            .into_iter()
            .map(|ended| (ended, GrantAction::Expired));
        let mut gone: Vec<_> = expired.collect();
        let (host, policy) = (&self.inputs.host, &self.inputs.config.policy);
        // Where the hierarchy itself is not seen nothing is known to be gone.
        let sees = || self.inputs.config.mount.join("cgroup.procs").exists();
        let is_gone = |key: &Key| {
            let target = policy.target(&key.target);
            let is_there = |cgroup| host.cgroups.contains_key(cgroup) || host.writable.contains_key(cgroup);
            let is_missed = key.to.cgroup().is_some_and(|cgroup| !is_there(cgroup));
            is_missed && target.is_some_and(|target| target.grants) && sees()
        };
        let dropped = self.inputs.grants.forget(is_gone, now.monotonic, policy.dns.retain);
        gone.extend(dropped.into_iter().map(|ended| (ended, GrantAction::Dropped)));
        if gone.is_empty() {
            if self.grants_unsaved {
                let _ = self.keep_grants();
            }
            return;
        }
        self.settle();
        for ((key, term), action) in gone {
            self.tell(&key.event(action, now.wall, term.expires, None));
        }
        let _ = self.keep_grants();
    }

    /// How long until a grant ends, as the clocks go now; a jump of the wall clock is noticed at the next tick.
    pub(super) fn until_expiry(&self) -> Duration {
        let left = self.inputs.grants.until_expiry(Moment::now());
        left.unwrap_or(LONG).min(LONG)
    }

    /// Who is meant: the caller's own cgroup where nobody is named, or its job's container where that holds more than
    /// the job. And whether it is the caller's own cgroup.
    fn whom(&self, asked: &GrantRequest, peer: &Peer) -> Result<(Vec<Grantee>, bool), GrantError> {
        let named = grantees(&asked.to, peer)?;
        let refused = named.iter().try_for_each(|to| self.refuse_too_much(to));
        match (refused, &asked.otherwise) {
            (Ok(()), _) => Ok((named, is_own(&asked.to))),
            (Err(GrantError::Everybody { .. } | GrantError::Shared { .. }), Some(job)) => {
                let container = Selector {
                    job: Some(job.clone()),
                    ..Selector::default()
                };
                let container = grantees(&container, peer)?;
                container.iter().try_for_each(|to| self.refuse_too_much(to))?;
                Ok((container, false))
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Refuses what would let in everybody, more than a job, or nobody.
    fn refuse_too_much(&self, to: &Grantee) -> Result<(), GrantError> {
        let Some(cgroup) = to.cgroup() else { return Ok(()) };
        if let Grantee::Cgroup(cgroup) = to {
            // By where they really lie: the configuration may name the judged one through a link.
            let real = |path: &std::path::Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
            let granted = real(&self.inputs.config.mount.join(cgroup.as_str().trim_start_matches('/')));
            let judged = self
                .inputs
                .config
                .cgroup
                .as_deref()
                .map_or_else(|| real(&self.inputs.config.mount), real);
            if judged.starts_with(&granted) {
                return Err(GrantError::Everybody { cgroup: cgroup.clone() });
            }
            if let Some(what) = host::supervisor(&self.inputs.config.mount, cgroup.as_str()) {
                let cgroup = cgroup.clone();
                return Err(GrantError::Shared { cgroup, what });
            }
        }
        match host::cgroup(&self.inputs.config.mount, cgroup) {
            Ok(_) => {}
            Err(NoMatch::Unplaced) => return Err(GrantError::Unplaced { cgroup: cgroup.clone() }),
            Err(NoMatch::Missing) if to.may_come() => {}
            Err(NoMatch::Missing) => return Err(self.no_match(cgroup, None)),
            Err(NoMatch::Writable(by)) => return Err(self.no_match(cgroup, Some(by))), // F6
        }
        if self.enforcement.ignores_cgroups() {
            return Err(GrantError::CgroupsIgnored);
        }
        Ok(())
    }

    /// Makes active what inputs with other grants come to. Returns the inputs before.
    fn activate(&mut self, mut inputs: Inputs) -> Result<Inputs, DaemonError> {
        inputs.settle(Instant::now());
        inputs.look_at_cgroups();
        let before = self.commit(inputs)?;
        self.chain.log(&self.inputs);
        self.faults.set(About::RuleSet, None);
        self.sync_chain();
        Ok(before)
    }

    /// Goes back to what was granted before; what cannot be made active now is tried at each tick.
    fn take_back(&mut self, before: Inputs) {
        if let Err(error) = self.activate(before.clone()) {
            self.inputs = before;
            let fault = format!("{error}; a revoked grant stays active until this is fixed");
            self.faults.set(About::RuleSet, Some(fault));
        }
    }

    /// Writes the file. What failed is tried again at each tick.
    fn keep_grants(&mut self) -> Result<(), FileError> {
        let saved = grants::save(&self.inputs.settings().state_dir, &self.inputs.grants);
        let fault = |error: &FileError| format!("{error}; grants made or revoked since are lost with a restart");
        self.faults.set(About::Grants, saved.as_ref().err().map(fault));
        self.grants_unsaved = saved.is_err();
        saved
    }

    /// The file may have been removed.
    pub(super) fn look_at_kept_grants(&mut self) {
        let has_some = self.inputs.grants.iter().next().is_some();
        if has_some && !self.grants_unsaved && !grants::is_saved(&self.inputs.settings().state_dir) {
            warn!("another process removed the file of grants; it is written again");
            let _ = self.keep_grants();
        }
    }

    fn tell(&mut self, event: &GrantEvent) {
        info!("{event}");
        self.feed.publish(Event::Grant(event.clone()));
    }

    fn unknown(&self, target: &str) -> GrantError {
        let known: Vec<&str> = self
            .inputs
            .config
            .policy
            .targets
            .iter()
            .map(|target| target.name.as_str())
            .collect();
        GrantError::UnknownTarget {
            target: target.to_owned(),
            known: known.join(", "),
        }
    }

    /// Why a cgroup would let nobody in.
    fn no_match(&self, cgroup: &CgroupPath, by: Option<Writable>) -> GrantError {
        let cgroup = cgroup.clone();
        match by {
            Some(by) => GrantError::Writable { cgroup, by },
            None => GrantError::NoCgroup {
                cgroup,
                mount: self.inputs.config.mount.clone(),
            },
        }
    }
}

/// Whom a request means: the caller's own cgroup unless it names somebody. A job's container may have several names.
fn grantees(to: &Selector, peer: &Peer) -> Result<Vec<Grantee>, GrantError> {
    let at = |path: &String| {
        let path = path.clone();
        move |error| GrantError::CgroupPath { path, error }
    };
    let cgroups = match (&to.cgroup, &to.job, to.pid, &to.user) {
        (Some(path), None, None, _) => vec![CgroupPath::parse(path).map_err(at(path))?],
        (None, Some(job), None, _) => grants::scopes(job).map_err(at(job))?,
        (None, None, Some(pid), _) => vec![peer.cgroup_of(pid)?],
        (None, None, None, Some(_)) => Vec::new(),
        (None, None, None, None) => vec![peer.cgroup()?],
        _ => return Err(GrantError::Several),
    };
    let user = to.user.as_deref().map(|user| Uid::parse(user, &HostUsers));
    Ok(match user.transpose()? {
        Some(uid) if cgroups.is_empty() => vec![Grantee::User(uid)],
        Some(uid) => cgroups
            .into_iter()
            .map(|cgroup| Grantee::UserWithin(uid, cgroup))
            .collect(),
        None => cgroups.into_iter().map(Grantee::Cgroup).collect(),
    })
}

/// Whether it is the asker's own cgroup that is meant.
fn is_own(to: &Selector) -> bool {
    let Selector {
        user: _,
        cgroup,
        job,
        pid,
    } = to;
    cgroup.is_none() && job.is_none() && pid.is_none()
}

fn end(now: Timestamp, seconds: u64) -> Result<Timestamp, GrantError> {
    let time = Duration::from_secs(seconds);
    if time.is_zero() || time > MAX_TIME {
        return Err(GrantError::Time);
    }
    let signed = SignedDuration::try_from(time).map_err(|_| GrantError::Time)?;
    now.checked_add(signed).map_err(|_| GrantError::Time)
}

fn describe(peer: &Peer) -> String {
    format!("{}[{}] uid {}", text::name(&peer.comm()), peer.pid, peer.uid)
}
